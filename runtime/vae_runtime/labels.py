"""Labels from files, for the command line that evaluates scores."""

from __future__ import annotations

import csv
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import InputError
from .images import PICTURE_SUFFIXES
from .sources import LABEL_KEYS, choose_array

SUFFIXES = (".npy", ".npz", ".csv", ".txt")
_ROW = re.compile(r".*#\d+")  # of an array file
_SHOWN = 10  # of the labels that a file has, in a message


def read_labels(path: str, anomaly_labels: Sequence[str] = (), names: Sequence[str] = ()) -> NDArray[np.bool_]:
    """Which examples are anomalies, in the file's order -> bool (N,).

    anomaly_labels: those that mean an anomaly; none: 1 does, and 0 means that it is none. names: of the examples; a
    column `name` of a .csv has them in the same order, but for suffixes and for folders that are not needed to tell
    them apart, or names of somebody else's where the examples are rows of an array.

    Raises:
        InputError: the file cannot be read, has no labels that are understood, not those that are asked for, or those
        of other examples, or of these in another order.
    """
    labels = _read(Path(path), names)
    wanted = set(anomaly_labels) or {"1"}
    there = sorted(set(labels), key=lambda label: (len(label), label))
    if not anomaly_labels and not set(there) <= {"0", "1"}:
        other = next(label for label in there if label not in ("0", "1"))
        raise InputError(
            f"{path} has the label {other!r}; expected 1 for an anomaly and 0 for none, or --anomaly-label to say which"
            " are"
        )
    if absent := sorted(wanted - set(there)) if anomaly_labels else []:
        raise InputError(f"{path} has no label {absent[0]!r}; it has {', '.join(there[:_SHOWN])}")
    return np.array([label in wanted for label in labels], bool)


def _read(path: Path, names: Sequence[str]) -> list[str]:
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise InputError(f"{path} has the suffix {suffix!r}; labels are read from {', '.join(SUFFIXES)}")
    try:
        if suffix == ".txt":
            return [line.strip() for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
        if suffix == ".csv":
            return _column(path, names)
        return _texts(_array(path), path)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except InputError:
        raise
    except Exception as error:  # a damaged file raises nearly anything
        raise InputError(f"{path} cannot be read as labels: {error}") from None


def _column(path: Path, names: Sequence[str]) -> list[str]:
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:  # names of any bytes
        rows = [[cell.strip() for cell in row] for row in csv.reader(stream) if row]
    if not rows:
        return []
    head = [cell.lower() for cell in rows[0]]
    for heading in ("label", "name"):
        if (count := head.count(heading)) > 1:
            raise InputError(f"{path} has {count} columns with the heading {heading!r}; expected one")
    if "label" in head:
        rows = rows[1:]
        place = head.index("label")
        if "name" in head:
            column = head.index("name")
            _check_order(path, [row[column] if column < len(row) else "" for row in rows], names)
    elif len(rows[0]) == 1:
        place = 0
    else:
        raise InputError(f"{path} has the columns {', '.join(rows[0])}; expected one with the heading 'label', or one")
    return [row[place] if place < len(row) else "" for row in rows]


def _check_order(path: Path, found: Sequence[str], names: Sequence[str]) -> None:
    """Raise where a row is of another example; names of an array's rows are nobody's, and may be others in the file.

    Folders count as far as they tell the examples apart, and the file has them: it may come from another place.
    """
    theirs, ours = ([_parts(name) for name in some] for some in (found, names))
    if len(set(ours)) < len(set(names)):  # a.png and a.jpg
        theirs, ours = ([_parts(name, ()) for name in some] for some in (found, names))
    last = ({parts[-1] for parts in some} for some in (theirs, ours))
    if all(_ROW.fullmatch(name) for name in names) and set.isdisjoint(*last):
        return
    longest = max(map(len, ours))
    depth = next((n for n in range(1, longest) if len({parts[-n:] for parts in ours}) == len(ours)), longest)
    for index, (row, example) in enumerate(zip(theirs, ours, strict=False)):  # how many there are is compared later
        common = min(depth, len(row), len(example))
        if row[-common:] != example[-common:]:
            row_name, name = ("/".join(_parts(one, ())[-common:]) for one in (found[index], names[index]))
            rule = "its rows are expected in their order"
            raise InputError(f"{path} has {row_name} where the inputs have {name}; {rule}")


def _parts(name: str, suffixes: tuple[str, ...] = PICTURE_SUFFIXES) -> tuple[str, ...]:
    """Folders and name, by the separators of any system, without one of the suffixes; é composed, as not every system
    lists it."""
    path = PureWindowsPath(unicodedata.normalize("NFC", name))  # takes both separators
    return (*path.parts[:-1], path.stem if path.suffix.lower() in suffixes else path.name)


def _array(path: Path) -> NDArray[Any]:
    loaded = np.load(path, allow_pickle=False)
    if isinstance(loaded, np.ndarray):
        return loaded
    with loaded as archive:
        return np.asarray(archive[choose_array(path, archive.files, LABEL_KEYS)])


def _texts(labels: NDArray[Any], path: Path) -> list[str]:
    """Whole numbers, however they are stored, as they are written."""
    whole = labels.dtype.kind in "biu" or (labels.dtype.kind == "f" and bool((labels == np.floor(labels)).all()))
    if labels.ndim != 1 or not (whole or labels.dtype.kind == "U"):
        rule = "expected whole numbers or texts, (N,)"
        raise InputError(f"{path} has labels of shape {labels.shape} and dtype {labels.dtype}; {rule}")
    return [str(int(label)) if whole else str(label) for label in labels.tolist()]
