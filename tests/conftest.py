"""What holds for every test, and OpenVINO as a second real provider."""

import contextlib
import ctypes
import functools
import gc
import importlib.util
import platform
import signal
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from vae_runtime import plugins
from vae_runtime.engine import import_engine

# A shell's background job is started with SIGINT ignored, and nohup's with SIGHUP, which children inherit; the tests of
# Ctrl-C and of closed terminals need them heard.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

INTEL = 0x8086


LONGEST_FILES = ("test_readme.py", "test_wheel.py", "test_race_cuda.py", "test_race.py", "test_resume.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first, so that workers that share the tests by file end together: the rest of
    the tests that train, then those of benchmarks, of export and, of many short files, of the runtime."""
    folders = ("training", "benchmarks", "export", "runtime")

    def place(item: pytest.Item) -> tuple[int, int]:
        name, folder = item.path.name, item.path.parent.name
        return (
            LONGEST_FILES.index(name) if name in LONGEST_FILES else len(LONGEST_FILES),
            folders.index(folder) if folder in folders else 0,
        )

    items.sort(key=place)


def pytest_collection_finish() -> None:
    """What the test modules have imported stays to the end, and no collection of garbage looks at it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def nothing_old_is_collected() -> None:
    """So it is with what earlier modules have left, the libraries among it that were imported late. A measurement
    begins with a collection of garbage, and an export makes many."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def one_table_of_operators() -> None:
    """Every call of torch.onnx.export builds the same table of how to translate torch's operators, which takes longer
    than a small model does; here it is built once per process, and every export has a copy. It is torch's own table:
    where a version of torch keeps it elsewhere, exports are slower and otherwise the same. So it is with torch's walk
    over all operators that it knows, for those not yet in Python, which no test adds to; and with the 20,000 kernels
    that an export registers for operators and takes back, in a fifth of its time, most of it for checks of the keys."""
    with contextlib.suppress(ImportError, AttributeError):
        from torch._C import DispatchKey
        from torch._ops import OpOverload

        checked = OpOverload.py_impl

        def py_impl(operator: OpOverload, key: Any) -> Callable[[Any], Any]:
            def register(kernel: Any) -> Any:
                operator.py_kernels[key] = kernel
                operator._dispatch_cache.clear()
                return kernel

            return register if isinstance(key, DispatchKey) else checked(operator, key)

        OpOverload.py_impl = py_impl
    with contextlib.suppress(ImportError, AttributeError):
        from torch._export import utils

        utils._materialize_cpp_cia_ops = functools.cache(utils._materialize_cpp_cia_ops)
    with contextlib.suppress(ImportError, AttributeError):
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        build = functools.cache(ONNXRegistry.from_torchlib)

        def from_torchlib(cls: type[ONNXRegistry], *arguments: Any, **options: Any) -> ONNXRegistry:
            built, table = build(*arguments, **options), cls()
            vars(table).update(vars(built))
            table.functions = {operator: list(ways) for operator, ways in built.functions.items()}
            return table

        ONNXRegistry.from_torchlib = classmethod(from_torchlib)


@pytest.fixture(scope="session")
def openvino() -> None:
    """device="openvino" is usable in this process."""
    if importlib.util.find_spec("onnxruntime_ep_openvino") is None:
        pytest.skip("onnxruntime-ep-openvino is not installed")
    present_the_processor_as_intel()
    assert plugins.why_not_openvino() is None


def present_the_processor_as_intel() -> None:
    """The plug-in offers only Intel's processors, though OpenVINO runs on every x86-64. On another maker's, change the
    vendor in onnxruntime's own record of the processor, so that the real provider runs in these tests."""
    processor = import_engine().get_ep_devices()[0].device
    if processor.vendor_id == INTEL:
        return
    # A pybind11 object: reference count, type, then the pointer to OrtHardwareDevice {type, vendor_id, ...}.
    record = (ctypes.c_uint32 * 2).from_address(ctypes.c_void_p.from_address(id(processor) + 16).value or 0)
    if platform.machine() not in ("x86_64", "AMD64") or record[1] != processor.vendor_id:
        pytest.skip("this processor cannot be shown to the plug-in as Intel's")
    record[1] = INTEL
    if plugins._register_openvino.cache_info().currsize:  # an earlier test registered the plug-in, which saw no device
        import_engine().unregister_execution_provider_library(plugins.OPENVINO)
        plugins._register_openvino.cache_clear()


@pytest.fixture
def terminate() -> Iterator[Callable[..., str]]:
    """Send a command SIGTERM once so many processes run below it: it has to end soon, and they with it.

    -> what is left of its stderr.
    """
    psutil = pytest.importorskip("psutil")
    started: list[Any] = []

    def end(process: subprocess.Popen[str], least: int = 1) -> str:
        started.append(psutil.Process(process.pid))
        while len(below := started[0].children(recursive=True)) < least:
            assert process.poll() is None
        started.extend(below)
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=20)
        _, alive = psutil.wait_procs(below, timeout=5)
        assert alive == []
        return stderr or ""

    yield end
    for one in started:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
