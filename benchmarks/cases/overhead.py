"""What `vae_runtime` costs on top of onnxruntime: calls, import, load with the first result, memory; as ratios.

    python benchmarks/cases/overhead.py BUNDLE... --output benchmarks/results/overhead

The calls of both sides alternate in one process in short blocks, with one engine thread each, so that the machine's
drift meets both alike; a ratio is the median over the blocks' ratios, its interval the 95% one of that median.
Start-up and memory are those of fresh processes, alternating, which find the bytecode of every module on disk, as pip
puts it there for what it installs. Linux only. Needs numpy and onnxruntime.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from reporting import write_report

from vae_benchmarks.intervals import paired_ratio
from vae_benchmarks.latency import alternate
from vae_benchmarks.machine import MachineFacts
from vae_runtime import VAE
from vae_runtime.manifest import HALF_NAMES

ROUNDS = 25
BARE = """
import onnxruntime, numpy
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = options.inter_op_num_threads = 1
session = onnxruntime.InferenceSession(BUNDLE + "/encoder.onnx", options, providers=["CPUExecutionProvider"])
decoder = onnxruntime.InferenceSession(BUNDLE + "/decoder.onnx", options, providers=["CPUExecutionProvider"])
mean = session.run(["mean"], {"x": numpy.zeros(SHAPE, numpy.float32)})[0]
decoder.run(None, {"z": mean})
"""
OURS = """
import numpy
from vae_runtime import VAE
vae = VAE.load(BUNDLE, threads=1)
vae.decode(vae.encode(numpy.zeros(SHAPE, numpy.float32)).mean)
"""
PROGRAMS = {
    "import": ("import onnxruntime", "import vae_runtime"),
    "load and first result": (BARE, OURS),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", type=Path, help="bundles")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32], help="batch sizes")
    parser.add_argument("--blocks", type=int, default=200, help="pairs of blocks per row")
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for bundle in arguments.bundles:
        rows += calls(bundle, arguments.batch, arguments.blocks)
        rows += start_up(bundle)
    print(table(rows))
    if arguments.output:
        facts = dataclasses.asdict(MachineFacts.read())
        document = {"machine": facts, "onnxruntime": onnxruntime.__version__, "rows": rows}
        write_report(arguments.output, document, markdown(document))
    return 0


def calls(bundle: Path, batches: list[int], blocks: int) -> list[dict[str, Any]]:
    """`VAE.encode` and `VAE.decode` against `InferenceSession.run` of the same graph."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    bare = {
        half: onnxruntime.InferenceSession(bundle / f"{half}.onnx", options, providers=["CPUExecutionProvider"])
        for half in HALF_NAMES
    }
    rng = np.random.default_rng(0)
    rows = []
    with VAE.load(bundle, threads=1) as vae:
        outputs = ["mean", "logvar"] if vae.manifest.kind == "vae" else ["mean"]
        shape = vae.manifest.input.example_shape
        for batch in batches:
            x = rng.random((batch, *shape), dtype=np.float32)
            z = rng.standard_normal((batch, *vae.manifest.latent_shape(shape)), dtype=np.float32)
            encode = partial(bare["encoder"].run, outputs, {"x": x}), partial(vae.encode, x)
            decode = partial(bare["decoder"].run, ["reconstruction"], {"z": z}), partial(vae.decode, z)
            rows.append(row(bundle, f"encode, batch {batch}", *alternate(*encode, blocks)))
            rows.append(row(bundle, f"decode, batch {batch}", *alternate(*decode, blocks)))
    return rows


def start_up(bundle: Path) -> list[dict[str, Any]]:
    """Wall time and peak memory of fresh processes."""
    with VAE.load(bundle) as vae:
        shape = (1, *vae.manifest.input.example_shape)
    rows = []
    for name, (theirs, ours) in PROGRAMS.items():
        seconds: tuple[list[float], list[float]] = ([], [])
        memory: tuple[list[float], list[float]] = ([], [])
        for index in range(-1, ROUNDS):  # the first is not counted: it may write bytecode, and fills the file cache
            for which in (0, 1) if index % 2 else (1, 0):
                spent, peak = process((theirs, ours)[which], bundle, shape)
                if index >= 0:
                    seconds[which].append(spent)
                    memory[which].append(peak)
        rows.append(row(bundle, name, *seconds))
        if name != "import":
            rows.append(row(bundle, f"peak memory of {name}", *memory, unit="bytes"))
    return rows


def process(program: str, bundle: Path, shape: tuple[int, ...]) -> tuple[float, float]:
    """Seconds inside the program, the interpreter's own start not counted, and the process's peak memory in bytes."""
    code = (
        f"import time, os; os.environ['ORT_DISABLE_TELEMETRY'] = '1'\n"
        f"BUNDLE, SHAPE = {str(bundle)!r}, {shape!r}\nstart = time.perf_counter()\n{program}\n"
        "print(time.perf_counter() - start, open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    spent, peak = result.stdout.split()
    return float(spent), float(peak) * 1024  # the kernel says kB and means KiB


def row(bundle: Path, name: str, bare: list[float], ours: list[float], unit: str = "seconds") -> dict[str, Any]:
    ratio, low, high, _ = paired_ratio(bare, ours)
    return {
        "bundle": bundle.parent.name if bundle.name == "bundle.vae" else bundle.stem,  # a case, or a bundle
        "what": name,
        "unit": unit,
        "bare": statistics.median(bare),
        "ours": statistics.median(ours),
        "ratio": ratio,
        "interval": [low, high],
    }


def markdown(document: dict[str, Any]) -> str:
    return (
        f"# The runtime's own cost\n\n{document['machine']['cpu']},"
        f" onnxruntime {document['onnxruntime']}, one thread.\n"
        f"Made by `benchmarks/cases/overhead.py`. The ratio is the median of those of alternating runs, and not the"
        f" quotient of the two columns before it, the medians of each side.\n\n{table(document['rows'])}\n"
    )


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| bundle | what | onnxruntime | vae_runtime | ratio | 95% interval |", "|---|---|---|---|---|---|"]
    for entry in rows:
        show = bytes_text if entry["unit"] == "bytes" else seconds_text
        low, high = entry["interval"]
        interval = "–" if low is None else f"{low:.3f} to {high:.3f}"  # too few blocks for one
        lines.append(
            f"| {entry['bundle']} | {entry['what']} | {show(entry['bare'])} | {show(entry['ours'])} "
            f"| {entry['ratio']:.3f} | {interval} |"
        )
    return "\n".join(lines)


def seconds_text(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def bytes_text(count: float) -> str:
    return f"{count / 2**20:.1f} MiB"


if __name__ == "__main__":
    sys.exit(main())
