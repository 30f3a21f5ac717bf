"""The models: three families, `mlp`, `conv` and `resnet` (see resnet.py), each as variational and plain autoencoder.

A model is a `ModelConfig` and a `state_dict`, nothing else. What goes in and comes out is in physical units: images are
float32 (N, C, H, W) in [0, 1], vectors float32 (N, D) in the data's own units; normalisation happens inside.

The conv family is made for small devices: convolution + BatchNorm + ReLU, so that normalisation folds away at export;
strided convolutions down; most of the arithmetic at the lowest resolution. Up by nearest neighbours and a convolution
(Odena et al., 2016, doi:10.23915/distill.00003): onnxruntime keeps its blocked layout from the first convolution to the
last, while transposed convolutions are slow there and shuffles of pixels leave that layout. One such shuffle makes the
image (Shi et al., 2016, arXiv:1609.05158): no convolution runs at full resolution.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from vae_runtime.arguments import check_choice
from vae_runtime.errors import InputError
from vae_runtime.manifest import KINDS, MAX_ELEMENTS

from . import resnet, strict
from .config import ACTIVATIONS, FAMILIES, MAX_SIDE, MAX_WIDTH, NORMS, default_layers, multiple_of

LOGVAR_MIN, LOGVAR_MAX = -30.0, 20.0  # exp() stays finite in float32, and in float16 after a square root
MAX_LAYERS = 16
RESNET_ONLY = ("norm", "activation", "attention")


@dataclass(frozen=True)
class ModelConfig:
    """Everything that determines a model's layers.

    family: "mlp", "conv" or "resnet". kind: "vae" or "autoencoder".
    input_shape: without the batch: (C, H, W) of an image or (D,) of a vector. "resnet" takes every other size too that
        is a multiple of `multiple_of`; this one is that of the training.
    latent_dim: number of latent dimensions (a vae) or the code's length (an autoencoder); "resnet": of latent channels.
    widths: "mlp": units of the hidden layers of the encoder, mirrored in the decoder. "conv" and "resnet": channels
        after each halving of the resolution; the last is the width at the lowest resolution.
    depth: "conv": number of 3×3 convolutions at the lowest resolution in each half; the decoder's last one gives twice
        the channels of the next resolution, if that is fewer. "resnet": residual blocks at each resolution in each
        half. "mlp": 0.
    norm, activation, attention: "resnet" alone: "batch" or "group", "relu" or "silu", and whether there is attention
        at the lowest resolution; the other families keep the defaults.
    """

    family: str
    kind: str
    input_shape: tuple[int, ...]
    latent_dim: int
    widths: tuple[int, ...]
    depth: int = 0
    norm: str = "batch"
    activation: str = "relu"
    attention: bool = False

    def __post_init__(self) -> None:
        strict.settle(self)
        check_choice(self.family, "family", FAMILIES)
        check_choice(self.kind, "kind", KINDS)
        if len(self.input_shape) not in (1, 3) or not all(1 <= side <= MAX_ELEMENTS for side in self.input_shape):
            raise InputError(f"input_shape is {list(self.input_shape)}; expected (C, H, W) or (D,), each above 0")
        if math.prod(self.input_shape) > MAX_ELEMENTS:
            raise InputError(f"input_shape is {list(self.input_shape)}; expected at most {MAX_ELEMENTS} elements")
        strict.within(self.latent_dim, 1, MAX_WIDTH, "latent_dim")
        if not 1 <= len(self.widths) <= MAX_LAYERS or not all(1 <= width <= MAX_WIDTH for width in self.widths):
            raise InputError(f"widths is {list(self.widths)}; expected 1 to {MAX_LAYERS} numbers from 1 to {MAX_WIDTH}")
        if self.family == "mlp" and self.depth:
            raise InputError(f"depth is {self.depth}; the mlp family has none, its layers are those of widths")
        strict.within(self.depth, 0, MAX_LAYERS, "depth")
        check_choice(self.norm, "norm", NORMS)
        check_choice(self.activation, "activation", ACTIVATIONS)
        if self.family == "resnet":
            self._check_resnet()
        elif changed := [name for name in RESNET_ONLY if getattr(self, name) != getattr(ModelConfig, name)]:
            value = getattr(self, changed[0])
            given = changed[0] if value is True else f"{changed[0]} {value!r}"  # a flag has no value
            raise InputError(f"{given} is for the resnet family alone, and family is {self.family!r}")
        if self.family == "conv" and (
            len(self.input_shape) != 3 or not all(8 <= n <= MAX_SIDE for n in self.input_shape[1:])
        ):
            raise InputError(
                f"input_shape is {list(self.input_shape)}; the conv family takes images (C, H, W), "
                f"H and W from 8 to {MAX_SIDE}"
            )

    def _check_resnet(self) -> None:
        sides, multiple = self.input_shape[1:], self.multiple_of
        if len(sides) != 2 or any(side % multiple or side > MAX_SIDE for side in sides):
            raise InputError(
                f"input_shape is {list(self.input_shape)}; the resnet family with {len(self.widths)} widths takes "
                f"images (C, H, W), H and W multiples of {multiple} up to {MAX_SIDE}"
            )

    @property
    def is_image(self) -> bool:
        return len(self.input_shape) == 3

    @property
    def is_fully_convolutional(self) -> bool:
        """Any height and width go through that are multiples of `multiple_of`, with a latent of their own size."""
        return self.family == "resnet"

    @property
    def multiple_of(self) -> int:
        """f, by which the height and width of a latent are smaller than the image's; 1 where a latent has none."""
        return multiple_of(self.family, self.widths)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Of one latent for an input of `input_shape`: (latent_dim,), or (latent_dim, H/f, W/f) of "resnet"."""
        if not self.is_fully_convolutional:
            return (self.latent_dim,)
        return (self.latent_dim, *(side // self.multiple_of for side in self.input_shape[1:]))

    @property
    def lowest_size(self) -> tuple[int, int]:
        """(H, W) after all halvings of the resolution, each rounded up; conv family only."""
        step = 2 ** len(self.widths)
        return -(-self.input_shape[1] // step), -(-self.input_shape[2] // step)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for `model.pt` and JSON; `config_from_dict` reads it back."""
        left_out = () if self.family == "resnet" else RESNET_ONLY
        return {key: value for key, value in strict.to_dict(self).items() if key not in left_out}


def config_from_dict(data: Mapping[str, Any]) -> ModelConfig:
    """The inverse of `ModelConfig.to_dict`.

    Raises:
        InputError: an unknown or missing key, a wrong type, a value out of range.
    """
    return strict.from_dict(ModelConfig, data, "config")


def default_config(family: str, kind: str, input_shape: tuple[int, ...], latent_dim: int) -> ModelConfig:
    """With the widths and depth that `vae-train` uses."""
    return ModelConfig(family, kind, input_shape, latent_dim, *default_layers(family, input_shape))


class Autoencoder(nn.Module):
    """Encoder, code, decoder: no distribution. The halves of both kinds are built here.

    The buffers `centre` and `scale` normalise vectors: centred per feature, and divided by ONE scale common to all, so
    that a Gaussian likelihood's single σ stays in the data's units. Features of very different units should be
    standardised by the user beforehand. Images need no normalisation and have no such buffers.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        parameters = config.latent_dim * (2 if config.kind == "vae" else 1)
        build = {
            "mlp": (_mlp_encoder, _mlp_decoder),
            "conv": (_conv_encoder, _conv_decoder),
            "resnet": (resnet.encoder, resnet.decoder),
        }[config.family]
        self.encoder = build[0](config, parameters)
        self.decoder = build[1](config)
        if not config.is_image:
            self.centre: Tensor
            self.scale: Tensor
            self.register_buffer("centre", torch.zeros(config.input_shape))
            self.register_buffer("scale", torch.ones(()))

    def fit_normalisation(self, x: Tensor) -> None:
        """Set `centre` and `scale` from the training part x, (N, D); images need none and are left alone."""
        if self.config.is_image:
            return
        x = x.double()
        self.centre.copy_(x.mean(0))
        deviation = (x - x.mean(0)).square().mean().sqrt()
        self.scale.copy_(deviation if deviation > 0 else torch.ones(()))  # constant data have no scale of their own

    def encode(self, x: Tensor) -> Any:
        """x (N, *input_shape) -> code (N, *latent_shape)."""
        return self.encoder(self._normalise(x))

    def decode(self, z: Tensor) -> Tensor:
        """z (N, *latent_shape) -> reconstruction (N, *input_shape), the mean of p(x|z): [0, 1] for images."""
        return self.to_mean(self.decode_logits(z))

    def decode_logits(self, z: Tensor) -> Tensor:
        """z (N, *latent_shape) -> (N, *input_shape), what `to_mean` makes the mean of p(x|z): for images its logits."""
        return self.decoder(z)

    def to_mean(self, logits: Tensor) -> Tensor:
        """Images: logits -> [0, 1]. Vectors: normalised -> the data's own units."""
        return torch.sigmoid(logits) if self.config.is_image else logits * self.scale + self.centre

    def forward(self, x: Tensor) -> Tensor:
        """x -> reconstruction, both (N, *input_shape)."""
        return self.decode(self.encode(x))

    def _normalise(self, x: Tensor) -> Tensor:
        return x if self.config.is_image else (x - self.centre) / self.scale


class VAE(Autoencoder):
    """A variational autoencoder (Kingma and Welling, 2014, arXiv:1312.6114) with a diagonal Gaussian posterior."""

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (N, *input_shape) -> mean, logvar, each (N, *latent_shape); logvar is clamped to [-30, 20]."""
        mean, logvar = self.encoder(self._normalise(x)).chunk(2, dim=1)
        return mean, logvar.clamp(LOGVAR_MIN, LOGVAR_MAX)

    def forward(self, x: Tensor) -> Tensor:
        """x -> reconstruction from the posterior's mode, both (N, *input_shape)."""
        return self.decode(self.encode(x)[0])


def build_model(config: ModelConfig) -> Autoencoder:
    """A model with fresh weights from torch's global generator, in training mode."""
    return VAE(config) if config.kind == "vae" else Autoencoder(config)


def reparameterize(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    """z = mean + exp(logvar / 2) · noise, with standard normal noise; all (N, *latent_shape)."""
    return mean + torch.exp(0.5 * logvar) * noise


def count_parameters(model: nn.Module) -> int:
    """Number of trained scalars; BatchNorm's statistics and the normalisation are not among them."""
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def count_macs(model: Autoencoder) -> dict[str, int]:
    """Multiply-accumulates of convolutions, linear layers and attention for one example of `input_shape`.

    -> {"encode": n, "decode": n}
    """
    counted: list[int] = []

    def count(layer: nn.Module, inputs: Any, output: Tensor) -> None:
        if isinstance(layer, resnet.Attention):
            counted.append(layer.count_macs(output))
            return
        weight = layer.weight
        assert isinstance(weight, Tensor)
        counted.append(weight.numel() * (math.prod(output.shape[2:]) if output.ndim == 4 else 1))

    layers = [layer for layer in model.modules() if isinstance(layer, (nn.Conv2d, nn.Linear, resnet.Attention))]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        model.encode(torch.zeros(1, *model.config.input_shape, device=device))
        encode = sum(counted)
        model.decode(torch.zeros(1, *model.config.latent_shape, device=device))
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return {"encode": encode, "decode": sum(counted) - encode}


class Crop(nn.Module):
    """(N, C, H', W') -> (N, C, H, W): what upsampling by powers of two gave beyond the image is cut off."""

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        self.height, self.width = height, width

    def forward(self, x: Tensor) -> Tensor:
        return x[..., : self.height, : self.width]


def _mlp_encoder(config: ModelConfig, outputs: int) -> nn.Sequential:
    sizes = (math.prod(config.input_shape), *config.widths)
    return nn.Sequential(
        nn.Flatten(),  # (N, D)
        *(layer for pair in pairwise(sizes) for layer in (nn.Linear(*pair), nn.ReLU())),
        nn.Linear(sizes[-1], outputs),
    )


def _mlp_decoder(config: ModelConfig) -> nn.Sequential:
    sizes = (config.latent_dim, *reversed(config.widths))
    return nn.Sequential(
        *(layer for pair in pairwise(sizes) for layer in (nn.Linear(*pair), nn.ReLU())),
        nn.Linear(sizes[-1], math.prod(config.input_shape)),
        *((nn.Unflatten(1, config.input_shape),) if config.is_image else ()),
    )


def _conv_encoder(config: ModelConfig, outputs: int) -> nn.Sequential:
    channels = (config.input_shape[0], *config.widths)
    width = config.widths[-1]
    return nn.Sequential(
        *(_conv(*pair, stride=2) for pair in pairwise(channels)),  # halves H and W each, rounded up
        *(_conv(width, width) for _ in range(config.depth - 1)),
        nn.Flatten(),  # (N, width · h · w)
        nn.Linear(width * math.prod(config.lowest_size), outputs),
    )


def _conv_decoder(config: ModelConfig) -> nn.Sequential:
    colours, height, width = config.input_shape
    first, *narrower = reversed(config.widths)
    lowest = config.lowest_size
    features = first * math.prod(lowest)
    last = min(first, 2 * narrower[0]) if narrower and config.depth else first
    deep = (first,) * config.depth + (last,)
    exact = all(n * 2 ** len(config.widths) == side for n, side in zip(lowest, (height, width), strict=True))
    return nn.Sequential(
        nn.Linear(config.latent_dim, features, bias=False),
        nn.BatchNorm1d(features),
        nn.ReLU(),
        nn.Unflatten(1, (first, *lowest)),  # (N, widths[-1], h, w)
        *(_conv(*pair) for pair in pairwise(deep)),
        *(_up(*pair) for pair in pairwise((last, *narrower))),  # doubles h and w each
        nn.Conv2d(config.widths[0], 4 * colours, 3, padding=1),
        nn.PixelShuffle(2),  # (N, C, H', W')
        *(() if exact else (Crop(height, width),)),
    )


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


def _up(inputs: int, outputs: int) -> nn.Sequential:
    """(N, inputs, h, w) -> (N, outputs, 2h, 2w)."""
    return nn.Sequential(nn.Upsample(scale_factor=2), *_conv(inputs, outputs))
