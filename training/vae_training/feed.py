"""Batches. Every random choice is a function of (seed, purpose, step, process), so that a run continues exactly.

Nothing depends on how many numbers were drawn before: a resumed run draws what the uninterrupted one would have drawn.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from vae_runtime.preprocess import Float32, binarize

from .config import steps_per_epoch
from .data import Dataset

# The purposes of random numbers; splitting is purpose 0 (see split.py). The numbers stay: they decide the weights.
ORDER, NOISE, BINARIZE, SHIFT = range(1, 5)
EVALUATE, RECALIBRATE, CROP, FLIP, LIKELIHOOD, SAMPLES = range(6, 12)
# What is drawn once in a run, by `standard_rng`: the first weights; which examples recalibrate and which priors are
# fitted to; and the pixels of each set of examples that is made binary.
CALIBRATION_CHOICE, VALIDATION_PIXELS, CALIBRATION_PIXELS, TEST_PIXELS, PRIOR_CHOICE, WEIGHTS, PRIOR_PIXELS = range(7)
CACHE_BYTES = 2**30  # float32 examples up to this size are prepared once, larger ones batch by batch


class Feed:
    """The train part of a data set in shuffled batches of nearly equal size.

    rank, processes: each process takes its share of every batch, all shares of the same size.
    """

    def __init__(
        self, data: Dataset, indices: NDArray[np.int64], batch_size: int, seed: int, mode: str = "none", shift: int = 0,
        rank: int = 0, processes: int = 1,
    ) -> None:  # fmt: skip
        self.data, self.indices, self.seed, self.mode, self.shift = data, indices, seed, mode, shift
        self.rank, self.processes = rank, processes
        self.steps_per_epoch = steps_per_epoch(len(indices), batch_size)
        small = len(indices) * int(np.prod(data.spec.example_shape)) * 4 <= CACHE_BYTES
        self._cache = data.model_input(indices) if small else None
        self._epoch, self._batches = -1, [np.empty(0, np.int64)]

    def batch(self, step: int) -> Float32:
        """The examples of `step`, counted from 0 over all epochs -> float32 (n, *spec.example_shape)."""
        rows = self._rows(step)
        x = self._cache[rows] if self._cache is not None else self.data.model_input(self.indices[rows])
        if self.shift:
            x = shift_images(x, self.shift, self._rng(SHIFT, step))
        return binarize(x, self.mode, self._rng(BINARIZE, step) if self.mode == "dynamic" else None)

    def _rows(self, step: int) -> NDArray[np.int64]:
        epoch, index = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            order = np.random.default_rng((self.seed, ORDER, epoch)).permutation(len(self.indices))
            self._epoch, self._batches = epoch, np.array_split(order, self.steps_per_epoch)
        batch = self._batches[index]
        share = len(batch) // self.processes
        return batch[self.rank * share : (self.rank + 1) * share] if self.processes > 1 else batch

    def _rng(self, purpose: int, step: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, purpose, step, self.rank))


def shift_images(x: Float32, limit: int, rng: np.random.Generator) -> Float32:
    """Move each image of (N, C, H, W) by up to `limit` pixels down or up and right or left; zeros move in."""
    height, width = x.shape[2:]
    padded = np.pad(x, ((0, 0), (0, 0), (limit, limit), (limit, limit)))
    moved = np.empty_like(x)
    for index, (top, left) in enumerate(rng.integers(0, 2 * limit + 1, (len(x), 2))):
        moved[index] = padded[index, :, top : top + height, left : left + width]
    return moved


def standard_rng(seed: int, draw: int) -> np.random.Generator:
    """A numpy generator for `draw`, which belongs to no step."""
    return np.random.default_rng((seed, BINARIZE, 2**40 + draw))


def standard_normal(
    shape: tuple[int, ...], seed: int, purpose: int, step: int, rank: int, device: torch.device
) -> torch.Tensor:
    """Standard normal noise that depends on nothing but the arguments."""
    state = np.random.SeedSequence((seed, purpose, step, rank)).generate_state(1, np.uint64)[0]
    generator = torch.Generator(device).manual_seed(int(state >> np.uint64(1)))
    return torch.randn(shape, generator=generator, device=device)
