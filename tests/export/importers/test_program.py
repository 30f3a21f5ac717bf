"""Pairs of TorchScript and torch.export programs."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from vae_export.imported import ImportOptions
from vae_export.importers import script_code, torch_program
from vae_export.importers.torch_program import EXPORTED, SCRIPT, sort_of
from vae_runtime.errors import CheckpointError, ExportError, InputError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1), nn.GroupNorm(2, 8), nn.SiLU(), nn.Dropout(0.5), nn.Conv2d(8, 4, 3, 2, 1)
        )

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, logvar = self.net(x).chunk(2, dim=1)
        return mean, logvar


class Named(Encoder):
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:  # type: ignore[override]
        mean, logvar = self.net(x).chunk(2, dim=1)
        return {"logvar": logvar, "mean": mean}


class Flat(Encoder):
    """Its batch is written into the program where it is traced."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return self.net(x).reshape(int(x.shape[0]), -1)


class Saves(Encoder):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        torch.save(x, "canary")
        mean, logvar = self.net(x).chunk(2, dim=1)
        return mean, logvar


class Unknown(Encoder):
    """Has an operator that no exporter of TorchScript translates, and a decision where it is scripted."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, logvar = self.net(x).chunk(2, dim=1)
        if x.shape[0] == 7:
            mean = mean + 1
        return torch.special.i1(mean), logvar


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(2, 8, 3, 1, 1), nn.GroupNorm(2, 8), nn.SiLU())
        self.up = nn.Upsample(scale_factor=2.0)
        self.last = nn.ConvTranspose2d(8, 3, 4, 2, 1)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.last(self.up(self.first(z))))


@pytest.fixture(scope="module")
def networks() -> tuple[Encoder, Decoder]:
    torch.manual_seed(0)
    return Encoder().eval(), Decoder().eval()


X, Z = torch.rand(2, 3, 16, 16), torch.rand(2, 2, 4, 4)


def save(folder: Path, encoder: Any, decoder: Any) -> str:
    folder.mkdir(exist_ok=True)
    for name, program in (("my_encoder", encoder), ("decoder", decoder)):
        with (folder / name).open("wb") as file:
            is_script = isinstance(program, torch.jit.ScriptModule)
            torch.jit.save(program, file) if is_script else torch.export.save(program, file)
    return str(folder)


def load(source: str, shape: tuple[int | None, ...] | None = (3, None, None), **options: Any) -> Any:
    return torch_program.load(source, ImportOptions(input_shape=shape, **{"input_range": "unit", **options}))


def check_graphs(imported: Any, networks: tuple[Any, Any], sizes: tuple[tuple[int, int, int], ...]) -> None:
    """Exported graphs against the modules that the programs were made of."""
    free = imported.is_free
    x = np.random.default_rng(0).random((2, 3, 16, 16), dtype=np.float32)
    graphs = imported.halves.to_onnx(x, imported.halves.encode(x)["mean"], free)
    encoder, decoder = map(onnxruntime.InferenceSession, graphs)
    for rows, height, width in sizes:
        x = np.random.default_rng(rows).random((rows, 3, height, width), dtype=np.float32)
        with torch.no_grad():
            mean, logvar = networks[0](torch.from_numpy(x))
            image = networks[1](mean)
        got = encoder.run(["mean", "logvar"], {"x": x})
        np.testing.assert_allclose(got[0], mean, atol=1e-5)
        np.testing.assert_allclose(got[1], logvar, atol=1e-5)
        np.testing.assert_allclose(decoder.run(["reconstruction"], {"z": mean.numpy()})[0], image, atol=1e-5)


@pytest.mark.parametrize("way", ["script", "trace", "freeze"])
def test_torchscript_at_two_sizes(networks: tuple[Any, Any], way: str, tmp_path: Path) -> None:
    if way == "trace":
        programs = torch.jit.trace(networks[0], X), torch.jit.trace(networks[1], Z)
    else:
        programs = torch.jit.script(networks[0]), torch.jit.script(networks[1])
    if way == "freeze":
        programs = torch.jit.freeze(programs[0]), torch.jit.freeze(torch.jit.trace(networks[1], Z))
    source = save(tmp_path / "pair", *programs)
    assert torch_program.recognises(source)
    imported = load(source)
    assert (imported.name, imported.input_shape, imported.multiple_of) == ("pair", (3, None, None), 4)
    assert imported.origin["program"] == SCRIPT
    check_graphs(imported, networks, ((1, 16, 24), (3, 32, 20)))


def test_torch_export_with_its_own_shape(networks: tuple[Any, Any], tmp_path: Path) -> None:
    batch, height, width = (torch.export.Dim(name) for name in ("batch", "height", "width"))
    encoder = torch.export.export(networks[0], (X,), dynamic_shapes=({0: batch, 2: 4 * height, 3: 4 * width},))
    source = save(tmp_path / "pair", encoder, torch.jit.script(networks[1]))
    assert torch_program.recognises(source)
    with pytest.raises(InputError, match=r"my_encoder is a torch.export program.*pass --trust-pickle"):
        load(source)
    with pytest.raises(InputError, match=r"--input is \(1, 16, 16\), but the encoder takes \(3, None"):
        load(source, (1, 16, 16), trust_pickle=True)
    imported = load(source, None, trust_pickle=True)
    assert (imported.input_shape, imported.multiple_of) == ((3, None, None), 4)
    assert imported.origin["program"] == f"{EXPORTED}, {SCRIPT}"
    check_graphs(imported, networks, ((1, 16, 24), (3, 32, 20)))


def test_torch_export_of_one_batch_size_is_refused(networks: tuple[Any, Any], tmp_path: Path) -> None:
    source = save(tmp_path, torch.export.export(networks[0], (X,)), torch.jit.script(networks[1]))
    with pytest.raises(ExportError, match=r"was exported for a batch of 2; .*dynamic_shapes=\({0: torch.export.Dim"):
        load(source, None, trust_pickle=True)


def test_torch_export_with_a_largest_size_is_refused(networks: tuple[Any, Any], tmp_path: Path) -> None:
    batch, height, width = (torch.export.Dim(name) for name in ("batch", "height", "width"))
    low = torch.export.Dim("low", max=128)
    few = torch.export.Dim("few", max=16)
    for sizes, message in (
        (
            {0: few, 2: 4 * height, 3: 4 * width},
            "exported for a batch of at most 16; a bundle takes any: .*without max",
        ),
        (
            {0: batch, 2: 4 * low, 3: 4 * width},
            "exported for a height of at most 512; a bundle takes any: .*without max",
        ),
        ({0: batch, 2: 4 * height, 3: 4 * low}, "exported for a width of at most 512; a bundle takes any"),
    ):
        encoder = torch.export.export(networks[0], (X,), dynamic_shapes=(sizes,))
        source = save(tmp_path / message[15:22].strip(), encoder, torch.jit.script(networks[1]))
        with pytest.raises(ExportError, match=message):
            load(source, None, trust_pickle=True)


def test_what_the_exporter_cannot_take_is_refused_with_a_cure(networks: tuple[Any, Any], tmp_path: Path) -> None:
    decoder = torch.jit.freeze(torch.jit.script(networks[1]))  # nearest upsampling, of which a loop is left
    imported = load(save(tmp_path, torch.jit.script(networks[0]), decoder))
    with pytest.raises(ExportError, match=r"the decoder cannot be exported .*; a program saved from torch.jit.trace"):
        imported.halves.to_onnx(X.numpy(), Z.numpy(), True)


class Attention(nn.Module):
    """(N, 3, 16, 16) -> mean and logvar (N, 16, 4), by torch's attention, whose rank its older exporter forgets."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 8, 4, 4)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.attention, self.last = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = self.layers(self.first(x).flatten(2).transpose(1, 2))
        mean, logvar = self.last(self.attention(tokens, tokens, tokens)[0]).chunk(2, -1)
        return mean, logvar


class Patches(nn.Module):
    """(N, 16, 4) -> (N, 3, 16, 16), by axes that are split at the end, in the middle and alone."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(4, 48)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        patches = self.last(z).unflatten(1, (4, 4)).unflatten(-1, (3, 4, 4))  # (N, 4, 4, 3, 4, 4)
        image = patches.permute(0, 3, 1, 4, 2, 5).flatten(1).unflatten(1, (3, 16, 16))
        return torch.sigmoid(image)


@pytest.fixture
def attention() -> tuple[Any, Any]:
    return Attention().eval(), Patches().eval()


def test_attention_that_was_traced(attention: tuple[Any, Any], tmp_path: Path) -> None:
    programs = torch.jit.trace(attention[0], X, check_trace=False), torch.jit.trace(attention[1], torch.rand(2, 16, 4))
    imported = load(save(tmp_path, *programs), (3, 16, 16))
    check_graphs(imported, attention, ((1, 16, 16), (5, 16, 16)))


def test_attention_by_torchs_fast_path_is_refused_with_the_cure(
    attention: tuple[Any, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def trace(fast: bool) -> Any:
        torch.backends.mha.set_fastpath_enabled(fast)
        try:
            with torch.no_grad():
                programs = [torch.jit.trace(attention[0], X), torch.jit.trace(attention[1], torch.rand(2, 16, 4))]
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
        return load(save(tmp_path / str(fast), *programs), (3, 16, 16))

    z, imported = np.zeros((2, 16, 4), np.float32), trace(fast=True)
    capfd.readouterr()
    with pytest.raises(
        ExportError, match=r"cannot be exported .*; trace it again after torch.backends.mha.set_fastpath"
    ):
        imported.halves.to_onnx(X.numpy(), z, False)
    assert capfd.readouterr() == ("", "")
    check_graphs(trace(fast=False), attention, ((1, 16, 16), (5, 16, 16)))


@pytest.mark.parametrize("way", ["script", "trace"])
def test_a_program_that_was_traced_is_not_told_to_be(way: str, tmp_path: Path) -> None:
    encoder = torch.jit.script(Unknown().eval()) if way == "script" else torch.jit.trace(Unknown().eval(), X)
    imported = load(save(tmp_path, encoder, torch.jit.script(Decoder().eval())), (3, 16, 16))
    cure = "a program saved from torch.jit.trace" if way == "script" else "a torch.export program, a factory or an ONNX"
    with pytest.raises(ExportError, match=f"special_i1' to ONNX .*; {cure}") as caught:
        imported.halves.to_onnx(X.numpy(), Z.numpy(), False)
    assert len(str(caught.value)) < 250


def test_named_outputs_and_one_tensor(networks: tuple[Any, Any], tmp_path: Path) -> None:
    named = Named().eval()
    named.load_state_dict(networks[0].state_dict())
    decoder = torch.jit.script(networks[1])
    imported = load(save(tmp_path / "named", torch.jit.script(named), decoder), (3, 16, 16))
    check_graphs(imported, networks, ((1, 16, 16), (3, 16, 16)))
    imported = load(save(tmp_path / "moments", torch.jit.script(named.net), decoder), (3, 16, 16))
    check_graphs(imported, networks, ((1, 16, 16), (3, 16, 16)))


def test_two_files_by_name(networks: tuple[Any, Any], tmp_path: Path) -> None:
    save(tmp_path, torch.jit.script(networks[0]), torch.jit.script(networks[1]))
    encoder, decoder = tmp_path / "my_encoder", tmp_path / "decoder"
    assert torch_program.recognises(f"{encoder},{decoder}")
    assert load(f"{encoder},{decoder}").name == "my_encoder"
    with pytest.raises(InputError, match="expected the encoder first, then the decoder"):
        load(f"{decoder},{encoder}")
    (tmp_path / "text").write_text("text")
    with pytest.raises(InputError, match=r"text is not a TorchScript or torch.export program"):
        load(f"{encoder},{tmp_path / 'text'}")


def test_recognised_by_the_archives_entries(networks: tuple[Any, Any], tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(networks[1]), tmp_path / "decoder.onnx")
    assert sort_of(tmp_path / "decoder.onnx") == SCRIPT
    torch.save(networks[0].state_dict(), tmp_path / "encoder.pt")
    assert sort_of(tmp_path / "encoder.pt") is None
    (tmp_path / "text").write_text("text")
    assert sort_of(tmp_path / "text") is None
    assert not torch_program.recognises(str(tmp_path))  # no encoder
    for other in ("", "absent", str(tmp_path / "text"), "a,b", "\0"):
        assert not torch_program.recognises(other)
    with pytest.raises(InputError, match=r"should have one encoder, .*; it has none"):
        load(str(tmp_path))
    for name in ("encoder", "encoder2"):
        torch.jit.save(torch.jit.script(networks[0]), tmp_path / name)
    with pytest.raises(InputError, match=r"it has 2 of them \(encoder, encoder2\); name both files as ENCODER,DECODER"):
        load(str(tmp_path))


def test_refused_in_words(networks: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    decoder = torch.jit.script(networks[1])
    training = torch.jit.trace(Encoder().train(), X, check_trace=False)
    half = torch.jit.script(Encoder().half())
    fixed = torch.jit.trace(nn.Sequential(Flat().eval(), nn.Unflatten(1, (4, 4, 4))), X)
    for name, encoder, error, message in (
        ("training", training, ExportError, "the encoder gives other values for the same input in a second run"),
        ("half", half, ExportError, "has the weights .* in torch.float16; expected float32"),
        ("fixed", fixed, ExportError, r"the encoder does not run on a batch of shape|mixes the rows"),
        ("saves", torch.jit.script(Saves()), ExportError, "has 'save' in code/.*, a name in code that reaches files"),
    ):
        source = save(tmp_path / name, encoder, decoder)
        with pytest.raises(error, match=message):
            load(source, (3, 16, 16))
    assert not Path("canary").exists()
    for options, message in (
        ({"weights": "w.pt"}, "--weights is for a factory"),
        ({"input_range": None}, "pass --input-range"),
        ({"shape": None}, "pass --input"),
        ({"kind": "autoencoder"}, "--kind is 'autoencoder'"),
    ):
        with pytest.raises(InputError, match=message):
            load(str(tmp_path / "half") if "weights" in options else _good(tmp_path, networks), **options)


def _good(folder: Path, networks: tuple[Any, Any]) -> str:
    return save(folder / "good", torch.jit.script(networks[0]), torch.jit.script(networks[1]))


def _rewrite(path: Path, edit: Callable[[str, bytes], tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path) as archive:
        entries = [(name, archive.read(name)) for name in archive.namelist() if not name.endswith(".debug_pkl")]
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in entries:
            archive.writestr(*edit(name, content))


def _insert(code: str, name: str, content: bytes) -> tuple[str, bytes]:
    """`code` as the first statement of the encoder's forward."""
    if b"class Encoder" not in content:
        return name, content
    head, arrow, rest = content.decode().partition("-> Tuple[Tensor, Tensor]:\n")
    return name, f"{head}{arrow}    {code}\n{rest}".encode()


@pytest.mark.parametrize(
    "code",
    [
        'torch.save ([x], "canary")',
        'ops.aten.save ([x], "canary")',
        'torch . \\\n save([x], "canary")',
        '_c = torch.save\n    _c([x], "canary")',
        'getattr(torch, "save")([x], "canary")',
        'getattr(torch, "sa" "ve")([x], "canary")',
        'getattr(torch, "\\163ave")([x], "canary")',
        'getattr(getattr(ops, "aten"), "\\163ave")([x], "canary")',
        '_c = torch.from_file ("canary", True, 4)',
        '_c = ops.image.write_file("canary", x)',
        "_c = __torch__.torch.classes.torchvision.Video(x)",
    ],
)
def test_code_that_reaches_files_is_refused_however_it_is_written(
    networks: tuple[Any, Any], code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = _good(tmp_path, networks)
    _rewrite(Path(source) / "my_encoder", lambda name, content: _insert(code, name, content))
    with pytest.raises(ExportError, match=r"my_encoder has '(save|from_file|getattr|ops|classes)' in code/"):
        load(source, (3, 16, 16))
    assert not Path("canary").exists()


def test_records_are_read_as_torch_reads_them(networks: tuple[Any, Any], tmp_path: Path) -> None:
    path = Path(source := _good(tmp_path, networks)) / "my_encoder"

    def upper(name: str, content: bytes) -> tuple[str, bytes]:
        name, content = _insert('torch.save([x], "canary")', name, content)
        return (name.replace("code/", "CODE/").replace(".py", ".PY"), content)

    _rewrite(path, upper)
    assert torch.jit.load(path)  # torch finds them, so we must
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(next(name for name in archive.namelist() if "CODE/" in name).replace("CODE/", "code/"), "")
    assert torch_program.recognises(source)
    with pytest.raises(CheckpointError, match="my_encoder has records of the same name"):
        load(source)
    _rewrite(Path(source := _good(tmp_path, networks)) / "my_encoder", upper)
    with zipfile.ZipFile(Path(source) / "my_encoder", "a") as archive:
        archive.writestr(f"{archive.namelist()[0].partition('/')[0]}/code/more.txt", "")
    with pytest.raises(ExportError, match="my_encoder has 'save' in code/"):
        load(source)


def test_operators_are_looked_for_in_the_graphs_too() -> None:
    with pytest.raises(ExportError, match=r"a\.pt calls 'save', which reaches files"):
        script_code.check_graphs(torch.jit.script(nn.Sequential(Saves())), Path("a.pt"))


def test_a_damaged_compressed_record(networks: tuple[Any, Any], tmp_path: Path) -> None:
    path = Path(source := _good(tmp_path, networks)) / "my_encoder"
    _rewrite(path, lambda name, content: (name, content), zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(path) as archive:
        code = next(entry for entry in archive.infolist() if entry.filename.endswith(".py"))
    content = bytearray(path.read_bytes())
    start = code.header_offset + 30 + len(code.filename)
    content[start : start + code.compress_size] = b"\xff" * code.compress_size
    path.write_bytes(content)
    # torch's reader may also give what happens to lie in memory, which the look at the code may refuse.
    refused = r"my_encoder (is not a TorchScript program that can be (read|loaded)|has '\w+' in code/)"
    with pytest.raises((CheckpointError, ExportError), match=refused):
        load(source)


def test_damaged_archives(networks: tuple[Any, Any], tmp_path: Path) -> None:
    source = _good(tmp_path, networks)
    path = Path(source) / "my_encoder"
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content[:-7] if name.endswith(".pkl") else content)
    assert torch_program.recognises(source)
    with pytest.raises(CheckpointError, match="my_encoder is not a TorchScript program that can be loaded"):
        load(source)
