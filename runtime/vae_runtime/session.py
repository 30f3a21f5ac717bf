"""One graph in one onnxruntime session, opened strictly: on the device that was asked for, or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, cast

import numpy as np

from .bound import BOUND_VALUES, BoundCall, Owner
from .boundary import Boundary
from .cuda import (
    CUDA,
    capturing,
    has_little_memory,
    is_lost,
    made_current,
    operators,
    real_work_on_cpu,
    share_allocator,
    why_not_loaded,
)
from .device_array import DeviceArray, await_others, copy_to_device
from .device_call import CapturedCall, DeviceCall, ResidentCall, StagedCall
from .devices import CPU, Device, is_on
from .engine import (
    CRASHING_ON_FLOAT16,
    first_line,
    import_engine,
    is_raw_engine_error,
    raised_here,
    suppress_engine_errors,
)
from .errors import BundleError, ClosedError, DeviceError, OutOfMemoryError
from .graph_rules import check_graph, has_float16
from .manifest import BATCH, IMAGE_SIDES, LATENT_SIDES, Shape
from .plugins import OPENVINO
from .preprocess import Float32, ValueRule

if TYPE_CHECKING:
    from .cuda_stream import Stream

_RECORD_NODES = "session.record_ep_graph_assignment_info"
# How engines and drivers say it; there is no status of its own for it.
# fmt: off
_NO_MEMORY = (
    "failed to allocate memory", "smaller than requested bytes", "out of memory", "bad_alloc", "bad allocation",
    "alloc_failed", "allocation_failed", "cuda failure 2:",
)
# fmt: on
_NOT_STARTED = ("cublas_status_not_initialized", "cudnn_status_not_initialized")  # for want of memory, among others


class GraphSession:
    """A graph with one input and one or more outputs, all float32 with the batch first.

    Safe to share between threads; not usable in a process forked after it was made.

    boundary: its tensors, as the manifest promises them; a graph with others is a `BundleError`.
    threads, spinning: of onnxruntime's own thread pool; None leaves each to onnxruntime. Other providers have their own
        pools: OpenVINO takes `threads` too, and none takes `spinning`.
    fixed: the only shape of input that it takes, and is made for, with the batch; None takes any.
    bundle: the digest of the bundle that the graph is from; by it a device keeps what it builds for the graph.
    stream: of a GPU, on which the session has been told to work, see `StagedCall`. captures: see `CapturedCall`.
    """

    def __init__(
        self,
        model: bytes,
        file: str,
        device: Device,
        boundary: Boundary,
        threads: int | None = None,
        spinning: bool | None = None,
        fixed: tuple[int, ...] | None = None,
        bundle: str = "",
        stream: Stream | None = None,
        captures: bool = False,
    ) -> None:
        check_graph(model, file)
        self.file = file
        self.device = device
        self.threads = threads
        self.spinning = spinning
        self.fixed = fixed
        self.bundle = bundle
        self._process = os.getpid()
        self._stream, self._captures, self._memory = stream, captures, device.memory
        self._context = made_current(device.memory)
        with alone_on(device), self._context:
            any_size = None in boundary.input_shape and fixed is None
            self._session = _open(model, file, device, threads, spinning, fixed, bundle, any_size)
        self.owner = Owner()
        # A CUDA graph reads and writes the addresses that it was captured with, whatever a later run is given; and
        # onnxruntime keeps one per thread, so that another thread's first call would capture anew.
        self._only_call: DeviceCall | None = None
        self.replays_on_device = False  # whether `replay_on_device` is to be taken
        self.is_zero_copy = False  # whether `CapturedCall.begin_zero_copy` is taken
        self.trials: dict[str, float | str] = {}  # variant -> its time relative to the best, or why it was not taken
        self._of_thread = threading.local()  # what each thread has of this session
        _sessions.add(self)
        self._boundary, self.names = boundary, [boundary.input, *boundary.outputs]
        self._require_boundary(boundary)
        if fixed is not None and device.is_gpu:
            with self._naming_errors(fixed[0]):
                if stream is None:
                    self._only_call = DeviceCall(self, self._shapes(fixed))
                else:
                    self._only_call = (CapturedCall if captures else StagedCall)(self, self._shapes(fixed), stream)

    def _require_boundary(self, boundary: Boundary) -> None:
        """Raise `BundleError` unless the graph has exactly these tensors, float32, of these shapes after the batch."""
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        shape = self.fixed[1:] if self.fixed is not None else boundary.input_shape
        shapes = boundary.outputs.values() if self.fixed is None else boundary.output_shapes(self.fixed[1:])
        for side, found, expected, free in (
            ("inputs", inputs, {boundary.input: shape}, {boundary.input: boundary.input_shape}),
            ("outputs", outputs, dict(zip(boundary.outputs, shapes, strict=True)), boundary.outputs),
        ):
            described = {node.name: (node.type, _sides(node.shape)) for node in found}
            if described.keys() != expected.keys() or any(
                kind != "tensor(float)" or not _fits(sides, expected[name], free[name])
                for name, (kind, sides) in described.items()
            ):
                raise BundleError(
                    f"{self.file} has the {side} {described}; the manifest promises float32 {expected} after the batch"
                )
        if self.fixed is None and isinstance(inputs[0].shape[0], int):
            raise BundleError(f"{self.file} has a fixed batch size; a bundle's graphs take any")

    @property
    def serves_this_thread(self) -> bool:
        return self._only_call is None or self._only_call.may_run()

    @property
    def is_orphan(self) -> bool:
        """Whether it serves one thread alone, which has ended."""
        return self._only_call is not None and self.owner.has_ended

    @property
    def captured_call(self) -> CapturedCall | None:
        """What runs it as one launch, where something does."""
        return self._only_call if isinstance(self._only_call, CapturedCall) else None

    @property
    def operators(self) -> list[str] | None:
        """The type of each operator that it runs; None where onnxruntime does not tell."""
        return operators(self._session)

    def describe_variant(self) -> dict[str, Any]:
        """How a session for one shape on a GPU works."""
        options = self.device.session_options(self.threads, True, self.bundle)
        return {
            "shape": list(self.fixed or ()),
            "cuda_graph": self._captures or is_on(options, "enable_cuda_graph"),
            "layout": "NHWC" if is_on(options, "prefer_nhwc") else "NCHW",
            "bias": "fused" if is_on(options, "fuse_conv_bias") else "apart" if self.device.without else None,
            "copies": "pageable" if self._stream is None else "captured" if self._captures else "pinned",
            "zero_copy": self.is_zero_copy,
            "on_device": self.replays_on_device,
            "in_steps": dict(self.captured_call.in_steps if self.captured_call else {}),
            "trials": dict(self.trials),
        }

    @property
    def gains_from_fixed_shape(self) -> bool:
        """Whether a session made for one shape of input is faster than one for any. OpenVINO lays out its memory and
        chooses its kernels by shape, CUDA replays a CUDA graph; the CPU provider takes the same time."""
        return self.device.provider in (OPENVINO, CUDA)

    def for_shape(self, model: bytes, shape: tuple[int, ...], rule: ValueRule) -> GraphSession:
        """A session of the same graph, whose file's bytes are `model`, in all as this one, but for one shape of input,
        with the batch. rule: what its calls hold values to. Raises as `run`."""
        self._require_own_process()
        if self.device.provider != CUDA:
            return self.open_for(model, shape, self.device)
        from .trial import fastest_session  # late: only a GPU has several variants

        return fastest_session(self, model, shape, rule)

    def open_for(
        self, model: bytes, shape: tuple[int, ...], device: Device, stream: Stream | None = None, captures: bool = False
    ) -> GraphSession:
        """The same in one variant: by what `device` says, which is this session's but for options."""
        settings = self._boundary, self.threads, self.spinning, shape, self.bundle
        with alone_on(device):
            session = GraphSession(model, self.file, device, *settings, stream=stream, captures=captures)
            session.run(np.zeros(shape, np.float32))  # what cannot be captured fails here
        return session

    def bind(self, shape: tuple[int, ...], rule: ValueRule) -> BoundCall | DeviceCall | None:
        """Calls with inputs of this shape at the least cost; None where there is nothing to gain."""
        if self._only_call is not None:
            self._only_call.hold_to(rule)
            return self._only_call
        if self.device.is_gpu:
            with suppress_engine_errors, self._context:  # no memory left for more buffers: calls do without
                return DeviceCall(self, self._shapes(shape), rule)
        # On other providers binding an input copies it to the device; what is written to the array later is never seen.
        return BoundCall(self, self._shapes(shape), rule) if self.gains_from_bound_memory(shape) else None

    def gains_from_bound_memory(self, shape: tuple[int, ...]) -> bool:
        """Whether calls with host memory that is bound to the session cost less, for inputs of this shape."""
        return self.device.provider == CPU and shape[0] * self._boundary.largest(shape[1:]) <= BOUND_VALUES

    def _shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Of all tensors by name, with the batch, for an input of this shape."""
        batch, *sides = shape
        shapes = [sides, *self._boundary.output_shapes(tuple(sides))]
        return {name: (batch, *one) for name, one in zip(self.names, shapes, strict=True)}

    def io_binding(self) -> Any:
        """onnxruntime's own."""
        return self._session.io_binding()

    def bound_run(self, binding: Any, waits: bool = True) -> Callable[[], None]:
        """What `InferenceSession.run_with_iobinding` calls in turn. waits: whether that ends only when the device is
        done; if not, whoever calls it has to wait for the session's stream."""
        options = None if waits else import_engine().RunOptions()
        if options is not None:
            options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        return partial(self._session._sess.run_with_iobinding, binding._iobinding, options)

    def run(self, array: Float32) -> list[Float32]:
        """Run the graph on (N, ...) -> its outputs (N, ...), which belong to the caller.

        Raises:
            DeviceError: onnxruntime failed, for example for want of memory.
            ClosedError: this process was forked after the session was made.
        """
        self._require_own_process()
        with self._naming_errors(len(array)):
            if self._only_call is not None:
                return self._only_call.run(array)
            await_others(self._memory)
            name, *outputs = self.names
            results = cast("list[Float32]", self._session.run(outputs, {name: array}))
        self._require_shapes(array.shape, [result.shape for result in results])
        return results

    def _require_shapes(self, given: tuple[int, ...], found: Sequence[tuple[int, ...]]) -> None:
        """Raise `BundleError` unless the outputs for an input of this shape, with the batch, have those of the
        manifest: onnxruntime does not hold a graph to the shapes that it declares."""
        shapes = self._boundary.output_shapes(given[1:])
        for name, result, shape in zip(self.names[1:], found, shapes, strict=True):
            if result != (given[0], *shape):
                raise BundleError(
                    f"{self.file} returned {name} of shape {result} for {given[0]} rows;"
                    f" the manifest promises {(given[0], *shape)}"
                )

    def run_on_device(self, array: DeviceArray) -> list[DeviceArray]:
        """Run the graph on an array in the device's memory -> new ones there, which belong to the caller.

        Raises:
            As `run`.
        """
        self._require_own_process()
        with self._naming_errors(len(array), in_one_piece=True):
            # Taken out while it is in use: a signal's handler may make a call within this one.
            call = getattr(self._of_thread, "resident", None) or ResidentCall(self)
            self._of_thread.resident = None
            found = [DeviceArray(value, self._memory) for value in call(array._value)]
            self._of_thread.resident = call
        self._require_shapes(array.shape, [one.shape for one in found])
        return found

    def replay_on_device(self, array: DeviceArray) -> list[DeviceArray] | None:
        """The same by the CUDA graph of a session for one shape that works on a stream. None where there is no such
        graph, and where `StagedCall.on_device` gives None."""
        call = self._only_call
        try:
            values = call.on_device(array._value) if isinstance(call, StagedCall) else None
        except Exception as error:
            self._raise(error, len(array), in_one_piece=True)
        return None if values is None else [DeviceArray(value, self._memory) for value in values]

    def to_device(self, array: Float32) -> DeviceArray:
        """A copy in the device's memory. Raises as `run`."""
        self._require_own_process()
        with self._naming_errors(len(array), in_one_piece=True):
            return copy_to_device(array, self.device)

    def _require_own_process(self) -> None:
        if os.getpid() != self._process:
            raise ClosedError(
                f"{self.file} was loaded in process {self._process}, before this process was forked; load it again here"
            )

    @contextlib.contextmanager
    def _naming_errors(self, rows: int, in_one_piece: bool = False) -> Iterator[None]:
        """The engine's errors as ours, with the file, the device and the batch size. in_one_piece: the caller has no
        batch_size to make smaller."""
        try:
            with self._context:
                yield
        except Exception as error:
            self._raise(error, rows, in_one_piece)

    def _raise(self, error: Exception, rows: int, in_one_piece: bool = False) -> NoReturn:
        if self.device.is_gpu:
            _keep_if_lost(self._memory[1])
        if not is_raw_engine_error(error):
            raise error
        raise self._run_error(error, rows, in_one_piece) from error

    def _run_error(self, error: Exception, rows: int, in_one_piece: bool = False) -> DeviceError:
        if _is_about_memory(error, self.device):
            free = None in self._boundary.input_shape
            smallest = "; go through large images in windows, with tile" if free else ", the smallest"
            fewer = "; pass fewer examples at a time" if in_one_piece else "; pass a smaller batch_size"
            return OutOfMemoryError(
                f"{self.device.name} has not enough memory for {self.file} at batch size {rows}"
                + (fewer if rows > 1 else smallest)
            )
        return DeviceError(f"{self.file} failed on {self.device.name} at batch size {rows}: {first_line(error)}")


_sessions: weakref.WeakSet[GraphSession] = weakref.WeakSet()


def _keep_inherited_sessions() -> None:
    """In a forked child: never free what it inherited. onnxruntime's threads are not there, and it would wait for them
    for ever, or crash, at the latest when the child exits."""
    for session in list(_sessions):
        session.owner.forked = True
        _keep_for_ever(session)


def _keep_if_lost(index: int) -> bool:
    """Never free sessions on a GPU that answers nothing but an error: onnxruntime would end the process over it."""
    if not is_lost(index):
        return False
    for session in list(_sessions):
        if session._memory == ("cuda", index):
            _keep_for_ever(session)
    return True


def _keep_for_ever(session: GraphSession) -> None:
    for held in (session._session, session._session._sess):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(held))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_keep_inherited_sessions)


@contextlib.contextmanager
def freeing(sessions: Iterable[GraphSession]) -> Iterator[None]:
    """While it lasts, these may be freed without harm: to a CUDA graph that another thread captures, as cuBLAS and
    cuDNN wait for the whole GPU then, and to which GPU is this thread's own, which onnxruntime changes."""
    held = list(sessions)
    on_gpus = sorted({one._memory for one in held if one.device.is_gpu and not one.owner.forked})
    del sessions  # or they would not be freed
    with contextlib.ExitStack() as entered:
        for memory in on_gpus:
            if not _keep_if_lost(memory[1]):
                with contextlib.suppress(DeviceError):  # while others capture a graph
                    await_others(memory)
                entered.enter_context(made_current(memory))
        if on_gpus:
            entered.enter_context(capturing)
        try:
            yield
        finally:
            held.clear()  # what nobody else holds is freed here, and not as soon as the caller has let go of it


def alone_on(device: Device) -> contextlib.AbstractContextManager[object]:
    """While it lasts, no other thread captures a CUDA graph, which opening or freeing a session would spoil."""
    return capturing if device.is_gpu else contextlib.nullcontext()


def _open(
    model: bytes,
    file: str,
    device: Device,
    threads: int | None,
    spinning: bool | None,
    fixed: tuple[int, ...] | None,
    bundle: str,
    any_size: bool,
) -> Any:
    onnxruntime = import_engine()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what fails is raised, not printed
    options.inter_op_num_threads = 1
    # From the second run of a shape on it would lay out memory for that shape anew, beside what the first run took.
    options.enable_mem_pattern = not any_size
    if threads is not None:
        options.intra_op_num_threads = threads
    if spinning is not None:
        options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spinning else "0")
    for name, side in free_names(fixed or ()):
        options.add_free_dimension_override_by_name(name, side)
    options.add_session_config_entry("session.load_model_format", "ONNX")
    records_nodes = device.is_gpu and hasattr(onnxruntime.InferenceSession, "get_provider_graph_assignment_info")
    if fixed is None and device.may_share_memory and share_allocator(device.memory[1]):
        options.add_session_config_entry("session.use_env_allocators", "1")
        # Weights are not taken from what is shared, which is never given back.
        options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    if records_nodes:  # arithmetic on shapes is the CPU's there, and the switch below would refuse it too
        options.add_session_config_entry(_RECORD_NODES, "1")
    elif device.provider != CPU:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    provider_options = device.session_options(threads, fixed is not None, bundle)
    try:
        if device.plugin is not None:
            options.add_provider_for_devices([device.plugin], provider_options)
            providers = None
        else:
            providers = [(device.provider, provider_options)]
        session = onnxruntime.InferenceSession(
            model,
            options,
            providers=providers,
            enable_fallback=0,
            read_config_from_model=0,
            disabled_optimizers=[
                *(CRASHING_ON_FLOAT16 if device.provider == CPU and has_float16(model) else []),
                *device.without,
            ],
        )
    except Exception as error:
        if not raised_here(error):
            raise
        raise _open_error(error, file, device) from error
    session._model_bytes = None  # kept only for the fallback that is off; it would double the memory
    if session.get_providers()[0] != device.provider:
        reason = why_not_loaded(device.provider) if device.is_gpu else None
        instead = f"onnxruntime opened {file} on {session.get_providers()[0]} instead"
        raise DeviceError(f"device {device.name!r} cannot be used: {reason or instead}")
    if records_nodes and (left := real_work_on_cpu(session)):
        raise DeviceError(
            f"device {device.name!r} cannot run {file} as a whole: it leaves {', '.join(left)} to the CPU"
        )
    return session


def free_names(fixed: tuple[int, ...]) -> list[tuple[str, int]]:
    """The names that a bundle's graphs have for free sides, with what they are for an input of this shape."""
    height_and_width = (IMAGE_SIDES, LATENT_SIDES) if len(fixed) == 4 else ()
    return [(BATCH, side) for side in fixed[:1]] + [
        pair for names in height_and_width for pair in zip(names, fixed[2:], strict=True)
    ]


def _sides(shape: list[int | str | None]) -> list[int | None]:
    """After the batch; None for a side without a number."""
    return [side if isinstance(side, int) else None for side in shape[1:]]


def _fits(found: list[int | None], expected: Shape, free: Shape) -> bool:
    """Whether the sides are those expected. One that may be free need not be known, even where it is fixed."""
    return len(found) == len(expected) and all(
        side == wanted or (side is None and pattern is None)
        for side, wanted, pattern in zip(found, expected, free, strict=True)
    )


def _open_error(error: Exception, file: str, device: Device) -> BundleError | DeviceError:
    """A CPU session fails because of the graph; another device's may fail for its own reasons."""
    if device.provider == CPU or type(error).__name__ in ("InvalidGraph", "InvalidProtobuf"):
        return BundleError(f"{file} cannot be loaded by onnxruntime: {first_line(error)}")
    if _is_about_memory(error, device):
        return OutOfMemoryError(f"{device.name} has not enough memory to open {file}")
    options = f" with the options {dict(device.given)}" if device.given else ""
    return DeviceError(f"device {device.name!r} cannot run {file}{options}: {first_line(error)}")


def _is_about_memory(error: Exception, device: Device) -> bool:
    text = str(error).lower()
    if isinstance(error, MemoryError) or any(words in text for words in _NO_MEMORY):
        return True
    return device.is_gpu and any(words in text for words in _NOT_STARTED) and has_little_memory(device.memory[1])
