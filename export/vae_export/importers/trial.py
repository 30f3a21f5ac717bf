"""A network from elsewhere, tried on noise before anything is written: its sizes, and that rows do not mix.

Noise in [0, 1] shows shapes and whether the halves are deterministic functions of each row; how well an exported graph
agrees with them is measured later, by the export.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from vae_runtime.errors import ExportError, InputError
from vae_runtime.manifest import KINDS, LOGVAR, MEAN
from vae_runtime.preprocess import Float32

from ..halves import Halves
from ..imported import INPUT_RANGES, ImportOptions
from ..reason import reason

SIDE = 64  # of the images that a network of free sizes is tried with
MIXING_TOLERANCE = 1e-3  # relative to max|outputs|: what the engine's kernels make of another batch size stays below


class Sizes(NamedTuple):
    """What `Imported` has under these names."""

    input_shape: tuple[int | None, ...]
    multiple_of: int
    default_size: tuple[int, int] | None


def check_options(options: ImportOptions, factory: bool = False, pickles: bool = False) -> None:
    """Raise `InputError` for an option with an impossible value, or one that only a factory takes."""
    if options.weights is not None and not factory:
        raise InputError("--weights is for a factory; this source has its weights in it")
    if options.trust_pickle and not pickles:
        raise InputError("--trust-pickle is of no use here: nothing in this source is unpickled")
    for name, value, allowed in (
        ("--kind", options.kind, KINDS), ("--input-range", options.input_range, INPUT_RANGES),
    ):  # fmt: skip
        if value is not None and value not in allowed:
            raise InputError(f"{name} is {value!r}; expected one of {', '.join(allowed)}")
    if options.latent_scale is not None and not 0 < options.latent_scale < np.inf:
        raise InputError(f"--latent-scale is {options.latent_scale!r}; expected a finite number above 0")
    if options.latent_shift is not None and not np.isfinite(options.latent_shift):
        raise InputError(f"--latent-shift is {options.latent_shift!r}; expected a finite number")
    if options.multiple_of is not None and options.multiple_of < 1:
        raise InputError(f"--multiple-of is {options.multiple_of}; expected 1 or more")


def require_shape(shape: tuple[int | None, ...] | None, options: ImportOptions) -> tuple[int | None, ...]:
    """The shape of inputs, checked together with the options that go with it; None: nobody said it.

    Raises:
        InputError: an option is missing or contradicts the shape.
    """
    if shape is None:
        raise InputError("the source does not say what its inputs are; pass --input, such as 3x64x64")
    free = shape[1:] == (None, None)
    sizes = (shape[0],) if free else shape
    if len(shape) not in (1, 3) or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise InputError(f"--input is {shape}; expected (C, H, W), (C, None, None) for free sizes, or (D,)")
    if len(shape) == 3 and options.input_range is None:
        raise InputError(
            "the source does not say whether its images lie in [0, 1] or [-1, 1]; pass --input-range unit or signed"
        )
    if len(shape) == 1 and options.input_range is not None:
        raise InputError(f"--input-range is {options.input_range!r}, but the inputs are vectors, which have no range")
    if not free and options.multiple_of not in (None, 1):
        raise InputError(f"--multiple-of is {options.multiple_of}, but the inputs {shape} have no free size")
    return shape


def noise(shape: tuple[int | None, ...], rows: int, multiple_of: int | None, seed: int = 0) -> Float32:
    """`rows` inputs in [0, 1]; free sizes are about `SIDE`.

    Raises:
        InputError: they do not fit into memory.
    """
    side = multiple_of * -(-SIDE // multiple_of) if multiple_of else SIDE
    sizes = [size or side for size in shape]
    try:
        return np.random.default_rng(seed).random((rows, *sizes), dtype=np.float32)
    except (MemoryError, ValueError, OverflowError):  # the others: more bytes than there can be
        text = "x".join(map(str, sizes))
        raise InputError(f"inputs of {text} are too large: {rows} of them do not fit into memory") from None


def try_out(halves: Halves, shape: tuple[int | None, ...], options: ImportOptions) -> Sizes:
    """Run both halves on noise, at two sizes where they are free.

    Raises:
        ExportError: a half does not run, is random, mixes the rows of a batch or gives shapes that do not fit.
        InputError: an option contradicts what is found.
    """
    x = noise(shape, 3, options.multiple_of)
    mean = _encode(halves, x)[MEAN]
    require_batch(mean.shape, len(x))
    if None not in shape:
        _check_halves(halves, x, mean.shape[1:])
        check_range(halves, x, options)
        return Sizes(shape, 1, None)
    factor = _factor(x, mean, options)
    side = x.shape[2] // factor
    for size in ((side, side), (side + 1, max(side - 1, 1))):
        x = noise((shape[0], size[0] * factor, size[1] * factor), 3, None)
        _check_halves(halves, x, (mean.shape[1], *size))
    check_range(halves, x, options)
    return Sizes(shape, factor, (side * factor, side * factor))


def require_batch(shape: tuple[int, ...], rows: int) -> None:
    """Raises: ExportError: an encoder's output for so many rows has not the shape of as many latents."""
    if len(shape) < 2 or shape[0] != rows:
        raise ExportError(f"the encoder returns shape {tuple(shape)} for {rows} inputs; expected ({rows}, ...)")


def check_range(halves: Halves, x: Float32, options: ImportOptions) -> None:
    """Raise `InputError` if the decoder's values, in the bundle's units, show that it was made for the other range.

    A decoder that ends in a sigmoid, read as one for [-1, 1], never gives less than the middle of the range.
    """
    if options.input_range != "signed":
        return
    latents = _encode(halves, x)[MEAN]
    wild = np.random.default_rng(0).standard_normal(latents.shape, dtype=np.float32)
    if all(float(_decode(halves, wild * np.float32(size)).min()) >= 0.5 for size in (1, 30)):
        raise InputError(
            "--input-range is 'signed', but the decoder gives no value below 0, as one for images in [0, 1]"
        )


def _factor(x: Float32, mean: Float32, options: ImportOptions) -> int:
    """How many times smaller latents are than images, which is what H and W are multiples of."""
    side = x.shape[2]
    if mean.ndim != 4 or mean.shape[2] != mean.shape[3] or side % mean.shape[2]:
        raise ExportError(
            f"the encoder returns shape {mean.shape} for inputs of shape {x.shape}; with free sizes a latent is"
            " (C, H/f, W/f) for one whole f: fix the size, such as --input 3x64x64"
        )
    factor = side // mean.shape[2]
    if options.multiple_of not in (None, factor):
        raise InputError(f"--multiple-of is {options.multiple_of}, but latents are {factor} times smaller than images")
    return factor


def _check_halves(halves: Halves, x: Float32, latent_shape: tuple[int, ...]) -> None:
    encoded = _encode(halves, x)
    for name, values in encoded.items():
        if values.shape != (len(x), *latent_shape):
            raise ExportError(
                f"the encoder gives a {name} of shape {values.shape} for inputs of shape {x.shape}; expected"
                f" {(len(x), *latent_shape)}"
            )
    reconstruction = _decode(halves, encoded[MEAN])
    if reconstruction.shape != x.shape:
        raise ExportError(
            f"the decoder returns shape {reconstruction.shape} for inputs of shape {x.shape}; they must be the same"
        )
    _check_rows("encoder", lambda rows: _stack(_encode(halves, rows)), x, _stack(encoded))
    _check_rows("decoder", lambda rows: _decode(halves, rows), encoded[MEAN], reconstruction)


def _check_rows(half: str, run: Callable[[Float32], Float32], rows: Float32, outputs: Float32) -> None:
    """The same rows again, together and one by one."""
    if not np.isfinite(outputs).all():
        raise ExportError(f"the {half} gives NaN or infinite values for inputs in [0, 1]")
    if not np.array_equal(run(rows), outputs):
        raise ExportError(
            f"the {half} gives other values for the same input in a second run: it draws random numbers; a bundle's"
            " encoder gives mean and logvar, and sampling is the runtime's"
        )
    single = np.concatenate([run(rows[i : i + 1]) for i in range(len(rows))])
    if single.shape != outputs.shape:
        raise ExportError(f"the {half} gives shape {outputs.shape} for a batch of {len(rows)}, {single.shape} by rows")
    error = float(np.abs(single - outputs).max())
    if not error <= MIXING_TOLERANCE * max(1.0, float(np.abs(outputs).max())):
        raise ExportError(
            f"the {half} gives values that differ by {error:.2g} for an input alone and in a batch of {len(rows)}: it"
            " mixes the rows of a batch (batch normalisation in training mode, or a fixed batch size?)"
        )


def _stack(encoded: dict[str, Float32]) -> Float32:
    return np.concatenate([encoded[name] for name in (MEAN, LOGVAR) if name in encoded], axis=1)


def _encode(halves: Halves, x: Float32) -> dict[str, Float32]:
    encoded: dict[str, Float32] = run(halves.encode, x, "encoder")
    return encoded


def _decode(halves: Halves, z: Float32) -> Float32:
    reconstruction: Float32 = run(halves.decode, z, "decoder")
    return reconstruction


def run(half: Callable[[Any], Any], inputs: Any, name: str) -> Any:
    """half(inputs); what it raises becomes an `ExportError` which names the half and the inputs' shape."""
    try:
        return half(inputs)
    except (ExportError, InputError):
        raise
    except (Exception, SystemExit) as error:  # a network's code may call sys.exit
        raise ExportError(
            f"the {name} does not run on a batch of shape {tuple(inputs.shape)}: {reason(error)}"
        ) from error
