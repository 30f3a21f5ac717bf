"""What a worker process needs of a competitor once it is open, and the checks that it has to pass before any timing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from vae_runtime.fidelity import data_range, error_of, scale_of
from vae_runtime.manifest import LOGVAR, MEAN, RECONSTRUCTION
from vae_runtime.preprocess import Float32

from ..errors import BenchmarkError

# The largest error that a competitor may have, by its precision: how it is measured, and how much.
# The error of one value matters in full precision only; in the others their root mean square.
TOLERANCES: dict[str, tuple[str, float]] = {
    "fp32": ("max", 1e-3),
    "tf32": ("rms", 0.01),
    "fp16": ("rms", 0.01),
    "bf16": ("rms", 0.03),
    "int8": ("rms", 0.08),
}
# In fp32 of who has calls for a GPU's memory: TF32 errs there by 4e-4 and more in cases with convolutions, float32 by
# 2e-6 (benchmarks/results/gpu/README.md). On CPUs torch's convolutions err by 6e-4.
FP32_ON_GPU = 5e-5


# From host memory to host memory; and from the memory of the device to the same.
HOST_OPERATIONS = ("encode", "decode")
DEVICE_OPERATIONS = ("encode-on-device", "decode-on-device")


def half_of(operation: str) -> str:
    """ "encode-on-device" -> "encode"; "encode" as it is."""
    return operation.removesuffix("-on-device")


class CannotRunError(BenchmarkError):
    """A competitor is not to be had here; the message says why."""


@dataclass(frozen=True)
class Resident:
    """The calls of an entrant for data that stay in the device's memory.

    put: a host array -> what `encode` and `decode` take; it is not timed. encode, decode: -> results there, new ones
    that belong to the caller, and finished when the call returns. arrays: of a result, in host memory, as it is now.
    """

    put: Callable[[Float32], Any]
    encode: Callable[[Any], Any]
    decode: Callable[[Any], Any]
    arrays: Callable[[Any], tuple[Float32, ...]]


class Timed(NamedTuple):
    """One operation: `call(put(array))`, of which only the call is timed."""

    call: Callable[[Any], Any]
    put: Callable[[Float32], Any]
    arrays: Callable[[Any], tuple[Float32, ...]]


@dataclass(frozen=True)
class Entrant:
    """A competitor, open for one batch size and thread count.

    encode: x, float32 (N, *input_shape) in host memory, -> a result of which `arrays` makes (mean[, logvar]).
    decode: z, float32 (N, *latent_shape), -> a result of which `arrays` makes (reconstruction,).
    Both give new arrays in host memory that belong to the caller. Only these two calls are timed, not `arrays`.
    precisions: in which it computes. engine: with its version. configuration: how it is set up, in words.
    plan: what an engine that chooses says about its choice. resident: on the device; None where that is not raced.
    """

    encode: Callable[[Float32], Any]
    decode: Callable[[Float32], Any]
    precisions: tuple[str, ...]
    engine: str
    configuration: str
    arrays: Callable[[Any], tuple[Float32, ...]] = tuple
    plan: Any = None
    resident: Resident | None = None

    @property
    def operations(self) -> dict[str, Timed]:
        """What may be timed, by name."""
        found = {name: Timed(getattr(self, name), lambda array: array, self.arrays) for name in HOST_OPERATIONS}
        if (on_device := self.resident) is not None:
            for name in DEVICE_OPERATIONS:
                found[name] = Timed(getattr(on_device, half_of(name)), on_device.put, on_device.arrays)
        return found

    @property
    def precision(self) -> str:
        """The one that decides how large an error may be: the coarsest in use."""
        return max(self.precisions, key=[*TOLERANCES].index)


@dataclass(frozen=True)
class Verdict:
    """errors: by output, measured as `measure` says ("max" or "rms"), relative to the largest reference value, and
    for reconstructions to the data's range. fault: what is wrong, in words; None where nothing is."""

    measure: str
    tolerance: float
    errors: dict[str, float]
    fault: str | None


def judge(entrant: Entrant, reference: dict[str, Float32]) -> Verdict:
    """Compare all operations with the reference's outputs, and see that results stay as they were handed out."""
    measure, tolerance = TOLERANCES[entrant.precision]
    if entrant.precision == "fp32" and entrant.resident is not None:
        tolerance = FP32_ON_GPU
    errors: dict[str, float] = {}
    outputs = {"encode": [name for name in (MEAN, LOGVAR) if name in reference], "decode": [RECONSTRUCTION]}
    inputs = {"encode": reference["x"], "decode": reference[MEAN]}
    for operation, (call, put, arrays) in entrant.operations.items():
        half = half_of(operation)
        names, where = outputs[half], "" if operation == half else " on the device"
        result = call(put(inputs[half]))
        found = arrays(result)
        fault = _fault_of_shape(operation, found, [reference[name] for name in names])
        if fault:
            return Verdict(measure, tolerance, errors, fault)
        kept = [array.copy() for array in found]
        again = arrays(call(put(1 - inputs[half])))  # images stay in [0, 1]
        now = arrays(result)  # read once more: what `arrays` copied from a device would not change with it
        if not all(np.array_equal(array, copy) for array, copy in zip(now, kept, strict=True)) or any(
            np.shares_memory(one, other) for one, other in zip(now, again, strict=True)
        ):
            return Verdict(measure, tolerance, errors, f"{operation} overwrites a result that it handed out before")
        for name, array in zip(names, found, strict=True):
            errors[name + where] = measure_error(array, reference[name], measure, name == RECONSTRUCTION)
    wrong = {name: error for name, error in errors.items() if not error <= tolerance}
    worst = max(wrong, key=lambda name: wrong[name], default=None)
    fault = None if worst is None else _fault_of_value(worst, wrong[worst], measure, tolerance, entrant.precision)
    return Verdict(measure, tolerance, errors, fault)


def within_tolerance(
    reference: dict[str, Float32], names: list[str], precision: str
) -> Callable[[Sequence[Float32]], bool]:
    """Tells whether the outputs of these names are as near to the reference as the race asks for."""
    measure, tolerance = TOLERANCES[precision]

    def is_right(found: Sequence[Float32]) -> bool:
        return all(
            measure_error(array, reference[name], measure, name == RECONSTRUCTION) <= tolerance
            for name, array in zip(names, found, strict=True)
        )

    return is_right


def measure_error(found: Float32, reference: Float32, measure: str, is_data: bool) -> float:
    """The maximum ("max") or the root mean square ("rms") of the differences, relative to max|reference|, taken as at
    least 0.01; of data, to their range."""
    scale = data_range(reference, is_image=False) if is_data else scale_of(reference)
    return error_of(found, reference, scale, by_mean_square=measure == "rms")


def _fault_of_shape(operation: str, found: tuple[Any, ...], expected: list[Float32]) -> str | None:
    shapes = [(getattr(one, "shape", None), str(getattr(one, "dtype", type(one)))) for one in found]
    wanted = [(one.shape, "float32") for one in expected]
    if shapes != wanted:
        return f"{operation} gives {shapes}; expected {wanted}"
    return None if all(np.isfinite(one).all() for one in found) else f"{operation} gives values that are not finite"


def _fault_of_value(name: str, error: float, measure: str, tolerance: float, precision: str) -> str:
    size = {"max": "largest error", "rms": "root mean square error"}[measure]
    return f"the {size} of {name} is {error:.2g}; {precision} may have {tolerance:g}"
