"""int8: what is quantised and how, that chains stay whole, and that the result is right without VNNI too."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from vae_export.activation_ranges import METHODS, activation_ranges
from vae_export.graphs import EncoderGraph, encoder_to_onnx
from vae_export.quantize import QuantizableGraph

RNG = np.random.default_rng(0)
IMAGES = RNG.uniform(0, 1, (24, 3, 8, 8)).astype(np.float32)


def to_graph(*layers: nn.Module, example: np.ndarray = IMAGES) -> bytes:
    return encoder_to_onnx(EncoderGraph(nn.Sequential(*layers), "autoencoder"), torch.from_numpy(example[:2]))


def run(graph: bytes, x: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    return session.run(["mean"], {"x": x})[0]


def optimised(graph: bytes, folder: Path) -> Counter[str]:
    """The operators that onnxruntime really runs."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = os.fspath(folder / "optimised.onnx")
    onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(folder / "optimised.onnx").graph.node)


def quantise(graph: bytes, x: np.ndarray = IMAGES) -> bytes:
    half = QuantizableGraph(graph, x)
    result = half.build(half.nodes, "minmax")
    assert result is not None
    return result


@pytest.fixture(scope="module")
def convolutions() -> bytes:
    torch.manual_seed(0)
    return to_graph(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 5))


def test_weights_are_7_bits_per_channel_and_activations_unsigned(convolutions: bytes) -> None:
    graph = onnx.load_from_string(quantise(convolutions)).graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    made_by = {node.output[0]: node for node in graph.node}
    checked = 0
    for node in graph.node:
        if node.op_type in ("Conv", "Gemm"):
            activation, weight = (made_by[name] for name in node.input[:2])
            assert constants[activation.input[2]].data_type == TensorProto.UINT8
            assert constants[weight.input[0]].data_type == TensorProto.INT8
            values = numpy_helper.to_array(constants[weight.input[0]])
            assert np.abs(values.astype(int)).max() == 64
            assert constants[weight.input[1]].dims == [len(values)]  # a scale for each output channel
            checked += 1
    assert checked == 3


def test_the_graph_is_valid_for_any_engine(convolutions: bytes) -> None:
    model = onnx.load_from_string(quantise(convolutions))
    onnx.checker.check_model(model, full_check=True)
    known = {value.name for value in (*model.graph.input, *model.graph.initializer)}
    for node in model.graph.node:
        assert known.issuperset(filter(None, node.input)), node.name  # in topological order
        known.update(node.output)


def test_the_boundary_is_that_of_fp32(convolutions: bytes) -> None:
    before, after = (onnx.load_from_string(graph).graph for graph in (convolutions, quantise(convolutions)))
    for side in ("input", "output"):
        for old, new in zip(getattr(before, side), getattr(after, side), strict=True):
            assert (old.name, old.type) == (new.name, new.type)
            assert new.type.tensor_type.elem_type == TensorProto.FLOAT


def test_nothing_of_the_machine_and_the_tools_is_left(convolutions: bytes) -> None:
    model = onnx.load_from_string(quantise(convolutions))
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": 20}
    assert not model.metadata_props
    assert os.fsencode(Path.cwd()) not in model.SerializeToString()
    assert b"/tmp" not in model.SerializeToString()


def test_a_chain_is_quantised_once_and_ends_in_float(convolutions: bytes, tmp_path: Path) -> None:
    found = optimised(quantise(convolutions), tmp_path)
    assert (found["QLinearConv"], found["QGemm"]) == (2, 1)
    assert found["QuantizeLinear"] == 1
    assert found["DequantizeLinear"] <= 1  # none, as the product gives float32 itself; onnxruntime 1.23 leaves one
    assert found["Relu"] == found["Conv"] == found["Gemm"] == 0
    graph = onnx.load_from_string(quantise(convolutions)).graph
    assert [node.op_type for node in graph.node if "mean" in node.output] == ["Gemm"]


def test_what_lies_between_convolutions_stays_in_int8(tmp_path: Path) -> None:
    torch.manual_seed(0)
    up = nn.Upsample(scale_factor=2)
    graph = to_graph(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU6(), nn.PixelShuffle(2), nn.Conv2d(4, 4, 3), up, nn.Conv2d(4, 2, 3),
        nn.Sigmoid(),
    )  # fmt: skip
    found = optimised(quantise(graph), tmp_path)
    assert found["QLinearConv"] == 3
    assert (found["QuantizeLinear"], found["DequantizeLinear"]) == (1, 1)
    assert found["Clip"] == 0
    assert np.abs(run(quantise(graph), IMAGES) - run(graph, IMAGES)).max() < 0.02


def test_only_products_of_values_and_plain_weights_are_quantised() -> None:
    class Products(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(8, 8))
            self.weights = nn.Parameter(torch.rand(3, 8, 8))  # a product of its own for each channel
            self.layer = nn.Linear(8, 8, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x) + self.weight @ x + x @ self.weights + x @ x.mT

    torch.manual_seed(0)
    graph = to_graph(Products())
    assert Counter(node.op_type for node in onnx.load_from_string(graph).graph.node)["MatMul"] == 4
    half = QuantizableGraph(graph, IMAGES)
    assert len(half.nodes) == 1
    expected = run(graph, IMAGES)
    assert np.abs(run(quantise(graph), IMAGES) - expected).max() < 0.01 * np.abs(expected).max()


def test_a_product_of_what_is_turned_stays_in_fp32() -> None:
    nodes = [
        helper.make_node("Flatten", ["x"], ["flat"]),
        helper.make_node("Gemm", ["flat", "w"], ["mean"], transA=1),
    ]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", 1, [24, 3, 8, 8])],
        [helper.make_tensor_value_info("mean", 1, [192, 2])],
        [numpy_helper.from_array(np.ones((24, 2), np.float32), "w")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    assert QuantizableGraph(model.SerializeToString(), IMAGES).nodes == []


def test_a_transposed_convolution_stays_in_fp32(tmp_path: Path) -> None:
    torch.manual_seed(0)
    graph = to_graph(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 8, 4, 2, 1), nn.ReLU(), nn.Conv2d(8, 2, 3))
    half = QuantizableGraph(graph, IMAGES)
    assert len(half.nodes) == 2
    found = optimised(quantise(graph), tmp_path)
    assert (found["QLinearConv"], found["ConvTranspose"]) == (2, 1)


def test_a_residual_sum_is_computed_in_int8(tmp_path: Path) -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.last = (nn.Conv2d(*shape, 3, padding=1) for shape in ((3, 8), (8, 8), (8, 2)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = torch.relu(self.first(x))
            return self.last(torch.relu(hidden + self.second(hidden)))

    torch.manual_seed(0)
    graph = to_graph(Residual())
    found = optimised(quantise(graph), tmp_path)
    assert (found["QLinearConv"], found["QLinearAdd"]) == (3, 1)
    assert (found["QuantizeLinear"], found["DequantizeLinear"]) == (1, 1)
    assert np.abs(run(quantise(graph), IMAGES) - run(graph, IMAGES)).max() < 0.02


def test_sums_that_8_bits_would_saturate_are_right() -> None:
    """Every product is the largest there is: on x86 without VNNI pairs of them are added in 16 bits."""
    layer = nn.Conv2d(16, 4, 3, bias=False)
    nn.init.constant_(layer.weight, 0.01)
    x = RNG.choice([0.9, 1.0], (24, 16, 8, 8)).astype(np.float32)
    graph = to_graph(layer, example=x)
    expected = run(graph, x)
    error = np.abs(run(quantise(graph, x), x) - expected).max() / np.abs(expected).max()
    assert error < 0.01


def test_a_node_left_out_is_computed_in_float(convolutions: bytes, tmp_path: Path) -> None:
    half = QuantizableGraph(convolutions, IMAGES)
    graph = half.build(half.nodes[1:], "minmax")
    assert graph is not None
    found = optimised(graph, tmp_path)
    assert (found["Conv"], found["QLinearConv"], found["QGemm"]) == (1, 1, 1)
    assert half.build([], "minmax") is None


def test_building_twice_gives_the_same_bytes(convolutions: bytes) -> None:
    assert quantise(convolutions) == quantise(convolutions)


@pytest.mark.parametrize("method", METHODS)
def test_every_way_of_calibration_gives_ranges_of_the_values(convolutions: bytes, method: str) -> None:
    model = onnx.load_from_string(convolutions)
    low, high = activation_ranges(model, IMAGES, method)["x"].range_value
    assert 0 <= low < 0.1
    assert 0.9 < high <= 1


def test_percentiles_clip_a_rare_outlier(convolutions: bytes) -> None:
    x = IMAGES.copy()
    x[0, 0, 0, 0] = 500
    model = onnx.load_from_string(convolutions)
    assert np.max(activation_ranges(model, x, "minmax")["x"].range_value) == 500
    assert np.max(activation_ranges(model, x, "percentile 99.9")["x"].range_value) < 5
