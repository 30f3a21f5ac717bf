"""A session for one shape of input on a GPU. Which of several variants is fastest there, only a trial tells."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from .cuda_stream import Stream
from .device_array import DeviceArray
from .device_call import CapturedCall
from .devices import GAIN, Device
from .engine import first_line, is_engine_error
from .errors import DeviceError, OutOfMemoryError
from .fidelity import relative_error
from .preprocess import Float32, ValueRule
from .session import GraphSession, freeing

_CONVOLUTIONS = {"Conv", "ConvTranspose", "FusedConv"}  # which cuDNN also runs with the channels last
_BIAS_APART = ("ConvAddFusion",)
_ROUNDS, _BLOCK_SECONDS, _MOST_CALLS = 7, 2e-3, 100
# How far a variant's outputs may be off, relative to the largest: what the precision allows, but less in fp32: where
# cuDNN has no other algorithm, onnxruntime takes one in TF32, which is off by 1.4e-4 and more in the races' cases; two
# orders of addition differ by 1e-6. In int8 what is rounded the other way is off by a step of 255.
_TOLERANCES = {"fp32": 2e-5, "tf32": 2e-3, "fp16": 5e-3, "int8": 2e-2}

Run = Callable[[Float32], list[Float32]]


def fastest_session(session: GraphSession, model: bytes, shape: tuple[int, ...], rule: ValueRule) -> GraphSession:
    """One for inputs of this shape, with the batch, in all else as `session`, whose file's bytes are `model`.

    Its kernels are launched as one graph where it can be captured. Tried beside this plain variant, and taken where
    calls, which hold the values to `rule`, are at least 3% faster and their outputs as they should be, in this order:

        bias apart  where the graph adds it to a convolution's results: by onnxruntime's kernel and not by cuDNN's
        NHWC        convolutions with the channels last
        bias fused  in NHWC, tf32 and fp16: it is added in the same kernel
        captured    on a stream of our own: copies through pinned memory, in the same graph as the work between them,
                    but for what is large; values are looked at while the GPU is at work
        pinned      where that is not taken: the same with the copies around the graph
        on_device   the graph for arrays that are on the device, beside the session for any batch; where that is
                    faster, captured or pinned is taken unless it is more than 3% slower
        zero_copy   kernels that write the outputs to pinned memory themselves, in place of a copy

    What the caller's options decide is left so. The result's `trials` say how it went.

    Raises:
        DeviceError: not even the plain variant is to be had, as for want of memory.
    """
    trial = _Trial(session, model, shape, rule)
    options, operators = session.device.options, session.operators
    if operators is None or _CONVOLUTIONS.intersection(operators):
        if "fuse_conv_bias" not in options:
            trial.try_bias_apart()
        if "prefer_nhwc" not in options:
            trial.try_layout()
    if "user_compute_stream" not in options:
        trial.try_stream()
    trial.free_others()
    trial.best.trials = trial.results
    return trial.best


class _Trial:
    """best: the fastest session so far. results: by variant, its time relative to the best before, or why none."""

    def __init__(self, session: GraphSession, model: bytes, shape: tuple[int, ...], rule: ValueRule) -> None:
        self._session, self._model, self._shape, self._rule = session, model, shape, rule
        self._array = np.random.default_rng(0).random(shape, np.float32)
        self._opened: list[GraphSession] = []  # all that are not freed
        self.best = self._captured()
        self.results: dict[str, float | str] = {}

    def try_bias_apart(self) -> None:
        def make() -> GraphSession:
            made = self._open(self.best.device._replace(without=_BIAS_APART))
            if (found := made.operators) is not None and len(found) == len(self.best.operators or ()):
                raise DeviceError("no bias is an addition in this graph")
            return made

        self._take_if_faster("bias apart", make)

    def try_layout(self) -> None:
        in_nhwc = self.best.device.with_option("prefer_nhwc", "1")
        self._take_if_faster("NHWC", lambda: self._open(in_nhwc))
        # Not in fp32, where it never gained on an H100 (benchmarks/results/gpu/README.md), and not in NCHW, where
        # onnxruntime 1.31 computes something else by it.
        if in_nhwc.precision in ("tf32", "fp16") and "fuse_conv_bias" not in in_nhwc.options:
            fused = in_nhwc.with_option("fuse_conv_bias", "1")._replace(without=())
            self._take_if_faster("bias fused", lambda: self._open(fused))

    def _take_if_faster(self, name: str, make: Callable[[], GraphSession]) -> None:
        made, is_gain = self._try(name, make)
        if made is not None and is_gain:
            self.best = made
        del made  # it is freed where all are
        self.free_others()

    def free_others(self) -> None:
        """Those that are not taken: of a large model the GPU may have no room for more than two."""
        with freeing(self._opened):
            self._opened[:] = [self.best]

    def try_stream(self) -> None:
        plain = self.best

        def make(captures: bool) -> GraphSession:
            stream = Stream.of_thread(plain.device.memory[1])
            device = plain.device.with_option("user_compute_stream", stream.handle)
            return self._open(device.with_option("enable_cuda_graph", "0") if captures else device, stream, captures)

        if "enable_cuda_graph" not in plain.device.options:  # said by the caller, or because it cannot be captured
            self._try_on_stream("captured", lambda: make(True))
        if self.best is plain:
            self.free_others()
            self._try_on_stream("pinned", lambda: make(False))
        if (call := self.best.captured_call) is not None:
            self._try_zero_copy(call)

    def _try_on_stream(self, name: str, make: Callable[[], GraphSession]) -> None:
        made, is_gain = self._try(name, make)
        if made is None or not isinstance(found := self.results[name], float) or found > 1 / GAIN:
            return
        made.replays_on_device = self._is_gain("on_device", partial(self._compare_on_device, made))
        if is_gain or made.replays_on_device:
            self.best = made

    def _try_zero_copy(self, call: CapturedCall) -> None:
        plain = call.begin
        made: list[Callable[[], None]] = []

        def compare() -> float | str:
            made.append(call.begin_zero_copy(self.best))
            return self._compare(*(partial(_run_by, call, begin) for begin in (made[0], plain)))

        self.best.is_zero_copy = self._is_gain("zero_copy", compare)
        call.begin = made[0] if self.best.is_zero_copy else plain

    def _open(self, device: Device, stream: Stream | None = None, captures: bool = False) -> GraphSession:
        self._opened.append(self._session.open_for(self._model, self._shape, device, stream, captures))
        return self._opened[-1]

    def _captured(self) -> GraphSession:
        try:
            return self._open(self._session.device)
        except OutOfMemoryError:
            raise
        except DeviceError:  # a graph with arithmetic on shapes on the CPU cannot be captured
            return self._open(self._session.device.with_option("enable_cuda_graph", "0"))

    def _try(self, name: str, make: Callable[[], GraphSession]) -> tuple[GraphSession | None, bool]:
        """The session of another variant, where it can be had, and whether it is faster than the best so far."""
        made: list[GraphSession] = []

        def compare() -> float | str:
            made.append(make())
            return self._compare(self._call(made[0]), self._call(self.best))

        is_gain = self._is_gain(name, compare)
        return made[0] if made else None, is_gain

    def _call(self, session: GraphSession) -> Run:
        """A call as users make it, which looks at the values too."""
        quick = session.bind(self._shape, self._rule)

        def call(array: Float32) -> list[Float32]:
            found = None if quick is None else quick(array)
            return session.run(array) if found is None else found  # says what failed

        return call

    def _is_gain(self, name: str, compare: Callable[[], float | str]) -> bool:
        try:
            found = compare()
        except Exception as error:
            if not is_engine_error(error):
                raise
            found = first_line(error)
        self.results[name] = found
        return isinstance(found, float) and found <= GAIN

    def _compare(self, call: Run, plain: Run) -> float | str:
        """The time of a call relative to that of the plain variant, or how far off its outputs are, where too far."""
        calls = partial(call, self._array), partial(plain, self._array)
        return self._difference(*(one() for one in calls)) or _relative_time(*calls)

    def _compare_on_device(self, session: GraphSession) -> float | str:
        """The same of its CUDA graph, between copies on the device, and of the session for any batch."""
        there, other = map(self._session.to_device, (self._array, 1 - self._array))
        found = [session.replay_on_device(one) for one in (there, other)]  # all of it is alive: at other addresses
        for replayed, one in zip(found, (there, other), strict=True):
            if replayed is None:
                return "there is no graph for this thread"
            expected = self._session.run_on_device(one)
            if difference := self._difference(*([array.numpy() for array in half] for half in (replayed, expected))):
                return difference
        return _relative_time(
            _elsewhere_each_time(session.replay_on_device, [there, other]),
            _elsewhere_each_time(self._session.run_on_device, [there, other]),
        )

    def _difference(self, found: list[Float32], expected: list[Float32]) -> str:
        """How far off outputs are, in words; empty where that is not too far."""
        errors, tolerance = list(map(relative_error, found, expected)), _TOLERANCES[self._session.device.precision]
        worst = next((error for error in errors if not error <= tolerance), None)  # NaN is not
        return "" if worst is None else f"outputs differ by {worst:.1e} of the largest, more than {tolerance:g}"


def _run_by(call: CapturedCall, begin: Callable[[], None], array: Float32) -> list[Float32]:
    call.begin = begin
    return call.run(array)


def _elsewhere_each_time(call: Callable[[DeviceArray], Any], arrays: Sequence[DeviceArray]) -> Callable[[], None]:
    """Calls for one array after the other, and the last result is alive while the next one is made: as in an
    application, no call finds its input or its outputs at the addresses of the one before."""
    given, kept = itertools.cycle(arrays), [None]

    def next_call() -> None:
        kept[0] = call(next(given))

    return next_call


def _relative_time(call: Callable[[], object], plain: Callable[[], object]) -> float:
    """By the medians of blocks of calls that alternate, so that what disturbs one disturbs the other."""
    start = time.perf_counter()
    plain()
    count = min(_MOST_CALLS, 1 + int(_BLOCK_SECONDS / max(time.perf_counter() - start, 1e-6)))
    seconds: tuple[list[float], list[float]] = [], []
    for _ in range(_ROUNDS):
        for one, taken in zip((call, plain), seconds, strict=True):
            start = time.perf_counter()
            for _ in range(count):
                one()
            taken.append(time.perf_counter() - start)
    return statistics.median(seconds[0]) / statistics.median(seconds[1])
