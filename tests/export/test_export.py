"""From a checkpoint, or from any two modules, to a bundle that agrees with PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import vae_export
from vae_export import Budget, export_bundle, export_checkpoint
from vae_runtime import VAE
from vae_runtime.errors import ExportError, InputError, OutputError
from vae_runtime.manifest import Likelihood
from vae_runtime.preprocess import to_model_input


class Encoder(nn.Module):
    def __init__(self, outputs: int = 2) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.SiLU(), nn.Dropout(0.5))
        self.heads = nn.ModuleList(nn.Conv2d(8, 4, 1) for _ in range(outputs))

    def forward(self, x):
        hidden = self.body(2 * x - 1)
        outputs = tuple(head(hidden) for head in self.heads)
        return outputs if len(outputs) > 1 else outputs[0]


def make_decoder() -> nn.Module:
    return nn.Sequential(nn.ConvTranspose2d(4, 8, 4, 2, 1), nn.ReLU(), nn.Conv2d(8, 3, 3, padding=1))


@pytest.fixture
def pair():
    torch.manual_seed(0)
    return Encoder(), make_decoder()


VECTORS = np.zeros((4, 6), np.float32)
X = np.random.default_rng(1).integers(0, 256, (9, 10, 14, 3), dtype=np.uint8)


@pytest.mark.parametrize("name", ["conv", "conv-rgb", "mlp-vector"])
def test_a_bundle_computes_what_its_checkpoint_computes(name: str, checkpoints, exported: dict[str, Path]) -> None:
    checkpoint = checkpoints[name]
    x = to_model_input(checkpoint.examples["train"].numpy(), checkpoint.input)
    model = checkpoint.build_model()
    with torch.no_grad():
        encoded = model.encode(torch.from_numpy(x))
        mean = encoded[0] if checkpoint.kind == "vae" else encoded
        expected = model.decode(mean).numpy()
    scale = 1 if checkpoint.input.is_image else np.ptp(x)
    with VAE.load(exported[name]) as vae:
        posterior = vae.encode(x)
        np.testing.assert_allclose(posterior.mean, mean.numpy(), atol=1e-4 * np.abs(mean.numpy()).max())
        np.testing.assert_allclose(vae.reconstruct(x), expected, atol=1e-5 * scale)
        if checkpoint.kind == "vae":
            np.testing.assert_allclose(posterior.logvar, encoded[1].numpy(), atol=1e-4)
        assert vae.selftest().passed
        assert vae.manifest.training["dataset"] == "noise"


def test_exporting_twice_gives_the_same_bytes(checkpoints, exported: dict[str, Path], tmp_path: Path) -> None:
    export_checkpoint(checkpoints["conv"], tmp_path / "again.vae", name="conv")
    for path in exported["conv"].iterdir():
        assert (tmp_path / "again.vae" / path.name).read_bytes() == path.read_bytes(), path.name


def test_held_out_examples_become_golden_inputs(checkpoints, exported: dict[str, Path]) -> None:
    golden = VAE.load(exported["conv"]).golden()
    held_out = to_model_input(checkpoints["conv"].examples["held_out"].numpy(), checkpoints["conv"].input)
    np.testing.assert_array_equal(golden["x"], held_out[:4])


def test_synthetic_golden_inputs_keep_real_ones_out(checkpoints, tmp_path: Path) -> None:
    manifest = export_checkpoint(checkpoints["mlp-vector"], tmp_path / "a.vae", name="a", golden="synthetic")
    assert manifest.golden.source == "synthetic"
    golden = VAE.load(tmp_path / "a.vae").golden()["x"]
    real = np.concatenate([examples.numpy() for examples in checkpoints["mlp-vector"].examples.values()])
    assert not (golden[:, None] == real[None]).all(-1).any()
    assert real.min() <= golden.min() < golden.max() <= real.max()


def test_two_modules_become_a_bundle_with_scaled_latents(pair, tmp_path: Path) -> None:
    encoder, decoder = pair
    encoder.train()
    likelihood = {"type": "gaussian", "scale": 0.1}
    manifest = export_bundle(
        encoder, decoder, tmp_path / "my.vae", examples=X, likelihood=likelihood, latent_scale=0.25, latent_shift=0.5
    )
    assert encoder.training
    assert encoder.body[1].training
    assert (manifest.name, manifest.kind, manifest.latent.shape) == ("my", "vae", (4, 5, 7))
    assert manifest.input.to_dict() == {"type": "image", "shape": [3, 10, 14], "colour": "rgb", "resize": "exact"}
    encoder.eval()
    x = torch.from_numpy(to_model_input(X, manifest.input))
    with torch.no_grad():
        mean, logvar = encoder(x)
        expected = decoder.eval()(mean).clamp(0, 1)
    vae = VAE.load(tmp_path / "my.vae")
    posterior = vae.encode(X)
    np.testing.assert_allclose(posterior.mean, (mean - 0.5) * 0.25, atol=1e-5)
    np.testing.assert_allclose(posterior.logvar, logvar + 2 * np.log(0.25), atol=1e-4)
    np.testing.assert_allclose(vae.decode(posterior.mean), expected, atol=1e-5)


def test_numbers_of_numpy_are_numbers(pair, tmp_path: Path) -> None:
    half = np.float32(0.5)
    numbers = {"latent_scale": half, "latent_shift": np.int8(1), "tolerance": np.float32(1e-4)}
    budget = Budget(half, np.float64(1))
    export_bundle(
        *pair, tmp_path / "a.vae", examples=X, **numbers, budget=budget, likelihood={"type": "gaussian", "scale": half}
    )
    manifest = VAE.load(tmp_path / "a.vae").manifest  # JSON holds no others
    assert manifest.likelihood == Likelihood("gaussian", scale=0.5)
    assert manifest.budget == {"psnr_db": 0.5, "nats_per_dimension": 1}
    export_bundle(*pair, tmp_path / "b.vae", examples=X, latent_scale=0.5, latent_shift=1)
    for file in ("encoder.onnx", "decoder.onnx"):
        assert (tmp_path / "a.vae" / file).read_bytes() == (tmp_path / "b.vae" / file).read_bytes()


def test_an_autoencoder_from_torch_tensors(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 6) * 3 + 10
    manifest = export_bundle(
        nn.Linear(6, 2),
        nn.Linear(2, 6),
        tmp_path / "a.vae",
        examples=x,
        kind="autoencoder",
        name="lin",
        golden="synthetic",
    )
    assert manifest.latent.prior is None
    assert manifest.likelihood is None
    assert VAE.load(tmp_path / "a.vae").encode(x.numpy()).logvar is None


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"kind": "gan"}, InputError, "kind is 'gan'; expected one of vae, autoencoder"),
        ({"kind": "autoencoder"}, InputError, "kind is 'autoencoder', but the encoder returns a mean and a spread"),
        ({"latent_scale": 0.0}, InputError, "latent_scale is 0.0; expected a finite number above 0"),
        ({"latent_shift": float("nan")}, InputError, "latent_shift is nan; expected a finite number"),
        ({"tolerance": -1}, InputError, "tolerance is -1; expected a finite number above 0"),
        ({"golden": "held-out"}, InputError, "golden is 'held-out'; expected one of examples, synthetic"),
        ({"likelihood": {"type": "cauchy"}}, InputError, "likelihood.type is 'cauchy'; expected one of bernoulli"),
        ({"likelihood": {"type": "gaussian"}}, InputError, "likelihood.scale is None; expected a finite number"),
        ({"examples": X[:0]}, InputError, "at least one example"),
        ({"examples": X / 255}, InputError, r"examples has shape \(9, 10, 14, 3\) and dtype float64; expected images"),
        ({"examples": [1, 2]}, InputError, "examples is a list; expected a numpy array"),
        ({"examples": X[..., :2]}, ExportError, r"the encoder does not run on a batch of shape \(8, 2, 10, 14\)"),
        ({"examples": VECTORS, "resize": "bogus"}, InputError, "resize is 'bogus', but the inputs are vectors"),
        ({"examples": VECTORS, "colour": "pink"}, InputError, "colour is 'pink', but the inputs are vectors"),
        ({"examples": VECTORS, "multiple_of": 1}, InputError, "multiple_of is 1, but the inputs are vectors"),
        ({"multiple_of": 2, "resize": "crop"}, InputError, "resize is 'crop'; with multiple_of, height and width are"),
        ({"name": 5}, InputError, "name is 5; expected a string that is not empty"),
        ({"name": ""}, InputError, "name is ''; expected a string that is not empty"),
        ({"force": "no"}, InputError, "force is 'no'; expected True or False"),
        ({"keep": 5}, InputError, "keep is 5; expected True or False"),
        ({"logits": "yes"}, InputError, "logits is 'yes'; expected True or False"),
        ({"progress": 5}, InputError, "progress is 5; expected a function"),
        ({"path": None}, InputError, "path is None; expected a str or an os.PathLike"),
        ({"path": 5, "name": "a"}, InputError, "path is 5; expected a str or an os.PathLike"),
        ({"path": "a\0b"}, InputError, r"path is 'a\\x00b'; expected the name of a folder"),
        ({"path": ""}, InputError, "path is ''; expected the name of a folder"),
        ({"resize": ""}, InputError, "input.resize is ''; expected one of exact, stretch, crop"),
        ({"resize": "tile"}, InputError, "input.resize is 'tile'; expected one of exact, stretch, crop"),
        ({"colour": "grey"}, InputError, "input.colour is 'grey', which has 1 channels"),
        ({"decoder": nn.Conv2d(4, 3, 1)}, ExportError, r"the decoder returns shape \(8, 3, 5, 7\) for inputs"),
        ({"tolerance": 1e-12}, ExportError, "the tolerance is 1e-1[12]"),
    ],
)  # fmt: skip
def test_what_cannot_be_exported_is_named_and_nothing_is_written(pair, tmp_path: Path, change, error, message) -> None:
    arguments = {"encoder": pair[0], "decoder": pair[1], "path": tmp_path / "a.vae", "examples": X} | change
    with pytest.raises(error, match=message):
        export_bundle(**arguments)
    assert list(tmp_path.iterdir()) == []


class _Few(nn.Module):
    """Takes so many rows at once."""

    def __init__(self, network: nn.Module, most: int) -> None:
        super().__init__()
        self.network, self.most = network, most

    def forward(self, x: torch.Tensor) -> Any:
        if x.shape[0] > self.most:
            raise RuntimeError(f"more than {self.most} rows\nand pages of advice")
        return self.network(x)


HALVES = ("encoder", "decoder")


@pytest.mark.parametrize("half", [0, 1])
def test_a_model_that_refuses_a_larger_batch_is_refused_in_words(pair, tmp_path: Path, half: int) -> None:
    halves = list(pair)
    halves[half] = _Few(halves[half], 3)
    with pytest.raises(ExportError, match=rf"the {HALVES[half]} does not run on a batch of .*: more than 3 rows$"):
        export_bundle(*halves, tmp_path / "a.vae", examples=X)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_refused_before_any_work(pair, tmp_path: Path) -> None:
    (tmp_path / "a.vae").mkdir()
    with pytest.raises(OutputError, match="exists and is no bundle"):
        export_bundle(*pair, tmp_path / "a.vae", examples=X, force=True)


def test_what_is_loaded_late_is_listed() -> None:
    assert dir(vae_export) == sorted(vae_export.__all__)
