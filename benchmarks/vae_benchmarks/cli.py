"""`vae-bench`: measure a bundle, compare two measurements, race it against other engines, drive it with LoadGen."""

from __future__ import annotations

import contextlib
import json
import tempfile
from pathlib import Path
from typing import Any

import click

from vae_runtime import __version__
from vae_runtime.atomic import refuse_existing, write_json, writing
from vae_runtime.console import DEVICE_HELP, NEGATIVE_VERDICT, PRECISION_HELP, Group, Sides, json_option, print_json
from vae_runtime.errors import OutputError

from .compare import NO_VERDICT, compare
from .errors import BenchmarkError
from .harness import benchmark
from .loadgen_cli import loadgen_command
from .race.cli import race_command
from .report import FORMAT, Report
from .settings import INPUTS, OPERATIONS, Settings
from .table import format_comparison, format_report

_DEFAULTS = Settings()


class BenchGroup(Group):
    """A group whose first argument may be a bundle: `vae-bench BUNDLE` is `vae-bench run BUNDLE`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in {*self.commands, *ctx.help_option_names, "--version"}:
            args = ["run", *args]
        return super().parse_args(ctx, args)

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_usage(ctx.command_path, "[run] BUNDLE [OPTIONS]")
        for use in ("compare A.json B.json [OPTIONS]", "race CASE... [OPTIONS]", "loadgen BUNDLE [OPTIONS]"):
            formatter.write_usage(ctx.command_path, use, prefix="       ")

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, command in (
            ("BUNDLE", run),
            ("compare", comparison),
            ("race", race_command),
            ("loadgen", loadgen_command),
        ):
            options = [option for option in command.params if isinstance(option, click.Option)]
            records = [record for option in options if (record := option.get_help_record(ctx))]
            with formatter.section(f"Options of {ctx.command_path} {title}"):
                formatter.write_dl(records)


class Items(click.ParamType):
    """One item or several, separated by commas; each read by `kind`. `word` stands for None where it is given."""

    def __init__(self, kind: click.ParamType, word: str | None = None) -> None:
        self.kind, self.word = kind, word
        self.name = kind.name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        items = [item.strip() for item in value.split(",")]
        return tuple(None if item == self.word else self.kind.convert(item, param, ctx) for item in items)

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return f"{self.kind.name.upper()},..."


@click.group(cls=BenchGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="vae-bench")
def main() -> None:
    """Measure a bundle's latency, throughput, start-up and memory, or compare two such measurements; race it against
    other engines on the same weights; or drive it with MLPerf's LoadGen.

    Everything is measured in fresh processes, through the calls that applications make, in several rounds. Exit code 3:
    compare found something that became slower, or takes more memory, beyond noise; 1 where it could judge nothing.
    """


@main.command()
@click.argument("bundle", type=click.Path())
@click.option(
    "--operation",
    "operations",
    multiple=True,
    type=Items(click.Choice(OPERATIONS)),
    metavar="NAME,...",
    help=f"{', '.join(OPERATIONS)}.  [all]",
)
@click.option("--batch", "batches", multiple=True, type=Items(click.INT), help="Examples per call.  [1,8,32]")
@click.option(
    "--input",
    "inputs",
    multiple=True,
    type=Items(click.Choice(INPUTS)),
    metavar="DTYPE,...",
    help=f"{', '.join(INPUTS)}: what encode, reconstruct and score are given; uint8 is for images.  [float32]",
)
@click.option(
    "--threads",
    multiple=True,
    type=Items(click.INT, "auto"),
    help="Threads of one call on the CPU; auto is onnxruntime's choice.  [1,auto]",
)
@click.option("--device", default="cpu", show_default=True, help=DEVICE_HELP)
@click.option("--precision", default="fp32", show_default=True, help=PRECISION_HELP)
@click.option("--size", type=Sides(), help="HEIGHTxWIDTH of images, where the bundle leaves it free.  [the bundle's]")
@click.option("--seconds", default=_DEFAULTS.seconds, show_default=True, help="The most time to measure one row for.")
@click.option(
    "--rounds", default=_DEFAULTS.rounds, show_default=True,
    help="Fresh processes per row; from 9 on, one that was disturbed spoils no interval.",
)  # fmt: skip
@click.option("--confidence", default=_DEFAULTS.confidence, show_default=True, help="Of the medians' intervals.")
@click.option(
    "--width", default=_DEFAULTS.width, show_default=True, help="Stop a row early once its interval is so narrow."
)
@click.option(
    "--split/--no-split",
    default=None,
    help="Time encode's and decode's way to the device, work there and way back, too.  [on GPUs]",
)
@click.option("--output", type=click.Path(), help="Also write the report to this file, as JSON.")
@click.option("--force", is_flag=True, help="Replace an existing report.")
@json_option
def run(bundle: str, output: str | None, force: bool, as_json: bool, **options: Any) -> None:
    """Measure BUNDLE. Every combination of operation, batch, input and threads is one row.

    Lists are given with commas or by repeating the option. Progress goes to stderr.
    """
    for name in ("operations", "batches", "inputs", "threads"):
        items = tuple(item for group in options.pop(name) for item in group)
        options[name] = items or getattr(_DEFAULTS, name)
    settings = Settings(**options)
    if output is not None:
        _check_output(Path(output), force)
    report = benchmark(bundle, settings, lambda line: click.echo(line, err=True))
    try:
        if output is not None:
            write_json(output, report.to_dict(), replace=force)
            click.echo(f"report written to {output}", err=True)
    finally:  # what took minutes is shown in any case
        if as_json:
            print_json(report.to_dict())
        else:
            click.echo(format_report(report))


@main.command("compare")
@click.argument("a", type=click.Path(), metavar="A.json")
@click.argument("b", type=click.Path(), metavar="B.json")
@click.option("--threshold", default=0.05, show_default=True, help="The least relative change that counts.")
@click.option("--confidence", default=0.95, show_default=True, help="That all rows' intervals hold together.")
@json_option
@click.pass_context
def comparison(ctx: click.Context, /, a: str, b: str, threshold: float, confidence: float, as_json: bool) -> None:
    """Say what is faster or slower in B.json than in A.json, beyond noise.

    Exit code 3 if anything became slower or takes more memory; 1 if no latency could be judged, which is no sign that
    nothing became slower.
    """
    result = compare(Report.load(a), Report.load(b), threshold, confidence)
    if as_json:
        print_json(result.to_dict())
    else:
        click.echo(format_comparison(result, a, b))
    if result.verdict == NO_VERDICT:
        raise BenchmarkError(f"no verdict: {result.reason}")
    ctx.exit(NEGATIVE_VERDICT if result.is_worse else 0)


main.add_command(race_command)
main.add_command(loadgen_command)


def _check_output(path: Path, force: bool) -> None:
    """Refuse what could not be written in the end, before minutes are spent measuring."""
    if not path.parent.is_dir():
        raise OutputError(f"{path} cannot be written: the folder {path.parent} does not exist")
    if force and path.exists() and not _is_report(path):
        raise OutputError(f"{path} is not a report of vae-bench; --force replaces nothing else")
    refuse_existing(path, lambda old: force)
    with writing(path), tempfile.TemporaryFile(dir=path.parent):
        pass


def _is_report(path: Path) -> bool:
    with contextlib.suppress(OSError, ValueError, AttributeError, RecursionError):
        return bool(json.loads(path.read_bytes()).get("format") == FORMAT)
    return False


if __name__ == "__main__":
    main()
