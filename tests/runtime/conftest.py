"""What the runtime's tests share: the tiny bundles, copies of them to damage, a way to sign a manifest."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vae_runtime import VAE
from vae_runtime.manifest import PRIOR_FILE, FittedPrior, Manifest
from vae_runtime.prior import GaussianMixture

DATA = Path(__file__).parent.parent / "data"


@pytest.fixture(scope="session")
def tiny_path() -> Path:
    """A VAE of 8x8 grey images with 4 latent dimensions; never written to."""
    return DATA / "tiny.vae"


@pytest.fixture(scope="session")
def rgb_path() -> Path:
    """A VAE of 3x6x5 colour images with a latent of shape (2, 3, 2); never written to."""
    return DATA / "tiny-rgb.vae"


@pytest.fixture(scope="session")
def vectors_path() -> Path:
    """A plain autoencoder of 5-vectors with a code of 2; never written to."""
    return DATA / "tiny-vectors.vae"


@pytest.fixture(scope="session")
def free_path() -> Path:
    """A VAE of colour images of any even height and width, latents (2, H/2, W/2); never written to."""
    return DATA / "tiny-free.vae"


@pytest.fixture
def bundle(tiny_path: Path, tmp_path: Path) -> Path:
    """A copy of the tiny bundle that a test may damage."""
    return Path(shutil.copytree(tiny_path, tmp_path / "copy.vae"))


@pytest.fixture(scope="session")
def tiny(tiny_path: Path) -> Iterator[VAE]:
    with VAE.load(tiny_path, threads=1) as vae:
        yield vae


@pytest.fixture(scope="session")
def rgb(rgb_path: Path) -> Iterator[VAE]:
    with VAE.load(rgb_path, threads=1) as vae:
        yield vae


@pytest.fixture(scope="session")
def vectors(vectors_path: Path) -> Iterator[VAE]:
    with VAE.load(vectors_path, threads=1) as vae:
        yield vae


@pytest.fixture(scope="session")
def images() -> np.ndarray:
    """20 images for `tiny`: float32 (20, 1, 8, 8) in [0, 1]."""
    return np.random.default_rng(7).random((20, 1, 8, 8), dtype=np.float32)


@pytest.fixture
def pixels() -> np.ndarray:
    """uint8 (150, 8, 8): more than two of the command line's batches."""
    return np.random.default_rng(3).integers(0, 256, (150, 8, 8), np.uint8)


@pytest.fixture
def npy(tmp_path: Path, pixels: np.ndarray) -> Path:
    """`pixels` as a file."""
    np.save(tmp_path / "pixels.npy", pixels)
    return tmp_path / "pixels.npy"


@pytest.fixture
def pictures(tmp_path: Path, pixels: np.ndarray) -> Path:
    """A folder with the first three of `pixels`."""
    (tmp_path / "pictures").mkdir()
    for number in range(3):
        pytest.importorskip("PIL.Image").fromarray(pixels[number]).save(tmp_path / "pictures" / f"p{number}.png")
    return tmp_path / "pictures"


def sign_text(data: Any) -> bytes:
    """The bytes of a manifest with a right digest in them, whatever nonsense `data` holds.

    Written from the format's description and not with its code, so that a change of either is noticed.
    """
    zeros = "0" * 64
    text = json.dumps({**data, "manifest_sha256": zeros}, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    line = '\n  "manifest_sha256": "{}"'
    return text.replace(line.format(zeros), line.format(digest)).encode("utf-8", "surrogatepass")


@pytest.fixture(scope="session")
def sign() -> Callable[[Any], bytes]:
    return sign_text


@pytest.fixture(scope="session")
def manifest_data(tiny_path: Path) -> Callable[[], dict[str, Any]]:
    """A fresh dictionary of the tiny bundle's manifest at every call."""
    text = (tiny_path / "manifest.json").read_text("utf-8")

    def fresh() -> dict[str, Any]:
        data = json.loads(text)
        del data["manifest_sha256"]
        return data

    return fresh


@pytest.fixture(scope="session")
def resign() -> Callable[..., Path]:
    """Put files into a bundle and edit its manifest so that size, digests and signature are right again."""

    def change(folder: Path, edit: Callable[[dict[str, Any]], Any] | None = None, **files: bytes) -> Path:
        data = Manifest.from_json((folder / "manifest.json").read_bytes()).to_dict()
        for stem, content in files.items():
            name = {"golden": "golden.npz", "prior": "prior.npz"}.get(stem, f"{stem}.onnx")
            (folder / name).write_bytes(content)
            data["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        if edit is not None:
            edit(data)
        (folder / "manifest.json").write_bytes(sign_text(data))
        return folder

    return change


@pytest.fixture(scope="session")
def give_prior(resign: Callable[..., Path]) -> Callable[[Path, GaussianMixture], Path]:
    """Put a fitted prior into a bundle."""

    def give(folder: Path, mixture: GaussianMixture) -> Path:
        components = len(mixture.weights)
        spec = FittedPrior("gaussian" if components == 1 else "mixture", components, PRIOR_FILE, 100)
        return resign(folder, lambda data: data["latent"].update(fitted_prior=spec.to_dict()), prior=mixture.to_npz())

    return give


@pytest.fixture(scope="session")
def python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a piece of Python in a fresh interpreter with a time limit; -> its return code and output."""

    def run(code: str, *arguments: object, timeout: float = 60, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)],
            capture_output=True, text=True, timeout=timeout, env={**os.environ, **environment}, check=False,
        )  # fmt: skip

    return run


@pytest.fixture
def litter(tmp_path: Path) -> Callable[[], list[str]]:
    """The names below `tmp_path` that look left over: hidden ones, temporary ones."""

    def find() -> list[str]:
        found = (path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
        return sorted(str(path) for path in found if path.name.startswith(".") or path.suffix in (".part", ".old"))

    return find
