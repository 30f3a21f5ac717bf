"""Graphs and bundles that are not on any disk yet, run by the runtime's own code: on the CPU, with as many threads
everywhere, as some sums of onnxruntime depend on their number. They sleep while PyTorch works."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx

from vae_runtime.boundary import Boundary
from vae_runtime.bundle import Bundle
from vae_runtime.devices import CPU, Device
from vae_runtime.errors import BundleError, DeviceError, ExportError
from vae_runtime.manifest import Manifest
from vae_runtime.plan import Candidate, same_plan
from vae_runtime.session import GraphSession
from vae_runtime.vae import VAE

from .graphs import bfloat16_hint

THREADS = 4


def open_graph(graph: bytes, half: str, boundary: Boundary) -> GraphSession:
    """A session on one half, whose tensors are those of `boundary`.

    Raises:
        ExportError: the graph does not load or has other tensors.
    """
    try:
        return GraphSession(graph, f"the {half}", Device("cpu", CPU), boundary, threads=THREADS, spinning=False)
    except (BundleError, DeviceError) as error:
        raise ExportError(f"{error}{bfloat16_hint(onnx.load_from_string(graph).graph)}") from error


def run_in_memory(manifest: Manifest, files: Mapping[str, bytes]) -> VAE:
    """The bundle with its fp32 graphs."""
    bundle = _Unwritten(manifest, files)
    candidate = Candidate("cpu", "fp32", THREADS, spinning=False)
    return VAE(bundle, same_plan(candidate))


class _Unwritten(Bundle):
    def __init__(self, manifest: Manifest, contents: Mapping[str, bytes]) -> None:
        super().__init__(Path(manifest.name), manifest, digest="")
        self._contents = contents

    def read(self, file: str) -> bytes:
        return self._contents[file]
