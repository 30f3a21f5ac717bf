"""The installed onnxruntime: imported on first use, and looked at for other builds that have overwritten it."""

from __future__ import annotations

import functools
import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

from .errors import DeviceError, MissingExtraError, VAEError

# Builds that own the same Python module. Whichever was installed last has overwritten the others' files, and
# uninstalling one takes files of the others along.
_BUILDS = {
    f"onnxruntime{suffix}"
    for suffix in (
        "",
        "-gpu",
        "-openvino",
        "-directml",
        "-qnn",
        "-rocm",
        "-migraphx",
        "-vitisai",
        "-training",
        "-webgpu",
    )
}

# By onnxruntime's names. On the CPU, 1.24 to 1.32 at least end the process over a Transpose that they have moved past a
# Cast (github.com/microsoft/onnxruntime/issues/28392).
CRASHING_ON_FLOAT16 = ["NchwcTransformer"]

_OF_CUDA = re.compile(r"\bCU[A-Z]+ failure \d+: [^;\n]*")

# Beside its own: what pybind11 makes of C++'s exceptions, and of a message that is not UTF-8.
_ENGINE_ERRORS = (RuntimeError, ValueError, MemoryError, IndexError, OverflowError, UnicodeDecodeError)


def import_engine() -> Any:
    """onnxruntime, imported on first use.

    Raises:
        MissingExtraError: no build of it is installed. DeviceError: parts of it are missing, or cannot be loaded.
    """
    try:
        import onnxruntime
    except ImportError as error:
        if getattr(error, "name", "onnxruntime") != "onnxruntime":
            raise DeviceError(
                f"the installed onnxruntime cannot be loaded: {first_line(error)}{_cure_of(error)}"
            ) from error
        raise MissingExtraError("onnxruntime", "cpu", "running a bundle") from None
    if not hasattr(onnxruntime, "InferenceSession"):
        folder = next(iter(onnxruntime.__path__), "its folder")
        raise DeviceError(
            f"the installed onnxruntime is incomplete: {folder} holds parts of it, as when one build was uninstalled"
            f" beside another; run: {_cure(_installed(Path(folder).parent))}"
        )
    return onnxruntime


def is_engine_error(error: Exception) -> bool:
    """Whether a call of the engine raised it, or numpy for want of memory. Else a signal's handler did within that
    call, which goes to whoever waits for it; or it is a mistake in this package."""
    kind = type(error)
    return _is_of_packages(kind.__module__) or (kind in _ENGINE_ERRORS and raised_here(error))


def is_raw_engine_error(error: Exception) -> bool:
    """The same, but for an error of this package's own, which says already what it has to."""
    return is_engine_error(error) and not isinstance(error, VAEError)


def raised_here(error: BaseException) -> bool:
    """Whether it is an error of this package, numpy or onnxruntime, or was raised there and not by a signal's handler,
    whose frame would be the last. Compiled code has none, and leaves its caller's the last."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = trace and trace.tb_frame.f_globals.get("__name__")
    return trace is None or _is_of_packages(type(error).__module__) or _is_of_packages(place)


def _is_of_packages(module: Any) -> bool:
    return str(module).partition(".")[0] in ("numpy", "onnxruntime", "vae_runtime")


class _EngineErrors:
    """As `contextlib.suppress`, for what the engine raises."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> bool:
        return isinstance(error, Exception) and is_engine_error(error)


suppress_engine_errors = _EngineErrors()  # made once: entering it takes a tenth of a microsecond


def ort_value_from_dlpack(capsule: Any) -> Any:
    """An `OrtValue` on the memory of a DLPack capsule, which it takes over."""
    onnxruntime = import_engine()
    return onnxruntime.OrtValue(onnxruntime.capi._pybind_state.OrtValue.from_dlpack(capsule))


def engine_clash() -> str | None:
    """Which builds of onnxruntime are installed over each other, and how to mend it; None for one alone."""
    return _clash(Path(import_engine().__file__).parent.parent)


@functools.cache
def _clash(folder: Path) -> str | None:
    builds = _installed(folder)
    if len(builds) < 2:
        return None
    names = " and ".join(f"{name} {version}" for name, version in sorted(builds.items()))
    return f"{names} are installed over each other, and only one of them works; run: {_cure(builds)}"


def _installed(folder: Path) -> dict[str, str]:
    """The builds in a folder of packages, with their versions. Reading the names in it takes a fraction of
    a millisecond, importing `importlib.metadata` alone ten."""
    found = {}
    for entry in folder.glob("onnxruntime*.dist-info"):
        name, _, version = entry.stem.partition("-")
        if (name := name.replace("_", "-").lower()) in _BUILDS:
            found[name] = version
    return found


def _cure(builds: dict[str, str]) -> str:
    extra = "gpu" if "onnxruntime-gpu" in builds else "cpu"
    names = " ".join(sorted(builds) or ["onnxruntime"])
    return f'pip uninstall -y {names}, then: pip install "vae-edge[{extra}]"'


def _cure_of(error: ImportError) -> str:
    """Of an engine that cannot be loaded: another build over it, or, on Windows, Microsoft's library, which not every
    system has, and which the message does not name."""
    spec = importlib.util.find_spec("onnxruntime")
    if spec is not None and spec.origin is not None and (clash := _clash(Path(spec.origin).parent.parent)) is not None:
        return f"; {clash}"
    if sys.platform != "win32" or isinstance(error, ModuleNotFoundError):
        return ""
    return "; install the current Microsoft Visual C++ Redistributable (x64)"


def first_line(error: BaseException) -> str:
    """The first line of an engine's error message, which may run to a page; of CUDA's libraries, what they say alone,
    around which onnxruntime puts the source code's place and the computer's name."""
    text = str(error).strip()
    if said := _OF_CUDA.search(text):
        return said[0].rstrip(" ;")
    return text.splitlines()[0] if text else type(error).__name__
