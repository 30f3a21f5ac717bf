"""`vae-run score` and `evaluate`: how anomalous inputs look to a model, and how well that finds anomalies."""

from __future__ import annotations

import contextlib
import csv
import io
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
from numpy.typing import NDArray

from . import sinks
from .atomic import atomic_file, refuse_other_file
from .calibration import SCORE_METHODS
from .command_inputs import (
    Source,
    batches_with_progress,
    bundle_argument,
    command_inputs,
    force_option,
    golden_option,
    inputs_argument,
    pad_option,
    range_of,
    require_fitting,
    tile_option,
)
from .console import (
    NEGATIVE_VERDICT,
    Command,
    echo_warning,
    engine_options,
    json_option,
    json_text,
    print_json,
    printable,
)
from .detection import auroc, average_precision, check_labels
from .errors import InputError, OutputError
from .images import overlay
from .labels import read_labels
from .latents import require_finite
from .manifest import InputSpec
from .preprocess import Float32, Float64, to_model_input
from .scoring import default_method, score_methods
from .sources import ARRAY_SUFFIXES, PictureSource
from .vae import VAE

_SMALLEST = float(np.finfo(np.float32).tiny)
SATURATION = 0.995  # the part of an image's pixels that the colours of a map have to tell apart


class _Inputs(NamedTuple):
    """Examples, and how the model is to go through them. tile: the side of a window, None: as a whole."""

    vae: VAE
    source: Source
    pad: bool = False
    tile: int | None = None

    def batches(self, label: str, warn: bool = True) -> Iterator[tuple[Any, list[str], dict[str, Any]]]:
        """Examples that are checked, their names, and what `VAE.score` is to be called with."""
        spec = self.vae.manifest.input
        for batch, names, options in batches_with_progress(self.source, label, self.tile, spec, warn=warn):
            require_fitting(batch, spec, names, self.pad)
            yield batch, names, {**options, "pad": self.pad}

    def images(self, batch: Any, names: list[str]) -> Float32:
        """As a sink takes them, without padding."""
        spec = self.vae.manifest.input
        return to_model_input(batch, spec._replace(multiple_of=1) if self.pad else spec, range_of(names))

    def maps(self, batch: Any, names: list[str], **options: Any) -> Float32:
        options = {"pad": self.pad, "tile": self.tile, **options}
        return require_finite(self.vae.score_map(batch, **options), names, "map")


def _why_not_comparable(source: Source, spec: InputSpec) -> str | None:
    """Of the scores that add up over the pixels, of images of different sizes."""
    if not spec.is_free or not isinstance(source, PictureSource):
        return None
    sizes = list(source.sizes())
    other = next((index for index, size in enumerate(sizes) if size != sizes[0]), None)
    if other is None:
        return None
    return (
        f"{printable(source.names[other])} has (height, width) {sizes[other]}, and {printable(source.names[0])}"
        f" {sizes[0]}; scores in nats add up over the pixels and compare between images of one size only: take --method"
        " reconstruction"
    )


class _Scored(NamedTuple):
    """Inputs by name with their scores. threshold: above which they are anomalies; None where none was asked for."""

    names: list[str]
    scores: Float64
    method: str
    quantile: float | None
    threshold: float | None

    @property
    def anomalies(self) -> NDArray[np.bool_] | None:
        return None if self.threshold is None else self.scores > self.threshold

    def rows(self) -> Iterator[dict[str, Any]]:
        anomalies = self.anomalies
        for index, (name, score) in enumerate(zip(self.names, self.scores.tolist(), strict=True)):
            verdict = {} if anomalies is None else {"threshold": self.threshold, "anomaly": bool(anomalies[index])}
            yield {"name": name, "score": score, **verdict}

    def to_json(self) -> dict[str, Any]:
        scores = [{**row, "score": row["score"] if math.isfinite(row["score"]) else None} for row in self.rows()]
        document: dict[str, Any] = {"method": self.method, "scores": scores}
        if (anomalies := self.anomalies) is not None:
            document |= {"quantile": self.quantile, "threshold": self.threshold, "anomalies": int(anomalies.sum())}
        return document

    def to_csv(self) -> str:
        text = io.StringIO()
        names = ["name", "score"] + ([] if self.threshold is None else ["threshold", "anomaly"])
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        for row in self.rows():
            writer.writerow({**row, **({"anomaly": int(row["anomaly"])} if "anomaly" in row else {})})
        return text.getvalue()

    def to_text(self) -> str:
        lines = [f"{'score':>12}  {'' if self.threshold is None else 'anomaly  '}name"]
        for row in self.rows():
            verdict = "" if self.threshold is None else f"{'yes' if row['anomaly'] else 'no':7}  "
            lines.append(f"{row['score']:12.6g}  {verdict}{row['name']}")
        return printable("\n".join([*lines, self.summary()]))

    def summary(self) -> str:
        low, high = self.scores.min(), self.scores.max()
        text = f"{len(self.names)} examples by {self.method}, scores from {low:.6g} to {high:.6g}"
        if (anomalies := self.anomalies) is None:
            return text
        return f"{text}; {anomalies.sum()} above {self.threshold:.6g}, the threshold of quantile {self.quantile:g}"


@click.command(cls=Command)
@bundle_argument
@inputs_argument
@golden_option
@click.option("--method", type=click.Choice(SCORE_METHODS), help="How.  [default: what suits the bundle]")
@click.option(
    "--quantile", type=float, metavar="Q",
    help="Compare with the score that a part Q of the data which the bundle was calibrated on did not exceed: 0.99"
    " calls about one in a hundred good ones an anomaly.",
)  # fmt: skip
@click.option("--fail", is_flag=True, help="With --quantile: exit code 3 if there is an anomaly.")
@click.option(
    "--maps", type=click.Path(),
    help="Show the squared error of each pixel, in red over the image: a folder with a picture each, or one picture; in"
    " .npy and .npz the maps themselves.",
)  # fmt: skip
@click.option(
    "--map-scale", type=float, metavar="ERROR",
    help="The squared error that is full red.  [default: one for all these images, by the largest errors in them]",
)  # fmt: skip
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV.")
@json_option
@click.option("--output", type=click.Path(), help="Write to this file, .csv or .json, in place of printing.")
@force_option
@pad_option
@tile_option
@engine_options
@click.pass_context
def score(
    ctx: click.Context,
    /,
    bundle: str,
    inputs: tuple[str, ...],
    golden: bool,
    method: str | None,
    quantile: float | None,
    fail: bool,
    maps: str | None,
    map_scale: float | None,
    as_csv: bool,
    as_json: bool,
    output: str | None,
    force: bool,
    pad: bool,
    tile: int | None,
    **engine: Any,
) -> None:
    """Score how little INPUTS look like the data that the model knows; higher is more anomalous.

    Scores of elbo and log_likelihood are in nats and summed over the pixels, those of reconstruction a mean squared
    error. Only scores of one bundle and one method can be compared, and, but for reconstruction, of one size.
    """
    if as_csv and as_json:
        raise click.UsageError("give either --csv or --json")
    if output is not None and (as_csv or as_json):
        raise click.UsageError("--csv and --json say how to print; what --output writes, its suffix says")
    if fail and quantile is None:
        raise click.UsageError("--fail needs --quantile, which says what an anomaly is")
    _check_outputs(output, maps, map_scale, force)
    with VAE.load(bundle, **engine) as vae, command_inputs(vae, inputs, golden, pad) as source:
        chosen = method or default_method(vae.manifest)
        threshold = None if quantile is None else vae.threshold(quantile, chosen, tile=tile)
        doubt = None if chosen == "reconstruction" else _why_not_comparable(source, vae.manifest.input)
        scores, examples = [], _Inputs(vae, source, pad, tile)
        with _open_maps(examples, maps, map_scale, force) as (show, said):
            for batch, names, options in examples.batches("scoring"):
                scores.append(vae.score(batch, chosen, **options))
                show(batch, names)
    found = _Scored(list(source.names), np.concatenate(scores), chosen, quantile, threshold)
    if output is not None:
        _write(Path(output), found, force)
        click.echo(f"{output}: {found.summary()}")
    elif as_json:
        print_json(found.to_json())
    else:
        click.echo(found.to_csv() if as_csv else found.to_text(), nl=not as_csv)
    if said is not None:
        click.echo(said, err=as_json or as_csv)
    if doubt is not None:
        echo_warning(doubt)
    anomalies = found.anomalies
    ctx.exit(NEGATIVE_VERDICT if fail and anomalies is not None and anomalies.any() else 0)


@click.command(cls=Command)
@bundle_argument
@inputs_argument
@click.option(
    "--labels", required=True, type=click.Path(),
    help="One for each input, in their order: .npy, .npz, .csv (its column `label`, or its only one; a column `name` is"
    " held to the order of the inputs) or .txt (a line each).",
)  # fmt: skip
@click.option(
    "--anomaly-label", "anomaly_labels", multiple=True, metavar="LABEL",
    help="Which label is an anomaly, all others are none; may be repeated.  [default: labels are 1 for an anomaly, 0"
    " for none]",
)  # fmt: skip
@click.option(
    "--method", type=click.Choice((*SCORE_METHODS, "all")), default="all", show_default=True,
    help="Which scores; all: those that can be compared between these images, and made with these options.",
)  # fmt: skip
@json_option
@pad_option
@tile_option
@engine_options
def evaluate(
    bundle: str,
    inputs: tuple[str, ...],
    labels: str,
    anomaly_labels: tuple[str, ...],
    method: str,
    as_json: bool,
    pad: bool,
    tile: int | None,
    **engine: Any,
) -> None:
    """Tell how well scores find the anomalies among INPUTS that are labelled.

    AUROC is the chance that an anomaly has a higher score than what is none (0.5: by chance); average precision the
    area under the precision-recall curve (by chance: the share of anomalies).
    """
    with VAE.load(bundle, **engine) as vae, command_inputs(vae, inputs, False, pad) as source:
        methods = score_methods(vae.manifest, not pad and tile is None) if method == "all" else (method,)
        doubt = None if methods == ("reconstruction",) else _why_not_comparable(source, vae.manifest.input)
        if doubt is not None and method != "all":
            raise InputError(doubt)
        methods = methods if doubt is None else ("reconstruction",)
        is_anomaly = check_labels(read_labels(labels, anomaly_labels, source.names), len(source), labels)
        parts: dict[str, list[Float64]] = {name: [] for name in methods}
        for batch, _, options in _Inputs(vae, source, pad, tile).batches("scoring"):
            for name in methods:
                parts[name].append(vae.score(batch, name, **options))
    scores = {name: np.concatenate(found) for name, found in parts.items()}
    results = {
        name: {"auroc": auroc(found, is_anomaly), "average_precision": average_precision(found, is_anomaly)}
        for name, found in scores.items()
    }
    counts = {"anomalies": int(is_anomaly.sum()), "others": int((~is_anomaly).sum())}
    if as_json:
        print_json({**counts, "methods": results})
        return
    click.echo(f"{'method':14}  {'AUROC':>7}  average precision")
    for name, figures in results.items():
        click.echo(f"{name:14}  {figures['auroc']:7.4f}  {figures['average_precision']:17.4f}")
    click.echo(f"{counts['anomalies']} anomalies, {counts['others']} others")


def _check_outputs(output: str | None, maps: str | None, map_scale: float | None, force: bool) -> None:
    """What cannot be written is said before anything is computed."""
    if output is not None:
        if Path(output).suffix.lower() not in (".csv", ".json"):
            raise InputError(f"--output is {output!r}; expected the name of a .csv or .json file")
        if not Path(output).parent.is_dir():
            raise OutputError(f"{output} cannot be written: there is no folder {Path(output).parent}")
        refuse_other_file(output, force)
    if map_scale is not None and not (maps is not None and 0 < map_scale < math.inf):
        raise InputError(f"--map-scale is {map_scale}; expected a finite number above 0, with --maps")
    if map_scale is not None and maps is not None and Path(maps).suffix.lower() in ARRAY_SUFFIXES:
        raise InputError(f"--map-scale is for pictures; {maps} holds the errors themselves")


def _write(path: Path, found: _Scored, replace: bool) -> None:
    text = found.to_csv() if path.suffix.lower() == ".csv" else json_text(found.to_json()) + "\n"
    with atomic_file(path, replace=replace) as stream:
        stream.write(text.encode(errors="surrogateescape"))  # names of files may be any bytes


@contextlib.contextmanager
def _open_maps(
    examples: _Inputs, output: str | None, scale: float | None, force: bool
) -> Iterator[tuple[Callable[[Any, list[str]], None], str | None]]:
    """What to call with each batch and its names, and what becomes of it in words; the output appears when the block
    ends well, or not at all."""
    spec, source = examples.vae.manifest.input, examples.source
    if output is None:
        yield (lambda batch, names: None), None
    elif Path(output).suffix.lower() in ARRAY_SUFFIXES:
        refuse_other_file(output, force)
        shape = source.example_shape()[1 if spec.is_image else 0 :]
        with sinks.ArrayWriter(Path(output), {"map": (len(source), *shape)}, replace=force) as writer:

            def append(batch: Any, names: list[str]) -> None:
                maps = examples.maps(batch, names)
                if maps.shape[1:] != shape:
                    raise sinks.different_sizes(names[0], maps.shape[1:], shape)
                writer.append(map=maps)

            yield append, f"{output}: the squared error of each {'pixel' if spec.is_image else 'element'}"
    else:
        with sinks.open_sink(output, spec, len(source), force) as sink:
            if scale is None:
                found = examples.batches("finding a scale", warn=False)
                scale = max([_largest(examples.maps(batch, names, **options)) for batch, names, options in found])
            full = max(scale, _SMALLEST)

            def show(batch: Any, names: list[str]) -> None:
                images = examples.images(batch, names)
                shown = overlay(images, examples.maps(batch, names) / full)
                sink.add(shown, names, np.broadcast_to(images, shown.shape))

            count = min(len(source), sinks.GRID_LIMIT) if Path(output).suffix else len(source)
            first = f", in the first {count} of {len(source)}" if count < len(source) else ""
            yield show, f"{output}: full red is a squared error of {scale:.3g} and more{first}"


def _largest(maps: Float32) -> float:
    """Of the errors in these images, but for the few largest pixels of each."""
    return float(np.quantile(maps.reshape(len(maps), -1), SATURATION, axis=1).max())
