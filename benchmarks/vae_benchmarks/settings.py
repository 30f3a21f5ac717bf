"""What is measured and how long: one checked description that the report repeats."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from vae_runtime.arguments import as_float, check_choice, check_count, check_threads
from vae_runtime.errors import InputError

OPERATIONS = ("encode", "sample", "decode", "reconstruct", "score")
TAKE_INPUTS = frozenset({"encode", "reconstruct", "score"})  # decode takes latents, sample nothing
INPUTS = ("float32", "uint8")
LARGEST_BATCH = 65536
LARGEST_SIDE = 65536
MOST_ROUNDS = 100


@dataclass(frozen=True)
class Settings:
    """Every combination of operations, batches, inputs and threads is one row of the report.

    inputs: the dtypes in which operations that take inputs get them; "uint8" is for images alone.
    threads: of one call on the CPU; None is onnxruntime's own choice, all cores.
    device, precision: as `VAE.load` takes them.
    seconds: the most time that one row is measured for, all rounds together, warm-up not counted.
    rounds: how many fresh processes measure each row, one after the other. From 6 on, the interval of the median can
        be taken from the rounds' medians; from 9 on, its ends at 95% are not the fastest and the slowest round, so that
        a single disturbed one does not spoil a row. 9 leave `compare` room for 1,200 rows.
    confidence: of every interval, 0.95 for 95%.
    width: measuring a row may stop once the interval of its median is narrower than this, relative to the median.
    size: (height, width) of the images, where the bundle leaves it free; None: the bundle's own default.
    split: whether to time the parts of encode and decode too: the way to the device, the work there, the way back. None
        does so on GPUs.
    """

    operations: tuple[str, ...] = OPERATIONS
    batches: tuple[int, ...] = (1, 8, 32)
    threads: tuple[int | None, ...] = (1, None)
    device: str = "cpu"
    precision: str = "fp32"
    seconds: float = 1.0
    rounds: int = 9
    confidence: float = 0.95
    width: float = 0.05
    split: bool | None = None
    size: tuple[int, ...] | None = None
    inputs: tuple[str, ...] = ("float32",)

    def __post_init__(self) -> None:
        for name in ("operations", "batches", "threads", "inputs"):
            given = getattr(self, name)
            if not isinstance(given, (tuple, list)) or not given:
                raise InputError(f"{name} is {given!r}; expected at least one, in a tuple")
            self._set(name, tuple(dict.fromkeys(given)))
        for operation in self.operations:
            check_choice(operation, "operation", OPERATIONS)
        for dtype in self.inputs:
            check_choice(dtype, "input", INPUTS)
        self._set("batches", tuple(check_count(batch, "batch", most=LARGEST_BATCH) for batch in self.batches))
        self._set("threads", tuple(check_threads(threads) for threads in self.threads))
        if self.size is not None:
            self._set("size", tuple(self.size))
            if len(self.size) != 2:
                raise InputError(f"size is {self.size!r}; expected height and width")
            self._set("size", tuple(check_count(side, "a side of size", most=LARGEST_SIDE) for side in self.size))
        self._set("rounds", check_count(self.rounds, "rounds", most=MOST_ROUNDS))
        check_between(self.seconds, "seconds", 0, 86400)
        check_between(self.confidence, "confidence", 0.5, 1)
        check_between(self.width, "width", 0, 1)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def rows(self) -> list[tuple[str, int, str | None]]:
        """Operation, batch and the inputs' dtype, None where it takes none, of every row at one thread count."""
        return [
            (operation, batch, dtype)
            for operation in self.operations
            for batch in self.batches
            for dtype in (self.inputs if operation in TAKE_INPUTS else (None,))
        ]

    def without(self, operation: str) -> Settings:
        """The same settings without one operation."""
        return dataclasses.replace(self, operations=tuple(name for name in self.operations if name != operation))


def check_between(value: object, name: str, low: float, high: float) -> None:
    """Raise `InputError` unless `value` is a number between `low` and `high`, both excluded."""
    if not low < as_float(value) < high:
        raise InputError(f"{name} is {value!r}; expected a number between {low:g} and {high:g}, both excluded")
