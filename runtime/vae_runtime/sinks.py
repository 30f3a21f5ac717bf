"""Where the command lines put results: a grid as one picture, arrays as .npy or .npz, or a folder with
a picture per example."""

from __future__ import annotations

import contextlib
import math
import os
import re
import shutil
import tempfile
import unicodedata
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import IO, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .arguments import is_encodable
from .atomic import atomic_file, atomic_folder, refuse_other_file, shortened, writing
from .errors import InputError, OutputError
from .images import WRITTEN_SUFFIXES, check_side, grid, grid_size, require_pillow, write_picture
from .manifest import RECONSTRUCTION, InputSpec
from .preprocess import Float32, to_uint8
from .sources import ARRAY_SUFFIXES

GRID_LIMIT = 256  # images in one grid; more is no longer a picture to look at
ALONE_SIDE = 64  # a single image of this size or larger is written as it is, without a frame; of free sizes always
_COPIED = 2**20  # bytes at a time
_ROW = re.compile(r"(.+\.(npy|npz|safetensors)|golden)?#\d*", re.IGNORECASE | re.DOTALL)
# Windows' rules: characters, a device's name also before a dot, and an end that it would cut off.
_NO_NAME = re.compile(
    r'.*[<>:"/\\|?*\0-\x1f]|(con|prn|aux|nul|(com|lpt)[1-9]) *(\.|$)|.*[. ]$', re.IGNORECASE | re.DOTALL
)


class Sink(Protocol):
    """Takes results batch by batch. `originals` are the inputs that a reconstruction belongs to, if any."""

    written: int

    @property
    def room(self) -> int | None:
        """How many more examples it shows; None: all that there are."""

    def add(self, images: Float32, names: list[str], originals: Float32 | None = None) -> None: ...


@contextlib.contextmanager
def open_sink(
    output: str,
    spec: InputSpec,
    count: int,
    force: bool,
    columns: int | None = None,
    *,
    shape: tuple[int, ...] | None = None,
    form: str | None = None,
    limit: int = GRID_LIMIT,
) -> Iterator[Sink]:
    """The sink that the suffix of `output` stands for; what it writes appears when the block ends well, or not at all.

    shape: of one example, where `spec` leaves that free and all go into one array. form: of the pictures in a folder,
    "png" (None), "jpeg" or "webp". limit: images in one picture.

    Raises:
        InputError: a suffix that is not understood, or pictures of something that is no grey or RGB image.
        OutputError: `output` exists and `force` is off, or it is a folder, which is never replaced.
        MissingExtraError: pictures are to be written, and Pillow is not installed.
    """
    if not output:
        raise InputError("output is empty; expected the name of a file or folder")
    if output == "-":
        raise InputError(
            "output is '-'; expected the name of a file or folder, as results do not go to standard output"
        )
    path = Path(output)
    suffix = path.suffix.lower()
    if suffix and form is not None:
        raise InputError(f"--format is {form!r} with the output {output}; it is for the pictures in a folder")
    refuse_other_file(path, force)
    if suffix in ARRAY_SUFFIXES:
        shape = shape or spec.example_shape
        with ArrayWriter(path, {RECONSTRUCTION: (count, *shape)}, replace=force) as writer:
            yield _ArraySink(writer, shape)
        return
    if spec.colour is None:
        raise InputError(
            f"{output} cannot be written: only grey and RGB images become pictures; name an .npy or .npz file"
        )
    if suffix and suffix not in WRITTEN_SUFFIXES:
        raise InputError(
            f"{output} has the suffix {suffix!r}; expected {', '.join(WRITTEN_SUFFIXES)}, .npy, .npz, or none for a"
            " folder of pictures"
        )
    require_pillow(f"writing {output}")  # before anything is computed
    if suffix:
        sink = _GridSink(path, columns, min(count, limit), 1 if spec.is_free else ALONE_SIDE, force)
        yield sink
        sink.finish()
    else:
        with atomic_folder(path) as folder:
            yield _FolderSink(folder, form or "png")


def different_sizes(name: str, found: tuple[int, ...], first: tuple[int, ...]) -> InputError:
    return InputError(
        f"{name} gives a result of shape {found}, and the first one {first}; results of different sizes go into a"
        " folder (an output without a suffix)"
    )


class ArrayWriter:
    """Arrays of known shape, written batch by batch into one .npy or .npz file; atomic, in bounded memory.

    A context manager. arrays: the full shape by name; .npy takes exactly one. dtypes: by name, where not float32.
    extra: small arrays stored as they are, which may be set until the block ends. replace: as for `atomic_file`.
    """

    def __init__(
        self,
        path: Path,
        arrays: Mapping[str, tuple[int, ...]],
        dtypes: Mapping[str, type] | None = None,
        *,
        replace: bool = True,
    ) -> None:
        if path.suffix.lower() == ".npy" and len(arrays) != 1:
            raise InputError(f"{path} holds one array; {', '.join(arrays)} are written to an .npz file")
        self._path, self._arrays, self._replace = path, arrays, replace
        self._dtypes = {name: np.dtype((dtypes or {}).get(name, np.float32)) for name in arrays}
        self.extra: Mapping[str, NDArray[Any]] = {}

    def __enter__(self) -> ArrayWriter:
        # On the output's own file system, which is the one that has room for it.
        self._require_space()
        with writing(self._path):
            prefix = f".{shortened(self._path.name)}."
            self._folder = Path(tempfile.mkdtemp(prefix=prefix, dir=_existing_parent(self._path)))
            try:
                # Unbuffered: what does not fit on the disk fails at once, and nothing is left for closing to fail on.
                self._parts = {name: (self._folder / name).open("wb", buffering=0) for name in self._arrays}
            except BaseException:
                shutil.rmtree(self._folder, ignore_errors=True)
                raise
        return self

    def append(self, **batches: NDArray[Any]) -> None:
        with writing(self._path):
            for name, batch in batches.items():
                data = memoryview(np.ascontiguousarray(batch, self._dtypes[name]).tobytes())
                while data:
                    data = data[self._parts[name].write(data) :]

    def __exit__(self, kind: object, *_: object) -> None:
        for part in self._parts.values():
            part.close()
        try:
            if kind is None:
                with writing(self._path):
                    self._assemble()
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _require_space(self) -> None:
        """Refuse at once what would fill the disk. The parts and the whole exist side by side at the end."""
        needed = 2 * sum(math.prod(shape) * self._dtypes[name].itemsize for name, shape in self._arrays.items())
        free = shutil.disk_usage(_existing_parent(self._path)).free
        if needed > free:
            raise OutputError(f"{self._path} cannot be written: it takes {needed:,} bytes, of {free:,} free")

    def _assemble(self) -> None:
        """What `np.save` and `np.savez` would write of the parts, without a map of them: it would last as long as an
        error's traceback, and Windows removes no file that is mapped."""
        with atomic_file(self._path, replace=self._replace) as stream:
            if self._path.suffix.lower() == ".npy":
                self._copy(next(iter(self._arrays)), stream)
                return
            with zipfile.ZipFile(stream, "w") as archive:
                for name in self._arrays:
                    with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                        self._copy(name, entry)
                for name, array in self.extra.items():
                    with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                        np.lib.format.write_array(entry, np.asanyarray(array))

    def _copy(self, name: str, stream: IO[bytes]) -> None:
        shape, dtype = self._arrays[name], self._dtypes[name]
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(stream, header)
        with (self._folder / name).open("rb") as part:
            assert os.fstat(part.fileno()).st_size == math.prod(shape) * dtype.itemsize, "other arrays than announced"
            shutil.copyfileobj(part, stream, _COPIED)


class _ArraySink:
    room = None

    def __init__(self, writer: ArrayWriter, shape: tuple[int, ...]) -> None:
        self._writer, self._shape = writer, shape
        self.written = 0

    def add(self, images: Float32, names: list[str], originals: Float32 | None = None) -> None:
        if images.shape[1:] != self._shape:
            raise different_sizes(names[0], images.shape[1:], self._shape)
        self._writer.append(**{RECONSTRUCTION: images})
        self.written += len(images)


class _GridSink:
    """Up to `limit` images; with originals, rows of originals stand above rows of their reconstructions."""

    def __init__(self, path: Path, columns: int | None, limit: int, alone_side: int, replace: bool) -> None:
        self._path, self._columns, self._limit, self._alone_side = path, columns, limit, alone_side
        self._replace = replace
        self._images: list[NDArray[np.uint8]] = []
        self._originals: list[NDArray[np.uint8]] = []
        self.written = 0

    def add(self, images: Float32, names: list[str], originals: Float32 | None = None) -> None:
        room = self.room
        if not self._images:  # before more is computed
            check_side(self._path, self._size(images.shape, originals is not None))
        elif self._images[0].shape[1:3] != images.shape[2:]:
            raise different_sizes(names[0], images.shape[2:], self._images[0].shape[1:3])
        if room > 0:
            self._images.append(to_uint8(images[:room]))
            if originals is not None:
                self._originals.append(to_uint8(originals[:room]))
            self.written += len(images[:room])

    @property
    def room(self) -> int:
        return self._limit - self.written

    def _size(self, shape: tuple[int, ...], is_paired: bool) -> Sequence[int]:
        """(height, width) of the picture, of batches of this shape."""
        count, sides = self._limit, shape[2:]
        if is_paired:
            columns = min(count, self._columns or 16)
            return grid_size((2 * columns * math.ceil(count / columns), *sides), columns)
        return sides if self._is_alone(count, sides) else grid_size((count, *sides), self._columns)

    def _is_alone(self, count: int, sides: tuple[int, ...]) -> bool:
        return count == 1 and min(sides) >= self._alone_side

    def finish(self) -> None:
        images = np.concatenate(self._images)
        if not self._originals:
            alone = self._is_alone(len(images), images.shape[1:3])
            picture = images[0] if alone else grid(images, self._columns)
        else:
            columns = min(len(images), self._columns or 16)
            picture = grid(pair_rows(np.concatenate(self._originals), images, columns), columns)
        write_picture(self._path, picture, replace=self._replace)


class _FolderSink:
    room = None

    def __init__(self, folder: Path, form: str) -> None:
        self._folder, self._form = folder, form
        self._taken: set[str] = set()
        self.written = 0

    def add(self, images: Float32, names: list[str], originals: Float32 | None = None) -> None:
        for name, image in zip(names, to_uint8(images), strict=True):
            file = f"{unused_name(name, self._taken)}.{self._form}"
            check_side(file, image.shape)  # else of a name that is there for a time alone
            write_picture(self._folder / file, image)
            self.written += 1


def unused_name(name: str, taken: set[str]) -> str:
    """A file name without suffix for what is called `name`: `photos/a.png` -> `a`; by their number are called rows of
    arrays (`x.npy#3`, `golden#3`, `#`) and what has a name that no file can have, on Windows or here: results made on
    one system are copied to another."""
    stem = "" if _ROW.fullmatch(name) else PurePath(name).stem
    if stem in ("", ".", "..") or _NO_NAME.match(stem) or not is_encodable(stem):
        stem = f"{len(taken):06d}"
    wanted = stem
    number = 1
    while _compared(wanted) in taken:
        number += 1
        wanted = f"{stem}-{number}"
    taken.add(_compared(wanted))
    return wanted


def _compared(name: str) -> str:
    """One for all names that some file system takes for the same: in either case, composed or not."""
    return unicodedata.normalize("NFC", name.casefold())


def pair_rows(originals: NDArray[np.uint8], images: NDArray[np.uint8], columns: int) -> NDArray[np.uint8]:
    """Interleave uint8 images so that a grid of `columns` has each row of originals above their reconstructions."""
    rows: list[NDArray[np.uint8]] = []
    for start in range(0, len(images), columns):
        for part in (originals[start : start + columns], images[start : start + columns]):
            blank = np.full((columns - len(part), *part.shape[1:]), 255, np.uint8)
            rows += [part, blank]
    return np.concatenate(rows)


def _existing_parent(path: Path) -> Path:
    if not path.parent.is_dir():
        raise InputError(f"{path} cannot be written: there is no folder {path.parent}")
    return path.parent
