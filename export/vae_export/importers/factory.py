"""`package.module:callable`, which returns a network of PyTorch, with a file of weights or without.

The callable takes no arguments. What it returns has methods `encode` and `decode`, or networks `encoder` and `decoder`,
or is a pair (encoder, decoder) of networks or of their methods. What these return may have any form of `outputs`.
Importing the module runs its code, as Python's own `-m` does; the file of weights runs nothing.
"""

from __future__ import annotations

import contextlib
import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vae_runtime.errors import ExportError, InputError, VAEError

from ..imported import Imported, ImportOptions
from ..reason import reason
from .options import check_options, require_shape
from .trial import try_out

KIND = "factory"
_NAME = r"[A-Za-z_]\w*"
_SOURCE = re.compile(rf"({_NAME}(?:\.{_NAME})*):({_NAME}(?:\.{_NAME})*)")


def recognises(source: str) -> bool:
    """Whether `source` reads `package.module:callable` and is no file."""
    try:
        return _SOURCE.fullmatch(source) is not None and not Path(source).exists()
    except (OSError, ValueError):
        return False


def load(source: str, options: ImportOptions) -> Imported:
    """Import the module, from the current folder too, call the factory and load the weights.

    Raises:
        CheckpointError: the weights cannot be read or do not fit.
        ExportError: the factory fails, or its network cannot be a bundle's.
        InputError: there is no such callable, or an option is missing or wrong.
    """
    import torch

    from ..verify import Reference
    from .network import Network
    from .state_dict import load_weights
    from .torch_halves import make_graphs

    check_options(options, factory=True)
    match = _SOURCE.fullmatch(source)
    if match is None:
        raise InputError(f"source is {source!r}; expected package.module:callable")
    shape = require_shape(options.input_shape, options)
    with _importing_from_here(), contextlib.redirect_stdout(sys.stderr):  # what is printed is not the command's output
        network = Network(_call(_find(*match.groups()), source))
        if options.weights is not None:
            load_weights(network.whole, Path(options.weights))
        network.whole.cpu().float()  # what bundles compute in
        with network.watched():
            reference = Reference(*make_graphs(network.encoder, network.decoder, shape, options))
            sizes = try_out(reference, shape, options)
    return Imported(
        reference,
        match[2].rpartition(".")[2],
        sizes.input_shape,
        sizes.multiple_of,
        sizes.default_size,
        options.input_range,
        origin={"library": "torch", "version": torch.__version__, "factory": source},
    )


def _find(module: str, path: str) -> Any:
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and (module == error.name or module.startswith(f"{error.name}.")):
            raise InputError(f"there is no module {error.name!r} here or among the installed packages") from None
        raise ExportError(f"the module {module} needs {error.name}, which is not installed") from error
    except (Exception, SystemExit) as error:
        raise ExportError(f"the module {module} cannot be imported: {reason(error)}") from error
    for name in path.split("."):
        if not hasattr(found, name):
            raise InputError(f"the module {module} has no {path!r}")
        found = getattr(found, name)
    if not callable(found):
        raise InputError(f"{module}:{path} is {type(found).__name__}; expected something to call, without arguments")
    return found


def _call(factory: Any, source: str) -> Any:
    try:
        return factory()
    except VAEError:
        raise
    except (Exception, SystemExit) as error:
        raise ExportError(f"{source} fails when it is called without arguments: {reason(error)}") from error


@contextlib.contextmanager
def _importing_from_here() -> Iterator[None]:
    """The current folder first on the path, as for `python -m`; afterwards the path is as it was."""
    path = list(sys.path)
    sys.path.insert(0, str(Path.cwd()))
    try:
        yield
    finally:
        sys.path[:] = path
