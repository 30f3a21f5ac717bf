"""Folders of diffusers: config.json beside diffusion_pytorch_model.safetensors, or in the `vae` of a pipeline."""

from __future__ import annotations

from pathlib import Path

from vae_runtime.errors import ExportError

from ..imported import Imported, ImportOptions
from .options import bundle_name, peek_json, read_json, refuse_options, require_agreement

KIND = "diffusers"
KINDS = {
    "AutoencoderKL": "vae",
    "AutoencoderKLFlux2": "vae",
    "AutoencoderKLHunyuanImage": "vae",
    "AutoencoderKLQwenImage": "vae",
    "AsymmetricAutoencoderKL": "vae",
    "AutoencoderDC": "autoencoder",
    "AutoencoderTiny": "autoencoder",
}
CONFIG, PIPELINE, SUBFOLDER = "config.json", "model_index.json", "vae"
_STATED = ("weights", "trust_pickle", "multiple_of", "input_range", "logits", "latent_scale", "latent_shift", "spread")


def recognises(source: str) -> bool:
    """A folder whose config.json names a class of diffusers, or a pipeline's."""
    folder = Path(source)
    return any("_class_name" in (peek_json(folder / name) or {}) for name in (CONFIG, PIPELINE))


def load(source: str, options: ImportOptions) -> Imported:
    """A model of one of `KINDS`; height and width are free unless asked for.

    Raises:
        CheckpointError: a file is missing or damaged, or the weights do not fit the config.
        ExportError: the folder holds a model of another class, or one that no bundle can hold.
        InputError: an option is of no use here. MissingExtraError: diffusers is not installed.
    """
    refuse_options(options, "images of diffusers are in [-1, 1], and config.json has the rest", *_STATED)
    folder = _model_folder(Path(source))
    config = read_json(folder / CONFIG)
    name = config.get("_class_name")
    if not isinstance(name, str) or name not in KINDS:
        raise ExportError(
            f"{folder} holds a diffusers {name}; of its classes {', '.join(KINDS)} can be exported as they are, and"
            " others that encode and decode one image by a factory that returns them, package.module:factory"
        )
    _require_known_latents(name, folder)
    require_agreement(options, "kind", KINDS[name], name)
    from .diffusers_model import import_model
    from .diffusers_weights import read_weights

    return import_model(
        folder, name, KINDS[name], config, lambda: read_weights(folder), options.input_shape,
        bundle_name(folder, SUBFOLDER),
    )  # fmt: skip


def _require_known_latents(name: str, folder: Path) -> None:
    """Raises: ExportError: it is the model of a pipeline that makes other latents of it than those of a bundle."""
    pipeline = (peek_json(folder.absolute().parent / PIPELINE) or {}).get("_class_name")
    if name == "AutoencoderKLFlux2" and isinstance(pipeline, str) and not pipeline.startswith("Flux2"):
        raise ExportError(
            f"{folder} is of {pipeline}, which puts the latents of an {name} in another order or unit than FLUX.2's"
            " pipelines, whose a bundle has; in a folder by itself it is exported as theirs"
        )


def _model_folder(source: Path) -> Path:
    """Where config.json is: the folder itself, or `vae` in that of a pipeline."""
    if (source / CONFIG).is_file() or not (source / PIPELINE).is_file():
        return source
    if not (source / SUBFOLDER / CONFIG).is_file():
        pipeline = read_json(source / PIPELINE).get("_class_name")
        raise ExportError(f"{source} is a pipeline, {pipeline}, that has no {SUBFOLDER}/{CONFIG}")
    return source / SUBFOLDER
