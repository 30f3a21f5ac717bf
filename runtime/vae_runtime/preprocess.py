"""From the caller's arrays to what the graphs take, and back: the one place where this is defined.

Training uses these functions too, so that a model sees at run time exactly what it saw in training. numpy only.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from .engine import raised_here
from .errors import InputError
from .manifest import BINARIZE_MODES, InputSpec, Shape

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
UInt8 = NDArray[np.uint8]

PIXEL = np.dtype(np.uint8)
_WHITE = np.float32(255)
_ONE_BITS = int(np.float32(1).view(np.uint32))


class ValueRule(NamedTuple):
    """What values may be, checked at little cost over a contiguous float32 array: `holds(view(array))`.

    Where it holds, the values are good. Where it does not, they are looked at closely by whoever writes the message:
    that -0.0, say, is good in an image is found only there.
    """

    view: Callable[[Float32], NDArray[Any]]
    holds: Callable[[NDArray[Any]], bool]


# As unsigned integers the bits of [0, 1] are the smallest; negative numbers, infinity and NaN all lie above. argmax and
# argmin stop at a NaN, and cost a third of what max and min do on a small array.
UNIT_INTERVAL = ValueRule(
    lambda array: array.reshape(-1).view(np.uint32), lambda bits: bits.item(bits.argmax()) <= _ONE_BITS
)
FINITE = ValueRule(
    lambda array: array.reshape(-1),
    lambda values: values.item(values.argmax()) < math.inf and values.item(values.argmin()) > -math.inf,
)


def to_model_input(array: Any, spec: InputSpec, name: str = "images") -> Float32:
    """Check `array` against `spec` and return it as the encoder takes it.

    Images: uint8 (N, H, W) for one channel or (N, H, W, C) [0, 255], or float32 (N, C, H, W) [0, 1], -> float32
    (N, C, H, W) [0, 1]. Vectors: float32 (N, D), finite, -> the same. A valid contiguous float32 array is returned
    as it is, never copied and never written to. N is at least 1.

    Raises:
        InputError: any other type, shape, byte order or range, a masked array, NaN, or more than fits into memory; the
        message says what to do.
    """
    require_plain_array(array, name)
    check_layout(array, spec, name)
    with fitting_memory(name, array.shape):
        if array.dtype == np.uint8:
            return from_pixels(_planes(array, spec.shape[0]))
        array = as_graph_input(array)  # first: what does not fit need not be read either
    check_range(array, spec, name)
    return cast("Float32", array)


def check_layout(array: NDArray[Any], spec: InputSpec, name: str) -> None:
    """Raise `InputError` unless dtype and shape are those of inputs; the values are not looked at."""
    expected = spec.shape
    if spec.is_image and array.dtype == np.uint8:
        channels, *size = spec.shape
        expected = (*size,) if channels == 1 else (*size, channels)
    elif array.dtype != np.float32 or not array.dtype.isnative:
        raise InputError(
            f"{name} has dtype {array.dtype}{_byte_order(array)}; expected {describe(spec)}{_dtype_hint(array, spec)}"
        )
    found = array.shape[1:]
    if found == expected:
        return
    if not spec.is_free or len(found) != len(expected) or not all(map(_fits, found, expected)):
        raise InputError(f"{name} has shape {array.shape}; expected {describe(spec)}{_shape_hint(array, spec)}")
    height, width = (side for side, wanted in zip(found, expected, strict=True) if wanted is None)
    if height % spec.multiple_of or width % spec.multiple_of:
        raise InputError(
            f"{name} has {height}x{width} pixels (height x width); expected multiples of {spec.multiple_of}, to"
            " which methods pad with pad=True, and commands with --pad"
        )


def _fits(side: int, wanted: int | None) -> bool:
    return side == wanted or (wanted is None and side > 0)


def padded_size(height: int, width: int, multiple: int) -> tuple[int, int]:
    """The next multiples of `multiple` from height and width on."""
    return -(-height // multiple) * multiple, -(-width // multiple) * multiple


def image_size(array: NDArray[Any]) -> tuple[int, int]:
    """(H, W) of uint8 (N, H, W[, C]) or float32 (N, C, H, W)."""
    height, width = array.shape[1:3] if array.dtype == np.uint8 else array.shape[2:4]
    return height, width


def pad_images(array: NDArray[Any], multiple: int) -> tuple[NDArray[Any], tuple[int, int]]:
    """Images -> the same with their last row and column repeated up to the next multiples, and their own (H, W)."""
    size = image_size(array)
    target = padded_size(*size, multiple)
    if target == size:
        return array, size
    below, right = target[0] - size[0], target[1] - size[1]
    edges = [(0, below), (0, right)]
    sides = [(0, 0), *edges, (0, 0)][: array.ndim] if array.dtype == np.uint8 else [(0, 0), (0, 0), *edges]
    with fitting_memory("an array", array.shape, f", padded to {target[0]}x{target[1]} pixels"):
        return np.pad(array, sides, mode="edge"), size


def first_failing(names: Sequence[str] | str, good: NDArray[np.bool_]) -> tuple[int, str]:
    """The first example that is not good throughout, and its name. names: of all, or of the argument that has them."""
    row = int(good.reshape(len(good), -1).all(axis=1).argmin())
    return row, f"{names}[{row}]" if isinstance(names, str) else names[row]


def check_range(array: Float32, spec: InputSpec, names: Sequence[str] | str) -> None:
    """Raise `InputError` on NaN, infinity or, for images, a value outside [0, 1]. names: as in `first_failing`."""
    if spec.is_image and array.flags.c_contiguous and UNIT_INTERVAL.holds(UNIT_INTERVAL.view(array)):
        return
    # One pass each; NaN propagates through both, and every comparison with it is false.
    low, high = array.min(), array.max()
    if spec.is_image:
        if low >= 0 and high <= 1:
            return
        hint = "; divide by 255, or pass the uint8 array (N, H, W[, C])" if 2 <= high <= 255 and low >= 0 else ""
        rule = f"float32 images lie in [0, 1]{hint}"
    else:
        if low > -np.inf and high < np.inf:
            return
        rule = "vectors are finite"
    row, name = first_failing(names, (array >= 0) & (array <= 1) if spec.is_image else np.isfinite(array))
    low, high = array[row].min(), array[row].max()
    digits = 9 if f"{high:g}" == "1" else 6  # all of a float32's where fewer would show the 1 that it may be above
    found = "NaN" if np.isnan(low) else f"values from {low:g} to {high:.{digits}g}"
    raise InputError(f"{name} has {found}; {rule}")


def require_unmasked(array: NDArray[Any], name: str) -> None:
    """Raise `InputError` for a masked array."""
    masked = sys.modules.get("numpy.ma")  # not loaded: no masked array exists, and loading it takes 10 ms
    if masked is not None and isinstance(array, masked.MaskedArray):
        raise InputError(f"{name} is a masked array, whose mask would be lost; fill it first: {name}.filled(value)")


def require_plain_array(array: Any, name: str) -> None:
    """Raise `InputError` for anything but a plain numpy array of at least one dimension."""
    if not isinstance(array, np.ndarray):
        on_device = "; what is on a device is for encode_to_device and decode_to_device"
        hint = on_device if hasattr(array, "__dlpack__") else ""
        raise InputError(f"{name} is a {type(array).__name__}; expected a numpy array{hint}")
    require_unmasked(array, name)
    if array.ndim == 0 or len(array) == 0:
        raise InputError(
            f"{name} has shape {array.shape}; expected a batch of at least one example along the first axis"
        )


@contextlib.contextmanager
def fitting_memory(what: str, shape: tuple[int, ...], hint: str = "") -> Iterator[None]:
    """Turn what numpy raises for an array that is too large, MemoryError, ValueError or OverflowError, into an
    `InputError`. Nothing else within may raise these."""
    try:
        yield
    except (MemoryError, ValueError, OverflowError) as error:  # the latter two: more than any memory has
        if not raised_here(error):
            raise
        raise InputError(f"{what} of shape {shape} does not fit into memory{hint}") from None


def zeros(shape: tuple[int, ...], what: str, hint: str = "") -> Float32:
    """float32 zeros; raises `InputError` where there is no memory for so many."""
    with fitting_memory(what, shape, hint):
        return np.zeros(shape, np.float32)


def as_graph_input(array: Float32) -> Float32:
    """The same values as a plain array, contiguous and aligned; a copy only where `array` is not so already."""
    return np.ascontiguousarray(array) if array.flags.aligned else np.array(array, order="C")


def describe(spec: InputSpec) -> str:
    """The rule for inputs in words: `(N, 8, 8) uint8 or (N, 1, 8, 8) float32 in [0, 1]`."""
    if not spec.is_image:
        return f"(N, {spec.shape[0]}) float32"
    channels, *sides = spec.shape
    height, width = ("H", "W") if spec.is_free else sides
    trailing = "" if channels == 1 else f", {channels}"
    rule = f", H and W multiples of {spec.multiple_of}" if spec.multiple_of > 1 else ""
    return f"(N, {height}, {width}{trailing}) uint8 or (N, {channels}, {height}, {width}) float32 in [0, 1]{rule}"


def to_uint8(images: Any) -> UInt8:
    """float32 (N, C, H, W) [0, 1] -> uint8 (N, H, W) where C is 1, else (N, H, W, C), [0, 255], rounded to nearest.

    Raises:
        InputError: another type or shape, NaN, or values outside [0, 1].
    """
    require_plain_array(images, "images")
    if images.dtype != np.float32 or images.ndim != 4:
        raise InputError(
            f"images has shape {images.shape} and dtype {images.dtype}; expected (N, C, H, W) float32 in [0, 1]"
        )
    if images.size:  # an image of no pixels would have no minimum
        check_range(images, InputSpec("image", images.shape[1:]), "images")
    scaled = np.rint(images * np.float32(255)).astype(np.uint8)
    if scaled.shape[1] == 1:
        return np.ascontiguousarray(scaled[:, 0])
    return np.ascontiguousarray(scaled.transpose(0, 2, 3, 1))


def binarize(images: Float32, mode: str, rng: np.random.Generator | None = None) -> Float32:
    """Make [0, 1] images binary as the likelihood says: the targets of a Bernoulli model.

    mode: "none" returns them as they are; "threshold" gives x >= 0.5; "dynamic" draws each pixel from
    Bernoulli(x), anew at every call (Salakhutdinov and Murray, 2008), and needs `rng`.
    """
    if mode == "none":
        return images
    if mode == "threshold":
        return (images >= 0.5).astype(np.float32)
    if mode == "dynamic":
        if rng is None:
            raise InputError("binarize has mode 'dynamic' and no rng; pass numpy.random.default_rng(seed)")
        return (rng.random(images.shape, dtype=np.float32) < images).astype(np.float32)
    raise InputError(f"binarize has mode {mode!r}; expected one of {', '.join(BINARIZE_MODES)}")


def channels_first(array: UInt8, spec: InputSpec) -> UInt8 | None:
    """uint8 (N, H, W[, C]) -> a view of it as (N, C, H, W); None where it has not the channels of `spec`."""
    channels = spec.shape[0]
    if not spec.is_image or array.ndim < 3 or array.shape[3:] != (() if channels == 1 else (channels,)):
        return None
    return _planes(array, channels)


def _planes(array: UInt8, channels: int | None) -> UInt8:
    return array[:, None] if channels == 1 else array.transpose(0, 3, 1, 2)


def copy_pixels(target: Float32, pixels: NDArray[Any]) -> None:
    """uint8 [0, 255] -> float32 [0, 1] in an array of the same shape: k / 255, correctly rounded, which k · (1 / 255)
    is not."""
    np.copyto(target, pixels)
    np.divide(target, _WHITE, out=target)


def from_pixels(pixels: NDArray[Any]) -> Float32:
    """uint8 [0, 255] -> float32 [0, 1], contiguous."""
    target = np.empty(pixels.shape, np.float32)
    copy_pixels(target, pixels)
    return target


def _byte_order(array: NDArray[Any]) -> str:
    return "" if array.dtype.isnative else " in foreign byte order"


def _dtype_hint(array: NDArray[Any], spec: InputSpec) -> str:
    if array.dtype.kind == "f":
        return "; convert with .astype(numpy.float32)"
    if spec.is_image and array.dtype.kind in "iu" and array.dtype.itemsize > 1:
        return "; integers are images only as uint8"
    return ""


def _shape_hint(array: NDArray[Any], spec: InputSpec) -> str:
    shape, channels, *sides = array.shape, *spec.shape

    def matches(wanted: Shape) -> bool:
        return len(shape) == len(wanted) and all(map(_fits, shape, wanted))

    if matches(spec.shape) or (spec.is_image and (matches((*sides,)) or matches((*sides, channels)))):
        return "; this looks like a single example without a batch: add one with array[None]"
    if spec.is_image and matches((None, *sides, channels)):
        is_grey = array.dtype == PIXEL
        return f"; {'grey ones have no axis for it: array[..., 0]' if is_grey else 'float32 images are channels first'}"
    if spec.is_image and channels == 1 and matches((None, *sides)):
        return "; float32 images have an axis for the channel: array[:, None]"
    if array.dtype == PIXEL and matches((None, *spec.shape)):
        return "; uint8 images are channels last"
    return ""
