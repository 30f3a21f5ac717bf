"""`package.module:callable`, which returns a network of PyTorch, with a file of weights or without.

The callable takes no arguments. What it returns has methods `encode` and `decode`, or networks `encoder` and `decoder`,
or is a pair (encoder, decoder) of networks or of their methods. What these return may have any form of `outputs`.
Importing the module runs its code, as Python's own `-m` does; the file of weights runs nothing.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vae_runtime.errors import ExportError, InputError, VAEError

from ..imported import Imported, ImportOptions
from ..reason import reason, some
from .options import FLAGS, check_options, require_shape
from .trial import noise, try_out

if TYPE_CHECKING:
    from torch import nn

KIND = "factory"
_DERIVED = re.compile("_(g|v|orig)$")  # of what weight_norm, spectral_norm and pruning make anew at each call
_NAME = r"[A-Za-z_]\w*"
_SOURCE = re.compile(rf"({_NAME}(?:\.{_NAME})*):({_NAME}(?:\.{_NAME})*)")


def recognises(source: str) -> bool:
    """Whether `source` reads `package.module:callable` and is no file."""
    try:
        return _SOURCE.fullmatch(source) is not None and not Path(source).exists()
    except (OSError, ValueError):
        return False


def load(source: str, options: ImportOptions) -> Imported:
    """Import the module, from the current folder too, call the factory and load the weights. It is called twice where
    there is no file of weights, or the network has tensors that no such file has, to find those that are random.

    Raises:
        CheckpointError: the weights cannot be read or do not fit.
        ExportError: the factory fails, or its network cannot be a bundle's.
        InputError: there is no such callable, or an option is missing or wrong.
    """
    import torch

    from ..reference import Reference
    from .network import Network
    from .state_dict import load_weights
    from .torch_reading import make_graphs

    check_options(options, factory=True)
    match = _SOURCE.fullmatch(source)
    if match is None:
        raise InputError(f"source is {source!r}; expected package.module:callable")
    shape = require_shape(options.input_shape, options)
    with _importing_from_here(), contextlib.redirect_stdout(sys.stderr):  # what is printed is not the command's output
        factory = _find(*match.groups())
        network = Network(_call(factory, source))
        _require_weights(network.whole, source)
        first = _digests(network.whole, options.weights is not None)
        if first:
            del network  # one at a time: they may be large
            gc.collect()
            network = Network(_call(factory, source))
            _require_same(first, _digests(network.whole, options.weights is not None), source, options.weights)
        if options.weights is not None:
            load_weights(network.whole, Path(options.weights))
        network.whole.cpu().float()  # what bundles compute in
        with network.watched():
            graphs = make_graphs(network.encoder, network.decoder, shape, options)
            reference = Reference(*graphs)
            sizes = try_out(reference, shape, options)
        network.heed_the_rest(*graphs, noise(shape, 2, sizes.multiple_of), options)
    return Imported(
        reference,
        match[2].rpartition(".")[2],
        *sizes,
        options.input_range,
        origin={"library": "torch", "version": torch.__version__, "factory": source},
    )


def _find(module: str, path: str) -> Any:
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and (module == error.name or module.startswith(f"{error.name}.")):
            rule = f"; write {module.removesuffix('.py')}:{path}" if module.endswith(".py") else ""
            raise InputError(f"there is no module {error.name!r} here or among the installed packages{rule}") from None
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


def _require_weights(network: nn.Module, source: str) -> None:
    """Raises: ExportError: a lazy module has not seen an input, so that it has no weights, nor a place for any."""
    from torch.nn.parameter import is_lazy

    tensors = (*network.named_parameters(), *network.named_buffers())
    if lazy := [name for name, value in tensors if is_lazy(value)]:
        raise ExportError(
            f"{source} returns lazy modules that have no weights yet, such as {lazy[0]}; run the network once in it, on"
            " an input of its size"
        )


def _digests(network: nn.Module, beside_weights: bool) -> dict[str, bytes]:
    """SHA-256 of every parameter, buffer and other tensor of a module, by name. beside_weights: of those alone that are
    in no file of weights."""
    import torch

    from .network import places

    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    owned = places(tensors.values())
    for place, module in network.named_modules():
        plain = {name: value for name, value in vars(module).items() if isinstance(value, torch.Tensor)}
        own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        derived = {_DERIVED.sub("", name) for name, _ in own}
        plain = {name: value for name, value in plain.items() if name not in derived}
        plain = {name: value for name, value in plain.items() if owned.isdisjoint(places([value]))}  # no views of those
        tensors |= {f"{place}.{name}".removeprefix("."): value for name, value in plain.items()}
    filed = network.state_dict().keys() if beside_weights else ()
    found = {}
    for name, value in tensors.items():
        if name in filed or value.layout != torch.strided:
            continue
        data = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        found[name] = hashlib.sha256(data.data).digest()
    return found


def _require_same(first: dict[str, bytes], second: dict[str, bytes], source: str, weights: str | None) -> None:
    """Raises: InputError: the factory gave other tensors at its second call, so that nobody has trained with them."""
    other = [name for name, digest in second.items() if first.get(name) != digest]
    if other:
        if weights is not None:
            raise InputError(
                f"{source} returns random numbers, different at each call, in {some(other)}, which"
                f" {weights} does not have; set them as they were in training, or call torch.manual_seed in it"
            )
        raise InputError(
            f"{source} returns random weights, different at each call, in {some(other)}; pass"
            f" those that were trained as {FLAGS['weights']} FILE, or, if random ones are meant, call torch.manual_seed"
            " in it"
        )


@contextlib.contextmanager
def _importing_from_here() -> Iterator[None]:
    """The current folder first on the path, as for `python -m`, and no arguments of ours for a script that parses them
    as it is imported; afterwards both are as they were."""
    path, arguments = list(sys.path), list(sys.argv)
    sys.path.insert(0, str(Path.cwd()))
    sys.argv[1:] = []
    try:
        yield
    finally:
        sys.path[:], sys.argv[:] = path, arguments
