"""Other processes: `worker.py` in a fresh one, for its answer; several at once; how one ended, in words."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import vae_runtime.errors as runtime_errors
from vae_runtime.errors import VAEError
from vae_runtime.interpreter import interpreter

from .errors import BenchmarkError

_WORKER = Path(__file__).with_name("worker.py")
_GROUP_STEP = 0.005  # seconds

_Item = TypeVar("_Item")


def run_worker(task: str, **request: Any) -> dict[str, Any]:
    """The result of one task of `worker.py`, measured in a process of its own.

    Whatever interrupts the wait, Ctrl-C for one, also kills the process.

    Raises:
        VAEError: the one that the process met, of the same class. BenchmarkError: it died, or did not answer.
    """
    finished = subprocess.run(
        # The package's own folder is not on the path, where other code would find `report` or `settings`.
        [*interpreter("measuring"), str(_WORKER)],
        input=json.dumps({"task": task, **request}).encode(),
        capture_output=True,
        check=False,
    )
    answer = _parse(finished.stdout)
    if "error" in answer:
        raise _revive(**answer["error"])
    if "result" not in answer:
        raise BenchmarkError(f"the process that measures {task} {describe_exit(finished.returncode, finished.stderr)}")
    result: dict[str, Any] = answer["result"]
    return result


def _parse(stdout: bytes) -> dict[str, Any]:
    try:
        answer = json.loads(stdout)
    except ValueError:
        return {}
    return answer if isinstance(answer, dict) else {}


def _revive(type: str, message: str) -> VAEError:
    """The error again; made without `__init__`, since one class builds its message from other arguments."""
    found = getattr(runtime_errors, type, None)
    kind = found if inspect.isclass(found) and issubclass(found, VAEError) else VAEError
    error: VAEError = kind.__new__(kind, message)
    error.args = (message,)
    return error


def at_once(work: Callable[[_Item], None], items: Sequence[_Item], count: int, stop: Callable[[], object]) -> None:
    """Work on all items, `count` at a time. Whatever interrupts it calls `stop`, which has to end what is begun."""
    with ThreadPoolExecutor(count) as pool:
        try:
            for done in [pool.submit(work, item) for item in items]:
                done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            stop()
            raise


def describe_exit(returncode: int, stderr: bytes) -> str:
    """How a process ended that should not have, in words: by which signal, or its last line of errors."""
    if returncode < 0:
        try:
            name = signal.Signals(-returncode).name
        except ValueError:
            name = f"signal {-returncode}"
        hint = "; it may have run out of memory" if name == "SIGKILL" else ""
        return f"was ended by {name}{hint}"
    last = last_line(stderr.decode(errors="replace"))
    return f"ended with exit code {returncode} and no answer{last and f': {last}'}"


def last_line(text: str) -> str:
    """The last line with anything in it, where a traceback has the error; empty where there is none."""
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else ""


def wait_for_group(group: int, seconds: float) -> None:
    """Wait until no process of a group is left, for so long at most."""
    deadline = time.monotonic() + seconds
    with contextlib.suppress(ProcessLookupError, PermissionError):
        while time.monotonic() < deadline:
            os.killpg(group, 0)
            time.sleep(_GROUP_STEP)
