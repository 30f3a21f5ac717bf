"""Crops of photographs: where they come from, that parts share no pixel, and that a run on them continues exactly."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vae_runtime.errors import InputError
from vae_runtime.manifest import InputSpec
from vae_training import photographs as module
from vae_training.checkpoint import load_checkpoint
from vae_training.cli import main
from vae_training.config import TrainConfig
from vae_training.crops import CropFeed
from vae_training.loop import Run, train
from vae_training.photographs import Photographs, Region, load_photographs
from vae_training.source import open_source

SPLIT = "0.6,0.2,0.2"
FAST = ("--family", "resnet", "--crop", "16", "--widths", "8", "--depth", 0, "--latent", 2, "--batch-size", 4,
        "--epochs", 1, "--device", "cpu", "--threads", 1)  # fmt: skip


def write(folder: Path, *sizes: tuple[int, int], seed: int = 0) -> Path:
    """Smooth pictures (H, W) with noise on them."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(seed)
    for index, (height, width) in enumerate(sizes):
        y, x = np.mgrid[:height, :width]
        wave = 127 + 80 * np.sin(x / 9 + index)[..., None] * np.cos(y / 7)[..., None] * [1.0, 0.5, -1.0]
        noisy = np.clip(wave + rng.normal(0, 5, (height, width, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{index:02}.png")
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wide picture and a high one."""
    return write(tmp_path_factory.mktemp("photographs") / "two", (40, 100), (90, 36))


def load(folder: Path, crop: tuple[int, int] | None = (16, 16), split: str = SPLIT, f: int = 1) -> Photographs:
    return load_photographs(folder, crop, "rgb", "exact", split, None, 0, f)


def overlap(photographs: Photographs, steps: int = 8) -> int:
    """Pixels of training crops that a held-out crop shows: paint these, and look for the paint."""
    painted = tuple(np.zeros_like(picture) for picture in photographs.pictures)
    for place in (*photographs.grid("validation"), *photographs.grid("test")):
        painted[place.picture][place.top : place.top + place.height, place.left : place.left + place.width] = 255
    feed = CropFeed(_with(photographs, painted), 64, 0)
    return int(sum((feed.batch(step) > 0).sum() for step in range(steps)))


def _with(photographs: Photographs, pictures: tuple[Any, ...], regions: Any = None) -> Photographs:
    kept = photographs.regions if regions is None else regions
    return Photographs(photographs.name, pictures, kept, photographs.spec, photographs.split_by)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(4, 40), st.integers(4, 40)), min_size=1, max_size=12),
    st.tuples(st.integers(1, 8), st.integers(1, 8)),
    st.sampled_from(["0.8,0.1,0.1", "0.5,0.25,0.25"]),
)
def test_no_training_crop_overlaps_a_held_out_one(
    sizes: list[tuple[int, int]], crop: tuple[int, int], split: str
) -> None:
    made = synthetic(sizes, crop, split)
    if made is not None:
        assert overlap(made) == 0
        places = [*made.grid("validation"), *made.grid("test")]
        assert len(set(places)) == len(places)


def synthetic(sizes: list[tuple[int, int]], crop: tuple[int, int], split: str) -> Photographs | None:
    """`load_photographs` of black pictures that never were files; None where it refuses them."""
    paths = [Path(f"{index}.png") for index in range(len(sizes))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "find_pictures", lambda folder: paths)
        patch.setattr(module, "picture_size", lambda path: sizes[int(path.stem)])
        patch.setattr(module, "read_picture", lambda path, spec: np.zeros((*spec.shape[1:], 3), np.uint8))
        try:
            return load(Path("here"), crop, split)
        except InputError:
            return None


def test_the_search_for_an_overlap_finds_a_planted_one(two: Path) -> None:
    made = load(two)
    assert overlap(made) == 0
    first, *rest = made.regions["train"]
    planted = {**made.regions, "train": (first._replace(width=first.width + 1), *rest)}
    assert overlap(_with(made, made.pictures, planted)) > 0


def test_few_pictures_are_cut_along_their_longer_side(two: Path) -> None:
    made = load(two)
    assert made.split_by == "regions"
    assert made.regions["train"] == (Region(0, 0, 0, 40, 60), Region(1, 0, 0, 54, 36))
    assert made.regions["validation"] == (Region(0, 0, 60, 40, 20), Region(1, 54, 0, 18, 36))
    assert made.regions["test"] == (Region(0, 0, 80, 40, 20), Region(1, 72, 0, 18, 36))
    assert made.grid("test") == [
        Region(0, 0, 80, 16, 16), Region(0, 16, 80, 16, 16), Region(1, 72, 0, 16, 16), Region(1, 72, 16, 16, 16),
    ]  # fmt: skip
    data, parts = made.to_dataset()
    assert data.facts == {"crop": [16, 16], "pictures": 2, "split_by": "regions", "order": "strips"}
    np.testing.assert_array_equal(data.examples[parts.test[0]], made.pictures[0][:16, 80:96])
    assert made.epoch_crops == len(parts.train) == 2 * 3 + 3 * 2


def test_a_strip_is_never_narrower_than_a_crop(tmp_path: Path) -> None:
    made = load(write(tmp_path / "in", (20, 60)), split="0.9,0.05,0.05")
    assert [made.regions[part][0].width for part in ("train", "validation", "test")] == [28, 16, 16]


def test_many_pictures_are_divided_as_such(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", *[(16, 16 + index) for index in range(10)])
    made = load(folder)
    assert made.split_by == "pictures"
    pictures = {part: {region.picture for region in regions} for part, regions in made.regions.items()}
    assert [len(pictures[part]) for part in ("train", "validation", "test")] == [6, 2, 2]
    assert sorted(set.union(*pictures.values())) == list(range(10))
    (folder / "09.png").unlink()
    assert load(folder, crop=(4, 4)).split_by == "regions"
    assert load(folder, split="7,1,1").split_by == "pictures"


def test_long_grids_are_thinned_evenly(monkeypatch: pytest.MonkeyPatch, two: Path) -> None:
    everything = load(two, (4, 4)).grid("train")
    monkeypatch.setattr(module, "MAX_GRID_BYTES", 5 * 4 * 4 * 3)
    kept = load(two, (4, 4)).grid("train")
    assert (len(kept), kept[0], kept[-1]) == (5, everything[0], everything[-1])
    assert load(two, (4, 4)).epoch_crops == len(everything)


def test_crops_and_flips_are_functions_of_seed_and_step(two: Path) -> None:
    made = load(two)
    feed = CropFeed(made, 12, seed=3)
    batches = [feed.batch(step) for step in range(4)]
    np.testing.assert_array_equal(CropFeed(made, 12, seed=3).batch(3), batches[3])
    for other in (CropFeed(made, 12, seed=4).batch(3), batches[2]):
        assert not np.array_equal(other, batches[3])
    plain = CropFeed(made, 12, seed=3, flip=False).batch(3)
    mirrored = CropFeed(made, 12, seed=3).mirrored(3)
    assert 0 < mirrored.sum() < 12
    np.testing.assert_array_equal(batches[3], np.where(mirrored[:, None, None, None], plain[..., ::-1], plain))
    place = feed.places(3)[0]
    picture = made.pictures[place.picture][place.top : place.top + 16, place.left : place.left + 16]
    np.testing.assert_array_equal(plain[0], (picture.transpose(2, 0, 1) / 255).astype(np.float32))


def test_every_place_is_as_likely_as_every_other() -> None:
    spec = InputSpec("image", (3, 4, 4), "rgb", "exact")
    regions = {"train": (Region(0, 0, 0, 5, 5), Region(1, 2, 1, 4, 6)), "validation": (), "test": ()}
    made = Photographs("x", (np.zeros((9, 9, 3), np.uint8),) * 2, regions, spec, "pictures")
    drawn = CropFeed(made, 7000, 0).places(0)
    counts = {place: drawn.count(place) for place in set(drawn)}
    assert len(counts) == 2 * 2 + 1 * 3
    assert all(850 < count < 1150 for count in counts.values())


def test_processes_share_a_batch(two: Path) -> None:
    made = load(two)
    whole = CropFeed(made, 6, 0).batch(1)
    shares = [CropFeed(made, 6, 0, rank=rank, processes=2).batch(1) for rank in range(2)]
    np.testing.assert_array_equal(np.concatenate(shares), whole)


def test_orientation_and_grey_follow_the_rules_of_pictures(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    turned = Image.fromarray(np.arange(30 * 90, dtype=np.uint8).reshape(30, 90))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(folder / "turned.jpg", exif=exif)
    made = load_photographs(folder, (16, 16), "grey", "exact", SPLIT, None, 0)
    assert made.pictures[0].shape == (90, 30)
    assert made.spec.shape == (1, 16, 16)
    assert CropFeed(made, 3, 0).batch(0).shape == (3, 1, 16, 16)
    Image.fromarray(np.zeros((40, 40, 4), np.uint8)).save(folder / "clear.png")
    with pytest.raises(InputError, match=r"clear.png has transparent pixels"):
        load_photographs(folder, (8, 8), "rgb", "exact", SPLIT, None, 0)


def test_the_default_crop_is_what_there_is_room_for(tmp_path: Path) -> None:
    assert load(write(tmp_path / "large", (200, 300)), crop=None).spec.shape == (3, 64, 64)
    assert load(write(tmp_path / "small", (40, 70)), crop=None, f=4).spec.shape == (3, 20, 20)


@pytest.mark.parametrize(
    ("sizes", "settings", "message"),
    [
        ([(40, 100), (90, 15)], {}, r"01.png has 90x15 pixels, smaller than a crop of 16x16 \(height x width\)"),
        (
            [(40, 100), (17, 47)],
            {},
            r"01.png has 17x47 pixels \(height x width\); its train, validation and test regions .* need 48 along",
        ),
        ([(40, 100)], {"crop": (16, 18), "f": 4}, "crop is 16x18; this model takes heights and widths that are multip"),
        ([(40, 100)], {"split": "0.5,0.5"}, "split is '0.5,0.5'; expected three counts"),
        ([(40, 100)], {"split": "8,1,1"}, "10 examples in all; there are 1"),
        ([], {}, "nor pictures in it"),
        ([(5, 100)], {"crop": None, "f": 8}, "00.png has 5x100 pixels, smaller than a crop of 8x8"),
    ],
)
def test_what_does_not_fit_is_named(
    tmp_path: Path, sizes: list[tuple[int, int]], settings: dict[str, Any], message: str
) -> None:
    folder = write(tmp_path / "in", *sizes)
    with pytest.raises(InputError, match=message):
        load(folder, **settings)


def test_more_than_the_memory_is_refused_before_it_is_read(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BYTES", 2**14)
    monkeypatch.setattr(module, "read_picture", lambda *_: pytest.fail("read"))
    with pytest.raises(InputError, match=r"two has 2 pictures that need 0.0 GiB of memory; at most"):
        load(two)


def test_when_a_folder_is_cropped(two: Path, tmp_path: Path) -> None:
    data = str(two)
    assert open_source(TrainConfig(data, family="resnet")).data.spec.shape == (3, 28, 28)
    assert open_source(TrainConfig(data, family="conv", crop=(9, 12))).data.spec.shape == (3, 9, 12)
    three = write(tmp_path / "three", (40, 50), (30, 36), (90, 36))
    fixed = open_source(TrainConfig(str(three), family="resnet", size=(16, 16), resize="crop"))
    assert fixed.photographs is None
    assert fixed.data.examples.shape == (3, 16, 16, 3)


def test_the_widths_decide_what_a_crop_is_a_multiple_of(two: Path) -> None:
    config = TrainConfig(str(two), family="resnet", crop=(14, 10), widths=(8,))
    source = open_source(config)
    resolved = config.resolve(source.data.spec, source.train_examples, crops=True)
    assert resolved.model_config(source.data.spec).latent_shape == (4, 7, 5)
    with pytest.raises(InputError, match=r"crop is 14x10; this model takes .* multiples of 4"):
        open_source(TrainConfig(str(two), family="resnet", crop=(14, 10)))
    with pytest.raises(InputError, match="the train part has 1 example; expected at least 2"):
        config.resolve(source.data.spec, 1, crops=True)


def vae_train(*args: object) -> int:
    try:
        main([str(arg) for arg in args])
    except SystemExit as error:
        return int(error.code or 0)
    return 0


def test_end_to_end(two: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--norm", "group", "--activation", "silu", "--attention", "--likelihood", "laplace", "--no-flip")
    run = tmp_path / "run"
    arguments = ("--data", two, "--output", run, *FAST, *options, "--gradient-weight", 0.5, "--split", SPLIT)
    assert vae_train(*arguments) == 0
    assert "of 2 channels active" in capsys.readouterr().out
    checkpoint = load_checkpoint(run / "model.pt")
    config = checkpoint.config
    assert (config.norm, config.activation, config.attention, config.latent_shape) == ("group", "silu", True, (2, 8, 8))
    assert checkpoint.input.to_dict() == {"type": "image", "shape": [3, 16, 16], "colour": "rgb", "resize": "exact"}
    assert checkpoint.likelihood.type == "laplace"
    assert checkpoint.examples["held_out"].shape == (4, 16, 16, 3)
    metrics = json.loads((run / "metrics.json").read_text())
    expected = {"train": 12, "validation": 4, "test": 4, "crop": [16, 16], "pictures": 2, "split_by": "regions"}
    assert metrics["dataset"].items() >= {**expected, "order": "strips"}.items()
    settings = {"crop": [16, 16], "flip": False, "beta": 1e-5, "gradient_weight": 0.5, "order": None}
    assert metrics["config"].items() >= settings.items()
    with Image.open(run / "reconstructions.png") as picture:
        assert picture.height > 2 * 16
    assert vae_train("--output", run, "--resume") == 0  # a finished run is left as it is


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--crop", "64"), "00.png has 40x100 pixels, smaller than a crop of 64x64"),
        (("--crop", "15"), "crop is 15x15; this model takes heights and widths that are multiples of 2"),
        (("--crop", "16x0"), "crop is [16, 0]; expected height and width"),
        (("--size", "16x16"), "size makes all pictures one size, crop leaves them as they are; pass one of them"),
        (("--order", "seeded"), "order is 'seeded', but"),
        (("--order", "file"), "has 2 pictures, each of which is cut into strips, train, validation and test"),
        (("--shift", "1"), "shift is 1; crops of photographs lie anywhere and are not shifted"),
        (("--family", "conv", "--attention"), "attention is for the resnet family alone, and family is 'conv'"),
        (("--data", "digits"), "crop is for folders of pictures; digits has examples of one size"),
    ],
)
def test_expected_failures_are_one_sentence(
    two: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str
) -> None:
    assert vae_train("--data", two, "--output", tmp_path / "run", *FAST, *options) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_flip_without_crops_and_an_unknown_norm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert vae_train("--data", "digits", "--output", tmp_path / "run", "--flip") == 1
    assert "flip is for crops of photographs" in capsys.readouterr().err
    assert vae_train("--data", "digits", "--output", tmp_path / "run", "--norm", "layer") == 2
    assert "'layer' is not one of 'batch', 'group'" in capsys.readouterr().err
    with pytest.raises(InputError, match="norm is 'layer'; expected one of batch, group"):
        TrainConfig("x", norm="layer")


class StopError(Exception):
    pass


def test_a_stopped_run_continues_bit_for_bit(two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig(
        str(two), family="resnet", crop=(16, 16), widths=(8,), depth=1, latent=2, batch_size=4, epochs=3, split=SPLIT,
        likelihood="laplace", kl_warmup=0.5, ema=0.9,
    )  # fmt: skip
    train(config, tmp_path / "whole", device="cpu")
    step = Run.train_step

    def stop_before_5(self: Run) -> Any:
        if self.state.step == 5:
            raise StopError
        return step(self)

    monkeypatch.setattr(Run, "train_step", stop_before_5)
    monkeypatch.setattr(Run, "due", lambda self, *_: self.state.step == 4)
    with pytest.raises(StopError):
        train(config, tmp_path / "stopped", device="cpu")
    monkeypatch.undo()
    torch.manual_seed(1)
    train(config, tmp_path / "stopped", device="cpu", resume=True)
    assert (tmp_path / "whole/model.pt").read_bytes() == (tmp_path / "stopped/model.pt").read_bytes()
