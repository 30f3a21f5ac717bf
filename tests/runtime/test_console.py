"""What the command lines share: signals end a command as Ctrl-C does, and everything that it has started."""

from __future__ import annotations

import errno
import importlib.util
import io
import json
import os
import re
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner

from vae_runtime import console
from vae_runtime.cli import main
from vae_runtime.console import ENDINGS, Command, echo_warning, printable

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
MAIN = "from vae_runtime.cli import main; main()"


@pytest.fixture(params=ENDINGS)
def ending(request: pytest.FixtureRequest) -> Iterator[signal.Signals]:
    """A signal that ends a command, as an interpreter finds it."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in ENDINGS}
    yield request.param
    for number, handler in before.items():
        signal.signal(number, handler)


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


def test_the_first_of_them_runs_what_cleans_up_once(ending: signal.Signals) -> None:
    ended: list[str] = []

    @click.command(cls=Command)
    def command() -> None:
        try:
            os.kill(os.getpid(), ending)
        finally:
            for number in ENDINGS:
                os.kill(os.getpid(), number)
            ended.append("cleaned up")

    result = CliRunner().invoke(command, [])
    assert (result.exit_code, result.output, ended) == (128 + ending, "", ["cleaned up"])
    assert [signal.getsignal(number) for number in ENDINGS] == [signal.SIG_DFL, signal.SIG_DFL]


def test_a_console_that_windows_closes_ends_a_command_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "SIGBREAK", signal.SIGUSR1, raising=False)  # which exists there alone
    spec = importlib.util.spec_from_file_location("vae_runtime.console_of_windows", console.__file__)
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    kept = signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    try:
        with pytest.raises(SystemExit) as ended, module.hear_endings():
            os.kill(os.getpid(), signal.SIGBREAK if signal.SIGBREAK in module.ENDINGS else 0)
        assert ended.value.code == 128 + signal.SIGUSR1
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGUSR1, kept)


@pytest.mark.parametrize("handler", [signal.SIG_IGN, lambda number, frame: None])
def test_what_was_decided_about_one_stays(ending: signal.Signals, handler: Any) -> None:
    signal.signal(ending, handler)
    seen: list[Any] = []
    CliRunner().invoke(click.command(cls=Command)(lambda: seen.append(signal.getsignal(ending))), [])
    assert seen == [handler]
    assert signal.getsignal(ending) is handler


def test_a_closed_terminal_leaves_no_temporary_file(tiny_path: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", MAIN, "sample", str(tiny_path), "-n", "2000000", "--output", "a.npz"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while not any(file.stat().st_size for file in tmp_path.glob(".a.npz.*/*")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGHUP)
    assert process.communicate(timeout=20)[1] == ""
    assert (process.returncode, list(tmp_path.iterdir())) == (129, [])


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


class WithoutReader(io.FileIO):
    """The end of a pipe as Windows has it when nobody reads."""

    def write(self, data: Any) -> int:
        if stat.S_ISFIFO(os.fstat(self.fileno()).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        return super().write(data)


@pytest.mark.parametrize(("platform", "said"), [("win32", ""), ("linux", "Error: Invalid argument\n")])
def test_a_pipe_whose_reader_is_gone_is_no_error_on_windows(
    platform: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    reader, writer = os.pipe()
    stdout = io.TextIOWrapper(io.BufferedWriter(WithoutReader(writer, "w")))
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr(console, "sys", SimpleNamespace(platform=platform, stdout=stdout))
    with pytest.raises(SystemExit) as ended:
        click.command(cls=Command)(lambda: click.echo("a line")).main([])
    assert (ended.value.code, capsys.readouterr().err) == (1, said)
    os.dup2(os.open(os.devnull, os.O_WRONLY), writer)
    stdout.close()
    os.close(reader)


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


@pytest.mark.parametrize("encoding", ["cp1252", "cp1252:surrogateescape"])
def test_names_that_stdout_cannot_show_are_escaped(tiny_path: Path, tmp_path: Path, encoding: str) -> None:
    images = pytest.importorskip("PIL.Image")
    for name in ("caf\u00e9.png", "\u76ee\U0001f600.png"):
        images.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / name)
    command = [sys.executable, "-c", MAIN, "score", str(tiny_path), str(tmp_path)]
    windows = {**os.environ, "PYTHONIOENCODING": encoding}
    table, document = (
        subprocess.run([*command, *options], env=windows, capture_output=True, check=False)
        for options in ([], ["--json"])
    )
    assert (table.returncode, table.stderr, document.returncode, document.stderr) == (0, b"", 0, b"")
    assert b"caf\xe9.png" in table.stdout
    assert rb"\u76ee\U0001f600.png" in table.stdout
    names = [Path(score["name"]).name for score in json.loads(document.stdout)["scores"]]
    assert names == ["caf\u00e9.png", "\u76ee\U0001f600.png"]


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
    assert printable("caf\udce9\udc9b31m") == "caf\udce9\\udc9b31m"


def test_a_warning_is_one_printable_line_on_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    echo_warning(UserWarning("x\x1b[31m is left out"))
    assert capfd.readouterr() == ("", "Warning: x\\x1b[31m is left out\n")


def test_names_of_files_and_bundles_do_not_command_a_terminal_either(bundle: Path, tmp_path: Path, resign: Any) -> None:
    images, name = pytest.importorskip("PIL.Image"), "\x1b[31m\x9b.png"
    images.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / name)
    (tmp_path / "\x1b.png").touch()
    resign(bundle, lambda data: data.update(name="\x1b[2J"))
    for arguments in (
        ["score", bundle, tmp_path / name],
        ["nearest", bundle, tmp_path / name, "--references", tmp_path / name, "-k", "1"],
        ["score", bundle, tmp_path / "\x1b.png"],
        ["selftest", bundle, "--precision", "int8"],
    ):
        found = CliRunner().invoke(main, list(map(str, arguments)))
        assert "\\x1b" in found.output
        assert "\x1b" not in found.output
        assert "\x9b" not in found.output


def test_a_command_whose_stderr_is_closed_has_no_bar_and_no_other_result(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    main(["encode", str(tiny_path), "--golden", "--output", str(tmp_path / "z.npz")], standalone_mode=False)
    main(
        ["decode", str(tiny_path), str(tmp_path / "z.npz"), "--output", str(tmp_path / "x.npy")], standalone_mode=False
    )
    assert np.load(tmp_path / "x.npy").shape == (4, 1, 8, 8)


def test_a_command_runs_outside_of_the_main_thread() -> None:
    seen: list[str] = []
    command = click.command(cls=Command)(lambda: seen.append(threading.current_thread().name))
    thread = threading.Thread(target=command.main, args=([],), kwargs={"standalone_mode": False}, name="another")
    thread.start()
    thread.join()
    assert seen == ["another"]
