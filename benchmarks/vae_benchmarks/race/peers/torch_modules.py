"""The case's own torch modules, as they are and compiled."""

from __future__ import annotations

import copy
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vae_runtime.manifest import HALF_NAMES, INPUT, LOGVAR, MEAN, RECONSTRUCTION
from vae_runtime.preprocess import Float32

from ...worker import tile
from ..case import Case
from ..entrant import CannotRunError, Entrant, within_tolerance
from .choice import fastest
from .torch_compile import compile_module, why_not_compile

Arrays = tuple[Float32, ...]
Call = Callable[[Float32], Arrays]


def open_entrant(case: Case, batch: int, threads: int, compiled: bool) -> Entrant:
    """The modules in evaluation mode, `threads` intra-op threads and one inter-op thread.

    Eager modules run under `inference_mode`; those with images are tried in both memory layouts, and each half keeps
    the faster one. Compiled modules are those of `torch_compile.compile_module`, for exactly this batch size, as one
    graph each, under `no_grad`: convolutions whose weights are not frozen are several times slower. The compiler
    chooses the layout. Compiling needs a C++ compiler.
    """
    torch, folder = import_torch(case)
    if compiled and (reason := why_not_compile("cpu")) is not None:
        raise CannotRunError(reason)
    torch.set_num_threads(threads)
    torch.set_num_interop_threads(1)
    # For the rest of this process: entering it in every call would cost time.
    torch.set_grad_enabled(False) if compiled else torch.inference_mode().__enter__()
    open_half = _compile if compiled else _in_faster_layout
    (encoder_words, encoder), (decoder_words, decoder) = (
        open_half(*half) for half in load_halves(case, folder, batch, "fp32")
    )
    how = "torch.compile, dynamic=False, fullgraph=True, no_grad" if compiled else "eager, inference_mode"
    words = f"{how}, encoder {encoder_words}, decoder {decoder_words}"
    return Entrant(
        encode=encoder,
        decode=decoder,
        precisions=("fp32",),
        engine=f"torch {torch.__version__}",
        configuration=f"{words}, {threads} threads",
    )


def import_torch(case: Case) -> tuple[Any, Path]:
    """torch, and the folder of a case's modules.

    Raises:
        CannotRunError: one of them is not there.
    """
    if case.torch is None:
        raise CannotRunError("a bundle alone has no torch modules; build a case for it")
    try:
        import torch
    except ImportError:
        raise CannotRunError('torch is not installed; pip install "vae-edge[train]"') from None
    return torch, case.torch


class TorchHalf(NamedTuple):
    """A half as torch runs it. module: ready to run, on the CPU. example: its input. is_right: whether outputs for that
    are as near to the reference as the race asks for."""

    module: Any
    example: Float32
    is_right: Callable[[Arrays], bool]


def load_halves(case: Case, folder: Path, batch: int, precision: str) -> tuple[TorchHalf, TorchHalf]:
    """The encoder and the decoder of a case whose modules lie in `folder`. This runs the case's modules.py."""
    reference = {name: tile(array, batch) for name, array in case.reference().items()}
    latents = [name for name in (MEAN, LOGVAR) if name in reference]
    encoder, decoder = load_modules(folder, case.facts.name)
    return (
        TorchHalf(encoder, reference[INPUT], within_tolerance(reference, latents, precision)),
        TorchHalf(decoder, reference[MEAN], within_tolerance(reference, [RECONSTRUCTION], precision)),
    )


def load_modules(folder: Path, name: str) -> tuple[Any, Any]:
    """The encoder and the decoder of a case, with their weights, ready to run."""
    import json

    import torch

    spec = importlib.util.spec_from_file_location(f"modules_of_{name}", folder / "modules.py")
    if spec is None or spec.loader is None or not (folder / "modules.py").is_file():
        raise CannotRunError(f"{folder / 'modules.py'} cannot be loaded")
    modules = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = modules  # torch.compile looks a function's module up by its name
    spec.loader.exec_module(modules)
    architecture = json.loads((folder.parent / "case.json").read_bytes())["architecture"]
    halves = modules.build(architecture["name"], **architecture["arguments"])
    weights = torch.load(folder / "weights.pt", map_location="cpu", weights_only=True)
    for half, part in zip(halves, HALF_NAMES, strict=True):
        half.load_state_dict(weights[part])
        half.eval().requires_grad_(False)
    encoder, decoder = halves
    return encoder, decoder


def _call(module: Any, channels_last: bool = False) -> Call:
    import torch

    from_numpy, layout = torch.from_numpy, torch.channels_last

    def call(array: Float32) -> Arrays:
        given = from_numpy(array)
        out = module(given.to(memory_format=layout) if channels_last else given)
        return tuple(map(_to_numpy, out)) if isinstance(out, tuple) else (_to_numpy(out),)

    return call


def _to_numpy(tensor: Any) -> Float32:
    array: Float32 = np.ascontiguousarray(tensor.numpy())
    return array


def _in_faster_layout(module: Any, example: Float32, is_right: Callable[[Arrays], bool]) -> tuple[str, Call]:
    """The call in the faster one of torch's two layouts, and that layout's name."""
    import torch

    ways = {"contiguous": lambda: _call(module)}
    if any(part.ndim == 4 for part in module.parameters()):
        turned = copy.deepcopy(module).to(memory_format=torch.channels_last)
        ways["channels_last"] = lambda: _call(turned, channels_last=example.ndim == 4)
    return fastest(ways, example, is_right)


def _compile(module: Any, example: Float32, is_right: Callable[[Arrays], bool]) -> tuple[str, Call]:
    return compile_module(module, None, _call, lambda call: is_right(call(example)))
