"""ELBO and importance-weighted log p(x), against a model whose likelihood is known and against float64 by hand."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vae_runtime import VAE, ClosedError, InputError, KindError, NotInBundleError, Posterior, Reconstruction
from vae_runtime.evidence import LogMeanExp
from vae_runtime.manifest import Golden, InputSpec, LatentSpec, Likelihood, Manifest, Precision
from vae_runtime.sampling import NormalStream

TINY_P = float(np.finfo(np.float32).tiny)
TYPES = [
    {"type": "bernoulli", "binarize": "none"},
    {"type": "bernoulli", "binarize": "threshold"},
    {"type": "gaussian", "scale": 0.3},
    {"type": "laplace", "scale": 0.2},
]


# --- known answer: probabilistic PCA ----------------------------------------------------------------------------------


class Linear:
    """z ~ N(0, I), x|z ~ N(Wz + b, σ²I), so that x ~ N(b, WWᵀ + σ²I) (Tipping and Bishop, 1999).

    The columns of W are orthogonal, so that the true posterior has a diagonal covariance. The encoder gives it, or
    where it is not `exact` one with a mean that is off and a spread that is too wide.
    """

    SIZE, LATENT, SIGMA = 7, 3, 0.5

    def __init__(self, exact: bool) -> None:
        rng = np.random.default_rng(11)
        orthogonal = np.linalg.qr(rng.normal(size=(self.SIZE, self.LATENT)))[0]
        lengths = np.array([2.0, 1.0, 0.4])
        self.weight, self.bias = orthogonal * lengths, rng.normal(3, 1, self.SIZE)
        variance = 1 / (1 + lengths**2 / self.SIGMA**2)
        gain = variance[:, None] * self.weight.T / self.SIGMA**2
        self.gain = gain if exact else 0.9 * gain
        self.shift = -self.gain @ self.bias + (0 if exact else 0.1)
        self.logvar = np.log(variance) + (0 if exact else 0.4)

    def draw(self, count: int) -> np.ndarray:
        rng = np.random.default_rng(12)
        z = rng.normal(size=(count, self.LATENT))
        return (z @ self.weight.T + self.bias + rng.normal(0, self.SIGMA, (count, self.SIZE))).astype(np.float32)

    def log_marginal(self, x: np.ndarray) -> np.ndarray:
        covariance = self.weight @ self.weight.T + self.SIGMA**2 * np.eye(self.SIZE)
        centred = x.astype(np.float64) - self.bias
        squares = (centred * np.linalg.solve(covariance, centred.T).T).sum(axis=1)
        return -0.5 * (squares + np.linalg.slogdet(2 * np.pi * covariance)[1])

    def elbo(self, x: np.ndarray) -> np.ndarray:
        """In closed form: log p(x) minus the divergence of the encoder's posterior from the true one."""
        true = Linear(exact=True)
        mean, true_mean = (x.astype(np.float64) @ m.gain.T + m.shift for m in (self, true))
        ratio = np.exp(self.logvar - true.logvar)
        terms = ratio + (mean - true_mean) ** 2 / np.exp(true.logvar) - 1 - np.log(ratio)
        return self.log_marginal(x) - 0.5 * terms.sum(axis=1)

    def write(self, path: Path) -> Path:
        onnx = pytest.importorskip("onnx")
        write_bundle = pytest.importorskip("vae_export.bundle").write_bundle

        def gemm(source: str, name: str, weight: np.ndarray, bias: np.ndarray) -> tuple[Any, list[Any]]:
            arrays = {f"{name}.weight": weight.T, f"{name}.bias": bias}
            constants = [onnx.numpy_helper.from_array(a.astype(np.float32), n) for n, a in arrays.items()]
            return onnx.helper.make_node("Gemm", [source, *arrays], [name]), constants

        def graph(source: tuple[str, int], results: dict[str, int], parts: list[tuple[Any, list[Any]]]) -> bytes:
            values = [
                [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["batch", size]) for n, size in side]
                for side in ([source], results.items())
            ]
            made = onnx.helper.make_graph(
                [node for node, _ in parts], "linear", *values, [c for _, cs in parts for c in cs]
            )
            opset = [onnx.helper.make_opsetid("", 20)]
            return bytes(onnx.helper.make_model(made, opset_imports=opset, ir_version=10).SerializeToString())

        none = np.zeros((self.LATENT, self.SIZE))
        graphs = {
            "encoder.onnx": graph(
                ("x", self.SIZE),
                {"mean": self.LATENT, "logvar": self.LATENT},
                [gemm("x", "mean", self.gain, self.shift), gemm("x", "logvar", none, self.logvar)],
            ),
            "decoder.onnx": graph(
                ("z", self.LATENT),
                {"reconstruction": self.SIZE},
                [gemm("z", "reconstruction", self.weight, self.bias)],
            ),
        }
        x = self.draw(4)
        mean = x.astype(np.float64) @ self.gain.T + self.shift
        golden = {"x": x, "mean": mean, "logvar": np.tile(self.logvar, (4, 1))}
        golden["reconstruction"] = mean @ self.weight.T + self.bias
        manifest = Manifest(
            kind="vae",
            name="linear",
            input=InputSpec("vector", (self.SIZE,)),
            latent=LatentSpec((self.LATENT,), {"type": "standard_normal"}),
            likelihood=Likelihood("gaussian", scale=self.SIGMA),
            precisions={"fp32": Precision("encoder.onnx", "decoder.onnx", {"against": "numpy"})},
            files={},
            golden=Golden("golden.npz", "synthetic", {"fp32": 1e-4}),
        )
        write_bundle(path, manifest, graphs, {k: v.astype(np.float32) for k, v in golden.items()}, force=False)
        return path


@pytest.fixture
def off(tmp_path: Path) -> tuple[VAE, Linear, np.ndarray]:
    model = Linear(exact=False)
    return VAE.load(model.write(tmp_path / "off.vae"), threads=1), model, model.draw(200)


@pytest.mark.filterwarnings("error")
def test_vectors_far_out_are_scored_or_refused_and_never_nan(off: tuple[VAE, Linear, np.ndarray]) -> None:
    vae, model, _ = off
    far = np.full((2, model.SIZE), 1e20, np.float32)
    found = vae.score(far, "elbo")
    assert np.isfinite(found).all()  # beyond float32
    np.testing.assert_allclose(found, vae.score(far, "elbo", batch_size=1), rtol=1e-9)
    np.testing.assert_allclose(found[:1], vae.score(far[:1], "elbo"), rtol=1e-9)
    gain = model.gain[1:2] - model.gain[2:3]  # two elements of the mean overflow, to both sides
    beyond = np.tile(np.sign(gain) * 3.4e38, (2, 1)).astype(np.float32)
    assert np.isposinf(vae.score(beyond, "elbo")).all()
    with np.errstate(invalid="ignore"):
        assert np.isnan(vae.encode(beyond).mean @ model.weight.T).any()
    maps = vae.score_map(beyond)
    assert np.isposinf(maps).any()
    assert not np.isnan(maps).any()
    beyond[0] = 0
    with pytest.raises(InputError, match=r"^inputs\[1\] is so far from .* that its reconstruction has NaN or infinite"):
        vae.reconstruct(beyond, n_samples=3, seed=0)


def test_an_application_that_raises_on_underflow_gets_the_same_estimate(free_path: Path) -> None:
    x = np.random.default_rng(0).random((1, 3, 16, 16), dtype=np.float32)
    with VAE.load(free_path, threads=1) as vae:
        expected = vae.log_likelihood(x, 20, 0), vae.score(x, "log_likelihood")
        with np.errstate(all="raise"):
            found = vae.log_likelihood(x, 20, 0), vae.score(x, "log_likelihood")
    np.testing.assert_array_equal(found, expected)


@pytest.mark.filterwarnings("error")
def test_overflow_is_no_warning(off: tuple[VAE, Linear, np.ndarray]) -> None:
    vae, model, _ = off
    beyond = np.full((1, model.SIZE), 3.4e38, np.float32)
    assert not np.isfinite(vae.log_likelihood(beyond, 3, 0)).any()
    assert not np.isfinite(vae.elbo(beyond, 3, 0)).any()


def test_with_the_true_posterior_one_draw_is_the_truth(tmp_path: Path) -> None:
    model = Linear(exact=True)
    x = model.draw(200)
    with VAE.load(model.write(tmp_path / "exact.vae"), threads=1) as vae:
        for count, seed in ((1, 0), (1, 1), (7, 2)):
            np.testing.assert_allclose(vae.log_likelihood(x, count, seed), model.log_marginal(x), rtol=1e-5, atol=2e-5)


def test_estimate_converges_to_the_marginal_likelihood_from_below(off: tuple[VAE, Linear, np.ndarray]) -> None:
    vae, model, x = off
    truth = model.log_marginal(x)
    gaps = [float((truth - vae.log_likelihood(x, count, seed=count)).mean()) for count in (1, 10, 100, 1000)]
    assert gaps[0] > 3 * gaps[1] > 9 * gaps[2] > 9 * gaps[3] > -0.02
    assert abs(gaps[-1]) < 0.003
    found = vae.log_likelihood(x[:50], 20_000, seed=0)
    assert np.abs(found - truth[:50]).max() < 0.05


def test_estimate_is_a_lower_bound_on_average(off: tuple[VAE, Linear, np.ndarray]) -> None:
    """Of each example: its mean over seeds is below the truth, but for three standard errors."""
    vae, model, x = off
    truth = model.log_marginal(x[:20])
    found = np.stack([vae.log_likelihood(x[:20], 3, seed) for seed in range(400)])
    error = found.std(axis=0) / math.sqrt(len(found))
    assert (found.mean(axis=0) < truth + 3 * error).all()
    assert (found.max(axis=0) > truth).any()  # a single one may well be above


def test_elbo_is_that_in_closed_form_and_one_weight_has_it_as_mean(off: tuple[VAE, Linear, np.ndarray]) -> None:
    vae, model, x = off
    expected = model.elbo(x)
    assert (expected < model.log_marginal(x) - 0.05).all()
    found = vae.elbo(x, 20_000, seed=0)
    np.testing.assert_allclose(found, expected, atol=0.15)
    assert found.mean() == pytest.approx(expected.mean(), abs=0.005)
    single = np.mean([vae.log_likelihood(x, 1, seed) for seed in range(50)])
    assert single == pytest.approx(expected.mean(), abs=0.05)


# --- the same noise, by hand in float64 -------------------------------------------------------------------------------


class ByHand:
    """A tiny bundle's networks and both estimates in plain numpy, float64, all draws at once."""

    def __init__(self, path: Path, vae: VAE) -> None:
        onnx = pytest.importorskip("onnx")
        self._weights = {
            tensor.name: onnx.numpy_helper.to_array(tensor).astype(np.float64)
            for half in ("encoder", "decoder")
            for tensor in onnx.load(path / f"{half}.onnx").graph.initializer
        }
        self._likelihood, self._latent = vae.manifest.likelihood, vae.manifest.latent.shape

    def _affine(self, name: str, values: np.ndarray) -> np.ndarray:
        return values @ self._weights[f"{name}.weight"] + self._weights[f"{name}.bias"]

    def encode(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        hidden = np.maximum(self._affine("hidden", x.reshape(len(x), -1).astype(np.float64)), 0)
        return self._affine("mean", hidden), np.clip(self._affine("logvar", hidden), -30, 20)

    def decode(self, z: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-self._affine("out", np.maximum(self._affine("back", z), 0))))

    def log_p(self, x: np.ndarray, z: np.ndarray) -> np.ndarray:
        """log p(x|z): x (N, D), z (N, S, L) -> (N, S)."""
        mean, x = self.decode(z), x.reshape(len(x), 1, -1).astype(np.float64)
        likelihood = self._likelihood
        assert likelihood is not None
        if likelihood.type == "bernoulli":
            x = (x >= 0.5) if likelihood.binarize == "threshold" else x
            p = np.clip(mean, TINY_P, 1 - 2.0**-24)
            return (x * np.log(p) + (1 - x) * np.log1p(-p)).sum(axis=2)
        assert likelihood.scale is not None
        if likelihood.type == "laplace":
            return -(np.abs(x - mean) / likelihood.scale + math.log(2 * likelihood.scale)).sum(axis=2)
        variance = likelihood.scale**2
        return -0.5 * ((x - mean) ** 2 / variance + math.log(2 * math.pi * variance)).sum(axis=2)

    def draws(self, x: np.ndarray, count: int, seed: int) -> tuple[np.ndarray, ...]:
        mean, logvar = self.encode(x)
        noise = NormalStream(seed).draw(len(x) * count, self._latent).reshape(len(x), count, -1).astype(np.float64)
        return mean, logvar, mean[:, None] + np.exp(0.5 * logvar)[:, None] * noise

    def elbo(self, x: np.ndarray, count: int, seed: int) -> np.ndarray:
        mean, logvar, z = self.draws(x, count, seed)
        return self.log_p(x, z).mean(axis=1) - 0.5 * (np.exp(logvar) + mean**2 - 1 - logvar).sum(axis=1)

    def log_likelihood(self, x: np.ndarray, count: int, seed: int) -> np.ndarray:
        mean, logvar, z = self.draws(x, count, seed)
        log_q = -0.5 * ((z - mean[:, None]) ** 2 / np.exp(logvar)[:, None] + (logvar + math.log(2 * math.pi))[:, None])
        log_prior = -0.5 * (z**2 + math.log(2 * math.pi))
        weights = self.log_p(x, z) + log_prior.sum(axis=2) - log_q.sum(axis=2)
        peak = weights.max(axis=1, keepdims=True)
        return peak[:, 0] + np.log(np.exp(weights - peak).mean(axis=1))


@pytest.fixture(params=TYPES, ids=lambda one: f"{one['type']}-{one.get('binarize', '')}".rstrip("-"))
def case(
    request: pytest.FixtureRequest, bundle: Path, resign: Callable[..., Path], images: np.ndarray
) -> tuple[VAE, ByHand, np.ndarray]:
    """A tiny VAE with each likelihood, by hand, and inputs."""
    vae = VAE.load(resign(bundle, lambda data: data.update(likelihood=request.param)), threads=1)
    return vae, ByHand(bundle, vae), images


@pytest.mark.parametrize("count", [1, 2, 300, 600])
def test_estimates_are_those_by_hand_with_the_same_noise(case: tuple[VAE, ByHand, np.ndarray], count: int) -> None:
    vae, reference, x = case
    for name in ("elbo", "log_likelihood"):
        found = getattr(vae, name)(x, count, seed=6)
        assert found.dtype == np.float64
        assert found.shape == (20,)
        np.testing.assert_allclose(found, getattr(reference, name)(x, count, 6), rtol=3e-6)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 64, 1000])
def test_blocks_do_not_change_the_result(case: tuple[VAE, ByHand, np.ndarray], batch_size: int) -> None:
    vae, _, x = case
    for name in ("elbo", "log_likelihood"):
        for count in (1, 5, 300 if batch_size >= 64 else 40):  # more than a block, and not a multiple of one
            whole, parts = (getattr(vae, name)(x, count, 2, batch_size=size) for size in (None, batch_size))
            np.testing.assert_allclose(parts, whole, rtol=1e-6)


def test_the_first_examples_do_not_depend_on_those_that_follow(tiny: VAE, images: np.ndarray) -> None:
    for name in ("elbo", "log_likelihood"):
        whole = getattr(tiny, name)(images, 30, 4)
        np.testing.assert_allclose(getattr(tiny, name)(images[:3], 30, 4), whole[:3], rtol=1e-6)


def test_elbo_of_one_draw_is_of_the_draw_that_the_posterior_gives(tiny: VAE, images: np.ndarray) -> None:
    posterior = tiny.encode(images)
    p = np.clip(tiny.decode(posterior.sample(seed=9)).astype(np.float64), TINY_P, 1 - 2.0**-24)
    logs = images * np.log(p) + (1 - images) * np.log1p(-p)
    np.testing.assert_allclose(tiny.elbo(images, seed=9), logs.sum(axis=(1, 2, 3)) - posterior.kl(), rtol=1e-6)


def test_seeds_differ_none_is_fresh_and_the_same_is_bit_equal(tiny: VAE, images: np.ndarray) -> None:
    for name in ("elbo", "log_likelihood"):
        call = getattr(tiny, name)
        assert np.array_equal(call(images, 20, 1), call(images, 20, 1))
        assert not np.array_equal(call(images, 20, 1), call(images, 20, 2))
        assert not np.array_equal(call(images, 20), call(images, 20))


def test_uint8_and_float32_of_the_same_picture_agree(tiny: VAE) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 8), np.uint8)
    floats = (pixels / 255).astype(np.float32)[:, None]
    assert np.array_equal(tiny.log_likelihood(pixels, 20, 0), tiny.log_likelihood(floats, 20, 0))
    assert np.array_equal(tiny.elbo(pixels, 20, 0), tiny.elbo(floats, 20, 0))


def test_exactly_so_many_draws_are_decoded(tiny: VAE, images: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = tiny._open_operations()[1]
    real, rows = decoder.run, []

    def run(checked: np.ndarray, size: int, examples: int | None = None) -> Any:
        rows.append(len(checked))
        return real(checked, size, examples)

    monkeypatch.setattr(decoder, "run", run)
    for count, batch_size in ((1, None), (777, None), (777, 100), (5, 13)):
        rows.clear()
        tiny.log_likelihood(images, count, 0, batch_size=batch_size)
        assert sum(rows) == 20 * count
        assert max(rows) <= (batch_size or 256)


def test_progress_counts_draws_up_to_the_last(tiny: VAE, images: np.ndarray) -> None:
    seen: list[tuple[int, int]] = []
    with pytest.raises(InputError, match=r"progress is 5; expected a function, progress\(done, total\), or None"):
        tiny.log_likelihood(images, 300, 0, progress=5)  # type: ignore[arg-type]
    tiny.log_likelihood(images, 300, 0, batch_size=100, progress=lambda done, total: seen.append((done, total)))
    assert {total for _, total in seen} == {6000}
    assert [done for done, _ in seen] == list(range(100, 6001, 100))


def test_free_sizes_with_spatial_latents_go_through(free_path: Path) -> None:
    rng = np.random.default_rng(0)
    with VAE.load(free_path, threads=1) as vae:
        for height, width in ((6, 8), (12, 10)):
            x = rng.random((3, 3, height, width), dtype=np.float32)
            posterior = vae.encode(x)
            noise = (
                NormalStream(2).draw(3 * 40, (2, height // 2, width // 2)).reshape(3, 40, 2, height // 2, width // 2)
            )
            mean, logvar = (a[:, None].astype(np.float64) for a in posterior.__dict__.values())
            z = mean + np.exp(0.5 * logvar) * noise
            decoded = vae.decode(z.reshape(120, *z.shape[2:]).astype(np.float32)).reshape(3, 40, 3, height, width)
            axes = (2, 3, 4)
            weights = -0.5 * ((decoded.astype(np.float64) - x[:, None]) ** 2 / 0.01 + math.log(2 * math.pi * 0.01)).sum(
                axes
            )
            elbo = weights.mean(axis=1) - posterior.kl()
            weights += 0.5 * (noise.astype(np.float64) ** 2 + logvar - z**2).sum(axes)
            peak = weights.max(axis=1)
            expected = peak + np.log(np.exp(weights - peak[:, None]).mean(axis=1))
            np.testing.assert_allclose(vae.log_likelihood(x, 40, 2), expected, rtol=2e-6)
            np.testing.assert_allclose(vae.log_likelihood(x, 40, 2, batch_size=7), expected, rtol=2e-6)
            np.testing.assert_allclose(vae.elbo(x, 40, 2), elbo, rtol=2e-6)


def test_memory_does_not_grow_with_examples_or_draws(rgb: VAE) -> None:
    """numpy tells tracemalloc of its arrays. All draws at once would be 200 · 400 · 90 numbers, 29 MB."""

    def peak(call: Callable[[], Any]) -> int:
        call()
        tracemalloc.start()
        call()
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    x = np.random.default_rng(0).random((200, 3, 6, 5), dtype=np.float32)
    for call in (
        lambda: rgb.log_likelihood(x, 400, 0),
        lambda: rgb.elbo(x, 400, 0),
        lambda: rgb.reconstruct(x, n_samples=400, seed=0),
    ):
        assert peak(call) < 3e6


def test_log_mean_exp_of_parts_is_that_of_the_whole_far_from_zero_and_from_other_rows() -> None:
    weights = np.random.default_rng(0).normal([[-1e6], [-2e6]], 300, (2, 100))
    average = LogMeanExp(3)
    average.add(slice(0, 2), weights[:, :30])
    average.add(slice(0, 2), weights[:, 30:])
    average.add(slice(2, 3), weights[:1])
    peak = weights.max(axis=1)
    expected = peak + np.log(np.exp(weights - peak[:, None]).mean(axis=1))
    np.testing.assert_allclose(average.result(100), [*expected, expected[0]], rtol=1e-15)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["elbo", "log_likelihood"])
def test_an_autoencoder_has_no_likelihood(vectors: VAE, name: str) -> None:
    with pytest.raises(
        KindError, match=f"^{name} needs a distribution over latents; tiny-vectors is a plain autoencoder"
    ):
        getattr(vectors, name)(np.zeros((2, 5), np.float32))


@pytest.mark.parametrize("name", ["elbo", "log_likelihood"])
def test_a_bundle_without_likelihood_says_what_provides_one(
    bundle: Path, resign: Callable[..., Path], images: np.ndarray, name: str
) -> None:
    with (
        VAE.load(resign(bundle, lambda data: data.update(likelihood=None)), threads=1) as vae,
        pytest.raises(NotInBundleError, match=rf"^{name} needs a likelihood, .* export_bundle\(\.\.\., likelihood="),
    ):
        getattr(vae, name)(images)


@pytest.mark.parametrize("name", ["elbo", "log_likelihood"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_samples": 0}, "n_samples is 0; expected a whole number from 1"),
        ({"n_samples": 2.0}, "n_samples is 2.0; expected a whole number from 1"),
        ({"n_samples": True}, "n_samples is True; expected"),
        ({"seed": -1}, "seed is -1; expected a whole number from 0"),
        ({"batch_size": 0}, "batch_size is 0; expected a whole number from 1"),
    ],
)
def test_wrong_arguments_are_named(
    tiny: VAE, images: np.ndarray, name: str, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        getattr(tiny, name)(images, **arguments)


@pytest.mark.parametrize("name", ["elbo", "log_likelihood"])
def test_wrong_inputs_are_found_before_the_first_is_used(tiny: VAE, images: np.ndarray, name: str) -> None:
    spoiled = images.copy()
    spoiled[-1, 0, 0, 0] = np.nan
    calls: list[Any] = []
    arguments = {"progress": lambda *counts: calls.append(counts)} if name == "log_likelihood" else {}
    with pytest.raises(InputError, match="NaN"):
        getattr(tiny, name)(spoiled, 5, 0, batch_size=1, **arguments)
    assert not calls
    for wrong in (images[0, 0], images[:0], images.astype(np.float64), images.tolist(), np.zeros((2, 9, 9), np.uint8)):
        with pytest.raises(InputError):
            getattr(tiny, name)(wrong)


def test_a_closed_vae_says_so(tiny_path: Path, images: np.ndarray) -> None:
    vae = VAE.load(tiny_path, threads=1)
    vae.score(images[:1])
    vae.close()
    for name in ("elbo", "log_likelihood", "score", "score_map", "is_anomaly", "reconstruction_error"):
        with pytest.raises(ClosedError):
            getattr(vae, name)(images[:1])


# --- the spread of reconstructions ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "batch_size"), [(1, None), (32, None), (32, 5), (300, None), (300, 7)])
def test_spread_of_reconstructions_is_that_of_the_decoded_draws(
    rgb: VAE, rgb_path: Path, count: int, batch_size: int | None
) -> None:
    x = np.random.default_rng(1).random((9, 3, 6, 5), dtype=np.float32)
    found = rgb.reconstruct(x, n_samples=count, seed=3, batch_size=batch_size)
    assert isinstance(found, Reconstruction)
    reference = ByHand(rgb_path, rgb)
    decoded = reference.decode(reference.draws(x, count, 3)[2]).reshape(9, count, 3, 6, 5)
    for array, expected in zip(found, (decoded.mean(axis=1), decoded.std(axis=1)), strict=True):
        assert array.dtype == np.float32
        np.testing.assert_allclose(array, expected, atol=1e-6)


def test_spread_is_not_lost_beside_a_large_mean(tmp_path: Path) -> None:
    """Sums of squares would have lost it: 2⁻⁵³ of a million squared is 10⁻⁴."""
    model = Linear(exact=True)
    model.bias = model.bias + 1e6
    model.shift = -model.gain @ model.bias
    with VAE.load(model.write(tmp_path / "far.vae"), threads=1) as vae:
        x = model.draw(3)
        posterior = vae.encode(x)
        found = vae.reconstruct(x, n_samples=2000, seed=0)
        draws = Posterior(posterior.mean[:1].repeat(2000, 0), posterior.logvar[:1].repeat(2000, 0)).sample(seed=0)  # type: ignore[index]
        np.testing.assert_allclose(found.std[0], vae.decode(draws).astype(np.float64).std(axis=0), rtol=1e-6)
        assert (found.std > 0.01).all()


def test_draws_of_a_reconstruction_follow_the_seed(tiny: VAE, images: np.ndarray) -> None:
    one, same, other = (tiny.reconstruct(images, n_samples=8, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(one.mean, same.mean)
    assert np.array_equal(one.std, same.std)
    assert not np.array_equal(one.std, other.std)
    assert not np.array_equal(tiny.reconstruct(images, n_samples=8).std, tiny.reconstruct(images, n_samples=8).std)
    assert np.allclose(
        tiny.reconstruct(images, n_samples=1, seed=1).mean, tiny.decode(tiny.encode(images).sample(seed=1))
    )
    assert not tiny.reconstruct(images, n_samples=1, seed=1).std.any()


def test_padding_is_cut_off_both(free_path: Path) -> None:
    with VAE.load(free_path, threads=1) as vae:
        x = np.random.default_rng(0).random((2, 3, 7, 9), dtype=np.float32)
        found = vae.reconstruct(x, n_samples=4, seed=0, pad=True)
        assert found.mean.shape == found.std.shape == x.shape
        edge = np.pad(x, ((0, 0), (0, 0), (0, 1), (0, 1)), mode="edge")
        np.testing.assert_array_equal(found.std, vae.reconstruct(edge, n_samples=4, seed=0).std[..., :7, :9])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_samples": 0}, "n_samples is 0; expected a whole number from 1"),
        ({"n_samples": 1.0}, "n_samples is 1.0; expected a whole number from 1"),
        ({"n_samples": 4, "seed": -1}, "seed is -1"),
        ({"seed": 1}, "seed is 1 without n_samples"),
        ({"n_samples": 4, "tile": 4}, "n_samples is 4 beside tile or progress"),
        ({"n_samples": 4, "progress": print}, "n_samples is 4 beside tile or progress"),
    ],
)
def test_reconstruct_refuses_wrong_arguments(free_path: Path, arguments: dict[str, Any], message: str) -> None:
    with VAE.load(free_path, threads=1) as vae, pytest.raises(InputError, match=message):
        vae.reconstruct(np.zeros((1, 3, 4, 4), np.float32), **arguments)


def test_draws_of_a_reconstruction_need_a_distribution(vectors: VAE) -> None:
    with pytest.raises(
        KindError, match="n_samples is 4, which needs a distribution; tiny-vectors is a plain autoencoder"
    ):
        vectors.reconstruct(np.zeros((2, 5), np.float32), n_samples=4)
