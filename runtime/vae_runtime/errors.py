"""Every error that the packages raise on purpose.

    VAEError
    ├── BundleError       a bundle that is missing, incomplete, altered, or of an unknown version
    ├── CheckpointError   a file of a model or of weights that is missing, damaged, or does not fit
    ├── DeviceError       a device or precision that was asked for and cannot be had
    │   └── OutOfMemoryError  its memory did not suffice for one call
    ├── InputError        an argument that breaks a rule (also a ValueError)
    ├── KindError         a plain autoencoder was asked for what only a distribution has
    ├── NotInBundleError  a bundle was asked for what it was not made with: a calibration, a fitted prior, a likelihood
    ├── ExportError       an export that failed or fell short of its tolerance
    ├── TrainingError     a training run that cannot go on
    ├── OutputError       a file that cannot be written, or that exists and was not to be replaced
    ├── ClosedError       a VAE used after close(), or in a process forked after it was loaded
    └── MissingExtraError an optional dependency that is not installed (also an ImportError)

A message is one sentence that gives the name, the value and the rule. One warning, `ApproximateTilingWarning`, is no
error: the result is there, and not exact.
"""

from __future__ import annotations


class VAEError(Exception):
    """The root of the family: catch it to catch every expected failure."""


class BundleError(VAEError):
    """A bundle is missing, incomplete, altered, or of a version that this reader does not know."""


class CheckpointError(VAEError):
    """A file of a model or of weights is missing or damaged, does not fit, or holds more than plain data."""


class DeviceError(VAEError):
    """A device, provider or precision was asked for and is not really there."""


class OutOfMemoryError(DeviceError):
    """The memory of the device did not suffice for a call. Calls with fewer examples at a time go on working."""


class InputError(VAEError, ValueError):
    """An argument has the wrong type, shape, range or value."""


class KindError(VAEError):
    """A plain autoencoder was asked for something that only a model with a distribution has."""


class NotInBundleError(VAEError):
    """A bundle was asked for what it was not made with; the message holds the command that would provide it."""


class ExportError(VAEError):
    """A model could not be exported, or its graphs differ from it by more than the tolerance."""


class TrainingError(VAEError):
    """A training run cannot start, continue or finish."""


class OutputError(VAEError):
    """An output cannot be written, or it exists and was not to be replaced."""


class ClosedError(VAEError):
    """A `VAE` was used after `close()`, or in a child process forked after it was loaded."""


class ApproximateTilingWarning(UserWarning):
    """A large image was computed in overlapping parts by a network that looks at the whole image: the result differs
    from that of the whole."""


class MissingExtraError(VAEError, ImportError):
    """An optional dependency is not installed; the message holds the command that installs it."""

    def __init__(self, module: str, extra: str, purpose: str) -> None:
        super().__init__(f'{purpose} needs {module}, which is not installed; run: pip install "vae-edge[{extra}]"')
        self.extra = extra
        self._arguments = module, extra, purpose

    def __reduce__(self) -> tuple[type[MissingExtraError], tuple[str, str, str]]:
        return type(self), self._arguments  # a process pool hands exceptions on; by default with the message alone
