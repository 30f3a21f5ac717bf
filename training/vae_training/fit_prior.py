"""A density fitted to the latents of the training data once training is over, to sample from instead of N(0, I).

Ex-post density estimation (Ghosh et al., 2020, arXiv:1903.12436). What it is fitted to: of a VAE one posterior draw per
example, which together are draws from the aggregate posterior, what the decoder was trained on; of an autoencoder the
codes themselves. `draw_aggregate` makes both.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vae_runtime.arguments import check_choice
from vae_runtime.errors import InputError, MissingExtraError
from vae_runtime.manifest import FITTED_PRIORS
from vae_runtime.preprocess import Float64
from vae_runtime.prior import GaussianMixture

MAX_DIMENSIONS = 1024  # a full covariance has their square in numbers, and fitting takes their cube in time
REGULARISATION = 1e-6  # in variances, see `fit_prior`
ITERATIONS = 200  # of the EM algorithm, at most


def fit_prior(latents: NDArray[Any], kind: str, components: int = 1, seed: int = 0) -> GaussianMixture:
    """Fit a density to latents, float (N, D): one row per example, see `draw_aggregate`.

    kind: "gaussian", the mean and the full covariance of the latents, in closed form; or "mixture" of so many
        `components` with a full covariance each, by scikit-learn's EM algorithm, which begins as `seed` says.
    Each covariance gets 1e-6 of the latents' average variance added to its diagonal (1e-6 itself where all latents are
    the same), so that latent dimensions that are constant, or follow from others, leave it positive definite.

    Raises:
        InputError: latents of another shape, not finite, of more than 1,024 dimensions, or too few: D + 1 examples at
            least, and as many as components; components below 1, or other than 1 of a "gaussian".
        MissingExtraError: a mixture, and scikit-learn is not installed.
    """
    check_choice(kind, "kind", FITTED_PRIORS)
    latents = _checked(latents, components)
    if kind == "gaussian" and components != 1:
        raise InputError(f"components is {components}; a gaussian has 1, expected kind 'mixture' for more")
    # In units of the average deviation, so that what is added to a diagonal is relative to it.
    centre = latents.mean(axis=0)
    scale = float(np.sqrt(np.square(latents - centre).mean()))
    if scale <= 1e-12 * float(np.abs(centre).max()):  # the same latents, but for rounding
        scale = 1.0
    whitened = (latents - centre) / scale
    weights, means, covariances = (
        _gaussian(whitened) if kind == "gaussian" else _mixture(whitened, components, seed % 2**32)
    )
    factors = np.asarray(np.linalg.cholesky(covariances) * scale, np.float64)
    return GaussianMixture(weights / weights.sum(), means * scale + centre, factors)


def draw_aggregate(mean: NDArray[Any], logvar: NDArray[Any] | None, seed: int) -> Float64:
    """One draw from each posterior N(mean, exp(logvar)), or the codes where logvar is None -> (N, D), flattened.

    mean, logvar: (N, *latent_shape).
    """
    latents = mean.reshape(len(mean), -1).astype(np.float64)
    if logvar is None:
        return latents
    noise = np.random.default_rng(seed).standard_normal(latents.shape)
    return np.asarray(latents + np.exp(0.5 * logvar.reshape(latents.shape).astype(np.float64)) * noise)


def _checked(latents: NDArray[Any], components: int) -> Float64:
    if latents.ndim != 2 or not latents.size or latents.dtype.kind != "f":
        raise InputError(
            f"latents has shape {latents.shape} and dtype {latents.dtype}; expected floats (N, D), one row per example"
        )
    count, dimensions = latents.shape
    if dimensions > MAX_DIMENSIONS:
        raise InputError(
            f"latents has {dimensions:,} dimensions; a prior with full covariance is fitted to at most "
            f"{MAX_DIMENSIONS:,}"
        )
    if components < 1:
        raise InputError(f"components is {components}; expected at least 1")
    if count < dimensions + 1 or count < components:
        raise InputError(
            f"latents has {count} examples; {components} component{'s'[: components - 1]} in {dimensions} dimensions "
            f"need at least {max(dimensions + 1, components)}"
        )
    if not np.isfinite(latents).all():
        raise InputError("latents has NaN or infinite values; expected finite numbers")
    return latents.astype(np.float64)


def _gaussian(latents: Float64) -> tuple[Float64, Float64, Float64]:
    """weights (1,), means (1, D), covariances (1, D, D)."""
    mean = latents.mean(axis=0)
    covariance = np.cov(latents, rowvar=False).reshape(len(mean), len(mean))
    return np.ones(1), mean[None], (covariance + REGULARISATION * np.eye(len(mean)))[None]


def _mixture(latents: Float64, components: int, seed: int) -> tuple[Float64, Float64, Float64]:
    """weights (K,), means (K, D), covariances (K, D, D)."""
    try:
        from sklearn import mixture
        from sklearn.exceptions import ConvergenceWarning
    except ImportError:
        raise MissingExtraError("scikit-learn", "train", "a mixture as prior") from None
    model = mixture.GaussianMixture(
        components, covariance_type="full", random_state=seed, reg_covar=REGULARISATION, max_iter=ITERATIONS
    )
    with warnings.catch_warnings():  # a mixture that could still be a little better is a density all the same
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(latents)
    return model.weights_, model.means_, model.covariances_
