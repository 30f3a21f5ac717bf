"""The values that a decoder gives before images are cut to [0, 1]: they show one that was made for another range."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from vae_runtime.errors import InputError
from vae_runtime.manifest import MEAN
from vae_runtime.preprocess import Float32

from .halves import Halves
from .quality import ExportWarning, warn

MARGIN = 0.1  # a value further outside is none that rounding or a linear last layer gives now and then
# Shares of such values. Of small VAEs of digits and of photographs, linear decoders of [0, 1] gave 0 to 0.01 on real
# inputs and up to 0.03 on noise (untrained 0.09 to 0.22), those of [-1, 1] and of logits 0.48 to 0.9, on noise mostly
# from 0.27.
WARNED, REFUSED = 0.05, 0.25
REFUSED_OF_PRIOR = 0.4  # of draws from the prior: 0.03 to 0.16 (untrained 0.32) and 0.41 to 0.99
LARGEST_OF_SMALL = 20  # logits that are never negative and go beyond are those of white images alone
# Images normalised by a mean and a std, ImageNet's for example, are within [-1 / std, 1 / std]: of photographs and of
# digits within 5, and linear decoders exceed that a little. Logits may be as small.
LARGEST_OF_NORMALISED = 6


class DecoderRangeWarning(ExportWarning):
    """Many values of the decoder lie outside [0, 1], the range of images and of a Bernoulli likelihood's means."""


def check_decoder_range(
    halves: Halves, encoded: Mapping[str, Float32], values: Float32, signed: bool, real: bool
) -> None:
    """Refuse a decoder that visibly gives something else than images in [0, 1], in the bundle's units; warn of one
    that often leaves that range.

    encoded: the latents of some inputs. values: what the decoder makes of their means, uncut: images, or vectors of
        which a Bernoulli likelihood is. signed: it is stated to give [-1, 1]. real: the inputs are no noise; on noise,
        the means of posteriors tell less, and draws from the prior are checked too.

    Raises:
        InputError: what the decoder gives looks like logits, or like images of another range.
    """
    share = _outside(values)
    refused = share > REFUSED
    if not refused and not real and halves.kind == "vae":
        drawn = halves.uncut(np.random.default_rng(0).standard_normal(encoded[MEAN].shape, dtype=np.float32))
        refused = _outside(drawn) > REFUSED_OF_PRIOR
        values, share = (drawn, _outside(drawn)) if refused else (values, share)
    low, high = float(values.min()), float(values.max())
    found = f"the decoder gives values from {low:.3g} to {high:.3g}, {share:.0%} of them more than {MARGIN} outside"
    if refused:
        there = "where images are" if values.ndim > 2 else "where the means of a Bernoulli likelihood are"
        raise InputError(f"{found} [0, 1], {there}; {_advice(low, high, signed or values.ndim == 2)}")
    if share > WARNED:
        what = "they are cut to it" if values.ndim > 2 else "a Bernoulli likelihood takes them as 0 and 1"
        warn(f"{found} [0, 1]; {what}", DecoderRangeWarning)


def _outside(values: Float32) -> float:
    """The share of the values that lie clearly outside [0, 1]."""
    return float(np.mean((values < -MARGIN) | (values > 1 + MARGIN)))


def _advice(low: float, high: float, logits_alone: bool) -> str:
    logits = "--logits (logits=True), which puts the sigmoid into the graph"
    normalised = (
        "; or, if they are normalised by a mean and a std, undo that within the decoder that is exported, and normalise"
        " within its encoder"
    )
    if not logits_alone and low >= -1 - MARGIN and high <= 1 + MARGIN:
        return (
            "they look like images in [-1, 1]: say so with --input-range signed (input_range='signed'); or, if they are"
            f" logits, with {logits}{normalised}"
        )
    if low >= -MARGIN and high > LARGEST_OF_SMALL:
        return "they look like images of a larger range, such as [0, 255]: bring them to [0, 1] in the decoder"
    advice = f"they look like logits: say so with {logits}"
    return advice + normalised if max(-low, high) <= LARGEST_OF_NORMALISED else advice
