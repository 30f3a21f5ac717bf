"""From a device's name to an onnxruntime provider that is really there, or a `DeviceError` that says why it is not."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import io
import re
import sys
from dataclasses import dataclass, field
from typing import Any

from .errors import DeviceError, InputError, MissingExtraError

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"

# Precisions without files of their own: the fp32 graphs, run so by a provider that can.
PROVIDER_PRECISIONS: dict[str, tuple[str, ...]] = {"bf16": (), "tf32": (CUDA,)}


@dataclass(frozen=True)
class Device:
    """name: as reported by `VAE.device`. provider: onnxruntime's name for it. options: that provider's own."""

    name: str
    provider: str
    options: dict[str, str] = field(default_factory=dict)


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


def find_device(name: str, precision: str = "fp32") -> Device:
    """The device that `name` stands for, checked to be usable as far as that shows without a model.

    name: "cpu", "cuda" (the same as "cuda:0"), "cuda:N", "auto" (CUDA where it is usable, else the CPU), or an
        onnxruntime provider such as "CoreMLExecutionProvider".

    Raises:
        InputError: no such name. DeviceError: it names a device that is not there, or that cannot run `precision`.
    """
    if not isinstance(name, str):
        raise InputError(f"device is {name!r}; expected a string such as 'cpu', 'cuda', 'cuda:1' or 'auto'")
    if name == "auto":
        name = "cuda" if why_not_cuda() is None else "cpu"
    device = _parse(name, precision)
    able_providers = PROVIDER_PRECISIONS.get(precision)
    if able_providers is not None and device.provider not in able_providers:
        able = ", ".join(able_providers) or "none yet"
        raise DeviceError(f"precision {precision!r} is not to be had on device {name!r}; it is run by: {able}")
    reason = _why_not(device)
    if reason is not None:
        raise DeviceError(f"device {name!r} cannot be used: {reason}")
    return device


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
    return {"cpu": None, "cuda": why_not_cuda()}


def _parse(name: str, precision: str) -> Device:
    if name == "cpu":
        return Device("cpu", CPU)
    if match := re.fullmatch(r"cuda(?::(\d{1,3}))?", name):
        index = int(match[1] or 0)
        return Device(f"cuda:{index}", CUDA, {"device_id": str(index), "use_tf32": "1" if precision == "tf32" else "0"})
    if re.fullmatch(r"[A-Za-z0-9]+ExecutionProvider", name):
        short = {CPU: "cpu", CUDA: "cuda"}.get(name)
        return _parse(short, precision) if short else Device(name, name)
    raise InputError(
        f"device is {name!r}; expected 'cpu', 'cuda', 'cuda:N', 'auto' or an onnxruntime provider's name"
        " such as 'CoreMLExecutionProvider'"
    )


def _why_not(device: Device) -> str | None:
    if device.provider == CUDA:
        return why_not_cuda(int(device.options.get("device_id", "0")))
    available = import_engine().get_available_providers()
    if device.provider not in available:
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
