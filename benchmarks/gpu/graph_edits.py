"""Graphs of a bundle that compute the same in other operators, for `variations.py`; None where nothing changes.

Only what the exporter writes is known here, and names are taken to be free: these are experiments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import helper, numpy_helper


class GroupNorm(NamedTuple):
    """As the exporter writes it: reshape, instances, back, scale, shift. silu: what follows, if it does, and alone."""

    source: str
    nodes: list[onnx.NodeProto]
    groups: int
    channels: int
    size: int  # of a channel
    gamma: np.ndarray[Any, Any]
    beta: np.ndarray[Any, Any]
    silu: list[onnx.NodeProto]

    @property
    def epsilon(self) -> float:
        return float(helper.get_attribute_value(self.nodes[1].attribute[0]))


def group_norms(graph: onnx.GraphProto) -> list[GroupNorm]:
    """Of maps of a known size."""
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    readers = readers_of(graph)

    def following(node: onnx.NodeProto, *kinds: str) -> list[onnx.NodeProto]:
        found = [node]
        for kind in kinds:
            after = readers.get(found[-1].output[0], [])
            if len(after) != 1 or after[0].op_type != kind:
                return []
            found.append(after[0])
        return found

    found = []
    for node in graph.node:
        nodes = following(node, "InstanceNormalization", "Reshape", "Mul", "Add") if node.op_type == "Reshape" else []
        if not nodes:
            continue
        into, shape = (constants[nodes[place].input[1]].tolist() for place in (0, 2))
        values = [next((constants[name] for name in one.input if name in constants), None) for one in nodes[3:]]
        gamma, beta = (None if value is None else np.asarray(value).reshape(-1) for value in values)
        if len(shape) != 4 or gamma is None or beta is None or not len(gamma) == len(beta) == shape[1]:
            continue
        size, channels = shape[2] * shape[3], shape[1]
        groups = into[1] if into[::2] == [0, -1] else channels * size // into[2]
        after = readers.get(nodes[4].output[0], [])
        silu = after if sorted(one.op_type for one in after) == ["Mul", "Sigmoid"] else []
        found.append(GroupNorm(node.input[0], nodes, groups, channels, size, gamma, beta, list(silu)))
    return found


def join_scale_and_shift(data: bytes) -> bytes | None:
    """What GroupNorm ends with, x · scale + shift by channel: one BatchNormalization, and so one pass over the map."""
    model = onnx.load_from_string(data)
    graph = model.graph
    found = group_norms(graph)
    for number, one in enumerate(found):
        names = [f"joined_{number}_{part}" for part in ("gamma", "beta", "mean", "variance")]
        values = one.gamma, one.beta, np.zeros_like(one.gamma), np.ones_like(one.gamma)
        graph.initializer.extend(map(numpy_helper.from_array, values, names))
        scale, shift = one.nodes[3:]
        output = shift.output[0]
        scale.CopyFrom(helper.make_node("BatchNormalization", [one.nodes[2].output[0], *names], [output], epsilon=0.0))
        graph.node.remove(shift)
    return model.SerializeToString() if found else None


def use_own_group_norm(data: bytes) -> bytes | None:
    """onnxruntime's own operator for CUDA, with the SiLU that follows. It adds up in whatever order its threads come,
    so that results differ from call to call in their last digits."""
    model = onnx.load_from_string(data)
    graph = model.graph
    found = group_norms(graph)
    for number, one in enumerate(found):
        names = [f"own_{number}_{part}" for part in ("gamma", "beta", "last", "done")]
        values = [values.astype(np.float32) for values in (one.gamma, one.beta)]
        graph.initializer.extend(map(numpy_helper.from_array, values, names[:2]))
        gone = [*one.nodes, *one.silu]
        output = (next(node for node in one.silu if node.op_type == "Mul") if one.silu else one.nodes[-1]).output[0]
        given: dict[str, Any] = {
            "groups": one.groups,
            "activation": int(bool(one.silu)),
            "epsilon": one.epsilon,
            "channels_last": 1,
        }
        new = [
            helper.make_node("Transpose", [one.source], [names[2]], perm=[0, 2, 3, 1]),
            helper.make_node("GroupNorm", [names[2], *names[:2]], [names[3]], domain="com.microsoft", **given),
            helper.make_node("Transpose", [names[3]], [output], perm=[0, 3, 1, 2]),
        ]
        place = list(graph.node).index(one.nodes[0])
        for node in gone:
            graph.node.remove(node)
        for node in reversed(new):
            graph.node.insert(place, node)
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return model.SerializeToString() if found else None


def readers_of(graph: onnx.GraphProto) -> dict[str, list[onnx.NodeProto]]:
    return {name: [node for node in graph.node if name in node.input] for node in graph.node for name in node.output}


EDITS: dict[str, Callable[[bytes], bytes | None]] = {"scale and shift joined": join_scale_and_shift}
NHWC_EDITS = {**EDITS, "own GroupNorm": use_own_group_norm}
