"""Train, validation and test parts: disjoint, complete, and the same for the same seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vae_runtime.arguments import check_choice
from vae_runtime.errors import InputError

ORDERS = ("seeded", "file")
SPLIT, ORDER = "0.8,0.1,0.1", "seeded"  # where none is given
VALIDATION = 0.1  # of the examples before a test part that the data bring with them
PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class Parts:
    """Indices into a data set. The test part is for the last figures only: never trained, tuned or stopped on."""

    train: NDArray[np.int64]
    validation: NDArray[np.int64]
    test: NDArray[np.int64]


def split_indices(count: int, split: str, order: str, seed: int) -> Parts:
    """Divide `count` examples.

    split: "8000,1000,1000", counts, whose sum may be less than there is; or "0.8,0.1,0.1", fractions that sum to 1.
    order: "seeded" shuffles before dividing, "file" keeps the order of the files.

    Raises:
        InputError: another form, more than there is, or a part without examples.
    """
    check_choice(order, "order", ORDERS)
    sizes = _sizes(count, parse_split(split))
    for part, size in zip(PARTS, sizes, strict=True):
        if size < 1:
            raise InputError(f"split is {split!r}, which leaves no example of {count} for the {part} part")
    if sum(sizes) > count:
        raise InputError(f"split is {split!r}, {sum(sizes)} examples in all; there are {count}")
    indices = np.random.default_rng((seed, 0)).permutation(count) if order == "seeded" else np.arange(count)
    first, second, third = np.cumsum(sizes)
    return Parts(indices[:first], indices[first:second], indices[second:third])


def split_before(test_begins: int, count: int, seed: int) -> Parts:
    """Keep the test part that the data bring with them, the examples from `test_begins` on; of those before it a tenth,
    which the seed draws, are for validation.

    Raises:
        InputError: fewer than two before it.
    """
    if test_begins < 2:
        raise InputError(f"the train files hold {test_begins} example; expected at least 2, one of them for validation")
    indices = np.random.default_rng((seed, 0)).permutation(test_begins)
    train = test_begins - max(1, round(VALIDATION * test_begins))
    return Parts(indices[:train], indices[train:], np.arange(test_begins, count))


def leave_out(parts: Parts, labels: NDArray[np.int64], excluded: Sequence[int]) -> Parts:
    """The same parts without the examples whose label is one of `excluded`; labels: of all examples.

    Dividing comes first: the other examples are in the part that they are in without any exclusion.

    Raises:
        InputError: a label that no example has, or a part without examples.
    """
    for label in excluded:
        if label not in labels:
            raise InputError(f"exclude_label is {label}; the labels are {_listed(np.unique(labels))}")
    kept = {part: indices[~np.isin(labels[indices], excluded)] for part, indices in vars(parts).items()}
    for part, indices in kept.items():
        if not len(indices):
            raise InputError(f"exclude_label is {_listed(excluded)}, which leaves no example for the {part} part")
    return Parts(**kept)


def _listed(labels: Sequence[int] | NDArray[np.int64]) -> str:
    shown = ", ".join(str(label) for label in labels[:20])
    return f"{shown}, ... ({len(labels):,} in all)" if len(labels) > 20 else shown


def parse_split(split: str) -> list[int] | list[float]:
    """ "8000,1000,1000" -> three counts; "0.8,0.1,0.1" -> three fractions, between 0 and 1, that sum to 1.

    Raises:
        InputError: another form.
    """
    fields = [field.strip() for field in split.split(",")]
    try:
        if len(fields) != 3:
            raise ValueError
        if all(field.isdigit() for field in fields):
            return [int(field) for field in fields]
        fractions = [float(field) for field in fields]
        if not all(0 < fraction < 1 for fraction in fractions) or abs(sum(fractions) - 1) > 1e-6:
            raise ValueError
    except ValueError:
        raise InputError(
            f"split is {split!r}; expected three counts, '8000,1000,1000', or fractions that sum to 1, '0.8,0.1,0.1'"
        ) from None
    return fractions


def _sizes(count: int, parsed: list[int] | list[float]) -> list[int]:
    if isinstance(parsed[0], int):
        return [int(size) for size in parsed]
    validation, test = (max(1, round(count * fraction)) for fraction in parsed[1:])
    return [count - validation - test, validation, test]
