"""Where the time of a bundle's graphs goes, operator by operator, in the graph as onnxruntime optimises it.

    python benchmarks/cases/profile_operators.py BUNDLE... --output FOLDER/NAME

Each half is profiled at batch 1 on one thread, the edge's case, and at batch 32 on two threads. The report goes to
FOLDER/NAME.md and FOLDER/NAME.json. Profiling costs some microseconds per operator, so the shares are those of the
profiled run; the time of a whole run is measured without it. Threads do not spin while they wait.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from reporting import write_report

from vae_runtime.bundle import Bundle
from vae_runtime.manifest import HALF_NAMES

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # before the import, as vae_runtime does

import onnxruntime

CASES = ((1, 1), (32, 2))  # batch, threads
SECONDS = 0.4  # per measurement
MIN_RUNS = 10
MATRIX = ("Gemm", "FusedGemm", "MatMul", "FusedMatMul", "QGemm", "QLinearMatMul", "MatMulInteger")


@dataclass(frozen=True)
class Node:
    """One operator of the optimised graph.

    shape: of its first output; "blocked" layouts show as NCHW, int8 convolutions as NHWC. macs: multiply-accumulates
        that it executes, padded channels included; None where it has none. median_us: of its kernel.
    """

    operator: str
    name: str
    shape: tuple[int, ...]
    macs: int | None
    median_us: float


@dataclass(frozen=True)
class Profile:
    """One half at one batch size. run_us: median of a whole run without profiling. load_ms: of making
    the session, the least."""

    bundle: str
    precision: str
    half: str
    batch: int
    threads: int
    run_us: float
    load_ms: float
    nodes: tuple[Node, ...]

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> Profile:
        """What `asdict` made of one."""
        return cls(**{**found, "nodes": tuple(Node(**node) for node in found["nodes"])})

    @property
    def total_us(self) -> float:
        return sum(node.median_us for node in self.nodes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", metavar="BUNDLE")
    parser.add_argument("--precision", default="fp32", help="of the files that the bundle has")
    parser.add_argument("--output", type=Path, help="write FOLDER/NAME.md and .json, not only print")
    arguments = parser.parse_args()
    profiles = []
    for path in arguments.bundles:
        print(f"{path} ...", file=sys.stderr)
        profiles += profile_bundle(path, arguments.precision)
    print(markdown(profiles))
    if arguments.output:
        found = [asdict(profile) for profile in profiles]
        write_report(arguments.output, found, "# Operators\n\n" + markdown(profiles))


def profile_bundle(path: str | Path, precision: str = "fp32") -> list[Profile]:
    bundle = Bundle.open(path)
    files = bundle.manifest.precisions[precision]
    golden = bundle.golden()
    halves = {"encoder": (files.encoder, golden["x"]), "decoder": (files.decoder, golden["mean"])}
    return [
        profile_graph(bundle.read(halves[half][0]), halves[half][1], bundle.path.name, precision, half, batch, threads)
        for half in HALF_NAMES
        for batch, threads in CASES
    ]


def profile_graph(
    model: bytes, examples: np.ndarray, bundle: str, precision: str, half: str, batch: int, threads: int
) -> Profile:
    """examples: inputs (N, ...), repeated or cut to the batch."""
    x = np.ascontiguousarray(np.resize(examples, (batch, *examples.shape[1:])))
    with tempfile.TemporaryDirectory() as folder:
        session = open_session(model, threads, profile=f"{folder}/profile")
        feed = {session.get_inputs()[0].name: x}
        repeat(lambda: session.run(None, feed))
        events = json.loads(Path(session.end_profiling()).read_text("utf-8"))
        plain = open_session(model, threads)
        run_us = statistics.median(repeat(lambda: plain.run(None, feed)))
        load_ms = min(repeat(lambda: open_session(model, threads))) / 1e3
    return Profile(bundle, precision, half, batch, threads, run_us, load_ms, nodes_of(events))


def open_session(model: bytes, threads: int, profile: str | None = None) -> Any:
    """Its threads do not spin while they wait: on a shared machine, runs would take many times as long by chance."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, profile
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def repeat(call: Callable[[], Any]) -> list[float]:
    """Microseconds of every call over about `SECONDS`, the first few left out."""
    for _ in range(3):
        call()
    times: list[float] = []
    end = time.perf_counter() + SECONDS
    while len(times) < MIN_RUNS or time.perf_counter() < end:
        begun = time.perf_counter()
        call()
        times.append((time.perf_counter() - begun) * 1e6)
    return times


def nodes_of(events: list[dict[str, Any]]) -> tuple[Node, ...]:
    """onnxruntime's trace -> its operators in the order in which they run."""
    kernels: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            key = int(event["args"]["node_index"]), event["name"].removesuffix("_kernel_time")
            kernels.setdefault(key, []).append(event)
    nodes = []
    for (_, name), found in kernels.items():
        details = found[0]["args"]
        shapes = [[tuple(shape) for entry in details[side] for shape in entry.values()] for side in SIDES]
        shape = shapes[1][0] if shapes[1] else ()
        operator = details["op_name"]
        median = statistics.median(event["dur"] for event in found)
        nodes.append(Node(operator, name, shape, count_macs(operator, *shapes), median))
    return tuple(nodes)


SIDES = ("input_type_shape", "output_type_shape")


def count_macs(operator: str, inputs: list[tuple[int, ...]], outputs: list[tuple[int, ...]]) -> int | None:
    """Of one run of an operator; None where it is no convolution or matrix product, or its weights do not show."""
    if operator in MATRIX:
        return math.prod(outputs[0]) * inputs[0][-1]
    weights = [shape for shape in inputs[1:] if len(shape) == 4]
    if operator == "Conv" and weights:
        batch, _, height, width = outputs[0]
        return batch * height * width * math.prod(weights[0])
    return None


def markdown(profiles: list[Profile]) -> str:
    return "\n".join(line for profile in profiles for line in table(profile))


def table(profile: Profile) -> list[str]:
    threads = "1 thread" if profile.threads == 1 else f"{profile.threads} threads"
    return [
        f"### {profile.bundle}, {profile.half}, {profile.precision}, batch {profile.batch}, {threads}",
        "",
        f"{profile.run_us:.0f} µs a run without profiling; session made in {profile.load_ms:.1f} ms.",
        "",
        "| operator | output | µs | share | MACs | GMAC/s |",
        "|---|---|--:|--:|--:|--:|",
        *(row(node, profile.total_us) for node in profile.nodes),
        "",
    ]


def row(node: Node, total: float) -> str:
    macs = rate = ""
    if node.macs is not None:
        macs = f"{node.macs / 1e6:.2f} M"
        rate = f"{node.macs / node.median_us / 1e3:.1f}" if node.median_us else ""
    shape = "×".join(map(str, node.shape))
    return f"| {node.operator} | {shape} | {node.median_us:.0f} | {node.median_us / total:.0%} | {macs} | {rate} |"


if __name__ == "__main__":
    main()
