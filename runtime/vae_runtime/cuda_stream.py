"""A CUDA stream of our own: copies between host and GPU in the order of the work, and one wait for all of it."""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .cuda import ContextOf, await_everyone, capturing, driver, require
from .cuda_graph import LaunchGraph
from .preprocess import Float32

_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING of cuda.h
_PORTABLE = 1  # CU_MEMHOSTREGISTER_PORTABLE: for every context
_PORTABLE_AND_MAPPED = 3  # CU_MEMHOSTALLOC_PORTABLE and _DEVICEMAP: the same, and for kernels
_of_thread = threading.local()
_idle: dict[int, list[ctypes.c_void_p]] = {}  # by GPU: streams of threads that have ended
# Memory by the address that the driver was given. Whatever interrupts, and whatever the driver refuses, it is not freed
# while the driver may hold it for registered: what comes to lie there later would be taken for it.
_registered: dict[int, object] = {}


class Stream:
    """Work on a GPU in the order in which it is given; while it is entered, this thread's copies are on it.

    Each thread has one per GPU, `Stream.of_thread(index)`, which another one gets after its end.

    handle: as onnxruntime's option `user_compute_stream` takes it. is_capturing: what it is given now is recorded, not
        done.

    Raises:
        DeviceError: the driver refuses. OutOfMemoryError: for want of memory.
    """

    def __init__(self, index: int) -> None:
        self._context = ContextOf(index)
        idle = _idle.setdefault(index, [])
        try:
            stream = idle.pop()
        except IndexError:
            stream = ctypes.c_void_p()
            with self._context:
                require(driver().cuStreamCreate(ctypes.byref(stream), _NON_BLOCKING), "make a stream")
        self._stream = stream
        # Never destroyed: a session that worked on it may be freed later.
        weakref.finalize(self, idle.append, stream).atexit = False
        self._synchronize = driver().cuStreamSynchronize
        self.is_capturing = False
        self.handle = str(stream.value)

    @classmethod
    def of_thread(cls, index: int) -> Stream:
        streams = _of_thread.__dict__.setdefault("streams", {})
        if index not in streams:
            streams[index] = cls(index)
        found: Stream = streams[index]
        return found

    def __enter__(self) -> None:
        self._context.__enter__()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is not None:  # by Ctrl-C, say: nothing that was begun outlives the memory that it is for
                self._synchronize(self._stream)
        finally:
            self._context.__exit__()

    def pinned(self, values: int) -> Float32:
        """Host memory for so many numbers that the GPU reads and writes by itself, where other memory is copied once
        more on the way. Freed with the array and all views of it."""
        address = ctypes.c_void_p()
        with self._context:
            status = driver().cuMemHostAlloc(ctypes.byref(address), ctypes.c_size_t(4 * values), _PORTABLE_AND_MAPPED)
        require(status, f"pin {4 * values} bytes of memory")
        memory = (ctypes.c_float * values).from_address(address.value or 0)
        freed = weakref.finalize(memory, _free, driver().cuMemFreeHost, self._context, address, os.getpid())
        freed.atexit = False  # the driver may be gone by then, and takes its memory with it
        return np.ctypeslib.as_array(memory)

    def register(self, pages: NDArray[np.uint8]) -> bool:
        """Let the GPU write these pages of the host's memory, a view of other memory, by itself as long as the array
        lives; False where the driver does not."""
        address = pages.ctypes.data
        _registered[address] = pages.base
        undone = weakref.finalize(pages, _unregister, driver().cuMemHostUnregister, self._context, address, os.getpid())
        undone.atexit = False
        with self._context:
            size = ctypes.c_size_t(pages.nbytes)
            status = driver().cuMemHostRegister_v2(ctypes.c_void_p(address), size, _PORTABLE)
        if status != 0:
            undone.detach()
            del _registered[address]
        return bool(status == 0)

    def address_of(self, array: Float32) -> int:
        """Where kernels on the GPU find pinned memory: nearly everywhere at its own address."""
        address = ctypes.c_uint64()
        with self._context:
            status = driver().cuMemHostGetDevicePointer_v2(ctypes.byref(address), ctypes.c_void_p(array.ctypes.data), 0)
        require(status, "show pinned memory to the GPU")
        return address.value

    def to_device(self, address: int, array: Float32) -> Callable[[], None]:
        """What begins a copy from pinned memory to an address on the GPU."""
        copy = driver().cuMemcpyHtoDAsync_v2
        return self._begin(copy, ctypes.c_uint64(address), ctypes.c_void_p(array.ctypes.data), array.nbytes)

    def to_host(self, array: Float32, address: int) -> Callable[[], None]:
        """The same from the GPU."""
        copy = driver().cuMemcpyDtoHAsync_v2
        return self._begin(copy, ctypes.c_void_p(array.ctypes.data), ctypes.c_uint64(address), array.nbytes)

    def on_device(self, target: int, source: int, size: int) -> Callable[[], None]:
        """The same from one address on the GPU to another, of so many bytes."""
        return self._begin(driver().cuMemcpyDtoDAsync_v2, ctypes.c_uint64(target), ctypes.c_uint64(source), size)

    def from_anywhere(self, target: int, size: int) -> Callable[[int], None]:
        """The same from an address that is given each time."""
        source = ctypes.c_uint64()
        return _at(source, self._begin(driver().cuMemcpyDtoDAsync_v2, ctypes.c_uint64(target), source, size))

    def to_anywhere(self, source: int, size: int) -> Callable[[int], None]:
        """The same to an address that is given each time."""
        target = ctypes.c_uint64()
        return _at(target, self._begin(driver().cuMemcpyDtoDAsync_v2, target, ctypes.c_uint64(source), size))

    def capture(self, steps: Sequence[Callable[[], object]], host: Sequence[Float32]) -> LaunchGraph:
        """What the steps give this stream, which is entered and has nothing to do, as one launch; none of it is done
        yet. host: the arrays in host memory that they copy from or to. Raises as `LaunchGraph`."""
        places = [range(array.ctypes.data, array.ctypes.data + array.nbytes) for array in host]
        with capturing:
            self.is_capturing = True
            try:
                return LaunchGraph(self._context, self._stream, steps, places)
            finally:
                self.is_capturing = False

    def wait(self) -> None:
        """Until all that was begun is done."""
        require(self._synchronize(self._stream), "finish its work")

    def _begin(self, copy: Callable[..., int], target: Any, source: Any, size: int) -> Callable[[], None]:
        call = partial(copy, target, source, ctypes.c_size_t(size), self._stream)
        return lambda: require(call(), "begin a copy")


def _at(place: ctypes.c_uint64, copy: Callable[[], None]) -> Callable[[int], None]:
    def begin(address: int) -> None:
        place.value = address  # read when the copy is begun, not when it is done
        copy()

    return begin


def _unregister(undo: Callable[[Any], int], context: ContextOf, address: int, process: int) -> None:
    if os.getpid() == process:
        await_everyone()  # the application's copies from there may be under way
        with context:
            status = undo(ctypes.c_void_p(address))
        if status == 0:
            _registered.pop(address, None)


def _free(free: Callable[[Any], int], context: ContextOf, address: ctypes.c_void_p, process: int) -> None:
    if os.getpid() == process:  # a forked child has neither the context nor, for the GPU, the memory
        with context:
            free(address)
