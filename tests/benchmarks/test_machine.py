"""Facts from made-up file systems, and from this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vae_benchmarks import MachineFacts
from vae_benchmarks.machine import CpuTime, cpu_quota, memory_limit


def make_root(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


V2 = {"proc/self/cgroup": "0::/user/app\n"}
V1 = {"proc/self/cgroup": "4:memory:/box\n3:cpu,cpuacct:/box\n"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({**V2, "sys/fs/cgroup/user/app/cpu.max": "max 100000\n"}, None),
        ({**V2, "sys/fs/cgroup/user/app/cpu.max": "150000 100000\n"}, 1.5),
        ({**V2, "sys/fs/cgroup/user/app/cpu.max": "400000 100000", "sys/fs/cgroup/user/cpu.max": "200000 100000"}, 2.0),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 0.5),
        ({**V1, "sys/fs/cgroup/cpu/box/cpu.cfs_quota_us": "-1", "sys/fs/cgroup/cpu/box/cpu.cfs_period_us": "1"}, None),
        (
            # In a container /proc names the host's path, but only the mount point itself is there.
            {**V1, "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "250000", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"},
            2.5,
        ),
        ({**V2, "sys/fs/cgroup/user/app/cpu.max": "nonsense\n"}, None),
    ],
)
def test_cpu_quota(tmp_path: Path, files: dict[str, str], expected: float | None) -> None:
    assert cpu_quota(make_root(tmp_path, files)) == expected


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({**V2, "sys/fs/cgroup/user/app/memory.max": "max\n"}, None),
        ({**V2, "sys/fs/cgroup/user/app/memory.max": "1073741824\n"}, 2**30),
        ({**V1, "sys/fs/cgroup/memory/box/memory.limit_in_bytes": "9223372036854771712\n"}, None),
        ({**V1, "sys/fs/cgroup/memory/box/memory.limit_in_bytes": "536870912\n"}, 2**29),
    ],
)
def test_memory_limit(tmp_path: Path, files: dict[str, str], expected: int | None) -> None:
    assert memory_limit(make_root(tmp_path, files)) == expected


def test_the_facts_of_this_machine() -> None:
    facts = MachineFacts.read()
    assert facts.cpu
    assert facts.cores_logical == os.cpu_count()
    assert 1 <= (facts.cores_usable or 0) <= (facts.cores_logical or 0)
    assert facts.memory_bytes is None or facts.memory_bytes > 2**28


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell")
def test_how_long_the_usable_cores_were_busy(tmp_path: Path) -> None:
    usable, second = sorted(os.sched_getaffinity(0)), os.sysconf("SC_CLK_TCK")
    # user, nice, system, idle, waiting, interrupts, soft interrupts, stolen; guests are in user and nice already
    counts = " ".join(str(seconds * second) for seconds in (1, 2, 3, 1000, 2000, 4, 5, 6, 1, 1))
    cores = "\n".join(f"cpu{number} {counts}" for number in (*usable, max(usable) + 1))
    root = make_root(tmp_path, {"proc/stat": f"cpu  {counts}\n{cores}\nintr 1 2 3\n"})
    time = CpuTime.read(root)
    assert time is not None
    assert time.busy == 21 * len(usable)
    assert CpuTime.read(root / "nothing") is None


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell")
def test_the_work_of_running_processes_is_counted_from_their_files(tmp_path: Path) -> None:
    second = os.sysconf("SC_CLK_TCK")
    # after the name: state, ten others, then user, system, and both of the ended children
    counts = " ".join(str(seconds * second) for seconds in (1000, 2000, 3000, 4000))
    core = f"cpu{min(os.sched_getaffinity(0))}"
    stat = f"7 (a (b) 9 9) S {' '.join('5' * 10)} {counts} 20 0 1\n"
    root = make_root(tmp_path, {"proc/stat": f"{core} 1 0 0 0 0 0 0 0 0 0\n", "proc/7/stat": stat})
    alone, both = CpuTime.read(root), CpuTime.read(root, running=(7, 8))  # 8 has ended
    assert alone is not None
    assert both is not None
    assert both.own - alone.own == pytest.approx(10_000, abs=5)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell")
def test_the_work_of_a_running_process_is_its_own() -> None:
    code = "import time\nwhile time.process_time() < 0.3: pass\nprint(1, flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        before = CpuTime.read(running=[process.pid])
        assert process.stdout is not None
        process.stdout.readline()
        during = CpuTime.read(running=[process.pid])
        process.communicate(b"\n")
    after = CpuTime.read()
    assert before is not None
    assert during is not None
    assert after is not None
    assert 0.2 < during.own - before.own < 1
    assert after.own - before.own >= 0.2  # it has ended: not counted twice, and not lost
    assert after.own - during.own < 0.2


def test_what_others_take_of_the_cores() -> None:
    before = CpuTime(busy=100.0, own=5.0, clock=1000.0)
    assert CpuTime(busy=130.0, own=15.0, clock=1010.0).others_since(before) == 2.0
    assert CpuTime(busy=100.0, own=15.0, clock=1010.0).others_since(before) == 0.0  # both clocks are coarse


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell")
def test_the_work_of_processes_that_this_one_started_is_its_own() -> None:
    before = CpuTime.read()
    assert before is not None
    subprocess.run([sys.executable, "-c", "import time\nwhile time.process_time() < 1: pass"], check=True)
    after = CpuTime.read()
    assert after is not None
    assert after.own - before.own >= 0.9  # clocks tick in hundredths of a second
    assert after.busy - before.busy >= 0.9


@pytest.mark.parametrize(("load", "cores", "busy"), [(None, 8, False), (3.9, 8, False), (4.1, 8, True), (0.6, 1, True)])
def test_a_busy_machine(load: float | None, cores: int, busy: bool) -> None:
    facts = MachineFacts("Linux", "x86_64", "a CPU", cores, None, cores, None, None, None, (), load)
    assert facts.is_busy == busy
