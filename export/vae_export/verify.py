"""Exported graphs against PyTorch: the same real inputs through both, at several batch sizes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from vae_runtime.boundary import decoder_boundary, encoder_boundary
from vae_runtime.engine import first_line
from vae_runtime.errors import BundleError, DeviceError, ExportError, OutOfMemoryError, VAEError
from vae_runtime.fidelity import data_range, relative_error
from vae_runtime.manifest import LOGVAR, MEAN, RECONSTRUCTION, InputSpec, Shape
from vae_runtime.preprocess import Float32
from vae_runtime.session import GraphSession

from .halves import Halves, reference_name
from .in_memory import open_graph
from .quality import significant
from .reason import reason

BATCH_SIZES = (1, 2, 7, 32)
FREE_BATCH_SIZES = (1, 3)  # where height and width are free, each at two sizes: such models take long
LARGE_BATCH = 100  # where height and width are free, at the smallest size; code of others decides by the batch, too
LATENT_TOLERANCE_FACTOR = 10  # mean and logvar come from larger sums and have no fixed range


@dataclass(frozen=True)
class Fidelity:
    """How far the exported graphs are from PyTorch, max|Δ| over all inputs and batch sizes.

    against: what computed the reference. examples: different inputs that were compared, at every batch size; where they
        are fewer than the largest, weaker copies of them fill it. sizes: (H, W) of them, where free. tolerance: on
        reconstructions, relative to the data's range; ten times that on mean and logvar, relative to max|reference|.
        logvar_max_error: None for an autoencoder.
    """

    against: str
    batch_sizes: tuple[int, ...]
    sizes: tuple[tuple[int, int], ...]
    tolerance: float
    examples: int
    mean_max_error: float
    logvar_max_error: float | None
    reconstruction_max_error: float

    def to_dict(self) -> dict[str, Any]:
        """For the manifest; errors to two significant digits, so that equal exports give equal bytes."""
        data: dict[str, Any] = {"against": self.against, "batch_sizes": list(self.batch_sizes)}
        data |= {"examples": self.examples, "tolerance": self.tolerance}
        if self.sizes:
            data["sizes"] = [list(size) for size in self.sizes]
        for name in ("mean_max_error", "logvar_max_error", "reconstruction_max_error"):
            value = getattr(self, name)
            if value is not None:
                data[name] = significant(value, 2)
        return data


def verify(graphs: tuple[bytes, bytes], halves: Halves, x: Float32, spec: InputSpec, tolerance: float) -> Fidelity:
    """Compare the two ONNX graphs, run by onnxruntime on the CPU, with the reference on `x`.

    Where height and width are free, also on the same examples a little higher and wider.

    Raises:
        ExportError: an error above the tolerance; the message has the figure and the rule.
    """
    batch_sizes, count = FREE_BATCH_SIZES if spec.is_free else BATCH_SIZES, len(x)
    x = at_least(x, max(batch_sizes))
    inputs = [x]
    if spec.is_free:
        height, width = x.shape[2:]
        inputs.append(mirrored(x[: max(batch_sizes)], height + spec.multiple_of, width + 2 * spec.multiple_of))
    found = [_errors(graphs, halves, one, spec, tolerance, batch_sizes) for one in inputs]
    if spec.is_free:
        smaller = list(_smaller(x, spec, halves))
        found += [_errors(graphs, halves, one, spec, tolerance, (1,)) for one in smaller]
        if smaller:
            many = at_least(smaller[-1], LARGE_BATCH)
            found.append(_errors(graphs, halves, many, spec, tolerance, (LARGE_BATCH,)))
    errors = {name: _largest(one[name] for one in found) for name in found[0]}
    sizes = tuple((one.shape[2], one.shape[3]) for one in inputs) if spec.is_free else ()
    return Fidelity(
        halves.against, batch_sizes, sizes, tolerance, count, errors[MEAN], errors.get(LOGVAR), errors[RECONSTRUCTION]
    )


def run_both(halves: Halves, x: Float32, cut: bool = True) -> tuple[dict[str, Float32], Float32]:
    """The latents of `x` and their reconstructions, as the halves give them where they come from. cut: see
    `Halves.uncut`.

    Raises:
        ExportError: they do not run on such inputs, whatever their own code raises.
    """
    try:
        encoded = halves.encode(x)
        return encoded, (halves.decode if cut else halves.uncut)(encoded[MEAN])
    except VAEError:
        raise
    except Exception as error:
        raise ExportError(f"the model does not run on inputs of shape {x.shape}: {reason(error)}") from error


def _errors(
    graphs: tuple[bytes, bytes],
    halves: Halves,
    x: Float32,
    spec: InputSpec,
    tolerance: float,
    batch_sizes: tuple[int, ...],
) -> dict[str, float]:
    """max|Δ| of every tensor, each within its tolerance."""
    expected, expected_images = run_both(halves, x)
    _require_finite({**expected, RECONSTRUCTION: expected_images}, halves.against)
    encoder, decoder = open_graphs(graphs, spec, expected)
    found = _at_every_batch_size(encoder, x, batch_sizes)
    found_images = [outputs[0] for outputs in _at_every_batch_size(decoder, expected[MEAN], batch_sizes)]
    scale = data_range(x, spec.is_image)
    for position, (name, values) in enumerate(expected.items()):
        worst = _largest(relative_error(outputs[position], values) for outputs in found)
        _require(worst, tolerance * LATENT_TOLERANCE_FACTOR, name, "max|reference|", halves.against)
    worst = _largest(float(np.abs(images - expected_images).max()) for images in found_images)
    _require(worst / scale, tolerance, RECONSTRUCTION, "the data's range", halves.against)
    errors = {
        name: max(float(np.abs(outputs[position] - values).max()) for outputs in found)
        for position, (name, values) in enumerate(expected.items())
    }
    return {**errors, RECONSTRUCTION: worst}


def at_least(x: Float32, rows: int) -> Float32:
    """The examples, and again weaker and weaker until there are so many: copies of a row would hide what mixes rows."""
    rounds = -(-rows // len(x))
    if rounds == 1:
        return x
    strengths = np.repeat(np.linspace(1, 0.5, rounds, dtype=np.float32), len(x))[:rows]
    repeated = np.resize(x, (rows, *x.shape[1:]))
    return np.ascontiguousarray(repeated * strengths.reshape(-1, *[1] * (x.ndim - 1)))


def _smaller(x: Float32, spec: InputSpec, halves: Halves) -> Iterator[Float32]:
    """One example, cut to smaller and smaller sizes that the model itself takes: its code may decide by the size."""
    for less in (2, 4, 8, 16):
        height, width = (side // less // spec.multiple_of * spec.multiple_of for side in x.shape[2:])
        if min(height, width) < 1:
            return
        cut = np.ascontiguousarray(x[:1, :, :height, :width])
        try:
            runs = np.isfinite(halves.decode(halves.encode(cut)[MEAN])).all()
        except Exception:  # too small for it
            return
        if runs:
            yield cut


def mirrored(x: Float32, height: int, width: int) -> Float32:
    """Images of another size: cut, or the other way round at their edges."""
    more = [max(wanted - side, 0) for wanted, side in zip((height, width), x.shape[2:], strict=True)]
    padded = np.pad(x, ((0, 0), (0, 0), (0, more[0]), (0, more[1])), mode="symmetric")
    return np.ascontiguousarray(padded[:, :, :height, :width])


def open_graphs(
    graphs: tuple[bytes, bytes], spec: InputSpec, encoded: dict[str, Float32]
) -> tuple[GraphSession, GraphSession]:
    """Both graphs in the runtime's own sessions; `encoded` shows which outputs of which shape the encoder has.

    Raises:
        ExportError: a graph does not load or has other tensors than the contract says.
    """
    kind, latent = "vae" if LOGVAR in encoded else "autoencoder", latent_pattern(spec, encoded[MEAN].shape[1:])
    return (
        open_graph(graphs[0], "encoder", encoder_boundary(kind, spec, latent)),
        open_graph(graphs[1], "decoder", decoder_boundary(spec, latent)),
    )


def latent_pattern(spec: InputSpec, shape: tuple[int, ...]) -> Shape:
    """A latent's shape as the manifest has it: height and width free where the input's are."""
    return (shape[0], None, None) if spec.is_free else shape


def _at_every_batch_size(session: GraphSession, array: Float32, batch_sizes: tuple[int, ...]) -> list[list[Float32]]:
    """The outputs for all rows of `array`, once per batch size."""
    results = []
    for size in batch_sizes:
        try:
            parts = [session.run(np.ascontiguousarray(array[i : i + size])) for i in range(0, len(array), size)]
        except OutOfMemoryError:
            raise
        except (BundleError, DeviceError) as error:
            raise ExportError(
                f"{session.file} fails at batch size {size}; if the model's code decides by the batch size, its graph"
                f" keeps the decision for the batch that it was traced with ({first_line(error)})"
            ) from error
        results.append([np.concatenate(pieces) for pieces in zip(*parts, strict=True)])
    return results


def _largest(errors: Iterable[float]) -> float:
    """NaN where one of them is, which max() may pass over."""
    return float(np.max(list(errors)))


def _require(error: float, tolerance: float, name: str, unit: str, against: str) -> None:
    if not error <= tolerance:  # also when it is NaN
        raise ExportError(
            f"{name} differs from {reference_name(against)} by {error:.2g} of {unit}; the tolerance is {tolerance:.2g}"
        )


def _require_finite(outputs: dict[str, Float32], against: str) -> None:
    for name, values in outputs.items():
        if not np.isfinite(values).all():
            raise ExportError(
                f"{name} has NaN or infinite values in {reference_name(against)} itself; the model cannot be verified"
            )
