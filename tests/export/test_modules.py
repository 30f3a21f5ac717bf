"""`export_bundle` reads and tries two modules as every importer does, and refuses in the same words."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Independent, Normal

from vae_export import export_bundle
from vae_export.importers.network import UnusedWeightsWarning
from vae_runtime import VAE
from vae_runtime.errors import ExportError, InputError
from vae_runtime.manifest import Likelihood

X = np.random.default_rng(0).random((6, 1, 4, 4), dtype=np.float32)


class Encoder(nn.Module):
    """The forms that encoders have."""

    def __init__(self, form: str = "pair") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.form, self.layer, self.norm = form, nn.Linear(16, 6), nn.BatchNorm1d(6, track_running_stats=False)

    def forward(self, x: torch.Tensor) -> Any:
        output = self.layer(x.flatten(1))
        mean, logvar = output.chunk(2, dim=1)
        if self.form in ("inside", "checked"):  # the former checks its arguments by default
            inside = Normal(mean, (logvar / 2).exp(), **({"validate_args": True} if self.form == "checked" else {}))
            return inside.mean, 2 * inside.stddev.log()
        return {
            "pair": lambda: (mean, logvar),
            "dict": lambda: {"mu": mean, "logvar": logvar},
            "normal": lambda: Normal(mean, (logvar / 2).exp()),
            "independent": lambda: Independent(Normal(mean, (logvar / 2).exp()), 1),
            "moments": lambda: output,
            "std": lambda: (mean, (logvar / 2).exp()),
            "squeeze": lambda: output.squeeze().chunk(2, dim=-1),
            "triple": lambda: (mean, mean, logvar),
            "random": lambda: (mean + torch.randn_like(mean), logvar),
            "mixing": lambda: (mean - mean.mean(0), logvar),
            "norm": lambda: self.norm(output).chunk(2, dim=1),
            "nan": lambda: (mean / 0 * 0, logvar),
        }[self.form]()


class Decoder(nn.Module):
    def __init__(self, last: Any = torch.sigmoid) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer, self.last = nn.Linear(3, 16), last

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.last(9 * self.layer(z)).reshape(-1, 1, 4, 4)


class Squeezing(Decoder):
    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return super().forward(z).reshape(-1, 4, 4).squeeze()[..., None, :, :]


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder, self.drop = Encoder(), Decoder(), nn.Dropout(0.5)

    def encode(self, x: torch.Tensor) -> Any:
        return self.encoder(self.drop(x))

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return self.decoder(z)


def expected(x: np.ndarray = X) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        mean, logvar = Encoder()(torch.from_numpy(x))
        return mean, logvar, Decoder()(mean)


def check(path: Path) -> None:
    mean, logvar, images = expected()
    with VAE.load(path) as vae:
        posterior = vae.encode(X)
        np.testing.assert_allclose(posterior.mean, mean, atol=1e-5)
        np.testing.assert_allclose(posterior.logvar, logvar, atol=1e-5)
        np.testing.assert_allclose(vae.reconstruct(X), images, atol=1e-5)
        assert vae.selftest().passed


@pytest.mark.parametrize("form", ["dict", "normal", "independent", "moments", "inside"])
def test_every_form_of_a_posterior_is_taken(
    form: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        torch.distributions.Distribution, "_validate_args", True
    )  # torch's compiler turns it off for good
    export_bundle(Encoder(form), Decoder(), tmp_path / "a.vae", examples=X, likelihood="bernoulli")
    check(tmp_path / "a.vae")
    assert VAE.load(tmp_path / "a.vae").manifest.likelihood == Likelihood("bernoulli", binarize="none")
    assert capfd.readouterr() == ("", "")
    with pytest.raises(ValueError, match="scale"):  # distributions check their arguments again
        Normal(0.0, -1.0)


def test_a_standard_deviation_in_place_of_logvar_is_asked_about(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"never negative \(at least .* say what it is with spread logvar, log_std"):
        export_bundle(Encoder("std"), Decoder(), tmp_path / "a.vae", examples=X)
    export_bundle(Encoder("std"), Decoder(), tmp_path / "a.vae", examples=X, spread="std")
    check(tmp_path / "a.vae")


def test_methods_are_taken_with_the_mode_of_what_they_are_of(tmp_path: Path) -> None:
    both = Both()
    with pytest.warns(UnusedWeightsWarning, match=r"depends on the weights of encoder\.norm: ") as caught:
        export_bundle(both.encode, both.decode, tmp_path / "a.vae", examples=X)
    assert [one.filename for one in caught if one.category is UnusedWeightsWarning] == [__file__]
    assert both.training
    assert both.drop.training
    check(tmp_path / "a.vae")


def test_lazy_layers_keep_what_they_have_become(tmp_path: Path) -> None:
    encoder = nn.Sequential(nn.Flatten(), nn.LazyLinear(6), nn.LazyBatchNorm1d())
    export_bundle(encoder, Decoder(), tmp_path / "a.vae", examples=X)
    with torch.no_grad(), VAE.load(tmp_path / "a.vae") as vae:
        want = encoder.eval()(torch.from_numpy(X)).chunk(2, dim=1)[0]
        np.testing.assert_allclose(vae.encode(X).mean, want, atol=1e-5)


def test_modules_of_signed_images(tmp_path: Path) -> None:
    encoder, decoder = Encoder(), Decoder(torch.tanh)
    export_bundle(encoder, decoder, tmp_path / "a.vae", examples=X, input_range="signed")
    with torch.no_grad(), VAE.load(tmp_path / "a.vae") as vae:
        mean, logvar = encoder(2 * torch.from_numpy(X) - 1)
        np.testing.assert_allclose(vae.encode(X).mean, mean, atol=1e-5)
        np.testing.assert_allclose(vae.encode(X).logvar, logvar, atol=1e-5)
        np.testing.assert_allclose(vae.reconstruct(X), (decoder(mean) + 1) / 2, atol=1e-5)


def test_one_example_shows_as_well_what_mixes_rows(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"the encoder gives values that differ by .* mixes the rows of a batch"):
        export_bundle(Encoder("mixing"), Decoder(), tmp_path / "a.vae", examples=X[:1])


def test_what_the_exporter_prints_of_a_failure_is_kept_back(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[Any] = []
    monkeypatch.setattr(logging.getLogger("torch.fx.experimental.symbolic_shapes"), "handle", logged.append)
    with pytest.raises(ExportError, match=r"onnx: its code decides by the values of a tensor \(test_modules\.py, line"):
        export_bundle(Encoder("checked"), Decoder(), tmp_path / "a.vae", examples=X)
    assert capfd.readouterr() == ("", "")
    assert [record for record in logged if record.levelno >= logging.WARNING] == []


CLASS_RULE = r"encoder is the class Encoder; expected a torch.nn.Module, or a method of one: an instance, such as E"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"encoder": Encoder("triple")},
            ExportError,
            "the encoder returns 3 values of shapes .*leave out what is more",
        ),
        ({"encoder": Encoder("random")}, ExportError, "the encoder gives other values for the same input in a second"),
        (
            {"encoder": Encoder("norm")},
            ExportError,
            "the encoder does not run on a batch of shape .1, 1, 4, 4.",
        ),
        (
            {"encoder": Encoder("nan")},
            ExportError,
            "the encoder gives NaN or infinite values for the inputs",
        ),
        (
            {"encoder": Encoder("squeeze")},
            ExportError,
            r"the encoder loses the batch axis at a batch of 1: it gives shape \(3,\), expected \(1, 3\); squeeze\(\)",
        ),
        (
            {"decoder": Squeezing()},
            ExportError,
            r"the decoder loses the batch axis at a batch of 1: it gives shape \(1, 4, 4\), expected \(1, 1, 4, 4\)",
        ),
        ({"encoder": Decoder(), "decoder": Encoder()}, ExportError, "the encoder does not run on a batch of shape"),
        ({"decoder": Encoder()}, ExportError, "the decoder does not run on a batch of shape"),
        ({"encoder": Encoder("moments"), "kind": "autoencoder"}, InputError, "kind is 'autoencoder', but the encoder"),
        ({"kind": "autoencoder"}, InputError, "kind is 'autoencoder', but the encoder returns a mean and a spread"),
        ({"spread": "sigma"}, InputError, "spread is 'sigma'; expected one of logvar, log_std, std, variance"),
        ({"spread": "std"}, InputError, "spread is 'std', but that has values from -.*; a std is never negative"),
        (
            {"encoder": Encoder("normal"), "spread": "logvar"},
            InputError,
            "spread is 'logvar', but the encoder",
        ),
        ({"input_range": "0-1"}, InputError, "input_range is '0-1'; expected one of unit, signed"),
        ({"input_range": "signed"}, InputError, "input_range is 'signed', but the decoder gives no value below 0"),
        ({"logits": True}, InputError, "logits is True, but the decoder gives no value outside"),
        ({"encoder": Encoder}, InputError, CLASS_RULE),
        (
            {"encoder": Encoder().state_dict()},
            InputError,
            "encoder is a OrderedDict, as of weights; expected",
        ),
        ({"decoder": None}, InputError, "decoder is None; expected a torch.nn.Module, or a method of one"),
        ({"encoder": "encoder.pt"}, InputError, "encoder is 'encoder.pt'; expected a torch.nn.Module"),
        ({"likelihood": "gaussian"}, InputError, "likelihood.scale is None; .*gaussian:SCALE"),
        ({"likelihood": 0.1}, InputError, "likelihood is 0.1; expected bernoulli"),
    ],
)
def test_what_cannot_be_exported_is_named(change: Any, error: type[Exception], message: str, tmp_path: Path) -> None:
    arguments = {"encoder": Encoder(), "decoder": Decoder(), "examples": X, **change}
    with pytest.raises(error, match=message):
        export_bundle(path=tmp_path / "a.vae", **arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("form", ["pair", "moments"])
def test_weights_in_another_type_are_named_with_the_cure(form: str, dtype: torch.dtype, tmp_path: Path) -> None:
    encoder, decoder = Encoder(form), Decoder()
    for half, pair in (
        ("encoder", (Encoder(form).to(dtype), decoder)),
        ("decoder", (encoder, Decoder().to(dtype))),
    ):
        rule = rf"^the {half} does not run on float32: it has parameters or buffers in {dtype}; convert it with .float"
        with pytest.raises(ExportError, match=rule):
            export_bundle(*pair, tmp_path / "a.vae", examples=X)
    both = Both().to(dtype)
    with pytest.raises(
        ExportError, match=rf"^the encoder does not run on float32: it has parameters .* in {dtype}; convert"
    ):
        export_bundle(both.encode, both.decode, tmp_path / "a.vae", examples=X)


class Autocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(7, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.layer(x).float()


def test_what_computes_in_bfloat16_is_told_to_do_so_in_float32(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(8, 7)).astype(np.float32)
    with pytest.raises(
        ExportError, match=r"the encoder .* bfloat16 has little support: export it in float32, without autoc"
    ):
        export_bundle(Autocast(), nn.Linear(2, 7), tmp_path / "a.vae", examples=x, kind="autoencoder", tolerance=0.1)


def test_so_are_convolutions(tmp_path: Path) -> None:
    class Convolution(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(1, 1, 3, 1, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.layer(x)

    with pytest.raises(
        ExportError, match=r"the encoder .* bfloat16 has little support: export it in float32, without autoc"
    ):
        export_bundle(Convolution(), nn.Sigmoid(), tmp_path / "a.vae", examples=X, kind="autoencoder", tolerance=0.1)


def test_parts_in_torchscript_are_told_the_ways_there_are(tmp_path: Path) -> None:
    decoder = nn.Sequential(torch.jit.script(nn.Linear(3, 16)), nn.Sigmoid(), nn.Unflatten(1, (1, 4, 4)))
    with pytest.raises(
        ExportError, match=r"the decoder has a part in TorchScript, Linear, which .* without torch\.jit,"
    ):
        export_bundle(Encoder(), decoder, tmp_path / "a.vae", examples=X)


@pytest.mark.parametrize(
    ("dtype", "form"), [(torch.float16, "pair"), (torch.bfloat16, "moments"), (torch.float64, "pair")]
)
def test_outputs_in_another_type_become_float32(dtype: torch.dtype, form: str, tmp_path: Path) -> None:
    class Cast(nn.Module):
        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: torch.Tensor) -> Any:
            output = self.network(x)
            return output.to(dtype) if isinstance(output, torch.Tensor) else [one.to(dtype) for one in output]

    pair = Cast(Encoder()), Cast(Decoder())
    export_bundle(Cast(Encoder(form)), pair[1], tmp_path / "a.vae", examples=X)
    with torch.no_grad(), VAE.load(tmp_path / "a.vae") as vae:
        mean, logvar = (one.float().numpy() for one in pair[0](torch.from_numpy(X)))
        image = pair[1](torch.from_numpy(mean)).float().numpy()
        np.testing.assert_allclose(vae.encode(X).mean, mean, atol=1e-5)
        np.testing.assert_allclose(vae.encode(X).logvar, logvar, atol=1e-5)
        np.testing.assert_allclose(vae.decode(mean), image, atol=1e-5)


@pytest.mark.parametrize("name", ["examples", "calibrate"])
def test_tensors_that_numpy_cannot_hold_are_refused(name: str, tmp_path: Path) -> None:
    for tensor, sort in ((torch.from_numpy(X).bfloat16(), "bfloat16"), (torch.from_numpy(X).to_sparse(), "sparse_coo")):
        rule = rf"{name} is a tensor of shape \(6, 1, 4, 4\) in torch.{sort}; expected a dense one in float32 or uint8"
        with pytest.raises(InputError, match=rule):
            export_bundle(Encoder(), Decoder(), tmp_path / "a.vae", **{"examples": X, name: tensor})


def test_moments_along_the_last_axis_are_told_how_to_be_returned(tmp_path: Path) -> None:
    class Tokens(Encoder):
        def forward(self, x: torch.Tensor) -> Any:
            return self.layer(x.flatten(1))[:, None].expand(-1, 4, -1)  # (N, T, 2C)

    class OfTokens(Decoder):
        def forward(self, z: torch.Tensor) -> torch.Tensor:
            return super().forward(z.mean(1))

    rule = r"one tensor of shape \(6, 4, 6\), and the decoder takes half of its last axis; return .* h.chunk\(2, -1\)"
    with pytest.raises(ExportError, match=rule):
        export_bundle(Tokens(), OfTokens(), tmp_path / "a.vae", examples=X)


def test_a_range_is_of_images_alone(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="input_range is 'unit', but the inputs are vectors, which have no range"):
        export_bundle(
            nn.Linear(6, 3), nn.Linear(3, 6), tmp_path / "a.vae", examples=X.reshape(-1, 6), input_range="unit"
        )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_networks_out_of_reach_and_programs_are_refused_with_another_way(tmp_path: Path) -> None:
    hidden, traced = Encoder(), torch.export.export(Encoder(), (torch.from_numpy(X),))
    with pytest.raises(ExportError, match=r"what encoder and decoder are runs a network, Encoder, .* pass modules, or"):
        export_bundle(lambda x: hidden(x), Decoder(), tmp_path / "a.vae", examples=X)
    for program, sort in ((torch.jit.trace(Decoder(), torch.rand(2, 3)), "TorchScript"), (traced, "torch.export"),
                          (traced.module(), "torch.export")):  # fmt: skip
        with pytest.raises(InputError, match=rf"encoder is a {sort} program.* to vae-export as ENCODER,DECODER"):
            export_bundle(program, Decoder(), tmp_path / "a.vae", examples=X)
    assert list(tmp_path.iterdir()) == []
