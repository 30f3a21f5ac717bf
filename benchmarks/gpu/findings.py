"""What a step is asked, and how it tells what it found: line by line, so that a crash loses nothing of it."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

import numpy as np

from vae_benchmarks.race import Case
from vae_runtime.fidelity import data_range
from vae_runtime.manifest import INPUT

PRECISIONS = ("fp32", "tf32", "fp16")  # those of GPUs


@dataclass(frozen=True)
class Job:
    """quick: only as much as shows that the step itself works. rounds: of vae-bench. budget: seconds of a race."""

    device: str
    case: Case
    quick: bool
    rounds: int = 6
    budget: float = 60.0

    @property
    def is_gpu(self) -> bool:
        return self.device != "cpu"

    @property
    def is_cuda(self) -> bool:
        """Whether it runs by onnxruntime's CUDA provider."""
        return self.device.split(":")[0] == "cuda"

    @property
    def scale(self) -> float:
        """What errors of reconstructions are relative to: 1 for images in [0, 1], the range of vectors."""
        return data_range(self.case.reference()[INPUT], self.case.manifest.input.is_image)

    def why_not(self, precision: str) -> str | None:
        """Why a precision cannot be had, as far as that is known beforehand."""
        precisions, refused = self.case.manifest.precisions, self.case.manifest.refused
        if precision in refused:
            return f"the export refused it: {refused[precision]['reason']}"
        if precision == "tf32":
            return None if self.is_gpu else "tf32 is arithmetic of NVIDIA GPUs, which the CPU has not"
        if precision not in precisions:
            return f"the bundle has no {precision}; it has {', '.join(sorted(precisions))}"
        return None


class Findings:
    """Writes one JSON object per line to `stream`."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def check(self, name: str, found: float, limit: float) -> None:
        """An error, which is to be at most `limit`; NaN is not."""
        passed = bool(found <= limit)
        text = "" if math.isfinite(found) else str(found)  # JSON has no NaN
        self._write(check=name, passed=passed, found=None if text else float(found), limit=limit, text=text)

    def verdict(self, name: str, passed: bool, text: str = "") -> None:
        """Something that holds or not; `text` says more."""
        self._write(check=name, passed=bool(passed), found=None, limit=None, text=text)

    def equal(self, name: str, found: Any, expected: Any) -> None:
        """Two lists of arrays, which are to be the same bit for bit."""
        differ = [index for index, pair in enumerate(zip(found, expected, strict=True)) if not np.array_equal(*pair)]
        self.verdict(name, not differ, f"{len(differ)} of {len(expected)} arrays differ" if differ else "")

    def skip(self, name: str, reason: str) -> None:
        self._write(skipped=name, reason=reason)

    def figure(self, name: str, value: Any) -> None:
        """Whatever the report shows; plain JSON values."""
        self._write(figure=name, value=value)

    @contextlib.contextmanager
    def guard(self, name: str) -> Iterator[None]:
        """What fails in here fails the check `name`, and the step goes on."""
        try:
            yield
        except Exception as error:
            self.verdict(name, False, f"{type(error).__name__}: {error}")

    def precisions(self, job: Job) -> Iterator[str]:
        """Those of the bundle and the device; the others are skipped by name."""
        for precision in PRECISIONS:
            if (reason := job.why_not(precision)) is None:
                yield precision
            else:
                self.skip(precision, reason)

    def done(self) -> None:
        """The last line: the step came to its end."""
        self._write(done=True)

    def _write(self, **line: Any) -> None:
        self._stream.write(json.dumps(line, allow_nan=False) + "\n")
        self._stream.flush()
