"""onnxruntime on its own on a GPU, on the plain export, with its inputs and outputs bound to the device."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from vae_runtime.bound import to_host
from vae_runtime.cuda import why_not_cuda
from vae_runtime.manifest import LOGVAR, MEAN, RECONSTRUCTION
from vae_runtime.preprocess import Float32

from ...worker import tile
from ..case import Case
from ..entrant import CannotRunError, Entrant, Resident, within_tolerance
from .bare_onnxruntime import call_of
from .choice import Call, Half, fastest
from .ours import load as load  # of the same engine

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def open_entrant(case: Case, batch: int, threads: int, device: str, precision: str) -> Entrant:
    """One session per half on the CUDA provider, strictly there: all graph optimisations, its option "EXHAUSTIVE" for
    convolutions, TF32 off for "fp32" and on for "tf32".

    From host memory, `session.run`, an IO binding of fixed memory on the device, and the same in a CUDA graph are
    tried; on the device, an IO binding with new outputs in each call, and the CUDA graph between copies to and from its
    fixed memory. Each half keeps its fastest. A run returns when the GPU has finished. device "cpu" runs the same code
    without a GPU.
    """
    try:
        import onnxruntime
    except ImportError:
        raise CannotRunError("onnxruntime is not installed") from None
    if device == "cuda" and (reason := why_not_cuda()) is not None:
        raise CannotRunError(reason)
    reference = {name: tile(array, batch) for name, array in case.reference().items()}
    latents = [name for name in (MEAN, LOGVAR) if name in reference]
    encoder, decoder = (
        _open_half(
            onnxruntime, case.graph(half), reference[given], threads, device, precision,
            [reference[name].shape for name in names], within_tolerance(reference, names, precision),
        )
        for half, given, names in (("encoder", "x", latents), ("decoder", MEAN, [RECONSTRUCTION]))
    )  # fmt: skip
    return Entrant(
        encode=encoder.from_host,
        decode=decoder.from_host,
        precisions=(precision,),
        engine=f"onnxruntime {onnxruntime.__version__}",
        configuration=f"{PROVIDERS[device]}, all optimisations, encoder ({encoder.words}), decoder ({decoder.words})",
        resident=Resident(
            put=lambda array: onnxruntime.OrtValue.ortvalue_from_numpy(array.copy(), device, 0),
            encode=encoder.on_device,
            decode=decoder.on_device,
            arrays=_to_arrays,
        ),
    )


def _open_half(
    onnxruntime: Any,
    graph: bytes,
    example: Float32,
    threads: int,
    device: str,
    precision: str,
    shapes: list[tuple[int, ...]],
    is_right: Callable[[Sequence[Float32]], bool],
) -> Half:
    def open_session(captures: bool) -> Any:
        return _open_session(onnxruntime, graph, threads, device, precision, len(example) if captures else None)

    plain = open_session(False)
    captured = functools.cache(lambda: Bound(onnxruntime, open_session(True), example, shapes, device))
    host: dict[str, Callable[[], Call]] = {
        "session.run": lambda: call_of(plain),
        "bound": lambda: Bound(onnxruntime, plain, example, shapes, device).from_host,
    }
    resident: dict[str, Callable[[], Call]] = {
        "bound": lambda: _run_resident(plain, device),
    }
    if device == "cuda":
        host["CUDA graph"] = lambda: captured().from_host
        resident["CUDA graph"] = lambda: captured().on_device
    host_word, from_host = fastest(host, example, is_right)
    value = onnxruntime.OrtValue.ortvalue_from_numpy(example.copy(), device, 0)
    word, on_device = fastest(resident, value, lambda outputs: is_right(_to_arrays(outputs)))
    return Half(from_host, on_device, f"{word} on the device; {host_word} from the host")


def _open_session(onnxruntime: Any, graph: bytes, threads: int, device: str, precision: str, batch: int | None) -> Any:
    """batch: the only size that it takes, to be captured as a CUDA graph; None takes any and captures nothing."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    settings = {}
    if device == "cuda":
        settings = {"use_tf32": "1" if precision == "tf32" else "0"}
        settings["cudnn_conv_algo_search"] = "EXHAUSTIVE"
    if batch is not None:
        settings["enable_cuda_graph"] = "1"
        options.add_free_dimension_override_by_name("batch", batch)
    session = onnxruntime.InferenceSession(graph, options, providers=[(PROVIDERS[device], settings)])
    if session.get_providers()[0] != PROVIDERS[device]:
        raise CannotRunError(f"onnxruntime opened the graph on {session.get_providers()[0]}, not {PROVIDERS[device]}")
    return session


def _run_resident(session: Any, device: str) -> Callable[[Any], list[Any]]:
    """Each call binds anew: outputs that stay bound would be overwritten by the next one."""
    run, bind, name = session.run_with_iobinding, session.io_binding, session.get_inputs()[0].name
    outputs = [output.name for output in session.get_outputs()]

    def call(value: Any) -> list[Any]:
        binding = bind()
        binding.bind_ortvalue_input(name, value)
        for output in outputs:
            binding.bind_output(output, device, 0)
        run(binding)
        found: list[Any] = binding.get_outputs()
        return found

    return call


class Bound:
    """A session with fixed memory on the device for its input and outputs, as a CUDA graph needs it."""

    def __init__(
        self, onnxruntime: Any, session: Any, example: Float32, shapes: list[tuple[int, ...]], device: str
    ) -> None:
        make = onnxruntime.OrtValue
        self._x = make.ortvalue_from_numpy(example.copy(), device, 0)
        self._outputs = [make.ortvalue_from_shape_and_type(shape, np.float32, device, 0) for shape in shapes]
        self._new = lambda: [make.ortvalue_from_shape_and_type(shape, np.float32, device, 0) for shape in shapes]
        self._session, self._binding = session, session.io_binding()
        self._binding.bind_ortvalue_input(session.get_inputs()[0].name, self._x)
        for output, value in zip(session.get_outputs(), self._outputs, strict=True):
            self._binding.bind_ortvalue_output(output.name, value)

    def from_host(self, array: Float32) -> list[Float32]:
        self._x.update_inplace(array)
        self._session.run_with_iobinding(self._binding)
        return [to_host(value) for value in self._outputs]

    def on_device(self, value: Any) -> list[Any]:
        self._x.update_inplace(value)  # finished when it returns, as the copies below
        self._session.run_with_iobinding(self._binding)
        outputs = self._new()
        for new, output in zip(outputs, self._outputs, strict=True):
            new.update_inplace(output)
        return outputs


def _to_arrays(outputs: list[Any]) -> tuple[Float32, ...]:
    return tuple(to_host(value) for value in outputs)
