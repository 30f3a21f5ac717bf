import math

import numpy as np
import pytest
import torch
from torch.distributions import Bernoulli, Laplace, Normal
from torch.distributions import kl_divergence as torch_kl

from vae_training.losses import (
    Objective,
    bernoulli_nll,
    free_bits_kl,
    gaussian_nll,
    gradient_difference,
    kl_per_dimension,
    laplace_nll,
    linear_rise,
)
from vae_training.models import build_model, default_config


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_bernoulli_against_numpy_with_grey_values(rng: np.random.Generator) -> None:
    logits, x = rng.standard_normal((5, 1, 4, 4)) * 3, rng.random((5, 1, 4, 4))
    p = 1 / (1 + np.exp(-logits))
    expected = -(x * np.log(p) + (1 - x) * np.log(1 - p)).sum((1, 2, 3))
    np.testing.assert_allclose(
        bernoulli_nll(torch.from_numpy(logits), torch.from_numpy(x)).numpy(), expected, rtol=1e-12
    )


def test_bernoulli_against_torch_distributions_with_binary_values(rng: np.random.Generator) -> None:
    logits = torch.from_numpy(rng.standard_normal((5, 7)))
    x = torch.from_numpy(rng.integers(0, 2, (5, 7)).astype(float))
    torch.testing.assert_close(bernoulli_nll(logits, x), -Bernoulli(logits=logits).log_prob(x).sum(1))


def test_bernoulli_is_stable_far_out() -> None:
    logits = torch.tensor([[1e4, -1e4]])
    assert bernoulli_nll(logits, torch.tensor([[1.0, 0.0]])).item() == 0
    assert bernoulli_nll(logits, torch.tensor([[0.0, 0.0]])).item() == 1e4


def test_gaussian_against_torch_distributions(rng: np.random.Generator) -> None:
    mean, x = (torch.from_numpy(rng.standard_normal((6, 3, 2))) for _ in range(2))
    expected = -Normal(mean, 0.3).log_prob(x).sum((1, 2))
    torch.testing.assert_close(gaussian_nll(mean, x, torch.tensor(math.log(0.3)).double()), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("scale", [0.003, 0.3, 40.0])
def test_laplace_against_numpy_in_float64(rng: np.random.Generator, scale: float) -> None:
    mean, x = (rng.standard_normal((6, 3, 2)).astype(np.float32) for _ in range(2))
    wide = np.abs(x.astype(np.float64) - mean) / scale + np.log(2 * scale)
    given = laplace_nll(torch.from_numpy(mean), torch.from_numpy(x), torch.tensor(math.log(scale)))
    np.testing.assert_allclose(given.numpy(), wide.sum((1, 2)), rtol=1e-5)
    torch.testing.assert_close(
        given.double(), -Laplace(torch.from_numpy(mean).double(), scale).log_prob(torch.from_numpy(x)).sum((1, 2)),
        rtol=1e-5, atol=0,
    )  # fmt: skip


def test_gradient_difference_against_a_loop(rng: np.random.Generator) -> None:
    mean, x = rng.random((2, 3, 4, 5)), rng.random((2, 3, 4, 5))
    expected = np.zeros(2)
    for n, c, i, j in np.ndindex(2, 3, 4, 5):
        for before in ((i - 1, j), (i, j - 1)):
            if min(before) >= 0:
                expected[n] += abs(abs(x[n, c, i, j] - x[n, c, *before]) - abs(mean[n, c, i, j] - mean[n, c, *before]))
    given = gradient_difference(torch.from_numpy(mean), torch.from_numpy(x))
    np.testing.assert_allclose(given.numpy(), expected, rtol=1e-12)


def test_kl_against_torch_distributions(rng: np.random.Generator) -> None:
    mean, logvar = (torch.from_numpy(rng.standard_normal((6, 4)) * 2) for _ in range(2))
    expected = torch_kl(Normal(mean, torch.exp(logvar / 2)), Normal(0.0, 1.0))
    torch.testing.assert_close(kl_per_dimension(mean, logvar), expected)
    torch.testing.assert_close(kl_per_dimension(mean, logvar).flatten(1).sum(1), expected.sum(1))
    assert kl_per_dimension(torch.zeros(2, 3), torch.zeros(2, 3)).sum(1).tolist() == [0, 0]


def test_free_bits_lift_weak_dimensions_and_stop_their_gradient() -> None:
    kl = torch.tensor([[0.1, 2.0], [0.3, 4.0]], requires_grad=True)
    assert free_bits_kl(kl, 0.0).item() == pytest.approx(0.2 + 3.0)
    cost = free_bits_kl(kl, 0.5)
    assert cost.item() == pytest.approx(0.5 + 3.0)
    cost.backward()
    assert kl.grad is not None
    assert kl.grad.tolist() == [[0, 0.5], [0, 0.5]]


def test_warm_up_rises_to_beta() -> None:
    assert [linear_rise(step, 4, 2.0) for step in (0, 1, 2, 4, 100)] == [0, 0.5, 1.0, 2.0, 2.0]
    assert linear_rise(0, 0, 3.0) == 3.0


def objective(kind: str = "vae", likelihood: str = "bernoulli", **settings: float) -> Objective:
    torch.manual_seed(1)
    shape = (1, 8, 8) if likelihood == "bernoulli" else (6,)
    return Objective(build_model(default_config("mlp", kind, shape, 3)), likelihood, **settings)


def test_the_loss_is_reconstruction_plus_weighted_kl() -> None:
    x, noise = torch.rand(5, 1, 8, 8), torch.randn(5, 3)
    mean, logvar = objective().model.encode(x)
    logits = objective().model.decode_logits(mean + torch.exp(logvar / 2) * noise)
    reconstruction, kl = bernoulli_nll(logits, x).mean(), kl_per_dimension(mean, logvar).flatten(1).sum(1).mean()
    for weight in (0.0, 0.25, 1.0):
        torch.testing.assert_close(objective()(x, noise, weight), reconstruction + weight * kl)
    assert kl > 1e-3  # so that it shows


def test_an_autoencoder_has_no_kl_and_no_noise() -> None:
    x = torch.rand(5, 1, 8, 8)
    made = objective("autoencoder")
    first, second = (made(x, torch.randn(5, 3), weight) for weight in (1.0, 5.0))
    assert torch.equal(first, second)
    torch.testing.assert_close(first, bernoulli_nll(made.model.decode_logits(made.model.encode(x)), x).mean())


def test_the_gaussian_learns_the_scale_of_what_is_left() -> None:
    """The optimal σ is the root mean squared error (Rybkin et al., 2021, equation 5)."""
    torch.manual_seed(0)
    model = objective("autoencoder", "gaussian", scale=10.0)
    x = torch.randn(200, 6) * 3
    with torch.no_grad():
        expected = (model.model(x) - x).square().mean().sqrt()
    optimizer = torch.optim.Adam([model.log_scale], lr=0.05)
    for _ in range(400):
        optimizer.zero_grad()
        model(x, torch.zeros(200, 3)).backward()
        optimizer.step()
    assert model.to_likelihood("none").scale == pytest.approx(float(expected), rel=1e-3)


def test_the_laplace_learns_the_mean_absolute_error() -> None:
    torch.manual_seed(0)
    model = objective("autoencoder", "laplace", scale=10.0)
    x = torch.randn(200, 6) * 3
    with torch.no_grad():
        expected = (model.model(x) - x).abs().mean()
    optimizer = torch.optim.Adam([model.log_scale], lr=0.05)
    for _ in range(400):
        optimizer.zero_grad()
        model(x, torch.zeros(200, 3)).backward()
        optimizer.step()
    recorded = model.to_likelihood("none")
    assert (recorded.type, recorded.scale) == ("laplace", pytest.approx(float(expected), rel=1e-3))


@pytest.mark.parametrize("likelihood", ["gaussian", "laplace"])
def test_the_scale_cannot_vanish(likelihood: str) -> None:
    model = objective("autoencoder", likelihood, scale=2.0)
    with torch.no_grad():
        model.log_scale.fill_(-100.0)
    x = torch.zeros(2, 6)
    assert torch.isfinite(model(x, torch.zeros(2, 3)))
    assert model.to_likelihood("none").scale == pytest.approx(2e-4)


@pytest.mark.parametrize("likelihood", ["gaussian", "laplace"])
@pytest.mark.parametrize("value", [-100.0, -8.0, 3.0])
def test_a_scale_that_fell_below_its_floor_comes_back(likelihood: str, value: float) -> None:
    """The floor of scale 1 is -9.2: below it the gradient is the floor's, but that none leads further down."""
    model, floor = objective("autoencoder", likelihood, scale=1.0), math.log(1e-4)
    poor, perfect = torch.ones(4, 6), torch.zeros(4, 6)
    for wrong in (poor, perfect):
        with torch.no_grad():
            model.log_scale.fill_(value)
        free = torch.tensor(max(value, floor), requires_grad=True)
        logits = torch.zeros(4, 6)
        density = gaussian_nll if likelihood == "gaussian" else laplace_nll
        x = model.model.to_mean(logits).detach() + wrong
        density(model.model.to_mean(logits), x, free).mean().backward()
        model.log_scale.grad = None
        model.negative_log_likelihood(logits, x).mean().backward()
        assert free.grad is not None
        assert model.log_scale.grad is not None
        leads_down = value < floor and wrong is perfect
        assert (free.grad > 0) == (wrong is perfect or value > 0)
        assert float(model.log_scale.grad) == (0 if leads_down else float(free.grad))


def test_edges_weigh_in_the_loss_alone_in_units_of_the_scale() -> None:
    torch.manual_seed(1)
    model = build_model(default_config("mlp", "autoencoder", (1, 8, 8), 3))
    x, noise = torch.rand(5, 1, 8, 8), torch.zeros(5, 3)
    plain, weighted = (Objective(model, "laplace", 0.1, gradient_weight=weight) for weight in (0.0, 0.5))
    expected = 0.5 * gradient_difference(model(x), x).mean() / 0.1
    torch.testing.assert_close(weighted(x, noise) - plain(x, noise), expected, rtol=1e-4, atol=1e-3)
    logits = model.decode_logits(model.encode(x))
    torch.testing.assert_close(weighted.negative_log_likelihood(logits, x), plain.negative_log_likelihood(logits, x))
    scales = []
    for made in (plain, weighted):
        made(x, noise).backward()
        scales.append(made.log_scale.grad)
    torch.testing.assert_close(*scales)  # the scale is learned as it is without them
