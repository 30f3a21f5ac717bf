"""The case's own torch modules on a GPU: eager, compiled without and with CUDA graphs, and captured by hand."""

from __future__ import annotations

import contextlib
import importlib.util
from typing import Any

from ..case import Case
from ..competitors import TORCH_MODES
from ..entrant import CannotRunError, Entrant, Resident
from .torch_compile import why_not_compile
from .torch_modules import import_torch, load_halves


def load(device: str, variant: str, **options: Any) -> None:
    """Import torch, for a compiled variant its compiler too, and start CUDA. Where one of them cannot be had,
    `open_entrant` says why. options: its others."""
    with contextlib.suppress(ImportError):
        import torch

        from . import torch_halves

        if _why_not(torch, device, variant) is None:
            torch_halves.start(device, variant)


def open_entrant(case: Case, batch: int, threads: int, device: str, precision: str, variant: str) -> Entrant:
    """The modules in evaluation mode on `device`, with cuDNN's benchmark mode, for exactly this batch size.

    precision: "fp32" with TF32 off in matrix products and convolutions, "tf32" with it on, "fp16" with weights and
    arithmetic in half precision; inputs and outputs are float32 in all of them, converted on the device. That is faster
    than autocast, which converts at every layer.
    variant: "eager" runs under `inference_mode`. "compile" and "reduce-overhead" are `torch.compile` in its default
    mode and in that one, with static shapes, as one graph each, under `no_grad`, with frozen weights where that works
    and changes nothing. "graph" captures the eager module into a `torch.cuda.CUDAGraph`.

    Modules with images are tried in both memory layouts, save compiled ones, whose compiler chooses. From host memory
    and to it, several ways of staging the copies are tried, see `torch_halves`. Each half keeps its fastest, for calls
    from host memory and on the device separately. device "cpu" runs the same code without a GPU.
    """
    torch, folder = import_torch(case)
    if (reason := _why_not(torch, device, variant)) is not None:
        raise CannotRunError(reason)
    from . import torch_halves

    torch.set_num_threads(threads)
    torch.set_num_interop_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.benchmark = True
    # For the rest of this process: entering it in every call would cost time. Compiled modules are not frozen under
    # inference_mode.
    torch.set_grad_enabled(False) if variant in TORCH_MODES else torch.inference_mode().__enter__()
    encoder, decoder = (
        torch_halves.open_half(*half, device, precision, variant)
        for half in load_halves(case, folder, batch, precision)
    )
    torch_halves.release_memory()
    on_gpu = f", CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}" if device == "cuda" else ""
    return Entrant(
        encode=encoder.from_host,
        decode=decoder.from_host,
        precisions=(precision,),
        engine=f"torch {torch.__version__}{on_gpu}",
        configuration=f"{variant}, encoder ({encoder.words}), decoder ({decoder.words}), host threads={threads}",
        resident=Resident(
            put=lambda array: torch_halves.to_device(array, device),
            encode=encoder.on_device,
            decode=decoder.on_device,
            arrays=torch_halves.to_arrays,
        ),
    )


def _why_not(torch: Any, device: str, variant: str) -> str | None:
    if device == "cuda":
        if torch.version.cuda is None:
            return f"torch {torch.__version__} is built without CUDA"
        if not torch.cuda.is_available():
            return f"torch {torch.__version__} sees no GPU"
    elif variant == "graph":
        return "a CUDA graph needs a GPU"
    if variant not in TORCH_MODES:
        return None
    if device == "cuda" and importlib.util.find_spec("triton") is None:
        return "torch.compile needs triton on a GPU, which is not installed"
    return why_not_compile(device)
