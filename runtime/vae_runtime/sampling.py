"""Random draws that are the same on every machine, in every order of chunks: numpy's Philox, one stream per seed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arguments import as_float
from .errors import InputError
from .preprocess import Float32, fitting_memory

_LARGEST = float(np.finfo(np.float32).max)
LEAST_TRUNCATION = 0.1  # below, nearly every number is drawn again and again
_LEFT_OVER = 1e-18  # the chance that a number is still outside after all rounds
# What the further streams of a seed are for, by the first word of their `spawn_key`. These numbers may never change.
_REDRAWN, _UNIFORM = 1, 2


class NormalStream:
    """Standard normal draws, float32, filled example by example.

    The stream depends on the seed alone: ten draws are the first ten of twenty, and chunks join without a seam
    (Philox: Salmon et al., 2011; as `numpy.random.Generator(Philox(seed)).standard_normal(dtype=float32)`).
    """

    def __init__(self, seed: int | np.random.SeedSequence | None) -> None:
        self._generator = _generator(seed)

    def draw(self, count: int, shape: tuple[int, ...]) -> Float32:
        """The next `count` examples of `shape` -> float32 (count, *shape). Raises `InputError` where there is no memory
        for so many."""
        with fitting_memory("a batch of latents", (count, *shape)):
            return self._generator.standard_normal((count, *shape), dtype=np.float32)


class TruncatedStream:
    """`NormalStream` with every number beyond ±`truncation` drawn again until it is within (the truncation trick: Brock
    et al., 2019, arXiv:1809.11096); those within are the same.

    Like it, independent of chunks: a fixed number of rounds, each for all numbers and with a stream of its own. The
    chance that a number is outside in all of them is below 1e-18; it would be set to the limit.
    """

    def __init__(self, sequence: np.random.SeedSequence, truncation: float) -> None:
        outside = max(math.erfc(truncation / math.sqrt(2)), 1e-300)
        rounds = math.ceil(math.log(_LEFT_OVER) / math.log(outside))
        self._first = NormalStream(sequence)
        self._others = [NormalStream(_further(sequence, _REDRAWN, index)) for index in range(1, rounds)]
        self._limit = np.float32(truncation)

    def draw(self, count: int, shape: tuple[int, ...]) -> Float32:
        """As `NormalStream.draw`, within the limit."""
        noise = self._first.draw(count, shape)
        for stream in self._others:
            np.copyto(noise, stream.draw(count, shape), where=np.abs(noise) > self._limit)
        return np.clip(noise, -self._limit, self._limit, out=noise)


class UniformStream:
    """Uniform draws in [0, 1), float64, one per example, from a stream of their own beside a seed's noise."""

    def __init__(self, sequence: np.random.SeedSequence) -> None:
        self._generator = _generator(_further(sequence, _UNIFORM))

    def draw(self, count: int) -> NDArray[np.float64]:
        return self._generator.random(count)


def _generator(seed: int | np.random.SeedSequence | None) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed if isinstance(seed, np.random.SeedSequence) else check_seed(seed)))


def _further(sequence: np.random.SeedSequence, *key: int) -> np.random.SeedSequence:
    return np.random.SeedSequence(sequence.entropy, spawn_key=key)


def check_truncation(truncation: Any) -> float | None:
    """None, or the largest size of a standard normal number."""
    if truncation is None:
        return None
    if not LEAST_TRUNCATION <= as_float(truncation) <= _LARGEST:
        raise InputError(
            f"truncation is {truncation!r}; expected a finite number from {LEAST_TRUNCATION}, or None for all draws"
        )
    return float(truncation)


def check_seed(seed: Any) -> int | None:
    """A whole number from 0, or None for fresh entropy."""
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0):
        raise InputError(f"seed is {seed!r}; expected a whole number from 0, or None for fresh entropy")
    return None if seed is None else int(seed)


def check_temperature(temperature: Any) -> np.float32:
    """The factor on the standard deviation: a finite number from 0, where 0 gives the mean itself."""
    if not 0 <= as_float(temperature) <= _LARGEST:
        raise InputError(f"temperature is {temperature!r}; expected a finite float32 number from 0")
    return np.float32(temperature)
