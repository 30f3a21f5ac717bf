"""`vae-bench loadgen`: parse, run, print."""

from __future__ import annotations

from typing import Any

import click

from vae_runtime.console import NEGATIVE_VERDICT, Command, engine_options, json_option, print_json

from .loadgen import OFFICIAL_SECONDS, OPERATIONS, SCENARIOS, LoadgenReport, LoadgenSettings, run_loadgen
from .race.text import format_ms, format_plan
from .table import warn_of


@click.command("loadgen", cls=Command)
@click.argument("bundle", type=click.Path())
@click.option("--scenario", required=True, type=click.Choice([*SCENARIOS]))
@click.option("--operation", type=click.Choice(OPERATIONS), default="reconstruct", show_default=True)
@click.option(
    "--seconds", default=5.0, show_default=True, help=f"The least duration; an official run takes {OFFICIAL_SECONDS}."
)
@click.option("--queries", default=100, show_default=True, help="The least number of queries.")
@click.option("--samples-per-query", default=8, show_default=True, help="Of multi-stream.")
@click.option("--batch", default=32, show_default=True, help="The most examples per call, offline.")
@click.option("--logs", type=click.Path(), help="Folder for LoadGen's log files; else they are deleted.")
@engine_options
@json_option
@click.pass_context
def loadgen_command(ctx: click.Context, /, bundle: str, logs: str | None, as_json: bool, **options: Any) -> None:
    """Drive BUNDLE (or a case) with MLPerf's LoadGen: the edge scenarios, read from LoadGen's own summary.

    This is not an official MLPerf result. Exit code 3 if LoadGen calls the run not valid.
    """
    report = run_loadgen(bundle, LoadgenSettings(**options), logs)
    if as_json:
        print_json(report.to_dict())
    else:
        click.echo(format_loadgen(report))
    ctx.exit(0 if report.valid else NEGATIVE_VERDICT)


def format_loadgen(report: LoadgenReport) -> str:
    """The result, LoadGen's verdict on the run, whether other work disturbed it, and what it is not."""
    settings = report.settings
    busy = None if report.other_cores_busy is None else report.machine.busy_with(report.other_cores_busy)
    if report.samples_per_second is not None:
        result = f"{report.samples_per_second:,.0f} samples/s"
    else:
        assert report.latency_ms is not None
        result = f"p{report.percentile:g} {format_ms(report.latency_ms)}"
        if settings.scenario == "multi-stream":
            result += f" per query of {settings.samples_per_query}"
    verdict = "valid" if report.valid else f"not valid: {'; '.join(report.reasons)}"
    return "\n".join(
        [
            f"{report.name}, {settings.scenario}, {settings.operation}: {result}",
            f"LoadGen {report.loadgen} calls a run of at least {settings.seconds:g} s {verdict}",
            f"runs on: {format_plan(report.plan)}",
            *([] if busy is None else [warn_of(busy)]),
            report.note,
        ]
    )
