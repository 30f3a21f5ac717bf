"""What else onnxruntime could be told, or given, on a GPU: each variation of a case's sessions beside the plain one.

Whatever wins here may be worth a trial in `VAE.warmup`, or a graph of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from findings import Findings, Job
from timings import open_bare, outputs_of

from vae_benchmarks.intervals import paired_ratio
from vae_benchmarks.latency import alternate, collector_off
from vae_benchmarks.worker import tile
from vae_runtime.bound import to_host
from vae_runtime.devices import find_device
from vae_runtime.engine import first_line, import_engine, is_engine_error
from vae_runtime.fidelity import relative_error
from vae_runtime.manifest import INPUT, MEAN
from vae_runtime.preprocess import Float32

BATCHES = (1, 32)
BLOCKS, WARM_CALLS = 20, 5


class Variation(NamedTuple):
    """provider: options of the CUDA provider. without: optimisations of onnxruntime that are left out. edit: of the
    graph; None where there is nothing to do."""

    provider: Mapping[str, str] = MappingProxyType({})
    without: tuple[str, ...] = ()
    edit: Callable[[bytes], bytes | None] | None = None


NHWC = {"prefer_nhwc": "1"}
SETTINGS = {
    "HEURISTIC": Variation({"cudnn_conv_algo_search": "HEURISTIC"}),
    "DEFAULT": Variation({"cudnn_conv_algo_search": "DEFAULT"}),
    "NHWC": Variation(NHWC),
    "NHWC, HEURISTIC": Variation({**NHWC, "cudnn_conv_algo_search": "HEURISTIC"}),
    "bias fused": Variation({"fuse_conv_bias": "1"}),
    "NHWC, bias fused": Variation({**NHWC, "fuse_conv_bias": "1"}),
    "small workspace": Variation({"cudnn_conv_use_max_workspace": "0"}),
    "activations apart": Variation(without=("ConvActivationFusion",)),
}


def variations(findings: Findings, job: Job) -> None:
    """Sessions for one shape, as a CUDA graph from memory on the device to memory there, which is all that a variation
    changes. On the CPU only those without options of the CUDA provider, which tries the step."""
    tried, rows = dict(SETTINGS), []
    try:
        from graph_edits import EDITS
    except ImportError as error:
        findings.skip("edits of the graphs", f"{error.name} is not installed")
    else:
        tried |= {name: Variation(edit=edit) for name, edit in EDITS.items()}
    for precision in findings.precisions(job):
        for batch in (2,) if job.quick else BATCHES:
            for half, operation, given in (("encoder", "encode", INPUT), ("decoder", "decode", MEAN)):
                graph = job.case.bundle_graph(half, precision if precision in job.case.manifest.precisions else "fp32")
                array = tile(job.case.reference()[given], batch)
                with findings.guard(f"{half} {precision} {batch}"):
                    for row in compared(job, operation, tried, graph, precision, array):
                        rows.append({"half": half, "precision": precision, "batch": batch, **row})
                        findings.figure("variations", rows)  # each time: what there is when the time is over is kept


def compared(
    job: Job, operation: str, tried: Mapping[str, Variation], graph: bytes, precision: str, array: Float32
) -> Iterator[dict[str, Any]]:
    """Of each variation the time relative to the plain session with its 95% interval, its error relative to the largest
    output, and the seconds it took to open; or why there is none."""
    plain = Replay(job, operation, graph, precision, array)
    expected = plain.results()
    for name, variation in tried.items():
        if variation.provider and not job.is_gpu:
            continue
        start = time.perf_counter()
        try:
            varied = Replay(job, operation, graph, precision, array, variation)
            found = varied.results()
        except NothingToDoError:
            continue
        except Exception as reason:
            if not is_engine_error(reason):
                raise
            yield {"variation": name, "failed": first_line(reason)}
            continue
        opened = time.perf_counter() - start
        for session in (plain, varied):
            for _ in range(WARM_CALLS):
                session.run()
        with collector_off():
            ratio, low, high, _ = paired_ratio(*alternate(plain.run, varied.run, 3 if job.quick else BLOCKS))
        errors = [relative_error(*pair) for pair in zip(found, expected, strict=True)]
        error = max(errors) if np.isfinite(errors).all() else None  # JSON has no NaN
        yield {"variation": name, "ratio": ratio, "low": low, "high": high, "error": error, "opened_s": opened}


class NothingToDoError(Exception):
    """The graph has nothing that the variation changes."""


class Replay:
    """run: the graph of kernels for one shape, once. Raises `NothingToDoError`, and onnxruntime's own."""

    def __init__(
        self, job: Job, operation: str, graph: bytes, precision: str, array: Float32, variation: Variation | None = None
    ) -> None:
        engine, device, variation = import_engine(), find_device(job.device, precision), variation or Variation()
        if variation.edit is not None:
            edited = variation.edit(graph)
            if edited is None:
                raise NothingToDoError
            graph = edited
        settings = {**device.session_options(1, True, ""), **variation.provider}
        session = open_bare(graph, device.provider, settings, array.shape, variation.without)
        binding, make = session.io_binding(), engine.OrtValue.ortvalue_from_shape_and_type
        given = engine.OrtValue.ortvalue_from_numpy(array, *device.memory)
        (entry,) = session.get_inputs()
        binding.bind_ortvalue_input(entry.name, given)
        shapes = outputs_of(job, operation)
        self._outputs = [make((len(array), *shape), np.float32, *device.memory) for shape in shapes.values()]
        for name, value in zip(shapes, self._outputs, strict=True):
            binding.bind_ortvalue_output(name, value)
        self.run = partial(session.run_with_iobinding, binding)

    def results(self) -> list[Float32]:
        self.run()
        return [to_host(value) for value in self._outputs]
