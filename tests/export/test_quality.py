"""What is measured, by hand on small numbers, and when it is within the budget."""

from __future__ import annotations

import math

import numpy as np
import pytest

from vae_export import Budget
from vae_export.judge import Judge
from vae_export.quality import Figures, Measurement
from vae_runtime.bundle import Bundle
from vae_runtime.errors import InputError
from vae_runtime.likelihood import negative_log_likelihood
from vae_runtime.manifest import Likelihood


def measurement(psnr: float, elbo: float | None = None, **errors: float) -> Measurement:
    return Measurement(Figures(20.0, None if elbo is None else 0.5), Figures(psnr, elbo), errors, 8)


@pytest.mark.parametrize(
    ("measured", "within", "share"),
    [
        (measurement(19.95), True, 0.5),
        (measurement(19.9, 0.504), True, 1.0),
        (measurement(19.8), False, 2.0),
        (measurement(20.5), True, -5.0),
        (measurement(20.0, 0.506), False, 1.2),
        (measurement(20.0, 0.4), True, 0.0),
        (measurement(math.nan), False, math.inf),
        (measurement(20.0, math.inf), False, math.inf),
        (measurement(20.0, 0.5, mean_relative_error=math.nan), False, math.inf),
    ],
)
def test_both_losses_must_be_within_the_budget(measured: Measurement, within: bool, share: float) -> None:
    budget = Budget(0.1 + 1e-9, 0.005)
    assert measured.within(budget) is within
    assert measured.share(budget) == pytest.approx(share, abs=1e-6)


def test_a_budget_of_nothing_allows_no_loss() -> None:
    assert measurement(20.0, 0.5).within(Budget(0, 0))
    assert not measurement(19.999999).within(Budget(0, 0))
    assert measurement(19.999999).share(Budget(0, 0)) > 0


@pytest.mark.parametrize(("name", "value"), [("psnr_db", -0.1), ("nats_per_dimension", math.nan), ("psnr_db", True)])
def test_a_budget_is_a_finite_number_from_0(name: str, value: float) -> None:
    with pytest.raises(InputError, match=f"budget.{name} is {value}; expected a finite number from 0"):
        Budget(**{name: value})


def test_figures_that_are_not_finite_or_not_measured_are_null() -> None:
    data = measurement(math.inf).to_dict()
    assert data["psnr_db"] is None
    assert data["nats_lost_per_dimension"] is None
    assert data["fp32_psnr_db"] == 20


def test_the_bernoulli_likelihood_clips_at_what_float32_resolves() -> None:
    mean, x = np.array([[0.0, 1.0, 0.25]], np.float32), np.array([[1.0, 0.0, 0.5]], np.float32)
    (nll,) = negative_log_likelihood(Likelihood("bernoulli"), mean, x)
    tiny = float(np.finfo(np.float32).tiny)
    assert nll == pytest.approx(-math.log(tiny) + 24 * math.log(2) - 0.5 * math.log(0.25 * 0.75))


def test_the_gaussian_likelihood_is_a_density_in_the_datas_units() -> None:
    mean, x = np.array([[1.0, 2.0]], np.float32), np.array([[1.5, 2.0]], np.float32)
    (nll,) = negative_log_likelihood(Likelihood("gaussian", scale=0.5), mean, x)
    assert nll == pytest.approx(0.5 + 2 * math.log(0.5) + math.log(2 * math.pi))


def test_fp32_against_itself_loses_nothing_and_another_model_does(exported) -> None:
    bundle = Bundle.open(exported["conv"])
    manifest, x = bundle.manifest, np.random.default_rng(0).uniform(0, 1, (40, 1, 8, 8)).astype(np.float32)
    graphs = bundle.read("encoder.onnx"), bundle.read("decoder.onnx")
    judge = Judge(graphs, manifest.input, manifest.latent, manifest.likelihood, x)
    itself = judge.measure(graphs)
    assert (itself.psnr_lost, itself.nats_lost) == (0, 0)
    assert set(itself.errors.values()) == {0.0}
    assert judge.golden_error(bundle.golden(), graphs, "fp32") < 1e-5
    assert judge.golden_error(bundle.golden(), graphs, "int8") < judge.golden_error(bundle.golden(), graphs, "fp32")
    with_threshold = Judge(graphs, manifest.input, manifest.latent, Likelihood("bernoulli", binarize="threshold"), x)
    assert with_threshold.measure(graphs).found != itself.found
