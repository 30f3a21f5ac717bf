"""The GPU under test as the driver and `nvidia-smi` show it. No serial number, no process of anybody."""

from __future__ import annotations

import contextlib
import ctypes
import subprocess
import sys
from dataclasses import dataclass

from vae_runtime.cuda import driver_version, find_gpus

_SMI_SECONDS = 20.0  # a driver that is not kept loaded takes seconds to answer
_FIELDS = ("pci.bus_id", "driver_version", "clocks.sm", "clocks.mem", "memory.used")


@dataclass(frozen=True)
class GpuFacts:
    """cuda: the newest that the driver runs. None, or no entry: nvidia-smi is not there or does not tell.

    sm_clock_mhz, memory_clock_mhz: as found right after the last timed call, one entry per process that measured.
    memory_used_bytes: of the whole GPU, by all processes on it, then, in the last of them.
    """

    name: str
    memory_bytes: int
    compute_capability: str
    cuda: str | None
    driver: str | None = None
    sm_clock_mhz: tuple[int, ...] = ()
    memory_clock_mhz: tuple[int, ...] = ()
    memory_used_bytes: int | None = None


def read_gpu(index: int) -> GpuFacts | None:
    """GPU `index` in CUDA's order, now; None where the driver shows no such one."""
    gpus, _ = find_gpus()
    if index >= len(gpus):
        return None
    shown = _ask_smi(_bus_id(index))
    used = _whole(shown.get("memory.used"))
    return GpuFacts(
        **gpus[index]._asdict(),
        cuda=driver_version(),
        driver=shown.get("driver_version"),
        sm_clock_mhz=_found(shown.get("clocks.sm")),
        memory_clock_mhz=_found(shown.get("clocks.mem")),
        memory_used_bytes=None if used is None else used * 2**20,
    )


def _ask_smi(bus_id: str | None) -> dict[str, str]:
    """What `nvidia-smi` says of the GPU on this bus, or of the only one; nothing where that is not to be had.

    It numbers GPUs by bus, CUDA by speed or by CUDA_VISIBLE_DEVICES, so that the number alone may name another one.
    """
    command = ("nvidia-smi", f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits")
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_SMI_SECONDS).stdout
        rows = [[cell.strip() for cell in line.split(",")] for line in answer.splitlines()]
        gpus = [dict(zip(_FIELDS, row, strict=True)) for row in rows if len(row) == len(_FIELDS)]
        for gpu in gpus:
            if bus_id is not None and _same_bus(gpu["pci.bus_id"], bus_id):
                return gpu
        if len(gpus) == 1:
            return gpus[0]
    return {}


def _same_bus(one: str, other: str) -> bool:
    """00000000:1B:00.0 and 0000:1b:00.0 are the same."""
    return one.lower().lstrip("0") == other.lower().lstrip("0")


def _bus_id(index: int) -> str | None:
    """Of GPU `index` in CUDA's order."""
    name, device = ctypes.create_string_buffer(32), ctypes.c_int()
    with contextlib.suppress(OSError, AttributeError):
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        if driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(device), index) == 0:
            driver.cuDeviceGetPCIBusId(name, len(name), device)
    return name.value.decode("ascii", "replace") or None


def _found(text: str | None) -> tuple[int, ...]:
    value = _whole(text)
    return () if value is None else (value,)


def _whole(text: str | None) -> int | None:
    """ "1980" -> 1980; "[N/A]" -> None."""
    return int(text) if text is not None and text.isdigit() else None
