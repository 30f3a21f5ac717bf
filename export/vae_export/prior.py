"""A prior that is fitted after training to the latents of real examples (Ghosh et al., 2020, arXiv:1903.12436)."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from vae_runtime.errors import ExportError, InputError, VAEError
from vae_runtime.manifest import PRIOR_FILE, FittedPrior
from vae_runtime.preprocess import Float32
from vae_runtime.vae import VAE
from vae_training.fit_prior import MAX_DIMENSIONS, draw_aggregate, fit_prior

from .quality import FewExamplesWarning, warn

SEED = 0  # of the posterior draws, and of the fit
DRAWS = 10_000  # from the posteriors of all examples together; of more examples, one of each
LARGEST_BYTES = 2**28  # of the factors of all covariances
ENOUGH = 10  # examples for each dimension of each component


@dataclass(frozen=True)
class PriorFit:
    """What is to be fitted, to what.

    kind: "gaussian", or "mixture" of so many `components`; each with its full covariance. examples: as the encoder
        takes them.
    """

    kind: str
    components: int
    examples: Float32

    def fit(self, vae: VAE) -> tuple[FittedPrior, bytes]:
        """The manifest's entry, and the bytes of the file.

        Of a VAE, it is fitted to draws from the examples' posteriors; of a plain autoencoder, to their codes.

        Raises:
            ExportError: the fit fails.
        """
        posterior = vae.encode(self.examples)
        count = len(posterior)
        # An autoencoder's codes are the same in every draw.
        rounds = 1 if posterior.logvar is None else max(1, DRAWS // count)
        draws = [draw_aggregate(posterior.mean, posterior.logvar, SEED + n) for n in range(rounds)]
        try:
            mixture = fit_prior(np.concatenate(draws), self.kind, self.components, SEED)
        except VAEError:
            raise
        except (ValueError, np.linalg.LinAlgError) as error:
            raise ExportError(f"prior {self} cannot be fitted to these latents: {error}") from error
        return FittedPrior(self.kind, self.components, PRIOR_FILE, count), mixture.to_npz()

    def check(self, dimensions: int) -> None:
        """Raise `InputError` if latents of so many elements are too large, or the examples too few for them; warn of
        a `FewExamplesWarning` if these are few."""
        count = len(self.examples)
        most = min(MAX_DIMENSIONS, math.isqrt(LARGEST_BYTES // 8 // self.components))
        if dimensions > most:
            rule = f"which is for latents of up to {most:,} elements"
            raise InputError(f"prior {self} has full covariances, {rule}; these have {dimensions:,}")
        least = max(dimensions + 1, 2 * self.components)
        if count < least:
            raise InputError(
                f"prior {self} is fitted to {count} examples; latents of {dimensions} elements need at least {least},"
                " pass more (--data)"
            )
        if count < (enough := ENOUGH * dimensions * self.components):
            warn(
                f"the prior {self} is fitted to {count} examples; with fewer than {enough:,}, {ENOUGH} for each of"
                f" {dimensions} dimensions of each component, it may resemble these more than the data: pass more"
                " (--data)",
                FewExamplesWarning,
            )

    def __str__(self) -> str:
        return repr(self.kind if self.kind == "gaussian" else f"{self.kind}:{self.components}")


def parse_prior(text: Any) -> tuple[str, int]:
    """ "gaussian" -> ("gaussian", 1); "mixture:10" -> ("mixture", 10).

    Raises:
        InputError: it is neither.
    """
    found = re.fullmatch(r"gaussian|mixture:([1-9]\d{0,3})", text) if isinstance(text, str) else None
    if found is None:
        raise InputError(f"prior is {text!r}; expected 'gaussian', or for 10 components 'mixture:10'")
    return ("mixture", int(found[1])) if found[1] else ("gaussian", 1)
