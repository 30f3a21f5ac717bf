"""`VAE.encode`, `decode` and `reconstruct` with `tile`, on a bundle whose receptive field is known."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from vae_runtime import VAE, ApproximateTilingWarning, BundleError, InputError
from vae_runtime.cli import main as cli
from vae_runtime.manifest import HalfTiling, Manifest, Tiling

from .conftest import sign_text

EXACT = {"receptive_field": 7, "context": 2, "max_error": 1e-7, "tile": 12}, {
    "receptive_field": 5, "context": 2, "max_error": 0.0, "tile": 12,
}  # fmt: skip
WIDE = [{**half, "context": None, "max_error": 0.0123, "reason": "Softmax"} for half in EXACT]
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 30, 46, 3), np.uint8)


def with_tiling(folder: Path, source: Path, tiling: Any, **more: Any) -> Path:
    path = Path(shutil.copytree(source, folder / "copy.vae"))
    data = json.loads((path / "manifest.json").read_bytes())
    data["tiling"] = dict(zip(("encoder", "decoder"), tiling, strict=True))
    data |= more
    (path / "manifest.json").write_bytes(sign_text(data))
    return path


@pytest.fixture(scope="module")
def exact(free_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    with VAE.load(with_tiling(tmp_path_factory.mktemp("exact"), free_path, EXACT), threads=1) as vae:
        yield vae


@pytest.fixture(scope="module")
def wide(free_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    with VAE.load(with_tiling(tmp_path_factory.mktemp("wide"), free_path, WIDE), threads=1) as vae:
        yield vae


def as_float(images: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray((images / 255).astype(np.float32).transpose(0, 3, 1, 2))


@pytest.mark.parametrize("tile", [10, 12, 24, 32, 64])
@pytest.mark.parametrize("convert", [lambda x: x, as_float, lambda x: np.asfortranarray(as_float(x))])
def test_tiles_give_what_the_whole_image_gives(exact: VAE, tile: int, convert: Callable) -> None:
    images = convert(IMAGES)
    whole, tiled = exact.encode(images), exact.encode(images, tile=tile)
    np.testing.assert_allclose(tiled.mean, whole.mean, atol=1e-6)
    np.testing.assert_allclose(tiled.logvar, whole.logvar, atol=1e-6)
    decoded = exact.decode(whole.mean, tile=tile)
    np.testing.assert_allclose(decoded, exact.decode(whole.mean), atol=1e-6)
    assert (decoded.dtype, decoded.flags.c_contiguous, decoded.flags.writeable) == (np.float32, True, True)
    np.testing.assert_allclose(exact.reconstruct(images, tile=tile), exact.reconstruct(images), atol=1e-6)


def test_a_context_that_is_too_small_is_seen_in_the_result(free_path: Path, tmp_path: Path) -> None:
    less = [{**half, "context": 1} for half in EXACT]
    with VAE.load(with_tiling(tmp_path, free_path, less), threads=1) as vae:
        assert np.abs(vae.encode(IMAGES, tile=12).mean - vae.encode(IMAGES).mean).max() > 1e-4
        latents = vae.encode(IMAGES).mean
        assert np.abs(vae.decode(latents, tile=12) - vae.decode(latents)).max() > 1e-4


@pytest.mark.parametrize("size", [(29, 45), (30, 45), (1, 1), (30, 46)])
def test_padding_and_tiles_go_together(exact: VAE, size: tuple[int, int]) -> None:
    images = IMAGES[:, : size[0], : size[1]]
    expected = exact.reconstruct(images, pad=True)
    assert expected.shape == (2, 3, *size)
    np.testing.assert_allclose(exact.reconstruct(images, pad=True, tile=12), expected, atol=1e-6)
    latents = exact.encode(images, pad=True, tile=12).mean
    np.testing.assert_allclose(exact.decode(latents, tile=12, size=size), expected, atol=1e-6)


def test_progress_counts_the_windows_of_all_images_and_halves(exact: VAE) -> None:
    calls: list[tuple[int, int]] = []
    exact.reconstruct(IMAGES, tile=24, progress=lambda done, total: calls.append((done, total)))
    total = calls[0][1]
    assert calls == [(done, total) for done in range(1, total + 1)]
    assert total == 2 * 2 * (2 * 3)  # halves, images, windows from top to bottom and from left to right
    for call, given in ((exact.encode, IMAGES), (exact.decode, exact.encode(IMAGES).mean)):
        calls.clear()
        call(given, tile=24, progress=lambda done, total: calls.append((done, total)))
        assert calls == [(done, total // 2) for done in range(1, total // 2 + 1)]


def test_blending_warns_with_what_the_export_measured_and_stays_in_range(wide: VAE) -> None:
    with pytest.warns(
        ApproximateTilingWarning, match=r"encode .*tiny-free.*Softmax.*0.012 of max\|latent\|.*12"
    ) as one:
        latents = wide.encode(IMAGES, tile=12).mean
    assert one[0].filename == __file__
    with pytest.warns(ApproximateTilingWarning, match="decode .*the range of images"):
        images = wide.decode(latents, tile=12)
    assert 0 <= images.min() < images.max() <= 1
    assert 1e-6 < np.abs(images - wide.decode(latents)).max() < 0.5
    with pytest.warns(ApproximateTilingWarning) as both:
        cut = wide.reconstruct(IMAGES[:, :29, :45], pad=True, tile=12)
    assert cut.shape == (2, 3, 29, 45)
    assert len(both) == 2
    assert {warning.filename for warning in both} == {__file__}


def test_one_window_is_the_whole_and_warns_of_nothing(wide: VAE) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(wide.reconstruct(IMAGES, tile=64), wide.reconstruct(IMAGES))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tile": 13}, "tile is 13; expected a multiple of 2"),
        ({"tile": 0}, "tile is 0"),
        ({"tile": 12.0}, "tile is 12.0"),
        ({"tile": 8}, "smallest tile for this model is 10"),
        ({"tile": 12, "batch_size": 4}, "batch_size is 4 beside tile"),
        ({"progress": print}, "progress was given without tile"),
        ({"tile": 12, "progress": 5}, "progress is 5; expected a function"),
    ],
)
def test_wrong_arguments_are_refused_in_words(exact: VAE, arguments: dict[str, Any], message: str) -> None:
    latents = np.zeros((1, 2, 20, 20), np.float32)
    for call, inputs in ((exact.encode, IMAGES), (exact.decode, latents), (exact.reconstruct, IMAGES)):
        with pytest.raises(InputError, match=message):
            call(inputs, **arguments)


def test_wrong_inputs_are_refused_before_anything_runs(exact: VAE) -> None:
    odd, bright, unfit = IMAGES[:, :29], as_float(IMAGES) * 2, np.full((1, 2, 20, 20), np.nan, np.float32)
    for call, inputs, message in (
        (exact.encode, odd, "multiples of 2"),
        (exact.encode, bright, "float32 images lie in"),
        (exact.reconstruct, IMAGES.tolist(), "expected a numpy array"),
        (exact.decode, unfit, "NaN"),
    ):
        with pytest.raises(InputError, match=message):
            call(inputs, tile=12, progress=lambda *_: pytest.fail("a window ran"))


def test_bundles_of_one_size_or_without_the_figures_are_refused(tiny: VAE, vectors: VAE, free_path: Path) -> None:
    with pytest.raises(InputError, match=r"tile is 8; tiny takes inputs of one shape only"):
        tiny.encode(np.zeros((1, 8, 8), np.uint8), tile=8)
    with pytest.raises(InputError, match="takes inputs of one shape only"):
        vectors.decode(np.zeros((1, 2), np.float32), tile=8)
    with VAE.load(free_path, threads=1) as vae, pytest.raises(InputError, match="export it again"):
        vae.encode(IMAGES, tile=12)


@pytest.mark.parametrize(
    ("half", "key", "value", "message"),
    [
        (0, "context", -1, "tiling.encoder.context is -1; expected a whole number or null"),
        (1, "context", 2.5, "tiling.decoder.context is 2.5"),
        (0, "context", 2**31, "tiling.encoder.context is 2147483648; expected a whole number or null"),
        (1, "receptive_field", True, "tiling.decoder.receptive_field is True"),
        (0, "max_error", -0.1, "tiling.encoder.max_error is -0.1; an error is 0 or more"),
        (0, "max_error", "small", "tiling.encoder.max_error is 'small'; expected a finite number"),
        (0, "tile", 0, "tiling.encoder.tile is 0; expected a whole number from 1"),
        (1, "tile", 1.5, "tiling.decoder.tile is 1.5; expected a whole number from 1"),
        (1, "reason", 7, "tiling.decoder.reason is 7; expected a string"),
    ],
)
def test_a_manifest_that_says_nonsense_of_tiles_is_refused(
    free_path: Path, tmp_path: Path, half: int, key: str, value: Any, message: str
) -> None:
    tiling = [dict(one) for one in EXACT]
    tiling[half][key] = value
    with pytest.raises(BundleError, match=message.replace(".", r"\.")):
        VAE.load(with_tiling(tmp_path, free_path, tiling))


def test_info_tells_how_images_are_tiled(free_path: Path, tmp_path: Path) -> None:
    wide = [dict(WIDE[0]), dict(WIDE[1])]
    wide[0].update(context=None, max_error=0.0312, tile=48, reason="GroupNormalization looks at all positions")
    wide[1].update(context=3)
    found = CliRunner().invoke(cli, ["info", str(with_tiling(tmp_path, free_path, wide))]).stdout
    assert "latent      shape 2x(H/2)x(W/2), prior" in found
    assert (
        "tiles       to encode: an approximation, GroupNormalization looks at all positions; off by up to 0.031 with"
        " tiles of 48 pixels\n"
    ) in found
    assert "tiles       to decode: exact, with a context of 3 latent cells\n" in found


def test_tiling_is_written_as_it_is_read(free_path: Path) -> None:
    manifest = Manifest.from_json((free_path / "manifest.json").read_bytes())
    tiling = Tiling(HalfTiling(7, 2, 1e-7, 1), HalfTiling(None, None, 0.5, 16, "Softmax"))
    again = Manifest.from_json(manifest._replace(tiling=tiling).to_json())
    assert again.tiling == tiling
    assert list(tiling.encoder.to_dict()) == ["receptive_field", "context", "max_error", "tile"]


MEMORY = """
import sys
import numpy as np
from vae_runtime import VAE

def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

with VAE.load(sys.argv[1], threads=1) as vae:
    window = np.zeros((1, 2, 128, 128), np.float32)
    for _ in range(3):
        vae.decode(window)
    before = peak()
    images = vae.decode(np.zeros((1, 2, 768, 768), np.float32), **eval(sys.argv[2]))
    print(peak() - before - images.nbytes)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells the peak memory of a process")
def test_memory_does_not_grow_with_the_image(free_path: Path, tmp_path: Path, python: Callable) -> None:
    path = with_tiling(tmp_path, free_path, EXACT)
    tiled, whole = (int(python(MEMORY, path, arguments).stdout) for arguments in ("dict(tile=256)", "dict()"))
    assert tiled < 8 * 2**20  # bytes, the latents' 4.5 MiB among them
    assert whole > 3 * tiled


@pytest.mark.filterwarnings("ignore::vae_runtime.ApproximateTilingWarning")
def test_blended_images_that_are_all_white_stay_within_one(wide: VAE) -> None:
    latents = np.random.default_rng(3).choice(np.float32([-1e4, 1e4]), (1, 2, 60, 60))
    images = [wide.decode(latents, tile=tile) for tile in (14, 22, 26, 38)]
    assert all(image.max() == 1 for image in images)
