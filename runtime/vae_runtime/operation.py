"""One half of a bundle at work, "encode" or "decode": checked inputs, the right session for the batch, in chunks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from .preprocess import Float32, ValueRule
from .sampling import check_count
from .session import BoundCall, GraphSession

# At most this many values per input chunk unless the caller says otherwise: 64 images of 3×128×128, and about 50 times
# as much in the activations of a usual convolutional network.
_CHUNK_VALUES = 64 * 3 * 128 * 128
_CHUNK_EXAMPLES = 256
_BOUND_BATCH_SIZES = 8  # kept at most
_ARRAY, _FLOAT32 = np.ndarray, np.dtype(np.float32)


class Candidate(NamedTuple):
    """One way to run a bundle. threads, spinning: as `GraphSession` takes them."""

    device: str
    precision: str
    threads: int | None = None
    spinning: bool | None = None


class Route(NamedTuple):
    """What runs batches of `from_batch` and more, up to the next route's. precision: the file's own, "fp32" for a half
    that has no file in the precision asked for."""

    from_batch: int
    session: GraphSession
    precision: str

    def describe(self, fixed_batches: Sequence[int]) -> dict[str, Any]:
        """One entry of `VAE.plan`."""
        return {
            "from_batch": self.from_batch,
            "device": self.session.device.name,
            "provider": self.session.device.provider,
            "precision": self.precision,
            "file": self.session.file,
            "threads": self.session.threads,
            "spinning": self.session.spinning,
            "fixed_batches": list(fixed_batches),
        }


class Operation:
    """Runs one half.

    check: whatever the caller passed -> what the graph takes, or an `InputError`. rule: the same for the values alone,
        fast, for arrays of `shape` that are float32 already. image_values: numbers in one input image or vector.
    routes: by rising `from_batch`, the first from 1.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        check: Callable[[Any], Float32],
        rule: ValueRule,
        image_values: int,
        routes: Sequence[Route],
    ) -> None:
        self.routes = tuple(routes)
        self._shape = shape
        self._check = check
        self._rule = rule
        self._chunk = max(1, min(_CHUNK_EXAMPLES, _CHUNK_VALUES // image_values))
        self._sessions = [(route.from_batch, route.session) for route in reversed(self.routes)]
        self._fixed: dict[int, GraphSession] = {}  # made by `warm`, by batch size
        self._free: dict[tuple[int, ...], list[BoundCall]] = {}

    def __call__(self, array: Any, batch_size: int | None = None) -> list[Float32]:
        """-> the graph's outputs, which belong to the caller."""
        # No subclass: masks and the like are for the check.
        if batch_size is None and type(array) is _ARRAY and array.dtype is _FLOAT32 and array.shape in self._free:
            free = self._free[array.shape]
            call = free.pop() if free else None  # what is popped no other thread has; both are atomic
            if call is not None:
                results = call(array)
                free.append(call)
                if results is not None:
                    return results
        checked = self._check(array)
        results = self.run(checked, self.chunk_size(batch_size))
        if batch_size is None and array.dtype is _FLOAT32:
            self._prepare(len(array))
        return results

    def _prepare(self, batch: int) -> None:
        """Have one more call of this batch size ready: this one found none, or was odd."""
        shape = (batch, *self._shape)
        free = self._free.get(shape)
        if not free and batch <= self._chunk and (free is not None or len(self._free) < _BOUND_BATCH_SIZES):
            call = self.session(batch).bind(batch, self._rule)
            if call is not None:
                self._free.setdefault(shape, []).append(call)

    def warm(self, batch: int, read: Callable[[str], bytes]) -> None:
        """Be ready for `batch` examples in one call: sessions for just the batch sizes that it takes, where they are
        faster, and a first run of each. read: a file of the bundle -> its bytes."""
        sizes = {min(batch, self._chunk), batch % self._chunk if batch > self._chunk else 0} - {0}
        for size in sorted(sizes):
            session = self.session(size)
            if session.gains_from_fixed_batch and size not in self._fixed:
                self._fixed[size] = session.for_batch(read(session.file), size)
            self(np.zeros((size, *self._shape), np.float32))

    def plan(self) -> list[dict[str, Any]]:
        """The routes, as `VAE.plan` tells them."""
        fixed = sorted(self._fixed)
        ends = [route.from_batch for route in self.routes[1:]] + [math.inf]
        return [
            route.describe([size for size in fixed if route.from_batch <= size < end])
            for route, end in zip(self.routes, ends, strict=True)
        ]

    def run(self, checked: Float32, size: int) -> list[Float32]:
        """What is known to be good, in chunks of `size`."""
        if len(checked) <= size:
            return self.session(len(checked)).run(checked)
        chunks = [checked[start : start + size] for start in range(0, len(checked), size)]
        parts = [self.session(len(chunk)).run(chunk) for chunk in chunks]
        return [np.concatenate(pieces) for pieces in zip(*parts, strict=True)]

    def session(self, batch: int) -> GraphSession:
        if batch in self._fixed:
            return self._fixed[batch]
        for from_batch, session in self._sessions:
            if batch >= from_batch:
                return session
        return self._sessions[-1][1]

    def chunk_size(self, asked: int | None) -> int:
        return self._chunk if asked is None else check_count(asked, "batch_size")
