"""A bundle's golden inputs on this device, held against the reference's outputs of the day of export."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from .errors import DeviceError
from .fidelity import golden_error
from .manifest import INPUT, MEAN, Manifest
from .operation import Operation, Route
from .preprocess import Float32

# How far a precision that the manifest does not know may be from the fp32 reference in a self-test: bf16 keeps 8 bits
# of a number, tf32 11, and errors add up over the layers.
_PROVIDER_TOLERANCE = {"bf16": 5e-2, "tf32": 2e-3}


class RouteTest(NamedTuple):
    """How one entry of `VAE.plan` came through: operation, device and precision as there.

    errors: by tensor, as `vae_runtime.fidelity.golden_error` measures them. tolerance: what they were held against.
    """

    operation: str
    device: str
    precision: str
    tolerance: float
    errors: dict[str, float]

    @property
    def passed(self) -> bool:
        return all(error <= self.tolerance for error in self.errors.values())  # False for NaN


class SelfTest(NamedTuple):
    """The outcome of `VAE.selftest`: of every route by itself; together, the largest error by tensor, and the largest
    tolerance."""

    device: str
    precision: str
    routes: tuple[RouteTest, ...]

    @property
    def passed(self) -> bool:
        return all(route.passed for route in self.routes)

    @property
    def errors(self) -> dict[str, float]:
        pairs = [pair for route in self.routes for pair in route.errors.items()]
        # NaN is the largest of all.
        return {name: float(np.max([error for other, error in pairs if other == name])) for name, _ in pairs}

    @property
    def tolerance(self) -> float:
        return max(route.tolerance for route in self.routes)


def run_routes(
    manifest: Manifest, encoder: Operation, decoder: Operation, golden: dict[str, Float32]
) -> tuple[RouteTest, ...]:
    """Every route of both halves on the golden values, with the sessions that `VAE.warmup` has made for this thread;
    the decoder gets the reference's mean."""
    return (
        *_run_routes(manifest, "encode", encoder, golden[INPUT], golden),
        *_run_routes(manifest, "decode", decoder, golden[MEAN], golden),
    )


def _run_routes(
    manifest: Manifest, name: str, operation: Operation, inputs: Float32, golden: dict[str, Float32]
) -> Iterator[RouteTest]:
    tolerances = {**_PROVIDER_TOLERANCE, **manifest.golden.tolerance}
    largest: dict[Route, dict[str, float]] = {}
    for route, rows, found in operation.run_each(inputs):
        if route.precision not in tolerances:
            raise DeviceError(
                f"the bundle states no golden tolerance for {route.precision}; it has"
                f" {', '.join(sorted(manifest.golden.tolerance))}"
            )
        errors = largest.setdefault(route, {})
        for tensor, array in zip(route.any_batch.names[1:], found, strict=True):
            error = golden_error(tensor, array, golden, route.precision, manifest.input.is_image, rows)
            errors[tensor] = float(np.maximum(error, errors.get(tensor, 0.0)))  # NaN is the largest of all
    for route, errors in largest.items():
        device = route.any_batch.device.name
        yield RouteTest(name, device, route.precision, tolerances[route.precision], errors)
