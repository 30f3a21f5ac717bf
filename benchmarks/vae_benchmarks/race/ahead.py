"""What takes long before a race on a GPU and measures nothing: for many competitors at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vae_runtime.tuning import usable_cores

from ..children import at_once
from ..machine import available_bytes
from .case import Case
from .competitors import Competitor
from .process import CompetitorError, Process
from .report import Point

OPEN_TIMEOUT = 1800.0  # seconds: compiling a large network takes minutes
MEMORY_RESERVE = 512 * 2**20  # bytes that stay free beside the competitors
LOADED_BYTES = 2 * 2**30  # that a process with torch and CUDA's libraries may take; 1.2 GB were seen


def compile_ahead(
    starts: Sequence[tuple[Case, Point, Competitor]],
    scratch: str,
    tell: Callable[[str], None],
) -> None:
    """Open those that compile, in processes that are thrown away: what they compiled lies in the folder `scratch`, and
    they open in seconds when their turn comes.

    What compilers choose by trying it out is not kept, as the trials disturbed each other; see `torch_halves`.
    """
    jobs = [start for start in starts if start[-1].compiles]
    count = int(min(usable_cores(), (available_bytes() - MEMORY_RESERVE) / LOADED_BYTES))
    if len(jobs) < 2 or count < 2:
        return
    tell(f"compiling ahead, {count} at once")
    processes: list[Process] = []
    stopped: list[bool] = []

    def compile_one(job: tuple[Case, Point, Competitor]) -> None:
        case, point, one = job
        process = Process(point.threads, None, scratch)
        processes.append(process)
        if stopped:
            process.kill()
        request = {"case": str(case.folder), "module": one.module, "options": one.options}
        try:
            process.ask("open", OPEN_TIMEOUT, **request, batch=point.batch, threads=point.threads, check=False)
        except CompetitorError:
            pass  # whoever cannot run says so when its turn comes
        finally:
            process.kill()

    def stop() -> None:
        stopped.append(True)
        for process in processes:
            process.kill()

    at_once(compile_one, jobs, count, stop)
