"""Small batches run through memory that stays bound to the session: nothing of one call may show in another."""

from __future__ import annotations

import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vae_runtime import VAE, BundleError, InputError
from vae_runtime.preprocess import FINITE, UNIT_INTERVAL
from vae_runtime.session import BoundCall, GraphSession


@pytest.fixture
def plain(tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> VAE:
    """The same bundle without bound memory: the reference."""
    vae = VAE.load(tiny_path, threads=1)
    for operation in vae._open_operations():
        monkeypatch.setattr(operation, "_prepare", lambda batch: None)
    return vae


def test_it_is_really_taken(tiny_path: Path, images: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = BoundCall.__call__
    monkeypatch.setattr(BoundCall, "__call__", lambda self, array: calls.append(len(array)) or real(self, array))
    with VAE.load(tiny_path, threads=1) as vae:
        vae.decode(vae.encode(images[:3]).mean)
        monkeypatch.setattr(GraphSession, "run", lambda self, array: pytest.fail("went the slow way"))
        vae.decode(vae.encode(images[:3]).mean)
    assert calls == [3, 3]


@pytest.mark.parametrize("path", ["tiny_path", "rgb_path"])
def test_pixels_take_it_too(path: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Grey without an axis for the channel, colour with it as the last."""
    with VAE.load(request.getfixturevalue(path), threads=1) as vae:
        channels, *sides = vae.manifest.input.example_shape
        shape = (3, *sides) if channels == 1 else (3, *sides, channels)
        some, others = np.random.default_rng(0).integers(0, 256, (2, *shape), np.uint8)
        vae.encode(some)
        monkeypatch.setattr(GraphSession, "run", lambda self, array: pytest.fail("went the slow way"))
        for pixels in (some, others, some[::-1], pickle.loads(pickle.dumps(others // 128))):
            planar = pixels[:, None] if channels == 1 else pixels.transpose(0, 3, 1, 2)
            posterior, expected = vae.encode(pixels), vae.encode((planar / 255).astype(np.float32))
            np.testing.assert_array_equal(posterior.mean, expected.mean)
            np.testing.assert_array_equal(posterior.logvar, expected.logvar)
            scores = vae.score(pixels, method="reconstruction")
            np.testing.assert_array_equal(scores, vae.score((planar / 255).astype(np.float32), method="reconstruction"))
        monkeypatch.undo()
        for wrong in (some[:, :-1], some[..., None], some[0]):
            with pytest.raises(InputError, match=r"has shape .*; expected \(N, .*\) uint8"):
                vae.encode(wrong)


def test_results_are_those_of_an_unbound_run_bit_for_bit(tiny: VAE, plain: VAE, images: np.ndarray) -> None:
    for size in (1, 2, 20, 1, 7, 2):
        found, expected = tiny.encode(images[:size]), plain.encode(images[:size])
        np.testing.assert_array_equal(found.mean, expected.mean)
        np.testing.assert_array_equal(found.logvar, expected.logvar)
        np.testing.assert_array_equal(tiny.decode(found.mean), plain.decode(expected.mean))


def test_results_belong_to_the_caller(tiny: VAE, images: np.ndarray) -> None:
    first = tiny.encode(images[:1])
    kept = first.mean.copy()
    second = tiny.encode(images[1:2])
    np.testing.assert_array_equal(first.mean, kept)
    np.testing.assert_array_equal(tiny.encode(images[:1]).mean, kept)
    assert not np.array_equal(second.mean, kept)
    first.mean[:] = 7
    np.testing.assert_array_equal(tiny.encode(images[:1]).mean, kept)
    assert first.mean.flags.owndata


def test_inputs_are_not_written_to_and_may_be_read_only_or_strided(tiny: VAE, plain: VAE, images: np.ndarray) -> None:
    wide = np.zeros((4, 1, 8, 16), np.float32)
    wide[..., ::2] = images[:4]
    strided = wide[..., ::2]
    strided.flags.writeable = False
    np.testing.assert_array_equal(tiny.encode(strided).mean, plain.encode(images[:4]).mean)
    np.testing.assert_array_equal(strided, images[:4])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -1e-45, np.nextafter(np.float32(1), np.float32(2)), 255])
@pytest.mark.parametrize("place", [0, 63, 64 * 2 - 1])
def test_one_bad_value_anywhere_is_found(tiny: VAE, images: np.ndarray, value: float, place: int) -> None:
    x = images[:2].copy()
    x.reshape(-1)[place] = value
    with pytest.raises(InputError, match=r"images\[\d\] has (NaN|values from .* to .*); float32 images lie in"):
        tiny.encode(x)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_bad_latent_is_found(tiny: VAE, value: float) -> None:
    for place in range(8):
        z = np.zeros((2, 4), np.float32)
        z.reshape(-1)[place] = value
        with pytest.raises(InputError, match=r"latents\[\d\] has (NaN|infinite values); latents are finite"):
            tiny.decode(z)


def test_odd_but_good_values_are_taken(tiny: VAE, plain: VAE) -> None:
    x = np.zeros((1, 1, 8, 8), np.float32)
    x[0, 0, 0, :4] = [-0.0, 1.0, 1e-45, 0.5]
    np.testing.assert_array_equal(tiny.encode(x).mean, plain.encode(x).mean)
    z = np.array([[3e38, -3e38, 1e-45, -0.0]], np.float32)
    np.testing.assert_array_equal(tiny.decode(z), plain.decode(z))


def test_rules_agree_with_their_meaning_on_every_kind_of_float() -> None:
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 2**32, 20_000, dtype=np.uint64).astype(np.uint32).view(np.float32)
    special = np.array([0, 1, np.inf, -np.inf, np.nan, 1.0000001, -1e-45, 1e-45, 3.4e38, -3.4e38], np.float32)
    for value in np.concatenate([patterns, special]):
        array = np.full((1, 3), 0.5, np.float32)
        array[0, 1] = value
        assert FINITE.holds(FINITE.view(array)) == bool(np.isfinite(value))
        inside = 0 <= value <= 1 and not np.signbit(value)
        assert UNIT_INTERVAL.holds(UNIT_INTERVAL.view(array)) == bool(inside)


def test_a_refused_input_leaves_nothing_behind(tiny: VAE, images: np.ndarray) -> None:
    expected = tiny.encode(images[:1]).mean
    bad = images[:1].copy()
    bad[0, 0, 0, 0] = np.nan
    for _ in range(3):
        with pytest.raises(InputError):
            tiny.encode(bad)
        np.testing.assert_array_equal(tiny.encode(images[:1]).mean, expected)


def test_memory_kept_is_bounded(tiny_path: Path, images: np.ndarray) -> None:
    many = np.resize(images, (200, 1, 8, 8))
    with VAE.load(tiny_path, threads=1) as vae:
        for size in range(1, 101):
            vae.encode(many[:size])
        free = vae._open_operations()[0]._kept._free
        assert 1 <= len(free) <= 8
        assert all(len(calls) == 1 for calls in free.values())
        big = np.resize(images, (2000, 1, 8, 8))
        vae.encode(big)
        assert big.shape not in free


def kept(vae: VAE) -> list[int]:
    return sorted(shape[0] for shape in vae._open_operations()[0]._kept.shapes())


def test_a_size_that_comes_again_takes_the_place_of_one_that_does_not(tiny_path: Path, images: np.ndarray) -> None:
    with VAE.load(tiny_path, threads=1) as vae:
        for size in (2, 3, 4, 5, 6, 7, 8, 9):
            vae.encode(images[:size])
        for size in (3, 1) * 20:
            vae.encode(images[:size])
        assert kept(vae) == [1, 3, 4, 5, 6, 7, 8, 9]


def test_sizes_that_come_in_turn_do_not_drive_each_other_out(tiny_path: Path, images: np.ndarray) -> None:
    """Else each call would make memory that none takes."""
    with VAE.load(tiny_path, threads=1) as vae:
        for size in list(range(1, 17)) * 4:
            vae.encode(images[:size])
        assert kept(vae) == [1, 2, 3, 4, 5, 6, 7, 8]


def test_what_warmup_names_has_its_place_at_once_and_keeps_it(tiny_path: Path, images: np.ndarray) -> None:
    with VAE.load(tiny_path, threads=1) as vae:
        for size in range(2, 10):
            vae.encode(images[:size])
        vae.warmup([1])
        assert kept(vae) == [1, 3, 4, 5, 6, 7, 8, 9]
        for size in [11] * 50 + [12] * 50:
            vae.encode(images[:size])
        assert {1, 11, 12} <= set(kept(vae))
        vae.warmup([1, 2, 3, 4, 5, 6, 7, 8])
        for size in [9] * 50:
            vae.encode(images[:size])
        vae.warmup([10])
        assert kept(vae) == [1, 2, 3, 4, 5, 6, 7, 8]


def test_threads_do_not_share_memory(tiny_path: Path, plain: VAE, images: np.ndarray) -> None:
    expected = [plain.encode(images[i : i + 1]).mean for i in range(20)]
    wrong: list[int] = []
    with VAE.load(tiny_path, threads=1) as vae:

        def work(start: int) -> None:
            for step in range(300):
                i = (start + step) % 20
                if not np.array_equal(vae.encode(images[i : i + 1]).mean, expected[i]):
                    wrong.append(i)

        workers = [threading.Thread(target=work, args=(n,)) for n in range(8)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(60)
    assert wrong == []


def test_sizes_give_way_while_other_threads_use_them(tiny_path: Path, plain: VAE, images: np.ndarray) -> None:
    expected = [plain.encode(images[:size]).mean for size in range(1, 21)]
    with VAE.load(tiny_path, threads=1) as vae:

        def work(start: int) -> list[int]:
            sizes = [1 + (start + step // 40) % 20 for step in range(400)]
            return [size for size in sizes if not np.array_equal(vae.encode(images[:size]).mean, expected[size - 1])]

        with ThreadPoolExecutor(6) as pool:
            assert list(pool.map(work, range(0, 18, 3))) == [[]] * 6
        for size in range(1, 13):  # one thread alone: of what raced, no more than the limit is left
            vae.encode(images[:size])
        assert len(kept(vae)) <= 8


def test_graph_that_lies_about_its_shape_is_refused_here_too(bundle: Path, resign: Any) -> None:
    onnx = pytest.importorskip("onnx")
    model = onnx.load(bundle / "encoder.onnx")
    for node in model.graph.node:
        node.output[:] = ["whole" if name == "mean" else name for name in node.output]
    rows = onnx.numpy_helper.from_array(np.array([0, 0], np.int64), "rows")
    model.graph.initializer.append(rows)
    model.graph.node.append(onnx.helper.make_node("Gather", ["whole", "rows"], ["mean"], axis=0))
    resign(bundle, encoder=model.SerializeToString())
    with VAE.load(bundle) as vae, pytest.raises(BundleError, match=r"returned mean of shape \(2, 4\) for 1 rows"):
        vae.encode(np.zeros((1, 1, 8, 8), np.float32))
