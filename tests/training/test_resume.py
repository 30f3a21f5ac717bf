"""A run that was stopped anywhere continues exactly: the final weights are the uninterrupted run's, bit for bit."""

import json
import os
import re
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vae_runtime.atomic import write_json
from vae_runtime.errors import OutputError, TrainingError
from vae_training.checkpoint import load_checkpoint
from vae_training.cli import main
from vae_training.config import TrainConfig
from vae_training.folder import RunFolder
from vae_training.loop import Run, train

from .conftest import Parent

CONFIG = TrainConfig(
    "digits", split="300,60,60", family="conv", widths=(8,), depth=1, latent=4, batch_size=64, epochs=6,
    binarize="dynamic", shift=1, likelihood="bernoulli", kl_warmup=0.5, ema=0.9,
)  # fmt: skip
STEPS = 6 * 4


class StopError(Exception):
    pass


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    train(CONFIG, folder, device="cpu")
    return folder


def assert_same(first: Path, second: Path) -> None:
    weights = [load_checkpoint(folder / "model.pt").state_dict for folder in (first, second)]
    for key, value in weights[0].items():
        assert torch.equal(value, weights[1][key]), key
    assert (first / "model.pt").read_bytes() == (second / "model.pt").read_bytes()
    histories = [json.loads((folder / "metrics.json").read_text())["training"]["history"] for folder in (first, second)]
    assert histories[0] == histories[1]


def stop_at(monkeypatch: pytest.MonkeyPatch, stop: int, save_at: int | None) -> None:
    """End a run before step `stop`, with its state written after step `save_at` alone."""
    step = Run.train_step

    def train_step(self: Run) -> Any:
        if self.state.step == stop:
            raise StopError
        return step(self)

    monkeypatch.setattr(Run, "train_step", train_step)
    monkeypatch.setattr(Run, "due", lambda self, *_: self.state.step == save_at)


@pytest.mark.parametrize(("save_at", "stop"), [(None, 3), (1, 2), (5, 7), (7, 7), (13, 23), (20, 21), (23, 23)])
def test_stopped_anywhere(
    tmp_path: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch, save_at: int | None, stop: int
) -> None:
    stop_at(monkeypatch, stop, save_at)
    with pytest.raises(StopError):
        train(CONFIG, tmp_path / "run", device="cpu")
    assert (tmp_path / "run/state").exists() == (save_at is not None)
    assert not (tmp_path / "run/model.pt").exists()
    monkeypatch.undo()
    torch.manual_seed(save_at or 0)  # the global generator has no part in it
    train(CONFIG, tmp_path / "run", device="cpu", resume=True)
    assert_same(uninterrupted, tmp_path / "run")
    assert not (tmp_path / "run/state").exists()


def test_stopped_again_and_again(tmp_path: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for stop in range(4, STEPS, 6):
        stop_at(monkeypatch, stop, stop - 1)
        with pytest.raises(StopError):
            train(CONFIG, tmp_path / "run", device="cpu", resume=True)
        monkeypatch.undo()
    train(CONFIG, tmp_path / "run", device="cpu", resume=True)
    assert_same(uninterrupted, tmp_path / "run")


def test_a_rising_capacity_goes_on_rising(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig("digits", split="300,60,60", family="mlp", widths=(16,), latent=4, epochs=6, capacity=6.0)
    train(config, tmp_path / "whole", device="cpu")
    stop_at(monkeypatch, 7, 6)
    with pytest.raises(StopError):
        train(config, tmp_path / "run", device="cpu")
    monkeypatch.undo()
    train(config, tmp_path / "run", device="cpu", resume=True)
    assert_same(tmp_path / "whole", tmp_path / "run")


def test_tensorboard_shows_every_evaluation_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = TrainConfig("digits", split="60,20,20", family="mlp", widths=(8,), batch_size=20, epochs=6, nll_samples=0)
    folder, known = tmp_path / "run/tensorboard", "events.out.tfevents.000000000"

    def shown() -> list[int]:
        for path in folder.glob("events*"):  # TensorBoard reads them by their names, which have the second in them
            if not path.name.startswith(known):
                path.rename(folder / f"{known}{len(list(folder.iterdir()))}")
        loaded = events.EventAccumulator(str(folder)).Reload()
        return [event.step for event in loaded.Scalars("validation_nats")]

    for stop, save_at in ((7, None), (10, 6), (17, 6)):  # an epoch has 3 steps; the state of 6 is gone on from twice
        stop_at(monkeypatch, stop, save_at)
        with pytest.raises(StopError):
            train(config, tmp_path / "run", device="cpu", resume=True, tensorboard=True)
        monkeypatch.undo()
        assert shown() == list(range(3, stop, 3))
    train(config, tmp_path / "run", device="cpu", resume=True, tensorboard=True)
    assert shown() == [3, 6, 9, 12, 15, 18]
    (folder / "notes.txt").write_text("mine")
    train(replace(config, epochs=1), tmp_path / "run", device="cpu", force=True)
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_stopped_while_writing_the_state(tmp_path: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import Accelerator

    save_state = Accelerator.save_state
    writes = []

    def save_and_fail(self: Accelerator, folder: str) -> None:
        save_state(self, folder)
        writes.append(folder)
        if len(writes) == 3:
            raise StopError

    monkeypatch.setattr(Accelerator, "save_state", save_and_fail)
    with pytest.raises(StopError):
        train(CONFIG, tmp_path / "run", device="cpu", checkpoint_seconds=0)
    monkeypatch.undo()
    leftover = tmp_path / "run/.state.12345678.part"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    train(CONFIG, tmp_path / "run", device="cpu", resume=True)
    assert_same(uninterrupted, tmp_path / "run")
    assert not leftover.exists()


def test_of_hidden_files_only_those_go_that_a_run_names_so(tmp_path: Path) -> None:
    for name in (".model.pt.0123abcd.part", ".film.part", ".film.mkv.part"):
        (tmp_path / name).touch()
    RunFolder(tmp_path, "run").remove_leftovers()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".film.mkv.part", ".film.part"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("no JSON"), KeyboardInterrupt()])
def test_a_run_that_cannot_begin_anew_leaves_the_old_one_to_be_continued(
    tmp_path: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    stop_at(monkeypatch, 14, 13)
    with pytest.raises(StopError):
        train(CONFIG, tmp_path / "run", device="cpu")

    def fail(*_: Any, **__: Any) -> None:
        raise error

    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    target = "vae_runtime.atomic.json.dumps" if isinstance(error, ValueError) else "vae_runtime.atomic.os.fsync"
    monkeypatch.setattr(target, fail)
    with pytest.raises((OutputError, ValueError, KeyboardInterrupt)):
        train(replace(CONFIG, epochs=2), tmp_path / "run", device="cpu", force=True)
    monkeypatch.undo()
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    steps, step = [], Run.train_step
    monkeypatch.setattr(Run, "train_step", lambda self: steps.append(self.state.step) or step(self))
    train(CONFIG, tmp_path / "run", device="cpu", resume=True)
    assert steps == list(range(13, STEPS))
    assert_same(uninterrupted, tmp_path / "run")


@pytest.mark.parametrize("written", [False, True])
def test_killed_while_it_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: bool) -> None:
    """Before run.json is of the new run the state is still the old one's; afterwards it is nobody's."""
    stop_at(monkeypatch, 7, 6)
    with pytest.raises(StopError):
        train(CONFIG, tmp_path / "run", device="cpu")
    monkeypatch.setattr("vae_training.folder.RunFolder.remove_leftovers", lambda self: None)
    write = write_json

    def write_and_die(*arguments: Any, **options: Any) -> None:
        if written:
            write(*arguments, **options)
        raise StopError

    monkeypatch.setattr("vae_training.folder.write_json", write_and_die)
    other = replace(CONFIG, seed=1)
    with pytest.raises(StopError):
        train(other, tmp_path / "run", device="cpu", force=True)
    assert not (tmp_path / "run/state").exists()
    monkeypatch.undo()
    steps, step = [], Run.train_step
    monkeypatch.setattr(Run, "train_step", lambda self: steps.append(self.state.step) or step(self))
    train(other if written else CONFIG, tmp_path / "run", device="cpu", resume=True)
    assert steps == list(range(0 if written else 6, STEPS))
    assert not list((tmp_path / "run").glob(".*"))


# A step takes a while, so that the process is killed within it or while it writes its state.
SLOW = """
import json, sys, time
from vae_training.config import TrainConfig
from vae_training.loop import Run, train

step = Run.train_step
Run.train_step = lambda self: (time.sleep(0.03), step(self))[1]
train(TrainConfig.from_dict(json.loads(sys.argv[1])), sys.argv[2], device="cpu", resume=True, checkpoint_seconds=0.01)
"""


def written(run: Path) -> int:
    """When the state of a run was written; 0 before it is."""
    try:
        return (run / "state/progress.pt").stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def test_killed_for_real(parent: Parent, tmp_path: Path, uninterrupted: Path) -> None:
    """SIGKILL, whatever the process is doing: twice, each time further on; then the run gets to its end."""
    for seconds in (0.05, 0.12):
        before = written(tmp_path / "run")
        child = parent.start(SLOW, json.dumps(CONFIG.to_dict()), tmp_path / "run")
        child.wait_for(lambda before=before: written(tmp_path / "run") != before)
        time.sleep(seconds)
        os.kill(child.pid, signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL, child.stderr
    train(CONFIG, tmp_path / "run", device="cpu", resume=True)
    assert_same(uninterrupted, tmp_path / "run")


def test_a_finished_run_is_left_as_it_is(tmp_path: Path) -> None:
    config = TrainConfig("digits", split="60,20,20", family="mlp", widths=(8,), epochs=1)
    metrics = train(config, tmp_path / "run", device="cpu")
    stamp = (tmp_path / "run/model.pt").stat().st_mtime_ns
    assert train(config, tmp_path / "run", device="cpu", resume=True) == metrics
    assert (tmp_path / "run/model.pt").stat().st_mtime_ns == stamp


def test_other_settings_do_not_continue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_at(monkeypatch, 7, 6)
    with pytest.raises(StopError):
        train(CONFIG, tmp_path / "run", device="cpu")
    other = TrainConfig.from_dict({**CONFIG.to_dict(), "beta": 2.0})
    with pytest.raises(TrainingError, match=r"was begun with beta 1.0, not 2.0; a run continues only with"):
        train(other, tmp_path / "run", device="cpu", resume=True)


def test_other_examples_do_not_continue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.random.default_rng(0).integers(0, 256, (60, 8, 8), dtype=np.uint8)
    np.save(tmp_path / "x.npy", images)
    config = TrainConfig(str(tmp_path / "x.npy"), split="40,10,10", family="mlp", widths=(8,), batch_size=8, epochs=2)
    stop_at(monkeypatch, 2, 1)
    with pytest.raises(StopError):
        train(config, tmp_path / "run", device="cpu")
    monkeypatch.undo()
    for changed in (images[::-1], np.concatenate([images[:59], images[:1]])):  # the first: in another order
        np.save(tmp_path / "x.npy", changed)
        with pytest.raises(TrainingError, match=r"run was begun with other examples than .*x\.npy has now"):
            train(config, tmp_path / "run", device="cpu", resume=True)
    np.save(tmp_path / "x.npy", images)
    metrics = train(config, tmp_path / "run", device="cpu", resume=True)
    np.save(tmp_path / "x.npy", images[::-1])
    assert train(config, tmp_path / "run", device="cpu", resume=True) == metrics  # finished, and left as it is


def test_a_run_of_another_version_does_not_continue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_at(monkeypatch, 2, 1)
    with pytest.raises(StopError):
        train(CONFIG, tmp_path / "run", device="cpu")
    path = tmp_path / "run/run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 2}))
    with pytest.raises(TrainingError, match=r"run\.json has format_version 2; this version continues runs of 1"):
        train(CONFIG, tmp_path / "run", device="cpu", resume=True)


@pytest.mark.parametrize("key", ["run", "data", "config.data", "config.gamma"])
def test_a_record_that_lacks_a_key_does_not_continue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    config = TrainConfig("digits", split="60,20,20", family="mlp", widths=(8,), epochs=1, nll_samples=0)
    stop_at(monkeypatch, 0, None)
    with pytest.raises(StopError):
        train(config, tmp_path / "run", device="cpu")
    monkeypatch.undo()
    path = tmp_path / "run/run.json"
    record = json.loads(path.read_text())
    owner = record["config"] if key.startswith("config.") else record
    del owner[key.removeprefix("config.")]
    path.write_text(json.dumps(record))
    message = f"run.json is damaged: it lacks {key}, without which the run cannot be continued; --force begins anew"
    with pytest.raises(TrainingError, match=re.escape(message)):
        train(config, tmp_path / "run", device="cpu", resume=True)
    with pytest.raises(SystemExit) as ended:
        main(["--resume", "--device", "cpu", "--output", str(tmp_path / "run")])
    assert ended.value.code == 1
    assert message in capsys.readouterr().err
    train(config, tmp_path / "run", device="cpu", force=True)


@pytest.mark.parametrize("file", ["progress.pt", "model.safetensors", "optimizer.bin"])
@pytest.mark.parametrize("content", [None, b"", b"garbage"], ids=["missing", "empty", "garbage"])
def test_a_damaged_state_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, content: bytes | None
) -> None:
    stop_at(monkeypatch, 2, 1)
    with pytest.raises(StopError):
        train(CONFIG, tmp_path / "run", device="cpu")
    monkeypatch.undo()
    path = tmp_path / "run/state" / file
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(TrainingError, match=r"state cannot be continued from: .*; --force begins anew"):
        train(CONFIG, tmp_path / "run", device="cpu", resume=True)


def test_a_state_that_would_run_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Attack:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "canary"),)

    stop_at(monkeypatch, 2, 1)
    with pytest.raises(StopError):
        train(CONFIG, tmp_path / "run", device="cpu")
    monkeypatch.undo()
    for file in ("progress.pt", "optimizer.bin", "random_states_0.pkl", "custom_checkpoint_0.pkl"):
        before = (tmp_path / "run/state" / file).read_bytes() if (tmp_path / "run/state" / file).exists() else None
        torch.save(Attack(), tmp_path / "run/state" / file)
        if file != "random_states_0.pkl":  # accelerate passes over random states that it cannot read; they are not used
            with pytest.raises(TrainingError, match="cannot be continued from"):
                train(CONFIG, tmp_path / "run", device="cpu", resume=True)
        else:
            train(CONFIG, tmp_path / "other", device="cpu", resume=True)
        assert not (tmp_path / "canary").exists()
        path = tmp_path / "run/state" / file
        path.write_bytes(before) if before is not None else path.unlink()
