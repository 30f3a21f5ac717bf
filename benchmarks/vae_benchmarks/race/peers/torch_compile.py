"""`torch.compile` as its best users would set it up, on the CPU and on a GPU. Torch is imported when it is called."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable
from typing import Any, TypeVar

_Call = TypeVar("_Call")


def why_not_compile(device: str) -> str | None:
    """Why there is no compiling for "cpu" or "cuda", in words. On a GPU torch compiles what launches the kernels, else
    the kernels themselves."""
    language, asked, names = (
        ("C", "CC", ("gcc", "clang")) if device == "cuda" else ("C++", "CXX", ("g++", "clang++", "cl"))
    )
    if any(map(shutil.which, (os.environ.get(asked, names[0]), *names))):
        return None
    return f"torch.compile needs a {language} compiler, and there is none"


def compile_module(
    module: Any, mode: str | None, wrap: Callable[[Any], _Call], is_right: Callable[[_Call], bool]
) -> tuple[str, _Call]:
    """The call of the compiled module, with its weights frozen where that works and is right, and in words whether they
    are.

    Freezing folds BatchNorm away and packs weights beforehand. It silently does nothing under `inference_mode`, so
    under `no_grad`. mode: of `torch.compile`. wrap: makes the call of the compiled module. is_right: makes the first
    calls, which compile, and tells whether their outputs are right; asked of the frozen one.
    """
    import torch
    import torch._inductor.config

    words = ""
    for frozen in (True, False):
        # The flag counts when the first call compiles; a copy, because what is compiled already is kept by module.
        torch._inductor.config.freezing = frozen
        # Who compiles the same thing again, in another process, takes its code from the cache, but measures himself
        # which of several kernels is fastest.
        torch._inductor.config.autotune_local_cache = False
        call = wrap(torch.compile(copy.deepcopy(module), dynamic=False, fullgraph=True, mode=mode))
        try:
            if is_right(call) or not frozen:
                break
            words = "not frozen, which would change its outputs"
        except Exception as error:
            if not frozen:
                raise
            words = f"not frozen, which failed with {type(error).__name__}"
    return words or "frozen", call
