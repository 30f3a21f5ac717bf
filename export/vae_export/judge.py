"""Graphs of another precision, run on the same real examples as fp32's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np

from vae_runtime.boundary import decoder_boundary, encoder_boundary
from vae_runtime.codec import dequantize, quantize
from vae_runtime.fidelity import data_range, golden_error, psnr_db, relative_error
from vae_runtime.likelihood import negative_log_likelihood, targets
from vae_runtime.manifest import INPUT, LOGVAR, MEAN, RECONSTRUCTION, InputSpec, LatentSpec, Likelihood
from vae_runtime.posterior import Posterior
from vae_runtime.preprocess import Float32
from vae_runtime.session import GraphSession

from .halves import Pair
from .in_memory import open_graph
from .quality import NOISE_SEED, Figures, Measurement, significant

BATCH_SIZE = 32
CODEC_EXAMPLES = 64


class Judge:
    """fp32's outputs on `x`, computed once, and the measure of other graphs against them.

    graphs: the fp32 encoder and decoder. x: real examples as the encoder takes them.
    """

    def __init__(
        self,
        graphs: tuple[bytes, bytes],
        spec: InputSpec,
        latent: LatentSpec,
        likelihood: Likelihood | None,
        x: Float32,
    ) -> None:
        self._graphs, self._spec, self._x = graphs, spec, x
        kind = "autoencoder" if latent.prior is None else "vae"
        self._boundaries = encoder_boundary(kind, spec, latent.shape), decoder_boundary(spec, latent.shape)
        self._outputs = [MEAN] if latent.prior is None else [MEAN, LOGVAR]
        self._likelihood = None if latent.prior is None else likelihood
        self._target = targets(likelihood, x)
        self._range = data_range(x, spec.is_image)
        self._fp32_decoder = self._open_decoder(None)
        self._encoded = self._encode(self._open_encoder(None))
        self._reconstruction = self._decode(self._fp32_decoder, self._encoded[MEAN])

    @cached_property
    def _fp32(self) -> Figures:
        return self._figures(self._encoded, self._fp32_decoder, self._reconstruction)

    def measure(self, graphs: Pair) -> Measurement:
        """Another pair of graphs on the same examples and the same noise."""
        encoded, decoder, reconstruction = self._run(graphs)
        found = self._figures(encoded, decoder, reconstruction)
        errors = {"round_trip_max_error": self._error(reconstruction)}
        for name, reference in self._encoded.items():
            errors[f"{name}_max_error"] = float(np.abs(encoded[name] - reference).max())
            errors[f"{name}_relative_error"] = relative_error(encoded[name], reference)
        return Measurement(self._fp32, found, errors, len(self._x))

    def round_trip_error(self, graphs: Pair) -> float:
        """max|Δ| of reconstructions from fp32's, each pair's from its own mean, relative to the data's range."""
        return self._error(self._run(graphs)[2]) / self._range

    def form_error(self, graphs: Pair) -> float:
        """The largest error of an output: of reconstructions as above, of mean and logvar relative to the largest.

        Raises as `GraphSession.run`, also where the graphs hold for some numbers of examples alone.
        """
        encoder = self._open_encoder(graphs[0])
        decoder = self._fp32_decoder if graphs[1] is None else self._open_decoder(graphs[1])
        for count in (1, 3):
            decoder.run(encoder.run(np.repeat(self._x[:1], count, axis=0))[0])
        encoded = self._encode(encoder)
        errors = [relative_error(encoded[name], reference) for name, reference in self._encoded.items()]
        return float(np.max([self._error(self._decode(decoder, encoded[MEAN])) / self._range, *errors]))

    def fidelity(self, measured: Measurement, decoder: bytes | None) -> dict[str, Any]:
        """The manifest's `fidelity`: max|Δ| from fp32, the reconstruction's with fp32's mean given to both decoders."""
        mean = self._encoded[MEAN]
        found = self._reconstruction if decoder is None else self._decode(self._open_decoder(decoder), mean)
        errors = {name: value for name, value in measured.errors.items() if name.endswith("_max_error")}
        errors[f"{RECONSTRUCTION}_max_error"] = self._error(found)
        return {"against": "fp32", "examples": len(mean), **{k: significant(v, 2) for k, v in errors.items()}}

    def golden_error(self, golden: Mapping[str, Float32], graphs: Pair, precision: str) -> float:
        """The largest error of a tensor on the golden values, measured as `VAE.selftest` measures it."""
        encoder, decoder = graphs
        found = dict(zip(self._outputs, self._open_encoder(encoder).run(golden[INPUT]), strict=True))
        found[RECONSTRUCTION] = self._decode(self._open_decoder(decoder), golden[MEAN])
        is_image = self._spec.is_image
        errors = [golden_error(name, array, golden, precision, is_image) for name, array in found.items()]
        return float(np.max(errors))  # NaN where one is, which max() may pass over

    def codec_cost(self) -> dict[str, float]:
        """What latents in 8 bits cost the reconstruction: the entry of the manifest's `latent_codecs`."""
        x, mean = self._target[:CODEC_EXAMPLES], self._encoded[MEAN][:CODEC_EXAMPLES]
        psnr = psnr_db(self._reconstruction[:CODEC_EXAMPLES], x, self._range)
        quantized = quantize(mean)
        found = psnr_db(self._decode(self._fp32_decoder, dequantize(quantized)), x, self._range)
        pixels = math.prod(x.shape[2:]) * len(x)
        figures = {
            "bits_per_pixel": 8 * sum(array.nbytes for array in quantized) / pixels,
            "psnr_db": found,
            "psnr_lost_db": psnr - found,
        }
        return {"examples": len(x), **{name: significant(value, 4) for name, value in figures.items()}}

    def _open_encoder(self, graph: bytes | None) -> GraphSession:
        return open_graph(graph or self._graphs[0], "encoder", self._boundaries[0])

    def _open_decoder(self, graph: bytes | None) -> GraphSession:
        return open_graph(graph or self._graphs[1], "decoder", self._boundaries[1])

    def _encode(self, session: GraphSession) -> dict[str, Float32]:
        parts = [session.run(self._x[i : i + BATCH_SIZE]) for i in range(0, len(self._x), BATCH_SIZE)]
        return dict(zip(self._outputs, map(np.concatenate, zip(*parts, strict=True)), strict=True))

    def _decode(self, session: GraphSession, z: Float32) -> Float32:
        return np.concatenate([session.run(z[i : i + BATCH_SIZE])[0] for i in range(0, len(z), BATCH_SIZE)])

    def _run(self, graphs: Pair) -> tuple[dict[str, Float32], GraphSession, Float32]:
        """What the encoder gives, the decoder, and what it makes of the mean, the posterior's mode."""
        encoder, decoder = graphs
        encoded = self._encoded if encoder is None else self._encode(self._open_encoder(encoder))
        session = self._fp32_decoder if decoder is None else self._open_decoder(decoder)
        return encoded, session, self._decode(session, encoded[MEAN])

    def _error(self, reconstruction: Float32) -> float:
        with np.errstate(all="ignore"):  # an overflow is found in the figures
            return float(np.abs(reconstruction - self._reconstruction).max())

    def _figures(self, encoded: Mapping[str, Float32], decoder: GraphSession, reconstruction: Float32) -> Figures:
        posterior = Posterior(encoded[MEAN], encoded.get(LOGVAR))
        with np.errstate(all="ignore"):  # an overflow is found in the figures
            psnr = psnr_db(reconstruction, self._target, self._range)
            if self._likelihood is None:
                return Figures(psnr, None)
            drawn = self._decode(decoder, posterior.sample(seed=NOISE_SEED))
            nll = negative_log_likelihood(self._likelihood, drawn, self._target)
            return Figures(psnr, float((nll + posterior.kl()).mean()) / math.prod(self._x.shape[1:]))
