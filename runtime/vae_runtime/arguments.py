"""What arguments of the public functions may be, where several functions take the same kind."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Collection
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from .errors import InputError

# By the machine's cores, not those that this process may use, and enough for what is told of other machines.
_MOST_THREADS = max(256, 4 * (os.cpu_count() or 1))


def check_count(value: Any, name: str, least: int = 1, most: int | None = None) -> int:
    """A whole number from `least`, and to `most` where that is given."""
    if not _is_count(value, least, most):
        rule = f"from {least}" if most is None else f"from {least} to {most}"
        raise InputError(f"{name} is {value!r}; expected a whole number {rule}")
    return int(value)


def _is_count(value: Any, least: int, most: int | None) -> bool:
    is_whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    return is_whole and value >= least and (most is None or value <= most)


def check_number(value: Any, name: str, above: float | None = None, least: float | None = None) -> float:
    """A finite number, above `above` or from `least` where one is given; numpy's are numbers too."""
    number = as_float(value)
    fits = math.isfinite(number) and (above is None or number > above) and (least is None or number >= least)
    if not fits:
        rule = "" if above is None else f" above {above:g}"
        rule += "" if least is None else f" from {least:g}"
        raise InputError(f"{name} is {value!r}; expected a finite number{rule}")
    return number


def as_float(value: Any) -> float:
    """A number in Python's own precision; NaN for anything else."""
    if isinstance(value, Real) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):
            return float(value)
    return math.nan


def check_path(value: Any, name: str) -> Path:
    """The name of a folder, which need not be there."""
    text = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
    if not isinstance(text, str):
        raise InputError(f"{name} is {value!r}; expected a str or an os.PathLike of one, the name of a folder")
    if not text or "\0" in text:
        raise InputError(f"{name} is {text!r}; expected the name of a folder, with a character and without a null one")
    if not is_encodable(text):
        raise InputError(f"{name} is {text!r}; expected the name of a folder, of characters that names have")
    return Path(value)


def is_encodable(name: str) -> bool:
    """Whether a file can have this name, by its characters."""
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return True


def check_progress(value: Any) -> None:
    """A function, or None."""
    if value is not None and not callable(value):
        raise InputError(f"progress is {value!r}; expected a function, progress(done, total), or None")


def check_flag(value: Any, name: str) -> bool:
    """True or False."""
    if not isinstance(value, (bool, np.bool_)):
        raise InputError(f"{name} is {value!r}; expected True or False")
    return bool(value)


def check_choice(value: Any, name: str, allowed: Collection[str]) -> str:
    """One of a few words."""
    if not isinstance(value, str) or value not in allowed:
        raise InputError(f"{name} is {value!r}; expected one of {', '.join(allowed)}")
    return value


def check_threads(threads: Any) -> int | None:
    """`threads` as onnxruntime takes it: a whole number from 1, or None for its own choice."""
    if threads is None:
        return None
    if not _is_count(threads, 1, _MOST_THREADS):
        raise InputError(
            f"threads is {threads!r}; expected a whole number from 1 to {_MOST_THREADS} (4 for each core of the"
            " machine, or 256), or None for onnxruntime's own choice"
        )
    return int(threads)
