"""What is minimised, in nats per example: -ELBO = reconstruction + KL (Kingma and Welling, 2014, arXiv:1312.6114).

Every function returns one number per example, summed over its elements, so that figures compare with the literature's.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae_runtime.manifest import Likelihood

from .models import VAE, Autoencoder, reparameterize

_LOG_TWO_PI = math.log(2 * math.pi)


def bernoulli_nll(logits: Tensor, x: Tensor) -> Tensor:
    """-log p(x|z) of a Bernoulli with these logits; both (N, ...), x in [0, 1] -> (N,) nats.

    Grey values count as probabilities, the usual convention for images: this is then a cross-entropy, not a likelihood
    that sums to one (Loaiza-Ganem and Cunningham, 2019, arXiv:1907.06845).
    """
    return F.binary_cross_entropy_with_logits(logits, x, reduction="none").flatten(1).sum(1)


def gaussian_nll(mean: Tensor, x: Tensor, log_scale: Tensor) -> Tensor:
    """-log p(x|z) of a Gaussian with one standard deviation exp(log_scale), in the data's units; (N, ...) -> (N,) nats.

    A density: it may be negative, and it depends on the unit. Learning σ balances reconstruction against KL without a
    hand-set weight (Rybkin, Daniilidis and Levine, 2021, arXiv:2006.13202).
    """
    squared = ((x - mean) * torch.exp(-log_scale)).square()
    return (0.5 * squared + log_scale + 0.5 * _LOG_TWO_PI).flatten(1).sum(1)


def laplace_nll(mean: Tensor, x: Tensor, log_scale: Tensor) -> Tensor:
    """-log p(x|z) of a Laplace density with one scale b = exp(log_scale), in the data's units; (N, ...) -> (N,) nats.

    log(2b) + |x - mean| / b: absolute errors instead of squared ones, which leaves edges sharper. The best b is the
    mean absolute error. A density, like the Gaussian's.
    """
    return ((x - mean).abs() * torch.exp(-log_scale) + log_scale + math.log(2)).flatten(1).sum(1)


def gradient_difference(mean: Tensor, x: Tensor) -> Tensor:
    """How far the edges of two batches of images (N, C, H, W) are from each other, (N,), in the data's units.

    Σ ||Δx| - |Δmean|| over neighbouring pixels, vertical and horizontal: the gradient difference loss with α = 1 of
    Mathieu, Couprie and LeCun, 2016, arXiv:1511.05440.
    """
    sums = [(x.diff(dim=dim).abs() - mean.diff(dim=dim).abs()).abs().flatten(1).sum(1) for dim in (2, 3)]
    return sums[0] + sums[1]


def kl_per_dimension(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, exp(logvar)) ‖ N(0, 1)) of each latent dimension, (N, *latent_shape) nats.

    Kingma and Welling, appendix B.
    """
    return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar)


def free_bits_kl(kl: Tensor, free_bits: float) -> Tensor:
    """KL per dimension (N, *latent_shape) -> a scalar, in which each dimension costs at least `free_bits` nats.

    Σ_j max(free_bits, mean over the batch of KL_j), Kingma et al., 2016, arXiv:1606.04934, equation 15: below that no
    gradient pushes a dimension towards the prior. With free_bits 0 it is the mean KL.
    """
    return kl.mean(0).clamp(min=free_bits).sum()


def linear_rise(step: int, rising_steps: int, end: float) -> float:
    """What rises linearly from 0 to `end` over `rising_steps`, and then stays: the KL's weight up to β (Sønderby et
    al., 2016, arXiv:1602.02282), or the KL that is asked for up to a capacity in nats."""
    return end * min(1.0, step / rising_steps) if rising_steps > 0 else end


def capacity_gap(kl: Tensor, capacity: float) -> Tensor:
    """KL per example (N,) -> a scalar: |mean KL - capacity| - ½ nat, and within one nat ½ (mean KL - capacity)².

    Burgess et al., 2018, arXiv:1804.03599, equation 8, take the distance itself. Its gradient is as large next to the
    capacity as far from it and turns round from batch to batch, in which Adam loses the reconstruction's: digits at 8
    nats were left with 27.0 nats of reconstruction by it, and with 21.9 by this one.
    """
    return F.huber_loss(kl.mean(), kl.new_tensor(capacity))


class _ClampBelow(torch.autograd.Function):
    """`clamp(min=floor)` whose gradient leads back: below the floor it is that of the floor where a step against it
    raises the value, and 0 where it would lower it further. `clamp` itself has 0 there in either case, so that a value
    that overshot once would stay."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, floor: float) -> Tensor:
        ctx.save_for_backward(value < floor)
        return value.clamp(min=floor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (is_below,) = ctx.saved_tensors
        return gradient.masked_fill(is_below & (gradient > 0), 0), None


class Objective(nn.Module):
    """A model together with its likelihood: one module, so that everything trained goes through one `forward`.

    likelihood: "bernoulli" (images), or "gaussian" or "laplace", whose scale is learned as `log_scale`, in the data's
        units, and never falls below a ten-thousandth of `scale`, its first value.
    free_bits: nats per latent dimension.
    gradient_weight: of `gradient_difference` in the loss, in units of the scale (1 for the Bernoulli): with the weight
        1 a wrong difference of two neighbours costs what a wrong value costs under a Laplace density of that scale. It
        is no part of the likelihood and leaves the learning of the scale to it.
    """

    log_scale: Tensor

    def __init__(
        self, model: Autoencoder, likelihood: str, scale: float = 1.0, free_bits: float = 0.0,
        gradient_weight: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.model = model
        self.likelihood = likelihood
        self.free_bits = free_bits
        self.gradient_weight = gradient_weight
        self.first_scale = 1.0 if likelihood == "bernoulli" else scale
        if likelihood != "bernoulli":
            self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))
            # Data that are reconstructed exactly would send the scale to 0 and the density to infinity.
            self.min_log_scale = math.log(scale) + math.log(1e-4)

    def forward(self, x: Tensor, noise: Tensor, weight: float = 1.0, capacity: float | None = None) -> Tensor:
        """The loss of one batch, a scalar in nats per example.

        x: input and target (N, *input_shape); noise (N, *latent_shape): for the posterior; weight: of the KL.
        capacity: nats; given, the batch's mean KL is drawn to it instead of to 0, see `capacity_gap`.
        """
        if isinstance(self.model, VAE):
            mean, logvar = (part.float() for part in self.model.encode(x))
            kl = kl_per_dimension(mean, logvar)
            logits = self.model.decode_logits(reparameterize(mean, logvar, noise)).float()
            summed = kl.flatten(1).sum(1)
            cost = free_bits_kl(kl, self.free_bits) if capacity is None else capacity_gap(summed, capacity)
            regularisation = weight * cost
        else:
            logits = self.model.decode_logits(self.model.encode(x)).float()
            regularisation = logits.new_zeros(())
        loss = self.negative_log_likelihood(logits, x).mean() + regularisation
        if self.gradient_weight:
            loss = loss + self.gradient_weight * self._edges(logits, x)
        return loss

    def gradient_cost(self, logits: Tensor, x: Tensor) -> Tensor:
        """What wrong differences of neighbours cost, (N,) nats, as measured: in units of the first scale.

        In the loss the unit is the present scale, which shrinks as reconstructions get better: by that the same
        differences would cost more from epoch to epoch, and the first epochs would look the best.
        """
        return self.gradient_weight / self.first_scale * gradient_difference(self.model.to_mean(logits), x)

    def negative_log_likelihood(self, logits: Tensor, x: Tensor) -> Tensor:
        """The decoder's logits and the target x, (N, *input_shape) -> -log p(x|z), (N,) nats."""
        if self.likelihood == "bernoulli":
            return bernoulli_nll(logits, x)
        density = gaussian_nll if self.likelihood == "gaussian" else laplace_nll
        return density(self.model.to_mean(logits), x, self._log_scale())

    def to_likelihood(self, binarize: str) -> Likelihood:
        """The likelihood as bundles and checkpoints record it."""
        if self.likelihood == "bernoulli":
            return Likelihood("bernoulli", binarize=binarize)
        return Likelihood(self.likelihood, scale=self.scale)

    @property
    def scale(self) -> float:
        """Of the density, in the data's units; infinite where the run has diverged; 1 for the Bernoulli."""
        return 1.0 if self.likelihood == "bernoulli" else float(self._log_scale().detach().exp())

    def _log_scale(self) -> Tensor:
        clamped: Tensor = _ClampBelow.apply(self.log_scale, self.min_log_scale)
        return clamped

    def _edges(self, logits: Tensor, x: Tensor) -> Tensor:
        differences = gradient_difference(self.model.to_mean(logits), x).mean()
        return differences if self.likelihood == "bernoulli" else differences * torch.exp(-self._log_scale().detach())
