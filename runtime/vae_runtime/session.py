"""One graph in one onnxruntime session, opened strictly: on the device that was asked for, or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import numpy as np

from .bound import BoundCall, DeviceCall
from .cuda import CUDA, real_work_on_cpu
from .device_array import DeviceArray, copy_to_device
from .devices import CPU, Device
from .engine import first_line, import_engine
from .errors import BundleError, ClosedError, DeviceError, InputError, OutOfMemoryError, VAEError
from .graph_rules import check_graph
from .plugins import OPENVINO
from .preprocess import Float32, ValueRule

# Up to so many values per call, copying into memory that is bound to the session costs less than binding the caller's.
_BOUND_VALUES = 2**16
_RECORD_NODES = "session.record_ep_graph_assignment_info"
# How engines and drivers say it; there is no status of its own for it.
# fmt: off
_NO_MEMORY = (
    "failed to allocate memory", "smaller than requested bytes", "out of memory", "bad_alloc", "bad allocation",
    "alloc_failed", "allocation_failed", "cuda failure 2:",
)
# fmt: on


class GraphSession:
    """A graph with one input and one or more outputs, all float32 with the batch first.

    Safe to share between threads; not usable in a process forked after it was made.

    threads, spinning: of onnxruntime's own thread pool; None leaves each to onnxruntime. Other providers have their own
        pools: OpenVINO takes `threads` too, and none takes `spinning`.
    batch: the only batch size that it takes, and is made for; None takes any.
    bundle: the digest of the bundle that the graph is from; by it a device keeps what it builds for the graph.
    """

    def __init__(
        self,
        model: bytes,
        file: str,
        device: Device,
        threads: int | None = None,
        spinning: bool | None = None,
        batch: int | None = None,
        bundle: str = "",
    ) -> None:
        check_graph(model, file)
        self.file = file
        self.device = device
        self.threads = threads
        self.spinning = spinning
        self.batch = batch
        self.bundle = bundle
        self._process = os.getpid()
        self._session = _open(model, file, device, threads, spinning, batch, bundle)
        self.inherited = False  # through a fork
        # A CUDA graph reads and writes the addresses that it was captured with, whatever a later run is given; and
        # onnxruntime keeps one per thread, so that another thread's first call would capture anew.
        self._only_call: DeviceCall | None = None
        self._own = threading.local()
        self._own.thread = True
        _sessions.add(self)

    def require_boundary(
        self, input_name: str, input_shape: tuple[int, ...], outputs: dict[str, tuple[int, ...]]
    ) -> None:
        """Raise `BundleError` unless the graph has exactly these tensors, float32, of these shapes after the batch."""
        found_inputs = {node.name: (node.type, list(node.shape[1:])) for node in self._session.get_inputs()}
        found_outputs = {node.name: (node.type, list(node.shape[1:])) for node in self._session.get_outputs()}
        for side, found, expected in (
            ("inputs", found_inputs, {input_name: input_shape}),
            ("outputs", found_outputs, outputs),
        ):
            if found != {name: ("tensor(float)", list(shape)) for name, shape in expected.items()}:
                raise BundleError(
                    f"{self.file} has the {side} {found}; the manifest promises float32 {expected} after the batch"
                )
        self._input = input_name
        self._input_shape = input_shape
        self._outputs = list(outputs)
        self._output_shapes = list(outputs.values())
        if self.batch is None and isinstance(self._session.get_inputs()[0].shape[0], int):
            raise BundleError(f"{self.file} has a fixed batch size; a bundle's graphs take any")
        largest = max(math.prod(shape) for shape in (input_shape, *outputs.values()))
        self._largest_bound = _BOUND_VALUES // largest
        if self.batch is not None and self.device.is_gpu:
            with self._naming_errors(self.batch):
                self._only_call = DeviceCall(self, self._shapes(self.batch))

    @property
    def serves_this_thread(self) -> bool:
        return self._only_call is None or getattr(self._own, "thread", False)

    @property
    def gains_from_fixed_batch(self) -> bool:
        """Whether a session made for one batch size is faster than one for any. OpenVINO lays out its memory and
        chooses its kernels by shape, CUDA replays a graph of launches; the CPU provider takes the same time."""
        return self.device.provider in (OPENVINO, CUDA)

    def for_batch(self, model: bytes, batch: int) -> GraphSession:
        """A session of the same graph, whose file's bytes are `model`, in all as this one, but for one batch size."""
        try:
            return self._for_batch(model, batch, self.device)
        except DeviceError as error:
            if self.device.provider != CUDA or isinstance(error, OutOfMemoryError):
                raise
            # A graph with arithmetic on shapes on the CPU cannot be captured.
            return self._for_batch(model, batch, self.device.without_launch_graph())

    def _for_batch(self, model: bytes, batch: int, device: Device) -> GraphSession:
        session = GraphSession(model, self.file, device, self.threads, self.spinning, batch, self.bundle)
        session.require_boundary(
            self._input, self._input_shape, dict(zip(self._outputs, self._output_shapes, strict=True))
        )
        session.run(np.zeros((batch, *self._input_shape), np.float32))  # what cannot be captured fails here
        return session

    def bind(self, batch: int, rule: ValueRule) -> BoundCall | DeviceCall | None:
        """Calls of so many rows at the least cost; None where there is nothing to gain."""
        if self.device.is_gpu:
            with contextlib.suppress(Exception):  # no memory left for more buffers: calls do without
                return DeviceCall(self, self._shapes(batch), rule) if self._only_call is None else None
        # On other providers binding an input copies it to the device; what is written to the array later is never seen.
        if self.device.provider == CPU and batch <= self._largest_bound:
            return BoundCall(self, self._shapes(batch), rule)
        return None

    def _shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        names, shapes = [self._input, *self._outputs], (self._input_shape, *self._output_shapes)
        return {name: (batch, *shape) for name, shape in zip(names, shapes, strict=True)}

    def io_binding(self) -> Any:
        """onnxruntime's own."""
        return self._session.io_binding()

    def bound_run(self, binding: Any) -> Callable[[], None]:
        """What `InferenceSession.run_with_iobinding` calls in turn."""
        return partial(self._session._sess.run_with_iobinding, binding._iobinding, None)

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
            results = cast("list[Float32]", self._session.run(self._outputs, {self._input: array}))
        # onnxruntime does not hold a graph to the shapes that it declares.
        for name, result, shape in zip(self._outputs, results, self._output_shapes, strict=True):
            if result.shape != (len(array), *shape):
                raise BundleError(
                    f"{self.file} returned {name} of shape {result.shape} for {len(array)} rows;"
                    f" the manifest promises {(len(array), *shape)}"
                )
        return results

    def run_on_device(self, array: DeviceArray) -> list[DeviceArray]:
        """Run the graph on an array in the device's memory -> new ones there, which belong to the caller.

        Raises:
            As `run`.
        """
        self._require_own_process()
        with self._naming_errors(len(array)):
            binding = self.io_binding()
            binding.bind_ortvalue_input(self._input, array._value)
            for name in self._outputs:
                binding.bind_output(name, *self.device.memory)
            self.bound_run(binding)()
            return [DeviceArray(value, self.device.memory) for value in binding.get_outputs()]

    def to_device(self, array: Float32) -> DeviceArray:
        """A copy in the device's memory. Raises as `run`."""
        self._require_own_process()
        with self._naming_errors(len(array)):
            return copy_to_device(array, self.device)

    def _require_own_process(self) -> None:
        if os.getpid() != self._process:
            raise ClosedError(
                f"{self.file} was loaded in process {self._process}, before this process was forked; load it again here"
            )

    @contextlib.contextmanager
    def _naming_errors(self, rows: int) -> Iterator[None]:
        """The engine's errors as ours, with the file, the device and the batch size."""
        try:
            yield
        except VAEError:
            raise
        except Exception as error:
            raise self._run_error(error, rows) from error

    def _run_error(self, error: Exception, rows: int) -> DeviceError:
        if isinstance(error, MemoryError) or any(words in str(error).lower() for words in _NO_MEMORY):
            return OutOfMemoryError(
                f"{self.device.name} has not enough memory for {self.file} at batch size {rows}"
                + ("; pass a smaller batch_size" if rows > 1 else ", the smallest")
            )
        return DeviceError(f"{self.file} failed on {self.device.name} at batch size {rows}: {first_line(error)}")


_sessions: weakref.WeakSet[GraphSession] = weakref.WeakSet()


def _keep_inherited_sessions() -> None:
    """In a forked child: never free what it inherited. onnxruntime's threads are not there, and it would wait for them
    for ever, or crash, at the latest when the child exits."""
    for session in list(_sessions):
        session.inherited = True
        for held in (session._session, session._session._sess):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(held))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_keep_inherited_sessions)


def check_threads(threads: Any) -> int | None:
    """`threads` as onnxruntime takes it: a whole number from 1, or None for its own choice."""
    if threads is None:
        return None
    if isinstance(threads, bool) or not isinstance(threads, (int, np.integer)) or not 1 <= threads <= 4096:
        raise InputError(
            f"threads is {threads!r}; expected a whole number from 1 to 4096, or None for onnxruntime's own choice"
        )
    return int(threads)


def _open(
    model: bytes,
    file: str,
    device: Device,
    threads: int | None,
    spinning: bool | None,
    batch: int | None,
    bundle: str,
) -> Any:
    onnxruntime = import_engine()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what fails is raised, not printed
    options.inter_op_num_threads = 1
    if threads is not None:
        options.intra_op_num_threads = threads
    if spinning is not None:
        options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spinning else "0")
    if batch is not None:
        options.add_free_dimension_override_by_name("batch", batch)
    options.add_session_config_entry("session.load_model_format", "ONNX")
    records_nodes = device.is_gpu and hasattr(onnxruntime.InferenceSession, "get_provider_graph_assignment_info")
    if records_nodes:  # arithmetic on shapes is the CPU's there, and the switch below would refuse it too
        options.add_session_config_entry(_RECORD_NODES, "1")
    elif device.provider != CPU:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    provider_options = device.session_options(threads, batch is not None, bundle)
    try:
        if device.plugin is not None:
            options.add_provider_for_devices([device.plugin], provider_options)
            providers = None
        else:
            providers = [(device.provider, provider_options)]
        session = onnxruntime.InferenceSession(
            model, options, providers=providers, enable_fallback=0, read_config_from_model=0
        )
    except Exception as error:
        raise _open_error(error, file, device) from error
    session._model_bytes = None  # kept only for the fallback that is off; it would double the memory
    if session.get_providers()[0] != device.provider:
        raise DeviceError(
            f"device {device.name!r} cannot be used: onnxruntime opened {file} on {session.get_providers()[0]} instead"
        )
    if records_nodes and (operators := real_work_on_cpu(session)):
        raise DeviceError(
            f"device {device.name!r} cannot run {file} as a whole: it leaves {', '.join(operators)} to the CPU"
        )
    return session


def _open_error(error: Exception, file: str, device: Device) -> BundleError | DeviceError:
    """A CPU session fails because of the graph; another device's may fail for its own reasons."""
    if device.provider == CPU or type(error).__name__ in ("InvalidGraph", "InvalidProtobuf"):
        return BundleError(f"{file} cannot be loaded by onnxruntime: {first_line(error)}")
    options = f" with the options {dict(device.options)}" if device.options else ""
    return DeviceError(f"device {device.name!r} cannot run {file}{options}: {first_line(error)}")
