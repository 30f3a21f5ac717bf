"""From a device's name to an onnxruntime provider that is really there, or a `DeviceError` that says why it is not."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from .cache import make_cache_folder
from .cuda import (
    CUDA,
    CUDA_DEFAULTS,
    CUDA_FIXED_SHAPE,
    CUDA_MEMORY_OPTIONS,
    TENSORRT,
    cuda_options,
    require_tensorrt_precision,
    tensorrt_cache,
    tensorrt_options,
    why_not_cuda,
    why_not_tensorrt,
)
from .engine import import_engine
from .errors import DeviceError, InputError
from .manifest import PRECISIONS
from .plugins import OPENVINO, find_plugin_device, openvino_device, openvino_options, why_not_openvino

CPU = "CPUExecutionProvider"

# Precisions that need no files of their own: a provider that can runs the fp32 graphs so.
PROVIDER_PRECISIONS: dict[str, tuple[str, ...]] = {"bf16": (OPENVINO,), "tf32": (CUDA, TENSORRT)}
ALL_PRECISIONS = tuple(dict.fromkeys((*PRECISIONS, *PROVIDER_PRECISIONS)))  # tf32 is both
GAIN = 0.97  # what is not at least 3% faster is not worth a less exact precision, another device or another variant
_SHORT_NAMES = {CPU: "cpu", CUDA: "cuda", TENSORRT: "tensorrt", OPENVINO: "openvino"}


class Device(NamedTuple):
    """name: as reported by `VAE.device`. provider: onnxruntime's name for it. options: that provider's own. given: what
    of them is the caller's.

    plugin: the device as a plug-in offers it; None for a provider that is compiled into onnxruntime.
    without: onnxruntime's names of optimisations that it does without.
    """

    name: str
    provider: str
    options: Mapping[str, str] = MappingProxyType({})
    plugin: Any = None
    precision: str = "fp32"
    given: Mapping[str, str] = MappingProxyType({})
    without: tuple[str, ...] = ()

    @property
    def is_gpu(self) -> bool:
        """Whether it is one of NVIDIA's."""
        return self.provider in (CUDA, TENSORRT)

    @property
    def memory(self) -> tuple[str, int]:
        """Where its tensors are, by onnxruntime's name and number."""
        return ("cuda", int(self.options["device_id"])) if self.is_gpu else ("cpu", 0)

    @property
    def may_share_memory(self) -> bool:
        """Whether its sessions may take their memory from one pool: the caller's options say nothing of it."""
        return self.provider == CUDA and not CUDA_MEMORY_OPTIONS & self.options.keys()

    def with_option(self, name: str, value: str) -> Device:
        """The same with one option of its provider."""
        return self._replace(options={**self.options, name: value})

    def session_options(self, threads: int | None, is_fixed: bool, bundle: str) -> dict[str, str]:
        """The provider's options for a session of so many threads. is_fixed: it takes one shape only. bundle: the
        digest, under which TensorRT's engines are kept."""
        if self.provider == OPENVINO:
            return openvino_options(self.precision, threads, self.options, compiled_in=self.plugin is None)
        if self.provider == CUDA:
            options = {**CUDA_DEFAULTS, **(CUDA_FIXED_SHAPE if is_fixed else {}), **self.options}
            # Number 0 is onnxruntime's own choice; where it is told, 1.26 and later print a warning.
            left_out = {"device_id"} if options["device_id"] == "0" else set()
            # A session for any shape would replay the first one's launches. And an allocator of the application's gets
            # back after each run what a graph still works in.
            if not is_fixed or "gpu_external_alloc" in self.options:
                left_out.add("enable_cuda_graph")
            return {name: value for name, value in options.items() if name not in left_out}
        if self.provider == TENSORRT:
            # By precision too: TensorRT's names for engines do not tell one of TF32 from one of float32.
            return {**tensorrt_cache(str(make_cache_folder("tensorrt", bundle, self.precision))), **self.options}
        return dict(self.options)


def find_device(name: str, precision: str = "fp32", options: Mapping[str, str] | None = None) -> Device:
    """The device that `name` stands for, checked to be usable as far as that shows without a model.

    name: "cpu", "cuda" (the same as "cuda:0"), "cuda:N", "tensorrt", "tensorrt:N", "openvino", "auto" (CUDA where it is
        usable, else the CPU; OpenVINO for bf16), or an onnxruntime provider such as "CoreMLExecutionProvider",
        compiled in or registered as a plug-in.
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
    given = _check_options(options, provider, fixed)
    merged = {**given, **fixed}
    reason = _why_not(provider, merged)
    if reason is not None:
        raise DeviceError(f"device {name!r} cannot be used: {reason}")
    if provider == TENSORRT:
        require_tensorrt_precision(precision)
    plugin = None
    if provider == OPENVINO:
        plugin = openvino_device(precision)
    elif provider not in import_engine().get_available_providers():
        plugin = find_plugin_device(provider)
    short = _SHORT_NAMES.get(provider, provider)
    if "device_id" in fixed:
        short = f"{short}:{fixed['device_id']}"
    return Device(short, provider, merged, plugin, precision, given)


def check_device_name(name: Any) -> None:
    """Raise `InputError` unless `name` is a string."""
    if not isinstance(name, str):
        raise InputError(f"device is {name!r}; expected a string such as 'cpu', 'cuda', 'cuda:1' or 'auto'")


def usable_devices() -> dict[str, str | None]:
    """Every device this software knows by a short name: None where it is usable, else the reason why it is not."""
    return {
        "cpu": None,
        "cuda": why_not_cuda(),
        "tensorrt": why_not_tensorrt(),
        "openvino": why_not_openvino(),
    }


def _parse(name: str, precision: str) -> tuple[str, dict[str, str]]:
    """The provider that a name stands for, and the options that the name and the precision decide."""
    name = _SHORT_NAMES.get(name, name)
    if name == "cpu":
        return CPU, {}
    if name == "openvino":
        return OPENVINO, {}
    if match := re.fullmatch(r"(cuda|tensorrt)(?::(\d{1,3}))?", name):
        index = int(match[2] or 0)
        if match[1] == "cuda":
            return CUDA, cuda_options(index, precision)
        return TENSORRT, tensorrt_options(index, precision)
    if re.fullmatch(r"[A-Za-z0-9]+ExecutionProvider", name):
        return name, {}
    raise InputError(
        f"device is {name!r}; expected 'cpu', 'cuda', 'cuda:N', 'tensorrt', 'openvino', 'auto' or an onnxruntime"
        " provider's name such as 'CoreMLExecutionProvider'"
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
    if provider == CUDA and is_on(options, "fuse_conv_bias") and not is_on(options, "prefer_nhwc"):
        raise InputError(
            f"provider_options sets fuse_conv_bias to {options['fuse_conv_bias']!r} without prefer_nhwc; onnxruntime"
            " computes something else by it in NCHW"
        )
    return dict(options)


def is_on(options: Mapping[str, str], name: str) -> bool:
    """Whether a provider's option, which is off unless it is said, is on."""
    return options.get(name, "").lower() in ("1", "true")


def _why_not(provider: str, options: Mapping[str, str]) -> str | None:
    if provider == CUDA:
        return why_not_cuda(int(options["device_id"]))
    if provider == TENSORRT:
        return why_not_tensorrt(int(options["device_id"]))
    if provider == OPENVINO:
        return why_not_openvino()
    available = import_engine().get_available_providers()
    if provider not in available and find_plugin_device(provider) is None:
        return f"this build of onnxruntime has {', '.join(available)}"
    return None
