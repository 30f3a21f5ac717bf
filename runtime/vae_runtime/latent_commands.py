"""`vae-run traverse`, `map` and `nearest`: the latent space, seen and searched."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np

from . import sinks
from .arguments import check_count
from .command_inputs import (
    Source,
    batches_with_progress,
    bundle_argument,
    check_latents,
    command_inputs,
    fitting,
    force_option,
    inputs_argument,
    output_option,
    pad_option,
    picture_format_option,
    range_of,
    read_fitting,
)
from .console import Command, engine_options, json_option, print_json, printable
from .errors import BundleError, InputError, KindError, NotInBundleError
from .latent_files import open_latents
from .latent_space import (
    Axes,
    count_units,
    map_rows,
    nearest_latents,
    principal_axes,
    traversal,
    unit_axes,
    unit_moments,
)
from .latents import require_finite, to_decoder_input
from .manifest import Manifest
from .preprocess import Float32, zeros
from .vae import VAE

AXES = ("active", "pca")
_LARGEST = 1e38  # of a range's ends: float32 has hardly more


class _Range(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions of click only
    """ "-3,3" -> (-3.0, 3.0)."""

    name = "LOW,HIGH"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, float]:
        parts = value if isinstance(value, tuple) else value.split(",")
        try:
            low, high = map(float, parts)
            if not (abs(low) < _LARGEST and abs(high) < _LARGEST):
                raise ValueError
        except ValueError:
            self.fail(f"{value!r} is not of the form LOW,HIGH, two finite numbers", param, ctx)
        return low, high


@click.command(cls=Command)
@bundle_argument
@click.argument("one", metavar="INPUT", type=click.Path())
@click.option(
    "--dimension", "dimensions", multiple=True, metavar="D|active", default=("active",), show_default=True,
    help="Number of a unit of the latent space, from 0; may be repeated. active: all that the encoder uses.",
)  # fmt: skip
@click.option(
    "--steps", type=click.IntRange(2, 1000), default=11, show_default=True, metavar="N",
    help="Values of each unit, both ends included.",
)  # fmt: skip
@click.option("--range", "limits", type=_Range(), default="-3,3", show_default=True, help="Of these values.")
@pad_option
@picture_format_option
@output_option
@force_option
@engine_options
def traverse(
    bundle: str,
    one: str,
    dimensions: tuple[str, ...],
    steps: int,
    limits: tuple[float, float],
    pad: bool,
    form: str | None,
    output: str,
    force: bool,
    **engine: Any,
) -> None:
    """See what single units of the latent space do to INPUT, a picture or an example of an array file, FILE.npy#INDEX.

    Each row of the picture is one unit, set to values of a range, the most active unit first.
    """
    with VAE.load(bundle, **engine) as vae:
        spec = vae.manifest.input
        example, size = read_fitting(one, spec, pad)
        latents = _codes(vae, example, [one])
        numbers = _chosen_units(dimensions, vae.manifest)
        values = np.linspace(*limits, steps)
        paths = [traversal(latents, number, values) for number in numbers]
        count = len(numbers) * steps
        shape = (spec.example_shape[0], *size) if size else spec.example_shape
        with sinks.open_sink(output, spec, count, force, steps, shape=shape, form=form, limit=count) as sink:
            for path in paths:
                sink.add(vae.decode(path, size=size if spec.is_free else None), ["#"] * steps)
    rows = ", ".join(map(str, numbers))
    click.echo(f"{output}: {count} examples, {len(numbers)} rows from {values[0]:g} to {values[-1]:g}: units {rows}")


@click.command("map", cls=Command)
@bundle_argument
@inputs_argument
@click.option(
    "--axes", type=click.Choice(AXES),
    help="The two most active units, or principal axes of INPUTS' latents.  [default: with INPUTS pca, else active]",
)  # fmt: skip
@click.option(
    "--steps", type=click.IntRange(2, 100), default=16, show_default=True, metavar="N", help="Points on each side."
)
@pad_option
@picture_format_option
@output_option
@force_option
@engine_options
def draw_map(
    bundle: str,
    inputs: tuple[str, ...],
    axes: str | None,
    steps: int,
    pad: bool,
    form: str | None,
    output: str,
    force: bool,
    **engine: Any,
) -> None:
    """Draw a plane of the latent space: a grid of decoded points, at even quantiles of a normal distribution.

    Without INPUTS the plane is that of the two most active units, from the middle of the prior. With INPUTS it goes
    through the middle of their latents, as wide as these are spread.
    """
    axes = axes or ("pca" if inputs else "active")
    if axes == "pca" and not inputs:
        raise click.UsageError("--axes pca needs INPUTS, whose latents the axes are found from")
    if pad and not inputs:
        raise click.UsageError("--pad needs INPUTS, which it pads")
    with VAE.load(bundle, **engine) as vae:
        spec = vae.manifest.input
        shape = whole = spec.example_shape
        if math.prod(vae.manifest.latent_shape(whole)) < 2:
            raise InputError(f"{vae.manifest.name} has 1 unit in its latent space; a map takes 2")
        if inputs:
            with command_inputs(vae, inputs, False, pad) as source:
                shape, whole = source.example_shape(), source.example_shape(spec.multiple_of)
                plane, legend = _plane_of_inputs(vae, source, axes, pad)
        else:
            plane, legend = _plane_of_prior(vae.manifest)
        rows = map_rows(plane, vae.manifest.latent_shape(whole), steps)
        size = (shape[1], shape[2]) if spec.is_free else None
        with sinks.open_sink(output, spec, steps**2, force, steps, shape=shape, form=form, limit=steps**2) as sink:
            for row in rows:
                sink.add(vae.decode(row, size=size), ["#"] * steps)
    click.echo(f"{output}: {steps**2} examples; {legend}")


@click.command(cls=Command)
@bundle_argument
@click.argument("query", type=click.Path())
@click.option("--references", multiple=True, type=click.Path(), metavar="FILES", help="As INPUTS; may be repeated.")
@click.option("--encoded", type=click.Path(), metavar="LATENTS", help="Instead: what vae-run encode made of them.")
@click.option("-k", default=5, show_default=True, help="How many of the nearest.")
@json_option
@pad_option
@engine_options
def nearest(
    bundle: str,
    query: str,
    references: tuple[str, ...],
    encoded: str | None,
    k: int,
    as_json: bool,
    pad: bool,
    **engine: Any,
) -> None:
    """Find the examples that are most like each of QUERY: by the distance of their latents.

    QUERY is a picture, a folder of pictures, an array file, or one example of it, FILE.npy#INDEX.
    """
    if bool(references) == bool(encoded):
        raise click.UsageError("give either --references or --encoded")
    check_count(k, "k")
    with VAE.load(bundle, **engine) as vae:
        latents, names = _read_encoded(vae, encoded) if encoded else _encode_all(vae, references, pad)
        found = _search(_encoded_query(vae, query, pad), latents, names, k)
        if as_json:
            print_json({"references": len(names), "queries": list(found)})
        else:
            for number, one in enumerate(found):
                if not number:
                    click.echo("  distance  rank  query -> reference")
                for rank, other in enumerate(one["nearest"], start=1):
                    pair = printable(f"{one['name']} -> {other['name']}")
                    click.echo(f"{other['distance']:10.4f}  {rank:4}  {pair}")


def _search(
    encoded: Iterable[tuple[Float32, list[str]]], latents: Float32, names: list[str], k: int
) -> Iterator[dict[str, Any]]:
    """Each query with its nearest references, as the JSON document has them."""
    for batch, queries in encoded:
        for name, indices, distances in zip(queries, *nearest_latents(batch, latents, k), strict=True):
            pairs = zip(indices.tolist(), distances.tolist(), strict=True)
            others = [{"index": index, "name": names[index], "distance": distance} for index, distance in pairs]
            yield {"name": name, "nearest": others}


def _encoded_query(vae: VAE, query: str, pad: bool) -> Iterator[tuple[Float32, list[str]]]:
    if "#" in query and not Path(query).exists():
        one, _ = read_fitting(query, vae.manifest.input, pad)
        yield _codes(vae, one, [query]), [query]
        return
    with command_inputs(vae, (query,), False, pad) as source:
        yield from _encoded(vae, source, pad, "searching")


def _encoded(vae: VAE, source: Source, pad: bool, label: str = "encoding") -> Iterator[tuple[Float32, list[str]]]:
    """Latents batch by batch, with their names."""
    spec = vae.manifest.input
    for batch, names, _ in batches_with_progress(source, label, None, spec):
        yield _codes(vae, fitting(batch, spec, names, pad)[0], names), names


def _codes(vae: VAE, examples: Any, names: list[str]) -> Float32:
    return require_finite(vae.encode(examples).mode(), names)


def _of_one_shape(batches: Iterable[tuple[Float32, list[str]]]) -> Iterator[Float32]:
    shape = None
    for latents, names in batches:
        shape = shape or latents.shape[1:]
        if latents.shape[1:] != shape:
            raise InputError(f"{names[0]} has a latent of shape {latents.shape[1:]}, and those before {shape}")
        yield latents


def _encode_all(vae: VAE, references: tuple[str, ...], pad: bool) -> tuple[Float32, list[str]]:
    with command_inputs(vae, references, False, pad) as source:
        return _together(_encoded(vae, source, pad), len(source)), source.names


def _read_encoded(vae: VAE, path: str) -> tuple[Float32, list[str]]:
    files, shape = open_latents(path), vae.manifest.latent.shape
    for file in files:
        check_latents(file, vae.manifest)
    batches = (
        (to_decoder_input(batch, shape, range_of(names), names), names)
        for file in files
        for batch, names, _ in batches_with_progress(file, "reading", None, vae.manifest.input)
    )
    return _together(batches, sum(map(len, files))), [name for file in files for name in file.names]


def _together(batches: Iterable[tuple[Float32, list[str]]], count: int) -> Float32:
    """All latents in one array."""
    whole, start = np.empty(0, np.float32), 0
    for latents in _of_one_shape(batches):
        if not start:
            whole = zeros((count, *latents.shape[1:]), "an array of latents")
        whole[start : start + len(latents)] = latents
        start += len(latents)
    return whole


def _active_units(manifest: Manifest, otherwise: str) -> list[int]:
    """The active units, the most active first. otherwise: what to do where the bundle does not say."""
    units, count = manifest.latent.active_units, count_units(manifest.latent.shape)
    if units is None:
        raise NotInBundleError(
            f"{manifest.name} does not say which units of its latent space are active; make the bundle again with 32"
            f" real inputs or more: vae-export SOURCE --data DATA, or {otherwise}"
        )
    if len(units.variances) != count:
        raise BundleError(
            f"latent.active_units.variances has {len(units.variances)} numbers; the latent has {count} units"
        )
    active = [unit for unit in range(count) if units.variances[unit] > units.threshold]
    return sorted(active, key=lambda unit: -units.variances[unit])


def _chosen_units(dimensions: tuple[str, ...], manifest: Manifest) -> list[int]:
    """What --dimension says, as numbers."""
    numbers: list[int] = []
    for word in dimensions:
        if word == "active":
            numbers += _active_units(manifest, "name units: --dimension 0")
        elif word.isdecimal():
            numbers.append(int(word))
        else:
            raise InputError(f"--dimension is {word!r}; expected the number of a unit, from 0, or 'active'")
    if not numbers:
        raise InputError(f"{manifest.name} has no active unit; name units: --dimension 0")
    return list(dict.fromkeys(numbers))


def _plane_of_prior(manifest: Manifest) -> tuple[Axes, str]:
    if manifest.latent.prior is None:
        raise KindError(
            f"{manifest.name} is a plain autoencoder, which has no prior to map; give INPUTS, whose latents are mapped"
        )
    active = _active_units(manifest, "give INPUTS with --axes pca")
    if len(active) < 2:
        found = "1 active unit" if len(active) == 1 else f"{len(active)} active units"
        raise InputError(f"{manifest.name} has {found}; a map takes 2, or INPUTS with --axes pca")
    shape = manifest.latent_shape(manifest.input.example_shape)
    units = count_units(shape)
    axes = unit_axes(shape, active[:2], np.zeros(units), np.ones(units))
    return axes, f"to the right unit {active[0]}, upwards unit {active[1]}"


def _plane_of_inputs(vae: VAE, source: Source, kind: str, pad: bool) -> tuple[Axes, str]:
    latents = _of_one_shape(_encoded(vae, source, pad))
    if kind == "pca":
        axes = principal_axes(latents)
        right, up = axes.parts
        return axes, f"to the right {right:.1%} of the variance of {len(source)} latents, upwards {up:.1%}"
    means, variances = unit_moments(latents)
    numbers = [int(unit) for unit in np.argsort(-variances, kind="stable")[:2]]
    if len(numbers) < 2:
        raise InputError(f"{vae.manifest.name} has 1 unit in its latent space; a map takes 2, or --axes pca")
    shape = vae.manifest.latent_shape(source.example_shape(vae.manifest.input.multiple_of))
    right, up = numbers
    return unit_axes(shape, numbers, means, variances), f"to the right unit {right}, upwards unit {up}"
