"""Calls on large images, window by window: memory is that of a window, beside the caller's input and the result."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .arguments import check_count, check_progress
from .errors import ApproximateTilingWarning, InputError
from .image_sizes import check_cut
from .manifest import HalfTiling, Manifest
from .operation import Operation
from .preprocess import (
    Float32,
    as_graph_input,
    check_layout,
    check_range,
    describe,
    image_size,
    require_plain_array,
    to_model_input,
    zeros,
)
from .tiling import Progress, TilePlan, run_tiled
from .warning_level import level_outside


class _Passage(NamedTuple):
    """Images to images: the windows of both halves, and the shapes of what comes out of each, with the batch."""

    encoder: TilePlan
    decoder: TilePlan
    latents: tuple[int, ...]
    images: tuple[int, ...]


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
        check_progress(progress)
        if batch_size is not None:
            raise InputError(f"batch_size is {batch_size!r} beside tile; with tile, one window runs at a time")
        spec, size = manifest.input, check_count(tile, "tile")
        if not spec.is_free:
            raise InputError(f"tile is {size}; {manifest.name} takes inputs of one shape only, {describe(spec)}")
        if size % spec.multiple_of:
            raise InputError(f"tile is {size}; expected a multiple of {spec.multiple_of} pixels, as for images")
        if manifest.tiling is None:
            raise InputError(f"tile is {size}; {manifest.name} does not say how to tile its images: export it again")
        self._manifest, self._factor, self._cells = manifest, spec.multiple_of, size // spec.multiple_of
        self._tiling = manifest.tiling
        self._encoder, self._decoder = operations
        self._progress = progress

    def encode(self, images: Any) -> list[Float32]:
        """As `VAE.encode`, the outputs of the encoder."""
        plan, shape = self._encoder_plan(images)
        latents = self._latents(shape)
        self._warn("encode", self._tiling.encoder, plan, "max|latent|")
        for number in range(len(images)):
            one, progress = slice(number, number + 1), self._counted(number * len(plan), len(images) * len(plan))
            self._encode(images[one], plan, [output[one] for output in latents], len(images), progress)
        return latents

    def decode(self, latents: Any, size: tuple[int, int] | None = None) -> Float32:
        """As `VAE.decode`."""
        latents = self._decoder.check(latents)
        images = zeros(self._image_shape(latents.shape, size), "a result")
        plan = self._decoder_plan(latents.shape[2:])
        self._warn("decode", self._tiling.decoder, plan, "the range of images")
        for number in range(len(latents)):
            one, progress = slice(number, number + 1), self._counted(number * len(plan), len(latents) * len(plan))
            self._decode(latents[one], plan, images[one], len(latents), progress)
        return images

    def reconstruct(self, images: Any, size: tuple[int, int] | None = None) -> Float32:
        """As `VAE.reconstruct`; size: (height, width) of the images before they were padded."""
        passage = self._passage(images, size)
        latents, result = self._latents((1, *passage.latents[1:])), zeros(passage.images, "a result")
        for number in range(len(images)):
            self._reconstruct(images, number, passage, latents, result[number : number + 1])
        return result

    def reconstruct_each(
        self, images: Any, size: tuple[int, int] | None = None
    ) -> Iterator[tuple[list[Float32], Float32]]:
        """The encoder's outputs and the reconstruction of one image after the other, all checked before the first, in
        arrays that the next one overwrites. size: as in `reconstruct`."""
        passage = self._passage(images, size)
        latents, result = self._latents((1, *passage.latents[1:])), zeros((1, *passage.images[1:]), "a result")

        def one(number: int) -> tuple[list[Float32], Float32]:
            result.fill(0)
            self._reconstruct(images, number, passage, latents, result)
            return latents, result

        return map(one, range(len(images)))

    def _passage(self, images: Any, size: tuple[int, int] | None) -> _Passage:
        """For images that are found good."""
        first, latents = self._encoder_plan(images)
        passage = _Passage(first, self._decoder_plan(latents[2:]), latents, self._image_shape(latents, size))
        self._warn("encode", self._tiling.encoder, passage.encoder, "max|latent|")
        self._warn("decode", self._tiling.decoder, passage.decoder, "the range of images")
        return passage

    def _reconstruct(
        self, images: NDArray[Any], number: int, passage: _Passage, latents: list[Float32], output: Float32
    ) -> None:
        """One image, into `latents` and `output`, which is zero."""
        first, second, examples = passage.encoder, passage.decoder, len(images)
        done, total = (count * (len(first) + len(second)) for count in (number, examples))
        for latent in latents:
            latent.fill(0)
        self._encode(images[number : number + 1], first, latents, examples, self._counted(done, total))
        self._decode(latents[0], second, output, examples, self._counted(done + len(first), total))

    def _encoder_plan(self, images: Any) -> tuple[TilePlan, tuple[int, ...]]:
        """The windows of images that are found good, and the shape of their latents."""
        spec = self._manifest.input
        require_plain_array(images, "images")
        check_layout(images, spec, "images")
        if images.dtype != np.uint8:
            check_range(images, spec, "images")
        rows, columns = (side // self._factor for side in image_size(images))
        plan = TilePlan((rows, columns), self._cells, self._tiling.encoder.context, input_scale=self._factor)
        return plan, (len(images), self._manifest.latent.shape[0] or 0, rows, columns)

    def _latents(self, shape: tuple[int, ...]) -> list[Float32]:
        """Room for the encoder's outputs."""
        return [zeros(shape, "a result") for _ in range(1 if self._manifest.kind == "autoencoder" else 2)]

    def _decoder_plan(self, size: Sequence[int]) -> TilePlan:
        return TilePlan((size[0], size[1]), self._cells, self._tiling.decoder.context, output_scale=self._factor)

    def _encode(
        self, image: NDArray[Any], plan: TilePlan, outputs: list[Float32], examples: int, progress: Progress | None
    ) -> None:
        """One of so many."""

        def read(part: tuple[slice, slice]) -> Float32:
            if image.dtype == np.uint8:
                return to_model_input(image[:, part[0], part[1]], self._manifest.input)
            return as_graph_input(image[:, :, part[0], part[1]])

        run_tiled(lambda window: self._encoder.run(window, 1, examples), read, plan, outputs, progress)

    def _image_shape(self, latents: tuple[int, ...], size: tuple[int, int] | None) -> tuple[int, ...]:
        """Of the images of latents of this shape, cut to `size`."""
        rows, columns = (side * self._factor for side in latents[2:])
        shape = (latents[0], self._manifest.input.shape[0] or 0, rows, columns)
        return shape if size is None else (*shape[:2], *check_cut(size, shape, self._factor))

    def _decode(
        self, latent: Float32, plan: TilePlan, output: Float32, examples: int, progress: Progress | None
    ) -> None:
        """One of so many."""

        def read(part: tuple[slice, slice]) -> Float32:
            return as_graph_input(latent[:, :, part[0], part[1]])

        run_tiled(lambda window: self._decoder.run(window, 1, examples), read, plan, [output], progress)
        if not plan.is_exact:
            np.clip(output, 0, 1, out=output)  # weights that add up to 1 but for rounding

    def _counted(self, done: int, total: int) -> Progress | None:
        """Progress over all images and both halves: `done` windows before, of `total`."""
        progress = self._progress
        return None if progress is None else lambda count, _: progress(done + count, total)

    def _warn(self, call: str, half: HalfTiling, plan: TilePlan, unit: str) -> None:
        if not plan.is_exact and len(plan) > 1:
            warnings.warn(
                f"{call} with tiles is an approximation for {self._manifest.name} ({half.reason}); the export measured"
                f" a difference of up to {half.max_error:.2g} of {unit} with tiles of {half.tile} on one image of up to"
                f" {2 * half.tile} pixels a side, and larger ones may differ by more",
                ApproximateTilingWarning,
                stacklevel=level_outside("vae_runtime"),
            )
