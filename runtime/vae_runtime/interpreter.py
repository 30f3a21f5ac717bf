"""Other processes of this Python, for what is measured in processes of its own."""

from __future__ import annotations

import sys

from .errors import InputError


def interpreter(purpose: str) -> list[str]:
    """The command that starts one, but for what it is to run; modules of the current folder are not found there.

    Raises:
        InputError: this program is no interpreter, as what PyInstaller makes is none. purpose: with what it begins.
    """
    if getattr(sys, "frozen", False):
        raise InputError(
            f"{purpose} starts Python processes, and {sys.executable} is no Python interpreter; do it in an ordinary"
            " installation"
        )
    return [sys.executable, "-P"]
