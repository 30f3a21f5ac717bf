"""Who races, by name, and the module that opens each in a worker process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vae_runtime.errors import InputError

OURS = "ours"


@dataclass(frozen=True)
class Competitor:
    """One competitor.

    module: of `vae_benchmarks.race.peers`, or the path of a Python file; it has a function `open_entrant`.
    options: its further arguments. is_peer: not vae-edge itself.
    """

    name: str
    module: str
    options: dict[str, Any] = field(default_factory=dict)
    is_peer: bool = True


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


def choose_competitors(names: Sequence[str]) -> tuple[Competitor, ...]:
    """The competitors of these names, in this order.

    Raises:
        InputError: an unknown name, or the same one twice.
    """
    for name in names:
        if name not in COMPETITORS:
            raise InputError(f"competitor is {name!r}; expected one of {', '.join(COMPETITORS)}")
        if list(names).count(name) > 1:
            raise InputError(f"competitor {name!r} is named twice")
    return tuple(COMPETITORS[name] for name in names)
