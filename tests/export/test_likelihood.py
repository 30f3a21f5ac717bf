"""What p(x|z) of a model from elsewhere is, as its user says it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from vae_export import export_bundle, importers
from vae_export.cli import main
from vae_export.export import export_imported
from vae_export.imported import Imported, ImportOptions
from vae_export.likelihood import agree, parse_likelihood
from vae_runtime import VAE
from vae_runtime.errors import InputError
from vae_runtime.manifest import Likelihood

MODULE = "networks_of_the_likelihood_tests"
SOURCE = """
import torch
from torch import nn

class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 6)
    def forward(self, x):
        return self.layer(x.flatten(1)).chunk(2, dim=1)

def images():
    torch.manual_seed(0)
    return Encoder(), nn.Sequential(nn.Linear(3, 16), nn.Sigmoid(), nn.Unflatten(1, (1, 4, 4)))

def vectors(last=nn.Sigmoid):
    torch.manual_seed(0)
    return Encoder(), nn.Sequential(nn.Linear(3, 16), last())

def logits():
    encoder, decoder = vectors(nn.Identity)
    with torch.no_grad():
        decoder[0].weight *= 20
    return encoder, decoder
"""
X = np.random.default_rng(0).random((6, 1, 4, 4), dtype=np.float32)

pytestmark = pytest.mark.usefixtures("networks")


def load(name: str, shape: tuple[int, ...], **options: Any) -> Imported:
    options |= {"input_range": "unit"} if len(shape) == 3 else {}
    return importers.load(f"{MODULE}:{name}", None, ImportOptions(input_shape=shape, **options))


@pytest.mark.parametrize(
    ("said", "want"),
    [
        (None, None),
        ("bernoulli", Likelihood("bernoulli", binarize="none")),
        ("bernoulli:dynamic", Likelihood("bernoulli", binarize="dynamic")),
        ("gaussian:0.1", Likelihood("gaussian", scale=0.1)),
        ("laplace:2", Likelihood("laplace", scale=2.0)),
        ({"type": "bernoulli"}, Likelihood("bernoulli", binarize="none")),
        ({"type": "gaussian", "scale": 0.1}, Likelihood("gaussian", scale=0.1)),
    ],
)
def test_forms_of_a_likelihood(said: Any, want: Likelihood | None) -> None:
    assert parse_likelihood(said) == want


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (
            "cauchy",
            "likelihood.type is 'cauchy'; .* as text: expected bernoulli, bernoulli:HOW with none, dynamic",
        ),
        ("gaussian", "likelihood.scale is None; .* gaussian:SCALE or laplace:SCALE$"),
        ("gaussian:wide", "likelihood is 'gaussian:wide'; expected bernoulli"),
        ("gaussian:0", "likelihood.scale is 0.0; the scale of a density is above 0"),
        ("bernoulli:0.1", "likelihood.binarize is '0.1'; expected one of none, dynamic, threshold"),
        (0.1, r"likelihood is 0.1; expected bernoulli.*, or a dict such as \{'type': 'bernoulli'\}"),
        (Likelihood, "likelihood is <class "),
        ({"type": "gaussian"}, "likelihood.scale is None; expected a finite number$"),
        (
            {"type": "bernoulli", "binarise": "threshold"},
            "likelihood has 'binarise'; of a bernoulli one, expected type and binarize$",
        ),
        ({"type": "laplace", "scale": 1, 3: 4}, "likelihood has 3; of a laplace one, expected type and scale$"),
        ({"type": "bernoulli", "scale": 0.1}, "likelihood has 'scale'; of a bernoulli one"),
        ({"type": "gaussian", "scale": "0.1"}, "likelihood.scale is '0.1'; expected a finite number$"),
    ],
)
def test_what_is_none_is_refused_in_words(said: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_likelihood(said)


def test_the_command_line_gives_an_imported_model_scores_in_nats(networks: Any, tmp_path: Path) -> None:
    options = ["--input", "1x4x4", "--input-range", "unit", "--output", str(tmp_path / "a.vae"), "--likelihood"]
    result = CliRunner().invoke(main, [f"{MODULE}:images", *options, "gaussian:0.5"])
    assert result.exit_code == 0, result.output
    encoder, decoder = networks.images()
    with torch.no_grad():
        mean, logvar = encoder(torch.from_numpy(X))
        z = mean + (logvar / 2).exp() * torch.randn(20_000, 1, 3, generator=torch.Generator().manual_seed(0))
        log_p = torch.distributions.Normal(decoder(z.flatten(0, 1)), 0.5)
        log_p = log_p.log_prob(torch.from_numpy(X).repeat(20_000, 1, 1, 1)).sum((1, 2, 3)).reshape(20_000, -1).mean(0)
        want = log_p - 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum(1)
    with VAE.load(tmp_path / "a.vae", threads=1) as vae:
        assert vae.manifest.likelihood == Likelihood("gaussian", scale=0.5)
        np.testing.assert_allclose(vae.elbo(X, 2000, seed=0), want, atol=0.05)
    refused = CliRunner().invoke(main, [f"{MODULE}:images", *options, "gaussian:wide", "--force"])
    assert (refused.exit_code, refused.stderr.count("\n")) == (1, 1)
    assert "likelihood is 'gaussian:wide'; expected bernoulli" in refused.stderr


def test_a_model_of_ours_has_its_own(model_file: Path) -> None:
    result = CliRunner().invoke(main, [str(model_file), "--likelihood", "bernoulli"])
    assert result.exit_code == 1
    assert "--likelihood is for models from elsewhere" in result.stderr


def test_images_that_became_binary_in_training_become_so_in_the_graph(networks: Any, tmp_path: Path) -> None:
    manifest = export_imported(load("images", (1, 4, 4)), tmp_path / "a.vae", likelihood="bernoulli:threshold")
    assert manifest.likelihood == Likelihood("bernoulli", binarize="threshold")
    with torch.no_grad():
        mean, logvar = networks.images()[0](torch.from_numpy((X >= 0.5).astype(np.float32)))
    with VAE.load(tmp_path / "a.vae") as vae:
        posterior = vae.encode(X)
        np.testing.assert_allclose(posterior.mean, mean, atol=1e-5)
        np.testing.assert_allclose(posterior.logvar, logvar, atol=1e-5)
        assert vae.selftest().passed


def test_what_a_source_tells_is_not_overruled() -> None:
    grey, dynamic = parse_likelihood("bernoulli"), parse_likelihood("bernoulli:dynamic")
    assert (agree(None, grey), agree(grey, None), agree(dynamic, grey)) == (grey, grey, dynamic)
    with pytest.raises(InputError, match=r"likelihood is \{'type': 'gaussian', 'scale': 1.0\}, but the source says"):
        agree(parse_likelihood("gaussian:1"), grey)


def test_vectors_with_a_bernoulli_likelihood_are_probabilities(networks: Any, tmp_path: Path) -> None:
    x = X.reshape(6, 16)
    rule = r"where the means of a Bernoulli likelihood are; they look like logits: say so with --logits"
    with pytest.raises(InputError, match=rule):
        export_bundle(*networks.logits(), tmp_path / "a.vae", examples=x, likelihood="bernoulli")
    with pytest.raises(InputError, match=rule):
        export_imported(load("logits", (16,)), tmp_path / "a.vae", examples=x, likelihood="bernoulli")
    imported = load("logits", (16,), logits=True)
    export_imported(imported, tmp_path / "a.vae", examples=x, likelihood="bernoulli")
    encoder, decoder = networks.logits()
    with torch.no_grad(), VAE.load(tmp_path / "a.vae") as vae:
        want = torch.sigmoid(decoder(encoder(torch.from_numpy(x))[0]))
        np.testing.assert_allclose(vae.reconstruct(x), want, atol=1e-5)
