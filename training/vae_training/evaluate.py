"""The figures of a trained model on one part of the data, in nats per example."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vae_runtime.fidelity import decibels
from vae_runtime.latent_space import ACTIVE_VARIANCE
from vae_runtime.preprocess import Float32, Float64

from .feed import EVALUATE, RECALIBRATE, standard_normal
from .losses import Objective, free_bits_kl, kl_per_dimension
from .models import VAE, reparameterize

BATCH = 500  # examples, or fewer where they are large
BATCH_ELEMENTS = 2**23


@torch.no_grad()
def measure(objective: Objective, x: Float32, seed: int, draws: int = 5) -> dict[str, Any]:
    """Measure `objective` in evaluation mode on x, float32 (N, *input_shape).

    Returns for a vae: `negative_elbo_nats` = `reconstruction_nats` + `kl_nats` as means over the examples and over
    `draws` posterior draws each, with the standard error over the examples (None of one), of which the noise of the
    draws is a part (of 5 draws 0.06 nats on the test part of the digits), and `active_units`; where latents are (C, h,
    w), their KL is the sum over all elements, and units are the channels, each over all examples and positions, which
    share their weights. With free bits also what the loss counts of the KL, `free_bits_kl_nats`.
    For both kinds: with a gradient weight `gradient_nats`, see `Objective.gradient_cost`, by the same draws; the `mse`
    of the reconstruction from the posterior's mean or the code, and for images `psnr_db`, the mean over images of
    10·log10(1 / mse), a perfect one as 100 dB. The Bernoulli with grey values and the Gaussian have different zeros: a
    figure is comparable only under the same likelihood.
    """
    objective.eval()
    parts = [_measure_batch(objective, batch, seed, draws, index) for index, batch in enumerate(batches(x, objective))]
    nll, edges, kl, mse, means, kl_sums = (
        torch.cat(column).cpu().double().numpy()  # in this order: Apple's GPUs have no float64
        for column in zip(*parts, strict=True)
    )
    figures: dict[str, Any] = {"examples": len(x), "reconstruction_nats": float(nll.mean()), "mse": float(mse.mean())}
    if x.ndim == 4:
        figures["psnr_db"] = float(decibels(mse).mean())
    if objective.gradient_weight:
        figures["gradient_nats"] = float(edges.mean())
    if isinstance(objective.model, VAE):
        negative_elbo = nll + kl
        figures["draws"] = draws
        figures["kl_nats"] = float(kl.mean())
        figures["negative_elbo_nats"] = float(negative_elbo.mean())
        figures["negative_elbo_standard_error_nats"] = standard_error(negative_elbo)
        if objective.free_bits:
            figures["free_bits_kl_nats"] = float(
                free_bits_kl(torch.from_numpy(kl_sums.sum(axis=0)[None] / len(x)), objective.free_bits)
            )
        figures["active_units"] = int((means.var(axis=0) > ACTIVE_VARIANCE).sum())
    else:
        figures["reconstruction_standard_error_nats"] = standard_error(nll)
    return figures


def standard_error(values: Float64) -> float | None:
    """Of their mean; one value tells none."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


def _measure_batch(objective: Objective, x: Tensor, seed: int, draws: int, index: int) -> tuple[Tensor, ...]:
    """(N, ...) -> nll, what wrong edges cost, kl and mse, all (N,), mean or code (N · positions, latent_dim), the KL of
    each latent element summed over the examples (1, elements)."""
    model = objective.model
    if isinstance(model, VAE):
        mean, logvar = model.encode(x)
        each = kl_per_dimension(mean, logvar).flatten(1)
        kl, kl_sums = each.sum(1), each.sum(0, keepdim=True)
        noises = (standard_normal(mean.shape, seed, EVALUATE, index, draw, x.device) for draw in range(draws))
        costs = [_costs(objective, model.decode_logits(reparameterize(mean, logvar, noise)), x) for noise in noises]
    else:
        mean = model.encode(x)
        kl, kl_sums = mean.new_zeros(len(x)), mean.new_zeros(1, 1)
        costs = [_costs(objective, model.decode_logits(mean), x)]
    nll, edges = (sum(column, torch.zeros_like(kl)) / len(costs) for column in zip(*costs, strict=True))
    mse = (model.decode(mean) - x).square().flatten(1).mean(1)
    return nll, edges, kl, mse, mean.movedim(1, -1).flatten(0, -2), kl_sums


def _costs(objective: Objective, logits: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Of each example, -log p(x|z) and what wrong edges cost, which vectors do not have."""
    nll = objective.negative_log_likelihood(logits, x)
    return nll, objective.gradient_cost(logits, x) if objective.gradient_weight else torch.zeros_like(nll)


def figure_of_merit(figures: dict[str, Any], beta: float = 1.0) -> float:
    """What early stopping and the choice of the best weights go by, the lower the better: what is trained for, the
    reconstruction, the KL, with the weight β that it has after the warm-up and with free bits, if there are any, and
    what wrong edges cost, if they have a weight.

    -ELBO itself would call the first weights the best where β is a millionth, those from within the warm-up where β is
    above 1, with free bits those before the units are in use, and those before the edges are learned.
    """
    kl = figures.get("free_bits_kl_nats", figures.get("kl_nats", 0.0))
    return float(figures["reconstruction_nats"] + beta * kl + figures.get("gradient_nats", 0.0))


@torch.no_grad()
def recalibrate(objective: Objective, x: Float32, seed: int) -> None:
    """Set BatchNorm's statistics to those of the present weights over x, (N, *input_shape) of the train part.

    Averaged weights have activations of their own, which the statistics collected with other weights do not describe
    (Izmailov et al., 2018, arXiv:1803.05407, section 3.2). Leaves `objective` in evaluation mode.
    """
    layers = [layer for layer in objective.modules() if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d))]
    if layers:
        momenta = [layer.momentum for layer in layers]
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # a plain average over the batches
        objective.train()
        latent = objective.model.config.latent_shape
        for index, batch in enumerate(batches(x, objective)):
            objective(batch, standard_normal((len(batch), *latent), seed, RECALIBRATE, index, 0, batch.device))
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
    objective.eval()


def batches(x: Float32, objective: Objective) -> list[Tensor]:
    """x, inputs or latents, in parts of nearly equal size, on the device of `objective`."""
    device = next(objective.parameters()).device
    size = max(4, min(BATCH, BATCH_ELEMENTS // math.prod(objective.model.config.input_shape)))
    return [torch.from_numpy(part).to(device) for part in np.array_split(x, -(-len(x) // size))]
