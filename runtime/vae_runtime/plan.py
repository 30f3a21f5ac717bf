"""Which file runs each half of a bundle, on which device and in which precision, and the sessions that do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from .arguments import check_choice
from .boundary import Boundary, decoder_boundary, encoder_boundary
from .bundle import Bundle
from .cuda import CUDA
from .devices import ALL_PRECISIONS, PROVIDER_PRECISIONS, Device, find_device
from .errors import BundleError, DeviceError, InputError
from .latents import to_decoder_input
from .manifest import Manifest
from .operation import Operation, Route
from .preprocess import FINITE, UNIT_INTERVAL, channels_first, to_model_input
from .session import GraphSession

OPERATIONS = ("encode", "decode")  # one for each half of a bundle


class Candidate(NamedTuple):
    """What a half may run on. threads, spinning: as `GraphSession` takes them."""

    device: str
    precision: str
    threads: int | None = None
    spinning: bool | None = None


# By operation: from how many examples on which candidate runs.
Plan = Mapping[str, list[tuple[int, Candidate]]]


def same_plan(candidate: Candidate) -> Plan:
    """One candidate for both halves and every batch size."""
    return {name: [(1, candidate)] for name in OPERATIONS}


def tuned_plan(
    bundle: Bundle, device: str, precision: str, threads: int | None, options: Mapping[str, str] | None
) -> Plan:
    """What was measured fastest; where nothing was, or it is not to be had now, the stated rules."""
    from .tuning import choose, read_tuning  # late: only "auto" needs it

    by_rule = Candidate(
        find_device(device, precision, options).name, "fp32" if precision == "auto" else precision, threads
    )
    measured = [] if options else [one for one in read_tuning(bundle.digest) if _can_run(bundle, one.candidate)]
    plan = {
        name: choose(measured, name, by_rule.device if device != "auto" else device, precision, threads)
        for name in OPERATIONS
    }
    return plan if all(plan.values()) else same_plan(by_rule)


def _can_run(bundle: Bundle, candidate: Candidate) -> bool:
    if candidate.precision not in {*bundle.manifest.precisions, *PROVIDER_PRECISIONS}:
        return False
    try:
        find_device(candidate.device, candidate.precision)
    except (DeviceError, InputError):
        return False
    return True


def check_precision(asked: Any, manifest: Manifest) -> None:
    """Raise `InputError` for no name of a precision, `DeviceError` for one that the bundle lacks."""
    check_choice(asked, "precision", (*ALL_PRECISIONS, "auto"))
    if asked in manifest.refused:
        raise DeviceError(f"precision {asked!r} is not in {manifest.name}: {manifest.refused[asked]['reason']}")
    if asked not in (*manifest.precisions, *PROVIDER_PRECISIONS, "auto"):
        raise DeviceError(
            f"precision {asked!r} is not in {manifest.name}, which has {', '.join(sorted(manifest.precisions))}"
        )


def _file_of(manifest: Manifest, operation: str, precision: str) -> tuple[str, str]:
    """The file that runs an operation in a precision, and the precision that it really has: fp32 for a half that has no
    file of its own."""
    reference = manifest.precisions["fp32"]
    by_provider = precision in PROVIDER_PRECISIONS
    files = manifest.precisions.get(precision, reference) if by_provider else manifest.precisions[precision]
    file, plain = (files.encoder, reference.encoder) if operation == "encode" else (files.decoder, reference.decoder)
    return file, "fp32" if file == plain and not by_provider else precision


def _open_session(bundle: Bundle, file: str, device: Device, boundary: Boundary, asked: Candidate) -> GraphSession:
    """From bytes that were just checked, of which one graph's are in memory at a time."""
    model = bundle.read(file)
    try:
        return GraphSession(model, file, device, boundary, asked.threads, asked.spinning, bundle=bundle.digest)
    except BundleError as error:
        raise BundleError(f"{bundle.path}: {error}") from error


def open_halves(
    bundle: Bundle, plan: Plan, provider_options: Mapping[str, str] | None = None
) -> tuple[Operation, Operation]:
    """Open what `plan` says, each session once, however many batch ranges share it; every file is checked."""
    manifest = bundle.manifest
    boundaries = {
        "encode": encoder_boundary(manifest.kind, manifest.input, manifest.latent.shape),
        "decode": decoder_boundary(manifest.input, manifest.latent.shape),
    }

    def find(operation: str, asked: Candidate) -> tuple[str, Device]:
        file, precision = _file_of(manifest, operation, asked.precision)
        device = find_device(asked.device, precision, provider_options)
        return (manifest.on_cuda.get(file, file) if device.provider == CUDA else file), device

    found = {(name, asked): find(name, asked) for name in plan for _, asked in plan[name]}
    for file in sorted(manifest.files.keys() - {file for file, _ in found.values()}):
        bundle.verify(file)

    def open_routes(operation: str) -> list[Route]:
        sessions: dict[Candidate, GraphSession] = {}
        routes: list[Route] = []
        for from_batch, asked in plan[operation]:
            file, device = found[operation, asked]
            candidate = asked._replace(precision=device.precision)
            if candidate not in sessions:
                sessions[candidate] = _open_session(bundle, file, device, boundaries[operation], candidate)
            if not routes or routes[-1].any_batch is not sessions[candidate]:
                routes.append(Route(from_batch, sessions[candidate], device.precision))
        return routes

    name = "images" if manifest.input.is_image else "vectors"
    return (
        Operation(
            boundaries["encode"],
            lambda array: to_model_input(array, manifest.input, name),
            UNIT_INTERVAL if manifest.input.is_image else FINITE,
            open_routes("encode"),
            lambda pixels: channels_first(pixels, manifest.input),
        ),
        Operation(
            boundaries["decode"],
            lambda array: to_decoder_input(array, manifest.latent.shape),
            FINITE,
            open_routes("decode"),
        ),
    )
