"""The report for people, from the document that `run.py` writes."""

from __future__ import annotations

import re
from typing import Any

from vae_benchmarks.gpu import GpuFacts
from vae_benchmarks.machine import MachineFacts
from vae_benchmarks.plain import from_plain
from vae_benchmarks.report import Report
from vae_benchmarks.table import describe_gpus, describe_machine, format_report

_ENVIRONMENT = "environment"
_ERRORS = ("golden", "fidelity")  # every error of which is shown
_DASH = "–"


def render(document: dict[str, Any], name: str) -> str:
    units = [unit for unit in document["units"] if unit["step"] != _ENVIRONMENT]
    sections = [
        f"# {name}: the bundles on device {document['device']}\n\nMade by `benchmarks/gpu/run.py`, begun"
        f" {document['created']}, parts: {document['parts']}."
        + (" Few repetitions: only the steps themselves were tried.\n" if document["quick"] else "\n"),
        environment(document),
        verdicts(document["cases"], units),
        failures(document["units"]),
        errors(units),
        ways(units),
        overhead(units),
        kernels(units),
        variations(units),
        bench(units, document["torch_loaded_first"]),
        race(units),
        skipped(units),
    ]
    return "\n".join(section for section in sections if section)


def environment(document: dict[str, Any]) -> str:
    """Of the first part, and of every other one that is not the same."""
    lines: list[str] = []
    seen: list[list[str]] = []
    for unit in document["units"]:
        if unit["step"] != _ENVIRONMENT:
            continue
        found = describe_environment(unit["figures"])
        if unit["status"] == "crashed":
            found = [f"{unit['reason']}"]
        if found not in seen:
            seen.append(found)
            lines += [f"{unit['case']}: {line}" for line in found]
    return "\n".join(["## Machine\n", *(f"- {line}" for line in lines), ""])


def describe_environment(figures: dict[str, Any]) -> list[str]:
    """One line each; without what changes from minute to minute."""
    found = []
    if figures.get("gpu"):
        found.append(describe_gpus([from_plain(GpuFacts, {**figures["gpu"], **_IDLE}, "the GPU")]))
    if figures.get("machine"):
        found.append(describe_machine(from_plain(MachineFacts, figures["machine"], "the machine")))
    versions = sorted(figures.get("versions", {}).items())  # another order is no other environment
    found.append(", ".join(f"{name} {version}" for name, version in versions))
    if "onnxruntime" in figures:
        found.append(
            f"onnxruntime {figures['onnxruntime']['version']}: {', '.join(figures['onnxruntime']['providers'])}"
        )
    found += [f"{name}={value}" for name, value in figures.get("variables", {}).items()]
    return found


_IDLE = dict.fromkeys(("sm_clock_mhz", "memory_clock_mhz", "memory_used_bytes"))


def verdicts(cases: list[str], units: list[dict[str, Any]]) -> str:
    found = {(unit["step"], unit["case"]): unit for unit in units}
    steps = dict.fromkeys(unit["step"] for unit in units)
    rows = [[step, *(verdict(found.get((step, case))) for case in cases)] for step in steps]
    return section("Verdicts", ["step", *cases], rows)


def verdict(unit: dict[str, Any] | None) -> str:
    if unit is None:
        return _DASH
    passed, count = sum(check["passed"] for check in unit["checks"]), len(unit["checks"])
    if unit["status"] == "passed":
        return f"{passed} of {count}" if count else "measured"
    return unit["status"] if not count else f"**{unit['status']}**, {passed} of {count}"


def failures(units: list[dict[str, Any]]) -> str:
    lines = []
    for unit in units:
        where = f"{unit['step']}, {unit['case']}"
        if unit["reason"]:
            lines.append(f"- **{where}**: {one_line(unit['reason'])}")
        for check in unit["checks"]:
            if not check["passed"]:
                found = one_line(check["text"]) or f"{check['found']:.3g}, at most {check['limit']:g}"
                lines.append(f"- **{where}**: {check['check']}: {found}")
    return "\n".join(["## What failed\n", *(lines or ["Nothing."]), ""])


def errors(units: list[dict[str, Any]]) -> str:
    """Every single one of the golden values and of the fidelity; the largest of the other checks."""
    rows = []
    for unit in units:
        measured = [check for check in unit["checks"] if check["found"] is not None]
        if unit["step"] not in _ERRORS and measured:
            worst = max(measured, key=lambda check: check["found"] / check["limit"])
            measured = [{**worst, "check": f"{worst['check']}, the largest of {len(measured)}"}]
        for check in measured:
            torch = own_error(unit, check["check"])
            row = [unit["step"], unit["case"], check["check"], f"{check['found']:.2e}", f"{check['limit']:.0e}"]
            rows.append([*row, _DASH if torch is None else f"{torch:.2e}"])
    return section("Errors", ["step", "case", "what", "error", "at most", "torch's own"], rows)


def own_error(unit: dict[str, Any], check: str) -> float | None:
    """Of torch in the same precision, beside "fp16 warm decode" and its like."""
    precision, *_, operation = check.split(" ")
    found: float | None = unit["figures"].get("torch", {}).get(precision, {}).get(operation)
    return found


def ways(units: list[dict[str, Any]]) -> str:
    """With the time of what was tried, relative to the plain way: NCHW, pageable copies."""
    rows, notes = [], []
    for unit in units:
        for way in unit["figures"].get("ways", []):
            trials = [f"{name} {found:.2f}" for name, found in way["trials"].items() if isinstance(found, float)]
            trials += [f"{name}: {one_line(found)}" for name, found in way["trials"].items() if isinstance(found, str)]
            trials += [f"{name} in steps: {one_line(found)}" for name, found in way.get("in_steps", {}).items()]
            copies = "captured, outputs written" if way["zero_copy"] else way["copies"]
            on_device = "graph" if way["on_device"] else "session for any batch"
            convolutions = ", ".join(filter(None, (way["layout"], way.get("bias"))))  # older reports lack the second
            taken = ["CUDA graph" if way["cuda_graph"] else "kernel by kernel", convolutions, copies, on_device]
            shape = "x".join(map(str, way["shape"]))
            rows.append([unit["case"], way["precision"], way["operation"], shape, *taken, "; ".join(trials) or _DASH])
        memory = unit["figures"].get("memory", {})
        if memory:
            sizes = ", ".join(f"{name} {size / 2**20:.0f} MiB" for name, size in memory.items())
            notes.append(f"GPU memory of {unit['case']} in fp32, reconstructing 32 examples; pools of memory: {sizes}.")
    head = ["case", "precision", "operation", "shape", "launches", "layout, bias", "copies", "arrays on the device"]
    head.append("time of what was tried")
    return "\n".join(filter(None, [section("Ways", head, rows), "\n".join(notes)]))


def overhead(units: list[dict[str, Any]]) -> str:
    rows = []
    for unit in units:
        for row in unit["figures"].get("rows", []) if unit["step"] == "overhead" else []:
            interval = _DASH if row["low"] is None else f"{row['low']:.3f} to {row['high']:.3f}"
            times = [f"{row[side] * 1000:.1f} µs" for side in ("bare_ms", "ours_ms")]
            rows.append([unit["case"], row["what"], *times, f"{row['ratio']:.3f}", interval])
    head = ["case", "what", "onnxruntime with IO binding", "vae_runtime", "ratio", "95% interval"]
    return section("The runtime's own cost", head, rows)


def kernels(units: list[dict[str, Any]]) -> str:
    """Of one call each."""
    rows = []
    for unit in units:
        for row in unit["figures"].get("kernels", []):
            call = f"{row['operation']}, batch {row['batch']}"
            cost = [f"{row['launches']:g}", f"{row['microseconds']:.1f} µs"]
            rows.append([unit["case"], row["precision"], call, row["engine"], row["kernel"], *cost])
    head = ["case", "precision", "call", "engine", "kernel", "launches", "time on the GPU"]
    return section("Kernels", head, rows)


def variations(units: list[dict[str, Any]]) -> str:
    rows = []
    for unit in units:
        for row in unit["figures"].get("variations", []):
            what = [unit["case"], row["precision"], f"{row['half']}, batch {row['batch']}", row["variation"]]
            if "failed" in row:
                rows.append([*what, _DASH, one_line(row["failed"]), _DASH, _DASH])
                continue
            interval = _DASH if row["low"] is None else f"{row['low']:.2f} to {row['high']:.2f}"
            error = "not finite" if row["error"] is None else f"{row['error']:.1e}"
            found = [f"{row['ratio']:.2f}", interval, error, f"{row['opened_s']:.1f} s"]
            rows.append([*what, *found])
    head = ["case", "precision", "graph", "variation", "time ÷ plain", "95% interval", "error", "opened in"]
    return section("Variations", head, rows)


def bench(units: list[dict[str, Any]], torch_loaded_first: bool) -> str:
    parts = []
    for unit in units:
        if "bench" in unit["figures"]:
            report = Report.from_dict(unit["figures"]["bench"], f"{unit['step']}, {unit['case']}")
            parts.append(f"### {unit['case']}, {report.settings.precision}\n\n```text\n{format_report(report)}\n```\n")
    if not parts:
        return ""
    note = "Every process had loaded torch before: importing is faster and memory larger than without it.\n"
    return "\n".join(["## Latency\n", *([note] if torch_loaded_first else []), *parts])


def race(units: list[dict[str, Any]]) -> str:
    texts = [unit["figures"]["race_text"] for unit in units if "race_text" in unit["figures"]]
    return "\n".join(["## Race\n", *(re.sub(r"^(#+) ", r"##\1 ", text, flags=re.M) for text in texts)]) if texts else ""


def skipped(units: list[dict[str, Any]]) -> str:
    lines = {
        f"- {unit['step']}, {unit['case']}: {name}: {one_line(reason)}"
        for unit in units
        for name, reason in unit["skipped"].items()
    }
    return "\n".join(["## What was skipped\n", *sorted(lines), ""]) if lines else ""


def section(title: str, head: list[str], rows: list[list[str]]) -> str:
    """A heading and a table; nothing without rows."""
    if not rows:
        return ""
    lines = [head, ["---"] * len(head), *rows]
    table = "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
    return f"## {title}\n\n{table}\n"


def one_line(text: str) -> str:
    return " ".join(text.split())
