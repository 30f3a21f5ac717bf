"""Models of other libraries and programs, each read by one module, found by what is in the source.

A module here has KIND, `recognises(source)`, which is cheap and imports no heavy library, and `load(source, options)`.
Our own model.pt is not among them: `export_checkpoint` reads it.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Protocol

from vae_runtime.bundle import is_bundle_folder
from vae_runtime.errors import InputError, MissingExtraError

from ..imported import Imported, ImportOptions
from . import diffusers_folder, factory, ldm_file, onnx_pair, pythae_folder, torch_program
from .hints import refuse_misstated


class Importer(Protocol):
    """What a module of this package offers. KIND: its name for `--from`."""

    KIND: str

    def recognises(self, source: str) -> bool:
        """Whether the content of what `source` names is of this kind; odd files are not, and raise nothing."""
        ...

    def load(self, source: str, options: ImportOptions) -> Imported:
        """The model as two halves in the units of a bundle.

        Raises:
            CheckpointError: a file is missing, damaged, or does not fit the rest.
            ExportError: the model is of a sort that no bundle can hold.
            InputError: an option is missing, or contradicts the source.
            MissingExtraError: the library that made the model is not installed.
        """
        ...


IMPORTERS: tuple[Importer, ...] = (diffusers_folder, ldm_file, pythae_folder, factory, torch_program, onnx_pair)
OURS, MODEL = "model", "a model.pt of vae-train"  # which the command line reads: for `--from`, and in words


def recognised(source: str) -> list[Importer]:
    """Every importer whose kind `source` may be of."""
    return [importer for importer in IMPORTERS if importer.recognises(source)]


def recognise(source: str) -> Importer:
    """The importer whose kind `source` is of, recognised by its content alone.

    Raises:
        InputError: it is of no kind that is known, or of several.
    """
    found = recognised(source)
    if len(found) == 1:
        return found[0]
    if not found:
        refuse_misstated(source)
    kinds = ", ".join(importer.KIND for importer in found or IMPORTERS)
    if found:
        raise InputError(f"{source} can be read as {kinds}; say which with --from")
    raise InputError(f"{source} is {_describe(source)}; understood are {MODEL} and, by --from, {kinds}")


def load(source: str, kind: str | None, options: ImportOptions) -> Imported:
    """The model that `source` names; kind: an importer's KIND; None: recognised by the content.

    Raises:
        InputError: there is no such kind, nothing is recognised, or what the importer says.
        CheckpointError, ExportError, MissingExtraError: see `Importer.load`.
    """
    importers = {importer.KIND: importer for importer in IMPORTERS}
    if kind is not None and kind not in importers:
        raise InputError(f"--from is {kind!r}; expected one of {', '.join((OURS, *importers))}")
    importer = recognise(source) if kind is None else importers[kind]
    try:
        return importer.load(source, options)
    except ModuleNotFoundError as error:
        raise MissingExtraError(error.name or "a package", "export", "exporting") from None


def _describe(source: str) -> str:
    """What is there, for an error, in a few words."""
    path = Path(source)
    try:
        if path.is_dir():
            if is_bundle_folder(path):
                return "a bundle already, which needs no export"
            names = sorted(entry.name for entry in itertools.islice(path.iterdir(), 1000))
            shown = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
            return f"a folder with {shown}" if names else "an empty folder"
        if path.is_file():
            with path.open("rb") as stream:
                return f"a file that begins with {stream.read(8)!r}"
    except (OSError, ValueError) as error:
        return f"unreadable ({getattr(error, 'strerror', None) or error})"
    return "neither a file nor a folder"
