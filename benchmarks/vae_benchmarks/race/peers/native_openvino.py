"""OpenVINO through its own Python interface."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vae_runtime.manifest import HALF_NAMES, INPUT, LOGVAR, MEAN, RECONSTRUCTION
from vae_runtime.preprocess import Float32

from ...worker import tile
from ..case import Case
from ..entrant import CannotRunError, Entrant, within_tolerance
from .choice import fastest

Call = Callable[[Float32], tuple[Float32, ...]]


def open_entrant(case: Case, batch: int, threads: int, precision: str) -> Entrant:
    """One infer request per half, compiled for exactly this batch size (static shapes, which OpenVINO optimises best),
    with the hint for latency, one stream and `threads` threads.

    precision: "f32" and "bf16" compile the plain export with that INFERENCE_PRECISION_HINT; "int8" the bundle's int8
    graphs, and leaves what is not quantised in OpenVINO's default for this processor. Each half takes its array and
    gives its results in the faster one of two ways, see `ways_to_call`.
    """
    try:
        import openvino
    except ImportError:
        raise CannotRunError('openvino is not installed; pip install "vae-edge[race]"') from None
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
    name = {"f32": "fp32"}.get(precision, precision)
    reference = {array: tile(values, batch) for array, values in case.reference().items()}
    latents = [array for array in (MEAN, LOGVAR) if array in reference]
    calls: list[Call] = []
    words = [f"static batch {batch}", *(f"{key}={value}" for key, value in settings.items())]
    for half, given, outputs in zip(HALF_NAMES, (INPUT, MEAN), (latents, [RECONSTRUCTION]), strict=True):
        graph = case.bundle_graph(half, "int8") if precision == "int8" else case.graph(half)
        model = core.read_model(graph)
        model.reshape(_static_shape(model, batch))
        compiled = core.compile_model(model, "CPU", settings)
        is_right = within_tolerance(reference, outputs, name)
        way, call = fastest(ways_to_call(compiled), reference[given], is_right)
        calls.append(call)
        words.append(f"{half} with {way}")
    return Entrant(
        encode=calls[0],
        decode=calls[1],
        precisions=(name,),
        engine=f"OpenVINO {openvino.__version__.partition('-')[0]}",
        configuration=", ".join(words),
    )


def _static_shape(model: Any, batch: int) -> list[int]:
    return [batch, *(side.get_length() for side in list(model.input(0).partial_shape)[1:])]


def ways_to_call(compiled: Any) -> dict[str, Callable[[], Call]]:
    """name -> makes a call of a model with static shapes, from an array to copies of all outputs, which belong to the
    caller; each has a request of its own.

    "bound tensors" copies the array into the request's memory, and costs little where arrays are small. "shared inputs"
    lets the request read the array where it is, which costs tens of microseconds of Python in every call.
    """

    def bind() -> Call:
        request = compiled.create_infer_request()
        infer, source = request.infer, request.get_input_tensor().data
        results = [request.get_output_tensor(index).data for index in range(len(compiled.outputs))]

        def call(array: Float32) -> tuple[Float32, ...]:
            source[:] = array
            infer()
            return tuple(result.copy() for result in results)

        return call

    def share() -> Call:
        infer = compiled.create_infer_request().infer

        def call(array: Float32) -> tuple[Float32, ...]:
            return tuple(infer((array,), share_inputs=True, share_outputs=False).values())

        return call

    return {"bound tensors": bind, "shared inputs": share}
