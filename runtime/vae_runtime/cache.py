"""The folder for what can be made again: measurements of this machine, engines built for its GPU."""

from __future__ import annotations

import os
import secrets
import sys
from pathlib import Path

from .errors import OutputError

_CURE = "set VAE_EDGE_CACHE to a folder that can be written to"


def cache_folder() -> Path:
    """Where it is, or would be: the folder that the environment variable VAE_EDGE_CACHE names, else the user's.

    Raises:
        OutputError: the variable is not set, and this user has no home folder.
    """
    if folder := os.environ.get("VAE_EDGE_CACHE"):
        return Path(folder)
    try:
        return _user_cache_folder() / "vae-edge"
    except RuntimeError:  # as in a container, under a user that the system does not know
        raise OutputError(f"this user has no home folder; {_CURE}") from None


def make_cache_folder(*parts: str) -> Path:
    """A folder in it, there and writable, or an `OutputError`."""
    folder = cache_folder().joinpath(*parts)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder} cannot be made: {error.strerror}; {_CURE}") from None
    probe = folder / f".{secrets.token_hex(4)}.part"
    try:  # os.access knows nothing of Windows' permissions, nor of a file system that is read-only or full
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OutputError(f"{folder} cannot be written to: {error.strerror}; {_CURE}") from None
    return folder


def _user_cache_folder() -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
