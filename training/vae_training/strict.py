"""Dataclasses from plain dicts, strictly: an unknown key, a missing one or a wrong type is an error, never ignored."""

from __future__ import annotations

import dataclasses
import math
import numbers
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from vae_runtime.errors import InputError

T = TypeVar("T")
_NUMBERS = {int: numbers.Integral, float: numbers.Real}  # as which NumPy's count too


def from_dict(cls: type[T], data: Any, name: str) -> T:
    """Build the dataclass `cls` from `data`; lists become tuples where the field is one.

    Raises:
        InputError: naming `name`.key, the value and the rule. What `cls.__post_init__` raises passes through.
    """
    if not isinstance(data, Mapping):
        raise InputError(f"{name} is a {type(data).__name__}; expected a dict")
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in data:
        if key not in fields:
            raise InputError(f"{name} has the unknown key {key!r}; expected {', '.join(fields)}")
    for key, field in fields.items():
        if key not in data and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise InputError(f"{name}.{key} is missing")
    hints = typing.get_type_hints(cls)
    return cls(**{key: _convert(value, hints[key], f"{name}.{key}") for key, value in data.items()})


def settle(instance: Any) -> None:
    """Hold the fields of a frozen dataclass to their types, as `from_dict` does, where it is built by hand: in its
    `__post_init__`. Numbers of NumPy become Python's, lists tuples where the field is one.

    Raises:
        InputError: naming the field, the value and the rule.
    """
    hints = typing.get_type_hints(type(instance))
    for field in dataclasses.fields(instance):
        object.__setattr__(instance, field.name, _convert(getattr(instance, field.name), hints[field.name], field.name))


def to_dict(instance: Any) -> dict[str, Any]:
    """The fields of a flat dataclass as JSON-like data; tuples become lists."""
    values = {field.name: getattr(instance, field.name) for field in dataclasses.fields(instance)}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def within(value: float | None, low: float, high: float, name: str) -> None:
    """Raise `InputError` unless low <= value <= high; None, "not given", passes."""
    if value is not None and not low <= value <= high:
        raise InputError(f"{name} is {value!r}; expected from {low:g} to {high:g}")


def _convert(value: Any, hint: Any, name: str) -> Any:
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, (list, tuple)):
            raise InputError(f"{name} is {value!r}; expected a list")
        return tuple(_convert(item, typing.get_args(hint)[0], name) for item in value)
    if hint in (int, float) and not isinstance(value, bool) and isinstance(value, _NUMBERS[hint]):
        value = hint(value)
    if type(value) is not hint or (hint is float and not math.isfinite(value)):
        expected = {int: "a whole number", float: "a finite number", str: "a string", bool: "true or false"}[hint]
        raise InputError(f"{name} is {value!r}; expected {expected}")
    return value
