"""ONNX graphs of others with the contract's arithmetic around them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, compose, helper, numpy_helper

from ..graphs import finish
from ..simplify import simplified
from .onnx_source import OnnxSource

PREFIX = "network."  # before the names of the original graph


class Wrapped:
    """A graph around an original one: nodes before it, its own under `PREFIX`, nodes after it. free: height and width
    are open."""

    def __init__(self, source: OnnxSource, free: bool) -> None:
        self._model = compose.add_prefix(source.model, PREFIX)
        self._port, self._free = source.input, free
        self._nodes: list[onnx.NodeProto] = []
        graph = self._model.graph
        self._original = list(graph.node)
        del graph.input[:], graph.output[:], graph.node[:]

    def start(self, name: str, shape: tuple[int, ...]) -> str:
        """The input."""
        self._model.graph.input.append(self._value(name, shape))
        return name

    def network(self, x: str) -> None:
        """The original graph on `x`, in its own type."""
        kind = helper.np_dtype_to_tensor_dtype(self._port.dtype)
        self._add("Cast", [x], PREFIX + self._port.name, to=kind)
        self._nodes += self._original

    def output(self, name: str) -> str:
        """An output of the original graph, in float32."""
        return self._add("Cast", [PREFIX + name], to=TensorProto.FLOAT)

    def affine(self, x: str, scale: float, shift: float) -> str:
        """x · scale + shift."""
        x = x if scale == 1 else self._add("Mul", [x, self._constant(scale)])
        return x if shift == 0 else self._add("Add", [x, self._constant(shift)])

    def clip(self, x: str, low: float, high: float) -> str:
        return self._add("Clip", [x, self._constant(low), self._constant(high)])

    def sigmoid(self, x: str) -> str:
        return self._add("Sigmoid", [x])

    def log(self, x: str) -> str:
        return self._add("Log", [x])

    def split(self, x: str) -> tuple[str, str]:
        """Both halves of the channels."""
        first = self._add("Split", [x], axis=1, num_outputs=2)
        self._nodes[-1].output.append(f"{first}.second")
        return first, f"{first}.second"

    def end(self, name: str, x: str, shape: tuple[int, ...]) -> None:
        """`x` is the output `name`."""
        self._add("Identity", [x], name)
        self._model.graph.output.append(self._value(name, shape))

    def to_file(self, half: str) -> bytes:
        """Raises: ExportError: the graph breaks the contract."""
        self._model.graph.node.extend(self._nodes)
        _rename_shared_bounds(self._model.graph)
        # Casts to the same type go, and what only unused outputs of the original needed.
        return finish(simplified(self._model), half)

    def _add(self, operator: str, inputs: list[str], output: str = "", **attributes: Any) -> str:
        output = output or f"{operator.lower()}_{len(self._nodes)}"
        self._nodes.append(helper.make_node(operator, inputs, [output], **attributes))
        return output

    def _constant(self, value: float) -> str:
        name = f"constant_{len(self._model.graph.initializer)}"
        self._model.graph.initializer.append(numpy_helper.from_array(np.array(value, np.float32), name))
        return name

    def _value(self, name: str, shape: tuple[int, ...]) -> onnx.ValueInfoProto:
        """A float32 tensor of this shape with the batch, and height and width where they are free, open."""
        sides = [None if i == 0 or (self._free and i > 1) else size for i, size in enumerate(shape)]
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, sides)


def _rename_shared_bounds(graph: onnx.GraphProto) -> None:
    """The optimizer joins two Clips, or a Clip and a Relu, and names the new bounds after the first one's input, as
    `conv2d_max`. A graph that it has made has this name already, and other readers of that constant would lose it."""
    clipped = {node.input[0] for node in graph.node if node.op_type in ("Clip", "Relu")}
    taken = {f"{name}_{end}" for name in clipped for end in ("min", "max")}
    readers = Counter(name for node in graph.node for name in node.input)
    shared = {entry.name: f"{entry.name}.shared" for entry in graph.initializer if readers[entry.name] > 1}
    shared = {name: other for name, other in shared.items() if name in taken}
    for entry in graph.initializer:
        entry.name = shared.get(entry.name, entry.name)
    for node in graph.node:
        node.input[:] = [shared.get(name, name) for name in node.input]
