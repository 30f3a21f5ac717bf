"""The training loop: data in, `model.pt` out.

AdamW with warm-up and a cosine, gradient clipping, a moving average of the weights, whose best version by the
validation part is what is kept. Devices, mixed precision and several processes come from accelerate. A run can be
killed at any moment and continues exactly: all state is in `State` and in accelerate's, both written as one folder that
appears whole, and all randomness is a function of the seed and the step (see feed.py).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vae_runtime.atomic import atomic_folder
from vae_runtime.errors import InputError, MissingExtraError, TrainingError
from vae_runtime.preprocess import Float32, binarize

from . import report, sample_quality
from .config import CAPACITY_RISE, TrainConfig
from .data import Dataset
from .devices import make_accelerator
from .evaluate import figure_of_merit, measure, recalibrate
from .feed import (
    CALIBRATION_CHOICE,
    CALIBRATION_PIXELS,
    NOISE,
    PRIOR_CHOICE,
    PRIOR_PIXELS,
    TEST_PIXELS,
    VALIDATION_PIXELS,
    WEIGHTS,
    standard_normal,
    standard_rng,
)
from .folder import RunFolder, open_run
from .likelihood import measure_nll
from .losses import Objective, linear_rise
from .models import build_model, count_parameters
from .optimise import learning_rate, make_optimizer, moving_average, set_learning_rate
from .rate_distortion import require_matplotlib
from .sample_quality import measure_samples
from .source import Source, open_source
from .split import Parts

if TYPE_CHECKING:
    from accelerate import Accelerator

EVALUATIONS = 12  # about as many as this over a run; each costs an eighth of an epoch on a small data set
CURVE_EVALUATIONS = 24  # at least as many, epochs permitting, where they are the points of a rate-distortion curve
RECALIBRATION_EXAMPLES = 2048
MAX_PARAMETERS = 10**9
PROGRESS_FILE = "progress.pt"


def train(
    config: TrainConfig, output: str | Path, *, resume: bool = False, force: bool = False, device: str = "auto",
    checkpoint_seconds: float = 30.0, tensorboard: bool = False, progress: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Train as `config` says and leave model.pt, metrics.json and pictures in the folder `output`.

    resume: continue the run in `output`, if there is one, exactly with as many threads of torch as before; a finished
        run is left as it is. force: begin anew over it.
    checkpoint_seconds: the state to continue from is written this often, and 0 means after every epoch.
    progress: show a bar on stderr. Returns what metrics.json holds.

    Raises:
        InputError: bad data, or settings that do not go with them.
        OutputError: `output` exists and is not to be replaced, or cannot be written.
        TrainingError: the run has diverged, or the state in `output` cannot be continued.
        DeviceError, MissingExtraError: what was asked for is not there.
    """
    source = open_source(config)
    config = source.resolve(config)
    check_size(config, source.data)
    if config.capacity:
        require_matplotlib()
    accelerator = make_accelerator(device, config.mixed_precision)
    folder = _open_folder(Path(output), config, source.digest(), resume, force, accelerator)
    if (finished := folder.finished()) is not None:
        return finished
    run = Run(config, source, accelerator, folder)
    if resume and folder.state.is_dir():
        run.load()
    logging = tensorboard and accelerator.is_main_process
    with _summary_writer(folder.tensorboard, logging, run.state.step) as writer:
        run.fit(checkpoint_seconds, writer, progress and accelerator.is_main_process)
    return run.finish(progress and accelerator.is_main_process)


def check_size(config: TrainConfig, data: Dataset) -> None:
    """Refuse a model that cannot be built, or is absurdly large, before anything is allocated or written."""
    with torch.device("meta"):
        parameters = count_parameters(build_model(config.model_config(data.spec)))
    if parameters > MAX_PARAMETERS:
        raise InputError(f"the model would have {parameters:,} parameters; at most {MAX_PARAMETERS:,} are trained here")


@dataclass
class State:
    """What continues a run beside accelerate's own state (weights and optimizer)."""

    step: int = 0
    seconds: float = 0.0
    best: float = math.inf
    best_epoch: int = 0
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    stopped: bool = False


class Run:
    """One training run in memory."""

    def __init__(self, config: TrainConfig, source: Source, accelerator: Accelerator, folder: RunFolder) -> None:
        self.config, self.accelerator, self.folder = config, accelerator, folder
        self.data, self.parts, self.train_examples = source.data, source.parts, source.train_examples
        assert config.epochs is not None, "resolve first"
        if config.batch_size < 2 * accelerator.num_processes:
            raise InputError(
                f"batch_size is {config.batch_size}; {accelerator.num_processes} processes need 2 examples each"
            )
        self.feed = source.make_feed(config, accelerator.process_index, accelerator.num_processes)
        self.steps = config.epochs * self.feed.steps_per_epoch
        objective = initial_objective(config, self.data, self.parts).to(accelerator.device)
        if config.family != "mlp":
            # A sixth faster on CPU.
            objective = objective.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.latent_shape = objective.model.config.latent_shape
        self.ema = moving_average(objective, config.ema)
        fused = accelerator.device.type in ("cpu", "cuda")
        optimizer = make_optimizer(objective, config.learning_rate, config.weight_decay, fused)
        self.objective, self.optimizer = accelerator.prepare(objective, optimizer)
        self.validation = self.examples(self.parts.validation, VALIDATION_PIXELS)
        # Drawn, not the first: in file order these may be unlike the rest.
        drawn = standard_rng(config.seed, CALIBRATION_CHOICE).permutation(self.parts.train)[:RECALIBRATION_EXAMPLES]
        self.calibration = self.examples(drawn, CALIBRATION_PIXELS)
        self.state = State()

    def fit(self, checkpoint_seconds: float, writer: Any, progress: bool) -> None:
        """All steps that are left, with evaluations and checkpoints between them."""
        epochs, before, begun = self.config.epochs, self.state.seconds, time.perf_counter()
        assert epochs is not None, "resolve first"
        every = max(1, epochs // CURVE_EVALUATIONS if self.config.capacity else round(epochs / EVALUATIONS))
        saved = begun
        with _bar(self.state.step, self.steps, progress) as bar:
            while self.state.step < self.steps and not self.state.stopped:
                loss = self.train_step()
                bar.update()
                epoch, rest = divmod(self.state.step, self.feed.steps_per_epoch)
                if rest == 0:
                    self.require_not_diverged(loss)
                if rest == 0 and (epoch % every == 0 or self.state.step == self.steps):
                    self.evaluate(epoch, loss, writer)
                    bar.set_postfix_str(f"validation {self.state.history[-1]['validation_nats']:.2f} nats")
                self.state.seconds = before + time.perf_counter() - begun
                if self.due(rest, time.perf_counter() - saved, checkpoint_seconds):
                    if rest:
                        self.require_not_diverged(loss)
                    self.save()
                    saved = time.perf_counter()

    def train_step(self) -> Tensor:
        """One batch; returns the loss, still on the device."""
        config, step = self.config, self.state.step
        set_learning_rate(self.optimizer, learning_rate(step, self.steps, config.learning_rate, config.lr_warmup))
        x = torch.from_numpy(self.feed.batch(step)).to(self.accelerator.device)
        shape = (len(x), *self.latent_shape)
        noise = standard_normal(shape, config.seed, NOISE, step, self.accelerator.process_index, x.device)
        weight, capacity = self.kl_terms(step)
        self.objective.train()
        with self.accelerator.autocast():
            loss: Tensor = self.objective(x, noise, weight, capacity)
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.objective.parameters(), config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update_parameters(self.accelerator.unwrap_model(self.objective))
        self.state.step += 1
        return loss.detach()

    def kl_terms(self, step: int) -> tuple[float, float | None]:
        """The KL's weight at `step`, 0 of an autoencoder, and the capacity it is drawn to, or None where that is 0."""
        config = self.config
        if config.capacity:
            assert config.gamma is not None, "resolve first"
            return config.gamma, linear_rise(step, round(CAPACITY_RISE * self.steps), config.capacity)
        return linear_rise(step, round(config.kl_warmup * self.steps), config.beta or 0.0), None

    def evaluate(self, epoch: int, loss: Tensor, writer: Any) -> None:
        """Measure the averaged weights on the validation part, keep them if they are the best, maybe stop.

        With a capacity the last are the best: those before them were led to a lower rate.
        """
        objective = cast(Objective, self.ema.module)
        recalibrate(objective, self.calibration, self.config.seed)
        figures = measure(objective, self.validation, self.config.seed, draws=1)
        figure = figure_of_merit(figures, self.config.beta or 0.0)
        self.require_finite({"validation figure": figure, "likelihood's scale": objective.scale}, f"epoch {epoch}")
        entry: dict[str, Any] = {"epoch": epoch, "train_loss_nats": float(loss), "validation_nats": figure}
        terms = [name for name in ("reconstruction_nats", "kl_nats", "gradient_nats") if name in figures]
        if len(terms) > 1:
            entry |= {f"validation_{name}": figures[name] for name in terms}
        if self.config.capacity:
            entry["capacity_nats"] = self.kl_terms(self.state.step)[1]
        self.state.history.append(entry)
        if figure < self.state.best or self.config.capacity:
            self.state.best, self.state.best_epoch = figure, epoch
            self.state.best_weights = {key: tensor.detach().clone() for key, tensor in objective.state_dict().items()}
        if writer is not None:
            for name in ("train_loss_nats", "validation_nats"):
                writer.add_scalar(name, self.state.history[-1][name], self.state.step)
        warm = round(self.config.kl_warmup * self.steps) // self.feed.steps_per_epoch  # until then the loss changes
        self.state.stopped = 0 < self.config.patience <= epoch - max(warm, self.state.best_epoch)

    def require_finite(self, figures: dict[str, Any], where: str) -> None:
        """Raise `TrainingError` if a figure is NaN or infinite: the run has diverged."""
        for name, value in figures.items():
            if value is not None and not math.isfinite(value):
                rate = self.config.learning_rate
                raise TrainingError(
                    f"{where}: the {name} is {value}; try a learning rate below {rate:g}, or scale the data, in a run "
                    "begun anew (--force): --resume goes on with the same settings, and to the same end"
                )

    def require_not_diverged(self, loss: Tensor) -> None:
        """Raise `TrainingError` if the run has diverged: so no state that cannot go on replaces one that can. The loss
        is of before the last step; what became of the weights in it, they show themselves."""
        epoch = -(-self.state.step // self.feed.steps_per_epoch)
        largest = torch.stack([weight.detach().abs().amax() for weight in self.objective.parameters()]).amax()
        scale = self.accelerator.unwrap_model(self.objective).scale
        figures = {"train loss": float(loss), "largest weight": float(largest), "likelihood's scale": scale}
        self.require_finite(figures, f"epoch {epoch}")

    def examples(self, indices: NDArray[np.int64], draw: int) -> Float32:
        """The examples at `indices`, binarised as in training; a "dynamic" draw is the same for the same `draw`."""
        rng = standard_rng(self.config.seed, draw)
        return binarize(self.data.model_input(indices), self.config.binarize, rng)

    def due(self, rest: int, seconds: float, interval: float) -> bool:
        """Is it time to write the state? Several processes ask only at an epoch's end, and the first decides."""
        if self.accelerator.num_processes == 1:
            return rest == 0 if interval == 0 else seconds >= interval
        if rest != 0:
            return False
        from accelerate.utils import broadcast

        flag = torch.tensor([float(seconds >= interval)], device=self.accelerator.device)
        return bool(broadcast(flag).item())

    def save(self) -> None:
        """Write everything needed to continue, as one folder that appears whole."""
        from accelerate.utils import broadcast_object_list

        main = self.accelerator.is_main_process
        with atomic_folder(self.folder.state, may_replace=lambda _: True) if main else nullcontext() as temporary:
            (target,) = broadcast_object_list([str(temporary)])
            self.accelerator.save_state(target)
            if main:
                content = {
                    **vars(self.state),
                    "ema": self.ema.state_dict(),
                    "processes": self.accelerator.num_processes,
                }
                torch.save(content, Path(target) / PROGRESS_FILE)
            self.accelerator.wait_for_everyone()
        self.accelerator.wait_for_everyone()

    def load(self) -> None:
        """Take up the state that `save` wrote."""
        state = self.folder.state
        try:
            # Not accelerate's register_for_checkpointing: it would unpickle whatever the file holds.
            content = torch.load(state / PROGRESS_FILE, map_location="cpu", weights_only=True)
            processes = content.pop("processes")
            self.ema.load_state_dict(content.pop("ema"))
            self.state = State(**content)
            self.accelerator.load_state(str(state))
        except Exception as error:  # whatever a damaged file leads torch and safetensors to
            reason = " ".join(str(error).split()[:40])
            raise TrainingError(f"{state} cannot be continued from: {reason}; --force begins anew") from None
        if processes != self.accelerator.num_processes:
            raise TrainingError(
                f"{state} was written by {processes} processes, not {self.accelerator.num_processes}; "
                "only as many continue exactly"
            )

    def finish(self, progress: bool = False) -> dict[str, Any]:
        """Measure the best weights on the test part, and their samples, write everything, and return the metrics."""
        objective = cast(Objective, self.ema.module)
        objective.load_state_dict(self.state.best_weights)
        objective.eval()
        if self.accelerator.is_main_process:
            test = self.examples(self.parts.test, TEST_PIXELS)
            figures = {
                "test": measure(objective, test, self.config.seed),
                "validation": measure(objective, self.validation, self.config.seed),
            }
            if self.config.nll_samples:
                samples, seed = self.config.nll_samples, self.config.seed
                figures["test"] |= measure_nll(objective, test, seed, samples, progress)
            for part, measured in figures.items():
                self.require_finite(measured, part)
            if (quality := self.sample_quality(objective)) is not None:
                figures["samples"] = quality
            metrics = report.write_results(self, objective, test, figures)
        self.accelerator.wait_for_everyone()
        return metrics if self.accelerator.is_main_process else self.folder.finished() or {}

    def sample_quality(self, objective: Objective) -> dict[str, Any] | None:
        """See `sample_quality.measure_samples`; None where there is nothing to be measured."""
        test = self.parts.test[: sample_quality.MAX_TEST]
        elements = math.prod(self.data.spec.example_shape)
        most = min(sample_quality.MAX_TRAIN, max(100, sample_quality.MAX_TRAIN_ELEMENTS // elements))
        train = standard_rng(self.config.seed, PRIOR_CHOICE).permutation(self.parts.train)[:most]
        if not sample_quality.can_measure(objective, min(len(test), len(train))):
            return None
        encoded = self.examples(train, PRIOR_PIXELS)
        if self.config.binarize == "dynamic":  # samples are grey, as are the probabilities that binary images have
            grey = self.data.model_input(train), self.data.model_input(test)
            return measure_samples(objective, encoded, *grey, self.config.seed)
        return measure_samples(objective, encoded, encoded, self.examples(test, TEST_PIXELS), self.config.seed)


def initial_objective(config: TrainConfig, data: Dataset, parts: Parts) -> Objective:
    """The model with its first weights, which depend on the seed alone, and its likelihood.

    torch's global generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(standard_rng(config.seed, WEIGHTS).integers(2**63)))
        model = build_model(config.model_config(data.spec))
    x = torch.from_numpy(data.model_input(parts.train[:100_000]))
    model.fit_normalisation(x)
    # A first guess at the scale: what would be left if only the mean were reconstructed.
    left = (x - x.mean(0)).double()
    scale = float(left.abs().mean() if config.likelihood == "laplace" else left.square().mean().sqrt())
    likelihood = config.likelihood or "bernoulli"
    return Objective(model, likelihood, scale if scale > 0 else 1.0, config.free_bits, config.gradient_weight)


def _bar(step: int, steps: int, shown: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=steps, initial=step, unit="step", disable=not shown, mininterval=0.5)


@contextmanager
def _summary_writer(path: Path, wanted: bool, step: int) -> Iterator[Any]:
    """A TensorBoard writer, or None where none is wanted. What comes after `step` is about to be written again."""
    if not wanted:
        yield None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise MissingExtraError("tensorboard", "tensorboard", "writing for TensorBoard") from None
    with SummaryWriter(str(path), purge_step=step + 1) as writer:
        yield writer


def _open_folder(
    path: Path, config: TrainConfig, data: str, resume: bool, force: bool, accelerator: Accelerator
) -> RunFolder:
    """The first process makes the folder, the others find it made."""
    if accelerator.is_main_process:
        folder = open_run(path, config, data, resume, force)
    accelerator.wait_for_everyone()
    return folder if accelerator.is_main_process else open_run(path, config, data, resume=True, force=False)
