"""A session for one shape of input on a GPU. Which of several ways is fastest there, only a trial tells."""

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
from .devices import Device
from .engine import first_line, is_engine_error
from .errors import DeviceError, OutOfMemoryError
from .fidelity import relative_error
from .preprocess import Float32
from .session import GraphSession
from .tuning import GAIN

_LAYOUT_OPERATORS = {"Conv", "ConvTranspose", "FusedConv"}  # that cuDNN also runs with the channels last
_ROUNDS, _BLOCK_SECONDS, _MOST_CALLS = 7, 2e-3, 100
# How far another way's outputs may be off, relative to the largest: what the precision allows. In int8 what is rounded
# the other way is off by a step of 255.
_TOLERANCES = {"fp32": 1e-4, "tf32": 2e-3, "fp16": 5e-3, "int8": 2e-2}

Run = Callable[[Float32], list[Float32]]


def fastest_session(session: GraphSession, model: bytes, shape: tuple[int, ...]) -> GraphSession:
    """One for inputs of this shape, with the batch, in all else as `session`, whose file's bytes are `model`.

    Its kernels are launched as one graph where it can be captured. Tried beside this plain way, and taken where calls
    are at least 3% faster and their outputs as they should be, in this order:

        NHWC        convolutions with the channels last
        captured    on a stream of our own: copies through pinned memory, in the same graph as the work between them;
                    a large input is sent before, in pieces
        pinned      where that is not taken: the same with the copies around the graph
        on_device   the graph for arrays that are on the device, beside the session for any batch
        zero_copy   kernels that write the outputs to pinned memory themselves, in place of a copy

    What the caller's options decide is left so. The result's `trials` say how it went.

    Raises:
        DeviceError: not even the plain way is to be had, as for want of memory.
    """
    trial = _Trial(session, model, shape)
    options, operators = session.device.options, session.operators
    if "prefer_nhwc" not in options and (operators is None or operators & _LAYOUT_OPERATORS):
        trial.try_layout()
    if "user_compute_stream" not in options:
        trial.try_stream()
    trial.best.trials = trial.results
    return trial.best


class _Trial:
    """best: the fastest session so far. results: way -> its time relative to the best before, or why there is none."""

    def __init__(self, session: GraphSession, model: bytes, shape: tuple[int, ...]) -> None:
        self._session, self._model, self._shape = session, model, shape
        self._array = np.random.default_rng(0).random(shape, np.float32)
        self.best = self._captured()
        self.results: dict[str, float | str] = {}

    def try_layout(self) -> None:
        device = self.best.device.with_option("prefer_nhwc", "1")
        self._try("NHWC", lambda: self._open(device))

    def try_stream(self) -> None:
        plain = self.best

        def make(captures: bool) -> GraphSession:
            stream = Stream.of_thread(plain.device.memory[1])
            device = plain.device.with_option("user_compute_stream", stream.handle)
            return self._open(device.with_option("enable_cuda_graph", "0") if captures else device, stream, captures)

        if "enable_cuda_graph" not in plain.device.options:  # said by the caller, or because it cannot be captured
            self._try("captured", lambda: make(True))
        if self.best is plain:
            self._try("pinned", lambda: make(False))
        if self.best is not plain:
            self.best.replays_on_device = self._is_gain("on_device", self._compare_on_device)
        if (call := self.best.captured_call) is not None:
            self._try_zero_copy(call)

    def _try_zero_copy(self, call: CapturedCall) -> None:
        plain = call.begin
        made: list[Callable[[], None]] = []

        def compare() -> float | str:
            made.append(call.begin_zero_copy(self.best))
            return self._compare(*(partial(_run_by, call, begin) for begin in (made[0], plain)))

        self.best.is_zero_copy = self._is_gain("zero_copy", compare)
        call.begin = made[0] if self.best.is_zero_copy else plain

    def _open(self, device: Device, stream: Stream | None = None, captures: bool = False) -> GraphSession:
        return self._session.open_for(self._model, self._shape, device, stream, captures)

    def _captured(self) -> GraphSession:
        try:
            return self._open(self._session.device)
        except OutOfMemoryError:
            raise
        except DeviceError:  # a graph with arithmetic on shapes on the CPU cannot be captured
            return self._open(self._session.device.with_option("enable_cuda_graph", "0"))

    def _try(self, name: str, make: Callable[[], GraphSession]) -> None:
        made: list[GraphSession] = []

        def compare() -> float | str:
            made.append(make())
            return self._compare(made[0].run, self.best.run)

        if self._is_gain(name, compare):
            self.best = made[0]

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
        """The time of a call relative to that of the plain way, or how far off its outputs are, where too far."""
        calls = partial(call, self._array), partial(plain, self._array)
        return self._difference(*(one() for one in calls)) or _relative_time(*calls)

    def _compare_on_device(self) -> float | str:
        """The same of the CUDA graph, between copies on the device, and of the session for any batch."""
        there, other = map(self._session.to_device, (self._array, 1 - self._array))
        found = [self.best.replay_on_device(one) for one in (there, other)]  # all of it is alive: at other addresses
        for replayed, one in zip(found, (there, other), strict=True):
            if replayed is None:
                return "there is no graph for this thread"
            expected = self._session.run_on_device(one)
            if difference := self._difference(*([array.numpy() for array in half] for half in (replayed, expected))):
                return difference
        return _relative_time(
            _elsewhere_each_time(self.best.replay_on_device, [there, other]),
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
        for way, taken in zip((call, plain), seconds, strict=True):
            start = time.perf_counter()
            for _ in range(count):
                way()
            taken.append(time.perf_counter() - start)
    return statistics.median(seconds[0]) / statistics.median(seconds[1])
