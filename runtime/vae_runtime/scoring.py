"""How anomalous inputs look to a model: nothing here is random unless it is asked for."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .arguments import check_choice
from .bound import BOUND_VALUES, Kept
from .bound_score import BoundScore
from .calibration import SCORE_METHODS
from .errors import InputError, NotInBundleError
from .evidence import Operations, encoded, log_likelihood, require_likelihood
from .image_sizes import padded
from .likelihood import comparable, negative_log_likelihoods, squared_norms, sums_of_log_likelihoods, targets
from .manifest import Likelihood, Manifest
from .posterior import Posterior
from .preprocess import Float32, Float64, image_size, to_model_input, zeros

if TYPE_CHECKING:
    from .tiled import Tiler
    from .tiling import Progress

_MEAN_METHODS = ("reconstruction", "elbo")  # of the posterior's mean alone, pixel by pixel
_STRIP_VALUES = 2**20  # of an image in tiles, whose differences are in memory at once


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


class Coverage(NamedTuple):
    """Which part of images is scored, and how the model goes through them.

    size: (height, width) before they were padded, as only that part is scored; None: they were not. tiler: goes window
        by window; None: an image is taken whole.
    """

    size: tuple[int, int] | None = None
    tiler: Tiler | None = None


WHOLE = Coverage()


class _Piece(NamedTuple):
    """Consecutive examples, or some rows of one, as the encoder takes them, and what they were decoded to; padding is
    cut off.

    examples, rows: which these are. posterior: of these examples, in the rows of the latents that become these.
    """

    examples: slice
    rows: slice
    x: Float32
    decoded: Float32
    posterior: Posterior


class Scoring:
    """The scores of one bundle. operations: the encoder's and the decoder's."""

    def __init__(self, manifest: Manifest, operations: Operations) -> None:
        self._manifest, self._operations = manifest, operations
        self._default = default_method(manifest)
        self._kept: Kept[BoundScore] = Kept()  # by method and shape

    def cover(
        self, inputs: Any, batch_size: int | None, pad: bool, tile: int | None, progress: Progress | None
    ) -> tuple[Any, Coverage]:
        """The inputs, padded where that is asked for, and how they are gone through."""
        inputs, size = padded(self._manifest, inputs, pad)
        if size is not None and image_size(inputs) == size:
            size = None
        if tile is not None or progress is not None:
            from .tiled import Tiler  # late: only large images need it

            return inputs, Coverage(size, Tiler(self._manifest, self._operations, tile, batch_size, progress))
        return inputs, WHOLE if size is None else Coverage(size)

    def score(
        self,
        inputs: Any,
        method: str | None,
        n_samples: int,
        seed: int | None,
        batch_size: int | None,
        coverage: Coverage = WHOLE,
    ) -> Float64:
        """As `VAE.score`."""
        method = self._default if method is None else check_choice(method, "method", SCORE_METHODS)
        if method != "log_likelihood":
            # What overflows is infinite below; only vectors may be so large, and images are spared what this costs.
            with nullcontext() if self._manifest.input.is_image else np.errstate(over="ignore", invalid="ignore"):
                found = self._score_of_mean(inputs, method, batch_size, coverage)
        else:
            require_likelihood(self._manifest, "log_likelihood")
            if coverage is not WHOLE:
                raise InputError(
                    "pad, tile or progress was given with method 'log_likelihood', which decodes draws of whole images;"
                    " take 'elbo' or 'reconstruction'"
                )
            found = -log_likelihood(self._manifest, self._operations, inputs, n_samples, seed, batch_size, shared=True)
        found[np.isnan(found)] = np.inf  # where the model's numbers overflow: NaN would be above no threshold
        return found

    def _score_of_mean(self, inputs: Any, method: str, batch_size: int | None, coverage: Coverage) -> Float64:
        """By one of `_MEAN_METHODS`."""
        likelihood = require_likelihood(self._manifest, "score with method 'elbo'") if method == "elbo" else None
        if batch_size is None and coverage is WHOLE:
            found = self._score_at_once(inputs, method, likelihood)
            if found is not None:
                return found
        sums: Float64 | None = None
        for piece in self._pieces(inputs, batch_size, coverage):
            sums = np.zeros(len(inputs)) if sums is None else sums
            sums[piece.examples] += self._sum(piece, likelihood)
        assert sums is not None  # there is an example
        return sums if likelihood is not None else sums / math.prod(self._shape(inputs, coverage))

    def score_map(self, inputs: Any, method: str, batch_size: int | None, coverage: Coverage = WHOLE) -> Float32:
        """As `VAE.score_map`."""
        method, manifest, maps = check_choice(method, "method", _MEAN_METHODS), self._manifest, None
        likelihood = require_likelihood(manifest, "score_map with method 'elbo'") if method == "elbo" else None
        for examples, rows, x, decoded, _ in self._pieces(inputs, batch_size, coverage):
            with np.errstate(over="ignore", invalid="ignore"):  # what overflows is infinite
                target = targets(manifest.likelihood, x)
                if likelihood is None:
                    terms = np.square(np.subtract(decoded, target, dtype=np.float64))
                else:
                    terms = negative_log_likelihoods(likelihood, decoded, target)
                terms = (terms.sum(axis=1) if manifest.input.is_image else terms).astype(np.float32)
            terms[np.isnan(terms)] = np.inf
            if maps is None:
                shape = self._shape(inputs, coverage)
                maps = zeros((len(inputs), *shape[1 if manifest.input.is_image else 0 :]), "a map")
            maps[examples, rows] = terms
        assert maps is not None  # there is an example
        return maps

    def threshold(self, quantile: float, method: str | None, tile: int | None) -> float:
        """As `VAE.threshold`."""
        method = self._default if method is None else check_choice(method, "method", SCORE_METHODS)
        calibration = self._manifest.calibration
        if calibration is None:
            raise NotInBundleError(
                f"{self._manifest.name} was not calibrated, so that no score is known to be high; make the bundle again"
                " with: vae-export SOURCE --calibrate DATA"
            )
        if self._manifest.input.is_free and method not in calibration.scores:
            raise NotInBundleError(
                f"scores by {method!r} grow with the size of an image, which {self._manifest.name} leaves free, so that"
                f" none is known to be high; take {' or '.join(map(repr, calibration.scores))}"
            )
        tiling = self._manifest.tiling
        is_exact = tiling is None or not (tiling.encoder.context is None or tiling.decoder.context is None)
        if tile != calibration.tile and not is_exact:
            raise InputError(
                f"tile is {tile}, and {self._manifest.name} was calibrated with tile {calibration.tile}; its tiles are"
                " an approximation, which changes scores: take the same, or make the bundle again with: vae-export"
                " SOURCE --calibrate DATA --calibrate-tile PIXELS"
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
        call = self._kept.take(key) or self._bound(inputs.shape, likelihood)
        if call is None:
            return None
        result = call(inputs)
        self._kept.keep(key, call)
        return result

    def _bound(self, shape: tuple[int, ...], likelihood: Likelihood | None) -> BoundScore | None:
        encoder, decoder = self._operations
        if not encoder.gains_from_bound_memory(shape):
            return None
        if not decoder.gains_from_bound_memory((shape[0], *self._manifest.latent_shape(shape[1:]))):
            return None
        return BoundScore(self._manifest, self._operations, shape, likelihood)

    def _shape(self, inputs: Any, coverage: Coverage) -> tuple[int, ...]:
        """Of one of the inputs, which are known to be good, as the encoder takes it; without padding."""
        spec = self._manifest.input
        if not spec.is_image:
            return tuple(inputs.shape[1:])
        return (spec.example_shape[0], *(coverage.size or image_size(inputs)))

    def _pieces(self, inputs: Any, batch_size: int | None, coverage: Coverage) -> Iterator[_Piece]:
        if coverage.tiler is not None:
            return self._strips(inputs, coverage, coverage.tiler)
        return self._blocks(inputs, batch_size, coverage)

    def _blocks(self, inputs: Any, batch_size: int | None, coverage: Coverage) -> Iterator[_Piece]:
        for block, posterior, _ in encoded(self._manifest, self._operations, inputs, batch_size):
            x, decoded = block.x, self._operations[1].run(posterior.mean, len(block.x), len(inputs))[0]
            if coverage.size is not None:
                height, width = coverage.size
                x, decoded = (images[..., :height, :width] for images in (x, decoded))
            yield _Piece(block.part, slice(None), x, decoded, posterior)

    def _strips(self, inputs: Any, coverage: Coverage, tiler: Tiler) -> Iterator[_Piece]:
        """Some rows at once: memory is that of the reconstruction, and not of all that is computed from it."""
        reconstructed = tiler.reconstruct_each(inputs, coverage.size)
        channels, height, width = self._shape(inputs, coverage)
        factor, spec = self._manifest.input.multiple_of, self._manifest.input._replace(multiple_of=1)
        cells = max(1, _STRIP_VALUES // (channels * width * factor))  # rows of latents
        for number, (outputs, image) in enumerate(reconstructed):
            example = slice(number, number + 1)
            for start in range(0, outputs[0].shape[2], cells):
                rows = slice(start * factor, min((start + cells) * factor, height))
                strip = inputs[example, rows, :width] if inputs.dtype == np.uint8 else inputs[example, :, rows, :width]
                posterior = Posterior(*(output[:, :, start : start + cells] for output in outputs))
                yield _Piece(example, rows, to_model_input(strip, spec), image[:, :, rows], posterior)

    def _sum(self, piece: _Piece, likelihood: Likelihood | None) -> Float64:
        """What these examples, or rows, add to the score; by "reconstruction", to the sum that it is the mean of."""
        target = targets(self._manifest.likelihood, piece.x)
        x, means = (comparable(self._manifest.input, array) for array in (target, piece.decoded))
        if likelihood is None:
            return squared_norms(means - x).astype(np.float64)
        return piece.posterior.kl() - sums_of_log_likelihoods(likelihood, means[:, None], x)[:, 0]
