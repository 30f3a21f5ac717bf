"""Latents in 8 bits: a quarter of their size, for archives of images and for slow links.

Each channel of each latent is mapped linearly from its own smallest and largest value to 0 and 255 and rounded, so that
an error is at most half a step: (largest - smallest) / 510.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .errors import InputError
from .preprocess import Float32, UInt8

UINT8 = "uint8"
CODECS = ("none", UINT8)
_LARGEST = float(np.finfo(np.float32).max)


class Quantized(NamedTuple):
    """codes: uint8 (N, *latent_shape). scale, offset: float32 (N, C), of each channel; of latents without positions,
    (N, D), one for all: (N, 1). latent = codes · scale + offset."""

    codes: UInt8
    scale: Float32
    offset: Float32


def quantize(latents: Float32) -> Quantized:
    """Finite float32 (N, D) or (N, C, ...) -> the nearest of 256 steps between the extremes of each channel."""
    channels = _by_channel(latents).astype(np.float64)
    low, high = channels.min(axis=2), channels.max(axis=2)
    offset, scale = low.astype(np.float32), ((high - low) / 255).astype(np.float32)
    steps = np.where(scale > 0, scale, 1).astype(np.float64)[..., None]
    codes = np.clip(np.rint((channels - offset[..., None]) / steps), 0, 255).astype(np.uint8)
    return Quantized(codes.reshape(latents.shape), scale, offset)


def dequantize(quantized: Quantized) -> Float32:
    """The latents again, float32 of the shape of `codes`.

    Raises:
        InputError: arrays that do not belong together, or that stand for values beyond float32.
    """
    check_quantized(quantized)
    codes, scale, offset = quantized
    # In float64: between extremes near float32's own, `codes · scale` alone is beyond it.
    values = _by_channel(codes).astype(np.float64) * scale[..., None] + offset[..., None]
    if max(values.max(), -values.min()) > _LARGEST * (1 + 1e-6):  # but for rounding
        raise InputError(f"scale and offset give latents from {values.min():g} to {values.max():g}, beyond float32")
    return np.clip(values, -_LARGEST, _LARGEST).astype(np.float32).reshape(codes.shape)


def check_quantized(quantized: Quantized) -> None:
    """Raise `InputError` unless the three arrays belong together; the codes themselves are not looked at."""
    codes, scale, offset = quantized
    if codes.dtype != np.uint8 or codes.ndim < 2:
        raise InputError(f"codes has dtype {codes.dtype} and shape {codes.shape}; expected uint8 (N, *latent_shape)")
    expected = codes.shape[:1] + ((codes.shape[1],) if codes.ndim > 2 else (1,))
    for name, array in (("scale", scale), ("offset", offset)):
        if array.dtype != np.float32 or array.shape != expected or not np.isfinite(array).all():
            raise InputError(
                f"{name} has dtype {array.dtype} and shape {array.shape}; codes of shape {codes.shape} have a finite"
                f" float32 {expected}"
            )


def quantized_shapes(count: int, latent_shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Of the arrays of so many latents, by field."""
    channels = latent_shape[0] if len(latent_shape) > 1 else 1
    return {"codes": (count, *latent_shape), "scale": (count, channels), "offset": (count, channels)}


def _by_channel(array: NDArray[Any]) -> NDArray[Any]:
    """(N, C, ...) -> (N, C, positions); (N, D) -> (N, 1, D)."""
    return array.reshape(len(array), array.shape[1] if array.ndim > 2 else 1, -1)
