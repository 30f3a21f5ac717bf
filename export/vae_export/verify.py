"""Exported graphs against PyTorch: the same real inputs through both, at several batch sizes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vae_runtime.devices import Device
from vae_runtime.errors import BundleError, ExportError
from vae_runtime.fidelity import data_range, relative_error
from vae_runtime.manifest import INPUT, LATENT, LOGVAR, MEAN, RECONSTRUCTION, InputSpec
from vae_runtime.preprocess import Float32
from vae_runtime.session import GraphSession

from .graphs import DecoderGraph, EncoderGraph

BATCH_SIZES = (1, 2, 7, 32)
LATENT_TOLERANCE_FACTOR = 10  # mean and logvar come from larger sums and have no fixed range


@dataclass(frozen=True)
class Fidelity:
    """How far the exported graphs are from PyTorch, max|Δ| over all inputs and batch sizes.

    tolerance: on reconstructions, relative to the data's range; ten times that on mean and logvar, relative to
        max|reference|. logvar_max_error: None for an autoencoder. examples: inputs that were compared.
    """

    tolerance: float
    examples: int
    mean_max_error: float
    logvar_max_error: float | None
    reconstruction_max_error: float

    def to_dict(self) -> dict[str, Any]:
        """For the manifest; errors to two significant digits, so that equal exports give equal bytes."""
        data: dict[str, Any] = {"against": "pytorch", "batch_sizes": list(BATCH_SIZES), "examples": self.examples}
        data["tolerance"] = self.tolerance
        for name in ("mean_max_error", "logvar_max_error", "reconstruction_max_error"):
            value = getattr(self, name)
            if value is not None:
                data[name] = float(f"{value:.1e}")
        return data


class Reference:
    """What PyTorch itself computes: float32, evaluation mode, one thread, in small batches."""

    def __init__(self, encoder: EncoderGraph, decoder: DecoderGraph) -> None:
        self._encoder, self._decoder = encoder.eval(), decoder.eval()

    def encode(self, x: Float32) -> dict[str, Float32]:
        outputs = self._run(self._encoder, x)
        return dict(zip((MEAN, LOGVAR), outputs, strict=False))

    def decode(self, z: Float32) -> Float32:
        return self._run(self._decoder, z)[0]

    def _run(self, module: torch.nn.Module, array: Float32) -> list[Float32]:
        with torch.no_grad(), one_thread():
            batches = [module(torch.from_numpy(array[i : i + 32].copy())) for i in range(0, len(array), 32)]
        rows = [batch if isinstance(batch, tuple) else (batch,) for batch in batches]
        return [torch.cat(parts).float().numpy() for parts in zip(*rows, strict=True)]


def verify(
    graphs: tuple[bytes, bytes], reference: Reference, x: Float32, spec: InputSpec, tolerance: float
) -> Fidelity:
    """Compare the two ONNX graphs, run by onnxruntime on the CPU with one thread, with PyTorch on `x`.

    Raises:
        ExportError: an error above the tolerance; the message has the figure and the rule.
    """
    x = np.resize(x, (max(len(x), max(BATCH_SIZES)), *spec.shape))
    expected = reference.encode(x)
    expected_images = reference.decode(expected[MEAN])
    _require_finite({**expected, RECONSTRUCTION: expected_images})
    encoder, decoder = open_graphs(graphs, spec, expected)
    found = _at_every_batch_size(encoder, x)
    found_images = [outputs[0] for outputs in _at_every_batch_size(decoder, expected[MEAN])]
    scale = 1.0 if spec.is_image else data_range(x)
    for position, (name, values) in enumerate(expected.items()):
        worst = _largest(relative_error(outputs[position], values) for outputs in found)
        _require(worst, tolerance * LATENT_TOLERANCE_FACTOR, name, "max|reference|")
    worst = _largest(float(np.abs(images - expected_images).max()) for images in found_images)
    _require(worst / scale, tolerance, RECONSTRUCTION, "the data's range")
    errors = {
        name: max(float(np.abs(outputs[position] - values).max()) for outputs in found)
        for position, (name, values) in enumerate(expected.items())
    }
    return Fidelity(tolerance, len(x), errors[MEAN], errors.get(LOGVAR), worst)


def open_graphs(
    graphs: tuple[bytes, bytes], spec: InputSpec, encoded: dict[str, Float32]
) -> tuple[GraphSession, GraphSession]:
    """Both graphs in the runtime's own sessions; `encoded` shows which outputs of which shape the encoder has.

    Raises:
        ExportError: a graph does not load or has other tensors than the contract says.
    """
    try:
        encoder, decoder = (
            GraphSession(graph, f"the {half}", Device("cpu", "CPUExecutionProvider"), threads=1)
            for graph, half in zip(graphs, ("encoder", "decoder"), strict=True)
        )
        encoder.require_boundary(INPUT, spec.shape, {name: value.shape[1:] for name, value in encoded.items()})
        decoder.require_boundary(LATENT, encoded[MEAN].shape[1:], {RECONSTRUCTION: spec.shape})
    except BundleError as error:
        raise ExportError(str(error)) from error
    return encoder, decoder


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch on one thread inside the block: sums in one order, the same figures at every export."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _at_every_batch_size(session: GraphSession, array: Float32) -> list[list[Float32]]:
    """The outputs for all rows of `array`, once per batch size."""
    results = []
    for size in BATCH_SIZES:
        parts = [session.run(np.ascontiguousarray(array[i : i + size])) for i in range(0, len(array), size)]
        results.append([np.concatenate(pieces) for pieces in zip(*parts, strict=True)])
    return results


def _largest(errors: Iterable[float]) -> float:
    """NaN where one of them is, which max() may pass over."""
    return float(np.max(list(errors)))


def _require(error: float, tolerance: float, name: str, unit: str) -> None:
    if not error <= tolerance:  # also when it is NaN
        raise ExportError(f"{name} differs from PyTorch by {error:.2g} of {unit}; the tolerance is {tolerance:.2g}")


def _require_finite(outputs: dict[str, Float32]) -> None:
    for name, values in outputs.items():
        if not np.isfinite(values).all():
            raise ExportError(f"{name} has NaN or infinite values in PyTorch itself; the model cannot be verified")
