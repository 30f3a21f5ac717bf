"""Paths between two points of the latent space."""

from __future__ import annotations

import numpy as np

from .arguments import check_choice, check_count
from .errors import InputError
from .preprocess import Float32, Float64

METHODS = ("linear", "spherical")


def interpolate_latents(start: Float32, end: Float32, steps: int, method: str = "spherical") -> Float32:
    """Points from `start` to `end`, each of the latent's shape -> float32 (steps, *latent_shape).

    Both ends are included and exact. "linear" is the straight line. "spherical" turns at an even angle and lets the
    length change evenly, so that points do not pass through the origin, where a Gaussian in many dimensions has no mass
    (after slerp: Shoemake, 1985; White, 2016); where the two ends point the same or the opposite way it is linear.

    Raises:
        InputError: fewer than 2 steps, or another method.
    """
    steps = check_count(steps, "steps", least=2)
    check_choice(method, "method", METHODS)
    a, b = start.astype(np.float64).ravel(), end.astype(np.float64).ravel()
    try:
        t = np.linspace(0.0, 1.0, steps)[:, None]
        path = (_slerp if method == "spherical" else _lerp)(a, b, t).astype(np.float32)
    except (MemoryError, ValueError, OverflowError):
        raise InputError(f"steps is {steps}; that many points do not fit into memory") from None
    path[0], path[-1] = start.ravel(), end.ravel()
    return path.reshape(steps, *start.shape)


def _lerp(a: Float64, b: Float64, t: Float64) -> Float64:
    return np.asarray((1.0 - t) * a + t * b)


def _slerp(a: Float64, b: Float64, t: Float64) -> Float64:
    length_a, length_b = np.linalg.norm(a), np.linalg.norm(b)
    if length_a == 0 or length_b == 0:
        return _lerp(a, b, t)
    unit_a, unit_b = a / length_a, b / length_b
    angle = np.arccos(np.clip(unit_a @ unit_b, -1.0, 1.0))
    if np.sin(angle) < 1e-6:
        return _lerp(a, b, t)
    direction = (np.sin((1.0 - t) * angle) * unit_a + np.sin(t * angle) * unit_b) / np.sin(angle)
    return np.asarray(direction * ((1.0 - t) * length_a + t * length_b))
