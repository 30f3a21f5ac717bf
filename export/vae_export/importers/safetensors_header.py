"""What a safetensors file holds, by its header alone: without the library, and without reading a tensor."""

from __future__ import annotations

import json
import struct
from pathlib import Path

MAX_HEADER_BYTES = 100_000_000  # by its specification


def is_safetensors(path: Path) -> bool:
    """Its first 8 bytes are the size of a JSON object that follows."""
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        start = stream.read(9)
    return len(start) == 9 and struct.unpack("<Q", start[:8])[0] <= MAX_HEADER_BYTES and start[8:] == b"{"


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor; of what is no such file, or a damaged one, none."""
    try:
        if not is_safetensors(path):
            return {}
        with path.open("rb") as stream:
            (size,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(size))
        return {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return {}
