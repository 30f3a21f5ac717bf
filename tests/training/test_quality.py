"""What `vae-train` reaches on real data. MNIST is read from the folder named by VAE_TEST_MNIST, if there is one."""

import os
from pathlib import Path

import pytest

from vae_training.config import TrainConfig
from vae_training.loop import train


@pytest.fixture
def mnist() -> str:
    folder = os.environ.get("VAE_TEST_MNIST")
    if not folder:
        pytest.skip("VAE_TEST_MNIST names no folder with MNIST's IDX files")
    return folder


def test_mnist_in_file_order(mnist: str, tmp_path: Path) -> None:
    config = TrainConfig(mnist, split="2000,500,500", order="file", family="mlp", epochs=10)
    metrics = train(config, tmp_path / "run", device="cpu")
    assert metrics["dataset"]["train"] == 2000
    assert metrics["test"]["negative_elbo_nats"] < 165
    assert metrics["test"]["active_units"] > 5
