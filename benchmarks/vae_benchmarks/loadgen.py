"""The three edge scenarios of MLPerf Inference, driven by MLCommons' own LoadGen library.

SingleStream sends one example after the other and asks for the 90th percentile of their latencies; MultiStream sends
queries of several examples and asks for the 99th percentile of the queries' latencies; Offline hands over everything at
once and asks for examples per second. What is reported is read from LoadGen's own summary.
"""

from __future__ import annotations

import dataclasses
import os
import re
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vae_runtime.arguments import check_choice, check_count
from vae_runtime.errors import MissingExtraError, OutputError

from .children import run_worker
from .errors import BenchmarkError
from .machine import CpuTime, MachineFacts, others_between
from .race.case import Case
from .settings import LARGEST_BATCH, check_between

FORMAT, FORMAT_VERSION = "vae-bench-loadgen", 1
SCENARIOS = {"single-stream": "SingleStream", "multi-stream": "MultiStream", "offline": "Offline"}
OPERATIONS = ("reconstruct", "encode", "decode")
OFFICIAL_SECONDS = 600
NOTE = (
    f"not an official MLPerf result: none of its benchmarks has this model, and an official run takes at least "
    f"{OFFICIAL_SECONDS} s"
)
PREFIX, SUMMARY = "mlperf_log_", "mlperf_log_summary.txt"
_WARMUP_SECONDS, _WARMUP_QUERIES = 0.2, 3


@dataclass(frozen=True)
class LoadgenSettings:
    """scenario: a key of SCENARIOS. operation: what one example goes through. seconds: LoadGen's min_duration.
    queries: its min_query_count. samples_per_query: of multi-stream. batch: the most examples per call, offline.
    device, precision, threads: as `VAE.load` takes them.
    """

    scenario: str
    operation: str = "reconstruct"
    seconds: float = 5.0
    queries: int = 100
    samples_per_query: int = 8
    batch: int = 32
    device: str = "cpu"
    precision: str = "fp32"
    threads: int | None = None

    def __post_init__(self) -> None:
        for name, allowed in (("scenario", SCENARIOS), ("operation", OPERATIONS)):
            check_choice(getattr(self, name), name, allowed)
        check_between(self.seconds, "seconds", 0, 86400)
        for name, most in (("samples_per_query", LARGEST_BATCH), ("batch", LARGEST_BATCH), ("queries", 10**7)):
            object.__setattr__(self, name, check_count(getattr(self, name), name, most=most))


@dataclass(frozen=True)
class LoadgenReport:
    """latency_ms: at `percentile`, of one query; None offline. samples_per_second: offline; else None.
    valid: LoadGen's verdict on the run; reasons: what it recommends where that is no. summary: its whole text.
    other_cores_busy: how many cores other processes kept busy meanwhile, on average; None where the system does not
        tell.
    """

    name: str
    machine: MachineFacts
    settings: LoadgenSettings
    loadgen: str
    plan: Any
    percentile: float | None
    latency_ms: float | None
    samples_per_second: float | None
    valid: bool
    reasons: tuple[str, ...]
    note: str
    summary: str
    other_cores_busy: float | None

    def to_dict(self) -> dict[str, Any]:
        """The JSON document, as plain values."""
        return {"format": FORMAT, "format_version": FORMAT_VERSION, **dataclasses.asdict(self)}


def run_loadgen(
    path: str | os.PathLike[str], settings: LoadgenSettings, logs: str | os.PathLike[str] | None = None
) -> LoadgenReport:
    """Let LoadGen drive a bundle, or the bundle of a case, in a process of its own.

    logs: an empty or new folder for LoadGen's log files; None deletes them.

    Raises:
        MissingExtraError: mlcommons-loadgen is not installed. OutputError: `logs` has something in it.
        BenchmarkError: LoadGen ended without a result. Otherwise as `Case.open` and `VAE.load`.
    """
    case = Case.open(path)
    machine, before = MachineFacts.read(), CpuTime.read()
    with tempfile.TemporaryDirectory(prefix="vae-loadgen-") as temporary:
        folder = Path(temporary) if logs is None else _make_folder(Path(logs))
        answer = run_worker("loadgen", case=str(case.folder), settings=dataclasses.asdict(settings), folder=str(folder))
        others = others_between(before, CpuTime.read())
        try:
            summary = (folder / SUMMARY).read_text("utf-8")
        except OSError as error:
            raise BenchmarkError(f"LoadGen left no summary: {error.strerror}") from None
    return LoadgenReport(
        name=case.name,
        machine=machine,
        settings=settings,
        loadgen=answer["loadgen"],
        plan=answer["plan"],
        **parse_summary(summary),
        note=NOTE,
        summary=summary,
        other_cores_busy=others,
    )


def parse_summary(text: str) -> dict[str, Any]:
    """The result and the verdict in LoadGen's summary.

    Raises:
        BenchmarkError: there is none in it.
    """
    latency = re.search(r"^([\d.]+)th percentile latency \(ns\)\s*: (\d+)", text, re.MULTILINE)
    rate = re.search(r"^Samples per second\s*: ([\d.e+]+)", text, re.MULTILINE)
    verdict = re.search(r"^Result is\s*: (\w+)", text, re.MULTILINE)
    if verdict is None or (latency is None and rate is None):
        raise BenchmarkError("LoadGen's summary has no result in it")
    failed = re.findall(r"^  (.+?) satisfied\s*: NO", text, re.MULTILINE)
    advice = re.findall(r"^ \* ((?:Decrease|Increase|Need|Only).+)", text, re.MULTILINE)
    valid = verdict[1] == "VALID"
    return {
        "percentile": float(latency[1]) if latency else None,
        "latency_ms": int(latency[2]) / 1e6 if latency else None,
        "samples_per_second": float(rate[1]) if rate else None,
        "valid": valid,
        "reasons": () if valid else (*(f"{one} not satisfied" for one in failed), *advice),
    }


def drive(case: str, settings: dict[str, Any], folder: str) -> dict[str, Any]:
    """What the worker process does: load the bundle, warm up, and hand it to LoadGen."""
    try:
        import mlperf_loadgen
    except ImportError:
        raise MissingExtraError("mlcommons-loadgen", "loadgen", "a LoadGen scenario") from None
    from importlib.metadata import version

    from vae_runtime import VAE

    wanted = LoadgenSettings(**settings)
    opened = Case.open(case)
    with VAE.load(opened.bundle, device=wanted.device, precision=wanted.precision, threads=wanted.threads) as vae:
        inputs = opened.reference()["mean" if wanted.operation == "decode" else "x"]
        call = getattr(vae, wanted.operation)
        size = {"single-stream": 1, "multi-stream": wanted.samples_per_query, "offline": wanted.batch}[wanted.scenario]
        vae.warmup([size])  # in this thread, which LoadGen calls back in: a CUDA graph belongs to its thread

        def issue(samples: Sequence[Any]) -> None:
            for start in range(0, len(samples), size):
                part = samples[start : start + size]
                call(inputs[[one.index for one in part]])
                mlperf_loadgen.QuerySamplesComplete([mlperf_loadgen.QuerySampleResponse(one.id, 0, 0) for one in part])

        seconds = _seconds_per_call(lambda: call(inputs[[index % len(inputs) for index in range(size)]]))
        _start(mlperf_loadgen, issue, len(inputs), wanted, seconds, size, folder)
        return {"plan": vae.plan, "loadgen": version("mlcommons-loadgen")}


def _start(
    library: Any, issue: Any, inputs: int, wanted: LoadgenSettings, seconds: float, size: int, folder: str
) -> None:
    test = library.TestSettings()
    test.scenario = getattr(library.TestScenario, SCENARIOS[wanted.scenario])
    test.mode = library.TestMode.PerformanceOnly
    test.min_duration_ms = max(1, round(wanted.seconds * 1000))
    test.min_query_count = wanted.queries
    # LoadGen makes its queries beforehand, as many as these promise; half the latency makes surely enough.
    test.single_stream_expected_latency_ns = test.multi_stream_expected_latency_ns = max(1, round(seconds * 0.5e9))
    test.multi_stream_samples_per_query = wanted.samples_per_query
    test.offline_expected_qps = 1.5 * size / seconds
    output = library.LogOutputSettings()
    output.outdir, output.prefix, output.copy_summary_to_stdout = folder, PREFIX, False
    logs = library.LogSettings()
    logs.log_output, logs.enable_trace = output, False
    system = library.ConstructSUT(issue, lambda: None)
    samples = library.ConstructQSL(inputs, inputs, lambda indices: None, lambda indices: None)
    # The last argument names a file of MLPerf's audits; there is none.
    library.StartTestWithLogSettings(system, samples, test, logs, str(Path(folder) / "audit.config"))
    library.DestroyQSL(samples)
    library.DestroySUT(system)


def _seconds_per_call(call: Any) -> float:
    """Warm up; the shortest of the calls."""
    durations: list[float] = []
    begun = time.perf_counter()
    while len(durations) < _WARMUP_QUERIES or time.perf_counter() - begun < _WARMUP_SECONDS:
        start = time.perf_counter()
        call()
        durations.append(time.perf_counter() - start)
    return min(durations)


def _make_folder(folder: Path) -> Path:
    try:
        folder.mkdir(exist_ok=True)
        if any(folder.iterdir()):
            raise OutputError(f"{folder} is not empty; LoadGen's logs go to an empty or new folder")
    except OSError as error:
        raise OutputError(f"{folder} cannot be made: {error.strerror or error}") from None
    return folder
