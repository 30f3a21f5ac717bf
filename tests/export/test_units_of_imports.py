"""A model from elsewhere is verified on few inputs, and its active units are measured on more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from vae_export.cli import main
from vae_runtime.bundle import Bundle
from vae_runtime.manifest import Manifest

MODULE = "networks_of_the_unit_tests"
SOURCE = """
import torch
from torch import nn

class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 6)
        with torch.no_grad():
            self.layer.weight[2] = 0
            self.layer.weight[:2] *= 5
    def forward(self, x):
        return self.layer(x.flatten(1)).chunk(2, dim=1)

def make():
    torch.manual_seed(0)
    return Encoder(), nn.Sequential(nn.Linear(3, 16), nn.Sigmoid(), nn.Unflatten(1, (1, 4, 4)))
"""

pytestmark = pytest.mark.usefixtures("networks")


def export(folder: Path, rows: int, *options: str) -> tuple[Manifest, np.ndarray]:
    images = np.random.default_rng(0).random((rows, 1, 4, 4), dtype=np.float32)
    np.save(folder / "x.npy", images)
    arguments = ["--input", "1x4x4", "--input-range", "unit", "--data", str(folder / "x.npy"), *options]
    result = CliRunner().invoke(main, [f"{MODULE}:make", *arguments, "--output", str(folder / "a.vae")])
    assert result.exit_code == 0, result.output
    return Bundle.open(folder / "a.vae").manifest, images


def test_data_tells_the_active_units_where_it_is_enough(networks: Any, tmp_path: Path) -> None:
    manifest, images = export(tmp_path, 300)
    units = manifest.latent.active_units
    assert units is not None
    assert (units.examples, units.active) == (256, 2)
    assert manifest.precisions["fp32"].fidelity["examples"] == 16
    with torch.no_grad():
        mean, _ = networks.make()[0](torch.from_numpy(images[np.arange(256) * 300 // 256]))
    np.testing.assert_allclose(units.variances, mean.var(0, correction=0), rtol=1e-3, atol=1e-9)


def test_fewer_say_nothing_and_thresholds_bring_their_own(tmp_path: Path) -> None:
    (tmp_path / "few").mkdir()
    assert export(tmp_path / "few", 31)[0].latent.active_units is None
    options = ["--calibrate", str(tmp_path / "x.npy"), "--scores", "reconstruction"]
    units = export(tmp_path, 300, *options)[0].latent.active_units
    assert units is not None
    assert units.examples == 300
