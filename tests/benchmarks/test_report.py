"""Figures of a row, and the JSON document that users and pipelines keep."""

from __future__ import annotations

import copy
import dataclasses
import getpass
import json
import math
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vae_benchmarks import (
    OPERATIONS,
    GpuFacts,
    PartReport,
    Report,
    ReportError,
    Settings,
    SplitReport,
    StartupReport,
    benchmark,
)
from vae_benchmarks.children import run_worker
from vae_benchmarks.latency import Samples, Warmup
from vae_benchmarks.report import RowKey, summarize
from vae_benchmarks.table import format_report
from vae_runtime.errors import BundleError, InputError, OutputError

KEY = RowKey("encode", 4, 1, "cpu", "fp32", "float32")

DOCUMENT_KEYS = {
    "": "bundle clock created format format_version gpus latency machine method other_cores_busy plan settings skipped "
    "startup versions",
    "bundle": "folder golden golden_source kind manifest_file_sha256 name size",
    "clock": "cost_ns resolution_ns",
    "machine": "architecture cores_logical cores_physical cores_usable cpu cpu_quota governors gpu load_average_1min "
    "memory_bytes memory_limit_bytes system",
    "method": "calls clock inputs interval latents memory sample split startup warmup",
    "plan": "decode encode",
    "settings": "batches confidence device inputs operations precision rounds seconds size split threads width",
    "startup": "first_call_ms import_ms input load_ms peak_batch peak_rss_bytes rss_after_import_bytes "
    "rss_after_load_bytes threads to_first_result_ms",
    "versions": "numpy onnxruntime python vae_edge",
}
ROW_KEYS = (
    "batch calls_per_sample count device input interval_from mean_ms measured_seconds min_ms operation p50_high_ms "
    "p50_low_ms p50_ms p90_ms p99_ms precision round_p50_ms split stdev_ms threads throughput_per_second warmup_calls "
    "warmup_seconds warmup_stable width width_reached"
)


def rounds_of(values_ms: list[list[float]], grouped: int = 1) -> list[Samples]:
    return [Samples([v * 1e6 for v in values], grouped, Warmup(12, 0.06, True, 1e6), 0.5) for values in values_ms]


def test_the_figures_of_a_row() -> None:
    row = summarize(KEY, rounds_of([[1, 2, 3, 10]] * 8), Settings())
    assert row.key == KEY
    assert (row.count, row.p50_ms, row.mean_ms, row.min_ms) == (32, 2.5, 4.0, 1.0)
    assert row.stdev_ms == pytest.approx(np.std([1, 2, 3, 10] * 8, ddof=1))
    assert row.throughput_per_second == 1000  # 4 examples in 4 ms
    assert row.round_p50_ms == (2.5,) * 8
    assert (row.p50_low_ms, row.p50_high_ms, row.interval_from) == (2.5, 2.5, "rounds")
    assert (row.warmup_calls, row.warmup_seconds, row.measured_seconds) == (96, pytest.approx(0.48), 4.0)


def test_the_interval_comes_from_the_rounds_so_that_drift_between_them_shows() -> None:
    rounds = rounds_of([[level + n / 1000 for n in range(100)] for level in (1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7)])
    row = summarize(KEY, rounds, Settings())
    assert row.p50_low_ms == pytest.approx(1.0495)
    assert row.p50_high_ms == pytest.approx(1.7495)
    assert not row.width_reached
    assert row.width == pytest.approx(0.7 / row.p50_ms)


def test_with_few_rounds_the_interval_comes_from_the_samples() -> None:
    row = summarize(KEY, rounds_of([[1.0, 1.01, 1.02, 1.03, 1.04]] * 2), Settings())
    assert (row.p50_low_ms, row.p50_high_ms, row.interval_from) == (1.0, 1.04, "samples")
    assert row.width_reached


def test_with_few_samples_there_is_no_interval() -> None:
    row = summarize(KEY, rounds_of([[1.0], [2.0]]), Settings())
    assert (row.p50_ms, row.p50_low_ms, row.p50_high_ms, row.width, row.width_reached) == (1.5, None, None, None, False)
    single = summarize(KEY, rounds_of([[1.0]]), Settings())
    assert single.stdev_ms is None


@pytest.mark.parametrize(
    ("count", "has_p90", "has_p99"), [(35, False, False), (36, True, False), (367, True, False), (368, True, True)]
)
def test_high_percentiles_only_where_the_samples_bound_them(count: int, has_p90: bool, has_p99: bool) -> None:
    row = summarize(KEY, rounds_of([[1.0] * count]), Settings())
    assert ((row.p90_ms is not None), (row.p99_ms is not None)) == (has_p90, has_p99)


def test_grouped_calls_have_no_high_percentiles() -> None:
    row = summarize(KEY, rounds_of([[1.0] * 1000], grouped=25), Settings())
    assert (row.calls_per_sample, row.p90_ms, row.p99_ms) == (25, None, None)


def test_percentiles_of_known_values() -> None:
    row = summarize(KEY, rounds_of([list(range(1, 1002))]), Settings())
    assert (row.p50_ms, row.p90_ms, row.p99_ms) == (501, 901, 991)


def uneven(grouped: tuple[int, ...] = (1,) * 8) -> list[Samples]:
    """Seven quiet rounds and a noisy one, which took its samples until its time was up: half of them three times as
    long. In microseconds."""
    noisy = [0.020] * 717 + [0.060] * 717
    return [rounds_of([values], n)[0] for values, n in zip([[0.020] * 125] * 7 + [noisy], grouped, strict=True)]


def test_a_noisy_round_weighs_no_more_than_a_quiet_one() -> None:
    row = summarize(KEY, uneven(), Settings(), [dict.fromkeys(SplitReport.PARTS, one) for one in uneven()])
    assert row.count == 7 * 125 + 1434
    assert row.round_p50_ms == pytest.approx((0.020,) * 7 + (0.040,))
    assert row.mean_ms == pytest.approx((7 * 0.020 + 0.040) / 8)
    assert row.throughput_per_second == pytest.approx(4 / (row.mean_ms / 1000))
    assert row.stdev_ms == pytest.approx(0.040 * math.sqrt(1 / 16 * 15 / 16), rel=1e-3)
    assert (row.p90_ms, row.p99_ms) == pytest.approx((0.020, 0.060))  # a 16th of the weight is slow, 31% of the samples
    assert row.split is not None
    for part in (row, row.split.compute):
        assert part.p50_low_ms is not None
        assert part.p50_high_ms is not None
        assert part.p50_low_ms <= part.p50_ms <= part.p50_high_ms
        assert part.p50_ms == pytest.approx(0.020)


@pytest.mark.parametrize(
    ("grouped", "p90", "p99"),
    [
        ((1,) * 7 + (2,), 0.020, 0.020),  # the noisy one
        ((2,) + (1,) * 7, 0.020, 0.060),
        ((2,) * 3 + (1,) * 5, 0.020, 0.060),
        ((2,) * 4 + (1,) * 4, None, None),
        ((1,) + (2,) * 7, None, None),
    ],
)
def test_one_round_s_reading_of_the_clock_takes_no_percentile_from_the_others(
    grouped: tuple[int, ...], p90: float | None, p99: float | None
) -> None:
    row = summarize(KEY, uneven(grouped), Settings())
    assert (row.calls_per_sample, row.count) == (2, 7 * 125 + 1434)
    assert (row.p90_ms, row.p99_ms) == (pytest.approx(p90), pytest.approx(p99))


def test_the_rounds_with_single_calls_have_to_be_enough_by_themselves() -> None:
    rounds = [*rounds_of([[1.0] * 60] * 6), *rounds_of([[1.0] * 60] * 2, grouped=2)]
    row = summarize(KEY, rounds, Settings())
    assert (row.p90_ms, row.p99_ms) == (1.0, None)  # 360 of 480, where p99 takes 368


def test_the_median_lies_in_its_interval_however_uneven_the_rounds_are() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        counts = rng.choice([125, 1434], 8)
        rounds = rounds_of([(rng.uniform(0.5, 2) * rng.uniform(0.9, 3, count)).tolist() for count in counts])
        row = summarize(KEY, rounds, Settings())
        assert row.p50_low_ms is not None
        assert row.p50_high_ms is not None
        assert row.p50_low_ms <= row.p50_ms == np.median(row.round_p50_ms) <= row.p50_high_ms


def test_a_long_round_does_not_make_up_for_the_samples_that_a_short_one_lacks() -> None:
    """Of a tail that the short ones alone had, 7 times 40 samples would tell: 320 of even weight, where p99 takes
    368."""
    row = summarize(KEY, rounds_of([[1.0] * 40] * 7 + [[1.0] * 1434]), Settings())
    assert (row.p90_ms, row.p99_ms) == (1.0, None)


def test_a_real_report_is_complete(measured: Report) -> None:
    assert [row.key for row in measured.latency] == [
        (operation, batch, 1, "cpu", "fp32", dtype)
        for operation, dtype in (("sample", None), ("reconstruct", "float32"))
        for batch in (1, 6)
    ]
    for row in measured.latency:
        assert len(row.round_p50_ms) == 2
        assert 0 < row.min_ms <= row.p50_ms
        assert row.count >= 2
        assert row.warmup_calls >= 4
    startup = measured.startup
    for figure in StartupReport.FIGURES:
        repeated = getattr(startup, figure)
        assert len(repeated.values) == 2
        assert 0 < repeated.min <= repeated.median <= repeated.max
    parts = zip(startup.import_ms.values, startup.load_ms.values, startup.first_call_ms.values, strict=True)
    assert startup.to_first_result_ms.values == pytest.approx([math.fsum(part) for part in parts])
    assert startup.rss_after_import_bytes.min > 10 * 2**20
    assert startup.peak_rss_bytes.min >= startup.rss_after_load_bytes.min
    assert measured.plan["encode"][0].provider == "CPUExecutionProvider"
    assert (measured.bundle.folder, measured.bundle.golden, measured.bundle.golden_source) == (
        "tiny.vae",
        4,
        "synthetic",
    )


def test_the_document_has_these_keys_and_no_others(measured: Report) -> None:
    document = measured.to_dict()
    found = {name: document[name] if name else document for name in DOCUMENT_KEYS}
    assert {name: sorted(part) for name, part in found.items()} == {k: v.split() for k, v in DOCUMENT_KEYS.items()}
    assert all(sorted(row) == ROW_KEYS.split() for row in document["latency"])
    assert (document["format"], document["format_version"]) == ("vae-bench-report", 1)


def test_a_report_survives_its_json(measured: Report, tmp_path: Path) -> None:
    measured.save(tmp_path / "report.json")
    assert Report.load(tmp_path / "report.json") == measured
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_unknown_keys_are_ignored(measured: Report) -> None:
    document = json.loads(json.dumps(measured.to_dict()))
    document["later"] = document["machine"]["later"] = document["latency"][0]["later"] = 1
    assert Report.from_dict(document) == measured


def test_both_dtypes_are_measured_and_named(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[str] = []

    def start_with(task: str, **request: Any) -> dict[str, Any]:
        starts.extend([request["dtype"]] if task == "startup" else [])
        return run_worker(task, **request)

    monkeypatch.setattr("vae_benchmarks.harness.run_worker", start_with)
    settings = Settings(("encode", "sample"), (1,), (1,), seconds=0.02, rounds=2, inputs=("uint8", "float32"))
    report = benchmark(tiny, settings)
    assert [(row.operation, row.input) for row in report.latency] == [
        ("encode", "uint8"),
        ("encode", "float32"),
        ("sample", None),
    ]
    assert (report.startup.input, starts) == ("uint8", ["uint8"] * 3)
    report.save(tmp_path / "both.json")
    assert Report.load(tmp_path / "both.json") == report
    text = format_report(report)
    assert "the bundle's 4 golden inputs (synthetic), as uint8 and as float32, repeated up to the batch size" in text
    assert "\nfirst reconstruct, batch 1, uint8 " in text
    assert [line.split()[:2] for line in text.splitlines() if line.startswith(("encode", "sample"))] == [
        ["encode", "uint8"],
        ["encode", "float32"],
        ["sample", "–"],
    ]


@pytest.fixture(scope="module")
def split(tiny: Path) -> Report:
    """Really measured, on the CPU."""
    settings = Settings(("encode", "decode", "sample"), (2,), (1,), seconds=0.03, rounds=2, split=True)
    return benchmark(tiny, settings)


def test_the_parts_of_a_call(split: Report, tmp_path: Path) -> None:
    rows = {row.operation: row for row in split.latency}
    assert rows["sample"].split is None
    for operation in ("encode", "decode"):
        parts = rows[operation].split
        assert parts is not None
        for name in SplitReport.PARTS:
            part = getattr(parts, name)
            assert 0 < min(part.round_p50_ms) <= part.p50_ms <= max(part.round_p50_ms)
            assert (len(part.round_p50_ms), part.interval_from) == (2, "samples")
            assert part.count >= 2
    split.save(tmp_path / "split.json")
    assert Report.load(tmp_path / "split.json") == split


def test_the_parts_are_shown_beside_the_call(split: Report, measured: Report) -> None:
    lines = format_report(split).splitlines()
    head = next(index for index, line in enumerate(lines) if line.startswith("p50 of parts"))
    assert "host to device" in lines[head]
    assert [line.split()[:1] for line in lines[head + 1 : head + 4]] == [["encode"], ["decode"], []]
    assert len(lines[head + 1].split()) == 4 + 1 + 2 * 3
    assert any(line.startswith("Parts: each part alone") for line in lines)
    assert "p50 of parts" not in format_report(measured)


def test_the_figures_of_a_part() -> None:
    factors = {"host_to_device": 10, "compute": 1, "device_to_host": 100}
    rounds = [{name: rounds_of([[level * factor] * 9])[0] for name, factor in factors.items()} for level in range(1, 9)]
    row = summarize(KEY, rounds_of([[9.0]] * 8), Settings(), rounds)
    assert row.split is not None
    part = row.split.compute
    assert (part.p50_ms, part.p50_low_ms, part.p50_high_ms, part.interval_from) == (4.5, 1, 8, "rounds")
    assert (part.count, part.round_p50_ms) == (72, (1, 2, 3, 4, 5, 6, 7, 8))
    assert (row.split.host_to_device.p50_ms, row.split.device_to_host.p50_ms) == (45, 450)


def test_the_gpu_is_in_the_report(measured: Report, tmp_path: Path) -> None:
    gpu = GpuFacts("GPU large", 2**37, "9.0", "13.0", "580.95", 1980, 1980, 3201, 700, 97, 2**31)
    gpus = (dataclasses.replace(gpu, sm_clock_mhz=None), gpu)
    dataclasses.replace(measured, gpus=gpus).save(tmp_path / "gpu.json")
    report = Report.load(tmp_path / "gpu.json")
    assert report.gpus == gpus
    assert "GPU       GPU large, 128.0 GiB memory (2.0 GiB used)" in format_report(report)


def test_a_report_tells_nothing_about_the_user(measured: Report, tiny: Path) -> None:
    text = json.dumps(measured.to_dict())
    for private in (str(tiny.parent), f"{Path.home()}/", f'"{getpass.getuser()}"', socket.gethostname()):
        assert private not in text


def broken(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def breaks(document: dict[str, Any]) -> None:
        *folders, last = path.split("/")
        place: Any = document
        for folder in folders:
            place = place[int(folder) if folder.isdigit() else folder]
        if value is ...:
            del place[last]
        else:
            place[last] = value

    return breaks


@pytest.mark.parametrize(
    ("breaks", "message"),
    [
        (broken("format", "vae-bundle"), "x.json is not a report of vae-bench, whose \"format\" is 'vae-bench-report'"),
        (broken("format_version", 2), "x.json has format_version 2; this vae-edge reads version 1"),
        (broken("format_version", True), "x.json has format_version True; this vae-edge reads version 1"),
        (broken("machine", ...), "x.json has no 'machine'"),
        (broken("machine", 3), "x.json.machine is 3; expected an object"),
        (broken("machine/cpu", None), "x.json.machine.cpu is None; expected a string"),
        (broken("other_cores_busy", ...), "x.json has no 'other_cores_busy'"),
        (broken("latency/0/input", ...), "x.json.latency[0] has no 'input'"),
        (broken("startup/input", ...), "x.json.startup has no 'input'"),
        (broken("latency", {}), "x.json.latency is {}; expected a list"),
        (broken("latency/0/p50_ms", "fast"), "x.json.latency[0].p50_ms is 'fast'; expected a finite number"),
        (broken("latency/0/p50_ms", math.inf), "x.json.latency[0].p50_ms is inf; expected a finite number"),
        (broken("latency/1/batch", True), "x.json.latency[1].batch is True; expected a whole number"),
        (broken("latency/1/width_reached", 1), "x.json.latency[1].width_reached is 1; expected true or false"),
        (broken("latency/0/round_p50_ms", [1, None]), "round_p50_ms[1] is None; expected a finite number"),
        (broken("latency/0/round_p50_ms", [10**400]), "round_p50_ms[0] is 1000000"),
        (
            broken("latency/0/round_p50_ms", [1.0, -1.0]),
            "x.json has a row of sample whose time in ms is -1; expected from 1e-09 to 1e+15",
        ),
        (
            broken("latency/0/p50_ms", 0),
            "x.json has a row of sample whose time in ms is 0; expected from 1e-09 to 1e+15",
        ),
        (
            broken("latency/1/round_p50_ms", [1e308]),
            "x.json has a row of sample whose time in ms is 1e+308; expected from 1e-09 ",
        ),
        (broken("startup/load_ms/max", 1e308), "x.json has a start-up whose load_ms is 1e+308; expected from 1e-09 "),
        (broken("bundle/size", []), "x.json.bundle.size is (); expected a height and a width, or none"),
        (broken("skipped", []), "x.json.skipped is []; expected an object"),
        (broken("settings/rounds", 0), "x.json has settings that cannot be: rounds is 0; expected a whole number"),
        (broken("latency/0/round_p50_ms", []), "x.json has a row of latency without rounds"),
        (broken("startup/load_ms/values", []), "x.json has a start-up without load_ms"),
        (
            broken("startup/load_ms/values", [9.5, -1.5]),
            "x.json has a start-up whose load_ms is -1.5; expected from 1e-09 to 1e+15",
        ),
        (
            broken("startup/import_ms/median", 0),
            "x.json has a start-up whose import_ms is 0; expected from 1e-09 to 1e+15",
        ),
        (
            broken("startup/peak_rss_bytes/min", -4096),
            "a start-up whose peak_rss_bytes is -4096; expected from 1e-09 to 1e+15",
        ),
    ],
)
def test_what_is_no_report_is_refused(measured: Report, breaks: Callable[[dict[str, Any]], None], message: str) -> None:
    document = copy.deepcopy(json.loads(json.dumps(measured.to_dict())))
    breaks(document)
    with pytest.raises(ReportError) as caught:
        Report.from_dict(document, "x.json")
    assert message in str(caught.value)


def test_a_report_with_a_row_twice_is_refused(measured: Report) -> None:
    document = measured.to_dict()
    document["latency"] = (*document["latency"], document["latency"][0])
    with pytest.raises(ReportError, match="has the same row of latency twice"):
        Report.from_dict(document)


@pytest.mark.parametrize("content", [b"", b"not json", b"\xff\xfe", b"[" * 100_000])
def test_files_that_are_no_json_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ReportError, match=r"x\.json is not JSON; expected a report of vae-bench"):
        Report.load(tmp_path / "x.json")


def test_files_that_are_not_there_are_named(measured: Report, tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=r"none\.json cannot be read: No such file or directory"):
        Report.load(tmp_path / "none.json")
    with pytest.raises(OutputError, match="cannot be written"):
        measured.save(tmp_path / "no" / "folder.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"operations": ("fly",)}, "operation is 'fly'; expected one of encode, sample, decode, reconstruct, score"),
        ({"operations": ()}, "operations is (); expected at least one, in a tuple"),
        ({"batches": (1, 0)}, "batch is 0; expected a whole number from 1 to 65536"),
        ({"batches": (2.5,)}, "batch is 2.5; expected a whole number"),
        ({"threads": (0,)}, "threads is 0; expected a whole number from 1"),
        ({"inputs": ("int8",)}, "input is 'int8'; expected one of float32, uint8"),
        ({"inputs": ()}, "inputs is (); expected at least one, in a tuple"),
        ({"rounds": 0}, "rounds is 0; expected a whole number from 1 to 100"),
        ({"seconds": 0}, "seconds is 0; expected a number between 0 and 86400"),
        ({"seconds": -1.0}, "seconds is -1.0; expected a number"),
        ({"seconds": math.nan}, "seconds is nan; expected a number"),
        ({"confidence": 1.0}, "confidence is 1.0; expected a number between 0.5 and 1"),
        ({"width": 0.0}, "width is 0.0; expected a number between 0 and 1"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        Settings(**changes)
    assert message in str(caught.value)


def test_settings_drop_repetitions() -> None:
    assert Settings(batches=(8, 1, 8), threads=(None, 1, None)).batches == (8, 1)
    assert set(Settings().operations) == set(OPERATIONS)


def test_the_table_shows_every_row_and_its_units(make_report: Callable[..., Report]) -> None:
    text = format_report(make_report(0))
    lines = text.splitlines()
    head = next(line for line in lines if line.startswith("operation"))
    assert "p50 µs" in head
    assert "95% interval" in head
    row = next(line for line in lines if line.startswith("decode") and " auto " in line)
    assert len(row.split()) == 12
    assert row.split()[1] == "–"
    assert next(line for line in lines if line.startswith("encode")).split()[1] == "float32"
    assert "MiB" in text
    assert "a CPU, x86_64, 8 of 8 logical cores (4 physical), 16.0 GiB memory, governor performance" in text
    assert "*" not in text
    assert "Warm-up: VAE.warmup with the batch sizes of the report; in each round at least 10 calls and 50 ms" in text
    slow = format_report(make_report(0, {("encode", 1, 1): 120.0}))
    assert "p50 ms" in slow


def test_every_row_of_a_table_shows_three_digits(make_report: Callable[..., Report]) -> None:
    """Also beside a row of 120 ms; their points stay below each other."""
    times = {("encode", 1, 1): 0.0234, ("decode", 1, 1): 0.00234, ("decode", 8, 1): 120.0}
    for report in (make_report(0, times), make_report(0, {key: time / 1000 for key, time in times.items()})):
        lines = format_report(report).splitlines()
        start = next(index for index, line in enumerate(lines) if line.startswith("operation"))
        rows = lines[start + 1 : start + 4]
        for line, row in zip(rows, report.latency, strict=True):
            low, high = line.split()[5].split("–")
            cells = [line.split()[4], low, high, *line.split()[6:10]]
            scale = 1 if " ms " in lines[start] else 1000
            exact = [row.p50_ms, row.p50_low_ms, row.p50_high_ms, row.p90_ms, row.p99_ms, row.mean_ms, row.min_ms]
            for cell, time in zip(cells, exact, strict=True):
                assert time is not None
                assert float(cell) == pytest.approx(time * scale, rel=0.005)
                assert len(cell.replace(".", "").lstrip("0")) >= 3
        assert len({line.index(".") for line in rows}) == 1
    quick = make_report(0, {("encode", 1, 1): 0.0234})
    assert [line.split()[4] for line in format_report(quick).splitlines() if line.startswith("encode")] == [
        f"{quick.latency[0].p50_ms * 1000:.1f}"
    ]


def test_every_row_of_the_parts_shows_three_digits(make_report: Callable[..., Report]) -> None:
    report = make_report(0, {("encode", 1, 1): 0.3, ("encode", 8, 1): 120.0})

    def part(milliseconds: float) -> PartReport:
        return PartReport(milliseconds, milliseconds * 0.99, milliseconds * 1.01, "rounds", 9, (milliseconds,) * 8)

    split = SplitReport(part(0.01234), part(0.2), part(0.0567))
    rows = tuple(dataclasses.replace(row, split=split) for row in report.latency)
    lines = format_report(dataclasses.replace(report, latency=rows)).splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("p50 of parts"))
    for line in lines[start + 1 : start + 3]:
        assert line.split()[5::2] == ["0.0123", "0.2000", "0.0567"]
        assert line.split()[6].split("–") == ["0.0122", "0.0125"]


def test_the_table_says_what_was_not_reached(make_report: Callable[..., Report]) -> None:
    report = make_report(0, noise=0.5)
    busy = dataclasses.replace(report.machine, load_average_1min=7.5)
    text = format_report(dataclasses.replace(report, machine=busy))
    assert "*  wider than the 5% of the median that was asked for" in text
    assert "The machine was busy, load average 7.5 on 8 cores: expect slower" in text
    few = format_report(make_report(0, rounds=1))
    assert "With so few rounds" in few
    assert "–  too few samples" in few


@pytest.mark.parametrize(
    ("load", "others", "cores", "words"),
    [
        (0.1, 0.02, 2, None),
        (0.1, 1.0, 2, "other work took 1.00 of 2 cores"),  # which the load average shows only a minute later
        (2.0, 0.02, 2, None),  # of what ran before
        (2.0, None, 2, "load average 2.0 on 2 cores"),
        (0.1, None, 2, None),
        (0.1, 1.0, 64, None),
        (0.1, 4.0, 64, "other work took 4.00 of 64 cores"),
    ],
)
def test_what_a_busy_machine_is(
    make_report: Callable[..., Report], load: float, others: float | None, cores: int, words: str | None
) -> None:
    report = make_report(0)
    machine = dataclasses.replace(report.machine, load_average_1min=load, cores_usable=cores)
    report = dataclasses.replace(report, machine=machine, other_cores_busy=others)
    assert report.busy_with == words
    text = format_report(report)
    assert ("The machine was busy" in text) == (words is not None)
    assert (f"at the start, {others:.2f} cores busy with other work\n" in text) if others else "with other" not in text


def test_a_bundle_that_is_replaced_meanwhile_is_noticed(tmp_path: Path, tiny: Path) -> None:
    copied = tmp_path / "b.vae"
    shutil.copytree(tiny, copied)

    def replace(line: str) -> None:
        if line.startswith("round"):
            shutil.rmtree(copied)
            shutil.copytree(tiny.with_name("tiny-rgb.vae"), copied)

    with pytest.raises(BundleError, match="was replaced while it was being measured"):
        benchmark(copied, Settings(("encode",), (1,), (1,), seconds=0.01, rounds=1), replace)
