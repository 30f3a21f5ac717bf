"""Which two files are the encoder and the decoder: a folder that holds both, or 'ENCODER,DECODER'."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from vae_runtime.errors import InputError
from vae_runtime.manifest import HALF_NAMES

MAX_ENTRIES = 1000  # of a folder that are looked at
Fits = Callable[[Path], bool]


def has_pair(source: str, fits: Fits) -> bool:
    """Whether `source` names an encoder and a decoder whose content `fits` knows; never raises for odd files."""
    try:
        if (named := _named(source)) is not None:
            return all(map(fits, named))
        files = _files(Path(source))
        return all(any(_is_half(path, source, half) and fits(path) for path in files) for half in HALF_NAMES)
    except (OSError, ValueError):
        return False


def find_pair(source: str, fits: Fits, what: str) -> tuple[Path, Path]:
    """The files of the encoder and the decoder; what: what `fits` knows, for the message.

    In a folder, and in the folders in it, those are looked for whose path has 'encoder' or 'decoder' in it. A
    'vae_encoder' goes before others, which may be encoders of text.

    Raises:
        InputError: there are none, or several.
    """
    if (named := _named(source)) is not None:
        for path in named:
            if not fits(path):
                raise InputError(f"{path} is not {what}")
        if _is_half(named[0], "", "decoder") and _is_half(named[1], "", "encoder"):
            raise InputError(f"source is {source!r}; expected the encoder first, then the decoder")
        return named
    encoder, decoder = (_find(source, fits, half, what) for half in HALF_NAMES)
    return encoder, decoder


def default_name(source: str) -> str:
    """A name for the bundle: that of the folder, or of the encoder's file."""
    path = Path(source.split(",")[0])
    return path.stem if _named(source) is not None else path.resolve().name or "vae"


def _find(source: str, fits: Fits, half: str, what: str) -> Path:
    try:
        found = [path for path in _files(Path(source)) if _is_half(path, source, half) and fits(path)]
    except OSError as error:
        raise InputError(f"{source} cannot be read: {error.strerror or error}") from None
    preferred = [path for path in found if f"vae_{half}" in path.relative_to(source).as_posix().lower()]
    found = preferred if len(preferred) == 1 else found
    if len(found) != 1:
        count = f"{len(found)} of them ({', '.join(path.relative_to(source).as_posix() for path in found[:4])})"
        raise InputError(
            f"{source} should have one {half}, {what} with '{half}' in its path; it has"
            f" {count if found else 'none'}; name both files as ENCODER,DECODER"
        )
    return found[0]


def _named(source: str) -> tuple[Path, Path] | None:
    parts = source.split(",")
    if len(parts) != 2 or Path(source).exists() or not all(Path(part).is_file() for part in parts):
        return None
    return Path(parts[0]), Path(parts[1])


def _files(folder: Path) -> list[Path]:
    """The files in a folder and in the folders directly in it."""
    if not folder.is_dir():
        return []
    entries = sorted(folder.iterdir())[:MAX_ENTRIES]
    inner = [path for entry in entries if entry.is_dir() for path in sorted(entry.iterdir())[:MAX_ENTRIES]]
    return [path for path in (*entries, *inner) if path.is_file()]


def _is_half(path: Path, folder: str, half: str) -> bool:
    """Whether a path, below `folder`, says that it is this half and not the other."""
    name = (path.relative_to(folder).as_posix() if folder else path.name).lower()
    other = HALF_NAMES[1 - HALF_NAMES.index(half)]
    return half in name and other not in name
