"""Graphs of a bundle that compute the same in other operators, for `variations.py`; None where nothing changes.

Only what the exporter writes is known here, and names are taken to be free: these are experiments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import helper, numpy_helper

Edit = Callable[[bytes], bytes | None]


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


def normalize_as_one_batch(data: bytes) -> bytes | None:
    """The groups of all examples as the channels of one, for which onnxruntime's InstanceNormalization has cuDNN do it
    at one go; for more examples it has cuDNN compute the statistics alone, and normalises by a kernel of its own."""
    model = onnx.load_from_string(data)
    graph, new = model.graph, []
    found = group_norms(graph)
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    kinds |= {node.output[0]: node.attribute[0].i for node in graph.node if node.op_type == "Cast"}
    new.append(helper.make_node("Shape", [graph.input[0].name], ["one_examples"], start=0, end=1))
    for number, one in enumerate(found):
        kind, prefix = kinds[one.nodes[1].input[1]], f"one_{number}"
        shape = np.array([1, -1, one.channels // one.groups * one.size])
        graph.initializer.append(numpy_helper.from_array(shape, f"{prefix}_shape"))
        graph.initializer.append(numpy_helper.from_array(np.array([one.groups]), f"{prefix}_groups"))
        new.append(helper.make_node("Mul", ["one_examples", f"{prefix}_groups"], [f"{prefix}_count"]))
        for name, value in (("scale", 1.0), ("bias", 0.0)):
            filled = helper.make_tensor("value", kind, [1], [value])
            new.append(helper.make_node("ConstantOfShape", [f"{prefix}_count"], [f"{prefix}_{name}"], value=filled))
        one.nodes[0].input[1] = f"{prefix}_shape"
        one.nodes[1].input[1:] = [f"{prefix}_scale", f"{prefix}_bias"]
    for node in reversed(new):
        graph.node.insert(0, node)
    return model.SerializeToString() if found else None


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


def join_upsampling(data: bytes, with_bias: bool = True) -> bytes | None:
    """Nearest upsampling by 2 before a 3×3 convolution: one transposed convolution of 4×4 with stride 2, which
    multiplies 16 times per input where the two do 36 times. with_bias: else an Add is left of it, as onnxruntime cannot
    fuse the bias of a transposed convolution."""
    model = onnx.load_from_string(data)
    graph = model.graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    readers = readers_of(graph)
    found = []
    for resize in graph.node:
        after = readers.get(resize.output[0], []) if resize.op_type == "Resize" else []
        if len(after) != 1 or after[0].op_type != "Conv" or not doubles_nearest(resize, constants):
            continue
        given = {attribute.name: helper.get_attribute_value(attribute) for attribute in after[0].attribute}
        same = {"strides": [1, 1], "pads": [1] * 4, "dilations": [1, 1], "group": 1, "auto_pad": b"NOTSET"}
        weight = constants.get(after[0].input[1])
        is_same = {**same, "pads": [0] * 4, **given, "kernel_shape": None} == {**same, "kernel_shape": None}
        if weight is not None and weight.shape[2:] == (3, 3) and is_same:
            found.append((resize, after[0], weight))
    for number, (resize, conv, weight) in enumerate(found):
        taps = np.array([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]], np.float64)  # of 4, from those of 3
        kernel = np.einsum("ui,vj,ocij->couv", taps, taps, weight.astype(np.float64)).astype(weight.dtype)
        name = f"upsampling_{number}"
        graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(kernel), name))
        inputs, bias, outputs = [resize.input[0], name], list(conv.input[2:]), list(conv.output)
        if bias and not with_bias:
            graph.initializer.append(numpy_helper.from_array(constants[bias[0]].reshape(-1, 1, 1), f"{name}_bias"))
            add = helper.make_node("Add", [f"{name}_sum", f"{name}_bias"], outputs)
            graph.node.insert(list(graph.node).index(conv) + 1, add)
            bias, outputs = [], [f"{name}_sum"]
        conv.CopyFrom(helper.make_node("ConvTranspose", inputs + bias, outputs, strides=[2, 2], pads=[1] * 4))
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


def chain(*edits: Edit) -> Edit:
    """One after the other, those that change something; None unless at least two do."""

    def edit(data: bytes) -> bytes | None:
        done = [data]
        for one in edits:
            done += [changed] if (changed := one(done[-1])) is not None else []
        return done[-1] if len(done) > 2 else None

    return edit


one_batch_joined = chain(normalize_as_one_batch, join_scale_and_shift)
EDITS: dict[str, Edit] = {
    "scale and shift joined": join_scale_and_shift,
    "one batch normalised": normalize_as_one_batch,
    "one batch, joined": one_batch_joined,
    "upsampling": join_upsampling,
    "one batch, joined, upsampling": chain(one_batch_joined, join_upsampling),
}
NHWC_EDITS: dict[str, Edit] = {
    "upsampling": join_upsampling,
    "own GroupNorm": use_own_group_norm,
    "own GroupNorm, upsampling": chain(use_own_group_norm, join_upsampling),
}
FUSED_EDITS: dict[str, Edit] = {
    "one batch, joined": one_batch_joined,
    "upsampling": partial(join_upsampling, with_bias=False),
    "own GroupNorm": use_own_group_norm,
    "own GroupNorm, upsampling": chain(use_own_group_norm, partial(join_upsampling, with_bias=False)),
}
