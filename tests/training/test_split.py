"""How examples are divided, also those of data that bring a test part with them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vae_runtime.errors import InputError
from vae_training.cli import main
from vae_training.config import TrainConfig
from vae_training.source import open_source
from vae_training.split import leave_out, split_before, split_indices

from .test_data import idx


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


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    """40 images with their labels, of which the last 10 are the test part."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (40, 8, 8), dtype=np.uint8), np.arange(40, dtype=np.uint8) % 5
    (tmp_path / "mnist").mkdir()
    for part, where in (("train", slice(30)), ("t10k", slice(30, None))):
        (tmp_path / f"mnist/{part}-images-idx3-ubyte").write_bytes(idx(images[where]))
        (tmp_path / f"mnist/{part}-labels-idx1-ubyte").write_bytes(idx(labels[where]))
    return tmp_path / "mnist"


def test_data_with_a_test_part_of_their_own_keep_it(mnist: Path) -> None:
    config = TrainConfig(str(mnist), seed=3)
    parts = open_source(config).parts
    assert parts.test.tolist() == list(range(30, 40))
    assert sorted([*parts.train, *parts.validation]) == list(range(30))
    assert len(parts.validation) == 3
    assert parts.validation.tolist() == open_source(config).parts.validation.tolist()
    assert parts.validation.tolist() != open_source(replace(config, seed=4)).parts.validation.tolist()
    left = open_source(replace(config, exclude_label=(2,)))
    assert left.parts.test.tolist() == [index for index in range(30, 40) if index % 5 != 2]
    assert (left.split, left.order) == (None, None)


@pytest.mark.parametrize(
    "given", [{"split": "0.8,0.1,0.1"}, {"order": "seeded"}, {"order": "file"}, {"split": "20,5,5", "order": "file"}]
)
def test_a_split_or_an_order_divides_all_files_together(mnist: Path, given: dict[str, Any]) -> None:
    source = open_source(TrainConfig(str(mnist), **given))
    chosen = {"split": "0.8,0.1,0.1", "order": "seeded", **given}
    expected = split_indices(40, **chosen, seed=0)
    for name, indices in vars(source.parts).items():
        assert indices.tolist() == getattr(expected, name).tolist()
    assert (source.split, source.order) == (chosen["split"], chosen["order"])
    assert source.data.facts == {}


def test_the_files_of_one_part_are_divided_as_other_data(mnist: Path) -> None:
    (mnist / "train-images-idx3-ubyte").unlink()
    source = open_source(TrainConfig(str(mnist)))
    assert source.parts.test.tolist() == split_indices(10, "0.8,0.1,0.1", "seeded", 0).test.tolist()
    assert source.split == "0.8,0.1,0.1"


def test_two_examples_are_the_least_before_a_test_part() -> None:
    assert [len(part) for part in vars(split_before(2, 5, 0)).values()] == [1, 1, 3]
    with pytest.raises(InputError, match="the train files hold 1 example; expected at least 2"):
        split_before(1, 5, 0)


def test_a_run_says_which_files_its_parts_are_from(mnist: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = mnist.parent / "run"
    options = ["--family", "mlp", "--widths", "8", "--latent", "2", "--epochs", "1", "--device", "cpu", "--output"]
    line = "\nparts: 27 train and 3 validation examples from train-*, 10 test examples from t10k-*\n"
    main(["--data", str(mnist), *options, str(run)], standalone_mode=False)
    assert line in capsys.readouterr().out
    metrics = json.loads((run / "metrics.json").read_text())
    expected = {"train": 27, "validation": 3, "test": 10, "order": "seeded", "split_by": "files"}
    assert metrics["dataset"].items() >= expected.items()
    assert metrics["config"].items() >= {"split": None, "order": None}.items()
    main(["--resume", "--output", str(run)], standalone_mode=False)
    assert line in capsys.readouterr().out
    main(["--data", str(mnist), "--order", "file", *options, f"{run}-file"], standalone_mode=False)
    assert "parts:" not in capsys.readouterr().out
    metrics = json.loads((Path(f"{run}-file") / "metrics.json").read_text())
    assert metrics["config"].items() >= {"split": "0.8,0.1,0.1", "order": "file"}.items()
    assert "split_by" not in metrics["dataset"]
