from __future__ import annotations

import contextlib
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from vae_runtime.calibration import Calibration
from vae_runtime.errors import BundleError
from vae_runtime.manifest import (
    ActiveUnits,
    FileEntry,
    FittedPrior,
    Golden,
    InputSpec,
    LatentSpec,
    Likelihood,
    Manifest,
    Precision,
)

FORMAT = Path(__file__).parent.parent.parent / "runtime" / "FORMAT.md"
LITERAL = Path(__file__).parent / "literal" / "manifest.json"
MISSING = object()


def full_manifest() -> Manifest:
    """Every key of the format, with values that a serialiser could get wrong."""
    return Manifest(
        kind="vae",
        name="Ziffern “ä”",
        input=InputSpec("image", (1, 8, 8), "grey", "crop"),
        latent=LatentSpec(
            (8,),
            {"type": "standard_normal"},
            ActiveUnits((0.9, 0.01, 0.25, 0.0, 1e-07, 0.5, 1.5, 0.02), 0.01, 180),
            FittedPrior("mixture", 10, "prior.npz", 1437),
        ),
        likelihood=Likelihood("bernoulli", binarize="threshold"),
        precisions={
            "int8": Precision(
                "encoder.int8.onnx",
                "decoder.onnx",
                {"against": "fp32", "mean_max_error": 0.25},
                {
                    "within_budget": False,
                    "psnr_lost_db": 0.3,
                    "nats_lost_per_dimension": None,
                    "kept_fp32": {"decoder": []},
                },
            ),
            "fp32": Precision("encoder.onnx", "decoder.onnx", {"against": "pytorch", "mean_max_error": 1.2e-06}),
        },
        files={
            "encoder.onnx": FileEntry(104233, "0a" * 32),
            "encoder.int8.onnx": FileEntry(2**40, "ff" * 32),
            "decoder.onnx": FileEntry(0, "12" * 32),
            "golden.npz": FileEntry(9120, "9c" * 32),
            "prior.npz": FileEntry(5000, "5d" * 32),
        },
        golden=Golden("golden.npz", "held-out", {"fp32": 0.0001, "int8": 0.5}),
        training={"dataset": "digits", "train": 1437, "metrics": {}, "note": 'a "manifest_sha256": inside a string'},
        producer={"vae-edge": "0.1.0"},
        budget={"psnr_db": 0.1, "nats_per_dimension": 0.005},
        refused={"fp16": {"reason": "fp16 gives NaN", "quality": {"within_budget": False, "psnr_db": None}}},
        calibration=Calibration("held-out", 180, (0.0, 0.5, 1.0), {"elbo": (-3.25, 20.0, 1e06)}),
    )


def test_written_manifest_is_the_committed_one_byte_for_byte() -> None:
    assert full_manifest().to_json() == LITERAL.read_bytes()


def test_committed_manifest_reads_back_as_the_same_object() -> None:
    assert Manifest.from_json(LITERAL.read_bytes()) == full_manifest()


def test_two_manifests_of_one_content_in_another_order_have_the_same_bytes() -> None:
    manifest = full_manifest()
    shuffled = {**manifest._asdict(), "files": dict(reversed(manifest.files.items()))}
    assert Manifest(**shuffled).to_json() == manifest.to_json()


def test_nan_is_never_written(manifest_data: Any, sign: Any) -> None:
    manifest = Manifest.from_json(sign(manifest_data()))
    broken = Manifest(**{**manifest._asdict(), "training": {"loss": float("nan")}})
    with pytest.raises(ValueError, match="not JSON compliant"):
        broken.to_json()


@pytest.mark.parametrize("name", ["tiny.vae", "tiny-rgb.vae", "tiny-vectors.vae"])
def test_reading_and_writing_a_real_manifest_keeps_every_byte(tiny_path: Path, name: str) -> None:
    text = (tiny_path.parent / name / "manifest.json").read_bytes()
    assert Manifest.from_json(text).to_json() == text


def test_origin_codecs_and_refusals_are_written_as_they_are_read(manifest_data: Any, sign: Any) -> None:
    data = manifest_data()
    data["origin"] = {"library": "diffusers", "version": "0.35.1"}
    cost = {"bits_per_pixel": 0.5, "examples": 8.0, "psnr_db": 30.5, "psnr_lost_db": 0.01}
    data["latent_codecs"] = {"uint8": cost, "of.two.words": cost}
    data["refused"] = {"of.two.words": {"reason": "bad", "quality": {}}}
    data["on_cuda"] = {"decoder.onnx": "encoder.onnx"}
    manifest = Manifest.from_json(sign(data))
    assert manifest.on_cuda == data["on_cuda"]
    assert (manifest.origin, manifest.latent_codecs) == (data["origin"], data["latent_codecs"])
    assert manifest.to_json() == sign(data)


def test_values_at_the_edge_of_what_is_allowed_are_read(manifest_data: Any, sign: Any) -> None:
    data = manifest_data()
    data["budget"] = {"psnr_db": 0, "nats_per_dimension": 0}
    data["golden"]["tolerance"] |= {"of.two.words": 5e-324}
    for scale in (2.0**-126, 2.0**127):
        data["likelihood"] = {"type": "gaussian", "scale": scale}
        manifest = Manifest.from_json(sign(data))
        assert manifest.budget == data["budget"]
        assert manifest.golden.tolerance == data["golden"]["tolerance"]
        assert manifest.likelihood == Likelihood("gaussian", scale)


def test_what_a_manifest_leaves_out_has_a_meaning(manifest_data: Any, sign: Any) -> None:
    data = manifest_data()
    del data["input"]["resize"]
    del data["input"]["colour"]
    del data["training"], data["producer"]
    data["likelihood"] = {"type": "bernoulli"}
    manifest = Manifest.from_json(sign(data))
    assert (manifest.input.resize, manifest.input.colour) == ("exact", None)
    assert (manifest.training, manifest.producer) == ({}, {})
    assert manifest.likelihood == Likelihood("bernoulli", binarize="none")
    assert Likelihood("bernoulli").to_dict() == {"type": "bernoulli", "binarize": "none"}


def test_the_format_marks_the_keys_that_may_be_absent(manifest_data: Any, sign: Any) -> None:
    """One that the tiny bundle's manifest has not is absent there."""
    rows = FORMAT.read_text("utf-8").partition("| key of the manifest |")[2].partition("\n\n")[0].splitlines()
    keys = {key: bool(mark) for row in rows[2:] for key, mark in re.findall(r"`(\w+)`( ○)?", row.split("|")[1])}
    assert len(keys) > 15
    for key, may_be_absent in keys.items():
        data = manifest_data()
        data.pop(key, None)
        with contextlib.nullcontext() if may_be_absent else pytest.raises(BundleError):
            Manifest.from_json(sign(data) if key != "manifest_sha256" else json.dumps(data).encode())


def test_unknown_keys_are_ignored_wherever_they_stand(manifest_data: Any, sign: Any) -> None:
    data = manifest_data()
    expected = Manifest.from_json(sign(data))
    for part in (data, data["input"], data["latent"], data["likelihood"], data["golden"], data["precisions"]["fp32"]):
        part["from_the_future"] = {"nested": [1, None, True]}
    data["files"]["encoder.onnx"]["blake3"] = "abc"
    assert Manifest.from_json(sign(data)) == expected


@pytest.mark.parametrize("name", ["int4", "bf16", ""])
def test_precisions_that_this_version_does_not_know_are_ignored(manifest_data: Any, sign: Any, name: str) -> None:
    data = manifest_data()
    data["files"]["encoder.new.onnx"] = {"bytes": 1, "sha256": "0" * 64}
    expected = Manifest.from_json(sign(data))
    for entry in ({"encoder": "encoder.new.onnx", "decoder": "decoder.onnx"}, {"shards": ["a"]}, None):
        data["precisions"][name] = entry
        found = Manifest.from_json(sign(data))
        assert found == expected
        assert "encoder.new.onnx" in found.files


def test_figures_that_are_not_defined_and_keys_that_are_not_known_are_fine(manifest_data: Any, sign: Any) -> None:
    data = manifest_data()
    data["precisions"]["fp32"]["quality"] = quality = {
        **dict.fromkeys(("psnr_lost_db", "nats_lost_per_dimension", "logvar_relative_error")),
        "psnr_db": 7,
        "kept_fp32": {"encoder": ["a"], "decoder": []},
        "calibration": {"encoder": "minmax"},
        "noise_seed": "any",
    }
    assert Manifest.from_json(sign(data)).precisions["fp32"].quality == quality


def test_a_bundle_from_before_there_was_a_budget_still_loads(tiny_path: Path) -> None:
    manifest = Manifest.from_json((tiny_path / "manifest.json").read_bytes())
    assert (manifest.budget, manifest.refused) == (None, {})
    assert manifest.precisions["fp32"].quality == {}
    assert manifest.precisions["fp32"].within_budget


def test_a_precision_is_within_the_budget_unless_it_says_otherwise() -> None:
    within = {name: precision.within_budget for name, precision in full_manifest().precisions.items()}
    assert within == {"fp32": True, "int8": False}
    assert Precision("e", "d", {}, {"within_budget": True}).within_budget


def test_newer_version_is_refused_with_both_versions_even_if_nothing_else_is_understood(sign: Any) -> None:
    with pytest.raises(BundleError, match=r"format_version 2; this reader knows versions up to 1: update vae-edge"):
        Manifest.from_json(sign({"format": "vae-bundle", "format_version": 2}))


WRONG_VALUES = [
    ("format", MISSING, "has format None; expected 'vae-bundle'"),
    ("format", "vae-checkpoint", "has format 'vae-checkpoint'; expected 'vae-bundle'"),
    ("format_version", MISSING, "format_version None; expected a whole number from 1"),
    ("format_version", 0, "format_version 0; expected a whole number from 1"),
    ("format_version", -1, "format_version -1; expected a whole number from 1"),
    ("format_version", 1.0, r"format_version 1\.0; expected a whole number"),
    ("format_version", True, "format_version True; expected a whole number"),
    ("format_version", "1", "format_version '1'; expected a whole number"),
    ("format_version", 10**300, r"format_version 10+; this reader knows versions up to 1"),
    ("kind", MISSING, "kind is None; expected one of vae, autoencoder"),
    ("kind", "gan", "kind is 'gan'; expected one of vae, autoencoder"),
    ("kind", ["vae"], r"kind is \['vae'\]; expected one of"),
    ("kind", "autoencoder", "latent.prior is .*; an autoencoder has null"),
    ("name", MISSING, "name is None; expected a string that is not empty"),
    ("name", "", "name is ''; expected a string that is not empty"),
    ("name", 7, "name is 7; expected a string"),
    ("input", MISSING, "input is None; expected a JSON object"),
    ("input", [], r"input is \[\]; expected a JSON object"),
    ("input.type", MISSING, "input.type is None; expected one of image, vector"),
    ("input.type", "sound", "input.type is 'sound'; expected one of image, vector"),
    ("input.type", "vector", r"input.shape is \[1, 8, 8\]; expected a list of 1 positive"),
    ("input.shape", MISSING, "input.shape is None; expected a list of 3 positive whole numbers"),
    ("input.shape", [1, 8], r"input.shape is \[1, 8\]; expected a list of 3"),
    ("input.shape", [1, 8, 0], r"input.shape is \[1, 8, 0\]; expected .* positive"),
    ("input.shape", [1, 8, -8], r"input.shape is \[1, 8, -8\]"),
    ("input.shape", [1, 8, 8.0], r"input.shape is \[1, 8, 8.0\]"),
    ("input.shape", [True, 8, 8], r"input.shape is \[True, 8, 8\]"),
    ("input.shape", "188", "input.shape is '188'"),
    ("input.shape", 188, "input.shape is 188; expected a list of 3"),
    ("input.shape", [1, 2**16, 2**16], r"4294967296 elements; at most 2147483647 are allowed"),
    ("input.shape", [3, 8, 8], r"input.colour is 'grey', which has 1 channels, but input.shape is \[3, 8, 8\]"),
    ("input.colour", "cmyk", "input.colour is 'cmyk'; expected one of grey, rgb"),
    ("input.colour", "rgb", "input.colour is 'rgb', which has 3 channels"),
    ("input.colour", {"a": 1}, "input.colour is {'a': 1}"),
    ("input.resize", "squeeze", "input.resize is 'squeeze'; expected one of exact, stretch, crop"),
    ("input.resize", None, "input.resize is None; expected one of"),
    ("latent", MISSING, "latent is None; expected a JSON object"),
    ("latent.shape", MISSING, "latent.shape is None; expected a list of one or more"),
    ("latent.shape", [], r"latent.shape is \[\]"),
    ("latent.shape", [2**31], r"latent.shape is \[2147483648\], 2147483648 elements"),
    ("latent.prior", MISSING, "latent.prior is None; a vae has"),
    ("latent.prior", "standard_normal", "latent.prior is 'standard_normal'; a vae has"),
    ("latent.prior", {"type": "mixture"}, "latent.prior is {'type': 'mixture'}"),
    ("latent.active_units", 3, "latent.active_units is 3; expected a JSON object"),
    ("latent.active_units", {"variances": [], "threshold": 1, "examples": 1}, r"active_units.variances is \[\]"),
    (
        "latent.active_units",
        {"variances": [-1], "threshold": 1, "examples": 1},
        r"variances is \[-1\]; expected a list",
    ),
    ("latent.active_units", {"variances": 3, "threshold": 1, "examples": 1}, "variances is 3; expected a list"),
    (
        "latent.active_units",
        {"variances": "1", "threshold": 1, "examples": 1},
        "active_units.variances is '1'; expected a list",
    ),
    (
        "latent.active_units",
        {"variances": [1, "1"], "threshold": 1, "examples": 1},
        r"variances is \[1, '1'\]; expected a list of finite numbers",
    ),
    (
        "latent.active_units",
        {"variances": [1], "threshold": 1, "examples": 0},
        "examples is 0; expected a whole number",
    ),
    (
        "latent.active_units",
        {"variances": [1], "threshold": 1, "examples": 1.5},
        "active_units.examples is 1.5; expected a whole number",
    ),
    ("latent.active_units", {"variances": [1], "examples": 1}, "active_units.threshold is None; expected a finite"),
    ("latent.fitted_prior", None, "latent.fitted_prior is None; expected a JSON object"),
    ("latent.fitted_prior", {"type": "flow"}, "fitted_prior.type is 'flow'; expected one of gaussian, mixture"),
    ("latent.fitted_prior", {"type": "gaussian", "components": 0}, "fitted_prior.components is 0; expected a whole"),
    (
        "latent.fitted_prior",
        {"type": "gaussian", "components": 1.5},
        "fitted_prior.components is 1.5; expected a whole",
    ),
    (
        "latent.fitted_prior",
        {"type": "gaussian", "components": 1, "examples": 0, "file": "p.npz"},
        "fitted_prior.examples is 0; expected a whole",
    ),
    (
        "latent.fitted_prior",
        {"type": "gaussian", "components": 1, "examples": 9, "file": "../p.npz"},
        r"fitted_prior.file is '\.\./p.npz'; expected the plain name",
    ),
    (
        "latent.fitted_prior",
        {"type": "gaussian", "components": 1, "examples": 9, "file": "p.npz"},
        "latent.fitted_prior.file is 'p.npz', which files does not list",
    ),
    ("calibration", [], r"calibration is \[\]; expected a JSON object"),
    ("calibration", {"source": 3}, "calibration.source is 3; expected a string"),
    ("calibration", {"source": "x", "examples": 99}, "calibration.examples is 99; expected a whole number from 100"),
    ("calibration", {"source": "x", "examples": 100, "levels": [0, 0.5]}, r"levels is \[0, 0.5\]; expected numbers"),
    ("calibration", {"source": "x", "examples": 100, "levels": [0, 1, 1]}, r"levels is \[0, 1, 1\]; expected numbers"),
    (
        "calibration",
        {"source": "x", "examples": 100, "levels": [0, 1], "scores": {"elbo": [2, 1]}},
        r"calibration.scores.elbo is \[2, 1\]; expected 2 finite numbers, none below",
    ),
    (
        "calibration",
        {"source": "x", "examples": 100, "levels": [0, 1], "scores": {"elbo": [1, 2, 3]}},
        r"calibration.scores.elbo is \[1, 2, 3\]; expected 2 finite",
    ),
    ("on_cuda", [], r"on_cuda is \[\]; expected a JSON object"),
    ("on_cuda", {"decoder.onnx": 3}, "on_cuda.decoder.onnx is 3; expected the name of a file"),
    ("on_cuda", {"decoder.onnx": "other.onnx"}, "on_cuda.decoder.onnx is 'other.onnx', which files does not list"),
    ("on_cuda", {"other.onnx": "decoder.onnx"}, "a key of on_cuda is 'other.onnx', which files does not list"),
    ("likelihood", 3, "likelihood is 3; expected a JSON object"),
    ("likelihood", {}, "likelihood.type is None; expected one of bernoulli, gaussian, laplace"),
    ("likelihood.binarize", "maybe", "likelihood.binarize is 'maybe'; expected one of none, dynamic, threshold"),
    ("likelihood", {"type": "gaussian"}, "likelihood.scale is None; expected a finite number"),
    ("likelihood", {"type": "gaussian", "scale": 0}, "likelihood.scale is 0.0; the scale of a density is above 0"),
    (
        "likelihood",
        {"type": "gaussian", "scale": 1e-300},
        "likelihood.scale is 1e-300; the scale of a density is above 0",
    ),
    ("likelihood", {"type": "laplace", "scale": 1e200}, r"likelihood.scale is 1e\+200; .* within float32"),
    ("likelihood", {"type": "gaussian", "scale": -0.1}, "likelihood.scale is -0.1; the scale of a density is above 0"),
    ("likelihood", {"type": "gaussian", "scale": 10**400}, "likelihood.scale is 10+; expected a finite number"),
    ("likelihood", {"type": "gaussian", "scale": True}, "likelihood.scale is True; expected a finite number"),
    ("precisions", MISSING, "precisions is None; expected a JSON object"),
    ("precisions", {}, r"precisions has \[\]; 'fp32', the reference, must be among them"),
    ("precisions.fp32", "encoder.onnx", "precisions.fp32 is 'encoder.onnx'; expected a JSON object"),
    ("precisions.fp32.encoder", MISSING, "precisions.fp32.encoder is None; expected the plain name of a file"),
    (
        "precisions.fp32.encoder",
        "../encoder.onnx",
        r"precisions.fp32.encoder is '\.\./encoder.onnx'; expected the plain",
    ),
    ("precisions.fp32.encoder", "", "precisions.fp32.encoder is ''; expected the plain name of a file"),
    ("precisions.fp32.encoder", ".", r"precisions.fp32.encoder is '\.'; expected the plain name of a file"),
    ("precisions.fp32.encoder", "none.onnx", "precisions.fp32.encoder is 'none.onnx', which files does not list"),
    ("precisions.fp32.decoder", "a\\b", "precisions.fp32.decoder is .*; expected the plain name"),
    ("precisions.fp32.decoder", "manifest.json", "precisions.fp32.decoder is 'manifest.json'; expected the plain name"),
    ("precisions.fp32.decoder", "none.onnx", "precisions.fp32.decoder is 'none.onnx', which files does not list"),
    ("precisions.fp32.fidelity", [], r"precisions.fp32.fidelity is \[\]; expected a JSON object"),
    ("precisions.fp32.quality", 1, "precisions.fp32.quality is 1; expected a JSON object"),
    ("precisions.fp32.quality", {"within_budget": 1}, "quality.within_budget is 1; expected true or false"),
    ("precisions.fp32.quality", {"examples": "8"}, "quality.examples is '8'; expected a whole number"),
    ("precisions.fp32.quality", {"examples": -1}, "quality.examples is -1; expected a whole number"),
    (
        "precisions.fp32.quality",
        {"calibration_examples": True},
        "quality.calibration_examples is True; expected a whole",
    ),
    ("precisions.fp32.quality", {"psnr_db": []}, r"quality.psnr_db is \[\]; expected a finite number or null"),
    ("precisions.fp32.quality", {"fp32_psnr_db": "1"}, "quality.fp32_psnr_db is '1'; expected a finite number or null"),
    ("precisions.fp32.quality", {"psnr_lost_db": "x"}, "quality.psnr_lost_db is 'x'; expected a finite number or null"),
    ("precisions.fp32.quality", {"psnr_lost_db": 10**400}, "quality.psnr_lost_db is 10+; expected a finite number"),
    ("precisions.fp32.quality", {"psnr_lost_db": -(10**400)}, "quality.psnr_lost_db is -10+; expected a finite number"),
    (
        "precisions.fp32.quality",
        {"negative_elbo_per_dimension": True},
        "negative_elbo_per_dimension is True; expected a",
    ),
    ("precisions.fp32.quality", {"fp32_negative_elbo_per_dimension": {}}, "_per_dimension is {}; expected a finite"),
    ("precisions.fp32.quality", {"nats_lost_per_dimension": "0"}, "nats_lost_per_dimension is '0'; expected a finite"),
    ("precisions.fp32.quality", {"mean_relative_error": "0"}, "mean_relative_error is '0'; expected a finite number"),
    (
        "precisions.fp32.quality",
        {"logvar_relative_error": "0"},
        "logvar_relative_error is '0'; expected a finite number",
    ),
    (
        "precisions.fp32.quality",
        {"calibration": {"encoder": 3}},
        "quality.calibration is {.*}; expected an object of str",
    ),
    ("precisions.fp32.quality", {"kept_fp32": []}, r"quality.kept_fp32 is \[\]; expected an object of lists"),
    ("precisions.fp32.quality", {"kept_fp32": None}, "quality.kept_fp32 is None; expected an object of lists"),
    (
        "precisions.fp32.quality",
        {"kept_fp32": {"encoder": 3, "decoder": []}},
        "kept_fp32 is {.*'encoder': 3}; expected an object of lists",
    ),
    ("precisions.fp32.quality", {"within_budget": False}, "quality.within_budget is false; fp32 is the reference"),
    ("budget", None, "budget is None; expected a JSON object"),
    ("budget", {"psnr_db": 0.1}, "budget.nats_per_dimension is None; expected a finite number"),
    ("budget", {"psnr_db": "1", "nats_per_dimension": 1}, "budget.psnr_db is '1'; expected a finite number"),
    ("budget", {"psnr_db": -1, "nats_per_dimension": 1}, "budget.psnr_db is -1.0; a budget is 0 or more"),
    ("refused", [], r"refused is \[\]; expected a JSON object"),
    ("refused", {"int8": "bad"}, "refused.int8 is 'bad'; expected a JSON object"),
    ("refused", {"int8": {}}, "refused.int8.reason is None; expected a string"),
    ("refused", {"int8": {"reason": "bad", "quality": 3}}, "refused.int8.quality is 3; expected a JSON object"),
    (
        "refused",
        {"int8": {"reason": "bad", "quality": {"psnr_db": "?"}}},
        r"refused.int8.quality.psnr_db is '\?'; expec",
    ),
    ("files", MISSING, "files is None; expected a JSON object"),
    ("files", {}, "is '.*', which files does not list"),
    ("files.x", {"bytes": "1", "sha256": "0" * 64}, "files.x.bytes is '1'; expected a whole number"),
    ("files.x", {"bytes": -1, "sha256": "0" * 64}, "files.x.bytes is -1; expected a whole number"),
    ("files.x", {"bytes": True, "sha256": "0" * 64}, "files.x.bytes is True; expected a whole number"),
    ("files.x", {"bytes": 1, "sha256": "0" * 63}, "files.x.sha256 is '0+'; expected 64 hexadecimal digits"),
    ("files.x", {"bytes": 1, "sha256": "A" * 64}, "files.x.sha256 is 'A+'; expected 64 hexadecimal digits"),
    ("files.x", {"bytes": 1}, "files.x.sha256 is None; expected 64 hexadecimal digits"),
    ("files.x", None, "files.x is None; expected a JSON object"),
    ("files.a/b", {"bytes": 1, "sha256": "0" * 64}, "files has 'a/b'; a bundle's files lie in its folder"),
    ("files...", {"bytes": 1, "sha256": "0" * 64}, r"files has '\.\.'; a bundle's files lie in its folder"),
    ("files.C:", {"bytes": 1, "sha256": "0" * 64}, "files has 'C:'; a bundle's files lie in its folder"),
    ("golden", MISSING, "golden is None; expected a JSON object"),
    ("golden.file", MISSING, "golden.file is None; expected the plain name"),
    ("golden.file", "/etc/passwd", "golden.file is '/etc/passwd'; expected the plain name"),
    ("golden.file", "g.npz", "golden.file is 'g.npz', which files does not list"),
    ("golden.file", 4, "golden.file is 4; expected the plain name"),
    ("golden.source", 4, "golden.source is 4; expected a string"),
    ("golden.tolerance", MISSING, "golden.tolerance is None; expected a JSON object"),
    ("golden.tolerance.fp32", "1e-4", "golden.tolerance.fp32 is '1e-4'; expected a finite number"),
    ("golden.tolerance.fp32", 0, r"golden.tolerance.fp32 is 0\.0; a tolerance is above 0"),
    ("training", [], r"training is \[\]; expected a JSON object"),
    ("producer", None, "producer is None; expected a JSON object"),
    ("origin", [], r"origin is \[\]; expected a JSON object"),
    ("latent_codecs", [], r"latent_codecs is \[\]; expected a JSON object"),
    ("latent_codecs", {"uint8": 8}, "latent_codecs.uint8 is 8; expected a JSON object"),
    (
        "latent_codecs",
        {"uint8": {"bits_per_pixel": 1}},
        "latent_codecs.uint8.examples is None; expected a finite number",
    ),
]


def put(data: dict[str, Any], path: str, value: Any) -> None:
    first, _, rest = path.partition(".")
    if rest and first in ("files", "golden", "input", "latent", "likelihood", "precisions", "fp32", "tolerance"):
        put(data[first], rest, value)
    elif value is MISSING:
        del data[path]
    else:
        data[path] = value


@pytest.mark.parametrize(("path", "value", "message"), WRONG_VALUES)
def test_every_wrong_value_is_named_with_its_rule(
    manifest_data: Any, sign: Any, path: str, value: Any, message: str
) -> None:
    data = manifest_data()
    put(data, path, value)
    with pytest.raises(BundleError, match=message):
        Manifest.from_json(sign(data))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "is not valid JSON"),
        (b"\x93NUMPY\x01", "is not valid JSON: 'utf-8' codec"),
        ('{"format": "vae-bundle"}'.encode("utf-16"), "is not valid JSON: 'utf-8' codec"),
        (b"[1, 2]", r"has format \[1, 2\]; expected 'vae-bundle'"),
        (b"null", "has format None"),
        (b'{"format": "vae-bundle", "format": "vae-bundle"}', "the key 'format' appears twice"),
        (b'{"a": {"b": 1, "b": 1}}', "the key 'b' appears twice"),
        (b'{"format": NaN}', "NaN is not a JSON number"),
        (b'{"format": -Infinity}', "-Infinity is not a JSON number"),
        (b'{"training": 1e999}', "is not valid JSON: Out of range float values"),
        (b'{"name": "\\ud800"}', "is not valid JSON: .*surrogates not allowed"),
        (b'{"format_version": ' + b"9" * 5000 + b"}", "is not valid JSON: Exceeds the limit"),
        (b"[" * 100_000, "is not valid JSON: maximum recursion depth|is not valid JSON"),
        (b'{"format": "vae-bundle"} trailing', "is not valid JSON: Extra data"),
    ],
    ids=range(14),
)
def test_text_that_is_no_manifest_is_refused_in_words(text: bytes, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        Manifest.from_json(text)


@pytest.mark.parametrize("depth", range(300, 1001, 25))
def test_deep_nesting_under_any_key_is_a_bundle_error_or_fine(manifest_data: Any, depth: int) -> None:
    text = json.dumps(manifest_data())
    for key in ("name", "manifest_sha256", "kind", "format"):
        nested = text.replace("{", '{"' + key + '": ' + "[" * depth + "]" * depth + ", ", 1)
        with pytest.raises(BundleError):
            Manifest.from_json(nested.encode())


def test_over_long_manifest_is_refused_before_it_is_parsed(manifest_data: Any, sign: Any) -> None:
    with pytest.raises(BundleError, match="over 16777216 bytes, more than any manifest"):
        Manifest.from_json(b" " * (16 * 2**20) + sign(manifest_data()))


def test_many_keys_with_a_late_duplicate_are_answered_at_once() -> None:
    text = "{" + ",".join(f'"{n}":0' for n in range(200_000)) + ',"199999":0}'
    start = time.perf_counter()
    with pytest.raises(BundleError, match="the key '199999' appears twice"):
        Manifest.from_json(text.encode())
    assert time.perf_counter() - start < 10  # a quadratic search took minutes


def test_every_flipped_bit_of_a_manifest_is_noticed(tiny_path: Path) -> None:
    text = (tiny_path / "manifest.json").read_bytes()
    accepted = []
    for position in range(len(text)):
        for bit in (1 << position % 8, 0x20):  # 0x20 turns letters into capitals, which stays valid JSON
            damaged = bytearray(text)
            damaged[position] ^= bit
            try:
                Manifest.from_json(bytes(damaged))
            except BundleError:
                continue
            accepted.append((position, bit))
    assert accepted == []


@pytest.mark.parametrize("change", [lambda t: t[:-1], lambda t: t + b"\n", lambda t: t.replace(b"\n", b"\r\n")])
def test_changed_white_space_is_noticed(tiny_path: Path, change: Any) -> None:
    with pytest.raises(BundleError, match="was altered after it was written: its manifest_sha256 does not match"):
        Manifest.from_json(change((tiny_path / "manifest.json").read_bytes()))


@pytest.mark.parametrize("digest", [None, 5, "0" * 64, "", [], {"a": 1}, 'x"\n  "manifest_sha256": "y'])
def test_manifest_with_another_digest_or_none_is_refused(manifest_data: Any, digest: Any) -> None:
    data = manifest_data() if digest is None else {**manifest_data(), "manifest_sha256": digest}
    with pytest.raises(BundleError, match="manifest_sha256 does not match its contents"):
        Manifest.from_json((json.dumps(data, indent=2, sort_keys=True) + "\n").encode())


def test_messages_stay_on_one_line_and_name_the_file_once(manifest_data: Any, sign: Any) -> None:
    data = manifest_data()
    data["name"] = 7
    with pytest.raises(BundleError) as caught:
        Manifest.from_json(sign(data))
    assert re.fullmatch(r"[^\n]{10,200}", str(caught.value))
