"""Train the reference models with `vae-train`'s own settings and write what they reach.

    python benchmarks/cases/train_quality.py --mnist FOLDER

FOLDER holds MNIST's test images as IDX (`t10k-images-idx3-ubyte.gz`): 8,000 of them train, 1,000 validate and 1,000
test, in file order. The report goes to benchmarks/results/training.json and training.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from typing import Any

from reporting import RESULTS, machine, table_row, write_report

DIGITS = ("--data", "digits")
MNIST = ("--data", "{mnist}", "--split", "8000,1000,1000", "--order", "file")
MLP, AUTOENCODER = ("--family", "mlp"), ("--kind", "autoencoder", "--likelihood", "gaussian")
RUNS = {
    "digits-conv": DIGITS,
    "digits-mlp": (*DIGITS, *MLP),
    "digits-mlp-autoencoder": (*DIGITS, *MLP, *AUTOENCODER),
    "mnist-mlp": (*MNIST, *MLP, "--epochs", "40"),
    "mnist-conv": (*MNIST, "--epochs", "40", "--learning-rate", "0.008", "--weight-decay", "0.05"),
    "mnist-conv-autoencoder": (*MNIST, *AUTOENCODER),
}
# -ELBO in nats and seconds of training on two CPU cores.
TARGETS = {"digits-conv": (24.0, 60), "mnist-mlp": (112.0, 60), "mnist-conv": (102.5, 240)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", required=True, help="folder with MNIST's test images as IDX")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--only", choices=RUNS, action="append", help="leave the other runs as the last report has them"
    )
    arguments = parser.parse_args()
    report_file = RESULTS / "training.json"
    report = json.loads(report_file.read_text("utf-8")) if arguments.only and report_file.exists() else {"runs": {}}
    report["machine"] = machine(arguments.threads)
    for name in arguments.only or RUNS:
        print(f"{name} ...", file=sys.stderr)
        report["runs"][name] = run(name, arguments.mnist, arguments.threads)
    report["runs"] = {name: report["runs"][name] for name in RUNS if name in report["runs"]}
    write_report(report_file, report, markdown(report))
    print(markdown(report))


def run(name: str, mnist: str, threads: int) -> dict[str, Any]:
    """One run of the command, in a process of its own."""
    load = round(os.getloadavg()[0], 1)
    with tempfile.TemporaryDirectory() as folder:
        shown = command(name, threads)
        filled = [part.format(mnist=mnist, output=f"{folder}/run") for part in shown]
        result = subprocess.run([*filled, "--json"], stdout=subprocess.PIPE, check=True)
    metrics = json.loads(result.stdout)
    metrics["training"].pop("history")
    metrics["config"]["data"] = "digits" if name.startswith("digits") else "MNIST"
    metrics["dataset"]["dataset"] = metrics["config"]["data"]
    keep = ("test", "validation", "training", "model", "likelihood", "dataset", "config")
    shown_command = " ".join(shown).format(mnist="FOLDER", output=name)
    return {"command": shown_command, "load_before": load, **{key: metrics[key] for key in keep}}


def command(name: str, threads: int) -> list[str]:
    return ["vae-train", *RUNS[name], "--output", "{output}", "--threads", str(threads)]


def markdown(report: dict[str, Any]) -> str:
    facts = report["machine"]
    lines = [
        "# What the reference models reach",
        "",
        f"On {facts['cpu']} ({', '.join(facts['instructions'])}), {facts['cores']} cores, {facts['threads']} threads,",
        f"Python {facts['python']}, torch {facts['torch']}, accelerate {facts['accelerate']}.",
        "Seconds are those of the training alone, without reading the data and without the last figures.",
        "All figures were measured on the test part, which was neither trained nor tuned on;",
        "-ELBO is in nats per image with grey Bernoulli likelihood, the mean of 5 posterior draws,",
        "± the standard error over the images. PSNR is that of reconstructing from the posterior's mean or the code.",
        "MACs are those of one image, encoder + decoder. The load is the machine's load average when the run began:",
        "above 0, others were using its cores.",
        "",
        "| data | family | kind | parameters | MACs | test -ELBO | active | test PSNR | seconds | load | target |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
        *(row(name, result) for name, result in report["runs"].items()),
        "",
        "The commands (`FOLDER` holds MNIST's 10,000 test images, split 8,000/1,000/1,000 in file order):",
        "",
        "```sh",
        *(result["command"] for result in report["runs"].values()),
        "```",
    ]
    return "\n".join(lines) + "\n"


def row(name: str, result: dict[str, Any]) -> str:
    test, model, seconds = result["test"], result["model"], result["training"]["seconds"]
    elbo = active = "-"
    if "negative_elbo_nats" in test:
        elbo = f"{test['negative_elbo_nats']:.2f} ± {test['negative_elbo_standard_error_nats']:.2f}"
        active = f"{test['active_units']} of {model['latent_dim']}"
    target = "≤ {:g} in under {} s".format(*TARGETS[name]) if name in TARGETS else "-"
    macs = f"{model['macs']['encode'] / 1e6:.2f} + {model['macs']['decode'] / 1e6:.2f} M"
    cells = (
        result["dataset"]["dataset"], model["family"], model["kind"], f"{model['parameters']:,}", macs, elbo, active,
        f"{test['psnr_db']:.2f} dB", f"{seconds:.0f}",
        f"{result['load_before']:.1f}", target,
    )  # fmt: skip
    return table_row(cells)


if __name__ == "__main__":
    main()
