"""Run a variational autoencoder's bundle with numpy and ONNX Runtime alone.

    from vae_runtime import VAE

    vae = VAE.load("digits.vae")
    posterior = vae.encode(images)
    images = vae.decode(posterior.sample(seed=0))

onnxruntime is imported by the first `VAE.load`; the manifest, the errors and preprocessing work without any engine.
"""

import os as _os

# onnxruntime >= 1.29 starts telemetry at import, which writes to the user's cache folder and can hang forked children
# at exit. Whoever wants it sets the variable first.
_os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

from .device_array import DeviceArray
from .errors import (
    ApproximateTilingWarning,
    BundleError,
    CheckpointError,
    ClosedError,
    DeviceError,
    ExportError,
    InputError,
    KindError,
    MissingExtraError,
    NotInBundleError,
    OutOfMemoryError,
    OutputError,
    TrainingError,
    VAEError,
)
from .manifest import Manifest
from .posterior import Posterior, Reconstruction
from .preprocess import to_uint8
from .selftest import RouteTest, SelfTest
from .vae import VAE, DevicePosterior
from .version import __version__

__all__ = [
    "VAE",
    "ApproximateTilingWarning",
    "BundleError",
    "CheckpointError",
    "ClosedError",
    "DeviceArray",
    "DeviceError",
    "DevicePosterior",
    "ExportError",
    "InputError",
    "KindError",
    "Manifest",
    "MissingExtraError",
    "NotInBundleError",
    "OutOfMemoryError",
    "OutputError",
    "Posterior",
    "Reconstruction",
    "RouteTest",
    "SelfTest",
    "TrainingError",
    "VAEError",
    "__version__",
    "to_uint8",
]
