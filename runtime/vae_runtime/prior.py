"""Densities over latents that were fitted after training, and draws from the prior, standard or fitted.

A prior that is fitted to the codes of the training data makes samples of a VAE better, and gives a plain autoencoder
something to sample from at all (ex-post density estimation: Ghosh et al., 2020, arXiv:1903.12436).
"""

from __future__ import annotations

import io
import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .bundle import read_npz
from .errors import BundleError, InputError, KindError, NotInBundleError
from .manifest import FittedPrior, Manifest
from .preprocess import Float32, Float64
from .sampling import NormalStream, TruncatedStream, UniformStream, check_seed, check_temperature, check_truncation

PRIORS = ("standard", "fitted")


_SAFE_TEMPERATURE = 1e30  # up to here no standard normal number leaves float32


class GaussianMixture(NamedTuple):
    """Σ_k weights[k] · N(means[k], factors[k] factors[k]ᵀ); a single Gaussian has one component.

    weights: float64 (K,), above 0, their sum 1. means: float64 (K, D), D latent elements, flattened. factors: float64
    (K, D, D), lower triangular with a positive diagonal, the Cholesky factors of the covariances.
    """

    weights: Float64
    means: Float64
    factors: Float64

    def transform(self, noise: Float32, component: NDArray[np.int64]) -> Float64:
        """Standard normal noise (N, D) and which component each row is of, (N,) -> draws, (N, D)."""
        draws = np.empty(noise.shape, np.float64)
        for k in np.unique(component):
            rows = component == k
            draws[rows] = self.means[k] + noise[rows].astype(np.float64) @ self.factors[k].T
        return draws

    def components(self, uniform: Float64) -> NDArray[np.int64]:
        """Uniform numbers in [0, 1), (N,) -> which component each is of, (N,)."""
        edges = np.cumsum(self.weights)
        return np.asarray(np.minimum(np.searchsorted(edges, uniform * edges[-1], side="right"), len(edges) - 1))

    def to_npz(self) -> bytes:
        """The bytes of the bundle's prior file: an .npz of `weights`, `means` and `factors`, little-endian float64."""
        buffer = io.BytesIO()
        # numpy stamps every member with the same date of 1980, so that equal arrays are equal bytes.
        arrays = {name: np.asarray(array, "<f8") for name, array in sorted(self._asdict().items())}
        np.savez(buffer, **arrays)  # type: ignore[arg-type]  # no name is `allow_pickle`
        return buffer.getvalue()

    @classmethod
    def from_npz(cls, data: bytes, components: int, dimensions: int, label: str = "the prior") -> GaussianMixture:
        """The inverse of `to_npz`, checked. label: the file, for messages.

        Raises:
            BundleError: it is no such file, or the numbers are no density of so many components and dimensions.
        """
        shapes = {"weights": (components,), "means": (components, dimensions)}
        shapes["factors"] = (components, dimensions, dimensions)
        arrays = read_npz(data, label, {name: 8 * math.prod(shape) for name, shape in shapes.items()})
        if {name: (array.dtype, array.shape) for name, array in arrays.items()} != {
            name: (np.dtype("<f8"), shape) for name, shape in shapes.items()
        }:
            found = {name: (str(array.dtype), array.shape) for name, array in sorted(arrays.items())}
            raise BundleError(f"{label} holds {found}; expected float64 arrays {shapes}")
        mixture = cls(**arrays)
        diagonals = np.diagonal(mixture.factors, axis1=1, axis2=2)
        if not (
            all(np.isfinite(array).all() for array in mixture)
            and (mixture.weights > 0).all()
            and abs(float(mixture.weights.sum()) - 1) < 1e-6
            and (diagonals > 0).all()
            and not np.triu(mixture.factors, 1).any()
        ):
            raise BundleError(
                f"{label} is no density: weights are above 0 and sum to 1, factors are lower triangular with a positive"
                " diagonal, all numbers are finite"
            )
        return mixture


class LatentStream:
    """Latents drawn from a prior, N(0, 1) or a fitted mixture, example by example: what `VAE.sample` decodes.

    temperature: factor on the noise. truncation: the largest size of a number of the noise, before that; None: any.
    Of N(0, 1) without truncation these are temperature · `NormalStream(seed)`.
    """

    def __init__(
        self, seed: int | None, temperature: float, truncation: float | None, mixture: GaussianMixture | None
    ) -> None:
        self._scale, limit = check_temperature(temperature), check_truncation(truncation)
        sequence = np.random.SeedSequence(check_seed(seed))
        self._noise = NormalStream(sequence) if limit is None else TruncatedStream(sequence, limit)
        self._mixture = mixture
        self._uniform = None if mixture is None else UniformStream(sequence)
        self._may_overflow = mixture is not None or self._scale > _SAFE_TEMPERATURE

    def draw(self, count: int, shape: tuple[int, ...]) -> Float32:
        """The next `count` latents of `shape` -> float32 (count, *shape)."""
        noise = self._noise.draw(count, shape)
        if not self._may_overflow:
            return np.multiply(noise, self._scale, out=noise)
        with np.errstate(over="ignore", invalid="ignore"):
            latents = self._scale * noise
            if self._mixture is not None and self._uniform is not None:
                component = self._mixture.components(self._uniform.draw(count))
                draws = self._mixture.transform(latents.reshape(count, -1), component)
                latents = draws.astype(np.float32).reshape(latents.shape)
        if not np.isfinite(latents).all():
            raise InputError(f"latents drawn at temperature {self._scale:g} are beyond float32; take a lower one")
        return latents


def choose_prior(prior: Any, manifest: Manifest) -> FittedPrior | None:
    """What samples are drawn from: the fitted prior, or None for N(0, 1). prior: "standard", "fitted", or None for the
    standard one where there is one.

    Raises:
        InputError: another word. KindError: an autoencoder has no standard prior. NotInBundleError: none was fitted.
    """
    if prior is not None and (not isinstance(prior, str) or prior not in PRIORS):
        raise InputError(f"prior is {prior!r}; expected 'standard', 'fitted' or None")
    latent, name = manifest.latent, manifest.name
    if latent.prior is not None and prior != "fitted":
        return None
    if latent.fitted_prior is not None and prior != "standard":
        return latent.fitted_prior
    cure = "; for one that is fitted, make the bundle with: vae-export SOURCE --prior gaussian"
    if latent.fitted_prior is not None:
        cure = "; take prior='fitted'"
    elif manifest.input.is_free:
        cure = ", and none can be fitted where height and width are free"
    if prior == "fitted":
        raise NotInBundleError(f"{name} has no fitted prior{cure}")
    raise KindError(f"{name} is a plain autoencoder, which has no prior to sample from{cure}")
