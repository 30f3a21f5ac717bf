"""Training data out of scikit-learn's two sample photographs: crops, the held-out ones from parts never trained on."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vae_runtime.preprocess import from_pixels

TRAINED_SHARE = 0.6  # of each photograph's width, from the left; the rest is held out (256 pixels of 640)


def crops(count: int, side: int, *, held_out: bool, seed: int = 0) -> NDArray[np.uint8]:
    """`count` crops -> uint8 (count, side, side, 3), half of each photograph, half of them mirrored.

    Raises:
        ValueError: the part of the photographs is smaller than `side`.
    """
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng((seed, side, held_out))
    found = np.empty((count, side, side, 3), np.uint8)
    pictures = load_sample_images().images
    for index in range(count):
        picture = pictures[index % len(pictures)]
        edge = int(picture.shape[1] * TRAINED_SHARE)
        part = picture[:, edge:] if held_out else picture[:, :edge]
        if min(part.shape[:2]) < side:
            raise ValueError(f"side is {side}; the part has {part.shape[0]}×{part.shape[1]} pixels")
        top, left = (int(rng.integers(size - side + 1)) for size in part.shape[:2])
        crop = part[top : top + side, left : left + side]
        found[index] = crop[:, ::-1] if rng.integers(2) else crop
    return found


def to_float(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """uint8 NHWC [0, 255] -> float32 NCHW [0, 1]."""
    return from_pixels(images.transpose(0, 3, 1, 2))
