"""ELBO, log p(x) and scores of exported models against the same modules in float64 in PyTorch, with the same noise."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vae_export import export_bundle
from vae_runtime import VAE
from vae_runtime.sampling import NormalStream

SHAPE, LATENT = (1, 28, 28), 20
LIKELIHOODS: list[dict[str, Any]] = [
    {"type": "bernoulli", "binarize": "none"},
    {"type": "bernoulli", "binarize": "threshold"},
    {"type": "gaussian", "scale": 0.1},
    {"type": "laplace", "scale": 0.1},
]


class Encoder(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(784, 400), nn.ReLU(), nn.Linear(400, 2 * LATENT))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, logvar = super().forward(x).chunk(2, dim=1)
        return 3 * mean, 3 * logvar - 2


class Decoder(nn.Sequential):
    """gain: how confident it is."""

    def __init__(self, gain: float) -> None:
        super().__init__(nn.Linear(LATENT, 400), nn.ReLU(), nn.Linear(400, 784), nn.Unflatten(1, SHAPE))
        self.gain = gain

    def forward(self, z: Tensor) -> Tensor:
        return torch.sigmoid(self.gain * super().forward(z))


def log_p(likelihood: dict[str, Any], mean: Tensor, x: Tensor) -> Tensor:
    """log p(x|z) summed over the pixels."""
    if likelihood["type"] == "bernoulli":
        x = (x >= 0.5).double() if likelihood["binarize"] == "threshold" else x
        p = mean.clamp(float(np.finfo(np.float32).tiny), 1 - 2.0**-24)
        terms = x * p.log() + (1 - x) * torch.log1p(-p)
    else:
        kind = torch.distributions.Normal if likelihood["type"] == "gaussian" else torch.distributions.Laplace
        terms = kind(mean, likelihood["scale"]).log_prob(x)
    return terms.flatten(-3).sum(-1)


@pytest.mark.parametrize(
    ("likelihood", "gain"),
    [*((one, 3.0) for one in LIKELIHOODS), *((one, 15.0) for one in LIKELIHOODS if one["type"] == "bernoulli")],
    ids=lambda one: f"{one['type']}-{one.get('binarize', '')}" if isinstance(one, dict) else str(one),
)
@torch.no_grad()
def test_estimates_are_those_of_pytorch_in_float64(tmp_path: Path, likelihood: dict[str, Any], gain: float) -> None:
    torch.manual_seed(0)
    encoder, decoder = Encoder(), Decoder(gain)
    rng = np.random.default_rng(0)
    images = (rng.random((6, *SHAPE)) ** 3).astype(np.float32)
    export_bundle(encoder, decoder, tmp_path / "mlp.vae", examples=images, likelihood=likelihood, tolerance=1e-4)
    x, count = torch.from_numpy(images).double(), 400
    encoder, decoder = encoder.double(), decoder.double()
    seen = (x >= 0.5).double() if likelihood.get("binarize") == "threshold" else x
    mean, logvar = encoder(seen)
    posterior, prior = torch.distributions.Normal(mean, (0.5 * logvar).exp()), torch.distributions.Normal(0.0, 1.0)
    noise = NormalStream(3).draw(6 * count, (LATENT,)).reshape(6, count, LATENT)
    z = (mean[:, None] + (0.5 * logvar).exp()[:, None] * torch.from_numpy(noise).double()).transpose(0, 1)
    likelihoods = torch.stack([log_p(likelihood, decoder(one), x) for one in z])  # (count, 6)
    divergence = torch.distributions.kl_divergence(posterior, prior).sum(1)
    weights = likelihoods + prior.log_prob(z).sum(2) - posterior.log_prob(z).sum(2)
    reconstruction = decoder(mean)
    expected = {
        "elbo": likelihoods.mean(0) - divergence,
        "log_likelihood": weights.logsumexp(0) - math.log(count),
        "score": divergence - log_p(likelihood, reconstruction, x),
        "reconstruction_error": (reconstruction - seen).square().flatten(1).mean(1),
    }
    with VAE.load(tmp_path / "mlp.vae", threads=1) as vae:
        found = {
            "elbo": vae.elbo(images, count, seed=3),
            "log_likelihood": vae.log_likelihood(images, count, seed=3),
            "score": vae.score(images, "elbo"),
            "reconstruction_error": vae.reconstruction_error(images),
        }
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, err_msg=name)  # 1e-4 is what is promised
