"""The fastest of several ways to set an engine up, as its best users would find it: by trying them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from vae_runtime.preprocess import Float32

Call = Callable[[Any], Any]

TRIAL_CALLS, TRIAL_SECONDS = 30, 1.0


class Half(NamedTuple):
    """One half of a model, set up. from_host: arrays to arrays. on_device: what lies on the device to others there,
    finished when it returns. words: how."""

    from_host: Callable[[Float32], Sequence[Float32]]
    on_device: Callable[[Any], Sequence[Any]]
    words: str


def fastest(ways: Mapping[str, Callable[[], Call]], example: Any, is_right: Callable[[Any], bool]) -> tuple[str, Call]:
    """The fastest call for `example` and, in words, which way it is.

    ways: name -> makes a call. One that fails, or whose second result `is_right` refuses, is named in the words and not
    chosen. Where all are wrong, the first is, for the checks to come; where none can be made, its error is raised.
    """
    calls: dict[str, Call] = {}
    wrong: dict[str, Call] = {}
    errors: dict[str, Exception] = {}
    for name, make in ways.items():
        try:
            call = make()
            call(example)  # a CUDA graph may be recorded in the first call, and is replayed from the second on
            (calls if is_right(call(example)) else wrong)[name] = call
        except Exception as error:
            errors[name] = error
    if not calls and not wrong:
        raise next(iter(errors.values()))
    candidates = calls or dict([next(iter(wrong.items()))])
    seconds = {name: typical_seconds(call, example, TRIAL_CALLS) for name, call in candidates.items()}
    chosen = min(seconds, key=lambda name: seconds[name])
    notes = [f"{name} failed: {type(error).__name__}" for name, error in errors.items()]
    notes += [f"{name} gives other outputs" for name in wrong if name != chosen]
    return f"{chosen} ({', '.join(notes)})" if notes else chosen, candidates[chosen]


def typical_seconds(call: Call, example: Any, calls: int) -> float:
    """The median of so many calls after a first one, fewer where they take more than TRIAL_SECONDS."""
    durations: list[float] = []
    begun = time.perf_counter()
    while len(durations) < 2 or (len(durations) < calls and time.perf_counter() - begun < TRIAL_SECONDS):
        start = time.perf_counter()
        call(example)
        durations.append(time.perf_counter() - start)
    return statistics.median(durations[1:])
