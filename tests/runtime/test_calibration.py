from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from vae_runtime.calibration import Calibration
from vae_runtime.errors import BundleError, InputError, NotInBundleError

LEVELS = (0.0, 0.25, 0.5, 0.9, 1.0)


def calibration(examples: int = 1000, **scores: tuple[float, ...]) -> Calibration:
    return Calibration("held-out", examples, LEVELS, scores or {"elbo": (-2.0, 1.0, 3.0, 3.0, 11.0)})


@pytest.mark.parametrize("quantile", [0.001, 0.1, 0.25, 0.3, 0.5, 0.7, 0.9, 0.95, 0.999])
def test_threshold_is_linear_between_the_levels(quantile: float) -> None:
    expected = np.interp(quantile, LEVELS, (-2.0, 1.0, 3.0, 3.0, 11.0))
    assert calibration().threshold("elbo", quantile) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("quantile", [0, 1, -0.5, 1.5, float("nan"), float("inf"), True, None, "0.99"])
def test_quantile_outside_of_0_to_1_is_refused(quantile: Any) -> None:
    with pytest.raises(InputError, match=r"quantile is .*; expected a number above 0 and below 1"):
        calibration().threshold("elbo", quantile)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_quantile_may_be_a_number_of_numpy(dtype: type[np.floating]) -> None:
    assert calibration().threshold("elbo", dtype(0.75)) == calibration().threshold("elbo", 0.75)
    found = calibration().threshold("elbo", dtype(0.8))
    assert (type(found), found) == (float, calibration().threshold("elbo", float(dtype(0.8))))


def test_quantile_that_so_few_examples_cannot_tell_is_refused() -> None:
    assert calibration(100).threshold("elbo", 0.99) == pytest.approx(3 + 8 * 0.9)
    with pytest.raises(InputError, match=r"calibrated on 100 examples, which tell quantiles up to 0\.99"):
        calibration(100).threshold("elbo", 0.991)


def test_method_that_was_not_calibrated_is_named_with_the_command() -> None:
    with pytest.raises(
        NotInBundleError, match=r"by 'reconstruction' .* only by elbo; .* vae-export SOURCE --calibrate"
    ):
        calibration().threshold("reconstruction", 0.9)


def test_scores_of_no_method_are_refused() -> None:
    with pytest.raises(BundleError, match=r"calibration.scores is \{\}; expected the scores of at least one method"):
        Calibration.from_dict({**calibration().to_dict(), "scores": {}})


def test_dict_and_back_is_the_same() -> None:
    both = calibration(200, elbo=(0.0, 1.0, 1.0, 2.0, 3.0), reconstruction=(0.0, 0.5, 0.5, 0.5, 0.75))
    assert Calibration.from_dict(both.to_dict()) == both
