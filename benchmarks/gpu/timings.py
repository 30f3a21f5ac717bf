"""How fast it is: by each way there is, beside bare onnxruntime with IO binding, by `vae-bench`, and in the race."""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from findings import Findings, Job

from vae_benchmarks.children import last_line
from vae_benchmarks.intervals import paired_ratio
from vae_benchmarks.latency import alternate, collector_off
from vae_benchmarks.race import RaceReport
from vae_benchmarks.race.text import format_markdown
from vae_benchmarks.worker import tile
from vae_runtime import VAE
from vae_runtime.bound import to_host
from vae_runtime.device_array import DeviceArray, copy_to_device
from vae_runtime.devices import Device, find_device
from vae_runtime.engine import import_engine
from vae_runtime.manifest import INPUT, LATENT, LOGVAR, MEAN, RECONSTRUCTION
from vae_runtime.preprocess import Float32
from vae_runtime.session import free_names

BATCHES = (1, 32)
BLOCKS, WARM_CALLS = 60, 10
ENDING_SECONDS = 5.0
BENCH_OPTIONS = ("--batch", "1,32", "--threads", "1", "--seconds", "0.5", "--operation", "encode,decode,reconstruct")
QUICK_BENCH = ("--batch", "2", "--threads", "1", "--rounds", "1", "--seconds", "0.01", "--operation", "encode,sample")
QUICK_RACE = ("--points", "1x1", "--no-tune", "--rounds", "3")


def ways(findings: Findings, job: Job) -> None:
    """What `VAE.warmup` tried and took for each batch size, and what one pool of memory for both halves saves."""
    if not job.is_gpu:
        findings.skip("ways", "the CPU has one way")
        return
    rows = []
    for precision in findings.precisions(job):
        with findings.guard(precision), VAE.load(job.case.bundle, job.device, precision) as vae:
            vae.warmup((2,) if job.quick else BATCHES)
            for operation, (route, *_) in vae.plan.items():
                rows += [{"precision": precision, "operation": operation, **way} for way in route["fixed_on_gpu"]]
        findings.figure("ways", rows)  # each time: what there is when a part's time is over is kept
    with findings.guard("memory"):
        # What the caller says of memory gives each half a pool of its own; this is the default, but said.
        own = memory_of(job, {"arena_extend_strategy": "kNextPowerOfTwo"})
        findings.figure("memory", {"each its own": own, "one for both": memory_of(job, {})})


def memory_of(job: Job, options: dict[str, str]) -> int:
    """Bytes of the GPU that a `VAE` takes for reconstructions, in a fresh process: a pool is never given back."""
    request = json.dumps({"bundle": str(job.case.bundle), "device": job.device, "options": options})
    return int(run_python("memory_use.py", str(Path(__file__).with_name("memory_use.py")), request))


def overhead(findings: Findings, job: Job) -> None:
    """`VAE` against bare sessions, bound once, with the provider's options that it took: from host to host, and on the
    device. The stream and the pinned memory that it may copy with, and the graph that it may replay on the device, are
    its own."""
    x = job.case.reference()[INPUT]
    rows = []
    with VAE.load(job.case.bundle, job.device, threads=1) as vae:
        mean = vae.encode(x).mean
        for batch in (2,) if job.quick else BATCHES:
            vae.warmup([batch])
            for operation, array in (("encode", tile(x, batch)), ("decode", tile(mean, batch))):
                for place, make in (("host", host_sides), ("device", device_sides)):
                    with findings.guard(f"{operation} {batch} {place}"):
                        sides = make(job, vae, operation, array)
                        rows.append(row(f"{operation}, batch {batch}, {place}", *sides, 10 if job.quick else BLOCKS))
                    findings.figure("rows", rows)


Sides = tuple[Callable[[], object], Callable[[], object]]


def host_sides(job: Job, vae: VAE, operation: str, array: Float32) -> Sides:
    """Bare onnxruntime and `VAE` from a host array to host arrays, by a session for this batch size on a GPU."""
    device = device_of(vae, operation, array.shape)
    session = bare_session(job, device, operation, array.shape if device.is_gpu else ())
    make = import_engine().OrtValue.ortvalue_from_shape_and_type
    given, binding = make(array.shape, np.float32, *device.memory), session.io_binding()
    binding.bind_ortvalue_input(INPUT if operation == "encode" else LATENT, given)
    outputs = [make((len(array), *shape), np.float32, *device.memory) for shape in outputs_of(job, operation).values()]
    for name, output in zip(outputs_of(job, operation), outputs, strict=True):
        binding.bind_ortvalue_output(name, output)

    def bare() -> object:
        given.update_inplace(array)
        session.run_with_iobinding(binding)
        return [to_host(output) for output in outputs]

    return bare, partial(getattr(vae, operation), array)


def device_sides(job: Job, vae: VAE, operation: str, array: Float32) -> Sides:
    """The same from an array on the device to new ones there, by a session for any batch size."""
    device = find_device(job.device)
    session = bare_session(job, device, operation)
    given = import_engine().OrtValue.ortvalue_from_numpy(array, *device.memory)

    def bare() -> object:
        binding = session.io_binding()
        binding.bind_ortvalue_input(INPUT if operation == "encode" else LATENT, given)
        for name in outputs_of(job, operation):
            binding.bind_output(name, *device.memory)
        session.run_with_iobinding(binding)
        return [DeviceArray(value, device.memory) for value in binding.get_outputs()]

    call = vae.encode_to_device if operation == "encode" else vae.decode_to_device
    return bare, partial(call, copy_to_device(array, device))


def device_of(vae: VAE, operation: str, shape: tuple[int, ...]) -> Device:
    """What the session for this shape was opened on, but for a stream of our own, which a bare session would not wait
    for, and with it a graph of our own, in place of which the bare session makes one."""
    half = vae._open_operations()[0 if operation == "encode" else 1]
    session = half.route(shape[0]).session(shape)
    device, ours = session.device, {"user_compute_stream"}
    if session.captured_call is not None:
        ours.add("enable_cuda_graph")
    return device._replace(options={name: value for name, value in device.options.items() if name not in ours})


def bare_session(job: Job, device: Device, operation: str, fixed: tuple[int, ...] = ()) -> Any:
    """onnxruntime on `VAE`'s graph in fp32, with the options that it takes. fixed: the one shape of its input."""
    graph = job.case.bundle_graph("encoder" if operation == "encode" else "decoder", "fp32", job.is_cuda)
    return open_bare(graph, device.provider, device.session_options(1, bool(fixed), ""), fixed, device.without)


def open_bare(
    graph: bytes, provider: str, settings: Mapping[str, str], fixed: tuple[int, ...], without: tuple[str, ...] = ()
) -> Any:
    """onnxruntime on a graph, with one thread. settings: the provider's. without: optimisations that are left out."""
    engine = import_engine()
    options = engine.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    for name, side in free_names(fixed):
        options.add_free_dimension_override_by_name(name, side)
    providers = [(provider, dict(settings))]
    return engine.InferenceSession(graph, options, providers=providers, disabled_optimizers=list(without))


def outputs_of(job: Job, operation: str) -> dict[str, tuple[int, ...]]:
    """The shapes of one example's outputs, by name."""
    manifest = job.case.manifest
    if operation == "decode":
        return {RECONSTRUCTION: manifest.input.example_shape}
    names = (MEAN, LOGVAR) if manifest.kind == "vae" else (MEAN,)
    return dict.fromkeys(names, manifest.latent_shape(manifest.input.example_shape))


def row(what: str, bare: Callable[[], object], ours: Callable[[], object], blocks: int) -> dict[str, Any]:
    """ratio: ours relative to bare, with its 95% interval."""
    for call in (bare, ours):
        for _ in range(WARM_CALLS):
            call()
    with collector_off():
        seconds = alternate(bare, ours, blocks)
    ratio, low, high, source = paired_ratio(*seconds)
    bare_ms, ours_ms = (statistics.median(side) * 1000 for side in seconds)
    return {
        **{"what": what, "bare_ms": bare_ms, "ours_ms": ours_ms, "blocks": len(seconds[0])},
        **{"ratio": ratio, "low": low, "high": high, "interval_from": source},
    }


def bench(findings: Findings, job: Job, precision: str) -> None:
    """`vae-bench` with the parts of each call."""
    if (reason := job.why_not(precision)) is not None:
        findings.skip(precision, reason)
        return
    chosen = QUICK_BENCH if job.quick else (*BENCH_OPTIONS, "--rounds", str(job.rounds))
    options = ("--device", job.device, "--precision", precision, "--split", "--json")
    answer = run_command(str(job.case.bundle), *chosen, *options)
    findings.figure("bench", json.loads(answer))


def race(findings: Findings, job: Job) -> None:
    """`vae-bench race` on the device; on the CPU the race is as it always is. What it has after a point is kept, even
    if the time of this part is over."""
    if job.is_gpu and job.device not in ("cuda", "cuda:0"):
        findings.skip("race", f"it is on the first GPU alone, and this is {job.device}")
        return
    options = ("--device", "cuda") if job.is_gpu else ("--competitors", "ours,onnxruntime") if job.quick else ()
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "race"
        budget = ("--budget", str(job.budget), "--output", str(output))
        try:
            run_command("race", str(job.case.folder), *options, *budget, *(QUICK_RACE if job.quick else ()))
        finally:
            if (found := output / "race.json").exists():
                report = RaceReport.load(found)
                findings.figure("race", report.to_dict())
                findings.figure("race_text", format_markdown(report))


def run_command(*arguments: str) -> str:
    """What `vae-bench` prints. Raises as `run_python`."""
    name = "vae-bench race" if arguments[0] == "race" else "vae-bench"
    return run_python(name, "-m", "vae_benchmarks.cli", *arguments)


def run_python(name: str, *arguments: str) -> str:
    """What a process of Python with these arguments prints.

    Raises:
        RuntimeError: it failed; with its last line. name: what the message calls it.
    """
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors,
        subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        try:
            stdout, _ = process.communicate()
        except BaseException:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(ENDING_SECONDS)  # it ends its own processes
            process.kill()
            raise
        finally:
            errors.seek(0)
            stderr = errors.read()
            print(stderr, file=sys.stderr, flush=True)
    if process.returncode != 0:
        last = last_line(stderr) or "it says nothing"
        raise RuntimeError(f"{name} ended with exit code {process.returncode}: {last}")
    return stdout
