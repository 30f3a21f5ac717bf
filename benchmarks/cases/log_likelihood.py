"""Time and memory of `VAE.log_likelihood` with 5,000 draws for 100 images of MNIST's size, on random weights.

    python benchmarks/cases/log_likelihood.py [--output benchmarks/results/log_likelihood]

Each row is a fresh process on so many engine threads; its peak memory is the kernel's, of the whole process with the
interpreter, numpy and onnxruntime in it. Linux only. Needs torch.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from score_cost import MODELS, write_bundle

from vae_benchmarks.machine import MachineFacts

IMAGES, DRAWS = 100, 5000
CHILD = """
import json, sys, time
import numpy as np
from vae_runtime import VAE
path, threads, images, draws = sys.argv[1], *map(int, sys.argv[2:])
x = np.random.default_rng(0).random((images, 1, 28, 28), dtype=np.float32)
with VAE.load(path, threads=threads) as vae:
    vae.log_likelihood(x[:1], 10, seed=0)
    start = time.perf_counter()
    found = vae.log_likelihood(x, draws, seed=0)
    spent = time.perf_counter() - start
peak = int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024  # the kernel says kB and means KiB
print(json.dumps({"seconds": spent, "peak_rss_bytes": peak, "mean_nats": float(found.mean())}))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="engine threads, a row each")
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate(name for name in MODELS if name.startswith("mlp")):
            bundle = Path(folder) / f"{number}.vae"
            write_bundle(bundle, *MODELS[name])
            rows += [{"model": name, "threads": threads, **measure(bundle, threads)} for threads in arguments.threads]
    text = table(rows)
    print(text)
    if arguments.output:
        facts = dataclasses.asdict(MachineFacts.read())
        versions = {"onnxruntime": onnxruntime.__version__, "numpy": np.__version__}
        document = {"machine": facts, **versions, "images": IMAGES, "draws": DRAWS, "rows": rows}
        arguments.output.with_suffix(".json").write_text(json.dumps(document, indent=2) + "\n")
        machine = f"{facts['cpu']}, {facts['cores_usable']} cores, load average {facts['load_average_1min']} at the end"
        arguments.output.with_suffix(".md").write_text(
            f"# What log p(x) costs\n\n`VAE.log_likelihood` of {IMAGES} images with {DRAWS:,} draws each.\n{machine};"
            f" onnxruntime {onnxruntime.__version__}, numpy {np.__version__}.\nMade by"
            f" `benchmarks/cases/log_likelihood.py`.\n\n{text}\n"
        )
    return 0


def measure(bundle: Path, threads: int) -> dict[str, Any]:
    command = [sys.executable, "-c", CHILD, str(bundle), *map(str, (threads, IMAGES, DRAWS))]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(json.loads(result.stdout))


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| model | engine threads | time | peak memory of the process |", "|---|---|---|---|"]
    for row in rows:
        memory = f"{row['peak_rss_bytes'] / 2**20:.0f} MiB"
        lines.append(f"| {row['model']} | {row['threads']} | {row['seconds']:.1f} s | {memory} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
