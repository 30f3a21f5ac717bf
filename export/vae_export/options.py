"""What all ways of exporting take alike, as the caller gives it and as it is found good; `export_bundle` says more."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

from vae_runtime.arguments import check_flag, check_number, check_progress
from vae_runtime.errors import InputError
from vae_runtime.tiling import Progress

from .bundle import check_output
from .quality import Budget

DEFAULT_BUDGET = Budget()


class ExportOptions(TypedDict, total=False):
    """Each as of `export_bundle`, which has the defaults."""

    precisions: Sequence[str]
    budget: Budget
    keep: bool
    prior: str | None
    calibrate_tile: int | None
    scores: Sequence[str] | None
    progress: Progress | None
    force: bool


@dataclass(frozen=True, kw_only=True)
class Options:
    """`ExportOptions`, and what each way of exporting has its own default for.

    Raises:
        InputError: one of them breaks a rule that asks for no data. OutputError: as `check_output`.
    """

    path: str | os.PathLike[str]
    name: str
    golden: str
    tolerance: float
    precisions: Sequence[str] = ("fp32",)
    budget: Budget = DEFAULT_BUDGET
    keep: bool = False
    prior: str | None = None
    calibrate_tile: int | None = None
    scores: Sequence[str] | None = None
    progress: Progress | None = None
    force: bool = False

    def __post_init__(self) -> None:
        check_output(self.path, check_flag(self.force, "force"))
        if not isinstance(self.name, str) or not self.name:
            raise InputError(f"name is {self.name!r}; expected a string that is not empty")
        object.__setattr__(self, "tolerance", check_number(self.tolerance, "tolerance", above=0))
        check_flag(self.keep, "keep")
        check_progress(self.progress)
