"""A stream of our own and calls on it: with a driver of host memory, which does all work as late as CUDA may."""

from __future__ import annotations

import ctypes
import gc
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from vae_runtime import VAE, DeviceError, InputError, OutOfMemoryError, cuda, cuda_graph, cuda_stream, device_call
from vae_runtime.cuda_graph import LaunchGraph
from vae_runtime.cuda_stream import Stream
from vae_runtime.device_array import copy_to_device
from vae_runtime.device_call import CapturedCall, DeviceCall, StagedCall
from vae_runtime.devices import CPU, Device
from vae_runtime.preprocess import UNIT_INTERVAL
from vae_runtime.result_memory import ResultMemory
from vae_runtime.session import GraphSession

CONTEXT = 1000  # of the only GPU


class Node(NamedTuple):
    """Of a graph. source, target, size: of a copy."""

    run: Callable[[], Any] | None
    kind: int = 0
    source: int = 0
    target: int = 0
    size: int = 0

    def work(self) -> None:
        if self.run is None:
            ctypes.memmove(self.target, self.source, self.size)
        else:
            self.run()


class Driver:
    """libcuda as far as a stream needs it. A copy is done when the stream is waited for, as late as CUDA allows, or at
    once, `is_early`."""

    def __init__(self) -> None:
        self.is_early = False
        self.stack: list[int | None] = []
        self.waiting: list[Callable[[], Any]] = []
        self.pinned: dict[int, Any] = {}
        self.registered: dict[int, int] = {}  # address -> bytes
        self.made = 0  # streams
        self.used = {0}  # GPUs, by this process
        self.waited_for: list[int] = []  # GPUs as a whole
        self.captured: list[Node] | None = None
        self.graphs: list[list[Node]] = []  # by handle, from 1
        self.alive: set[int] = set()  # graphs that can be launched
        self.kept: set[int] = set()  # graphs
        self.launched: list[int] = []
        self.status: dict[str, int] = {}  # what a call returns, where it is not 0

    def __getattr__(self, name: str) -> Callable[..., int]:
        def call(*arguments: Any) -> int:
            anywhere = ("cuCtxPushCurrent_v2", "cuDeviceGet", "cuDevicePrimaryCtx", "cuGetErrorString")
            if not name.startswith(anywhere):
                assert self.stack, f"{name} without a context"
            if (status := self.status.get(name, 0)) == 0 or name == "cuStreamEndCapture":  # which ends it in any case
                getattr(self, f"do_{name}")(*arguments)
            return status

        return call

    def do_cuGetErrorString(self, status: int, text: Any) -> None:
        text._obj.value = None  # as of an error that it does not know

    def do_cuDeviceGet(self, device: Any, index: int) -> None:
        device._obj.value = index

    def do_cuDevicePrimaryCtxRetain(self, context: Any, device: ctypes.c_int) -> None:
        context._obj.value = CONTEXT + device.value

    def do_cuDevicePrimaryCtxGetState(self, device: ctypes.c_int, flags: Any, is_used: Any) -> None:
        is_used._obj.value = device.value in self.used

    def do_cuCtxPushCurrent_v2(self, context: ctypes.c_void_p) -> None:
        self.stack.append(context.value)

    def do_cuCtxPopCurrent_v2(self, context: Any) -> None:
        self.stack.pop()

    def do_cuThreadExchangeStreamCaptureMode(self, mode: Any) -> None:
        pass

    def do_cuStreamCreate(self, stream: Any, flags: int) -> None:
        assert flags == 1
        stream._obj.value = 77
        self.made += 1

    def do_cuMemHostAlloc(self, address: Any, size: ctypes.c_size_t, flags: int) -> None:
        assert flags & 2, "kernels may not write to it"
        memory = ctypes.create_string_buffer(size.value)
        address._obj.value = ctypes.addressof(memory)
        self.pinned[ctypes.addressof(memory)] = memory

    def do_cuMemFreeHost(self, address: ctypes.c_void_p) -> None:
        del self.pinned[address.value or 0]

    def do_cuMemHostRegister_v2(self, address: ctypes.c_void_p, size: ctypes.c_size_t, flags: int) -> None:
        assert ((address.value or 1) % 4096, size.value % 4096, flags) == (0, 0, 1)
        self.registered[address.value or 0] = size.value

    def do_cuMemHostUnregister(self, address: ctypes.c_void_p) -> None:
        del self.registered[address.value or 0]

    def copy(self, target: Any, source: Any, size: ctypes.c_size_t, stream: ctypes.c_void_p) -> None:
        assert stream.value == 77
        self.give(Node(None, 1, source.value or 0, target.value, size.value))

    do_cuMemcpyHtoDAsync_v2 = do_cuMemcpyDtoHAsync_v2 = do_cuMemcpyDtoDAsync_v2 = copy

    def give(self, node: Node) -> None:
        """To the stream, or to the graph that it is capturing."""
        if self.captured is not None:
            self.captured.append(node)
        else:
            self.begin([node])

    def begin(self, nodes: list[Node]) -> None:
        for node in nodes:
            if self.is_early:
                node.work()
            else:
                self.waiting.append(node.work)

    def do_cuMemHostGetDevicePointer_v2(self, address: Any, pinned: ctypes.c_void_p, flags: int) -> None:
        assert pinned.value in self.pinned
        address._obj.value = pinned.value

    def do_cuStreamBeginCapture_v2(self, stream: ctypes.c_void_p, mode: int) -> None:
        assert (stream.value, mode, self.waiting) == (77, 2, [])
        self.captured = []

    def do_cuStreamEndCapture(self, stream: ctypes.c_void_p, graph: Any) -> None:
        if self.captured is None:  # on a GPU an error
            return
        self.graphs.append(self.captured)
        self.captured, graph._obj.value = None, len(self.graphs)
        self.kept.add(len(self.graphs))

    def do_cuGraphGetNodes(self, graph: ctypes.c_void_p, nodes: Any, count: Any) -> None:
        found = self.graphs[(graph.value or 0) - 1]
        count._obj.value = len(found)
        for index in range(len(found) if nodes is not None else 0):
            nodes[index] = 1000 * (graph.value or 0) + index

    def node(self, handle: ctypes.c_void_p) -> Node:
        return self.graphs[(handle.value or 0) // 1000 - 1][(handle.value or 0) % 1000]

    def do_cuGraphNodeGetType(self, node: ctypes.c_void_p, kind: Any) -> None:
        kind._obj.value = self.node(node).kind

    def do_cuGraphMemcpyNodeGetParams(self, node: ctypes.c_void_p, copy: Any) -> None:
        copy._obj.source_type = copy._obj.target_type = 4
        copy._obj.source_device, copy._obj.target_device, copy._obj.width = self.node(node)[2:]
        copy._obj.height = copy._obj.depth = 1

    def do_cuPointerGetAttribute(self, found: Any, attribute: int, address: ctypes.c_uint64) -> None:
        assert attribute == 2
        pinned = any(start <= address.value < start + len(memory) for start, memory in self.pinned.items())
        found._obj.value = 1 if pinned else 2

    def do_cuGraphInstantiateWithFlags(self, executable: Any, graph: ctypes.c_void_p, flags: Any) -> None:
        executable._obj.value = graph.value
        self.alive.add(graph.value or 0)

    def do_cuGraphDestroy(self, graph: ctypes.c_void_p) -> None:
        self.kept.remove(graph.value or 0)

    def do_cuGraphLaunch(self, executable: ctypes.c_void_p, stream: ctypes.c_void_p) -> None:
        assert executable.value in self.alive
        self.launched.append(executable.value)
        self.begin(self.graphs[executable.value - 1])

    def do_cuGraphExecMemcpyNodeSetParams(
        self, executable: ctypes.c_void_p, node: ctypes.c_void_p, copy: Any, context: ctypes.c_void_p
    ) -> None:
        assert ((node.value or 0) // 1000, context.value) == (executable.value, CONTEXT)
        found = copy._obj
        assert (found.source_type, found.target_type, found.width) == (4, 4, self.node(node).size)
        assert (found.height, found.depth) == (1, 1)
        index = (node.value or 0) % 1000
        moved = self.node(node)._replace(source=copy._obj.source_device, target=copy._obj.target_device)
        self.graphs[(executable.value or 0) - 1][index] = moved

    def do_cuGraphExecDestroy(self, executable: ctypes.c_void_p) -> None:
        self.alive.remove(executable.value or 0)

    def do_cuCtxSynchronize(self) -> None:
        Driver.finish(self)  # whatever a test has put in its place
        self.waited_for.append((self.stack[-1] or 0) - CONTEXT)

    def do_cuStreamSynchronize(self, stream: ctypes.c_void_p) -> None:
        self.finish()

    def finish(self) -> None:
        waiting, self.waiting = self.waiting, []
        for work in waiting:
            work()


@pytest.fixture
def driver(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    found = Driver()
    with pytest.MonkeyPatch.context() as patch:
        for module in (cuda, cuda_stream, cuda_graph):
            patch.setattr(module, "driver", lambda: found)
        patch.setattr(cuda, "find_gpus", lambda: ((None, None, None), None))
        patch.setattr(cuda, "_of_thread", threading.local())  # what this one is told, a real one is not
        patch.setattr(cuda_stream, "_of_thread", threading.local())
        patch.setattr(cuda_stream, "_registered", {})
        patch.setattr(cuda_stream, "_idle", {})
        cuda._primary_context.cache_clear()
        yield found
        monkeypatch.undo()  # what holds pinned memory, whose end tells the driver of this thread
        request.node.funcargs.clear()
        gc.collect()
        cuda._primary_context.cache_clear()


def test_copies_are_in_order_and_done_after_the_wait(driver: Driver) -> None:
    stream = Stream.of_thread(0)
    assert (stream.handle, Stream.of_thread(0)) == ("77", stream)
    there = np.zeros(3, np.float32)
    given, found = stream.pinned(3), stream.pinned(3)
    send, fetch = stream.to_device(there.ctypes.data, given), stream.to_host(found, there.ctypes.data)
    for round_ in (1, 2):
        given[:] = [round_, 2 * round_, 3 * round_]
        with stream:
            assert driver.stack == [CONTEXT]
            send()
            fetch()
            assert not np.array_equal(found, given)
            stream.wait()
        np.testing.assert_array_equal(found, given)
    assert driver.stack == []


def test_what_is_interrupted_is_finished(driver: Driver) -> None:
    """So that nothing is written later into memory that is another's by then."""
    stream, there = Stream(0), np.ones(3, np.float32)
    found = stream.pinned(3)
    fetch = stream.to_host(found, there.ctypes.data)

    def interrupted() -> None:
        with stream:
            fetch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (driver.waiting, driver.stack) == ([], [])
    assert found.tolist() == [1, 1, 1]


def test_pinned_memory_is_freed_with_the_last_view_of_it(driver: Driver) -> None:
    array = Stream(0).pinned(6)
    view = array.reshape(2, 3)[1]
    del array
    gc.collect()
    assert len(driver.pinned) == 1
    view[:] = 5
    del view
    gc.collect()
    assert driver.pinned == {}
    assert driver.stack == []


def test_a_forked_process_frees_nothing(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    array = Stream(0).pinned(6)
    monkeypatch.setattr(os, "getpid", lambda: -1)
    del array
    gc.collect()
    assert len(driver.pinned) == 1


@pytest.mark.parametrize(
    ("call", "work", "message"),
    [
        ("cuStreamCreate", lambda: Stream(0), r"could not make a stream \(CUDA error 700\)"),
        ("cuMemHostAlloc", lambda: Stream(0).pinned(4), r"could not pin 16 bytes of memory \(CUDA error 700\)"),
        ("cuCtxPushCurrent_v2", lambda: Stream(0), r"GPU 0 cannot be used in this thread \(CUDA error 700\)"),
    ],
)
def test_what_the_driver_refuses_is_told(driver: Driver, call: str, work: Any, message: str) -> None:
    driver.status[call] = 700
    with pytest.raises(DeviceError, match=message):
        work()
    assert driver.stack == []


def test_errors_of_copies_and_of_the_work_are_told(driver: Driver) -> None:
    stream = Stream(0)
    memory, there = stream.pinned(2), np.zeros(2, np.float32)
    for call, begin in (
        ("cuMemcpyHtoDAsync_v2", stream.to_device(there.ctypes.data, memory)),
        ("cuMemcpyDtoHAsync_v2", stream.to_host(memory, there.ctypes.data)),
        ("cuMemcpyDtoDAsync_v2", stream.on_device(there.ctypes.data, there.ctypes.data, 4)),
        ("cuStreamSynchronize", stream.wait),
    ):
        driver.status[call] = 719
        with pytest.raises(DeviceError, match=r"could not .* \(CUDA error 719\)"), stream:
            begin()
    driver.status["cuMemHostAlloc"] = 2
    with pytest.raises(OutOfMemoryError, match="could not pin 32 bytes of memory: there is none left"):
        stream.pinned(8)


def test_threads_take_the_streams_of_those_that_have_ended(driver: Driver) -> None:
    kept: list[Stream] = []
    for count, keeps in ((1, False), (1, True), (2, False), (2, False)):  # made so far
        with ThreadPoolExecutor(1) as pool:
            found = pool.submit(Stream.of_thread, 0).result()
        kept += [found] * keeps  # as a session does that works on it
        del found
        assert driver.made == count


# --- graphs of launches ---


def capture(stream: Stream, *steps: Callable[[], Any], host: tuple[np.ndarray, ...] = ()) -> LaunchGraph:
    with stream:
        return stream.capture(steps, host)


def test_what_was_captured_is_done_at_every_launch(driver: Driver) -> None:
    stream, there = Stream(0), np.zeros(2, np.float32)
    given, found = stream.pinned(2), stream.pinned(2)
    steps = stream.to_device(there.ctypes.data, given), stream.to_host(found, there.ctypes.data)
    graph = capture(stream, *steps, host=(given, found))
    for value in (3, 4):
        given[:] = value
        assert not (found == value).any()
        with stream:
            graph.launch()
            stream.wait()
        assert found.tolist() == [value, value]
    assert driver.alive == {1}
    del graph
    gc.collect()
    assert (driver.alive, driver.kept, driver.stack) == (set(), set(), [])


def test_a_part_of_the_memory_that_may_be_copied_may_be_copied_too(driver: Driver) -> None:
    stream, there = Stream(0), np.zeros(2, np.float32)
    found = stream.pinned(6)
    capture(stream, stream.to_host(found[4:], there.ctypes.data), host=(found,))


@pytest.mark.parametrize("kind", [3, 6])  # calls of the host, waits for events
def test_what_is_for_one_run_alone_is_not_captured(driver: Driver, kind: int) -> None:
    with pytest.raises(DeviceError, match=f"has a step of kind {kind}, which is for one run alone"):
        capture(Stream(0), lambda: driver.give(Node(lambda: None, kind)))
    gc.collect()
    assert (driver.alive, driver.kept, driver.captured, driver.stack) == (set(), set(), None, [])


def test_copies_of_memory_that_may_be_gone_are_not_captured(driver: Driver) -> None:
    stream, there = Stream(0), np.zeros(2, np.float32)
    mine, other = stream.pinned(2), stream.pinned(2)
    for step in (stream.to_device(there.ctypes.data, other), stream.to_host(other, there.ctypes.data)):
        with pytest.raises(DeviceError, match="copies host memory that may be gone at the next launch"):
            capture(stream, step, host=(mine,))
    driver.status["cuPointerGetAttribute"] = 1  # memory that the driver does not know
    with pytest.raises(DeviceError, match="copies host memory"):
        capture(stream, stream.on_device(there.ctypes.data, there.ctypes.data, 4))


@pytest.mark.parametrize(
    ("call", "status", "error", "message"),
    [
        ("cuStreamBeginCapture_v2", 900, DeviceError, r"could not record what a stream is given \(CUDA error 900\)"),
        ("cuStreamEndCapture", 901, DeviceError, r"could not record what a stream is given \(CUDA error 901\)"),
        ("cuGraphGetNodes", 1, DeviceError, r"could not describe a graph \(CUDA error 1\)"),
        ("cuGraphInstantiateWithFlags", 2, OutOfMemoryError, "could not make a CUDA graph: there is none left"),
    ],
)
def test_what_the_driver_does_not_capture_is_told(
    driver: Driver, call: str, status: int, error: type[Exception], message: str
) -> None:
    stream = Stream(0)
    driver.status[call] = status
    with pytest.raises(error, match=message):
        capture(stream, lambda: None)
    driver.status.clear()
    graph = capture(stream, lambda: None)
    driver.status["cuGraphLaunch"] = 719
    with pytest.raises(DeviceError, match=r"could not launch a graph \(CUDA error 719\)"), stream:
        graph.launch()


def test_a_copy_is_moved_where_its_address_is_another_one(driver: Driver) -> None:
    """After a move that failed, any."""
    stream, target = Stream(0), np.zeros(1, np.float32)
    sources = [np.full(1, value, np.float32) for value in (1, 2)]
    first, second = (one.ctypes.data for one in sources)
    graph = capture(stream, stream.on_device(target.ctypes.data, first, 4))
    with stream:
        copy = graph.copy(first, target.ctypes.data, "source")
    moves: list[int] = []
    real = driver.do_cuGraphExecMemcpyNodeSetParams
    driver.do_cuGraphExecMemcpyNodeSetParams = lambda *a: (moves.append(1), real(*a))[1]  # type: ignore[method-assign]
    driver.status["cuGraphExecMemcpyNodeSetParams"] = 1
    with pytest.raises(DeviceError, match=r"could not move a copy \(CUDA error 1\)"), stream:
        copy.move_to(second)
    driver.status.clear()
    for address, value in ((first, 1), (first, 1), (second, 2), (first, 1)):
        with stream:
            copy.move_to(address)
            graph.launch()
            stream.wait()
        assert target[0] == value
    assert len(moves) == 3
    with pytest.raises(DeviceError, match="no copy from 0x1 to 0x2 was recorded"), stream:
        graph.copy(1, 2, "source")


def test_ctrl_c_ends_the_capture_wherever_it_comes(driver: Driver) -> None:
    """Also right after it was begun: a stream that goes on capturing would be of no use to anybody."""
    stream, begin = Stream(0), driver.do_cuStreamBeginCapture_v2

    def interrupted(*arguments: Any) -> None:
        begin(*arguments)
        raise KeyboardInterrupt

    driver.do_cuStreamBeginCapture_v2 = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        capture(stream, lambda: None)
    assert (driver.captured, driver.kept, driver.stack, stream.is_capturing) == (None, set(), [], False)


def test_a_step_that_fails_ends_the_capture(driver: Driver) -> None:
    with pytest.raises(ZeroDivisionError):
        capture(Stream(0), lambda: 1 // 0)
    assert (driver.captured, driver.kept, driver.stack) == (None, set(), [])


# --- memory for large results ---


@pytest.mark.parametrize("values", [1, 1024, 1025])
def test_memory_for_results_is_used_again_when_the_last_view_is_gone(driver: Driver, values: int) -> None:
    memory = ResultMemory(Stream(0), values)
    first = memory.take()
    assert first is not None
    assert (first.shape, first.dtype, first.flags.writeable) == ((values,), np.float32, True)
    assert driver.registered == {first.ctypes.data: -(-4 * values // 4096) * 4096}
    address, view = first.ctypes.data, first[:1].reshape(1, 1)
    del first
    second = memory.take()
    assert second is not None
    assert second.ctypes.data != address  # the view has it
    assert driver.waited_for == []
    driver.used.add(2)  # by torch, say, whose copies there may read the memory too
    del view
    third = memory.take()
    assert third is not None
    assert third.ctypes.data == address
    assert driver.waited_for == [0, 2]
    assert len(driver.registered) == 2
    del second
    third = memory = None
    gc.collect()
    assert (driver.registered, driver.waited_for) == ({}, [0, 2] * 3)  # before the driver forgets each


def test_memory_that_may_be_in_use_by_others_is_not_used_again(driver: Driver) -> None:
    """By a copy of the caller's: where nobody can wait for it, as while a CUDA graph is captured."""
    memory = ResultMemory(Stream(0), 10)
    first = memory.take()
    assert first is not None
    address = first.ctypes.data
    del first
    with ThreadPoolExecutor(1) as pool, cuda.capturing:
        assert pool.submit(memory.take).result() is None
    driver.status["cuCtxSynchronize"] = 900
    assert memory.take() is None
    driver.status.clear()
    again = memory.take()
    assert again is not None
    assert again.ctypes.data == address


def test_who_keeps_many_results_gets_ordinary_memory(driver: Driver) -> None:
    memory = ResultMemory(Stream(0), 10)
    kept = [memory.take() for _ in range(4)]
    assert [one is None for one in kept] == [False, False, False, True]
    assert len(driver.registered) == 3
    kept.clear()
    assert memory.take() is not None
    driver.status["cuMemHostRegister_v2"] = 712
    refused = ResultMemory(Stream(0), 10)
    assert refused.take() is None
    driver.status.clear()
    assert refused.take() is None  # it is not tried again in each call
    assert driver.registered.keys() == cuda_stream._registered.keys()


def test_memory_for_results_lasts_as_long_as_the_result(driver: Driver) -> None:
    memory = ResultMemory(Stream(0), 10)
    kept, other = memory.take(), memory.take()
    assert kept is not None
    del other
    address = kept.ctypes.data
    kept[:] = 7
    del memory
    gc.collect()
    assert driver.registered.keys() == {address}
    assert kept.tolist() == [7] * 10
    del kept
    gc.collect()
    assert (driver.registered, driver.stack) == ({}, [])


def test_memory_that_is_registered_is_not_freed_whatever_interrupts(driver: Driver) -> None:
    """What comes to lie there later would be taken for it."""
    memory, real = ResultMemory(Stream(0), 10), driver.do_cuMemHostRegister_v2

    def interrupted(*arguments: Any) -> None:
        real(*arguments)
        raise KeyboardInterrupt

    driver.do_cuMemHostRegister_v2 = interrupted  # type: ignore[method-assign]
    driver.status["cuMemHostUnregister"] = 900  # within a capture of the caller's, say
    with pytest.raises(KeyboardInterrupt):
        memory.take()
    gc.collect()
    driver.do_cuMemHostRegister_v2 = real  # type: ignore[method-assign]
    assert driver.registered.keys() == cuda_stream._registered.keys()
    assert len(driver.registered) == 1
    driver.status.clear()
    kept = [memory.take() for _ in range(3)]
    assert all(one is not None for one in kept)  # what the interrupt cost does not count
    del kept
    memory._idle.clear()  # nor what another interrupt may lose
    again = [memory.take() for _ in range(3)]
    assert all(one is not None for one in again)
    del memory, again
    gc.collect()
    assert len(driver.registered) == 1
    assert driver.registered.keys() == cuda_stream._registered.keys()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_after_a_fork_the_gpu_writes_nothing_that_the_child_has(driver: Driver) -> None:
    memory = ResultMemory(Stream(0), 10)
    kept, other = memory.take(), memory.take()
    assert kept is not None
    kept[:] = 7
    del other  # may be used again, but for the fork
    if (child := os.fork()) == 0:
        try:
            is_well = kept.tolist() == [7] * 10 and len(driver.registered) == 2
            del kept
            gc.collect()
            os._exit(0 if is_well and len(driver.registered) == 2 else 1)  # and nothing was asked of the driver
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    made: list[int] = []
    real = driver.do_cuMemHostRegister_v2
    driver.do_cuMemHostRegister_v2 = lambda *a: (made.append(1), real(*a))[1]  # type: ignore[method-assign]
    again = [memory.take()]
    del kept  # only now
    again += [memory.take() for _ in range(2)]
    assert all(one is not None for one in again)
    assert (len(made), len(driver.registered)) == (3, 3)


# --- calls on a stream, with "the device's memory" in that of the CPU -------------------------------------------------


WAYS = (
    *("staged", "staged large", "captured", "captured large", "zero_copy", "zero_copy large"),
    *("staged at once", "captured at once", "captured large at once"),  # a GPU may be as quick
)
only_large = pytest.mark.parametrize("halves", [way for way in WAYS if "large" in way], indirect=True)
only_captured = pytest.mark.parametrize("halves", [way for way in WAYS if "staged" not in way], indirect=True)
LARGE = 100  # numbers, where images are large: they have 3 * 64, the encoder's outputs and latents fewer


@pytest.fixture(params=WAYS)
def halves(
    request: pytest.FixtureRequest, driver: Driver, tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[StagedCall, StagedCall]:
    """Both halves for 3 examples. Their sessions' work is done when the stream is waited for, like the copies."""
    way, driver.is_early = request.param.split(" ")[0], "at once" in request.param
    real, kind = GraphSession.bound_run, StagedCall if way == "staged" else CapturedCall
    if "large" in request.param:
        monkeypatch.setattr(device_call, "_LARGE", LARGE)

    def bound_run(self: GraphSession, binding: Any, waits: bool = True) -> Callable[[], None]:
        run = real(self, binding)
        return run if waits else lambda: driver.give(Node(run))

    monkeypatch.setattr(GraphSession, "bound_run", bound_run)
    vae, stream = VAE.load(tiny_path), Stream.of_thread(0)
    calls: list[StagedCall] = []
    for half, shape in zip(vae._open_operations(), ((3, 1, 8, 8), (3, 4)), strict=True):
        session = half.routes[0].any_batch
        session.fixed = shape
        calls.append(kind(session, session._shapes(shape), stream))
        calls[-1].hold_to(half._rule)
        if way == "zero_copy" and isinstance(calls[-1], CapturedCall) and calls[-1]._found.size:
            calls[-1].begin = calls[-1].begin_zero_copy(session)
            assert np.isnan(calls[-1]._found).all()  # what the launch does not write would not look right
    return calls[0], calls[1]


def test_staged_calls_give_the_same(
    halves: tuple[StagedCall, StagedCall], driver: Driver, tiny: VAE, images: np.ndarray
) -> None:
    encoder, decoder = halves
    assert bool(driver.graphs) == isinstance(encoder, CapturedCall)
    for start in (0, 3, 6):
        x = images[start : start + 3]
        expected = tiny.encode(x)
        mean, logvar = encoder(x) or []
        np.testing.assert_array_equal(mean, expected.mean)
        np.testing.assert_array_equal(logvar, expected.logvar)
        (image,) = decoder(expected.mean) or []
        np.testing.assert_array_equal(image, tiny.decode(expected.mean))
        pixels = np.round(x[:, 0].transpose(0, 2, 1) * 255).astype(np.uint8).transpose(0, 2, 1)  # not contiguous
        mean, _ = encoder(pixels[:, None]) or []
        np.testing.assert_array_equal(mean, tiny.encode(pixels).mean)


@only_large
def test_what_is_large_is_copied_from_and_to_the_caller_s_memory(
    halves: tuple[StagedCall, StagedCall], driver: Driver, tiny: VAE, images: np.ndarray
) -> None:
    """And looked at while the GPU is at work."""
    encoder, decoder = halves
    copies: list[tuple[int, int]] = []
    real, waiting = driver.give, []

    def give(node: Node) -> None:
        copies.append((node.source, node.target))
        real(node)

    driver.give = give  # type: ignore[method-assign]
    encoder.hold_to(UNIT_INTERVAL._replace(holds=lambda bits: (waiting.append(len(driver.waiting)), True)[1]))
    mean, _ = encoder(images[:3]) or []
    assert driver.is_early or waiting[0] >= 2  # the copy there and the work, at least
    assert copies[0] == (images.ctypes.data, encoder._input.data_ptr())
    (found,) = decoder(mean) or []
    assert copies[-1] == (decoder._outputs.data_ptr(), found.ctypes.data)
    assert found.ctypes.data in driver.registered
    np.testing.assert_array_equal(found, tiny.reconstruct(images[:3]))
    kept = [found, *(decoder.run(mean)[0] for _ in range(3))]
    assert [one.ctypes.data in driver.registered for one in kept] == [True, True, True, False]
    assert all(np.array_equal(one, found) for one in kept)
    found = encoder.then(decoder, images[:3])
    assert copies[-1] == (decoder._outputs.data_ptr(), found.ctypes.data)
    if isinstance(decoder, CapturedCall):
        with pytest.raises(DeviceError, match="its outputs are large"):
            decoder.begin_zero_copy(decoder)


def test_staged_results_belong_to_the_caller(halves: tuple[StagedCall, StagedCall], images: np.ndarray) -> None:
    encoder, _ = halves
    first = encoder.run(images[:3])
    kept = [array.copy() for array in first]
    second = encoder.run(images[3:6])
    assert not any(np.shares_memory(one, other) for one in first for other in second)
    np.testing.assert_array_equal(first, kept)


def test_staged_inputs_are_checked(halves: tuple[StagedCall, StagedCall], images: np.ndarray) -> None:
    wrong = images[:3].copy()
    wrong[2, 0, 7, 7] = np.nan
    assert halves[0](wrong) is None
    strided = np.repeat(images[:3], 2, axis=0)[::2]
    np.testing.assert_array_equal((halves[0](strided) or [])[0], halves[0].run(images[:3])[0])


def test_latents_stay_on_the_device(
    halves: tuple[StagedCall, StagedCall], driver: Driver, tiny: VAE, images: np.ndarray
) -> None:
    """One copy there, one from half to half, one back, and one wait."""
    encoder, decoder = halves
    waits: list[int] = []
    finish = driver.finish
    driver.finish = lambda: (waits.append(len(driver.waiting)), finish())[1]  # type: ignore[method-assign]
    for start in (0, 3):
        x = images[start : start + 3]
        np.testing.assert_array_equal(encoder.then(decoder, x), tiny.reconstruct(x))
    assert waits == [0 if driver.is_early else 5] * 2


@only_captured
def test_a_captured_call_is_one_launch(
    halves: tuple[StagedCall, StagedCall], driver: Driver, images: np.ndarray
) -> None:
    encoder, decoder = halves
    (latent, _), launched = encoder.run(images[:3]), driver.launched
    (decoded,) = decoder.run(latent)
    assert len(launched) == 2
    for _ in range(2):
        np.testing.assert_array_equal(encoder.then(decoder, images[:3]), decoded)
    assert (len(launched), launched[2]) == (4, launched[3])


@only_captured
def test_arrays_on_the_device_take_one_launch_each(
    halves: tuple[StagedCall, StagedCall], driver: Driver, tiny: VAE, images: np.ndarray
) -> None:
    """Whatever their addresses; and step by step where a copy cannot be moved."""
    encoder, _ = halves
    given = [copy_to_device(images[start : start + 3], Device("cpu", CPU))._value for start in (0, 3, 6)]
    kept: list[Any] = []
    for index in (0, 1, 2, 1):
        if index == 2:
            driver.status["cuGraphExecMemcpyNodeSetParams"] = 1
        before = len(driver.launched)
        kept.append((index, encoder.on_device(given[index]) or []))
        assert len(set(driver.launched[before:])) == 1
        is_whole = len(driver.graphs[driver.launched[-1] - 1]) == 1 + 1 + 2  # both copies of outputs too
        assert is_whole == (index != 2)
        driver.status.clear()
    assert encoder.in_steps == {"on_device": "the NVIDIA driver could not move a copy (CUDA error 1)"}  # once
    for index, found in kept:
        expected = tiny.encode(images[3 * index : 3 * index + 3])
        np.testing.assert_array_equal(found[0].numpy(), expected.mean)
        np.testing.assert_array_equal(found[1].numpy(), expected.logvar)


def test_where_a_copy_is_not_found_arrays_on_the_device_go_step_by_step(
    halves: tuple[StagedCall, StagedCall], driver: Driver, tiny: VAE, images: np.ndarray
) -> None:
    encoder, _ = halves
    driver.status["cuGraphMemcpyNodeGetParams"] = 1
    before = len(driver.graphs)
    for start in (0, 3):
        value = copy_to_device(images[start : start + 3], Device("cpu", CPU))._value
        mean, _ = encoder.on_device(value) or []
        np.testing.assert_array_equal(mean.numpy(), tiny.encode(images[start : start + 3]).mean)
    assert len(driver.graphs) - before == isinstance(encoder, CapturedCall)  # it was tried once
    if isinstance(encoder, CapturedCall):
        assert encoder.in_steps == {"on_device": "the NVIDIA driver could not describe a graph (CUDA error 1)"}


def test_a_reconstruction_that_cannot_be_captured_goes_step_by_step(
    halves: tuple[StagedCall, StagedCall], driver: Driver, tiny: VAE, images: np.ndarray
) -> None:
    encoder, decoder = halves
    before = len(driver.graphs)
    driver.status["cuStreamEndCapture"] = 901
    for start in (0, 3):
        x = images[start : start + 3]
        np.testing.assert_array_equal(encoder.then(decoder, x), tiny.reconstruct(x))
    assert len(driver.graphs) - before == isinstance(encoder, CapturedCall)  # it was tried once
    if isinstance(encoder, CapturedCall):
        assert encoder.in_steps["reconstruct"].startswith("the NVIDIA driver could not record")


def test_arrays_on_the_device_are_copied_in_and_out(
    halves: tuple[StagedCall, StagedCall], driver: Driver, tiny: VAE, images: np.ndarray
) -> None:
    encoder, _ = halves
    values = [copy_to_device(images[start : start + 3], Device("cpu", CPU))._value for start in (0, 3)]
    first, second = (encoder.on_device(value) or [] for value in values)
    for found, start in ((first, 0), (second, 3)):
        expected = tiny.encode(images[start : start + 3])
        np.testing.assert_array_equal(found[0].numpy(), expected.mean)
        np.testing.assert_array_equal(found[1].numpy(), expected.logvar)
    driver.status |= {"cuMemcpyDtoDAsync_v2": 700, "cuGraphLaunch": 700}
    with pytest.raises(DeviceError, match="CUDA error 700"):
        encoder.on_device(values[0])


@pytest.mark.parametrize("call", ["work", "cuStreamSynchronize", "cuCtxPushCurrent_v2"])
def test_a_staged_call_that_fails_gives_nothing(
    halves: tuple[StagedCall, StagedCall], driver: Driver, images: np.ndarray, call: str
) -> None:
    """The session's `run` then says why."""
    encoder, decoder = halves
    if call == "work":
        call = "cuGraphLaunch" if isinstance(encoder, CapturedCall) else "cuMemcpyHtoDAsync_v2"
    driver.status[call] = 700
    assert encoder(images[:3]) is None
    driver.finish()
    assert encoder.then(decoder, images[:3]) is None
    with pytest.raises(DeviceError):
        encoder.run(images[:3])
    driver.status.clear()
    driver.finish()
    assert encoder(images[:3]) is not None


def test_another_decoder_gets_steps_of_its_own(
    halves: tuple[StagedCall, StagedCall], tiny_path: Path, tiny: VAE, images: np.ndarray
) -> None:
    encoder, decoder = halves
    session = VAE.load(tiny_path)._open_operations()[1].routes[0].any_batch
    session.fixed = (3, 4)
    other = type(decoder)(session, session._shapes((3, 4)), decoder._stream)
    expected = tiny.reconstruct(images[:3])
    for one in (decoder, other, decoder):
        one._found[:] = 0
        np.testing.assert_array_equal(encoder.then(one, images[:3]), expected)


def test_calls_within_a_call_find_the_memory_taken(
    halves: tuple[StagedCall, StagedCall], driver: Driver, images: np.ndarray
) -> None:
    """As of a signal's handler; and while a graph is captured no call on the stream may come."""
    encoder, decoder = halves
    value = copy_to_device(images[:3], Device("cpu", CPU))._value
    within: list[Any] = []

    def handler() -> None:
        within.append([encoder(images[:3]), encoder.then(decoder, images[:3]), encoder.on_device(value)])

    finish = driver.finish
    driver.finish = lambda: (handler(), finish())[1]  # type: ignore[method-assign]
    for call in (
        lambda: encoder(images[:3]),
        lambda: encoder.run(images[:3]),
        lambda: encoder.then(decoder, images[:3]),
        lambda: encoder.on_device(value),
    ):
        assert call() is not None
        assert within.pop() == [None, None, None]
        assert not encoder.is_busy
    driver.finish = lambda: (within.append(encoder.then(decoder, images[:3])), finish())[1]  # type: ignore[method-assign]
    assert decoder(np.zeros((3, 4), np.float32)) is not None
    assert within == [None]  # the decoder is taken
    driver.finish = finish  # type: ignore[method-assign]
    capture(encoder._stream, lambda: within.append([encoder.may_run(), encoder(images[:3])]))
    assert within[1:] == [[False, None]]


@pytest.mark.parametrize("error", [TimeoutError, KeyboardInterrupt])
def test_what_a_handler_raises_reaches_its_caller(
    halves: tuple[StagedCall, StagedCall], driver: Driver, images: np.ndarray, error: type[BaseException]
) -> None:
    encoder, decoder = halves
    value = copy_to_device(images[:3], Device("cpu", CPU))._value

    def handler() -> None:
        raise error("too long")

    finish = driver.finish
    for call in (
        lambda: encoder(images[:3]),
        lambda: encoder.then(decoder, images[:3]),
        lambda: encoder.on_device(value),
    ):
        driver.finish = lambda: (finish(), handler())[1]  # type: ignore[method-assign]
        with pytest.raises(error, match="too long"):
            call()
        driver.finish = finish  # type: ignore[method-assign]
        finish()
        assert (encoder.is_busy, decoder.is_busy, driver.stack) == (False, False, [])
        assert call() is not None


def test_calls_on_two_streams_do_not_follow_each_other(
    halves: tuple[StagedCall, StagedCall], images: np.ndarray
) -> None:
    encoder, decoder = halves
    with ThreadPoolExecutor(1) as pool:  # nor calls in another thread
        assert pool.submit(encoder.then, decoder, images[:3]).result() is None
        assert pool.submit(encoder, images[:3]).result() is None
    decoder._stream = Stream(0)
    assert encoder.then(decoder, images[:3]) is None


def test_outputs_lie_apart_in_one_piece_of_memory(tiny_path: Path) -> None:
    """Each from where CUDA's own allocations may begin, in units of 256 bytes."""
    session = VAE.load(tiny_path)._open_operations()[0].routes[0].any_batch
    call = DeviceCall(session, session._shapes((3, 1, 8, 8)), UNIT_INTERVAL)
    assert [(part.start, part.shape) for part in call._parts] == [(0, (3, 4)), (64, (3, 4))]
    assert call(np.full((3, 1, 8, 8), 2, np.float32)) is None


def test_reconstruct_takes_the_way_over_the_device(
    halves: tuple[StagedCall, StagedCall], tiny_path: Path, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = VAE.load(tiny_path)
    encoder, decoder = vae._open_operations()
    expected = vae.reconstruct(images[:3])
    monkeypatch.setattr(vae, "_is_on_one_gpu", True)
    encoder.routes[0]._fixed[3, 1, 8, 8] = vae._open_operations()[1].routes[0].any_batch  # only that there is one
    encoder._own[3, 1, 8, 8], decoder._own[3, 4] = halves
    taken: list[bool] = []
    real = StagedCall.then
    monkeypatch.setattr(StagedCall, "then", lambda *a: taken.append(True) or real(*a))
    np.testing.assert_array_equal(vae.reconstruct(images[:3]), expected)
    with pytest.raises(InputError, match=r"images\[\d+\] has values from"):
        vae.reconstruct(images[:3] + 1)
    assert taken == [True]
