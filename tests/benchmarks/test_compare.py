"""A planted change is found, noise is not called one, and what makes a comparison unfair is said."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from vae_benchmarks import Comparison, ComparisonRow, GpuFacts, Report, Settings, StartupReport, compare
from vae_benchmarks.latency import Clock, measure
from vae_benchmarks.report import RowKey, summarize
from vae_benchmarks.table import format_comparison
from vae_runtime.errors import InputError

MakeReport = Callable[..., Report]
BASE = {("encode", 1, 1): 0.1, ("decode", 1, 1): 0.2, ("decode", 8, None): 0.3}


def row_of(comparison: Comparison, figure: str, operation: str | None = None) -> ComparisonRow:
    return next(row for row in comparison.rows if (row.figure, row.operation) == (figure, operation))


def changed_rows(comparison: Comparison) -> dict[str, str]:
    return {row.operation or row.figure: row.verdict for row in comparison.rows if row.verdict != "no difference"}


def test_a_report_does_not_differ_from_itself(make_report: MakeReport) -> None:
    report = make_report(0)
    comparison = compare(report, report)
    assert len(comparison.rows) == len(BASE) + len(StartupReport.FIGURES)
    assert {row.ratio for row in comparison.rows} == {1.0}
    assert changed_rows(comparison) == {}
    assert not comparison.is_worse
    assert comparison.warnings == ()


@pytest.mark.parametrize(
    ("factor", "verdict", "worse"), [(1.25, "slower", True), (0.8, "faster", False), (1.02, "no difference", False)]
)
def test_a_planted_change_is_found_and_no_other(
    make_report: MakeReport, factor: float, verdict: str, worse: bool
) -> None:
    comparison = compare(make_report(1), make_report(2, {**BASE, ("encode", 1, 1): 0.1 * factor}))
    row = row_of(comparison, "latency", "encode")
    assert row.verdict == verdict
    assert row.ratio == pytest.approx(factor, rel=0.02)
    assert row.low is not None
    assert row.high is not None
    assert row.low < factor < row.high
    assert set(changed_rows(comparison)) <= {"encode"}
    assert comparison.is_worse == worse


def test_a_change_below_the_threshold_does_not_count_and_above_it_does(make_report: MakeReport) -> None:
    a, b = make_report(1, noise=0.001), make_report(2, {**BASE, ("encode", 1, 1): 0.103}, noise=0.001)
    assert changed_rows(compare(a, b)) == {}
    assert row_of(compare(a, b), "latency", "encode").low > 1
    assert changed_rows(compare(a, b, threshold=0.02)) == {"encode": "slower"}


def test_a_large_change_in_large_noise_does_not_count(make_report: MakeReport) -> None:
    comparison = compare(make_report(1, noise=0.5), make_report(4, {**BASE, ("encode", 1, 1): 0.12}, noise=0.5))
    assert row_of(comparison, "latency", "encode").ratio > 1.05
    assert changed_rows(comparison) == {}


def test_the_table_says_what_the_noise_could_hide(make_report: MakeReport) -> None:
    noisy = format_comparison(compare(make_report(1, noise=0.5), make_report(2, noise=0.5)), "a", "b")
    assert "in 10 of 10 rows without a difference the noise could hide one, up to " in noisy
    quiet = format_comparison(compare(make_report(1, noise=0.001), make_report(2, noise=0.001)), "a", "b")
    assert "could hide" not in quiet


def test_start_up_and_memory_count_too(make_report: MakeReport) -> None:
    comparison = compare(make_report(1), make_report(2, load_ms=30, peak_bytes=90 * 2**20))
    assert changed_rows(comparison) == {"load_ms": "slower", "peak_rss_bytes": "more memory"}
    assert comparison.is_worse
    better = compare(make_report(2, load_ms=30, peak_bytes=90 * 2**20), make_report(1))
    assert changed_rows(better) == {"load_ms": "faster", "peak_rss_bytes": "less memory"}
    assert not better.is_worse


def test_exchanged_reports_give_the_inverse(make_report: MakeReport) -> None:
    a, b = make_report(1), make_report(2, {**BASE, ("encode", 1, 1): 0.15})
    there, back = (row_of(compare(*pair), "latency", "encode") for pair in ((a, b), (b, a)))
    assert back.ratio == pytest.approx(1 / there.ratio)
    assert back.low == pytest.approx(1 / there.high)
    assert (there.verdict, back.verdict) == ("slower", "faster")


def test_equal_software_is_rarely_called_slower(make_report: MakeReport) -> None:
    """The promise of `confidence`, with no threshold to help: of 100 pairs at most about 5% have a changed row."""
    keys = {("encode", batch, 1): 1.0 for batch in range(1, 13)}
    reports = [make_report(seed, keys, noise=0.1, count=5) for seed in range(200)]
    pairs = zip(reports[::2], reports[1::2], strict=True)
    called = sum(bool(changed_rows(compare(a, b, threshold=0.0))) for a, b in pairs)
    assert called <= 10


def test_a_really_measured_delay_is_found(make_report: MakeReport) -> None:
    """The same call, once with 4 ms more in it, both measured by the clock of this machine."""
    clock = Clock.measure()
    settings = Settings(("encode",), (1,), (1,))

    def measured(seconds: float) -> Report:
        rounds = [
            measure(lambda: time.sleep(seconds), seconds=0.02, wanted=5, confidence=0.95, width=0.05, clock=clock)
            for _ in range(8)
        ]
        row = summarize(RowKey("encode", 1, 1, "cpu", "fp32", "float32"), rounds, settings)
        return dataclasses.replace(make_report(0), latency=(row,))

    comparison = compare(measured(0.001), measured(0.005))
    assert changed_rows(comparison) == {"encode": "slower"}
    assert row_of(comparison, "latency", "encode").ratio > 2


def test_too_few_rounds_give_no_verdict(make_report: MakeReport) -> None:
    comparison = compare(make_report(1, rounds=3), make_report(2, {**BASE, ("encode", 1, 1): 0.5}, rounds=3))
    row = row_of(comparison, "latency", "encode")
    assert (row.low, row.high, row.verdict) == (None, None, "too few rounds")
    assert row.ratio == pytest.approx(5, rel=0.1)
    assert (comparison.is_worse, comparison.verdict) == (False, "no verdict")
    assert comparison.reason == "the rounds are too few: 10 rows need 6 in each report (--rounds)"
    assert compare(make_report(1, rounds=5), make_report(2, rounds=5)).verdict == "no verdict"
    assert compare(make_report(1, rounds=6), make_report(2, rounds=6)).verdict == "not worse"
    assert format_comparison(comparison, "a", "b").splitlines()[-1] == (
        "NO VERDICT: the rounds are too few: 10 rows need 6 in each report (--rounds) (too few rounds: 10)"
    )


def test_a_confidence_that_no_number_of_rounds_gives_is_told(make_report: MakeReport) -> None:
    comparison = compare(make_report(1), make_report(2), confidence=0.9999999999999999)
    assert comparison.reason == "the confidence is too high: for 10 rows not even 100 rounds are enough"


def test_a_start_up_alone_gives_no_verdict_but_may_be_worse(make_report: MakeReport) -> None:
    a, others = make_report(1, BASE), {("encode", 64, 1): 1.0, ("decode", 64, 1): 1.0}
    comparison = compare(a, make_report(2, others))
    assert (len(comparison.rows), comparison.verdict) == (len(StartupReport.FIGURES), "no verdict")
    assert comparison.reason == "no row is in both reports, which differ in batch (A 1 and 8, B 64)"
    assert format_comparison(comparison, "a", "b").splitlines()[-1] == (
        f"NO VERDICT: {comparison.reason} (no difference: 7, only in A: 3, only in B: 2)"
    )
    slow = compare(a, make_report(2, others, load_ms=90))
    assert slow.verdict == "worse"
    assert format_comparison(slow, "a", "b").splitlines()[-1] == (
        "WORSE beyond noise and 5% (slower: 1, no difference: 6); not judged: 5 (only in A: 3, only in B: 2)"
    )


def test_rows_without_a_verdict_are_counted_beside_one(make_report: MakeReport) -> None:
    a, b = make_report(1, {**BASE, ("decode", 32, 1): 1.0}), make_report(2, BASE)
    short = dataclasses.replace(b.latency[0], round_p50_ms=b.latency[0].round_p50_ms[:2])
    b = dataclasses.replace(b, latency=(short, *b.latency[1:]))
    comparison = compare(a, b)
    assert (comparison.verdict, comparison.reason) == ("not worse", None)
    assert comparison.not_judged == {"too few rounds": 1, "only in A": 1}
    last = format_comparison(comparison, "a", "b").splitlines()[-1]
    assert last == ("not worse beyond noise and 5% (no difference: 9); not judged: 2 (too few rounds: 1, only in A: 1)")
    slow = compare(a, make_report(2, {**BASE, ("encode", 1, 1): 0.2}))
    assert format_comparison(slow, "a", "b").splitlines()[-1] == (
        "WORSE beyond noise and 5% (slower: 1, no difference: 9); not judged: 1 (only in A: 1)"
    )


def test_rows_of_one_report_only_are_listed(make_report: MakeReport) -> None:
    a = make_report(1, {**BASE, ("decode", 32, 1): 1.0})
    b = make_report(2, {**BASE, ("encode", 32, None): 1.0})
    comparison = compare(a, b)
    assert comparison.only_in_a == ("decode, batch 32, threads 1, cpu, fp32",)
    assert comparison.only_in_b == ("encode of float32, batch 32, threads auto, cpu, fp32",)
    text = format_comparison(comparison, "a.json", "b.json")
    assert "only in A: decode, batch 32" in text
    assert "only in B: encode of float32, batch 32" in text


def of_uint8(report: Report, only: bool = False) -> Report:
    """Rows of uint8 that take twice as long, beside those of float32 or in place of them."""
    taking = [row for row in report.latency if row.input is not None]
    slower = [dataclasses.replace(r, input="uint8", round_p50_ms=tuple(2 * v for v in r.round_p50_ms)) for r in taking]
    others = [row for row in report.latency if not only or row.input is None]
    settings = dataclasses.replace(report.settings, inputs=("uint8",) if only else ("float32", "uint8"))
    return dataclasses.replace(report, latency=(*others, *slower), settings=settings)


def test_inputs_are_compared_with_those_of_their_dtype(make_report: MakeReport) -> None:
    a, b = make_report(1), make_report(2)
    comparison = compare(of_uint8(a), of_uint8(b))
    assert {row.input: round(row.b, 1) for row in comparison.rows if row.operation == "encode"} == {
        "float32": 0.1,
        "uint8": 0.2,
    }
    assert (changed_rows(comparison), comparison.only_in_a, comparison.warnings) == ({}, (), ())
    before = compare(a, of_uint8(b))
    assert before.only_in_b == ("encode of uint8, batch 1, threads 1, cpu, fp32",)
    assert (len(before.rows), changed_rows(before)) == (10, {})


def other(report: Report, **changes: str | int | None) -> Report:
    """All rows with another device, say."""
    return dataclasses.replace(report, latency=tuple(dataclasses.replace(row, **changes) for row in report.latency))


ONE_THREAD = {("encode", 1, 1): 0.1, ("decode", 1, 1): 0.2}


@pytest.mark.parametrize(
    ("axis", "a", "b", "said", "label"),
    [
        (
            "precision",
            "fp32",
            "int8",
            "precision: A fp32, B int8",
            "encode of float32, batch 1, threads 1, cpu, fp32 -> int8",
        ),
        (
            "device",
            "cpu",
            "openvino",
            "device: A cpu, B openvino",
            "encode of float32, batch 1, threads 1, cpu -> openvino, fp32",
        ),
        ("threads", 1, None, "threads: A 1, B auto", "encode of float32, batch 1, threads 1 -> auto, cpu, fp32"),
        (
            "input",
            "float32",
            "uint8",
            "input: A float32, B uint8",
            "encode of float32 -> uint8, batch 1, threads 1, cpu, fp32",
        ),
    ],
)
def test_reports_that_differ_in_one_thing_are_compared_across_it(
    make_report: MakeReport, axis: str, a: str | int, b: str | int | None, said: str, label: str
) -> None:
    slow = {**ONE_THREAD, ("encode", 1, 1): 0.2}
    comparison = compare(make_report(1, ONE_THREAD), other(make_report(2, slow), **{axis: b}))
    assert [(found.axis, found.a, found.b) for found in comparison.differs] == [(axis, a, b)]
    assert (comparison.only_in_a, comparison.only_in_b, comparison.reason) == ((), (), None)
    assert changed_rows(comparison) == {"encode": "slower"}
    lines = format_comparison(comparison, "a.json", "b.json").splitlines()
    assert lines[2] == said
    assert sum(line.startswith(f"{label} ") for line in lines) == 1
    decode = next(line for line in lines if line.startswith("decode"))
    assert ("->" in decode) == (axis != "input")  # decode takes no inputs


def test_the_start_up_s_own_condition_is_no_news_where_it_is_what_differs(make_report: MakeReport) -> None:
    a, b = make_report(1, ONE_THREAD), other(make_report(2, ONE_THREAD), threads=4)
    b = dataclasses.replace(b, startup=dataclasses.replace(b.startup, threads=4))
    assert compare(a, b).warnings == ()
    b = dataclasses.replace(b, latency=a.latency)
    assert compare(a, b).warnings == ("the conditions of the start-up differ: threads 1 -> 4",)


def test_reports_that_differ_in_several_things_are_not_matched(make_report: MakeReport) -> None:
    a, b = make_report(1, ONE_THREAD), other(make_report(2, ONE_THREAD), precision="int8", device="openvino")
    comparison = compare(a, b)
    assert (comparison.verdict, len(comparison.only_in_a), len(comparison.only_in_b)) == ("no verdict", 2, 2)
    assert comparison.reason == (
        "no row is in both reports, which differ in device (A cpu, B openvino), precision (A fp32, B int8); rows are "
        "matched across a difference in one of threads, device, precision, input alone, where each report has a single "
        "value of it"
    )
    assert format_comparison(comparison, "a", "b").splitlines()[2:4] == [
        "device: A cpu, B openvino",
        "precision: A fp32, B int8",
    ]


def test_rows_that_only_share_what_differs_are_not_matched(make_report: MakeReport) -> None:
    """decode takes no inputs, and so differs in the threads alone."""
    a, b = make_report(1, ONE_THREAD), other(make_report(2, ONE_THREAD), threads=4, input="uint8")
    comparison = compare(a, b)
    assert {found.axis for found in comparison.differs} == {"threads", "input"}
    assert (len(comparison.only_in_a), len(comparison.only_in_b)) == (2, 2)


def test_an_axis_with_several_values_is_not_matched_across(make_report: MakeReport) -> None:
    several = {("encode", 1, 1): 0.1, ("encode", 1, None): 0.1}
    a, b = make_report(1, several), make_report(2, {("encode", 1, 4): 0.1})
    comparison = compare(a, b)
    assert (comparison.differs, comparison.verdict) == ((), "no verdict")
    assert (comparison.reason or "").startswith(
        "no row is in both reports, which differ in threads (A 1 and auto, B 4); rows are matched across a difference"
    )
    shared = compare(a, make_report(2, {("encode", 1, 1): 0.1}))
    assert (shared.differs, shared.only_in_a) == ((), ("encode of float32, batch 1, threads auto, cpu, fp32",))
    assert [row.threads for row in shared.rows if row.operation] == [1]
    both = other(make_report(2, several), precision="int8")  # several thread counts, which are the same in both
    assert [(row.threads, row.verdict) for row in compare(a, both).rows if row.operation] == [
        (1, "no difference"),
        (None, "no difference"),
    ]


def test_rows_of_images_of_other_sizes_are_not_compared(make_report: MakeReport) -> None:
    a = make_report(1)
    asked = dataclasses.replace(a, settings=dataclasses.replace(a.settings, size=(32, 48)))
    assert compare(a, asked).reason is None  # the size of the first is not known
    assert compare(a, asked).warnings == ("the settings differ: size None -> (32, 48)",)
    small, large = (
        dataclasses.replace(a, bundle=dataclasses.replace(a.bundle, size=size)) for size in ((8, 8), (32, 48))
    )
    assert compare(large, asked).reason is None
    for other_size in (asked, large):
        comparison = compare(small, other_size)
        assert (comparison.verdict, len(comparison.only_in_a), len(comparison.only_in_b)) == ("no verdict", 3, 3)
        assert comparison.reason == "no row is in both reports: the images of A are of 8x8, those of B of 32x48"
        assert row_of(comparison, "first_call_ms").verdict == "other conditions"


@pytest.mark.parametrize(
    ("condition", "value", "figures"),
    [
        ("peak_batch", 64, {"peak_rss_bytes"}),
        ("input", "uint8", {"first_call_ms", "to_first_result_ms", "peak_rss_bytes"}),
        ("threads", 4, {"first_call_ms", "to_first_result_ms", "rss_after_load_bytes", "peak_rss_bytes"}),
    ],
)
def test_a_start_up_under_other_conditions_is_not_judged_by_what_they_change(
    make_report: MakeReport, condition: str, value: Any, figures: set[str]
) -> None:
    a = make_report(1)
    more = dataclasses.replace(a.startup.peak_rss_bytes, values=tuple(2 * x for x in a.startup.peak_rss_bytes.values))
    b = dataclasses.replace(a, startup=dataclasses.replace(a.startup, peak_rss_bytes=more))
    assert changed_rows(compare(a, b)) == {"peak_rss_bytes": "more memory"}
    comparison = compare(a, dataclasses.replace(b, startup=dataclasses.replace(b.startup, **{condition: value})))
    assert changed_rows(comparison) == dict.fromkeys(figures, "other conditions")
    assert (comparison.verdict, comparison.not_judged) == ("not worse", {"other conditions": len(figures)})


def test_another_gpu_is_warned_of_and_other_clocks_are_not(make_report: MakeReport) -> None:
    gpu = GpuFacts("GPU large", 2**37, "9.0", "13.0", "580.95", 1980, 1980, 3201, 700, 97, 2**31)
    a = dataclasses.replace(make_report(0), gpus=(gpu,))
    b = dataclasses.replace(a, gpus=(dataclasses.replace(gpu, sm_clock_mhz=1200, memory_used_bytes=1),))
    assert compare(a, b).warnings == ()
    c = dataclasses.replace(a, gpus=(dataclasses.replace(gpu, driver="590.1"),))
    assert compare(a, c).warnings == ("the GPUs differ: driver 580.95 -> 590.1",)
    (warning,) = compare(make_report(0), a).warnings
    assert warning.startswith("the GPUs differ: name None -> GPU large; ")


def test_differences_of_machine_versions_bundle_and_settings_are_warned_of(make_report: MakeReport) -> None:
    a = make_report(1)
    b = dataclasses.replace(
        a,
        machine=dataclasses.replace(a.machine, cpu="another CPU", load_average_1min=7.0),
        versions=dataclasses.replace(a.versions, onnxruntime="1.20.0"),
        bundle=dataclasses.replace(a.bundle, manifest_file_sha256="cd" * 32, folder="renamed.vae"),
        settings=dataclasses.replace(a.settings, seconds=9.0),
        startup=dataclasses.replace(a.startup, peak_batch=64),
    )
    warnings = compare(a, b).warnings
    assert warnings == (
        "the machines differ: cpu a CPU -> another CPU",
        "the versions differ: onnxruntime 1.31.1 -> 1.20.0",
        "the bundles differ: manifest_file_sha256 abababababab… -> cdcdcdcdcdcd…",
        "the settings differ: seconds 1.0 -> 9.0",
        "the conditions of the start-up differ: peak_batch 8 -> 64",
        "the machine was busy when B was measured: load average 7.0 on 8 cores",
    )
    text = format_comparison(compare(a, b), "a.json", "b.json")
    assert all(f"warning: {warning}" in text for warning in warnings)


def test_the_table_ends_with_the_verdict(make_report: MakeReport) -> None:
    worse = compare(make_report(1), make_report(2, {**BASE, ("encode", 1, 1): 0.2}))
    assert format_comparison(worse, "a", "b").splitlines()[-1] == (
        "WORSE beyond noise and 5% (slower: 1, no difference: 9)"
    )
    same = compare(make_report(1), make_report(2))
    assert format_comparison(same, "a", "b").splitlines()[-1] == "not worse beyond noise and 5% (no difference: 10)"


@pytest.mark.parametrize(
    ("loads", "when"), [((7.0, 0.1), "A was"), ((0.1, 7.0), "B was"), ((7.0, 7.0), "A and B were"), ((0.1, 0.1), None)]
)
@pytest.mark.parametrize("encode_ms", [0.1, 0.2])
def test_a_verdict_on_a_busy_machine_says_so(
    make_report: MakeReport, loads: tuple[float, float], when: str | None, encode_ms: float
) -> None:
    a, b = (
        dataclasses.replace(report, machine=dataclasses.replace(report.machine, load_average_1min=load))
        for report, load in zip(
            (make_report(1), make_report(2, {**BASE, ("encode", 1, 1): encode_ms})), loads, strict=True
        )
    )
    comparison = compare(a, b)
    quiet = "WORSE beyond noise and 5% (slower: 1, no difference: 9)"
    if encode_ms == 0.1:
        quiet = "not worse beyond noise and 5% (no difference: 10)"
    last = format_comparison(comparison, "a", "b").splitlines()[-1]
    said = f"; the machine was busy when {when} measured: other work may have made this verdict, measure on a quiet one"
    assert last == (quiet if when is None else quiet + said)
    assert comparison.is_worse == (encode_ms == 0.2)
    assert comparison.to_dict()["busy"] == tuple(name for name, load in zip("AB", loads, strict=True) if load > 1)


def test_other_work_that_was_measured_is_named(make_report: MakeReport) -> None:
    a, b = make_report(1), dataclasses.replace(make_report(2), other_cores_busy=1.25)
    comparison = compare(a, b)
    assert comparison.warnings == ("the machine was busy when B was measured: other work took 1.25 of 8 cores",)
    assert comparison.busy == ("B",)


def test_the_document_is_plain_json(make_report: MakeReport) -> None:
    document = json.loads(json.dumps(compare(make_report(1), make_report(2)).to_dict(), allow_nan=False))
    assert " ".join(sorted(document)) == (
        "busy confidence differs format format_version not_judged only_in_a only_in_b reason rows threshold "
        "verdict warnings worse"
    )
    assert (document["verdict"], document["reason"], document["not_judged"]) == ("not worse", None, {})
    row = "a b batch device figure high input low operation precision ratio threads unit verdict"
    assert " ".join(sorted(document["rows"][0])) == row


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threshold": -0.1}, "threshold is -0.1; expected a number from 0"),
        ({"threshold": math.nan}, "threshold is nan; expected a number from 0"),
        ({"confidence": 1.0}, "confidence is 1.0; expected a number between 0.5 and 1"),
    ],
)
def test_arguments_out_of_range(make_report: MakeReport, arguments: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        compare(make_report(1), make_report(1), **arguments)


def test_zero_is_compared_without_dividing_by_it(make_report: MakeReport) -> None:
    a = make_report(1)
    zero = dataclasses.replace(a, latency=(dataclasses.replace(a.latency[0], round_p50_ms=(0.0,) * 8),))
    assert np.isfinite(row_of(compare(zero, zero), "latency", "encode").ratio)
