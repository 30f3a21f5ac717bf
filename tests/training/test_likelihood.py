"""-log p(x) by importance sampling: where it is known in closed form, and against a computation in float64."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from vae_training.evaluate import measure
from vae_training.feed import LIKELIHOOD, standard_normal
from vae_training.likelihood import measure_nll
from vae_training.losses import Objective
from vae_training.models import build_model, default_config

SIGMA = 0.3


def linear_gaussian(weight: np.ndarray, wrong: float = 0.0) -> Objective:
    """x = W z + noise. The encoder is that of Bayes' rule where W's columns are orthogonal and `wrong` is 0."""
    dimensions, latent = weight.shape
    objective = Objective(build_model(default_config("mlp", "vae", (dimensions,), latent)), "gaussian", SIGMA)
    model = objective.model
    model.encoder, model.decoder = nn.Linear(dimensions, 2 * latent), nn.Linear(latent, dimensions, bias=False)
    precision = 1 + np.square(weight).sum(0) / SIGMA**2
    mean = weight.T / SIGMA**2 / precision[:, None]
    with torch.no_grad():
        model.decoder.weight.copy_(torch.from_numpy(weight))
        model.encoder.weight.copy_(torch.from_numpy(np.concatenate([mean, np.zeros_like(mean)])))
        model.encoder.bias.copy_(torch.from_numpy(np.concatenate([np.full(latent, wrong), -np.log(precision) + wrong])))
    return objective


def known(weight: np.ndarray, x: np.ndarray) -> np.ndarray:
    """-log N(x; 0, W Wᵀ + σ²I)."""
    covariance = weight @ weight.T + SIGMA**2 * np.eye(len(weight))
    _, determinant = np.linalg.slogdet(covariance)
    return 0.5 * ((x @ np.linalg.inv(covariance) * x).sum(1) + determinant + x.shape[1] * math.log(2 * math.pi))


@pytest.fixture
def weight() -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(0).standard_normal((5, 2)))[0] * [2.0, 0.7]


@pytest.fixture
def x(weight: np.ndarray) -> np.ndarray:
    rng = np.random.default_rng(1)
    noise = SIGMA * rng.standard_normal((700, 5))
    return (rng.standard_normal((700, 2)) @ weight.T + noise).astype(np.float32)


def test_with_the_true_posterior_one_sample_is_exact(weight: np.ndarray, x: np.ndarray) -> None:
    figures = measure_nll(linear_gaussian(weight), x, seed=0, samples=1)
    nll = known(weight, x)
    assert figures["nll_nats"] == pytest.approx(nll.mean(), rel=1e-5)
    assert figures["nll_standard_error_nats"] == pytest.approx(nll.std(ddof=1) / math.sqrt(700), rel=1e-4)


def test_with_another_posterior_it_converges_from_above(weight: np.ndarray, x: np.ndarray) -> None:
    objective = linear_gaussian(weight, wrong=0.15)
    expected = known(weight, x).mean()
    found = [measure_nll(objective, x, 0, samples)["nll_nats"] for samples in (1, 10, 3000)]
    bound = measure(objective, x, 0, draws=200)["negative_elbo_nats"]
    assert found[0] == pytest.approx(bound, rel=0.1)  # one sample is one draw of -ELBO
    assert bound > found[1] > found[2]
    assert found[1] > expected + 0.01
    assert found[2] == pytest.approx(expected, abs=2e-3)


def test_against_a_computation_in_float64() -> None:
    """The same draws, all at once, with logsumexp: two batches of a Bernoulli model of images."""
    torch.manual_seed(0)
    objective = Objective(build_model(default_config("mlp", "vae", (1, 8, 8), 3)), "bernoulli")
    x = np.random.default_rng(0).random((700, 1, 8, 8), dtype=np.float32)
    figures = measure_nll(objective, x, seed=4, samples=7)
    model, nll = objective.model.double(), []
    with torch.no_grad():
        for index, part in enumerate(np.array_split(x, 2)):
            target = torch.from_numpy(part).double()
            mean, logvar = model.encode(target)
            draws = [standard_normal((350, 3), 4, LIKELIHOOD, index, draw, mean.device) for draw in range(7)]
            z = mean + torch.exp(0.5 * logvar) * torch.stack(draws).double()  # (7, 350, 3)
            p = torch.stack([model.decode(one) for one in z]).clamp(1e-12, 1 - 1e-12)
            log_x = (target * p.log() + (1 - target) * (1 - p).log()).flatten(2).sum(2)
            prior = torch.distributions.Normal(0, 1).log_prob(z).sum(2)
            posterior = torch.distributions.Normal(mean, torch.exp(0.5 * logvar)).log_prob(z).sum(2)
            nll.append(math.log(7) - torch.logsumexp(log_x + prior - posterior, 0))
    assert figures["nll_nats"] == pytest.approx(float(torch.cat(nll).mean()), rel=1e-6)
    assert figures["nll_samples"] == 7


def test_the_same_seed_measures_the_same(weight: np.ndarray, x: np.ndarray) -> None:
    objective = linear_gaussian(weight, wrong=0.15)
    assert measure_nll(objective, x, 1, 3) == measure_nll(objective, x, 1, 3) != measure_nll(objective, x, 2, 3)


def test_it_is_of_the_model_as_it_is_used() -> None:
    """BatchNorm has what it learnt, not this batch's mean, and learns nothing more."""
    torch.manual_seed(0)
    objective = Objective(build_model(default_config("conv", "vae", (1, 8, 8), 3)), "bernoulli").train()
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    x = np.random.default_rng(0).random((64, 1, 8, 8), dtype=np.float32)
    found = measure_nll(objective, x, 0, 2)
    assert found == measure_nll(objective.eval(), x, 0, 2)
    assert all(torch.equal(value, before[name]) for name, value in objective.state_dict().items())
