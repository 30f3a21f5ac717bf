"""The likelihood of the data under a trained VAE, by importance sampling: what -ELBO is an upper bound of."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vae_runtime.preprocess import Float32

from .evaluate import batches, standard_error
from .feed import LIKELIHOOD, standard_normal
from .losses import Objective
from .models import VAE, reparameterize


@torch.no_grad()
def measure_nll(objective: Objective, x: Float32, seed: int, samples: int, progress: bool = False) -> dict[str, Any]:
    """-log p(x) in nats per example, its mean over x, float32 (N, *input_shape), and the standard error of that mean.

    Of each example -log of the mean over `samples` posterior draws of p(x|z) p(z) / q(z|x) (Burda et al., 2016,
    arXiv:1509.00519, equation 8): in expectation too large, and the less so the more draws there are. One draw of a
    batch is in memory at a time, the draws a function of the seed. objective: of a vae. progress: show a bar on stderr.
    """
    from tqdm import tqdm

    objective.eval()
    divided = batches(x, objective)
    with tqdm(
        total=samples * len(divided), desc="likelihood", unit="draw", disable=not progress, mininterval=0.5
    ) as bar:
        parts = [_nll(objective, batch, seed, samples, index, bar.update) for index, batch in enumerate(divided)]
    nll = torch.cat(parts).numpy()
    return {"nll_nats": float(nll.mean()), "nll_standard_error_nats": standard_error(nll), "nll_samples": samples}


def _nll(objective: Objective, x: Tensor, seed: int, samples: int, index: int, advance: Callable[[], Any]) -> Tensor:
    """(N, ...) -> float64 (N,) on the CPU; the sum of the weights is carried as its logarithm."""
    model = objective.model
    assert isinstance(model, VAE)
    mean, logvar = model.encode(x)
    total = torch.full((len(x),), -np.inf, dtype=torch.float64)
    for draw in range(samples):
        noise = standard_normal(mean.shape, seed, LIKELIHOOD, index, draw, x.device)
        z = reparameterize(mean, logvar, noise)
        # log p(z) - log q(z|x); (2π)^(-D/2) is in both.
        log_ratio = 0.5 * (noise.square() + logvar - z.square()).flatten(1).sum(1)
        weight = log_ratio - objective.negative_log_likelihood(model.decode_logits(z), x)
        total = torch.logaddexp(total, weight.cpu().double())
        advance()
    return math.log(samples) - total
