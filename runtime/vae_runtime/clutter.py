"""What file managers leave in the folders that they show, which is nobody's content."""

from __future__ import annotations

_NAMES = {".DS_Store", "Thumbs.db", "desktop.ini"}


def is_clutter(name: str) -> bool:
    """Whether macOS or Windows writes a file of this name unasked; `._name` is what macOS adds to `name` on foreign
    disks."""
    return name in _NAMES or name.startswith("._")
