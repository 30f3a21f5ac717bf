"""Arithmetic on shapes against the numbers that it stands for, and what is left unknown."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from onnx import helper

from vae_export.receptive.shapes import MAX_VALUES, Length, Value, constant_values, evaluate, sliced

MULTIPLE = 8
SIZES = {"h": 5 * MULTIPLE, "w": 12 * MULTIPLE}  # one of the sizes that there are
H, W = (Length(side, Fraction(1)) for side in "hw")


def values(*given: Any) -> list[Value]:
    return [Fraction(one) if isinstance(one, (int, float, str)) else one for one in given]


def number(value: Value) -> Fraction | None:
    """What it is in an image of `SIZES`."""
    return value.times * SIZES[value.side] + value.extra if isinstance(value, Length) else value


def found(operator: str, *inputs: Any, whole: bool = False, rounds: bool = False) -> list[Value] | None:
    names = [f"i{index}" for index in range(len(inputs))]
    return evaluate(helper.make_node(operator, names, ["o"]), inputs, MULTIPLE, whole, rounds)


OPERANDS = [
    *values(0, 1, 3, 8, -2, "1/2"), H, W, Length("h", Fraction(1, 2)), Length("h", Fraction(-1), Fraction(3)),
    Length("w", Fraction(1, 8), Fraction(-1)), Length("h", Fraction(2), Fraction(1)), Length("w", Fraction(1, 16)),
]  # fmt: skip
EXACTLY = {
    "Add": lambda a, b: a + b,
    "Sub": lambda a, b: a - b,
    "Mul": lambda a, b: a * b,
    "Div": lambda a, b: a / b,
}


@pytest.mark.parametrize("operator", EXACTLY)
def test_what_is_known_is_right(operator: str) -> None:
    known = 0
    for a in OPERANDS:
        for b in OPERANDS:
            (result,) = found(operator, [a], [b]) or []
            if result is not None:
                assert number(result) == EXACTLY[operator](number(a), number(b))
                known += 1
        assert found(operator, [a], [None]) == found(operator, [None], [a]) == [None]
    assert known == {"Add": 145, "Sub": 145, "Mul": 120, "Div": 53}[operator]  # all but two sides, squares, parts of 1


def test_whole_numbers_are_divided_as_engines_do() -> None:
    """Rounded down, and left open where that depends on the size."""
    known = 0
    for a in OPERANDS:
        if (number(a) or 0) < 0 or number(a) != int(number(a) or 0):
            continue
        for b in values(1, 2, 3, 4, 8, 16):
            (result,) = found("Div", [a], [b], whole=True) or []
            if result is not None:
                assert number(result) == math.floor((number(a) or 0) / b)  # type: ignore[operator]
                known += 1
    assert known == 41
    for divisor in (0, -2):
        assert found("Div", [H], values(divisor), whole=True) == [None]
    assert found("Div", [Length("h", Fraction(1), Fraction(7))], values(8), whole=True) == [Length("h", Fraction(1, 8))]
    assert found("Div", [H], values(16), whole=True) == [None]
    assert found("Div", values(7), values(2), whole=True) == values(3)
    assert found("Div", values(7), values(2)) == [None]  # a length that is none is not kept
    assert found("Div", values(7), [H]) == found("Div", values(7), [H], whole=True) == [None]
    assert found("Sub", [H], [H]) == values(0)  # no side's any more
    assert found("Mul", [H], [H]) == [None]
    assert found("Add", [H], [W]) == [None]


@pytest.mark.parametrize("operator", ["Floor", "Ceil", "Round", "Cast"])
def test_rounding_keeps_what_is_whole_for_all_sizes(operator: str) -> None:
    eighth, sixteenth = (Length("h", Fraction(1, part)) for part in (8, 16))
    odd = H._replace(extra=Fraction(1, 2))
    given = [H, eighth, sixteenth, odd, *values(3, "3/2"), None]
    assert found(operator, given, rounds=True) == [H, eighth, None, None, Fraction(3), None, None]
    if operator == "Cast":
        assert found(operator, given) == given


def test_lists_are_joined_taken_apart_and_combined() -> None:
    two = values(1, 2)
    for operator in ("Identity", "Squeeze", "Unsqueeze", "Reshape"):
        assert found(operator, [H, W], two) == [H, W]
    assert found("Concat", [H], two, [None]) == [H, *two, None]
    assert found("Gather", [H, W, None], values(1, -3, 2)) == [W, H, None]
    assert found("Gather", [H, W], values(2, -3, "1/2")) == [None, None, None]
    assert found("Gather", [H, W], [None]) == [None]
    assert found("Slice", [H, W, *two], values(1), values(3)) == [W, two[0]]
    assert found("Slice", [H, W, *two], values(0), values(4), values(0), values(2)) == [H, two[0]]
    assert found("Slice", [H, W, *two], values(-2), values(9), values(-1)) == two
    for bounds in (([None], values(3)), ([H], values(3)), (values(0, 1), values(3)), (values(0), values(3), values(1))):
        assert found("Slice", [H, W, *two], *bounds) is None
    assert found("Add", [H, W], values(1)) == [H._replace(extra=Fraction(1)), W._replace(extra=Fraction(1))]
    assert found("Mul", values(2), [H, W]) == [H._replace(times=Fraction(2)), W._replace(times=Fraction(2))]
    assert found("Add", [H, W], values(1, 2, 3)) is None
    assert found("Add", [H, W], None) is None
    assert found("Neg", [H]) is None
    assert sliced([None, Fraction(3), H, W], {"start": 1, "end": 3}) == [Fraction(3), H]
    assert sliced([None, Fraction(3), H, W], {}) == [None, Fraction(3), H, W]


def test_constants_that_are_no_lists_of_numbers_are_not_followed() -> None:
    assert constant_values(np.array([1, -2])) == values(1, -2)
    assert constant_values(np.float32(0.5)) == values("1/2")
    assert constant_values(np.zeros(MAX_VALUES)) == [Fraction(0)] * MAX_VALUES
    for other in (np.zeros(MAX_VALUES + 1), np.zeros((1, 1)), np.array([np.nan]), np.array([np.inf]), np.array([True])):
        assert constant_values(other) is None
