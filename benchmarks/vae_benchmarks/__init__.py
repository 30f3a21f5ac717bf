"""Measure how fast a bundle runs here, and compare two such measurements.

    from vae_benchmarks import Settings, benchmark, compare

    report = benchmark("digits.vae", Settings(batches=(1, 8), threads=(1,)))
    report.save("today.json")
    comparison = compare(Report.load("yesterday.json"), report)

Latencies in milliseconds, memory in bytes, throughput in examples per second; every key says so.
"""

from .compare import Comparison, ComparisonRow, compare
from .errors import BenchmarkError, ReportError
from .harness import benchmark
from .intervals import median_interval, shift_interval
from .machine import MachineFacts
from .report import BundleFacts, ClockFacts, LatencyReport, Repeated, Report, StartupReport, Versions
from .settings import OPERATIONS, Settings

__all__ = [
    "OPERATIONS",
    "BenchmarkError",
    "BundleFacts",
    "ClockFacts",
    "Comparison",
    "ComparisonRow",
    "LatencyReport",
    "MachineFacts",
    "Repeated",
    "Report",
    "ReportError",
    "Settings",
    "StartupReport",
    "Versions",
    "benchmark",
    "compare",
    "median_interval",
    "shift_interval",
]
