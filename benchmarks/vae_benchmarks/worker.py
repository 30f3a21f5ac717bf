"""The process in which something is measured: one JSON request on stdin, one JSON answer on stdout, then it ends.

It is run by its path, not as a module of the package: importing `vae_benchmarks` first would import numpy and
`vae_runtime`, whose import is one of the things that are timed. For the same reason the top of this file takes only
what an interpreter has loaded anyway, and `json`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any


def main() -> None:
    """Answer {"result": ...}, or {"error": {"type", "message"}} for an expected failure."""
    # Whatever a library prints to stdout must not mix with the answer.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        request = json.loads(sys.stdin.buffer.read())
        try:
            answer = {"result": TASKS[request.pop("task")](**request)}
        except KeyboardInterrupt:
            sys.exit(130)  # the parent was interrupted too and says so
        except Exception as error:
            from vae_runtime.errors import VAEError

            if not isinstance(error, VAEError):
                raise
            answer = {"error": {"type": type(error).__name__, "message": str(error)}}
        json.dump(answer, answers)


def measure_startup(
    bundle: str,
    device: str,
    precision: str,
    threads: int | None,
    batch: int,
    size: list[int] | None = None,
    dtype: str = "float32",
) -> dict[str, Any]:
    """Times in ms and memory in bytes from here to the first result, then the peak after one call with `batch`."""
    begin = time.perf_counter_ns()
    import vae_runtime
    from vae_runtime.engine import import_engine

    import_engine()
    imported = time.perf_counter_ns()
    rss_after_import = resident_bytes()[0]
    load_begin = time.perf_counter_ns()
    vae = vae_runtime.VAE.load(bundle, device=device, precision=precision, threads=threads)
    loaded = time.perf_counter_ns()
    rss_after_load = resident_bytes()[0]
    inputs = examples(vae, batch, size, dtype)
    call_begin = time.perf_counter_ns()
    vae.reconstruct(inputs[:1])
    first_result = time.perf_counter_ns()
    vae.reconstruct(inputs)
    import_ms, load_ms = (imported - begin) / 1e6, (loaded - load_begin) / 1e6
    first_call_ms = (first_result - call_begin) / 1e6
    return {
        "import_ms": import_ms,
        "load_ms": load_ms,
        "first_call_ms": first_call_ms,
        "to_first_result_ms": import_ms + load_ms + first_call_ms,
        "rss_after_import_bytes": rss_after_import,
        "rss_after_load_bytes": rss_after_load,
        "peak_rss_bytes": resident_bytes()[1],
    }


def measure_latency(
    bundle: str,
    device: str,
    precision: str,
    threads: int | None,
    rows: list[list[Any]],
    seconds: float,
    wanted: int,
    confidence: float,
    width: float,
    split: bool | None = None,
    size: list[int] | None = None,
) -> dict[str, Any]:
    """One round: every row, [operation, batch, dtype], one after the other in this process.

    size: of the images, see `examples`. split: whether to time the parts of a call too, each for a third of `seconds`;
        None does so on GPUs.
    """
    import dataclasses
    from functools import partial

    from vae_benchmarks.gpu import GpuFacts
    from vae_benchmarks.latency import Clock, measure
    from vae_runtime import VAE
    from vae_runtime.engine import import_engine

    clock = Clock.measure()
    timed = partial(measure, wanted=wanted, confidence=confidence, width=width, clock=clock)
    with VAE.load(bundle, device=device, precision=precision, threads=threads) as vae:
        vae.warmup(sorted({batch for _, batch, _ in rows}), None if size is None else (size[0], size[1]))
        calls = [make_call(vae, operation, batch, size, dtype) for operation, batch, dtype in rows]
        results = [timed(call, seconds=seconds) for call in calls]
        kind, index = target(vae, "encode", 1).memory
        splits: list[dict[str, Any] | None] = [None] * len(rows)
        for number, (operation, batch, _) in enumerate(rows):
            if operation in ("encode", "decode") and (kind == "cuda" if split is None else split):
                parts = make_parts(vae, operation, batch, size)
                splits[number] = {
                    name: dataclasses.asdict(timed(part, seconds=seconds / len(parts))) for name, part in parts.items()
                }
        gpu = GpuFacts.read(index) if kind == "cuda" else None
        return {
            "device": vae.device,
            "precision": vae.precision,
            "plan": vae.plan,
            "onnxruntime": import_engine().__version__,
            "clock": {"resolution_ns": clock.resolution_ns, "cost_ns": clock.cost_ns},
            "rows": [dataclasses.asdict(result) for result in results],
            "splits": splits,
            "gpu": gpu and dataclasses.asdict(gpu),
        }


def make_call(
    vae: Any, operation: str, batch: int, size: list[int] | None = None, dtype: str | None = "float32"
) -> Any:
    """A call without arguments to the public `vae.<operation>`, on `batch` of the bundle's golden inputs.

    size: (height, width), see `examples`. dtype: of what takes inputs; nothing else looks at it.

    The decoder gets the means of their posteriors. Nothing but the call itself happens in it.
    """
    from functools import partial

    if operation == "sample":
        # A seed spares drawing entropy from the system.
        return partial(vae.sample, batch, seed=0, size=None if size is None else tuple(size))
    if operation == "decode":
        return partial(vae.decode, vae.encode(examples(vae, batch, size)).mode())
    return partial(getattr(vae, operation), examples(vae, batch, size, dtype))


def make_parts(vae: Any, operation: str, batch: int, size: list[int] | None = None) -> dict[str, Callable[[], object]]:
    """The parts of "encode" or "decode", each a call without arguments that is over when its work on the device is.

    Their sum need not be the whole: a warm call replays a CUDA graph between copies of its own, and what stays
    on the device does so only where that is faster.
    """
    from functools import partial

    from vae_runtime.cuda import synchronize
    from vae_runtime.device_array import copy_to_device

    inputs = examples(vae, batch, size)
    if operation == "decode":
        inputs = vae.encode(inputs).mode()
    run = vae.encode_to_device if operation == "encode" else vae.decode_to_device
    device = target(vae, operation, batch)
    there = copy_to_device(inputs, device)
    results = run(there)
    arrays = [array for array in (results if isinstance(results, tuple) else (results,)) if array is not None]

    def and_wait(call: Callable[[], object]) -> object:
        result = call()
        synchronize(device.memory[1])
        return result

    copy, compute = partial(copy_to_device, inputs, device), partial(run, there)
    return {
        "host_to_device": partial(and_wait, copy) if device.is_gpu else copy,
        "compute": partial(and_wait, compute) if device.is_gpu else compute,
        "device_to_host": lambda: [array.numpy() for array in arrays],  # in host memory when it returns
    }


def target(vae: Any, operation: str, batch: int) -> Any:
    """The `vae_runtime.devices.Device` that runs so many examples."""
    from vae_runtime.devices import find_device

    route = next(route for route in reversed(vae.plan[operation]) if batch >= route["from_batch"])
    return find_device(route["device"], route["precision"])


def examples(vae: Any, batch: int, size: list[int] | None, dtype: str | None = "float32") -> Any:
    """So many of the bundle's golden inputs; of another (height, width), cut or mirrored at their edges to it.

    dtype: "uint8" makes them images as files have them, (N, H, W[, C]), rounded where they were none.
    """
    import numpy as np

    from vae_runtime import to_uint8
    from vae_runtime.preprocess import fitting_memory

    golden = vae.golden()["x"]
    with fitting_memory("a batch of inputs", (batch, golden.shape[1], *size) if size else (batch, *golden.shape[1:])):
        if size is not None:
            more = [max(wanted - side, 0) for wanted, side in zip(size, golden.shape[2:], strict=True)]
            golden = np.pad(golden, ((0, 0), (0, 0), (0, more[0]), (0, more[1])), mode="symmetric")[
                ..., : size[0], : size[1]
            ]
        return tile(to_uint8(golden) if dtype == "uint8" else golden, batch)


def tile(examples: Any, batch: int) -> Any:
    """The examples again and again until there are `batch`; a new contiguous array."""
    import numpy as np

    return np.ascontiguousarray(examples[np.arange(batch) % len(examples)])


def resident_bytes() -> tuple[int, int]:
    """Resident memory of this process in bytes: now, and at its peak.

    On Linux from /proc/self/status. `resource.getrusage` would be wrong there: its peak outlives exec, so that a
    process begins with the peak of the one that started it.
    """
    if sys.platform.startswith("linux"):
        with open("/proc/self/status", encoding="ascii", errors="replace") as status:  # noqa: PTH123 (no pathlib here)
            fields = dict(line.split(":", 1) for line in status if ":" in line)
        if "VmHWM" in fields:
            return int(fields["VmRSS"].split()[0]) * 1024, int(fields["VmHWM"].split()[0]) * 1024
    return _resident_bytes_elsewhere()


def _resident_bytes_elsewhere() -> tuple[int, int]:
    try:
        import psutil
    except ImportError:
        from vae_runtime.errors import MissingExtraError

        raise MissingExtraError("psutil", "bench", "measuring memory on this system") from None
    memory = psutil.Process().memory_info()
    if sys.platform == "win32":
        return memory.rss, memory.peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return memory.rss, peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB on the others


def drive_loadgen(**request: Any) -> dict[str, Any]:
    """See `loadgen.drive`."""
    from vae_benchmarks.loadgen import drive

    return drive(**request)


TASKS: dict[str, Callable[..., dict[str, Any]]] = {
    "startup": measure_startup,
    "latency": measure_latency,
    "loadgen": drive_loadgen,
}

if __name__ == "__main__":
    main()
