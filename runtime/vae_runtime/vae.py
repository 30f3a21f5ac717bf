"""The runtime's face: load a bundle, then encode, sample and decode."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np

from .bundle import Bundle
from .devices import PROVIDER_PRECISIONS, Device, find_device
from .errors import ClosedError, DeviceError, InputError, KindError
from .interpolation import interpolate_latents
from .manifest import INPUT, LATENT, LOGVAR, MEAN, PRECISIONS, RECONSTRUCTION, Manifest
from .posterior import Posterior
from .preprocess import Float32, as_graph_input, require_plain_array, to_model_input
from .sampling import NormalStream, check_count, check_temperature
from .session import GraphSession, check_threads

# At most this many values per input chunk unless the caller says otherwise: 64 images of 3×128×128, and about 50 times
# as much in the activations of a usual convolutional network.
_CHUNK_VALUES = 64 * 3 * 128 * 128
_CHUNK_EXAMPLES = 256


@dataclass(frozen=True)
class SelfTest:
    """The outcome of `VAE.selftest`.

    errors: by tensor, max|Δ| from the reference, relative to the data's range (reconstruction) or to max|reference|
        (mean, logvar). tolerance: what they were held against.
    """

    device: str
    precision: str
    tolerance: float
    errors: dict[str, float]

    @property
    def passed(self) -> bool:
        return all(error <= self.tolerance for error in self.errors.values())  # False for NaN


class VAE:
    """A bundle, ready to run. Made by `VAE.load`; may be shared between threads; a context manager.

    manifest: what the bundle says of itself. device, precision, plan: what really runs.
    """

    def __init__(
        self, bundle: Bundle, device: Device, precision: str, encoder: GraphSession, decoder: GraphSession
    ) -> None:
        self._bundle = bundle
        self._device = device
        self._precision = precision
        self._sessions: tuple[GraphSession, GraphSession] | None = (encoder, decoder)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], device: str = "cpu", precision: str = "fp32", threads: int | None = None
    ) -> VAE:
        """Verify a bundle and open its two graphs.

        path: the bundle's folder. Every file in it is checked against the manifest.
        device: "cpu", "cuda", "cuda:N", an onnxruntime provider's name, or "auto": CUDA where usable, else the CPU.
        precision: one that the bundle has files for ("fp32", "fp16", "int8"), "tf32" (CUDA), or "auto": fp32.
        threads: for the operators of one call on the CPU; None leaves it to onnxruntime, which takes all cores.

        Raises:
            BundleError: the bundle is missing, incomplete, altered, or of an unknown version.
            DeviceError: the device or the precision is not to be had; there is no silent fallback.
            InputError: no such device name, precision name or thread count.
            MissingExtraError: no onnxruntime is installed.
        """
        threads = check_threads(threads)
        bundle = Bundle.open(path)
        manifest = bundle.manifest
        precision = _choose_precision(precision, manifest)
        found = find_device(device, precision)
        files = manifest.precisions["fp32" if precision in PROVIDER_PRECISIONS else precision]
        models = {file: bundle.read(file) for file in sorted(manifest.files)}
        latent_outputs = {MEAN: manifest.latent.shape}
        if manifest.kind == "vae":
            latent_outputs[LOGVAR] = manifest.latent.shape
        encoder = GraphSession(models[files.encoder], files.encoder, found, threads)
        encoder.require_boundary(INPUT, manifest.input.shape, latent_outputs)
        decoder = GraphSession(models[files.decoder], files.decoder, found, threads)
        decoder.require_boundary(LATENT, manifest.latent.shape, {RECONSTRUCTION: manifest.input.shape})
        return cls(bundle, found, precision, encoder, decoder)

    @property
    def manifest(self) -> Manifest:
        return self._bundle.manifest

    @property
    def device(self) -> str:
        """The device in use: "cpu", "cuda:0", or a provider's name."""
        return self._device.name

    @property
    def precision(self) -> str:
        """The precision in use; where only one half has files in it, `plan` says which."""
        return self._precision

    @property
    def plan(self) -> dict[str, dict[str, str]]:
        """What runs for "encode" and "decode": the device, onnxruntime's provider, the precision and the file."""
        encoder, decoder = self._open_sessions()
        reference = self.manifest.precisions["fp32"]
        own = self._precision in PROVIDER_PRECISIONS
        return {
            name: {
                "device": self._device.name,
                "provider": self._device.provider,
                "precision": self._precision if own or session.file != fp32_file else "fp32",
                "file": session.file,
            }
            for name, session, fp32_file in (
                ("encode", encoder, reference.encoder),
                ("decode", decoder, reference.decoder),
            )
        }

    def encode(self, inputs: Any, *, batch_size: int | None = None) -> Posterior:
        """Inputs -> the posterior q(z|x) of each; for a plain autoencoder, its code.

        inputs: images as uint8 (N, H, W) or (N, H, W, C), or float32 (N, C, H, W) in [0, 1]; vectors as float32 (N, D).
        batch_size: examples per call of the graph; None chooses by size. It bounds memory, not the result.

        Raises:
            InputError: anything else; the message says what to do. ClosedError: after `close()`.
        """
        encoder, _ = self._open_sessions()
        array = to_model_input(inputs, self.manifest.input, "images" if self.manifest.input.is_image else "vectors")
        mean, *logvar = _in_chunks(encoder.run, array, self._batch_size(batch_size))
        return Posterior(mean, logvar[0] if logvar else None)

    def decode(self, latents: Any, *, batch_size: int | None = None) -> Float32:
        """Latents, float32 (N, *latent_shape) -> the mean of p(x|z), float32 (N, C, H, W) in [0, 1] or (N, D).

        Raises:
            InputError: another dtype or shape, NaN or infinity. ClosedError: after `close()`.
        """
        _, decoder = self._open_sessions()
        array = to_decoder_input(latents, self.manifest.latent.shape)
        (reconstruction,) = _in_chunks(decoder.run, array, self._batch_size(batch_size))
        return reconstruction

    def sample(
        self, n: int, seed: int | None = None, temperature: float = 1.0, *, batch_size: int | None = None
    ) -> Float32:
        """Draw `n` latents from the prior N(0, temperature²) and decode them -> like `decode`.

        A larger `n` with the same seed begins with the same examples.

        Raises:
            KindError: the bundle is a plain autoencoder, which has no prior. InputError: an argument out of range.
        """
        batches = self.sample_batches(n, seed, temperature, batch_size=batch_size)
        try:
            images: Float32 = np.empty((n, *self.manifest.input.shape), np.float32)
        except (MemoryError, ValueError, OverflowError):
            raise InputError(f"n is {n}; that many examples do not fit into memory, take sample_batches") from None
        start = 0
        for batch in batches:
            images[start : start + len(batch)] = batch
            start += len(batch)
        return images

    def sample_batches(
        self, n: int, seed: int | None = None, temperature: float = 1.0, *, batch_size: int | None = None
    ) -> Iterator[Float32]:
        """The same examples as `sample`, batch by batch, for more than fit into memory.

        Raises:
            As `sample`, at once; ClosedError later, if the bundle is closed between two batches.
        """
        self._open_sessions()
        if self.manifest.latent.prior is None:
            raise KindError(f"{self.manifest.name} is a plain autoencoder, which has no prior to sample from")
        count, scale, stream = check_count(n, "n"), check_temperature(temperature), NormalStream(seed)
        size = self._batch_size(batch_size)
        shape = self.manifest.latent.shape
        latents = (scale * stream.draw(min(size, count - start), shape) for start in range(0, count, size))
        return (self._open_sessions()[1].run(batch)[0] for batch in latents)

    def reconstruct(self, inputs: Any, *, batch_size: int | None = None) -> Float32:
        """Encode, take the mean, decode: float32 (N, C, H, W) in [0, 1] or (N, D). Deterministic."""
        return self.decode(self.encode(inputs, batch_size=batch_size).mode(), batch_size=batch_size)

    def interpolate(self, a: Any, b: Any, steps: int = 8, method: str = "spherical") -> Float32:
        """The decoded path between two inputs, both ends' reconstructions included -> (steps, C, H, W) or (steps, D).

        a, b: one example each, with the batch axis, as `encode` takes it. method: "spherical" or "linear", see
        `vae_runtime.interpolation`.

        Raises:
            InputError: not one example each, fewer than 2 steps, another method.
        """
        start, end = self.encode(a).mode(), self.encode(b).mode()
        for name, latent in (("a", start), ("b", end)):
            if len(latent) != 1:
                raise InputError(
                    f"{name} holds {len(latent)} examples; interpolate takes one on each side, for example {name}[:1]"
                )
        return self.decode(interpolate_latents(start[0], end[0], steps, method))

    def selftest(self) -> SelfTest:
        """Run the bundle's golden inputs here and compare with the reference's outputs of the day of export.

        The decoder gets the reference's mean, so that each half is held to its own error.

        Raises:
            BundleError: the golden file is damaged. ClosedError: after `close()`.
        """
        golden = self._bundle.golden()
        posterior = self.encode(golden[INPUT])
        errors = {
            MEAN: relative_error(posterior.mean, golden[MEAN]),
            RECONSTRUCTION: self._reconstruction_error(self.decode(golden[MEAN]), golden),
        }
        if posterior.logvar is not None:
            errors[LOGVAR] = relative_error(posterior.logvar, golden[LOGVAR])
        tolerances = self.manifest.golden.tolerance
        if self._precision not in tolerances and self._precision not in PROVIDER_PRECISIONS:
            raise DeviceError(
                f"the bundle states no golden tolerance for {self._precision}; it has {', '.join(sorted(tolerances))}"
            )
        return SelfTest(self.device, self._precision, tolerances.get(self._precision, 2e-3), errors)

    def golden(self) -> dict[str, Float32]:
        """The bundle's golden inputs `x` with the reference's `mean`, `logvar` and `reconstruction`, new arrays."""
        self._open_sessions()
        return self._bundle.golden()

    def close(self) -> None:
        """Free both graphs; every later call raises `ClosedError`. Calls under way in other threads finish."""
        self._sessions = None

    def __enter__(self) -> VAE:
        self._open_sessions()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._sessions is None else f"{self._precision} on {self.device}"
        return f"VAE({self.manifest.name!r}, {self.manifest.kind}, {state})"

    def _open_sessions(self) -> tuple[GraphSession, GraphSession]:
        if self._sessions is None:
            raise ClosedError(f"{self.manifest.name} was closed; load the bundle again")
        return self._sessions

    def _batch_size(self, asked: int | None) -> int:
        if asked is not None:
            return check_count(asked, "batch_size")
        return max(1, min(_CHUNK_EXAMPLES, _CHUNK_VALUES // int(np.prod(self.manifest.input.shape))))

    def _reconstruction_error(self, found: Float32, golden: dict[str, Float32]) -> float:
        if self.manifest.input.is_image:
            return float(np.abs(found - golden[RECONSTRUCTION]).max())
        return float(np.abs(found - golden[RECONSTRUCTION]).max() / data_range(golden[INPUT]))


def relative_error(found: Float32, reference: Float32) -> float:
    """max|Δ| / max|reference|, the latter taken as at least 0.01: a collapsed posterior is zero but for rounding."""
    return float(np.abs(found - reference).max() / max(np.abs(reference).max(), 0.01))


def data_range(vectors: Float32) -> float:
    """max − min of vector data, by which errors on it are measured; 1 where it is constant."""
    return float(vectors.max() - vectors.min()) or 1.0


def _choose_precision(asked: Any, manifest: Manifest) -> str:
    if asked == "auto":
        return "fp32"
    if not isinstance(asked, str) or asked not in (*PRECISIONS, *PROVIDER_PRECISIONS):
        raise InputError(
            f"precision is {asked!r}; expected one of {', '.join((*PRECISIONS, *PROVIDER_PRECISIONS, 'auto'))}"
        )
    if asked not in manifest.precisions and asked not in PROVIDER_PRECISIONS:
        raise DeviceError(
            f"precision {asked!r} is not in {manifest.name}, which has {', '.join(sorted(manifest.precisions))}"
        )
    return str(asked)


def to_decoder_input(latents: Any, shape: tuple[int, ...], name: str = "latents") -> Float32:
    """Check latents and return them as the decoder takes them: float32 (N, *shape), finite."""
    require_plain_array(latents, name)
    check_latent_layout(latents, shape, name)
    low, high = latents.min(), latents.max()
    if not (low > -np.inf and high < np.inf):
        raise InputError(f"{name} has {'NaN' if np.isnan(low) else 'infinite values'}; latents are finite")
    return as_graph_input(latents)


def check_latent_layout(latents: Any, shape: tuple[int, ...], name: str) -> None:
    """Raise `InputError` unless dtype and shape are those of latents; the values are not looked at."""
    rule = f"expected (N, {', '.join(map(str, shape))}) float32"
    if latents.dtype != np.float32 or not latents.dtype.isnative:
        order = "" if latents.dtype.isnative else " in foreign byte order"
        raise InputError(f"{name} has dtype {latents.dtype}{order}; {rule}, convert with .astype(numpy.float32)")
    if latents.shape[1:] != shape:
        hint = "; this looks like a single latent without a batch: latents[None]" if latents.shape == shape else ""
        raise InputError(f"{name} has shape {latents.shape}; {rule}{hint}")


def _in_chunks(run: Callable[[Float32], list[Float32]], array: Float32, size: int) -> list[Float32]:
    if len(array) <= size:
        return run(array)
    parts = [run(array[start : start + size]) for start in range(0, len(array), size)]
    return [np.concatenate(pieces) for pieces in zip(*parts, strict=True)]
