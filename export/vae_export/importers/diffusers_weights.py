"""The files of weights in a folder of diffusers, by the names that its present version gives them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from vae_runtime.errors import CheckpointError

from .options import read_json
from .pickled import read_pickled_dict
from .weights import read_safetensors

WEIGHTS = "diffusion_pytorch_model"
EXTRA = "diffusers"

# Up to version 0.16 the attention's layers had other names, and many published models still have them.
_OLD_ATTENTION = re.compile(r"(\.attentions\.\d+\.)(query|key|value|proj_attn)(\.(?:weight|bias))$")
_NEW_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def read_weights(folder: Path) -> dict[str, Any]:
    """All weights, of one file or of the shards that an index lists; .bin only where there is no safetensors.

    Raises:
        CheckpointError: a file is missing, damaged, or holds more than tensors; or there are several to choose from.
    """
    index, single, pickled = (folder / f"{WEIGHTS}{end}" for end in (".safetensors.index.json", ".safetensors", ".bin"))
    if index.is_file():
        weights = _read_shards(index)
    elif single.is_file():
        weights = read_safetensors(single, EXTRA)
    elif pickled.is_file():
        weights = read_pickled_dict(pickled)
    else:
        weights = read_safetensors(_only_variant(folder), EXTRA)
    return {_OLD_ATTENTION.sub(_new_name, str(name)): value for name, value in weights.items()}


def _new_name(match: re.Match[str]) -> str:
    return f"{match[1]}{_NEW_ATTENTION[match[2]]}{match[3]}"


def _read_shards(index: Path) -> dict[str, Any]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise CheckpointError(f"{index} has no weight_map from the names of weights to files")
    weights: dict[str, Any] = {}
    for file in sorted(set(places.values())):
        if Path(file).name != file:
            raise CheckpointError(f"{index} names the file {file!r}; expected a plain name in the same folder")
        weights |= read_safetensors(index.parent / file, EXTRA)
    return weights


def _only_variant(folder: Path) -> Path:
    """The one file of weights that has a variant in its name, as .fp16.safetensors has."""
    files = sorted(folder.glob(f"{WEIGHTS}.*.safetensors"))
    if len(files) > 1:
        raise CheckpointError(
            f"{folder} has {', '.join(file.name for file in files)} but no {WEIGHTS}.safetensors; give a folder with "
            "one of them"
        )
    return files[0] if files else folder / f"{WEIGHTS}.safetensors"
