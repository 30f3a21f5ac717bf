"""Graphs of a bundle that compute the same in other operators, for `variations.py`; None where nothing changes.

Only what the exporter writes is known here, and names are taken to be free: these are experiments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper


def join_scale_and_shift(data: bytes) -> bytes | None:
    """x · scale + shift by channel, as GroupNorm ends: one BatchNormalization, and so one pass over the map."""
    model = onnx.load_from_string(data)
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    readers = {name: [node for node in graph.node if name in node.input] for node in graph.node for name in node.output}
    found = []
    for scale in graph.node:
        after = readers.get(scale.output[0], [])
        if scale.op_type != "Mul" or len(after) != 1 or after[0].op_type != "Add":
            continue
        parts = [next((name for name in node.input if name in constants), None) for node in (scale, after[0])]
        tensors = [constants[name] for name in parts if name is not None]
        dims = [list(tensor.dims) for tensor in tensors]
        if len(dims) == 2 and dims[0] == dims[1] and dims[0][-2:] == [1, 1] and math.prod(dims[0]) == dims[0][-3] > 1:
            found.append((scale, after[0], tensors))
    for number, (scale, shift, tensors) in enumerate(found):
        gamma, beta = (numpy_helper.to_array(tensor).reshape(-1) for tensor in tensors)
        names = [f"joined_{number}_{part}" for part in ("gamma", "beta", "mean", "variance")]
        values = gamma, beta, np.zeros_like(gamma), np.ones_like(gamma)
        graph.initializer.extend(map(numpy_helper.from_array, values, names))
        source = next(name for name in scale.input if name not in constants)
        output = shift.output[0]
        scale.CopyFrom(helper.make_node("BatchNormalization", [source, *names], [output], epsilon=0.0))
        graph.node.remove(shift)
    return model.SerializeToString() if found else None


def join_upsampling(data: bytes) -> bytes | None:
    """Nearest upsampling by 2 before a 3×3 convolution: one transposed convolution of 4×4 with stride 2, which
    multiplies 16 times per input where the two do 36 times."""
    model = onnx.load_from_string(data)
    graph = model.graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    readers = {name: [node for node in graph.node if name in node.input] for node in graph.node for name in node.output}
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
        inputs, outputs = [resize.input[0], name, *conv.input[2:]], list(conv.output)
        conv.CopyFrom(helper.make_node("ConvTranspose", inputs, outputs, strides=[2, 2], pads=[1] * 4))
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


EDITS: dict[str, Callable[[bytes], bytes | None]] = {
    "scale and shift joined": join_scale_and_shift,
    "upsampling in the convolution": join_upsampling,
}
