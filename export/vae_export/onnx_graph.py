"""An ONNX graph under the hands of those who rewrite it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from vae_runtime.preprocess import Float64


class Graph:
    """The nodes and constants of a model, with what rewrites ask of them; it changes the model in place."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.proto = model.graph
        inputs = {value.name for value in model.graph.input}
        self._constants = {entry.name: entry for entry in model.graph.initializer if entry.name not in inputs}
        self._outputs = {value.name for value in model.graph.output}
        inferred = onnx.shape_inference.infer_shapes(model).graph
        self._shapes = {
            value.name: tuple(dimension.dim_value or None for dimension in value.type.tensor_type.shape.dim)
            for value in (*inferred.value_info, *inferred.input)
        }

    def shape(self, name: str) -> tuple[int | None, ...]:
        """None stands for a dimension that is not fixed; () where nothing is known."""
        return self._shapes.get(name, ())

    def constant(self, name: str) -> NDArray[Any] | None:
        return numpy_helper.to_array(self._constants[name]) if name in self._constants else None

    def weights(self, name: str) -> Float64 | None:
        """A constant, where it is float32, as float64."""
        value = self.constant(name)
        return value.astype(np.float64) if value is not None and value.dtype == np.float32 else None

    def producer(self, name: str) -> onnx.NodeProto | None:
        return next((node for node in self.proto.node if name in node.output), None)

    def consumer(self, node: onnx.NodeProto) -> onnx.NodeProto | None:
        """The node that alone takes what `node` alone gives; None where the graph itself or another node does."""
        name = node.output[0]
        found = [other for other in self.proto.node if name in other.input]
        alone = len(found) == 1 and list(found[0].input).count(name) == 1
        return found[0] if alone and len(node.output) == 1 and name not in self._outputs else None

    def free_name(self, name: str) -> str:
        """It, or one like it that nothing has."""
        inputs = {value.name for value in self.proto.input}
        taken = inputs | set(self._constants) | {output for node in self.proto.node for output in node.output}
        while name in taken:
            name += "_"
        return name

    def add_constant(self, name: str, value: NDArray[Any], kind: type[np.generic] = np.float32) -> str:
        """A new constant with a name of its own."""
        name = self.free_name(name)
        entry = numpy_helper.from_array(np.ascontiguousarray(value, dtype=kind), name)
        self.proto.initializer.append(entry)
        self._constants[name] = entry
        return name

    def insert_after(self, node: onnx.NodeProto, new: onnx.NodeProto) -> None:
        self.proto.node.insert(list(self.proto.node).index(node) + 1, new)

    def bypass(self, node: onnx.NodeProto, source: str) -> None:
        """Remove `node`: what it gave is now `source`, which only `node` took and which its producer now names so."""
        producer = self.producer(source)
        assert producer is not None
        producer.output[list(producer.output).index(source)] = node.output[0]
        self._shapes.pop(node.output[0], None)
        self.proto.node.remove(node)
