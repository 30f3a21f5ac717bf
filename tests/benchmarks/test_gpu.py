"""What the driver and nvidia-smi show of a GPU, made up here."""

from __future__ import annotations

import dataclasses
import subprocess
from typing import Any

import pytest

import vae_benchmarks.gpu as gpu
from vae_benchmarks.gpu import GpuFacts
from vae_benchmarks.table import describe_gpus
from vae_runtime.cuda import Gpu, why_not_cuda

SMALL, LARGE = Gpu("GPU small", 2**30, "7.5"), Gpu("GPU large", 2**37, "9.0")
TWO = """00000000:1B:00.0, 580.95, 300, 1590, 405, 70.00, 0, 10
00000000:CB:00.0, 580.95, 1980, 1980, 3201, 700.00, 97, 2048
"""
FOUND = GpuFacts("GPU large", 2**37, "9.0", "13.0", "580.95", 1980, 1980, 3201, 700, 97, 2**31)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """CUDA puts the larger GPU first, nvidia-smi the one on the lower bus."""

    def make(smi: str | Exception = TWO, bus: str | None = "0000:cb:00.0") -> None:
        def run(command: Any, **options: Any) -> subprocess.CompletedProcess[str]:
            if isinstance(smi, Exception):
                raise smi
            return subprocess.CompletedProcess(command, 0, smi, "")

        monkeypatch.setattr(gpu, "find_gpus", lambda: ((LARGE, SMALL), None))
        monkeypatch.setattr(gpu, "driver_version", lambda: "13.0")
        monkeypatch.setattr(gpu, "_bus_id", lambda index: bus)
        monkeypatch.setattr(gpu.subprocess, "run", run)

    return make


def test_the_facts_are_those_of_the_gpu_on_the_same_bus(machine: Any) -> None:
    machine()
    assert GpuFacts.read(0) == FOUND
    assert GpuFacts.read(2) is None


@pytest.mark.parametrize(
    ("smi", "bus"),
    [
        (FileNotFoundError("nvidia-smi"), "0000:cb:00.0"),
        (subprocess.TimeoutExpired("nvidia-smi", 20), "0000:cb:00.0"),
        ("", "0000:cb:00.0"),
        ("Failed to initialize NVML", "0000:cb:00.0"),
        (TWO, "0000:aa:00.0"),
        (TWO, None),
    ],
)
def test_without_nvidia_smi_the_driver_alone_is_told(machine: Any, smi: Any, bus: str | None) -> None:
    machine(smi, bus)
    assert GpuFacts.read(0) == GpuFacts("GPU large", 2**37, "9.0", "13.0")


def test_what_a_gpu_does_not_tell_is_absent(machine: Any) -> None:
    machine(
        "00000000:CB:00.0, 580.95, [N/A], [N/A], [Not Supported], [N/A], [N/A], [N/A]\n", None
    )  # the only one: no bus is needed
    assert GpuFacts.read(0) == GpuFacts("GPU large", 2**37, "9.0", "13.0", "580.95")


def test_one_line_tells_it_all() -> None:
    looks = [dataclasses.replace(FOUND, sm_clock_mhz=clock, memory_used_bytes=1) for clock in (1755, None)]
    assert describe_gpus([*looks, FOUND]) == (
        "GPU large, 128.0 GiB memory (2.0 GiB used), driver 580.95 for CUDA 13.0, SM clock 1755–1980 MHz,"
        " memory clock 3201 MHz"
    )
    small = GpuFacts("GPU small", 2**30, "7.5", None)
    assert describe_gpus([small]) == "GPU small, 1.0 GiB memory, driver – for CUDA –"


@pytest.mark.skipif(why_not_cuda() is not None, reason=f"no usable GPU: {why_not_cuda()}")
def test_the_gpu_of_this_machine() -> None:
    facts = GpuFacts.read(0)
    assert facts is not None
    assert facts.memory_used_bytes is None or facts.memory_used_bytes <= facts.memory_bytes
