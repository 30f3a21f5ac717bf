"""Where the scripts beside this one write, what they say of the machine, and how."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vae_benchmarks.machine import MachineFacts
from vae_runtime.atomic import write_json

RESULTS = Path(__file__).resolve().parent.parent / "results"


def machine(threads: int) -> dict[str, Any]:
    """cores: those that this process may run on. cpu_quota: the cgroup's limit, in cores, where there is one."""
    facts, cpuinfo = MachineFacts.read(), Path("/proc/cpuinfo")
    lines = cpuinfo.read_text("utf-8").splitlines() if cpuinfo.exists() else []
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    instructions = [flag for flag in ("avx2", "avx512f", "amx_tile") if flag in flags]
    return {
        "cpu": facts.cpu,
        "cores": facts.cores_usable,
        **({"cpu_quota": facts.cpu_quota} if facts.cpu_quota is not None else {}),
        "instructions": instructions,
        "threads": threads,
        **({"OMP_WAIT_POLICY": policy} if (policy := os.environ.get("OMP_WAIT_POLICY")) else {}),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{package: version(package) for package in ("vae-edge", "torch", "accelerate", "numpy")},
    }


def write_report(path: Path, document: Any, markdown: str) -> None:
    """Write `path` with .json, what was found, and with .md, the same as text, in the same order."""
    write_json(path.with_suffix(".json"), document, sort_keys=False)
    path.with_suffix(".md").write_text(markdown, encoding="utf-8", newline="\n")


def table_row(cells: Iterable[str]) -> str:
    """Of a table in Markdown."""
    return f"| {' | '.join(cells)} |"
