from __future__ import annotations

import contextlib
import copy
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from vae_runtime import VAE, DeviceError, InputError, MissingExtraError, cuda, plugins
from vae_runtime import devices as module
from vae_runtime import engine as engine_module
from vae_runtime.cuda import CUDA, Gpu, why_not_cuda
from vae_runtime.devices import CPU, find_device, usable_devices
from vae_runtime.engine import import_engine
from vae_runtime.manifest import Manifest
from vae_runtime.plan import _file_of, check_precision

HAS_CUDA = why_not_cuda() is None
without_gpu = pytest.mark.skipif(HAS_CUDA, reason="this machine has a usable GPU")


def fake_engine(monkeypatch: pytest.MonkeyPatch, providers: list[str], gpus: int, reason: str | None = None) -> None:
    """An onnxruntime that was built with these providers, on a machine with so many GPUs."""
    fake = SimpleNamespace(
        get_available_providers=lambda: providers, __version__="1.22.0", __file__="/nowhere/onnxruntime/__init__.py"
    )
    found = tuple(Gpu(f"number {index}", 2**30, "9.0") for index in range(gpus))
    for where in (module, cuda, engine_module, plugins):
        monkeypatch.setattr(where, "import_engine", lambda: fake)
    monkeypatch.setattr(cuda, "find_gpus", lambda: (found, reason))
    monkeypatch.setattr(cuda, "_missing_tensorrt", lambda: "not there")
    monkeypatch.setattr(cuda, "_loaded_providers", {cuda.CUDA, cuda.TENSORRT})


def test_cpu_by_either_name() -> None:
    assert find_device("cpu") == find_device("CPUExecutionProvider")
    assert (find_device("cpu").name, find_device("cpu").provider) == ("cpu", CPU)


@without_gpu
def test_auto_is_the_cpu_and_says_so(tiny_path: Path) -> None:
    with VAE.load(tiny_path, device="auto") as vae:
        assert vae.device == "cpu"
        assert vae.plan["encode"][0]["provider"] == CPU


@without_gpu
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:7", CUDA])
def test_cuda_without_a_gpu_build_is_refused_in_words(tiny_path: Path, device: str, capfd: Any) -> None:
    message = r"device 'cuda:?\d?.*' cannot be used: this build of onnxruntime has no CUDA provider; .*vae-edge\[gpu\]"
    if device == CUDA:
        message = message.replace("cuda:?\\d?.*", CUDA)
    if CUDA in import_engine().get_available_providers():
        message = "cannot be used: .*NVIDIA driver"
    with pytest.raises(DeviceError, match=message):
        VAE.load(tiny_path, device=device)
    assert capfd.readouterr() == ("", "")


def test_cuda_build_on_a_machine_without_a_driver_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_engine(monkeypatch, [CUDA, CPU], 0, "no NVIDIA driver is installed on this machine (libcuda was not found)")
    for name in ("cuda", "cuda:1", CUDA):
        with pytest.raises(DeviceError, match=r"cannot be used: no NVIDIA driver is installed on this machine"):
            find_device(name)
    assert find_device("auto").name == "cpu"


def test_gpus_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_engine(monkeypatch, [CUDA, CPU], 2)
    assert find_device("auto").name == "cuda:0"
    assert find_device("cuda:1").options == {"device_id": "1", "use_tf32": "0"}
    assert find_device("cuda", "tf32").options == {"device_id": "0", "use_tf32": "1"}
    with pytest.raises(DeviceError, match="device 'cuda:2' cannot be used: there is no GPU 2; this machine has 2"):
        find_device("cuda:2")
    usable = usable_devices()
    assert (usable["cpu"], usable["cuda"]) == (None, None)
    assert "takes no plug-ins" in str(usable["openvino"]) or "not installed" in str(usable["openvino"])


def test_session_that_opens_elsewhere_than_asked_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tiny_path: Path, capfd: Any
) -> None:
    """The check after the session is open, with a provider that is listed and quietly not used."""
    engine = import_engine()
    real = engine.InferenceSession
    fake_engine(monkeypatch, [CUDA, CPU], 1)
    monkeypatch.setattr(engine, "InferenceSession", lambda m, o, **_: real(m, providers=[CPU]))
    monkeypatch.setattr("vae_runtime.session.made_current", lambda memory: contextlib.nullcontext())
    with pytest.raises(DeviceError, match=f"device 'cuda:0' cannot be used: onnxruntime opened .* on {CPU} instead"):
        VAE.load(tiny_path, device="cuda")
    assert capfd.readouterr() == ("", "")


def test_listed_provider_that_cannot_run_the_graph_is_an_error_and_prints_nothing(tiny_path: Path, capfd: Any) -> None:
    name = "AzureExecutionProvider"
    if name not in import_engine().get_available_providers():
        pytest.skip("this build of onnxruntime has no such provider")
    with pytest.raises(DeviceError, match=f"device '{name}' cannot"):
        VAE.load(tiny_path, device=name)
    assert capfd.readouterr() == ("", "")


def test_provider_that_is_not_in_this_build_is_refused_with_those_that_are(capfd: Any) -> None:
    with pytest.raises(
        DeviceError, match=f"device 'NoSuchExecutionProvider' cannot be used: this build .* has .*{CPU}"
    ):
        find_device("NoSuchExecutionProvider")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["gpu", "", "CPU", "cuda:", "cuda:-1", "cuda:1000", "cuda:x", "cpu ", "cuda:0\n"])
def test_unknown_names_are_an_input_error(tiny_path: Path, name: str) -> None:
    with pytest.raises(
        InputError, match=r"device is '.*'; expected 'cpu', 'cuda', 'cuda:N', 'tensorrt', 'openvino', 'auto' or"
    ):
        VAE.load(tiny_path, device=name)


@pytest.mark.parametrize("name", [None, 0, ["cpu"], b"cpu"])
def test_names_that_are_no_string_are_an_input_error(tiny_path: Path, name: Any) -> None:
    with pytest.raises(InputError, match=r"device is .*; expected a string such as 'cpu'"):
        VAE.load(tiny_path, device=name)


@pytest.mark.parametrize(("precision", "able"), [("tf32", CUDA), ("bf16", "OpenVINOExecutionProvider")])
def test_precision_that_a_device_cannot_run_is_refused(tiny_path: Path, precision: str, able: str) -> None:
    with pytest.raises(DeviceError, match=f"precision '{precision}' is not to be had on device 'cpu'; .*by: {able}"):
        VAE.load(tiny_path, precision=precision)


def test_missing_engine_is_answered_with_the_extra(python: Any, tiny_path: Path) -> None:
    code = """
import sys
sys.modules["onnxruntime"] = None
from vae_runtime import VAE, MissingExtraError
try: VAE.load(sys.argv[1])
except MissingExtraError as error: print(error, error.extra)
"""
    result = python(code, tiny_path)
    cure = 'pip install "vae-edge[cpu]"'
    assert result.stdout == f"running a bundle needs onnxruntime, which is not installed; run: {cure} cpu\n"


def test_broken_engine_shows_its_own_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str, *rest: Any) -> Any:
        raise ImportError("libstdc++.so.6: version not found", name="onnxruntime.capi")

    monkeypatch.delitem(__import__("sys").modules, "onnxruntime")
    monkeypatch.setattr("builtins.__import__", broken)
    with pytest.raises(DeviceError, match=r"cannot be loaded: libstdc\+\+\.so\.6: version not found$"):
        import_engine()


def test_an_extra_that_is_missing_is_told_across_processes() -> None:
    error = MissingExtraError("Pillow", "images", "reading a.png")
    for copied in (pickle.loads(pickle.dumps(error)), copy.deepcopy(error)):
        assert (str(copied), copied.extra, type(copied)) == (str(error), "images", MissingExtraError)


def test_results_of_a_provider_by_name_are_those_of_its_short_name(tiny_path: Path, images: np.ndarray) -> None:
    with VAE.load(tiny_path, device=CPU) as named, VAE.load(tiny_path) as short:
        assert named.device == "cpu"
        assert np.array_equal(named.encode(images).mean, short.encode(images).mean)


# --- a provider's own options -----------------------------------------------------------------------------------------


def test_options_are_handed_to_the_provider(monkeypatch: pytest.MonkeyPatch, tiny_path: Path) -> None:
    engine = import_engine()
    seen: list[Any] = []

    def open_session(model: bytes, options: Any, **arguments: Any) -> Any:
        seen.append(arguments["providers"])
        raise engine.capi.onnxruntime_pybind11_state.Fail("not here")

    fake_engine(monkeypatch, [CPU, "CoreMLExecutionProvider"], 0)
    monkeypatch.setattr(engine, "InferenceSession", open_session)
    with pytest.raises(
        DeviceError,
        match=r"device 'CoreMLExecutionProvider' cannot run encoder\.onnx with the options .*MLProgram.*: not",
    ):
        VAE.load(tiny_path, device="CoreMLExecutionProvider", provider_options={"ModelFormat": "MLProgram"})
    assert seen == [[("CoreMLExecutionProvider", {"ModelFormat": "MLProgram"})]]


@pytest.mark.parametrize("options", [{"device_id": 1}, {1: "1"}, [("a", "b")], "device_id=1", 5])
def test_options_that_are_no_strings_are_an_input_error(tiny_path: Path, options: Any) -> None:
    with pytest.raises(InputError, match=r"provider_options is .*; expected names and values that are strings"):
        VAE.load(tiny_path, provider_options=options)


def test_options_that_contradict_the_device_are_an_input_error(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_engine(monkeypatch, [CUDA, CPU], 2)
    assert find_device("cuda", options={"gpu_mem_limit": "1000"}).options["gpu_mem_limit"] == "1000"
    with pytest.raises(InputError, match="provider_options sets device_id to '1'; device and precision decide that"):
        find_device("cuda:0", options={"device_id": "1"})


def test_a_bias_is_fused_with_the_channels_last_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_engine(monkeypatch, [CUDA, CPU], 1)
    for options in ({"fuse_conv_bias": "1"}, {"fuse_conv_bias": "True", "prefer_nhwc": "0"}):
        with pytest.raises(InputError, match=r"sets fuse_conv_bias to '(1|True)' without prefer_nhwc; onnxruntime "):
            find_device("cuda", options=options)
    for options in ({"fuse_conv_bias": "0"}, {"fuse_conv_bias": "1", "prefer_nhwc": "1"}):
        assert find_device("cuda", options=options).options.items() >= options.items()


def test_cpu_provider_takes_no_options_and_would_ignore_them(tiny_path: Path) -> None:
    with pytest.raises(InputError, match=r"provider_options is \{'arena': '1'\}; the CPU provider has none"):
        VAE.load(tiny_path, provider_options={"arena": "1"})


def test_tf32_runs_files_of_its_own_where_the_bundle_has_them_and_else_those_of_fp32(manifest_data: Any) -> None:
    data = manifest_data()
    plain = Manifest._from_dict(data, 1)
    check_precision("tf32", plain)
    assert [_file_of(plain, name, "tf32") for name in ("encode", "decode")] == [
        ("encoder.onnx", "tf32"),
        ("decoder.onnx", "tf32"),
    ]
    data["precisions"]["tf32"] = {"encoder": "encoder.tf32.onnx", "decoder": "decoder.onnx"}
    data["files"]["encoder.tf32.onnx"] = data["files"]["encoder.onnx"]
    own = Manifest._from_dict(data, 1)
    check_precision("tf32", own)
    assert _file_of(own, "encode", "tf32") == ("encoder.tf32.onnx", "tf32")
    assert _file_of(own, "decode", "tf32") == ("decoder.onnx", "tf32")
    assert _file_of(own, "encode", "fp32") == ("encoder.onnx", "fp32")
    assert _file_of(own, "encode", "bf16") == ("encoder.onnx", "bf16")
