"""What was measured on this machine, and which engine, precision and threads it says to take.

`vae-run tune` fills one small file per bundle, machine and set of engine versions in the user's cache folder (in the
folder that the environment variable VAE_EDGE_CACHE names, where it is set);
`VAE.load(..., device="auto")` and `precision="auto"` read it. Where any of the three has changed there is no file, and
the stated rules apply: CUDA where it is usable, else the CPU; fp32.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .arguments import check_threads
from .cache import cache_folder, make_cache_folder
from .cuda import CUDA, TENSORRT, driver_version, find_gpus
from .devices import ALL_PRECISIONS, GAIN, check_device_name
from .engine import import_engine
from .errors import OutputError
from .plan import OPERATIONS, Candidate

FORMAT, FORMAT_VERSION = "vae-tuning", 1
_PACKAGES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-ep-openvino")


@dataclass(frozen=True)
class Measured:
    """seconds: by operation and batch size, the median time of one call of `VAE.encode` or `VAE.decode`."""

    candidate: Candidate
    seconds: Mapping[str, Mapping[int, float]]

    def to_dict(self) -> dict[str, Any]:
        return {
            **self.candidate._asdict(),
            "seconds": {name: {str(batch): time for batch, time in row.items()} for name, row in self.seconds.items()},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Measured:
        """Raises ValueError, OverflowError, KeyError, TypeError or AttributeError for what `to_dict` does not make."""
        device, precision, threads, spinning = (data[name] for name in Candidate._fields)
        check_device_name(device)
        if precision not in ALL_PRECISIONS or not (spinning is None or isinstance(spinning, bool)):
            raise ValueError("no such precision, or no such spinning")
        seconds = {name: {int(b): float(t) for b, t in data["seconds"][name].items()} for name in OPERATIONS}
        if not all(row and all(b >= 1 and 0 < t < math.inf for b, t in row.items()) for row in seconds.values()):
            raise ValueError("a measurement needs batch sizes from 1 and times above 0")
        return cls(Candidate(device, precision, check_threads(threads), spinning), seconds)


def machine_key() -> dict[str, Any]:
    """What a measurement holds for: processor, cores that this process may use, system, engine versions, GPUs."""
    import platform  # late, like importlib.metadata: `import vae_runtime` is to cost no more than it must
    from importlib import metadata

    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    engine = import_engine()
    versions.setdefault("onnxruntime", engine.__version__)
    # Asking the driver starts CUDA in this process, and children forked off it later could not use it.
    asks = not {CUDA, TENSORRT}.isdisjoint(engine.get_available_providers())
    return {
        "processor": _processor() or platform.processor() or platform.machine(),
        "cores": usable_cores(),
        "system": f"{platform.system()} {platform.machine()}",
        "engines": versions,
        "gpus": [gpu.name for gpu in find_gpus()[0]] if asks else [],
        "driver": driver_version() if asks else None,
    }


def usable_cores() -> int:
    """Processor cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def read_tuning(bundle: str) -> list[Measured]:
    """The measurements for the bundle with this manifest digest on this machine; empty where there are none, or none
    that can be read."""
    try:
        header = _header(bundle)
        data = json.loads(_file_of(header).read_text("utf-8"))
        if header.items() <= data.items():
            return [Measured.from_dict(entry) for entry in data["measured"]]
    except (OutputError, OSError, ValueError, ArithmeticError, KeyError, TypeError, AttributeError, RecursionError):
        pass  # a damaged cache is no cache
    return []


def write_tuning(bundle: str, measured: Sequence[Measured]) -> Path:
    """Keep the measurements, in place of older ones.

    Raises:
        OutputError: the cache folder cannot be written.
    """
    from .atomic import write_json  # late: running a bundle writes nothing

    header = _header(bundle)
    path = make_cache_folder("tuning") / _file_of(header).name
    write_json(path, {**header, "measured": [entry.to_dict() for entry in measured]})
    return path


def _file_of(header: Mapping[str, Any]) -> Path:
    key = json.dumps({"bundle": header["bundle"], **header["machine"]}, sort_keys=True)
    return cache_folder() / "tuning" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


def _header(bundle: str) -> dict[str, Any]:
    return {"format": FORMAT, "format_version": FORMAT_VERSION, "bundle": bundle, "machine": machine_key()}


def choose(
    measured: Sequence[Measured], operation: str, device: str, precision: str, threads: int | None
) -> list[tuple[int, Candidate]]:
    """The fastest candidate per batch range, [(from_batch, candidate), ...]; empty where nothing fits.

    device, precision: a name, or "auto" for any. threads: None for any; else the candidates measured with that many, or
    with the next fewer, are compared and run with it.
    """
    fitting = [
        entry
        for entry in measured
        if device in ("auto", entry.candidate.device) and precision in ("auto", entry.candidate.precision)
    ]
    if threads is not None:
        counts = {entry.candidate.threads for entry in fitting if (entry.candidate.threads or 0) <= threads}
        nearest = max((count for count in counts if count is not None), default=None)
        fitting = [entry for entry in fitting if entry.candidate.threads in (None, nearest)]
    sizes = sorted({batch for entry in fitting for batch in entry.seconds[operation]})
    routes: list[tuple[int, Candidate]] = []
    for position, size in enumerate(sizes):
        # From the geometric mean of two measured sizes on, the larger one is nearer.
        start = 1 if position == 0 else int((sizes[position - 1] * size) ** 0.5) + 1
        best = _fastest([entry for entry in fitting if size in entry.seconds[operation]], operation, size)
        if threads is not None and best.threads is not None:
            best = Candidate(best.device, best.precision, threads, best.spinning)
        if not routes or routes[-1][1] != best:
            routes.append((start, best))
    return routes


def _fastest(entries: Sequence[Measured], operation: str, size: int) -> Candidate:
    """The first of `entries`, the most exact and plainest first, than which none is more than 3% faster, see `GAIN`."""
    least = min(entry.seconds[operation][size] for entry in entries)
    return next(entry.candidate for entry in entries if GAIN * entry.seconds[operation][size] <= least)


def _processor() -> str | None:
    """The processor's name as Linux tells it: x86 by model name; ARM by the numbers of its maker and design, and boards
    also in the device tree."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    names = ("model name", "Hardware", "Model", "CPU implementer", "CPU part", "CPU variant")
    return ", ".join(fields[name] for name in names if fields.get(name)) or None
