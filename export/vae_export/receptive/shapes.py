"""Arithmetic on shapes inside a graph, followed with height and width left free.

Exporters compute the targets of Reshape, Resize and Slice from `Shape`. Here such a value is a constant or a length
that grows with one side of the input, so that "twice the height" is recognised without running anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray


class Length(NamedTuple):
    """times · N + extra, where N is the input's height ("h") or width ("w")."""

    side: str
    times: Fraction
    extra: Fraction = Fraction(0)


Value = Fraction | Length | None  # None: not known, for example the batch
Values = list[Value]  # of a tensor of rank 0 or 1

MAX_VALUES = 64  # a longer constant is no shape
_PLAIN = ("Identity", "Cast", "Squeeze", "Unsqueeze", "Reshape")
_ROUNDING = ("Floor", "Ceil", "Round")


def constant_values(array: NDArray[Any]) -> Values | None:
    """A constant as values; None where it is no list of numbers."""
    if array.ndim > 1 or array.size > MAX_VALUES or array.dtype.kind not in "iuf" or not np.isfinite(array).all():
        return None
    return [Fraction(number) for number in array.reshape(-1).tolist()]


def evaluate(
    node: onnx.NodeProto, inputs: Sequence[Values | None], multiple: int, whole: bool, rounds: bool
) -> Values | None:
    """What a node gives whose inputs are values; None for operators that are not followed.

    multiple: of what height and width are multiples. whole: the inputs are whole numbers, whose division rounds down.
    rounds: this node makes whole numbers of others.
    """
    if any(values is None for values in inputs):
        return None
    known = [values for values in inputs if values is not None]
    if node.op_type in _ROUNDING or (rounds and node.op_type == "Cast"):
        return [_if_whole(value, multiple) for value in known[0]]
    if node.op_type in _PLAIN:
        return known[0]
    if node.op_type == "Concat":
        return [value for values in known for value in values]
    if node.op_type == "Gather":
        return [_at(known[0], index) for index in known[1]]
    if node.op_type == "Slice":
        return _slice(known)
    if node.op_type in _ARITHMETIC and len(known) == 2:
        left, right = known
        size = max(len(left), len(right))
        if {len(left), len(right)} - {1, size}:
            return None
        pairs = zip(left * (size // len(left)), right * (size // len(right)), strict=True)
        if node.op_type == "Div" and whole:
            return [_divide_down(a, b, multiple) for a, b in pairs]
        return [_ARITHMETIC[node.op_type](*pair) for pair in pairs]
    return None


def sliced(values: Values, given: dict[str, Any]) -> Values:
    """`Shape` with its attributes `start` and `end`."""
    return values[given.get("start", 0) : given.get("end")]


def _at(values: Values, index: Value) -> Value:
    if isinstance(index, Fraction) and index.denominator == 1 and -len(values) <= index < len(values):
        return values[int(index)]
    return None


def _slice(known: list[Values]) -> Values | None:
    bounds = [values[0] if len(values) == 1 else None for values in known[1:]]
    numbers = [int(bound) for bound in bounds if isinstance(bound, Fraction)]
    if len(numbers) != len(bounds) or numbers[2:3] not in ([], [0], [-1]):
        return None
    return known[0][numbers[0] : numbers[1] : numbers[3] if len(numbers) > 3 else 1]


def _add(a: Value, b: Value, sign: int = 1) -> Value:
    if a is None or b is None:
        return None
    one, other = _line(a), _line(b)
    sides = {side for side, times, _ in (one, other) if times}
    times, extra = one[1] + sign * other[1], one[2] + sign * other[2]
    if len(sides) > 1:
        return None
    return Length(sides.pop(), times, extra) if sides and times else extra


def _multiply(a: Value, b: Value) -> Value:
    if isinstance(a, Length) and isinstance(b, Fraction):
        return Length(a.side, a.times * b, a.extra * b)
    if isinstance(b, Length) and isinstance(a, Fraction):
        return _multiply(b, a)
    return a * b if isinstance(a, Fraction) and isinstance(b, Fraction) else None


def _divide(a: Value, b: Value) -> Value:
    """Without a remainder, as far as that can be seen; who uses a length checks that it is whole."""
    if not isinstance(b, Fraction) or b == 0 or a is None:
        return None
    found = _multiply(a, 1 / b)
    return None if isinstance(found, Fraction) and found.denominator != 1 else found


def _divide_down(a: Value, b: Value, multiple: int) -> Value:
    """Of whole numbers, none of which is negative: (N - 1) / 2 is N / 2 - 1 where N is even, and else not known."""
    if a is None or not isinstance(b, Fraction) or b <= 0:
        return None
    if isinstance(a, Fraction):
        return Fraction(math.floor(a / b))
    times = a.times / b
    return _if_whole(Length(a.side, times, Fraction(math.floor(a.extra / b))), multiple)


def _if_whole(value: Value, multiple: int) -> Value:
    """What rounding changes nothing of."""
    if value is None:
        return None
    _, times, extra = _line(value)
    return value if (times * multiple).denominator == extra.denominator == 1 else None


def _line(value: Fraction | Length) -> tuple[str, Fraction, Fraction]:
    return tuple(value) if isinstance(value, Length) else ("", Fraction(0), value)  # type: ignore[return-value]


_ARITHMETIC: dict[str, Callable[[Value, Value], Value]] = {
    "Add": _add,
    "Sub": lambda a, b: _add(a, b, -1),
    "Mul": _multiply,
    "Div": _divide,
}
