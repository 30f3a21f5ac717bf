"""A race as text: aligned for a terminal, or as Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from ..table import align, describe_gpu, describe_machine, warn_of
from .competitors import OURS, TORCH, choose_reference, engine_of, ours_of
from .entrant import half_of
from .report import CaseResult, Point, PointResult, RaceReport, Ratio, Row, Runner

_DASH = "–"
# Those of benchmarks/results/race, all on CPUs.
_ALIKE_ELSEWHERE = "of 157 ratios between them in vae-edge's own reports, 23 excluded 1"
_HEAD = ["operation", "competitor", "precision", "p50", "95% interval", "rounds", "calls"]


def format_race(report: RaceReport) -> str:
    """For a terminal: facts, one table per case and point, who did not take part, and the method."""
    lines = [*_facts(report), ""]
    for case in report.cases:
        lines += [f"{case.case.name}: {_describe(case)}", *skipped_lines(case), ""]
        for point in case.points:
            lines += [_title(point), *_origin(point)]
            for group in _groups(point):
                lines += [f"in {group}:"] if group else []
                lines += [*align(_table(point, group), left=(0, 1, 2)), *_verdicts(point, group)]
            lines += [*absent_lines(point), *_busy_lines(report, point), ""]
    return "\n".join([*lines, *_method(report)])


def format_markdown(report: RaceReport) -> str:
    """The same as a Markdown document."""
    lines = ["# Race", "", *(f"- {line}" for line in _facts(report)), ""]
    for case in report.cases:
        lines += [
            f"## {case.case.name}",
            "",
            f"{_describe(case)}.",
            "",
            *(f"- {line}" for line in skipped_lines(case)),
            "",
        ]
        for point in case.points:
            lines += [f"### {_title(point)}", "", *(line for text in _origin(point) for line in (f"{text}.", ""))]
            groups = _groups(point)
            for group in groups:
                about_all = [*absent_lines(point), *_busy_lines(report, point)] if group == groups[-1] else []
                notes = [*_verdicts(point, group), *about_all]
                lines += [f"#### {group}", ""] if group else []
                lines += [*_markdown_table(_table(point, group)), "", *(f"- {note}" for note in notes), ""]
    return "\n".join([*lines, "## Method", "", *(f"- {line}" for line in _method(report))]) + "\n"


def _facts(report: RaceReport) -> list[str]:
    gpu = report.machine.gpu
    return [
        f"machine: {describe_machine(report.machine)}",
        *([] if gpu is None else [f"GPU: {describe_gpu(gpu)}"]),
        f"system: {report.machine.system}",
        "versions: " + ", ".join(f"{name} {version}" for name, version in report.versions.items()),
        f"measured: {_dates(report)}",
    ]


def _dates(report: RaceReport) -> str:
    """From the first race to the last one."""
    dates = sorted(point.created for case in report.cases for point in case.points)
    return " to ".join(dict.fromkeys((dates[0], dates[-1]))) if dates else report.created


def _describe(case: CaseResult) -> str:
    facts = case.case
    parts = [facts.description, facts.kind, "×".join(map(str, facts.input_shape))]
    if facts.parameters is not None:
        parts.append(f"{facts.parameters:,} parameters")
    if facts.macs is not None:
        parts.append(f"{facts.macs['encode'] / 1e6:,.1f} + {facts.macs['decode'] / 1e6:,.1f} M MACs")
    if facts.manifest_file_sha256 is not None:
        parts.append(f"manifest {facts.manifest_file_sha256[:12]}")
    return ", ".join(parts)


def skipped_lines(case: CaseResult) -> list[str]:
    """The points that were not raced, and why."""
    return [f"point {point} was skipped: {reason}" for point, reason in case.skipped_points.items()]


def _title(point: PointResult) -> str:
    cores = f" on cores {', '.join(map(str, point.cores))}" if point.cores else ", not bound to cores"
    fresh = ", a fresh process for every turn" if point.fresh else ""
    load = "" if point.load_average_1min is None else f", load average {point.load_average_1min:.2f} before"
    if point.other_cores_busy is not None:
        load += f", {point.other_cores_busy:.2f} cores busy with other work"
    threads = f"threads {point.point.threads}" if point.point.device == "cpu" else _on_device(point.point)
    return f"batch {point.point.batch}, {threads}{cores}{fresh}{load}"


def _origin(point: PointResult) -> list[str]:
    """When and how it was raced; nothing where that is not known."""
    if point.settings is None:
        return []
    settings, count = point.settings, len(point.settings.points)
    tuning = f", {settings.tune_seconds:g} s of tuning" if settings.tune else ""
    return [
        f"raced {point.created}, budget {settings.budget:g} s for {count} point{'s'[: count - 1]},"
        f" at most {settings.rounds} rounds{tuning}"
    ]


def _on_device(point: Point) -> str:
    return f"{point.device}, host threads {point.threads}"


def _groups(point: PointResult) -> list[str]:
    """Those who are compared with each other: on a GPU by precision, else all together."""
    return list(dict.fromkeys(runner.group for runner in point.runners)) or [""]


def _reference(point: PointResult, group: str) -> str | None:
    """Against whom the group is compared; None where none of vae-edge's own was timed."""
    own = [runner.name for runner in point.runners if runner.group == group and not runner.is_peer]
    return choose_reference(own, group)


def _why_not_ours(point: PointResult, group: str) -> list[str]:
    """Where ratios are not against ours, or there are none."""
    reference = _reference(point, group)
    if point.rows and reference is None:
        return ["no ratios are given, as none of vae-edge's own was timed"]
    if reference != ours_of(group) and any(ratio.against == reference for ratio in point.ratios):
        return [f"ratios are against {reference}, as {ours_of(group)} was not timed"]
    return []


def _table(point: PointResult, group: str) -> list[list[str]]:
    ratios = {(ratio.operation, ratio.competitor): ratio for ratio in point.ratios}
    runners = {runner.name: runner for runner in point.runners}
    reference = _reference(point, group)
    rows = [[*_HEAD, f"× {engine_of(reference or OURS)}", "95% interval"]]
    for row in point.rows:
        if runners[row.competitor].group != group:
            continue
        ratio = ratios.get((row.operation, row.competitor))
        star = "*" if ratio is not None and ratio.fastest_peer else ""
        compared = (
            [f"{ratio.ratio:.2f}{star}", _interval_of(ratio)]
            if ratio
            else ["1" if row.competitor == reference else "", ""]
        )
        rows.append(
            [
                *(row.operation, row.competitor, precision_of(runners[row.competitor], row.operation, point.point)),
                *(format_ms(row.p50_ms), _spread(row), str(len(row.round_p50_ms)), str(row.calls), *compared),
            ]
        )
    return rows


def _spread(row: Row) -> str:
    if row.low_ms is None or row.high_ms is None:
        return _DASH
    return f"{format_ms(row.low_ms)} to {format_ms(row.high_ms)}"


def _interval_of(ratio: Ratio) -> str:
    if ratio.low is None or ratio.high is None:
        return _DASH
    return f"{ratio.low:.2f}–{ratio.high:.2f}{' (t)' if ratio.interval_from == 't' else ''}"


def _verdicts(point: PointResult, group: str) -> list[str]:
    """Against whom, one sentence per operation on the fastest peer, on a GPU also on torch, and what ours chose."""
    lines, reference = _why_not_ours(point, group), _reference(point, group)
    runners = {runner.name: runner for runner in point.runners}
    for ratio, what in _compared(point, group):
        ours, peer = (
            precision_of(runners[name], ratio.operation, point.point) for name in (ratio.against, ratio.competitor)
        )
        lines.append(f"{ratio.operation}: {_sentence(ratio, ours, peer, what)}")
    for runner in point.runners:
        if runner.name == reference:
            lines.append(f"{runner.name} runs on: {format_plan(runner.plan)} (tuned: {point.tuned})")
        elif group and runner.group == group:
            lines.append(f"{runner.name} runs on: {runner.engine}, {runner.configuration}")
    return lines


def _compared(point: PointResult, group: str) -> Iterator[tuple[Ratio, str]]:
    """The ratios that get a sentence, and what the competitor is: on a GPU eager torch, the fastest torch and, where
    that is another, the fastest peer."""
    reference = _reference(point, group)
    for operation in dict.fromkeys(ratio.operation for ratio in point.ratios):
        ratios = [one for one in point.ratios if one.operation == operation and one.against == reference]
        fastest = [one for one in ratios if one.fastest_peer]
        if group:
            times = {row.competitor: row.p50_ms for row in point.rows if row.operation == operation}
            torch = [one for one in ratios if engine_of(one.competitor).startswith(TORCH)]
            best = min(torch, key=lambda one: times[one.competitor], default=None)
            eager = next((one for one in torch if engine_of(one.competitor) == TORCH), None)
            if eager is not None and eager is not best:
                yield eager, "eager torch"
            if best is not None:
                yield best, f"the fastest torch in {group}{' (eager)' if best is eager else ''}"
            fastest = [one for one in fastest if one is not best]
        yield from ((one, "the fastest peer") for one in fastest)


def _sentence(ratio: Ratio, ours: str, peer: str, what: str) -> str:
    """ours, peer: their precisions, named where they differ. what: the peer is, in words."""
    interval = f" ({_interval_of(ratio)})" if ratio.low is not None else ""
    us, them = ratio.against, ratio.competitor
    if ours != peer:
        us, them = f"{us} in {ours}", f"{them} in {peer}"
    ends = (ratio.ratio if end is None else end for end in (ratio.low, ratio.high))
    low, high = (float(f"{end:.2f}") for end in ends)  # as printed: 1.00 times as long is no difference
    if low <= 1 <= high:
        return f"no difference shown between {us} and {what}, {them}: {ratio.ratio:.2f}{interval}"
    how = "faster" if ratio.ratio > 1 else "slower"
    return f"{us} is {how} than {what}, {them}, which takes {ratio.ratio:.2f} times as long{interval}"


def precision_of(runner: Runner, operation: str, point: Point) -> str:
    """In which an operation ran: what the plan says for this batch size, or else all that the competitor has open."""
    precision = (_route(runner, operation, point) or {}).get("precision")
    return str(precision) if precision in runner.precisions else "/".join(runner.precisions)


def _route(runner: Runner, operation: str, point: Point) -> dict[str, Any] | None:
    """What the plan says of an operation at this batch size, less where it begins; None where it says nothing."""
    routes = runner.plan.get(half_of(operation)) if isinstance(runner.plan, dict) else None
    found = None
    for route in routes if isinstance(routes, (list, tuple)) else ():
        start = route.get("from_batch") if isinstance(route, dict) else None
        if isinstance(start, int) and start <= point.batch:
            found = {name: value for name, value in route.items() if name != "from_batch"}
    return found


def format_plan(plan: Any) -> str:
    """What `VAE.plan` says, whatever its form, in one line."""
    if isinstance(plan, dict):
        nested = any(isinstance(value, dict) or _has_parts(value) for value in plan.values())
        joint, between = ("; ", " ") if nested else (" ", "=")
        return joint.join(f"{name}{between}{format_plan(value)}" for name, value in plan.items())
    if _has_parts(plan):
        return ", ".join(f"[{format_plan(value)}]" for value in plan)
    return plan if isinstance(plan, str) else json.dumps(plan)


def _has_parts(plan: Any) -> bool:
    return isinstance(plan, (list, tuple)) and any(isinstance(value, (dict, list, tuple)) for value in plan)


def absent_lines(point: PointResult) -> list[str]:
    """Who was not timed and why; then who was not idle while the others ran: where every turn has a fresh process,
    nobody's is there meanwhile."""
    kinds = {"skipped": point.skipped, "disqualified": point.disqualified, "failed": point.failed}
    lines = [f"{name} {kind}: {reason}" for kind, out in kinds.items() for name, reason in out.items()]
    restless = [] if point.fresh else [runner for runner in point.runners if runner.idle_cpu_share > 0.02]
    lines += [f"{one.name} used {one.idle_cpu_share:.0%} of a core while the others ran" for one in restless]
    return lines


def _busy_lines(report: RaceReport, point: PointResult) -> list[str]:
    """The load average is no reason for one: the point before has raised it."""
    busy = None if point.other_cores_busy is None else report.machine.busy_with(point.other_cores_busy)
    return [] if busy is None else [warn_of(busy)]


def _method(report: RaceReport) -> list[str]:
    star = "× ours: how many times longer than ours; *: the fastest peer; (t): fewer than 6 rounds"
    return [star, *(f"{name}: {text}" for name, text in report.method.items()), _between_alike(report)]


def _between_alike(report: RaceReport) -> str:
    """How far the intervals are to be believed: how many of those between two of vae-edge's own that ran the same way
    leave 1 out, in this report, or where it has none, in others."""
    intervals = [
        (ratio.low, ratio.high)
        for case in report.cases
        for point in case.points
        for ratio in point.ratios
        if ratio.low is not None and ratio.high is not None and _are_alike(point, ratio)
    ]
    if not intervals:
        return f"identical plans: none here were compared; {_ALIKE_ELSEWHERE}"
    outside = sum(not low <= 1 <= high for low, high in intervals)
    count = len(intervals)
    return f"identical plans: of {count} ratio{'s'[: count - 1]} between them here, {outside} excluded 1"


def _are_alike(point: PointResult, ratio: Ratio) -> bool:
    pair = [one for one in point.runners if one.name in (ratio.against, ratio.competitor) and not one.is_peer]
    routes = [_route(runner, ratio.operation, point.point) for runner in pair]
    return len(routes) == 2 and routes[0] is not None and routes[0] == routes[1]


def _markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]


def format_ms(milliseconds: float) -> str:
    """Three significant digits, in the unit that suits what is left of it."""
    rounded = float(f"{milliseconds:.3g}")
    if rounded >= 1000:
        return f"{milliseconds / 1000:.3g} s"
    return f"{milliseconds:.3g} ms" if rounded >= 1 else f"{milliseconds * 1000:.3g} µs"
