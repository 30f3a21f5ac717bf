"""Precisions in a bundle: measured on held-out examples, held to the budget, written, marked or refused."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from vae_export import Budget, FewExamplesWarning, export_bundle, export_checkpoint
from vae_export.cuda_forms import for_cuda
from vae_export.graphs import DecoderGraph, EncoderGraph, decoder_to_onnx, encoder_to_onnx
from vae_export.judge import Judge
from vae_export.precisions import _reason, make_precisions
from vae_export.quality import Figures, Measurement
from vae_export.reference import Reference
from vae_export.tf32 import tf32_twin
from vae_export.wanted_precisions import Made, Wanted, check_wanted
from vae_runtime import VAE
from vae_runtime.errors import InputError
from vae_runtime.manifest import InputSpec, LatentSpec, Likelihood, Manifest

datasets = pytest.importorskip("sklearn.datasets", reason="real examples come from scikit-learn")

BERNOULLI = {"type": "bernoulli"}
ALL = ["fp32", "int8", "fp16"]
GREY = InputSpec("image", (1, 8, 8), "grey", "exact")


def digits(count: int = 160) -> np.ndarray:
    return (datasets.load_digits().images[:count] / 16).astype(np.float32)[:, None]


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, 1, 1), nn.ReLU())
        self.head = nn.Linear(256, 12)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.head(self.body(x).flatten(1)).chunk(2, dim=1)


def make_decoder() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(6, 256), nn.ReLU(), nn.Unflatten(1, (16, 4, 4)), nn.Conv2d(16, 16, 3, 1, 1), nn.ReLU(),
        nn.Conv2d(16, 4, 3, 1, 1), nn.PixelShuffle(2), nn.Sigmoid(),
    )  # fmt: skip


@pytest.fixture(scope="session")
def trained() -> tuple[nn.Module, nn.Module]:
    """A small VAE after some seconds of training on the digits."""
    torch.manual_seed(0)
    encoder, decoder, x = Encoder(), make_decoder(), torch.from_numpy(digits(1000))
    optimiser = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], 3e-3)
    for step in range(150):
        batch = x[step % 10 :: 10]
        mean, logvar = encoder(batch)
        output = decoder(mean + torch.exp(0.5 * logvar) * torch.randn_like(mean))
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum(1).mean()
        loss = nn.functional.binary_cross_entropy(output, batch, reduction="sum") / len(batch) + kl
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return encoder.eval(), decoder.eval()


@pytest.fixture(scope="session")
def written(trained: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    path = tmp_path_factory.mktemp("precisions") / "digits.vae"
    return path, export_bundle(*trained, path, examples=digits(), likelihood=BERNOULLI, precisions=ALL)


@pytest.mark.parametrize("precision", ["int8", "fp16"])
def test_openvino_runs_it_within_its_tolerance(openvino: None, written: tuple[Path, Manifest], precision: str) -> None:
    with VAE.load(written[0], device="openvino", precision=precision) as vae:
        assert vae.plan["decode"][0]["file"] == f"decoder.{precision}.onnx"
        result = vae.selftest()
    assert result.passed, result
    assert max(result.errors.values()) > 1e-6  # really that precision


@pytest.mark.parametrize("precision", ["int8", "fp16"])
def test_a_precision_is_written_measured_and_runs(written: tuple[Path, Manifest], precision: str) -> None:
    path, manifest = written
    entry = manifest.precisions[precision]
    assert (entry.encoder, entry.decoder) == (f"encoder.{precision}.onnx", f"decoder.{precision}.onnx")
    assert entry.within_budget
    assert manifest.refused == {}
    assert manifest.budget == {"psnr_db": 0.1, "nats_per_dimension": 0.005}
    assert (entry.quality["examples"], entry.quality["calibration_examples"]) == (80, 80)
    with VAE.load(path, precision=precision, threads=1) as vae, VAE.load(path, threads=1) as reference:
        assert vae.selftest().passed
        assert manifest.files[entry.encoder].bytes < manifest.files["encoder.onnx"].bytes
        held_out = digits()[1::2]
        error = np.abs(vae.decode(reference.encode(held_out).mean) - reference.reconstruct(held_out)).max()
        assert error == pytest.approx(entry.fidelity["reconstruction_max_error"], rel=0.06, abs=2e-3)
        assert vae.sample(3, seed=0).dtype == np.float32


def test_the_figures_are_those_of_the_bundle_as_it_runs(written: tuple[Path, Manifest]) -> None:
    path, manifest = written
    held_out, quality = digits()[1::2], manifest.precisions["int8"].quality
    for precision, key in (("int8", "psnr_db"), ("fp32", "fp32_psnr_db")):
        with VAE.load(path, precision=precision, threads=1) as vae:
            errors = (vae.reconstruct(held_out) - held_out).reshape(80, -1).astype(np.float64)
            assert (-10 * np.log10((errors**2).mean(1))).mean() == pytest.approx(quality[key], abs=1e-3)
            posterior = vae.encode(held_out)
            p = np.clip(vae.decode(posterior.sample(seed=0)).astype(np.float64), 1e-30, 1 - 2.0**-24)
            likelihood = (held_out * np.log(p) + (1 - held_out) * np.log(1 - p)).reshape(80, -1).sum(1)
            elbo = (posterior.kl() - likelihood).mean() / 64
            name = key.replace("psnr_db", "negative_elbo_per_dimension")
            assert elbo == pytest.approx(quality[name], abs=1e-4)
    assert quality["psnr_lost_db"] == pytest.approx(quality["fp32_psnr_db"] - quality["psnr_db"], abs=1e-4)


@pytest.mark.parametrize("precision", ["int8", "fp16"])
def test_the_round_trip_is_that_of_the_bundle_as_it_runs(written: tuple[Path, Manifest], precision: str) -> None:
    path, manifest = written
    with VAE.load(path, precision=precision, threads=1) as vae, VAE.load(path, threads=1) as reference:
        error = np.abs(vae.reconstruct(digits()[1::2]) - reference.reconstruct(digits()[1::2])).max()
    close = {"int8": 1e-6, "fp16": 2e-3}[precision]  # fp16 computes in float32 here, its twin does not
    assert manifest.precisions[precision].fidelity["round_trip_max_error"] == pytest.approx(error, rel=0.06, abs=close)


def test_making_them_again_gives_the_same_bytes(trained: Any, written: tuple[Path, Manifest]) -> None:
    path, manifest = written
    graphs = tuple((path / f"{half}.onnx").read_bytes() for half in ("encoder", "decoder"))
    again = make(trained, graphs, "vae", "int8", "fp16", likelihood=Likelihood("bernoulli"))
    assert again.precisions == {name: manifest.precisions[name] for name in ("int8", "fp16")}
    assert again.tolerance == {name: manifest.golden.tolerance[name] for name in ("int8", "fp16")}
    for file, data in again.graphs.items():
        assert (path / file).read_bytes() == data, file


def test_a_checkpoints_training_examples_calibrate_and_its_held_out_ones_measure(checkpoints, tmp_path: Path) -> None:
    manifest = export_checkpoint(checkpoints["mlp-threshold"], tmp_path / "a.vae", name="a", precisions=["int8"])
    quality = manifest.precisions["int8"].quality
    x = (checkpoints["mlp-threshold"].examples["held_out"].numpy() / 255).astype(np.float32)[:, None]
    with VAE.load(tmp_path / "a.vae", threads=1) as vae:
        errors = (vae.reconstruct(x) - (x >= 0.5)).reshape(len(x), -1)  # a threshold's model sees no grey
    assert (-10 * np.log10((errors**2).mean(1))).mean() == pytest.approx(quality["fp32_psnr_db"], abs=1e-3)


def make(
    pair: Any, graphs: Any, kind: str, *names: str, likelihood: Likelihood | None = None, x: Any = None, **options: Any
) -> Made:
    """`make_precisions` on the digits: even rows calibrate, odd rows measure. clamp: of images, done by the graph."""
    x = digits() if x is None else x
    reference = Reference(EncoderGraph(pair[0], kind), DecoderGraph(pair[1], clamp=options.get("clamp", True)))
    encoded = reference.encode(x[:4])
    golden = {"x": x[:4], **encoded, "reconstruction": reference.decode(encoded["mean"])}
    prior = {"type": "standard_normal"} if kind == "vae" else None
    wanted = Wanted(names, options.get("budget", Budget()), options.get("keep", False), x[::2], x[1::2])
    latent = LatentSpec(encoded["mean"].shape[1:], prior)
    return make_precisions(wanted, graphs, reference, GREY, latent, likelihood, golden)


def linear_graph(module: nn.Module, source: str, shape: list[int], result: str, target: list[int]) -> bytes:
    """The ONNX graph of a chain of nn.Linear, without the seconds that torch's exporter takes."""
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    constants = [numpy_helper.from_array(np.array([-1, layers[0].in_features]), "flat")]
    constants.append(numpy_helper.from_array(np.array([-1, *target]), "shaped"))
    nodes, name = [helper.make_node("Reshape", [source, "flat"], ["h"], name="flatten")], "h"
    for index, layer in enumerate(layers):
        for kind, tensor in (("w", layer.weight), ("b", layer.bias)):
            constants.append(numpy_helper.from_array(tensor.detach().numpy(), f"{kind}{index}"))
        inputs, name = [name, f"w{index}", f"b{index}"], f"h{index}"
        nodes.append(helper.make_node("Gemm", inputs, [name], name=f"layer{index}", transB=1))
    nodes.append(helper.make_node("Reshape", [name, "shaped"], [result], name="shape"))
    ends = [
        helper.make_tensor_value_info(end, TensorProto.FLOAT, ["batch", *sides])
        for end, sides in ((source, shape), (result, target))
    ]
    graph = helper.make_graph(nodes, "graph", ends[:1], ends[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return model.SerializeToString()


def make_linear(pair: Any, *names: str, **options: Any) -> Made:
    encoder, decoder = pair
    width = decoder[0].in_features
    graphs = (
        linear_graph(encoder, "x", [1, 8, 8], "mean", [width]),
        linear_graph(decoder, "z", [width], "reconstruction", [1, 8, 8]),
    )
    return make(pair, graphs, "autoencoder", *names, clamp=False, **options)


def linear(*weights: torch.Tensor) -> list[nn.Linear]:
    """Layers with these weights, (outputs, inputs) each, and biases of 0."""
    layers = [nn.Linear(weight.shape[1], weight.shape[0]) for weight in weights]
    for layer, weight in zip(layers, weights, strict=True):
        layer.weight.data, layer.bias.data = weight.clone(), torch.zeros(len(weight))
    return layers


def principal(count: int) -> torch.Tensor:
    """The first principal axes of the digits, (count, 64): the best linear autoencoder of that width."""
    return torch.linalg.svd(torch.from_numpy(digits().reshape(-1, 64)), full_matrices=False)[2][:count].contiguous()


def autoencoder(into: list[nn.Linear], out: list[nn.Linear]) -> tuple[nn.Module, nn.Module]:
    return nn.Sequential(nn.Flatten(), *into), nn.Sequential(*out, nn.Unflatten(1, (1, 8, 8)))


def exact_pair() -> tuple[nn.Module, nn.Module]:
    """Orthogonal, so that fp32 reconstructs exactly and int8 visibly does not."""
    basis = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))[0]
    return autoencoder(linear(basis), linear(basis.T))


def export_codes(pair: tuple[nn.Module, nn.Module], path: Path, **options: Any) -> Manifest:
    return export_bundle(*pair, path, examples=digits(), kind="autoencoder", tolerance=1e-4, **options)


def test_what_misses_the_budget_is_refused_with_its_figures(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "vae_export"):
        manifest = export_codes(exact_pair(), tmp_path / "a.vae", precisions=["fp32", "int8"])
    assert "measuring fp32 on 144 inputs" in caplog.messages  # 80 and, of those that calibrate, 64
    assert set(manifest.precisions) == {"fp32"}
    assert sorted(path.name for path in (tmp_path / "a.vae").iterdir()) == [
        "decoder.onnx", "encoder.onnx", "golden.npz", "manifest.json",
    ]  # fmt: skip
    refusal = VAE.load(tmp_path / "a.vae").manifest.refused["int8"]
    quality = refusal["quality"]
    assert quality["within_budget"] is False
    assert quality["fp32_psnr_db"] > 99
    assert 30 < quality["psnr_lost_db"] < 90
    assert quality["negative_elbo_per_dimension"] is None  # an autoencoder has none
    lost = f"{quality['psnr_lost_db']:.3g}"
    assert refusal["reason"] == f"int8 loses {lost} dB of PSNR on 80 held-out examples; the budget is 0.1 dB"


def test_a_refusal_gives_both_figures_where_both_are_measured() -> None:
    measured = Measurement(Figures(30.0, 0.5), Figures(29.0, 0.6), {}, 8)
    assert _reason("int8", measured, Budget()) == (
        "int8 loses 1 dB of PSNR and 0.1 nats per input dimension on 8 held-out examples; the budget is 0.1 dB and"
        " 0.005 nats"
    )


def test_keep_makes_it_and_marks_it() -> None:
    made = make_linear(exact_pair(), "int8", keep=True)
    assert made.refused == {}
    assert not made.precisions["int8"].within_budget
    assert made.precisions["int8"].quality["kept_fp32"] == {"encoder": [], "decoder": []}
    assert set(made.graphs) == {"encoder.int8.onnx", "decoder.int8.onnx"}


def test_a_wider_budget_lets_it_in() -> None:
    assert make_linear(exact_pair(), "int8").precisions == {}
    assert make_linear(exact_pair(), "int8", budget=Budget(psnr_db=90)).precisions["int8"].within_budget


def test_layers_stay_in_fp32_until_the_budget_holds() -> None:
    axes = principal(12)
    encoder = linear(axes, torch.eye(12), torch.eye(12))
    encoder[1].weight.data[0] *= 1000  # one unit is a thousand times as large as those beside it,
    encoder[2].weight.data[:, 0] /= 1000  # which changes nothing in fp32
    made = make_linear(autoencoder(encoder, linear(axes.T)), "int8")
    quality = made.precisions["int8"].quality
    assert quality["within_budget"]
    assert quality["kept_fp32"] == {"encoder": ["layer2"], "decoder": []}  # the one that reads it
    assert quality["layers"] == {"encoder": 3, "decoder": 1}


def test_a_half_with_nothing_in_int8_is_fp32s(tmp_path: Path) -> None:
    axes = principal(8)
    encoder = linear(axes)
    encoder[0].weight.data[:, 0] = 1e4  # of a pixel that is 0 throughout; 7 bits leave nothing of the weights beside it
    manifest = export_codes(autoencoder(encoder, linear(axes.T)), tmp_path / "a.vae", precisions=["int8"])
    entry = manifest.precisions["int8"]
    assert (entry.encoder, entry.decoder) == ("encoder.onnx", "decoder.int8.onnx")
    assert "encoder.int8.onnx" not in manifest.files
    with VAE.load(tmp_path / "a.vae", precision="int8", threads=1) as vae:
        assert vae.plan["encode"][0]["precision"] == "fp32"
        assert vae.plan["decode"][0]["precision"] == "int8"
        assert vae.selftest().passed


def test_a_model_without_layers_for_it_is_refused_in_words() -> None:
    made = make((nn.Flatten(), nn.Unflatten(1, (1, 8, 8))), identity_graphs(), "autoencoder", "int8")
    assert made.refused["int8"]["reason"].startswith("int8: neither half has a convolution or product")


def identity_graphs() -> tuple[bytes, bytes]:
    def reshape(source: str, shape: list[int], result: str, target: list[int]) -> bytes:
        ends = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *sides])
            for name, sides in ((source, shape), (result, target))
        ]
        constant = numpy_helper.from_array(np.array([-1, *target]), "shape")
        node = helper.make_node("Reshape", [source, "shape"], [result])
        graph = helper.make_graph([node], "graph", ends[:1], ends[1:], [constant])
        opsets = [helper.make_opsetid("", 20)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()

    return reshape("x", [1, 8, 8], "mean", [64]), reshape("z", [64], "reconstruction", [1, 8, 8])


def test_where_the_tools_fail_the_other_precisions_are_still_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vae_export.quantize.quant_pre_process", lambda *arguments, **options: raise_error())
    made = make_linear(exact_pair(), "int8", "fp16", budget=Budget(psnr_db=90))
    assert made.refused == {"int8": {"reason": "int8 cannot be made: no such operator", "quality": {}}}
    assert set(made.precisions) == {"fp16"}


def test_nan_on_held_out_examples_is_refused_even_with_keep() -> None:
    axes = principal(8)
    bright = digits()
    bright[1::2] *= 1e6  # what calibrates says nothing of these
    made = make_linear(autoencoder(linear(axes), linear(axes.T)), "fp16", x=bright, keep=True)
    assert made.precisions == {}
    assert made.refused["fp16"]["reason"] == "fp16 gives NaN or infinite values on 80 held-out examples"
    assert made.refused["fp16"]["quality"]["mean_relative_error"] is None


def raise_error(*arguments: object) -> float:
    raise RuntimeError("no such operator\nand pages of advice")


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(
    ("golden_error", "reason"),
    [
        (raise_error, "fp16 cannot be made: no such operator"),
        (lambda *arguments: float("nan"), "fp16 gives NaN or infinite values on the golden inputs"),
        (lambda *arguments: float("inf"), "fp16 gives NaN or infinite values on the golden inputs"),
        (
            lambda *arguments: 0.9,
            "fp16 is off by 0.9 of the largest value on the golden inputs; above 0.1 a self-test could not tell it"
            " from broken arithmetic",
        ),
    ],
    ids=["raises", "nan", "inf", "far-off"],
)
def test_what_ships_broken_is_refused_alone_even_with_keep(
    monkeypatch: pytest.MonkeyPatch, golden_error: Any, reason: str, keep: bool
) -> None:
    monkeypatch.setattr("vae_export.judge.Judge.golden_error", golden_error)
    made = make_linear(exact_pair(), "fp16", budget=Budget(psnr_db=90), keep=keep)
    assert (made.precisions, made.graphs, made.tolerance) == ({}, {}, {})
    assert made.refused["fp16"]["reason"] == reason


@pytest.mark.parametrize(("error", "tolerance"), [(0.0005, 0.002), (0.045, 0.09), (0.11, None)])
def test_the_golden_tolerance_of_int8_has_a_floor_and_a_ceiling(
    monkeypatch: pytest.MonkeyPatch, error: float, tolerance: float | None
) -> None:
    monkeypatch.setattr("vae_export.judge.Judge.golden_error", lambda *arguments: error)
    made = make_linear(exact_pair(), "int8", keep=True)
    assert made.tolerance.get("int8") == tolerance
    assert ("int8" in made.precisions, "int8" in made.refused) == (tolerance is not None, tolerance is None)


def test_nan_in_the_manifests_fidelity_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fidelity = {"against": "fp32", "examples": 80, "mean_max_error": 0.1, "reconstruction_max_error": float("nan")}
    monkeypatch.setattr("vae_export.judge.Judge.fidelity", lambda *arguments: fidelity)
    made = make_linear(exact_pair(), "fp16", budget=Budget(psnr_db=90), keep=True)
    assert (made.precisions, made.graphs) == ({}, {})
    assert made.refused["fp16"]["reason"] == "fp16 gives NaN or infinite values on 80 held-out examples"


def test_the_round_trip_goes_through_both_halves_and_is_relative_to_the_range_of_vectors() -> None:
    encoder, decoder = exact_pair()
    graphs = linear_graph(encoder, "x", [64], "mean", [64]), linear_graph(decoder, "z", [64], "reconstruction", [64])
    x = 1000 * digits(8).reshape(8, 64)  # from 0 to 1000
    judge = Judge(graphs, InputSpec("vector", (64,)), LatentSpec((64,), None), None, x)
    encoder[1].weight.data *= 1.01
    off = linear_graph(encoder, "x", [64], "mean", [64])
    assert judge.round_trip_error((off, None)) == pytest.approx(0.01, rel=1e-3)
    assert judge.measure((off, None)).errors["round_trip_max_error"] == pytest.approx(10, rel=1e-3)
    assert judge.round_trip_error((None, None)) == 0


def test_nan_in_one_output_is_the_golden_error() -> None:
    pair = exact_pair()
    graphs = (
        linear_graph(pair[0], "x", [1, 8, 8], "mean", [64]),
        linear_graph(pair[1], "z", [64], "reconstruction", [1, 8, 8]),
    )
    x = digits(4)
    judge = Judge(graphs, GREY, LatentSpec((64,), None), None, x)
    mean = pair[0](torch.from_numpy(x)).detach().numpy()
    golden = {"x": x, "mean": mean + 1, "reconstruction": np.full_like(x, np.nan)}
    assert np.isnan(judge.golden_error(golden, (None, None), "fp32"))


def test_fp16_keeps_what_would_overflow_in_fp32_and_says_so() -> None:
    axes = principal(8)
    encoder = linear(axes, torch.eye(8) * 1e6, torch.eye(8) * 1e-6)
    made = make_linear(autoencoder(encoder, linear(axes.T)), "fp16")
    quality = made.precisions["fp16"].quality
    assert quality["within_budget"]
    assert quality["kept_fp32"] == {"encoder": ["layer1", "layer2"], "decoder": []}


@functools.cache
def flat_pair(contrast: float, layers: int = 2) -> tuple[tuple[nn.Module, nn.Module], tuple[bytes, bytes]]:
    """An encoder that enlarges the small differences of flat images, and a decoder that shows it; their graphs."""
    torch.manual_seed(0)
    first = nn.Conv2d(1, 8, 1) if layers == 2 else nn.Conv2d(1, 4, 2, 2)
    second = [nn.GroupNorm(8, 8), nn.SiLU(), nn.Conv2d(8, 4, 2, 2)] if layers == 2 else [nn.GroupNorm(4, 4)]
    encoder = nn.Sequential(first, *second)
    decoder = nn.Sequential(nn.Conv2d(4, 4, 1), nn.PixelShuffle(2), nn.Sigmoid())
    with torch.no_grad():
        decoder[0].weight.mul_(contrast)
    graphs = (
        encoder_to_onnx(EncoderGraph(encoder, "autoencoder"), torch.rand(2, 1, 8, 8)),
        decoder_to_onnx(DecoderGraph(decoder, clamp=True), torch.rand(2, 4, 4, 4)),
    )
    return (encoder, decoder), graphs


def flat_images(spread: float) -> np.ndarray:
    return np.random.default_rng(0).uniform(1 - spread, 1, (128, 1, 8, 8)).astype(np.float32)


@pytest.mark.parametrize(("precision", "most"), [("fp16", 0.005), ("tf32", 0.002)])
@pytest.mark.parametrize(
    ("spread", "strict", "worth", "kept"),
    [(0.02, True, 0.5, True), (0.02, True, 0.0, False), (0.02, False, 0.0, True), (1.0, False, 0.5, False)],
    ids=["flat", "flat-and-not-worth-it", "flat-and-then-good-enough", "not-flat"],
)
def test_the_first_layer_stays_exact_where_that_is_worth_it(
    monkeypatch: pytest.MonkeyPatch, precision: str, most: float, spread: float, strict: bool, worth: float, kept: bool
) -> None:
    """strict: nothing is good enough."""
    monkeypatch.setattr("vae_export.precisions.WORTH_FLOAT32", worth)
    if strict:
        monkeypatch.setattr(f"vae_export.precisions.{'FLOAT16' if precision == 'fp16' else 'TF32'}_ERROR", 1e-9)
    pair = flat_pair(0.2 if spread == 1 else 4)
    made = make(*pair, "autoencoder", precision, x=flat_images(spread), budget=Budget(psnr_db=90))
    entry = made.precisions[precision]
    assert bool(entry.quality["kept_fp32"]["encoder"]) == kept
    assert not [name for name in entry.quality["kept_fp32"]["encoder"] if name.startswith("x_")]  # no part of a factor
    assert entry.quality["kept_fp32"]["decoder"] == []
    assert (entry.fidelity["round_trip_max_error"] < most) == (kept or spread == 1)
    assert entry.fidelity["mean_max_error"] > 1e-4  # of the layers after the first
    assert entry.fidelity["reconstruction_max_error"] > 1e-6
    if kept:  # by three products, which TF32 rounds nothing of
        graph = onnx.load_from_string(made.graphs[f"encoder.{precision}.onnx"]).graph
        weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        first = next(weights[node.input[1]] for node in graph.node if node.op_type == "Conv")
        assert (first.dtype, first.shape[1]) == (np.float32, 3)
    if precision == "tf32":  # which runs fp32's files but where it needs another
        assert (entry.encoder, entry.decoder) == ("encoder.tf32.onnx" if kept else "encoder.onnx", "decoder.onnx")
        assert set(made.graphs) == {*made.on_cuda.values(), *(["encoder.tf32.onnx"] if kept else [])}
        assert made.tolerance["tf32"] >= 0.002


@pytest.mark.parametrize("precision", ["fp16", "tf32"])
@pytest.mark.parametrize("flat", ["calibrating", "held out"])
def test_the_examples_that_calibrate_decide_on_the_first_layer(precision: str, flat: str) -> None:
    x, rows = flat_images(1), slice(flat == "held out", None, 2)
    x[rows] = flat_images(0.02)[rows]
    made = make(*flat_pair(1.5), "autoencoder", precision, x=x, budget=Budget(psnr_db=90))
    assert bool(made.precisions[precision].quality["kept_fp32"]["encoder"]) == (flat == "calibrating")


def test_an_encoder_of_one_layer_is_fp32_where_float16_would_show() -> None:
    made = make(*flat_pair(4, layers=1), "autoencoder", "fp16", x=flat_images(0.02), budget=Budget(psnr_db=90))
    entry = made.precisions["fp16"]
    assert (entry.encoder, entry.decoder) == ("encoder.onnx", "decoder.fp16.onnx")
    assert entry.fidelity["mean_max_error"] == 0


def test_a_bundle_with_a_file_for_tf32_is_complete(tmp_path: Path) -> None:
    pair, _ = flat_pair(4)
    options = {"examples": flat_images(0.02), "kind": "autoencoder", "precisions": ["tf32"]}
    manifest = export_bundle(*pair, tmp_path / "a.vae", budget=Budget(psnr_db=90), **options)
    assert "encoder.tf32.onnx" in manifest.files
    with VAE.load(tmp_path / "a.vae", threads=1) as vae:
        assert vae.manifest == manifest
        assert vae.selftest().passed


def upsampling_pair() -> tuple[tuple[nn.Module, nn.Module], tuple[bytes, bytes]]:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Conv2d(1, 4, 2, 2))
    decoder = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(4, 1, 3, padding=1), nn.Sigmoid())
    graphs = (
        encoder_to_onnx(EncoderGraph(encoder, "autoencoder"), torch.rand(2, 1, 8, 8)),
        decoder_to_onnx(DecoderGraph(decoder, clamp=True), torch.rand(2, 4, 4, 4)),
    )
    return (encoder, decoder), graphs


def test_forms_for_cuda_come_with_a_precision_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    pair, graphs = upsampling_pair()
    made = make(pair, graphs, "autoencoder", "int8", keep=True)
    assert made.on_cuda == {}
    made = make(pair, graphs, "autoencoder", "tf32", "fp16", keep=True)
    assert made.on_cuda == {"encoder.onnx": "encoder.cuda.onnx", "decoder.onnx": "decoder.cuda.onnx"}
    assert [made.graphs[file] for file in made.on_cuda.values()] == [for_cuda(graph) for graph in graphs]
    for name in ("decoder.cuda.onnx", "decoder.fp16.onnx"):
        nodes = onnx.load_from_string(made.graphs[name]).graph.node
        assert [len(node.input) for node in nodes if node.op_type == "Conv"] == [2]  # its bias is added
    assert made.precisions["tf32"][:2] == ("encoder.onnx", "decoder.onnx")
    twins = tuple(tf32_twin(made.graphs[file]) for file in made.on_cuda.values())
    judge = Judge(graphs, GREY, LatentSpec((4, 4, 4), None), None, digits()[1::2])
    expected = judge.fidelity(judge.measure(twins), twins[1])["reconstruction_max_error"]
    assert made.precisions["tf32"].fidelity["reconstruction_max_error"] == expected > 1e-6
    for form in (spoilt, for_32_examples):
        monkeypatch.setattr("vae_export.precisions.for_cuda", form)
        made = make(pair, graphs, "autoencoder", "tf32", keep=True, x=digits()[:64])
        assert (made.on_cuda, made.graphs) == ({}, {})


def test_forms_for_cuda_are_held_to_the_latents_too(monkeypatch: pytest.MonkeyPatch) -> None:
    (encoder, decoder), _ = upsampling_pair()
    nn.init.zeros_(decoder[1].weight)  # nothing of the latent is seen in a reconstruction
    graphs = (
        encoder_to_onnx(EncoderGraph(encoder, "autoencoder"), torch.rand(2, 1, 8, 8)),
        decoder_to_onnx(DecoderGraph(decoder, clamp=True), torch.rand(2, 4, 4, 4)),
    )
    for form, taken in ((for_cuda, True), (spoilt, False)):
        monkeypatch.setattr("vae_export.precisions.for_cuda", form)
        assert bool(make((encoder, decoder), graphs, "autoencoder", "tf32", keep=True).on_cuda) is taken


def for_32_examples(graph: bytes) -> bytes:
    """The same, for so many alone."""
    model = onnx.load_from_string(graph)
    (given,) = model.graph.input
    for node in model.graph.node:
        node.input[:] = ["reshaped" if name == given.name else name for name in node.input]
    sides = [side.dim_value for side in given.type.tensor_type.shape.dim][1:]
    model.graph.initializer.append(numpy_helper.from_array(np.array([32, *sides]), "of_32"))
    model.graph.node.insert(0, helper.make_node("Reshape", [given.name, "of_32"], ["reshaped"]))
    return model.SerializeToString()


def spoilt(graph: bytes) -> bytes:
    model = onnx.load_from_string(graph)
    for tensor in model.graph.initializer:
        value = numpy_helper.to_array(tensor)
        if value.dtype == np.float32 and value.ndim == 4:
            tensor.CopyFrom(numpy_helper.from_array(value * np.float32(1.01), tensor.name))
    return model.SerializeToString()


def test_a_model_without_such_forms_is_exported_all_the_same(tmp_path: Path) -> None:
    """The examples that its norm sees are other ones."""

    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(1, 4, 2, 2), nn.GroupNorm(2, 4), nn.Conv2d(4, 2, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.body(x.reshape(-1, 1, 4, 8)).reshape(-1, 4, 2, 4)

    torch.manual_seed(0)
    decoder = nn.Sequential(nn.ConvTranspose2d(4, 1, (4, 2), (4, 2)), nn.Sigmoid())
    manifest = export_codes((Halves(), decoder), tmp_path / "a.vae", precisions=["tf32", "fp16"], keep=True)
    assert manifest.on_cuda == {}
    assert not manifest.refused


def test_a_bundle_with_forms_for_cuda_is_complete(tmp_path: Path) -> None:
    pair, _ = upsampling_pair()
    manifest = export_codes(pair, tmp_path / "a.vae", precisions=["tf32"], keep=True)
    assert [*manifest.on_cuda] == ["encoder.onnx", "decoder.onnx"]
    assert {*manifest.on_cuda, *manifest.on_cuda.values()} <= manifest.files.keys()
    with VAE.load(tmp_path / "a.vae", threads=1) as vae:
        assert vae.selftest().passed


def test_tf32_of_a_half_without_layers_is_the_other_halfs(tmp_path: Path) -> None:
    encoder, decoder = nn.AvgPool2d(2), nn.Sequential(nn.Conv2d(1, 4, 1), nn.PixelShuffle(2), nn.Sigmoid())
    manifest = export_bundle(
        encoder, decoder, tmp_path / "a.vae", examples=digits(), kind="autoencoder", precisions=["tf32"]
    )
    fidelity = manifest.precisions["tf32"].fidelity
    assert fidelity["mean_max_error"] == 0 < fidelity["reconstruction_max_error"]


def test_tf32_without_any_layer_is_refused(tmp_path: Path) -> None:
    halves = nn.AvgPool2d(2), nn.Sequential(nn.Upsample(scale_factor=2))
    manifest = export_bundle(*halves, tmp_path / "a.vae", examples=digits(), kind="autoencoder", precisions=["tf32"])
    assert manifest.refused["tf32"]["reason"].startswith("tf32: neither half has a convolution or matrix product")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precisions": "int8"}, "precisions is 'int8'; expected a list of names"),
        ({"precisions": None}, "precisions is None; expected a list of names"),
        ({"precisions": 5}, "precisions is 5; expected a list of names"),
        ({"precisions": ["int4"]}, "precisions has 'int4'; expected some of fp32, tf32, fp16, int8"),
        ({"budget": 0.1}, "budget is 0.1; expected a vae_export.Budget"),
        ({"precisions": ["int8"], "examples": digits(1)}, r"examples has 1 row\(s\); a precision beside fp32 is"),
    ],
)
def test_a_wrong_request_is_named_before_any_work(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        export_bundle(*exact_pair(), tmp_path / "a.vae", **{"examples": digits(), "kind": "autoencoder", **options})
    assert list(tmp_path.iterdir()) == []


def test_the_warning_points_at_the_line_that_exports(tmp_path: Path) -> None:
    options = {"examples": digits(9), "kind": "autoencoder", "precisions": ["int8"], "prior": "none"}
    with pytest.warns(FewExamplesWarning) as caught, pytest.raises(InputError, match="prior is 'none'"):
        export_bundle(*exact_pair(), tmp_path / "a.vae", **options)
    assert [warning.filename for warning in caught] == [__file__]


def test_few_examples_are_warned_of() -> None:
    message = "int8 is calibrated on 5 and measured on 4 examples; with fewer than 32 of each"
    with pytest.warns(FewExamplesWarning, match=message):
        wanted = check_wanted(["int8", "fp32"], Budget(), False, digits(9))
    assert (wanted.names, len(wanted.activation_examples), len(wanted.held_out)) == (("int8",), 5, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_wanted(["fp32"], Budget(), False, digits(9))
        check_wanted(["int8"], Budget(), False, digits(64))
