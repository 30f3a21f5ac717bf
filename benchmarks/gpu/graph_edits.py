"""Graphs of a bundle that compute the same in other operators, for `variations.py`; None where nothing changes.

Only what the exporter writes is known here, and names are taken to be free: these are experiments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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


def split_upsampling(data: bytes) -> bytes | None:
    """Nearest upsampling by 2 before a 3×3 convolution: four convolutions of 2×2, each for every second pixel of every
    second row, which multiply 16 times per input where the two do 36 times. One transposed convolution does as few, and
    took 0.87 to 0.97 of the time on an H100, but adds up in another order at every call."""
    model = onnx.load_from_string(data)
    graph = model.graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    readers, found = readers_of(graph), []
    for resize in graph.node:
        after = readers.get(resize.output[0], []) if resize.op_type == "Resize" else []
        if len(after) != 1 or after[0].op_type != "Conv" or not doubles_nearest(resize, constants):
            continue
        given = {attribute.name: helper.get_attribute_value(attribute) for attribute in after[0].attribute}
        same = {"strides": [1, 1], "dilations": [1, 1], "group": 1, "auto_pad": b"NOTSET", "kernel_shape": [3, 3]}
        weight = constants.get(after[0].input[1])
        is_same = {**same, **given, "pads": given.get("pads")} == {**same, "pads": [1] * 4}
        if weight is not None and weight.shape[2:] == (3, 3) and is_same:
            found.append((resize, after[0], weight))
    # of 2, from those of 3: of the upper or left pixel, and of the lower or right one
    taps = np.array([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], np.float64)
    for number, (resize, conv, weight) in enumerate(found):
        new, parts = [], []
        for row, column in np.ndindex(2, 2):
            name = f"split_{number}_{row}{column}"
            kernel = np.einsum("ui,vj,ocij->ocuv", taps[row], taps[column], weight.astype(np.float64))
            tensor = numpy_helper.from_array(np.ascontiguousarray(kernel.astype(weight.dtype)), f"{name}_weight")
            graph.initializer.append(tensor)
            inputs, pads = [resize.input[0], tensor.name, *conv.input[2:]], [1 - row, 1 - column, row, column]
            new.append(helper.make_node("Conv", inputs, [name], pads=pads))
            parts.append(name)
        joined = f"split_{number}"
        new.append(helper.make_node("Concat", parts, [joined], axis=1))
        new.append(helper.make_node("DepthToSpace", [joined], [conv.output[0]], blocksize=2, mode="DCR"))
        place = list(graph.node).index(conv)
        graph.node.remove(conv)
        for node in reversed(new):
            graph.node.insert(place, node)
        graph.node.remove(resize)
    return model.SerializeToString() if found else None


def doubles_nearest(resize: onnx.NodeProto, constants: Mapping[str, np.ndarray[Any, Any]]) -> bool:
    """Whether each pixel becomes 2×2 of the same."""
    given = {attribute.name: helper.get_attribute_value(attribute) for attribute in resize.attribute}
    scales = constants.get(resize.input[2]) if len(resize.input) > 2 else None
    if given.get("mode", b"nearest") != b"nearest" or scales is None or scales.tolist() != [1, 1, 2, 2]:
        return False
    nearest = given.get("nearest_mode", b"round_prefer_floor")
    place = given.get("coordinate_transformation_mode", b"half_pixel")
    return (place, nearest) in ((b"asymmetric", b"floor"), (b"half_pixel", b"round_prefer_floor"))


def readers_of(graph: onnx.GraphProto) -> dict[str, list[onnx.NodeProto]]:
    return {name: [node for node in graph.node if name in node.input] for node in graph.node for name in node.output}


EDITS: dict[str, Callable[[bytes], bytes | None]] = {
    "scale and shift joined": join_scale_and_shift,
    "upsampling split": split_upsampling,
}
NHWC_EDITS = {**EDITS, "own GroupNorm": use_own_group_norm}
