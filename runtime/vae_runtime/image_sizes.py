"""Images of free height and width: sizes as callers name them, padding up to the next multiples, and cutting it off."""

from __future__ import annotations

from typing import Any

import numpy as np

from .arguments import check_count, check_flag
from .errors import InputError
from .manifest import Manifest
from .preprocess import Float32, check_layout, describe, pad_images, padded_size, require_plain_array


def input_shape(manifest: Manifest, size: Any) -> tuple[int, ...]:
    """The shape of one input of this (height, width); None: of the default one."""
    spec = manifest.input
    if size is None:
        return spec.example_shape
    sides = check_sides(size)
    if not spec.is_image or not (spec.is_free or sides == spec.shape[1:]):
        raise InputError(f"size is {sides}; {manifest.name} is made for inputs of {describe(spec)} alone")
    if any(side % spec.multiple_of for side in sides):
        raise InputError(f"size is {sides}; expected (height, width), multiples of {spec.multiple_of}")
    return (spec.example_shape[0], *sides)


def padded(manifest: Manifest, inputs: Any, pad: Any) -> tuple[Any, tuple[int, int] | None]:
    """With `pad` the inputs, of free height and width, up to the next multiples, and the (height, width) that they had;
    without, the inputs as they are, and None."""
    if not check_flag(pad, "pad"):
        return inputs, None
    spec = manifest.input
    if not spec.is_free:
        raise InputError(f"pad is True; {manifest.name} takes inputs of one shape only, {describe(spec)}")
    require_plain_array(inputs, "images")
    check_layout(inputs, spec._replace(multiple_of=1), "images")
    return pad_images(inputs, spec.multiple_of)


def cropped(manifest: Manifest, images: Float32, size: Any) -> Float32:
    """What padding added cut off again."""
    height, width = check_cut(size, images.shape, manifest.input.multiple_of)
    return np.ascontiguousarray(images[..., :height, :width])


def check_sides(size: Any) -> tuple[int, int]:
    """(height, width) as whole numbers, or `InputError`."""
    if not isinstance(size, (tuple, list)) or len(size) != 2:
        raise InputError(f"size is {size!r}; expected (height, width)")
    height, width = (check_count(side, "a side of size") for side in size)
    return height, width


def check_cut(size: Any, shape: tuple[int, ...], multiple: int) -> tuple[int, int]:
    """The (height, width) to which images of `shape` are cut, where padding to multiples made them from that size."""
    height, width = check_sides(size)
    if len(shape) != 4:
        raise InputError(f"size is {(height, width)}; it is of images, and these latents are of vectors")
    if padded_size(height, width, multiple) != shape[2:]:
        less = f", or less by up to {multiple - 1} on each side" if multiple > 1 else ""
        raise InputError(f"size is {(height, width)}; these latents are of images of {shape[2:]}{less}")
    return height, width
