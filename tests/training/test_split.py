import numpy as np
import pytest

from vae_runtime.errors import InputError
from vae_training.split import leave_out, split_indices


@pytest.mark.parametrize("order", ["seeded", "file"])
@pytest.mark.parametrize("split", ["0.8,0.1,0.1", "0.7, 0.2, 0.1", "30,10,7"])
def test_parts_are_disjoint_and_complete(split: str, order: str) -> None:
    parts = split_indices(47, split, order, 3)
    joined = np.concatenate([parts.train, parts.validation, parts.test])
    assert sorted(joined.tolist()) == list(range(47))
    assert (joined.tolist() == list(range(47))) == (order == "file")


def test_counts_may_leave_some_out() -> None:
    parts = split_indices(100, "5,3,2", "file", 0)
    assert (parts.train.tolist(), parts.validation.tolist(), parts.test.tolist()) == (
        [0, 1, 2, 3, 4],
        [5, 6, 7],
        [8, 9],
    )


def test_the_seed_decides_and_repeats() -> None:
    first, again, other = (split_indices(50, "0.8,0.1,0.1", "seeded", seed) for seed in (1, 1, 2))
    assert first.test.tolist() == again.test.tolist()
    assert first.test.tolist() != other.test.tolist()


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("0.8,0.1", "split is '0.8,0.1'; expected three counts"),
        ("0.8,0.1,0.2", "fractions that sum to 1"),
        ("a,b,c", "expected three counts"),
        ("", "expected three counts"),
        ("-5,3,2", "expected three counts"),
        ("nan,0.5,0.5", "expected three counts"),
        ("1.0,0.0,0.0", "expected three counts"),
        ("8,2,0", "which leaves no example of 10 for the test part"),
        ("0,5,5", "which leaves no example of 10 for the train part"),
        ("8,2,1", "11 examples in all; there are 10"),
    ],
)
def test_bad_splits_are_named(split: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        split_indices(10, split, "file", 0)


def test_too_few_examples() -> None:
    assert [len(part) for part in vars(split_indices(3, "0.8,0.1,0.1", "file", 0)).values()] == [1, 1, 1]
    with pytest.raises(InputError, match="no example of 2 for the train part"):
        split_indices(2, "0.8,0.1,0.1", "file", 0)
    with pytest.raises(InputError, match="order is 'random'; expected one of seeded, file"):
        split_indices(10, "8,1,1", "random", 0)


def test_labels_are_left_out_of_all_parts_and_nothing_else_moves() -> None:
    labels = np.random.default_rng(0).integers(0, 5, 200)
    parts = split_indices(200, "0.6,0.2,0.2", "seeded", 1)
    left = leave_out(parts, labels, (1, 3))
    for name, indices in vars(parts).items():
        assert getattr(left, name).tolist() == [index for index in indices if labels[index] not in (1, 3)]
        assert len(getattr(left, name)) < len(indices)


def test_labels_that_cannot_be_left_out() -> None:
    labels = np.array([7, 7, 7, 7, 2, 8])
    parts = split_indices(6, "4,1,1", "file", 0)
    with pytest.raises(InputError, match=r"exclude_label is 9; the labels are 2, 7, 8$"):
        leave_out(parts, labels, (7, 9))
    with pytest.raises(InputError, match="exclude_label is 7, which leaves no example for the train part"):
        leave_out(parts, labels, (7,))
    with pytest.raises(InputError, match="exclude_label is 8, which leaves no example for the test part"):
        leave_out(parts, labels, (8,))
    with pytest.raises(InputError, match=r"the labels are 0, 1, 2, .*, 19, ... \(50 in all\)"):
        leave_out(parts, np.arange(50), (-1,))
