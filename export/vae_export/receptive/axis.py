"""Height or width of one tensor of a graph, and which positions of the graph's input it depends on."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from .maps import SAME, AxisMap
from .shapes import Length, Value


class Axis:
    """Height or width of one tensor: of length N / scale + extra, where N is the input's.

    sources: the axes it is computed from. Between `settle` and the end, `_first` and `_last` hold for every phase what
    the first positions depend on; later ones repeat with the period.
    """

    def __init__(self, side: str, scale: Fraction, extra: int, sources: Sequence[tuple[Axis, AxisMap]] = ()) -> None:
        self.side, self.scale, self.extra, self.sources = side, scale, extra, tuple(sources)
        self._alignment = 0
        self._first: list[int] = []
        self._last: list[int] = []

    def through(self, axis_map: AxisMap) -> Axis:
        return Axis(self.side, self.scale * axis_map.ratio, axis_map.length(self.extra), [(self, axis_map)])

    def matches(self, other: Axis) -> bool:
        return (self.side, self.scale, self.extra) == (other.side, other.scale, other.extra)

    def joined(self, others: Sequence[Axis]) -> Axis:
        """What is computed position by position from several tensors of the same size."""
        distinct = list(dict.fromkeys([self, *others]))
        return (
            self if len(distinct) == 1 else Axis(self.side, self.scale, self.extra, [(one, SAME) for one in distinct])
        )

    @property
    def length(self) -> Length:
        return Length(self.side, 1 / self.scale, Fraction(self.extra))

    def first(self, position: int) -> int:
        """The first input position that `position` depends on."""
        rounds, phase = divmod(position, len(self._first))
        return self._first[phase] + rounds * self._alignment

    def last(self, position: int) -> int:
        rounds, phase = divmod(position, len(self._last))
        return self._last[phase] + rounds * self._alignment

    def settle(self, alignment: int) -> None:
        """Compute the phases, once those of the sources are."""
        self._alignment = alignment
        phases = range(int(alignment / self.scale))
        if not self.sources:
            self._first = self._last = list(phases)
            return
        self._first = [min(axis.first(one.first(q)) for axis, one in self.sources) for q in phases]
        self._last = [max(axis.last(one.last(q)) for axis, one in self.sources) for q in phases]

    @property
    def hides_positions(self) -> bool:
        """Whether positions that a window alone does not have, and whose place padding would take, depend only on what
        lies inside the window: then a window may differ where its field does not show it. Cropping does that."""
        return self.first(-1) > -1 or self.last(self.extra) < 0


def length_of(axis: Axis | int | None) -> Value:
    """Of a dimension that is height or width, a number, or not known."""
    return axis.length if isinstance(axis, Axis) else None if axis is None else Fraction(axis)
