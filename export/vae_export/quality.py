"""What a precision costs against fp32 on real examples, and the budget for the loss."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vae_runtime.arguments import check_number
from vae_runtime.fidelity import PSNR_BUDGET_DB
from vae_runtime.warning_level import level_outside

NOISE_SEED = 0  # of the one posterior draw per example that -ELBO is measured with, the same in every precision
DIGITS = 6  # of a measured figure in the manifest; errors have two


class ExportWarning(UserWarning):
    """The bundle is written, but may not be what was meant; the message says why. `vae-export` prints it."""


class FewExamplesWarning(ExportWarning):
    """So few examples that measured quality and the fitted prior may not generalise."""


def warn(message: str, category: type[ExportWarning]) -> None:
    """Warn, with the line of whoever called the export."""
    warnings.warn(message, category, stacklevel=level_outside("vae_export", "vae_runtime", "torch"))


@dataclass(frozen=True)
class Budget:
    """How much worse than fp32 a precision may be.

    psnr_db: by how many dB the PSNR of the reconstruction may fall.
    nats_per_dimension: by how many nats per input dimension -ELBO may rise.

    Raises:
        InputError: one of them is no finite number from 0.
    """

    psnr_db: float = PSNR_BUDGET_DB
    nats_per_dimension: float = 0.005

    def __post_init__(self) -> None:
        for name, value in self.to_dict().items():
            object.__setattr__(self, name, check_number(value, f"budget.{name}", least=0))

    def to_dict(self) -> dict[str, float]:
        return {"psnr_db": self.psnr_db, "nats_per_dimension": self.nats_per_dimension}


@dataclass(frozen=True)
class Figures:
    """How well a pair of graphs models the examples.

    psnr_db: of the reconstruction from the posterior's mode, mean over the examples. negative_elbo: nats per input
        dimension, mean over the examples; None where there is no likelihood or no distribution.
    """

    psnr_db: float
    negative_elbo: float | None


@dataclass(frozen=True)
class Measurement:
    """A precision against fp32 on the same examples.

    errors: of mean and logvar, each as `_max_error` (max|Δ|) and `_relative_error` (of max|fp32|), and
        `round_trip_max_error`, of the reconstruction from the posterior's mode, each precision's from its own.
    """

    fp32: Figures
    found: Figures
    errors: Mapping[str, float]
    examples: int

    @property
    def psnr_lost(self) -> float:
        return self.fp32.psnr_db - self.found.psnr_db

    @property
    def nats_lost(self) -> float:
        """In nats per input dimension; 0 where -ELBO is not measured."""
        if self.fp32.negative_elbo is None or self.found.negative_elbo is None:
            return 0.0
        return self.found.negative_elbo - self.fp32.negative_elbo

    @property
    def finite(self) -> bool:
        return all(map(math.isfinite, (self.psnr_lost, self.nats_lost, *self.errors.values())))

    def within(self, budget: Budget) -> bool:
        return self.finite and self.psnr_lost <= budget.psnr_db and self.nats_lost <= budget.nats_per_dimension

    def share(self, budget: Budget) -> float:
        """The larger part of the budget that is used up; negative where nothing is lost, infinite beyond measure."""
        if not self.finite:
            return math.inf
        pairs = [(self.psnr_lost, budget.psnr_db)]
        if self.fp32.negative_elbo is not None:
            pairs.append((self.nats_lost, budget.nats_per_dimension))
        return max(lost / max(allowed, 1e-6) for lost, allowed in pairs)

    def to_dict(self) -> dict[str, Any]:
        """For the manifest's `quality`, rounded; null where a figure is not finite or was not measured."""
        scored = self.fp32.negative_elbo is not None
        figures: dict[str, float | None] = {
            "psnr_db": self.found.psnr_db,
            "fp32_psnr_db": self.fp32.psnr_db,
            "psnr_lost_db": self.psnr_lost,
            "negative_elbo_per_dimension": self.found.negative_elbo,
            "fp32_negative_elbo_per_dimension": self.fp32.negative_elbo,
            "nats_lost_per_dimension": self.nats_lost if scored else None,
            **{name: value for name, value in self.errors.items() if name.endswith("_relative_error")},
        }
        return {
            "examples": self.examples,
            "noise_seed": NOISE_SEED,
            **{
                name: significant(value, DIGITS) if value is not None and math.isfinite(value) else None
                for name, value in figures.items()
            },
        }


def significant(value: float, digits: int) -> float:
    """A figure for the manifest, rounded to so many significant digits: then equal exports give equal bytes."""
    return float(f"{value:.{digits}g}")
