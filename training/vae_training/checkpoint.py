"""`model.pt`: a trained model as a plain dict of data and tensors, read without running anything that is in the file.

format          "vae-checkpoint"
format_version  1
kind            "vae" or "autoencoder"
config          the model's `ModelConfig` as a dict
state_dict      float32 weights on the CPU (BatchNorm counts its batches in int64)
input           `InputSpec.to_dict()`
likelihood      `Likelihood.to_dict()`; a Gaussian's learned scale is in it
examples        {"train": tensor, "held_out": tensor}, up to 256 inputs each, uint8 (N, H, W[, C]) or float32,
                as they were read, before any binarisation
dataset         what it was trained on; becomes the manifest's block `training`
metrics         the figures, each under the part it was measured on
"""

from __future__ import annotations

import io
import math
import os
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vae_runtime.atomic import atomic_file
from vae_runtime.errors import BundleError, CheckpointError, InputError
from vae_runtime.manifest import KINDS, InputSpec, Likelihood
from vae_runtime.preprocess import to_model_input

from .models import Autoencoder, ModelConfig, build_model, config_from_dict

FORMAT = "vae-checkpoint"
FORMAT_VERSION = 1
MAX_DEPTH = 16  # of what is in each other; a list may hold itself
MAX_PARTS = 100_000  # in all; a list may hold another twice, which holds another twice, and so on
EXAMPLES = ("train", "held_out")
_DICTS = ("config", "state_dict", "input", "likelihood", "examples", "dataset", "metrics")


@dataclass(frozen=True)
class Checkpoint:
    """A trained model with everything that export needs; see the module's docstring for the fields."""

    kind: str
    config: ModelConfig
    state_dict: Mapping[str, Tensor]
    input: InputSpec
    likelihood: Likelihood
    examples: Mapping[str, Tensor]
    dataset: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)

    def build_model(self) -> Autoencoder:
        """The model with its weights, on the CPU, in evaluation mode.

        Raises:
            CheckpointError: the weights do not fit the config.
        """
        with torch.device("meta"):  # no memory until the shapes are known to fit
            model = build_model(self.config)
        for key, expected in model.state_dict().items():  # shapes are compared below, which dtypes are not
            if key in self.state_dict and (found := self.state_dict[key].dtype) != expected.dtype:
                raise CheckpointError(f"state_dict[{key!r}] is {found}; expected {expected.dtype}")
        try:
            model.load_state_dict(
                {key: value.clone() for key, value in self.state_dict.items()}, strict=True, assign=True
            )
        except RuntimeError as error:
            first = str(error).split("\n")[1 if "\n" in str(error) else 0].strip()
            raise CheckpointError(f"the weights do not fit the config: {first}") from None
        return model.eval()

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "kind": self.kind,
            "config": self.config.to_dict(),
            "state_dict": {key: value.detach().cpu().contiguous() for key, value in self.state_dict.items()},
            "input": self.input.to_dict(),
            "likelihood": self.likelihood.to_dict(),
            "examples": dict(self.examples),
            "dataset": dict(self.dataset),
            "metrics": dict(self.metrics),
        }


def save_checkpoint(path: str | os.PathLike[str], checkpoint: Checkpoint) -> None:
    """Write `model.pt`, atomically; the same checkpoint gives the same bytes.

    Raises:
        CheckpointError: something in it is not plain data, or it does not fit together; nothing is written.
        OutputError: the disk refuses.
    """
    data = checkpoint.to_dict()
    _parse(data)
    buffer = io.BytesIO()
    torch.save(data, buffer)
    with atomic_file(path) as stream:
        stream.write(buffer.getvalue())


def load_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read and check `model.pt`; nothing in the file is ever run.

    Raises:
        CheckpointError: it is missing, empty, damaged, no checkpoint, holds anything but plain data and tensors, is of
            a newer version, or its parts do not fit together. The message names the file.
    """
    try:
        content = Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise CheckpointError(f"{path} cannot be read: {getattr(error, 'strerror', error)}") from None
    try:
        return _parse(_load(content))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _load(content: bytes) -> Any:
    if not content:
        raise CheckpointError("the file is empty; expected a model.pt that vae-train wrote")
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise CheckpointError("the file has compressed parts, which vae-train never writes")
            damaged = archive.testzip()
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, OSError, EOFError):
        raise CheckpointError("the file is no model.pt that vae-train wrote, or it is truncated or damaged") from None
    if damaged is not None:
        raise CheckpointError(f"the file is damaged: the checksum of its part {damaged} does not match")
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise CheckpointError(
            "the file holds more than plain data and tensors (pickled classes can run code) and was not loaded"
        ) from None
    except Exception as error:  # torch raises whatever a damaged pickle leads it to
        raise CheckpointError(f"the file is damaged or no checkpoint ({type(error).__name__})") from None


def _parse(data: Any) -> Checkpoint:
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        found = data.get("format") if isinstance(data, dict) else type(data).__name__
        _check_extent(found)
        raise CheckpointError(f"format is {found!r:.80}; expected {FORMAT!r}, a model.pt that vae-train wrote")
    _check_extent(data)
    version = data.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise CheckpointError(f"format_version is {version!r:.80}; expected {FORMAT_VERSION}")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"format_version is {version}, newer than {FORMAT_VERSION}, the newest this vae-edge reads; upgrade it"
        )
    for key in _DICTS:
        if not isinstance(data.get(key), Mapping):
            raise CheckpointError(f"{key} is {data.get(key)!r:.80}; expected a dict")
    if (kind := data.get("kind")) not in KINDS:
        raise CheckpointError(f"kind is {kind!r:.80}; expected one of {', '.join(KINDS)}")
    try:
        checkpoint = Checkpoint(
            kind=kind,
            config=config_from_dict(data["config"]),
            state_dict=data["state_dict"],
            input=InputSpec.from_dict(data["input"]),
            likelihood=Likelihood.from_dict(data["likelihood"]),
            examples=data["examples"],
            dataset=data["dataset"],
            metrics=data["metrics"],
        )
    except (InputError, BundleError) as error:
        raise CheckpointError(str(error)) from None
    _check(checkpoint)
    return checkpoint


def _check(checkpoint: Checkpoint) -> None:
    """The parts fit each other, and nothing is there but plain data and finite tensors."""
    if checkpoint.kind != checkpoint.config.kind:
        raise CheckpointError(f"kind is {checkpoint.kind!r}, but config.kind is {checkpoint.config.kind!r}")
    if checkpoint.input.shape != checkpoint.config.input_shape:
        raise CheckpointError(
            f"input.shape is {checkpoint.input.shape}, but config.input_shape is {checkpoint.config.input_shape}"
        )
    for key, value in checkpoint.state_dict.items():
        if not isinstance(key, str):
            raise CheckpointError(f"state_dict has the key {key!r:.80}; expected strings")
        _check_tensor(value, f"state_dict[{key!r}]", (torch.float32, torch.int64))
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise CheckpointError(f"state_dict[{key!r}] has NaN or infinite values; weights are finite")
    checkpoint.build_model()
    for part in EXAMPLES:
        examples = checkpoint.examples.get(part)
        _check_tensor(examples, f"examples[{part!r}]", (torch.float32, torch.uint8))
        if examples.requires_grad:  # type: ignore[union-attr]
            raise CheckpointError(f"examples[{part!r}] requires a gradient; expected plain data")
        try:
            to_model_input(examples.numpy(), checkpoint.input, f"examples[{part!r}]")  # type: ignore[union-attr]
        except InputError as error:
            raise CheckpointError(str(error)) from None
    _check_plain(checkpoint.dataset, "dataset")
    _check_plain(checkpoint.metrics, "metrics")


def _check_tensor(value: Any, name: str, dtypes: tuple[torch.dtype, ...]) -> None:
    # A tensor that is not contiguous may pretend to be far larger than the file it came from, and attributes of its own
    # may stand in place of its methods.
    plain = (
        isinstance(value, Tensor)
        and not value.is_nested
        and not vars(value)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
    )
    if not plain or value.dtype not in dtypes or not value.is_contiguous():
        allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        found = type(value).__name__
        if isinstance(value, Tensor):
            shape = "several shapes" if value.is_nested else f"shape {tuple(value.shape)}"
            found = f"{value.dtype} of {shape}" + (" with attributes" if vars(value) else "")
        raise CheckpointError(f"{name} is {found}; expected a contiguous {allowed} tensor")


def _check_extent(value: Any) -> None:
    """Raise `CheckpointError` for what has no end, or none in reasonable time: before anything is shown of it."""
    left, seen = [(value, "the file", 0)], 0
    while left:
        value, name, depth = left.pop()
        seen += 1
        if isinstance(value, Mapping):
            parts = [(item, key if depth == 0 and isinstance(key, str) else name) for key, item in value.items()]
            parts += [(key, name) for key in value]
        elif isinstance(value, (list, tuple, set, frozenset)):
            parts = [(item, name) for item in value]
        else:
            continue
        if depth > MAX_DEPTH:
            raise CheckpointError(f"{name:.40} is nested more than {MAX_DEPTH} times; expected plain data")
        if seen + len(left) + len(parts) > MAX_PARTS:
            raise CheckpointError(f"{name:.40} makes more than {MAX_PARTS:,} parts; expected less plain data")
        left += [(item, inner, depth + 1) for item, inner in parts]


def _check_plain(value: Any, name: str) -> None:
    """Raise `CheckpointError` for anything that JSON would not hold, of what has an end."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise CheckpointError(f"{name} has the key {key!r:.80}; expected strings")
            _check_plain(key, f"{name}, a key,")
            _check_plain(item, f"{name:.200}.{key:.80}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _check_plain(item, f"{name}[{index}]")
    elif isinstance(value, str) and not _is_text(value):
        raise CheckpointError(f"{name} is {value!r:.80}; expected text without halves of surrogate pairs")
    elif isinstance(value, float) and not math.isfinite(value):
        raise CheckpointError(f"{name} is {value}; expected a finite number")
    elif value is not None and type(value) not in (str, int, float, bool):
        raise CheckpointError(f"{name} is a {type(value).__name__}; expected plain data")


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
