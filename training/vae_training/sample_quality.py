"""How good samples are, by a measure that works for small images and vectors and a few hundred of them.

Precision and recall (Kynkäänniemi et al., 2019, arXiv:1904.06991): the part of the samples that lie among the real
examples, and the part of the real examples that lie among the samples. Their features are those of a network trained on
photographs; here they are the leading principal components of the train part, which digits and vectors have too.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from vae_runtime.errors import InputError, MissingExtraError
from vae_runtime.preprocess import Float32, Float64
from vae_runtime.prior import GaussianMixture

from .evaluate import batches
from .feed import SAMPLES
from .fit_prior import MAX_DIMENSIONS, draw_aggregate, fit_prior
from .losses import Objective
from .models import VAE

NEIGHBOURS = 3
COMPONENTS = 32  # principal ones, at most
MIXTURE = 10
MAX_MIXTURE_DIMENSIONS = 128  # of more the fit of a mixture takes longer than the rest together
MAX_EXAMPLES, MAX_ELEMENTS = 2000, 2**25  # that the components are those of, and numbers in them
MAX_TEST, MAX_TRAIN, MAX_TRAIN_ELEMENTS = 5000, 10_000, 2**28  # what is measured with, and what priors are fitted to
_BLOCK = 1000


class Features(NamedTuple):
    """x (N, ...) -> float64 (N, K): its coordinates along the leading principal components of some examples."""

    mean: Float64
    axes: Float64

    def __call__(self, x: NDArray[Any]) -> Float64:
        parts = [x[i : i + _BLOCK].reshape(len(x[i : i + _BLOCK]), -1) for i in range(0, len(x), _BLOCK)]
        return np.concatenate([(part - self.mean) @ self.axes for part in parts])

    @classmethod
    def of(cls, x: Float32, components: int = COMPONENTS) -> Features:
        """The leading components of x, (N, ...), by the smaller of its two Gram matrices."""
        flat = x.reshape(len(x), -1).astype(np.float64)
        mean = flat.mean(axis=0)
        flat -= mean
        wide = flat.shape[1] > len(flat)
        values, vectors = np.linalg.eigh(flat @ flat.T if wide else flat.T @ flat)  # ascending
        kept = values[::-1][:components] > 1e-10 * max(values[-1], 1e-300)
        axes = vectors[:, ::-1][:, :components][:, kept]
        return cls(mean, flat.T @ axes / np.sqrt(values[::-1][:components][kept]) if wide else axes)


def precision_and_recall(real: Float64, samples: Float64, neighbours: int = NEIGHBOURS) -> dict[str, float]:
    """Features of real examples (N, K) and of samples (M, K) -> the parts of one that the other's balls cover.

    Each point's ball reaches to its `neighbours`-th neighbour of the same kind, itself not counted.
    """
    return {
        "precision": _covered(samples, real, neighbours),
        "recall": _covered(real, samples, neighbours),
    }


def measure_samples(
    objective: Objective, train: Float32, real: Float32, test: Float32, seed: int
) -> dict[str, Any] | None:
    """Precision and recall against the test part of as many samples from each prior; None where all examples are alike,
    so that there is no component to compare anything by.

    train: examples of the train part as the encoder takes them, which the priors are fitted to. real, test: examples of
    the train and of the test part, of the kind that samples are, means of p(x|z); there are more than three of each.
    All are float32 (N, *input_shape). "train", as many examples of the train part in the samples' place, is what can be
    reached; it and priors that the train part is too small for are left out.
    """
    features = Features.of(real[: max(COMPONENTS + 1, min(MAX_EXAMPLES, MAX_ELEMENTS // real[0].size))])
    if features.axes.shape[1] == 0:
        return None
    reference = features(test)
    found: dict[str, Any] = {
        "features": f"{features.axes.shape[1]} principal components of the train part",
        "neighbours": NEIGHBOURS,
        "examples": len(test),
    }
    if len(real) >= len(test):
        found["train"] = precision_and_recall(reference, features(real[: len(test)]))
    rng = np.random.default_rng((seed, SAMPLES))
    noise, uniform = rng.standard_normal((len(test), *objective.model.config.latent_shape)), rng.random(len(test))
    for name, prior in _priors(objective, train, seed).items():
        z = noise if prior is None else _draw(prior, noise, uniform)
        found[name] = precision_and_recall(reference, features(_decode(objective, z)))
    return found


def can_measure(objective: Objective, examples: int) -> bool:
    """Latents of one size, of at most 1,024 elements: no priors are fitted to more, or to those of images of any size;
    and enough examples of each part."""
    config = objective.model.config
    return examples > NEIGHBOURS and not config.is_fully_convolutional and config.latent_dim <= MAX_DIMENSIONS


def _priors(objective: Objective, train: Float32, seed: int) -> dict[str, GaussianMixture | None]:
    """By name; None is the standard normal. Those that the train part is too small for are left out."""
    priors: dict[str, GaussianMixture | None] = {"standard": None} if isinstance(objective.model, VAE) else {}
    latents = draw_aggregate(*_encode(objective, train), seed)
    kinds = [("gaussian", "gaussian", 1), (f"mixture:{MIXTURE}", "mixture", MIXTURE)]
    for name, kind, components in kinds[: 1 if latents.shape[1] > MAX_MIXTURE_DIMENSIONS else 2]:
        try:
            priors[name] = fit_prior(latents, kind, components, seed)
        except (InputError, MissingExtraError):
            continue
    return priors


def _draw(prior: GaussianMixture, noise: NDArray[Any], uniform: Float64) -> NDArray[Any]:
    flat = noise.reshape(len(noise), -1).astype(np.float32)
    return prior.transform(flat, prior.components(uniform)).reshape(noise.shape)


@torch.no_grad()
def _encode(objective: Objective, x: Float32) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """Means and log-variances, or codes."""
    outputs = [objective.model.encode(batch) for batch in batches(x, objective)]
    if not isinstance(objective.model, VAE):
        return torch.cat(outputs).cpu().numpy(), None
    mean, logvar = (torch.cat(parts).cpu().numpy() for parts in zip(*outputs, strict=True))
    return mean, logvar


@torch.no_grad()
def _decode(objective: Objective, z: NDArray[Any]) -> Float32:
    parts = [objective.model.decode(batch).cpu().numpy() for batch in batches(z.astype(np.float32), objective)]
    return np.concatenate(parts)


def _covered(points: Float64, centres: Float64, neighbours: int) -> float:
    """The part of `points` in the ball of at least one of `centres`."""
    radii = np.concatenate(
        [
            np.partition(_squared_distances(centres[i : i + _BLOCK], centres), neighbours, axis=1)[:, neighbours]
            for i in range(0, len(centres), _BLOCK)
        ]
    )
    inside = [
        (_squared_distances(points[i : i + _BLOCK], centres) <= radii).any(axis=1)
        for i in range(0, len(points), _BLOCK)
    ]
    return float(np.concatenate(inside).mean())


def _squared_distances(first: Float64, second: Float64) -> Float64:
    """(N, K), (M, K) -> (N, M)."""
    squared = np.square(first).sum(1)[:, None] + np.square(second).sum(1) - 2 * first @ second.T
    return np.asarray(np.maximum(squared, 0.0))
