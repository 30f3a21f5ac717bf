"""Which precisions are asked for beside fp32, the examples that judge them, and what was made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vae_runtime.errors import InputError
from vae_runtime.manifest import PRECISIONS, Precision
from vae_runtime.preprocess import Float32

from .quality import Budget, FewExamplesWarning, warn

FEW_EXAMPLES = 32


@dataclass(frozen=True)
class Wanted:
    """What is asked for.

    names: precisions beside fp32. keep: write what misses the budget too, marked. activation_examples, held_out: as the
        encoder takes them; the former give the ranges of activations, the latter measure a precision's quality, which
        also decides how many layers of int8 stay in fp32.
    """

    names: tuple[str, ...]
    budget: Budget
    keep: bool
    activation_examples: Float32
    held_out: Float32


@dataclass
class Made:
    """What was made: manifest entries, ONNX files, golden tolerances, and the reasons for what was refused.

    on_cuda: as in the manifest.
    """

    precisions: dict[str, Precision] = field(default_factory=dict)
    graphs: dict[str, bytes] = field(default_factory=dict)
    tolerance: dict[str, float] = field(default_factory=dict)
    refused: dict[str, dict[str, Any]] = field(default_factory=dict)
    on_cuda: dict[str, str] = field(default_factory=dict)


def check_wanted(
    precisions: Sequence[str], budget: Budget, keep: bool, x: Float32, parts: tuple[Float32, Float32] | None = None
) -> Wanted:
    """What the caller asked for, checked.

    x: all examples, whose even rows calibrate and odd rows measure, unless `parts` has both.

    Raises:
        InputError: another precision, no `Budget`, fewer than two examples.
    """
    if isinstance(precisions, str) or not isinstance(precisions, Sequence):
        raise InputError(f"precisions is {precisions!r}; expected a list of names, for example ['fp32', 'int8']")
    for name in precisions:
        if name not in PRECISIONS:
            raise InputError(f"precisions has {name!r}; expected some of {', '.join(PRECISIONS)}")
    if not isinstance(budget, Budget):
        raise InputError(f"budget is {budget!r}; expected a vae_export.Budget")
    names = tuple(name for name in PRECISIONS if name in precisions and name != "fp32")
    if not names:
        return Wanted((), budget, keep, x, x)
    activation_examples, held_out = parts or (x[::2], x[1::2])
    fewest = min(len(activation_examples), len(held_out))
    if not fewest:
        raise InputError(
            f"examples has {len(x)} row(s); a precision beside fp32 is calibrated on one and measured on one"
        )
    if fewest < FEW_EXAMPLES:
        warn(
            f"{names[0]} is calibrated on {len(activation_examples)} and measured on {len(held_out)} examples;"
            f" with fewer than {FEW_EXAMPLES} of each its quality on others is a guess",
            FewExamplesWarning,
        )
    return Wanted(names, budget, keep, activation_examples, held_out)
