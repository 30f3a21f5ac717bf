"""LoadGen: its summary is read right, the scenarios run, and what is missing or wrong is said in one sentence."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner, Result

import vae_benchmarks.cli as cli
import vae_benchmarks.loadgen as loadgen
import vae_benchmarks.loadgen_cli as loadgen_cli
from vae_benchmarks import BenchmarkError
from vae_benchmarks.loadgen import NOTE, LoadgenReport, LoadgenSettings, parse_summary
from vae_benchmarks.loadgen_cli import format_loadgen
from vae_runtime import VAE

from .conftest import QUIET

HEAD = "================\nMLPerf Results Summary\n================\nSUT name : PySUT\n"
SINGLE = f"""{HEAD}Scenario : SingleStream
90.0th percentile latency (ns) : 348421
Result is : VALID
  Min duration satisfied : Yes
  Min queries satisfied : Yes
 * Early stopping 90.0th percentile estimate: 356575
90.00 percentile latency (ns)   : 348999
"""
MULTI = f"""{HEAD}Scenario : MultiStream
99.0th percentile latency (ns) : 5202008
Result is : INVALID
  Min duration satisfied : NO
  Min queries satisfied : Yes
  Early stopping satisfied: NO
Recommendations:
 * Decrease the expected latency so the loadgen pre-generates more queries.
Early Stopping Result:
 * Only processed 251 queries.
"""
OFFLINE = f"{HEAD}Scenario : Offline\nSamples per second: 1.25e+06\nResult is : VALID\n"


def test_the_summary_is_read() -> None:
    single, multi, offline = map(parse_summary, (SINGLE, MULTI, OFFLINE))
    assert single == {
        "percentile": 90.0,
        "latency_ms": 0.348421,
        "samples_per_second": None,
        "valid": True,
        "reasons": (),
    }
    assert (multi["percentile"], multi["latency_ms"], multi["valid"]) == (99.0, 5.202008, False)
    assert multi["reasons"] == (
        "Min duration not satisfied",
        "Early stopping not satisfied",
        "Decrease the expected latency so the loadgen pre-generates more queries.",
        "Only processed 251 queries.",
    )
    assert (offline["samples_per_second"], offline["latency_ms"]) == (1.25e6, None)
    with pytest.raises(BenchmarkError, match="has no result in it"):
        parse_summary(HEAD)


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.main, ["loadgen", *map(str, arguments)])


@pytest.mark.parametrize(
    ("scenario", "percentile"), [("single-stream", 90.0), ("multi-stream", 99.0), ("offline", None)]
)
def test_the_scenarios_run(tiny: Path, tmp_path: Path, scenario: str, percentile: float | None) -> None:
    pytest.importorskip("mlperf_loadgen")
    logs = tmp_path / "logs"
    result = run(tiny, "--scenario", scenario, "--seconds", "0.2", "--threads", "1", "--logs", logs, "--json")
    assert result.exit_code in (0, 3), result.output  # a machine that is busy with other work may be too slow for it
    document = json.loads(result.stdout)
    assert (result.exit_code == 0) == document["valid"]
    assert (document["other_cores_busy"] is not None) == (sys.platform == "linux")
    assert document["percentile"] == percentile
    assert (document["samples_per_second"] or document["latency_ms"]) > 0
    assert document["note"].startswith("not an official MLPerf result")
    assert document["summary"] == (logs / "mlperf_log_summary.txt").read_text()
    assert "min_duration (ms): 200" in document["summary"]
    again = run(tiny, "--scenario", scenario, "--logs", logs)
    assert (again.exit_code, again.stdout) == (1, "")
    assert "logs is not empty; LoadGen's logs go to an empty or new folder" in again.stderr


def test_the_text_says_what_it_is_not(tiny: Path) -> None:
    pytest.importorskip("mlperf_loadgen")
    result = run(tiny, "--scenario", "single-stream", "--operation", "decode", "--seconds", "0.1", "--threads", "1")
    assert result.stdout.startswith("tiny, single-stream, decode: p90 ")
    assert "not an official MLPerf result" in result.stdout
    assert "runs on: encode " in result.stdout


def report_of(summary: str, others: float | None) -> LoadgenReport:
    return LoadgenReport(
        name="tiny",
        machine=QUIET,
        settings=LoadgenSettings("multi-stream"),
        loadgen="6.0",
        plan={},
        **parse_summary(summary),
        note=NOTE,
        summary=summary,
        other_cores_busy=others,
    )


@pytest.mark.parametrize(("summary", "code"), [(SINGLE, 0), (MULTI, 3)])
@pytest.mark.parametrize("options", [(), ("--json",)])
def test_a_run_that_is_not_valid_has_an_exit_code_of_its_own(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, summary: str, code: int, options: tuple[str, ...]
) -> None:
    monkeypatch.setattr(loadgen_cli, "run_loadgen", lambda *_: report_of(summary, None))
    result = run(tiny, "--scenario", "multi-stream", *options)
    assert (result.exit_code, result.stderr) == (code, "")
    assert ("not valid: Min duration not satisfied; " in result.stdout) == (code == 3 and not options)


def test_a_busy_machine_is_told_of_in_the_words_of_other_reports() -> None:
    told = "\nThe machine was busy, other work took 1.50 of 8 cores: expect slower and less stable figures.\n"
    assert told in format_loadgen(report_of(SINGLE, 1.5))
    for others in (None, 0.1):
        assert "busy" not in format_loadgen(report_of(SINGLE, others))


@pytest.mark.parametrize(("scenario", "size"), [("single-stream", 1), ("multi-stream", 8), ("offline", 32)])
def test_the_batch_size_is_prepared_before_loadgen_begins(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, scenario: str, size: int
) -> None:
    seen: list[tuple[str, Any]] = []
    monkeypatch.setitem(sys.modules, "mlperf_loadgen", ModuleType("mlperf_loadgen"))
    monkeypatch.setattr(metadata, "version", lambda name: "6.0")
    monkeypatch.setattr(VAE, "warmup", lambda self, sizes: seen.append(("warmup", sizes)))
    monkeypatch.setattr(loadgen, "_start", lambda *given: seen.append(("start", given[5])))
    loadgen.drive(str(tiny), dataclasses.asdict(LoadgenSettings(scenario)), "")
    assert seen == [("warmup", [size]), ("start", size)]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("/no/such.vae", "--scenario", "offline"), 1, "/no/such.vae is neither a case nor a bundle"),
        (("TINY", "--scenario", "server"), 2, "Invalid value for '--scenario': 'server' is not one of"),
        (("TINY",), 2, "Missing option '--scenario'"),
        (
            ("TINY", "--scenario", "offline", "--seconds", "0"),
            1,
            "seconds is 0.0; expected a number between 0 and 86400",
        ),
        (("TINY", "--scenario", "offline", "--batch", "0"), 1, "batch is 0; expected a whole number from 1 to 65536"),
        (("TINY", "--scenario", "offline", "--logs", "/no/folder/x"), 1, "/no/folder/x cannot be made: No such file"),
    ],
)
def test_bad_input_is_answered_in_one_sentence(tiny: Path, arguments: tuple[str, ...], code: int, message: str) -> None:
    result = run(*(one.replace("TINY", str(tiny)) for one in arguments))
    assert (result.exit_code, result.stdout) == (code, "")
    assert message in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_sigterm_leaves_no_process_and_no_folder(tiny: Path, tmp_path: Path, terminate: Callable[..., str]) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    (tmp_path / "mlperf_loadgen.py").write_text("import time; time.sleep(1000)")
    path = os.pathsep.join([str(tmp_path), *(part for part in sys.path if part)])
    process = subprocess.Popen(
        [sys.executable, "-m", "vae_benchmarks.cli", "loadgen", str(tiny), "--scenario", "offline"],
        env={**os.environ, "TMPDIR": str(temporary), "PYTHONPATH": path},
    )
    while not list(temporary.iterdir()):
        assert process.poll() is None
    terminate(process)
    assert process.returncode == 143
    assert list(temporary.iterdir()) == []


def test_without_the_library_the_cure_is_named(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "mlperf_loadgen.py").write_text("raise ImportError")
    path = os.pathsep.join([str(tmp_path), *(part for part in sys.path if part)])
    command = [sys.executable, "-m", "vae_benchmarks.cli", "loadgen", str(tiny), "--scenario", "offline"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert "a LoadGen scenario needs mlcommons-loadgen, which is not installed; " in done.stderr
    assert 'pip install "vae-edge[loadgen]"' in done.stderr
