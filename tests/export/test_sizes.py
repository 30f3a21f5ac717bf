"""Height and width may be free: what that takes of a network, and networks that do not keep to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from vae_export import export_bundle
from vae_export.cli import _default_output
from vae_export.export import halves_of
from vae_export.verify import open_graphs
from vae_runtime import VAE, ExportError, InputError
from vae_runtime.manifest import InputSpec
from vae_training.models import ModelConfig, build_model


class Encoder(nn.Module):
    """(N, 3, H, W) -> mean, logvar (N, 2, H/4, W/4)."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 4, 4)

    def forward(self, x):
        return self.layer(x).chunk(2, dim=1)


class HalvesWhenWide(Encoder):
    def forward(self, x):
        mean, logvar = super().forward(x)
        return (mean * 0.5 if x.shape[-1] > 100 else mean), logvar


class HalvesWhenNarrow(Encoder):
    def forward(self, x):
        mean, logvar = super().forward(x)
        return (mean * 0.5 if x.shape[-1] < 12 else mean), logvar


class HalvesWhenLarge(Encoder):
    def forward(self, x):
        mean, logvar = super().forward(x)
        return (mean * 0.5 if x.shape[-1] * x.shape[-2] > 4000 else mean), logvar


class TakesCareOfKernels(Encoder):
    """As diffusers' upsampling: another layout in memory where a kernel could not count the elements."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Conv2d(3, 512, 1), nn.Conv2d(512, 3, 1)

    def forward(self, x):
        wide = self.wide(x)
        return super().forward(self.narrow(wide.contiguous() if wide.numel() > 2**31 else wide))


class HalvesWhenHuge(TakesCareOfKernels):
    """At 1450 pixels, two rows of the widest layer have 2^31 elements."""

    def forward(self, x):
        mean, logvar = super().forward(x)
        return (mean * 0.5 if x.shape[-1] > 1400 else mean), logvar


class NeedsRoom(Encoder):
    """Mirrors more than a small image has, so that it does not run on one: that is no decision."""

    def forward(self, x):
        return self.layer(nn.functional.pad(x, (6, 6, 6, 6), mode="reflect")[..., 6:-6, 6:-6]).chunk(2, dim=1)


class Mixes(Encoder):
    """Normalises over the batch, always."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4, track_running_stats=False)

    def forward(self, x):
        return self.norm(self.layer(x)).chunk(2, dim=1)


class Cancels(Encoder):
    """Loses digits: a hundred thousand is added and taken away again."""

    def forward(self, x):
        mean, logvar = super().forward(x)
        return mean, (logvar * 1e3 + self.layer(x * 1.0001).chunk(2, dim=1)[1] * -1e3) * 1e2


def decoder() -> nn.Module:
    return nn.Sequential(nn.ConvTranspose2d(2, 3, 4, 4), nn.Sigmoid())


def export(encoder: nn.Module, path: Path, examples: int = 2, **options: Any) -> Any:
    x = np.random.default_rng(0).random((examples, 3, 32, 32), dtype=np.float32)
    return export_bundle(encoder, decoder(), path, examples=x, multiple_of=4, **options)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (HalvesWhenWide, r"the encoder's code decides by the size of its input \(x\.size\(\)\[3\] <= 100\)"),
        (HalvesWhenLarge, r"the encoder's code decides by the size of its input \(x\.size\(\)\[3\] ?\* ?x"),
        (HalvesWhenHuge, r"the encoder's code decides by the size of its input \(x\.size\(\)\[3\] <= 1400\)"),
        (HalvesWhenNarrow, "mean differs from PyTorch by"),
    ],
)
def test_a_network_that_decides_by_the_size_is_refused(network: type[nn.Module], message: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=message):
        export(network(), tmp_path / "a.vae")
    assert list(tmp_path.iterdir()) == []


def test_what_is_done_for_tensors_that_kernels_cannot_count_is_no_decision(tmp_path: Path) -> None:
    assert export(TakesCareOfKernels(), tmp_path / "a.vae").input.shape == (3, None, None)


def test_a_network_that_needs_some_room_is_exported(tmp_path: Path) -> None:
    manifest = export(NeedsRoom(), tmp_path / "a.vae")
    assert (manifest.input.shape, manifest.input.multiple_of, manifest.input.default_size) == (
        (3, None, None),
        4,
        (32, 32),
    )
    assert manifest.latent.shape == (2, None, None)
    assert manifest.precisions["fp32"].fidelity["sizes"] == [[32, 32], [36, 40]]
    with VAE.load(tmp_path / "a.vae") as vae:
        assert vae.encode(np.zeros((1, 3, 64, 20), np.float32)).mean.shape == (1, 2, 16, 5)


def test_a_network_that_mixes_rows_is_found_with_a_single_example(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="mixes the rows of a batch"):
        export(Mixes(), tmp_path / "a.vae", examples=1)


def test_what_the_export_lets_through_passes_the_self_test(tmp_path: Path) -> None:
    manifest = export(Cancels(), tmp_path / "a.vae", tolerance=1e-2)
    assert manifest.golden.tolerance["fp32"] > 1e-4
    with VAE.load(tmp_path / "a.vae") as vae:
        assert vae.selftest().passed
        assert max(vae.selftest().errors.values()) > 1e-4


def test_resnet_models_with_attention_run_at_other_sizes_and_batches() -> None:
    """GroupNorm and attention keep height, width and batch free in plain ONNX."""
    model = build_model(ModelConfig("resnet", "vae", (3, 16, 16), 3, (8,), 0, "group", "silu", True)).eval()
    halves = halves_of(model, "vae")
    rng = np.random.default_rng(0)
    example = rng.random((2, 3, 8, 12), dtype=np.float32)
    graphs = halves.to_onnx(example, halves.encode(example)["mean"], True)
    spec = InputSpec("image", (3, None, None), "rgb", "exact", 2, (8, 12))
    encoder, decoder = open_graphs(graphs, spec, halves.encode(example))
    for shape in ((1, 3, 4, 4), (3, 3, 20, 12), (2, 3, 16, 28)):
        x = rng.random(shape, dtype=np.float32)
        expected = halves.encode(x)
        mean, logvar = encoder.run(x)
        np.testing.assert_allclose(mean, expected["mean"], atol=1e-5)
        np.testing.assert_allclose(logvar, expected["logvar"], atol=1e-5)
        np.testing.assert_allclose(decoder.run(mean)[0], halves.decode(expected["mean"]), atol=1e-5)


@pytest.mark.parametrize(
    ("multiple", "message"),
    [
        (0, "multiple_of is 0"),
        (5, "multiple_of is 5; the examples have shape"),
        (8, r"multiples of 8, expected \(N, C"),
    ],
)
def test_a_multiple_that_is_not_the_networks_is_refused(multiple: int, message: str, tmp_path: Path) -> None:
    x = torch.rand(2, 3, 32, 32)
    with pytest.raises((InputError, ExportError), match=message):
        export_bundle(Encoder(), decoder(), tmp_path / "a.vae", examples=x, multiple_of=multiple)


def test_the_bundle_is_named_after_its_source(tmp_path: Path) -> None:
    for name in ("v1.4", "v1.5"):
        (tmp_path / name).mkdir()
        assert _default_output(str(tmp_path / name)) == tmp_path / f"{name}.vae"
    assert _default_output("digits/model.pt") == Path("digits/model.vae")
    assert _default_output("package.module:make") == Path("make.vae")
    assert _default_output("halves/encoder.pt,halves/decoder.pt") == Path("halves/model.vae")
    for empty in ("", "a:", "/"):
        with pytest.raises(InputError, match="gives the bundle no name; pass --output"):
            _default_output(empty)
