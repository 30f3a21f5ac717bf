"""A diffusers model as the two halves of a bundle.

The library's own `encode` and `decode` run inside the graphs, from [0, 1] to its [-1, 1] and back, and so does what its
pipelines make of the latents: a bundle's are those that a diffusion model sees, (z - shift) · scale, or in patches
where AutoencoderKLFlux2's does. AutoencoderTiny's `scale_latents` is not among it: it makes pictures of latents, which
cut them. A model of videos is given one frame.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vae_runtime.errors import CheckpointError, ExportError, InputError
from vae_runtime.json_fields import is_count, is_number

from ..graphs import DecoderGraph, EncoderGraph
from ..imported import Imported
from ..reason import reason
from ..reference import Reference
from .diffusers_folder import CONFIG
from .options import FLAGS, needs_extra
from .weights import assign

_WRITTEN = {"block_out_channels", "force_upcast"}  # by classes that do not take them
_TRIED = 512  # pixels: a multiple of what any of these models is made for
OF_VIDEOS, IN_PATCHES = ("AutoencoderKLQwenImage",), ("AutoencoderKLFlux2",)
DEFAULT_SIDE = (64, 128)  # of golden inputs: within these bounds, as near as may be to the size it was trained with


def import_model(
    source: Path,
    name: str,
    kind: str,
    config: dict[str, Any],
    weights: Callable[[], Mapping[str, Any]],
    input_shape: tuple[int | None, ...] | None,
    bundle_name: str,
) -> Imported:
    """source: a folder, or the file that tells `config`; name: the class; kind: what it is in a bundle; weights: reads
    them, once the rest is known to be right; input_shape: that the user asks for.

    Raises: as `diffusers_folder.load`.
    """
    model = _build(name, config, source / CONFIG if source.is_dir() else source)
    channels, latent = _channels(model.config)
    patch, network = _patch_side(model.config), Network(model, name in OF_VIDEOS)
    multiple = patch * _require_bundle_shapes(network, channels, latent, patch, source)
    units = PatchUnits(model, patch) if name in IN_PATCHES else LatentUnits(model.config, latent)
    shape = _shape(model.config, channels, multiple, input_shape)
    assign(model, weights(), source)
    if network.of_videos:
        keep_one_frame(model)
    encoder = EncoderGraph(Encoder(network, units), kind, clamp=False)
    halves = Reference(encoder, DecoderGraph(Decoder(network, units), clamp=True), against="diffusers")
    origin = {"library": "diffusers", "version": _library().__version__, "class": name}
    return Imported(halves, bundle_name, *shape, origin=origin)


class LatentUnits(nn.Module):
    """The model's z -> (z - shift) · scale, of about unit variance, channel by channel, as its pipelines have it.

    config: has scaling_factor and shift_factor, or latents_mean and latents_std in place of the shift: then the scale
        is scaling_factor / latents_std. growth: what the scale adds to a logvar, 2 · log(scale).
    """

    scale: Tensor
    shift: Tensor
    growth: Tensor

    def __init__(self, config: Any, channels: int) -> None:
        super().__init__()
        means, stds = (_per_channel(config, name, channels) for name in ("latents_mean", "latents_std"))
        shift, scale = _number(config, "shift_factor", 0.0), _number(config, "scaling_factor", 1.0)
        if (means is None) != (stds is None) or (means is not None and shift):
            raise CheckpointError(
                f"{CONFIG} has shift_factor {shift}, latents_mean {means} and latents_std {stds}; expected the shift "
                "alone, or both of the others"
            )
        if not all(value > 0 for value in (scale, *(stds or []))):
            raise CheckpointError(f"{CONFIG} has scaling_factor {scale} and latents_std {stds}; expected them above 0")
        values = torch.tensor([[scale / std for std in stds or [1.0] * channels], means or [shift] * channels])
        values = values.double().reshape(2, 1, channels, 1, 1)
        for name, value in (("scale", values[0]), ("shift", values[1]), ("growth", 2 * values[0].log())):
            self.register_buffer(name, value.float())

    def forward(self, z: Tensor) -> Tensor:
        return (z - self.shift) * self.scale

    def of_logvar(self, logvar: Tensor) -> Tensor:
        return logvar + self.growth

    def inverse(self, z: Tensor) -> Tensor:
        return z / self.scale + self.shift


class PatchUnits(nn.Module):
    """z (N, C, H, W) -> (N, side² · C, H / side, W / side), each patch as channels, normalised by the statistics of the
    model's BatchNorm, as FLUX.2's pipelines have it."""

    def __init__(self, model: Any, side: int) -> None:
        super().__init__()
        self.norm, self.side = model.bn, side

    def forward(self, z: Tensor) -> Tensor:
        normalised: Tensor = self.norm(functional.pixel_unshuffle(z, self.side))
        return normalised

    def of_logvar(self, logvar: Tensor) -> Tensor:
        return functional.pixel_unshuffle(logvar, self.side) - self._variance().log()

    def inverse(self, z: Tensor) -> Tensor:
        mean = self.norm.running_mean.reshape(1, -1, 1, 1)
        return functional.pixel_shuffle(z * self._variance().sqrt() + mean, self.side)

    def _variance(self) -> Tensor:
        variance: Tensor = self.norm.running_var + self.norm.eps
        return variance.reshape(1, -1, 1, 1)


Units = LatentUnits | PatchUnits


class Network(nn.Module):
    """The library's own methods, of images in [-1, 1] and latents in its units. of_videos: to it, an image is a video
    of one frame."""

    def __init__(self, model: Any, of_videos: bool) -> None:
        super().__init__()
        self.model, self.of_videos = model, of_videos

    def encode(self, x: Tensor) -> list[Tensor]:
        """Mean and logvar, or the code."""
        encoded = self.model.encode(x.unsqueeze(2) if self.of_videos else x)
        if hasattr(encoded, "latent_dist"):
            outputs = [encoded.latent_dist.mean, encoded.latent_dist.logvar]  # which is clamped to [-30, 20]
        else:
            outputs = [encoded.latents if hasattr(encoded, "latents") else encoded.latent]
        return [output.squeeze(2) for output in outputs] if self.of_videos else outputs

    def decode(self, z: Tensor) -> Tensor:
        decoded: Tensor = self.model.decode(z.unsqueeze(2) if self.of_videos else z).sample
        return decoded.squeeze(2) if self.of_videos else decoded


def keep_one_frame(model: nn.Module) -> None:
    """Leave of causal convolutions what they compute of a first frame, in front of which are zeros: the last slice of
    the kernel, over height and width alone. A third of the weights and of the work of 3x3x3."""
    for conv in model.modules():
        if isinstance(conv, nn.Conv3d):
            conv.weight = nn.Parameter(conv.weight[:, :, -1].contiguous(), requires_grad=False)
            conv.forward = functools.partial(_on_one_frame, conv)  # type: ignore[method-assign]


def _on_one_frame(conv: Any, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
    width, _, height = conv._padding[:3]  # in the order of torch.nn.functional.pad; its own are 0
    options = {"stride": conv.stride[1:], "padding": (height, width), "dilation": conv.dilation[1:]}
    return functional.conv2d(x.squeeze(2), conv.weight, conv.bias, groups=conv.groups, **options).unsqueeze(2)


class Encoder(nn.Module):
    """x (N, C, H, W) in [0, 1] -> mean, logvar, or the code, each (N, latent, H / f, W / f)."""

    def __init__(self, network: Network, units: Units) -> None:
        super().__init__()
        self.network, self.units = network, units

    def forward(self, x: Tensor) -> Any:
        mean, *logvar = self.network.encode(2 * x - 1)
        return (self.units(mean), self.units.of_logvar(logvar[0])) if logvar else self.units(mean)


class Decoder(nn.Module):
    """z (N, latent, H / f, W / f) -> (N, C, H, W), images in [0, 1] and a little beyond."""

    def __init__(self, network: Network, units: Units) -> None:
        super().__init__()
        self.network, self.units = network, units

    def forward(self, z: Tensor) -> Tensor:
        return self.network.decode(self.units.inverse(z)) / 2 + 0.5


def _library() -> Any:
    with needs_extra("diffusers", "importing from diffusers"):
        import diffusers
    return diffusers


def _build(name: str, config: dict[str, Any], file: Path) -> Any:
    """The model without weights, in no memory until they are known to fit."""
    model_class = getattr(_library(), name, None)
    if model_class is None:
        raise ExportError(f"{file} is of {name}, which diffusers {_library().__version__} lacks; a newer one has it")
    if config.get("quantization_config") is not None:
        raise ExportError(f"{file} says that the weights are quantized; expected them in floating point")
    known = _known(model_class, config, file)
    try:
        with torch.device("meta"):
            model = model_class.from_config(known)
    except Exception as error:  # the config's values reach every layer unchecked
        raise CheckpointError(f"{file} describes no {name}: {reason(error)}") from None
    return model.eval().requires_grad_(False)


def _known(model_class: type, config: dict[str, Any], file: Path) -> dict[str, Any]:
    """The library passes over keys that it does not know; those of a newer version may change what is computed."""
    written, installed = str(config.get("_diffusers_version", "0")), _library().__version__
    parameters = inspect.signature(model_class).parameters
    known = {key: value for key, value in config.items() if key in parameters or key.startswith("_")}
    unknown = sorted(set(config) - set(known) - _WRITTEN)
    if unknown and _release(written) > _release(installed):
        raise ExportError(f"{file}, of diffusers {written}, has {', '.join(unknown)}, unknown to {installed}")
    return known


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def _channels(config: Any) -> tuple[int, int]:
    """Of the images, and of the model's own latents."""
    if "z_dim" in config:
        return config.input_channels, config.z_dim
    return config.in_channels, config.latent_channels


def _patch_side(config: Any) -> int:
    """Of the patches that pipelines make of the model's own latents."""
    sides = config.get("patch_size", (1, 1))
    if (
        not isinstance(sides, (list, tuple))
        or len(sides) != 2
        or sides[0] != sides[1]
        or not is_count(sides[0])
        or not sides[0]
    ):
        raise CheckpointError(
            f"{CONFIG} has patch_size {sides!r}; expected the sides of a square, whole numbers from 1"
        )
    return int(sides[0])


def _require_bundle_shapes(network: Network, channels: int, latent: int, patch: int, source: Path) -> int:
    """How many times smaller than the images the model's own latents are, along each side.

    Raises: ExportError: by no whole number of times, or the reconstruction has another shape than the images.
    """
    side = _TRIED * patch
    with _as_export_error(source):
        x = torch.empty(1, channels, side, side, device="meta")
        z = network.encode(x)[0]
        decoded = network.decode(z)
    cells = z.shape[-1]
    if z.shape != (1, latent, cells, cells) or side % cells or cells % patch or decoded.shape != x.shape:
        raise ExportError(
            f"images of shape {tuple(x.shape)} have latents of shape {tuple(z.shape)} and reconstructions of shape "
            f"{tuple(decoded.shape)}; expected {latent} channels, sides that divide {side}, and the images' own shape"
        )
    return side // cells


@contextlib.contextmanager
def _as_export_error(source: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise ExportError(f"the model that {source} describes does not run: {reason(error)}") from None


def _shape(
    config: Any, channels: int, multiple: int, asked: tuple[int | None, ...] | None
) -> tuple[tuple[int | None, ...], int, tuple[int, int] | None]:
    """input_shape, multiple_of and default_size, as `Imported` has them."""
    free = (channels, None, None)
    if asked is None or asked == free:
        return free, multiple, _default_size(config, multiple)
    sides = [side for side in asked[1:] if side is not None]
    if len(asked) != 3 or asked[0] != free[0] or len(sides) != 2 or any(side % multiple for side in sides):
        raise InputError(
            f"{FLAGS['input_shape']} is {asked}; this model takes {free[0]} channels, and a height and a width that "
            f"are multiples of {multiple}"
        )
    return asked, 1, None


def _default_size(config: Any, multiple: int) -> tuple[int, int]:
    trained = config.get("sample_size")
    pair = trained if isinstance(trained, (list, tuple)) else [trained]
    low, high = DEFAULT_SIDE
    bounded = [min(max(side, low), high) if isinstance(side, int) else high for side in pair]
    # AutoencoderDC attends to so few positions, or fewer, in another way, and a graph has that of its example.
    few = math.isqrt(config.get("attention_head_dim") or 1) + 1
    sides = [max(few, math.ceil(side / multiple)) * multiple for side in bounded]
    return sides[0], sides[-1]


def _number(config: Any, name: str, default: float) -> float:
    value = config.get(name)
    if value is None:
        return default
    if not is_number(value):
        raise CheckpointError(f"{CONFIG} has {name} {value!r}; expected a number")
    return float(value)


def _per_channel(config: Any, name: str, channels: int) -> list[float] | None:
    values = config.get(name)
    if values is None:
        return None
    numbers = values if isinstance(values, (list, tuple)) else []
    if len(numbers) != channels or not all(map(is_number, numbers)):
        raise CheckpointError(f"{CONFIG} has {name} {values!r}; expected {channels} numbers, one per latent channel")
    return [float(n) for n in numbers]
