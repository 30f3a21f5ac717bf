from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from vae_runtime import VAE, InputError, OutputError, __version__, latent_files, score_commands, sinks, to_uint8
from vae_runtime.cli import main
from vae_runtime.command_inputs import BATCH
from vae_runtime.images import _LARGEST_SIDE, write_picture
from vae_runtime.prior import GaussianMixture
from vae_runtime.sinks import GRID_LIMIT, ArrayWriter, open_sink, pair_rows

COMMANDS = (
    "info", "selftest", "encode", "decode", "sample", "reconstruct", "interpolate", "traverse", "map", "nearest",
    "score", "evaluate",
)  # fmt: skip
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception  # what a user would see as a traceback
    return result


def refused(message: str, *arguments: object, code: int = 1) -> None:
    """The command fails with one sentence on stderr, nothing on stdout and this exit code."""
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert re.search(message, result.stderr), result.stderr
    if code == 1:
        assert re.fullmatch(r"Error: [^\n]+\n", result.stderr), result.stderr


def save_png(path: Path, array: np.ndarray) -> Path:
    image = pytest.importorskip("PIL.Image")
    path.parent.mkdir(exist_ok=True, parents=True)
    image.fromarray(array).save(path)
    return path


def read_png(path: Path) -> np.ndarray:
    with pytest.importorskip("PIL.Image").open(path) as file:
        return np.asarray(file)


# --- info, selftest ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny.vae", "tiny-rgb.vae", "tiny-vectors.vae"])
def test_info_describes_every_kind(tiny_path: Path, name: str) -> None:
    result = run("info", tiny_path.parent / name)
    assert result.exit_code == 0
    assert result.stdout.startswith(name.removesuffix(".vae"))
    for word in ("input", "latent", "likelihood", "fp32", "encoder.onnx", "bytes", "onnxruntime", "cpu", "usable"):
        assert word in result.stdout
    assert result.stderr == ""


def test_info_json_is_one_document_with_the_manifest(tiny_path: Path) -> None:
    result = run("info", tiny_path, "--json")
    document = json.loads(result.stdout)
    manifest = json.loads((tiny_path / "manifest.json").read_text())
    del manifest["manifest_sha256"]
    assert document["manifest"] == manifest
    assert document["engine"]["devices"]["cpu"] is None
    assert result.stderr == ""


def test_info_checks_every_file(bundle: Path) -> None:
    data = bytearray((bundle / "golden.npz").read_bytes())
    data[-1] ^= 1
    (bundle / "golden.npz").write_bytes(data)
    refused(r"golden.npz was altered", "info", bundle)
    refused(r"golden.npz was altered", "info", bundle, "--json")


@pytest.mark.parametrize(
    "quality",
    [{"psnr_lost_db": "x"}, {"kept_fp32": []}, {"kept_fp32": None}, {"kept_fp32": {"encoder": 3}}, {"examples": [1]}],
)
def test_info_refuses_a_quality_of_nonsense_in_words(bundle: Path, resign: Any, quality: dict[str, Any]) -> None:
    resign(bundle, lambda data: data["precisions"]["fp32"].update(quality=quality))
    refused(rf"precisions.fp32.quality.{next(iter(quality))} is .*; expected", "info", bundle)


def test_info_says_of_a_quality_what_there_is(bundle: Path, resign: Any) -> None:
    def describe(quality: dict[str, Any]) -> str:
        resign(bundle, lambda data: data["precisions"]["fp32"].update(quality=quality))
        return run("info", bundle).stdout

    full = {"psnr_lost_db": 0.01, "nats_lost_per_dimension": None, "examples": 8, "kept_fp32": {"encoder": ["a"]}}
    assert "loses 0.01 dB of PSNR on 8 examples, within the budget; nodes in fp32: 1\n" in describe(full)
    little = {"psnr_lost_db": None, "calibration_examples": 3}
    assert "loses an amount that is not stated, within the budget; nodes in fp32: 0\n" in describe(little)


def test_info_shows_what_is_nested_and_refuses_what_is_nested_without_end(bundle: Path, resign: Any) -> None:
    def nested(depth: int) -> Callable[[dict[str, Any]], None]:
        return lambda data: data["training"].update(deep=json.loads("[" * depth + "]" * depth))

    resign(bundle, nested(62))
    for options in ([], ["--json"]):
        assert run("info", bundle, *options).exit_code == 0
    resign(bundle, nested(63))
    refused("manifest.json is not valid JSON: it is nested more than 64 levels deep", "info", bundle)


def test_info_passes_over_a_precision_of_later_versions(bundle: Path, resign: Any) -> None:
    before = run("info", bundle).stdout
    resign(bundle, lambda data: data["precisions"].update(int4={"encoder": "encoder.onnx", "shards": []}))
    assert run("info", bundle).stdout == before


def test_selftest_passes_with_0_and_fails_with_3(bundle: Path, resign: Any) -> None:
    result = run("selftest", bundle)
    assert (result.exit_code, result.stderr) == (0, "")
    assert "passed on cpu in fp32" in result.stdout
    with np.load(bundle / "golden.npz") as archive:
        arrays = {name: archive[name] for name in archive.files}
    arrays["mean"] = arrays["mean"] + np.float32(0.1)
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    resign(bundle, golden=stream.getvalue())
    result = run("selftest", bundle)
    assert (result.exit_code, result.stderr) == (3, "")
    assert "FAILED on cpu in fp32" in result.stdout
    result = run("selftest", bundle, "--json")
    assert result.exit_code == 3
    document = json.loads(result.stdout)
    assert document["passed"] is False
    assert document["errors"]["mean"] > document["tolerance"]


def test_selftest_warms_up_for_the_batch_sizes_that_it_is_given(
    bundle: Path, free_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warmed = []
    monkeypatch.setattr(VAE, "warmup", lambda vae, batches, size: warmed.append((batches, size)))
    assert run("selftest", bundle, "--batch", "1", "--batch", "32").exit_code == 0
    assert run("selftest", free_path, "--batch", "2").exit_code == 0
    assert run("selftest", free_path).exit_code == 0
    with VAE.load(free_path) as vae:
        assert warmed == [((1, 32), None), ((2,), vae.golden()["x"].shape[2:])]


def test_selftest_json_has_no_nan(bundle: Path, resign: Any) -> None:
    onnx = pytest.importorskip("onnx")
    model = onnx.load(bundle / "encoder.onnx")
    for tensor in model.graph.initializer:
        if tensor.name == "mean.bias":
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.full(4, np.nan, np.float32), tensor.name))
    resign(bundle, encoder=model.SerializeToString())
    result = run("selftest", bundle, "--json")
    assert result.exit_code == 3
    assert json.loads(result.stdout)["errors"]["mean"] is None


# --- encode, decode ---------------------------------------------------------------------------------------------------


def test_encode_writes_mean_logvar_and_names_of_more_examples_than_a_batch(
    tiny: VAE, tiny_path: Path, npy: Path, pixels: np.ndarray, tmp_path: Path, litter: Callable[[], list[str]]
) -> None:
    assert len(pixels) > 2 * BATCH
    result = run("encode", tiny_path, npy, "--output", tmp_path / "out.npz")
    size = (tmp_path / "out.npz").stat().st_size
    rate = 8 * size / pixels.size
    said = f"{tmp_path / 'out.npz'}: 150 examples, {size:,} bytes, {rate:.2f} bits per pixel\n"
    assert (result.exit_code, result.stdout, result.stderr) == (0, said, "")
    expected = tiny.encode(pixels)
    with np.load(tmp_path / "out.npz") as found:
        assert sorted(found.files) == ["decoder", "logvar", "mean", "names", "size"]
        assert np.allclose(found["mean"], expected.mean, **CLOSE)
        assert np.allclose(found["logvar"], expected.logvar, **CLOSE)
        assert found["names"].tolist() == [f"pixels.npy#{index}" for index in range(150)]
        assert found["mean"].dtype == np.float32
    assert litter() == []


def test_encode_names_pictures_by_their_paths_in_sorted_order(tiny_path: Path, pictures: Path, tmp_path: Path) -> None:
    extra = save_png(tmp_path / "other" / "z.png", np.zeros((8, 8), np.uint8))
    assert run("encode", tiny_path, extra, pictures, "--output", tmp_path / "out.npz").exit_code == 0
    with np.load(tmp_path / "out.npz") as found:
        assert found["names"].tolist() == [str(extra), *(str(pictures / f"p{n}.png") for n in range(3))]


def test_pictures_and_arrays_give_the_same_latents(
    tiny_path: Path, pictures: Path, pixels: np.ndarray, tmp_path: Path
) -> None:
    np.savez(tmp_path / "three.npz", images=pixels[:3], labels=np.arange(3))
    np.savez_compressed(tmp_path / "floats.npz", x=(pixels[:3] / 255).astype(np.float32)[:, None])
    means = []
    for source in (pictures, tmp_path / "three.npz", tmp_path / "floats.npz"):
        assert run("encode", tiny_path, source, "--output", tmp_path / "out.npz", "--force").exit_code == 0
        with np.load(tmp_path / "out.npz") as found:
            means.append(found["mean"])
    assert np.array_equal(means[0], means[1])
    assert np.array_equal(means[0], means[2])


def test_encode_of_an_autoencoder_has_no_logvar_and_golden_needs_no_file(vectors_path: Path, tmp_path: Path) -> None:
    assert run("encode", vectors_path, "--golden", "--output", tmp_path / "out.npz").exit_code == 0
    with np.load(tmp_path / "out.npz") as found, np.load(vectors_path / "golden.npz") as golden:
        assert sorted(found.files) == ["decoder", "mean", "names"]
        assert np.allclose(found["mean"], golden["mean"], **CLOSE)
        assert found["names"].tolist() == [f"golden#{index}" for index in range(4)]


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".png", ""])
def test_decode_of_encoded_latents_to_every_kind_of_output(
    tiny: VAE, tiny_path: Path, npy: Path, pixels: np.ndarray, tmp_path: Path, suffix: str, litter: Any
) -> None:
    run("encode", tiny_path, npy, "--output", tmp_path / "z.npz")
    output = tmp_path / f"out{suffix}"
    result = run("decode", tiny_path, tmp_path / "z.npz", "--output", output)
    assert (result.exit_code, result.stdout, result.stderr) == (0, f"{output}: 150 examples\n", "")
    expected = tiny.reconstruct(pixels)
    if suffix == ".npy":
        assert np.allclose(np.load(output), expected, **CLOSE)
    elif suffix == ".npz":
        with np.load(output) as found:
            assert found.files == ["reconstruction"]
            assert np.allclose(found["reconstruction"], expected, **CLOSE)
    elif suffix == ".png":
        sheet = read_png(output)
        assert sheet.shape == (12 * 66 + 2, 13 * 66 + 2)
        last = sheet[11 * 66 + 2 : 12 * 66, 6 * 66 + 2 : 7 * 66][::8, ::8]
        assert np.abs(last.astype(int) - to_uint8(expected)[149]).max() <= 1
    else:
        assert sorted(path.name for path in output.iterdir()) == [f"{index:06d}.png" for index in range(150)]
        assert np.abs(read_png(output / "000149.png").astype(int) - to_uint8(expected)[149]).max() <= 1
    assert litter() == []


def test_decode_prefers_z_to_mean(tiny: VAE, tiny_path: Path, tmp_path: Path) -> None:
    z = np.random.default_rng(0).normal(size=(2, 4)).astype(np.float32)
    np.savez(tmp_path / "both.npz", mean=np.zeros((2, 4), np.float32), z=z)
    run("decode", tiny_path, tmp_path / "both.npz", "--output", tmp_path / "out.npy")
    assert np.allclose(np.load(tmp_path / "out.npy"), tiny.decode(z), **CLOSE)


# --- sample, reconstruct, interpolate ---------------------------------------------------------------------------------


def test_sample_is_the_librarys_and_repeats(tiny: VAE, tiny_path: Path, tmp_path: Path) -> None:
    for number in range(2):
        arguments = ("-n", 70, "--seed", 5, "--temperature", 0.5, "--output", tmp_path / f"{number}.npy")
        assert run("sample", tiny_path, *arguments).exit_code == 0
    assert (tmp_path / "0.npy").read_bytes() == (tmp_path / "1.npy").read_bytes()
    assert np.allclose(np.load(tmp_path / "0.npy"), tiny.sample(70, seed=5, temperature=0.5), **CLOSE)


def test_sample_from_another_prior_and_truncated(bundle: Path, give_prior: Any, tmp_path: Path) -> None:
    give_prior(bundle, GaussianMixture(np.ones(1), np.ones((1, 4)), 2 * np.eye(4)[None]))
    with VAE.load(bundle) as vae:
        for prior, truncation in (("fitted", None), ("fitted", 0.5), ("standard", 0.5)):
            options = ["--prior", prior] + ([] if truncation is None else ["--truncation", truncation])
            assert run("sample", bundle, "-n", 9, *options, "--output", tmp_path / "o.npy", "--force").exit_code == 0
            expected = vae.sample(9, seed=0, prior=prior, truncation=truncation)
            assert np.allclose(np.load(tmp_path / "o.npy"), expected, **CLOSE)


def test_grid_of_too_many_says_how_many_it_shows(tiny_path: Path, tmp_path: Path) -> None:
    result = run("sample", tiny_path, "-n", GRID_LIMIT + 44, "--output", tmp_path / "out.png")
    assert result.stdout == f"{tmp_path / 'out.png'}: 256 examples\n"
    assert f"shows the first 256 of {GRID_LIMIT + 44}; name an .npz file or a folder for all" in result.stderr
    assert read_png(tmp_path / "out.png").shape == (16 * 66 + 2, 16 * 66 + 2)
    few = (tmp_path / "out.png").read_bytes()
    result = run("sample", tiny_path, "-n", 10**12, "--output", tmp_path / "many.png")  # no more are drawn than shown
    assert "shows the first 256 of 1000000000000" in result.stderr
    assert (tmp_path / "many.png").read_bytes() == few


def test_nothing_is_computed_that_the_picture_does_not_show(tiny: VAE, tiny_path: Path, tmp_path: Path) -> None:
    x = np.random.default_rng(0).random((GRID_LIMIT + 100, 1, 8, 8), np.float32)
    z = tiny.encode(x).mean
    x[-1], z[-1] = np.nan, np.nan  # which would be refused
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "z.npy", z)
    for command in ("reconstruct", "decode"):
        given = tmp_path / ("x.npy" if command == "reconstruct" else "z.npy")
        result = run(command, tiny_path, given, "--output", tmp_path / f"{command}.png")
        assert result.exit_code == 0, result.output
        assert f"shows the first 256 of {GRID_LIMIT + 100};" in result.stderr
        assert run(command, tiny_path, given, "--output", tmp_path / f"{command}.npy").exit_code == 1


def test_reconstruct_shows_originals_above_their_reconstructions(
    tiny: VAE, tiny_path: Path, npy: Path, pixels: np.ndarray, tmp_path: Path
) -> None:
    run("reconstruct", tiny_path, npy, "--output", tmp_path / "out.png")
    sheet = read_png(tmp_path / "out.png")
    cells = [
        [sheet[r * 66 + 2 : (r + 1) * 66, c * 66 + 2 : (c + 1) * 66][::8, ::8] for c in range(16)] for r in range(20)
    ]
    expected = to_uint8(tiny.reconstruct(pixels))
    for index in (0, 15, 16, 149):
        row, column = 2 * (index // 16), index % 16
        assert np.array_equal(cells[row][column], pixels[index])
        assert np.abs(cells[row + 1][column].astype(int) - expected[index]).max() <= 1
    assert (cells[19][15] == 255).all()


def test_rows_are_paired_and_filled_with_white() -> None:
    originals, images = np.zeros((3, 1, 1), np.uint8), np.ones((3, 1, 1), np.uint8)
    assert pair_rows(originals, images, 2).ravel().tolist() == [0, 0, 1, 1, 0, 255, 1, 255]


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("count", [1, 3, 20])
def test_a_picture_too_large_for_its_format_is_refused_with_the_first_batch(
    count: int, pairs: bool, tiny: VAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = np.zeros((count, 1, 8, 8), np.float32)
    for output in ("o.png", "o.webp"):  # the side of the first is what the second may just have
        with open_sink(str(tmp_path / output), tiny.manifest.input, count, False) as sink:
            for image in images:
                sink.add(image[None], ["#"], image[None] if pairs else None)
        monkeypatch.setitem(_LARGEST_SIDE, "webp", max(read_png(tmp_path / output).shape))
    monkeypatch.setitem(_LARGEST_SIDE, "webp", _LARGEST_SIDE["webp"] - 1)
    stack = contextlib.ExitStack()
    sink = stack.enter_context(open_sink(str(tmp_path / "p.webp"), tiny.manifest.input, count, False))
    with pytest.raises(InputError, match=r"p.webp would have \d+x\d+ pixels .*; webp has at most \d+ on a side"):
        sink.add(images[:1], ["#"], images[:1] if pairs else None)


def test_a_picture_too_large_in_a_folder_is_called_by_its_own_name(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(_LARGEST_SIDE, "webp", 7)
    out = tmp_path / "out"
    refused("^Error: 000000.webp would have 8x8", "sample", tiny_path, "-n", 2, "--format", "webp", "--output", out)
    assert list(tmp_path.iterdir()) == []


def test_reconstruct_to_a_folder_keeps_names_and_never_loses_one(
    tiny_path: Path, pictures: Path, tmp_path: Path
) -> None:
    save_png(tmp_path / "more" / "P1.png", np.zeros((8, 8), np.uint8))
    save_png(tmp_path / "more" / "p1-2.png", np.zeros((8, 8), np.uint8))
    assert run("reconstruct", tiny_path, pictures, tmp_path / "more", "--output", tmp_path / "out").exit_code == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "P1-2.png", "p0.png", "p1-2-2.png", "p1.png", "p2.png"
    ]  # fmt: skip


def test_reconstruct_of_vectors_and_of_golden_inputs(vectors_path: Path, rgb_path: Path, tmp_path: Path) -> None:
    assert run("reconstruct", vectors_path, "--golden", "--output", tmp_path / "v.npy").exit_code == 0
    with np.load(vectors_path / "golden.npz") as golden:
        assert np.allclose(np.load(tmp_path / "v.npy"), golden["reconstruction"], **CLOSE)
    assert run("reconstruct", rgb_path, "--golden", "--output", tmp_path / "c.png").exit_code == 0
    assert read_png(tmp_path / "c.png").shape[2] == 3
    refused("v.png cannot be written: only grey and RGB images become pictures; name an .npy or .npz",
            "reconstruct", vectors_path, "--golden", "--output", tmp_path / "v.png")  # fmt: skip


def test_interpolate_between_an_array_row_and_a_picture(
    tiny: VAE, tiny_path: Path, npy: Path, pictures: Path, pixels: np.ndarray, tmp_path: Path
) -> None:
    arguments = (f"{npy}#149", pictures / "p1.png", "--steps", 5, "--method", "linear")
    assert run("interpolate", tiny_path, *arguments, "--output", tmp_path / "out.npy").exit_code == 0
    expected = tiny.interpolate(pixels[149:150], pixels[1:2], steps=5, method="linear")
    assert np.allclose(np.load(tmp_path / "out.npy"), expected, **CLOSE)
    assert run("interpolate", tiny_path, *arguments, "--output", tmp_path / "out.png").exit_code == 0
    assert read_png(tmp_path / "out.png").shape == (68, 5 * 66 + 2)
    run("interpolate", tiny_path, *arguments, "--format", "webp", "--output", tmp_path / "folder")
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == [f"{n:06d}.webp" for n in range(5)]


def test_file_whose_name_holds_a_hash_is_a_file(tiny_path: Path, pixels: np.ndarray, tmp_path: Path) -> None:
    path = save_png(tmp_path / "c#1.png", pixels[0])
    assert run("interpolate", tiny_path, path, path, "--output", tmp_path / "out.npy").exit_code == 0


# --- wrong usage and bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("encode", "{bundle}", "--output", "{tmp}/o.npz"), "give either INPUTS or --golden"),
        (("encode", "{bundle}", "{npy}", "--golden", "--output", "{tmp}/o.npz"), "give either INPUTS or --golden"),
        (("encode", "{bundle}", "{npy}"), "Missing option '--output'"),
        (("decode", "{bundle}", "--output", "{tmp}/o.npz"), "Missing argument 'LATENTS'"),
        (("sample", "{bundle}", "-n", "many", "--output", "o.png"), "'many' is not a valid integer"),
        (("interpolate", "{bundle}", "a", "b", "--method", "cubic", "--output", "o.png"), "'cubic' is not one of"),
        (("fly",), "No such command 'fly'"),
        (("info", "{bundle}", "--colour"), "No such option"),
    ],
    ids=range(8),
)
def test_wrong_usage_exits_with_2(
    arguments: tuple[str, ...], message: str, tiny_path: Path, npy: Path, tmp_path: Path
) -> None:
    before = sorted(tmp_path.iterdir())
    refused(message, *(a.format(bundle=tiny_path, npy=npy, tmp=tmp_path) for a in arguments), code=2)
    assert sorted(tmp_path.iterdir()) == before


ENCODE = ("encode", "{bundle}")
BAD_INPUT = [
    (("info", "{tmp}/none.vae"), "none.vae cannot be opened as a bundle: No such file or directory"),
    (("selftest", "{bundle}", "--device", "cuda:9"), "device 'cuda:9' cannot be used"),
    (("selftest", "{bundle}", "--device", "gpu"), "device is 'gpu'; expected 'cpu'"),
    (("selftest", "{bundle}", "--precision", "int8"), "precision 'int8' is not in tiny, which has fp32"),
    (("selftest", "{bundle}", "--threads", "0"), "threads is 0; expected a whole number from 1"),
    ((*ENCODE, "{npy}", "--output", "{tmp}/o.png"), r"output is '.*/o.png'; encode writes .npz, .safetensors"),
    ((*ENCODE, "{npy}", "--output", "{tmp}/none/o.npz"), r"none/o.npz cannot be written: there is no folder .*none"),
    ((*ENCODE, "{npy}", "--output", "{tmp}"), r"exists and is a folder, which is not replaced"),
    ((*ENCODE, "{npy}", "--output", "/proc/o.npz"), r"/proc/o.npz cannot be written"),
    ((*ENCODE, "{tmp}/none.png", "--output", "{tmp}/o.npz"), r"none.png does not exist"),
    ((*ENCODE, "{tmp}/none.npy", "--output", "{tmp}/o.npz"), r"none.npy does not exist"),
    ((*ENCODE, "{tmp}/empty", "--output", "{tmp}/o.npz"), r"empty holds no pictures; looked for .png"),
    ((*ENCODE, "{npy}", "{npy}", "--output", "{tmp}/o.npz"), r"pixels.npy comes with 1 other inputs; give one array"),
    ((*ENCODE, "{tmp}/text.npy", "--output", "{tmp}/o.npz"), r"text.npy cannot be read as .npy"),
    ((*ENCODE, "{tmp}/text.npz", "--output", "{tmp}/o.npz"), r"text.npz cannot be read as .npz"),
    ((*ENCODE, "{tmp}/text.png", "--output", "{tmp}/o.npz"), r"text.png cannot be read as a picture"),
    ((*ENCODE, "{tmp}/folder.npy", "--output", "{tmp}/o.npz"), r"folder.npy cannot be read as .npy: .*directory"),
    ((*ENCODE, "{tmp}/zero.npy", "--output", "{tmp}/o.npz"), r"zero.npy has shape \(0, 8, 8\); expected at least one"),
    ((*ENCODE, "{tmp}/void.npy", "--output", "{tmp}/o.npz"), r"void.npy has values of no bytes, of dtype \|V0"),
    ((*ENCODE, "{tmp}/texts.npy", "--output", "{tmp}/o.npz"), r"texts.npy has values of no bytes, of dtype \|S0"),
    ((*ENCODE, "{tmp}/true.npy", "--output", "{tmp}/o.npz"), r"true.npy cannot be read as .npy: .*\(True, 8, 8\)"),
    ((*ENCODE, "{tmp}/object.npy", "--output", "{tmp}/o.npz"), r"object.npy holds Python objects, which are never"),
    ((*ENCODE, "{tmp}/fortran.npy", "--output", "{tmp}/o.npz"), r"fortran.npy has shape .* in Fortran order; exp"),
    ((*ENCODE, "{tmp}/scalar.npy", "--output", "{tmp}/o.npz"), r"scalar.npy has shape \(\); expected a batch"),
    ((*ENCODE, "{tmp}/cut.npy", "--output", "{tmp}/o.npz"), r"cut.npy ends after 128 of 150 examples: it is truncated"),
    ((*ENCODE, "{tmp}/bomb.npy", "--output", "{tmp}/o.npz"), r"bomb.npy has .* bytes for shape .*: truncated"),
    ((*ENCODE, "{tmp}/negative.npy", "--output", "{tmp}/o.npz"), r"negative.npy has shape \(-5, 8, 8\); expected at"),
    ((*ENCODE, "{tmp}/header.npy", "--output", "{tmp}/o.npz"), r"header.npy cannot be read as .npy"),
    ((*ENCODE, "{tmp}/two.npz", "--output", "{tmp}/o.npz"), "two.npz holds the arrays a, b; expected one"),
    ((*ENCODE, "{tmp}/crc.npz", "--output", "{tmp}/o.npz"), r"crc.npz is damaged after \d+ examples: .*CRC"),
    ((*ENCODE, "{tmp}/float.npy", "--output", "{tmp}/o.npz"), r"float.npy#0 has values from 5 to 248; .*by 255"),
    ((*ENCODE, "{tmp}/late-nan.npy", "--output", "{tmp}/o.npz"), r"late-nan.npy#149 has NaN"),
    ((*ENCODE, "{tmp}/large.png", "--output", "{tmp}/o.npz"), r"large.png has 9x9 pixels; .* exactly 8x8"),
    (("decode", "{bundle}", "{tmp}/text.png", "--output", "{tmp}/o.npy"), "text.png is no file of latents"),
    (("decode", "{bundle}", "{npy}", "--output", "{tmp}/o.npy"), "npy has dtype uint8; expected"),
    (("decode", "{bundle}", "{tmp}/zero.npy", "--output", "{tmp}/o"), "zero.npy has shape"),
    (("sample", "{bundle}", "--output", "{tmp}/o.gif"), r"o.gif has the suffix '.gif'; expected .png"),
    (("sample", "{bundle}", "--output", "-"), "output is '-'; expected the name of a file or folder, as results"),
    (("score", "{bundle}", "{npy}", "--maps", "-"), "output is '-'; expected the name of a file or folder"),
    ((*ENCODE, "{npy}", "--output", "-"), r"output is '-'; encode writes .npz, .safetensors, or without a suffix"),
    (("sample", "{bundle}", "-n", "0", "--output", "{tmp}/o.png"), "n is 0; expected a whole number from 1"),
    (("sample", "{bundle}", "-n", "9" * 25, "--output", "{tmp}/o.npy"), "takes [0-9,]+ bytes, of [0-9,]+ free"),
    (("sample", "{bundle}", "--seed", "-1", "--output", "{tmp}/o.png"), "seed is -1; expected a whole"),
    (("sample", "{bundle}", "--temperature", "nan", "--output", "{tmp}/o.png"), "temperature is nan; expected"),
    (("sample", "{bundle}", "--prior", "fitted", "--output", "{tmp}/o.png"), "vae-export SOURCE --prior gaussian"),
    (("sample", "{vectors}", "--prior", "standard", "--output", "{tmp}/o.npy"), "vae-export SOURCE --prior gaussian"),
    (("sample", "{bundle}", "--truncation", "0", "--output", "{tmp}/o.png"), "truncation is 0.0; expected a finite"),
    (("sample", "{vectors}", "--output", "{tmp}/o.npy"), "is a plain autoencoder, which has no prior"),
    (("reconstruct", "{vectors}", "{tmp}/text.png", "--output", "{tmp}/o.npy"), "takes vectors, from .npy"),
    (("traverse", "{bundle}", "{npy}#1", "--dimension", "1", "--steps", "1000", "--output", "{tmp}/o.webp"),
     r"o.webp would have 68x66002 pixels .height x width.; webp has at most 16383 on a side, take png"),
    (("interpolate", "{bundle}", "{npy}", "{npy}#1", "--output", "{tmp}/o.png"), r"names no single example; write"),
    (("interpolate", "{bundle}", "{npy}#150", "{npy}#1", "--output", "{tmp}/o.png"), "an index from 0 to 149"),
    (("interpolate", "{bundle}", "{tmp}/no#1/a.npy#0", "{npy}#1", "--output", "{tmp}/o.png"), "a.npy does not exist"),
    (("interpolate", "{bundle}", "{tmp}/no#1/a.npy", "{npy}#1", "--output", "{tmp}/o.png"), "no#1/a.npy does not"),
    (("interpolate", "{bundle}", "{npy}#-1", "{npy}#1", "--output", "{tmp}/o.png"), "names no single example"),
    (("interpolate", "{bundle}", "{npy}#0", "{npy}#1", "--steps", "1", "--output", "{tmp}/o.png"), "steps is 1"),
]  # fmt: skip


@pytest.fixture
def bad_files(tmp_path: Path, pixels: np.ndarray, npy: Path) -> Path:
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder.npy").mkdir()
    for suffix in ("npy", "npz", "png"):
        (tmp_path / f"text.{suffix}").write_text("a shopping list")
    np.save(tmp_path / "zero.npy", pixels[:0])
    np.save(tmp_path / "object.npy", np.array([{}, []], object), allow_pickle=True)
    np.save(tmp_path / "fortran.npy", np.asfortranarray(pixels))
    np.save(tmp_path / "scalar.npy", np.float32(1))
    content = npy.read_bytes()
    (tmp_path / "cut.npy").write_bytes(content[:-1])
    (tmp_path / "bomb.npy").write_bytes(content.replace(b"(150, 8, 8), }      ", b"(999999999, 8, 8), }"))
    (tmp_path / "negative.npy").write_bytes(content.replace(b"(150, 8, 8)", b"(-5, 8, 8) "))
    (tmp_path / "header.npy").write_bytes(content.replace(b"(150, 8, 8)", b"(((((((((((")[:80])
    (tmp_path / "true.npy").write_bytes(content.replace(b"(150, 8, 8), }  ", b"(True, 8, 8), }  "[:16]))
    for name, kind in (("void", b"'|V0'"), ("texts", b"'|S0'")):
        (tmp_path / f"{name}.npy").write_bytes(content.replace(b"'|u1'", kind))
    np.savez(tmp_path / "two.npz", a=pixels, b=pixels)
    np.savez(tmp_path / "crc.npz", x=pixels)
    data = bytearray((tmp_path / "crc.npz").read_bytes())
    data[5000] ^= 1
    (tmp_path / "crc.npz").write_bytes(data)
    np.save(tmp_path / "float.npy", pixels[:, None].astype(np.float32))
    late = np.zeros((150, 1, 8, 8), np.float32)
    late[149] = np.nan
    np.save(tmp_path / "late-nan.npy", late)
    save_png(tmp_path / "large.png", np.zeros((9, 9), np.uint8))
    return tmp_path


@pytest.mark.parametrize(("arguments", "message"), BAD_INPUT, ids=[f"{n}-{c[0][0]}" for n, c in enumerate(BAD_INPUT)])
def test_bad_input_is_one_sentence_exit_code_1_and_nothing_written(
    arguments: tuple[str, ...], message: str, tiny_path: Path, vectors_path: Path, npy: Path, bad_files: Path
) -> None:
    before = sorted(bad_files.rglob("*"))
    names = {"bundle": tiny_path, "vectors": vectors_path, "npy": npy, "tmp": bad_files}
    refused(message, *(argument.format(**names) for argument in arguments))
    assert sorted(bad_files.rglob("*")) == before


def test_mutants_of_array_files_are_read_or_refused_in_one_sentence(
    tiny_path: Path, pixels: np.ndarray, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    np.save(tmp_path / "a.npy", pixels[:3])
    np.savez_compressed(tmp_path / "a.npz", x=pixels[:3])
    outcomes = {0: 0, 1: 0}
    for name in ("a.npy", "a.npz"):
        content = (tmp_path / name).read_bytes()
        for _ in range(60):
            data = bytearray(content)
            for _ in range(rng.integers(1, 4)):
                data[rng.integers(len(data))] = rng.integers(256)
            (tmp_path / f"m-{name}").write_bytes(data)
            result = run("encode", tiny_path, tmp_path / f"m-{name}", "--output", tmp_path / "o.npz", "--force")
            assert result.exit_code in (0, 1)
            assert result.stderr.count("\n") == result.exit_code, result.stderr
            outcomes[result.exit_code] += 1
    assert min(outcomes.values()) > 10, outcomes


# --- existing outputs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["encode", "decode", "sample", "reconstruct", "interpolate"])
def test_existing_output_is_kept_unless_forced(command: str, tiny_path: Path, npy: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "z.npy", np.zeros((1, 4), np.float32))
    inputs = {"encode": [npy], "decode": [tmp_path / "z.npy"], "sample": [], "reconstruct": [npy],
              "interpolate": [f"{npy}#0", f"{npy}#1"]}[command]  # fmt: skip
    output = tmp_path / "out.npz"
    output.write_text("precious")
    refused(r"out.npz exists; it is replaced only when", command, tiny_path, *inputs, "--output", output)
    assert output.read_text() == "precious"
    assert run(command, tiny_path, *inputs, "--output", output, "--force").exit_code == 0
    assert zipfile.is_zipfile(output)


@pytest.mark.parametrize(
    ("command", "option", "name"),
    [
        ("encode", "--output", "out.npz"), ("encode", "--output", "out.safetensors"), ("sample", "--output", "out.npy"),
        ("sample", "--output", "out.png"), ("score", "--output", "out.csv"), ("score", "--maps", "out.npy"),
    ],
)  # fmt: skip
def test_an_output_that_comes_meanwhile_is_kept_unless_forced(
    command: str, option: str, name: str, tiny_path: Path, npy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (sinks, latent_files, score_commands):  # so that it is there after this was asked
        monkeypatch.setattr(module, "refuse_other_file", lambda path, force: None)
    (tmp_path / name).write_text("precious")
    inputs = [] if command == "sample" else [npy]
    refused(r"out\..* exists; it is replaced only when", command, tiny_path, *inputs, option, tmp_path / name)
    assert (tmp_path / name).read_text() == "precious"
    assert run(command, tiny_path, *inputs, option, tmp_path / name, "--force").exit_code == 0
    assert (tmp_path / name).read_bytes() != b"precious"


def test_a_picture_with_the_longest_name_there_is_goes_through(tiny_path: Path, tmp_path: Path) -> None:
    name = "目" * 83 + ".png"
    (tmp_path / "in").mkdir()
    write_picture(tmp_path / "in" / name, np.zeros((8, 8), np.uint8))
    assert run("reconstruct", tiny_path, tmp_path / "in", "--output", tmp_path / "out").exit_code == 0
    assert run("encode", tiny_path, tmp_path / "in", "--output", tmp_path / "latents").exit_code == 0
    assert run("encode", tiny_path, tmp_path / "in", "--output", tmp_path / f"{'a' * 251}.npz").exit_code == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]
    assert [path.stem for path in (tmp_path / "latents").iterdir()] == [name[:-4]]


@pytest.mark.parametrize("name", ["folder", "folder.npz", "folder.png", "bundle.vae"])
def test_no_folder_is_ever_replaced_not_even_when_forced(name: str, tiny_path: Path, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "precious").touch()
    refused(
        "exists and is a folder, which is not replaced", "sample", tiny_path, "--output", tmp_path / name, "--force"
    )
    assert [path.name for path in (tmp_path / name).iterdir()] == ["precious"]


def test_failure_halfway_keeps_the_old_output_even_when_forced(tiny_path: Path, bad_files: Path) -> None:
    output = bad_files / "out.npz"
    output.write_text("precious")
    refused(
        "late-nan.npy#149 has NaN",
        "encode",
        tiny_path,
        bad_files / "late-nan.npy",
        "--output",
        output,
        "--force",
    )
    assert output.read_text() == "precious"


def test_full_disk_is_one_sentence_and_leaves_no_litter(
    python: Any, tiny_path: Path, npy: Path, tmp_path: Path
) -> None:
    code = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))
from vae_runtime.cli import main
main(sys.argv[1:])
"""
    before = sorted(tmp_path.iterdir())
    for output in ("o.npz", "o.npy"):
        command = ("encode", tiny_path, npy) if output == "o.npz" else ("sample", tiny_path, "-n", 100)
        result = python(code, *command, "--output", tmp_path / output)
        assert (result.returncode, result.stdout) == (1, "")
        assert result.stderr == f"Error: {tmp_path / output} cannot be written: File too large\n"
        assert sorted(tmp_path.iterdir()) == before


# --- as a process -----------------------------------------------------------------------------------------------------

MAIN = "import sys; from vae_runtime.cli import main; main(sys.argv[1:], prog_name='vae-run')"


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_is_complete(command: str) -> None:
    for option in ("--help", "-h"):
        result = run(*command.split(), option)
        assert result.exit_code == 0
        assert "Usage:" in result.stdout
    if command not in ("", "info"):
        for option in ("--device", "--precision", "--threads"):
            assert option in result.stdout


def test_help_and_version_work_without_engine_and_without_pillow(python: Any) -> None:
    blocked = "import sys; sys.modules.update(onnxruntime=None, PIL=None, torch=None); "
    for arguments in (["--help"], ["sample", "--help"], ["--version"]):
        result = python(blocked + MAIN, *arguments)
        assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"vae-run, version {__version__}\n"


def test_missing_extras_are_named_with_their_cure(python: Any, tiny_path: Path, tmp_path: Path) -> None:
    result = python("import sys; sys.modules['onnxruntime'] = None; " + MAIN, "selftest", tiny_path)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.endswith('which is not installed; run: pip install "vae-edge[cpu]"\n')
    code = "import sys; sys.modules['PIL'] = None; " + MAIN
    for name in ("out.png", "out"):  # before any of a billion is drawn
        result = python(code, "sample", tiny_path, "-n", 10**9, "--output", tmp_path / name)
        assert (result.returncode, result.stdout) == (1, "")
        cure = 'which is not installed; run: pip install "vae-edge[images]"'
        assert result.stderr == f"Error: writing {tmp_path / name} needs Pillow, {cure}\n"
    assert python(code, "sample", tiny_path, "--output", tmp_path / "out.npy").returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out.npy"]


def test_info_works_without_an_engine(python: Any, tiny_path: Path) -> None:
    result = python("import sys; sys.modules['onnxruntime'] = None; " + MAIN, "info", tiny_path, "--json")
    assert json.loads(result.stdout)["engine"]["onnxruntime"] is None


def test_installed_command_and_closed_pipe(tiny_path: Path) -> None:
    command = Path(sys.executable).parent / "vae-run"
    if not command.exists():
        pytest.skip("the commands are not installed here")
    process = subprocess.run(
        f"'{command}' info '{tiny_path}' | head -c 4",
        shell=True,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert (process.stdout, process.stderr) == ("tiny", "")


def large_npy(path: Path, rows: int) -> Path:
    """uint8 (rows, 8, 8), written in pieces; mostly a hole in the file."""
    with path.open("wb") as stream:
        np.lib.format.write_array_header_1_0(stream, {"descr": "|u1", "fortran_order": False, "shape": (rows, 8, 8)})
        stream.truncate(stream.tell() + rows * 64)
    return path


def test_memory_does_not_grow_with_the_size_of_the_array(python: Any, tiny_path: Path, tmp_path: Path) -> None:
    """16 times the examples: their array alone would take 48 MB more, their reconstructions 192 MB."""
    code = MAIN.replace("main(sys", "main.main(sys").replace(", prog_name='vae-run'", ", standalone_mode=False")
    code += "; import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, file=sys.stderr)"
    peaks = []
    for rows in (3_200, 51_200):
        source = large_npy(tmp_path / f"{rows}.npy", rows)
        arguments = ("reconstruct", tiny_path, source, "--threads", 1, "--output", tmp_path / f"{rows}-out.npy")
        result = python(code, *arguments)
        assert result.returncode == 0, result.stderr
        peaks.append(float(result.stderr.splitlines()[-1]))
    assert (tmp_path / "51200-out.npy").stat().st_size > 12_000_000
    assert peaks[1] - peaks[0] < 25, peaks


def test_control_c_in_a_long_encode_returns_at_once_and_leaves_nothing(tiny_path: Path, tmp_path: Path) -> None:
    source = large_npy(tmp_path / "long.npy", 3_000_000)
    process = subprocess.Popen(
        [sys.executable, "-c", MAIN, "encode", str(tiny_path), str(source), "--output", str(tmp_path / "out.npz")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 40
    while not any(path.stat().st_size for path in tmp_path.glob(".out.npz.*/mean")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    start = time.monotonic()
    stdout, stderr = process.communicate(timeout=30)
    assert time.monotonic() - start < 5
    assert process.returncode == 1
    assert stdout == ""
    assert stderr.strip() == "Aborted!"
    assert [path.name for path in tmp_path.iterdir()] == ["long.npy"]


def test_control_c_while_a_folder_of_pictures_is_written_leaves_nothing(tiny_path: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", MAIN, "sample", str(tiny_path), "-n", "30000", "--output", str(tmp_path / "out")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 40
    while not any(tmp_path.glob(".out.*/*.png")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=30)
    assert (process.returncode, stdout, stderr.strip()) == (1, "", "Aborted!")
    assert list(tmp_path.iterdir()) == []


def test_progress_stays_off_where_stderr_is_no_terminal(tiny_path: Path, npy: Path, tmp_path: Path) -> None:
    pty = pytest.importorskip("pty")
    reader, writer = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", MAIN, "encode", str(tiny_path), str(npy), "--output", str(tmp_path / "out.npz")],
        stdout=subprocess.PIPE, stderr=writer, text=True,
    )  # fmt: skip
    stdout, _ = process.communicate(timeout=60)
    os.close(writer)
    shown = b""
    with contextlib.suppress(OSError):
        while chunk := os.read(reader, 4096):
            shown += chunk
    os.close(reader)
    assert b"encoding" in shown
    assert re.fullmatch(rf"{tmp_path / 'out.npz'}: 150 examples, [\d,]+ bytes, [\d.]+ bits per pixel\n", stdout)


def test_arrays_that_cannot_be_begun_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written"), ArrayWriter(tmp_path / "a.npz", {"a/b": (1,)}):
        pytest.fail("there is nothing to write to")
    assert list(tmp_path.iterdir()) == []


def test_arrays_are_written_as_numpy_writes_them(tmp_path: Path) -> None:
    batches = [np.arange(6, dtype=np.float32).reshape(2, 3), np.arange(3, dtype=np.float32).reshape(1, 3)]
    whole, codes, names = np.concatenate(batches), np.arange(4, dtype=np.uint8), np.array(["é", "bc"])
    with ArrayWriter(tmp_path / "a.npy", {"x": (3, 3)}) as writer:
        for batch in batches:
            writer.append(x=batch)
    with ArrayWriter(tmp_path / "a.npz", {"x": (3, 3), "codes": (4,)}, {"codes": np.uint8}) as writer:
        for batch in batches:
            writer.append(x=batch)
        writer.append(codes=codes)
        writer.extra = {"names": names}
    np.save(tmp_path / "b.npy", whole)
    np.savez(tmp_path / "b.npz", x=whole, codes=codes, names=names)
    for suffix in ("npy", "npz"):
        assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux tells what a process has mapped")
def test_no_part_is_in_use_where_arrays_cannot_be_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else Windows leaves it there."""

    class Full:
        def __array__(self, *_: object, **__: object) -> np.ndarray:
            raise OSError(errno.ENOSPC, "No space left on device")

    def remove(folder: Path, **_: object) -> None:
        opened = [os.path.realpath(file) for file in Path("/proc/self/fd").iterdir()]
        in_use.extend(
            line for line in (*Path("/proc/self/maps").read_text().splitlines(), *opened) if str(folder) in line
        )

    def write() -> None:
        with ArrayWriter(tmp_path / "a.npz", {"x": (2, 3)}) as writer:
            writer.append(x=np.zeros((2, 3)))
            writer.extra = {"names": Full()}

    in_use: list[str] = []
    monkeypatch.setattr("vae_runtime.sinks.shutil.rmtree", remove)
    with pytest.raises(OutputError, match="No space left"):
        write()
    assert in_use == []


def test_array_errors_name_the_file_and_its_whole_shape(tiny_path: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "wide.npy", np.zeros((300, 7), np.float32))
    np.save(tmp_path / "latents.npy", np.zeros((300, 5), np.float32))
    broken = np.zeros((70, 1, 8, 8), np.float32)
    broken[65] = np.nan
    np.save(tmp_path / "broken.npy", broken)
    out = tmp_path / "out.npz"
    refused(r"wide.npy has shape \(300, 7\); expected", "encode", tiny_path, tmp_path / "wide.npy", "--output", out)
    refused(r"latents.npy has shape \(300, 5\)", "decode", tiny_path, tmp_path / "latents.npy", "--output", out)
    message = "broken.npy#65 has NaN"
    refused(message, "encode", tiny_path, tmp_path / "broken.npy", "--output", out)
    assert not out.exists()
