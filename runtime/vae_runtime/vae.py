"""The runtime's face: load a bundle, then encode, sample and decode."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from .boundary import Boundary, check_cut, check_sides, decoder_boundary, encoder_boundary
from .bundle import Bundle
from .device_array import DeviceArray
from .devices import PROVIDER_PRECISIONS, check_device_name, find_device
from .engine import engine_clash
from .errors import ClosedError, DeviceError, InputError, KindError
from .fidelity import golden_error
from .interpolation import interpolate_latents
from .manifest import INPUT, LATENT, LOGVAR, MEAN, PRECISIONS, RECONSTRUCTION, Manifest, Shape
from .operation import Candidate, Operation, Route
from .posterior import Posterior
from .preprocess import (
    FINITE,
    UNIT_INTERVAL,
    Float32,
    as_graph_input,
    check_layout,
    describe,
    pad_images,
    require_plain_array,
    to_model_input,
)
from .sampling import NormalStream, check_count, check_temperature
from .session import GraphSession, check_threads
from .tiled import Tiler
from .tiling import Progress

# How far a precision that the manifest does not know may be from the fp32 reference in a self-test: bf16 keeps 8 bits
# of a number, tf32 11, and errors add up over the layers.
_PROVIDER_TOLERANCE = {"bf16": 5e-2, "tf32": 2e-3}


class RouteTest(NamedTuple):
    """How one entry of `VAE.plan` came through: operation, device and precision as there.

    errors: by tensor, as `vae_runtime.fidelity.golden_error` measures them. tolerance: what they were held against.
    """

    operation: str
    device: str
    precision: str
    tolerance: float
    errors: dict[str, float]

    @property
    def passed(self) -> bool:
        return all(error <= self.tolerance for error in self.errors.values())  # False for NaN


class SelfTest(NamedTuple):
    """The outcome of `VAE.selftest`: of every route by itself; together, the largest error by tensor, and the largest
    tolerance."""

    device: str
    precision: str
    routes: tuple[RouteTest, ...]

    @property
    def passed(self) -> bool:
        return all(route.passed for route in self.routes)

    @property
    def errors(self) -> dict[str, float]:
        pairs = [pair for route in self.routes for pair in route.errors.items()]
        # NaN is the largest of all.
        return {name: float(np.max([error for other, error in pairs if other == name])) for name, _ in pairs}

    @property
    def tolerance(self) -> float:
        return max(route.tolerance for route in self.routes)


class DevicePosterior(NamedTuple):
    """q(z|x) in the device's memory, float32 (N, *latent_shape): mean and, of a VAE, the log of the variance."""

    mean: DeviceArray
    logvar: DeviceArray | None = None


class VAE:
    """A bundle, ready to run. Made by `VAE.load`; may be shared between threads; a context manager.

    manifest: what the bundle says of itself. device, precision, plan: what really runs.
    """

    def __init__(self, bundle: Bundle, encoder: Operation, decoder: Operation, precision: str) -> None:
        self._bundle = bundle
        self._precision = precision
        self._device = _joined(route.any_batch.device.name for half in (encoder, decoder) for route in half.routes)
        self._operations: tuple[Operation, Operation] | None = (encoder, decoder)
        devices = [route.any_batch.device for half in (encoder, decoder) for route in half.routes]
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
        device: "cpu", "cuda", "cuda:N", "openvino", an onnxruntime provider's name, or "auto": what `vae-run tune`
            found fastest on this machine; where it was not run, CUDA where usable, else the CPU.
        precision: one that the bundle has files for ("fp32", "fp16", "int8"), "bf16" (OpenVINO) or "tf32" (CUDA), which
            run the fp32 graphs so, or "auto": what `vae-run tune` found fastest among those within the bundle's quality
            budget; where it was not run, fp32. "auto" may take another precision for calls with another number of
            examples, and results then differ by what the budget allows.
        threads: for the operators of one call on the CPU; None leaves it to the engine, which takes all cores.
        provider_options: the provider's own options, by its own names.

        Raises:
            BundleError: the bundle is missing, incomplete, altered, or of an unknown version.
            DeviceError: the device or the precision is not to be had; there is no silent fallback.
            InputError: no such device name, precision name, thread count or option.
            MissingExtraError: no onnxruntime is installed.
        """
        check_device_name(device)
        threads = check_threads(threads)
        if (clash := engine_clash()) is not None:
            warnings.warn(clash, RuntimeWarning, stacklevel=2)
        bundle = Bundle.open(path)
        _check_precision(precision, bundle.manifest)
        if "auto" in (device, precision):
            plan = _tuned_plan(bundle, device, precision, threads, provider_options)
        else:
            plan = _same_plan(Candidate(device, precision, threads))
        return cls._open(bundle, plan, provider_options)

    @classmethod
    def _open(cls, bundle: Bundle, plan: _Plan, provider_options: Mapping[str, str] | None = None) -> VAE:
        """Open what `plan` says, each session once, however many batch ranges share it."""
        manifest = bundle.manifest
        boundaries = {
            "encode": encoder_boundary(manifest.kind, manifest.input, manifest.latent.shape),
            "decode": decoder_boundary(manifest.input, manifest.latent.shape),
        }

        opened = {_file_of(manifest, name, candidate.precision)[0] for name in plan for _, candidate in plan[name]}
        for file in sorted(manifest.files.keys() - opened):
            bundle.verify(file)

        def open_routes(operation: str) -> list[Route]:
            sessions: dict[Candidate, GraphSession] = {}
            routes: list[Route] = []
            for from_batch, asked in plan[operation]:
                file, precision = _file_of(manifest, operation, asked.precision)
                candidate = asked._replace(precision=precision)
                if candidate not in sessions:
                    found = find_device(candidate.device, precision, provider_options)
                    # One graph's bytes in memory at a time, and each session made from bytes that were just checked.
                    session = GraphSession(
                        bundle.read(file),
                        file,
                        found,
                        candidate.threads,
                        candidate.spinning,
                        bundle=bundle.digest,
                        any_size=manifest.input.is_free,
                    )
                    session.require_boundary(boundaries[operation])
                    sessions[candidate] = session
                if not routes or routes[-1].any_batch is not sessions[candidate]:
                    routes.append(Route(from_batch, sessions[candidate], precision))
            return routes

        return cls(
            bundle,
            Operation(
                boundaries["encode"],
                lambda array: to_model_input(array, manifest.input, "images" if manifest.input.is_image else "vectors"),
                UNIT_INTERVAL if manifest.input.is_image else FINITE,
                open_routes("encode"),
            ),
            Operation(
                boundaries["decode"],
                lambda array: to_decoder_input(array, manifest.latent.shape),
                FINITE,
                open_routes("decode"),
            ),
            _joined(candidate.precision for routes in plan.values() for _, candidate in routes),
        )

    @property
    def manifest(self) -> Manifest:
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
        """What runs for "encode" and "decode": per range of batch sizes its first (`from_batch`), the device,
        onnxruntime's provider, the precision, the file, threads and spinning (None: the engine's own choice), and the
        batch sizes that have a session of their own since `warmup` (`fixed_batches`)."""
        encoder, decoder = self._open_operations()
        return {
            "encode": [route.describe() for route in encoder.routes],
            "decode": [route.describe() for route in decoder.routes],
        }

    def warmup(self, batch_sizes: Sequence[int] = (1,), size: tuple[int, int] | None = None) -> None:
        """Do now what the first call with so many examples would do, and on OpenVINO also what makes every such call
        faster: compile the graphs for just that batch size. Each costs memory and time there; results stay the same up
        to rounding. On CUDA each becomes a graph of launches, which belongs to the thread that calls this, before other
        threads use the GPU; calls in other threads run without it.

        batch_sizes: numbers of examples that `encode` and `decode` will be given in one call.
        size: (height, width) of these images, where the bundle leaves it free; None: `manifest.input.default_size`.

        Raises:
            InputError: a batch size that is no whole number from 1, a size that does not fit. BundleError: the bundle
            has been altered or removed since it was loaded. DeviceError: the device failed, as for want of memory.
        """
        if isinstance(batch_sizes, (str, bytes)) or not isinstance(batch_sizes, Sequence):
            raise InputError(f"batch_sizes is {batch_sizes!r}; expected a sequence such as (1, 32)")
        shape = self._input_shape(size)
        shapes = shape, self.manifest.latent_shape(shape)
        for batch in [check_count(count, "a batch size") for count in batch_sizes]:
            for operation, one in zip(self._open_operations(), shapes, strict=True):
                operation.warm((batch, *one), self._bundle.read)

    def encode(
        self,
        inputs: Any,
        *,
        batch_size: int | None = None,
        pad: bool = False,
        tile: int | None = None,
        progress: Progress | None = None,
    ) -> Posterior:
        """Inputs -> the posterior q(z|x) of each; for a plain autoencoder, its code.

        inputs: images as uint8 (N, H, W) or (N, H, W, C), or float32 (N, C, H, W) in [0, 1]; vectors as float32 (N, D).
        batch_size: examples per call of the graph; None chooses by size. It bounds memory, not the result.
        pad: where height and width are free, repeat the last row and column up to the next multiple of
            `manifest.input.multiple_of`; `decode(..., size=(height, width))` cuts it off again.
        tile: where height and width are free, go through each image in windows of this many pixels on a side, a
            multiple of `manifest.input.multiple_of`: memory grows with the window, not with the image. Exact where
            `manifest.tiling` has a `context`, else an approximation, with an `ApproximateTilingWarning`.
        progress: with `tile`, called after each window with how many are done and how many there are.

        Raises:
            InputError: anything else; the message says what to do. ClosedError: after `close()`.
        """
        operations = self._operations or self._open_operations()
        if pad:
            inputs, _ = self._padded(inputs)
        if tile is not None or progress is not None:
            return Posterior(*Tiler(self.manifest, operations, tile, batch_size, progress).encode(inputs))
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

        size: (height, width) of images that were padded, to which the result is cut.
        tile, progress: as in `encode`; the windows are this many pixels of the result.

        Raises:
            InputError: another dtype or shape, NaN or infinity; a size that these latents are not of. ClosedError:
            after `close()`.
        """
        operations = self._operations or self._open_operations()
        if tile is not None or progress is not None:
            return Tiler(self.manifest, operations, tile, batch_size, progress).decode(latents, size)
        images = operations[1](latents, batch_size)[0]
        return images if size is None else self._cropped(images, size)

    def sample(
        self,
        n: int,
        seed: int | None = None,
        temperature: float = 1.0,
        *,
        batch_size: int | None = None,
        size: tuple[int, int] | None = None,
    ) -> Float32:
        """Draw `n` latents from the prior N(0, temperature²) and decode them -> like `decode`.

        A larger `n` with the same seed begins with the same latents, and so with the same examples, unless precision
        "auto" decodes so many in another precision.

        size: (height, width) of the images, where the bundle leaves it free; None: `manifest.input.default_size`.

        Raises:
            KindError: the bundle is a plain autoencoder, which has no prior. InputError: an argument out of range.
        """
        batches = self.sample_batches(n, seed, temperature, batch_size=batch_size, size=size)
        try:
            images: Float32 = np.empty((n, *self._input_shape(size)), np.float32)
        except (MemoryError, ValueError, OverflowError):
            raise InputError(f"n is {n}; that many examples do not fit into memory, take sample_batches") from None
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
        batch_size: int | None = None,
        size: tuple[int, int] | None = None,
    ) -> Iterator[Float32]:
        """The same examples as `sample`, batch by batch, for more than fit into memory.

        Raises:
            As `sample`, at once; ClosedError later, if the bundle is closed between two batches.
        """
        shape = self.manifest.latent_shape(self._input_shape(size))
        chunk = self._open_operations()[1].chunk_size(batch_size, shape)
        if self.manifest.latent.prior is None:
            raise KindError(f"{self.manifest.name} is a plain autoencoder, which has no prior to sample from")
        count, scale, stream = check_count(n, "n"), check_temperature(temperature), NormalStream(seed)
        latents = (scale * stream.draw(min(chunk, count - start), shape) for start in range(0, count, chunk))
        return (self._open_operations()[1].run(batch, chunk, count)[0] for batch in latents)

    def reconstruct(
        self,
        inputs: Any,
        *,
        batch_size: int | None = None,
        pad: bool = False,
        tile: int | None = None,
        progress: Progress | None = None,
    ) -> Float32:
        """Encode, take the mean, decode: float32 (N, C, H, W) in [0, 1] or (N, D). Deterministic. On a GPU the latents
        stay in its memory. pad, tile, progress: as in `encode`; the result has the size of the inputs."""
        encoder, decoder = self._open_operations()
        inputs, size = self._padded(inputs) if pad else (inputs, None)
        if tile is not None or progress is not None:
            return Tiler(self.manifest, (encoder, decoder), tile, batch_size, progress).reconstruct(inputs, size)
        if self._is_on_one_gpu:
            images = encoder.then(decoder, inputs, batch_size)
        else:
            images = self.decode(self.encode(inputs, batch_size=batch_size).mode(), batch_size=batch_size)
        return images if size is None else self._cropped(images, size)

    def _padded(self, inputs: Any) -> tuple[Any, tuple[int, int]]:
        """The inputs, of free height and width, up to the next multiples, and the (height, width) that they had."""
        spec = self.manifest.input
        if not spec.is_free:
            raise InputError(f"pad is True; {self.manifest.name} takes inputs of one shape only, {describe(spec)}")
        require_plain_array(inputs, "images")
        check_layout(inputs, spec._replace(multiple_of=1), "images")
        return pad_images(inputs, spec.multiple_of)

    def _cropped(self, images: Float32, size: tuple[int, int]) -> Float32:
        """What padding added cut off again."""
        height, width = check_cut(size, images.shape, self.manifest.input.multiple_of)
        return np.ascontiguousarray(images[..., :height, :width])

    def _input_shape(self, size: tuple[int, int] | None) -> tuple[int, ...]:
        """The shape of one input of this (height, width)."""
        spec = self.manifest.input
        if size is None:
            return spec.example_shape
        sides = check_sides(size)
        if not spec.is_image or not (spec.is_free or sides == spec.shape[1:]):
            raise InputError(f"size is {sides}; {self.manifest.name} is made for inputs of {describe(spec)} alone")
        if any(side % spec.multiple_of for side in sides):
            raise InputError(f"size is {sides}; expected (height, width), multiples of {spec.multiple_of}")
        return (spec.example_shape[0], *sides)

    def encode_to_device(self, inputs: Any) -> DevicePosterior:
        """`encode` with results that stay in the device's memory, for applications that keep their data there.

        inputs: as `encode` takes them, or an array that is in that memory already, float32 (N, *input_shape), of any
        library that speaks DLPack (torch, cupy, jax), without a copy. The values of such an array are not looked at:
        reading them would cost what staying on the device saves. All examples run at once; the memory is the caller's
        care.

        Raises:
            InputError: as `encode`, or an array on another device. OutOfMemoryError: too many examples for the device.
        """
        outputs = self._open_operations()[0].run_on_device(inputs, "inputs")
        return DevicePosterior(*outputs)

    def decode_to_device(self, latents: Any) -> DeviceArray:
        """`decode` with a result that stays in the device's memory. latents: as `decode` takes them, or an array on the
        device, such as `encode_to_device(...).mean`; see there."""
        return self._open_operations()[1].run_on_device(latents, "latents")[0]

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
        if start.shape != end.shape:
            raise InputError(
                f"a and b have latents of shapes {start.shape[1:]} and {end.shape[1:]}; the same is needed"
            )
        return self.decode(interpolate_latents(start[0], end[0], steps, method))

    def selftest(self) -> SelfTest:
        """Run the bundle's golden inputs through every route of `plan` and compare with the reference's outputs of the
        day of export.

        The decoder gets the reference's mean, so that each half is held to its own error.

        Raises:
            BundleError: the golden file is damaged. DeviceError: the bundle states no tolerance for a precision in use.
            ClosedError: after `close()`.
        """
        encoder, decoder = self._open_operations()
        golden = self._bundle.golden()
        outputs = [MEAN, LOGVAR] if LOGVAR in golden else [MEAN]
        return SelfTest(
            self.device,
            self._precision,
            (
                *self._test_routes("encode", encoder, golden[INPUT], outputs, golden),
                *self._test_routes("decode", decoder, golden[MEAN], [RECONSTRUCTION], golden),
            ),
        )

    def _test_routes(
        self, name: str, operation: Operation, inputs: Float32, outputs: list[str], golden: dict[str, Float32]
    ) -> Iterator[RouteTest]:
        tolerances = {**_PROVIDER_TOLERANCE, **self.manifest.golden.tolerance}
        for route, found in operation.run_each(inputs):
            if route.precision not in tolerances:
                raise DeviceError(
                    f"the bundle states no golden tolerance for {route.precision}; it has"
                    f" {', '.join(sorted(self.manifest.golden.tolerance))}"
                )
            errors = {
                tensor: golden_error(tensor, array, golden, route.precision, self.manifest.input.is_image)
                for tensor, array in zip(outputs, found, strict=True)
            }
            device = route.any_batch.device.name
            yield RouteTest(name, device, route.precision, tolerances[route.precision], errors)

    def golden(self) -> dict[str, Float32]:
        """The bundle's golden inputs `x` with the reference's `mean`, `logvar` and `reconstruction`, new arrays."""
        self._open_operations()
        return self._bundle.golden()

    def close(self) -> None:
        """Free both graphs; every later call raises `ClosedError`. Calls under way in other threads finish."""
        self._operations = None

    def __enter__(self) -> VAE:
        self._open_operations()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._operations is None else f"{self._precision} on {self.device}"
        return f"VAE({self.manifest.name!r}, {self.manifest.kind}, {state})"

    def _open_operations(self) -> tuple[Operation, Operation]:
        if self._operations is None:
            raise ClosedError(f"{self.manifest.name} was closed; load the bundle again")
        return self._operations


_Plan = Mapping[str, list[tuple[int, Candidate]]]


def _same_plan(candidate: Candidate) -> _Plan:
    return {"encode": [(1, candidate)], "decode": [(1, candidate)]}


def _tuned_plan(
    bundle: Bundle, device: str, precision: str, threads: int | None, options: Mapping[str, str] | None
) -> _Plan:
    """What was measured fastest; where nothing was, or it is not to be had any more, the stated rules."""
    from .tuning import choose, read_tuning  # late: only "auto" needs it

    by_rule = Candidate(
        find_device(device, precision, options).name, "fp32" if precision == "auto" else precision, threads
    )
    measured = [] if options else [one for one in read_tuning(bundle.digest) if _can_run(bundle, one.candidate)]
    plan = {
        name: choose(measured, name, by_rule.device if device != "auto" else device, precision, threads)
        for name in ("encode", "decode")
    }
    return plan if all(plan.values()) else _same_plan(by_rule)


def _can_run(bundle: Bundle, candidate: Candidate) -> bool:
    if candidate.precision not in {*bundle.manifest.precisions, *PROVIDER_PRECISIONS}:
        return False
    try:
        find_device(candidate.device, candidate.precision)
    except (DeviceError, InputError):
        return False
    return True


def _check_precision(asked: Any, manifest: Manifest) -> None:
    if not isinstance(asked, str) or asked not in (*PRECISIONS, *PROVIDER_PRECISIONS, "auto"):
        raise InputError(
            f"precision is {asked!r}; expected one of {', '.join((*PRECISIONS, *PROVIDER_PRECISIONS, 'auto'))}"
        )
    if asked in PRECISIONS and asked not in manifest.precisions:
        raise DeviceError(
            f"precision {asked!r} is not in {manifest.name}, which has {', '.join(sorted(manifest.precisions))}"
        )


def _file_of(manifest: Manifest, operation: str, precision: str) -> tuple[str, str]:
    """The file that runs an operation in a precision, and the precision that it really has: fp32 for a half that has no
    file of its own."""
    if precision in PROVIDER_PRECISIONS:
        files = manifest.precisions["fp32"]
        return (files.encoder if operation == "encode" else files.decoder), precision
    files, reference = manifest.precisions[precision], manifest.precisions["fp32"]
    file, plain = (files.encoder, reference.encoder) if operation == "encode" else (files.decoder, reference.decoder)
    return file, "fp32" if file == plain else precision


def _joined(names: Iterable[str]) -> str:
    return "+".join(dict.fromkeys(names))


def to_decoder_input(latents: Any, shape: Shape, name: str = "latents") -> Float32:
    """Check latents and return them as the decoder takes them: float32 (N, *shape), finite."""
    require_plain_array(latents, name)
    check_latent_layout(latents, shape, name)
    low, high = latents.min(), latents.max()
    if not (low > -np.inf and high < np.inf):
        raise InputError(f"{name} has {'NaN' if np.isnan(low) else 'infinite values'}; latents are finite")
    return as_graph_input(latents)


def check_latent_layout(latents: Any, shape: Shape, name: str) -> None:
    """Raise `InputError` unless dtype and shape are those of latents; the values are not looked at."""
    boundary = Boundary(LATENT, shape, {})
    rule = f"expected {boundary.rule()} float32"
    if latents.dtype != np.float32 or not latents.dtype.isnative:
        order = "" if latents.dtype.isnative else " in foreign byte order"
        raise InputError(f"{name} has dtype {latents.dtype}{order}; {rule}, convert with .astype(numpy.float32)")
    if not boundary.accepts(latents.shape[1:]):
        single = boundary.accepts(latents.shape)
        hint = "; this looks like a single latent without a batch: latents[None]" if single else ""
        raise InputError(f"{name} has shape {latents.shape}; {rule}{hint}")
