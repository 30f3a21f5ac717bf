"""What the default families cost, and how fast their graphs are beside others, on random weights.

    python benchmarks/cases/graph_costs.py [--before FOLDER]

The speed of a graph does not depend on its weights. Three questions, answered in benchmarks/results/graphs.md:
what the halves cost (parameters, multiply-accumulates, bytes); how their latency relates to that of the usual VAE of
transposed convolutions at 32×32, exported by torch.onnx as it is; and where the time goes, operator by operator.
FOLDER holds bundles of the same names that an earlier revision wrote with --keep: they are raced too.
Every latency is one of a race: short runs in turn, in one process, so that what else the machine does hits all alike.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.calibrate import CalibrationDataReader
from onnxruntime.quantization.shape_inference import quant_pre_process
from profile_operators import CASES, HALVES, Profile, markdown, open_session, profile_graph
from torch import nn
from train_quality import machine

from vae_export import export_checkpoint
from vae_runtime.bundle import Bundle
from vae_runtime.manifest import InputSpec, Likelihood
from vae_training.checkpoint import Checkpoint
from vae_training.models import build_model, count_macs, count_parameters, default_config

RESULTS = Path(__file__).resolve().parent.parent / "results"
LATENT = 20
FAMILIES = {
    "conv-28x28": ("conv", (1, 28, 28)),
    "conv-32x32": ("conv", (1, 32, 32)),
    "conv-64x64x3": ("conv", (3, 64, 64)),
    "mlp-28x28": ("mlp", (1, 28, 28)),
}
PROFILED = ("conv-28x28", "conv-64x64x3")
REFERENCE = "ConvTranspose VAE, 32×32"
REFERENCE_LATENT, REFERENCE_WIDTHS = 128, (32, 64, 128, 256, 512)
ROUNDS, TURN_SECONDS, RACE_SECONDS, LOADS = 60, 0.002, 25.0, 10
Graphs = dict[str, bytes]  # by half


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="bundles of an earlier revision")
    parser.add_argument("--keep", type=Path, help="write the bundles here and stop")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        costs = {name: write_bundle(folder, name) for name in FAMILIES}
        if arguments.keep:
            return
        now = {name: read_graphs(folder / f"{name}.vae") for name in FAMILIES}
    before = {name: read_graphs(arguments.before / f"{name}.vae") for name in FAMILIES} if arguments.before else {}
    report = {"machine": machine(2), "costs": costs, "races": races(now, before), "load_ms": loads(now, before)}
    profiles = profile_all(now, before)
    content = {**report, "profiles": [asdict(profile) for profile in profiles]}
    (RESULTS / "graphs.json").write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    (RESULTS / "graphs.md").write_text(render(report, profiles))
    print(render(report, []))


def write_bundle(folder: Path, name: str) -> dict[str, Any]:
    """Export a default family with random weights; returns what each half costs."""
    family, shape = FAMILIES[name]
    torch.manual_seed(0)
    model = build_model(default_config(family, "vae", shape, LATENT))
    randomise(model)
    pixels = np.random.default_rng(0).integers(0, 256, (32, *shape[1:], shape[0]), dtype=np.uint8)
    examples = torch.from_numpy(pixels[..., 0] if shape[0] == 1 else pixels)
    checkpoint = Checkpoint(
        "vae", model.config, model.state_dict(), InputSpec("image", shape, "grey" if shape[0] == 1 else "rgb", "exact"),
        Likelihood("bernoulli", binarize="none"), {"train": examples, "held_out": examples}, {"dataset": "noise"}, {},
    )  # fmt: skip
    manifest = export_checkpoint(checkpoint, folder / f"{name}.vae", name=name, force=True)
    macs = count_macs(model)
    return {
        half: {
            "parameters": count_parameters(getattr(model, half)),
            "macs": macs["encode" if half == "encoder" else "decode"],
            "bytes": manifest.files[f"{half}.onnx"].bytes,
        }
        for half in HALVES
    }


def read_graphs(path: Path) -> Graphs:
    bundle = Bundle.open(path)
    return {half: bundle.read(f"{half}.onnx") for half in HALVES}


def randomise(model: nn.Module) -> None:
    """Statistics of BatchNorm that are not the identity, so that folding it is part of what is measured."""
    for layer in model.modules():
        if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
            for tensor in (layer.running_mean, layer.running_var, layer.weight, layer.bias):
                assert tensor is not None
                nn.init.uniform_(tensor, 0.5, 1.5)
    model.eval()


class ReferenceEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        widths = (1, *REFERENCE_WIDTHS)
        self.body = nn.Sequential(
            *(nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.LeakyReLU()) for a, b in pairwise(widths)),
            nn.Flatten(),
        )
        self.mean = nn.Linear(widths[-1], REFERENCE_LATENT)
        self.logvar = nn.Linear(widths[-1], REFERENCE_LATENT)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.body(x)
        return self.mean(hidden), self.logvar(hidden)


def reference_decoder() -> nn.Sequential:
    widths = (*reversed(REFERENCE_WIDTHS), REFERENCE_WIDTHS[0])
    return nn.Sequential(
        nn.Linear(REFERENCE_LATENT, widths[0]),
        nn.Unflatten(1, (widths[0], 1, 1)),
        *(
            nn.Sequential(nn.ConvTranspose2d(a, b, 3, 2, 1, output_padding=1), nn.BatchNorm2d(b), nn.LeakyReLU())
            for a, b in pairwise(widths)
        ),
        nn.Conv2d(widths[-1], 1, 3, padding=1),
        nn.Sigmoid(),
    )


def reference_graphs() -> Graphs:
    """As anybody exports it: torch.onnx and nothing more."""
    torch.manual_seed(0)
    modules = {"encoder": (ReferenceEncoder(), (2, 1, 32, 32)), "decoder": (reference_decoder(), (2, REFERENCE_LATENT))}
    graphs = {}
    for half, (module, shape) in modules.items():
        randomise(module)
        batch = ({0: torch.export.Dim("batch")},)
        program = torch.onnx.export(
            module, (torch.rand(shape),), dynamo=True, dynamic_shapes=batch, external_data=False, verbose=False
        )
        assert program is not None
        graphs[half] = program.model_proto.SerializeToString()
    return graphs


def races(now: Mapping[str, Graphs], before: Mapping[str, Graphs]) -> list[dict[str, Any]]:
    """Every family against the reference, and against what it was before; batch 1 on one thread, 32 on two."""
    rows = []
    reference = reference_graphs()
    for half in HALVES:
        for batch, threads in CASES:
            field = {REFERENCE: reference[half], **{name: graphs[half] for name, graphs in now.items()}}
            field |= {f"{name}, int8": quantize(now[name][half]) for name in PROFILED}
            field |= {f"{name}, before": graphs[half] for name, graphs in before.items()}
            rows.append({"half": half, "batch": batch, "threads": threads, "us": race(field, batch, threads)})
    return rows


def race(graphs: Mapping[str, bytes], batch: int, threads: int) -> dict[str, dict[str, float]]:
    """{name: {"min": µs, "median": µs}} of one run: up to `ROUNDS` rounds, every graph has a short turn in each."""
    sessions = {name: open_session(graph, threads) for name, graph in graphs.items()}
    feeds = {name: feed(session, batch) for name, session in sessions.items()}
    times: dict[str, list[float]] = {name: [] for name in graphs}
    end = time.perf_counter() + RACE_SECONDS
    for _ in range(ROUNDS):
        if time.perf_counter() > end:
            break
        for name, session in sessions.items():
            session.run(None, feeds[name])
            begun, runs = time.perf_counter(), 0
            while runs < 2 or time.perf_counter() - begun < TURN_SECONDS:
                session.run(None, feeds[name])
                runs += 1
            times[name].append((time.perf_counter() - begun) / runs * 1e6)
    return {name: {"min": min(found), "median": statistics.median(found)} for name, found in times.items()}


def feed(session: Any, batch: int) -> dict[str, np.ndarray]:
    (entry,) = session.get_inputs()
    return {entry.name: np.random.default_rng(0).random((batch, *entry.shape[1:]), dtype=np.float32)}


def loads(now: Mapping[str, Graphs], before: Mapping[str, Graphs]) -> dict[str, dict[str, float]]:
    """Milliseconds to make both sessions of a bundle, the least of alternating trials."""
    found: dict[str, dict[str, float]] = {}
    for name in now:
        field = {"now": now[name], **({"before": before[name]} if name in before else {})}
        times: dict[str, list[float]] = {key: [] for key in field}
        for _ in range(LOADS):
            for key, graphs in field.items():
                begun = time.perf_counter()
                for graph in graphs.values():
                    open_session(graph, 1)
                times[key].append((time.perf_counter() - begun) * 1e3)
        found[name] = {key: min(values) for key, values in times.items()}
    return found


class Noise(CalibrationDataReader):
    def __init__(self, entry: onnx.ValueInfoProto) -> None:
        shape = [dimension.dim_value for dimension in entry.type.tensor_type.shape.dim[1:]]
        batches = np.random.default_rng(0).random((4, 16, *shape), dtype=np.float32)
        self._batches = iter([{entry.name: batch} for batch in batches])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._batches, None)


def quantize(graph: bytes) -> bytes:
    """Static int8, U8S8, QDQ, per channel, 7-bit weights, calibrated on noise: for its speed alone."""
    with tempfile.TemporaryDirectory() as folder:
        plain, prepared, result = (f"{folder}/{name}.onnx" for name in ("plain", "prepared", "result"))
        model = onnx.load_from_string(graph)
        onnx.save(model, plain)
        quant_pre_process(plain, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared, result, Noise(model.graph.input[0]), quant_format=QuantFormat.QDQ, per_channel=True,
            reduce_range=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        )  # fmt: skip
        return Path(result).read_bytes()


def profile_all(now: Mapping[str, Graphs], before: Mapping[str, Graphs]) -> list[Profile]:
    profiles = []
    for name in PROFILED:
        for half in HALVES:
            fields = {("fp32", name): now[name][half], ("int8", name): quantize(now[name][half])}
            if name in before:
                fields["fp32", f"{name} before"] = before[name][half]
            for (precision, label), graph in fields.items():
                for batch, threads in CASES:
                    entry = onnx.load_from_string(graph).graph.input[0]
                    shape = [dimension.dim_value for dimension in entry.type.tensor_type.shape.dim[1:]]
                    x = np.random.default_rng(0).random((4, *shape), dtype=np.float32)
                    profiles.append(profile_graph(graph, x, label, precision, half, batch, threads))
    return profiles


def render(report: Mapping[str, Any], profiles: list[Profile]) -> str:
    facts = report["machine"]
    lines = [
        "# The graphs: what they cost, how fast they are, where their time goes", "",
        f"Default families, {LATENT} latents, random weights; {facts['cpu']} ({', '.join(facts['instructions'])}), "
        f"{facts['cores']} cores.", "Made by `benchmarks/cases/graph_costs.py`. "
        "The machine was shared: compare ratios within one row, not microseconds between rows.", "",
        "## Costs", "", "| model | half | parameters | MACs of one example | bytes |", "|---|---|--:|--:|--:|",
        *(
            f"| {name} | {half} | {cost['parameters']:,} | {cost['macs'] / 1e6:.2f} M | {cost['bytes']:,} |"
            for name, halves in report["costs"].items() for half, cost in halves.items()
        ), "",
        "## Races", "",
        f"Least of up to {ROUNDS} rounds (median), onnxruntime. ×: relative to the first row, by the least times.", "",
        *(line for entry in report["races"] for line in race_table(entry)),
        "## Loading", "", f"Milliseconds to make both sessions, the least of {LOADS} alternating trials.", "",
        "| model | now | before |", "|---|--:|--:|",
        *(f"| {name} | {value['now']:.1f} | {value.get('before', float('nan')):.1f} |"
          for name, value in report["load_ms"].items()), "",
    ]  # fmt: skip
    if profiles:
        lines += ["## Operators", "", "Of the optimised graph; profiling itself costs some µs per operator.", ""]
        lines.append(markdown(profiles))
    return "\n".join(lines)


def race_table(entry: Mapping[str, Any]) -> list[str]:
    threads = "1 thread" if entry["threads"] == 1 else f"{entry['threads']} threads"
    first = entry["us"][REFERENCE]["min"]
    return [
        f"### {entry['half'].capitalize()}, batch {entry['batch']}, {threads}", "",
        "| graph | µs | × |", "|---|--:|--:|",
        *(f"| {name} | {us['min']:.0f} ({us['median']:.0f}) | {us['min'] / first:.2f} |"
          for name, us in entry["us"].items()), "",
    ]  # fmt: skip


if __name__ == "__main__":
    main()
