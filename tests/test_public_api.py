"""What users of training and export call from Python; a change here is a change for them. The runtime's stands beside
its tests."""

from __future__ import annotations

import inspect

import pytest

pytest.importorskip("torch")

import vae_export
import vae_training


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (
            vae_export.export_bundle,
            "encoder, decoder, path, *, examples, kind='vae', name=None, likelihood=None, input_range=None,"
            " spread=None, logits=False, latent_scale=1.0, latent_shift=0.0, colour=None, resize=None,"
            " multiple_of=None, golden='examples', tolerance=1e-05, precisions=('fp32',),"
            " budget=Budget(psnr_db=0.1, nats_per_dimension=0.005), keep=False, prior=None, calibrate=None,"
            " calibrate_tile=None, scores=None, progress=None, force=False",
        ),
        (
            vae_export.export_checkpoint,
            "checkpoint, path, *, name, examples=None, golden=None, tolerance=1e-05, prior_examples=None,"
            " calibrate=None, **options",
        ),
        (
            vae_training.train,
            "config, output, *, resume=False, force=False, device='auto', checkpoint_seconds=30.0, tensorboard=False,"
            " progress=False",
        ),
        (vae_training.load_dataset, "source, size=None, resize=None, colour=None"),
        (vae_training.load_checkpoint, "path"),
        (vae_training.save_checkpoint, "path, checkpoint"),
        (vae_training.build_model, "config"),
    ],
)
def test_signatures_are_frozen(function: object, parameters: str) -> None:
    assert callable(function)
    found = inspect.signature(function)
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in found.parameters.values()]
    assert str(found.replace(parameters=bare, return_annotation=inspect.Signature.empty)) == f"({parameters})"


@pytest.mark.parametrize("package", [vae_export, vae_training])
def test_what_is_listed_is_there_and_documented(package: object) -> None:
    names = package.__all__  # type: ignore[attr-defined]
    assert set(names) <= set(dir(package))
    for name in names:
        assert name == "__version__" or inspect.getdoc(getattr(package, name))
