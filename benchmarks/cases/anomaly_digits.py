"""Leave one digit out of training and find it again: how well each anomaly score tells it from the other nine.

    python benchmarks/cases/anomaly_digits.py

scikit-learn's 1,797 digits of 8×8. For each digit and seed a model is trained on the other nine with `vae-train`'s own
settings, exported, and run by `vae_runtime`: `VAE.score` of the test part (the other nine, never trained or tuned on)
against all examples of the digit. The report goes to benchmarks/results/anomalies.json and anomalies.md.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from reporting import RESULTS, machine, write_report
from sklearn.metrics import average_precision_score, roc_auc_score

from vae_export.export import export_checkpoint
from vae_runtime import VAE
from vae_training.checkpoint import load_checkpoint
from vae_training.config import TrainConfig
from vae_training.loop import train
from vae_training.source import open_source

DIGITS = range(10)
LATENT = 10  # as many as there are digits; `--latent` tries others
VARIANTS: dict[str, dict[str, Any]] = {
    "VAE, Gaussian": {"likelihood": "gaussian"},
    "VAE, Laplace": {"likelihood": "laplace"},
    "VAE, Bernoulli, grey": {"likelihood": "bernoulli"},
    "VAE, Bernoulli, binary": {"likelihood": "bernoulli", "binarize": "threshold"},
    "autoencoder": {"kind": "autoencoder", "likelihood": "gaussian"},
}
METHODS = {"vae": ("elbo", "log_likelihood", "reconstruction"), "autoencoder": ("reconstruction",)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="runs per digit")
    parser.add_argument("--latent", type=int, default=LATENT)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS / "anomalies", help="without a suffix")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    begun, runs = time.perf_counter(), []
    for name, settings in VARIANTS.items():
        for seed in range(arguments.seeds):
            for digit in DIGITS:
                runs.append({"model": name, "digit": digit, "seed": seed, **run(settings, digit, seed, arguments)})
        print(f"{name}: {time.perf_counter() - begun:.0f} s", file=sys.stderr)
    report = {"machine": machine(arguments.threads), "latent": arguments.latent, "seeds": arguments.seeds, "runs": runs}
    write_report(arguments.output, report, markdown(report))
    print(markdown(report))


def run(settings: dict[str, Any], digit: int, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """One model that has never seen `digit`: AUROC and average precision by method."""
    config = TrainConfig(
        data="digits",
        family="mlp",
        latent=arguments.latent,
        exclude_label=(digit,),
        seed=seed,
        nll_samples=0,
        **settings,
    )
    with tempfile.TemporaryDirectory() as folder:
        metrics = train(config, f"{folder}/run", device="cpu")
        export_checkpoint(load_checkpoint(f"{folder}/run/model.pt"), f"{folder}/model.vae", name="digits")
        source = open_source(config)
        assert source.data.labels is not None
        odd = np.flatnonzero(source.data.labels == digit)
        images = source.data.examples[np.concatenate([source.parts.test, odd])]
        labels = np.repeat([0, 1], [len(source.parts.test), len(odd)])
        with VAE.load(f"{folder}/model.vae", threads=arguments.threads) as vae:
            scores = {method: vae.score(images, method) for method in METHODS[config.kind]}
    return {
        "normal": len(source.parts.test),
        "anomalous": len(odd),
        "active_units": metrics["test"].get("active_units"),
        "auroc": {method: float(roc_auc_score(labels, score)) for method, score in scores.items()},
        "average_precision": {
            method: float(average_precision_score(labels, score)) for method, score in scores.items()
        },
    }


def markdown(report: dict[str, Any]) -> str:
    facts, runs = report["machine"], report["runs"]
    lines = [
        "# One digit left out of training, found as an anomaly",
        "",
        f"scikit-learn's 1,797 digits of 8×8; {report['latent']} latent dimensions, family `mlp`, `vae-train`'s other",
        "settings as they are; each digit left out in turn (`--exclude-label`), with",
        f"{report['seeds']} seeds each: {len(DIGITS) * report['seeds']} models per row.",
        f"About {runs[0]['normal']} normal test images, which were neither trained nor tuned on, against the",
        f"about {runs[0]['anomalous']} of the digit. Scores by `VAE.score` on the bundle, `log_likelihood` with",
        "its default 100 samples. Mean over the models ± standard error over the seeds, each of which counts as the",
        f"mean of its ten digits. {facts['cpu']}, torch {facts['torch']}.",
        "",
        "| model | score | AUROC | lowest of the ten digits | average precision |",
        "|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(run["model"] for run in runs):
        own = [run for run in runs if run["model"] == name]
        for method in own[0]["auroc"]:
            by_digit = {d: np.mean([r["auroc"][method] for r in own if r["digit"] == d]) for d in DIGITS}
            worst = min(by_digit, key=lambda digit: by_digit[digit])
            lines.append(
                f"| {name} | `{method}` | {spread(own, 'auroc', method)} | {by_digit[worst]:.3f} ({worst}) |"
                f" {spread(own, 'average_precision', method)} |"
            )
    return "\n".join(lines) + "\n"


def spread(runs: list[dict[str, Any]], figure: str, method: str) -> str:
    seeds = sorted({run["seed"] for run in runs})
    means = np.array([np.mean([run[figure][method] for run in runs if run["seed"] == seed]) for seed in seeds])
    error = f" ± {means.std(ddof=1) / len(means) ** 0.5:.4f}" if len(means) > 1 else ""
    return f"{means.mean():.4f}{error}"


if __name__ == "__main__":
    main()
