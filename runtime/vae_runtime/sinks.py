"""Where the command lines put results: a grid as .png, arrays as .npy or .npz, or a folder with a PNG per example."""

from __future__ import annotations

import contextlib
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .atomic import atomic_file, atomic_folder, refuse_existing
from .errors import InputError, OutputError
from .images import grid, write_png
from .manifest import RECONSTRUCTION, InputSpec
from .preprocess import Float32, to_uint8

GRID_LIMIT = 256  # images in one grid; more is no longer a picture to look at


class Sink(Protocol):
    """Takes results batch by batch. `originals` are the inputs that a reconstruction belongs to, if any."""

    written: int

    def add(self, images: Float32, names: list[str], originals: Float32 | None = None) -> None: ...


@contextlib.contextmanager
def open_sink(output: str, spec: InputSpec, count: int, force: bool, columns: int | None = None) -> Iterator[Sink]:
    """The sink that the suffix of `output` stands for; what it writes appears when the block ends well, or not at all.

    Raises:
        InputError: a suffix that is not understood, or pictures of something that is no grey or RGB image.
        OutputError: `output` exists and `force` is off, or it is a folder, which is never replaced.
    """
    if not output:
        raise InputError("output is empty; expected the name of a file or folder")
    path = Path(output)
    suffix = path.suffix.lower()
    refuse_existing(path, lambda old: force and old.is_file())
    if suffix in (".npy", ".npz"):
        with ArrayWriter(path, {RECONSTRUCTION: (count, *spec.example_shape)}) as writer:
            yield _ArraySink(writer)
        return
    if spec.colour is None:
        raise InputError(
            f"{output} cannot be written: only grey and RGB images become pictures; name an .npy or .npz file"
        )
    if suffix == ".png":
        sink = _GridSink(path, columns)
        yield sink
        sink.finish()
    elif suffix:
        raise InputError(f"{output} has the suffix {suffix!r}; expected .png, .npy, .npz, or none for a folder of PNGs")
    else:
        with atomic_folder(path) as folder:
            yield _FolderSink(folder)


class ArrayWriter:
    """Arrays of known shape, float32, written batch by batch into one .npy or .npz file; atomic, in bounded memory.

    A context manager. arrays: the full shape by name; .npy takes exactly one. extra: small arrays stored as they are.
    """

    def __init__(
        self, path: Path, arrays: Mapping[str, tuple[int, ...]], extra: Mapping[str, NDArray[Any]] | None = None
    ) -> None:
        if path.suffix.lower() == ".npy" and len(arrays) != 1:
            raise InputError(f"{path} holds one array; {', '.join(arrays)} are written to an .npz file")
        self._path, self._arrays, self._extra = path, arrays, extra or {}

    def __enter__(self) -> ArrayWriter:
        # On the output's own file system, which is the one that has room for it.
        self._require_space()
        with _writing(self._path):
            self._folder = Path(tempfile.mkdtemp(prefix=f".{self._path.name}.", dir=_existing_parent(self._path)))
            # Unbuffered: what does not fit on the disk fails at once, and nothing is left for closing to fail on.
            self._parts = {name: (self._folder / name).open("wb", buffering=0) for name in self._arrays}
        return self

    def append(self, **batches: Float32) -> None:
        with _writing(self._path):
            for name, batch in batches.items():
                data = memoryview(np.ascontiguousarray(batch, np.float32).tobytes())
                while data:
                    data = data[self._parts[name].write(data) :]

    def __exit__(self, kind: object, *_: object) -> None:
        for part in self._parts.values():
            part.close()
        try:
            if kind is None:
                with _writing(self._path):
                    self._assemble()
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _require_space(self) -> None:
        """Refuse at once what would fill the disk. The parts and the whole exist side by side at the end."""
        needed = 2 * 4 * sum(math.prod(shape) for shape in self._arrays.values())
        free = shutil.disk_usage(_existing_parent(self._path)).free
        if needed > free:
            raise OutputError(f"{self._path} cannot be written: it takes {needed:,} bytes, of {free:,} free")

    def _assemble(self) -> None:
        maps = {
            name: np.memmap(self._folder / name, np.float32, "r", shape=shape) for name, shape in self._arrays.items()
        }
        with atomic_file(self._path) as stream:
            if self._path.suffix.lower() == ".npy":
                np.save(stream, next(iter(maps.values())))
            else:
                np.savez(stream, **maps, **self._extra)  # type: ignore[arg-type]  # names are never `allow_pickle`


class _ArraySink:
    def __init__(self, writer: ArrayWriter) -> None:
        self._writer = writer
        self.written = 0

    def add(self, images: Float32, names: list[str], originals: Float32 | None = None) -> None:
        self._writer.append(**{RECONSTRUCTION: images})
        self.written += len(images)


class _GridSink:
    """Up to `GRID_LIMIT` images; with originals, rows of originals stand above rows of their reconstructions."""

    def __init__(self, path: Path, columns: int | None) -> None:
        self._path, self._columns = path, columns
        self._images: list[NDArray[np.uint8]] = []
        self._originals: list[NDArray[np.uint8]] = []
        self.written = 0

    def add(self, images: Float32, names: list[str], originals: Float32 | None = None) -> None:
        room = GRID_LIMIT - self.written
        if room > 0:
            self._images.append(to_uint8(images[:room]))
            if originals is not None:
                self._originals.append(to_uint8(originals[:room]))
            self.written += len(images[:room])

    def finish(self) -> None:
        images = np.concatenate(self._images)
        if not self._originals:
            write_png(self._path, grid(images, self._columns))
            return
        columns = min(len(images), self._columns or 16)
        write_png(self._path, grid(pair_rows(np.concatenate(self._originals), images, columns), columns))


class _FolderSink:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._taken: set[str] = set()
        self.written = 0

    def add(self, images: Float32, names: list[str], originals: Float32 | None = None) -> None:
        for name, image in zip(names, to_uint8(images), strict=True):
            write_png(self._folder / f"{self._unused(name)}.png", image)
            self.written += 1

    def _unused(self, name: str) -> str:
        stem = wanted = PurePath(name).stem if "#" not in name else f"{self.written:06d}"
        number = 1
        while wanted.casefold() in self._taken:
            number += 1
            wanted = f"{stem}-{number}"
        self._taken.add(wanted.casefold())
        return wanted


def pair_rows(originals: NDArray[np.uint8], images: NDArray[np.uint8], columns: int) -> NDArray[np.uint8]:
    """Interleave uint8 images so that a grid of `columns` has each row of originals above their reconstructions."""
    rows: list[NDArray[np.uint8]] = []
    for start in range(0, len(images), columns):
        for part in (originals[start : start + columns], images[start : start + columns]):
            blank = np.full((columns - len(part), *part.shape[1:]), 255, np.uint8)
            rows += [part, blank]
    return np.concatenate(rows)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error


def _existing_parent(path: Path) -> Path:
    if not path.parent.is_dir():
        raise InputError(f"{path} cannot be written: there is no folder {path.parent}")
    return path.parent
