"""The two failures that only benchmarking knows; both belong to the family in `vae_runtime.errors`."""

from __future__ import annotations

from vae_runtime.errors import VAEError


class BenchmarkError(VAEError):
    """A measuring process died or did not answer, nobody could be timed, or nothing could be compared."""


class ReportError(VAEError):
    """A file is not a report that `vae-bench` wrote, or of a version that this reader does not know."""
