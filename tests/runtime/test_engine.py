"""Builds of onnxruntime that are installed over each other; whose an error is."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from vae_runtime import VAE, DeviceError
from vae_runtime import cuda as cuda_module
from vae_runtime import engine as module
from vae_runtime.cli import main
from vae_runtime.cuda import CUDA
from vae_runtime.devices import CPU, find_device
from vae_runtime.engine import engine_clash, first_line, is_engine_error

DLL_MISSING = "DLL load failed while importing onnxruntime_pybind11_state: The specified module could not be found."
REDISTRIBUTABLE = "; install the current Microsoft Visual C++ Redistributable (x64)"


def site(folder: Path, *names: str) -> Path:
    """A folder of packages with an onnxruntime in it, and what says that these were installed."""
    (folder / "onnxruntime").mkdir()
    (folder / "onnxruntime" / "__init__.py").write_text("")
    for name in names:
        (folder / f"{name}.dist-info").mkdir()
    return folder


def engine_in(folder: Path, monkeypatch: pytest.MonkeyPatch, providers: list[str]) -> None:
    fake = SimpleNamespace(
        __file__=str(folder / "onnxruntime" / "__init__.py"), get_available_providers=lambda: providers
    )
    for where in (module, cuda_module):
        monkeypatch.setattr(where, "import_engine", lambda: fake)


def test_one_build_is_no_clash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("onnxruntime-1.31.1", "onnxruntime_ep_openvino-1.8.1", "onnxruntime_extensions-0.14.0", "numpy-2.4.0")
    engine_in(site(tmp_path, *names), monkeypatch, [CPU])
    assert engine_clash() is None


def test_two_builds_are_named_with_the_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine_in(site(tmp_path, "onnxruntime-1.31.1", "onnxruntime_gpu-1.30.0"), monkeypatch, [CPU])
    assert engine_clash() == (
        "onnxruntime 1.31.1 and onnxruntime-gpu 1.30.0 are installed over each other, and only one of them works; run:"
        ' pip uninstall -y onnxruntime onnxruntime-gpu, then: pip install "vae-edge[gpu]"'
    )
    monkeypatch.setattr(cuda_module, "find_gpus", lambda: ((), "there is none"))
    with pytest.raises(DeviceError, match=r"has no CUDA provider; onnxruntime 1\.31\.1 and onnxruntime-gpu 1\.30"):
        find_device("cuda")


def test_loading_warns_of_a_clash(tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vae_runtime.vae.engine_clash", lambda: "two of them")
    with pytest.warns(RuntimeWarning, match="two of them"):
        VAE.load(tiny_path).close()


def test_info_tells_of_a_clash(tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vae_runtime.cli.engine_clash", lambda: "two of them")
    assert "WARNING     two of them" in CliRunner().invoke(main, ["info", str(tiny_path)]).stdout


def test_the_real_engine_is_found(python: Any) -> None:
    """In its folder of packages, not in a copy of this test's making."""
    found = module._installed(Path(module.import_engine().__file__).parent.parent)
    assert list(found.values()) == [module.import_engine().__version__]


def test_engine_whose_files_another_took_along_is_refused_with_the_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left then is a folder without `__init__.py`, which Python imports as an empty package."""
    (tmp_path / "onnxruntime" / "capi").mkdir(parents=True)
    (tmp_path / "onnxruntime_gpu-1.31.1.dist-info").mkdir()
    left = ModuleType("onnxruntime")
    left.__path__ = [str(tmp_path / "onnxruntime")]
    monkeypatch.setitem(sys.modules, "onnxruntime", left)
    with pytest.raises(DeviceError) as caught:
        module.import_engine()
    assert str(caught.value).startswith(f"the installed onnxruntime is incomplete: {tmp_path / 'onnxruntime'} holds")
    assert str(caught.value).endswith('run: pip uninstall -y onnxruntime-gpu, then: pip install "vae-edge[gpu]"')


@pytest.mark.parametrize(("platform", "cure"), [("linux", ""), ("win32", REDISTRIBUTABLE)])
def test_engine_whose_library_cannot_be_loaded_is_refused_and_info_tells_the_rest(
    tmp_path: Path, tiny_path: Path, monkeypatch: pytest.MonkeyPatch, platform: str, cure: str
) -> None:
    (tmp_path / "onnxruntime.py").write_text(f"raise ImportError({DLL_MISSING!r}, name='onnxruntime_pybind11_state')")
    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(module, "sys", SimpleNamespace(platform=platform))
    refusal = f"the installed onnxruntime cannot be loaded: {DLL_MISSING}{cure}"
    with pytest.raises(DeviceError) as caught:
        VAE.load(tiny_path)
    assert str(caught.value) == refusal
    told = CliRunner().invoke(main, ["info", str(tiny_path)])
    assert (told.exit_code, "shape 4, prior standard_normal" in told.stdout) == (0, True)
    assert refusal in told.stdout
    assert "not installed" not in told.stdout


def test_engine_that_cannot_be_loaded_over_another_build_names_both(
    tmp_path: Path, tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "onnxruntime").mkdir()
    (tmp_path / "onnxruntime" / "__init__.py").write_text("from onnxruntime.capi._pybind_state import InferenceSession")
    for build in ("onnxruntime-1.32.0", "onnxruntime_gpu-1.31.1"):
        (tmp_path / f"{build}.dist-info").mkdir()
    for name in [name for name in sys.modules if name.partition(".")[0] == "onnxruntime"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(DeviceError) as caught:
        VAE.load(tiny_path)
    assert str(caught.value) == (
        "the installed onnxruntime cannot be loaded: No module named 'onnxruntime.capi'; onnxruntime 1.32.0 and"
        " onnxruntime-gpu 1.31.1 are installed over each other, and only one of them works; run: pip uninstall -y"
        ' onnxruntime onnxruntime-gpu, then: pip install "vae-edge[gpu]"'
    )


def test_the_redistributable_cures_no_missing_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "sys", SimpleNamespace(platform="win32"))
    assert module._cure_of(ModuleNotFoundError("No module named 'flatbuffers'")) == ""


def test_first_line_of_a_message() -> None:
    assert first_line(ValueError("\n one\ntwo")) == "one"
    assert first_line(ValueError()) == "ValueError"


def test_cuda_is_asked_for_where_the_other_build_won(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine_in(site(tmp_path, "onnxruntime-1.31.1"), monkeypatch, [CPU])
    with pytest.raises(DeviceError, match=r'has no CUDA provider; in a fresh environment run: pip install "vae'):
        find_device(CUDA)
    monkeypatch.setattr(cuda_module, "sys", SimpleNamespace(platform="darwin"))
    with pytest.raises(DeviceError, match=r"cannot be used: macOS has no CUDA$"):
        find_device(CUDA)


class OwnError(Exception):
    """An application's."""


@pytest.mark.parametrize(
    ("error", "is_engines"),
    [(RuntimeError("a"), True), (MemoryError(), True), (DeviceError("a"), True), (TimeoutError(), False),
     (OwnError(), False), (NameError("misspelt"), False), (TypeError("a"), False), (RecursionError(), False),
     (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "a message"), True), (IndexError("out_of_range"), True)],
)  # fmt: skip
def test_whose_an_error_is(error: Exception, is_engines: bool) -> None:
    assert is_engine_error(error) == is_engines


def test_memory_that_lacks_for_an_array_is_the_engine_s() -> None:
    with pytest.raises(MemoryError) as caught:
        np.empty(2**60, np.uint8)
    assert is_engine_error(caught.value)


def test_the_engine_s_own_errors_are_known(tiny: VAE) -> None:
    session = tiny._open_operations()[0].routes[0].any_batch._session
    with pytest.raises(Exception, match="rank") as caught:
        session.run(None, {session.get_inputs()[0].name: np.zeros((1, 2), np.float32)})
    assert is_engine_error(caught.value)


@contextlib.contextmanager
def handler_raises(error: type[Exception]) -> Iterator[None]:
    def handler(number: int, frame: object) -> None:
        raise error("too long")

    old = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)


def interrupted(*arguments: Any, **options: Any) -> None:
    """In place of compiled code, in which the signal comes."""
    signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("state", ["first call", "later call"])
@pytest.mark.parametrize("error", [TimeoutError, OwnError, RuntimeError, ValueError, MemoryError])
def test_what_a_signal_s_handler_raises_reaches_the_caller(
    tiny_path: Path, images: np.ndarray, monkeypatch: pytest.MonkeyPatch, state: str, error: type[Exception]
) -> None:
    """It may come while the engine is at work; the call is not made again, and the error is not called the engine's."""

    with VAE.load(tiny_path) as vae, handler_raises(error):
        operation = vae._open_operations()[0]
        if state == "later call":
            vae.encode(images[:2])
            ((call,),) = operation._kept._free.values()
            monkeypatch.setattr(call, "_run", interrupted)
        else:
            monkeypatch.setattr(operation.routes[0].any_batch, "_session", SimpleNamespace(run=interrupted))
        with pytest.raises(error, match="too long"):
            vae.encode(images[:2])


def test_so_it_does_while_graphs_are_opened_and_memory_is_asked_for(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for where, name in ((module.import_engine(), "InferenceSession"), (np, "empty"), (np, "zeros")):
        raises = pytest.raises(ValueError, match=r"^too long$")
        with monkeypatch.context() as patched, handler_raises(ValueError), raises:
            patched.setattr(where, name, interrupted)
            with VAE.load(tiny_path) as vae:
                vae.encode(np.full((1, 8, 8), 1, np.uint8))
                vae.sample(1, 0)


def test_of_a_page_about_cuda_what_its_libraries_say_is_shown_alone() -> None:
    said = "CUDA failure 35: CUDA driver version is insufficient for CUDA runtime version"
    text = (
        f"[ONNXRuntimeError] : 11 : EP_FAIL : /onnxruntime_src/cuda_call.cc:143 std::conditional_t<1> CudaCall() {said}"
        " ; GPU=0 ; hostname=here ; file=cuda_provider.cc ; line=1 ; expr=cudaSetDevice(id);\nmore"
    )
    assert first_line(RuntimeError(text)) == said
    assert first_line(RuntimeError("[ONNXRuntimeError] : 1 : FAIL : it is so\nand more")) == (
        "[ONNXRuntimeError] : 1 : FAIL : it is so"
    )
