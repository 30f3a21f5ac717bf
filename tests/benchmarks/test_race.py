"""The race: ratios that are right on planted speeds, faults that are found and named, and nothing left behind."""

from __future__ import annotations

import copy
import dataclasses
import errno
import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

import vae_benchmarks.cli as cli
import vae_benchmarks.race.cli as race_cli
import vae_benchmarks.race.process as process
import vae_benchmarks.race.running as running
from vae_benchmarks import BenchmarkError, ReportError
from vae_benchmarks.machine import choose_cores
from vae_benchmarks.race import (
    COMPETITORS,
    Case,
    CaseError,
    Competitor,
    Point,
    PointResult,
    RaceReport,
    RaceSettings,
    merge,
    race,
)
from vae_benchmarks.race.entrant import Entrant, Resident, judge, measure_error
from vae_benchmarks.race.peers import native_openvino
from vae_benchmarks.race.peers.native_openvino import ways_to_call
from vae_benchmarks.race.picture import draw_race
from vae_benchmarks.race.process import Process
from vae_benchmarks.race.report import Ratio, Row, rank
from vae_benchmarks.race.schedule import FEWEST_ROUNDS, order_of, plan_rounds
from vae_benchmarks.race.text import (
    _ALIKE_ELSEWHERE,
    absent_lines,
    format_markdown,
    format_ms,
    format_plan,
    format_race,
)
from vae_benchmarks.race.worker import Worker, print_line
from vae_runtime.errors import BundleError, InputError

from .conftest import undisturbed

PLANTED = str(Path(__file__).with_name("planted.py"))
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "race"
ONE = (Point(1, 1),)


SPEEDS = {"ours": 4, "ours-fp32": 4, "slow": 12, "quick": 6}  # ms


def planted_ms(operation: str, competitor: str) -> float:
    return SPEEDS[competitor]


def planted(name: str, is_peer: bool = True, **options: Any) -> Competitor:
    return Competitor(name, PLANTED, options, is_peer)


@pytest.fixture(scope="module")
def report(tiny: Path) -> RaceReport:
    """Ours at 4 ms, a peer at 12 and one at 6, and everything that can go wrong."""
    field = (
        *(planted(name, is_peer=name != "ours", milliseconds=SPEEDS[name]) for name in ("ours", "slow", "quick")),
        *(planted(fault, fault=fault) for fault in ("absent", "broken", "wrong", "shape", "reuse", "dies")),
    )
    return race([tiny], RaceSettings(points=ONE, budget=1.7, rounds=8), competitors=field)


def test_ratios_and_intervals_are_right_on_planted_speeds(report: RaceReport) -> None:
    (point,) = report.cases[0].points
    assert {(row.operation, row.competitor) for row in point.rows} == {
        (operation, name) for operation in ("encode", "decode") for name in ("ours", "slow", "quick")
    }
    ratios = {(one.operation, one.competitor): one for one in point.ratios}
    for operation in ("encode", "decode"):
        slow, quick = ratios[operation, "slow"], ratios[operation, "quick"]
        # Planted 3 and 1.5; a machine that is busy with other work wakes a sleeper late.
        assert 2.2 < slow.ratio < 3.8
        assert 1.2 < quick.ratio < 2.2
        assert slow.ratio > 1.3 * quick.ratio
        assert slow.low is not None
        assert slow.high is not None
        assert slow.low <= slow.ratio <= slow.high
        assert slow.interval_from == "rounds"
        assert (slow.fastest_peer, quick.fastest_peer) == (False, True)


def test_every_competitor_had_as_many_rounds_and_was_idle_between_them(report: RaceReport) -> None:
    (point,) = report.cases[0].points
    assert point.rounds >= 6
    assert {len(row.round_p50_ms) for row in point.rows} == {point.rounds}
    assert all(row.calls >= point.rounds for row in point.rows)
    assert all(runner.idle_cpu_share < 0.05 for runner in point.runners)
    assert not point.fresh


def test_who_is_absent_wrong_or_dead_is_named_with_the_reason(report: RaceReport) -> None:
    (point,) = report.cases[0].points
    assert point.skipped == {"absent": "the planted engine is not installed"}
    assert set(point.disqualified) == {"wrong", "shape", "reuse"}
    assert point.disqualified["wrong"].startswith("the largest error of ")
    assert point.disqualified["wrong"].endswith("; fp32 may have 0.001")
    assert point.disqualified["shape"].startswith("encode gives [((1, 1), 'float32')")
    assert point.disqualified["reuse"] == "decode overwrites a result that it handed out before"
    assert set(point.failed) == {"broken", "dies"}
    assert point.failed["broken"] == "ValueError: the planted engine is broken"
    assert point.failed["dies"] == "was ended by SIGKILL; it may have run out of memory"
    assert {runner.name for runner in point.runners} == {"ours", "slow", "quick"}


def test_the_text_tells_it_all(report: RaceReport) -> None:
    report = undisturbed(report, planted_ms)
    for text in (format_race(report), format_markdown(report)):
        for needed in (
            "ours is faster than the fastest peer, quick, which takes 1.50",
            "absent skipped: the planted engine is not installed",
            "reuse disqualified: decode overwrites",
            "dies failed: was ended by SIGKILL",
            "ours runs on: encode [from_batch=1 precision=fp32]",
        ):
            assert needed in text
    table = [line for line in format_markdown(report).splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    assert len(table) == 2 + 6


def shown(report: RaceReport, low: float, high: float, batch: int, precisions: tuple[str, ...], plan: Any) -> list[str]:
    """The row and the sentence on a peer in fp32, where ours has these precisions and this plan."""
    (point,) = report.cases[0].points
    ours, *others = point.runners
    runners = (dataclasses.replace(ours, precisions=precisions, plan=plan), *others)
    ratio = Ratio("encode", "quick", (low + high) / 2, low, high, "rounds", True)
    changed = dataclasses.replace(point, point=Point(batch, 1), runners=runners, ratios=(ratio,))
    case = dataclasses.replace(report.cases[0], points=(changed,))
    text = format_race(dataclasses.replace(report, cases=(case,)))
    return [line for line in text.splitlines() if line.startswith("encode: ") or line.startswith("encode     ours ")]


@pytest.mark.parametrize(
    ("low", "high", "sentence"),
    [
        (1.0002, 1.0118, "no difference shown between ours and the fastest peer, quick: 1.01 (1.00–1.01)"),
        (0.9900, 0.9951, "no difference shown between ours and the fastest peer, quick: 0.99 (0.99–1.00)"),
        (1.0051, 1.0098, "ours is faster than the fastest peer, quick, which takes 1.01 times as long (1.01–1.01)"),
    ],
)
def test_an_interval_that_touches_one_as_printed_shows_no_difference(
    report: RaceReport, low: float, high: float, sentence: str
) -> None:
    assert shown(report, low, high, 1, ("fp32",), None)[-1] == f"encode: {sentence}"


def test_the_precision_is_that_of_the_operation_at_this_batch_size(report: RaceReport) -> None:
    plan = {"encode": [{"from_batch": 1, "precision": "fp32"}, {"from_batch": 17, "precision": "int8"}]}
    row, sentence = shown(report, 1.2, 1.3, 16, ("fp32", "int8"), plan)
    assert row.split()[:3] == ["encode", "ours", "fp32"]
    assert sentence.startswith("encode: ours is faster than the fastest peer, quick, which takes ")
    row, sentence = shown(report, 1.2, 1.3, 17, ("fp32", "int8"), plan)
    assert row.split()[:3] == ["encode", "ours", "int8"]
    assert sentence.startswith("encode: ours in int8 is faster than the fastest peer, quick in fp32, which takes ")
    for other in (None, {"encode": [7]}, {"encode": {"precision": "int8"}}, {"encode": [{"from_batch": "x"}]}):
        assert shown(report, 0.9, 1.3, 1, ("fp32", "int8"), other)[-1].startswith(
            "encode: no difference shown between ours in fp32/int8 and the fastest peer, quick in fp32: "
        )


def test_a_busy_machine_is_told_of_in_the_words_of_other_reports(report: RaceReport) -> None:
    (point,) = report.cases[0].points
    assert (point.other_cores_busy is not None) == (sys.platform == "linux")

    def text_of(others: float | None, load: float) -> str:
        changed = dataclasses.replace(point, other_cores_busy=others, load_average_1min=load)
        case = dataclasses.replace(report.cases[0], points=(changed,))
        machine = dataclasses.replace(report.machine, cores_usable=2)
        found = dataclasses.replace(report, cases=(case,), machine=machine)
        texts = format_race(found), format_markdown(found)
        assert len({"The machine was busy" in text for text in texts}) == 1
        return texts[0]

    busy = text_of(1.5, 0.1)
    assert "\nThe machine was busy, other work took 1.50 of 2 cores: expect slower and less stable figures.\n" in busy
    assert "load average 0.10 before, 1.50 cores busy with other work\n" in busy
    assert "The machine was busy" not in text_of(0.1, 9.0)
    assert "busy" not in text_of(None, 9.0).partition("method")[0]


def running_as(code: str, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> Process:
    """A competitor's process with this code in place of its own."""
    monkeypatch.setattr(process, "interpreter", lambda name: [sys.executable, "-c", code])
    return Process(1, None, str(scratch))


def test_what_a_competitor_writes_for_a_time_goes_to_the_scratch_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "import json, os; input(); print(json.dumps({name: os.environ[name] for name in ('TMPDIR', 'TEMP', 'TMP')}))"
    competitor = running_as(code, tmp_path, monkeypatch)
    assert competitor.ask("open", 20) == dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(tmp_path))
    competitor.kill()


class WithoutReader:
    """A pipe as Windows has it when nobody reads."""

    def write(self, text: str) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    def close(self) -> None:
        pass


def test_a_competitor_that_has_ended_is_told_as_such_on_windows_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    competitor = running_as("import sys; sys.exit('no memory')", tmp_path, monkeypatch)
    assert competitor._process.stdin is not None
    competitor._process.stdin.close()
    competitor._process.stdin = WithoutReader()  # type: ignore[assignment]
    with pytest.raises(process.CompetitorError, match="no memory"):
        competitor.ask("finish", 20)


def test_a_parent_that_is_gone_is_no_complaint_of_a_competitor_on_windows_either() -> None:
    print_line(WithoutReader(), {})


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell")
def test_competitors_are_no_other_work(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are still running when the time of the cores is read, before the rounds and after them."""
    parents: list[list[int]] = []

    def read(running: Iterable[int]) -> None:
        stats = [Path(f"/proc/{process}/stat").read_text() for process in running]
        parents.append([int(stat.rpartition(")")[2].split()[1]) for stat in stats])

    monkeypatch.setattr(running.CpuTime, "read", read)
    settings = RaceSettings(points=ONE, operations=("decode",), budget=0.1, rounds=3)
    (point,) = race([tiny], settings, competitors=(planted("ours", is_peer=False), planted("peer"))).cases[0].points
    assert parents == [[os.getpid()] * 2] * 2
    assert point.other_cores_busy is None


def test_the_method_says_what_the_intervals_leave_out(report: RaceReport) -> None:
    assert "- not in the interval: what differs from process to process" in format_markdown(report)


def test_ratios_between_identical_plans_that_exclude_one_are_counted(report: RaceReport) -> None:
    """Of operations in which two of vae-edge's own ran the same way at this batch size, and of no others."""
    (point,) = report.cases[0].points

    def route(from_batch: int, precision: str) -> dict[str, Any]:
        return {"from_batch": from_batch, "device": "cpu", "precision": precision}

    def text_of(other_plan: Any, low: float | None, **changes: Any) -> str:
        ours = dataclasses.replace(point.runners[0], plan={"encode": [route(1, "fp32"), route(9, "int8")]})
        other = dataclasses.replace(ours, **{"name": "ours-fp32", "plan": other_plan, **changes})
        ratio = Ratio("encode", "ours-fp32", 1.2, low, 1.3, "rounds", False)
        ratios = (ratio, dataclasses.replace(ratio, low=0.9), dataclasses.replace(ratio, operation="decode"))
        changed = dataclasses.replace(point, runners=(ours, other), rows=(), ratios=ratios)
        found = dataclasses.replace(report, cases=(dataclasses.replace(report.cases[0], points=(changed,)),))
        (line,) = [line for line in format_markdown(found).splitlines() if line.startswith("- identical plans: ")]
        return line.removeprefix("- identical plans: ")

    alike = {"encode": [route(1, "fp32")]}  # at batch 1, whatever larger ones take
    assert text_of(alike, 1.1) == "of 2 ratios between them here, 1 excluded 1"
    assert text_of(alike, 0.99) == "of 2 ratios between them here, 0 excluded 1"
    assert text_of(alike, None) == "of 1 ratio between them here, 0 excluded 1"
    for plan, changes in (({"encode": [route(1, "int8")]}, {}), (None, {}), (alike, {"is_peer": True})):
        assert text_of(plan, 1.1, **changes).startswith("none here were compared; ")


def test_what_is_said_of_identical_plans_elsewhere_is_so() -> None:
    counts = [(0, 0)]
    for path in RESULTS.glob("*.json"):
        text = path.with_suffix(".md").read_text("utf-8")
        found = re.search(r"^- identical plans: of (\d+) ratios? .*, (\d+) ex", text, re.MULTILINE)
        counts += [(int(found[1]), int(found[2]))] if found else []
    ratios, excluded = map(sum, zip(*counts, strict=True))
    assert f"of {ratios} ratios between them in vae-edge's own reports, {excluded} excluded 1" == _ALIKE_ELSEWHERE


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_the_text_of_a_race_of_the_repository_is_made_of_its_figures(path: Path) -> None:
    assert path.with_suffix(".md").read_text("utf-8") == format_markdown(RaceReport.load(path))


def test_the_report_survives_json(report: RaceReport, tmp_path: Path) -> None:
    report.save(tmp_path / "race.json")
    loaded = RaceReport.load(tmp_path / "race.json")
    assert json.dumps(loaded.to_dict(), sort_keys=True) == json.dumps(report.to_dict(), sort_keys=True)
    assert (loaded.cases[0].points[0].rows, loaded.settings) == (report.cases[0].points[0].rows, report.settings)


def test_what_a_report_says_is_computed_anew_from_its_rounds(report: RaceReport) -> None:
    document = json.loads(json.dumps(report.to_dict()))
    (point,) = document["cases"][0]["points"]
    for row in point["rows"]:
        row |= {"p50_ms": 0.001, "low_ms": 0.001, "high_ms": 0.001}
    for ratio in point["ratios"]:
        ratio |= {"ratio": 99.0, "low": 98.0, "high": 100.0, "fastest_peer": True}
    assert RaceReport.from_dict(document) == report
    point["ratios"].clear()
    assert RaceReport.from_dict(document) == report


def _case(document: Any) -> Any:
    return document["cases"][0]


def _point(document: Any) -> Any:
    return _case(document)["points"][0]


def _row(document: Any) -> Any:
    return _point(document)["rows"][0]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: d.update(format_version=True), "x.json has format_version True; this vae-edge reads version 1"),
        (lambda d: d["cases"].append(_case(d)), "x.json has case tiny 2 times; expected it once"),
        (
            lambda d: _case(d)["case"].update(macs={"encode": 1}),
            "x.json has macs of encode; expected of encode and dec",
        ),
        (lambda d: _case(d)["points"].append(_point(d)), "x.json has point 1x1 of tiny 2 times; expected it once"),
        (
            lambda d: _point(d)["rows"].append(_row(d)),
            "x.json, tiny 1x1, has row of encode by ours 2 times; expected it",
        ),
        (
            lambda d: _point(d)["runners"].append(_point(d)["runners"][1]),
            "x.json, tiny 1x1, has runner slow 2 times; expected it once",
        ),
        (
            lambda d: _row(d).update(competitor="nobody"),
            "x.json, tiny 1x1, has a row of nobody, which is not among its runners",
        ),
        (
            lambda d: _row(d).update(operation="fly"),
            "x.json, tiny 1x1, has a row of fly; expected one of encode, decode, encode-on-device, decode-on-device",
        ),
        (
            lambda d: _row(d)["round_p50_ms"].pop(),
            "x.json, tiny 1x1, has {less} rounds of ours; expected {rounds}",
        ),
        *(
            (
                lambda d, value=value: _row(d)["round_p50_ms"].__setitem__(0, value),
                f"x.json, tiny 1x1, has a row of ours whose time in ms is {value:g}; expected from 1e-09 to 1e+15",
            )
            for value in (0.0, -2.0, 1e308)
        ),
    ],
)
def test_what_no_race_can_give_is_refused_by_name(
    report: RaceReport, damage: Callable[[Any], None], message: str
) -> None:
    document = json.loads(json.dumps(report.to_dict()))
    rounds = _point(document)["rounds"]
    damage(document)
    with pytest.raises(ReportError) as caught:
        RaceReport.from_dict(document, "x.json")
    assert str(caught.value).startswith(message.format(rounds=rounds, less=rounds - 1))


def test_the_picture_shows_every_competitor(report: RaceReport, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw_race(report, tmp_path / "race.png")
    data = (tmp_path / "race.png").read_bytes()
    assert data.startswith(b"\x89PNG")
    assert len(data) > 10_000
    empty = merge([RaceReport(**{**vars(report), "cases": ()})])
    with pytest.raises(InputError, match="the race has no row to draw"):
        draw_race(empty, tmp_path / "empty.png")
    assert not (tmp_path / "empty.png").exists()


def test_merging_adds_cases_and_points_and_refuses_other_machines(report: RaceReport) -> None:
    (case,) = report.cases
    (point,) = case.points

    def changed(name: str, new: Point) -> RaceReport:
        facts = type(case.case)(**{**vars(case.case), "name": name})
        other = type(point)(**{**vars(point), "point": new})
        result = type(case)(**{**vars(case), "case": facts, "points": (other,)})
        return RaceReport(**{**vars(report), "cases": (result,)})

    merged = merge([report, changed("other", Point(1, 1)), changed("tiny", Point(8, 1)), report])
    assert {(one.case.name, str(p.point)) for one in merged.cases for p in one.points} == {
        ("tiny", "1x1"),
        ("tiny", "8x1"),
        ("other", "1x1"),
    }
    machine = type(report.machine)(**{**vars(report.machine), "cpu": "another CPU"})
    with pytest.raises(ReportError, match=r"from different machines \(.* and another CPU"):
        merge([report, RaceReport(**{**vars(report), "machine": machine})])
    with pytest.raises(ReportError, match="nothing to merge"):
        merge([])


def test_points_of_other_weights_are_not_put_together(report: RaceReport, tiny: Path, tmp_path: Path) -> None:
    (case,) = report.cases
    digest = hashlib.sha256((tiny / "manifest.json").read_bytes()).hexdigest()
    assert case.case.manifest_file_sha256 == digest
    assert f", manifest {digest[:12]}" in format_race(report)

    def of(manifest: str | None) -> RaceReport:
        facts = dataclasses.replace(case.case, manifest_file_sha256=manifest)
        return dataclasses.replace(report, cases=(dataclasses.replace(case, case=facts),))

    message = f"tiny has the manifests abababababab and {digest[:12]}; only points of the same weights can be merged"
    with pytest.raises(ReportError, match=f"^{message}$"):
        merge([of("ab" * 32), report])
    for points in (ONE, (Point(2, 1),)):  # also where nothing is left
        with pytest.raises(ReportError, match=f"^{message}$"):
            race([tiny], RaceSettings(points=points), competitors=(planted("ours"),), before=of("ab" * 32))
    assert merge([report, report]).cases[0].case == case.case
    for both in ([of(None), report], [report, of(None)]):
        assert merge(both).cases[0].case.manifest_file_sha256 is None
    document = json.loads(json.dumps(of(None).to_dict()))
    assert document["cases"][0]["case"].pop("manifest_file_sha256") is None
    assert RaceReport.from_dict(document).cases[0].case == of(None).cases[0].case


def test_what_was_raced_before_is_kept_with_its_date_and_settings(report: RaceReport, tiny: Path) -> None:
    (point,) = (dataclasses.replace(one, created="2026-01-02T03:04:05+00:00") for one in report.cases[0].points)
    before = dataclasses.replace(report, cases=(dataclasses.replace(report.cases[0], points=(point,)),))
    seen: list[RaceReport] = []
    again = race(
        [tiny],
        RaceSettings(points=(Point(1, 1), Point(2, 1)), budget=0.2, rounds=3, tune=False),
        competitors=(planted("ours", is_peer=False), planted("slow", milliseconds=1)),
        before=before,
        after_point=seen.append,
    )
    first, second = again.cases[0].points
    assert first == point
    assert (second.point, second.created) == (Point(2, 1), again.created)
    assert second.settings == dataclasses.replace(again.settings, competitors=("ours", "slow"))
    assert [ratio.interval_from for ratio in second.ratios] == ["t", "t"]
    assert seen == [again]
    for text in (format_race(again), format_markdown(again)):
        assert f"measured: {point.created} to {again.created}\n" in text
        assert f"raced {point.created}, budget 1.7 s for 1 point, at most 8 rounds, 60 s of tuning" in text
        assert f"raced {again.created}, budget 0.2 s for 2 points, at most 3 rounds" in text
    loaded = RaceReport.from_dict(json.loads(json.dumps(again.to_dict())))
    assert loaded.cases[0].points[0].settings == point.settings


def test_a_point_whose_settings_are_not_known_says_nothing_of_them(report: RaceReport) -> None:
    point = dataclasses.replace(report.cases[0].points[0], settings=None)
    unknown = dataclasses.replace(report, cases=(dataclasses.replace(report.cases[0], points=(point,)),))
    assert "raced" not in format_race(unknown)
    document = json.loads(json.dumps(unknown.to_dict()))
    assert RaceReport.from_dict(document) == unknown
    for name in ("created", "settings"):
        lacking = copy.deepcopy(document)
        del lacking["cases"][0]["points"][0][name]
        with pytest.raises(ReportError, match=rf"cases\[0\]\.points\[0\] has no '{name}'$"):
            RaceReport.from_dict(lacking)


@pytest.mark.parametrize(
    ("names", "operations", "left"),
    [
        (("ours",), ("encode",), None),
        (("ours", "torch", "openvino-f32", "planted"), ("encode", "decode"), None),
        (("ours", "ours-int8"), ("encode",), ("ours", "ours-int8", "onnxruntime", "torch", "openvino-f32")),
        (("torch-compile",), ("encode",), ("torch-compile", "ours", "onnxruntime", "torch", "openvino-f32")),
    ],
)
def test_a_point_is_raced_again_where_somebody_is_missing(
    report: RaceReport, tiny: Path, names: tuple[str, ...], operations: tuple[str, ...], left: tuple[str, ...] | None
) -> None:
    """By all who raced there before, too: only turns of one round can be compared."""
    point = point_of(report, torch="skipped", planted="failed", **{"openvino-f32": "disqualified"})
    before = dataclasses.replace(report, cases=(dataclasses.replace(report.cases[0], points=(point,)),))
    lines: list[str] = []
    settings = RaceSettings(points=ONE, operations=operations)
    field = [COMPETITORS.get(name, planted(name)) for name in names]
    plans = list(running._plan_points(Case.open(tiny), before, settings, field, lines.append))
    assert [tuple(one.name for one in plan.competitors) for plan in plans] == ([] if left is None else [left])
    assert all(plan.settings.competitors == left for plan in plans)
    assert all(plan.settings.operations == ("encode", "decode") for plan in plans)
    lost = "tiny 1x1: planted is left out, as this vae-edge does not know it"
    assert lines == ([] if left is None else [lost])


def test_a_point_is_raced_again_where_an_operation_is_missing(report: RaceReport, tiny: Path) -> None:
    point = point_of(report)
    point = dataclasses.replace(point, rows=tuple(row for row in point.rows if row.operation == "decode"))
    before = dataclasses.replace(report, cases=(dataclasses.replace(report.cases[0], points=(point,)),))

    def left(*operations: str) -> list[tuple[str, ...]]:
        settings = RaceSettings(points=ONE, operations=operations)
        plans = running._plan_points(Case.open(tiny), before, settings, [COMPETITORS["ours"]], print)
        return [plan.settings.operations for plan in plans]

    assert left("decode") == []
    assert left("encode") == [("encode", "decode")]


def test_a_point_is_kept_where_nobody_can_be_timed_any_more(report: RaceReport, tiny: Path) -> None:
    lines: list[str] = []
    field = (planted("ours", is_peer=False, fault="broken"), planted("new", fault="absent"))
    again = race([tiny], RaceSettings(points=ONE), lines.append, competitors=field, before=report)
    assert again.cases == report.cases
    assert lines[-1] == (
        "tiny 1x1: nobody was timed, and what was before is kept: new skipped: the planted engine is not installed; "
        "ours failed: ValueError: the planted engine is broken"
    )
    with pytest.raises(BenchmarkError, match="nobody was timed at any point"):
        race_cli._require_rows(again, report)
    race_cli._require_rows(report, report)


def point_of(report: RaceReport, **out: str) -> PointResult:
    """The report's point as if ours and onnxruntime had been timed, and these were out in the way named."""
    (point,) = report.cases[0].points
    rows = tuple(row for row in point.rows if row.competitor != "quick")
    rows = tuple(dataclasses.replace(row, competitor=row.competitor.replace("slow", "onnxruntime")) for row in rows)
    kinds = {kind: {name: "planted" for name in out if out[name] == kind} for kind in set(out.values())}
    return dataclasses.replace(point, rows=rows, **{"skipped": {}, "disqualified": {}, "failed": {}, **kinds})


@pytest.mark.parametrize("asked_for", [False, True])
def test_every_turn_has_a_fresh_process_where_asked_for_or_memory_is_short(
    asked_for: bool, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []
    monkeypatch.setattr(running, "Process", lambda *given: started.append(Process(*given)) or started[-1])
    if not asked_for:
        monkeypatch.setattr(running, "available_bytes", lambda: 0)
    field = (planted("ours", is_peer=False, milliseconds=4), planted("slow", milliseconds=12))
    settings = RaceSettings(points=ONE, operations=("decode",), budget=0.3, rounds=3, fresh=asked_for)
    found = race([tiny], settings, competitors=field)
    (point,) = found.cases[0].points
    assert point.fresh
    # One of each is opened to be checked, the first of which learns that memory is short, and one of each per round.
    assert len(started) == len({one.pid for one in started}) == 2 + 3 * 2
    assert 1.5 < point.ratios[0].ratio < 6
    assert "a fresh process for every turn" in format_race(found)
    busy = dataclasses.replace(point, runners=tuple(dataclasses.replace(r, idle_cpu_share=0.4) for r in point.runners))
    assert absent_lines(busy) == []  # between two turns a process is not idle, but gone
    assert len(absent_lines(dataclasses.replace(busy, fresh=False))) == 2


def test_a_point_with_too_many_threads_is_skipped_by_name(tiny: Path) -> None:
    result = race([tiny], RaceSettings(points=(Point(1, 4000),)), competitors=(planted("ours", is_peer=False),))
    assert result.cases[0].points == ()
    assert result.cases[0].skipped_points == {"1x4000": "this machine lets it use fewer than 4000 cores"}


def test_order_changes_so_that_nobody_always_follows_the_same_one() -> None:
    names = list("abcd")
    rounds = [order_of(names, number) for number in range(8)]
    assert all(sorted(one) == names for one in rounds)
    assert {one[0] for one in rounds} == set(names)
    followed = {(one[place], one[place + 1]) for one in rounds for place in range(3)}
    assert all(len({before for before, after in followed if after == name}) >= 2 for name in names)


@pytest.mark.parametrize(
    ("calls", "budget", "rounds", "expected"),
    [
        ([0.001, 0.001], 10, 10, (10, 0.5)),
        ([0.001, 0.3], 10, 10, (10, 0.4)),  # the slow one takes 0.6 of each second
        ([1.0, 1.0], 20, 10, (5, 2.0)),
        ([5.0], 1, 10, (FEWEST_ROUNDS, 0.0)),
        ([0.001] * 10, 8, 10, (8, 0.1)),  # no turn is shorter than a tenth of a second,
        ([0.001] * 10, 3, 10, (6, 0.05)),  # but there are rounds enough for an interval
        ([0.001] * 10, 3, 4, (4, 0.075)),
    ],
)
def test_rounds_and_turns_fit_into_the_budget(
    calls: list[float], budget: float, rounds: int, expected: tuple[int, float]
) -> None:
    assert plan_rounds(calls, budget, rounds) == pytest.approx(expected)


def test_nobody_is_ranked_without_ours() -> None:
    assert rank([Row.of("encode", "onnxruntime", [1.0, 2.0, 3.0], 9)], ["onnxruntime"]) == ()


def test_where_ours_was_not_timed_another_of_its_own_is_the_reference() -> None:
    rows = [
        Row.of(operation, name, [level] * 6, 9)
        for operation in ("encode", "decode")
        for name, level in (("torch", 3.0), ("ours-int8", 1.0), ("ours-fp32", 2.0))
    ]
    found = rank(rows, ["torch"])
    assert [(one.operation, one.competitor, one.against, one.fastest_peer) for one in found] == [
        (operation, name, "ours-int8", name == "torch")
        for operation in ("encode", "decode") for name in ("torch", "ours-fp32")
    ]  # fmt: skip
    assert [one.ratio for one in found] == pytest.approx([3, 2, 3, 2])
    with_ours = [*rows, Row.of("encode", "ours", [1.5] * 6, 9)]
    assert {one.against for one in rank(with_ours, ["torch"])} == {"ours"}
    groups = {"torch": "fp16", "ours-int8": "fp32", "ours-fp32": "fp32"}
    assert {(one.competitor, one.against) for one in rank(rows, ["torch"], groups)} == {("ours-fp32", "ours-int8")}


def without_ours(report: RaceReport, other: str | None) -> RaceReport:
    """As if ours had failed, and another one of vae-edge's own had been timed in its place, or none."""
    (point,) = report.cases[0].points
    rows, runners = (
        tuple(
            dataclasses.replace(one, **{key: other}) if getattr(one, key) == "ours" else one
            for one in every
            if other is not None or getattr(one, key) != "ours"
        )
        for every, key in ((point.rows, "competitor"), (point.runners, "name"))
    )
    ratios, failed = rank(rows, ["slow", "quick"]), {"ours": "was ended by SIGKILL"}
    changed = dataclasses.replace(point, rows=rows, runners=runners, ratios=ratios, failed=failed)
    return dataclasses.replace(report, cases=(dataclasses.replace(report.cases[0], points=(changed,)),))


def test_the_text_says_against_whom_or_why_there_are_no_ratios(report: RaceReport) -> None:
    assert "ratios are against" not in format_race(report)
    for text in map(format_race, (report, without_ours(report, None))):
        assert " × ours " in text
    lines = format_race(undisturbed(without_ours(report, "ours-fp32"), planted_ms)).splitlines()
    (head,) = (line for line in lines if line.startswith("operation "))
    assert " × ours-fp32 " in head
    assert "ratios are against ours-fp32, as ours was not timed" in lines
    assert any("ours-fp32 is faster than the fastest peer, quick, which takes 1.50" in line for line in lines)
    assert any(line.startswith("ours-fp32 runs on: encode [from_batch=1") for line in lines)
    assert [line.split()[-1] for line in lines if line.startswith("encode     ours-fp32 ")] == ["1"]
    none = without_ours(report, None)
    assert none.cases[0].points[0].ratios == ()
    for text in (format_race(none), format_markdown(none)):
        assert "no ratios are given, as none of vae-edge's own was timed\n" in text
        assert "ours failed: was ended by SIGKILL" in text


def test_low_precisions_are_judged_by_their_root_mean_square(tiny: Path) -> None:
    reference = Case.open(tiny).reference()
    spike = reference["reconstruction"].copy()
    spike[0, 0, 0, 0] += 0.5

    def entrant(precisions: tuple[str, ...]) -> Entrant:
        def encode(x: Any) -> Any:
            return reference["mean"].copy(), reference["logvar"].copy()

        return Entrant(encode, lambda z: (spike.copy(),), precisions, "", "")

    assert judge(entrant(("fp32", "int8")), reference).fault is None
    verdict = judge(entrant(("fp32",)), reference)
    assert verdict.fault is not None
    assert verdict.fault.startswith("the largest error of reconstruction is ")
    assert measure_error(reference["mean"], reference["mean"], "max", False) == 0


@pytest.mark.parametrize(("on_gpu", "is_fault"), [(False, False), (True, True)])
def test_fp32_on_a_gpu_is_held_to_less_than_tf32_errs(tiny: Path, on_gpu: bool, is_fault: bool) -> None:
    reference = Case.open(tiny).reference()

    def encode(x: Any) -> Any:
        return reference["mean"].copy(), reference["logvar"].copy()

    def decode(z: Any) -> Any:
        return (reference["reconstruction"] + np.float32(4e-4),)

    resident = Resident(lambda array: array, encode, decode, tuple) if on_gpu else None
    verdict = judge(Entrant(encode, decode, ("fp32",), "", "", resident=resident), reference)
    assert (verdict.fault is not None) == is_fault


@pytest.mark.parametrize("request_name", ["answer", "no such thing"])
def test_a_worker_answers_the_requests_that_it_knows_and_no_others(request_name: str) -> None:
    found = Worker().answer({"request": request_name})
    assert found == {
        "fail": f"ValueError: there is no request {request_name!r}; expected one of load, open, warm, turn, finish"
    }


def test_cores_are_as_many_as_asked_for() -> None:
    found = choose_cores(1)
    if sys.platform == "linux":
        assert found is not None
        assert set(found) <= os.sched_getaffinity(0)
        assert len(found) == 1
    assert choose_cores(100_000) is None


@pytest.mark.parametrize(
    ("plan", "text"),
    [
        ({"encode": {"device": "cpu"}, "decode": {"device": "cpu"}}, "encode device=cpu; decode device=cpu"),
        ({"encode": [{"from_batch": 1, "x": None}, {"from_batch": 8}]}, "encode [from_batch=1 x=null], [from_batch=8]"),
        (
            {"decode": [{"from_batch": 1, "fixed": []}, {"fixed": (1, 8)}]},
            "decode [from_batch=1 fixed=[]], [fixed=[1, 8]]",
        ),
    ],
)
def test_a_plan_of_any_form_is_printed(plan: Any, text: str) -> None:
    assert format_plan(plan) == text


@pytest.mark.parametrize(
    ("milliseconds", "text"),
    [
        (0.0123456, "12.3 µs"),
        (0.9994, "999 µs"),
        (0.9996, "1 ms"),
        (1.0, "1 ms"),
        (999.4, "999 ms"),
        (999.6, "1 s"),
        (12345.0, "12.3 s"),
    ],
)
def test_the_unit_of_a_time_is_chosen_after_rounding(milliseconds: float, text: str) -> None:
    assert format_ms(milliseconds) == text


@pytest.fixture
def case_folder(write_case: Callable[..., Path], tiny: Path, tmp_path: Path) -> Path:
    """A case made of the tiny bundle, without torch modules that could be loaded."""
    return write_case(
        tmp_path / "case",
        Case.open(tiny).reference(),
        name="a-case",
        description="tiny",
        parameters=7,
        macs={"encode": 1, "decode": 2},
        quality={"psnr_db": 20.5},
    )


def test_a_case_gives_its_own_inputs_and_graphs(case_folder: Path, tiny: Path) -> None:
    case = Case.open(case_folder)
    assert case.facts.manifest_file_sha256 == Case.open(tiny).facts.manifest_file_sha256 is not None
    assert (case.name, case.facts.macs, case.facts.quality) == ("a-case", {"encode": 1, "decode": 2}, {"psnr_db": 20.5})
    (case_folder / "plain" / "encoder.onnx").write_bytes(b"another export")
    assert case.graph("encoder") == b"another export"
    assert case.bundle_graph("encoder", "fp32") == (tiny / "encoder.onnx").read_bytes()
    assert Case.open(tiny).graph("encoder") == (tiny / "encoder.onnx").read_bytes()
    np.testing.assert_array_equal(case.reference()["x"], Case.open(tiny).reference()["x"])


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (
            lambda f: (f / "case.json").write_text("{"),
            CaseError,
            "case.json is not JSON; expected a case of benchmarks/cases",
        ),
        (
            lambda f: (f / "case.json").write_text("[]"),
            CaseError,
            'case.json is not a case of benchmarks/cases/build.py, whose "fo',
        ),
        (lambda f: (f / "case.json").unlink(), CaseError, "is neither a case nor a bundle: it has no case.json and no"),
        (lambda f: shutil.rmtree(f / "plain"), CaseError, "lacks plain, which a case has beside case.json"),
        (lambda f: (f / "bundle.vae" / "encoder.onnx").write_bytes(b"x"), BundleError, "encoder.onnx"),
        (
            lambda f: _edit(f, format_version=9),
            CaseError,
            "case.json has format_version 9; this vae-edge reads version 1",
        ),
        (lambda f: _edit(f, kind=3), CaseError, "case.json.kind is 3; expected a string"),
        (lambda f: _edit(f, macs={}), CaseError, "case.json has macs of nothing; expected of encode and decode"),
        (
            lambda f: _edit(f, input_shape=[1, 9, 9]),
            CaseError,
            r"case.json has input_shape \(1, 9, 9\); expected \(1, 8, 8\), as the bundle has it$",
        ),
        (lambda f: _edit(f, kind="autoencoder"), CaseError, "case.json has kind autoencoder; expected vae, as the bun"),
        *(
            (damage, CaseError, "inputs.npz is not an .npz archive of plain arrays, or is damaged$")
            for damage in (
                lambda f: (f / "inputs.npz").write_bytes(b""),
                lambda f: (f / "inputs.npz").write_bytes(b"garbage " * 99),
                lambda f: (f / "inputs.npz").write_bytes((f / "inputs.npz").read_bytes()[:-700]),
                lambda f: _flip(f / "inputs.npz"),
                lambda f: shutil.copy(_npy(f), f / "inputs.npz"),
                lambda f: _rewrite(f, x=np.array([{}], dtype=object)),
            )
        ),
        (lambda f: shutil.rmtree(f / "bundle.vae"), CaseError, "lacks bundle.vae, which a case has beside case.json"),
        (
            lambda f: _rewrite(f, x=np.zeros(3)),
            CaseError,
            r"inputs.npz has no float32 array x of shape \(N, 1, 8, 8\)$",
        ),
        (lambda f: _rewrite(f, x=np.float32(0)), CaseError, r"inputs.npz has no float32 array x of shape \(N, 1, 8, 8"),
        (lambda f: _rewrite(f, logvar=None), CaseError, r"inputs.npz has no float32 array logvar of shape \(N, 4\)$"),
        (
            lambda f: _rewrite(f, reconstruction=np.zeros((2, 1, 8, 8), np.float32)),
            CaseError,
            "inputs.npz has 4 of x, 4 of mean, 2 of reconstruction, 4 of logvar; expected as many of each, at least 1$",
        ),
        (
            lambda f: _rewrite(
                f,
                **{name: np.zeros((0, 1, 8, 8), np.float32) for name in ("x", "reconstruction")},
                **{name: np.zeros((0, 4), np.float32) for name in ("mean", "logvar")},
            ),
            CaseError,
            "inputs.npz has 0 of x, 0 of mean, 0 of reconstruction, 0 of logvar; expected as many of each, at least 1$",
        ),
        (
            lambda f: _rewrite(f, mean=np.full((4, 4), np.nan, np.float32)),
            CaseError,
            "inputs.npz has mean with NaN or infinite values; expected finite ones$",
        ),
    ],
)
def test_damaged_cases_are_refused(
    case_folder: Path, damage: Any, error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one sentence that names the file, before any competitor is opened."""
    damage(case_folder)
    monkeypatch.setattr(running, "PointRun", None)
    with pytest.raises(error, match=message) as caught:
        race([case_folder], RaceSettings(points=ONE))
    assert "\n" not in str(caught.value)
    assert str(case_folder) in str(caught.value)


def test_arrays_that_are_not_of_the_model_are_left_out(case_folder: Path, tiny: Path) -> None:
    _rewrite(case_folder, another=np.array([{}], dtype=object))
    assert set(Case.open(case_folder).reference()) == {"x", "mean", "logvar", "reconstruction"}


def _rewrite(folder: Path, **arrays: Any) -> None:
    """The case's inputs with these in place of the same names; None takes one out."""
    with np.load(folder / "inputs.npz") as before:
        kept = {**before, **arrays}
    np.savez(folder / "inputs.npz", **{name: array for name, array in kept.items() if array is not None})


def _npy(folder: Path) -> Path:
    np.save(folder / "one.npy", np.zeros(3))
    return folder / "one.npy"


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[300] ^= 0xFF  # in the first array's values
    path.write_bytes(data)


def _edit(folder: Path, **changes: Any) -> None:
    document = json.loads((folder / "case.json").read_text())
    (folder / "case.json").write_text(json.dumps({**document, **changes}))


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.main, ["race", *map(str, arguments)])


def test_options_become_settings(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def no_race(cases: Any, settings: RaceSettings, *rest: Any, **more: Any) -> None:
        seen.append(settings)
        raise InputError("seen enough")

    monkeypatch.setattr(race_cli, "race", no_race)
    assert run(tiny).exit_code == 1
    given = ("--points", "2x1", "--operations", "decode", "--competitors", "ours,torch", "--budget", "3")
    assert run(tiny, *given, "--rounds", "7", "--no-tune", "--tune-seconds", "5", "--fresh").exit_code == 1
    names = {"operations": ("decode",), "competitors": ("ours", "torch")}
    numbers = {"budget": 3.0, "rounds": 7, "tune_seconds": 5.0}
    assert seen == [
        RaceSettings(),
        RaceSettings(points=(Point(2, 1),), tune=False, fresh=True, **names, **numbers),
    ]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("/no/such",), 1, "/no/such is neither a case nor a bundle: it has no case.json and no manifest.json"),
        (("EMPTY",), 1, "is neither a case nor a bundle"),
        (("TINY", "TINY"), 1, "cases is tiny, tiny; expected at least one, each name once"),
        (("TINY", "--competitors", "tensorflow"), 1, "competitor is 'tensorflow'; expected one of ours, ours-cpu, "),
        (("TINY", "--competitors", "ours,ours"), 1, "competitor 'ours' is named twice"),
        (("TINY", "--competitors", ""), 1, "competitors is empty; expected at least one"),
        (("TINY", "--points", "1"), 1, "point is '1'; expected BATCHxTHREADS, such as 32x2"),
        (("TINY", "--points", "0x1"), 1, "batch is 0; expected a whole number from 1 to 65536"),
        (("TINY", "--points", "1x0"), 1, "threads is 0; expected a whole number from 1"),
        (("TINY", "--operations", "sample"), 1, "operation is 'sample'; expected one of encode, decode"),
        (("TINY", "--budget", "0"), 1, "budget is 0.0; expected a number between 0 and 1e+06, both excluded"),
        (("TINY", "--tune-seconds", "0"), 1, "tune_seconds is 0.0; expected a number between 0 and 3600"),
        (("TINY", "--rounds", "2"), 1, "rounds is 2; expected a whole number from 3 to 100"),
        (("TINY", "--output", "TINY"), 1, "tiny.vae exists and is not the folder of a race; choose a name that is not"),
        (("TINY", "--output", "/no/folder/x"), 1, "/no/folder/x cannot be made: the folder /no/folder does not exist"),
        (("--merge", "TINY/manifest.json"), 1, "manifest.json is not a report of vae-bench race, whose"),
        (("--merge", "/no.json"), 1, "/no.json cannot be read: No such file or directory"),
        (("TINY", "--resume"), 2, "--resume goes with --output, and not with --force or --merge"),
        ((), 2, "Missing argument 'CASE...'."),
    ],
)
def test_bad_input_is_answered_in_one_sentence(
    tiny: Path, tmp_path: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    result = run(*(one.replace("TINY", str(tiny)).replace("EMPTY", str(tmp_path)) for one in arguments))
    last = result.stderr.strip().splitlines()[-1]
    assert (result.exit_code, result.stdout) == (code, "")
    assert message in last
    assert "Traceback" not in result.stderr


def test_a_real_race_through_the_command_line(
    tiny: Path, case_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ours, tuned, against onnxruntime on the tiny bundle; the torch competitors are skipped by name; then refused,
    resumed and merged."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    output = tmp_path / "race"
    quick = ("--tune-seconds", "0.1", "--budget", "0.3", "--rounds", "3", "--points", "1x1", "--output", output)
    first = run(tiny, *quick, "--competitors", "ours,ours-int8,onnxruntime,torch", "--json")
    assert first.exit_code == 0, first.output
    found = RaceReport.from_dict(json.loads(first.stdout))
    (point,) = found.cases[0].points
    assert {row.competitor for row in point.rows} == {"ours", "onnxruntime"}
    assert point.tuned == "yes, 0.1 s"
    assert point.skipped == {
        "ours-int8": "the bundle has no int8, it has fp32",
        "torch": "a bundle alone has no torch modules; build a case for it",
    }
    assert max(error for runner in point.runners for error in runner.errors.values()) < 1e-4
    drawn = {"race.png"} if importlib.util.find_spec("matplotlib") else set()
    assert {path.name for path in output.iterdir()} == {"race.json", "race.md"} | drawn
    refused = run(tiny, *quick)
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert "race.json exists; continue it with --resume, or replace it with --force" in refused.stderr
    resumed = run(tiny, case_folder, *quick, "--competitors", "onnxruntime,ours-int8", "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert "tiny 1x1" not in resumed.stderr
    both = RaceReport.load(output / "race.json")
    assert both.cases[0] == found.cases[0]
    assert [case.case.name for case in both.cases] == ["tiny", "a-case"]
    assert "ours-int8" in both.cases[1].points[0].skipped
    assert both.cases[1].points[0].ratios == ()
    merged = run("--merge", output / "race.json", output / "race.json", "--output", tmp_path / "merged")
    assert merged.exit_code == 0, merged.output
    assert RaceReport.load(tmp_path / "merged" / "race.json").cases == both.cases


def test_where_nobody_was_timed_the_command_says_why_and_fails(tiny: Path, case_folder: Path, tmp_path: Path) -> None:
    """And what it found is raced again, not kept as done."""
    output = tmp_path / "race"
    quick = ("--no-tune", "--budget", "0.2", "--rounds", "3", "--points", "1x1,2x1", "--output", output)
    result = run(tiny, *quick, "--competitors", "torch,ours-int8")
    assert (result.exit_code, result.stdout) == (1, "")
    for point in ("1x1", "2x1"):
        assert f"tiny {point}: ours-int8 skipped: the bundle has no int8, it has fp32\n" in result.stderr
    assert result.stderr.endswith("Error: nobody was timed at any point; the lines above say why\n")
    assert not output.exists()
    none = run(tiny, "--points", "1x4000")
    assert (none.exit_code, none.stdout) == (1, "")
    assert "tiny: point 1x4000 was skipped: this machine lets it use fewer than 4000 cores\n" in none.stderr
    quick = ("--no-tune", "--budget", "0.1", "--rounds", "3", "--points", "1x1", "--output", output)
    assert run(tiny, *quick, "--competitors", "onnxruntime").exit_code == 0
    resumed = run(case_folder, *quick, "--competitors", "ours-int8", "--resume")
    assert (resumed.exit_code, "a-case 1x1: ours-int8 skipped" in resumed.stderr) == (1, True)
    again = run(tiny, case_folder, *quick, "--competitors", "onnxruntime", "--resume")
    assert (again.exit_code, "a-case 1x1: onnxruntime: opening" in again.stderr) == (0, True)
    (output / "race.json").write_bytes(kept := (output / "race.json").read_bytes() + b"\n")
    (output / "race.md").unlink()
    done = run(tiny, case_folder, *quick, "--competitors", "onnxruntime", "--resume")
    assert (done.exit_code, "opening" in done.stderr) == (0, False)
    assert "nothing is left to race: every point is there, with all who were to race\n" in done.stderr
    assert ((output / "race.json").read_bytes(), (output / "race.md").exists()) == (kept, True)
    (output / "race.md").write_text("up to date")
    assert run(tiny, case_folder, *quick, "--competitors", "onnxruntime", "--resume").exit_code == 0
    assert (output / "race.md").read_text() == "up to date"
    more = run(tiny, *quick, "--competitors", "ours-int8", "--resume")
    assert (more.exit_code, "tiny 1x1: onnxruntime: opening" in more.stderr) == (0, True)
    first, second = (case.points[0] for case in RaceReport.load(output / "race.json").cases)
    assert ({row.competitor for row in first.rows}, list(first.skipped)) == ({"onnxruntime"}, ["ours-int8"])
    assert [point.settings and point.settings.competitors for point in (first, second)] == [
        ("ours-int8", "onnxruntime"),
        ("onnxruntime",),
    ]


@pytest.mark.parametrize("tune", [True, False])
def test_tuning_for_a_race_leaves_the_user_s_own_alone(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tune: bool
) -> None:
    monkeypatch.setenv("VAE_EDGE_CACHE", str(tmp_path))
    tuned: list[str] = []

    def run_group(command: Any, environment: Any) -> Any:
        tuned.append(environment["VAE_EDGE_CACHE"])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(running, "run_group", run_group)
    field = (
        Competitor("ours", "ours", {"device": "auto", "precision": "auto"}, is_peer=False),
        planted("peer", variable="VAE_EDGE_CACHE"),
    )
    found = race([tiny], RaceSettings(points=ONE, budget=0.2, rounds=3, tune=tune), competitors=field)
    folder = found.cases[0].points[0].runners[1].configuration
    assert tuned == ([folder] if tune else [])
    assert (folder == str(tmp_path)) == (not tune)
    assert Path(folder).exists() == (not tune)


def test_nobody_takes_a_gpu_in_a_race_on_the_cpu(tiny: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nor does tuning measure one. Where there is one, "auto" would: the command is really run."""
    monkeypatch.setenv("VAE_EDGE_CACHE", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    seen: list[str] = []

    def run_group(command: Any, environment: Any) -> Any:
        seen.append(environment["CUDA_VISIBLE_DEVICES"])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(running, "run_group", run_group)
    field = (COMPETITORS["ours"], planted("peer", variable="CUDA_VISIBLE_DEVICES"))
    (point,) = race([tiny], RaceSettings(points=ONE, budget=0.2, rounds=3), competitors=field).cases[0].points
    ours, peer = point.runners
    assert (seen, peer.configuration) == (["-1"], "-1")
    assert "'cpu'" in repr(ours.plan)
    assert "cuda" not in repr(ours.plan)


def test_nothing_is_left_where_nothing_was_raced(tiny: Path, tmp_path: Path) -> None:
    for arguments in ((tmp_path,), ("--merge", tiny / "manifest.json")):
        assert run(*arguments, "--output", tmp_path / "out").exit_code == 1
        assert list(tmp_path.iterdir()) == []


def test_force_replaces_only_races(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "race.json").write_text('{"format": "something else"}')
    result = run(tiny, "--output", tmp_path, "--force")
    assert result.exit_code == 1
    assert "race.json is not a report of vae-bench race; --force replaces nothing else" in result.stderr


def test_without_matplotlib_the_rest_is_written(
    report: RaceReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    race_cli._write(tmp_path, report)
    assert {path.name for path in tmp_path.iterdir()} == {"race.json", "race.md"}
    assert "no picture: " in capsys.readouterr().err


def test_an_engine_that_is_not_installed_is_skipped_with_its_cure(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "openvino.py").write_text("raise ImportError")
    code = (
        "import sys; from vae_benchmarks.race.worker import Worker; "
        f"print(Worker().answer(dict(request='open', case={str(tiny)!r}, module='native_openvino', "
        "options={'precision': 'f32'}, batch=1, threads=1, check=True)))"
    )
    path = os.pathsep.join([str(tmp_path), *(part for part in sys.path if part)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )
    assert done.stdout.strip() == str({"skip": 'openvino is not installed; pip install "vae-edge[race]"'}), done.stderr


@pytest.mark.parametrize("way", ["bound tensors", "shared inputs"])
def test_what_openvino_gives_is_right_and_the_caller_s(tiny: Path, way: str) -> None:
    openvino = pytest.importorskip("openvino")
    case = Case.open(tiny)
    model = openvino.Core().read_model(case.graph("encoder"))
    model.reshape([4, 1, 8, 8])
    call = ways_to_call(openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}))[way]()
    reference = case.reference()
    images = reference["x"].copy()
    first = call(images)
    kept = [array.copy() for array in first]
    images[:] = 0  # the caller's memory again
    second = call(reference["x"][::-1].copy())
    for order, found in ((1, first), (-1, second)):
        for name, array in zip(("mean", "logvar"), found, strict=True):
            np.testing.assert_allclose(array[::order], reference[name], atol=1e-4)
            assert array.flags.owndata
            assert array.flags.writeable
    assert all(np.array_equal(array, copy) for array, copy in zip(first, kept, strict=True))


@pytest.mark.parametrize("quick", ["bound tensors", "shared inputs"])
def test_openvino_is_called_in_the_way_that_is_faster(tiny: Path, monkeypatch: pytest.MonkeyPatch, quick: str) -> None:
    pytest.importorskip("openvino")
    ways = native_openvino.ways_to_call

    def slow_down(compiled: Any) -> dict[str, Any]:
        def slow(make: Callable[[], Any]) -> Callable[[], Any]:
            call = make()
            return lambda: lambda array: (time.sleep(0.02), call(array))[1]

        return {name: make if name == quick else slow(make) for name, make in ways(compiled).items()}

    monkeypatch.setattr(native_openvino, "ways_to_call", slow_down)
    case = Case.open(tiny)
    entrant = native_openvino.open_entrant(case, 4, 1, "f32")
    assert entrant.configuration.endswith(f", encoder with {quick}, decoder with {quick}")
    assert judge(entrant, case.reference()).fault is None


def test_the_command_line_loads_no_engine() -> None:
    heavy = {"torch", "openvino", "matplotlib", "onnxruntime", "mlperf_loadgen"}
    code = f"import sys, vae_benchmarks.cli; print(sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "[]\n", done.stderr


def test_names_of_competitors_are_those_promised() -> None:
    assert list(COMPETITORS) == [
        "ours", "ours-cpu", "ours-fp32", "ours-int8", "onnxruntime", "torch", "torch-compile",
        "openvino-f32", "openvino-bf16", "openvino-int8",
    ]  # fmt: skip
    assert [name for name, one in COMPETITORS.items() if not one.is_peer] == [
        "ours",
        "ours-cpu",
        "ours-fp32",
        "ours-int8",
    ]


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
@pytest.mark.parametrize("stage", ["round 1 of", "vae-run tune"])
def test_ctrl_c_leaves_no_process(tiny: Path, tmp_path: Path, stage: str) -> None:
    psutil = pytest.importorskip("psutil")
    command = [sys.executable, "-m", "vae_benchmarks.cli", "race", str(tiny), "--budget", "1000", "--points", "1x1"]
    tune = "--tune" if stage == "vae-run tune" else "--no-tune"
    process = subprocess.Popen(
        [*command, "--competitors", "ours,onnxruntime", tune],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
    )
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if stage in line:
                break
        children = _wait_for_children(psutil.Process(process.pid), 2)
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=20)
        assert time.monotonic() - began < 10
    finally:
        process.kill()
    assert process.returncode == 1
    assert stderr.strip().endswith("Aborted!")
    _, alive = psutil.wait_procs(children, timeout=5)
    assert alive == []


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
@pytest.mark.parametrize("stage", ["opening", "round 1 of", "vae-run tune"])
def test_sigterm_leaves_no_process_and_no_folder(
    tiny: Path, case_folder: Path, tmp_path: Path, stage: str, terminate: Callable[..., str]
) -> None:
    """Also where a competitor has started something itself, as torch.compile starts a C++ compiler."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "torch.py").write_text(
        "import subprocess, sys, tempfile\n"
        "subprocess.run([sys.executable, '-c', 'import time; time.sleep(1000)'], cwd=tempfile.mkdtemp())\n"
    )
    options = {
        "opening": (case_folder, "--competitors", "torch", "--no-tune"),
        "round 1 of": (tiny, "--competitors", "ours,onnxruntime", "--no-tune"),
        "vae-run tune": (tiny, "--competitors", "ours,onnxruntime", "--tune-seconds", "1000"),
    }[stage]
    path = os.pathsep.join([*([str(folder)] if stage == "opening" else []), *(part for part in sys.path if part)])
    process = subprocess.Popen(
        [sys.executable, "-m", "vae_benchmarks.cli", "race", *map(str, options), "--budget", "1000", "--points", "1x1"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path), "TMPDIR": str(temporary), "PYTHONPATH": path},
    )
    assert process.stderr is not None
    for line in process.stderr:
        if stage in line:
            break
    terminate(process, 2)
    assert process.returncode == 143
    assert list(temporary.iterdir()) == []


def _wait_for_children(process: Any, count: int) -> list[Any]:
    for _ in range(200):
        if len(children := process.children(recursive=True)) >= count:
            return list(children)
        time.sleep(0.05)
    raise AssertionError(f"there were fewer than {count} children")
