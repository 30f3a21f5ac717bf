"""What a user says p(x|z) is, of a model that does not say it itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vae_runtime.errors import BundleError, InputError
from vae_runtime.manifest import BINARIZE_MODES, Likelihood

RULE = f"expected bernoulli, bernoulli:HOW with {', '.join(BINARIZE_MODES)}, gaussian:SCALE or laplace:SCALE"


def parse_likelihood(said: Mapping[str, Any] | str | None) -> Likelihood | None:
    """As the manifest has it, or in short: {"type": "gaussian", "scale": 0.1} or "gaussian:0.1"; "bernoulli".

    Raises:
        InputError: it is neither.
    """
    if said is None:
        return None
    if not isinstance(said, (str, Mapping)):
        raise InputError(f"likelihood is {said!r:.80}; {RULE}, or a dict such as {{'type': 'bernoulli'}}")
    try:
        return Likelihood.from_dict(_expand(said) if isinstance(said, str) else said)
    except BundleError as error:
        raise InputError(f"{error}; as text: {RULE}" if isinstance(said, str) else str(error)) from None


def agree(said: Likelihood | None, told: Likelihood | None) -> Likelihood | None:
    """What the user says and what the source tells, which may leave open how its data became binary.

    Raises:
        InputError: they differ.
    """
    if said is None or told is None:
        return said or told
    if (said.type, said.scale) != (told.type, told.scale):
        raise InputError(f"likelihood is {said.to_dict()}, but the source says {told.to_dict()}")
    return said


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
