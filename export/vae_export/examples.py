"""What kind of inputs a model takes, by its examples and its user's options; and noise where there are no examples."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from vae_runtime.arguments import check_choice, check_count
from vae_runtime.errors import BundleError, InputError
from vae_runtime.manifest import COLOUR_OF, InputSpec, Likelihood
from vae_runtime.preprocess import Float32, image_size, padded_size, require_plain_array, to_model_input

from .imported import INPUT_RANGES, Imported

SYNTHETIC_SEED = 0
DEFAULT_SIDE = 64  # of images where neither examples nor the model name a size


def example_spec(imported: Imported, array: Any = None) -> InputSpec:
    """Inputs of an imported model: where it takes any size, at that of `array`, of images as an array has them; else at
    `default_size`, to which pictures are scaled and cut.

    Raises:
        InputError: the array's height or width is no multiple of what the model takes multiples of.
    """
    shape = imported.input_shape
    if len(shape) == 1:
        return InputSpec("vector", shape)
    if imported.is_free:
        side = max(1, DEFAULT_SIDE // imported.multiple_of) * imported.multiple_of
        shape = (shape[0], *(_array_size(array, imported.multiple_of) or imported.default_size or (side, side)))
    return InputSpec("image", shape, _colour(shape[0]), "crop")


def _colour(channels: int | None) -> str | None:
    return COLOUR_OF.get(channels or 0)


def _array_size(array: Any, multiple: int) -> tuple[int, int] | None:
    """(H, W) of images in an array, or None of what is none."""
    if not isinstance(array, np.ndarray) or (array.ndim != 4 and (array.ndim, array.dtype) != (3, np.uint8)):
        return None
    size = image_size(array)
    if padded_size(*size, multiple) != size:
        raise InputError(
            f"the examples have shape {array.shape}; expected height and width that are multiples of {multiple}"
        )
    return size


def check_examples(
    examples: Any, colour: str | None, resize: str | None, multiple_of: Any = None
) -> tuple[InputSpec, Float32]:
    """What kind of input the examples are, and the examples as the encoder takes them; the rest as of `export_bundle`.

    Raises:
        InputError: they are neither images nor vectors, or one of the others does not fit them.
    """
    examples = without_torch(examples, "examples")
    require_plain_array(examples, "examples")
    if (examples.dtype, examples.ndim) not in ((np.uint8, 3), (np.uint8, 4), (np.float32, 4), (np.float32, 2)):
        rule = "expected images (N, H, W[, C]) uint8 or (N, C, H, W) float32, or vectors (N, D) float32"
        raise InputError(f"examples has shape {examples.shape} and dtype {examples.dtype}; {rule}")
    if examples.ndim == 2:
        for name, value in (("colour", colour), ("resize", resize), ("multiple_of", multiple_of)):
            if value is not None:
                raise InputError(f"{name} is {value!r}, but the inputs are vectors, which have none")
        spec = InputSpec("vector", examples.shape[1:])
        return spec, to_model_input(examples, spec, "examples")
    if examples.dtype == np.uint8:
        shape = (examples.shape[3] if examples.ndim == 4 else 1, *examples.shape[1:3])
    else:
        shape = examples.shape[1:]
    colour = _colour(shape[0]) if colour is None else colour
    stated = {"type": "image", "shape": list(shape), "colour": colour, "resize": "exact" if resize is None else resize}
    try:
        spec = InputSpec.from_dict(stated)
    except BundleError as error:
        raise InputError(str(error)) from None
    if multiple_of is not None:
        if spec.resize != "exact":
            raise InputError(
                f"resize is {resize!r}; with multiple_of, height and width are free and pictures keep theirs"
            )
        spec = free_size(spec, check_count(multiple_of, "multiple_of"), always=True)
    return spec, to_model_input(examples, spec, "examples")


def without_torch(examples: Any, name: str) -> Any:
    """A tensor as a numpy array; anything else as it is.

    Raises:
        InputError: numpy has no such type, as bfloat16, or the tensor is sparse.
    """
    if not isinstance(examples, torch.Tensor):
        return examples
    try:
        return examples.detach().cpu().numpy()
    except (TypeError, RuntimeError):
        sort = examples.dtype if examples.layout == torch.strided else examples.layout
        raise InputError(
            f"{name} is a tensor of shape {tuple(examples.shape)} in {sort}; expected a dense one in float32 or uint8"
        ) from None


def each_without_torch(examples: Any, name: str) -> Any:
    """`without_torch` of one tensor, or of each in a list."""
    if not isinstance(examples, (list, tuple)):
        return without_torch(examples, name)
    return [without_torch(one, f"{name}[{number}]") for number, one in enumerate(examples)]


def free_size(spec: InputSpec, multiple: int, always: bool = False) -> InputSpec:
    """The same with height and width free, where the model takes any multiples; `always`: also of 1.

    Raises:
        InputError: the examples' sides are no multiples.
    """
    if multiple == 1 and not always:
        return spec
    channels, *size = spec.example_shape
    if any(side % multiple for side in size):
        raise InputError(f"multiple_of is {multiple}; the examples have shape {spec.shape}, which is no such image")
    return InputSpec("image", (channels, None, None), spec.colour, "exact", multiple, (size[0], size[1]))


def image_range(requested: str | None, spec: InputSpec) -> str | None:
    """`input_range` of `export_bundle`, by default "unit"; None for vectors.

    Raises:
        InputError: it is given for vectors, or is no known range.
    """
    if requested is not None and not spec.is_image:
        raise InputError(f"input_range is {requested!r}, but the inputs are vectors, which have no range")
    check_choice(requested or "unit", "input_range", INPUT_RANGES)
    return requested or ("unit" if spec.is_image else None)


def range_of_means(likelihood: Likelihood | None) -> str | None:
    """The range of vectors that are probabilities; None: they may be anything."""
    return "unit" if likelihood is not None and likelihood.type == "bernoulli" else None


def synthetic_inputs(spec: InputSpec, count: int, like: Float32 | None = None) -> Float32:
    """Seeded noise of the shape of inputs: images in [0, 1]; vectors in the range of `like`, or standard normal."""
    rng = np.random.default_rng(SYNTHETIC_SEED)
    shape = (count, *spec.example_shape)
    if spec.is_image:
        return rng.uniform(0, 1, shape).astype(np.float32)
    if like is None:
        return rng.standard_normal(shape, dtype=np.float32)
    return rng.uniform(float(like.min()), float(like.max()), shape).astype(np.float32)
