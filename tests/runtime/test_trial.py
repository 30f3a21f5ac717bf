"""Which way a session for one shape of input takes on a GPU: the trial itself, with real sessions on the CPU."""

from __future__ import annotations

import contextlib
import gc
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest

from vae_runtime import VAE, DeviceError, OutOfMemoryError, cuda, trial
from vae_runtime import session as session_module
from vae_runtime.cuda import CUDA, share_allocator
from vae_runtime.devices import CPU, Device
from vae_runtime.manifest import PRECISIONS
from vae_runtime.preprocess import UNIT_INTERVAL
from vae_runtime.session import GraphSession

SHAPE = (3, 1, 8, 8)
FUSED, APART = "bias fused", "bias apart"


class Ways:
    """What `open_for` is asked for, and what it makes of it. times: way -> of a call, relative to the plain way's; a
    graph with the copies in it cannot be had unless it has one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tiny_path: Path, **times: float | Exception) -> None:
        self.times, self.opened = {"captured": DeviceError("not to be captured"), **times}, []
        self.asks_of_bias = APART in times
        self.model = (tiny_path / "encoder.onnx").read_bytes()
        self.session = VAE.load(tiny_path)._open_operations()[0].routes[0].any_batch
        self.session.device = Device("cuda:0", CUDA, {"device_id": "0", "use_tf32": "0"})
        self.wrong: dict[str, Any] = {}  # way -> what it makes of its last output
        self.operators: list[str] | None = ["Conv", "Relu"]
        self.is_apart = True  # the graph adds a bias
        monkeypatch.setattr(GraphSession, "operators", property(self.operators_of))
        monkeypatch.setattr(GraphSession, "open_for", self.open_for)
        monkeypatch.setattr(trial.Stream, "of_thread", lambda index: SimpleNamespace(handle="77"))
        monkeypatch.setattr(trial, "_relative_time", lambda call, plain: (call(), plain(), self.times[self.last()])[2])
        monkeypatch.setattr(trial._Trial, "_compare_on_device", lambda *_: self.times.get("on_device", 1.0))
        monkeypatch.setattr(GraphSession, "bind", lambda *_: None)
        monkeypatch.setattr("vae_runtime.session.is_lost", lambda index: False)  # there is no driver to ask
        monkeypatch.setattr("vae_runtime.session.made_current", lambda memory: contextlib.nullcontext())

    def operators_of(self, session: GraphSession) -> list[str] | None:
        added = ["Add"] if session.device.without and self.is_apart else []
        return None if self.operators is None else self.operators + added

    def last(self) -> str:
        return self.opened[-1][-1]

    def open_for(
        self, model: bytes, shape: tuple[int, ...], device: Device, stream: Any = None, captures: bool = False
    ) -> Any:
        assert (model, shape) == (self.model, SHAPE)
        names = {"enable_cuda_graph": "alone", "prefer_nhwc": "NHWC", "user_compute_stream": "pinned"}
        way = [word for option, word in names.items() if option in device.options]
        if device.options.get("fuse_conv_bias") == "1":
            way[way.index("NHWC")] = FUSED
        if device.without:
            if not self.asks_of_bias:
                raise DeviceError("this is not what the test is of")
            way.insert(0, APART)
        if captures:
            assert {"alone", "pinned"} <= set(way)
            assert device.options["enable_cuda_graph"] == "0"
            way = [*(word for word in way if word in (APART, "NHWC", FUSED)), "captured"]
        self.opened.append(way or ["plain"])
        assert (stream is not None) == ("pinned" in way or captures)
        if isinstance(error := self.times.get(self.last()), Exception):
            raise error
        boundary = self.session._boundary
        session = GraphSession(self.model, "encoder.onnx", Device("cpu", CPU), boundary, fixed=shape, captures=captures)
        session.device, session._stream = device, stream
        if self.last() in self.wrong:
            real = session.run
            spoil = self.wrong[self.last()]
            session.run = lambda array: [*(outs := real(array))[:-1], spoil(outs[-1])]  # type: ignore[method-assign]
        return session

    def choose(self) -> GraphSession:
        best = trial.fastest_session(self.session, self.model, SHAPE, UNIT_INTERVAL)
        if not self.asks_of_bias:
            best.trials = {name: found for name, found in best.trials.items() if name != APART}
        return best


@pytest.mark.parametrize(
    ("nhwc", "captured", "pinned", "chosen"),
    [
        (1.0, 1.0, 1.0, set()),
        (0.9, 1.1, 1.2, {"prefer_nhwc"}),
        (1.1, 1.0, 0.5, {"user_compute_stream"}),
        (0.9, 2.0, 0.5, {"prefer_nhwc", "user_compute_stream"}),
        (0.98, 0.98, 0.975, set()),  # too little to be worth it
        (1.1, 0.9, None, {"user_compute_stream", "enable_cuda_graph"}),
        (0.9, 0.5, None, {"prefer_nhwc", "user_compute_stream", "enable_cuda_graph"}),
    ],
)
def test_the_faster_way_is_taken(
    nhwc: float,
    captured: float,
    pinned: float | None,
    chosen: set[str],
    monkeypatch: pytest.MonkeyPatch,
    tiny_path: Path,
) -> None:
    ways = Ways(monkeypatch, tiny_path, NHWC=nhwc, captured=captured, pinned=pinned)
    best = ways.choose()
    assert best.device.options.keys() - {"device_id", "use_tf32"} == chosen
    layout = ["NHWC"] if "prefer_nhwc" in chosen else []
    copies = [["captured"]] if pinned is None else [["captured"], ["pinned"]]  # the second in place of the first
    assert ways.opened == [["plain"], ["NHWC"], *([*layout, *way] for way in copies)]
    expected = {"NHWC": nhwc, "captured": captured, "pinned": pinned, "on_device": 1.0}
    is_close = min(captured, pinned or captured) <= 1.03  # else arrays on the device are not asked about
    assert best.trials == {
        name: time for name, time in expected.items() if time is not None and (name != "on_device" or is_close)
    }
    copies = "captured" if "enable_cuda_graph" in chosen else "pinned"
    assert best.describe_variant()["copies"] == (copies if "user_compute_stream" in chosen else "pageable")
    assert best.describe_variant()["cuda_graph"]


@pytest.mark.parametrize(("off", "is_taken"), [(2e-5, True), (1.4e-4, False)])
def test_what_is_off_as_in_tf32_is_not_taken_for_fp32(
    off: float, is_taken: bool, monkeypatch: pytest.MonkeyPatch, tiny_path: Path
) -> None:
    """Which onnxruntime computes in without being asked, where cuDNN has no other algorithm."""
    ways = Ways(monkeypatch, tiny_path, NHWC=0.5, pinned=1.1)
    ways.wrong = {"NHWC": lambda output: output * np.float32(1 + 0.99 * off)}
    best = ways.choose()
    assert best.describe_variant()["layout"] == ("NHWC" if is_taken else "NCHW")
    assert isinstance(best.trials["NHWC"], float) is is_taken


@pytest.mark.parametrize(
    ("precision", "captured", "alive_at_most"),
    [("fp32", 0.5, [1, 2, 2]), ("fp32", 1.1, [1, 2, 2, 2]), ("tf32", 0.5, [1, 2, 2, 2])],
)
def test_no_more_than_two_sessions_are_there_at_once(
    precision: str, captured: float, alive_at_most: list[int], monkeypatch: pytest.MonkeyPatch, tiny_path: Path
) -> None:
    """Of a large model each takes much of the GPU's memory."""
    times: dict[str, float] = {"NHWC": 1.0, FUSED: 1.0, "captured": captured, "pinned": 1.1}
    ways, opened = Ways(monkeypatch, tiny_path, **times), weakref.WeakSet()
    ways.session.device = ways.session.device._replace(precision=precision)
    real, alive = ways.open_for, []

    def open_for(_: GraphSession, *given: Any) -> GraphSession:
        opened.add(made := real(*given))
        alive.append(len(opened))
        return made

    monkeypatch.setattr(GraphSession, "open_for", open_for)
    ways.choose()
    assert alive == alive_at_most


@pytest.mark.parametrize(
    ("time", "is_taken"), [(0.9, True), (0.98, False), (DeviceError("not reached"), False), ("wrong", False)]
)
def test_outputs_are_written_to_the_host_where_that_is_faster(
    time: Any, is_taken: bool, monkeypatch: pytest.MonkeyPatch, tiny_path: Path
) -> None:
    ways = Ways(monkeypatch, tiny_path, NHWC=1.0, captured=0.5)
    call = SimpleNamespace(begin="copies", in_steps={"on_device": "no copies"})
    outputs = {"copies": [np.ones(2, np.float32)], "writes": [np.full(2, 1 + (time == "wrong"), np.float32)]}
    call.run = lambda array: outputs[call.begin]

    def begin_zero_copy(session: GraphSession) -> str:
        assert session.describe_variant()["copies"] == "captured"
        if isinstance(time, Exception):
            raise time
        ways.times["captured"] = time
        return "writes"

    call.begin_zero_copy = begin_zero_copy
    monkeypatch.setattr(GraphSession, "captured_call", property(lambda session: call if session._captures else None))
    best = ways.choose()
    assert best.is_zero_copy is best.describe_variant()["zero_copy"] is is_taken
    assert best.describe_variant()["in_steps"] == {"on_device": "no copies"}
    assert call.begin == ("writes" if is_taken else "copies")
    assert str(best.trials["zero_copy"]).startswith("outputs differ by 1" if time == "wrong" else str(time))


def test_what_cannot_be_had_or_is_wrong_is_not_taken(monkeypatch: pytest.MonkeyPatch, tiny_path: Path) -> None:
    ways = Ways(monkeypatch, tiny_path, NHWC=DeviceError("no such kernel"), pinned=0.5)
    ways.wrong = {"pinned": lambda output: output + 0.1}
    best = ways.choose()
    assert best.device.options.keys() == {"device_id", "use_tf32"}
    assert best.trials["NHWC"] == "no such kernel"
    assert str(best.trials["pinned"]).startswith("outputs differ by ")
    assert str(best.trials["pinned"]).endswith(" of the largest, more than 2e-05")
    ways.wrong = {"pinned": lambda output: output * np.float32(np.nan)}
    best = ways.choose()
    assert best.trials["pinned"] == "outputs differ by nan of the largest, more than 2e-05"
    assert best.device.options.keys() == {"device_id", "use_tf32"}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_has_its_tolerance(precision: str, monkeypatch: pytest.MonkeyPatch, tiny_path: Path) -> None:
    ways = Ways(monkeypatch, tiny_path, NHWC=0.9, pinned=1.0, **{FUSED: 1.0})
    ways.session.device = ways.session.device._replace(precision=precision)
    fused = {FUSED: 1.0} if precision in ("tf32", "fp16") else {}
    others = {"captured": "not to be captured", "pinned": 1.0, "on_device": 1.0}
    assert ways.choose().trials == {"NHWC": 0.9, **fused, **others}
    ways.wrong = {"NHWC": lambda output: output + 0.1}
    assert str(ways.choose().trials["NHWC"]).startswith("outputs differ by ")


@pytest.mark.parametrize(
    ("apart", "nhwc", "fused", "layout", "bias"),
    [
        (1.0, 0.9, 0.9, "NHWC", "fused"),
        (1.0, 0.9, 0.99, "NHWC", None),  # what it has to be faster than is NHWC's time
        (0.9, 1.2, 0.9, "NHWC", "fused"),
        (0.9, 0.9, 1.2, "NHWC", "apart"),
        (0.9, 1.2, DeviceError("no bias of ConvTranspose"), "NCHW", "apart"),
    ],
)
def test_the_bias_is_added_in_the_fastest_way(
    apart: float,
    nhwc: float,
    fused: Any,
    layout: str,
    bias: str | None,
    monkeypatch: pytest.MonkeyPatch,
    tiny_path: Path,
) -> None:
    times: dict[str, Any] = {APART: apart, "NHWC": nhwc, FUSED: fused, "captured": 0.5}
    ways = Ways(monkeypatch, tiny_path, **times)
    ways.session.device = ways.session.device._replace(precision="fp16")
    best = ways.choose()
    assert [best.describe_variant()[name] for name in ("layout", "bias")] == [layout, bias]
    assert best.device.options.get("fuse_conv_bias") == ("1" if bias == "fused" else None)
    assert best.device.without == (("ConvAddFusion",) if bias == "apart" else ())
    expected = {name: time if isinstance(time, float) else str(time) for name, time in times.items()}
    assert best.trials == {**expected, "on_device": 1.0}
    kept = [APART] if apart < 0.97 else []
    assert ways.opened[:4] == [["plain"], [APART], [*kept, "NHWC"], [FUSED]]
    ways.session.device = ways.session.device.with_option("fuse_conv_bias", "0")
    assert {APART, FUSED}.isdisjoint(ways.choose().trials)


def test_a_session_does_without_what_its_device_names(monkeypatch: pytest.MonkeyPatch, tiny_path: Path) -> None:
    asked, real = [], onnxruntime.InferenceSession

    def spy(*given: Any, **named: Any) -> Any:
        asked.append(named["disabled_optimizers"])
        return real(*given, **named)

    monkeypatch.setattr(onnxruntime, "InferenceSession", spy)
    boundary = VAE.load(tiny_path)._open_operations()[0].routes[0].any_batch._boundary
    model = (tiny_path / "encoder.onnx").read_bytes()
    for without in ((), ("ConvAddFusion",)):
        GraphSession(model, "encoder.onnx", Device("cpu", CPU, without=without), boundary)
    assert asked[-2:] == [[], ["ConvAddFusion"]]


@pytest.mark.parametrize("tells", [True, False])
def test_what_takes_nothing_apart_is_not_taken(tells: bool, monkeypatch: pytest.MonkeyPatch, tiny_path: Path) -> None:
    times: dict[str, Any] = {APART: 0.5, "NHWC": 1.0, "pinned": 1.0}
    ways = Ways(monkeypatch, tiny_path, **times)
    ways.is_apart = False
    if not tells:
        ways.operators = None
    best = ways.choose()
    assert best.describe_variant()["bias"] == (None if tells else "apart")
    assert best.trials[APART] == ("no bias is an addition in this graph" if tells else 0.5)


def test_memory_that_lacks_for_another_way_costs_no_result(monkeypatch: pytest.MonkeyPatch, tiny_path: Path) -> None:
    fail = onnxruntime.capi.onnxruntime_pybind11_state.Fail("nor")
    errors = {"NHWC": OutOfMemoryError("no memory"), "captured": OutOfMemoryError("none"), "pinned": fail}
    assert Ways(monkeypatch, tiny_path, **errors).choose().trials == {
        "NHWC": "no memory",
        "captured": "none",
        "pinned": "nor",
    }


def test_layouts_are_tried_only_where_there_are_convolutions(monkeypatch: pytest.MonkeyPatch, tiny_path: Path) -> None:
    ways = Ways(monkeypatch, tiny_path, pinned=1.0, NHWC=1.0)
    ways.operators = ["Gemm", "Relu"]
    ways.choose()
    assert ways.opened == [["plain"], ["captured"], ["pinned"]]
    ways.operators = None  # this onnxruntime does not tell
    ways.choose()
    assert ways.opened[3:] == [["plain"], ["NHWC"], ["captured"], ["pinned"]]


def test_what_the_caller_decides_is_not_tried(monkeypatch: pytest.MonkeyPatch, tiny_path: Path) -> None:
    ways = Ways(monkeypatch, tiny_path)
    ways.session.device = ways.session.device.with_option("prefer_nhwc", "0")
    monkeypatch.setattr(trial.Stream, "of_thread", lambda index: pytest.fail("a stream was made"))
    ways.session.device = ways.session.device.with_option("user_compute_stream", "5")
    monkeypatch.setattr(GraphSession, "open_for", lambda self, *_: ways.session)
    assert ways.choose() is ways.session


def test_graph_that_cannot_be_captured_runs_without(monkeypatch: pytest.MonkeyPatch, tiny_path: Path) -> None:
    """onnxruntime refuses to capture what it has not put onto the GPU as a whole."""
    ways = Ways(monkeypatch, tiny_path, plain=DeviceError("cannot use the graph capture feature"), NHWC=1.0, pinned=1.0)
    best = ways.choose()
    assert ways.opened == [["plain"], ["alone"], ["alone", "NHWC"], ["alone", "pinned"]]
    assert best.describe_variant()["cuda_graph"] is False
    ways.times["plain"] = OutOfMemoryError("full")
    with pytest.raises(OutOfMemoryError, match="full"):
        ways.choose()


def test_the_plan_says_how_it_works(monkeypatch: pytest.MonkeyPatch, tiny_path: Path) -> None:
    ways = Ways(monkeypatch, tiny_path, NHWC=0.5, pinned=2.0)
    vae = VAE.load(tiny_path)
    route = vae._open_operations()[0].routes[0]
    assert "fixed_on_gpu" not in vae.plan["encode"][0]
    route.any_batch.device = ways.session.device
    route._fixed[SHAPE] = ways.choose()
    vae.plan["encode"][0]["fixed_on_gpu"][0]["trials"]["NHWC"] = 7  # a copy
    assert vae.plan["encode"][0]["fixed_on_gpu"] == [
        {
            "shape": [3, 1, 8, 8],
            "cuda_graph": True,
            "layout": "NHWC",
            "bias": None,
            "copies": "pageable",
            "zero_copy": False,
            "on_device": False,
            "in_steps": {},
            "trials": {"NHWC": 0.5, "captured": "not to be captured", "pinned": 2.0},
        }
    ]


@pytest.mark.parametrize(
    ("found", "is_taken"), [(0.5, True), (0.99, False), ("it failed", False), (OutOfMemoryError("full"), False)]
)
def test_arrays_on_the_device_take_the_graph_where_it_is_faster(
    found: Any, is_taken: bool, monkeypatch: pytest.MonkeyPatch, tiny_path: Path
) -> None:
    def compare(*_: Any) -> Any:
        if isinstance(found, Exception):
            raise found
        return found

    ways = Ways(monkeypatch, tiny_path, NHWC=1.0, pinned=0.5)
    monkeypatch.setattr(trial._Trial, "_compare_on_device", compare)
    best = ways.choose()
    assert best.replays_on_device is best.describe_variant()["on_device"] is is_taken
    assert best.trials["on_device"] == (str(found) if isinstance(found, Exception) else found)


@pytest.mark.parametrize(
    ("times", "on_device", "copies"),
    [
        ({"captured": 1.02, "pinned": 0.5}, 0.5, "captured"),
        ({"captured": 1.02, "pinned": 0.5}, 1.0, "pinned"),
        ({"captured": 1.04, "pinned": 1.02}, 0.5, "pinned"),
        ({"captured": 1.04, "pinned": 1.04}, 0.5, "pageable"),
        ({"captured": 1.02, "pinned": 1.02}, 0.98, "pageable"),
    ],
)
def test_a_stream_that_costs_little_is_taken_for_arrays_on_the_device(
    times: dict[str, float], on_device: float, copies: str, monkeypatch: pytest.MonkeyPatch, tiny_path: Path
) -> None:
    best = Ways(monkeypatch, tiny_path, NHWC=1.0, on_device=on_device, **times).choose()
    assert best.describe_variant()["copies"] == copies
    assert best.replays_on_device is (on_device == 0.5 and copies != "pageable")


def test_other_threads_may_capture_between_openings(monkeypatch: pytest.MonkeyPatch, tiny_path: Path) -> None:
    """Only opening and freeing keep them waiting, not the calls that are timed."""
    ways, free, opened = Ways(monkeypatch, tiny_path, NHWC=1.0, pinned=1.0), [], weakref.WeakSet()

    def is_free() -> bool:
        if taken := cuda.capturing.acquire(blocking=False):
            cuda.capturing.release()
        return taken

    def relative_time(call: Any, plain: Any) -> float:
        with ThreadPoolExecutor(1) as pool:
            free.append(pool.submit(is_free).result())
        return 1.0

    real = ways.open_for
    monkeypatch.setattr(GraphSession, "open_for", lambda _, *given: (one := real(*given), opened.add(one))[0])
    monkeypatch.setattr(trial, "_relative_time", relative_time)
    best = ways.choose()
    gc.collect()
    assert free == [True, True]
    assert list(opened) == [best]


def test_calls_are_compared_as_users_make_them(monkeypatch: pytest.MonkeyPatch, tiny_path: Path) -> None:
    """With the values looked at; and where a quick call gives nothing, the session does or says why."""
    ways = Ways(monkeypatch, tiny_path, NHWC=1.0, pinned=1.0)
    looked: list[tuple[int, ...]] = []
    bound: list[Any] = []
    monkeypatch.setattr(GraphSession, "bind", lambda _, *given: bound.append(given))
    ways.choose()
    assert bound == [(SHAPE, UNIT_INTERVAL)] * 4  # two ways, each beside the best so far
    rule = UNIT_INTERVAL._replace(holds=lambda bits: (looked.append(bits.shape), UNIT_INTERVAL.holds(bits))[1])
    one = trial._Trial(ways.session, ways.model, SHAPE, rule)
    monkeypatch.undo()
    monkeypatch.setattr(ways.session, "device", Device("cpu", CPU))
    call, array = one._call(ways.session), np.random.default_rng(1).random(SHAPE, np.float32)
    for found, expected in zip(call(array), ways.session.run(array), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert looked == [(3 * 64,)]
    for found, expected in zip(call(array + 1), ways.session.run(array + 1), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_the_graph_for_arrays_on_the_device_is_compared_with_the_session_for_any_batch(
    monkeypatch: pytest.MonkeyPatch, tiny_path: Path
) -> None:
    ways = Ways(monkeypatch, tiny_path, NHWC=1.0, pinned=1.0, plain=0.25)
    monkeypatch.undo()
    monkeypatch.setattr(trial, "_relative_time", lambda call, plain: (call(), plain(), 0.25)[2])
    ways.session.device = Device("cpu", CPU)
    one = trial._Trial(ways.session, ways.model, SHAPE, UNIT_INTERVAL)
    session = one.best
    assert one._compare_on_device(session) == "there is no graph for this thread"  # on the CPU for none
    session.replay_on_device = ways.session.run_on_device  # type: ignore[method-assign]
    assert one._compare_on_device(session) == 0.25
    session.replay_on_device = lambda array: ways.session.run_on_device(array)[::-1]  # type: ignore[method-assign]
    assert str(one._compare_on_device(session)).startswith("outputs differ by ")


def test_arrays_on_the_device_are_at_new_addresses_in_each_timed_call() -> None:
    alive: list[Any] = []

    class Result:
        def __init__(self, given: Any) -> None:
            alive.append(given)

        def __del__(self) -> None:
            deaths.append(len(alive))

    deaths: list[int] = []
    call = trial._elsewhere_each_time(Result, ["there", "elsewhere"])  # type: ignore[arg-type, list-item]
    for _ in range(4):
        call()
    assert alive == ["there", "elsewhere"] * 2
    assert deaths == [2, 3, 4]  # each when the next one is there


def test_times_are_relative_to_the_plain_way() -> None:
    def work(count: int) -> Any:
        return lambda: np.ones(count).sum()

    assert trial._relative_time(work(400_000), work(40_000)) > 2
    assert trial._relative_time(work(40_000), work(400_000)) < 0.5


# --- one pool of memory for both halves -------------------------------------------------------------------------------


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """An onnxruntime that makes pools, as far as `share_allocator` asks."""
    if tuple(map(int, onnxruntime.__version__.split(".")[:2])) < (1, 28):
        pytest.skip("GPUs are for onnxruntime 1.28 and newer")
    made: list[Any] = []
    real = cuda.import_engine()
    found = SimpleNamespace(
        made=made,
        error=None,
        OrtAllocatorType=real.OrtAllocatorType,
        OrtMemType=real.OrtMemType,
        OrtMemoryInfo=real.OrtMemoryInfo,
        OrtArenaCfg=real.OrtArenaCfg,
    )

    def create(provider: str, memory: Any, options: dict[str, str], settings: Any) -> None:
        if found.error is not None:
            raise found.error
        made.append((provider, memory.device_id, options))

    found.create_and_register_allocator_v2 = create
    monkeypatch.setattr(cuda, "import_engine", lambda: found)
    share_allocator.cache_clear()
    yield found
    share_allocator.cache_clear()


def test_each_gpu_has_one_pool(engine: Any) -> None:
    assert [share_allocator(index) for index in (0, 1, 0)] == [True] * 3
    assert engine.made == [(CUDA, 0, {}), (CUDA, 1, {"device_id": "1"})]


@pytest.mark.parametrize(
    ("error", "is_shared"),
    [
        ("An allocator for this device has already been registered for sharing.", True),
        ("CUDA execution provider is not enabled in this build.", False),
    ],
)
def test_a_pool_that_cannot_be_made_is_done_without(engine: Any, error: str, is_shared: bool) -> None:
    engine.error = RuntimeError(error)
    assert share_allocator(0) is is_shared


def test_sessions_share_it_unless_the_caller_has_a_say(
    engine: Any, tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Options(onnxruntime.SessionOptions):  # type: ignore[misc]
        def add_session_config_entry(self, name: str, value: str) -> None:
            taken[name] = value
            super().add_session_config_entry(name, value)

    gpu = Device("cuda:0", CUDA, {"device_id": "0", "use_tf32": "0"})
    with VAE.load(tiny_path) as vae:
        boundary = vae._open_operations()[0].routes[0].any_batch._boundary
    monkeypatch.setattr(onnxruntime, "SessionOptions", Options)
    monkeypatch.setattr("vae_runtime.session.made_current", lambda memory: contextlib.nullcontext())
    monkeypatch.setattr("vae_runtime.session.why_not_loaded", lambda provider: None)
    for device, fixed, expected in (
        (gpu, None, "1"),
        (gpu, SHAPE, None),  # a CUDA graph keeps the addresses that it was captured with
        (gpu.with_option("gpu_mem_limit", "1000000"), None, None),
        (Device("cpu", CPU), None, None),
    ):
        taken: dict[str, str] = {}
        with contextlib.suppress(DeviceError), warnings.catch_warnings(action="ignore"):  # this build has no CUDA
            GraphSession((tiny_path / "encoder.onnx").read_bytes(), "encoder.onnx", device, boundary, fixed=fixed)
        assert taken.get("session.use_env_allocators") == expected
        assert taken.get("session.use_device_allocator_for_initializers") == expected


@pytest.mark.parametrize("held_by_the_caller", [False, True])
def test_sessions_are_freed_where_no_capture_can_be_spoiled(
    held_by_the_caller: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those that nobody else holds, which would be gone before anything was entered."""

    class Session:
        device, owner, _memory = SimpleNamespace(is_gpu=True), SimpleNamespace(forked=False), ("cuda", 0)

    @contextlib.contextmanager
    def capturing() -> Any:
        depth.append(1)
        yield
        depth.pop()

    depth: list[int] = []
    freed: list[int] = []
    for name in ("_keep_if_lost", "await_others"):
        monkeypatch.setattr(session_module, name, lambda *_: False)
    monkeypatch.setattr(session_module, "made_current", lambda memory: contextlib.nullcontext())
    monkeypatch.setattr(session_module, "capturing", capturing())
    sessions: list[Any] = [Session()]
    weakref.finalize(sessions[0], lambda: freed.append(len(depth)))
    with session_module.freeing(sessions if held_by_the_caller else [sessions.pop()]):
        sessions.clear()
    assert freed == [1]
