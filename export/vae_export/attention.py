"""Scaled dot-product attention, of which torch.onnx knows tensors of four axes alone: (batch, heads, length, width)."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
_UNSQUEEZE, _SQUEEZE = torch.ops.aten.unsqueeze.default, torch.ops.aten.squeeze.dim
_AXES = 4


def with_four_axes(traced: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The same program, in which attention without an axis for heads, or for the batch, has one of size 1 in front; it
    is changed in place. A mask needs none: it is broadcast."""
    for node in traced.graph.find_nodes(op="call_function", target=_ATTENTION):
        if (missing := _AXES - node.args[0].meta["val"].dim()) > 0:
            _widen(traced, node, missing)
    traced.graph_module.recompile()
    return traced


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
