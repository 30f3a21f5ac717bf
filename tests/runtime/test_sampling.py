from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from vae_runtime import InputError
from vae_runtime.sampling import NormalStream, check_seed, check_temperature

# numpy.random.Generator(Philox(seed)).standard_normal(dtype=float32), as bits: what a seed means may never change.
PINNED = {
    0: [
        "-0x1.fc5f920000000p-3",
        "-0x1.b68d000000000p-6",
        "-0x1.f1c5440000000p+0",
        "0x1.0c957c0000000p-1",
        "-0x1.28e3780000000p-3",
        "0x1.0a70d40000000p-1",
    ],
    12345: [
        "-0x1.ec39720000000p-1",
        "0x1.beb1580000000p-1",
        "-0x1.50cf6a0000000p-2",
        "0x1.5d11ac0000000p+0",
        "-0x1.1d5cbe0000000p-1",
        "0x1.db21a00000000p-4",
    ],
    2**70: [
        "-0x1.5e4d4a0000000p-4",
        "-0x1.5e5e6e0000000p-1",
        "-0x1.808ce00000000p+0",
        "-0x1.6538380000000p-1",
        "0x1.3c42fe0000000p-2",
        "0x1.a5a6940000000p-2",
    ],
}


@pytest.mark.parametrize("seed", PINNED)
def test_draws_are_those_of_the_pinned_test_vector(seed: int) -> None:
    assert [float(value).hex() for value in NormalStream(seed).draw(2, (3,)).ravel()] == PINNED[seed]


def test_draws_are_float32_and_fill_example_by_example() -> None:
    draws = NormalStream(3).draw(5, (2, 3))
    assert draws.dtype == np.float32
    assert draws.shape == (5, 2, 3)
    assert np.array_equal(NormalStream(3).draw(9, (2, 3))[:5], draws)
    assert np.array_equal(NormalStream(3).draw(30, ()), draws.ravel())


@pytest.mark.parametrize("sizes", [(1,) * 10, (3, 3, 4), (9, 1), (10,)])
def test_chunks_join_without_a_seam(sizes: tuple[int, ...]) -> None:
    stream, whole = NormalStream(8), NormalStream(8).draw(10, (7,))
    assert np.array_equal(np.concatenate([stream.draw(size, (7,)) for size in sizes]), whole)


def test_seeds_differ_and_none_is_fresh_entropy() -> None:
    draws = [NormalStream(seed).draw(1, (4,)).tobytes() for seed in (0, 1, 2**64, None, None)]
    assert len(set(draws)) == 5


def test_draws_are_standard_normal() -> None:
    draws = NormalStream(1).draw(100_000, ()).astype(np.float64)
    assert abs(draws.mean()) < 0.015
    assert abs(draws.std() - 1) < 0.01
    assert abs((np.abs(draws) < 1).mean() - 0.6827) < 0.006


@pytest.mark.parametrize("seed", [-1, 1.0, True, "0", [1], np.float32(1), float("nan")])
def test_wrong_seeds_are_refused(seed: Any) -> None:
    with pytest.raises(InputError, match=r"seed is .*; expected a whole number from 0, or None for fresh entropy"):
        check_seed(seed)


def test_numpy_integers_are_whole_numbers() -> None:
    assert check_seed(np.uint64(2**63)) == 2**63


@pytest.mark.parametrize(
    "value", [-0.1, float("nan"), float("inf"), "1", None, True, 1e39, 10**400, np.float32("inf"), [1.0]]
)
def test_wrong_temperatures_are_refused(value: Any) -> None:
    with pytest.raises(InputError, match=r"temperature is .*; expected a finite float32 number from 0"):
        check_temperature(value)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [0, 0.0, 1, 0.7, np.float64(0.7), np.float16(0.7), np.int32(2), 3e38])
def test_good_temperatures_are_float32(value: Any) -> None:
    assert check_temperature(value) == np.float32(value)
    assert type(check_temperature(value)) is np.float32
