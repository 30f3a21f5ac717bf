"""Latents as callers pass them, checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from .boundary import Boundary
from .errors import InputError
from .manifest import LATENT, Shape
from .preprocess import Float32, as_graph_input, first_failing, fitting_memory, require_plain_array


def to_decoder_input(latents: Any, shape: Shape, name: str = "latents", names: Sequence[str] | None = None) -> Float32:
    """Check latents and return them as the decoder takes them: float32 (N, *shape), finite. names: of each."""
    require_plain_array(latents, name)
    check_latent_layout(latents, shape, name)
    with fitting_memory(name, latents.shape):
        latents = as_graph_input(latents)
    low, high = latents.min(), latents.max()
    if not (low > -np.inf and high < np.inf):
        row, name = first_failing(names or name, np.isfinite(latents))
        what = "NaN" if np.isnan(latents[row]).any() else "infinite values"
        raise InputError(f"{name} has {what}; latents are finite")
    return cast("Float32", latents)


def require_finite(latents: Float32, names: Sequence[str] | str, what: str = "latent") -> Float32:
    """What the encoder gave for inputs, or `what` else came of them, finite. names: of the inputs, or of the argument
    that has them.

    Raises:
        InputError: the network's numbers overflowed on an input, which is named.
    """
    if not (finite := np.isfinite(latents)).all():
        _, name = first_failing(names, finite)
        raise InputError(f"{name} is so far from what the model knows that its {what} has NaN or infinite values")
    return latents


def check_latent_layout(latents: Any, shape: Shape, name: str) -> None:
    """Raise `InputError` unless dtype and shape are those of latents; the values are not looked at."""
    boundary = Boundary(LATENT, shape, {})
    rule = f"expected {boundary.rule()} float32"
    if latents.dtype != np.float32 or not latents.dtype.isnative:
        order = "" if latents.dtype.isnative else " in foreign byte order"
        raise InputError(f"{name} has dtype {latents.dtype}{order}; {rule}, convert with .astype(numpy.float32)")
    if not boundary.accepts(latents.shape[1:]):
        single = boundary.accepts(latents.shape)
        hint = "; this looks like a single latent without a batch: latents[None]" if single else ""
        raise InputError(f"{name} has shape {latents.shape}; {rule}{hint}")
