"""What encoders and decoders from elsewhere return, brought to tensors.

An encoder's output is understood as

- one tensor: a code, or mean and log-variance one after the other along the channels (the caller decides which),
- two tensors: (mean, logvar), unless `spread` says what else the second is,
- a dict, a named tuple or an object with `mean`, `mu`, ... and `logvar`, `log_var`, `std`, `scale`, `variance`, ...,
  with `z_` before both names or without: torch's Normal, diffusers' DiagonalGaussianDistribution, pythae's
  ModelOutput; the names of dicts and tuples may have capitals, and anything, such as `q_`, before both,
- a dict with one distribution in it,
- an object that holds one of these as `latent_dist`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vae_runtime.errors import ExportError

MEANS = ("mean", "mu", "loc", "embedding")
CODES = ("embedding", "latents", "latent", "code", "z")
NAMED_SPREADS = {  # in the order in which they are looked for: an object may have several, which agree
    "logvar": "logvar", "log_var": "logvar", "log_variance": "logvar", "log_covariance": "logvar",
    "log_std": "log_std", "logstd": "log_std", "log_sigma": "log_std", "logsigma": "log_std",
    "std": "std", "stddev": "std", "scale": "std", "sigma": "std",
    "variance": "variance", "var": "variance",
}  # fmt: skip
PREFIXES = ("", "z_")  # of both names, before any other that a mean and its spread have in common
COVARIANCE = "Sigma"  # no capitalised sigma, perhaps
RECONSTRUCTIONS = ("reconstruction", "sample", "recon_x", "recon")
PIXEL_MEANS = ("mean", "mu", "loc", "probs")  # of a decoder that gives a distribution of each pixel
RULE = (
    "expected (mean, logvar), one tensor, a distribution, or by name a mean (mean, mu, loc) and its logvar, log_std,"
    " std or variance"
)

_NO_MORE = (
    "leave out what is more, as a sample z, which the runtime draws, or features for the decoder, which gets the latent"
    " alone"
)


class Encoded(NamedTuple):
    """mean: or the only tensor. spread: None where there is one tensor alone. meaning: of the spread, one of
    `imported.SPREADS`; None where it is the second of two without names."""

    mean: Tensor
    spread: Tensor | None = None
    meaning: str | None = None


def read_encoded(output: Any) -> Encoded:
    """What an encoder returned, as one or two tensors.

    Raises:
        ExportError: it has a form that is not understood.
    """
    if isinstance(output, Tensor):
        return Encoded(output)
    if isinstance(output, torch.distributions.Distribution):
        return _read_distribution(output)
    fields = _fields(output)
    if fields is None:
        return _read_sequence(output) if isinstance(output, (tuple, list)) else _read_object(output)
    if "latent_dist" in fields:
        return read_encoded(fields["latent_dist"])
    named = _read_named(fields)
    if named is not None:
        return named
    if len(fields) == 1:
        return read_encoded(next(iter(fields.values())))
    raise ExportError(f"the encoder returns {type(output).__name__} with {', '.join(map(str, fields))}; {RULE}")


def read_reconstruction(output: Any) -> Tensor:
    """What a decoder returned, as one tensor; of a distribution its mean.

    Raises:
        ExportError: it has a form that is not understood.
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(output, torch.distributions.Distribution):
        return _expectation(output)
    rule = "expected one tensor, or an object or dict with 'sample' or 'reconstruction'"
    fields = _fields(output)
    if fields is None and isinstance(output, (tuple, list)):
        fields = dict(enumerate(output))
        rule = "expected one tensor: where it gives a distribution, return its mean alone"
    if fields is None:
        fields = {name: getattr(output, name, None) for name in RECONSTRUCTIONS}
    found = [fields[name] for name in RECONSTRUCTIONS if isinstance(fields.get(name), Tensor)]
    found = found or [fields[name] for name in PIXEL_MEANS if isinstance(fields.get(name), Tensor)]
    if not found and len(fields) == 1:
        found = [value for value in fields.values() if isinstance(value, Tensor)]
    if len(found) != 1:
        raise ExportError(f"the decoder returns {_describe(output)}; {rule}")
    return found[0]


def _expectation(distribution: torch.distributions.Distribution) -> Tensor:
    name = type(distribution).__name__
    try:
        if isinstance(distribution, torch.distributions.Categorical):  # which numbers its classes
            raise NotImplementedError
        return distribution.mean
    except NotImplementedError:
        raise ExportError(
            f"the decoder returns the distribution {name}, whose mean torch does not know; return the expected input"
        ) from None


def _fields(output: Any) -> dict[Any, Any] | None:
    """The named parts of a dict, a named tuple or an output object of a library; None where there are no names."""
    if isinstance(output, Mapping):
        return dict(output)
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return dict(zip(output._fields, output, strict=True))
    return {"latent_dist": output.latent_dist} if hasattr(output, "latent_dist") else None


def named_pair(names: Iterable[Any]) -> tuple[Any, Any, str] | None:
    """Which of these names are a mean's and its spread's, and what the spread is; None where they do not say so. As it
    is written comes before capitals, and plain names before those with a prefix."""
    names = [name for name in names if not _is_of_prior(name)]
    plain = {str(name).lower(): name for name in names if not str(name).endswith(COVARIANCE)}
    known = plain | {str(name): name for name in names}
    for prefix in PREFIXES:
        if (pair := _pair_after(prefix, known)) is not None:
            return pair
    means = {known[name]: name.removesuffix(mean) for name in known for mean in MEANS if name.endswith(f"_{mean}")}
    return _pair_after(next(iter(means.values())), known) if len(means) == 1 else None  # of several, which is meant?


def _is_of_prior(name: Any) -> bool:
    return str(name).lower().startswith(("p_", "prior")) or name == "p"


def _pair_after(prefix: str, known: Mapping[str, Any]) -> tuple[Any, Any, str] | None:
    mean = next((name for name in MEANS if prefix + name in known), None)
    spread = next((name for name in NAMED_SPREADS if prefix + name in known), None)
    if mean is None or spread is None:
        return None
    return known[prefix + mean], known[prefix + spread], NAMED_SPREADS[spread]


def _read_named(fields: Mapping[Any, Any]) -> Encoded | None:
    tensors = {name: value for name, value in fields.items() if isinstance(value, Tensor)}
    pair = named_pair(tensors)
    if pair is not None:
        return Encoded(tensors[pair[0]], tensors[pair[1]], pair[2])
    likely = (value for name, value in fields.items() if not _is_of_prior(name))
    posteriors = [value for value in likely if isinstance(value, torch.distributions.Distribution)]
    if posteriors:
        return _read_distribution(posteriors[0]) if len(posteriors) == 1 else None
    code = [name for name in CODES if name in tensors]
    others = {prefix + name for prefix in PREFIXES for name in (*MEANS[:3], *NAMED_SPREADS)}
    alone = len(code) == 1 and others.isdisjoint(str(name).lower() for name in tensors)
    # Beside another tensor of its shape, it is perhaps a sample.
    alone = alone and [one.shape for one in tensors.values()].count(tensors[code[0]].shape) == 1
    return Encoded(tensors[code[0]]) if alone else None


def _read_distribution(distribution: torch.distributions.Distribution) -> Encoded:
    base = distribution
    while isinstance(base, torch.distributions.Independent):
        base = base.base_dist
    if not isinstance(base, torch.distributions.Normal):
        raise ExportError(
            f"the encoder returns the distribution {type(base).__name__}; a bundle's posterior is a diagonal normal"
            " one: return Normal(loc, scale)"
        )
    return Encoded(base.loc, base.scale, "std")


def _read_object(output: Any) -> Encoded:
    names = [*CODES, *(prefix + name for prefix in PREFIXES for name in (*MEANS, *NAMED_SPREADS))]
    fields = {name: getattr(output, name) for name in names if isinstance(getattr(output, name, None), Tensor)}
    named = _read_named(fields)
    if named is None:
        raise ExportError(f"the encoder returns {_describe(output)}; {RULE}")
    return named


def _read_sequence(output: tuple[Any, ...] | list[Any]) -> Encoded:
    if len(output) == 1:
        return read_encoded(output[0])
    if len(output) != 2 or not all(isinstance(part, Tensor) for part in output):
        raise ExportError(f"the encoder returns {_describe(output)}; {RULE} ({_NO_MORE})")
    if output[0].shape != output[1].shape:
        cure = "if it is one, expand it, as by logvar.expand_as(mean)" if _broadcast(*output) else _NO_MORE
        raise ExportError(f"the encoder returns {_describe(output)}; mean and logvar have the same shape ({cure})")
    return Encoded(output[0], output[1])


def _broadcast(mean: Tensor, spread: Tensor) -> bool:
    """Whether the spread is one for several numbers of the mean; one for all is rather a loss."""
    try:
        return spread.ndim > 0 and torch.broadcast_shapes(mean.shape, spread.shape) == mean.shape
    except RuntimeError:
        return False


def _describe(output: Any) -> str:
    if isinstance(output, Tensor):
        return f"a tensor of shape {tuple(output.shape)}"
    if isinstance(output, Mapping):
        return f"{type(output).__name__} with {', '.join(map(str, output))}"
    if isinstance(output, (tuple, list)):
        parts = [str(tuple(part.shape)) if isinstance(part, Tensor) else type(part).__name__ for part in output]
        return f"{len(output)} values of shapes {', '.join(parts)}"
    return type(output).__name__
