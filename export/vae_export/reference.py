"""What PyTorch itself computes of both halves, with which exported graphs are compared."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from vae_runtime.manifest import LOGVAR, MEAN
from vae_runtime.preprocess import Float32

from .graphs import DecoderGraph, EncoderGraph, decoder_to_onnx, encoder_to_onnx

_BATCH_VALUES = 2**21  # of the inputs that PyTorch is given at once


class Reference:
    """What PyTorch itself computes: float32, evaluation mode, one thread, in small batches. A `Halves`."""

    def __init__(self, encoder: EncoderGraph, decoder: DecoderGraph, against: str = "pytorch") -> None:
        self._encoder, self._decoder = encoder.eval(), decoder.eval()
        self.kind, self.against = encoder.kind, against

    def encode(self, x: Float32) -> dict[str, Float32]:
        outputs = self._run(self._encoder, x, 32)
        return dict(zip((MEAN, LOGVAR), outputs, strict=False))

    def decode(self, z: Float32) -> Float32:
        return self._run(self._decoder, z, _decoded_at_once(z))[0]

    def uncut(self, z: Float32) -> Float32:
        return self._run(self._decoder.uncut, z, _decoded_at_once(z))[0]

    def to_onnx(self, x: Float32, z: Float32, free: bool) -> tuple[bytes, bytes]:
        return (
            encoder_to_onnx(self._encoder, torch.from_numpy(x), free),
            decoder_to_onnx(self._decoder, torch.from_numpy(z), free),
        )

    def _run(self, half: Callable[[torch.Tensor], Any], array: Float32, most: int) -> list[Float32]:
        with torch.no_grad(), one_thread():
            size = max(1, min(most, _BATCH_VALUES // array[0].size))
            batches = [half(torch.from_numpy(array[i : i + size].copy())) for i in range(0, len(array), size)]
        rows = [batch if isinstance(batch, tuple) else (batch,) for batch in batches]
        return [torch.cat(parts).float().numpy() for parts in zip(*rows, strict=True)]


def _decoded_at_once(z: Float32) -> int:
    """How many latents are decoded at once: one with height and width is a large image, perhaps."""
    return 4 if z.ndim == 4 else 32


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch on one thread inside the block: sums in one order, the same figures at every export."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
