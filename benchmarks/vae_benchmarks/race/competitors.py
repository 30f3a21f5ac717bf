"""Who races, by name, and the module that opens each in a worker process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vae_runtime.arguments import check_choice
from vae_runtime.errors import InputError

OURS = "ours"


@dataclass(frozen=True)
class Competitor:
    """One competitor.

    module: of `vae_benchmarks.race.peers`, or the path of a Python file; it has a function `open_entrant`.
    options: its further arguments. is_peer: not vae-edge itself. group: whom it is compared with, those of the same
    group: on a GPU the precision, "" for all on the CPU. compiles: opening it leaves in its folder for temporary files
    what makes the next opening of the same one quicker.
    """

    name: str
    module: str
    options: dict[str, Any] = field(default_factory=dict)
    is_peer: bool = True
    group: str = ""
    compiles: bool = False


COMPETITORS: dict[str, Competitor] = {
    one.name: one
    for one in (
        Competitor(OURS, "ours", {"device": "auto", "precision": "auto"}, is_peer=False),
        Competitor("ours-cpu", "ours", {"device": "cpu", "precision": "auto"}, is_peer=False),
        Competitor("ours-fp32", "ours", {"device": "cpu", "precision": "fp32"}, is_peer=False),
        Competitor("ours-int8", "ours", {"device": "cpu", "precision": "int8"}, is_peer=False),
        Competitor("onnxruntime", "bare_onnxruntime"),
        Competitor("torch", "torch_modules", {"compiled": False}),
        Competitor("torch-compile", "torch_modules", {"compiled": True}),
        Competitor("openvino-f32", "native_openvino", {"precision": "f32"}),
        Competitor("openvino-bf16", "native_openvino", {"precision": "bf16"}),
        Competitor("openvino-int8", "native_openvino", {"precision": "int8"}),
    )
}


TORCH = "torch"
_TORCH_VARIANTS = {
    TORCH: "eager",
    "torch-compile": "compile",
    "torch-reduce-overhead": "reduce-overhead",
    "torch-graph": "graph",
}
TORCH_MODES = {"compile": None, "reduce-overhead": "reduce-overhead"}  # of torch.compile, by variant
_BETWEEN = "-cuda-"


def competitors_on(device: str) -> dict[str, Competitor]:
    """Those of a race on a GPU, by name, each on `device`: there "cuda"; "cpu" runs the same code without a GPU."""
    found = {}
    for precision in ("fp32", "tf32", "fp16"):
        engines: dict[str, tuple[str, dict[str, Any]]] = {OURS: ("ours", {"resident": True})}
        engines |= {engine: ("torch_device", {"variant": variant}) for engine, variant in _TORCH_VARIANTS.items()}
        if precision != "fp16":  # the plain export is float32
            engines["onnxruntime"] = "onnxruntime_device", {}
        for engine, (module, more) in engines.items():
            name, options = f"{engine}{_BETWEEN}{precision}", {"device": device, "precision": precision, **more}
            compiles = options.get("variant") in TORCH_MODES
            found[name] = Competitor(name, module, options, engine != OURS, precision, compiles)
    return found


CUDA_COMPETITORS = competitors_on("cuda")


def ours_of(group: str) -> str:
    """Who stands for vae-edge in a group."""
    return f"{OURS}{_BETWEEN}{group}" if group else OURS


def choose_reference(ours: Sequence[str], group: str) -> str | None:
    """Against whom a group is compared: `ours_of` it, or else the first of vae-edge's own there; None where there is
    none. ours: those, in their order."""
    return ours_of(group) if ours_of(group) in ours else next(iter(ours), None)


def engine_of(name: str) -> str:
    """A competitor's name without the device and the precision: "torch-graph-cuda-fp32" -> "torch-graph"."""
    return name.partition(_BETWEEN)[0]


def choose_competitors(names: Sequence[str], device: str = "cpu") -> tuple[Competitor, ...]:
    """The competitors of these names, in this order, from those of a race on `device`.

    Raises:
        InputError: an unknown name, or the same one twice.
    """
    known = COMPETITORS if device == "cpu" else CUDA_COMPETITORS
    for name in names:
        check_choice(name, "competitor", known)
        if list(names).count(name) > 1:
            raise InputError(f"competitor {name!r} is named twice")
    return tuple(known[name] for name in names)
