"""What the commands of `vae-run` share: their options, and inputs in batches under a progress bar."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click
import numpy as np

from . import sources
from .console import echo_warning
from .errors import ApproximateTilingWarning, InputError
from .images import PICTURE_FORMATS
from .latent_files import LatentFile, decoder_digest
from .latents import check_latent_layout
from .manifest import INPUT, InputSpec, Manifest
from .preprocess import check_layout, check_range, describe, image_size, pad_images
from .vae import VAE

BATCH = 64  # examples that are read at once, at most; fewer where they are large, see `_batch_size`

bundle_argument = click.argument("bundle", type=click.Path())
output_option = click.option("--output", required=True, type=click.Path(), help="Where the result goes.")
force_option = click.option("--force", is_flag=True, help="Replace an existing file.")
inputs_argument = click.argument("inputs", nargs=-1, type=click.Path())
golden_option = click.option("--golden", is_flag=True, help="Take the bundle's own golden inputs instead of files.")
pad_option = click.option(
    "--pad", is_flag=True, help="Pad images of free size to the multiples that the bundle takes, and crop back."
)
tile_option = click.option(
    "--tile", type=int, metavar="PIXELS", help="Go through large images in windows of this side, in bounded memory."
)
picture_format_option = click.option(
    "--format", "form", type=click.Choice(PICTURE_FORMATS), help="Of the pictures in a folder.  [default: png]"
)


Source = sources.PictureSource | sources.ArraySource | sources.MemorySource


@contextmanager
def command_inputs(vae: VAE, inputs: tuple[str, ...], golden: bool, pad: bool) -> Iterator[Source]:
    if golden == bool(inputs):
        raise click.UsageError("give either INPUTS or --golden")
    spec = vae.manifest.input
    require_paddable(spec, pad)
    yield sources.MemorySource(vae.golden()[INPUT], "golden#") if golden else sources.open_inputs(inputs, spec, pad)


def read_fitting(path: str, spec: InputSpec, pad: bool) -> tuple[Any, tuple[int, int] | None]:
    """`sources.read_one`, then `fitting`."""
    require_paddable(spec, pad)
    return fitting(sources.read_one(path, spec, pad), spec, [path], pad)


def fitting(batch: Any, spec: InputSpec, names: list[str], pad: bool) -> tuple[Any, tuple[int, int] | None]:
    """The batch as the encoder takes it, but for the type, and the (height, width) of images before padding."""
    require_fitting(batch, spec, names, pad)
    if pad:
        return pad_images(batch, spec.multiple_of)
    return batch, image_size(batch) if spec.is_image else None


def require_paddable(spec: InputSpec, pad: bool) -> None:
    if pad and not spec.is_free:
        raise InputError(f"--pad is for bundles that leave height and width free; this one takes {describe(spec)}")


def require_fitting(batch: Any, spec: InputSpec, names: list[str], pad: bool) -> None:
    """Raise `InputError`, which names the inputs, unless the encoder takes the batch, once it is padded if `pad`."""
    check_layout(batch, spec._replace(multiple_of=1) if pad else spec, range_of(names))
    if batch.dtype == np.float32:
        check_range(batch, spec, names)


def check_latents(file: LatentFile, manifest: Manifest) -> None:
    """Raise `InputError` unless a file's latents are ones of this bundle, as far as can be told without the values."""
    check_latent_layout(file.outline(), manifest.latent.shape, str(file.path))
    if file.decoder is not None and file.decoder != decoder_digest(manifest):
        raise InputError(
            f"{file.path} holds latents of another model than {manifest.name}, which would decode to nonsense"
        )


def shape_before_cut(file: LatentFile, spec: InputSpec) -> tuple[int, ...]:
    """Of the image of a latent where sizes are free, with what padding added to it."""
    return (spec.example_shape[0], *(side * spec.multiple_of for side in file.outline().shape[2:]))


def batches_with_progress(
    source: Source | LatentFile,
    label: str,
    tile: int | None,
    spec: InputSpec,
    most: int | None = None,
    warn: bool = True,
) -> Iterator[tuple[Any, list[str], dict[str, Any]]]:
    """Batches with their names, and what `VAE` is to be called with, under a bar on stderr where that is a terminal.
    most: so many examples are enough. warn: at the end say once on stderr whether tiles were an approximation."""
    parts = 1000  # of one example, on the bar
    enough = len(source) if most is None else min(most, len(source))
    length, hidden = parts * enough, sys.stderr is None or not sys.stderr.isatty()  # None: closed, `2>&-`
    with (
        warnings.catch_warnings(record=True) as caught,
        click.progressbar(length=length, label=label, file=sys.stderr, hidden=hidden) as bar,
    ):
        warnings.simplefilter("always", ApproximateTilingWarning)
        start = 0
        for batch in source.batches(_batch_size(source, tile, spec)) if enough else ():

            def tell(done: int, total: int, before: int = start, count: int = len(batch)) -> None:
                bar.update(parts * before + parts * count * done // total - bar.pos)

            names = source.names[start : start + len(batch)]
            yield batch, names, {} if tile is None else {"tile": tile, "progress": tell}
            start += len(batch)
            bar.update(parts * start - bar.pos)
            if start >= enough:
                break
    for message in dict.fromkeys(str(one.message) for one in caught if warn):
        echo_warning(message)


def _batch_size(source: Source | LatentFile, tile: int | None, spec: InputSpec) -> int:
    """Examples to have in memory at once: of free size, one with tiles, else by the values of their images."""
    if not spec.is_free:
        return BATCH
    if tile is not None:
        return 1
    if isinstance(source, sources.PictureSource):  # each has its own size, which the source looks at
        return BATCH
    shape = shape_before_cut(source, spec) if isinstance(source, LatentFile) else source.example_shape()
    return max(1, min(BATCH, sources.BATCH_VALUES // math.prod(shape)))


def range_of(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
