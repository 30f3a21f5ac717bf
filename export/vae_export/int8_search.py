"""Which layers of an int8 model stay in fp32: as few of the worst as the budget needs."""

from __future__ import annotations

from collections.abc import Collection

from vae_runtime.manifest import HALF_NAMES

from .activation_ranges import METHODS
from .halves import Pair, ReducedPair
from .judge import Judge
from .quality import Budget, Measurement
from .quantize import QuantizableGraph

ENOUGH = 0.5  # of the budget: a way of calibration that uses no more is taken without trying the next
Layer = tuple[int, str]  # which half, and the node's name


class LayerSearch:
    """Both halves in int8, the layers that lose most in fp32.

    trial: judges ways of calibration, and layers alone, on the examples that calibrate. final: judges results, on
        held-out ones, and by them decides how many layers stay in fp32: the fewest found within the budget. Where that
        is some, the measured loss is slightly lower than on examples that had no part in the choice.
    """

    def __init__(
        self, halves: tuple[QuantizableGraph, QuantizableGraph], trial: Judge, final: Judge, budget: Budget
    ) -> None:
        self._halves, self._trial, self._final, self._budget = halves, trial, final, budget
        self._layers: list[Layer] = [(half, node) for half in (0, 1) for node in halves[half].nodes]
        self._methods = ("", "")

    def run(self) -> tuple[ReducedPair, Measurement] | None:
        """The first within the budget; else everything in int8, which misses it; None where nothing can be in int8."""
        if not self._layers:
            return None
        self._methods = (self._best_method(0), self._best_method(1))
        everything = self._measured(())
        if everything[1].within(self._budget):
            return everything
        ranked = self._worst_first()
        best, failing, passing = everything, 0, len(ranked)
        while passing - failing > 1:  # keeping `failing` layers misses the budget, keeping all of them is fp32
            count = (failing + passing) // 2
            found = self._measured(ranked[:count])
            if found[1].within(self._budget):
                best, passing = found, count
            else:
                failing = count
        return best

    def _best_method(self, half: int) -> str:
        nodes = self._halves[half].nodes
        if not nodes:
            return next(iter(METHODS))
        shares: dict[str, float] = {}
        for method in METHODS:
            graph = self._halves[half].build(nodes, method)
            shares[method] = self._trial.measure((graph, None) if half == 0 else (None, graph)).share(self._budget)
            if shares[method] <= ENOUGH:
                return method
        return min(shares, key=lambda method: shares[method])

    def _worst_first(self) -> list[Layer]:
        """The layers by what each loses when it alone is in int8."""
        loss = {layer: self._trial.measure(self._build({layer})).share(self._budget) for layer in self._layers}
        return sorted(self._layers, key=lambda layer: -loss[layer])

    def _build(self, layers: Collection[Layer]) -> Pair:
        encoder, decoder = (
            graph.build({node for position, node in layers if position == half}, self._methods[half])
            for half, graph in enumerate(self._halves)
        )
        return encoder, decoder

    def _measured(self, kept: Collection[Layer]) -> tuple[ReducedPair, Measurement]:
        graphs = self._build([layer for layer in self._layers if layer not in kept])
        notes = {
            "calibration": dict(zip(HALF_NAMES, self._methods, strict=True)),
            "calibration_examples": self._halves[0].examples,
            "kept_fp32": {
                name: [node for node in self._halves[half].nodes if (half, node) in kept]
                for half, name in enumerate(HALF_NAMES)
            },
            "layers": {name: len(self._halves[half].nodes) for half, name in enumerate(HALF_NAMES)},
        }
        return ReducedPair(graphs, graphs, notes), self._final.measure(graphs)
