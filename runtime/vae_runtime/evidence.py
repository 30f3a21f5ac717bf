"""How probable a VAE finds inputs: the evidence lower bound and the importance-weighted estimate of log p(x).

    ELBO(x)   = E_q(z|x)[log p(x|z)] - KL(q(z|x) || p(z))                       Kingma and Welling, 2014
    log p(x) >= E[log 1/S sum_s p(x|z_s) p(z_s) / q(z_s|x)],  z_s ~ q(z|x)      Burda et al., 2016, arXiv:1509.00519

The second is an average in log space, kept as a running maximum and a running sum, so that no weight is stored. Memory
is that of one block of decoded draws, whatever the number of examples and draws; the noise is filled example by
example, each with all its draws, and so does not depend on the blocks either.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from .arguments import check_count, check_progress
from .errors import KindError, NotInBundleError
from .latents import require_finite
from .likelihood import comparable, sums_of_log_likelihoods, targets
from .manifest import Likelihood, Manifest
from .operation import Operation
from .posterior import Posterior, Reconstruction
from .preprocess import Float32, Float64, check_layout, image_size, require_plain_array
from .sampling import NormalStream, check_seed
from .tiling import Progress

Operations = tuple[Operation, Operation]


def require_likelihood(manifest: Manifest, what: str) -> Likelihood:
    """The likelihood of a VAE that has one.

    Raises:
        KindError: a plain autoencoder. NotInBundleError: the bundle does not say how its decoder's output is meant.
    """
    if manifest.kind != "vae":
        raise KindError(
            f"{what} needs a distribution over latents; {manifest.name} is a plain autoencoder, use"
            " reconstruction_error, or score with method 'reconstruction'"
        )
    if manifest.likelihood is None:
        raise NotInBundleError(
            f"{what} needs a likelihood, and {manifest.name} was made without one; export it again and say which, as in"
            " vae-export SOURCE --likelihood gaussian:0.1, or export_bundle(..., likelihood='gaussian:0.1')"
        )
    return manifest.likelihood


class Block(NamedTuple):
    """Consecutive examples as the encoder takes them, from number `start` on."""

    start: int
    x: Float32

    @property
    def part(self) -> slice:
        return slice(self.start, self.start + len(self.x))


def blocks(manifest: Manifest, encoder: Operation, inputs: Any, batch_size: int | None) -> Iterator[Block]:
    """Inputs, all checked before the first is used, in the blocks in which they are encoded."""
    name = "images" if manifest.input.is_image else "vectors"
    require_plain_array(inputs, name)
    check_layout(inputs, manifest.input, name)
    is_bytes = inputs.dtype == np.uint8  # of which any value is good, and which as float32 takes four times the memory
    if not is_bytes:
        inputs = encoder.check(inputs)
    sides = image_size(inputs) if is_bytes else inputs.shape[2:]
    size = encoder.chunk_size(batch_size, (manifest.input.shape[0] or 0, *sides))
    return (Block(start, encoder.check(inputs[start : start + size])) for start in range(0, len(inputs), size))


class SharedNoise:
    """The same `n_samples` draws for every example, so that its estimate does not depend on what it comes with."""

    def __init__(self, seed: int | None, n_samples: int) -> None:
        self._sequence, self._n_samples = np.random.SeedSequence(check_seed(seed)), n_samples
        self._left = 0

    def draw(self, count: int, shape: tuple[int, ...]) -> Float32:
        """The next shape[0] draws for each of `count` examples -> (count, *shape), whose rows are all one."""
        if self._left == 0:
            self._stream, self._left = NormalStream(self._sequence), self._n_samples
        self._left -= shape[0]
        return np.broadcast_to(self._stream.draw(shape[0], shape[1:]), (count, *shape))


class Draws(NamedTuple):
    """s draws for each of k examples: noise and latents (k, s, *latent_shape), what they decode to (k, s, D)."""

    part: slice
    noise: Float32
    latents: Float32
    decoded: Float32


def posterior_draws(
    decoder: Operation, posterior: Posterior, n_samples: int, stream: NormalStream | SharedNoise, rows: int, total: int
) -> Iterator[Draws]:
    """`n_samples` draws from each posterior, decoded, at most `rows` at once; the whole call decodes `total`."""
    shape = posterior.mean.shape[1:]
    many, some = max(1, rows // n_samples), min(rows, n_samples)
    for first in range(0, len(posterior), many):
        part = slice(first, min(first + many, len(posterior)))
        mean, std = posterior.mean[part, None], np.exp(np.float32(0.5) * posterior.logvar[part, None])  # type: ignore[index]
        for done in range(0, n_samples, some):
            count = min(some, n_samples - done)
            noise = stream.draw(len(mean), (count, *shape))
            latents = mean + std * noise
            decoded = decoder.run(latents.reshape(-1, *shape), rows, total)[0]
            yield Draws(part, noise, latents, decoded.reshape(len(mean), count, -1))


@np.errstate(over="ignore", under="ignore", invalid="ignore")  # what overflows is infinite or NaN, as told
def elbo(
    manifest: Manifest, operations: Operations, inputs: Any, n_samples: int, seed: int | None, batch_size: int | None
) -> Float64:
    """As `VAE.elbo`."""
    likelihood, count = require_likelihood(manifest, "elbo"), check_count(n_samples, "n_samples")
    stream, results = NormalStream(seed), []
    for block, posterior, rows in encoded(manifest, operations, inputs, batch_size):
        x = comparable(manifest.input, targets(likelihood, block.x))
        sums = np.zeros(len(x))
        for draws in posterior_draws(operations[1], posterior, count, stream, rows, len(inputs) * count):
            sums[draws.part] += sums_of_log_likelihoods(likelihood, draws.decoded, x[draws.part]).sum(axis=1)
        results.append(sums / count - posterior.kl())
    return np.concatenate(results)


@np.errstate(over="ignore", under="ignore", invalid="ignore")  # and weights that are far below the largest are 0
def log_likelihood(
    manifest: Manifest,
    operations: Operations,
    inputs: Any,
    n_samples: int,
    seed: int | None,
    batch_size: int | None,
    progress: Progress | None = None,
    shared: bool = False,
) -> Float64:
    """As `VAE.log_likelihood`. shared: all examples take the same noise, see `SharedNoise`."""
    likelihood, count = require_likelihood(manifest, "log_likelihood"), check_count(n_samples, "n_samples")
    check_progress(progress)
    stream = SharedNoise(seed, count) if shared else NormalStream(seed)
    results, done = [], 0
    for block, posterior, rows in encoded(manifest, operations, inputs, batch_size):
        x = comparable(manifest.input, targets(likelihood, block.x))
        average = LogMeanExp(len(x))
        for draws in posterior_draws(operations[1], posterior, count, stream, rows, len(inputs) * count):
            weights = sums_of_log_likelihoods(likelihood, draws.decoded, x[draws.part])
            weights += _log_prior_over_posterior(draws, posterior)
            average.add(draws.part, weights)
            done += weights.size
            if progress is not None:
                progress(done, len(inputs) * count)
        results.append(average.result(count))
    return np.concatenate(results)


def encoded(
    manifest: Manifest, operations: Operations, inputs: Any, batch_size: int | None
) -> Iterator[tuple[Block, Posterior, int]]:
    """Block after block with its posteriors, and how many latents to decode at once."""
    encoder, decoder = operations
    for block in blocks(manifest, encoder, inputs, batch_size):
        posterior = Posterior(*encoder.run(block.x, len(block.x), len(inputs)))
        yield block, posterior, decoder.chunk_size(batch_size, posterior.mean.shape[1:])


def _log_prior_over_posterior(draws: Draws, posterior: Posterior) -> Float64:
    """log p(z) - log q(z|x) of draws z = mean + std · noise -> (k, s). The constants of both densities cancel."""
    k, s = draws.noise.shape[:2]
    noise, latents = (array.astype(np.float64).reshape(k, s, -1) for array in (draws.noise, draws.latents))
    logvar = posterior.logvar[draws.part].astype(np.float64).reshape(k, -1)  # type: ignore[index]
    squares = np.einsum("ksd,ksd->ks", noise, noise) - np.einsum("ksd,ksd->ks", latents, latents)
    return np.asarray(0.5 * (squares + logvar.sum(axis=1)[:, None]))


class LogMeanExp:
    """log of the mean of exp(weights), per row, where the weights come in parts."""

    def __init__(self, rows: int) -> None:
        self._peak = np.full(rows, -np.inf)
        self._sum = np.zeros(rows)

    def add(self, part: slice, weights: Float64) -> None:
        """Weights (k, s) of the rows `part`."""
        peak = np.maximum(self._peak[part], weights.max(axis=1))
        scaled = np.exp(weights - peak[:, None]).sum(axis=1)
        self._sum[part] = self._sum[part] * np.exp(self._peak[part] - peak) + scaled
        self._peak[part] = peak

    def result(self, count: int) -> Float64:
        """After `count` weights in each row."""
        return np.asarray(self._peak + np.log(self._sum) - math.log(count))


@np.errstate(over="ignore", invalid="ignore")  # what overflows is refused at the end
def reconstruct(
    manifest: Manifest, operations: Operations, inputs: Any, n_samples: int, seed: int | None, batch_size: int | None
) -> Reconstruction:
    """As `VAE.reconstruct` with `n_samples`. Parts are joined by their means and squared deviations, which loses no
    digits where the spread is small (Chan, Golub and LeVeque, 1983)."""
    if manifest.kind != "vae":
        raise KindError(
            f"n_samples is {n_samples!r}, which needs a distribution; {manifest.name} is a plain autoencoder"
        )
    count, stream, results = check_count(n_samples, "n_samples"), NormalStream(seed), []
    for block, posterior, rows in encoded(manifest, operations, inputs, batch_size):
        mean = np.zeros((len(block.x), block.x[0].size))
        deviations, seen, most = np.zeros_like(mean), np.zeros((len(mean), 1)), len(inputs) * count
        for part, _, _, decoded in posterior_draws(operations[1], posterior, count, stream, rows, most):
            new, own = decoded.shape[1], decoded.mean(axis=1, dtype=np.float64)
            share, shift = new / (seen[part] + new), own - mean[part]
            spread = np.square(decoded - own[:, None]).sum(axis=1)
            deviations[part] += spread + shift**2 * seen[part] * share
            mean[part] += shift * share
            seen[part] += new
        std = np.sqrt(deviations / count)
        results.append([array.astype(np.float32).reshape(block.x.shape) for array in (mean, std)])
    found = Reconstruction(*(np.concatenate(arrays) for arrays in zip(*results, strict=True)))
    require_finite(found.mean, "inputs", "reconstruction")
    return found
