"""What a run of `vae-bench` found out: the dataclasses, and the JSON document that they become."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vae_runtime.atomic import write_json

from .document import from_document, load_document, require_measured
from .errors import ReportError
from .gpu import GpuFacts
from .intervals import median_interval, smallest_count
from .latency import Samples
from .machine import MachineFacts
from .settings import Settings

FORMAT = "vae-bench-report"
FORMAT_VERSION = 1
_WHAT = "a report of vae-bench"


class RowKey(NamedTuple):
    """What makes a row the same as one of another report; the fields are those of `LatencyReport`."""

    operation: str
    batch: int
    threads: int | None
    device: str
    precision: str
    input: str | None


@dataclass(frozen=True)
class PartReport:
    """One part of a call in milliseconds; the fields are those of `LatencyReport`."""

    p50_ms: float
    p50_low_ms: float | None
    p50_high_ms: float | None
    interval_from: str
    count: int
    round_p50_ms: tuple[float, ...]


@dataclass(frozen=True)
class SplitReport:
    """The parts of encode or decode, each timed alone and to its end on the device.

    host_to_device: `copy_to_device` of the array as float32; no part has the conversion of uint8. compute:
    `encode_to_device` or `decode_to_device` of what is there already. device_to_host: `DeviceArray.numpy` of all
    outputs.
    """

    host_to_device: PartReport
    compute: PartReport
    device_to_host: PartReport

    PARTS = ("host_to_device", "compute", "device_to_host")


@dataclass(frozen=True)
class LatencyReport:
    """One row: the latency of one call of one operation, in milliseconds.

    threads: as asked for; None is onnxruntime's own choice. device, precision: as really used.
    count: samples in all rounds together. calls_per_sample: above 1 where a call was too short to be timed alone;
        the most of any round, as each reads its own clock.
    p50_ms: the median of the rounds' medians. p50_low_ms, p50_high_ms: its confidence interval; None where there were
        too few samples.
    interval_from: "rounds", the order statistics of the rounds' medians, which are independent, while calls in one
        process resemble each other; or "samples" where the rounds are too few for that: p50_ms is that of all samples
        then.
    p90_ms, p99_ms: of the rounds that timed single calls. None where these are not most of the rounds, or their samples
        too few to bound them from both sides.
    mean_ms, stdev_ms, p90_ms, p99_ms: each round weighs as much as another, however many samples it took.
    throughput_per_second: examples per second, from the mean.
    width: of the interval, relative to the median. width_reached: whether it is as narrow as was asked for.
    warmup_calls, warmup_seconds: in all rounds, not part of the figures above; warmup_stable: in every round.
    round_p50_ms: the median of each round, each in a process of its own, in the order of time.
    split: its parts, as `Settings.split` says; None where they were not measured.
    input: the dtype of what it was given, "float32" or "uint8", whose conversion is part of the call; None of decode
        and sample, which take no inputs.
    """

    operation: str
    batch: int
    threads: int | None
    device: str
    precision: str
    count: int
    calls_per_sample: int
    p50_ms: float
    p50_low_ms: float | None
    p50_high_ms: float | None
    interval_from: str
    p90_ms: float | None
    p99_ms: float | None
    mean_ms: float
    min_ms: float
    stdev_ms: float | None
    throughput_per_second: float
    width: float | None
    width_reached: bool
    warmup_calls: int
    warmup_seconds: float
    warmup_stable: bool
    measured_seconds: float
    round_p50_ms: tuple[float, ...]
    split: SplitReport | None
    input: str | None

    @property
    def key(self) -> RowKey:
        """What makes this row the same as one of another report."""
        return RowKey(self.operation, self.batch, self.threads, self.device, self.precision, self.input)


def summarize(
    key: RowKey, rounds: Sequence[Samples], settings: Settings, splits: Sequence[dict[str, Samples]] = ()
) -> LatencyReport:
    """All rounds of one row -> its figures. splits: the parts of each round, where they were measured."""
    pooled, weights = _pool(rounds), _weights(rounds)
    median, mean = summarize_part(rounds, settings.confidence), float(weights @ pooled)
    p50, low, high = median.p50_ms, median.p50_low_ms, median.p50_high_ms
    width = None if low is None or high is None or not p50 else (high - low) / p50
    return LatencyReport(
        **key._asdict(),
        count=len(pooled),
        calls_per_sample=max(one.calls_per_sample for one in rounds),
        p50_ms=p50,
        p50_low_ms=low,
        p50_high_ms=high,
        interval_from=median.interval_from,
        p90_ms=_high_quantile(rounds, 0.90, settings.confidence),
        p99_ms=_high_quantile(rounds, 0.99, settings.confidence),
        mean_ms=mean,
        min_ms=float(pooled.min()),
        stdev_ms=_stdev(pooled, weights),
        throughput_per_second=key.batch / (mean / 1000),
        width=width,
        width_reached=width is not None and width <= settings.width,
        warmup_calls=sum(one.warmup.calls for one in rounds),
        warmup_seconds=sum(one.warmup.seconds for one in rounds),
        warmup_stable=all(one.warmup.stable for one in rounds),
        measured_seconds=sum(one.seconds for one in rounds),
        round_p50_ms=median.round_p50_ms,
        split=SplitReport(
            *(summarize_part([one[part] for one in splits], settings.confidence) for part in SplitReport.PARTS)
        )
        if splits
        else None,
    )


def summarize_part(rounds: Sequence[Samples], confidence: float) -> PartReport:
    """The median over all rounds, and its interval, both of the rounds' medians or both of all samples."""
    pooled = _pool(rounds)
    medians = tuple(float(np.median(one.samples_ns)) / 1e6 for one in rounds)
    p50, interval, interval_from = np.median(medians), median_interval(medians, confidence), "rounds"
    if interval is None:
        p50, interval, interval_from = np.median(pooled), median_interval(pooled, confidence), "samples"
    low, high = interval or (None, None)
    return PartReport(float(p50), low, high, interval_from, len(pooled), medians)


def _pool(rounds: Sequence[Samples]) -> NDArray[np.float64]:
    """Every sample of every round, in milliseconds."""
    return np.concatenate([np.asarray(one.samples_ns, np.float64) for one in rounds]) / 1e6


def _weights(rounds: Sequence[Samples]) -> NDArray[np.float64]:
    """Of every sample, 1 in all: a noisy round takes more samples than a quiet one, and is to count no more for it."""
    counts = [len(one.samples_ns) for one in rounds]
    return np.repeat(1 / (len(counts) * np.array(counts, np.float64)), counts)


def _even_count(rounds: Sequence[Samples]) -> int:
    """For how many samples of one weight these can stand where it is asked whether they bound a quantile: were all of
    a tail in the shortest round, its samples alone could show it."""
    return len(rounds) * min(len(one.samples_ns) for one in rounds)


def _high_quantile(rounds: Sequence[Samples], q: float, confidence: float) -> float | None:
    """Of single calls, each round's clock deciding whether it times them; a mean of several hides their tail. Those of
    a few rounds are not the row's: where it is a close thing, these are the rounds whose calls were slow."""
    single = [one for one in rounds if one.calls_per_sample == 1]
    if 2 * len(single) <= len(rounds) or _even_count(single) < smallest_count(q, confidence):
        return None
    return _quantile(_pool(single), _weights(single), q)


def _quantile(values: NDArray[np.float64], weights: NDArray[np.float64], q: float) -> float:
    """The smallest value that, with all below it, has at least `q` of the weight."""
    order = np.argsort(values)
    place = np.searchsorted(np.cumsum(weights[order]), q * (1 - 1e-12))
    return float(values[order[min(int(place), len(order) - 1)]])


def _stdev(values: NDArray[np.float64], weights: NDArray[np.float64]) -> float | None:
    """With Bessel's correction, for weights; None of a single value."""
    if len(values) < 2:
        return None
    return float(np.sqrt(weights @ (values - weights @ values) ** 2 / (1 - weights @ weights)))


@dataclass(frozen=True)
class Repeated:
    """One figure from several fresh processes, in the order of time."""

    median: float
    min: float
    max: float
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> Repeated:
        return cls(float(np.median(values)), min(values), max(values), tuple(values))


@dataclass(frozen=True)
class StartupReport:
    """Each figure from one fresh process per round, its files in the system's cache.

    import_ms: to import vae_runtime and onnxruntime, numpy with them. load_ms: `VAE.load`, the verification of every
    file included. first_call_ms: the first reconstruct, of one example. to_first_result_ms: the sum of the three; the
    start of the interpreter is not part of it. rss_*: resident memory of the whole process, as the system counts it;
    peak_rss_bytes: after the first result and one reconstruct of `peak_batch` examples. input: their dtype.
    """

    threads: int | None
    peak_batch: int
    import_ms: Repeated
    load_ms: Repeated
    first_call_ms: Repeated
    to_first_result_ms: Repeated
    rss_after_import_bytes: Repeated
    rss_after_load_bytes: Repeated
    peak_rss_bytes: Repeated
    input: str

    FIGURES = (
        "import_ms",
        "load_ms",
        "first_call_ms",
        "to_first_result_ms",
        "rss_after_import_bytes",
        "rss_after_load_bytes",
        "peak_rss_bytes",
    )


@dataclass(frozen=True)
class BundleFacts:
    """folder: the last part of its path only. golden: how many golden inputs it has, golden_source: what they are.
    size: (height, width) of its images, where it leaves that free the default; None for vectors.
    """

    folder: str
    name: str
    kind: str
    manifest_file_sha256: str
    golden: int
    golden_source: str
    size: tuple[int, ...] | None


@dataclass(frozen=True)
class Versions:
    python: str
    numpy: str
    onnxruntime: str
    vae_edge: str


@dataclass(frozen=True)
class ClockFacts:
    """time.perf_counter_ns, medians over all measuring processes: its smallest step, and the cost of one reading."""

    resolution_ns: float
    cost_ns: float


@dataclass(frozen=True)
class PlannedRoute:
    """What ran batches from `from_batch` on, as `VAE.plan` says; threads and spinning None: the engine's own choice.

    fixed_batches: those that `VAE.warmup` made a session of their own for.
    """

    from_batch: int
    device: str
    provider: str
    precision: str
    file: str
    threads: int | None
    spinning: bool | None
    fixed_batches: tuple[int, ...]


@dataclass(frozen=True)
class Report:
    """The whole result of `benchmark`.

    created: UTC, ISO 8601. plan: what really ran, as `VAE.plan` says. skipped: operation -> why it was not measured.
    method: how the figures came about, in words. gpus: on a GPU, what each measuring process found right after its last
        timed call; empty on other devices.
    other_cores_busy: how many cores other processes kept busy meanwhile, on average; None where the system does not
        tell.
    """

    created: str
    bundle: BundleFacts
    machine: MachineFacts
    versions: Versions
    settings: Settings
    clock: ClockFacts
    plan: dict[str, tuple[PlannedRoute, ...]]
    method: dict[str, str]
    skipped: dict[str, str]
    startup: StartupReport
    latency: tuple[LatencyReport, ...]
    gpus: tuple[GpuFacts, ...]
    other_cores_busy: float | None

    @property
    def image_size(self) -> tuple[int, ...] | None:
        """(height, width) of the images that were measured; None where there are none, or it is not known."""
        return self.settings.size or self.bundle.size

    @property
    def busy_with(self) -> str | None:
        """In words, what else the machine did while this was measured; None where that was too little to matter.

        The load average is of the minute before, whatever ran then: it counts only where nothing better is known.
        """
        if self.other_cores_busy is not None:
            return self.machine.busy_with(self.other_cores_busy)
        cores = self.machine.cores_usable or 1
        return f"load average {self.machine.load_average_1min} on {cores} cores" if self.machine.is_busy else None

    def to_dict(self) -> dict[str, Any]:
        """The JSON document, as plain values."""
        return {"format": FORMAT, "format_version": FORMAT_VERSION, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, document: Any, name: str = "the report") -> Report:
        """A report from its JSON document. name: what a message calls it.

        Raises:
            ReportError: it is not one, or of another version, or has a time that cannot be.
        """
        report = from_document(cls, document, name, FORMAT, FORMAT_VERSION, _WHAT)
        keys = [row.key for row in report.latency]
        if len(set(keys)) < len(keys):
            raise ReportError(f"{name} has the same row of latency twice")
        if (size := report.bundle.size) is not None and (len(size) != 2 or min(size) < 1):
            raise ReportError(f"{name}.bundle.size is {size}; expected a height and a width, or none")
        if not all(row.round_p50_ms for row in report.latency):
            raise ReportError(f"{name} has a row of latency without rounds")
        for row in report.latency:
            require_measured((row.p50_ms, *row.round_p50_ms), f"{name} has a row of {row.operation} whose time in ms")
        for figure in StartupReport.FIGURES:
            found: Repeated = getattr(report.startup, figure)
            if not found.values:
                raise ReportError(f"{name} has a start-up without {figure}")
            measured = (found.median, found.min, found.max, *found.values)
            require_measured(measured, f"{name} has a start-up whose {figure}")
        return report

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON document; whole or not at all.

        Raises:
            OutputError: the file cannot be written.
        """
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Report:
        """Read what `save` or `vae-bench --json` wrote.

        Raises:
            ReportError: the file cannot be read, or is not a report.
        """
        return cls.from_dict(load_document(path, _WHAT), str(path))
