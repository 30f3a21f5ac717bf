"""What arguments of the public functions may be, where several functions take the same kind."""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import Any

import numpy as np

from .errors import InputError

# By the machine's cores, not those that this process may use, and enough for what is told of other machines.
_MOST_THREADS = max(256, 4 * (os.cpu_count() or 1))


def check_count(value: Any, name: str, least: int = 1) -> int:
    """A whole number from `least`."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise InputError(f"{name} is {value!r}; expected a whole number from {least}")
    return int(value)


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
    if isinstance(threads, bool) or not isinstance(threads, (int, np.integer)) or not 1 <= threads <= _MOST_THREADS:
        raise InputError(
            f"threads is {threads!r}; expected a whole number from 1 to {_MOST_THREADS} (4 for each core of the"
            " machine, or 256), or None for onnxruntime's own choice"
        )
    return int(threads)
