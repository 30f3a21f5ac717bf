"""vae-edge itself, as an application uses it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vae_runtime import VAE
from vae_runtime.engine import import_engine
from vae_runtime.posterior import Posterior
from vae_runtime.preprocess import Float32

from ..case import Case
from ..entrant import TOLERANCES, CannotRunError, Entrant


def open_entrant(case: Case, batch: int, threads: int, device: str, precision: str) -> Entrant:
    """`VAE.load`, `VAE.warmup` for the batch size, and the public `encode` and `decode` with all their input checks.

    The thread count is given, nothing else; "auto" takes what `vae-run tune` found on this machine, where it was run.
    """
    if precision not in ("auto", *case.manifest.precisions):
        raise CannotRunError(f"the bundle has no {precision}, it has {', '.join(sorted(case.manifest.precisions))}")
    vae = VAE.load(case.bundle, device=device, precision=precision, threads=threads)
    vae.warmup([batch])
    used = {str(name) for name in _values(vae.plan, "precision")} & TOLERANCES.keys()
    return Entrant(
        encode=vae.encode,
        decode=vae.decode,
        precisions=tuple(sorted(used)) or (vae.precision,),
        engine=f"vae-edge on onnxruntime {import_engine().__version__}",
        configuration=f"device={device!r}, precision={precision!r}, threads={threads}, warmup([{batch}])",
        arrays=_arrays,
        plan=vae.plan,
    )


def _arrays(result: Posterior | Float32) -> tuple[Float32, ...]:
    if isinstance(result, Posterior):
        return (result.mean,) if result.logvar is None else (result.mean, result.logvar)
    return (result,)


def _values(plan: Any, key: str) -> Iterator[Any]:
    """Every value under `key`, at any depth: a plan may be one entry per operation, or one per range of batch sizes."""
    for name, value in plan.items() if isinstance(plan, dict) else enumerate(plan):
        if name == key:
            yield value
        elif isinstance(value, (dict, list, tuple)):
            yield from _values(value, key)
