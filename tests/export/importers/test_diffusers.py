"""Models of diffusers: the bundle computes what the library's own methods and its pipelines' formulas give."""

from __future__ import annotations

import json
import math
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="the models are diffusers'")

from safetensors.torch import load_file, save_file  # noqa: E402

from vae_export.export import export_imported  # noqa: E402
from vae_export.graphs import decoder_to_onnx  # noqa: E402
from vae_export.imported import ImportOptions  # noqa: E402
from vae_export.importers import load  # noqa: E402
from vae_runtime import VAE  # noqa: E402
from vae_runtime.errors import CheckpointError, ExportError, InputError  # noqa: E402

WEIGHTS = "diffusion_pytorch_model.safetensors"
KL = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
    "latent_channels": 3,
    "scaling_factor": 0.6,
    "shift_factor": 0.25,
}
TINY = {
    "encoder_block_out_channels": (8, 8, 8),
    "decoder_block_out_channels": (8, 8, 8),
    "num_encoder_blocks": (1, 1, 1),
    "num_decoder_blocks": (1, 1, 1),
    "scaling_factor": 0.5,
    "shift_factor": -0.125,
}
PLAIN = ImportOptions()


def save_kl(folder: Path, **changes: Any) -> Path:
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(**{**KL, **changes})
    if model.quant_conv is not None:  # one channel's logvar beyond each end of the range that the model cuts it to
        torch.nn.init.constant_(model.quant_conv.bias[3:4], 100.0)
        torch.nn.init.constant_(model.quant_conv.bias[4:5], -100.0)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def kl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_kl(tmp_path_factory.mktemp("diffusers") / "kl")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("diffusers") / "tiny"
    diffusers.AutoencoderTiny(**TINY).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bundles(kl: Path, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bundles")
    for source in (kl, tiny):
        export_imported(load(str(source), None, PLAIN), folder / f"{source.name}.vae")
    return {source.name: folder / f"{source.name}.vae" for source in (kl, tiny)}


def expected_of_kl(folder: Path, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """mean, logvar and the mean's reconstruction by the library's methods and the formulas of its pipelines."""
    model = diffusers.AutoencoderKL.from_pretrained(folder, local_files_only=True).eval()
    config = model.config
    with torch.no_grad():
        posterior = model.encode(torch.from_numpy(x * 2 - 1)).latent_dist
        sample = model.decode(posterior.mode()).sample
    if config.latents_mean is None:
        shift, scale = np.float32(config.shift_factor or 0), np.float32(config.scaling_factor)
    else:
        shift = np.float32(config.latents_mean).reshape(1, -1, 1, 1)
        scale = np.float32(config.scaling_factor) / np.float32(config.latents_std).reshape(1, -1, 1, 1)
    mean = (posterior.mean.numpy() - shift) * scale
    logvar = posterior.logvar.numpy() + 2 * np.log(scale)
    return mean, logvar, (sample / 2 + 0.5).clamp(0, 1).numpy()


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(("height", "width"), [(64, 96), (34, 50)])
def test_a_bundle_of_a_kl_model_agrees_with_diffusers(
    kl: Path, bundles: dict[str, Path], crops: Callable[..., np.ndarray], count: int, height: int, width: int
) -> None:
    x = crops(count, height, width)
    mean, logvar, images = expected_of_kl(kl, x)
    with VAE.load(bundles["kl"]) as vae:
        posterior = vae.encode(x)
        np.testing.assert_allclose(posterior.mean, mean, rtol=0, atol=1e-4)
        np.testing.assert_allclose(posterior.logvar, logvar, rtol=0, atol=1e-4)
        np.testing.assert_allclose(vae.decode(mean), images, rtol=0, atol=1e-4)
    assert mean.shape == (count, 3, height // 2, width // 2)
    assert np.ptp(images) > 0.1
    np.testing.assert_allclose(logvar[:, 0], 20 + 2 * math.log(0.6), rtol=1e-6)
    np.testing.assert_allclose(logvar[:, 1], -30 + 2 * math.log(0.6), rtol=1e-6)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(("height", "width"), [(64, 96), (36, 52)])
def test_a_bundle_of_a_tiny_model_agrees_with_diffusers(
    tiny: Path, bundles: dict[str, Path], crops: Callable[..., np.ndarray], count: int, height: int, width: int
) -> None:
    x = crops(count, height, width)
    model = diffusers.AutoencoderTiny.from_pretrained(tiny, local_files_only=True).eval()
    with torch.no_grad():
        latents = model.encode(torch.from_numpy(x * 2 - 1)).latents
        images = (model.decode(latents).sample / 2 + 0.5).clamp(0, 1).numpy()
    with VAE.load(bundles["tiny"]) as vae:
        code = vae.encode(x).mean
        np.testing.assert_allclose(code, (latents.numpy() + 0.125) * 0.5, rtol=0, atol=1e-4)
        np.testing.assert_allclose(vae.decode(code), images, rtol=0, atol=1e-4)
    assert latents.shape == (count, 4, height // 4, width // 4)
    assert np.ptp(images) > 0.01


BLOCKS = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
    "latent_channels": 3,
}
OTHERS: dict[str, dict[str, Any]] = {
    "AutoencoderKLFlux2": {
        **BLOCKS, "block_out_channels": (8, 16), "layers_per_block": 1, "batch_norm_eps": 0.3,
        "mid_block_add_attention": False,
    },
    "AsymmetricAutoencoderKL": {
        **BLOCKS, "down_block_out_channels": (8, 16), "up_block_out_channels": (16, 8), "scaling_factor": 0.4,
    },
    "AutoencoderKLHunyuanImage": {
        "in_channels": 3, "out_channels": 3, "latent_channels": 8, "block_out_channels": (64, 128),
        "layers_per_block": 1, "spatial_compression_ratio": 2, "sample_size": 32, "scaling_factor": 0.7,
    },
    "AutoencoderKLQwenImage": {
        "base_dim": 8, "z_dim": 3, "dim_mult": [1, 1], "num_res_blocks": 0, "temperal_downsample": [True],
        "latents_mean": [0.5, -0.25, 0.0], "latents_std": [2.0, 0.5, 1.5],
    },
    "AutoencoderDC": {
        "latent_channels": 4, "attention_head_dim": 8, "scaling_factor": 0.4,
        "encoder_block_types": ("ResBlock", "EfficientViTBlock"), "decoder_block_types": ("ResBlock", "ResBlock"),
        **{f"{half}_block_out_channels": (8, 16) for half in ("encoder", "decoder")},
        **{f"{half}_layers_per_block": (1, 1) for half in ("encoder", "decoder")},
        **{f"{half}_qkv_multiscales": ((), (5,)) for half in ("encoder", "decoder")},
    },
}  # fmt: skip


def require_class(name: str) -> None:
    if not hasattr(diffusers, name):
        pytest.skip(f"diffusers {diffusers.__version__} has no {name}")


def expected_of(model: Any, x: np.ndarray) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """mean, logvar if there is one, and the reconstruction, by the library's methods and its pipelines' formulas."""
    name, inputs = type(model).__name__, torch.from_numpy(x * 2 - 1)
    if name == "AutoencoderDC":
        code = model.encode(inputs).latent
        images = (model.decode(code).sample / 2 + 0.5).clamp(0, 1)
        return (code * model.config.scaling_factor).numpy(), None, images.numpy()
    if name == "AutoencoderKLQwenImage":
        posterior = model.encode(inputs.unsqueeze(2)).latent_dist
        shift, std = (torch.tensor(model.config[key]).view(1, -1, 1, 1, 1) for key in ("latents_mean", "latents_std"))
        images = (model.decode(posterior.mean).sample[:, :, 0] / 2 + 0.5).clamp(0, 1)
        outputs = (posterior.mean - shift) / std, posterior.logvar - 2 * std.log()
        return outputs[0][:, :, 0].numpy(), outputs[1][:, :, 0].numpy(), images.numpy()
    posterior = model.encode(inputs).latent_dist
    images = (model.decode(posterior.mean).sample / 2 + 0.5).clamp(0, 1).numpy()
    if name != "AutoencoderKLFlux2":
        scale = model.config.scaling_factor
        return (posterior.mean * scale).numpy(), (posterior.logvar + 2 * math.log(scale)).numpy(), images
    variance = model.bn.running_var.view(1, -1, 1, 1) + model.config.batch_norm_eps
    mean = in_patches(posterior.mean) - model.bn.running_mean.view(1, -1, 1, 1)
    return (mean / variance.sqrt()).numpy(), (in_patches(posterior.logvar) - variance.log()).numpy(), images


def in_patches(z: torch.Tensor) -> torch.Tensor:
    """As diffusers.Flux2Pipeline._patchify_latents, which cannot be imported without transformers."""
    n, c, h, w = z.shape
    return z.view(n, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(n, 4 * c, h // 2, w // 2)


@pytest.mark.parametrize("name", OTHERS)
def test_bundles_of_other_classes_agree_with_diffusers(
    name: str, tmp_path: Path, crops: Callable[..., np.ndarray]
) -> None:
    require_class(name)
    torch.manual_seed(0)
    model = getattr(diffusers, name)(**OTHERS[name]).eval()
    if name == "AutoencoderKLFlux2":
        torch.nn.init.uniform_(model.bn.running_mean, -0.5, 0.5)
        torch.nn.init.uniform_(model.bn.running_var, 0.1, 2)
    model.save_pretrained(tmp_path / "model")
    imported = load(str(tmp_path / "model"), None, PLAIN)
    # AutoencoderDC attends in another way to as few positions as the smaller one has. One size is exported faster.
    sizes = [(48, 64), (4, 4)] if name == "AutoencoderDC" else [(16, 16)]
    if len(sizes) == 1:
        imported = load(str(tmp_path / "model"), None, ImportOptions(input_shape=(3, 16, 16)))
    if name == "AutoencoderKLQwenImage":  # one slice of each kernel, and nothing of those over time alone
        halves = [imported.halves._encoder, imported.halves._decoder]
        weights = {id(tensor): tensor for half in halves for tensor in half.parameters()}.values()
        assert sum(tensor.numel() for tensor in weights) < 0.5 * sum(tensor.numel() for tensor in model.parameters())
    if name == "AsymmetricAutoencoderKL":  # whose blocks are AutoencoderKL's, and so are its graphs
        x = crops(2, 16, 16)
        with torch.no_grad():
            mean, logvar, images = expected_of(model, x)
        found = imported.halves.encode(x)
        np.testing.assert_allclose(found["mean"], mean, rtol=0, atol=1e-4)
        np.testing.assert_allclose(found["logvar"], logvar, rtol=0, atol=1e-4)
        np.testing.assert_allclose(imported.halves.decode(mean), images, rtol=0, atol=1e-4)
        return
    manifest = export_imported(imported, tmp_path / "a.vae")
    assert manifest.kind == ("autoencoder" if name == "AutoencoderDC" else "vae")
    with VAE.load(tmp_path / "a.vae", threads=1) as vae, torch.no_grad():
        for height, width in sizes:
            x = crops(2, height, width)
            mean, logvar, images = expected_of(model, x)
            posterior = vae.encode(x)
            np.testing.assert_allclose(posterior.mean, mean, rtol=0, atol=1e-4)
            if logvar is None:
                assert posterior.logvar is None
            else:
                np.testing.assert_allclose(posterior.logvar, logvar, rtol=0, atol=1e-4)
            np.testing.assert_allclose(vae.decode(mean), images, rtol=0, atol=1e-4)
            assert np.ptp(images) > 0.05


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("AutoencoderKLFlux2", {"patch_size": [2, 1]}, r"patch_size \[2, 1\]; expected the sides of a square"),
        ("AutoencoderKLFlux2", {"patch_size": [0, 0]}, r"patch_size \[0, 0\]; expected the sides of a square"),
        (
            "AutoencoderKLFlux2",
            {"patch_size": 2},
            "AutoencoderKLFlux2: .*|patch_size 2; expected the sides of a square",
        ),
        ("AutoencoderKLHunyuanImage", {"spatial_compression_ratio": None}, "describes no AutoencoderKLHunyuanImage"),
        (
            "AutoencoderKLHunyuanImage",
            {"out_channels": 1},
            r"of shape \(1, 3, 512, 512\) have .* \(1, 1, 512, 512\); exp",
        ),
        ("AutoencoderKLQwenImage", {"latents_std": [1, 1]}, "latents_std .*; expected 3 numbers"),
    ],
)
def test_configs_of_other_classes_that_say_nonsense_are_refused(
    name: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    require_class(name)
    config = {"_class_name": name, **OTHERS[name], **changes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises((CheckpointError, ExportError), match=message):
        load(str(tmp_path), None, PLAIN)


def test_the_manifests_tell_what_the_models_are(bundles: dict[str, Path]) -> None:
    with VAE.load(bundles["kl"]) as vae, VAE.load(bundles["tiny"]) as tiny:
        assert (vae.manifest.kind, vae.manifest.name, vae.manifest.likelihood) == ("vae", "kl", None)
        assert (vae.manifest.input.shape, vae.manifest.latent.shape) == ((3, None, None), (3, None, None))
        assert (vae.manifest.input.multiple_of, tiny.manifest.input.multiple_of) == (2, 4)
        assert (tiny.manifest.kind, tiny.manifest.latent.shape) == ("autoencoder", (4, None, None))
        assert vae.manifest.to_dict()["origin"] == {
            "library": "diffusers",
            "version": diffusers.__version__,
            "class": "AutoencoderKL",
        }
        assert vae.selftest().passed
        assert tiny.selftest().passed


def in_shards(folder: Path) -> None:
    model = diffusers.AutoencoderKL.from_pretrained(folder)
    (folder / WEIGHTS).unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1


def as_pickle(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "diffusion_pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def with_old_names(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
        weights = {name.replace(f".{new}.", f".{old}."): value for name, value in weights.items()}
    assert "encoder.mid_block.attentions.0.proj_attn.weight" in weights
    save_file(weights, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("changes", "change"),
    [
        ({}, in_shards),
        ({}, as_pickle),
        ({}, with_old_names),
        ({"latents_mean": [0.5, -1.0, 2.0], "latents_std": [0.5, 2.0, 3.0], "shift_factor": None}, None),
        ({"use_quant_conv": False, "use_post_quant_conv": False, "mid_block_add_attention": False}, None),
        ({"scaling_factor": 1.0, "shift_factor": None, "in_channels": 1, "out_channels": 1}, None),
    ],
)
def test_every_way_of_saving_and_scaling_is_read_as_the_library_does(
    tmp_path: Path, crops: Callable[..., np.ndarray], changes: dict[str, Any], change: Callable[[Path], None] | None
) -> None:
    folder = save_kl(tmp_path / "model", **changes)
    if change is not None:
        change(folder)
    x = crops(2, 16, 24)[:, : changes.get("in_channels", 3)]
    mean, logvar, images = expected_of_kl(folder, x)
    halves = load(str(folder), None, PLAIN).halves
    encoded = halves.encode(x)
    np.testing.assert_allclose(encoded["mean"], mean, rtol=0, atol=1e-5)
    np.testing.assert_allclose(encoded["logvar"], logvar, rtol=0, atol=1e-5)
    np.testing.assert_allclose(halves.decode(mean), images, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [WEIGHTS, "diffusion_pytorch_model.fp16.safetensors"])
def test_half_precision_weights_are_computed_in_float32(
    kl: Path, tmp_path: Path, crops: Callable[..., np.ndarray], name: str
) -> None:
    folder = Path(shutil.copytree(kl, tmp_path / "kl"))
    weights = {key: value.half() for key, value in load_file(folder / WEIGHTS).items()}
    (folder / WEIGHTS).unlink()
    save_file(weights, folder / name)
    imported = load(str(folder), None, PLAIN)
    save_file({key: value.float() for key, value in weights.items()}, folder / WEIGHTS)
    x = crops(1, 16, 16)
    np.testing.assert_allclose(imported.halves.encode(x)["mean"], expected_of_kl(folder, x)[0], rtol=0, atol=1e-5)


def test_a_pipeline_is_read_for_its_vae(kl: Path, tmp_path: Path) -> None:
    pipeline = tmp_path / "my-pipeline"
    shutil.copytree(kl, pipeline / "vae")
    (pipeline / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    assert load(str(pipeline), None, PLAIN).name == "my-pipeline"
    assert load(str(pipeline / "vae"), None, PLAIN).name == "my-pipeline"
    shutil.rmtree(pipeline / "vae")
    with pytest.raises(ExportError, match=r"StableDiffusionPipeline, that has no vae/config.json"):
        load(str(pipeline), None, PLAIN)


@pytest.mark.parametrize(("size", "expected"), [(8, (64, 64)), (100, (100, 100)), ([96, 1024], (96, 128))])
def test_golden_inputs_are_of_the_size_it_was_trained_with_where_that_is_cheap(
    tmp_path: Path, size: Any, expected: tuple[int, int]
) -> None:
    imported = load(str(save_kl(tmp_path, sample_size=size)), None, PLAIN)
    assert imported.default_size == expected


def test_a_kl_model_of_usual_width_keeps_its_sizes_free(tmp_path: Path) -> None:
    """Its upsampling looks at the size, for the sake of a kernel that cannot count so many elements."""
    folder = save_kl(tmp_path, block_out_channels=(8, 136), norm_num_groups=8, mid_block_add_attention=False)
    imported = load(str(folder), None, PLAIN)
    z = torch.zeros(2, 3, 32, 32)
    assert decoder_to_onnx(imported.halves._decoder, z, free=True)


@pytest.mark.filterwarnings("ignore::vae_export.FewExamplesWarning")
def test_what_overflows_in_float16_stays_in_fp32(
    overflowing_kl: Path, crops: Callable[..., np.ndarray], tmp_path: Path
) -> None:
    x = crops(4, 16, 16)
    model = diffusers.AutoencoderKL.from_pretrained(overflowing_kl, local_files_only=True).eval()
    assert model.config.force_upcast
    with torch.no_grad():
        images = torch.from_numpy(x * 2 - 1)
        assert model(images).sample.isfinite().all()
        assert not model.half()(images.half()).sample.isfinite().any()
    imported = load(str(overflowing_kl), None, ImportOptions(input_shape=(3, 16, 16)))
    fp16 = export_imported(imported, tmp_path / "a.vae", examples=x, precisions=["fp16"]).precisions["fp16"]
    assert fp16.fidelity["reconstruction_max_error"] < 5e-3
    assert all(fp16.quality["kept_fp32"].values())
    assert {(fp16.encoder, fp16.decoder)} == {("encoder.fp16.onnx", "decoder.fp16.onnx")}


def test_a_fixed_size_may_be_asked_for(kl: Path) -> None:
    imported = load(str(kl), None, ImportOptions(input_shape=(3, 32, 48), kind="vae"))
    assert (imported.input_shape, imported.multiple_of, imported.default_size) == ((3, 32, 48), 1, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_shape": (3, 33, 48)}, "multiples of 2"),
        ({"input_shape": (1, 32, 48)}, "takes 3 channels"),
        ({"input_shape": (784,)}, "takes 3 channels"),
        ({"kind": "autoencoder"}, "--kind is 'autoencoder', but AutoencoderKL says 'vae'"),
        ({"latent_scale": 0.5}, "--latent-scale is of no use here"),
        ({"latent_shift": 0.0}, "--latent-shift is of no use here"),
        ({"input_range": "signed"}, "--input-range is of no use here"),
        ({"multiple_of": 8}, "--multiple-of is of no use here"),
        ({"weights": "a.pt"}, "--weights is of no use here"),
        ({"trust_pickle": True}, "--trust-pickle is of no use here"),
    ],
)
def test_options_that_the_folder_contradicts_are_refused(kl: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(str(kl), None, ImportOptions(**options))


def config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**content, **changes}))

    return change


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        content = load_file(folder / WEIGHTS)
        change(content)
        save_file(content, folder / WEIGHTS)

    return rewrite


def file(name: str, content: bytes | None) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        if content is not None:
            (folder / name).write_bytes(content)

    return rewrite


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("canary"),))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (config(_class_name="AutoencoderKLWan"), ExportError, "holds a diffusers AutoencoderKLWan"),
        (
            config(_class_name="UNet2DModel"),
            ExportError,
            "AutoencoderDC, AutoencoderTiny can be exported as they are, and others .* by a factory",
        ),
        (config(_class_name=["AutoencoderKL"]), ExportError, "can be exported"),
        (config(block_out_channels=[8, 18]), CheckpointError, "describes no AutoencoderKL"),
        (config(block_out_channels="wide"), CheckpointError, "describes no AutoencoderKL"),
        (config(norm_num_groups=None), CheckpointError, "describes no AutoencoderKL"),
        (config(out_channels=4), ExportError, "expected .* the images' own"),
        (config(scaling_factor=0), CheckpointError, "expected them above 0"),
        (config(scaling_factor="half"), CheckpointError, "scaling_factor 'half'; expected a number"),
        (config(scaling_factor=10**400), CheckpointError, "scaling_factor 10000.*; expected a number"),
        (config(shift_factor=True), CheckpointError, "shift_factor True; expected a number"),
        (config(latents_mean=[0, 0, 0]), CheckpointError, "expected the shift alone, or both"),
        (config(latents_mean=[0, 0], latents_std=[1, 1]), CheckpointError, "expected 3 numbers"),
        (config(latents_mean=[0] * 3, latents_std=[1, 1, 0], shift_factor=0), CheckpointError, "expected them above 0"),
        (config(quantization_config={"quant_method": "gguf"}), ExportError, "the weights are quantized"),
        (config(_diffusers_version="99.0", eps=1), ExportError, "of diffusers 99.0, has eps"),
        (weights(lambda w: w.pop("quant_conv.bias")), CheckpointError, "it lacks quant_conv.bias$"),
        (weights(lambda w: w.update(extra=torch.ones(2))), CheckpointError, "it has the unknown extra$"),
        (
            weights(lambda w: w.update({"quant_conv.bias": torch.ones(2)})),
            CheckpointError,
            r"wrong shape or type in quant_conv.bias \(2 float32, expected 6\)",
        ),
        (weights(lambda w: w.clear()), CheckpointError, "it lacks .*, .*, .* and [0-9]+ more"),
        (file(WEIGHTS, b"\0" * 100), CheckpointError, "damaged or no safetensors file"),
        (file(WEIGHTS, b""), CheckpointError, "damaged or no safetensors file"),
        (file("", None), CheckpointError, f"{WEIGHTS} is missing"),
        (file("diffusion_pytorch_model.bin", pickle.dumps(Hostile())), CheckpointError, "more than plain data"),
        (file("diffusion_pytorch_model.bin", b"PK\3\4"), CheckpointError, "damaged or holds no weights"),
        (
            file(WEIGHTS + ".index.json", b'{"weight_map": {"a": "../model.safetensors"}}'),
            CheckpointError,
            "expected a plain name",
        ),
        (file(WEIGHTS + ".index.json", b'{"weight_map": {"a": "b.safetensors"}}'), CheckpointError, "b.* is missing"),
        (file(WEIGHTS + ".index.json", b"{"), CheckpointError, "is no JSON object"),
    ],
)
def test_a_folder_that_cannot_be_imported_is_refused_by_name(
    kl: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path], None],
    error: type[Exception],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path(shutil.copytree(kl, tmp_path / "kl"))
    change(folder)
    with pytest.raises(error, match=message) as caught:
        load(str(folder), "diffusers", PLAIN)
    assert "\n" not in str(caught.value)
    assert not Path("canary").exists()


@pytest.mark.parametrize(("pipeline", "fine"), [("Flux2Pipeline", True), ("Ideogram4Pipeline", False)])
def test_a_pipeline_that_orders_patches_in_its_own_way_is_refused(tmp_path: Path, pipeline: str, fine: bool) -> None:
    require_class("AutoencoderKLFlux2")
    torch.manual_seed(0)
    diffusers.AutoencoderKLFlux2(**OTHERS["AutoencoderKLFlux2"]).save_pretrained(tmp_path / "vae")
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    for source in (tmp_path, tmp_path / "vae"):
        if fine:
            assert load(str(source), None, PLAIN).multiple_of == 4
            continue
        with pytest.raises(
            ExportError, match=r"vae is of Ideogram4Pipeline, which puts the latents of an AutoencoderKL"
        ):
            load(str(source), None, PLAIN)


def test_patches_of_one_latent_are_normalised_too(tmp_path: Path) -> None:
    require_class("AutoencoderKLFlux2")
    torch.manual_seed(0)
    model = diffusers.AutoencoderKLFlux2(**{**OTHERS["AutoencoderKLFlux2"], "patch_size": (1, 1)}).eval()
    torch.nn.init.uniform_(model.bn.running_mean, -0.5, 0.5)
    model.save_pretrained(tmp_path)
    imported = load(str(tmp_path), None, PLAIN)
    x = torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        expected = model.bn(model.encode(2 * x - 1).latent_dist.mean)
        np.testing.assert_allclose(imported.halves.encode(x.numpy())["mean"], expected.numpy(), atol=1e-5)


def test_a_class_that_an_older_version_has_not_is_said(kl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vae_export.importers.diffusers_model._library", lambda: SimpleNamespace(__version__="0.1"))
    with pytest.raises(ExportError, match=r"of AutoencoderKL, which diffusers 0\.1 lacks; a newer one has it$"):
        load(str(kl), None, PLAIN)


def test_variants_without_a_plain_file_are_not_guessed_between(kl: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(kl, tmp_path / "kl"))
    for variant in ("ema", "fp16"):
        shutil.copy(folder / WEIGHTS, folder / WEIGHTS.replace(".safe", f".{variant}.safe"))
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"ema.safetensors, .*fp16.safetensors but no"):
        load(str(folder), None, PLAIN)


def test_a_tiny_model_whose_halves_do_not_meet_is_refused(tiny: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "tiny"))
    config(upsampling_scaling_factor=4)(folder)
    with pytest.raises(ExportError, match=r"reconstructions of shape \(1, 3, 2048, 2048\)"):
        load(str(folder), None, PLAIN)


def test_keys_that_an_older_version_wrote_are_passed_over_as_the_library_does(kl: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(kl, tmp_path / "kl"))
    config(_diffusers_version="0.3.0", once="upon a time")(folder)
    assert load(str(folder), None, PLAIN).origin["class"] == "AutoencoderKL"
