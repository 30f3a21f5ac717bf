"""What a bundle states about real data: active units, a fitted prior, quantiles of anomaly scores. The runtime's own
code computes all of it on the finished fp32 graphs, so that a device which runs them agrees."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from vae_runtime.arguments import check_count
from vae_runtime.calibration import LEAST_EXAMPLES, SCORE_METHODS, Calibration
from vae_runtime.errors import ApproximateTilingWarning, InputError, OutOfMemoryError
from vae_runtime.latent_space import ACTIVE_VARIANCE, unit_moments
from vae_runtime.manifest import PRIOR_FILE, ActiveUnits, InputSpec, Manifest, Tiling
from vae_runtime.preprocess import (
    Float32,
    Float64,
    check_layout,
    check_range,
    image_size,
    require_plain_array,
    to_model_input,
)
from vae_runtime.scoring import score_methods
from vae_runtime.tiling import Progress, check_tile
from vae_runtime.vae import VAE

from .in_memory import run_in_memory
from .prior import PriorFit, parse_prior
from .quality import DIGITS, ExportWarning, significant, warn

_log = logging.getLogger(__name__)

LEAST_FOR_UNITS = 32  # examples; the variance of fewer says little
PART = 64  # examples, at most, that are scored at once where that takes long
# Hundredths, and at both ends thousandths: thresholds lie in the tail.
LEVELS = tuple(sorted({*(n / 100 for n in range(101)), *(n / 1000 for n in (*range(10), *range(990, 1000))), 0.9999}))


class InactiveUnitsWarning(ExportWarning):
    """The latents of real inputs are all about the same."""


class Source(Protocol):
    """Examples that are read when they are needed, such as those of `vae_runtime.sources`."""

    @property
    def names(self) -> Sequence[str]: ...

    def __len__(self) -> int: ...

    def batches(self, size: int) -> Iterator[NDArray[Any]]:
        """At most `size` at once, images of one size each."""
        ...


class _Arrays:
    """Arrays as a source, each of images of one size."""

    def __init__(self, arrays: Sequence[NDArray[Any]]) -> None:
        self._arrays = arrays

    @property
    def names(self) -> Sequence[str]:
        return [f"example {number}" for number in range(len(self))]

    def __len__(self) -> int:
        return sum(map(len, self._arrays))

    def batches(self, size: int) -> Iterator[NDArray[Any]]:
        return (array[start : start + size] for array in self._arrays for start in range(0, len(array), size))


@dataclass(frozen=True)
class OnData:
    """What is computed on which examples, all as the encoder takes them; None: it is left out.

    units: for the active units; where these are too few, those of the prior or the calibration are taken. prior: what
        to fit, and to what.
    calibration: normal examples, for thresholds, each of its own size where sizes are free. calibration_source:
        "held-out" or "data". tile: `calibrate_tile` of `export_bundle`. scores: the methods to calibrate; None: all
        that the bundle has.
    progress: see `export_bundle`.
    """

    units: Float32 | None = None
    prior: PriorFit | None = None
    calibration: Float32 | Source | None = None
    calibration_source: str = "data"
    tile: int | None = None
    scores: tuple[str, ...] | None = None
    progress: Progress | None = None

    def check(self, latent_shape: tuple[int, ...]) -> None:
        """Raise `InputError` if the prior cannot be fitted to latents of this shape, before the work is done."""
        if self.prior is not None:
            self.prior.check(math.prod(latent_shape))

    def check_tile(self, tiling: Tiling | None, multiple: int) -> None:
        """Raise `InputError` if a half looks further than the tiles go; multiple: of pixels, as for images."""
        if self.tile is None or tiling is None:
            return
        for half in tiling:
            if half.context is not None:
                check_tile(self.tile // multiple, half.context, multiple, "calibrate_tile")

    def measure(self, manifest: Manifest, graphs: dict[str, bytes]) -> tuple[Manifest, dict[str, bytes]]:
        """The manifest with what was found, and the files that it names beside the graphs."""
        latent, files, calibration = manifest.latent, {}, None
        real = (self.units, None if self.prior is None else self.prior.examples, self.calibration)
        units = next((x for x in real if x is not None and len(x) >= LEAST_FOR_UNITS), None)
        if units is None and self.prior is None and self.calibration is None:
            return manifest, {}  # without opening the graphs, which may be large
        with run_in_memory(manifest, graphs) as vae, warnings.catch_warnings():
            warnings.simplefilter("ignore", ApproximateTilingWarning)  # the manifest says by how much
            if units is not None:
                _log.info("measuring the active units on %d inputs", len(units))
                latent = latent._replace(active_units=active_units(vae, units, self.tile))
            if self.prior is not None:
                _log.info("fitting the prior to %d inputs", len(self.prior.examples))
                fitted, files[PRIOR_FILE] = self.prior.fit(vae)
                latent = latent._replace(fitted_prior=fitted)
            if self.calibration is not None:
                calibration = self._calibrate(vae, self.calibration)
        if manifest.kind == "vae" and latent.active_units is not None and not latent.active_units.active:
            warn(
                f"no unit of the latent space is active: the posterior's mean varies by less than {ACTIVE_VARIANCE}"
                f" over {latent.active_units.examples} real inputs, so that latents carry no information about them;"
                " the model has collapsed, or takes its inputs in another range",
                InactiveUnitsWarning,
            )
        return manifest._replace(latent=latent, calibration=calibration), files

    def _calibrate(self, vae: VAE, examples: Float32 | Source) -> Calibration:
        # Scores in nats grow with the size of an image: thresholds would hold for one size alone.
        there = ("reconstruction",) if vae.manifest.input.is_free else score_methods(vae.manifest)
        for method in self.scores or ():
            if method not in there:
                raise InputError(f"scores has {method!r}; this bundle is calibrated by {', '.join(there)} alone")
        scores = {}
        for method in self.scores or there:
            _log.info("calibrating the score %r on %d inputs", method, len(examples))
            if isinstance(examples, np.ndarray) and method != "log_likelihood":
                found = vae.score(examples, method)
            else:
                found = self._score_slowly(vae, examples, method)
            _require_finite(found, f"calibrate: the score {method!r}", _source(examples).names)
            quantiles = np.quantile(found, LEVELS)
            scores[method] = tuple(significant(value, DIGITS) for value in quantiles)  # rounding keeps their order
        return Calibration(self.calibration_source, len(examples), LEVELS, scores, self.tile)

    def _score_slowly(self, vae: VAE, examples: Float32 | Source, method: str) -> Float64:
        """`VAE.score`, part by part, with `progress`; images of free size are padded."""
        parts = []
        for batch in _source(examples).batches(PART):
            parts.append(_within_memory(vae.score, batch, method, pad=vae.manifest.input.is_free, tile=self.tile))
            if self.progress is not None:
                self.progress(sum(map(len, parts)), len(examples))
        return np.concatenate(parts)


def plan_on_data(
    spec: InputSpec,
    units: Float32 | None,
    *,
    prior: str | None = None,
    prior_examples: Any = None,
    calibrate: Any = None,
    source: str = "data",
    tile: int | None = None,
    scores: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> OnData:
    """What the caller asked for, checked before any work is done.

    spec: of the bundle's inputs; the examples are of its default size where it has free sizes. prior: "gaussian" or
        "mixture:10", to be fitted to `prior_examples`. calibrate: the examples for it, and tile, see `export_bundle`.
        scores: which of them to calibrate; None: all.

    Raises:
        InputError: an argument breaks a rule, or there are no real examples for what was asked for.
    """
    fit, example = None, spec._replace(shape=spec.example_shape, multiple_of=1, default_size=None)
    if prior is not None:
        kind, components = parse_prior(prior)
        if spec.is_free:
            raise InputError(
                f"prior is {prior!r}, which is fitted to latents of one shape; this model leaves height and width free"
            )
        if prior_examples is None:
            raise InputError(f"prior {prior!r} needs real inputs, and there are none; pass some (--data)")
        fit = PriorFit(kind, components, to_model_input(prior_examples, example, "the prior's examples"))
    checked = None if calibrate is None else _check_calibration(calibrate, spec if spec.is_free else example, source)
    size = None if tile is None else _check_tile(tile, spec, calibrate)
    return OnData(units, fit, checked, source, size, _check_scores(scores, calibrate), progress)


def active_units(vae: VAE, examples: Float32 | Source, tile: int | None = None) -> ActiveUnits:
    """How much the posterior's mean varies over the examples, unit by unit.

    A plain autoencoder's code has no prior whose variance would be 1: a unit of it counts as active where it varies by
    more than a hundredth of what the unit that varies most does. tile: as of `VAE.encode`, for examples of any size.
    """
    _, variances = unit_moments(_means(vae, examples, tile))
    rounded = tuple(significant(value, DIGITS) for value in variances)
    threshold = ACTIVE_VARIANCE if vae.manifest.kind == "vae" else significant(ACTIVE_VARIANCE * max(rounded), DIGITS)
    return ActiveUnits(rounded, threshold, len(examples))


def _means(vae: VAE, examples: Float32 | Source, tile: int | None) -> Iterator[Float32]:
    done, tile = 0, None if isinstance(examples, np.ndarray) else tile
    source = _source(examples)
    names = source.names  # which some make anew each time
    for batch in source.batches(PART):
        mean = _within_memory(vae.encode, batch, pad=vae.manifest.input.is_free, tile=tile).mean
        _require_finite(
            np.abs(mean).reshape(len(mean), -1).max(axis=1), "examples: the mean's largest value", names[done:]
        )
        done += len(mean)
        yield mean


def _within_memory(call: Callable[..., Any], batch: NDArray[Any], *arguments: Any, pad: bool, **options: Any) -> Any:
    """pad: as of the call, and whether the images are of any size."""
    try:
        return call(batch, *arguments, pad=pad, **options)
    except OutOfMemoryError as error:
        if not pad:
            raise
        raise type(error)(
            f"images of {'x'.join(map(str, image_size(batch)))} pixels to calibrate on: {error}: --calibrate-tile"
            " (calibrate_tile)"
        ) from None


def _source(examples: Float32 | Source) -> Source:
    return _Arrays([examples]) if isinstance(examples, np.ndarray) else examples


def _require_finite(values: NDArray[np.floating[Any]], what: str, names: Sequence[str]) -> None:
    """values: one for each example, in the order of the names, of which there may be more."""
    if not (finite := np.isfinite(values)).all():
        row = int(finite.argmin())
        raise InputError(f"{what} of {names[row]} is {values[row]}: the model overflows there; leave it out")


def _check_scores(scores: Sequence[str] | None, calibrate: Any) -> tuple[str, ...] | None:
    if scores is None:
        return None
    if isinstance(scores, str) or not scores or not set(scores) <= set(SCORE_METHODS):
        raise InputError(f"scores is {scores!r}; expected some of {', '.join(SCORE_METHODS)}")
    if calibrate is None:
        raise InputError(f"scores is {scores!r}, and nothing is calibrated; it says which scores are (--calibrate)")
    return tuple(dict.fromkeys(scores))


def _check_calibration(examples: Any, spec: InputSpec, source: str) -> Float32 | Source:
    if isinstance(examples, str):
        raise InputError(f"calibrate is {examples!r}, and only a model.pt has held-out examples; pass examples")
    name = "calibrate" if source == "data" else "held_out"
    checked = _of_any_size(examples, spec, name) if spec.is_free else to_model_input(examples, spec, name)
    if len(checked) < LEAST_EXAMPLES:
        rule = f"expected at least {LEAST_EXAMPLES}: fewer say too little of the tail that thresholds lie in"
        cure = "" if source == "data" else "; pass examples of your own (--calibrate DATA)"
        raise InputError(f"{name} has {len(checked)} examples; {rule}{cure}")
    return checked


def _of_any_size(examples: Any, spec: InputSpec, name: str) -> Source:
    """Images that are to be padded, as an array, several of them, or a source."""
    if hasattr(examples, "batches"):
        source: Source = examples
        return source
    arrays = examples if isinstance(examples, (list, tuple)) else [examples]
    for number, array in enumerate(arrays):
        label = f"{name}[{number}]" if arrays is examples else name
        require_plain_array(array, label)
        check_layout(array, spec._replace(multiple_of=1), label)
        if array.dtype != np.uint8:
            check_range(array, spec, label)
    return _Arrays(arrays)


def _check_tile(tile: Any, spec: InputSpec, calibrate: Any) -> int:
    size = check_count(tile, "calibrate_tile")
    if calibrate is None or not spec.is_free:
        what = "nothing is calibrated" if calibrate is None else "the model takes inputs of one shape only"
        raise InputError(f"calibrate_tile is {size}, and {what}; it is for images of free size (--calibrate)")
    if size % spec.multiple_of:
        raise InputError(f"calibrate_tile is {size}; expected a multiple of {spec.multiple_of} pixels, as for images")
    return size
