"""How far outputs are from the reference: the one place where errors on golden values, and the PSNR, are defined."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from .manifest import INPUT, RECONSTRUCTION
from .preprocess import Float32, Float64

# In float32, and in what a provider makes of it, the largest error counts. These are held to the root mean square: a
# single value may be rounded far off while the picture is as good as before, and the largest of thousands says little
# of the rest.
_BY_MEAN_SQUARE = ("fp16", "int8")
MAX_PSNR_DB = 100.0  # a root mean square of 1e-5 of the range; beyond that a difference is rounding
PSNR_BUDGET_DB = 0.1  # that a precision may lose, where nothing else is stated


def golden_error(
    tensor: str,
    found: Float32,
    golden: Mapping[str, Float32],
    precision: str,
    is_image: bool,
    rows: NDArray[np.intp] | None = None,
) -> float:
    """The error of one tensor on the golden inputs, or on these rows of them, relative to max|reference| (mean, logvar)
    or to the data's range (reconstruction)."""
    reference = golden[tensor]
    scale = scale_of(reference)
    if tensor == RECONSTRUCTION:
        scale = data_range(golden[INPUT], is_image)
    return error_of(found, reference if rows is None else reference[rows], scale, precision in _BY_MEAN_SQUARE)


def error_of(found: Float32, reference: Float32, scale: float, by_mean_square: bool) -> float:
    """The root mean square of the differences, or the largest of them, relative to `scale`."""
    difference = np.abs(np.subtract(found, reference, dtype=np.float64))
    size = np.sqrt(np.square(difference).mean()) if by_mean_square else difference.max()
    return float(size) / scale


def relative_error(found: Float32, reference: Float32) -> float:
    """max|Δ| / max|reference|."""
    return float(np.abs(found - reference).max()) / scale_of(reference)


def scale_of(reference: Float32) -> float:
    """max|reference|, taken as at least 0.01: a collapsed posterior is zero but for rounding."""
    return max(float(np.abs(reference).max()), 0.01)


def data_range(x: Float32, is_image: bool) -> float:
    """What errors of reconstructions are relative to: 1 for images in [0, 1]; max − min of vectors x, 1 where these are
    constant."""
    return 1.0 if is_image else float(x.max() - x.min()) or 1.0


def psnr_db(found: Float32, x: Float32, scale: float) -> float:
    """The PSNR of reconstructions of x, in dB: the mean over the examples of each one's. scale: the data's range."""
    squares = np.square((found.astype(np.float64) - x) / scale).reshape(len(x), -1).mean(axis=1)
    return float(decibels(squares).mean())


def decibels(mean_squares: Float64) -> Float64:
    """The PSNR for mean squares of differences relative to the data's range, at most `MAX_PSNR_DB`."""
    return -10 * np.log10(np.maximum(mean_squares, 10 ** (-MAX_PSNR_DB / 10)))
