"""Rewrites give the same result with fewer or faster nodes, or do nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from vae_export.graphs import DecoderGraph, EncoderGraph, decoder_to_onnx, encoder_to_onnx
from vae_export.rewrite import rewrite
from vae_training.models import build_model, default_config

RANDOM = np.random.default_rng(0)


def operators(model: onnx.ModelProto | bytes) -> list[str]:
    model = onnx.load_from_string(model) if isinstance(model, bytes) else model
    return [node.op_type for node in model.graph.node]


def run(model: onnx.ModelProto | bytes, x: np.ndarray) -> list[np.ndarray]:
    data = model if isinstance(model, bytes) else model.SerializeToString()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})


def make_model(nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray], features: int, outputs: tuple[str, ...]):
    """A graph from x (batch, features)."""
    ranks = {
        name: 4 * [None] if name == "y" and any(part.op_type == "Reshape" for part in nodes) else 2 * [None]
        for name in outputs
    }
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", features])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ranks[name]) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    return model


def floats(*shape: int) -> np.ndarray:
    return RANDOM.uniform(0.5, 1.5, shape).astype(np.float32)


WEIGHTS = {"w": floats(6, 5), "b": floats(5), "one": floats(1), "wide": floats(6, 12), "shape": np.array([-1, 3, 2, 2])}
WEIGHTS |= {name: floats(5) for name in ("five", "gamma", "beta", "mean", "variance")}
WEIGHTS |= {name: floats(3) for name in ("gamma3", "beta3", "mean3", "variance3")}
WEIGHTS |= {"six": floats(6), "channels": floats(3, 1, 1), "pixels": floats(2, 2), "far": 1e6 * floats(5)}
WEIGHTS |= {"rows": floats(5, 1), "zero": np.zeros(1, np.float32)}
node = helper.make_node
GEMM, WIDE = node("Gemm", ["x", "w", "b"], ["h"]), node("Gemm", ["x", "wide"], ["h"])
RESHAPE = node("Reshape", ["h", "shape"], ["r"])
NORM = ["gamma", "beta", "mean", "variance"]

FOLDED = {
    "scale and shift": ([GEMM, node("Mul", ["h", "five"], ["m"]), node("Add", ["m", "one"], ["y"])], ["Gemm"]),
    "constants first": ([GEMM, node("Mul", ["five", "h"], ["m"]), node("Add", ["one", "m"], ["y"])], ["Gemm"]),
    "sub and div": ([GEMM, node("Sub", ["h", "five"], ["m"]), node("Div", ["m", "one"], ["y"])], ["Gemm"]),
    "batch norm": ([GEMM, node("BatchNormalization", ["h", *NORM], ["y"], epsilon=0.1)], ["Gemm"]),
    "batch norm after reshape": (
        [WIDE, RESHAPE, node("BatchNormalization", ["r", *(f"{name}3" for name in NORM)], ["y"])],
        ["Gemm", "Reshape"],
    ),
    "channels after reshape": ([WIDE, RESHAPE, node("Mul", ["r", "channels"], ["y"])], ["Gemm", "Reshape"]),
    "transposed weights": (
        [node("Gemm", ["x", "b5"], ["h"], transB=1), node("Mul", ["h", "five"], ["y"])],
        ["Gemm"],
    ),
    "scale before": ([node("Div", ["x", "six"], ["s"]), node("Gemm", ["s", "w", "b"], ["y"])], ["Gemm"]),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDED)
def test_affine_operators_go_into_the_weights(name: str) -> None:
    nodes, expected = FOLDED[name]
    model = make_model(nodes, {**WEIGHTS, "b5": floats(5, 6)}, 6, ("y",))
    x = RANDOM.standard_normal((7, 6)).astype(np.float32)
    before = run(model, x)
    rewrite(model)
    onnx.checker.check_model(model)
    assert operators(model) == expected
    np.testing.assert_allclose(run(model, x)[0], before[0], rtol=2e-6, atol=2e-6)
    used = {source for part in model.graph.node for source in part.input}
    assert {entry.name for entry in model.graph.initializer} <= used


UNSAFE = {
    "the graph gives the result before": ([GEMM, node("Mul", ["h", "five"], ["y"])], ("y", "h")),
    "another node takes the result before": (
        [GEMM, node("Mul", ["h", "five"], ["m"]), node("Relu", ["h"], ["y"])], ("y", "m"),
    ),
    "both factors": ([GEMM, node("Mul", ["h", "h"], ["y"])], ("y",)),
    "per pixel": ([WIDE, RESHAPE, node("Mul", ["r", "pixels"], ["y"])], ("y",)),
    "per row": ([GEMM, node("Mul", ["h", "rows"], ["y"])], ("y",)),
    "constant minus": ([GEMM, node("Sub", ["five", "h"], ["y"])], ("y",)),
    "computed weights": (
        [node("Relu", ["w"], ["v"]), node("Gemm", ["x", "v", "b"], ["h"]), node("Mul", ["h", "five"], ["y"])], ("y",),
    ),
    "alpha": ([node("Gemm", ["x", "w", "b"], ["h"], alpha=2.0), node("Mul", ["h", "five"], ["y"])], ("y",)),
    "centring before": ([node("Sub", ["x", "six"], ["s"]), node("Gemm", ["s", "w", "b"], ["y"])], ("y",)),
    "large offset": ([GEMM, node("Add", ["h", "far"], ["y"])], ("y",)),
    "division by zero": ([GEMM, node("Div", ["h", "zero"], ["y"])], ("y",)),
}  # fmt: skip


@pytest.mark.parametrize("name", UNSAFE)
def test_what_is_not_certain_is_left_alone(name: str) -> None:
    nodes, outputs = UNSAFE[name]
    model = make_model(nodes, WEIGHTS, 6, outputs)
    before = [part.SerializeToString() for part in model.graph.node]
    rewrite(model)
    assert [part.SerializeToString() for part in model.graph.node] == before


def normalised(*after: onnx.NodeProto, sides: tuple[int | None, ...] = (6, 5), back: tuple[int, ...] = (-1, 3, 6, 5)):
    """A model from x (batch, 3, *sides) to y: its instances normalised as groups of single channels, then `after`."""
    constants = {"into": np.array([0, 3, -1]), "back": np.array(back), "scale": floats(3), "bias": floats(3)}
    constants |= {
        "channels": floats(3, 1, 1),
        "shift": floats(1, 3, 1, 1),
        "pixels": floats(6, 5),
        "one": floats(1),
        "pair": floats(2, 1, 1),
    }
    nodes = [
        node("Reshape", ["x", "into"], ["r"]),
        node("InstanceNormalization", ["r", "scale", "bias"], ["n"]),
        node("Reshape", ["n", "back"], ["b"]),
        *after,
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, *sides])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * len(back))
    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "graph", [x], [y], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize("back", [(-1, 3, 6, 5), (0, 3, 5, 6)])
def test_scale_and_shift_go_into_the_normalisation(back: tuple[int, ...]) -> None:
    model = normalised(node("Mul", ["channels", "b"], ["m"]), node("Add", ["m", "shift"], ["y"]), back=back)
    x = RANDOM.standard_normal((4, 3, 6, 5)).astype(np.float32)
    before = run(model, x)
    rewrite(model)
    onnx.checker.check_model(model, full_check=True)
    assert operators(model) == ["Reshape", "InstanceNormalization", "Reshape"]
    np.testing.assert_allclose(run(model, x)[0], before[0], rtol=1e-5, atol=1e-5)


def test_scale_goes_into_a_normalisation_without_groups() -> None:
    model = normalised(node("Mul", ["channels", "b"], ["y"]))
    nodes = [node("InstanceNormalization", ["x", "scale", "bias"], ["n"]), node("Mul", ["n", "channels"], ["y"])]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    x = RANDOM.standard_normal((4, 3, 6, 5)).astype(np.float32)
    before = run(model, x)
    rewrite(model)
    assert operators(model) == ["InstanceNormalization"]
    np.testing.assert_allclose(run(model, x)[0], before[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("after", "changes"),
    [
        ([node("Mul", ["b", "pixels"], ["y"])], {}),
        ([node("Mul", ["b", "channels"], ["m"]), node("Sub", ["m", "b"], ["y"])], {}),
        ([node("Mul", ["b", "channels"], ["y"])], {"sides": (None, 5)}),
        ([node("Mul", ["b", "channels"], ["y"])], {"back": (-1, 3, 3, 5)}),  # other examples
        ([node("Mul", ["b", "pair"], ["y"])], {"back": (-1, 2, 9, 5)}),  # other channels
        ([node("Mul", ["b", "channels"], ["y"])], {"back": (4, 3, 6, 5)}),
        ([node("Mul", ["b", "one"], ["y"])], {"back": (-1,)}),
        ([node("Mul", ["b", "one"], ["y"])], {"back": (-1, 3)}),
    ],
)
def test_other_scales_of_normalisations_are_left_alone(after: list[onnx.NodeProto], changes: dict[str, Any]) -> None:
    model = normalised(*after, **changes)
    before = operators(model)
    rewrite(model)
    assert operators(model) == before


def test_shared_weights_stay_as_they_are_for_the_other_layer() -> None:
    other = node("Gemm", ["x", "w", "b"], ["z"])
    model = make_model([GEMM, node("Mul", ["h", "five"], ["y"]), other], WEIGHTS, 6, ("y", "z"))
    x = RANDOM.standard_normal((3, 6)).astype(np.float32)
    before = run(model, x)
    rewrite(model)
    assert operators(model) == ["Gemm", "Gemm"]
    for found, expected in zip(run(model, x), before, strict=True):
        np.testing.assert_allclose(found, expected, rtol=2e-6)


def transposed(kernel: tuple[int, ...], *after: onnx.NodeProto, height: int = 3, width: int = 4, **attributes: object):
    """x (batch, 2 · height · width) as a map of 2 channels through one transposed convolution without a bias."""
    constants = {"map": np.array([-1, 2, height, width]), "k": floats(2, *kernel)}
    nodes = [node("Reshape", ["x", "map"], ["r"]), node("ConvTranspose", ["r", "k"], ["y" if not after else "t"])]
    nodes[1].attribute.extend(helper.make_attribute(key, value) for key, value in attributes.items())
    return make_model([*nodes, *after], constants, 2 * height * width, ("y",))


HALF = {"strides": [2, 2], "pads": [1, 1, 1, 1]}
TRANSPOSED = {
    "k3 s2": ((5, 3, 3), {**HALF, "output_padding": [1, 1]}),
    "k4 s2": ((5, 4, 4), HALF),
    "k2 s2": ((5, 2, 2), {"strides": [2, 2]}),
    "k5 s3": ((5, 5, 5), {"strides": [3, 3], "pads": [1, 1, 1, 1]}),
    "k6 s2": ((5, 6, 6), {"strides": [2, 2], "pads": [2, 2, 2, 2]}),
    "k3x4 s2": ((5, 3, 4), {**HALF, "output_padding": [1, 0]}),
    "uneven pads": ((5, 3, 3), {"strides": [2, 2], "pads": [0, 1, 1, 0]}),
}


@pytest.mark.parametrize("name", TRANSPOSED)
@pytest.mark.parametrize("active", [False, True], ids=["plain", "active"])
def test_transposed_convolutions_of_small_maps_become_convolutions(name: str, active: bool) -> None:
    kernel, attributes = TRANSPOSED[name]
    model = transposed(kernel, *([node("LeakyRelu", ["t"], ["y"], alpha=0.3)] if active else []), **attributes)
    x = RANDOM.standard_normal((3, 24)).astype(np.float32)
    (before,) = run(model, x)
    rewrite(model)
    onnx.checker.check_model(model, full_check=True)
    assert operators(model) == ["Reshape", "Conv", *(["LeakyRelu"] if active else []), "DepthToSpace"]
    np.testing.assert_allclose(run(model, x)[0], before, atol=5e-6)


KEPT = {
    "large map": ((5, 4, 4), {**HALF, "height": 3, "width": 6}),
    "groups": ((4, 4, 4), {**HALF, "group": 2}),
    "dilation": ((4, 2, 2), {**HALF, "dilations": [2, 2], "output_padding": [1, 1]}),
    "stride 1": ((4, 3, 3), {"pads": [1, 1, 1, 1]}),
    "unequal strides": ((4, 4, 3), {"strides": [2, 1], "pads": [1, 1, 1, 1]}),
    "not twice the size": ((4, 3, 3), HALF),
    "automatic pads": ((4, 3, 3), {"strides": [2, 2], "auto_pad": "SAME_UPPER"}),
}


@pytest.mark.parametrize("name", KEPT)
def test_other_transposed_convolutions_stay(name: str) -> None:
    kernel, attributes = KEPT[name]
    model = transposed(kernel, **attributes)
    rewrite(model)
    assert operators(model) == ["Reshape", "ConvTranspose"]


def test_an_activation_beside_another_reader_stays_behind_the_shuffle() -> None:
    after = node("Relu", ["t"], ["a"]), node("Add", ["a", "t"], ["y"])
    model = transposed((5, 4, 4), *after, **HALF)
    x = RANDOM.standard_normal((3, 24)).astype(np.float32)
    (before,) = run(model, x)
    rewrite(model)
    assert operators(model) == ["Reshape", "Conv", "DepthToSpace", "Relu", "Add"]
    np.testing.assert_allclose(run(model, x)[0], before, atol=5e-6)


@pytest.mark.parametrize(
    ("family", "kind", "shape"),
    [
        ("mlp", "autoencoder", (1, 28, 28)),
        ("mlp", "vae", (7,)),
        ("conv", "vae", (1, 28, 28)),
        ("conv", "vae", (3, 17, 30)),
    ],
    ids=str,
)
def test_the_families_have_no_operator_too_many(family: str, kind: str, shape: tuple[int, ...]) -> None:
    """No normalisation, no shapes computed at run time, no arithmetic but that of the layers."""
    torch.manual_seed(0)
    model = build_model(default_config(family, kind, shape, 4))
    model.fit_normalisation(5 + 3 * torch.randn(100, *shape))
    for part in model.modules():
        if isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d)):
            for tensor in (part.running_mean, part.running_var, part.weight, part.bias):
                nn.init.uniform_(tensor, 0.5, 1.5)
    layers = {"Gemm", "Relu"} | ({"Conv"} if family == "conv" else set())
    heads = {"Split", "Clip"} if kind == "vae" else set()
    halves = {
        "encoder": (encoder_to_onnx(EncoderGraph(Encode(model), kind, clamp=False), torch.rand(2, *shape)), heads),
        "decoder": (decoder_to_onnx(DecoderGraph(Decode(model), clamp=False), torch.randn(2, 4)), set()),
    }
    for half, (graph, allowed) in halves.items():
        if len(shape) == 3:
            allowed = allowed | {"Reshape"} | ({"Sigmoid"} if half == "decoder" else set())
        elif half == "encoder":
            allowed = allowed | {"Sub"}  # centring stays in front of the first layer
        if half == "decoder" and family == "conv":
            allowed = allowed | {"DepthToSpace", "Resize", "Slice"} - ({"Slice"} if shape[1] % 4 == 0 else set())
        assert set(operators(graph)) <= layers | allowed, half
        assert operators(graph).count("Reshape") <= 1
        assert operators(graph).count("DepthToSpace") <= 1


class Encode(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model.encode(x)


class Decode(Encode):
    def forward(self, x):
        return self.model.decode(x)


def test_bundles_of_vectors_are_rewritten(exported: dict[str, Path]) -> None:
    """Through the whole export, with its verification."""
    assert operators((exported["mlp-vector"] / "decoder.onnx").read_bytes()) == ["Gemm", "Relu", "Gemm"]
    assert "Div" not in operators((exported["mlp-vector"] / "encoder.onnx").read_bytes())
