"""What a SOURCE of no known kind seems to be, and how to name it instead."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from vae_runtime.errors import CheckpointError, InputError

from . import diffusers_folder, onnx_pair, pythae_folder, torch_program

_DOTTED = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+")
_FILES = (".pt", ".pth", ".bin", ".ckpt", ".onnx", ".safetensors", ".vae")  # dots in names of files, not of modules
_PAIR = "a bundle is made of two, the encoder's and the decoder's: pass ENCODER,DECODER, or a folder with both"


def refuse_misstated(source: str) -> None:
    """Raise `InputError` for one half alone, or a Python module that is not stated as package.module:factory."""
    try:
        found = _misstated(source)
    except (OSError, ValueError):  # no path at all
        return
    if found is not None:
        raise InputError(f"{source} is {found}")


def refuse_weights(source: str) -> None:
    """Raise `InputError` for a file of weights alone, of a pickled network, or in a folder that is a source: none is
    all that a model.pt is.

    Nothing in the file is run.
    """
    from .pickled import describe, read_pickled
    from .safetensors_header import is_safetensors
    from .state_dict import holds_tensors

    path = Path(source)
    if path.is_file() and any(kind.recognises(str(path.parent)) for kind in (diffusers_folder, pythae_folder)):
        raise InputError(f"{source} is one file of a model whose folder is the source; pass {path.parent}")
    try:
        content = None if is_safetensors(path) else read_pickled(path)
    except (CheckpointError, OSError, ValueError):
        return
    if content is None or holds_tensors(content):
        raise InputError(
            f"{source} holds weights alone, without the network that they are of; pass what returns that as"
            f" package.module:factory, and --weights {source}"
        )
    if not isinstance(content, dict):
        raise InputError(
            f"{source} holds {describe(content)}, which is no model; pass what returns a network as"
            " package.module:factory, and its state_dict() in a file as --weights FILE"
        )


def _misstated(source: str) -> str | None:
    path = Path(source)
    if path.is_file():
        if onnx_pair.is_onnx(path):
            return f"one ONNX file; {_PAIR}"
        if (sort := torch_program.sort_of(path)) is not None:
            return f"one {sort} program; {_PAIR}"
        if path.suffix == ".py":
            return f"a Python file; pass its module with what returns the network, as in {_module(source)}:factory"
        return None
    if path.exists():
        return None
    pair = [Path(part) for part in source.split(",")]
    if len(pair) == 2 and all(part.is_file() for part in pair):
        return (
            "two files that are no programs or ONNX graphs; of weights, save a dict of both under the names of the"
            " network's parts, and pass what returns that as package.module:factory, and the one file as --weights FILE"
        )
    file, colon, name = source.rpartition(":")
    if colon and name.isidentifier() and ("/" in file or file.endswith(".py")):
        return f"no package.module:factory; a module is written with dots, as in {_module(file)}:{name}"
    if _DOTTED.fullmatch(source) and not source.endswith(_FILES) and _is_module(source.partition(".")[0]):
        module, _, name = source.rpartition(".")
        return f"no file; what returns a network is written with a colon, as in {module}:{name}"
    return None


def _module(file: str) -> str:
    """The dotted name of the module in a Python file below the current folder."""
    path = Path(file).with_suffix("")
    if path.is_absolute() and path.is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())
    return path.name if path.is_absolute() or ".." in path.parts else ".".join(path.parts)


def _is_module(name: str) -> bool:
    """Whether Python finds a module of this name, here or installed; none is imported."""
    return Path(name).is_dir() or Path(f"{name}.py").is_file() or importlib.util.find_spec(name) is not None
