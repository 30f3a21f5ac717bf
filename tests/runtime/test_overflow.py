"""Finite vectors so large that the network's numbers overflow: no result that looks like one."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from vae_runtime import VAE, InputError
from vae_runtime.cli import main

LARGEST = float(np.finfo(np.float32).max)
MESSAGE = "is so far from what the model knows that its latent has NaN or infinite values"


@pytest.fixture
def far() -> np.ndarray:
    """Three vectors, the second beyond what float32 can add up."""
    x = np.zeros((3, 5), np.float32)
    x[1] = (LARGEST, -LARGEST, LARGEST, LARGEST, LARGEST)
    return x


@pytest.fixture
def file(far: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    np.save("far.npy", far)
    return Path("far.npy")


@pytest.mark.parametrize("batch_size", [None, 1])
def test_nothing_is_odder(vectors: VAE, far: np.ndarray, batch_size: int | None) -> None:
    assert not np.isfinite(vectors.encode(far[1:2]).mean).all()
    scores = vectors.score(far, batch_size=batch_size)
    assert np.isposinf(scores).tolist() == [False, True, False]
    np.testing.assert_allclose(scores[[0, 2]], vectors.score(far[[0, 2]]), rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "which"),
    [
        (lambda vae, x: vae.reconstruct(x), r"inputs\[1\]"),
        (lambda vae, x: vae.nearest(x, np.zeros((2, 2), np.float32)), r"inputs\[1\]"),
        (lambda vae, x: vae.traverse(x[1:2], 0, (0,)), r"inputs\[0\]"),
        (lambda vae, x: vae.interpolate(x[:1], x[1:2]), r"b\[0\]"),
        (lambda vae, x: vae.attribute_vector(x, x[:1]), r"positives\[1\]"),
    ],
)
def test_what_goes_on_from_a_latent_names_the_input(
    vectors: VAE, far: np.ndarray, call: Callable[..., Any], which: str
) -> None:
    with pytest.raises(InputError, match=f"^{which} {MESSAGE}$"):
        call(vectors, far)


@pytest.mark.parametrize(
    "arguments",
    [
        ("encode", "{bundle}", "far.npy", "--output", "z.npz"),
        ("encode", "{bundle}", "far.npy", "--output", "z", "--codec", "uint8"),
        ("nearest", "{bundle}", "far.npy", "--references", "far.npy"),
        ("traverse", "{bundle}", "far.npy#1", "--dimension", "0", "--output", "t.npy"),
        ("map", "{bundle}", "far.npy", "--output", "m.npy"),
        ("score", "{bundle}", "far.npy", "--maps", "m.npy"),
    ],
)
def test_commands_name_the_input_and_write_nothing(vectors_path: Path, file: Path, arguments: tuple[str, ...]) -> None:
    result = CliRunner().invoke(main, [one.format(bundle=vectors_path) for one in arguments])
    assert (result.exit_code, result.stdout) == (1, "")
    what = "map" if "--maps" in arguments else "latent"
    assert result.stderr == f"Error: far.npy#1 {MESSAGE.replace('latent', what)}\n"
    assert list(Path().iterdir()) == [file]


def test_scores_are_infinite_in_a_table_and_null_in_json(vectors_path: Path, file: Path) -> None:
    for arguments in (["--json"], ["--output", "a.json"], ["--output", "a.csv"], ["--csv"], []):
        result = CliRunner().invoke(main, ["score", str(vectors_path), str(file), *arguments])
        assert (result.exit_code, result.stderr) == (0, "")
        if arguments == ["--json"]:
            printed = result.stdout
    assert json.loads(printed)["scores"][1] == {"name": "far.npy#1", "score": None}
    assert json.loads(Path("a.json").read_text()) == json.loads(printed)
    with Path("a.csv").open(encoding="utf-8") as stream:
        assert [row["score"] for row in csv.DictReader(stream)][1] == "inf"
