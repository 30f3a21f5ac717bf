"""A model from elsewhere, as the export takes it, and what its user states about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .halves import Halves

INPUT_RANGES = ("unit", "signed")
HELD_OUT = "held-out"  # a checkpoint's own validation examples, as --calibrate and `calibrate` call them
GOLDEN = ("examples", "synthetic")  # where golden inputs come from; of a checkpoint also `HELD_OUT`
SPREADS = ("logvar", "log_std", "std", "variance")


@dataclass(frozen=True)
class Imported:
    """A model that another library or program made, as the two halves of a bundle.

    name: of the bundle, unless the user gives one.
    input_shape: (C, H, W), H and W None where the network takes any multiples of `multiple_of`; or (D,).
    default_size: (H, W) of golden inputs where there are no examples; None where the shape is fixed.
    input_range: of images, "unit" or "signed", as the user states it, so that what the decoder gives is checked; None
        where the source itself states it.
    likelihood: as the manifest has it, where the source states it.
    origin: where it is from, for the manifest: {"library": "diffusers", "version": "...", "class": "..."}; no paths.
    """

    halves: Halves
    name: str
    input_shape: tuple[int | None, ...]
    multiple_of: int = 1
    default_size: tuple[int, int] | None = None
    input_range: str | None = None
    likelihood: Mapping[str, Any] | None = None
    origin: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_free(self) -> bool:
        """Whether height and width are free."""
        return None in self.input_shape


@dataclass(frozen=True)
class ImportOptions:
    """What the user states about a source that does not state it itself; None: nothing was stated.

    weights: a file of weights for a factory. trust_pickle: unpickle networks, which runs whatever code is in them.
    kind: "vae" or "autoencoder".
    input_shape: (C, H, W) or (D,); H and W None: free. multiple_of: what they are multiples of, where free.
    input_range: of the images that the model itself takes and gives: "unit", [0, 1], or "signed", [-1, 1].
    logits: the decoder gives logits of images in [0, 1].
    latent_scale, latent_shift: the bundle's latents are (z - shift) · scale of the model's z.
    spread: what the second of an encoder's outputs is, where it has no name: "logvar", "log_std", "std" or "variance".
    """

    weights: str | None = None
    trust_pickle: bool = False
    kind: str | None = None
    input_shape: tuple[int | None, ...] | None = None
    multiple_of: int | None = None
    input_range: str | None = None
    logits: bool = False
    latent_scale: float | None = None
    latent_shift: float | None = None
    spread: str | None = None


class Arguments(ImportOptions):
    """The same given as arguments of a Python function, by whose names messages call them."""
