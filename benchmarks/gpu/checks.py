"""Whether results on the device are right: against the golden values, against the CPU, from many threads, after its
memory was exhausted."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
from findings import Findings, Job

from vae_benchmarks.race.peers.torch_modules import load_modules
from vae_benchmarks.worker import tile
from vae_runtime import VAE, OutOfMemoryError
from vae_runtime.device_array import copy_to_device
from vae_runtime.devices import find_device
from vae_runtime.fidelity import relative_error
from vae_runtime.manifest import INPUT, LOGVAR, MEAN
from vae_runtime.preprocess import Float32

LIMITS = {"fp32": 1e-4, "tf32": 2e-3, "fp16": 5e-3}  # max|Δ| of outputs in [0, 1] from the CPU's in fp32
BATCHES = (1, 2, 7, 32)
WARM = (1, 7)  # of these; the others share the session for any batch size
SEED = 7
THREADS, ROUNDS = 16, 20
MOST_VALUES = 32 * 3 * 128 * 128  # of one input, where 16 calls run at once
GPU_LIMIT_BYTES = 2**30  # for everything that a session takes
BUSY_SIDE, BUSY_PRODUCTS = 8192, 20  # half a second of matrix products, or less
LEFT_BYTES = 2**31  # of a GPU that is filled up otherwise


def golden(findings: Findings, job: Job) -> None:
    """`VAE.selftest` in every precision."""
    for precision in findings.precisions(job):
        with findings.guard(precision), VAE.load(job.case.bundle, job.device, precision) as vae:
            for route in vae.selftest().routes:
                for tensor, error in route.errors.items():
                    findings.check(f"{precision} {route.operation} {tensor}", error, route.tolerance)


def fidelity(findings: Findings, job: Job) -> None:
    """Every precision against the CPU's fp32, before and after `warmup`, which takes other kernels. Where the case has
    torch's modules, also what torch itself is off by in the same precision on the device: how much is arithmetic's."""
    x = job.case.reference()[INPUT]
    with VAE.load(job.case.bundle) as cpu:
        mean = cpu.encode(x).mean
        known = {"decode": cpu.decode(mean), "reconstruct": cpu.reconstruct(x)}
    for precision in findings.precisions(job):
        with findings.guard(precision), VAE.load(job.case.bundle, job.device, precision) as vae:
            for state in ("cold", "warm"):
                if state == "warm":
                    vae.warmup([len(x)])
                for name, found in {"decode": vae.decode(mean), "reconstruct": vae.reconstruct(x)}.items():
                    findings.check(f"{precision} {state} {name}", error_of(found, known[name], job), LIMITS[precision])
                findings.figure(f"{precision} {state} mean", relative_error(vae.encode(x).mean, mean))
    torch, reason = import_torch(job)
    if torch is None or job.case.torch is None:
        findings.skip("torch's own", reason or "the bundle alone has no torch modules")
        return
    with findings.guard("torch's own"):
        own = {precision: torch_results(job, torch, precision, x, mean) for precision in findings.precisions(job)}
        findings.figure(
            "torch",
            {
                precision: {name: error_of(array, known[name], job) for name, array in found.items()}
                for precision, found in own.items()
            },
        )


def torch_results(job: Job, torch: Any, precision: str, x: Float32, mean: Float32) -> dict[str, Float32]:
    """Of the case's own modules on the device, eager, in the precision as the race has it."""
    encoder, decoder, place = torch_halves(job, torch, precision)
    with torch.inference_mode():
        latents = encoder(torch.from_numpy(x).to(**place))
        latents = latents[0] if isinstance(latents, tuple) else latents
        given = {"decode": torch.from_numpy(mean).to(**place), "reconstruct": latents}
        return {name: decoder(array).float().cpu().numpy() for name, array in given.items()}


def torch_halves(job: Job, torch: Any, precision: str) -> tuple[Any, Any, dict[str, Any]]:
    """The case's encoder and decoder, and where and as what their tensors have to be."""
    assert job.case.torch is not None
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    place: dict[str, Any] = {
        "device": job.device.replace("tensorrt", "cuda"),
        "dtype": torch.float16 if precision == "fp16" else torch.float32,
    }
    encoder, decoder = (half.to(**place) for half in load_modules(job.case.torch, job.case.facts.name))
    return encoder, decoder, place


def calls(findings: Findings, job: Job) -> None:
    """Every operation at several batch sizes, cold and warm, from host and from device memory, against the CPU."""
    reference = job.case.reference()[INPUT]
    with VAE.load(job.case.bundle) as cpu:
        expected = {batch: results_on_host(cpu, tile(reference, batch)) for batch in BATCHES}
    with VAE.load(job.case.bundle, job.device) as vae:
        for state in ("cold", "warm"):
            if state == "warm":
                vae.warmup(BATCHES)
            for batch in BATCHES:
                name, x = f"{state} batch {batch}", tile(reference, batch)
                compare_every_way(findings, job, name, vae, x, expected[batch])
                compare_repeated(findings, f"{name} repeats", vae, x)
        exchange(findings, job, vae, tile(reference, 7), expected[7])


def compare_every_way(
    findings: Findings, job: Job, name: str, vae: VAE, x: Float32, expected: dict[str, Float32]
) -> None:
    """From host arrays and from arrays on the device to either."""
    ways: dict[str, Callable[[], dict[str, Float32]]] = {
        "host": partial(results_on_host, vae, x),
        "device": partial(results_on_device, vae, x, expected["mean"]),
        "host to device": partial(results_from_host, vae, x, expected["mean"]),
    }
    for place, results in ways.items():
        with findings.guard(f"{name} {place}"):
            compare(findings, job, f"{name} {place}", results(), expected)


def compare_repeated(findings: Findings, name: str, vae: VAE, x: Float32) -> None:
    """The same calls once more, and again: bit for bit the same."""
    with findings.guard(name):
        first, *others = (list(results_on_host(vae, x).values()) for _ in range(3))
        findings.equal(name, [array for other in others for array in other], first * 2)


def results_on_host(vae: VAE, x: Float32) -> dict[str, Float32]:
    posterior = vae.encode(x)
    found = {"mean": posterior.mean, "decode": vae.decode(posterior.mean), "reconstruct": vae.reconstruct(x)}
    if posterior.logvar is not None:
        found |= {"logvar": posterior.logvar, "sample": vae.sample(len(x), seed=SEED)}
    return found


def results_on_device(vae: VAE, x: Float32, mean: Float32) -> dict[str, Float32]:
    """The same from arrays that are on the device already; they do not come back in between."""
    device = find_device(vae.device)
    posterior = vae.encode_to_device(copy_to_device(x, device))
    found = {
        "mean": posterior.mean.numpy(),
        "decode": vae.decode_to_device(copy_to_device(mean, device)).numpy(),
        "reconstruct": vae.decode_to_device(posterior.mean).numpy(),
    }
    return found if posterior.logvar is None else {**found, "logvar": posterior.logvar.numpy()}


def results_from_host(vae: VAE, x: Float32, mean: Float32) -> dict[str, Float32]:
    return {"mean": vae.encode_to_device(x).mean.numpy(), "decode": vae.decode_to_device(mean).numpy()}


def compare(findings: Findings, job: Job, name: str, found: dict[str, Float32], expected: dict[str, Float32]) -> None:
    """Every array of `found` with its like, in fp32."""
    for tensor, array in found.items():
        if array.dtype != np.float32 or array.shape != expected[tensor].shape:
            findings.verdict(f"{name} {tensor}", False, f"it is {array.dtype} {array.shape}")
        elif tensor in (MEAN, LOGVAR):
            tolerance = job.case.manifest.golden.tolerance["fp32"]
            findings.check(f"{name} {tensor}", relative_error(array, expected[tensor]), tolerance)
        else:
            findings.check(f"{name} {tensor}", error_of(array, expected[tensor], job), LIMITS["fp32"])


def error_of(found: Float32, expected: Float32, job: Job) -> float:
    return float(np.abs(found - expected).max()) / job.scale


def exchange(findings: Findings, job: Job, vae: VAE, x: Float32, expected: dict[str, Float32]) -> None:
    """Arrays of torch in, arrays for torch out, without a copy."""
    torch, reason = import_torch(job)
    if torch is None:
        findings.skip("torch", reason)
        return
    with findings.guard("torch"):
        given = torch.from_numpy(x.copy()).to(torch_device(vae))
        mean = vae.encode_to_device(given).mean
        shared = torch.from_dlpack(mean)
        compare(findings, job, "torch in", {"mean": mean.numpy()}, expected)
        compare(findings, job, "torch out", {"mean": shared.cpu().numpy()}, expected)
        compare(findings, job, "torch in", {"decode": vae.decode_to_device(shared.clone()).numpy()}, expected)
        shared += 1
        findings.equal("torch shares the memory", [mean.numpy()], [shared.cpu().numpy()])
        kept = shared.clone()
        del mean
        for _ in range(5):
            vae.encode_to_device(given)
        findings.equal("torch keeps the memory", [shared.cpu().numpy()], [kept.cpu().numpy()])
    if not job.is_gpu:
        findings.skip("torch on another stream", "the CPU has no streams")
        return
    with findings.guard("torch on another stream"):
        compare(findings, job, "torch on another stream", {"mean": encode_late(torch, vae, given)}, expected)


def encode_late(torch: Any, vae: VAE, given: Any) -> Float32:
    """The means of a tensor whose values are there only after long work on a stream that is not the default one."""
    with torch.cuda.stream(torch.cuda.Stream(given.device)):
        busy = torch.ones(BUSY_SIDE, BUSY_SIDE, device=given.device)
        for _ in range(BUSY_PRODUCTS):
            busy = busy @ busy / BUSY_SIDE  # of ones: ones again
        late = torch.zeros_like(given)
        late.copy_(given * busy[0, 0])
        return vae.encode_to_device(late).mean.numpy()


def torch_device(vae: VAE) -> str:
    return vae.device.replace("tensorrt", "cuda")


def import_torch(job: Job) -> tuple[Any, str]:
    """torch where it can use the device, or why it cannot."""
    try:
        import torch
    except ImportError:
        return None, "torch is not installed"
    if job.is_gpu and not torch.cuda.is_available():
        return None, f"torch {torch.__version__} sees no GPU"
    return torch, ""


def concurrency(findings: Findings, job: Job) -> None:
    """16 threads on one `VAE` with mixed batch sizes: bit for bit what each call gives alone. Alone in a thread like
    them: what the one that warmed up runs may take other kernels, see `fidelity`."""
    reference = job.case.reference()[INPUT]
    batches = [batch for batch in BATCHES if batch * reference[0].size <= MOST_VALUES]
    warm = [batch for batch in WARM if batch in batches]
    with VAE.load(job.case.bundle, job.device) as vae:
        for state in ("cold", "warm", "beside others that come and go"):
            with findings.guard(state):
                if state == "warm":
                    vae.warmup(warm)
                calls: dict[str, Callable[[], Float32]] = {}
                for batch in batches:
                    x = tile(reference, batch)
                    mean = vae.encode(x).mean
                    calls[f"encode {batch}"] = partial(encode_mean, vae, x)
                    calls[f"decode {batch}"] = partial(vae.decode, mean)
                    calls[f"reconstruct {batch}"] = partial(vae.reconstruct, x)
                with meanwhile(partial(use_another, job, warm[:1])) if state.startswith("beside") else nullcontext():
                    count, differing = run_threads(calls, 2 if job.quick else ROUNDS)
                text = f"{len(differing)} of {count} calls differ: {', '.join(sorted(set(differing)))}"
                findings.verdict(
                    f"{state}: {count} calls by {THREADS} threads", not differing, text if differing else ""
                )


def use_another(job: Job, batches: list[int]) -> None:
    """Another `VAE` of the bundle, from beginning to end."""
    with VAE.load(job.case.bundle, job.device) as other:
        other.warmup(batches)
        other.reconstruct(job.case.reference()[INPUT])


@contextmanager
def meanwhile(work: Callable[[], None]) -> Iterator[None]:
    """A thread does this again and again, at least once; what fails there is raised at the end."""
    ended = threading.Event()

    def repeat() -> None:
        work()
        while not ended.is_set():
            work()

    with ThreadPoolExecutor(1) as pool:
        repeated = pool.submit(repeat)
        try:
            yield
        finally:
            ended.set()
        repeated.result()


def encode_mean(vae: VAE, x: Float32) -> Float32:
    return vae.encode(x).mean


def run_threads(calls: dict[str, Callable[[], Float32]], rounds: int) -> tuple[int, list[str]]:
    """Every thread makes every call `rounds` times, each in an order of its own -> how many calls, and which gave
    something else than they do alone."""
    with ThreadPoolExecutor(1) as pool:
        alone = {name: [pool.submit(call).result() for _ in range(2)][-1] for name, call in calls.items()}
    barrier = threading.Barrier(THREADS)

    def work(seed: int) -> list[str]:
        rng = np.random.default_rng(seed)
        barrier.wait()
        names = [str(name) for _ in range(rounds) for name in rng.permutation(list(calls))]
        return [name for name in names if not np.array_equal(calls[name](), alone[name])]

    with ThreadPoolExecutor(THREADS) as pool:
        differing = [name for names in pool.map(work, range(THREADS)) for name in names]
    return THREADS * rounds * len(calls), differing


def memory(findings: Findings, job: Job) -> None:
    """Too many examples for the device's memory are refused as that, and the next call works."""
    if not job.is_gpu:
        findings.skip("memory", "the CPU has no memory of its own, and no limit for it")
        return
    with findings.guard("gpu_mem_limit"):
        options = {"gpu_mem_limit": str(GPU_LIMIT_BYTES)}
        with VAE.load(job.case.bundle, job.device, provider_options=options) as vae:
            run_out(findings, job, "gpu_mem_limit", vae, 2 * GPU_LIMIT_BYTES)
    torch, reason = import_torch(job)
    if torch is None:
        findings.skip("a full GPU", reason)
        return
    with findings.guard("a full GPU"), VAE.load(job.case.bundle, job.device) as vae:
        vae.reconstruct(job.case.reference()[INPUT][:1])
        free, _ = torch.cuda.mem_get_info(torch_device(vae))
        ballast = torch.empty(max(0, free - LEFT_BYTES), dtype=torch.uint8, device=torch_device(vae))
        run_out(findings, job, "a full GPU", vae, 2 * LEFT_BYTES)
        del ballast
        torch.cuda.empty_cache()


def run_out(findings: Findings, job: Job, name: str, vae: VAE, size: int) -> None:
    """Calls whose inputs or outputs alone take `size` bytes, then small ones."""
    x = job.case.reference()[INPUT][:2]
    mean = vae.encode(x).mean
    expected = {"encode": mean, "decode": vae.decode(mean)}
    count = size // x[0].nbytes + 1
    calls: dict[str, tuple[Callable[..., Any], Float32]] = {"encode": (vae.encode, x), "decode": (vae.decode, mean)}
    for operation, (call, example) in calls.items():
        try:
            call(np.zeros((count, *example.shape[1:]), np.float32), batch_size=count)
        except OutOfMemoryError as error:
            findings.verdict(f"{name}: {operation} {count}", True, str(error))
        except Exception as error:
            findings.verdict(f"{name}: {operation} {count}", False, f"{type(error).__name__}: {error}")
        else:
            findings.verdict(f"{name}: {operation} {count}", False, "all of it fitted")
        with findings.guard(f"{name}: the next {operation}"):
            result = call(example)
            found = result.mean if operation == "encode" else result
            findings.check(f"{name}: the next {operation}", relative_error(found, expected[operation]), LIMITS["fp32"])
