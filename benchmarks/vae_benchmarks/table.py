"""Reports and comparisons as plain aligned text for a terminal."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

from .compare import NO_VERDICT, SAME, Comparison, ComparisonRow
from .gpu import GpuFacts
from .machine import MachineFacts
from .pairing import Difference, describe_row
from .report import LatencyReport, PlannedRoute, Report, SplitReport, StartupReport

_DASH = "–"
_WIDTH = 112
_METHOD = {"Calls": "calls", "Parts": "split", "Warm-up": "warmup", "Intervals": "interval", "Start-up": "startup"}
_FIGURES = {
    "import_ms": "import vae_runtime and onnxruntime",
    "load_ms": "load and verify the bundle",
    "first_call_ms": "first reconstruct, batch 1",
    "to_first_result_ms": "import to first result",
    "rss_after_import_bytes": "memory after import",
    "rss_after_load_bytes": "memory after load",
    "peak_rss_bytes": "peak memory",
}


def format_report(report: Report) -> str:
    """The facts, the start-up, the latencies, and footnotes on what they do not hold."""
    parts = [_facts(report), _startup(report.startup), _latency(report), _split(report), _footnotes(report)]
    return "\n\n".join(part for part in parts if part)


def format_comparison(comparison: Comparison, name_a: str, name_b: str) -> str:
    """Warnings, one line per row, rows of one report only, and the verdict."""
    head = ["figure", "A", "B", "B/A", f"{comparison.confidence:.0%} interval", "verdict"]
    rows = [[*_compared(row, comparison.differs), row.verdict] for row in comparison.rows]
    lines = [f"A  {name_a}", f"B  {name_b}", *map(str, comparison.differs)]
    lines += [f"warning: {warning}" for warning in comparison.warnings]
    lines += ["", *align([head, *rows], left=(0, 5)), ""]
    for name, only in (("A", comparison.only_in_a), ("B", comparison.only_in_b)):
        lines += [f"only in {name}: {row}" for row in only]
    return "\n".join([*lines, *_hidden(comparison), _summary(comparison)])


def _facts(report: Report) -> str:
    machine, versions, bundle = report.machine, report.versions, report.bundle
    facts = {
        "bundle": f"{bundle.folder} ({bundle.name}, {bundle.kind}), manifest {bundle.manifest_file_sha256[:12]}",
        "runs on": _plan(report.plan),
        "machine": describe_machine(machine),
        **({"GPU": describe_gpus(report.gpus)} if report.gpus else {}),
        "system": f"{machine.system}, load average {_or_dash(machine.load_average_1min, '{:.2f}')} at the start"
        + ("" if report.other_cores_busy is None else f", {report.other_cores_busy:.2f} cores busy with other work"),
        "versions": f"vae-edge {versions.vae_edge}, onnxruntime {versions.onnxruntime}, numpy {versions.numpy}, "
        f"Python {versions.python}",
        "inputs": report.method["inputs"],
        "measured": f"{report.created}, {report.settings.rounds} rounds, each in fresh processes",
    }
    return "\n".join(f"{name:9} {text}" for name, text in facts.items())


def _plan(plan: dict[str, tuple[PlannedRoute, ...]]) -> str:
    """Once where both halves run alike, else each by name; a half that changes with the batch, all it changes to."""
    halves = {
        name: " / ".join(dict.fromkeys(f"{route.device}, {route.provider}, {route.precision}" for route in routes))
        for name, routes in plan.items()
    }
    if len(set(halves.values())) == 1:
        return next(iter(halves.values()))
    return "; ".join(f"{name}: {text}" for name, text in halves.items())


def describe_machine(machine: MachineFacts) -> str:
    cores = f"{_or_dash(machine.cores_usable, '{}')} of {_or_dash(machine.cores_logical, '{}')} logical cores"
    physical = f" ({machine.cores_physical} physical)" if machine.cores_physical else ""
    quota = f", limited to {machine.cpu_quota:g} by quota" if machine.cpu_quota else ""
    memory = f"{_gib(machine.memory_limit_bytes or machine.memory_bytes)} memory"
    governor = f", governor {'/'.join(machine.governors)}" if machine.governors else ""
    return f"{machine.cpu}, {machine.architecture}, {cores}{physical}{quota}, {memory}{governor}"


def describe_gpus(gpus: Sequence[GpuFacts]) -> str:
    """One GPU, looked at several times: clocks from the lowest to the highest, the memory in use at the last."""
    last = gpus[-1]
    used = "" if last.memory_used_bytes is None else f" ({_gib(last.memory_used_bytes)} used)"
    driver = f"driver {last.driver or _DASH} for CUDA {last.cuda or _DASH}"
    text = f"{last.name}, {_gib(last.memory_bytes)} memory{used}, {driver}"
    for name, found in (("SM", [gpu.sm_clock_mhz for gpu in gpus]), ("memory", [gpu.memory_clock_mhz for gpu in gpus])):
        clocks = [clock for clock in found if clock is not None]
        if clocks:
            text += f", {name} clock {'–'.join(f'{clock:.0f}' for clock in sorted({min(clocks), max(clocks)}))} MHz"
    return text


def describe_gpu(gpu: GpuFacts) -> str:
    maximum = f" of at most {gpu.sm_clock_max_mhz:.0f}" if gpu.sm_clock_max_mhz is not None else ""
    return (
        f"{gpu.name}, {_gib(gpu.memory_bytes)} memory, compute capability {gpu.compute_capability},"
        f" driver {gpu.driver or _DASH} for CUDA up to {gpu.cuda or _DASH}; before the race:"
        f" SM clock {_or_dash(gpu.sm_clock_mhz, '{:.0f}')}{maximum} MHz,"
        f" memory clock {_or_dash(gpu.memory_clock_mhz, '{:.0f}')} MHz,"
        f" power limit {_or_dash(gpu.power_limit_watts, '{:.0f}')} W,"
        f" busy {_or_dash(gpu.utilization_percent, '{:.0f}')}% of the time"
    )


def _startup(startup: StartupReport) -> str:
    lines = [["start-up", "median", "min", "max", "unit"]]
    for figure, label in _FIGURES.items():
        scale, unit = (1.0, "ms") if figure.endswith("_ms") else (2.0**20, "MiB")
        repeated = getattr(startup, figure)
        conditions = {"first_call_ms": f", {startup.input}", "peak_rss_bytes": f", batch {startup.peak_batch}"}
        values = [f"{value / scale:.1f}" for value in (repeated.median, repeated.min, repeated.max)]
        lines.append([label + conditions.get(figure, ""), *values, unit])
    return "\n".join(align(lines, left=(0, 4)))


class _Times:
    """Times in one unit for a table, with the digits that each of its rows needs: three significant ones of its
    shortest time. What a row has fewer than others is filled with spaces, so that the points stay below each other."""

    def __init__(self, rows: Sequence[Sequence[float]]) -> None:
        """rows: the times in milliseconds that decide, the first of which is that of the whole call."""
        self._scale, self.unit, least = (1000.0, "µs", 1) if max(row[0] for row in rows) < 10 else (1.0, "ms", 3)
        shortest = (min(row) * self._scale for row in rows)
        self._digits = [least if time <= 0 else max(least, 2 - math.floor(math.log10(time))) for time in shortest]

    def one(self, row: int, time: float | None) -> str:
        return self._pad(row, _DASH if time is None else self._show(row, time))

    def interval(self, row: int, low: float | None, high: float | None, mark: str = "") -> str:
        ends = _DASH if low is None or high is None else f"{self._show(row, low)}–{self._show(row, high)}"
        return self._pad(row, ends + mark)

    def _show(self, row: int, time: float) -> str:
        return f"{time * self._scale:.{self._digits[row]}f}"

    def _pad(self, row: int, cell: str) -> str:
        return cell + " " * (max(self._digits) - self._digits[row])


def _latency(report: Report) -> str:
    shown = _Times([[row.p50_ms, row.min_ms] for row in report.latency])
    interval = f"{report.settings.confidence:.0%} interval"
    head = ["operation", "input", "batch", "threads", f"p50 {shown.unit}", interval]
    lines = [[*head, "p90", "p99", "mean", "min", "examples/s", "samples"]]
    for index, row in enumerate(report.latency):
        star = "" if row.width_reached else "*"
        ends = shown.interval(index, row.p50_low_ms, row.p50_high_ms, star)
        p50, *others = (
            shown.one(index, time) for time in (row.p50_ms, row.p90_ms, row.p99_ms, row.mean_ms, row.min_ms)
        )
        lines.append(
            [
                *_named(row),
                *(p50, ends, *others),
                *(f"{row.throughput_per_second:,.0f}", str(row.count)),
            ]
        )
    return "\n".join(align(lines, left=(0, 1)))


def _split(report: Report) -> str:
    """The parts of the calls beside the whole ones; nothing where they were not measured."""
    rows = [(row, row.split) for row in report.latency if row.split is not None]
    if not rows:
        return ""
    parts = [[getattr(split, part) for part in SplitReport.PARTS] for _, split in rows]
    shown = _Times(
        [[row.p50_ms, *(part.p50_ms for part in every)] for (row, _), every in zip(rows, parts, strict=True)]
    )
    interval = f"{report.settings.confidence:.0%} interval"
    head = ["p50 of parts", "input", "batch", "threads", f"call {shown.unit}"]
    lines = [[*head, *(cell for part in SplitReport.PARTS for cell in (part.replace("_", " "), interval))]]
    for index, (row, _) in enumerate(rows):
        cells = [
            cell for part in parts[index]
            for cell in (shown.one(index, part.p50_ms), shown.interval(index, part.p50_low_ms, part.p50_high_ms))
        ]  # fmt: skip
        lines.append([*_named(row), shown.one(index, row.p50_ms), *cells])
    return "\n".join(align(lines, left=(0, 1)))


def _named(row: LatencyReport) -> list[str]:
    threads = "auto" if row.threads is None else str(row.threads)
    return [row.operation, row.input or _DASH, str(row.batch), threads]


def _footnotes(report: Report) -> str:
    rows, lines = report.latency, []
    if not all(row.width_reached for row in rows):
        lines.append(
            f"*  wider than the {report.settings.width:.0%} of the median that was asked for, or of too few samples to "
            "be told; more --seconds, more --rounds or a quieter machine narrow it."
        )
    if any(row.interval_from == "samples" and row.p50_low_ms is not None for row in rows):
        lines.append("With so few rounds the intervals take calls in one process for independent: they are too narrow.")
    if any(row.p99_ms is None for row in rows):
        lines.append(f"{_DASH}  too few samples for this figure, or calls too short to be timed one by one.")
    if not all(row.warmup_stable for row in rows):
        lines.append("Some rows were still changing when the time for their warm-up was over.")
    if any(row.threads is None for row in rows):
        lines.append("threads auto: onnxruntime's own choice, one for each physical core.")
    lines += [f"{operation} was skipped: {reason}." for operation, reason in report.skipped.items()]
    if report.busy_with is not None:
        lines.append(warn_of(report.busy_with))
    shown = {title: name for title, name in _METHOD.items() if title != "Parts" or any(row.split for row in rows)}
    lines += [f"{title}: {report.method[name]}." for title, name in shown.items()]
    return "\n".join(textwrap.fill(line, _WIDTH, subsequent_indent="   ") for line in lines)


def warn_of(busy: str) -> str:
    """busy: with what the machine was, in words."""
    return f"The machine was busy, {busy}: expect slower and less stable figures."


def _compared(row: ComparisonRow, differs: Sequence[Difference]) -> list[str]:
    label = _FIGURES.get(row.figure, row.figure) if row.key is None else describe_row(row.key, differs)
    scale, unit = (1.0, "ms") if row.unit == "ms" else (2.0**20, "MiB")
    interval = _DASH if row.low is None or row.high is None else f"{row.low:.3f}–{row.high:.3f}"
    return [label, *(f"{_digits(value / scale)} {unit}" for value in (row.a, row.b)), f"{row.ratio:.3f}", interval]


def _hidden(comparison: Comparison) -> list[str]:
    """What a verdict of "no difference" leaves open where the noise is large."""
    same = [row for row in comparison.rows if row.verdict == SAME and row.high is not None]
    wide = [row.high for row in same if row.high is not None and row.high > 1 + comparison.threshold]
    if not wide:
        return []
    return [
        f"in {len(wide)} of {len(same)} rows without a difference the noise could hide one, up to {max(wide):.2f} times"
    ]


def _summary(comparison: Comparison) -> str:
    def show(counts: dict[str, int]) -> str:
        return ", ".join(f"{what}: {count}" for what, count in counts.items())

    judged, left = comparison.judged, comparison.not_judged
    if comparison.verdict == NO_VERDICT:
        return f"NO VERDICT: {comparison.reason} ({show({**judged, **left})})"
    verdict = "WORSE" if comparison.is_worse else "not worse"
    summary = f"{verdict} beyond noise and {comparison.threshold:.0%} ({show(judged)})"
    if left:
        summary += f"; not judged: {sum(left.values())} ({show(left)})"
    if busy := comparison.busy:
        when = f"{' and '.join(busy)} {'were' if len(busy) > 1 else 'was'} measured"
        summary += f"; the machine was busy when {when}: other work may have made this verdict, measure on a quiet one"
    return summary


def align(rows: Sequence[Sequence[str]], left: tuple[int, ...]) -> list[str]:
    """Columns as wide as their widest cell; those in `left` flush left, the others, numbers, flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if index in left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _digits(value: float) -> str:
    return f"{value:.4f}" if value < 1 else f"{value:.3f}" if value < 100 else f"{value:.1f}"


def _gib(count: int | None) -> str:
    return _DASH if count is None else f"{count / 2**30:.1f} GiB"


def _or_dash(value: float | None, form: str) -> str:
    return _DASH if value is None else form.format(value)
