"""Reconstructions and latents of some inputs, checked before the export: they show options that misstate the model."""

from __future__ import annotations

import numpy as np

from vae_runtime.manifest import LOGVAR, MEAN
from vae_runtime.preprocess import Float32

from .decoder_range import check_decoder_range
from .halves import Halves
from .quality import ExportWarning, warn
from .verify import run_both

_MOST_ROWS, _MOST_VALUES = 16, 2**20  # that are reconstructed, of images
_MOST_VECTORS, _LEAST = 256, 8  # the least that tell their mean
# Of the best constant's error. Of trained models of digits and photographs it was 0.1 to 0.5; of those said to be of
# [-1, 1] or to give logits 0.8 to 1.3; where latents tell nothing it is about 1.
WARNED = 1.1
_MOMENT = 2.0  # of trained models of digits it was 1.05 to 1.08, of one with the prior N(3, 4) 13
_NUMBERS = 64  # the least whose mean square, of normal numbers, is hardly ever so far off
_SMALL_ERROR = (1 / 255) ** 2  # of images: a step of 8 bits, which is no matter of contrast


class AnotherPriorWarning(ExportWarning):
    """The latents of real inputs are not distributed like the standard normal prior."""


class PoorReconstructionWarning(ExportWarning):
    """Reconstructions of real inputs are worse than a constant would be, which is rare for a trained model."""


def check_plausible(
    halves: Halves, x: Float32, input_range: str | None, real: bool, prior_is_standard: bool = True
) -> None:
    """Refuse or warn of what reconstructions and latents of `x` show, in the bundle's units.

    x: inputs (N, ...). input_range: "unit" or "signed", the stated range of what the decoder gives; None: it may give
        anything. real: the inputs are no noise. prior_is_standard: none is fitted in its place.

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
    if real and (tried.ndim > 2 or len(x) >= _LEAST):
        _warn_of_poor(tried, np.clip(values, 0, 1) if tried.ndim > 2 else values)
    are_vectors = LOGVAR in encoded and encoded[MEAN].ndim == 2
    if real and prior_is_standard and are_vectors and rows >= _LEAST and encoded[MEAN].size >= _NUMBERS:
        _warn_of_another_prior(encoded[MEAN], encoded[LOGVAR])


def _warn_of_another_prior(mean: Float32, logvar: Float32) -> None:
    """Latents of a VAE's own data, drawn from their posteriors, are spread about as its prior is (Hoffman and Johnson,
    2016). Not asked of latents with a height and a width, from whose prior alone nobody samples."""
    with np.errstate(over="ignore"):
        moment = float(np.mean(np.square(mean, dtype=np.float64) + np.exp(logvar, dtype=np.float64)))
    if not 1 / _MOMENT <= moment <= _MOMENT:
        warn(
            f"the latents of real inputs have a mean square of {moment:.2g}, where N(0, 1), which is taken for the"
            " prior, has 1: the model was trained with another prior, or with little weight on the KL, or --spread does"
            " not fit its encoder; samples from N(0, 1) will not be like the data, for which a prior can be fitted"
            " (--prior gaussian)",
            AnotherPriorWarning,
        )


def _warn_of_poor(x: Float32, reconstructed: Float32) -> None:
    """Warn where the best constant has a smaller error: one for each channel of images, or, for each pixel or number of
    vectors, the mean over the other inputs, as a model learns it from other inputs."""
    wide, is_image = x.astype(np.float64), x.ndim > 2
    error = float(np.mean((reconstructed - wide) ** 2))
    constants = {}
    if is_image:
        best = wide.mean((0, *range(2, x.ndim)), keepdims=True)
        constants["one colour for all of them is"] = float(np.mean((wide - best) ** 2))
    if len(x) >= _LEAST:
        others = (len(x) / (len(x) - 1)) ** 2
        constants["their mean is"] = float(np.mean((wide - wide.mean(0)) ** 2)) * others
    what, constant = min(constants.items(), key=lambda one: one[1])
    if constant > 0 and error > max(WARNED * constant, _SMALL_ERROR if is_image else 0):
        warn(
            f"the reconstructions of real inputs are further from them than {what}: their mean squared error is"
            f" {error:.2g}, {error / constant:.1f} times as large; the model may be untrained, or trained on other"
            " inputs, its latents may carry no information, a part of it may be missing here, or --input-range,"
            " --logits or --spread does not fit it",
            PoorReconstructionWarning,
        )
