"""A pair of ONNX graphs as the halves of a bundle: run as they are, and wrapped to the contract."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from vae_runtime.errors import ExportError
from vae_runtime.manifest import INPUT, LATENT, LOGVAR, MEAN, RECONSTRUCTION
from vae_runtime.preprocess import Float32
from vae_training.models import LOGVAR_MAX, LOGVAR_MIN

from ..imported import ImportOptions
from .meaning import TO_LOGVAR, Trial, is_split, require_kind, settle_meaning, to_logvar
from .onnx_source import OnnxSource
from .outputs import named_pair
from .trial import noise, require_batch, run
from .wrapping import Wrapped

PROBES = 4
MOMENTS = "moments"  # one tensor, mean and log-variance one after the other


class Reading(NamedTuple):
    """Which outputs of the encoder are read. spread: None where `mean` is a code, `MOMENTS` where it holds both."""

    mean: str
    spread: str | None
    meaning: str = "logvar"

    @property
    def kind(self) -> str:
        return "autoencoder" if self.spread is None else "vae"


class OnnxHalves:
    """Both graphs: `encode` and `decode` run the original files, with the contract's arithmetic in numpy; `to_onnx`
    has it in the graph."""

    against = "onnxruntime"

    def __init__(
        self, encoder: OnnxSource, decoder: OnnxSource, shape: tuple[int | None, ...], options: ImportOptions
    ) -> None:
        self._encoder, self._decoder = encoder, decoder
        self._signed, self._image = options.input_range == "signed", len(shape) == 3
        self._logits = options.logits
        self._scale = np.float32(1.0 if options.latent_scale is None else options.latent_scale)
        self._shift = np.float32(0.0 if options.latent_shift is None else options.latent_shift)
        if len(decoder.outputs) != 1:
            names = ", ".join(port.name for port in decoder.outputs)
            raise ExportError(f"the decoder gives {len(decoder.outputs)} outputs ({names}); expected one")
        self._reading = self._read(noise(shape, PROBES, options.multiple_of), options)
        self.kind = self._reading.kind

    def encode(self, x: Float32) -> dict[str, Float32]:
        outputs = self._encode(x)
        mean = outputs[self._reading.mean]
        spread = outputs.get(self._reading.spread or "")
        if self._reading.spread == MOMENTS:
            channels = mean.shape[1] // 2
            mean, spread = mean[:, :channels], mean[:, channels:]
        encoded: dict[str, Float32] = {MEAN: (mean - self._shift) * self._scale}
        if spread is not None:
            encoded[LOGVAR] = to_logvar(spread, self._reading.meaning, np.log).clip(LOGVAR_MIN, LOGVAR_MAX)
            encoded[LOGVAR] += np.float32(2 * math.log(self._scale))
        return encoded

    def decode(self, z: Float32) -> Float32:
        output = self.uncut(z)
        return np.clip(output, 0, 1) if self._image and not self._logits else output

    def uncut(self, z: Float32) -> Float32:
        output = self._decode(z / self._scale + self._shift)
        if self._logits:  # the sigmoid, which overflows nowhere so
            output = np.tanh(output * np.float32(0.5))
        return output * np.float32(0.5) + np.float32(0.5) if self._signed or self._logits else output

    def to_onnx(self, x: Float32, z: Float32, free: bool) -> tuple[bytes, bytes]:
        encoder, decoder = Wrapped(self._encoder, free), Wrapped(self._decoder, free)
        source = encoder.start(INPUT, x.shape)
        encoder.network(encoder.affine(source, 2, -1) if self._signed else source)
        self._end_encoder(encoder, z.shape)
        source = decoder.start(LATENT, z.shape)
        decoder.network(decoder.affine(source, 1 / float(self._scale), float(self._shift)))
        output = decoder.output(self._decoder.outputs[0].name)
        if self._logits:
            output = decoder.sigmoid(output)
        else:
            output = decoder.affine(output, 0.5, 0.5) if self._signed else output
            output = decoder.clip(output, 0, 1) if self._image else output
        decoder.end(RECONSTRUCTION, output, x.shape)
        return encoder.to_file("encoder"), decoder.to_file("decoder")

    def _end_encoder(self, graph: Wrapped, shape: tuple[int, ...]) -> None:
        reading, scale, shift = self._reading, float(self._scale), float(self._shift)
        mean = graph.output(reading.mean)
        spread = None
        if reading.spread == MOMENTS:
            mean, spread = graph.split(mean)
        elif reading.spread is not None:
            spread = graph.output(reading.spread)
        graph.end(MEAN, graph.affine(graph.affine(mean, 1, -shift), scale, 0), shape)
        if spread is not None:
            takes_log, factor = TO_LOGVAR[reading.meaning]
            spread = graph.affine(graph.log(spread) if takes_log else spread, factor, 0)
            logvar = graph.affine(graph.clip(spread, LOGVAR_MIN, LOGVAR_MAX), 1, 2 * math.log(scale))
            graph.end(LOGVAR, logvar, shape)

    def _read(self, x: Float32, options: ImportOptions) -> Reading:
        """Which outputs are mean and spread: by name, by order, or one tensor, told by what the decoder takes."""
        outputs = run(self._encode, x, "encoder")
        names = list(outputs)
        mean, spread, named = named_pair(names) or (None, None, None)
        if named is None and len(names) == 2:
            mean, spread = names
        elif named is None and len(names) == 1:
            mean, spread = names[0], None
            output = outputs[mean]
            require_batch(output.shape, len(x))
            first = np.array_split(output, 2, axis=1)[0]
            if is_split(output.shape, self._takes(output, x), self._takes(first, x), options):
                spread = MOMENTS
        if mean is None or (spread is None and len(names) > 1):
            raise ExportError(
                f"the encoder gives {len(names)} outputs ({', '.join(names)}); expected mean and logvar, or one"
            )
        require_kind("vae" if spread else "autoencoder", options)
        if spread is None:
            return Reading(mean, None)
        values = np.split(outputs[mean], 2, axis=1)[1] if spread == MOMENTS else outputs[spread]
        return Reading(mean, spread, settle_meaning(named, float(values.min()), options))

    def _takes(self, z: Float32, x: Float32) -> Trial:
        try:
            shape = run(self._decode, np.ascontiguousarray(z), "decoder").shape
        except ExportError as error:
            return False, str(error)
        return shape == x.shape, f"it gives shape {shape} for inputs of shape {x.shape}"

    def _encode(self, x: Float32) -> dict[str, Float32]:
        return _run(self._encoder, 2 * x - 1 if self._signed else x)

    def _decode(self, z: Float32) -> Float32:
        return next(iter(_run(self._decoder, z).values()))


def _run(source: OnnxSource, inputs: Float32) -> dict[str, Float32]:
    """The outputs of the original file by name, in float32."""
    port = source.input
    names = [output.name for output in source.outputs]
    values = source.session.run(names, {port.name: np.ascontiguousarray(inputs, dtype=port.dtype)})
    return {name: value.astype(np.float32) for name, value in zip(names, values, strict=True)}
