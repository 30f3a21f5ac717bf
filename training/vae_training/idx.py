"""MNIST's file format: IDX, gzipped or not, as http://yann.lecun.com/exdb/mnist describes it."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from vae_runtime.errors import InputError
from vae_runtime.manifest import MAX_ELEMENTS
from vae_runtime.preprocess import UInt8

PARTS = ("train", "t10k")
_UNSIGNED_BYTE = 0x08


def find_images(folder: Path) -> list[Path]:
    """The image files of `folder`, "train" before "t10k"; a plain file goes before a gzipped one of the same name."""
    found = (_find(folder, part, "images", 3) for part in PARTS)
    return [path for path in found if path is not None]


def read_folder(folder: Path) -> tuple[UInt8, UInt8 | None, int | None]:
    """All images of a folder in file order, "train" before "t10k" -> uint8 (N, H, W), their labels, uint8 (N,), and
    the index of the first of "t10k", None where only one of the two is there.

    The labels are None unless there are some for every file of images. Where there are any their number must match,
    else the files do not belong together.

    Raises:
        InputError: a damaged file, images of two sizes, labels of another number.
    """
    arrays: list[UInt8] = []
    labels: list[UInt8] = []
    for path in find_images(folder):
        images = read_idx(path, 3)
        part = path.name.split("-")[0]
        if (labelled := _find(folder, part, "labels", 1)) is not None:
            labels.append(read_idx(labelled, 1))
            if len(labels[-1]) != len(images):
                raise InputError(f"{labelled} has {len(labels[-1])} labels, but {path.name} has {len(images)} images")
        if arrays and arrays[0].shape[1:] != images.shape[1:]:
            raise InputError(
                f"{path} has images of {_size(images)} pixels, but those before it have {_size(arrays[0])}"
            )
        arrays.append(images)
    all_labels = np.concatenate(labels) if len(labels) == len(arrays) else None
    return np.concatenate(arrays), all_labels, len(arrays[0]) if len(arrays) == len(PARTS) else None


def read_idx(path: Path, rank: int) -> UInt8:
    """One IDX file of unsigned bytes with `rank` dimensions.

    Raises:
        InputError: another magic number, or a length that differs from what the header says.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            header = stream.read(4 + 4 * rank)
            if len(header) < 4 + 4 * rank or header[:4] != bytes((0, 0, _UNSIGNED_BYTE, rank)):
                raise InputError(
                    f"{path} begins with {header[:4].hex()}; IDX files of {rank} dimensions begin with 000008{rank:02x}"
                )
            shape = struct.unpack(f">{rank}I", header[4:])
            expected = math.prod(shape)
            if not 0 < expected <= MAX_ELEMENTS * 4:
                raise InputError(
                    f"{path} says that it has shape {shape}; expected at least one element, and no more than fit"
                )
            data = stream.read(expected + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if len(data) != expected:
        found = "more" if len(data) > expected else f"{len(data)}"
        raise InputError(f"{path} has {found} bytes of data; its header says {expected}, shape {shape}")
    return np.frombuffer(data, np.uint8).reshape(shape)


def _find(folder: Path, part: str, what: str, rank: int) -> Path | None:
    names = (f"{part}-{what}{separator}idx{rank}-ubyte{gz}" for gz in ("", ".gz") for separator in ("-", "."))
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _size(images: UInt8) -> str:
    return f"{images.shape[2]}×{images.shape[1]}"
