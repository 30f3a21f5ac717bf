"""How one operator looks along one axis: which positions of its input an output position reads.

Every map here is monotone (a later position never reads further to the left) and periodic (a shift of the output by
whole periods shifts what is read), so that intervals can be followed through a graph by their ends alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple


class AxisMap(NamedTuple):
    """One operator along one axis.

    ratio: input positions per output position. first, last: output position -> the ends of the interval that it reads;
    positions before 0 or beyond the input are padding. length: the input's length less N / scale, see
    `vae_export.receptive.axis.Axis.extra`, -> the output's. mirrored: (before, after), how many positions of padding
    there repeat what is inside, None for padding with a constant; (0, 0) repeats the edge alone.
    """

    ratio: Fraction
    first: Callable[[int], int]
    last: Callable[[int], int]
    length: Callable[[int], int]
    mirrored: tuple[int, int] | None = None


class UnknownMapError(Exception):
    """The operator's attributes make a map that is not periodic or is not known here; the message says which."""


def window(stride: int, begin: int, end: int, size: int, mirrored: tuple[int, int] | None = None) -> AxisMap:
    """A sum over `size` neighbours, one every `stride` positions, after padding by `begin` and `end`: convolutions and
    pooling; also a mere shift, Pad or Slice (negative padding), and SpaceToDepth."""
    return AxisMap(
        Fraction(stride),
        lambda q: q * stride - begin,
        lambda q: q * stride - begin + size - 1,
        lambda extra: (extra + begin + end - size) // stride + 1,
        mirrored,
    )


def spread(stride: int, begin: int, size: int, total: int) -> AxisMap:
    """Every input position adds to `size` outputs, the first `begin` before position · stride: transposed convolutions,
    and DepthToSpace. The output is `total` longer than stride · input."""
    reach = max(size, stride)  # what no input reaches holds the bias alone; it counts as its neighbour's
    return AxisMap(
        Fraction(1, stride),
        lambda q: -((reach - 1 - q - begin) // stride),
        lambda q: (q + begin) // stride,
        lambda extra: extra * stride + total,
    )


SAME = window(1, 0, 0, 1)


def convolution(given: dict[str, Any], axis: int, kernel: int) -> AxisMap:
    """Conv and the pools; `given`: attributes by name, `axis`: 0 for height, 1 for width."""
    stride, dilation = _of(given, "strides", axis, 1), _of(given, "dilations", axis, 1)
    size = (kernel - 1) * dilation + 1
    begin, end = _pads(given, axis, size, stride)
    made = window(stride, begin, end, size)
    if _auto_pad(given).startswith("SAME"):
        return made._replace(length=_whole(stride, -stride, "auto_pad SAME"))
    return made._replace(length=_whole(stride, begin + end - size)) if given.get("ceil_mode") else made


def transposed(given: dict[str, Any], axis: int, kernel: int) -> AxisMap:
    """ConvTranspose."""
    if "output_shape" in given or _auto_pad(given) not in ("NOTSET", "VALID"):
        raise UnknownMapError("an output shape of its own")
    stride, dilation = _of(given, "strides", axis, 1), _of(given, "dilations", axis, 1)
    size = (kernel - 1) * dilation + 1
    pads = given.get("pads", [0, 0, 0, 0])
    total = size - stride + _of(given, "output_padding", axis, 0) - pads[axis] - pads[axis + 2]
    return spread(stride, pads[axis], size, total)


def resize(scale: Fraction, mode: str, coordinates: str, rounding: str) -> AxisMap:
    """Resize by a rational factor. coordinates, rounding: `coordinate_transformation_mode` and `nearest_mode`."""
    offset = Fraction(0)
    if coordinates in ("half_pixel", "pytorch_half_pixel"):
        offset = Fraction(1, 2)
    elif coordinates != "asymmetric":
        raise UnknownMapError(f"coordinates {coordinates!r}, which depend on the size")

    def position(q: int) -> Fraction:
        return (q + offset) / scale - offset

    reads: dict[str, tuple[Callable[[int], int], Callable[[int], int]]] = {
        "linear": (lambda q: math.floor(position(q)), lambda q: math.ceil(position(q))),
        "cubic": (lambda q: math.floor(position(q)) - 1, lambda q: math.ceil(position(q)) + 1),
    }
    if mode == "nearest":
        if rounding not in _ROUNDINGS:
            raise UnknownMapError(f"nearest_mode {rounding!r}")
        rounded = _ROUNDINGS[rounding]
        reads["nearest"] = (lambda q: rounded(position(q)), lambda q: rounded(position(q)))
    if mode not in reads:
        raise UnknownMapError(f"mode {mode!r}")
    if mode != "nearest" and not all(_is_power_of_two(part) for part in (scale.numerator, scale.denominator)):
        raise UnknownMapError(f"mode {mode!r} by {scale}, whose places are rounded differently along the image")
    return AxisMap(1 / scale, *reads[mode], lambda extra: math.floor(extra * scale), (0, 0))


_ROUNDINGS: dict[str, Callable[[Fraction], int]] = {
    "round_prefer_floor": lambda x: math.ceil(x - Fraction(1, 2)),
    "round_prefer_ceil": lambda x: math.floor(x + Fraction(1, 2)),
    "floor": math.floor,
    "ceil": math.ceil,
}


def _is_power_of_two(number: int) -> bool:
    return number & (number - 1) == 0


def _whole(stride: int, missing: int, what: str = "ceil_mode") -> Callable[[int], int]:
    """The length where rounding up and rounding down are the same; engines differ in windows that begin in padding, and
    with a remainder the padding of SAME is another one."""

    def length(extra: int) -> int:
        if (extra + missing) % stride:
            raise UnknownMapError(f"{what} with a remainder")
        return (extra + missing) // stride + 1

    return length


def _pads(given: dict[str, Any], axis: int, size: int, stride: int) -> tuple[int, int]:
    auto = _auto_pad(given)
    if auto == "NOTSET":
        pads = given.get("pads", [0, 0, 0, 0])
        return pads[axis], pads[axis + 2]
    if auto == "VALID":
        return 0, 0
    total = max(size - stride, 0)  # where the stride divides the length
    return (total // 2, total - total // 2) if auto == "SAME_UPPER" else (total - total // 2, total // 2)


def _auto_pad(given: dict[str, Any]) -> str:
    value = given.get("auto_pad", "NOTSET")
    return value.decode() if isinstance(value, bytes) else str(value)


def _of(given: dict[str, Any], name: str, axis: int, default: int) -> int:
    values = given.get(name)
    return int(values[axis]) if values else default
