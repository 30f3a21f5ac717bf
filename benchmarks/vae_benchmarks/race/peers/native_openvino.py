"""OpenVINO through its own Python interface."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vae_runtime.manifest import HALF_NAMES
from vae_runtime.preprocess import Float32

from ..case import Case
from ..entrant import CannotRunError, Entrant


def open_entrant(case: Case, batch: int, threads: int, precision: str) -> Entrant:
    """One infer request per half, compiled for exactly this batch size (static shapes, which OpenVINO optimises best),
    with the hint for latency, one stream and `threads` threads.

    precision: "f32" and "bf16" compile the plain export with that INFERENCE_PRECISION_HINT; "int8" the bundle's int8
    graphs, and leaves what is not quantised in OpenVINO's default for this processor. Inputs are shared, not copied;
    outputs are copied out of the request, because they have to belong to the caller.
    """
    try:
        import openvino
    except ImportError:
        raise CannotRunError("openvino is not installed; pip install 'vae-edge[race]'") from None
    core = openvino.Core()
    abilities = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if precision == "bf16" and "BF16" not in abilities:
        raise CannotRunError(f"OpenVINO has no bf16 on this processor, it has {', '.join(abilities)}")
    if precision == "int8" and "int8" not in case.manifest.precisions:
        raise CannotRunError("the bundle has no int8 graphs")
    settings: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": threads,
        **({} if precision == "int8" else {"INFERENCE_PRECISION_HINT": precision}),
    }
    calls: list[Callable[[Float32], tuple[Float32, ...]]] = []
    for half in HALF_NAMES:
        graph = case.bundle_graph(half, "int8") if precision == "int8" else case.graph(half)
        model = core.read_model(graph)
        model.reshape(_static_shape(model, batch))
        compiled = core.compile_model(model, "CPU", settings)
        calls.append(_call(compiled.create_infer_request()))
    return Entrant(
        encode=calls[0],
        decode=calls[1],
        precisions=({"f32": "fp32"}.get(precision, precision),),
        engine=f"OpenVINO {openvino.__version__.partition('-')[0]}",
        configuration=f"static batch {batch}, " + ", ".join(f"{name}={value}" for name, value in settings.items()),
    )


def _static_shape(model: Any, batch: int) -> list[int]:
    return [batch, *(side.get_length() for side in list(model.input(0).partial_shape)[1:])]


def _call(request: Any) -> Callable[[Float32], tuple[Float32, ...]]:
    infer = request.infer

    def call(array: Float32) -> tuple[Float32, ...]:
        return tuple(infer((array,), share_inputs=True, share_outputs=False).values())

    return call
