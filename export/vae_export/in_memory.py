"""Graphs and bundles that are not on any disk yet, run by the runtime's own code, on all cores of the CPU: onnxruntime
adds up in an order that does not depend on how many there are. Its threads sleep while PyTorch works."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from vae_runtime.boundary import Boundary
from vae_runtime.bundle import Bundle
from vae_runtime.devices import CPU, Device
from vae_runtime.errors import BundleError, DeviceError, ExportError
from vae_runtime.manifest import Manifest
from vae_runtime.operation import Candidate
from vae_runtime.plan import open_halves, same_plan
from vae_runtime.session import GraphSession
from vae_runtime.tuning import usable_cores
from vae_runtime.vae import VAE


def open_graph(graph: bytes, half: str, boundary: Boundary) -> GraphSession:
    """A session on one half, whose tensors are those of `boundary`.

    Raises:
        ExportError: the graph does not load or has other tensors.
    """
    try:
        return GraphSession(graph, f"the {half}", Device("cpu", CPU), boundary, threads=usable_cores(), spinning=False)
    except (BundleError, DeviceError) as error:
        raise ExportError(str(error)) from error


def run_in_memory(manifest: Manifest, files: Mapping[str, bytes]) -> VAE:
    """The bundle with its fp32 graphs."""
    bundle = _Unwritten(manifest, files)
    candidate = Candidate("cpu", "fp32", usable_cores(), spinning=False)
    return VAE(bundle, *open_halves(bundle, same_plan(candidate)), "fp32")


class _Unwritten(Bundle):
    def __init__(self, manifest: Manifest, contents: Mapping[str, bytes]) -> None:
        super().__init__(Path(manifest.name), manifest, digest="")
        self._contents = contents

    def read(self, file: str) -> bytes:
        return self._contents[file]
