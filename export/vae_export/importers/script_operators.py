"""What torch.onnx's older exporter does not know of TorchScript's operators: `aten::unflatten`, which every
nn.MultiheadAttention has, leaves a tensor there whose rank is forgotten, and what comes next needs it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.onnx import symbolic_helper

from ..graphs import OPSET

_UNFLATTEN = "aten::unflatten"
FAST_PATHS = ("_native_multi_head_attention", "_transformer_encoder_layer_fwd")  # of attention; ONNX has no such thing


@contextlib.contextmanager
def known_operators() -> Iterator[None]:
    """Inside the block the exporter has a translation of our own, and does not print the graph where it fails, which it
    does below Python's sys.stdout."""
    log = torch._C._jit_onnx_log
    torch._C._jit_onnx_log = _say_nothing
    torch.onnx.register_custom_op_symbolic(_UNFLATTEN, _unflatten, OPSET)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.onnx.unregister_custom_op_symbolic(_UNFLATTEN, OPSET)  # type: ignore[attr-defined]
        torch._C._jit_onnx_log = log


def _say_nothing(*parts: Any) -> None:
    pass


@symbolic_helper.parse_args("v", "i", "v")
def _unflatten(graph: Any, x: Any, axis: int, sizes: Any) -> Any:
    """`x` with one axis replaced by several; the bounds are constants, by which the rank is seen."""

    def constant(value: int) -> Any:
        return graph.op("Constant", value_t=torch.tensor([value]))

    rank = x.type().dim()
    axis %= rank
    shape = graph.op("Shape", x)
    before = graph.op("Slice", shape, constant(0), constant(axis))
    after = graph.op("Slice", shape, constant(axis + 1), constant(rank))
    return graph.op("Reshape", x, graph.op("Concat", before, sizes, after, axis_i=0))


def find_cure(error: str, program: torch.jit.ScriptModule | None) -> str:
    """Another way to the same network, which most likely works where the exporter failed with this error.

    program: None where there is none yet.
    """
    if any(name in error for name in FAST_PATHS):
        return "trace it again after torch.backends.mha.set_fastpath_enabled(False)"
    graph = "" if program is None else str(program.inlined_graph)
    frozen = program is not None and next(program.parameters(), None) is None
    if frozen or "prim::If" in graph or "prim::Loop" in graph:
        return "a program saved from torch.jit.trace, not frozen, most likely can"
    return "a torch.export program, a factory or an ONNX file of the same network most likely can"
