"""`vae-run`: use a bundle from the command line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click
import numpy as np

from . import sinks, sources
from .bundle import Bundle
from .codec import CODECS
from .command_inputs import (
    batches_with_progress,
    bundle_argument,
    check_latents,
    command_inputs,
    fitting,
    force_option,
    golden_option,
    inputs_argument,
    output_option,
    pad_option,
    picture_format_option,
    range_of,
    require_paddable,
    shape_before_cut,
    tile_option,
)
from .console import (
    NEGATIVE_VERDICT,
    Group,
    Sides,
    describe_latent,
    describe_quality,
    engine_options,
    json_option,
    print_json,
    printable,
)
from .cuda import driver_version, find_gpus
from .devices import usable_devices
from .engine import engine_clash, import_engine
from .errors import DeviceError, MissingExtraError
from .interpolation import METHODS
from .latent_commands import draw_map, nearest, traverse
from .latent_files import FORMATS, LatentFile, open_latent_sink, open_latents
from .latents import require_finite, to_decoder_input
from .manifest import INPUT, HalfTiling, InputSpec, Manifest
from .plan import OPERATIONS
from .preprocess import to_model_input
from .prior import PRIORS
from .score_commands import evaluate, score
from .tune import DEFAULT_SECONDS
from .tune import describe as describe_candidate
from .tune import tune as run_tune
from .tuning import Measured, choose
from .vae import VAE
from .version import __version__

STRIP = 32  # steps of an interpolation in one row of a picture


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="vae-run")
def main() -> None:
    """Encode, sample and decode with a bundle, without torch.

    INPUTS are pictures, folders of pictures, or one .npy or .npz file. An output that ends in .png, .jpg or .webp
    becomes one picture, in .npy or .npz an array; without a suffix it becomes a folder with one picture per example.
    """


@main.command()
@bundle_argument
@json_option
def info(bundle: str, as_json: bool) -> None:
    """Show what a bundle is and what this machine can run it on. Every file is checked."""
    opened = Bundle.open(bundle)
    for file in opened.manifest.files:
        opened.verify(file)
    engine = _engine_facts()
    if as_json:
        print_json({"manifest": opened.manifest.to_dict(), "engine": engine})
    else:
        click.echo(printable(_describe(opened.manifest, engine)))


@main.command()
@bundle_argument
@engine_options
@click.option(
    "--batch", "batches", multiple=True, type=int, metavar="N",
    help="Warm up for calls of N examples first; what GPUs and OpenVINO prepare for them is tested too. Repeatable.",
)  # fmt: skip
@json_option
@click.pass_context
def selftest(ctx: click.Context, /, bundle: str, batches: tuple[int, ...], as_json: bool, **engine: Any) -> None:
    """Run the golden inputs here and compare with the reference. Exit code 3 if they differ."""
    with VAE.load(bundle, **engine) as vae:
        if batches:
            shape = vae.golden()[INPUT].shape
            vae.warmup(batches, (shape[2], shape[3]) if vae.manifest.input.is_free else None)
        result = vae.selftest()
    if as_json:
        routes = [
            {**route._asdict(), "errors": _finite(route.errors), "passed": route.passed} for route in result.routes
        ]
        together = {"errors": _finite(result.errors), "tolerance": result.tolerance, "passed": result.passed}
        print_json({**result._asdict(), "routes": routes, **together})
    else:
        for route in result.routes:
            for name, error in route.errors.items():
                where = f"{route.precision} on {route.device}"
                click.echo(f"{name:15} error {error:.1e}   tolerance {route.tolerance:.1e}   {where}")
        click.echo(f"{'passed' if result.passed else 'FAILED'} on {result.device} in {result.precision}")
    ctx.exit(0 if result.passed else NEGATIVE_VERDICT)


@main.command()
@bundle_argument
@click.option(
    "--device", "devices", multiple=True, help="Measure this device only; may be repeated.  [default: all usable]"
)
@click.option("--seconds", default=DEFAULT_SECONDS, show_default=True, help="For everything, about.")
@json_option
def tune(bundle: str, devices: tuple[str, ...], seconds: float, as_json: bool) -> None:
    """Measure what runs a bundle fastest on this machine, for --device auto and --precision auto.

    The result is kept in the user's cache folder, for this bundle, machine and these engine versions.
    """
    file, measured = run_tune(bundle, devices or None, seconds, lambda line: click.echo(line, err=True))
    if as_json:
        print_json({"file": str(file), "measured": [entry.to_dict() for entry in measured]})
    else:
        click.echo(_describe_tuning(measured))
        click.echo(f"kept in {file}")


@main.command()
@bundle_argument
@inputs_argument
@golden_option
@pad_option
@tile_option
@click.option(
    "--codec", type=click.Choice(CODECS), default="none", show_default=True,
    help="uint8: the mean alone, in 8 bits per value; `info` tells what that costs.",
)  # fmt: skip
@click.option("--format", "form", type=click.Choice(FORMATS), help="Of the files in a folder.  [default: npz]")
@output_option
@force_option
@engine_options
def encode(
    bundle: str,
    inputs: tuple[str, ...],
    golden: bool,
    pad: bool,
    tile: int | None,
    codec: str,
    form: str | None,
    output: str,
    force: bool,
    **engine: Any,
) -> None:
    """Write mean and logvar (for an autoencoder: mean, its code), with names and sizes, as decode reads them.

    OUTPUT is an .npz or .safetensors file, or without a suffix a folder with one file per input.
    """
    with VAE.load(bundle, **engine) as vae, command_inputs(vae, inputs, golden, pad) as source:
        manifest, count, pixels = vae.manifest, len(source), 0
        shape = source.example_shape(manifest.input.multiple_of)
        with open_latent_sink(output, manifest, count, shape, codec, form, force) as sink:
            for batch, names, options in batches_with_progress(source, "encoding", tile, manifest.input):
                images, size = fitting(batch, manifest.input, names, pad)
                posterior = vae.encode(images, **options)
                require_finite(posterior.mean, names)
                sink.add(posterior, names, size)
                pixels += len(batch) * (size[0] * size[1] if size else 0)
    rate = f", {8 * sink.bytes_written / pixels:.2f} bits per pixel" if pixels else ""
    click.echo(f"{output}: {count} examples, {sink.bytes_written:,} bytes{rate}")


@main.command()
@bundle_argument
@click.argument("latents", type=click.Path())
@tile_option
@picture_format_option
@output_option
@force_option
@engine_options
def decode(
    bundle: str, latents: str, tile: int | None, form: str | None, output: str, force: bool, **engine: Any
) -> None:
    """Decode latents from an .npy, .npz (there `z`, else `mean`) or .safetensors file, or a folder of such files."""
    with VAE.load(bundle, **engine) as vae:
        files, spec = open_latents(latents), vae.manifest.input
        for file in files:
            check_latents(file, vae.manifest)
        count = sum(map(len, files))
        with sinks.open_sink(output, spec, count, force, shape=_decoded_shape(files[0], spec), form=form) as sink:
            for file in files:
                for batch, names, options in batches_with_progress(file, "decoding", tile, spec, sink.room):
                    z = to_decoder_input(batch, vae.manifest.latent.shape, range_of(names), names)
                    sink.add(vae.decode(z, size=file.size if spec.is_free else None, **options), names)
    _report(count, output, sink.written)


@main.command()
@bundle_argument
@click.option("--count", "-n", default=64, show_default=True, help="How many.")
@click.option("--seed", type=int, default=0, show_default=True, help="The same seed gives the same examples.")
@click.option("--temperature", default=1.0, show_default=True, help="Factor on the noise.")
@click.option(
    "--prior", type=click.Choice(PRIORS),
    help="Draw from N(0, 1), or from what vae-export --prior fitted.  [default: standard; of an autoencoder: fitted]",
)  # fmt: skip
@click.option("--truncation", type=float, help="Draw numbers of the noise that are farther from 0 than this again.")
@click.option("--size", type=Sides(), help="HEIGHTxWIDTH, where the bundle leaves it free.  [default: the bundle's]")
@picture_format_option
@output_option
@force_option
@engine_options
def sample(
    bundle: str,
    count: int,
    seed: int,
    temperature: float,
    prior: str | None,
    truncation: float | None,
    size: tuple[int, int] | None,
    form: str | None,
    output: str,
    force: bool,
    **engine: Any,
) -> None:
    """Draw new examples from the prior."""
    with VAE.load(bundle, **engine) as vae:
        spec = vae.manifest.input
        batches = vae.sample_batches(count, seed, temperature, prior=prior, truncation=truncation, size=size)
        shape = spec.example_shape if size is None else (spec.example_shape[0], *size)
        with sinks.open_sink(output, spec, count, force, shape=shape, form=form) as sink:
            for batch in batches:
                sink.add(batch, ["#"] * len(batch))
                if sink.room == 0:
                    break
    _report(count, output, sink.written)


@main.command()
@bundle_argument
@inputs_argument
@golden_option
@pad_option
@tile_option
@picture_format_option
@output_option
@force_option
@engine_options
def reconstruct(
    bundle: str,
    inputs: tuple[str, ...],
    golden: bool,
    pad: bool,
    tile: int | None,
    form: str | None,
    output: str,
    force: bool,
    **engine: Any,
) -> None:
    """Encode and decode; one picture shows rows of originals above rows of their reconstructions."""
    with VAE.load(bundle, **engine) as vae, command_inputs(vae, inputs, golden, pad) as source:
        spec = vae.manifest.input
        with sinks.open_sink(output, spec, len(source), force, shape=source.example_shape(), form=form) as sink:
            for batch, names, options in batches_with_progress(source, "reconstructing", tile, spec, sink.room):
                images, size = fitting(batch, spec, names, pad)
                pair = vae.reconstruct(images, **options), to_model_input(images, spec, range_of(names))
                height, width = size or (None, None)
                found, originals = (one[..., :height, :width] for one in pair)
                sink.add(found, names, originals)
    _report(len(source), output, sink.written)


@main.command()
@bundle_argument
@click.argument("a", type=click.Path())
@click.argument("b", type=click.Path())
@click.option("--steps", default=8, show_default=True, help="Points on the path, both ends included.")
@click.option("--method", type=click.Choice(METHODS), default="spherical", show_default=True)
@pad_option
@picture_format_option
@output_option
@force_option
@engine_options
def interpolate(
    bundle: str,
    a: str,
    b: str,
    steps: int,
    method: str,
    pad: bool,
    form: str | None,
    output: str,
    force: bool,
    **engine: Any,
) -> None:
    """Walk through the latent space from A to B, each a picture or an example of an array file, FILE.npy#INDEX."""
    with VAE.load(bundle, **engine) as vae:
        spec = vae.manifest.input
        require_paddable(spec, pad)
        start, end = (sources.read_one(one, spec, pad) for one in (a, b))
        path = vae.interpolate(start, end, steps, method, pad=pad)
        shape, columns = path.shape[1:], min(steps, STRIP)
        with sinks.open_sink(output, spec, steps, force, columns, shape=shape, form=form) as sink:
            sink.add(path, ["#"] * steps)
    _report(steps, output, sink.written)


for command in (traverse, draw_map, nearest, score, evaluate):
    main.add_command(command)


def _decoded_shape(file: LatentFile, spec: InputSpec) -> tuple[int, ...]:
    """Of the first result."""
    if not spec.is_free:
        return spec.example_shape
    shape = shape_before_cut(file, spec)
    return shape if file.size is None else (shape[0], *file.size)


def _report(count: int, output: str, written: int) -> None:
    if written < count:
        click.echo(f"{output} shows the first {written} of {count}; name an .npz file or a folder for all", err=True)
    click.echo(f"{output}: {written} examples")


def _engine_facts() -> dict[str, Any]:
    """What `info` says of this machine. gpus: as the driver shows them, usable or not."""
    gpus = [gpu._asdict() for gpu in find_gpus()[0]]
    facts: dict[str, Any] = {"onnxruntime": None, "clash": None, "driver": driver_version(), "gpus": gpus}
    try:
        facts |= {"onnxruntime": import_engine().__version__, "clash": engine_clash(), "devices": usable_devices()}
    except (MissingExtraError, DeviceError) as error:
        facts["devices"] = {"cpu": str(error)}
    return facts


def _finite(errors: dict[str, float]) -> dict[str, float | None]:
    return {name: error if np.isfinite(error) else None for name, error in errors.items()}


def _describe(manifest: Manifest, engine: dict[str, Any]) -> str:
    data = manifest.to_dict()
    lines = [
        f"{manifest.name}, {'an autoencoder' if manifest.kind == 'autoencoder' else 'a variational autoencoder'}",
        f"  input       {_pairs(data['input'])}",
        f"  latent      {_latent_pairs(data['latent'], manifest.input.multiple_of)}",
        f"  likelihood  {_pairs(data['likelihood'] or {})}",
        f"  trained on  {_pairs({k: v for k, v in manifest.training.items() if not isinstance(v, dict)})}",
        f"  made with   {_pairs(manifest.producer)}",
        f"  golden      {manifest.golden.source} inputs",
    ]
    if manifest.origin:
        lines.append(f"  from        {_pairs(manifest.origin)}")
    lines += [f"  {'' if index else 'on data':11} {line}" for index, line in enumerate(describe_latent(manifest))]
    if manifest.tiling is not None:
        lines += [
            f"  tiles       to {name}: {_describe_tiles(half)}"
            for name, half in (("encode", manifest.tiling.encoder), ("decode", manifest.tiling.decoder))
        ]
    for name, precision in manifest.precisions.items():
        for half, file in (("encoder", precision.encoder), ("decoder", precision.decoder)):
            lines.append(f"  {name:11} {half}  {file}  {manifest.files[file].bytes:,} bytes")
        lines.append(f"  {'':11} fidelity {_pairs(precision.fidelity)}")
        if precision.quality:
            lines.append(f"  {'':11} {describe_quality(precision.quality)}")
    for file, other in manifest.on_cuda.items():
        lines.append(f"  {'on CUDA':11} {file} is run as {other}  {manifest.files[other].bytes:,} bytes")
    for name, refusal in manifest.refused.items():
        lines.append(f"  {name:11} not there: {refusal['reason']}")
    for name, cost in manifest.latent_codecs.items():
        lines.append(
            f"  latents     in {name}: {cost['bits_per_pixel']:.3g} bits per pixel, costs {cost['psnr_lost_db']:.3g} dB"
            f" of {cost['psnr_db'] + cost['psnr_lost_db']:.2f} dB PSNR on {cost['examples']:.0f} examples"
        )
    lines.append(f"onnxruntime {engine['onnxruntime'] or 'cannot be used'}")
    if engine["clash"]:
        lines.append(f"  {'WARNING':11} {engine['clash']}")
    for index, gpu in enumerate(engine["gpus"]):
        lines.append(
            f"  {f'GPU {index}':11} {gpu['name']}, {gpu['memory_bytes'] / 2**30:.0f} GiB, compute capability"
            f" {gpu['compute_capability']}, driver for CUDA {engine['driver']}"
        )
    for device, reason in engine["devices"].items():
        lines.append(f"  {device:11} {'usable' if reason is None else reason}")
    return "\n".join(lines)


def _latent_pairs(latent: Mapping[str, Any], multiple_of: int) -> str:
    sides = "xHxW" if multiple_of == 1 else f"x(H/{multiple_of})x(W/{multiple_of})"
    return _pairs({key: latent[key] for key in ("shape", "prior")}).replace("xHxW", sides)


def _describe_tiles(half: HalfTiling) -> str:
    if half.context is None:
        return f"an approximation, {half.reason}; off by up to {half.max_error:.2g} with tiles of {half.tile} pixels"
    return f"exact, with a context of {half.context} latent cells"


def _describe_tuning(measured: list[Measured]) -> str:
    """Milliseconds per call of every candidate, and what is taken."""
    cells = [(name, batch) for name in OPERATIONS for batch in sorted({b for m in measured for b in m.seconds[name]})]
    labels = [describe_candidate(entry.candidate) for entry in measured]
    width = max(map(len, labels))
    lines = ["  ".join([f"{'ms per call':{width}}", *(f"{name} {batch:>2}" for name, batch in cells)])]
    for label, entry in zip(labels, measured, strict=True):
        times = [entry.seconds[name].get(batch) for name, batch in cells]
        lines.append("  ".join([f"{label:{width}}", *("        -" if t is None else f"{t * 1e3:9.3f}" for t in times)]))
    for name in OPERATIONS:
        for from_batch, candidate in choose(measured, name, "auto", "auto", None):
            lines.append(f"auto takes for {name} from batch {from_batch:>2}: {describe_candidate(candidate)}")
    return "\n".join(lines)


def _pairs(data: Any) -> str:
    return ", ".join(f"{key} {_value(key, value)}" for key, value in data.items() if value is not None) or "not stated"


def _value(key: str, value: Any) -> str:
    if isinstance(value, dict):
        return "/".join(map(str, value.values()))
    if not isinstance(value, list):
        return str(value)
    if value[1:] == [None, None]:
        return f"{value[0]}xHxW"
    if any(isinstance(one, list) for one in value):
        return ", ".join(_value(key, one) for one in value)
    return ("x" if key in ("shape", "sizes", "default_size") else ", ").join(map(str, value))
