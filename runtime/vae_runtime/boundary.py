"""Which tensors a graph takes and gives, and what sizes they have for an input of a given size."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from .manifest import INPUT, LATENT, LOGVAR, MEAN, RECONSTRUCTION, InputSpec, Shape


class Boundary(NamedTuple):
    """All tensors are float32 with the batch first; shapes are without it, and None is a free side.

    up, down: a free side of an output is the input's · up // down.
    """

    input: str
    input_shape: Shape
    outputs: Mapping[str, Shape]
    up: int = 1
    down: int = 1

    def accepts(self, shape: tuple[int, ...]) -> bool:
        """Whether an input may have this shape."""
        return len(shape) == len(self.input_shape) and all(
            side == wanted if wanted is not None else side > 0 and side % self.down == 0
            for side, wanted in zip(shape, self.input_shape, strict=True)
        )

    def rule(self) -> str:
        """What `accepts` says, in words: `(N, 4, 8, 8)`, or with free sides `(N, 3, H, W), H and W multiples of 8`."""
        names = iter("HW")
        sides = ", ".join(str(next(names) if side is None else side) for side in ("N", *self.input_shape))
        return f"({sides})" + (f", H and W multiples of {self.down}" if self.down > 1 else "")

    def output_shapes(self, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
        """The outputs' shapes for an input of this shape."""
        if None not in self.input_shape:
            return list(self.outputs.values())  # type: ignore[arg-type]  # without a free side
        sides = [side * self.up // self.down for side in shape[1:]]
        return [(output[0] or 0, *sides) for output in self.outputs.values()]

    def largest(self, shape: tuple[int, ...]) -> int:
        """Numbers in the largest of the tensors, for an input of this shape."""
        return max(math.prod(one) for one in (shape, *self.output_shapes(shape)))


def encoder_boundary(kind: str, spec: InputSpec, latent: Shape) -> Boundary:
    names = (MEAN, LOGVAR) if kind == "vae" else (MEAN,)
    return Boundary(INPUT, spec.shape, dict.fromkeys(names, latent), down=spec.multiple_of)


def decoder_boundary(spec: InputSpec, latent: Shape) -> Boundary:
    return Boundary(LATENT, latent, {RECONSTRUCTION: spec.shape}, up=spec.multiple_of)
