"""Processes that train: all forked off from one that has imported everything, which takes seconds, and computed
nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

PARENT = """
import gc, json, os, signal, sys
import sklearn.datasets, torch._dynamo  # which training would import itself
import vae_training.cli, vae_training.loop
gc.freeze()  # a child that ends collects its own garbage alone

def serve():
    running = set()
    for line in sys.stdin:
        task = json.loads(line)
        if isinstance(task, int):
            pid, status = os.waitpid(task, os.WNOHANG)
            running.discard(pid)
            print(json.dumps(os.waitstatus_to_exitcode(status) if pid else None), flush=True)
        elif child := os.fork():
            running.add(child)
            print(child, flush=True)
        else:
            return task
    for child in running:
        os.kill(child, signal.SIGKILL)
    sys.exit()

task = serve()
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
for number, path in enumerate(task["outputs"], 1):
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
os.environ.update(task["environment"])
sys.argv[1:] = task["arguments"]
exec(task["code"])
"""


class Child:
    """One piece of Python that runs, with its output in two files."""

    def __init__(self, parent: Parent, pid: int, outputs: list[Path]) -> None:
        self._parent, self.pid, self._outputs = parent, pid, outputs

    def wait(self, seconds: float = 60) -> int:
        """-> the exit code as `subprocess` has it."""
        deadline = time.monotonic() + seconds
        while (code := self._parent.ask(self.pid)) is None:
            assert time.monotonic() < deadline, f"it still runs after {seconds} s: {self.stderr}"
            time.sleep(0.01)
        return code

    def wait_for(self, condition: Callable[[], bool], seconds: float = 60) -> None:
        """Until `condition` holds, while it runs."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self._parent.ask(self.pid) is None, self.stderr
            assert time.monotonic() < deadline, self.stderr
            time.sleep(0.01)

    @property
    def stdout(self) -> str:
        return self._outputs[0].read_text()

    @property
    def stderr(self) -> str:
        return self._outputs[1].read_text()


class Parent:
    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self._process, self._folder, self._count = process, folder, 0

    def start(self, code: str, *arguments: object, **environment: str) -> Child:
        """Run `code` in a process of its own, which ends as every Python ends."""
        self._count += 1
        outputs = [self._folder / f"{self._count}.{name}" for name in ("out", "err")]
        task = {"code": code, "arguments": [str(argument) for argument in arguments], "environment": environment}
        return Child(self, self.ask({**task, "outputs": [str(path) for path in outputs]}), outputs)

    def ask(self, task: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(task), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())


@pytest.fixture(scope="session")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Parent]:
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    import torch

    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-c", PARENT]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        yield Parent(process, tmp_path_factory.mktemp("outputs"))
