"""A race as one picture: latencies on a logarithmic scale, a panel for each operation and point."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from vae_runtime.atomic import atomic_file
from vae_runtime.errors import InputError, MissingExtraError

from .competitors import COMPETITORS, OURS, engine_of
from .report import OPERATIONS, Point, PointResult, RaceReport
from .text import format_ms

# Okabe and Ito's colours, which colour-blind readers tell apart; ours in one hue, filled, with a heavier edge.
_STYLES = {
    "ours": ("#000000", "D"),
    "ours-cpu": ("#555555", "D"),
    "ours-fp32": ("#888888", "D"),
    "ours-int8": ("#BBBBBB", "D"),
    "onnxruntime": ("#0072B2", "o"),
    "torch": ("#D55E00", "s"),
    "torch-compile": ("#E69F00", "s"),
    "torch-reduce-overhead": ("#009E73", "s"),
    "torch-graph": ("#CC79A7", "s"),
    "openvino-f32": ("#009E73", "^"),
    "openvino-bf16": ("#56B4E9", "^"),
    "openvino-int8": ("#CC79A7", "^"),
}
_OTHER = ("#F0E442", "X")
_WIDTH, _NARROW_WIDTH = 5.2, 3.6  # of a panel, in inches; the latter where there are many
_Column = tuple[Point, str]  # with the group, whose competitors are compared with each other


def draw_race(report: RaceReport, path: str | os.PathLike[str]) -> None:
    """Write the picture as PNG. Lines through the marks are the 95% intervals; left is fast.

    Raises:
        MissingExtraError: matplotlib is not installed. InputError: the report has no row.
        OutputError: the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("matplotlib", "race", "the picture of a race") from None
    columns: list[_Column] = [
        (point, group)
        for point in sorted(
            {one.point for case in report.cases for one in case.points if one.rows},
            key=lambda p: (p.device, p.batch, p.threads),
        )
        for group in dict.fromkeys(
            runner.group for case in report.cases for one in case.points if one.point == point for runner in one.runners
        )
    ]
    rows = [row for case in report.cases for one in case.points for row in one.rows]
    if not rows:
        raise InputError("the race has no row to draw: nobody finished")
    operations = [name for name in OPERATIONS if name in {row.operation for row in rows}]
    present = {engine_of(row.competitor) for row in rows}
    known = dict.fromkeys((*COMPETITORS, *_STYLES))
    names = [*(name for name in known if name in present), *sorted(present - known.keys())]
    cases = [case for case in report.cases if any(one.rows for one in case.points)]
    height = 1.1 + len(operations) * (0.75 + max(len(cases), 2) * (0.16 * len(names) + 0.1))
    width = _WIDTH if len(columns) <= 3 else _NARROW_WIDTH
    figure = Figure(figsize=(width * len(columns) + 1.2, height), layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(operations), len(columns), squeeze=False, sharey=True, sharex="col")
    for down, operation in enumerate(operations):
        for across, column in enumerate(columns):
            _draw_panel(panels[down][across], cases, operation, column, names)
            if down == len(operations) - 1:
                panels[down][across].set_xlabel("time per call, logarithmic; left is fast")
    for across in range(len(columns)):
        _label_axis([panels[down][across] for down in range(len(operations))])
    handles = [_handle(name) for name in names]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(len(names), 5), frameon=False, fontsize=9)
    with atomic_file(Path(path)) as stream:
        figure.savefig(stream, format="png")


def _draw_panel(panel: Any, cases: list[Any], operation: str, column: _Column, names: list[str]) -> None:
    point, group = column
    for index, case in enumerate(cases):
        if index % 2:
            panel.axhspan(index - 0.5, index + 0.5, color="#F4F4F4", zorder=0)
        for result in case.points:
            if result.point == point:
                _draw_case(panel, index, result, operation, group, names)
    panel.set_xscale("log")
    panel.set_ylim(len(cases) - 0.5, -0.5)
    panel.set_yticks(range(len(cases)), [case.case.name for case in cases])
    where = f"{point.threads} thread{'s'[: point.threads - 1]}" if point.device == "cpu" else f"{point.device}, {group}"
    panel.set_title(f"{operation}, batch {point.batch}, {where}", fontsize=10)
    panel.grid(axis="x", which="major", color="#CCCCCC", linewidth=0.7)
    panel.grid(axis="x", which="minor", color="#E8E8E8", linewidth=0.4)
    panel.set_axisbelow(True)
    panel.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        panel.spines[side].set_visible(False)


def _label_axis(column: list[Any]) -> None:
    """Times in words at each power of ten, and between them where the axis is short; a few where it has hardly any."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    low, high = column[-1].get_xlim()
    for panel in column:
        between = LogLocator(10, subs=(1, 2, 5) if high < 50 * low else (1,), numticks=99)
        panel.xaxis.set_major_locator(MaxNLocator(4) if high < 4 * low else between)
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_ms(value)))
        panel.xaxis.set_minor_formatter(NullFormatter())


def _draw_case(panel: Any, index: int, result: PointResult, operation: str, group: str, names: list[str]) -> None:
    groups = {runner.name: runner.group for runner in result.runners}
    for row in result.rows:
        if row.operation != operation or groups[row.competitor] != group:
            continue
        engine = engine_of(row.competitor)
        place = index + 0.8 * ((names.index(engine) + 0.5) / len(names) - 0.5)
        colour, marker = _STYLES.get(engine, _OTHER)
        if row.low_ms is not None and row.high_ms is not None:
            panel.plot([row.low_ms, row.high_ms], [place, place], color=colour, linewidth=1.2, zorder=2)
        size = 7 if engine == OURS else 5.5
        panel.plot([row.p50_ms], [place], marker, color=colour, markersize=size, markeredgecolor="white", zorder=3)


def _handle(name: str) -> Any:
    from matplotlib.lines import Line2D

    colour, marker = _STYLES.get(name, _OTHER)
    return Line2D([], [], color=colour, marker=marker, linestyle="none", markersize=7, label=name)
