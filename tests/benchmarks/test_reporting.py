"""`benchmarks/cases/reporting.py`: what its neighbours write."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

CASES = Path(__file__).parents[2] / "benchmarks" / "cases"
with pytest.MonkeyPatch.context() as _path:
    _path.syspath_prepend(CASES)
    import reporting


def test_a_report_is_json_and_markdown_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"machine": reporting.machine(3), "rows": [1.5]}
    assert found["machine"]["threads"] == 3
    monkeypatch.setattr("io.text_encoding", lambda encoding, stacklevel=2: encoding or "ascii")  # a system's own
    reporting.write_report(tmp_path / "name", found, reporting.table_row(["23.8 ± 0.2", "µs"]) + "\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["name.json", "name.md"]
    assert json.loads((tmp_path / "name.json").read_bytes()) == found
    assert (tmp_path / "name.md").read_bytes().decode() == "| 23.8 ± 0.2 | µs |\n"


def test_results_are_those_of_the_repository() -> None:
    assert (reporting.RESULTS / "README.md").is_file()


# Reports and the programs that made them, each of which has a `markdown` of the JSON.
PROGRAMS = {
    "anomalies": "anomaly_digits",
    "anomalies-20": "anomaly_digits",
    "graphs": "graph_costs",
    "likelihood": "mnist_likelihood",
    "overhead": "overhead",
    "photographs": "train_photographs",
    "score_cost": "score_cost",
    "tiles": "tiles",
    "training": "train_quality",
}


def test_every_report_has_its_program() -> None:
    assert PROGRAMS.keys() == {path.stem for path in reporting.RESULTS.glob("*.json")}


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_text_of_a_report_is_made_of_its_figures(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    monkeypatch.syspath_prepend(CASES)
    program = importlib.import_module(PROGRAMS[name])
    figures = json.loads((reporting.RESULTS / f"{name}.json").read_text("utf-8"))
    assert (reporting.RESULTS / f"{name}.md").read_text("utf-8") == program.markdown(figures)
