"""The ranges that activations take on real inputs."""

from __future__ import annotations

import contextlib
import io
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, create_calibrator

from vae_runtime.manifest import INPUT, LATENT, LOGVAR, MEAN
from vae_runtime.posterior import Posterior
from vae_runtime.preprocess import Float32
from vae_runtime.sampling import NormalStream

from .halves import Halves

# Ways of calibration by their names in the manifest, tried in this order. onnxruntime's entropy has nothing to choose
# from at its default of 128 bins, and its time grows with their square.
METHODS: dict[str, tuple[CalibrationMethod, dict[str, Any]]] = {
    "minmax": (CalibrationMethod.MinMax, {}),
    "percentile 99.99": (CalibrationMethod.Percentile, {"percentile": 99.99, "symmetric": False}),
    "percentile 99.9": (CalibrationMethod.Percentile, {"percentile": 99.9, "symmetric": False}),
    "entropy": (CalibrationMethod.Entropy, {"num_bins": 256}),
}
BATCH_SIZE = 32
BATCH_VALUES = 2**24  # activations held at once
HISTOGRAM_VALUES = 2**28  # activations counted into histograms, half a minute's work; large models take fewer examples
DRAW_SEED = 1


def activation_inputs(reference: Halves, x: Float32) -> dict[str, Float32]:
    """What the halves' activations are measured on, by tensor: `x` itself, and all that a decoder is given in use.

    Those are the modes of the posteriors, draws from them, and draws from the prior; a plain autoencoder's codes.
    """
    encoded = reference.encode(x)
    posterior = Posterior(encoded[MEAN], encoded.get(LOGVAR))
    if posterior.logvar is None:
        return {INPUT: x, LATENT: posterior.mean}
    prior = NormalStream(DRAW_SEED).draw(len(x), posterior.mean.shape[1:])
    return {INPUT: x, LATENT: np.concatenate([posterior.mean, posterior.sample(seed=DRAW_SEED), prior])}


def activation_ranges(model: onnx.ModelProto, x: Float32, method: str = "minmax") -> Any:
    """The range of every float tensor of `model` over its inputs `x`, as onnxruntime's `TensorsData`."""
    way, options = METHODS[method]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):  # it prints
        source = Path(folder) / "model.onnx"
        onnx.save(model, source)
        target = str(Path(folder) / "calibrated.onnx")
        calibrator = create_calibrator(source, None, target, calibrate_method=way, extra_options=options)
        values = _values_per_example(model, x.shape[1:])
        if way is not CalibrationMethod.MinMax:
            x = x[:: max(1, len(x) * values // HISTOGRAM_VALUES)]
        size = max(1, min(BATCH_SIZE, BATCH_VALUES // values))
        for start in range(0, len(x), size):  # histograms keep every value of what they are given at once
            calibrator.collect_data(_OneBatch({model.graph.input[0].name: x[start : start + size]}))
        return calibrator.compute_data()


def _values_per_example(model: onnx.ModelProto, shape: tuple[int, ...]) -> int:
    """How many activations one example of this shape has, as far as their shapes can be told."""
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    del fixed.graph.value_info[:]
    for side, value in zip(fixed.graph.input[0].type.tensor_type.shape.dim, (1, *shape), strict=True):
        side.dim_value = value
    graph = onnx.shape_inference.infer_shapes(fixed).graph
    shapes = [value.type.tensor_type.shape.dim for value in (*graph.value_info, *graph.output)]
    return max(1, sum(math.prod(max(1, side.dim_value) for side in sides) for sides in shapes))


class _OneBatch(CalibrationDataReader):
    def __init__(self, inputs: dict[str, Float32]) -> None:
        self._inputs: dict[str, Float32] | None = inputs

    def get_next(self) -> dict[str, Float32] | None:
        inputs, self._inputs = self._inputs, None
        return inputs
