import functools
import io
import os
import pickle
import re
import shutil
import subprocess
import sys
import types
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vae_runtime.errors import CheckpointError, OutputError
from vae_runtime.manifest import InputSpec, Likelihood
from vae_training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from vae_training.models import build_model, default_config


@pytest.fixture
def checkpoint() -> Checkpoint:
    torch.manual_seed(0)
    config = default_config("conv", "vae", (1, 9, 8), 3)
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (5, 9, 8), dtype=np.uint8))
    return Checkpoint(
        kind="vae",
        config=config,
        state_dict=build_model(config).state_dict(),
        input=InputSpec("image", (1, 9, 8), "grey", "exact"),
        likelihood=Likelihood("bernoulli", binarize="none"),
        examples={"train": images, "held_out": images[:2].clone()},
        dataset={"dataset": "noise", "train": 5},
        metrics={"test": {"negative_elbo_nats": 3.5}},
    )


@pytest.fixture
def path(tmp_path: Path, checkpoint: Checkpoint) -> Path:
    save_checkpoint(tmp_path / "model.pt", checkpoint)
    return tmp_path / "model.pt"


def test_round_trip(path: Path, checkpoint: Checkpoint) -> None:
    loaded = load_checkpoint(path)
    for name in ("kind", "config", "input", "likelihood", "dataset", "metrics"):
        assert getattr(loaded, name) == getattr(checkpoint, name), name
    for key, value in checkpoint.examples.items():
        assert torch.equal(loaded.examples[key], value)
    model, x = loaded.build_model(), torch.rand(2, 1, 9, 8)
    assert not model.training
    expected = build_model(checkpoint.config).eval()
    expected.load_state_dict(dict(checkpoint.state_dict))
    assert torch.equal(model(x), expected(x))


def test_every_kind_of_model_survives(tmp_path: Path, checkpoint: Checkpoint) -> None:
    config = default_config("mlp", "autoencoder", (4,), 2)
    vectors = torch.randn(3, 4)
    model = build_model(config)
    model.fit_normalisation(vectors)
    spec, likelihood = InputSpec("vector", (4,)), Likelihood("gaussian", scale=0.25)
    examples = {"train": vectors, "held_out": vectors}
    save_checkpoint(
        tmp_path / "m.pt", Checkpoint("autoencoder", config, model.state_dict(), spec, likelihood, examples)
    )
    loaded = load_checkpoint(tmp_path / "m.pt")
    assert loaded.likelihood.scale == 0.25
    torch.testing.assert_close(loaded.build_model()(vectors), model(vectors))


def test_a_plain_dict_that_bare_torch_reads(path: Path) -> None:
    data = torch.load(path, weights_only=True)
    assert (data["format"], data["format_version"]) == ("vae-checkpoint", 1)
    assert data["input"] == {"type": "image", "shape": [1, 9, 8], "colour": "grey", "resize": "exact"}
    assert data["likelihood"] == {"type": "bernoulli", "binarize": "none"}


def test_the_same_checkpoint_gives_the_same_bytes(path: Path, checkpoint: Checkpoint) -> None:
    first = path.read_bytes()
    save_checkpoint(path.with_name("other.pt"), checkpoint)
    assert path.with_name("other.pt").read_bytes() == first


def test_weights_do_not_share_memory_with_the_checkpoint(path: Path) -> None:
    loaded = load_checkpoint(path)
    with torch.no_grad():
        for parameter in loaded.build_model().parameters():
            parameter.zero_()
    assert any(value.abs().sum() > 0 for value in loaded.state_dict.values())


def change(*keys: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def apply(data: dict[str, Any]) -> None:
        *parents, last = keys
        for key in parents:
            data = data[key]
        if value is ...:
            del data[last]
        else:
            data[last] = value

    return apply


WEIGHT = "decoder.0.weight"
LOOP: list[Any] = []
LOOP.append(LOOP)


def doubled(times: int, value: Any) -> Any:
    """What is small in the file, and 2**times as large when it is gone through."""
    for _ in range(times):
        value = [value, value]
    return value


def with_attribute(name: str, tensor: torch.Tensor) -> torch.Tensor:
    setattr(tensor, name, 1)
    return tensor


DOUBLED = (
    ("format",), ("format_version",), ("kind",), ("config",), ("examples",), ("config", "latent_dim"),
    ("input", "type"), ("likelihood", "scale"), ("metrics", "test"), ("dataset", "x"), ("unknown",),
)  # fmt: skip
with warnings.catch_warnings(action="ignore"):  # that they will change
    NESTED = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (change("format", value="vae-bundle"), "format is 'vae-bundle'; expected 'vae-checkpoint'"),
        (change("format", value=...), "format is None"),
        (change("format_version", value=2), "format_version is 2, newer than 1"),
        (change("format_version", value=True), "format_version is True; expected 1"),
        (change("format_version", value=0), "format_version is 0; expected 1"),
        (change("kind", value="gan"), "kind is 'gan'; expected one of vae, autoencoder"),
        (change("kind", value=["vae"]), "kind is"),
        (change("kind", value="autoencoder"), "kind is 'autoencoder', but config.kind is 'vae'"),
        (change("config", value=[1]), r"config is \[1\]; expected a dict"),
        (change("config", "extra", value=1), "config has the unknown key 'extra'"),
        (change("config", "latent_dim", value="3"), "config.latent_dim is '3'"),
        (change("config", "latent_dim", value=4), "the weights do not fit the config: size mismatch"),
        (change("config", "widths", value=[65536, 65536]), "the weights do not fit the config"),
        (change("config", "input_shape", value=[1, 8, 9]), "input.shape is .* but config.input_shape is"),
        (change("state_dict", WEIGHT, value=...), f'the weights do not fit the config: Missing key.*"{WEIGHT}"'),
        (change("state_dict", "extra", value=torch.zeros(2)), "the weights do not fit the config: Unexpected key"),
        (change("state_dict", WEIGHT, value=torch.zeros(3)), "the weights do not fit the config: size mismatch"),
        (
            change("state_dict", WEIGHT, value=3),
            r"state_dict\['decoder.0.weight'\] is int; expected a contiguous float32",
        ),
        (change("state_dict", WEIGHT, value=torch.zeros(960, 3).half()), "is torch.float16 of shape"),
        (
            change("state_dict", WEIGHT, value=torch.zeros(1, 1).expand(960, 3)),
            "expected a contiguous float32 or int64",
        ),
        (change("state_dict", WEIGHT, value=torch.full((960, 3), torch.nan)), "has NaN or infinite values"),
        (change("state_dict", WEIGHT, value=torch.full((960, 3), torch.inf)), "has NaN or infinite values"),
        (change("state_dict", WEIGHT, value=torch.zeros(960, 3).to_sparse()), "expected a contiguous"),
        (change("input", "type", value="sound"), "input.type is 'sound'"),
        (change("input", "shape", value=[1, 9, -8]), "input.shape is"),
        (change("likelihood", "type", value="cauchy"), "likelihood.type is 'cauchy'"),
        (change("likelihood", value={"type": "gaussian", "scale": 0.0}), "likelihood.scale is 0.0"),
        (change("examples", "train", value=...), r"examples\['train'\] is NoneType; expected a contiguous"),
        (change("examples", "train", value=torch.zeros(2, 8, 8, dtype=torch.uint8)), r"examples\['train'\] has shape"),
        (change("examples", "held_out", value=torch.full((1, 1, 9, 8), 2.0)), "values from 2 to 2"),
        (change("dataset", "train", value=torch.zeros(1)), "dataset.train is a Tensor; expected plain data"),
        (
            change("metrics", "test", value={"a": [float("nan")]}),
            r"metrics.test.a\[0\] is nan; expected a finite number",
        ),
        (change("metrics", "test", value={1: 2}), "metrics.test has the key 1; expected strings"),
        (change("metrics", "test", value=LOOP), "metrics.* nested"),
        *((change(*keys, value=doubled(18, "")), "is nested more than 16 times") for keys in DOUBLED),
        (change("kind", value=doubled(11, [""] * 100)), "kind makes more than 100,000 parts"),
        (change("metrics", "test", value=doubled(11, [""] * 100)), "metrics makes more than 100,000 parts"),
        *(
            (
                change("state_dict", key, value=torch.zeros(2)),
                f"has the key {re.escape(repr(key))}; expected",
            )
            for key in (5, None, (1, 2), b"x")
        ),
        (change("state_dict", WEIGHT, value=NESTED), f"'{WEIGHT}'] is torch.float32 of several shapes; expected"),
        (
            change("examples", "train", value=NESTED),
            r"examples\['train'\] is torch.float32 of several shapes; expected",
        ),
        (
            change("state_dict", WEIGHT, value=with_attribute("is_contiguous", torch.zeros(960, 3))),
            f"'{WEIGHT}'] is torch.float32 of shape .* with attributes; expected",
        ),
        (
            change("examples", "train", value=with_attribute("numpy", torch.zeros(1, 1, 9, 8))),
            r"examples\['train'\] is .* with attributes; expected",
        ),
        (
            change("examples", "train", value=torch.zeros(1, 1, 9, 8, requires_grad=True)),
            r"examples\['train'\] requires a gradient",
        ),
        (
            change("state_dict", "encoder.0.1.running_mean", value=torch.zeros(32, dtype=torch.int64)),
            r"state_dict\['encoder.0.1.running_mean'\] is torch.int64; expected torch.float32",
        ),
        (change("dataset", "x", value="\ud800"), r"dataset.x is '\\ud800'; expected text without halves of surrogate"),
        (change("metrics", "\ud800", value=1), r"metrics, a key, is '\\ud800'; expected text"),
    ],
)
def test_what_does_not_fit_together_is_named(path: Path, edit: Callable[[dict[str, Any]], None], message: str) -> None:
    data = torch.load(path, weights_only=True)
    edit(data)
    torch.save(data, path)
    with pytest.raises(CheckpointError, match=rf"(?s)model\.pt: .*{message}"):
        load_checkpoint(path)


def test_files_that_are_no_checkpoint(path: Path) -> None:
    good = path.read_bytes()
    for content, message in (
        (b"", "the file is empty"),
        (b"garbage" * 100, "is no model.pt that vae-train wrote"),
        (good[: len(good) // 2], "truncated or damaged"),
        (good[:-1], "truncated or damaged"),
        (pickle.dumps({"format": "vae-checkpoint"}), "is no model.pt"),
    ):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(path)
    with pytest.raises(CheckpointError, match=r"nothing\.pt cannot be read: No such file"):
        load_checkpoint(path.with_name("nothing.pt"))
    with pytest.raises(CheckpointError, match="cannot be read: Is a directory"):
        load_checkpoint(path.parent)
    torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match="format is 'list'"):
        load_checkpoint(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(CheckpointError, match="damaged or no checkpoint"):
        load_checkpoint(path)


def test_compressed_archives_are_refused(path: Path) -> None:
    with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(CheckpointError, match="has compressed parts"):
        load_checkpoint(path)


def test_flipped_bits_are_found_or_harmless(path: Path, checkpoint: Checkpoint) -> None:
    good, rng = path.read_bytes(), np.random.default_rng(0)
    refused = 0
    for position in rng.integers(0, len(good), 300):
        flipped = bytearray(good)
        flipped[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(flipped)
        try:
            loaded = load_checkpoint(path)
        except CheckpointError:
            refused += 1
            continue
        assert loaded.config == checkpoint.config
        for key, value in checkpoint.state_dict.items():
            assert torch.equal(loaded.state_dict[key], value), key
    assert refused > 250


def test_nothing_is_written_that_could_not_be_read(tmp_path: Path, checkpoint: Checkpoint) -> None:
    broken = Checkpoint(**{**vars(checkpoint), "metrics": {"loss": float("nan")}})
    with pytest.raises(CheckpointError, match=r"metrics.loss is nan"):
        save_checkpoint(tmp_path / "model.pt", broken)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OutputError, match="cannot be written"):
        save_checkpoint(tmp_path / "missing" / "model.pt", checkpoint)


class Reduce:
    """Pickles as a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


class SetState:
    """Pickles as an object whose __setstate__ is called."""

    def __setstate__(self, state: Any) -> None:
        Path(state).touch()

    def __getstate__(self) -> Any:
        return self.canary

    canary = ""


def attacks(canary: str) -> dict[str, Any]:
    """Objects that would write the canary file if their pickle were run."""
    shell, python = f"touch '{canary}'", f"open({canary!r}, 'w').close()"
    SetState.canary = canary
    return {
        "os.system": Reduce(os.system, shell),
        "os.popen": Reduce(os.popen, shell),
        "os.execv": Reduce(os.spawnl, os.P_WAIT, "/usr/bin/touch", "touch", canary),
        "os.mkdir": Reduce(os.mkdir, canary),
        "os.open": Reduce(os.open, canary, os.O_CREAT),
        "subprocess.run": Reduce(subprocess.run, ["touch", canary]),
        "subprocess.call": Reduce(subprocess.call, ["touch", canary]),
        "subprocess.Popen": Reduce(subprocess.Popen, ["touch", canary]),
        "subprocess.check_output": Reduce(subprocess.check_output, ["touch", canary]),
        "builtins.eval": Reduce(eval, python),
        "builtins.exec": Reduce(exec, python),
        "builtins.open": Reduce(open, canary, "w"),
        "builtins.compile": Reduce(exec, f"exec({python!r})"),
        "builtins.__import__": Reduce(__import__, "this"),
        "builtins.getattr": Reduce(getattr, Reduce(__import__, "os"), "system"),
        "map": Reduce(list, Reduce(map, os.mkdir, [canary])),
        "functools.partial": Reduce(functools.partial, os.mkdir, canary),
        "shutil.copy": Reduce(shutil.copy, sys.executable, canary),
        "pathlib.Path.touch": Reduce(Path.touch, Path(canary)),
        "pathlib.Path": Path(canary),
        "io.open": Reduce(io.open, canary, "w"),
        "io.FileIO": Reduce(io.FileIO, canary, "w"),
        "pickle.loads": Reduce(pickle.loads, pickle.dumps(Reduce(os.mkdir, canary))),
        "torch.load": Reduce(torch.load, canary),
        "torch.save": Reduce(torch.save, {}, canary),
        "torch.hub": Reduce(torch.hub.load, "owner/repository", "model"),
        "numpy.save": Reduce(np.save, canary, 1),
        "numpy.load": Reduce(np.load, canary, None, True),
        "types.FunctionType": Reduce(types.SimpleNamespace),
        "module": torch.nn.Linear(2, 2),
        "setstate": SetState(),
        "zipfile": Reduce(zipfile.ZipFile, canary, "w"),
    }


@pytest.mark.parametrize("place", ["value", "root"])
@pytest.mark.parametrize("name", attacks("x"))
def test_pickles_that_would_run_code_are_refused(path: Path, tmp_path: Path, name: str, place: str) -> None:
    canary = tmp_path / "canary"
    attack = attacks(str(canary))[name]
    data = torch.load(path, weights_only=True)
    torch.save(attack if place == "root" else {**data, "metrics": {"attack": attack}}, path)
    with pytest.raises(CheckpointError, match="more than plain data and tensors"):
        load_checkpoint(path)
    assert not canary.exists()


def test_the_attacks_are_real(path: Path, tmp_path: Path) -> None:
    """The negative control: a loader that trusts its file is taken over by most of them."""
    taken = 0
    for index, name in enumerate(attacks("x")):
        canary = tmp_path / f"canary{index}"
        if name in ("torch.hub", "builtins.__import__"):
            continue
        torch.save({"attack": attacks(str(canary))[name]}, path)
        try:
            torch.load(path, weights_only=False)
        except Exception:
            continue
        finally:
            taken += canary.exists()
    assert taken >= 18
