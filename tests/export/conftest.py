"""Small seeded models, exported once per session: an export takes seconds."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="export needs torch")
pytest.importorskip("onnxscript", reason="export needs onnxscript")

from vae_runtime.manifest import InputSpec, Likelihood  # noqa: E402
from vae_training.checkpoint import Checkpoint, save_checkpoint  # noqa: E402
from vae_training.models import build_model, default_config  # noqa: E402


@pytest.fixture(scope="module")
def networks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A module of factories that `vae-export` finds by name: the test module's SOURCE, importable as its MODULE."""
    folder, name = tmp_path_factory.mktemp("networks"), request.module.MODULE
    (folder / f"{name}.py").write_text(request.module.SOURCE)
    sys.path.insert(0, str(folder))
    yield __import__(name)
    sys.path.remove(str(folder))
    sys.modules.pop(name, None)


def make_checkpoint(
    family: str, kind: str, spec: InputSpec, likelihood: Likelihood, seed: int = 0, **changes: Any
) -> Checkpoint:
    """An untrained model whose BatchNorm statistics are not the identity, with seeded examples. changes: to its config
    from what `vae-train` uses."""
    torch.manual_seed(seed)
    config = dataclasses.replace(default_config(family, kind, spec.shape, 6), **changes)
    model = build_model(config)
    rng = np.random.default_rng(seed)
    if spec.is_image:
        height_width = spec.shape[1:] if spec.shape[0] == 1 else (*spec.shape[1:], spec.shape[0])
        draw = [rng.integers(0, 256, (40, *height_width), dtype=np.uint8) for _ in range(2)]
    else:
        draw = [rng.normal(50, 7, (40, *spec.shape)).astype(np.float32) for _ in range(2)]
        model.fit_normalisation(torch.from_numpy(draw[0]))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.3, 0.3)
            torch.nn.init.uniform_(module.running_var, 0.5, 2.0)
    examples = {"train": torch.from_numpy(draw[0]), "held_out": torch.from_numpy(draw[1])}
    return Checkpoint(kind, config, model.state_dict(), spec, likelihood, examples, {"dataset": "noise"}, {})


GREY = InputSpec("image", (1, 8, 8), "grey", "exact")
RGB = InputSpec("image", (3, 12, 9), "rgb", "crop")
VECTOR = InputSpec("vector", (7,))
CASES = {
    "conv": ("conv", "vae", GREY, Likelihood("bernoulli", binarize="none")),
    "conv-rgb": ("conv", "autoencoder", RGB, Likelihood("gaussian", scale=0.1)),
    "mlp-vector": ("mlp", "vae", VECTOR, Likelihood("gaussian", scale=2.0)),
    "mlp-threshold": ("mlp", "vae", GREY, Likelihood("bernoulli", binarize="threshold")),
}


@pytest.fixture(scope="session")
def checkpoints() -> dict[str, Checkpoint]:
    return {name: make_checkpoint(*case) for name, case in CASES.items()}


class Exported(dict[str, Path]):
    """Name -> bundle, each exported when it is first asked for: few test files need them all."""

    def __init__(self, checkpoints: dict[str, Checkpoint], folder: Path) -> None:
        super().__init__()
        self._checkpoints, self._folder = checkpoints, folder

    def __missing__(self, name: str) -> Path:
        from vae_export import export_checkpoint

        self[name] = self._folder / f"{name}.vae"
        export_checkpoint(self._checkpoints[name], self[name], name=name)
        return self[name]


@pytest.fixture(scope="session")
def exported(checkpoints: dict[str, Checkpoint], tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return Exported(checkpoints, tmp_path_factory.mktemp("exported"))


@pytest.fixture
def model_file(checkpoints: dict[str, Checkpoint], tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "model.pt", checkpoints["conv"])
    return tmp_path / "model.pt"
