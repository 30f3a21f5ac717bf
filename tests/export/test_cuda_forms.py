"""Forms of graphs for CUDA, which the CPU runs too: they give the same, or nothing is changed."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from vae_export.cuda_forms import for_cuda
from vae_export.graphs import DecoderGraph, decoder_to_onnx

RANDOM = np.random.default_rng(0)
make = helper.make_node


def floats(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape, np.float32)


def graph_of(*nodes: onnx.NodeProto, x: tuple[Any, ...] = (4, 6, 5), **constants: np.ndarray) -> bytes:
    """From x (batch, *x) to y."""
    ends = [("x", ["batch", *x]), ("y", [None] * (len(x) + 1))]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in ends]
    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "graph", values[:1], values[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def operators(graph: bytes) -> list[str]:
    return [node.op_type for node in onnx.load_from_string(graph).graph.node]


def run(graph: bytes, x: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


def changed(graph: bytes, *x: int) -> bytes:
    """Its form, which is valid and gives the same for 1 and for 3 examples."""
    form = for_cuda(graph)
    assert form is not None
    onnx.checker.check_model(onnx.load_from_string(form), full_check=True)
    for count in (1, 3):
        given = floats(count, *(x or (4, 6, 5)))
        np.testing.assert_allclose(run(form, given), run(graph, given), rtol=1e-5, atol=2e-5)
    return form


@pytest.mark.parametrize("kind", ["Conv", "ConvTranspose"])
@pytest.mark.parametrize("group", [1, 2])
def test_the_bias_of_a_convolution_is_added(kind: str, group: int) -> None:
    conv = make(kind, ["x", "w", "b"], ["y"], strides=[2, 2], pads=[1] * 4, group=group)
    weight = floats(4, 6 // group, 4, 4) if kind == "ConvTranspose" else floats(6, 4 // group, 4, 4)
    form = changed(graph_of(conv, w=weight, b=floats(6)))
    assert operators(form) == [kind, "Add"]
    assert for_cuda(form) is None
    computed = make("Neg", ["b"], ["c"]), make(kind, ["x", "w", "c"], ["y"], group=group)
    assert for_cuda(graph_of(*computed, w=weight, b=floats(6))) is None
    line = make(kind, ["x", "w", "b"], ["y"], strides=[2])
    form = changed(graph_of(line, x=(4, 6), w=floats(4, 4, 3), b=floats(4)), 4, 6)
    assert operators(form) == [kind, "Add"]


def group_norm(name: str, source: str, result: str, back: str = "back") -> list[onnx.NodeProto]:
    """As the exporter writes it, without scale and shift."""
    return [
        make("Reshape", [source, f"{name}_groups"], [f"{name}_r"]),
        make("InstanceNormalization", [f"{name}_r", f"{name}_ones", f"{name}_zeros"], [f"{name}_n"], epsilon=1e-6),
        make("Reshape", [f"{name}_n", back], [result]),
    ]


def constants_of(name: str, groups: int, first: int = 0) -> dict[str, Any]:
    return {
        f"{name}_groups": np.array([first, groups, -1]),
        f"{name}_ones": np.ones(groups, np.float32),
        f"{name}_zeros": np.zeros(groups, np.float32),
    }


BACK = {"back": np.array([-1, 4, 6, 5]), "zero": np.array([0, 4, 6, 5])}


def test_groups_of_all_examples_are_normalised_as_those_of_one() -> None:
    """Two norms of 2 groups share what is repeated; one of 4 has a scale and a shift."""
    nodes = [*group_norm("a", "x", "h"), *group_norm("b", "h", "i", "zero"), *group_norm("c", "i", "y")]
    tensors = {**constants_of("a", 2), **constants_of("b", 2), **constants_of("c", 4), **BACK}
    tensors |= {"c_ones": floats(4), "c_zeros": floats(4)}
    form = changed(graph_of(*nodes, **tensors))
    first = ["Shape", "Concat", *4 * ["Expand", "Reshape"]]
    assert operators(form) == first + 3 * ["Reshape", "InstanceNormalization", "Reshape"]
    graph = onnx.load_from_string(form).graph
    values = {tensor.name: numpy_helper.to_array(tensor).tolist() for tensor in graph.initializer}
    assert [values[node.input[1]] for node in graph.node if node.op_type == "Reshape"][4:] == [
        *([1, -1, 60], [-1, 4, 6, 5]),
        *([1, -1, 60], [-1, 4, 6, 5]),
        *([1, -1, 30], [-1, 4, 6, 5]),
    ]
    assert for_cuda(form) is None


def test_groups_of_single_channels_have_their_scale_and_shift() -> None:
    """As `fold_norm` makes them."""
    torch.manual_seed(0)
    norm = nn.GroupNorm(8, 8)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    decoder = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1, bias=False), norm, nn.Conv2d(8, 1, 1, bias=False))
    graph = decoder_to_onnx(DecoderGraph(decoder.eval(), clamp=True), torch.zeros(2, 2, 3, 4))
    form = for_cuda(graph)
    assert form is not None
    assert operators(graph).count("Mul") == operators(form).count("Mul") == 0
    z = floats(3, 2, 3, 4)
    outputs = [onnxruntime.InferenceSession(data).run(None, {"z": z})[0] for data in (graph, form)]
    np.testing.assert_allclose(*outputs, atol=1e-6)


def test_names_that_are_taken_stay() -> None:
    nodes = [make("Neg", ["x"], ["examples"]), *group_norm("a", "examples", "a_ones_of_all")]
    last = make("Neg", ["a_ones_of_all"], ["y"])
    changed(graph_of(*nodes, last, **constants_of("a", 2), **BACK))


@pytest.mark.parametrize(
    ("sides", "constants"),
    [
        ((4, None, None), constants_of("a", 2)),
        ((4, 6, 5), constants_of("a", 2, first=-1) | {"a_groups": np.array([-1, 2, 60])}),
        ((4, 5, 6), constants_of("a", 2)),  # back to maps of other sides
    ],
)
def test_other_normalisations_are_left_alone(sides: tuple[Any, ...], constants: dict[str, Any]) -> None:
    assert for_cuda(graph_of(*group_norm("a", "x", "y"), x=sides, **constants, **BACK)) is None


def test_groups_that_something_else_reads_are_left_alone() -> None:
    first, norm, back = group_norm("a", "x", "h")
    other = make("ReduceMean", ["a_r", "last"], ["mean"])
    last = np.array([1, 2])
    tensors = constants_of("a", 2)
    both = make("Reshape", ["mean", "each"], ["m"]), make("Add", ["h", "m"], ["y"])
    each = np.array([-1, 1, 1, 1])
    assert for_cuda(graph_of(first, norm, back, other, *both, last=last, each=each, **tensors, **BACK)) is None


def test_what_torch_exports_takes_all_forms() -> None:
    torch.manual_seed(0)
    upsample = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(8, 8, 3, padding=1))
    decoder = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.GroupNorm(4, 8), nn.SiLU(), upsample)
    decoder = nn.Sequential(decoder, nn.ConvTranspose2d(8, 1, 4, 2, 1))
    graph = decoder_to_onnx(DecoderGraph(decoder.eval(), clamp=True), torch.zeros(2, 2, 3, 4))
    form = for_cuda(graph)
    assert form is not None
    z = floats(3, 2, 3, 4)
    outputs = [
        onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"]).run(None, {"z": z})[0]
        for data in (graph, form)
    ]
    np.testing.assert_allclose(*outputs, atol=1e-6)
    found = operators(form)
    assert (found.count("ConvTranspose"), found.count("Resize"), found.count("Expand")) == (1, 1, 2)
    assert not [
        node for node in onnx.load_from_string(form).graph.node if "Conv" in node.op_type and len(node.input) > 2
    ]
    assert for_cuda(form) is None
