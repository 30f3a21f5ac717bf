"""What users rely on: exported names, signatures and the family of errors. A change here is a change for them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable

import pytest

import vae_runtime
from vae_runtime import VAE, errors


def test_exported_names_are_frozen() -> None:
    assert sorted(vae_runtime.__all__) == [
        "ApproximateTilingWarning", "BundleError", "CheckpointError", "ClosedError", "DeviceArray", "DeviceError",
        "DevicePosterior", "ExportError", "InputError", "KindError", "Manifest", "MissingExtraError",
        "NotInBundleError", "OutOfMemoryError", "OutputError", "Posterior", "Reconstruction", "RouteTest", "SelfTest",
        "TrainingError", "VAE", "VAEError", "__version__", "to_uint8",
    ]  # fmt: skip
    for name in vae_runtime.__all__:
        assert hasattr(vae_runtime, name)


def test_nothing_else_public_but_modules_is_in_the_package() -> None:
    public = {
        name for name, value in vars(vae_runtime).items() if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert public == set(vae_runtime.__all__) - {"__version__"}


def test_members_of_a_vae_are_frozen() -> None:
    assert {name for name in vars(VAE) if not name.startswith("_")} == {
        "load", "manifest", "device", "precision", "plan", "encode", "decode", "sample", "sample_batches",
        "reconstruct", "interpolate", "traverse", "nearest", "attribute_vector", "elbo", "log_likelihood",
        "reconstruction_error", "score", "score_map", "is_anomaly", "threshold", "encode_to_device", "decode_to_device",
        "selftest", "golden", "warmup", "close",
    }  # fmt: skip


LARGE = "batch_size=None, pad=False, tile=None, progress=None"
SAMPLE = "(self, n, seed=None, temperature=1.0, *, prior=None, truncation=None, batch_size=None, size=None)"


@pytest.mark.parametrize(
    ("function", "signature"),
    [
        (VAE.load, "(path, device='cpu', precision='fp32', threads=None, *, provider_options=None)"),
        (VAE.warmup, "(self, batch_sizes=(1,), size=None)"),
        (VAE.encode, f"(self, inputs, *, {LARGE})"),
        (VAE.decode, "(self, latents, *, batch_size=None, size=None, tile=None, progress=None)"),
        (VAE.sample, SAMPLE),
        (VAE.sample_batches, SAMPLE),
        (VAE.reconstruct, f"(self, inputs, *, n_samples=None, seed=None, {LARGE})"),
        (VAE.elbo, "(self, inputs, n_samples=1, seed=None, *, batch_size=None)"),
        (VAE.log_likelihood, "(self, inputs, n_samples=5000, seed=None, *, batch_size=None, progress=None)"),
        (VAE.reconstruction_error, f"(self, inputs, *, {LARGE})"),
        (VAE.score, f"(self, inputs, method=None, *, n_samples=100, seed=0, {LARGE})"),
        (VAE.score_map, f"(self, inputs, method='reconstruction', *, {LARGE})"),
        (VAE.is_anomaly, f"(self, inputs, quantile=0.99, method=None, *, n_samples=100, seed=0, {LARGE})"),
        (VAE.threshold, "(self, quantile=0.99, method=None, *, tile=None)"),
        (VAE.interpolate, "(self, a, b, steps=8, method='spherical', *, pad=False)"),
        (VAE.traverse, "(self, inputs, dimension, values, *, pad=False)"),
        (VAE.nearest, "(self, inputs, references, k=1, *, pad=False)"),
        (VAE.attribute_vector, "(self, positives, negatives)"),
        (VAE.encode_to_device, "(self, inputs)"),
        (VAE.decode_to_device, "(self, latents)"),
        (vae_runtime.Posterior.kl, "(self, per_dimension=False)"),
        (vae_runtime.Posterior.sample, "(self, *, seed=None, temperature=1.0)"),
    ],
)
def test_signatures_are_frozen(function: Callable[..., object], signature: str) -> None:
    found = inspect.signature(function)
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in found.parameters.values()]
    assert str(found.replace(parameters=bare, return_annotation=inspect.Signature.empty)) == signature


def test_tree_of_errors_in_the_docstring_is_the_real_one() -> None:
    assert errors.__doc__ is not None
    drawn = dict(re.findall(r"[├└]── (\w+)\s+(.*)", errors.__doc__))
    real = {
        name: value
        for name, value in vars(errors).items()
        if inspect.isclass(value) and issubclass(value, errors.VAEError) and value is not errors.VAEError
    }
    assert set(drawn) == set(real)
    builtin = {
        name: base.__name__ for name, value in real.items() for base in value.__bases__ if base.__module__ == "builtins"
    }
    also = {name: match[1] for name, text in drawn.items() if (match := re.search(r"\(also an? (\w+)\)", text))}
    assert also == builtin == {"InputError": "ValueError", "MissingExtraError": "ImportError"}
    for name, value in real.items():
        assert value.__bases__[0] is (errors.DeviceError if name == "OutOfMemoryError" else errors.VAEError)
        assert value.__doc__


def test_all_errors_are_exported() -> None:
    assert {name for name in vars(errors) if name.endswith("Error")} <= set(vae_runtime.__all__)


def test_missing_extra_names_module_purpose_and_cure() -> None:
    error = vae_runtime.MissingExtraError("numpy", "base", "arithmetic")
    assert str(error) == 'arithmetic needs numpy, which is not installed; run: pip install "vae-edge[base]"'
    assert error.extra == "base"


def test_version_is_one_that_installers_understand() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+([a-z]+\d+)?", vae_runtime.__version__)


@pytest.mark.parametrize("name", [name for name in vae_runtime.__all__ if name != "__version__"])
def test_every_public_name_is_documented(name: str) -> None:
    assert inspect.getdoc(getattr(vae_runtime, name))


@pytest.mark.parametrize("name", [name for name in vars(VAE) if not name.startswith("_")])
def test_every_public_member_is_documented(name: str) -> None:
    assert inspect.getdoc(inspect.getattr_static(VAE, name))
