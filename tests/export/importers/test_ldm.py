"""Single files of latent diffusion's autoencoder, against diffusers' model of the same weights."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="diffusers computes them")

from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from vae_export.imported import ImportOptions  # noqa: E402
from vae_export.importers import load, recognise  # noqa: E402
from vae_export.importers.ldm_file import diffusers_name  # noqa: E402
from vae_runtime.errors import CheckpointError, ExportError, InputError  # noqa: E402

PLAIN = ImportOptions()
CONFIG: dict[str, Any] = {
    "block_out_channels": (32, 64, 64), "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3, "layers_per_block": 1, "latent_channels": 3,
}  # fmt: skip
LEVELS = 3
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def build(**changes: Any) -> Any:
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(**{**CONFIG, **changes}).eval()


def original_names(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As latent diffusion's own code has them; attention by convolutions of 1x1."""
    found = {}
    for name, tensor in weights.items():
        if match := re.search(r"mid_block\.attentions\.0\.(.+)\.(weight|bias)", name):
            new = f"mid.attn_1.{ATTENTION[match[1]]}.{match[2]}"
            tensor = tensor[..., None, None] if tensor.ndim == 2 else tensor
        else:
            new = name.partition(".")[2]
            new = re.sub(r"mid_block\.resnets\.(\d)", lambda one: f"mid.block_{int(one[1]) + 1}", new)
            new = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", new)
            new = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", new)
            new = re.sub(r"up_blocks\.(\d)\.resnets", lambda one: f"up.{LEVELS - 1 - int(one[1])}.block", new)
            new = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda one: f"up.{LEVELS - 1 - int(one[1])}.upsample", new)
            new = new.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        found[f"{name.partition('.')[0]}.{new}"] = tensor.clone()
    return found


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return original_names(build().state_dict())


def test_names_are_translated_as_diffusers_does(weights: dict[str, torch.Tensor]) -> None:
    expected = convert_ldm_vae_checkpoint(dict(weights), build().config)
    renamed = {diffusers_name(name, LEVELS): tensor for name, tensor in weights.items()}
    assert renamed.keys() == expected.keys() == build().state_dict().keys()
    for name, tensor in expected.items():
        assert torch.equal(renamed[name].reshape(tensor.shape), tensor), name


@pytest.mark.parametrize(
    ("prefix", "changes", "options"),
    [
        ("", {"use_quant_conv": False, "use_post_quant_conv": False}, {"latent_scale": 0.36, "latent_shift": 0.12}),
        ("first_stage_model.", {"mid_block_add_attention": False}, {"latent_scale": 0.5}),
    ],
)
def test_the_halves_compute_what_diffusers_does_with_these_weights(
    tmp_path: Path, crops: Callable[..., np.ndarray], prefix: str, changes: dict[str, Any], options: dict[str, Any]
) -> None:
    model = build(**changes)
    tensors = {prefix + name: tensor for name, tensor in original_names(model.state_dict()).items()}
    others = {"model.diffusion_model.out.weight": torch.zeros(3), "cond_stage_model.a": torch.zeros(2)}
    save_file({**tensors, **others}, tmp_path / "sd.safetensors")
    assert recognise(str(tmp_path / "sd.safetensors")).KIND == "ldm"
    imported = load(str(tmp_path / "sd.safetensors"), None, ImportOptions(**options))
    assert (imported.name, imported.is_free, imported.multiple_of) == ("sd", True, 4)
    assert (imported.default_size, imported.origin["class"]) == ((128, 128), "AutoencoderKL")
    x, halves = crops(2, 32, 32), imported.halves  # whose graphs are those of a model from a folder
    with torch.no_grad():
        posterior = model.encode(torch.from_numpy(x * 2 - 1)).latent_dist
        images = (model.decode(posterior.mean).sample / 2 + 0.5).clamp(0, 1).numpy()
    scale, shift = options["latent_scale"], options.get("latent_shift", 0)
    found = halves.encode(x)
    np.testing.assert_allclose(found["mean"], (posterior.mean.numpy() - shift) * scale, rtol=0, atol=1e-4)
    np.testing.assert_allclose(found["logvar"], posterior.logvar.numpy() + 2 * np.log(scale), rtol=0, atol=1e-4)
    np.testing.assert_allclose(halves.decode(found["mean"]), images, rtol=0, atol=1e-4)


def dropped(name: str) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda weights: weights.pop(name)


def added(**more: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda weights: weights.update({name.replace("__", "."): tensor for name, tensor in more.items()})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dropped("encoder.down.1.downsample.conv.bias"), CheckpointError, "lacks encoder.down_blocks.1.downsamplers"),
        (
            dropped("encoder.down.0.block.0.conv1.weight"),
            CheckpointError,
            "a part .* only: 'encoder.down.0.block.0.conv1",
        ),
        (dropped("decoder.conv_in.weight"), CheckpointError, "it holds none, or is no safetensors file"),
        (added(encoder__strange__weight=torch.zeros(2)), CheckpointError, "has the unknown encoder.strange.weight"),
        (added(encoder__down__1__attn__0__q__weight=torch.zeros(2)), ExportError, "attention outside of the middle"),
        (
            lambda w: w.update({f"vae.{name}": tensor.clone() for name, tensor in w.items()}),
            CheckpointError,
            "several, under '', 'vae.'",
        ),
        (added(bn__running_mean=torch.zeros(12)), ExportError, "has bn.running_mean, as FLUX.2's or a quantising"),
        (
            added(quantize__embedding__weight=torch.zeros(2, 2)),
            ExportError,
            "has quantize.embedding.weight, as FLUX.2's",
        ),
        (added(encoder__quant_conv__weight=torch.zeros(2)), ExportError, "has encoder.quant_conv.weight, as FLUX.2's"),
        (
            lambda w: [w.pop(name) for name in list(w) if name.startswith("encoder.down.2.")],
            CheckpointError,
            r"the levels \[0, 1\] of an encoder and \[0, 1, 2\] of a decoder",
        ),
        (
            lambda w: w.update({f"encoder.down.0.block.{n}.x": torch.zeros(1) for n in range(3000)}),
            CheckpointError,
            "has 3000 blocks at level 0",
        ),
        (added(encoder__conv_out__weight=torch.tensor(1.0)), CheckpointError, "with fewer axes than 4"),
        (
            lambda w: w.update({"encoder.conv_out.weight": w["encoder.conv_out.weight"][:3].clone()}),
            ExportError,
            "an encoder that gives 3 channels, and a decoder that takes 3",
        ),
        (
            lambda w: w.update({"encoder.conv_in.weight": torch.zeros(48, 3, 3, 3)}),
            CheckpointError,
            r"wrong shape or type in encoder.conv_in.weight \(48",
        ),
    ],
)
def test_files_without_one_whole_autoencoder_are_refused(
    weights: dict[str, torch.Tensor], tmp_path: Path, change: Callable, error: type[Exception], message: str
) -> None:
    changed = dict(weights)
    change(changed)
    save_file(changed, tmp_path / "a.safetensors")
    with pytest.raises(error, match=message) as caught:
        load(str(tmp_path / "a.safetensors"), "ldm", PLAIN)
    assert "\n" not in str(caught.value)


def test_damaged_and_other_files_are_refused(weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(weights, path)
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    with pytest.raises(CheckpointError, match=r"a\.safetensors is damaged"):
        load(str(path), None, PLAIN)
    for wrong in (b"", b"\0" * 8 + b"{", content[:200], b"PK\3\4", content[:8] + b"[" + content[9:]):
        path.write_bytes(wrong)
        with pytest.raises(CheckpointError, match="it holds none, or is no safetensors file"):
            load(str(path), "ldm", PLAIN)
    with pytest.raises(CheckpointError, match="it holds none, or is no safetensors file"):
        load(str(tmp_path / "absent.safetensors"), "ldm", PLAIN)


@pytest.mark.parametrize(
    "options",
    [
        {"latent_scale": 0.0},
        {"latent_scale": math.nan},
        {"latent_shift": math.inf},
        {"kind": "autoencoder"},
        {"input_range": "unit"},
        {"multiple_of": 8},
        {"weights": "a.pt"},
        {"spread": "std"},
    ],
)
def test_options_that_the_file_contradicts_are_refused(
    weights: dict[str, torch.Tensor], tmp_path: Path, options: dict[str, Any]
) -> None:
    save_file(weights, tmp_path / "a.safetensors")
    (name,) = options
    with pytest.raises(InputError, match=f"^--{name.replace('_', '-').replace('-shape', '')} is "):
        load(str(tmp_path / "a.safetensors"), None, ImportOptions(**options))
