"""onnxruntime on its own, on the plain export."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vae_runtime.manifest import HALF_NAMES
from vae_runtime.preprocess import Float32

from ..case import Case
from ..entrant import CannotRunError, Entrant


def open_entrant(case: Case, batch: int, threads: int) -> Entrant:
    """One session per half on the CPU provider: all graph optimisations, sequential execution, `threads` intra-op
    threads, which spin while they wait, as they do by default. `session.run` gives new arrays by itself."""
    try:
        import onnxruntime
    except ImportError:
        raise CannotRunError("onnxruntime is not installed") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    calls = [
        call_of(onnxruntime.InferenceSession(case.graph(half), options, providers=["CPUExecutionProvider"]))
        for half in HALF_NAMES
    ]
    return Entrant(
        encode=calls[0],
        decode=calls[1],
        precisions=("fp32",),
        engine=f"onnxruntime {onnxruntime.__version__}",
        configuration=f"CPUExecutionProvider, all optimisations, intra_op_num_threads={threads}",
    )


def call_of(session: Any) -> Callable[[Float32], list[Float32]]:
    """`session.run`, from an array to all outputs."""
    run, name = session.run, session.get_inputs()[0].name
    outputs = [output.name for output in session.get_outputs()]

    def call(array: Float32) -> list[Float32]:
        found: list[Float32] = run(outputs, {name: array})
        return found

    return call
