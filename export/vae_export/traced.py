"""Traced programs in the form that torch.onnx exports, or exports best."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import Graph, Node

_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
_UNSQUEEZE, _SQUEEZE = torch.ops.aten.unsqueeze.default, torch.ops.aten.squeeze.dim
_NEAREST_EXACT, _NEAREST = torch.ops.aten._upsample_nearest_exact2d.vec, torch.ops.aten.upsample_nearest2d.vec
_AXES = 4


def prepared(traced: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The same program, changed in place.

    Attention without an axis for heads, or for the batch, gets one of size 1 in front, as torch.onnx knows tensors of
    (batch, heads, length, width) alone; a mask needs none, as it is broadcast. The mode "nearest-exact" of upsampling,
    of which an export would gather pixel by pixel, becomes "nearest" where these are the same.
    """
    for node in traced.graph.find_nodes(op="call_function", target=_ATTENTION):
        axes = {tensor.meta["val"].dim() for tensor in node.args[:3]}
        if len(axes) == 1 and (missing := _AXES - axes.pop()) > 0:
            _widen(traced, node, missing)
    for node in traced.graph.find_nodes(op="call_function", target=_NEAREST_EXACT):
        if node.args[2] is not None and all(map(_is_power_of_two, node.args[2])):
            node.target = _NEAREST
    traced.graph_module.recompile()
    return traced


def _is_power_of_two(scale: float) -> bool:
    """From 1 on. Of such, floor((i + 1/2) / scale) is floor(i / scale), also as torch rounds them."""
    return scale >= 1 and math.frexp(scale)[0] == 0.5


def _widen(traced: torch.export.ExportedProgram, node: Node, missing: int) -> None:
    graph = traced.graph
    for position, tensor in enumerate(node.args[:3]):
        assert isinstance(tensor, Node)
        for _ in range(missing):
            with graph.inserting_before(node):
                tensor = _call(graph, _UNSQUEEZE, tensor)
        node.update_arg(position, tensor)
    users, result = list(node.users), node
    for _ in range(missing):
        node.meta["val"] = node.meta["val"].unsqueeze(0)
    for _ in range(missing):
        with graph.inserting_after(result):
            result = _call(graph, _SQUEEZE, result)
    for user in users:
        user.replace_input_with(node, result)
    traced.graph_signature.replace_all_uses(node.name, result.name)  # where it is an output


def _call(graph: Graph, operator: Any, tensor: Node) -> Node:
    """An operator on the first axis."""
    made = graph.call_function(operator, (tensor, 0))
    made.meta["val"] = operator(tensor.meta["val"], 0)
    return made
