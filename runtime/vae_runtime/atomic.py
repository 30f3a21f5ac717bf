"""Files and folders that appear whole or not at all: written beside, flushed to the disk, then renamed."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from .errors import OutputError

_AGAIN_SECONDS = (0.05, 0.1, 0.2, 0.3, 0.4)
_RULE = "it is replaced only when that is asked for (--force)"
_KEPT = 100  # bytes of a name in a temporary one, which then is no longer than any system has it


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str], *, replace: bool = True) -> Iterator[IO[bytes]]:
    """Open a temporary file beside `path`; on success it takes the place of `path`, on any failure it is removed.

    replace: whether it may take the place of a file, also of one that comes in the meantime.

    Raises:
        OutputError: the folder is missing or not writable, the disk is full, `path` is a folder, or what is there may
            not be replaced.
    """
    path = Path(path)
    with writing(path):
        if path.is_dir():
            raise OutputError(f"{path} is a folder; expected the name of a file to write")
        temporary = _beside(path, "part")
        try:
            with temporary.open("xb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            if replace or not _link(temporary, path):
                _patiently(temporary.replace, path)
            _sync_folder(path.parent)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], document: Any, *, sort_keys: bool = True, replace: bool = True) -> None:
    """Write a JSON document whole or not at all: indented, in ASCII, which names of files of any bytes fit into.
    replace: as for `atomic_file`.

    Raises:
        OutputError: as `atomic_file`. ValueError: a number in it is NaN or infinite.
    """
    text = json.dumps(document, indent=2, sort_keys=sort_keys, allow_nan=False) + "\n"
    with atomic_file(path, replace=replace) as stream:
        stream.write(text.encode())


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str], may_replace: Callable[[Path], bool] | None = None) -> Iterator[Path]:
    """Yield a new folder beside `path` to fill; on success it takes the place of `path`, on any failure it is removed.

    may_replace: decides whether what stands at `path` may go; None means never. The old folder stays complete and in
        place until the new one is complete.

    Raises:
        OutputError: `path` exists and may not be replaced, or the disk refuses.
    """
    path = Path(path)
    refuse_existing(path, may_replace)
    temporary = _beside(path, "part")
    with writing(path):
        try:
            temporary.mkdir()
            yield temporary
            for file in temporary.iterdir():
                with file.open("rb+") as stream:
                    os.fsync(stream.fileno())
            _sync_folder(temporary)
            refuse_existing(path, may_replace)
            if os.path.lexists(path):
                _exchange(temporary, path)
            else:
                _patiently(temporary.replace, path)
            _sync_folder(path.parent)
        except OutputError as error:  # of a file in the folder: by the name that it was to have
            raise OutputError(str(error).replace(str(temporary), str(path))) from error.__cause__
        finally:
            shutil.rmtree(temporary, ignore_errors=True)  # half done, or the old folder after an exchange


def refuse_other_file(path: str | os.PathLike[str], force: bool) -> None:
    """`refuse_existing`, but that a file, and no folder, may be replaced by `force`."""
    refuse_existing(path, lambda old: force and old.is_file(), _RULE)


def refuse_existing(
    path: str | os.PathLike[str],
    may_replace: Callable[[Path], bool] | None = None,
    rule: str = "it is replaced only when that is asked for (--force), and only by the program that wrote it",
) -> None:
    """Raise `OutputError` if something stands at `path`, unless `may_replace(path)` allows it, which `rule` says."""
    path = Path(path)
    with writing(path):
        if _is_there(path) and not (may_replace is not None and may_replace(path)):
            if path.is_dir():
                rule = "choose a name that is not taken"
                raise OutputError(f"{path} exists and is a folder, which is not replaced; {rule}")
            raise OutputError(f"{path} exists; {rule}")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the system refuses in the block is an `OutputError` of `path`."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error


def _is_there(path: Path) -> bool:
    """Whatever it is. Raises: OSError: nothing can be, as of a name that is too long."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False
    return True


def shortened(name: str) -> str:
    """The beginning of a file's name, by which people know a temporary file of it."""
    return name.encode("utf-8", "surrogatepass")[:_KEPT].decode("utf-8", "ignore") if len(name) * 4 > _KEPT else name


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(f".{shortened(path.name)}.{secrets.token_hex(4)}.{suffix}")


def _link(temporary: Path, path: Path) -> bool:
    """Give a complete file its name too, at once and only if that is not taken; False where the system has no links.

    Raises:
        OutputError: the name is taken.
    """
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise OutputError(f"{path} exists; {_RULE}") from None
    except (OSError, AttributeError):  # the file system has none, or this Python
        refuse_existing(path, None, _RULE)
        return False
    return True


def _patiently(move: Callable[[Path], Any], target: Path) -> None:
    """`move` to `target`. On Windows a virus scanner holds what is new for a moment, and its name with it."""
    for seconds in _AGAIN_SECONDS if sys.platform == "win32" else ():
        try:
            move(target)
        except PermissionError:
            time.sleep(seconds)
        else:
            return
    move(target)


def _exchange(new: Path, path: Path) -> None:
    """Let `new` and `path` change places: at once where the system can, else with the old one aside for a moment."""
    if _renameat2_exchange(new, path):
        return
    old = _beside(path, "old")
    _patiently(path.rename, old)
    try:
        _patiently(new.rename, path)
    except OSError:
        _patiently(old.rename, path)
        raise
    _patiently(old.rename, new)


def _renameat2_exchange(first: Path, second: Path) -> bool:
    """Linux's RENAME_EXCHANGE: no moment at which neither name exists. False where it is not to be had."""
    if not sys.platform.startswith("linux"):
        return False
    at_fdcwd, rename_exchange = -100, 2
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError):
        return False
    return bool(renameat2(at_fdcwd, os.fsencode(first), at_fdcwd, os.fsencode(second), rename_exchange) == 0)


def _sync_folder(path: Path) -> None:
    # Windows cannot open a folder; there the rename alone has to do.
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
