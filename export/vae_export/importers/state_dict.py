"""Files of weights, read without unpickling anything but tensors, and fitted to a network."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vae_runtime.errors import CheckpointError, MissingExtraError

HOLDERS = ("state_dict", "model_state_dict", "model", "net", "network", "weights", "params", "module", "vae")
PREFIXES = ("module.", "_orig_mod.")  # of DataParallel and of torch.compile
SHOWN = 3  # names in a message
MAX_HEADER_BYTES = 100_000_000  # of a safetensors file, by its specification


def load_weights(module: nn.Module, path: str) -> None:
    """Fill `module` with the weights in a file: .safetensors, or what torch.save wrote of tensors alone.

    Raises:
        CheckpointError: it cannot be read, holds more than tensors, or does not fit: the first weights that are missing,
            unexpected or of another shape are named.
        MissingExtraError: it is a safetensors file and safetensors is not installed.
    """
    weights = _without_prefix(read_state_dict(path), module.state_dict())
    wanted = module.state_dict()
    problems = [
        _say("missing", wanted.keys() - weights.keys()),
        _say("unexpected", weights.keys() - wanted.keys()),
        _say("of another shape", _misshapen(weights, wanted)),
    ]
    if any(problems):
        raise CheckpointError(f"{path} does not fit the network; weights {'; '.join(filter(None, problems))}")
    module.load_state_dict(weights)


def read_state_dict(path: str) -> dict[str, Tensor]:
    """The tensors of a file by name.

    Raises:
        CheckpointError, MissingExtraError: see `load_weights`.
    """
    try:
        content = _read_safetensors(path) if _is_safetensors(path) else _read_torch(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    return _find_tensors(content, path)


def _is_safetensors(path: str) -> bool:
    """Its first 8 bytes are the size of a JSON object that follows."""
    with Path(path).open("rb") as stream:
        start = stream.read(9)
    return len(start) == 9 and struct.unpack("<Q", start[:8])[0] <= MAX_HEADER_BYTES and start[8:] == b"{"


def _read_safetensors(path: str) -> Any:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ModuleNotFoundError:
        raise MissingExtraError("safetensors", "export", "reading .safetensors files") from None
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a valid safetensors file: {error}") from None


def _read_torch(path: str) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path} is not a file of weights alone, which is all that is unpickled; save model.state_dict() with"
            f" torch.save or safetensors ({reason})"
        ) from error


def _find_tensors(content: Any, path: str) -> dict[str, Tensor]:
    """The dict of tensors in what was read: itself, or under one of the usual keys."""
    if _is_state_dict(content):
        return dict(content)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds {type(content).__name__}; expected a dict of tensors by name")
    found = [key for key in HOLDERS if _is_state_dict(content.get(key))]
    if len(found) == 1:
        return dict(content[found[0]])
    keys = ", ".join(map(str, list(content)[:8]))
    if found:
        raise CheckpointError(f"{path} holds weights under {', '.join(found)}; save one of them in a file of its own")
    raise CheckpointError(f"{path} holds no tensors under {', '.join(HOLDERS)}; its keys are {keys}")


def _is_state_dict(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(isinstance(key, str) and isinstance(entry, Tensor) for key, entry in value.items())
    )


def _without_prefix(weights: dict[str, Tensor], wanted: Iterable[str]) -> dict[str, Tensor]:
    """The names without what a wrapper put before all of them, unless the network has it too."""
    for prefix in PREFIXES * 2:
        ours = all(name.startswith(prefix) for name in wanted)
        if not ours and all(name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    return weights


def _misshapen(weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    return [
        f"{name} {tuple(weights[name].shape)} instead of {tuple(value.shape)}"
        for name, value in wanted.items()
        if name in weights and weights[name].shape != value.shape
    ]


def _say(problem: str, names: Iterable[str]) -> str:
    names = sorted(names)
    if not names:
        return ""
    more = f", ... ({len(names)} in all)" if len(names) > SHOWN else ""
    return f"{problem}: {', '.join(names[:SHOWN])}{more}"
