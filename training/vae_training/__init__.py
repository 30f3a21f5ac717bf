"""Train variational autoencoders: data in, `model.pt` out.

    from vae_training import TrainConfig, train
    metrics = train(TrainConfig(data="digits"), "digits")

Names are loaded when they are used, so that importing the package is cheap and works without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vae_runtime.errors import MissingExtraError
from vae_runtime.version import __version__

if TYPE_CHECKING:
    from .checkpoint import Checkpoint, load_checkpoint, save_checkpoint
    from .config import TrainConfig
    from .data import Dataset, load_dataset
    from .loop import train
    from .models import VAE, Autoencoder, ModelConfig, build_model, config_from_dict

__all__ = [
    "VAE",
    "Autoencoder",
    "Checkpoint",
    "Dataset",
    "ModelConfig",
    "TrainConfig",
    "__version__",
    "build_model",
    "config_from_dict",
    "load_checkpoint",
    "load_dataset",
    "save_checkpoint",
    "train",
]

_HOMES = {
    "VAE": "models",
    "Autoencoder": "models",
    "Checkpoint": "checkpoint",
    "Dataset": "data",
    "ModelConfig": "models",
    "TrainConfig": "config",
    "build_model": "models",
    "config_from_dict": "models",
    "load_checkpoint": "checkpoint",
    "load_dataset": "data",
    "save_checkpoint": "checkpoint",
    "train": "loop",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "torch":
            raise
        raise MissingExtraError("torch", "train", f"vae_training.{name}") from None


def __dir__() -> list[str]:
    return sorted(__all__)
