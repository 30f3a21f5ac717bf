"""Large images in tiles: exactness, peak memory and time, of a small convolutional VAE with random weights.

    python benchmarks/cases/tiles.py

Answers in benchmarks/results/tiles.md. Memory and time do not depend on the weights. Peak memory is the largest
resident set of a fresh process that loads the bundle and makes one call (VmHWM; Linux), less that of one that loads it
and decodes 64x64 pixels. What must be there at any rate, the input and the output of the call, is in it and told beside
it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from reporting import RESULTS, machine, write_report
from torch import Tensor, nn

from vae_export import export_bundle
from vae_runtime import VAE

FACTOR, LATENT = 4, 4
EXACT_SIZE, EXACT_TILE = (1024, 768), 256
TILE = 512
SMALLEST = 64  # a side of the images of the process whose peak is taken off the others'
ROUNDS = 3
MIB = 2**20
# One call in a process of its own: bundle, operation, height, width, tile or 0; prints peak memory and time.
CHILD = """
import json, sys, time
import numpy as np
from vae_benchmarks.worker import resident_bytes
from vae_runtime import VAE
path, operation, height, width, tile = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
with VAE.load(path, threads=1) as vae:
    if operation == "decode":
        factor = vae.manifest.input.multiple_of
        shape = (1, vae.manifest.latent.shape[0], height // factor, width // factor)
        array = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    else:
        array = np.random.default_rng(0).integers(0, 256, (1, height, width, 3), dtype=np.uint8)
    start = time.perf_counter()
    result = getattr(vae, operation)(array, **({"tile": tile} if tile else {}))
    seconds = time.perf_counter() - start
size = result.nbytes if operation != "encode" else result.mean.nbytes + result.logvar.nbytes
print(json.dumps({"peak_bytes": resident_bytes()[1], "data_bytes": array.nbytes + size, "seconds": seconds}))
"""


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "tiles.vae"
        tiling = write_bundle(bundle)
        exactness = {name: differences(bundle, name) for name in ("encode", "decode", "reconstruct")}
        rows = measure(bundle)
    report = {"machine": machine(1), "tiling": tiling, "exactness": exactness, "memory": rows}
    write_report(RESULTS / "tiles", report, markdown(report))
    print(markdown(report))


class Block(nn.Sequential):
    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__(nn.Conv2d(inputs, outputs, 3, stride, 1), nn.BatchNorm2d(outputs), nn.SiLU())


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        blocks = [Block(3, 16, 2), Block(16, 16), Block(16, 32, 2), Block(32, 32)]
        self.body = nn.Sequential(*blocks, nn.Conv2d(32, 2 * LATENT, 3, padding=1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, logvar = self.body(2 * x - 1).chunk(2, dim=1)
        return mean, logvar


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        blocks = [Block(LATENT, 32), Block(32, 32), nn.Upsample(scale_factor=2), Block(32, 16)]
        blocks += [nn.Upsample(scale_factor=2), Block(16, 16), nn.Conv2d(16, 3, 3, padding=1)]
        self.body = nn.Sequential(*blocks)

    def forward(self, z: Tensor) -> Tensor:
        return torch.sigmoid(self.body(z))


def write_bundle(path: Path) -> dict[str, Any]:
    """Export it with BatchNorm statistics that are not the identity; returns what the manifest says of tiles."""
    torch.manual_seed(0)
    encoder, decoder = Encoder(), Decoder()
    for module in [*encoder.modules(), *decoder.modules()]:
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.uniform_(module.running_mean, -0.3, 0.3)
            nn.init.uniform_(module.running_var, 0.05, 0.3)
    x = np.random.default_rng(0).random((4, 3, 64, 64), dtype=np.float32)
    manifest = export_bundle(encoder, decoder, path, examples=x, multiple_of=FACTOR)
    assert manifest.tiling is not None
    return manifest.tiling.to_dict()


def differences(bundle: Path, operation: str) -> float:
    """max|Δ| between tiled and whole, on smooth random images of 1024x768; of latents relative to max|reference|."""
    height, width = EXACT_SIZE
    coarse = np.random.default_rng(1).random((1, 3, height // 16, width // 16), dtype=np.float32)
    images = coarse.repeat(16, axis=2).repeat(16, axis=3)
    with VAE.load(bundle, threads=1) as vae:
        if operation == "encode":
            whole, tiled = vae.encode(images), vae.encode(images, tile=EXACT_TILE)
            pairs = ((tiled.mean, whole.mean), (tiled.logvar, whole.logvar))
            return max(
                float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs if a is not None and b is not None
            )
        if operation == "decode":
            latents = vae.encode(images).mean
            return float(np.abs(vae.decode(latents, tile=EXACT_TILE) - vae.decode(latents)).max())
        return float(np.abs(vae.reconstruct(images, tile=EXACT_TILE) - vae.reconstruct(images)).max())


def measure(bundle: Path) -> list[dict[str, Any]]:
    """Peak memory over that of the smallest call, and best time, of every call; rounds alternate, so that the machine's
    drift meets all."""
    calls = [("decode", 512, 0), ("decode", 2048, 0), ("decode", 2048, TILE), ("decode", 4096, TILE)]
    calls += [("encode", 512, 0), ("encode", 2048, 0), ("encode", 2048, TILE), ("reconstruct", 2048, TILE)]
    found: dict[tuple[str, int, int], list[dict[str, Any]]] = {call: [] for call in calls}
    baseline = child(bundle, "decode", SMALLEST, 0)["peak_bytes"]
    for _ in range(ROUNDS):
        for call in calls:
            found[call].append(child(bundle, *call))
    return [
        {
            "operation": operation,
            "side": side,
            "tile": tile,
            "added_peak_bytes": max(run["peak_bytes"] for run in runs) - baseline,
            "data_bytes": runs[0]["data_bytes"],
            "seconds": min(run["seconds"] for run in runs),
        }
        for (operation, side, tile), runs in found.items()
    ]


def child(bundle: Path, operation: str, side: int, tile: int) -> dict[str, Any]:
    command = [sys.executable, "-c", CHILD, str(bundle), operation, str(side), str(side), str(tile)]
    result: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return result


def markdown(report: dict[str, Any]) -> str:
    rows = {(row["operation"], row["side"], row["tile"]): row for row in report["memory"]}
    facts, tiling = report["machine"], report["tiling"]
    exactness = report["exactness"]
    small, tiled = rows["decode", 512, 0], rows["decode", 2048, TILE]
    beside = (tiled["added_peak_bytes"] - tiled["data_bytes"]) / (small["added_peak_bytes"] - small["data_bytes"])
    lines = [
        "# Large images in tiles",
        "",
        f"{facts['cpu']}, one thread, numpy {facts['numpy']}. Made by `benchmarks/cases/tiles.py`.",
        "",
        f"A convolutional VAE with BatchNorm, {FACTOR} pixels per latent cell; a latent looks at"
        f" {tiling['encoder']['receptive_field']} pixels on a side, a pixel at {tiling['decoder']['receptive_field']}"
        f" cells; context {tiling['encoder']['context']} and {tiling['decoder']['context']} cells.",
        "",
        f"Tiled against whole, {EXACT_SIZE[0]}x{EXACT_SIZE[1]} pixels in tiles of {EXACT_TILE}, max|Δ| (of latents"
        f" relative to max|reference|): {', '.join(f'{name} {value:.1e}' for name, value in exactness.items())}.",
        "",
        "Memory: the peak of a process that loads the bundle and makes the call, less that of one that loads it and"
        f" decodes {SMALLEST}x{SMALLEST} pixels.",
        "",
        f"| call | image | tile | peak over that of {SMALLEST}x{SMALLEST}, MiB |"
        " of which input and output | seconds | ÷ whole |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for (operation, side, tile), row in rows.items():
        whole = rows.get((operation, side, 0))
        ratio = f"{row['seconds'] / whole['seconds']:.2f}" if whole is not None and tile else ""
        lines.append(
            f"| {operation} | {side}x{side} | {tile or 'whole'} | {row['added_peak_bytes'] / MIB:.0f} |"
            f" {row['data_bytes'] / MIB:.0f} | {row['seconds']:.2f} | {ratio} |"
        )
    lines += [
        "",
        f"Beside input and output, a 2048x2048 decode in tiles of {TILE} takes {beside:.2f} of the memory of a 512x512"
        " decode without tiles.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
