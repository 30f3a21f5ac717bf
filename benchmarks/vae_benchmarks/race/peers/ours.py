"""vae-edge itself, as an application uses it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from vae_runtime import VAE
from vae_runtime.cuda import why_not_cuda
from vae_runtime.device_array import DeviceArray, copy_to_device
from vae_runtime.devices import PROVIDER_PRECISIONS, find_device
from vae_runtime.engine import import_engine
from vae_runtime.errors import DeviceError
from vae_runtime.posterior import Posterior
from vae_runtime.preprocess import Float32
from vae_runtime.vae import DevicePosterior

from ..case import Case
from ..entrant import TOLERANCES, CannotRunError, Entrant, Resident


def load(device: str, **options: Any) -> None:
    """Import onnxruntime and load CUDA's libraries. options: the others of `open_entrant`."""
    with contextlib.suppress(DeviceError):  # which `open_entrant` will raise
        find_device(device)


def open_entrant(case: Case, batch: int, threads: int, device: str, precision: str, resident: bool = False) -> Entrant:
    """`VAE.load`, `VAE.warmup` for the batch size, and the public `encode` and `decode` with all their input checks.

    The thread count is given, nothing else; "auto" takes what `vae-run tune` found on this machine, where it was run.
    resident: also `encode_to_device` and `decode_to_device`, whose input is on the device already.
    """
    if device == "cuda" and (reason := why_not_cuda()) is not None:
        raise CannotRunError(reason)
    if precision in case.manifest.refused:
        raise CannotRunError(f"the export refused {precision}: {case.manifest.refused[precision]['reason']}")
    if precision not in ("auto", *case.manifest.precisions, *PROVIDER_PRECISIONS):
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
        resident=_resident(vae, device, precision) if resident else None,
    )


def _resident(vae: VAE, device: str, precision: str) -> Resident:
    place = find_device(device, precision)
    return Resident(
        put=lambda array: copy_to_device(array, place),
        encode=vae.encode_to_device,
        decode=vae.decode_to_device,
        arrays=_device_arrays,
    )


def _device_arrays(result: DevicePosterior | DeviceArray) -> tuple[Float32, ...]:
    parts = (result,) if isinstance(result, DeviceArray) else result
    return tuple(part.numpy() for part in parts if part is not None)


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
