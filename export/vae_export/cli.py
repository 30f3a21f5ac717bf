"""`vae-export`: write a bundle from the command line."""

from __future__ import annotations

import contextlib
import logging
import math
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from vae_runtime.bundle import Bundle
from vae_runtime.calibration import LEAST_EXAMPLES, SCORE_METHODS
from vae_runtime.console import (
    NEGATIVE_VERDICT,
    Command,
    describe_latent,
    describe_quality,
    echo_warning,
    json_option,
    print_json,
    printable,
)
from vae_runtime.errors import CheckpointError, InputError
from vae_runtime.manifest import GOLDEN_FILE, INPUT, KINDS, PRECISIONS, InputSpec, Manifest
from vae_runtime.preprocess import check_range
from vae_runtime.sources import BATCH_VALUES, ArraySource, PictureSource, open_inputs
from vae_runtime.tiling import Progress
from vae_runtime.version import __version__

from . import importers
from .bundle import check_output
from .halves import reference_name
from .imported import GOLDEN, HELD_OUT, INPUT_RANGES, SPREADS, ImportOptions
from .importers.hints import refuse_misstated, refuse_weights
from .importers.options import FLAGS, needs_extra
from .likelihood import parse_likelihood
from .options import ExportOptions
from .quality import Budget, ExportWarning

if TYPE_CHECKING:
    from vae_training.checkpoint import Checkpoint

EXAMPLES_LIMIT = 1024  # from --data; more inputs find no further error and only take longer
IMPORTED_EXAMPLES, IMPORTED_EXAMPLES_FP32 = 128, 16  # of models from elsewhere, which may take a minute for one image
UNIT_EXAMPLES, UNIT_VALUES = 256, 2**22  # of these, for the active units: they are only encoded
MOST_EXAMPLES, MOST_VALUES = 10_000, 2**28  # for --prior and --calibrate; the values are 1 GiB in float32
READ_ROWS = 256  # of an array file, held at once


@dataclass(frozen=True)
class _Request:
    """SOURCE and where it goes, with what the user states about it and the files to read.

    name: None where none is given. origin: of --from. likelihood, options: of a model from elsewhere.
    """

    source: str
    target: Path
    name: str | None
    origin: str | None
    likelihood: str | None
    data: tuple[str, ...]
    calibrate: tuple[str, ...]
    options: ImportOptions


class _Settings(ExportOptions, total=False):
    """What `export_checkpoint` and `export_imported` both take; what is not there is left to them."""

    golden: str | None
    tolerance: float
    prior_examples: np.ndarray
    calibrate: Any


class InputShape(click.ParamType):
    """ "3x64x64" -> (3, 64, 64); "3xHxW" -> (3, None, None); "784" -> (784,)."""

    name = "SHAPE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int | None, ...]:
        if isinstance(value, tuple):
            return value
        parts = value.lower().split("x")
        free = parts[1:] == ["h", "w"]
        sides = parts[:1] if free else parts
        if len(parts) not in (1, 3) or not all(side.isdecimal() and int(side) > 0 for side in sides):
            hint = "; what has other axes, as a sequence, goes as one vector: reshape in both halves"
            if len(parts) in (1, 3):
                hint = ""
            elif len(parts) == 2:
                hint = f"; a grey image is 1x{value}{hint}"
            self.fail(f"{value!r} is not of the form 3x64x64 (channels, height, width), 3xHxW or 784{hint}", param, ctx)
        return (*map(int, sides), *((None, None) if free else ()))


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("source", type=click.Path())
@click.option("--output", type=click.Path(), help="The bundle's folder.  [default: SOURCE.vae beside SOURCE]")
@click.option("--name", help="The bundle's name.  [default: the data set and family, or the source's name]")
@click.option("--from", "origin", help="What SOURCE is: model, diffusers, ldm, pythae, factory, program or onnx.")
@click.option(
    "--weights", type=click.Path(), help="Weights of a factory's network: .safetensors, or .pt, .pth with tensors only."
)
@click.option(
    "--trust-pickle", is_flag=True, help="Unpickle what SOURCE has pickled, which runs whatever code is in it."
)
@click.option("--kind", type=click.Choice(KINDS), help="What SOURCE is, where it leaves that open.")
@click.option("--input", "input_shape", type=InputShape(), help="Shape of inputs: 3x64x64, 3xHxW (free), or a length.")
@click.option("--multiple-of", type=click.IntRange(1), help="What free heights and widths are multiples of.")
@click.option(
    "--input-range", type=click.Choice(INPUT_RANGES), help="Range of SOURCE's images: unit, [0, 1]; signed, [-1, 1]."
)
@click.option(
    "--logits",
    is_flag=True,
    help="SOURCE's decoder gives logits; the graph gets a sigmoid after it.",
)
@click.option("--spread", type=click.Choice(SPREADS), help="What SOURCE's encoder gives beside the mean.")
@click.option(
    "--likelihood", metavar="TYPE[:SCALE]",
    help="p(x|z) of SOURCE, where it states none: bernoulli, gaussian:SCALE or laplace:SCALE, in the bundle's units;"
    " bernoulli:dynamic or bernoulli:threshold where images were made binary in training. Scores in nats need it.",
)  # fmt: skip
@click.option("--latent-scale", type=float, help="The bundle's latents are (z - shift) * scale, with SOURCE's z.")
@click.option("--latent-shift", type=float, help="See --latent-scale.")
@click.option(
    "--data", "data", multiple=True, type=click.Path(),
    help="Verify with these pictures, folders or one .npy/.npz instead of the examples in the checkpoint, or seeded"
    f" noise for other sources. At most {EXAMPLES_LIMIT:,} are taken, evenly spaced over all; for other sources"
    f" {IMPORTED_EXAMPLES_FP32}, or {IMPORTED_EXAMPLES} for precisions beside fp32, and up to {UNIT_EXAMPLES} for the"
    " active units.",
)  # fmt: skip
@click.option(
    "--golden", type=click.Choice([HELD_OUT, *GOLDEN]),
    help="Inputs that travel in the bundle: the checkpoint's held-out ones, those of --data, or seeded noise."
    "  [default: held-out; with --data examples; for other sources synthetic]",
)  # fmt: skip
@click.option(
    "--tolerance", type=float,
    help="Largest error of a reconstruction, relative to the data's range; 10 times that for mean and logvar."
    "  [default: 1e-5; for other sources 1e-4]",
)  # fmt: skip
@click.option(
    "--precision", "precisions", default="fp32", show_default=True,
    help="What to write, separated by commas: int8, fp16, tf32; fp32 is always written.",
)  # fmt: skip
@click.option(
    "--budget-psnr", type=float, default=Budget().psnr_db, show_default=True,
    help="PSNR of the reconstruction, in dB, that a precision may lose against fp32.",
)  # fmt: skip
@click.option(
    "--budget-nats", type=float, default=Budget().nats_per_dimension, show_default=True,
    help="-ELBO, in nats per input dimension, that a precision may lose against fp32.",
)  # fmt: skip
@click.option(
    "--prior", metavar="gaussian|mixture:K",
    help="Fit a prior, with full covariances, to the latents of --data, or else of the checkpoint's training examples,"
    f" of at most {MOST_EXAMPLES:,}. `vae-run sample --prior fitted` draws from it.",
)  # fmt: skip
@click.option(
    "--calibrate", multiple=True, type=click.Path(), metavar="DATA",
    help="Store the quantiles of the anomaly scores of this data, from which `vae-run score --quantile` takes its"
    " thresholds: pictures, folders or one .npy/.npz; or the word held-out, the checkpoint's own validation examples,"
    " drawn binary where it was trained with --binarize dynamic; data of yours are taken as they are, so have them as"
    " they will be scored, grey or binary."
    f" At least {LEAST_EXAMPLES}, at most {MOST_EXAMPLES:,} are taken, evenly spaced over all; images of free size keep"
    " theirs, padded as `vae-run score --pad` does. Take no training data: the model scores them lower than new data,"
    " so that thresholds would be too low, and too much would be called an anomaly.",
)  # fmt: skip
@click.option(
    "--calibrate-tile", type=int, metavar="PIXELS",
    help="Score large images of --calibrate in windows of this side, as `vae-run score --tile` does.",
)  # fmt: skip
@click.option(
    "--scores", metavar="METHOD,...",
    help=f"Which scores to calibrate, of {', '.join(SCORE_METHODS)}; the last takes 100 decodings of each example."
    "  [default: all that the bundle has]",
)  # fmt: skip
@click.option("--keep", is_flag=True, help="Write a precision that misses the budget too, marked in the manifest.")
@click.option("--force", is_flag=True, help="Replace an existing bundle, once the new one is complete.")
@json_option
@click.version_option(__version__, prog_name="vae-export")
def main(
    source: str,
    output: str | None,
    name: str | None,
    origin: str | None,
    likelihood: str | None,
    data: tuple[str, ...],
    golden: str | None,
    tolerance: float | None,
    precisions: str,
    budget_psnr: float,
    budget_nats: float,
    prior: str | None,
    calibrate: tuple[str, ...],
    calibrate_tile: int | None,
    scores: str | None,
    keep: bool,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Export SOURCE as a bundle: encoder and decoder as ONNX, verified against what made it.

    SOURCE is a model.pt of vae-train; a folder of diffusers (AutoencoderKL and others; also a pipeline's) or of pythae;
    a .safetensors of Stable Diffusion's or FLUX.1's own code, with the autoencoder in it;
    package.module:factory, which returns a PyTorch network; a folder with two TorchScript or torch.export
    programs, encoder and decoder, or with two ONNX files. It is recognised by its content.

    Exit code 3: the bundle is written, but without a precision that missed the budget.
    """
    names, budget = _parse_precisions(precisions), Budget(budget_psnr, budget_nats)
    parse_likelihood(likelihood)  # before the work
    target = Path(output) if output else _default_output(source)
    check_output(target, force)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ExportWarning)
        settings = _Settings(golden=golden, precisions=names, budget=budget, keep=keep, prior=prior, force=force)
        settings |= {"scores": _parse_scores(scores), "calibrate_tile": calibrate_tile}
        if tolerance is not None:
            settings["tolerance"] = tolerance
        request = _Request(source, target, name, origin, likelihood, data, calibrate, ImportOptions(**options))
        with needs_extra("export", "vae-export"):
            export = _export_ours if _is_ours(source, origin) else _export_imported
            with _stages(), _progress("calibrating") as settings["progress"]:
                manifest = export(request, settings)
    for warning in caught:
        if issubclass(warning.category, ExportWarning):
            echo_warning(warning.message)
    if as_json:
        print_json({"bundle": str(target), "manifest": manifest.to_dict()})
    else:
        click.echo(_describe(target, manifest))
    _report_misses(manifest)


@contextlib.contextmanager
def _stages() -> Iterator[None]:
    """Report the stages of the export on stderr, where that is a terminal: with large models, each may take minutes."""
    log, handler = logging.getLogger(__package__), logging.StreamHandler(sys.stderr)
    level = log.level
    if _is_terminal():
        log.addHandler(handler)
        log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def _is_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()  # None where it is closed


@contextlib.contextmanager
def _progress(label: str) -> Iterator[Progress]:
    """A bar on stderr, where that is a terminal, from the first report on."""
    bars: list[Any] = []
    with contextlib.ExitStack() as stack:

        def report(done: int, total: int) -> None:
            if not bars:
                hidden = not _is_terminal()
                bar = click.progressbar(length=total, label=label, file=sys.stderr, hidden=hidden)
                bars.append(stack.enter_context(bar))
            bars[0].update(done - bars[0].pos)

        yield report


def _is_ours(source: str, origin: str | None) -> bool:
    """Whether SOURCE is read as a model.pt: one by its content, or what cannot be anything else."""
    if origin is not None:
        return origin == importers.OURS
    path = Path(source)
    if path.is_dir() or (not path.exists() and set(source) & set(":,")):
        return False
    return not importers.recognised(source)


def _export_ours(request: _Request, settings: _Settings) -> Manifest:
    from vae_training.checkpoint import load_checkpoint

    from .export import export_checkpoint

    options = request.options
    refuse_misstated(request.source)
    try:
        checkpoint = load_checkpoint(request.source)
    except CheckpointError:
        refuse_weights(request.source)
        raise
    given = [FLAGS[one.name] for one in fields(options) if getattr(options, one.name) != one.default]
    given += ["--likelihood"] if request.likelihood is not None else []
    if given:
        raise InputError(f"{given[0]} is for models from elsewhere; the model.pt {request.source} states it itself")
    spec = checkpoint.input
    if checkpoint.config.is_fully_convolutional:  # trained on crops; pictures of any size become such
        spec = spec._replace(resize="crop")
    examples = _read_examples(request.data, spec, EXAMPLES_LIMIT) if request.data else None
    _read_more(request, settings, spec, checkpoint.config.is_fully_convolutional)
    name = _default_name(checkpoint, request.source) if request.name is None else request.name
    return export_checkpoint(checkpoint, request.target, name=name, examples=examples, **settings)


def _export_imported(request: _Request, settings: _Settings) -> Manifest:
    from .examples import example_spec
    from .export import export_imported
    from .on_data import LEAST_FOR_UNITS

    if settings["golden"] == HELD_OUT:
        raise InputError(
            f"--golden is {HELD_OUT!r}, which only a model.pt has; for {request.source} choose {' or '.join(GOLDEN)}"
        )
    imported = importers.load(request.source, request.origin, request.options)
    limit = IMPORTED_EXAMPLES_FP32 if settings["precisions"] == ["fp32"] else IMPORTED_EXAMPLES
    spec = example_spec(imported)
    if imported.is_free and request.data:
        source = open_inputs(request.data, _of_any_size(spec), pad=True)
        spec = spec if isinstance(source, PictureSource) else example_spec(imported, source.outline())
    examples = _read_examples(request.data, spec, limit) if request.data else None
    _read_more(request, settings, spec, imported.is_free)
    units = None
    if request.data and limit < LEAST_FOR_UNITS and settings["prior"] is None and not request.calibrate:
        few = max(LEAST_FOR_UNITS, min(UNIT_EXAMPLES, UNIT_VALUES // math.prod(spec.example_shape)))
        units = _read_examples(request.data, spec, few)
    return export_imported(
        imported,
        request.target,
        name=request.name,
        likelihood=request.likelihood,
        examples=examples,
        unit_examples=units,
        **settings,
    )


def _default_output(source: str) -> Path:
    """`digits/model.pt` -> `digits/model.vae`; a folder `models/v1.5` -> `models/v1.5.vae`; `package.module:factory` ->
    `factory.vae`; of two files, `model.vae`."""
    path = Path(source)
    if not source:
        name = ""
    elif path.is_dir():
        path = path.resolve()
        name = path.name
    elif path.exists() or not set(source) & set(":,"):
        name = path.stem
    else:
        first, comma, _ = source.partition(",")
        path = Path(first) if comma else Path(source.rpartition(":")[2])
        name = "model" if comma else path.name
    if not name:
        raise InputError(f"SOURCE is {source!r}, which gives the bundle no name; pass --output")
    return path.with_name(f"{name}.vae")


def _read_more(request: _Request, settings: _Settings, spec: InputSpec, is_free: bool) -> None:
    """Read what --prior and --calibrate need, of which more helps, unlike for verifying."""
    limit = max(1, min(MOST_EXAMPLES, MOST_VALUES // math.prod(spec.example_shape)))
    if settings["prior"] is not None and request.data:
        settings["prior_examples"] = _read_examples(request.data, spec, limit)
    if HELD_OUT in request.calibrate:
        if others := len(request.calibrate) - 1:
            raise InputError(f"--calibrate has {HELD_OUT!r} and {others} other(s); give one or the other")
        settings["calibrate"] = HELD_OUT
    elif request.calibrate and is_free:
        settings["calibrate"] = _open_in_their_own_size(request.calibrate, spec)
    elif request.calibrate:
        settings["calibrate"] = _read_examples(request.calibrate, spec, limit)


def _read_examples(data: tuple[str, ...], spec: InputSpec, limit: int) -> np.ndarray:
    """At most `limit`, evenly spaced, in one array."""
    source = open_inputs(data, spec)
    if isinstance(source, PictureSource):
        return next(_thinned(source, limit, spec).batches(limit))
    return np.concatenate(list(_ArrayRows(source, limit).batches(READ_ROWS)))


def _of_any_size(spec: InputSpec) -> InputSpec:
    """Such images at the sizes that they have."""
    channels, height, width = spec.example_shape
    return spec._replace(shape=(channels, None, None), resize="exact", default_size=(height, width))


def _open_in_their_own_size(data: tuple[str, ...], spec: InputSpec) -> PictureSource | _ArrayRows:
    """Images as `vae-run score --pad` will see them: scaled down, they would have more detail in each pixel. They are
    read when they are needed, as there may be more than fit into memory."""
    spec = _of_any_size(spec)
    source = open_inputs(data, spec, pad=True)
    if not isinstance(source, PictureSource):
        rows = _ArrayRows(source, MOST_EXAMPLES)
        for batch in rows.batches(READ_ROWS) if source.dtype != np.uint8 else ():  # of bytes, any value is good
            check_range(batch, spec, [str(source.path)] * len(batch))
        return rows
    pictures = _thinned(source, MOST_EXAMPLES, spec)
    for _ in pictures.sizes():  # a file that is no picture is found before the work
        pass
    return pictures


class _ArrayRows:
    """At most `limit` examples of an array file, evenly spaced, read when they are needed."""

    def __init__(self, source: ArraySource, limit: int) -> None:
        self._source, self._rows = source, _evenly(len(source), limit)
        self._size = max(1, BATCH_VALUES // math.prod(source.shape[1:]))

    @property
    def names(self) -> list[str]:
        return [self._source.names[row] for row in self._rows]

    def __len__(self) -> int:
        return len(self._rows)

    def batches(self, size: int) -> Iterator[np.ndarray]:
        start = 0
        for batch in self._source.batches(min(size, self._size)):
            first, last = np.searchsorted(self._rows, (start, start + len(batch)))
            if first < last:
                yield batch[self._rows[first:last] - start]
            start += len(batch)


def _evenly(count: int, limit: int) -> np.ndarray:
    """At most `limit` of so many rows: the first ones of a sorted file would all be of one kind."""
    taken = min(count, limit)
    return np.arange(taken, dtype=np.int64) * count // taken  # numpy 1 counts in 32 bits on Windows


def _thinned(source: PictureSource, limit: int, spec: InputSpec) -> PictureSource:
    return PictureSource([Path(source.names[row]) for row in _evenly(len(source), limit)], spec)


def _parse_precisions(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in PRECISIONS:
            raise InputError(f"--precision has {name!r}; expected some of {', '.join(PRECISIONS)}, separated by commas")
    return names


def _parse_scores(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",")]


def _report_misses(manifest: Manifest) -> None:
    """Report on stderr which precisions missed the budget; exit with `NEGATIVE_VERDICT` if one was not written."""
    for name, precision in manifest.precisions.items():
        if not precision.within_budget:
            echo_warning(f"{name} misses the budget; it is written and marked, as --keep asks")
    for refusal in manifest.refused.values():
        click.echo(f"Not written: {printable(refusal['reason'])}", err=True)
    if manifest.refused:
        sys.exit(NEGATIVE_VERDICT)


def _default_name(checkpoint: Checkpoint, source: str) -> str:
    dataset = str(checkpoint.dataset.get("dataset") or Path(source).stem)
    return f"{Path(dataset).name}-{checkpoint.config.family}"


def _describe(target: Path, manifest: Manifest) -> str:
    fidelity = manifest.precisions["fp32"].fidelity
    against = reference_name(fidelity["against"])
    inputs = f"{fidelity['examples']} input{'s' * (fidelity['examples'] != 1)}"
    lines = [f"{target}: {manifest.kind} {manifest.name!r}, verified against {against} on {inputs}"]
    lines += [f"  {line}" for line in describe_latent(manifest)]
    lines += [f"  {file:14} {entry.bytes:>10,} bytes" for file, entry in sorted(manifest.files.items())]
    lines += [
        f"  max error of {name.removesuffix('_max_error'):15} {value:.1e}"
        for name, value in fidelity.items()
        if name.endswith("_max_error")
    ]
    lines += [f"  {key}: {describe_quality(one.quality)}" for key, one in manifest.precisions.items() if key != "fp32"]
    if manifest.golden.source != "synthetic":
        count = len(Bundle.open(target).golden()[INPUT])
        lines.append(f"  {GOLDEN_FILE} holds {count} real input{'s' * (count > 1)}; --golden synthetic keeps them out")
    return "\n".join(lines)
