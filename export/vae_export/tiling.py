"""How the images of a bundle can be computed in parts: from the graphs, and then measured with them."""

from __future__ import annotations

import logging
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import onnx

from vae_runtime.errors import ExportError
from vae_runtime.fidelity import relative_error
from vae_runtime.manifest import HalfTiling, InputSpec, Tiling
from vae_runtime.preprocess import Float32
from vae_runtime.session import GraphSession
from vae_runtime.tiling import TilePlan, run_tiled

from .quality import significant
from .receptive import ReceptiveField, receptive_fields, widest
from .verify import mirrored, open_graphs

_log = logging.getLogger(__name__)

MAX_ERROR = 1e-5  # of what counts as exact, relative as in `HalfTiling`
MAX_SIDE = 4096  # of the images that are measured; a network that looks further is blended
_GIVEN = 2  # cells that the windows measured give beside their context
_BLENDED_SIDE = 128  # at most, of blended windows measured; a network over all positions is mostly a large one


class _Reach(NamedTuple):
    """field: positions of the half's input. context: cells of the latent grid; None: all, because of `reason`."""

    field: int | None
    context: int | None
    reason: str | None = None


def find_tiling(graphs: tuple[bytes, bytes], spec: InputSpec, x: Float32, encoded: dict[str, Float32]) -> Tiling:
    """How far both halves look, and how far tiled results are from untiled ones.

    graphs: the encoder's and the decoder's, height and width free. x: one input, (1, C, H, W), which is mirrored at its
        edges until it has several windows. encoded: see `open_graphs`.

    Raises:
        ExportError: a half gives NaN or infinity for an image of that size.
    """
    _log.info("measuring how far each half looks and what tiling changes")
    factor = spec.multiple_of
    fields = [
        widest(list(receptive_fields(onnx.load_from_string(graph), multiple).values()))
        for graph, multiple in zip(graphs, (factor, 1), strict=True)
    ]
    reaches = _encoder_reach(fields[0], factor), _decoder_reach(fields[1], factor)
    sample = _Sample(open_graphs(graphs, spec, encoded), factor, x)
    encoder, decoder = (sample.measure(half, reach) for half, reach in enumerate(reaches))
    return Tiling(encoder, decoder)


def _encoder_reach(field: ReceptiveField, factor: int) -> _Reach:
    """Windows begin at whole cells, of `factor` pixels; a cell's own pixels are no context."""
    if not field.is_bounded:
        return _Reach(None, None, field.reason)
    if field.ratio != factor or factor % field.alignment:
        return _Reach(field.size, None, "a coarser grid inside the network")
    before, after = field.context_before, field.context_after - (factor - 1)
    return _Reach(field.size, max(-(-before // factor), -(-after // factor), 0))


def _decoder_reach(field: ReceptiveField, factor: int) -> _Reach:
    if not field.is_bounded:
        return _Reach(None, None, field.reason)
    if field.ratio != Fraction(1, factor) or field.alignment != 1:
        return _Reach(field.size, None, "a coarser grid inside the network")
    return _Reach(field.size, max(field.context_before, field.context_after))


class _Sample:
    """One input at several sizes, through both halves, whole and in windows."""

    def __init__(self, sessions: tuple[GraphSession, GraphSession], factor: int, x: Float32) -> None:
        self._sessions, self._factor, self._x = sessions, factor, x

    def measure(self, half: int, reach: _Reach) -> HalfTiling:
        context, reason = reach.context, reach.reason
        if context is not None:
            tile = 2 * context + _GIVEN
            if (tile + 2 * _GIVEN) * self._factor <= MAX_SIDE:
                error = self._error(half, tile, context)
                if error <= MAX_ERROR:
                    return HalfTiling(reach.field, context, significant(error, 2), tile * self._factor)
                reason = f"exact tiles differed by {error:.1e}"
            else:
                reason = f"{context * self._factor} pixels of context, more than the export measures"
        tile = max(min(*self._x.shape[2:], _BLENDED_SIDE) // self._factor, 2)
        return HalfTiling(reach.field, None, significant(self._error(half, tile, None), 2), tile * self._factor, reason)

    def _error(self, half: int, tile: int, context: int | None) -> float:
        """max|Δ| between windows and the whole: three windows from left to right, two from top to bottom."""
        more = tile - 2 * context if context is not None else tile // 2
        # Of the exact ones, neither side is longer by a multiple of 2 cells: networks that pad to a power of 2 differ.
        rows, columns = tile + max(more // 2, 1), tile + 2 * more - (context is not None)
        image = mirrored(self._x, rows * self._factor, columns * self._factor)
        encoder, decoder = self._sessions
        if half == 0:
            plan = TilePlan((rows, columns), tile, context, input_scale=self._factor)
            whole, tiled = _both_ways(encoder, image, plan)
            errors = [relative_error(*pair) for pair in zip(tiled, whole, strict=True)]
        else:
            plan = TilePlan((rows, columns), tile, context, output_scale=self._factor)
            whole, tiled = _both_ways(decoder, encoder.run(image)[0], plan)
            errors = [float(np.abs(tiled[0] - whole[0]).max())]
        if not np.isfinite(errors).all():
            raise ExportError(f"a half gives NaN or infinite values for an image of {image.shape[2]}x{image.shape[3]}")
        return max(errors)


def _both_ways(session: GraphSession, array: Float32, plan: TilePlan) -> tuple[list[Float32], list[Float32]]:
    """What a graph gives at once, and in windows."""
    whole = session.run(array)
    tiled = [np.zeros_like(one) for one in whole]
    run_tiled(session.run, lambda part: np.ascontiguousarray(array[:, :, part[0], part[1]]), plan, tiled)
    return whole, tiled
