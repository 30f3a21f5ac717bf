"""Priors that were fitted after training: the numbers, the file, and samples drawn from them."""

from __future__ import annotations

import io
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vae_runtime import VAE, BundleError, InputError, KindError, NotInBundleError, sampling
from vae_runtime.prior import GaussianMixture, LatentStream
from vae_runtime.sampling import NormalStream, TruncatedStream

from .test_bundle import damages

CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def make_mixture(components: int, dimensions: int, seed: int = 0) -> GaussianMixture:
    rng = np.random.default_rng(seed)
    factors = np.tril(rng.normal(0, 0.5, (components, dimensions, dimensions)), -1)
    factors += np.eye(dimensions) * rng.uniform(0.3, 1.5, (components, dimensions, 1))
    weights = rng.uniform(0.5, 2, components)
    return GaussianMixture(weights / weights.sum(), rng.normal(0, 2, (components, dimensions)), factors)


THREE = make_mixture(3, 4)


def moments(mixture: GaussianMixture, scale: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance, with the noise scaled, by their definitions."""
    mean = mixture.weights @ mixture.means
    covariance = np.zeros((len(mean), len(mean)))
    for weight, centre, factor in zip(*mixture, strict=True):
        covariance += weight * (scale**2 * factor @ factor.T + np.outer(centre - mean, centre - mean))
    return mean, covariance


@pytest.fixture
def fitted(bundle: Path, give_prior: Any) -> Path:
    """The tiny bundle with a mixture of three Gaussians."""
    return Path(give_prior(bundle, THREE))


@pytest.fixture
def fitted_autoencoder(vectors_path: Path, tmp_path: Path, give_prior: Any) -> Path:
    """The plain autoencoder with a single Gaussian."""
    return Path(give_prior(Path(shutil.copytree(vectors_path, tmp_path / "ae.vae")), make_mixture(1, 2)))


# --- draws ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_draws_have_the_mixtures_moments(temperature: float) -> None:
    count = 200_000
    draws = LatentStream(0, temperature, None, THREE).draw(count, (4,)).astype(np.float64)
    mean, covariance = moments(THREE, temperature)
    deviation = np.sqrt(np.diag(covariance))
    assert (np.abs(draws.mean(axis=0) - mean) < 5 * deviation / np.sqrt(count)).all()
    assert np.abs(np.cov(draws.T) - covariance).max() < 0.02 * np.diag(covariance).max()


def test_components_have_their_weights_and_no_noise_leaves_their_means() -> None:
    draws = LatentStream(1, 0, None, THREE).draw(50_000, (4,))
    component = np.abs(draws[:, None] - THREE.means).sum(axis=2).argmin(axis=1)
    assert np.array_equal(draws, THREE.means[component].astype(np.float32))
    assert np.abs(np.bincount(component) / 50_000 - THREE.weights).max() < 0.01


def test_the_noise_of_a_fitted_prior_is_the_seeds() -> None:
    single = GaussianMixture(np.ones(1), np.ones((1, 4)), 2 * np.eye(4)[None])
    assert np.array_equal(LatentStream(5, 1, None, single).draw(9, (4,)), 1 + 2 * NormalStream(5).draw(9, (4,)))


@pytest.mark.parametrize("mixture", [None, THREE])
@pytest.mark.parametrize("truncation", [None, 0.7])
@pytest.mark.parametrize("sizes", [(1,) * 10, (3, 3, 4), (9, 1)])
def test_chunks_of_latents_join_without_a_seam(
    mixture: GaussianMixture | None, truncation: float | None, sizes: tuple[int, ...]
) -> None:
    stream, whole = (LatentStream(8, 1.5, truncation, mixture) for _ in range(2))
    found = np.concatenate([stream.draw(size, (2, 2)) for size in sizes])
    np.testing.assert_allclose(found, whole.draw(10, (2, 2)), **CLOSE)
    np.testing.assert_allclose(LatentStream(8, 1.5, truncation, mixture).draw(99, (2, 2))[:10], found, **CLOSE)


PINNED_COMPONENTS = [1, 0, 1, 0, 0, 0, 1, 1, 0, 0, 1, 0, 1, 1, 1, 1]
PINNED_TRUNCATED = [
    "-0x1.fc5f920000000p-3",
    "-0x1.b68d000000000p-6",
    "-0x1.5b38ec0000000p-2",
    "0x1.94cd9a0000000p-2",
    "-0x1.28e3780000000p-3",
    "-0x1.48f9e80000000p-4",
]


# What a seed means may never change; the noise itself is pinned in test_sampling.
def test_components_and_truncated_draws_are_those_of_the_pinned_test_vector() -> None:
    halves = GaussianMixture(np.full(2, 0.5), np.array([[0.0], [1.0]]), np.ones((2, 1, 1)))
    assert LatentStream(0, 0, None, halves).draw(16, (1,)).ravel().astype(int).tolist() == PINNED_COMPONENTS
    assert [float(value).hex() for value in LatentStream(0, 1, 0.5, None).draw(2, (3,)).ravel()] == PINNED_TRUNCATED


def test_truncated_draws_keep_what_is_within_and_are_normal_there() -> None:
    stats = pytest.importorskip("scipy.stats")
    stream, plain = TruncatedStream(np.random.SeedSequence(3), 0.8), NormalStream(3).draw(50_000, ())
    draws = stream.draw(50_000, ())
    within = np.abs(plain) <= np.float32(0.8)
    assert 0.5 < within.mean() < 0.6
    assert np.array_equal(draws[within], plain[within])
    assert np.abs(draws).max() <= np.float32(0.8)
    assert (np.abs(draws) == np.float32(0.8)).sum() == 0  # drawn again, not clipped
    for part in (draws, draws[~within]):
        assert stats.kstest(part, stats.truncnorm(-0.8, 0.8).cdf).pvalue > 0.01


@pytest.mark.parametrize("truncation", [0.1, 1, 3, 100])
def test_every_truncation_ends(truncation: float) -> None:
    draws = TruncatedStream(np.random.SeedSequence(0), truncation).draw(1000, (3,))
    assert np.abs(draws).max() < np.float32(truncation)


def test_what_all_rounds_leave_outside_is_set_to_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "_LEFT_OVER", 0.5)  # a single round
    draws, plain = TruncatedStream(np.random.SeedSequence(0), 1).draw(100, ()), NormalStream(0).draw(100, ())
    assert np.array_equal(draws, plain.clip(-1, 1))


# --- sampling with a bundle -------------------------------------------------------------------------------------------


def test_sample_decodes_draws_of_the_prior_that_was_asked_for(fitted: Path) -> None:
    with VAE.load(fitted, threads=1) as vae:
        for arguments in ({"temperature": 0.5}, {"truncation": 0.6}, {"temperature": 2.0, "truncation": 1.0}):
            stream = LatentStream(4, arguments.get("temperature", 1.0), arguments.get("truncation"), THREE)
            expected = vae.decode(stream.draw(7, (4,)))
            assert np.array_equal(vae.sample(7, 4, prior="fitted", **arguments), expected)
            pieces = list(vae.sample_batches(7, 4, prior="fitted", batch_size=3, **arguments))
            assert [len(piece) for piece in pieces] == [3, 3, 1]
            np.testing.assert_allclose(np.concatenate(pieces), expected, **CLOSE)
        standard = vae.decode(NormalStream(4).draw(7, (4,)))
        assert np.array_equal(vae.sample(7, seed=4), standard)
        assert np.array_equal(vae.sample(7, seed=4, prior="standard"), standard)
        assert not np.allclose(vae.sample(7, seed=4, prior="fitted"), standard, atol=0.01)


def test_spatial_latents_have_a_prior_over_their_elements(rgb_path: Path, tmp_path: Path, give_prior: Any) -> None:
    mixture = make_mixture(2, 12)
    path = give_prior(Path(shutil.copytree(rgb_path, tmp_path / "rgb.vae")), mixture)
    with VAE.load(path) as vae:
        expected = vae.decode(LatentStream(1, 1, None, mixture).draw(5, (2, 3, 2)))
        assert np.array_equal(vae.sample(5, seed=1, prior="fitted"), expected)


def test_an_autoencoder_with_a_fitted_prior_samples_from_it(fitted_autoencoder: Path) -> None:
    with VAE.load(fitted_autoencoder) as vae:
        assert np.array_equal(vae.sample(6, seed=2), vae.sample(6, seed=2, prior="fitted"))
        assert vae.sample(6, seed=2).shape == (6, 5)
        with pytest.raises(
            KindError, match=r"a plain autoencoder, which has no prior to sample .*; take prior='fitted'"
        ):
            vae.sample(1, prior="standard")


def test_a_prior_that_is_not_there_is_named_with_its_cure(tiny: VAE, vectors: VAE, free_path: Path) -> None:
    cure = "make the bundle with: vae-export SOURCE --prior gaussian$"
    for vae in (tiny, vectors):
        with pytest.raises(NotInBundleError, match=f"{vae.manifest.name} has no fitted prior; .*{cure}"):
            vae.sample(1, prior="fitted")
    for prior in (None, "standard"):
        with pytest.raises(KindError, match=f"has no prior to sample from; .*{cure}"):
            vectors.sample(1, prior=prior)
    with VAE.load(free_path) as vae, pytest.raises(NotInBundleError, match="none can be fitted where height and width"):
        vae.sample(1, prior="fitted")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("prior", ["standard", "fitted"])
def test_latents_beyond_float32_are_refused(fitted: Path, prior: str) -> None:
    expected = r"latents drawn at temperature 3e\+38 are beyond float32; take a lower one"
    with VAE.load(fitted, threads=1) as vae, pytest.raises(InputError, match=expected):
        vae.sample(8, seed=0, temperature=3e38, prior=prior)


@pytest.mark.parametrize("prior", ["normal", "", 1, True, ["fitted"], np.zeros(2)])
def test_another_prior_is_refused(tiny: VAE, prior: Any) -> None:
    with pytest.raises(InputError, match=r"prior is .*; expected 'standard', 'fitted' or None"):
        tiny.sample(1, prior=prior)


@pytest.mark.parametrize("truncation", [0, 0.09, -1, float("nan"), float("inf"), True, "1", 1e39, [1.0]])
def test_wrong_truncations_are_refused(tiny: VAE, truncation: Any) -> None:
    with pytest.raises(InputError, match=r"truncation is .*; expected a finite number from 0.1, or None"):
        tiny.sample(1, truncation=truncation)


@pytest.mark.parametrize("truncation", [0.1, np.float32(0.5), np.int64(2), 1])
def test_good_truncations_are_taken(tiny: VAE, truncation: Any) -> None:
    assert tiny.sample(1, truncation=truncation).shape == (1, 1, 8, 8)


# --- the file ---------------------------------------------------------------------------------------------------------


def test_what_was_written_is_read(tmp_path: Path) -> None:
    found = GaussianMixture.from_npz(THREE.to_npz(), 3, 4)
    for array, expected in zip(found, THREE, strict=True):
        assert np.array_equal(array, expected)
    assert THREE.to_npz() == THREE.to_npz()


def npz(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def zeros_in_zip(name: str, size: int) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, bytes(size))
    return buffer.getvalue()


def changed(**change: Callable[[np.ndarray], Any]) -> bytes:
    arrays = {name: array.copy() for name, array in THREE._asdict().items()}
    for name, edit in change.items():
        found = edit(arrays[name])
        arrays[name] = arrays[name] if found is None else found
    return npz(**arrays)


DAMAGES = {
    "text": (b"a shopping list", "no .npz archive"),
    "truncated": (THREE.to_npz()[:-100], "no .npz archive"),
    "pickle": (npz(**{**THREE._asdict(), "means": np.array([{}], object)}), "no .npz archive"),
    "an array missing": (npz(weights=THREE.weights, means=THREE.means), "holds .*; expected float64 arrays"),
    "an array too many": (npz(**THREE._asdict(), more=np.zeros(1)), r"holds \['factors', 'means', 'more', "),
    "much of nothing": (zeros_in_zip("means.npy", 2**24), "has 16777216 bytes of means; expected 96 at most"),
    "float32": (changed(means=lambda a: a.astype(np.float32)), "holds .*float32.*; expected float64 arrays"),
    "components": (changed(weights=lambda a: a[:2]), "holds .*; expected float64 arrays"),
    "dimensions": (changed(means=lambda a: a[:, :3]), "holds .*; expected float64 arrays"),
    "NaN": (changed(means=lambda a: a.__setitem__((1, 2), np.nan)), "is no density"),
    "infinity": (changed(factors=lambda a: a.__setitem__((0, 3, 0), np.inf)), "is no density"),
    "a weight of 0": (changed(weights=lambda a: np.array([0.0, 0.5, 0.5])), "is no density"),
    "weights of 2": (changed(weights=lambda a: 2 * a), "is no density"),
    "upper triangle": (changed(factors=lambda a: a.__setitem__((0, 0, 1), 0.1)), "is no density"),
    "a diagonal of 0": (changed(factors=lambda a: a.__setitem__((2, 1, 1), 0.0)), "is no density"),
}


@pytest.mark.parametrize(("data", "message"), DAMAGES.values(), ids=DAMAGES)
def test_what_is_no_density_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(BundleError, match=f"^prior.npz {message.replace('no .npz', 'is not an .npz')}"):
        GaussianMixture.from_npz(data, 3, 4, "prior.npz")


def test_no_damage_to_the_prior_in_a_bundle_is_accepted(fitted: Path) -> None:
    content = (fitted / "prior.npz").read_bytes()
    with VAE.load(fitted) as vae:
        for damaged in damages(content, random.Random(0), 200):
            (fitted / "prior.npz").write_bytes(damaged)
            with pytest.raises(BundleError, match=r"prior\.npz (was altered|has \d+ bytes)"):
                vae.sample(1, prior="fitted")
            assert vae.sample(1, prior="standard").shape == (1, 1, 8, 8)
        with pytest.raises(BundleError, match=r"prior\.npz (was altered|has \d+ bytes)"):
            VAE.load(fitted)
        (fitted / "prior.npz").write_bytes(content)
        assert vae.sample(1, prior="fitted").shape == (1, 1, 8, 8)
        (fitted / "prior.npz").unlink()
        assert vae.sample(1, prior="fitted").shape == (1, 1, 8, 8)  # it was read once


def test_a_prior_of_other_dimensions_than_the_latent_is_refused(bundle: Path, give_prior: Any) -> None:
    with (
        VAE.load(give_prior(bundle, make_mixture(2, 5))) as vae,
        pytest.raises(BundleError, match=r"copy\.vae/prior\.npz holds .*\(2, 5\).*; expected .*\(2, 4\)"),
    ):
        vae.sample(1, prior="fitted")
