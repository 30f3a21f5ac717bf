"""Programs are changed into what torch.onnx exports, and compute the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from vae_export.graphs import EncoderGraph, encoder_to_onnx
from vae_export.traced import prepared

ATTENTION = torch.ops.aten.scaled_dot_product_attention.default


class Attention(nn.Module):
    """x (N, L, 6), or (L, 6), or with heads, -> of the same shape."""

    def __init__(self, mask: Any = None, after: Any = None, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.query, self.value = nn.Linear(6, 6), nn.Linear(6, 6)
        self.mask, self.after, self.options = mask, after, options

    def forward(self, x: Tensor) -> Tensor:
        mask = None if self.mask is None else self.mask(x)
        y = functional.scaled_dot_product_attention(self.query(x), x, self.value(x), attn_mask=mask, **self.options)
        return y if self.after is None else self.after(y)


VARIANTS = {
    "plain": Attention(),
    "used": Attention(after=lambda y: 2 * y + y.square()),
    "causal": Attention(is_causal=True, scale=0.3),
    "mask": Attention(lambda x: torch.ones(x.shape[-2], x.shape[-2], dtype=torch.bool).tril()),
    "own-mask": Attention(lambda x: x @ x.transpose(-1, -2)),
}


@pytest.mark.parametrize("axes", [2, 3, 4])
@pytest.mark.parametrize("name", VARIANTS)
def test_the_program_computes_the_same_with_four_axes(name: str, axes: int) -> None:
    module, shape = VARIANTS[name], (2, 3, 5, 6)[4 - axes :]
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    traced = prepared(torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)))
    (node,) = traced.graph.find_nodes(op="call_function", target=ATTENTION)
    assert [argument.meta["val"].dim() for argument in node.args[:3]] == [4, 4, 4]
    with torch.no_grad():
        torch.testing.assert_close(traced.module()(x), module(x))
        more = torch.cat([x, x.flip(0)])
        torch.testing.assert_close(traced.module()(more), module(more))


class Encoder(nn.Module):
    """An image's positions attend to one another, as in the middle of many encoders, without heads."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.first, self.last = nn.Conv2d(3, 6, 3, 2, 1), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.first(x)
        y = self.attention(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(x.shape)
        return self.last(x + y).chunk(2, 1)


def test_an_encoder_with_it_becomes_a_graph_of_free_sizes() -> None:
    graph = EncoderGraph(Encoder(), "vae")
    file = encoder_to_onnx(graph, torch.zeros(2, 3, 16, 16), free=True)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for shape in ((1, 3, 8, 12), (3, 3, 20, 6)):
        x = torch.rand(*shape, generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            expected = graph(x)
        for found, wanted in zip(session.run(None, {"x": x.numpy()}), expected, strict=True):
            np.testing.assert_allclose(found, wanted.numpy(), atol=1e-6)


class Upsampling(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        return functional.interpolate(x, mode="nearest-exact", **self.options)


@pytest.mark.parametrize(
    ("options", "becomes_resize"),
    [
        ({"scale_factor": 2}, True),
        ({"scale_factor": (1.0, 4.0)}, True),
        ({"scale_factor": 3}, False),
        ({"scale_factor": 1.5}, False),
        ({"scale_factor": 0.5}, False),
        ({"size": (14, 12)}, False),
    ],
)
def test_nearest_exact_becomes_nearest_where_these_are_the_same(options: Any, becomes_resize: bool) -> None:
    class Code(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.upsample = nn.Conv2d(3, 4, 1), Upsampling(**options)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.upsample(x))

    graph = EncoderGraph(Code(), "autoencoder")
    file = encoder_to_onnx(graph, torch.zeros(2, 3, 6, 8))
    operators = {node.op_type for node in onnx.load_from_string(file).graph.node}
    assert ("Resize" in operators) == becomes_resize
    x = torch.rand(3, 3, 6, 8, generator=torch.Generator().manual_seed(0))
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    with torch.no_grad():
        np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], graph(x).numpy(), atol=1e-6)
