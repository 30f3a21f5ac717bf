"""Where a warning belongs: to the line of whoever called the library, however deep in it the warning is raised."""

from __future__ import annotations

import sys


def level_outside(*packages: str) -> int:
    """The `stacklevel` for `warnings.warn`, where it is called, of the nearest caller outside these packages; of the
    outermost one where there is no other."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in packages:
        frame, level = frame.f_back, level + 1
    return level
