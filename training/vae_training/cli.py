"""`vae-train`: parse, train, print."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from vae_runtime.console import Command, json_option, print_json
from vae_runtime.errors import MissingExtraError
from vae_runtime.manifest import BINARIZE_MODES, COLOURS, KINDS, RESIZE_MODES
from vae_runtime.version import __version__

from .config import ACTIVATIONS, FAMILIES, LIKELIHOODS, MIXED_PRECISIONS, NORMS, TrainConfig
from .folder import recorded_config
from .split import ORDERS, PARTS

_Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
_DEFAULTS: dict[str, Any] = {field.name: field.default for field in fields(TrainConfig)}
_INTERRUPTED = 130  # the exit code after Ctrl-C, as shells have it


class _TrainCommand(Command):
    """Ctrl-C is no failure: what was written last is kept, and the run goes on from there."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("Interrupted; continue with the same command and --resume.", err=True)
            ctx.exit(_INTERRUPTED)


def _option(name: str, help: str, **settings: Any) -> _Decorator:
    """An option of `TrainConfig`, with the default that stands there."""
    default = _DEFAULTS[name]
    return click.option(
        "--" + name.replace("_", "-"), name, default=default, help=help, show_default=default not in (None, ()),
        **settings,
    )  # fmt: skip


def _choice(name: str, help: str, choices: Any) -> _Decorator:
    return _option(name, help, type=click.Choice(list(choices)))


class _Numbers(click.ParamType):
    """ "64,128" or "64x48" -> (64, 128)."""

    def __init__(self, separator: str) -> None:
        self.name = separator.join(("N", "N"))
        self.separator = separator

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(int(part) for part in value.lower().split(self.separator))
        except ValueError:
            self.fail(f"{value!r} is not of the form {self.name}", param, ctx)


class _Sides(_Numbers):
    """ "64x48" -> (64, 48); "64" -> (64, 64)."""

    def __init__(self) -> None:
        super().__init__("x")

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        sides = super().convert(value, param, ctx)
        return sides * 2 if len(sides) == 1 else sides


@click.command(cls=_TrainCommand, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option(
    "--data", required=False, help="'digits', a folder of IDX files, a folder of pictures, an .npy or .npz file."
)
@click.option(
    "--output", required=True, type=click.Path(path_type=Path), help="Folder for model.pt, metrics.json and pictures."
)
@_option(
    "split",
    "Train, validation and test parts: counts '8000,1000,1000' or fractions; default: 0.8,0.1,0.1, but of IDX files "
    "train-* and t10k-* the latter are the test part, unless this or --order is given.",
)
@_choice("order", "Shuffle before splitting, or keep the order of the files; default: seeded.", ORDERS)
@_option(
    "exclude_label", "Leave the examples with this label out of all parts; may be repeated.", type=int, multiple=True
)
@_option("size", "HEIGHTxWIDTH of a folder of pictures; default: the first picture's.", type=_Numbers("x"))
@_choice(
    "resize", "How a picture file of another size becomes an input; default: exact, that is not at all.", RESIZE_MODES
)
@_choice("colour", "Of a folder of pictures; default: rgb.", COLOURS)
@_choice("binarize", "Make images binary: drawn anew each time, or x >= 0.5.", BINARIZE_MODES)
@_option("shift", "Move each training image by up to this many pixels.", type=int)
@_option(
    "crop",
    "HEIGHTxWIDTH, or one number: train on crops of a folder of photographs of any sizes; default: 64 for resnet.",
    type=_Sides(),
)
@click.option("--flip/--no-flip", default=None, help="Mirror half of the crops left to right; default: yes.")
@_choice("family", "Of models; vectors take mlp, resnet takes images of any size when it is trained.", FAMILIES)
@_choice("kind", "Variational, or the plain autoencoder to compare with.", KINDS)
@_option("latent", "Latent dimensions, or channels (resnet); default: 20, resnet: 4.", type=int)
@_option(
    "widths",
    "Channels after each halving (conv, resnet) or hidden units (mlp), '32,64'; default: by the image's size.",
    type=_Numbers(","),
)
@_option(
    "depth", "Convolutions at the lowest resolution (conv) or residual blocks at each (resnet), per half.", type=int
)
@_choice("norm", "Normalisation (resnet); default: batch, which folds away at export.", NORMS)
@_choice("activation", "Of resnet; default: relu.", ACTIVATIONS)
@_option("attention", "Attention at the lowest resolution (resnet); each output then sees all.", is_flag=True)
@_choice("likelihood", "Default: bernoulli for grey images, gaussian with a learned scale for all else.", LIKELIHOODS)
@_option("beta", "Weight of the KL, which a vae has; default: 1, resnet: 1e-5.", type=float)
@_option("free_bits", "Nats per latent dimension that the KL leaves alone.", type=float)
@_option("gradient_weight", "Weight of wrong differences of neighbouring pixels in the loss.", type=float)
@_option("kl_warmup", "Part of all steps over which the KL's weight rises.", type=float)
@_option(
    "capacity", "Nats that the KL is led to, rising from 0, and a rate-distortion curve of the way; 0: off.", type=float
)
@_option("gamma", "Weight of the KL's distance from the capacity; default: 10.", type=float)
@_option("epochs", "Passes over the train part; default: 20, or more to reach 800 steps.", type=int)
@_option("batch_size", "Examples per step.", type=int)
@_option("learning_rate", "The highest of the schedule.", type=float)
@_option("lr_warmup", "Part of all steps over which the learning rate rises.", type=float)
@_option("weight_decay", "Of AdamW.", type=float)
@_option("clip", "Largest norm of the gradient.", type=float)
@_option("ema", "Decay of the moving average of the weights.", type=float)
@_option("patience", "Stop after this many epochs without a better validation figure; 0: never.", type=int)
@_option(
    "nll_samples", "Importance samples per test example of its likelihood; 0: none; default: 100, resnet: 0.", type=int
)
@_choice("mixed_precision", "Of the device.", MIXED_PRECISIONS)
@_option("seed", "Of everything random.", type=int)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N or mps.")
@click.option("--threads", type=click.IntRange(1), help="Of the CPU, by whose number sums round; default: torch's.")
@click.option(
    "--checkpoint-seconds", type=click.FloatRange(0), default=30.0, show_default=True, help="0: after every epoch."
)
@click.option(
    "--resume", is_flag=True, help="Continue the run in the output folder with its settings; as many threads: exactly."
)
@click.option("--force", is_flag=True, help="Begin anew over a run in the output folder.")
@click.option("--tensorboard", is_flag=True, help="Log to the folder tensorboard/ in the output folder.")
@json_option
@click.version_option(__version__, prog_name="vae-train")
@click.pass_context
def main(ctx: click.Context, /, output: Path, as_json: bool, threads: int | None, **options: Any) -> None:
    """Train a variational autoencoder; leave model.pt, metrics.json and pictures in the output folder."""
    settings = {name: options.pop(name) for name in _DEFAULTS}
    if options["resume"] and options["force"]:
        raise click.UsageError("--resume continues a run and --force begins anew: pass one of them")
    recorded = recorded_config(output) if options["resume"] else None
    if recorded is not None:
        given = {name for name in _DEFAULTS if ctx.get_parameter_source(name) is not ParameterSource.DEFAULT}
        settings = {**recorded, **{name: settings[name] for name in given}}
    if settings["data"] is None:
        raise click.UsageError("Missing option '--data'.")
    metrics = _train(TrainConfig.from_dict(settings), output, threads, options)
    if os.environ.get("RANK", "0") != "0":  # under torchrun the first process speaks for all
        return
    if as_json:
        print_json(metrics)
    else:
        click.echo(_summary(metrics, output))


def _train(config: TrainConfig, output: Path, threads: int | None, options: dict[str, Any]) -> dict[str, Any]:
    try:
        import accelerate  # noqa: F401  # the loop imports these two late; say so early if they are missing
        import torch
        import tqdm  # noqa: F401

        from .loop import train
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in ("torch", "accelerate", "tqdm"):
            raise
        raise MissingExtraError(missing, "train", "training") from None
    if threads is not None:
        torch.set_num_threads(threads)
    return train(config, output, progress=True, **options)


def _summary(metrics: dict[str, Any], output: Path) -> str:
    """A few lines for people; every figure says on which part it was measured."""
    test, training, model = metrics["test"], metrics["training"], metrics["model"]
    size, time = f"{model['parameters']:,} parameters", f"{training['epochs']} epochs in {training['seconds']:.0f} s"
    led = "capacity_nats" in training["history"][-1]
    kept = "" if led else f"; the weights of epoch {training['best_epoch']}, the best on the validation part"
    likelihood = metrics["likelihood"]["type"]
    figure = f"reconstruction {test['reconstruction_nats']:.2f} nats, {likelihood}"
    if "negative_elbo_nats" in test:
        error = _plus_minus(test["negative_elbo_standard_error_nats"])
        figure = (
            f"-ELBO {test['negative_elbo_nats']:.2f}{error} nats = "
            f"{test['reconstruction_nats']:.2f} reconstruction "
            f"+ {test['kl_nats']:.2f} KL, {likelihood}; "
            f"{test['active_units']} of {model['latent_dim']} "
            f"{'channels' if model['family'] == 'resnet' else 'dimensions'} active"
        )
    psnr = f", PSNR {test['psnr_db']:.2f} dB" if "psnr_db" in test else ""
    lines = [
        f"{output}: {', '.join(metrics['files'])}, metrics.json",
        f"{model['family']} {model['kind']}, {size}, {time} on {training['device']}{kept}",
        *_parts(metrics["dataset"]),
        f"test part, {_count(test['examples'], 'example')}: {figure}",
        *_likelihood(test),
        f"test part, without sampling: mean squared error {test['mse']:.5g}{psnr}",
        *_samples(metrics.get("samples", {})),
    ]
    return "\n".join(lines)


def _parts(dataset: dict[str, Any]) -> list[str]:
    """Which files the parts are from, where the files decided."""
    if dataset.get("split_by") != "files":
        return []
    train, validation, _ = (f"{dataset[part]:,}" for part in PARTS)
    tested = _count(dataset["test"], "test example")
    return [f"parts: {train} train and {validation} validation examples from train-*, {tested} from t10k-*"]


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _plus_minus(error: float | None) -> str:
    return "" if error is None else f" ± {error:.2f}"


def _likelihood(test: dict[str, Any]) -> list[str]:
    if "nll_nats" not in test:
        return []
    figure = f"{test['nll_nats']:.2f}{_plus_minus(test['nll_standard_error_nats'])} nats"
    samples = _count(test["nll_samples"], "importance sample")
    return [f"test part, -log p(x) by {samples} for each example: {figure}"]


def _samples(samples: dict[str, Any]) -> list[str]:
    """Every entry of precision and recall in one line."""
    shown = ", ".join(
        f"{name} {figures['precision']:.2f} and {figures['recall']:.2f}"
        for name, figures in samples.items()
        if isinstance(figures, dict) and name != "train"
    )
    return [f"samples by prior, precision and recall against the test part: {shown}"] if shown else []
