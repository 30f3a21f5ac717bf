"""A factory's file of weights: its dict of tensors found, wrappers' prefixes taken away."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vae_runtime.errors import CheckpointError

from .safetensors_header import is_safetensors
from .weights import assign, read_pickled, read_safetensors

HOLDERS = ("state_dict", "model_state_dict", "model", "net", "network", "weights", "params", "module", "vae")


def load_weights(module: nn.Module, path: Path) -> None:
    """Fill `module` with the weights in a file: .safetensors, or what torch.save wrote of tensors and plain data alone.

    Raises:
        CheckpointError: it cannot be read, holds anything else, or does not fit; what is wrong is named.
        MissingExtraError: it is a safetensors file and safetensors is not installed.
    """
    try:
        content = read_safetensors(path, "safetensors") if is_safetensors(path) else read_pickled(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    assign(module, _without_prefix(_find_tensors(content, path), module.state_dict()), path)


def _find_tensors(content: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """The dict of tensors in what was read: itself, or under one of the usual keys."""
    if _is_state_dict(content):
        return dict(content)
    found = _holders(content)
    if len(found) == 1:
        return dict(content[found[0]])
    keys = ", ".join(map(str, list(content)[:8]))
    if found:
        raise CheckpointError(f"{path} holds weights under {', '.join(found)}; save one of them in a file of its own")
    raise CheckpointError(f"{path} holds no tensors under {', '.join(HOLDERS)}; its keys are {keys}")


def holds_tensors(content: Any) -> bool:
    """Whether what was read is a dict of tensors, or has one under a usual key, and is no checkpoint of ours."""
    if not isinstance(content, Mapping) or "format" in content:
        return False
    return _is_state_dict(content) or bool(_holders(content))


def _holders(content: Mapping[str, Any]) -> list[str]:
    return [key for key in HOLDERS if _is_state_dict(content.get(key))]


def _is_state_dict(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(isinstance(key, str) and isinstance(entry, Tensor) for key, entry in value.items())
    )


def _without_prefix(weights: dict[str, Tensor], wanted: Collection[str]) -> dict[str, Tensor]:
    """The names without what a wrapper put before all of them, such as "module." of DataParallel, "_orig_mod." of
    torch.compile and "model." of a LightningModule: that which makes the most of them known."""
    columns = zip(*(name.split(".")[:-1] for name in weights), strict=False)
    parts = [column[0] for column in itertools.takewhile(lambda column: len(set(column)) == 1, columns)]
    prefixes = ["".join(f"{part}." for part in parts[:count]) for count in range(len(parts) + 1)]
    known = [sum(name.removeprefix(prefix) in wanted for name in weights) for prefix in prefixes]
    best = prefixes[known.index(max(known))]
    return {name.removeprefix(best): value for name, value in weights.items()}
