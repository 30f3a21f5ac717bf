"""A walk through a graph that keeps, for every tensor, what happened to height and width on the way from the input."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from ..protos import attributes
from .axis import Axis, length_of
from .layout import reshaped
from .maps import SAME, AxisMap, UnknownMapError, convolution, resize, spread, transposed, window
from .shapes import Length, Value, Values, constant_values, evaluate, sliced


class Grid(NamedTuple):
    """A tensor with height and width among its axes; of the others the size, None where it is not known."""

    axes: tuple[Axis | int | None, ...]

    @property
    def is_image(self) -> bool:
        """(batch, C, height, width)"""
        kinds = [axis.side if isinstance(axis, Axis) else "" for axis in self.axes]
        return kinds == ["", "", "h", "w"]

    def sides(self) -> list[Axis]:
        return [axis for axis in self.axes if isinstance(axis, Axis)]


class Mixed(NamedTuple):
    """A tensor in which positions are mixed, or of which it is not known.

    reason: the operator. is_layout: it only laid the data out anew, so that the next one that computes says more.
    """

    reason: str
    is_layout: bool = False


ELEMENTWISE = (
    "Abs", "Acos", "Acosh", "Add", "And", "Asin", "Asinh", "Atan", "Atanh", "BitShift", "BitwiseAnd",
    "BitwiseNot", "BitwiseOr", "BitwiseXor", "Cast", "CastLike", "Ceil", "Celu", "Clip", "Cos", "Cosh", "Div",
    "Dropout", "Elu", "Equal", "Erf", "Exp", "Floor", "Gelu", "Greater", "GreaterOrEqual", "HardSigmoid",
    "HardSwish", "Identity", "IsInf", "IsNaN", "LRN", "LeakyRelu", "Less", "LessOrEqual", "Log", "Max", "Mean",
    "Min", "Mish", "Mod", "Mul", "Neg", "Not", "Or", "PRelu", "Pow", "Reciprocal", "Relu", "Round", "Selu",
    "Shrink", "Sigmoid", "Sign", "Sin", "Sinh", "Softplus", "Softsign", "Sqrt", "Sub", "Sum", "Swish", "Tan",
    "Tanh", "ThresholdedRelu", "Where", "Xor",
)  # fmt: skip
LAYOUT = (
    "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Split", "Gather", "Expand", "Concat",
    "Tile",
)  # fmt: skip
PER_CHANNEL = ("BatchNormalization", "QuantizeLinear", "DequantizeLinear")
ALONG_ONE_AXIS = ("Softmax", "LogSoftmax", "Hardmax", "LpNormalization")
REDUCTIONS = (
    "ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1",
    "ReduceL2", "ReduceLogSum", "ReduceLogSumExp",
)  # fmt: skip
SPATIAL_RANK = 4
FAR = 2**31 - 1  # an end of Slice from here on means the end


class _CannotFollowError(Exception):
    """This node mixes positions, or does what is not known here; the message, if any, says more than its name."""


class Walk:
    """All tensors of a graph, by name, as far as they depend on its one input, whose height and width are multiples of
    `multiple`."""

    def __init__(self, model: onnx.ModelProto, multiple: int) -> None:
        graph, self._multiple = model.graph, multiple
        self._constants = {entry.name: numpy_helper.to_array(entry) for entry in graph.initializer}
        self._values: dict[str, Values] = {}
        self._floats: set[str] = set()  # of these
        self._tensors: dict[str, Grid | Mixed] = {}
        for value in graph.input:
            if value.name not in self._constants:
                self._tensors[value.name] = _input(value)
        for node in graph.node:
            self._visit(node)

    def found(self, name: str) -> Grid | Mixed:
        return self._tensors.get(name, Mixed("an output that does not depend on the input"))

    def _visit(self, node: onnx.NodeProto) -> None:
        given = attributes(node)
        data = [self._tensors[name] for name in node.input if name in self._tensors]
        if node.op_type == "Constant" or (not data and node.op_type in (*PER_CHANNEL, "Identity", "Cast")):
            self._keep_constant(node, given)
        if node.output[0] in self._constants:
            return
        if node.op_type == "Shape" and data and isinstance(data[0], Grid):
            self._values[node.output[0]] = sliced([length_of(axis) for axis in data[0].axes], given)
        elif not data and (values := self._evaluate(node, given)) is not None:
            self._values[node.output[0]] = values
        else:
            self._visit_data(node, given, data)

    def _evaluate(self, node: onnx.NodeProto, given: dict[str, Any]) -> Values | None:
        whole = not any(map(self._is_float, node.input))
        to_float = helper.tensor_dtype_to_np_dtype(given["to"]).kind == "f" if "to" in given else not whole
        if to_float:
            self._floats.add(node.output[0])
        values = [self._value(name) for name in node.input]
        return evaluate(node, values, self._multiple, whole, rounds=not to_float)

    def _is_float(self, name: str) -> bool:
        return name in self._floats or (name in self._constants and self._constants[name].dtype.kind == "f")

    def _visit_data(self, node: onnx.NodeProto, given: dict[str, Any], data: list[Grid | Mixed]) -> None:
        name = f"{node.domain}.{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type
        mixed = sorted((one for one in data if isinstance(one, Mixed)), key=lambda one: one.is_layout)
        is_layout = name in LAYOUT
        if mixed:
            plain = is_layout or name in ELEMENTWISE or not mixed[0].is_layout
            results: list[Grid | Mixed] = [mixed[0] if plain else Mixed(name)]
        else:
            try:
                results = list(self._follow(name, node, given))
            except UnknownMapError as error:
                results = [Mixed(f"{name} ({error})")]
            except (_CannotFollowError, IndexError, KeyError, TypeError, ValueError):
                results = [Mixed(name, is_layout)]
        for position, output in enumerate(node.output):
            self._tensors[output] = results[min(position, len(results) - 1)]

    def _follow(self, name: str, node: onnx.NodeProto, given: dict[str, Any]) -> Iterable[Grid | Mixed]:
        if name in ELEMENTWISE:
            return [self._broadcast(node.input)]
        if name in PER_CHANNEL:
            return [self._grid(node)]
        if name in ALONG_ONE_AXIS:
            return [self._untouched(node, [given.get("axis", -1)])]
        if name in REDUCTIONS:
            return [self._reduce(node, given)]
        if name not in _FOLLOWED:
            raise _CannotFollowError
        return _FOLLOWED[name](self, node, given)

    # What the nodes read.

    def _grid(self, node: onnx.NodeProto, position: int = 0) -> Grid:
        found = self._tensors.get(node.input[position])
        if not isinstance(found, Grid):
            raise _CannotFollowError
        return found

    def _image(self, node: onnx.NodeProto) -> Grid:
        grid = self._grid(node)
        if not grid.is_image:
            raise _CannotFollowError
        return grid

    def _value(self, name: str) -> Values | None:
        if name in self._constants:
            return constant_values(self._constants[name])
        return self._values.get(name)

    def _optional(self, node: onnx.NodeProto, position: int) -> Values | None:
        """The values of an input that may be left out; one that is there but not known ends the walk here."""
        if len(node.input) <= position or not node.input[position]:
            return None
        values = self._value(node.input[position])
        if values is None:
            raise _CannotFollowError
        return values

    def _integers(self, node: onnx.NodeProto, position: int, default: list[int] | None = None) -> list[int]:
        values = self._optional(node, position)
        if values is None:
            if default is None:
                raise _CannotFollowError
            return default
        return [_integer(value) for value in values]

    def _keep_constant(self, node: onnx.NodeProto, given: dict[str, Any]) -> None:
        if node.op_type == "Constant":
            ((name, value),) = given.items()
            self._constants[node.output[0]] = numpy_helper.to_array(value) if name == "value" else np.asarray(value)
        elif node.input[0] in self._constants:  # of quantised weights the shape alone is of use
            value = self._constants[node.input[0]]
            to = helper.tensor_dtype_to_np_dtype(given["to"]) if "to" in given else value.dtype
            self._constants[node.output[0]] = value.astype(to)

    # What the nodes do.

    def _broadcast(self, names: Iterable[str]) -> Grid:
        """Operators that work position by position, on tensors, constants and single numbers."""
        columns: dict[int, list[Axis | int | None]] = {}
        for name in names:
            if not name:
                continue
            for position, size in enumerate(reversed(self._sizes(name)), start=1):
                columns.setdefault(position, []).append(size)
        return Grid(tuple(_together(columns[position]) for position in range(len(columns), 0, -1)))

    def _sizes(self, name: str) -> tuple[Axis | int | None, ...]:
        if name in self._constants:
            return self._constants[name].shape
        if name in self._values:
            if len(self._values[name]) != 1 or not isinstance(self._values[name][0], Fraction):
                raise _CannotFollowError  # a number that depends on the size of the image
            return ()
        found = self._tensors[name]
        assert isinstance(found, Grid)
        return found.axes

    def _untouched(self, node: onnx.NodeProto, axes: Iterable[int]) -> Grid:
        """The same grid after an operator along other axes than height and width."""
        grid = self._grid(node)
        if any(isinstance(grid.axes[axis], Axis) for axis in axes):
            raise _CannotFollowError
        return grid

    def _reduce(self, node: onnx.NodeProto, given: dict[str, Any]) -> Grid:
        axes = list(given["axes"]) if "axes" in given else self._integers(node, 1)
        grid = self._untouched(node, axes)
        gone = {axis % len(grid.axes) for axis in axes}
        sizes = [1 if position in gone else axis for position, axis in enumerate(grid.axes)]
        keep = given.get("keepdims", 1)
        return Grid(tuple(size for position, size in enumerate(sizes) if keep or position not in gone))

    def _layer_normalization(self, node: onnx.NodeProto, given: dict[str, Any]) -> list[Grid | Mixed]:
        rank = len(self._grid(node).axes)
        return [self._untouched(node, range(given.get("axis", -1) % rank, rank)), Mixed(node.op_type)]

    def _on_sides(self, node: onnx.NodeProto, channels: int | None, maps: Iterable[AxisMap]) -> list[Grid | Mixed]:
        grid = self._image(node)
        sides = [axis.through(one) for axis, one in zip(grid.sides(), maps, strict=True)]
        return [Grid((grid.axes[0], channels, *sides)), Mixed(node.op_type)]

    def _conv(self, node: onnx.NodeProto, given: dict[str, Any]) -> list[Grid | Mixed]:
        kernel = self._kernel(node)
        return self._on_sides(
            node, kernel.shape[0], [convolution(given, axis, kernel.shape[axis + 2]) for axis in (0, 1)]
        )

    def _conv_transpose(self, node: onnx.NodeProto, given: dict[str, Any]) -> list[Grid | Mixed]:
        kernel = self._kernel(node)
        channels = kernel.shape[1] * given.get("group", 1)
        return self._on_sides(node, channels, [transposed(given, axis, kernel.shape[axis + 2]) for axis in (0, 1)])

    def _kernel(self, node: onnx.NodeProto) -> NDArray[Any]:
        kernel = self._constants.get(node.input[1])
        if kernel is None or kernel.ndim != SPATIAL_RANK:
            raise _CannotFollowError
        return kernel

    def _pool(self, node: onnx.NodeProto, given: dict[str, Any]) -> list[Grid | Mixed]:
        channels = _size(self._image(node).axes[1])
        return self._on_sides(
            node, channels, [convolution(given, axis, given["kernel_shape"][axis]) for axis in (0, 1)]
        )

    def _depth_to_space(self, node: onnx.NodeProto, given: dict[str, Any]) -> list[Grid | Mixed]:
        block, channels = given["blocksize"], _size(self._image(node).axes[1])
        fewer = channels // block**2 if channels else None
        return self._on_sides(node, fewer, [spread(block, 0, block, 0)] * 2)

    def _space_to_depth(self, node: onnx.NodeProto, given: dict[str, Any]) -> list[Grid | Mixed]:
        block, channels = given["blocksize"], _size(self._image(node).axes[1])
        return self._on_sides(node, channels * block**2 if channels else None, [window(block, 0, 0, block)] * 2)

    def _resize(self, node: onnx.NodeProto, given: dict[str, Any]) -> list[Grid | Mixed]:
        grid = self._image(node)
        scales, sizes = self._optional(node, 2) or None, self._optional(node, 3)
        axes = [axis % SPATIAL_RANK for axis in given.get("axes", range(SPATIAL_RANK))]
        if given.get("keep_aspect_ratio_policy", b"stretch") != b"stretch":
            raise UnknownMapError("keep_aspect_ratio_policy")
        for position in set(axes) & {0, 1}:  # batch and channels
            stays = scales[axes.index(position)] == 1 if scales else True
            if not stays:
                raise UnknownMapError("of channels")
        factors = []
        for position, axis in enumerate(grid.sides(), start=2):
            value = (scales or sizes or [])[axes.index(position)] if position in axes else Fraction(1)
            factors.append(value if scales or position not in axes else _growth(axis, value))
        return self._on_sides(node, _size(grid.axes[1]), [_resize_map(factor, given) for factor in factors])

    def _pad(self, node: onnx.NodeProto, given: dict[str, Any]) -> list[Grid | Mixed]:
        grid, mode = self._grid(node), given.get("mode", b"constant")
        pads, axes = self._integers(node, 1), self._integers(node, 3, list(range(len(grid.axes))))
        if mode not in (b"constant", b"edge", b"reflect"):
            raise UnknownMapError(f"mode {mode.decode()!r}")
        sizes = list(grid.axes)
        for place, position in enumerate(axes):
            begin, end = pads[place], pads[place + len(axes)]
            axis = sizes[position]
            if isinstance(axis, Axis) and (begin or end):
                repeated = {b"constant": None, b"edge": (0, 0), b"reflect": (max(begin, 0), max(end, 0))}[mode]
                sizes[position] = axis.through(window(1, begin, end, 1, repeated))
            elif begin or end:
                sizes[position] = None
        return [Grid(tuple(sizes))]

    def _slice(self, node: onnx.NodeProto, given: dict[str, Any]) -> list[Grid | Mixed]:
        grid, starts, ends = self._grid(node), self._optional(node, 1), self._optional(node, 2)
        if starts is None or ends is None:
            raise _CannotFollowError
        axes = self._integers(node, 3, list(range(len(starts))))
        steps = self._integers(node, 4, [1] * len(starts))
        sizes = list(grid.axes)
        for position, start, end, step in zip(axes, starts, ends, steps, strict=True):
            axis = sizes[position]
            sizes[position] = _sliced_side(axis, start, end, step) if isinstance(axis, Axis) else None
        return [Grid(tuple(sizes))]

    def _concat(self, node: onnx.NodeProto, given: dict[str, Any]) -> list[Grid | Mixed]:
        grids = [self._grid(node, position) for position in range(len(node.input))]
        along = given["axis"] % len(grids[0].axes)
        columns = list(zip(*(grid.axes for grid in grids), strict=True))
        if any(isinstance(axis, Axis) for axis in columns[along]):
            raise _CannotFollowError
        known = [axis for axis in columns[along] if isinstance(axis, int)]
        total = sum(known) if len(known) == len(grids) else None
        together = (total if position == along else _together(list(axes)) for position, axes in enumerate(columns))
        return [Grid(tuple(together))]

    def _split(self, node: onnx.NodeProto, given: dict[str, Any]) -> list[Grid | Mixed]:
        grid, along = self._grid(node), given.get("axis", 0)
        self._untouched(node, [along])
        along %= len(grid.axes)
        return [Grid(tuple(None if position == along else axis for position, axis in enumerate(grid.axes)))]

    def _gather(self, node: onnx.NodeProto, given: dict[str, Any]) -> list[Grid | Mixed]:
        indices, along = self._constants[node.input[1]], given.get("axis", 0)
        grid = self._untouched(node, [along])
        along %= len(grid.axes)
        return [Grid((*grid.axes[:along], *indices.shape, *grid.axes[along + 1 :]))]

    def _squeeze(self, node: onnx.NodeProto, given: dict[str, Any]) -> list[Grid | Mixed]:
        axes = self._integers(node, 1)
        grid = self._untouched(node, axes)
        gone = {axis % len(grid.axes) for axis in axes}
        return [Grid(tuple(axis for position, axis in enumerate(grid.axes) if position not in gone))]

    def _unsqueeze(self, node: onnx.NodeProto, given: dict[str, Any]) -> list[Grid | Mixed]:
        axes, sizes = self._integers(node, 1), list(self._grid(node).axes)
        for position in sorted(axis % (len(sizes) + len(axes)) for axis in axes):
            sizes.insert(position, 1)
        return [Grid(tuple(sizes))]

    def _transpose(self, node: onnx.NodeProto, given: dict[str, Any]) -> list[Grid | Mixed]:
        grid = self._grid(node)
        return [Grid(tuple(grid.axes[position] for position in given["perm"]))]

    def _expand(self, node: onnx.NodeProto, given: dict[str, Any]) -> list[Grid | Mixed]:
        """Height and width keep their sizes: engines refuse to make others of them, unless they are 1."""
        axes, target = self._grid(node).axes, self._optional(node, 1) or []
        rank = max(len(axes), len(target))
        axes, ones = (1,) * (rank - len(axes)) + axes, [Fraction(1)] * (rank - len(target))
        return [Grid(tuple(map(_expanded, range(rank), axes, [*ones, *target])))]

    def _tile(self, node: onnx.NodeProto, given: dict[str, Any]) -> list[Grid | Mixed]:
        grid, repeats = self._grid(node), self._integers(node, 1)
        grid = self._untouched(node, [position for position, times in enumerate(repeats) if times != 1])
        pairs = zip(grid.axes, repeats, strict=True)
        return [Grid(tuple(axis * times if isinstance(axis, int) else axis for axis, times in pairs))]

    def _reshape(self, node: onnx.NodeProto, given: dict[str, Any]) -> list[Grid | Mixed]:
        target = self._optional(node, 1)
        axes = reshaped(self._grid(node).axes, target or [], bool(given.get("allowzero", 0)))
        if axes is None:
            raise _CannotFollowError
        return [Grid(axes)]

    def _matmul(self, node: onnx.NodeProto, given: dict[str, Any]) -> list[Grid | Mixed]:
        """A linear layer over the last axis, with constant weights."""
        weight, grid = self._constants[node.input[1]], self._untouched(node, [-1])
        if weight.ndim != 2:
            raise _CannotFollowError
        return [Grid((*grid.axes[:-1], weight.shape[1]))]


_Follow = Callable[[Walk, onnx.NodeProto, dict[str, Any]], list[Grid | Mixed]]
_FOLLOWED: dict[str, _Follow] = {
    "Conv": Walk._conv,
    "ConvTranspose": Walk._conv_transpose,
    "MaxPool": Walk._pool,
    "AveragePool": Walk._pool,
    "LpPool": Walk._pool,
    "Resize": Walk._resize,
    "DepthToSpace": Walk._depth_to_space,
    "SpaceToDepth": Walk._space_to_depth,
    "Pad": Walk._pad,
    "Slice": Walk._slice,
    "Concat": Walk._concat,
    "Split": Walk._split,
    "Gather": Walk._gather,
    "Squeeze": Walk._squeeze,
    "Unsqueeze": Walk._unsqueeze,
    "Transpose": Walk._transpose,
    "Expand": Walk._expand,
    "Tile": Walk._tile,
    "Reshape": Walk._reshape,
    "MatMul": Walk._matmul,
    "LayerNormalization": Walk._layer_normalization,
}


def _input(value: onnx.ValueInfoProto) -> Grid | Mixed:
    sizes = [dimension.dim_value or None for dimension in value.type.tensor_type.shape.dim]
    if len(sizes) != SPATIAL_RANK:
        return Mixed("an input that is no image")
    return Grid((None, sizes[1], Axis("h", Fraction(1), 0), Axis("w", Fraction(1), 0)))


def _size(axis: Axis | int | None) -> int | None:
    return axis if isinstance(axis, int) else None


def _integer(value: Value) -> int:
    if not isinstance(value, Fraction) or value.denominator != 1:
        raise _CannotFollowError
    return int(value)


def _together(sizes: list[Axis | int | None]) -> Axis | int | None:
    """One axis of the result of several operands."""
    sides = [size for size in sizes if isinstance(size, Axis)]
    if not sides:
        return next((size for size in sizes if size != 1), 1)
    if any(size != 1 for size in sizes if not isinstance(size, Axis)) or not all(map(sides[0].matches, sides)):
        raise _CannotFollowError  # a constant that differs from position to position, or another size
    return sides[0].joined(sides[1:])


def _expanded(position: int, axis: Axis | int | None, size: Value) -> Axis | int | None:
    if isinstance(axis, Axis):
        return axis
    if isinstance(size, Fraction):
        return axis if axis != 1 else _integer(size)
    if isinstance(size, Length) or position or axis is not None:
        raise _CannotFollowError  # as many as there are positions, perhaps, where there were none
    return None  # the batch


def _growth(axis: Axis, size: Value) -> Fraction:
    """The factor by which a side grows to `size`."""
    if not isinstance(size, Length) or size.side != axis.side or size.extra or axis.extra:
        raise UnknownMapError("to a size that is no multiple of the input's")
    return size.times * axis.scale


def _resize_map(factor: Value, given: dict[str, Any]) -> AxisMap:
    if not isinstance(factor, Fraction) or factor <= 0 or factor.denominator > 64:
        raise UnknownMapError("by a factor that is not exact")
    if factor == 1:
        return SAME
    if given.get("antialias", 0) and factor < 1:
        raise UnknownMapError("antialias")
    mode, coordinates, rounding = (
        given.get(name, default).decode()
        for name, default in (
            ("mode", b"nearest"),
            ("coordinate_transformation_mode", b"half_pixel"),
            ("nearest_mode", b"round_prefer_floor"),
        )
    )
    return resize(factor, mode, coordinates, rounding)


def _sliced_side(axis: Axis, start: Value, end: Value, step: int) -> Axis:
    begin = _integer(start)
    if begin < 0 or step < 1:
        raise _CannotFollowError
    if isinstance(end, Length):
        if end.side != axis.side or end.times != 1 / axis.scale or end.extra.denominator != 1:
            raise _CannotFollowError
        missing = min(int(end.extra) - axis.extra, 0)
    else:
        missing = 0 if (last := _integer(end)) >= FAR else last
    if missing > 0:  # a fixed number of positions from the start
        raise _CannotFollowError
    return axis if (begin, missing, step) == (0, 0, 1) else axis.through(window(step, -begin, missing, 1))
