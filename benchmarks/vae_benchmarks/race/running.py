"""The race itself: everybody opened, checked and warmed up, then timed in turns, round after round."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import platform
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from vae_runtime import __version__
from vae_runtime.cuda import why_not_cuda
from vae_runtime.errors import DeviceError, InputError
from vae_runtime.interpreter import interpreter

from ..children import at_once, last_line
from ..machine import CpuTime, MachineFacts, available_bytes, choose_cores, others_between
from .ahead import LOADED_BYTES, MEMORY_RESERVE, OPEN_TIMEOUT, compile_ahead
from .case import Case
from .competitors import COMPETITORS, CUDA_COMPETITORS, Competitor, choose_competitors
from .process import CompetitorError, Process, run_group
from .report import OPERATIONS, CaseResult, Point, PointResult, RaceReport, RaceSettings, Row, Runner, merge, rank
from .schedule import order_of, plan_rounds
from .text import absent_lines

CALL_TIMEOUT = 600.0  # seconds
_PACKAGES = (
    *("numpy", "onnxruntime", "onnxruntime-gpu", "onnxruntime-ep-openvino", "openvino", "torch", "triton"),
    "nvidia-cudnn-cu13",
)

# A measurement holds for the cores that a process may use, so it has to run on those of the race.
_TUNE = """
import json, os, sys
from vae_runtime.cli import main
cores = json.loads(sys.argv[1])
if cores:
    os.sched_setaffinity(0, cores)
main(["tune", *sys.argv[2:]])
"""

# What the race's own tuning finds is for the race alone: the user may have tuned for longer, on the same cores.
_CACHE = "VAE_EDGE_CACHE"
# On the CPU everybody is to run there, also who would take a GPU by himself: vae-edge's "auto" does.
_NO_GPU = {"CUDA_VISIBLE_DEVICES": "-1"}

Progress = Callable[[str], None]


def race(
    cases: Sequence[str | os.PathLike[str]],
    settings: RaceSettings | None = None,
    progress: Progress | None = None,
    *,
    competitors: Sequence[Competitor] | None = None,
    before: RaceReport | None = None,
    after_point: Callable[[RaceReport], None] | None = None,
) -> RaceReport:
    """Race vae-edge against other engines on the same weights and inputs.

    Each competitor of a case and point has a process of its own, bound to the same cores with the same thread count,
    and is compared with PyTorch's outputs before it is timed. In every round each one has a turn for each operation.

    cases: case folders, or bundles. progress: called with a line of text now and then. competitors: None takes those of
    `settings` by name. before: a report whose points are kept and not raced again, save those where nobody was
    timed, or that lack a competitor or an operation: there all of both are raced, as only turns of one round can be
    compared. It is what is returned where nothing is left. after_point: called with all results so far whenever a case
    has finished a point.

    Raises:
        CaseError, BundleError: a folder is not what it should be. InputError: two cases have the same name, or a
            competitor is unknown. ReportError: `before` is of another machine, or has a case with other weights.
            DeviceError: a race on a GPU that vae-edge itself cannot use here.
    """
    settings = settings or RaceSettings()
    if competitors is None:
        competitors = choose_competitors(settings.competitors, settings.device)
    if settings.device == "cuda" and (reason := why_not_cuda()) is not None:
        raise DeviceError(f"device 'cuda' cannot be used: {reason}")
    opened = [Case.open(path) for path in cases]
    names = [case.name for case in opened]
    if not names or len(set(names)) < len(names):
        raise InputError(f"cases is {', '.join(names) or 'empty'}; expected at least one, each name once")
    for case in opened:
        case.reference()  # the workers read it; what is damaged is said before hours are spent
    blank = RaceReport(
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        machine=MachineFacts.read(gpu=settings.device == "cuda"),
        versions=dict(_versions()),
        settings=settings,
        method=METHOD if settings.device == "cpu" else CUDA_METHOD,
        cases=(),
    )
    report = blank if before is None else merge((before, blank))
    entered = dataclasses.replace(blank, cases=tuple(CaseResult(case.facts, (), {}) for case in opened))
    merge((report, entered))  # only to refuse, before hours are spent, a case that is another one there
    tell = progress or (lambda line: None)
    plans = [plan for case in opened for plan in _plan_points(case, report, settings, competitors, tell)]
    if before is not None and not plans:
        tell("nothing is left to race: every point is there, with all who were to race")
        return before
    with tempfile.TemporaryDirectory(prefix="vae-race-", ignore_cleanup_errors=True) as scratch:
        if settings.device == "cuda":
            compile_ahead([(plan.case, plan.point, one) for plan in plans for one in plan.competitors], scratch, tell)
        for case in opened:
            for result in _race_case(case, [plan for plan in plans if plan.case is case], blank.created, scratch, tell):
                report = merge((report, dataclasses.replace(blank, cases=(result,))))
                _tell_of_kept(report, result, tell)
                if after_point is not None:
                    after_point(report)
    return report


@dataclass(frozen=True)
class PointPlan:
    """What is to be raced at one point of a case, by whom and how."""

    case: Case
    point: Point
    settings: RaceSettings
    competitors: tuple[Competitor, ...]

    def joined(self, before: PointResult, tell: Progress) -> PointPlan:
        """With those who raced there before, and in their operations too, as it takes the place of that."""
        known = {one.name: one for one in self.competitors}
        table = COMPETITORS if self.point.device == "cpu" else CUDA_COMPETITORS
        for name in before.entered:
            if name not in known and name in table:
                known[name] = table[name]
            elif name not in known:
                tell(f"{self.case.name} {self.point}: {name} is left out, as this vae-edge does not know it")
        both = {*self.settings.operations, *(row.operation for row in before.rows)}
        operations = tuple(name for name in OPERATIONS if name in both)
        settings = dataclasses.replace(self.settings, competitors=tuple(known), operations=operations)
        return dataclasses.replace(self, settings=settings, competitors=tuple(known.values()))


def _plan_points(
    case: Case, report: RaceReport, settings: RaceSettings, competitors: Sequence[Competitor], tell: Progress
) -> Iterator[PointPlan]:
    """What is left to race of a case where the report has some of it."""
    before = next((one for one in report.cases if one.case.name == case.name), None)
    known = {} if before is None else {one.point: one for one in before.points}
    settings = dataclasses.replace(settings, competitors=tuple(one.name for one in competitors))
    for point in settings.points:
        is_done = point in known and known[point].has(settings.competitors, settings.operations)
        if is_done or (before is not None and str(point) in before.skipped_points):
            continue
        plan = PointPlan(case, point, settings, tuple(competitors))
        yield plan.joined(known[point], tell) if point in known and known[point].rows else plan


def _race_case(
    case: Case, plans: Sequence[PointPlan], created: str, scratch: str, tell: Progress
) -> Iterator[CaseResult]:
    """A result for each point, as it is done."""
    skipped = {}
    for point in (plan.point for plan in plans):
        if choose_cores(point.threads) is None:
            skipped[str(point)] = f"this machine lets it use fewer than {point.threads} cores"
    able = [plan for plan in plans if str(plan.point) not in skipped]
    if not able and skipped:
        yield CaseResult(case.facts, (), skipped)
    for plan in able:
        yield CaseResult(case.facts, (PointRun(plan, created, scratch, tell).run(),), skipped)


def _tell_of_kept(report: RaceReport, result: CaseResult, tell: Progress) -> None:
    """Why a point is still as it was, where it was raced again and nobody was timed."""
    kept = {(case.case.name, one.point) for case in report.cases for one in case.points if one.rows}
    for point in result.points:
        if not point.rows and (result.case.name, point.point) in kept:
            reasons = "; ".join(absent_lines(point))
            tell(f"{result.case.name} {point.point}: nobody was timed, and what was before is kept: {reasons}")


@dataclass
class Contender:
    """One competitor at one point, with what is known about it so far. process: None while it has none."""

    competitor: Competitor
    process: Process | None = None
    opened: dict[str, Any] = field(default_factory=dict)
    finished: dict[str, Any] = field(default_factory=dict)
    call_seconds: dict[str, float] = field(default_factory=dict)
    rounds: dict[str, list[float]] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.competitor.name


class PointRun:
    """The race of one case at one point."""

    def __init__(self, plan: PointPlan, created: str, scratch: str, tell: Progress) -> None:
        """created: of the race. scratch: folder for what compilers leave, which all points of a race share."""
        self._case, self._point, self._settings = plan.case, plan.point, plan.settings
        self._tell: Progress = lambda line: tell(f"{plan.case.name} {plan.point}: {line}")
        self._contenders = {one.name: Contender(one) for one in plan.competitors}
        self._out: dict[str, dict[str, str]] = {"skipped": {}, "disqualified": {}, "failed": {}}
        self._cores = choose_cores(plan.point.threads) or None
        self._fresh = plan.settings.fresh
        self._created, self._scratch = created, scratch
        self._environment = {} if plan.point.device == "cuda" else dict(_NO_GPU)

    def run(self) -> PointResult:
        """Race for about this point's share of the budget. Whatever ends it, no process is left."""
        load = MachineFacts.read().load_average_1min
        with tempfile.TemporaryDirectory(dir=self._scratch, ignore_cleanup_errors=True) as folder:
            if self._settings.tune:
                self._environment[_CACHE] = str(Path(folder) / "tuning")
            tuned = self._tune()
            try:
                if self._point.device == "cuda":
                    self._load()
                self._prepare()
                before = self._cpu_time()
                rounds = self._run_rounds(self._settings.budget / len(self._settings.points))
                others = others_between(before, self._cpu_time()) if rounds else None
                for contender in list(self._contenders.values()):
                    if contender.process is not None:
                        self._ask(contender, "finish", CALL_TIMEOUT)
            finally:
                self._close_all()
        return self._result(rounds, tuned, load, others)

    def _cpu_time(self) -> CpuTime | None:
        return CpuTime.read(running=[one.process.pid for one in self._contenders.values() if one.process is not None])

    def _tune(self) -> str:
        """Let `vae-run tune` measure what suits these cores, for "auto" to use; what became of it, in words."""
        ours = [one.competitor.options for one in self._contenders.values() if one.competitor.module == "ours"]
        if not self._settings.tune or not any("auto" in options.values() for options in ours):
            return "no"
        self._tell(f"vae-run tune, about {self._settings.tune_seconds:g} s")
        options = [str(self._case.bundle), "--seconds", str(self._settings.tune_seconds)]
        program = [*interpreter("racing"), "-c", _TUNE, json.dumps(self._cores)]
        finished = run_group([*program, *options], self._environment)
        if finished.returncode:
            return f"no, exit code {finished.returncode}: {last_line(finished.stderr) or 'no message'}"
        return f"yes, {self._settings.tune_seconds:g} s"

    def _load(self) -> None:
        """Start everybody and let him load his engine, all at once where memory allows; nothing is measured in it."""
        contenders = list(self._contenders.values())
        if available_bytes() < len(contenders) * LOADED_BYTES + MEMORY_RESERVE:
            return
        self._tell("loading all engines")
        for contender in contenders:
            contender.process = Process(self._point.threads, None, self._scratch, self._environment)

        def load(contender: Contender) -> None:
            one = contender.competitor
            self._ask(contender, "load", OPEN_TIMEOUT, module=one.module, options=one.options, cores=self._cores)

        at_once(load, contenders, len(contenders), self._close_all)

    def _prepare(self) -> None:
        """Open, check and warm up everybody, and say who is out."""
        largest = 0
        for contender in list(self._contenders.values()):
            if largest and not self._fresh and available_bytes() < 1.2 * largest + MEMORY_RESERVE:
                self._tell("not all competitors fit into memory together: a fresh process for every turn")
                self._fresh = True
                self._close_all()
            self._tell(f"{contender.name}: opening, checking, warming up")
            if self._open(contender, check=True):
                if self._ask(contender, "finish", CALL_TIMEOUT):
                    largest = max(largest, contender.finished["peak_rss_bytes"])
                if self._fresh:
                    self._close(contender)
            elif contender.name in self._out["disqualified"]:
                self._tell(f"{contender.name} is disqualified: {self._out['disqualified'][contender.name]}")

    def _open(self, contender: Contender, check: bool) -> bool:
        """A warm process for the contender; False where it is out."""
        if contender.process is None:
            contender.process = Process(self._point.threads, self._cores, self._scratch, self._environment)
        competitor = contender.competitor
        answer = self._ask(
            contender, "open", OPEN_TIMEOUT,
            case=str(self._case.folder), module=competitor.module, options=competitor.options,
            batch=self._point.batch, threads=self._point.threads, check=check,
        )  # fmt: skip
        if not answer:
            return False
        if check and answer["fault"] is not None:
            self._drop(contender, "disqualified", answer["fault"])
            return False
        for operation in self._settings.operations:
            if not self._ask(contender, "warm", CALL_TIMEOUT, operation=operation):
                return False
        return True

    def _ask(self, contender: Contender, request: str, timeout: float, **arguments: Any) -> dict[str, Any]:
        """The answer, also noted in the contender; empty where the competitor is out by it."""
        assert contender.process is not None
        try:
            answer = contender.process.ask(request, timeout, **arguments)
        except CompetitorError as error:
            self._drop(contender, "skipped" if error.skipped else "failed", str(error))
            return {}
        if request == "open" and arguments["check"]:
            contender.opened = answer
        elif request == "warm":
            contender.call_seconds[arguments["operation"]] = answer["call_ns"] / 1e9
        elif request == "turn":
            contender.rounds.setdefault(arguments["operation"], []).append(answer["median_ns"] / 1e6)
            contender.calls[arguments["operation"]] = contender.calls.get(arguments["operation"], 0) + answer["calls"]
        elif request == "finish":
            contender.finished = answer
        return answer

    def _run_rounds(self, budget: float) -> int:
        contenders = list(self._contenders.values())
        calls = [seconds for contender in contenders for seconds in contender.call_seconds.values()]
        if not calls:
            return 0
        rounds, seconds = plan_rounds(calls, budget, self._settings.rounds)
        for number in range(rounds):
            self._tell(f"round {number + 1} of {rounds}")
            for contender in order_of(contenders, number):
                if contender.name in self._contenders:
                    self._take_turns(contender, number, seconds)
        return rounds

    def _take_turns(self, contender: Contender, number: int, seconds: float) -> None:
        if self._fresh and not self._open(contender, check=False):
            return
        for operation in order_of(self._settings.operations, number):
            if not self._ask(contender, "turn", CALL_TIMEOUT + 10 * seconds, operation=operation, seconds=seconds):
                return
        if self._fresh:
            self._ask(contender, "finish", CALL_TIMEOUT)
            self._close(contender)

    def _drop(self, contender: Contender, how: str, reason: str) -> None:
        self._close(contender)
        self._contenders.pop(contender.name, None)
        self._out[how][contender.name] = reason

    def _close_all(self) -> None:
        for contender in list(self._contenders.values()):
            self._close(contender)

    def _close(self, contender: Contender) -> None:
        if contender.process is not None:
            contender.process.kill()
            contender.process = None

    def _result(self, rounds: int, tuned: str, load: float | None, others: float | None) -> PointResult:
        contenders = list(self._contenders.values())
        rows = tuple(
            Row.of(operation, contender.name, contender.rounds[operation], contender.calls[operation])
            for operation in self._settings.operations
            for contender in contenders
        )
        return PointResult(
            point=self._point,
            rounds=rounds,
            fresh=self._fresh,
            cores=self._cores,
            tuned=tuned,
            load_average_1min=load,
            runners=tuple(_runner(contender) for contender in contenders),
            skipped=self._out["skipped"],
            disqualified=self._out["disqualified"],
            failed=self._out["failed"],
            rows=rows,
            ratios=rank(
                rows,
                [contender.name for contender in contenders if contender.competitor.is_peer],
                {contender.name: contender.competitor.group for contender in contenders},
            ),
            created=self._created,
            settings=self._settings,
            other_cores_busy=others,
        )


def _runner(contender: Contender) -> Runner:
    opened = contender.opened
    return Runner(
        name=contender.name,
        is_peer=contender.competitor.is_peer,
        precisions=tuple(opened["precisions"]),
        engine=opened["engine"],
        configuration=opened["configuration"],
        plan=opened["plan"],
        error_measure=opened["measure"],
        errors=opened["errors"],
        open_seconds=opened["seconds"],
        idle_cpu_share=contender.finished["idle_cpu_share"],
        peak_rss_bytes=contender.finished["peak_rss_bytes"],
        group=contender.competitor.group,
    )


def _versions() -> Iterator[tuple[str, str]]:
    yield from (("python", platform.python_version()), ("vae-edge", __version__))
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            yield package, metadata.version(package)


METHOD = {
    "processes": "one for each competitor, case and point, idle while the others run, or a fresh one for every turn "
    "where a point says so; bound to the same cores, with the same number of threads for every engine",
    "checks": "before any timing, both outputs against PyTorch's in fp32 on the same inputs; a result must not change "
    "when the next one is computed",
    "calls": "host float32 arrays in, new host float32 arrays out; vae-edge through the public calls of VAE with all "
    "their checks on inputs; the garbage collector is off",
    "rounds": "in each, everyone has one turn per operation, in an order that changes from round to round; a turn "
    "begins with calls that are not timed",
    "interval": "95%, of medians by order statistics of the rounds' medians; of ratios by those of the rounds' ratios, "
    "with fewer than 6 rounds by Student's t on their logarithms",
    "not in the interval": "what differs from process to process, such as the layout in memory, as a competitor has "
    "one process per point unless every turn had a fresh one",
}

CUDA_METHOD = {
    **METHOD,
    "calls": "encode and decode: a float32 array in host memory in, a new one out, with both copies and the wait for "
    "the GPU; vae-edge through the public calls of VAE with all their checks on inputs; torch stages its copies in the "
    "way that was fastest in a trial; the garbage collector is off",
    "checks": "before any timing, all outputs of both kinds of calls against PyTorch's on the CPU in fp32 on the same "
    "inputs; a result must not change when the next one is computed",
    "calls on the device": "encode-on-device and decode-on-device: the input is in the GPU's memory before the clock "
    "starts; new results, which belong to the caller, are there and finished when it stops: torch's stream is "
    "synchronised, onnxruntime returns when the work is done, and what the next CUDA graph would overwrite is cloned "
    "within the timed call",
    "precisions": "each one apart, × ours within it: fp32 with TF32 off, tf32 with it on, fp16 with half the bits in "
    "weights and arithmetic, from float32 and to it; the checks allow tf32 and fp16 a root mean square error of 0.01",
    "choices": "where there are several ways to set an engine up, such as memory layouts, each half and each kind of "
    "call keeps what was fastest in a trial before the race, and the report says which",
    "opening": "engines and compilers load all at once, and before that torch.compile has compiled everything all at "
    "once, where memory allows; trials, choices and checks have the machine to themselves, one after the other",
}
