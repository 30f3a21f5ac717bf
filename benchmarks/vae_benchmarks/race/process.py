"""The parent's end of one competitor's process."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from vae_runtime.interpreter import interpreter

from ..children import describe_exit, wait_for_group
from ..errors import BenchmarkError

_GONE_SECONDS = 1.0  # to wait for what was killed; longer only where nobody collects orphans
# A user's own would put another precision under the name of the one that is raced.
_TF32_SETTINGS = ("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE")
_WAIT_SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # a user's own would change one engine only


class CompetitorError(BenchmarkError):
    """A competitor is out of the race; the message says why. `skipped`: it could not have taken part at all."""

    def __init__(self, message: str, skipped: bool = False) -> None:
        super().__init__(message)
        self.skipped = skipped


def run_group(command: Sequence[str], environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; whatever interrupts the wait also ends all that the command has started.

    environment: variables beside those of this process.
    """
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, **(environment or {})},
    )
    try:
        stdout, stderr = process.communicate()
    except BaseException:
        _kill_group(process)
        raise
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def _kill_group(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if not hasattr(os, "killpg"):
            process.kill()
            process.wait()
            return
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    # A compiler that is still dying could write into a folder that is being deleted.
    wait_for_group(process.pid, _GONE_SECONDS)


class Process:
    """A worker process in a session of its own, so that it can be ended together with all that it started."""

    def __init__(
        self, threads: int, cores: Sequence[int] | None, scratch: str, environment: Mapping[str, str] | None = None
    ) -> None:
        """cores: to which it is bound; None where the system cannot. scratch: folder for what a compiler leaves.
        environment: variables beside those of this process."""
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `kill`)
        self._ended = False
        self._lines: queue.Queue[str] = queue.Queue()
        kept = {name: value for name, value in os.environ.items() if name not in (*_WAIT_SETTINGS, *_TF32_SETTINGS)}
        counts = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
        self._process = subprocess.Popen(
            [*interpreter("racing"), "-m", f"{__package__}.worker", json.dumps(cores)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            start_new_session=True,
            env={
                **kept,
                **counts,
                **(environment or {}),
                "ORT_DISABLE_TELEMETRY": "1",
                **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), scratch),  # a compiler that is killed leaves files there
                "TORCHINDUCTOR_CACHE_DIR": scratch,
                "TORCHINDUCTOR_COMPILE_THREADS": "1",
            },
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def ask(self, request: str, timeout: float, **arguments: Any) -> dict[str, Any]:
        """The answer to one request.

        Raises:
            CompetitorError: the competitor cannot run, failed, died or did not answer in `timeout` seconds; its
                process is gone then.
        """
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended; Windows does not call that a broken pipe
            self._process.stdin.write(json.dumps({"request": request, **arguments}) + "\n")
            self._process.stdin.flush()
        try:
            line = self._lines.get(timeout=timeout)
        except queue.Empty:
            self.kill()
            raise CompetitorError(f"did not answer within {timeout:.0f} s") from None
        if not line:
            raise CompetitorError(self._ending())
        answer: dict[str, Any] = json.loads(line)
        for kind in ("skip", "fail"):
            if kind in answer:
                self.kill()
                raise CompetitorError(answer[kind], skipped=kind == "skip")
        return answer

    def kill(self) -> None:
        """End the process and whatever it started. Safe to call again."""
        if self._ended:
            return
        self._ended = True
        _kill_group(self._process)
        self._reader.join()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            with contextlib.suppress(OSError):
                stream.close()  # type: ignore[union-attr]

    @property
    def pid(self) -> int:
        return self._process.pid

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")  # the end

    def _ending(self) -> str:
        code = self._process.wait()
        self._errors.seek(0)
        text = describe_exit(code, self._errors.read())
        self.kill()
        return text
