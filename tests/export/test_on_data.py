"""What a bundle says of real data: active units, a fitted prior, quantiles of anomaly scores."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from vae_export import FewExamplesWarning, export_bundle, export_checkpoint
from vae_export.export import export_imported
from vae_export.graphs import DecoderGraph, EncoderGraph
from vae_export.imported import Imported
from vae_export.on_data import LEAST_FOR_UNITS, LEVELS, active_units
from vae_export.prior import PriorFit, parse_prior
from vae_export.reference import Reference
from vae_runtime import VAE, InputError, NotInBundleError, OutOfMemoryError
from vae_runtime.calibration import SCORE_METHODS
from vae_runtime.manifest import FittedPrior, InputSpec, Likelihood
from vae_runtime.preprocess import to_model_input

INPUTS, UNITS = 6, 3
GAUSSIAN = {"type": "gaussian", "scale": 0.5}


class Encoder(nn.Module):
    """6 numbers -> 3 units, the last of which hardly moves."""

    def __init__(self, kind: str = "vae") -> None:
        super().__init__()
        torch.manual_seed(1)
        self.kind, self.mean, self.logvar = kind, nn.Linear(INPUTS, UNITS), nn.Linear(INPUTS, UNITS)
        with torch.no_grad():
            self.mean.weight[2] *= 0.01

    def forward(self, x: torch.Tensor) -> Any:
        return (self.mean(x), 0.1 * self.logvar(x) - 1) if self.kind == "vae" else self.mean(x)


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    return np.random.default_rng(5).normal(0, 1, (400, INPUTS)).astype(np.float32)


def export(path: Path, examples: np.ndarray, kind: str = "vae", **options: Any) -> Any:
    torch.manual_seed(2)
    return export_bundle(
        Encoder(kind), nn.Linear(UNITS, INPUTS), path, examples=examples, kind=kind, name="a", **options
    )


@pytest.fixture(scope="module")
def complete(vectors: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VAE with all there is."""
    path = tmp_path_factory.mktemp("complete") / "a.vae"
    told: list[tuple[int, int]] = []
    export(
        path, vectors[:200], likelihood=GAUSSIAN, prior="mixture:2", calibrate=torch.from_numpy(vectors[200:]),
        progress=lambda *counts: told.append(counts),
    )  # fmt: skip
    assert told == [(64, 200), (128, 200), (192, 200), (200, 200)]
    return path


@pytest.fixture(scope="module")
def encoded(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """mean and logvar of all vectors, by PyTorch in float64."""
    with torch.no_grad():
        mean, logvar = Encoder().double()(torch.from_numpy(vectors).double())
    return mean.numpy(), logvar.numpy()


# --- active units -----------------------------------------------------------------------------------------------------


def test_units_whose_mean_varies_are_active(complete: Path, encoded: tuple[np.ndarray, np.ndarray]) -> None:
    units = VAE.load(complete).manifest.latent.active_units
    assert units is not None
    np.testing.assert_allclose(units.variances, encoded[0][:200].var(axis=0), rtol=1e-4)
    assert units.variances[2] < units.threshold == 0.01 < min(units.variances[:2])
    assert (units.active, units.examples) == (2, 200)


def test_a_checkpoints_units_are_measured_on_its_held_out_examples(checkpoints: Any, exported: dict[str, Path]) -> None:
    checkpoint = checkpoints["conv"]
    held_out = to_model_input(checkpoint.examples["held_out"].numpy(), checkpoint.input)
    with torch.no_grad():
        mean = checkpoint.build_model().encode(torch.from_numpy(held_out))[0].double().numpy()
    units = VAE.load(exported["conv"]).manifest.latent.active_units
    assert units is not None
    np.testing.assert_allclose(units.variances, mean.var(axis=0), rtol=1e-3)
    assert units.examples == len(held_out)


@pytest.fixture(scope="module")
def dynamic(checkpoints: Any) -> Any:
    """A model of draws, with 200 grey examples in each part."""
    rng = np.random.default_rng(4)
    parts = {part: torch.from_numpy(rng.integers(20, 200, (200, 8, 8), np.uint8)) for part in ("train", "held_out")}
    return dataclasses.replace(
        checkpoints["mlp-threshold"], likelihood=Likelihood("bernoulli", binarize="dynamic"), examples=parts
    )


def test_the_own_examples_of_a_model_of_draws_are_drawn_binary(
    dynamic: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit, fitted = PriorFit.fit, []
    monkeypatch.setattr(PriorFit, "fit", lambda self, vae: fitted.append(self.examples) or fit(self, vae))
    options = {"name": "a", "calibrate": "held-out", "prior": "gaussian", "scores": ["elbo", "reconstruction"]}
    for name in ("a", "again"):
        manifest = export_checkpoint(dynamic, tmp_path / name, **options)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name
    assert manifest.training["own_examples"] == "drawn binary"
    held_out = dynamic.examples["held_out"].numpy()[:, None] / np.float32(255)
    rng = np.random.default_rng(9)
    with VAE.load(tmp_path / "a", threads=1) as vae:
        drawn = [(rng.random(held_out.shape) < held_out).astype(np.float32) for _ in range(5)]
        for method in ("elbo", "reconstruction"):
            flagged = np.mean([vae.is_anomaly(x, 0.9, method=method) for x in drawn])
            assert flagged == pytest.approx(0.1, abs=0.06), method
        variances = np.mean([vae.encode(x).mean.var(axis=0, dtype=np.float64) for x in drawn], axis=0)
        units = vae.manifest.latent.active_units
    assert units is not None
    np.testing.assert_allclose(units.variances, variances, rtol=0.6)  # grey ones: a few hundredths
    with np.load(tmp_path / "a" / "golden.npz") as golden:
        x = golden["x"]
    for array in (x, *fitted):
        assert set(np.unique(array)) == {0, 1}
    train = dynamic.examples["train"].numpy()[:, None] / 255
    assert abs(fitted[0].mean(axis=0) - train.mean(axis=0)).max() < 0.2


@pytest.mark.filterwarnings("ignore:no unit of the latent space is active")  # of untrained weights on grey images
def test_examples_that_are_passed_are_taken_as_they_are(dynamic: Any, tmp_path: Path) -> None:
    data = np.random.default_rng(5).integers(0, 256, (150, 8, 8), np.uint8)
    export_checkpoint(
        dynamic, tmp_path / "a", name="a", examples=data, calibrate=data, prior="gaussian", scores=["elbo"]
    )
    with VAE.load(tmp_path / "a", threads=1) as vae:
        scores, calibration = vae.score(data, "elbo"), vae.manifest.calibration
        code = vae.encode(data)
    assert calibration is not None
    np.testing.assert_allclose(calibration.scores["elbo"], np.quantile(scores, LEVELS), rtol=1e-4)
    with np.load(tmp_path / "a" / "golden.npz") as golden, np.load(tmp_path / "a" / "prior.npz") as prior:
        np.testing.assert_array_equal(golden["x"], data[:4, None] / np.float32(255))
        spread = np.exp(code.logvar).mean(axis=0) / len(data)
        np.testing.assert_array_less(abs(prior["means"][0] - code.mean.mean(axis=0)), 3 * np.sqrt(spread / 66))


def test_units_of_a_spatial_latent_are_its_channels_over_all_positions() -> None:
    with VAE.load(Path(__file__).parent.parent / "data" / "tiny-rgb.vae", threads=1) as vae:
        x = np.random.default_rng(0).random((50, 3, 6, 5), np.float32)
        mean = vae.encode(x).mean.astype(np.float64)  # (50, 2, 3, 2)
        units = active_units(vae, x)
    np.testing.assert_allclose(units.variances, [mean[:, channel].var() for channel in range(2)], rtol=1e-5)


def test_an_autoencoders_units_are_held_to_the_largest(
    vectors: np.ndarray, encoded: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    manifest = export(tmp_path / "a.vae", 100 * vectors[:200], kind="autoencoder", prior="gaussian")
    units, variances = manifest.latent.active_units, 1e4 * encoded[0][:200].var(axis=0)
    np.testing.assert_allclose(units.variances, variances, rtol=1e-4)
    assert units.threshold == pytest.approx(0.01 * variances.max(), rel=1e-4)
    assert units.active == 2  # the third one's variance is above 0.01 all the same
    assert units.variances[2] > 0.01
    # The code's own mean and covariance: the same at every draw.
    with VAE.load(tmp_path / "a.vae", threads=1) as vae:
        code = vae.encode(100 * vectors[:200]).mean.astype(np.float64)
        draws = vae.sample(4, seed=0, prior="fitted")
    with np.load(tmp_path / "a.vae" / "prior.npz") as prior:
        np.testing.assert_allclose(prior["means"][0], code.mean(axis=0), rtol=1e-6)
        factor = prior["factors"][0]
        np.testing.assert_allclose(factor @ factor.T, np.cov(code.T), atol=1e-4 * code.var(axis=0).max())
    assert draws.shape == (4, INPUTS)


def test_few_or_invented_examples_tell_nothing_of_units(
    vectors: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vae_export.export.SYNTHETIC_EXAMPLES", 2 * LEAST_FOR_UNITS)
    few = export(tmp_path / "few.vae", vectors[: LEAST_FOR_UNITS - 1])
    assert few.latent.active_units is None
    few = export(tmp_path / "other.vae", vectors[: LEAST_FOR_UNITS - 1], calibrate=vectors[:150])
    assert few.latent.active_units is not None  # those of the calibration are real, too
    assert few.latent.active_units.examples == 150
    halves = Reference(EncoderGraph(Encoder(), "vae"), DecoderGraph(nn.Linear(UNITS, INPUTS), clamp=False))
    invented = export_imported(Imported(halves, "a", (INPUTS,)), tmp_path / "invented.vae")
    assert invented.golden.source == "synthetic"
    assert invented.latent.active_units is None
    assert "active_units" not in invented.to_dict()["latent"]
    real = export_imported(Imported(halves, "a", (INPUTS,)), tmp_path / "real.vae", examples=vectors[:LEAST_FOR_UNITS])
    assert real.latent.active_units is not None


# --- a fitted prior ---------------------------------------------------------------------------------------------------


def test_a_prior_is_fitted_to_draws_from_the_posteriors_of_the_examples(
    complete: Path, encoded: tuple[np.ndarray, np.ndarray]
) -> None:
    mean, logvar = (array[:200] for array in encoded)
    with VAE.load(complete) as vae:
        assert vae.manifest.latent.fitted_prior == FittedPrior("mixture", 2, "prior.npz", 200)
        assert vae.sample(3, seed=1, prior="fitted").shape == (3, INPUTS)
    with np.load(complete / "prior.npz") as prior:
        weights, means, factors = prior["weights"], prior["means"], prior["factors"]
    # A mixture by EM has the mean and the covariance of what it was fitted to, here so many draws that both are those
    # of the aggregate posterior but for chance.
    average = weights @ means
    np.testing.assert_allclose(average, mean.mean(axis=0), atol=0.02)
    spread = np.einsum("k,kij,klj->il", weights, factors, factors) + np.cov(means.T, aweights=weights, ddof=0)
    np.testing.assert_allclose(spread, np.cov(mean.T, ddof=0) + np.diag(np.exp(logvar).mean(axis=0)), atol=0.02)


def test_a_prior_and_thresholds_are_the_same_bytes_at_every_export(
    complete: Path, vectors: np.ndarray, tmp_path: Path
) -> None:
    export(
        tmp_path / "again.vae", vectors[:200], likelihood=GAUSSIAN, prior="mixture:2", calibrate=vectors[200:].copy()
    )
    for path in complete.iterdir():
        assert (tmp_path / "again.vae" / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_checkpoints_prior_is_fitted_to_its_training_examples_or_to_those_given(
    checkpoints: Any, tmp_path: Path
) -> None:
    checkpoint = checkpoints["mlp-vector"]  # 40 training examples
    more = np.concatenate([checkpoint.examples["train"].numpy() + shift for shift in (0, 1, 2)]).astype(np.float32)
    counts = {}
    for name, options in (("own", {}), ("data", {"examples": more[:50]}), ("more", {"prior_examples": more})):
        with pytest.warns(
            FewExamplesWarning, match=r"'mixture:3' is fitted to \d+ examples; with fewer than 180, 10 for"
        ):
            manifest = export_checkpoint(checkpoint, tmp_path / f"{name}.vae", name=name, prior="mixture:3", **options)
        counts[name] = manifest.latent.fitted_prior.examples
    assert counts == {"own": 40, "data": 50, "more": 120}


def test_enough_examples_are_no_reason_to_warn(vectors: np.ndarray) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PriorFit("gaussian", 1, vectors[:30]).check(UNITS)
        with pytest.raises(FewExamplesWarning):
            PriorFit("gaussian", 1, vectors[:29]).check(UNITS)


def test_a_prior_has_a_name_and_a_number_of_components() -> None:
    assert parse_prior("gaussian") == ("gaussian", 1)
    assert parse_prior("mixture:10") == ("mixture", 10)
    for wrong in ("mixture", "mixture:0", "mixture:-1", "mixture:2.5", "gaussian:1", "Gaussian", "", " gaussian", 10):
        with pytest.raises(InputError, match=r"prior is .*; expected 'gaussian', or for 10 components 'mixture:10'"):
            parse_prior(wrong)


def test_too_few_examples_or_too_large_latents_for_a_prior_write_nothing(vectors: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "a.vae"
    with pytest.raises(
        InputError,
        match=r"'gaussian' is fitted to 3 examples; latents of 3 elements need at least 4, pass more \(--data\)",
    ):
        export(path, vectors[:3], prior="gaussian")
    with pytest.raises(
        InputError, match=r"'mixture:5' is fitted to 9 examples; latents of 3 elements need at least 10"
    ):
        export(path, vectors[:9], prior="mixture:5")
    assert list(tmp_path.iterdir()) == []
    for kind, components, most in (("mixture", 40, 915), ("gaussian", 1, 1024)):
        fit = PriorFit(kind, components, np.zeros((400_000, 1), np.float32))
        fit.check(most)
        with pytest.raises(InputError, match=rf"has full covariances, .* of up to {most:,} elements; .* {most + 1:,}"):
            fit.check(most + 1)


def test_a_prior_that_cannot_be_fitted_is_told_before_the_work(
    vectors: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vae_export.export.verify", lambda *_: pytest.fail("too late"))
    with pytest.raises(InputError, match="'gaussian' is fitted to 3 examples"):
        export(tmp_path / "a.vae", vectors[:3], prior="gaussian")


@pytest.mark.parametrize("prior", ["gaussian", "mixture:2"])
def test_images_of_any_size_have_no_prior_to_fit(prior: str, tmp_path: Path) -> None:
    images = np.random.default_rng(0).random((40, 1, 8, 8), np.float32)
    encoder, decoder = nn.Conv2d(1, 2, 2, 2), nn.ConvTranspose2d(2, 1, 2, 2)
    with pytest.raises(InputError, match=r"prior is .*, which is fitted to latents of one shape; this model leaves"):
        export_bundle(
            encoder, decoder, tmp_path / "a.vae", examples=images, kind="autoencoder", multiple_of=2, prior=prior
        )
    assert list(tmp_path.iterdir()) == []


class Halves(nn.Module):
    """Of grey images whose sides are multiples of 2; a code of (2, H/2, W/2)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encode = nn.Conv2d(1, 2, 2, 2)
        self.decode = nn.Sequential(nn.ConvTranspose2d(2, 1, 2, 2), nn.Sigmoid())


def images_of(count: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height).integers(0, 256, (count, height, width), np.uint8)


def test_images_of_any_size_are_calibrated_in_their_own(tmp_path: Path) -> None:
    model, calls = Halves(), []
    given = [images_of(70, 9, 13), torch.from_numpy(images_of(25, 6, 7)), images_of(5, 8, 8)]
    export_bundle(
        model.encode, model.decode, tmp_path / "a.vae", examples=images_of(20, 8, 8), kind="autoencoder", multiple_of=2,
        calibrate=given, progress=lambda done, total: calls.append((done, total)),
    )  # fmt: skip
    assert calls == [(64, 100), (70, 100), (95, 100), (100, 100)]
    arrays = [np.asarray(array) for array in given]
    with VAE.load(tmp_path / "a.vae", threads=1) as vae:
        scores = np.concatenate([vae.score(array, pad=True) for array in arrays])
        codes = [vae.encode(array, pad=True).mean.astype(np.float64) for array in arrays]
        calibration, units = vae.manifest.calibration, vae.manifest.latent.active_units
    assert calibration is not None
    assert (calibration.examples, list(calibration.scores)) == (100, ["reconstruction"])
    np.testing.assert_allclose(calibration.scores["reconstruction"], np.quantile(scores, LEVELS), rtol=1e-4)
    assert units is not None  # of the 100, as the examples are few
    assert units.examples == 100
    channels = [np.concatenate([code[:, channel].ravel() for code in codes]) for channel in range(2)]
    np.testing.assert_allclose(units.variances, [channel.var() for channel in channels], rtol=1e-4)


def test_large_images_are_calibrated_in_tiles(tmp_path: Path) -> None:
    model, given = Halves(), images_of(100, 15, 21)
    options = {"examples": images_of(20, 8, 8), "kind": "autoencoder", "multiple_of": 2, "calibrate": [given]}
    manifest = export_bundle(model.encode, model.decode, tmp_path / "a.vae", calibrate_tile=np.int64(6), **options)
    assert manifest.calibration is not None
    assert manifest.calibration.tile == 6
    with VAE.load(tmp_path / "a.vae", threads=1) as vae:
        scores = vae.score(given, pad=True, tile=6)
        assert vae.manifest.tiling is not None
        assert vae.manifest.tiling.encoder.context == 0  # exact, so that thresholds are those of whole images too
        assert vae.is_anomaly(given, 0.5, pad=True).sum() == vae.is_anomaly(given, 0.5, pad=True, tile=6).sum() == 50
    np.testing.assert_allclose(manifest.calibration.scores["reconstruction"], np.quantile(scores, LEVELS), rtol=1e-4)


@pytest.mark.parametrize(
    ("tile", "change", "message"),
    [
        (5, {}, "calibrate_tile is 5; expected a multiple of 2 pixels"),
        (0, {}, "calibrate_tile is 0"),
        ("6", {}, "calibrate_tile is '6'"),
        (6, {"calibrate": None}, "calibrate_tile is 6, and nothing is calibrated"),
        (6, {"multiple_of": None}, "calibrate_tile is 6, and the model takes inputs of one shape only"),
    ],
)
def test_tiles_that_nothing_can_be_calibrated_with(
    tmp_path: Path, tile: Any, change: dict[str, Any], message: str
) -> None:
    model, images = Halves(), images_of(100, 8, 8)
    options = {"examples": images, "kind": "autoencoder", "multiple_of": 2, "calibrate": images, **change}
    with pytest.raises(InputError, match=message):
        export_bundle(model.encode, model.decode, tmp_path / "a.vae", calibrate_tile=tile, **options)
    assert list(tmp_path.iterdir()) == []


def test_tiles_that_are_too_small_are_refused_before_precisions_are_made(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = nn.Conv2d(1, 2, 6, stride=2, padding=2)
    decoder = nn.Sequential(nn.ConvTranspose2d(2, 1, 2, stride=2), nn.Sigmoid())
    message = (
        "calibrate_tile is 4, but each window needs 2 pixels of context on every side; the smallest tile for this model"
        " is 6"
    )
    options = {"examples": images_of(64, 8, 8), "kind": "autoencoder", "multiple_of": 2, "precisions": ["fp32", "fp16"]}
    calibrate = images_of(100, 8, 8)
    with caplog.at_level("INFO", "vae_export"), pytest.raises(InputError, match=f"^{message}$"):
        export_bundle(encoder, decoder, tmp_path / "a.vae", calibrate=calibrate, calibrate_tile=4, **options)
    assert "measuring how far each half looks and what tiling changes" in caplog.messages
    assert "making and measuring fp16" not in caplog.messages
    assert list(tmp_path.iterdir()) == []


def test_images_that_are_too_large_to_calibrate_on_are_sent_to_tiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vectors: np.ndarray
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise OutOfMemoryError("cpu has not enough memory; go through large images in windows, with tile")

    monkeypatch.setattr(VAE, "score", fail)
    model = Halves()
    with pytest.raises(
        OutOfMemoryError,
        match=r"^images of 9x13 pixels to calibrate on: cpu .*, with tile: --calibrate-tile \(calibrate_",
    ):
        export_bundle(
            model.encode, model.decode, tmp_path / "a.vae", examples=images_of(40, 8, 8), kind="autoencoder",
            multiple_of=2, calibrate=images_of(100, 9, 13),
        )  # fmt: skip
    with pytest.raises(OutOfMemoryError, match=r"^cpu has not enough memory"):
        export(tmp_path / "a.vae", vectors[:40], calibrate=vectors, likelihood=GAUSSIAN, scores=["log_likelihood"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("calibrate", "message"),
    [
        (images_of(99, 9, 13), "calibrate has 99 examples; expected at least 100"),
        ([images_of(50, 9, 13), images_of(49, 9, 9)], "calibrate has 99 examples; expected at least 100"),
        ([images_of(50, 9, 13), images_of(50, 9, 13)[..., None]], r"calibrate\[1\] has shape \(50, 9, 13, 1\)"),
        ([images_of(100, 9, 13), "x"], r"calibrate\[1\] is a str; expected a numpy array"),
        (
            [torch.zeros(100, 1, 8, 8, dtype=torch.bfloat16)],
            r"calibrate\[0\] is a tensor of shape .* in torch\.bfloat16",
        ),
        ([], "calibrate has 0 examples"),
        (np.full((100, 1, 9, 9), np.nan, np.float32), r"calibrate\[\d+\] has NaN; float32 images lie in"),
    ],
)
def test_images_of_any_size_that_cannot_be_calibrated_on(tmp_path: Path, calibrate: Any, message: str) -> None:
    model = Halves()
    with pytest.raises(InputError, match=message):
        export_bundle(
            model.encode, model.decode, tmp_path / "a.vae", examples=images_of(20, 8, 8), kind="autoencoder",
            multiple_of=2, calibrate=calibrate,
        )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_images_of_one_size_are_calibrated_in_no_other(tmp_path: Path) -> None:
    model = Halves()
    with pytest.raises(InputError, match=r"calibrate has shape \(100, 9, 13\); expected \(N, 8, 8\) uint8"):
        export_bundle(
            model.encode, model.decode, tmp_path / "a.vae", examples=images_of(20, 8, 8), kind="autoencoder",
            calibrate=images_of(100, 9, 13),
        )  # fmt: skip


def test_a_prior_without_real_examples_is_refused(tmp_path: Path) -> None:
    halves = Reference(EncoderGraph(Encoder(), "vae"), DecoderGraph(nn.Linear(UNITS, INPUTS), clamp=False))
    with pytest.raises(
        InputError, match=r"prior 'gaussian' needs real inputs, and there are none; pass some \(--data\)"
    ):
        export_imported(Imported(halves, "a", (INPUTS,)), tmp_path / "a.vae", prior="gaussian")
    assert list(tmp_path.iterdir()) == []


# --- thresholds -------------------------------------------------------------------------------------------------------


def test_thresholds_are_quantiles_of_what_the_device_itself_computes(complete: Path, vectors: np.ndarray) -> None:
    with VAE.load(complete, threads=1) as vae:
        calibration = vae.manifest.calibration
        assert calibration is not None
        assert (calibration.source, calibration.examples, calibration.levels) == ("data", 200, LEVELS)
        assert set(calibration.scores) == set(SCORE_METHODS)
        for method, quantiles in calibration.scores.items():
            scores = vae.score(vectors[200:], method)
            np.testing.assert_allclose(quantiles, np.quantile(scores, LEVELS), rtol=1e-5)
            assert abs(vae.is_anomaly(vectors[200:], 0.9, method).sum() - 20) <= 1
        assert vae.is_anomaly(10 * vectors[:50]).all()


def test_only_the_scores_asked_for_are_calibrated(complete: Path, vectors: np.ndarray, tmp_path: Path) -> None:
    with VAE.load(complete, threads=1) as vae:
        whole = vae.manifest.calibration
    few = {"calibrate": vectors[200:], "likelihood": GAUSSIAN}
    manifest = export(tmp_path / "a.vae", vectors[:200], scores=["reconstruction", "elbo"], **few)
    assert set(manifest.calibration.scores) == {"elbo", "reconstruction"}
    assert manifest.calibration.scores["reconstruction"] == whole.scores["reconstruction"]
    with (
        VAE.load(tmp_path / "a.vae", threads=1) as vae,
        pytest.raises(NotInBundleError, match=r"only by (elbo|reconstruction), (elbo|reconstruction); .* --calibrate"),
    ):
        vae.is_anomaly(vectors[:1], method="log_likelihood")
    for wrong in ([], "elbo", ["elbo", "iwae"]):
        with pytest.raises(InputError, match=r"scores is .*; expected some of elbo, reconstruction, log_likelihood"):
            export(tmp_path / "b.vae", vectors[:200], scores=wrong, **few)
    with pytest.raises(InputError, match=r"scores has 'elbo'; this bundle is calibrated by reconstruction alone"):
        export(tmp_path / "b.vae", vectors[:200], scores=["elbo"], calibrate=vectors[200:])
    with pytest.raises(InputError, match=r"scores is \['elbo'\], and nothing is calibrated; .*--calibrate"):
        export(tmp_path / "b.vae", vectors[:200], scores=["elbo"], likelihood=GAUSSIAN)
    assert not (tmp_path / "b.vae").exists()


def test_levels_rise_from_0_to_1_and_are_finest_at_the_ends() -> None:
    assert LEVELS[0] == 0
    assert LEVELS[-1] == 1
    assert all(np.diff(LEVELS) > 0)
    assert {0.001, 0.01, 0.5, 0.95, 0.99, 0.995, 0.999, 0.9999} <= set(LEVELS)


def test_methods_that_the_bundle_lacks_are_not_calibrated(vectors: np.ndarray, tmp_path: Path) -> None:
    manifest = export(tmp_path / "a.vae", vectors[:40], calibrate=vectors[:100])  # no likelihood
    assert list(manifest.calibration.scores) == ["reconstruction"]
    images = np.random.default_rng(0).random((100, 1, 8, 8), np.float32)

    class Any_(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mean, self.logvar = nn.Conv2d(1, 2, 2, 2), nn.Conv2d(1, 2, 2, 2)

        def forward(self, x: torch.Tensor) -> Any:
            return self.mean(x), self.logvar(x)

    decoder = nn.Sequential(nn.ConvTranspose2d(2, 1, 2, 2), nn.Sigmoid())
    manifest = export_bundle(
        Any_(), decoder, tmp_path / "b.vae", examples=images[:4], multiple_of=2, likelihood=GAUSSIAN, calibrate=images
    )
    assert list(manifest.calibration.scores) == ["reconstruction"]  # scores in nats grow with the size
    assert manifest.calibration.levels == LEVELS


def test_a_checkpoint_is_calibrated_on_its_own_held_out_examples(checkpoints: Any, tmp_path: Path) -> None:
    few = checkpoints["mlp-vector"]
    with pytest.raises(
        InputError, match=r"held_out has 40 examples; expected at least 100: fewer say too little .*--calibrate DATA"
    ):
        export_checkpoint(few, tmp_path / "a.vae", name="a", calibrate="held-out")
    assert list(tmp_path.iterdir()) == []
    held_out = few.examples["held_out"].repeat(3, 1)
    enough = dataclasses.replace(few, examples={**few.examples, "held_out": held_out})
    calibration = export_checkpoint(enough, tmp_path / "a.vae", name="a", calibrate="held-out").calibration
    assert calibration is not None
    assert (calibration.source, calibration.examples) == ("held-out", 120)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[:99], "calibrate has 99 examples; expected at least 100: fewer say too little of the tail"),
        (lambda x: x[:, :5], r"calibrate has shape \(400, 5\)"),
        (lambda x: x.astype(np.float64), "calibrate has .*float64"),
        (lambda x: np.where(x > 1, np.nan, x), r"calibrate\[\d+\] has NaN"),
        (lambda x: x[:0], "calibrate has"),
        (lambda x: "held-out", "calibrate is 'held-out', and only a model.pt has held-out examples"),
        (lambda x: "elsewhere", "calibrate is 'elsewhere', and only a model.pt"),
    ],
)
def test_what_cannot_be_calibrated_on_is_refused_before_anything_is_written(
    vectors: np.ndarray, tmp_path: Path, change: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        export(tmp_path / "a.vae", vectors[:40], calibrate=change(vectors))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_examples_on_which_the_model_overflows_are_named(vectors: np.ndarray, tmp_path: Path) -> None:
    far = vectors[:150].copy()
    far[5] = 3.4e38 * np.sign(Encoder().mean.weight[0].detach().numpy())
    with pytest.raises(InputError, match="calibrate: the score 'elbo' of example 5 is inf: the model overflows there"):
        export(tmp_path / "a.vae", vectors[:40], calibrate=far, likelihood=GAUSSIAN)
    far[5], far[70] = vectors[5], 3e38
    overflowing = SimpleNamespace(
        encode=lambda x, **options: SimpleNamespace(mean=np.where(x > 1e38, -np.inf, x)),
        manifest=SimpleNamespace(input=InputSpec("vector", far.shape[1:])),
    )
    with pytest.raises(InputError, match="the mean's largest value of example 70 is inf: the model overflows there"):
        active_units(overflowing, far)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_on_the_disk_where_a_score_fails(
    vectors: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise InputError("no")

    monkeypatch.setattr(VAE, "score", fail)
    with pytest.raises(InputError, match="no"):
        export(tmp_path / "a.vae", vectors[:40], calibrate=vectors)
    assert list(tmp_path.iterdir()) == []
