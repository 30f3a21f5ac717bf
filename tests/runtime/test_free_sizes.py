"""Bundles whose images may have any height and width: shapes, padding, samples, what is refused."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from vae_runtime import VAE, BundleError, InputError
from vae_runtime.manifest import Manifest

from .conftest import DATA, sign_text

SIZES = [(2, 2), (12, 16), (30, 8), (64, 130)]


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    """The same model in numpy."""
    pytest.importorskip("onnx")
    spec = importlib.util.spec_from_file_location("generate_free", DATA / "generate_free.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def vae(free_path: Path) -> Any:
    with VAE.load(free_path, threads=1) as vae:
        yield vae


def pictures(height: int, width: int, count: int = 3) -> np.ndarray:
    return np.random.default_rng(height * width).integers(0, 256, (count, height, width, 3), np.uint8)


def as_float(images: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray((images / 255).astype(np.float32).transpose(0, 3, 1, 2))


@pytest.mark.parametrize("size", SIZES)
def test_every_size_gives_what_numpy_computes(vae: VAE, reference: ModuleType, size: tuple[int, int]) -> None:
    weights, images = reference.make_weights(), pictures(*size)
    expected = reference.encode(weights, as_float(images))
    for inputs in (images, as_float(images), as_float(images)):  # the third call runs in memory bound by the second
        posterior = vae.encode(inputs)
        np.testing.assert_allclose(posterior.mean, expected["mean"], atol=2e-6)
        np.testing.assert_allclose(posterior.logvar, expected["logvar"], atol=2e-6)
    decoded = vae.decode(posterior.mean)
    np.testing.assert_allclose(decoded, reference.decode(weights, expected["mean"]), atol=2e-6)
    np.testing.assert_array_equal(vae.reconstruct(images), decoded)


def test_sizes_may_change_from_call_to_call(vae: VAE) -> None:
    inputs = [as_float(pictures(2 * n, 40 - 2 * n, 1)) for n in range(1, 15)] * 2
    first = [vae.encode(x).mean for x in inputs]
    for x, mean in zip(inputs, first, strict=True):
        assert mean.shape == (1, 2, x.shape[2] // 2, x.shape[3] // 2)
        np.testing.assert_array_equal(vae.encode(x).mean, mean)
        assert len(vae._open_operations()[0]._kept.shapes()) <= 8


# In a process of its own, where no earlier test has left memory to use again.
TWICE = """
import sys
import numpy as np
from vae_runtime import VAE

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1])

latents = np.zeros((1, 2, 512, 512), np.float32)
with VAE.load(sys.argv[1], threads=1) as vae:
    print(resident())
    for _ in range(2):
        vae.decode(latents)
        print(resident())
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_a_size_that_comes_again_takes_no_more_memory(free_path: Path, python: Any) -> None:
    before, once, twice = map(int, python(TWICE, free_path).stdout.split())
    assert twice - once < 0.5 * (once - before)


@pytest.mark.parametrize("size", [(11, 16), (12, 15), (1, 1), (33, 7)])
def test_padding_repeats_the_edge_and_is_cut_off_exactly(vae: VAE, size: tuple[int, int]) -> None:
    images, (height, width) = pictures(*size), size
    with pytest.raises(InputError, match=rf"images has {height}x{width} pixels .*expected multiples of 2, to which"):
        vae.encode(images)
    full = np.pad(images, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    for given in (images, as_float(images)):
        posterior = vae.encode(given, pad=True)
        np.testing.assert_array_equal(posterior.mean, vae.encode(full).mean)
        expected = vae.decode(posterior.mean)[..., :height, :width]
        np.testing.assert_array_equal(vae.decode(posterior.mean, size=size), expected)
        found = vae.reconstruct(given, pad=True)
        np.testing.assert_array_equal(found, expected)
        assert found.flags.c_contiguous
        assert found.flags.owndata
    even = pictures(12, 16)
    np.testing.assert_array_equal(vae.encode(even, pad=True).mean, vae.encode(even).mean)


def test_samples_have_the_size_asked_for(vae: VAE) -> None:
    assert vae.sample(2, seed=0).shape == (2, 3, 12, 16)
    wide = vae.sample(3, seed=0, size=(8, 20))
    assert wide.shape == (3, 3, 8, 20)
    np.testing.assert_array_equal(vae.sample(2, seed=0, size=(8, 20)), wide[:2])
    np.testing.assert_array_equal(np.concatenate([*vae.sample_batches(3, 0, batch_size=2, size=(8, 20))]), wide)
    vae.warmup([1, 2], size=(8, 20))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda vae: vae.encode(np.zeros((2, 0, 4, 3), np.uint8)), r"shape \(2, 0, 4, 3\)"),
        (lambda vae: vae.encode(np.zeros((12, 16, 3), np.uint8)), "without a batch"),
        (lambda vae: vae.encode(np.zeros((3, 12, 16), np.float32)), "without a batch"),
        (lambda vae: vae.encode(np.zeros((2, 12, 16, 3), np.float32)), "channels first"),
        (lambda vae: vae.encode(np.zeros((2, 4, 12, 16), np.float32)), r"expected \(N, H, W, 3\) uint8"),
        (lambda vae: vae.encode(np.zeros((2, 12, 16), np.uint8)), r"H and W multiples of 2"),
        (lambda vae: vae.encode("x", pad=True), "images is a str"),
        (
            lambda vae: vae.encode(np.zeros((2, 11, 15), np.uint8), pad=True),
            r"images has shape \(2, 11, 15\); expected",
        ),
        (lambda vae: vae.decode(np.zeros((2, 3, 4, 4), np.float32)), r"expected \(N, 2, H, W\) float32"),
        (lambda vae: vae.decode(np.zeros((2, 4, 4), np.float32)), r"latents\[None\]"),
        (lambda vae: vae.decode(np.zeros((2, 2, 0, 4), np.float32)), r"shape \(2, 2, 0, 4\)"),
        (lambda vae: vae.decode(np.zeros((1, 2, 4, 4), np.float32), size=(6, 8)), r"size is \(6, 8\); these latents"),
        (
            lambda vae: vae.decode(np.zeros((1, 2, 4, 4), np.float32), size=(9, 8)),
            r"size is \(9, 8\); these latents are of images of \(8, 8\), or less by up to 1 on each side$",
        ),
        (lambda vae: vae.decode(np.zeros((1, 2, 4, 4), np.float32), size=8), r"expected \(height, width\)"),
        (lambda vae: vae.encode(pictures(4, 4), pad="no"), "pad is 'no'; expected True or False"),
        (lambda vae: vae.reconstruct(pictures(4, 4), pad=1), "pad is 1; expected True or False"),
        (lambda vae: vae.sample(1, size=(8, 7)), r"size is \(8, 7\); expected \(height, width\), multiples of 2"),
        (lambda vae: vae.sample(1, size=(8, 0)), "size"),
        (lambda vae: vae.sample(1, size="8x8"), r"expected \(height, width\)"),
        (lambda vae: vae.warmup([1], size=(3, 4)), "multiples of 2"),
        (
            lambda vae: vae.interpolate(np.zeros((1, 4, 4, 3), np.uint8), np.zeros((1, 4, 6, 3), np.uint8)),
            r"a and b have latents of shapes \(2, 2, 2\) and \(2, 2, 3\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_the_rule(vae: VAE, call: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call(vae)


HUGE = 20_000_000  # pixels on a side: more bytes than there are addresses
VAST = 2_000_000_000  # more than numpy counts


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda vae: vae.sample(1, size=(HUGE, HUGE)), r"n is 1; .* shape \(1, 3, 20000000, 20000000\) does not"),
        (lambda vae: vae.sample(1, size=(VAST, VAST)), r"shape \(1, 3, 2000000000, 2000000000\) does not"),
        (lambda vae: next(vae.sample_batches(1, size=(HUGE, HUGE))), r"latents of shape \(1, 2, 10000000, 10000000\)"),
        (lambda vae: next(vae.sample_batches(1, size=(2 * VAST, VAST))), r"\(1, 2, 2000000000, 1000000000\) does not"),
        (lambda vae: vae.warmup([1], size=(HUGE, HUGE)), r"a batch of shape \(1, 3, 20000000, 20000000\) does not fit"),
        (lambda vae: vae.warmup([1], size=(VAST, VAST)), r"a batch of shape \(1, 3, 2000000000, 2000000000\) does not"),
        (lambda vae: vae.decode(repeated(np.float32, 1, 2, HUGE, HUGE)), r"latents of shape .*20000000\) does not fit"),
        (lambda vae: vae.encode(repeated(np.float32, 1, 3, HUGE, HUGE)), r"images of shape .*20000000\) does not fit"),
        (lambda vae: vae.encode(repeated(np.uint8, 1, HUGE, HUGE, 3)), r"images of shape .*20000000, 3\) does not fit"),
        (
            lambda vae: vae.encode(repeated(np.uint8, 1, HUGE - 1, HUGE, 3), pad=True),
            r"shape \(1, 19999999, 20000000, 3\) does not fit into memory, padded to 20000000x20000000 pixels",
        ),
    ],
)
def test_what_no_memory_holds_is_refused_with_its_size(vae: VAE, call: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call(vae)


def repeated(dtype: type, *shape: int) -> np.ndarray:
    """Zeros that take no memory."""
    return np.broadcast_to(np.zeros((), dtype), shape)


def test_bundles_of_one_size_refuse_another(tiny: VAE) -> None:
    assert tiny.sample(1, size=(8, 8)).shape == (1, 1, 8, 8)
    with pytest.raises(InputError, match=r"size is \(16, 16\); tiny is made for inputs of \(N, 8, 8\) uint8"):
        tiny.sample(1, size=(16, 16))
    with pytest.raises(InputError, match="pad is True; tiny takes inputs of one shape only"):
        tiny.encode(np.zeros((1, 7, 8), np.uint8), pad=True)


def test_arrays_on_the_device_may_have_any_size(vae: VAE) -> None:
    torch_like = vae.encode_to_device(as_float(pictures(8, 10)))
    assert torch_like.mean.shape == (3, 2, 4, 5)
    assert vae.decode_to_device(torch_like.mean).shape == (3, 3, 8, 10)
    with pytest.raises(InputError, match=r"expected float32 \(N, 3, H, W\), H and W multiples of 2"):
        vae.encode_to_device(torch_like.mean)


def test_selftest_passes(vae: VAE) -> None:
    assert vae.selftest().passed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": {"multiple_of": 0}}, "input.multiple_of is 0"),
        ({"input": {"multiple_of": None}}, "input.multiple_of is None"),
        ({"input": {"default_size": [12, 15]}}, r"input.default_size is \[12, 15\]; .*multiples of 2"),
        ({"input": {"multiple_of": 1.5}}, r"input.multiple_of is 1\.5; .* a whole number from 1"),
        ({"input": {"default_size": [12]}}, r"input.default_size is \[12\]"),
        ({"input": {"default_size": 12}}, "input.default_size is 12; expected"),
        ({"input": {"default_size": [12, 0]}}, r"input.default_size is \[12, 0\]; .*multiples of 2"),
        ({"input": {"default_size": [-12, 16]}}, r"input.default_size is \[-12, 16\]; .*multiples of 2"),
        ({"input": {"default_size": [12.0, 16]}}, r"input.default_size is \[12\.0, 16\]; .*multiples of 2"),
        ({"input": {"default_size": [2**15, 2**16]}}, "; at most 2147483647 pixels are allowed"),
        ({"input": {"shape": [3, None, 16]}}, r"input.shape is \[3, None, 16\]"),
        ({"input": {"shape": [None, None, None]}}, "input.shape"),
        ({"input": {"resize": "crop"}}, "input.resize is 'crop'; pictures keep their size"),
        (
            {"latent": {"fitted_prior": {"type": "gaussian", "components": 1, "file": "prior.npz", "examples": 9}}},
            r"latent.fitted_prior is there with latent.shape \[2, None, None\]; it is of one shape only",
        ),
        ({"latent": {"shape": [2, 6, 8]}}, "height and width are free in both or in neither"),
        ({"input": {"shape": [3, 12, 16]}}, "height and width are free in both or in neither"),
    ],
)
def test_manifests_that_contradict_themselves_are_refused(free_path: Path, change: Any, message: str) -> None:
    data = Manifest.from_json((free_path / "manifest.json").read_bytes()).to_dict()
    for key, values in change.items():
        data[key] = {**data[key], **values}
    with pytest.raises(BundleError, match=message):
        Manifest.from_json(sign_text(data))


def test_sides_may_be_multiples_of_one_pixel(free_path: Path) -> None:
    data = Manifest.from_json((free_path / "manifest.json").read_bytes()).to_dict()
    data["input"] |= {"multiple_of": 1, "default_size": [1, 15]}
    manifest = Manifest.from_json(sign_text(data))
    assert manifest.input.example_shape == (3, 1, 15)
    assert manifest.latent_shape((3, 7, 9)) == (2, 7, 9)


def test_a_size_that_a_bundle_without_free_sizes_does_not_give_is_refused(tiny: VAE, vectors: VAE) -> None:
    with pytest.raises(InputError, match=r"^size is \(8, 9\); these latents are of images of \(8, 8\)$"):
        tiny.decode(np.zeros((1, 4), np.float32), size=(8, 9))
    with pytest.raises(InputError, match=r"^size is \(1, 2\); it is of images, and these latents are of vectors$"):
        vectors.decode(np.zeros((1, 2), np.float32), size=(1, 2))


@pytest.mark.parametrize(("count", "hint"), [(1, "take a smaller size"), (2**50, "take sample_batches")])
def test_samples_that_no_memory_has_are_refused_with_advice_that_helps(free_path: Path, count: int, hint: str) -> None:
    size = (2 * 10**7, 2 * 10**7) if count == 1 else None
    with VAE.load(free_path, threads=1) as vae, pytest.raises(InputError, match=f"does not fit into memory, {hint}$"):
        vae.sample(count, 0, size=size)
