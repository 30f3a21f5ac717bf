"""How high anomaly scores are on data as they should be: quantiles, measured at export, by which a device decides."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, NamedTuple, TypeGuard

from .arguments import as_float
from .errors import BundleError, InputError, NotInBundleError
from .json_fields import count, is_number, mapping, text

SCORE_METHODS = ("elbo", "reconstruction", "log_likelihood")
LEAST_EXAMPLES = 100  # fewer say too little of the tail that thresholds lie in


class Calibration(NamedTuple):
    """Quantiles of `VAE.score` on validation data, in fp32.

    source: where the examples are from, "held-out" or "data". examples: how many. tile: as of `VAE.score`, of all of
        them.
    levels: rising from 0 to 1. scores: by method, the score that is not exceeded by that part of the examples.
    """

    source: str
    examples: int
    levels: tuple[float, ...]
    scores: Mapping[str, tuple[float, ...]]
    tile: int | None = None

    def threshold(self, method: str, quantile: float) -> float:
        """The score that a part `quantile` of the examples does not exceed, linear between the levels.

        Raises:
            InputError: `quantile` is not strictly between 0 and 1, or so high that these examples cannot tell it.
            NotInBundleError: this method was not calibrated.
        """
        if not 0 < as_float(quantile) < 1:
            raise InputError(f"quantile is {quantile!r}; expected a number above 0 and below 1")
        quantile = float(quantile)
        if quantile > 1 - 1 / self.examples:
            raise InputError(
                f"quantile is {quantile}; the bundle was calibrated on {self.examples} examples, which tell quantiles"
                f" up to {math.floor((1 - 1 / self.examples) * 1e4) / 1e4}"
            )
        if method not in self.scores:
            raise NotInBundleError(
                f"scores by {method!r} were not calibrated, only by {', '.join(self.scores)}; take such a method, or"
                " make the bundle again with: vae-export SOURCE --calibrate DATA"
            )
        values, index = self.scores[method], bisect_right(self.levels, quantile)
        low, high = self.levels[index - 1], self.levels[index]
        part = (quantile - low) / (high - low)
        return (1 - part) * values[index - 1] + part * values[index]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Calibration:
        tile = None if data.get("tile") is None else count(data, "calibration.tile")
        source, levels = text(data, "calibration.source"), data.get("levels")
        examples = count(data, "calibration.examples", LEAST_EXAMPLES)
        if not _rises(levels, strictly=True) or (levels[0], levels[-1]) != (0, 1):
            raise BundleError(f"calibration.levels is {levels!r}; expected numbers that rise from 0 to 1")
        given, scores = mapping(data, "calibration.scores"), {}
        if not given:
            raise BundleError("calibration.scores is {}; expected the scores of at least one method")
        for method in given:
            values = given[method]
            if not _rises(values, strictly=False) or len(values) != len(levels):
                rule = f"expected {len(levels)} finite numbers, none below the one before"
                raise BundleError(f"calibration.scores.{method} is {values!r}; {rule}")
            scores[method] = tuple(map(float, values))
        return cls(source, examples, tuple(map(float, levels)), scores, tile)

    def to_dict(self) -> dict[str, Any]:
        scores = {method: list(values) for method, values in self.scores.items()}
        tile = {} if self.tile is None else {"tile": self.tile}
        return {"source": self.source, "examples": self.examples, **tile, "levels": list(self.levels), "scores": scores}


def _rises(values: Any, strictly: bool) -> TypeGuard[list[float]]:
    if not isinstance(values, list) or len(values) < 2 or not all(map(is_number, values)):
        return False
    return all(a < b if strictly else a <= b for a, b in pairwise(values))
