"""fp16 for one half: float16 inside, float32 at the boundary and wherever float16 would overflow; on demand also as far
as the second layer, so that the input itself is not rounded.

onnxruntime has no float16 kernels for most CPUs, and on ARM64 other than Apple's only some: it computes in float32 and
would hide an overflow. So there are two graphs: the one that ships, and its twin for measuring, in float32, with every
weight and every result rounded to float16 as a GPU rounds them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization.onnx_model import ONNXModel
from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

from vae_runtime.preprocess import Float32

from .activation_ranges import activation_ranges
from .graphs import plain, with_node_names
from .halves import ReducedHalf
from .layers import WEIGHTED, after_the_last, before_the_second
from .protos import to_bytes
from .tf32 import with_exact_first_layer

MAX_FLOAT16 = float(np.finfo(np.float16).max)
MARGIN = 4.0  # by which activations may exceed those of the calibration examples
LOST_WEIGHT = 1e-2  # of a weight's norm; more is lost only where values lie below float16's smallest
FLOAT_OPERATORS = (
    *DEFAULT_OP_BLOCK_LIST,
    *("Softmax", "Exp", "Pow", "ReduceSum", "ReduceMean", "ReduceL2"),
    *("Div", "Reciprocal", "Sqrt", "Log"),  # what guards them against 0, such as 1e-8, is 0 in float16
    *("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"),  # a value below a threshold may be rounded to it
    "Celu",  # ONNX has it for float32 alone
)
MOVES = ("Expand", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")


class ConvertibleGraph:
    """One half in fp32, with its activations over the inputs `x` measured once, and its forms in fp16."""

    def __init__(self, graph: bytes, x: Float32) -> None:
        self._model = _inferred(graph)
        self._unsafe = set(_unsafe(self._model, x))

    def build(self, *, keep_first: bool = False) -> ReducedHalf:
        """The half in fp16, without a graph where no layer can be in float16.

        What float16 would overflow in, or lose the weights of, stays in fp32. keep_first: everything before the second
        layer with weights too, and the first is exact in TF32 as well, which a GPU takes for what is in fp32.

        A flat image is a large value with small differences, of which float16's 11 bits leave few. A normalisation
        after the first layer enlarges them, and with them how the image, and what that layer gives, are rounded.
        """
        model, chosen = self._model, set(self._unsafe)
        if keep_first:
            chosen.update(node.name for node in before_the_second(model.graph))
        kept = [node.name for node in model.graph.node if node.name in chosen]
        if keep_first:
            model = _inferred(with_exact_first_layer(model.SerializeToString())[0])
            chosen.update(node.name for node in before_the_second(model.graph))  # and what splits its factors
        graph = model.graph
        in_float = {*chosen, *(node.name for node in after_the_last(graph)), *_in_float32(graph)}
        blocked = in_float | _between(graph, in_float)
        if not any(node.op_type in WEIGHTED and node.name not in blocked for node in graph.node):
            return ReducedHalf(None, None, kept)
        converted = _convert(model, blocked)
        return ReducedHalf(converted, _twin(converted), kept)


def _inferred(graph: bytes) -> onnx.ModelProto:
    return with_node_names(onnx.shape_inference.infer_shapes(onnx.load_from_string(graph)))


def _in_float32(graph: onnx.GraphProto) -> Iterator[str]:
    """Nodes that are never in float16; with what moves a quotient, or multiplies by it, which may be beyond its range,
    and with what computes sizes and positions, of which it holds whole numbers up to 2,048."""
    quotients: set[str] = set()
    values = {value.name for value in graph.input}
    for node in graph.node:
        carries = node.op_type in ("Mul", *MOVES) and not quotients.isdisjoint(node.input)
        of_values = node.op_type not in ("Shape", "Size") and not values.isdisjoint(node.input)
        if node.op_type in FLOAT_OPERATORS or carries or not of_values:
            yield node.name
        if of_values:
            values.update(node.output)
        if node.op_type in ("Div", "Pow", "Reciprocal") or carries:
            quotients.update(node.output)


def _between(graph: onnx.GraphProto, in_float: set[str]) -> set[str]:
    """Nodes that only move what comes from nodes in fp32, or from outside, to nodes in fp32."""
    made_by = {name: node.name for node in graph.node for name in node.output}
    neighbours = {node.name: {made_by.get(node.input[0], node.name)} for node in graph.node if node.op_type in MOVES}
    for node in graph.node:
        for maker in {made_by.get(name) for name in node.input} & neighbours.keys():
            neighbours[maker].add(node.name)
    moves = set(neighbours)
    while True:
        stay = in_float | moves
        if not (lost := {name for name in moves if not neighbours[name] <= stay}):
            return moves
        moves -= lost


def _unsafe(model: onnx.ModelProto, x: Float32) -> list[str]:
    """Nodes that read or write values near float16's limit, or whose weights float16 does not hold."""
    ranges = activation_ranges(model, x)
    wide = {name for name in ranges.keys() if _largest(ranges[name]) * MARGIN > MAX_FLOAT16}  # noqa: SIM118
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    wide |= {name for name, value in constants.items() if value.dtype == np.float32 and not _fits(value)}
    return [node.name for node in model.graph.node if not wide.isdisjoint((*node.input, *node.output))]


def _largest(data: object) -> float:
    low, high = data.range_value  # type: ignore[attr-defined]
    return float(max(abs(np.min(low)), abs(np.max(high))))


def _fits(weight: Float32) -> bool:
    with np.errstate(over="ignore"):
        rounded = weight.astype(np.float16).astype(np.float32)
    if not np.isfinite(rounded).all():
        return False
    return bool(np.linalg.norm(rounded - weight) <= LOST_WEIGHT * np.linalg.norm(weight))


def _convert(model: onnx.ModelProto, blocked: Collection[str]) -> bytes:
    converted = convert_float_to_float16(
        model, keep_io_types=True, op_block_list=FLOAT_OPERATORS, node_block_list=sorted(blocked)
    )
    _drop_round_trips(converted.graph, {node.name for node in model.graph.node})
    sorted_model = ONNXModel(converted)
    sorted_model.topological_sort()
    return to_bytes(plain(sorted_model.model))


def _drop_round_trips(graph: onnx.GraphProto, of_before: set[str]) -> None:
    """Between two nodes in fp32 the converter goes through float16, where a value may overflow; once per reader.

    of_before: the nodes that it has not added: a Cast among them is of integers or booleans, say, and is still needed.
    """
    nodes = list({node.output[0]: node for node in graph.node}.values())
    made_by = {name: node for node in nodes for name in node.output}
    outputs = {value.name for value in graph.output}
    names: dict[str, str] = {}
    for node in nodes:
        narrow = made_by.get(node.input[0]) if _casts_to(node, TensorProto.FLOAT) else None
        if narrow is not None and _casts_to(narrow, TensorProto.FLOAT16):
            if narrow.name in of_before:
                node.input[0] = narrow.input[0]
                continue
            source, result = narrow.input[0], node.output[0]
            names |= {source: result} if result in outputs else {result: source}
            node.output[0] = ""
    nodes = [node for node in nodes if list(node.output) != [""]]
    for node in nodes:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    read = {name for node in nodes for name in node.input} | outputs
    del graph.node[:]
    graph.node.extend(node for node in nodes if not read.isdisjoint(node.output))


def _casts_to(node: onnx.NodeProto, kind: int) -> bool:
    return node.op_type == "Cast" and node.attribute[0].i == kind


def _twin(converted: bytes) -> bytes:
    """The same computation in float32, in which whatever was float16 is rounded to it."""
    model = onnx.shape_inference.infer_shapes(onnx.load_from_string(converted), strict_mode=True)
    graph = model.graph
    narrow = {value.name for value in graph.value_info if value.type.tensor_type.elem_type == TensorProto.FLOAT16}
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT16:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
    nodes = []
    for node in graph.node:
        rounded = [name for name in node.output if name in narrow]
        node.output[:] = [f"{name}_unrounded" if name in narrow else name for name in node.output]
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.i == TensorProto.FLOAT16:
                attribute.i = TensorProto.FLOAT
        nodes.append(node)
        for name in rounded:
            nodes.append(helper.make_node("Cast", [f"{name}_unrounded"], [f"{name}_float16"], to=TensorProto.FLOAT16))
            nodes.append(helper.make_node("Cast", [f"{name}_float16"], [name], to=TensorProto.FLOAT))
    del graph.node[:]
    graph.node.extend(nodes)
    return to_bytes(plain(model))
