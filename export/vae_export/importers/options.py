"""What an importer's user may say, and the small JSON files that say the rest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vae_runtime.errors import CheckpointError, InputError

from ..imported import ImportOptions

_FLAGS = {
    "weights": "--weights",
    "trust_pickle": "--trust-pickle",
    "kind": "--kind",
    "input_shape": "--input",
    "multiple_of": "--multiple-of",
    "input_range": "--input-range",
    "latent_scale": "--latent-scale",
    "latent_shift": "--latent-shift",
}
_MAX_JSON = 2**20


def refuse_options(options: ImportOptions, why: str, *names: str) -> None:
    """Raises: InputError: one of these options was given; `why` ends the sentence."""
    for name in names:
        value = getattr(options, name)
        if value is not None and value is not False:
            raise InputError(f"{_FLAGS[name]} is of no use here: {why}")


def require_agreement(options: ImportOptions, name: str, told: Any, source: str) -> None:
    """Raises: InputError: the option `name` was given and is not what the source tells."""
    value = getattr(options, name)
    if value is not None and value != told:
        raise InputError(f"{_FLAGS[name]} is {value!r}, but {source} says {told!r}")


def peek_json(path: Path) -> dict[str, Any] | None:
    """The object in a small JSON file; None where there is none."""
    try:
        if not path.is_file() or path.stat().st_size > _MAX_JSON:
            return None
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a small JSON file.

    Raises:
        CheckpointError: it is missing, too large, or no JSON object.
    """
    content = peek_json(path)
    if content is None:
        found = "is no JSON object, or it is damaged" if path.is_file() else "is missing"
        raise CheckpointError(f"{path} {found}")
    return content
