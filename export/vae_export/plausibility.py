"""What a model makes of some of its inputs, before anything is exported: it shows options that misstate the model."""

from __future__ import annotations

import warnings

import numpy as np

from vae_runtime.preprocess import Float32

from .decoder_range import check_decoder_range
from .halves import Halves
from .quality import ExportWarning
from .verify import run_both

_MOST_ROWS, _MOST_VALUES = 16, 2**20  # that are reconstructed
# Of the best constant's error. Where latents tell nothing it is about 1; of trained models of digits and photographs it
# was 0.1 to 0.2, and said to be of [-1, 1] or to give logits 0.8 to 1.3.
WARNED = 1.1
_LEAST_VECTORS = 8  # that tell their mean; of images, one has many pixels


class PoorReconstructionWarning(ExportWarning):
    """Reconstructions of real inputs are further from them than a constant is, as no trained model's are."""


def check_plausible(halves: Halves, x: Float32, input_range: str | None, real: bool) -> None:
    """Refuse or warn of what shows in reconstructions of `x`, in the bundle's units.

    x: inputs (N, ...). input_range: "unit" or "signed", of what the decoder is said to give; None: it may give
        anything. real: the inputs are no noise.

    Raises:
        ExportError: the model does not run on so many inputs.
        InputError: see `check_decoder_range`.
    """
    rows = max(2, min(_MOST_ROWS, _MOST_VALUES // x[0].size, len(x)))
    tried = np.ascontiguousarray(x[np.arange(rows) * len(x) // rows])
    encoded, values = run_both(halves, tried, cut=False)
    if input_range is not None:
        check_decoder_range(halves, encoded, values, input_range == "signed", real)
    if real and (tried.ndim > 2 or len(x) >= _LEAST_VECTORS):
        _warn_of_poor(tried, np.clip(values, 0, 1) if tried.ndim > 2 else values)


def _warn_of_poor(x: Float32, reconstructed: Float32) -> None:
    """Compare with what is the best constant for each channel, or each dimension of vectors."""
    axes = (0, *range(2, x.ndim))
    wide = x.astype(np.float64)
    error = float(np.mean((reconstructed - wide) ** 2))
    constant = float(np.mean((wide - wide.mean(axes, keepdims=True)) ** 2))
    if constant > 0 and error > WARNED * constant:
        what = "one colour for all of them is" if x.ndim > 2 else "their mean is"
        warnings.warn(
            f"the reconstructions of real inputs are further from them than {what}: their mean squared error is"
            f" {error:.2g}, {error / constant:.1f} times as large; the model is not trained, or not on such inputs, or"
            " has another --input-range, --logits or --spread than it is said to have",
            PoorReconstructionWarning,
            stacklevel=5,
        )
