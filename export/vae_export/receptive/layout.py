"""What Reshape does to height and width: nothing, or one step of PixelShuffle and its inverse."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from .axis import Axis, length_of
from .maps import spread, window
from .shapes import Length, Value

Axes = tuple[Axis | int | None, ...]


def reshaped(axes: Axes, target: Sequence[Value], allow_zero: bool) -> Axes | None:
    """The axes after a Reshape to `target`; None where positions would be mixed, or where it cannot be told.

    A side may stay, be split into (side / r, r), or be merged from (side, r): the way of PixelUnshuffle and
    PixelShuffle where the exporter writes them as Reshape, Transpose, Reshape.
    """
    sizes = _with_zeros_filled(axes, target, allow_zero)
    sources = [position for position, axis in enumerate(axes) if isinstance(axis, Axis)]
    results = [position for position, size in enumerate(sizes) if isinstance(size, Length)]
    if len(sources) != len(results):
        return None
    made: list[Axis | int | None] = [int(size) if isinstance(size, Fraction) and size > 0 else None for size in sizes]
    taken, given = [0], [0]  # where each side's own axes end, in the input and in the result
    for source, result in zip(sources, results, strict=True):
        axis, size = axes[source], sizes[result]
        assert isinstance(axis, Axis)
        assert isinstance(size, Length)
        if size.side != axis.side:
            return None
        growth = size.times * axis.scale
        step = int(max(growth, 1 / growth))
        merged, split = growth > 1, growth < 1
        inner = axes[source + 1 : source + 2] if merged else made[result + 1 : result + 2] if split else [step]
        if growth not in (step, Fraction(1, step)) or list(inner) != [step] or size.extra != axis.extra * growth:
            return None
        taken.append(source + 1 + merged)
        given.append(result + 1 + split)
        change = spread(step, 0, step, 0) if merged else window(step, 0, 0, step)
        made[result] = axis.through(change) if step > 1 else axis
    for position in range(1, len(taken)):  # what lies between and behind the sides must stay there
        if position < len(sources):
            before, after = axes[taken[position] : sources[position]], made[given[position] : results[position]]
        else:
            before, after = axes[taken[position] :], made[given[position] :]
        if _product(before) is None or _product(before) != _product(after):
            return None
    return tuple(made)


def _with_zeros_filled(axes: Axes, target: Sequence[Value], allow_zero: bool) -> list[Value]:
    """0 in a target means the input's size."""
    filled: list[Value] = []
    for position, value in enumerate(target):
        if value == 0 and not allow_zero and position < len(axes):
            filled.append(length_of(axes[position]))
        else:
            filled.append(value)
    return filled


def _product(sizes: Sequence[Axis | int | None]) -> int | None:
    known = [size for size in sizes if isinstance(size, int)]
    return math.prod(known) if len(known) == len(sizes) else None
