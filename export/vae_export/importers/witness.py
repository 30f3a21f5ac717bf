"""Compares the network's own forward with the exported halves; a mismatch is reported as a warning."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..graphs import DecoderGraph, EncoderGraph, without_validation
from ..imported import ImportOptions
from ..quality import ExportWarning, warn
from .meaning import in_every_meaning
from .options import flag

_ROWS = 2  # that forward is given
_TOLERANCE = 1e-4  # of the largest value: of sums in another order
_SPREAD_TOLERANCE = 1e-2  # beside it, what is added to keep a deviation above 0
_LOGIT = 1.0  # further outside [0, 1] no image is, and logits are nearly everywhere
_NO_LATENT = re.compile("loss|kl|logit|pred|class", re.IGNORECASE)  # in a name
_CURE = "let encode return (mean, logvar) as forward computes them"
WHOLE_HALVES = "let encode do everything from the input to (mean, logvar), and decode everything from the latent on"


class ForwardDisagreesWarning(ExportWarning):
    """A network's forward gives other values than its exported halves, which may have been misread."""


class _Read(NamedTuple):
    """What the halves give, as they are read, in the network's own units. logvar: None of an autoencoder."""

    mean: Tensor
    logvar: Tensor | None
    decode: Callable[[Tensor], Tensor]

    @torch.no_grad()
    def reconstructions(self) -> Iterator[Tensor]:
        """What a forward may give that draws nothing: of the mean, or, as MONAI's does, of mean + std."""
        yield self.decode(self.mean.clone())  # which it may change
        if self.logvar is not None:
            yield self.decode(self.mean + (self.logvar / 2).exp())


def heed_forward(
    whole: nn.Module, encoder: EncoderGraph, decoder: DecoderGraph, x: Tensor, options: ImportOptions
) -> None:
    """Warn of a `ForwardDisagreesWarning` where what `whole` gives for some of `x` contradicts its halves.

    Only outputs that are the same for the same inputs are compared, not those made from a sample. Nothing is compared
    where forward takes more than one batch, or where latents have as many numbers as inputs.

    x: inputs (N, ...) in the bundle's units.
    """
    x, signed = x[:_ROWS], options.input_range == "signed"
    with torch.no_grad():
        encoded = encoder.call(encoder.encoder, x.clone())
        mean, logvar = (encoded, None) if isinstance(encoded, Tensor) else encoded
    read = _Read(mean, logvar, partial(decoder.call, decoder.decoder))
    if mean.numel() == x.numel():
        return
    doubt = _doubt(whole, 2 * x - 1 if signed else x, read, options)
    if doubt is not None and signed and _doubt(whole, x, read, options) is None:
        return  # it makes images in [-1, 1] itself of those in [0, 1]
    if doubt is not None:
        warn(
            f"the network's forward contradicts how encode and decode are read: {doubt}",
            ForwardDisagreesWarning,
        )


def _doubt(whole: nn.Module, x: Tensor, read: _Read, options: ImportOptions) -> str | None:
    steady, drawn = _outputs_of_forward(whole, x)
    latents = [one for one in steady if _fits(one, read.mean)]
    pictures = [one for one in steady if _fits(one, x) and not _same(one, x)]
    borne_out = bool(pictures) and any(
        _agrees(one, made, options) for made in read.reconstructions() for one in pictures
    )
    doubt = _doubt_of_latents(latents, read, borne_out, options)
    sampled = any(_fits(one, x) for one in drawn)  # what else is there may be anything
    if doubt is None and pictures and not borne_out and not sampled:
        return (
            "its reconstruction is not what decode gives for the mean: forward does more, or less, between or after"
            f" them, such as a sigmoid ({flag(options, 'logits')}), or takes the parts of encode's output in another"
            f" order; {WHOLE_HALVES}"
        )
    return doubt


def _doubt_of_latents(latents: list[Tensor], read: _Read, borne_out: bool, options: ImportOptions) -> str | None:
    """How the latents that forward gives contradict those of encode; None: they do not. borne_out: forward reconstructs
    what decode makes of the mean."""
    others = [one for one in latents if not _same(one, read.mean)]
    spreads = [] if read.logvar is None else _spreads(read.mean, read.logvar)
    strange = [one for one in others if not any(_same(one, form, _SPREAD_TOLERANCE) for form in spreads)]
    if not strange:
        return None
    if len(others) == len(latents):
        unknown = f"none of its outputs with the shape of a latent is the mean that is read here; {_CURE}"
        return None if borne_out else unknown
    if len(strange) < len(others):  # the spread is among them
        return None
    if read.logvar is not None:
        return (
            "of its outputs with the shape of a latent, one is the mean, but none is the spread that is read here, as"
            f" log-variance, variance or standard deviation; say what it is ({flag(options, 'spread')}), or {_CURE}"
        )
    if options.kind == "autoencoder":
        return None
    return (
        "it gives a second tensor of the code's shape, which may be a VAE's log-variance, but encode gives the code"
        f" alone, as an autoencoder does; if it is a VAE, {_CURE}; if not, pass {flag(options, 'kind')} autoencoder"
    )


def _spreads(mean: Tensor, logvar: Tensor) -> list[Tensor]:
    """The forms in which a forward may return a spread: every meaning of it, its inverse, and the KL of each number."""
    divergence = (mean**2 + logvar.exp() - 1 - logvar) / 2
    return [*in_every_meaning(logvar), (-logvar).exp(), (-logvar / 2).exp(), divergence]


def _agrees(given: Tensor, reconstruction: Tensor, options: ImportOptions) -> bool:
    """Whether a forward's reconstruction is the decoder's: in the decoder's range or in [0, 1], cut or not, or as the
    logits of it."""
    if options.logits:
        return _same(given, reconstruction) or _same(given, reconstruction.sigmoid())
    signed = options.input_range == "signed"
    own = 2 * reconstruction - 1 if signed else reconstruction
    forms = (own, own.clamp(-1 if signed else 0, 1), reconstruction, reconstruction.clamp(0, 1))
    return any(_same(given, form) for form in forms) or (_are_logits(given) and _same(given.sigmoid(), own))


def _are_logits(given: Tensor) -> bool:
    """Whether these may be logits: what lies in or about [0, 1] is an image already, or a vector."""
    return float(given.min()) < -_LOGIT or float(given.max()) > 1 + _LOGIT


def _outputs_of_forward(whole: nn.Module, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors that forward gives: those equal in two runs, and those that differ. A copy runs, as forward may
    change the network; what it prints goes to stderr, and torch's random numbers go on as if it had not run."""
    if "forward" in vars(whole) or type(whole).forward is nn.Module.forward:
        return [], []  # that of an instance is of what it was made with, which no copy changes
    try:
        with (
            torch.no_grad(),
            without_validation(),
            torch.random.fork_rng(devices=[]),
            contextlib.redirect_stdout(sys.stderr),
        ):
            network = _copy(whole).eval()
            first, second = (list(_tensors(network(x.clone()))) for _ in range(2))
            pairs = [(one, again) for one, again in zip(first, second, strict=False) if len(one) == len(x)]
            drawn = [one for one, again in pairs if not one.equal(again)]
            return [one.float() for one, again in pairs if one.is_floating_point() and one.equal(again)], drawn
    except (Exception, SystemExit):  # it takes labels too, or is of no use
        return [], []


def _copy(network: nn.Module) -> nn.Module:
    """Also where it keeps what came with gradients, as weight_norm does, and some a loss, which deepcopy refuses."""
    attributes = (value for module in network.modules() for value in vars(module).values())
    kept = (value for value in attributes if isinstance(value, Tensor) and not value.is_leaf)
    return copy.deepcopy(network, {id(value): value.detach().clone() for value in kept})


def _tensors(output: Any) -> Iterator[Tensor]:
    """All tensors in what a network returns, with a batch axis; of a normal distribution its mean and deviation."""
    if isinstance(output, Tensor):
        if output.ndim and output.layout == torch.strided:
            yield output
    elif isinstance(output, torch.distributions.Independent):
        yield from _tensors(output.base_dist)
    elif isinstance(output, torch.distributions.Normal):
        yield from (output.loc, output.scale)
    elif isinstance(output, Mapping):
        yield from _tensors(tuple(part for name, part in output.items() if not _NO_LATENT.search(str(name))))
    elif isinstance(output, (tuple, list)):
        for part in output:
            yield from _tensors(part)
    elif dataclasses.is_dataclass(output):
        yield from _tensors(vars(output))


def _fits(one: Tensor, other: Tensor) -> bool:
    """Whether both have the same numbers at the same places, flat or not."""
    shapes = [[side for side in tensor.shape[1:] if side != 1] for tensor in (one, other)]
    return (
        len(one) == len(other)
        and one.numel() == other.numel()
        and (shapes[0] == shapes[1] or 2 in (one.ndim, other.ndim))
    )


def _same(one: Tensor, other: Tensor, tolerance: float = _TOLERANCE) -> bool:
    one, other = one.reshape(len(one), -1), other.reshape(len(other), -1)
    return float((one - other).abs().max()) <= tolerance * max(0.01, float(other.abs().max()))
