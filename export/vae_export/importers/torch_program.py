"""The two halves as programs of PyTorch: TorchScript (torch.jit.save) or torch.export (torch.export.save).

A folder that holds both, or 'ENCODER,DECODER'. What they return may have any form of `outputs`.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

from ..imported import Imported, ImportOptions
from .options import agreed_shape, check_options, require_shape
from .pair import default_name, find_pair, has_pair
from .trial import try_out

KIND = "program"
SCRIPT, EXPORTED = "TorchScript", "torch.export"


def recognises(source: str) -> bool:
    """Whether `source` names an encoder and a decoder that are programs by the entries of their archives."""
    return has_pair(source, lambda path: sort_of(path) is not None)


def sort_of(path: Path) -> str | None:
    """`SCRIPT` or `EXPORTED`, by the names of the entries in a zip archive; None for all else."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.partition("/")[2] or name for name in archive.namelist()]
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError):
        return None
    if "constants.pkl" in names and any(name.startswith("code/") for name in names):
        return SCRIPT
    modern = "archive_format" in names and any(name.startswith("models/") for name in names)
    return EXPORTED if modern or "serialized_exported_program.json" in names else None


def load(source: str, options: ImportOptions) -> Imported:
    """Both programs, tried on noise.

    Raises:
        CheckpointError: a file is damaged.
        ExportError: a program cannot be a bundle's half: random, made for one batch size, of other types.
        InputError: the files are not found, or an option is missing or wrong. Reading a torch.export program runs code
            that may be hidden in it, so it takes options.trust_pickle.
    """
    import torch

    from .programs import ProgramHalves, open_program
    from .torch_reading import make_graphs

    paths = find_pair(source, lambda path: sort_of(path) is not None, "a TorchScript or torch.export program")
    check_options(options, pickles=EXPORTED in map(sort_of, paths))
    encoder, decoder = (open_program(path, sort_of(path), options.trust_pickle) for path in paths)
    shape = require_shape(agreed_shape(encoder.shape, options.input_shape), options)
    halves = ProgramHalves(encoder, decoder, make_graphs(encoder.module, decoder.module, shape, options))
    sizes = try_out(halves, shape, options)
    sorts = encoder.sort if encoder.sort == decoder.sort else f"{encoder.sort}, {decoder.sort}"
    return Imported(
        halves,
        default_name(source),
        *sizes,
        options.input_range,
        origin={"library": "torch", "version": torch.__version__, "program": sorts},
    )
