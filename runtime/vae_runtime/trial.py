"""A session for one shape of input on a GPU. Which of several ways is fastest there, only a trial tells."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np

from .cuda_stream import Stream
from .devices import Device
from .errors import DeviceError, OutOfMemoryError
from .fidelity import relative_error
from .preprocess import Float32
from .session import GraphSession

_LAYOUT_OPERATORS = {"Conv", "ConvTranspose", "FusedConv"}  # that cuDNN also runs with the channels last
_GAIN = 0.97  # what is not at least 3% faster is not worth another way than the plain one
_ROUNDS, _BLOCK_SECONDS, _MOST_CALLS = 7, 2e-3, 100
# How far another way's outputs may be off, relative to the largest: what the precision allows.
_TOLERANCES = {"fp32": 1e-4, "tf32": 2e-3, "fp16": 5e-3}


def fastest_session(session: GraphSession, model: bytes, shape: tuple[int, ...]) -> GraphSession:
    """One for inputs of this shape, with the batch, in all else as `session`, whose file's bytes are `model`.

    Its kernels are launched as one graph where it can be captured. Convolutions with the channels last (NHWC), then
    copies through pinned memory on a stream of our own, are tried beside the plain way, and taken where calls are at
    least 3% faster and their outputs as they should be. What the caller's options decide is left so. The result's
    `trials` say how it went.

    Raises:
        DeviceError: not even the plain way is to be had, as for want of memory.
    """
    best = _captured(session, model, shape)
    options = session.device.options
    array = np.random.default_rng(0).random(shape, np.float32)
    trials: dict[str, float | str] = {}

    def try_beside(plain: GraphSession, name: str, make: Callable[[], GraphSession]) -> GraphSession:
        try:
            other = make()
            trials[name] = _compare(other, plain, array)
        except (DeviceError, MemoryError) as error:
            trials[name] = str(error)
            return plain
        found = trials[name]
        return other if isinstance(found, float) and found <= _GAIN else plain

    operators = session.operators
    if "prefer_nhwc" not in options and (operators is None or operators & _LAYOUT_OPERATORS):
        device = best.device.with_option("prefer_nhwc", "1")
        best = try_beside(best, "NHWC", lambda: session.open_for(model, shape, device))
    if "user_compute_stream" not in options:
        chosen = best.device
        best = try_beside(best, "pinned", lambda: _staged(session, model, shape, chosen))
    best.trials = trials
    return best


def _captured(session: GraphSession, model: bytes, shape: tuple[int, ...]) -> GraphSession:
    try:
        return session.open_for(model, shape, session.device)
    except OutOfMemoryError:
        raise
    except DeviceError:  # a graph with arithmetic on shapes on the CPU cannot be captured
        return session.open_for(model, shape, session.device.with_option("enable_cuda_graph", "0"))


def _staged(session: GraphSession, model: bytes, shape: tuple[int, ...], device: Device) -> GraphSession:
    stream = Stream.of_thread(device.memory[1])
    return session.open_for(model, shape, device.with_option("user_compute_stream", stream.handle), stream)


def _compare(other: GraphSession, plain: GraphSession, array: Float32) -> float | str:
    """The time of a call relative to that of the plain way, or how far off the outputs are where that is too far."""
    tolerance = _TOLERANCES[plain.device.precision]
    error = max(map(relative_error, other.run(array), plain.run(array)))
    if not error <= tolerance:
        return f"outputs differ by {error:.1e} of the largest, more than {tolerance:g}"
    return _relative_time(lambda: other.run(array), lambda: plain.run(array))


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
