"""What a model makes of some of its inputs, before anything is exported: it shows options that misstate the model."""

from __future__ import annotations

import warnings

import numpy as np

from vae_runtime.preprocess import Float32

from .decoder_range import check_decoder_range
from .halves import Halves
from .quality import ExportWarning
from .verify import run_both

_MOST_ROWS, _MOST_VALUES = 16, 2**20  # that are reconstructed, of images
_MOST_VECTORS, _LEAST_VECTORS = 256, 8  # the least that tell their mean; of images, one has many pixels
# Of the best constant's error. Of trained models of digits and photographs it was 0.1 to 0.5; of those said to be of
# [-1, 1] or to give logits 0.8 to 1.3; where latents tell nothing it is about 1.
WARNED = 1.1
_SMALL_ERROR = (1 / 255) ** 2  # of images: a step of 8 bits, which is no matter of contrast


class PoorReconstructionWarning(ExportWarning):
    """Reconstructions of real inputs are further from them than a constant is, as those of few trained models are."""


def check_plausible(halves: Halves, x: Float32, input_range: str | None, real: bool) -> None:
    """Refuse or warn of what shows in reconstructions of `x`, in the bundle's units.

    x: inputs (N, ...). input_range: "unit" or "signed", of what the decoder is said to give; None: it may give
        anything. real: the inputs are no noise.

    Raises:
        ExportError: the model does not run on so many inputs.
        InputError: see `check_decoder_range`.
    """
    if input_range is None and not real:
        return
    most = _MOST_ROWS if x.ndim > 2 else _MOST_VECTORS
    rows = max(2, min(most, _MOST_VALUES // x[0].size, len(x)))
    tried = np.ascontiguousarray(x[np.arange(rows) * len(x) // rows])
    encoded, values = run_both(halves, tried, cut=False)
    if input_range is not None:
        check_decoder_range(halves, encoded, values, input_range == "signed", real)
    if real and (tried.ndim > 2 or len(x) >= _LEAST_VECTORS):
        _warn_of_poor(tried, np.clip(values, 0, 1) if tried.ndim > 2 else values)


def _warn_of_poor(x: Float32, reconstructed: Float32) -> None:
    """Compare with what is the best constant for each channel, or each dimension of vectors."""
    wide, is_image = x.astype(np.float64), x.ndim > 2
    error = float(np.mean((reconstructed - wide) ** 2))
    best = wide.mean((0, *range(2, x.ndim)), keepdims=True)
    constant = float(np.mean((wide - best) ** 2))
    if not is_image:  # each vector against the mean of the others, as a model has learned it from others
        constant *= (len(x) / (len(x) - 1)) ** 2
    if constant > 0 and error > max(WARNED * constant, _SMALL_ERROR if is_image else 0):
        what = "one colour for all of them is" if is_image else "their mean is"
        warnings.warn(
            f"the reconstructions of real inputs are further from them than {what}: their mean squared error is"
            f" {error:.2g}, {error / constant:.1f} times as large; the model is not trained, or not on such inputs, or"
            " its latents tell nothing, or a part of it is missing here, or it has another range, or another meaning of"
            " its outputs, than is said (--input-range, --logits, --spread)",
            PoorReconstructionWarning,
            stacklevel=5,
        )
