"""Questions to the latent space: along one unit, nearest neighbours, directions, principal axes, maps. numpy alone.

A unit is an element of the latent, flattened; of a latent (C, h, w) a channel at all positions (as in `ActiveUnits`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .arguments import check_count
from .errors import InputError
from .preprocess import Float32, Float64, fitting_memory, require_unmasked

Int64 = NDArray[np.int64]

# A unit is active where the variance of the posterior's mean over the data is above (Burda et al., 2016,
# arXiv:1509.00519).
ACTIVE_VARIANCE = 0.01

# Of references that are looked at together: numbers and rows at most; and inputs at a time that are compared with them.
_BLOCK_VALUES, _BLOCK_ROWS, _QUERIES = 2**22, 2**16, 64
_FEW = 64  # candidates whose distances are computed without a closer look
_LARGEST_COVARIANCE = 4096  # elements of a latent; then the matrix has 128 MiB


def count_units(shape: Sequence[int | None]) -> int:
    """How many units a latent of this shape has."""
    return shape[0] or 0 if len(shape) == 3 else math.prod(side or 0 for side in shape)


def traversal(latents: Float32, dimension: Any, values: Any) -> Float32:
    """One latent (1, *latent_shape) -> copies in which one unit is set to each of the values, (N, *latent_shape).

    Raises:
        InputError: not one latent, a unit that there is not, values that are no finite numbers.
    """
    if len(latents) != 1:
        raise InputError(f"inputs holds {len(latents)} examples; traverse takes one, for example inputs[:1]")
    units, number = count_units(latents.shape[1:]), check_count(dimension, "dimension", least=0)
    if number >= units:
        raise InputError(f"dimension is {number}; the latent, of shape {latents.shape[1:]}, has units 0 to {units - 1}")
    numbers = _check_values(values)
    with fitting_memory("an array of latents", (len(numbers), *latents.shape[1:])):
        copies = np.repeat(latents, len(numbers), axis=0)
    copies.reshape(len(numbers), units, -1)[:, number] = numbers[:, None]
    return copies


def _check_values(values: Any) -> Float32:
    if isinstance(values, np.ndarray):
        require_unmasked(values, "values")
    try:
        given = np.asarray(values)
    except ValueError:  # rows of different lengths
        given = np.empty(0)
    with np.errstate(over="ignore"):
        numbers = given.astype(np.float32) if given.dtype.kind in "iuf" else np.empty(0, np.float32)
    if numbers.ndim != 1 or not len(numbers) or not np.isfinite(numbers).all():
        raise InputError(f"values is {values!r}; expected finite float32 numbers in a row, such as (-3, 0, 3)")
    return numbers


def mean_difference(positives: Float32, negatives: Float32) -> Float32:
    """The mean of the first latents less that of the second -> float32 (*latent_shape)."""
    shapes = positives.shape[1:], negatives.shape[1:]
    if shapes[0] != shapes[1]:
        raise InputError(f"positives and negatives have latents of shapes {shapes[0]} and {shapes[1]}; expected one")
    return np.asarray(positives.mean(axis=0, dtype=np.float64) - negatives.mean(axis=0, dtype=np.float64), np.float32)


# --- nearest neighbours -----------------------------------------------------------------------------------------------


def nearest_latents(queries: Float32, references: Float32, k: Any = 1) -> tuple[Int64, Float64]:
    """The k references nearest to each query, by Euclidean distance, the nearest first and of equals the one with the
    lower index -> indices int64 (N, k), distances float64 (N, k).

    queries: (N, *latent_shape). references: (M, *latent_shape); all are looked at, in blocks. Products of float32
    matrices tell which of them can be among the nearest at the worst rounding; the distances of these are computed in
    float64.

    Raises:
        InputError: k is no whole number from 1 to M, or the latents' shapes differ.
    """
    k = check_count(k, "k")
    if k > len(references):
        raise InputError(f"k is {k}; expected at most the number of references, {len(references)}")
    if queries.shape[1:] != references.shape[1:]:
        raise InputError(
            f"references has latents of shape {references.shape[1:]}; those of the inputs have {queries.shape[1:]}"
        )
    points, others = (array.reshape(len(array), -1) for array in (queries, references))
    with fitting_memory("an array of neighbours", (len(points), k)):
        found = [_Nearest(point, k) for point in points]
    # Seen from the references' centre little cancels, and numbers up to 1 have squares that do not overflow.
    centre = others.mean(axis=0, dtype=np.float64)
    largest = max(max(float(array.max()), -float(array.min())) for array in (points, others))
    scale = 0.5 / (largest or 1.0)
    rows = max(1, min(_BLOCK_ROWS, _BLOCK_VALUES // others.shape[1]))
    for start in range(0, len(others), rows):
        block = others[start : start + rows]
        moved = _moved(block, centre, scale)
        lengths = np.einsum("nd,nd->n", moved, moved)
        for first in range(0, len(points), _QUERIES):
            some = _moved(points[first : first + _QUERIES], centre, scale)
            rough = (-2 * some) @ moved.T  # (queries, references)
            rough += lengths
            for one, query, row in zip(found[first : first + _QUERIES], some, rough, strict=True):
                one.look(row, query, float(lengths.max()), scale, block, start)
    return np.stack([one.indices for one in found]), np.sqrt(np.stack([one.squares for one in found]))


def _moved(rows: Float32, centre: Float64, scale: float) -> Float32:
    return np.asarray((rows - centre) * scale, np.float32)


class _Nearest:
    """The nearest references to one point so far: squared distances, rising, and indices."""

    def __init__(self, point: Float32, k: int) -> None:
        self._point = point.astype(np.float64)
        self.squares, self.indices = np.full(k, np.inf), np.full(k, np.iinfo(np.int64).max)

    def look(self, rough: Float32, query: Float32, longest: float, scale: float, block: Float32, start: int) -> None:
        """Take what is nearer out of one block, whose first reference has the index `start`.

        rough: |r|² - 2 q·r of each reference r, moved and scaled as the query is. longest: the largest |r|².
        """
        k, length = len(self.squares), float(np.square(query, dtype=np.float64).sum())
        # The worst rounding: of the products of so many elements, of what was moved, of the comparison below.
        slack = (query.size + 8) * 2.0**-23 * (math.sqrt(length) + math.sqrt(longest)) ** 2
        near = np.flatnonzero(rough <= self.squares[-1] * scale**2 - length + slack)
        if len(near) > k + _FEW:
            kth = float(np.partition(rough[near], k - 1)[k - 1])
            near = near[rough[near] <= kth + 2 * slack]
        gaps = block[near] - self._point
        squares = np.concatenate([self.squares, np.einsum("nd,nd->n", gaps, gaps)])
        indices = np.concatenate([self.indices, near + start])
        order = np.lexsort((indices, squares))[:k]
        self.squares, self.indices = squares[order], indices[order]


# --- axes and maps ----------------------------------------------------------------------------------------------------


class Axes(NamedTuple):
    """Directions in the latent space, float64, latents flattened to D elements: from a centre (D,), n directions
    (n, D), along each the standard deviation (n,) and its part of the whole variance (n,)."""

    centre: Float64
    directions: Float64
    deviations: Float64
    parts: Float64


def principal_axes(batches: Iterable[Float32], count: int = 2) -> Axes:
    """The directions along which latents vary most, the first first (principal component analysis); of unit length,
    their largest element positive.

    batches: latents (N, *latent_shape), of which only sums are kept.

    Raises:
        InputError: fewer than 2 latents, latents of fewer than `count` elements, or of more than 4096.
    """
    centre, covariance = _moments((batch.reshape(len(batch), -1) for batch in batches), _LARGEST_COVARIANCE)
    if count > len(centre):
        raise InputError(f"the latents have {len(centre)} elements; {count} axes need as many")
    variances, vectors = np.linalg.eigh(covariance)  # rising
    variances, vectors = np.maximum(variances[::-1][:count], 0), vectors.T[::-1][:count]
    largest = np.take_along_axis(vectors, np.abs(vectors).argmax(axis=1)[:, None], axis=1)
    whole = float(np.trace(covariance)) or 1.0
    return Axes(centre, vectors * np.sign(largest), np.sqrt(variances), variances / whole)


def unit_moments(batches: Iterable[Float32]) -> tuple[Float64, Float64]:
    """Mean and variance of each unit over latents, (units,) each; of channels over all positions too."""
    means, variances = _moments(map(by_unit, batches))
    return means, np.maximum(variances, 0)


def by_unit(latents: Float32) -> Float32:
    """Latents (N, *latent_shape) -> one row per example and position, (rows, units)."""
    units = count_units(latents.shape[1:])
    return np.moveaxis(latents.reshape(len(latents), units, -1), 1, 2).reshape(-1, units)


def _moments(batches: Iterable[Float32], most: int | None = None) -> tuple[Float64, Float64]:
    """Mean (D,) and variance (D,) of rows of one length or, where `most` says up to which D, the covariance (D, D)."""
    count, shift, total, products = 0, np.empty(0), np.empty(0), np.empty(0)
    for batch in batches:
        if not count:
            size = batch.shape[1]
            if most is not None and size > most:
                raise InputError(f"the latents have {size} elements; axes are found for up to {most}")
            # From near the centre, so that little cancels in the end.
            shift, total = batch.mean(axis=0, dtype=np.float64), np.zeros(size)
            products = np.zeros(size if most is None else (size, size))
        if batch.shape[1] != len(shift):
            raise InputError(f"latents have {len(shift)} and {batch.shape[1]} elements; axes need inputs of one size")
        moved = batch - shift
        total += moved.sum(axis=0)
        products += np.einsum("nd,nd->d", moved, moved) if most is None else moved.T @ moved
        count += len(batch)
    if count < 2:
        raise InputError(f"the inputs are {count} in number; axes need at least 2")
    mean = total / count
    return shift + mean, products / count - (mean * mean if most is None else np.outer(mean, mean))


def unit_axes(shape: tuple[int, ...], numbers: Sequence[int], means: Float64, variances: Float64) -> Axes:
    """The axes of some units of latents of this shape, through the units' means (units,), with their variances
    (units,)."""
    units = len(means)
    positions = math.prod(shape) // units
    directions = np.zeros((len(numbers), units, positions))
    directions[np.arange(len(numbers)), list(numbers)] = 1
    chosen = variances[list(numbers)]
    parts = chosen / (float(variances.sum()) or 1.0)
    return Axes(means.repeat(positions), directions.reshape(len(numbers), -1), np.sqrt(chosen), parts)


def map_rows(axes: Axes, shape: tuple[int, ...], steps: int) -> Iterator[Float32]:
    """The plane of the first two axes as a grid of latents, row by row from the top, (steps, *latent_shape) each: the
    first axis runs to the right, the second up. The points are at even quantiles of a normal distribution with the
    axes' standard deviations, (i + 0.5) / steps (Kingma and Welling, 2014, figure 4)."""
    places = np.array([NormalDist().inv_cdf((index + 0.5) / steps) for index in range(steps)])
    across, up = axes.directions[:2] * axes.deviations[:2, None]
    for place in places[::-1]:
        row = axes.centre + place * up + places[:, None] * across
        yield row.astype(np.float32).reshape(steps, *shape)
