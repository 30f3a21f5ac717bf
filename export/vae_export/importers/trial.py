"""A network from elsewhere, tried on noise before anything is written: its sizes, and that rows do not mix.

Noise in [0, 1] shows shapes and whether the halves are deterministic functions of each row; how well an exported graph
agrees with them is measured later, by the export.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from vae_runtime.errors import ExportError, InputError
from vae_runtime.manifest import LOGVAR, MEAN
from vae_runtime.preprocess import Float32

from ..halves import Halves
from ..imported import ImportOptions
from ..reason import reason
from .options import FLAGS, wrong_option

SIDE = 64  # of the images that a network of free sizes is tried with
SIGMOID_OF_1 = 0.731059  # rounded up
_ONE_INPUT = (
    "; either half takes one input: of a conditional VAE, make a bundle for each class, of an encode and a decode that"
    " fill the class in"
)
MIXING_TOLERANCE = 1e-3  # relative to max|outputs|: what the engine's kernels make of another batch size stays below


class DoesNotRunError(ExportError):
    """A half's own code fails; half: "encoder" or "decoder"."""

    def __init__(self, message: str, half: str = "") -> None:  # pickle makes one of the message, and then sets the half
        super().__init__(message)
        self.half = half


class Sizes(NamedTuple):
    """What `Imported` has under these names."""

    input_shape: tuple[int | None, ...]
    multiple_of: int
    default_size: tuple[int, int] | None


def noise(shape: tuple[int | None, ...], rows: int, multiple_of: int | None) -> Float32:
    """`rows` seeded inputs in [0, 1]; free sizes are about `SIDE`.

    Raises:
        InputError: they do not fit into memory.
    """
    side = multiple_of * -(-SIDE // multiple_of) if multiple_of else SIDE
    sizes = [size or side for size in shape]
    try:
        return np.random.default_rng(0).random((rows, *sizes), dtype=np.float32)
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
        check_halves(halves, x, mean.shape[1:])
        check_range(halves, x, options)
        return Sizes(shape, 1, None)
    factor = _factor(x, mean, options)
    side = x.shape[2] // factor
    for size in ((side, side), (side + 1, max(side - 1, 1))):
        x = noise((shape[0], size[0] * factor, size[1] * factor), 3, None)
        check_halves(halves, x, (mean.shape[1], *size))
    check_range(halves, x, options)
    return Sizes(shape, factor, (side * factor, side * factor))


def require_batch(shape: tuple[int, ...], rows: int) -> None:
    """Raises: ExportError: an encoder's output for so many rows does not have the shape of as many latents."""
    if len(shape) < 2 or shape[0] != rows:
        raise ExportError(f"the encoder returns shape {tuple(shape)} for {rows} inputs; expected ({rows}, ...)")


def check_range(halves: Halves, x: Float32, options: ImportOptions) -> None:
    """Raise `InputError` if the decoder's values, in the bundle's units, show that it was made for [0, 1] after all.

    A decoder that ends in a sigmoid, read as one for [-1, 1], never gives less than the middle of the range; read as
    one of logits, it gives what a sigmoid makes of [0, 1].
    """
    if options.input_range != "signed" and not options.logits:
        return
    latents = _encode(halves, x)[MEAN]
    wild = np.random.default_rng(0).standard_normal(latents.shape, dtype=np.float32)
    values = np.concatenate([_decode(halves, wild * np.float32(size)) for size in (1, 30)])
    if options.logits:
        if float(values.min()) >= 0.5 and float(values.max()) <= SIGMOID_OF_1:
            rule = ", but the decoder gives no value outside [0, 1], as if it ended in a sigmoid already"
            raise wrong_option(options, "logits", rule)
    elif float(values.min()) >= 0.5:
        rule = (
            ", but the decoder gives no value below 0, as if its images were in [0, 1]; if the encoder takes [-1, 1]"
            " nevertheless, pass 'unit', and let encode begin with 2 * x - 1"
        )
        raise wrong_option(options, "input_range", rule)


def _factor(x: Float32, mean: Float32, options: ImportOptions) -> int:
    """How many times smaller latents are than images, which is what H and W are multiples of."""
    side = x.shape[2]
    if mean.ndim != 4 or mean.shape[2] != mean.shape[3] or side % mean.shape[2]:
        raise ExportError(
            f"the encoder returns shape {mean.shape} for inputs of shape {x.shape}; with free sizes a latent is"
            f" (C, H/f, W/f) for one whole f: fix the size, such as {FLAGS['input_shape']} 3x64x64"
        )
    factor = side // mean.shape[2]
    if options.multiple_of not in (None, factor):
        raise wrong_option(options, "multiple_of", f", but latents are {factor} times smaller than images")
    return factor


def check_halves(halves: Halves, x: Float32, latent_shape: tuple[int, ...]) -> None:
    """Raise `ExportError` if a half gives other shapes for `x`, is random, or mixes the rows of a batch."""
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

    def encode(rows: Float32) -> Float32:
        again = _encode(halves, rows)
        for values in again.values():
            _require_batch_axis("encoder", values, (len(rows), *latent_shape))
        return _stack(again)

    def decode(rows: Float32) -> Float32:
        again = _decode(halves, rows)
        _require_batch_axis("decoder", again, (len(rows), *x.shape[1:]))
        return again

    _check_rows("encoder", encode, x, _stack(encoded))
    _check_rows("decoder", decode, encoded[MEAN], reconstruction)


def _require_batch_axis(half: str, values: Float32, shape: tuple[int, ...]) -> None:
    if values.ndim < len(shape):
        raise ExportError(
            f"the {half} loses the batch axis at a batch of {shape[0]}: it gives shape {values.shape}, expected"
            f" {shape}; squeeze() without an axis removes it too"
        )


def _check_rows(half: str, run: Callable[[Float32], Float32], rows: Float32, outputs: Float32) -> None:
    """The same rows again, together and one by one."""
    if not np.isfinite(outputs).all():
        raise ExportError(f"the {half} gives NaN or infinite values for the inputs that it is tried with")
    if not np.array_equal(run(rows), outputs):
        raise ExportError(
            f"the {half} gives other values for the same input in a second run: it draws random numbers, or keeps"
            " something of an earlier call (a dropout without training=self.training?); a bundle's encoder gives"
            " mean and logvar, and sampling is the runtime's"
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
    """half(inputs); what it raises becomes a `DoesNotRunError` which names the half and the inputs' shape."""
    try:
        return half(inputs)
    except (ExportError, InputError):
        raise
    except (Exception, SystemExit) as error:  # a network's code may call sys.exit
        conditional = isinstance(error, TypeError) and "required positional argument" in str(error)
        cure = _ONE_INPUT if conditional else ""
        message = f"the {name} does not run on a batch of shape {tuple(inputs.shape)}: {reason(error)}{cure}"
        raise DoesNotRunError(message, name) from error
