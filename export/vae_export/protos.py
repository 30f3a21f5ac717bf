"""What every edit of an ONNX graph needs of its protocol buffers."""

from __future__ import annotations

from typing import Any

import onnx
from onnx import helper


def to_bytes(model: onnx.ModelProto) -> bytes:
    """The file of a model; equal models give equal bytes."""
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """The attributes that a node has, by name; those left at their defaults are not there."""
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def drop_unread_constants(graph: onnx.GraphProto) -> None:
    """Remove the initializers that no node reads and that are no output of the graph; in place."""
    read = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    for position in reversed(range(len(graph.initializer))):
        if graph.initializer[position].name not in read:
            del graph.initializer[position]
