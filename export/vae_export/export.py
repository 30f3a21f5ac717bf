"""From a model to a verified bundle."""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from vae_runtime.errors import BundleError, ExportError, InputError
from vae_runtime.manifest import (
    COLOURS,
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
from vae_runtime.preprocess import Float32, require_plain_array, to_model_input
from vae_runtime.version import __version__
from vae_training.checkpoint import Checkpoint

from .bundle import check_output, write_bundle
from .graphs import DecoderGraph, EncoderGraph, decoder_to_onnx, encoder_to_onnx
from .quality import Budget
from .verify import Reference, verify
from .wanted import Made, Wanted, check_wanted

GOLDEN_COUNT = 4
GOLDEN_TOLERANCE = {"fp32": 1e-4}  # between machines and engine versions; the export's own tolerance is tighter
GOLDEN_SOURCES = ("held-out", "examples", "synthetic")
SYNTHETIC_SEED = 0
DEFAULT_BUDGET = Budget()


def export_checkpoint(
    checkpoint: Checkpoint,
    path: str | os.PathLike[str],
    *,
    name: str,
    examples: np.ndarray | None = None,
    golden: str | None = None,
    tolerance: float = 1e-5,
    precisions: Sequence[str] = ("fp32",),
    budget: Budget = DEFAULT_BUDGET,
    keep: bool = False,
    force: bool = False,
) -> Manifest:
    """Write a trained checkpoint as a bundle.

    examples: what to verify with; None takes the checkpoint's own, held-out ones first.
    golden: where the 4 golden inputs come from: "held-out" (the checkpoint's), "examples" (the first of `examples`), or
        "synthetic" (seeded noise, no real input). None: "examples" if there are any, else "held-out".
    precisions, budget, keep: see `export_bundle`. The checkpoint's training examples calibrate, its held-out ones
        measure.

    Raises:
        ExportError, InputError, OutputError: see `export_bundle`.
    """
    held_out = checkpoint.examples["held_out"].numpy()
    inputs = [examples] if examples is not None else [held_out, checkpoint.examples["train"].numpy()]
    x = np.concatenate([to_model_input(part, checkpoint.input, "examples") for part in inputs])
    source = golden or ("examples" if examples is not None else "held-out")
    if source == "examples" and examples is None:
        raise InputError(
            "golden is 'examples', but none were given; pass some (--data) or choose held-out or synthetic"
        )
    golden_inputs = to_model_input(held_out, checkpoint.input, "examples") if source == "held-out" else x
    parts = None if examples is not None else (x[len(held_out) :], x[: len(held_out)])
    wanted = check_wanted(precisions, budget, keep, x, parts)
    model = checkpoint.build_model()
    threshold = checkpoint.likelihood.binarize == "threshold"
    # The models of vae_training clamp logvar and end images in a sigmoid themselves.
    return _export(
        EncoderGraph(_Half(model, "encode"), checkpoint.kind, threshold=threshold, clamp=False),
        DecoderGraph(_Half(model, "decode"), clamp=False),
        path,
        spec=checkpoint.input,
        x=x,
        golden=(source, golden_inputs),
        likelihood=checkpoint.likelihood,
        name=name,
        training={**checkpoint.dataset, "metrics": dict(checkpoint.metrics)},
        tolerance=tolerance,
        wanted=wanted,
        force=force,
    )


def export_bundle(
    encoder: nn.Module,
    decoder: nn.Module,
    path: str | os.PathLike[str],
    *,
    examples: Any,
    kind: str = "vae",
    name: str | None = None,
    likelihood: Mapping[str, Any] | None = None,
    latent_scale: float = 1.0,
    latent_shift: float = 0.0,
    colour: str | None = None,
    resize: str = "exact",
    golden: str = "examples",
    tolerance: float = 1e-5,
    precisions: Sequence[str] = ("fp32",),
    budget: Budget = DEFAULT_BUDGET,
    keep: bool = False,
    force: bool = False,
) -> Manifest:
    """Export any two modules as a bundle, verified against PyTorch on `examples`.

    encoder: x -> (mean, logvar), or for kind="autoencoder" x -> code. decoder: z -> reconstruction. Both take and give
        physical units: images float32 (N, C, H, W) in [0, 1] (the result is cut to that range), vectors float32 (N, D).
        They are put into evaluation mode for the export and left as they were.
    examples: real inputs, at least one, numpy or torch, as `vae_runtime.VAE.encode` takes them; the more, the better
        verified.
    name: None takes the file name of `path`.
    likelihood: for example {"type": "gaussian", "scale": 0.1} or {"type": "bernoulli"}; None where it is not known.
    latent_scale, latent_shift: the bundle's latents are (z - shift) · scale; logvar grows by 2·log(scale).
    colour: "grey" or "rgb", None by the number of channels. resize: "exact", "stretch" or "crop", how a picture file of
        another size becomes an input.
    golden: "examples", whose first 4 then travel with the bundle, or "synthetic", seeded noise.
    tolerance: largest error of a reconstruction relative to the data's range; ten times that for mean and logvar,
        relative to max|reference|.
    precisions: which to write beside "fp32", the reference, which always is: "int8", "fp16". Even rows of the examples
        calibrate them, odd rows measure what they lose against fp32.
    budget: how much that may be. A precision that loses more is not written, and the manifest's `refused` says why.
    keep: write it nevertheless, marked in the manifest (`within_budget`); never one that gives NaN or infinity, or is
        so far off on the golden inputs that a self-test would tell nothing.

    Raises:
        ExportError: torch cannot export a half, it breaks the contract, or it differs by more than the tolerance.
        InputError: an argument breaks a rule. OutputError: `path` exists, or cannot be written.
    """
    _check_choice("kind", kind, KINDS)
    _check_choice("golden", golden, ("examples", "synthetic"))
    _check_positive("latent_scale", latent_scale)
    if isinstance(latent_shift, bool) or not isinstance(latent_shift, (int, float)) or not math.isfinite(latent_shift):
        raise InputError(f"latent_shift is {latent_shift!r}; expected a finite number")
    spec, x = _inputs(examples, colour, resize)
    try:
        parsed = Likelihood.from_dict(likelihood) if likelihood is not None else None
    except BundleError as error:
        raise InputError(str(error)) from None
    threshold = parsed is not None and parsed.binarize == "threshold"
    wanted = check_wanted(precisions, budget, keep, x)
    with _evaluation_mode(encoder, decoder):
        return _export(
            EncoderGraph(encoder, kind, float(latent_scale), float(latent_shift), threshold),
            DecoderGraph(decoder, spec.is_image, float(latent_scale), float(latent_shift)),
            path,
            spec=spec,
            x=x,
            golden=(golden, x),
            likelihood=parsed,
            name=name or Path(path).stem,
            training={},
            tolerance=tolerance,
            wanted=wanted,
            force=force,
        )


def _export(
    encoder: EncoderGraph,
    decoder: DecoderGraph,
    path: str | os.PathLike[str],
    *,
    spec: InputSpec,
    x: Float32,
    golden: tuple[str, Float32],
    likelihood: Likelihood | None,
    name: str,
    training: Mapping[str, Any],
    tolerance: float,
    wanted: Wanted,
    force: bool,
) -> Manifest:
    _check_choice("golden", golden[0], GOLDEN_SOURCES)
    _check_positive("tolerance", tolerance)
    check_output(path, force)
    reference = Reference(encoder, decoder)
    latent_shape = _try_out(reference, encoder.kind, x[:2], spec)
    pair = x[np.arange(2) % len(x)]  # two rows: a batch traced at one would be taken for a constant
    latents = reference.encode(pair)[MEAN]
    graphs = encoder_to_onnx(encoder, torch.from_numpy(pair)), decoder_to_onnx(decoder, torch.from_numpy(latents))
    fidelity = verify(graphs, reference, x, spec, tolerance)
    latent = LatentSpec(latent_shape, {"type": "standard_normal"} if encoder.kind == "vae" else None)
    golden_values = _golden_values(reference, golden, spec)
    made = Made()
    if wanted.names:
        from .precisions import make_precisions  # late: what it needs of onnxruntime takes a second to import

        made = make_precisions(wanted, graphs, reference, spec, latent, likelihood, golden_values)
    manifest = Manifest(
        kind=encoder.kind,
        name=name,
        input=spec,
        latent=latent,
        likelihood=likelihood,
        precisions={"fp32": Precision("encoder.onnx", "decoder.onnx", fidelity.to_dict()), **made.precisions},
        files={},
        golden=Golden("golden.npz", golden[0], {**GOLDEN_TOLERANCE, **made.tolerance}),
        training=training,
        producer=_producer(),
        budget=wanted.budget.to_dict(),
        refused=made.refused,
    )
    files = {"encoder.onnx": graphs[0], "decoder.onnx": graphs[1], **made.graphs}
    return write_bundle(path, manifest, files, golden_values, force)


def _try_out(reference: Reference, kind: str, x: Float32, spec: InputSpec) -> tuple[int, ...]:
    """Run both halves once in PyTorch, check the shapes of what comes out, and return the latent's."""
    try:
        encoded = reference.encode(x)
        reconstruction = reference.decode(encoded[MEAN])
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ExportError(f"the model does not run on its examples of shape {x.shape}: {reason}") from error
    if len(encoded) != (2 if kind == "vae" else 1):
        expected = "mean and logvar" if kind == "vae" else "its code alone"
        raise ExportError(f"the encoder returns {len(encoded)} tensor(s); {kind!r} means that it returns {expected}")
    shapes = {value.shape for value in encoded.values()}
    if len(shapes) != 1 or encoded[MEAN].ndim < 2 or len(encoded[MEAN]) != len(x):
        raise ExportError(
            f"the encoder returns shapes {sorted(shapes)} for {len(x)} inputs; expected (N, ...), all alike"
        )
    if reconstruction.shape != x.shape:
        raise ExportError(
            f"the decoder returns shape {reconstruction.shape} for inputs of {x.shape}; they must be the same"
        )
    return encoded[MEAN].shape[1:]


def _golden_values(reference: Reference, golden: tuple[str, Float32], spec: InputSpec) -> dict[str, Float32]:
    source, examples = golden
    if source == "synthetic":
        rng = np.random.default_rng(SYNTHETIC_SEED)
        low, high = (0.0, 1.0) if spec.is_image else (float(examples.min()), float(examples.max()))
        examples = rng.uniform(low, high, (GOLDEN_COUNT, *spec.shape)).astype(np.float32)
    x = np.ascontiguousarray(examples[:GOLDEN_COUNT])
    encoded = reference.encode(x)
    return {INPUT: x, **encoded, RECONSTRUCTION: reference.decode(encoded[MEAN])}


def _inputs(examples: Any, colour: str | None, resize: str) -> tuple[InputSpec, Float32]:
    """What kind of input the examples are, and the examples as the encoder takes them."""
    if isinstance(examples, torch.Tensor):
        examples = examples.detach().cpu().numpy()
    require_plain_array(examples, "examples")
    if (examples.dtype, examples.ndim) not in ((np.uint8, 3), (np.uint8, 4), (np.float32, 4), (np.float32, 2)):
        rule = "expected images (N, H, W[, C]) uint8 or (N, C, H, W) float32, or vectors (N, D) float32"
        raise InputError(f"examples has shape {examples.shape} and dtype {examples.dtype}; {rule}")
    if examples.ndim == 2:
        spec = InputSpec("vector", examples.shape[1:])
        return spec, to_model_input(examples, spec, "examples")
    if examples.dtype == np.uint8:
        shape = (examples.shape[3] if examples.ndim == 4 else 1, *examples.shape[1:3])
    else:
        shape = examples.shape[1:]
    if colour is None:
        colour = {count: key for key, count in COLOURS.items()}.get(shape[0])
    try:
        spec = InputSpec.from_dict({"type": "image", "shape": list(shape), "colour": colour, "resize": resize})
    except BundleError as error:
        raise InputError(str(error)) from None
    return spec, to_model_input(examples, spec, "examples")


class _Half(nn.Module):
    """One method of a model as a module of its own."""

    def __init__(self, model: nn.Module, method: str) -> None:
        super().__init__()
        self.model, self.method = model, method

    def forward(self, x: torch.Tensor) -> Any:
        return getattr(self.model, self.method)(x)


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


def _check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(f"{name} is {value!r}; expected one of {', '.join(allowed)}")


def _check_positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise InputError(f"{name} is {value!r}; expected a finite number above 0")
