import math

import numpy as np
import pytest
import torch
from torch import nn

from vae_training import evaluate, likelihood, sample_quality
from vae_training.evaluate import figure_of_merit, measure, recalibrate
from vae_training.feed import EVALUATE, standard_normal
from vae_training.likelihood import measure_nll
from vae_training.losses import Objective, gradient_difference, kl_per_dimension
from vae_training.models import build_model, default_config, reparameterize


@pytest.fixture
def x() -> np.ndarray:
    return np.random.default_rng(0).random((700, 1, 8, 8), dtype=np.float32)


def objective(family: str = "mlp", kind: str = "vae") -> Objective:
    torch.manual_seed(0)
    return Objective(build_model(default_config(family, kind, (1, 8, 8), 3)), "bernoulli")


def test_figures_against_a_computation_in_float64(x: np.ndarray) -> None:
    model = objective()
    figures = measure(model, x, seed=0, draws=60)
    with torch.no_grad():
        mean, logvar = (part.double().numpy() for part in model.model.encode(torch.from_numpy(x)))
        kl = 0.5 * (mean**2 + np.exp(logvar) - 1 - logvar).sum(1)
        rng = np.random.default_rng(1)
        double = model.model.double()
        nll = np.zeros(len(x))
        for _ in range(60):
            z = mean + np.exp(logvar / 2) * rng.standard_normal(mean.shape)
            p = double.decode(torch.from_numpy(z)).numpy()
            nll -= (x * np.log(p) + (1 - x) * np.log(1 - p)).sum((1, 2, 3)) / 60
        mse = (double.decode(torch.from_numpy(mean)).numpy() - x) ** 2
    assert figures["examples"] == 700
    assert figures["kl_nats"] == pytest.approx(kl.mean(), rel=1e-5)
    assert figures["reconstruction_nats"] == pytest.approx(nll.mean(), rel=1e-3)  # other draws
    assert figures["negative_elbo_nats"] == pytest.approx(figures["reconstruction_nats"] + figures["kl_nats"])
    assert figures["negative_elbo_standard_error_nats"] == pytest.approx(
        (nll + kl).std(ddof=1) / math.sqrt(700), rel=0.02
    )
    assert figures["psnr_db"] == pytest.approx((-10 * np.log10(mse.mean((1, 2, 3)))).mean(), rel=1e-5)
    assert figures["active_units"] == int((mean.var(0) > 0.01).sum())


def test_the_best_weights_are_chosen_by_what_is_trained_for() -> None:
    figures = {"reconstruction_nats": -100.0, "kl_nats": 40.0, "negative_elbo_nats": -60.0}
    assert [figure_of_merit(figures, beta) for beta in (0.1, 1.0, 4.0)] == [-96, -60, 60]
    assert figure_of_merit({**figures, "free_bits_kl_nats": 50.0}, 2.0) == 0
    assert figure_of_merit({**figures, "gradient_nats": 7.0}, 1.0) == -53


@pytest.mark.parametrize(("kind", "likelihood"), [("vae", "laplace"), ("autoencoder", "bernoulli")])
def test_wrong_edges_cost_the_same_whatever_has_become_of_the_scale(x: np.ndarray, kind: str, likelihood: str) -> None:
    torch.manual_seed(0)
    model = build_model(default_config("mlp", kind, (1, 8, 8), 3))
    weighted = Objective(model, likelihood, 0.5, gradient_weight=3.0)
    images, scale = torch.from_numpy(x[:50]), 0.5 if likelihood == "laplace" else 1.0
    with torch.no_grad():
        if kind == "vae":
            mean, logvar = model.encode(images)
            noise = standard_normal(mean.shape, 0, EVALUATE, 0, 0, mean.device)
            reconstructed = model.decode(reparameterize(mean, logvar, noise))
        else:
            reconstructed = model(images)
        expected = 3.0 / scale * float(gradient_difference(reconstructed, images).mean())
    assert measure(weighted, x[:50], 0, draws=1)["gradient_nats"] == pytest.approx(expected, rel=1e-6)
    if likelihood == "laplace":
        with torch.no_grad():
            weighted.log_scale.fill_(math.log(0.01))
        assert measure(weighted, x[:50], 0, draws=1)["gradient_nats"] == pytest.approx(expected, rel=1e-6)
    assert "gradient_nats" not in measure(objective(kind=kind), x[:50], 0)


def test_free_bits_count_each_element_of_the_latent_over_all_examples(x: np.ndarray) -> None:
    free = objective()
    with torch.no_grad():
        mean, logvar = free.model.encode(torch.from_numpy(x))
        each = kl_per_dimension(mean, logvar).flatten(1).mean(0)
    free.free_bits = float(each.median())
    figures = measure(free, x, 0)
    assert figures["free_bits_kl_nats"] == pytest.approx(float(each.clamp(min=free.free_bits).sum()), rel=1e-5)
    assert figures["free_bits_kl_nats"] > figures["kl_nats"] * 1.01
    assert "free_bits_kl_nats" not in measure(objective(), x, 0)


def test_one_example_has_no_standard_error(x: np.ndarray) -> None:
    assert measure(objective(), x[:1], 0)["negative_elbo_standard_error_nats"] is None
    assert measure(objective(kind="autoencoder"), x[:1], 0)["reconstruction_standard_error_nats"] is None
    assert measure_nll(objective(), x[:1], 0, 2)["nll_standard_error_nats"] is None


def test_the_same_seed_measures_the_same(x: np.ndarray) -> None:
    assert measure(objective(), x, 1) == measure(objective(), x, 1)
    assert measure(objective(), x, 1) != measure(objective(), x, 2)


def test_an_autoencoder_reports_no_elbo(x: np.ndarray) -> None:
    figures = measure(objective(kind="autoencoder"), x, 0)
    assert not {"negative_elbo_nats", "kl_nats", "active_units", "draws"} & set(figures)
    assert figure_of_merit(figures) == figures["reconstruction_nats"]


def test_a_perfect_reconstruction_is_still_a_number() -> None:
    model = objective(kind="autoencoder")
    last = model.model.decoder[-2]
    assert isinstance(last, nn.Linear)
    with torch.no_grad():
        last.weight.zero_()
        last.bias.fill_(-200.0)
    figures = measure(model, np.zeros((2, 1, 8, 8), np.float32), 0)
    assert figures["psnr_db"] == 100
    assert figures["reconstruction_standard_error_nats"] == 0


class OfApplesGPU(torch.Tensor):
    """Refuses what torch refuses of a tensor there, as does all that is computed from it until it is on the CPU."""

    def double(self) -> torch.Tensor:
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype")

    def numpy(self) -> np.ndarray:
        raise TypeError("can't convert mps:0 device type tensor to numpy")

    def cpu(self) -> torch.Tensor:
        return self.as_subclass(torch.Tensor)


@pytest.mark.parametrize("kind", ["vae", "autoencoder"])
def test_figures_need_no_float64_of_the_device(x: np.ndarray, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def batches(x: np.ndarray, objective: Objective) -> list[torch.Tensor]:
        return [torch.from_numpy(x).as_subclass(OfApplesGPU)]

    model = objective(kind=kind)
    expected = measure(model, x[:50], 0)
    for module in (evaluate, likelihood, sample_quality):
        monkeypatch.setattr(module, "batches", batches)
    assert measure(model, x[:50], 0) == expected
    if kind == "vae":
        measure_nll(model, x[:50], 0, 2)
    mean, _ = sample_quality._encode(model, x[:50])
    assert sample_quality._decode(model, mean).shape == (50, 1, 8, 8)


def test_recalibration_gives_the_statistics_of_the_present_weights(x: np.ndarray) -> None:
    model = objective("conv")
    first = next(layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d))
    convolution = next(layer for layer in model.modules() if isinstance(layer, nn.Conv2d))
    recalibrate(model, x[:500], 0)
    with torch.no_grad():
        activations = convolution(torch.from_numpy(x[:500]))
    assert first.running_mean is not None
    torch.testing.assert_close(first.running_mean, activations.mean((0, 2, 3)), rtol=1e-4, atol=1e-6)
    assert not model.training
    assert first.momentum == 0.1
    before = {key: value.clone() for key, value in model.state_dict().items()}
    recalibrate(model, x[:500], 0)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
