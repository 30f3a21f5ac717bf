"""A factory's file of weights: its dict of tensors found, and what wrappers did to their names undone."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vae_runtime.errors import CheckpointError

from ..reason import some
from .pickled import Stranger, read_pickled, weights_of_network
from .safetensors_header import is_safetensors
from .weights import assign, read_safetensors

HOLDERS = ("state_dict", "model_state_dict", "model", "net", "network", "weights", "params", "module", "vae")
COMPILED = "_orig_mod."  # what torch.compile puts before the names of a module's weights

_log = logging.getLogger(__name__)


def load_weights(module: nn.Module, path: Path) -> None:
    """Fill `module` with the weights in a file: .safetensors, or what torch.save wrote of a state_dict, of a checkpoint
    with one, or of a network. Nothing that is pickled in it is run.

    Raises:
        CheckpointError: it cannot be read or does not fit; what is wrong is named.
        MissingExtraError: it is a safetensors file and safetensors is not installed.
    """
    try:
        content = read_safetensors(path, "safetensors") if is_safetensors(path) else read_pickled(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    names = {name.replace(COMPILED, ""): name for name in module.state_dict()}
    found = {name.replace(COMPILED, ""): value for name, value in _find_tensors(content, names, path).items()}
    found = _without_prefix(found, names)
    assign(module, {names.get(name, name): value for name, value in found.items()}, path)


def holds_tensors(content: Any) -> bool:
    """Whether what was read is a dict of tensors, or has one under a usual key, and is no checkpoint of ours; or is a
    network."""
    if isinstance(content, Mapping) and "format" in content:
        return False
    return _state_dict(content) is not None or any(key in HOLDERS for key in _holders(content))


def _find_tensors(content: Any, wanted: Collection[str], path: Path) -> dict[str, Tensor]:
    """The dict of tensors in what was read: itself; or those of the network's parts, each under its name; or the one
    under a usual key, or the only one."""
    if (own := _state_dict(content)) is not None:
        return own
    if not isinstance(content, Mapping):
        what = "a pickled object" if isinstance(content, Stranger) else f"a {type(content).__name__}"
        raise CheckpointError(f"{path} holds {what}; expected weights by name, or the network that has them")
    found = _holders(content)
    parts = {name.partition(".")[0] for name in wanted}
    if parts and parts <= found.keys():
        return {f"{part}.{name}": value for part in sorted(parts) for name, value in found[part].items()}
    usual = [key for key in found if key in HOLDERS] or list(found)
    if len(usual) == 1:
        return found[usual[0]]
    if usual:
        raise CheckpointError(f"{path} holds weights under {', '.join(usual)}; save one of them in a file of its own")
    keys = ", ".join(map(str, list(content)[:8]))
    raise CheckpointError(f"{path} holds no tensors under {', '.join(HOLDERS)}; its keys are {keys}")


def _holders(content: Mapping[Any, Any]) -> dict[str, dict[str, Tensor]]:
    found = {key: _state_dict(value) for key, value in content.items() if isinstance(key, str)}
    return {key: value for key, value in found.items() if value is not None}


def _state_dict(content: Any) -> dict[str, Tensor] | None:
    """A dict of tensors by name, or that of a network."""
    if not isinstance(content, Mapping):
        return weights_of_network(content)
    named = all(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items())
    return dict(content) if content and named else None


def _without_prefix(weights: dict[str, Tensor], wanted: Collection[str]) -> dict[str, Tensor]:
    """The names without what a wrapper put before them, such as "module." of DataParallel and "model." of a
    LightningModule: that under which all are that are wanted, whatever else the wrapper has, such as a loss's own
    weights; else, that which all have in common and which makes the most of them known."""
    if prefix := _prefix_of_all(weights, wanted):
        others = [name for name in weights if not name.startswith(prefix)]
        if others:
            _log.info("of the weights, those under %s are taken, and %s left out", prefix, some(others))
        return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    columns = zip(*(name.split(".")[:-1] for name in weights), strict=False)
    parts = [column[0] for column in itertools.takewhile(lambda column: len(set(column)) == 1, columns)]
    prefixes = ["".join(f"{part}." for part in parts[:count]) for count in range(len(parts) + 1)]
    known = [sum(name.removeprefix(prefix) in wanted for name in weights) for prefix in prefixes]
    best = prefixes[known.index(max(known))]
    return {name.removeprefix(best): value for name, value in weights.items()}


def _prefix_of_all(weights: Collection[str], wanted: Collection[str]) -> str | None:
    """The only prefix under which all wanted names are; None where there is none, or are several."""
    first = next(iter(wanted), "")
    prefixes = [name.removesuffix(first) for name in weights if f".{name}".endswith(f".{first}")]
    complete = [prefix for prefix in prefixes if all(prefix + name in weights for name in wanted)]
    return complete[0] if len(complete) == 1 else None
