"""Halves of a model from elsewhere that was trained on images made binary by a threshold."""

from __future__ import annotations

import numpy as np

from vae_runtime.preprocess import Float32

from .graphs import with_threshold
from .halves import Halves


class Thresholded:
    """The same halves, for which x becomes x >= 0.5 before it is encoded."""

    def __init__(self, halves: Halves) -> None:
        self._halves = halves
        self.kind, self.against = halves.kind, halves.against

    def encode(self, x: Float32) -> dict[str, Float32]:
        return self._halves.encode((x >= 0.5).astype(np.float32))

    def decode(self, z: Float32) -> Float32:
        return self._halves.decode(z)

    def uncut(self, z: Float32) -> Float32:
        return self._halves.uncut(z)

    def to_onnx(self, x: Float32, z: Float32, free: bool) -> tuple[bytes, bytes]:
        encoder, decoder = self._halves.to_onnx(x, z, free)
        return with_threshold(encoder), decoder
