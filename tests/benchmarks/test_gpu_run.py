"""`benchmarks/gpu/run.py` on the CPU: each check finds what it is there for, and the run survives what goes wrong."""

from __future__ import annotations

import contextlib
import dataclasses
import getpass
import io
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

import vae_runtime.devices
from vae_benchmarks.race import Case
from vae_benchmarks.race.entrant import CannotRunError
from vae_benchmarks.race.peers.ours import open_entrant
from vae_runtime import VAE, DeviceError, OutOfMemoryError
from vae_runtime.cuda import why_not_cuda
from vae_runtime.device_array import DeviceArray, copy_to_device
from vae_runtime.devices import find_device
from vae_runtime.fidelity import golden_error

GPU = Path(__file__).parents[2] / "benchmarks" / "gpu"
with pytest.MonkeyPatch.context() as _path:
    _path.syspath_prepend(GPU)
    import checks
    import child
    import graph_edits
    import kernels
    import report_text
    import run
    import steps
    import timings
    import variations
    from findings import Findings, Job

EVERY_STEP_BUT_THE_RACE = ",".join(name for name in run.STEPS if name != "race")


def gpu_run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, GPU / "run.py", *arguments]
    environment = {
        name: value for name, value in os.environ.items() if name != "PYTHONPATH"
    }  # as from a fresh checkout
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, env=environment, cwd="/"
    )


@pytest.fixture(scope="module")
def whole(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("gpu")
    options = ("--device", "cpu", "--quick", "--steps", EVERY_STEP_BUT_THE_RACE)
    done = gpu_run("--case", tiny, *options, "--output", folder / "found" / "cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads((folder / "found" / "cpu.json").read_text())
    return SimpleNamespace(
        document=document,
        units={unit["step"]: unit for unit in document["units"]},
        markdown=(folder / "found" / "cpu.md").read_text(),
        stdout=done.stdout,
        folder=folder,
    )


def test_another_order_of_packages_is_no_other_environment() -> None:
    def unit(part: str, versions: dict[str, str]) -> dict[str, Any]:
        return {"step": "environment", "case": part, "status": "passed", "figures": {"versions": versions}}

    one, turned, other = {"numpy": "2", "torch": "3"}, {"torch": "3", "numpy": "2"}, {"numpy": "2", "torch": "4"}
    text = report_text.environment({"units": [unit("part 1", one), unit("part 2", turned), unit("part 3", other)]})
    assert text == "## Machine\n\n- part 1: numpy 2, torch 3\n- part 3: numpy 2, torch 4\n"


def test_ways_are_shown_with_what_was_tried() -> None:
    way = {"precision": "fp32", "operation": "encode", "shape": [8, 3, 64, 64], "cuda_graph": True}
    way |= {"layout": "NHWC", "bias": "fused", "copies": "captured", "zero_copy": True, "on_device": True}
    way |= {"trials": {"NHWC": 0.81, "pinned": "no memory\nto pin"}}
    plain = {**way, "operation": "decode", "cuda_graph": False, "layout": "NCHW", "bias": None, "trials": {}}
    plain |= {"copies": "pageable", "zero_copy": False, "on_device": False}
    figures = {"ways": [way, plain], "memory": {"each its own": 3 * 2**20, "one for both": 2**21}}
    unit = {"step": "ways", "case": "conv64", "figures": figures}
    text = report_text.ways([unit, {"step": "golden", "case": "conv64", "figures": {}}])
    rows = [line for line in text.splitlines() if line.startswith("| conv64")]
    assert rows == [
        "| conv64 | fp32 | encode | 8x3x64x64 | CUDA graph | NHWC, fused | captured, outputs written | graph |"
        " NHWC 0.81; pinned: no memory to pin |",
        "| conv64 | fp32 | decode | 8x3x64x64 | kernel by kernel | NCHW | pageable | session for any batch | – |",
    ]
    assert text.endswith("reconstructing 32 examples; pools of memory: each its own 3 MiB, one for both 2 MiB.")
    assert report_text.ways([{"step": "ways", "case": "x", "figures": {"ways": []}}]) == ""


@pytest.mark.skipif(why_not_cuda() is not None, reason=f"no usable GPU: {why_not_cuda()}")
def test_ways_and_memory_on_the_gpu(tiny: Path) -> None:
    stream = io.StringIO()
    timings.ways(Findings(stream), Job("cuda", Case.open(tiny), quick=True))
    lines = child.parse_lines(stream.getvalue())
    figures = {line["figure"]: line["value"] for line in lines if "figure" in line}
    assert [line for line in lines if "check" in line] == []  # nothing failed
    assert {(way["precision"], way["operation"]) for way in figures["ways"]} == {
        (precision, operation) for precision in ("fp32", "tf32") for operation in ("encode", "decode")
    }
    assert all(way["cuda_graph"] and "captured" in way["trials"] for way in figures["ways"])
    own, one = figures["memory"]["each its own"], figures["memory"]["one for both"]
    assert own >= one > 2**16


def test_every_step_passes_on_the_cpu(whole: SimpleNamespace) -> None:
    status = {step: unit["status"] for step, unit in whole.units.items()}
    skipped = ("memory", "ways", "variations", "bench-tf32", "bench-fp16")
    assert status == {
        "environment": "passed",
        **{step: "skipped" if step in skipped else "passed" for step in run.STEPS if step != "race"},
    }
    counts = {step: len(unit["checks"]) for step, unit in whole.units.items()}
    assert (counts["golden"], counts["fidelity"], counts["concurrency"]) == (3, 4, 3)
    assert counts["calls"] == 2 * 4 * (5 + 4 + 2 + 1) + 5
    names = {check["check"] for check in whole.units["calls"]["checks"]}
    assert {"cold batch 1 host sample", "warm batch 32 device reconstruct", "torch shares the memory"} <= names


def test_what_the_cpu_has_not_is_skipped_with_the_reason(whole: SimpleNamespace) -> None:
    assert whole.units["golden"]["skipped"] == {
        "tf32": "tf32 is arithmetic of NVIDIA GPUs, which the CPU has not",
        "fp16": "the bundle has no fp16; it has fp32",
    }
    assert "memory" in whole.units["memory"]["skipped"]
    assert "- memory, tiny: memory: the CPU has no memory of its own, and no limit for it" in whole.markdown


def test_what_the_export_refused_is_skipped_with_its_reason(tiny: Path) -> None:
    case = Case.open(tiny)
    refusing = dataclasses.replace(case, manifest=case.manifest._replace(refused={"tf32": {"reason": "it loses 9 dB"}}))
    assert Job("cuda", refusing, True).why_not("tf32") == "the export refused it: it loses 9 dB"
    assert Job("cuda", case, True).why_not("tf32") is None
    with pytest.raises(CannotRunError, match="the export refused tf32: it loses 9 dB"):
        open_entrant(refusing, 1, 1, "cpu", "tf32")


def test_the_figures_are_there(whole: SimpleNamespace) -> None:
    rows = whole.units["overhead"]["figures"]["rows"]
    assert [row["what"] for row in rows] == [
        f"{operation}, batch 2, {place}" for operation in ("encode", "decode") for place in ("host", "device")
    ]
    assert all(row["low"] <= row["ratio"] <= row["high"] for row in rows)
    report = whole.units["bench-fp32"]["figures"]["bench"]
    assert [row["operation"] for row in report["latency"] if row["split"]] == ["encode"]


def test_the_report_for_people(whole: SimpleNamespace) -> None:
    for heading in ("Machine", "Verdicts", "What failed", "Errors", "The runtime's own cost", "Latency"):
        assert f"## {heading}\n" in whole.markdown
    assert "| golden | 3 of 3 |" in whole.markdown
    assert "| calls | 101 of 101 |" in whole.markdown
    assert "| bench-tf32 | skipped |" in whole.markdown
    assert "Nothing.\n" in whole.markdown
    assert "host to device" in whole.markdown
    assert "golden tiny: passed, 3 checks" in whole.stdout


def test_it_tells_nothing_about_the_user(whole: SimpleNamespace) -> None:
    text = json.dumps(whole.document) + whole.markdown
    for private in (str(GPU.parents[1]), str(whole.folder), f'"{getpass.getuser()}"', sys.prefix):
        assert private not in text


# --- each check finds what it is there for ----------------------------------------------------------------------------


@pytest.fixture
def job(tiny: Path) -> Job:
    return Job("cpu", Case.open(tiny), True, budget=1.0)


def found_by(step: Callable[..., None], *arguments: Any) -> dict[str, bool]:
    """Which checks passed."""
    stream = io.StringIO()
    step(Findings(stream), *arguments)
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    return {line["check"]: line["passed"] for line in lines if "check" in line}


def failed_by(step: Callable[..., None], *arguments: Any) -> set[str]:
    return {name for name, passed in found_by(step, *arguments).items() if not passed}


class Device(VAE):
    """The `VAE` that is under test; the one that it is compared with is loaded without a device."""

    change: Callable[[str, np.ndarray], np.ndarray]

    @classmethod
    def load(cls, path: Any, device: str | None = None, *arguments: Any, **options: Any) -> VAE:
        return super().load(path, device, *arguments, **options) if device else VAE.load(path)

    def decode(self, latents: Any, **options: Any) -> Any:
        return Device.change("decode", super().decode(latents, **options))

    def decode_to_device(self, latents: Any) -> DeviceArray:
        array = super().decode_to_device(latents).numpy()
        return copy_to_device(Device.change("decode_to_device", array), find_device("cpu"))


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Change what one operation of the device under test gives."""

    def plant(operation: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
        monkeypatch.setattr(checks, "VAE", Device)
        monkeypatch.setattr(
            Device, "change", lambda name, array: change(array) if name == operation else array, raising=False
        )

    return plant


def test_golden_values_that_are_missed(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vae_runtime.selftest.golden_error", lambda *arguments: golden_error(*arguments) + 2e-4)
    assert failed_by(checks.golden, job) == {"fp32 encode mean", "fp32 encode logvar", "fp32 decode reconstruction"}


@pytest.mark.parametrize(("error", "fails"), [(9e-5, False), (1.1e-4, True), (float("nan"), True)])
def test_fidelity_by_its_limit(job: Job, planted: Any, error: float, fails: bool) -> None:
    planted("decode", lambda array: array + np.float32(error))
    failed = failed_by(checks.fidelity, job)
    assert ({"fp32 cold decode", "fp32 warm decode"} <= failed) == fails
    assert bool(failed) == fails


def test_fidelity_is_looked_at_after_warming_up_too(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    real = VAE.decode
    warm: list[VAE] = []
    monkeypatch.setattr(VAE, "warmup", lambda vae, batch_sizes: warm.append(vae))
    monkeypatch.setattr(VAE, "decode", lambda vae, z, **options: real(vae, z, **options) + np.float32(vae in warm))
    assert failed_by(checks.fidelity, job) == {"fp32 warm decode", "fp32 warm reconstruct"}


def test_torch_s_own_error_stands_beside_it(torch_case: Path) -> None:
    """The case's bundle has other weights than its modules, which here play a torch that is far off."""
    job = Job("cpu", Case.open(torch_case), True, budget=1.0)
    stream = io.StringIO()
    checks.fidelity(Findings(stream), job)
    lines = child.parse_lines(stream.getvalue())
    figures = {line["figure"]: line["value"] for line in lines if "figure" in line}
    assert figures["torch"]["fp32"].keys() == {"decode", "reconstruct"}
    assert min(figures["torch"]["fp32"].values()) > 0.01
    unit = {"step": "fidelity", "case": "small", "figures": {"torch": {"fp16": {"decode": 0.25}}}}
    found = [{"check": f"fp16 warm {name}", "found": 0.5, "limit": 1.0} for name in ("decode", "reconstruct")]
    text = report_text.errors([{**unit, "checks": found}])
    assert "| fidelity | small | fp16 warm decode | 5.00e-01 | 1e+00 | 2.50e-01 |" in text
    assert "| fidelity | small | fp16 warm reconstruct | 5.00e-01 | 1e+00 | – |" in text


def test_kernels_are_those_of_one_call(torch_case: Path) -> None:
    """On the CPU torch's operators stand for them."""
    torch = pytest.importorskip("torch")
    weight, x = torch.zeros(64, 64), torch.zeros(512, 64)
    total, *found = kernels.profile(torch, lambda: [torch.relu(x @ weight) for _ in range(3)], is_gpu=False)
    launches = {row["kernel"]: row["launches"] for row in found}
    assert (launches["aten::mm"], launches["aten::relu"]) == (3, 3)
    assert total["kernel"] == "all"
    assert total["launches"] == sum(launches.values())
    assert total["microseconds"] == pytest.approx(sum(row["microseconds"] for row in found))
    assert found == sorted(found, key=lambda row: -row["microseconds"])
    stream = io.StringIO()
    kernels.kernels(Findings(stream), Job("cpu", Case.open(torch_case), True, budget=1.0))
    lines = child.parse_lines(stream.getvalue())
    assert not [line for line in lines if "check" in line]
    rows = [line["value"] for line in lines if line.get("figure") == "kernels"][-1]
    known = {(row["engine"], row["operation"]) for row in rows}
    assert known == {(engine, operation) for engine in ("torch", "vae_runtime") for operation in ("encode", "decode")}
    row = {"precision": "fp32", "operation": "encode", "batch": 32, "engine": "torch", "kernel": "a|b"}
    row |= {"launches": 1.5, "microseconds": 12.34}
    text = report_text.kernels([{"step": "kernels", "case": "small", "figures": {"kernels": [row]}}])
    assert "| small | fp32 | encode, batch 32 | torch | a/b | 1.5 | 12.3 µs |" in text


def small_graph(*nodes: onnx.NodeProto, x: list[Any], **constants: np.ndarray) -> bytes:
    sides = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in
             (("x", x), ("y", None))]  # fmt: skip
    tensors = [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = onnx.helper.make_graph(nodes, "graph", sides[:1], sides[1:], tensors)
    return onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10
    ).SerializeToString()


def run_on_cpu(graph: bytes, x: np.ndarray) -> np.ndarray:
    return onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


def group_norm(random: np.random.Generator, into: list[int], count: int | str = 2, silu: bool = True) -> bytes:
    """Of (N, 4, 6, 5) in 2 groups. count: of the channels with a scale each."""
    make = onnx.helper.make_node
    sigmoid = [make("Sigmoid", ["g"], ["s"]), make("Mul", ["g", "s"], ["y"])] if silu else [make("Neg", ["g"], ["y"])]
    return small_graph(
        make("Reshape", ["x", "into"], ["r"]),
        make("InstanceNormalization", ["r", "ones", "zeros"], ["n"], epsilon=1e-3),
        make("Reshape", ["n", "back"], ["b"]),
        make("Mul", ["b", "gamma"], ["m"]),
        make("Add", ["beta", "m"], ["g"]),
        *sigmoid,
        x=["batch", 4, 6, 5],
        into=np.array(into),
        back=np.array([-1, 4, 6, 5]),
        ones=np.ones(into[1] if into[1] > 0 else 6, np.float32),
        zeros=np.zeros(into[1] if into[1] > 0 else 6, np.float32),
        gamma=random.standard_normal((count, 1, 1), np.float32),
        beta=random.standard_normal((count, 1, 1), np.float32),
    )


@pytest.mark.parametrize("into", [[0, 2, -1], [1, -1, 60]])
def test_scale_and_shift_joined_compute_the_same(into: list[int]) -> None:
    random = np.random.default_rng(0)
    graph = group_norm(random, into, 4)
    edited = graph_edits.join_scale_and_shift(graph)
    assert edited is not None
    operators = [node.op_type for node in onnx.load_from_string(edited).graph.node]
    assert operators[2:] == ["Reshape", "BatchNormalization", "Sigmoid", "Mul"]
    x = random.standard_normal((3, 4, 6, 5), np.float32)
    np.testing.assert_allclose(run_on_cpu(edited, x), run_on_cpu(graph, x), atol=1e-6)


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("into", [[0, 2, -1], [1, -1, 60]])
def test_own_group_norm_is_put_in_the_place_of_the_whole(into: list[int], silu: bool) -> None:
    """No CPU has it."""
    edited = graph_edits.use_own_group_norm(group_norm(np.random.default_rng(0), into, 4, silu))
    assert edited is not None
    nodes = list(onnx.load_from_string(edited).graph.node)
    assert [node.op_type for node in nodes] == ["Transpose", "GroupNorm", "Transpose", *([] if silu else ["Neg"])]
    given = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in nodes[1].attribute}
    assert given == {"groups": 2, "activation": int(silu), "epsilon": pytest.approx(1e-3), "channels_last": 1}
    assert nodes[0].input[:] == ["x"]
    assert nodes[2].output[:] == ["y" if silu else "g"]


def test_other_scales_are_left_alone() -> None:
    graph = group_norm(np.random.default_rng(0), [0, 2, -1], 1)
    assert graph_edits.join_scale_and_shift(graph) is graph_edits.use_own_group_norm(graph) is None


def upsampling(random: np.random.Generator, resize: dict[str, Any], conv: dict[str, Any], bias: bool = True) -> bytes:
    make = onnx.helper.make_node
    names = ["w", "b"] if bias else ["w"]
    return small_graph(
        make("Resize", ["x", "", "scales"], ["big"], **resize),
        make("Conv", ["big", *names], ["y"], **conv),
        x=["batch", 5, 4, 3],
        scales=np.array([1, 1, 2, 2], np.float32),
        w=random.standard_normal((7, 5, 3, 3), np.float32),
        b=random.standard_normal(7, np.float32),
    )


NEAREST = {"mode": "nearest", "nearest_mode": "floor", "coordinate_transformation_mode": "asymmetric"}


@pytest.mark.parametrize("resize", [NEAREST, {"mode": "nearest"}])
@pytest.mark.parametrize("bias", [True, False])
def test_upsampling_split_computes_the_same(resize: dict[str, Any], bias: bool) -> None:
    random = np.random.default_rng(0)
    graph = upsampling(random, resize, {"pads": [1] * 4, "kernel_shape": [3, 3], "auto_pad": "NOTSET"}, bias)
    edited = graph_edits.split_upsampling(graph)
    assert edited is not None
    operators = [node.op_type for node in onnx.load_from_string(edited).graph.node]
    assert operators == [*4 * ["Conv"], "Concat", "DepthToSpace"]
    x = random.standard_normal((2, 5, 4, 3), np.float32)
    np.testing.assert_allclose(run_on_cpu(edited, x), run_on_cpu(graph, x), atol=2e-5)


@pytest.mark.parametrize(
    ("resize", "conv"),
    [
        ({"mode": "linear"}, {"pads": [1] * 4}),
        ({**NEAREST, "coordinate_transformation_mode": "align_corners"}, {"pads": [1] * 4}),
        (NEAREST, {}),
        (NEAREST, {"pads": [1] * 4, "strides": [2, 2]}),
        (NEAREST, {"pads": [1] * 4, "dilations": [2, 2]}),
    ],
)
def test_other_upsampling_is_left_alone(resize: dict[str, Any], conv: dict[str, Any]) -> None:
    assert graph_edits.split_upsampling(upsampling(np.random.default_rng(0), resize, conv)) is None


def varied(job: Job) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What the step says, and its rows."""
    stream = io.StringIO()
    variations.variations(Findings(stream), job)
    lines = child.parse_lines(stream.getvalue())
    return lines, [line["value"] for line in lines if line.get("figure") == "variations"][-1]


@pytest.mark.parametrize("bundle", ["tiny.vae", "tiny-free.vae"])
def test_variations_are_compared_with_the_plain_session(
    tiny: Path, bundle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph_edits, "EDITS", {"the same": lambda graph: graph, "nothing to do": lambda graph: None})
    lines, rows = varied(Job("cpu", Case.open(tiny.parent / bundle), True, budget=1.0))
    assert not [line for line in lines if "check" in line]
    assert [(row["half"], row["variation"], row["error"]) for row in rows] == [
        ("encoder", "the same", 0.0),
        ("decoder", "the same", 0.0),
    ]
    assert all(0 < row["low"] < row["ratio"] < row["high"] for row in rows)


@pytest.mark.parametrize("factor", [1.5, np.nan])
def test_variations_that_compute_something_else_or_nothing(
    tiny: Path, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(graph: bytes) -> bytes:
        model = onnx.load_from_string(graph)
        tensor = model.graph.initializer[0]
        values = onnx.numpy_helper.to_array(tensor) * np.float32(factor)
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
        return model.SerializeToString()

    monkeypatch.setattr(graph_edits, "EDITS", {"spoilt": spoil, "broken": lambda graph: graph[:-9]})
    lines, rows = varied(Job("cpu", Case.open(tiny), True, budget=1.0))
    assert not [line for line in lines if "check" in line]
    found = {row["variation"]: row for row in rows if row["half"] == "decoder"}
    assert found["spoilt"]["error"] is None if np.isnan(factor) else found["spoilt"]["error"] > 1e-3
    assert "failed" in found["broken"]
    text = report_text.variations([{"case": "tiny", "figures": {"variations": rows}}])
    assert ("not finite" in text) is bool(np.isnan(factor))
    assert "| tiny | fp32 | decoder, batch 2 | broken | – |" in text


def test_variations_need_no_onnx(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "graph_edits", None)
    stream = io.StringIO()
    variations.variations(Findings(stream), Job("cpu", Case.open(tiny), True, budget=1.0))
    lines = child.parse_lines(stream.getvalue())
    assert next(line["skipped"] for line in lines if "skipped" in line) == "edits of the graphs"
    assert not [line for line in lines if "check" in line or "figure" in line]


@pytest.mark.skipif(why_not_cuda() is not None, reason=f"no usable GPU: {why_not_cuda()}")
def test_variations_on_the_gpu(tiny: Path) -> None:
    _, rows = varied(Job("cuda", Case.open(tiny), True, budget=1.0))
    assert {(row["half"], row["precision"]) for row in rows} >= {("encoder", "fp32"), ("decoder", "tf32")}
    found = {row["variation"]: row for row in rows if (row["half"], row["precision"]) == ("encoder", "fp32")}
    assert found.keys() == variations.SETTINGS.keys()
    assert found["NHWC"]["error"] < 2e-5


@pytest.mark.parametrize(("precision", "error"), [("fp32", 1e-6), ("fp16", 5e-3)])
def test_torch_s_results_are_those_of_the_case(torch_case: Path, precision: str, error: float) -> None:
    torch = pytest.importorskip("torch")
    case = Case.open(torch_case)
    reference = case.reference()
    job = Job("cpu", case, True, budget=1.0)
    found = checks.torch_results(job, torch, precision, reference["x"], reference["mean"])
    for array in found.values():
        np.testing.assert_allclose(array, reference["reconstruction"], atol=error)
    assert (np.abs(found["decode"] - reference["reconstruction"]).max() > 1e-5) == (precision == "fp16")


def test_the_limits_are_those_that_were_promised() -> None:
    assert checks.LIMITS == {"fp32": 1e-4, "tf32": 2e-3, "fp16": 5e-3}


def test_errors_of_vectors_are_relative_to_their_range(autoencoder: Path, planted: Any) -> None:
    job = Job("cpu", Case.open(autoencoder), True, budget=1.0)
    assert failed_by(checks.fidelity, job) == set()
    assert failed_by(checks.calls, job) == set()
    planted("decode", lambda array: array + np.float32(1.1e-4 * job.scale))
    assert "fp32 cold decode" in failed_by(checks.fidelity, job)
    planted("decode", lambda array: array + np.float32(0.9e-4 * job.scale))
    assert failed_by(checks.fidelity, job) == set()


def test_one_wrong_batch_size(job: Job, planted: Any) -> None:
    def last_is_first(array: np.ndarray) -> np.ndarray:
        return np.concatenate([array[:-1], array[:1]]) if len(array) == 7 else array

    planted("decode", last_is_first)
    failed = failed_by(checks.calls, job)
    assert {"cold batch 7 host decode", "warm batch 7 host decode"} <= failed
    assert all(" batch 7 host" in name for name in failed)


def test_wrong_arrays_on_the_device(job: Job, planted: Any) -> None:
    planted("decode_to_device", lambda array: array * np.float32(0.99))
    failed = failed_by(checks.calls, job)
    assert {
        "cold batch 1 device decode",
        "warm batch 32 device reconstruct",
        "cold batch 2 host to device decode",
    } <= failed
    assert not any(" host decode" in name or "repeats" in name for name in failed)


@pytest.mark.parametrize("change", [lambda array: array.astype(np.float64), lambda array: array[..., :4]])
def test_another_dtype_or_shape(job: Job, planted: Any, change: Any) -> None:
    planted("decode", change)
    failed = failed_by(checks.calls, job)
    assert "cold batch 1 host decode" in failed


def test_results_that_do_not_repeat(job: Job, planted: Any) -> None:
    numbers = iter(range(10**9))
    planted("decode", lambda array: array + np.float32(1e-6) * next(numbers) % 3)
    failed = failed_by(checks.calls, job)
    assert "cold batch 2 repeats" in failed
    assert "cold batch 2 host decode" not in failed


def test_an_exception_is_one_failed_check(job: Job, planted: Any) -> None:
    def breaks(array: np.ndarray) -> np.ndarray:
        if len(array) == 2:
            raise DeviceError("decoder.onnx failed on cuda:0")
        return array

    planted("decode", breaks)
    passed = found_by(checks.calls, job)
    assert not passed["cold batch 2 host"]
    assert passed["warm batch 32 host decode"]


def test_an_exchange_with_torch_that_copies(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    real = torch.from_dlpack
    monkeypatch.setattr(torch, "from_dlpack", lambda array: real(array).clone())
    assert failed_by(checks.calls, job) == {"torch shares the memory"}


def test_threads_that_get_something_else() -> None:
    calls = {"right": lambda: np.zeros(3), "racy": lambda: np.full(3, busy[0])}
    busy = [0.0]
    assert checks.run_threads(calls, 2) == (checks.THREADS * 2 * 2, [])

    def racy() -> np.ndarray:
        busy[0] += 1
        return np.full(3, busy[0])

    count, differing = checks.run_threads({"right": calls["right"], "racy": racy}, 2)
    assert (count, set(differing)) == (checks.THREADS * 2 * 2, {"racy"})


def test_concurrency_says_who_differs(job: Job, planted: Any) -> None:
    numbers = iter(range(10**9))
    planted("decode", lambda array: array + np.float32(next(numbers) % 7))
    assert len(failed_by(checks.concurrency, job)) == 3


def test_what_fails_meanwhile_is_raised_at_the_end() -> None:
    done: list[str] = []

    def fail() -> None:
        raise ValueError("it broke")

    with pytest.raises(ValueError, match="it broke"), checks.meanwhile(fail):
        done.append("the calls")
    with checks.meanwhile(lambda: done.append("beside")):
        pass
    assert set(done) == {"the calls", "beside"}


class Exhausted:
    """A device on which more than 4 examples do not fit, with faults to choose."""

    def __init__(self, vae: VAE, error: Exception | None, breaks: bool = False) -> None:
        self._vae, self._error, self._breaks, self._broken = vae, error, breaks, False

    def encode(self, x: np.ndarray, **options: Any) -> Any:
        self._look_at(x)
        return self._vae.encode(x[:4])

    def decode(self, z: np.ndarray, **options: Any) -> Any:
        self._look_at(z)
        return self._vae.decode(z[:4]) + np.float32(self._broken)

    def _look_at(self, array: np.ndarray) -> None:
        if len(array) > 4 and self._error is not None:
            self._broken = self._breaks
            raise self._error


@pytest.mark.parametrize(
    ("error", "breaks", "failed"),
    [
        (OutOfMemoryError("too many"), False, set()),
        (DeviceError("CUDA failure 700"), False, {"full: encode 5", "full: decode 5"}),
        (None, False, {"full: encode 5", "full: decode 5"}),
        (OutOfMemoryError("too many"), True, {"full: the next decode"}),
    ],
)
def test_memory_that_runs_out(job: Job, error: Any, breaks: bool, failed: set[str]) -> None:
    with VAE.load(job.case.bundle) as vae:
        size = 4 * job.case.reference()["x"][0].nbytes
        found = found_by(checks.run_out, job, "full", Exhausted(vae, error, breaks), size)
    assert {name for name, passed in found.items() if not passed} == failed
    assert len(found) == 4


@pytest.fixture
def as_if_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Job:
    """torch that takes the CPU for its GPU."""
    torch = pytest.importorskip("torch")
    for name, stand_in in (
        ("is_available", lambda: True),
        ("mem_get_info", lambda device: (checks.LEFT_BYTES + 1000, 2**40)),
        ("Stream", lambda device: None),
        ("stream", lambda stream: contextlib.nullcontext()),
    ):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(checks, "BUSY_SIDE", 8)
    return Job("cuda", Case.open(GPU.parents[1] / "tests" / "data" / "tiny.vae"), True)


def test_both_ways_of_running_out(as_if_on_a_gpu: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[dict[str, Any]] = []

    class Full(Exhausted):
        device = "cpu"

        @classmethod
        @contextlib.contextmanager
        def load(cls, path: Path, device: str, **options: Any) -> Any:
            loaded.append(options)
            yield cls(VAE.load(path), OutOfMemoryError("too many"))

        def reconstruct(self, x: np.ndarray) -> np.ndarray:
            return self._vae.reconstruct(x)

    monkeypatch.setattr(checks, "VAE", Full)
    monkeypatch.setattr(checks, "GPU_LIMIT_BYTES", 2**16)
    monkeypatch.setattr(checks, "LEFT_BYTES", 2**17)
    found = found_by(checks.memory, as_if_on_a_gpu)
    assert loaded == [{"provider_options": {"gpu_mem_limit": str(2**16)}}, {}]
    assert len(found) == 8
    assert all(found.values())
    assert {"gpu_mem_limit: encode 513", "a full GPU: decode 1025"} <= found.keys()


def test_torch_on_another_stream(as_if_on_a_gpu: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    with VAE.load(as_if_on_a_gpu.case.bundle) as vae:
        x = as_if_on_a_gpu.case.reference()["x"][:3]
        exchange = (checks.exchange, as_if_on_a_gpu, vae, x, checks.results_on_host(vae, x))
        assert found_by(*exchange)["torch on another stream mean"]
        monkeypatch.setattr(checks, "BUSY_PRODUCTS", 0)
        real = checks.encode_late
        monkeypatch.setattr(checks, "encode_late", lambda torch, vae, given: real(torch, vae, given * 0))
        assert failed_by(*exchange) == {"torch on another stream mean"}


@pytest.mark.skipif(why_not_cuda() is not None, reason=f"no usable GPU: {why_not_cuda()}")
def test_memory_that_runs_out_on_the_gpu(tiny: Path) -> None:
    found = found_by(checks.memory, Job("cuda", Case.open(tiny), True, budget=1.0))
    assert found
    assert all(found.values())


def test_the_runtime_s_own_cost_on_planted_speeds() -> None:
    row = timings.row("planted", lambda: time.sleep(0.002), lambda: time.sleep(0.004), 20)
    assert row["ratio"] == pytest.approx(2, abs=0.25)
    assert row["low"] <= row["ratio"] <= row["high"]
    assert row["ours_ms"] > row["bare_ms"] > 1.9


def test_both_sides_of_the_cost_give_the_same(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    with VAE.load(job.case.bundle) as vae:
        x = job.case.reference()["x"][:3]
        for operation, array in (("encode", x), ("decode", vae.encode(x).mean)):
            bare, ours = timings.host_sides(job, vae, operation, array)
            expected = ours().mean if operation == "encode" else ours()
            np.testing.assert_allclose(bare()[0], expected, atol=1e-6)
            with monkeypatch.context() as patch:  # as on a GPU: a session for this batch size
                patch.setattr(vae_runtime.devices.Device, "is_gpu", True)
                patch.setattr(vae_runtime.devices.Device, "memory", ("cpu", 0))
                bare, _ = timings.host_sides(job, vae, operation, array)
            np.testing.assert_allclose(bare()[0], expected, atol=1e-6)
            bare, ours = timings.device_sides(job, vae, operation, array)
            results = ours().mean if operation == "encode" else ours()
            np.testing.assert_allclose(bare()[0].numpy(), results.numpy(), atol=1e-6)


def test_a_bare_session_for_one_shape_knows_all_its_sides(tiny: Path) -> None:
    job = Job("cpu", Case.open(tiny.parent / "tiny-free.vae"), quick=True)
    for fixed, known in (((3, 3, 8, 12), [3, 3, 8, 12]), ((), ["batch", 3, "height", "width"])):
        session = timings.bare_session(job, find_device("cpu"), "encode", fixed)
        assert session.get_inputs()[0].shape == known


def test_a_side_that_fails_costs_no_other_row(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise RuntimeError("no session")

    monkeypatch.setattr(timings, "device_sides", fail)
    stream = io.StringIO()
    timings.overhead(Findings(stream), job)
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line["text"] for line in lines if "check" in line] == ["RuntimeError: no session"] * 2
    rows = [line["value"] for line in lines if "figure" in line][-1]
    assert [row["what"] for row in rows] == ["encode, batch 2, host", "decode, batch 2, host"]


@pytest.mark.skipif(why_not_cuda() is not None, reason=f"no usable GPU: {why_not_cuda()}")
@pytest.mark.parametrize("bundle", ["tiny.vae", "tiny-free.vae"])
def test_the_runtime_s_own_cost_and_many_threads_on_the_gpu(tiny: Path, bundle: str) -> None:
    job, stream = Job("cuda", Case.open(tiny.parent / bundle), quick=True), io.StringIO()
    timings.overhead(Findings(stream), job)
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line for line in lines if "check" in line] == []
    assert len([line["value"] for line in lines if "figure" in line][-1]) == 4
    assert all(found_by(checks.concurrency, job).values())


# --- the run survives what goes wrong ---------------------------------------------------------------------------------

REQUEST = {
    "step": "golden",
    "case": "/cases/my",
    "device": "cpu",
    "quick": True,
    "rounds": 1,
    "budget": 1,
    "preload": False,
}


@pytest.fixture
def children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Run a program in place of a step; `say(line)` writes a finding."""

    def start(program: str, seconds: float = 20.0) -> dict[str, Any]:
        script = tmp_path / "step.py"
        script.write_text(
            "import json, os, signal, subprocess, sys, time\n"
            "stream = open(json.loads(sys.argv[1])['findings'], 'w')\n"
            "def say(**line):\n    stream.write(json.dumps(line) + chr(10)); stream.flush()\n" + program
        )
        monkeypatch.setattr(child, "STEPS_FILE", script)
        with child.Children(preload_torch=False) as running:
            return running.run(REQUEST, seconds)

    return start


PASSED = "say(check='a', passed=True, found=None, limit=None, text='')\n"


@pytest.mark.parametrize(
    ("program", "status", "reason"),
    [
        (PASSED + "say(done=True)", "passed", ""),
        (PASSED.replace("True", "False") + "say(done=True)", "failed", ""),
        ("say(skipped='a', reason='b'); say(done=True)", "skipped", ""),
        ("say(figure='a', value=1); say(done=True)", "passed", ""),
        (PASSED + "os.kill(os.getpid(), signal.SIGSEGV)", "crashed", "the step was ended by SIGSEGV"),
        (PASSED + "raise RuntimeError('in /cases/my')", "crashed", "exit code 1 and no answer: RuntimeError: in my"),
        (PASSED, "crashed", "the step ended with exit code 0 and no answer"),
        (PASSED + "say(done=True); os.abort()", "crashed", "the step was ended by SIGABRT"),
        (PASSED + 'stream.write(\'{"check": "b\')', "crashed", "the step ended with exit code 0"),
    ],
)
def test_how_a_step_ended(children: Any, program: str, status: str, reason: str) -> None:
    unit = children(program)
    assert (unit["status"], unit["reason"][-len(reason) :] if reason else unit["reason"]) == (status, reason) or (
        unit["status"] == status and reason and reason in unit["reason"]
    )
    assert len(unit["checks"]) == ("check" in program)


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_a_step_that_hangs_is_ended_with_what_it_started(children: Any, tmp_path: Path) -> None:
    began = time.monotonic()
    program = (
        PASSED + "other = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(other.pid))\ntime.sleep(60)"
    )
    unit = children(program, seconds=1.0)
    assert (unit["status"], len(unit["checks"])) == ("crashed", 1)
    assert unit["reason"] == "was ended after 1 s, when the time of this part was over"
    assert time.monotonic() - began < 20
    assert ended(int((tmp_path / "pid").read_text()))


def ended(number: int) -> bool:
    """Whether a process is gone, or only waits to be collected by whoever adopted it."""
    for _ in range(100):
        try:
            os.kill(number, 0)
        except ProcessLookupError:
            return True
        with contextlib.suppress(FileNotFoundError):
            if Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        time.sleep(0.05)
    return False


def test_torch_comes_first_in_every_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for torch; and another sitecustomize still has its turn."""
    (tmp_path / "torch.py").write_text("")
    (tmp_path / "sitecustomize.py").write_text("import string as other\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    show = "import sys; print('torch' in sys.modules, 'string' in sys.modules)"
    nested = f"import subprocess, sys; subprocess.run([sys.executable, '-P', '-c', {show!r}], check=True)"
    with child.Children(preload_torch=True) as running:
        for code in (show, nested):
            done = subprocess.run(
                [sys.executable, "-c", code], env=running.environment, capture_output=True, text=True, check=True
            )
            assert done.stdout.split() == ["True", "True"], done.stderr
    with child.Children(preload_torch=False) as running:
        done = subprocess.run(
            [sys.executable, "-c", show], env=running.environment, capture_output=True, text=True, check=True
        )
        assert done.stdout.split() == ["False", "True"]


def test_the_environment_says_whether_torch_came_first() -> None:
    assert found_by(steps.environment, "cpu", False) == {"device cpu": True}
    code = (
        f"import sys; sys.path.insert(0, {str(GPU)!r}); sys.modules['torch'] = sys\n"
        "import io, steps; from findings import Findings\n"
        "stream = io.StringIO(); steps.environment(Findings(stream), 'cpu', True); print(stream.getvalue())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    line = next(json.loads(line) for line in done.stdout.splitlines() if "torch was loaded first" in line)
    assert line["passed"]


class Scripted:
    """Steps that end as `outcomes` says, by step and case; "passed" without an entry."""

    outcomes: dict[tuple[str, str], str]
    ran: list[tuple[str, str]]

    def __init__(self, preload_torch: bool) -> None:
        pass

    def __enter__(self) -> Scripted:
        return self

    def __exit__(self, *error: Any) -> None:
        pass

    def stop(self) -> None:
        pass

    def run(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        key = request["step"], Path(request["case"]).stem
        Scripted.ran.append(key)
        status = Scripted.outcomes.get(key, "passed")
        check = {"check": "c", "passed": status != "failed", "found": None, "limit": None, "text": "3 differ"}
        reason = "was ended by SIGSEGV" if status == "crashed" else ""
        return {
            **{"status": status, "reason": reason, "checks": [check], "skipped": {}, "figures": {}, "printed": ""},
            "seconds": 1.0,
        }


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch, tiny: Path, autoencoder: Path, tmp_path: Path) -> Callable[..., int]:
    monkeypatch.setattr(run, "Children", Scripted)

    def start(*arguments: str, **outcomes: str) -> int:
        Scripted.ran, Scripted.outcomes = [], {("golden", name): status for name, status in outcomes.items()}
        paths = ["--case", str(tiny), "--case", str(autoencoder), "--output", str(tmp_path / "out")]
        monkeypatch.setattr(sys, "argv", ["run.py", *paths, "--device", "cpu", "--steps", "golden,calls", *arguments])
        return run.main()

    return start


ALL = [("golden", "tiny"), ("golden", "tiny-vectors"), ("calls", "tiny"), ("calls", "tiny-vectors")]


def test_a_failed_check_makes_the_exit_code_3(scripted: Any, capsys: Any, tmp_path: Path) -> None:
    assert scripted(tiny="failed") == 3
    assert Scripted.ran == [("environment", ""), *ALL]
    assert "FAILED c: 3 differ" in capsys.readouterr().out
    text = (tmp_path / "out.md").read_text()
    assert "- **golden, tiny**: c: 3 differ" in text
    assert "| golden | **failed**, 0 of 1 | 1 of 1 |" in text
    assert scripted("--resume") == 0  # what failed is kept and shown; nothing is left to run
    assert Scripted.ran == [("environment", "")]
    assert "- **golden, tiny**: c: 3 differ" in (tmp_path / "out.md").read_text()
    assert scripted("--resume", "--retry") == 0
    assert Scripted.ran == [("environment", ""), ALL[0]]
    assert "Nothing.\n" in (tmp_path / "out.md").read_text()


def test_a_crashed_step_is_recorded_and_runs_again(scripted: Any, tmp_path: Path) -> None:
    assert scripted(tiny="crashed") == 3
    assert Scripted.ran == [("environment", ""), *ALL]
    assert "- **golden, tiny**: was ended by SIGSEGV" in (tmp_path / "out.md").read_text()
    assert scripted("--resume") == 0
    assert Scripted.ran == [("environment", ""), ALL[0]]
    document = json.loads((tmp_path / "out.json").read_text())
    assert [(unit["step"], unit["case"]) for unit in document["units"]] == [
        ("environment", "part 1"),
        ("environment", "part 2"),
        *ALL,
    ]


def test_only_what_measures_nothing_runs_side_by_side(scripted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, running, most = threading.Lock(), 0, {}
    real = Scripted.run

    def slow(self: Scripted, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        nonlocal running
        with lock:
            running += 1
            most[request["step"]] = max(most.get(request["step"], 0), running)
        time.sleep(0.05)
        with lock:
            running -= 1
        return real(self, request, seconds)

    monkeypatch.setattr(Scripted, "run", slow)
    assert scripted("--steps", "calls,golden,memory", "--jobs", "3") == 0
    assert (max(most["golden"], most["calls"]), most["memory"], most["environment"]) == (3, 1, 1)
    most.clear()
    assert scripted("--force") == 0
    assert set(most.values()) == {1}


def test_parts_end_in_time_and_merge(scripted: Any, capsys: Any, tmp_path: Path) -> None:
    assert scripted("--minutes", "0.001") == 0
    assert Scripted.ran == [("environment", ""), ALL[0]]  # one step in any case
    assert "3 steps are left: the same command with --resume goes on" in capsys.readouterr().out
    assert scripted("--minutes", "0.001", "--resume") == 0
    assert Scripted.ran == [("environment", ""), ALL[1]]
    assert scripted("--resume") == 0
    assert Scripted.ran == [("environment", ""), *ALL[2:]]
    document = json.loads((tmp_path / "out.json").read_text())
    assert {(unit["step"], unit["case"]) for unit in document["units"]} >= set(ALL)
    assert document["parts"] == 3


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 1, "out.json exists; go on with --resume, or begin anew with --force"),
        (("--resume", "--device", "cuda"), 1, "--device is 'cuda'; "),
        (("--case", "/no/case"), 1, "/no/case is neither a case nor a bundle"),
        (("--steps", "fly"), 2, "--steps has 'fly'; expected some of golden, "),
        (("--resume", "--force"), 2, "--resume and --force exclude each other"),
        (("--jobs", "0"), 2, "--jobs is 0; expected at least 1"),
    ],
)
def test_bad_input_is_answered_in_one_sentence(
    scripted: Any, capsys: Any, arguments: tuple[str, ...], code: int, message: str
) -> None:
    assert scripted() == 0
    before = Scripted.ran
    try:
        found = scripted(*arguments)
    except SystemExit as error:
        found = error.code
    assert (found, Scripted.ran, len(before)) == (code, [], 5)
    assert message in capsys.readouterr().err


def test_force_begins_anew(scripted: Any, tmp_path: Path) -> None:
    assert scripted(tiny="failed") == 3
    assert scripted("--force") == 0
    assert json.loads((tmp_path / "out.json").read_text())["parts"] == 1


@pytest.mark.parametrize(
    "document",
    [
        [],
        {"format": "vae-bench-race", "format_version": run.FORMAT_VERSION, "cases": []},
        {"format": run.FORMAT, "format_version": run.FORMAT_VERSION + 1, "device": "cpu"},
        {"format_version": run.FORMAT_VERSION, "device": "cpu"},
    ],
    ids=["a list", "a race", "a later version", "no format"],
)
def test_other_files_are_not_continued(scripted: Any, capsys: Any, tmp_path: Path, document: Any) -> None:
    (tmp_path / "out.json").write_text(json.dumps(document))
    assert scripted("--resume") == 1
    error = capsys.readouterr().err
    assert error == f"Error: {tmp_path}/out.json was not written by run.py of this version; it is not continued\n"
    assert Scripted.ran == []
    assert json.loads((tmp_path / "out.json").read_text()) == document


@pytest.mark.parametrize(
    "content",
    ["[]", '{"format": "vae-bench-race", "format_version": 1}', '{"weights": [1, 2]}', "not json"],
    ids=["a list", "a race", "somebody's", "no json"],
)
def test_force_replaces_only_what_it_wrote(scripted: Any, capsys: Any, tmp_path: Path, content: str) -> None:
    (tmp_path / "out.json").write_text(content)
    assert scripted("--force") == 1
    assert capsys.readouterr().err.startswith(f"Error: {tmp_path}/out.json is not ")
    assert Scripted.ran == []
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"out.json": content}


def test_force_replaces_what_another_version_of_it_wrote(scripted: Any, tmp_path: Path) -> None:
    (tmp_path / "out.json").write_text(json.dumps({"format": run.FORMAT, "format_version": run.FORMAT_VERSION + 1}))
    assert scripted("--force") == 0
    assert json.loads((tmp_path / "out.json").read_text())["format_version"] == run.FORMAT_VERSION


@pytest.mark.parametrize("arguments", [(), ("--force",), ("--resume",)])
def test_a_text_of_somebody_else_is_not_replaced(
    scripted: Any, capsys: Any, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    (tmp_path / "out.md").write_text("notes")
    assert scripted(*arguments) == 1
    error = f"Error: {tmp_path}/out.md exists without out.json; choose a name that is not taken\n"
    assert (capsys.readouterr().err, Scripted.ran) == (error, [])
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"out.md": "notes"}


def test_every_step_has_its_time() -> None:
    assert list(run.STEPS) == list(steps.STEPS)
    arguments = SimpleNamespace(budget=60, rounds=6)
    assert [run.seconds_of(step, arguments) for step in ("golden", "bench-tf32", "race")] == [15, 70, 260]


@pytest.mark.skipif(why_not_cuda() is None, reason="this machine has a usable GPU")
def test_a_device_that_is_not_there_is_recorded(tiny: Path, tmp_path: Path) -> None:
    done = gpu_run("--case", tiny, "--quick", "--steps", "golden,race", "--output", tmp_path / "none")
    assert done.returncode == 3, done.stdout + done.stderr
    units = {unit["step"]: unit for unit in json.loads((tmp_path / "none.json").read_text())["units"]}
    assert {step: unit["status"] for step, unit in units.items()} == {
        "environment": "failed",
        "golden": "failed",
        "race": "crashed",
    }
    assert "device 'cuda' cannot be used" in units["environment"]["checks"][0]["text"]
    assert [check["check"] for check in units["golden"]["checks"]] == ["fp32", "tf32"]
    assert "RuntimeError: vae-bench race ended with exit code" in units["race"]["reason"]


def test_a_step_that_runs_can_be_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "step.py"
    script.write_text("import time; time.sleep(60)")
    monkeypatch.setattr(child, "STEPS_FILE", script)
    with child.Children(preload_torch=False) as running, ThreadPoolExecutor(1) as pool:
        begun = time.monotonic()
        unit = pool.submit(running.run, REQUEST, 60.0)
        while not running._running:
            time.sleep(0.01)
        running.stop()
        assert unit.result()["status"] == "crashed"
    assert time.monotonic() - begun < 20


@pytest.fixture(scope="module")
def raced(tiny: Path) -> dict[str, Any]:
    """The figures of a race that came to its end."""
    return figures_of_race(Job("cpu", Case.open(tiny), True, budget=1.0))


def figures_of_race(job: Job) -> dict[str, Any]:
    stream = io.StringIO()
    with contextlib.suppress(SystemExit):
        timings.race(Findings(stream), job)
    return {line["figure"]: line["value"] for line in map(json.loads, stream.getvalue().splitlines())}


def test_a_race_that_is_ended_keeps_its_points(
    job: Job, monkeypatch: pytest.MonkeyPatch, raced: dict[str, Any]
) -> None:
    real = timings.run_command

    def run_command(*arguments: str) -> str:
        real(*arguments)
        Path(arguments[arguments.index("--output") + 1], "race.md").unlink()
        raise SystemExit(143)  # after the last point, before all is written

    monkeypatch.setattr(timings, "run_command", run_command)
    for figures in (raced, figures_of_race(job)):
        assert [str(point["point"]["batch"]) for point in figures["race"]["cases"][0]["points"]] == ["1"]
        assert "× ours" in figures["race_text"]


def test_a_step_that_is_ended_ends_what_it_runs(tmp_path: Path) -> None:
    psutil = pytest.importorskip("psutil")
    code = f"""
import signal, sys
sys.path[:0] = {[str(GPU), *child.PACKAGES]!r}
import timings
signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
timings.run_python("it", "-c", "import sys, time; print('said', file=sys.stderr, flush=True); time.sleep(60)")
"""
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    while not (below := psutil.Process(process.pid).children()):
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.3)
    process.terminate()
    _, stderr = process.communicate(timeout=20)
    assert (process.returncode, "said" in stderr) == (143, True)
    assert psutil.wait_procs(below, timeout=5)[1] == []


def test_the_race_is_in_the_report(raced: dict[str, Any]) -> None:
    assert raced["race"]["format"] == "vae-bench-race"
    unit = {"step": "race", "case": "tiny", "figures": raced}
    text = report_text.race([unit])
    assert text.startswith("## Race\n")
    assert all(line.startswith(("## Race", "###")) for line in text.splitlines() if line.startswith("#"))
