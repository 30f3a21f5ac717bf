"""The case's own torch modules, as they are and compiled."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from vae_runtime.preprocess import Float32

from ...worker import tile
from ..case import Case
from ..entrant import CannotRunError, Entrant
from .choice import typical_seconds

_TRIAL_CALLS = 7


def open_entrant(case: Case, batch: int, threads: int, compiled: bool) -> Entrant:
    """The modules in evaluation mode, `threads` intra-op threads and one inter-op thread.

    Eager modules run under `inference_mode`; those with images are tried in both memory layouts, and each half keeps
    the faster one. Compiled modules go through `torch.compile` for exactly this batch size, as one graph each, with the
    weights frozen into it (`torch._inductor.config.freezing`), so that BatchNorm folds away and weights are packed
    beforehand; the compiler chooses the layout. A half whose frozen graph computes something else than the module is
    compiled without freezing. They run under `no_grad`, since freezing silently does nothing under `inference_mode`,
    which makes convolutions several times slower. Compiling needs a C++ compiler.
    """
    if case.torch is None:
        raise CannotRunError("a bundle alone has no torch modules; build a case for it")
    try:
        import torch
    except ImportError:
        raise CannotRunError("torch is not installed; pip install 'vae-edge[train]'") from None
    if compiled and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++", "cl"))):
        raise CannotRunError("torch.compile needs a C++ compiler, and there is none")
    torch.set_num_threads(threads)
    torch.set_num_interop_threads(1)
    # For the rest of this process: entering it in every call would cost time.
    torch.set_grad_enabled(False) if compiled else torch.inference_mode().__enter__()
    encoder, decoder = load_modules(case.torch, case.facts.name)
    reference = case.reference()
    x, z = (tile(reference[name], batch) for name in ("x", "mean"))
    if compiled:
        found = [_compile(half, example) for half, example in ((encoder, x), (decoder, z))]
        halves = [call for _, call in found]
        words = f"torch.compile, dynamic=False, fullgraph=True, no_grad, encoder {found[0][0]}, decoder {found[1][0]}"
    else:
        chosen = [_in_faster_layout(half, example) for half, example in ((encoder, x), (decoder, z))]
        halves = [call for _, call in chosen]
        words = f"eager, inference_mode, encoder {chosen[0][0]}, decoder {chosen[1][0]}"
    return Entrant(
        encode=halves[0],
        decode=halves[1],
        precisions=("fp32",),
        engine=f"torch {torch.__version__}",
        configuration=f"{words}, {threads} threads",
    )


def load_modules(folder: Path, name: str) -> tuple[Any, Any]:
    """The encoder and the decoder of a case, with their weights, ready to run. This runs the case's modules.py."""
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
    for half, part in zip(halves, ("encoder", "decoder"), strict=True):
        half.load_state_dict(weights[part])
        half.eval().requires_grad_(False)
    encoder, decoder = halves
    return encoder, decoder


def _call(module: Any, channels_last: bool = False) -> Callable[[Float32], tuple[Float32, ...]]:
    import torch

    from_numpy, layout = torch.from_numpy, torch.channels_last

    def call(array: Float32) -> tuple[Float32, ...]:
        given = from_numpy(array)
        out = module(given.to(memory_format=layout) if channels_last else given)
        return tuple(map(_to_numpy, out)) if isinstance(out, tuple) else (_to_numpy(out),)

    return call


def _to_numpy(tensor: Any) -> Float32:
    array: Float32 = np.ascontiguousarray(tensor.numpy())
    return array


def _in_faster_layout(module: Any, example: Float32) -> tuple[str, Callable[[Float32], tuple[Float32, ...]]]:
    """The call in the faster one of torch's two layouts, and that layout's name."""
    import copy

    import torch

    candidates = {"contiguous": _call(module)}
    if any(part.ndim == 4 for part in module.parameters()):
        turned = copy.deepcopy(module).to(memory_format=torch.channels_last)
        candidates["channels_last"] = _call(turned, channels_last=example.ndim == 4)
    seconds = {name: typical_seconds(call, example, _TRIAL_CALLS) for name, call in candidates.items()}
    fastest = min(seconds, key=lambda name: seconds[name])
    return fastest, candidates[fastest]


def _compile(module: Any, example: Float32) -> tuple[str, Callable[[Float32], tuple[Float32, ...]]]:
    """The compiled call, frozen where that is right, and in words whether it is."""
    import copy

    import torch
    import torch._inductor.config

    expected = _call(module)(example)
    for words in ("frozen", "not frozen, which would change its outputs"):
        # The flag counts when the first call compiles; a copy, because what is compiled already is kept by module.
        torch._inductor.config.freezing = words == "frozen"
        call = _call(torch.compile(copy.deepcopy(module), dynamic=False, fullgraph=True))
        found = call(example)
        if all(np.allclose(one, other, rtol=1e-3, atol=1e-4) for one, other in zip(found, expected, strict=True)):
            break
    return words, call
