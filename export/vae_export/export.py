"""From a model to a verified bundle."""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Unpack

import numpy as np
from torch import Tensor, nn

from vae_runtime.arguments import check_choice, check_flag, check_number, check_path
from vae_runtime.codec import UINT8
from vae_runtime.errors import ExportError, InputError
from vae_runtime.manifest import (
    GOLDEN_FILE,
    HALF_NAMES,
    INPUT,
    KINDS,
    MEAN,
    RECONSTRUCTION,
    Golden,
    InputSpec,
    LatentSpec,
    Likelihood,
    Manifest,
    Precision,
)
from vae_runtime.preprocess import Float32, binarize, to_model_input
from vae_runtime.tiling import Progress
from vae_runtime.version import __version__
from vae_training.checkpoint import EXAMPLES, Checkpoint

from .bundle import write_bundle
from .examples import (
    check_examples,
    each_without_torch,
    example_spec,
    free_size,
    image_range,
    range_of_means,
    synthetic_inputs,
)
from .graphs import DecoderGraph, EncoderGraph
from .halves import Halves, graph_file
from .imported import GOLDEN, HELD_OUT, Arguments, Imported
from .importers.modules import Modules
from .judge import CODEC_EXAMPLES, Judge
from .likelihood import agree, parse_likelihood
from .on_data import LEAST_FOR_UNITS, OnData, plan_on_data
from .options import DEFAULT_BUDGET, ExportOptions, Options
from .plausibility import check_plausible
from .quality import Budget, significant
from .reference import Reference
from .threshold import Thresholded
from .tiling import find_tiling
from .verify import latent_pattern, run_both, verify
from .wanted_precisions import Made, check_wanted

_log = logging.getLogger(__name__)

GOLDEN_COUNT = 4
GOLDEN_TOLERANCE = 1e-4  # of fp32, at least: between machines and engine versions results differ by rounding
OWN_PIXELS_SEED = 0  # of the draw that makes a checkpoint's own examples binary
SYNTHETIC_EXAMPLES = 4  # where an imported model comes without real ones
_NONE: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class _Inputs:
    """What an export is made with. x, golden and units are as the encoder takes them.

    x: to verify with. is_real: these are no noise. parts: of x, one for the ranges of activations, one to measure a
        precision with; None: even rows and odd rows.
    golden: the first of these are the golden ones, or like these where they are synthetic.
    units: real ones, for the active units; None: there are none.
    prior, calibrate: what a prior is fitted to, and whose scores are calibrated; None: nobody's. calibrate_source: what
        those are.
    """

    x: Float32
    is_real: bool
    parts: tuple[Float32, Float32] | None
    golden: Float32
    units: Float32 | None
    prior: Any
    calibrate: Any
    calibrate_source: str = "data"


def export_checkpoint(
    checkpoint: Checkpoint,
    path: str | os.PathLike[str],
    *,
    name: str,
    examples: np.ndarray | None = None,
    golden: str | None = None,
    tolerance: float = 1e-5,
    prior_examples: np.ndarray | None = None,
    calibrate: Any = None,
    **options: Unpack[ExportOptions],
) -> Manifest:
    """Write a trained checkpoint as a bundle.

    name: of the bundle.
    examples: what to verify with, as `vae_runtime.VAE.encode` takes it; None: the checkpoint's own examples, held-out
        ones first. Own examples of a model trained with "dynamic" binarisation are drawn binary for all that is done
        with them, with a fixed seed; what is passed is taken as it is.
    golden: where the 4 golden inputs come from: "held-out" (the checkpoint's), "examples" (the first of `examples`), or
        "synthetic" (seeded noise, no real input). None: "examples" if some are given, else "held-out".
    prior_examples: what the prior is fitted to; None: `examples`, else the checkpoint's training examples.
    calibrate: see `export_bundle`; or "held-out", the checkpoint's own held-out examples. Active units are measured on
        these in any case, or on `examples` where they are fewer than 32.
    tolerance; options, which are precisions, budget, keep, prior, calibrate_tile, scores, progress and force: see
        `export_bundle`. Without `examples`, the checkpoint's training examples calibrate precisions, and its held-out
        ones measure them.

    Returns, raises and warns as `export_bundle` does.
    """
    golden = check_choice(
        (HELD_OUT if examples is None else "examples") if golden is None else golden, "golden", (HELD_OUT, *GOLDEN)
    )
    if golden == "examples" and examples is None:
        raise InputError(
            "golden is 'examples', but none were given; pass some (--data), or choose held-out or synthetic"
        )
    checked = Options(path=path, name=name, golden=golden, tolerance=tolerance, **options)
    spec = checkpoint.input
    train, held_out = _own_examples(checkpoint)
    if examples is None:
        x, parts, default_prior = np.concatenate([held_out, train]), (train, held_out), train
    else:
        x, parts, default_prior = to_model_input(examples, spec, "examples"), None, examples
    calibrates_own = isinstance(calibrate, str) and calibrate == HELD_OUT
    inputs = _Inputs(
        x,
        is_real=True,
        parts=parts,
        golden=held_out if golden == HELD_OUT else x,
        units=held_out if examples is None or len(held_out) >= LEAST_FOR_UNITS else x,
        prior=default_prior if prior_examples is None else prior_examples,
        calibrate=held_out if calibrates_own else calibrate,
        calibrate_source=HELD_OUT if calibrates_own else "data",
    )
    model = checkpoint.build_model()
    return _export(
        halves_of(model, checkpoint.kind, checkpoint.likelihood.binarize == "threshold"),
        free_size(spec, model.config.multiple_of),
        inputs,
        checked,
        checkpoint.likelihood,
        training={**checkpoint.dataset, **_drawn(checkpoint), "metrics": dict(checkpoint.metrics)},
    )


def _own_examples(checkpoint: Checkpoint) -> tuple[Float32, Float32]:
    """The checkpoint's training and held-out examples as the encoder takes them: what was trained on. Of a model of
    draws they are drawn binary here, the same in every export: they are stored as they were read, and grey ones would
    be as far from all that it knows as an anomaly. A threshold is in the encoder itself."""
    rng = np.random.default_rng(OWN_PIXELS_SEED) if _drawn(checkpoint) else None
    parts = (to_model_input(checkpoint.examples[part].numpy(), checkpoint.input, "examples") for part in EXAMPLES)
    train, held_out = (x if rng is None else binarize(x, "dynamic", rng) for x in parts)
    return train, held_out


def _drawn(checkpoint: Checkpoint) -> dict[str, str]:
    """What the manifest's `training` says where the checkpoint's own examples are drawn binary, else nothing."""
    return {"own_examples": "drawn binary"} if checkpoint.likelihood.binarize == "dynamic" else {}


def export_imported(
    imported: Imported,
    path: str | os.PathLike[str],
    *,
    examples: np.ndarray | None = None,
    name: str | None = None,
    likelihood: Mapping[str, Any] | str | None = None,
    golden: str | None = None,
    tolerance: float = 1e-4,
    prior_examples: np.ndarray | None = None,
    unit_examples: np.ndarray | None = None,
    calibrate: Any = None,
    **options: Unpack[ExportOptions],
) -> Manifest:
    """Write a model from elsewhere as a bundle, verified against the library that it is from.

    examples: real inputs, as `vae_runtime.VAE.encode` takes them, of one size; None takes seeded synthetic ones, and
        the manifest says so. Precisions beside fp32 need real ones.
    likelihood: see `export_bundle`; None: that of the source, if it states one.
    golden: "examples" or "synthetic"; None: examples where there are any.
    name: None takes that of `imported`.
    tolerance, calibrate; options, as of `export_checkpoint`: see `export_bundle`.
    prior_examples: real inputs that the prior is fitted to; None: `examples`. unit_examples: real inputs on which the
        active units are measured; None: `examples`, if there are at least 32.

    Returns, raises and warns as `export_bundle` does.
    """
    golden = check_choice(
        ("synthetic" if examples is None else "examples") if golden is None else golden, "golden", GOLDEN
    )
    name = imported.name if name is None else name
    checked = Options(path=path, name=name, golden=golden, tolerance=tolerance, **options)
    reduced = sorted(set(checked.precisions) - {"fp32"})
    if examples is None and (golden == "examples" or reduced):
        wants = "golden 'examples'" if golden == "examples" else f"precision {reduced[0]!r}"
        raise InputError(f"{wants} needs real inputs, and there are none; pass some (--data)")
    spec = example_spec(imported, examples)
    stated = parse_likelihood(imported.likelihood)
    parsed = agree(parse_likelihood(likelihood), stated)
    halves = imported.halves
    if parsed != stated and parsed is not None and parsed.binarize == "threshold":
        halves = Thresholded(halves)
    x = synthetic_inputs(spec, SYNTHETIC_EXAMPLES) if examples is None else to_model_input(examples, spec, "examples")
    prior_examples = examples if prior_examples is None else prior_examples
    units = None if examples is None else x
    if unit_examples is not None:
        units = to_model_input(unit_examples, spec, "unit_examples")
    inputs = _Inputs(
        x,
        is_real=examples is not None,
        parts=None,
        golden=x,
        units=units,
        prior=prior_examples,
        calibrate=calibrate,
    )
    if imported.is_free:
        spec = InputSpec("image", imported.input_shape, spec.colour, "exact", imported.multiple_of, x.shape[2:])
    return _export(
        halves,
        spec,
        inputs,
        checked,
        parsed,
        input_range=imported.input_range if spec.is_image else range_of_means(parsed),
        origin=imported.origin,
    )


def export_bundle(
    encoder: Any,
    decoder: Any,
    path: str | os.PathLike[str],
    *,
    examples: Any,
    kind: str = "vae",
    name: str | None = None,
    likelihood: Mapping[str, Any] | str | None = None,
    input_range: str | None = None,
    spread: str | None = None,
    logits: bool = False,
    latent_scale: float = 1.0,
    latent_shift: float = 0.0,
    colour: str | None = None,
    resize: str | None = None,
    multiple_of: int | None = None,
    golden: str = "examples",
    tolerance: float = 1e-5,
    precisions: Sequence[str] = ("fp32",),
    budget: Budget = DEFAULT_BUDGET,
    keep: bool = False,
    prior: str | None = None,
    calibrate: Any = None,
    calibrate_tile: int | None = None,
    scores: Sequence[str] | None = None,
    progress: Progress | None = None,
    force: bool = False,
) -> Manifest:
    """Export any two modules as a bundle, verified against PyTorch on `examples`.

    encoder: a torch.nn.Module, or a method of one, x -> (mean, logvar), or for kind="autoencoder" x -> code. What it
        returns may be a pair, a dict, a torch.distributions.Normal, or one tensor with the mean and the logvar along
        the channels. x is images, float32 (N, C, H, W), or vectors, float32 (N, D).
    decoder: a torch.nn.Module, or a method of one, z -> reconstruction, of the shape of x. Those of images are cut to
        [0, 1]. Both halves run in evaluation mode and are left in the mode that they were in; what their own code
        changes when it runs, such as a count of its calls, stays changed.
    examples: real inputs, at least one, as `vae_runtime.VAE.encode` takes them, or the same as a torch tensor; the
        more, the better verified. From 32 on, the active units are measured on them.
    kind: "vae" or "autoencoder".
    name: None takes the file name of `path`.
    likelihood: for example {"type": "gaussian", "scale": 0.1} or {"type": "bernoulli"}, or in short "gaussian:0.1" or
        "bernoulli"; the scale is in the bundle's units. None where it is not known.
    input_range: of the images that the modules take and give: "unit", [0, 1], or "signed", [-1, 1]; None: unit. The
        bundle's own are in [0, 1] in either case. Vectors have no range: None.
    spread: what the encoder gives beside the mean, where it has no name: "logvar", "log_std", "std" or "variance";
        None: logvar, and an error where its values are never negative.
    logits: the decoder gives logits, and the graph gets the sigmoid that makes a reconstruction of them.
    latent_scale, latent_shift: the bundle's latents are (z - shift) · scale; logvar grows by 2·log(scale).
    colour: "grey" or "rgb"; None: by the number of channels. resize: "exact", "stretch" or "crop": how a picture file
        of another size becomes an input; None: exact. Vectors have neither, and pictures of free size keep theirs.
    multiple_of: the bundle takes images of any height and width that are multiples of this, and latents of
        (C, height / multiple_of, width / multiple_of); None: images of the examples' size alone.
    golden: what the bundle's self-test compares: "examples", whose first 4 then travel with the bundle, or
        "synthetic", seeded noise.
    tolerance: largest error of a reconstruction relative to the data's range; ten times that for mean and logvar,
        relative to max|reference|.
    precisions: which to write beside "fp32", the reference, which is always written: "int8", "fp16", "tf32". Even rows
        of the examples calibrate them, odd rows measure what they lose against fp32; so at least two are needed.
    budget: how much that may be. A precision that loses more is not written, and the manifest's `refused` says why.
    keep: write it nevertheless, marked in the manifest (`within_budget`); never one that gives NaN or infinity, or is
        so far off on the golden inputs that a self-test would prove nothing.
    prior: "gaussian", or "mixture:10" with 10 components, is fitted to the latents of the examples, for
        `VAE.sample(prior="fitted")`; None: a VAE has the standard normal prior alone, an autoencoder none.
    calibrate: at least 100 normal examples, like `examples`, that the model was not trained on: `VAE.is_anomaly` takes
        its thresholds from the quantiles of their anomaly scores. Where height and width are free, it is an array, or
        a list of arrays, each with images of any one size, which are scored as `VAE.score(pad=True)` does, by the
        method "reconstruction" alone: the other scores grow with the size.
    calibrate_tile: `tile` of `VAE.score` for these images; None: each as a whole. Where tiles are an approximation, the
        thresholds hold for scores with the same tile only.
    scores: which to calibrate, of "elbo", "reconstruction" and "log_likelihood", which takes 100 decodings of each
        example; None: all that the bundle has.
    progress: progress(done, total), in examples, is called while they are scored for "log_likelihood" or where sizes
        are free, which may take minutes.
    force: replace the bundle at `path`, once the new one is complete. What is no bundle is never replaced.

    Returns:
        The manifest as written; `refused` names the precisions that were not written, with the reasons.

    Raises:
        ExportError: a half does not run, is random or mixes the rows of a batch, torch cannot export it, it breaks the
            contract, or it differs by more than the tolerance; or the prior cannot be fitted.
        InputError: an argument breaks a rule, or contradicts what a half gives.
        OutOfMemoryError: the memory does not suffice to run a graph.
        OutputError: `path` exists, or cannot be written.

    Warns:
        FewExamplesWarning: so few examples that a precision's quality or the fitted prior may not generalise.
        ExportWarning: the bundle is written, but may not be what was meant: reconstructions are poor or leave [0, 1],
            latents carry no information or do not fit the prior, or methods leave out a part of their model.
    """
    check_choice(kind, "kind", KINDS)
    check_choice(golden, "golden", GOLDEN)
    scale, shift = check_number(latent_scale, "latent_scale", above=0), check_number(latent_shift, "latent_shift")
    spec, x = check_examples(examples, colour, resize, multiple_of)
    parsed = parse_likelihood(likelihood)
    threshold = parsed is not None and parsed.binarize == "threshold"
    arguments = Arguments(
        kind=kind,
        input_range=image_range(input_range, spec),
        logits=check_flag(logits, "logits"),
        latent_scale=scale,
        latent_shift=shift,
        spread=spread,
    )
    options = Options(
        path=path,
        name=check_path(path, "path").stem if name is None else name,
        golden=golden,
        tolerance=tolerance,
        precisions=precisions,
        budget=budget,
        keep=keep,
        prior=prior,
        calibrate_tile=calibrate_tile,
        scores=scores,
        progress=progress,
        force=force,
    )
    inputs = _Inputs(x, is_real=True, parts=None, golden=x, units=x, prior=x, calibrate=calibrate)
    modules = Modules(encoder, decoder)
    with _evaluation_mode(modules.encoder, modules.decoder):
        halves = modules.open(x, arguments, threshold)
        input_range = arguments.input_range or range_of_means(parsed)
        return _export(halves, spec, inputs, options, parsed, input_range=input_range)


def _export(
    halves: Halves,
    spec: InputSpec,
    inputs: _Inputs,
    options: Options,
    likelihood: Likelihood | None,
    *,
    input_range: str | None = None,
    training: Mapping[str, Any] = _NONE,
    origin: Mapping[str, Any] = _NONE,
) -> Manifest:
    x = inputs.x
    wanted = check_wanted(options.precisions, options.budget, options.keep, x, inputs.parts)
    on_data = _check(spec, inputs, options)
    pair = x[np.arange(2) % len(x)]  # two rows: a batch traced at one would be taken for a constant
    _log.info("running the model")
    encoded = _try_out(halves, pair, spec)
    latents = encoded[MEAN]
    on_data.check(latents.shape[1:])
    check_plausible(halves, x, input_range, inputs.is_real, options.prior is None)
    _log.info("exporting the two graphs")
    graphs = halves.to_onnx(pair, latents, spec.is_free)
    _log.info("comparing them with the model on %d inputs", len(x))
    fidelity = verify(graphs, halves, x, spec, options.tolerance)
    tiling = find_tiling(graphs, spec, x[:1], encoded) if spec.is_free else None
    on_data.check_tile(tiling, spec.multiple_of)
    prior = {"type": "standard_normal"} if halves.kind == "vae" else None
    latent = LatentSpec(latent_pattern(spec, latents.shape[1:]), prior)
    _log.info("computing the golden values")
    golden = _golden_values(halves, options.golden, inputs.golden, spec)
    made = Made()
    if wanted.names:
        from .precisions import make_precisions  # late: what it needs of onnxruntime takes a second to import

        made = make_precisions(wanted, graphs, halves, spec, latent, likelihood, golden)
    judge = Judge(graphs, spec, latent, likelihood, x[:CODEC_EXAMPLES])
    # An error that was let through here must not fail a self-test elsewhere.
    golden_error = judge.golden_error(golden, (None, None), "fp32")
    tolerances = {"fp32": max(GOLDEN_TOLERANCE, significant(2 * golden_error, 2)), **made.tolerance}
    encoder, decoder = map(graph_file, HALF_NAMES)
    manifest = Manifest(
        kind=halves.kind,
        name=options.name,
        input=spec,
        latent=latent,
        likelihood=likelihood,
        precisions={"fp32": Precision(encoder, decoder, fidelity.to_dict()), **made.precisions},
        files={},
        golden=Golden(GOLDEN_FILE, options.golden, tolerances),
        training=training,
        producer=_producer(),
        budget=wanted.budget.to_dict(),
        refused=made.refused,
        origin=origin,
        tiling=tiling,
        # What a codec costs is not measured on noise.
        latent_codecs={UINT8: judge.codec_cost()} if spec.is_image and inputs.is_real else {},
        on_cuda=made.on_cuda,
    )
    files = {encoder: graphs[0], decoder: graphs[1], **made.graphs}
    manifest, more = on_data.measure(manifest, files)
    return write_bundle(options.path, manifest, {**files, **more}, golden, options.force)


def _check(spec: InputSpec, inputs: _Inputs, options: Options) -> OnData:
    """What is to be computed on data. Raises `InputError` before any work is done."""
    return plan_on_data(
        spec,
        inputs.units,
        prior=options.prior,
        prior_examples=inputs.prior,
        calibrate=each_without_torch(inputs.calibrate, "calibrate"),
        source=inputs.calibrate_source,
        tile=options.calibrate_tile,
        scores=options.scores,
        progress=options.progress,
    )


def _try_out(halves: Halves, x: Float32, spec: InputSpec) -> dict[str, Float32]:
    """What the encoder gives, after both halves have run once where they are from; the shapes are checked."""
    encoded, reconstruction = run_both(halves, x)
    if len(encoded) != (2 if halves.kind == "vae" else 1):
        expected = "mean and logvar" if halves.kind == "vae" else "its code alone"
        raise ExportError(
            f"the encoder returns {len(encoded)} tensor(s); {halves.kind!r} means that it returns {expected}"
        )
    shapes, mean = {value.shape for value in encoded.values()}, encoded[MEAN]
    if len(shapes) != 1 or mean.ndim < 2 or len(mean) != len(x):
        raise ExportError(
            f"the encoder returns shapes {sorted(shapes)} for {len(x)} inputs; expected (N, ...), all alike"
        )
    if reconstruction.shape != x.shape:
        raise ExportError(
            f"the decoder returns shape {reconstruction.shape} for inputs of {x.shape}; they must be the same"
        )
    grid = tuple(side // spec.multiple_of for side in x.shape[2:])
    if spec.is_free and mean.shape[2:] != grid:
        raise ExportError(
            f"the encoder returns shape {mean.shape} for inputs of {x.shape}; with height and width free and multiples"
            f" of {spec.multiple_of}, expected (N, C, {grid[0]}, {grid[1]})"
        )
    return encoded


def _golden_values(halves: Halves, source: str, examples: Float32, spec: InputSpec) -> dict[str, Float32]:
    if source == "synthetic":
        examples = synthetic_inputs(spec, GOLDEN_COUNT, examples)
    x = np.ascontiguousarray(examples[:GOLDEN_COUNT])
    encoded, reconstruction = run_both(halves, x)
    return {INPUT: x, **encoded, RECONSTRUCTION: reconstruction}


def halves_of(model: nn.Module, kind: str, threshold: bool = False) -> Reference:
    """The halves of a model of `vae_training`, which clamps logvar and ends images in a sigmoid itself. threshold: see
    `EncoderGraph`."""

    def encode(model: Any, x: Tensor) -> Any:
        return model.encode(x)

    def decode(model: Any, z: Tensor) -> Any:
        return model.decode(z)

    encoder = EncoderGraph(model, kind, threshold=threshold, clamp=False, call=encode)
    return Reference(encoder, DecoderGraph(model, clamp=False, call=decode))


@contextlib.contextmanager
def _evaluation_mode(*modules: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; afterwards every submodule is in the mode it was in."""
    modes = [(part, part.training) for module in modules for part in module.modules()]
    try:
        for module in modules:
            module.eval()
        yield
    finally:
        for part, training in modes:
            part.training = training


def _producer() -> dict[str, str]:
    return {"vae-edge": __version__, **{name: importlib.metadata.version(name) for name in ("torch", "onnx")}}
