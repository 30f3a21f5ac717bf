"""From a device's name to an onnxruntime provider that is really there, or a `DeviceError` that says why it is not."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import io
import re
import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from .errors import DeviceError, InputError, MissingExtraError
from .plugins import OPENVINO, find_plugin_device, openvino_device, openvino_options, why_not_openvino

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"

# Precisions without files of their own: the fp32 graphs, run so by a provider that can.
PROVIDER_PRECISIONS: dict[str, tuple[str, ...]] = {"bf16": (OPENVINO,), "tf32": (CUDA,)}
_SHORT_NAMES = {CPU: "cpu", CUDA: "cuda", OPENVINO: "openvino"}


class Device(NamedTuple):
    """name: as reported by `VAE.device`. provider: onnxruntime's name for it. options: that provider's own.

    plugin: the device as a plug-in offers it; None for a provider that is compiled into onnxruntime.
    """

    name: str
    provider: str
    options: Mapping[str, str] = MappingProxyType({})
    plugin: Any = None
    precision: str = "fp32"

    def session_options(self, threads: int | None) -> dict[str, str]:
        """The provider's options for a session of so many threads."""
        if self.provider == OPENVINO:
            return openvino_options(self.precision, threads, self.options, compiled_in=self.plugin is None)
        return dict(self.options)


def import_engine() -> Any:
    """onnxruntime, imported on first use.

    Raises:
        MissingExtraError: no flavour of it is installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        if getattr(error, "name", "onnxruntime") != "onnxruntime":
            raise  # installed, but broken: its own message says more
        raise MissingExtraError("onnxruntime", "cpu", "running a bundle") from None
    return onnxruntime


def find_device(name: str, precision: str = "fp32", options: Mapping[str, str] | None = None) -> Device:
    """The device that `name` stands for, checked to be usable as far as that shows without a model.

    name: "cpu", "cuda" (the same as "cuda:0"), "cuda:N", "openvino", "auto" (CUDA where it is usable, else the CPU;
        OpenVINO for bf16), or an onnxruntime provider such as "CoreMLExecutionProvider", compiled in or registered as
        a plug-in.
    options: the provider's own, by its own names.

    Raises:
        InputError: no such name, or options that are no strings or contradict the other arguments.
        DeviceError: it names a device that is not there, or that cannot run `precision`.
    """
    check_device_name(name)
    if name == "auto":
        name = "openvino" if precision == "bf16" else "cuda" if why_not_cuda() is None else "cpu"
    provider, fixed = _parse(name, precision)
    able_providers = PROVIDER_PRECISIONS.get(precision)
    if able_providers is not None and provider not in able_providers:
        able = ", ".join(able_providers)
        raise DeviceError(f"precision {precision!r} is not to be had on device {name!r}; it is run by: {able}")
    merged = {**_check_options(options, provider, fixed), **fixed}
    reason = _why_not(provider, merged)
    if reason is not None:
        raise DeviceError(f"device {name!r} cannot be used: {reason}")
    plugin = None
    if provider == OPENVINO:
        plugin = openvino_device(import_engine(), precision)
    elif provider not in import_engine().get_available_providers():
        plugin = find_plugin_device(import_engine(), provider)
    short = _SHORT_NAMES.get(provider, provider)
    return Device(f"cuda:{fixed['device_id']}" if provider == CUDA else short, provider, merged, plugin, precision)


def check_device_name(name: Any) -> None:
    """Raise `InputError` unless `name` is a string."""
    if not isinstance(name, str):
        raise InputError(f"device is {name!r}; expected a string such as 'cpu', 'cuda', 'cuda:1' or 'auto'")


def why_not_cuda(index: int = 0) -> str | None:
    """Why CUDA device `index` cannot be used, in words; None where nothing speaks against it."""
    if CUDA not in import_engine().get_available_providers():
        return (
            "this build of onnxruntime has no CUDA provider; in a fresh environment run: pip install 'vae-edge[gpu]'"
            " (onnxruntime and onnxruntime-gpu must not be installed together)"
        )
    count, reason = _cuda_devices()
    if reason is not None:
        return reason
    if index >= count:
        return f"there is no GPU {index}; this machine has {count}, numbered from 0"
    return _missing_cuda_libraries()


def usable_devices() -> dict[str, str | None]:
    """Every device this software knows by a short name: None where it is usable, else the reason why it is not."""
    return {"cpu": None, "cuda": why_not_cuda(), "openvino": why_not_openvino(import_engine())}


def _parse(name: str, precision: str) -> tuple[str, dict[str, str]]:
    """The provider that a name stands for, and the options that the name and the precision decide."""
    name = _SHORT_NAMES.get(name, name)
    if name == "cpu":
        return CPU, {}
    if name == "openvino":
        return OPENVINO, {}
    if match := re.fullmatch(r"cuda(?::(\d{1,3}))?", name):
        return CUDA, {"device_id": str(int(match[1] or 0)), "use_tf32": "1" if precision == "tf32" else "0"}
    if re.fullmatch(r"[A-Za-z0-9]+ExecutionProvider", name):
        return name, {}
    raise InputError(
        f"device is {name!r}; expected 'cpu', 'cuda', 'cuda:N', 'openvino', 'auto' or an onnxruntime provider's name"
        " such as 'CoreMLExecutionProvider'"
    )


def _check_options(options: Any, provider: str, fixed: Mapping[str, str]) -> dict[str, str]:
    if options is None:
        return {}
    if not isinstance(options, Mapping) or not all(isinstance(item, str) for pair in options.items() for item in pair):
        raise InputError(f"provider_options is {options!r}; expected names and values that are strings")
    for key in fixed.keys() & options.keys():
        raise InputError(f"provider_options sets {key} to {options[key]!r}; device and precision decide that")
    if provider == CPU and options:
        raise InputError(f"provider_options is {dict(options)!r}; the CPU provider has none")
    return dict(options)


def _why_not(provider: str, options: Mapping[str, str]) -> str | None:
    if provider == CUDA:
        return why_not_cuda(int(options["device_id"]))
    engine = import_engine()
    if provider == OPENVINO:
        return why_not_openvino(engine)
    available = engine.get_available_providers()
    if provider not in available and find_plugin_device(engine, provider) is None:
        return f"this build of onnxruntime has {', '.join(available)}"
    return None


@functools.cache
def _cuda_devices() -> tuple[int, str | None]:
    """How many GPUs the driver shows, or why it shows none. Asked of the driver itself: onnxruntime only lists what it
    was compiled with, and would print and fall back to the CPU."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return 0, "no NVIDIA driver is installed on this machine (libcuda was not found)"
    count = ctypes.c_int()
    if (status := driver.cuInit(0)) != 0 or (status := driver.cuDeviceGetCount(ctypes.byref(count))) != 0:
        return 0, f"the NVIDIA driver shows no usable GPU (CUDA error {status})"
    return count.value, None if count.value else "the NVIDIA driver shows no GPU"


@functools.cache
def _missing_cuda_libraries() -> str | None:
    """Load the CUDA libraries that pip installed, so that the provider finds them; which ones are missing, if any."""
    onnxruntime = import_engine()
    if not hasattr(onnxruntime, "preload_dlls"):
        return None
    report = io.StringIO()
    with contextlib.redirect_stdout(report):  # where onnxruntime prints what it could not load
        onnxruntime.preload_dlls()
    missing = re.findall(r"Failed to load ([^\s:]+)", report.getvalue())
    if not missing:
        return None
    return f"{', '.join(missing)} could not be loaded; pip install 'vae-edge[gpu]' brings CUDA and cuDNN"


def first_line(error: BaseException) -> str:
    """The first line of an engine's error message, which may run to a page."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
