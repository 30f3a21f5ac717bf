"""`benchmarks/cases/graph_costs.py`: graphs raced two by two, and a table of what was raced alone."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
CASES = Path(__file__).parents[2] / "benchmarks" / "cases"


@pytest.fixture
def graph_costs(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(CASES)
    program = importlib.import_module("graph_costs")
    monkeypatch.setattr(program, "BLOCKS", 5)
    return program


def test_graphs_are_raced_two_by_two_and_those_that_wait_do_not_spin(
    graph_costs: Any, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[bytes] = []

    def open_session(graph: bytes, threads: int) -> Any:
        session = graph_costs.profile_operators.open_session(graph, threads)
        options = session.get_session_options()
        assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
        assert options.intra_op_num_threads == threads
        opened.append(graph)
        return session

    monkeypatch.setattr(graph_costs, "open_session", open_session)
    large, small = ((tiny / f"{half}.onnx").read_bytes() for half in ("encoder", "decoder"))
    found = graph_costs.race({"reference": large, "now": small, "int8": large}, 2, 1)
    assert found.keys() == {"now_us", "int8_us", "now_to_reference", "int8_to_now"}
    assert opened == [large, small, small, large]
    assert min(found.values()) > 0
    assert 0.3 < found["now_to_reference"] * found["int8_to_now"] < 3  # the same graph in the end
    assert 0.3 < found["int8_to_now"] * found["now_us"] / found["int8_us"] < 3


def test_columns_of_what_was_not_raced_are_left_out(graph_costs: Any) -> None:
    report = json.loads((CASES.parent / "results" / "graphs.json").read_text("utf-8"))
    row = {"half": "encoder", "batch": 1, "threads": 1, "model": "x", "now_us": 20.4, "now_to_reference": 0.5}
    changed = {**report, "races": [row], "load_ms": {"x": {"now": 3.0}}, "profiles": []}
    lines = graph_costs.markdown(changed).splitlines()
    assert "| model | half | batch | threads | µs | ÷ reference |" in lines
    assert "| x | encoder | 1 | 1 | 20 | 0.50 |" in lines
    assert "| model | now |" in lines
    assert "| x | 3.0 |" in lines
