"""Photographs of any size through the command line: to latents and back, padded and cropped, in 8 bits."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vae_runtime import VAE, InputError, to_uint8
from vae_runtime.codec import Quantized, dequantize, quantize, quantized_shapes
from vae_runtime.command_inputs import batches_with_progress
from vae_runtime.detection import auroc
from vae_runtime.images import overlay, picture_size, read_picture
from vae_runtime.latent_files import LatentFile
from vae_runtime.manifest import InputSpec
from vae_runtime.sinks import unused_name
from vae_runtime.sources import open_inputs

from .test_cli import refused, run, save_png
from .test_tiled import EXACT, WIDE, as_float, with_tiling

FREE = InputSpec("image", (3, None, None), "rgb", "exact", 2, (12, 16))
ODD = np.array([False, True, False, True])
SIZES = {"a": (30, 40), "b": (30, 40), "c": (17, 22), "d": (64, 31)}


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height + width).integers(0, 256, (height, width, 3), np.uint8)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """PNG, JPEG on its side, WebP, of three sizes, two of them odd."""
    image = pytest.importorskip("PIL.Image")
    folder = tmp_path / "photos"
    for name in ("a", "b"):
        save_png(folder / f"{name}.png", noise(*SIZES[name]))
    exif = image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    image.fromarray(noise(SIZES["c"][1], SIZES["c"][0])).save(folder / "c.jpg", exif=exif, quality=95)
    image.fromarray(noise(*SIZES["d"])).save(folder / "d.webp", lossless=True)
    return folder


@pytest.fixture(scope="module")
def vae(free_path: Path) -> Any:
    with VAE.load(free_path) as vae:
        yield vae


@pytest.mark.parametrize("form", ["npz", "safetensors"])
def test_there_and_back_gives_the_reconstruction_in_the_photographs_own_size(
    form: str, vae: VAE, free_path: Path, photos: Path, tmp_path: Path
) -> None:
    if form == "safetensors":
        pytest.importorskip("safetensors")
    encoded = run("encode", free_path, photos, "--pad", "--format", form, "--output", tmp_path / "latents")
    assert encoded.exit_code == 0, encoded.output
    written = sum(file.stat().st_size for file in (tmp_path / "latents").iterdir())
    rate = 8 * written / sum(height * width for height, width in SIZES.values())
    assert encoded.stdout == f"{tmp_path / 'latents'}: 4 examples, {written:,} bytes, {rate:.2f} bits per pixel\n"
    assert sorted(file.name for file in (tmp_path / "latents").iterdir()) == [f"{name}.{form}" for name in SIZES]
    assert run("decode", free_path, tmp_path / "latents", "--output", tmp_path / "back").exit_code == 0
    names = dict(zip(SIZES, ("a.png", "b.png", "c.jpg", "d.webp"), strict=True))
    for name, size in SIZES.items():
        original = read_picture(photos / names[name], FREE)
        found = read_picture(tmp_path / "back" / f"{name}.png", FREE)
        assert picture_size(photos / names[name]) == size == found.shape[:2]
        np.testing.assert_array_equal(found, to_uint8(vae.reconstruct(original[None], pad=True))[0])


def test_nearest_of_odd_sizes_is_found_among_padded_latents(
    vae: VAE, free_path: Path, photos: Path, tmp_path: Path
) -> None:
    image = read_picture(photos / "c.jpg", FREE)[None]
    np.save(tmp_path / "more.npy", np.concatenate([255 - image, image]))
    latents = vae.encode(np.concatenate([255 - image, image]), pad=True).mean
    indices, distances = vae.nearest(image, latents, pad=True)
    assert (indices.tolist(), distances.tolist()) == ([[1]], [[0]])
    run("encode", free_path, tmp_path / "more.npy", "--pad", "--output", tmp_path / "z.npz")
    for query in (photos / "c.jpg", f"{tmp_path / 'more.npy'}#1"):
        for others in (("--references", tmp_path / "more.npy"), ("--encoded", tmp_path / "z.npz")):
            found = run("nearest", free_path, query, *others, "--pad", "-k", 1)
            assert re.search(r" 0\.0000 +1  .*-> more\.npy#1$", found.stdout.rstrip()), found.output
            refused("c.jpg has 17x22 pixels|more.npy has .*22 pixels", "nearest", free_path, query, *others, "-k", 1)


def test_paths_and_planes_of_odd_sizes_are_cut_to_them(vae: VAE, free_path: Path, photos: Path, tmp_path: Path) -> None:
    image = read_picture(photos / "c.jpg", FREE)[None]
    np.save(tmp_path / "pair.npy", np.concatenate([image, 255 - image]))
    first, second = f"{tmp_path / 'pair.npy'}#0", f"{tmp_path / 'pair.npy'}#1"
    height, width = SIZES["c"]

    def drawn(*arguments: Any) -> np.ndarray:
        done = run(arguments[0], free_path, *arguments[1:], "--pad", "--output", tmp_path / "x.npy", "--force")
        assert done.exit_code == 0, done.output
        found: np.ndarray = np.load(tmp_path / "x.npy")
        assert found.shape[1:] == (3, height, width)
        return found

    ends = vae.reconstruct(np.concatenate([image, 255 - image]), pad=True)
    path = drawn("interpolate", first, second, "--steps", 3)
    np.testing.assert_array_equal(path, vae.interpolate(image, 255 - image, 3, pad=True))
    np.testing.assert_allclose(path[[0, 2]], ends, atol=1e-6)
    units = drawn("traverse", photos / "c.jpg", "--dimension", 1, "--steps", 2, "--range", "-1,1")
    np.testing.assert_array_equal(units, vae.traverse(image, 1, (-1, 1), pad=True))
    whole = vae.traverse(np.pad(image, ((0, 0), (0, 1), (0, 0), (0, 0)), mode="edge"), 1, (-1, 1))
    np.testing.assert_array_equal(units, whole[..., :height, :width])
    middle = vae.encode(np.concatenate([image, 255 - image]), pad=True).mean.mean(axis=0, keepdims=True)
    plane = drawn("map", tmp_path / "pair.npy", "--steps", 3)
    np.testing.assert_allclose(plane[4:5], vae.decode(middle, size=(height, width)), atol=1e-5)
    other = (photos / "c.jpg", tmp_path / "d.npy", "--output", tmp_path / "y.npy", "--pad")
    np.save(tmp_path / "d.npy", image[:, :, :-1])
    message = r"a and b have \(height, width\) \(17, 22\) and \(17, 21\); expected the same"
    refused(message, "interpolate", free_path, *other)
    refused("--pad needs INPUTS", "map", free_path, "--pad", "--output", tmp_path / "y.npy", code=2)


def test_odd_sizes_need_pad_and_nothing_is_written_without(free_path: Path, photos: Path, tmp_path: Path) -> None:
    message = r"c\.jpg has 17x22 pixels \(height x width\); expected multiples of 2, to which methods pad "
    refused(message, "encode", free_path, photos, "--output", tmp_path / "latents")
    refused(message, "reconstruct", free_path, photos, "--output", tmp_path / "back")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos"]


@pytest.mark.parametrize("name", ["all.npz", "all.safetensors"])
def test_one_file_takes_inputs_of_one_size(name: str, vae: VAE, free_path: Path, photos: Path, tmp_path: Path) -> None:
    if name.endswith("safetensors"):
        pytest.importorskip("safetensors")
    pictures = [photos / "a.png", photos / "b.png"]
    assert run("encode", free_path, *pictures, "--output", tmp_path / name).exit_code == 0
    assert run("decode", free_path, tmp_path / name, "--output", tmp_path / "back.npy").exit_code == 0
    images = np.stack([read_picture(path, FREE) for path in pictures])
    np.testing.assert_array_equal(np.load(tmp_path / "back.npy"), vae.reconstruct(images))
    message = r"c\.jpg has \(height, width\) \(17, 22\), and .*a\.png \(30, 40\); inputs of different sizes"
    refused(message, "encode", free_path, photos, "--pad", "--output", tmp_path / f"more-{name}")
    assert not (tmp_path / f"more-{name}").exists()


@pytest.mark.parametrize("output", ["out.png", "out.npy"])
def test_results_of_different_sizes_need_a_folder(output: str, free_path: Path, photos: Path, tmp_path: Path) -> None:
    message = "results of different sizes go into a folder"
    refused(message, "reconstruct", free_path, photos, "--pad", "--output", tmp_path / output)
    assert not (tmp_path / output).exists()


def test_one_photograph_becomes_one_picture_without_a_frame(free_path: Path, photos: Path, tmp_path: Path) -> None:
    save_png(tmp_path / "large.png", noise(66, 80))
    assert run("encode", free_path, tmp_path / "large.png", "--output", tmp_path / "z.npz").exit_code == 0
    for suffix in (".png", ".jpg", ".webp"):
        assert run("decode", free_path, tmp_path / "z.npz", "--output", tmp_path / f"back{suffix}").exit_code == 0
        assert picture_size(tmp_path / f"back{suffix}") == (66, 80)
    arguments = ("reconstruct", free_path, tmp_path / "large.png", "--format", "webp", "--output", tmp_path / "folder")
    assert run(*arguments).exit_code == 0
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["large.webp"]
    refused("--format is 'webp' with the output", *arguments[:-1], tmp_path / "x.png")


def test_a_small_photograph_keeps_its_size(free_path: Path, photos: Path, tmp_path: Path) -> None:
    assert run("encode", free_path, photos / "c.jpg", "--pad", "--output", tmp_path / "z.npz").exit_code == 0
    assert run("decode", free_path, tmp_path / "z.npz", "--output", tmp_path / "back.png").exit_code == 0
    assert picture_size(tmp_path / "back.png") == SIZES["c"] == (17, 22)


def test_reconstruct_shows_the_original_uncropped_beside_it(free_path: Path, photos: Path, tmp_path: Path) -> None:
    assert run("reconstruct", free_path, photos / "c.jpg", "--pad", "--output", tmp_path / "o.npy").exit_code == 0
    assert np.load(tmp_path / "o.npy").shape == (1, 3, 17, 22)
    assert run("reconstruct", free_path, photos / "c.jpg", "--pad", "--output", tmp_path / "o.png").exit_code == 0


def test_samples_of_a_size(vae: VAE, free_path: Path, tmp_path: Path) -> None:
    assert run("sample", free_path, "-n", 3, "--size", "8x20", "--output", tmp_path / "s.npy").exit_code == 0
    np.testing.assert_array_equal(np.load(tmp_path / "s.npy"), vae.sample(3, seed=0, size=(8, 20)))
    refused(r"size is \(8, 7\)", "sample", free_path, "--size", "8x7", "--output", tmp_path / "t.npy")
    too_large = r"latents of shape \(1, 2, 10000000, 10000000\) does not fit into memory"
    refused(too_large, "sample", free_path, "-n", 1, "--size", "20000000x20000000", "--output", tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["s.npy"]
    refused("HEIGHTxWIDTH", "sample", free_path, "--size", "8", "--output", tmp_path / "t.npy", code=2)


def test_an_interpolation_of_any_size(vae: VAE, free_path: Path, photos: Path, tmp_path: Path) -> None:
    ends = photos / "a.png", photos / "b.png"
    assert run("interpolate", free_path, *ends, "--steps", 3, "--output", tmp_path / "path.npy").exit_code == 0
    a, b = (read_picture(path, FREE)[None] for path in ends)
    np.testing.assert_array_equal(np.load(tmp_path / "path.npy"), vae.interpolate(a, b, 3))


@pytest.mark.parametrize(("tile", "expected"), [(None, [5, 5, 2]), (512, [1] * 12)])
@pytest.mark.parametrize("kind", ["images", "latents", "latents without a size"])
def test_few_large_examples_are_in_memory_at_once(
    kind: str, tile: int | None, expected: list[int], tmp_path: Path
) -> None:
    """Of 1024x1024 pixels; the files are mostly holes."""
    path = tmp_path / "large.npy"
    shape, dtype = ((12, 1024, 1024, 3), np.uint8) if kind == "images" else ((12, 2, 512, 512), np.float32)
    np.lib.format.open_memmap(path, "w+", dtype, shape)
    source = open_inputs([str(path)], FREE) if kind == "images" else LatentFile(path)
    if kind == "latents":
        source.size = (1023, 1024)
    assert [len(batch) for batch, _, _ in batches_with_progress(source, "reading", tile, FREE)] == expected


# --- in tiles ---------------------------------------------------------------------------------------------------------


def test_tiles_give_the_same_files(vae: VAE, free_path: Path, photos: Path, tmp_path: Path) -> None:
    bundle = with_tiling(tmp_path, free_path, EXACT)
    for tiles in ((), ("--tile", 12)):
        name = f"z{len(tiles)}"
        encoded = run("encode", bundle, photos, "--pad", *tiles, "--output", tmp_path / name)
        assert (encoded.exit_code, encoded.stderr) == (0, "")
        assert run("decode", bundle, tmp_path / name, *tiles, "--output", tmp_path / f"{name}-back").exit_code == 0
        again = run("reconstruct", bundle, photos, "--pad", *tiles, "--output", tmp_path / f"{name}-again")
        assert again.exit_code == 0, again.output
    for file in ("a", "b", "c", "d"):
        with np.load(tmp_path / "z0" / f"{file}.npz") as one, np.load(tmp_path / "z2" / f"{file}.npz") as other:
            np.testing.assert_allclose(one["mean"], other["mean"], atol=1e-6)
        pictures = [
            read_picture(tmp_path / f"{way}" / f"{file}.png", FREE) for way in ("z0-back", "z2-back", "z2-again")
        ]
        assert np.ptp(np.stack(pictures).astype(int), axis=0).max() <= 1
    refused(
        "a multiple of 2 pixels", "encode", bundle, photos, "--pad", "--tile", 13, "--output", tmp_path / "bad",
    )  # fmt: skip
    refused(
        "does not say how to tile its images",
        "encode", free_path, photos / "a.png", "--tile", 12, "--output", tmp_path / "bad",
    )  # fmt: skip


def test_approximate_tiles_are_said_to_be_so_once(free_path: Path, photos: Path, tmp_path: Path) -> None:
    bundle = with_tiling(tmp_path, free_path, WIDE)
    result = run("encode", bundle, photos, "--pad", "--tile", 12, "--output", tmp_path / "z")
    assert result.exit_code == 0
    assert re.fullmatch(
        r"Warning: encode with tiles is an approximation for tiny-free \(Softmax\);[^\n]*\n", result.stderr
    )


# --- scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tiles", [(), ("--tile", 12)])
def test_photographs_are_scored_in_their_own_size(
    tiles: tuple, vae: VAE, free_path: Path, photos: Path, tmp_path: Path
) -> None:
    bundle, maps = with_tiling(tmp_path, free_path, EXACT), tmp_path / "maps"
    arguments = ("score", bundle, photos, "--pad", *tiles)
    result = run(*arguments, "--maps", maps, "--map-scale", 1.5, "--json")
    assert result.exit_code == 0, result.output
    assert result.stderr == f"{maps}: full red is a squared error of 1.5 and more\n"  # nothing is said of sizes
    images = [read_picture(photos / name, FREE)[None] for name in ("a.png", "b.png", "c.jpg", "d.webp")]
    scores = [row["score"] for row in json.loads(result.stdout)["scores"]]
    np.testing.assert_allclose(scores, [vae.score(x, "reconstruction", pad=True)[0] for x in images], rtol=1e-5)
    for name, x in zip(SIZES, images, strict=True):
        expected = overlay(as_float(x), vae.score_map(x, pad=True) / 1.5)
        found = read_picture(maps / f"{name}.png", FREE)
        assert np.abs(found.astype(int) - to_uint8(expected)[0]).max() <= 1
    one = run(*arguments[:2], photos / "c.jpg", *arguments[3:], "--maps", tmp_path / "map.npy")
    assert one.exit_code == 0, one.output
    np.testing.assert_allclose(np.load(tmp_path / "map.npy"), vae.score_map(images[2], pad=True), atol=1e-5)


def test_odd_sizes_are_not_scored_without_pad(free_path: Path, tiny_path: Path, photos: Path) -> None:
    refused(r"c\.jpg has 17x22 pixels \(height x width\); expected multiples of 2", "score", free_path, photos)
    refused("--pad is for bundles that leave height and width free", "score", tiny_path, "--golden", "--pad")


def test_sums_over_images_of_different_sizes_are_said_not_to_compare(free_path: Path, photos: Path) -> None:
    message = r"c\.jpg has \(height, width\) \(17, 22\), and .*a\.png \(30, 40\); scores in nats add up over the pixels"
    result = run("score", free_path, photos, "--pad", "--method", "elbo")
    assert result.exit_code == 0
    assert re.fullmatch(rf"Warning: .*{message} [^\n]*: take --method reconstruction\n", result.stderr)
    same = run("score", free_path, photos / "a.png", photos / "b.png", "--method", "elbo")
    assert (same.exit_code, same.stderr) == (0, "")


def test_anomalies_of_different_sizes_are_found_by_the_squared_error_alone(
    free_path: Path, photos: Path, tmp_path: Path
) -> None:
    (tmp_path / "labels.txt").write_text("0\n1\n0\n1\n")
    arguments = ("evaluate", free_path, photos, "--pad", "--labels", tmp_path / "labels.txt")
    refused(r"c\.jpg has .* and compare between images of one size only", *arguments, "--method", "elbo")
    assert set(json.loads(run(*arguments, "--json").stdout)["methods"]) == {"reconstruction"}
    result = run(*arguments, "--method", "reconstruction", "--json")
    assert result.exit_code == 0, result.output
    scored = run("score", free_path, photos, "--pad", "--json")
    scores = [row["score"] for row in json.loads(scored.stdout)["scores"]]
    assert json.loads(result.stdout)["methods"]["reconstruction"]["auroc"] == auroc(np.array(scores), ODD)
    same = [photos / "a.png", photos / "b.png"]
    (tmp_path / "labels.txt").write_text("0\n1\n")
    for more, names in (((), {"elbo", "reconstruction", "log_likelihood"}), (("--pad",), {"elbo", "reconstruction"})):
        found = run("evaluate", free_path, *same, *more, "--labels", tmp_path / "labels.txt", "--json")
        assert set(json.loads(found.stdout)["methods"]) == names


def test_what_is_wrong_with_an_array_that_is_padded_names_its_file(free_path: Path, tmp_path: Path) -> None:
    images = np.zeros((3, 3, 9, 9), np.float32)
    images[1, 0, 0, 0] = np.nan
    np.save(tmp_path / "bad.npy", images)
    for command in (("score",), ("encode", "--output", tmp_path / "o.npz")):
        refused(r"bad\.npy#\d has NaN", command[0], free_path, tmp_path / "bad.npy", "--pad", *command[1:])


def test_scores_of_approximate_tiles_are_said_to_be_so_once(free_path: Path, photos: Path, tmp_path: Path) -> None:
    bundle = with_tiling(tmp_path, free_path, WIDE)
    arguments = ("--method", "reconstruction", "--pad", "--tile", 12, "--maps", tmp_path / "maps")
    result = run("score", bundle, photos, *arguments)
    assert result.exit_code == 0, result.output
    assert re.findall(r"Warning: (\w+) with tiles", result.stderr) == ["encode", "decode"]


# --- 8 bits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 2, 5, 4), (3, 2, 5), (3, 7), (1, 1, 1, 1)])
def test_eight_bits_err_by_half_a_step_of_each_channel(shape: tuple[int, ...]) -> None:
    z = np.random.default_rng(0).normal(0, 3, shape).astype(np.float32)
    z[0] *= 1000
    quantized = quantize(z)
    assert quantized.codes.dtype == np.uint8
    assert quantized_shapes(len(z), shape[1:]) == {name: part.shape for name, part in quantized._asdict().items()}
    found = dequantize(quantized)
    assert found.dtype == np.float32
    axes = tuple(range(2, z.ndim)) or (1,)
    step = (z.max(axes, keepdims=True) - z.min(axes, keepdims=True)) / 255
    assert (np.abs(found - z) <= 0.5001 * step + 1e-6 * np.abs(z)).all()


def test_constant_channels_survive_and_parts_that_do_not_belong_together_are_refused() -> None:
    z = np.full((2, 3, 4, 4), 7.25, np.float32)
    quantized = quantize(z)
    np.testing.assert_array_equal(dequantize(quantized), z)
    for change in ({"scale": quantized.scale[:1]}, {"offset": quantized.offset.astype(np.float64)}):
        with pytest.raises(InputError, match="codes of shape"):
            dequantize(quantized._replace(**change))
    with pytest.raises(InputError, match="scale has dtype"):
        dequantize(Quantized(quantized.codes, np.full((2, 3), np.nan, np.float32), quantized.offset))
    with pytest.raises(InputError, match=r"^offset has dtype"):
        dequantize(quantized._replace(offset=quantized.offset[:1]))
    row = np.zeros((3, 1), np.float32)
    with pytest.raises(InputError, match=r"codes has dtype uint8 and shape \(3,\); expected"):
        dequantize(Quantized(np.zeros(3, np.uint8), row, row))


def test_eight_bits_reach_the_ends_of_float32_and_not_beyond() -> None:
    z = np.array([[[3.4028235e38, -3.4028235e38, 1e38]], [[3e38, -3e38, 0]]], np.float32)
    quantized = quantize(z)
    np.testing.assert_allclose(dequantize(quantized) / 3e38, z / 3e38, atol=1 / 200)
    with pytest.raises(InputError, match=r"scale and offset give latents from .* beyond float32"):
        dequantize(quantized._replace(scale=quantized.scale * 2))
    for sign in (1, -1):  # less than twice the largest, on either side
        step, start = (np.full((1, 1), sign * value, np.float32) for value in (1e36, 3e38))
        with pytest.raises(InputError, match="beyond float32"):
            dequantize(Quantized(np.full((1, 2), 255, np.uint8), step, start))


def test_steps_below_the_smallest_float32_do_not_wrap_around() -> None:
    z = np.array([[0, 380]], np.float32) * np.float32(2.0**-149)  # a step of 380 / 255, of which 1 can be stored
    assert quantize(z).codes.tolist() == [[0, 255]]


@pytest.mark.parametrize("output", ["folder", "one.npz", "one.safetensors"])
def test_the_codec_stores_codes_and_decodes_to_what_they_stand_for(
    output: str, vae: VAE, free_path: Path, photos: Path, tmp_path: Path
) -> None:
    if output.endswith("safetensors"):
        pytest.importorskip("safetensors")
    pictures = [photos / "a.png", photos / "b.png"]
    assert run("encode", free_path, *pictures, "--codec", "uint8", "--output", tmp_path / output).exit_code == 0
    assert run("decode", free_path, tmp_path / output, "--output", tmp_path / "back.npy").exit_code == 0
    mean = vae.encode(np.stack([read_picture(path, FREE) for path in pictures])).mean
    expected = vae.decode(dequantize(quantize(mean)))
    np.testing.assert_allclose(np.load(tmp_path / "back.npy"), expected, atol=1e-6)
    assert np.abs(expected - vae.decode(mean)).max() > 1e-4  # it is not the mean itself
    if output == "one.npz":
        with np.load(tmp_path / output) as found:
            assert sorted(found.files) == ["codes", "decoder", "names", "offset", "scale", "size"]
            assert found["codes"].dtype == np.uint8
            assert found["size"].tolist() == [30, 40]


def test_info_tells_what_the_codec_costs(free_path: Path, tmp_path: Path, resign: Any) -> None:
    copy = Path(shutil.copytree(free_path, tmp_path / "copy.vae"))
    cost = {"bits_per_pixel": 4.01, "psnr_db": 29.9, "psnr_lost_db": 0.1, "examples": 64}
    resign(copy, lambda data: data.update(latent_codecs={"uint8": cost}))
    said = run("info", copy).stdout
    assert "in uint8: 4.01 bits per pixel, costs 0.1 dB of 30.00 dB PSNR on 64 examples" in said
    assert json.loads(run("info", copy, "--json").stdout)["manifest"]["latent_codecs"]["uint8"] == cost
    resign(copy, lambda data: data.update(latent_codecs={"uint8": {**cost, "psnr_db": "much"}}))
    refused("latent_codecs.uint8.psnr_db is 'much'; expected a finite number", "info", copy)


# --- latents that do not belong here ----------------------------------------------------------------------------------


def test_latents_of_another_model_are_refused(free_path: Path, photos: Path, tmp_path: Path) -> None:
    assert run("encode", free_path, photos / "a.png", "--output", tmp_path / "z.npz").exit_code == 0
    with np.load(tmp_path / "z.npz") as found:
        arrays = dict(found)
    np.savez(tmp_path / "other.npz", **{**arrays, "decoder": np.array("0" * 64)})
    refused(
        r"other\.npz holds latents of another model than tiny-free",
        "decode", free_path, tmp_path / "other.npz", "--output", tmp_path / "o.png",
    )  # fmt: skip
    np.savez(tmp_path / "plain.npz", mean=arrays["mean"])  # from elsewhere: nothing is known, and nothing refused
    assert run("decode", free_path, tmp_path / "plain.npz", "--output", tmp_path / "o.npy").exit_code == 0


def test_bad_files_of_latents_are_named(free_path: Path, tmp_path: Path) -> None:
    mean = np.zeros((1, 2, 4, 4), np.float32)
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "codes.npz", codes=mean.astype(np.uint8))
    np.savez(tmp_path / "size.npz", mean=mean, size=np.array([1, 2, 3]))
    np.savez(tmp_path / "large.npz", mean=mean, size=np.array([9, 8]))
    (tmp_path / "text.safetensors").write_text("no such thing")
    codes, ones = mean.astype(np.uint8), np.ones((1, 2), np.float32)
    np.savez(tmp_path / "number.npz", codes=codes, scale=np.float32(1), offset=np.float32(0))
    np.savez(tmp_path / "float.npz", codes=mean, scale=ones, offset=ones)
    np.savez(tmp_path / "huge.npz", codes=codes + 255, scale=ones * 3e38, offset=ones)
    np.savez(tmp_path / "one.npz", mean=mean, size=np.int64(3))
    large = {"size": np.zeros(10**5, np.int64), "names": np.array(["a" * 10**5]), "decoder": np.array("a" * 10**5)}
    for name, array in large.items():
        np.savez_compressed(tmp_path / f"large-{name}.npz", mean=mean, **{name: array})
    np.savez_compressed(tmp_path / "large-scale.npz", codes=codes, scale=np.zeros((10**5, 2), np.float32), offset=ones)
    np.savez(tmp_path / "void.npz", mean=mean)
    with zipfile.ZipFile(tmp_path / "void.npz", "a") as archive, archive.open("size.npy", "w") as stream:
        header = {"descr": "|V0", "fortran_order": False, "shape": (10**5,)}
        np.lib.format.write_array_header_1_0(stream, header)
    cases = {
        "large-size.npz": "large-size.npz has 800128 bytes of size; expected 4096 at most",
        "large-names.npz": "large-names.npz has 400128 bytes of names; expected 16384 at most",
        "large-decoder.npz": "large-decoder.npz has 400128 bytes of decoder; expected 4096 at most",
        "void.npz": r"void.npz has size of shape \(100000,\); expected 4096 bytes at most",
        "large-scale.npz": "large-scale.npz has 800128 bytes of scale; expected 8 at most",
        "empty": "empty holds no files of latents",
        "codes.npz": "codes.npz holds codes without their scale and offset",
        "number.npz": r"number.npz: scale has dtype float32 and shape \(\); codes of shape \(1, 2, 4, 4\) have",
        "float.npz": r"float.npz: codes has dtype float32 and shape .*; expected uint8 \(N, \*latent_shape\)",
        "huge.npz": "scale and offset give latents from .* beyond float32",
        "one.npz": "one.npz has the size 3; expected height and width",
        "size.npz": r"size.npz has the size \[1, 2, 3\]; expected height and width",
        "large.npz": r"size is \(9, 8\); these latents are of images of \(8, 8\)",
        "none.npz": "none.npz does not exist",
    }
    if importlib.util.find_spec("safetensors"):
        cases["text.safetensors"] = "text.safetensors cannot be read as .safetensors"
        cases["none.safetensors"] = "none.safetensors does not exist"
        save = importlib.import_module("safetensors.numpy").save_file
        for number, size in enumerate(
            ("[[1], [2, 3]]", "[1e400, 3]", '{"a": 3}', "[1000000000000000000000, 3]", "[0, 8]")
        ):
            save({"mean": mean}, tmp_path / f"odd{number}.safetensors", {"size": size})
            cases[f"odd{number}.safetensors"] = rf"odd{number}\.safetensors has the size .*; expected height and width"
    for name, message in cases.items():
        refused(message, "decode", free_path, tmp_path / name, "--output", tmp_path / "o.npy")
    assert not (tmp_path / "o.npy").exists()


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("a#1.png", "a#1"),
        ("photos/b.c.jpg", "b.c"),
        ("photos/x.npy#3", "000000"),
        ("y.NPZ#12", "000000"),
        ("z.safetensors#0", "000000"),
        ("golden#7", "000000"),
        ("#", "000000"),
        ("/", "000000"),
        ("photos/..", "000000"),
        ("a\0b", "000000"),
        ("\ud800", "000000"),
        ("12:30.png", "000000"),
        ("a\tb.png", "000000"),
        ("what?.png", "000000"),
        ("a\\b..png", "000000"),
        ("NUL.png", "000000"),
        ("com1.left.png", "000000"),
        ("aux .png", "000000"),
        ("end..png", "000000"),
        ("end .png", "000000"),
        ("console.png", "console"),
        ("com0.png", "com0"),
        ("a b.png", "a b"),
        (".hidden.png", ".hidden"),
    ],
)
def test_files_are_named_after_pictures_and_numbered_for_rows(name: str, file: str) -> None:
    taken: set[str] = set()
    assert unused_name(name, taken) == file
    assert unused_name("other.png", taken) == "other"


def test_names_that_some_file_system_takes_for_one_are_told_apart() -> None:
    taken: set[str] = set()
    names = ["caf\xe9.png", "cafe\u0301.png", "CAFE\u0301.png", "stra\xdfe.png", "STRASSE.png"]
    assert [unused_name(name, taken) for name in names] == [
        *("caf\xe9", "cafe\u0301-2", "CAFE\u0301-3", "stra\xdfe", "STRASSE-2")
    ]


def test_names_in_a_file_of_latents_need_not_be_names_of_files(free_path: Path, tmp_path: Path) -> None:
    mean = np.zeros((4, 2, 4, 4), np.float32)
    np.savez(tmp_path / "z.npz", mean=mean, names=np.array(["a\0b", "/", "../../c.png", "d\ne"]))
    assert run("decode", free_path, tmp_path / "z.npz", "--output", tmp_path / "back").exit_code == 0
    found = sorted(path.name for path in tmp_path.rglob("*.png"))
    assert found == ["000000.png", "000001.png", "000003.png", "c.png"]
    np.savez(tmp_path / "bad.npz", mean=mean[:1] + np.inf, names=np.array(["d\ne"]))
    refused("bad.npz#0 has infinite values", "decode", free_path, tmp_path / "bad.npz", "--output", tmp_path / "o.npy")


def test_names_that_are_no_list_of_words_are_left_aside(free_path: Path, tmp_path: Path) -> None:
    save = pytest.importorskip("safetensors.numpy").save_file
    (tmp_path / "z").mkdir()
    for number, names in enumerate(('[["a"], ["b", "c"]]', "3", '[["a"]]', "{}", '["a", "b"]', "null")):
        save({"mean": np.zeros((1, 2, 4, 4), np.float32)}, tmp_path / "z" / f"{number}.safetensors", {"names": names})
    assert run("decode", free_path, tmp_path / "z", "--output", tmp_path / "back").exit_code == 0
    assert sorted(path.name for path in (tmp_path / "back").iterdir()) == [f"00000{number}.png" for number in range(6)]


def test_what_others_note_in_safetensors_is_left_aside(free_path: Path, tmp_path: Path) -> None:
    save = pytest.importorskip("safetensors.numpy").save_file
    save({"mean": np.zeros((1, 2, 4, 4), np.float32)}, tmp_path / "z.safetensors", {"format": "pt"})  # as torch's own
    assert run("decode", free_path, tmp_path / "z.safetensors", "--output", tmp_path / "back.npy").exit_code == 0


def test_a_format_is_for_files_in_a_folder(free_path: Path, photos: Path, tmp_path: Path) -> None:
    refused(
        "--format is 'npz' with the file",
        "encode",
        free_path,
        photos,
        "--format",
        "npz",
        "--output",
        tmp_path / "z.npz",
    )
    assert not (tmp_path / "z.npz").exists()


def test_bundles_of_one_size_also_write_folders_of_latents(tiny: VAE, tiny_path: Path, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8), np.uint8)
    np.save(tmp_path / "x.npy", images)
    assert run("encode", tiny_path, tmp_path / "x.npy", "--codec", "uint8", "--output", tmp_path / "z").exit_code == 0
    assert sorted(path.name for path in (tmp_path / "z").iterdir()) == [f"00000{n}.npz" for n in range(3)]
    (tmp_path / "z" / "._000000.npz").write_bytes(b"what macOS leaves on other file systems")
    assert run("decode", tiny_path, tmp_path / "z", "--output", tmp_path / "back.npy").exit_code == 0
    assert np.abs(np.load(tmp_path / "back.npy") - tiny.reconstruct(images)).max() < 0.01
    refused("--pad is for bundles", "encode", tiny_path, tmp_path / "x.npy", "--pad", "--output", tmp_path / "y")


def test_a_real_photograph(vae: VAE, free_path: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    photograph = datasets.load_sample_image("china.jpg")[::2, ::2]
    save_png(tmp_path / "china.png", photograph)
    assert photograph.shape == (214, 320, 3)
    assert run("encode", free_path, tmp_path / "china.png", "--output", tmp_path / "z").exit_code == 0
    assert run("decode", free_path, tmp_path / "z", "--output", tmp_path / "back").exit_code == 0
    found = read_picture(tmp_path / "back" / "china.png", FREE)
    np.testing.assert_array_equal(found, to_uint8(vae.reconstruct(photograph[None]))[0])
