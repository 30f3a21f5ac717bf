import json

import numpy as np
import pytest
import torch
from torch import nn

from vae_runtime.errors import InputError
from vae_training.models import (
    VAE,
    ModelConfig,
    build_model,
    config_from_dict,
    count_macs,
    count_parameters,
    default_config,
    reparameterize,
)

SIZES = [(1, 8, 8), (1, 9, 13), (1, 28, 28), (3, 32, 32), (3, 64, 64), (1, 8, 64), (3, 17, 100)]


@pytest.mark.parametrize("kind", ["vae", "autoencoder"])
@pytest.mark.parametrize("family", ["mlp", "conv"])
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_shapes_and_ranges_for_images_of_any_size(family: str, kind: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = build_model(default_config(family, kind, shape, 5))
    x = torch.rand(3, *shape)
    encoded = model.encode(x)
    mean = encoded[0] if kind == "vae" else encoded
    assert mean.shape == (3, 5)
    if kind == "vae":
        assert encoded[1].shape == (3, 5)
    reconstruction = model.decode(3 * torch.randn(3, 5))
    assert reconstruction.shape == x.shape
    assert 0 <= reconstruction.min() < reconstruction.max() <= 1
    assert model(x).shape == x.shape


def test_the_lowest_resolution_is_at_most_eight() -> None:
    assert default_config("conv", "vae", (1, 8, 8), 2).lowest_size == (4, 4)
    assert default_config("conv", "vae", (1, 28, 28), 2).lowest_size == (7, 7)
    assert default_config("conv", "vae", (1, 33, 64), 2).lowest_size == (5, 8)


def test_vectors_keep_their_units() -> None:
    torch.manual_seed(0)
    x = torch.randn(500, 4) * torch.tensor([1.0, 2.0, 3.0, 4.0]) + torch.tensor([100.0, 0.0, -5.0, 7.0])
    model = build_model(default_config("mlp", "vae", (4,), 2))
    model.fit_normalisation(x)
    torch.testing.assert_close(model.centre, x.mean(0))
    expected = float(np.sqrt(np.mean((x.numpy().astype(np.float64) - x.numpy().astype(np.float64).mean(0)) ** 2)))
    assert float(model.scale) == pytest.approx(expected, rel=1e-6)
    # A decoder that says "nothing special" gives the mean of the data.
    torch.testing.assert_close(model.to_mean(torch.zeros(1, 4))[0], x.mean(0))
    model.encoder = nn.Identity()
    normalised = torch.cat(model.encode(x), dim=1)
    assert float(normalised.square().mean()) == pytest.approx(1.0, rel=1e-5)
    assert "centre" in model.state_dict()


def test_constant_vectors_do_not_divide_by_zero() -> None:
    model = build_model(default_config("mlp", "vae", (3,), 2))
    model.fit_normalisation(torch.full((10, 3), 4.0))
    assert torch.isfinite(model(torch.full((2, 3), 4.0))).all()


def test_logvar_is_clamped() -> None:
    model = build_model(default_config("mlp", "vae", (1, 8, 8), 2))
    last = model.encoder[-1]
    assert isinstance(last, nn.Linear)
    with torch.no_grad():
        last.bias.copy_(torch.tensor([0.0, 0.0, 1000.0, -1000.0]))
    _, logvar = model.encode(torch.rand(1, 1, 8, 8))
    assert logvar.tolist() == [[20.0, -30.0]]


def test_reparameterize_against_numpy() -> None:
    rng = np.random.default_rng(0)
    mean, logvar, noise = (rng.standard_normal((4, 3)) for _ in range(3))
    z = reparameterize(*(torch.from_numpy(a) for a in (mean, logvar, noise)))
    np.testing.assert_allclose(z.numpy(), mean + np.sqrt(np.exp(logvar)) * noise, rtol=1e-12)


@pytest.mark.parametrize("family", ["mlp", "conv"])
def test_gradients_reach_every_parameter(family: str) -> None:
    torch.manual_seed(0)
    model = build_model(default_config(family, "vae", (3, 9, 13), 3))
    assert isinstance(model, VAE)
    x = torch.rand(4, 3, 9, 13)
    mean, logvar = model.encode(x)
    logits = model.decode_logits(reparameterize(mean, logvar, torch.randn_like(mean)))
    ((logits - x).square().sum() + logvar.square().sum()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_conv_family_is_what_the_edge_wants() -> None:
    """Only layers that fold or that every engine runs well: no transposed convolution, one shuffle of pixels."""
    allowed = (nn.Sequential, nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.PixelShuffle, nn.Linear, nn.Flatten, nn.Unflatten)
    allowed = (*allowed, nn.BatchNorm1d, nn.Upsample)
    for side in (28, 64):
        model = build_model(default_config("conv", "vae", (1, side, side), 20))
        assert {type(layer) for layer in model.modules()} - {VAE} <= set(allowed)
        assert sum(isinstance(layer, nn.PixelShuffle) for layer in model.modules()) == 1
        blocked = [layer for layer in model.decoder.modules() if isinstance(layer, nn.Conv2d)]
        assert all(layer.in_channels % 16 == 0 for layer in blocked)  # the widest blocks of onnxruntime's layout
        assert all(layer.out_channels % 16 == 0 for layer in blocked[:-1])


def test_size_and_cost_are_counted() -> None:
    model = build_model(ModelConfig("mlp", "vae", (1, 28, 28), 20, (400,)))
    assert count_parameters(model) == 784 * 400 + 400 + 400 * 40 + 40 + 20 * 400 + 400 + 400 * 784 + 784
    assert count_macs(model) == {"encode": 784 * 400 + 400 * 40, "decode": 20 * 400 + 400 * 784}
    conv = build_model(ModelConfig("conv", "vae", (1, 8, 8), 2, (4,), 1))
    # 4×4 positions: 9·1·4 weights down; 4·16 features -> 4.
    assert count_macs(conv)["encode"] == 16 * 36 + 64 * 4
    assert conv.training


def test_config_round_trip_through_json() -> None:
    config = default_config("conv", "vae", (3, 32, 32), 7)
    assert config_from_dict(json.loads(json.dumps(config.to_dict()))) == config


GOOD = {
    "family": "conv", "kind": "vae", "input_shape": [1, 8, 8], "latent_dim": 4, "widths": [8], "depth": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": 3}, "config has the unknown key 'colour'; expected family, kind"),
        ({"latent_dim": None}, "config.latent_dim is None; expected a whole number"),
        ({"latent_dim": "4"}, "config.latent_dim is '4'; expected a whole number"),
        ({"latent_dim": True}, "config.latent_dim is True; expected a whole number"),
        ({"latent_dim": 4.0}, "config.latent_dim is 4.0; expected a whole number"),
        ({"latent_dim": 0}, "latent_dim is 0; expected from 1 to 65536"),
        ({"latent_dim": 10**9}, "latent_dim is 1000000000; expected from 1 to 65536"),
        ({"family": "unet"}, "family is 'unet'; expected one of mlp, conv, resnet"),
        ({"kind": "gan"}, "kind is 'gan'; expected one of vae, autoencoder"),
        ({"kind": 3}, "config.kind is 3; expected a string"),
        ({"input_shape": 8}, "config.input_shape is 8; expected a list"),
        ({"input_shape": [8, 8]}, r"input_shape is \[8, 8\]; expected \(C, H, W\) or \(D,\)"),
        ({"input_shape": [1, 0, 8]}, r"input_shape is \[1, 0, 8\]"),
        ({"input_shape": [1, 7, 8]}, "the conv family takes images"),
        ({"input_shape": [64]}, "the conv family takes images"),
        ({"input_shape": [2**20, 8000, 8000]}, "expected at most"),
        ({"widths": []}, r"widths is \[\]; expected 1 to 16 numbers"),
        ({"widths": [8] * 17}, "expected 1 to 16 numbers"),
        ({"widths": [0]}, r"widths is \[0\]"),
        ({"widths": ["8"]}, "config.widths is '8'; expected a whole number"),
        ({"depth": -1}, "depth is -1; expected from 0 to 16"),
        ({"family": "mlp"}, "depth is 1; the mlp family has none, its layers are those of widths"),
    ],
)
def test_bad_configs_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        config_from_dict({**GOOD, **change})


def test_a_missing_key_and_no_dict_at_all() -> None:
    config_from_dict(GOOD)
    with pytest.raises(InputError, match=r"config.widths is missing"):
        config_from_dict({key: value for key, value in GOOD.items() if key != "widths"})
    with pytest.raises(InputError, match="config is a list; expected a dict"):
        config_from_dict([1])  # type: ignore[arg-type]
