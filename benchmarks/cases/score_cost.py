"""What `VAE.score` costs beside `encode` followed by `decode`, on random weights: as ratios.

    python benchmarks/cases/score_cost.py [--output benchmarks/results/score_cost]

The methods that need no sampling run each half once, so that all else is the likelihood, the KL divergence, and what a
call in one piece saves. Both sides alternate in one process in short blocks, with one engine thread, so that the
machine's drift meets both alike; a ratio is the median over the blocks' ratios, its interval the 95% one of that
median. How fast a graph is does not depend on its weights. Needs torch.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from reporting import write_report

from vae_benchmarks.intervals import paired_ratio
from vae_benchmarks.latency import BLOCK_SECONDS, alternate
from vae_benchmarks.machine import MachineFacts
from vae_export import export_bundle
from vae_runtime import VAE
from vae_training.models import build_model, default_config

LATENT = 20
BERNOULLI, GAUSSIAN, LAPLACE = (
    {"type": "bernoulli"},
    {"type": "gaussian", "scale": 0.1},
    {"type": "laplace", "scale": 0.1},
)
MODELS: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "mlp 28×28, Bernoulli": ("mlp", (1, 28, 28), BERNOULLI),
    "mlp 28×28, Gaussian": ("mlp", (1, 28, 28), GAUSSIAN),
    "mlp 28×28, Laplace": ("mlp", (1, 28, 28), LAPLACE),
    "conv 8×8, Bernoulli": ("conv", (1, 8, 8), BERNOULLI),
    "conv 28×28, Bernoulli": ("conv", (1, 28, 28), BERNOULLI),
    "conv 28×28, Gaussian": ("conv", (1, 28, 28), GAUSSIAN),
}
METHODS = ("elbo", "reconstruction")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32], help="batch sizes")
    parser.add_argument("--blocks", type=int, default=200, help="pairs of blocks per row")
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate(MODELS):
            bundle = Path(folder) / f"{number}.vae"
            write_bundle(bundle, *MODELS[name])
            rows += measure(bundle, name, arguments.batch, arguments.blocks)
    print(table(rows))
    if arguments.output:
        facts = dataclasses.asdict(MachineFacts.read())
        versions = {"onnxruntime": onnxruntime.__version__, "numpy": np.__version__}
        document = {"machine": facts, **versions, "rows": rows}
        write_report(arguments.output, document, markdown(document))
    return 0


def write_bundle(path: Path, family: str, shape: tuple[int, ...], likelihood: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = build_model(default_config(family, "vae", shape, LATENT))
    examples = np.random.default_rng(0).random((8, *shape), dtype=np.float32)
    export_bundle(model.encode, model.decode, path, examples=examples, likelihood=likelihood)


def measure(bundle: Path, name: str, batches: list[int], blocks: int) -> list[dict[str, Any]]:
    rng, rows = np.random.default_rng(0), []
    with VAE.load(bundle, threads=1) as vae:
        for batch in batches:
            x = rng.random((batch, *vae.manifest.input.example_shape), dtype=np.float32)
            for method in METHODS:
                calls = partial(encode_and_decode, vae, x), partial(vae.score, x, method)
                rows.append(row(name, method, batch, *alternate(*calls, pairs(calls[0], blocks))))
    return rows


def encode_and_decode(vae: VAE, x: NDArray[np.float32]) -> NDArray[np.float32]:
    return vae.decode(vae.encode(x).mean)


def pairs(call: Callable[[], object], blocks: int) -> int:
    """`alternate` gives slow calls a tenth of the blocks, which on a busy machine says nothing."""
    call()
    start = time.perf_counter()
    call()
    return blocks if time.perf_counter() - start < BLOCK_SECONDS / 2 else 10 * blocks


def row(name: str, method: str, batch: int, both: list[float], score: list[float]) -> dict[str, Any]:
    ratio, low, high, _ = paired_ratio(both, score)
    return {
        "model": name,
        "method": method,
        "batch": batch,
        "encode_and_decode_s": statistics.median(both),
        "score_s": statistics.median(score),
        "ratio": ratio,
        "interval": [low, high],
    }


def markdown(document: dict[str, Any]) -> str:
    return (
        f"# What a score costs beside encode and decode\n\n{document['machine']['cpu']},"
        f" onnxruntime {document['onnxruntime']}, numpy {document['numpy']}, one thread.\n"
        f"Made by `benchmarks/cases/score_cost.py`.\n\n{table(document['rows'])}\n"
    )


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| model | method | batch | encode + decode | score | ratio | 95% interval |",
        "|---|---|---|---|---|---|---|",
    ]
    for entry in rows:
        low, high = entry["interval"]
        interval = "–" if low is None else f"{low:.3f} to {high:.3f}"  # too few blocks for one
        both, score = (f"{entry[key] * 1e6:,.1f} µs" for key in ("encode_and_decode_s", "score_s"))
        lines.append(
            f"| {entry['model']} | {entry['method']} | {entry['batch']} | {both} | {score} "
            f"| {entry['ratio']:.3f} | {interval} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
