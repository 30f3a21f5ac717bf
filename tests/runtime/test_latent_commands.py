"""`vae-run traverse`, `map` and `nearest`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest

from vae_runtime import VAE, to_uint8
from vae_runtime.latent_space import map_rows, principal_axes

from .test_cli import CLOSE, read_png, refused, run, save_png


@pytest.fixture
def active(bundle: Path, resign: Any) -> Path:
    """The tiny bundle with two active units of four: 2 more than 0."""
    units = {"variances": [0.3, 0.001, 0.9, 0.0], "threshold": 0.01, "examples": 100}
    return Path(resign(bundle, lambda data: data["latent"].update(active_units=units)))


def cells(sheet: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """A grid of 8x8 images, enlarged 8 times -> uint8 (rows, columns, 8, 8)."""
    assert sheet.shape == (rows * 66 + 2, columns * 66 + 2)
    return np.stack(
        [
            [sheet[r * 66 + 2 : (r + 1) * 66, c * 66 + 2 : (c + 1) * 66][::8, ::8] for c in range(columns)]
            for r in range(rows)
        ]
    )


def close_pictures(found: np.ndarray, expected: np.ndarray) -> bool:
    return bool(np.abs(found.astype(int) - to_uint8(expected)).max() <= 1)


# --- traverse ---------------------------------------------------------------------------------------------------------


def test_traverse_draws_a_row_per_active_unit_the_most_active_first(
    tiny: VAE, active: Path, npy: Path, pixels: np.ndarray, tmp_path: Path
) -> None:
    result = run("traverse", active, f"{npy}#7", "--steps", 5, "--range", "-2,1", "--output", tmp_path / "o.png")
    said = f"{tmp_path / 'o.png'}: 10 examples, 2 rows from -2 to 1: units 2, 0\n"
    assert (result.exit_code, result.stdout, result.stderr) == (0, said, "")
    found = cells(read_png(tmp_path / "o.png"), 2, 5)
    for row, unit in zip(found, (2, 0), strict=True):
        assert close_pictures(row, tiny.traverse(pixels[7:8], unit, np.linspace(-2, 1, 5)))


def test_traverse_of_named_units_needs_no_measured_ones(
    tiny: VAE, tiny_path: Path, pictures: Path, pixels: np.ndarray, tmp_path: Path
) -> None:
    options = ("--dimension", 3, "--dimension", 1, "--dimension", 3, "--output", tmp_path / "o.npy")
    result = run("traverse", tiny_path, pictures / "p2.png", *options)
    assert result.stdout.endswith("22 examples, 2 rows from -3 to 3: units 3, 1\n")
    rows = [tiny.traverse(pixels[2:3], unit, np.linspace(-3, 3, 11)) for unit in (3, 1)]
    assert np.allclose(np.load(tmp_path / "o.npy"), np.concatenate(rows), **CLOSE)


def test_a_picture_of_a_traversal_shows_every_row(tiny_path: Path, pictures: Path, tmp_path: Path) -> None:
    options = [word for unit in range(4) for word in ("--dimension", unit)]
    result = run("traverse", tiny_path, pictures / "p0.png", *options, "--steps", 80, "--output", tmp_path / "o.png")
    assert (result.exit_code, result.stderr) == (0, "")
    assert (cells(read_png(tmp_path / "o.png"), 4, 80)[3] < 255).any(axis=(1, 2)).all()


def test_traverse_of_channels_of_vectors_and_of_free_sizes(
    rgb_path: Path, vectors_path: Path, free_path: Path, tmp_path: Path
) -> None:
    np.save(tmp_path / "v.npy", np.zeros((2, 5), np.float32))
    options = ("--dimension", 1, "--steps", 3, "--output")
    assert run("traverse", vectors_path, tmp_path / "v.npy#1", *options, tmp_path / "o.npy").exit_code == 0
    assert np.load(tmp_path / "o.npy").shape == (3, 5)
    for path, shape in ((rgb_path, (6, 5, 3)), (free_path, (8, 12, 3))):
        picture = save_png(tmp_path / "p.png", np.zeros(shape, np.uint8))
        assert run("traverse", path, picture, *options, tmp_path / "o.npz", "--force").exit_code == 0
        with np.load(tmp_path / "o.npz") as found:
            assert found["reconstruction"].shape == (3, 3, *shape[:2])


# --- map --------------------------------------------------------------------------------------------------------------


def test_map_shows_the_plane_of_the_two_most_active_units(tiny: VAE, active: Path, tmp_path: Path) -> None:
    result = run("map", active, "--steps", 18, "--output", tmp_path / "o.png")
    said = f"{tmp_path / 'o.png'}: 324 examples; to the right unit 2, upwards unit 0\n"
    assert (result.exit_code, result.stdout, result.stderr) == (0, said, "")
    found = cells(read_png(tmp_path / "o.png"), 18, 18)
    for row, column in ((0, 0), (0, 17), (17, 3)):
        latent = np.zeros((1, 4), np.float32)
        latent[0, 2] = NormalDist().inv_cdf((column + 0.5) / 18)
        latent[0, 0] = -NormalDist().inv_cdf((row + 0.5) / 18)
        assert close_pictures(found[row, column][None], tiny.decode(latent))


def test_map_of_inputs_shows_their_principal_axes(
    tiny: VAE, tiny_path: Path, npy: Path, pixels: np.ndarray, tmp_path: Path
) -> None:
    result = run("map", tiny_path, npy, "--steps", 4, "--output", tmp_path / "o.npy")
    axes = principal_axes([tiny.encode(pixels).mean])
    right, up = axes.parts
    assert result.stdout.endswith(f"to the right {right:.1%} of the variance of 150 latents, upwards {up:.1%}\n")
    expected = tiny.decode(np.concatenate(list(map_rows(axes, (4,), 4))))
    assert np.allclose(np.load(tmp_path / "o.npy"), expected, rtol=1e-4, atol=1e-5)


def test_map_of_inputs_shows_their_most_active_units(
    tiny: VAE, tiny_path: Path, npy: Path, pixels: np.ndarray, tmp_path: Path
) -> None:
    result = run("map", tiny_path, npy, "--axes", "active", "--steps", 3, "--output", tmp_path / "o.npy")
    means = tiny.encode(pixels).mean
    right, up = np.argsort(-means.var(axis=0))[:2]
    assert result.stdout.endswith(f"9 examples; to the right unit {right}, upwards unit {up}\n")
    latent = means.mean(axis=0, keepdims=True)
    assert np.allclose(np.load(tmp_path / "o.npy")[4:5], tiny.decode(latent), rtol=1e-4, atol=1e-5)
    latent[0, right] += means[:, right].std() * NormalDist().inv_cdf(5 / 6)
    assert np.allclose(np.load(tmp_path / "o.npy")[5:6], tiny.decode(latent), rtol=1e-4, atol=1e-5)


def test_map_of_an_autoencoder_and_of_spatial_latents_is_of_inputs(
    vectors_path: Path, rgb_path: Path, free_path: Path, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    np.save(tmp_path / "vectors.npy", rng.normal(size=(9, 5)).astype(np.float32))
    np.save(tmp_path / "rgb.npy", rng.integers(0, 256, (9, 6, 5, 3), np.uint8))
    np.save(tmp_path / "free.npy", rng.integers(0, 256, (9, 4, 6, 3), np.uint8))
    for path, name, shape in (
        (vectors_path, "vectors", (5,)), (rgb_path, "rgb", (3, 6, 5)), (free_path, "free", (3, 4, 6)),
    ):  # fmt: skip
        for axes in ("pca", "active"):
            options = ("--axes", axes, "--steps", 3, "--output", tmp_path / "o.npy", "--force")
            assert run("map", path, tmp_path / f"{name}.npy", *options).exit_code == 0
            assert np.load(tmp_path / "o.npy").shape == (9, *shape)


# --- nearest ----------------------------------------------------------------------------------------------------------


def test_nearest_names_references_and_distances(
    tiny: VAE, tiny_path: Path, npy: Path, pictures: Path, pixels: np.ndarray
) -> None:
    indices, distances = tiny.nearest(pixels[:3], tiny.encode(pixels).mean, k=4)
    result = run("nearest", tiny_path, pictures, "--references", npy, "-k", 4, "--json")
    document = json.loads(result.stdout)
    assert (result.exit_code, result.stderr, document["references"]) == (0, "", 150)
    assert [one["name"] for one in document["queries"]] == [str(pictures / f"p{n}.png") for n in range(3)]
    for one, expected, gaps in zip(document["queries"], indices, distances, strict=True):
        assert [other["index"] for other in one["nearest"]] == expected.tolist()
        assert [other["name"] for other in one["nearest"]] == [f"pixels.npy#{index}" for index in expected]
        assert np.allclose([other["distance"] for other in one["nearest"]], gaps, atol=1e-5)
    table = run("nearest", tiny_path, pictures, "--references", npy, "-k", 4).stdout.splitlines()
    assert table[0] == "  distance  rank  query -> reference"
    assert len(table) == 13
    assert table[6] == f"{distances[1, 1]:10.4f}     2  {pictures / 'p1.png'} -> pixels.npy#{indices[1, 1]}"


def test_nearest_reads_what_encode_wrote(tiny_path: Path, npy: Path, pictures: Path, tmp_path: Path) -> None:
    expected = run("nearest", tiny_path, f"{npy}#149", "--references", npy).stdout
    assert expected.splitlines()[1].endswith(f"{npy}#149 -> pixels.npy#149")
    run("encode", tiny_path, npy, "--output", tmp_path / "z.npz")
    assert run("nearest", tiny_path, f"{npy}#149", "--encoded", tmp_path / "z.npz").stdout == expected
    run("encode", tiny_path, pictures, "--output", tmp_path / "folder")
    found = run("nearest", tiny_path, pictures / "p1.png", "--encoded", tmp_path / "folder", "-k", 1).stdout
    assert found.endswith(f"{pictures / 'p1.png'} -> {pictures / 'p1.png'}\n")
    more = run("nearest", tiny_path, pictures / "p1.png", *("--references", pictures) * 2, "-k", 6)
    assert len(more.stdout.splitlines()) == 7


# --- wrong usage and bad input ----------------------------------------------------------------------------------------

BAD = [
    (("traverse", "{bundle}", "{npy}#0"), "does not say which .* SOURCE --data DATA, or name units: --dimension 0", 1),
    (("traverse", "{bundle}", "{npy}"), "names no single example; write .*#INDEX", 1),
    (("traverse", "{bundle}", "{npy}#0", "--dimension", "4"), "dimension is 4; the latent, .*, has units 0 to 3", 1),
    (("traverse", "{bundle}", "{npy}#0", "--dimension", "-1"), "--dimension is '-1'; expected the number of a unit", 1),
    (("traverse", "{bundle}", "{npy}#0", "--dimension", "1", "--steps", "1"), "1 is not in the range 2<=x<=1000", 2),
    (("traverse", "{bundle}", "{npy}#0", "--range", "-1,nan"), "'-1,nan' is not of the form LOW,HIGH, two finite", 2),
    (("traverse", "{bundle}", "{npy}#0", "--range", "-1e400,1"), "is not of the form LOW,HIGH, two finite", 2),
    (("traverse", "{bundle}", "{npy}#0", "--range", "3"), "'3' is not of the form LOW,HIGH", 2),
    (("traverse", "{none}", "{npy}#0"), "tiny has no active unit; name units: --dimension 0", 1),
    (("map", "{bundle}"), "does not say which units .* SOURCE --data DATA, or give INPUTS with --axes pca", 1),
    (("map", "{bundle}", "--axes", "pca"), "--axes pca needs INPUTS", 2),
    (("map", "{bundle}", "{npy}", "--steps", "1"), "1 is not in the range 2<=x<=100", 2),
    (("map", "{bundle}", "{npy}", "--steps", "101"), "101 is not in the range 2<=x<=100", 2),
    (("map", "{vectors}"), "is a plain autoencoder, which has no prior to map; give INPUTS", 1),
    (("map", "{none}"), "tiny has 0 active units; a map takes 2, or INPUTS with --axes pca", 1),
    (("map", "{single}"), "tiny has 1 active unit; a map takes 2, or INPUTS with --axes pca", 1),
    (("map", "{wrong}"), "latent.active_units.variances has 3 numbers; the latent has 4 units", 1),
    (("map", "{bundle}", "{tmp}/one.npy"), "the inputs are 1 in number; axes need at least 2", 1),
    (("map", "{free}", "{tmp}/sizes"), r"b.png has a latent of shape \(2, 2, 4\), and those before \(2, 4, 2\)", 1),
]
BAD_SEARCH = [
    (("{npy}#0",), "give either --references or --encoded", 2),
    (("{npy}#0", "--references", "{npy}", "--encoded", "{npy}"), "give either --references or --encoded", 2),
    (("{npy}#0", "--references", "{npy}", "-k", "151"), "k is 151; expected at most the number of references, 150", 1),
    (("{npy}#0", "--references", "{tmp}/none", "-k", "0"), "k is 0; expected a whole number from 1", 1),
    (("{tmp}/none.png", "--references", "{npy}"), "none.png does not exist", 1),
    (("{npy}#150", "--references", "{npy}"), "an index from 0 to 149", 1),
    (("{npy}#0", "--references", "{tmp}/none"), "none does not exist", 1),
    (("{npy}#0", "--encoded", "{npy}"), "pixels.npy has dtype uint8", 1),
    (("{npy}#0", "--encoded", "{tmp}/foreign.npz"), "foreign.npz holds latents of another model than tiny", 1),
    (("{npy}#0", "--encoded", "{tmp}/nan.npy"), "nan.npy#1 has NaN; latents are finite", 1),
]


@pytest.fixture
def places(
    tiny_path: Path, vectors_path: Path, free_path: Path, npy: Path, tmp_path: Path, resign: Any
) -> dict[str, Path]:
    found = {"bundle": tiny_path, "vectors": vectors_path, "free": free_path, "npy": npy, "tmp": tmp_path}
    for name, variances in (("none", [0.0] * 4), ("single", [1.0, 0, 0, 0]), ("wrong", [1.0] * 3)):
        units = {"variances": variances, "threshold": 0.01, "examples": 100}
        folder = shutil.copytree(tiny_path, tmp_path / f"{name}.vae")
        found[name] = resign(folder, lambda data, units=units: data["latent"].update(active_units=units))
    np.save(tmp_path / "one.npy", np.zeros((1, 8, 8), np.uint8))
    np.savez(tmp_path / "foreign.npz", mean=np.zeros((2, 4), np.float32), decoder="0" * 64)
    np.save(tmp_path / "nan.npy", np.array([[0] * 4, [np.nan] * 4], np.float32))
    save_png(tmp_path / "sizes" / "a.png", np.zeros((8, 4, 3), np.uint8))
    save_png(tmp_path / "sizes" / "b.png", np.zeros((4, 8, 3), np.uint8))
    return found


@pytest.mark.parametrize(("arguments", "message", "code"), BAD, ids=range(len(BAD)))
def test_what_cannot_be_drawn_is_said_in_words(
    arguments: tuple[str, ...], message: str, code: int, places: dict[str, Path]
) -> None:
    output = places["tmp"] / "o.npz"
    refused(message, *(one.format(**places) for one in arguments), "--output", output, code=code)
    assert not output.exists()


def test_a_latent_space_of_one_dimension_has_no_plane(bundle: Path, npy: Path, tmp_path: Path, resign: Any) -> None:
    onnx = pytest.importorskip("onnx")
    graphs = {half: onnx.load(bundle / f"{half}.onnx") for half in ("encoder", "decoder")}
    cuts = dict.fromkeys(("mean.weight", "mean.bias", "logvar.weight", "logvar.bias"), np.s_[..., :1])
    cuts["back.weight"] = np.s_[:1]
    for graph in (model.graph for model in graphs.values()):
        for constant in graph.initializer:
            if (cut := cuts.get(constant.name)) is not None:
                array = np.ascontiguousarray(onnx.numpy_helper.to_array(constant)[cut])
                constant.CopyFrom(onnx.numpy_helper.from_array(array, constant.name))
            elif constant.name == "latent_shape":
                constant.CopyFrom(onnx.numpy_helper.from_array(np.array([-1, 1]), constant.name))
        for value in (*graph.input, *graph.output):
            if value.name in ("mean", "logvar", "z"):
                value.type.tensor_type.shape.dim[1].dim_value = 1
    files = {half: model.SerializeToString() for half, model in graphs.items()}
    units = {"variances": [1.0], "threshold": 0.01, "examples": 100}
    resign(bundle, lambda data: data["latent"].update(shape=[1], active_units=units), **files)
    for more in ((), (npy,), (npy, "--axes", "active")):
        refused(
            "^Error: tiny has 1 unit in its latent space; a map takes 2\n$", "map", bundle, *more,
            "--output", tmp_path / "o.npz", code=1,
        )  # fmt: skip


@pytest.mark.parametrize(("arguments", "message", "code"), BAD_SEARCH, ids=range(len(BAD_SEARCH)))
@pytest.mark.parametrize("form", [(), ("--json",)])
def test_what_cannot_be_searched_is_said_in_words(
    arguments: tuple[str, ...], message: str, code: int, form: tuple[str, ...], places: dict[str, Path]
) -> None:
    refused(message, "nearest", places["bundle"], *(one.format(**places) for one in arguments), *form, code=code)


def test_pictures_that_exist_are_kept(active: Path, npy: Path, tmp_path: Path) -> None:
    (tmp_path / "o.png").write_text("precious")
    for command in (("traverse", active, f"{npy}#0"), ("map", active)):
        refused("o.png exists", *command, "--output", tmp_path / "o.png")
    assert (tmp_path / "o.png").read_text() == "precious"
