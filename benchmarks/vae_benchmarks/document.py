"""Dataclasses as JSON documents: a format's name and version first, then the dataclass as plain values."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from vae_runtime.errors import InputError

from .errors import ReportError
from .plain import from_plain

_MAX_BYTES = 256 * 2**20
# Of a time or a size in its unit: what lies outside was not measured, and ratios of it need not be finite.
LEAST, _MOST = 1e-9, 1e15
_Kind = TypeVar("_Kind")


def from_document(kind: type[_Kind], document: Any, name: str, form: str, version: int, what: str) -> _Kind:
    """A dataclass of type `kind` from its JSON document. name: what a message calls it. what: "a report of vae-bench",
    for one.

    Raises:
        ReportError: it is not one of format `form` in this version.
    """
    if not isinstance(document, dict) or document.get("format") != form:
        raise ReportError(f'{name} is not {what}, whose "format" is {form!r}')
    found = document.get("format_version")
    if type(found) is not int or found != version:  # true is 1 in Python
        raise ReportError(f"{name} has format_version {found!r}; this vae-edge reads version {version}")
    try:
        return from_plain(kind, document, name)
    except InputError as error:
        raise ReportError(f"{name} has settings that cannot be: {error}") from None


def load_document(path: str | os.PathLike[str], what: str) -> Any:
    """Read the JSON document in a file. what: as in `from_document`.

    Raises:
        ReportError: the file cannot be read, or is not JSON.
    """
    try:
        with Path(path).open("rb") as stream:
            data = stream.read(_MAX_BYTES)
    except OSError as error:
        raise ReportError(f"{path} cannot be read: {error.strerror or error}") from None
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise ReportError(f"{path} is not JSON; expected {what}") from None


def require_measured(values: Iterable[float], what: str) -> None:
    """Raise `ReportError` unless every value is one that can have been measured. what: it, as a message calls it."""
    for value in values:
        if not LEAST <= value <= _MOST:
            raise ReportError(f"{what} is {value:g}; expected from {LEAST:g} to {_MOST:g}")
