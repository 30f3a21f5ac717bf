"""How probable test images of MNIST are under models trained here, by importance sampling through the exported bundle.

    python benchmarks/cases/mnist_likelihood.py --mnist FOLDER

FOLDER holds MNIST's test images as IDX (`t10k-images-idx3-ubyte.gz`): 8,000 of them train, 1,000 validate and 1,000
test, in file order, with dynamic binarisation. `vae-train` and `vae-export` make the bundle; each test image is drawn
once with a fixed seed, pixel by pixel (Salakhutdinov and Murray, 2008), and `VAE.log_likelihood` takes 5,000 samples.
The report goes to benchmarks/results/likelihood.json and likelihood.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import textwrap
from typing import Any

import numpy as np
from reporting import RESULTS, machine, table_row, write_report

from vae_runtime import VAE
from vae_runtime.preprocess import Float32, binarize, to_model_input
from vae_training.config import TrainConfig
from vae_training.evaluate import standard_error
from vae_training.source import open_source

SAMPLES = 5000
SEED = 0  # of the binary test images, and of the importance samples
TIMED_IMAGES = 100  # for the cost of one call, in a process that never imports torch
TIMED_CALL = """
import json, sys, time
import numpy as np
from vae_runtime import VAE
from vae_benchmarks.worker import resident_bytes
bundle, images, samples, threads = sys.argv[1], np.load(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
with VAE.load(bundle, threads=threads) as vae:
    begun = time.perf_counter()
    vae.log_likelihood(images, samples, seed=0)
    print(json.dumps({"seconds": time.perf_counter() - begun, "peak_resident_bytes": resident_bytes()[1]}))
"""
MNIST = ("--data", "{mnist}", "--split", "8000,1000,1000", "--order", "file", "--binarize", "dynamic", "--shift", "1")
LONG = ("--epochs", "150", "--learning-rate", "0.002")
MODELS = {
    # Two layers of 200 and 50 latents, as the one-layer VAE of Burda et al., 2016.
    "mlp 200-200, 50 latents": ("--family", "mlp", "--widths", "200,200", "--latent", "50", *LONG),
    "mlp 400, 20 latents": ("--family", "mlp", *LONG),
    "conv, 20 latents": ("--epochs", "40", "--learning-rate", "0.008", "--weight-decay", "0.05"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", required=True, help="folder with MNIST's test images as IDX")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument(
        "--only", choices=MODELS, action="append", help="leave the other models as the last report has them"
    )
    arguments = parser.parse_args()
    report_file = RESULTS / "likelihood.json"
    report = json.loads(report_file.read_text("utf-8")) if arguments.only and report_file.exists() else {"models": {}}
    report["machine"] = machine(arguments.threads)
    for name in arguments.only or MODELS:
        print(f"{name} ...", file=sys.stderr)
        report["models"][name] = measure(name, arguments.mnist, arguments.samples, arguments.threads)
        report["models"] = {name: report["models"][name] for name in MODELS if name in report["models"]}
        write_report(report_file, report, markdown(report))
    print(markdown(report))


def measure(name: str, mnist: str, samples: int, threads: int) -> dict[str, Any]:
    """Train, export, and estimate in this process."""
    load = round(os.getloadavg()[0], 1)
    with tempfile.TemporaryDirectory() as folder:
        command = [*MNIST, *MODELS[name], "--output", f"{folder}/run", "--threads", str(threads), "--nll-samples", "0"]
        filled = [part.format(mnist=mnist) for part in command]
        trained = subprocess.run(["vae-train", *filled, "--json"], stdout=subprocess.PIPE, check=True)
        subprocess.run(["vae-export", f"{folder}/run/model.pt", "--output", f"{folder}/model.vae"], check=True)
        x = binary_test_images(mnist)
        with VAE.load(f"{folder}/model.vae", threads=threads) as vae:
            elbo = vae.elbo(x, 100, seed=SEED)
            found = vae.log_likelihood(x, samples, seed=SEED, progress=progress)
        np.save(f"{folder}/x.npy", x[:TIMED_IMAGES])
        call = [sys.executable, "-c", TIMED_CALL, f"{folder}/model.vae", f"{folder}/x.npy", str(samples), str(threads)]
        timed = json.loads(subprocess.run(call, stdout=subprocess.PIPE, check=True).stdout)
    metrics = json.loads(trained.stdout)
    return {
        "command": " ".join(("vae-train", *MNIST, *MODELS[name])).format(mnist="FOLDER"),
        "load_before": load,
        "examples": len(x),
        "samples": samples,
        "nll_nats": float(-found.mean()),
        "nll_standard_error_nats": standard_error(found),
        "negative_elbo_nats": float(-elbo.mean()),
        "negative_elbo_standard_error_nats": standard_error(elbo),
        "active_units": metrics["test"]["active_units"],
        "parameters": metrics["model"]["parameters"],
        "training_seconds": metrics["training"]["seconds"],
        "timed": {"images": TIMED_IMAGES, **timed},
    }


def binary_test_images(mnist: str) -> Float32:
    """The test part as the model sees it, float32 (1000, 1, 28, 28) of zeros and ones."""
    source = open_source(TrainConfig(data=mnist, split="8000,1000,1000", order="file"))
    grey = to_model_input(source.data.examples[source.parts.test], source.data.spec)
    return binarize(grey, "dynamic", np.random.default_rng(SEED))


def progress(done: int, total: int) -> None:
    print(f"\r{done / total:4.0%}", end="" if done < total else "\n", file=sys.stderr)


def markdown(report: dict[str, Any]) -> str:
    facts, models = report["machine"], report["models"]
    first = next(iter(models.values()))
    lines = [
        "# How probable MNIST's digits are under these models",
        "",
        *wrapped(
            f"-log p(x) in nats per image, estimated with {first['samples']:,} importance samples (Burda et al., 2016),"
            f" and -ELBO with 100 draws, on {first['examples']:,} test images, each made binary once by a seeded draw;"
            " mean ± standard error over the images. MNIST here is its 10,000 test images, divided 8,000/1,000/1,000 in"
            " file order, with dynamic binarisation: the models saw less than a seventh of the usual training set."
            " Computed by `VAE.log_likelihood` on the exported bundle."
        ),
        "",
        *wrapped(
            f"{facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads, torch {facts['torch']}. The load is"
            " the machine's load average when the run began: above 0, others used its cores. Seconds and peak memory"
            f" of one call with {TIMED_IMAGES} images and all samples are those of a process without PyTorch."
        ),
        "",
        "| model | NLL | -ELBO | active | parameters | training, s | one call, s | its peak, MiB | load |",
        "|---|---|---|---|---|---|---|---|---|",
        *(row(name, result) for name, result in models.items()),
        "",
        *wrapped(
            "Published, for comparison, after training on the 60,000 training images, with 5,000 samples: 86.76 nats"
            " for a VAE with one stochastic layer of 50 latents and two deterministic ones of 200 units (Burda, Grosse"
            " and Salakhutdinov, 2016, arXiv:1509.00519, table 1)."
        ),
        "",
        "The commands (`FOLDER` holds MNIST's 10,000 test images):",
        "",
        "```sh",
        *(result["command"] for result in models.values()),
        "```",
    ]
    return "\n".join(lines) + "\n"


def wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 118, break_on_hyphens=False)


def row(name: str, result: dict[str, Any]) -> str:
    cells = (
        name,
        f"{result['nll_nats']:.2f} ± {result['nll_standard_error_nats']:.2f}",
        f"{result['negative_elbo_nats']:.2f} ± {result['negative_elbo_standard_error_nats']:.2f}",
        str(result["active_units"]),
        f"{result['parameters']:,}",
        f"{result['training_seconds']:.0f}",
        f"{result['timed']['seconds']:.1f}",
        f"{result['timed']['peak_resident_bytes'] / 2**20:.0f}",
        f"{result['load_before']:.1f}",
    )
    return table_row(cells)


if __name__ == "__main__":
    main()
