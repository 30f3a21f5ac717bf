"""`vae-bench race`: parse, race, print and write."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import click

from vae_runtime.atomic import atomic_file
from vae_runtime.console import Command, json_option, print_json
from vae_runtime.errors import InputError, MissingExtraError, OutputError

from ..errors import BenchmarkError, ReportError
from .competitors import COMPETITORS, CUDA_COMPETITORS, choose_competitors
from .picture import draw_race
from .report import CUDA_POINTS, DEVICES, OPERATIONS, Point, RaceReport, RaceSettings, merge
from .running import race
from .text import absent_lines, format_markdown, format_race, skipped_lines

JSON_FILE, MARKDOWN_FILE, PICTURE_FILE = "race.json", "race.md", "race.png"
_DEFAULTS = RaceSettings()


@click.command("race", cls=Command)
@click.argument("paths", nargs=-1, required=True, type=click.Path(), metavar="CASE...")
@click.option(
    "--device", default=_DEFAULTS.device, show_default=True,
    help="cpu or cuda; on the latter all competitors run on the GPU, in fp32, tf32 and fp16.",
)  # fmt: skip
@click.option(
    "--points", metavar="BATCHxTHREADS,...",
    help="Examples per call and threads of one call, on a GPU of its host."
    f"  [{','.join(map(str, _DEFAULTS.points))}; cuda: {','.join(f'{p.batch}x{p.threads}' for p in CUDA_POINTS)}]",
)  # fmt: skip
@click.option(
    "--operations", metavar="NAME,...",
    help=f"{', '.join(OPERATIONS)}; the last two on a GPU only, where the data stay.  [all]",
)  # fmt: skip
@click.option(
    "--competitors", metavar="NAME,...",
    help=f"{', '.join(COMPETITORS)}; with --device cuda: {', '.join(CUDA_COMPETITORS)}.  [all]",
)  # fmt: skip
@click.option("--budget", default=_DEFAULTS.budget, show_default=True, help="Seconds to time each case for.")
@click.option("--rounds", default=_DEFAULTS.rounds, show_default=True, help="At most.")
@click.option(
    "--fresh", is_flag=True,
    help="Every turn in a process of its own, so that intervals hold what differs between processes; takes longer.",
)  # fmt: skip
@click.option(
    "--tune/--no-tune", default=True, show_default=True,
    help="Run `vae-run tune` at each point first, for this race alone; else what you tuned yourself holds.",
)  # fmt: skip
@click.option("--tune-seconds", default=_DEFAULTS.tune_seconds, show_default=True, help="For each of these.")
@click.option("--output", type=click.Path(), help=f"Folder for {JSON_FILE}, {MARKDOWN_FILE} and {PICTURE_FILE}.")
@click.option("--resume", is_flag=True, help=f"Keep what {JSON_FILE} in --output has and race the rest.")
@click.option("--force", is_flag=True, help="Race anew over what is in --output.")
@click.option(
    "--merge", "merging", is_flag=True, help=f"CASE... are {JSON_FILE} files of this machine: make one of them."
)
@json_option
def race_command(
    paths: tuple[str, ...],
    output: str | None,
    resume: bool,
    force: bool,
    merging: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Race each CASE against other engines on the same weights and inputs.

    CASE is a folder that benchmarks/cases/build.py made, whose modules.py is run, or a bundle, which the torch
    competitors cannot race with. Each competitor has a process of its own; its outputs are checked first; one that is
    not installed is skipped by name; where nobody can be timed, the exit code is 1. Progress goes to stderr.
    """
    if resume and (output is None or force or merging):
        raise click.UsageError("--resume goes with --output, and not with --force or --merge")
    settings = _settings(options)
    folder = None if output is None else Path(output)
    before = None if folder is None else _check(folder, resume, force)
    if merging:
        report = merge([RaceReport.load(path) for path in paths])
        if folder is not None:
            _write(folder, report)
    else:
        report = race(
            paths,
            settings,
            lambda line: click.echo(line, err=True),
            before=before,
            after_point=None if folder is None else lambda found: _save(folder, found) if _was_timed(found) else None,
        )
        _require_rows(report, before)
        if folder is not None and (report is not before or _is_behind(folder)):
            _write(folder, report, is_new=report is not before)
    if as_json:
        print_json(report.to_dict())
    else:
        click.echo(format_race(report))


def _was_timed(report: RaceReport) -> bool:
    return any(point.rows for case in report.cases for point in case.points)


def _require_rows(report: RaceReport, before: RaceReport | None) -> None:
    """Say why, line by line, where this race has timed nobody at all.

    Raises:
        BenchmarkError: so it is.
    """
    kept = () if before is None else before.cases
    known = [point for case in kept for point in case.points]
    raced = [(case.case.name, point) for case in report.cases for point in case.points if point not in known]
    nothing_came = report is not before and report.cases == kept
    if any(point.rows for _, point in raced) or (not raced and _was_timed(report) and not nothing_came):
        return
    for name, point in raced:
        for line in absent_lines(point):
            click.echo(f"{name} {point.point}: {line}", err=True)
    for case in report.cases:
        for line in skipped_lines(case):
            click.echo(f"{case.case.name}: {line}", err=True)
    raise BenchmarkError("nobody was timed at any point; the lines above say why")


def _settings(options: dict[str, Any]) -> RaceSettings:
    def items(text: str) -> tuple[str, ...]:
        return tuple(item.strip() for item in text.split(",") if item.strip())

    lists = {name: items(options[name]) for name in ("operations", "competitors") if options[name] is not None}
    points = {} if options["points"] is None else {"points": tuple(map(Point.parse, items(options["points"])))}
    others = {name: options[name] for name in ("budget", "rounds", "fresh", "tune", "tune_seconds")}
    if options["device"] in DEVICES:
        choose_competitors(lists.get("competitors", ()), options["device"])
    return RaceSettings.on(options["device"], **points, **lists, **others)


def _check(folder: Path, resume: bool, force: bool) -> RaceReport | None:
    """See, before minutes are spent, that the folder can be made, or is a race's and may be continued or replaced; what
    is to be continued."""
    existing = folder / JSON_FILE
    if not folder.exists():
        if not folder.absolute().parent.is_dir():
            raise OutputError(f"{folder} cannot be made: the folder {folder.parent} does not exist")
        return None
    if not folder.is_dir() or (any(folder.iterdir()) and not existing.is_file()):
        raise OutputError(f"{folder} exists and is not the folder of a race; choose a name that is not taken")
    if not existing.is_file():
        return None
    if resume:
        return RaceReport.load(existing)
    if not force:
        raise OutputError(f"{existing} exists; continue it with --resume, or replace it with --force")
    with contextlib.suppress(ReportError):
        RaceReport.load(existing)
        return None
    raise OutputError(f"{existing} is not a report of vae-bench race; --force replaces nothing else")


def _save(folder: Path, report: RaceReport) -> None:
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder} cannot be made: {error.strerror}") from None
    report.save(folder / JSON_FILE)


def _is_behind(folder: Path) -> bool:
    """Whether the text is not of the report beside it, as a race that was ended early leaves it."""
    text = folder / MARKDOWN_FILE
    return not text.exists() or text.stat().st_mtime_ns < (folder / JSON_FILE).stat().st_mtime_ns


def _write(folder: Path, report: RaceReport, is_new: bool = True) -> None:
    """All files; of a report that is not new, all but its JSON."""
    if is_new:
        _save(folder, report)
    with atomic_file(folder / MARKDOWN_FILE) as stream:
        stream.write(format_markdown(report).encode())
    written = [*([JSON_FILE] if is_new else []), MARKDOWN_FILE]
    try:
        draw_race(report, folder / PICTURE_FILE)
        written.append(PICTURE_FILE)
    except (MissingExtraError, InputError) as error:
        click.echo(f"no picture: {error}", err=True)
    click.echo(f"{folder}: {', '.join(written)} written", err=True)
