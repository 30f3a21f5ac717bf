"""How far each output of a graph looks: its receptive field, from the graph alone.

An output of a convolutional network depends on a window of the input. Where that window is bounded, a large image can
be computed window by window without any difference (`vae_runtime.tiling`). The ends of the window are followed through
the graph from operator to operator, exactly and for every phase of an upsampling, as in Araujo, Norris and Sim,
"Computing Receptive Fields of Convolutional Neural Networks" (Distill, 2019), which has the plain cases.

Operators over all positions (attention, GroupNorm, InstanceNorm, averages over an image) make it unbounded, and so does
whatever is not known here: the error is on the side of caution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import onnx

from .axis import Axis
from .maps import UnknownMapError
from .walk import Grid, Walk


class ReceptiveField(NamedTuple):
    """Of one output, in positions of the input; the larger of height and width.

    Output position o has its place at input position p = floor(o · ratio), where `ratio` is input positions per output
    position, and depends on p - context_before ... p + context_after. size: positions that the widest of these windows
    has. alignment: a window that is cut out of an input and computed alone must begin and end at multiples of this.
    reason: the operator that makes the field unbounded; the other figures then mean nothing.
    """

    ratio: Fraction = Fraction(1)
    context_before: int = 0
    context_after: int = 0
    size: int = 0
    alignment: int = 1
    reason: str | None = None

    @property
    def is_bounded(self) -> bool:
        return self.reason is None


def receptive_fields(model: onnx.ModelProto, multiple: int = 1) -> dict[str, ReceptiveField]:
    """The receptive field of every output of a graph that has one input (batch, C, height, width), both sides free but
    for being multiples of `multiple`.

    Outputs are (batch, C', height', width'), where height' / height is one ratio for all heights; anything else counts
    as unbounded.
    """
    walk = Walk(model, multiple)
    fields = {}
    for output in model.graph.output:
        found = walk.found(output.name)
        if not isinstance(found, Grid):
            fields[output.name] = ReceptiveField(reason=found.reason)
        else:
            fields[output.name] = _field(found.sides()) if found.is_image else ReceptiveField(reason="another layout")
    return fields


def widest(fields: Sequence[ReceptiveField]) -> ReceptiveField:
    """One field that covers them all: of the outputs of one graph."""
    for field in fields:
        if not field.is_bounded:
            return field
    return ReceptiveField(
        fields[0].ratio,
        max(field.context_before for field in fields),
        max(field.context_after for field in fields),
        max(field.size for field in fields),
        math.lcm(*(field.alignment for field in fields)),
        None if len({field.ratio for field in fields}) == 1 else "outputs of different sizes",
    )


def _field(sides: Sequence[Axis]) -> ReceptiveField:
    if any(axis.extra for axis in sides) or sides[0].scale != sides[1].scale:
        return ReceptiveField(reason="an output that is no multiple or fraction of the input's size")
    try:
        return widest([_along(axis) for axis in sides])
    except UnknownMapError as error:
        return ReceptiveField(reason=str(error))


def _along(output: Axis) -> ReceptiveField:
    axes = _in_order(output)
    alignment = math.lcm(*(axis.scale.numerator for axis in axes))
    for axis in axes:
        axis.settle(alignment)
    if any(axis.hides_positions for axis in axes):
        raise UnknownMapError("Slice or cropping of what padding replaces")
    positions = range(int(alignment / output.scale))
    places = [math.floor(q * output.scale) for q in positions]
    before = max(place - output.first(q) for q, place in zip(positions, places, strict=True))
    after = max(output.last(q) - place for q, place in zip(positions, places, strict=True))
    for axis in axes:
        for source, axis_map in axis.sources:
            if axis_map.mirrored is not None:
                begin, end = axis_map.mirrored
                # The first output may see the padding and so what it repeats; the last one likewise.
                after = max(after, source.last(begin))
                before = max(before, -math.ceil(max(output.scale, Fraction(1))) - source.first(source.extra - 1 - end))
    size = max(output.last(q) - output.first(q) for q in positions) + 1
    return ReceptiveField(output.scale, max(before, 0), max(after, 0), size, alignment)


def _in_order(output: Axis) -> list[Axis]:
    """All axes that `output` comes from, sources first."""
    order: dict[Axis, None] = {}
    pending = [output]
    while pending:
        axis = pending[-1]
        missing = [source for source, _ in axis.sources if source not in order]
        if missing:
            pending.extend(missing)
        else:
            order[pending.pop()] = None
    return list(order)
