"""Files that `torch.save` wrote, read without running anything: tensors and plain data are taken as torch takes them
with `weights_only`, and in place of all other classes and functions stands one that does nothing."""

from __future__ import annotations

import pickle
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vae_runtime.errors import CheckpointError

from .weights import require_file

_PARTS = ("_parameters", "_buffers", "_modules")  # of a torch.nn.Module's state


class Stranger:
    """Stands for a pickled object of any class, or for what any function gave, neither of which is loaded. state: what
    the object was to be filled with."""

    state: Any = None

    def __new__(cls, *arguments: Any) -> Stranger:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __repr__(self) -> str:
        return "a pickled object"


def read_pickled(path: Path) -> Any:
    """What is in the file, with a `Stranger` for whatever is no tensor or plain data.

    Raises:
        CheckpointError: the file is missing, damaged, no `torch.save` wrote it, or it has other objects than strangers
            can stand for.
    """
    require_file(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of unusual protocols, before they are refused
            with torch.serialization.safe_globals(_stand_ins(path)):
                return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{path} holds more than plain data and tensors (pickled classes can run code) and was not loaded; save the"
            " network's state_dict() alone"
        ) from None
    except Exception as error:  # torch raises whatever a damaged pickle leads it to
        raise CheckpointError(f"{path} is damaged or holds no weights ({type(error).__name__})") from None


def read_pickled_dict(path: Path) -> dict[Any, Any]:
    """The same where it is a dict.

    Raises:
        CheckpointError: also where it is none.
    """
    content = read_pickled(path)
    if not isinstance(content, dict):
        what = content if isinstance(content, Stranger) else f"a {type(content).__name__}"
        raise CheckpointError(f"{path} holds {what}; expected a dict of weights by name")
    return content


def weights_of_network(content: Any) -> dict[str, Tensor] | None:
    """The weights of a pickled torch.nn.Module, by the names of its state_dict; None of anything else."""
    return dict(_weights(content, "", ())) if _is_network(content) else None


def _is_network(content: Any) -> bool:
    if not isinstance(content, Stranger) or not isinstance(content.state, Mapping):
        return False
    return all(isinstance(content.state.get(part), Mapping) for part in _PARTS)


def _weights(network: Stranger, prefix: str, around: tuple[Stranger, ...]) -> Iterator[tuple[str, Tensor]]:
    """around: the networks that this one is in, and should not be around again, as a damaged file may have it."""
    parameters, buffers, modules = (network.state[part] for part in _PARTS)
    left_out = network.state.get("_non_persistent_buffers_set", ())
    kept = {name: value for name, value in buffers.items() if name not in left_out}
    for name, value in {**parameters, **kept}.items():
        if isinstance(value, Tensor):  # else None, for a bias that there is not
            yield f"{prefix}{name}", value.detach()
    for name, module in modules.items():
        if _is_network(module) and module not in (network, *around):
            yield from _weights(module, f"{prefix}{name}.", (network, *around))


def _stand_ins(path: Path) -> list[Any]:
    """What torch takes in place of everything that it would refuse. It finds that in files of its present format; of
    older ones, it goes on to refuse it."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # no such file, or a damaged one, which loading tells
        return []
    return [(_mapping if name == "collections.defaultdict" else Stranger, name) for name in names]


def _mapping(*arguments: Any) -> OrderedDict[Any, Any]:
    """In place of a dict that makes up values, one that does not: torch fills no dict of another class."""
    return OrderedDict()
