"""The race on a GPU: groups, reports and refusals with planted competitors, and the real ones' code on the CPU."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import vae_benchmarks.cli as cli
import vae_benchmarks.race.ahead as ahead
import vae_benchmarks.race.running as running
from vae_benchmarks import MachineFacts, ReportError, machine
from vae_benchmarks.children import at_once
from vae_benchmarks.gpu import GpuFacts
from vae_benchmarks.race import Case, Competitor, Point, RaceReport, RaceSettings, merge, race
from vae_benchmarks.race.competitors import COMPETITORS, CUDA_COMPETITORS, competitors_on, engine_of
from vae_benchmarks.race.entrant import DEVICE_OPERATIONS, HOST_OPERATIONS, judge
from vae_benchmarks.race.peers import onnxruntime_device
from vae_benchmarks.race.peers.choice import fastest
from vae_benchmarks.race.picture import _draw_case, _label_axis, draw_race
from vae_benchmarks.race.report import OPERATIONS
from vae_benchmarks.race.text import format_markdown, format_race
from vae_runtime.cuda import why_not_cuda
from vae_runtime.errors import InputError

from .conftest import undisturbed

PLANTED = str(Path(__file__).with_name("planted.py"))
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "race"
WHY_NOT = why_not_cuda()
HOPPER = GpuFacts("NVIDIA H100", 80 * 2**30, "9.0", "13.0", "580.65.06", 345.0, 1980.0, 2619.0, 700.0, 0.0)


def planted(name: str, **options: Any) -> Competitor:
    group = name.rpartition("-")[2]
    options = {"precision": group, **options}
    return Competitor(name, PLANTED, options, is_peer=engine_of(name) != "ours", group=group)


@contextlib.contextmanager
def a_gpu() -> Iterator[None]:
    """A machine with one, as far as the race itself looks for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "why_not_cuda", lambda: None)
        patch.setattr(machine.GpuFacts, "read", classmethod(lambda cls: HOPPER))
        yield


@pytest.fixture
def with_gpu() -> Iterator[None]:
    with a_gpu():
        yield


def on_cuda(**given: Any) -> RaceSettings:
    return RaceSettings.on("cuda", **{"points": (Point(1, 1),), "budget": 0.3, "rounds": 3, **given})


# Milliseconds from host to host, and of what stays on the device: as much as the other way round would be.
SPEEDS = {
    "ours-cuda-fp32": (6, 4),
    "torch-cuda-fp32": (18, 8),
    "torch-graph-cuda-fp32": (12, 16),
    "onnxruntime-cuda-fp32": (3, 12),
    "ours-cuda-fp16": (8, 2),
    "torch-cuda-fp16": (2, 6),
}


def planted_ms(operation: str, competitor: str) -> float:
    return SPEEDS[competitor][operation in DEVICE_OPERATIONS]


@pytest.fixture(scope="module")
def report(tiny: Path) -> RaceReport:
    field = (
        *(planted(name, milliseconds=host, resident=device) for name, (host, device) in SPEEDS.items()),
        planted("torch-compile-cuda-fp16", resident=1, fault="wrong-on-device"),
        planted("torch-graph-cuda-fp16", resident=1, fault="reuse-on-device"),
        planted("torch-reduce-overhead-cuda-fp16"),
    )
    with a_gpu():
        return race([tiny], on_cuda(budget=1.5, rounds=6), competitors=field)


def test_everyone_is_compared_within_his_precision(report: RaceReport) -> None:
    (point,) = report.cases[0].points
    assert point.point == Point(1, 1, "cuda")
    ratios = {(one.operation, one.competitor): one for one in point.ratios}
    assert {one.against for one in point.ratios if one.competitor.endswith("fp32")} == {"ours-cuda-fp32"}
    assert {one.against for one in point.ratios if one.competitor.endswith("fp16")} == {"ours-cuda-fp16"}
    assert 2.2 < ratios["encode", "torch-cuda-fp32"].ratio < 3.8
    assert 0.15 < ratios["encode", "torch-cuda-fp16"].ratio < 0.45
    assert 1.5 < ratios["encode-on-device", "torch-cuda-fp32"].ratio < 2.6
    assert {(one.operation, one.competitor) for one in point.ratios if one.fastest_peer} == {
        *((operation, "onnxruntime-cuda-fp32") for operation in HOST_OPERATIONS),
        *((operation, "torch-cuda-fp32") for operation in DEVICE_OPERATIONS),
        *((operation, "torch-cuda-fp16") for operation in OPERATIONS),
    }


def configurations(found: RaceReport) -> dict[str, str]:
    return {runner.name: runner.configuration for point in found.cases[0].points for runner in point.runners}


@pytest.mark.parametrize("memory", [float("inf"), 5.0 * 2**30])
def test_engines_are_loaded_at_once_where_they_fit(
    memory: float, tiny: Path, with_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(running, "available_bytes", lambda: memory)
    field = tuple(planted(f"{name}-cuda-fp32", variable="PLANTED_LOADED", resident=0.1) for name in ("ours", "a", "b"))
    found = race([tiny], on_cuda(), lines.append, competitors=field)
    fits = memory > 100 * 2**30
    assert set(configurations(found).values()) == {"in fp32" if fits else "0 ms"}
    assert any("loading all engines" in line for line in lines) == fits


def test_an_engine_that_cannot_be_loaded_is_out_and_the_others_race(tiny: Path, with_gpu: None, tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("def load(**options):\n    raise OSError('libcuda is broken')\n")
    field = (
        planted("ours-cuda-fp32", resident=0.1),
        dataclasses.replace(planted("torch-cuda-fp32"), module=str(broken)),
    )
    (point,) = race([tiny], on_cuda(), competitors=field).cases[0].points
    assert point.failed == {"torch-cuda-fp32": "OSError: libcuda is broken"}
    assert {row.competitor for row in point.rows} == {"ours-cuda-fp32"}


@pytest.mark.parametrize("variant", ["eager", "reduce-overhead"])
def test_loading_torch_also_loads_its_compiler_where_that_is_used(
    variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes seconds, and nothing is timed yet. What it compiles is caught here at the compiler's door."""
    torch = pytest.importorskip("torch")
    from torch._dynamo.utils import counters
    from torch._inductor import compile_fx

    from vae_benchmarks.race.peers import torch_device

    caught: list[object] = []
    monkeypatch.setattr(compile_fx, "compile_fx", lambda graph, inputs, **_: caught.append(graph) or graph.forward)
    counters.clear()
    before = torch.is_grad_enabled()
    with torch._inductor.config.patch(freezing=False):
        torch_device.load(**{**CUDA_COMPETITORS["torch-cuda-fp32"].options, "device": "cpu", "variant": variant})
    assert counters["stats"]["unique_graphs"] == len(caught) == (variant != "eager")
    assert torch.is_grad_enabled() is before


@pytest.mark.parametrize("memory", [float("inf"), 3.0 * 2**30])
def test_what_compiles_has_done_so_before_it_is_opened(
    memory: float, tiny: Path, with_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ahead, "available_bytes", lambda: memory)
    monkeypatch.setattr(ahead, "usable_cores", lambda: 4)
    field = (
        planted("ours-cuda-fp32", resident=0.1),
        *(
            dataclasses.replace(planted(f"{name}-cuda-fp32", compiles=name, resident=0.1, fault=fault), compiles=True)
            for name, fault in (("a", ""), ("b", ""), ("c", "absent"))
        ),
    )
    found = race([tiny], on_cuda(), competitors=field)
    times = 1 if memory > 10 * 2**30 else 0
    assert configurations(found) == {
        "ours-cuda-fp32": "0 ms",
        "a-cuda-fp32": f"compiled {times} times before",
        "b-cuda-fp32": f"compiled {times} times before",
    }
    assert found.cases[0].points[0].skipped == {"c-cuda-fp32": "the planted engine is not installed"}


def test_compilers_race_with_their_own_kernels_measured_again() -> None:
    assert {name for name, one in CUDA_COMPETITORS.items() if one.compiles} == {
        f"torch-{mode}-cuda-{precision}"
        for mode in ("compile", "reduce-overhead")
        for precision in ("fp32", "tf32", "fp16")
    }


def test_what_is_interrupted_while_much_is_done_at_once_stops_it() -> None:
    stopped = threading.Event()
    with pytest.raises(KeyboardInterrupt):
        at_once(lambda item: interrupt(item, stopped), range(3), 3, stopped.set)
    assert stopped.is_set()


def interrupt(item: int, stopped: threading.Event) -> None:
    if item == 0:
        raise KeyboardInterrupt
    assert stopped.wait(10)


def test_calls_on_the_device_are_judged_too(report: RaceReport) -> None:
    (point,) = report.cases[0].points
    assert point.disqualified.keys() == {"torch-compile-cuda-fp16", "torch-graph-cuda-fp16"}
    wrong, reused = point.disqualified.values()
    assert wrong.startswith("the root mean square error of ")
    assert " on the device is " in wrong
    assert wrong.endswith("; fp16 may have 0.01")
    assert reused == "decode-on-device overwrites a result that it handed out before"
    assert point.skipped == {"torch-reduce-overhead-cuda-fp16": "it has no encode-on-device, it has encode, decode"}
    errors = point.runners[0].errors
    assert set(errors) == {
        name + where for name in ("mean", "logvar", "reconstruction") for where in ("", " on the device")
    }


def test_the_text_keeps_precisions_and_kinds_of_calls_apart(report: RaceReport) -> None:
    report = undisturbed(report, planted_ms)
    text = format_race(report)
    for needed in (
        "encode: ours-cuda-fp32 is faster than eager torch, torch-cuda-fp32, which takes ",
        "encode: ours-cuda-fp32 is faster than the fastest torch in fp32, torch-graph-cuda-fp32, which takes ",
        "encode: ours-cuda-fp32 is slower than the fastest peer, onnxruntime-cuda-fp32, which takes ",
        "decode-on-device: ours-cuda-fp32 is faster than the fastest torch in fp32 (eager), torch-cuda-fp32, which ",
        "GPU: NVIDIA H100, 80.0 GiB memory, compute capability 9.0, driver 580.65.06 for CUDA up to 13.0; before the "
        "race: SM clock 345 of at most 1980 MHz, memory clock 2619 MHz, power limit 700 W, busy 0% of the time",
        "batch 1, cuda, host threads 1",
        "calls on the device: ",
        "ours-cuda-fp16 runs on: ",
        "torch-cuda-fp16 runs on: planted 1.0, 2 ms",
        "encode: ours-cuda-fp16 is slower than the fastest torch in fp16 (eager), torch-cuda-fp16, which takes ",
    ):
        assert needed in text
    assert text.index("in fp32:") < text.index("in fp16:")
    assert text.count("which takes") + text.count("no difference shown") == 2 * 3 + 2 * 1 + 4
    markdown = format_markdown(report)
    blocks = [block.splitlines() for block in markdown.split("\n\n") if block.startswith("|")]
    assert [len(block) for block in blocks] == [2 + 4 * 4, 2 + 4 * 2]
    assert not any("fp16" in line for line in blocks[0])
    assert markdown.count("#### fp") == 2


def test_the_report_survives_json_and_the_picture_shows_each_precision(report: RaceReport, tmp_path: Path) -> None:
    report.save(tmp_path / "race.json")
    assert RaceReport.load(tmp_path / "race.json") == dataclasses.replace(report, settings=report.settings)
    pytest.importorskip("matplotlib")
    draw_race(report, tmp_path / "race.png")
    width, height = np.frombuffer((tmp_path / "race.png").read_bytes()[16:24], ">u4")
    assert (width, height) > (900, 900)  # two columns of four panels
    marks: list[float] = []
    panel = SimpleNamespace(plot=lambda values, places, *style, **more: marks.extend(values if style else ()))
    (point,) = report.cases[0].points
    _draw_case(panel, 0, point, "encode", "fp16", ["ours", "onnxruntime", "torch", "torch-graph"])
    assert marks == [row.p50_ms for row in point.rows if row.operation == "encode" and "fp16" in row.competitor]


@pytest.mark.parametrize("times", [(1.6, 2.4), (2.1, 3.2), (0.25, 2.1), (0.02, 90.0)])
def test_the_times_below_a_panel_stand_apart(times: tuple[float, float]) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.0, 1.5))
    canvas = FigureCanvasAgg(figure)
    panel = figure.subplots()
    panel.set_xscale("log")
    panel.set_xlim(*times)
    _label_axis([panel])
    canvas.draw()
    ticks = zip(panel.get_xticklabels(), panel.get_xticks(), strict=True)
    boxes = [label.get_window_extent() for label, at in ticks if times[0] <= at <= times[1]]
    assert len(boxes) >= 2
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))


def test_older_reports_stay_readable_and_take_races_on_a_gpu(report: RaceReport, tiny: Path) -> None:
    old = RaceReport.load(RESULTS / "onnxruntime.json")
    assert old.settings.device == "cpu"
    assert {point.point.device for case in old.cases for point in case.points} == {"cpu"}
    assert {ratio.against for case in old.cases for point in case.points for ratio in point.ratios} == {"ours"}
    assert "\nGPU: " not in format_race(old)
    on_gpu = dataclasses.replace(report, machine=dataclasses.replace(old.machine, gpu=HOPPER))
    for both in (merge([old, on_gpu]), merge([on_gpu, old])):
        assert both.machine.gpu == HOPPER
        assert {"calls on the device", "rounds"} <= both.method.keys()
        assert "## mlp" in format_markdown(both)


def test_points_of_both_devices_stand_side_by_side(report: RaceReport, tiny: Path, with_gpu: None) -> None:
    """In --merge and in --resume."""
    field = (planted("ours-cuda-fp32", resident=1),)
    on_cpu = RaceSettings(points=(Point(1, 1), Point(1, 4000)), budget=0.1, rounds=3)
    peer = dataclasses.replace(field[0], group="", name="ours")
    before = race([tiny], on_cpu, competitors=(peer,))
    both = race([tiny], on_cuda(points=(Point(1, 1), Point(1, 4000))), competitors=field, before=before)
    (case,) = both.cases
    assert [point.point for point in case.points] == [Point(1, 1), Point(1, 1, "cuda")]
    assert case.points[0] == before.cases[0].points[0]
    assert list(case.skipped_points) == ["1x4000", "1x4000 on cuda"]
    again = race([tiny], on_cuda(), competitors=field, before=both)
    assert again.cases[0].points == case.points
    merged = merge([before, report])
    assert [point.point for point in merged.cases[0].points] == [Point(1, 1), Point(1, 1, "cuda")]


def test_reports_of_different_gpus_are_not_merged(report: RaceReport) -> None:
    def on(**changes: Any) -> RaceReport:
        gpu = dataclasses.replace(HOPPER, **changes)
        return dataclasses.replace(report, machine=dataclasses.replace(report.machine, gpu=gpu))

    assert merge([report, on(sm_clock_mhz=1980.0, utilization_percent=3.0)]).machine.gpu is not None
    message = (
        r"^the reports are from different GPUs \(NVIDIA H100 with driver 580.65.06 and NVIDIA H100 with driver 590.1\);"
        " only those of one can be merged$"
    )
    with pytest.raises(ReportError, match=message):
        merge([report, on(driver="590.1")])


@pytest.mark.skipif(WHY_NOT is None, reason="this machine has a usable GPU")
def test_a_race_on_a_gpu_is_refused_in_one_sentence_where_there_is_none(tiny: Path, tmp_path: Path) -> None:
    output = tmp_path / "race"
    result = CliRunner().invoke(cli.main, ["race", str(tiny), "--device", "cuda", "--output", str(output)])
    assert (result.exit_code, result.stdout, output.exists()) == (1, "", False)
    assert result.stderr == f"Error: device 'cuda' cannot be used: {WHY_NOT}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--device", "tpu"), "device is 'tpu'; expected one of cpu, cuda"),
        (
            ("--operations", "encode-on-device"),
            "operation is 'encode-on-device'; expected one of encode, decode on cpu",
        ),
        (
            ("--device", "cuda", "--competitors", "torch"),
            "competitor is 'torch'; expected one of ours-cuda-fp32, torch-",
        ),
        (("--competitors", "torch-cuda-fp32"), "competitor is 'torch-cuda-fp32'; expected one of ours, ours-cpu, "),
    ],
)
def test_what_does_not_fit_the_device_is_answered_in_one_sentence(
    tiny: Path, arguments: tuple[str, ...], message: str
) -> None:
    result = CliRunner().invoke(cli.main, ["race", str(tiny), *arguments])
    assert (result.exit_code, result.stdout, len(result.stderr.splitlines())) == (1, "", 1)
    assert message in result.stderr


def test_names_of_competitors_are_those_promised() -> None:
    engines = ["ours", "torch", "torch-compile", "torch-reduce-overhead", "torch-graph", "onnxruntime"]
    assert list(CUDA_COMPETITORS) == [
        f"{engine}-cuda-{precision}"
        for precision in ("fp32", "tf32", "fp16")
        for engine in engines
        if (engine, precision) != ("onnxruntime", "fp16")
    ]
    assert {name for name, one in CUDA_COMPETITORS.items() if not one.is_peer} == {
        f"ours-cuda-{precision}" for precision in ("fp32", "tf32", "fp16")
    }
    assert not CUDA_COMPETITORS.keys() & COMPETITORS.keys()
    settings = RaceSettings.on("cuda")
    assert settings.competitors == tuple(CUDA_COMPETITORS)
    assert settings.points == (Point(1, 1, "cuda"), Point(32, 1, "cuda"))
    assert settings.operations == ("encode", "decode", "encode-on-device", "decode-on-device")


def test_the_machine_s_facts_have_the_gpu_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.GpuFacts, "read", classmethod(lambda cls: HOPPER))
    assert MachineFacts.read(gpu=True).gpu == HOPPER
    assert MachineFacts.read().gpu is None


def test_no_setting_of_the_user_turns_tf32_on_or_off(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, with_gpu: None
) -> None:
    variables = ("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "CUDA_VISIBLE_DEVICES")
    for name in variables:
        monkeypatch.setenv(name, "1")
    names = ("ours-cuda-fp32", "torch-cuda-fp32", "onnxruntime-cuda-fp32")
    field = (planted(one, resident=1, variable=variable) for one, variable in zip(names, variables, strict=True))
    found = race([tiny], on_cuda(), competitors=tuple(field))
    said = {runner.name: runner.configuration for runner in found.cases[0].points[0].runners}
    assert said == dict(zip(names, ("0 ms", "0 ms", "1"), strict=True))


def test_the_fastest_way_is_taken_and_the_others_are_named() -> None:
    def way(milliseconds: float, result: Any) -> Callable[[], Callable[[Any], Any]]:
        def call(x: Any) -> Any:
            time.sleep(milliseconds / 1000)
            return result

        return lambda: call

    def fail() -> Any:
        raise RuntimeError("no graph here")

    def is_right(found: Any) -> bool:
        return bool(found == 7)

    ways = {"slow": way(3, 7), "broken": fail, "wrong": way(0, 8), "quick": way(1, 7)}
    words, call = fastest(ways, None, is_right)
    assert words == "quick (broken failed: RuntimeError, wrong gives other outputs)"
    assert call(None) == 7
    assert fastest({"slow": way(3, 7), "quick": way(1, 7)}, None, is_right)[0] == "quick"
    assert fastest({"broken": fail, "wrong": way(0, 8)}, None, is_right)[1](None) == 8  # for the judge to refuse
    with pytest.raises(RuntimeError, match="no graph here"):
        fastest({"broken": fail, "other": lambda: fail()}, None, is_right)


@pytest.mark.parametrize("batch", [1, 3])
def test_bare_onnxruntime_with_everything_bound(tiny: Path, batch: int) -> None:
    case = Case.open(tiny)
    reference = {name: array[np.arange(batch) % len(array)] for name, array in case.reference().items()}
    entrant = onnxruntime_device.open_entrant(case, batch, 1, "cpu", "fp32")
    assert judge(entrant, reference).fault is None
    assert set(entrant.operations) == set(OPERATIONS)
    assert "CPUExecutionProvider, all optimisations, encoder (" in entrant.configuration


def test_what_is_bound_for_a_cuda_graph_is_copied_in_and_out(tiny: Path) -> None:
    import onnxruntime

    value = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(1, np.float32))
    try:
        value.update_inplace(value)
    except TypeError:
        pytest.skip(f"onnxruntime {onnxruntime.__version__} copies only arrays into its values")
    case = Case.open(tiny)
    reference = case.reference()
    session = onnxruntime_device._open_session(onnxruntime, case.graph("decoder"), 1, "cpu", "fp32", None)
    z, shape = reference["mean"], reference["reconstruction"].shape
    bound = onnxruntime_device.Bound(onnxruntime, session, np.zeros_like(z), [shape], "cpu")
    (image,) = bound.from_host(z)
    (other,) = bound.from_host(1 - z)
    assert not np.shares_memory(image, other)
    np.testing.assert_allclose(image, reference["reconstruction"], atol=1e-5)
    (value,) = bound.on_device(onnxruntime.OrtValue.ortvalue_from_numpy(z.copy(), "cpu", 0))
    bound.from_host(1 - z)
    np.testing.assert_allclose(value.numpy(), reference["reconstruction"], atol=1e-5)


def test_the_real_competitors_race_without_a_gpu(tiny: Path, with_gpu: None) -> None:
    """Ours and onnxruntime as on a GPU, but for the device. A bundle has nothing for torch, and one says so for all: to
    import it takes seconds."""
    torch = "torch-cuda-fp32"
    field = {name: one for name, one in competitors_on("cpu").items() if engine_of(name) in ("ours", "onnxruntime")}
    field[torch] = competitors_on("cpu")[torch]
    found = race([tiny], on_cuda(points=(Point(2, 1),)), competitors=tuple(field.values()))
    (point,) = found.cases[0].points
    assert {(row.operation, row.competitor) for row in point.rows} == {
        (operation, name)
        for operation in OPERATIONS
        for name in ("ours-cuda-fp32", "onnxruntime-cuda-fp32", "onnxruntime-cuda-tf32")
    }
    assert set(point.skipped.values()) == {
        "a bundle alone has no torch modules; build a case for it",
        "the bundle has no fp16, it has fp32",
    }
    assert point.failed.keys() == {"ours-cuda-tf32"}  # TF32 is CUDA's
    assert point.tuned == "no"
    assert {ratio.against for ratio in point.ratios} == {"ours-cuda-fp32"}


def test_torch_races_without_a_gpu(torch_case: Path, with_gpu: None) -> None:
    """Eager in two precisions; a CUDA graph is skipped by name."""
    names = ("torch-cuda-fp32", "torch-cuda-fp16", "torch-graph-cuda-fp32")
    field = tuple(competitors_on("cpu")[name] for name in names)
    found = race([torch_case], on_cuda(points=(Point(3, 1),)), competitors=field)
    (point,) = found.cases[0].points
    assert (point.disqualified, point.failed) == ({}, {})
    assert point.skipped == {"torch-graph-cuda-fp32": "a CUDA graph needs a GPU"}
    assert {(row.operation, row.competitor) for row in point.rows} == {
        (operation, name) for operation in OPERATIONS for name in names[:2]
    }
    runners = {runner.name: runner for runner in point.runners}
    exact, half = (max(runners[f"torch-cuda-{name}"].errors.values()) for name in ("fp32", "fp16"))
    assert exact < 1e-5
    assert 1e-5 < half < 0.01  # computed in half precision, and yet within what is allowed
    assert "from the host" in runners["torch-cuda-fp32"].configuration


def halves(torch_case: Path) -> tuple[Any, Any, dict[str, Any]]:
    """torch_halves, the modules and the reference, with gradients off for the rest of the test."""
    torch = pytest.importorskip("torch")
    from vae_benchmarks.race.peers import torch_halves
    from vae_benchmarks.race.peers.torch_modules import load_modules

    return (
        torch_halves,
        torch,
        {
            "modules": load_modules(torch_case / "torch", "small"),
            **Case.open(torch_case).reference(),
        },
    )


class Replayed:
    """A CUDA graph without a GPU: the work is done again, into the outputs of its capture."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work, self.outputs = work, work()

    def replay(self) -> None:
        for output, new in zip(self.outputs, self._work(), strict=True):
            output.copy_(new)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("variant", ["eager", "graph"])
def test_every_way_from_the_host_gives_results_that_stay(
    torch_case: Path, monkeypatch: pytest.MonkeyPatch, precision: str, variant: str
) -> None:
    torch_halves, torch, known = halves(torch_case)
    tried: dict[str, Any] = {}

    def keep_all(ways: Any, example: Any, is_right: Any) -> Any:
        tried.update({name: (make(), example) for name, make in ways.items()})
        return fastest(ways, example, is_right)

    def capture(work: Callable[[], Any]) -> Any:
        graph = Replayed(work)
        return graph, graph.outputs

    monkeypatch.setattr(torch_halves, "fastest", keep_all)
    monkeypatch.setattr(torch_halves, "_capture", capture)
    encoder, x, wanted = known["modules"][0], known["x"], known["mean"]
    with torch.inference_mode():
        torch_halves.open_half(encoder, x, lambda found: True, "cpu", precision, variant)
        layouts = {"contiguous", "channels_last"}
        ways = {"pageable", "pinned", "pinned results", *(["copies captured"] if variant == "graph" else [])}
        assert tried.keys() == layouts | {f"{layout}, {way}" for layout in layouts for way in ways}
        for name, (call, example) in tried.items():
            if variant == "graph" and name.endswith("pageable"):
                continue  # from a GPU it copies; here the graph's memory is the host's already
            put = torch_halves.to_arrays if name in layouts else tuple
            result = call(example)
            first = [array.copy() for array in put(result)]
            other = 1 - x
            second = put(call(torch_halves.to_device(other, "cpu") if name in layouts else other))
            for array, before, after in zip(put(result), first, second, strict=True):
                np.testing.assert_array_equal(array, before, err_msg=name)
                assert not np.shares_memory(array, after), name
                assert array.dtype == np.float32
            atol = 1e-5 if precision == "fp32" else 5e-3
            np.testing.assert_allclose(first[0], wanted, atol=atol, err_msg=name)
            assert not np.allclose(first[0], second[0], atol=1e-3), name


@pytest.mark.parametrize(
    ("frozen_gives", "words"),
    [
        (1.0, "frozen"),
        (2.0, "not frozen, which would change its outputs"),
        (RuntimeError("constant folding"), "not frozen, which failed with RuntimeError"),
    ],
)
def test_weights_are_frozen_where_that_works_and_is_right(
    torch_case: Path, monkeypatch: pytest.MonkeyPatch, frozen_gives: Any, words: str
) -> None:
    """With a compiler that does nothing else; what mode "reduce-overhead" hands out is cloned."""
    torch_halves, torch, known = halves(torch_case)
    flag = torch._inductor.config
    buffer: list[Any] = []

    def pretend(module: Any, *, dynamic: bool, fullgraph: bool, mode: str | None) -> Any:
        assert (dynamic, fullgraph, mode) == (False, True, "reduce-overhead")
        is_frozen = flag.freezing

        def call(x: Any) -> Any:
            if is_frozen and isinstance(frozen_gives, Exception):
                raise frozen_gives
            out = module(x) * (frozen_gives if is_frozen else 1)
            if not buffer:
                buffer.append(torch.empty_like(out))
            return buffer[0].copy_(out)  # a CUDA graph's memory

        return call

    monkeypatch.setattr(torch, "compile", pretend)
    z, image = known["mean"], known["reconstruction"]

    def is_right(found: Any) -> bool:
        return bool(np.allclose(found[0], image, atol=1e-4))

    with torch.no_grad(), flag.patch(freezing=False):
        half = torch_halves.open_half(known["modules"][1], z, is_right, "cpu", "fp32", "reduce-overhead")
        assert half.words.startswith(f"{words} on the device; {words}, p")
        (kept,) = half.on_device(torch.from_numpy(z))
        half.on_device(torch.from_numpy(1 - z))
    np.testing.assert_allclose(kept.numpy(), image, atol=1e-4)


def test_weights_are_halved_and_results_are_not(torch_case: Path) -> None:
    torch_halves, torch, known = halves(torch_case)
    given = torch.from_numpy(known["x"])
    encoder = known["modules"][0]
    plain = torch_halves.at_boundary(encoder, given, torch.float32, False)
    assert type(plain) is type(encoder)  # eager calls pay for no wrapper where there is nothing to convert
    for dtype, turns in ((torch.float16, False), (torch.float16, True), (torch.float32, True)):
        module = torch_halves.at_boundary(encoder, given, dtype, turns)
        assert {part.dtype for part in module.parameters()} == {dtype}
        assert {one.dtype for one in module(given)} == {torch.float32}
    assert {part.dtype for part in encoder.parameters()} == {torch.float32}


def test_a_device_without_cuda_is_skipped_by_name(torch_case: Path) -> None:
    """By each competitor itself, whatever the race has found out before."""
    if WHY_NOT is None:
        pytest.skip("this machine has a usable GPU")
    torch = pytest.importorskip("torch")
    code = (
        "import sys; from vae_benchmarks.race.worker import Worker; from vae_benchmarks.race import competitors as c\n"
        "for name, one in c.CUDA_COMPETITORS.items():\n"
        f"    print(name, Worker().answer(dict(request='open', case={str(torch_case)!r}, module=one.module,\n"
        "        options=one.options, batch=1, threads=1, check=True)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    assert [line.split(" ", 1)[0] for line in lines] == list(CUDA_COMPETITORS), done.stderr
    said = "is built without CUDA" if torch.version.cuda is None else "sees no GPU"
    for line in lines:
        assert "{'skip': " in line
        assert (f"torch {torch.__version__} {said}" if line.startswith("torch") else str(WHY_NOT)[:30]) in line


@pytest.mark.skipif(WHY_NOT is not None, reason=f"no CUDA here: {WHY_NOT}")
def test_on_a_gpu(torch_case: Path, tiny: Path) -> None:
    found = race([tiny, torch_case], RaceSettings.on("cuda", points=(Point(2, 1),), budget=5, rounds=3))
    (ours,), (theirs,) = (case.points for case in found.cases)
    assert ours.failed == {}
    assert ours.disqualified == {}
    assert {row.operation for row in ours.rows if row.competitor == "ours-cuda-fp32"} == set(OPERATIONS)
    assert not any(name.startswith("torch") for name in (*theirs.failed, *theirs.disqualified))
    assert found.machine.gpu is not None


def test_settings_of_an_unknown_device_are_refused() -> None:
    with pytest.raises(InputError, match=r"^device is 'gpu'; expected one of cpu, cuda$"):
        RaceSettings.on("gpu")
