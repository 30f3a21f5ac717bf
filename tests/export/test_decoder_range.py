"""Decoders that give logits, or images of another range than is said, are told by their values before these are cut."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

from vae_export import export_bundle
from vae_export.cli import main
from vae_export.decoder_range import DecoderRangeWarning
from vae_runtime import VAE
from vae_runtime.errors import InputError

MODULE = "networks_of_the_range_tests"
SOURCE = """
import torch
from torch import nn

class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 6)
    def forward(self, x):
        mean, logvar = self.layer(x.flatten(1)).chunk(2, dim=1)
        return mean, logvar - 3

class Decoder(nn.Module):
    # Of [middle - spread, middle + spread], before its last function.
    def __init__(self, middle, spread, last):
        super().__init__()
        self.layer, self.last, self.middle, self.spread = nn.Linear(3, 16), last, middle, spread
    def forward(self, z):
        return self.last(self.middle + self.spread * torch.sin(30 * self.layer(z))).reshape(-1, 1, 4, 4)

def make(middle, spread, last=nn.Identity):
    torch.manual_seed(0)
    return Encoder(), Decoder(middle, spread, last())

def logits(): return make(-2.0, 6.0)
def faint_logits(): return make(-0.2, 0.7)
def normalised(): return make(0.2, 2.5)
def dark_logits(): return make(-3.0, 2.0)
def bright_logits(): return make(2.0, 2.0)
def large_logits(): return make(0.0, 30.0)
def logits_as_signed(): return make(-1.0, 2.0)
def signed(): return make(0.0, 3.0, nn.Tanh)
def sigmoid(): return make(-2.0, 6.0, nn.Sigmoid)
def near(): return make(0.5, 0.55)
def bytes_(): return make(127.0, 127.0)
def over(): return make(0.5, 0.64)
"""
X = np.random.default_rng(0).random((6, 1, 4, 4), dtype=np.float32)

pytestmark = pytest.mark.usefixtures("networks")


def write(way: str, networks: Any, name: str, folder: Path) -> str:
    """The SOURCE of a pair of networks for one of the ways."""
    if way == "factory":
        return f"{MODULE}:{name}"
    folder.mkdir(exist_ok=True)
    for half, network, shape in zip(
        ("encoder", "decoder"), getattr(networks, name)(), ((2, 1, 4, 4), (2, 3)), strict=True
    ):
        file, x = io.BytesIO(), torch.rand(*shape)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if way == "script":
                torch.jit.save(torch.jit.trace(network.eval(), x), file)
            elif way == "program":
                batch = {0: torch.export.Dim("batch")}
                torch.export.save(torch.export.export(network.eval(), (x,), dynamic_shapes=(batch,)), file)
            else:
                torch.onnx.export(
                    network, (x,), file, dynamo=False, input_names=["i"], opset_version=17, dynamic_axes={"i": {0: "n"}}
                )  # fmt: skip
        (folder / half).write_bytes(file.getvalue())
    return str(folder)


def run(*arguments: object) -> Any:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.mark.parametrize("way", ["factory", "script", "program", "onnx"])
def test_every_way_refuses_logits_and_takes_them_where_it_is_said(way: str, networks: Any, tmp_path: Path) -> None:
    source, target = write(way, networks, "logits", tmp_path / "pair"), tmp_path / "a.vae"
    np.save(tmp_path / "x.npy", X)
    options = ["--input", "1x4x4", "--input-range", "unit", "--output", target, "--data", tmp_path / "x.npy"]
    options += ["--trust-pickle"] if way == "program" else []
    refused = run(source, *options)
    assert refused.exit_code == 1, refused.output
    assert "the decoder gives values from -8 to 4" in refused.stderr
    assert "they look like logits: say so with --logits (logits=True), which puts the sigmoid" in refused.stderr
    assert not target.exists()
    written = run(source, *options, "--logits")
    assert written.exit_code == 0, written.output
    encoder, decoder = networks.logits()
    with torch.no_grad():
        mean, _ = encoder(torch.from_numpy(X))
        want = torch.sigmoid(decoder(mean))
    with VAE.load(target) as vae:
        np.testing.assert_allclose(vae.reconstruct(X), want, atol=1e-5)
        assert vae.selftest().passed
    again = run(write(way, networks, "sigmoid", tmp_path / "other"), *options, "--logits", "--force")
    assert "--logits is True, but the decoder gives no value outside [0, 1], as if it ended in a" in again.stderr


def test_modules_are_looked_at_as_well(networks: Any, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"values from -8 to 4, \d+% of them .* they look like logits: say so with (?!.*normalised)"
    ):
        export_bundle(*networks.logits(), tmp_path / "a.vae", examples=X)
    for name in ("signed", "faint_logits"):
        with pytest.raises(
            InputError,
            match=r"images in \[-1, 1\]: .*input_range='signed'.* or, if they are logits.* normalised by a mean",
        ):
            export_bundle(*getattr(networks, name)(), tmp_path / "a.vae", examples=X)
    said = {"dark_logits": "unit", "bright_logits": "unit", "large_logits": "unit", "logits_as_signed": "signed"}
    for name, input_range in said.items():
        with pytest.raises(InputError, match=r"\[0, 1\], where images are; they look like logits: say so with"):
            export_bundle(*getattr(networks, name)(), tmp_path / "a.vae", examples=X, input_range=input_range)
    with pytest.raises(
        InputError, match=r"from -2.3 to 2.7, .* look like logits: .*; or, if they are normalised by a mean"
    ):
        export_bundle(*networks.normalised(), tmp_path / "a.vae", examples=X)
    with pytest.raises(InputError, match=r"look like images of a larger range, such as \[0, 255\]: bring them to"):
        export_bundle(*networks.bytes_(), tmp_path / "a.vae", examples=X)
    assert list(tmp_path.iterdir()) == []
    export_bundle(*networks.logits(), tmp_path / "a.vae", examples=X, logits=True)
    encoder, decoder = networks.logits()
    with torch.no_grad(), VAE.load(tmp_path / "a.vae") as vae:
        want = torch.sigmoid(decoder(encoder(torch.from_numpy(X))[0]))
        np.testing.assert_allclose(vae.reconstruct(X), want, atol=1e-5)


def test_images_in_the_range_that_is_said_are_not_asked_about(networks: Any, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", DecoderRangeWarning)
        for name in ("sigmoid", "near"):
            export_bundle(*getattr(networks, name)(), tmp_path / f"{name}.vae", examples=X)
    options = ["--input", "1x4x4", "--output", tmp_path / "signed.vae", "--input-range"]
    right, wrong = run(f"{MODULE}:signed", *options, "signed"), run(f"{MODULE}:signed", *options, "unit", "--force")
    assert (right.exit_code, right.stderr) == (0, "")
    assert "look like images in [-1, 1]: say so with --input-range signed" in wrong.stderr  # on noise, too


def test_values_a_little_outside_are_warned_of_with_their_share(networks: Any, tmp_path: Path) -> None:
    rule = r"values from -0.14 to 1.14, \d+% of them more than 0.1 outside \[0, 1\]; they are cut to it"
    with pytest.warns(DecoderRangeWarning, match=rule) as caught:
        export_bundle(*networks.over(), tmp_path / "a.vae", examples=X)
    assert [one.filename for one in caught if one.category is DecoderRangeWarning] == [__file__]
    told = run(f"{MODULE}:over", "--input", "1x4x4", "--input-range", "unit", "--output", tmp_path / "b.vae")
    assert (told.exit_code, told.stderr.count("\n")) == (0, 1)
    assert told.stderr.startswith("Warning: the decoder gives values from -0.1")
    encoder, decoder = networks.over()
    with torch.no_grad(), VAE.load(tmp_path / "a.vae") as vae:
        want = decoder(encoder(torch.from_numpy(X))[0]).clamp(0, 1)
        np.testing.assert_allclose(vae.reconstruct(X), want, atol=1e-5)


def test_logits_that_noise_does_not_show_are_seen_in_draws_from_the_prior(networks: Any, tmp_path: Path) -> None:
    class Shy(nn.Module):
        """Gives 0.5 around the mean of noise, and more further out."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 16)

        def forward(self, z: torch.Tensor) -> torch.Tensor:
            return (0.5 + 9 * (z.abs().amax(1) > 0.85)[:, None] * self.layer(z).sign()).reshape(-1, 1, 4, 4)

    def shy() -> tuple[nn.Module, nn.Module]:
        torch.manual_seed(0)
        return networks.Encoder(), Shy()

    networks.shy = shy
    options = ["--input", "1x4x4", "--input-range", "unit", "--output", tmp_path / "a.vae"]
    refused = run(f"{MODULE}:shy", *options)
    assert "the decoder gives values from -8.5 to 9.5" in refused.stderr
    np.save(tmp_path / "x.npy", X)  # what the model does to real inputs is told by these
    written = run(f"{MODULE}:shy", *options, "--data", tmp_path / "x.npy")
    assert written.exit_code == 0, written.output
