"""`vae-bench`: what it prints where, its exit codes, and one sentence for every bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

import vae_benchmarks.cli as cli
from vae_benchmarks import Report, Settings, worker
from vae_benchmarks.harness import _skip_what_cannot_run
from vae_runtime import VAE
from vae_runtime.bundle import Bundle
from vae_runtime.manifest import PRIOR_FILE, FittedPrior
from vae_runtime.prior import GaussianMixture

BASE = {("encode", 1, 1): 0.1, ("decode", 1, 1): 0.2}
QUICK = ("--batch", "1", "--threads", "1", "--seconds", "0.01", "--rounds", "1", "--operation", "encode")


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.main, [str(argument) for argument in arguments])


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch, measured: Report) -> list[Settings]:
    """The settings of each call, with the measuring itself replaced by a ready report."""
    calls: list[Settings] = []

    def fake(bundle: str, settings: Settings, progress: Callable[[str], None]) -> Report:
        calls.append(settings)
        progress("round 1 of 1")
        return measured

    monkeypatch.setattr(cli, "benchmark", fake)
    return calls


@pytest.mark.parametrize(
    ("arguments", "changes"),
    [
        ((), {}),
        (("--batch", "1", "--batch", "8,32"), {"batches": (1, 8, 32)}),
        (("--threads", "1, 2,auto"), {"threads": (1, 2, None)}),
        (("--operation", "decode,encode"), {"operations": ("decode", "encode")}),
        (("--seconds", "2.5", "--rounds", "6", "--confidence", "0.9", "--width", "0.1"), None),
        (("--device", "auto", "--precision", "int8"), {"device": "auto", "precision": "int8"}),
        (("--input", "uint8"), {"inputs": ("uint8",)}),
        (("--input", "uint8, float32"), {"inputs": ("uint8", "float32")}),
        (("--split",), {"split": True}),
        (("--no-split",), {"split": False}),
    ],
)
def test_options_become_settings(
    recorded: list[Settings], tiny: Path, arguments: tuple[str, ...], changes: dict[str, Any] | None
) -> None:
    if changes is None:
        changes = {"seconds": 2.5, "rounds": 6, "confidence": 0.9, "width": 0.1}
    for command in ((tiny, *arguments), ("run", tiny, *arguments), (*arguments, tiny)):
        result = run(*command)
        assert result.exit_code == 0, result.output
        assert recorded.pop() == Settings(**changes)


def test_a_size_that_the_bundle_does_not_take_is_refused(tiny: Path, free: Path) -> None:
    for bundle, size, rule in ((tiny, "16x16", r"(N, 8, 8) uint8"), (free, "13x16", "H and W multiples of 2")):
        result = run(bundle, "--size", size)
        assert result.exit_code == 1
        assert result.stderr.startswith(f"Error: size is ({size.split('x')[0]}, 16); ")
        assert rule in result.stderr
    assert run(tiny, "--size", "16").exit_code == 2


def test_json_is_alone_on_stdout(recorded: list[Settings], tiny: Path, measured: Report) -> None:
    result = run(tiny, "--json")
    assert Report.from_dict(json.loads(result.stdout)) == measured
    assert "round 1 of 1" in result.stderr


def test_the_table_is_on_stdout_and_progress_on_stderr(recorded: list[Settings], tiny: Path) -> None:
    result = run(tiny)
    assert "examples/s" in result.stdout
    assert "round 1" not in result.stdout


def test_output_is_written_beside_the_table(recorded: list[Settings], tiny: Path, tmp_path: Path) -> None:
    result = run(tiny, "--output", tmp_path / "a.json")
    assert result.exit_code == 0
    assert "examples/s" in result.stdout
    assert f"report written to {tmp_path / 'a.json'}" in result.stderr
    Report.load(tmp_path / "a.json")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="there is no /proc, where nobody may write")
def test_an_output_that_cannot_be_written_is_refused_before_anything_is_measured(
    recorded: list[Settings], tiny: Path
) -> None:
    result = run(tiny, "--output", "/proc/a.json")
    assert (result.exit_code, result.stdout, recorded) == (1, "", [])
    assert result.stderr.startswith("Error: /proc/a.json cannot be written: ")


def test_a_report_that_could_not_be_written_in_the_end_is_shown(
    recorded: list[Settings], measured: Report, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def remove(bundle: str, settings: Settings, progress: Callable[[str], None]) -> Report:
        (tmp_path / "there").rmdir()
        return measured

    (tmp_path / "there").mkdir()
    monkeypatch.setattr(cli, "benchmark", remove)
    result = run(tiny, "--output", tmp_path / "there/a.json")
    assert result.exit_code == 1
    assert "examples/s" in result.stdout
    assert "a.json cannot be written: No such file or directory" in result.stderr


def test_a_report_says_of_which_size_the_bundles_images_are(free: Path) -> None:
    options = ("--operation", "encode", "--batch", "1", "--threads", "1", "--seconds", "0.01", "--rounds", "1")
    assert json.loads(run(free, *options, "--json").stdout)["bundle"]["size"] == [12, 16]


def test_an_existing_output_is_refused_before_anything_is_measured(
    recorded: list[Settings], tiny: Path, tmp_path: Path
) -> None:
    existing = tmp_path / "a.json"
    assert run(tiny, "--output", existing).exit_code == 0
    recorded.clear()
    before = existing.read_bytes()
    result = run(tiny, "--output", existing)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: {existing} exists; it is replaced only")
    assert recorded == []
    assert existing.read_bytes() == before
    assert run(tiny, "--output", existing, "--force").exit_code == 0


def test_an_output_that_comes_while_it_is_measured_is_kept(
    tiny: Path, measured: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fake(bundle: str, settings: Settings, progress: Callable[[str], None]) -> Report:
        (tmp_path / "a.json").write_text("precious")
        return measured

    monkeypatch.setattr(cli, "benchmark", fake)
    result = run(tiny, "--output", tmp_path / "a.json")
    assert result.exit_code == 1
    assert "a.json exists; it is replaced only when" in result.stderr
    assert (tmp_path / "a.json").read_text() == "precious"


def test_force_replaces_only_reports(recorded: list[Settings], tiny: Path, tmp_path: Path) -> None:
    for name, content in (("notes.txt", "precious"), ("list.json", "[]"), ("other.json", '{"format": "x"}')):
        (tmp_path / name).write_text(content)
        result = run(tiny, "--output", tmp_path / name, "--force")
        assert result.exit_code == 1
        assert f"{name} is not a report of vae-bench; --force replaces nothing else" in result.stderr
        assert (tmp_path / name).read_text() == content
    assert run(tiny, "--output", tmp_path, "--force").exit_code == 1
    assert recorded == []


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("/no/such.vae",), 1, "/no/such.vae cannot be opened as a bundle: No such file or directory"),
        (("TINY", "--device", "tpu", *QUICK), 1, "device is 'tpu'; expected 'cpu', 'cuda', "),
        (("TINY", "--device", "NoExecutionProvider", *QUICK), 1, "device 'NoExecutionProvider' cannot be used: "),
        (("TINY", "--precision", "int8", *QUICK), 1, "precision 'int8' is not in tiny, which has fp32"),
        (("TINY", "--precision", "fp4", *QUICK), 1, "precision is 'fp4'; expected one of fp32, "),
        (("TINY", "--batch", "0"), 1, "batch is 0; expected a whole number from 1 to 65536"),
        (("TINY", "--batch", "8,-1"), 1, "batch is -1; expected a whole number from 1 to 65536"),
        (("TINY", "--threads", "0"), 1, "threads is 0; expected a whole number from 1"),
        (("TINY", "--rounds", "0"), 1, "rounds is 0; expected a whole number from 1 to 100"),
        (("TINY", "--seconds", "0"), 1, "seconds is 0.0; expected a number between 0 and 86400, both excluded"),
        (("TINY", "--seconds", "-1"), 1, "seconds is -1.0; expected a number"),
        (("TINY", "--seconds", "nan"), 1, "seconds is nan; expected a number"),
        (("TINY", "--width", "2"), 1, "width is 2.0; expected a number between 0 and 1"),
        (
            ("TINY", "--output", "/no/folder/a.json"),
            1,
            "/no/folder/a.json cannot be written: the folder /no/folder does",
        ),
        (
            ("AUTOENCODER", "--operation", "sample"),
            1,
            "nothing is left to measure: tiny-vectors is a plain autoencoder",
        ),
        (
            ("AUTOENCODER", "--input", "float32,uint8"),
            1,
            "input is 'uint8'; tiny-vectors takes vectors, (N, 5) float32",
        ),
        (("TINY", "--input", "int8"), 2, "Invalid value for '--input': 'int8' is not one of 'float32', 'uint8'."),
        (("TINY", "--batch", "x"), 2, "Invalid value for '--batch': 'x' is not a valid integer."),
        (("TINY", "--batch", ""), 2, "Invalid value for '--batch': '' is not a valid integer."),
        (("TINY", "--threads", "many"), 2, "Invalid value for '--threads': 'many' is not a valid integer."),
        (("TINY", "--operation", "fly"), 2, "Invalid value for '--operation': 'fly' is not one of 'encode', "),
        (("TINY", "TINY"), 2, "Got unexpected extra argument"),
        (("--json",), 2, "Missing argument 'BUNDLE'."),
        (("compare", "a.json"), 2, "Missing argument 'B.json'."),
        (("compare", "/no.json", "/no.json"), 1, "/no.json cannot be read: No such file or directory"),
        (("compare", "TINY/manifest.json", "/no.json"), 1, "manifest.json is not a report of vae-bench, whose"),
        (("compare", "TINY/encoder.onnx", "/no.json"), 1, "encoder.onnx is not JSON; expected a report"),
        (("compare", "TINY", "/no.json"), 1, "tiny.vae cannot be read: Is a directory"),
    ],
)
def test_bad_input_is_answered_in_one_sentence(
    tiny: Path, autoencoder: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    result = run(*(place.replace("TINY", str(tiny)).replace("AUTOENCODER", str(autoencoder)) for place in arguments))
    last = result.stderr.strip().splitlines()[-1]
    assert (result.exit_code, result.stdout) == (code, "")
    assert last.startswith("Error: ")
    assert message in last
    assert "Traceback" not in result.stderr


@pytest.fixture
def saved(make_report: Callable[..., Report], tmp_path: Path) -> Callable[..., Path]:
    def save(name: str, seed: int, **changes: Any) -> Path:
        make_report(seed, **changes).save(tmp_path / name)
        return tmp_path / name

    return save


def test_compare_exits_with_3_only_when_something_became_slower(saved: Callable[..., Path]) -> None:
    a, same = saved("a", 1, latency_ms=BASE), saved("b", 2, latency_ms=BASE)
    slow = saved("c", 3, latency_ms={**BASE, ("encode", 1, 1): 0.13})
    assert run("compare", a, a).exit_code == 0
    assert run("compare", a, same).exit_code == 0
    assert run("compare", slow, a).exit_code == 0
    result = run("compare", a, slow)
    assert result.exit_code == 3
    assert "slower" in result.stdout
    assert run("compare", a, slow, "--threshold", "0.5").exit_code == 0


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"latency_ms": BASE, "rounds": 3}, "the rounds are too few: 9 rows need 6 in each report (--rounds)"),
        ({"latency_ms": {("encode", 64, 1): 0.1}}, "no row is in both reports, which differ in batch (A 1, B 64)"),
    ],
)
def test_compare_exits_with_1_where_it_judged_nothing(
    saved: Callable[..., Path], changes: dict[str, Any], reason: str
) -> None:
    a, b = saved("a", 1, latency_ms=BASE), saved("b", 2, **changes)
    if "rounds" in changes:
        a = saved("a", 1, **changes)
    result = run("compare", a, b)
    assert (result.exit_code, result.stderr) == (1, f"Error: no verdict: {reason}\n")
    assert result.stdout.splitlines()[-1].startswith(f"NO VERDICT: {reason} (")
    result = run("compare", a, b, "--json")
    assert (result.exit_code, json.loads(result.stdout)["verdict"]) == (1, "no verdict")


def test_compare_answers_whether_another_precision_is_faster(saved: Callable[..., Path], tmp_path: Path) -> None:
    a, b = saved("a", 1, latency_ms=BASE), saved("b", 2, latency_ms={**BASE, ("encode", 1, 1): 0.05})
    document = json.loads(b.read_text())
    for row in document["latency"]:
        row["precision"] = "int8"
    b.write_text(json.dumps(document))
    result = run("compare", a, b)
    assert result.exit_code == 0
    assert "\nprecision: A fp32, B int8\n" in result.stdout
    assert result.stdout.splitlines()[-1] == "not worse beyond noise and 5% (faster: 1, no difference: 8)"
    assert json.loads(run("compare", a, b, "--json").stdout)["differs"] == [
        {"axis": "precision", "a": "fp32", "b": "int8"}
    ]
    assert run("compare", b, a).exit_code == 3


def test_compare_as_json(saved: Callable[..., Path]) -> None:
    a, slow = saved("a", 1, latency_ms=BASE), saved("c", 3, latency_ms={**BASE, ("encode", 1, 1): 0.13})
    result = run("compare", a, slow, "--json")
    assert result.exit_code == 3
    document = json.loads(result.stdout)
    assert document["worse"] is True
    assert document["rows"][0]["verdict"] == "slower"


def test_a_bad_threshold(saved: Callable[..., Path]) -> None:
    a = saved("a", 1)
    result = run("compare", a, a, "--threshold", "-1")
    assert (result.exit_code, result.stderr) == (
        1,
        "Error: threshold is -1.0; expected a number from 0, such as 0.05 for 5%\n",
    )


def test_help_shows_both_uses() -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert "[run] BUNDLE [OPTIONS]" in result.output
    assert "compare A.json B.json [OPTIONS]" in result.output
    for option in ("--batch", "--threads", "--seconds", "--threshold"):
        assert option in result.output
    assert "Measure BUNDLE." in run("some.vae", "--help").output
    assert "beyond noise" in run("compare", "--help").output
    assert run("--version").output.startswith("vae-bench, version ")


def vae_bench(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vae_benchmarks.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def test_help_needs_neither_psutil_nor_an_engine(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nfor name in ('psutil', 'onnxruntime', 'torch', 'onnx'):\n    sys.modules[name] = None\n"
    )
    result = vae_bench("--help", env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert result.returncode == 0, result.stderr
    assert "compare" in result.stdout


def test_an_autoencoder_with_a_fitted_prior_can_sample(autoencoder: Path, tmp_path: Path) -> None:
    with VAE.load(autoencoder) as vae:
        assert _skip_what_cannot_run(Settings(), Bundle.open(autoencoder).manifest)[0].operations == (
            "encode",
            "decode",
            "reconstruct",
            "score",
        )
        golden, manifest = vae.golden(), vae.manifest
    prior = GaussianMixture(np.ones(1), np.zeros((1, 2)), np.eye(2)[None]).to_npz()
    fitted = manifest._replace(latent=manifest.latent._replace(fitted_prior=FittedPrior("gaussian", 1, PRIOR_FILE, 9)))
    files = {name: (autoencoder / name).read_bytes() for name in ("encoder.onnx", "decoder.onnx")}
    write_bundle = pytest.importorskip("vae_export.bundle").write_bundle
    write_bundle(tmp_path / "a.vae", fitted, {**files, PRIOR_FILE: prior}, golden)
    assert _skip_what_cannot_run(Settings(), Bundle.open(tmp_path / "a.vae").manifest) == (Settings(), {})
    with VAE.load(tmp_path / "a.vae") as vae:
        assert worker.make_call(vae, "sample", 3)().shape == (3, 5)


def test_the_whole_way_of_an_autoencoder(autoencoder: Path, tmp_path: Path) -> None:
    """Really: `sample` is skipped and said so, stdout is JSON alone, the saved report is the printed one."""
    quick = ("--batch", "2", "--threads", "1", "--seconds", "0.01", "--rounds", "1")
    result = vae_bench(autoencoder, *quick, "--operation", "sample,decode", "--json", "--output", tmp_path / "a.json")
    assert result.returncode == 0, result.stderr
    report = Report.from_dict(json.loads(result.stdout))
    assert report == Report.load(tmp_path / "a.json")
    assert [row.operation for row in report.latency] == ["decode"]
    assert report.skipped == {"sample": "tiny-vectors is a plain autoencoder, which has no prior to sample from"}
    assert report.settings.operations == ("sample", "decode")
    assert "sample was skipped: tiny-vectors" in cli.format_report(report)
    assert str(tmp_path) not in result.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_ctrl_c_ends_it_and_its_children_promptly(tiny: Path) -> None:
    psutil = pytest.importorskip("psutil")
    process = subprocess.Popen(
        [sys.executable, "-m", "vae_benchmarks.cli", str(tiny), "--seconds", "1000", "--threads", "1", "--rounds", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("round"):
                break
        children = _wait_for_children(psutil.Process(process.pid))
        process.send_signal(signal.SIGINT)
        began = time.monotonic()
        _, stderr = process.communicate(timeout=20)
        assert time.monotonic() - began < 15
    finally:
        process.kill()
    assert process.returncode == 1
    assert stderr.strip().endswith("Aborted!")
    assert "Traceback" not in stderr
    _, alive = psutil.wait_procs(children, timeout=5)
    assert alive == []


def _wait_for_children(process: Any) -> list[Any]:
    for _ in range(200):
        if children := process.children(recursive=True):
            return list(children)
        time.sleep(0.05)
    raise AssertionError("no child was started")
