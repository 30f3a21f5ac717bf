"""What an export makes of models from elsewhere, on onnxruntime's CUDA provider: normalisation in groups, attention,
sizes that are free, and TF32's exact first layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

diffusers = pytest.importorskip("diffusers", reason="the models are diffusers'")

from vae_export import Budget, export_bundle  # noqa: E402
from vae_export.export import export_imported  # noqa: E402
from vae_export.imported import ImportOptions  # noqa: E402
from vae_export.importers import load  # noqa: E402
from vae_runtime import VAE  # noqa: E402
from vae_runtime.cuda import why_not_cuda  # noqa: E402

WHY_NOT = why_not_cuda()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=f"no CUDA here: {WHY_NOT}")

LIMITS = {"fp32": 1e-4, "tf32": 2e-3, "fp16": 5e-3}  # max|Δ| of images in [0, 1] from the CPU's in fp32
KL = {
    "block_out_channels": (8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
    "sample_size": 16,
}
TINY = {
    "encoder_block_out_channels": (8, 8),
    "decoder_block_out_channels": (8, 8),
    "num_encoder_blocks": (1, 1),
    "num_decoder_blocks": (1, 1),
    "upsampling_scaling_factor": 2,
}


@pytest.fixture(scope="module")
def bundles(
    crops: Callable[..., np.ndarray], overflowing_kl: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """`AutoencoderKL` of one size, of any, and beyond float16's range, and `AutoencoderTiny`."""
    folder, found = tmp_path_factory.mktemp("on-a-gpu"), {}
    torch.manual_seed(0)
    for source, model in {"kl": diffusers.AutoencoderKL(**KL), "tiny": diffusers.AutoencoderTiny(**TINY)}.items():
        model.save_pretrained(folder / source)
    for name, source, shape in (
        ("kl", "kl", (3, 16, 16)),
        ("kl-free", "kl", (3, None, None)),
        ("kl-large", overflowing_kl, (3, 16, 16)),
        ("tiny", "tiny", (3, 16, 16)),
    ):
        imported = load(str(folder / source), None, ImportOptions(input_shape=shape))
        options: dict[str, Any] = {}
        if name != "kl-free":  # whose examples would have to be of its default size, which takes long here
            options = {"examples": crops(4, 16, 16), "precisions": ["tf32", "fp16"], "budget": Budget(psnr_db=90)}
        export_imported(imported, folder / f"{name}.vae", name=name, **options)
        found[name] = folder / f"{name}.vae"
    return found


@pytest.mark.filterwarnings("ignore::vae_export.FewExamplesWarning")
@pytest.mark.parametrize(
    ("name", "precision"),
    [
        *(("kl", "fp32"), ("kl", "tf32"), ("kl", "fp16"), ("kl-large", "fp16")),
        *(("tiny", "fp32"), ("tiny", "tf32"), ("tiny", "fp16")),
    ],
)
def test_models_of_diffusers_give_on_a_gpu_what_they_give_on_a_cpu(
    bundles: dict[str, Path], crops: Callable[..., np.ndarray], name: str, precision: str
) -> None:
    x = crops(2, 16, 16)
    with VAE.load(bundles[name], "cuda", precision) as gpu, VAE.load(bundles[name]) as cpu:
        # Random weights that blow the activations up blow the rounding up too, as the export has measured.
        measured = gpu.manifest.precisions[precision].fidelity.get("round_trip_max_error", 0.0)
        limit = max(LIMITS[precision], 2 * measured) if name == "kl-large" else LIMITS[precision]
        expected = cpu.reconstruct(x)
        assert np.abs(gpu.reconstruct(x) - expected).max() <= limit
        gpu.warmup([2])
        assert np.abs(gpu.reconstruct(x) - expected).max() <= limit
        for operation in ("encode", "decode"):
            (fixed,) = gpu.plan[operation][0]["fixed_on_gpu"]
            assert (fixed["cuda_graph"], fixed["in_steps"]) == (True, {})
        assert gpu.selftest().passed


def test_images_of_several_sizes_go_through_a_gpu(bundles: dict[str, Path], crops: Callable[..., np.ndarray]) -> None:
    with VAE.load(bundles["kl-free"], "cuda") as gpu, VAE.load(bundles["kl-free"]) as cpu:
        for count, height, width in ((1, 16, 16), (2, 24, 16), (1, 16, 16)):
            x = crops(count, height, width)
            np.testing.assert_allclose(gpu.reconstruct(x), cpu.reconstruct(x), atol=1e-4)


def test_an_exact_first_layer_is_exact_where_tf32_is_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(784, 64))
    decoder = nn.Sequential(nn.Linear(64, 784), nn.Unflatten(1, (1, 28, 28)), nn.Sigmoid())
    x = np.random.default_rng(0).uniform(0.9, 1, (64, 1, 28, 28)).astype(np.float32)
    monkeypatch.setattr("vae_export.precisions.TF32_ERROR", 0.0)
    error = {}
    for name, worth in (("exact", 1e9), ("plain", 0.0)):
        monkeypatch.setattr("vae_export.precisions.WORTH_FLOAT32", worth)
        path = tmp_path / f"{name}.vae"
        export_bundle(encoder, decoder, path, kind="autoencoder", examples=x, precisions=["tf32"])
        with VAE.load(path, "cuda", "tf32") as gpu, VAE.load(path) as cpu:
            assert gpu.plan["encode"][0]["file"] == ("encoder.tf32.onnx" if name == "exact" else "encoder.onnx")
            error[name] = np.abs(gpu.encode(x).mean - cpu.encode(x).mean).max()
    assert error["exact"] < 1e-5
    assert error["plain"] > 5e-5


@pytest.mark.filterwarnings("ignore::vae_export.FewExamplesWarning")
def test_groups_are_normalised_as_one_for_every_number_of_examples(tmp_path: Path) -> None:
    """Those of single channels, whose scale and shift are the normalisation's own, and others."""

    def norm(groups: int) -> nn.Module:
        layer = nn.GroupNorm(groups, 8)
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
        return layer

    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), norm(8), nn.SiLU(), nn.Conv2d(8, 8, 3, 1, 1), norm(4))
    decoder = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(8, 1, 3, 1, 1), nn.Sigmoid())
    x = np.random.default_rng(0).random((8, 1, 16, 16), np.float32)
    path = tmp_path / "groups.vae"
    export_bundle(
        encoder, decoder, path, kind="autoencoder", examples=x, precisions=["tf32"], budget=Budget(psnr_db=90)
    )
    with VAE.load(path, "cuda") as gpu, VAE.load(path) as cpu:
        for _ in range(2):
            for count in (1, 2, 5):
                np.testing.assert_allclose(gpu.encode(x[:count]).mean, cpu.encode(x[:count]).mean, atol=1e-5)
                np.testing.assert_allclose(gpu.reconstruct(x[:count]), cpu.reconstruct(x[:count]), atol=1e-5)
            gpu.warmup([1, 5])
        assert gpu.plan["encode"][0]["file"] == "encoder.cuda.onnx"
