"""How a network of others is read, with its own forward as a witness, and what is said where it does not run."""

from __future__ import annotations

import contextlib
import copy
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vae_export import export_bundle
from vae_export.imported import ImportOptions
from vae_export.importers import factory
from vae_export.importers.network import UnusedWeightsWarning
from vae_export.importers.state_dict import LeftOutWeightsWarning
from vae_export.importers.witness import ForwardDisagreesWarning
from vae_export.quality import ExportWarning
from vae_runtime.errors import ExportError, InputError
from vae_runtime.manifest import LOGVAR, MEAN

MODULE = "networks_of_the_witness_tests"
SOURCE = '''
import torch
from torch import nn
from torch.distributions import Independent, Normal
from torch.nn import functional as F

class Halves(nn.Module):
    """encoder gives moments in one tensor, which forward alone takes apart; images (1, 4, 4) in [0, 1]."""
    def __init__(self, outputs=6):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.BatchNorm1d(12), nn.Linear(12, outputs))
        self.decoder = nn.Sequential(nn.Linear(3, 16), nn.Sigmoid(), nn.Unflatten(1, (1, 4, 4)))
        nn.init.uniform_(self.encoder[2].running_mean)
    def parts(self, h):
        return h.chunk(2, 1)
    def draw(self, mean, logvar):
        return mean + (logvar / 2).exp() * torch.randn_like(mean)
    def forward(self, x):
        mean, logvar = self.parts(self.encoder(x))
        return self.decoder(self.draw(mean, logvar)), mean, logvar

class InEval(Halves):
    def draw(self, mean, logvar):
        return super().draw(mean, logvar) if self.training else mean

# forward bears these out

class Named(InEval):
    def forward(self, x):
        reconstruction, mean, logvar = super().forward(x)
        posterior = Independent(Normal(mean, (logvar / 2).exp()), 1)
        return {"reconstruction": reconstruction, "posterior": posterior, "loss": 0}

class Images(InEval):
    """Halves of vectors, whose forward has images."""
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = self.encoder[1:], self.decoder[:1]
    def forward(self, x):
        return super().forward(x)[0].view(-1, 1, 4, 4).sigmoid()

class Overwriting(InEval):
    def encode(self, x):
        return self.parts(self.encoder(x.mul_(2).sub_(1)))
    def decode(self, z):
        return self.decoder(z)
    def forward(self, x):
        mean, logvar = self.encode(x)
        return self.decode(mean), mean, logvar

class Taught(InEval):
    def forward(self, x):  # also its input, and what is made of random numbers
        reconstruction, mean, logvar = super().forward(x)
        return [reconstruction, x, mean, logvar, torch.rand_like(mean), torch.rand(()), torch.zeros(())]

class Supervised(Halves):
    def forward(self, x, labels):
        raise NotImplementedError

class Squashed(InEval):
    def forward(self, x):  # decode has a sigmoid more
        reconstruction, mean, logvar = super().forward(x)
        return reconstruction.logit(), mean, logvar

class Trained(Squashed):  # in logits, as a loss takes them
    def __init__(self):
        super().__init__()
        nn.init.normal_(self.decoder[0].weight, std=5)

class Upward(Halves):
    def draw(self, mean, logvar):
        return super().draw(mean, logvar) if self.training else mean + (logvar / 2).exp()

class Changing(InEval):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.ones(()))
    def parts(self, h):
        self.calls += 1
        return super().parts(h)
    def encode(self, x):
        return super().parts(self.encoder(x) * self.calls)
    def decode(self, z):
        return self.decoder(z.clamp_(-0.1, 0.1))
    def forward(self, x):
        mean, logvar = self.parts(self.encoder(x))
        return self.decode(mean.clone()), mean, logvar

class Echo(InEval):
    def forward(self, x):
        return x, *super().forward(x)[1:]

class Signed(InEval):
    """Takes and gives [-1, 1]."""
    def __init__(self):
        super().__init__()
        self.decoder[1] = nn.Tanh()

class SignedEcho(Signed, Echo):
    pass

class Deviation(Halves):
    """What forward gives beside a sample is no reconstruction."""
    def forward(self, x):
        reconstruction, mean, logvar = super().forward(x)
        return reconstruction, torch.full_like(reconstruction, 0.1), mean, logvar

class Sampling(Halves):
    def forward(self, x):
        z = self.draw(*self.parts(self.encoder(x)))
        return self.decoder(z), z

class Clamped(InEval):
    """A decoder that goes beyond [0, 1], which a bundle cuts too."""
    def __init__(self):
        super().__init__()
        self.decoder[1] = nn.Hardtanh(-0.2, 1.2)
    def forward(self, x):
        reconstruction, mean, logvar = super().forward(x)
        return reconstruction.clamp(0, 1), mean, logvar

class SignedClamped(Signed):
    def __init__(self):
        super().__init__()
        self.decoder[1] = nn.Hardtanh(-1.2, 1.2)
    def forward(self, x):
        reconstruction, mean, logvar = super().forward(x)
        return reconstruction.clamp(-1, 1), mean, logvar

class SignedInside(Signed):
    """Its forward, unlike its halves, takes and gives [0, 1]."""
    def forward(self, x):
        reconstruction, mean, logvar = super().forward(2 * x - 1)
        return (reconstruction + 1) / 2, mean, logvar

class Divergence(Halves):
    def forward(self, x):
        reconstruction, mean, logvar = super().forward(x)
        return reconstruction, (mean**2 + logvar.exp() - 1 - logvar) / 2

class Precision(InEval):
    def forward(self, x):
        reconstruction, mean, logvar = super().forward(x)
        return reconstruction, mean, (-logvar).exp()

class Guarded(InEval):
    def forward(self, x):
        reconstruction, mean, logvar = super().forward(x)
        return reconstruction, mean, (logvar / 2).exp() + 1e-3

class Losses(Halves):
    def forward(self, x):
        reconstruction, mean, logvar = super().forward(x)
        return {"kl": mean**2, "logits": logvar, "pixel_loss": (x - 0.5) ** 2}

class ChannelsLast(InEval):
    def __init__(self):
        super().__init__()
        self.encoder[1] = nn.Linear(32, 12)
        self.decoder = nn.Sequential(nn.Linear(3, 32), nn.Unflatten(1, (2, 4, 4)))
    def forward(self, x):
        reconstruction, mean, logvar = super().forward(x)
        return reconstruction.permute(0, 2, 3, 1), mean, logvar

class Large(InEval):
    """Sums in another order, by which those near 0 differ by more than their own size."""
    def __init__(self):
        super().__init__()
        self.decoder = nn.Sequential(nn.Linear(3, 16), nn.Unflatten(1, (1, 4, 4)))
        nn.init.uniform_(self.decoder[0].weight, -3000, 3000)
    def forward(self, x):
        reconstruction, mean, logvar = super().forward(x)
        return reconstruction + 0.001, mean, logvar

class Sparse(InEval):
    def forward(self, x):
        reconstruction, mean, logvar = super().forward(x)
        return reconstruction, mean.to_sparse(), mean, logvar

class Closed(Halves):
    def __init__(self):
        super().__init__()
        def forward(x):
            return self.encoder(x)[:, :3] + 1
        self.forward = forward

def in_inference():
    with torch.inference_mode():
        return InEval()

# and these it does not

class Interleaved(Halves):
    def parts(self, h):
        return h.view(-1, 3, 2).unbind(-1)

class Swapped(InEval):
    def parts(self, h):
        return h.chunk(2, 1)[::-1]

class Softplus(Halves):
    def parts(self, h):
        mean, spread = h.chunk(2, 1)
        return mean, 2 * F.softplus(spread).log()

class Outside(InEval):
    def __init__(self):
        super().__init__()
        self.mean, self.logvar = nn.Linear(6, 3), nn.Linear(6, 3)
    def parts(self, h):
        return self.mean(h), self.logvar(h)

class Logits(InEval):
    def __init__(self):
        super().__init__()
        self.decoder = nn.Sequential(nn.Linear(3, 16), nn.Unflatten(1, (1, 4, 4)))
    def forward(self, x):
        reconstruction, mean, logvar = super().forward(x)
        return reconstruction.sigmoid(), mean, logvar

class InLogits(Logits):
    def forward(self, x):
        mean, logvar = self.parts(self.encoder(x))
        return self.decoder(mean), mean, logvar

class Code(InEval):
    def encode(self, x):
        return self.parts(self.encoder(x))[0]
    def decode(self, z):
        return self.decoder(z)

class Kept(InEval):
    """It keeps what was computed with gradients, and takes its parts in another order."""
    def __init__(self):
        super().__init__()
        self.encoder[3] = nn.utils.weight_norm(self.encoder[3])
        self.last = self.encoder[1].weight.sum()
    def parts(self, h):
        return h.chunk(2, 1)[::-1]

class Shuffled(Swapped):
    def encode(self, x):
        return self.encoder(x).chunk(2, 1)
    def decode(self, z):
        return self.decoder(z)

def compiled():
    return torch.compile(Shuffled())

class Elsewhere(Softplus):
    def encode(self, x):
        return self.encoder(x).chunk(2, 1)
    def decode(self, z):
        return self.decoder(z)
    def forward(self, x):
        _, mean, logvar = super().forward(x)
        return {"q": Independent(Normal(mean, (logvar / 2).exp()), 1)}

# weights that run in vain

class Pair(Code):
    def encode(self, x):
        return self.parts(self.encoder(x))

class Dropped(Code):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 3)
    def encode(self, x):
        mean = super().encode(x)
        self.head(mean)
        return mean
    forward = nn.Module.forward

class Frozen(Dropped):
    def encode(self, x):
        with torch.no_grad():
            h = self.encoder(x)
        return self.head(self.parts(h)[0])

class FrozenDropped(Frozen):
    def encode(self, x):
        super().encode(x)
        return self.parts(self.encoder(x))[0]

class Hidden(Dropped):
    """What its weights give goes on out of sight."""
    def encode(self, x):
        h = self.encoder(x)
        if not torch.compiler.is_compiling() and type(h) is torch.Tensor:
            h = torch.from_numpy(h.detach().numpy().copy())
        return self.head(self.parts(h)[0])

class Strict(Hidden):
    """And may not be just anything."""
    def encode(self, x):
        assert self.encoder[1].weight.max() < 1
        return super().encode(x)

class Scaled(Dropped):
    def encode(self, x):
        factor = float(self.head.bias.detach().sum() + self.head.weight.detach().sum())
        return self.parts(self.encoder(x))[0] * factor

# what does not run, or is misread

class Flat(Halves):
    def __init__(self):
        super().__init__()
        self.encoder = self.encoder[1:]

class Cuda(Code):
    def encode(self, x):
        raise AssertionError("Torch not compiled with CUDA enabled")

class Conditional(Code):
    def encode(self, x, y):
        return x

class Same(Code):
    def encode(self, x):
        mean = super().encode(x)
        return mean, mean

class Misnamed(Code):
    def encode(self, x):
        mean, var = self.encoder(x).chunk(2, 1)
        return {"mu": mean, "var": var}

class Scripted(Code):
    def __init__(self):
        super().__init__()
        self.encoder = torch.jit.script(self.encoder)
'''
SCRIPT = """
import argparse
print(argparse.ArgumentParser().parse_args())
from networks_of_the_witness_tests import Halves
"""


@pytest.fixture(scope="module", autouse=True)
def importable(networks: Any) -> None:
    """All tests here name factories in it."""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("script_of_the_witness_tests", None)


def load(name: str, shape: tuple[int, ...] = (1, 4, 4), **options: Any) -> Any:
    said = ImportOptions(input_shape=shape, **{"input_range": "unit" if len(shape) == 3 else None, **options})
    return factory.load(f"{MODULE}:{name}", said).halves


@pytest.mark.parametrize(
    "name",
    [
        "Halves",
        "InEval",
        "Named",
        "Taught",
        "Supervised",
        "Overwriting",
        "Trained",
        "Upward",
        "Changing",
        "Echo",
        "Clamped",
        "Sampling",
        "Divergence",
        "Precision",
        "Guarded",
        "Losses",
        "Large",
        "Sparse",
        "Closed",
        "Deviation",
        "Frozen",
        "Hidden",
        "Strict",
        "Scaled",
        "in_inference",
    ],
)
def test_networks_that_their_forward_bears_out(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", ExportWarning)
        load(name)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Interleaved", "none of its outputs with the shape of a latent is the mean that is read here; let encode ret"),
        ("Swapped", "its reconstruction is not what decode gives for the mean: .* in another order"),
        (
            "Softplus",
            r"one is the mean, but none is the spread that is read here, .*; say what it is \(--spread\), or",
        ),
        ("Logits", r"its reconstruction is not what decode gives for the mean: .*sigmoid \(--logits\)"),
        ("Images", "its reconstruction is not what decode gives for the mean"),
        ("Squashed", "its reconstruction is not what decode gives for the mean"),
        ("Kept", "its reconstruction is not what decode gives for the mean"),
        ("compiled", "its reconstruction is not what decode gives for the mean"),
        ("Elsewhere", "one is the mean, but none is the spread that is read here"),
        ("Code", "it gives a second tensor of the code's shape, which may be a VAE's log-variance, but encode gives"),
    ],
)
def test_networks_that_it_does_not_bear_out(name: str, said: str) -> None:
    with pytest.warns(ForwardDisagreesWarning, match=f"forward contradicts how .* are read: .*{said}"):
        load(name, (16,) if name == "Images" else (1, 4, 4))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("InEval", "the encoder's one output is cut in two, the mean and its spread"),
        ("Code", "the encoder's output is read as the code of an autoencoder"),
        ("Misnamed", "the encoder's outputs are mean and variance, as they are named"),
        ("Pair", "the encoder's two outputs are read as mean and spread"),
    ],
)
def test_how_the_encoder_is_read_is_told(name: str, said: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "vae_export"), contextlib.suppress(InputError), warnings.catch_warnings():
        warnings.simplefilter("ignore", ForwardDisagreesWarning)
        load(name)
    assert [record.message for record in caplog.records] == [said]


def test_what_the_options_say_is_borne_out() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", ExportWarning)
        load("Logits", logits=True)
        load("Signed", input_range="signed")
        load("SignedEcho", input_range="signed")
        load("SignedInside", input_range="signed")
        load("SignedClamped", input_range="signed")
        load("InLogits", logits=True)
        load("Code", kind="autoencoder")
        load("ChannelsLast", (2, 4, 4))


def test_the_network_stays_as_it_was_before_it_testified() -> None:
    x = np.random.default_rng(0).random((2, 1, 4, 4), np.float32)
    first = load("Changing").encode(x)[MEAN]
    network = sys.modules[MODULE].Changing().eval()  # type: ignore[attr-defined]
    np.testing.assert_allclose(first, network.encode(torch.from_numpy(x))[0].detach(), atol=1e-6)


def test_modules_testify_too_and_nothing_of_theirs_or_the_callers_is_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = sys.modules[MODULE].Shuffled()  # type: ignore[attr-defined]
    network.decoder.requires_grad_(False)
    network.extra = torch.nn.Linear(3, 3)
    before, wanted = copy.deepcopy(network.state_dict()), [one.requires_grad for one in network.parameters()]

    def draw(mean: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
        sys.stdout.write("drawn\n")
        return mean + 0 * torch.randn(()) + 0 * network.extra(mean)

    network.draw = draw
    random = torch.random.get_rng_state()
    x = np.random.default_rng(0).random((4, 1, 4, 4), np.float32)
    with (
        pytest.warns(UnusedWeightsWarning, match="of extra: "),
        pytest.warns(ForwardDisagreesWarning, match=r"is not what decode gives .* sigmoid \(logits\)") as caught,
    ):
        export_bundle(network.encode, network.decode, tmp_path / "b.vae", examples=x)
    assert [one.filename for one in caught if one.category is ForwardDisagreesWarning] == [__file__]
    assert capsys.readouterr() == ("", "drawn\ndrawn\n")
    assert random.equal(torch.random.get_rng_state())
    assert [one.requires_grad for one in network.parameters()] == wanted
    assert all(one.grad is None for one in network.parameters())
    for name, value in network.state_dict().items():
        assert value.equal(before[name]), name


def test_layers_behind_the_encoder_are_missed_twice() -> None:
    with (
        pytest.warns(ForwardDisagreesWarning, match=r"none of its outputs .* is the mean that is read here"),
        pytest.warns(UnusedWeightsWarning, match="neither .* depends on the weights of mean, logvar: "),
    ):
        load("Outside")


@pytest.mark.parametrize("name", ["Dropped", "FrozenDropped"])
def test_weights_whose_result_is_dropped_are_warned_of(name: str) -> None:
    with pytest.warns(UnusedWeightsWarning, match="neither .* depends on the weights of head: what the network's forw"):
        halves = load(name)
    x = np.random.default_rng(0).random((2, 1, 4, 4), np.float32)
    network = getattr(sys.modules[MODULE], name)().eval()
    np.testing.assert_allclose(halves.encode(x)[MEAN], network.encode(torch.from_numpy(x)).detach(), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        (
            "Flat",
            {},
            ExportError,
            r"takes vectors, \(8, 16\), and no images, .* end with \.view\(-1, 1, 4, 4\), or .* 16$",
        ),
        ("Cuda", {}, ExportError, "batch of shape .*: its code asks for CUDA, and is run on the CPU here"),
        (
            "Conditional",
            {},
            ExportError,
            "argument: 'y'; either half takes one input: of a conditional VAE, make a bun",
        ),
        ("Same", {}, ExportError, "the encoder returns the same values as mean and as log-variance"),
        ("Misnamed", {}, InputError, "names its second output 'variance', .* negative: say what it is with --spread$"),
        ("Misnamed", {"spread": "std"}, InputError, "--spread is 'std', but that has values from -.*; a std is never"),
        ("Halves", {"kind": "autoencoder"}, InputError, "a mean and a spread, as it is read; an autoencoder's encoder"),
    ],
)
def test_refused_with_the_cure(name: str, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load(name, **options)


def test_a_spread_that_cannot_be_what_it_is_called_may_be_said() -> None:
    x = np.random.default_rng(0).random((2, 1, 4, 4), np.float32)
    with pytest.warns(ForwardDisagreesWarning):
        want = load("Code").encode(x)[MEAN]
    found = load("Misnamed", spread="log_std").encode(x)
    network = sys.modules[MODULE].Misnamed().eval()  # type: ignore[attr-defined]
    np.testing.assert_allclose(found[MEAN], want, atol=1e-6)
    np.testing.assert_allclose(found[LOGVAR], 2 * network.encode(torch.from_numpy(x))["var"].detach(), atol=1e-5)


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::vae_export.importers.witness.ForwardDisagreesWarning"
)
def test_weights_of_a_part_in_torchscript_are_looked_at(here: Path) -> None:
    torch.save(sys.modules[MODULE].Code().state_dict(), here / "w.pt")  # type: ignore[attr-defined]
    assert load("Scripted", weights=str(here / "w.pt")).kind == "autoencoder"


def test_a_script_that_parses_its_command_line_sees_none_of_ours(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "script_of_the_witness_tests.py").write_text(SCRIPT)
    monkeypatch.setattr(sys, "argv", ours := ["vae-export", "--weights", "w.pt"])
    options = ImportOptions(input_shape=(1, 4, 4), input_range="unit")
    assert factory.load("script_of_the_witness_tests:Halves", options).halves.kind == "vae"
    assert sys.argv == ours == ["vae-export", "--weights", "w.pt"]


@pytest.mark.parametrize("average", ["ema_model", "ema", "model_ema"])
def test_an_average_beside_the_model_is_left_out(average: str, here: Path) -> None:
    weights = sys.modules[MODULE].Halves().state_dict()  # type: ignore[attr-defined]
    both = {f"model.{name}": 0.9 * value for name, value in weights.items() if value.is_floating_point()}
    both |= {f"model.{name}": value for name, value in weights.items() if not value.is_floating_point()}
    both |= {f"{average}.{name}": value for name, value in weights.items()}
    torch.save(both, here / "both.ckpt")
    with pytest.warns(LeftOutWeightsWarning, match=rf"{average}\.encoder"):
        found = load("Halves", weights=str(here / "both.ckpt"))
    network = sys.modules[MODULE].Halves().eval()  # type: ignore[attr-defined]
    network.load_state_dict(
        {name.removeprefix("model."): value for name, value in both.items() if name[:6] == "model."}
    )
    x = np.random.default_rng(0).random((2, 1, 4, 4), np.float32)
    np.testing.assert_allclose(found.encode(x)[MEAN], network.encoder(torch.from_numpy(x)).detach()[:, :3], atol=1e-5)


def test_channels_that_come_last_are_asked_about() -> None:
    with (
        pytest.raises(ExportError),
        pytest.warns(ExportWarning, match="28x28x1, 28 channels of 28 by 1 .* pass 1x28x28$"),
    ):
        load("Halves", (28, 28, 1))
