"""fp16: kept apart from overflow by measured ranges, and measured as a device computes it."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import nn

from vae_export.float16 import MOVES, ConvertibleGraph
from vae_export.graphs import EncoderGraph, encoder_to_onnx
from vae_export.halves import ReducedHalf

X = np.random.default_rng(0).uniform(0.5, 1, (24, 3, 8, 8)).astype(np.float32)


def to_graph(*layers: nn.Module) -> bytes:
    return encoder_to_onnx(EncoderGraph(nn.Sequential(*layers), "autoencoder"), torch.from_numpy(X[:2]))


def run(graph: bytes | None, x: np.ndarray = X) -> np.ndarray:
    assert graph is not None
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    return session.run(["mean"], {"x": x})[0]


def make_layers() -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 3)]


def scaled(layers: list[nn.Module], factor: float, first: int, last: int) -> list[nn.Module]:
    """The same function with activations times `factor` from layer `first` up to layer `last`."""
    with torch.no_grad():
        for index in range(first, last, 2):
            layers[index].bias.mul_(factor)
        layers[first].weight.mul_(factor)
        layers[last].weight.div_(factor)
    return layers


@pytest.fixture(scope="module")
def plain_graph() -> bytes:
    return to_graph(*make_layers(), nn.Upsample(scale_factor=2), nn.Conv2d(2, 2, 1), nn.Sigmoid())


@pytest.fixture(scope="module")
def converted(plain_graph: bytes) -> ReducedHalf:
    return ConvertibleGraph(plain_graph, X).build()


def test_the_boundary_is_float32_and_the_inside_float16(plain_graph: bytes, converted: ReducedHalf) -> None:
    assert converted.graph is not None
    model = onnx.load_from_string(converted.graph)
    before = onnx.load_from_string(plain_graph).graph
    assert [(end.name, end.type) for end in model.graph.input] == [(end.name, end.type) for end in before.input]
    assert [(end.name, end.type) for end in model.graph.output] == [(end.name, end.type) for end in before.output]
    weights = [tensor for tensor in model.graph.initializer if tensor.name.endswith("weight")]
    assert {tensor.data_type for tensor in weights} == {TensorProto.FLOAT16}
    assert converted.kept == []
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": 20}
    onnx.checker.check_model(model, full_check=True)


def test_the_image_is_made_in_float32(converted: ReducedHalf) -> None:
    model = onnx.shape_inference.infer_shapes(onnx.load_from_string(converted.graph or b""))
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    (sigmoid,) = (node for node in model.graph.node if node.op_type == "Sigmoid")
    assert types[sigmoid.input[0]] == TensorProto.FLOAT
    assert sigmoid.output[0] == "mean"


def test_it_agrees_with_fp32_and_with_its_twin(plain_graph: bytes, converted: ReducedHalf) -> None:
    expected = run(plain_graph)
    assert 0 < np.abs(run(converted.graph) - expected).max() < 2e-3
    assert 0 < np.abs(run(converted.twin) - expected).max() < 2e-3


def test_nodes_that_would_overflow_stay_in_fp32() -> None:
    graph = to_graph(*scaled(make_layers(), 1e6, 2, 4))
    result = ConvertibleGraph(graph, X).build()
    kept = [node.op_type for node in onnx.load_from_string(graph).graph.node if node.name in result.kept]
    assert Counter(kept) == {"Conv": 2, "Relu": 1}  # the one that writes, the one that reads, and what is between
    expected = run(graph)
    assert np.abs(run(result.twin) - expected).max() < 2e-3 * np.abs(expected).max()


def test_the_twin_overflows_where_a_device_would_and_the_cpu_does_not() -> None:
    x = X * 100  # real inputs far beyond those that were calibrated on
    graph = to_graph(*scaled(make_layers(), 1e4, 2, 4))
    result = ConvertibleGraph(graph, X / 1e4).build()
    assert result.kept == []
    assert np.isfinite(run(result.graph, x)).all()  # onnxruntime computes it in float32
    assert not np.isfinite(run(result.twin, x)).all()


def test_activations_may_be_four_times_those_of_the_examples() -> None:
    layers = make_layers()
    for layer in layers[::2]:
        nn.init.zeros_(layer.bias)  # so that activations grow as the input does
    with torch.no_grad():
        layers[2].weight.mul_(16_000 / nn.Sequential(*layers[:3])(torch.from_numpy(X)).abs().max())
        layers[4].weight.div_(1000)
    graph = to_graph(*layers)  # its activations are up to 16,000; float16 ends at 65,504
    result = ConvertibleGraph(graph, X).build()
    assert result.kept == []
    assert np.isfinite(run(result.twin, 4 * X)).all()
    assert ConvertibleGraph(graph, 1.1 * X).build().kept != []


@pytest.mark.parametrize(
    ("weight", "kept"), [(1e5, 1), (1e-9, 1), (6e4, 0), (1e-3, 0)], ids=["overflow", "underflow", "large", "small"]
)
def test_weights_that_float16_does_not_hold_stay_in_fp32(plain_graph: bytes, weight: float, kept: int) -> None:
    model = onnx.load_from_string(plain_graph)
    first = next(tensor for tensor in model.graph.initializer if tensor.name == "encoder.0.weight")
    first.CopyFrom(numpy_helper.from_array(np.full_like(numpy_helper.to_array(first), weight), first.name))
    names = ConvertibleGraph(model.SerializeToString(), X * 0).build().kept
    assert [node.op_type for node in model.graph.node if node.name in names] == ["Conv"] * kept


def test_constants_that_are_no_weights_keep_nothing_in_fp32() -> None:
    class Rest(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[:, :, 1:]  # to the largest integer, which float16 does not hold

    conv = nn.Conv2d(3, 2, 3)
    graph = to_graph(conv, Rest())
    assert max(numpy_helper.to_array(one).max() for one in onnx.load_from_string(graph).graph.initializer) > 2**62
    assert ConvertibleGraph(graph, X).build().kept == []


def test_ten_groups_are_no_type() -> None:
    """TensorProto.FLOAT16 is 10."""
    torch.manual_seed(0)
    graph = to_graph(nn.Conv2d(3, 10, 1), nn.Conv2d(10, 10, 3, groups=10), nn.Conv2d(10, 2, 1))
    result = ConvertibleGraph(graph, X).build()
    np.testing.assert_allclose(run(result.twin), run(graph), atol=5e-3)


class PixelNorm(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-8)


class RootMeanSquareNorm(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (1 / (x.square().mean(1, keepdim=True).sqrt() + 1e-6))


class ScaledNorm(nn.Module):
    """form: where the quotient, which is beyond float16's range at 0, goes before it meets x."""

    def __init__(self, form: int) -> None:
        super().__init__()
        self.form, self.scale = form, nn.Parameter(torch.full((1, 8, 1, 1), 1.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        norm = x.norm(dim=1) + 1e-6
        if self.form == 0:
            return x * (1 / norm)[:, None].expand(x.shape)
        return (
            x * {1: self.scale * (1 / norm[:, None]), 2: self.scale / norm[:, None], 3: norm[:, None] ** -1}[self.form]
        )


class L2Norm(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(x, dim=1)


class DividedByItsNorm(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / (x.norm(dim=1) + 1e-9)[:, None].expand(x.shape)


class Turned(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.transpose(2, 3)


class LogOfIts(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.log(x + 1e-9) / 20


@pytest.mark.parametrize(
    "norm",
    [
        *(PixelNorm(), RootMeanSquareNorm(), L2Norm(), DividedByItsNorm(), LogOfIts()),
        *(ScaledNorm(form) for form in range(4)),
    ],
    ids=lambda norm: f"{type(norm).__name__}{getattr(norm, 'form', '')}",
)
def test_what_guards_against_zero_does_so_in_fp16(norm: nn.Module) -> None:
    torch.manual_seed(0)
    first = nn.Conv2d(3, 8, 1)
    nn.init.zeros_(first.bias)
    graph = to_graph(first, nn.ReLU(), norm, nn.Conv2d(8, 2, 1))
    x = X.copy()
    x[:, :, :4] = 0
    expected, result = run(graph, x), ConvertibleGraph(graph, X).build()
    assert np.abs(run(result.twin, x) - expected).max() < 5e-3 * np.abs(expected).max()
    narrow = [
        t for t in onnx.load_from_string(result.graph or b"").graph.initializer if t.data_type == TensorProto.FLOAT16
    ]
    assert {tuple(tensor.dims) for tensor in narrow} >= {(8, 3, 1, 1), (2, 8, 1, 1)}


def test_what_onnx_has_for_float32_alone_stays_so() -> None:
    torch.manual_seed(0)
    graph = to_graph(nn.Conv2d(3, 8, 1), nn.CELU(), nn.Conv2d(8, 2, 1))
    result = ConvertibleGraph(graph, X).build()
    assert np.abs(run(result.graph) - run(graph)).max() < 2e-3


def test_moving_from_fp32_to_fp32_is_no_reason_for_float16() -> None:
    """Nor does a value that is moved on its way between two layers in float16 become float32."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 1), DividedByItsNorm(), nn.Conv2d(8, 8, 1), Turned(), nn.Conv2d(8, 2, 1)
    model = onnx.load_from_string(ConvertibleGraph(to_graph(*layers), X).build().graph or b"")
    types = {v.name: v.type.tensor_type.elem_type for v in onnx.shape_inference.infer_shapes(model).graph.value_info}
    moved = {node.op_type: types[node.output[0]] for node in model.graph.node if node.op_type in MOVES}
    assert moved["Expand"] == TensorProto.FLOAT
    assert moved["Transpose"] == TensorProto.FLOAT16


def test_where_nothing_can_be_in_float16_there_is_no_graph() -> None:
    result = ConvertibleGraph(to_graph(nn.Conv2d(3, 2, 3)), X * 1e6).build()
    assert (result.graph, result.twin) == (None, None)
    assert len(result.kept) == 1


def test_on_demand_everything_before_the_second_layer_stays_in_fp32() -> None:
    torch.manual_seed(0)
    graph = to_graph(
        nn.Conv2d(3, 8, 3), nn.GroupNorm(8, 8), nn.SiLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1)
    )
    flat = np.random.default_rng(0).uniform(0.90, 0.91, X.shape).astype(np.float32)
    half = ConvertibleGraph(graph, flat)
    expected, error = run(graph, flat), {}
    for keep_first in (False, True):
        result = half.build(keep_first=keep_first)
        error[keep_first] = np.abs(run(result.twin, flat) - expected).max()
        model = onnx.load_from_string(result.graph or b"")
        narrow = [t.name for t in model.graph.initializer if t.data_type == TensorProto.FLOAT16]
        assert ("encoder.0.weight" in narrow, "encoder.3.weight" in narrow) == (not keep_first, True)
        kept = {node.op_type for node in onnx.load_from_string(graph).graph.node if node.name in result.kept}
        assert kept >= {"Conv", "InstanceNormalization", "Sigmoid"} if keep_first else kept == set()
        assert "Relu" not in kept
    assert error[True] < 0.1 * error[False]


def test_what_would_overflow_stays_in_fp32_beside_the_first_layer() -> None:
    half = ConvertibleGraph(to_graph(*scaled(make_layers(), 1e6, 2, 4)), X)
    plain, both = half.build().kept, half.build(keep_first=True).kept
    assert len(plain) == 3
    assert set(plain) < set(both)


def test_what_a_shortcut_carries_past_the_second_layer_is_float16() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self.first(2 * x - 1)
            return hidden + torch.relu(self.second(hidden))

    torch.manual_seed(0)
    graph = to_graph(Block(), nn.Conv2d(8, 2, 1))
    result = ConvertibleGraph(graph, X).build(keep_first=True)
    kept = [node.op_type for node in onnx.load_from_string(graph).graph.node if node.name in result.kept]
    assert kept == ["Mul", "Sub", "Conv"]
    assert 0 < np.abs(run(result.twin) - run(graph)).max() < 2e-3


def test_of_a_half_with_one_layer_nothing_is_left_in_float16() -> None:
    half = ConvertibleGraph(to_graph(nn.Conv2d(3, 2, 3)), X)
    assert half.build().graph is not None
    assert half.build(keep_first=True).graph is None


def test_values_between_two_nodes_in_fp32_never_pass_through_float16() -> None:
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self.first(x) * 1e6  # read by two
            return self.second(hidden) * 1e-6 + self.third(hidden) * 1e-6

    torch.manual_seed(0)
    fork, after = Fork(), nn.Conv2d(4, 2, 1)
    graph = to_graph(fork, nn.ReLU(), after)
    result = ConvertibleGraph(graph, X).build()
    assert result.graph is not None
    expected = run(graph)
    assert np.abs(run(result.twin) - expected).max() < 2e-3 * np.abs(expected).max()
    model = onnx.load_from_string(result.graph)
    assert len({name for node in model.graph.node for name in node.output}) == sum(
        len(node.output) for node in model.graph.node
    )
    narrow = [t for t in model.graph.initializer if t.data_type == TensorProto.FLOAT16]
    assert any(
        np.array_equal(numpy_helper.to_array(t), after.weight.detach().numpy().astype(np.float16)) for t in narrow
    )


def test_a_float16_value_that_two_nodes_in_fp32_read_is_cast_once() -> None:
    torch.manual_seed(0)
    graph = to_graph(nn.Conv2d(3, 2, 3), nn.SiLU())  # a sigmoid and a product, both after the last layer
    result = ConvertibleGraph(graph, X).build()
    onnx.checker.check_model(onnx.load_from_string(result.graph or b""), full_check=True)
    assert np.abs(run(result.graph) - run(graph)).max() < 2e-3


def test_what_ends_onnxruntime_on_a_cpu_is_not_tried(tmp_path: Path) -> None:
    """A sequence that is turned, as attention does it; see `vae_runtime.engine.CRASHING_ON_FLOAT16`."""
    script = """
from pathlib import Path
import numpy as np, onnx
from onnx import TensorProto as T, helper as h, numpy_helper
from vae_export.importers.onnx_source import open_graph
from vae_runtime.boundary import encoder_boundary
from vae_runtime.devices import CPU, Device
from vae_runtime.manifest import InputSpec
from vae_runtime.session import GraphSession

def model(kind, first, last):
    turn, multiply = h.make_node("Transpose", ["a"], ["b"], perm=[1, 0, 2]), h.make_node("MatMul", ["b", "w"], ["c"])
    nodes = [*first, turn, multiply, *last]
    ends = [h.make_tensor_value_info("x", kind, ["n", 12]), h.make_tensor_value_info("mean", kind, ["n", 12])]
    constants = {"w": np.ones((4, 4), np.float16), "s": np.array([-1, 3, 4]), "t": np.array([-1, 12])}
    weights = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = h.make_graph(nodes, "g", ends[:1], ends[1:], weights)
    return h.make_model(graph, opset_imports=[h.make_opsetid("", 20)], ir_version=10)

first, last = h.make_node("Reshape", ["x", "s"], ["a"]), h.make_node("Reshape", ["c", "t"], ["mean"])
onnx.save(model(T.FLOAT16, [first], [last]), "theirs.onnx")
open_graph(Path("theirs.onnx"), "encoder")
cast, back = h.make_node("Cast", ["x"], ["narrow"], to=T.FLOAT16), h.make_node("Cast", ["wide"], ["mean"], to=T.FLOAT)
first.input[0], last.output[0] = "narrow", "wide"
ours = model(T.FLOAT, [cast, first], [last, back]).SerializeToString()
spec = InputSpec("vector", (12,))
session = GraphSession(ours, "encoder", Device("cpu", CPU), encoder_boundary("autoencoder", spec, (12,)))
assert session.run(np.ones((3, 12), np.float32))[0].max() == 4
print("done")
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


class ShareAboveZero(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (x > 0).float().mean((1, 2, 3), keepdim=True)


class NearestExact(nn.Module):
    """Gathers by positions that are computed from the size, in float32."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.interpolate(x, scale_factor=3, mode="nearest-exact")[..., 1::3, 1::3]


@pytest.mark.parametrize("layer", [ShareAboveZero(), NearestExact()])
def test_numbers_that_are_no_floats_are_cast_to_float32_before_nodes_in_it(layer: nn.Module) -> None:
    first, *rest = make_layers()
    module = EncoderGraph(nn.Sequential(first, layer, *rest), "autoencoder")
    graph = encoder_to_onnx(module, torch.from_numpy(X[:2]), free=True)
    built = ConvertibleGraph(graph, X).build()
    expected = run(graph)
    for found in (run(built.graph), run(built.twin)):
        np.testing.assert_allclose(found, expected, atol=5e-3 * np.abs(expected).max())
    tensors = onnx.load_from_string(built.graph or b"").graph.initializer
    weights = [tensor for tensor in tensors if len(tensor.dims) == 4]
    assert [tensor.data_type for tensor in weights].count(TensorProto.FLOAT16) >= 2


class AboveHalf(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x >= 0.5).float()


def test_values_below_a_threshold_are_not_rounded_to_it() -> None:
    """As where the input becomes black and white. By ONNX's reference implementation: onnxruntime's for CPUs takes such
    casts away."""
    torch.manual_seed(0)
    below = np.full_like(X[:1], np.nextafter(np.float32(0.5), np.float32(0)))
    assert np.float16(below[0, 0, 0, 0]) == 0.5
    graph = to_graph(AboveHalf(), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    found = ConvertibleGraph(graph, X).build().graph
    assert found is not None
    halved, plain = (ReferenceEvaluator(onnx.load_from_string(one)) for one in (found, graph))
    np.testing.assert_allclose(halved.run(None, {"x": below})[0], plain.run(None, {"x": below})[0], atol=1e-3)
    assert np.abs(plain.run(None, {"x": below})[0] - plain.run(None, {"x": X[:1]})[0]).max() > 0.02
