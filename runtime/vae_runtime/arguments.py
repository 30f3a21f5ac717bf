"""What arguments of the public functions may be, where several functions take the same kind."""

from __future__ import annotations

import math
import os
from collections.abc import Collection
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


def check_positive(value: Any, name: str) -> None:
    """A finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise InputError(f"{name} is {value!r}; expected a finite number above 0")


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
