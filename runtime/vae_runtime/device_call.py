"""Calls at the least cost on a device with memory of its own: from host memory and back, or without leaving it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .bound import to_host
from .cuda import made_current
from .device_array import await_others
from .engine import first_line, import_engine, is_engine_error, is_raw_engine_error, suppress_engine_errors
from .errors import DeviceError
from .preprocess import PIXEL, Float32, UInt8, ValueRule, copy_pixels, from_pixels
from .result_memory import ResultMemory

if TYPE_CHECKING:
    from .cuda_graph import LaunchGraph, MovableCopy
    from .cuda_stream import Stream
    from .session import GraphSession

_ALIGNMENT = 64  # numbers; CUDA's own allocations begin at multiples of 256 bytes
_LARGE = 2**16  # numbers; the copies of what has more are no part of a launch
_WARMUP_RUNS = 3  # in which onnxruntime chooses algorithms and lays out memory


class ResidentCall:
    """From the memory of the session's device to new memory there. For one thread.

    Below onnxruntime's public layer, which takes a third of such a call's time to look the device's name up.
    """

    def __init__(self, session: GraphSession) -> None:
        self._input, *self._outputs = session.names
        binding = session.io_binding()
        self._binding, self._run = binding._iobinding, session.bound_run(binding)
        self._device, self._wrap = _engines_device(session.device.memory), import_engine().OrtValue

    def __call__(self, value: Any) -> list[Any]:
        """An `OrtValue` -> the outputs as such, which belong to the caller; raises what the engine raises."""
        binding = self._binding
        binding.bind_ortvalue_input(self._input, value._ortvalue)
        for name in self._outputs:
            binding.bind_output(name, self._device)  # anew: what stays bound would be overwritten
        try:
            self._run()
            found = binding.get_outputs()
            return [self._wrap(found[index]) for index in range(len(found))]
        finally:
            binding.clear_binding_inputs()
            binding.clear_binding_outputs()


class DeviceCall:
    """From host memory to new host memory, by an input and outputs on the device that are always at the same addresses.
    For one call at a time.

    shapes: of the input, then of the outputs, by name. waits: whether a run of the graph ends only when its work is
        done.
    """

    def __init__(
        self,
        session: GraphSession,
        shapes: dict[str, tuple[int, ...]],
        rule: ValueRule | None = None,
        waits: bool = True,
    ) -> None:
        kind, index = self._memory = session.device.memory
        make = import_engine().OrtValue.ortvalue_from_shape_and_type
        shape, *outputs = shapes.values()
        self._owner, self._is_shared, self._rule = session.owner, session.fixed is None, rule
        self.is_busy = False
        self._context = made_current(self._memory)
        self._input = make(shape, np.float32, kind, index)
        # One after the other in one piece of memory, so that one copy brings them all.
        self._parts = _layout(outputs)
        self._outputs = make((self._parts[-1].stop,), np.float32, kind, index)
        self._run = self._bind(session, self._outputs.data_ptr(), waits)

    def _bind(self, session: GraphSession, address: int, waits: bool) -> Callable[[], None]:
        """What runs the graph from the input to outputs that lie from this address on."""
        binding, (name, *outputs) = session.io_binding(), session.names
        binding.bind_ortvalue_input(name, self._input)
        for name, part in zip(outputs, self._parts, strict=True):
            binding.bind_output(name, *self._memory, np.float32, part.shape, part.address(address))
        return session.bound_run(binding, waits)

    def hold_to(self, rule: ValueRule) -> None:
        """Take arrays whose values nobody has looked at."""
        self._rule = rule

    def __call__(self, array: Float32 | UInt8) -> list[Float32] | None:
        """As `BoundCall`; None also in a thread that the session does not serve, and within another call of this."""
        if not self.may_run() or self._rule is None:
            return None
        values: Float32 = from_pixels(array) if array.dtype == PIXEL else np.ascontiguousarray(array)
        if not self._rule.holds(self._rule.view(values)):
            return None
        with suppress_engine_errors:
            return self.run(values)
        return None

    def run(self, array: Float32) -> list[Float32]:
        """For a contiguous array that is known to be good; raises what the engine raises."""
        self.is_busy = True
        try:
            if self._is_shared:
                await_others(self._memory)
            with self._context:
                self._input.update_inplace(array)
                self._run()
                return self._cut(to_host(self._outputs))
        finally:
            self.is_busy = False

    def _cut(self, found: Float32) -> list[Float32]:
        """The outputs, as views of a copy of the memory that they share."""
        return [found[part.start : part.stop].reshape(part.shape) for part in self._parts]

    def may_run(self) -> bool:
        """Whether a call may come now, in this thread; `is_busy` while one is under way."""
        is_mine = self._is_shared or self._owner.is_this_thread
        return is_mine and not self.is_busy and not self._owner.forked


class StagedCall(DeviceCall):
    """As `DeviceCall`, on a stream of our own, on which the session works too. Inputs and outputs are copied through
    pinned memory, and there is one wait, for both copies and the work between them.

    A large input is copied by the driver, from the caller's memory. Large outputs are written by the GPU to the memory
    of the result, see `ResultMemory`, or copied there by the driver.
    """

    def __init__(self, session: GraphSession, shapes: dict[str, tuple[int, ...]], stream: Stream) -> None:
        super().__init__(session, shapes, waits=False)
        self._stream = stream
        self._given = stream.pinned(math.prod(self._input.shape())).reshape(self._input.shape())
        size, start = self._parts[-1].stop, self._outputs.data_ptr()
        self._found = stream.pinned(size) if size <= _LARGE else np.empty(0, np.float32)
        self._results = ResultMemory(stream, size)
        self._fetches = [stream.to_host(self._found, start)] if self._found.size else []
        place = self._input.data_ptr()
        self._send = stream.to_device(place, self._given)
        self._sends = [self._send] if self._given.size <= _LARGE else []
        self._to_decoder: tuple[StagedCall, list[Callable[[], None]]] | None = None
        self._take = stream.from_anywhere(place, self._given.nbytes)
        self._places = [part.address(start) for part in self._parts]
        self._give = [
            stream.to_anywhere(place, part.nbytes) for place, part in zip(self._places, self._parts, strict=True)
        ]
        # As in `ResidentCall`.
        self._device, self._wrap = _engines_device(self._memory), import_engine().OrtValue
        self._make = type(self._outputs._ortvalue).ortvalue_from_shape_and_type

    def hold_to(self, rule: ValueRule) -> None:
        """As `DeviceCall`."""
        super().hold_to(rule)
        self._given_is_good = partial(rule.holds, rule.view(self._given))

    def __call__(self, array: Float32 | UInt8) -> list[Float32] | None:
        """As `DeviceCall`."""
        if not self.may_run() or self._rule is None:
            return None
        self.is_busy = True
        try:
            with suppress_engine_errors:
                with self._stream:
                    room = self._room()
                    values = self._put(array)
                    self._begin()
                    is_good = self._is_good(values)  # while the GPU is at work
                    found = self._bring(room)
                return found if is_good else None
        finally:
            self.is_busy = False
        return None

    def run(self, array: Float32) -> list[Float32]:
        """As `DeviceCall.run`."""
        values = np.ascontiguousarray(array)  # alive until the copy is done
        self.is_busy = True
        try:
            with self._stream:
                room = self._room()
                self._put(values)
                self._begin()
                return self._bring(room)
        finally:
            self.is_busy = False

    def may_run(self) -> bool:
        """As `DeviceCall`; nor while a graph is captured on the stream, which all calls of this thread share."""
        return not self._stream.is_capturing and super().may_run()

    def _put(self, array: Float32 | UInt8) -> Float32:
        """Begin the input's copy: of a small one into pinned memory, of a large one to the GPU -> the values, to be
        looked at."""
        if array.dtype != PIXEL and not self._sends:
            values = np.ascontiguousarray(array, np.float32)
            if values.shape != self._given.shape:
                raise ValueError(f"the input is {values.shape}, not {self._given.shape}")
            self._stream.to_device(self._input.data_ptr(), values)()
            return values
        (copy_pixels if array.dtype == PIXEL else np.copyto)(self._given, array)
        if not self._sends:
            self._send()
        return self._given

    def _is_good(self, values: Float32) -> bool:
        if values is self._given:
            return self._given_is_good()
        return self._rule is not None and self._rule.holds(self._rule.view(values))

    def _begin(self) -> None:
        """Begin the work, and the copies before and after it of what is not large."""
        for step in (*self._sends, self._run, *self._fetches):
            step()

    def _room(self) -> Float32 | None:
        """Memory for large outputs; taken before any work is begun, for which it might wait."""
        if self._found.size:
            return None
        found = self._results.take()
        return np.empty(self._parts[-1].stop, np.float32) if found is None else found

    def _bring(self, room: Float32 | None) -> list[Float32]:
        """The outputs in memory of their own, when all that was begun is done. room: of `_room`."""
        if room is None:
            self._stream.wait()
            return self._cut(self._found.copy())
        self._stream.to_host(room, self._outputs.data_ptr())()
        self._stream.wait()
        return self._cut(room)

    def then(self, decoder: StagedCall, array: Float32) -> Float32 | None:
        """The decoder's output for the first of this encoder's, which does not leave the GPU. array: known to be good.

        None where this is not to be had: in another thread, on another stream, or as the engine fails.
        """
        if not self.may_run() or not decoder.may_run() or decoder._stream is not self._stream:
            return None
        values = np.ascontiguousarray(array)  # alive until the copy is done
        self.is_busy = decoder.is_busy = True
        try:
            with suppress_engine_errors, self._stream:
                steps, room = self.steps_to(decoder), decoder._room()
                self._put(values)
                for step in steps:
                    step()
                return decoder._bring(room)[0]
        finally:
            self.is_busy = decoder.is_busy = False
        return None

    def steps_to(self, decoder: StagedCall) -> list[Callable[[], None]]:
        """What `then` begins, one after the other; made for the first call, or before it."""
        if self._to_decoder is None or self._to_decoder[0] is not decoder:
            self._to_decoder = decoder, self._make_steps_to(decoder)
        return self._to_decoder[1]

    def on_device(self, value: Any) -> list[Any] | None:
        """An `OrtValue` in the GPU's memory, finished -> the outputs as new ones there; raises what the engine raises.

        None in a thread that the session does not serve, and within another call of this.
        """
        if not self.may_run():
            return None
        self.is_busy = True
        try:
            with self._stream:  # which onnxruntime's allocator would leave on its GPU
                found = [self._make(part.shape, np.float32, self._device) for part in self._parts]
                self._run_on_device(value.data_ptr(), [new.data_ptr() for new in found])
                self._stream.wait()
            return [self._wrap(new) for new in found]
        finally:
            self.is_busy = False

    def _run_on_device(self, source: int, targets: list[int]) -> None:
        """From one address on the GPU to others, one for each output."""
        self._take(source)
        self._run()
        for give, target in zip(self._give, targets, strict=True):
            give(target)

    def _make_steps_to(self, decoder: StagedCall) -> list[Callable[[], None]]:
        return [*self._sends, self._run, self._hand_over(decoder), decoder._run, *decoder._fetches]

    def _hand_over(self, decoder: StagedCall) -> Callable[[], None]:
        """What begins the copy of the first output to the decoder's input."""
        return self._stream.on_device(decoder._input.data_ptr(), self._places[0], self._parts[0].nbytes)


class CapturedCall(StagedCall):
    """As `StagedCall`, but as one launch: the work and both copies, except those of what is large, are captured in one
    CUDA graph, which runs without onnxruntime. The session must not make a CUDA graph itself.

    begin: begins that launch. in_steps: what could not be made one launch, "on_device" or "reconstruct", and why.
    """

    def __init__(self, session: GraphSession, shapes: dict[str, tuple[int, ...]], stream: Stream) -> None:
        super().__init__(session, shapes, stream)
        self.in_steps: dict[str, str] = {}
        nothing = np.zeros(self._given.shape, np.float32)
        for _ in range(_WARMUP_RUNS):
            with stream:
                self._put(nothing)
                super()._begin()
                stream.wait()
        self._engine_run = self._run
        self.begin = self._capture([*self._sends, self._engine_run, *self._fetches]).launch
        self._run = self._capture([self._engine_run]).launch
        self._resident: _Resident | None = None

    def begin_zero_copy(self, session: GraphSession) -> Callable[[], None]:
        """Another `begin`: the kernels write the outputs to pinned memory themselves ("zero copy" in NVIDIA's CUDA C++
        Best Practices Guide). session: the call's own. Raises `DeviceError` where the engine or the driver does not do
        so, and for large outputs."""
        if not self._found.size:
            raise DeviceError("its outputs are large, and are copied")
        try:
            steps = [*self._sends, self._bind(session, self._stream.address_of(self._found), waits=False)]
            with self._stream:
                for step in steps:
                    step()
                self._stream.wait()
            self._found.fill(np.nan)  # what a launch does not write must not look right
            return self._capture(steps).launch
        except Exception as error:
            if not is_raw_engine_error(error):
                raise
            raise DeviceError(first_line(error)) from error

    def _capture(self, steps: Sequence[Callable[[], object]], *host: Float32) -> LaunchGraph:
        """As one launch. host: pinned memory that they copy from or to, beside this call's own."""
        with self._stream:
            return self._stream.capture(steps, [self._given, self._found, *host])

    def _begin(self) -> None:
        self.begin()

    def _run_on_device(self, source: int, targets: list[int]) -> None:
        graph = self._between(source, targets)
        if graph is None:
            super()._run_on_device(source, targets)
        else:
            graph.launch()

    def _between(self, source: int, targets: list[int]) -> LaunchGraph | None:
        """The launch between these addresses; None where there is none."""
        try:
            if self._resident is None and "on_device" not in self.in_steps:
                self._resident = self._capture_on_device(source, targets)
            return None if self._resident is None else self._resident.move(source, targets)
        except Exception as error:
            self._go_in_steps("on_device", error)
        return None

    def _capture_on_device(self, source: int, targets: list[int]) -> _Resident:
        """The same as one launch, whose copies are moved from call to call."""
        gives = [partial(give, target) for give, target in zip(self._give, targets, strict=True)]
        graph = self._capture([partial(self._take, source), self._engine_run, *gives])
        fetched = [graph.copy(place, target, "target") for place, target in zip(self._places, targets, strict=True)]
        return _Resident(graph, graph.copy(source, self._input.data_ptr(), "source"), fetched)

    def _make_steps_to(self, decoder: StagedCall) -> list[Callable[[], None]]:
        if isinstance(decoder, CapturedCall):
            steps = [
                *(*self._sends, self._engine_run, self._hand_over(decoder), decoder._engine_run),
                *decoder._fetches,
            ]
            try:
                return [self._capture(steps, decoder._found).launch]
            except Exception as error:
                self._go_in_steps("reconstruct", error)
        return super()._make_steps_to(decoder)

    def _go_in_steps(self, what: str, error: Exception) -> None:
        if not is_engine_error(error):
            raise error
        self.in_steps[what] = first_line(error)


class _Resident(NamedTuple):
    """What runs a call for arrays on the device: the graph, and the copies in it, of the input and of each output."""

    graph: LaunchGraph
    sent: MovableCopy
    fetched: list[MovableCopy]

    def move(self, source: int, targets: list[int]) -> LaunchGraph:
        self.sent.move_to(source)
        for copy, target in zip(self.fetched, targets, strict=True):
            copy.move_to(target)
        return self.graph


class _Part(NamedTuple):
    """Where an output lies in a piece of memory for several, in numbers."""

    start: int
    size: int
    shape: tuple[int, ...]

    @property
    def stop(self) -> int:
        return self.start + self.size

    @property
    def nbytes(self) -> int:
        return 4 * self.size

    def address(self, memory: int) -> int:
        """Where it begins in memory that begins at this address."""
        return memory + 4 * self.start


def _engines_device(memory: tuple[str, int]) -> Any:
    """A device as onnxruntime's own layer below the public one takes it."""
    return import_engine().OrtDevice.make(*memory)._get_c_device()


def _layout(shapes: Sequence[tuple[int, ...]]) -> list[_Part]:
    parts: list[_Part] = []
    for shape in shapes:
        end = parts[-1].stop if parts else 0
        parts.append(_Part(-(-end // _ALIGNMENT) * _ALIGNMENT, math.prod(shape), shape))
    return parts
