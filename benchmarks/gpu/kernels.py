"""Which kernels a call runs on the GPU and for how long, beside those of torch: where the time goes, and why."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from checks import import_torch, torch_halves
from findings import Findings, Job

from vae_benchmarks.worker import tile
from vae_runtime import VAE
from vae_runtime.device_array import copy_to_device
from vae_runtime.devices import find_device
from vae_runtime.manifest import INPUT
from vae_runtime.preprocess import Float32

BATCHES = (1, 32)
CALLS, WARM_CALLS = 10, 5
SHOWN = 12  # kernels of a call, those that take longest
NAME_LENGTH = 100  # of a kernel's; templates make them far longer


def kernels(findings: Findings, job: Job) -> None:
    """By torch's profiler, which sees all of the process, also within a CUDA graph: calls for arrays on the device, and
    the same of the case's torch modules, eager, with cuDNN's benchmark mode. On the CPU it sees torch's operators
    alone, which only tries the step."""
    torch, reason = import_torch(job)
    if torch is None:
        findings.skip("kernels", reason)
        return
    x, rows = job.case.reference()[INPUT], []
    for precision in findings.precisions(job):
        for batch in (2,) if job.quick else BATCHES:
            with findings.guard(f"{precision} {batch}"), VAE.load(job.case.bundle, job.device, precision) as vae:
                for (engine, operation), call in calls_of(job, torch, vae, precision, tile(x, batch)).items():
                    what = {"precision": precision, "operation": operation, "batch": batch, "engine": engine}
                    rows += [{**what, **row} for row in profile(torch, call, job.is_gpu)]
            findings.figure("kernels", rows)  # each time: what there is when a part's time is over is kept
    if job.case.torch is None:
        findings.skip("torch's kernels", "the bundle alone has no torch modules")


def calls_of(job: Job, torch: Any, vae: VAE, precision: str, x: Float32) -> dict[tuple[str, str], Callable[[], object]]:
    """By engine and operation."""
    vae.warmup([len(x)])
    mean, device = vae.encode(x).mean, find_device(vae.device)
    calls: dict[tuple[str, str], Callable[[], object]] = {
        ("vae_runtime", "encode"): partial(vae.encode_to_device, copy_to_device(x, device)),
        ("vae_runtime", "decode"): partial(vae.decode_to_device, copy_to_device(mean, device)),
    }
    if job.case.torch is not None:
        torch.backends.cudnn.benchmark = True
        encoder, decoder, place = torch_halves(job, torch, precision)
        calls["torch", "encode"] = partial(run, torch, encoder, torch.from_numpy(x).to(**place))
        calls["torch", "decode"] = partial(run, torch, decoder, torch.from_numpy(mean).to(**place))
    return calls


def run(torch: Any, module: Callable[[Any], Any], given: Any) -> Any:
    with torch.inference_mode():
        return module(given)


def profile(torch: Any, call: Callable[[], object], is_gpu: bool) -> list[dict[str, Any]]:
    """The sum of all, then the longest: name, launches and microseconds of one call."""
    activity = torch.profiler.ProfilerActivity.CUDA if is_gpu else torch.profiler.ProfilerActivity.CPU
    for _ in range(WARM_CALLS):
        call()
    with torch.profiler.profile(activities=[activity]) as profiler:
        for _ in range(CALLS):
            call()
        if is_gpu:
            torch.cuda.synchronize()
    time = "self_device_time_total" if is_gpu else "self_cpu_time_total"
    found = [(entry.key, entry.count / CALLS, getattr(entry, time) / CALLS) for entry in profiler.key_averages()]
    found = sorted((one for one in found if one[2] > 0), key=lambda one: -one[2])
    total = ("all", sum(one[1] for one in found), sum(one[2] for one in found))
    return [
        {"kernel": name[:NAME_LENGTH], "launches": launches, "microseconds": microseconds}
        for name, launches, microseconds in [total, *found[:SHOWN]]
    ]
