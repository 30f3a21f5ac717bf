"""Two networks of PyTorch as the halves of a bundle: what they return is read, their range and latents are brought to
the bundle's units."""

from __future__ import annotations

import functools
import logging
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vae_runtime.errors import ExportError
from vae_runtime.preprocess import Float32

from ..graphs import DecoderGraph, EncoderGraph, without_validation
from ..imported import ImportOptions
from .meaning import Trial, is_split, require_kind, settle_meaning, to_logvar
from .outputs import Encoded, read_encoded, read_reconstruction
from .trial import DoesNotRunError, noise, require_batch, run

_log = logging.getLogger(__name__)

PROBES = 8  # inputs that show whether a second output may be negative


class Reading(NamedTuple):
    """How an encoder's output is read: kind, whether one tensor is cut in two, and what the second part is."""

    kind: str
    split: bool = False
    meaning: str = "logvar"


def encode(network: nn.Module, x: Tensor, signed: bool, reading: Reading) -> Any:
    """Images in [0, 1] through an encoder that takes [-1, 1] where `signed` -> (mean, logvar), or the code."""
    with without_validation():
        encoded = _in_float32(read_encoded(network(2 * x - 1 if signed else x)))
    if reading.kind == "autoencoder":
        return encoded.mean
    mean, spread = encoded.mean.chunk(2, dim=1) if reading.split else encoded[:2]
    assert spread is not None
    return mean, to_logvar(spread, reading.meaning, torch.log)


def decode(network: nn.Module, z: Tensor, signed: bool) -> Tensor:
    """Latents through a decoder that gives [-1, 1] where `signed` -> images around [0, 1]."""
    with without_validation():
        output = _to_float32(read_reconstruction(network(z)), "decoder")
    return (output + 1) / 2 if signed else output


def _in_float32(encoded: Encoded) -> Encoded:
    spread = encoded.spread
    return Encoded(
        _to_float32(encoded.mean, "encoder"),
        None if spread is None else _to_float32(spread, "encoder"),
        encoded.meaning,
    )


def _to_float32(x: Tensor, half: str) -> Tensor:
    """What a bundle's outputs are in, of any floating type."""
    if not x.is_floating_point():
        rule = ": indices of a codebook are no latents" if half == "encoder" else ", images in [0, 1] or vectors"
        raise ExportError(f"the {half} gives values in {x.dtype}; expected floating point{rule}")
    return x if x.dtype == torch.float32 else x.float()


def require_float32(half: str, network: nn.Module) -> None:
    """Raises: ExportError: the network, which does not run, has weights in another floating type."""
    for value in (*network.parameters(), *network.buffers()):
        if value.is_floating_point() and value.dtype != torch.float32:
            raise ExportError(
                f"the {half} does not run on float32: it has parameters or buffers in {value.dtype}; convert it with"
                " .float()"
            )


def make_graphs(
    encoder: nn.Module, decoder: nn.Module, shape: tuple[int | None, ...], options: ImportOptions
) -> tuple[EncoderGraph, DecoderGraph]:
    """Both networks under the contract of a bundle, in evaluation mode.

    encoder: takes (N, *shape) in the options' range; decoder gives it, or logits. See `outputs` for the
        forms of what they return.

    Raises:
        ExportError: a network does not run, or returns what is not understood.
        InputError: an option is missing or contradicts the networks.
    """
    x = noise(shape, PROBES, options.multiple_of)
    return make_bare_graphs(encoder.eval(), decoder.eval(), x, options, threshold=False)


def make_bare_graphs(
    encoder: nn.Module, decoder: nn.Module, x: Float32, options: ImportOptions, threshold: bool
) -> tuple[EncoderGraph, DecoderGraph]:
    """The same of networks in evaluation mode, and no module around either, so that weights keep the names they have.

    x: inputs (N, *shape), in the bundle's units, to try them with. threshold: see `EncoderGraph`.

    Raises:
        ExportError, InputError: as `make_graphs`.
    """
    signed, units = options.input_range == "signed", _units(options)
    reading = read(encoder, decoder, x, options)
    encoding = functools.partial(encode, signed=signed, reading=reading)
    decoding = functools.partial(decode, signed=signed and not options.logits)
    return (
        EncoderGraph(encoder, reading.kind, *units, threshold, call=encoding),
        DecoderGraph(decoder, x.ndim == 4, *units, options.logits, decoding),
    )


def _units(options: ImportOptions) -> tuple[float, float]:
    """The scale and the shift of latents."""
    scale, shift = options.latent_scale, options.latent_shift
    return 1.0 if scale is None else float(scale), 0.0 if shift is None else float(shift)


def read(encoder: nn.Module, decoder: nn.Module, x: Float32, options: ImportOptions) -> Reading:
    """Find out by trying how the encoder's output is to be read."""
    inputs = torch.from_numpy(x)
    with torch.no_grad(), without_validation():
        output = _run_encoder(encoder, 2 * inputs - 1 if options.input_range == "signed" else inputs)
        mean, spread, meaning = _in_float32(read_encoded(output))
        if spread is not None and mean.equal(spread) and mean.any():  # which may both begin as zeros
            raise ExportError(
                "the encoder returns the same values as mean and as log-variance; return (mean, logvar), or of an"
                " autoencoder the code alone"
            )
        split = spread is None and is_split(mean.shape, *_trials(decoder, mean, inputs), options)
    if split:
        mean, spread = mean.chunk(2, dim=1)
    kind = "autoencoder" if spread is None else "vae"
    require_kind(kind, options)
    _log.info("the encoder's %s", _describe(kind, split, meaning))
    if spread is None:
        return Reading(kind)
    return Reading(kind, split, settle_meaning(meaning, float(spread.min()), options))


def _describe(kind: str, split: bool, named: str | None) -> str:
    """How its output is read, for who looks on."""
    if kind == "autoencoder":
        return "output is read as the code of an autoencoder"
    if split:
        return "one output is cut in two, the mean and its spread"
    return f"outputs are mean and {named}, as they are named" if named else "two outputs are read as mean and spread"


def _run_encoder(encoder: nn.Module, x: Tensor) -> Any:
    try:
        return run(encoder, x, "encoder")
    except DoesNotRunError as error:
        if x.ndim == 4 and _runs(encoder, flat := x.flatten(1)):
            channels, height, width = x.shape[1:]
            raise DoesNotRunError(
                f"the encoder takes vectors, {tuple(flat.shape)}, and no images, {tuple(x.shape)}; let encode begin"
                f" with x.flatten(1) and decode end with .view(-1, {channels}, {height}, {width}), or export it for"
                f" vectors of {flat.shape[1]}",
                error.half,
            ) from error
        raise


def _runs(network: nn.Module, x: Tensor) -> bool:
    try:
        network(x)
    except (Exception, SystemExit):
        return False
    return True


def _trials(decoder: nn.Module, output: Tensor, x: Tensor) -> tuple[Trial, Trial]:
    """Whether the decoder takes the encoder's output whole, and its first half."""
    require_batch(output.shape, len(x))
    whole, half = _takes(decoder, output, x), _takes(decoder, output.chunk(2, dim=1)[0], x)
    if not whole[0] and not half[0]:
        require_float32("decoder", decoder)
    if not whole[0] and not half[0] and output.ndim > 2 and _takes(decoder, output.chunk(2, dim=-1)[0], x)[0]:
        raise ExportError(
            f"the encoder returns one tensor of shape {tuple(output.shape)}, and the decoder takes half of its last"
            " axis; return (mean, logvar), for example h.chunk(2, -1)"
        )
    return whole, half


def _takes(decoder: nn.Module, z: Tensor, x: Tensor) -> Trial:
    """Whether the decoder makes of z something like x, and if not, why."""
    try:
        output = read_reconstruction(run(decoder, z.contiguous(), "decoder"))
    except ExportError as error:
        return False, str(error)
    if output.shape != x.shape:
        return False, f"it returns shape {tuple(output.shape)} for inputs of shape {tuple(x.shape)}"
    return True, ""
