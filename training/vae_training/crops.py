"""Batches of random crops: every place and every flip is a function of (seed, purpose, step), like all in feed.py."""

from __future__ import annotations

import numpy as np

from vae_runtime.preprocess import Float32, binarize, to_model_input

from .config import steps_per_epoch
from .feed import BINARIZE, CROP, FLIP
from .photographs import Photographs, Region


class CropFeed:
    """Crops of the training part, drawn with replacement, each place of a crop as likely as every other.

    flip: half of them are mirrored left to right. An epoch has as many crops as lie side by side in the training part;
    every batch has `batch_size` of them. rank, processes: see `Feed`.
    """

    def __init__(
        self, photographs: Photographs, batch_size: int, seed: int, mode: str = "none", flip: bool = True,
        rank: int = 0, processes: int = 1,
    ) -> None:  # fmt: skip
        self.photographs, self.batch_size, self.seed, self.mode, self.flip = photographs, batch_size, seed, mode, flip
        self.rank, self.processes = rank, processes
        self.steps_per_epoch = steps_per_epoch(photographs.epoch_crops, batch_size)
        self._regions = photographs.regions["train"]
        height, width = photographs.spec.example_shape[1:]
        self._columns = [region.width - width + 1 for region in self._regions]
        counts = [(region.height - height + 1) * n for region, n in zip(self._regions, self._columns, strict=True)]
        self._ends = np.cumsum(counts)

    def batch(self, step: int) -> Float32:
        """The crops of `step`, counted from 0 over all epochs -> float32 (n, *spec.example_shape)."""
        share = self.batch_size // self.processes
        mine = slice(self.rank * share, (self.rank + 1) * share)
        crops = self.photographs.cut(self.places(step)[mine])
        if self.flip:
            mirrored = self.mirrored(step)[mine]
            crops[mirrored] = crops[mirrored, :, ::-1]
        x = to_model_input(crops, self.photographs.spec, self.photographs.name)
        rng = np.random.default_rng((self.seed, BINARIZE, step, self.rank)) if self.mode == "dynamic" else None
        return binarize(x, self.mode, rng)

    def places(self, step: int) -> list[Region]:
        """Where the crops of `step` lie, for all processes together."""
        drawn = np.random.default_rng((self.seed, CROP, step)).integers(self._ends[-1], size=self.batch_size)
        return [self._place(int(number)) for number in drawn]

    def mirrored(self, step: int) -> np.ndarray:
        """Which crops of `step` are mirrored: bool (batch_size,)."""
        return np.random.default_rng((self.seed, FLIP, step)).random(self.batch_size) < 0.5

    def _place(self, number: int) -> Region:
        index = int(np.searchsorted(self._ends, number, side="right"))
        region = self._regions[index]
        row, column = divmod(number - int(self._ends[index - 1] if index else 0), self._columns[index])
        return Region(region.picture, region.top + row, region.left + column, *self.photographs.spec.example_shape[1:])
