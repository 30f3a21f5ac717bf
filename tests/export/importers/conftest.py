"""One real photograph, cut to sizes, and a model's halves compared on it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

datasets = pytest.importorskip("sklearn.datasets", reason="the photograph is scikit-learn's")


@pytest.fixture(scope="session")
def crops() -> Callable[..., np.ndarray]:
    """(count, height, width) -> that many different parts of the photograph, float32 (count, 3, H, W) in [0, 1]."""
    photograph = datasets.load_sample_images().images[0]

    def cut(count: int, height: int, width: int) -> np.ndarray:
        parts = [photograph[40 * n : 40 * n + height, 100 * n : 100 * n + width] for n in range(count)]
        return np.ascontiguousarray(np.stack(parts).transpose(0, 3, 1, 2), np.float32) / np.float32(255)

    return cut
