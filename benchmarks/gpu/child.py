"""A process for each step: what it loads first, how long it may take, and how it ended."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from vae_benchmarks.children import describe_exit, wait_for_group

STEPS_FILE = Path(__file__).with_name("steps.py")
SOURCES = Path(__file__).resolve().parents[2]
PACKAGES = tuple(str(SOURCES / name) for name in ("runtime", "training", "export", "benchmarks"))
ENDING_SECONDS = {signal.SIGTERM: 10.0, signal.SIGKILL: 1.0}  # to wait until nothing of a step is left
TAIL = 2000  # characters of what a crashed step has printed
# The interpreter imports this by itself, also in the processes that the step starts. Another one of the name, which
# the system or the user may have, still has its turn.
PRELOAD = """
import importlib.machinery, importlib.util, os, sys
import torch
_found = importlib.machinery.PathFinder.find_spec(
    "sitecustomize", [place for place in sys.path if place != os.path.dirname(__file__)]
)
if _found is not None and _found.loader is not None:
    _found.loader.exec_module(importlib.util.module_from_spec(_found))
"""


class Children:
    """Starts the steps. preload_torch: every Python process loads torch first."""

    def __init__(self, preload_torch: bool) -> None:
        self._scratch = tempfile.TemporaryDirectory(prefix="vae-gpu-")
        places = [*PACKAGES, *filter(None, [os.environ.get("PYTHONPATH")])]
        if preload_torch:
            folder = Path(self._scratch.name) / "preload"
            folder.mkdir()
            (folder / "sitecustomize.py").write_text(PRELOAD, encoding="utf-8")
            places.insert(0, str(folder))
        self._running: set[subprocess.Popen[bytes]] = set()
        self.environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}

    def __enter__(self) -> Children:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._scratch.cleanup()

    def run(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        """One step, for so long at most: its status, "passed", "failed", "crashed" or "skipped", and what it found."""
        handle, name = tempfile.mkstemp(dir=self._scratch.name)
        os.close(handle)
        findings = Path(name)
        started = time.monotonic()
        command = [sys.executable, str(STEPS_FILE), json.dumps({**request, "findings": str(findings)})]
        with tempfile.TemporaryFile() as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=self.environment, start_new_session=True
            )
            self._running.add(process)
            try:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(seconds)
                timed_out = process.poll() is None
            finally:
                end_group(process)
                self._running.discard(process)
            output.seek(0)
            printed = output.read()
        lines = parse_lines(findings.read_text("utf-8"))
        reason = "" if {"done": True} in lines and process.returncode == 0 else self._reason(process, printed)
        if timed_out:
            reason = f"was ended after {seconds:.0f} s, when the time of this part was over"
        names = {request["case"]: Path(request["case"]).name, str(SOURCES): ".", sys.prefix: "python"}
        unit = {**summarize(lines, reason, printed), "seconds": time.monotonic() - started}
        return {name: clean(value, names) for name, value in unit.items()}

    def stop(self) -> None:
        """End all steps that are running, from another thread."""
        for process in list(self._running):
            end_group(process)

    def _reason(self, process: subprocess.Popen[bytes], printed: bytes) -> str:
        return f"the step {describe_exit(process.returncode, printed)}"


def parse_lines(text: str) -> list[dict[str, Any]]:
    """The objects in it; what a step was writing when it died may be half a line."""
    lines = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(line))
    return lines


def summarize(lines: list[dict[str, Any]], reason: str, printed: bytes) -> dict[str, Any]:
    """What a step has written, and how it came out."""
    checks = [line for line in lines if "check" in line]
    failed = not all(check["passed"] for check in checks)
    status = "crashed" if reason else "failed" if failed else "passed"
    skipped = {line["skipped"]: line["reason"] for line in lines if "skipped" in line}
    figures = {line["figure"]: line["value"] for line in lines if "figure" in line}
    if status == "passed" and not checks and not figures:
        status = "skipped"
    return {
        **{"status": status, "reason": reason, "checks": checks, "skipped": skipped, "figures": figures},
        "printed": printed.decode(errors="replace")[-TAIL:] if reason else "",
    }


def clean(value: Any, names: dict[str, str]) -> Any:
    """The same without the paths of this machine."""
    if isinstance(value, dict):
        return {key: clean(item, names) for key, item in value.items()}
    if isinstance(value, list):
        return [clean(item, names) for item in value]
    if isinstance(value, str):
        for path, name in names.items():
            value = value.replace(path, name) if path else value
    return value


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a step and what it has started; vae-bench ends its own processes when it hears SIGTERM."""
    for number, seconds in ENDING_SECONDS.items():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        wait_for_group(process.pid, seconds)
