"""The runtime's face: load a bundle, then encode, sample and decode."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, overload

import numpy as np
from numpy.typing import NDArray

from .arguments import check_count, check_threads
from .bundle import Bundle
from .device_array import DeviceArray
from .devices import check_device_name
from .engine import engine_clash
from .errors import ClosedError, InputError
from .image_sizes import cropped, input_shape, padded
from .interpolation import interpolate_latents
from .latents import require_finite, to_decoder_input
from .manifest import FittedPrior, Manifest
from .operation import Operation
from .plan import OPERATIONS, Candidate, Plan, check_precision, open_halves, same_plan, tuned_plan
from .posterior import Posterior, Reconstruction
from .preprocess import Float32, to_model_input, zeros
from .selftest import SelfTest, run_routes
from .session import freeing
from .warning_level import level_outside

if TYPE_CHECKING:
    from .prior import GaussianMixture
    from .scoring import Scoring
    from .tiled import Tiler
    from .tiling import Progress


class DevicePosterior(NamedTuple):
    """q(z|x) in the device's memory, float32 (N, *latent_shape): mean and, of a VAE, the log of the variance."""

    mean: DeviceArray
    logvar: DeviceArray | None = None


class VAE:
    """A bundle, ready to run. Made by `VAE.load`; may be shared between threads; a context manager.

    manifest: what the bundle says of itself. device, precision, plan: what really runs.
    """

    def __init__(self, bundle: Bundle, plan: Plan, provider_options: Mapping[str, str] | None = None) -> None:
        """Open what `plan` says, as `open_halves` does; for whoever has decided that, as `VAE.load` does for users."""
        self._bundle = bundle
        self._precision = _joined(candidate.precision for routes in plan.values() for _, candidate in routes)
        halves = open_halves(bundle, plan, provider_options)
        self._operations: tuple[Operation, Operation] | None = halves
        self._scores: Scoring | None = None
        devices = [route.any_batch.device for half in halves for route in half.routes]
        self._device = _joined(device.name for device in devices)
        self._mixture: GaussianMixture | None = None  # the fitted prior, once it was asked for
        self._is_on_one_gpu = all(device.is_gpu and device.memory == devices[0].memory for device in devices)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        device: str = "cpu",
        precision: str = "fp32",
        threads: int | None = None,
        *,
        provider_options: Mapping[str, str] | None = None,
    ) -> VAE:
        """Verify a bundle and open its two graphs.

        path: the bundle's folder. Every file in it is checked against the manifest.
        device: "cpu", "cuda", "cuda:N", "tensorrt", "tensorrt:N", "openvino", an onnxruntime provider's name, or
            "auto": what `vae-run tune` found fastest on this machine; where it was not run, CUDA where usable, else
            the CPU, and OpenVINO for "bf16".
        precision: one that the bundle has: "fp32", and where they were exported "fp16" and "int8". "bf16" (OpenVINO)
            and "tf32" (CUDA, TensorRT) are the provider's own: they run the fp32 graphs, or those that the bundle has
            for "tf32".
            "auto": what `vae-run tune` found fastest among those within the bundle's quality budget; where it was not
            run, fp32. "auto" may take another precision for calls with another number of examples, and results then
            differ by what the budget allows.
        threads: for the operators of one call on the CPU; None leaves it to the engine, which takes all cores.
        provider_options: the provider's own options, by its own names; None: none.

        A `RuntimeWarning` tells where builds of onnxruntime are installed over each other.

        Raises:
            BundleError: the bundle is missing, incomplete, altered, or of an unknown version.
            DeviceError: the device or the precision is not to be had; there is no silent fallback. OutOfMemoryError:
            the device's memory does not hold the graphs.
            InputError: an argument that is no path, device name, precision name, thread count or provider's option.
            MissingExtraError: no onnxruntime is installed.
            OutputError: the folder for TensorRT's engines cannot be made.
        """
        check_device_name(device)
        threads = check_threads(threads)
        if (clash := engine_clash()) is not None:
            warnings.warn(clash, RuntimeWarning, stacklevel=level_outside("vae_runtime"))
        bundle = Bundle.open(path)
        check_precision(precision, bundle.manifest)
        if "auto" in (device, precision):
            plan = tuned_plan(bundle, device, precision, threads, provider_options)
        else:
            plan = same_plan(Candidate(device, precision, threads))
        return cls(bundle, plan, provider_options)

    @property
    def manifest(self) -> Manifest:
        """What the bundle says of itself, also after `close()`."""
        return self._bundle.manifest

    @property
    def device(self) -> str:
        """The device in use: "cpu", "cuda:0", "openvino" or a provider's name; several, where `plan` says so, joined
        by "+"."""
        return self._device

    @property
    def precision(self) -> str:
        """The precision in use; several joined by "+". Where only one half has files in it, `plan` says which."""
        return self._precision

    @property
    def plan(self) -> dict[str, list[dict[str, Any]]]:
        """What runs for "encode" and "decode", one entry for each range of batch sizes.

        from_batch: the first batch size of the range. device, provider, precision, file: what runs it; the provider by
            onnxruntime's name. threads, spinning: None: the engine's own choice.
        fixed_batches: the batch sizes that have had a session of their own since `warmup`.
        fixed_on_gpu: on a GPU, how each of these sessions works. `shape`: of its input. `cuda_graph`: it is launched as
            one CUDA graph, not kernel by kernel. `layout`: of its convolutions. `bias`: "fused", added in the same
            kernel as a convolution, or "apart"; None: as onnxruntime does. `copies`: of inputs and outputs, "captured"
            in that graph, through "pinned" memory, or "pageable". `zero_copy`: kernels write the outputs to the host's
            memory. `on_device`: arrays on the device take it too. `in_steps`: which of arrays on the device and
            `reconstruct` could not be made one launch, and why. `trials`: of each variant that was tried the time
            relative to the best before it, or why it was not taken.

        Raises:
            ClosedError: after `close()`.
        """
        halves = zip(OPERATIONS, self._open_operations(), strict=True)
        return {name: [route.describe() for route in half.routes] for name, half in halves}

    def warmup(self, batch_sizes: Sequence[int] = (1,), size: tuple[int, int] | None = None) -> None:
        """Do now what the first call with so many examples would do. Results stay the same up to rounding.

        On OpenVINO and CUDA each batch size also gets a session of its own, which costs time and memory now and makes
        every such call faster. On OpenVINO the graphs are compiled for just that size. On CUDA they become a CUDA
        graph, and what may be faster is tried: convolutions with the channels last, copies through pinned memory in the
        same graph or around it, outputs that the kernels write to the host's memory. Trials are timed: call this while
        nobody else uses the GPU. The CUDA graph belongs to the thread that calls this; other threads run without it.

        batch_sizes: numbers of examples that `encode` and `decode` will be given in one call. On the CPU, up to 8 of
            these sizes stay prepared. Other sizes are prepared as they come, and are dropped for newer ones once they
            come no more.
        size: (height, width) of these images, where the bundle leaves it free; None: `manifest.input.default_size`.

        Raises:
            InputError: a batch size that is no whole number from 1, a size that does not fit, more than 8 sizes in all
            where each has a session of its own. BundleError: the bundle has been altered or removed since it was
            loaded. DeviceError, OutOfMemoryError, ClosedError: as `encode`.
        """
        if isinstance(batch_sizes, (str, bytes)) or not isinstance(batch_sizes, Sequence):
            raise InputError(f"batch_sizes is {batch_sizes!r}; expected a sequence such as (1, 32)")
        shape = input_shape(self.manifest, size)
        shapes = shape, self.manifest.latent_shape(shape)
        encoder, decoder = self._open_operations()
        for batch in [check_count(count, "a batch size") for count in batch_sizes]:
            for operation, one in zip((encoder, decoder), shapes, strict=True):
                operation.warm((batch, *one), self._bundle.read)
            encoder.warm_then(decoder, (batch, *shape))

    def encode(
        self,
        inputs: Any,
        *,
        batch_size: int | None = None,
        pad: bool = False,
        tile: int | None = None,
        progress: Progress | None = None,
    ) -> Posterior:
        """Inputs -> the posterior q(z|x) of each; for a plain autoencoder, its code. NaN or infinite where the model's
        numbers overflow, on vectors far from all that it knows.

        inputs: images as float32 (N, C, H, W) in [0, 1], or as uint8 (N, H, W, C), of one channel (N, H, W); vectors as
            float32 (N, D). N is at least 1.
        batch_size: examples per call of the graph; None chooses by size. It bounds memory, not the result.
        pad: where height and width are free, repeat the last row and column up to the next multiple of
            `manifest.input.multiple_of`; `decode(..., size=(height, width))` cuts it off again.
        tile: where height and width are free, go through each image in windows of this many pixels on a side, a
            multiple of `manifest.input.multiple_of`: memory grows with the window, not with the image. Exact where
            `manifest.tiling` has a `context`, else an approximation, with an `ApproximateTilingWarning`. Not beside
            `batch_size`: windows run one at a time.
        progress: with `tile`, called after each window with how many are done and how many there are.

        Raises:
            InputError: anything else; the message says what to do. DeviceError: the device failed. OutOfMemoryError:
            its memory did not suffice; a smaller `batch_size`, or `tile`, needs less. ClosedError: after `close()`, or
            in a process that was forked after `load`. BundleError: a graph gives another shape than the manifest says.
        """
        operations = self._operations or self._open_operations()
        if pad is not False:
            inputs, _ = padded(self.manifest, inputs, pad)
        if tile is not None or progress is not None:
            return Posterior(*self._tiler(tile, batch_size, progress).encode(inputs))
        return Posterior(*operations[0](inputs, batch_size))

    def decode(
        self,
        latents: Any,
        *,
        batch_size: int | None = None,
        size: tuple[int, int] | None = None,
        tile: int | None = None,
        progress: Progress | None = None,
    ) -> Float32:
        """Latents, float32 (N, *latent_shape) -> the mean of p(x|z), float32 (N, C, H, W) in [0, 1] or (N, D).
        NaN or infinite where the model's numbers overflow, on latents far beyond the encoder's: a look at each result
        would cost a tenth of a small call.

        latents: N is at least 1, all values are finite.
        size: (height, width) of images that were padded, to which the result is cut.
        batch_size, tile, progress: as in `encode`; the windows are this many pixels of the result.

        Raises:
            InputError: another dtype or shape, NaN or infinity; a size that these latents are not of. DeviceError,
            OutOfMemoryError, ClosedError, BundleError: as `encode`.
        """
        operations = self._operations or self._open_operations()
        if tile is not None or progress is not None:
            return self._tiler(tile, batch_size, progress).decode(latents, size)
        images = operations[1](latents, batch_size)[0]
        return images if size is None else cropped(self.manifest, images, size)

    def sample(
        self,
        n: int,
        seed: int | None = None,
        temperature: float = 1.0,
        *,
        prior: str | None = None,
        truncation: float | None = None,
        batch_size: int | None = None,
        size: tuple[int, int] | None = None,
    ) -> Float32:
        """Draw `n` latents from the prior and decode them -> like `decode`.

        A larger `n` with the same seed begins with the same latents, and so with the same examples, unless precision
        "auto" decodes so many in another precision.

        n: from 1. seed: a whole number from 0; None: fresh draws each time.
        temperature: factor on the noise, which makes the standard prior N(0, temperature²); below 1, examples are more
            typical and less varied.
        prior: "standard", N(0, 1), or "fitted", the density that `vae-export --prior` fitted to the latents of real
            examples (Ghosh et al., 2020); None: the standard one, of an autoencoder the fitted one.
        truncation: where a number of the noise is farther from 0 than this, it is drawn again (Brock et al., 2019), to
            the same end as a low temperature; from 0.1. The numbers within stay as they are without it.
        batch_size: latents per call of the graph, as in `encode`.
        size: (height, width) of the images, where the bundle leaves it free; None: `manifest.input.default_size`.

        Raises:
            KindError: the bundle is a plain autoencoder, which has no prior but a fitted one. NotInBundleError: no
            prior was fitted. BundleError: its file is damaged, which shows when it is used first. InputError: an
            argument out of range; latents that leave float32, as at a temperature beyond 1e30 or with a fitted prior
            of such numbers; more examples than fit into memory. DeviceError, OutOfMemoryError, ClosedError: as
            `encode`.
        """
        batches = self.sample_batches(
            n, seed, temperature, prior=prior, truncation=truncation, batch_size=batch_size, size=size
        )
        hint = ", take sample_batches" if n > 1 else ", take a smaller size"
        images = zeros((n, *input_shape(self.manifest, size)), f"n is {n}; an array", hint)
        start = 0
        for batch in batches:
            images[start : start + len(batch)] = batch
            start += len(batch)
        return images

    def sample_batches(
        self,
        n: int,
        seed: int | None = None,
        temperature: float = 1.0,
        *,
        prior: str | None = None,
        truncation: float | None = None,
        batch_size: int | None = None,
        size: tuple[int, int] | None = None,
    ) -> Iterator[Float32]:
        """The same examples as `sample`, batch by batch, for more than fit into memory. All arguments: as there.

        Raises:
            As `sample`: for its arguments at once; between two batches where latents leave float32, where the device
            fails, and where the bundle was closed in between.
        """
        from .prior import LatentStream, choose_prior  # late: not every application samples

        shape = self.manifest.latent_shape(input_shape(self.manifest, size))
        chunk = self._open_operations()[1].chunk_size(batch_size, shape)
        fitted, count = choose_prior(prior, self.manifest), check_count(n, "n")
        mixture = None if fitted is None else self._read_prior(fitted)
        stream = LatentStream(seed, temperature, truncation, mixture)
        latents = (stream.draw(min(chunk, count - start), shape) for start in range(0, count, chunk))
        return (self._open_operations()[1].run(batch, chunk, count)[0] for batch in latents)

    def _read_prior(self, fitted: FittedPrior) -> GaussianMixture:
        """The fitted prior, read and checked the first time."""
        if self._mixture is None:
            from .prior import GaussianMixture

            label = str(self._bundle.path / fitted.file)
            elements = math.prod(self.manifest.latent_shape(self.manifest.input.example_shape))
            data = self._bundle.read(fitted.file)
            self._mixture = GaussianMixture.from_npz(data, fitted.components, elements, label)
        return self._mixture

    @overload
    def reconstruct(
        self,
        inputs: Any,
        *,
        n_samples: None = None,
        seed: int | None = None,
        batch_size: int | None = None,
        pad: bool = False,
        tile: int | None = None,
        progress: Progress | None = None,
    ) -> Float32: ...

    @overload
    def reconstruct(
        self,
        inputs: Any,
        *,
        n_samples: int,
        seed: int | None = None,
        batch_size: int | None = None,
        pad: bool = False,
        tile: None = None,
        progress: None = None,
    ) -> Reconstruction: ...

    def reconstruct(
        self,
        inputs: Any,
        *,
        n_samples: int | None = None,
        seed: int | None = None,
        batch_size: int | None = None,
        pad: bool = False,
        tile: int | None = None,
        progress: Progress | None = None,
    ) -> Float32 | Reconstruction:
        """Encode, take the mean, decode: float32 (N, C, H, W) in [0, 1] or (N, D), of the size of the inputs.
        Deterministic. On a GPU the latents stay in its memory. NaN or infinite as in `decode`.

        inputs, batch_size, pad, tile, progress: as in `encode`.
        n_samples: decode so many draws from the posterior of each input in place of its mean -> `Reconstruction`, their
            mean and standard deviation, which say where the model is not sure; of one draw the latter is 0. Memory is
            that of one batch of draws. None: the mean alone.
        seed: of these draws, which for the n-th example do not depend on `batch_size`; None: fresh ones.

        Raises:
            As `encode`. InputError: `seed` without `n_samples`, or `n_samples` beside `tile` or `progress`; an
            input on which the model's numbers overflow, with `n_samples` or, of the encoder's, where they are looked
            at, which on a GPU and with `tile` they are not. KindError: `n_samples` for a plain autoencoder, which has
            no distribution.
        """
        encoder, decoder = self._open_operations()
        inputs, size = padded(self.manifest, inputs, pad)
        if n_samples is None and seed is not None:
            raise InputError(f"seed is {seed!r} without n_samples; a reconstruction from the mean draws nothing")
        if n_samples is not None:
            if tile is not None or progress is not None:
                raise InputError(f"n_samples is {n_samples!r} beside tile or progress; draws are decoded as a whole")
            from . import evidence

            arrays = evidence.reconstruct(self.manifest, (encoder, decoder), inputs, n_samples, seed, batch_size)
            return arrays if size is None else Reconstruction(*(cropped(self.manifest, one, size) for one in arrays))
        if tile is not None or progress is not None:
            return self._tiler(tile, batch_size, progress).reconstruct(inputs, size)
        if self._is_on_one_gpu:
            images = encoder.then(decoder, inputs, batch_size)
        else:
            mean = self.encode(inputs, batch_size=batch_size).mode()
            try:
                images = self.decode(mean, batch_size=batch_size)
            except InputError:
                require_finite(mean, "inputs")  # says which input it was
                raise
        return images if size is None else cropped(self.manifest, images, size)

    def elbo(
        self, inputs: Any, n_samples: int = 1, seed: int | None = None, *, batch_size: int | None = None
    ) -> NDArray[np.float64]:
        """The evidence lower bound of each input in nats, -> float64 (N,): the mean of log p(x|z) over draws from the
        posterior, minus the posterior's KL divergence from the prior in closed form (Kingma and Welling, 2014).

        By the manifest's likelihood. A Bernoulli one takes grey values as probabilities, also where the model was
        trained with "dynamic" binarisation: figures to compare with published ones need binary images. With "threshold"
        it is of x >= 0.5. The log of a density (Gaussian, Laplace) may be above 0.

        inputs: as `encode` takes them.
        n_samples: draws per example; more narrow the estimate, not the bound.
        seed: the same gives the same draws for the n-th example; None: fresh ones.
        batch_size: examples, and draws, per call of a graph; None chooses. It bounds memory, not the result.
        The result is NaN or infinite where the model's numbers overflow.

        Raises:
            As `encode`. InputError: `n_samples` or `seed` out of range. KindError: the bundle is a plain autoencoder.
            NotInBundleError: the bundle says no likelihood.
        """
        from . import evidence  # late, as below: most applications never ask

        return evidence.elbo(self.manifest, self._open_operations(), inputs, n_samples, seed, batch_size)

    def log_likelihood(
        self,
        inputs: Any,
        n_samples: int = 5000,
        seed: int | None = None,
        *,
        batch_size: int | None = None,
        progress: Progress | None = None,
    ) -> NDArray[np.float64]:
        """log p(x) of each input in nats, estimated by importance sampling -> float64 (N,).

        The log of the mean of p(x|z) p(z) / q(z|x) over exactly `n_samples` draws z from the posterior (Burda et al.,
        2016, arXiv:1509.00519): a lower bound on average, tighter with every draw, from the ELBO at one draw towards
        the truth. Memory is that of one batch of draws, however many examples and draws there are.

        inputs, seed, batch_size: as in `elbo`.
        progress: called after each batch with how many draws are done and how many there are.

        Raises:
            As `elbo`.
        """
        from . import evidence

        operations = self._open_operations()
        return evidence.log_likelihood(self.manifest, operations, inputs, n_samples, seed, batch_size, progress)

    def reconstruction_error(
        self,
        inputs: Any,
        *,
        batch_size: int | None = None,
        pad: bool = False,
        tile: int | None = None,
        progress: Progress | None = None,
    ) -> NDArray[np.float64]:
        """How far the reconstruction from the mean is off: the mean over the elements of the squared error, in the
        data's units squared -> float64 (N,), infinite where the model's numbers overflow. It is from the input or, of a
        model trained with "threshold" binarisation, from x >= 0.5, which is all that such a model sees. inputs,
        batch_size, pad, tile, progress: as in `encode`; what is padded does not count.

        Raises:
            As `encode`.
        """
        return self.score(inputs, "reconstruction", batch_size=batch_size, pad=pad, tile=tile, progress=progress)

    def score(
        self,
        inputs: Any,
        method: str | None = None,
        *,
        n_samples: int = 100,
        seed: int | None = 0,
        batch_size: int | None = None,
        pad: bool = False,
        tile: int | None = None,
        progress: Progress | None = None,
    ) -> NDArray[np.float64]:
        """How little each input looks like the data that the model was trained on, higher is more anomalous -> float64
        (N,), infinite where the model's numbers overflow. Comparable between inputs of one size: those in nats are sums
        over the pixels.

        method: "elbo": -log p(x|z) at the posterior's mean, plus the KL divergence, in nats, nothing random;
            "reconstruction": `reconstruction_error`, for every kind of model; "log_likelihood": minus the estimate of
            `log_likelihood` with `n_samples`, far slower. None: what measured best for this likelihood, "elbo" for
            Gaussian and Laplace, else "reconstruction"; of free sizes the latter, a mean.
        n_samples, seed: for "log_likelihood" alone, which takes the same noise for every input, so that an input's
            score does not depend on what it comes with, but for rounding. seed: None: fresh noise for each call.
        inputs, batch_size: as in `encode`.
        pad, tile, progress: as in `encode`, but not for "log_likelihood". Padded pixels do not count, while the KL
            divergence is that of the whole code. With `tile`, memory is that of a window and of one reconstruction.

        Raises:
            As `encode`. InputError: another method; `n_samples` or `seed` out of range; `pad`, `tile` or `progress`
            with "log_likelihood". KindError, NotInBundleError: as `elbo`, by methods that need a distribution and a
            likelihood.
        """
        scoring = self._scoring()
        if pad is False and tile is None and progress is None:
            return scoring.score(inputs, method, n_samples, seed, batch_size)
        inputs, coverage = scoring.cover(inputs, batch_size, pad, tile, progress)
        return scoring.score(inputs, method, n_samples, seed, batch_size, coverage)

    def score_map(
        self,
        inputs: Any,
        method: str = "reconstruction",
        *,
        batch_size: int | None = None,
        pad: bool = False,
        tile: int | None = None,
        progress: Progress | None = None,
    ) -> Float32:
        """Where an input is anomalous: what each pixel adds to the score, summed over the channels -> float32
        (N, H, W), for vectors (N, D), infinite where the model's numbers overflow.

        method: "reconstruction": the squared error, as in `reconstruction_error`; "elbo": -log p(x|z) at the mean, in
            nats (the KL divergence is of no pixel).
        inputs, batch_size, pad, tile, progress: as in `encode`; a map has the size of its input.

        Raises:
            As `score`.
        """
        scoring = self._scoring()
        if pad is False and tile is None and progress is None:
            return scoring.score_map(inputs, method, batch_size)
        inputs, coverage = scoring.cover(inputs, batch_size, pad, tile, progress)
        return scoring.score_map(inputs, method, batch_size, coverage)

    def is_anomaly(
        self,
        inputs: Any,
        quantile: float = 0.99,
        method: str | None = None,
        *,
        n_samples: int = 100,
        seed: int | None = 0,
        batch_size: int | None = None,
        pad: bool = False,
        tile: int | None = None,
        progress: Progress | None = None,
    ) -> NDArray[np.bool_]:
        """Whether the score of each input is above the one that a part `quantile` of the data at export did not exceed
        -> bool (N,). A lower quantile finds more anomalies and raises more false alarms, about 1 - `quantile` of what
        is as it should be.

        inputs, method, n_samples, seed, batch_size, pad, tile, progress: as in `score`. Thresholds of "log_likelihood"
            are those of the default `n_samples` and `seed`; with fewer samples scores are higher.

        Raises:
            As `score` and `threshold`.
        """
        threshold = self.threshold(quantile, method, tile=tile)
        scores = self.score(
            inputs, method, n_samples=n_samples, seed=seed, batch_size=batch_size, pad=pad, tile=tile, progress=progress
        )
        return np.asarray(scores > threshold)

    def threshold(self, quantile: float = 0.99, method: str | None = None, *, tile: int | None = None) -> float:
        """The score above which `is_anomaly` calls an input an anomaly, for applications that keep the scores: the one
        that a part `quantile` of the data at export did not exceed. method, tile: as in `score`, of the scores that are
        compared with it.

        Raises:
            InputError: a quantile outside (0, 1), or beyond what the examples tell; another method; another tile than
            `manifest.calibration.tile`, where tiles are an approximation. NotInBundleError: the bundle was not
            calibrated, or not for this method; `vae-export SOURCE --calibrate DATA` makes one that is. ClosedError:
            after `close()`.
        """
        return self._scoring().threshold(quantile, method, tile)

    def _scoring(self) -> Scoring:
        operations, scores = self._operations or self._open_operations(), self._scores
        if scores is None:
            from .scoring import Scoring

            scores = self._scores = Scoring(self.manifest, operations)
            if self._operations is None:  # closed by another thread in between: this call finishes, nothing is kept
                self._scores = None
        return scores

    def _tiler(self, tile: int | None, batch_size: int | None, progress: Progress | None) -> Tiler:
        from .tiled import Tiler  # late: only large images need it

        return Tiler(self.manifest, self._open_operations(), tile, batch_size, progress)

    def encode_to_device(self, inputs: Any) -> DevicePosterior:
        """`encode` with results that stay in the device's memory, for applications that keep their data there.

        inputs: as `encode` takes them, or an array that is in that memory already, float32 (N, *input_shape), of any
            library that speaks DLPack (torch, cupy, jax), without a copy. The values of such an array are not looked
            at: reading them would cost what staying on the device saves. All examples run at once; the memory is the
            caller's care.

        Raises:
            As `encode`. InputError: an array on another device, or that is not contiguous. OutOfMemoryError: too many
            examples for the device.
        """
        outputs = self._open_operations()[0].run_on_device(inputs, "inputs")
        return DevicePosterior(*outputs)

    def decode_to_device(self, latents: Any) -> DeviceArray:
        """`decode` with a result that stays in the device's memory, float32 (N, *input_shape).

        latents: as `decode` takes them, or an array on the device, such as `encode_to_device(...).mean`; see there.

        Raises:
            As `encode_to_device`.
        """
        return self._open_operations()[1].run_on_device(latents, "latents")[0]

    def interpolate(self, a: Any, b: Any, steps: int = 8, method: str = "spherical", *, pad: bool = False) -> Float32:
        """The decoded path between two inputs, both ends' reconstructions included -> (steps, C, H, W) or (steps, D).

        a, b: one example each, with the batch axis, as `encode` takes it. steps: points of the path, from 2. method:
            "spherical" or "linear", see `vae_runtime.interpolation`. pad: as in `encode`; the result is cut to the size
            that both had.

        Raises:
            As `encode`. InputError: not one example each, latents of two shapes, images padded from two sizes, fewer
            than 2 steps, another method.
        """
        (a, size), (b, other) = (padded(self.manifest, one, pad) for one in (a, b))
        start, end = self._codes(a, "a"), self._codes(b, "b")
        for name, latent in (("a", start), ("b", end)):
            if len(latent) != 1:
                raise InputError(
                    f"{name} holds {len(latent)} examples; interpolate takes one on each side, for example {name}[:1]"
                )
        if start.shape != end.shape:
            raise InputError(f"a and b have latents of shapes {start.shape[1:]} and {end.shape[1:]}; expected the same")
        if size != other:
            raise InputError(f"a and b have (height, width) {size} and {other}; expected the same")
        return self.decode(interpolate_latents(start[0], end[0], steps, method), size=size)

    def traverse(self, inputs: Any, dimension: int, values: Any, *, pad: bool = False) -> Float32:
        """What one unit of the latent space does: encode one example, set that unit of the mean to each of the values,
        decode -> (len(values), C, H, W) or (len(values), D).

        inputs: one example, with the batch axis, as `encode` takes it. dimension: which element of the latent,
        flattened; of a latent (C, h, w) which channel, set at all positions. values: in the latent's units, where the
        prior is N(0, 1): (-3, ..., 3) is nearly all of it. pad: as in `encode`; the result is of the input's size.

        Raises:
            As `encode`. InputError: not one example, a unit that there is not, values that are not finite numbers in a
            row.
        """
        from .latent_space import traversal

        inputs, size = padded(self.manifest, inputs, pad)
        return self.decode(traversal(self._codes(inputs, "inputs"), dimension, values), size=size)

    def nearest(
        self, inputs: Any, references: Any, k: int = 1, *, pad: bool = False
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """The k references nearest to each input in the latent space, by the Euclidean distance of means, the nearest
        first; of equals the one with the lower index -> indices int64 (N, k), distances float64 (N, k).

        inputs, pad: as `encode` takes them. references: latents, float32 (M, *latent_shape), such as
        `encode(examples).mean`. All are looked at, in blocks: a million of 32 elements need little memory beside them.

        Raises:
            As `encode`. InputError: references that are no latents, or of another shape than those of the inputs; k is
            no whole number from 1 to M.
        """
        from .latent_space import nearest_latents

        references = to_decoder_input(references, self.manifest.latent.shape, "references")
        return nearest_latents(self._codes(inputs, "inputs", pad), references, k)

    def attribute_vector(self, positives: Any, negatives: Any) -> Float32:
        """The direction of what sets examples apart, such as "smiles": the mean latent of those with it less the mean
        latent of those without -> float32 (*latent_shape). `decode(latents + 0.5 * vector)` adds half of it (Larsen et
        al., 2016, arXiv:1512.09300).

        positives, negatives: any number of examples each, as `encode` takes them.

        Raises:
            As `encode`. InputError: latents of two shapes, from images of different free sizes.
        """
        from .latent_space import mean_difference

        self._open_operations()
        named = {"positives": positives, "negatives": negatives}
        checked = {name: to_model_input(inputs, self.manifest.input, name) for name, inputs in named.items()}
        return mean_difference(*(self._codes(inputs, name) for name, inputs in checked.items()))

    def _codes(self, inputs: Any, name: str, pad: bool = False) -> Float32:
        return require_finite(self.encode(inputs, pad=pad).mode(), name)

    def selftest(self) -> SelfTest:
        """Run the bundle's golden inputs through every route of `plan` and compare with the reference's outputs of the
        day of export.

        What `warmup` has made ready in this thread for a batch size of its own is tested too; of each route the largest
        error counts. The decoder gets the reference's mean, so that each half is held to its own error.

        Raises:
            BundleError: the golden file is damaged. DeviceError: the bundle states no tolerance for a precision in use,
            or as `encode`. OutOfMemoryError, ClosedError: as `encode`.
        """
        encoder, decoder = self._open_operations()
        routes = run_routes(self.manifest, encoder, decoder, self._bundle.golden())
        return SelfTest(self.device, self._precision, routes)

    def golden(self) -> dict[str, Float32]:
        """The bundle's golden inputs `x` with the reference's `mean`, `logvar` and `reconstruction`, new arrays.

        Raises:
            BundleError: the golden file has been altered or removed. ClosedError: after `close()`.
        """
        self._open_operations()
        return self._bundle.golden()

    def close(self) -> None:
        """Free both graphs; every later call raises `ClosedError`. Calls under way in other threads finish.

        On a GPU it waits while another thread captures a CUDA graph, which freeing memory would spoil. A `VAE` that is
        freed without `close()`, or only after a call under way, does not wait: the capture may fail, and that thread's
        calls then run by a slower variant.
        """
        operations = self._operations
        if operations is not None:
            with freeing(route.any_batch for half in operations for route in half.routes):
                self._operations = self._scores = operations = None

    def __enter__(self) -> VAE:
        self._open_operations()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a VAE cannot be pickled or copied; load the bundle where it is needed, in each process")

    def __repr__(self) -> str:
        state = "closed" if self._operations is None else f"{self._precision} on {self.device}"
        return f"VAE({self.manifest.name!r}, {self.manifest.kind}, {state})"

    def _open_operations(self) -> tuple[Operation, Operation]:
        """The encoder's and the decoder's, unless they were closed."""
        if self._operations is None:
            raise ClosedError(f"{self.manifest.name} was closed; load the bundle again")
        return self._operations


def _joined(names: Iterable[str]) -> str:
    return "+".join(dict.fromkeys(names))
