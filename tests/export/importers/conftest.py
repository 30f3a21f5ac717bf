"""One real photograph, cut to sizes, and a model's halves compared on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

datasets = pytest.importorskip("sklearn.datasets", reason="the photograph is scikit-learn's")


@pytest.fixture(scope="session")
def crops() -> Callable[..., np.ndarray]:
    """(count, height, width) -> that many different parts of the photograph, float32 (count, 3, H, W) in [0, 1]."""
    photograph = datasets.load_sample_images().images[0]

    def cut(count: int, height: int, width: int) -> np.ndarray:
        parts = [photograph[40 * n : 40 * n + height, 100 * n : 100 * n + width] for n in range(count)]
        return np.ascontiguousarray(np.stack(parts).transpose(0, 3, 1, 2), np.float32) / np.float32(255)

    return cut


@pytest.fixture(scope="session")
def overflowing_kl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a diffusers `AutoencoderKL` whose activations go beyond float16's range in both halves."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(
        block_out_channels=(8,),
        norm_num_groups=4,
        mid_block_add_attention=False,
        sample_size=16,
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("conv2.weight"):
                weight.mul_(1e5)
    folder = tmp_path_factory.mktemp("diffusers") / "overflowing-kl"
    model.save_pretrained(folder)
    return folder
