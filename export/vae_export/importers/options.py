"""What an importer's user may say, and the names and small JSON files that say the rest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vae_runtime.errors import CheckpointError, InputError

from ..imported import ImportOptions

FLAGS = {  # by field of ImportOptions
    "weights": "--weights",
    "trust_pickle": "--trust-pickle",
    "kind": "--kind",
    "input_shape": "--input",
    "multiple_of": "--multiple-of",
    "input_range": "--input-range",
    "latent_scale": "--latent-scale",
    "latent_shift": "--latent-shift",
    "spread": "--spread",
}
_MAX_JSON = 2**20


def refuse_options(options: ImportOptions, why: str, *names: str) -> None:
    """Raises: InputError: one of these options was given; `why` ends the sentence."""
    for name in names:
        value = getattr(options, name)
        if value is not None and value is not False:
            raise InputError(f"{FLAGS[name]} is of no use here: {why}")


def require_agreement(options: ImportOptions, name: str, told: Any, source: str) -> None:
    """Raises: InputError: the option `name` was given and is not what the source tells."""
    value = getattr(options, name)
    if value is not None and value != told:
        raise InputError(f"{FLAGS[name]} is {value!r}, but {source} says {told!r}")


def bundle_name(folder: Path, subfolder: str) -> str:
    """A model's name: that of its folder, or of the one around it where it lies in a `subfolder` of a fixed name."""
    path = folder.resolve()
    return path.parent.name if path.name == subfolder and path.parent.name else path.name


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
