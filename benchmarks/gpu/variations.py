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
    """provider: options of the CUDA provider. edit: of the graph; None where there is nothing to do."""

    provider: Mapping[str, str] = MappingProxyType({})
    edit: Callable[[bytes], bytes | None] | None = None


NHWC = {"prefer_nhwc": "1"}
FUSED = {**NHWC, "fuse_conv_bias": "1"}  # in NCHW it computes something else: onnxruntime-gpu 1.31.1 on an H100
SETTINGS = {"NHWC": Variation(NHWC), "NHWC, bias fused": Variation(FUSED)}


def variations(findings: Findings, job: Job) -> None:
    """Sessions for one shape, as a CUDA graph from memory on the device to memory there, which is all that a variation
    changes. On the CPU only those without options of the CUDA provider, which tries the step."""
    rows: list[dict[str, Any]] = []
    try:
        from graph_edits import EDITS, NHWC_EDITS
    except ImportError as error:
        findings.skip("edits of the graphs", f"{error.name} is not installed")
        EDITS = NHWC_EDITS = {}
    edited = {name: Variation(edit=edit) for name, edit in EDITS.items()}
    in_nhwc = {f"NHWC, bias fused, {name}": Variation(FUSED, edit) for name, edit in NHWC_EDITS.items()}
    for precision in findings.precisions(job):
        tried = {**SETTINGS, **edited, **(in_nhwc if precision != "fp32" else {})}
        for batch in (2,) if job.quick else BATCHES:
            for half, operation, given in (("encoder", "encode", INPUT), ("decoder", "decode", MEAN)):
                stated = precision if precision in job.case.manifest.precisions else "fp32"
                graph = job.case.bundle_graph(half, stated, job.is_cuda)
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
    plain = Replay(job, operation, graph, precision, array, {})
    expected = plain.results()
    for name, (provider, edit) in tried.items():
        changed = graph if edit is None else edit(graph)
        if changed is None or (provider and not job.is_gpu):
            continue
        start = time.perf_counter()
        try:
            varied = Replay(job, operation, changed, precision, array, provider)
            found = varied.results()
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


class Replay:
    """run: the graph of kernels for one shape, once. provider: options beside those that `VAE` takes. Raises
    onnxruntime's own errors."""

    def __init__(
        self, job: Job, operation: str, graph: bytes, precision: str, array: Float32, provider: Mapping[str, str]
    ) -> None:
        engine, device = import_engine(), find_device(job.device, precision)
        settings = {**device.session_options(1, True, ""), **provider}
        session = open_bare(graph, device.provider, settings, array.shape)
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
