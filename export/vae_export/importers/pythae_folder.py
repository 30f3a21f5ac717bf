"""Folders of pythae: model_config.json beside model.pt, as `save` leaves them, or a training's `final_model`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from vae_runtime.errors import CheckpointError, ExportError, InputError

from ..imported import Imported, ImportOptions
from .options import FLAGS, bundle_name, peek_json, read_json, refuse_options, require_agreement

KIND = "pythae"
CONFIG, SUBFOLDER = "model_config.json", "final_model"

# With a Gaussian posterior and the standard normal prior, by the name of the config. The value: whether it minimises a
# bound on the likelihood that its reconstruction_loss stands for, up to the weights of its other terms.
VAES = {
    "VAEConfig": True,
    "BetaVAEConfig": True,
    "BetaTCVAEConfig": True,
    "DisentangledBetaVAEConfig": True,
    "FactorVAEConfig": True,
    "INFOVAE_MMD_Config": True,
    "IWAEConfig": True,
    "CIWAEConfig": True,
    "MIWAEConfig": True,
    "PIWAEConfig": True,
    "MSSSIM_VAEConfig": False,  # a similarity of images in place of the likelihood
    "VAEGANConfig": False,  # a discriminator's features in place of it
    "Adversarial_AE_Config": False,  # a discriminator in place of the divergence
}
AUTOENCODERS = ("AEConfig", "WAE_MMD_Config", "RAE_L2_Config", "RAE_GP_Config")
REFUSED = {
    "VAMPConfig": "its prior is a mixture that it learned, not the standard normal distribution",
    "SVAEConfig": "its latents lie on a sphere, not in a Gaussian posterior",
    "PoincareVAEConfig": "its latents lie in a hyperbolic space, not in a Gaussian posterior",
    "HVAEConfig": "its latents are moved by Hamiltonian dynamics, so that the posterior is not Gaussian",
    "RHVAEConfig": "its latents are moved by Hamiltonian dynamics, so that the posterior is not Gaussian",
    "VAE_LinNF_Config": "its latents go through a normalising flow, so that the posterior is not Gaussian",
    "VAE_IAF_Config": "its latents go through a normalising flow, so that the posterior is not Gaussian",
    "VQVAEConfig": "its latents are entries of a codebook, not continuous",
}
NETWORKS = ("encoder", "decoder", "discriminator")
_UNUSED = ("weights", "multiple_of", "logits", "latent_scale", "latent_shift", "spread")


def recognises(source: str) -> bool:
    """A folder whose model_config.json has the name of a config, as pythae's have."""
    config = peek_json(_model_folder(Path(source)) / CONFIG) or {}
    return str(config.get("name")).endswith("Config") and "input_dim" in config


def load(source: str, options: ImportOptions) -> Imported:
    """A model with one encoder and one decoder, of vectors (D,) or of images (C, H, W) of one size.

    Its own networks are pickled where they are not the default ones; they are loaded only if the user trusts them.

    Raises:
        CheckpointError: a file is missing or damaged, or the weights do not fit the config.
        ExportError: a model of a sort that no bundle can hold.
        InputError: an option is missing, as the trust in pickled networks, of no use, or contradicts the config.
        MissingExtraError: pythae is not installed.
    """
    refuse_options(
        options, "a pythae folder has the weights, images of one size, no logits, and no scale of latents", *_UNUSED
    )
    folder = _model_folder(Path(source))
    config = read_json(folder / CONFIG)
    name = str(config.get("name"))
    if name not in VAES and name not in AUTOENCODERS:
        reason = REFUSED.get(name, f"exported are {', '.join(map(class_name, (*VAES, *AUTOENCODERS)))}")
        raise ExportError(f"{folder} holds a {class_name(name)} of pythae: {reason}")
    custom = [network for network in NETWORKS if config.get(f"uses_default_{network}", True) is not True]
    if custom and not options.trust_pickle:
        raise InputError(
            f"{folder} has a pickled {' and '.join(custom)} of its own, and unpickling runs whatever code is in it; "
            f"if you trust where it is from, pass {FLAGS['trust_pickle']}"
        )
    kind = _kind(name, config)
    require_agreement(options, "kind", kind, class_name(name))
    shape = _input_shape(config, options.input_shape)
    signed = _is_signed(config, custom, len(shape) == 3, options)
    from .pythae_model import import_model

    return import_model(
        folder, config, kind, custom, shape, signed, _likelihood(name, config, signed), bundle_name(folder, SUBFOLDER)
    )


def class_name(config_name: str) -> str:
    """The model's class: "Adversarial_AE" of "Adversarial_AE_Config"."""
    return config_name.removesuffix("Config").removesuffix("_")


def _model_folder(source: Path) -> Path:
    inner = source / SUBFOLDER
    try:
        return inner if not (source / CONFIG).is_file() and (inner / CONFIG).is_file() else source
    except (OSError, ValueError):  # no path at all
        return source


def _kind(name: str, config: dict[str, Any]) -> str:
    """With a deterministic posterior, the code alone means something."""
    return "vae" if name in VAES and not config.get("deterministic_posterior") else "autoencoder"


def _input_shape(config: dict[str, Any], asked: tuple[int | None, ...] | None) -> tuple[int, ...]:
    """That of the bundle's inputs: the config's, or images of which its data are the flat rows."""
    stated = config.get("input_dim")
    if not isinstance(stated, list) or not stated or not all(isinstance(n, int) and n > 0 for n in stated):
        raise CheckpointError(f"{CONFIG} has input_dim {stated!r}; expected a list of whole numbers")
    if asked is not None and not _is_possible(tuple(stated), asked):
        raise InputError(f"{FLAGS['input_shape']} is {asked}, but {CONFIG} has input_dim {tuple(stated)}")
    if asked is not None:
        return tuple(side for side in asked if side is not None)
    if len(stated) not in (1, 3):
        raise InputError(
            f"{CONFIG} has input_dim {tuple(stated)}, neither (D,) nor (C, H, W); say with {FLAGS['input_shape']} what "
            f"they are, as in {FLAGS['input_shape']} {math.prod(stated)}"
        )
    return tuple(stated)


def _is_possible(stated: tuple[int, ...], asked: tuple[int | None, ...]) -> bool:
    """Whether the network's data can be of the shape asked for: the same, or rows and planes of images, or rows."""
    if len(stated) == 3 or asked == stated:
        return asked == stated and len(stated) in (1, 3)
    if None in asked or math.prod(stated) != math.prod(side or 0 for side in asked):
        return False
    return (len(stated) == 1 and len(asked) == 3) or asked == (1, *stated) or (len(stated) > 1 and len(asked) == 1)


def _is_signed(config: dict[str, Any], custom: list[str], image: bool, options: ImportOptions) -> bool:
    """Whether images are in [-1, 1], as only networks other than the default ones can have them."""
    if not image:
        refuse_options(options, "vectors stay in their own units", "input_range")
        return False
    if "decoder" not in custom or config.get("reconstruction_loss") == "bce":
        require_agreement(options, "input_range", "unit", "a decoder that ends in [0, 1]")
        return False
    if options.input_range is None:
        raise InputError(
            "the decoder is not pythae's own, so the range of its images is not known; say it with "
            f"{FLAGS['input_range']} unit, for [0, 1], or {FLAGS['input_range']} signed, for [-1, 1]"
        )
    return options.input_range == "signed"


def _likelihood(name: str, config: dict[str, Any], signed: bool) -> dict[str, Any] | None:
    """pythae's `get_nll`: "bce" is a Bernoulli's of grey values; "mse" is half the square, a Gaussian's of deviation 1
    in the network's units, of which [-1, 1] has two for one of the bundle's."""
    if not VAES.get(name):
        return None
    if config.get("reconstruction_loss") == "bce":
        return {"type": "bernoulli", "binarize": "none"}
    return {"type": "gaussian", "scale": 0.5 if signed else 1.0}
