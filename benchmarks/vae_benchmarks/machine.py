"""Facts about the machine that latencies depend on. No host name, no user name, no path."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from vae_runtime.tuning import usable_cores

from .gpu import GpuFacts

_CPUS = Path("/sys/devices/system/cpu")
BUSY_CORES, BUSY_SHARE = 0.25, 0.05  # other work that is worth a word: more cores than this, and more of all cores


@dataclass(frozen=True)
class MachineFacts:
    """None stands for what this system does not tell.

    cores_usable: logical cores that this process may run on. cpu_quota: the cgroup's limit, in cores.
    memory_bytes, memory_limit_bytes: of the machine, and the cgroup's limit.
    governors: the CPU's frequency governors in use. load_average_1min: when the measuring began.
    gpu: of what was measured on one.
    """

    system: str
    architecture: str
    cpu: str
    cores_logical: int | None
    cores_physical: int | None
    cores_usable: int | None
    cpu_quota: float | None
    memory_bytes: int | None
    memory_limit_bytes: int | None
    governors: tuple[str, ...]
    load_average_1min: float | None
    gpu: GpuFacts | None = None

    @classmethod
    def read(cls, gpu: bool = False) -> MachineFacts:
        """Of this machine, now. gpu: also of its GPU, which wakes the driver."""
        return cls(
            system=_system(),
            architecture=platform.machine(),
            cpu=_cpu_model(),
            cores_logical=os.cpu_count(),
            cores_physical=_physical_cores(),
            cores_usable=usable_cores(),
            cpu_quota=cpu_quota(),
            memory_bytes=_memory_bytes(),
            memory_limit_bytes=memory_limit(),
            governors=_governors(),
            load_average_1min=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
            gpu=GpuFacts.read() if gpu else None,
        )

    @property
    def is_busy(self) -> bool:
        """Whether other work kept more than half of the cores busy in the minute before."""
        return self.load_average_1min is not None and self.load_average_1min > 0.5 * (self.cores_usable or 1)

    def busy_with(self, others: float) -> str | None:
        """In words, that other processes kept so many cores busy; None where that is too little to matter."""
        cores = self.cores_usable or 1
        if others <= max(BUSY_CORES, BUSY_SHARE * cores):
            return None
        return f"other work took {others:.2f} of {cores} cores"


@dataclass(frozen=True)
class CpuTime:
    """In seconds, at one moment: how long the cores that this process may run on were busy in all, how long this
    process and those that it started ran, and a clock."""

    busy: float
    own: float
    clock: float

    @classmethod
    def read(cls, root: Path = Path("/"), running: Iterable[int] = ()) -> CpuTime | None:
        """Now; None where the system does not tell, which Linux does. root: of the file system. running: processes that
        this one started and that have not ended, of which the system tells only what the ended ones took."""
        if sys.platform != "linux":
            return None
        ticks, usable = 0, {f"cpu{number}" for number in os.sched_getaffinity(0)}
        for line in _lines(root / "proc/stat"):
            name, _, counted = line.partition(" ")
            if name in usable:
                counts = [int(count) for count in counted.split()]
                # All but idle and waiting, and guests, which the first two hold already.
                ticks += sum(counts[:3]) + sum(counts[5:8])
        times = os.times()
        own = times.user + times.system + times.children_user + times.children_system
        second = os.sysconf("SC_CLK_TCK")
        own += sum(_ticks_of(root / f"proc/{process}/stat") for process in running) / second
        return cls(ticks / second, own, time.perf_counter()) if ticks else None

    def others_since(self, before: CpuTime) -> float:
        """How many cores everybody else kept busy in between, on average."""
        elapsed = self.clock - before.clock
        return max(0.0, (self.busy - before.busy - (self.own - before.own)) / elapsed) if elapsed > 0 else 0.0


def others_between(before: CpuTime | None, after: CpuTime | None) -> float | None:
    """As `CpuTime.others_since`; None where the system does not tell."""
    return after.others_since(before) if before and after else None


def _ticks_of(stat: Path) -> int:
    """What a process has taken, with its ended children; 0 of one that is gone."""
    fields = _first_line(stat).rpartition(")")[2].split()  # its name, which comes before, may hold anything
    return sum(map(int, fields[11:15]))


def choose_cores(count: int) -> tuple[int, ...] | None:
    """`count` logical cores to bind a process to, of different physical cores as far as there are enough.

    None where there are not so many; empty where this system binds no processes.
    """
    if sys.platform != "linux":
        return () if count <= (os.cpu_count() or 1) else None
    usable = sorted(os.sched_getaffinity(0))
    siblings = {cpu: _first_line(_CPUS / f"cpu{cpu}/topology/thread_siblings_list") or str(cpu) for cpu in usable}
    first = list({siblings[cpu]: cpu for cpu in reversed(usable)}.values())[::-1]
    chosen = [*first, *(cpu for cpu in usable if cpu not in first)][:count]
    return tuple(sorted(chosen)) if len(chosen) == count else None


def cpu_quota(root: Path = Path("/")) -> float | None:
    """The tightest CPU limit of this process's cgroups, in cores; None without one. root: of the file system."""
    limits = [
        int(quota) / int(period)
        for folder in _cgroup_folders("", root)
        for quota, _, period in [_first_line(folder / "cpu.max").partition(" ")]
        if quota.isdigit() and period.isdigit()
    ]
    for folder in _cgroup_folders("cpu", root):
        quota, period = _first_line(folder / "cpu.cfs_quota_us"), _first_line(folder / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit():  # -1: none
            limits.append(int(quota) / int(period))
    return min(limits, default=None)


def memory_limit(root: Path = Path("/")) -> int | None:
    """The tightest memory limit of this process's cgroups, in bytes; None without one."""
    files = [folder / "memory.max" for folder in _cgroup_folders("", root)]
    files += [folder / "memory.limit_in_bytes" for folder in _cgroup_folders("memory", root)]
    limits = [int(text) for text in map(_first_line, files) if text.isdigit()]
    return min((limit for limit in limits if limit < 2**60), default=None)  # version 1 writes a huge number for none


def _cgroup_folders(controller: str, root: Path) -> list[Path]:
    """This process's cgroup and those above it, of version 2 (controller "") or of one controller of version 1.

    Inside a container the paths in /proc may be the host's; then only the mount point itself exists.
    """
    mount = root / "sys/fs/cgroup" / controller
    for line in _lines(root / "proc/self/cgroup"):
        _, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if controller in names.split(","):
            inner = PurePosixPath(path.lstrip("/"))
            return [mount / inner, *(mount / parent for parent in inner.parents)]
    return []


def _system() -> str:
    if sys.platform == "darwin":
        return f"macOS {platform.mac_ver()[0]}"
    distribution = ""
    with contextlib.suppress(OSError):
        distribution = f" ({platform.freedesktop_os_release().get('PRETTY_NAME', '')})"
    return f"{platform.system()} {platform.release()}{distribution}"


def _cpu_model() -> str:
    if sys.platform == "darwin":
        return _output("sysctl", "-n", "machdep.cpu.brand_string") or platform.machine()
    if sys.platform == "win32":
        return platform.processor() or platform.machine()
    for line in _lines(Path("/proc/cpuinfo")):
        name, _, value = line.partition(":")
        if name.strip() in ("model name", "Model", "Hardware", "cpu model"):
            return value.strip()
    # ARM boards name themselves in the device tree only.
    return _first_line(Path("/proc/device-tree/model")).rstrip("\0") or platform.processor() or platform.machine()


def _physical_cores() -> int | None:
    if sys.platform == "linux":
        siblings = {_first_line(cpu / "topology/thread_siblings_list") for cpu in _CPUS.glob("cpu[0-9]*")} - {""}
        if siblings:
            return len(siblings)
    with contextlib.suppress(ImportError):
        import psutil

        count: int | None = psutil.cpu_count(logical=False)
        return count
    return None


def _memory_bytes() -> int | None:
    with contextlib.suppress(AttributeError, ValueError, OSError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(ImportError):
        import psutil

        return int(psutil.virtual_memory().total)
    return None


def available_bytes() -> float:
    """Memory that new processes can have; infinite where the system does not say."""
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    with contextlib.suppress(ImportError):
        import psutil

        return float(psutil.virtual_memory().available)
    return float("inf")


def _governors() -> tuple[str, ...]:
    found = {_first_line(file) for file in _CPUS.glob("cpu[0-9]*/cpufreq/scaling_governor")}
    return tuple(sorted(found - {""}))


def _first_line(path: Path) -> str:
    return next(iter(_lines(path)), "").strip()


def _lines(path: Path) -> Iterable[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ()


def _output(*command: str) -> str:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout.strip()
    return ""
