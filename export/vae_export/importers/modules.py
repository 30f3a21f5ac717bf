"""Two PyTorch modules, or methods of modules, as `export_bundle` takes them."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from vae_runtime.errors import InputError
from vae_runtime.manifest import HALF_NAMES, MEAN
from vae_runtime.preprocess import Float32

from ..imported import Arguments
from ..reference import Reference
from ..verify import at_least
from .network import Network
from .torch_reading import make_bare_graphs, require_float32
from .trial import DoesNotRunError, check_halves, check_range, run

_LEAST_ROWS, _MOST_ROWS, _MOST_VALUES = 3, 8, 2**21  # of the examples, that the halves are tried with
_CURE = "pass modules, or methods of a torch.nn.Module with its networks as attributes or in a ModuleList"


class Modules:
    """encoder, decoder: both as modules; a method comes with all weights of the object that it is of."""

    def __init__(self, encoder: Any, decoder: Any) -> None:
        for name, half in zip(HALF_NAMES, (encoder, decoder), strict=True):
            _require_network(name, half)
        self._network = None
        if not (isinstance(encoder, nn.Module) and isinstance(decoder, nn.Module)):
            self._network = Network((encoder, decoder), "what encoder and decoder are", _CURE)
            encoder, decoder = self._network.encoder, self._network.decoder
        self.encoder: nn.Module = encoder
        self.decoder: nn.Module = decoder

    def open(self, examples: Float32, options: Arguments, threshold: bool) -> Reference:
        """Both halves, read and tried as those of any importer are, in evaluation mode.

        examples: inputs (N, *shape) in the bundle's units. threshold: they become x >= 0.5.

        Raises:
            ExportError: a half does not run, is random, mixes the rows of a batch, or gives what is not understood.
            InputError: an option contradicts what it gives.
        """
        rows = min(len(examples), max(_LEAST_ROWS, min(_MOST_ROWS, _MOST_VALUES // examples[0].size)))
        x = at_least(np.ascontiguousarray(examples[np.arange(rows) * len(examples) // rows]), _LEAST_ROWS)
        x = (x >= 0.5).astype(np.float32) if threshold else x
        try:
            with contextlib.nullcontext() if self._network is None else self._network.watched():
                graphs = make_bare_graphs(self.encoder, self.decoder, x, options, threshold)
                halves = Reference(*graphs)
                check_halves(halves, x, run(halves.encode, x, "encoder")[MEAN].shape[1:])
                check_range(halves, x, options)
            if self._network is not None:
                self._network.heed_the_rest(*graphs, x, options)
        except DoesNotRunError as error:
            require_float32(error.half, self.encoder if error.half == HALF_NAMES[0] else self.decoder)
            raise
        return halves


def _require_network(name: str, half: Any) -> None:
    """Raises: InputError: it is no network, but what some take for one."""
    rule = "expected a torch.nn.Module, or a method of one"
    if (program := _program(half)) is not None:
        sort, save = program
        raise InputError(
            f"{name} is a {sort} program, which is exported from files: write both halves with {save}, and pass these"
            " to vae-export as ENCODER,DECODER"
        )
    if isinstance(half, type):
        raise InputError(f"{name} is the class {half.__name__}; {rule}: an instance, such as {half.__name__}()")
    if isinstance(half, Mapping):
        raise InputError(f"{name} is a {type(half).__name__}, as of weights; {rule}, into which they are loaded")
    if not callable(half):
        raise InputError(f"{name} is {half!r:.80}; {rule}")


def _program(half: Any) -> tuple[str, str] | None:
    """What sort of program of PyTorch it is, and what writes such a file; None where it is none."""
    if isinstance(half, torch.jit.ScriptModule):
        return "TorchScript", "torch.jit.save"
    loaded = isinstance(half, torch.fx.GraphModule) and "eval" in vars(half)  # which refuses to be called
    if loaded or isinstance(half, torch.export.ExportedProgram):
        return "torch.export", "torch.export.save"
    return None
