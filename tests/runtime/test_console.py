"""What the command lines share: SIGTERM ends a command as Ctrl-C does, and everything that it has started."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner

from vae_runtime.cli import main
from vae_runtime.console import Command, printable

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
MAIN = "from vae_runtime.cli import main; main()"


@pytest.fixture
def default() -> Iterator[None]:
    """SIGTERM as an interpreter finds it."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGTERM, before)


def test_sigterm_leaves_no_process_of_tune(tiny_path: Path, tmp_path: Path, terminate: Callable[..., str]) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", MAIN, "tune", str(tiny_path), "--device", "cpu", "--seconds", "1000"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
    )
    assert process.stderr is not None
    assert process.stderr.readline().startswith("round 1 of ")
    assert (terminate(process), process.returncode) == ("", 143)


def test_sigterm_runs_what_cleans_up_once(default: None) -> None:
    ended: list[str] = []

    @click.command(cls=Command)
    def command() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            ended.append("cleaned up")

    result = CliRunner().invoke(command, [])
    assert (result.exit_code, result.output, ended) == (143, "", ["cleaned up"])
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("handler", [signal.SIG_IGN, lambda number, frame: None])
def test_what_was_decided_about_sigterm_stays(default: None, handler: Any) -> None:
    signal.signal(signal.SIGTERM, handler)
    seen: list[Any] = []
    CliRunner().invoke(click.command(cls=Command)(lambda: seen.append(signal.getsignal(signal.SIGTERM))), [])
    assert seen == [handler]


def test_a_name_that_the_system_refuses_is_one_sentence(tiny_path: Path) -> None:
    name = "a" * 300 + ".png"
    for arguments in (
        ["encode", str(tiny_path), name, "--output", "b.npz"],
        ["sample", str(tiny_path), "--output", name],
    ):
        result = CliRunner().invoke(main, arguments)
        assert (result.exit_code, result.stdout) == (1, "")
        assert re.fullmatch(rf"Error: {name} cannot be (used|written): File name too long\n", result.stderr)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_under_stdout_is_one_sentence(tiny_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", MAIN, "score", str(tiny_path), "--golden"],
            stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, "Error: No space left on device\n")


def test_names_of_files_may_be_any_bytes(tiny_path: Path, tmp_path: Path) -> None:
    images = pytest.importorskip("PIL.Image")
    path = os.fsencode(tmp_path) + b"/caf\xe9.png"
    with open(path, "xb") as stream:  # noqa: PTH123  # bytes are no Path
        images.fromarray(np.zeros((8, 8), np.uint8)).save(stream, "png")
    command = [sys.executable, "-c", MAIN, "score", str(tiny_path), path]
    utf8 = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    for options in (["--csv"], ["--json"], ["--output", tmp_path / "a.csv"], ["--output", tmp_path / "a.json"]):
        done = subprocess.run([*command, *options], env=utf8, capture_output=True, check=False)
        assert (done.returncode, done.stderr) == (0, b"")
        if options == ["--csv"]:
            assert path in done.stdout
        if options == ["--json"]:
            assert os.fsencode(json.loads(done.stdout)["scores"][0]["name"]) == path
    assert path in (tmp_path / "a.csv").read_bytes()
    assert os.fsencode(json.loads((tmp_path / "a.json").read_text())["scores"][0]["name"]) == path


def test_what_was_said_of_other_characters_stays(tiny_path: Path, tmp_path: Path) -> None:
    images = pytest.importorskip("PIL.Image")
    images.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "日.png")
    command = [sys.executable, "-c", MAIN, "score", str(tiny_path), str(tmp_path / "日.png")]
    latin = {**os.environ, "PYTHONIOENCODING": "latin-1:replace"}
    done = subprocess.run(command, env=latin, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"/?.png" in done.stdout


def test_errors_of_the_system_without_a_number_keep_their_text() -> None:
    def fail() -> None:
        raise OSError("what happened")

    assert CliRunner().invoke(click.command(cls=Command)(fail), []).stderr == "Error: what happened\n"


def test_texts_of_others_do_not_command_a_terminal() -> None:
    assert printable("a \x1b[31mµ\u202e\n b\r") == "a \\x1b[31mµ\\u202e\n b\\r"


def test_a_command_runs_outside_of_the_main_thread() -> None:
    seen: list[str] = []
    command = click.command(cls=Command)(lambda: seen.append(threading.current_thread().name))
    thread = threading.Thread(target=command.main, args=([],), kwargs={"standalone_mode": False}, name="another")
    thread.start()
    thread.join()
    assert seen == ["another"]
