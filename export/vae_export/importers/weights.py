"""Files of weights: read as plain tensors, so that nothing in them is ever run, and put into the network they fit."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vae_runtime.errors import CheckpointError, MissingExtraError

from ..reason import reason

SHOWN = 3  # names in an error


def read_safetensors(path: Path, extra: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file, by name. extra: the one of ours that brings the library.

    Raises:
        CheckpointError: the file is missing or damaged. MissingExtraError: safetensors is not installed.
    """
    return _read(path, extra, lambda file: file.keys())


def read_some_safetensors(path: Path, names: Iterable[str], extra: str) -> dict[str, Tensor]:
    """Those of the tensors with these names; of a file that has much more, nothing else is read. Raises: the same."""
    return _read(path, extra, lambda file: names)


def _read(path: Path, extra: str, choose: Callable[[Any], Iterable[str]]) -> dict[str, Tensor]:
    try:
        from safetensors import safe_open
    except ModuleNotFoundError:
        raise MissingExtraError("safetensors", extra, "reading .safetensors") from None
    require_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in choose(file)}
    except Exception as error:  # a SafetensorError, or what torch says of a type that it has not
        raise CheckpointError(f"{path} is damaged or no safetensors file ({reason(error)})") from None


def read_pickled(path: Path) -> dict[str, Any]:
    """What `torch.save` wrote: a dict of plain data and tensors. Other pickled objects are refused, not run.

    Raises:
        CheckpointError: the file is missing, damaged, or holds more than plain data and tensors.
    """
    require_file(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of unusual protocols, before they are refused
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{path} holds more than plain data and tensors (pickled classes can run code) and was not loaded; save the"
            " network's state_dict() alone"
        ) from None
    except Exception as error:  # torch raises whatever a damaged pickle leads it to
        raise CheckpointError(f"{path} is damaged or holds no weights ({type(error).__name__})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; expected a dict of weights by name")
    return content


def assign(network: nn.Module, weights: Mapping[str, Any], source: Path) -> None:
    """Put weights, as float32, in the place of the network's own, which may be on the device "meta".

    Raises:
        CheckpointError: some are missing, unknown, of another shape, or no plain tensors; the message has their names.
    """
    expected = network.state_dict()
    wrong = [
        f"{name} ({_describe(weights[name])}, expected {_shape(value)})"
        for name, value in expected.items()
        if name in weights and not _fits(weights[name], value)
    ]
    problems = [
        f"{what} {_some(names)}"
        for what, names in (
            ("lacks", [name for name in expected if name not in weights]),
            ("has the unknown", [str(name) for name in weights if name not in expected]),
            ("has the wrong shape or type in", wrong),
        )
        if names
    ]
    if problems:
        raise CheckpointError(f"{source} does not fit its {type(network).__name__}: it {'; it '.join(problems)}")
    tensors = {name: value.float() if value.is_floating_point() else value for name, value in weights.items()}
    network.load_state_dict(tensors, strict=True, assign=True)


def require_file(path: Path) -> None:
    """Raises: CheckpointError: there is no such file."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")


def _fits(value: Any, expected: Tensor) -> bool:
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_quantized or value.is_complex():
        return False
    return value.shape == expected.shape and value.is_floating_point() == expected.is_floating_point()


def _describe(value: Any) -> str:
    return f"{_shape(value)} {str(value.dtype).removeprefix('torch.')}" if isinstance(value, Tensor) else repr(value)


def _shape(value: Tensor) -> str:
    return "×".join(map(str, value.shape)) or "one number"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
