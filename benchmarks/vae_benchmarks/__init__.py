"""Measure how fast a bundle runs here, and compare two such measurements.

    from vae_benchmarks import Settings, benchmark, compare

    report = benchmark("digits.vae", Settings(batches=(1, 8), threads=(1,)))
    report.save("today.json")
    comparison = compare(Report.load("yesterday.json"), report)

Latencies in milliseconds, memory in bytes, throughput in examples per second; every key says so.
"""

from .compare import Comparison, ComparisonRow, compare
from .errors import BenchmarkError, ReportError
from .gpu import GpuFacts
from .harness import benchmark
from .intervals import median_interval, shift_interval
from .machine import MachineFacts
from .pairing import Difference
from .report import (
    BundleFacts,
    ClockFacts,
    LatencyReport,
    PartReport,
    Repeated,
    Report,
    SplitReport,
    StartupReport,
    Versions,
)
from .settings import OPERATIONS, Settings

__all__ = [
    "OPERATIONS",
    "BenchmarkError",
    "BundleFacts",
    "ClockFacts",
    "Comparison",
    "ComparisonRow",
    "Difference",
    "GpuFacts",
    "LatencyReport",
    "MachineFacts",
    "PartReport",
    "Repeated",
    "Report",
    "ReportError",
    "Settings",
    "SplitReport",
    "StartupReport",
    "Versions",
    "benchmark",
    "compare",
    "median_interval",
    "shift_interval",
]
