"""Static int8 for one half: unsigned activations, signed weights of 7 bits per channel, QuantizeLinear pairs (QDQ).

x86 without VNNI adds two products of 8 × 8 bits in 16 bits, which saturates; with weights of 7 bits it cannot. What
onnxruntime computes fast in int8 is quantised: convolutions and products with constant weights, and the operators
between two of them, so that a chain stays in int8. A transposed convolution is slower in int8 and stays in fp32.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import onnx
from onnxruntime.quantization import QDQQuantizer, QuantType, quant_pre_process

from vae_runtime.preprocess import Float32

from .activation_ranges import activation_ranges
from .graphs import plain, with_node_names
from .protos import attributes, drop_unread_constants, to_bytes

QUANTIZED = ("Conv", "Gemm", "MatMul")  # where weights and bias are constants
FLOAT_RESULT = ("Gemm", "MatMul")  # onnxruntime's int8 kernels for these can give float32
BETWEEN = (
    "Add", "Clip", "Concat", "DepthToSpace", "Flatten", "MaxPool", "Relu", "Reshape", "Resize", "Slice", "Squeeze",
    "Transpose", "Unsqueeze",
)  # fmt: skip
ABSORBED = ("Clip", "Relu")  # become part of the range of a convolution's result


class QuantizableGraph:
    """One half in fp32, prepared to be quantised in any part.

    nodes: the names of what can be quantised, in the graph's order. examples: how many inputs calibrate it.
    """

    def __init__(self, graph: bytes, x: Float32) -> None:
        self._model, self._x = _prepare(graph), x
        self.examples = len(x)
        self._ranges: dict[str, Any] = {}
        self.nodes = [node.name for node in _quantizable(self._model.graph)]

    def build(self, nodes: Collection[str], method: str) -> bytes | None:
        """The graph with these nodes in int8, activations calibrated by `method`; None where there are none."""
        if not nodes:
            return None
        if method not in self._ranges:
            self._ranges[method] = activation_ranges(self._model, self._x, method)
        chosen = _with_chains(self._model.graph, nodes)
        quantizer = QDQQuantizer(
            copy.deepcopy(self._model),
            per_channel=True,
            reduce_range=True,
            weight_qType=QuantType.QInt8,
            activation_qType=QuantType.QUInt8,
            tensors_range=self._ranges[method],
            nodes_to_quantize=sorted(chosen),
            nodes_to_exclude=[],
            op_types_to_quantize=[*QUANTIZED, *BETWEEN],
            extra_options={},
        )
        quantizer.quantize_model()
        _keep_float_results(quantizer.model.model.graph, chosen)
        quantizer.model.topological_sort()  # as ONNX has it; onnxruntime alone takes any order
        return to_bytes(_finish(quantizer.model.model))


def _prepare(graph: bytes) -> onnx.ModelProto:
    """The graph with normalisation folded in, constants computed, shapes known, and a name for every node."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "graph.onnx", Path(folder) / "prepared.onnx"
        source.write_bytes(graph)  # given a ModelProto, it takes small constants for external data
        quant_pre_process(source, target, skip_symbolic_shape=True)
        return with_node_names(onnx.load(target))


def _quantizable(graph: onnx.GraphProto) -> Iterable[onnx.NodeProto]:
    """Nodes with constant weights and bias that can be quantised."""
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type not in QUANTIZED or not all(name in constants for name in node.input[1:]):
            continue
        transposed = attributes(node).get("transA")
        rank = len(constants[node.input[1]].dims)
        if not transposed and (node.op_type != "MatMul" or rank == 2):  # of constants alone none are left
            yield node


def _with_chains(graph: onnx.GraphProto, nodes: Collection[str]) -> set[str]:
    """These nodes and those between them: what gets all it computes with from int8, and gives it to int8."""
    constants = {tensor.name for tensor in graph.initializer}
    outputs = {value.name for value in graph.output}
    chosen, made, by_convolution = set(nodes), set[str](), set[str]()
    reached = []
    for node in graph.node:  # in topological order
        sources = [name for name in node.input if name and name not in constants]
        if node.name in nodes:
            made.update(node.output)
            by_convolution.update(node.output if node.op_type == "Conv" else ())
        elif node.op_type in BETWEEN and sources and made.issuperset(sources) and outputs.isdisjoint(node.output):
            made.update(node.output)
            reached.append(node)
            if node.op_type in ABSORBED and by_convolution.issuperset(sources):
                chosen.add(node.name)
    wanted = {name for node in graph.node if node.name in chosen for name in node.input}
    for node in reversed(reached):
        if not wanted.isdisjoint(node.output):
            chosen.add(node.name)
            wanted.update(node.input)
    return chosen


def _keep_float_results(graph: onnx.GraphProto, chosen: Collection[str]) -> None:
    """Where only fp32 reads the result of a product, leave it in float32: not rounded to 8 bits, and one node less."""
    producer = {name: node for node in graph.node for name in node.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    dropped = []
    for quantize in [node for node in graph.node if node.op_type == "QuantizeLinear"]:
        source = producer.get(quantize.input[0])
        if source is None or source.op_type not in FLOAT_RESULT or source.name not in chosen:
            continue
        (dequantize,) = readers[quantize.output[0]]
        result = dequantize.output[0]
        if len(readers[source.output[0]]) == 1 and all(node.name not in chosen for node in readers.get(result, [])):
            source.output[0] = result
            dropped += [quantize, dequantize]
    for node in dropped:
        graph.node.remove(node)


def _finish(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph without what the tools leave in it, and without operator sets that it does not use."""
    used = {node.domain for node in model.graph.node}
    opsets = [entry for entry in model.opset_import if entry.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(opsets)
    drop_unread_constants(model.graph)
    return plain(model)
