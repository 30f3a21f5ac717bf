"""Calls on large images, window by window: memory is that of a window, beside the caller's input and the result."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arguments import check_count
from .boundary import check_cut
from .errors import ApproximateTilingWarning, InputError
from .manifest import HalfTiling, Manifest
from .operation import Operation
from .preprocess import (
    Float32,
    as_graph_input,
    check_layout,
    check_range,
    describe,
    require_plain_array,
    to_model_input,
    zeros,
)
from .tiling import Progress, TilePlan, run_tiled


class Tiler:
    """One call with `tile`.

    operations: the encoder's and the decoder's. tile: the side of a window in pixels. batch_size, progress: what the
        caller gave beside it.

    Raises:
        InputError: the bundle has one size of images only or does not say how to tile; an argument breaks a rule.
    """

    def __init__(
        self,
        manifest: Manifest,
        operations: tuple[Operation, Operation],
        tile: int | None,
        batch_size: int | None,
        progress: Progress | None,
    ) -> None:
        if tile is None:
            raise InputError("progress was given without tile; it counts the windows of a call with tile")
        if batch_size is not None:
            raise InputError(f"batch_size is {batch_size!r} beside tile; with tile, one window runs at a time")
        spec, size = manifest.input, check_count(tile, "tile")
        if not spec.is_free:
            raise InputError(f"tile is {size}; {manifest.name} takes inputs of one shape only, {describe(spec)}")
        if size % spec.multiple_of:
            raise InputError(f"tile is {size}; expected a multiple of {spec.multiple_of} pixels, as for images")
        if manifest.tiling is None:
            raise InputError(
                f"tile is {size}; {manifest.name} does not say how its images can be tiled: export it again"
            )
        self._manifest, self._factor, self._cells = manifest, spec.multiple_of, size // spec.multiple_of
        self._tiling = manifest.tiling
        self._encoder, self._decoder = operations
        self._progress = progress

    def encode(self, images: Any) -> list[Float32]:
        """As `VAE.encode`, the outputs of the encoder."""
        plan, latents = self._encoder_plan(images)
        self._warn("encode", self._tiling.encoder, plan, "max|latent|")
        self._encode(images, plan, latents, 0, len(images) * len(plan))
        return latents

    def decode(self, latents: Any, size: tuple[int, int] | None = None) -> Float32:
        """As `VAE.decode`."""
        latents = self._decoder.check(latents)
        shape = self._image_shape(latents.shape, size)
        plan = self._decoder_plan(latents.shape[2:])
        self._warn("decode", self._tiling.decoder, plan, "the range of images")
        return self._decode(latents, shape, plan, 0, len(latents) * len(plan))

    def reconstruct(self, images: Any, size: tuple[int, int] | None = None) -> Float32:
        """As `VAE.reconstruct`; size: (height, width) of the images before they were padded."""
        first, latents = self._encoder_plan(images)
        second, shape = self._decoder_plan(latents[0].shape[2:]), self._image_shape(latents[0].shape, size)
        self._warn("encode", self._tiling.encoder, first, "max|latent|")
        self._warn("decode", self._tiling.decoder, second, "the range of images")
        done, total = len(images) * len(first), len(images) * (len(first) + len(second))
        self._encode(images, first, latents, 0, total)
        return self._decode(latents[0], shape, second, done, total)

    def _encoder_plan(self, images: Any) -> tuple[TilePlan, list[Float32]]:
        """The windows of images that are found good, and room for their latents."""
        spec = self._manifest.input
        require_plain_array(images, "images")
        check_layout(images, spec, "images")
        is_bytes = images.dtype == np.uint8
        if not is_bytes:
            check_range(images, spec, "images")
        rows, columns = (side // self._factor for side in (images.shape[1:3] if is_bytes else images.shape[2:]))
        plan = TilePlan((rows, columns), self._cells, self._tiling.encoder.context, input_scale=self._factor)
        shape = (len(images), self._manifest.latent.shape[0] or 0, rows, columns)
        return plan, [zeros(shape, "a result") for _ in range(1 if self._manifest.kind == "autoencoder" else 2)]

    def _decoder_plan(self, size: Sequence[int]) -> TilePlan:
        return TilePlan((size[0], size[1]), self._cells, self._tiling.decoder.context, output_scale=self._factor)

    def _encode(self, images: NDArray[Any], plan: TilePlan, latents: list[Float32], done: int, total: int) -> None:
        for number in range(len(images)):

            def read(part: tuple[slice, slice], image: NDArray[Any] = images[number : number + 1]) -> Float32:
                if image.dtype == np.uint8:
                    return to_model_input(image[:, part[0], part[1]], self._manifest.input)
                return as_graph_input(image[:, :, part[0], part[1]])

            outputs = [one[number : number + 1] for one in latents]
            progress = self._counted(done + number * len(plan), total)
            run_tiled(lambda window: self._encoder.run(window, 1, len(images)), read, plan, outputs, progress)

    def _image_shape(self, latents: tuple[int, ...], size: tuple[int, int] | None) -> tuple[int, ...]:
        """Of the images of latents of this shape, cut to `size`."""
        rows, columns = (side * self._factor for side in latents[2:])
        shape = (latents[0], self._manifest.input.shape[0] or 0, rows, columns)
        return shape if size is None else (*shape[:2], *check_cut(size, shape, self._factor))

    def _decode(self, latents: Float32, shape: tuple[int, ...], plan: TilePlan, done: int, total: int) -> Float32:
        images = zeros(shape, "a result")
        for number in range(len(latents)):

            def read(part: tuple[slice, slice], latent: Float32 = latents[number : number + 1]) -> Float32:
                return as_graph_input(latent[:, :, part[0], part[1]])

            output, progress = images[number : number + 1], self._counted(done + number * len(plan), total)
            run_tiled(lambda window: self._decoder.run(window, 1, len(latents)), read, plan, [output], progress)
            if not plan.is_exact:
                np.clip(output, 0, 1, out=output)  # weights that add up to 1 but for rounding
        return images

    def _counted(self, done: int, total: int) -> Progress | None:
        """Progress over all images and both halves."""
        progress = self._progress
        return None if progress is None else lambda count, _: progress(done + count, total)

    def _warn(self, call: str, half: HalfTiling, plan: TilePlan, unit: str) -> None:
        if not plan.is_exact and len(plan) > 1:
            warnings.warn(
                f"{call} with tiles is an approximation for {self._manifest.name} ({half.reason}); the export measured"
                f" a difference of up to {half.max_error:.2g} of {unit} with tiles of {half.tile}",
                ApproximateTilingWarning,
                stacklevel=4,
            )
