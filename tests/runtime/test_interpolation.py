from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from vae_runtime import InputError
from vae_runtime.interpolation import METHODS, interpolate_latents


def pair(shape: tuple[int, ...] = (2, 3)) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(size=shape).astype(np.float32), 3 * rng.normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("steps", [2, 3, 8])
def test_both_ends_are_exact_and_the_shape_is_kept(method: str, steps: int) -> None:
    a, b = pair()
    path = interpolate_latents(a, b, steps, method)
    assert path.shape == (steps, 2, 3)
    assert path.dtype == np.float32
    assert np.array_equal(path[0], a)
    assert np.array_equal(path[-1], b)


def test_linear_is_the_straight_line() -> None:
    a, b = pair()
    path = interpolate_latents(a, b, 5, "linear")
    assert np.allclose(path, [a + t * (b.astype(np.float64) - a) for t in (0, 0.25, 0.5, 0.75, 1)], atol=1e-6)


def test_spherical_turns_at_an_even_angle_and_changes_length_evenly() -> None:
    a, b = pair((20,))
    path = interpolate_latents(a, b, 9, "spherical").astype(np.float64)
    lengths = np.linalg.norm(path, axis=1)
    assert np.allclose(np.diff(lengths, 2), 0, atol=1e-5)
    units = path / lengths[:, None]
    angles = np.arccos((units[1:] * units[:-1]).sum(axis=1))
    assert np.ptp(angles) < 1e-5
    assert angles.sum() == pytest.approx(np.arccos(units[0] @ units[-1]), abs=1e-6)


def test_spherical_keeps_the_length_where_linear_cuts_through_the_middle() -> None:
    a, b = np.array([1.0, 0.0], np.float32), np.array([0.0, 1.0], np.float32)
    half = np.float32(np.sqrt(0.5))
    assert np.allclose(interpolate_latents(a, b, 3, "spherical")[1], [half, half])
    assert np.allclose(interpolate_latents(a, b, 3, "linear")[1], [0.5, 0.5])


@pytest.mark.parametrize(
    ("a", "b"),
    [((1, 2, 3), (2, 4, 6)), ((1, 2, 3), (-1, -2, -3)), ((0, 0, 0), (1, 2, 3)), ((1, 2, 3), (0, 0, 0)),
     ((0, 0, 0), (0, 0, 0)), ((1, 2, 3), (1, 2, 3)), ((1e-30, 0, 0), (1e-30, 0, 0)), ((1e-45, 0, 0), (3e38, 0, 0)),
     ((0.12573022, -0.13210486), (0.12573022, -0.13210486)),  # whose cosine is rounded to above 1
     ((0.12573022, -0.13210486), (-0.12573022, 0.13210486))],
)  # fmt: skip
def test_ends_that_have_no_angle_between_them_are_joined_linearly_and_stay_finite(a: Any, b: Any) -> None:
    start, end = np.array(a, np.float32), np.array(b, np.float32)
    path = interpolate_latents(start, end, 5, "spherical")
    assert np.isfinite(path).all()
    assert np.array_equal(path, interpolate_latents(start, end, 5, "linear"))


def test_nearly_parallel_and_nearly_opposite_ends_stay_between_their_lengths() -> None:
    a = np.array([1.0, 0.0], np.float32)
    for angle in (1e-7, 1e-5, 1e-3, np.pi - 1e-3, np.pi - 1e-5):
        b = np.array([np.cos(angle), np.sin(angle)], np.float32)
        lengths = np.linalg.norm(interpolate_latents(a, b, 9, "spherical").astype(np.float64), axis=1)
        assert lengths.max() < 1.001


def test_ends_are_not_changed_and_not_shared() -> None:
    a, b = pair()
    before = a.copy()
    interpolate_latents(a, b, 3)[:] = 0
    assert np.array_equal(a, before)


@pytest.mark.parametrize("steps", [1, 0, -1, 2.0, True, None])
def test_wrong_steps_are_refused(steps: Any) -> None:
    with pytest.raises(InputError, match=r"steps is .*; expected a whole number from 2"):
        interpolate_latents(*pair(), steps)


@pytest.mark.parametrize("steps", [2**56, 2**62, 2**70])
def test_more_steps_than_memory_are_refused(steps: int) -> None:
    with pytest.raises(InputError, match=f"steps is {steps}; that many points do not fit into memory"):
        interpolate_latents(*pair(), steps)


@pytest.mark.parametrize("method", ["cubic", None, ["linear"]])
def test_unknown_methods_are_refused(method: Any) -> None:
    with pytest.raises(InputError, match=r"method is .*; expected one of linear, spherical"):
        interpolate_latents(*pair(), 3, method)
