"""Build the reference cases of `vae-bench race`, each a folder with one model in every form that a competitor needs.

    python benchmarks/cases/build.py mlp conv28 --output cases
    python benchmarks/cases/build.py all --output cases --mnist t10k-images-idx3-ubyte.gz

A case folder:

    case.json            what it is; written last: its presence means that the case is complete
    bundle.vae/          what `export_bundle` makes of the modules
    plain/encoder.onnx   the same modules through `torch.onnx.export`, as a user would call it
    plain/decoder.onnx
    torch/modules.py     a copy of architectures.py
    torch/weights.pt     {"encoder": state_dict, "decoder": state_dict}
    inputs.npz           real inputs x, with torch's mean, logvar (of a vae) and reconstruction

The weights come from the seed; those of conv28, conv64, resnet128 and plain256 are then trained, for a minute or two
each on two cores. Normalisation layers of the untrained ones have seen real inputs, so that activations stay in the
usual range.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import shutil
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import architectures
import numpy as np
import photographs
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vae_export import export_bundle
from vae_runtime.atomic import write_json

INPUTS = 32  # in inputs.npz, at most; fewer of the largest images
EXAMPLES = 256  # for export, at most, likewise
MNIST_SPLIT, CROPS_SPLIT = "8000,1000,1000", "4096,512,512"
PRECISIONS = ("fp32", "int8")  # of the bundle, unless asked for others

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Model:
    """What a case is made of: modules in evaluation mode, real inputs (N, C, H, W), and words about them."""

    architecture: str
    arguments: dict[str, Any]
    encoder: nn.Module
    decoder: nn.Module
    examples: Float32
    kind: str
    description: str
    data: str
    likelihood: dict[str, Any] | None = None
    quality: dict[str, Any] | None = None


@dataclass(frozen=True)
class Options:
    seed: int
    mnist: Path | None
    epochs: int | None
    seconds: float
    precisions: tuple[str, ...] = PRECISIONS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+", choices=[*CASES, "all"], metavar="CASE", help=", ".join([*CASES, "all"]))
    parser.add_argument("--output", type=Path, required=True, help="folder for the case folders")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mnist", type=Path, help="MNIST's test images as IDX; without it, digits enlarged to 28×28")
    parser.add_argument("--epochs", type=int, help="of training conv28 and conv64  [12 and 10]")
    parser.add_argument("--seconds", type=float, default=100.0, help="of training resnet128 and plain256, each  [100]")
    parser.add_argument(
        "--precisions",
        default=",".join(PRECISIONS),
        help="of the bundle, with commas; a race on a GPU takes fp32,tf32,fp16",
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--force", action="store_true", help="replace cases that are there")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    precisions = tuple(arguments.precisions.split(","))
    options = Options(arguments.seed, arguments.mnist, arguments.epochs, arguments.seconds, precisions)
    for name in CASES if "all" in arguments.cases else arguments.cases:
        begun = time.perf_counter()
        folder = arguments.output / name
        if folder.exists() and not (arguments.force and (folder / "case.json").is_file()):
            sys.exit(f"{folder} exists; --force replaces it where it is a case")
        whole = arguments.output / f".{name}.part"  # what is interrupted is begun anew, and an old case stays till then
        shutil.rmtree(whole, ignore_errors=True)
        write_case(whole, name, CASES[name](options), options)
        shutil.rmtree(folder, ignore_errors=True)
        whole.rename(folder)
        print(f"{folder}: built in {time.perf_counter() - begun:.0f} s")


def mlp(options: Options) -> Model:
    images, data = digits_28(options.mnist)
    return seeded(options, "mlp", {"side": 28, "hidden": 400, "latent": 20}, images[:EXAMPLES], data, "MLP 784-400-20")


def strided64(options: Options) -> Model:
    return strided(options, 64)


def strided32(options: Options) -> Model:
    return strided(options, 32)


def strided(options: Options, side: int) -> Model:
    widths = (32, 64, 128, 256, 512)
    description = f"strided convolutions and ConvTranspose, BatchNorm, LeakyReLU, {side}×{side} RGB, latent 128"
    examples = photographs.to_float(photographs.crops(EXAMPLES, side, held_out=True, seed=options.seed))
    arguments = {"side": side, "widths": widths, "latent": 128}
    return seeded(options, "strided", arguments, examples, "crops of two photographs", description)


def seeded(
    options: Options,
    architecture: str,
    arguments: dict[str, Any],
    examples: Float32,
    data: str,
    description: str,
) -> Model:
    """Weights straight from the seed; BatchNorm's statistics are those of the examples."""
    torch.manual_seed(options.seed)
    encoder, decoder = architectures.build(architecture, **arguments)
    norms = [layer for half in (encoder, decoder) for layer in half.modules() if isinstance(layer, nn.BatchNorm2d)]
    for layer in norms:
        layer.momentum = None  # the plain average over what is seen
    with torch.no_grad():
        mean, _ = encoder.train()(torch.from_numpy(examples[:64]))
        decoder.train()(mean)
    return Model(
        architecture, arguments, encoder.eval(), decoder.eval(), examples, "vae", f"{description}, untrained", data
    )


def conv28(options: Options) -> Model:
    images, data = digits_28(options.mnist)
    split = {"split": MNIST_SPLIT, "order": "file"} if options.mnist else {}
    return trained_conv(options, np.rint(images[:, 0] * 255).astype(np.uint8), 20, 12, data, **split)


def conv64(options: Options) -> Model:
    sizes = [int(part) for part in CROPS_SPLIT.split(",")]
    images = np.concatenate(
        [
            photographs.crops(sizes[0], 64, held_out=False, seed=options.seed),
            photographs.crops(sum(sizes[1:]), 64, held_out=True, seed=options.seed),
        ]
    )
    return trained_conv(options, images, 64, 10, "crops of two photographs", split=CROPS_SPLIT, order="file")


def trained_conv(
    options: Options, images: NDArray[np.uint8], latent: int, epochs: int, data: str, **split: Any
) -> Model:
    """The default conv family, trained by `vae_training`. images: uint8 (N, H, W[, 3])."""
    from vae_training import TrainConfig, load_checkpoint, train

    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "images.npy", images)
        config = TrainConfig(
            data=f"{folder}/images.npy", latent=latent, epochs=options.epochs or epochs, seed=options.seed, **split
        )
        metrics = train(config, Path(folder) / "run", device="cpu", progress=True)
        checkpoint = load_checkpoint(Path(folder) / "run" / "model.pt")
    model = checkpoint.build_model()
    arguments = {"config": checkpoint.config.to_dict()}
    encoder, decoder = architectures.build("default_conv", **arguments)
    encoder.get_submodule("body").load_state_dict(model.encoder.state_dict())
    decoder.get_submodule("0").load_state_dict(model.decoder.state_dict())
    held_out = checkpoint.examples["held_out"].numpy()
    held_out = held_out if held_out.ndim == 4 else held_out[..., None]
    return Model(
        architecture="default_conv",
        arguments=arguments,
        encoder=encoder.eval(),
        decoder=decoder.eval(),
        examples=photographs.to_float(held_out),
        kind="vae",
        description=f"the default conv family, {images.shape[1]}×{images.shape[2]}, latent {latent}, trained",
        data=data,
        likelihood=checkpoint.likelihood.to_dict(),
        quality={"part": "test", **metrics["test"], "epochs": config.epochs, "seconds": metrics["training"]["seconds"]},
    )


def resnet128(options: Options) -> Model:
    description = "residual blocks, GroupNorm, SiLU, 128×128 RGB, code 4×16×16, trained"
    arguments = {"widths": (32, 64, 64, 128), "blocks": 1, "latent": 4}
    torch.manual_seed(options.seed)
    encoder, decoder = architectures.build("resnet", **arguments)
    training = train_on_crops(options, encoder, decoder, 4096, 64)
    examples = photographs.crops(64, 128, held_out=True, seed=options.seed)
    return autoencoder("resnet", arguments, encoder, decoder, examples, description, training)


def plain256(options: Options) -> Model:
    description = "convolutions and ReLU without normalisation, 64 channels, 256×256 RGB, code 4×32×32, trained"
    arguments = {"width": 64, "levels": 4, "blocks": 3, "latent": 4}
    torch.manual_seed(options.seed)
    encoder, decoder = architectures.build("plain", **arguments)
    keep_scale(encoder, decoder)
    training = train_on_crops(options, encoder, decoder, 8192, 32)
    examples = photographs.crops(16, 256, held_out=True, seed=options.seed)
    return autoencoder("plain", arguments, encoder, decoder, examples, description, training)


def train_on_crops(options: Options, encoder: nn.Module, decoder: nn.Module, count: int, side: int) -> dict[str, Any]:
    """Train for `options.seconds` with the mean absolute error on `count` crops, smaller than the case's images, which
    networks of convolutions alone allow -> how long that was."""
    parameters = [*encoder.parameters(), *decoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    data = torch.from_numpy(photographs.to_float(photographs.crops(count, side, held_out=False, seed=options.seed)))
    generator = torch.Generator().manual_seed(options.seed)
    begun, step, elapsed = time.perf_counter(), 0, 0.0
    while elapsed < options.seconds:
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (0.02 + 0.98 * math.cos(math.pi / 2 * elapsed / options.seconds))
        batch = data[torch.randint(len(data), (8,), generator=generator)]
        loss = (decoder(encoder(batch)) - batch).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step, elapsed = step + 1, time.perf_counter() - begun
        if step % 50 == 0:
            print(f"step {step}, {elapsed:.0f} s, mean absolute error {loss.item():.4f}", file=sys.stderr)
    return {"steps": step, "seconds": elapsed}


def autoencoder(
    architecture: str,
    arguments: dict[str, Any],
    encoder: nn.Module,
    decoder: nn.Module,
    held_out: NDArray[np.uint8],
    description: str,
    training: dict[str, Any],
) -> Model:
    """A trained pair, with its PSNR on held-out crops."""
    examples = photographs.to_float(held_out)
    with torch.inference_mode():
        errors = [
            float((decoder.eval()(encoder.eval()(x)) - x).square().mean())
            for x in torch.split(torch.from_numpy(examples[:8]), 1)
        ]
    psnr = float(np.mean([-10 * math.log10(error) for error in errors]))
    return Model(
        architecture=architecture,
        arguments=arguments,
        encoder=encoder,
        decoder=decoder,
        examples=examples,
        kind="autoencoder",
        description=description,
        data="crops of two photographs",
        likelihood={"type": "gaussian", "scale": 1.0},
        quality={"part": "held-out crops", "psnr_db": psnr, **training},
    )


def keep_scale(*modules: nn.Module) -> None:
    """Weights with which activations keep their size, as there is no normalisation that would see to it: He et al.,
    2015, and small last convolutions in residual blocks, as Zhang et al., 2019 (Fixup)."""
    layers = [part for module in modules for part in module.modules()]
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    for block in (layer for layer in layers if isinstance(layer, architectures.PlainBlock)):
        block.scale_down(0.1)


def digits_28(mnist: Path | None) -> tuple[Float32, str]:
    """Handwritten digits -> float32 (N, 1, 28, 28) in [0, 1], and their name."""
    if mnist is not None:
        from vae_training.idx import read_idx

        return read_idx(mnist, 3)[:, None].astype(np.float32) / np.float32(255), "MNIST"
    from sklearn.datasets import load_digits

    small = torch.from_numpy(load_digits().images.astype(np.float32) / 16)[:, None]
    large = nn.functional.interpolate(small, size=(28, 28), mode="bilinear", align_corners=False)
    return large.numpy(), "digits enlarged to 28×28"


def write_case(folder: Path, name: str, model: Model, options: Options) -> None:
    """Write all forms of the model, `case.json` last."""
    for part in ("plain", "torch"):
        (folder / part).mkdir(parents=True)
    export_bundle(
        model.encoder,
        model.decoder,
        folder / "bundle.vae",
        examples=model.examples,
        kind=model.kind,
        name=name,
        likelihood=model.likelihood,
        precisions=options.precisions,
    )
    x = torch.from_numpy(np.ascontiguousarray(model.examples[:INPUTS]))
    reference = run(model, x)
    np.savez(folder / "inputs.npz", **{key: value.numpy() for key, value in reference.items()})  # type: ignore[arg-type]
    export_plainly(model.encoder, x, folder / "plain" / "encoder.onnx", "x", [*reference][1:-1])
    export_plainly(model.decoder, reference["mean"], folder / "plain" / "decoder.onnx", "z", ["reconstruction"])
    shutil.copy(architectures.__file__, folder / "torch" / "modules.py")
    weights = {"encoder": model.encoder.state_dict(), "decoder": model.decoder.state_dict()}
    torch.save(weights, folder / "torch" / "weights.pt")
    document = {
        "format": "vae-case",
        "format_version": 1,
        "name": name,
        "description": model.description,
        "kind": model.kind,
        "input_shape": list(x.shape[1:]),
        "latent_shape": list(reference["mean"].shape[1:]),
        "parameters": sum(p.numel() for half in (model.encoder, model.decoder) for p in half.parameters()),
        "macs": {"encode": count_macs(model.encoder, x), "decode": count_macs(model.decoder, reference["mean"])},
        "architecture": {"name": model.architecture, "arguments": model.arguments},
        "data": model.data,
        "likelihood": model.likelihood,
        "quality": model.quality,
        "seed": options.seed,
    }
    write_json(folder / "case.json", document)


@torch.inference_mode()
def run(model: Model, x: Tensor) -> dict[str, Tensor]:
    """torch's own answer on x, one example at a time where images are large."""
    rows: list[dict[str, Tensor]] = []
    for part in torch.split(x, 4):
        encoded = model.encoder(part)
        named = {"mean": encoded[0], "logvar": encoded[1]} if model.kind == "vae" else {"mean": encoded}
        rows.append({"x": part, **named, "reconstruction": model.decoder(named["mean"])})
    return {key: torch.cat([row[key] for row in rows]) for key in rows[0]}


def export_plainly(module: nn.Module, example: Tensor, path: Path, input_name: str, outputs: list[str]) -> None:
    """What the documentation of `torch.onnx.export` says, with a dynamic batch, and nothing more."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            (example[:2],),
            path,
            input_names=[input_name],
            output_names=outputs,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            dynamo=True,
            external_data=False,
        )


@torch.inference_mode()
def count_macs(module: nn.Module, inputs: Tensor) -> int:
    """Multiply-accumulates of convolutions and linear layers for one example."""
    counted: list[int] = []

    def count(layer: Any, given: Any, output: Tensor) -> None:
        grid = given[0] if isinstance(layer, nn.ConvTranspose2d) else output
        counted.append(layer.weight.numel() * (math.prod(grid.shape[2:]) if grid.ndim == 4 else 1))

    layers = [part for part in module.modules() if isinstance(part, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    module(inputs[:1])
    for hook in hooks:
        hook.remove()
    return sum(counted)


CASES = {
    "mlp": mlp,
    "conv28": conv28,
    "conv64": conv64,
    "strided64": strided64,
    "strided32": strided32,
    "resnet128": resnet128,
    "plain256": plain256,
}

if __name__ == "__main__":
    main()
