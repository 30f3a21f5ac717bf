import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vae_runtime.errors import InputError
from vae_runtime.manifest import InputSpec
from vae_training.config import TrainConfig, steps_per_epoch

GREY = InputSpec("image", (1, 8, 8), "grey", "exact")
COLOUR = InputSpec("image", (3, 64, 48), "rgb", "crop")
VECTOR = InputSpec("vector", (5,))


def test_defaults_follow_the_data() -> None:
    digits = TrainConfig("digits").resolve(GREY, 1437)
    assert digits.likelihood == "bernoulli"
    assert digits.epochs is not None
    assert digits.epochs * steps_per_epoch(1437, 128) >= 800
    assert TrainConfig("x").resolve(GREY, 100_000).epochs == 20
    assert TrainConfig("x").resolve(COLOUR, 100).likelihood == "gaussian"
    vectors = TrainConfig("x", family="mlp").resolve(VECTOR, 100)
    assert (vectors.likelihood, vectors.latent) == ("gaussian", 5)
    assert TrainConfig("x", latent=3, epochs=2, widths=(7,), depth=1).resolve(GREY, 9).model_config(GREY).widths == (7,)


def test_spatial_latents_have_defaults_of_their_own() -> None:
    spatial = TrainConfig("x", family="resnet").resolve(GREY, 100)
    assert (spatial.likelihood, spatial.beta, spatial.latent, spatial.norm) == ("gaussian", 1e-5, 4, "batch")
    assert TrainConfig("x").resolve(GREY, 100).beta == 1
    assert TrainConfig("x", family="resnet", beta=0.5).resolve(GREY, 100).beta == 0.5


def test_the_likelihood_is_measured_where_it_is_cheap_and_there_is_one() -> None:
    for settings, expected in (({}, 100), ({"family": "resnet"}, 0), ({"kind": "autoencoder"}, 0)):
        assert TrainConfig("x", **settings).resolve(GREY, 100).nll_samples == expected
    for samples in (0, 7):
        assert TrainConfig("x", family="resnet", nll_samples=samples).resolve(GREY, 100).nll_samples == samples


def test_a_capacity_takes_the_place_of_what_else_weighs_the_kl() -> None:
    config = TrainConfig("x", family="resnet", capacity=20).resolve(GREY, 100)
    assert (config.gamma, config.beta, config.kl_warmup) == (10.0, 1.0, 0.0)
    assert config.resolve(GREY, 100) == config  # as --resume does
    assert TrainConfig("x", capacity=20, gamma=3).resolve(GREY, 100).gamma == 3
    assert TrainConfig("x").resolve(GREY, 100).gamma is None


def test_an_autoencoder_has_no_settings_of_a_kl() -> None:
    for family in ("conv", "resnet"):
        config = TrainConfig("x", family=family, kind="autoencoder").resolve(GREY, 100)
        assert (config.beta, config.free_bits, config.kl_warmup) == (None, 0, 0)
        assert config.resolve(GREY, 100) == config


@pytest.mark.parametrize("labels", [3, (3.5,), ("3",), (True,)])
def test_labels_are_whole_numbers(labels: Any) -> None:
    with pytest.raises(InputError, match=r"exclude_label is .*; expected a (list|whole number)"):
        TrainConfig("digits", exclude_label=labels)


def test_numbers_of_numpy_and_lists_are_taken() -> None:
    config = TrainConfig("digits", exclude_label=[np.uint8(3)], seed=np.int64(7), beta=np.float32(0.5), widths=[8])  # type: ignore[arg-type]
    assert config == TrainConfig("digits", exclude_label=(3,), seed=7, beta=0.5, widths=(8,))
    assert (type(config.seed), type(config.beta), type(config.exclude_label[0])) == (int, float, int)
    assert json.loads(json.dumps(config.to_dict()))["seed"] == 7


def test_data_may_be_a_path() -> None:
    assert TrainConfig(Path("some") / "folder") == TrainConfig(str(Path("some/folder")))  # type: ignore[arg-type]
    for wrong in (3, None, b"digits"):
        with pytest.raises(InputError, match=r"data is .*; expected a string"):
            TrainConfig(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["size", "crop"])
@pytest.mark.parametrize("sides", [32, "32x32", (32,), (0, 32), (32, 32, 32)])
def test_sides_are_a_height_and_a_width(name: str, sides: Any) -> None:
    with pytest.raises(InputError, match=rf"{name} is .*32.*; expected height and width, from 1 to 8192"):
        TrainConfig("pictures", **{name: sides})


def test_round_trip() -> None:
    config = TrainConfig("pictures", size=(8, 9), beta=2, exclude_label=(3, 1))
    assert TrainConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sead": 1}, "config has the unknown key 'sead'"),
        ({"beta": -1}, "beta is -1.0; expected from 0 to"),
        ({"beta": float("nan")}, "config.beta is nan; expected a finite number"),
        ({"learning_rate": 0}, "learning_rate is 0.0; expected from 1e-09 to 10"),
        ({"epochs": 0}, "epochs is 0; expected from 1"),
        ({"epochs": 2.5}, "config.epochs is 2.5; expected a whole number"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"ema": 1.0}, "ema is 1.0"),
        ({"size": [8]}, r"size is \[8\]; expected height and width"),
        ({"binarize": "otsu"}, "binarize is 'otsu'; expected one of none, dynamic, threshold"),
        ({"likelihood": "cauchy"}, "likelihood is 'cauchy'; expected one of bernoulli, gaussian, laplace"),
        ({"gradient_weight": -1}, "gradient_weight is -1.0; expected from 0 to"),
        ({"crop": [8, 0]}, r"crop is \[8, 0\]; expected height and width"),
        ({"capacity": -1}, "capacity is -1.0; expected from 0 to"),
        ({"gamma": 0}, "gamma is 0.0; expected from 1e-06 to"),
        ({"nll_samples": -1}, "nll_samples is -1; expected from 0 to"),
        ({"exclude_label": ["3"]}, "config.exclude_label is '3'; expected a whole number"),
        ({"epochs": "5"}, "config.epochs is '5'; expected a whole number"),
        ({"widths": 5}, "config.widths is 5; expected a list"),
        ({"widths": [8.5]}, "config.widths is 8.5; expected a whole number"),
        ({"shift": 1.5}, "config.shift is 1.5; expected a whole number"),
        ({"attention": "yes"}, "config.attention is 'yes'; expected true or false"),
        ({"data": 5}, "config.data is 5; expected a string"),
        ({"mixed_precision": "fp8"}, "mixed_precision is 'fp8'"),
    ],
)
def test_bad_settings_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TrainConfig.from_dict({"data": "digits", **change})
    if "sead" not in change:
        with pytest.raises(InputError, match=message.removeprefix("config.")):
            TrainConfig(**{"data": "digits", **change})


@pytest.mark.parametrize(
    ("settings", "spec", "examples", "message"),
    [
        ({}, VECTOR, 100, "family is 'conv', but x holds vectors"),
        ({"family": "mlp", "likelihood": "bernoulli"}, VECTOR, 100, "likelihood is 'bernoulli', but x holds vectors"),
        ({"binarize": "dynamic"}, COLOUR, 100, "binarize is 'dynamic', but likelihood is 'gaussian'"),
        ({"shift": 8}, GREY, 100, "shift is 8; x has examples of shape"),
        ({"family": "mlp", "shift": 1}, VECTOR, 100, "shift is 1"),
        ({"family": "resnet"}, VECTOR, 100, "family is 'resnet', but x holds vectors"),
        ({"family": "mlp", "gradient_weight": 1}, VECTOR, 100, "gradient_weight is 1, but x holds vectors"),
        ({"flip": True}, COLOUR, 100, "flip is for crops of photographs; x is trained without crops"),
        ({"kind": "autoencoder", "nll_samples": 5}, GREY, 9, "nll_samples is 5, but kind is 'autoencoder'"),
        ({"kind": "autoencoder", "beta": 1}, GREY, 9, "beta is 1, but kind is 'autoencoder'; a vae has a KL"),
        ({"kind": "autoencoder", "free_bits": 0.5}, GREY, 9, "free_bits is 0.5, but kind is 'autoencoder'"),
        ({"kind": "autoencoder", "kl_warmup": 0.5}, GREY, 9, "kl_warmup is 0.5, but kind is 'autoencoder'"),
        ({"capacity": 5, "beta": 4}, GREY, 9, "beta is 4 and capacity 5; a capacity takes the place"),
        ({"capacity": 5, "free_bits": 0.5}, GREY, 9, "free_bits is 0.5 and capacity 5"),
        ({"capacity": 5, "kl_warmup": 0.5}, GREY, 9, "kl_warmup is 0.5 and capacity 5"),
        ({"capacity": 5, "patience": 3}, GREY, 9, "patience is 3 and capacity 5"),
        ({"capacity": 5, "kind": "autoencoder"}, GREY, 9, "capacity is 5, but kind is 'autoencoder'; a vae has a KL"),
        ({"gamma": 5}, GREY, 9, "gamma is 5, but capacity is 0"),
        ({}, GREY, 1, "the train part has 1 example; expected at least 2"),
    ],
)
def test_settings_that_do_not_go_with_the_data(
    settings: dict[str, object], spec: InputSpec, examples: int, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        TrainConfig("x", **settings).resolve(spec, examples)
