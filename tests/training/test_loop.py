import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vae_runtime.errors import DeviceError, InputError, MissingExtraError, OutputError, TrainingError
from vae_training import feed, loop, report
from vae_training.checkpoint import load_checkpoint
from vae_training.config import TrainConfig
from vae_training.evaluate import measure
from vae_training.loop import Run, train
from vae_training.losses import Objective
from vae_training.models import build_model, default_config
from vae_training.optimise import learning_rate, make_optimizer, moving_average, set_learning_rate

SMALL: dict[str, Any] = {
    "data": "digits",
    "split": "320,60,60",
    "family": "mlp",
    "widths": (32,),
    "latent": 4,
    "batch_size": 64,
}


def small(**changes: Any) -> TrainConfig:
    return TrainConfig(**{**SMALL, "epochs": 2, **changes})


def test_training_improves_what_it_promises_to(tmp_path: Path) -> None:
    short = train(small(epochs=1), tmp_path / "short", device="cpu")
    long = train(small(epochs=40), tmp_path / "long", device="cpu")
    assert long["test"]["negative_elbo_nats"] < short["test"]["negative_elbo_nats"] - 3
    assert long["test"]["psnr_db"] > short["test"]["psnr_db"]
    history = long["training"]["history"]
    assert history[-1]["validation_nats"] < history[0]["validation_nats"] - 3


def test_the_likelihood_stands_beside_its_bound(tmp_path: Path) -> None:
    metrics = train(small(epochs=10), tmp_path / "run", device="cpu")
    test = metrics["test"]
    assert test["negative_elbo_nats"] - 3 < test["nll_nats"] < test["negative_elbo_nats"]
    assert 0 < test["nll_standard_error_nats"] < 1
    assert test["nll_samples"] == 100
    off = train(small(epochs=10, nll_samples=0), tmp_path / "off", device="cpu")
    assert test == {**off["test"], **{name: test[name] for name in test if name.startswith("nll")}}
    assert off["test"].keys() == metrics["validation"].keys()


@pytest.mark.parametrize(
    ("changes", "files"),
    [
        ({"family": "conv", "widths": (8,), "depth": 1}, ["model.pt", "reconstructions.png", "samples.png"]),
        ({"kind": "autoencoder"}, ["model.pt", "reconstructions.png"]),
        ({"likelihood": "gaussian", "beta": 2.0, "free_bits": 0.1}, ["model.pt", "reconstructions.png", "samples.png"]),
        ({"binarize": "dynamic", "shift": 1}, ["model.pt", "reconstructions.png", "samples.png"]),
        ({"binarize": "threshold", "order": "file"}, ["model.pt", "reconstructions.png", "samples.png"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_a_run_leaves(tmp_path: Path, changes: dict[str, Any], files: list[str]) -> None:
    config = small(**changes)
    metrics = train(config, tmp_path / "run", device="cpu", checkpoint_seconds=0)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {*files, "metrics.json", "run.json"}
    assert metrics["files"] == files
    assert json.loads((tmp_path / "run/metrics.json").read_text()) == metrics
    checkpoint = load_checkpoint(tmp_path / "run/model.pt")
    assert checkpoint.kind == config.kind
    assert checkpoint.likelihood.to_dict() == metrics["likelihood"]
    assert checkpoint.dataset["train"] == 320
    assert checkpoint.examples["train"].shape == (256, 8, 8)
    assert checkpoint.examples["held_out"].shape == (60, 8, 8)
    assert checkpoint.metrics["test"] == metrics["test"]
    pictures = [Image.open(tmp_path / "run" / name) for name in files if name.endswith("png")]
    assert all(min(picture.size) > 200 for picture in pictures)


def test_the_figures_are_those_of_the_model_that_is_left(tmp_path: Path) -> None:
    """Nothing but the file and the data: the test part's figures come out again."""
    config = small(family="conv", widths=(8,), depth=1, order="file", epochs=3)
    metrics = train(config, tmp_path / "run", device="cpu")
    checkpoint = load_checkpoint(tmp_path / "run/model.pt")
    from sklearn.datasets import load_digits

    x = (np.rint(load_digits().images[380:440] * 255 / 16) / 255).astype(np.float32)[:, None]
    figures = measure(Objective(checkpoint.build_model(), "bernoulli"), x, config.seed)
    assert figures["negative_elbo_nats"] == pytest.approx(metrics["test"]["negative_elbo_nats"], rel=1e-5)


def test_vectors_with_a_learned_scale(tmp_path: Path) -> None:
    """Points near a plane in four dimensions: the model finds the noise's σ, in the data's units."""
    rng = np.random.default_rng(0)
    plane = rng.standard_normal((600, 2)) @ rng.standard_normal((2, 4)) * 30
    np.save(tmp_path / "points.npy", (plane + rng.standard_normal((600, 4)) * 2 + 1000).astype(np.float32))
    config = TrainConfig(
        str(tmp_path / "points.npy"),
        family="mlp",
        latent=2,
        widths=(32,),
        epochs=60,
        learning_rate=1e-2,
        batch_size=64,
    )
    metrics = train(config, tmp_path / "run", device="cpu")
    assert metrics["likelihood"]["scale"] == pytest.approx(2.0, rel=0.5)
    assert metrics["test"]["active_units"] == 2
    assert metrics["files"] == ["model.pt"]
    model = load_checkpoint(tmp_path / "run/model.pt").build_model()
    x = torch.from_numpy(np.load(tmp_path / "points.npy"))
    assert (model(x) - x).square().mean().sqrt().item() < 4


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    config = small(binarize="dynamic", shift=1, family="conv", widths=(8,), depth=1)
    state = torch.random.get_rng_state()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.rand(7)  # nothing depends on torch's global generator
        train(small(**{**vars(config), "seed": seed}), tmp_path / name, device="cpu")
    contents = [(tmp_path / name / "model.pt").read_bytes() for name in "abc"]
    assert contents[0] == contents[1]
    assert contents[0] != contents[2]
    torch.random.set_rng_state(state)


def test_each_draw_of_a_run_is_for_one_thing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    monkeypatch.setattr(loop, "standard_rng", lambda seed, draw: drawn.append(draw) or feed.standard_rng(seed, draw))
    train(small(binarize="dynamic", likelihood="bernoulli"), tmp_path / "run", device="cpu")
    assert sorted(drawn) == list(range(7))


def test_the_test_part_is_never_trained_or_stopped_on(tmp_path: Path) -> None:
    """Two data sets that differ in the test part alone give the same weights."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (120, 8, 8), dtype=np.uint8)
    states = []
    for name, shift in (("a", 0), ("b", 77)):
        changed = images.copy()
        changed[100:] += np.uint8(shift)
        np.save(tmp_path / "images.npy", changed)
        changes = {"family": "conv", "widths": (8,), "depth": 1, "patience": 1, "epochs": 4}  # with BatchNorm
        config = small(data=str(tmp_path / "images.npy"), split="80,20,20", order="file", **changes)
        train(config, tmp_path / name, device="cpu")
        states.append(load_checkpoint(tmp_path / name / "model.pt").state_dict)
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key


def test_a_label_that_is_left_out_is_seen_by_nothing(tmp_path: Path) -> None:
    """Its examples may be anything: the run leaves the same."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (120, 8, 8), dtype=np.uint8), rng.integers(0, 4, 120)
    metrics = []
    for name in "ab":
        np.savez(tmp_path / "images.npz", images=images, labels=labels)
        config = small(data=str(tmp_path / "images.npz"), split="80,20,20", exclude_label=(2,))
        metrics.append(train(config, tmp_path / name, device="cpu"))
        images[labels == 2] = rng.integers(0, 256, (np.count_nonzero(labels == 2), 8, 8))
    assert (tmp_path / "a/model.pt").read_bytes() == (tmp_path / "b/model.pt").read_bytes()
    assert metrics[0]["test"] == metrics[1]["test"]
    assert metrics[0]["config"]["exclude_label"] == [2]
    dataset = metrics[0]["dataset"]
    assert dataset["excluded_labels"] == [2]
    counts = [dataset[part] for part in ("train", "validation", "test")]
    assert sum(counts) == np.count_nonzero(labels != 2)
    assert load_checkpoint(tmp_path / "a/model.pt").dataset["excluded_labels"] == [2]


def test_labels_are_left_out_only_where_there_are_some(tmp_path: Path) -> None:
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    np.save(tmp_path / "images.npy", np.zeros((20, 8, 8), np.uint8))
    for data, message in (("images.npy", "has none .IDX files have theirs"), ("", "is a folder of pictures")):
        with pytest.raises(InputError, match=f"exclude_label is for data with labels; .*{message}"):
            train(
                small(data=str(tmp_path / data), split="0.8,0.1,0.1", exclude_label=(1,)),
                tmp_path / "run",
                device="cpu",
            )
    assert not (tmp_path / "run").exists()


def test_early_stop_keeps_the_best_weights(tmp_path: Path) -> None:
    """Pure noise: the validation figure gets worse once the few examples are learned by heart."""
    np.save(tmp_path / "noise.npy", np.random.default_rng(0).integers(0, 256, (60, 8, 8), dtype=np.uint8))
    config = small(
        data=str(tmp_path / "noise.npy"),
        split="30,15,15",
        epochs=300,
        kind="autoencoder",
        patience=20,
        learning_rate=1e-2,
    )
    metrics = train(config, tmp_path / "run", device="cpu")
    training = metrics["training"]
    assert training["stopped_early"]
    assert training["epochs"] < 300
    best = min(training["history"], key=lambda entry: entry["validation_nats"])
    assert training["best_epoch"] == best["epoch"] < training["epochs"]
    assert best["validation_nats"] < training["history"][-1]["validation_nats"]
    assert metrics["validation"]["reconstruction_nats"] == pytest.approx(best["validation_nats"], rel=1e-9)


@pytest.mark.parametrize("likelihood", ["bernoulli", "laplace"])
def test_weights_that_are_better_at_edges_are_better(tmp_path: Path, likelihood: str) -> None:
    """The likelihood alone is best in the first epochs, before the edges are learned at its cost."""
    config = small(gradient_weight=20.0, likelihood=likelihood, epochs=24, patience=6, nll_samples=0)
    metrics = train(config, tmp_path / "run", device="cpu")
    history = metrics["training"]["history"]
    best = min(history, key=lambda entry: entry["validation_nats"])
    alike = ("validation_reconstruction_nats", "validation_kl_nats")
    assert min(history, key=lambda entry: sum(entry[name] for name in alike))["epoch"] < 12
    assert metrics["training"]["best_epoch"] == best["epoch"] > 18
    assert not metrics["training"]["stopped_early"]
    assert best["validation_nats"] == pytest.approx(
        sum(best[name] for name in (*alike, "validation_gradient_nats")), rel=1e-9
    )


def test_a_loss_that_is_not_finite_ends_the_run_with_its_epoch_in_words(tmp_path: Path) -> None:
    config = small(widths=(64,) * 6, learning_rate=10.0, clip=1e9, epochs=1000, lr_warmup=0.0)  # measured every 83
    message = r"epoch \d: the .* is (nan|inf); try a learning rate below 10, .* in a run begun anew \(--force\)"
    with pytest.raises(TrainingError, match=message):
        train(config, tmp_path / "run", device="cpu")


@pytest.mark.parametrize(
    ("what", "stop", "message"), [("train loss", 10, "epoch 2"), ("largest weight", 12, "epoch 3")]
)  # an epoch has 5 steps, and every fourth of 48 is measured
def test_a_state_that_has_diverged_replaces_no_good_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, stop: int, message: str
) -> None:
    step = Run.train_step

    def train_step(self: Run) -> torch.Tensor:
        loss = step(self)
        if self.state.step == stop and what == "largest weight":
            with torch.no_grad():
                next(self.objective.parameters())[0, 0] = math.nan
        return loss * math.nan if self.state.step == stop and what == "train loss" else loss

    monkeypatch.setattr(Run, "train_step", train_step)
    monkeypatch.setattr(Run, "due", lambda self, *_: self.state.step in (9, stop))
    with pytest.raises(TrainingError, match=f"{message}: the {what} is nan"):
        train(small(epochs=48), tmp_path / "run", device="cpu")
    assert torch.load(tmp_path / "run/state/progress.pt", weights_only=True)["step"] == 9


@pytest.mark.parametrize("likelihood", ["gaussian", "laplace"])
def test_a_scale_beyond_float32_ends_the_run_with_its_epoch_in_words(tmp_path: Path, likelihood: str) -> None:
    config = small(likelihood=likelihood, learning_rate=10.0, clip=1e9, epochs=20)
    message = r"epoch \d: the likelihood's scale is inf; try a learning rate below 10, .*\(--force\)"
    with pytest.raises(TrainingError, match=message):
        train(config, tmp_path / "run", device="cpu")
    assert not (tmp_path / "run/model.pt").exists()


def test_figures_that_overflow_end_the_run_in_words(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_cauchy((600, 6)).astype(np.float32) * 1e19
    np.save(tmp_path / "v.npy", values.clip(-1.8e19, 1.8e19))  # each has a square, and not every example a sum of them
    with pytest.raises(TrainingError, match=r"the mse is inf; try a learning rate below 0.004, or scale the data"):
        train(small(data=str(tmp_path / "v.npy")), tmp_path / "run", device="cpu")
    assert not (tmp_path / "run/model.pt").exists()


def test_the_schedule_rises_and_falls() -> None:
    rates = [learning_rate(step, 100, 1.0, 0.1) for step in range(100)]
    assert rates[0] > 0
    assert rates.index(max(rates)) == 10
    assert max(rates) == 1.0
    assert rates[55] == pytest.approx(0.5)
    assert 0 < rates[99] < 1e-3
    assert learning_rate(0, 1, 1.0, 0.0) == 1.0


def test_the_moving_average_is_what_it_says() -> None:
    layer = torch.nn.Linear(1, 1, bias=False)
    average = moving_average(layer, 0.5)
    values, expected = [1.0, 3.0, -2.0, 5.0, 4.0], math.nan
    for step, value in enumerate(values):
        with torch.no_grad():
            layer.weight.fill_(value)
        average.update_parameters(layer)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = value if step == 0 else decay * expected + (1 - decay) * value
    assert average.module.weight.item() == pytest.approx(expected)


def test_tensorboard_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    train(small(epochs=1), tmp_path / "run", device="cpu", tensorboard=True)
    assert list((tmp_path / "run/tensorboard").glob("events*"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingExtraError, match=r'needs tensorboard, .* pip install "vae-edge\[tensorboard\]"'):
        train(small(epochs=1), tmp_path / "other", device="cpu", tensorboard=True)


def test_an_autoencoder_has_no_warm_up_to_be_patient_with(tmp_path: Path) -> None:
    config = small(kind="autoencoder", patience=2, epochs=40, learning_rate=0.5)
    metrics = train(config, tmp_path / "run", device="cpu")
    assert metrics["training"]["stopped_early"]
    assert metrics["training"]["epochs"] < 20
    assert metrics["config"].items() >= {"beta": None, "free_bits": 0.0, "kl_warmup": 0.0}.items()


def test_devices_that_are_not_there(tmp_path: Path) -> None:
    for device in ("tpu", 0, None):
        with pytest.raises(InputError, match=f"device is {device!r}; expected auto, cpu"):
            train(small(), tmp_path / "run", device=device)  # type: ignore[arg-type]
    with pytest.raises(DeviceError, match="device is 'cuda:99', but torch"):
        train(small(), tmp_path / "run", device="cuda:99")
    if not torch.cuda.is_available():
        with pytest.raises(DeviceError, match="mixed_precision is 'fp16', which device 'cpu' cannot do"):
            train(small(mixed_precision="fp16"), tmp_path / "run", device="cpu")
        with pytest.raises(DeviceError, match="mixed_precision is 'fp16', which no GPU is there for"):
            train(small(mixed_precision="fp16"), tmp_path / "run", device="auto")
    assert not (tmp_path / "run").exists()


def test_bfloat16_trains_and_leaves_float32(tmp_path: Path) -> None:
    metrics = train(small(mixed_precision="bf16", epochs=10), tmp_path / "bf16", device="cpu")
    plain = train(small(epochs=10), tmp_path / "fp32", device="cpu")
    assert metrics["test"]["negative_elbo_nats"] == pytest.approx(plain["test"]["negative_elbo_nats"], abs=0.5)
    assert metrics["test"] != plain["test"]


def test_an_output_that_exists(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years")
    for flags in ({}, {"force": True}, {"resume": True}):
        with pytest.raises(OutputError, match="foreign has files in it that vae-train did not write"):
            train(small(), foreign, device="cpu", **flags)
    assert [path.name for path in foreign.iterdir()] == ["thesis.txt"]
    with pytest.raises(OutputError, match="is a file; expected the name of a folder"):
        train(small(), foreign / "thesis.txt", device="cpu")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/.DS_Store").write_text("shown once")
    first = train(small(epochs=1), tmp_path / "empty", device="cpu")
    (tmp_path / "empty/notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="has a training run in it; pass --resume to continue it or --force"):
        train(small(epochs=1), tmp_path / "empty", device="cpu")
    second = train(small(epochs=2), tmp_path / "empty", device="cpu", force=True)
    assert second["training"]["epochs"] == 2
    assert first["run"] != second["run"]
    assert (tmp_path / "empty/.DS_Store").read_text() == "shown once"
    assert (tmp_path / "empty/notes.txt").read_text() == "mine"


def test_bad_data_leave_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        train(small(data=str(tmp_path / "missing.npy")), tmp_path / "run", device="cpu")
    with pytest.raises(InputError, match="examples in all; there are 1797"):
        train(small(split="2000,1,1"), tmp_path / "run", device="cpu")
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_keeps_the_old_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(small(epochs=1), tmp_path / "run", device="cpu")
    old = (tmp_path / "run/model.pt").read_bytes()

    def fail(*_: Any) -> Any:
        raise OutputError("the disk is full")

    monkeypatch.setattr(loop.report, "save_checkpoint", fail)
    with pytest.raises(OutputError, match="the disk is full"):
        train(small(epochs=2), tmp_path / "run", device="cpu", force=True)
    assert (tmp_path / "run/model.pt").read_bytes() == old
    monkeypatch.undo()
    assert train(small(epochs=2), tmp_path / "run", device="cpu", resume=True)["training"]["epochs"] == 2


def test_the_learned_scale_moves_faster_and_only_weights_decay() -> None:
    model = build_model(default_config("conv", "vae", (3, 8, 8), 2))
    optimizer = make_optimizer(Objective(model, "gaussian"), 1.0, 0.5, fused=False)
    set_learning_rate(optimizer, 0.25)
    found = {
        (group["lr"], group["weight_decay"], parameter.ndim)
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert found == {(2.5, 0.0, 0), (0.25, 0.0, 1), (0.25, 0.5, 2), (0.25, 0.5, 4)}


def test_a_folder_of_any_bytes_gives_a_name_that_a_checkpoint_holds() -> None:
    parts = SimpleNamespace(validation=[0], test=[1])
    data = SimpleNamespace(name="caf\udce9", facts={})
    run = SimpleNamespace(data=data, parts=parts, train_examples=3, config=SimpleNamespace(order="seeded"))
    assert report._dataset(run)["dataset"] == "caf?"
