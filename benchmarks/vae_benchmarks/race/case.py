"""A case of the race: one model in every form that a competitor needs, or a bundle alone."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.npyio import NpzFile

from vae_runtime.bundle import Bundle
from vae_runtime.manifest import INPUT, LOGVAR, MANIFEST_FILE, MEAN, RECONSTRUCTION, Manifest
from vae_runtime.preprocess import Float32

from ..document import from_document, load_document
from ..errors import ReportError

CASE_FILE = "case.json"
FORMAT, FORMAT_VERSION = "vae-case", 1
BUNDLE, PLAIN, TORCH, INPUTS = "bundle.vae", "plain", "torch", "inputs.npz"


class CaseError(ReportError):
    """A folder is not a case that can be raced."""


@dataclass(frozen=True)
class CaseFacts:
    """What is told about a case; None where a bundle alone does not say.

    macs: multiply-accumulates of one example, {"encode": n, "decode": n}. quality: of a trained model, figures by name.
    manifest_file_sha256: of the bundle, which tells its weights; None where points are from before it was kept.
    """

    name: str
    description: str
    kind: str
    input_shape: tuple[int, ...]
    latent_shape: tuple[int, ...]
    parameters: int | None
    macs: dict[str, int] | None
    data: str | None
    quality: Any
    manifest_file_sha256: str | None = None


@dataclass(frozen=True)
class Case:
    """Where the forms of one model lie. plain, torch: their folders; None in a bundle alone."""

    folder: Path
    facts: CaseFacts
    manifest: Manifest
    bundle: Path
    plain: Path | None
    torch: Path | None

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Case:
        """A case folder as `benchmarks/cases/build.py` writes it, or a bundle's folder.

        Raises:
            CaseError: it is neither, or `case.json` is damaged or of another model than the bundle. BundleError: the
                bundle is damaged.
        """
        folder = Path(path)
        if (folder / CASE_FILE).is_file():
            facts = _read_facts(folder / CASE_FILE)
            missing = [part for part in (BUNDLE, PLAIN, TORCH, INPUTS) if not (folder / part).exists()]
            if missing:
                raise CaseError(f"{folder} lacks {', '.join(missing)}, which a case has beside {CASE_FILE}")
            bundle = Bundle.open(folder / BUNDLE)
            _check_same_model(folder / CASE_FILE, facts, _facts_of_bundle(bundle))
            facts = dataclasses.replace(facts, manifest_file_sha256=bundle.digest)
            return cls(folder, facts, bundle.manifest, folder / BUNDLE, folder / PLAIN, folder / TORCH)
        if (folder / MANIFEST_FILE).is_file():
            bundle = Bundle.open(folder)
            return cls(folder, _facts_of_bundle(bundle), bundle.manifest, folder, None, None)
        raise CaseError(f"{folder} is neither a case nor a bundle: it has no {CASE_FILE} and no {MANIFEST_FILE}")

    @property
    def name(self) -> str:
        return self.facts.name

    def graph(self, half: str) -> bytes:
        """The fp32 graph for bare engines, half "encoder" or "decoder": the plain export, or else the bundle's own."""
        if self.plain is None:
            return self.bundle_graph(half, "fp32")
        try:
            return (self.plain / f"{half}.onnx").read_bytes()
        except OSError as error:
            raise CaseError(f"{self.plain / half}.onnx cannot be read: {error.strerror}") from None

    def bundle_graph(self, half: str, precision: str, on_cuda: bool = False) -> bytes:
        """The bundle's graph in one precision, verified. on_cuda: the one that CUDA runs in its place."""
        files = self.manifest.precisions[precision]
        file = files.encoder if half == "encoder" else files.decoder
        return Bundle.open(self.bundle).read(self.manifest.on_cuda.get(file, file) if on_cuda else file)

    def reference(self) -> dict[str, Float32]:
        """Real inputs x and PyTorch's own mean, logvar (of a vae) and reconstruction, all finite, of shape (N, ...).

        Raises:
            CaseError: the file with them is damaged. BundleError: that of a bundle is.
        """
        shapes = {INPUT: self.facts.input_shape, MEAN: self.facts.latent_shape, RECONSTRUCTION: self.facts.input_shape}
        if self.facts.kind == "vae":
            shapes[LOGVAR] = self.facts.latent_shape
        if self.plain is None:
            path, found = self.bundle / self.manifest.golden.file, Bundle.open(self.bundle).golden()
        else:
            path, found = self.folder / INPUTS, _read_arrays(self.folder / INPUTS, shapes)
        for name, shape in shapes.items():
            array = found.get(name)
            if array is None or array.dtype != np.float32 or array.ndim == 0 or array.shape[1:] != shape:
                raise CaseError(f"{path} has no float32 array {name} of shape (N, {', '.join(map(str, shape))})")
        counts = {name: len(found[name]) for name in shapes}
        if len(set(counts.values())) > 1 or not all(counts.values()):
            numbers = ", ".join(f"{count} of {name}" for name, count in counts.items())
            raise CaseError(f"{path} has {numbers}; expected as many of each, at least 1")
        for name in shapes:
            if not np.isfinite(found[name]).all():
                raise CaseError(f"{path} has {name} with NaN or infinite values; expected finite ones")
        return {name: found[name] for name in shapes}


def _read_facts(path: Path) -> CaseFacts:
    what = "a case of benchmarks/cases/build.py"
    try:
        facts = from_document(CaseFacts, load_document(path, what), str(path), FORMAT, FORMAT_VERSION, what)
        check_macs(facts, str(path))
        return facts
    except ReportError as error:
        raise CaseError(str(error)) from None


def check_macs(facts: CaseFacts, name: str) -> None:
    """Raise `ReportError` where they are not told of both halves. name: what the message calls the file."""
    if facts.macs is not None and facts.macs.keys() != {"encode", "decode"}:
        raise ReportError(f"{name} has macs of {', '.join(facts.macs) or 'nothing'}; expected of encode and decode")


def _check_same_model(path: Path, facts: CaseFacts, bundle: CaseFacts) -> None:
    for name in ("kind", "input_shape", "latent_shape"):
        told, found = getattr(facts, name), getattr(bundle, name)
        if told != found:
            raise CaseError(f"{path} has {name} {told}; expected {found}, as the bundle has it")


def _read_arrays(path: Path, names: Iterable[str]) -> dict[str, Any]:
    """Those of these names that are there."""
    try:
        with path.open("rb") as stream, NpzFile(stream, allow_pickle=False) as archive:
            return {name: archive[name] for name in names if name in archive.files}
    except OSError as error:
        raise CaseError(f"{path} cannot be read: {error.strerror or error}") from None
    except Exception:  # a damaged archive raises nearly anything: BadZipFile, zlib.error, TokenError, ...
        raise CaseError(f"{path} is not an .npz archive of plain arrays, or is damaged") from None


def _facts_of_bundle(bundle: Bundle) -> CaseFacts:
    manifest = bundle.manifest
    return CaseFacts(
        name=manifest.name,
        description="a bundle alone",
        kind=manifest.kind,
        input_shape=manifest.input.example_shape,
        latent_shape=manifest.latent_shape(manifest.input.example_shape),
        parameters=None,
        macs=None,
        data=None,
        quality=None,
        manifest_file_sha256=bundle.digest,
    )
