"""Which rows of two reports are compared: the same ones, or those that differ as the reports do, in one thing alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .report import Report, RowKey

AXES = ("threads", "device", "precision", "input")

Value = str | int | None


@dataclass(frozen=True)
class Difference:
    """Of `axis`, every row of one report has the value `a`, and every row of the other has `b`. None: auto threads."""

    axis: str
    a: Value
    b: Value

    def __str__(self) -> str:
        return f"{self.axis}: A {_show(self.a)}, B {_show(self.b)}"


@dataclass(frozen=True)
class Pairing:
    """differs: see `Difference`; `pairs` goes across it where it is one, and is empty where there are several. sizes:
    (height, width) of the images of A and B, where they are different ones, of which no rows are the same."""

    pairs: tuple[tuple[RowKey, RowKey], ...]
    only_in_a: tuple[RowKey, ...]
    only_in_b: tuple[RowKey, ...]
    differs: tuple[Difference, ...]
    sizes: tuple[tuple[int, ...], tuple[int, ...]] | None = None


def pair_rows(a: Report, b: Report) -> Pairing:
    """Across a difference only where each report has a single value: else it would be open which of them is meant."""
    keys_a, keys_b = ([row.key for row in report.latency] for report in (a, b))
    differs = []
    for axis in AXES:
        values_a, values_b = _values(keys_a, axis), _values(keys_b, axis)
        if len(values_a) == len(values_b) == 1 and values_a != values_b:
            differs.append(Difference(axis, *values_a, *values_b))
    sizes = a.image_size, b.image_size
    if sizes[0] is not None and sizes[1] is not None and sizes[0] != sizes[1]:
        return Pairing((), tuple(keys_a), tuple(keys_b), tuple(differs), (sizes[0], sizes[1]))
    ignored: dict[str, Any] = {differs[0].axis: None} if len(differs) == 1 else {}
    found_b = {key._replace(**ignored): key for key in keys_b}
    pairs = [(key, found_b[alike]) for key in keys_a if (alike := key._replace(**ignored)) in found_b]
    paired = {key for pair in pairs for key in pair}
    only_a, only_b = (tuple(key for key in keys if key not in paired) for keys in (keys_a, keys_b))
    return Pairing(tuple(pairs), only_a, only_b, tuple(differs))


def why_no_pair(pairing: Pairing) -> str:
    """In words, where there is none."""
    if pairing.sizes is not None:
        one, other = ("{}x{}".format(*size) for size in pairing.sizes)
        return f"no row is in both reports: the images of A are of {one}, those of B of {other}"
    sides = pairing.only_in_a, pairing.only_in_b
    apart = []
    for axis in RowKey._fields:
        a, b = (_values(keys, axis) for keys in sides)
        if a and b and not set(a) & set(b):
            apart.append((axis, f"{axis} (A {' and '.join(map(_show, a))}, B {' and '.join(map(_show, b))})"))
    reason = "no row is in both reports"
    if apart:
        reason += f", which differ in {', '.join(words for _, words in apart)}"
    if any(axis in AXES for axis, _ in apart):
        reason += (
            f"; rows are matched across a difference in one of {', '.join(AXES)} alone, where each report has a single"
            " value of it"
        )
    return reason


def describe_row(key: RowKey, differs: Sequence[Difference] = ()) -> str:
    """A row of A, or of one report only, in words. differs: across what it is compared."""
    shown = {axis: _show(getattr(key, axis)) for axis in AXES}
    for found in differs:
        shown[found.axis] += f" -> {_show(found.b)}"
    what = key.operation if key.input is None else f"{key.operation} of {shown['input']}"
    return f"{what}, batch {key.batch}, threads {shown['threads']}, {shown['device']}, {shown['precision']}"


def _values(keys: Iterable[RowKey], axis: str) -> list[Value]:
    """Each once; the input of rows that take none is no value."""
    return list(dict.fromkeys(getattr(key, axis) for key in keys if axis != "input" or key.input is not None))


def _show(value: Value) -> str:
    return "auto" if value is None else str(value)
