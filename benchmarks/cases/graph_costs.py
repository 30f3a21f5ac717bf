"""What the default families cost, and how fast their graphs are beside others, on random weights.

    python benchmarks/cases/graph_costs.py [--before FOLDER]

The speed of a graph does not depend on its weights. Three questions, answered in benchmarks/results/graphs.md:
what the halves cost (parameters, multiply-accumulates, bytes); how their latency relates to that of the usual VAE of
transposed convolutions at 32×32, exported by torch.onnx as it is; and where the time goes, operator by operator.
FOLDER holds bundles of the same names that an earlier revision wrote with --keep: they are raced too.
Every latency is one of a race: two graphs in turns, in one process, so that what else the machine does hits both alike.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import profile_operators
import torch
from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.calibrate import CalibrationDataReader
from onnxruntime.quantization.shape_inference import quant_pre_process
from profile_operators import CASES, Profile, open_session, profile_graph
from reporting import RESULTS, machine, table_row, write_report
from torch import nn

from vae_benchmarks.intervals import paired_ratio
from vae_benchmarks.latency import alternate
from vae_export import export_checkpoint
from vae_runtime.bundle import Bundle
from vae_runtime.manifest import HALF_NAMES, InputSpec, Likelihood
from vae_training.checkpoint import Checkpoint
from vae_training.models import build_model, count_macs, count_parameters, default_config

LATENT = 20
FAMILIES = {
    "conv-28x28": ("conv", (1, 28, 28)),
    "conv-32x32": ("conv", (1, 32, 32)),
    "conv-64x64x3": ("conv", (3, 64, 64)),
    "mlp-28x28": ("mlp", (1, 28, 28)),
}
PROFILED = ("conv-28x28", "conv-64x64x3")
REFERENCE_LATENT, REFERENCE_WIDTHS = 128, (32, 64, 128, 256, 512)
RATIOS = (("now", "reference"), ("now", "before"), ("int8", "now"))  # whose time ÷ whose
COLUMNS = {
    "now_us": "µs", "int8_us": "µs int8", "int8_to_now": "int8 ÷ fp32",
    "now_to_reference": "÷ reference", "now_to_before": "÷ before",
}  # fmt: skip
BLOCKS, LOADS = 200, 10
Graphs = dict[str, bytes]  # by half

# Measured once, on the machine of the report; "before" is the decoder with a shuffle of pixels at every doubling.
TRIED = """## What was tried

Decoders for MNIST: latency at batch 1 on one thread relative to the one before, and validation -ELBO after 8 epochs;
one run each, so that half a nat may be chance.

| decoder | ÷ before | nats |
|---|--:|--:|
| before: Linear, 64-64-64 at 7×7, shuffle, 16-4 at 14×14, shuffle | 1.00 | 105.60 |
| before, with a residual connection | 1.0 | 106.27 |
| **now: Linear, 64-64-32 at 7×7, nearest, 32-16-4 at 14×14, shuffle** | 0.76 | 106.73 |
| one convolution less at 7×7, one more at 14×14 | 0.86 | 106.55 |
| one convolution less at 7×7, a hidden layer of 64 before the Linear | 0.83 | 106.78 |
| one shuffle by 4 after four convolutions at 7×7 | 0.91 | 106.73 |
| one shuffle by 4 after three, Linear to 32 channels | 0.55 | 108.12 |
| before, Linear to 32 channels | 0.62 | 107.20 |
| before, depthwise and pointwise convolutions at 7×7 | - | 109.44 |

After 40 epochs, validation and test: before 102.36 and 103.85, now 102.61 and 103.93, now with weight decay 0.05 102.44
and 103.49.

Rewrites of whole graphs, latency relative to the graph without, batch 1 on one thread:

| rewrite | ratio | kept |
|---|--:|---|
| scale and shift into the last Gemm, decoder of vectors | 0.85 | yes |
| scale into the first Gemm, encoder of vectors | 0.96 | yes |
| ConvTranspose of maps up to 4×4 as Conv + DepthToSpace, the reference decoder | 0.75 to 0.91 | yes |
| ... batch 32, one and two threads | 0.67 to 1.1 | yes |
| ... of all maps | 0.96 to 1.13 | no |
| ... of all maps, batch 32 | 1.19 to 1.87 | no |
| DepthToSpace in mode DCR for CRD | 1.00 | no |
| DepthToSpace as Reshape, Transpose, Reshape | 1.08 | no |
| nearest upsampling and 3×3 convolution as one ConvTranspose of 4×4, whole decoders | 0.84 to 0.98 | no |
| ... two threads | 0.76 to 1.25 | no |
| ... as a 2×2 convolution, DepthToSpace and Slice | 0.89 to 1.02 | no |
| ... two threads | 0.93 to 1.27 | no |
| ... in int8, without VNNI | 0.83 to 1.00 | no |
| ... in int8, without VNNI, two threads | 0.84 to 1.09 | no |
| scale and shift of GroupNorm of single channels into the normalisation, 128×128 | 0.97 to 1.00 | yes |
| scale and shift of GroupNorm as BatchNormalization, 128×128 | 0.94 to 1.00 | no |
| Sigmoid before the last shuffle, fused with the convolution | 1.00 to 1.09 | no |
| two Gemms for mean and logvar, not one and Split: conv | 1.03 | no |
| two Gemms for mean and logvar, not one and Split: mlp | 0.97 to 1.25 | no |
| MatMul and Add for Gemm; Gemm with weights transposed beforehand | 0.99 to 1.03 | no |

BatchNorm after a convolution or a Linear, and shapes that are constant, the exporter folds itself.
"""


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
    profiles = [asdict(profile) for profile in profile_all(now, before)]
    whole = {**report, "profiles": profiles}
    write_report(RESULTS / "graphs", whole, markdown(whole))
    print(markdown({**report, "profiles": []}))


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
        for half in HALF_NAMES
    }


def read_graphs(path: Path) -> Graphs:
    bundle = Bundle.open(path)
    return {half: bundle.read(f"{half}.onnx") for half in HALF_NAMES}


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
    """Every family against the reference and against what it was before; batch 1 on one thread, 32 on two."""
    rows = []
    reference = reference_graphs()
    for half in HALF_NAMES:
        for batch, threads in CASES:
            for name, graphs in now.items():
                field = {"reference": reference[half], "now": graphs[half], "int8": quantize(graphs[half])}
                field |= {"before": before[name][half]} if name in before else {}
                result = race(field, batch, threads)
                rows.append({"half": half, "batch": batch, "threads": threads, "model": name, **result})
    return rows


def race(graphs: Mapping[str, bytes], batch: int, threads: int) -> dict[str, float]:
    """Two by two, in turns: the median µs of a run, and the medians of the ratios between turns beside each other, as
    `vae_benchmarks` takes them.

    Keys: "now_to_reference", "now_to_before", "int8_to_now"; of the last pair also "now_us" and "int8_us".
    """
    result: dict[str, float] = {}
    for name, other in RATIOS:
        if other not in graphs:
            continue
        # No more than these two are open: threads of a session that waits would run on the cores of the one that works.
        first, second = (call_of(open_session(graphs[key], threads), batch) for key in (other, name))
        first(), second()
        found = alternate(first, second, BLOCKS)
        result[f"{name}_to_{other}"] = paired_ratio(*found)[0]
        if name == "int8":
            result |= {"now_us": statistics.median(found[0]) * 1e6, "int8_us": statistics.median(found[1]) * 1e6}
    return result


def call_of(session: Any, batch: int) -> Callable[[], Any]:
    return functools.partial(session.run, None, feed(session, batch))


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


class Noise(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
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
        for half in HALF_NAMES:
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


def markdown(report: Mapping[str, Any]) -> str:
    facts = report["machine"]
    shown = {key: title for key, title in COLUMNS.items() if any(key in entry for entry in report["races"])}
    loaded = list(next(iter(report["load_ms"].values())))
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
        "onnxruntime, whose threads do not spin. Graphs took turns two by two: medians of times, of fp32 beside int8,",
        "and of the ratios between turns beside each other, which are what to compare.",
        f"Reference: the usual VAE of transposed convolutions at 32×32, widths {REFERENCE_WIDTHS}, latent "
        f"{REFERENCE_LATENT}.", "int8 is calibrated on noise: its speed alone counts.", "",
        table_row(["model", "half", "batch", "threads", *(shown.values())]),
        "|---|---|" + "--:|" * (2 + len(shown)), *(race_row(entry, shown) for entry in report["races"]), "",
        "## Loading", "", f"Milliseconds to make both sessions, the least of {LOADS} alternating trials.", "",
        table_row(["model", *loaded]), "|---|" + "--:|" * len(loaded),
        *(table_row([name, *(f"{value[key]:.1f}" for key in loaded)]) for name, value in report["load_ms"].items()), "",
    ]  # fmt: skip
    lines.append(TRIED)
    if profiles := report["profiles"]:
        lines += ["## Operators", "", "Of the optimised graph; profiling itself costs some µs per operator.", ""]
        lines.append(profile_operators.markdown(list(map(Profile.from_dict, profiles))))
    return "\n".join(lines)


def race_row(entry: Mapping[str, Any], shown: Iterable[str]) -> str:
    figures = [f"{entry[key]:{'.0f' if key.endswith('_us') else '.2f'}}" if key in entry else "" for key in shown]
    return table_row([entry["model"], entry["half"], str(entry["batch"]), str(entry["threads"]), *figures])


if __name__ == "__main__":
    main()
