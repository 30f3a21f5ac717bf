"""One graph in one onnxruntime session, opened strictly: on the device that was asked for, or not at all."""

from __future__ import annotations

import ctypes
import math
import os
import weakref
from functools import partial
from typing import Any, cast

import numpy as np

from .devices import CPU, Device, first_line, import_engine
from .errors import BundleError, ClosedError, DeviceError, InputError
from .graph_rules import check_graph
from .plugins import OPENVINO
from .preprocess import Float32, ValueRule

# Up to so many values per call, copying into memory that is bound to the session costs less than binding the caller's.
_BOUND_VALUES = 2**16


class GraphSession:
    """A graph with one input and one or more outputs, all float32 with the batch first.

    Safe to share between threads; not usable in a process forked after it was made.

    threads, spinning: of onnxruntime's own thread pool; None leaves each to onnxruntime. Other providers have their own
        pools: OpenVINO takes `threads` too, and none takes `spinning`.
    batch: the only batch size that it takes, and is made for; None takes any.
    """

    def __init__(
        self,
        model: bytes,
        file: str,
        device: Device,
        threads: int | None = None,
        spinning: bool | None = None,
        batch: int | None = None,
    ) -> None:
        check_graph(model, file)
        self.file = file
        self.device = device
        self.threads = threads
        self.spinning = spinning
        self.batch = batch
        self._process = os.getpid()
        self._session = _open(model, file, device, threads, spinning, batch)
        self.inherited = False  # through a fork
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
        # On other providers binding an input copies it to the device; what is written to the array later is never seen.
        self._largest_bound = _BOUND_VALUES // largest if self.device.provider == CPU else 0

    @property
    def gains_from_fixed_batch(self) -> bool:
        """Whether a session made for one batch size is faster than one for any. OpenVINO lays out its memory and
        chooses its kernels by shape; the CPU provider takes the same time."""
        return self.device.provider == OPENVINO

    def for_batch(self, model: bytes, batch: int) -> GraphSession:
        """A session of the same graph, whose file's bytes are `model`, in all as this one, but for one batch size."""
        session = GraphSession(model, self.file, self.device, self.threads, self.spinning, batch)
        session.require_boundary(
            self._input, self._input_shape, dict(zip(self._outputs, self._output_shapes, strict=True))
        )
        return session

    def bind(self, batch: int, rule: ValueRule) -> BoundCall | None:
        """Calls of so many rows at the least cost; None where they are too large, and on other providers than the
        CPU."""
        if batch > self._largest_bound:
            return None
        names = [self._input, *self._outputs]
        shapes = [(batch, *shape) for shape in (self._input_shape, *self._output_shapes)]
        return BoundCall(self, dict(zip(names, shapes, strict=True)), rule)

    def run(self, array: Float32) -> list[Float32]:
        """Run the graph on (N, ...) -> its outputs (N, ...), which belong to the caller.

        Raises:
            DeviceError: onnxruntime failed, for example for want of memory.
            ClosedError: this process was forked after the session was made.
        """
        if os.getpid() != self._process:
            raise ClosedError(
                f"{self.file} was loaded in process {self._process}, before this process was forked; load it again here"
            )
        try:
            results = cast("list[Float32]", self._session.run(self._outputs, {self._input: array}))
        except Exception as error:
            raise DeviceError(
                f"{self.file} failed on {self.device.name} at batch size {len(array)}: {first_line(error)}"
            ) from error
        # onnxruntime does not hold a graph to the shapes that it declares.
        for name, result, shape in zip(self._outputs, results, self._output_shapes, strict=True):
            if result.shape != (len(array), *shape):
                raise BundleError(
                    f"{self.file} returned {name} of shape {result.shape} for {len(array)} rows;"
                    f" the manifest promises {(len(array), *shape)}"
                )
        return results


class BoundCall:
    """Memory for the input and the outputs of one batch size, bound to a session once and used again and again.

    For one thread at a time. shapes: of the input, then of the outputs, by name.
    """

    def __init__(self, session: GraphSession, shapes: dict[str, tuple[int, ...]], rule: ValueRule) -> None:
        value = import_engine().OrtValue.ortvalue_from_numpy  # shares the array's memory
        arrays: dict[str, Float32] = {name: np.empty(shape, np.float32) for name, shape in shapes.items()}
        (name, self._input), *outputs = arrays.items()
        self._outputs = [output for _, output in outputs]
        self._checked, self._holds = rule.view(self._input), rule.holds
        binding = session._session.io_binding()
        binding.bind_ortvalue_input(name, value(self._input))
        for name, output in outputs:
            binding.bind_ortvalue_output(name, value(output))
        # What `InferenceSession.run_with_iobinding` calls in turn.
        self._run = partial(session._session._sess.run_with_iobinding, binding._iobinding, None)
        self._session, self._binding = session, binding

    def __call__(self, array: Float32) -> list[Float32] | None:
        """The outputs for an array of the input's shape, which belong to the caller.

        None where the rule does not hold for its values, or the engine fails: `GraphSession.run` then says what is
        wrong.
        """
        self._input[...] = array
        if not self._holds(self._checked) or self._session.inherited:
            return None
        try:
            self._run()
        except Exception:
            return None
        return [output.copy() for output in self._outputs]


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
    model: bytes, file: str, device: Device, threads: int | None, spinning: bool | None, batch: int | None
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
    if device.provider != CPU:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    provider_options = device.session_options(threads)
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
    return session


def _open_error(error: Exception, file: str, device: Device) -> BundleError | DeviceError:
    """A CPU session fails because of the graph; another device's may fail for its own reasons."""
    if device.provider == CPU or type(error).__name__ in ("InvalidGraph", "InvalidProtobuf"):
        return BundleError(f"{file} cannot be loaded by onnxruntime: {first_line(error)}")
    options = f" with the options {dict(device.options)}" if device.options else ""
    return DeviceError(f"device {device.name!r} cannot run {file}{options}: {first_line(error)}")
