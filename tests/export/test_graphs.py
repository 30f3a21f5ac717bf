"""The exported graphs keep the contract of a bundle."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from vae_export.graphs import DecoderGraph, EncoderGraph, decoder_to_onnx, encoder_to_onnx
from vae_runtime.errors import ExportError


class Moments(nn.Module):
    """x (N, 3) -> mean and an extreme logvar, (N, 2) each."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x):
        mean = self.linear(x)
        return mean, 100 * mean


@pytest.mark.parametrize("name", ["conv", "conv-rgb", "mlp-vector", "mlp-threshold"])
def test_graphs_are_plain_onnx(exported: dict[str, Path], name: str) -> None:
    for half in ("encoder", "decoder"):
        path = exported[name] / f"{half}.onnx"
        model = onnx.load(path)
        assert {entry.domain: entry.version for entry in model.opset_import} == {"": 20}
        assert model.ir_version == 10
        assert not any(node.metadata_props or node.doc_string or node.domain for node in model.graph.node)
        assert not model.metadata_props
        assert not model.graph.metadata_props
        assert str(Path.cwd()).encode() not in path.read_bytes()
        assert b"site-packages" not in path.read_bytes()
        assert b".py" not in path.read_bytes()


@pytest.mark.parametrize(("name", "outputs"), [("conv", ["mean", "logvar"]), ("conv-rgb", ["mean"])])
def test_names_shapes_and_dynamic_batch(exported: dict[str, Path], name: str, outputs: list[str]) -> None:
    encoder = onnx.load(exported[name] / "encoder.onnx").graph
    decoder = onnx.load(exported[name] / "decoder.onnx").graph
    assert [value.name for value in encoder.input] == ["x"]
    assert [value.name for value in encoder.output] == outputs
    assert [value.name for value in decoder.input] == ["z"]
    assert [value.name for value in decoder.output] == ["reconstruction"]
    for value in (*encoder.input, *encoder.output, *decoder.input, *decoder.output):
        first, *rest = value.type.tensor_type.shape.dim
        assert first.dim_param, f"{value.name} has a fixed batch"
        assert all(dimension.dim_value > 0 for dimension in rest)


def test_normalisation_is_folded_into_the_convolutions(exported: dict[str, Path]) -> None:
    for half in ("encoder", "decoder"):
        operators = {node.op_type for node in onnx.load(exported["conv"] / f"{half}.onnx").graph.node}
        assert "Conv" in operators
        assert "BatchNormalization" not in operators


def test_latent_scale_and_shift_follow_the_stated_formula() -> None:
    torch.manual_seed(0)
    encoder, x = Moments(), torch.randn(5, 3)
    mean, logvar = encoder(x)
    found_mean, found_logvar = EncoderGraph(encoder, "vae", scale=0.5, shift=1.5)(x)
    torch.testing.assert_close(found_mean, (mean - 1.5) * 0.5)
    torch.testing.assert_close(found_logvar, logvar.clamp(-30, 20) + 2 * math.log(0.5))
    decoder = nn.Linear(2, 3)
    torch.testing.assert_close(DecoderGraph(decoder, False, scale=0.5, shift=1.5)(found_mean), decoder(mean))


def test_logvar_is_clamped_before_the_scale_is_added() -> None:
    encoder = Moments()
    nn.init.constant_(encoder.linear.weight, 1.0)
    nn.init.zeros_(encoder.linear.bias)
    _, logvar = EncoderGraph(encoder, "vae", scale=math.e)(torch.tensor([[9.0, 9.0, 9.0], [-9.0, -9.0, -9.0]]))
    np.testing.assert_allclose(logvar.detach().numpy(), [[22, 22], [-28, -28]], rtol=1e-6)


def test_images_are_cut_to_the_unit_range_and_vectors_are_not() -> None:
    z = torch.tensor([[-3.0, 0.25, 7.0]])
    assert DecoderGraph(nn.Identity(), clamp=True)(z).tolist() == [[0.0, 0.25, 1.0]]
    assert DecoderGraph(nn.Identity(), clamp=False)(z).tolist() == z.tolist()


def test_threshold_is_inside_the_encoder(exported: dict[str, Path], checkpoints) -> None:
    from vae_runtime import VAE

    vae = VAE.load(exported["mlp-threshold"])
    x = np.random.default_rng(0).random((6, 1, 8, 8), dtype=np.float32)
    binary = (x >= 0.5).astype(np.float32)
    np.testing.assert_array_equal(vae.encode(x).mean, vae.encode(binary).mean)
    model = checkpoints["mlp-threshold"].build_model()
    with torch.no_grad():
        np.testing.assert_allclose(vae.encode(x).mean, model.encode(torch.from_numpy(binary))[0], atol=1e-5)


@pytest.mark.parametrize("rows", [1, 6, 1500])
def test_grey_images_score_as_the_binary_ones_that_a_model_of_thresholds_sees(
    exported: dict[str, Path], rows: int
) -> None:
    from vae_runtime import VAE

    pixels = np.random.default_rng(rows).integers(0, 256, (rows, 8, 8), np.uint8)
    white = np.where(pixels >= 128, np.uint8(255), np.uint8(0))
    with VAE.load(exported["mlp-threshold"], threads=1) as vae:
        for method in ("reconstruction", "elbo"):
            for batch_size in (None, 7):
                found, expected = (vae.score(x, method, batch_size=batch_size) for x in (pixels, white))
                np.testing.assert_array_equal(found, expected)
            np.testing.assert_array_equal(vae.score_map(pixels, method), vae.score_map(white, method))
        decoded = vae.reconstruct(pixels)[:, 0].astype(np.float64)
        np.testing.assert_allclose(
            vae.reconstruction_error(pixels), np.square(decoded - white / 255).mean(axis=(1, 2)), rtol=1e-5
        )


class Noisy(nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x)


class Branching(nn.Module):
    def forward(self, x):
        return x + 1 if x.sum() > 0 else x


class Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("matrix", torch.eye(3).to_sparse())

    def forward(self, x):
        return torch.sparse.mm(self.matrix, x.T).T


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Sparse(), "the encoder cannot be exported by torch.onnx: "),
        (Noisy(), "the encoder cannot go into a bundle: BundleError: the encoder has the operator 'RandomNormal"),
        (Branching(), "the encoder cannot be exported by torch.onnx: "),
    ],
)
def test_what_breaks_the_contract_is_refused(module: nn.Module, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        encoder_to_onnx(EncoderGraph(module, "autoencoder"), torch.randn(2, 3))


def test_values_within_may_be_called_what_outputs_are_called() -> None:
    class Pooled(nn.Module):
        def forward(self, x):
            return x.mean((2, 3)), (x - x.mean()).std((2, 3))

    class Reconstruction(nn.Module):
        def forward(self, z):
            reconstruction = z.mean(1, keepdim=True) * z
            return reconstruction.sigmoid()

    x = torch.rand(2, 3, 4, 4)
    model = onnx.load_from_string(encoder_to_onnx(EncoderGraph(Pooled(), "vae"), x))
    assert [value.name for value in model.graph.output] == ["mean", "logvar"]
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for found, expected in zip(session.run(None, {"x": x.numpy()}), Pooled()(x), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-6)
    z = torch.rand(2, 3)
    session = onnxruntime.InferenceSession(
        decoder_to_onnx(DecoderGraph(Reconstruction(), clamp=False), z), providers=["CPUExecutionProvider"]
    )
    np.testing.assert_allclose(session.run(["reconstruction"], {"z": z.numpy()})[0], Reconstruction()(z), atol=1e-6)


def test_distributions_do_not_check_their_arguments_while_they_are_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch.distributions.Distribution, "_validate_args", True
    )  # torch's compiler turns it off for good

    class Normals(nn.Module):
        def forward(self, x):
            inside = torch.distributions.Normal(x, x.exp())
            return inside.mean, inside.stddev

    x = torch.rand(2, 4)
    graph = onnxruntime.InferenceSession(encoder_to_onnx(EncoderGraph(Normals(), "vae"), x))
    np.testing.assert_allclose(graph.run(None, {"x": x.numpy()})[1], x.exp(), rtol=1e-5)
    with pytest.raises(ValueError, match="scale"):
        torch.distributions.Normal(0.0, -1.0)


def test_more_outputs_than_the_contract_has_are_an_export_error() -> None:
    class Two(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x * 2, x

    with pytest.raises(ExportError, match="the encoder cannot be exported"):
        encoder_to_onnx(EncoderGraph(Two(), "autoencoder", clamp=False), torch.rand(2, 3))
