"""Windows of a large image: the plan, and results put together against those of the whole image."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vae_runtime.errors import InputError
from vae_runtime.tiling import TilePlan, blended_spans, exact_spans, run_tiled

FACTOR = 4

lengths, contexts, more = st.integers(1, 90), st.integers(0, 8), st.integers(1, 20)


@settings(max_examples=300, deadline=None)
@given(lengths, contexts, more)
@example(40, 3, 1)
@example(1, 0, 1)
def test_exact_windows_give_every_output_once_with_its_context(length: int, context: int, extra: int) -> None:
    tile = 2 * context + extra
    spans = exact_spans(length, tile, context)
    given_cells = [cell for span in spans for cell in range(span.begin, span.end)]
    assert given_cells == list(range(length))
    assert {span.stop - span.start for span in spans} == {min(tile, length)}
    for span in spans:
        assert 0 <= span.start <= span.begin < span.end <= span.stop <= length
        assert span.start == 0 or span.begin - context >= span.start
        assert span.stop == length or span.end + context <= span.stop
    assert len(spans) <= max(1, -(-(length - 2 * context) // extra))  # no more than are needed


@settings(max_examples=300, deadline=None)
@given(lengths, st.integers(1, 30), st.sampled_from([1, 4]))
@example(15, 8, 1)
@example(90, 1, 4)
def test_blended_windows_overlap_and_their_weights_add_up_to_one(length: int, tile: int, scale: int) -> None:
    spans = blended_spans(length, tile, scale)
    assert {span.stop - span.start for span in spans} == {min(tile, length)}
    total = np.zeros(length * scale)
    for span in spans:
        assert 0 <= span.start < span.stop <= length
        assert span.weights is not None
        assert (span.weights > 0).all()
        total[span.begin * scale : span.end * scale] += span.weights
    np.testing.assert_allclose(total, 1, atol=1e-6)
    overlaps = [first.stop - second.start for first, second in itertools.pairwise(spans)]
    assert all(overlap >= tile // 4 for overlap in overlaps)


def test_two_windows_go_over_from_one_to_the_other_linearly() -> None:
    first, second = blended_spans(14, 8)
    assert (first.start, second.start) == (0, 6)
    np.testing.assert_allclose(first.weights, [1, 1, 1, 1, 1, 1, 0.75, 0.25])
    np.testing.assert_allclose(second.weights, [0.25, 0.75, 1, 1, 1, 1, 1, 1])
    first, second = blended_spans(14, 8, 2)  # two positions for each cell
    np.testing.assert_allclose(first.weights, [1] * 12 + [0.875, 0.625, 0.375, 0.125])
    np.testing.assert_allclose(second.weights, first.weights[::-1])


KERNEL = np.random.default_rng(0).uniform(0.5, 1.5, (5, 5)).astype(np.float32)
CONTEXT = len(KERNEL) // 2  # in cells, where the convolution works on cells


def convolve(x: np.ndarray) -> np.ndarray:
    """(1, C, rows, columns), every channel by itself, padded with zeros, then a curve."""
    reach = len(KERNEL) // 2
    padded = np.pad(x, [(0, 0), (0, 0), (reach, reach), (reach, reach)])
    views = np.lib.stride_tricks.sliding_window_view(padded, KERNEL.shape, axis=(2, 3))
    return np.tanh(np.einsum("ncyxij,ij->ncyx", views, KERNEL, dtype=np.float32) / 20)


def encode(x: np.ndarray) -> list[np.ndarray]:
    """Pixels -> cells: the mean of each cell, then the convolution; two outputs, as of a VAE."""
    rows, columns = (side // FACTOR for side in x.shape[2:])
    cells = convolve(x.reshape(*x.shape[:2], rows, FACTOR, columns, FACTOR).mean(axis=(3, 5), dtype=np.float32))
    return [cells, cells[:, :1] - 1]


def decode(z: np.ndarray) -> list[np.ndarray]:
    """Cells -> pixels: the convolution, then every cell enlarged."""
    return [convolve(z).repeat(FACTOR, axis=2).repeat(FACTOR, axis=3)]


def whole_and_tiled(
    network: Callable[[np.ndarray], list[np.ndarray]], size: tuple[int, int], tile: int, context: int | None
) -> tuple[list[np.ndarray], list[np.ndarray], list[tuple[int, int]]]:
    """What the network gives at once, what it gives by windows, and the shapes of these windows."""
    scales = (FACTOR, 1) if network is encode else (1, FACTOR)
    x = np.random.default_rng(1).uniform(0, 1, (1, 2, size[0] * scales[0], size[1] * scales[0])).astype(np.float32)
    expected = network(x)
    outputs = [np.zeros_like(array) for array in expected]
    shapes: list[tuple[int, int]] = []

    def run(window: np.ndarray) -> list[np.ndarray]:
        shapes.append(window.shape[2:])
        return network(window)

    run_tiled(run, lambda part: x[:, :, part[0], part[1]], TilePlan(size, tile, context, *scales), outputs)
    return expected, outputs, shapes


@pytest.mark.parametrize("network", [encode, decode])
@pytest.mark.parametrize(("size", "tile"), [((30, 41), 5), ((30, 41), 12), ((7, 33), 8), ((9, 9), 16), ((1, 20), 6)])
def test_windows_with_their_context_give_exactly_the_whole(network: Callable, size: tuple[int, int], tile: int) -> None:
    expected, outputs, shapes = whole_and_tiled(network, size, tile, CONTEXT)
    for array, reference in zip(outputs, expected, strict=True):
        np.testing.assert_allclose(array, reference, atol=1e-6)
    scale = FACTOR if network is encode else 1
    assert set(shapes) == {(min(size[0], tile) * scale, min(size[1], tile) * scale)}


@pytest.mark.parametrize("network", [encode, decode])
def test_a_context_one_too_small_is_not_exact(network: Callable) -> None:
    expected, outputs, _ = whole_and_tiled(network, (30, 41), 12, CONTEXT - 1)
    assert np.abs(outputs[0] - expected[0]).max() > 1e-3


@pytest.mark.parametrize("network", [encode, decode])
def test_blended_windows_come_near_and_stay_in_range(network: Callable) -> None:
    expected, outputs, shapes = whole_and_tiled(network, (30, 41), 12, None)
    assert 1e-4 < np.abs(outputs[0] - expected[0]).max() < 0.5
    assert len(set(shapes)) == 1
    assert np.abs(outputs[0]).max() <= np.abs(expected[0]).max() + 1e-2


def test_blending_what_does_not_depend_on_the_window_changes_nothing() -> None:
    x = np.random.default_rng(2).uniform(0, 1, (1, 3, 37, 50)).astype(np.float32)
    output = np.zeros_like(x)
    run_tiled(lambda part: [part], lambda part: x[:, :, part[0], part[1]], TilePlan((37, 50), 16, None), [output])
    np.testing.assert_allclose(output, x, atol=1e-6)


def test_progress_counts_windows() -> None:
    plan = TilePlan((10, 20), 8, 1)
    calls: list[tuple[int, int]] = []
    x = np.zeros((1, 1, 10, 20), np.float32)
    run_tiled(
        lambda part: [part], lambda part: x[:, :, part[0], part[1]], plan, [x.copy()], lambda *args: calls.append(args)
    )
    assert calls == [(done, len(plan)) for done in range(1, len(plan) + 1)]
    assert len(plan) == len(list(plan)) > 2


def test_a_tile_of_nothing_but_context_is_refused_with_the_smallest_that_works() -> None:
    with pytest.raises(InputError, match=r"tile is 32.*16 pixels of context.*smallest tile for this model is 36"):
        TilePlan((100, 100), 8, 4, 1, FACTOR)
    assert len(TilePlan((100, 100), 9, 4, 1, FACTOR)) == 92 * 92
