"""What became faster or slower between two reports, beyond noise."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vae_runtime.errors import InputError

from .document import LEAST
from .intervals import rounds_for_shift, shift_interval
from .pairing import Difference, Pairing, describe_row, pair_rows, why_no_pair
from .report import Report, RowKey, StartupReport
from .settings import MOST_ROUNDS, check_between

FORMAT, FORMAT_VERSION = "vae-bench-comparison", 1
LATENCY, NO_VERDICT = "latency", "no verdict"

_MORE, _LESS = {"ms": "slower", "bytes": "more memory"}, {"ms": "faster", "bytes": "less memory"}
SAME, UNDECIDED, INCOMPARABLE = "no difference", "too few rounds", "other conditions"
# What each condition of a start-up changes, the figures of the first call and all after it.
_CHANGED_BY = {
    "peak_batch": ("peak_rss_bytes",),
    "threads": ("first_call_ms", "to_first_result_ms", "rss_after_load_bytes", "peak_rss_bytes"),
    "input": ("first_call_ms", "to_first_result_ms", "peak_rss_bytes"),
    "size": ("first_call_ms", "to_first_result_ms", "peak_rss_bytes"),
}
_CONDITIONS = ("peak_batch", "threads", "input")  # that a start-up tells itself
VERDICTS = (*_MORE.values(), *_LESS.values(), SAME)


@dataclass(frozen=True)
class ComparisonRow:
    """One figure of both reports.

    figure: "latency", or a figure of the start-up such as "load_ms". operation ... input: of A, see
        `Comparison.differs`; None for the start-up.
    unit: "ms" or "bytes". a, b: the medians of the rounds' medians.
    ratio: how many times larger a round of B is than one of A (Hodges-Lehmann: the median over all pairs of rounds).
    low, high: its interval; None where the rounds are too few.
    verdict: "slower", "faster", "more memory", "less memory", "no difference", "too few rounds" or, of figures of the
        start-up, "other conditions": they were measured under others in B than in A.
    """

    figure: str
    operation: str | None
    batch: int | None
    threads: int | None
    device: str | None
    precision: str | None
    input: str | None
    unit: str
    a: float
    b: float
    ratio: float
    low: float | None
    high: float | None
    verdict: str

    @property
    def key(self) -> RowKey | None:
        """None for the start-up."""
        if self.operation is None:
            return None
        return RowKey(**{name: getattr(self, name) for name in RowKey._fields})

    @property
    def is_worse(self) -> bool:
        return self.verdict in _MORE.values()


@dataclass(frozen=True)
class Comparison:
    """Two reports side by side.

    confidence: that all intervals hold together (Bonferroni). threshold: the least effect that counts, 0.05 for 5%.
    warnings: what differs between the machines, versions, bundles and settings. only_in_a, only_in_b: rows, in words,
    that the other report does not have. reason: why no latency could be judged; None where at least one was.
    differs: in what all rows of B differ from all of A; rows are matched across it if it is one thing alone.
    busy: "A", "B" or both: whose machine was busy with other work, which no interval knows of.
    """

    confidence: float
    threshold: float
    warnings: tuple[str, ...]
    rows: tuple[ComparisonRow, ...]
    only_in_a: tuple[str, ...]
    only_in_b: tuple[str, ...]
    reason: str | None
    differs: tuple[Difference, ...]
    busy: tuple[str, ...]

    @property
    def is_worse(self) -> bool:
        """Whether anything became slower, or takes more memory, beyond noise."""
        return any(row.is_worse for row in self.rows)

    @property
    def verdict(self) -> str:
        """ "worse", "not worse", or "no verdict": a start-up that did not change says nothing about calls."""
        if self.is_worse:
            return "worse"
        return "not worse" if self.reason is None else NO_VERDICT

    @property
    def judged(self) -> dict[str, int]:
        """How many rows have which verdict, without those that have none."""
        return self._count(VERDICTS)

    @property
    def not_judged(self) -> dict[str, int]:
        """How many rows have no verdict, and why."""
        only = {"only in A": len(self.only_in_a), "only in B": len(self.only_in_b)}
        return {**self._count((UNDECIDED, INCOMPARABLE)), **{why: count for why, count in only.items() if count}}

    def _count(self, verdicts: Sequence[str]) -> dict[str, int]:
        found = Counter(row.verdict for row in self.rows)
        return {verdict: found[verdict] for verdict in verdicts if found[verdict]}

    def to_dict(self) -> dict[str, Any]:
        """The JSON document, as plain values."""
        document = {"format": FORMAT, "format_version": FORMAT_VERSION, **dataclasses.asdict(self)}
        return {**document, "verdict": self.verdict, "worse": self.is_worse, "not_judged": self.not_judged}


def compare(a: Report, b: Report, threshold: float = 0.05, confidence: float = 0.95) -> Comparison:
    """Judge B against A, row by row, from the medians of their rounds.

    Rows are the same in both reports, or differ in one of threads, device, precision and input of which each report has
    a single value: one report of fp32 and one of int8, say.

    A row is slower where the whole interval of the ratio B/A lies above 1 and the ratio is above 1 + threshold; faster
    likewise, with the reports exchanged. The intervals come from ranks alone (see `intervals.shift_interval`) and are
    widened so that all of them hold together (Bonferroni): `confidence` is the chance that of two measurements of the
    same thing not one row is called different. They know only the noise within each report. What differs between the
    two runs as a whole, such as other work on the machine, they cannot know: measure both on a quiet machine.

    Raises:
        InputError: threshold or confidence out of range.
    """
    if not 0 <= threshold < math.inf:
        raise InputError(f"threshold is {threshold!r}; expected a number from 0, such as 0.05 for 5%")
    check_between(confidence, "confidence", 0.5, 1)
    rounds_a, rounds_b = ({row.key: row.round_p50_ms for row in report.latency} for report in (a, b))
    paired = pair_rows(a, b)
    each = 1 - (1 - confidence) / (len(paired.pairs) + len(StartupReport.FIGURES))
    rows = [
        _judge(LATENCY, key_a, "ms", rounds_a[key_a], rounds_b[key_b], each, threshold) for key_a, key_b in paired.pairs
    ]
    unlike = _incomparable(a, b, paired)
    for figure in StartupReport.FIGURES:
        unit = figure.rpartition("_")[2]
        values_a, values_b = (getattr(report.startup, figure).values for report in (a, b))
        row = _judge(figure, None, unit, values_a, values_b, each, threshold)
        rows.append(dataclasses.replace(row, low=None, high=None, verdict=INCOMPARABLE) if figure in unlike else row)
    busy = {name: report.busy_with for name, report in (("A", a), ("B", b)) if report.busy_with is not None}
    warnings = [f"the machine was busy when {name} was measured: {what}" for name, what in busy.items()]
    return Comparison(
        confidence=confidence,
        threshold=threshold,
        warnings=(*_differences(a, b, paired.differs), *warnings),
        rows=tuple(rows),
        only_in_a=tuple(map(describe_row, paired.only_in_a)),
        only_in_b=tuple(map(describe_row, paired.only_in_b)),
        reason=_why_not_judged(rows, paired, each),
        differs=paired.differs,
        busy=tuple(busy),
    )


def _incomparable(a: Report, b: Report, paired: Pairing) -> set[str]:
    """The figures of the start-up that are of something else in B than in A, and not of what is compared."""
    changed = {name for name in _CONDITIONS if getattr(a.startup, name) != getattr(b.startup, name)}
    changed -= {found.axis for found in paired.differs}
    if paired.sizes is not None:
        changed.add("size")
    return {figure for name in changed for figure in _CHANGED_BY[name]}


def _why_not_judged(rows: Sequence[ComparisonRow], paired: Pairing, confidence: float) -> str | None:
    latency = [row for row in rows if row.figure == LATENCY]
    if any(row.verdict != UNDECIDED for row in latency):
        return None
    if not latency:
        return why_no_pair(paired)
    if (needed := rounds_for_shift(confidence, MOST_ROUNDS)) is None:
        return f"the confidence is too high: for {len(rows)} rows not even {MOST_ROUNDS} rounds are enough"
    return f"the rounds are too few: {len(rows)} rows need {needed} in each report (--rounds)"


def _judge(
    figure: str,
    key: RowKey | None,
    unit: str,
    a: Sequence[float],
    b: Sequence[float],
    confidence: float,
    threshold: float,
) -> ComparisonRow:
    log_a, log_b = (np.log(np.maximum(values, LEAST)).tolist() for values in (a, b))
    shift = shift_interval(log_a, log_b, confidence)
    median_a, median_b = float(np.median(a)), float(np.median(b))
    ratio, low, high = (math.exp(part) for part in shift) if shift else (median_b / max(median_a, LEAST), None, None)
    verdict = UNDECIDED if low is None or high is None else SAME
    if low is not None and low > 1 and ratio > 1 + threshold:
        verdict = _MORE[unit]
    elif high is not None and high < 1 and 1 / ratio > 1 + threshold:
        verdict = _LESS[unit]
    named = {name: getattr(key, name, None) for name in RowKey._fields}
    return ComparisonRow(
        figure, **named, unit=unit, a=median_a, b=median_b, ratio=ratio, low=low, high=high, verdict=verdict
    )


def _differences(a: Report, b: Report, differs: Sequence[Difference]) -> Iterator[str]:
    """What makes the comparison one of more than the software under test, and of what `differs` says."""
    compared = {
        "the machines differ": ("machine", ("load_average_1min",)),
        "the GPUs differ": ("gpus", ("sm_clock_mhz", "memory_clock_mhz", "utilization_percent", "memory_used_bytes")),
        "the versions differ": ("versions", ()),
        "the bundles differ": ("bundle", ("folder", "size")),
        # Which rows there are shows in the rows themselves.
        "the settings differ": ("settings", ("operations", "batches", "threads", "inputs", "device", "precision")),
        "the conditions of the start-up differ": (
            "startup",
            (*StartupReport.FIGURES, *(found.axis for found in differs)),
        ),
    }
    for what, (part, ignored) in compared.items():
        one, other = (_plain(getattr(report, part)) for report in (a, b))
        changed = [
            f"{name} {_show(one.get(name))} -> {_show(other.get(name))}"
            for name in {**one, **other}
            if name not in ignored and one.get(name) != other.get(name)
        ]
        if changed:
            yield f"{what}: {'; '.join(changed)}"


def _plain(part: Any) -> dict[str, Any]:
    """Of a GPU that was looked at several times, the first look; nothing where there is none."""
    if isinstance(part, tuple):
        return dataclasses.asdict(part[0]) if part else {}
    return dataclasses.asdict(part)


def _show(value: Any) -> str:
    text = str(value)
    return text[:12] + "…" if len(text) == 64 else text  # a SHA-256
