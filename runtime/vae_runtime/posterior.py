"""What the encoder says of an input: q(z|x), a Gaussian with a diagonal covariance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .arguments import check_flag
from .errors import InputError, KindError
from .preprocess import Float32
from .sampling import NormalStream, check_temperature


@dataclass(frozen=True, eq=False, init=False)
class Posterior:
    """q(z|x) for a batch (Kingma and Welling, 2014).

    mean: float32 (N, *latent_shape).
    logvar: log of the variance, float32 of the same shape; None for a plain autoencoder, whose code is `mean` and
        which has no distribution.
    """

    mean: Float32
    logvar: Float32 | None = None

    def __init__(self, mean: Float32, logvar: Float32 | None = None) -> None:
        self.__dict__.update(mean=mean, logvar=logvar)  # a third of what a frozen dataclass's own takes

    def __len__(self) -> int:
        return len(self.mean)

    @property
    def std(self) -> Float32:
        """The standard deviation, exp(logvar / 2), float32 (N, *latent_shape).

        Raises:
            KindError: a plain autoencoder has none.
        """
        return np.asarray(np.exp(np.float32(0.5) * self._require_logvar("std")), np.float32)

    def mode(self) -> Float32:
        """The most likely latent, which is the mean (for an autoencoder: the code). Shares memory with `mean`."""
        return self.mean

    def sample(self, *, seed: int | None = None, temperature: float = 1.0) -> Float32:
        """One latent per example by reparameterisation, mean + temperature · std · ε -> float32 (N, *latent_shape).

        The same seed gives the same ε for the n-th example, whatever the batch. For several per example, sample with
        several seeds, or `VAE.reconstruct(n_samples=...)`, which decodes them.

        Raises:
            KindError: a plain autoencoder has no distribution to draw from.
            InputError: a seed or temperature out of range, or one that takes a latent out of float32.
        """
        logvar = self._require_logvar("sample")
        scale = check_temperature(temperature)
        noise = NormalStream(seed).draw(len(self.mean), self.mean.shape[1:])
        with np.errstate(over="ignore", invalid="ignore"):
            latents = np.asarray(self.mean + scale * np.exp(np.float32(0.5) * logvar) * noise, np.float32)
        if scale > 1 and not np.isfinite(latents).all():  # up to 1 only what is infinite already
            raise InputError(f"latents drawn at temperature {scale:g} are beyond float32; take a lower one")
        return latents

    def kl(self, per_dimension: bool = False) -> NDArray[np.float64]:
        """KL(q(z|x) ‖ N(0, 1)) in nats per example, in closed form -> float64 (N,).

        per_dimension: what each element of the latent adds to it -> float64 (N, *latent_shape); one that the encoder
            does not use has about 0.

        Raises:
            KindError: a plain autoencoder has no distribution. InputError: `per_dimension` is no boolean.
        """
        logvar = self._require_logvar("kl").astype(np.float64)
        terms = 0.5 * (np.exp(logvar) + self.mean.astype(np.float64) ** 2 - 1.0 - logvar)
        if check_flag(per_dimension, "per_dimension"):
            return np.asarray(terms)
        return np.asarray(terms.reshape(len(terms), -1).sum(axis=1))

    def _require_logvar(self, name: str) -> Float32:
        if self.logvar is None:
            raise KindError(f"{name} needs a distribution; this is a plain autoencoder's code, use mode()")
        return self.logvar


class Reconstruction(NamedTuple):
    """What a VAE is sure of: mean and standard deviation of p(x|z)'s mean over draws of z from the posterior, float32
    of the inputs' shape (N, C, H, W) or (N, D)."""

    mean: Float32
    std: Float32
