"""The order of a benchmark: rounds of fresh processes, so that the machine's drift spreads over all configurations."""

from __future__ import annotations

import datetime
import math
import os
import platform
from collections.abc import Callable
from typing import Any

import numpy as np

from vae_runtime import __version__
from vae_runtime.bundle import Bundle
from vae_runtime.errors import BundleError, InputError
from vae_runtime.manifest import Manifest
from vae_runtime.preprocess import describe

from .children import run_worker
from .gpu import GpuFacts
from .latency import CLOCK_SHARE, WARMUP_RULE, Samples, Warmup
from .machine import CpuTime, MachineFacts, others_between
from .plain import from_plain
from .report import (
    BundleFacts,
    ClockFacts,
    LatencyReport,
    PlannedRoute,
    Repeated,
    Report,
    RowKey,
    StartupReport,
    Versions,
    summarize,
)
from .settings import Settings

WANTED_SAMPLES = 1000  # of a row in all rounds, before measuring may stop early: enough for a p99

Progress = Callable[[str], None]


def benchmark(
    bundle: str | os.PathLike[str], settings: Settings | None = None, progress: Progress | None = None
) -> Report:
    """Measure a bundle's latency, throughput, start-up and memory on this machine.

    Everything is measured in fresh processes through `VAE.load` and the public calls, the checks on inputs included.
    Each round starts one process for the start-up, then one per thread count, in an order that turns around every time;
    in it the rows follow each other, and each round begins with another one.

    bundle: its folder. settings: what to measure and how long. progress: called with a line of text now and then.

    Raises:
        BundleError, DeviceError, MissingExtraError: as `VAE.load` raises them. InputError: a setting out of range, or
            nothing is left to measure. BenchmarkError: a measuring process died.
    """
    settings = settings or Settings()
    tell = progress or (lambda line: None)
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    machine = MachineFacts.read()
    opened = Bundle.open(bundle)
    facts = _bundle_facts(opened, settings)
    measured, skipped = _skip_what_cannot_run(settings, opened.manifest)
    path, before = str(bundle), CpuTime.read()
    tell("one start beforehand, so that the files are in the system's cache")
    _start_up(path, measured)
    starts, workers = [], []
    for number in range(measured.rounds):
        tell(f"round {number + 1} of {measured.rounds}")
        starts.append(_start_up(path, measured))
        for threads in measured.threads[:: -1 if number % 2 else 1]:
            workers.append((threads, _measure_round(path, measured, threads, number)))
    others = others_between(before, CpuTime.read())
    if Bundle.open(bundle).digest != facts.manifest_file_sha256:
        raise BundleError(f"{bundle} was replaced while it was being measured")
    _, last = workers[-1]
    return Report(
        created=created,
        bundle=facts,
        machine=machine,
        versions=Versions(platform.python_version(), np.__version__, last["onnxruntime"], __version__),
        settings=settings,
        clock=ClockFacts(
            *(float(np.median([one["clock"][name] for _, one in workers])) for name in ("resolution_ns", "cost_ns"))
        ),
        plan={
            name: tuple(from_plain(PlannedRoute, route, "the plan") for route in routes)
            for name, routes in last["plan"].items()
        },
        method=describe_method(facts, settings),
        skipped=skipped,
        startup=_startup_report(starts, measured),
        latency=_latency_reports(workers, measured),
        gpus=tuple(from_plain(GpuFacts, answer["gpu"], "the GPU") for _, answer in workers if answer["gpu"]),
        other_cores_busy=others,
    )


def _bundle_facts(bundle: Bundle, settings: Settings) -> BundleFacts:
    golden, manifest, size = bundle.golden(), bundle.manifest, settings.size
    if size is not None and (not manifest.input.is_free or any(side % manifest.input.multiple_of for side in size)):
        raise InputError(f"size is {size}; {manifest.name} takes inputs of {describe(manifest.input)}")
    if "uint8" in settings.inputs and not manifest.input.is_image:
        raise InputError(f"input is 'uint8'; {manifest.name} takes vectors, {describe(manifest.input)}")
    return BundleFacts(
        folder=bundle.path.name,
        name=manifest.name,
        kind=manifest.kind,
        manifest_file_sha256=bundle.digest,
        golden=len(golden["x"]),
        golden_source=manifest.golden.source,
        size=manifest.input.example_shape[1:] if manifest.input.is_image else None,
    )


def _skip_what_cannot_run(settings: Settings, manifest: Manifest) -> tuple[Settings, dict[str, str]]:
    """The settings without the operations that this bundle does not have, and why."""
    can_sample = manifest.latent.prior is not None or manifest.latent.fitted_prior is not None
    if can_sample or "sample" not in settings.operations:
        return settings, {}
    reason = f"{manifest.name} is a plain autoencoder, which has no prior to sample from"
    if settings.operations == ("sample",):
        raise InputError(f"nothing is left to measure: {reason}")
    return settings.without("sample"), {"sample": reason}


def _start_up(path: str, settings: Settings) -> dict[str, float]:
    return run_worker(
        "startup",
        bundle=path,
        device=settings.device,
        precision=settings.precision,
        threads=settings.threads[0],
        batch=max(settings.batches),
        size=settings.size,
        dtype=settings.inputs[0],
    )


def _measure_round(path: str, settings: Settings, threads: int | None, number: int) -> dict[str, Any]:
    """One process with one thread count: what it answers, its rows keyed as in `Settings.rows`."""
    rows = settings.rows()
    turn = number * len(rows) // settings.rounds
    rows = rows[turn:] + rows[:turn]
    answer = run_worker(
        "latency",
        bundle=path,
        device=settings.device,
        precision=settings.precision,
        threads=threads,
        rows=rows,
        seconds=settings.seconds / settings.rounds,
        wanted=math.ceil(WANTED_SAMPLES / settings.rounds),
        confidence=settings.confidence,
        width=settings.width / 2,  # the other half is left to the differences between rounds
        split=settings.split,
        size=settings.size,
    )
    samples = [_samples(row) for row in answer["rows"]]
    splits = [parts and {name: _samples(part) for name, part in parts.items()} for parts in answer["splits"]]
    return {
        **answer,
        "rows": dict(zip(rows, samples, strict=True)),
        "splits": dict(zip(rows, splits, strict=True)),
    }


def _samples(plain: dict[str, Any]) -> Samples:
    return Samples(**{**plain, "warmup": Warmup(**plain["warmup"])})


def _latency_reports(workers: list[tuple[int | None, dict[str, Any]]], settings: Settings) -> tuple[LatencyReport, ...]:
    reports = []
    for threads in settings.threads:
        rounds = [answer for asked, answer in workers if asked == threads]
        device, precision = rounds[0]["device"], rounds[0]["precision"]
        for row in settings.rows():
            operation, batch, dtype = row
            splits = [parts for one in rounds if (parts := one["splits"][row]) is not None]
            key = RowKey(operation, batch, threads, device, precision, dtype)
            reports.append(summarize(key, [one["rows"][row] for one in rounds], settings, splits))
    return tuple(reports)


def _startup_report(starts: list[dict[str, float]], settings: Settings) -> StartupReport:
    figures = {name: Repeated.of([start[name] for start in starts]) for name in StartupReport.FIGURES}
    return StartupReport(
        threads=settings.threads[0], peak_batch=max(settings.batches), input=settings.inputs[0], **figures
    )


def describe_method(facts: BundleFacts, settings: Settings) -> dict[str, str]:
    """How the figures come about, in words, for the report."""
    size, dtypes = settings.size, " and ".join(f"as {dtype}" for dtype in settings.inputs)
    cut = "" if size is None else f", cut or mirrored to {size[0]}x{size[1]} (height x width)"
    inputs = f"the bundle's {facts.golden} golden inputs ({facts.golden_source}){cut}, {dtypes}"
    return {
        "inputs": f"{inputs}, repeated up to the batch size",
        "latents": "the means of these inputs' posteriors",
        "sample": "with seed=0",
        "calls": "the public ones of VAE, with their checks on inputs; the garbage collector is off",
        "clock": f"time.perf_counter_ns; calls are timed together where reading it takes more than {CLOCK_SHARE:.0%}",
        "warmup": f"VAE.warmup with the batch sizes of the report; {WARMUP_RULE}",
        "interval": "order statistics (binomial) of the rounds' medians; of all samples where the rounds are too few; "
        "in mean, p90 and p99 every round weighs the same",
        "split": "each part alone, until the device is done, from an array of float32; a warm call on a GPU replays a "
        "CUDA graph between copies of its own, what stays on the device only where that is faster, so that the parts "
        "may sum up to more than the call",
        "startup": "one fresh process per round, files in the system's cache, without the interpreter's own start",
        "memory": "resident memory of the whole process as the system counts it",
    }
