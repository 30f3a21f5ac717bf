"""What a finished run leaves: model.pt, the pictures, and metrics.json as the last."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING, Any

import torch

from vae_runtime.preprocess import Float32
from vae_runtime.version import __version__

from .checkpoint import Checkpoint, save_checkpoint
from .folder import MODEL_FILE
from .losses import Objective
from .models import count_macs, count_parameters
from .pictures import write_pictures
from .rate_distortion import CURVE_FILE, draw_curve

if TYPE_CHECKING:
    from .loop import Run

EXAMPLES = 256


def write_results(run: Run, objective: Objective, test: Float32, figures: dict[str, Any]) -> dict[str, Any]:
    """Write everything into the run's folder and return what metrics.json holds; `figures` is by part."""
    config, folder = run.config, run.folder
    size = {"parameters": count_parameters(objective.model), "macs": count_macs(objective.model)}
    likelihood = objective.to_likelihood(config.binarize)
    checkpoint = Checkpoint(
        kind=config.kind,
        config=objective.model.config,
        state_dict=objective.model.state_dict(),
        input=run.data.spec,
        likelihood=likelihood,
        examples={"train": _examples(run, run.parts.train), "held_out": _examples(run, run.parts.validation)},
        dataset=_dataset(run),
        metrics={**figures, **size, "best_epoch": run.state.best_epoch},
    )
    save_checkpoint(folder.path / MODEL_FILE, checkpoint)
    pictures = write_pictures(objective.model, test, folder.path, config.seed)
    if config.capacity:
        draw_curve(run.state.history, folder.path / CURVE_FILE)
        pictures.append(CURVE_FILE)
    metrics = {
        "format": "vae-metrics",
        "format_version": 1,
        "run": folder.run,
        **figures,
        "training": _training(run),
        "model": {**objective.model.config.to_dict(), **size},
        "likelihood": likelihood.to_dict(),
        "dataset": _dataset(run),
        "config": config.to_dict(),
        "files": [MODEL_FILE, *pictures],
        "producer": {"vae-edge": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    folder.finish(metrics)
    return metrics


def _examples(run: Run, indices: Any) -> torch.Tensor:
    """Up to 256 inputs as they were read, before any binarisation; for "held_out" from the validation part. The export
    makes them binary where the model takes such."""
    return torch.from_numpy(run.data.examples[indices[:EXAMPLES]].copy())


def _dataset(run: Run) -> dict[str, Any]:
    """Crops of photographs are counted as they lie side by side; `split_by` says what the parts were divided by:
    pictures, regions of each, or the files that the data set comes in."""
    counts = {"train": run.train_examples, "validation": len(run.parts.validation), "test": len(run.parts.test)}
    facts = {"order": run.config.order, "held_out_examples": "validation", **run.data.facts}
    name = run.data.name.encode(errors="replace").decode()  # a folder's may be any bytes
    return {"dataset": name, **counts, **facts}


def _training(run: Run) -> dict[str, Any]:
    """How it went. seconds: of the steps and their evaluations, without reading the data and the last figures."""
    state, accelerator = run.state, run.accelerator
    return {
        "seconds": round(state.seconds, 3),
        "epochs": state.step // run.feed.steps_per_epoch,
        "steps": state.step,
        "stopped_early": state.stopped,
        "best_epoch": state.best_epoch,
        "device": str(accelerator.device),
        "threads": torch.get_num_threads(),
        "processes": accelerator.num_processes,
        "history": state.history,
    }
