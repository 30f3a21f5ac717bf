"""The measuring loop on a clock that only moves when it is told to."""

from __future__ import annotations

import gc
import itertools
import random
import time
from collections.abc import Callable, Iterable

import pytest

from vae_benchmarks.intervals import paired_ratio
from vae_benchmarks.latency import Clock, Samples, alternate, calls_per_sample, collector_off, measure, warm_up

MS = 1_000_000


class World:
    """Time in which only calls take time: each the next of `durations` (ns), the last one for ever."""

    def __init__(self, durations: Iterable[float]) -> None:
        self.now = 0.0
        self.calls = 0
        self._durations = iter(durations)

    def call(self) -> None:
        self.calls += 1
        self.now += next(self._durations)

    def clock(self, cost_ns: float = 50.0, resolution_ns: float = 30.0) -> Clock:
        return Clock(resolution_ns, cost_ns, lambda: int(self.now))


def steady(ns: float) -> Iterable[float]:
    return itertools.repeat(ns)


def noisy() -> Iterable[float]:
    return itertools.cycle([1 * MS, 3 * MS, 1.5 * MS, 2.5 * MS])


def run(
    world: World, seconds: float = 1.0, wanted: int = 100, width: float = 0.05, clock: Clock | None = None
) -> Samples:
    return measure(
        world.call, seconds=seconds, wanted=wanted, confidence=0.95, width=width, clock=clock or world.clock()
    )


def test_a_steady_call_stops_once_its_median_is_known() -> None:
    world = World(steady(MS))
    samples = run(world)
    assert len(samples.samples_ns) == 100
    assert set(samples.samples_ns) == {MS}
    assert samples.seconds == pytest.approx(0.1)
    assert world.calls == 100 + samples.warmup.calls


def test_a_noisy_call_takes_the_whole_budget_and_no_more() -> None:
    samples = run(World(noisy()), seconds=1.0, width=0.001)
    assert 1.0 <= samples.seconds < 1.0 + 0.003
    assert len(samples.samples_ns) == 500


def test_a_wider_target_stops_a_noisy_call_earlier() -> None:
    assert len(run(World(noisy()), width=0.9).samples_ns) == 100


def test_chance_has_few_tries_at_stopping_early() -> None:
    """However narrow the interval may be in between: looks are at half as many samples more every time."""
    lengths = []
    for seed in range(20):
        rng = random.Random(seed)
        world = World(MS * rng.lognormvariate(0, 0.5) for _ in itertools.count())
        lengths.append(len(run(world, seconds=5, wanted=40, width=0.2).samples_ns))
    assert set(lengths) <= {40, 60, 90, 135, 203, 305, 458, 687}
    assert len(set(lengths)) > 2


def test_the_budget_ends_a_steady_call_before_it_has_the_wanted_samples() -> None:
    assert len(run(World(steady(MS)), seconds=0.02).samples_ns) == 20


def test_a_call_slower_than_the_budget_is_measured_once() -> None:
    world = World(steady(5000 * MS))
    samples = run(world, seconds=0.1)
    assert len(samples.samples_ns) == 1
    assert (samples.warmup.calls, samples.warmup.stable) == (2, False)


def test_warm_up_lasts_until_the_calls_are_stable() -> None:
    falling = [20 * MS, 15 * MS, 10 * MS, 8 * MS, 6 * MS, 5 * MS, 4 * MS, 3 * MS]
    world = World(itertools.chain(falling, steady(MS)))
    warmup = warm_up(world.call, 1.0, world.clock())
    assert warmup.stable
    assert warmup.calls == 16  # 8 falling ones; then the two windows of 5 that end here are mostly steady
    assert warmup.call_ns == MS


def test_warm_up_of_a_fast_call_lasts_the_stated_time() -> None:
    world = World(steady(MS / 100))
    warmup = warm_up(world.call, 1.0, world.clock())
    assert (warmup.calls, warmup.seconds) == (5000, pytest.approx(0.05))


def test_a_small_budget_does_not_cut_the_warm_up_short() -> None:
    samples = run(World(steady(MS)), seconds=0.01)
    assert (samples.warmup.calls, samples.warmup.stable) == (50, True)
    assert len(samples.samples_ns) == 10


def test_warm_up_that_never_settles_ends_and_says_so() -> None:
    world = World(MS * 1.1**n for n in itertools.count())
    warmup = warm_up(world.call, 0.2, world.clock())
    assert not warmup.stable
    assert warmup.seconds == pytest.approx(0.2, rel=0.2)


def test_what_is_warmed_up_is_not_measured() -> None:
    samples = run(World(itertools.chain([900 * MS] * 3, steady(MS))), seconds=3.0)
    assert max(samples.samples_ns) == MS


@pytest.mark.parametrize(
    ("call_ns", "cost_ns", "resolution_ns", "expected"),
    [(20_000, 50, 30, 1), (5_000, 50, 30, 1), (100, 50, 30, 50), (0, 50, 30, 5000), (20_000, 50, 15_600_000, 78_000)],
)
def test_calls_are_grouped_only_where_the_clock_would_show(
    call_ns: float, cost_ns: float, resolution_ns: float, expected: int
) -> None:
    assert calls_per_sample(call_ns, Clock(resolution_ns, cost_ns)) == expected


def test_a_group_of_calls_gives_the_mean_of_one() -> None:
    world = World(steady(200))
    samples = run(world, seconds=0.01, wanted=10)
    assert samples.calls_per_sample == 25
    assert samples.samples_ns == [200] * 10
    assert world.calls == samples.warmup.calls + 10 * 25


def test_the_clock_is_measured() -> None:
    times = itertools.count(step=40)
    clock = Clock.measure(lambda: next(times), readings=100)
    assert (clock.resolution_ns, clock.cost_ns) == (40, 40)
    coarse = (n // 10 * 1000 for n in itertools.count())
    clock = Clock.measure(lambda: next(coarse), readings=1001)
    assert (clock.resolution_ns, clock.cost_ns) == (1000, 100)
    interrupted = itertools.accumulate(4_000_000 if n == 500 else 40 for n in itertools.count())
    assert Clock.measure(lambda: next(interrupted), readings=1001).cost_ns == 40
    real = Clock.measure()
    assert 0 < real.resolution_ns < 1e8
    assert 0 < real.cost_ns < 1e6


@pytest.fixture
def restore_collector() -> Iterable[None]:
    was_enabled = gc.isenabled()
    yield
    (gc.enable if was_enabled else gc.disable)()


@pytest.mark.usefixtures("restore_collector")
@pytest.mark.parametrize("switch", [gc.enable, gc.disable])
def test_the_collector_is_off_while_measuring_and_then_as_before(switch: Callable[[], None]) -> None:
    switch()
    before, seen = gc.isenabled(), set()
    world = World(steady(MS))

    def call() -> None:
        seen.add(gc.isenabled())
        world.call()

    measure(call, seconds=0.01, wanted=10, confidence=0.95, width=0.05, clock=world.clock())
    assert seen == {False}
    assert gc.isenabled() == before


@pytest.mark.usefixtures("restore_collector")
def test_the_collector_is_restored_after_an_error() -> None:
    gc.enable()

    def fail() -> None:
        raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        measure(fail, seconds=0.01, wanted=10, confidence=0.95, width=0.05, clock=Clock(30, 50))
    assert gc.isenabled()


@pytest.mark.usefixtures("restore_collector")
def test_garbage_is_collected_before_measuring() -> None:
    collections: list[str] = []

    def note(phase: str, info: dict) -> None:
        collections.append(phase)

    gc.callbacks.append(note)
    try:
        with collector_off():
            assert collections[-2:] == ["start", "stop"]
    finally:
        gc.callbacks.remove(note)


def test_two_sides_take_turns_in_blocks() -> None:
    order: list[str] = []

    def side(name: str, seconds: float) -> Callable[[], None]:
        return lambda: (order.append(name), time.sleep(seconds))[1]

    times = alternate(side("a", 0.002), side("b", 0.004), 12)
    assert [len(one) for one in times] == [12, 12]
    assert paired_ratio(*times)[0] == pytest.approx(2, rel=0.15)
    turns = [name for name, before in zip(order[6:], order[5:], strict=False) if name != before]
    assert len(turns) <= 13  # each begins every second pair, so that two blocks of the same side follow each other
    slow = alternate(side("a", 0.02), side("b", 0.02), 12)
    assert [len(one) for one in slow] == [5, 5]
