"""Values of a JSON object, checked: each is of the kind that is expected, or a `BundleError` names its place."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any, TypeGuard

from .errors import BundleError

MAX_ELEMENTS = 2**31  # of one example; more is no edge model but a damaged or hostile manifest

Shape = tuple[int | None, ...]  # without the batch; None: any size


def _last(path: str) -> str:
    return path.rsplit(".", 1)[-1]


def mapping(data: Mapping[str, Any], path: str, key: str | None = None) -> Mapping[str, Any]:
    """An object; path: its place, for the message; key: where it is not the last part of that."""
    value = data.get(key if key is not None else _last(path))
    if not isinstance(value, Mapping):
        raise BundleError(f"{path} is {value!r}; expected a JSON object")
    return value


def one_of(data: Mapping[str, Any], path: str, allowed: tuple[str, ...]) -> str:
    """A string of a few that are allowed."""
    value = data.get(_last(path))
    if not isinstance(value, str) or value not in allowed:
        raise BundleError(f"{path} is {value!r}; expected one of {', '.join(allowed)}")
    return value


def number(data: Mapping[str, Any], path: str, key: str | None = None) -> float:
    """A finite number, as a float."""
    value = data.get(key if key is not None else _last(path))
    if not is_number(value):
        raise BundleError(f"{path} is {value!r}; expected a finite number")
    return float(value)


def count(data: Mapping[str, Any], path: str, least: int = 1) -> int:
    """A whole number from `least`."""
    value = data.get(_last(path))
    if not is_count(value) or value < least:
        raise BundleError(f"{path} is {value!r}; expected a whole number from {least}")
    return value


def text(data: Mapping[str, Any], path: str) -> str:
    """A string."""
    value = data.get(_last(path))
    if not isinstance(value, str):
        raise BundleError(f"{path} is {value!r}; expected a string")
    return value


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a finite number, and no boolean."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def is_count(value: Any) -> TypeGuard[int]:
    """Whether a value is a whole number from 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def holds(value: Any, kind: type) -> bool:
    """Whether a value is an object with values of this kind alone."""
    return isinstance(value, dict) and all(isinstance(entry, kind) for entry in value.values())


def shape_of(data: Mapping[str, Any], path: str, rank: int | None) -> Shape:
    """A shape of positive sides, of this rank if one is given; of three sides the last two may be null, for free."""
    value: Any = data.get(_last(path))
    sides: Any = value
    free: tuple[None, ...] = ()
    if isinstance(value, list) and value[1:] == [None, None]:
        sides, free = value[:1], (None, None)  # (C, H, W), height and width free
    if (
        not isinstance(sides, list)
        or not sides
        or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in sides)
        or (rank is not None and len(sides) + len(free) != rank)
    ):
        raise BundleError(f"{path} is {value!r}; expected a list of {rank or 'one or more'} positive whole numbers")
    if math.prod(sides) >= MAX_ELEMENTS:
        raise BundleError(f"{path} is {value!r}, {math.prod(sides)} elements; at most {MAX_ELEMENTS - 1} are allowed")
    return (*sides, *free)
