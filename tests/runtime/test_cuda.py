"""What can be seen of CUDA and TensorRT without a GPU; the rest skips and says why."""

from __future__ import annotations

import ctypes
import gc
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.linalg import _umath_linalg  # a library that can be loaded

from vae_runtime import (
    VAE,
    BundleError,
    DeviceError,
    InputError,
    OutOfMemoryError,
    device_array,
    device_call,
    lending,
    plan,
    trial,
)
from vae_runtime import cuda as module
from vae_runtime import session as session_module
from vae_runtime.bound import Owner
from vae_runtime.bundle import Bundle
from vae_runtime.cuda import (
    CUDA,
    TENSORRT,
    Gpu,
    driver_version,
    find_gpus,
    real_work_on_cpu,
    synchronize,
    synchronize_default_stream,
    why_not_cuda,
)
from vae_runtime.cuda_stream import Stream
from vae_runtime.device_array import copy_to_device
from vae_runtime.device_call import CapturedCall, DeviceCall
from vae_runtime.devices import CPU, Device, find_device, usable_devices
from vae_runtime.engine import import_engine, ort_value_from_dlpack
from vae_runtime.plan import Candidate
from vae_runtime.preprocess import UNIT_INTERVAL
from vae_runtime.session import GraphSession, _open_error

WHY_NOT = why_not_cuda()
with_gpu = pytest.mark.skipif(WHY_NOT is not None, reason=f"no CUDA here: {WHY_NOT}")


class Driver:
    """libcuda as far as it is asked here: `gpus` cards of 80 GiB, `status` from cuInit."""

    def __init__(self, gpus: int, status: int = 0) -> None:
        self.gpus, self.status = gpus, status
        self.version, self.capability = 13020, (9, 0)
        self.stack: list[int | None] = []
        self.waited: list[Any] = []
        self.modes: list[int] = []

    def cuInit(self, flags: int) -> int:
        return self.status

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = self.gpus
        return 0

    def cuDriverGetVersion(self, version: Any) -> int:
        version._obj.value = self.version
        return 0

    def cuGetErrorString(self, status: int, text: Any) -> int:
        text._obj.value = b"no CUDA-capable device is detected" if status == 100 else None
        return 0

    def cuDeviceGet(self, device: Any, index: int) -> int:
        device._obj.value = index
        return 0

    def cuDeviceGetName(self, name: Any, size: int, device: ctypes.c_int) -> int:
        name.value = f"GPU of 80 GiB, number {device.value}".encode()
        return 0

    def cuDeviceTotalMem_v2(self, memory: Any, device: ctypes.c_int) -> int:
        memory._obj.value = 80 * 2**30
        return 0

    def cuDevicePrimaryCtxRetain(self, context: Any, device: ctypes.c_int) -> int:
        context._obj.value = 1000 + device.value
        return 0

    def cuCtxPushCurrent_v2(self, context: ctypes.c_void_p) -> int:
        self.stack.append(context.value)
        return 0

    def cuThreadExchangeStreamCaptureMode(self, mode: Any) -> int:
        assert self.stack
        self.modes.append(mode._obj.value)
        return 0

    def cuCtxSynchronize(self) -> int:
        self.waited.append(self.stack[-1] if self.stack else None)
        return self.status

    def cuStreamSynchronize(self, stream: ctypes.c_void_p) -> int:
        self.waited.append((self.stack[-1], stream.value))
        return self.status

    def cuCtxPopCurrent_v2(self, context: Any) -> int:
        self.stack.pop()
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: ctypes.c_int) -> int:
        value._obj.value = self.capability[attribute - 75]
        return 0


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Another machine: its driver, and the providers of its onnxruntime."""

    def become(driver: Driver | None, providers: tuple[str, ...] = (TENSORRT, CUDA, CPU)) -> None:
        def load() -> Driver:
            if driver is None:
                raise OSError("libcuda.so.1: cannot open shared object file")
            return driver

        monkeypatch.setattr(module, "driver", load)
        monkeypatch.setattr(module, "_of_thread", threading.local())  # what this one is told, a real one is not
        engine = SimpleNamespace(
            get_available_providers=lambda: list(providers), __file__="/nowhere/onnxruntime/x.py", cuda_version="13.0"
        )
        monkeypatch.setattr(module, "import_engine", lambda: engine)
        monkeypatch.setattr(module, "_libraries_are_there", [])
        monkeypatch.setattr(module, "_loaded_providers", {CUDA, TENSORRT})
        for function in cached:
            function.cache_clear()

    cached = (module._usable_gpus, module._missing_tensorrt, module._primary_context)
    yield become
    for function in cached:
        function.cache_clear()


def test_gpus_are_read_from_the_driver(machine: Any) -> None:
    machine(Driver(2))
    gpus, reason = find_gpus()
    assert reason is None
    assert gpus[1] == Gpu("GPU of 80 GiB, number 1", 80 * 2**30, "9.0")
    assert driver_version() == "13.2"
    assert why_not_cuda(1) is None
    assert why_not_cuda(2) == "there is no GPU 2; this machine has 2, numbered from 0"


@pytest.mark.parametrize(
    ("driver", "reason"),
    [
        (None, "no NVIDIA driver is installed on this machine (libcuda was not found)"),
        (Driver(0), "the NVIDIA driver shows no GPU"),
        (
            Driver(1, status=100),
            "the NVIDIA driver shows no usable GPU (CUDA error 100, no CUDA-capable device is detected)",
        ),
        (Driver(1, status=802), "the NVIDIA driver shows no usable GPU (CUDA error 802)"),
    ],
)
def test_machines_without_a_gpu_are_told_apart(machine: Any, driver: Driver | None, reason: str) -> None:
    machine(driver)
    assert find_gpus() == ((), reason)
    for name in ("cuda", "tensorrt"):
        with pytest.raises(DeviceError) as caught:
            find_device(name, "tf32")
        assert str(caught.value) == f"device {name!r} cannot be used: {reason}"
    assert find_device("auto").name == "cpu"


@pytest.mark.parametrize(
    ("version", "capability", "reason"),
    [
        (
            12040,
            (9, 0),
            "the NVIDIA driver runs CUDA 12.4 at most, this onnxruntime has 13.0; update the driver",
        ),
        (
            13000,
            (7, 0),
            "GPU of 80 GiB, number 0 has compute capability 7.0, and CUDA 13, which this onnxruntime has, runs from"
            " 7.5 on",
        ),
        (13000, (7, 5), None),
        (14010, (12, 0), None),
    ],
)
def test_drivers_and_gpus_that_are_too_old_for_the_engine_are_told(
    machine: Any, version: int, capability: tuple[int, int], reason: str | None
) -> None:
    driver = Driver(1)
    driver.version, driver.capability = version, capability
    machine(driver)
    assert why_not_cuda() == reason
    assert find_device("auto").name == ("cpu" if reason else "cuda:0")


def test_a_driver_that_was_not_ready_is_asked_again(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(1, status=802)
    machine(driver)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    hidden = "the NVIDIA driver shows no usable GPU (CUDA error 802); the environment has CUDA_VISIBLE_DEVICES=''"
    assert why_not_cuda() == hidden
    driver.status = 0
    assert why_not_cuda() is None


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere these files have other names")
@pytest.mark.parametrize("lacking", ["shared", "cuda"])
def test_a_provider_without_its_library_is_told(machine: Any, tmp_path: Path, lacking: str) -> None:
    machine(Driver(1))
    module._loaded_providers.clear()
    (tmp_path / "capi").mkdir()
    module.import_engine().__file__ = str(tmp_path / "__init__.py")
    for part in {"shared", "cuda"} - {lacking}:
        shutil.copy(_umath_linalg.__file__, tmp_path / "capi" / f"libonnxruntime_providers_{part}.so")
    reason = str(why_not_cuda())
    assert reason.startswith(f"libonnxruntime_providers_{lacking}.so of onnxruntime could not be loaded: {tmp_path}")
    assert find_device("auto").name == "cpu"
    (tmp_path / "capi" / f"libonnxruntime_providers_{lacking}.so").write_bytes(b"no library")
    assert "too short; in a fresh environment install onnxruntime-gpu anew" in str(why_not_cuda())


@pytest.mark.parametrize("there", [(), ("libcudnn.so.9",), ("libcublasLt.so.13", "libcudnn.so.9")])
def test_missing_libraries_are_named(
    machine: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch, there: tuple[str, ...]
) -> None:
    """Those that are not found by their name either, whatever onnxruntime tells of the path in pip's package."""
    machine(Driver(1))
    monkeypatch.setattr(module, "_can_load", there.__contains__)

    def preload() -> None:
        for path in ("/site packages/nvidia/cu13/lib/libcublasLt.so.13", "libcudnn.so.9"):
            sys.stdout.write(f"Failed to load {path}: {path}: cannot open shared object file\n")

    module.import_engine().preload_dlls = preload
    missing = ", ".join(name for name in ("libcublasLt.so.13", "libcudnn.so.9") if name not in there)
    if missing:
        with pytest.raises(DeviceError, match=rf": {missing} could not be loaded; .*vae-edge\[gpu\]"):
            find_device("cuda")
    else:
        assert find_device("cuda").name == "cuda:0"
    assert capsys.readouterr().out == ""


def test_paths_of_windows_are_read_too(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(Driver(1))
    monkeypatch.setattr(module, "_can_load", lambda name: name != "cublas64_13.dll")
    engine = module.import_engine()
    engine.preload_dlls = lambda: sys.stdout.write("Failed to load C:\\cuda\\bin\\cublas64_13.dll: not found\n")
    with pytest.raises(DeviceError, match=r": cublas64_13.dll could not be loaded"):
        find_device("cuda")


def test_a_gpu_without_memory_for_a_context_is_told(machine: Any) -> None:
    driver = Driver(1)
    machine(driver)
    driver.cuDevicePrimaryCtxRetain = lambda context, device: 2  # type: ignore[method-assign]
    with pytest.raises(OutOfMemoryError, match="GPU 0 has not enough memory for this process to use it"):
        synchronize(0)


def test_work_that_failed_for_want_of_memory_is_told(machine: Any) -> None:
    driver = Driver(1)
    machine(driver)
    synchronize(0)
    driver.status = 2
    with pytest.raises(OutOfMemoryError, match="GPU 0 has not enough memory for work that was under way"):
        synchronize(0)


@pytest.mark.parametrize(
    ("free", "status", "text", "expected"),
    [
        (2**20, 0, "CUBLAS failure 1: CUBLAS_STATUS_NOT_INITIALIZED ; expr=cublasCreate(&handle)", True),
        (2**20, 0, "CUDNN failure 1001: CUDNN_STATUS_NOT_INITIALIZED ; expr=cudnnCreate(&handle)", True),
        (2**33, 0, "CUBLAS failure 1: CUBLAS_STATUS_NOT_INITIALIZED ; expr=cublasCreate(&handle)", False),
        (2**20, 700, "CUBLAS failure 1: CUBLAS_STATUS_NOT_INITIALIZED ; expr=cublasCreate(&handle)", False),
        (2**20, 0, "CUDA failure 700: an illegal memory access was encountered", False),
        (2**33, 0, "CUDA failure 2: out of memory", True),
    ],
)
def test_libraries_that_cannot_start_on_a_full_gpu_lack_memory(
    machine: Any, free: int, status: int, text: str, expected: bool
) -> None:
    driver = Driver(1)
    machine(driver)

    def memory(available: Any, total: Any) -> int:
        available._obj.value = free
        return status

    driver.cuMemGetInfo_v2 = memory  # type: ignore[attr-defined]
    gpu = Device("cuda:0", CUDA, {"device_id": "0"})
    assert session_module._is_about_memory(RuntimeError(text), gpu) == expected


def test_waiting_is_for_the_gpu_that_is_named(machine: Any) -> None:
    """Whatever this thread has current: nothing at all, or another GPU's context."""
    driver = Driver(2)
    machine(driver)
    synchronize(1)
    driver.stack.append(1000)
    synchronize(1)
    synchronize(0)
    assert (driver.waited, driver.stack) == ([1001, 1001, 1000], [1000])
    driver.status = 700
    with pytest.raises(DeviceError, match=r"GPU 1 failed in work that was under way \(CUDA error 700\)"):
        synchronize(1)
    driver.status = 900
    with pytest.raises(DeviceError, match=r"GPU 1 has work that is being captured into a CUDA graph, .*make this call"):
        synchronize(1)
    driver.status = 0
    synchronize_default_stream(1)
    assert driver.waited[-1] == (1001, 1)


def test_each_thread_is_told_once_that_other_threads_captures_do_not_concern_it(machine: Any) -> None:
    driver = Driver(1)
    machine(driver)
    for _ in range(2):
        synchronize(0)
    assert driver.modes == [1]  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
    with ThreadPoolExecutor(1) as pool:
        pool.submit(synchronize, 0).result()
    assert driver.modes == [1, 1]


def test_the_application_s_gpu_stays_the_current_one(
    tiny_path: Path, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """onnxruntime makes its own the current one in whatever it does."""
    context = Context()
    monkeypatch.setattr("vae_runtime.session.made_current", lambda memory: context)
    with VAE.load(tiny_path) as vae:
        assert context.entered == 2
        vae.encode(images[:2])
        assert context.entered == 3
        vae.encode_to_device(images[:2])
        assert context.entered == 5  # the way there, and the work
    assert context.depth == 0


class Context:
    entered = depth = 0

    def __enter__(self) -> None:
        self.entered, self.depth = self.entered + 1, self.depth + 1

    def __exit__(self, *_: object) -> None:
        self.depth -= 1


def test_cudnn_that_is_missing_is_named_though_onnxruntime_calls_it_optional(
    machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(Driver(1))
    module.import_engine().preload_dlls = lambda: None
    monkeypatch.setattr(module, "_can_load", lambda library: library != "libcudnn.so.9")
    assert str(why_not_cuda()).startswith('libcudnn.so.9 could not be loaded; pip install "vae-edge[gpu]"')


def test_processes_forked_after_the_driver_was_started_are_told(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(Driver(1))
    assert why_not_cuda() is None
    monkeypatch.setattr(module, "_asked_in", [os.getpid() + 1])
    assert "this process was forked after CUDA was started" in str(why_not_cuda())


@pytest.mark.parametrize(
    ("words", "is_memory"),
    [
        ("BFCArena::AllocateRawInternal Available memory of 10 is smaller than requested bytes of 20", True),
        ("CUDA failure 2: out of memory ; GPU=0", True),
        ("CUDNN failure 4002: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED", True),
        ("CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED", True),
        ("CUDA failure 209: no kernel image is available for execution on the device", False),
    ],
)
def test_errors_of_memory_are_told_from_others(tiny: VAE, words: str, is_memory: bool) -> None:
    session = tiny._open_operations()[0].routes[0].any_batch
    assert isinstance(session._run_error(RuntimeError(words), 8), OutOfMemoryError) == is_memory


def test_options_of_a_session_are_those_of_the_precision(machine: Any) -> None:
    machine(Driver(2))
    plain, tf32 = find_device("cuda:1"), find_device("cuda", "tf32")
    assert plain.session_options(None, False, "") == {
        "device_id": "1", "use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC",
    }  # fmt: skip
    assert "device_id" not in tf32.session_options(None, False, "")  # of which onnxruntime would print a warning
    assert tf32.memory == ("cuda", 0)
    assert tf32.options["use_tf32"] == find_device("cuda", "fp16").options["use_tf32"] == "1"
    fixed = plain.session_options(None, True, "")
    assert (fixed["cudnn_conv_algo_search"], fixed["enable_cuda_graph"]) == ("EXHAUSTIVE", "1")
    # The CUDA graph of a session for any shape would be the first shape's.
    assert "enable_cuda_graph" not in find_device("cuda", options={"enable_cuda_graph": "1"}).session_options(
        1, False, ""
    )
    external = find_device("cuda", options={"gpu_external_alloc": "1", "gpu_external_free": "2"})
    assert "enable_cuda_graph" not in external.session_options(None, True, "")
    none = find_device("cuda", options={"enable_cuda_graph": "0"})
    assert none.session_options(None, True, "")["enable_cuda_graph"] == "0"
    given = find_device("cuda", options={"cudnn_conv_algo_search": "DEFAULT", "gpu_mem_limit": "1000000"})
    assert given.session_options(None, True, "")["cudnn_conv_algo_search"] == "DEFAULT"
    for name in ("use_tf32", "device_id"):
        with pytest.raises(InputError, match=f"provider_options sets {name} to '1'; device and precision decide that"):
            find_device("cuda", options={name: "1"})


def test_tensorrt_runs_what_it_says(machine: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine(Driver(1))
    monkeypatch.setattr(module, "_missing_tensorrt", lambda: None)
    monkeypatch.setenv("VAE_EDGE_CACHE", str(tmp_path))
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    with pytest.raises(DeviceError, match="precision 'fp32' is not to be had on device 'tensorrt', which takes TF32"):
        find_device("tensorrt")
    found = find_device("tensorrt", "tf32")
    assert (found.name, found.provider) == ("tensorrt:0", TENSORRT)
    options = found.session_options(None, False, "a" * 64)
    folder = tmp_path / "tensorrt" / ("a" * 64) / "tf32"
    assert folder.is_dir()
    assert options["trt_engine_cache_path"] == options["trt_timing_cache_path"] == str(folder)
    assert (options["trt_engine_cache_enable"], options["trt_fp16_enable"]) == ("1", "0")
    assert find_device("tensorrt:0", "fp16").options["trt_fp16_enable"] == "1"
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    assert find_device("tensorrt").precision == "fp32"


def test_tensorrt_that_is_not_installed_is_refused_in_words(machine: Any, tiny_path: Path) -> None:
    machine(Driver(1))
    libraries = "libnvinfer.so.10, libnvonnxparser.so.10"
    assert f"{libraries} could not be loaded; run: pip install" in str(usable_devices()["tensorrt"])
    with pytest.raises(DeviceError, match=rf"device 'tensorrt' cannot be used: {libraries} could not be loaded"):
        VAE.load(tiny_path, device="tensorrt", precision="tf32")


def test_real_work_on_the_cpu_is_told_from_shapes() -> None:
    def part(provider: str, *operators: str) -> Any:
        return SimpleNamespace(
            ep_name=provider, get_nodes=lambda: [SimpleNamespace(op_type=name) for name in operators]
        )

    parts = [part(CUDA, "Conv", "Resize"), part(CPU, "Shape", "Gather", "Concat"), part(CPU, "Resize", "Conv", "Cast")]
    session = SimpleNamespace(get_provider_graph_assignment_info=lambda: parts)
    assert real_work_on_cpu(session) == ["Conv", "Resize"]
    parts.pop()
    assert real_work_on_cpu(session) == []


def test_sessions_that_leave_work_to_the_cpu_are_refused(
    machine: Any, tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real session that runs on the CPU as a whole, opened as the GPU's."""
    engine = module.import_engine()
    if not hasattr(engine.InferenceSession, "get_provider_graph_assignment_info"):
        pytest.skip("this onnxruntime does not tell which provider runs which node")
    real = engine.InferenceSession

    class OnCpu(real):  # type: ignore[misc, valid-type]
        def __init__(self, model: bytes, options: Any, **_: Any) -> None:
            super().__init__(model, options, providers=[CPU])

        def get_providers(self) -> list[str]:
            return [CUDA, CPU]

    machine(Driver(1))
    monkeypatch.setattr(engine, "InferenceSession", OnCpu)
    with pytest.raises(
        DeviceError, match=r"device 'cuda:0' cannot run encoder\.onnx as a whole: it leaves .* to the CPU"
    ):
        VAE.load(tiny_path, device="cuda")


# --- calls with memory on the device, here in that of the CPU ---------------------------------------------------------


@pytest.fixture
def on_device(tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> VAE:
    """The way of a GPU, taken on the CPU: `DeviceCall` for every batch size that is bound."""
    real = GraphSession.bind

    def bind(self: GraphSession, shape: tuple[int, ...], rule: Any) -> Any:
        monkeypatch.setattr(Device, "is_gpu", True)
        monkeypatch.setattr(Device, "memory", ("cpu", 0))
        try:
            return real(self, shape, rule)
        finally:
            monkeypatch.setattr(Device, "is_gpu", False)

    vae = VAE.load(tiny_path)
    for half in vae._open_operations():
        session = half.routes[0].any_batch
        monkeypatch.setattr(session, "bind", partial(bind, session))
    return vae


def test_bound_device_memory_gives_the_same(on_device: VAE, tiny: VAE, images: np.ndarray) -> None:
    for _ in range(3):
        for size in (1, 3, 20):
            found, expected = on_device.encode(images[:size]), tiny.encode(images[:size])
            np.testing.assert_array_equal(found.mean, expected.mean)
            np.testing.assert_array_equal(found.logvar, expected.logvar)
    free = on_device._open_operations()[0]._kept._free
    assert {type(call) for calls in free.values() for call in calls} == {DeviceCall}


def test_bound_device_memory_takes_pixels(on_device: VAE, tiny: VAE, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8), np.uint8)
    on_device.encode(pixels)
    expected = tiny.encode(pixels).mean
    monkeypatch.setattr(GraphSession, "run", lambda self, array: pytest.fail("went the slow way"))
    np.testing.assert_array_equal(on_device.encode(pixels).mean, expected)


def test_bound_device_memory_is_made_and_used_on_its_gpu(
    on_device: VAE, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, used = Context(), Context()
    monkeypatch.setattr("vae_runtime.device_call.made_current", lambda memory: used)
    monkeypatch.setattr(on_device._open_operations()[0].routes[0].any_batch, "_context", made)
    on_device.encode(images[:3])
    assert (made.entered, used.entered) == (2, 0)  # the session's own run, and the memory for the next one
    on_device.encode(images[:3])
    assert (made.entered, used.entered) == (2, 1)


def test_arrays_on_the_device_whose_graph_fails_go_through_the_session_for_any_batch(
    tiny_path: Path, images: np.ndarray
) -> None:
    def fail(array: Any) -> Any:
        raise DeviceError("the NVIDIA driver could not launch a graph (CUDA error 700)")

    with VAE.load(tiny_path) as vae:
        expected = vae.encode(images[:3]).mean
        route = vae._open_operations()[0].routes[0]
        route._fixed[3, 1, 8, 8] = SimpleNamespace(  # type: ignore[assignment]
            serves_this_thread=True, replays_on_device=True, replay_on_device=fail
        )
        np.testing.assert_array_equal(vae.encode_to_device(images[:3]).mean.numpy(), expected)


def test_its_results_belong_to_the_caller(on_device: VAE, images: np.ndarray) -> None:
    first = [on_device.encode(images[:3]).mean for _ in range(3)]
    kept = [array.copy() for array in first]
    on_device.encode(images[3:6])
    first[0][:] = 7
    assert not any(np.shares_memory(first[0], other) for other in first[1:])
    np.testing.assert_array_equal(first[1:], kept[1:])


def test_its_inputs_are_checked(on_device: VAE, images: np.ndarray) -> None:
    on_device.encode(images[:3])
    wrong = images[:3].copy()
    wrong[2, 0, 0, 0] = np.nan
    with pytest.raises(InputError, match=r"images\[\d+\] has NaN"):
        on_device.encode(wrong)
    strided = np.repeat(images[:3], 2, axis=0)[::2]
    np.testing.assert_array_equal(on_device.encode(strided).mean, on_device.encode(images[:3]).mean)


@pytest.fixture
def with_fixed_sessions(tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> VAE:
    """The sessions for one batch size that a GPU has, on the CPU."""
    monkeypatch.setattr("vae_runtime.session.is_lost", lambda index: False)  # there is no driver to ask
    monkeypatch.setattr(Device, "is_gpu", True)
    monkeypatch.setattr(Device, "memory", ("cpu", 0))
    monkeypatch.setattr(GraphSession, "gains_from_fixed_shape", True)
    monkeypatch.setattr("vae_runtime.session.real_work_on_cpu", lambda session: [])
    vae = VAE.load(tiny_path)
    vae.warmup([3, 5])
    return vae


def test_sessions_for_one_batch_size_have_one_set_of_buffers(with_fixed_sessions: VAE, images: np.ndarray) -> None:
    route = with_fixed_sessions._open_operations()[0].routes[0]
    three, four = ((batch, *with_fixed_sessions.manifest.input.example_shape) for batch in (3, 4))
    fixed = route.session(three)
    assert (fixed.fixed, route.session(four).fixed) == (three, None)
    assert fixed.bind(three, UNIT_INTERVAL) is fixed.bind(three, UNIT_INTERVAL) is fixed._only_call
    first = fixed.run(images[:3])
    kept = [array.copy() for array in first]
    second = fixed.run(images[3:6])
    assert not any(np.shares_memory(one, other) for one in first for other in second)
    np.testing.assert_array_equal(first, kept)


def test_sessions_for_one_batch_size_serve_many_threads(
    with_fixed_sessions: VAE, tiny_path: Path, images: np.ndarray
) -> None:
    with VAE.load(tiny_path, device="cpu") as plain:
        parts = [images[start : start + size] for start in range(12) for size in (3, 4, 5)]
        expected = [plain.encode(part).mean for part in parts]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(20):
            found = pool.map(lambda x: with_fixed_sessions.encode(x).mean, parts)
            for mean, wanted in zip(found, expected, strict=True):
                np.testing.assert_allclose(mean, wanted, atol=1e-6)


def test_a_graph_of_launches_belongs_to_the_thread_that_made_it(with_fixed_sessions: VAE, images: np.ndarray) -> None:
    route = with_fixed_sessions._open_operations()[0].routes[0]
    shape = (3, *with_fixed_sessions.manifest.input.example_shape)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(route.session, shape).result() is route.any_batch
        pool.submit(with_fixed_sessions.encode, images[:3]).result()
    assert route.session(shape) is not route.any_batch
    assert with_fixed_sessions._open_operations()[0]._kept.shapes() == []  # nothing that this thread would take instead


def test_opening_that_lacks_memory_is_told_as_that(machine: Any) -> None:
    machine(Driver(1))
    device = find_device("cuda", options={"prefer_nhwc": "0"}).with_option("user_compute_stream", "77")
    error = _open_error(RuntimeError("CUDA failure 2: out of memory ; GPU=0"), "encoder.onnx", device)
    assert isinstance(error, OutOfMemoryError)
    assert str(error) == "cuda:0 has not enough memory to open encoder.onnx"
    error = _open_error(RuntimeError("no such kernel"), "encoder.onnx", device)  # with what the caller said alone
    assert str(error) == (
        "device 'cuda:0' cannot run encoder.onnx with the options {'prefer_nhwc': '0'}: no such kernel"
    )


@pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="needs POSIX signals")
def test_calls_within_a_call_do_not_disturb_it(with_fixed_sessions: VAE, images: np.ndarray) -> None:
    """By a signal's handler, in the same thread: warm calls, and calls with arrays on the device."""
    inner, outer = images[3:6], images[:3]
    there = copy_to_device(outer, find_device("cpu"))
    device = with_fixed_sessions._open_operations()[0].routes[0].any_batch.device
    assert device.memory == ("cpu", 0)
    expected = with_fixed_sessions.encode(outer).mean, with_fixed_sessions.encode(inner).mean
    calls, wrong = 0, 0

    def handler(*_: Any) -> None:
        nonlocal calls, wrong
        calls += 1
        wrong += not np.allclose(with_fixed_sessions.encode(inner).mean, expected[1], atol=1e-6)
        wrong += not np.allclose(with_fixed_sessions.encode_to_device(inner).mean.numpy(), expected[1], atol=1e-6)
        signal.setitimer(signal.ITIMER_REAL, 2e-4)

    previous = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 2e-4)
        deadline = time.monotonic() + 1
        while time.monotonic() < deadline:
            assert np.allclose(with_fixed_sessions.encode(outer).mean, expected[0], atol=1e-6)
            found = with_fixed_sessions.encode_to_device(there).mean.numpy()
            assert np.allclose(found, expected[0], atol=1e-6)
    finally:
        signal.signal(signal.SIGALRM, signal.SIG_IGN)  # first: a handler that is due sets the timer once more
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert calls > 20
    assert wrong == 0


def test_what_a_parent_process_made_is_not_used(with_fixed_sessions: VAE, images: np.ndarray) -> None:
    operation = with_fixed_sessions._open_operations()[0]
    own = operation._own[3, 1, 8, 8]
    assert own(images[:3]) is not None
    operation.routes[0].session((3, 1, 8, 8)).owner.forked = True
    assert own(images[:3]) is None


def test_another_thread_that_warms_up_changes_nothing(
    with_fixed_sessions: VAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    operation = with_fixed_sessions._open_operations()[0]
    before = dict(operation._own)
    monkeypatch.setattr(GraphSession, "bind", lambda *_: pytest.fail("memory was bound"))
    monkeypatch.setattr(operation, "_prepare", lambda shape: None)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(operation.warm, (3, 1, 8, 8), lambda file: b"").result()
    assert operation._own == before


def test_a_thread_is_not_taken_for_one_that_has_ended() -> None:
    """The system gives the number of the one to the other."""
    owners: list[Owner] = []
    seen: list[bool] = []

    def work() -> None:
        owners.append(Owner())
        seen.append(owners[0].is_this_thread)

    for _ in range(3):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert seen == [True, False, False]


def test_calls_in_its_thread_take_the_short_way(
    with_fixed_sessions: VAE, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checked input goes straight to the session's memory; in another thread, to the session for any batch."""
    real, short = DeviceCall.__call__, []

    def call(self: DeviceCall, array: Any) -> Any:
        result = real(self, array)
        short.append(result is not None)
        return result

    monkeypatch.setattr(DeviceCall, "__call__", call)
    expected = with_fixed_sessions.encode(images[:3])
    assert short == [True]
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(with_fixed_sessions.encode, images[:3]).result()
    assert short[1] is False
    np.testing.assert_allclose(other.mean, expected.mean, atol=1e-6)
    wrong = images[:3].copy()
    wrong[1, 0, 3, 3] = 1.5
    with pytest.raises(InputError, match=r"images\[\d+\] has values from"):
        with_fixed_sessions.encode(wrong)
    np.testing.assert_array_equal(with_fixed_sessions.encode(images[:3]).logvar, expected.logvar)


def test_sessions_for_one_batch_size_are_freed_with_it(with_fixed_sessions: VAE) -> None:
    """At once, not when the collector of cycles comes by: they hold the GPU's memory."""
    sessions = [weakref.ref(one) for one in with_fixed_sessions._open_operations()[0].routes[0]._fixed.values()]
    gc.disable()
    try:
        with_fixed_sessions.close()
        assert [session() for session in sessions] == [None, None]
    finally:
        gc.enable()


def test_calls_from_before_do_not_take_its_place(with_fixed_sessions: VAE, images: np.ndarray) -> None:
    operation = with_fixed_sessions._open_operations()[0]
    with_fixed_sessions.encode(images[:4])
    assert [shape[0] for shape in operation._kept.shapes()] == [4]
    with_fixed_sessions.warmup([4])
    assert operation._kept.shapes() == []


def test_sessions_of_their_own_are_bounded(with_fixed_sessions: VAE) -> None:
    with pytest.raises(InputError, match=r"batch size \d+ would be number 9 with a session of its own"):
        with_fixed_sessions.warmup(range(10, 20))
    assert len(with_fixed_sessions.plan["encode"][0]["fixed_batches"]) == 8


def test_memory_that_lacks_for_more_buffers_costs_no_result(
    tiny_path: Path, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> Any:
        raise import_engine().capi.onnxruntime_pybind11_state.Fail("CUDA failure 2: out of memory")

    with VAE.load(tiny_path) as vae:
        expected = vae.encode(images[:3]).mean
        monkeypatch.setattr(Device, "is_gpu", True)
        monkeypatch.setattr("vae_runtime.session.is_lost", lambda index: False)  # there is no driver to ask
        monkeypatch.setattr("vae_runtime.session.DeviceCall", fail)
        vae._open_operations()[0]._kept._free.clear()
        np.testing.assert_array_equal(vae.encode(images[:3]).mean, expected)
        monkeypatch.setattr("vae_runtime.session.copy_to_device", fail)
        with pytest.raises(OutOfMemoryError, match=r"has not enough memory for encoder\.onnx at batch size 3; pass"):
            vae.encode_to_device(images[:3])


def test_reconstruction_that_stays_on_the_device_is_the_same(tiny: VAE, images: np.ndarray) -> None:
    encoder, decoder = tiny._open_operations()
    many = np.resize(images, (300, *images.shape[1:]))
    for batch_size in (None, 7):
        found = encoder.then(decoder, many, batch_size)
        np.testing.assert_allclose(found, tiny.reconstruct(many), atol=1e-6)


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@with_gpu
@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_selftest_on_the_gpu(tiny_path: Path, precision: str) -> None:
    with VAE.load(tiny_path, device="cuda", precision=precision) as vae:
        assert (vae.device, vae.plan["encode"][0]["provider"]) == ("cuda:0", CUDA)
        assert vae.selftest().passed


@with_gpu
def test_tf32_runs_the_file_that_the_bundle_has_for_it(bundle: Path, resign: Any) -> None:
    def add(data: dict[str, Any]) -> None:
        data["precisions"]["tf32"] = {"encoder": "encoder.tf32.onnx", "decoder": "decoder.onnx", "fidelity": {}}
        data["files"]["encoder.tf32.onnx"] = data["files"]["encoder.onnx"]

    shutil.copy(bundle / "encoder.onnx", bundle / "encoder.tf32.onnx")
    resign(bundle, add)
    with VAE.load(bundle, device="cuda", precision="tf32") as vae:
        files = [(vae.plan[name][0]["file"], vae.plan[name][0]["precision"]) for name in ("encode", "decode")]
        assert files == [("encoder.tf32.onnx", "tf32"), ("decoder.onnx", "tf32")]
        assert vae.selftest().passed
    with VAE.load(bundle, device="cuda") as vae:
        assert vae.plan["encode"][0]["file"] == "encoder.onnx"


@with_gpu
def test_warm_calls_on_the_gpu_are_those_of_the_cpu(tiny_path: Path, tiny: VAE, images: np.ndarray) -> None:
    with VAE.load(tiny_path, device="cuda") as vae:
        vae.warmup([1, 20])
        assert vae.plan["encode"][0]["fixed_batches"] == [1, 20]
        for _ in range(3):
            for size in (1, 2, 20):
                np.testing.assert_allclose(vae.encode(images[:size]).mean, tiny.encode(images[:size]).mean, atol=1e-5)
                np.testing.assert_allclose(vae.reconstruct(images[:size]), tiny.reconstruct(images[:size]), atol=1e-5)


@pytest.fixture
def two_forms(bundle: Path, resign: Any) -> Path:
    """A bundle whose decoder CUDA runs from another file."""
    other = (bundle / "decoder.onnx").read_bytes()
    return resign(
        bundle, lambda data: data.update(on_cuda={"decoder.onnx": "decoder.cuda.onnx"}), **{"decoder.cuda": other}
    )


def files_of(vae: VAE) -> list[str]:
    return [vae.plan[operation][0]["file"] for operation in ("encode", "decode")]


def test_the_forms_for_cuda_are_run_there_alone(two_forms: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the CPU's provider in the place of CUDA's."""
    with VAE.load(two_forms) as vae:
        vae.sample(1, seed=0)
        assert files_of(vae) == ["encoder.onnx", "decoder.onnx"]
    monkeypatch.setattr(plan, "CUDA", CPU)
    with VAE.load(two_forms) as vae:
        assert vae.selftest().passed
        assert files_of(vae) == ["encoder.onnx", "decoder.cuda.onnx"]


@pytest.mark.parametrize("file", ["decoder.onnx", "decoder.cuda.onnx"])
@pytest.mark.parametrize("provider", [CPU, CUDA])
def test_both_forms_are_verified(two_forms: Path, file: str, provider: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "CUDA", provider)
    data = bytearray((two_forms / file).read_bytes())
    data[-100] ^= 1
    (two_forms / file).write_bytes(data)
    with pytest.raises(BundleError, match=file), VAE.load(two_forms) as vae:
        vae.sample(1, seed=0)


@with_gpu
def test_the_forms_for_cuda_are_run_on_the_gpu(two_forms: Path) -> None:
    with VAE.load(two_forms, device="cuda") as vae:
        assert vae.selftest().passed
        assert files_of(vae) == ["encoder.onnx", "decoder.cuda.onnx"]


@pytest.fixture(params=["tiny.vae", "tiny-free.vae"])
def both(request: pytest.FixtureRequest, tiny_path: Path) -> Iterator[tuple[VAE, VAE, np.ndarray]]:
    """A bundle on the GPU and on the CPU, fully connected or convolutional, with 6 inputs."""
    path = tiny_path.parent / request.param
    with VAE.load(path, device="cuda") as gpu, VAE.load(path) as cpu:
        yield gpu, cpu, np.random.default_rng(0).random((6, *cpu.manifest.input.example_shape), np.float32)


@with_gpu
@pytest.mark.parametrize("way", ["zero_copy", "large", "captured", "pinned", "plain"])
def test_every_way_on_the_gpu_gives_the_same(
    both: tuple[VAE, VAE, np.ndarray], way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu, cpu, x = both

    def refuse(*arguments: Any, **named: Any) -> Any:
        raise DeviceError("refused")

    monkeypatch.setattr(trial, "_relative_time", lambda call, plain: 0.5 if way != "plain" else 2.0)
    if way == "captured":
        monkeypatch.setattr(CapturedCall, "begin_zero_copy", refuse)
    if way == "large":
        monkeypatch.setattr(device_call, "_LARGE", 20)
    if way == "pinned":
        monkeypatch.setattr(Stream, "capture", refuse)
    gpu.warmup([2])
    found = gpu.plan["encode"][0]["fixed_on_gpu"][0]
    assert found["cuda_graph"]
    assert found["copies"] == {"plain": "pageable", "zero_copy": "captured", "large": "captured"}.get(way, way)
    assert found["zero_copy"] == (way == "zero_copy")
    tried = {"plain": ["captured", "pinned"], "pinned": ["captured", "pinned", "on_device"]}
    assert [name for name in found["trials"] if name not in ("bias apart", "NHWC")] == tried.get(
        way, ["captured", "on_device", "zero_copy"]
    )
    if "NHWC" in found["trials"]:
        assert (found["layout"], found["bias"]) == ("NCHW" if way == "plain" else "NHWC", None)
    for start in (0, 2, 4, 0):
        part = x[start : start + 2]
        posterior, expected = gpu.encode(part), cpu.encode(part)
        np.testing.assert_allclose(posterior.mean, expected.mean, atol=1e-5)
        np.testing.assert_allclose(posterior.logvar, expected.logvar, atol=1e-5)
        np.testing.assert_allclose(gpu.decode(expected.mean), cpu.decode(expected.mean), atol=1e-5)
        np.testing.assert_allclose(gpu.reconstruct(part), cpu.reconstruct(part), atol=1e-5)
        np.testing.assert_allclose(gpu.reconstruct(x), cpu.reconstruct(x), atol=1e-5)
        there = copy_to_device(part, find_device("cuda"))
        kept, _ = gpu.encode_to_device(there), gpu.encode_to_device(copy_to_device(x[4:], find_device("cuda")))
        np.testing.assert_allclose(kept.mean.numpy(), expected.mean, atol=1e-5)
        np.testing.assert_allclose(gpu.decode_to_device(kept.mean).numpy(), cpu.reconstruct(part), atol=1e-5)
    assert found["on_device"] == (way != "plain")
    np.testing.assert_allclose(gpu.sample(2, seed=1), cpu.sample(2, seed=1), atol=1e-5)


@with_gpu
def test_a_warm_reconstruction_has_been_captured_before(
    both: tuple[VAE, VAE, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others may use the GPU by the time of the first."""
    gpu, cpu, x = both
    monkeypatch.setattr(trial, "_relative_time", lambda call, plain: 0.5)
    gpu.warmup([2])
    monkeypatch.setattr(Stream, "capture", lambda *_: pytest.fail("captured too late"))
    np.testing.assert_allclose(gpu.reconstruct(x[:2]), cpu.reconstruct(x[:2]), atol=1e-5)
    call = gpu._open_operations()[0]._own[2, *x.shape[1:]]
    assert isinstance(call, CapturedCall)
    assert call._to_decoder is not None
    assert len(call._to_decoder[1]) == 1


@with_gpu
def test_threads_share_the_gpu(both: tuple[VAE, VAE, np.ndarray]) -> None:
    """This one has a session of its own for 2 inputs, the others not; both halves share one pool of memory."""
    gpu, cpu, x = both
    gpu.warmup([2])
    parts = [x[start : start + size] for start in range(4) for size in (1, 2, 3)]
    expected = [(cpu.encode(part).mean, cpu.reconstruct(part)) for part in parts]

    def work(part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return gpu.encode(part).mean, gpu.reconstruct(part)

    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            others = pool.map(work, parts)
            mine = [work(part) for part in parts]
            for found, wanted in zip((*mine, *others), (*expected, *expected), strict=True):
                np.testing.assert_allclose(found[0], wanted[0], atol=1e-5)
                np.testing.assert_allclose(found[1], wanted[1], atol=1e-5)


@with_gpu
def test_a_thread_that_captures_disturbs_no_calls(both: tuple[VAE, VAE, np.ndarray]) -> None:
    """In the mode that onnxruntime captures in, which concerns all threads: they take memory, and copy."""
    gpu, cpu, x = both
    stream, begun, done = Stream(0), threading.Event(), threading.Event()

    def capture() -> tuple[int, int]:
        graph = ctypes.c_void_p()
        with stream._context:
            first = module.driver().cuStreamBeginCapture_v2(stream._stream, 0)  # CU_STREAM_CAPTURE_MODE_GLOBAL
            begun.set()
            done.wait(60)
            return first, module.driver().cuStreamEndCapture(stream._stream, ctypes.byref(graph))

    with ThreadPoolExecutor(1) as pool:
        captured = pool.submit(capture)
        assert begun.wait(60)
        try:
            np.testing.assert_allclose(gpu.reconstruct(x[:3]), cpu.reconstruct(x[:3]), atol=1e-5)
            np.testing.assert_allclose(gpu.encode_to_device(x).mean.numpy(), cpu.encode(x).mean, atol=1e-5)
        finally:
            done.set()
        assert captured.result() == (0, 0)


@with_gpu
def test_copies_in_a_thread_of_their_own_disturb_no_capture(both: tuple[VAE, VAE, np.ndarray]) -> None:
    gpu, cpu, x = both
    there, stream, graph = gpu.encode_to_device(x).mean, Stream(0), ctypes.c_void_p()
    with stream._context:
        assert module.driver().cuStreamBeginCapture_v2(stream._stream, 0) == 0  # CU_STREAM_CAPTURE_MODE_GLOBAL
        try:
            with ThreadPoolExecutor(1) as pool:
                found = pool.submit(there.numpy).result()
        finally:
            ended = module.driver().cuStreamEndCapture(stream._stream, ctypes.byref(graph))
    assert ended == 0
    np.testing.assert_allclose(found, cpu.encode(x).mean, atol=1e-5)


@with_gpu
@pytest.mark.parametrize("other", [0, 1])
def test_results_may_be_copied_after_they_are_let_go_of(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch, other: int
) -> None:
    """As by torch's `to("cuda", non_blocking=True)`: from memory that the driver knows, such a copy, be it to another
    GPU, is under way when the array is gone, and the next call must not write there yet."""
    if other >= len(find_gpus()[0]):
        pytest.skip("there is one GPU only")
    monkeypatch.setattr(trial, "_relative_time", lambda call, plain: 0.5)
    monkeypatch.setattr(device_call, "_LARGE", 20)
    driver, own = module.driver(), ctypes.c_void_p()
    with VAE.load(tiny_path, device="cuda") as gpu, VAE.load(tiny_path) as cpu:
        gpu.warmup([2])
        first, second = (np.random.default_rng(seed).normal(size=(2, 4)).astype(np.float32) for seed in (1, 2))
        gpu.decode(first)
        with module.ContextOf(other):
            there = import_engine().OrtValue.ortvalue_from_shape_and_type((2, 1, 8, 8), np.float32, "cuda", other)
            assert driver.cuStreamCreate(ctypes.byref(own), 1) == 0
        for latents in (first, second):  # the next one's call comes while this one's copy is under way
            image = gpu.decode(latents)
            with module.ContextOf(other):
                source = ctypes.c_void_p(image.ctypes.data)
                size = ctypes.c_size_t(image.nbytes)
                assert driver.cuMemcpyHtoDAsync_v2(ctypes.c_uint64(there.data_ptr()), source, size, own) == 0
            del image
            gpu.decode(-latents)
            with module.ContextOf(other):
                assert driver.cuStreamSynchronize(own) == 0
                found = there.numpy()
            np.testing.assert_allclose(found, cpu.decode(latents), atol=1e-5)


@with_gpu
def test_the_threads_own_gpu_stays_its_own(tiny_path: Path) -> None:
    if len(find_gpus()[0]) < 2:
        pytest.skip("there is one GPU only")
    current, runtime = ctypes.c_int(-1), ctypes.CDLL("libcudart.so.13")
    assert runtime.cudaSetDevice(0) == 0

    def is_mine() -> bool:
        return runtime.cudaGetDevice(ctypes.byref(current)) == 0 and current.value == 0

    vae = VAE.load(tiny_path, device="cuda:1")
    x = vae.golden()["x"]
    assert is_mine()
    vae.warmup([2, len(x)])
    assert is_mine()
    kept = []
    for _ in range(20):
        kept.append(vae.decode_to_device(vae.encode_to_device(x).mean))
        assert is_mine()
    np.testing.assert_array_equal(kept[0].numpy(), kept[-1].numpy())
    assert is_mine()
    vae.close()
    assert is_mine()


@with_gpu
@pytest.mark.parametrize("options", [{}, {"user_compute_stream": "0"}])
@pytest.mark.parametrize("status", [220, 700, 710])  # of NVLink, an illegal address, an assertion on the device
def test_a_gpu_that_is_lost_does_not_end_the_process(tiny_path: Path, options: dict[str, str], status: int) -> None:
    """Only the stand-in for CUDA can be asked to fail so."""
    if not hasattr(module.driver(), "cuda_stand_in_fail"):
        pytest.skip("a real GPU would have to be broken")
    code = f"""
import gc
from vae_runtime import VAE, DeviceError, cuda
vae = VAE.load({str(tiny_path)!r}, device="cuda", provider_options={options!r})
x = vae.golden()["x"]
vae.warmup([len(x)])
vae.encode(x)
cuda.driver().cuda_stand_in_fail({status})
for part in (x, x[:1]):
    try:
        vae.encode(part)
    except DeviceError:
        print("told")
vae.close()
del vae
gc.collect()
print("closed")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout.split(), done.returncode) == (["told", "told", "closed"], 0), done.stderr


class _Foreign:
    """Another library's array on GPU 0."""

    def __init__(self, array: np.ndarray) -> None:
        self.shape = array.shape
        self._value = import_engine().OrtValue.ortvalue_from_numpy(array, "cuda", 0)

    def __dlpack__(self, *, stream: int) -> Any:
        return self._value._ortvalue.to_dlpack()

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0


@with_gpu
@pytest.mark.parametrize("sizes", [(), (2,)])
def test_results_that_others_let_go_of_are_freed_in_calls_with_their_arrays(
    tiny_path: Path, sizes: tuple[int, ...]
) -> None:
    with VAE.load(tiny_path, device="cuda") as vae:
        vae.warmup(sizes)
        given = _Foreign(vae.golden()["x"][:2])
        for _ in range(10):
            ort_value_from_dlpack(vae.encode_to_device(given).mean.__dlpack__(stream=1))
            assert len(lending.returned(0)) <= 2
    assert lending.returned(0) == []  # nor after the end


@with_gpu
def test_arrays_on_the_device_take_the_route_of_their_batch(tiny_path: Path) -> None:
    on_cpu, on_gpu = Candidate("cpu", "fp32", None), Candidate("cuda:0", "fp32", None)
    for first, second in ((on_cpu, on_gpu), (on_gpu, on_cpu)):
        plan = {half: [(1, first), (4, second)] for half in ("encode", "decode")}
        with VAE(Bundle.open(tiny_path), plan) as vae:
            x = np.resize(vae.golden()["x"], (6, 1, 8, 8))
            for count in (2, 6):
                mean = vae.encode_to_device(x[:count]).mean
                assert mean.device[0] == (first if count < 4 else second).device.partition(":")[0]
                found = vae.decode_to_device(mean).numpy()
                np.testing.assert_allclose(found, vae.reconstruct(x[:count]), atol=1e-5)
            few, many = (2, 6) if first is on_gpu else (6, 2)
            given = _Foreign(x[:few])
            np.testing.assert_allclose(vae.encode_to_device(given).mean.numpy(), vae.encode(x[:few]).mean, atol=1e-5)
            with pytest.raises(InputError, match=r"inputs is on cuda:0; expected .* on cpu:0"):
                vae.encode_to_device(_Foreign(x[:many]))


@with_gpu
def test_a_shape_is_warmed_up_again_after_its_threads_end(tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "_relative_time", lambda call, plain: 0.5)
    kept, served = [], []
    with VAE.load(tiny_path, device="cuda") as vae:
        x = vae.golden()["x"][:2]
        route = vae._open_operations()[0].routes[0]

        def work() -> None:
            vae.warmup([2])
            kept.append(weakref.ref(route._fixed[x.shape]))
            served.append(route.session(x.shape) is not route.any_batch)
            np.testing.assert_allclose(vae.encode(x).mean, vae.golden()["mean"][:2], atol=1e-5)

        for _ in range(2):
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
        assert served == [True, True]
        assert (kept[0](), vae.plan["encode"][0]["fixed_batches"]) == (None, [2])


@with_gpu
@pytest.mark.parametrize("work", ["load", "warmup", "close", "wait"])
def test_what_waits_for_the_whole_gpu_lets_a_capture_end(
    tiny_path: Path, work: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """onnxruntime does, when it opens a session, and cuBLAS and cuDNN do, when one is freed."""
    begun = threading.Event()

    def step() -> None:
        begun.set()
        time.sleep(0.3)  # in which the other thread would do harm

    def capture() -> object:
        stream = Stream(0)
        with stream:
            return stream.capture([step], [])

    with VAE.load(tiny_path, device="cuda") as vae, ThreadPoolExecutor(1) as pool:
        if work == "close":
            monkeypatch.setattr(trial, "_relative_time", lambda call, plain: 2.0)  # onnxruntime makes the graph
            vae.warmup([2])
        captured = pool.submit(capture)
        assert begun.wait(60)
        if work == "close":
            vae.close()
            gc.collect()
        elif work == "load":
            VAE.load(tiny_path, device="cuda").close()
        elif work == "warmup":
            vae.warmup([2])
            assert vae.plan["encode"][0]["fixed_on_gpu"][0]["cuda_graph"] is True
        else:
            module.synchronize(0)
        assert captured.result() is not None


@with_gpu
def test_arrays_on_the_gpu_are_taken_and_given(
    both: tuple[VAE, VAE, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu, cpu, x = both
    first, second = gpu.encode_to_device(x[:3]), gpu.encode_to_device(copy_to_device(x[3:], find_device("cuda")))
    images = gpu.decode_to_device(first.mean)
    assert (images.device, images.shape) == (("cuda", 0), x[:3].shape)
    np.testing.assert_allclose(images.numpy(), cpu.reconstruct(x[:3]), atol=1e-5)
    np.testing.assert_allclose(first.mean.numpy(), cpu.encode(x[:3]).mean, atol=1e-5)
    np.testing.assert_allclose(second.mean.numpy(), cpu.encode(x[3:]).mean, atol=1e-5)
    assert first.mean.__dlpack_device__() == (2, 0)
    waits: list[int] = []
    monkeypatch.setattr(device_array, "synchronize_default_stream", waits.append)
    gpu.decode_to_device(second.mean)
    assert waits == []  # it is finished, and nobody else has it
    second.mean.__dlpack__()
    gpu.decode_to_device(second.mean)
    assert waits == [0]  # whoever has it may still be at work on it
    with pytest.raises(InputError, match="latents is a tensor"):
        gpu.decode_to_device(copy_to_device(x[:3], find_device("cuda")))


@with_gpu
@pytest.mark.parametrize("is_warm", [False, True])
def test_memory_let_go_of_after_the_wait_is_not_taken(
    tiny_path: Path, is_warm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One thread waits for others' work; before it takes memory, another one begins to read an array, and lets go."""
    monkeypatch.setattr(trial, "_relative_time", lambda call, plain: 0.5)
    driver, waited, done = module.driver(), threading.Event(), threading.Event()
    default, size = ctypes.c_void_p(1), ctypes.c_size_t(2 * 4 * 4)  # CU_STREAM_LEGACY; of a mean
    with VAE.load(tiny_path, device="cuda") as vae, ThreadPoolExecutor(1) as pool:
        if is_warm:
            vae.warmup([2])
        x = vae.golden()["x"][:2]
        here, other = (copy_to_device(array, find_device("cuda")) for array in (x, 1 - x))
        expected = vae.encode_to_device(other).mean.numpy()
        copied = import_engine().OrtValue.ortvalue_from_numpy(np.zeros_like(expected), "cuda", 0)
        vae.encode_to_device(other).mean.__dlpack__(stream=1)  # let go of: the next call waits
        held = [vae.encode_to_device(other)]
        held[0].mean.__dlpack__(stream=1)
        address = held[0].mean._value.data_ptr()
        held.append(held[0].mean.__dlpack__(stream=1))

        def read() -> None:
            assert waited.wait(10)
            with module.ContextOf(0):
                target, source = ctypes.c_uint64(copied.data_ptr()), ctypes.c_uint64(address)
                assert driver.cuMemcpyDtoDAsync_v2(target, source, size, default) == 0
            held.clear()
            done.set()

        def wait(index: int) -> None:
            synchronize_default_stream(index)
            waited.set()
            assert done.wait(10)

        monkeypatch.setattr(device_array, "_synchronize", wait)
        reading = pool.submit(read)
        vae.encode_to_device(here)
        reading.result()
        with module.ContextOf(0):
            assert driver.cuStreamSynchronize(default) == 0
            np.testing.assert_array_equal(copied.numpy(), expected)


@with_gpu
@pytest.mark.parametrize("way", ["device", "host", "warm"])
def test_memory_that_others_still_read_is_not_written_to(both: tuple[VAE, VAE, np.ndarray], way: str) -> None:
    """They have begun to, on a stream of their own, and let go of the array."""
    gpu, cpu, x = both
    if way == "warm":
        gpu.warmup([3])
    stream = Stream(0)
    for _ in range(3):
        mean = gpu.encode_to_device(x[:3]).mean
        capsule, size = mean.__dlpack__(stream=7), 4 * math.prod(mean.shape)
        copied = copy_to_device(np.zeros(mean.shape, np.float32), find_device("cuda"))
        with stream._context:
            stream.on_device(copied._value.data_ptr(), mean._value.data_ptr(), size)()
        del mean, capsule
        if way == "host":
            gpu.encode(x[3:])
        else:
            kept = gpu.encode_to_device(copy_to_device(x[3:], find_device("cuda")))
            np.testing.assert_allclose(kept.mean.numpy(), cpu.encode(x[3:]).mean, atol=1e-5)
        with stream:
            stream.wait()
        np.testing.assert_allclose(copied.numpy(), cpu.encode(x[:3]).mean, atol=1e-5)


@with_gpu
def test_memory_of_the_gpu_that_runs_out_is_told(tiny_path: Path, images: np.ndarray) -> None:
    many = np.zeros((200_000, *images.shape[1:]), np.float32)
    with VAE.load(tiny_path, device="cuda", provider_options={"gpu_mem_limit": str(2**24)}) as vae:
        expected = vae.encode(images[:3]).mean
        with pytest.raises(
            OutOfMemoryError, match=r"cuda:0 has not enough memory for encoder\.onnx at batch size 200000"
        ):
            vae.encode(many, batch_size=len(many))
        np.testing.assert_array_equal(vae.encode(images[:3]).mean, expected)
        np.testing.assert_allclose(vae.encode(many[:3000]).mean[:1], vae.encode(many[:1]).mean, atol=1e-6)


@with_gpu
def test_nothing_is_printed(tiny_path: Path) -> None:
    code = "import sys; from vae_runtime import VAE; VAE.load(sys.argv[1], device='cuda').warmup([1])"
    done = subprocess.run([sys.executable, "-c", code, tiny_path], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_gpu_tests_are_not_skipped_where_they_are_wanted() -> None:
    if os.environ.get("VAE_TEST_GPU"):
        assert WHY_NOT is None
