"""Models of pythae: the bundle computes what the library's `predict` and its encoder give."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

models = pytest.importorskip("pythae.models", reason="the models are pythae's")

from pythae.models.base.base_utils import ModelOutput  # noqa: E402
from pythae.models.nn import BaseDecoder, BaseEncoder  # noqa: E402

from vae_export.export import export_imported  # noqa: E402
from vae_export.imported import ImportOptions  # noqa: E402
from vae_export.importers import load  # noqa: E402
from vae_export.importers.pythae_folder import AUTOENCODERS, REFUSED, VAES  # noqa: E402
from vae_runtime import VAE  # noqa: E402
from vae_runtime.errors import CheckpointError, ExportError, InputError  # noqa: E402

PLAIN = ImportOptions()
TRUSTED = ImportOptions(trust_pickle=True)


def save(folder: Path, config_name: str, input_dim: tuple[int, ...], networks: tuple[Any, ...] = (), **settings: Any):
    """A seeded model with weights larger than new ones have, saved by the library; -> the model."""
    torch.manual_seed(0)
    config = getattr(models, config_name)(input_dim=input_dim, latent_dim=3, **settings)
    model = getattr(models, config_name.removesuffix("Config").removesuffix("_"))(config, *networks)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    model.save(str(folder))
    return model.eval()


def expected_of(model: Any, x: np.ndarray) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    with torch.no_grad():
        predicted = model.predict(torch.from_numpy(x))
        logvar = model.encoder(torch.from_numpy(x)).get("log_covariance")
    return predicted.embedding.numpy(), None if logvar is None else logvar.numpy(), predicted.recon_x.numpy()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("pythae")
    model = save(folder / "photos" / "final_model", "BetaVAEConfig", (3, 12, 16), reconstruction_loss="bce", beta=2.0)
    export_imported(load(str(folder / "photos"), None, PLAIN), folder / "photos.vae")
    return folder / "photos.vae", model


@pytest.mark.parametrize("count", [1, 3])
def test_a_bundle_agrees_with_pythae_on_a_photograph(
    bundle: tuple[Path, Any], crops: Callable[..., np.ndarray], count: int
) -> None:
    path, model = bundle
    x = crops(count, 12, 16)
    mean, logvar, images = expected_of(model, x)
    with VAE.load(path) as vae:
        posterior = vae.encode(x)
        np.testing.assert_allclose(posterior.mean, mean, rtol=0, atol=1e-4)
        np.testing.assert_allclose(posterior.logvar, logvar, rtol=0, atol=1e-4)
        np.testing.assert_allclose(vae.decode(mean), images, rtol=0, atol=1e-4)
        assert (vae.manifest.kind, vae.manifest.name) == ("vae", "photos")
        assert vae.manifest.to_dict()["origin"] == {"library": "pythae", "version": "0.1.2", "class": "BetaVAE"}
        assert vae.manifest.likelihood is not None
        assert vae.manifest.likelihood.to_dict() == {"type": "bernoulli", "binarize": "none"}
    assert np.ptp(images) > 0.1


def test_a_bundle_of_vectors_agrees_with_pythae(tmp_path: Path) -> None:
    model = save(tmp_path / "rows", "RAE_L2_Config", (7,))
    export_imported(load(str(tmp_path / "rows"), None, PLAIN), tmp_path / "rows.vae")
    x = np.random.default_rng(0).random((3, 7), dtype=np.float32)
    code, _, rows = expected_of(model, x)
    with VAE.load(tmp_path / "rows.vae") as vae:
        for part in (x[:1], x):
            np.testing.assert_allclose(vae.encode(part).mean, code[: len(part)], rtol=0, atol=1e-4)
            np.testing.assert_allclose(vae.reconstruct(part), rows[: len(part)], rtol=0, atol=1e-4)
        assert (vae.manifest.kind, vae.manifest.input.shape) == ("autoencoder", (7,))


def test_every_model_of_pythae_is_exported_or_refused_for_a_reason() -> None:
    known = {name for name in dir(models) if name.endswith("Config") and name != "BaseAEConfig"}
    assert known == {*VAES, *AUTOENCODERS, *REFUSED}


@pytest.mark.parametrize("name", [*VAES, *AUTOENCODERS])
def test_halves_compute_what_the_library_computes(tmp_path: Path, name: str) -> None:
    model = save(tmp_path / "model", name, (1, 4, 4))
    imported = load(str(tmp_path / "model"), None, PLAIN)
    x = np.random.default_rng(0).random((3, 1, 4, 4), dtype=np.float32)
    mean, logvar, images = expected_of(model, x)
    encoded = imported.halves.encode(x)
    np.testing.assert_allclose(encoded["mean"], mean, rtol=0, atol=1e-6)
    np.testing.assert_allclose(imported.halves.decode(mean), images, rtol=0, atol=1e-6)
    assert (logvar is not None) == (name in VAES) == ("logvar" in encoded) == (imported.halves.kind == "vae")
    if logvar is not None:
        np.testing.assert_allclose(encoded["logvar"], logvar, rtol=0, atol=1e-6)
    with_likelihood = {"type": "gaussian", "scale": 1.0} if VAES.get(name) else None
    assert imported.likelihood == with_likelihood


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_no_bundle_can_hold_are_refused_with_the_reason(tmp_path: Path, name: str) -> None:
    save(tmp_path / "model", name, (1, 4, 4))
    with pytest.raises(ExportError, match=REFUSED[name]):
        load(str(tmp_path / "model"), None, PLAIN)


def test_the_gaussian_is_that_of_the_library_s_own_likelihood(tmp_path: Path) -> None:
    """pythae's loss less that of a perfect reconstruction is half the square: a Gaussian's of the deviation told."""
    model = save(tmp_path / "model", "VAEConfig", (6,))
    likelihood = load(str(tmp_path / "model"), None, PLAIN).likelihood
    assert likelihood is not None
    x, reconstruction, zeros = torch.rand(1, 6), torch.rand(1, 6), torch.zeros(1, 3)
    loss = model.loss_function(reconstruction, x, zeros, zeros, zeros)[1]
    density = torch.distributions.Normal(reconstruction, likelihood["scale"])
    expected = (density.log_prob(reconstruction) - density.log_prob(x)).sum()
    torch.testing.assert_close(loss, expected)


def test_a_deterministic_posterior_is_a_plain_code(tmp_path: Path) -> None:
    save(tmp_path / "model", "Adversarial_AE_Config", (6,), deterministic_posterior=True)
    assert load(str(tmp_path / "model"), None, PLAIN).halves.kind == "autoencoder"


@pytest.mark.parametrize(
    ("input_dim", "asked", "expected"),
    [
        ((24,), (2, 3, 4), (2, 3, 4)),
        ((3, 4), (1, 3, 4), (1, 3, 4)),
        ((3, 4), (12,), (12,)),
        ((2, 3, 4), (2, 3, 4), (2, 3, 4)),
    ],
)
def test_rows_may_be_told_to_be_images(
    tmp_path: Path, input_dim: tuple[int, ...], asked: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    model = save(tmp_path / "model", "VAEConfig", input_dim)
    imported = load(str(tmp_path / "model"), None, ImportOptions(input_shape=asked))
    x = np.random.default_rng(0).random((2, *asked), dtype=np.float32)
    mean, _, reconstruction = expected_of(model, x.reshape(2, *input_dim))
    assert imported.input_shape == expected
    np.testing.assert_allclose(imported.halves.encode(x)["mean"], mean, atol=1e-6)
    np.testing.assert_allclose(imported.halves.decode(mean), reconstruction.reshape(x.shape), atol=1e-6)


@pytest.mark.parametrize(
    ("input_dim", "options", "message"),
    [
        ((3, 4), {}, r"neither \(D,\) nor \(C, H, W\); say with --input"),
        ((3, 4), {"input_shape": (2, 3, 2)}, r"--input is \(2, 3, 2\), but"),
        ((1, 3, 4), {"input_shape": (1, 4, 3)}, r"--input is \(1, 4, 3\), but"),
        ((1, 3, 4), {"input_shape": (1, None, None)}, r"--input is \(1, None, None\), but"),
        ((12,), {"input_shape": (1, 3, 5)}, "--input is"),
        ((1, 3, 4), {"kind": "autoencoder"}, "--kind is 'autoencoder', but VAE says 'vae'"),
        ((1, 3, 4), {"input_range": "signed"}, "--input-range is 'signed', but a decoder that ends in"),
        ((12,), {"input_range": "unit"}, "vectors stay in their own units"),
        ((12,), {"weights": "model.pt"}, "--weights is of no use here"),
        ((12,), {"latent_scale": 2.0}, "--latent-scale is of no use here"),
    ],
)
def test_options_are_asked_for_where_needed_and_refused_where_wrong(
    tmp_path: Path, input_dim: tuple[int, ...], options: dict[str, Any], message: str
) -> None:
    save(tmp_path / "model", "VAEConfig", input_dim)
    with pytest.raises(InputError, match=message):
        load(str(tmp_path / "model"), None, ImportOptions(**options))


class Convolutions(BaseEncoder):
    """The user's own encoder, (N, 1, 4, 4) -> (N, 3)."""

    noise = 0.0

    def __init__(self, outputs: int = 3) -> None:
        BaseEncoder.__init__(self)
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Dropout(0.5), nn.Flatten())
        self.heads = nn.ModuleList(nn.Linear(64, size) for size in (3, outputs))

    def forward(self, x):
        hidden = self.body(x)
        mean, logvar = (head(hidden) for head in self.heads)
        return ModelOutput(embedding=mean + self.noise * torch.randn_like(mean), log_covariance=logvar)


class Centred(Convolutions):
    """One that subtracts the mean of its batch."""

    def forward(self, x):
        return super().forward(x - x.mean(0))


class Signed(BaseDecoder):
    """The user's own decoder, (N, 3) -> (N, 1, 4, 4) in [-1, 1]."""

    def __init__(self) -> None:
        BaseDecoder.__init__(self)
        self.body = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Unflatten(1, (1, 4, 4)))

    def forward(self, z):
        return ModelOutput(reconstruction=self.body(z))


def test_networks_of_the_user_s_own_are_loaded_only_when_trusted(tmp_path: Path) -> None:
    model = save(tmp_path / "model", "VAEConfig", (1, 4, 4), (Convolutions(), Signed()))
    folder = str(tmp_path / "model")
    with pytest.raises(InputError, match=r"a pickled encoder and decoder of its own, .* pass --trust-pickle"):
        load(folder, None, PLAIN)
    with pytest.raises(InputError, match=r"--input-range unit, .* or --input-range signed"):
        load(folder, None, TRUSTED)
    imported = load(folder, None, ImportOptions(trust_pickle=True, input_range="signed"))
    x = np.random.default_rng(0).random((3, 1, 4, 4), dtype=np.float32)
    mean, logvar, images = expected_of(model, 2 * x - 1)
    encoded = imported.halves.encode(x)
    np.testing.assert_allclose(encoded["mean"], mean, atol=1e-5)
    np.testing.assert_allclose(encoded["logvar"], logvar, atol=1e-5)
    np.testing.assert_allclose(imported.halves.decode(mean), (images + 1) / 2, atol=1e-5)
    assert imported.likelihood == {"type": "gaussian", "scale": 0.5}


def test_trust_of_pickles_changes_nothing_where_there_are_none(tmp_path: Path) -> None:
    save(tmp_path / "model", "VAEConfig", (6,))
    assert load(str(tmp_path / "model"), None, TRUSTED).origin["class"] == "VAE"


def test_an_encoder_that_draws_is_refused(tmp_path: Path) -> None:
    encoder = Convolutions()
    encoder.noise = 0.1
    save(tmp_path / "model", "VAEConfig", (1, 4, 4), (encoder,))
    with pytest.raises(ExportError, match=r"the encoder gives other values .* in a second run: it draws random"):
        load(str(tmp_path / "model"), None, TRUSTED)


def test_an_encoder_that_mixes_rows_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "model", "VAEConfig", (1, 4, 4), (Centred(),))
    with pytest.raises(ExportError, match=r"the encoder gives values that differ .*: it mixes the rows of a batch"):
        load(str(tmp_path / "model"), None, TRUSTED)


def test_an_encoder_with_another_shape_of_logvar_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "model", "VAEConfig", (1, 4, 4), (Convolutions(outputs=1),))
    with pytest.raises(ExportError, match=r"gives a logvar of shape \(3, 1\) for .*; expected \(3, 3\)"):
        load(str(tmp_path / "model"), None, TRUSTED)


def test_networks_that_do_not_run_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "model", "VAEConfig", (1, 5, 4), (Convolutions(),))
    with pytest.raises(ExportError, match=r"the encoder does not run on a batch of shape \(3, 1, 5, 4\): RuntimeError"):
        load(str(tmp_path / "model"), None, TRUSTED)


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("canary"),))


def config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / "model_config.json").read_text())
        (folder / "model_config.json").write_text(json.dumps({**content, **changes}))

    return change


def state(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        content = torch.load(folder / "model.pt", weights_only=True)
        change(content["model_state_dict"])
        torch.save(content, folder / "model.pt")

    return rewrite


def weights(content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / "model.pt").write_bytes(content) and None


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (config(name="MyVAEConfig"), ExportError, "holds a MyVAE of pythae: exported are VAE, BetaVAE"),
        (config(name=None), ExportError, "holds a None of pythae"),
        (config(latent_dim="many"), CheckpointError, "describes no VAE: ValidationError"),
        (config(reconstruction_loss="l1"), CheckpointError, "describes no VAE: ValidationError"),
        (config(sigma=2), CheckpointError, "has sigma, which VAEConfig lacks"),
        (config(input_dim=None), CheckpointError, "input_dim None; expected a list of whole numbers"),
        (config(input_dim=[1, 4, -4]), CheckpointError, "expected a list of whole numbers"),
        (config(latent_dim=5), CheckpointError, r"wrong shape or type in .*\(3×512 float32, expected 5×512\)"),
        (config(uses_default_encoder=False), InputError, "a pickled encoder of its own"),
        (state(lambda s: s.pop("encoder.log_var.bias")), CheckpointError, r"it lacks encoder\.log_var\.bias$"),
        (state(lambda s: s.update(extra=torch.ones(1))), CheckpointError, "it has the unknown extra$"),
        (state(lambda s: s.update({"encoder.log_var.bias": 1})), CheckpointError, r"log_var.bias \(1, expected 3\)"),
        (lambda folder: torch.save({"a": 1}, folder / "model.pt"), CheckpointError, "has no model_state_dict"),
        (lambda folder: torch.save([1], folder / "model.pt"), CheckpointError, "holds a list"),
        (lambda folder: (folder / "model.pt").unlink(), CheckpointError, "model.pt is missing"),
        (weights(pickle.dumps(Hostile(), 2)), CheckpointError, "more than plain data"),
        (weights(b"PK\3\4 no archive"), CheckpointError, "damaged or holds no weights"),
        (weights(b""), CheckpointError, "damaged or holds no weights"),
        (lambda folder: (folder / "model_config.json").write_text("{"), CheckpointError, "is no JSON object"),
        (lambda folder: (folder / "model_config.json").unlink(), CheckpointError, "model_config.json is missing"),
    ],
)
def test_a_folder_that_cannot_be_imported_is_refused_by_name(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path], Any],
    error: type[Exception],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "model", "VAEConfig", (6,))
    change(tmp_path / "model")
    with pytest.raises(error, match=message) as caught:
        load("model", "pythae", PLAIN)
    assert "\n" not in str(caught.value)
    assert not Path("canary").exists()


def test_a_damaged_pickle_that_is_trusted_is_an_error_in_words(tmp_path: Path) -> None:
    save(tmp_path / "model", "VAEConfig", (1, 4, 4), (Convolutions(),))
    (tmp_path / "model" / "encoder.pkl").write_bytes(b"\x80")
    with pytest.raises(CheckpointError, match="cannot be loaded by pythae"):
        load(str(tmp_path / "model"), None, TRUSTED)
