"""A bundle that is not on any disk yet, run by the runtime's own code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from vae_runtime.bundle import Bundle
from vae_runtime.manifest import Manifest
from vae_runtime.operation import Candidate
from vae_runtime.plan import open_halves, same_plan
from vae_runtime.vae import VAE


def run_in_memory(manifest: Manifest, files: Mapping[str, bytes]) -> VAE:
    """The fp32 graphs on the CPU with one thread, so that sums are the same at every export."""
    bundle = _Unwritten(manifest, files)
    return VAE(bundle, *open_halves(bundle, same_plan(Candidate("cpu", "fp32", threads=1))), "fp32")


class _Unwritten(Bundle):
    def __init__(self, manifest: Manifest, contents: Mapping[str, bytes]) -> None:
        super().__init__(Path(manifest.name), manifest, digest="")
        self._contents = contents

    def read(self, file: str) -> bytes:
        return self._contents[file]
