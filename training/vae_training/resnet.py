"""The family `resnet`: fully convolutional, its latents are small images (C, H/f, W/f), so that any size goes through.

Residual blocks (He et al., 2016, arXiv:1512.03385) in the original order, convolution, normalisation, activation: a
BatchNorm then stands behind a convolution everywhere and folds into it at export. As in the conv family no convolution
runs at full resolution: the first one is strided, the last one makes four pixels at each place. BatchNorm and ReLU stay
fast in every precision and leave the receptive field finite, so that a large image can be cut into tiles; GroupNorm (Wu
and He, 2018, arXiv:1803.08494), SiLU and attention are what large models use (Rombach et al., 2022, arXiv:2112.10752),
and every output then depends on the whole image.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .models import ModelConfig


def encoder(config: ModelConfig, outputs: int) -> nn.Sequential:
    """(N, colours, H, W) -> (N, outputs, H/f, W/f); f is 2 to the number of widths."""
    first, last = config.widths[0], config.widths[-1]
    return nn.Sequential(
        _conv(config, config.input_shape[0], first, stride=2),  # (N, widths[0], H/2, W/2)
        *_blocks(config, first),
        *(
            layer
            for narrow, wide in pairwise(config.widths)
            for layer in (_conv(config, narrow, wide, stride=2), *_blocks(config, wide))  # halves h and w each
        ),
        *_middle(config, last),
        nn.Conv2d(last, outputs, 3, padding=1),  # (N, outputs, H/f, W/f)
    )


def decoder(config: ModelConfig) -> nn.Sequential:
    """(N, latent_dim, H/f, W/f) -> logits (N, colours, H, W)."""
    widths = config.widths[::-1]
    return nn.Sequential(
        _conv(config, config.latent_dim, widths[0]),  # (N, widths[-1], H/f, W/f)
        *_middle(config, widths[0]),
        *_blocks(config, widths[0]),
        *(
            layer
            for wide, narrow in pairwise(widths)
            for layer in (nn.Upsample(scale_factor=2), _conv(config, wide, narrow), *_blocks(config, narrow))
        ),
        nn.Conv2d(widths[-1], 4 * config.input_shape[0], 3, padding=1),
        nn.PixelShuffle(2),  # (N, colours, H, W)
    )


class Residual(nn.Module):
    """activation(x + two convolutions of x), (N, width, h, w) -> the same."""

    def __init__(self, config: ModelConfig, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            _conv(config, width, width),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            _norm(config, width),
        )
        self.activation = _activation(config)

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(x + self.layers(x))


class Attention(nn.Module):
    """x + attention among all positions, single head (Vaswani et al., 2017), (N, width, h, w) -> the same.

    In plain products and a softmax, which every version of ONNX and every engine has.
    """

    def __init__(self, config: ModelConfig, width: int) -> None:
        super().__init__()
        self.norm = _norm(config, width)
        self.query_key_value = nn.Conv2d(width, 3 * width, 1)
        self.output = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.query_key_value(self.norm(x)).flatten(2).chunk(3, dim=1)  # each (N, width, h·w)
        weights = torch.softmax(query.mT @ key * x.shape[1] ** -0.5, dim=-1)  # (N, h·w, h·w): of each query's keys
        return x + self.output((value @ weights.mT).reshape(x.shape))

    @staticmethod
    def count_macs(output: Tensor) -> int:
        """Multiply-accumulates of the two products for one example; the 1×1 convolutions are layers of their own."""
        return 2 * output.shape[1] * math.prod(output.shape[2:]) ** 2


def _middle(config: ModelConfig, width: int) -> list[nn.Module]:
    """Attention where it is asked for, at the lowest resolution alone: its cost is the square of the positions."""
    return [Residual(config, width), Attention(config, width)] if config.attention else []


def _blocks(config: ModelConfig, width: int) -> list[nn.Module]:
    return [Residual(config, width) for _ in range(config.depth)]


def _conv(config: ModelConfig, inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), _norm(config, outputs), _activation(config)
    )


def _norm(config: ModelConfig, width: int) -> nn.Module:
    """Groups of at least 4 channels, and at most 32 groups."""
    if config.norm == "batch":
        return nn.BatchNorm2d(width)
    return nn.GroupNorm(math.gcd(32, max(1, width // 4), width), width)


def _activation(config: ModelConfig) -> nn.Module:
    return nn.ReLU() if config.activation == "relu" else nn.SiLU()
