"""log p(x|z) by the bundle's likelihood, from the mean that the decoder gives.

Bernoulli: probabilities are clipped to [float32's smallest normal number, 1 - 2**-24], so that a pixel that is
certainly wrong costs 87.3 or 16.6 nats, and not infinity. Gaussian and Laplace have one scale in the data's units.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from .manifest import InputSpec, Likelihood
from .preprocess import Float32, Float64, binarize

SMALLEST_PROBABILITY = float(np.finfo(np.float32).tiny)
LARGEST_PROBABILITY = 1 - 2.0**-24


def targets(likelihood: Likelihood | None, x: Float32) -> Float32:
    """What the likelihood is of: the inputs, or, of a model trained on x >= 0.5, these."""
    return binarize(x, "threshold") if likelihood is not None and likelihood.binarize == "threshold" else x


def negative_log_likelihood(likelihood: Likelihood, mean: Float32, x: Float32) -> Float64:
    """-log p(x|z) in nats per example; mean: of p(x|z), as the decoder gives it; both (N, ...) -> float64 (N,)."""
    terms = negative_log_likelihoods(likelihood, mean, x)
    return np.asarray(terms.reshape(len(terms), -1).sum(axis=1))


def negative_log_likelihoods(likelihood: Likelihood, mean: Float32, x: Float32) -> Float64:
    """The same of every element by itself, in float64, of the inputs' shape."""
    mean, x = mean.astype(np.float64), x.astype(np.float64)
    if likelihood.type == "bernoulli":
        p = np.clip(mean, SMALLEST_PROBABILITY, LARGEST_PROBABILITY)
        return np.asarray(-(x * np.log(p) + (1 - x) * np.log1p(-p)))
    assert likelihood.scale is not None  # a density's
    if likelihood.type == "laplace":
        return np.asarray(np.abs(x - mean) / likelihood.scale + normaliser(likelihood))
    return np.asarray(0.5 * ((x - mean) / likelihood.scale) ** 2 + normaliser(likelihood))


def sums_of_log_likelihoods(likelihood: Likelihood, means: Float32, x: NDArray[np.floating]) -> Float64:
    """log p(x|z) of many draws, fast: means (k, s, D), which are overwritten, of x (k, D) -> float64 (k, s).

    Logarithms and products are of float32 where x is, and so are sums of BLAS. That differs from float64 by less than
    6e-8 nats per element and 1e-6 of the sum: 1 - p is exact from 1/2 on and rounded by 2**-25 below.
    """
    if likelihood.type == "bernoulli":
        others = np.subtract(1, means)
        inside = _logarithms(means, SMALLEST_PROBABILITY) @ x[..., None]  # (k, s, 1)
        outside = _logarithms(others, 1 - LARGEST_PROBABILITY) @ (1 - x)[..., None]
        return np.add(inside, outside, dtype=np.float64)[..., 0]
    assert likelihood.scale is not None
    differences = means - x[:, None]
    if likelihood.type == "laplace":
        sums = np.abs(differences, out=differences).sum(axis=2, dtype=np.float64) / -likelihood.scale
    else:
        squares = squared_norms(differences)
        sums = squares.astype(np.float64) * (-0.5 / likelihood.scale**2)
    return np.asarray(sums - x.shape[1] * normaliser(likelihood))


def squared_norms(rows: NDArray[np.floating]) -> NDArray[np.floating]:
    """Of each row (..., D), by BLAS -> (...)."""
    return np.asarray(rows[..., None, :] @ rows[..., None])[..., 0, 0]


def comparable(spec: InputSpec, x: Float32) -> NDArray[np.floating]:
    """(N, ...) -> (N, D) in the precision in which sums are formed: float32 for images, whose values lie in [0, 1];
    float64 for vectors, whose squares may be beyond float32."""
    flat = x.reshape(len(x), -1)
    return flat if spec.is_image else flat.astype(np.float64)


def _logarithms(probabilities: Float32, smallest: float) -> Float32:
    probabilities.clip(smallest, 1, out=probabilities)  # several times faster than np.maximum with a number
    return np.log(probabilities, out=probabilities)


def normaliser(likelihood: Likelihood) -> float:
    """-log of the density at its peak."""
    assert likelihood.scale is not None
    return math.log(likelihood.scale * (2 if likelihood.type == "laplace" else math.sqrt(2 * math.pi)))
