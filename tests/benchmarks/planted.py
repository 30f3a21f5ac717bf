"""A competitor for the race whose speed and faults the tests choose; a worker process loads it by its path."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from vae_benchmarks.race.case import Case
from vae_benchmarks.race.entrant import CannotRunError, Entrant, Resident


def load(precision: str, **options: Any) -> None:
    """The configuration may tell that it was called, and in which processor affinity."""
    os.environ["PLANTED_LOADED"] = f"in {precision}"


def open_entrant(
    case: Case,
    batch: int,
    threads: int,
    milliseconds: float = 0.0,
    fault: str = "",
    precision: str = "fp32",
    variable: str = "",
    resident: float = 0.0,
    compiles: str = "",
) -> Entrant:
    """Right answers for the case's own inputs after `milliseconds`, unless `fault` names something else. The
    configuration tells that environment variable of the worker. resident: milliseconds of the calls for data that stay
    on its device, which keeps arrays as lists of one; 0 for none. compiles: a name under which it leaves a file in its
    folder for temporary files; the configuration tells how often it did so before."""
    if fault == "absent":
        raise CannotRunError("the planted engine is not installed")
    if fault == "broken":
        raise ValueError("the planted engine is broken\nand tells a long story")
    configuration = os.environ.get(variable, f"{milliseconds:g} ms")
    if compiles:
        left = Path(tempfile.gettempdir()) / compiles
        before = len(left.read_text()) if left.exists() else 0
        left.write_text("x" * (before + 1))
        configuration = f"compiled {before} times before"
    reference = {name: array[np.arange(batch) % len(array)] for name, array in case.reference().items()}
    buffer = np.empty_like(reference["reconstruction"])
    calls = 0

    def answer(array: Any, names: tuple[str, ...]) -> tuple[Any, ...]:
        nonlocal calls
        calls += 1
        if fault == "dies" and calls > 40:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(milliseconds / 1000)
        if fault == "shape":
            return tuple(reference[name][:, :1] for name in names)
        if fault == "reuse" and "reconstruction" in names:
            buffer[:] = reference["reconstruction"] if np.array_equal(array, reference["mean"]) else 0
            return (buffer,)
        scale = np.float32(1.2 if fault == "wrong" else 1)
        return tuple(scale * reference[name] for name in names)

    shared = [np.zeros_like(reference["reconstruction"])]

    def answer_on_device(given: list[Any], half: str) -> list[list[Any]]:
        time.sleep(resident / 1000)
        names = ("reconstruction",) if half == "decode" else tuple(n for n in ("mean", "logvar") if n in reference)
        if fault == "reuse-on-device" and half == "decode":
            shared[0] = reference["reconstruction"] * np.array_equal(given[0], reference["mean"])
            return [shared]
        return [[np.float32(1.2 if fault == "wrong-on-device" else 1) * reference[name]] for name in names]

    return Entrant(
        encode=lambda x: answer(x, tuple(name for name in ("mean", "logvar") if name in reference)),
        decode=lambda z: answer(z, ("reconstruction",)),
        precisions=(precision,),
        engine="planted 1.0",
        configuration=configuration,
        plan={"encode": [{"from_batch": 1, "precision": precision}]},
        resident=None
        if not resident
        else Resident(
            put=lambda array: [array],
            encode=lambda given: answer_on_device(given, "encode"),
            decode=lambda given: answer_on_device(given, "decode"),
            arrays=lambda result: tuple(held[0].copy() for held in result),
        ),
    )
