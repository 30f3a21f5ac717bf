"""Precisions beside fp32: made, measured on held-out examples, and held to the budget."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from vae_runtime.engine import first_line
from vae_runtime.manifest import INPUT, LATENT, InputSpec, LatentSpec, Likelihood, Precision
from vae_runtime.preprocess import Float32

from .activation_ranges import activation_inputs
from .float16 import ConvertibleGraph
from .halves import HALF_NAMES, Halves, graph_file
from .int8_search import Candidate, LayerSearch
from .judge import Judge, Pair
from .quality import Budget, Measurement
from .quantize import QuantizableGraph
from .wanted_precisions import Made, Wanted

TRIAL_EXAMPLES = 64  # of those that calibrate; the choices of a search are many, and need no more
# A device passes its self-test with twice the error that this machine makes on the golden inputs. Another one rounds
# some values the other way, which stays well below that; saturated or broken arithmetic is far above. The floor is for
# models so exact that twice next to nothing would be left; above the ceiling a self-test would tell little: a graph
# that gives only zeros errs by 0.14 or more on the reference cases, int8 as it should be by 0.045 or less.
GOLDEN_FACTOR, GOLDEN_FLOOR, GOLDEN_CEILING = 2.0, 0.002, 0.2
# fp16's first layer stays in fp32 where fp16 would change a value of a reconstruction by more than the former, relative
# to the data's range, and this leaves no more than the latter of that change: it costs time, which must be worth it.
FLOAT16_ERROR, WORTH_FLOAT32 = 0.005, 0.5
WITHOUT_LAYERS = {
    "int8": "neither half has a convolution or product with constant weights, which int8 is for",
    "fp16": "every layer's activations on the calibrating examples, or its weights, are beyond float16's range",
}


def make_precisions(
    wanted: Wanted,
    graphs: tuple[bytes, bytes],
    reference: Halves,
    spec: InputSpec,
    latent: LatentSpec,
    likelihood: Likelihood | None,
    golden: Mapping[str, Float32],
) -> Made:
    """Make and measure every wanted precision of the two fp32 graphs."""
    final = Judge(graphs, spec, latent, likelihood, wanted.held_out)
    trial = Judge(graphs, spec, latent, likelihood, wanted.activation_examples[:TRIAL_EXAMPLES])
    inputs = activation_inputs(reference, wanted.activation_examples)
    made = Made()
    for name in wanted.names:
        try:
            found = (
                _int8(graphs, inputs, trial, final, wanted) if name == "int8" else _fp16(graphs, inputs, trial, final)
            )
            _decide(made, name, found, final, wanted, golden)
        except Exception as error:  # the tools of onnxruntime raise what they like
            made.refused[name] = {"reason": f"{name} cannot be made: {first_line(error)}", "quality": {}}
    return made


def _int8(
    graphs: tuple[bytes, bytes], inputs: Mapping[str, Float32], trial: Judge, final: Judge, wanted: Wanted
) -> tuple[Candidate, Measurement] | None:
    halves = QuantizableGraph(graphs[0], inputs[INPUT]), QuantizableGraph(graphs[1], inputs[LATENT])
    return LayerSearch(halves, trial, final, wanted.budget).run()


def _fp16(
    graphs: tuple[bytes, bytes], inputs: Mapping[str, Float32], trial: Judge, final: Judge
) -> tuple[Candidate, Measurement] | None:
    halves = ConvertibleGraph(graphs[0], inputs[INPUT]), ConvertibleGraph(graphs[1], inputs[LATENT])
    encoder, decoder = (half.build() for half in halves)
    if encoder.graph is None and decoder.graph is None:
        return None
    error = trial.round_trip_error((encoder.twin, decoder.twin))
    if error > FLOAT16_ERROR:
        exact = halves[0].build(keep_first=True)
        if trial.round_trip_error((exact.twin, decoder.twin)) <= WORTH_FLOAT32 * error:
            encoder = exact
    twins = encoder.twin, decoder.twin
    kept = {name: half.kept for name, half in zip(HALF_NAMES, (encoder, decoder), strict=True)}
    notes = {"calibration_examples": len(inputs[INPUT]), "kept_fp32": kept}
    return Candidate((encoder.graph, decoder.graph), twins, notes), final.measure(twins)


def _decide(
    made: Made,
    name: str,
    found: tuple[Candidate, Measurement] | None,
    final: Judge,
    wanted: Wanted,
    golden: Mapping[str, Float32],
) -> None:
    if found is None:
        made.refused[name] = {"reason": f"{name}: {WITHOUT_LAYERS[name]}", "quality": {}}
        return
    candidate, measured = found
    within = measured.within(wanted.budget)
    quality = {"within_budget": within, **measured.to_dict(), **candidate.notes}
    if not measured.finite or not (within or wanted.keep):
        made.refused[name] = {"reason": _reason(name, measured, wanted.budget), "quality": quality}
        return
    # fp16's graphs themselves run here for the first time, and may fail: only what went well is entered, at the end.
    fidelity = final.fidelity(measured, candidate.twins[1])
    error = float(
        np.max([final.golden_error(golden, pair, name) for pair in _different(candidate.graphs, candidate.twins)])
    )
    if reason := _broken(name, error, fidelity):
        made.refused[name] = {"reason": reason, "quality": quality}
        return
    files = [
        graph_file(half, "fp32" if graph is None else name)
        for half, graph in zip(HALF_NAMES, candidate.graphs, strict=True)
    ]
    made.graphs |= {file: graph for file, graph in zip(files, candidate.graphs, strict=True) if graph is not None}
    made.precisions[name] = Precision(files[0], files[1], fidelity, quality)
    made.tolerance[name] = float(f"{max(GOLDEN_FACTOR * error, GOLDEN_FLOOR):.2g}")


def _different(graphs: Pair, twins: Pair) -> list[Pair]:
    return [graphs] if graphs == twins else [graphs, twins]


def _broken(name: str, error: float, fidelity: Mapping[str, Any]) -> str | None:
    """Why these graphs are never written, whatever the budget allows; None where nothing is wrong."""
    if not all(math.isfinite(value) for key, value in fidelity.items() if key.endswith("_max_error")):
        return f"{name} gives NaN or infinite values on {fidelity['examples']} held-out examples"
    if not math.isfinite(error):
        return f"{name} gives NaN or infinite values on the golden inputs"
    largest = GOLDEN_CEILING / GOLDEN_FACTOR
    if error > largest:
        rule = f"above {largest:g} a self-test could not tell it from broken arithmetic"
        return f"{name} is off by {error:.2g} of the largest value on the golden inputs; {rule}"
    return None


def _reason(name: str, measured: Measurement, budget: Budget) -> str:
    where = f"on {measured.examples} held-out examples"
    if not measured.finite:
        return f"{name} gives NaN or infinite values {where}"
    return (
        f"{name} loses {measured.psnr_lost:.3g} dB of PSNR and {measured.nats_lost:.2g} nats per input dimension"
        f" {where}; the budget is {budget.psnr_db:g} dB and {budget.nats_per_dimension:g} nats"
    )
