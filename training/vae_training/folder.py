"""The output folder of a training run: what is in it, when it may be used again, and the state to continue from.

run.json             what was asked for; its presence says that the folder is ours
state/               everything needed to continue; gone when the run is complete
model.pt, reconstructions.png, samples.png, rate-distortion.png, tensorboard/
metrics.json         written last: the run of run.json is complete
"""

from __future__ import annotations

import json
import secrets
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

from vae_runtime.atomic import write_json, writing
from vae_runtime.clutter import is_clutter
from vae_runtime.errors import OutputError, TrainingError
from vae_runtime.version import __version__

from .config import TrainConfig

FORMAT = "vae-training"
FORMAT_VERSION = 1
RUN_FILE, METRICS_FILE, MODEL_FILE, STATE_FOLDER = "run.json", "metrics.json", "model.pt", "state"
TENSORBOARD_FOLDER = "tensorboard"


class RunFolder:
    """An output folder that belongs to one run; `open_run` makes one."""

    def __init__(self, path: Path, run: str) -> None:
        self.path, self.run = path, run

    @property
    def state(self) -> Path:
        return self.path / STATE_FOLDER

    @property
    def tensorboard(self) -> Path:
        return self.path / TENSORBOARD_FOLDER

    def finished(self) -> dict[str, Any] | None:
        """The metrics of this run if it is complete, else None."""
        metrics = _read_json(self.path / METRICS_FILE)
        return metrics if metrics is not None and metrics.get("run") == self.run else None

    def finish(self, metrics: dict[str, Any]) -> None:
        """Write the metrics, with `run` among them, which makes the run complete, and drop the state."""
        write_json(self.path / METRICS_FILE, metrics, sort_keys=False)
        shutil.rmtree(self.state, ignore_errors=True)

    def remove_events(self) -> None:
        """The curves of a run before, which TensorBoard would draw into those of this one."""
        if not self.tensorboard.is_symlink():
            for path in self.tensorboard.glob("events.out.tfevents.*"):
                path.unlink(missing_ok=True)

    @property
    def state_before(self) -> Path:
        """Where the state of the run before is while this one begins, see `_begin_run`."""
        return self.path / f".{STATE_FOLDER}.{self.run}.old"

    def remove_leftovers(self) -> None:
        """What a run that was killed while writing left half done, or set aside for a moment."""
        for aside in self.path.glob(f".{STATE_FOLDER}.*.old"):
            if self.state.exists() or aside == self.state_before:
                shutil.rmtree(aside, ignore_errors=True)
            else:
                aside.rename(self.state)
        for path in self.path.glob(f".*.{'[0-9a-f]' * 8}.part"):  # as `vae_runtime.atomic` names them
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def recorded_config(path: Path) -> dict[str, Any] | None:
    """The settings of the run in the folder `path`, or None where there is none.

    Raises:
        TrainingError: run.json is of another version, or lacks what a run is continued with.
    """
    record = _read_record(path)
    if record is None:
        return None
    _check_record(path, record)
    settings: dict[str, Any] = record["config"]
    return settings


def open_run(path: Path, config: TrainConfig, data: str, resume: bool, force: bool) -> RunFolder:
    """Make `path` the folder of a run with the resolved settings `config`. data: `Source.digest`.

    A new or empty folder is taken, and one with no more in it than file managers leave. One with a run of ours in it is
    continued with `resume` and begun anew with `force`: then what the old run left stays until the new one replaces it,
    but for its state and TensorBoard's events. Foreign files are never touched.

    Raises:
        OutputError: the folder has something in it and neither applies, or it cannot be written.
        TrainingError: `resume`, and the recorded settings or the data differ, or run.json is of another version or
            lacks what a run is continued with.
    """
    if path.exists() and not path.is_dir():
        raise OutputError(f"{path} is a file; expected the name of a folder")
    occupied = path.is_dir() and not all(child.suffix == ".part" or is_clutter(child.name) for child in path.iterdir())
    record = _read_record(path) if occupied else None
    if occupied and record is None:
        raise OutputError(f"{path} has files in it that vae-train did not write; name a new folder")
    if record is not None and not (resume or force):
        raise OutputError(f"{path} has a training run in it; pass --resume to continue it or --force to begin anew")
    if record is not None and resume:
        return _continue_run(path, config, data, record)
    return _begin_run(path, config, data)


def _read_record(path: Path) -> dict[str, Any] | None:
    """What run.json holds, or None where there is none of ours."""
    record = _read_json(path / RUN_FILE)
    is_ours = record is not None and record.get("format") == FORMAT and isinstance(record.get("config"), dict)
    return record if is_ours else None


def _check_record(path: Path, record: dict[str, Any]) -> None:
    """Raise `TrainingError` unless a run can be continued with what run.json holds."""
    if record.get("format_version") != FORMAT_VERSION:
        raise TrainingError(
            f"{path / RUN_FILE} has format_version {record.get('format_version')!r}; this version continues runs of"
            f" {FORMAT_VERSION}"
        )
    missing = [key for key in ("run", "data") if key not in record]
    missing += [f"config.{field.name}" for field in fields(TrainConfig) if field.name not in record["config"]]
    if missing:
        raise TrainingError(
            f"{path / RUN_FILE} is damaged: it lacks {', '.join(missing)}, without which the run cannot be continued; "
            "--force begins anew"
        )


def _continue_run(path: Path, config: TrainConfig, data: str, record: dict[str, Any]) -> RunFolder:
    _check_record(path, record)
    for key, value in config.to_dict().items():
        if (begun := record["config"][key]) != value:
            raise TrainingError(
                f"{path} was begun with {key} {begun!r}, not {value!r}; a run continues only "
                "with the settings it began with, --force begins anew"
            )
    folder = RunFolder(path, str(record["run"]))
    if folder.finished() is None and record["data"] != data:
        raise TrainingError(
            f"{path} was begun with other examples than {config.data} has now: what was trained on then may be in the"
            " test part today; --force begins anew"
        )
    folder.remove_leftovers()
    return folder


def _begin_run(path: Path, config: TrainConfig, data: str) -> RunFolder:
    """The old run's state goes aside, under the name of the new run, and is dropped once run.json is of that one; until
    then, and where run.json cannot be written, it belongs to the old run and comes back."""
    folder = RunFolder(path, secrets.token_hex(8))
    description = {"format": FORMAT, "format_version": FORMAT_VERSION, "run": folder.run, "config": config.to_dict()}
    description |= {"data": data, "producer": {"vae-edge": __version__}}
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        if folder.state.exists():
            folder.state.rename(folder.state_before)
    try:
        write_json(path / RUN_FILE, description, sort_keys=False)
    finally:
        _remove_leftovers(path)
    folder.remove_events()
    return folder


def _remove_leftovers(path: Path) -> None:
    """Of the run that run.json is of now."""
    record = _read_record(path)
    RunFolder(path, "" if record is None else str(record.get("run"))).remove_leftovers()


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) else None
