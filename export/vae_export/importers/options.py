"""The options of importers, checked, and the small JSON files and names of folders that state the rest."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vae_runtime.arguments import check_number
from vae_runtime.errors import CheckpointError, InputError, MissingExtraError
from vae_runtime.manifest import KINDS, Shape

from ..imported import INPUT_RANGES, Arguments, ImportOptions
from ..quality import ExportWarning, warn

FLAGS = {  # by field of ImportOptions
    "weights": "--weights",
    "trust_pickle": "--trust-pickle",
    "kind": "--kind",
    "input_shape": "--input",
    "multiple_of": "--multiple-of",
    "input_range": "--input-range",
    "logits": "--logits",
    "latent_scale": "--latent-scale",
    "latent_shift": "--latent-shift",
    "spread": "--spread",
}
_MAX_JSON = 2**20
_MOST_CHANNELS = 4  # of images as files have them


def flag(options: ImportOptions, name: str) -> str:
    """An option's name in messages: the command's flag, or the argument of a Python function."""
    return name if isinstance(options, Arguments) else FLAGS[name]


def wrong_option(options: ImportOptions, name: str, rule: str) -> InputError:
    """To be raised for an option with its value; `rule` goes on right behind that."""
    return InputError(f"{flag(options, name)} is {getattr(options, name)!r}{rule}")


def refuse_options(options: ImportOptions, why: str, *names: str) -> None:
    """Raises: InputError: one of these options was given; `why` ends the sentence."""
    for name in names:
        value = getattr(options, name)
        if value is not None and value is not False:
            raise InputError(f"{FLAGS[name]} is of no use here: {why}")


def require_agreement(options: ImportOptions, name: str, stated: Any, source: str) -> None:
    """Raises: InputError: the option `name` was given and is not what the source states."""
    value = getattr(options, name)
    if value is not None and value != stated:
        raise wrong_option(options, name, f", but {source} says {stated!r}")


def check_options(options: ImportOptions, factory: bool = False, pickles: bool = False) -> None:
    """Raise `InputError` for an option with an impossible value, or one that only a factory takes."""
    if options.weights is not None and not factory:
        raise InputError(f"{FLAGS['weights']} is for a factory; this source has its weights in it")
    if not pickles:
        refuse_options(options, "nothing in this source is unpickled", "trust_pickle")
    for name, allowed in (("kind", KINDS), ("input_range", INPUT_RANGES)):
        if getattr(options, name) not in (None, *allowed):
            raise wrong_option(options, name, f"; expected one of {', '.join(allowed)}")
    if options.latent_scale is not None:
        check_number(options.latent_scale, flag(options, "latent_scale"), above=0)
    if options.latent_shift is not None:
        check_number(options.latent_shift, flag(options, "latent_shift"))
    if options.multiple_of is not None and options.multiple_of < 1:
        raise wrong_option(options, "multiple_of", "; expected 1 or more")


def agreed_shape(own: Shape | None, asked: Shape | None) -> Shape | None:
    """The shape of inputs that the encoder has, `own`, and that the user asks for; None: it is not stated.

    Raises:
        InputError: they do not agree.
    """
    if own is None or asked is None:
        return asked or own
    if len(own) != len(asked) or any(side not in (None, size) for side, size in zip(own, asked, strict=True)):
        raise InputError(f"{FLAGS['input_shape']} is {asked}, but the encoder takes {own}")
    return asked


def require_shape(shape: Shape | None, options: ImportOptions) -> Shape:
    """The shape of inputs, checked together with the options that go with it; None: it is not stated.

    Raises:
        InputError: an option is missing or contradicts the shape.
    """
    if shape is None:
        raise InputError(f"the source does not say what its inputs are; pass {FLAGS['input_shape']}, such as 3x64x64")
    free = shape[1:] == (None, None)
    sizes = (shape[0],) if free else shape
    if len(shape) not in (1, 3) or not all(isinstance(size, int) and size > 0 for size in sizes):
        rule = "expected (C, H, W), (C, None, None) for free sizes, or (D,)"
        raise InputError(f"{FLAGS['input_shape']} is {shape}; {rule}")
    if len(shape) == 3 and options.input_range is None:
        raise InputError(
            f"the source does not say whether its images lie in [0, 1] or [-1, 1]; pass {FLAGS['input_range']} unit or"
            " signed"
        )
    if len(shape) == 1 and options.input_range is not None:
        raise wrong_option(options, "input_range", ", but the inputs are vectors, which have no range")
    if shape[2:] in ((1,), (3,)) and isinstance(shape[0], int) and shape[0] > _MOST_CHANNELS:
        warn(
            f"{flag(options, 'input_shape')} is {'x'.join(map(str, shape))}, {shape[0]} channels of {shape[1]} by"
            f" {shape[2]} pixels; if channels come last there, permute in both halves, and pass"
            f" {shape[2]}x{shape[0]}x{shape[1]}",
            ExportWarning,
        )
    if not free and options.multiple_of not in (None, 1):
        raise wrong_option(options, "multiple_of", f", but the inputs {shape} have no free size")
    return shape


@contextlib.contextmanager
def needs_extra(extra: str, purpose: str) -> Iterator[None]:
    """Around the import of a library that comes with an extra of ours.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingExtraError((error.name or extra).split(".")[0], extra, purpose) from None


def bundle_name(folder: Path, subfolder: str) -> str:
    """A model's name: that of its folder, or of the one around it where it lies in a `subfolder` of a fixed name."""
    path = folder.resolve()
    return path.parent.name if path.name == subfolder and path.parent.name else path.name


def peek_json(path: Path) -> dict[str, Any] | None:
    """The object in a small JSON file; None where there is none."""
    try:
        if not path.is_file() or path.stat().st_size > _MAX_JSON:
            return None
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a small JSON file.

    Raises:
        CheckpointError: it is missing, too large, or no JSON object.
    """
    content = peek_json(path)
    if content is None:
        found = "is no JSON object, or it is damaged" if path.is_file() else "is missing"
        raise CheckpointError(f"{path} {found}")
    return content
