"""`vae-export` on the command line."""

from __future__ import annotations

import io
import json
import logging
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from vae_export.bundle import write_bundle
from vae_export.cli import _describe, _evenly, _read_examples, _read_more, _Request, main
from vae_export.imported import ImportOptions
from vae_export.importers.options import FLAGS
from vae_runtime import VAE
from vae_runtime.bundle import Bundle
from vae_runtime.images import write_picture
from vae_runtime.manifest import InputSpec, Likelihood
from vae_training.checkpoint import save_checkpoint

from .conftest import make_checkpoint

UNTRAINED = (
    "Warning: no unit of the latent space is active: the posterior's mean varies by less than 0.01 over 40 real inputs,"
    " so that latents carry no information about them; the model has collapsed, or takes its inputs in another range"
)


def run(*arguments: object):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_messages_name_the_options_of_a_source_as_the_command_line_does() -> None:
    flags = {parameter.name: parameter.opts[0] for parameter in main.params}
    names = {field.name for field in fields(ImportOptions)}
    assert {name: flags[name] for name in names} == FLAGS


def test_the_output_is_beside_the_model_by_default(model_file: Path) -> None:
    result = run(model_file)
    assert result.exit_code == 0, result.output
    manifest = Bundle.open(model_file.with_suffix(".vae")).manifest
    assert manifest.name == "noise-conv"
    assert "verified against PyTorch on 80 inputs" in result.stdout
    assert "golden.npz holds 4 real inputs; --golden synthetic keeps them out" in result.stdout
    again = run(model_file)
    assert again.exit_code == 1
    assert "exists; pass --force" in again.stderr


def test_stages_are_told_on_a_terminal_alone(model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    main([str(model_file), "--output", str(tmp_path / "a.vae"), "--precision", "tf32"], standalone_mode=False)
    assert terminal.getvalue().splitlines() == [
        "running the model",
        "exporting the two graphs",
        "comparing them with the model on 80 inputs",
        "computing the golden values",
        "measuring fp32 on 80 inputs",
        "making and measuring tf32",
        "measuring the active units on 40 inputs",
        UNTRAINED,
    ]
    assert (logging.getLogger("vae_export").handlers, logging.getLogger("vae_export").level) == ([], logging.NOTSET)


def test_data_replaces_the_examples_and_json_is_all_of_stdout(model_file: Path, tmp_path: Path) -> None:
    images = np.random.default_rng(3).integers(0, 256, (5, 8, 8), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    target = tmp_path / "out.vae"
    result = run(model_file, "--output", target, "--data", tmp_path / "images.npy", "--name", "mine", "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["manifest"]["golden"]["source"] == "examples"
    assert document["manifest"]["name"] == "mine"
    assert document["manifest"]["precisions"]["fp32"]["fidelity"]["examples"] == 5
    np.testing.assert_array_equal(Bundle.open(target).golden()["x"][:, 0], (images[:4] / 255).astype(np.float32))


@pytest.mark.parametrize(("rows", "said"), [(1, "1 real input;"), (2, "2 real inputs;"), (9, "4 real inputs;")])
def test_the_number_of_real_inputs_in_the_bundle_is_told(
    exported: dict[str, Path], tmp_path: Path, rows: int, said: str
) -> None:
    folder = Path(shutil.copytree(exported["conv"], tmp_path / "a.vae"))
    manifest = Bundle.open(folder).manifest
    golden = {name: value[:rows] for name, value in Bundle.open(folder).golden().items()}
    graphs = {name: (folder / name).read_bytes() for name in ("encoder.onnx", "decoder.onnx")}
    manifest = write_bundle(folder, manifest, graphs, golden, force=True)
    assert f"golden.npz holds {said} --golden synthetic" in _describe(folder, manifest)
    fp32 = manifest.precisions["fp32"]
    fewer = {**manifest.precisions, "fp32": fp32._replace(fidelity={**fp32.fidelity, "examples": rows})}
    told = f"verified against PyTorch on {rows} input{'s' if rows > 1 else ''}\n"
    assert told in _describe(folder, manifest._replace(precisions=fewer))


def test_of_many_rows_those_evenly_spaced_over_all_are_taken(tmp_path: Path) -> None:
    images = np.repeat(np.arange(3000) * 255 // 2999, 64).reshape(3000, 8, 8).astype(np.uint8)  # sorted by brightness
    spec = InputSpec("image", (1, 8, 8), "grey", "exact")
    for count, rows in ((3000, np.arange(1024) * 3000 // 1024), (1024, np.arange(1024)), (5, np.arange(5))):
        np.save(tmp_path / "sorted.npy", images[:count])
        taken = _read_examples((str(tmp_path / "sorted.npy"),), spec, 1024)
        np.testing.assert_array_equal(taken, images[rows])
    assert "evenly spaced over all" in " ".join(run("--help").stdout.split())


def test_row_numbers_of_a_large_file_do_not_overflow_where_numpy_counts_in_32_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arange = np.arange
    monkeypatch.setattr(np, "arange", lambda *a, dtype=np.int32: arange(*a, dtype=dtype))  # numpy 1 on Windows
    rows = _evenly(5_000_000, 1024)
    assert (rows[0], rows[-1], bool((np.diff(rows) > 0).all())) == (0, 4_995_117, True)


def test_of_many_pictures_those_evenly_spaced_over_all_are_read(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    for index in range(20):
        image.fromarray(np.full((8, 8), index, np.uint8)).save(tmp_path / f"{index:02}.png")
    taken = _read_examples((str(tmp_path),), InputSpec("image", (1, 8, 8), "grey", "exact"), 6)
    assert taken[:, 0, 0].tolist() == [0, 3, 6, 10, 13, 16]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.pt"], "absent.pt cannot be read: No such file or directory"),
        (["{model}", "--tolerance", "0"], "tolerance is 0.0; expected a finite number above 0"),
        (["{model}", "--data", "absent.npy"], "absent.npy does not exist"),
        (["{model}", "--golden", "examples"], "golden is 'examples', but none were given"),
        (["{model}", "--output", "absent/a.vae"], "there is no folder absent"),
        (
            ["{model}", "--precision", "fp32,int4"],
            "--precision has 'int4'; expected some of fp32, tf32, fp16, int8, separated by commas",
        ),
        (["{model}", "--budget-psnr", "-1"], "budget.psnr_db is -1.0; expected a finite number from 0"),
        (
            ["{model}", "--prior", "mixture"],
            "prior is 'mixture'; expected 'gaussian', or for 10 components 'mixture:10'",
        ),
        (["{model}", "--calibrate", "absent.npy"], "absent.npy does not exist"),
        (["{model}", "--calibrate", "held-out"], "held_out has 40 examples; expected at least 100"),
        (
            ["{model}", "--calibrate", "held-out", "--calibrate", "a.npy"],
            "--calibrate has 'held-out' and 1 other(s); give one or the other",
        ),
        (
            ["{model}", "--scores", "elbo"],
            "scores is ['elbo'], and nothing is calibrated; it says which scores are (--calibrate)",
        ),
    ],
)
def test_a_failure_is_one_sentence_and_writes_nothing(model_file: Path, arguments: list[str], message: str) -> None:
    before = sorted(model_file.parent.iterdir())
    result = run(*[argument.format(model=model_file) for argument in arguments])
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert sorted(model_file.parent.iterdir()) == before


@pytest.mark.parametrize(
    ("shape", "rule"),
    [
        (
            "3x64",
            "784; a grey image is 1x3x64; what has other axes, as a sequence, goes as one vector: reshape in both",
        ),
        ("1x8x8x8", "784; what has other axes, as a sequence, goes as one vector: reshape in both"),
        ("3xHx64", "784\n"),
        ("0", "784\n"),
    ],
)
def test_a_shape_of_another_form_is_wrong_usage(shape: str, rule: str) -> None:
    result = run("package:factory", "--input", shape)
    assert result.exit_code == 2
    assert f"'{shape}' is not of the form 3x64x64 (channels, height, width), 3xHxW or {rule}" in result.stderr


def test_data_calibrates_and_a_prior_is_fitted_to_more_than_verifies(
    model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vae_export.cli.EXAMPLES_LIMIT", 20)
    monkeypatch.setattr("vae_export.cli.MOST_EXAMPLES", 130)
    images = np.random.default_rng(3).integers(0, 256, (260, 8, 8), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    data = (
        "--data",
        tmp_path / "images.npy",
        "--calibrate",
        tmp_path / "images.npy",
        "--scores",
        "elbo, reconstruction",
    )
    result = run(model_file, "--output", tmp_path / "a.vae", "--prior", "gaussian", *data)
    assert result.exit_code == 0, result.output
    manifest = Bundle.open(tmp_path / "a.vae").manifest
    assert manifest.precisions["fp32"].fidelity["examples"] == 20  # not how many rows fill the largest batch
    assert manifest.latent.fitted_prior is not None
    assert manifest.latent.fitted_prior.examples == 130
    assert manifest.calibration is not None
    assert (manifest.calibration.examples, manifest.calibration.source) == (130, "data")
    with VAE.load(tmp_path / "a.vae", threads=1) as vae:
        scores = vae.score(images[::2], "elbo")  # evenly spaced over all
    assert manifest.calibration.scores["elbo"][-1] == pytest.approx(scores.max(), rel=1e-5)
    units = manifest.latent.active_units
    assert units is not None
    assert f"  {units.active} of 6 units active (variance of the posterior's mean above 0.01 on 40 ex" in result.stdout
    assert "  fitted prior: a Gaussian with full covariance, from 130 examples\n" in result.stdout
    assert "  calibrated on 130 examples: elbo, reconstruction\n" in result.stdout


def test_photographs_calibrate_in_their_own_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("PIL")
    monkeypatch.setattr("vae_export.cli.MOST_EXAMPLES", 110)
    spec, likelihood = InputSpec("image", (3, 16, 16), "rgb", "exact"), Likelihood("gaussian", scale=0.1)
    checkpoint = make_checkpoint("resnet", "vae", spec, likelihood, widths=(8, 8), depth=0)
    save_checkpoint(tmp_path / "model.pt", checkpoint)
    (tmp_path / "photos").mkdir()
    rng, images = np.random.default_rng(0), []
    for index in range(220):
        height, width = rng.integers(16, 40, 2)
        # Detail that is gone from a photograph that is made smaller.
        images.append(rng.integers(0, 256, (height, width, 3), np.uint8))
        write_picture(tmp_path / "photos" / f"{index:03}.png", images[-1])
    result = run(tmp_path / "model.pt", "--output", tmp_path / "a.vae", "--calibrate", tmp_path / "photos")
    assert result.exit_code == 0, result.output
    with VAE.load(tmp_path / "a.vae", threads=1) as vae:
        calibration = vae.manifest.calibration
        scores = [vae.score(image[None], "reconstruction", pad=True)[0] for image in images[::2]]
    assert calibration is not None
    assert calibration.examples == 110
    levels = np.quantile(scores, calibration.levels)
    np.testing.assert_allclose(calibration.scores["reconstruction"], levels, rtol=1e-3)
    monkeypatch.setattr("vae_export.cli.MOST_VALUES", 1000)
    monkeypatch.setattr("vae_export.cli.BATCH_VALUES", 7 * 15 * 13 * 3)
    np.save(tmp_path / "odd.npy", np.stack([image[:15, :13] for image in images]))
    arguments = ("--calibrate", tmp_path / "odd.npy", "--calibrate-tile", "64")
    result = run(tmp_path / "model.pt", "--output", tmp_path / "b.vae", *arguments)
    assert result.exit_code == 0, result.output
    assert "  calibrated on 110 examples in tiles of 64: reconstruction\n" in result.stdout
    with VAE.load(tmp_path / "b.vae", threads=1) as vae:
        calibration = vae.manifest.calibration
        scores = vae.score(np.load(tmp_path / "odd.npy")[::2], "reconstruction", pad=True)
    assert calibration is not None
    assert calibration.examples == 110  # also where so many values would be too many for one array
    assert calibration.scores["reconstruction"][-1] == pytest.approx(scores.max(), rel=1e-3)
    np.save(tmp_path / "nan.npy", np.full((120, 3, 15, 13), np.nan, np.float32))
    (tmp_path / "photos" / "100.png").write_bytes(b"no picture")
    monkeypatch.setattr("vae_export.export._export", None)  # found before the work
    result = run(tmp_path / "model.pt", "--output", tmp_path / "c.vae", "--calibrate", tmp_path / "photos")
    assert result.exit_code == 1
    assert "100.png cannot be read as a picture" in result.stderr
    result = run(tmp_path / "model.pt", "--output", tmp_path / "c.vae", "--calibrate", tmp_path / "nan.npy")
    assert result.exit_code == 1
    assert "nan.npy has NaN" in result.stderr


def test_few_examples_for_a_prior_are_warned_of(model_file: Path, tmp_path: Path) -> None:
    result = run(model_file, "--output", tmp_path / "a.vae", "--prior", "mixture:2")
    assert result.exit_code == 0, result.output
    assert (
        "Warning: the prior 'mixture:2' is fitted to 40 examples; with fewer than 120, 10 for each of 6"
        in result.stderr
    )


def test_large_examples_are_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    request = _Request("model.pt", Path("a.vae"), None, None, None, (), ("a",), ImportOptions())
    monkeypatch.setattr("vae_export.cli._read_examples", lambda data, spec, limit: taken.append(limit))
    for shape in ((1, 28, 28), (3, 256, 256), (3, 20000, 20000)):
        _read_more(request, {"prior": None}, InputSpec("image", shape), is_free=False)
    assert taken == [10_000, 2**28 // (3 * 256 * 256), 1]


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(b"not a model")
    result = run(tmp_path / "model.pt")
    assert result.exit_code == 1
    assert "is no model.pt" in result.stderr


def test_help_and_the_missing_extra_work_without_torch(model_file: Path) -> None:
    block = (
        "import sys; sys.modules['torch'] = None; sys.modules['onnx'] = None; from vae_export.cli import main; main()"
    )
    shown = subprocess.run([sys.executable, "-c", block, "--help"], capture_output=True, text=True, check=False)
    assert shown.returncode == 0
    assert "Export SOURCE" in shown.stdout
    refused = subprocess.run([sys.executable, "-c", block, model_file], capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert 'pip install "vae-edge[export]"' in refused.stderr
    assert "Traceback" not in refused.stderr


def test_precisions_are_written_and_described(model_file: Path) -> None:
    result = run(model_file, "--precision", "fp32,int8", "--budget-psnr", "3", "--budget-nats", "1", "--json")
    assert result.exit_code == 0, result.output
    manifest = json.loads(result.stdout)["manifest"]
    assert set(manifest["precisions"]) == {"fp32", "int8"}
    assert manifest["budget"] == {"psnr_db": 3, "nats_per_dimension": 1}
    assert result.stderr == f"{UNTRAINED}\n"


def test_a_precision_that_misses_the_budget_is_code_3_and_the_rest_is_written(model_file: Path, monkeypatch) -> None:
    fail_the_budget(monkeypatch)
    result = run(model_file, "--precision", "int8,fp16")
    assert result.exit_code == 3
    assert "Not written: int8 loses " in result.stderr
    assert "Not written: fp16 loses " in result.stderr
    assert set(Bundle.open(model_file.with_suffix(".vae")).manifest.precisions) == {"fp32"}


def test_keep_writes_it_marked_and_says_so(model_file: Path, monkeypatch) -> None:
    fail_the_budget(monkeypatch)
    result = run(model_file, "--precision", "int8", "--keep")
    assert result.exit_code == 0
    assert "int8: loses " in result.stdout
    assert "MISSES the budget" in result.stdout
    marked = "Warning: int8 misses the budget; it is written and marked, as --keep asks\n"
    assert result.stderr == f"{UNTRAINED}\n{marked}"
    assert not Bundle.open(model_file.with_suffix(".vae")).manifest.precisions["int8"].within_budget


def fail_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    from vae_export.quality import Measurement

    monkeypatch.setattr(Measurement, "within", lambda self, budget: False)
