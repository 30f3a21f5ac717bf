"""`vae-run tune` and what "auto" makes of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from vae_runtime import VAE, DeviceError, InputError, OutputError
from vae_runtime import tune as tune_module
from vae_runtime import tuning as module
from vae_runtime.bundle import Bundle
from vae_runtime.cache import make_cache_folder
from vae_runtime.cli import main
from vae_runtime.manifest import Manifest
from vae_runtime.plan import OPERATIONS, Candidate
from vae_runtime.tune import candidates, tune
from vae_runtime.tuning import Measured, choose, read_tuning, write_tuning


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def measured(candidate: Candidate, encode: dict[int, float], decode: dict[int, float] | None = None) -> Measured:
    return Measured(candidate, {"encode": encode, "decode": decode or encode})


ONE, TWO = Candidate("cpu", "fp32", 1), Candidate("cpu", "fp32", 2)
INT8 = Candidate("cpu", "int8", 1)
OPENVINO = Candidate("openvino", "fp32", 2)
TABLE = [
    measured(ONE, {1: 10.0, 8: 40.0, 32: 160.0}),
    measured(TWO, {1: 12.0, 8: 30.0, 32: 90.0}),
    measured(INT8, {1: 9.9, 8: 20.0, 32: 80.0}),
    measured(OPENVINO, {1: 30.0, 8: 35.0, 32: 50.0}, {1: 8.0, 8: 8.0, 32: 8.0}),
]

# --- choosing ---------------------------------------------------------------------------------------------------------


def test_fastest_per_operation_and_batch_range() -> None:
    assert choose(TABLE, "encode", "auto", "auto", None) == [(1, ONE), (3, INT8), (17, OPENVINO)]
    assert choose(TABLE, "decode", "auto", "auto", None) == [(1, OPENVINO)]


def test_what_is_hardly_faster_is_not_worth_a_less_exact_precision() -> None:
    assert choose([TABLE[0], measured(INT8, {1: 9.8})], "encode", "auto", "auto", None)[0][1] == ONE
    assert choose([TABLE[0], measured(INT8, {1: 9.6})], "encode", "auto", "auto", None)[0][1] == INT8


def test_gain_of_a_less_exact_precision_counts_against_the_best_of_the_more_exact_one() -> None:
    table = [measured(ONE, {1: 100.0}), measured(TWO, {1: 98.0}), measured(INT8, {1: 96.5})]
    assert choose(table, "encode", "auto", "auto", None) == [(1, TWO)]


def test_what_was_asked_for_limits_the_choice() -> None:
    assert choose(TABLE, "encode", "cpu", "fp32", None) == [(1, ONE), (3, TWO)]
    assert choose(TABLE, "encode", "auto", "int8", None) == [(1, INT8)]
    assert choose(TABLE, "encode", "openvino", "auto", None) == [(1, OPENVINO)]
    assert choose(TABLE, "encode", "cuda:0", "auto", None) == []
    assert choose(TABLE, "encode", "auto", "auto", 1) == [(1, ONE), (3, INT8)]
    assert choose(TABLE, "encode", "cpu", "fp32", 2) == [(1, TWO)]


def test_threads_between_two_measured_counts_are_used_as_asked() -> None:
    assert choose(TABLE, "encode", "cpu", "fp32", 7) == [(1, Candidate("cpu", "fp32", 7))]


def test_batches_that_were_too_slow_to_measure_take_the_route_before() -> None:
    slow = [measured(ONE, {1: 2.0}), measured(TWO, {1: 1.0, 8: 9.0})]
    assert choose(slow, "encode", "auto", "auto", None) == [(1, TWO)]


# --- keeping ----------------------------------------------------------------------------------------------------------


def test_what_was_written_is_read_again() -> None:
    path = write_tuning("a" * 64, TABLE)
    assert read_tuning("a" * 64) == TABLE
    assert read_tuning("b" * 64) == []
    data = json.loads(path.read_text())
    assert data["machine"]["cores"] >= 1
    assert "onnxruntime" in data["machine"]["engines"]


@pytest.mark.parametrize("change", ["processor", "cores", "engines", "system"])
def test_another_machine_or_engine_has_its_own_file(monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    write_tuning("a" * 64, TABLE)
    key = {**module.machine_key(), change: "another"}
    monkeypatch.setattr(module, "machine_key", lambda: key)
    assert read_tuning("a" * 64) == []


@pytest.mark.parametrize(("provider", "expected"), [("CUDAExecutionProvider", 1), ("AzureExecutionProvider", 0)])
def test_the_gpus_driver_is_started_only_where_the_engine_can_use_it(
    provider: str, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Children that are forked off later could not use CUDA: torch's in the same application, say."""
    asked: list[int] = []
    gpu = SimpleNamespace(name="NVIDIA H200")
    monkeypatch.setattr(module, "find_gpus", lambda: (asked.append(1), ((gpu,), None))[1])
    monkeypatch.setattr(module, "driver_version", lambda: asked.append(1) or "13.0")
    engine = SimpleNamespace(__version__="1.31.1", get_available_providers=lambda: [provider, "CPUExecutionProvider"])
    monkeypatch.setattr(module, "import_engine", lambda: engine)
    key = module.machine_key()
    assert (key["gpus"], key["driver"]) == ((["NVIDIA H200"], "13.0") if expected else ([], None))
    assert len(asked) == 2 * expected


@pytest.mark.parametrize(
    "damage",
    [
        b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"format": "vae-tuning"}',
        b'{"format": "vae-tuning", "format_version": 2, "bundle": "BUNDLE", "measured": []}',
        b'{"format": "vae-tuning", "format_version": 1, "bundle": "BUNDLE", "measured": [{"device": "cpu"}]}',
        b'{"format": "vae-tuning", "format_version": 1, "bundle": "BUNDLE", "measured": [{"device": "cpu", "precision":'
        b' "fp32", "threads": 1, "spinning": null, "seconds": {"encode": {"1": -1}, "decode": {"1": 1}}}]}',
        b"[" * 100_000,
    ],
)  # fmt: skip
def test_damaged_cache_is_no_cache(damage: bytes) -> None:
    path = write_tuning("a" * 64, TABLE)
    path.write_bytes(damage.replace(b"BUNDLE", b"a" * 64))
    assert read_tuning("a" * 64) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("device", 5), ("precision", "fp8"), ("precision", ["int8"]), ("threads", "2"), ("threads", 10**9),
        ("threads", -3), ("threads", True), ("spinning", "no"), ("spinning", 0), ("seconds", {"encode": {"1": 1.0}}),
        ("seconds", {name: {"1": "Infinity"} for name in ("encode", "decode")}),
        ("seconds", {name: {"1": 10**400} for name in ("encode", "decode")}),
    ],
)  # fmt: skip
def test_cache_with_a_value_that_cannot_be_is_no_cache(key: str, value: Any) -> None:
    path = write_tuning("a" * 64, TABLE)
    document = json.loads(path.read_bytes())
    document["measured"][1][key] = value
    path.write_text(json.dumps(document))
    assert read_tuning("a" * 64) == []


def test_cache_of_another_machine_under_this_ones_name_is_not_taken() -> None:
    path = write_tuning("a" * 64, TABLE)
    document = json.loads(path.read_bytes())
    document["machine"]["processor"] = "another"
    path.write_text(json.dumps(document))
    assert read_tuning("a" * 64) == []


def test_user_without_a_home_folder_has_no_cache(tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name)
    monkeypatch.setattr(Path, "home", no_home)
    with VAE.load(tiny_path, device="auto") as vae:
        assert vae.plan["encode"][0]["threads"] is None
    with pytest.raises(OutputError, match="this user has no home folder; set VAE_EDGE_CACHE to a folder"):
        tune(tiny_path, devices=["cpu"], seconds=1)


def test_cache_folder_may_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VAE_EDGE_CACHE", str(tmp_path / "named"))
    assert write_tuning("a" * 64, TABLE).parent == tmp_path / "named" / "tuning"
    assert read_tuning("a" * 64) == TABLE


def test_file_of_another_bundle_is_not_taken() -> None:
    write_tuning("a" * 64, TABLE).replace(write_tuning("b" * 64, TABLE))
    assert read_tuning("b" * 64) == []


def test_folder_that_cannot_be_written_is_an_output_error(cache: Path) -> None:
    (cache / "cache").write_text("a file where a folder has to be")
    with pytest.raises(OutputError, match=r"cannot be made: .*; set VAE_EDGE_CACHE to a folder that can be written to"):
        write_tuning("a" * 64, TABLE)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs a folder that takes no file from anybody")
def test_folder_that_takes_no_file_is_an_output_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VAE_EDGE_CACHE", "/proc/self")
    with pytest.raises(OutputError, match=r"^/proc/self/fd cannot be written to: .*; set VAE_EDGE_CACHE to a folder"):
        make_cache_folder("fd")


def test_cache_folder_holds_no_more_than_what_is_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VAE_EDGE_CACHE", str(cache / "made"))
    assert [*make_cache_folder("tuning").iterdir()] == []


# --- auto -------------------------------------------------------------------------------------------------------------


def test_auto_runs_what_was_measured(tiny_path: Path, images: np.ndarray) -> None:
    still = Candidate("cpu", "fp32", 2, spinning=False)
    table = [measured(ONE, {1: 1.0, 32: 9.0}), measured(still, {1: 2.0, 32: 1.0}, {1: 0.5, 32: 1.0})]
    write_tuning(Bundle.open(tiny_path).digest, table)
    with VAE.load(tiny_path, device="auto", precision="auto") as vae, VAE.load(tiny_path) as plain:
        routes = [(route["from_batch"], route["threads"], route["spinning"]) for route in vae.plan["encode"]]
        assert routes == [(1, 1, None), (6, 2, False)]
        assert [route["threads"] for route in vae.plan["decode"]] == [2]
        operation = vae._open_operations()[0]
        assert operation.route(5) is operation.routes[0]
        assert operation.route(6) is operation.routes[1]
        for size in (1, 5, 6, 20):
            np.testing.assert_allclose(vae.encode(images[:size]).mean, plain.encode(images[:size]).mean, atol=1e-6)
        assert vae.selftest().passed
    with VAE.load(tiny_path, device="auto", threads=1) as vae:
        assert [route["threads"] for route in vae.plan["encode"]] == [1]


MIXED = [
    measured(ONE, {1: 1.0, 32: 9.0}),
    measured(Candidate("cpu", "int8", 1), {1: 2.0, 32: 1.0}),
]


@pytest.fixture
def mixed(bundle: Path, resign: Any) -> VAE:
    """fp32 up to 5 examples, from 6 on what its manifest calls int8, whose mean is 0.01 larger."""
    onnx = pytest.importorskip("onnx")
    model = onnx.load(bundle / "encoder.onnx")
    for tensor in model.graph.initializer:
        if tensor.name == "mean.bias":
            tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) + 0.01, tensor.name))

    def add(data: dict[str, Any]) -> None:
        data["precisions"]["int8"] = {"encoder": "encoder.int8.onnx", "decoder": "decoder.onnx", "fidelity": {}}
        data["golden"]["tolerance"]["int8"] = 0.05

    resign(bundle, add, **{"encoder.int8": model.SerializeToString()})
    write_tuning(Bundle.open(bundle).digest, MIXED)
    return VAE.load(bundle, device="auto", precision="auto")


def test_chunks_take_the_route_of_the_whole_call(mixed: VAE, images: np.ndarray) -> None:
    assert [route["precision"] for route in mixed.plan["encode"]] == ["fp32", "int8"]
    whole = mixed.encode(images[:20]).mean
    np.testing.assert_allclose(mixed.encode(images[:20], batch_size=3).mean, whole, atol=1e-6)
    assert np.abs(mixed.encode(images[:3]).mean - whole[:3]).max() == pytest.approx(0.01, abs=1e-4)
    many = np.resize(images, (257, *images.shape[1:]))
    many[256] = many[0]
    codes = mixed.encode(many).mean
    np.testing.assert_allclose(codes[256], codes[0], atol=1e-6)


def test_selftest_runs_every_route_against_its_own_tolerance(mixed: VAE) -> None:
    result = mixed.selftest()
    assert result.passed
    assert [(route.operation, route.precision, route.tolerance) for route in result.routes] == [
        ("encode", "fp32", 1e-4), ("encode", "int8", 0.05), ("decode", "fp32", 1e-4),
    ]  # fmt: skip
    small, large = (route.errors["mean"] for route in result.routes[:2])
    assert small < 1e-5 < 1e-3 < large == result.errors["mean"]
    altered = result.routes[1]._replace(tolerance=1e-4)
    assert not result._replace(routes=(result.routes[0], altered, result.routes[2])).passed


@pytest.mark.parametrize(
    "gone", [Candidate("cuda:99", "fp32"), Candidate("openvino", "tf32", 1), Candidate("npu", "fp32")]
)
def test_device_that_is_gone_leaves_the_others(tiny_path: Path, gone: Candidate) -> None:
    bundle = Bundle.open(tiny_path)
    write_tuning(bundle.digest, [measured(ONE, {1: 2.0}), measured(gone, {1: 1.0})])
    with VAE.load(tiny_path, device="auto", precision="auto") as vae:
        assert vae.plan["encode"][0]["threads"] == 1
    write_tuning(bundle.digest, [measured(gone, {1: 1.0})])
    with VAE.load(tiny_path, device="auto", precision="auto") as vae:
        assert vae.plan["encode"][0]["threads"] is None


def test_precision_that_the_bundle_has_not_is_left_out(tiny_path: Path) -> None:
    write_tuning(Bundle.open(tiny_path).digest, [measured(ONE, {1: 2.0}), measured(INT8, {1: 1.0})])
    with VAE.load(tiny_path, device="auto", precision="auto") as vae:
        assert vae.plan["encode"][0]["precision"] == "fp32"


def test_devices_are_measured_under_the_names_by_which_they_are_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    usable = {"cpu": None, "cuda": None, "tensorrt": None, "openvino": "it is not installed"}
    monkeypatch.setattr(tune_module, "usable_devices", lambda: usable)
    assert tune_module._usable(None) == tune_module._usable(["cpu", "cuda"]) == ["cpu", "cuda:0"]
    assert tune_module._usable(["tensorrt"]) == ["tensorrt:0"]  # only where it is named
    assert tune_module._usable(["cuda", "cpu", "cuda"]) == ["cuda:0", "cpu"]


def test_defaults_stay_exact_where_a_tuning_exists(tiny_path: Path) -> None:
    write_tuning(Bundle.open(tiny_path).digest, [measured(ONE, {1: 1.0})])
    with VAE.load(tiny_path) as vae:
        assert (vae.plan["encode"][0]["threads"], vae.plan["encode"][0]["device"]) == (None, "cpu")


def test_without_a_tuning_the_stated_rules_choose(tiny_path: Path) -> None:
    with VAE.load(tiny_path, device="auto", precision="auto", threads=1) as vae:
        assert vae.precision == "fp32"
        assert [route["threads"] for route in vae.plan["encode"]] == [1]


def test_options_that_were_not_there_when_it_was_measured_set_it_aside(tiny_path: Path) -> None:
    write_tuning(Bundle.open(tiny_path).digest, [measured(ONE, {1: 1.0})])
    with VAE.load(tiny_path, device="cpu", precision="auto", provider_options={}) as vae:
        assert vae.plan["encode"][0]["threads"] == 1  # none at all
    with pytest.raises(InputError, match="the CPU provider has none"):
        VAE.load(tiny_path, device="cpu", precision="auto", provider_options={"name": "value"})


def test_another_bundle_is_not_concerned(tiny_path: Path, rgb_path: Path) -> None:
    write_tuning(Bundle.open(tiny_path).digest, [measured(ONE, {1: 1.0})])
    with VAE.load(rgb_path, device="auto") as vae:
        assert vae.plan["encode"][0]["threads"] is None


# --- measuring --------------------------------------------------------------------------------------------------------


def test_tune_measures_and_auto_takes_it(tiny_path: Path) -> None:
    lines: list[str] = []
    file, result = tune(tiny_path, devices=["cpu"], seconds=1, progress=lines.append)
    assert read_tuning(Bundle.open(tiny_path).digest) == result
    assert file.is_file()
    assert {entry.candidate.threads for entry in result} >= {1}
    for entry in result:
        for row in entry.seconds.values():
            assert list(row) == [1, 8, 32]
            assert all(1e-7 < time < 1 for time in row.values())
    assert lines[0] == "round 1 of 3: cpu, fp32, 1 thread"
    with VAE.load(tiny_path, device="auto") as vae:
        assert vae.plan["encode"][0]["threads"] is not None


@pytest.fixture
def rounds(tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[float], list[list[Candidate]]]:
    """What each round measures, in its order, where a candidate takes so many times the share that it is given."""

    def measure(slowness: float) -> list[list[Candidate]]:
        now, order = 0.0, list[Candidate]()

        def child(path: Path, candidate: Candidate, seconds: float) -> dict[str, dict[int, float]]:
            nonlocal now
            now += slowness * seconds
            order.append(candidate)
            return {name: {1: 1e-3} for name in OPERATIONS}

        monkeypatch.setattr(tune_module, "time", SimpleNamespace(monotonic=lambda: now))
        monkeypatch.setattr(tune_module, "usable_cores", lambda: 4)
        monkeypatch.setattr(tune_module, "_in_child", child)
        count = len(tune(tiny_path, devices=["cpu"], seconds=60)[1])
        return [order[start : start + count] for start in range(0, len(order), count)]

    return measure


@pytest.mark.parametrize(("slowness", "count"), [(0.5, 3), (1.0, 3), (1.5, 2), (2.0, 1), (10.0, 1)])
def test_another_round_is_begun_only_where_it_fits(
    rounds: Callable[[float], list[list[Candidate]]], slowness: float, count: int
) -> None:
    assert len(rounds(slowness)) == count


def test_every_round_turns_the_order_around(rounds: Callable[[float], list[list[Candidate]]]) -> None:
    first, second, third = rounds(1.0)
    assert len(set(first)) > 1
    assert second == first[::-1]
    assert third == first


def test_candidates_are_within_the_budget(tiny_path: Path) -> None:
    data = json.loads((tiny_path / "manifest.json").read_bytes())
    entry = dict(data["precisions"]["fp32"])
    data["precisions"]["int8"] = {**entry, "quality": {"within_budget": False}}
    data["precisions"]["fp16"] = entry
    manifest = Manifest._from_dict(data, 1)
    found = {(c.device, c.precision) for c in candidates(manifest, ["cpu", "openvino", "cuda:0"])}
    assert found == {
        ("cpu", "fp32"),
        ("openvino", "fp32"),
        ("openvino", "bf16"),
        ("cuda:0", "fp32"),
        ("cuda:0", "fp16"),
        ("cuda:0", "tf32"),
    }
    data["precisions"]["int8"]["quality"]["within_budget"] = True
    data["precisions"]["tf32"] = {**entry, "quality": {"within_budget": False}}
    assert {c.precision for c in candidates(Manifest._from_dict(data, 1), ["cuda:0"])} == {"fp32", "fp16"}
    data["precisions"]["tf32"]["quality"]["within_budget"] = True
    measured = [c.precision for c in candidates(Manifest._from_dict(data, 1), ["cuda:0"])]
    assert sorted(measured) == ["fp16", "fp32", "tf32"]  # each once
    del data["precisions"]["tf32"]
    data["refused"] = {"tf32": {"reason": "it loses too much"}}
    assert {c.precision for c in candidates(Manifest._from_dict(data, 1), ["cuda:0"])} == {"fp32", "fp16"}
    assert ("cpu", "int8") in {(c.device, c.precision) for c in candidates(Manifest._from_dict(data, 1), ["cpu"])}


def test_candidate_that_fails_its_self_test_is_left_out(bundle: Path, resign: Any) -> None:
    onnx = pytest.importorskip("onnx")
    model = onnx.load(bundle / "decoder.onnx")
    for tensor in model.graph.initializer:
        if tensor.name == "out.bias":
            tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) + 0.1, tensor.name))

    def add(data: dict[str, Any]) -> None:
        data["files"]["decoder.int8.onnx"] = data["files"].pop("spoiled.onnx")
        data["precisions"]["int8"] = {"encoder": "encoder.onnx", "decoder": "decoder.int8.onnx", "fidelity": {}}
        data["golden"]["tolerance"]["int8"] = 0.01

    resign(bundle, add, spoiled=model.SerializeToString())
    (bundle / "spoiled.onnx").rename(bundle / "decoder.int8.onnx")
    lines: list[str] = []
    _, result = tune(bundle, devices=["cpu"], seconds=0.5, progress=lines.append)
    assert {entry.candidate.precision for entry in result} == {"fp32"}
    assert any("left out: its self-test failed" in line for line in lines)


def test_precision_of_a_provider_that_loses_quality_is_left_out(tiny: VAE, monkeypatch: pytest.MonkeyPatch) -> None:
    golden = tiny.golden()
    assert tune_module._psnr_loss(tiny, golden) == 0  # fp32 was measured at export
    monkeypatch.setattr(tiny, "_precision", "bf16")
    assert abs(tune_module._psnr_loss(tiny, golden)) < 1e-3
    noisy = {**golden, "reconstruction": 0.9 * golden["reconstruction"] + 0.1 * golden["x"]}  # a better reference
    expected = -20 * np.log10(0.9)
    assert tune_module._psnr_loss(tiny, noisy) == pytest.approx(expected, abs=1e-3)
    golden["reconstruction"][:1] = noisy["reconstruction"][:1]  # of one, as the export counts: the mean of decibels
    assert tune_module._psnr_loss(tiny, golden) == pytest.approx(expected / len(golden["x"]), abs=1e-3)


def test_child_that_dies_is_left_out(tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_module.sys, "executable", "/bin/false")
    lines: list[str] = []
    with pytest.raises(DeviceError, match="tiny could not be measured on any of cpu"):
        tune(tiny_path, devices=["cpu"], seconds=1, progress=lines.append)
    assert any("its process ended with status 1: no result" in line for line in lines)


@pytest.mark.parametrize("seconds", [0, -1, 3601, float("nan"), "60", True, None])
def test_seconds_out_of_range_are_refused(tiny_path: Path, seconds: Any) -> None:
    with pytest.raises(InputError, match=r"seconds is .*; expected a number above 0, at most 3600"):
        tune(tiny_path, seconds=seconds)


def test_device_that_is_not_usable_is_refused(tiny_path: Path) -> None:
    with pytest.raises(
        InputError, match="device 'gpu' cannot be measured: it is not one of cpu, cuda, tensorrt, openvino"
    ):
        tune(tiny_path, devices=["gpu"])
    with pytest.raises(InputError, match=r"devices is \[\]; expected at least one of cpu"):
        tune(tiny_path, devices=[])


def test_no_module_of_the_current_folder_runs(tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "statistics.py").write_text("raise SystemExit('hijacked')")
    monkeypatch.chdir(tmp_path)
    _, result = tune(tiny_path.absolute(), devices=["cpu"], seconds=0.2)
    assert result


def test_a_program_that_is_no_interpreter_says_so(tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "frozen", True, raising=False)  # as PyInstaller does
    with pytest.raises(InputError, match=r"tuning starts Python processes, and .* is no Python interpreter"):
        tune(tiny_path, devices=["cpu"], seconds=1)


def test_child_that_cannot_start_is_left_out_in_words(tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_module.sys, "executable", str(tiny_path))
    lines: list[str] = []
    with pytest.raises(DeviceError, match="tiny could not be measured"):
        tune(tiny_path, devices=["cpu"], seconds=1, progress=lines.append)
    assert any("left out: its process could not be started: " in line for line in lines)


# --- the command ------------------------------------------------------------------------------------------------------


def test_command_shows_a_table_and_what_auto_takes(tiny_path: Path) -> None:
    result = CliRunner().invoke(main, ["tune", str(tiny_path), "--device", "cpu", "--seconds", "0.5"])
    assert result.exit_code == 0, result.output
    assert "encode  1  encode  8  encode 32  decode  1" in result.stdout
    assert "auto takes for decode from batch  1: cpu, fp32, " in result.stdout
    assert "round 1 of 3" in result.stderr


def test_command_as_json_prints_nothing_else(tiny_path: Path) -> None:
    result = CliRunner().invoke(main, ["tune", str(tiny_path), "--device", "cpu", "--seconds", "0.5", "--json"])
    data = json.loads(result.stdout)
    assert Path(data["file"]).is_file()
    assert data["measured"][0]["device"] == "cpu"


def test_command_answers_a_bad_device_in_one_sentence(tiny_path: Path) -> None:
    result = CliRunner().invoke(main, ["tune", str(tiny_path), "--device", "gpu"])
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
