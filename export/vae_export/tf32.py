"""TF32 for one half: fp32's graph, in whose products a GPU rounds the factors to 11 bits; on demand with a first layer
that loses nothing by it.

No CPU has TF32. What is measured is a twin of the graph that rounds the factors itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from vae_runtime.preprocess import Float32

from .graphs import plain, with_node_names
from .layers import WEIGHTED, before_the_second
from .protos import attributes, drop_unread_constants, to_bytes

SPLITTER = 2.0**13 + 1  # times a float32 of 24 bits: what Dekker, 1971, rounds it to its upper 11 with


def tf32_twin(graph: bytes) -> bytes | None:
    """The computation of a GPU in TF32, in float32; None where there is nothing that TF32 rounds.

    The factors of convolutions and matrix products are rounded to 11 bits, to nearest; sums are float32's.
    """
    editor = _Editor(graph)
    if not any(node.op_type in WEIGHTED for node in editor.nodes):
        return None
    for node in editor.nodes:
        if node.op_type in WEIGHTED:
            node.input[:2] = [editor.rounded(name) for name in node.input[:2]]
        editor.add(node)
    return editor.finish()


def with_exact_first_layer(graph: bytes) -> tuple[bytes, list[str]]:
    """The graph whose first layer gives float32's results in TF32 too, and the names of the nodes that became others.

    Both factors are split into what TF32 keeps and the rest: x·w = x₁·w₁ + x₂·w₁ + x₁·w₂, all but 2^-22 of it, as one
    layer with three times the inputs (Markidis et al., 2018; CUTLASS calls it 3xTF32). Layers in groups, and products
    without constant weights, stay as they are.
    """
    editor = _Editor(graph)
    first = [node.name for node in before_the_second(editor.graph) if editor.axes(node) is not None]
    for node in editor.nodes:
        if node.name in first:
            editor.split(node)
        editor.add(node)
    return editor.finish(), first


class _Editor:
    """A graph that is rewritten node by node: `add` takes them in order, after what was made for each."""

    def __init__(self, graph: bytes) -> None:
        self._model = with_node_names(onnx.load_from_string(graph))
        self.graph = self._model.graph
        self.nodes = list(self.graph.node)
        self._constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in self.graph.initializer}
        self._taken = {
            *self._constants,
            *(name for node in self.nodes for name in (node.name, *node.input, *node.output)),
        }
        self._made: list[onnx.NodeProto] = []
        self._names: dict[str, str] = {}  # of what was made here, by what it is

    def add(self, node: onnx.NodeProto) -> None:
        self._made.append(node)

    def finish(self) -> bytes:
        del self.graph.node[:]
        self.graph.node.extend(self._made)
        drop_unread_constants(self.graph)
        return to_bytes(plain(self._model))

    def rounded(self, name: str) -> str:
        """The name of the same values in 11 bits."""
        if name in self._constants:
            return self._constant(f"{name}_tf32", _upper(self._constants[name]))
        splitter = self._constant("tf32_splitter", np.array(SPLITTER, np.float32))
        wide = self._node("Mul", [name, splitter], f"{name}_wide")
        rest = self._node("Sub", [wide, name], f"{name}_rest")
        return self._node("Sub", [wide, rest], f"{name}_tf32")

    def split(self, node: onnx.NodeProto) -> None:
        """Give a layer with weights both parts of its factors."""
        axes = self.axes(node)
        assert axes is not None
        name, weight = node.input[0], self._constants[node.input[1]]
        upper, weight_upper = self.rounded(name), _upper(weight)
        lower = self._node("Sub", [name, upper], f"{name}_lower")
        joined = self._node("Concat", [upper, lower, upper], f"{name}_parts_{axes[0]}", axis=axes[0])
        parts = np.concatenate([weight_upper, weight_upper, weight - weight_upper], axis=axes[1])
        node.input[:2] = [joined, self._constant(f"{node.input[1]}_parts_{axes[1]}", parts)]

    def axes(self, node: onnx.NodeProto) -> tuple[int, int] | None:
        """Of both factors, the axis over which their products are summed; None where `split` does not apply."""
        given = attributes(node)
        if node.op_type not in WEIGHTED or node.input[1] not in self._constants:
            return None
        if given.get("group", 1) != 1 or given.get("transA") or self._constants[node.input[1]].ndim < 2:
            return None
        if node.op_type == "Gemm":
            return 1, (1 if given.get("transB") else 0)
        return (-1, -2) if node.op_type == "MatMul" else (1, 1 if node.op_type == "Conv" else 0)

    def _node(self, operator: str, inputs: Iterable[str], output: str, **given: Any) -> str:
        if output not in self._names:  # two layers may read the same values
            name = self._names[output] = self._fresh(output)
            self._made.append(helper.make_node(operator, list(inputs), [name], name=name, **given))
        return self._names[output]

    def _constant(self, name: str, value: Float32) -> str:
        if name not in self._names:
            self._names[name] = self._fresh(name)
            self.graph.initializer.append(numpy_helper.from_array(value, self._names[name]))
        return self._names[name]

    def _fresh(self, name: str) -> str:
        while name in self._taken:
            name += "_"
        self._taken.add(name)
        return name


def _upper(values: Float32) -> Float32:
    wide = values * np.float32(SPLITTER)
    upper: Float32 = wide - (wide - values)
    return upper
