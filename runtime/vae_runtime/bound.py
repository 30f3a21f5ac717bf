"""Calls at the least cost: memory for one batch size that is bound to a session once and used again and again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .engine import import_engine
from .preprocess import Float32, ValueRule

if TYPE_CHECKING:
    from .session import GraphSession


def to_host(value: Any) -> Float32:
    """A copy of an `OrtValue`, which belongs to the caller. Its own `numpy` gives a view of what is in host memory."""
    array: Float32 = value.numpy()
    return array if array.flags.owndata else array.copy()


class BoundCall:
    """On the CPU. For one thread at a time. shapes: of the input, then of the outputs, by name."""

    def __init__(self, session: GraphSession, shapes: dict[str, tuple[int, ...]], rule: ValueRule) -> None:
        value = import_engine().OrtValue.ortvalue_from_numpy  # shares the array's memory
        arrays: dict[str, Float32] = {name: np.empty(shape, np.float32) for name, shape in shapes.items()}
        (name, self._input), *outputs = arrays.items()
        self._outputs = [output for _, output in outputs]
        self._checked, self._holds = rule.view(self._input), rule.holds
        binding = session.io_binding()
        binding.bind_ortvalue_input(name, value(self._input))
        for name, output in outputs:
            binding.bind_ortvalue_output(name, value(output))
        self._run = session.bound_run(binding)
        self._session, self._binding = session, binding

    def __call__(self, array: Float32) -> list[Float32] | None:
        """The outputs for an array of the input's shape, which belong to the caller.

        None where the rule does not hold for its values, or the engine fails: `GraphSession.run` then says what is
        wrong.
        """
        self._input[...] = array
        if not self._holds(self._checked) or self._session.inherited:
            return None
        try:
            self._run()
        except Exception:
            return None
        return [output.copy() for output in self._outputs]


class DeviceCall:
    """The same with the input and the outputs in the memory of the session's device, always at the same addresses."""

    def __init__(
        self, session: GraphSession, shapes: dict[str, tuple[int, ...]], rule: ValueRule | None = None
    ) -> None:
        kind, index = session.device.memory
        make = import_engine().OrtValue.ortvalue_from_shape_and_type
        values = {name: make(shape, np.float32, kind, index) for name, shape in shapes.items()}
        (name, self._input), *outputs = values.items()
        self._outputs = [output for _, output in outputs]
        self._rule = rule
        binding = session.io_binding()
        binding.bind_ortvalue_input(name, self._input)
        for name, output in outputs:
            binding.bind_ortvalue_output(name, output)
        self._run = session.bound_run(binding)
        self._session, self._binding = session, binding

    def __call__(self, array: Float32) -> list[Float32] | None:
        """As `BoundCall`."""
        array = np.ascontiguousarray(array)
        if self._rule is None or not self._rule.holds(self._rule.view(array)) or self._session.inherited:
            return None
        try:
            return self.run(array)
        except Exception:
            return None

    def run(self, array: Float32) -> list[Float32]:
        """For a contiguous array that is known to be good; raises what the engine raises."""
        self._input.update_inplace(array)
        self._run()
        return [to_host(output) for output in self._outputs]
