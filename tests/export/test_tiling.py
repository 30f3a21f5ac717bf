"""What the export finds and measures of tiles, and that the bundle's calls keep to it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn

from vae_export import export_bundle, tiling
from vae_export.tiling import find_tiling
from vae_runtime import VAE
from vae_runtime.manifest import LOGVAR, MEAN, HalfTiling, InputSpec, Manifest, Tiling

FREE = Path(__file__).parent.parent / "data" / "tiny-free.vae"
SPEC = InputSpec("image", (3, None, None), "rgb", "exact", 2, (12, 16))
X = np.random.default_rng(0).random((1, 3, 12, 16), dtype=np.float32)
ENCODED = dict.fromkeys((MEAN, LOGVAR), np.zeros((1, 2, 6, 8), np.float32))


@pytest.fixture(scope="module")
def graphs() -> tuple[bytes, bytes]:
    return (FREE / "encoder.onnx").read_bytes(), (FREE / "decoder.onnx").read_bytes()


def test_the_field_of_a_known_network_is_found_and_its_tiles_are_exact(graphs: tuple[bytes, bytes]) -> None:
    found = find_tiling(graphs, SPEC, X, ENCODED)
    errors = found.encoder.max_error, found.decoder.max_error
    assert max(errors) <= 1e-6
    assert found == Tiling(HalfTiling(7, 2, errors[0], 12), HalfTiling(5, 2, errors[1], 12))


def test_tiles_that_turn_out_not_exact_are_blended_and_say_so(
    graphs: tuple[bytes, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the analysis had missed something: the measurement finds it."""
    real = tiling.receptive_fields

    def too_small(model: onnx.ModelProto, multiple: int) -> dict:
        fields = real(model, multiple)
        return {name: field._replace(context_before=0, context_after=0) for name, field in fields.items()}

    monkeypatch.setattr(tiling, "receptive_fields", too_small)
    for half in find_tiling(graphs, SPEC, X, ENCODED):
        assert half.context is None
        assert half.max_error > 1e-4
        assert (half.reason or "").startswith("exact tiles differed by")


def test_a_context_too_wide_to_measure_is_not_promised(
    graphs: tuple[bytes, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiling, "MAX_SIDE", 16)
    found = find_tiling(graphs, SPEC, X, ENCODED)
    assert found.decoder.context is None
    assert (found.decoder.reason or "").startswith("4 pixels of context")


def test_normalisation_over_the_image_is_named_and_its_error_measured(graphs: tuple[bytes, bytes]) -> None:
    decoder = onnx.load_from_string(graphs[1])
    last = decoder.graph.node[-1]
    constants = {"gamma": np.ones(3, np.float32), "beta": np.zeros(3, np.float32)}
    decoder.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    norm = helper.make_node("InstanceNormalization", [last.input[0], "gamma", "beta"], ["normal"])
    last.input[0] = "normal"
    decoder.graph.node.insert(len(decoder.graph.node) - 1, norm)
    found = find_tiling((graphs[0], decoder.SerializeToString()), SPEC, X, ENCODED)
    assert found.encoder.context == 2
    assert found.decoder[:2] == (None, None)
    assert found.decoder.reason == "InstanceNormalization"
    assert 1e-4 < found.decoder.max_error < 1


class Encoder(nn.Module):
    """With PixelUnshuffle, which the exporter writes as Reshape, Transpose, Reshape."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.SiLU(), nn.PixelUnshuffle(2)]
        self.body = nn.Sequential(*layers, nn.Conv2d(32, 4, 3, padding=1))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.body(x).chunk(2, dim=1)


def test_an_exported_bundle_tiles_as_its_manifest_says(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = np.random.default_rng(1).random((2, 3, 16, 24), dtype=np.float32)
    layers = [nn.Conv2d(2, 32, 3, padding=1), nn.SiLU(), nn.PixelShuffle(2), nn.Upsample(scale_factor=2)]
    decoder = nn.Sequential(*layers, nn.Conv2d(8, 3, 3, padding=1))
    manifest = export_bundle(Encoder(), decoder, tmp_path / "free.vae", examples=x, multiple_of=4)
    assert Manifest.from_json((tmp_path / "free.vae" / "manifest.json").read_bytes()) == manifest
    assert manifest.tiling is not None
    assert (manifest.tiling.encoder.context, manifest.tiling.decoder.context) == (2, 2)
    images = np.random.default_rng(2).random((1, 3, 60, 76), dtype=np.float32)
    with VAE.load(tmp_path / "free.vae", threads=1) as vae:
        latents = vae.encode(images).mean
        np.testing.assert_allclose(vae.encode(images, tile=24).mean, latents, atol=1e-5)
        np.testing.assert_allclose(vae.decode(latents, tile=24), vae.decode(latents), atol=1e-5)


def test_bundles_of_one_size_say_nothing_of_tiles() -> None:
    assert Manifest.from_json((FREE.parent / "tiny.vae" / "manifest.json").read_bytes()).tiling is None
