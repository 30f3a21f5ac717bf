"""The encoder and the decoder of any model, as the export takes them."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from vae_runtime.preprocess import Float32

Pair = tuple[bytes | None, bytes | None]  # graphs of both; None is fp32's


def graph_file(half: str, precision: str = "fp32") -> str:
    """The name in a bundle of one half's graph: encoder.onnx, encoder.int8.onnx, encoder.cuda.onnx."""
    return f"{half}.onnx" if precision == "fp32" else f"{half}.{precision}.onnx"


def reference_name(against: str) -> str:
    """What computed a reference, in words; against: as of `Halves`."""
    return "PyTorch" if against == "pytorch" else against


class ReducedHalf(NamedTuple):
    """One half in a lower precision.

    graph: what ships; None where that is fp32's. twin: what is measured in its place, in float32 with every rounding of
    the device; None where it rounds nothing. kept: nodes that stay as exact as in fp32.
    """

    graph: bytes | None
    twin: bytes | None
    kept: list[str]


class ReducedPair(NamedTuple):
    """Both halves in a lower precision, and what was decided on the way to them, for the manifest's `quality`.

    graphs: what ships, by half; None where a half stays as it is in fp32. twins: what is measured in their place.
    """

    graphs: Pair
    twins: Pair
    notes: dict[str, Any]


class Halves(Protocol):
    """Runs both halves where they come from, and makes their ONNX graphs. Everything is in the bundle's units.

    kind: "vae" or "autoencoder". against: what computes the reference, for the manifest: "pytorch", "onnxruntime", ...
    """

    kind: str
    against: str

    def encode(self, x: Float32) -> dict[str, Float32]:
        """x (N, *input_shape) -> {"mean", "logvar"}, each (N, *latent_shape); of an autoencoder {"mean"}, its code."""
        ...

    def decode(self, z: Float32) -> Float32:
        """z (N, *latent_shape) -> reconstruction (N, *input_shape), for images in [0, 1]."""
        ...

    def uncut(self, z: Float32) -> Float32:
        """The same before images are cut to [0, 1]."""
        ...

    def to_onnx(self, x: Float32, z: Float32, free: bool) -> tuple[bytes, bytes]:
        """The encoder's and the decoder's ONNX file under the contract of a bundle.

        x, z: batches of two or more rows, which show shapes. free: height and width are dynamic, not those of `x`.

        Raises:
            ExportError: it cannot be exported, or the result breaks the contract.
        """
        ...
