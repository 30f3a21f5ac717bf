"""`vae-export`: write a bundle from the command line."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np

from vae_runtime.bundle import Bundle
from vae_runtime.console import NEGATIVE_VERDICT, Command, json_option, print_json
from vae_runtime.errors import InputError, MissingExtraError
from vae_runtime.manifest import INPUT, PRECISIONS, InputSpec, Manifest, Precision
from vae_runtime.sources import PictureSource, open_inputs
from vae_runtime.version import __version__

from .bundle import check_output
from .quality import Budget
from .wanted import FewExamplesWarning

if TYPE_CHECKING:
    from vae_training.checkpoint import Checkpoint

EXAMPLES_LIMIT = 1024  # from --data; more inputs find no further error and only take longer
READ_ROWS = 256  # of an array file, held at once


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("source", type=click.Path())
@click.option("--output", type=click.Path(), help="The bundle's folder.  [default: model.vae beside model.pt]")
@click.option("--name", help="The bundle's name.  [default: the data set and family, or the file's name]")
@click.option(
    "--data", "data", multiple=True, type=click.Path(),
    help="Verify with these pictures, folders or one .npy/.npz instead of the examples in the checkpoint; of more than"
    f" {EXAMPLES_LIMIT:,}, with that many, evenly spaced over all.",
)  # fmt: skip
@click.option(
    "--golden", type=click.Choice(["held-out", "examples", "synthetic"]),
    help="Inputs that travel in the bundle: the checkpoint's held-out ones, those of --data, or seeded noise."
    "  [default: held-out; with --data examples]",
)  # fmt: skip
@click.option(
    "--tolerance", type=float, default=1e-5, show_default=True,
    help="Largest error of a reconstruction, relative to the data's range; 10 times that for mean and logvar.",
)  # fmt: skip
@click.option(
    "--precision", "precisions", default="fp32", show_default=True,
    help="What to write: fp32, which always is, int8, fp16; several with commas.",
)  # fmt: skip
@click.option(
    "--budget-psnr", type=float, default=Budget().psnr_db, show_default=True,
    help="PSNR of the reconstruction, in dB, that a precision may lose against fp32.",
)  # fmt: skip
@click.option(
    "--budget-nats", type=float, default=Budget().nats_per_dimension, show_default=True,
    help="-ELBO, in nats per input dimension, that a precision may lose against fp32.",
)  # fmt: skip
@click.option("--keep", is_flag=True, help="Write a precision that misses the budget too, marked in the manifest.")
@click.option("--force", is_flag=True, help="Replace an existing bundle, once the new one is complete.")
@json_option
@click.version_option(__version__, prog_name="vae-export")
def main(
    source: str,
    output: str | None,
    name: str | None,
    data: tuple[str, ...],
    golden: str | None,
    tolerance: float,
    precisions: str,
    budget_psnr: float,
    budget_nats: float,
    keep: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Export SOURCE, a model.pt of vae-train, as a bundle: encoder and decoder as ONNX, verified against PyTorch.

    Exit code 3: the bundle is written, but without a precision that missed the budget.
    """
    names, budget = _parse_precisions(precisions), Budget(budget_psnr, budget_nats)
    target = Path(output) if output else Path(source).with_suffix(".vae")
    check_output(target, force)
    try:
        from vae_training.checkpoint import load_checkpoint

        from .export import export_checkpoint
    except ModuleNotFoundError as error:
        raise MissingExtraError(error.name or "a package", "export", "vae-export") from None
    checkpoint = load_checkpoint(source)
    examples = _read_examples(data, checkpoint.input) if data else None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", FewExamplesWarning)
        manifest = export_checkpoint(
            checkpoint,
            target,
            name=name or _default_name(checkpoint, source),
            examples=examples,
            golden=golden,
            tolerance=tolerance,
            precisions=names,
            budget=budget,
            keep=keep,
            force=force,
        )
    for warning in caught:
        if issubclass(warning.category, FewExamplesWarning):
            click.echo(f"Warning: {warning.message}", err=True)
    if as_json:
        print_json({"bundle": str(target), "manifest": manifest.to_dict()})
    else:
        click.echo(_describe(target, manifest))
    _report_misses(manifest)


def _read_examples(data: tuple[str, ...], spec: InputSpec) -> np.ndarray:
    """At most `EXAMPLES_LIMIT`, evenly spaced: the first ones of a sorted file would all be of one kind."""
    source = open_inputs(data, spec)
    count = min(len(source), EXAMPLES_LIMIT)
    rows = np.arange(count) * len(source) // count
    if isinstance(source, PictureSource):
        source = PictureSource([Path(source.names[row]) for row in rows], spec)
        return next(source.batches(count))
    return np.concatenate(
        [batch[rows[rows // READ_ROWS == n] % READ_ROWS] for n, batch in enumerate(source.batches(READ_ROWS))]
    )


def _parse_precisions(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in PRECISIONS:
            raise InputError(f"--precision has {name!r}; expected some of {', '.join(PRECISIONS)}, with commas between")
    return names


def _report_misses(manifest: Manifest) -> None:
    """Say on stderr which precisions missed the budget; the exit code tells where one was not written."""
    for name, precision in manifest.precisions.items():
        if not precision.within_budget:
            click.echo(f"Warning: {name} misses the budget; it is written and marked, as --keep asks", err=True)
    for refusal in manifest.refused.values():
        click.echo(f"Not written: {refusal['reason']}", err=True)
    if manifest.refused:
        sys.exit(NEGATIVE_VERDICT)


def _default_name(checkpoint: Checkpoint, source: str) -> str:
    dataset = str(checkpoint.dataset.get("dataset") or Path(source).stem)
    return f"{Path(dataset).name}-{checkpoint.config.family}"


def _describe(target: Path, manifest: Manifest) -> str:
    fidelity = manifest.precisions["fp32"].fidelity
    lines = [f"{target}: {manifest.kind} {manifest.name!r}, verified against PyTorch on {fidelity['examples']} inputs"]
    lines += [f"  {file:14} {entry.bytes:>10,} bytes" for file, entry in sorted(manifest.files.items())]
    lines += [
        f"  max error of {name.removesuffix('_max_error'):15} {value:.1e}"
        for name, value in fidelity.items()
        if name.endswith("_max_error")
    ]
    lines += [_describe_quality(key, precision) for key, precision in manifest.precisions.items() if key != "fp32"]
    if manifest.golden.source != "synthetic":
        count = len(Bundle.open(target).golden()[INPUT])
        lines.append(f"  golden.npz holds {count} real input{'s' * (count > 1)}; --golden synthetic keeps them out")
    return "\n".join(lines)


def _describe_quality(name: str, precision: Precision) -> str:
    quality = precision.quality
    losses = [f"PSNR {quality['psnr_db']:.2f} dB ({-quality['psnr_lost_db']:+.3f})"]
    elbo, lost = quality["negative_elbo_per_dimension"], quality["nats_lost_per_dimension"]
    if elbo is not None:
        losses.append(f"-ELBO {elbo:.4f} nats per dimension ({lost:+.5f})")
    kept = sum(map(len, quality["kept_fp32"].values()))
    layers = f"; {kept} layer{'s' if kept > 1 else ''} in fp32" if kept else ""
    verdict = "within the budget" if precision.within_budget else "MISSES the budget"
    return f"  {name}: {', '.join(losses)} on {quality['examples']} held-out examples, {verdict}{layers}"
