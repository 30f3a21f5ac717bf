"""`vae-run score` and `vae-run evaluate`."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vae_runtime import VAE
from vae_runtime.calibration import SCORE_METHODS, Calibration
from vae_runtime.detection import auroc, average_precision
from vae_runtime.images import overlay
from vae_runtime.manifest import ActiveUnits

from .test_cli import refused, run

LEVELS = tuple(n / 10 for n in range(11))


@pytest.fixture
def calibrated(bundle: Path, pixels: np.ndarray, resign: Callable[..., Path]) -> Path:
    """The tiny bundle, calibrated on all pixels by two methods."""
    with VAE.load(bundle, threads=1) as vae:
        scores = {
            name: tuple(np.quantile(vae.score(pixels, name), LEVELS).tolist()) for name in ("elbo", "reconstruction")
        }
    calibration = Calibration("data", len(pixels), LEVELS, scores).to_dict()
    return resign(bundle, lambda data: data.update(calibration=calibration))


def read_csv(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


# --- score ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [None, *SCORE_METHODS])
def test_scores_are_those_of_the_library(
    tiny: VAE, tiny_path: Path, npy: Path, pixels: np.ndarray, method: Any
) -> None:
    chosen = () if method is None else ("--method", method)
    document = json.loads(run("score", tiny_path, npy, "--json", "--threads", 1, *chosen).stdout)
    assert document["method"] == (method or "reconstruction")
    np.testing.assert_allclose([row["score"] for row in document["scores"]], tiny.score(pixels, method), rtol=1e-5)
    assert [row["name"] for row in document["scores"][:2]] == ["pixels.npy#0", "pixels.npy#1"]
    assert set(document) == {"method", "scores"}


def test_a_quantile_tells_anomalies_in_every_form(calibrated: Path, npy: Path, pixels: np.ndarray) -> None:
    with VAE.load(calibrated, threads=1) as vae:
        expected, threshold = vae.is_anomaly(pixels, 0.9), vae.manifest.calibration.threshold("reconstruction", 0.9)
    arguments = ("score", calibrated, npy, "--quantile", 0.9, "--threads", 1)
    document = json.loads(run(*arguments, "--json").stdout)
    assert [row["anomaly"] for row in document["scores"]] == expected.tolist()
    assert document["anomalies"] == expected.sum() == 15
    assert (document["quantile"], document["threshold"]) == (0.9, threshold)
    rows = read_csv(run(*arguments, "--csv").stdout)
    assert [row["anomaly"] for row in rows] == [str(int(one)) for one in expected]
    assert [float(row["score"]) for row in rows] == [row["score"] for row in document["scores"]]
    text = run(*arguments).stdout.splitlines()
    assert [line.split()[1] == "yes" for line in text[1:-1]] == expected.tolist()
    assert f"; 15 above {threshold:.6g}, the threshold of quantile 0.9" in text[-1]
    assert text[0].split() == ["score", "anomaly", "name"]


def test_output_is_a_file_of_either_form(calibrated: Path, npy: Path, tmp_path: Path) -> None:
    arguments = ("score", calibrated, npy, "--quantile", 0.5)
    printed = run(*arguments, "--json").stdout, run(*arguments, "--csv").stdout
    for name, text in zip(("a.json", "a.csv"), printed, strict=True):
        result = run(*arguments, "--output", tmp_path / name)
        assert result.stdout.startswith(f"{tmp_path / name}: 150 examples by reconstruction, scores from")
        assert (tmp_path / name).read_text() == text
        refused(r"exists; it is replaced only when", *arguments, "--output", tmp_path / name)
        assert run(*arguments, "--output", tmp_path / name, "--force").exit_code == 0


def test_fail_is_exit_code_3_where_there_is_an_anomaly(calibrated: Path, npy: Path, pictures: Path) -> None:
    assert run("score", calibrated, npy, "--quantile", 0.9).exit_code == 0
    assert run("score", calibrated, npy, "--quantile", 0.9, "--fail").exit_code == 3
    lowest = min(
        (row["score"], row["name"]) for row in json.loads(run("score", calibrated, pictures, "--json").stdout)["scores"]
    )
    assert run("score", calibrated, lowest[1], "--quantile", 0.9, "--fail").exit_code == 0
    refused("--fail needs --quantile", "score", calibrated, npy, "--fail", code=2)


def test_pictures_and_golden_inputs_and_autoencoders_have_scores(
    tiny_path: Path, vectors_path: Path, free_path: Path, pictures: Path
) -> None:
    rows = read_csv(run("score", tiny_path, pictures, "--csv").stdout)
    assert [Path(row["name"]).name for row in rows] == ["p0.png", "p1.png", "p2.png"]
    assert json.loads(run("score", vectors_path, "--golden", "--json").stdout)["method"] == "reconstruction"
    assert len(json.loads(run("score", free_path, "--golden", "--json").stdout)["scores"]) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--quantile", 0.9), r"tiny was not calibrated.*: vae-export SOURCE --calibrate DATA"),
        (("--output", "a.txt"), r"--output is 'a.txt'; expected the name of a .csv or .json file"),
        (("--output", "absent/a.csv"), r"absent/a.csv cannot be written: there is no folder absent"),
        (("--map-scale", 1), r"--map-scale is 1.0; expected a finite number above 0, with --maps"),
        (("--maps", "m.png", "--map-scale", 0), r"--map-scale is 0.0; expected a finite number above 0"),
        (("--maps", "m.gif"), r"m.gif has the suffix '.gif'; expected"),
        (("--maps", "m.npy", "--map-scale", 1), r"--map-scale is for pictures; m.npy holds the errors themselves"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(
    bundle: Path, npy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: Any, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    refused(message, "score", bundle, npy, *arguments)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--quantile", 1), r"quantile is 1.0; expected a number above 0 and below 1"),
        (("--quantile", 0), r"quantile is 0.0; expected a number above 0 and below 1"),
        (("--quantile", "nan"), r"quantile is nan; expected"),
        (("--quantile", 0.999), r"calibrated on 150 examples, which tell quantiles up to 0.9933"),
        (
            ("--quantile", 0.9, "--method", "log_likelihood"),
            r"'log_likelihood' were not calibrated, only by elbo, reconstruction; .* vae-export SOURCE",
        ),
    ],
)
def test_a_quantile_that_there_is_none_of_is_refused(calibrated: Path, npy: Path, arguments: Any, message: str) -> None:
    refused(message, "score", calibrated, npy, *arguments)


def test_wrong_usage_is_told_as_such(tiny_path: Path, vectors_path: Path, npy: Path) -> None:
    refused("give either --csv or --json", "score", tiny_path, npy, "--csv", "--json", code=2)
    refused("what --output writes, its suffix says", "score", tiny_path, npy, "--json", "--output", "a.csv", code=2)
    refused("'entropy' is not one of", "score", tiny_path, npy, "--method", "entropy", code=2)
    refused("give either INPUTS or --golden", "score", tiny_path, code=2)
    refused("plain autoencoder", "score", vectors_path, "--golden", "--method", "elbo")


def test_maps_are_there_only_if_all_went_well_and_refused_before_anything_is_scored(
    tiny_path: Path,
    vectors_path: Path,
    npy: Path,
    tmp_path: Path,
    litter: Callable[[], list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = tmp_path / "maps.npy"
    refused("plain autoencoder", "score", vectors_path, "--golden", "--method", "elbo", "--maps", output)
    assert not output.exists()
    assert litter() == []
    monkeypatch.setattr(VAE, "score", None)
    monkeypatch.setattr(VAE, "score_map", None)
    output.write_text("mine")
    refused("exists", "score", tiny_path, npy, "--maps", output)
    refused("only grey and RGB images become pictures", "score", vectors_path, "--golden", "--maps", tmp_path / "v.png")


def test_info_says_what_was_measured_on_real_data(calibrated: Path, vectors_path: Path, resign: Any) -> None:
    units = ActiveUnits((0.5, 0.02, 0.01, 0.0), 0.01, 77)
    resign(calibrated, lambda data: data["latent"].update(active_units=units.to_dict()))
    lines = run("info", calibrated).stdout.splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("  on data "))
    assert lines[start].endswith("2 of 4 units active (variance of the posterior's mean above 0.01 on 77 examples)")
    assert lines[start + 1].strip() == "calibrated on 150 examples: elbo, reconstruction"
    assert "on data" not in run("info", vectors_path).stdout


# --- maps -------------------------------------------------------------------------------------------------------------


def test_an_overlay_is_grey_where_nothing_is_hot_and_red_where_it_is() -> None:
    images = np.array([[[[0.0, 0.5, 1.0, 0.5]]]], np.float32)
    shown = overlay(images, np.array([[[0.0, 0.0, 1.0, 0.5]]], np.float32))
    np.testing.assert_allclose(shown[0, :, 0].T, [[0, 0, 0], [0.5, 0.5, 0.5], [1, 0, 0], [0.75, 0.25, 0.25]])
    np.testing.assert_allclose(overlay(images, np.full((1, 1, 4), 7.0, np.float32))[0, :, 0].T, 4 * [[1, 0, 0]])
    colours = np.eye(3, dtype=np.float32)[None, :, None]  # (1, 3, 1, 3): a red, a green, a blue pixel
    np.testing.assert_allclose(overlay(colours, np.zeros((1, 1, 3), np.float32))[0, 0, 0], [0.299, 0.587, 0.114])


def test_maps_go_over_the_pictures_by_one_scale(tiny: VAE, tiny_path: Path, pictures: Path, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    result = run("score", tiny_path, pictures, "--maps", tmp_path / "maps", "--threads", 1)
    pixels = np.stack([np.asarray(image.open(pictures / f"p{n}.png")) for n in range(3)])
    maps = tiny.score_map(pixels)
    scale = np.quantile(maps.reshape(3, -1), 0.995, axis=1).max()
    assert f"full red is a squared error of {scale:.3g} and more" in result.stdout
    expected = overlay((pixels[:, None] / 255).astype(np.float32), maps / scale)
    for number in range(3):
        found = np.asarray(image.open(tmp_path / "maps" / f"p{number}.png"))
        np.testing.assert_allclose(found, 255 * np.moveaxis(expected[number], 0, -1), atol=1)


def test_a_scale_may_be_given(tiny_path: Path, npy: Path, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    arguments = ("score", tiny_path, npy, "--json", "--maps", tmp_path / "a.png", "--map-scale", 0.25)
    result = run(*arguments)
    assert "full red is a squared error of 0.25 and more" in result.stderr
    json.loads(result.stdout)
    assert "first" not in result.stderr
    assert image.open(tmp_path / "a.png").mode == "RGB"
    np.save(tmp_path / "many.npy", np.zeros((300, 8, 8), np.uint8))
    result = run("score", tiny_path, tmp_path / "many.npy", "--maps", tmp_path / "many.png")
    assert "and more, in the first 256 of 300\n" in result.stdout


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_maps_themselves_go_into_arrays(
    tiny: VAE,
    tiny_path: Path,
    vectors: VAE,
    vectors_path: Path,
    npy: Path,
    pixels: np.ndarray,
    tmp_path: Path,
    suffix: str,
) -> None:
    file = tmp_path / f"maps{suffix}"
    run("score", tiny_path, npy, "--maps", file, "--threads", 1)
    found = np.load(file) if suffix == ".npy" else np.load(file)["map"]
    np.testing.assert_allclose(found, tiny.score_map(pixels), atol=1e-6)
    assert run("score", vectors_path, "--golden", "--maps", tmp_path / f"v{suffix}").exit_code == 0
    refused("only grey and RGB images become pictures", "score", vectors_path, "--golden", "--maps", tmp_path / "v.png")
    refused("exists", "score", tiny_path, npy, "--maps", file)


def test_maps_of_several_sizes_go_into_a_folder_only(free_path: Path, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    files = []
    for number, (height, width) in enumerate([(8, 12), (10, 12)]):
        array = np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)
        image.fromarray(array).save(tmp_path / f"{number}.png")
        files.append(tmp_path / f"{number}.png")
    assert run("score", free_path, *files, "--maps", tmp_path / "maps").exit_code == 0
    assert image.open(tmp_path / "maps" / "1.png").size == (12, 10)
    for output in ("m.npy", "m.png"):
        refused("different sizes go into a folder", "score", free_path, *files, "--maps", tmp_path / output)
        assert not (tmp_path / output).exists()


# --- evaluate ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def labels(tmp_path: Path, pixels: np.ndarray) -> Path:
    np.save(tmp_path / "labels.npy", np.arange(len(pixels)) % 3)
    return tmp_path / "labels.npy"


def test_evaluate_tells_auroc_and_average_precision_of_every_method(
    tiny: VAE, tiny_path: Path, npy: Path, pixels: np.ndarray, labels: Path
) -> None:
    arguments = ("evaluate", tiny_path, npy, "--labels", labels, "--anomaly-label", 1, "--anomaly-label", 2)
    document = json.loads(run(*arguments, "--json", "--threads", 1).stdout)
    assert (document["anomalies"], document["others"]) == (100, 50)
    assert set(document["methods"]) == set(SCORE_METHODS)
    is_anomaly = np.arange(len(pixels)) % 3 > 0
    for method in ("elbo", "reconstruction"):
        scores = tiny.score(pixels, method)
        assert document["methods"][method] == {
            "auroc": pytest.approx(auroc(scores, is_anomaly), abs=1e-3),
            "average_precision": pytest.approx(average_precision(scores, is_anomaly), abs=1e-3),
        }
    text = run(*arguments, "--method", "elbo").stdout
    assert re.search(rf"elbo +{document['methods']['elbo']['auroc']:.3f}", text)
    assert "log_likelihood" not in text
    assert text.endswith("100 anomalies, 50 others\n")


def test_evaluate_of_an_autoencoder_has_the_method_that_it_has(vectors_path: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(0, 1, (4, 5)).astype(np.float32))
    (tmp_path / "y.csv").write_text("label\n0\n1\n1\n0\n")
    arguments = ("evaluate", vectors_path, tmp_path / "x.npy", "--labels", tmp_path / "y.csv")
    assert set(json.loads(run(*arguments, "--json").stdout)["methods"]) == {"reconstruction"}
    refused("plain autoencoder", *arguments, "--method", "elbo")


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        (np.arange(149) % 2, (), r"labels.npy has shape \(149,\) for 150 examples; expected one label for each"),
        (np.ones(150, int), (), "labels.npy has 150 anomalies among 150 examples; expected some and not all"),
        (np.zeros(150, int), (), "labels.npy has 0 anomalies among 150 examples"),
        (np.arange(150), (), "labels.npy has the label '2'; expected 1 for an anomaly and 0 for none"),
        (np.arange(150), ("--anomaly-label", "x"), "labels.npy has no label 'x'; it has 0, 1, 2"),
    ],
)
def test_labels_that_do_not_match_are_refused_before_anything_is_scored(
    tiny_path: Path, npy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: Any, options: Any, message: str
) -> None:
    monkeypatch.setattr(VAE, "score", None)
    np.save(tmp_path / "labels.npy", values)
    refused(message, "evaluate", tiny_path, npy, "--labels", tmp_path / "labels.npy", *options)


def test_labels_of_these_pictures_in_another_order_are_refused(
    tiny_path: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(VAE, "score", None)
    names = sorted((path.name for path in pictures.iterdir()), reverse=True)
    rows = [f"{name},{index % 2}" for index, name in enumerate(names)]
    (tmp_path / "y.csv").write_text("\n".join(["name,label", *rows]))
    refused("its rows are expected in their order", "evaluate", tiny_path, pictures, "--labels", tmp_path / "y.csv")


def test_evaluate_needs_labels(tiny_path: Path, npy: Path, tmp_path: Path) -> None:
    refused("Missing option '--labels'", "evaluate", tiny_path, npy, code=2)
    refused(r"absent.npy does not exist", "evaluate", tiny_path, npy, "--labels", tmp_path / "absent.npy")
