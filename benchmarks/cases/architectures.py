"""The networks of the reference cases, as torch modules: `build(name, **arguments)` gives an encoder and a decoder.

A copy of this file travels in every case folder, where the race's torch peers load it by its path, so it imports
nothing beside torch (`default_conv` alone takes its layers from `vae_training.models`). Everything is in physical
units: images float32 (N, C, H, W) in [0, 1] -> mean and logvar, or the code alone -> images in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn


def build(name: str, **arguments: Any) -> tuple[nn.Module, nn.Module]:
    """The encoder and the decoder of the architecture `name`, with fresh weights from torch's global generator."""
    encoder, decoder = ARCHITECTURES[name](**arguments)
    return encoder, decoder


def mlp(side: int, hidden: int, latent: int) -> tuple[nn.Module, nn.Module]:
    """side² - hidden - latent and back, as in Kingma and Welling, 2014, with ReLU."""
    pixels = side * side
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(pixels, hidden), nn.ReLU(), nn.Linear(hidden, 2 * latent))
    decoder = nn.Sequential(
        nn.Linear(latent, hidden),
        nn.ReLU(),
        nn.Linear(hidden, pixels),
        nn.Unflatten(1, (1, side, side)),
        nn.Sigmoid(),
    )
    return Posterior(encoder), decoder


def default_conv(config: Mapping[str, Any]) -> tuple[nn.Module, nn.Module]:
    """The conv family that `vae-train` trains. config: `ModelConfig.to_dict()`."""
    from vae_training.models import build_model, config_from_dict

    model = build_model(config_from_dict(config))
    return Posterior(model.encoder, clamp=True), nn.Sequential(model.decoder, nn.Sigmoid())


def strided(side: int, widths: tuple[int, ...], latent: int) -> tuple[nn.Module, nn.Module]:
    """Strided convolutions down, transposed ones up, BatchNorm and LeakyReLU after each: the VAE of many repositories.

    side: of the RGB images, halved once per entry of `widths`.
    """
    lowest = side >> len(widths)
    features = widths[-1] * lowest * lowest
    up = (*reversed(widths), widths[0])
    encoder = nn.Sequential(
        *(
            nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.BatchNorm2d(outputs), nn.LeakyReLU())
            for inputs, outputs in pairwise((3, *widths))
        ),
        nn.Flatten(),  # (N, widths[-1] · lowest²)
        nn.Linear(features, 2 * latent),
    )
    decoder = nn.Sequential(
        nn.Linear(latent, features),
        nn.Unflatten(1, (widths[-1], lowest, lowest)),
        *(
            nn.Sequential(
                nn.ConvTranspose2d(inputs, outputs, 3, stride=2, padding=1, output_padding=1),  # doubles H and W
                nn.BatchNorm2d(outputs),
                nn.LeakyReLU(),
            )
            for inputs, outputs in pairwise(up)
        ),
        nn.Conv2d(widths[0], 3, 3, padding=1),
        nn.Sigmoid(),
    )
    return Posterior(encoder), decoder


def resnet(widths: tuple[int, ...], blocks: int, latent: int) -> tuple[nn.Module, nn.Module]:
    """Residual blocks with GroupNorm and SiLU, a spatial code: the autoencoder in front of latent diffusion models.

    Each entry of `widths` is one resolution, half the one before; the code has `latent` channels at the last.
    """
    down: list[nn.Module] = [nn.Conv2d(3, widths[0], 3, padding=1)]
    for level, width in enumerate(widths):
        before = widths[max(level - 1, 0)]
        if level:
            down.append(nn.Conv2d(before, before, 3, stride=2, padding=1))
        down += [ResidualBlock(before if index == 0 else width, width) for index in range(blocks)]
    encoder = nn.Sequential(*down, *_norm(widths[-1]), nn.Conv2d(widths[-1], latent, 3, padding=1))
    up: list[nn.Module] = [nn.Conv2d(latent, widths[-1], 3, padding=1)]
    for level, width in reversed(list(enumerate(widths))):
        after = widths[max(level - 1, 0)]
        up += [ResidualBlock(width, width) for _ in range(blocks)]
        if level:
            up += [nn.Upsample(scale_factor=2), nn.Conv2d(width, after, 3, padding=1)]
    decoder = nn.Sequential(*up, *_norm(widths[0]), nn.Conv2d(widths[0], 3, 3, padding=1), nn.Sigmoid())
    return encoder, decoder


def plain(width: int, levels: int, blocks: int, latent: int) -> tuple[nn.Module, nn.Module]:
    """Convolution and ReLU alone, no normalisation, one width at every resolution; a spatial code.

    blocks: three-convolution blocks at each resolution but the highest, which has one.
    """
    down: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1), PlainBlock(width)]
    up: list[nn.Module] = [nn.Conv2d(latent, width, 3, padding=1), nn.ReLU()]
    for _ in range(levels - 1):
        down += [
            nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False),
            *(PlainBlock(width) for _ in range(blocks)),
        ]
        up += [
            *(PlainBlock(width) for _ in range(blocks)),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
        ]
    encoder = nn.Sequential(*down, nn.Conv2d(width, latent, 3, padding=1))
    decoder = nn.Sequential(*up, PlainBlock(width), nn.Conv2d(width, 3, 3, padding=1), nn.Sigmoid())
    return encoder, decoder


class Posterior(nn.Module):
    """x -> mean, logvar, each (N, latent): the two halves of what `body` gives."""

    def __init__(self, body: nn.Module, clamp: bool = False) -> None:
        super().__init__()
        self.body, self.clamp = body, clamp

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, logvar = self.body(x).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0) if self.clamp else logvar


class ResidualBlock(nn.Module):
    """(N, inputs, H, W) -> (N, outputs, H, W): twice normalise, activate, convolve, beside a shortcut."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_norm(inputs),
            nn.Conv2d(inputs, outputs, 3, padding=1),
            *_norm(outputs),
            nn.Conv2d(outputs, outputs, 3, padding=1),
        )
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.shortcut(x) + self.body(x)
        return out


class PlainBlock(nn.Module):
    """(N, width, H, W) -> the same: three convolutions beside an identity, then ReLU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.body(x))

    @torch.no_grad()
    def scale_down(self, factor: float) -> None:
        """Make the last convolution's weights smaller, so that the block begins near the identity."""
        last = self.body[-1]
        assert isinstance(last, nn.Conv2d)
        last.weight.mul_(factor)


def _norm(width: int) -> tuple[nn.Module, nn.Module]:
    return nn.GroupNorm(math.gcd(width, 32), width), nn.SiLU()


ARCHITECTURES: dict[str, Callable[..., tuple[nn.Module, nn.Module]]] = {
    "mlp": mlp,
    "default_conv": default_conv,
    "strided": strided,
    "resnet": resnet,
    "plain": plain,
}
