"""Reports made of seeded synthetic rounds, and one that was really measured; a case with torch modules."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vae_benchmarks import (
    BundleFacts,
    ClockFacts,
    MachineFacts,
    Repeated,
    Report,
    Settings,
    StartupReport,
    Versions,
    benchmark,
)
from vae_benchmarks.harness import describe_method
from vae_benchmarks.latency import Samples, Warmup
from vae_benchmarks.race import Case, RaceReport
from vae_benchmarks.report import PlannedRoute, RowKey, summarize
from vae_benchmarks.settings import TAKE_INPUTS

DATA = Path(__file__).parents[1] / "data"
QUIET = MachineFacts("Linux", "x86_64", "a CPU", 8, 4, 8, None, 2**34, None, ("performance",), 0.1)


def synthetic_samples(rng: np.random.Generator, median_ms: float, noise: float, count: int = 100) -> Samples:
    """One round: its own level (drift, `noise` relative) times lognormal calls."""
    level = median_ms * 1e6 * np.exp(noise * rng.standard_normal())
    calls = level * np.exp(0.05 * rng.standard_normal(count))
    return Samples(calls.tolist(), 1, Warmup(12, 0.06, True, level), 0.1)


def undisturbed(report: RaceReport, milliseconds: Callable[[str, str], float]) -> RaceReport:
    """As on a machine with nothing else to do: everyone takes within 5% what was planted, by operation and name. Who is
    the fastest of his group's peers is told anew."""
    (point,) = report.cases[0].points
    fastest: dict[tuple[str, str], str] = {}
    for one in sorted(point.ratios, key=lambda one: -milliseconds(one.operation, one.competitor)):
        if not one.competitor.startswith("ours"):
            fastest[one.operation, one.against] = one.competitor
    ratios = []
    for one in point.ratios:
        ratio = milliseconds(one.operation, one.competitor) / milliseconds(one.operation, one.against)
        is_fastest = fastest.get((one.operation, one.against)) == one.competitor
        ratios.append(
            dataclasses.replace(one, ratio=ratio, low=0.95 * ratio, high=1.05 * ratio, fastest_peer=is_fastest)
        )
    case = dataclasses.replace(report.cases[0], points=(dataclasses.replace(point, ratios=tuple(ratios)),))
    return dataclasses.replace(report, cases=(case,))


@pytest.fixture
def make_report() -> Callable[..., Report]:
    def make(
        seed: int,
        latency_ms: dict[tuple[str, int, int | None], float] | None = None,
        noise: float = 0.01,
        load_ms: float = 20.0,
        peak_bytes: float = 60 * 2**20,
        rounds: int = Settings().rounds,
        count: int = 100,
    ) -> Report:
        rng = np.random.default_rng(seed)
        bundle = BundleFacts("my.vae", "my", "vae", "ab" * 32, 4, "held-out", None)
        latency_ms = latency_ms or {("encode", 1, 1): 0.1, ("decode", 1, 1): 0.2, ("decode", 8, None): 0.3}
        settings = Settings(operations=("encode", "decode"), batches=(1, 8), rounds=rounds)
        rows = tuple(
            summarize(
                RowKey(*key, "cpu", "fp32", "float32" if key[0] in TAKE_INPUTS else None),
                [synthetic_samples(rng, value, noise, count) for _ in range(rounds)],
                settings,
            )
            for key, value in latency_ms.items()
        )
        levels = dict.fromkeys(StartupReport.FIGURES, 100.0) | {"load_ms": load_ms, "peak_rss_bytes": peak_bytes}
        figures = {
            name: Repeated.of((value * np.exp(noise * rng.standard_normal(rounds))).tolist())
            for name, value in levels.items()
        }
        return Report(
            created="2026-01-02T03:04:05+00:00",
            bundle=bundle,
            machine=QUIET,
            versions=Versions("3.11.7", "2.4.6", "1.31.1", "0.1.0"),
            settings=settings,
            clock=ClockFacts(30.0, 50.0),
            plan={
                name: (PlannedRoute(1, "cpu", "CPUExecutionProvider", "fp32", f"{name}r.onnx", 1, None, ()),)
                for name in ("encode", "decode")
            },
            method=describe_method(bundle, settings),
            skipped={},
            startup=StartupReport(threads=1, peak_batch=8, input="float32", **figures),
            latency=rows,
            gpus=(),
            other_cores_busy=None,
        )

    return make


@pytest.fixture(scope="session")
def tiny() -> Path:
    return DATA / "tiny.vae"


@pytest.fixture(scope="session")
def free() -> Path:
    return DATA / "tiny-free.vae"


@pytest.fixture(scope="session")
def autoencoder() -> Path:
    return DATA / "tiny-vectors.vae"


@pytest.fixture(scope="session")
def measured(tiny: Path) -> Report:
    """Two rounds of four rows on the tiny bundle, with tiny budgets."""
    return benchmark(tiny, Settings(("sample", "reconstruct"), (1, 6), (1,), seconds=0.02, rounds=2))


MODULES = """
import torch
from torch import nn

class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 8))

    def forward(self, x):
        return self.body(x).chunk(2, dim=1)

def build(name):
    torch.manual_seed(0)
    up = nn.Sequential(nn.Linear(4, 256), nn.Unflatten(1, (4, 8, 8)), nn.Conv2d(4, 1, 3, padding=1), nn.Sigmoid())
    return Encoder(), up
"""


@pytest.fixture(scope="session")
def write_case(tiny: Path) -> Callable[..., Path]:
    """Makes a folder a case of the tiny bundle, without torch modules. arrays: of inputs.npz. facts: of case.json."""

    def write(folder: Path, arrays: Mapping[str, Any], **facts: Any) -> Path:
        (folder / "plain").mkdir(parents=True)
        (folder / "torch").mkdir()
        shutil.copytree(tiny, folder / "bundle.vae")
        for half in ("encoder", "decoder"):
            shutil.copy(tiny / f"{half}.onnx", folder / "plain")
        np.savez(folder / "inputs.npz", **arrays)
        manifest = Case.open(tiny).manifest
        document = {
            "format": "vae-case",
            "format_version": 1,
            "kind": manifest.kind,
            "input_shape": list(manifest.input.shape),
            "latent_shape": list(manifest.latent.shape),
            "data": None,
            **facts,
        }
        (folder / "case.json").write_text(json.dumps(document))
        return folder

    return write


@pytest.fixture(scope="session")
def torch_case(write_case: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle as a case, with torch modules of its shapes but other weights, and their outputs as reference."""
    torch = pytest.importorskip("torch")
    namespace: dict[str, Any] = {}
    exec(MODULES, namespace)
    encoder, decoder = namespace["build"]("small")
    x = np.random.default_rng(0).random((4, 1, 8, 8), np.float32)
    with torch.inference_mode():
        mean, logvar = encoder(torch.from_numpy(x))
        reconstruction = decoder(mean)
    outputs = {"mean": mean, "logvar": logvar, "reconstruction": reconstruction}
    folder = write_case(
        tmp_path_factory.mktemp("torch") / "case",
        {"x": x, **{name: value.numpy() for name, value in outputs.items()}},
        name="small",
        description="small",
        parameters=None,
        macs=None,
        quality=None,
        architecture={"name": "small", "arguments": {}},
    )
    (folder / "torch" / "modules.py").write_text(MODULES)
    torch.save({"encoder": encoder.state_dict(), "decoder": decoder.state_dict()}, folder / "torch" / "weights.pt")
    return folder
