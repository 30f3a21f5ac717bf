"""A network's own forward, as a witness of how its halves were read: nothing is exported of it, and where it gives
latents or reconstructions that are other ones, the reading is in doubt."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..graphs import DecoderGraph, EncoderGraph, without_validation
from ..quality import ExportWarning
from .meaning import in_every_meaning

_CURE = "let encode return (mean, logvar) as forward computes them"


class ForwardDisagreesWarning(ExportWarning):
    """The forward of a network gives other values than its halves, which were perhaps not read as they are meant."""


def heed_forward(whole: nn.Module, encoder: EncoderGraph, decoder: DecoderGraph, x: Tensor, signed: bool) -> None:
    """Warn of a `ForwardDisagreesWarning` where what `whole` gives for `x` is at odds with its halves.

    Only what is the same for the same inputs is looked at, not what is made of a sample. A forward that does not take
    one batch alone says nothing, nor does one whose latents have as many numbers as its inputs.

    x: inputs (N, ...) in the bundle's units. signed: the network takes and gives [-1, 1].
    """
    given = 2 * x - 1 if signed else x
    told, drawn = _tell(whole, given)
    with torch.no_grad():
        encoded = encoder.call(encoder.encoder, x)
        mean, logvar = (encoded, None) if isinstance(encoded, Tensor) else encoded
        reconstruction = decoder.call(decoder.decoder, mean.clone())  # which it may change
    if mean.numel() == x.numel():
        return
    latents = [one for one in told if one.numel() == mean.numel()]
    pictures = [one for one in told if one.numel() == x.numel() and not _same(one, given)]
    borne_out = any(_agrees(one, reconstruction, signed, decoder.logits) for one in pictures)
    doubt = _of_latents(latents, mean, logvar, borne_out)
    sampled = any(one.numel() == x.numel() for one in drawn)  # what else is there may be anything
    if doubt is None and pictures and not borne_out and not sampled:
        doubt = (
            "the reconstruction there is another one than decode gives for the mean: forward does more or less between"
            " or behind them, such as a sigmoid (--logits), or takes the parts of encode's output in another order; let"
            " encode hold all from the input to the latent, as (mean, logvar), and decode all from there on"
        )
    if doubt is not None:
        warnings.warn(
            f"the network's forward does not bear out how encode and decode are read: {doubt}",
            ForwardDisagreesWarning,
            stacklevel=5,
        )


def _of_latents(latents: list[Tensor], mean: Tensor, logvar: Tensor | None, borne_out: bool) -> str | None:
    """What of the latents that forward gives is at odds with those of encode. borne_out: the mean's reconstruction is
    forward's own."""
    others = [one for one in latents if not _same(one, mean)]
    if not others:
        return None
    if len(others) == len(latents):
        return (
            None
            if borne_out
            else f"of what has the shape of a latent there, nothing is the mean that is read here; {_CURE}"
        )
    if logvar is None:
        return (
            "it gives a second tensor of the code's shape, as a VAE gives its log-variance, and without that this is an"
            f" autoencoder; if it is a VAE, {_CURE}"
        )
    if not any(_same(one, form) for one in others for form in in_every_meaning(logvar)):
        return (
            "of what has the shape of a latent there, only the mean is found, and not the spread that is read here, as"
            f" log-variance, variance or standard deviation; say what it is (--spread), or {_CURE}"
        )
    return None


def _agrees(told: Tensor, reconstruction: Tensor, signed: bool, logits: bool) -> bool:
    """Whether a forward's reconstruction is the decoder's: in its range, and with a sigmoid or without one."""
    if logits:
        return _same(told, reconstruction) or _same(told, reconstruction.sigmoid())
    own = 2 * reconstruction - 1 if signed else reconstruction
    return _same(told, own) or _same(told.sigmoid(), own)


def _tell(whole: nn.Module, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors that forward gives twice for the same inputs, and others. A copy runs, as it may change itself."""
    if type(whole).forward is nn.Module.forward:
        return [], []
    try:
        with torch.no_grad(), without_validation():
            network = copy.deepcopy(whole).eval()
            first, second = (list(_tensors(network(x.clone()))) for _ in range(2))
    except (Exception, SystemExit):  # it takes labels too, or is of no use
        return [], []
    pairs = [(one, again) for one, again in zip(first, second, strict=False) if len(one) == len(x)]
    drawn = [one for one, again in pairs if not one.equal(again)]
    return [one.float() for one, again in pairs if one.is_floating_point() and one.equal(again)], drawn


def _tensors(output: Any) -> Iterator[Tensor]:
    """All tensors in what a network returns, with a batch axis; of a normal distribution its mean and deviation."""
    if isinstance(output, Tensor):
        if output.ndim:
            yield output
    elif isinstance(output, torch.distributions.Independent):
        yield from _tensors(output.base_dist)
    elif isinstance(output, torch.distributions.Normal):
        yield from (output.loc, output.scale)
    elif isinstance(output, Mapping):
        yield from _tensors(tuple(output.values()))
    elif isinstance(output, (tuple, list)):
        for part in output:
            yield from _tensors(part)
    elif dataclasses.is_dataclass(output):
        yield from _tensors(tuple(vars(output).values()))


def _same(one: Tensor, other: Tensor) -> bool:
    rows = len(one)
    return torch.allclose(one.reshape(rows, -1), other.reshape(rows, -1), rtol=1e-4, atol=1e-5)
