"""Factories: `package.module:callable`, in every form that networks of others have."""

from __future__ import annotations

import math
import pickle
import sys
import tracemalloc
import warnings
import weakref
import zipfile
from argparse import Namespace
from collections import OrderedDict, defaultdict, namedtuple
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from torch.distributions import Independent, MultivariateNormal, Normal

from vae_export.cli import main
from vae_export.imported import ImportOptions
from vae_export.importers import factory
from vae_export.importers.network import Network, UnusedWeightsWarning
from vae_export.importers.outputs import read_encoded, read_reconstruction
from vae_export.importers.pickled import Stranger, read_pickled, weights_of_network
from vae_export.importers.state_dict import LeftOutWeightsWarning, load_weights
from vae_export.importers.trial import SIDE
from vae_export.importers.witness import ForwardDisagreesWarning
from vae_runtime.bundle import Bundle
from vae_runtime.errors import CheckpointError, ExportError, InputError

MODULE = "networks_of_the_factory_tests"
SOURCE = '''
import sys
from types import SimpleNamespace
import torch
import torch.nn.utils.prune
from torch import nn
from torch.distributions import Independent, Normal

SEED = 0  # None: other weights each time

class Networks(nn.Module):
    """mean and log-variance in one tensor; images in [-1, 1]."""
    def __init__(self, last=nn.Tanh):
        super().__init__()
        if SEED is not None:
            torch.manual_seed(SEED)
        self.encoder = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.SiLU(), nn.Dropout(0.5),
                                     nn.Conv2d(6, 4, 3, 2, 1))
        self.decoder = nn.Sequential(nn.Conv2d(2, 6, 3, 1, 1), nn.SiLU(), nn.Upsample(scale_factor=2.0),
                                     nn.ConvTranspose2d(6, 3, 4, 2, 1), last())

class Methods(Networks):
    def encode(self, x):
        mean, logvar = self.encoder(x).chunk(2, 1)
        return Independent(Normal(mean, (logvar / 2).exp()), 3)
    def decode(self, z):
        return {"sample": self.decoder(z)}

class Random(Networks):
    def encode(self, x):
        mean, logvar = self.encoder(x).chunk(2, 1)
        return mean + torch.randn_like(mean), logvar
    def decode(self, z):
        return self.decoder(z)

class Triple(Random):
    def encode(self, x):
        mean, logvar = super().encode(x)
        return mean, mean, logvar

class Variance(Random):
    def encode(self, x):
        mean, logvar = self.encoder(x).chunk(2, 1)
        return {"mean": mean, "var": logvar}

class Indices(Random):
    def encode(self, x):
        return self.encoder(x).argmax(1, keepdim=True)

class Bytes(Networks):
    def encode(self, x):
        return self.encoder(x).chunk(2, 1)
    def decode(self, z):
        return (255 * self.decoder(z)).to(torch.uint8)

class Std(Random):
    def encode(self, x):
        mean, logvar = self.encoder(x).chunk(2, 1)
        return mean, logvar.exp()

class Mixing(Random):
    def encode(self, x):
        mean, logvar = self.encoder(x).chunk(2, 1)
        return mean - mean.mean(0, keepdim=True), logvar

class Bottleneck(Random):
    """Its moments are made by forward; decode uses a weight without running its layer."""
    def __init__(self):
        super().__init__()
        self.moments = nn.ModuleDict({"mean": nn.Conv2d(4, 2, 1)})
        self.tied, self.scale = nn.Conv2d(2, 2, 1, bias=False), nn.Parameter(torch.ones(1))
    def encode(self, x):
        return self.encoder(x)
    def decode(self, z):
        return self.decoder(nn.functional.conv2d(z, self.tied.weight))
    def forward(self, x):
        h = self.encoder(x)
        return self.decode(self.moments["mean"](h)) * self.scale

class Fourier(Networks):
    """What it multiplies with is in no file of weights."""
    def __init__(self):
        super().__init__()
        self.register_buffer("factors", torch.randn(4, 1, 1), persistent=False)
    def encode(self, x):
        return self.encoder(x) * self.factors
    def decode(self, z):
        return self.decoder(z)

class Attribute(Fourier):
    def __init__(self):
        super().__init__()
        self.factors, self.plain, self.sparse = torch.ones(1), torch.randn(4, 1, 1), torch.eye(2).to_sparse()

class Compiled(Random):
    @torch.compile(backend="eager")
    def encode(self, x):
        return self.encoder(x).chunk(2, 1)

class CompiledEncoder(Networks):
    """Its weights have other names than in the files."""
    def __init__(self):
        super().__init__()
        self.encoder = torch.compile(self.encoder, backend="eager")

class Doubling(nn.Conv2d):
    """What older versions of it saved is half as large."""
    _version = 2
    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *more):
        if (local_metadata.get("version") or 1) < 2:
            state_dict[prefix + "weight"] = 2 * state_dict[prefix + "weight"]
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *more)

class Versioned(Methods):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), Doubling(6, 4, 3, 2, 1))

class Tied(Methods):
    """What else is kept of a tensor follows what is loaded into it."""
    def __init__(self):
        super().__init__()
        first = self.encoder[0].weight
        self.kept, self.turned = [first], first.data.transpose(0, 1)
    def encode(self, x):
        mean, logvar = self.encoder(x).chunk(2, 1)
        return mean + self.kept[0].mean() + self.turned.mean(), logvar

class Twice(Methods):
    """Some of its weights have two names."""
    def __init__(self):
        super().__init__()
        self.again = self.encoder[0]

class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.vae = Methods()
    def encode(self, x):
        return self.vae.encode(x)
    def decode(self, z):
        return self.vae.decode(z)

class EncodeAndDecoder(Networks):
    """Its encoder is a part of what encode does."""
    def __init__(self):
        super().__init__()
        self.moments = nn.Conv2d(4, 4, 1)
        self.probe = nn.Parameter(torch.empty(0))
    def encode(self, x):
        return self.moments(self.encoder(x)).chunk(2, 1)

def encode_and_decoder():
    model = EncodeAndDecoder()
    return model.encode, model.decoder

def derived(norm):
    model = Networks()
    norm(model.encoder[0])
    norm(model.decoder[0])
    return model

def weight_norm(): return derived(nn.utils.weight_norm)
def spectral_norm(): return derived(nn.utils.spectral_norm)
def parallel(): return nn.DataParallel(Methods())
def pruned(): return derived(lambda layer: nn.utils.prune.l1_unstructured(layer, "weight", 0.5))

class WeightNorm(Networks):
    def __init__(self):
        super().__init__()
        nn.utils.parametrizations.weight_norm(self.encoder[0])

class Lazy(Random):
    def __init__(self):
        super().__init__()
        self.decoder = nn.Sequential(nn.LazyConv2d(3, 1), nn.Upsample(scale_factor=4.0), nn.Tanh())

class Holder:
    """No module itself, but with methods and networks."""
    def __init__(self):
        self.network = Networks()
    def encode(self, x):
        return self.network.encoder(x)
    def decode(self, z):
        return self.network.decoder(z)

class InList(Holder):
    """Its networks are out of reach."""
    def __init__(self):
        self.networks = [Networks()]
    @property
    def network(self):
        return self.networks[0]

class Halfway(Random):
    """Only its decoder is out of reach."""
    def __init__(self):
        super().__init__()
        self.decoder, self.networks = None, [self.decoder]
    def decode(self, z):
        return self.networks[0](z)

def methods_of_one():
    methods = Methods()
    return methods.encode, methods.decode

def namespace_of_methods():
    methods = Methods()
    return SimpleNamespace(encode=methods.encode, decode=methods.decode)

def methods_of_two():
    return Methods().encode, Methods().decode

def closure():
    networks = Networks()
    return lambda x: networks.encoder(x), lambda z: networks.decoder(z)

def leaves():
    sys.exit(0)

class Leaving(Random):
    def encode(self, x):
        sys.exit(0)

class Printing(Networks):
    def __init__(self):
        super().__init__()
        print("made")
    def encode(self, x):
        print("encoded")
        return self.encoder(x)
    def decode(self, z):
        return self.decoder(z)

class Odd(Random):
    def encode(self, x):
        return "moments"

def pair():
    networks = Networks()
    return networks.encoder, networks.decoder

def vectors():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 3), nn.Tanh()), nn.Linear(3, 6)

class Grey(nn.Module):
    def forward(self, z):
        return z.mean(1, keepdim=True).expand(-1, 4, -1, -1)

def any_latent():
    return nn.Identity(), Grey()

def sigmoid():
    return Networks(nn.Sigmoid)

def needs(width):
    return Networks()

def number():
    return 3

not_callable = 3
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("factory")
    (folder / f"{MODULE}.py").write_text(SOURCE)
    (folder / "needs_more.py").write_text("import a_package_that_is_not_there")
    (folder / "leaves_at_once.py").write_text("import sys\nsys.exit(0)")
    yield folder
    sys.modules.pop(MODULE, None)


@pytest.fixture(autouse=True)
def _here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    torch.manual_seed(0)


def load(name: str, shape: tuple[int | None, ...] | None = (3, 16, 16), **options: Any) -> Any:
    if shape is not None and len(shape) == 3:
        options.setdefault("input_range", "signed")
    return factory.load(f"{MODULE}:{name}", ImportOptions(input_shape=shape, **options))


def noise(rows: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(rows).random((rows, *shape), dtype=np.float32)


def networks(seed: int = 1) -> Any:
    """Our own instance, with running statistics that are not those of a new one."""
    module = sys.modules[MODULE]
    module.SEED, before = seed, module.SEED
    model = module.Networks()
    module.SEED = before
    model.encoder[1].running_mean.uniform_(-0.5, 0.5)
    model.encoder[1].running_var.uniform_(0.5, 2)
    return model.eval()


def expected(model: Any, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """mean, logvar and reconstruction in the bundle's units, written out."""
    with torch.no_grad():
        moments = model.encoder(torch.from_numpy(x) * 2 - 1)
        image = model.decoder(moments[:, :2])
    return moments[:, :2].numpy(), moments[:, 2:].numpy(), np.clip((image.numpy() + 1) / 2, 0, 1)


def test_recognised_by_its_form(folder: Path) -> None:
    assert factory.recognises("package.module:make")
    assert factory.recognises(f"{MODULE}:Networks")
    for other in ("model.pt", "C:\\model", "module", "a-b:c", "a:", ":b", "a:b:c", "a b:c", "\0:a"):
        assert not factory.recognises(other)


def test_exported_graphs_agree_with_the_factorys_network_at_two_sizes(folder: Path) -> None:
    load("Networks")  # imports the module
    model = networks()
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, "checkpoint.pth")
    path = list(sys.path)
    imported = load("Methods", (3, None, None), weights="checkpoint.pth", latent_scale=0.5, latent_shift=0.1)
    assert sys.path == path
    assert (imported.name, imported.input_shape, imported.multiple_of) == ("Methods", (3, None, None), 4)
    assert imported.default_size == (SIDE, SIDE)
    assert imported.origin["factory"] == f"{MODULE}:Methods"
    x = noise(2, 3, 16, 16)
    graphs = imported.halves.to_onnx(x, imported.halves.encode(x)["mean"], free=True)
    encoder, decoder = map(onnxruntime.InferenceSession, graphs)
    for rows, height, width in ((1, 16, 24), (3, 32, 20)):
        x = noise(rows, 3, height, width)
        mean, logvar, image = expected(model, x)
        got = encoder.run(["mean", "logvar"], {"x": x})
        np.testing.assert_allclose(got[0], (mean - 0.1) * 0.5, atol=1e-5)
        np.testing.assert_allclose(got[1], logvar + 2 * math.log(0.5), atol=1e-5)
        np.testing.assert_allclose(decoder.run(["reconstruction"], {"z": (mean - 0.1) * 0.5})[0], image, atol=1e-5)


@pytest.mark.parametrize("name", ["Networks", "Methods", "Holder", "pair", "methods_of_one", "namespace_of_methods"])
@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_every_product_gives_the_values_of_its_weights(name: str, kind: str) -> None:
    imported = load(name)
    model = networks()
    prefix = "network." if name == "Holder" else ""
    weights = {f"{prefix}{key}": value for key, value in model.state_dict().items()}
    save_file(weights, "weights.bin") if kind == "safetensors" else torch.save(weights, "weights.bin")
    imported = load(name, weights="weights.bin")
    x = noise(3, 3, 16, 16)
    mean, logvar, image = expected(model, x)
    encoded = imported.halves.encode(x)
    np.testing.assert_allclose(encoded["mean"], mean, atol=1e-5)
    np.testing.assert_allclose(encoded["logvar"], logvar, atol=1e-5)
    np.testing.assert_allclose(imported.halves.decode(mean), image, atol=1e-5)


def test_methods_of_two_networks_have_weights_under_the_halves_names() -> None:
    load("methods_of_two")
    model = networks()
    parts = {f"{half}.{key}": value for half in ("encoder", "decoder") for key, value in model.state_dict().items()}
    torch.save(parts, "two.pt")
    x = noise(3, 3, 16, 16)
    imported = load("methods_of_two", weights="two.pt")
    np.testing.assert_allclose(imported.halves.encode(x)["mean"], expected(model, x)[0], atol=1e-5)


def test_random_weights_are_refused_unless_a_file_brings_others(monkeypatch: pytest.MonkeyPatch) -> None:
    load("Networks")  # imports the module
    module = sys.modules[MODULE]
    model = networks()
    monkeypatch.setattr(module, "SEED", None)
    rule = r"returns random weights, different at each call, in encoder.0.weight, encoder.0.bias, encoder.4.weight and"
    with pytest.raises(InputError, match=rule + r" 5 more; pass .* as --weights FILE, or, .* torch.manual_seed"):
        load("Networks")
    torch.save(model.state_dict(), "trained.pt")
    x = noise(3, 3, 16, 16)
    np.testing.assert_allclose(load("Networks", weights="trained.pt").halves.encode(x)["mean"], expected(model, x)[0])
    made: list[Any] = []

    def alive() -> Any:
        assert not any(one() is not None for one in made)  # the one before is gone
        monkeypatch.setattr(module, "SEED", 0)
        network = module.Networks()
        made.append(weakref.ref(network))
        return network

    monkeypatch.setattr(module, "alive", alive, raising=False)
    load("alive")
    assert len(made) == 2


@pytest.mark.parametrize("name", ["Fourier", "Attribute"])
def test_random_numbers_that_no_file_of_weights_has_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    load(name)  # from one seed
    module = sys.modules[MODULE]
    torch.save(getattr(module, name)().state_dict(), "trained.pt")
    load(name, weights="trained.pt")
    monkeypatch.setattr(module, "SEED", None)
    which = "factors" if name == "Fourier" else "plain"
    with pytest.raises(InputError, match=rf"returns random numbers, .* in {which}, which trained.pt does not have"):
        load(name, weights="trained.pt")


def test_weights_that_forward_alone_uses_are_warned_of() -> None:
    rule = "neither the latent nor the reconstruction depends on the weights of scale, moments: what the network's for"
    with pytest.warns(ForwardDisagreesWarning), pytest.warns(UnusedWeightsWarning, match=rule):
        load("Bottleneck")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("Networks", "Methods", "methods_of_one", "methods_of_two", "Holder", "pair"):
            load(name)
        Network(networks())._warn_of_unused(lambda: [])  # as of operators that are out of sight


def test_compiled_methods_are_exported() -> None:
    x = noise(3, 3, 16, 16)
    found = load("Compiled").halves.encode(x)
    np.testing.assert_allclose(found["mean"], load("Networks").halves.encode(x)["mean"], atol=1e-5)


def test_what_a_network_prints_is_kept_off_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    imported = load("Printing")
    x = noise(1, 3, 16, 16)
    imported.halves.to_onnx(x, imported.halves.encode(x)["mean"], free=False)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "made\nencoded\n" in printed.err


def test_vectors_and_codes() -> None:
    imported = load("vectors", (6,))
    assert imported.halves.kind == "autoencoder"
    x = 9 * noise(3, 6)
    code = imported.halves.encode(x)
    assert list(code) == ["mean"]
    assert code["mean"].shape == (3, 3)
    assert imported.halves.decode(code["mean"] * 100).max() > 1  # vectors are not cut to [0, 1]


def test_a_second_output_that_is_never_negative_is_asked_about() -> None:
    with pytest.raises(InputError, match=r"never negative.*--spread logvar, log_std, std, variance"):
        load("Std")
    x = noise(2, 3, 16, 16)
    torch.manual_seed(0)
    logvar = load("Std", spread="logvar").halves.encode(x)["logvar"]
    for spread, transform in (
        ("std", lambda s: 2 * np.log(s)), ("variance", np.log), ("log_std", lambda s: 2 * s),
    ):  # fmt: skip
        torch.manual_seed(0)
        np.testing.assert_allclose(load("Std", spread=spread).halves.encode(x)["logvar"], transform(logvar), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("Random", {}, ExportError, "the encoder gives other values for the same input in a second run"),
        ("Triple", {}, ExportError, "the encoder returns 3 values.*leave out what is more, as a sample z"),
        ("Mixing", {}, ExportError, "mixes the rows of a batch"),
        ("Odd", {}, ExportError, "the encoder returns str; expected"),
        ("Networks", {"kind": "autoencoder"}, InputError, "--kind is 'autoencoder', but the encoder returns a mean"),
        ("Indices", {}, ExportError, "the encoder gives values in torch.int64; expected floating point: indices of a"),
        ("Bytes", {}, ExportError, r"the decoder gives values in torch.uint8; expected floating point, images in \[0"),
        (
            "Variance",
            {},
            InputError,
            "^the encoder names its second output 'variance', but that has values from -.*neg",
        ),
        ("Networks", {"spread": "std"}, InputError, "^--spread is 'std', but that has values from -"),
        ("Networks", {"spread": "sigma"}, InputError, "--spread is 'sigma'; expected one of"),
        ("Methods", {"spread": "logvar"}, InputError, "--spread is 'logvar', but the encoder names it std"),
        ("vectors", {"shape": (6,), "kind": "vae"}, InputError, "--kind is 'vae', but the encoder returns one tensor"),
        ("vectors", {"shape": (6,), "spread": "std"}, InputError, "--spread is 'std', but an autoencoder's code"),
        ("vectors", {"shape": (6,), "input_range": "unit"}, InputError, "inputs are vectors, which have no range"),
        ("vectors", {"shape": (7,)}, ExportError, r"the encoder does not run on a batch of shape \(8, 7\)"),
        ("any_latent", {"shape": (4, 8, 8)}, InputError, "takes it both whole and by half; pass --kind"),
        ("Networks", {"shape": None}, InputError, "does not say what its inputs are; pass --input"),
        ("Networks", {"input_range": None}, InputError, "pass --input-range unit or signed"),
        ("Networks", {"input_range": "0-1"}, InputError, "--input-range is '0-1'; expected one of unit, signed"),
        ("sigmoid", {}, InputError, "the decoder gives no value below 0, as if its images were in"),
        ("Networks", {"shape": (3, None, 16)}, InputError, "expected .C, H, W., .C, None, None. for free sizes"),
        ("Networks", {"shape": (3, None, None), "multiple_of": 8}, InputError, "latents are 4 times smaller"),
        ("Networks", {"multiple_of": 4}, InputError, "have no free size"),
        ("Networks", {"shape": (3, 18, 18)}, ExportError, r"the decoder does not take.*returns shape \(8, 3, 20, 20\)"),
        ("Networks", {"latent_scale": 0.0}, InputError, "--latent-scale is 0.0; expected a finite number above 0"),
        ("Networks", {"latent_shift": math.nan}, InputError, "--latent-shift is nan; expected a finite number"),
        ("InList", {}, ExportError, "runs a network, Sequential, that is registered in no .* return a torch.nn.Module"),
        ("Halfway", {}, ExportError, "runs a network, Sequential, that is registered in no module"),
        ("closure", {}, ExportError, "runs a network, Sequential, that is registered in no module"),
        ("Lazy", {}, ExportError, "Lazy returns lazy modules that have no weights yet, such as decoder.0.weight; run"),
        ("leaves", {}, ExportError, "fails when it is called without arguments: SystemExit: 0"),
        ("Leaving", {}, ExportError, r"the encoder does not run on a batch of shape .*: SystemExit: 0"),
        ("Networks", {"shape": (3, 400000, 400000)}, InputError, "inputs of 3x400000x400000 are too large"),
        ("number", {}, ExportError, "the factory returns int; expected an object with encode and decode"),
        ("needs", {}, ExportError, "fails when it is called without arguments: TypeError"),
        ("not_callable", {}, InputError, "is int; expected something to call"),
        ("Absent", {}, InputError, "has no 'Absent'"),
        ("Networks", {"weights": "absent.pt"}, CheckpointError, "absent.pt is missing"),
        ("Networks", {"weights": "."}, CheckpointError, "is a folder; pass the file in it"),
    ],
)
def test_refused_in_words(name: str, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load(name, **options)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("no_such_module:make", InputError, "there is no module 'no_such_module'"),
        ("no_such.py:make", InputError, "there is no module 'no_such' .*; write no_such:make"),
        ("leaves_at_once:make", ExportError, "the module leaves_at_once cannot be imported: SystemExit: 0"),
        ("needs_more:make", ExportError, "needs a_package_that_is_not_there, which is not installed"),
        ("module", InputError, "expected package.module:callable"),
    ],
)
def test_modules_that_cannot_be_imported(source: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        factory.load(source, ImportOptions(input_shape=(3,)))


def test_weights_that_do_not_fit_are_named() -> None:
    load("Networks")
    weights = networks().state_dict()
    weights["decoder.0.weight"] = torch.zeros(6, 2, 5, 5)
    weights["head.weight"] = weights.pop("encoder.0.bias")
    torch.save(weights, "wrong.pt")
    with pytest.raises(
        CheckpointError,
        match=r"lacks encoder.0.bias; it has the unknown head.weight; it has .* decoder.0.weight \(6×2×5×5",
    ):
        load("Networks", weights="wrong.pt")


@pytest.mark.parametrize("prefix", ["model.", "net.", "module._orig_mod.", "_orig_mod.module.", "a.b.encoder."])
def test_what_a_wrapper_put_before_all_names_is_taken_away(prefix: str) -> None:
    load("Networks")
    model = networks()
    x = noise(3, 3, 16, 16)
    torch.save({"state_dict": {prefix + name: value for name, value in model.state_dict().items()}}, "wrapped.ckpt")
    loaded = load("Networks", weights="wrapped.ckpt")
    np.testing.assert_allclose(loaded.halves.encode(x)["mean"], expected(model, x)[0], atol=1e-6)


def test_names_under_two_prefixes_are_not_chosen_from() -> None:
    load("Networks")
    weights = networks().state_dict()
    torch.save({f"{half}.{name}": value for half in ("model", "other") for name, value in weights.items()}, "two.ckpt")
    with pytest.raises(CheckpointError, match=r"lacks encoder.0.weight.*has the unknown model.encoder.0.weight"):
        load("Networks", weights="two.ckpt")
    del weights["encoder.0.bias"]
    torch.save({f"model.{name}": value for name, value in weights.items()}, "one.ckpt")
    with pytest.raises(CheckpointError, match=r"does not fit its Networks: it lacks encoder.0.bias$"):
        load("Networks", weights="one.ckpt")


class _Loud:
    def __init__(self) -> None:
        self.value = 1

    def __setstate__(self, state: Any) -> None:
        pytest.fail("it was run")


class Settings(dict[str, Any]):
    """As diffusers' FrozenDict and Lightning's AttributeDict: a dict, with attributes."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(settings)
        self.name = "settings"


class Names(list[str]):
    pass


class Counts(OrderedDict[str, int]):
    pass


def with_settings(model: torch.nn.Module) -> torch.nn.Module:
    """Whose classes a pickle fills as dicts and lists."""
    model.settings, model.counts = Settings(width=8, inner=Settings(depth=2)), Counts(a=1, b=2)
    model.names = Names(["a", "b"])
    return model


def beside_other_things(weights: dict[str, torch.Tensor]) -> dict[str, Any]:
    """As training leaves it."""
    history = defaultdict(list, loss=[np.float64(0.5)])
    return {
        "model": weights,
        "args": Namespace(lr=1),
        "history": history,
        "at": Path("run"),
        "loud": _Loud(),
        "f": torch.tanh,
    }


def in_a_wrapper(weights: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {"loss.scale": torch.ones(3), **{f"model.{name}": value for name, value in weights.items()}}


@pytest.mark.parametrize(
    "pack",
    [
        lambda model: model,
        lambda model: with_settings(model),
        lambda model: {"epoch": 1, "network": model},
        lambda model: torch.optim.swa_utils.AveragedModel(model).state_dict(),
        lambda model: torch.compile(model),
        lambda model: torch.compile(model).state_dict(),
        lambda model: {f"{half}_state_dict": getattr(model, half).state_dict() for half in ("encoder", "decoder")},
        lambda model: {
            half: torch.nn.DataParallel(getattr(model, half)).state_dict() for half in ("encoder", "decoder")
        },
        lambda model: {name.replace(".", "._orig_mod.", 1): value for name, value in model.state_dict().items()},
        lambda model: beside_other_things(model.state_dict()),
        lambda model: {"state_dict": in_a_wrapper(model.state_dict()), "optimizer": {"state": {}}},
        lambda model: {"ema": model.state_dict(), "step": np.int64(5)},
        lambda model: (
            {"critic": torch.nn.Linear(1, 1).state_dict()}
            | {half: getattr(model, half).state_dict() for half in ("decoder", "encoder")}
        ),
        lambda model: {name: value for name, value in model.state_dict().items() if "num_batches" not in name},
    ],
    ids=[
        "network",
        "network-with-settings",
        "network-in-dict",
        "averaged",
        "whole-compiled",
        "compiled",
        "halves-as-state-dicts",
        "parallel-halves",
        "parts-compiled",
        "training",
        "loss",
        "only",
        "halves",
        "no-count",
    ],
)
@pytest.mark.parametrize("name", ["Networks", "CompiledEncoder"])
def test_files_that_training_leaves(name: str, pack: Callable[[Any], Any]) -> None:
    """Whatever else is in them is neither run nor imported."""
    load("Networks")
    model = networks()
    x = noise(3, 3, 16, 16)
    torch.save(pack(model), "trained.pt")
    wanted = expected(model, x)[0]
    np.testing.assert_allclose(load(name, weights="trained.pt").halves.encode(x)["mean"], wanted, atol=1e-6)


def test_a_pickled_network_has_the_weights_of_its_state_dict(tmp_path: Path) -> None:
    network = torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 3, bias=False))
    network.register_buffer("left_out", torch.ones(1), persistent=False)
    torch.save(network, tmp_path / "network.pt")
    read = weights_of_network(read_pickled(tmp_path / "network.pt"))
    assert read is not None
    assert {name: value.tolist() for name, value in read.items()} == {
        name: value.tolist() for name, value in network.state_dict().items()
    }


def within_itself() -> torch.nn.Module:
    network = torch.nn.Sequential(torch.nn.Linear(1, 1))
    network[0].add_module("around", network)
    return network


def shared_at_every_level() -> torch.nn.Module:
    """Little in the file, and twice as much of it at each level."""
    network: torch.nn.Module = torch.nn.Linear(1, 1)
    for _ in range(40):
        network = torch.nn.Sequential(network, network)
    return network


def of_another_state() -> torch.nn.Module:
    network = torch.nn.Linear(1, 1)
    network._non_persistent_buffers_set = 5
    return network


@pytest.mark.parametrize("make", [within_itself, shared_at_every_level, of_another_state])
def test_networks_that_no_module_is_have_no_weights(make: Callable[[], torch.nn.Module], tmp_path: Path) -> None:
    torch.save(make(), tmp_path / "damaged.pt")
    assert weights_of_network(read_pickled(tmp_path / "damaged.pt")) is None


def test_a_pickle_takes_no_memory_for_notes_that_it_has_not(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as old, zipfile.ZipFile(tmp_path / "b.pt", "w") as new:
        for name in old.namelist():
            bomb = b"\x80\x02]r" + (2**21).to_bytes(4, "little") + b"."  # an empty list, as number 2,097,152
            new.writestr(name, bomb if name.endswith("/data.pkl") else old.read(name))
    tracemalloc.start()
    try:
        assert read_pickled(tmp_path / "b.pt") == []
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


def test_what_torch_may_load_stays_as_it_was_also_in_other_threads(tmp_path: Path) -> None:
    torch.save({"args": Namespace(), "loud": _Loud()}, tmp_path / "a.pt")
    with torch.serialization.safe_globals([_Loud]):
        before = set(torch.serialization.get_safe_globals())
        with ThreadPoolExecutor(4) as pool:
            read = list(pool.map(lambda _: read_pickled(tmp_path / "a.pt"), range(40)))
        assert {type(one["loud"]) for one in read} == {Stranger}  # it is not run, though others have told torch to
        assert set(torch.serialization.get_safe_globals()) == before
        (tmp_path / "b.pt").write_bytes(b"PK")
        with pytest.raises(CheckpointError):
            read_pickled(tmp_path / "b.pt")
        assert set(torch.serialization.get_safe_globals()) == before


def test_versions_that_torch_notes_beside_weights_are_heeded() -> None:
    load("Networks")
    model = sys.modules[MODULE].Versioned()
    x = noise(2, 3, 16, 16)
    wanted = expected(model.eval(), x)[0]
    wrapped = torch.nn.Sequential()
    wrapped.add_module("model", model)
    torch.save(wrapped.state_dict(), "wrapped.pt")
    torch.save({half: getattr(model, half).state_dict() for half in ("encoder", "decoder")}, "halves.pt")
    for file in ("wrapped.pt", "halves.pt"):
        np.testing.assert_allclose(load("Versioned", weights=file).halves.encode(x)["mean"], wanted, atol=1e-6)


def test_weights_without_a_place_are_warned_of_but_the_counter_of_averages() -> None:
    load("Networks")
    model = networks()
    torch.save(in_a_wrapper(model.state_dict()), "wrapped.pt")
    message = r"of wrapped.pt, loss.scale are left out, for which the network"
    with pytest.warns(LeftOutWeightsWarning, match=message) as caught:
        load("Networks", weights="wrapped.pt")
    assert [one.filename for one in caught] == [__file__]
    halves = {half: getattr(model, half).state_dict() for half in ("decoder", "encoder")}
    torch.save(halves | {"norm": {"mean": torch.zeros(1)}}, "halves.pt")
    with pytest.warns(LeftOutWeightsWarning, match=r"of halves.pt, norm are left out"):
        load("Networks", weights="halves.pt")
    torch.save({"model": model.state_dict(), "ema": model.state_dict()}, "two.pt")
    with pytest.warns(LeftOutWeightsWarning, match=r"of two.pt, ema are left out"):
        load("Networks", weights="two.pt")
    torch.save(torch.optim.swa_utils.AveragedModel(model).state_dict(), "averaged.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error", LeftOutWeightsWarning)
        load("Networks", weights="averaged.pt")


@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm", "pruned"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weights_that_are_made_anew_at_each_call_are_not_random(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    load("Networks")
    module = sys.modules[MODULE]
    model = getattr(module, name)().eval()
    monkeypatch.setattr(module, "SEED", None)
    torch.save(model.state_dict(), "derived.pt")
    x = noise(2, 3, 16, 16)
    loaded = load(name, weights="derived.pt")
    np.testing.assert_allclose(loaded.halves.encode(x)["mean"], expected(model, x)[0], atol=1e-6)
    with pytest.raises(InputError, match=r"random weights.*(_g|_orig)"):
        load(name)


def test_what_is_kept_of_a_tensor_follows_its_weights() -> None:
    load("Networks")
    model = sys.modules[MODULE].Tied().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
        x = noise(2, 3, 16, 16)
        wanted = model.encode(torch.from_numpy(2 * x - 1))[0].numpy()
    for dtype in (torch.float32, torch.float16):
        weights = {name: value.to(dtype) if value.ndim else value for name, value in model.state_dict().items()}
        torch.save(weights, "tied.pt")
        loaded = load("Tied", weights="tied.pt")
        np.testing.assert_allclose(
            loaded.halves.encode(x)["mean"], wanted, atol=1e-6 if dtype == torch.float32 else 0.01
        )


@pytest.mark.parametrize("name", ["Twice", "Wrapped", "parallel", "EncodeAndDecoder", "encode_and_decoder"])
@pytest.mark.filterwarnings("error::vae_export.quality.ExportWarning")
def test_names_that_the_network_has_otherwise(name: str) -> None:
    load("Networks")
    module = sys.modules[MODULE]
    model = (module.EncodeAndDecoder if name.lower().startswith("encode") else module.Methods)().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
        x = noise(2, 3, 16, 16)
        output = model.encode(torch.from_numpy(2 * x - 1))
        wanted = output[0] if isinstance(output, tuple) else output.mean
    torch.save(model.state_dict(), "otherwise.pt")
    loaded = load(name, weights="otherwise.pt")
    np.testing.assert_allclose(loaded.halves.encode(x)["mean"], wanted.numpy(), atol=1e-6)
    assert loaded.halves.kind == "vae"


def test_one_layer_is_not_taken_for_another(tmp_path: Path) -> None:
    torch.save({"other.weight": torch.ones(2, 2), "other.bias": torch.ones(2)}, tmp_path / "other.pt")
    network = torch.nn.Sequential(OrderedDict(layer=torch.nn.Linear(2, 2)))
    with pytest.raises(CheckpointError, match=r"it lacks layer.weight, layer.bias; it has the unknown"):
        load_weights(network, tmp_path / "other.pt")


def test_weights_for_training_alone_are_left_out() -> None:
    load("Networks")
    model = networks()
    beside = {"loss.discriminator.weight": torch.ones(2), "model_ema.decay": torch.ones(1)}
    x = noise(2, 3, 16, 16)
    for prefix in ("", "first_stage_model."):
        weights = {prefix + name: value for name, value in (model.state_dict() | beside).items()}
        torch.save({"state_dict": weights}, "ldm.ckpt")
        with pytest.warns(LeftOutWeightsWarning, match=r"loss.discriminator.weight, .*model_ema.decay are left out"):
            loaded = load("Networks", weights="ldm.ckpt")
        np.testing.assert_allclose(loaded.halves.encode(x)["mean"], expected(model, x)[0], atol=1e-6)
    torch.save(model.state_dict() | {"quant_conv.weight": torch.ones(2)}, "other.pt")
    with pytest.raises(CheckpointError, match=r"it has the unknown quant_conv.weight$"):
        load("Networks", weights="other.pt")


@pytest.mark.filterwarnings("ignore::vae_export.importers.state_dict.LeftOutWeightsWarning")
def test_a_usual_key_comes_before_others() -> None:
    load("Networks")
    model, other = networks(), networks(seed=5)
    halves = {half: getattr(other, half).state_dict() for half in ("encoder", "decoder")}
    x = noise(2, 3, 16, 16)
    for beside in ({"ema": other.state_dict()}, halves):
        torch.save({**beside, "model": model.state_dict()}, "both.pt")
        loaded = load("Networks", weights="both.pt")
        np.testing.assert_allclose(loaded.halves.encode(x)["mean"], expected(model, x)[0], atol=1e-6)


def test_names_of_older_torch_are_understood() -> None:
    load("Networks")
    model = networks()
    torch.nn.utils.weight_norm(model.encoder[0])
    model.encoder[0].weight_g.data *= 2
    torch.save(model.state_dict(), "old.pt")
    x = noise(3, 3, 16, 16)
    loaded = load("WeightNorm", weights="old.pt")
    np.testing.assert_allclose(loaded.halves.encode(x)["mean"], expected(model, x)[0], atol=1e-6)
    torch.save(model.state_dict() | {"encoder.0.weight_g": torch.ones(5, 1, 1, 1)}, "wrong.pt")
    torch.save(model.state_dict() | {"encoder.0.weight_g": torch.ones(6, 1, 1, 1) * 1j}, "complex.pt")
    with pytest.raises(CheckpointError, match=r"wrong shape or type in encoder.0.weight_g \(6×1×1×1 complex64\)"):
        load("WeightNorm", weights="complex.pt")
    with pytest.raises(CheckpointError, match=r"does not fit its WeightNorm: size mismatch for encoder.0.*5, 1, 1, 1"):
        load("WeightNorm", weights="wrong.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": {"a": torch.zeros(1)}, "model": {"a": torch.ones(1)}}, "holds weights under state_dict, model"),
        (
            {"a": {"a": torch.zeros(1)}, "b": {"a": torch.zeros(1)}},
            "holds weights under a, b; save the network's .* or those of its parts under decoder, encoder$",
        ),
        ({"epoch": 3, "losses": [0.1]}, "holds no tensors under state_dict.*its keys are epoch, losses"),
        ([torch.zeros(1)], "holds a list; expected weights by name"),
        (torch.tanh, "holds a pickled object; expected weights by name"),
        ({}, "; it is empty$"),
        ({"encoder.0.bias": torch.zeros(1), "epoch": 3}, "holds epoch beside tensors; save these alone"),
        (shared_at_every_level(), "holds a pickled object; expected weights by name"),
        (Namespace(a=torch.zeros(1)), "holds a pickled object; expected weights by name"),
        (torch.nn.Linear(2, 1), "lacks .*; it has the unknown weight, bias$"),
        ({"encoder.0.bias": Namespace()}, "holds no tensors under state_dict.*; its keys are encoder.0.bias"),
    ],
)
def test_files_whose_weights_are_not_found(content: Any, message: str) -> None:
    torch.save(content, "odd.pt")
    with pytest.raises(CheckpointError, match=message):
        load("Networks", weights="odd.pt")


class _Canary:
    def __reduce__(self) -> Any:
        return Path("canary").touch, ()


def test_a_malicious_pickle_runs_nothing() -> None:
    torch.save({"state_dict": {"a": _Canary()}}, "zip.pt")
    Path("bare.pt").write_bytes(pickle.dumps(_Canary(), protocol=2))
    for file in ("zip.pt", "bare.pt"):
        with pytest.raises(CheckpointError, match=file):
            load("Networks", weights=file)
    assert not Path("canary").exists()
    torch.load("zip.pt", weights_only=False)  # it would have
    assert Path("canary").exists()


MEAN, LOGVAR = torch.tensor([[1.0, -2.0]]), torch.tensor([[0.5, -1.0]])
STD = (LOGVAR / 2).exp()


@pytest.mark.parametrize(
    "output",
    [
        (MEAN, LOGVAR),
        [MEAN, LOGVAR],
        {"mean": MEAN, "logvar": LOGVAR, "z": MEAN + 1},
        {"mu": MEAN, "log_var": LOGVAR},
        OrderedDict(embedding=MEAN, log_covariance=LOGVAR),
        {"mean": MEAN, "std": STD},
        {"mean": MEAN, "log_std": LOGVAR / 2},
        {"mean": MEAN, "variance": LOGVAR.exp()},
        {"mu": MEAN, "sigma": STD},
        {"mu": MEAN, "log_sigma": LOGVAR / 2},
        {"z_mean": MEAN, "z_log_var": LOGVAR, "z": MEAN + 1, "mean": MEAN + 2},
        {"Mu": MEAN, "LogVar": LOGVAR},
        {"Mean": MEAN + 1, "mean": MEAN, "std": STD, "x": MEAN, "X": MEAN},
        {"z_mean": MEAN + 1, "z_std": STD, "mean": MEAN, "std": STD},
        SimpleNamespace(z_mean=MEAN, z_log_var=LOGVAR),
        namedtuple("Posterior", "mu logvar")(MEAN, LOGVAR),
        namedtuple("Output", "latent_dist")(SimpleNamespace(mean=MEAN, logvar=LOGVAR)),
        SimpleNamespace(latent_dist=Normal(MEAN, STD)),
        SimpleNamespace(mean=MEAN, scale=STD),
        SimpleNamespace(mean=MEAN, logvar=LOGVAR, std=STD, var=STD**2),
        Normal(MEAN, STD),
        Independent(Normal(MEAN, STD), 1),
        ((MEAN, LOGVAR),),
        {"z": MEAN, "dist": Normal(MEAN, STD)},
        {"z": MEAN, "q_mu": MEAN, "q_logvar": LOGVAR},
        {"latent": STD, "latent_mean": MEAN, "latent_std": STD},
        {"q_mu": MEAN, "q_logvar": LOGVAR, "p_mu": LOGVAR, "p_logvar": LOGVAR},
        {"q": Normal(MEAN, STD), "prior_mean": LOGVAR, "prior_logvar": LOGVAR},
        {"q": Normal(MEAN, STD), "p": Normal(LOGVAR, STD)},
        {"Posterior_mu": MEAN, "Posterior_std": STD},
    ],
)
def test_forms_of_a_posterior(output: Any) -> None:
    from vae_export.importers.meaning import to_logvar

    encoded = read_encoded(output)
    assert encoded.spread is not None
    torch.testing.assert_close(encoded.mean, MEAN)
    torch.testing.assert_close(to_logvar(encoded.spread, encoded.meaning or "logvar", torch.log), LOGVAR)


def test_the_objects_of_diffusers_and_pythae() -> None:
    vae = pytest.importorskip("diffusers.models.autoencoders.vae")
    outputs = pytest.importorskip("diffusers.models.modeling_outputs")
    posterior = vae.DiagonalGaussianDistribution(torch.cat([MEAN, LOGVAR], 1)[..., None, None])
    encoded = read_encoded(outputs.AutoencoderKLOutput(latent_dist=posterior))
    assert encoded.meaning == "logvar"
    torch.testing.assert_close(encoded.mean.flatten(), MEAN.flatten())
    torch.testing.assert_close(encoded.spread.flatten(), LOGVAR.flatten())
    torch.testing.assert_close(read_reconstruction(vae.DecoderOutput(sample=MEAN)), MEAN)
    pythae = pytest.importorskip("pythae.models.base.base_utils")
    encoded = read_encoded(pythae.ModelOutput(embedding=MEAN, log_covariance=LOGVAR))
    assert (encoded.mean is MEAN, encoded.spread is LOGVAR, encoded.meaning) == (True, True, "logvar")
    assert read_reconstruction(pythae.ModelOutput(reconstruction=MEAN)) is MEAN


@pytest.mark.parametrize(
    "output",
    [
        MEAN,
        (MEAN,),
        {"embedding": MEAN},
        {"latents": MEAN},
        SimpleNamespace(z=MEAN),
        {"z": MEAN, "prior": Normal(0.0, STD)},
    ],
)
def test_forms_of_a_code(output: Any) -> None:
    assert read_encoded(output) == (MEAN, None, None)


@pytest.mark.parametrize(
    "output",
    [MEAN, (MEAN,), {"sample": MEAN}, {"reconstruction": MEAN, "z": LOGVAR}, SimpleNamespace(sample=MEAN),
     Normal(MEAN, 1.0), {"loc": MEAN, "scale": STD}],
)  # fmt: skip
def test_forms_of_a_reconstruction(output: Any) -> None:
    torch.testing.assert_close(read_reconstruction(output), MEAN)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ((MEAN, LOGVAR, MEAN), "3 values of shapes .1, 2., .1, 2., .1, 2.; expected .mean, logvar."),
        ((MEAN, LOGVAR, MEAN), "leave out what is more, as a sample z"),
        ((MEAN, LOGVAR[:, :1]), r"same shape \(if it is one, expand it, as by logvar\.expand_as\(mean\)\)"),
        ((MEAN, LOGVAR.sum()), "mean and logvar have the same shape .leave out what is more"),
        ((MEAN, LOGVAR, LOGVAR[:, :1]), "features for the decoder, which gets the latent alone"),
        ((MEAN, LOGVAR, [MEAN]), "features for the decoder, which gets the latent alone"),
        ((MEAN, "x"), "2 values of shapes .1, 2., str"),
        (
            {"a": MEAN, "b": LOGVAR},
            r"dict with a, b; .* by name a mean \(mean, mu, loc\) and its logvar, log_std",
        ),
        ({"qm": MEAN, "qv": LOGVAR}, "dict with qm, qv"),  # a logarithm of std in some, of the variance in others
        ({"mean": MEAN, "z": MEAN}, "dict with mean, z"),
        ({"z": MEAN, "z_mean": MEAN}, "dict with z, z_mean"),
        ({"z": MEAN, "other": LOGVAR}, "dict with z, other"),
        ({"z": MEAN, "q": Normal(MEAN, STD), "r": Normal(MEAN, STD)}, "dict with z, q, r"),
        ({"q_mu": MEAN, "q_logvar": LOGVAR, "r_mu": MEAN, "r_logvar": LOGVAR}, "dict with q_mu, q_logvar, r_mu, r_"),
        ({"q_mean": MEAN, "prior_mean": MEAN, "prior_logvar": LOGVAR}, "dict with q_mean, prior_mean, prior_logvar"),
        ({"q_mu": MEAN, "q_Sigma": STD}, "dict with q_mu, q_Sigma"),
        ({"mu": MEAN, "Sigma": STD}, "dict with mu, Sigma"),  # which may be a covariance
        (None, "returns NoneType"),
        (MultivariateNormal(MEAN[0], torch.eye(2)), "a bundle's posterior is a diagonal normal one: return N"),
    ],
)
def test_forms_that_are_not_understood(output: Any, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        read_encoded(output)


@pytest.mark.parametrize("output", [(MEAN, LOGVAR), {"a": MEAN, "b": MEAN}, None, SimpleNamespace(image=MEAN)])
def test_reconstructions_that_are_not_understood(output: Any) -> None:
    with pytest.raises(ExportError, match=r"the decoder returns .*; expected one tensor"):
        read_reconstruction(output)


def test_of_a_decoders_distribution_its_mean_alone_is_asked_for() -> None:
    with pytest.raises(ExportError, match=r"2 values of shapes .*; expected one tensor: .* return its mean alone"):
        read_reconstruction((MEAN, LOGVAR))


@pytest.mark.filterwarnings("ignore:.*the reconstructions of real inputs")
def test_arrays_are_taken_in_their_own_size_where_any_will_do() -> None:
    np.save("floats.npy", noise(5, 3, 16, 24))
    np.save("bytes.npy", np.random.default_rng(0).integers(0, 256, (5, 20, 12, 3), dtype=np.uint8))
    np.save("odd.npy", noise(5, 3, 16, 18))
    command = [f"{MODULE}:Networks", "--input", "3xHxW", "--input-range", "signed", "--force", "--output", "a.vae"]
    for file, size in (("floats.npy", (16, 24)), ("bytes.npy", (20, 12))):
        result = CliRunner().invoke(main, [*command, "--data", file])
        assert result.exit_code == 0, result.output
        assert Bundle.open("a.vae").manifest.input.default_size == size
    result = CliRunner().invoke(main, [*command, "--data", "odd.npy"])
    assert result.exit_code == 1
    assert "(5, 3, 16, 18); expected height and width that are multiples of 4" in result.stderr


def test_validation_of_distributions_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", True)  # torch.compile turns it off for good
    load("Methods")
    with pytest.raises(ValueError, match="scale"):
        Normal(0.0, -1.0)


def test_networks_of_half_precision_are_read_in_float32() -> None:
    load("Networks")
    model = networks()
    torch.save(model.half().state_dict(), "half.pt")
    imported = load("Networks", weights="half.pt")
    x = noise(1, 3, 16, 16)
    np.testing.assert_allclose(imported.halves.encode(x)["mean"], expected(model.float(), x)[0], atol=1e-5)
