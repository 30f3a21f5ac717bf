"""Simplified graphs compute what they did before: also where a term is next to nothing."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from vae_export.graphs import EncoderGraph, encoder_to_onnx
from vae_export.imported import ImportOptions
from vae_export.importers import onnx_pair
from vae_export.importers.programs import script_to_onnx
from vae_export.simplify import simplified


class GuardedAgainstZero(nn.Module):
    """x (N, 3, H, W) -> mean, logvar, which small terms keep from NaN and infinity where x is 0."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x / (x.mean(dim=(1, 2, 3), keepdim=True) + 1e-9), torch.log(x + 1e-10)


def to_folder(encoder: nn.Module, decoder: nn.Module, x: torch.Tensor, folder: Path) -> str:
    """As an exporter of others writes them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, module, outputs in (("encoder", encoder, ["mean", "logvar"]), ("decoder", decoder, ["image"])):
            axes = {end: {0: "n"} for end in ("input", *outputs)}
            torch.onnx.export(
                module, (x,), folder / f"{name}.onnx", dynamo=False, opset_version=17, input_names=["input"],
                output_names=outputs, dynamic_axes=axes,
            )  # fmt: skip
    return str(folder)


@pytest.mark.parametrize("way", ["module", "script", "onnx"])
def test_terms_that_guard_against_zero_stay(way: str, tmp_path: Path) -> None:
    x, network = torch.rand(2, 3, 4, 4), GuardedAgainstZero()
    if way == "module":
        encoder = encoder_to_onnx(EncoderGraph(network, "vae", clamp=False), x)
    elif way == "script":
        traced = torch.jit.trace(network, (x,))
        encoder = script_to_onnx(EncoderGraph(traced, "vae", clamp=False), x, "x", ["mean", "logvar"], False)
    else:
        options = ImportOptions(input_range="unit")
        imported = onnx_pair.load(to_folder(network, nn.Sigmoid(), x, tmp_path), options)
        encoder, _ = imported.halves.to_onnx(x.numpy(), x.numpy(), False)
    mean, logvar = onnxruntime.InferenceSession(encoder).run(["mean", "logvar"], {"x": np.zeros((1, 3, 4, 4), "f4")})
    assert (mean == 0).all()
    np.testing.assert_allclose(logvar, np.log(1e-10), rtol=1e-6)


def one_node(operator: str, constant: float, first: bool, cast: bool = False) -> onnx.ModelProto:
    """(N, 2) with a scalar, which may come from float64."""
    kind = np.float64 if cast else np.float32
    nodes = [helper.make_node("Cast", ["c"], ["d"], to=TensorProto.FLOAT)] if cast else []
    inputs = ["d" if cast else "c", "x"]
    nodes.append(helper.make_node(operator, inputs if first else inputs[::-1], ["y"]))
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 2]) for name in ("x", "y")]
    scalar = numpy_helper.from_array(np.array(constant, kind), "c")
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], [scalar])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize("cast", [False, True], ids=["float32", "float64"])
@pytest.mark.parametrize(
    ("operator", "constant", "first"),
    [
        *(("Add", 1e-10, True), ("Add", -1e-9, False), ("Sub", 1e-10, False)),
        *(("Mul", 1.000004, True), ("Mul", 0.999996, False), ("Div", 1.000004, False)),
    ],
)
def test_what_changes_little_still_changes_it(operator: str, constant: float, first: bool, cast: bool) -> None:
    model = one_node(operator, constant, first, cast)
    x = np.array([[0, 1e-9]], np.float32)
    (before,), (after,) = (
        onnxruntime.InferenceSession(one.SerializeToString()).run(None, {"x": x}) for one in (model, simplified(model))
    )
    assert (before != x).any()
    np.testing.assert_array_equal(after, before)


@pytest.mark.parametrize(
    ("operator", "constant", "first"),
    [("Add", 0.0, True), ("Sub", 0.0, False), ("Mul", 1.0, True), ("Div", 1.0, False)],
)
def test_what_changes_nothing_goes(operator: str, constant: float, first: bool) -> None:
    assert [node.op_type for node in simplified(one_node(operator, constant, first)).graph.node] == ["Identity"]


def test_the_shape_of_a_scalar_result_stays() -> None:
    """There a term that is next to nothing goes, as onnxscript has it."""
    model = one_node("Add", 1e-10, False)
    for value in (*model.graph.input, *model.graph.output):
        del value.type.tensor_type.shape.dim[:]
    (y,) = onnxruntime.InferenceSession(simplified(model).SerializeToString()).run(None, {"x": np.array(1, np.float32)})
    assert y.shape == ()
