"""What a factory returned, as two networks."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vae_runtime.errors import ExportError
from vae_runtime.preprocess import Float32

from ..graphs import DecoderGraph, EncoderGraph
from ..imported import ImportOptions
from ..quality import ExportWarning, warn
from ..reason import some
from .witness import WHOLE_HALVES, heed_forward

# A method before the network that is perhaps a part of what it does.
_PAIRS = (("encode", "decode"), ("encode", "decoder"), ("encoder", "decode"), ("encoder", "decoder"))
_CURE = (
    "return a torch.nn.Module with encode and decode and with its networks as attributes or in a ModuleList, or a pair"
    " of modules (encoder, decoder)"
)


class UnusedWeightsWarning(ExportWarning):
    """Nothing in the bundle depends on some of the network's weights: a part of the network may be missing."""


class Network:
    """The two halves of what a factory returned, and the module that its weights belong to. what, cure: what that is,
    and what to do, in the error about networks that are out of reach."""

    def __init__(self, product: Any, what: str = "what the factory returns", cure: str = _CURE) -> None:
        self._what, self._cure = what, cure
        if isinstance(product, nn.DataParallel):
            product = product.module
        if isinstance(product, torch._dynamo.OptimizedModule):
            product = product._orig_mod
        if isinstance(product, (tuple, list)) and len(product) == 2:
            product = SimpleNamespace(encoder=product[0], decoder=product[1])
        names = next((names for names in _PAIRS if _has(product, names)), None)
        if names is None:
            raise ExportError(
                f"the factory returns {type(product).__name__}; expected an object with encode and decode, or with"
                " encoder and decoder, or a pair (encoder, decoder)"
            )
        calls = [getattr(product, name) for name in names]
        self.whole = _whole(product, calls)
        self.encoder, self.decoder = (_Half(self.whole, call) for call in calls)
        # Of a pair each half is what was meant; if it is a method, its model has the other half too, and uses it not.
        self._is_pair = isinstance(product, SimpleNamespace) and isinstance(self.whole, _Parts)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Any network with weights that runs in this context has to be one of `whole`, or these are never loaded and it
        stays in training mode.

        Raises:
            ExportError: another one ran; also in place of what it led to.
        """
        known = {*self.whole.modules(), *self.encoder.modules(), *self.decoder.modules()}
        strange: list[str] = []

        def see(module: nn.Module, inputs: Any) -> None:
            if torch.compiler.is_compiling():  # it reads this code too, of modules that are no longer themselves
                return
            # Whatever is around the halves has known ones in it.
            if known.isdisjoint(module.modules()) and (*module.parameters(), *module.buffers()):
                strange.append(type(module).__name__)

        hook = register_module_forward_pre_hook(see)
        try:
            yield
        except Exception:
            if not strange:
                raise
        finally:
            hook.remove()
        if strange:
            raise ExportError(
                f"{self._what} runs a network, {strange[0]}, that is registered in no module of it, so that its weights"
                f" and its evaluation mode are out of reach; {self._cure}"
            )

    def heed_the_rest(self, encoder: EncoderGraph, decoder: DecoderGraph, x: Float32, options: ImportOptions) -> None:
        """Warn where the two halves, as they were read, may not be all of the network.

        A forward may do more than both, such as computing mean and log-variance from an encoder's features, and that is
        not exported. It shows in weights that forward alone uses (`UnusedWeightsWarning`) and in what it gives
        (`ForwardDisagreesWarning`).

        x: inputs (N, ...) in the bundle's units.
        """
        if self._is_pair:
            return
        inputs = torch.from_numpy(x)
        with torch.compiler.set_stance("force_eager"):  # what is compiled took its time before, for other sizes
            self._warn_of_unused(lambda: _outputs(encoder, decoder, inputs[:1]))
            heed_forward(self.whole, encoder, decoder, inputs, options)

    def _warn_of_unused(self, run_halves: Callable[[], list[Tensor]]) -> None:
        with _Operators() as operators, torch.no_grad():
            outputs = run_halves()
        needed, read = operators.needed_for(outputs), operators.read()
        in_vain = [one for one in self.whole.parameters() if (place := _place(one)) in read and place not in needed]
        if in_vain and not _changes_nothing(run_halves, in_vain):  # values went on out of sight, as through numpy
            needed = read
        unused = list(_unread(self.whole, needed, ""))
        if unused and unused != [""]:  # all: operators that are out of sight, as those that torch.compile made
            warn(
                f"neither the latent nor the reconstruction depends on the weights of {some(unused)}: what the"
                f" network's forward does with them is not in the bundle; if it should be, {WHOLE_HALVES}",
                UnusedWeightsWarning,
            )


def _outputs(encoder: EncoderGraph, decoder: DecoderGraph, x: Tensor) -> list[Tensor]:
    """What both halves give: mean, log-variance if there is one, and the reconstruction of the mean."""
    encoded = encoder(x)
    latents = [encoded] if isinstance(encoded, Tensor) else list(encoded)
    return [*latents, decoder.uncut(latents[0])]


@torch.no_grad()
def _changes_nothing(run: Callable[[], list[Tensor]], parameters: Sequence[nn.Parameter]) -> bool:
    """Whether `run` gives the same with other values of these."""
    before, kept = run(), [one.clone() for one in parameters]
    try:
        for one in parameters:
            one.mul_(-2).add_(1)
        return all(map(torch.equal, before, run()))
    except Exception:  # of code that refuses such values, and so depends on them
        return False
    finally:
        for one, values in zip(parameters, kept, strict=True):
            one.copy_(values)


class _Operators(TorchDispatchMode):
    """Which memory each operator that runs reads and writes, by its address; all of it is kept, so that no address has
    a second meaning."""

    def __init__(self) -> None:
        super().__init__()
        self._steps: list[tuple[set[int], set[int]]] = []
        self._kept: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._steps.append((self._places((args, kwargs)), self._places(result)))
        return result

    def _places(self, tree: Any) -> set[int]:
        tensors = [one for one in tree_leaves(tree) if isinstance(one, Tensor)]
        self._kept += tensors
        return places(tensors)

    def read(self) -> set[int]:
        """All that was read."""
        return set().union(*(read for read, _ in self._steps))

    def needed_for(self, outputs: Sequence[Tensor]) -> set[int]:
        """All from which the outputs are computed. What becomes a number of Python's may go anywhere."""
        needed = {_place(one) for one in outputs}
        for read, written in reversed(self._steps):
            if not written or not needed.isdisjoint(written):
                needed |= read
        return needed


def places(tensors: Iterable[Tensor]) -> set[int]:
    """The addresses of their memory, which views share; of sparse ones nothing."""
    return {_place(one) for one in tensors if one.layout == torch.strided}


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _unread(module: nn.Module, read: set[int], name: str) -> Iterator[str]:
    """The names of the largest parts of `module` with none of their parameters among `read`."""
    parameters = [parameter for parameter in module.parameters() if parameter.numel()]
    if not parameters:
        return
    if all(_place(parameter) not in read for parameter in parameters):
        yield name
        return
    prefix = f"{name}." if name else ""
    for own, parameter in module.named_parameters(recurse=False):
        if parameter.numel() and _place(parameter) not in read:
            yield f"{prefix}{own}"
    for own, child in module.named_children():
        yield from _unread(child, read, f"{prefix}{own}")


class _Parts(nn.Module):
    """The networks among an object's attributes, and those whose methods are, under their names there."""

    def __init__(self, owner: Any) -> None:
        super().__init__()
        for name, value in getattr(owner, "__dict__", {}).items():
            module = value if isinstance(value, nn.Module) else getattr(value, "__self__", None)
            if isinstance(module, nn.Module):
                setattr(self, name, module)


class _Half(nn.Module):
    """One network, or one method of a model with all the model's weights. What it prints goes to stderr: stdout is the
    command's."""

    def __init__(self, whole: nn.Module, call: Any) -> None:
        super().__init__()
        self.call = call
        if not isinstance(call, nn.Module):
            self.whole = whole

    def forward(self, x: Tensor) -> Any:
        if torch.compiler.is_compiling():  # torch reads this code, which may turn no stream, and its export is quiet
            return self.call(x)
        with contextlib.redirect_stdout(sys.stderr):
            return self.call(x)


def _whole(product: Any, calls: list[Any]) -> nn.Module:
    """The module with all weights: of two methods of one object, or of one and a part of it, that object."""
    if isinstance(product, nn.Module):
        return product
    owners = [getattr(call, "__self__", call) for call in calls]
    if owners[0] is owners[1]:
        product = owners[0]
    for one, other in (owners, reversed(owners)):
        if isinstance(one, nn.Module) and any(other is part for part in one.modules()):
            product = one
    return product if isinstance(product, nn.Module) else _Parts(product)


def _has(product: Any, names: tuple[str, ...]) -> bool:
    return all(callable(getattr(product, name, None)) for name in names)
