"""Dataclasses from plain JSON values, checked against their annotations; `dataclasses.asdict` is the way back."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from vae_runtime.json_fields import is_number

from .errors import ReportError

_Kind = TypeVar("_Kind")


def from_plain(kind: type[_Kind], value: Any, where: str) -> _Kind:
    """A dataclass of type `kind` from a JSON object. Unknown keys are ignored, and those with a default may be missing,
    so that the format can grow.

    Raises:
        ReportError: another key is missing or its value has another type; the message calls the object `where`.
    """
    if not isinstance(value, Mapping):
        raise ReportError(f"{where} is {_short(value)}; expected an object")
    hints = get_type_hints(kind)
    fields = {}
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        if field.name not in value and field.default is not dataclasses.MISSING:
            continue
        if field.name not in value:
            raise ReportError(f"{where} has no {field.name!r}")
        fields[field.name] = _convert(hints[field.name], value[field.name], f"{where}.{field.name}")
    return kind(**fields)


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return from_plain(hint, value, where)  # type: ignore[arg-type]
    if origin is types.UnionType:  # the only unions here are with None
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return None if value is None else _convert(inner, value, where)
    if origin is tuple:
        _require(isinstance(value, (list, tuple)), value, where, "a list")
        return tuple(_convert(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if origin is dict:
        _require(isinstance(value, Mapping), value, where, "an object")
        return {str(key): _convert(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    return _scalar(hint, value, where)


def _scalar(hint: type, value: Any, where: str) -> Any:
    if hint is float:
        _require(is_number(value), value, where, "a finite number")
        return float(value)
    names = {int: "a whole number", str: "a string", bool: "true or false"}
    _require(isinstance(value, hint) and (hint is bool or not isinstance(value, bool)), value, where, names[hint])
    return value


def _require(fits: bool, value: Any, where: str, rule: str) -> None:
    if not fits:
        raise ReportError(f"{where} is {_short(value)}; expected {rule}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
