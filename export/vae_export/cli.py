"""`vae-export`: write a bundle from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np

from vae_runtime.console import Command, json_option, print_json
from vae_runtime.errors import MissingExtraError
from vae_runtime.manifest import InputSpec, Manifest
from vae_runtime.sources import open_inputs
from vae_runtime.version import __version__

from .bundle import check_output

if TYPE_CHECKING:
    from vae_training.checkpoint import Checkpoint

EXAMPLES_LIMIT = 1024  # from --data; more inputs find no further error and only take longer


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("source", type=click.Path())
@click.option("--output", type=click.Path(), help="The bundle's folder.  [default: model.vae beside model.pt]")
@click.option("--name", help="The bundle's name.  [default: the data set and family, or the file's name]")
@click.option(
    "--data", "data", multiple=True, type=click.Path(),
    help="Verify with these pictures, folders or one .npy/.npz instead of the examples in the checkpoint.",
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
    force: bool,
    as_json: bool,
) -> None:
    """Export SOURCE, a model.pt of vae-train, as a bundle: encoder and decoder as ONNX, verified against PyTorch."""
    target = Path(output) if output else Path(source).with_suffix(".vae")
    check_output(target, force)
    try:
        from vae_training.checkpoint import load_checkpoint

        from .export import export_checkpoint
    except ModuleNotFoundError as error:
        raise MissingExtraError(error.name or "a package", "export", "vae-export") from None
    checkpoint = load_checkpoint(source)
    examples = _read_examples(data, checkpoint.input) if data else None
    manifest = export_checkpoint(
        checkpoint,
        target,
        name=name or _default_name(checkpoint, source),
        examples=examples,
        golden=golden,
        tolerance=tolerance,
        force=force,
    )
    if as_json:
        print_json({"bundle": str(target), "manifest": manifest.to_dict()})
    else:
        click.echo(_describe(target, manifest))


def _read_examples(data: tuple[str, ...], spec: InputSpec) -> np.ndarray:
    return next(open_inputs(data, spec).batches(EXAMPLES_LIMIT))


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
    if manifest.golden.source != "synthetic":
        lines.append("  golden.npz holds 4 real inputs; --golden synthetic keeps them out")
    return "\n".join(lines)
