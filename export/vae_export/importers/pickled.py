"""Files that `torch.save` wrote, read without running anything: tensors and plain data are taken as torch takes them
with `weights_only`, and in place of all other classes and functions stands one that does nothing."""

from __future__ import annotations

import contextlib
import io
import pickle
import pickletools
import threading
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vae_runtime.errors import CheckpointError

from .weights import require_file

_PARTS = ("_parameters", "_buffers", "_modules")  # of a torch.nn.Module's state
_MOST_MODULES = 10_000  # of a network; a small file may name one module within the other without end
_LOADING = threading.Lock()  # torch keeps what it may load for the whole process


class Stranger:
    """Stands for a pickled object of any class, or for what any function gave, neither of which is loaded. arguments,
    state: what the object was to be made of, and filled with."""

    arguments: tuple[Any, ...] = ()
    state: Any = None

    def __new__(cls, *arguments: Any) -> Stranger:
        made = super().__new__(cls)
        made.arguments = arguments
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __repr__(self) -> str:
        return "a pickled object"


def read_pickled(path: Path) -> Any:
    """What is in the file, with a `Stranger` for whatever is no tensor or plain data.

    Raises:
        CheckpointError: the file is missing, damaged, no `torch.save` wrote it, or it has other objects than strangers
            can stand for, as all are in the format of PyTorch before 1.6.
    """
    require_file(path)
    try:
        with warnings.catch_warnings(), _strangers_for_all_in(path):
            warnings.simplefilter("ignore")  # of unusual protocols, before they are refused
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
        raise CheckpointError(f"{path} holds {describe(content)}; expected a dict of weights by name")
    return content


def describe(content: Any) -> str:
    """What was read, for an error."""
    is_strange = isinstance(content, Stranger) or content is Stranger  # which a function is, not called
    return "a pickled object" if is_strange else f"a {type(content).__name__}"


def weights_of_network(content: Any) -> dict[str, Tensor] | None:
    """The weights of a pickled torch.nn.Module, or of the one that it is made of, as torch.compile's is, by the names
    of its state_dict; None of anything else, or where a module has itself within."""
    try:
        if isinstance(content, Stranger) and not _is_network(content):
            around = [one for one in content.arguments if _is_network(one)]
            content = around[0] if len(around) == 1 else None
        return dict(_weights(content)) if _is_network(content) else None
    except (TypeError, AttributeError, ValueError):  # a state that is no module's after all
        return None


def _is_network(content: Any) -> bool:
    if not isinstance(content, Stranger) or not isinstance(content.state, dict):
        return False
    return all(isinstance(content.state.get(part), dict) for part in _PARTS)


def _weights(network: Stranger) -> Iterator[tuple[str, Tensor]]:
    """Raises: ValueError: there are too many modules."""
    left = [("", network)]
    for _ in range(_MOST_MODULES):
        if not left:
            return
        prefix, module = left.pop()
        parameters, buffers, modules = (module.state[part] for part in _PARTS)
        left_out = module.state.get("_non_persistent_buffers_set", ())
        for name, value in (*dict.items(parameters), *dict.items(buffers)):
            if isinstance(value, Tensor) and name not in left_out:  # None: a bias that there is not
                yield f"{prefix}{name}", value
        left += [(f"{prefix}{name}.", one) for name, one in dict.items(modules) if _is_network(one)]
    raise ValueError


@contextlib.contextmanager
def _strangers_for_all_in(path: Path) -> Iterator[None]:
    """Have torch load a `Stranger` in place of all that it would refuse, also of what others have allowed. It lists the
    names in a file of the present format; older files it goes on to refuse."""
    with _LOADING:
        allowed = torch.serialization.get_safe_globals()
        torch.serialization.clear_safe_globals()
        try:
            with contextlib.suppress(Exception):  # no such file, or a damaged one, as loading then reports
                names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
                filled = _filled_as(path)
                torch.serialization.add_safe_globals([(filled.get(name, Stranger), name) for name in names])
            yield
        finally:
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals(allowed)


class _Mapping:
    """Stands for a class of dicts: torch fills no dict of another class than its own."""

    def __new__(cls, *arguments: Any) -> OrderedDict[Any, Any]:  # type: ignore[misc]
        return OrderedDict()


class _Sequence:
    """Stands for a class of lists, likewise."""

    def __new__(cls, *arguments: Any) -> list[Any]:  # type: ignore[misc]
        return []


def _filled_as(path: Path) -> dict[str, type]:
    """What is to stand for each class of which the file has objects that are filled as a dict or as a list is, by the
    class's name. Its pickle is gone through with nothing loaded: for all that it names stands what only notes that."""
    found: dict[str, type] = {"collections.defaultdict": _Mapping}

    class Reader(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            return _noting(f"{module}.{name}", found)

        def persistent_load(self, storage: Any) -> None:
            return None

    with contextlib.suppress(Exception), zipfile.ZipFile(path) as archive:
        content = archive.read(next(name for name in archive.namelist() if name.endswith("/data.pkl")))
        if not _notes_without_end(content):
            Reader(io.BytesIO(content)).load()
    return found


def _notes_without_end(content: bytes) -> bool:
    """Whether a pickle numbers what it notes higher than by its bytes, for which Python takes memory up to the number.
    Who writes pickles counts from 0. Raises: ValueError: it is none."""
    return any(
        operation.name in ("PUT", "BINPUT", "LONG_BINPUT") and (number or 0) > len(content)
        for operation, number, _ in pickletools.genops(content)
    )


def _noting(name: str, found: dict[str, type]) -> type:
    class Noting(Stranger):
        def __call__(self, *arguments: Any) -> Any:
            return self

        def __setitem__(self, key: Any, value: Any) -> None:
            found[name] = _Mapping

        def append(self, value: Any) -> None:
            found.setdefault(name, _Sequence)

        def extend(self, values: Any) -> None:
            found.setdefault(name, _Sequence)

    return Noting
