"""log p(x|z) against its formulas in float64, written out here."""

from __future__ import annotations

import math

import numpy as np
import pytest

from vae_runtime.likelihood import (
    comparable,
    negative_log_likelihood,
    negative_log_likelihoods,
    sums_of_log_likelihoods,
    targets,
)
from vae_runtime.manifest import InputSpec, Likelihood

TINY = float(np.finfo(np.float32).tiny)
BERNOULLI = Likelihood("bernoulli", binarize="none")
LIKELIHOODS = [BERNOULLI, Likelihood("gaussian", scale=0.07), Likelihood("laplace", scale=0.2)]


def by_hand(likelihood: Likelihood, mean: float, x: float) -> float:
    """-log p(x) of one element."""
    if likelihood.type == "bernoulli":
        p = min(max(mean, TINY), 1 - 2.0**-24)
        return -x * math.log(p) - (1 - x) * math.log1p(-p)
    assert likelihood.scale is not None
    if likelihood.type == "laplace":
        return abs(x - mean) / likelihood.scale + math.log(2 * likelihood.scale)
    return (x - mean) ** 2 / (2 * likelihood.scale**2) + math.log(likelihood.scale) + math.log(2 * math.pi) / 2


def hard_cases() -> tuple[np.ndarray, np.ndarray]:
    """Probabilities at both ends and all magnitudes with grey, black and white pixels."""
    rng = np.random.default_rng(3)
    p = np.concatenate([
        [0, 1, TINY / 2, TINY, 1 - 2.0**-24, 0.5],
        10.0 ** rng.uniform(-38, 0, 60), 1 - 10.0 ** rng.uniform(-7.2, 0, 60), rng.random(60),
    ]).astype(np.float32)  # fmt: skip
    x = np.concatenate([np.tile([0, 1, 0.25], 20), rng.random(len(p) - 60)]).astype(np.float32)
    p, x = np.meshgrid(p, x)
    return p.astype(np.float32), x.astype(np.float32)


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=lambda one: one.type)
def test_every_element_is_that_of_the_formula(likelihood: Likelihood) -> None:
    mean, x = hard_cases()
    found = negative_log_likelihoods(likelihood, mean, x)
    expected = np.vectorize(lambda m, t: by_hand(likelihood, m, t))(mean.astype(np.float64), x.astype(np.float64))
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    np.testing.assert_allclose(negative_log_likelihood(likelihood, mean, x), expected.sum(axis=1), rtol=1e-12)


def test_certain_and_wrong_costs_what_the_clip_says() -> None:
    ends = np.array([[0.0], [1.0]], np.float32)
    assert negative_log_likelihood(BERNOULLI, ends, 1 - ends) == pytest.approx([-math.log(TINY), 24 * math.log(2)])
    found = sums_of_log_likelihoods(BERNOULLI, ends[:, None].copy(), 1 - ends)
    assert found[:, 0] == pytest.approx([math.log(TINY), -24 * math.log(2)])


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=lambda one: one.type)
@pytest.mark.parametrize("spread", ["any", "confident", "unsure"])
def test_fast_sums_are_those_in_float64(likelihood: Likelihood, spread: str) -> None:
    """Errors of rounding: 6e-8 nats per element, and a part of the sum."""
    rng = np.random.default_rng(5)
    logits = rng.normal(0, {"any": 4, "confident": 12, "unsure": 0.3}[spread], (3, 70, 784))
    means = (1 / (1 + np.exp(-logits))).astype(np.float32)
    x = rng.random((3, 784), dtype=np.float32).round() if spread == "confident" else rng.random((3, 784), np.float32)
    expected = negative_log_likelihood(
        likelihood, means.reshape(210, 784), x[:, None].repeat(70, axis=1).reshape(210, 784)
    )
    found = sums_of_log_likelihoods(likelihood, means.copy(), x)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, -expected.reshape(3, 70), rtol=2e-6, atol=6e-8 * 784)


def test_nearly_certain_and_right_loses_no_more_than_rounding() -> None:
    """The sum is small, and its terms are not: nothing may cancel."""
    means = np.full((1, 2, 5000), 3e-8, np.float32)
    means[..., ::2] = 1 - 2.0**-24
    x = np.zeros((1, 5000), np.float32)
    x[..., ::2] = 1
    assert np.abs(sums_of_log_likelihoods(BERNOULLI, means, x)).max() < 6e-8 * 5000


def test_vectors_beyond_the_squares_of_float32_have_a_density() -> None:
    spec = InputSpec("vector", (3,))
    x, means = np.full((1, 3), 1e25, np.float32), np.full((1, 1, 3), -2e25, np.float32)
    found = sums_of_log_likelihoods(Likelihood("gaussian", scale=1e22), means, comparable(spec, x))
    difference = float(x[0, 0]) - float(means[0, 0, 0])
    expected = -3 * (0.5 * (difference / 1e22) ** 2 + math.log(1e22) + 0.5 * math.log(2 * math.pi))
    assert found[0, 0] == pytest.approx(expected, rel=1e-12)


def test_targets_are_binary_where_the_model_was_trained_on_such() -> None:
    x = np.array([[0, 0.4999, 0.5, 1]], np.float32)
    assert targets(Likelihood("bernoulli", binarize="threshold"), x).tolist() == [[0, 0, 1, 1]]
    for likelihood in (None, BERNOULLI, Likelihood("bernoulli", binarize="dynamic"), Likelihood("gaussian", scale=1.0)):
        assert targets(likelihood, x) is x
