"""The GPU under test as the driver and `nvidia-smi` show it. No serial number, no process of anybody."""

from __future__ import annotations

import contextlib
import ctypes
import subprocess
from dataclasses import dataclass

from vae_runtime.cuda import driver, driver_version, find_gpus, gpu_memory
from vae_runtime.errors import DeviceError

_SMI_SECONDS = 20.0  # a driver that is not kept loaded takes seconds to answer
_BUS = "pci.bus_id"
_FIELDS = (
    *(_BUS, "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem"),
    *("power.limit", "utilization.gpu", "memory.used"),
)


@dataclass(frozen=True)
class GpuFacts:
    """A GPU; None stands for what only nvidia-smi tells, where that is not there or does not tell.

    cuda: the newest that the driver runs. The rest is as found when it was read: clocks in MHz, the power limit in
    watts, in how many percent of the time just before something ran, and the memory that all processes together took.
    """

    name: str
    memory_bytes: int
    compute_capability: str
    cuda: str | None
    driver: str | None = None
    sm_clock_mhz: float | None = None
    sm_clock_max_mhz: float | None = None
    memory_clock_mhz: float | None = None
    power_limit_watts: float | None = None
    utilization_percent: float | None = None
    memory_used_bytes: int | None = None

    @classmethod
    def read(cls, index: int = 0) -> GpuFacts | None:
        """Of GPU `index` in CUDA's order, now; None where the driver shows no such one."""
        gpus, _ = find_gpus()
        if index >= len(gpus):
            return None
        shown = _ask_smi(_bus_id(index))
        used = _number(shown.get("memory.used"))
        return cls(
            *gpus[index],
            cuda=driver_version(),
            driver=shown.get("driver_version"),
            sm_clock_mhz=_number(shown.get("clocks.sm")),
            sm_clock_max_mhz=_number(shown.get("clocks.max.sm")),
            memory_clock_mhz=_number(shown.get("clocks.mem")),
            power_limit_watts=_number(shown.get("power.limit")),
            utilization_percent=_number(shown.get("utilization.gpu")),
            memory_used_bytes=None if used is None else round(used * 2**20),
        )


def memory_in_use(index: int) -> int:
    """Bytes of GPU `index` that all processes take together, now."""
    status, free, total = gpu_memory(index)
    if status != 0:
        raise DeviceError(f"GPU {index} does not tell its memory (CUDA error {status})")
    return total - free


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
            if bus_id is not None and _same_bus(gpu[_BUS], bus_id):
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
        cuda = driver()
        if cuda.cuInit(0) == 0 and cuda.cuDeviceGet(ctypes.byref(device), index) == 0:
            cuda.cuDeviceGetPCIBusId(name, len(name), device)
    return name.value.decode("ascii", "replace") or None


def _number(text: str | None) -> float | None:
    """ "1980" -> 1980.0; "[N/A]" -> None."""
    try:
        return float(text or "")
    except ValueError:
        return None
