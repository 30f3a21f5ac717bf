"""The pictures a run leaves: reconstructions beside originals, and samples from the prior."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from vae_runtime.images import grid, write_picture
from vae_runtime.preprocess import Float32, UInt8, to_uint8

from .feed import EVALUATE, standard_normal
from .models import VAE, Autoencoder

PAIRS, COLUMNS, SAMPLES = 30, 10, 64


@torch.no_grad()
def write_pictures(model: Autoencoder, x: Float32, folder: Path, seed: int) -> list[str]:
    """Write `reconstructions.png` and, for a vae, `samples.png`; none for vectors. Returns the names.

    model: in evaluation mode. x: float32 (N, C, H, W) of the test part, of which the first 30 are shown, each above its
    reconstruction from the posterior's mean or the code.
    """
    if not model.config.is_image:
        return []
    device = next(model.parameters()).device
    originals = x[:PAIRS]
    reconstructions = model(torch.from_numpy(originals).to(device)).float().cpu().numpy()
    write_picture(folder / "reconstructions.png", pairs(to_uint8(originals), to_uint8(reconstructions)))
    if not isinstance(model, VAE):
        return ["reconstructions.png"]
    z = standard_normal((SAMPLES, model.config.latent_dim), seed, EVALUATE, 0, SAMPLES, device)
    write_picture(folder / "samples.png", _sheet(to_uint8(model.decode(z).float().cpu().numpy()), 8, 4))
    return ["reconstructions.png", "samples.png"]


def pairs(originals: UInt8, reconstructions: UInt8) -> UInt8:
    """Two batches (N, H, W[, 3]) -> one image: each original directly above its reconstruction, ten pairs in a row."""
    scale = _scale(originals)
    tiles = [
        grid(np.stack(pair), columns=1, scale=scale, gap=2)[2:-2, 2:-2]
        for pair in zip(originals, reconstructions, strict=True)
    ]
    return grid(np.stack(tiles), columns=min(COLUMNS, len(tiles)), scale=1, gap=10)


def _sheet(images: UInt8, columns: int, gap: int) -> UInt8:
    return grid(images, columns=columns, scale=_scale(images), gap=gap)


def _scale(images: UInt8) -> int:
    """Small images are enlarged to about 80 pixels."""
    return max(1, round(80 / max(images.shape[1:3])))
