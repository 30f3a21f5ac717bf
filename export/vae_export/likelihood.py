"""The likelihood p(x|z) that a user states of a model, where the model does not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vae_runtime.arguments import check_number
from vae_runtime.errors import BundleError, InputError
from vae_runtime.manifest import BINARIZE_MODES, Likelihood

RULE = f"expected bernoulli, bernoulli:HOW with {', '.join(BINARIZE_MODES)}, gaussian:SCALE or laplace:SCALE"


def parse_likelihood(given: Mapping[str, Any] | str | None) -> Likelihood | None:
    """As the manifest has it, or in short: {"type": "gaussian", "scale": 0.1} or "gaussian:0.1"; "bernoulli".

    Raises:
        InputError: it is neither, or has what such a likelihood has not.
    """
    if given is None:
        return None
    if not isinstance(given, (str, Mapping)):
        raise InputError(f"likelihood is {given!r:.80}; {RULE}, or a dict such as {{'type': 'bernoulli'}}")
    if isinstance(given, Mapping) and "scale" in given:
        given = {**given, "scale": check_number(given["scale"], "likelihood.scale")}
    try:
        parsed = Likelihood.from_dict(_expand(given) if isinstance(given, str) else given)
    except BundleError as error:
        raise InputError(f"{error}; as text: {RULE}" if isinstance(given, str) else str(error)) from None
    # A manifest may have more, of a later version; a name that its user misspelt would leave another model.
    known = parsed.to_dict()
    if isinstance(given, Mapping) and (others := [key for key in given if key not in known]):
        raise InputError(f"likelihood has {others[0]!r}; of a {parsed.type} one, expected {' and '.join(known)}")
    return parsed


def agree(requested: Likelihood | None, stated: Likelihood | None) -> Likelihood | None:
    """The likelihood that the user requests, or else the one that the source states. Where both are given they have to
    agree, but for how the data became binary, which sources leave open.

    Raises:
        InputError: they differ.
    """
    if requested is None or stated is None:
        return requested or stated
    if (requested.type, requested.scale) != (stated.type, stated.scale):
        raise InputError(f"likelihood is {requested.to_dict()}, but the source says {stated.to_dict()}")
    return requested


def _expand(text: str) -> dict[str, Any]:
    kind, colon, value = text.partition(":")
    if not colon:
        return {"type": kind}
    if kind == "bernoulli":
        return {"type": kind, "binarize": value}
    try:
        return {"type": kind, "scale": float(value)}
    except ValueError:
        raise InputError(f"likelihood is {text!r}; {RULE}") from None
