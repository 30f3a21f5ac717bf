"""Densities fitted to latents, against references in float64 and against what sampling from them gives."""

import math
import sys
import warnings

import numpy as np
import pytest

from vae_runtime.errors import InputError, MissingExtraError
from vae_runtime.prior import GaussianMixture
from vae_training.fit_prior import draw_aggregate, fit_prior


def log_normal(x: np.ndarray, mean: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """By the textbook: determinant and inverse."""
    left = x - mean
    _, determinant = np.linalg.slogdet(covariance)
    return -0.5 * ((left @ np.linalg.inv(covariance) * left).sum(1) + determinant + x.shape[1] * math.log(2 * math.pi))


def log_density(prior: GaussianMixture, latents: np.ndarray) -> np.ndarray:
    parts = [
        math.log(weight) + log_normal(latents, mean, factor @ factor.T)
        for weight, mean, factor in zip(*prior, strict=True)
    ]
    return np.asarray(np.logaddexp.reduce(parts))


@pytest.fixture
def clusters() -> np.ndarray:
    """A fifth of all around (20, 0), four fifths around (0, -20), each of its own form."""
    rng = np.random.default_rng(0)
    left = rng.standard_normal((400, 2)) @ np.array([[2.0, 0.0], [1.5, 0.5]]) + [20, 0]
    right = rng.standard_normal((1600, 2)) @ np.array([[1.0, 0.0], [-0.8, 0.3]]) + [0, -20]
    return np.concatenate([left, right])


@pytest.mark.parametrize("unit", [1e-4, 1.0, 1e5])
def test_a_gaussian_has_the_mean_and_the_covariance_of_the_latents(unit: float) -> None:
    rng = np.random.default_rng(1)
    latents = (rng.standard_normal((500, 3)) @ rng.standard_normal((3, 3)) + [5, 0, -2]) * unit
    prior = fit_prior(latents.astype(np.float32), "gaussian")
    latents = latents.astype(np.float32).astype(np.float64)
    left = latents - latents.mean(0)
    covariance = left.T @ left / 499
    np.testing.assert_allclose(prior.means[0], latents.mean(0), rtol=1e-6)
    np.testing.assert_allclose(prior.factors[0] @ prior.factors[0].T, covariance, rtol=1e-4)
    np.testing.assert_allclose(
        log_density(prior, latents), log_normal(latents, latents.mean(0), covariance), rtol=1e-4, atol=1e-3
    )


@pytest.mark.parametrize("unit", [1e-4, 1.0, 1e5])
def test_a_mixture_finds_the_clusters_in_any_unit(clusters: np.ndarray, unit: float) -> None:
    prior = fit_prior(clusters * unit, "mixture", 2, seed=3)
    order = np.argsort(prior.weights)
    np.testing.assert_allclose(prior.weights[order], [0.2, 0.8], atol=1e-6)
    for k, rows in zip(order, (clusters[:400], clusters[400:]), strict=True):
        np.testing.assert_allclose(prior.means[k] / unit, rows.mean(0), atol=1e-6)
        covariance = prior.factors[k] @ prior.factors[k].T / unit**2
        np.testing.assert_allclose(covariance, np.cov(rows, rowvar=False, bias=True), rtol=1e-2, atol=1e-3)
    alone, both = (fit_prior(clusters, *kind) for kind in (("gaussian",), ("mixture", 2)))
    assert log_density(both, clusters).mean() > log_density(alone, clusters).mean() + 1


def test_draws_are_like_the_latents(clusters: np.ndarray) -> None:
    prior = fit_prior(clusters, "mixture", 2)
    rng = np.random.default_rng(2)
    component = prior.components(rng.random(20_000))
    draws = prior.transform(rng.standard_normal((20_000, 2)).astype(np.float32), component)
    np.testing.assert_allclose(draws.mean(0), clusters.mean(0), atol=0.25)
    np.testing.assert_allclose(np.cov(draws, rowvar=False), np.cov(clusters, rowvar=False), rtol=0.05)


def test_the_same_seed_gives_the_same_mixture_and_no_warning() -> None:
    latents = np.random.default_rng(4).standard_normal((300, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, again = (fit_prior(latents, "mixture", 5, seed) for seed in (7, 7))
        other = fit_prior(latents, "mixture", 5, 2**62)
    assert first.to_npz() == again.to_npz() != other.to_npz()


@pytest.mark.parametrize(("kind", "components"), [("gaussian", 1), ("mixture", 3)])
@pytest.mark.parametrize("collapsed", ["constant", "copy", "all"])
def test_collapsed_dimensions_leave_a_density(kind: str, components: int, collapsed: str) -> None:
    latents = np.random.default_rng(5).standard_normal((200, 4)) * 30
    latents[:, 1] = 0.7 if collapsed == "constant" else latents[:, 0]
    if collapsed == "all":
        latents[:] = 0.7
    prior = fit_prior(latents, kind, components)
    assert GaussianMixture.from_npz(prior.to_npz(), components, 4)  # checked there
    assert np.isfinite(log_density(prior, latents)).all()
    if collapsed == "all":
        np.testing.assert_allclose(prior.factors[0] @ prior.factors[0].T, 1e-6 * np.eye(4), atol=1e-20)
    draws = prior.transform(np.ones((components, 4), np.float32), np.arange(components))
    assert np.abs(draws[:, 1] - (0.7 if collapsed != "copy" else draws[:, 0])).max() < 0.1


def test_one_dimension() -> None:
    assert fit_prior(np.random.default_rng(0).standard_normal((50, 1)), "gaussian").factors.shape == (1, 1, 1)


def test_what_a_prior_is_fitted_to() -> None:
    rng = np.random.default_rng(0)
    mean, logvar = rng.standard_normal((2, 4000, 2, 3)).astype(np.float32)
    latents = draw_aggregate(mean, logvar, seed=1)
    assert (latents.shape, latents.dtype) == ((4000, 6), np.float64)
    noise = (latents - mean.reshape(4000, 6)) / np.exp(logvar.reshape(4000, 6) / 2)
    assert abs(noise.mean()) < 0.02
    assert noise.std() == pytest.approx(1, abs=0.02)
    np.testing.assert_array_equal(latents, draw_aggregate(mean, logvar, seed=1))
    assert (latents != draw_aggregate(mean, logvar, seed=2)).all()
    np.testing.assert_array_equal(draw_aggregate(mean, None, seed=1), mean.reshape(4000, 6))


@pytest.mark.parametrize(
    ("shape", "kind", "components", "message"),
    [
        ((4, 4), "gaussian", 1, "latents has 4 examples; 1 component in 4 dimensions need at least 5"),
        ((4, 4), "mixture", 2, "latents has 4 examples; 2 components in 4 dimensions need at least 5"),
        ((9, 4), "mixture", 10, "latents has 9 examples; 10 components in 4 dimensions need at least 10"),
        ((9, 4), "mixture", 0, "components is 0; expected at least 1"),
        ((9, 4), "gaussian", 2, "components is 2; a gaussian has 1"),
        ((2000, 1025), "gaussian", 1, "latents has 1,025 dimensions; .* at most 1,024"),
        ((9, 2, 2), "gaussian", 1, r"latents has shape \(9, 2, 2\) and dtype float64; expected floats"),
        ((0, 2), "gaussian", 1, r"latents has shape \(0, 2\)"),
        ((9, 4), "flow", 1, "kind is 'flow'; expected one of gaussian, mixture"),
    ],
)
def test_bad_input_is_named(shape: tuple[int, ...], kind: str, components: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        fit_prior(np.random.default_rng(0).standard_normal(shape), kind, components)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_not_finite(bad: float) -> None:
    latents = np.random.default_rng(0).standard_normal((9, 2))
    latents[3, 1] = bad
    with pytest.raises(InputError, match="latents has NaN or infinite values"):
        fit_prior(latents, "gaussian")


def test_only_a_mixture_needs_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    latents = np.random.default_rng(0).standard_normal((9, 2))
    fit_prior(latents, "gaussian")
    with pytest.raises(MissingExtraError, match=r'a mixture as prior needs scikit-learn, .* "vae-edge\[train\]"'):
        fit_prior(latents, "mixture", 2)
