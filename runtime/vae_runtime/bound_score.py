"""A score at the least cost: both graphs and all arithmetic in memory that is made once for a shape of inputs.

Around graphs that take some twenty microseconds each call of numpy counts, so there are few, all of them in place:
sums are products of BLAS, and one example is one row without a batch.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .likelihood import LARGEST_PROBABILITY, SMALLEST_PROBABILITY, normaliser
from .manifest import INPUT, LOGVAR, MEAN, RECONSTRUCTION, Likelihood, Manifest
from .operation import Operation
from .preprocess import Float32, Float64, UInt8

_ONE, _HALF = np.array(1, np.float32), np.array(0.5, np.float32)


class BoundScore:
    """`VAE.score` by "elbo", or without a likelihood by "reconstruction", of inputs of one shape, with the batch. For
    one thread at a time."""

    def __init__(
        self,
        manifest: Manifest,
        operations: tuple[Operation, Operation],
        shape: tuple[int, ...],
        likelihood: Likelihood | None,
    ) -> None:
        count, self._elements = shape[0], math.prod(shape[1:])
        latent_shape = count, *manifest.latent_shape(shape[1:])
        latents = self._latents = math.prod(latent_shape[1:])
        x, decoded, mean = (
            np.empty((1, count, size), np.float32) for size in (self._elements, self._elements, latents)
        )
        spread = np.empty((2, count, latents), np.float32)  # logvar, and its exp
        self._likelihood = likelihood
        self._sums = _sum_of_one if count == 1 else _sums_of_each
        if likelihood is not None and likelihood.type == "bernoulli":
            weights, logs = (np.empty((2, count, self._elements), np.float32) for _ in range(2))
            decoded = logs[:1]
            if likelihood.binarize != "threshold":
                x = weights[:1]
            self._terms, self._weights = self._bernoulli, self._rows(weights)
            self._target, self._other = self._rows(weights[:1]), self._rows(weights[1:])
            self._logs, self._p, self._q = (self._rows(part) for part in (logs, logs[:1], logs[1:]))
        else:
            self._terms = self._laplace if likelihood is not None and likelihood.type == "laplace" else self._squared
            # As in `likelihood.comparable`.
            self._difference = self._rows(np.empty(x.shape, np.float32 if manifest.input.is_image else np.float64))
            self._ones = np.ones_like(self._difference)
            self._target = self._rows(x)
            if manifest.likelihood is not None and manifest.likelihood.binarize == "threshold":
                self._terms, self._target = self._squared_of_binary, self._rows(np.empty_like(x))
        self._x, self._decoded, self._mean = (self._rows(array) for array in (x, decoded, mean))
        self._logvar, self._variance, self._spread = (self._rows(a) for a in (spread[:1], spread[1:], spread))
        self._signs = self._rows(np.broadcast_to(np.array([[[-1]], [[1]]], np.float32), spread.shape).copy())
        arrays = {INPUT: x.reshape(shape), MEAN: mean.reshape(latent_shape)}
        if manifest.kind == "vae":
            arrays[LOGVAR] = spread[0].reshape(latent_shape)
        arrays[RECONSTRUCTION] = decoded.reshape(shape)
        self._pair = operations[0].pair_with(operations[1], arrays)

    def __call__(self, array: Float32 | UInt8) -> Float64 | None:
        """The scores of an array of that shape, which belong to the caller; None where something is wrong with it, or
        float32 is too narrow for a sum."""
        if not self._pair(array):
            return None
        if self._likelihood is None:
            return _finite(self._terms() / self._elements)
        np.exp(self._logvar, self._variance)
        sums = self._sums
        divergence = 0.5 * (sums(self._mean, self._mean) + sums(self._signs, self._spread) - self._latents)
        return _finite(divergence + self._terms())

    def _rows(self, array: NDArray[Any]) -> NDArray[Any]:
        """(K, N, D) as it is, or of one example as a vector."""
        return array.reshape(-1) if array.shape[1] == 1 else array

    def _bernoulli(self) -> Any:
        """As `likelihood.sums_of_log_likelihoods`, but probabilities are clipped only where one needs it."""
        assert self._likelihood is not None
        if self._likelihood.binarize == "threshold":
            self._make_binary()
        np.subtract(_ONE, self._target, self._other)
        p, q = self._p, self._q
        np.subtract(_ONE, p, q)
        if p.item(p.argmin()) < SMALLEST_PROBABILITY or q.item(q.argmin()) < 1 - LARGEST_PROBABILITY:
            p.clip(SMALLEST_PROBABILITY, 1, out=p)
            q.clip(1 - LARGEST_PROBABILITY, 1, out=q)
        np.log(self._logs, self._logs)
        return -self._sums(self._weights, self._logs)

    def _squared_of_binary(self) -> Any:
        self._make_binary()
        return self._squared()

    def _make_binary(self) -> None:
        """As `likelihood.targets`."""
        np.greater_equal(self._x, _HALF, self._target)

    def _squared(self) -> Any:
        difference = self._difference
        np.subtract(self._decoded, self._target, difference, dtype=difference.dtype)
        squares = self._sums(difference, difference)
        if self._likelihood is None:
            return squares
        assert self._likelihood.scale is not None
        return squares * (0.5 / self._likelihood.scale**2) + self._elements * normaliser(self._likelihood)

    def _laplace(self) -> Any:
        assert self._likelihood is not None
        assert self._likelihood.scale is not None
        difference = self._difference
        np.subtract(self._decoded, self._target, difference, dtype=difference.dtype)
        np.absolute(difference, difference)
        sums = self._sums(difference, self._ones)
        return sums / self._likelihood.scale + self._elements * normaliser(self._likelihood)


def _finite(scores: float | Float64) -> Float64 | None:
    is_finite = math.isfinite(scores) if isinstance(scores, float) else bool(np.isfinite(scores).all())
    return np.array(scores, np.float64, ndmin=1) if is_finite else None


def _sum_of_one(a: NDArray[Any], b: NDArray[Any]) -> float:
    return float(a.dot(b))


def _sums_of_each(a: NDArray[Any], b: NDArray[Any]) -> Float64:
    """(K, N, D) -> (N,)."""
    return np.asarray((a[..., None, :] @ b[..., None]).sum(axis=0, dtype=np.float64)[:, 0, 0])
