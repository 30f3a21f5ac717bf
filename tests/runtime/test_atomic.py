from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from vae_runtime import OutputError
from vae_runtime import atomic as module
from vae_runtime.atomic import atomic_file, atomic_folder, refuse_existing, refuse_other_file, write_json


def always(_: Path) -> bool:
    return True


def fill(folder: Path, content: bytes) -> None:
    for name in ("a", "b", "c"):
        (folder / name).write_bytes(content)


def contents(folder: Path) -> set[bytes]:
    return {path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> set[tuple[int, int]]:
    """The inode and size of whatever is flushed to the disk as long as there is no `out`."""
    found, fsync = set(), os.fsync

    def note(descriptor: int) -> None:
        fsync(descriptor)
        if not (tmp_path / "out").exists():
            status = os.fstat(descriptor)
            found.add((status.st_ino, status.st_size))

    monkeypatch.setattr(os, "fsync", note)
    return found


# --- files ------------------------------------------------------------------------------------------------------------


def test_file_appears_only_at_the_end(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "out") as stream:
        stream.write(b"content")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out").read_bytes() == b"content"
    assert len(list(tmp_path.iterdir())) == 1


def test_file_is_on_the_disk_before_it_appears(tmp_path: Path, flushed: set[tuple[int, int]]) -> None:
    with atomic_file(tmp_path / "out") as stream:
        stream.write(b"content")
    assert ((tmp_path / "out").stat().st_ino, 7) in flushed


@pytest.mark.parametrize("write", [atomic_file, atomic_folder])
def test_a_name_that_the_system_refuses_is_an_output_error(tmp_path: Path, write: Any) -> None:
    path = tmp_path / ("a" * 300) / "b"
    with pytest.raises(OutputError, match=r"/b cannot be written: File name too long$"), write(path):
        pytest.fail("there is nothing to write to")


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt(), SystemExit(3)])
def test_failure_of_any_kind_keeps_the_old_file_and_leaves_no_litter(tmp_path: Path, error: BaseException) -> None:
    (tmp_path / "out").write_bytes(b"old")
    with pytest.raises(type(error)) as caught, atomic_file(tmp_path / "out") as stream:  # noqa: PT012
        stream.write(b"half")
        raise error
    assert caught.value is error
    assert (tmp_path / "out").read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


def test_missing_folder_and_folder_in_the_way_are_output_errors(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match=r"none/out cannot be written: No such file"),
        atomic_file(tmp_path / "none/out"),
    ):
        pass
    for folder in (tmp_path, Path(), Path("/"), Path("..")):
        with pytest.raises(OutputError, match=r"is a folder; expected the name of a file"), atomic_file(folder):
            pass
    assert list(tmp_path.iterdir()) == []


def test_read_only_folder_is_an_output_error_in_words() -> None:
    # A folder that refuses even root.
    with pytest.raises(OutputError, match=r"^/proc/out cannot be written: "), atomic_file("/proc/out"):
        pass


def test_concurrent_writers_leave_one_whole_file(tmp_path: Path) -> None:
    def write(number: int) -> None:
        for _ in range(30):
            with atomic_file(tmp_path / "out") as stream:
                stream.write(b"%d" % number * 10_000)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))  # raises what a writer raised
    data = (tmp_path / "out").read_bytes()
    assert len(data) == 10_000
    assert len(set(data)) == 1
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(("sort_keys", "keys"), [(True, ["a", "b"]), (False, ["b", "a"])])
def test_a_json_document_of_any_text(tmp_path: Path, sort_keys: bool, keys: list[str]) -> None:
    document = {"b": [1, 2.5, None], "a": "ü \udcff"}  # the second: of the name of a file
    write_json(tmp_path / "x.json", document, sort_keys=sort_keys)
    text = (tmp_path / "x.json").read_bytes()
    assert text.endswith(b"\n}\n")
    assert text.isascii()
    assert (json.loads(text), list(json.loads(text))) == (document, keys)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_json_document_has_finite_numbers(tmp_path: Path, value: float) -> None:
    (tmp_path / "x.json").write_text("old")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"a": value})
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("x.json", "old")]


@pytest.mark.parametrize("has_links", [True, False])
def test_what_comes_meanwhile_is_not_replaced_unasked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_links: bool
) -> None:
    if not has_links:
        monkeypatch.setattr(os, "link", always_refuse)
    with atomic_file(tmp_path / "new", replace=False) as stream:
        stream.write(b"new")
    assert (tmp_path / "new").read_bytes() == b"new"
    assert (tmp_path / "new").stat().st_nlink == 1
    rule = r"out exists; it is replaced only when that is asked for \(--force\)$"
    for make in (Path.touch, Path.mkdir, lambda path: path.symlink_to("nowhere")):
        with pytest.raises(OutputError, match=r"out exists"), atomic_file(tmp_path / "out", replace=False) as stream:
            make(tmp_path / "out")
        (tmp_path / "out").rmdir() if (tmp_path / "out").is_dir() else (tmp_path / "out").unlink()
    with pytest.raises(OutputError, match=rule), atomic_file(tmp_path / "out", replace=False):
        write_json(tmp_path / "out", "precious")
    with pytest.raises(OutputError, match=rule):
        write_json(tmp_path / "out", 1, replace=False)
    assert (tmp_path / "out").read_text() == '"precious"\n'
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "out"]


def always_refuse(*_: Any) -> None:
    raise OSError(errno.EPERM, "Operation not permitted")


def test_of_two_that_write_one_name_the_second_is_told(tmp_path: Path) -> None:
    def write(number: int) -> bool:
        try:
            with atomic_file(tmp_path / "out", replace=False) as stream:
                stream.write(b"%d" % number)
        except OutputError:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        won = list(pool.map(write, range(8)))
    assert won.count(True) == 1
    assert (tmp_path / "out").read_bytes() == b"%d" % won.index(True)


@pytest.mark.parametrize("name", ["a" * 255, "目" * 85, "x" + "目" * 84, "a" * 250 + "\udcff" * 5])
def test_a_name_may_be_as_long_as_the_system_has_it(tmp_path: Path, name: str) -> None:
    with atomic_file(tmp_path / name) as stream:
        stream.write(b"content")
        (temporary,) = (path.name for path in tmp_path.iterdir())
        assert temporary.startswith("." + name[:30])
        assert temporary.isprintable()
        assert len(os.fsencode(temporary)) < 130
    with atomic_folder(tmp_path / (name[:-1] + "b")) as folder:
        (folder / name).write_bytes(b"content")
    assert {path.name for path in tmp_path.iterdir()} == {name, name[:-1] + "b"}


def test_a_name_that_is_too_long_is_told_before_the_work() -> None:
    with pytest.raises(OutputError, match=r"aa cannot be written: File name too long$"):
        refuse_other_file("a" * 256, force=False)


# --- folders ----------------------------------------------------------------------------------------------------------


def test_folder_appears_only_at_the_end(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "out") as folder:
        fill(folder, b"new")
        assert not (tmp_path / "out").exists()
    assert contents(tmp_path / "out") == {b"new"}
    assert len(list(tmp_path.iterdir())) == 1


def test_files_of_a_folder_are_on_the_disk_before_it_appears(tmp_path: Path, flushed: set[tuple[int, int]]) -> None:
    with atomic_folder(tmp_path / "out") as folder:
        fill(folder, b"new")
    assert {(path.stat().st_ino, 3) for path in (tmp_path / "out").iterdir()} <= flushed


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt()])
def test_failed_folder_keeps_the_old_one_and_leaves_no_litter(tmp_path: Path, error: BaseException) -> None:
    (tmp_path / "out").mkdir()
    fill(tmp_path / "out", b"old")
    with pytest.raises(type(error)), atomic_folder(tmp_path / "out", always) as folder:  # noqa: PT012
        fill(folder, b"half")
        raise error
    assert contents(tmp_path / "out") == {b"old"}
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch, lambda p: p.symlink_to("nowhere")])
def test_whatever_exists_is_never_replaced_unasked(tmp_path: Path, make: Callable[[Path], Any]) -> None:
    make(tmp_path / "out")
    before = os.lstat(tmp_path / "out").st_ino
    for may_replace in (None, lambda _: False):
        rule = r"out exists; it is replaced only when that is asked for \(--force\)"
        if (tmp_path / "out").is_dir():
            rule = "out exists and is a folder, which is not replaced; choose a name that is not taken"
        with pytest.raises(OutputError, match=rule), atomic_folder(tmp_path / "out", may_replace):
            pytest.fail("the work was begun")
    assert os.lstat(tmp_path / "out").st_ino == before
    assert len(list(tmp_path.iterdir())) == 1


def test_a_file_that_cannot_be_written_is_named_as_it_was_to_be_called(tmp_path: Path) -> None:
    rule = f"^{tmp_path}/out/{'a' * 256} cannot be written: File name too long$"
    with pytest.raises(OutputError, match=rule), atomic_folder(tmp_path / "out") as folder:
        write_json(folder / ("a" * 256), 1)
    assert list(tmp_path.iterdir()) == []


def test_folder_that_appears_while_the_work_goes_on_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="out exists"), atomic_folder(tmp_path / "out") as folder:  # noqa: PT012
        fill(folder, b"new")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "precious").touch()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious"]
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("at_once", [True, False])
def test_replacement_is_complete_with_and_without_the_systems_exchange(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: bool
) -> None:
    if not at_once:
        monkeypatch.setattr(module, "_renameat2_exchange", lambda *_: False)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "only in the old").touch()
    with atomic_folder(tmp_path / "out", always) as folder:
        fill(folder, b"new")
        assert (tmp_path / "out" / "only in the old").exists()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a", "b", "c"]
    assert len(list(tmp_path.iterdir())) == 1


def test_failed_rename_without_the_systems_exchange_puts_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_renameat2_exchange", lambda *_: False)
    (tmp_path / "out").mkdir()
    fill(tmp_path / "out", b"old")
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name.endswith(".part"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with (
        pytest.raises(OutputError, match="out cannot be written: Input/output"),
        atomic_folder(tmp_path / "out", always),
    ):
        pass
    assert contents(tmp_path / "out") == {b"old"}
    assert len(list(tmp_path.iterdir())) == 1


def test_every_nth_system_call_that_fails_leaves_old_or_new_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is full at the n-th step, for every n until there is no such step."""
    finished = False
    for step in range(1, 40):
        base = tmp_path / str(step)
        (base / "folder").mkdir(parents=True)
        fill(base / "folder", b"old")
        (base / "file").write_bytes(b"old")
        calls = 0

        def failing(original: Callable[..., Any], step: int = step) -> Callable[..., Any]:
            def call(*arguments: Any, **options: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls == step:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return original(*arguments, **options)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", failing(os.fsync))
            for name in ("open", "mkdir", "rename", "replace"):
                patch.setattr(Path, name, failing(getattr(Path, name)))
            with contextlib.suppress(OutputError), atomic_file(base / "file") as stream:
                stream.write(b"new")
            with contextlib.suppress(OutputError), atomic_folder(base / "folder", always) as folder:
                fill(folder, b"new")
        assert (base / "file").read_bytes() in (b"old", b"new")
        assert contents(base / "folder") in ({b"old"}, {b"new"})
        assert sorted(path.name for path in base.iterdir()) == ["file", "folder"]
        if calls < step:
            finished = True
            assert contents(base / "folder") == {b"new"}
            break
    assert finished
    assert step > 8


def test_full_disk_is_an_output_error_and_keeps_the_old_file(python: Any, tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"old")
    code = """
import resource, signal, sys
from vae_runtime.atomic import atomic_file, atomic_folder, OutputError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    with atomic_file(sys.argv[1] + "/out") as stream:
        for _ in range(100): stream.write(b"x" * 1000)
except OutputError as error: print(error)
try:
    with atomic_folder(sys.argv[1] + "/folder") as folder: (folder / "a").write_bytes(b"x" * 10000)
except OutputError as error: print(error)
"""
    result = python(code, tmp_path)
    assert result.stdout.splitlines() == [
        f"{tmp_path}/{name} cannot be written: File too large" for name in ("out", "folder")
    ]
    assert (tmp_path / "out").read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_file_of_anybody_is_replaced_where_that_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_bytes(b"")
    refuse_other_file(tmp_path / "a.npy", force=True)
    with pytest.raises(OutputError, match=r"a\.npy exists; it is replaced only when that is asked for \(--force\)$"):
        refuse_other_file(tmp_path / "a.npy", force=False)


def test_refuse_existing(tmp_path: Path) -> None:
    refuse_existing(tmp_path / "none")
    refuse_existing(tmp_path, always)
    with pytest.raises(OutputError, match="exists and is a folder, which is not replaced"):
        refuse_existing(tmp_path)


# --- killed while writing ---------------------------------------------------------------------------------------------

REPLACER = """
import sys, itertools
from pathlib import Path
from vae_runtime.atomic import atomic_file, atomic_folder
base = Path(sys.argv[1])
for number in itertools.count(int(sys.argv[2])):
    with atomic_folder(base / "out", lambda _: True) as folder:
        for name in "abc":
            (folder / name).write_bytes(b"%08d" % number * 500)
    with atomic_file(base / "file") as stream:
        for _ in range(20): stream.write(b"%08d" % number * 50)
    if number == int(sys.argv[2]): print("going", flush=True)
"""


def test_sigkill_at_random_moments_leaves_old_or_new_complete_and_never_half(tmp_path: Path) -> None:
    rng, seen = random.Random(2), set()
    for kill in range(40):
        process = subprocess.Popen(
            [sys.executable, "-S", "-c", REPLACER_WITHOUT_PACKAGE, str(tmp_path), str(kill * 1000)],
            stdout=subprocess.PIPE,
        )
        assert process.stdout is not None
        process.stdout.readline()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(rng.random() * 0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a", "b", "c"]
        (version,) = contents(tmp_path / "out")
        assert version == version[:8] * 500
        data = (tmp_path / "file").read_bytes()
        assert data == data[:8] * 1000
        seen.add(version[:8])
    assert len(seen) > 20


# The module alone, without numpy: 40 starts of an interpreter in a fraction of the time.
REPLACER_WITHOUT_PACKAGE = f"""
import sys, types
package = types.ModuleType("vae_runtime"); package.__path__ = [{str(Path(module.__file__).parent)!r}]
sys.modules["vae_runtime"] = package
{REPLACER}"""
