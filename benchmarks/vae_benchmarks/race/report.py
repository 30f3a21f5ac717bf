"""What a race found out: the dataclasses, the JSON document that they become, and how several become one."""

from __future__ import annotations

import dataclasses
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vae_runtime.arguments import check_choice, check_count
from vae_runtime.atomic import write_json
from vae_runtime.errors import InputError

from ..document import from_document, load_document, require_measured
from ..errors import ReportError
from ..gpu import GpuFacts
from ..intervals import median_interval, paired_ratio
from ..machine import MachineFacts
from ..settings import LARGEST_BATCH, MOST_ROUNDS, check_between
from .case import CaseFacts, check_macs
from .competitors import COMPETITORS, CUDA_COMPETITORS, OURS, choose_reference
from .entrant import DEVICE_OPERATIONS, HOST_OPERATIONS
from .schedule import FEWEST_ROUNDS

FORMAT, FORMAT_VERSION = "vae-bench-race", 1
_WHAT = "a report of vae-bench race"
DEVICES = ("cpu", "cuda")
OPERATIONS = (*HOST_OPERATIONS, *DEVICE_OPERATIONS)  # the latter on a GPU only


@dataclass(frozen=True)
class Point:
    """One load: `batch` examples per call on `threads` threads of the host. device: "cpu" or "cuda"."""

    batch: int
    threads: int
    device: str = "cpu"

    @classmethod
    def parse(cls, text: str) -> Point:
        """ "32x2" -> batch 32 on 2 threads.

        Raises:
            InputError: it has another form.
        """
        match = re.fullmatch(r"(\d{1,6})x(\d{1,4})", text)
        if match is None:
            raise InputError(f"point is {text!r}; expected BATCHxTHREADS, such as 32x2")
        check_count(int(match[1]), "batch", most=LARGEST_BATCH)
        check_count(int(match[2]), "threads")  # more than there are here is skipped in words
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.batch}x{self.threads}" + ("" if self.device == "cpu" else f" on {self.device}")


CUDA_POINTS = (Point(1, 1, "cuda"), Point(32, 1, "cuda"))


@dataclass(frozen=True)
class RaceSettings:
    """points: loads to race at, on `device`. operations: of OPERATIONS. competitors: names, see `COMPETITORS` and
    `CUDA_COMPETITORS`.
    budget: seconds that one case is timed for, all its points and competitors together; opening, checking and warming
    up come on top. rounds: at most; slow competitors get fewer, but at least FEWEST_ROUNDS. tune: run `vae-run tune`
    for tune_seconds at each point first, on the same cores, for "auto" to use in this race alone; else "auto" uses what
    the user's own cache folder has. device: "cpu" or "cuda"; the defaults here are the CPU's, `on` has the others.
    fresh: every turn has a process of its own, whose opening and warming up are on top of the budget too, so that the
    intervals hold what differs from process to process.
    """

    points: tuple[Point, ...] = (Point(1, 1), Point(32, 2))
    operations: tuple[str, ...] = HOST_OPERATIONS
    competitors: tuple[str, ...] = tuple(COMPETITORS)
    budget: float = 120.0
    rounds: int = 15
    tune: bool = True
    tune_seconds: float = 60.0
    device: str = "cpu"
    fresh: bool = False

    @classmethod
    def on(cls, device: str, **given: Any) -> RaceSettings:
        """What is given, and for the rest the defaults of a race on this device."""
        cuda = {"points": CUDA_POINTS, "operations": OPERATIONS, "competitors": tuple(CUDA_COMPETITORS)}
        return cls(**{**(cuda if device == "cuda" else {}), **given, "device": device})

    def __post_init__(self) -> None:
        check_choice(self.device, "device", DEVICES)
        for name in ("points", "operations", "competitors"):
            given = tuple(dict.fromkeys(getattr(self, name)))
            if not given:
                raise InputError(f"{name} is empty; expected at least one")
            object.__setattr__(self, name, given)
        points = tuple(dataclasses.replace(point, device=self.device) for point in self.points)
        object.__setattr__(self, "points", points)
        able = HOST_OPERATIONS if self.device == "cpu" else OPERATIONS
        for operation in self.operations:
            if operation not in able:
                raise InputError(f"operation is {operation!r}; expected one of {', '.join(able)} on {self.device}")
        check_between(self.budget, "budget", 0, 1e6)
        check_between(self.tune_seconds, "tune_seconds", 0, 3600)
        object.__setattr__(self, "rounds", check_count(self.rounds, "rounds", FEWEST_ROUNDS, MOST_ROUNDS))


@dataclass(frozen=True)
class Runner:
    """A competitor that took part.

    precisions: in which it computed. plan: what an engine that chooses says about its choice. errors: of its outputs
    against PyTorch's in fp32, by output, as `error_measure` ("max" or "rms") says. open_seconds: to open and check.
    idle_cpu_share: of one core that its process used while the others ran. peak_rss_bytes: of its whole process.
    group: whom it is compared with, see `Competitor`.
    """

    name: str
    is_peer: bool
    precisions: tuple[str, ...]
    engine: str
    configuration: str
    plan: Any
    error_measure: str
    errors: dict[str, float]
    open_seconds: float
    idle_cpu_share: float
    peak_rss_bytes: int
    group: str = ""


@dataclass(frozen=True)
class Row:
    """One operation of one competitor, in milliseconds per call.

    p50_ms: the median of the rounds' medians; low_ms, high_ms: its 95% interval by order statistics, None below 6
    rounds. calls: timed in all rounds. round_p50_ms: the median of each round, in the order of time.
    """

    operation: str
    competitor: str
    p50_ms: float
    low_ms: float | None
    high_ms: float | None
    calls: int
    round_p50_ms: tuple[float, ...]

    @classmethod
    def of(cls, operation: str, competitor: str, rounds: Sequence[float], calls: int) -> Row:
        """rounds: medians in milliseconds."""
        low, high = median_interval(rounds, 0.95) or (None, None)
        return cls(operation, competitor, float(np.median(rounds)), low, high, calls, tuple(rounds))


@dataclass(frozen=True)
class Ratio:
    """How many times longer `competitor` takes than `against`, which is ours of its group, or where that was not timed
    another one of vae-edge's own: above 1, that is faster.

    low, high: 95% interval over the rounds, whose runs were close in time; interval_from: "rounds", "t" or "none", see
    `intervals.paired_ratio`. fastest_peer: whether it is the fastest of its group's peers in this operation.
    """

    operation: str
    competitor: str
    ratio: float
    low: float | None
    high: float | None
    interval_from: str
    fastest_peer: bool
    against: str = OURS


@dataclass(frozen=True)
class PointResult:
    """One case at one point.

    tuned: what became of `vae-run tune`.
    fresh: every turn had a process of its own, as the settings say, or as all competitors together did not fit into
    memory.
    cores: to which every process was bound; None where the system cannot. skipped: competitor -> why it is not to be
    had here. disqualified: competitor -> what is wrong with its outputs. failed: competitor -> how it failed or died.
    other_cores_busy: how many cores other processes than the competitors' kept busy during the rounds, on average; None
    where the system does not tell.
    created, settings: of the race that it is from, with all who were to race and all operations; the settings are None
    where they are not known.
    """

    point: Point
    rounds: int
    fresh: bool
    cores: tuple[int, ...] | None
    tuned: str
    load_average_1min: float | None
    runners: tuple[Runner, ...]
    skipped: dict[str, str]
    disqualified: dict[str, str]
    failed: dict[str, str]
    rows: tuple[Row, ...]
    ratios: tuple[Ratio, ...]
    created: str
    settings: RaceSettings | None
    other_cores_busy: float | None = None

    @property
    def entered(self) -> tuple[str, ...]:
        """All who were to race here: timed, or out for a reason that is told."""
        timed = (row.competitor for row in self.rows)
        return tuple(dict.fromkeys((*timed, *self.skipped, *self.disqualified, *self.failed)))

    def has(self, competitors: Sequence[str], operations: Sequence[str]) -> bool:
        """Whether nothing is left to race here: somebody was timed, and all of these were to be, in all of these."""
        timed = {row.operation for row in self.rows}
        return bool(self.rows) and set(self.entered) >= set(competitors) and timed >= set(operations)


@dataclass(frozen=True)
class CaseResult:
    """points: in the order of time; one that this machine has too few cores for is in `skipped_points`, with the
    reason."""

    case: CaseFacts
    points: tuple[PointResult, ...]
    skipped_points: dict[str, str]


@dataclass(frozen=True)
class RaceReport:
    """The result of `race`. method: how the figures came about, in words.

    created: UTC, ISO 8601. Both it and settings are those of the last of several races; each point has its own.
    """

    created: str
    machine: MachineFacts
    versions: dict[str, str]
    settings: RaceSettings
    method: dict[str, str]
    cases: tuple[CaseResult, ...]

    def to_dict(self) -> dict[str, Any]:
        """The JSON document, as plain values."""
        return {"format": FORMAT, "format_version": FORMAT_VERSION, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, document: Any, name: str = "the report") -> RaceReport:
        """The inverse of `to_dict`. name: what a message calls it. Medians, intervals and ratios are computed anew from
        the rounds, whatever the document says of them.

        Raises:
            ReportError: it is not a race's report, or of another version, or has what no race can give.
        """
        report = from_document(cls, document, name, FORMAT, FORMAT_VERSION, _WHAT)
        _refuse_twice((f"case {case.case.name}" for case in report.cases), name)
        for case in report.cases:
            check_macs(case.case, name)
            _refuse_twice((f"point {point.point} of {case.case.name}" for point in case.points), name)
            for point in case.points:
                _check_point(point, f"{name}, {case.case.name} {point.point},")
        cases = tuple(
            dataclasses.replace(case, points=tuple(_compute_anew(point) for point in case.points))
            for case in report.cases
        )
        return dataclasses.replace(report, cases=cases)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON document, whole or not at all; raises `OutputError`."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RaceReport:
        """Read what `save` or `vae-bench race --json` wrote; raises `ReportError`."""
        return cls.from_dict(load_document(path, _WHAT), str(path))


def _check_point(point: PointResult, where: str) -> None:
    """Raise `ReportError` where its figures cannot be computed from its rounds. where: what a message calls it."""
    runners = [runner.name for runner in point.runners]
    _refuse_twice((f"runner {runner}" for runner in runners), where)
    _refuse_twice((f"row of {row.operation} by {row.competitor}" for row in point.rows), where)
    for row in point.rows:
        if row.operation not in OPERATIONS:
            raise ReportError(f"{where} has a row of {row.operation}; expected one of {', '.join(OPERATIONS)}")
        if row.competitor not in runners:
            raise ReportError(f"{where} has a row of {row.competitor}, which is not among its runners")
        if len(row.round_p50_ms) != point.rounds or not point.rounds:
            count = len(row.round_p50_ms)
            raise ReportError(
                f"{where} has {count} rounds of {row.competitor}; expected {point.rounds or 'at least 1'}"
            )
        require_measured(row.round_p50_ms, f"{where} has a row of {row.competitor} whose time in ms")


def _refuse_twice(names: Iterable[str], where: str) -> None:
    for name, count in Counter(names).items():
        if count > 1:
            raise ReportError(f"{where} has {name} {count} times; expected it once")


def _compute_anew(point: PointResult) -> PointResult:
    rows = tuple(Row.of(row.operation, row.competitor, row.round_p50_ms, row.calls) for row in point.rows)
    peers = [runner.name for runner in point.runners if runner.is_peer]
    ratios = rank(rows, peers, {runner.name: runner.group for runner in point.runners})
    return dataclasses.replace(point, rows=rows, ratios=ratios)


def rank(rows: Sequence[Row], peers: Sequence[str], groups: Mapping[str, str] | None = None) -> tuple[Ratio, ...]:
    """Everyone against ours, or who stands for it, operation by operation, from paired rounds; none where only peers
    ran.

    groups: competitor -> its group, within which it is compared; None is one group for all.
    """
    groups = groups or {}
    own = dict.fromkeys(row.competitor for row in rows if row.competitor not in peers)
    ratios = []
    for ours in rows:
        name, group = ours.competitor, groups.get(ours.competitor, "")
        if name != choose_reference([one for one in own if groups.get(one, "") == group], group):
            continue
        others = [
            row for row in rows
            if row.operation == ours.operation and row.competitor != name and groups.get(row.competitor, "") == group
        ]  # fmt: skip
        fastest = min((row for row in others if row.competitor in peers), key=lambda row: row.p50_ms, default=None)
        for row in others:
            ratio, low, high, source = paired_ratio(ours.round_p50_ms, row.round_p50_ms)
            ratios.append(Ratio(ours.operation, row.competitor, ratio, low, high, source, row is fastest, name))
    return tuple(ratios)


def merge(reports: Sequence[RaceReport]) -> RaceReport:
    """One report with the cases and points of all; of a case's point that several have, the last one's where
    somebody was timed.

    Raises:
        ReportError: none were given, or they are from different machines, or of different weights of one case.
    """
    if not reports:
        raise ReportError("there is nothing to merge; expected at least one report of a race")
    first, last = reports[0], reports[-1]
    if any(_identity(report.machine) != _identity(first.machine) for report in reports):
        cpus = " and ".join(dict.fromkeys(f"{r.machine.cpu} with {r.machine.cores_usable} cores" for r in reports))
        raise ReportError(f"the reports are from different machines ({cpus}); only those of one machine can be merged")
    gpus = {_gpu_identity(gpu): gpu for report in reports if (gpu := report.machine.gpu) is not None}
    if len(gpus) > 1:
        names = " and ".join(f"{gpu.name} with driver {gpu.driver}" for gpu in gpus.values())
        raise ReportError(f"the reports are from different GPUs ({names}); only those of one can be merged")
    cases: dict[str, CaseResult] = {}
    for result in (case for report in reports for case in report.cases):
        before = cases.get(result.case.name)
        cases[result.case.name] = result if before is None else _merge_case(before, result)
    versions: dict[str, str] = {}
    for report in reports:
        for name, version in report.versions.items():
            known = versions.get(name, version)
            versions[name] = known if version in known.split(" and ") else f"{known} and {version}"
    return dataclasses.replace(
        last,
        machine=dataclasses.replace(last.machine, gpu=next(iter(gpus.values()), None)),
        versions=versions,
        method={name: text for report in reports for name, text in report.method.items()},
        cases=tuple(cases.values()),
    )


def _merge_case(before: CaseResult, after: CaseResult) -> CaseResult:
    name, weights = before.case.name, [one.case.manifest_file_sha256 for one in (before, after)]
    facts = [dataclasses.replace(one.case, quality=None, manifest_file_sha256=None) for one in (before, after)]
    if facts[0] != facts[1]:
        raise ReportError(f"the reports have two different cases named {name}")
    known = [digest[:12] for digest in dict.fromkeys(weights) if digest is not None]
    if len(known) > 1:
        raise ReportError(
            f"{name} has the manifests {' and '.join(known)}; only points of the same weights can be merged"
        )
    points = {one.point: one for one in before.points}
    points |= {
        one.point: one for one in after.points if one.rows or not (one.point in points and points[one.point].rows)
    }
    skipped = {
        name: reason for name, reason in {**before.skipped_points, **after.skipped_points}.items()
        if name not in map(str, points)
    }  # fmt: skip
    # Points of weights that nobody knows any more would pass for those of the others.
    case = dataclasses.replace(after.case, manifest_file_sha256=None if None in weights else weights[0])
    return CaseResult(case, tuple(points.values()), skipped)


def _identity(machine: MachineFacts) -> MachineFacts:
    return dataclasses.replace(machine, load_average_1min=None, governors=(), gpu=None)


def _gpu_identity(gpu: GpuFacts) -> tuple[Any, ...]:
    """Clocks and the like are as found, and change by themselves."""
    return gpu.name, gpu.memory_bytes, gpu.driver, gpu.cuda
