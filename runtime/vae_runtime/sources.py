"""Examples from files, for the command lines: pictures, folders of them, .npy and .npz, never all in memory at once."""

from __future__ import annotations

import contextlib
import math
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from .errors import InputError
from .images import PICTURE_SUFFIXES, list_pictures, picture_size, read_picture, read_pictures
from .manifest import MEAN, InputSpec
from .preprocess import check_layout, padded_size

ARRAY_SUFFIXES = (".npy", ".npz")
EXAMPLE_KEYS, LABEL_KEYS = ("x", "images", "vectors"), ("labels", "label", "y")  # of an .npz, tried in this order
_NPY_HEADER = 2**14  # bytes, at most; numpy itself reads none with over 10,000 characters
BATCH_VALUES = 2**24  # of images of free size that are read at once, more than one


class PictureSource:
    """Picture files, read as `InputSpec` says; `names` are their paths."""

    def __init__(self, paths: Sequence[Path], spec: InputSpec) -> None:
        self.names = [str(path) for path in paths]
        self._spec = spec

    def __len__(self) -> int:
        return len(self.names)

    def example_shape(self, multiple: int = 1) -> tuple[int, ...]:
        """(C, H, W) of the first picture, padded to multiples of `multiple`; where `spec` fixes it, that."""
        if not self._spec.is_free:
            return self._spec.example_shape
        return (self._spec.example_shape[0], *padded_size(*picture_size(self.names[0]), multiple))

    def sizes(self) -> Iterator[tuple[int, int]]:
        """(height, width) of each, of which the pixels are not read; also tells whether it is a picture."""
        return map(picture_size, self.names)

    def batches(self, size: int) -> Iterator[NDArray[Any]]:
        """Pictures of one size each; where sizes are free, as many at once as follow one another in the same size."""
        if not self._spec.is_free:
            for start in range(0, len(self.names), size):
                yield read_pictures(self.names[start : start + size], self._spec)
            return
        waiting: list[NDArray[Any]] = []
        for picture in (read_picture(name, self._spec) for name in self.names):
            full = len(waiting) >= min(size, BATCH_VALUES // picture.size)
            if waiting and (full or waiting[0].shape != picture.shape):
                yield np.stack(waiting)
                waiting = []
            waiting.append(picture)
        yield np.stack(waiting)


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
        if self.dtype.itemsize == 0:  # of which a file without content has any number
            raise InputError(f"{path} has values of no bytes, of dtype {self.dtype.str}; save plain numbers")
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

    @property
    def member(self) -> str | None:
        """The array's name in an .npz."""
        return None if self._member is None else self._member.removesuffix(".npy")

    def others(self, most: Mapping[str, int]) -> dict[str, NDArray[Any]]:
        """Small arrays beside it in the .npz, by name. most: their bytes at most, by name, for those to be read if they
        are there; more is not unpacked, which might be a thousand times as much as the file."""
        try:
            with np.load(self.path, allow_pickle=False) as archive:
                names = [name for name in most if name in archive.files]
                for name in names:
                    if (size := archive.zip.getinfo(f"{name}.npy").file_size) > most[name] + _NPY_HEADER:
                        raise InputError(f"{self.path} has {size} bytes of {name}; expected {most[name]} at most")
                arrays = {name: archive[name] for name in names}
        except InputError:
            raise
        except Exception as error:  # as in __init__
            raise InputError(f"{self.path} cannot be read as .npz: {error}") from None
        for name, array in arrays.items():
            if array.size > most[name]:  # of values that take no bytes in the file
                raise InputError(f"{self.path} has {name} of shape {array.shape}; expected {most[name]} bytes at most")
        return arrays

    def example_shape(self, multiple: int = 1) -> tuple[int, ...]:
        """Of one example as the encoder takes it: (C, H, W), padded to multiples of `multiple`, or (D,)."""
        shape = self.shape[1:]
        if self.dtype == np.uint8:  # (H, W) or (H, W, C)
            shape = (shape[2] if len(shape) > 2 else 1, *shape[:2])
        return shape if len(shape) < 3 else (shape[0], *padded_size(shape[1], shape[2], multiple))

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
        hint = "; latents are for vae-run decode, and for nearest --encoded" if MEAN in names else ""
        return f"{choose_array(self.path, names, keys, hint)}.npy"

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


class MemorySource:
    """An array in memory, whose rows are called `prefix` and their number."""

    def __init__(self, array: NDArray[Any], prefix: str) -> None:
        self._array = array
        self.names = [f"{prefix}{index}" for index in range(len(array))]

    def __len__(self) -> int:
        return len(self._array)

    def example_shape(self, multiple: int = 1) -> tuple[int, ...]:
        return tuple(self._array.shape[1:])

    def outline(self) -> NDArray[Any]:
        return self._array

    def batches(self, size: int) -> Iterator[NDArray[Any]]:
        for start in range(0, len(self), size):
            yield self._array[start : start + size]


def choose_array(path: Path, names: Sequence[str], keys: Sequence[str], hint: str = "") -> str:
    """Which of the arrays of an .npz to take: the first of `keys` that is there, or the only one, also beside labels.

    Raises:
        InputError: neither is there. hint: what its message ends with.
    """
    if (found := next((key for key in keys if key in names), None)) is not None:
        return found
    without_labels = [name for name in names if name not in LABEL_KEYS]
    for only in (names, without_labels):
        if len(only) == 1:
            return only[0]
    raise InputError(
        f"{path} holds {'the arrays ' + ', '.join(names) if names else 'no arrays'}; expected one of"
        f" {', '.join(keys)}, or a single array{hint}"
    )


def open_inputs(paths: Sequence[str], spec: InputSpec, pad: bool = False) -> PictureSource | ArraySource:
    """What `paths` name: pictures and folders of pictures in any number, or one .npy or .npz file.

    pad: images of free size will be padded, so that any size is right.

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
        source = ArraySource(arrays[0], EXAMPLE_KEYS)
        check_layout(source.outline(), spec._replace(multiple_of=1) if pad else spec, str(arrays[0]))
        return source
    if not spec.is_image:
        raise InputError(f"{found[0]} is no array file; this bundle takes vectors, from .npy or .npz")
    return PictureSource([picture for path in found for picture in _pictures(path)], spec)


def read_one(path: str, spec: InputSpec, pad: bool = False) -> NDArray[Any]:
    """A single example with its batch axis, from a picture, or from an array file as `FILE.npy#INDEX`. pad: as in
    `open_inputs`."""
    name, _, index = path.rpartition("#")
    if not name or Path(path).exists() or Path(index).name != index:  # the # is one of a file or folder
        name, index = path, ""
    source = open_inputs([name], spec, pad)
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
    if not all(type(side) is int for side in shape):  # numpy lets True be 1
        raise ValueError(f"it has shape {shape}; expected whole numbers")
    return tuple(shape), bool(fortran and len(shape) > 1), dtype
