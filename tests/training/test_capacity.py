"""Training towards a KL of so many nats, and the rate-distortion curve of the way."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vae_runtime.errors import MissingExtraError
from vae_training.config import TrainConfig
from vae_training.loop import train
from vae_training.losses import Objective, kl_per_dimension, linear_rise
from vae_training.models import build_model, default_config, reparameterize
from vae_training.rate_distortion import draw_curve

SMALL: dict[str, Any] = {
    "data": "digits", "split": "640,100,100", "family": "mlp", "widths": (32,), "latent": 6, "batch_size": 64,
    "learning_rate": 3e-2, "epochs": 28, "nll_samples": 0,
}  # fmt: skip


def test_the_loss_is_the_distance_from_the_capacity_rounded_off_within_one_nat() -> None:
    torch.manual_seed(0)
    objective = Objective(build_model(default_config("mlp", "vae", (1, 8, 8), 3)), "bernoulli")
    x, noise = torch.rand(20, 1, 8, 8), torch.randn(20, 3)
    with torch.no_grad():
        mean, logvar = objective.model.encode(x)
        logits = objective.model.decode_logits(reparameterize(mean, logvar, noise))
        reconstruction = objective.negative_log_likelihood(logits, x).double().mean().item()
        kl = kl_per_dimension(mean, logvar).flatten(1).sum(1).double().mean().item()
    for capacity in (0.0, 0.02, 30.0):
        gap = abs(kl - capacity)
        expected = reconstruction + 7 * (gap - 0.5 if gap > 1 else gap**2 / 2)
        assert objective(x, noise, 7.0, capacity).item() == pytest.approx(expected, rel=1e-6)


def test_the_capacity_rises_in_a_line_and_stays() -> None:
    assert [linear_rise(step, 80, 20.0) for step in (0, 20, 40, 80, 99)] == [0, 5, 10, 20, 20]
    assert linear_rise(0, 0, 20.0) == 20


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("capacity") / "run"
    return folder, train(TrainConfig(**SMALL, capacity=8.0), folder, device="cpu")


def test_the_kl_arrives_at_the_capacity(run: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    _, metrics = run
    assert metrics["test"]["kl_nats"] == pytest.approx(8, rel=0.1)
    free = train(TrainConfig(**SMALL), tmp_path / "free", device="cpu")
    assert free["test"]["kl_nats"] < 5
    assert free["test"]["reconstruction_nats"] > metrics["test"]["reconstruction_nats"] + 0.5


def test_the_last_weights_are_kept_though_earlier_ones_had_a_lower_sum(run: tuple[Path, dict[str, Any]]) -> None:
    _, metrics = run
    history = metrics["training"]["history"]
    assert len(history) >= 20
    assert metrics["training"]["best_epoch"] == history[-1]["epoch"] == 28
    assert min(entry["validation_nats"] for entry in history) < history[-1]["validation_nats"] - 0.5
    rates = [entry["validation_kl_nats"] for entry in history]
    assert all(abs(entry["validation_kl_nats"] - entry["capacity_nats"]) < 1.5 for entry in history)
    assert np.all(np.diff(rates[2:]) > -0.1)
    assert history[-1]["capacity_nats"] == history[-5]["capacity_nats"] == 8
    for entry in history:
        sums = entry["validation_reconstruction_nats"] + entry["validation_kl_nats"]
        assert entry["validation_nats"] == pytest.approx(sums)


def test_the_curve_is_a_picture_with_its_points_in_the_metrics(run: tuple[Path, dict[str, Any]]) -> None:
    folder, metrics = run
    assert metrics["files"] == ["model.pt", "reconstructions.png", "samples.png", "rate-distortion.png"]
    picture = np.asarray(Image.open(folder / "rate-distortion.png").convert("RGB"))
    assert min(picture.shape[:2]) > 400
    blue = (picture == (0x00, 0x72, 0xB2)).all(axis=2)
    assert blue.sum() > 500
    assert json.loads((folder / "metrics.json").read_text()) == metrics


def test_the_points_of_the_curve_are_where_they_belong(tmp_path: Path) -> None:
    """Rate across, distortion up: a curve that falls and then stays is in the lower left of its diagonal."""
    entries = [
        {"epoch": n, "validation_kl_nats": n / 2, "validation_reconstruction_nats": max(0.0, 20 - 4 * n)}
        for n in range(1, 21)
    ]
    draw_curve(entries, tmp_path / "curve.png")
    picture = np.asarray(Image.open(tmp_path / "curve.png").convert("RGB"))
    rows, columns = np.nonzero((picture == (0x00, 0x72, 0xB2)).all(axis=2))
    assert rows[columns < np.median(columns) / 2].mean() < rows[columns > np.median(columns)].mean()


def test_a_missing_extra_is_told_before_anything_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(MissingExtraError, match=r'needs matplotlib, .* pip install "vae-edge\[plots\]"'):
        train(TrainConfig(**{**SMALL, "epochs": 1}, capacity=8.0), tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()
    train(TrainConfig(**{**SMALL, "epochs": 1}), tmp_path / "run", device="cpu")
