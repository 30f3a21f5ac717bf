"""The process of one competitor: a JSON request per line on stdin, a JSON answer per line on stdout, until stdin ends.

It answers only once it is idle: an engine whose threads still spin would slow down the one that runs next.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import json
import os
import signal
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from vae_runtime.engine import first_line
from vae_runtime.errors import VAEError
from vae_runtime.manifest import MEAN

from ..latency import Clock, Warmup, collector_off, warm_up
from ..worker import resident_bytes, tile
from .case import Case
from .entrant import CannotRunError, half_of, judge

WARMUP_SECONDS = 3.0  # at most, beside the two calls that very slow competitors get
AGAIN_SHARE = 0.1  # of a turn's time, but at least one call, to warm the caches that others have used in between
IDLE_STEP_SECONDS, IDLE_SHARE, IDLE_LIMIT_SECONDS = 0.01, 0.1, 3.0


class Worker:
    """The competitor of this process."""

    def __init__(self) -> None:
        self._calls: dict[str, Any] = {}
        self._clock = Clock.measure()
        self._idle_since: tuple[float, float] | None = None
        self._idle = [0.0, 0.0]

    def load(self, module: str, options: dict[str, Any], cores: list[int] | None) -> dict[str, Any]:
        """Import the competitor's engine and start the device, then stay on these cores."""
        peer = _peer(module)
        if hasattr(peer, "load"):
            peer.load(**options)
        if cores is not None:
            for thread in Path("/proc/self/task").iterdir():
                with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
                    os.sched_setaffinity(int(thread.name), cores)
        return {}

    def open(
        self, case: str, module: str, options: dict[str, Any], batch: int, threads: int, check: bool
    ) -> dict[str, Any]:
        """Open the competitor and, if `check`, judge its outputs; after that it may be warmed up."""
        begun = time.perf_counter()
        opened = Case.open(case)
        reference = {name: tile(array, batch) for name, array in opened.reference().items()}
        entrant = _peer(module).open_entrant(opened, batch, threads, **options)
        inputs = {"encode": reference["x"], "decode": reference[MEAN]}
        self._calls = {name: (call, put(inputs[half_of(name)])) for name, (call, put, _) in entrant.operations.items()}
        answer: dict[str, Any] = {
            "precisions": entrant.precisions,
            "engine": entrant.engine,
            "configuration": entrant.configuration,
            "plan": entrant.plan,
        }
        if check:
            verdict = judge(entrant, reference)
            answer |= {"measure": verdict.measure, "errors": verdict.errors, "fault": verdict.fault}
        seconds = time.perf_counter() - begun
        gc.collect()
        gc.freeze()  # what is there now stays, and would be looked through before every turn, for longer than some take
        return {**answer, "seconds": seconds}

    def warm(self, operation: str) -> dict[str, Any]:
        """Call until it is as fast as it stays; the time of one call."""
        if operation not in self._calls:
            raise CannotRunError(f"it has no {operation}, it has {', '.join(self._calls)}")
        call, array = self._calls[operation]
        with collector_off():
            warmup: Warmup = warm_up(lambda: call(array), WARMUP_SECONDS, self._clock)
        return {"call_ns": warmup.call_ns, "stable": warmup.stable}

    def turn(self, operation: str, seconds: float) -> dict[str, Any]:
        """Time calls one by one for so long, at least one; what they return is freed inside the timed region."""
        call, array = self._calls[operation]
        now = time.perf_counter_ns
        durations: list[int] = []
        with collector_off():
            begun = now()
            ready = begun + round(seconds * AGAIN_SHARE * 1e9)
            call(array)
            while now() < ready:
                call(array)
            end = now() + round(seconds * (1 - AGAIN_SHARE) * 1e9)
            while True:
                start = now()
                call(array)
                stop = now()
                durations.append(stop - start)
                if stop >= end:
                    break
        return {"median_ns": float(np.median(durations)), "calls": len(durations)}

    def finish(self) -> dict[str, Any]:
        """What was seen over the whole race."""
        cpu, wall = self._idle
        return {"idle_cpu_share": cpu / wall if wall else 0.0, "peak_rss_bytes": resident_bytes()[1]}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """The result, or {"skip"} or {"fail"} with the reason in words."""
        if self._idle_since is not None:
            cpu, wall = time.process_time(), time.perf_counter()
            self._idle = [self._idle[0] + cpu - self._idle_since[0], self._idle[1] + wall - self._idle_since[1]]
        try:
            if (name := request.pop("request")) not in REQUESTS:
                raise ValueError(f"there is no request {name!r}; expected one of {', '.join(REQUESTS)}")
            found: dict[str, Any] = getattr(self, name)(**request)
        except (CannotRunError, VAEError) as error:
            found = {"skip" if isinstance(error, CannotRunError) else "fail": str(error)}
        except Exception as error:
            found = {"fail": f"{type(error).__name__}: {first_line(error)}"}
        wait_until_idle()
        self._idle_since = time.process_time(), time.perf_counter()
        return found


REQUESTS = ("load", "open", "warm", "turn", "finish")  # methods of `Worker`


def wait_until_idle() -> None:
    """Sleep until this process uses less than IDLE_SHARE of a core; no longer than IDLE_LIMIT_SECONDS."""
    deadline = time.perf_counter() + IDLE_LIMIT_SECONDS
    while time.perf_counter() < deadline:
        before, begun = time.process_time(), time.perf_counter()
        time.sleep(IDLE_STEP_SECONDS)
        if time.process_time() - before < IDLE_SHARE * (time.perf_counter() - begun):
            return


def _peer(module: str) -> Any:
    if not module.endswith(".py"):
        return import_module(f"{__package__}.peers.{module}")
    spec = importlib.util.spec_from_file_location(Path(module).stem, module)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it and ends this process
    cores = json.loads(sys.argv[1])
    if cores is not None:
        os.sched_setaffinity(0, cores)  # before any engine starts its threads
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)  # whatever a library prints must not mix with the answers
        worker = Worker()
        for line in sys.stdin:
            print_line(answers, worker.answer(json.loads(line)))
    os._exit(0)  # some engines take seconds to take themselves apart, or crash over it


def print_line(stream: Any, answer: dict[str, Any]) -> None:
    """One line of JSON; a parent that is gone is no reason to complain."""
    with contextlib.suppress(OSError):  # which Windows does not call a broken pipe
        stream.write(json.dumps(answer) + "\n")
        stream.flush()


if __name__ == "__main__":
    main()
