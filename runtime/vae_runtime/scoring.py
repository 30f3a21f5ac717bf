"""How odd inputs look to a model, for anomaly detection: nothing here is random unless it is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .arguments import check_choice
from .bound_score import BoundScore
from .calibration import SCORE_METHODS
from .errors import InputError, NotInBundleError
from .evidence import Operations, blocks, log_likelihood, require_likelihood
from .likelihood import comparable, negative_log_likelihoods, squared_norms, sums_of_log_likelihoods, targets
from .manifest import Likelihood, Manifest
from .posterior import Posterior
from .preprocess import Float32, Float64, zeros
from .session import BOUND_VALUES

if TYPE_CHECKING:
    from .tiled import Tiler

_MEAN_METHODS = ("reconstruction", "elbo")  # of the posterior's mean alone, pixel by pixel
_KEPT_SHAPES = 8  # whose memory is kept for the next call, by method


def default_method(manifest: Manifest) -> str:
    """The method of `VAE.score` where none is named: by the kind of likelihood, the one that found left-out digits best
    in benchmarks/results/anomalies.md; of free sizes, the one that compares between them."""
    if manifest.kind != "vae" or manifest.likelihood is None or manifest.input.is_free:
        return "reconstruction"
    return "reconstruction" if manifest.likelihood.type == "bernoulli" else "elbo"


def score_methods(manifest: Manifest, whole: bool = True) -> tuple[str, ...]:
    """The methods that this bundle has what they need for. whole: images are neither padded nor in tiles."""
    if manifest.kind != "vae" or manifest.likelihood is None:
        return ("reconstruction",)
    return SCORE_METHODS if whole else tuple(name for name in SCORE_METHODS if name in _MEAN_METHODS)


class Extent(NamedTuple):
    """How images are gone through. size: (height, width) before they were padded, of which the scores are; None: all
    of them. tiler: for windows; None: as a whole."""

    size: tuple[int, int] | None = None
    tiler: Tiler | None = None


WHOLE = Extent()


class _Reconstructed(NamedTuple):
    """Consecutive examples, as the encoder takes them, with what became of them; padding is cut off."""

    part: slice
    x: Float32
    posterior: Posterior
    decoded: Float32


class Scoring:
    """The scores of one bundle. operations: the encoder's and the decoder's."""

    def __init__(self, manifest: Manifest, operations: Operations) -> None:
        self._manifest, self._operations = manifest, operations
        self._default = default_method(manifest)
        self._free: dict[tuple[str, tuple[int, ...]], list[BoundScore]] = {}

    def score(
        self,
        inputs: Any,
        method: str | None,
        n_samples: int,
        seed: int | None,
        batch_size: int | None,
        extent: Extent = WHOLE,
    ) -> Float64:
        """As `VAE.score`."""
        found = self._score(inputs, method, n_samples, seed, batch_size, extent)
        found[np.isnan(found)] = np.inf  # the model's numbers overflow: nothing is odder, and NaN is above no threshold
        return found

    def _score(
        self,
        inputs: Any,
        method: str | None,
        n_samples: int,
        seed: int | None,
        batch_size: int | None,
        extent: Extent,
    ) -> Float64:
        method = self._default if method is None else check_choice(method, "method", SCORE_METHODS)
        if method == "log_likelihood":
            if extent != WHOLE:
                raise InputError(
                    "pad, tile or progress was given with method 'log_likelihood', which decodes draws of whole images;"
                    " take 'elbo' or 'reconstruction'"
                )
            return -log_likelihood(self._manifest, self._operations, inputs, n_samples, seed, batch_size, shared=True)
        likelihood = require_likelihood(self._manifest, "score with method 'elbo'") if method == "elbo" else None
        if batch_size is None and extent is WHOLE:
            found = self._score_at_once(inputs, method, likelihood)
            if found is not None:
                return found
        parts = self._reconstruct(inputs, batch_size, extent)
        return np.concatenate([self._score_part(part, likelihood) for part in parts])

    def score_map(self, inputs: Any, method: str, batch_size: int | None, extent: Extent = WHOLE) -> Float32:
        """As `VAE.score_map`."""
        method, manifest, maps = check_choice(method, "method", _MEAN_METHODS), self._manifest, None
        likelihood = require_likelihood(manifest, "score_map with method 'elbo'") if method == "elbo" else None
        for part, x, _, decoded in self._reconstruct(inputs, batch_size, extent):
            if likelihood is None:
                terms = np.square(np.subtract(decoded, x, dtype=np.float64))
            else:
                terms = negative_log_likelihoods(likelihood, decoded, targets(likelihood, x))
            pixels = terms.sum(axis=1) if manifest.input.is_image else terms
            if maps is None:
                maps = zeros((len(inputs), *pixels.shape[1:]), "a map")
            maps[part] = pixels
        assert maps is not None  # there is an example
        return maps

    def threshold(self, quantile: float, method: str | None) -> float:
        """As `VAE.threshold`."""
        method = self._default if method is None else check_choice(method, "method", SCORE_METHODS)
        calibration = self._manifest.calibration
        if calibration is None:
            raise NotInBundleError(
                f"{self._manifest.name} was not calibrated, so that no score is known to be high; make the bundle again"
                " with: vae-export SOURCE --calibrate DATA"
            )
        return calibration.threshold(method, quantile)

    def _score_at_once(self, inputs: Any, method: str, likelihood: Likelihood | None) -> Float64 | None:
        """In memory that is bound to it; None where that would gain nothing, or something is wrong with the inputs.

        Which it is depends on the inputs alone: sums in blocks differ from these in the last digits.
        """
        if type(inputs) is not np.ndarray or inputs.size > BOUND_VALUES:
            return None
        if inputs.dtype == np.uint8:
            inputs = self._operations[0].channels_first(inputs)
        elif inputs.dtype != np.float32:
            return None
        if inputs is None:
            return None
        key = method, inputs.shape
        try:
            call: BoundScore | None = self._free[key].pop()  # what is popped no other thread has
        except (KeyError, IndexError):
            call = self._bound(inputs.shape, likelihood)
        if call is None:
            return None
        result = call(inputs)
        if key in self._free or len(self._free) < _KEPT_SHAPES:
            self._free.setdefault(key, []).append(call)
        return result

    def _bound(self, shape: tuple[int, ...], likelihood: Likelihood | None) -> BoundScore | None:
        encoder, decoder = self._operations
        if not encoder.gains_from_bound_memory(shape):
            return None
        if not decoder.gains_from_bound_memory((shape[0], *self._manifest.latent_shape(shape[1:]))):
            return None
        return BoundScore(self._manifest, self._operations, shape, likelihood)

    def _reconstruct(self, inputs: Any, batch_size: int | None, extent: Extent) -> Iterator[_Reconstructed]:
        encoder, decoder = self._operations
        height, width = extent.size or (None, None)

        def cut(images: Float32) -> Float32:
            return images if extent.size is None else images[..., :height, :width]

        if extent.tiler is not None:
            for number, (outputs, image) in enumerate(extent.tiler.reconstruct_each(inputs, extent.size)):
                part = slice(number, number + 1)
                yield _Reconstructed(part, cut(encoder.check(inputs[part])), Posterior(*outputs), image)
            return
        for block in blocks(self._manifest, encoder, inputs, batch_size):
            posterior = Posterior(*encoder.run(block.x, len(block.x), len(inputs)))
            decoded = decoder.run(posterior.mean, len(block.x), len(inputs))[0]
            yield _Reconstructed(block.part, cut(block.x), posterior, cut(decoded))

    def _score_part(self, part: _Reconstructed, likelihood: Likelihood | None) -> Float64:
        x, means = (comparable(self._manifest.input, array) for array in (part.x, part.decoded))
        if likelihood is None:
            return np.asarray(squared_norms(means - x).astype(np.float64) / x.shape[1])
        x = comparable(self._manifest.input, targets(likelihood, part.x))
        return part.posterior.kl() - sums_of_log_likelihoods(likelihood, means[:, None], x)[:, 0]
