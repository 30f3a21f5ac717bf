"""Calls at the least cost: memory for one batch size that is bound to a session once and used again and again."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from .engine import import_engine, is_engine_error
from .preprocess import PIXEL, Float32, UInt8, ValueRule, copy_pixels

if TYPE_CHECKING:
    from .session import GraphSession


PATIENCE = 32  # calls that go by before a shape that comes no more gives way: binding costs half a call


class Recency:
    """When shapes whose bound memory is kept were used, which tells whose gives way to another's."""

    def __init__(self) -> None:
        self._used: dict[Any, int] = {}  # the number of the last call, by shape
        self._numbers = itertools.count()

    def note(self, shape: Any) -> None:
        """It is used now."""
        self._used[shape] = next(self._numbers)

    def give_way(self, shapes: Iterable[Any], patience: int = PATIENCE) -> Any:
        """The one that was used longest ago, which is forgotten; None where that is no more than `patience` calls."""
        used = {self._used.get(one, 0): one for one in shapes}
        if not used or min(used) + patience >= next(self._numbers):
            return None
        oldest = used[min(used)]
        self._used.pop(oldest, None)
        return oldest


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
    """Whose a session is: of the process that made it and, where its memory is for one thread alone, of that one."""

    def __init__(self) -> None:
        self.is_of_parent = False  # this process was forked off the one that made it
        self._of_thread = threading.local()  # unlike a thread's number, never another one's after its end
        self._of_thread.is_owner = True

    @property
    def is_this_thread(self) -> bool:
        return getattr(self._of_thread, "is_owner", False)


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
        if not self._take(array) or self._owner.is_of_parent:
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
        if not self._take(array) or self._owner.is_of_parent:
            return False
        try:
            self._encode()
            self._decode()
        except Exception as error:
            if not is_engine_error(error):
                raise
            return False
        return True
