"""Single files of latent diffusion's autoencoder (Rombach et al., 2022), as of Stable Diffusion and FLUX: weights by
the names of its own code, alone or among those of the whole model.

The network is diffusers' AutoencoderKL under other names; its settings follow from the shapes. No file states by what a
diffusion model multiplies the latents.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from vae_runtime.errors import CheckpointError, ExportError

from ..imported import Imported, ImportOptions
from .options import check_options, refuse_options, require_agreement
from .safetensors_header import tensor_shapes

KIND = "ldm"
CLASS = "AutoencoderKL"
TRAINED = 256  # pixels, of most such models
_MOST = 9  # levels, and blocks in each: twice what any has
_OF_OTHERS = ("bn.", "quantize.", "encoder.quant_conv.", "decoder.post_quant_conv.")
_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
_FIRST, _OTHERS = "encoder.conv_in.weight", ("encoder.mid.block_1.norm1.weight", "decoder.conv_in.weight")
_STATED = ("multiple_of", "input_range", "logits", "spread")
_BLOCK = re.compile(r"(down|up)\.(\d+)\.(?:block\.(\d+)|(downsample|upsample))\.(.+)")
_MIDDLE = re.compile(r"mid\.block_([12])\.(.+)")
_ATTENTION = re.compile(r"mid\.attn_1\.(norm|q|k|v|proj_out)\.(weight|bias)")
_LAYERS = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}

Shapes = Mapping[str, tuple[int, ...]]


def recognises(source: str) -> bool:
    """A safetensors file with the names of such an autoencoder, whatever is before them."""
    return bool(_prefixes(tensor_shapes(Path(source))))


def load(source: str, options: ImportOptions) -> Imported:
    """The autoencoder in such a file as a vae; height and width are free unless asked for.

    Raises:
        CheckpointError: the file is damaged, or has no such autoencoder, several, or a part of one.
        ExportError: an autoencoder that AutoencoderKL is not. InputError: an option is of no use here.
        MissingExtraError: diffusers or safetensors is not installed.
    """
    check_options(options)
    refuse_options(options, "images of latent diffusion are in [-1, 1], and the weights say the rest", *_STATED)
    require_agreement(options, "kind", "vae", "latent diffusion's autoencoder")
    path = Path(source)
    shapes = tensor_shapes(path)
    found = _prefixes(shapes)
    if len(found) != 1:
        what = f"several, under {', '.join(map(repr, found))}" if found else "none, or is no safetensors file"
        raise CheckpointError(f"{path} should hold one autoencoder of latent diffusion; it holds {what}")
    own = {name.removeprefix(found[0]): shape for name, shape in shapes.items() if name.startswith(found[0])}
    if other := next((name for name in own if name.startswith(_OF_OTHERS)), None):
        raise ExportError(
            f"{path} has {other}, as FLUX.2's or a quantising autoencoder does, and latent diffusion's does not; export"
            " FLUX.2's from a folder of diffusers"
        )
    own = {name: shape for name, shape in own.items() if name.startswith(_PARTS)}
    config = _config(own, path) | {"scaling_factor": options.latent_scale, "shift_factor": options.latent_shift}
    from .diffusers_model import import_model

    levels = len(config["block_out_channels"])
    return import_model(
        path, CLASS, "vae", config, lambda: _weights(path, found[0], own, levels), options.input_shape, path.stem
    )


def _prefixes(shapes: Shapes) -> list[str]:
    """What is before the names of each autoencoder."""
    prefixes = [name.removesuffix(_FIRST) for name in shapes if name.endswith(_FIRST)]
    return [prefix for prefix in prefixes if all(prefix + name in shapes for name in _OTHERS)]


def _config(shapes: Shapes, path: Path) -> dict[str, Any]:
    """Of diffusers' AutoencoderKL."""
    if attention := next(
        (name for name in shapes if re.match(r"(encoder\.down|decoder\.up)\.\d+\.attn\.", name)), None
    ):
        raise ExportError(
            f"{path} has {attention}, attention outside of the middle, and {CLASS} has none there; pass what returns"
            f" the model of its own code as package.module:factory, and --weights {path}"
        )
    try:
        levels, decoded = (
            {int(match[1]) for name in shapes if (match := re.match(rf"{side}\.(\d{{1,3}})\.", name))}
            for side in (r"encoder\.down", r"decoder\.up")
        )
        if levels != decoded or levels != set(range(len(levels))) or len(levels) > _MOST:
            raise CheckpointError(
                f"{path} has the levels {sorted(levels)} of an encoder and {sorted(decoded)} of a decoder; expected the"
                f" same from 0 on, at most {_MOST}"
            )
        channels = [shapes[f"encoder.down.{level}.block.0.conv1.weight"][0] for level in sorted(levels)]
        latent, moments = shapes["decoder.conv_in.weight"][1], shapes["encoder.conv_out.weight"][0]
        images, given = shapes["encoder.conv_in.weight"][1], shapes["decoder.conv_out.weight"][0]
    except KeyError as error:
        raise CheckpointError(f"{path} has a part of latent diffusion's autoencoder only: {error} is missing") from None
    except IndexError:
        raise CheckpointError(f"{path} has weights of convolutions with fewer axes than 4") from None
    layers = {name.split(".")[4] for name in shapes if name.startswith("encoder.down.0.block.")}
    if len(layers) > _MOST:
        raise CheckpointError(f"{path} has {len(layers)} blocks at level 0 of its encoder; expected at most {_MOST}")
    if moments != 2 * latent:
        raise ExportError(
            f"{path} has an encoder that gives {moments} channels, and a decoder that takes {latent}; of a VAE's, which"
            " gives mean and logvar, the first is twice the second"
        )
    return {
        "in_channels": images,
        "out_channels": given,
        "latent_channels": latent,
        "block_out_channels": channels,
        "layers_per_block": len(layers),
        "down_block_types": ["DownEncoderBlock2D"] * len(levels),
        "up_block_types": ["UpDecoderBlock2D"] * len(levels),
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in shapes,
        "sample_size": TRAINED,
    }


def _weights(path: Path, prefix: str, names: Collection[str], levels: int) -> dict[str, Any]:
    """By diffusers' names; of a whole diffusion model nothing else is read."""
    from .weights import read_some_safetensors  # late, as it needs torch

    tensors = read_some_safetensors(path, [prefix + name for name in names], "diffusers")
    renamed = {diffusers_name(name.removeprefix(prefix), levels): tensor for name, tensor in tensors.items()}
    # What is a convolution of 1x1 there is a linear layer here.
    return {
        name: tensor.flatten(1) if ".attentions." in name and tensor.ndim == 4 else tensor
        for name, tensor in renamed.items()
    }


def diffusers_name(name: str, levels: int) -> str:
    """`encoder.down.0.block.1.nin_shortcut.bias` -> `encoder.down_blocks.0.resnets.1.conv_shortcut.bias`; the levels of
    the decoder are counted from the other end."""
    half, _, rest = name.partition(".")
    if match := _BLOCK.fullmatch(rest):
        side, level, block, sampler, last = match.groups()
        number = int(level) if side == "down" else levels - 1 - int(level)
        part = f"{sampler}rs.0" if sampler else f"resnets.{block}"
        rest = f"{side}_blocks.{number}.{part}.{last}"
    elif match := _MIDDLE.fullmatch(rest):
        rest = f"mid_block.resnets.{int(match[1]) - 1}.{match[2]}"
    elif match := _ATTENTION.fullmatch(rest):
        rest = f"mid_block.attentions.0.{_LAYERS[match[1]]}.{match[2]}"
    elif rest.startswith("norm_out."):
        rest = f"conv_{rest}"
    return f"{half}.{rest.replace('nin_shortcut', 'conv_shortcut')}"
