import itertools
import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from vae_runtime.errors import InputError
from vae_runtime.manifest import InputSpec, Likelihood
from vae_training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from vae_training.evaluate import measure, recalibrate
from vae_training.losses import Objective, kl_per_dimension
from vae_training.models import (
    VAE,
    Autoencoder,
    ModelConfig,
    build_model,
    config_from_dict,
    count_macs,
    count_parameters,
    default_config,
    reparameterize,
)
from vae_training.resnet import Attention

CHOICES = list(itertools.product(("batch", "group"), ("relu", "silu"), (False, True)))
LARGE = {"norm": "group", "activation": "silu", "attention": True}


def tiny(kind: str = "vae", side: int = 16, **changes: Any) -> Autoencoder:
    torch.manual_seed(0)
    return build_model(
        ModelConfig(**{**_CONFIG, "kind": kind, "input_shape": (3, side, side), **changes})  # type: ignore[arg-type]
    )


_CONFIG = {
    "family": "resnet",
    "kind": "vae",
    "input_shape": (3, 16, 16),
    "latent_dim": 3,
    "widths": (8, 12),
    "depth": 1,
}


@pytest.mark.parametrize(("norm", "activation", "attention"), CHOICES)
def test_any_multiple_goes_through_with_a_latent_of_its_own_size(norm: str, activation: str, attention: bool) -> None:
    model = tiny(norm=norm, activation=activation, attention=attention).eval()
    config = model.config
    assert (config.multiple_of, config.latent_shape, config.is_fully_convolutional) == (4, (3, 4, 4), True)
    for height, width in ((1, 1), (3, 2), (5, 7), (4, 4)):
        x = torch.rand(2, 3, 4 * height, 4 * width)
        mean, logvar = model.encode(x)
        assert mean.shape == logvar.shape == (2, 3, height, width)
        reconstruction = model.decode(mean)
        assert reconstruction.shape == x.shape
        assert 0 <= reconstruction.min() <= reconstruction.max() <= 1
    kinds = {type(layer) for layer in model.modules()}
    assert (nn.BatchNorm2d in kinds, nn.GroupNorm in kinds) == (norm == "batch", norm == "group")
    assert (nn.ReLU in kinds, nn.SiLU in kinds, Attention in kinds) == (
        activation == "relu",
        activation == "silu",
        attention,
    )


def test_an_autoencoder_gives_the_code_alone() -> None:
    assert tiny("autoencoder").encode(torch.rand(2, 3, 8, 12)).shape == (2, 3, 2, 3)


def test_other_families_keep_what_they_had() -> None:
    config = default_config("conv", "vae", (1, 8, 8), 5)
    assert (config.multiple_of, config.latent_shape, config.is_fully_convolutional) == (1, (5,), False)
    assert set(config.to_dict()) == {"family", "kind", "input_shape", "latent_dim", "widths", "depth"}


def test_the_default_is_what_the_edge_wants() -> None:
    """Only layers that fold or that every engine runs well, in blocks of 16 channels; nothing at full resolution."""
    model = build_model(default_config("resnet", "vae", (3, 64, 64), 4))
    leaves = {type(layer) for layer in model.modules() if not list(layer.children())}
    assert leaves == {nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Upsample, nn.PixelShuffle}
    convolutions = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    assert all(layer.in_channels % 16 == 0 or layer.in_channels in (3, 4) for layer in convolutions)
    assert max(count_macs(model).values()) < 65e6


def test_with_batch_norm_an_output_sees_a_finite_part_and_with_the_others_all() -> None:
    x = torch.rand(1, 3, 96, 96)
    y = x.clone()
    y[..., :8, :8] = 1 - y[..., :8, :8]
    for changes, everywhere in (({}, False), ({"norm": "group"}, True), ({"attention": True}, True)):
        model = tiny(**changes).eval()
        with torch.no_grad():
            first, second = model.encode(x)[0], model.encode(y)[0]
        assert not torch.equal(first[..., 0, 0], second[..., 0, 0])
        assert torch.equal(first[..., -1, -1], second[..., -1, -1]) != everywhere


def test_attention_against_a_loop() -> None:
    torch.manual_seed(3)
    layer = Attention(build_config(**LARGE), 8)
    x = torch.randn(2, 8, 3, 5)
    with torch.no_grad():
        given = layer(x)
        query, key, value = (part.flatten(2).double() for part in layer.query_key_value(layer.norm(x)).chunk(3, dim=1))
        expected = torch.empty(2, 8, 15, dtype=torch.float64)
        for example, position in itertools.product(range(2), range(15)):
            scores = torch.exp((query[example, :, position, None] * key[example]).sum(0) / 8**0.5)
            expected[example, :, position] = (value[example] * scores / scores.sum()).sum(1)
        expected = x + layer.output(expected.float().reshape(2, 8, 3, 5))
    torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5)


def build_config(**changes: Any) -> ModelConfig:
    return ModelConfig(**{**_CONFIG, **changes})


@pytest.mark.parametrize("changes", [{}, LARGE], ids=["edge", "large"])
def test_gradients_reach_every_parameter(changes: dict[str, Any]) -> None:
    model = tiny(**changes)
    assert isinstance(model, VAE)
    x = torch.rand(3, 3, 16, 16)
    mean, logvar = model.encode(x)
    logits = model.decode_logits(reparameterize(mean, logvar, torch.randn_like(mean)))
    ((logits - x).square().sum() + logvar.square().sum()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_size_and_cost_are_counted() -> None:
    model = tiny(widths=(4,), latent_dim=2, depth=0, input_shape=(3, 4, 6))
    assert count_parameters(model) == (3 * 4 * 9 + 8) + (4 * 4 * 9 + 4) + (2 * 4 * 9 + 8) + (4 * 12 * 9 + 12)
    assert count_macs(model) == {"encode": 6 * 9 * (12 + 16), "decode": 6 * 9 * (8 + 48)}
    attending = tiny(widths=(4,), latent_dim=2, depth=0, input_shape=(3, 4, 6), attention=True)
    extra = 6 * (2 * 9 * 16 + 16 * 4) + 2 * 4 * 6 * 6  # a residual block, four 1×1 convolutions, two products
    assert count_macs(attending)["encode"] == count_macs(model)["encode"] + extra


def test_config_round_trip_through_json() -> None:
    config = build_config(**LARGE)
    assert config_from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": "layer"}, "norm is 'layer'; expected one of batch, group"),
        ({"activation": "gelu"}, "activation is 'gelu'; expected one of relu, silu"),
        ({"attention": 1}, "config.attention is 1; expected true or false"),
        ({"input_shape": [3, 18, 16]}, r"input_shape is \[3, 18, 16\]; the resnet family with 2 widths takes images"),
        ({"input_shape": [3]}, r"H and W multiples of 4 up to 8192"),
        ({"family": "conv", "norm": "group"}, "norm 'group' is for the resnet family alone, and family is 'conv'"),
        ({"family": "conv", "attention": True}, "^attention is for the resnet family alone, and family is 'conv'"),
    ],
)
def test_bad_configs_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        config_from_dict({**_CONFIG, **change})


def objective(**changes: Any) -> Objective:
    return Objective(tiny(**changes), "gaussian", scale=0.3)


def test_figures_of_spatial_latents_against_a_computation_in_float64() -> None:
    made, x = objective().eval(), np.random.default_rng(0).random((9, 3, 16, 16), np.float32)
    figures = measure(made, x, seed=0, draws=2)
    with torch.no_grad():
        mean, logvar = (part.double().numpy() for part in made.model.encode(torch.from_numpy(x)))
    kl = 0.5 * (mean**2 + np.exp(logvar) - 1 - logvar)
    assert figures["kl_nats"] == pytest.approx(kl.reshape(9, -1).sum(1).mean(), rel=1e-5)
    assert figures["active_units"] == int((mean.transpose(0, 2, 3, 1).reshape(-1, 3).var(0) > 0.01).sum())
    assert 0 <= figures["active_units"] <= 3


def test_the_kl_is_summed_over_channels_and_positions() -> None:
    mean, logvar = torch.full((2, 3, 4, 5), 1.0), torch.zeros(2, 3, 4, 5)
    assert kl_per_dimension(mean, logvar).flatten(1).sum(1).tolist() == [30, 30]
    made, x = objective(), torch.rand(4, 3, 16, 16)
    mean, logvar = made.model.encode(x)
    reconstruction = made.negative_log_likelihood(made.model.decode_logits(mean), x).mean()
    expected = reconstruction + 0.5 * kl_per_dimension(mean, logvar).flatten(1).sum(1).mean()
    torch.testing.assert_close(made(x, torch.zeros(4, 3, 4, 4), 0.5), expected)


def test_recalibration_forgets_other_statistics() -> None:
    made, x = objective(), np.random.default_rng(0).random((9, 3, 16, 16), np.float32)
    norm = next(layer for layer in made.model.modules() if isinstance(layer, nn.BatchNorm2d))
    norm.running_mean.fill_(100.0)  # type: ignore[operator]
    recalibrate(made, x, seed=0)
    assert norm.running_mean is not None
    assert float(norm.running_mean.abs().max()) < 10
    assert not made.training


def test_a_checkpoint_survives_and_an_old_one_still_loads(tmp_path: Any) -> None:
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8))
    model = tiny(**LARGE)
    spec, likelihood = InputSpec("image", (3, 16, 16), "rgb", "exact"), Likelihood("laplace", scale=0.05)
    examples = {"train": images, "held_out": images[:1].clone()}
    checkpoint = Checkpoint("vae", model.config, model.state_dict(), spec, likelihood, examples)
    save_checkpoint(tmp_path / "model.pt", checkpoint)
    loaded = load_checkpoint(tmp_path / "model.pt")
    assert (loaded.config, loaded.likelihood) == (model.config, likelihood)
    x = torch.rand(2, 3, 8, 20)
    assert torch.equal(loaded.build_model()(x), model.eval()(x))
    old = {
        key: value for key, value in build_config().to_dict().items() if key not in ("norm", "activation", "attention")
    }
    assert config_from_dict(old) == build_config()
