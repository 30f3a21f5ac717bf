"""Confidence intervals that assume no distribution: latencies are skewed, with tails and several modes.

Median of one sample: order statistics, whose ranks follow the binomial distribution.
    J.-Y. Le Boudec, Performance Evaluation of Computer and Communication Systems, EPFL Press 2010, section 2.2 and
    appendix A; H. A. David and H. N. Nagaraja, Order Statistics, 3rd edition, Wiley 2003, section 7.1.
Ratio of paired values: the same interval of the pairs' ratios; below 6 pairs Student's t on their logarithms.
Shift between two samples: the interval that belongs to the rank-sum test, from the sorted pairwise differences.
    J. L. Hodges and E. L. Lehmann, Annals of Mathematical Statistics 34 (1963) 598-611; D. F. Bauer, Constructing
    confidence sets using rank statistics, Journal of the American Statistical Association 67 (1972) 687-690.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike


def median_ranks(count: int, confidence: float) -> tuple[int, int] | None:
    """Ranks, from 1, of the two order statistics that enclose the median of `count` independent values.

    The interval from the lower to the upper one holds the median with at least `confidence`. None where even the
    whole range does not: below 6 values at 0.95.
    """
    steps = np.arange(1, count // 2 + 1)
    log_probability = np.concatenate(([0.0], np.cumsum(np.log((count - steps + 1) / steps)))) - count * math.log(2)
    at_most = np.cumsum(np.exp(log_probability))  # P(Binomial(count, 1/2) <= k)
    lower = int(np.searchsorted(at_most, (1 - confidence) / 2 * (1 + 1e-9), side="right"))
    return (lower, count + 1 - lower) if lower >= 1 else None


def median_interval(values: ArrayLike, confidence: float) -> tuple[float, float] | None:
    """The interval of the median of independent `values`, in their unit; None where they are too few."""
    ordered = np.sort(np.asarray(values, np.float64))
    ranks = median_ranks(len(ordered), confidence)
    return None if ranks is None else (float(ordered[ranks[0] - 1]), float(ordered[ranks[1] - 1]))


# The 97.5% quantiles of Student's t for 3, 4 and 5 values.
_STUDENT_T = {3: 4.3027, 4: 3.1824, 5: 2.7764}


def paired_ratio(a: Sequence[float], b: Sequence[float]) -> tuple[float, float | None, float | None, str]:
    """How many times larger the values of `b` are than those of `a`, pair by pair: the median ratio, and the two ends
    of its 95% interval with where they come from.

    "rounds": order statistics, which assume no distribution; from 6 pairs on. "t": Student's t, which takes the
    logarithms for normally distributed; 3 to 5 pairs. "none": fewer pairs, no interval.
    """
    logs = np.log(np.asarray(b, np.float64)) - np.log(np.asarray(a, np.float64))
    ratio = float(np.exp(np.median(logs)))
    interval, source = median_interval(logs, 0.95), "rounds"
    if interval is None and len(logs) in _STUDENT_T:
        half = _STUDENT_T[len(logs)] * float(logs.std(ddof=1)) / math.sqrt(len(logs))
        interval, source = (float(logs.mean()) - half, float(logs.mean()) + half), "t"
    if interval is None:
        return ratio, None, None, "none"
    return ratio, math.exp(interval[0]), math.exp(interval[1]), source


def smallest_count(quantile: float, confidence: float) -> int:
    """How many values it takes until order statistics bound a quantile from both sides at `confidence`.

    Below it, the largest value seen may well lie under the quantile: 36 for p90 and 368 for p99 at 0.95.
    """
    return math.ceil(math.log((1 - confidence) / 2) / math.log(max(quantile, 1 - quantile)))


def shift_interval(a: Sequence[float], b: Sequence[float], confidence: float) -> tuple[float, float, float] | None:
    """How much larger values of `b` are than those of `a`: the Hodges-Lehmann estimate and its interval's two ends.

    Exact for independent values without ties. None where they are too few for `confidence`.
    """
    differences = sorted(y - x for x, y in itertools.product(a, b))
    lower = _rank_sum_ranks(len(a), len(b), confidence)
    if lower < 1:
        return None
    return float(np.median(differences)), differences[lower - 1], differences[-lower]


def rounds_for_shift(confidence: float, most: int) -> int | None:
    """How many values both samples of one size need until `shift_interval` has an interval; None where `most` are too
    few."""
    # U is 0 in one order alone.
    return next((count for count in range(1, most + 1) if _most_orders(count, count, confidence) >= 1), None)


def _rank_sum_ranks(m: int, n: int, confidence: float) -> int:
    """The largest c with 2·P(U <= c - 1) <= 1 - confidence, U the Mann-Whitney statistic of samples of m and n."""
    total, limit = 0, _most_orders(m, n, confidence)
    for rank, ways in enumerate(_mann_whitney_counts(m, n)):
        total += ways
        if total > limit:
            return rank
    return 0


def _most_orders(m: int, n: int, confidence: float) -> float:
    """In how many of all orders the true shift may lie outside of an interval, to one side."""
    return (1 - confidence) / 2 * (1 + 1e-9) * math.comb(m + n, m)


@functools.cache
def _mann_whitney_counts(m: int, n: int) -> tuple[int, ...]:
    """In how many of the comb(m + n, m) orders U is 0, 1, ..., m·n: the coefficients of the Gaussian binomial."""
    counts = [1] + [0] * (m * n)
    for i in range(1, m + 1):
        for u in range(m * n, n + i - 1, -1):
            counts[u] -= counts[u - n - i]
        for u in range(i, m * n + 1):
            counts[u] += counts[u - i]
    return tuple(counts)
