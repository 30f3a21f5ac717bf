"""Precision and recall of samples, against a plain computation and where the answer is known."""

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vae_training import sample_quality
from vae_training.config import TrainConfig
from vae_training.loop import train
from vae_training.sample_quality import Features, precision_and_recall

SMALL: dict[str, Any] = {
    "data": "digits", "split": "600,100,100", "family": "mlp", "widths": (64,), "latent": 10, "batch_size": 64,
    "likelihood": "gaussian", "learning_rate": 1.5e-2, "epochs": 30, "nll_samples": 0,
}  # fmt: skip


def by_hand(real: np.ndarray, samples: np.ndarray, k: int) -> dict[str, float]:
    """One pair of points after the other."""

    def part(points: np.ndarray, centres: np.ndarray) -> float:
        radii = [sorted(math.dist(c, other) for other in centres)[k] for c in centres]
        return float(np.mean([any(math.dist(p, c) <= r for c, r in zip(centres, radii, strict=True)) for p in points]))

    return {"precision": part(samples, real), "recall": part(real, samples)}


@pytest.mark.parametrize("k", [1, 3])
def test_against_a_computation_by_hand(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_quality, "_BLOCK", 17)
    rng = np.random.default_rng(k)
    real, samples = rng.standard_normal((60, 3)), rng.standard_normal((50, 3)) * 0.8 + 0.7
    found = precision_and_recall(real, samples, k)
    assert found == pytest.approx(by_hand(real, samples, k))
    assert 0.05 < min(found.values()) < max(found.values()) < 0.99


def test_where_the_answer_is_known() -> None:
    rng = np.random.default_rng(0)
    real = np.concatenate([rng.standard_normal((300, 2)), rng.standard_normal((300, 2)) + 100])
    alike = np.concatenate([rng.standard_normal((300, 2)), rng.standard_normal((300, 2)) + 100])
    assert min(precision_and_recall(real, alike).values()) > 0.95
    one_mode = rng.standard_normal((600, 2))
    found = precision_and_recall(real, one_mode)
    assert found["precision"] > 0.95
    assert found["recall"] == pytest.approx(0.5, abs=0.05)
    half_nonsense = np.concatenate([alike[::2], rng.standard_normal((300, 2)) - 1000])
    found = precision_and_recall(real, half_nonsense)
    assert found["precision"] == pytest.approx(0.5, abs=0.05)
    assert found["recall"] > 0.9


@pytest.mark.parametrize("shape", [(200, 1, 6, 5), (20, 1, 6, 5)], ids=["tall", "wide"])
def test_features_are_the_leading_principal_components(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    x = (rng.standard_normal(shape) * np.linspace(1, 3, 5) + 4).astype(np.float32)
    features = Features.of(x, 7)
    flat = x.reshape(len(x), -1).astype(np.float64)
    _, _, axes = np.linalg.svd(flat - flat.mean(0), full_matrices=False)
    expected = (flat - flat.mean(0)) @ axes[:7].T
    np.testing.assert_allclose(np.abs(features(x)), np.abs(expected), atol=1e-6)


def test_constant_pixels_are_no_features() -> None:
    x = np.zeros((50, 6), np.float32)
    x[:, 2:4] = np.random.default_rng(0).standard_normal((50, 2))
    assert Features.of(x).axes.shape == (6, 2)
    assert Features.of(np.ones((50, 6), np.float32)).axes.shape == (6, 0)


def test_a_fitted_prior_reaches_more_of_the_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And gives an autoencoder, whose codes are not normal, something to sample from at all."""
    vae = train(TrainConfig(**SMALL, beta=0.03), tmp_path / "vae", device="cpu")["samples"]
    assert list(vae) == ["features", "neighbours", "examples", "train", "standard", "gaussian", "mixture:10"]
    assert (vae["features"], vae["neighbours"]) == ("32 principal components of the train part", 3)
    assert vae["examples"] == 100
    assert min(vae["gaussian"]["recall"], vae["mixture:10"]["recall"]) > vae["standard"]["recall"] + 0.05
    fitted = sample_quality._priors
    monkeypatch.setattr(sample_quality, "_priors", lambda *given: {"standard": None, **fitted(*given)})
    plain = train(TrainConfig(**SMALL, kind="autoencoder"), tmp_path / "plain", device="cpu")["samples"]
    assert plain["standard"]["recall"] < 0.2 < 0.6 < plain["mixture:10"]["recall"]
    assert plain["mixture:10"]["precision"] > plain["gaussian"]["precision"]
    assert plain["train"] == vae["train"]
    assert min(vae["train"].values()) > 0.8


def test_an_autoencoder_has_no_standard_prior(tmp_path: Path) -> None:
    samples = train(TrainConfig(**{**SMALL, "epochs": 1, "kind": "autoencoder"}), tmp_path / "run", device="cpu")[
        "samples"
    ]
    assert list(samples) == ["features", "neighbours", "examples", "train", "gaussian", "mixture:10"]


def test_vectors_and_binary_images_have_samples_too(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    points = rng.standard_normal((400, 2)) @ rng.standard_normal((2, 5)) + 0.1 * rng.standard_normal((400, 5))
    np.save(tmp_path / "points.npy", points.astype(np.float32))
    config = TrainConfig(
        str(tmp_path / "points.npy"), family="mlp", widths=(32,), latent=2, epochs=20, learning_rate=1e-2
    )
    samples = train(config, tmp_path / "vectors", device="cpu")["samples"]
    assert samples["features"] == "5 principal components of the train part"
    assert samples["standard"]["precision"] > 0.5
    binary = train(
        TrainConfig(**{**SMALL, "epochs": 2, "likelihood": "bernoulli", "binarize": "dynamic"}),
        tmp_path / "binary",
        device="cpu",
    )
    grey = train(TrainConfig(**{**SMALL, "epochs": 2}), tmp_path / "grey", device="cpu")
    assert binary["samples"]["train"] == grey["samples"]["train"]  # images, not draws of them


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"family": "resnet", "widths": (8,), "epochs": 1}, None),
        ({"split": "60,10,3", "epochs": 1}, None),
        ({"split": "5,10,50", "epochs": 1}, {"standard"}),
        ({"split": "11,10,50", "epochs": 1}, {"standard", "gaussian", "mixture:10"}),
        ({"latent": 130, "epochs": 1}, {"train", "standard", "gaussian"}),
        ({"latent": 1025, "widths": (8,), "epochs": 1}, None),
    ],
)
def test_what_cannot_be_measured_is_left_out(
    tmp_path: Path, changes: dict[str, Any], expected: set[str] | None
) -> None:
    metrics = train(TrainConfig(**{**SMALL, **changes}), tmp_path / "run", device="cpu")
    assert ("samples" in metrics) == (expected is not None)
    if expected is not None:
        assert {name for name, entry in metrics["samples"].items() if isinstance(entry, dict)} == expected


def test_examples_that_are_all_alike_have_no_samples_to_compare(tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", np.full((80, 8, 8), 77, np.uint8))
    changes = {"data": str(tmp_path / "images.npy"), "split": "40,20,20", "epochs": 1}
    assert "samples" not in train(TrainConfig(**{**SMALL, **changes}), tmp_path / "run", device="cpu")


def test_without_scikit_learn_there_is_no_mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.random.default_rng(0).integers(0, 256, (80, 8, 8), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    changes = {"data": str(tmp_path / "images.npy"), "split": "40,20,20", "epochs": 1}
    metrics = train(TrainConfig(**{**SMALL, **changes}), tmp_path / "run", device="cpu")
    assert [name for name in metrics["samples"] if name in ("gaussian", "mixture:10")] == ["gaussian"]
