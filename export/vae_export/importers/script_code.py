"""The code in a TorchScript file, checked before it is loaded.

TorchScript has no access to Python, but it has operators that read and write files, and loading a file may run its code
already. No network needs them, so their names are refused wherever they stand in the code, in strings too: spaces,
comments and line breaks then hide nothing, and no second parser can see other code than torch's does. For the same
reason the records are those that torch's own reader finds: it ignores the case of their names, for example.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from vae_runtime.errors import CheckpointError, ExportError

from ..reason import reason

MAX_NAME = 500  # of a record; torch's reader lists longer ones cut off
OPERATORS = ("save", "from_file")  # of aten; no other of its operators, nor of prim's, reaches files
_NAMES = re.compile(rf"\b(?:{'|'.join(OPERATORS)}|classes)\b", re.ASCII)  # torch.classes are written in C++
# `ops` has the operators of every library that is loaded; as an attribute or its declaration it is any name.
_NAMESPACES = re.compile(r"(?<![.\w])ops\b(?!\.(?:aten|prim)\.\w|[ ]*:)", re.ASCII)
_OBJECTS = re.compile(rb"torch[.\n]classes\b")  # in a pickle
_LAYER = re.compile(r'\bgetattr\(([\w.()]+), "[^"\\]*"\)', re.ASCII)  # no escapes, no strings put together
_IN_GRAPH = re.compile(rf"\baten::({'|'.join(OPERATORS)})\b")


def check_archive(path: Path) -> None:
    """Raise if a TorchScript file has code that could reach files, without running any.

    Raises:
        CheckpointError: it cannot be read, or has two records of one name.
        ExportError: it has such code.
    """
    for name, content in _records(path).items():
        if name.endswith(".pkl"):
            found = _OBJECTS.search(content)
            word = "torch.classes" if found else None
        else:
            word = _suspicious(content)
        if word is not None:
            raise ExportError(
                f"{path} has {word!r} in {name}, a name in code that reaches files or C++, which a network does not;"
                " if it is the name of one of its parts, rename that and save it again"
            )


def check_graphs(module: Any, path: Path) -> None:
    """The same of what torch made of the code, in all methods of all parts.

    Raises:
        ExportError: one calls an operator that reaches files.
    """
    for part in module.modules():
        for method in map(part._c._get_method, part._c._method_names()):
            if found := _IN_GRAPH.search(str(method.inlined_graph)):
                raise ExportError(f"{path} calls {found[1]!r}, which reaches files; a network needs none")


def _records(path: Path) -> dict[str, bytes]:
    """The code and the pickles of the file, by their names in lower case."""
    try:
        reader = torch._C.PyTorchFileReader(str(path))
        names = reader.get_all_records()
        records = {name.lower(): reader.get_record(name) for name in names if name.lower().endswith((".py", ".pkl"))}
    except Exception as error:
        raise CheckpointError(f"{path} is not a TorchScript program that can be read: {reason(error)}") from error
    lower = [name.lower() for name in names]
    if len(set(lower)) != len(lower) or max(map(len, lower), default=0) > MAX_NAME or "model.json" in lower:
        raise CheckpointError(
            f"{path} has records of the same name, of names over {MAX_NAME} characters, or of an older format; save it"
            " again with torch.jit.save"
        )
    return records


def _suspicious(code: bytes) -> str | None:
    """A name in the code that is refused, None where there is none."""
    text = code.decode("latin-1")  # names are ASCII, and any byte may be in a string
    if found := _NAMES.search(text) or _NAMESPACES.search(text):
        return found[0]
    return "getattr" if "getattr" in _without_layers(text) else None


def _without_layers(text: str) -> str:
    """The code without the calls of getattr that torch writes for the layers of a Sequential; they may be nested."""
    found = 1
    while found:
        text, found = _LAYER.subn(r"\1", text)
    return text
