"""Forms of a float32 graph that onnxruntime's CUDA provider computes faster; on a CPU they are no faster.

What they take on an H100 and an H200, relative to what was there: benchmarks/results/gpu/README.md.

`take_bias_out`     A convolution's bias as an addition, for which onnxruntime's kernel takes less time than cuDNN's.
                    onnxruntime itself makes a bias of it again where it is not told otherwise, but for a transposed
                    convolution, whose bias it refuses with `fuse_conv_bias`.
`normalise_as_one`  GroupNorm's groups, of all examples, as the channels of a single one. For one example onnxruntime
                    has cuDNN normalise, which is one kernel; for more it takes cuDNN's statistics alone, and a kernel
                    and four clearings of memory beside it.

A form that does not certainly give the same result is not taken, as in `rewrite`. Nor is a transposed convolution in
the place of nearest upsampling and a convolution: cuDNN's is faster, and adds up in another order at every call.
"""

from __future__ import annotations

import math

import numpy as np
import onnx
from onnx import helper

from .graphs import plain
from .onnx_graph import Graph
from .protos import drop_unread_constants, to_bytes


def for_cuda(graph: bytes) -> bytes | None:
    """The same graph in these forms; None where there is nothing that has another one."""
    model = onnx.load_from_string(graph)
    editor = Graph(model)
    changed = [take_bias_out(editor, node) for node in list(model.graph.node)]
    if not any([*changed, normalise_as_one(editor)]):
        return None
    drop_unread_constants(model.graph)
    return to_bytes(plain(model))


def take_bias_out(graph: Graph, node: onnx.NodeProto) -> bool:
    """A convolution with a bias: one without, and an addition."""
    if node.op_type not in ("Conv", "ConvTranspose") or len(node.input) < 3:
        return False
    kernel, bias = graph.constant(node.input[1]), graph.weights(node.input[2])
    if kernel is None or bias is None:
        return False
    summand = graph.add_constant(node.input[2], bias.reshape(-1, *(1,) * (kernel.ndim - 2)))
    output, bare = node.output[0], graph.free_name(f"{node.output[0]}.products")
    del node.input[2:]
    node.output[0] = bare
    graph.insert_after(node, helper.make_node("Add", [bare, summand], [output]))
    return True


def normalise_as_one(graph: Graph) -> bool:
    """Maps of a known size -> Reshape to (N, G, ·) -> InstanceNormalization -> Reshape back: by (1, N · G, ·).

    N is taken to be the number of examples everywhere. Where it is not, the graph cannot be run.
    """
    found = [node for node in graph.proto.node if _normalises_groups(graph, node)]
    if not found:
        return False
    examples, rows = graph.free_name("examples"), graph.free_name("examples_1")
    one, flat = (graph.add_constant(name, np.array([value]), np.int64) for name, value in (("one", 1), ("flat", -1)))
    first = [
        helper.make_node("Shape", [graph.proto.input[0].name], [examples], start=0, end=1),
        helper.make_node("Concat", [examples, one], [rows], axis=0),
    ]
    repeated: dict[bytes, str] = {}  # by the values of one example: the name of those of all

    def repeat(name: str) -> str:
        values = graph.weights(name)
        assert values is not None
        key = values.tobytes()
        if key not in repeated:
            row = graph.add_constant(f"{name}_row", values[None])
            table, repeated[key] = graph.free_name(f"{name}_table"), graph.free_name(f"{name}_of_all")
            first.append(helper.make_node("Expand", [row, rows], [table]))
            first.append(helper.make_node("Reshape", [table, flat], [repeated[key]]))
        return repeated[key]

    for norm in found:
        before, after = graph.producer(norm.input[0]), graph.consumer(norm)
        assert before is not None
        assert after is not None
        (groups,), sides = graph.constant(norm.input[1]).shape, graph.shape(before.input[0])[1:]  # type: ignore[union-attr]
        size, name = math.prod(sides) // groups, norm.output[0]  # type: ignore[arg-type]
        before.input[1] = graph.add_constant(f"{name}.as_one", np.array([1, -1, size]), np.int64)
        after.input[1] = graph.add_constant(f"{name}.back", np.array([-1, *sides]), np.int64)
        norm.input[1:] = [repeat(part) for part in norm.input[1:]]
    for node in reversed(first):
        graph.proto.node.insert(0, node)
    return True


def _normalises_groups(graph: Graph, norm: onnx.NodeProto) -> bool:
    """Whether it is the heart of a GroupNorm of maps of a known size, as the exporter writes one."""
    before, after = graph.producer(norm.input[0]), graph.consumer(norm)
    if norm.op_type != "InstanceNormalization" or before is None or after is None:
        return False
    if before.op_type != "Reshape" or after.op_type != "Reshape" or graph.consumer(before) is not norm:
        return False
    scale, bias = (graph.weights(name) for name in norm.input[1:])
    to_groups, back = (graph.constant(node.input[1]) for node in (before, after))
    sides = graph.shape(before.input[0])[1:]
    if scale is None or bias is None or to_groups is None or back is None or len(sides) < 2 or None in sides:
        return False
    return to_groups.tolist() == [0, len(scale), -1] and tuple(back[1:].tolist()) == sides
