"""Providers that come as plug-ins: shared libraries of their own, registered with an installed onnxruntime.

OpenVINO comes in two variants: as the plug-in `onnxruntime-ep-openvino`, which offers itself on Intel's processors, and
compiled into a build of onnxruntime, `onnxruntime-openvino`, which runs on any x86-64.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .engine import first_line, import_engine
from .errors import DeviceError, InputError

OPENVINO = "OpenVINOExecutionProvider"
_OPENVINO_PACKAGE = "onnxruntime_ep_openvino"
# OpenVINO's own names. What it would choose by itself on a processor with AMX is bf16, also where fp32 was promised.
_PRECISION, _THREADS, _STREAMS = "INFERENCE_PRECISION_HINT", "INFERENCE_NUM_THREADS", "NUM_STREAMS"
_PINNED = {_PRECISION, _THREADS, _STREAMS}
_DECIDED = {"device_type", "precision", "num_of_threads", "num_streams"}  # the provider's older names for the same


def find_plugin_device(provider: str) -> Any | None:
    """The first device that a registered plug-in offers for `provider`, as onnxruntime lists it; None for none."""
    return next((device for device in _plugin_devices() if device.ep_name == provider), None)


def why_not_openvino() -> str | None:
    """Why OpenVINO cannot be used, in words; None where it can. Registers the plug-in on first use."""
    engine = import_engine()
    if _is_compiled_in(engine.get_available_providers):
        return None
    if importlib.util.find_spec(_OPENVINO_PACKAGE) is None:
        if not _has_plugin_package():
            return "its plug-in is to be had on x86-64 Linux and Windows only"
        return 'its plug-in is not installed; run: pip install "vae-edge[openvino]"'
    if not hasattr(engine, "register_execution_provider_library"):
        return f"onnxruntime {engine.__version__} takes no plug-ins; it needs 1.23 or newer"
    if find_plugin_device(OPENVINO) is None:  # the application may have registered it
        reason = _register_openvino(engine.register_execution_provider_library)
        if reason is not None:
            return reason
    if _openvino_cpu() is None:
        return (
            "its plug-in offers no processor here; it takes Intel's only (the build onnxruntime-openvino takes others)"
        )
    return None


def openvino_device(precision: str) -> Any | None:
    """The processor as the plug-in offers it; None for OpenVINO that is compiled in.

    Raises:
        DeviceError: bf16 was asked for, and the processor has none; OpenVINO would quietly run float32.
    """
    device = _openvino_cpu()
    able = str(_metadata(device).get("OPTIMIZATION_CAPABILITIES", "")).split() if device is not None else []
    if precision == "bf16" and "BF16" not in able:
        found = (
            f"this processor has {', '.join(able)}" if able else "only the plug-in tells whether the processor has it"
        )
        raise DeviceError(f"precision 'bf16' is not to be had on device 'openvino': {found}")
    return device


def openvino_options(
    precision: str, threads: int | None, given: Mapping[str, str], compiled_in: bool = False
) -> dict[str, str]:
    """The provider's options for one session: its precision and threads pinned, `given` added.

    Raises:
        InputError: `given` sets what device, precision and threads decide, or holds a load_config that is no JSON of
            the processor's properties.
    """
    pinned = {_PRECISION: "bf16" if precision == "bf16" else "f32", _STREAMS: "1"}
    if threads is not None:
        pinned[_THREADS] = str(threads)
    config = _load_config(given)
    for where, names in (("provider_options", given.keys() & _DECIDED), ("load_config", config.keys() & _PINNED)):
        for name in sorted(names):
            value = given[name] if where == "provider_options" else config[name]
            raise InputError(f"{where} sets {name} to {value!r}; device, precision and threads decide that")
    processor = {"device_type": "CPU"} if compiled_in else {}  # a plug-in's device is that already
    return {**given, **processor, "load_config": json.dumps({"CPU": {**config, **pinned}}, sort_keys=True)}


def _load_config(given: Mapping[str, str]) -> dict[str, Any]:
    text = given.get("load_config", '{"CPU": {}}')
    try:
        document = json.loads(text)
    except ValueError:
        document = None
    if not isinstance(document, dict) or [*document] != ["CPU"] or not isinstance(document["CPU"], dict):
        raise InputError(f'load_config is {text!r}; expected JSON such as {{"CPU": {{"NAME": "value"}}}}')
    return dict(document["CPU"])


def _has_plugin_package() -> bool:
    """Whether the extra brings it here."""
    import platform  # late: `import vae_runtime` is to cost no more than it must

    return (sys.platform, platform.machine()) in (("linux", "x86_64"), ("win32", "AMD64"))


@functools.cache
def _is_compiled_in(list_providers: Callable[[], list[str]]) -> bool:
    """Asked once, before the plug-in is registered: from then on onnxruntime lists the provider in any case."""
    return OPENVINO in list_providers()


@functools.cache
def _register_openvino(register: Callable[[str, str], None]) -> str | None:
    """Why the plug-in cannot be registered; tried once, since a second time would fail."""
    try:
        import onnxruntime_ep_openvino as plugin

        register(OPENVINO, plugin.get_library_path())
    except Exception as error:
        return f"its plug-in could not be loaded: {first_line(error)}"
    return None


def _openvino_cpu() -> Any | None:
    """Explicitly the processor: the plug-in also offers AUTO and, where there are any, GPUs and NPUs."""
    for device in _plugin_devices():
        if device.ep_name == OPENVINO and _metadata(device).get("ov_device") == "CPU":
            return device
    return None


def _plugin_devices() -> Sequence[Any]:
    """All devices that onnxruntime lists; none where it takes no plug-ins."""
    engine = import_engine()
    devices: Sequence[Any] = engine.get_ep_devices() if hasattr(engine, "get_ep_devices") else ()
    return devices


def _metadata(device: Any) -> dict[str, str]:
    return dict(device.ep_metadata)
