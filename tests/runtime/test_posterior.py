from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from vae_runtime import InputError, KindError, Posterior
from vae_runtime.sampling import NormalStream


@pytest.fixture
def posterior() -> Posterior:
    rng = np.random.default_rng(1)
    return Posterior(rng.normal(0, 2, (6, 2, 3)).astype(np.float32), rng.uniform(-5, 2, (6, 2, 3)).astype(np.float32))


def test_std_is_the_square_root_of_the_variance(posterior: Posterior) -> None:
    assert posterior.logvar is not None
    assert posterior.std.dtype == np.float32
    assert np.allclose(posterior.std.astype(np.float64) ** 2, np.exp(posterior.logvar.astype(np.float64)), rtol=1e-6)


def test_mode_is_the_mean_and_length_the_batch(posterior: Posterior) -> None:
    assert posterior.mode() is posterior.mean
    assert len(posterior) == 6


def test_sample_is_mean_plus_temperature_times_std_times_noise(posterior: Posterior) -> None:
    noise = NormalStream(5).draw(6, (2, 3))
    for temperature in (0, 0.5, 1.0):
        found = posterior.sample(seed=5, temperature=temperature)
        assert found.dtype == np.float32
        assert np.allclose(found, posterior.mean + temperature * posterior.std * noise, rtol=1e-6, atol=1e-6)
    assert np.array_equal(posterior.sample(seed=5, temperature=0), posterior.mean)


def test_first_examples_of_a_larger_batch_get_the_same_noise(posterior: Posterior) -> None:
    assert posterior.logvar is not None
    part = Posterior(posterior.mean[:2], posterior.logvar[:2])
    assert np.array_equal(part.sample(seed=9), posterior.sample(seed=9)[:2])


def test_sample_without_a_seed_is_fresh_and_changes_nothing(posterior: Posterior) -> None:
    before = posterior.mean.copy()
    assert not np.array_equal(posterior.sample(), posterior.sample())
    assert np.array_equal(posterior.mean, before)


def test_kl_agrees_with_numerical_integration() -> None:
    mean, logvar = np.array([[0.7]], np.float32), np.array([[-1.3]], np.float32)
    z = np.linspace(-15, 15, 2_000_001)
    variance = np.exp(np.float64(logvar[0, 0]))
    log_q = -0.5 * ((z - np.float64(mean[0, 0])) ** 2 / variance + np.log(2 * np.pi * variance))
    log_p = -0.5 * (z**2 + np.log(2 * np.pi))
    expected = (np.exp(log_q) * (log_q - log_p)).sum() * (z[1] - z[0])
    assert Posterior(mean, logvar).kl() == pytest.approx([expected], abs=1e-9)


def test_kl_is_summed_over_the_latent_and_not_over_the_batch(posterior: Posterior) -> None:
    assert posterior.logvar is not None
    found = posterior.kl()
    assert found.shape == (6,)
    assert found.dtype == np.float64
    mean, variance = posterior.mean.astype(np.float64), np.exp(posterior.logvar.astype(np.float64))
    expected = 0.5 * (variance + mean**2 - 1 - np.log(variance)).sum(axis=(1, 2))
    assert np.allclose(found, expected, rtol=1e-12)


def test_kl_is_zero_at_the_prior_and_never_below() -> None:
    zeros = np.zeros((1, 50), np.float32)
    assert Posterior(zeros, zeros).kl() == [0]
    tiny = np.random.default_rng(0).normal(0, 1e-6, (1000, 50)).astype(np.float32)
    assert Posterior(np.zeros_like(tiny), tiny).kl().min() >= -1e-13


def test_kl_at_the_ends_of_logvar_is_finite() -> None:
    ends = np.array([[-30.0], [20.0]], np.float32)
    found = Posterior(np.zeros_like(ends), ends).kl()
    assert found == pytest.approx([14.5, 0.5 * (np.exp(20) - 21)], rel=1e-12)


@pytest.mark.parametrize("call", ["std", "sample", "kl"])
def test_code_of_an_autoencoder_has_no_distribution(call: str) -> None:
    code = Posterior(np.ones((2, 3), np.float32), None)
    with pytest.raises(
        KindError, match=rf"^{call} needs a distribution; this is a plain autoencoder's code, use mode\(\)$"
    ):
        getattr(code, call) if call == "std" else getattr(code, call)()
    assert code.mode() is code.mean


@pytest.mark.parametrize("arguments", [{"seed": -1}, {"seed": 0, "temperature": -1.0}])
def test_sample_refuses_wrong_arguments(posterior: Posterior, arguments: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=rf"^{[*arguments][-1]} is -1"):
        posterior.sample(**arguments)


@pytest.mark.filterwarnings("error")
def test_a_temperature_that_leads_out_of_float32_is_refused(posterior: Posterior) -> None:
    assert np.isfinite(posterior.sample(seed=0, temperature=1e30)).all()
    with pytest.raises(InputError, match=r"latents drawn at temperature 3e\+38 are beyond float32; take a lower one"):
        posterior.sample(seed=0, temperature=3e38)


def test_a_number_alone_is_not_taken_for_a_seed(posterior: Posterior) -> None:
    """Elsewhere it is how many to draw."""
    with pytest.raises(TypeError, match="positional"):
        posterior.sample(5)  # type: ignore[misc]


def test_kl_per_dimension_adds_up_to_kl(posterior: Posterior) -> None:
    assert posterior.logvar is not None
    found = posterior.kl(per_dimension=True)
    assert found.dtype == np.float64
    assert found.shape == (6, 2, 3)
    np.testing.assert_allclose(found.sum(axis=(1, 2)), posterior.kl(), rtol=1e-12)
    single = Posterior(posterior.mean[:, :1, 1], posterior.logvar[:, :1, 1])
    np.testing.assert_allclose(found[:, 0, 1], single.kl(), rtol=1e-12)
    unused = Posterior(np.zeros((1, 3), np.float32), np.array([[0, -2, 0]], np.float32))
    assert unused.kl(per_dimension=True)[0, [0, 2]].tolist() == [0, 0]


def test_kl_refuses_what_is_no_flag(posterior: Posterior) -> None:
    with pytest.raises(InputError, match="per_dimension is 'yes'; expected True or False"):
        posterior.kl("yes")  # type: ignore[arg-type]
