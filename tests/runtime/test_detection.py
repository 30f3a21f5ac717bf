from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from vae_runtime.detection import auroc, average_precision
from vae_runtime.errors import InputError


def draw(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores, mostly with many ties, and labels of both kinds."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(2, 300))
    labels = rng.random(count) < rng.uniform(0.05, 0.95)
    labels[:2] = [True, False]
    scores = rng.normal(size=count) + labels * rng.uniform(-1, 2)
    return np.round(scores, int(rng.integers(0, 3))), labels


@pytest.mark.parametrize("seed", range(30))
def test_both_are_scikit_learns_with_ties(seed: int) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    scores, labels = draw(seed)
    assert auroc(scores, labels) == pytest.approx(metrics.roc_auc_score(labels, scores), abs=1e-12)
    expected = metrics.average_precision_score(labels, scores)
    assert average_precision(scores, labels.astype(np.int64)) == pytest.approx(expected, abs=1e-12)


def test_auroc_is_the_share_of_pairs_in_the_right_order() -> None:
    scores, labels = draw(99)
    pairs = scores[labels][:, None] - scores[~labels][None]
    assert auroc(scores, labels) == pytest.approx(((pairs > 0) + 0.5 * (pairs == 0)).mean(), abs=1e-12)


def test_known_answers() -> None:
    assert auroc([1, 2, 3, 4], [0, 0, 1, 1]) == average_precision([1, 2, 3, 4], [0, 0, 1, 1]) == 1
    assert auroc([4, 3, 2, 1], [0, 0, 1, 1]) == 0
    assert auroc([5, 5, 5, 5], [0, 1, 1, 0]) == average_precision([5, 5, 5, 5], [0, 1, 1, 0]) == 0.5
    assert average_precision([np.inf, 2.0, 1.0], [1, 0, 1]) == pytest.approx((1 + 2 / 3) / 2)


@pytest.mark.parametrize("measure", [auroc, average_precision])
@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([1.0, 2.0], [0, 1, 1], r"labels has shape \(3,\) for 2 examples; expected one label for each"),
        ([1.0, 2.0], [[0], [1]], r"labels has shape \(2, 1\) for 2 examples"),
        ([1.0, 2.0], [0, 2], "labels has 2; expected 1 or True for an anomaly"),
        ([1.0, 2.0], [0.0, 0.5], r"labels has 0\.5; expected 1 or True"),
        ([1.0, 2.0], ["0", "1"], "labels has '0'; expected 1 or True"),
        ([1.0, 2.0], [1, 1], "labels has 2 anomalies among 2 examples; expected some and not all"),
        ([1.0, 2.0], [False, False], "labels has 0 anomalies among 2 examples"),
        ([], [], "labels has 0 anomalies among 0 examples"),
        ([1.0, np.nan], [0, 1], "or has NaN; expected numbers without NaN"),
        ([[1.0, 2.0]], [0, 1], r"scores has shape \(1, 2\)"),
        (["a", "b"], [0, 1], "scores has shape .* dtype <U1"),
        (np.ma.array([1.0, 2.0], mask=[0, 1]), [0, 1], "scores is a masked array, whose mask would be lost"),
        ([1.0, 2.0], np.ma.array([0, 1], mask=[0, 1]), "labels is a masked array, whose mask would be lost"),
        ([1.0, 2.0], [[0], [1, 0]], "labels is no array: "),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(
    measure: Callable[[Any, Any], float], scores: Any, labels: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        measure(scores, labels)
