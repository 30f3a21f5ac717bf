"""OpenVINO as the second real provider, through its plug-in."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from vae_runtime import VAE, BundleError, DeviceError, InputError, devices
from vae_runtime import plugins as module
from vae_runtime.devices import CPU, find_device, import_engine, usable_devices
from vae_runtime.plugins import OPENVINO, openvino_options

INTEL = 0x8086
has_plugin = importlib.util.find_spec("onnxruntime_ep_openvino") is not None
with_plugin = pytest.mark.skipif(not has_plugin, reason="onnxruntime-ep-openvino is not installed")


@pytest.mark.parametrize("name", ["tiny", "rgb", "vectors"])
def test_fp32_is_fp32(openvino: None, name: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(f"{name}_path")
    with VAE.load(path, device="openvino") as vae, VAE.load(path) as cpu:
        assert (vae.device, vae.precision) == ("openvino", "fp32")
        assert vae.plan["encode"][0]["provider"] == OPENVINO
        result = vae.selftest()
        assert result.passed
        assert result.tolerance == 1e-4
        golden = vae.golden()
        for batch in (1, 3, 40, 300):
            x = np.resize(golden["x"], (batch, *golden["x"].shape[1:]))
            np.testing.assert_allclose(vae.encode(x).mean, cpu.encode(x).mean, atol=2e-6)
            np.testing.assert_allclose(vae.reconstruct(x), cpu.reconstruct(x), atol=2e-6)


def test_every_node_runs_on_openvino(openvino: None, tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = import_engine()
    if not hasattr(engine.InferenceSession, "get_provider_graph_assignment_info"):
        pytest.skip("this onnxruntime does not tell which provider runs which node")
    plain = engine.SessionOptions

    def recording() -> Any:
        options = plain()
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        return options

    monkeypatch.setattr(engine, "SessionOptions", recording)
    with VAE.load(tiny_path, device="openvino") as vae:
        for operation in vae._open_operations():
            parts = operation.routes[0].any_batch._session.get_provider_graph_assignment_info()
            assert {part.ep_name for part in parts} == {OPENVINO}
            assert sum(len(part.get_nodes()) for part in parts) > 1


def test_warmup_makes_sessions_for_just_these_batch_sizes(openvino: None, tiny_path: Path) -> None:
    with VAE.load(tiny_path, device="openvino") as vae, VAE.load(tiny_path) as cpu:
        vae.warmup([3, 1])
        vae.warmup([3])
        for operation, routes in vae.plan.items():
            assert [route["fixed_batches"] for route in routes] == [[1, 3]], operation
        route, shape = vae._open_operations()[0].routes[0], vae.manifest.input.example_shape
        shapes = [route.session((batch, *shape))._session.get_inputs()[0].shape for batch in (1, 2, 3)]
        assert [shape[0] for shape in shapes] == [1, "batch", 3]
        golden = vae.golden()["x"]
        for batch in (1, 2, 3, 4, 300):
            x = np.resize(golden, (batch, *golden.shape[1:]))
            np.testing.assert_allclose(vae.encode(x).mean, cpu.encode(x).mean, atol=2e-6)
            np.testing.assert_allclose(vae.reconstruct(x), cpu.reconstruct(x), atol=2e-6)


def test_warmup_for_a_large_batch_takes_its_chunks(openvino: None, tiny_path: Path) -> None:
    with VAE.load(tiny_path, device="openvino") as vae:
        vae.warmup([256 + 44, 512])
        assert vae.plan["encode"][0]["fixed_batches"] == [44, 256]


def test_warmup_reads_the_graph_again_and_checks_it(openvino: None, bundle: Path) -> None:
    with VAE.load(bundle, device="openvino") as vae:
        data = bytearray((bundle / "decoder.onnx").read_bytes())
        data[len(data) // 2] ^= 1
        (bundle / "decoder.onnx").write_bytes(data)
        with pytest.raises(BundleError, match=r"decoder\.onnx was altered"):
            vae.warmup([2])
        assert vae.decode(np.zeros((2, *vae.manifest.latent.shape), np.float32)).shape[0] == 2


def test_graph_that_it_cannot_run_as_a_whole_is_refused(openvino: None, bundle: Path, resign: Any) -> None:
    """A node that OpenVINO does not know would run on the CPU unnoticed."""
    onnx = pytest.importorskip("onnx")
    model = onnx.load(bundle / "encoder.onnx")
    for node in model.graph.node:
        node.output[:] = ["before" if name == "mean" else name for name in node.output]
    # One axis more and one less, the first by an operator that is onnxruntime's own.
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(0, np.int32), "zero"))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([0], np.int64), "axes"))
    model.graph.node.append(onnx.helper.make_node("ExpandDims", ["before", "zero"], ["more"], domain="com.microsoft"))
    model.graph.node.append(onnx.helper.make_node("Squeeze", ["more", "axes"], ["mean"]))
    model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    resign(bundle, encoder=model.SerializeToString())
    with VAE.load(bundle) as vae:
        assert vae.selftest().passed  # the CPU has it
    with pytest.raises(DeviceError, match=r"device 'openvino' cannot run encoder.onnx: "):
        VAE.load(bundle, device="openvino")


def test_bf16_runs_where_the_processor_has_it_and_is_refused_elsewhere(openvino: None, tiny_path: Path) -> None:
    able = module._metadata(module._openvino_cpu())["OPTIMIZATION_CAPABILITIES"].split()
    if "BF16" not in able:
        with pytest.raises(
            DeviceError, match="precision 'bf16' is not to be had on device 'openvino': this processor has FP32"
        ):
            VAE.load(tiny_path, device="openvino", precision="bf16")
        return
    with VAE.load(tiny_path, device="openvino", precision="bf16") as vae, VAE.load(tiny_path) as cpu:
        assert vae.plan["decode"][0]["precision"] == "bf16"
        x = vae.golden()["x"]
        assert 1e-6 < np.abs(vae.reconstruct(x) - cpu.reconstruct(x)).max() < 5e-2  # really less exact


def test_bf16_where_it_is_told_to_be_there_asks_openvino_for_it() -> None:
    config = json.loads(openvino_options("bf16", 2, {})["load_config"])["CPU"]
    assert config == {"INFERENCE_PRECISION_HINT": "bf16", "INFERENCE_NUM_THREADS": "2", "NUM_STREAMS": "1"}


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_everything_else_asks_for_float32(precision: str) -> None:
    config = json.loads(openvino_options(precision, None, {})["load_config"])["CPU"]
    assert config == {"INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": "1"}


def test_bf16_is_not_to_be_had_on_the_cpu_provider(tiny_path: Path) -> None:
    with pytest.raises(DeviceError, match="precision 'bf16' is not to be had on device 'cpu'; it is run by: OpenVINO"):
        VAE.load(tiny_path, precision="bf16")


def test_options_reach_the_provider(openvino: None, tiny_path: Path) -> None:
    def load(config: str) -> None:
        VAE.load(tiny_path, device="openvino", provider_options={"load_config": config}).close()

    load('{"CPU": {"ENABLE_CPU_PINNING": "NO"}}')
    with pytest.raises(
        DeviceError, match=r"device 'openvino' cannot run encoder\.onnx with the options .*NO_SUCH_PROPERTY.*: "
    ):
        load('{"CPU": {"NO_SUCH_PROPERTY": "1"}}')
    for name in ("INFERENCE_PRECISION_HINT", "INFERENCE_NUM_THREADS", "NUM_STREAMS"):
        with pytest.raises(InputError, match=f"load_config sets {name} to '1'; device, precision and threads decide"):
            load(json.dumps({"CPU": {name: "1"}}))
    for text in ("no json", "[]", '{"CPU": 1}', "1", "{}", '{"GPU": {}}', '{"CPU": {}, "GPU": {}}'):
        with pytest.raises(InputError, match=r"load_config is .*; expected JSON such as"):
            load(text)


@pytest.mark.parametrize("name", ["device_type", "precision", "num_of_threads", "num_streams"])
def test_options_that_would_contradict_the_arguments_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=f"provider_options sets {name} to 'GPU'; device, precision and threads"):
        openvino_options("fp32", 2, {name: "GPU"}, compiled_in=True)


def test_threads_are_what_was_asked_for(openvino: None, tiny_path: Path) -> None:
    with VAE.load(tiny_path, device="openvino", threads=1) as vae:
        assert vae.plan["encode"][0]["threads"] == 1
        assert vae.selftest().passed


@with_plugin
def test_other_makers_processors_are_refused_in_words(python: Any, tiny_path: Path) -> None:
    code = "import onnxruntime; print(onnxruntime.get_ep_devices()[0].device.vendor_id)"
    if int(python(code).stdout) == INTEL:  # asked in a fresh process: in this one it may have been changed
        pytest.skip("this is an Intel processor")
    result = python(f"from vae_runtime import VAE; VAE.load({str(tiny_path)!r}, device='openvino')")
    assert "DeviceError: device 'openvino' cannot be used: its plug-in offers no processor here" in result.stderr
    assert result.stdout == ""


def test_build_with_openvino_compiled_in_needs_no_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = SimpleNamespace(get_available_providers=lambda: [OPENVINO, CPU])
    for where in (devices, module):
        monkeypatch.setattr(where, "import_engine", lambda: engine)
    device = find_device("openvino")
    assert device.plugin is None
    options = device.session_options(2, False, "")
    assert options["device_type"] == "CPU"
    assert json.loads(options["load_config"])["CPU"]["INFERENCE_PRECISION_HINT"] == "f32"
    with pytest.raises(DeviceError, match="precision 'bf16' is not to be had on device 'openvino': only the plug-in"):
        find_device("openvino", "bf16")


def test_missing_plugin_is_answered_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(module, "_has_plugin_package", lambda: True)
    advice = r'its plug-in is not installed; run: pip install "vae-edge\[openvino\]"'
    with pytest.raises(DeviceError, match=rf"device 'openvino' cannot be used: {advice}"):
        find_device("openvino")
    assert "vae-edge[openvino]" in str(usable_devices()["openvino"])


@pytest.mark.parametrize(
    ("system", "machine", "advice"),
    [
        ("linux", "x86_64", "pip install"),
        ("win32", "AMD64", "pip install"),
        ("linux", "aarch64", "x86-64 Linux and Windows only"),
        ("win32", "ARM64", "x86-64 Linux and Windows only"),
        ("darwin", "x86_64", "x86-64 Linux and Windows only"),
    ],
)
def test_the_plugin_is_advised_only_where_the_extra_brings_it(
    system: str, machine: str, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(module, "sys", SimpleNamespace(platform=system))
    monkeypatch.setattr("platform.machine", lambda: machine)
    assert advice in str(usable_devices()["openvino"])


@with_plugin
def test_plugin_that_does_not_load_is_a_device_error(python: Any) -> None:
    code = """
import onnxruntime_ep_openvino as plugin
plugin.get_library_path = lambda: "/nowhere/libplugin.so"
from vae_runtime.devices import find_device
find_device("openvino")
"""
    result = python(code)
    assert "DeviceError: device 'openvino' cannot be used: its plug-in could not be loaded: " in result.stderr


def test_same_device_by_onnxruntimes_name(openvino: None) -> None:
    assert find_device(OPENVINO).name == find_device("openvino").name == "openvino"


def test_images_of_any_size(openvino: None, free_path: Path) -> None:
    rng = np.random.default_rng(0)
    with VAE.load(free_path, device="openvino") as vae, VAE.load(free_path) as cpu:
        vae.warmup([1, 2], size=(20, 24))
        for size in ((12, 16), (20, 24), (6, 30)):
            x = rng.random((2, 3, *size), dtype=np.float32)
            np.testing.assert_allclose(vae.encode(x).mean, cpu.encode(x).mean, atol=2e-6)
            np.testing.assert_allclose(vae.reconstruct(x), cpu.reconstruct(x), atol=2e-6)
        assert vae.plan["decode"][0]["fixed_batches"] == [1, 2]
        fixed = vae._open_operations()[1].routes[0].session((2, 2, 10, 12))._session.get_inputs()[0].shape
        assert fixed == [2, 2, 10, 12]
