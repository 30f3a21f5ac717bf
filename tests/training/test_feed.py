import numpy as np
import pytest
import torch

from vae_runtime.manifest import InputSpec
from vae_training import feed
from vae_training.data import Dataset
from vae_training.feed import Feed, shift_images, standard_normal, standard_rng


@pytest.fixture
def data() -> Dataset:
    """23 images of one grey level each, which tells them apart."""
    examples = np.repeat(np.arange(23, dtype=np.uint8) * 10, 64).reshape(23, 8, 8)
    return Dataset("levels", examples, InputSpec("image", (1, 8, 8), "grey", "exact"))


def levels(batch: np.ndarray) -> list[int]:
    return [round(float(image.max()) * 25.5) for image in batch]


def test_each_epoch_shows_every_train_example_once_in_a_new_order(data: Dataset) -> None:
    train = np.arange(3, 23)
    source = Feed(data, train, 6, seed=0)
    assert source.steps_per_epoch == 3
    epochs = [[level for step in range(first, first + 3) for level in levels(source.batch(step))] for first in (0, 3)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == train.tolist()
    assert epochs[0] != epochs[1]
    assert [len(source.batch(step)) for step in range(3)] == [7, 7, 6]


def test_a_batch_depends_on_its_step_alone(data: Dataset) -> None:
    settings = {"batch_size": 6, "seed": 5, "mode": "dynamic", "shift": 1}
    one = Feed(data, np.arange(20), **settings)
    batches = [one.batch(step) for step in range(9)]
    np.testing.assert_array_equal(Feed(data, np.arange(20), **settings).batch(8), batches[8])
    assert not np.array_equal(Feed(data, np.arange(20), **{**settings, "seed": 6}).batch(8), batches[8])


def test_data_too_large_to_prepare_at_once_give_the_same_batches(
    data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = Feed(data, np.arange(20), 6, seed=0).batch(2)
    monkeypatch.setattr(feed, "CACHE_BYTES", 0)
    np.testing.assert_array_equal(Feed(data, np.arange(20), 6, seed=0).batch(2), expected)


def test_processes_share_a_batch_in_equal_parts(data: Dataset) -> None:
    shares = [Feed(data, np.arange(20), 7, seed=0, rank=rank, processes=3).batch(0) for rank in range(3)]
    assert [len(share) for share in shares] == [3, 3, 3]
    joined = [level for share in shares for level in levels(share)]
    assert len(set(joined)) == 9
    assert set(joined) < set(levels(Feed(data, np.arange(20), 7, seed=0).batch(0)))


def test_binarisation_follows_the_grey_level(data: Dataset) -> None:
    drawn = np.concatenate(
        [Feed(data, np.array([10, 11]), 2, seed=0, mode="dynamic").batch(step) for step in range(200)]
    )
    assert set(np.unique(drawn)) == {0, 1}
    assert float(drawn.mean()) == pytest.approx(105 / 255, abs=0.01)
    fixed = Feed(data, np.array([12, 13]), 2, seed=0, mode="threshold").batch(0)
    assert sorted(fixed.mean((1, 2, 3)).tolist()) == [0, 1]  # 120 / 255 and 130 / 255


def test_shift_moves_whole_images_and_fills_with_zeros() -> None:
    x = np.zeros((200, 1, 9, 8), np.float32)
    x[:, 0, 4, 3] = 1
    moved = shift_images(x, 2, np.random.default_rng(0))
    assert moved.sum((1, 2, 3)).tolist() == [1] * 200
    places = {tuple(np.argwhere(image)[0]) for image in moved[:, 0]}
    assert places == {(row, column) for row in range(2, 7) for column in range(1, 6)}
    corner = np.ones((50, 1, 8, 8), np.float32)
    assert {float(image.sum()) for image in shift_images(corner, 1, np.random.default_rng(0))} == {64, 56, 49}


def test_noise_is_standard_normal_and_a_function_of_its_arguments() -> None:
    cpu = torch.device("cpu")
    noise = standard_normal((1000, 20), 0, 1, 2, 3, cpu)
    assert abs(float(noise.mean())) < 0.03
    assert abs(float(noise.std()) - 1) < 0.03
    assert torch.equal(noise, standard_normal((1000, 20), 0, 1, 2, 3, cpu))
    for other in ((1, 1, 2, 3), (0, 2, 2, 3), (0, 1, 3, 3), (0, 1, 2, 4)):
        assert not torch.equal(noise, standard_normal((1000, 20), *other, cpu))


PURPOSES = ("ORDER", "NOISE", "BINARIZE", "SHIFT", "EVALUATE", "RECALIBRATE", "CROP", "FLIP", "LIKELIHOOD", "SAMPLES")
DRAWS = ("WEIGHTS", "CALIBRATION_CHOICE", "PRIOR_CHOICE")
DRAWS += ("VALIDATION_PIXELS", "CALIBRATION_PIXELS", "TEST_PIXELS", "PRIOR_PIXELS")


def test_no_two_purposes_draw_the_same_numbers() -> None:
    constants = {name for name, value in vars(feed).items() if name.isupper() and isinstance(value, int)}
    assert constants == {*PURPOSES, *DRAWS, "CACHE_BYTES"}
    purposes = [getattr(feed, name) for name in PURPOSES]
    assert 0 not in purposes  # it splits
    assert len(set(purposes)) == len(purposes)
    assert len({standard_rng(0, getattr(feed, name)).integers(2**63) for name in DRAWS}) == len(DRAWS)
