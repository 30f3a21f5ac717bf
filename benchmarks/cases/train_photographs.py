"""Train a model with spatial latents on crops of scikit-learn's two sample photographs, and write what it reaches.

    python benchmarks/cases/train_photographs.py [--epochs N] [--threads 2] [--output FOLDER]

The two photographs, china.jpg and flower.jpg, 427×640 pixels each, are written as PNG into a folder, on which
`vae-train --family resnet` trains with crops of 64×64. Each photograph is cut into three strips, so that the test
figures are those of pixels that were never trained on. The report goes to benchmarks/results/photographs.json and
photographs.md, the test crops above their reconstructions to photographs.png. --output keeps the run's folder, with
model.pt in it, for `vae-export`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from reporting import RESULTS, machine, write_report

# 2 steps an epoch; what two cores of a machine with AVX-512 do in ten minutes.
EPOCHS = 1950
SETTINGS = ("--family", "resnet", "--crop", "64", "--split", "0.6,0.2,0.2", "--batch-size", "32")
TARGET_PSNR_DB, TARGET_SECONDS = 26.0, 600
KEEP = ("test", "validation", "training", "model", "likelihood", "dataset", "config")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="a new folder for the run, to keep it")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the report and the picture")
    arguments = parser.parse_args()
    load = round(os.getloadavg()[0], 1)
    with tempfile.TemporaryDirectory() as temporary:
        photographs = write_photographs(Path(temporary) / "photographs")
        output = arguments.output or Path(temporary) / "run"
        result = subprocess.run(
            [*command(str(photographs), str(output), arguments), "--json"], stdout=subprocess.PIPE, check=True
        )
        shutil.copyfile(output / "reconstructions.png", arguments.results / "photographs.png")
    metrics = json.loads(result.stdout)
    metrics["training"].pop("history")
    metrics["config"]["data"] = "photographs"
    report = {
        "machine": machine(arguments.threads),
        "command": " ".join(command("photographs", "photographs-run", arguments)),
        "load_before": load,
        **{key: metrics[key] for key in KEEP},
    }
    write_report(arguments.results / "photographs", report, markdown(report))
    print(markdown(report))


def command(data: str, output: str, arguments: argparse.Namespace) -> list[str]:
    run = ("--epochs", str(arguments.epochs), "--threads", str(arguments.threads))
    return ["vae-train", "--data", data, *SETTINGS, *run, "--output", output]


def write_photographs(folder: Path) -> Path:
    """china.png and flower.png, as they are decoded."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    folder.mkdir()
    samples = load_sample_images()
    for name, image in zip(samples.filenames, samples.images, strict=True):
        Image.fromarray(image).save(folder / f"{Path(name).stem}.png")
    return folder


def markdown(report: dict[str, Any]) -> str:
    facts, model, data, test = (report[key] for key in ("machine", "model", "dataset", "test"))
    channels, factor = model["latent_dim"], 2 ** len(model["widths"])
    lines = [
        "# What a model with spatial latents reaches on photographs",
        "",
        f"On {facts['cpu']} ({', '.join(facts['instructions'])}), {facts['cores']} cores, {facts['threads']} threads,",
        f"Python {facts['python']}, torch {facts['torch']}, accelerate {facts['accelerate']}; load average before "
        f"{report['load_before']}.",
        "scikit-learn's two sample photographs, 427×640 each; each is cut into strips, the last of which, a fifth, was "
        "neither trained nor tuned on.",
        f"Trained on random crops of {data['crop'][0]}×{data['crop'][1]}; the figures are those of the {data['test']} "
        "test crops, which lie side by side.",
        f"Latents have {channels} channels at 1/{factor} of the height and width: {channels} numbers for "
        f"{3 * factor**2}.",
        "PSNR is that of reconstructing from the posterior's mean; -ELBO has the KL's weight 1, though the model was "
        f"trained with {report['config']['beta']:g}.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows(report)),
        "",
        f"{test['examples']} test crops, each above its reconstruction:",
        "",
        "![Test crops, each above its reconstruction](photographs.png)",
        "",
        "```sh",
        report["command"],
        "```",
    ]
    return "\n".join(lines) + "\n"


def rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    model, test, training, likelihood = (report[key] for key in ("model", "test", "training", "likelihood"))
    macs = model["macs"]
    return [
        ("parameters", f"{model['parameters']:,}"),
        ("MACs of one 64×64 crop, encoder + decoder", f"{macs['encode'] / 1e6:.1f} + {macs['decode'] / 1e6:.1f} M"),
        ("test PSNR", f"{test['psnr_db']:.2f} dB, the mean over crops (target ≥ {TARGET_PSNR_DB:g} dB)"),
        ("test PSNR of all pixels together", f"{-10 * math.log10(test['mse']):.2f} dB"),
        ("validation PSNR", f"{report['validation']['psnr_db']:.2f} dB"),
        ("test mean squared error", f"{test['mse']:.5f}"),
        (
            "test -ELBO per crop",
            f"{test['negative_elbo_nats']:.0f} ± {test['negative_elbo_standard_error_nats']:.0f} nats = "
            f"{test['reconstruction_nats']:.0f} reconstruction + {test['kl_nats']:.0f} KL",
        ),
        ("likelihood", f"{likelihood['type']}, learned scale {likelihood['scale']:.4f}"),
        ("active latent channels", f"{test['active_units']} of {model['latent_dim']}"),
        ("steps", f"{training['steps']:,} in {training['epochs']} epochs, the best after {training['best_epoch']}"),
        ("seconds of training", f"{training['seconds']:.0f} (target ≤ {TARGET_SECONDS})"),
    ]


if __name__ == "__main__":
    main()
