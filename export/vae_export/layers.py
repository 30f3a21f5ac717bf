"""Where the layers with weights are in a graph: what lies before the second one, and what comes after the last."""

from __future__ import annotations

from collections.abc import Iterator

import onnx

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def before_the_second(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """What depends on the input through one layer with weights at most."""
    layers = {graph.input[0].name: 0}  # with weights, on the longest way from the input to a value
    for node in graph.node:
        before = [layers[name] for name in node.input if name in layers]
        if before:
            count = max(before) + (node.op_type in WEIGHTED)
            layers |= dict.fromkeys(node.output, count)
            if count <= 1:
                yield node


def after_the_last(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """The sigmoid or clip that gives an image, the clip of logvar, and the like."""
    made_by = {name: node for node in graph.node for name in node.output}
    open_names = [value.name for value in graph.output]
    found = set()
    while open_names:
        node = made_by.get(open_names.pop())
        if node is not None and node.op_type not in WEIGHTED and node.name not in found:
            found.add(node.name)
            open_names.extend(node.input)
            yield node
