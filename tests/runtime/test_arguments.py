"""Arguments of one kind are checked alike, whichever function takes them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from vae_runtime import InputError
from vae_runtime.arguments import check_choice, check_count, check_flag, check_threads


@pytest.mark.parametrize("value", [0, -3, 1.5, 2.0, True, "3", None])
def test_wrong_counts_are_refused(value: Any) -> None:
    with pytest.raises(InputError, match=r"^n is .*; expected a whole number from 1$"):
        check_count(value, "n")


def test_numpy_integers_are_whole_numbers() -> None:
    assert check_count(np.int16(3), "n") == 3
    assert type(check_count(np.int16(3), "n")) is int
    assert check_threads(np.uint8(2)) == 2
    assert type(check_threads(np.uint8(2))) is int
    assert (check_threads(1), check_threads(4096)) == (1, 4096)


@pytest.mark.parametrize("value", [0, 1, "yes", None, np.int8(1)])
def test_wrong_flags_are_refused(value: Any) -> None:
    with pytest.raises(InputError, match=r"^pad is .*; expected True or False$"):
        check_flag(value, "pad")
    assert check_flag(np.True_, "pad") is True


@pytest.mark.parametrize("value", ["", "Linear", None, ["linear"], 1])
def test_wrong_choices_are_refused(value: Any) -> None:
    with pytest.raises(InputError, match=r"^method is .*; expected one of linear, spherical$"):
        check_choice(value, "method", ("linear", "spherical"))
    assert check_choice("linear", "method", ("linear", "spherical")) == "linear"


@pytest.mark.parametrize("value", [0, -1, 4097, 1.0, True, "2"])
def test_wrong_thread_counts_are_refused(value: Any) -> None:
    with pytest.raises(InputError, match=r"^threads is .*; expected a whole number from 1 to 4096, or None"):
        check_threads(value)
    assert check_threads(None) is None
