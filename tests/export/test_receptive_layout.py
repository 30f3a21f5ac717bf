"""What Reshape does to height and width: a window alone must show all that it mixes."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest

from vae_export.receptive.axis import Axis
from vae_export.receptive.layout import reshaped
from vae_export.receptive.shapes import Length

H, W = (Axis(side, Fraction(1), 0) for side in "hw")
IMAGE = (None, 4, H, W)


def of(side: str, times: Any = 1, extra: int = 0) -> Length:
    return Length(side, Fraction(times), Fraction(extra))


def described(axes: Any) -> list[Any]:
    return [(axis.side, axis.scale, axis.extra) if isinstance(axis, Axis) else axis for axis in axes]


HALF_H, HALF_W = ((side, Fraction(2), 0) for side in "hw")
WHOLE_H, WHOLE_W = ((side, Fraction(1), 0) for side in "hw")


@pytest.mark.parametrize(
    ("axes", "target", "allow_zero", "expected"),
    [
        (IMAGE, [None, 4, of("h"), of("w")], False, [None, 4, WHOLE_H, WHOLE_W]),
        (IMAGE, [0, 0, of("h"), of("w")], False, [None, 4, WHOLE_H, WHOLE_W]),
        (IMAGE, [0, 0, 0, 0], False, [None, 4, WHOLE_H, WHOLE_W]),
        (IMAGE, [None, 2, 2, of("h"), of("w")], False, [None, 2, 2, WHOLE_H, WHOLE_W]),
        (IMAGE, [0, 4, of("h"), of("w")], True, [None, 4, WHOLE_H, WHOLE_W]),
        (IMAGE, [None, 4, of("h", "1/2"), 2, of("w", "1/2"), 2], False, [None, 4, HALF_H, 2, HALF_W, 2]),
        ((None, 4, H, 3, W), [None, 4, of("h"), 3, of("w")], False, [None, 4, WHOLE_H, 3, WHOLE_W]),
        ((None, 4, H, 3, W, 5), [0, 0, 0, 0, 0, 5], False, [None, 4, WHOLE_H, 3, WHOLE_W, 5]),
    ],
)
def test_positions_that_stay_or_are_split(axes: Any, target: Any, allow_zero: bool, expected: Any) -> None:
    found = reshaped(axes, [Fraction(size) if isinstance(size, int) else size for size in target], allow_zero)
    assert described(found) == expected


def test_positions_that_are_merged_again() -> None:
    """Two cells along each side for one position, as PixelShuffle has it."""
    found = reshaped((None, 4, H, 2, W, 2), [None, Fraction(4), of("h", 2), of("w", 2)], False)
    assert described(found) == [None, 4, ("h", Fraction(1, 2), 0), ("w", Fraction(1, 2), 0)]
    smaller = Axis("h", Fraction(2), 1)  # N / 2 + 1 positions
    found = reshaped((None, 4, smaller, 2, W, 2), [None, Fraction(4), of("h", 1, 2), of("w", 2)], False)
    assert described(found) == [None, 4, ("h", Fraction(1), 2), ("w", Fraction(1, 2), 0)]


@pytest.mark.parametrize(
    ("axes", "target", "allow_zero"),
    [
        (IMAGE, [None, 4, None], False),  # one axis of all positions
        (IMAGE, [None, of("h", 4), of("w")], False),  # channels along the height
        (IMAGE, [None, 4, of("w"), of("h")], False),  # as many positions, in another order
        (IMAGE, [None, 4, of("h", "1/2"), 3, of("w", "1/2"), 2], False),
        (IMAGE, [None, 4, of("h", "1/2"), of("w", 2)], False),  # half as high, twice as wide
        (IMAGE, [None, 4, of("h", "3/2"), of("w")], False),
        ((None, 4, H, 1, W), [None, 4, of("h", "3/2"), of("w")], False),
        ((None, 4, H, 2, W, 2), [None, 4, of("h", 4), of("w", 2)], False),
        ((None, 4, H, 3, W, 2), [None, 4, of("h", 2), of("w", 2)], False),
        (IMAGE, [None, 4, of("h", 1, 1), of("w")], False),  # one row more
        (IMAGE, [None, 2, of("h"), 2, of("w")], False),  # channels between the sides
        (IMAGE, [None, 2, of("h"), of("w"), 2], False),  # and behind them
        ((None, 4, H, 3, W), [None, 4, of("h"), of("w"), 3], False),
        ((None, 4, H, None, W), [None, 4, of("h"), None, of("w")], False),  # nobody knows
        ((None, 4, H, 3, W, 5), [0, 0, of("h"), 3, of("w"), 0], True),  # 0 is no size here
        (IMAGE, [None, 4, of("h"), of("w"), 0], False),  # of which there is no input's
    ],
)
def test_what_mixes_positions_or_cannot_be_told_is_not_followed(axes: Any, target: Any, allow_zero: bool) -> None:
    assert reshaped(axes, [Fraction(size) if isinstance(size, int) else size for size in target], allow_zero) is None
