"""A pythae model as the two halves of a bundle."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vae_runtime.errors import CheckpointError, ExportError

from ..graphs import DecoderGraph, EncoderGraph
from ..imported import Imported, ImportOptions
from ..reason import reason
from ..reference import Reference
from .options import needs_extra
from .pickled import read_pickled_dict
from .pythae_folder import CONFIG, class_name
from .trial import try_out
from .weights import assign

WEIGHTS, STATE = "model.pt", "model_state_dict"


def import_model(
    folder: Path,
    config: dict[str, Any],
    kind: str,
    custom: list[str],
    input_shape: tuple[int, ...],
    signed: bool,
    likelihood: Mapping[str, Any] | None,
    bundle_name: str,
) -> Imported:
    """config: of model_config.json; custom: the networks to unpickle; signed: the model's images are in [-1, 1].

    Raises: as `pythae_folder.load`.
    """
    model = _unpickle(folder) if custom else _build(folder, config)
    model = model.float().eval().requires_grad_(False)
    encoder, decoder = Encoder(model, kind, signed), Decoder(model, input_shape, signed)
    clamp = len(input_shape) == 3 and "decoder" in custom
    halves = Reference(EncoderGraph(encoder, kind), DecoderGraph(decoder, clamp), against="pythae")
    if custom:
        try_out(halves, input_shape, ImportOptions())
    origin = {"library": "pythae", "version": version("pythae"), "class": class_name(config["name"])}
    return Imported(halves, bundle_name, input_shape, likelihood=likelihood, origin=origin)


class Encoder(nn.Module):
    """x (N, *input_shape) -> mean, logvar (N, latent), or the code alone."""

    def __init__(self, model: Any, kind: str, signed: bool) -> None:
        super().__init__()
        self.encoder, self.kind, self.signed = model.encoder, kind, signed
        self.shape = tuple(model.model_config.input_dim)

    def forward(self, x: Tensor) -> Any:
        x = x.reshape(x.shape[0], *self.shape)
        output = self.encoder(2 * x - 1 if self.signed else x)
        return (output.embedding, output.log_covariance) if self.kind == "vae" else output.embedding


class Decoder(nn.Module):
    """z (N, latent) -> (N, *input_shape)."""

    def __init__(self, model: Any, shape: tuple[int, ...], signed: bool) -> None:
        super().__init__()
        self.decoder, self.shape, self.signed = model.decoder, shape, signed

    def forward(self, z: Tensor) -> Tensor:
        reconstruction: Tensor = self.decoder(z).reconstruction
        reconstruction = reconstruction.reshape(z.shape[0], *self.shape)
        return reconstruction / 2 + 0.5 if self.signed else reconstruction


def _library() -> Any:
    with needs_extra("pythae", "importing from pythae"):
        import pythae.models
    return pythae.models


def _build(folder: Path, config: dict[str, Any]) -> Any:
    """The model with pythae's default networks, in no memory until the weights are known to fit."""
    library, name = _library(), class_name(config["name"])
    config_class = getattr(library, config["name"])
    unknown = sorted(set(config) - {field.name for field in dataclasses.fields(config_class)})
    if unknown:  # which pydantic passes over
        raise CheckpointError(f"{folder / CONFIG} has {', '.join(unknown)}, which {config_class.__name__} lacks")
    try:
        settings = config_class(**{key: value for key, value in config.items() if key != "name"})
        with torch.device("meta"):
            model = getattr(library, name)(settings)
    except Exception as error:  # pydantic's, or any that a value leads to
        raise CheckpointError(f"{folder / CONFIG} describes no {name}: {reason(error)}") from None
    content = read_pickled_dict(folder / WEIGHTS)
    if not isinstance(content.get(STATE), dict):
        raise CheckpointError(f"{folder / WEIGHTS} has no {STATE}, which pythae's save writes")
    assign(model, content[STATE], folder / WEIGHTS)
    return model


def _unpickle(folder: Path) -> Any:
    """The model with networks of its own, whose code runs."""
    library = _library()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = library.AutoModel.load_from_folder(str(folder))
    except Exception as error:
        raise CheckpointError(f"{folder} cannot be loaded by pythae: {reason(error)}") from None
    if not isinstance(model, nn.Module):
        raise ExportError(f"{folder} holds a {type(model).__name__}, no PyTorch module")
    return model
