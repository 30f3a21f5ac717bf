"""A bundle on disk, read so that only bytes which match the manifest are ever used."""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from .arguments import check_path
from .clutter import is_clutter
from .errors import BundleError
from .manifest import FORMAT, INPUT, LOGVAR, MANIFEST_FILE, MAX_MANIFEST_BYTES, MEAN, RECONSTRUCTION, Manifest

_BLOCK = 2**18
_GOLDEN_ROWS = 4  # at most
_NPY_HEADER = 2**16  # bytes, at most


class Bundle:
    """A complete bundle: `path`, its folder, absolute and no link; `manifest`; `read`, which checks what it hands out.

    digest: SHA-256 of `manifest.json`, which holds every file's, and so identifies the contents.

    Links are refused: what they point to lies outside the folder and can change without it.
    """

    def __init__(self, path: Path, manifest: Manifest, digest: str) -> None:
        self.path = path
        self.manifest = manifest
        self.digest = digest

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Bundle:
        """Read the manifest and check that the folder holds exactly the files that it lists, in their sizes,
        but for what file managers leave in it.

        Raises:
            BundleError: there is no bundle, or it is incomplete, altered, or of an unknown version. InputError: `path`
            is no path.
        """
        path = check_path(path, "path")
        _require_folder(path)
        folder = path.resolve()  # once: what switches a link to another version leaves this one whole
        text = _read_regular(folder / MANIFEST_FILE, MAX_MANIFEST_BYTES)
        try:
            manifest = Manifest.from_json(text)
        except BundleError as error:
            raise BundleError(f"{path}: {error}") from None
        bundle = cls(folder, manifest, hashlib.sha256(text).hexdigest())
        bundle._check_layout()
        return bundle

    def read(self, file: str) -> bytes:
        """The bytes of one listed file, read once and checked against the manifest's size and SHA-256."""
        data = _read_regular(self.path / file, self.manifest.files[file].bytes)
        self._check(file, len(data), hashlib.sha256(data))
        return data

    def verify(self, file: str) -> None:
        """`read` for its checks alone, in the memory of one block."""
        size, digest = 0, hashlib.sha256()
        with _open_regular(self.path / file) as stream:
            while block := stream.read(_BLOCK):
                size += len(block)
                digest.update(block)
        self._check(file, size, digest)

    def _check(self, file: str, size: int, digest: hashlib._Hash) -> None:
        entry = self.manifest.files[file]
        if size != entry.bytes:
            raise BundleError(f"{self.path / file} has {size} bytes; the manifest says {entry.bytes}")
        found = digest.hexdigest()
        if found != entry.sha256:
            raise BundleError(
                f"{self.path / file} was altered: its SHA-256 is {found[:12]}…, the manifest says {entry.sha256[:12]}…"
            )

    def golden(self) -> dict[str, NDArray[np.float32]]:
        """The golden inputs and the reference's outputs for them, by tensor name, float32, checked for shape.

        `logvar` is absent for an autoencoder.
        """
        file = self.manifest.golden.file
        shape = self.manifest.input.example_shape
        latent_shape = self.manifest.latent_shape(shape)
        expected = {INPUT: shape, MEAN: latent_shape, RECONSTRUCTION: shape}
        if self.manifest.kind == "vae":
            expected[LOGVAR] = latent_shape
        most = {name: 4 * _GOLDEN_ROWS * math.prod(sides) for name, sides in expected.items()}
        arrays = read_npz(self.read(file), str(self.path / file), most)
        if set(arrays) != set(expected):
            raise BundleError(f"{self.path / file} holds {sorted(arrays)}; expected {sorted(expected)}")
        count = len(arrays[INPUT]) if arrays[INPUT].ndim else 0
        for name, array in arrays.items():
            if array.dtype != np.float32 or array.shape != (count, *expected[name]) or not 0 < count <= _GOLDEN_ROWS:
                rule = f"expected float32 (N, {', '.join(map(str, expected[name]))}), with 1 to {_GOLDEN_ROWS} inputs"
                raise BundleError(
                    f"{self.path / file} has {name} of dtype {array.dtype} and shape {array.shape}; {rule}"
                )
            if not np.isfinite(array).all():
                raise BundleError(f"{self.path / file} has NaN or infinite values in {name}")
        return arrays

    def _check_layout(self) -> None:
        try:
            found = {entry.name for entry in self.path.iterdir()} - {MANIFEST_FILE}
        except OSError as error:
            raise BundleError(f"{self.path} cannot be read: {error.strerror}") from None
        for file in sorted(name for name in found - set(self.manifest.files) if not is_clutter(name)):
            raise BundleError(
                f"{self.path / file} is not listed in the manifest; a bundle holds its own files and nothing else"
            )
        for file, entry in sorted(self.manifest.files.items()):
            size = _regular_stat(self.path / file).st_size
            if size != entry.bytes:
                raise BundleError(f"{self.path / file} has {size} bytes; the manifest says {entry.bytes}")


def read_npz(data: bytes, label: str, most: Mapping[str, int]) -> dict[str, NDArray[Any]]:
    """The plain arrays of an .npz archive. most: their bytes at most, by name; nothing else is unpacked, which might be
    a thousand times as much as the archive. label: the file, for messages."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            for entry in archive.zip.infolist():
                name = entry.filename.removesuffix(".npy")
                if name not in most:
                    raise BundleError(f"{label} holds {sorted(archive.files)}; expected {sorted(most)}")
                if entry.file_size > most[name] + _NPY_HEADER:
                    raise BundleError(f"{label} has {entry.file_size} bytes of {name}; expected {most[name]} at most")
            return {name: archive[name] for name in archive.files}
    except BundleError:
        raise
    except Exception as error:  # a damaged archive raises nearly anything: BadZipFile, zlib.error, TokenError, ...
        raise BundleError(f"{label} is not an .npz archive of plain arrays: {error}") from None


def is_bundle_folder(path: Path) -> bool:
    """Whether `path` is a folder that this software wrote as a bundle, whatever state its files are in."""
    try:
        return not path.is_symlink() and f'"{FORMAT}"'.encode() in _read_regular(
            path / MANIFEST_FILE, MAX_MANIFEST_BYTES
        )
    except BundleError:
        return False


def _require_folder(path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise BundleError(f"{path} cannot be opened as a bundle: {error.strerror}") from None
    if not stat.S_ISDIR(mode):
        hint = "; make one with: vae-export " + str(path) if path.suffix in (".pt", ".pth") else ""
        raise BundleError(f"{path} is a file; a bundle is a folder with a {MANIFEST_FILE}{hint}")
    if not os.path.lexists(path / MANIFEST_FILE):
        raise BundleError(f"{path} has no {MANIFEST_FILE}: it is no bundle, or one that was not written to the end")


def _regular_stat(path: Path) -> os.stat_result:
    try:
        found = path.lstat()
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}") from None
    _require_regular(path, found)
    return found


def _require_regular(path: Path, found: os.stat_result) -> None:
    if stat.S_ISLNK(found.st_mode):
        raise BundleError(f"{path} is a symbolic link; a bundle's files lie in its own folder: copy the file there")
    if not stat.S_ISREG(found.st_mode):
        raise BundleError(f"{path} is not a regular file")
    if found.st_nlink > 1:
        raise BundleError(
            f"{path} is a hard link with {found.st_nlink} names; a bundle's files are its own: copy the folder"
        )


def _read_regular(path: Path, limit: int) -> bytes:
    """At most `limit` + 1 bytes of a regular file."""
    try:
        with _open_regular(path) as stream:
            return stream.read(limit + 1)
    except MemoryError:
        raise BundleError(f"{path} has {limit} bytes or more, which do not fit into memory") from None


@contextlib.contextmanager
def _open_regular(path: Path) -> Iterator[IO[bytes]]:
    """A regular file, through one descriptor that is checked after it is open."""
    _regular_stat(path)
    flags: Any = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        descriptor = os.open(path, flags)
        with os.fdopen(descriptor, "rb") as stream:
            _require_regular(path, os.fstat(descriptor))
            yield stream
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}") from None
