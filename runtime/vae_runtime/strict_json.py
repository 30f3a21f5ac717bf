"""JSON that is read strictly, and written so that equal data are equal bytes, with a digest of the whole text in it.

The digest is the SHA-256 of the text as it is when the digest's 64 digits are zeros.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

_MAX_DEPTH = 64  # of objects and lists in each other, which what shows them goes down
_NO_DIGEST = "0" * 64


def parse_json(text: bytes) -> Any:
    """The value of a JSON text in UTF-8.

    Raises:
        ValueError, RecursionError: it is none, or not every reader would take it for the same: a key appears twice, or
        there is NaN, a number beyond float64, half of a surrogate pair, or objects and lists are nested too deep.
    """
    data = json.loads(text.decode(), parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)
    if _depth([data]) > _MAX_DEPTH + 1:
        raise ValueError(f"it is nested more than {_MAX_DEPTH} levels deep")
    json.dumps(data, ensure_ascii=False, allow_nan=False).encode()  # no 1e999, no half of a surrogate pair
    return data


def to_signed_json(data: Mapping[str, Any], key: str) -> bytes:
    """UTF-8, keys sorted, indent 2, final newline, no NaN. key: of the digest."""
    text = json.dumps({**data, key: _NO_DIGEST}, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    digest = hashlib.sha256(text.encode()).hexdigest()
    return text.replace(_digest_line(key, _NO_DIGEST), _digest_line(key, digest)).encode()


def is_unaltered(text: bytes, key: str, digest: Any) -> bool:
    """Whether a text of `to_signed_json` has this digest, which it says under `key`."""
    line = _digest_line(key, str(digest)).encode()
    zeroed = text.replace(line, _digest_line(key, _NO_DIGEST).encode())
    return text.count(line) == 1 and hashlib.sha256(zeroed).hexdigest() == digest


def _digest_line(key: str, digest: str) -> str:
    return f'\n  "{key}": "{digest}"'


def _depth(value: Any) -> int:
    parts = value.values() if isinstance(value, dict) else value
    return 1 + max((_depth(one) for one in parts if isinstance(one, (dict, list))), default=0)


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not a JSON number")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data: dict[str, Any] = {}
    for key, value in pairs:
        if key in data:
            raise ValueError(f"the key {key!r} appears twice")
        data[key] = value
    return data
