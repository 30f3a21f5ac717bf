"""Pairs of ONNX files of others: opened, wrapped to the contract, and refused where they cannot be."""

from __future__ import annotations

import io
import json
import math
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper, parser
from torch import nn

from vae_export.export import export_imported
from vae_export.imported import ImportOptions
from vae_export.importers import onnx_pair
from vae_export.importers.onnx_source import to_opset
from vae_runtime import VAE
from vae_runtime.errors import CheckpointError, ExportError, InputError


class Encoder(nn.Module):
    """x -> mean and logvar in one tensor, or two."""

    def __init__(self, form: str = "moments") -> None:
        super().__init__()
        self.form = form
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 4, 3, 2, 1))

    def forward(self, x: torch.Tensor) -> Any:
        moments = self.net(x)
        mean, logvar = moments.chunk(2, dim=1)
        if self.form == "sample":
            return mean + (logvar / 2).exp() * torch.randn_like(mean)
        if self.form == "code":
            return mean
        return {"moments": moments, "two": (mean, logvar), "named": (logvar, mean), "std": (mean, logvar.exp())}[
            self.form
        ]


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(2, 8, 3, 1, 1), nn.SiLU(), nn.Upsample(scale_factor=2.0), nn.ConvTranspose2d(8, 3, 4, 2, 1)
        )

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.net(z)


OUTPUTS = {"two": ["a", "b"], "named": ["log_var", "mu"], "std": ["a", "b"]}


@pytest.fixture(scope="module")
def networks() -> tuple[Encoder, Decoder]:
    torch.manual_seed(0)
    return Encoder().eval(), Decoder().eval()


def to_onnx(module: nn.Module, x: torch.Tensor, outputs: list[str], opset: int, free: bool = True) -> onnx.ModelProto:
    """As exporters of others write it."""
    file = io.BytesIO()
    axes = {0: "n", 2: "h", 3: "w"} if free else {0: "n"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module, (x,), file, dynamo=False, opset_version=opset, input_names=["sample"], output_names=outputs,
            dynamic_axes=dict.fromkeys(["sample", *outputs], axes),
        )  # fmt: skip
    return onnx.load_from_string(file.getvalue())


def write(
    folder: Path,
    networks: tuple[Any, Any],
    form: str = "moments",
    opset: int = 17,
    half: bool = False,
    free: bool = True,
) -> str:
    encoder, decoder = Encoder(form), Decoder()
    encoder.load_state_dict(networks[0].state_dict())
    decoder.load_state_dict(networks[1].state_dict())
    x, z = torch.rand(2, 3, 16, 16), torch.rand(2, 2, 4, 4)
    if half:
        encoder, decoder, x, z = encoder.half(), decoder.half(), x.half(), z.half()
    models = (
        to_onnx(encoder.eval(), x, OUTPUTS.get(form, ["latent_parameters"]), opset, free),
        to_onnx(decoder.eval(), z, ["image"], opset, free),
    )
    for name, model in zip(("vae_encoder", "vae_decoder"), models, strict=True):
        (folder / name).mkdir(parents=True, exist_ok=True)
        onnx.save(model, folder / name / "model.onnx", save_as_external_data=name == "vae_decoder", size_threshold=0)
    return str(folder)


def load(source: str, **options: Any) -> Any:
    return onnx_pair.load(source, ImportOptions(**{"input_range": "signed", **options}))


def check(
    imported: Any, networks: tuple[Any, Any], sizes: Any, tolerance: float = 1e-5, scale: float = 1, shift: float = 0
) -> None:
    """Graphs and reference against PyTorch, with the bundle's units written out."""
    x = np.random.default_rng(0).random((2, 3, *sizes[0][1:]), dtype=np.float32)
    graphs = imported.halves.to_onnx(x, imported.halves.encode(x)["mean"], imported.is_free)
    encoder, decoder = map(onnxruntime.InferenceSession, graphs)
    for rows, height, width in sizes:
        x = np.random.default_rng(rows).random((rows, 3, height, width), dtype=np.float32)
        with torch.no_grad():
            moments = networks[0](torch.from_numpy(x) * 2 - 1).numpy()
            mean, logvar = moments[:, :2], moments[:, 2:]
            image = np.clip((networks[1](torch.from_numpy(mean)).numpy() + 1) / 2, 0, 1)
        mean = np.float32((mean - shift) * scale)
        want = [mean, np.clip(logvar, -30, 20) + 2 * math.log(scale)]
        for got in (encoder.run(["mean", "logvar"], {"x": x}), list(imported.halves.encode(x).values())):
            np.testing.assert_allclose(got[0], want[0], atol=tolerance)
            np.testing.assert_allclose(got[1], want[1], atol=tolerance)
        for images in (decoder.run(["reconstruction"], {"z": mean})[0], imported.halves.decode(mean)):
            np.testing.assert_allclose(images, image, atol=tolerance)
    for graph in graphs:
        model = onnx.load_from_string(graph)
        assert {entry.domain: entry.version for entry in model.opset_import} == {"": 20}
        assert model.ir_version == 10


SIZES = ((1, 16, 24), (3, 32, 20))


def test_outputs_are_told_by_more_names_than_ours(
    networks: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(OUTPUTS, "named", ["Z_Log_Var", "Z_Mean"])  # in the other order than the contract's
    check(load(write(tmp_path, networks, "named", free=False)), networks, ((2, 16, 16),))


@pytest.mark.parametrize(
    ("form", "opset"), [("moments", 11), ("moments", 17), ("two", 14), ("named", 20), ("moments", 20)]
)
def test_graphs_agree_with_pytorch_at_two_sizes(
    networks: tuple[Any, Any], form: str, opset: int, tmp_path: Path
) -> None:
    source = write(tmp_path / "pair", networks, form, opset)
    assert onnx_pair.recognises(source)
    imported = load(source, latent_scale=0.5, latent_shift=0.1)
    assert (imported.name, imported.input_shape, imported.multiple_of) == ("pair", (3, None, None), 4)
    assert imported.origin["opset"] == opset
    assert (imported.halves.kind, imported.halves.against) == ("vae", "onnxruntime")
    check(imported, networks, SIZES, scale=0.5, shift=0.1)


def test_half_precision_is_cast_at_the_boundary(networks: tuple[Any, Any], tmp_path: Path) -> None:
    imported = load(write(tmp_path, networks, half=True))
    check(imported, networks, SIZES, tolerance=5e-3)
    x = np.random.default_rng(0).random((3, 3, 16, 16), dtype=np.float32)
    encoded = imported.halves.encode(x)
    graphs = imported.halves.to_onnx(x, encoded["mean"], True)
    got = onnxruntime.InferenceSession(graphs[0]).run(["mean"], {"x": x})[0]
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, encoded["mean"], atol=1e-3)


def test_fixed_sizes_and_codes(networks: tuple[Any, Any], tmp_path: Path) -> None:
    imported = load(write(tmp_path / "fixed", networks, free=False))
    assert (imported.input_shape, imported.multiple_of, imported.default_size) == ((3, 16, 16), 1, None)
    check(imported, networks, ((1, 16, 16), (3, 16, 16)))
    source = write(tmp_path / "code", networks, "code")
    assert load(source).halves.kind == "autoencoder"
    assert load(source, input_shape=(3, 16, 16)).input_shape == (3, 16, 16)
    with pytest.raises(InputError, match="--kind is 'vae', but the encoder returns one tensor"):
        load(source, kind="vae")
    with pytest.raises(InputError, match=r"--input is \(1, 16, 16\), but the encoder takes \(3, None, None\)"):
        load(source, input_shape=(1, 16, 16))


def test_a_whole_bundle(networks: tuple[Any, Any], tmp_path: Path) -> None:
    source = write(tmp_path / "pair", networks)
    manifest = export_imported(load(source), tmp_path / "pair.vae")
    assert manifest.precisions["fp32"].fidelity["against"] == "onnxruntime"
    with VAE.load(tmp_path / "pair.vae") as vae:
        assert vae.selftest().passed
    assert not onnx_pair.recognises(str(tmp_path / "pair.vae"))
    with pytest.raises(InputError, match=r"pair.vae is a bundle already"):
        load(str(tmp_path / "pair.vae"))


def test_a_second_output_that_is_never_negative_is_asked_about(networks: tuple[Any, Any], tmp_path: Path) -> None:
    source = write(tmp_path, networks, "std")
    with pytest.raises(InputError, match=r"never negative.*--spread"):
        load(source)
    x = np.random.default_rng(0).random((2, 3, 16, 16), dtype=np.float32)
    for spread, factor in (("std", 2), ("variance", 1)):
        imported = load(source, spread=spread)
        graphs = imported.halves.to_onnx(x, np.zeros((2, 2, 4, 4), np.float32), True)
        with torch.no_grad():
            logvar = (
                networks[0](torch.from_numpy(x) * 2 - 1)[:, 2:].numpy() * factor
            )  # of a form that gives exp(logvar)
        got = onnxruntime.InferenceSession(graphs[0]).run(["logvar"], {"x": x})[0]
        np.testing.assert_allclose(got, logvar, atol=1e-5)
        np.testing.assert_allclose(imported.halves.encode(x)["logvar"], logvar, atol=1e-5)


def test_recognised_by_content(networks: tuple[Any, Any], tmp_path: Path) -> None:
    source = Path(write(tmp_path / "pair", networks))
    encoder, decoder = source / "vae_encoder" / "model.onnx", source / "vae_decoder" / "model.onnx"
    (tmp_path / "text_encoder").mkdir()
    for name, path in (("encoder.bin", encoder), ("text_encoder/encoder", encoder)):
        (tmp_path / name).write_bytes(path.read_bytes())
    assert onnx_pair.recognises(f"{tmp_path / 'encoder.bin'},{decoder}")
    assert load(f"{tmp_path / 'encoder.bin'},{decoder}").name == "encoder"
    (source / "text_encoder").mkdir()
    (source / "text_encoder" / "model.onnx").write_bytes(encoder.read_bytes())
    assert load(str(source)).name == "pair"  # vae_encoder goes before text_encoder
    for content in (b"", b"text", b"\x08", b"\x08\x08", encoder.read_bytes()[:-9], b"\x80" * 30):
        (tmp_path / "encoder.onnx").write_bytes(content)
        assert not onnx_pair.is_onnx(tmp_path / "encoder.onnx")
    for other in ("", "absent", "a,b", "\0", str(tmp_path / "encoder.onnx")):
        assert not onnx_pair.recognises(other)
    (source / "manifest.json").write_text(json.dumps({"format": "another"}))
    assert onnx_pair.recognises(str(source))


def test_no_file_outside_the_folder_is_read(networks: tuple[Any, Any], tmp_path: Path) -> None:
    path = Path(write(tmp_path / "pair", networks)) / "vae_decoder" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    for entry in model.graph.initializer:
        for pair in entry.external_data:
            pair.value = "../../secret" if pair.key == "location" else pair.value
    (tmp_path / "secret").write_bytes(b"\0" * 100_000)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(CheckpointError, match=r"model.onnx is not an ONNX model that can be read"):
        load(str(tmp_path / "pair"))


def graph(text: str, opset: int = 20) -> onnx.ModelProto:
    return parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}, "mine" : 1]> g {text}')


GOOD = "(float[N, 4] x) => (float[N, 4] y) { y = Tanh(x) }"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("(float[N, 4] x) => (float[N, 4] y) { r = RandomNormalLike(x)\n y = Add(x, r) }",
         r"draws random numbers \(RandomNormalLike\).*latent_parameters"),
        ("(float[N, 4] x) => (float[N, 4] y) { y = mine.Own(x) }", "has the operator 'mine.Own'"),
        ("(int64[N, 4] x) => (float[N, 4] y) { y = Cast<to=1>(x) }", "'x' of the encoder is int64; expected float32"),
        ("(float[N, 4] x) => (double[N, 4] y) { y = Cast<to=11>(x) }", "'y' of the encoder is double"),
        ("(float[N, 4] x, float[N, 4] t) => (float[N, 4] y) { y = Add(x, t) }", r"takes 2 inputs \(x, t\)"),
        ("(float[1, 4] x) => (float[1, 4] y) { y = Tanh(x) }", "exported for a batch of 1; .*again with a dynamic"),
        ("(float[N, 4] x) => (float[N, 4] a, float[N, 4] b, float[N, 4] c) { a = Tanh(x)\n b = Tanh(x)\n c = Tanh(x) }",
         r"gives 3 outputs \(a, b, c\)"),
        ("(float[N, 4] x) => (float[N, 2] y) { s = ReduceMean<keepdims=0>(x)\n y = Add(s, s) }",
         r"returns shape \(\) for 4 inputs; "),
        ("(float[N, 4] x) => (float[N, 4] y) { m = ReduceMean<keepdims=1>(x)\n y = Sub(x, m) }",
         "the encoder gives values that differ by .* mixes the rows of a batch"),
    ],
)  # fmt: skip
def test_refused_in_words(text: str, message: str, tmp_path: Path) -> None:
    onnx.save(graph(text), tmp_path / "encoder.onnx")
    onnx.save(graph(GOOD), tmp_path / "decoder.onnx")
    assert onnx_pair.recognises(str(tmp_path))
    with pytest.raises(ExportError, match=message):
        onnx_pair.load(str(tmp_path), ImportOptions())


def test_options(tmp_path: Path) -> None:
    onnx.save(graph(GOOD), tmp_path / "encoder.onnx")
    onnx.save(graph(GOOD), tmp_path / "decoder.onnx")
    imported = onnx_pair.load(str(tmp_path), ImportOptions())
    assert (imported.input_shape, imported.halves.kind) == ((4,), "autoencoder")
    for options, message in (
        ({"weights": "w.pt"}, "--weights is for a factory"),
        ({"input_range": "unit"}, "vectors, which have no range"),
        ({"spread": "std"}, "an autoencoder's code has none"),
        ({"multiple_of": 0}, "--multiple-of is 0"),
    ):
        with pytest.raises(InputError, match=message):
            onnx_pair.load(str(tmp_path), ImportOptions(**options))
    onnx.save(graph("(float[N, M] x) => (float[N, M] y) { y = Tanh(x) }"), tmp_path / "encoder.onnx")
    with pytest.raises(InputError, match="does not say what its inputs are; pass --input"):
        onnx_pair.load(str(tmp_path), ImportOptions())


def test_a_bound_that_others_read_too_survives_the_joining_of_two_clips(tmp_path: Path) -> None:
    """As in the decoder of a bundle whose latents are shifted by 1."""
    decoder = graph(
        "(float[N, 3, 4, 4] z) => (float[N, 3, 4, 4] y) {"
        " conv2d = Add(z, conv2d_max)\n y = Clip(conv2d, conv2d_min, conv2d_max) }"
    )
    for name, value in (("conv2d_min", 0.25), ("conv2d_max", 0.75)):
        decoder.graph.initializer.append(numpy_helper.from_array(np.array(value, np.float32), name))
    onnx.save(decoder, tmp_path / "decoder.onnx")
    onnx.save(graph("(float[N, 3, 4, 4] x) => (float[N, 3, 4, 4] y) { y = Neg(x) }"), tmp_path / "encoder.onnx")
    halves = load(str(tmp_path), input_range="unit").halves
    z = np.linspace(-1, 1, 96, dtype=np.float32).reshape(2, 3, 4, 4)
    _, wrapped = halves.to_onnx(z, z, False)
    got = onnxruntime.InferenceSession(wrapped).run(None, {"z": z})[0]
    np.testing.assert_allclose(got, np.clip(z + 0.75, 0.25, 0.75), atol=1e-6)


def answer_of(source: str, **options: Any) -> str:
    """What is said where it is refused."""
    try:
        load(source, **options)
    except (ExportError, InputError) as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("sides", "first", "channels_last"),
    [
        ("32, 32, 3", "Transpose<perm=[0, 3, 1, 2]>(x)", True),
        ("H, W, 3", "Transpose<perm=[0, 3, 1, 2]>(x)", True),
        ("32, 32, 1", "Identity(x)", True),
        ("3, 32, 32", "Identity(x)", False),
        ("3, 32, 4", "Identity(x)", False),
        ("3, H, W", "Identity(x)", False),
        ("64, 4, 4", "Identity(x)", False),
        ("8, 32, 16", "Transpose<perm=[0, 3, 1, 2]>(x)", False),
    ],
)
def test_images_with_the_channels_last_are_refused(sides: str, first: str, channels_last: bool, tmp_path: Path) -> None:
    onnx.save(graph(f"(float[N, {sides}] x) => (float[N, A, B, C] y) {{ y = {first} }}"), tmp_path / "encoder.onnx")
    onnx.save(graph("(float[N, A, B, C] z) => (float[N, D, E, F] y) { y = Identity(z) }"), tmp_path / "decoder.onnx")
    message = r"images of [\d?]+x[\d?]+x[13], which look like height, width and channels, .* --inputs-as-nchw"
    turned = first != "Identity(x)"
    for options in ({}, {"input_shape": (32, 32, int(sides[-1]))} if channels_last else {}):
        answer = answer_of(str(tmp_path), **options)
        assert bool(re.search(message, answer)) == (channels_last and (turned or not options)), answer
        assert ("if they are so nevertheless, pass --input" in answer) == (channels_last and not turned and not options)


def test_local_functions_are_inlined(tmp_path: Path) -> None:
    model = graph("(float[N, 4] x) => (float[N, 4] y) { y = mine.Twice(x) }")
    twice = helper.make_function(
        "mine", "Twice", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])], [helper.make_opsetid("", 20)]
    )
    model.functions.append(twice)
    onnx.save(model, tmp_path / "encoder.onnx")
    onnx.save(graph(GOOD), tmp_path / "decoder.onnx")
    halves = onnx_pair.load(str(tmp_path), ImportOptions()).halves
    x = np.random.default_rng(0).random((3, 4), dtype=np.float32)
    graphs = halves.to_onnx(x, x, False)
    np.testing.assert_array_equal(onnxruntime.InferenceSession(graphs[0]).run(None, {"x": x})[0], 2 * x)


@pytest.mark.parametrize("opset", [21, 22])
def test_group_normalisation_of_newer_operator_sets(opset: int) -> None:
    rng = np.random.default_rng(0)
    model = graph(
        "(float[N, 6, H, W] x) => (float[N, 6, H, W] y) {"
        " y = GroupNormalization<num_groups=3, epsilon=0.01>(x, scale, bias) }",
        opset,
    )
    for name in ("scale", "bias"):
        model.graph.initializer.append(numpy_helper.from_array(rng.random(6, dtype=np.float32), name))
    x = rng.random((2, 6, 5, 7), dtype=np.float32)
    want = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0]
    lowered = to_opset(model, opset, "encoder")
    assert [entry.version for entry in lowered.opset_import if not entry.domain] == [20]
    got = onnxruntime.InferenceSession(lowered.SerializeToString()).run(None, {"x": x})[0]
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_what_has_no_older_form_is_refused() -> None:
    model = graph("(float[N, 6] x, float[6] s) => (float[N, 6] y) { y = RMSNormalization(x, s) }", 23)
    with pytest.raises(ExportError, match="the encoder cannot be brought from operator set 23 to 20"):
        to_opset(model, 23, "encoder")
