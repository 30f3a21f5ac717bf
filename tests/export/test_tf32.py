"""TF32: a twin that rounds as a GPU does, and a first layer that loses nothing by it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn

from vae_export.graphs import EncoderGraph, encoder_to_onnx
from vae_export.tf32 import tf32_twin, with_exact_first_layer

X = np.random.default_rng(0).uniform(0.5, 1, (6, 3, 8, 8)).astype(np.float32)


def to_graph(*layers: nn.Module, x: np.ndarray = X) -> bytes:
    torch.manual_seed(0)
    for layer in layers:
        for part in layer.modules():
            if hasattr(part, "reset_parameters"):
                part.reset_parameters()
    return encoder_to_onnx(EncoderGraph(nn.Sequential(*layers).eval(), "autoencoder"), torch.from_numpy(x[:2]))


def run(graph: bytes | None, x: np.ndarray = X) -> np.ndarray:
    assert graph is not None
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    return session.run(["mean"], {"x": x})[0]


def nearest(values: np.ndarray) -> np.ndarray:
    """Rounded to 11 bits by integer arithmetic, ties to even."""
    bits = values.view(np.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(np.float32)


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 8, 3, padding=1), nn.ConvTranspose2d(3, 8, 2, 2)])
def test_the_twin_rounds_both_factors_to_11_bits(layer: nn.Module) -> None:
    graph = to_graph(layer)
    expected = run(tf32_twin(graph))
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(nearest(layer.weight.numpy())))
        found = layer(torch.from_numpy(nearest(X))).numpy()
    np.testing.assert_allclose(expected, found, atol=1e-6)
    assert np.abs(run(graph) - found).max() > 1e-5


def test_products_of_two_activations_are_rounded_too() -> None:
    class Product(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ x

    expected = np.matmul(nearest(X), nearest(X))
    graph = to_graph(Product())
    np.testing.assert_allclose(run(tf32_twin(graph)), expected, rtol=1e-6)
    assert with_exact_first_layer(graph)[1] == []


def test_where_nothing_is_rounded_there_is_no_twin() -> None:
    assert tf32_twin(to_graph(nn.GroupNorm(3, 3), nn.Sigmoid())) is None


@pytest.mark.parametrize(
    "layers",
    [
        [nn.Conv2d(3, 8, 3, padding=1, stride=2)],
        [nn.ConvTranspose2d(3, 8, 2, 2)],
        [nn.Flatten(), nn.Linear(192, 8)],
        [nn.Linear(8, 5, bias=False)],
    ],
    ids=["Conv", "ConvTranspose", "Gemm", "MatMul"],
)
def test_a_first_layer_in_parts_loses_nothing(layers: list[nn.Module]) -> None:
    graph = to_graph(*layers)
    exact, names = with_exact_first_layer(graph)
    assert len(names) == 1
    expected = run(graph)
    np.testing.assert_allclose(run(exact), expected, atol=1e-6)
    lost, left = (np.abs(run(tf32_twin(one)) - expected).max() for one in (graph, exact))
    assert lost > 1e-4
    assert left < 1e-6
    onnx.checker.check_model(onnx.load_from_string(exact), full_check=True)


def test_layers_after_the_first_are_as_they_were() -> None:
    graph = to_graph(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    exact, names = with_exact_first_layer(graph)
    assert len(names) == 1
    weights = {t.name: numpy_helper.to_array(t).shape for t in onnx.load_from_string(exact).graph.initializer}
    assert [shape for shape in weights.values() if len(shape) == 4] == [(4, 8, 3, 3), (8, 9, 3, 3)]
    assert np.abs(run(tf32_twin(exact)) - run(graph)).max() > 1e-5  # the second still rounds


def test_layers_in_groups_stay() -> None:
    graph = to_graph(nn.Conv2d(3, 6, 3, groups=3))
    assert with_exact_first_layer(graph)[1] == []


def test_two_layers_that_read_the_input_share_its_parts() -> None:
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.left(x) + self.right(x)

    graph = to_graph(Fork())
    exact, names = with_exact_first_layer(graph)
    assert len(names) == 2
    assert Counter(node.op_type for node in onnx.load_from_string(exact).graph.node)["Concat"] == 1
    assert np.abs(run(tf32_twin(exact)) - run(graph)).max() < 1e-6


def test_a_layer_that_stays_rounds_what_another_has_in_parts() -> None:
    class Stem(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.grouped, self.plain, self.linear = nn.Conv2d(3, 3, 1, groups=3), nn.Conv2d(3, 3, 1), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.grouped(x) + self.plain(x) + nn.functional.linear(x, self.linear.weight)  # along other axes

    graph = to_graph(Stem())
    exact, names = with_exact_first_layer(graph)
    assert len(names) == 2
    np.testing.assert_allclose(run(exact), run(graph), atol=1e-6)
    lost, left = (np.abs(run(tf32_twin(one)) - run(graph)).max() for one in (graph, exact))
    assert 1e-5 < left < 0.9 * lost


def product(operator: str, weight: np.ndarray, x: list[Any], y: list[Any], **attributes: int) -> bytes:
    """A single layer x, `w` -> mean, beside initializers by the names that a rewriting would choose first."""
    taken = [
        numpy_helper.from_array(np.full(3, np.nan, np.float32), name)
        for name in ("w_tf32", "w_parts_0", "tf32_splitter")
    ]
    graph = helper.make_graph(
        [helper.make_node(operator, ["x", "w"], ["mean"], **attributes)], "g",
        [helper.make_tensor_value_info("x", 1, x)], [helper.make_tensor_value_info("mean", 1, y)],
        [numpy_helper.from_array(weight, "w"), *taken],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return model.SerializeToString()


@pytest.mark.parametrize("is_transposed", [0, 1])
def test_products_with_a_weight_either_way_up(is_transposed: int) -> None:
    weight = np.random.default_rng(1).standard_normal((8, 8), np.float32)
    graph = product("Gemm", weight, ["batch", 8], ["batch", 8], transB=is_transposed)
    exact, names = with_exact_first_layer(graph)
    assert len(names) == 1
    x = X[0, 0]
    expected = x @ (weight.T if is_transposed else weight)
    np.testing.assert_allclose(run(tf32_twin(exact), x), expected, atol=1e-6)
    assert np.abs(run(tf32_twin(graph), x) - expected).max() > 1e-5


def test_a_product_of_what_is_turned_stays() -> None:
    weight = np.random.default_rng(1).standard_normal((8, 8), np.float32)
    graph = product("Gemm", weight, [8, 8], [8, 8], transA=1)
    exact, names = with_exact_first_layer(graph)
    assert names == []
    np.testing.assert_allclose(run(exact, X[0, 0]), X[0, 0].T @ weight, atol=1e-6)


def test_a_product_with_a_vector_stays() -> None:
    graph = product("MatMul", np.ones(8, np.float32), ["batch", 8], ["batch"])
    exact, names = with_exact_first_layer(graph)
    assert names == []
    np.testing.assert_allclose(run(exact, X[0, 0]), X[0, 0].sum(axis=1), rtol=1e-6)


def test_layers_with_weights_that_are_not_constant_stay() -> None:
    graph = product("MatMul", np.eye(8, dtype=np.float32), ["batch", 3, 8, 8], ["batch", 3, 8, 8])
    model = onnx.load_from_string(graph)
    model.graph.node[0].input[1] = "same"
    model.graph.node.insert(0, helper.make_node("Identity", ["w"], ["same"]))
    exact, names = with_exact_first_layer(model.SerializeToString())
    assert names == []
    np.testing.assert_array_equal(run(exact), X)
