"""What the spread of a posterior is: a log-variance, a standard deviation, ..."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

from vae_runtime.errors import ExportError, InputError
from vae_runtime.preprocess import Float32

from ..imported import SPREADS, ImportOptions
from .options import flag, wrong_option

Trial = tuple[bool, str]  # whether a decoder takes a latent and gives inputs of the right shape; if not, why
_Array = TypeVar("_Array", Tensor, Float32)


# By what a spread means, of `SPREADS`: whether its logarithm is taken, and by what that is multiplied, for the
# log-variance.
TO_LOGVAR = {"logvar": (False, 1), "log_std": (False, 2), "std": (True, 2), "variance": (True, 1)}


def to_logvar(spread: _Array, meaning: str, log: Callable[[_Array], _Array]) -> _Array:
    """The log-variance of a spread whose meaning is this one of `SPREADS`. log: the natural logarithm."""
    takes_log, factor = TO_LOGVAR[meaning]
    spread = log(spread) if takes_log else spread
    return spread if factor == 1 else spread * factor


def in_every_meaning(logvar: Tensor) -> tuple[Tensor, ...]:
    """A log-variance as each of `SPREADS`."""
    parts = ((takes_log, logvar / factor) for takes_log, factor in TO_LOGVAR.values())
    return tuple(part.exp() if takes_log else part for takes_log, part in parts)


def settle_meaning(named: str | None, least: float, options: ImportOptions) -> str:
    """What the spread is, of `SPREADS`; named: by the source itself. least: its smallest value for several inputs.

    Raises:
        InputError: it may as well be a standard deviation, or is not what the options say.
    """
    if options.spread not in (None, *SPREADS):
        raise wrong_option(options, "spread", f"; expected one of {', '.join(SPREADS)}")
    if named in ("std", "variance") and least < 0 and options.spread is not None:
        named = None  # it is called so, and is none
    if named is not None and options.spread not in (None, named):
        raise wrong_option(options, "spread", f", but the encoder names it {named}")
    meaning = named or options.spread
    if meaning is None and least >= 0:
        raise InputError(
            f"the second of the encoder's outputs is never negative (at least {least:.2g}), which a log-variance rarely"
            f" is; say what it is with {flag(options, 'spread')} {', '.join(SPREADS)}; or, where these are features of"
            " which other layers make mean and log-variance, let the encoder hold those too"
        )
    if meaning in ("std", "variance") and least < 0:
        who = f"{flag(options, 'spread')} is" if named is None else "the encoder names its second output"
        cure = "" if named is None else f": say what it is with {flag(options, 'spread')}"
        raise InputError(
            f"{who} {meaning!r}, but that has values from {least:.2g}; a {meaning} is never negative{cure}"
        )
    return meaning or "logvar"


def require_kind(kind: str, options: ImportOptions) -> None:
    """Raises: InputError: the options state another kind than was found, or a spread of a code, which has none."""
    if options.kind not in (None, kind):
        found = "one tensor, which the decoder takes: it is of kind 'autoencoder'"
        if kind == "vae":
            found = "a mean and a spread, as it is read; an autoencoder's encoder returns its code alone"
        raise wrong_option(options, "kind", f", but the encoder returns {found}")
    if kind == "autoencoder" and options.spread is not None:
        raise wrong_option(options, "spread", ", but an autoencoder's code has none")


def is_split(shape: tuple[int, ...], whole: Trial, half: Trial, options: ImportOptions) -> bool:
    """Whether an encoder's one output, of this shape, is mean and log-variance one after the other along the channels.

    whole, half: what the decoder made of the output, and of the first half of its channels.

    Raises:
        ExportError: it takes neither. InputError: it takes both, and the options do not say which it is.
    """
    if len(shape) < 2 or shape[1] % 2:
        half = False, "the number of channels is odd"
    if whole[0] and half[0] and options.kind is None:
        raise InputError(
            f"the encoder returns one tensor of shape {tuple(shape)}, and the decoder takes it both whole and by half;"
            f" pass {flag(options, 'kind')} autoencoder (a code) or vae (mean and log-variance)"
        )
    if not whole[0] and not half[0]:
        raise ExportError(
            f"the decoder does not take what the encoder returns, {tuple(shape)}: whole, {whole[1]}; by half, {half[1]}"
        )
    return half[0] and (not whole[0] or options.kind == "vae")
