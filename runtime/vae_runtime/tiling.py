"""Large images in bounded memory: window by window, put together exactly where the network's view is bounded.

Lengths here count cells, the positions of the latent grid; an image has `factor` pixels per cell on each side. A window
is what the network is given at once, its context included, so that its size alone bounds the memory.

Exact: an output depends on cells at most `context` away. Each is taken from one window in which all of these lie, or
which ends where the image does, so that the network pads there as it does for the whole image.

Blended: a network that looks at the whole image (attention, GroupNorm) gives every window other results. Windows
overlap, and where they do, the result goes over from one to the other linearly, as in diffusers'
`AutoencoderKL.tiled_decode` (`blend_v`, `blend_h`). What comes out is an approximation.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .errors import InputError
from .preprocess import Float32

Progress = Callable[[int, int], Any]
OVERLAP = 4  # blended windows share one part in so many


class Span(NamedTuple):
    """One window along one side, in cells: it reads [start, stop) and gives [begin, end) of the result; `weights`, one
    per output position of [begin, end), where windows are blended."""

    start: int
    stop: int
    begin: int
    end: int
    weights: Float32 | None = None


class Window(NamedTuple):
    """source: rows and columns of the whole input. taken: of the window's own output. target: of the whole output.
    weights: of rows and of columns of what is taken; None where it is put there as it is."""

    source: tuple[slice, slice]
    taken: tuple[slice, slice]
    target: tuple[slice, slice]
    weights: tuple[Float32, Float32] | None = None


class TilePlan:
    """The windows for one image: `len` of them, all of the same shape, row by row.

    size: (height, width) in cells. tile: a window's side in cells; a side of the image that is shorter is taken whole.
    context: in cells; None blends. input_scale, output_scale: positions of the network's input and output per cell:
    (factor, 1) to encode, (1, factor) to decode.

    Raises:
        InputError: the tile does not hold more than its context.
    """

    def __init__(
        self, size: tuple[int, int], tile: int, context: int | None, input_scale: int = 1, output_scale: int = 1
    ) -> None:
        self._input, self._output = input_scale, output_scale
        if context is not None:
            factor = max(input_scale, output_scale)
            check_tile(tile, context, factor)
            self._spans = [exact_spans(length, tile, context) for length in size]
        else:
            self._spans = [blended_spans(length, tile, output_scale) for length in size]
        self.is_exact = context is not None

    def __len__(self) -> int:
        return len(self._spans[0]) * len(self._spans[1])

    def __iter__(self) -> Iterator[Window]:
        for row, column in itertools.product(*self._spans):
            pair = (row, column)
            weights = None if row.weights is None or column.weights is None else (row.weights, column.weights)
            yield Window(
                _slices([(one.start, one.stop) for one in pair], self._input),
                _slices([(one.begin - one.start, one.end - one.start) for one in pair], self._output),
                _slices([(one.begin, one.end) for one in pair], self._output),
                weights,
            )


def check_tile(tile: int, context: int, factor: int, name: str = "tile") -> None:
    """Raise `InputError` where a window of `tile` cells would be nothing but context; name: the argument's."""
    if tile <= 2 * context:
        raise InputError(
            f"{name} is {tile * factor}, but each window needs {context * factor} pixels of context on every side; the"
            f" smallest tile for this model is {(2 * context + 1) * factor}"
        )


def exact_spans(length: int, tile: int, context: int) -> list[Span]:
    """Windows of min(tile, length) cells that together give each of `length` cells once, with its context."""
    if length <= tile:
        return [Span(0, length, 0, length)]
    spans, done = [], 0
    while done < length:
        start = min(max(done - context, 0), length - tile)
        stop = start + tile
        end = length if stop == length else stop - context
        spans.append(Span(start, stop, done, end))
        done = end
    return spans


def blended_spans(length: int, tile: int, output_scale: int = 1) -> list[Span]:
    """Evenly spread windows of min(tile, length) cells that overlap by a quarter or more, with weights that add up to
    1 at every output position."""
    if length <= tile:
        return [Span(0, length, 0, length, np.ones(length * output_scale, np.float32))]
    step = max(tile - max(tile // OVERLAP, 1), 1)
    count = -(-(length - tile) // step)
    starts = [(length - tile) * number // count for number in range(count + 1)]
    ramps = []
    for number, start in enumerate(starts):
        rising = starts[number - 1] + tile - start if number > 0 else 0
        falling = start + tile - starts[number + 1] if number < count else 0
        ramps.append(_ramp(tile * output_scale, rising * output_scale, falling * output_scale))
    total = np.zeros(length * output_scale)
    for start, ramp in zip(starts, ramps, strict=True):
        total[start * output_scale :][: len(ramp)] += ramp
    spans = []
    for start, ramp in zip(starts, ramps, strict=True):
        weights = (ramp / total[start * output_scale :][: len(ramp)]).astype(np.float32)
        spans.append(Span(start, start + tile, start, start + tile, weights))
    return spans


def run_tiled(
    run: Callable[[Float32], Sequence[Float32]],
    read: Callable[[tuple[slice, slice]], Float32],
    plan: TilePlan,
    outputs: Sequence[Float32],
    progress: Progress | None = None,
) -> None:
    """Run a network on every window of `plan` and put what it gives into `outputs`, which are zero before.

    run: windows (1, C, rows, columns) -> one array for each of `outputs`. read: rows and columns of the whole input ->
        that window, (1, C, rows, columns). outputs: each (1, C, height, width), written in place; one that has fewer
        rows or columns than the plan is that much of the result.
    progress: called with the number of windows done and their total, after each.
    """
    for done, window in enumerate(plan, start=1):
        # Nothing of one window may live on into the next: the engine would take new memory for it.
        _put(run(read(window.source)), window, outputs)
        if progress is not None:
            progress(done, len(plan))


def _put(results: Sequence[Float32], window: Window, outputs: Sequence[Float32]) -> None:
    """What one window gave, into its place."""
    for output, result in zip(outputs, results, strict=True):
        target = output[..., window.target[0], window.target[1]]
        rows, columns = target.shape[-2:]  # less than the window's where the output is cut
        part = result[..., window.taken[0], window.taken[1]][..., :rows, :columns]
        if window.weights is None:
            target[...] = part
        else:
            target += part * (window.weights[0][:rows, None] * window.weights[1][:columns])


def _ramp(size: int, rising: int, falling: int) -> NDArray[np.float64]:
    """Weights over a window: 1, but linear over the `rising` first and the `falling` last positions."""
    places = np.arange(size) + 0.5
    up = np.minimum(places / rising, 1) if rising > 0 else np.ones(size)
    down = np.minimum((size - places) / falling, 1) if falling > 0 else np.ones(size)
    return np.minimum(up, down)


def _slices(bounds: Sequence[tuple[int, int]], scale: int) -> tuple[slice, slice]:
    rows, columns = (slice(start * scale, stop * scale) for start, stop in bounds)
    return rows, columns
