"""Photographs of any sizes as a source of crops, with parts that share no pixel.

Pictures stay in memory as they are, uint8. Many pictures are divided into parts as such; few are cut into a strip for
each part, so that even two photographs give figures on pixels that were never trained on. Validation and test crops lie
on a fixed grid without overlap; training crops are drawn anywhere in their part (see crops.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vae_runtime.errors import InputError
from vae_runtime.images import picture_size, read_picture
from vae_runtime.manifest import COLOURS, InputSpec
from vae_runtime.preprocess import UInt8

from .data import Dataset, find_pictures
from .split import ORDER, PARTS, Parts, parse_split, split_indices

MANY = 10  # from so many pictures on fractions divide the pictures, below they divide each picture
DEFAULT_CROP = 64
MAX_BYTES = 4 * 2**30  # of all pictures together in memory
MAX_GRID, MAX_GRID_BYTES = 2048, 2**27  # crops of one part


class Region(NamedTuple):
    """A rectangle of one picture, in pixels."""

    picture: int
    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class Photographs:
    """Pictures uint8 (H, W) or (H, W, 3), the regions of each part, and one crop's `spec`.

    split_by: "pictures" or "regions" of each picture.
    """

    name: str
    pictures: tuple[UInt8, ...]
    regions: Mapping[str, tuple[Region, ...]]
    spec: InputSpec
    split_by: str

    @property
    def epoch_crops(self) -> int:
        """How many training crops make an epoch: as many as lie side by side in the training part."""
        return sum(len(grid_of(region, self.spec)) for region in self.regions["train"])

    def cut(self, places: list[Region]) -> UInt8:
        """Rectangles of one size -> uint8 (n, height, width[, 3])."""
        return np.stack(
            [
                self.pictures[place.picture][
                    place.top : place.top + place.height, place.left : place.left + place.width
                ]
                for place in places
            ]
        )

    def grid(self, part: str) -> list[Region]:
        """The places of a part's crops side by side; of more than 2,048, or 128 MiB, as many evenly spread."""
        places = [place for region in self.regions[part] for place in grid_of(region, self.spec)]
        most = min(len(places), MAX_GRID, max(2, MAX_GRID_BYTES // math.prod(self.spec.example_shape)))
        kept = np.linspace(0, len(places) - 1, most).round().astype(int)
        return [places[index] for index in kept]

    def to_dataset(self) -> tuple[Dataset, Parts]:
        """The grids of all parts as examples, with the indices of each part."""
        grids = [self.grid(part) for part in PARTS]
        ends = np.cumsum([0, *(len(grid) for grid in grids)])
        train, validation, test = (np.arange(*pair, dtype=np.int64) for pair in pairwise(ends))
        facts = {"crop": list(self.spec.example_shape[1:]), "pictures": len(self.pictures), "split_by": self.split_by}
        if self.split_by == "regions":
            facts["order"] = "strips"
        examples = self.cut([place for grid in grids for place in grid])
        return Dataset(self.name, examples, self.spec, facts), Parts(train, validation, test)


def load_photographs(
    folder: Path, crop: tuple[int, int] | None, colour: str, resize: str, split: str, order: str | None, seed: int,
    f: int = 1,
) -> Photographs:  # fmt: skip
    """Read a folder of pictures of any sizes and divide it into parts.

    crop: (H, W); None takes 64×64, or the largest square that every picture and part has room for.
    split, order, seed: see `split.split_indices`. Counts divide the pictures, and so do fractions from 10 pictures on;
        of fewer, each is cut along its longer side into strips of these fractions, at least one crop wide, in the order
        train, validation, test, whatever the seed, and no other order may be given. None: "seeded", where there is one.
    f: a crop's height and width are multiples of it.

    Raises:
        InputError: no pictures, one that is smaller than a crop, too small for its strips, or no picture that is read
            here, a crop that is no multiple, a bad split, an order of strips, or pictures that need more than 4 GiB.
        MissingExtraError: Pillow is not installed.
    """
    paths = find_pictures(folder)
    sizes = [picture_size(path) for path in paths]
    _check_memory(folder, sizes, COLOURS[colour])
    parsed = parse_split(split)
    by_pictures = len(paths) >= MANY or isinstance(parsed[0], int)
    if order is not None and not by_pictures:
        raise InputError(
            f"order is {order!r}, but {folder} has {len(paths)} pictures, each of which is cut into strips, train, "
            f"validation and test in this order; only {MANY} or more, or counts in split, have an order"
        )
    crop = crop or _default_crop(sizes, f, 1 if by_pictures else len(PARTS))
    for side in crop:
        if side % f:
            raise InputError(f"crop is {_by(crop)}; this model takes heights and widths that are multiples of {f}")
    for path, size in zip(paths, sizes, strict=True):
        if size[0] < crop[0] or size[1] < crop[1]:
            raise InputError(f"{path} has {_by(size)} pixels, smaller than a crop of {_by(crop)} (height x width)")
    if by_pictures:
        parts = split_indices(len(paths), split, order or ORDER, seed)
        whole = [Region(index, 0, 0, *size) for index, size in enumerate(sizes)]
        regions = {part: tuple(whole[index] for index in getattr(parts, part)) for part in PARTS}
    else:
        cut = [_strips(index, path, sizes[index], crop, parsed) for index, path in enumerate(paths)]
        regions = dict(zip(PARTS, zip(*cut, strict=True), strict=True))
    pictures = []
    for path, size in zip(paths, sizes, strict=True):
        pictures.append(read_picture(path, InputSpec("image", (COLOURS[colour], *size), colour, "exact")))
    spec = InputSpec("image", (COLOURS[colour], *crop), colour, resize)
    split_by = "pictures" if by_pictures else "regions"
    return Photographs(folder.resolve().name, tuple(pictures), regions, spec, split_by)


def grid_of(region: Region, spec: InputSpec) -> list[Region]:
    """Crops side by side from the region's top left."""
    height, width = spec.example_shape[1:]
    return [
        Region(region.picture, region.top + row * height, region.left + column * width, height, width)
        for row in range(region.height // height)
        for column in range(region.width // width)
    ]


def _strips(
    index: int, path: Path, size: tuple[int, int], crop: tuple[int, int], fractions: list[int] | list[float]
) -> list[Region]:
    """One picture's regions, train, validation and test, along its longer side."""
    along = 0 if size[0] > size[1] else 1
    length, least = size[along], crop[along]
    validation, test = (max(least, round(length * fraction)) for fraction in fractions[1:])
    lengths = [length - validation - test, validation, test]
    if lengths[0] < least:
        raise InputError(
            f"{path} has {_by(size)} pixels (height x width); its train, validation and test regions with crops of"
            f" {_by(crop)} need {validation + test + least} along its longer side; take smaller crops, or {MANY}"
            " pictures or more"
        )
    starts = [0, lengths[0], lengths[0] + validation]
    if along == 0:
        return [Region(index, start, 0, part, size[1]) for start, part in zip(starts, lengths, strict=True)]
    return [Region(index, 0, start, size[0], part) for start, part in zip(starts, lengths, strict=True)]


def _default_crop(sizes: list[tuple[int, int]], f: int, strips: int) -> tuple[int, int]:
    room = min(min(min(size), max(size) // strips) for size in sizes)
    side = max(1, min(DEFAULT_CROP, room) // f) * f
    return side, side


def _check_memory(folder: Path, sizes: list[tuple[int, int]], channels: int) -> None:
    needed = sum(height * width for height, width in sizes) * channels
    if needed > MAX_BYTES:
        raise InputError(
            f"{folder} has {len(sizes)} pictures that need {needed / 2**30:.1f} GiB of memory; at most "
            f"{MAX_BYTES / 2**30:g} GiB are read: take fewer or smaller pictures"
        )


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
