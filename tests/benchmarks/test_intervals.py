"""The intervals against exact counting, published tables, and their promised coverage."""

from __future__ import annotations

import itertools
import math
from statistics import NormalDist

import numpy as np
import pytest

from vae_benchmarks.intervals import (
    _mann_whitney_counts,
    _rank_sum_ranks,
    median_interval,
    median_ranks,
    paired_ratio,
    rounds_for_shift,
    shift_interval,
    smallest_count,
)
from vae_benchmarks.settings import Settings


def exact_coverage(count: int, lower: int) -> float:
    """P(x_(lower) <= median <= x_(count + 1 - lower)), in whole numbers."""
    return 1 - 2 * sum(math.comb(count, k) for k in range(lower)) / 2**count


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_median_ranks_are_the_narrowest_that_cover(confidence: float) -> None:
    for count in range(1, 200):
        ranks = median_ranks(count, confidence)
        if ranks is None:
            assert exact_coverage(count, 1) < confidence
            continue
        lower, upper = ranks
        assert lower + upper == count + 1
        assert exact_coverage(count, lower) >= confidence - 1e-12
        assert lower + 1 > upper - 1 or exact_coverage(count, lower + 1) < confidence


@pytest.mark.parametrize(
    ("count", "ranks"), [(6, (1, 6)), (9, (2, 8)), (10, (2, 9)), (20, (6, 15)), (30, (10, 21)), (50, (18, 33))]
)
def test_median_ranks_as_tabulated(count: int, ranks: tuple[int, int]) -> None:
    assert median_ranks(count, 0.95) == ranks


def test_by_default_one_disturbed_round_spoils_no_row() -> None:
    """And no fewer rounds are enough for that."""
    rounds = Settings().rounds
    quiet = [1.0 + number / 1000 for number in range(rounds - 1)]
    for disturbed in (100.0, 0.01):
        low, high = median_interval([*quiet, disturbed], Settings().confidence) or (0, 0)
        assert min(quiet) <= low <= high <= max(quiet)
    assert median_ranks(rounds - 1, Settings().confidence) == (1, rounds - 1)


def test_median_ranks_of_a_single_and_of_no_value() -> None:
    assert median_ranks(1, 0.95) is None
    assert median_ranks(0, 0.95) is None
    assert median_interval([1.0, 2.0], 0.95) is None


@pytest.mark.parametrize("count", [100_000, 1_000_001])
def test_median_ranks_of_large_samples_follow_the_normal_law(count: int) -> None:
    lower, _ = median_ranks(count, 0.95) or (0, 0)
    assert lower == pytest.approx(count / 2 - NormalDist().inv_cdf(0.975) * math.sqrt(count) / 2, abs=2)


@pytest.mark.parametrize("shape", ["lognormal", "bimodal"])
def test_median_interval_covers_as_promised(shape: str) -> None:
    rng = np.random.default_rng(0)
    draws = rng.lognormal(0, 1, (3000, 25))
    if shape == "bimodal":  # as when a core is sometimes shared
        draws = np.where(rng.random(draws.shape) < 0.3, draws + 5, draws)
    true_median = 1.0 if shape == "lognormal" else float(np.median(_many_bimodal()))
    intervals = [median_interval(row, 0.95) or (math.nan, math.nan) for row in draws]
    covered = np.mean([low <= true_median <= high for low, high in intervals])
    assert 0.95 - 0.012 < covered < 0.98  # the exact coverage of 25 values is 0.957


def _many_bimodal() -> np.ndarray:
    rng = np.random.default_rng(1)
    draws = rng.lognormal(0, 1, 2_000_000)
    return np.where(rng.random(len(draws)) < 0.3, draws + 5, draws)


def test_smallest_count() -> None:
    assert [smallest_count(q, 0.95) for q in (0.5, 0.9, 0.99)] == [6, 36, 368]
    assert median_ranks(smallest_count(0.5, 0.95), 0.95) is not None
    assert median_ranks(smallest_count(0.5, 0.95) - 1, 0.95) is None


@pytest.mark.parametrize(("m", "n"), [(1, 1), (2, 3), (3, 2), (4, 4), (3, 6)])
def test_mann_whitney_counts_by_enumeration(m: int, n: int) -> None:
    counts = [0] * (m * n + 1)
    for places in itertools.combinations(range(m + n), m):
        counts[sum(places) - m * (m - 1) // 2] += 1
    assert _mann_whitney_counts(m, n) == tuple(counts)


@pytest.mark.parametrize(("size", "critical"), [(4, 0), (5, 2), (6, 5), (7, 8), (8, 13), (10, 23), (15, 64), (20, 127)])
def test_rank_sum_ranks_as_tabulated(size: int, critical: int) -> None:
    """The critical values of U, two-sided, 5%, in every table of the Mann-Whitney test."""
    assert _rank_sum_ranks(size, size, 0.95) == critical + 1


def test_shift_interval_of_few_values() -> None:
    assert shift_interval([1, 2, 3], [4, 5, 6], 0.95) is None
    estimate, low, high = shift_interval([1, 2, 3, 4], [11, 12, 13, 14], 0.95) or (0, 0, 0)
    assert (estimate, low, high) == (10, 7, 13)


@pytest.mark.parametrize(("confidence", "count"), [(0.95, 4), (0.995, 6), (1 - 0.05 / 300, 8), (1 - 0.05 / 330, 9)])
def test_the_fewest_rounds_with_an_interval(confidence: float, count: int) -> None:
    assert rounds_for_shift(confidence, 100) == rounds_for_shift(confidence, count) == count
    assert rounds_for_shift(confidence, count - 1) is None
    assert shift_interval(range(count), range(count), confidence) is not None
    assert shift_interval(range(count - 1), range(count - 1), confidence) is None


def test_shift_interval_covers_as_promised() -> None:
    rng = np.random.default_rng(2)
    covered = []
    for _ in range(2000):
        a, b = rng.lognormal(0, 0.5, 8).tolist(), (rng.lognormal(0, 0.5, 8) + 0.7).tolist()
        _, low, high = shift_interval(a, b, 0.95) or (0, 1, 0)
        covered.append(low <= 0.7 <= high)
    assert 0.95 - 0.015 < np.mean(covered) < 0.98


def test_paired_ratios() -> None:
    level = np.exp(np.random.default_rng(0).normal(size=12))  # drift that both share
    ratio, low, high, source = paired_ratio(level, 2 * level * (1 + 0.01 * np.sin(np.arange(12))))
    assert (ratio, source) == (pytest.approx(2, rel=0.01), "rounds")
    assert low is not None
    assert high is not None
    assert 1.97 < low <= ratio <= high < 2.03
    assert paired_ratio([1, 1, 1, 1], [2, 2, 2, 2]) == (pytest.approx(2), pytest.approx(2), pytest.approx(2), "t")
    # Logarithms 0, 1, 2: mean 1, standard error 1/√3, 4.3027 of which to each side.
    _, low, high, source = paired_ratio([1, 1, 1], [1, np.e, np.e**2])
    assert (np.log(low or 0), np.log(high or 0)) == (
        pytest.approx(1 - 2.4842, abs=1e-3),
        pytest.approx(1 + 2.4842, abs=1e-3),
    )
    assert paired_ratio([1, 1], [3, 3]) == (pytest.approx(3), None, None, "none")
