"""What command lines share: expected failures become one sentence on stderr and exit code 1, signals end cleanly."""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import json
import os
import signal
import stat
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import click

from .errors import VAEError
from .manifest import Manifest

_Function = TypeVar("_Function", bound=Callable[..., Any])

NEGATIVE_VERDICT = 3  # the exit code of a command that ran and whose answer is no
# What the system has of them. Windows sends the last one when a console is closed, or Ctrl-Break is pressed.
ENDINGS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name))


class Command(click.Command):
    """A command whose `VAEError`s are printed as `Error: ...`, and so are files and folders that the system refuses;
    wrong usage exits with 2, as click has it, and SIGTERM with 143 or a closed terminal with 129, after all that the
    command has started and made for a time is gone."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with hear_endings(), _any_file_names():
                return super().invoke(ctx)
        except VAEError as error:
            raise click.ClickException(printable(str(error))) from error
        except OSError as error:
            if error.errno == errno.EPIPE:  # a reader that has enough, which click looks after
                raise
            if _is_windows_closed_pipe(error):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the last flush fails too
                raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE)) from error
            name = "" if error.filename is None else f"{error.filename} cannot be used: "
            raise click.ClickException(printable(f"{name}{error.strerror or error}")) from error


def _is_windows_closed_pipe(error: OSError) -> bool:
    """Whether stdout is a pipe, whose reader may be gone: Windows calls that no more than an invalid argument."""
    if sys.platform != "win32" or error.errno != errno.EINVAL or error.filename is not None:
        return False
    try:
        return stat.S_ISFIFO(os.fstat(sys.stdout.fileno()).st_mode)
    except (OSError, ValueError):  # closed, or no file at all
        return False


class Group(click.Group):
    """A group of such commands."""

    command_class = Command


def _as_it_can_be(error: UnicodeError) -> tuple[bytes, int]:
    """Bytes of a name as they are, and what the encoding lacks as an escape, \\u76ee."""
    assert isinstance(error, UnicodeEncodeError)
    text = error.object[error.start : error.end]
    handlers = ("surrogateescape" if "\udc80" <= one <= "\udcff" else "backslashreplace" for one in text)
    return b"".join(one.encode("ascii", handler) for one, handler in zip(text, handlers, strict=True)), error.end


_AS_IT_CAN_BE = "vae_runtime.as_it_can_be"
codecs.register_error(_AS_IT_CAN_BE, _as_it_can_be)


@contextlib.contextmanager
def _any_file_names() -> Iterator[None]:
    """Names of files that are no UTF-8 are printed byte by byte, as they are, and characters that a terminal's encoding
    lacks as escapes."""
    stream = sys.stdout
    if not isinstance(stream, io.TextIOWrapper) or stream.closed or stream.errors not in ("strict", "surrogateescape"):
        yield  # PYTHONIOENCODING has said what to do with them
        return
    errors = stream.errors
    stream.reconfigure(errors=_AS_IT_CAN_BE)
    try:
        yield
    finally:
        stream.reconfigure(errors=errors)


@contextlib.contextmanager
def hear_endings() -> Iterator[None]:
    """SIGTERM, SIGHUP and Windows' SIGBREAK raise `SystemExit` here, as Ctrl-C raises `KeyboardInterrupt`: `finally`
    and context managers run.

    Nothing is changed outside of the main thread, nor where a signal is ignored (by nohup, say) or has a handler.
    """
    main = threading.current_thread() is threading.main_thread()
    heard = [number for number in ENDINGS if main and signal.getsignal(number) is signal.SIG_DFL]

    def end(number: int, frame: object) -> None:
        for one in heard:
            signal.signal(one, lambda number, frame: None)  # another one must not interrupt what the first one ends
        raise SystemExit(128 + number)

    for number in heard:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in heard:
            signal.signal(number, signal.SIG_DFL)


DEVICE_HELP = "cpu, cuda, cuda:N, tensorrt, openvino, auto or a provider's name."
PRECISION_HELP = "fp32, fp16, int8, bf16, tf32 or auto."


def engine_options(function: _Function) -> _Function:
    """--device, --precision and --threads, alike wherever a bundle is run."""
    for option in (
        click.option("--threads", type=int, help="Threads of one call on the CPU.  [default: onnxruntime's choice]"),
        click.option("--precision", default="fp32", show_default=True, help=PRECISION_HELP),
        click.option("--device", default="cpu", show_default=True, help=DEVICE_HELP),
    ):
        function = option(function)
    return function


class Sides(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions of click only
    """ "480x640" -> (480, 640), height and width."""

    name = "HxW"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        parts = value if isinstance(value, tuple) else value.lower().split("x")
        try:
            height, width = map(int, parts)
        except ValueError:
            self.fail(f"{value!r} is not of the form HEIGHTxWIDTH", param, ctx)
        return height, width


def describe_latent(manifest: Manifest) -> list[str]:
    """What was measured of a bundle on real data, in words, a line each."""
    lines, units = [], manifest.latent.active_units
    if units is not None:
        of = "the posterior's mean" if manifest.kind == "vae" else "the code"
        rule = f"variance of {of} above {units.threshold:.3g} on {units.examples} examples"
        lines.append(f"{units.active} of {len(units.variances)} units active ({rule})")
    if (fitted := manifest.latent.fitted_prior) is not None:
        what = "a Gaussian" if fitted.type == "gaussian" else f"a mixture of {fitted.components} Gaussians"
        lines.append(f"fitted prior: {what} with full covariance, from {fitted.examples} examples")
    if (calibration := manifest.calibration) is not None:
        source = "held-out " if calibration.source == "held-out" else ""
        tiles = f" in tiles of {calibration.tile}" if calibration.tile else ""
        lines.append(f"calibrated on {calibration.examples} {source}examples{tiles}: {', '.join(calibration.scores)}")
    return lines


_LOSSES = {  # what is lost, its unit, and what is left
    "psnr_lost_db": ("dB of PSNR", "psnr_db"),
    "nats_lost_per_dimension": ("nats per dimension", "negative_elbo_per_dimension"),
}


def describe_quality(quality: Mapping[str, Any]) -> str:
    """`loses 0.002 dB of PSNR (to 31.02) on 180 examples, within the budget; nodes in fp32: 1`."""
    losses = [
        f"{quality[key]:.3g} {unit}" + ("" if quality.get(rest) is None else f" (to {quality[rest]:.4g})")
        for key, (unit, rest) in _LOSSES.items()
        if quality.get(key) is not None
    ]
    verdict = "within the budget" if quality.get("within_budget", True) else "MISSES the budget"
    kept = sum(map(len, quality.get("kept_fp32", {}).values()))
    loss = " and ".join(losses) or "an amount that is not stated"
    where = f" on {quality['examples']} examples" if "examples" in quality else ""
    return f"loses {loss}{where}, {verdict}; nodes in fp32: {kept}"


_BYTES = frozenset(map(chr, range(0xDCA0, 0xDD00)))


def printable(text: str) -> str:
    """The same lines without what a terminal would take for commands: a bundle's texts are whoever's made it, and names
    of files whoever's sent them. Bytes of these that are no UTF-8 stay, but for such commands."""
    return "".join(one if one.isprintable() or one == "\n" or one in _BYTES else repr(one)[1:-1] for one in text)


def echo_warning(message: object) -> None:
    """One line on stderr."""
    click.echo(f"Warning: {printable(str(message))}", err=True)


def json_option(function: _Function) -> _Function:
    """--json, a flag."""
    return click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON document.")(function)


def print_json(document: Any) -> None:
    """One JSON document on stdout, in ASCII where that is not UTF-8; see `json_text`."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    click.echo(json_text(document, only_ascii=codecs.lookup(encoding).name != "utf-8"))


def json_text(document: Any, only_ascii: bool = False) -> str:
    """A JSON document, in which bytes of file names that are no UTF-8 are escaped as Python has them, \\udce9; NaN is
    refused, as JSON has none."""
    text = json.dumps(document, indent=2, sort_keys=True, ensure_ascii=only_ascii, allow_nan=False)
    return text.encode(errors="backslashreplace").decode()
