"""Anomaly scores and maps, against what encode and decode give, in float64 by hand."""

from __future__ import annotations

import gc
import math
import pickle
import tracemalloc
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vae_runtime import VAE, ApproximateTilingWarning, BundleError, ClosedError, InputError, KindError, NotInBundleError
from vae_runtime.bound_score import BoundScore
from vae_runtime.calibration import SCORE_METHODS, Calibration
from vae_runtime.manifest import Manifest
from vae_runtime.scoring import Scoring, default_method

from .test_tiled import EXACT, IMAGES, WIDE, as_float, with_tiling

TINY = float(np.finfo(np.float32).tiny)
LIKELIHOODS = [
    {"type": "bernoulli", "binarize": "none"},
    {"type": "bernoulli", "binarize": "threshold"},
    {"type": "gaussian", "scale": 0.3},
    {"type": "laplace", "scale": 0.2},
]
LEVELS = [0.0, 0.5, 0.9, 1.0]


def seen(vae: VAE, x: np.ndarray) -> np.ndarray:
    """What the likelihood, and so every score, is of."""
    likelihood = vae.manifest.likelihood
    is_binary = likelihood is not None and likelihood.binarize == "threshold"
    return (x >= 0.5).astype(np.float64) if is_binary else x.astype(np.float64)


def terms(vae: VAE, x: np.ndarray, decoded: np.ndarray) -> np.ndarray:
    """-log p(x|z) of every element."""
    likelihood, x, mean = vae.manifest.likelihood, seen(vae, x), decoded.astype(np.float64)
    assert likelihood is not None
    if likelihood.type == "bernoulli":
        p = np.clip(mean, TINY, 1 - 2.0**-24)
        return -x * np.log(p) - (1 - x) * np.log1p(-p)
    assert likelihood.scale is not None
    if likelihood.type == "laplace":
        return np.abs(x - mean) / likelihood.scale + math.log(2 * likelihood.scale)
    return (x - mean) ** 2 / (2 * likelihood.scale**2) + math.log(likelihood.scale * math.sqrt(2 * math.pi))


def by_hand(vae: VAE, x: np.ndarray, method: str) -> np.ndarray:
    posterior = vae.encode(x)
    decoded = vae.decode(posterior.mean)
    if method == "reconstruction":
        return ((decoded.astype(np.float64) - seen(vae, x)) ** 2).reshape(len(x), -1).mean(axis=1)
    return terms(vae, x, decoded).reshape(len(x), -1).sum(axis=1) + posterior.kl()


@pytest.fixture(params=LIKELIHOODS, ids=lambda one: f"{one['type']}-{one.get('binarize', '')}".rstrip("-"))
def vae(request: pytest.FixtureRequest, bundle: Path, resign: Callable[..., Path]) -> VAE:
    return VAE.load(resign(bundle, lambda data: data.update(likelihood=request.param)), threads=1)


@pytest.mark.parametrize("method", ["elbo", "reconstruction"])
@pytest.mark.parametrize("rows", [1, 2, 20, 600, 1500])
def test_score_is_that_by_hand(vae: VAE, method: str, rows: int) -> None:
    """In memory of its own up to 1024 examples of 64 pixels, in blocks beyond."""
    x = np.random.default_rng(rows).random((rows, 1, 8, 8), dtype=np.float32)
    for _ in range(3):  # first and later calls
        found = vae.score(x, method)
        assert found.dtype == np.float64
        assert found.shape == (rows,)
        np.testing.assert_allclose(found, by_hand(vae, x, method), rtol=2e-6)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 0.9), (1e-39, 0.9), (0.1, 1)])
def test_certain_decoders_are_scored_with_the_clip(
    bundle: Path, resign: Callable[..., Path], low: float, high: float
) -> None:
    """Whose probabilities are cut to [low, high] in place of a sigmoid, and so are 0 and 1 in float32."""
    onnx = pytest.importorskip("onnx")
    model = onnx.load(bundle / "decoder.onnx")
    (sigmoid,) = (node for node in model.graph.node if node.op_type == "Sigmoid")
    sigmoid.op_type = "Clip"
    sigmoid.input.extend(["low", "high"])
    (weight,) = (tensor for tensor in model.graph.initializer if tensor.name == "out.weight")
    weight.CopyFrom(onnx.numpy_helper.from_array(3 * onnx.numpy_helper.to_array(weight), weight.name))
    for name, value in (("low", low), ("high", high)):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(value), name))
    x = np.random.default_rng(0).random((5, 1, 8, 8), dtype=np.float32).round()
    with VAE.load(resign(bundle, decoder=model.SerializeToString()), threads=1) as vae:
        decoded = vae.reconstruct(x)
        assert (decoded.min(), decoded.max()) == (np.float32(low), np.float32(high))
        for rows in (x, x[:1]):
            for batch_size in (None, 2):
                found = vae.score(rows, "elbo", batch_size=batch_size)
                np.testing.assert_allclose(found, by_hand(vae, rows, "elbo"), rtol=2e-6)


@pytest.mark.parametrize(("n_samples", "seed", "batch_size"), [(100, 0, None), (7, 3, None), (7, 3, 5), (300, 0, 2)])
def test_log_likelihood_is_minus_the_estimate_of_each_image_alone(
    tiny: VAE, images: np.ndarray, n_samples: int, seed: int, batch_size: int | None
) -> None:
    alone = np.concatenate([tiny.log_likelihood(image[None], n_samples, seed) for image in images])
    found = tiny.score(images, "log_likelihood", n_samples=n_samples, seed=seed, batch_size=batch_size)
    np.testing.assert_allclose(found, -alone, rtol=1e-6)
    if (n_samples, seed) == (100, 0):
        assert np.array_equal(found, tiny.score(images, "log_likelihood"))


def test_fresh_noise_of_a_score_is_one_for_all_images(tiny: VAE, images: np.ndarray) -> None:
    same = np.repeat(images[:1], 3, axis=0)
    first, *others = tiny.score(same, "log_likelihood", n_samples=2, seed=None)
    assert np.allclose(others, first, rtol=1e-6)
    assert abs(tiny.score(same[:1], "log_likelihood", n_samples=2, seed=None)[0] - first) > 1e-6 * abs(first)


@pytest.mark.parametrize("batch_size", [1, 3, 19, 20, 400])
@pytest.mark.parametrize("name", ["tiny", "rgb", "vectors"])
def test_blocks_do_not_change_scores_and_maps(name: str, batch_size: int, request: pytest.FixtureRequest) -> None:
    vae: VAE = request.getfixturevalue(name)
    x = np.random.default_rng(0).random((20, *vae.manifest.input.example_shape), dtype=np.float32)
    for method in SCORE_METHODS if name != "vectors" else ("reconstruction",):
        found = vae.score(x, method, batch_size=batch_size)
        np.testing.assert_allclose(found, vae.score(x, method), rtol=1e-6)
        assert np.array_equal(found, vae.score(x, method, batch_size=batch_size))
    for method in ("reconstruction", "elbo") if name != "vectors" else ("reconstruction",):
        whole, parts = vae.score_map(x, method), vae.score_map(x, method, batch_size=batch_size)
        np.testing.assert_allclose(parts, whole, rtol=1e-5, atol=1e-6)


def test_colour_vectors_and_free_sizes_are_scored(rgb: VAE, vectors: VAE, free_path: Path) -> None:
    rng = np.random.default_rng(0)
    x = rng.random((4, 3, 6, 5), dtype=np.float32)
    for method in ("elbo", "reconstruction"):
        np.testing.assert_allclose(rgb.score(x, method), by_hand(rgb, x, method), rtol=2e-6)
        np.testing.assert_allclose(rgb.score(x[:1], method), by_hand(rgb, x[:1], method), rtol=2e-6)
    for rows in (1, 6):
        x = rng.normal(3, 2, (rows, 5)).astype(np.float32)
        np.testing.assert_allclose(vectors.score(x), by_hand(vectors, x, "reconstruction"), rtol=1e-9)
        np.testing.assert_allclose(vectors.reconstruction_error(x), by_hand(vectors, x, "reconstruction"), rtol=1e-9)
    with VAE.load(free_path, threads=1) as free:
        for side in range(2, 26, 2):  # more sizes than have memory of their own
            x = rng.random((2, 3, side, 2 * side), dtype=np.float32)
            for method in ("elbo", "reconstruction"):
                np.testing.assert_allclose(free.score(x, method), by_hand(free, x, method), rtol=2e-6)
            assert free.score_map(x).shape == (2, side, 2 * side)
        assert free._scores is not None
        assert len(free._scores._kept.shapes()) == 8


def test_vectors_beyond_the_squares_of_float32_have_an_error(vectors: VAE) -> None:
    x = np.full((2, 5), 1e25, np.float32)
    found = vectors.score(x)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, by_hand(vectors, x, "reconstruction"), rtol=1e-9)
    np.testing.assert_allclose(vectors.score(x, batch_size=1), found, rtol=1e-9)


def test_uint8_and_odd_layouts_are_scored_as_their_values(tiny: VAE, images: np.ndarray) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8), np.uint8)
    floats = (pixels / 255).astype(np.float32)[:, None]
    expected = tiny.score(floats)
    assert np.array_equal(tiny.score(pixels), expected)
    assert np.array_equal(tiny.score(np.asfortranarray(floats)), expected)
    for binary in (pixels // 128, pixels):  # a dtype of its own, as after a way between processes
        sent = pickle.loads(pickle.dumps(binary))
        assert np.array_equal(tiny.score(sent), tiny.score((binary / 255).astype(np.float32)[:, None]))
    assert np.array_equal(tiny.score(floats[::-1])[::-1], expected)
    negative_zero = np.where(floats == 0, np.float32(-0.0), floats)  # good, if odd, and so takes the longer way
    np.testing.assert_allclose(tiny.score(negative_zero), expected, rtol=1e-6)


def test_bytes_become_floats_block_by_block(tiny: VAE) -> None:
    """20,000 images are 1.3 MB of bytes and 5.1 MB of floats; numpy tells tracemalloc of its arrays."""
    pixels = np.random.default_rng(0).integers(0, 256, (20_000, 8, 8), np.uint8)
    tiny.score(pixels[:300])
    tracemalloc.start()
    tiny.score(pixels)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2e6


def test_results_belong_to_the_caller_and_inputs_are_left_alone(tiny: VAE, images: np.ndarray) -> None:
    before, first = images.copy(), tiny.score(images[:1])
    kept = first.copy()
    tiny.score(images[1:2])
    assert np.array_equal(first, kept)
    for method in SCORE_METHODS:
        tiny.score(images, method)
    assert np.array_equal(images, before)


@pytest.mark.parametrize("method", ["reconstruction", "elbo"])
def test_map_sums_up_the_channels(method: str, vae: VAE, rgb: VAE, images: np.ndarray) -> None:
    for one, x in ((vae, images), (rgb, np.random.default_rng(1).random((4, 3, 6, 5), dtype=np.float32))):
        decoded = one.reconstruct(x)
        expected = terms(one, x, decoded) if method == "elbo" else (decoded.astype(np.float64) - seen(one, x)) ** 2
        found = one.score_map(x, method)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected.sum(axis=1), rtol=1e-5, atol=1e-6)
    sums = rgb.score_map(x, method).astype(np.float64).sum(axis=(1, 2))
    other = rgb.score(x, method)
    expected = other * 90 if method == "reconstruction" else other - rgb.encode(x).kl()
    np.testing.assert_allclose(sums, expected, rtol=1e-6)


def test_map_of_vectors_is_per_element(vectors: VAE) -> None:
    x = np.random.default_rng(0).normal(3, 2, (4, 5)).astype(np.float32)
    np.testing.assert_allclose(vectors.score_map(x), (vectors.reconstruct(x) - x) ** 2, rtol=1e-5)


def test_a_stranger_has_the_highest_score(tiny: VAE) -> None:
    """Higher is odder: the model's own reconstruction fits better than its negative."""
    own = tiny.sample(50, seed=0)
    for method in SCORE_METHODS:
        assert tiny.score(own, method).mean() < tiny.score(1 - own, method).mean()


def test_sixteen_threads_get_bit_for_bit_what_one_gets(tiny_path: Path) -> None:
    rng = np.random.default_rng(0)
    with VAE.load(tiny_path, threads=1) as vae:
        work = []
        for number in range(300):
            x = rng.random(((1, 1, 2, 5)[number % 4], 1, 8, 8), dtype=np.float32)
            method = ("elbo", "reconstruction")[number % 2]
            work.append((x, method, vae.score(x, method)))
        with ThreadPoolExecutor(16) as pool:
            results = list(pool.map(lambda job: [vae.score(job[0], job[1]) for _ in range(10)], work))
        for found, job in zip(results, work, strict=True):
            assert all(np.array_equal(one, job[2]) for one in found)


def test_a_size_that_comes_again_takes_the_memory_of_one_that_does_not(tiny_path: Path) -> None:
    x = np.random.default_rng(0).random((16, 1, 8, 8), dtype=np.float32)

    def kept() -> list[int]:
        assert vae._scores is not None
        return sorted(shape[0] for _, shape in vae._scores._kept.shapes())

    with VAE.load(tiny_path, threads=1) as vae:
        for size in list(range(2, 17)) * 3:  # those that come in turn do not drive each other out
            vae.score(x[:size])
        assert kept() == list(range(2, 10))
        for size in (3, 1) * 20:
            vae.score(x[:size])
        assert kept() == [1, 3, 4, 5, 6, 7, 8, 9]


def test_scores_do_not_depend_on_the_calls_before(bundle: Path, resign: Callable[..., Path]) -> None:
    """Of more shapes than have memory that is kept."""
    gaussian = {"type": "gaussian", "scale": 0.3}
    path = resign(bundle, lambda data: data.update(likelihood=gaussian))
    x = np.random.default_rng(0).random((20, 1, 8, 8), dtype=np.float32)
    found = []
    for counts in (range(1, 21), range(20, 0, -1)):
        with VAE.load(path, threads=1) as vae:
            found.append({count: vae.score(x[:count]).tolist() for count in counts})
    assert found[0] == found[1]
    with VAE.load(path, threads=1) as vae:
        assert vae.score(pickle.loads(pickle.dumps(x))).tolist() == found[0][20]  # whose dtype is an object of its own


def test_close_frees_the_graphs_of_scores_too(tiny_path: Path, images: np.ndarray) -> None:
    vae = VAE.load(tiny_path, threads=1)
    vae.score(images)
    sessions = [weakref.ref(operation.routes[0].any_batch) for operation in vae._open_operations()]
    vae.close()
    gc.collect()
    assert [session() for session in sessions] == [None, None]


def test_close_in_the_middle_of_a_call_lets_it_finish(
    tiny_path: Path, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = VAE.load(tiny_path, threads=1)

    class Closing(Scoring):
        """Made while the bundle is closed."""

        def __init__(self, *parts: Any) -> None:
            super().__init__(*parts)
            vae.close()

    expected = vae.score(images)
    vae._scores = None
    monkeypatch.setattr("vae_runtime.scoring.Scoring", Closing)
    assert np.array_equal(vae.score(images), expected)
    assert vae._scores is None  # so that the graphs are freed
    with pytest.raises(ClosedError):
        vae.score(images)


FORK_CODE = """
import os, sys, warnings
warnings.simplefilter("ignore", DeprecationWarning)
import numpy as np
from vae_runtime import VAE, ClosedError
x = np.zeros((1, 1, 8, 8), np.float32)
vae = VAE.load(sys.argv[1], threads=1)
vae.score(x)
if os.fork() == 0:
    try: vae.score(x)
    except ClosedError as error: print(error, flush=True)
    sys.exit(0)
os.wait()
"""


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="no fork on this system")
def test_forked_child_is_told_so(python: Any, tiny_path: Path) -> None:
    assert "encoder.onnx was loaded in process" in python(FORK_CODE, tiny_path).stdout


def test_a_failing_engine_is_named_and_the_next_call_works(
    tiny: VAE, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = tiny.score(images)
    monkeypatch.setattr(BoundScore, "__call__", lambda self, array: None)
    np.testing.assert_allclose(tiny.score(images), expected, rtol=1e-6)  # in blocks
    monkeypatch.undo()
    assert np.array_equal(tiny.score(images), expected)


# --- methods and thresholds -------------------------------------------------------------------------------------------


def test_default_method_is_the_bound_under_a_density_else_the_error(
    tiny: VAE, rgb: VAE, vectors: VAE, free: VAE, images: np.ndarray, bundle: Path, resign: Callable[..., Path]
) -> None:
    assert default_method(rgb.manifest) == "elbo"
    # The last one's is Gaussian too, but nats add up over the pixels, of which there are more or fewer.
    assert [default_method(vae.manifest) for vae in (tiny, vectors, free)] == ["reconstruction"] * 3
    assert np.array_equal(tiny.score(images), tiny.score(images, "reconstruction"))
    x = rgb.golden()["x"]
    assert np.array_equal(rgb.score(x), rgb.score(x, "elbo"))
    with VAE.load(resign(bundle, lambda data: data.update(likelihood=None)), threads=1) as unknown:
        assert default_method(unknown.manifest) == "reconstruction"
        assert np.array_equal(unknown.score(images), unknown.reconstruction_error(images))


def calibrated(data: dict[str, Any]) -> None:
    scores = {"elbo": [10.0, 46.0, 47.0, 60.0], "reconstruction": [0.0, 0.08, 0.1, 0.2]}
    data["calibration"] = {"source": "held-out", "examples": 100, "levels": LEVELS, "scores": scores}


def test_anomalies_lie_above_the_threshold_of_their_method(
    bundle: Path, resign: Callable[..., Path], images: np.ndarray
) -> None:
    with VAE.load(resign(bundle, calibrated), threads=1) as vae:
        assert Manifest.from_json((bundle / "manifest.json").read_bytes()).calibration is not None
        for method in ("elbo", "reconstruction"):
            for quantile in (0.5, 0.9, 0.95, 0.99):
                threshold = vae.threshold(quantile, method)
                assert threshold == vae.manifest.calibration.threshold(method, quantile)  # type: ignore[union-attr]
                found = vae.is_anomaly(images, quantile, method)
                assert found.dtype == np.bool_
                assert np.array_equal(found, vae.score(images, method) > threshold)
        assert vae.is_anomaly(images, 0.5).any()
        assert not vae.is_anomaly(images, 0.5).all()
        assert np.array_equal(vae.is_anomaly(images), vae.is_anomaly(images, 0.99, "elbo"))
        with pytest.raises(NotInBundleError, match=r"'log_likelihood' were not .* vae-export SOURCE --calib"):
            vae.is_anomaly(images, method="log_likelihood")
        for quantile in (0, 1, 1.5, "0.5", float("nan"), True):
            with pytest.raises(InputError, match=r"quantile is .*; expected a number above 0 and below 1"):
                vae.is_anomaly(images, quantile)  # type: ignore[arg-type]
        with pytest.raises(InputError, match=r"quantile is 0\.999"):
            vae.is_anomaly(images, 0.999)


def test_a_bundle_without_calibration_says_what_provides_one(tiny: VAE, images: np.ndarray) -> None:
    with pytest.raises(NotInBundleError, match=r"^tiny was not calibrated, .* vae-export SOURCE --calibrate DATA$"):
        tiny.is_anomaly(images)
    with pytest.raises(NotInBundleError, match=r"^tiny was not calibrated, "):
        tiny.threshold()


@pytest.fixture(scope="module")
def free(free_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Of any even size, with the context of its tiles."""
    with VAE.load(with_tiling(tmp_path_factory.mktemp("exact"), free_path, EXACT), threads=1) as vae:
        yield vae


@pytest.mark.parametrize("tile", [None, 12])
@pytest.mark.parametrize("size", [(29, 45), (30, 45), (30, 46)])
def test_padded_images_are_scored_without_the_padding(
    free: VAE, size: tuple[int, int], tile: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vae_runtime.scoring._STRIP_VALUES", 3 * 46 * 8)  # 8 rows, not all of them
    images = IMAGES[:, : size[0], : size[1]]
    x = as_float(images)
    posterior = free.encode(images, pad=True)
    decoded = free.decode(posterior.mean, size=size)
    squares = (decoded.astype(np.float64) - x) ** 2
    losses = terms(free, x, decoded)
    expected = {
        "reconstruction": squares.reshape(2, -1).mean(axis=1),
        "elbo": losses.reshape(2, -1).sum(axis=1) + posterior.kl(),
    }
    for given in (images, x, np.asfortranarray(x)):
        for method, scores in expected.items():
            np.testing.assert_allclose(free.score(given, method, pad=True, tile=tile), scores, rtol=1e-5)
        np.testing.assert_allclose(
            free.reconstruction_error(given, pad=True, tile=tile), expected["reconstruction"], rtol=1e-5
        )
    maps = free.score_map(images, pad=True, tile=tile), free.score_map(images, "elbo", pad=True, tile=tile)
    np.testing.assert_allclose(maps[0], squares.sum(axis=1), atol=1e-5)
    np.testing.assert_allclose(maps[1], losses.sum(axis=1), rtol=1e-4, atol=1e-4)


def test_anomalies_among_large_images(free: VAE, free_path: Path, tmp_path: Path) -> None:
    images = np.concatenate([IMAGES[:, :29, :45], np.full((1, 29, 45, 3), 128, np.uint8)])
    low, middle, high = np.sort(scores := free.score(images, "reconstruction", pad=True)).tolist()
    levels = [low / 2, (low + middle) / 2, (middle + high) / 2]
    calibration = {"source": "data", "examples": 100, "levels": [0, 0.5, 1], "scores": {"reconstruction": levels}}
    with VAE.load(with_tiling(tmp_path, free_path, EXACT, calibration=calibration), threads=1) as vae:
        for more in ({"pad": True}, {"pad": True, "tile": 12}):
            for quantile, count in ((0.01, 3), (0.5, 2), (0.98, 1)):
                found = vae.is_anomaly(images, quantile, **more)
                assert list(found) == list(scores > vae.threshold(quantile, "reconstruction"))
                assert found.sum() == count


def test_progress_of_scores_counts_all_windows(free: VAE) -> None:
    calls: list[tuple[int, int]] = []
    free.score(IMAGES, tile=24, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(done, 24) for done in range(1, 25)]  # 2 images, 2 halves, 2 x 3 windows


@pytest.mark.parametrize("more", [{"pad": True}, {"tile": 12}, {"tile": 12, "progress": print}])
def test_draws_are_of_whole_images(free: VAE, more: Any) -> None:
    images = IMAGES[:, :29, :45] if "pad" in more else IMAGES
    with pytest.raises(
        InputError, match=r"^pad, tile or progress was given with method 'log_likelihood', .* take 'elbo"
    ):
        free.score(images, "log_likelihood", **more)
    with pytest.raises(InputError, match="progress was given without tile"):
        free.score(images, progress=print, **{"pad": "pad" in more})


def test_padding_that_adds_nothing_changes_nothing(free: VAE) -> None:
    small = IMAGES[:1, :12, :12]
    for method in SCORE_METHODS:
        assert np.array_equal(free.score(small, method, pad=True), free.score(small, method))


def test_what_cannot_be_padded_or_tiled_is_refused(tiny: VAE, images: np.ndarray, free: VAE) -> None:
    for call in (tiny.score, tiny.score_map, tiny.reconstruction_error):
        with pytest.raises(InputError, match=r"pad is True; tiny takes inputs of one shape only"):
            call(images, pad=True)
        with pytest.raises(InputError, match=r"tile is 12; tiny takes inputs of one shape only"):
            call(images, tile=12)
    for wrong in ("yes", 1, None):
        with pytest.raises(InputError, match="pad is"):
            free.score(IMAGES, pad=wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="beside tile"):
        free.score_map(IMAGES, tile=12, batch_size=1)
    bad = as_float(IMAGES)
    bad[1, 0, 3, 3] = np.nan
    for more in ({"pad": True}, {"tile": 12}):
        with pytest.raises(InputError, match="NaN"):
            free.score(bad, **more)


def test_thresholds_hold_for_the_tiles_of_the_calibration_where_they_are_an_approximation(
    free_path: Path, tmp_path: Path
) -> None:
    calibration = {"source": "data", "examples": 100, "levels": [0, 1], "scores": {"reconstruction": [0, 1]}}
    halves = {"exact": EXACT, "wide": WIDE, "encoder": (WIDE[0], EXACT[1]), "decoder": (EXACT[0], WIDE[1])}
    for name, tiling in halves.items():
        for calibrated in (None, 12):
            (tmp_path / f"{name}{calibrated}").mkdir()
            changed = calibration if calibrated is None else {**calibration, "tile": calibrated}
            path = with_tiling(tmp_path / f"{name}{calibrated}", free_path, tiling, calibration=changed)
            with VAE.load(path, threads=1) as vae:
                assert vae.manifest.calibration is not None
                assert vae.manifest.calibration.to_dict() == changed
                for tile in (None, 12, 64):
                    if name == "exact" or tile == calibrated:
                        assert vae.threshold(0.5, tile=tile) == 0.5
                        continue
                    with pytest.raises(
                        InputError, match=rf"tile is {tile}, and tiny-free was calib.* with tile {calibrated};"
                    ):
                        vae.threshold(0.5, tile=tile)
                    with pytest.raises(InputError, match=rf"tile is {tile}, .* approximation"):
                        vae.is_anomaly(IMAGES, 0.5, tile=tile)
    for wrong in (0, -1, 1.5, "12", True):
        with pytest.raises(BundleError, match=r"calibration\.tile is .*; expected a whole number from 1"):
            Calibration.from_dict({**calibration, "tile": wrong})


def test_methods_that_no_calibration_can_have_are_not_sent_for_one(free_path: Path, tmp_path: Path) -> None:
    calibration = {"source": "data", "examples": 100, "levels": [0, 1], "scores": {"reconstruction": [0, 1]}}
    with VAE.load(with_tiling(tmp_path, free_path, EXACT, calibration=calibration), threads=1) as vae:
        for method in ("elbo", "log_likelihood"):
            with pytest.raises(
                NotInBundleError, match=rf"^scores by '{method}' grow with the size .* take 'reconstruction'$"
            ):
                vae.threshold(0.5, method)


def test_memory_of_scores_in_tiles_is_that_of_one_reconstruction(free: VAE, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vae_runtime.scoring._STRIP_VALUES", 2**14)
    images = np.random.default_rng(0).integers(0, 256, (3, 768, 768, 3), np.uint8)
    whole = images[:1].size * 4  # bytes of a reconstruction
    free.score(images[:1, :64, :64], tile=32)
    for call, more in ((free.score, 0), (free.score_map, images.size // 3 * 4)):
        for method in ("reconstruction", "elbo"):
            gc.collect()
            tracemalloc.start()
            call(images, method, tile=64)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            # One reconstruction, mean and logvar of a sixth of it each, and what is computed from some rows.
            assert peak - more < 1.4 * whole + 2**20, (method, peak / whole)


def test_scores_from_blended_tiles_warn_where_they_are_asked_for(free_path: Path, tmp_path: Path) -> None:
    with VAE.load(with_tiling(tmp_path, free_path, WIDE), threads=1) as vae:
        for call in (vae.score, vae.score_map, vae.reconstruction_error):
            with pytest.warns(ApproximateTilingWarning) as caught:
                call(IMAGES, tile=12)
            assert [(Path(warning.filename), str(warning.message)[:6]) for warning in caught] == [
                (Path(__file__), "encode"), (Path(__file__), "decode"),
            ]  # fmt: skip


@pytest.mark.filterwarnings("ignore::vae_runtime.ApproximateTilingWarning")
def test_scores_from_blended_tiles_are_of_each_image_s_own_reconstruction(free_path: Path, tmp_path: Path) -> None:
    """Whose memory is that of the one before."""
    with VAE.load(with_tiling(tmp_path, free_path, WIDE), threads=1) as vae:
        squares = np.square(vae.reconstruct(IMAGES, tile=12).astype(np.float64) - as_float(IMAGES))
        np.testing.assert_allclose(
            vae.score(IMAGES, "reconstruction", tile=12), squares.mean(axis=(1, 2, 3)), rtol=1e-6
        )
        np.testing.assert_allclose(vae.score_map(IMAGES, tile=12), squares.sum(axis=1), rtol=1e-5, atol=1e-9)


def test_images_that_need_padding_say_what_can_pad_them(free_path: Path) -> None:
    with (
        VAE.load(free_path, threads=1) as vae,
        pytest.raises(
            InputError, match=r"multiples of 2, to which methods pad with pad=True, and commands with --pad$"
        ),
    ):
        vae.score(np.zeros((1, 3, 11, 16), np.float32))


@pytest.mark.parametrize("method", ["ELBO", "", 1, ["elbo"], b"elbo", True])
def test_unknown_methods_are_refused(tiny: VAE, images: np.ndarray, method: Any) -> None:
    expected = r"method is .*; expected one of elbo, reconstruction, log_likelihood"
    for call in (tiny.score, lambda x, m: tiny.is_anomaly(x, 0.9, m)):
        with pytest.raises(InputError, match=expected):
            call(images, method)
    with pytest.raises(InputError, match=r"method is .*; expected one of reconstruction, elbo$"):
        tiny.score_map(images, method)
    with pytest.raises(InputError, match=r"expected one of reconstruction, elbo$"):
        tiny.score_map(images, "log_likelihood")


@pytest.mark.parametrize("method", ["elbo", "log_likelihood"])
def test_methods_that_need_a_distribution_or_a_likelihood_say_so(
    vectors: VAE, bundle: Path, resign: Callable[..., Path], images: np.ndarray, method: str
) -> None:
    with pytest.raises(KindError, match="tiny-vectors is a plain autoencoder"):
        vectors.score(np.zeros((2, 5), np.float32), method)
    with (
        VAE.load(resign(bundle, lambda data: data.update(likelihood=None)), threads=1) as vae,
        pytest.raises(NotInBundleError, match="likelihood="),
    ):
        vae.score(images, method)


def test_wrong_inputs_are_refused_as_encode_refuses_them(tiny: VAE, images: np.ndarray) -> None:
    tiny.score(images)
    spoiled = images.copy()
    spoiled[3, 0, 2, 2] = np.nan
    wrong: list[Any] = [spoiled, 2 * images, images[0], images[:0], images.astype(">f4"), images.tolist(), None]
    wrong += [np.ma.masked_array(images), np.float32(1), np.zeros((2, 9, 9), np.uint8)]
    for one in wrong:
        for call in (tiny.score, tiny.score_map, tiny.reconstruction_error):
            with pytest.raises(InputError) as found:
                call(one)
            with pytest.raises(InputError) as expected:
                tiny.encode(one)
            assert str(found.value) == str(expected.value)
    with pytest.raises(InputError, match="batch_size is 0"):
        tiny.score(images, batch_size=0)
    for arguments, message in (({"n_samples": 0}, "n_samples is 0"), ({"seed": -1}, "seed is -1")):
        with pytest.raises(InputError, match=message):
            tiny.score(images, "log_likelihood", **arguments)
