"""AdamW, its schedule, and the moving average of the weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


def make_optimizer(module: nn.Module, learning_rate: float, weight_decay: float, fused: bool) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter, 2019, arXiv:1711.05101); biases, BatchNorm and σ do not decay.

    σ is a scalar on a logarithmic scale with far to go, so it goes ten times as fast: `set_learning_rate` keeps that.
    """
    by_rank: list[list[nn.Parameter]] = [[], [], []]  # σ; biases and BatchNorm; weights
    for parameter in module.parameters():
        by_rank[min(parameter.ndim, 2)].append(parameter)
    settings = ({"weight_decay": 0.0, "speed": 10.0}, {"weight_decay": 0.0}, {"weight_decay": weight_decay})
    groups = [{"params": group, "speed": 1.0, **given} for group, given in zip(by_rank, settings, strict=True) if group]
    return torch.optim.AdamW(groups, lr=learning_rate, fused=fused)


def set_learning_rate(optimizer: Any, rate: float) -> None:
    """Set every group's rate to `rate` times its speed."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["speed"]


def learning_rate(step: int, steps: int, highest: float, warmup: float) -> float:
    """Linear from 0 to `highest` over the part `warmup` of all steps, then a half cosine down to 0.

    The cosine: Loshchilov and Hutter, 2017, arXiv:1608.03983, without restarts.
    """
    rising = warmup * steps
    if step < rising:
        return highest * (step + 1) / (rising + 1)
    return highest * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1.0, steps - rising)))


def moving_average(module: nn.Module, decay: float) -> AveragedModel:
    """A copy of `module` whose weights follow it; `update_parameters` after each step.

    It forgets faster in the beginning, when the first weights would weigh too much.
    """

    @torch.no_grad()
    def update(averaged: Any, current: Any, count: Tensor | int) -> None:
        steps = int(count)
        torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + steps) / (10 + steps)))

    return AveragedModel(module, multi_avg_fn=update)
