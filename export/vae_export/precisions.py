"""Precisions beside fp32: made, measured on held-out examples, and held to the budget."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from vae_runtime.engine import first_line
from vae_runtime.manifest import HALF_NAMES, INPUT, LATENT, InputSpec, LatentSpec, Likelihood, Precision
from vae_runtime.preprocess import Float32

from .activation_ranges import activation_inputs
from .cuda_forms import for_cuda
from .float16 import ConvertibleGraph
from .halves import Halves, Pair, ReducedHalf, ReducedPair, graph_file
from .int8_search import LayerSearch
from .judge import Judge
from .quality import Budget, Measurement, significant
from .quantize import QuantizableGraph
from .tf32 import tf32_twin, with_exact_first_layer
from .wanted_precisions import Made, Wanted

_log = logging.getLogger(__name__)

TRIAL_EXAMPLES = 64  # of those that calibrate; the choices of a search are many, and need no more
# A device passes its self-test with twice the error that this machine makes on the golden inputs. Another one rounds
# some values the other way, which stays well below that; saturated or broken arithmetic is far above. The floor is for
# models so exact that twice next to nothing would be left; above the ceiling a self-test would tell little: a graph
# that gives only zeros errs by 0.14 or more on the reference cases, int8 as it should be by 0.045 or less.
GOLDEN_FACTOR, GOLDEN_FLOOR, GOLDEN_CEILING = 2.0, 0.002, 0.2
# The encoder's first layer stays as exact as fp32 where otherwise a value of a reconstruction would change by more than
# this, relative to the data's range, and where that brings the change below this or down to such a part of it. It takes
# time.
FLOAT16_ERROR, TF32_ERROR, WORTH_FLOAT32 = 0.005, 0.002, 0.5
# What another order of sums may change in float32, relative to the data's range, or to the largest of mean and logvar.
CUDA_FORM_ERROR = 5e-5
WITHOUT_LAYERS = {
    "int8": "neither half has a convolution or product with constant weights, which int8 is for",
    "tf32": "neither half has a convolution or matrix product, which is what TF32 makes faster",
    "fp16": "every convolution and matrix product is beyond float16's range, by its weights or by its activations on"
    " the calibrating examples, or there is none",
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
    few = wanted.activation_examples[:TRIAL_EXAMPLES]
    _log.info("measuring fp32 on %d inputs", len(wanted.held_out) + len(few))
    final = Judge(graphs, spec, latent, likelihood, wanted.held_out)
    trial = Judge(graphs, spec, latent, likelihood, few)
    inputs = activation_inputs(reference, wanted.activation_examples) if set(wanted.names) - {"tf32"} else {}
    made = Made()
    for_gpus = _in_cuda_forms(made, graphs, final) if {"tf32", "fp16"}.intersection(wanted.names) else graphs
    for name in wanted.names:
        _log.info("making and measuring %s", name)
        try:
            if name == "int8":
                found = _int8(graphs, inputs, trial, final, wanted)
            elif name == "fp16":
                found = _fp16(for_gpus, inputs, trial, final)
            else:
                assert name == "tf32"
                found = _tf32(for_gpus, trial, final)
            _decide(made, name, found, final, wanted, golden)
        except Exception as error:  # the tools of onnxruntime raise what they like
            made.refused[name] = {"reason": f"{name} cannot be made: {first_line(error)}", "quality": {}}
    return made


def _in_cuda_forms(made: Made, graphs: tuple[bytes, bytes], final: Judge) -> tuple[bytes, bytes]:
    """Both graphs as CUDA runs them fastest, which are entered for fp32, and for tf32 where that is fp32's graph."""
    try:
        forms: Pair = for_cuda(graphs[0]), for_cuda(graphs[1])
        if forms == (None, None):
            return graphs
        error = final.form_error(forms)
    except Exception as reason:  # a bundle is complete without them
        _log.warning("forms for CUDA are left out: %s", first_line(reason))
        return graphs
    if not error <= CUDA_FORM_ERROR:
        _log.warning("forms for CUDA are left out: an output is off by %.1e of the largest", error)
        return graphs
    for half, form in zip(HALF_NAMES, forms, strict=True):
        if form is not None:
            made.on_cuda[graph_file(half)] = file = graph_file(half, "cuda")
            made.graphs[file] = form
    return forms[0] or graphs[0], forms[1] or graphs[1]


def _int8(
    graphs: tuple[bytes, bytes], inputs: Mapping[str, Float32], trial: Judge, final: Judge, wanted: Wanted
) -> tuple[ReducedPair, Measurement] | None:
    halves = QuantizableGraph(graphs[0], inputs[INPUT]), QuantizableGraph(graphs[1], inputs[LATENT])
    return LayerSearch(halves, trial, final, wanted.budget).run()


def _fp16(
    graphs: tuple[bytes, bytes], inputs: Mapping[str, Float32], trial: Judge, final: Judge
) -> tuple[ReducedPair, Measurement] | None:
    halves = ConvertibleGraph(graphs[0], inputs[INPUT]), ConvertibleGraph(graphs[1], inputs[LATENT])
    encoder, decoder = (half.build() for half in halves)
    if encoder.graph is None and decoder.graph is None:
        return None
    encoder = _exact_if_worth_it(trial, FLOAT16_ERROR, encoder, decoder, lambda: halves[0].build(keep_first=True))
    return _measured(final, encoder, decoder, calibration_examples=len(inputs[INPUT]))


def _tf32(graphs: tuple[bytes, bytes], trial: Judge, final: Judge) -> tuple[ReducedPair, Measurement] | None:
    encoder, decoder = (ReducedHalf(None, tf32_twin(graph), []) for graph in graphs)
    if encoder.twin is None and decoder.twin is None:
        return None

    def exact() -> ReducedHalf:
        graph, kept = with_exact_first_layer(graphs[0])
        return ReducedHalf(graph, tf32_twin(graph), kept)

    return _measured(final, _exact_if_worth_it(trial, TF32_ERROR, encoder, decoder, exact), decoder)


def _exact_if_worth_it(
    trial: Judge, most: float, encoder: ReducedHalf, decoder: ReducedHalf, make_exact: Callable[[], ReducedHalf]
) -> ReducedHalf:
    """The encoder, or the one whose first layer rounds nothing, which costs time."""
    error = trial.round_trip_error((encoder.twin, decoder.twin))
    if not error > most:
        return encoder
    exact = make_exact()
    if exact.graph is None and decoder.graph is None:  # all of it would be fp32's
        return encoder
    enough = max(most, WORTH_FLOAT32 * error)
    return exact if trial.round_trip_error((exact.twin, decoder.twin)) <= enough else encoder


def _measured(
    final: Judge, encoder: ReducedHalf, decoder: ReducedHalf, **notes: Any
) -> tuple[ReducedPair, Measurement]:
    twins = encoder.twin, decoder.twin
    kept = dict(zip(HALF_NAMES, (encoder.kept, decoder.kept), strict=True))
    return ReducedPair((encoder.graph, decoder.graph), twins, {**notes, "kept_fp32": kept}), final.measure(twins)


def _decide(
    made: Made,
    name: str,
    found: tuple[ReducedPair, Measurement] | None,
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
    made.tolerance[name] = significant(max(GOLDEN_FACTOR * error, GOLDEN_FLOOR), 2)


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
    losses, limits = [f"{measured.psnr_lost:.3g} dB of PSNR"], [f"{budget.psnr_db:g} dB"]
    if measured.found.negative_elbo is not None:
        losses.append(f"{measured.nats_lost:.2g} nats per input dimension")
        limits.append(f"{budget.nats_per_dimension:g} nats")
    return f"{name} loses {' and '.join(losses)} {where}; the budget is {' and '.join(limits)}"
