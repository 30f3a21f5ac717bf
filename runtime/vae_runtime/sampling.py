"""Random draws that are the same on every machine, in every order of chunks: numpy's Philox, one stream per seed."""

from __future__ import annotations

from typing import Any

import numpy as np

from .errors import InputError
from .preprocess import Float32, fitting_memory

_LARGEST = float(np.finfo(np.float32).max)


class NormalStream:
    """Standard normal draws, float32, filled example by example.

    The stream depends on the seed alone: ten draws are the first ten of twenty, and chunks join without a seam
    (Philox: Salmon et al., 2011; as `numpy.random.Generator(Philox(seed)).standard_normal(dtype=float32)`).
    """

    def __init__(self, seed: int | None) -> None:
        self._generator = np.random.Generator(np.random.Philox(check_seed(seed)))

    def draw(self, count: int, shape: tuple[int, ...]) -> Float32:
        """The next `count` examples of `shape` -> float32 (count, *shape). Raises `InputError` where there is no memory
        for so many."""
        with fitting_memory("a batch of latents", (count, *shape)):
            return self._generator.standard_normal((count, *shape), dtype=np.float32)


def check_seed(seed: Any) -> int | None:
    """A whole number from 0, or None for fresh entropy."""
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0):
        raise InputError(f"seed is {seed!r}; expected a whole number from 0, or None for fresh entropy")
    return None if seed is None else int(seed)


def check_count(value: Any, name: str, least: int = 1) -> int:
    """A whole number from `least`."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise InputError(f"{name} is {value!r}; expected a whole number from {least}")
    return int(value)


def check_flag(value: Any, name: str) -> bool:
    """True or False."""
    if not isinstance(value, (bool, np.bool_)):
        raise InputError(f"{name} is {value!r}; expected True or False")
    return bool(value)


def check_temperature(temperature: Any) -> np.float32:
    """The factor on the standard deviation: a finite number from 0, where 0 gives the mean itself."""
    if (
        isinstance(temperature, bool)
        or not isinstance(temperature, (int, float, np.integer, np.floating))
        or not 0 <= temperature <= _LARGEST
    ):
        raise InputError(f"temperature is {temperature!r}; expected a finite float32 number from 0")
    return np.float32(temperature)
