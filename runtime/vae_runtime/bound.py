"""Calls at the least cost: memory for one shape of inputs, bound to a session once and used again and again."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from .engine import import_engine, is_engine_error
from .preprocess import PIXEL, Float32, UInt8, ValueRule, copy_pixels

if TYPE_CHECKING:
    from .session import GraphSession


# Up to so many values per call, copying into memory that is bound to the session costs less than binding the caller's.
BOUND_VALUES = 2**16
KEPT_SHAPES = 8  # that have memory, or a session, of their own; at most
_PATIENCE = 32  # calls for which a shape keeps its place unused: to bind memory again costs half a call

Call = TypeVar("Call")


class Kept(Generic[Call]):
    """Calls that are ready, by the shape of their inputs, for any thread: what one thread has taken no other has until
    it is kept again. Of more than `KEPT_SHAPES` shapes, the one that was used longest ago is evicted.

    may_be_evicted: whether a shape may make room for others; one that may not finds room only where there is some.
    named: shapes that get their place at once, and keep it.
    """

    def __init__(self, may_be_evicted: Callable[[Any], bool] = lambda shape: True) -> None:
        self.named: set[Any] = set()
        self._may_be_evicted = may_be_evicted
        self._free: dict[Any, list[Call]] = {}
        self._used: dict[Any, int] = {}  # the number of the last call, by shape
        self._numbers = itertools.count()

    def take(self, shape: Any) -> Call | None:
        """A call for inputs of this shape; None where none is ready."""
        free = self._free.get(shape)
        try:
            return free.pop() if free else None
        except IndexError:  # another thread took the last one in between
            return None

    def keep(self, shape: Any, call: Call) -> None:
        """Have it ready from now on, where there is room."""
        free = self._free.get(shape)
        if free is None:
            if not self._has_room(shape):
                return
            free = self._free.setdefault(shape, [])
        self._used[shape] = next(self._numbers)
        free.append(call)

    def needs(self, shape: Any) -> bool:
        """Whether no call of this shape is ready, and one would be kept."""
        free = self._free.get(shape)
        return not free and (free is not None or self._has_room(shape))

    def drop(self, shape: Any) -> None:
        """Forget those of this shape that are ready."""
        self._free.pop(shape, None)

    def shapes(self) -> list[Any]:
        """Those that have a place."""
        return list(self._free)

    def _has_room(self, shape: Any) -> bool:
        """Whether one more shape finds a place; another may be evicted for it."""
        if len(self._free) >= KEPT_SHAPES and self._may_be_evicted(shape):
            others = {
                self._used.get(one, 0): one
                for one in self.shapes()
                if one not in self.named and self._may_be_evicted(one)
            }
            patience = 0 if shape in self.named else _PATIENCE
            if others and (oldest := min(others)) + patience < next(self._numbers):
                self._used.pop(others[oldest], None)
                self.drop(others[oldest])
        return len(self._free) < KEPT_SHAPES


def to_host(value: Any) -> Float32:
    """A copy of an `OrtValue`, which belongs to the caller. Its own `numpy` gives a view of what is in host memory."""
    array: Float32 = value.numpy()
    return array if array.flags.owndata else array.copy()


def _bind(session: GraphSession, values: dict[str, Any]) -> tuple[Any, Callable[[], None]]:
    """Values for the input, then the outputs, bound by name -> what has to stay alive, and what runs the graph."""
    binding = session.io_binding()
    (name, value), *outputs = values.items()
    binding.bind_ortvalue_input(name, value)
    for name, value in outputs:
        binding.bind_ortvalue_output(name, value)
    return binding, session.bound_run(binding)


def taker(target: Float32, rule: ValueRule) -> Callable[[Float32 | UInt8], bool]:
    """Copies float32 or pixels into memory of the same shape, and tells whether the rule holds for the values."""
    checked, holds = rule.view(target), rule.holds

    def take(array: Float32 | UInt8) -> bool:
        if array.dtype == PIXEL:  # equal, not the same: an array that was unpickled has a dtype of its own
            copy_pixels(target, array)
            return True
        target[...] = array
        return holds(checked)

    return take


class Owner:
    """Who may use a session: the process that made it and, where its memory is for one thread alone, that thread."""

    def __init__(self) -> None:
        self.forked = False  # whether this process was forked off the one that made it
        self._of_thread = threading.local()  # unlike a thread's number, never another one's after its end
        self._of_thread.is_owner = True
        self._thread = threading.current_thread()

    @property
    def is_this_thread(self) -> bool:
        return getattr(self._of_thread, "is_owner", False)

    @property
    def has_ended(self) -> bool:
        """Whether that thread has."""
        return not self._thread.is_alive()


class BoundCall:
    """On the CPU. For one thread at a time. shapes: of the input, then of the outputs, by name."""

    def __init__(self, session: GraphSession, shapes: dict[str, tuple[int, ...]], rule: ValueRule) -> None:
        value = import_engine().OrtValue.ortvalue_from_numpy  # shares the array's memory
        arrays: dict[str, Float32] = {name: np.empty(shape, np.float32) for name, shape in shapes.items()}
        given, *self._outputs = arrays.values()
        self._take = taker(given, rule)
        self._owner = session.owner
        self._binding, self._run = _bind(session, {name: value(array) for name, array in arrays.items()})

    def __call__(self, array: Float32 | UInt8) -> list[Float32] | None:
        """The outputs for an array of the input's shape, float32 or pixels, which belong to the caller.

        None where the rule does not hold for its values, or the engine fails: `GraphSession.run` then says what is
        wrong.
        """
        if not self._take(array) or self._owner.forked:
            return None
        try:  # which costs nothing, as a block of `suppress_engine_errors` would
            self._run()
        except Exception as error:
            if not is_engine_error(error):
                raise
            return None
        return [output.copy() for output in self._outputs]


class BoundPair:
    """An encoder and, on the mean that it gives, a decoder, on the CPU. For one thread at a time.

    sessions: of both. arrays: the memory of all tensors by name, contiguous, float32; the decoder reads where the
    encoder writes. rule: of the input.
    """

    def __init__(
        self, sessions: tuple[GraphSession, GraphSession], arrays: Mapping[str, Float32], rule: ValueRule
    ) -> None:
        value = import_engine().OrtValue.ortvalue_from_numpy
        encoder, decoder = sessions
        self._owner, self._sessions = encoder.owner, sessions
        self._take = taker(arrays[encoder.names[0]], rule)
        values = {name: value(array) for name, array in arrays.items()}
        source, result = decoder.names
        _, self._encode = encoding = _bind(encoder, {name: values[name] for name in encoder.names})
        _, self._decode = decoding = _bind(decoder, {source: values[encoder.names[1]], result: values[result]})
        self._alive = encoding, decoding

    def __call__(self, array: Float32 | UInt8) -> bool:
        """Fill the memory with what an array of the input's shape gives, float32 or pixels. False where the rule does
        not hold for its values, or the engine fails: `GraphSession.run` then says what is wrong."""
        if not self._take(array) or self._owner.forked:
            return False
        try:
            self._encode()
            self._decode()
        except Exception as error:
            if not is_engine_error(error):
                raise
            return False
        return True
