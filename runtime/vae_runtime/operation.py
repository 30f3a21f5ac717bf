"""One half of a bundle at work, "encode" or "decode": checked inputs, the right session for the batch, in chunks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arguments import check_count
from .bound import KEPT_SHAPES, BoundCall, BoundPair, Kept
from .boundary import Boundary
from .device_array import DeviceArray, from_dlpack
from .device_call import DeviceCall, StagedCall
from .engine import suppress_engine_errors
from .errors import InputError
from .preprocess import PIXEL, Float32, UInt8, ValueRule, fitting_memory, zeros
from .session import GraphSession, freeing

# At most this many values per input chunk unless the caller says otherwise: 64 images of 3×128×128, and about 50 times
# as much in the activations of a usual convolutional network.
_CHUNK_VALUES = 64 * 3 * 128 * 128
_CHUNK_EXAMPLES = 256
_ARRAY, _FLOAT32 = np.ndarray, np.dtype(np.float32)


class Route:
    """What runs calls with `from_batch` examples and more, up to the next route's.

    precision: the file's own, "fp32" for a half that has no file in the precision asked for.
    """

    def __init__(self, from_batch: int, session: GraphSession, precision: str) -> None:
        self.from_batch = from_batch
        self.precision = precision
        self.any_batch = session
        self._fixed: dict[tuple[int, ...], GraphSession] = {}  # by shape, with the batch
        self._adding = threading.Lock()  # of them; held for no longer than that

    def session(self, shape: tuple[int, ...]) -> GraphSession:
        """What runs an input of this shape, in this thread."""
        fixed = self._fixed.get(shape)
        return fixed if fixed is not None and fixed.serves_this_thread else self.any_batch

    def is_fixed(self, shape: tuple[int, ...]) -> bool:
        """Whether this shape has a session of its own, be it another thread's."""
        return shape in self._fixed

    def fix(self, shape: tuple[int, ...], read: Callable[[str], bytes], rule: ValueRule) -> None:
        """Make a session for just this shape, where that is faster. read: a file of the bundle -> its bytes. rule: what
        calls hold values to."""
        if not self.any_batch.gains_from_fixed_shape or shape in self._fixed:
            return
        self._require_room(shape)
        made = [self.any_batch.for_shape(read(self.any_batch.file), shape, rule)]
        try:
            with self._adding:  # others have made some in the meantime, of this shape too
                self._require_room(shape)
                if shape not in self._fixed:
                    self._fixed[shape] = made.pop()
        finally:
            if made:
                with freeing(made):
                    made.clear()

    def _require_room(self, shape: tuple[int, ...]) -> None:
        if shape not in self._fixed and len(self._fixed) >= KEPT_SHAPES:
            raise InputError(
                f"batch size {shape[0]} would be number {len(self._fixed) + 1} with a session of its own, which takes"
                f" memory; at most {KEPT_SHAPES} are made"
            )

    def drop_orphan(self, shape: tuple[int, ...]) -> list[GraphSession]:
        """The session of this shape where no thread can use it any more, without which this route is then."""
        with self._adding:
            fixed = self._fixed.get(shape)
            return [] if fixed is None or not fixed.is_orphan else [self._fixed.pop(shape)]

    def sessions(self) -> list[GraphSession]:
        """All that this thread's calls may take."""
        return [self.any_batch, *(one for one in list(self._fixed.values()) if one.serves_this_thread)]

    def describe(self) -> dict[str, Any]:
        """One entry of `VAE.plan`."""
        session = self.any_batch
        entry = {
            "from_batch": self.from_batch,
            "device": session.device.name,
            "provider": session.device.provider,
            "precision": self.precision,
            "file": session.file,
            "threads": session.threads,
            "spinning": session.spinning,
            "fixed_batches": sorted({shape[0] for shape in list(self._fixed)}),  # another thread may warm up
        }
        if session.device.is_gpu:
            entry["fixed_on_gpu"] = [fixed.describe_variant() for fixed in list(self._fixed.values())]
        return entry


class Operation:
    """Runs one half.

    boundary: of its graphs. check: whatever the caller passed -> what the graph takes, or an `InputError`. rule: the
        same for the values alone, fast, for arrays that were good in all else.
    channels_first: uint8 arrays as the graph's input is laid out, or None; for graphs that take images.
    routes: by rising `from_batch`, the first from 1; by the examples of a whole call, not of a chunk.
    """

    def __init__(
        self,
        boundary: Boundary,
        check: Callable[[Any], Float32],
        rule: ValueRule,
        routes: Sequence[Route],
        channels_first: Callable[[UInt8], UInt8 | None] = lambda pixels: None,
    ) -> None:
        self.channels_first = channels_first
        self.routes = tuple(routes)
        self._boundary = boundary
        self.check = check
        self._rule = rule
        # Of the routes and not of this object, which would refer to itself and be freed late.
        self.gains_from_bound_memory = partial(_gains_from_bound_memory, boundary, self.routes)
        self._kept: Kept[BoundCall | DeviceCall] = Kept(self.gains_from_bound_memory)
        self._own: dict[tuple[int, ...], DeviceCall] = {}  # of sessions for one shape

    def __call__(self, array: Any, batch_size: int | None = None) -> list[Float32]:
        """-> the graph's outputs, which belong to the caller."""
        # No subclass: masks and the like are for the check.
        given = array if type(array) is _ARRAY and batch_size is None else None
        # An unpickled array has a dtype of its own; to ask whether it is the same first is quicker.
        if given is not None and given.dtype is not _FLOAT32 and given.dtype != _FLOAT32:
            given = self.channels_first(given) if given.dtype == PIXEL else None
        if given is not None:
            shape = given.shape  # once: each time makes a tuple
            own = self._own.get(shape)
            if own is not None and (results := own(given)) is not None:
                return results
            call = self._kept.take(shape)
            if call is not None:
                results = call(given)
                self._kept.keep(shape, call)
                if results is not None:
                    return results
        if isinstance(array, _ARRAY) and array.dtype == PIXEL and (batch_size or array.size > _CHUNK_VALUES):
            pixels = self.channels_first(array)
            if pixels is not None and len(array) > (size := self.chunk_size(batch_size, pixels.shape[1:])):
                return self._run_bytes(array, pixels.shape, size)
        checked = self.check(array)
        results = self.run(checked, self.chunk_size(batch_size, checked.shape[1:]))
        if given is not None:
            self._prepare(checked.shape)
        return results

    def _prepare(self, shape: tuple[int, ...]) -> None:
        """Have a call of this shape ready for the next time, unless one is already."""
        route = self.route(shape[0])
        is_one_chunk = shape[0] <= self.chunk_size(None, shape[1:])
        if not route.is_fixed(shape) and is_one_chunk and self._kept.needs(shape):
            call = route.any_batch.bind(shape, self._rule)
            if call is not None:
                self._kept.keep(shape, call)

    def pair_with(self, decoder: Operation, arrays: Mapping[str, Float32]) -> BoundPair:
        """This encoder and the decoder, both of which gain from bound memory, bound to `arrays`, see `BoundPair`."""
        count = len(arrays[self._boundary.input])
        return BoundPair((self.route(count).any_batch, decoder.route(count).any_batch), arrays, self._rule)

    def warm(self, shape: tuple[int, ...], read: Callable[[str], bytes]) -> None:
        """Be ready for calls of this shape: `Route.fix` and a first run for each number of rows that they come to."""
        examples, chunk = shape[0], self.chunk_size(None, shape[1:])
        route = self.route(examples)
        for rows in {min(examples, chunk), examples % chunk if examples > chunk else 0} - {0}:
            part = (rows, *shape[1:])
            if orphans := route.drop_orphan(part):
                with freeing(orphans):
                    orphans.clear()
                    self._own.pop(part, None)
            route.fix(part, read, self._rule)
            if route.is_fixed(part):
                self._kept.drop(part)  # calls that would be taken in its place
                self._prefer(route.session(part), part)
            self._kept.named.add(part)
            inputs = zeros(part, "a batch")
            if rows == examples:
                self(inputs)
            else:
                route.session(part).run(inputs)

    def _prefer(self, session: GraphSession, shape: tuple[int, ...]) -> None:
        """Have calls of this shape take the memory of the session for it, where it has some."""
        if session.fixed == shape and self.route(shape[0]).session(shape) is session:
            call = session.bind(shape, self._rule)
            if isinstance(call, DeviceCall):
                self._own[shape] = call

    def run(self, checked: Float32, size: int, examples: int | None = None) -> list[Float32]:
        """What is known to be good, in chunks of `size`. examples: how many the whole call has, if these are a part."""
        route = self.route(examples or len(checked))
        if len(checked) <= size:
            return route.session(checked.shape).run(checked)
        chunks = (checked[start : start + size] for start in range(0, len(checked), size))
        return self._collect((route.session(chunk.shape).run(chunk) for chunk in chunks), checked.shape)

    def _collect(self, parts: Iterable[Sequence[Float32]], shape: tuple[int, ...]) -> list[Float32]:
        """The outputs of chunks, one after the other, of inputs that have this shape together."""
        with fitting_memory("the result for inputs", shape):  # before hours are spent on it
            results = [np.empty((shape[0], *one), np.float32) for one in self._boundary.output_shapes(shape[1:])]
        start = 0
        for part in parts:
            end = start + len(part[0])
            for result, piece in zip(results, part, strict=True):
                result[start:end] = piece
            start = end
        return results

    def _run_bytes(self, array: UInt8, shape: tuple[int, ...], size: int) -> list[Float32]:
        """uint8, of which any value is good and which takes four times the memory as float32, in chunks of `size`.
        shape: as the graph has it."""
        if not self._boundary.accepts(shape[1:]):
            self.check(array)  # says what is wrong
        chunks = (self.check(array[start : start + size]) for start in range(0, len(array), size))
        return self._collect((self.run(chunk, size, len(array)) for chunk in chunks), shape)

    def run_on_device(self, array: Any, name: str) -> list[DeviceArray]:
        """The same without leaving the device's memory, in one piece. array: what a call takes, or an array in that
        memory, whose values are not looked at."""
        if isinstance(array, np.ndarray):
            checked = self.check(array)
            shared = self.route(len(checked)).any_batch.to_device(checked)
        else:
            shared = from_dlpack(array, self._boundary, self.route(_rows(array)).any_batch.device, name)
        route, found = self.route(len(shared)), None
        if (fixed := route.session(shared.shape)).replays_on_device:
            with suppress_engine_errors:  # else the session for any batch tries, or says why not
                found = fixed.replay_on_device(shared)
        return route.any_batch.run_on_device(shared) if found is None else found

    def then(self, decoder: Operation, array: Any, batch_size: int | None) -> Float32:
        """Encode, take the mean, decode, without bringing the latents to host memory in between."""
        checked = self.check(array)
        size, route = self.chunk_size(batch_size, checked.shape[1:]), self.route(len(checked))
        if batch_size is None and route.session(checked.shape) is not route.any_batch:
            pair = self._staged_pair(decoder, checked.shape)
            if pair is not None and (images := pair[0].then(pair[1], checked)) is not None:
                return images
            # A CUDA graph gains more than the copies of small latents cost.
            latents = route.session(checked.shape).run(checked)[0]
            return decoder.run(latents, len(latents))[0]
        encode, decode = route.any_batch, decoder.route(len(checked)).any_batch
        parts = []
        for start in range(0, len(checked), size):
            mean, *_ = encode.run_on_device(encode.to_device(checked[start : start + size]))
            parts.append(decode.run_on_device(mean)[0].numpy())
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def warm_then(self, decoder: Operation, shape: tuple[int, ...]) -> None:
        """Do what the first `then` with inputs of this shape would do once."""
        pair = self._staged_pair(decoder, shape)
        if pair is not None and all(call.may_run() for call in pair):
            pair[0].steps_to(pair[1])

    def _staged_pair(self, decoder: Operation, shape: tuple[int, ...]) -> tuple[StagedCall, StagedCall] | None:
        """The calls of sessions for inputs of this shape and for their latents, where both are on a stream."""
        first = self._own.get(shape)
        second = decoder._own.get((shape[0], *self._boundary.output_shapes(shape[1:])[0]))
        return (first, second) if isinstance(first, StagedCall) and isinstance(second, StagedCall) else None

    def run_each(self, array: Any) -> Iterator[tuple[Route, NDArray[np.intp], list[Float32]]]:
        """By each session of each route that this thread's calls may take: its route, the rows of the same input that
        it was given, all of them and some twice where it takes another number, and the outputs for them."""
        checked = self.check(array)
        for route in self.routes:
            for session in route.sessions():
                count = len(checked) if session.fixed is None else session.fixed[0]
                if session.fixed not in (None, (count, *checked.shape[1:])):
                    continue
                rows = np.arange(-(-len(checked) // count) * count) % len(checked)
                parts = (session.run(checked[rows[start : start + count]]) for start in range(0, len(rows), count))
                yield route, rows, self._collect(parts, (len(rows), *checked.shape[1:]))

    def route(self, examples: int) -> Route:
        """The whole call takes one route, so that chunks do not change the result."""
        return _route(self.routes, examples)

    def chunk_size(self, asked: int | None, shape: tuple[int, ...]) -> int:
        """Examples of this shape to run at once."""
        if asked is not None:
            return check_count(asked, "batch_size")
        return max(1, min(_CHUNK_EXAMPLES, _CHUNK_VALUES // self._boundary.largest(shape)))


def _rows(array: Any) -> int:
    """How many examples another library's array has; 1 where it does not say, whatever it raises."""
    try:
        return max(1, int(array.shape[0]))
    except Exception:
        return 1


def _route(routes: Sequence[Route], examples: int) -> Route:
    return next(route for route in reversed(routes) if examples >= route.from_batch)


def _gains_from_bound_memory(boundary: Boundary, routes: Sequence[Route], shape: tuple[int, ...]) -> bool:
    """Whether inputs may have this shape, with the batch, and calls with it cost less with bound memory."""
    if not shape or shape[0] < 1 or not boundary.accepts(shape[1:]):
        return False
    route = _route(routes, shape[0])
    return not route.is_fixed(shape) and route.any_batch.gains_from_bound_memory(shape)
