"""The receptive field computed from a graph against the one measured by changing its input, position by position."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from vae_export.receptive import ReceptiveField, receptive_fields, widest

SIZE, OTHER = 48, 24  # positions along the side that is measured, and along the other
MULTIPLE = 8  # of which both are
CHANNELS = 2


class Network:
    """A graph of positive weights without biases: an output changes exactly with what its field covers."""

    def __init__(self, seed: int = 0) -> None:
        self._random = np.random.default_rng(seed)
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, np.ndarray] = {}
        self.last, self.channels = "x", CHANNELS

    def add(self, operator: str, *constants: Any, before: tuple[str, ...] = (), **attributes: Any) -> Network:
        """One more node after the last; `before`: names that it reads ahead of the last one's output."""
        names = [self.constant(value) if value is not None else "" for value in constants]
        output = f"t{len(self._nodes)}"
        self._nodes.append(helper.make_node(operator, [*before, self.last, *names], [output], **attributes))
        self.last = output
        return self

    def node(self, operator: str, *names: str, **attributes: Any) -> str:
        output = f"t{len(self._nodes)}"
        self._nodes.append(helper.make_node(operator, list(names), [output], **attributes))
        return output

    def constant(self, value: Any) -> str:
        name = f"c{len(self._constants)}"
        self._constants[name] = np.asarray(value)
        return name

    def weights(self, *shape: int) -> np.ndarray:
        return self._random.uniform(0.5, 1.5, shape).astype(np.float32)

    def conv(self, kernel: int, stride: int = 1, pads: Any = None, dilation: int = 1, channels: int = 0, **more: Any):
        reach = (kernel - 1) * dilation
        pads = pads if pads is not None else [reach // 2] * 4
        made, self.channels = (channels or CHANNELS, self.channels, kernel, kernel), channels or CHANNELS
        if more.get("auto_pad", "NOTSET") == "NOTSET":
            more["pads"] = pads
        return self.add("Conv", self.weights(*made), strides=[stride] * 2, dilations=[dilation] * 2, **more)

    def transposed(self, kernel: int, stride: int, pad: int, output_padding: int = 0) -> Network:
        made = self.weights(self.channels, CHANNELS, kernel, kernel)
        self.channels = CHANNELS
        padding = {"pads": [pad] * 4, "output_padding": [output_padding] * 2}
        return self.add("ConvTranspose", made, strides=[stride] * 2, **padding)

    def nearest(self) -> Network:
        scales = np.array([1, 1, 2, 2], np.float32)
        return self.add("Resize", None, scales, mode="nearest", coordinate_transformation_mode="asymmetric")

    def rounded(self, scale: float, nearest_mode: str, coordinates: str = "half_pixel") -> Network:
        given = {"nearest_mode": nearest_mode, "coordinate_transformation_mode": coordinates}
        return self.add("Resize", None, np.array([1, 1, scale, scale], np.float32), mode="nearest", **given)

    def linear(self, scale: float = 2.0) -> Network:
        return self.add("Resize", None, np.array([1, 1, scale, scale], np.float32), mode="linear")

    def shuffle(self) -> Network:
        return self.conv(1, channels=4 * CHANNELS)._now(CHANNELS).add("DepthToSpace", blocksize=2, mode="CRD")

    def unshuffle(self) -> Network:
        return self._now(4 * self.channels).add("SpaceToDepth", blocksize=2)

    def pad(self, begin: int, end: int, mode: str = "constant") -> Network:
        return self.add("Pad", np.array([0, 0, begin, begin, 0, 0, end, end]), mode=mode)

    def crop(self, begin: int, end: int) -> Network:
        bounds = [np.array([begin] * 2), np.array([-end if end else 2**62] * 2), np.array([2, 3])]
        return self.add("Slice", *bounds)

    def slice(self, *bounds: Any) -> Network:
        """Starts, ends, axes and steps, each as numbers or the name of what computes them."""
        names = [bound if isinstance(bound, str) else self.constant(np.array(bound)) for bound in bounds]
        self.last = self.node("Slice", self.last, *names)
        return self

    def dims(self, start: int, end: int) -> str:
        return self.node("Shape", self.last, start=start, end=end)

    def pixels(self, *target: Any, perm: list[int], channels: int) -> Network:
        """Reshape, Transpose, Reshape, as exporters write PixelShuffle and its inverse."""
        parts = [name if isinstance(name, str) else self.constant(np.array(name)) for name in target]
        before, after = (self.node("Concat", *part, axis=0) for part in (parts[: len(parts) - 3], parts[-3:]))
        self.last = self.node("Reshape", self.last, before)
        self.last = self.node("Transpose", self.last, perm=perm)
        self.last = self.node("Reshape", self.last, after)
        return self._now(channels)

    def _now(self, channels: int) -> Network:
        self.channels = channels
        return self

    def model(self) -> onnx.ModelProto:
        sides = [["batch", CHANNELS, "h", "w"], [None] * 4]
        values = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
            for name, shape in zip(("x", self.last), sides, strict=True)
        ]
        constants = [numpy_helper.from_array(value, name) for name, value in self._constants.items()]
        graph = helper.make_graph(self._nodes, "graph", values[:1], values[1:], constants)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def two_shortcuts(network: Network) -> Network:
    start = network.last
    return network.conv(3).conv(5).add("Add", before=(start,)).add("Relu")


def shuffle_by_reshape(network: Network) -> Network:
    network.conv(1, channels=4 * CHANNELS)
    h, w = network.dims(2, 3), network.dims(3, 4)
    two = network.constant(np.array([2]))
    doubled = [network.node("Mul", side, two) for side in (h, w)]
    target = ([-1], [CHANNELS], [2], [2], h, w, network.node("Concat", *_minus(network, CHANNELS), axis=0), *doubled)
    return network.pixels(*target, perm=[0, 1, 4, 2, 5, 3], channels=CHANNELS)


def unshuffle_by_reshape(network: Network) -> Network:
    two = network.constant(np.array([2]))
    h, w = (network.node("Div", network.dims(axis, axis + 1), two) for axis in (2, 3))
    channels = network.channels
    target = ([-1], [channels], h, [2], w, [2], network.node("Concat", *_minus(network, 4 * channels), axis=0), h, w)
    return network.pixels(*target, perm=[0, 1, 3, 5, 2, 4], channels=4 * channels)


def _minus(network: Network, channels: int) -> list[str]:
    return [network.constant(np.array([-1])), network.constant(np.array([channels]))]


def to_twice_the_size(network: Network) -> Network:
    """Resize to sizes that the graph computes, as scripts of older exporters do."""
    doubled = network.node("Mul", network.dims(2, 4), network.constant(np.array([2])))
    sizes = network.node("Concat", network.dims(0, 2), doubled, axis=0)
    network.last = network.node("Resize", network.last, "", "", sizes, mode="nearest", nearest_mode="floor")
    return network


def halved(network: Network, length: str) -> str:
    """(N - 1) / 2 + 1 in whole numbers, as exporters write the size behind a convolution of stride 2."""
    one, two = (network.constant(np.array([number])) for number in (1, 2))
    return network.node("Add", network.node("Div", network.node("Sub", length, one), two), one)


def strided_sizes(network: Network) -> list[str]:
    """Height and width behind two more convolutions, of stride 2, from those of the input."""
    sides = [network.node("Shape", "x", start=axis, end=axis + 1) for axis in (2, 3)]
    network.conv(3, 2).conv(3, 2)
    return [halved(network, halved(network, side)) for side in sides]


def divided_by_the_norm(network: Network) -> Network:
    """x / max(|x|, 1e-12) over the channels, as torch.nn.functional.normalize is exported."""
    sides = strided_sizes(network)
    channels = network.constant(np.array([network.channels]))
    target = network.node("Concat", network.dims(0, 1), channels, *sides, axis=0)
    norm = network.node("ReduceL1", network.last, network.constant(np.array([1])), keepdims=1)
    clipped = network.node("Clip", norm, network.constant(np.float32(1e-12)))
    expanded = network.node("Expand", clipped, target)
    network.last = network.node("Div", network.last, expanded)
    return network


def summed_by_groups(network: Network) -> Network:
    """Channels in groups, each replaced by its sum, as averages over groups of channels are exported."""
    sides = strided_sizes(network.conv(1))
    batch, groups, rest = network.dims(0, 1), network.constant(np.array([1])), network.constant(np.array([-1]))
    network.last = network.node("Reshape", network.last, network.node("Concat", batch, groups, rest, *sides, axis=0))
    return network.add("ReduceSum", np.array([2]), keepdims=0).add("Tile", np.array([1, CHANNELS, 1, 1])).conv(3)


def joined_and_split(network: Network) -> Network:
    """Channels of two tensors side by side, and half of them again."""
    start = network.last
    network.conv(3).add("Concat", before=(start,), axis=-3)._now(2 * CHANNELS).conv(3, channels=2 * CHANNELS)
    first, second = (f"{network.last}_{index}" for index in range(2))
    network._nodes.append(helper.make_node("Split", [network.last], [first, second], axis=-3, num_outputs=2))
    network.last = second
    return network._now(CHANNELS).conv(3)


def weighted_by_channels(network: Network) -> Network:
    mean = network.node("ReduceMean", network.last, network.constant(np.array([-3])), keepdims=1)
    network.last = network.node("Mul", network.last, mean)
    return network


def cut_to_the_size(network: Network) -> Network:
    """Padding is cut off by the size that the image had."""
    one = network.constant(np.array([1]))
    ends = network.node("Add", network.dims(2, 4), one)
    return network.pad(1, 1).slice([1, 1], ends, [2, 3], [1, 1])


def part_of(network: Network, divisor: int, *dims: int) -> Network:
    """The first rows, as many as a part of one of the sides."""
    end = network.node("Div", network.dims(*dims), network.constant(np.array([divisor])))
    return network.slice([0], end, [2], [1])


# Architectures whose operators are linear with positive weights: there the computed field is the measured one.
EXACT: dict[str, Callable[[Network], Network]] = {
    "one": lambda n: n.conv(3),
    "diffusers-down": lambda n: n.conv(3).pad(0, 1).conv(3, 2, [0] * 4).conv(3).pad(0, 1).conv(3, 2, [0] * 4).conv(3),
    "strided": lambda n: n.conv(4, 2, [1] * 4).conv(4, 2, [1] * 4).conv(5),
    "dilated": lambda n: n.conv(3, dilation=2).conv(3, dilation=4).conv(3),
    "same": lambda n: n.conv(4, 2, auto_pad="SAME_UPPER").conv(3, auto_pad="SAME_LOWER"),
    "same-upper": lambda n: n.conv(3, 2, auto_pad="SAME_UPPER").conv(3),
    "same-lower": lambda n: n.conv(3, 2, auto_pad="SAME_LOWER").conv(3),
    "valid": lambda n: n.pad(1, 1).conv(3, auto_pad="VALID"),
    "defaults": lambda n: n.pad(1, 1).add("Conv", n.weights(2, 2, 3, 3)).add("ConvTranspose", n.weights(2, 2, 1, 1)),
    "nearest": lambda n: n.conv(3).nearest().conv(3).nearest().conv(5).nearest().conv(3),
    "sizes": lambda n: to_twice_the_size(n.conv(3)).conv(3),
    "sizes-again": lambda n: to_twice_the_size(n.conv(4, 2, [1] * 4)).conv(3),
    "thrice": lambda n: n.rounded(3, "floor", "asymmetric").conv(3),
    "half-floor": lambda n: n.conv(3).rounded(0.5, "round_prefer_floor").conv(3),
    "half-ceil": lambda n: n.conv(3).rounded(0.5, "round_prefer_ceil").conv(3),
    "half-up": lambda n: n.conv(3).rounded(0.5, "ceil").conv(3),
    "linear": lambda n: n.linear().conv(3),
    "half": lambda n: n.conv(3).linear(0.5).conv(3),
    "transposed": lambda n: n.conv(3).transposed(4, 2, 1).transposed(4, 2, 1).conv(3),
    "transposed-3": lambda n: n.transposed(3, 2, 1, 1).transposed(2, 2, 0),
    "transposed-valid": lambda n: n.add("ConvTranspose", n.weights(2, 2, 2, 2), strides=[2, 2], auto_pad="VALID").conv(
        3
    ),
    "transposed-uneven": lambda n: n.add(
        "ConvTranspose", n.weights(2, 2, 4, 4), strides=[2, 2], pads=[0, 0, 2, 2]
    ).conv(3),
    "longer-then-valid": lambda n: n.transposed(3, 2, 0).conv(2, pads=[0] * 4),
    "shuffle": lambda n: n.conv(3).shuffle().conv(3).shuffle(),
    "unshuffle": lambda n: n.unshuffle().conv(3).unshuffle().conv(3),
    "reshaped": lambda n: shuffle_by_reshape(n.conv(3)).conv(3),
    "unreshaped": lambda n: unshuffle_by_reshape(n.conv(3)).conv(3),
    "norm": lambda n: divided_by_the_norm(n.conv(3)).conv(3),
    "groups": lambda n: summed_by_groups(n).nearest(),
    "shortcut": lambda n: two_shortcuts(n.conv(3, 2)),
    "pools": lambda n: n.conv(3).add("MaxPool", kernel_shape=[2, 2], strides=[2, 2]).conv(3),
    "ceil": lambda n: n.add("MaxPool", kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1).conv(3),
    "ceil-padded": lambda n: n.add("MaxPool", kernel_shape=[3, 3], strides=[2, 2], pads=[0, 0, 1, 1], ceil_mode=1).conv(
        3
    ),
    "enlarged-valid": lambda n: n.conv(3, pads=[0] * 4).nearest().pad(2, 2).conv(3),
    "up-and-down": lambda n: n.transposed(4, 2, 1).conv(3).conv(4, 2, [1] * 4).conv(4, 2, [1] * 4),
    "valid-then-pad": lambda n: n.conv(5, pads=[0] * 4).conv(3, pads=[0] * 4).pad(3, 3),
    "channels": joined_and_split,
    "weighted": lambda n: weighted_by_channels(n.conv(3)).conv(3),
    "gathered": lambda n: n.conv(3).add("Gather", np.array([1, 0]), axis=-3).conv(3),
    "squeezed": lambda n: n.conv(3).add("Unsqueeze", np.array([1])).add("Squeeze", np.array([-4])).conv(3),
    "mixed-channels": lambda n: (
        n.conv(3)
        .add("Transpose", perm=[0, 2, 3, 1])
        .add("MatMul", n.weights(2, 2))
        .add("Transpose", perm=[0, 3, 1, 2])
        .conv(3)
    ),
    "resized-by-axes": lambda n: n.add("Resize", None, np.array([2, 2], np.float32), mode="nearest", axes=[3, 2]).conv(
        3
    ),
    "every-second": lambda n: n.conv(3).slice([0, 0], [2**62] * 2, [2, -1], [2, 2]).conv(3),
    "cut-to-size": lambda n: cut_to_the_size(n.conv(3)).conv(3),
    "crop": lambda n: n.pad(2, 2).conv(3).crop(1, 1).conv(3, pads=[0] * 4),
    # Padding that repeats reaches further at the border than elsewhere.
    "reflect": lambda n: n.pad(3, 3, "reflect").conv(7, pads=[0] * 4).nearest().pad(1, 1, "edge").conv(3, pads=[0] * 4),
    "shift": lambda n: n.pad(5, 0, "reflect").conv(6, pads=[0] * 4),
    "shift-back": lambda n: n.pad(0, 5, "reflect").conv(6, pads=[0] * 4),
    "valid-then-before": lambda n: n.conv(3, pads=[0] * 4).pad(4, 0, "reflect").conv(3, pads=[0] * 4),
    "valid-then-after": lambda n: n.conv(3, pads=[0] * 4).pad(0, 4, "reflect").conv(3, pads=[0] * 4),
}
# Where a bound is enough: weights of both signs, and outputs that no input reaches.
BOUNDED: dict[str, Callable[[Network], Network]] = {
    "cubic": lambda n: n.add("Resize", None, np.array([1, 1, 2, 2], np.float32), mode="cubic").conv(3),
    "holes": lambda n: n.transposed(1, 2, 0, 1).conv(3),
}


def measure(session: onnxruntime.InferenceSession, side: int) -> tuple[int, int, int, Fraction]:
    """Context before and after and size of the field along height (2) or width (3), by changing one row or column."""
    inputs = np.zeros((SIZE, CHANNELS, *((SIZE, OTHER) if side == 2 else (OTHER, SIZE))), np.float32)
    for position in range(SIZE):
        inputs[(position, slice(None), *([position, slice(None)] if side == 2 else [slice(None), position]))] = 1
    output = session.run(None, {"x": inputs})[0]
    assert output.shape[side] * SIZE % output.shape[side] == 0
    ratio = Fraction(SIZE, output.shape[side])
    depends = np.abs(output).max(axis=(1, 5 - side)) > 0  # (input position, output position)
    before = after = size = 0
    for o in range(output.shape[side]):
        read = np.flatnonzero(depends[:, o])
        if len(read):
            place = int(o * ratio)
            before, after = max(before, place - read[0]), max(after, read[-1] - place)
            size = max(size, read[-1] - read[0] + 1)
    return before, after, size, ratio


def run_of(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    onnx.checker.check_model(model)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def field_of(model: onnx.ModelProto) -> ReceptiveField:
    (field,) = receptive_fields(model, MULTIPLE).values()
    return field


@pytest.mark.parametrize("name", EXACT)
def test_the_computed_field_is_the_measured_one(name: str) -> None:
    model = EXACT[name](Network()).model()
    session, field = run_of(model), field_of(model)
    for side in (2, 3):
        found = measure(session, side)
        assert (field.context_before, field.context_after, field.size, field.ratio) == found
        assert field.is_bounded


def random_network(seed: int) -> Network:
    random, network, growth = np.random.default_rng(seed), Network(seed), 0
    down = [lambda n: n.conv(4, 2, [1] * 4), lambda n: n.pad(0, 1).conv(3, 2, [0] * 4), Network.unshuffle]
    up = [Network.nearest, Network.shuffle, lambda n: n.transposed(4, 2, 1), Network.linear]
    same = [
        lambda n: n.conv(3),
        lambda n: n.conv(3, dilation=2),
        lambda n: n.pad(2, 2, "reflect").conv(5, pads=[0] * 4),
    ]
    same += [two_shortcuts, lambda n: n.pad(1, 1, "edge").conv(3, pads=[0] * 4)]
    for _ in range(random.integers(2, 7)):
        choices = same + (down if growth > -3 else []) + (up if growth < 2 else [])
        step = choices[random.integers(len(choices))]
        growth += (step in up) - (step in down)
        network = step(network.conv(1))
    return network


@pytest.mark.parametrize("name", [*BOUNDED, *EXACT, *range(25)])
def test_a_window_alone_gives_what_the_whole_image_gives_inside_its_context(name: str | int) -> None:
    network = random_network(name) if isinstance(name, int) else {**EXACT, **BOUNDED}[name](Network())
    model = network.model()
    session, field = run_of(model), field_of(model)
    assert field.is_bounded
    unit = 8 * field.alignment
    length = 2 * max(field.context_before + field.context_after, unit)
    length += -length % unit + 2 * unit
    x = np.random.default_rng(1).uniform(0.5, 1.5, (1, CHANNELS, 24, length)).astype(np.float32)
    whole = session.run(None, {"x": x})[0]
    for start, stop in ((0, length - unit), (unit, length), (unit, length - unit)):
        part = session.run(None, {"x": x[..., start:stop]})[0]
        offset = int(start / field.ratio)
        good = 0
        for o in range(part.shape[-1]):
            place = int((o + offset) * field.ratio)
            begins = start == 0 or place - field.context_before >= start
            ends = stop == length or place + field.context_after < stop
            if begins and ends:
                good += 1
                np.testing.assert_allclose(part[..., o], whole[..., o + offset], rtol=1e-5)
        assert good > 0


@pytest.mark.parametrize("seed", range(25))
def test_nothing_outside_the_computed_field_changes_an_output(seed: int) -> None:
    model = random_network(seed).model()
    session, field = run_of(model), field_of(model)
    for side in (2, 3):
        before, after, size, ratio = measure(session, side)
        assert field.context_before >= before
        assert field.context_after >= after
        assert field.size >= size
        assert field.ratio == ratio


def test_padding_that_repeats_reaches_inwards() -> None:
    field = field_of(EXACT["shift"](Network()).model())
    assert (field.context_before, field.context_after) == (5, 5)  # the first output sees input position 5, mirrored


def channel_norm(network: Network) -> Network:
    """LayerNorm over channels: channels last, normalised, a linear layer, and back."""
    network.add("Transpose", perm=[0, 2, 3, 1])
    network.add("LayerNormalization", network.weights(CHANNELS), axis=-1)
    network.add("MatMul", network.weights(CHANNELS, CHANNELS))
    return network.add("Transpose", perm=[0, 3, 1, 2])


def attention(network: Network) -> Network:
    network.add("Reshape", np.array([0, 0, -1]))
    query = network.last
    keys = network.node("Transpose", query, perm=[0, 2, 1])
    network.last = network.node("MatMul", keys, query)
    return network.add("Softmax", axis=-1)


def copies_of_all(network: Network, read: int) -> Network:
    """As many copies of each channel as there are positions, in front of height and width; `read`: which of these is
    kept, and which channel that is depends on the size."""
    count = network.node("Mul", network.dims(2, 3), network.dims(3, 4))
    sizes = network.node("Concat", network.dims(0, 1), count, network.dims(1, 4), axis=0)
    axis = network.constant(np.array([1]))
    expanded = network.node("Expand", network.node("Unsqueeze", network.last, axis), sizes)
    merged = network.node("Concat", network.dims(0, 2), count, network.dims(2, 4), axis=0)
    network.last = network.node("Reshape", expanded, merged)
    network.add("Gather", np.array(read), axis=2)
    return network.conv(3)


def padded_to(network: Network, multiple: int, float_arithmetic: bool = False) -> Network:
    """The width is padded to the next multiple with a number that is nowhere in the image, and cut off again."""
    width = network.dims(3, 4)
    if float_arithmetic:
        divided = network.node(
            "Div", network.node("Cast", width, to=1), network.constant(np.array([multiple], np.float32))
        )
        rounds = network.node("Cast", network.node("Ceil", divided), to=TensorProto.INT64)
    else:
        more = network.node("Add", width, network.constant(np.array([multiple - 1])))
        rounds = network.node("Div", more, network.constant(np.array([multiple])))
    target = network.node("Mul", rounds, network.constant(np.array([multiple])))
    missing, zero = network.node("Sub", target, width), network.constant(np.array([0]))
    pads = network.node("Concat", *[zero] * 7, missing, axis=0)
    network.last = network.node("Pad", network.last, pads, network.constant(np.float32(5)))
    network.conv(3)
    end, axis = width, network.constant(np.array([3]))
    network.last = network.node("Slice", network.last, zero, end, axis)
    return network


def by_the_size(network: Network) -> Network:
    """Divided by the number of rows: a window has fewer."""
    rows = network.node("Cast", network.dims(2, 3), to=TensorProto.FLOAT)
    network.last = network.node("Div", network.last, rows)
    return network


def everywhere(network: Network) -> Network:
    """An average over the image at every position of it."""
    sizes = network.node("Shape", network.last)
    network.conv(3).add("ReduceMean", np.array([2, 3]))
    network.last = network.node("Expand", network.last, sizes)
    return network.conv(3)


def copies(network: Network) -> Network:
    """As many as there are rows, added up: a window has fewer."""
    sizes = network.node("Concat", network.dims(0, 2), network.dims(2, 3), network.dims(2, 4), axis=0)
    axis = network.constant(np.array([2]))
    expanded = network.node("Expand", network.node("Unsqueeze", network.last, axis), sizes)
    network.last = network.node("ReduceSum", expanded, axis, keepdims=0)
    return network


UNBOUNDED: dict[str, tuple[Callable[[Network], Network], str]] = {
    "instance": (lambda n: n.add("InstanceNormalization", n.weights(2), n.weights(2)).conv(3), "InstanceNormalization"),
    "pool": (lambda n: n.add("GlobalAveragePool", before=()), "GlobalAveragePool"),
    "mean": (lambda n: n.conv(3).add("ReduceMean", np.array([2, 3])), "ReduceMean"),
    "attention": (attention, "MatMul"),
    "softmax": (lambda n: n.add("Softmax", axis=2), "Softmax"),
    "positions": (lambda n: n.add("Add", n.weights(1, 1, 48, 48)), "Add"),
    "size": (by_the_size, "Div"),
    "flip": (lambda n: n.add("Slice", *(np.array([value]) for value in (-1, -(2**62), 3, -1))), "Slice"),
    "corners": (lambda n: _resize(n, coordinate_transformation_mode="align_corners"), "Resize (coordinates"),
    "thrice": (lambda n: n.linear(3), "Resize (mode 'linear' by 3"),
    "same-remainder": (lambda n: n.conv(2, pads=[0] * 4).conv(2, 2, auto_pad="SAME_UPPER"), "Conv (auto_pad SAME"),
    "third": (lambda n: n.linear(1 / 3), "Resize (by a factor"),
    "sizes": (lambda n: n.add("Resize", None, None, np.array([1, 2, 48, 48]), mode="nearest"), "Resize (to a size"),
    "transposed": (lambda n: n.add("Transpose", perm=[0, 1, 3, 2]), "another layout"),
    "valid": (lambda n: n.conv(3, pads=[0] * 4), "an output that is no multiple"),
    "cropped": (lambda n: n.conv(3).crop(4, 4).pad(4, 4).conv(3), "Slice or cropping"),
    "cropped-before": (lambda n: n.conv(3).crop(2, 0).pad(0, 2).conv(3, pads=[1] * 4), "Slice or cropping"),
    "cropped-after": (lambda n: n.conv(3).crop(0, 2).pad(2, 0).conv(3, pads=[1] * 4), "Slice or cropping"),
    "ceil": (lambda n: n.add("MaxPool", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1), "MaxPool (ceil_mode"),
    "transposed-same": (
        lambda n: n.add("ConvTranspose", n.weights(2, 2, 3, 3), strides=[2, 2], auto_pad="SAME_UPPER"),
        "ConvTranspose (an output shape",
    ),
    "output-shape": (
        lambda n: n.add("ConvTranspose", n.weights(2, 2, 3, 3), strides=[2, 2], output_shape=[2 * SIZE, 2 * OTHER]),
        "ConvTranspose (an output shape",
    ),
    "antialias": (
        lambda n: n.add("Resize", None, np.array([1, 1, 0.5, 0.5], np.float32), mode="linear", antialias=1),
        "Resize (antialias)",
    ),
    "more-channels": (
        lambda n: n.add("Resize", None, np.array([1, 2, 2, 2], np.float32), mode="nearest"),
        "Resize (of channels)",
    ),
    "by-aspect": (
        lambda n: n.add("Resize", None, None, np.array([96, 96]), axes=[2, 3], keep_aspect_ratio_policy="not_larger"),
        "Resize (keep_aspect_ratio_policy)",
    ),
    "fixed-part": (lambda n: n.slice([0], [16], [2], [1]), "Slice"),
    "from-the-end": (lambda n: n.slice([-16], [2**62], [2], [1]), "Slice"),
    "first-half": (lambda n: part_of(n, 2, 2, 3), "Slice"),
    "by-the-width": (lambda n: part_of(n, 1, 3, 4), "Slice"),
    "rows-joined": (lambda n: n.add("Concat", before=(n.last,), axis=2), "Concat"),
    "rows-gathered": (lambda n: n.add("Gather", np.array([1, 0]), axis=2), "Gather"),
    "columns-multiplied": (lambda n: n.add("MatMul", n.weights(OTHER, OTHER)), "MatMul"),
    "batch-multiplied": (
        lambda n: n.add("Transpose", perm=[0, 2, 3, 1]).add("MatMul", n.weights(1, 2, 2)),
        "MatMul",
    ),
    "wrap": (lambda n: n.pad(2, 2, "wrap"), "Pad (mode"),
    "repeated": (lambda n: n.add("Tile", np.array([1, 1, 2, 1])).conv(3, 2), "Conv"),
    "everywhere": (everywhere, "ReduceMean"),
    "copies": (copies, "ReduceSum"),
    "copies-of-all": (lambda n: copies_of_all(n.conv(1), 0), "Conv"),
    "padded": (lambda n: padded_to(n.conv(3), 2 * MULTIPLE), "Pad"),
    "padded-by-floats": (lambda n: padded_to(n.conv(3), 2 * MULTIPLE, float_arithmetic=True), "Pad"),
    "unknown": (lambda n: n.add("GridSample", np.zeros((1, 4, 4, 2), np.float32)), "GridSample"),
}


def _resize(network: Network, **attributes: Any) -> Network:
    return network.add("Resize", None, np.array([1, 1, 2, 2], np.float32), mode="linear", **attributes)


@pytest.mark.parametrize("name", UNBOUNDED)
def test_what_mixes_all_positions_or_is_not_known_is_named(name: str) -> None:
    build, reason = UNBOUNDED[name]
    field = field_of(build(Network()).model())
    assert not field.is_bounded
    assert (field.reason or "").startswith(reason)


@pytest.mark.parametrize("float_arithmetic", [False, True])
def test_padding_to_what_all_sizes_are_multiples_of_is_none(float_arithmetic: bool) -> None:
    model = padded_to(Network().conv(3), MULTIPLE, float_arithmetic).model()
    assert (field_of(model).context_before, field_of(model).context_after) == (2, 2)


def test_operators_over_channels_alone_look_at_one_position() -> None:
    model = channel_norm(Network()).add("Softmax", axis=1).model()
    onnx.checker.check_model(model)
    assert field_of(model) == ReceptiveField(Fraction(1), 0, 0, 1, 1)


def test_the_widest_of_several_outputs_covers_them_all() -> None:
    small, large = ReceptiveField(Fraction(8), 3, 9, 13, 8), ReceptiveField(Fraction(8), 5, 7, 13, 8)
    assert widest([small, large]) == ReceptiveField(Fraction(8), 5, 9, 13, 8)
    unbounded = ReceptiveField(reason="Softmax")
    assert widest([small, unbounded]) == unbounded
    assert widest([small, ReceptiveField(Fraction(4), 3, 9, 13, 8)]).reason == "outputs of different sizes"
