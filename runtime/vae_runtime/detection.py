"""How well anomaly scores tell anomalies from the rest, where labels say which are which."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import InputError
from .preprocess import Float64, require_unmasked


def auroc(scores: Any, labels: Any) -> float:
    """The area under the receiver operating characteristic: the chance that an anomaly has a higher score than what is
    none, equal scores counted half (Hanley and McNeil, 1982). 0.5 is chance, 1 perfect.

    scores: (N,), higher = more anomalous. labels: (N,), True or 1 for an anomaly, False or 0 for none.

    Raises:
        InputError: the two do not match, a score is NaN, a label is neither, or only one of both is there.
    """
    positives, negatives = _thresholds(scores, labels)
    total = positives.sum() * negatives.sum()
    above = np.concatenate([[0], np.cumsum(positives)[:-1]])  # anomalies with a score above each
    return float(((above + 0.5 * positives) * negatives).sum() / total)


def average_precision(scores: Any, labels: Any) -> float:
    """The precision at each threshold, weighted by the anomalies that it finds beyond the threshold above: the area
    under the precision-recall curve, without interpolation. Chance is the share of anomalies, 1 perfect.

    scores, labels: as for `auroc`, likewise what is raised.
    """
    positives, negatives = _thresholds(scores, labels)
    found = np.cumsum(positives)
    precision = found / (found + np.cumsum(negatives))
    return float((precision * positives).sum() / found[-1])


def check_labels(labels: Any, count: int, name: str = "labels") -> NDArray[np.bool_]:
    """Labels of `count` examples, both kinds among them -> bool (N,), True for an anomaly. name: for messages.

    Raises:
        InputError: see `auroc`.
    """
    array = _array(labels, name)
    if array.shape != (count,):
        raise InputError(f"{name} has shape {array.shape} for {count} examples; expected one label for each")
    if array.dtype.kind not in "biuf" or not np.isin(array, (0, 1)).all():
        rule = "expected 1 or True for an anomaly, 0 or False for none"
        wrong = array[~np.isin(array, (0, 1))] if array.dtype.kind in "biuf" else array
        raise InputError(f"{name} has {wrong[0].item() if count else None!r}; {rule}")
    found = array.astype(bool)
    if found.all() or not found.any():
        raise InputError(f"{name} has {found.sum()} anomalies among {count} examples; expected some and not all")
    return found


def _array(values: Any, name: str) -> NDArray[Any]:
    """Of a sequence, or an array without a mask, which would be lost."""
    if isinstance(values, np.ndarray):
        require_unmasked(values, name)
    try:
        return np.asarray(values)
    except ValueError as error:  # rows of different lengths
        raise InputError(f"{name} is no array: {error}") from None


def _thresholds(scores: Any, labels: Any) -> tuple[Float64, Float64]:
    """How many anomalies, and how many others, have each score, from the highest on."""
    values = _array(scores, "scores")
    if values.ndim != 1 or values.dtype.kind not in "biuf" or np.isnan(values).any():
        rule = "expected numbers without NaN, (N,)"
        raise InputError(f"scores has shape {values.shape} and dtype {values.dtype}, or has NaN; {rule}")
    is_anomaly = check_labels(labels, len(values))
    distinct, place = np.unique(values, return_inverse=True)
    positives = np.bincount(place[is_anomaly], minlength=len(distinct))[::-1]
    negatives = np.bincount(place[~is_anomaly], minlength=len(distinct))[::-1]
    return positives.astype(np.float64), negatives.astype(np.float64)
