"""The measuring loop: time one call again and again, in one process, until its median is known well enough."""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from .intervals import median_interval

WARMUP_WINDOW = 5  # calls; at least two windows of them
WARMUP_SECONDS = 0.05  # and at least so long
WARMUP_AGREEMENT = 0.1  # then until the medians of the last two windows differ by less
WARMUP_LIMIT_SECONDS = 0.1  # but no longer than this, or than measuring takes where that is longer
LEAST_WARMUP_CALLS = 2  # which very slow calls get in any case
CLOCK_SHARE = 0.01  # of a sample's duration that reading the clock may take
BLOCK_SECONDS = 0.01  # of calls of one side in a row, where two are compared

WARMUP_RULE = (
    f"in each round at least {2 * WARMUP_WINDOW} calls and {WARMUP_SECONDS * 1000:g} ms, then until the medians of the "
    f"last two windows of {WARMUP_WINDOW} calls differ by less than {WARMUP_AGREEMENT:.0%}; it ends, stable or "
    f"not, after {WARMUP_LIMIT_SECONDS * 1000:g} ms, or the time that the round then measures for where that is longer,"
    f" but not before {LEAST_WARMUP_CALLS} calls"
)


@dataclass(frozen=True)
class Clock:
    """A clock in nanoseconds and what was found out about it on this machine.

    resolution_ns: the smallest step that was seen. cost_ns: of one reading.
    """

    resolution_ns: float
    cost_ns: float
    now_ns: Callable[[], int] = time.perf_counter_ns

    @classmethod
    def measure(cls, now_ns: Callable[[], int] = time.perf_counter_ns, readings: int = 20_000) -> Clock:
        """Read the clock many times in a row; the cost is that of the cheapest twentieth, which nothing interrupted."""
        times = np.array([now_ns() for _ in range(readings)], np.int64)
        steps = np.diff(times)
        seen = steps[steps > 0]
        resolution = float(seen.min()) if len(seen) else math.inf
        stretch = readings // 20
        return cls(resolution, float(np.diff(times[::stretch]).min()) / stretch, now_ns)


@dataclass(frozen=True)
class Warmup:
    """stable: False where the time was up before two windows agreed."""

    calls: int
    seconds: float
    stable: bool
    call_ns: float  # the median of the last window, from which the grouping of calls is chosen


@dataclass(frozen=True)
class Samples:
    """One round of one row.

    samples_ns: the duration of each call, or the mean of `calls_per_sample` calls where one call is too short to be
        timed alone.
    """

    samples_ns: list[float]
    calls_per_sample: int
    warmup: Warmup
    seconds: float


def measure(
    call: Callable[[], object], *, seconds: float, wanted: int, confidence: float, width: float, clock: Clock
) -> Samples:
    """Warm up, then time `call` with the garbage collector off.

    It ends as soon as there are `wanted` samples and the interval of their median is narrower than `width` relative to
    the median, and in any case with the sample during which `seconds` have passed. What `call` returns is freed inside
    the timed region, as it is in a caller's loop.
    """
    with collector_off():
        warmup = warm_up(call, max(seconds, WARMUP_LIMIT_SECONDS), clock)
        grouped = calls_per_sample(warmup.call_ns, clock)
        samples: list[float] = []
        start, look = clock.now_ns(), wanted
        deadline = start + round(seconds * 1e9)
        while True:
            samples.append(_time_calls(call, grouped, clock.now_ns))
            if (end := clock.now_ns()) >= deadline:
                break
            if len(samples) >= look:
                if _is_narrow(samples, confidence, width):
                    break
                look = math.ceil(len(samples) * 1.5)  # few looks: each gives chance another try at stopping early
    return Samples(samples, grouped, warmup, (end - start) / 1e9)


@contextlib.contextmanager
def collector_off() -> Iterator[None]:
    """Collect garbage, then keep the collector from running; afterwards it is as it was."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def warm_up(call: Callable[[], object], limit_seconds: float, clock: Clock) -> Warmup:
    """Call until it is as fast as it stays, by the rule of WARMUP_RULE, at most about `limit_seconds`."""
    durations: list[float] = []
    start = clock.now_ns()
    limit_ns, least_ns = limit_seconds * 1e9, WARMUP_SECONDS * 1e9
    while True:
        durations.append(_time_calls(call, 1, clock.now_ns))
        elapsed = clock.now_ns() - start
        stable = elapsed >= least_ns and _is_stable(durations)
        if stable or (elapsed >= limit_ns and len(durations) >= LEAST_WARMUP_CALLS):
            return Warmup(len(durations), elapsed / 1e9, stable, float(np.median(durations[-WARMUP_WINDOW:])))


def calls_per_sample(call_ns: float, clock: Clock) -> int:
    """How many calls to time together, so that reading the clock takes at most CLOCK_SHARE of it and its steps do not
    show. 1 for all but the fastest calls: only single calls have percentiles."""
    shortest = max(clock.cost_ns, clock.resolution_ns) / CLOCK_SHARE
    return max(1, math.ceil(shortest / max(call_ns, 1)))


def alternate(
    first: Callable[[], object], second: Callable[[], object], blocks: int
) -> tuple[list[float], list[float]]:
    """Seconds per call of either, in short blocks by turns, so that the machine's drift meets both alike: one entry per
    pair of blocks, for `intervals.paired_ratio`. Who begins changes every time; calls of over half a block get a tenth
    of the blocks, at least 5."""
    now = time.perf_counter_ns
    count = max(1, int(BLOCK_SECONDS * 1e9 / min(_time_calls(first, 3, now), _time_calls(first, 3, now))))
    times: tuple[list[float], list[float]] = ([], [])
    for index in range(blocks if count > 1 else max(5, blocks // 10)):
        for which in (0, 1) if index % 2 else (1, 0):
            times[which].append(_time_calls((first, second)[which], count, now) / 1e9)
    return times


def _time_calls(call: Callable[[], object], count: int, now_ns: Callable[[], int]) -> float:
    if count == 1:
        start = now_ns()
        call()
        return now_ns() - start
    repeats = range(count)
    start = now_ns()
    for _ in repeats:
        call()
    return (now_ns() - start) / count


def _is_stable(durations: list[float]) -> bool:
    if len(durations) < 2 * WARMUP_WINDOW:
        return False
    last, before = np.median(durations[-WARMUP_WINDOW:]), np.median(durations[-2 * WARMUP_WINDOW : -WARMUP_WINDOW])
    return bool(abs(last - before) < WARMUP_AGREEMENT * before)


def _is_narrow(samples: list[float], confidence: float, width: float) -> bool:
    interval = median_interval(samples, confidence)
    return interval is not None and interval[1] - interval[0] <= width * float(np.median(samples))
