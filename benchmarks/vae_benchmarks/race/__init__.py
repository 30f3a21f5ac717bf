"""Race a bundle against other engines on the same weights: `vae-bench race`.

from vae_benchmarks.race import RaceSettings, race

report = race(["cases/mlp"], RaceSettings(budget=60))
report.save("race.json")
"""

from .case import Case, CaseError, CaseFacts
from .competitors import COMPETITORS, Competitor
from .report import CaseResult, Point, PointResult, RaceReport, RaceSettings, Ratio, Row, Runner, merge
from .running import race

__all__ = [
    "COMPETITORS",
    "Case",
    "CaseError",
    "CaseFacts",
    "CaseResult",
    "Competitor",
    "Point",
    "PointResult",
    "RaceReport",
    "RaceSettings",
    "Ratio",
    "Row",
    "Runner",
    "merge",
    "race",
]
