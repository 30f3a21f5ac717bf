"""What is there to keep latent dimensions from collapsing does keep them: small runs on digits, seeded."""

from pathlib import Path
from typing import Any

from vae_training.config import TrainConfig
from vae_training.loop import train

SMALL: dict[str, Any] = {
    "data": "digits", "split": "640,100,100", "family": "mlp", "widths": (32,), "latent": 8, "batch_size": 64,
    "learning_rate": 1e-2, "epochs": 20, "nll_samples": 0,
}  # fmt: skip


def figures(folder: Path, **changes: Any) -> dict[str, Any]:
    return train(TrainConfig(**SMALL, **changes), folder, device="cpu")["test"]


def test_free_bits_keep_units_active_under_a_strong_beta(tmp_path: Path) -> None:
    without = figures(tmp_path / "without", beta=4.0)
    free = figures(tmp_path / "free", beta=4.0, free_bits=0.1)
    assert without["active_units"] == 0
    assert free["active_units"] >= 6
    assert free["kl_nats"] > 0.5 > 0.01 > without["kl_nats"]
    assert free["kl_nats"] < 8 * 0.1 * 1.1  # what is free is taken, and no more
    assert free["mse"] < without["mse"]


def test_a_warm_up_keeps_units_active_under_a_strong_beta(tmp_path: Path) -> None:
    without = figures(tmp_path / "without", beta=2.0, kl_warmup=0.0)
    warm = figures(tmp_path / "warm", beta=2.0, kl_warmup=0.5)
    assert without["active_units"] <= 4 < 6 <= warm["active_units"]
    assert warm["negative_elbo_nats"] < without["negative_elbo_nats"]
