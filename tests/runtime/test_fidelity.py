"""How far reconstructions are from what they are of."""

from __future__ import annotations

import numpy as np
import pytest

from vae_runtime.fidelity import data_range, psnr_db


def test_psnr_is_the_mean_over_examples_of_decibels() -> None:
    x = np.zeros((2, 1, 2, 2), np.float32)
    reconstruction = np.stack([np.full((1, 2, 2), 0.1), np.full((1, 2, 2), 0.01)]).astype(np.float32)
    assert psnr_db(reconstruction, x, 1.0) == pytest.approx(30, abs=1e-4)
    assert psnr_db(reconstruction, x, 10.0) == pytest.approx(50, abs=1e-4)
    assert psnr_db(x, x, 1.0) == 100


def test_the_range_is_that_of_the_data_or_of_all_images() -> None:
    x = np.array([[-1, 2], [0, 3]], np.float32)
    assert (data_range(x, is_image=False), data_range(x, is_image=True)) == (4, 1)
    assert data_range(np.full((2, 2), 7, np.float32), is_image=False) == 1
