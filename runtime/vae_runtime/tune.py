"""Measuring what `tuning` chooses from: each variant in which this machine can run a bundle, in processes of its own.

Engines disturb each other's timing inside one process (spinning threads), and a provider that crashes must not take the
others with it; so each candidate is measured by a child, in rounds, with the order turned around every time.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .arguments import as_float
from .bundle import Bundle
from .cache import make_cache_folder
from .devices import ALL_PRECISIONS, PROVIDER_PRECISIONS, usable_devices
from .engine import first_line
from .errors import DeviceError, InputError, VAEError
from .fidelity import PSNR_BUDGET_DB, data_range, psnr_db
from .interpreter import interpreter
from .likelihood import targets
from .manifest import INPUT, RECONSTRUCTION, Manifest
from .plan import OPERATIONS, Candidate, same_plan
from .preprocess import Float32
from .tuning import Measured, usable_cores, write_tuning
from .vae import VAE

BATCHES = (1, 8, 32)
ROUNDS = 3
DEFAULT_SECONDS = 60.0
_CALL_LIMIT = 0.5  # seconds; a batch whose call would take longer is left to the figures of the one before
_GPUS = ("cuda", "tensorrt")
_CHILD_LIMIT = 120.0  # seconds after which a child is given up

Tell = Callable[[str], None]


def tune(
    path: str | os.PathLike[str],
    devices: Sequence[str] | None = None,
    seconds: float = DEFAULT_SECONDS,
    progress: Tell | None = None,
) -> tuple[Path, list[Measured]]:
    """Measure a bundle on this machine and keep the result where `VAE.load(..., device="auto")` finds it.

    Candidates are the usable devices × the precisions that are within the bundle's quality budget × thread counts ×
    spinning; what fails the bundle's self-test here is left out. Returns the file and the measurements.

    devices: some of `vae_runtime.devices.usable_devices()`; None takes all that are usable.
    seconds: for everything, about; at least one round is always measured. progress: called with a line of text.

    Raises:
        BundleError: as `VAE.load`. InputError: a device that is not usable, seconds out of range. DeviceError: nothing
            could be measured. OutputError: the cache folder cannot be written.
    """
    if not 0 < as_float(seconds) <= 3600:
        raise InputError(f"seconds is {seconds!r}; expected a number above 0, at most 3600")
    tell = progress or (lambda line: None)
    bundle = Bundle.open(path)
    make_cache_folder("tuning")  # a folder that cannot be written is found before anything is measured
    alive = candidates(bundle.manifest, _usable(devices))
    times: dict[Candidate, list[dict[str, dict[int, float]]]] = {candidate: [] for candidate in alive}
    start = time.monotonic()
    share = seconds / ROUNDS / len(alive)
    for number in range(ROUNDS):
        for candidate in alive[:: -1 if number % 2 else 1]:
            tell(f"round {number + 1} of {ROUNDS}: {describe(candidate)}")
            result = _in_child(path, candidate, share)
            if isinstance(result, str):
                tell(f"  left out: {result}")
                alive = [other for other in alive if other != candidate]
                times.pop(candidate)
            else:
                times[candidate].append(result)
        spent = time.monotonic() - start
        if spent + spent / (number + 1) > 1.1 * seconds:  # another round would not fit
            break
    measured = [Measured(candidate, _medians(rounds)) for candidate, rounds in times.items()]
    if not measured:
        raise DeviceError(f"{bundle.manifest.name} could not be measured on any of {', '.join(_usable(devices))}")
    return write_tuning(bundle.digest, measured), measured


def candidates(manifest: Manifest, devices: Sequence[str]) -> list[Candidate]:
    """What there is to measure, the plainest and most exact first."""
    cores = usable_cores()
    counts = sorted({1, max(1, cores // 2), cores})
    precisions = [name for name in ALL_PRECISIONS if _is_good(manifest, name)]
    found = []
    for device in devices:
        for precision in precisions:
            if not _worth_measuring(device, precision):
                continue
            if _is_gpu(device):
                found.append(Candidate(device, precision))
            for threads in counts if not _is_gpu(device) else ():
                spinnings = (None, False) if device == "cpu" and threads > 1 else (None,)
                found += [Candidate(device, precision, threads, spinning) for spinning in spinnings]
    return found


def describe(candidate: Candidate) -> str:
    """`cpu, int8, 2 threads, no spinning`."""
    threads = "" if candidate.threads is None else f", {candidate.threads} thread{'s' if candidate.threads > 1 else ''}"
    return f"{candidate.device}, {candidate.precision}{threads}{', no spinning' if candidate.spinning is False else ''}"


def _usable(devices: Sequence[str] | None) -> list[str]:
    """By the names that `VAE.device` reports."""
    reasons = usable_devices()
    if devices is None:  # TensorRT only where it is named: building its engines takes minutes
        devices = [name for name, reason in reasons.items() if reason is None and name != "tensorrt"]
    if not devices:
        raise InputError(f"devices is {devices!r}; expected at least one of {', '.join(reasons)}")
    for name in devices:
        if (reason := reasons.get(name, f"it is not one of {', '.join(reasons)}")) is not None:
            raise InputError(f"device {name!r} cannot be measured: {reason}")
    return list(dict.fromkeys(f"{name}:0" if name in _GPUS else name for name in devices))


def _is_good(manifest: Manifest, precision: str) -> bool:
    """Whether the bundle has it within the budget; bf16, and tf32 where the export was not asked, are judged here."""
    if precision in manifest.precisions:
        return manifest.precisions[precision].within_budget
    return precision in PROVIDER_PRECISIONS and precision not in manifest.refused


def _worth_measuring(device: str, precision: str) -> bool:
    """fp16 gains nothing on a CPU, and int8 as it is written here nothing on a GPU; bf16 and tf32 only exist on their
    providers."""
    own = {"fp16": _is_gpu(device), "tf32": _is_gpu(device), "bf16": device == "openvino", "int8": not _is_gpu(device)}
    return own.get(precision, True)


def _is_gpu(device: str) -> bool:
    return device.partition(":")[0] in _GPUS


def _medians(rounds: Sequence[dict[str, dict[int, float]]]) -> dict[str, dict[int, float]]:
    return {
        name: {
            batch: statistics.median(result[name][batch] for result in rounds if batch in result[name])
            for batch in sorted({batch for result in rounds for batch in result[name]})
        }
        for name in OPERATIONS
    }


def _in_child(path: str | os.PathLike[str], candidate: Candidate, seconds: float) -> dict[str, dict[int, float]] | str:
    """Seconds per call by operation and batch, or why there are none."""
    task = json.dumps({"path": os.fspath(path), "candidate": candidate._asdict(), "seconds": seconds})
    command = [*interpreter("tuning"), "-m", "vae_runtime.tune"]
    try:
        child = subprocess.run(
            command,
            input=task,
            capture_output=True,
            text=True,
            timeout=_CHILD_LIMIT + seconds,
            check=False,
        )
        answer = json.loads(child.stdout)
    except subprocess.TimeoutExpired:
        return f"it did not finish within {_CHILD_LIMIT + seconds:.0f} s"
    except OSError as error:
        return f"its process could not be started: {error.strerror}"
    except ValueError:
        last = (child.stderr.strip().splitlines() or ["no result"])[-1]
        return f"its process ended with status {child.returncode}: {last}"
    if "error" in answer:
        return str(answer["error"])
    return {name: {int(batch): time for batch, time in answer[name].items()} for name in OPERATIONS}


def _measure(path: str, candidate: Candidate, seconds: float) -> dict[str, Any]:
    """In the child: open, check, time."""
    bundle = Bundle.open(path)
    with VAE(bundle, same_plan(candidate)) as vae:
        test = vae.selftest()
        if not test.passed:
            return {"error": f"its self-test failed: {test.errors}, tolerance {test.tolerance}"}
        golden = vae.golden()
        budget = (vae.manifest.budget or {}).get("psnr_db", PSNR_BUDGET_DB)
        if not (loss := _psnr_loss(vae, golden)) <= budget:
            return {"error": f"it loses {loss:.2f} dB of PSNR on the golden inputs, more than the bundle's budget"}
        inputs = {"encode": golden[INPUT], "decode": vae.encode(golden[INPUT]).mode()}
        calls: dict[str, Callable[[Float32], Any]] = {"encode": vae.encode, "decode": vae.decode}
        cells = len(OPERATIONS) * len(BATCHES)
        return {name: dict(_times(vae, calls[name], inputs[name], seconds / cells)) for name in OPERATIONS}


def _psnr_loss(vae: VAE, golden: dict[str, Float32]) -> float:
    """How many dB of PSNR this device and precision lose against the reference, as the export measures it of others; 0
    of what was measured there."""
    if vae.precision not in PROVIDER_PRECISIONS or vae.precision in vae.manifest.precisions:
        return 0.0  # measured at export, on many more inputs
    x, found = targets(vae.manifest.likelihood, golden[INPUT]), vae.reconstruct(golden[INPUT])
    scale = data_range(x, vae.manifest.input.is_image)
    return psnr_db(golden[RECONSTRUCTION], x, scale) - psnr_db(found, x, scale)


def _times(vae: VAE, call: Callable[[Float32], Any], inputs: Float32, seconds: float) -> Iterator[tuple[int, float]]:
    """Batch size and the median seconds of one call after `VAE.warmup`, for each batch size that is not too slow."""
    expected = 0.0
    for batch in BATCHES:
        if expected * batch > _CALL_LIMIT:
            return
        array = np.resize(inputs, (batch, *inputs.shape[1:]))
        vae.warmup([batch])
        call(array)
        taken: list[float] = []
        deadline = time.perf_counter() + seconds
        while len(taken) < 3 or (time.perf_counter() < deadline and len(taken) < 100_000):
            start = time.perf_counter()
            call(array)
            taken.append(time.perf_counter() - start)
        median = statistics.median(taken)
        expected = median / batch
        yield batch, median


def _main() -> int:
    task = json.load(sys.stdin)
    try:
        answer = _measure(task["path"], Candidate(**task["candidate"]), task["seconds"])
    except VAEError as error:
        answer = {"error": str(error)}
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {first_line(error)}"}
    json.dump(answer, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(_main())
