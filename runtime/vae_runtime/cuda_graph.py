"""Copies and kernels that a stream was given once, launched as one ever after: a CUDA graph of our own.

From NVIDIA's CUDA Driver API, "Graph Management" and "Stream Management".
"""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from .cuda import ContextOf, driver, require
from .errors import DeviceError

_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED: other threads, and memory for work in between, are no concern of it
# Of CUgraphNodeType in cuda.h: kernel, memcpy, memset, empty, memory allocation, memory free. A call of the host, or a
# wait for another stream, was meant for the captured run alone.
_REPEATABLE = {0, 1, 2, 5, 10, 11}
_COPY = 1
_HOST, _DEVICE, _UNIFIED = 1, 2, 4  # of CUmemorytype
_MEMORY_TYPE = 2  # CU_POINTER_ATTRIBUTE_MEMORY_TYPE


class _Copy(ctypes.Structure):
    """CUDA_MEMCPY3D of cuda.h."""

    _fields_ = [
        *((f"{side}{name}", kind)
          for side in ("source", "target")
          for name, kind in (
              ("_x", ctypes.c_size_t), ("_y", ctypes.c_size_t), ("_z", ctypes.c_size_t), ("_lod", ctypes.c_size_t),
              ("_type", ctypes.c_int), ("_host", ctypes.c_void_p), ("_device", ctypes.c_void_p),
              ("_array", ctypes.c_void_p), ("_reserved", ctypes.c_void_p),
              ("_pitch", ctypes.c_size_t), ("_height", ctypes.c_size_t),
          )),
        ("width", ctypes.c_size_t), ("height", ctypes.c_size_t), ("depth", ctypes.c_size_t),
    ]  # fmt: skip


class LaunchGraph:
    """One launch of all that `steps` give `stream`. Made in the stream's own thread, within its context.

    The memory that they name has to outlive it. host: the addresses of host memory that may be copied from or to; what
    lies elsewhere may be gone, or another's, at the next launch.

    Raises:
        DeviceError: a step does what cannot be captured or repeated, or fails. OutOfMemoryError: for want of memory.
    """

    def __init__(
        self, context: ContextOf, stream: ctypes.c_void_p, steps: Sequence[Callable[[], object]], host: Sequence[range]
    ) -> None:
        graph, executable, cuda = ctypes.c_void_p(), ctypes.c_void_p(), driver()
        try:
            require(cuda.cuStreamBeginCapture_v2(stream, _RELAXED), "record what a stream is given")
            for step in steps:
                step()
        except BaseException:
            cuda.cuStreamEndCapture(stream, ctypes.byref(graph))
            if graph:
                cuda.cuGraphDestroy(graph)
            raise
        require(cuda.cuStreamEndCapture(stream, ctypes.byref(graph)), "record what a stream is given")
        self._graph, self._executable, self._context, self._stream = graph, executable, context, stream
        freed = weakref.finalize(self, _free, cuda, context, executable, graph, os.getpid())
        freed.atexit = False  # the driver may be gone by then, and takes it along
        self._launch = cuda.cuGraphLaunch
        _require_repeatable(graph, host)
        status = cuda.cuGraphInstantiateWithFlags(ctypes.byref(executable), graph, ctypes.c_ulonglong(0))
        require(status, "make a CUDA graph")

    def launch(self) -> None:
        """Begin all of it, in the stream's order."""
        if (status := self._launch(self._executable, self._stream)) != 0:
            require(status, "launch a graph")

    def copy(self, source: int, target: int, moves: str) -> MovableCopy:
        """That one of its copies, of which one side is to move: "source" or "target". Raises `DeviceError` where there
        is none."""
        for node in _nodes(self._graph):
            if _kind(node) == _COPY:
                copy = _parameters(node)
                if (copy.source_device, copy.target_device) == (source, target):
                    return MovableCopy(self._executable, self._context, node, copy, f"{moves}_device")
        raise DeviceError(f"no copy from {source:#x} to {target:#x} was recorded")


class MovableCopy:
    """A copy on the GPU in a graph that lasts at least as long: where it begins or ends in the launches to come."""

    def __init__(
        self, executable: ctypes.c_void_p, context: ContextOf, node: ctypes.c_void_p, copy: _Copy, side: str
    ) -> None:
        self._copy, self._side, self._address = copy, side, getattr(copy, side)
        set_parameters = driver().cuGraphExecMemcpyNodeSetParams
        self._set = partial(set_parameters, executable, node, ctypes.byref(copy), context.handle)

    def move_to(self, address: int) -> None:
        """An address on the GPU. Raises `DeviceError` where the driver does not move it."""
        if self._address != address:
            self._address = None  # until it is there
            setattr(self._copy, self._side, address)
            require(self._set(), "move a copy")
            self._address = address


def _require_repeatable(graph: ctypes.c_void_p, host: Sequence[range]) -> None:
    for node in _nodes(graph):
        kind = _kind(node)
        if kind not in _REPEATABLE:
            raise DeviceError(f"what the stream is given has a step of kind {kind}, which is for one run alone")
        if kind != _COPY:
            continue
        copy = _parameters(node)
        for side in ("source", "target"):
            address = _host_address(*(getattr(copy, f"{side}_{name}") for name in ("type", "host", "device")))
            if address is not None and not any(address in memory for memory in host):
                raise DeviceError("what the stream is given copies host memory that may be gone at the next launch")


def _kind(node: ctypes.c_void_p) -> int:
    kind = ctypes.c_int()
    require(driver().cuGraphNodeGetType(node, ctypes.byref(kind)), "describe a graph")
    return kind.value


def _parameters(node: ctypes.c_void_p) -> _Copy:
    copy = _Copy()
    require(driver().cuGraphMemcpyNodeGetParams(node, ctypes.byref(copy)), "describe a graph")
    return copy


def _nodes(graph: ctypes.c_void_p) -> Iterator[ctypes.c_void_p]:
    count = ctypes.c_size_t()
    require(driver().cuGraphGetNodes(graph, None, ctypes.byref(count)), "describe a graph")
    if not count.value:  # the driver takes no room for none
        return
    nodes = (ctypes.c_void_p * count.value)()
    require(driver().cuGraphGetNodes(graph, nodes, ctypes.byref(count)), "describe a graph")
    yield from map(ctypes.c_void_p, nodes)


def _host_address(kind: int, host: int | None, device: int | None) -> int | None:
    """Where one side of a copy lies, None if on a GPU."""
    if kind == _UNIFIED:  # the driver tells by the address
        found = ctypes.c_uint()
        status = driver().cuPointerGetAttribute(ctypes.byref(found), _MEMORY_TYPE, ctypes.c_uint64(device or 0))
        kind, host = (found.value if status == 0 else _HOST), device
    return None if kind == _DEVICE else host or 0


def _free(cuda: Any, context: ContextOf, executable: ctypes.c_void_p, graph: ctypes.c_void_p, process: int) -> None:
    if os.getpid() == process:  # a forked child has no context
        with context:
            if executable:  # it was made
                cuda.cuGraphExecDestroy(executable)
            cuda.cuGraphDestroy(graph)
