"""One step of `run.py` in a process of its own: its request is the only argument, as JSON.

Its findings go to the file that the request names, one JSON object per line; the last line is {"done": true}.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import json
import os
import platform
import signal
import sys
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import checks
import kernels
import timings
import variations
from findings import PRECISIONS, Findings, Job

from vae_benchmarks.gpu import GpuFacts
from vae_benchmarks.machine import MachineFacts
from vae_benchmarks.race import Case
from vae_runtime import __version__
from vae_runtime.devices import find_device
from vae_runtime.engine import import_engine
from vae_runtime.errors import DeviceError

PACKAGES = ("numpy", "torch", "onnx", "onnxruntime", "onnxruntime-gpu", "click", "psutil", "openvino", "matplotlib")
VARIABLES = ("CUDA_VISIBLE_DEVICES", "CUDA_MODULE_LOADING", "NVIDIA_TF32_OVERRIDE", "OMP_NUM_THREADS")
STEPS: dict[str, Callable[[Findings, Job], None]] = {
    "golden": checks.golden,
    "fidelity": checks.fidelity,
    "calls": checks.calls,
    "concurrency": checks.concurrency,
    "memory": checks.memory,
    "ways": timings.ways,
    "overhead": timings.overhead,
    "kernels": kernels.kernels,
    "variations": variations.variations,
    **{f"bench-{precision}": partial(timings.bench, precision=precision) for precision in PRECISIONS},
    "race": timings.race,
}


def main() -> None:
    faulthandler.enable()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # what is found so far is still told
    request = json.loads(sys.argv[1])
    with Path(request["findings"]).open("w", encoding="utf-8") as stream:
        findings = Findings(stream)
        if request["step"] == "environment":
            environment(findings, request["device"], request["preload"])
        else:
            case = Case.open(request["case"])
            job = Job(request["device"], case, request["quick"], request["rounds"], request["budget"])
            STEPS[request["step"]](findings, job)
        findings.done()


def environment(findings: Findings, device: str, preload: bool) -> None:
    """What the figures depend on, and whether the device is usable at all."""
    findings.figure("machine", dataclasses.asdict(MachineFacts.read()))
    findings.figure("versions", {"python": platform.python_version(), "vae-edge": __version__, **versions()})
    findings.figure("variables", {name: os.environ[name] for name in VARIABLES if name in os.environ})
    if preload:
        loaded = list(sys.modules)  # in the order of loading
        first = "torch" in loaded and loaded.index("torch") < loaded.index("vae_runtime")
        findings.verdict("torch was loaded first", first)
    with findings.guard("onnxruntime"):
        engine = import_engine()
        build = {"version": engine.__version__, "providers": engine.get_available_providers()}
        findings.figure("onnxruntime", build)
    with findings.guard(f"device {device}"):
        try:
            index = find_device(device).memory[1]
        except DeviceError as error:
            findings.verdict(f"device {device}", False, str(error))
        else:
            findings.verdict(f"device {device}", True)
            gpu = GpuFacts.read(index) if device != "cpu" else None
            findings.figure("gpu", gpu and dataclasses.asdict(gpu))


def versions() -> dict[str, str]:
    """Of what is installed."""
    found: dict[str, Any] = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    main()
