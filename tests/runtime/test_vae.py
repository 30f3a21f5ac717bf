from __future__ import annotations

import pickle
import shutil
import sys
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from copy import copy as shallow_copy
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from vae_runtime import VAE, BundleError, ClosedError, DeviceError, InputError, KindError, Posterior, to_uint8
from vae_runtime.cuda import CUDA
from vae_runtime.operation import Operation, Route
from vae_runtime.preprocess import UNIT_INTERVAL
from vae_runtime.sampling import NormalStream
from vae_runtime.session import GraphSession

# Chunks of another size may be multiplied by another kernel: equal but for the last bits.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


# --- parity -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny", "rgb", "vectors"])
def test_golden_values_are_reproduced(name: str, request: pytest.FixtureRequest) -> None:
    vae: VAE = request.getfixturevalue(name)
    golden = vae.golden()
    posterior = vae.encode(golden["x"])
    assert np.allclose(posterior.mean, golden["mean"], **CLOSE)
    assert np.allclose(vae.decode(golden["mean"]), golden["reconstruction"], **CLOSE)
    assert np.allclose(vae.reconstruct(golden["x"]), golden["reconstruction"], **CLOSE)
    if name == "vectors":
        assert posterior.logvar is None
    else:
        assert np.allclose(posterior.logvar, golden["logvar"], **CLOSE)


def by_hand(path: Path, x: np.ndarray) -> dict[str, np.ndarray]:
    """The tiny networks in plain numpy, float64, with the weights that lie in the graphs."""
    onnx = pytest.importorskip("onnx")
    weights: dict[str, np.ndarray] = {}
    for half in ("encoder", "decoder"):
        for tensor in onnx.load(path / f"{half}.onnx").graph.initializer:
            weights[tensor.name] = onnx.numpy_helper.to_array(tensor).astype(np.float64)

    def affine(name: str, values: np.ndarray) -> np.ndarray:
        return values.reshape(len(values), -1) @ weights[f"{name}.weight"] + weights[f"{name}.bias"]

    hidden = np.maximum(affine("hidden", x.astype(np.float64)), 0)
    found = {"mean": affine("mean", hidden)}
    if "logvar.weight" in weights:
        found["logvar"] = np.clip(affine("logvar", hidden), -30, 20)
    out = affine("out", np.maximum(affine("back", found["mean"]), 0))
    found["reconstruction"] = 1 / (1 + np.exp(-out)) if x.ndim == 4 else out
    return found


@pytest.mark.parametrize("name", ["tiny", "rgb", "vectors"])
@pytest.mark.parametrize("rows", [1, 2, 7, 300])
def test_results_are_those_of_the_network_by_hand(
    name: str, rows: int, request: pytest.FixtureRequest, tiny_path: Path
) -> None:
    vae: VAE = request.getfixturevalue(name)
    x = np.random.default_rng(rows).random((rows, *vae.manifest.input.shape), dtype=np.float32)
    expected = by_hand(tiny_path.parent / f"{vae.manifest.name}.vae", x)
    posterior = vae.encode(x)
    found = {"mean": posterior.mean, "logvar": posterior.logvar, "reconstruction": vae.reconstruct(x)}
    for key, value in expected.items():
        assert found[key].dtype == np.float32
        assert len(found[key]) == rows
        assert np.allclose(found[key].reshape(value.shape), value, **CLOSE)


def test_shapes_and_types_are_those_of_the_manifest(rgb: VAE) -> None:
    x = np.zeros((3, 3, 6, 5), np.float32)
    posterior = rgb.encode(x)
    assert posterior.mean.shape == posterior.logvar.shape == posterior.std.shape == (3, 2, 3, 2)  # type: ignore[union-attr]
    assert posterior.kl().shape == (3,)
    assert rgb.decode(posterior.mean).shape == (3, 3, 6, 5)
    assert rgb.sample(2, seed=0).shape == (2, 3, 6, 5)
    assert to_uint8(rgb.sample(2, seed=0)).shape == (2, 6, 5, 3)


def test_uint8_and_float32_of_the_same_picture_agree(tiny: VAE, rgb: VAE) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8), np.uint8)
    assert np.array_equal(tiny.encode(pixels).mean, tiny.encode((pixels / 255).astype(np.float32)[:, None]).mean)
    colour = np.random.default_rng(0).integers(0, 256, (4, 6, 5, 3), np.uint8)
    planar = np.ascontiguousarray(np.moveaxis((colour / 255).astype(np.float32), -1, 1))
    assert np.array_equal(rgb.encode(colour).mean, rgb.encode(planar).mean)


@pytest.mark.parametrize(
    "spoil", [lambda a: a[::-1][::-1], lambda a: a.copy("F"), lambda a: np.repeat(a, 2, 3)[..., ::2]]
)
def test_layout_in_memory_does_not_matter(tiny: VAE, images: np.ndarray, spoil: Any) -> None:
    expected = tiny.encode(images).mean
    other = spoil(images)
    other.flags.writeable = False
    assert np.array_equal(tiny.encode(other).mean, expected)
    unaligned = np.frombuffer(b"\0" + images.tobytes(), np.uint8)[1:].view(np.float32).reshape(images.shape)
    assert np.array_equal(tiny.encode(unaligned).mean, expected)


# --- chunks, seeds ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2, 7, 19, 20, 21, np.int64(5)])
def test_chunks_do_not_change_the_result(tiny: VAE, images: np.ndarray, batch_size: int) -> None:
    whole, parts = tiny.encode(images), tiny.encode(images, batch_size=batch_size)
    assert np.allclose(parts.mean, whole.mean, **CLOSE)
    assert np.allclose(parts.logvar, whole.logvar, **CLOSE)
    assert np.allclose(tiny.decode(whole.mean, batch_size=batch_size), tiny.decode(whole.mean), **CLOSE)
    assert np.allclose(tiny.reconstruct(images, batch_size=batch_size), tiny.reconstruct(images), **CLOSE)
    assert np.allclose(tiny.sample(20, 3, batch_size=batch_size), tiny.sample(20, 3), **CLOSE)


def test_bytes_become_float32_chunk_by_chunk(tiny: VAE) -> None:
    """All at once would be 20 000 · 64 · 4 bytes, 5 MB."""
    pixels = np.random.default_rng(0).integers(0, 256, (20_000, 8, 8), dtype=np.uint8)
    expected = tiny.encode(pixels).mean
    tracemalloc.start()
    found = tiny.encode(pixels, batch_size=100).mean
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.allclose(found, expected, **CLOSE)
    assert peak < 4e6
    with pytest.raises(InputError, match=r"images has shape \(20000, 8, 8, 3\); expected"):
        tiny.encode(pixels[..., None].repeat(3, axis=-1), batch_size=100)
    with pytest.raises(InputError, match=r"images has shape \(20000, 7, 8\); expected"):
        tiny.encode(pixels[:, 1:], batch_size=100)
    with pytest.raises(InputError, match=r"images has shape \(0, 8, 8\)"):
        tiny.encode(pixels[:0], batch_size=100)


@pytest.mark.parametrize("path", [None, 3, b"tiny.vae"])
def test_what_is_no_path_is_an_input_error(path: Any) -> None:
    with pytest.raises(InputError, match=r"path is .*; expected a str or an os.PathLike of one, the name of a folder"):
        VAE.load(path)


def test_more_examples_than_one_chunk_go_through_by_themselves(tiny: VAE) -> None:
    many = np.random.default_rng(0).random((600, 1, 8, 8), dtype=np.float32)
    assert np.allclose(tiny.encode(many).mean, tiny.encode(many, batch_size=600).mean, **CLOSE)
    assert tiny.sample(600, seed=0).shape == (600, 1, 8, 8)


def test_sample_decodes_exactly_the_draws_of_its_seed(tiny: VAE, rgb: VAE) -> None:
    for vae in (tiny, rgb):
        latents = NormalStream(4).draw(5, vae.manifest.latent.shape)
        assert np.array_equal(vae.sample(5, seed=4), vae.decode(latents))
        assert np.array_equal(vae.sample(5, seed=4, temperature=0.5), vae.decode(np.float32(0.5) * latents))
        assert np.array_equal(vae.sample(5, seed=4, temperature=0), vae.decode(np.zeros_like(latents)))


def test_larger_sample_begins_with_the_same_examples(tiny: VAE) -> None:
    assert np.allclose(tiny.sample(300, seed=1)[:7], tiny.sample(7, seed=1), **CLOSE)
    assert not np.array_equal(tiny.sample(3), tiny.sample(3))


def test_posterior_sample_of_chunks_is_that_of_the_whole(tiny: VAE, images: np.ndarray) -> None:
    assert np.allclose(tiny.encode(images, batch_size=3).sample(seed=2), tiny.encode(images).sample(seed=2), **CLOSE)


# --- interpolation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["spherical", "linear"])
def test_interpolation_begins_and_ends_with_the_reconstructions(tiny: VAE, images: np.ndarray, method: str) -> None:
    path = tiny.interpolate(images[:1], images[1:2], steps=5, method=method)
    assert path.shape == (5, 1, 8, 8)
    assert np.allclose(path[[0, -1]], tiny.reconstruct(images[:2]), **CLOSE)
    start, end = tiny.encode(images[:2]).mean
    if method == "linear":
        assert np.allclose(path[2:3], tiny.decode((start + end)[None] / 2), **CLOSE)
    else:
        assert not np.allclose(path[2:3], tiny.decode((start + end)[None] / 2), **CLOSE)


def test_interpolation_takes_one_example_on_each_side(tiny: VAE, images: np.ndarray) -> None:
    with pytest.raises(
        InputError, match=r"a holds 2 examples; interpolate takes one on each side, for example a\[:1\]"
    ):
        tiny.interpolate(images[:2], images[:1])
    with pytest.raises(InputError, match="b holds 3 examples"):
        tiny.interpolate(images[:1], images[:3])
    with pytest.raises(InputError, match="steps is 1; expected a whole number from 2"):
        tiny.interpolate(images[:1], images[:1], steps=1)


def test_autoencoders_interpolate_too(vectors: VAE) -> None:
    x = vectors.golden()["x"]
    assert vectors.interpolate(x[:1], x[1:2], steps=3).shape == (3, 5)


# --- an autoencoder is no distribution --------------------------------------------------------------------------------


def test_code_of_an_autoencoder_is_its_mode_and_nothing_else(vectors: VAE) -> None:
    x = vectors.golden()["x"]
    posterior = vectors.encode(x)
    assert posterior.logvar is None
    assert posterior.mode() is posterior.mean
    for call in (lambda: posterior.std, posterior.kl, posterior.sample):
        with pytest.raises(KindError, match="needs a distribution; this is a plain autoencoder's code, use mode"):
            call()
    with pytest.raises(KindError, match="tiny-vectors is a plain autoencoder, which has no prior to sample from"):
        vectors.sample(1)


# --- wrong arguments --------------------------------------------------------------------------------------------------

NATIVE = np.zeros((2, 1, 8, 8), np.float32)
WRONG_IMAGES = [
    (NATIVE.astype(np.float64), "images has dtype float64; .*convert with .astype"),
    (NATIVE.astype(">f4"), "images has dtype >f4 in foreign byte order"),
    (np.ma.masked_array(NATIVE), "images is a masked array, whose mask would be lost"),
    (np.moveaxis(NATIVE, 1, -1), r"images has shape \(2, 8, 8, 1\); .*; float32 images are channels first"),
    (NATIVE[0], r"images has shape \(1, 8, 8\); .*without a batch"),
    (NATIVE[:0], r"images has shape \(0, 1, 8, 8\); expected a batch of at least one example"),
    (NATIVE + np.nan, r"images\[0\] has NaN"),
    (NATIVE + 255, r"images\[0\] has values from 255 to 255; .*divide by 255"),
    (NATIVE.tolist(), "images is a list; expected a numpy array"),
]


@pytest.mark.parametrize(("array", "message"), WRONG_IMAGES, ids=range(len(WRONG_IMAGES)))
def test_encode_and_all_that_build_on_it_refuse_wrong_images(tiny: VAE, array: Any, message: str) -> None:
    for call in (tiny.encode, tiny.reconstruct, lambda a: tiny.interpolate(a, NATIVE[:1])):
        with pytest.raises(InputError, match=message):
            call(array)


def test_encode_calls_vectors_vectors(vectors: VAE) -> None:
    with pytest.raises(InputError, match=r"vectors has shape \(2, 6\); expected \(N, 5\) float32"):
        vectors.encode(np.zeros((2, 6), np.float32))


Z = np.zeros((2, 4), np.float32)
WRONG_LATENTS = [
    (Z.astype(np.float64), r"latents has dtype float64; expected \(N, 4\) float32, convert with .astype"),
    (Z.astype(">f4"), "latents has dtype >f4 in foreign byte order"),
    (np.zeros((2, 4), np.uint8), "latents has dtype uint8"),
    (np.ma.masked_array(Z), "latents is a masked array"),
    (Z[0], r"latents has shape \(4,\); expected \(N, 4\) float32; this looks like a single latent without a batch"),
    (Z[:0], r"latents has shape \(0, 4\); expected a batch of at least one"),
    (Z[:, :3], r"latents has shape \(2, 3\); expected \(N, 4\) float32$"),
    (Z[..., None], r"latents has shape \(2, 4, 1\); expected \(N, 4\) float32$"),
    (Z + np.nan, r"latents\[0\] has NaN; latents are finite"),
    (Z - np.inf, r"latents\[0\] has infinite values; latents are finite"),
    (Z.tolist(), "latents is a list; expected a numpy array"),
    (None, "latents is a NoneType; expected a numpy array"),
]


@pytest.mark.parametrize(("array", "message"), WRONG_LATENTS, ids=range(len(WRONG_LATENTS)))
def test_decode_refuses_wrong_latents(tiny: VAE, array: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        tiny.decode(array)


def test_posterior_itself_is_not_a_latent(tiny: VAE, images: np.ndarray) -> None:
    with pytest.raises(InputError, match="latents is a Posterior; expected a numpy array"):
        tiny.decode(tiny.encode(images))


@pytest.mark.parametrize("batch_size", [0, -1, 1.5, True, "2"])
def test_wrong_batch_sizes_are_refused(tiny: VAE, images: np.ndarray, batch_size: Any) -> None:
    calls = (
        lambda: tiny.encode(images, batch_size=batch_size),
        lambda: tiny.decode(Z, batch_size=batch_size),
        lambda: tiny.sample(1, batch_size=batch_size),
        lambda: tiny.reconstruct(images, batch_size=batch_size),
    )
    for call in calls:
        with pytest.raises(InputError, match=r"batch_size is .*; expected a whole number from 1"):
            call()


def test_bytes_whose_latents_fit_into_no_memory_are_refused_before_the_work(
    tiny: VAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Operation, "run", lambda *_: pytest.fail("the work was begun"))
    with pytest.raises(InputError, match=r"the result for inputs of shape \(100000000000000, 1, 8, 8\) does not fit"):
        tiny.encode(np.broadcast_to(np.uint8(0), (10**14, 8, 8)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0,), "n is 0"), ((-1,), "n is -1"), ((1.0,), r"n is 1\.0"), (("3",), "n is '3'"), ((1, -1), "seed is -1"),
     ((1, 0, -1), "temperature is -1"), ((1, 0, float("nan")), "temperature is nan"),
     ((2**60,), "n is 1152921504606846976; an array of shape .* does not fit into memory, take"),
     ((2**70,), "n is 1180591620717411303424; an array")],
)  # fmt: skip
def test_sample_refuses_wrong_arguments(tiny: VAE, arguments: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        tiny.sample(*arguments)


@pytest.mark.parametrize("threads", [0, -1, 10**5, 1.0, True, "1"])
def test_wrong_thread_counts_are_refused(tiny_path: Path, threads: Any) -> None:
    with pytest.raises(InputError, match=r"threads is .*; expected a whole number from 1 to [0-9]+ .*, or None"):
        VAE.load(tiny_path, threads=threads)


@pytest.mark.parametrize("precision", ["fp64", "", None, 32, ["fp32"], {}])
def test_unknown_precisions_are_an_input_error(tiny_path: Path, precision: Any) -> None:
    with pytest.raises(InputError, match=r"precision is .*; expected one of fp32, tf32, fp16, int8, bf16, auto"):
        VAE.load(tiny_path, precision=precision)


@pytest.mark.parametrize("precision", ["int8", "tf32"])
def test_precision_that_the_export_refused_is_a_device_error_with_its_reason(
    bundle: Path, resign: Any, precision: str
) -> None:
    resign(bundle, lambda data: data.update(refused={precision: {"reason": "it loses 9 dB of PSNR"}}))
    with pytest.raises(DeviceError, match=rf"precision '{precision}' is not in tiny: it loses 9 dB of PSNR"):
        VAE.load(bundle, precision=precision)


def test_precision_that_the_bundle_lacks_is_a_device_error(tiny_path: Path) -> None:
    with pytest.raises(DeviceError, match="precision 'int8' is not in tiny, which has fp32"):
        VAE.load(tiny_path, precision="int8")


# --- what really runs -------------------------------------------------------------------------------------------------


def test_plan_tells_device_provider_precision_and_file(tiny_path: Path) -> None:
    with VAE.load(tiny_path, device="auto", precision="auto") as vae:
        assert vae.precision == "fp32"
        same = {"from_batch": 1, "device": vae.device, "precision": "fp32", "threads": None, "spinning": None}
        same["fixed_batches"] = []
        same |= {"provider": "CPUExecutionProvider"} if vae.device == "cpu" else {"provider": CUDA, "fixed_on_gpu": []}
        assert vae.plan == {"encode": [{**same, "file": "encoder.onnx"}], "decode": [{**same, "file": "decoder.onnx"}]}
        assert repr(vae) == f"VAE('tiny', vae, fp32 on {vae.device})"
    assert repr(vae) == "VAE('tiny', vae, closed)"


def test_half_without_files_of_its_precision_is_reported_as_fp32(bundle: Path, resign: Any) -> None:
    shutil.copy(bundle / "encoder.onnx", bundle / "encoder.int8.onnx")

    def add(data: dict[str, Any]) -> None:
        data["files"]["encoder.int8.onnx"] = dict(data["files"]["encoder.onnx"])
        data["precisions"]["int8"] = {"encoder": "encoder.int8.onnx", "decoder": "decoder.onnx", "fidelity": {}}

    resign(bundle, add)
    with VAE.load(bundle, precision="int8") as vae:
        assert vae.precision == "int8"
        assert [vae.plan[half][0]["precision"] for half in ("encode", "decode")] == ["int8", "fp32"]
        with pytest.raises(DeviceError, match="the bundle states no golden tolerance for int8; it has fp32"):
            vae.selftest()


# --- the self-test ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny", "rgb", "vectors"])
def test_selftest_passes_on_an_intact_bundle(name: str, request: pytest.FixtureRequest) -> None:
    result = request.getfixturevalue(name).selftest()
    assert result.passed
    assert (result.device, result.precision, result.tolerance) == ("cpu", "fp32", 1e-4)
    assert set(result.errors) == {"mean", "reconstruction"} | ({"logvar"} if name != "vectors" else set())
    assert max(result.errors.values()) < 1e-5


@pytest.mark.parametrize(("half", "spoiled"), [("encoder", "mean"), ("decoder", "reconstruction")])
def test_selftest_fails_with_a_verdict_where_weights_were_altered_and_signed(
    bundle: Path, resign: Any, half: str, spoiled: str
) -> None:
    onnx = pytest.importorskip("onnx")
    model = onnx.load(bundle / f"{half}.onnx")
    for tensor in model.graph.initializer:
        if tensor.name in ("mean.bias", "out.bias"):
            value = onnx.numpy_helper.to_array(tensor).copy()
            value[1] += 0.01
            tensor.CopyFrom(onnx.numpy_helper.from_array(value, tensor.name))
    resign(bundle, **{half: model.SerializeToString()})
    with VAE.load(bundle) as vae:
        result = vae.selftest()
    assert not result.passed
    assert [name for name, error in result.errors.items() if error > result.tolerance] == [spoiled]


def test_selftest_fails_where_the_network_gives_nan(bundle: Path, resign: Any) -> None:
    onnx = pytest.importorskip("onnx")
    model = onnx.load(bundle / "encoder.onnx")
    for tensor in model.graph.initializer:
        if tensor.name == "mean.bias":
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.full(4, np.nan, np.float32), tensor.name))
    with VAE.load(resign(bundle, encoder=model.SerializeToString())) as vae:
        result = vae.selftest()
    assert np.isnan(result.errors["mean"])
    assert not result.passed


@pytest.mark.parametrize("batch", [1, 3, 9])
def test_selftest_tries_what_was_prepared_for_a_batch_size(
    bundle: Path, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU, where nothing is by itself. Whatever the size, every golden example is run."""
    monkeypatch.setattr(GraphSession, "gains_from_fixed_shape", True)
    with VAE.load(bundle, threads=1) as vae:
        vae.warmup([batch])
        result, golden = vae.selftest(), vae.golden()
        assert result.passed
        assert max(result.errors.values()) < 1e-5
        assert [route.operation for route in result.routes] == ["encode", "decode"]
        seen = []

        def run(session: GraphSession, array: np.ndarray) -> list[np.ndarray]:
            outputs = real(session, array)
            if session.fixed is not None:
                seen.append(array)
                outputs[0][0] += 0.01
            return outputs

        real = GraphSession.run
        monkeypatch.setattr(GraphSession, "run", run)
        spoiled = vae.selftest()
    assert [name for name, error in spoiled.errors.items() if error > spoiled.tolerance] == ["mean", "reconstruction"]
    inputs = np.concatenate([array for array in seen if array.ndim == golden["x"].ndim])
    assert {len(array) for array in seen} == {batch}
    assert {row.tobytes() for row in inputs} == {row.tobytes() for row in golden["x"]}


def test_bytes_of_more_results_than_memory_holds_are_refused_before_anything_is_computed(
    tiny: VAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GraphSession, "run", lambda session, array: pytest.fail("computed"))
    with pytest.raises(InputError, match=r"the result for inputs of shape \(10{13}, 1, 8, 8\) does not fit"):
        tiny.encode(np.broadcast_to(np.uint8(0), (10**13, 8, 8)))


def test_threads_together_make_no_more_sessions_than_are_kept() -> None:
    """Each has seen room for its own while the others were being made."""
    meetings: list[threading.Barrier] = []

    class Session:
        gains_from_fixed_shape, file, device = True, "encoder.onnx", SimpleNamespace(is_gpu=False)

        def for_shape(self, *_: Any) -> Session:
            for meeting in meetings:
                meeting.wait(10)
            return Session()

    route = Route(1, Session(), "fp32")  # type: ignore[arg-type]
    for batch in range(1, 8):
        route.fix((batch, 4), lambda file: b"", UNIT_INTERVAL)
    meetings.append(threading.Barrier(4))
    with ThreadPoolExecutor(4) as pool:
        made = [pool.submit(route.fix, (batch, 4), lambda file: b"", UNIT_INTERVAL) for batch in (8, 9, 10, 11)]
    refused = [str(one.exception()) for one in made if one.exception() is not None]
    assert len(refused) == 3
    assert all("would be number 9 with a session of its own" in reason for reason in refused)
    assert len(route._fixed) == 8


def test_selftest_notices_golden_values_that_changed_since_loading(bundle: Path) -> None:
    with VAE.load(bundle) as vae:
        data = bytearray((bundle / "golden.npz").read_bytes())
        data[500] ^= 1
        (bundle / "golden.npz").write_bytes(data)
        with pytest.raises(BundleError, match=r"golden.npz was altered"):
            vae.selftest()


# --- arrays belong to the caller --------------------------------------------------------------------------------------


def test_returned_arrays_are_writeable_and_later_calls_do_not_change_them(tiny: VAE, images: np.ndarray) -> None:
    def calls(x: np.ndarray, seed: int) -> list[np.ndarray]:
        posterior = tiny.encode(x)
        assert posterior.logvar is not None
        found = [
            posterior.mean,
            posterior.logvar,
            posterior.std,
            posterior.sample(seed=seed),
            tiny.decode(posterior.mean),
        ]
        return [
            *found,
            tiny.sample(len(x), seed),
            tiny.reconstruct(x),
            tiny.interpolate(x[:1], x[1:2]),
            *tiny.golden().values(),
        ]

    first = calls(images[:10], 0)
    copies = [array.copy() for array in first]
    calls(images[10:], 1)
    for array, copy in zip(first, copies, strict=True):
        assert array.flags.writeable
        assert np.array_equal(array, copy)
        array[:] = -1
    for again, copy in zip(calls(images[:10], 0), copies, strict=True):
        assert np.array_equal(again, copy)


def test_inputs_are_never_written_to(tiny: VAE, images: np.ndarray) -> None:
    before = images.copy()
    posterior = tiny.encode(images)
    latents = posterior.mean.copy()
    tiny.decode(latents)
    tiny.reconstruct(images)
    assert np.array_equal(images, before)
    assert np.array_equal(latents, posterior.mean)


# --- threads ----------------------------------------------------------------------------------------------------------


def test_sixteen_threads_get_bit_for_bit_what_one_gets(tiny_path: Path) -> None:
    rng = np.random.default_rng(0)
    batches = [rng.random((rng.integers(1, 9), 1, 8, 8), dtype=np.float32) for _ in range(40)]

    def work(vae: VAE, index: int) -> tuple[bytes, ...]:
        posterior = vae.encode(batches[index])
        return (posterior.mean.tobytes(), posterior.sample(seed=index).tobytes(), vae.decode(posterior.mean).tobytes(),
                vae.sample(3, seed=index).tobytes())  # fmt: skip

    with VAE.load(tiny_path, threads=1) as vae:
        serial = [work(vae, index) for index in range(len(batches))]
        order = [int(index) for index in rng.integers(0, len(batches), 16 * 200)]
        with ThreadPoolExecutor(16) as pool:
            found = list(pool.map(lambda index: work(vae, index), order))
    assert all(result == serial[index] for index, result in zip(order, found, strict=True))


# --- closing ----------------------------------------------------------------------------------------------------------


def test_every_call_after_close_says_that_it_is_closed(tiny_path: Path, images: np.ndarray) -> None:
    with VAE.load(tiny_path) as vae:
        posterior = vae.encode(images)
    vae.close()  # a second time does no harm
    calls = [
        lambda: vae.encode(images), lambda: vae.decode(Z), lambda: vae.sample(1), lambda: vae.reconstruct(images),
        lambda: vae.interpolate(images[:1], images[:1]), vae.selftest, vae.golden, lambda: vae.plan, vae.__enter__,
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(ClosedError, match="tiny was closed; load the bundle again"):
            call()
    assert posterior.sample(seed=0).shape == (20, 4)
    assert vae.manifest.latent.shape == (4,)


def test_context_manager_closes_when_the_block_fails(tiny_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), VAE.load(tiny_path) as vae:
        raise ZeroDivisionError
    with pytest.raises(ClosedError):
        vae.sample(1)


def encode_until_it_fails(vae: VAE, images: np.ndarray, outcomes: list[Any]) -> None:
    try:
        while True:
            outcomes.append(vae.encode(images).mean)
    except BaseException as error:
        outcomes.append(error)


def test_close_while_other_threads_run_lets_calls_finish_or_say_closed(tiny_path: Path, images: np.ndarray) -> None:
    for _ in range(10):
        vae = VAE.load(tiny_path, threads=1)
        expected = vae.encode(images).mean
        outcomes: list[Any] = []
        threads = [threading.Thread(target=encode_until_it_fails, args=(vae, images, outcomes)) for _ in range(4)]
        for thread in threads:
            thread.start()
        while len(outcomes) < 8 and all(thread.is_alive() for thread in threads):
            time.sleep(0.001)
        vae.close()
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()
        errors = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        assert [type(error) for error in errors] == [ClosedError] * 4
        assert all(np.array_equal(o, expected) for o in outcomes if not isinstance(o, BaseException))


# --- fork -------------------------------------------------------------------------------------------------------------

FORK_CODE = """
import os, sys, warnings
warnings.simplefilter("ignore", DeprecationWarning)
import numpy as np
from vae_runtime import VAE, ClosedError
x = np.zeros((4, 1, 8, 8), np.float32)
vae = VAE.load(sys.argv[1], threads=int(sys.argv[2]))
vae.encode(x)
for number in range(5):
    child = os.fork()
    if child == 0:
        try: vae.encode(x)
        except ClosedError as error: print(error, flush=True)
        with VAE.load(sys.argv[1], threads=1) as own: own.encode(x)
        if number % 2: vae.close()
        sys.exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
vae.encode(x)
print("parent works")
"""


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="no fork on this system")
@pytest.mark.parametrize("threads", [1, 4])
def test_forked_child_is_told_so_can_load_again_and_exits_normally(python: Any, tiny_path: Path, threads: int) -> None:
    result = python(FORK_CODE, tiny_path, threads, timeout=60)
    assert result.returncode == 0, result
    *children, parent = result.stdout.splitlines()
    assert parent == "parent works"
    assert len(children) == 5
    for line in children:
        assert "encoder.onnx was loaded in process" in line
        assert line.endswith("before this process was forked; load it again here")
    assert result.stderr == ""


def test_posterior_is_the_public_class(tiny: VAE, images: np.ndarray) -> None:
    assert isinstance(tiny.encode(images), Posterior)


def test_sample_batches_are_the_same_examples_in_pieces(tiny: VAE) -> None:
    pieces = list(tiny.sample_batches(7, seed=3, temperature=0.7, batch_size=3))
    assert [len(piece) for piece in pieces] == [3, 3, 1]
    np.testing.assert_array_equal(np.concatenate(pieces), tiny.sample(7, seed=3, temperature=0.7, batch_size=3))


def test_sample_batches_checks_its_arguments_before_the_first_batch(tiny: VAE) -> None:
    with pytest.raises(InputError, match="n is 0; expected a whole number from 1"):
        tiny.sample_batches(0)


def test_warmup_leaves_results_as_they_are(tiny_path: Path, images: np.ndarray) -> None:
    with VAE.load(tiny_path) as vae:
        before = [vae.encode(images[:size]).mean for size in (1, 2, 20)]
        vae.warmup((1, np.int64(2), 300))
        for size, expected in zip((1, 2, 20), before, strict=True):
            np.testing.assert_array_equal(vae.encode(images[:size]).mean, expected)
        assert vae.plan["encode"][0]["fixed_batches"] == []  # the CPU provider gains nothing from them


def test_warmup_makes_the_first_call_take_bound_memory(
    tiny_path: Path, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    with VAE.load(tiny_path) as vae:
        vae.warmup([2])
        monkeypatch.setattr(GraphSession, "run", lambda self, array: pytest.fail("went the slow way"))
        assert vae.decode(vae.encode(images[:2]).mean).shape[0] == 2


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([0], "a batch size is 0; expected a whole number from 1"),
        ([1, True], "a batch size is True"),
        ([2.0], r"a batch size is 2\.0"),
        (3, r"batch_sizes is 3; expected a sequence such as \(1, 32\)"),
        ("12", "batch_sizes is '12'; expected a sequence"),
    ],
)
def test_warmup_refuses_what_is_no_batch_size(tiny: VAE, sizes: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        tiny.warmup(sizes)


@pytest.mark.parametrize("duplicate", [pickle.dumps, shallow_copy, deepcopy])
def test_what_cannot_be_pickled_says_what_to_do(tiny: VAE, duplicate: Any) -> None:
    with pytest.raises(TypeError, match="a VAE cannot be pickled or copied; load the bundle where it is needed"):
        duplicate(tiny)


def test_warmup_of_a_closed_bundle_is_refused(tiny_path: Path) -> None:
    vae = VAE.load(tiny_path)
    vae.close()
    for sizes in ([1], []):
        with pytest.raises(ClosedError):
            vae.warmup(sizes)


@pytest.mark.skipif(sys.platform != "linux", reason="limits its address space, as Linux does it")
def test_too_little_memory_is_an_error_of_its_own_and_smaller_calls_go_on(tiny_path: Path, python: Any) -> None:
    code = """
import resource, sys
import numpy as np
from vae_runtime import VAE, OutOfMemoryError
vae = VAE.load(sys.argv[1], threads=1)
latents = np.zeros((3_000_000, *vae.manifest.latent.shape), np.float32)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 300 * 2**20, -1))
try: vae.decode(latents, batch_size=len(latents))
except OutOfMemoryError as error: print(error)
print(vae.decode(latents[:2]).shape[0])
"""
    result = python(code, tiny_path)
    assert result.stdout == (
        "cpu has not enough memory for decoder.onnx at batch size 3000000; pass a smaller batch_size\n2\n"
    ), result.stderr
