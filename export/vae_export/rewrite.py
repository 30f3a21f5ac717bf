"""Exact rewrites of an ONNX graph that onnxruntime does not make itself and that measured faster inside whole graphs.

The exporter folds BatchNorm into the layer before it and leaves constant shapes; onnxruntime fuses activations and
chooses layouts. What is left:

`fold_affine`        Linear, then a multiplication, an addition or BatchNorm: they go into its weights, also through a
                     Reshape between them.
`fold_scale`         A multiplication or division before a Linear goes into its weights. An addition stays: where the
                     data lie far from 0, centring them first is what keeps their digits.
`fold_norm`          InstanceNorm, then a multiplication or an addition by channel: they are its scale and bias, also
                     through a Reshape. So ends a GroupNorm whose groups are single channels.
`replace_transposed` A transposed convolution on a map of at most 4×4 becomes a convolution and DepthToSpace. Such maps
                     have many channels, and onnxruntime's ConvTranspose is slow on them. On larger maps the zeros in
                     the convolution's kernel cost more than is won (benchmarks/results/graphs.md).

A rewrite that does not certainly give the same result does nothing: foreign shapes, shared or computed weights, outputs
of the graph in between.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx
from onnx import helper

from vae_runtime.preprocess import Float64

from .onnx_graph import Graph
from .protos import attributes, drop_unread_constants

MAX_TRANSPOSED_PIXELS = 16  # of the input of a transposed convolution that is replaced
# Times the norm of a feature's weights: a sum that begins at a large offset loses digits at every step.
MAX_OFFSET = 64
ACTIVATIONS = ("Relu", "LeakyRelu", "Sigmoid", "Tanh", "Elu", "HardSwish", "HardSigmoid", "Softplus")


def rewrite(model: onnx.ModelProto) -> None:
    """Apply all rewrites to `model` until none applies any more."""
    graph = Graph(model)
    while any(apply(graph, node) for node in list(model.graph.node) for apply in REWRITES):
        pass
    drop_unread_constants(model.graph)


def fold_affine(graph: Graph, gemm: onnx.NodeProto) -> bool:
    """Gemm -> [Reshape ->] scale · y + offset, with constants per feature or channel: one Gemm."""
    layer = _linear(graph, gemm)
    if layer is None or (after := graph.consumer(gemm)) is None:
        return False
    weight, bias = layer
    features, source = weight.shape[1], gemm
    if after.op_type == "Reshape":
        shape = graph.constant(after.input[1])
        if shape is None or after.input[0] != gemm.output[0] or (between := graph.consumer(after)) is None:
            return False
        channels = int(shape[1]) if shape.ndim == 1 and len(shape) > 1 else 0
        if channels < 1 or (shape[2:] < 1).any() or channels * math.prod(shape[2:].tolist()) != features:
            return False
        source, after = after, between
        affine = _affine(graph, after, source.output[0], channels, trailing=len(shape) - 2)
    else:
        channels = features
        affine = _affine(graph, after, source.output[0], channels, trailing=0)
    if affine is None:
        return False
    scale, offset = (np.repeat(np.broadcast_to(part, channels), features // channels) for part in affine)
    if np.abs(offset).max() > MAX_OFFSET * np.linalg.norm(weight * scale, axis=0).max():
        return False
    _set_linear(graph, gemm, weight * scale, bias * scale + offset)
    graph.bypass(after, source.output[0])
    return True


def fold_scale(graph: Graph, gemm: onnx.NodeProto) -> bool:
    """x · scale -> Gemm, with a constant per feature: one Gemm."""
    layer = _linear(graph, gemm)
    before = graph.producer(gemm.input[0]) if layer is not None else None
    if layer is None or before is None or before.op_type not in ("Mul", "Div") or graph.consumer(before) is not gemm:
        return False
    source = before.input[1 if graph.constant(before.input[0]) is not None else 0]
    affine = _affine(graph, before, source, len(layer[0]), trailing=0)
    if affine is None:
        return False
    _set_linear(graph, gemm, layer[0] * np.broadcast_to(affine[0], len(layer[0]))[:, None], layer[1])
    gemm.input[0] = source
    graph.proto.node.remove(before)
    return True


def fold_norm(graph: Graph, norm: onnx.NodeProto) -> bool:
    """InstanceNormalization -> [Reshape ->] scale · y + offset, with constants per channel: one normalisation."""
    if norm.op_type != "InstanceNormalization" or (after := graph.consumer(norm)) is None:
        return False
    scale, bias = (graph.weights(name) for name in norm.input[1:])
    if scale is None or bias is None:
        return False
    source, sides = norm, graph.shape(norm.input[0])[2:]
    if not sides:
        return False
    if after.op_type == "Reshape":
        shape = graph.constant(after.input[1])
        if shape is None or after.input[0] != norm.output[0] or (between := graph.consumer(after)) is None:
            return False
        if shape.ndim != 1 or len(shape) < 3:
            return False
        new = shape[2:].tolist()
        if None in sides or shape[0] not in (0, -1) or shape[1] != len(scale) or math.prod(sides) != math.prod(new):  # type: ignore[arg-type]
            return False
        source, sides, after = after, tuple(new), between
    affine = _affine(graph, after, source.output[0], len(scale), trailing=len(sides))
    if affine is None:
        return False
    factor, offset = affine
    name = norm.output[0]
    norm.input[1] = graph.add_constant(f"{name}.scale", scale * factor)
    norm.input[2] = graph.add_constant(f"{name}.bias", bias * factor + offset)
    graph.bypass(after, source.output[0])
    return True


def replace_transposed(graph: Graph, node: onnx.NodeProto) -> bool:
    """ConvTranspose on a small map -> Conv -> [activation ->] DepthToSpace."""
    if node.op_type != "ConvTranspose" or (kernel := graph.weights(node.input[1])) is None:
        return False
    size = graph.shape(node.input[0])[2:]
    bias = graph.weights(node.input[2]) if len(node.input) > 2 else np.zeros(kernel.shape[1])
    given = attributes(node)
    if len(size) != 2 or None in size or math.prod(size) > MAX_TRANSPOSED_PIXELS or bias is None:  # type: ignore[arg-type]
        return False
    strides, pads = given.get("strides", [1, 1]), given.get("pads", [0, 0, 0, 0])
    extra = given.get("output_padding", [0, 0])
    plain = given.get("group", 1) == 1 and set(given.get("dilations", [1, 1])) == {1} and "output_shape" not in given
    if not plain or given.get("auto_pad", b"NOTSET") != b"NOTSET" or strides[0] != strides[1] or strides[0] < 2:
        return False
    for axis in range(2):  # the result must be the input's size times the stride
        if kernel.shape[2 + axis] - strides[axis] - pads[axis] - pads[axis + 2] + extra[axis] != 0:
            return False
    new, new_pads = _subpixel_kernel(kernel, strides[0], pads[:2])
    if min(new_pads) < 0:
        return False
    _replace_by_subpixel(graph, node, new, np.repeat(bias, strides[0] ** 2), strides[0], new_pads)
    return True


REWRITES: tuple[Callable[[Graph, onnx.NodeProto], bool], ...] = (
    fold_affine,
    fold_scale,
    fold_norm,
    replace_transposed,
)


def _linear(graph: Graph, node: onnx.NodeProto) -> tuple[Float64, Float64] | None:
    """weight (inputs, outputs) and bias (outputs,) of a Gemm with constants; None for all else."""
    if node.op_type != "Gemm":
        return None
    given = attributes(node)
    if given.get("alpha", 1.0) != 1 or given.get("beta", 1.0) != 1 or given.get("transA", 0):
        return None
    weight = graph.weights(node.input[1])
    if weight is None:
        return None
    weight = weight.T if given.get("transB", 0) else weight
    bias = graph.weights(node.input[2]) if len(node.input) > 2 and node.input[2] else np.zeros(weight.shape[1])
    if bias is None or bias.size not in (1, weight.shape[1]):
        return None
    return weight, np.broadcast_to(bias.reshape(-1), weight.shape[1])


def _set_linear(graph: Graph, gemm: onnx.NodeProto, weight: Float64, bias: Float64) -> None:
    """Give a Gemm these weights, (inputs, outputs), under new names: others may use the old."""
    transposed = attributes(gemm).get("transB")
    names = [*gemm.input[1:], f"{gemm.output[0]}.bias"]
    weight_name = graph.add_constant(names[0], weight.T if transposed else weight)
    bias_name = graph.add_constant(names[1], bias)
    source = gemm.input[0]
    del gemm.input[:]
    gemm.input.extend([source, weight_name, bias_name])


def _affine(
    graph: Graph, node: onnx.NodeProto, source: str, channels: int, trailing: int
) -> tuple[Float64, Float64] | None:
    """scale and offset, each (channels,) or (1,), where `node` computes scale · source + offset; None for all else.

    trailing: dimensions of `source` after the channels, which are its dimension 1.
    """
    if node.op_type == "BatchNormalization":
        parts = [graph.weights(name) for name in node.input[1:5]]
        if len(node.output) != 1 or any(part is None or part.shape != (channels,) for part in parts):
            return None
        gamma, beta, mean, variance = (part for part in parts if part is not None)
        epsilon = attributes(node).get("epsilon", 1e-5)
        scale = gamma / np.sqrt(variance + epsilon)
        return scale, beta - mean * scale
    commutes = node.op_type in ("Add", "Mul")
    if not commutes and (node.op_type not in ("Sub", "Div") or node.input[0] != source):
        return None
    value = graph.weights(node.input[1 if node.input[0] == source else 0])
    if value is None or value.size not in (1, channels) or value.ndim > 2 + trailing:
        return None
    if value.size > 1 and value.shape[value.ndim - 1 - trailing :] != (channels, *(1,) * trailing):
        return None
    value = value.reshape(-1)
    if node.op_type == "Div" and not value.all():
        return None
    one, zero = np.ones(1), np.zeros(1)
    return {"Add": (one, value), "Sub": (one, -value), "Mul": (value, zero)}.get(node.op_type) or (1 / value, zero)


def _subpixel_kernel(kernel: Float64, stride: int, pads: list[int]) -> tuple[Float64, list[int]]:
    """(in, out, k, k') of a transposed convolution -> (out · stride², in, m, m') of a convolution, and its pads.

    The transposed convolution adds kernel[t] · input[i] to output[stride · i - pad + t]. The output stride · y + a so
    comes from the inputs y + d with t = a + pad - stride · d.
    """
    ranges = []
    for axis in range(2):
        taps = [(a, (a + pads[axis] - t) // stride, t) for t in range(kernel.shape[2 + axis]) for a in range(stride)
                if (a + pads[axis] - t) % stride == 0]  # fmt: skip
        ranges.append((taps, min(0, *(d for _, d, _ in taps)), max(0, *(d for _, d, _ in taps))))
    (rows, top, bottom), (columns, left, right) = ranges
    inputs, outputs = kernel.shape[:2]
    new = np.zeros((outputs, stride, stride, inputs, bottom - top + 1, right - left + 1))
    for a, dy, t in rows:
        for b, dx, u in columns:
            new[:, a, b, :, dy - top, dx - left] = kernel[:, :, t, u].T
    return new.reshape(-1, *new.shape[3:]), [-top, -left, bottom, right]


def _replace_by_subpixel(
    graph: Graph, node: onnx.NodeProto, kernel: Float64, bias: Float64, stride: int, pads: list[int]
) -> None:
    source, result, names = node.input[0], node.output[0], [*node.input[1:], f"{node.output[0]}.bias"]
    inputs = [source, graph.add_constant(names[0], kernel), graph.add_constant(names[1], bias)]
    last, activation = node, graph.consumer(node)
    conv = helper.make_node("Conv", inputs, [f"{result}.subpixels"], pads=pads)
    new = [conv]
    if activation is not None and activation.op_type in ACTIVATIONS:  # fused with the convolution
        last = activation
        copy = onnx.NodeProto()
        copy.CopyFrom(activation)
        copy.input[0], copy.output[0] = conv.output[0], f"{result}.active"
        new.append(copy)
    shuffle = helper.make_node("DepthToSpace", [new[-1].output[0]], [last.output[0]], blocksize=stride, mode="CRD")
    nodes = list(graph.proto.node)
    position = next(index for index, other in enumerate(nodes) if other is node)
    kept = [other for other in nodes if other is not node and other is not last]
    nodes = [*kept[:position], *new, shuffle, *kept[position:]]
    copies = [onnx.NodeProto.FromString(other.SerializeToString()) for other in nodes]
    del graph.proto.node[:]
    graph.proto.node.extend(copies)
