"""How odd inputs look to a model, for anomaly detection: nothing here is random unless it is asked for."""

from __future__ import annotations

from typing import Any

import numpy as np

from .calibration import SCORE_METHODS
from .errors import InputError, NotInBundleError
from .evidence import Block, Float64, Operations, blocks, log_likelihood, require_likelihood
from .likelihood import comparable, negative_log_likelihoods, squared_norms, sums_of_log_likelihoods, targets
from .manifest import Likelihood, Manifest
from .posterior import Posterior
from .preprocess import Float32, zeros

_MAP_METHODS = ("reconstruction", "elbo")


def default_method(manifest: Manifest) -> str:
    """The method of `VAE.score` where none is named."""
    return "elbo" if manifest.kind == "vae" and manifest.likelihood is not None else "reconstruction"


class Scoring:
    """The scores of one bundle. operations: the encoder's and the decoder's."""

    def __init__(self, manifest: Manifest, operations: Operations) -> None:
        self._manifest, self._operations = manifest, operations

    def score(
        self, inputs: Any, method: str | None, n_samples: int, seed: int | None, batch_size: int | None
    ) -> Float64:
        """As `VAE.score`."""
        method = self._method(method)
        if method == "log_likelihood":
            return -log_likelihood(self._manifest, self._operations, inputs, n_samples, seed, batch_size)
        likelihood = require_likelihood(self._manifest, "score with method 'elbo'") if method == "elbo" else None
        results = []
        for block in blocks(self._manifest, self._operations[0], inputs, batch_size):
            posterior, decoded = self._reconstruct(block, len(inputs))
            results.append(self._score(block, posterior, decoded, likelihood))
        return np.concatenate(results)

    def score_map(self, inputs: Any, method: str, batch_size: int | None) -> Float32:
        """As `VAE.score_map`."""
        if not isinstance(method, str) or method not in _MAP_METHODS:
            raise InputError(f"method is {method!r}; expected one of {', '.join(_MAP_METHODS)}")
        likelihood = require_likelihood(self._manifest, "score_map with method 'elbo'") if method == "elbo" else None
        maps = None
        for block in blocks(self._manifest, self._operations[0], inputs, batch_size):
            _, decoded = self._reconstruct(block, len(inputs))
            if likelihood is None:
                terms = np.square(np.subtract(decoded, block.x, dtype=np.float64))
            else:
                terms = negative_log_likelihoods(likelihood, decoded, targets(likelihood, block.x))
            pixels = terms.sum(axis=1) if self._manifest.input.is_image else terms
            if maps is None:
                maps = zeros((len(inputs), *pixels.shape[1:]), "a map")
            maps[block.part] = pixels
        assert maps is not None  # there is an example
        return maps

    def threshold(self, method: str | None, quantile: float) -> float:
        """Above which score an input counts as an anomaly."""
        method, calibration = self._method(method), self._manifest.calibration
        if calibration is None:
            raise NotInBundleError(
                f"{self._manifest.name} was not calibrated, so that no score is known to be high; make the bundle again"
                " with: vae-export SOURCE --calibrate DATA"
            )
        return calibration.threshold(method, quantile)

    def _method(self, method: str | None) -> str:
        if method is None:
            return default_method(self._manifest)
        if not isinstance(method, str) or method not in SCORE_METHODS:
            raise InputError(f"method is {method!r}; expected one of {', '.join(SCORE_METHODS)}, or None")
        return method

    def _reconstruct(self, block: Block, examples: int) -> tuple[Posterior, Float32]:
        encoder, decoder = self._operations
        posterior = Posterior(*encoder.run(block.x, len(block.x), examples))
        return posterior, decoder.run(posterior.mean, len(block.x), examples)[0]

    def _score(self, block: Block, posterior: Posterior, decoded: Float32, likelihood: Likelihood | None) -> Float64:
        x, means = (comparable(self._manifest.input, array) for array in (block.x, decoded))
        if likelihood is None:
            return np.asarray(squared_norms(means - x).astype(np.float64) / x.shape[1])
        x = comparable(self._manifest.input, targets(likelihood, block.x))
        return posterior.kl() - sums_of_log_likelihoods(likelihood, means[:, None], x)[:, 0]
