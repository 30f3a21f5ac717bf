"""NVIDIA GPUs: what the driver shows, what keeps the CUDA and TensorRT providers from using it, and their options."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import io
import os
import re
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .engine import engine_clash, first_line, import_engine
from .errors import DeviceError, OutOfMemoryError

CUDA, TENSORRT = "CUDAExecutionProvider", "TensorrtExecutionProvider"
_LEGACY_STREAM = ctypes.c_void_p(1)  # CU_STREAM_LEGACY of cuda.h
_OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY
_CAPTURE_ERRORS = range(900, 910)  # CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED and its like
_LITTLE_MEMORY = 512 * 2**20  # bytes; cuBLAS and cuDNN take some hundred MiB as they start
_THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL of cuda.h
_COMPUTE_CAPABILITY_MAJOR, _COMPUTE_CAPABILITY_MINOR = 75, 76  # of CUdevice_attribute in cuda.h
# The oldest GPUs of a major version of CUDA: 13 left out Maxwell, Pascal and Volta (its release notes).
_OLDEST_CAPABILITY = {13: (7, 5)}

# Arithmetic on shapes, which the CUDA provider leaves to the CPU: a few integers per call.
# fmt: off
SHAPE_OPERATORS = {
    "Add", "Cast", "Concat", "Constant", "ConstantOfShape", "Div", "Equal", "Expand", "Floor", "Gather", "Identity",
    "Max", "Min", "Mod", "Mul", "Range", "ReduceProd", "Reshape", "Shape", "Size", "Slice", "Split", "Squeeze", "Sub",
    "Unsqueeze", "Where",
}
# fmt: on


# Held while a CUDA graph is captured, and by whoever waits for a whole GPU: onnxruntime does when it opens a session,
# cuBLAS and cuDNN do when one is freed. During a capture CUDA refuses that wait, in whichever thread, and the graph is
# lost.
capturing = threading.RLock()
_of_thread = threading.local()
_libraries_are_there: list[bool] = []  # once they were found; those that are missing may be loaded later, by torch, say
_loaded_providers: set[str] = set()
_asked_in = [0]  # the process that started the driver, 0 for none; a forked child cannot use what it inherits


class Gpu(NamedTuple):
    """One GPU as the driver shows it. compute_capability: such as "9.0"."""

    name: str
    memory_bytes: int
    compute_capability: str


def find_gpus() -> tuple[tuple[Gpu, ...], str | None]:
    """The GPUs in the driver's order, or why it shows none. Asked of the driver itself: onnxruntime only lists what it
    was compiled with, and would print and fall back to the CPU."""
    try:
        return _usable_gpus(), None
    except DeviceError as error:
        return (), str(error)


@functools.cache
def _usable_gpus() -> tuple[Gpu, ...]:
    """A driver that shows none, as it does while it starts, is asked again: what is raised is not kept."""
    try:
        cuda = driver()
    except OSError:
        raise DeviceError("no NVIDIA driver is installed on this machine (libcuda was not found)") from None
    _asked_in[:] = [os.getpid()]
    count = ctypes.c_int()
    status = cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count))
    if status != 0 or count.value == 0:
        what = "no GPU" if status == 0 else f"no usable GPU ({_describe(status)})"
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        hint = "" if hidden is None else f"; the environment has CUDA_VISIBLE_DEVICES={hidden!r}"
        raise DeviceError(f"the NVIDIA driver shows {what}{hint}")
    return tuple(_read_gpu(cuda, index) for index in range(count.value))


def _describe(status: int) -> str:
    """A status of the driver's other than 0: its number, and what the driver says of it."""
    text = ctypes.c_char_p()
    driver().cuGetErrorString(status, ctypes.byref(text))
    return f"CUDA error {status}" + ("" if text.value is None else f", {text.value.decode(errors='replace')}")


def driver_version() -> str | None:
    """The newest CUDA that the driver runs, such as "13.0"; None without a driver."""
    version = ctypes.c_int()
    try:
        status = driver().cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        return None
    return f"{version.value // 1000}.{version.value % 1000 // 10}" if status == 0 else None


def synchronize(index: int) -> None:
    """Wait for all work on GPU `index`, whichever context is this thread's, or none.

    Raises:
        DeviceError: some of it failed, or is being captured into a CUDA graph, which allows no such wait.
    """
    with ContextOf(index), capturing:  # in this order: a forked child may find the lock taken for ever
        _require_done(index, driver().cuCtxSynchronize())


def synchronize_default_stream(index: int) -> None:
    """Wait for the work on the default stream of GPU `index`, and for what that waits for. Raises as `synchronize`."""
    with ContextOf(index):
        _require_done(index, driver().cuStreamSynchronize(_LEGACY_STREAM))


def _require_done(index: int, status: int) -> None:
    if status in _CAPTURE_ERRORS:
        raise DeviceError(
            f"GPU {index} has work that is being captured into a CUDA graph, in another thread, say, and allows no wait"
            f" for it ({_describe(status)}); make this call before or after that"
        )
    if status == _OUT_OF_MEMORY:
        raise OutOfMemoryError(f"GPU {index} has not enough memory for work that was under way")
    if status != 0:
        raise DeviceError(f"GPU {index} failed in work that was under way ({_describe(status)})")


def is_lost(index: int) -> bool:
    """Whether work on GPU `index` has failed in a way after which this process can do nothing more there."""
    try:
        return gpu_memory(index)[0] not in (0, _OUT_OF_MEMORY, *_CAPTURE_ERRORS)
    except DeviceError:  # nor even make it a thread's own
        return True


def has_little_memory(index: int) -> bool:
    """Whether what libraries need as they start may be too much for GPU `index` now."""
    status, free, _ = gpu_memory(index)
    return status == _OUT_OF_MEMORY or (status == 0 and free < _LITTLE_MEMORY)


def gpu_memory(index: int) -> tuple[int, int, int]:
    """The driver's status, also of earlier work, and the free and all memory of GPU `index`, in bytes."""
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    with ContextOf(index):
        status = driver().cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
    return status, free.value, total.value


def await_everyone() -> bool:
    """Wait for all work on the GPUs that this process uses, whoever began it, where that can be waited for: not while
    anyone captures a CUDA graph, or a session is opened or freed. Whether there is none now."""
    if not capturing.acquire(blocking=False):
        return False
    try:
        return all(map(_await_all_of, range(len(find_gpus()[0]))))
    finally:
        capturing.release()


def _await_all_of(index: int) -> bool:
    """Whether GPU `index` has no work of this process now; a GPU that it does not use has none."""
    device, flags, is_used = ctypes.c_int(), ctypes.c_uint(), ctypes.c_int()
    cuda = driver()
    status = cuda.cuDeviceGet(ctypes.byref(device), index) or cuda.cuDevicePrimaryCtxGetState(
        device, ctypes.byref(flags), ctypes.byref(is_used)
    )
    if status != 0 or not is_used:
        return bool(status == 0)
    with ContextOf(index):
        return bool(cuda.cuCtxSynchronize() == 0)


class ContextOf(contextlib.AbstractContextManager[None]):
    """While it lasts, this thread's calls of the driver are for GPU `index`, whatever they are for otherwise.

    handle: the context, for the driver.
    """

    def __init__(self, index: int) -> None:
        self._index, self.handle = index, _primary_context(index)
        self._push, self._pop = driver().cuCtxPushCurrent_v2, driver().cuCtxPopCurrent_v2
        self._exchange_mode = driver().cuThreadExchangeStreamCaptureMode
        self._popped = ctypes.byref(ctypes.c_void_p())

    def __enter__(self) -> None:
        if (status := self._push(self.handle)) != 0:
            raise DeviceError(f"GPU {self._index} cannot be used in this thread ({_describe(status)})")
        if not hasattr(_of_thread, "minds_its_own_captures"):
            self._mind_own_captures()

    def __exit__(self, *_: object) -> None:
        self._pop(self._popped)

    def _mind_own_captures(self) -> None:
        """Have this thread, from now on, bound by its own captures alone. While a thread captures a CUDA graph as
        onnxruntime does, CUDA otherwise forbids other threads to take and free memory: their calls fail, so does the
        capture, and freeing a graph then ends the process."""
        self._exchange_mode(ctypes.byref(ctypes.c_int(_THREAD_LOCAL)))
        _of_thread.minds_its_own_captures = True


def made_current(memory: tuple[str, int]) -> contextlib.AbstractContextManager[None]:
    """`ContextOf` the GPU with this memory, onnxruntime's name for it and a number; of others, nothing.

    onnxruntime makes its GPU the thread's own in whatever it does, and would leave it so for the application.
    """
    kind, index = memory
    return ContextOf(index) if kind == "cuda" else contextlib.nullcontext()


def why_not_cuda(index: int = 0) -> str | None:
    """Why CUDA device `index` cannot be used, in words; None where nothing speaks against it."""
    return _why_not(CUDA, index) or _missing_cuda_libraries() or why_not_loaded(CUDA)


def why_not_tensorrt(index: int = 0) -> str | None:
    """Why TensorRT cannot be used on GPU `index`, in words; None where nothing speaks against it."""
    return _why_not(TENSORRT, index) or _missing_cuda_libraries() or _missing_tensorrt() or why_not_loaded(TENSORRT)


def cuda_options(index: int, precision: str) -> dict[str, str]:
    """What the device's name and the precision decide of the CUDA provider's options.

    For fp16 TF32 is on: without it the provider takes cuDNN's tensor cores from convolutions in float16 too, and what
    is kept in float32 beside them is held to float16's tolerance.
    """
    return {"device_id": str(index), "use_tf32": "0" if precision == "fp32" else "1"}


def tensorrt_options(index: int, precision: str) -> dict[str, str]:
    """The same of TensorRT's, which also runs float16 graphs only where it is told to."""
    return {"device_id": str(index), "trt_fp16_enable": "1" if precision == "fp16" else "0"}


def require_tensorrt_precision(precision: str) -> None:
    """Raise `DeviceError` for fp32 where TensorRT would compute in TF32: it has no option against that, only NVIDIA's
    environment variable for all libraries."""
    if precision == "fp32" and os.environ.get("NVIDIA_TF32_OVERRIDE") != "0":
        raise DeviceError(
            "precision 'fp32' is not to be had on device 'tensorrt', which takes TF32 for it unless the environment"
            " has NVIDIA_TF32_OVERRIDE=0; ask for precision 'tf32' or set it"
        )


# What is taken unless the caller's provider_options say otherwise. Whatever its values are called, the option chooses
# among three of cuDNN's heuristics (onnxruntime's conv_transpose.cc): this one, A, takes least time for each new shape.
CUDA_DEFAULTS: Mapping[str, str] = {"cudnn_conv_algo_search": "HEURISTIC"}
# For a session that takes one shape only: the slower and better heuristic, B, and one CUDA graph per call.
CUDA_FIXED_SHAPE: Mapping[str, str] = {"cudnn_conv_algo_search": "EXHAUSTIVE", "enable_cuda_graph": "1"}
# By which a caller has a say in a session's memory.
CUDA_MEMORY_OPTIONS = frozenset(
    {"gpu_mem_limit", "arena_extend_strategy", "gpu_external_alloc", "gpu_external_free", "gpu_external_empty_cache"}
)


def tensorrt_cache(folder: str) -> dict[str, str]:
    """Options that keep the engines, which take seconds to minutes to build, in a folder."""
    return {
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": folder,
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": folder,
    }


def real_work_on_cpu(session: Any) -> list[str]:
    """Operators of an open session that run on the CPU and are more than arithmetic on shapes."""
    return sorted(set(operators(session, "CPUExecutionProvider") or ()) - SHAPE_OPERATORS)


def operators(session: Any, provider: str | None = None) -> list[str] | None:
    """The type of each operator that an open session runs, on one provider or on all; None where it does not tell: only
    those on GPUs are opened so that they do, and only newer versions of onnxruntime can."""
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return None
    return [
        node.op_type
        for part in session.get_provider_graph_assignment_info()
        if provider in (None, part.ep_name)
        for node in part.get_nodes()
    ]


@functools.cache
def share_allocator(index: int) -> bool:
    """Have one pool of memory on GPU `index` for all sessions that take it, which lasts as long as the process: what
    one of them is done with, the next one uses. Whether there is one."""
    engine = import_engine()
    try:
        kind, place = engine.OrtAllocatorType.ORT_ARENA_ALLOCATOR, engine.OrtMemType.DEFAULT
        memory = engine.OrtMemoryInfo("Cuda", kind, index, place)
        size = {
            "max_mem": 0,
            "arena_extend_strategy": -1,
            "initial_chunk_size_bytes": -1,
            "max_dead_bytes_per_chunk": -1,
        }
        options = {} if index == 0 else {"device_id": str(index)}
        engine.create_and_register_allocator_v2(CUDA, memory, options, engine.OrtArenaCfg(size))
    except Exception as error:  # of onnxruntime's own kinds
        return "already been registered" in str(error)  # by the application
    return True


def _why_not(provider: str, index: int) -> str | None:
    if provider not in import_engine().get_available_providers():
        if sys.platform == "darwin":
            return "macOS has no CUDA"
        mend = engine_clash() or (
            'in a fresh environment run: pip install "vae-edge[gpu]" (onnxruntime and onnxruntime-gpu must not be'
            " installed together)"
        )
        return f"this build of onnxruntime has no {provider.removesuffix('ExecutionProvider')} provider; {mend}"
    gpus, reason = find_gpus()
    if reason is not None:
        return reason
    if _asked_in[0] not in (0, os.getpid()):
        return "this process was forked after CUDA was started, and cannot use it; a freshly started one can"
    if index >= len(gpus):
        return f"there is no GPU {index}; this machine has {len(gpus)}, numbered from 0"
    return _too_old(gpus[index])


def _too_old(gpu: Gpu) -> str | None:
    """Why the CUDA of this build of onnxruntime does not run with the driver or on the GPU."""
    built_with = str(getattr(import_engine(), "cuda_version", ""))  # such as "13.0"
    number, version = re.match(r"\d+", built_with), driver_version()
    major = int(number[0]) if number else 0
    if version is not None and int(version.split(".")[0]) < major:
        return f"the NVIDIA driver runs CUDA {version} at most, this onnxruntime has {built_with}; update the driver"
    oldest = _OLDEST_CAPABILITY.get(major, (0, 0))
    if tuple(map(int, gpu.compute_capability.split("."))) < oldest:
        return (
            f"{gpu.name} has compute capability {gpu.compute_capability}, and CUDA {major}, which this onnxruntime has,"
            f" runs from {'.'.join(map(str, oldest))} on"
        )
    return None


def why_not_loaded(provider: str) -> str | None:
    """Why the provider's own libraries cannot be loaded, which onnxruntime only logs; None where they can."""
    if provider in _loaded_providers:
        return None
    folder, name = Path(import_engine().__file__).parent / "capi", provider.removesuffix("ExecutionProvider").lower()
    for part in ("shared", name):
        file = f"onnxruntime_providers_{part}.dll" if sys.platform == "win32" else f"libonnxruntime_providers_{part}.so"
        try:
            if not (folder / file).exists():
                raise OSError(f"{folder} has no such file")
            if sys.platform != "win32":  # where it looks for what a library needs in another way than onnxruntime
                ctypes.CDLL(str(folder / file))
        except OSError as error:
            mend = engine_clash() or "in a fresh environment install onnxruntime-gpu anew"
            return f"{file} of onnxruntime could not be loaded: {first_line(error)}; {mend}"
    _loaded_providers.add(provider)
    return None


def _missing_cuda_libraries() -> str | None:
    """Load the CUDA libraries that pip installed, so that the provider finds them; which ones are missing, if any."""
    if _libraries_are_there:
        return None
    onnxruntime = import_engine()
    if not hasattr(onnxruntime, "preload_dlls"):
        return None
    report = io.StringIO()
    with contextlib.redirect_stdout(report):  # where onnxruntime prints what it could not load
        onnxruntime.preload_dlls()
    # It tries the path in pip's package first, and tells of that too where the library is then found by its name.
    failed = re.findall(r"^Failed to load (?:.*[/\\])?(.+?): ", report.getvalue(), re.MULTILINE)
    missing = [name for name in dict.fromkeys(failed) if not _can_load(name)]
    cudnn = "cudnn64_9.dll" if sys.platform == "win32" else "libcudnn.so.9"
    if not any("cudnn" in name for name in missing) and not _can_load(cudnn):  # which it counts as optional
        missing.append(cudnn)
    if not missing:
        _libraries_are_there.append(True)
        return None
    return f'{", ".join(missing)} could not be loaded; pip install "vae-edge[gpu]" brings CUDA and cuDNN'


@functools.cache
def _missing_tensorrt() -> str | None:
    """Load TensorRT's libraries, from its pip package or the system."""
    names = ("nvinfer", "nvonnxparser")
    files = [f"{name}_10.dll" if sys.platform == "win32" else f"lib{name}.so.10" for name in names]
    if importlib.util.find_spec("tensorrt_libs") is not None:
        with contextlib.suppress(ImportError, OSError):
            importlib.import_module("tensorrt_libs")  # loads its libraries when it is imported
    missing = [file for file in files if not _can_load(file)]
    return f'{", ".join(missing)} could not be loaded; run: pip install "tensorrt-cu13<11"' if missing else None


def _can_load(library: str) -> bool:
    """By its name, which is also how one is found that the process has loaded already."""
    try:
        ctypes.CDLL(library, winmode=0)  # on Windows in PATH too, as the provider's own are found
    except OSError:
        return False
    return True


@functools.cache
def _primary_context(index: int) -> ctypes.c_void_p:
    """The context that CUDA's runtime, and so every library here, uses on a GPU."""
    cuda, device, context = driver(), ctypes.c_int(), ctypes.c_void_p()
    status = cuda.cuDeviceGet(ctypes.byref(device), index) or cuda.cuDevicePrimaryCtxRetain(
        ctypes.byref(context), device
    )
    if status == _OUT_OF_MEMORY:
        raise OutOfMemoryError(f"GPU {index} has not enough memory for this process to use it")
    if status != 0:
        raise DeviceError(f"GPU {index} cannot be used ({_describe(status)})")
    return context


@functools.cache
def driver() -> Any:
    """The driver's library; raises `OSError` where there is none. What it says of errors is each call's result."""
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


def require(status: int, what: str) -> None:
    """Raise unless the driver's answer is that all went well."""
    if status == _OUT_OF_MEMORY:
        raise OutOfMemoryError(f"the NVIDIA driver could not {what}: there is none left")
    if status != 0:
        raise DeviceError(f"the NVIDIA driver could not {what} ({_describe(status)})")


def _read_gpu(cuda: Any, index: int) -> Gpu:
    device, memory, name = ctypes.c_int(), ctypes.c_size_t(), ctypes.create_string_buffer(256)
    major, minor = ctypes.c_int(), ctypes.c_int()
    cuda.cuDeviceGet(ctypes.byref(device), index)
    cuda.cuDeviceGetName(name, len(name), device)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    cuda.cuDeviceGetAttribute(ctypes.byref(major), _COMPUTE_CAPABILITY_MAJOR, device)
    cuda.cuDeviceGetAttribute(ctypes.byref(minor), _COMPUTE_CAPABILITY_MINOR, device)
    return Gpu(name.value.decode(errors="replace"), memory.value, f"{major.value}.{minor.value}")
