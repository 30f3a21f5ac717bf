"""Examples from files, for the command lines: pictures, folders of them, .npy and .npz, never all in memory at once."""

from __future__ import annotations

import contextlib
import math
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from .errors import InputError
from .images import PICTURE_SUFFIXES, list_pictures, read_pictures
from .manifest import InputSpec
from .preprocess import check_layout

ARRAY_SUFFIXES = (".npy", ".npz")


class PictureSource:
    """Picture files, read as `InputSpec` says; `names` are their paths."""

    def __init__(self, paths: Sequence[Path], spec: InputSpec) -> None:
        self.names = [str(path) for path in paths]
        self._spec = spec

    def __len__(self) -> int:
        return len(self.names)

    def batches(self, size: int) -> Iterator[NDArray[Any]]:
        for start in range(0, len(self.names), size):
            yield read_pictures(self.names[start : start + size], self._spec)


class ArraySource:
    """One array of a .npy or .npz file, read batch by batch along its first axis.

    keys: the names to look for in an .npz, in that order; an .npz with a single array needs none of them.
    """

    def __init__(self, path: Path, keys: Sequence[str]) -> None:
        self.path = path
        self._member: str | None = None
        try:
            if path.suffix.lower() == ".npz":
                self._member = self._choose_member(keys)
            with self._open() as stream:
                self.shape, self._fortran, self.dtype = _read_header(stream)
        except FileNotFoundError:
            raise InputError(f"{path} does not exist") from None
        except InputError:
            raise
        except Exception as error:  # a damaged file raises nearly anything: BadZipFile, TokenError, RuntimeError, ...
            raise InputError(f"{path} cannot be read as {path.suffix.lower()}: {error}") from None
        if self.dtype.hasobject:
            raise InputError(f"{path} holds Python objects, which are never loaded; save plain numbers")
        if not self.shape or self._fortran:
            raise InputError(
                f"{path} has shape {self.shape}{' in Fortran order' * self._fortran}; expected a batch in C order"
            )
        if min(self.shape) < 1:
            raise InputError(f"{path} has shape {self.shape}; expected at least one example along the first axis")
        needed, available = math.prod(self.shape) * self.dtype.itemsize, self._stored_bytes()
        if needed > available:
            raise InputError(f"{path} has {available} bytes for shape {self.shape}, which takes {needed}: truncated")
        self.names = [f"{path.name}#{index}" for index in range(self.shape[0])]

    def __len__(self) -> int:
        return int(self.shape[0])

    def outline(self) -> NDArray[Any]:
        """An array of this dtype and shape that takes no memory, for checks that look at no values."""
        return np.broadcast_to(np.zeros((), self.dtype), self.shape)

    def batches(self, size: int) -> Iterator[NDArray[Any]]:
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        with self._open() as stream:
            _read_header(stream)
            for start in range(0, len(self), size):
                count = min(size, len(self) - start)
                try:
                    data = stream.read(count * row)
                except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
                    raise InputError(f"{self.path} is damaged after {start} examples: {error}") from None
                if len(data) != count * row:
                    raise InputError(f"{self.path} ends after {start} of {len(self)} examples: it is truncated")
                yield np.frombuffer(data, self.dtype).reshape(count, *self.shape[1:])

    def _choose_member(self, keys: Sequence[str]) -> str:
        with zipfile.ZipFile(self.path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
        for key in keys:
            if key in names:
                return f"{key}.npy"
        if len(names) != 1:
            raise InputError(
                f"{self.path} holds the arrays {names}; expected one of {', '.join(keys)}, or a single array"
            )
        return f"{names[0]}.npy"

    def _stored_bytes(self) -> int:
        if self._member is None:
            return self.path.stat().st_size
        with zipfile.ZipFile(self.path) as archive:
            return archive.getinfo(self._member).file_size

    @contextlib.contextmanager
    def _open(self) -> Iterator[IO[bytes]]:
        if self._member is None:
            with self.path.open("rb") as stream:
                yield stream
        else:
            with zipfile.ZipFile(self.path) as archive, archive.open(self._member) as stream:
                yield stream


def open_inputs(paths: Sequence[str], spec: InputSpec) -> PictureSource | ArraySource:
    """What `paths` name: pictures and folders of pictures in any number, or one .npy or .npz file.

    Raises:
        InputError: a path does not exist, a folder has no pictures, a mixture, a kind of file that is not understood.
    """
    found = [Path(path) for path in paths]
    arrays = [path for path in found if path.suffix.lower() in ARRAY_SUFFIXES]
    if arrays:
        if len(found) > 1:
            raise InputError(
                f"{arrays[0]} comes with {len(found) - 1} other inputs; give one array file alone, or pictures"
            )
        source = ArraySource(arrays[0], ("x", "images", "vectors"))
        check_layout(source.outline(), spec, str(arrays[0]))
        return source
    if not spec.is_image:
        raise InputError(f"{found[0]} is no array file; this bundle takes vectors, from .npy or .npz")
    return PictureSource([picture for path in found for picture in _pictures(path)], spec)


def open_latents(path: str) -> ArraySource:
    """Latents from .npy, or from .npz under `z`, else `mean`, as `vae-run encode` writes them."""
    if Path(path).suffix.lower() not in ARRAY_SUFFIXES:
        raise InputError(f"{path} is no array file; latents are read from .npy or .npz")
    return ArraySource(Path(path), ("z", "mean"))


def read_one(path: str, spec: InputSpec) -> NDArray[Any]:
    """A single example with its batch axis, from a picture, or from an array file as `FILE.npy#INDEX`."""
    name, _, index = path.partition("#") if not Path(path).exists() else (path, "", "")
    source = open_inputs([name], spec)
    if not index and len(source) == 1:
        index = "0"
    if not index.isdecimal() or int(index) >= len(source):
        raise InputError(
            f"{path} names no single example; write {name}#INDEX with an index from 0 to {len(source) - 1}"
        )
    batches = source.batches(1)
    for _ in range(int(index)):
        next(batches)
    return next(batches)


def _pictures(path: Path) -> list[Path]:
    if path.is_dir():
        pictures = list_pictures(path)
        if not pictures:
            raise InputError(f"{path} holds no pictures; looked for {', '.join(PICTURE_SUFFIXES)}")
        return pictures
    if not path.exists():
        raise InputError(f"{path} does not exist")
    return [path]


def _read_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = reader(stream)
    return tuple(shape), bool(fortran and len(shape) > 1), dtype
