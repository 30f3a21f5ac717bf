"""Arguments of one kind are checked alike, whichever function takes them."""

from __future__ import annotations

import os
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vae_runtime import InputError
from vae_runtime.arguments import check_choice, check_count, check_flag, check_number, check_path, check_threads
from vae_runtime.bundle import Bundle

MOST_THREADS = max(256, 4 * (os.cpu_count() or 1))


@pytest.mark.parametrize("value", [0, -3, 1.5, 2.0, True, "3", None])
def test_wrong_counts_are_refused(value: Any) -> None:
    with pytest.raises(InputError, match=r"^n is .*; expected a whole number from 1$"):
        check_count(value, "n")


@pytest.mark.parametrize("value", [0, 8, 1.5, True, "3", None])
def test_counts_have_an_upper_end_where_one_is_given(value: Any) -> None:
    with pytest.raises(InputError, match=r"^n is .*; expected a whole number from 2 to 7$"):
        check_count(value, "n", least=2, most=7)
    assert [check_count(number, "n", least=2, most=7) for number in (2, 7)] == [2, 7]


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 10**400, True, np.True_, "3", None, 1j])
def test_what_is_no_finite_number_is_refused(value: Any) -> None:
    with pytest.raises(InputError, match=r"^shift is .*; expected a finite number$"):
        check_number(value, "shift")


@pytest.mark.parametrize("value", [0, -1.5, np.float32(0)])
def test_numbers_have_a_lower_end_where_one_is_given(value: Any) -> None:
    with pytest.raises(InputError, match=r"^scale is .*; expected a finite number above 0$"):
        check_number(value, "scale", above=0)
    with pytest.raises(InputError, match=r"^scale is .*; expected a finite number from 0.1$"):
        check_number(value, "scale", least=0.1)
    assert (check_number(1e-9, "scale", above=0), check_number(0.1, "scale", least=0.1)) == (1e-9, 0.1)


@pytest.mark.parametrize("value", [np.float32(0.5), np.float16(0.5), np.float64(0.5), Fraction(1, 2)])
def test_other_kinds_of_numbers_become_floats(value: Any) -> None:
    assert type(check_number(value, "scale")) is float
    assert check_number(value, "scale") == 0.5
    assert type(check_number(np.uint8(3), "scale")) is float


def test_numpy_integers_are_whole_numbers() -> None:
    assert check_count(np.int16(3), "n") == 3
    assert type(check_count(np.int16(3), "n")) is int
    assert check_threads(np.uint8(2)) == 2
    assert type(check_threads(np.uint8(2))) is int
    assert (check_threads(1), check_threads(256)) == (1, 256)
    assert check_threads(MOST_THREADS) == MOST_THREADS


NO_TEXT = pytest.param("\ud800", marks=pytest.mark.skipif(sys.platform == "win32", reason="names there may be no text"))


@pytest.mark.parametrize("value", [None, 5, b"a.vae", "", "a\0b", NO_TEXT])
def test_what_names_no_folder_is_refused(value: Any) -> None:
    with pytest.raises(InputError, match=r"(?s)^path is .*; expected .*the name of a folder"):
        check_path(value, "path")
    with pytest.raises(InputError, match="path is"):
        Bundle.open(value)
    assert check_path("a.vae", "path") == check_path(Path("a.vae"), "path") == Path("a.vae")


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


@pytest.mark.parametrize("value", [0, -1, MOST_THREADS + 1, 1.0, True, "2"])
def test_wrong_thread_counts_are_refused(value: Any) -> None:
    with pytest.raises(InputError, match=rf"^threads is .*; expected a whole number from 1 to {MOST_THREADS} "):
        check_threads(value)
    assert check_threads(None) is None
