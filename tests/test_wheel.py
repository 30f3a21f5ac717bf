"""The wheel, installed where there is no torch, runs a bundle."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TINY = ROOT / "tests" / "data" / "tiny.vae"
PACKAGES = {"vae_training", "vae_export", "vae_runtime", "vae_benchmarks"}

USE = """
import sys
import numpy as np
from vae_runtime import VAE, to_uint8
with VAE.load(sys.argv[1]) as vae:
    assert vae.selftest().passed
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8), dtype=np.uint8)
    posterior = vae.encode(images)
    assert vae.decode(posterior.sample(seed=0)).shape == (3, 1, 8, 8)
    assert to_uint8(vae.sample(5, seed=0)).shape == (5, 8, 8)
assert not {"torch", "onnx", "PIL", "click"} & set(sys.modules), sorted(sys.modules)
print("ran on", vae.device)
"""


def run(*command: object, folder: Path) -> str:
    done = subprocess.run([str(part) for part in command], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pip(python: Path, *arguments: object, folder: Path) -> str:
    """This interpreter's pip, at work in the environment of another: to install one there takes seconds."""
    return run(sys.executable, "-m", "pip", "--python", python, *arguments, folder=folder)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT, folder=folder)
    return next(folder.glob("vae_edge-*.whl"))


@pytest.fixture(scope="module")
def edge_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter with the wheel, numpy, click, onnxruntime and Pillow, and nothing else."""
    folder = tmp_path_factory.mktemp("edge")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "env", folder=folder)
    python = folder / "env" / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    pip(python, "install", "--quiet", "--no-compile", f"{wheel}[cpu,images]", folder=folder)
    return python


def test_the_wheel_holds_the_four_packages_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        entry_points = archive.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == PACKAGES
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert all(name.endswith((".py", "py.typed")) for name in names if ".dist-info" not in name)
    for command in ("vae-train", "vae-export", "vae-run", "vae-bench"):
        assert f"{command} = " in entry_points


def test_the_runtime_needs_no_torch(edge_python: Path, tmp_path: Path) -> None:
    installed = pip(edge_python, "list", "--format=freeze", folder=tmp_path).lower()
    assert "onnxruntime==" in installed
    assert not any(line.startswith(("torch==", "onnx==", "scikit-learn==")) for line in installed.splitlines())
    assert run(edge_python, "-c", USE, TINY, folder=tmp_path) == "ran on cpu\n"


def test_the_command_line_runs_there(edge_python: Path, tmp_path: Path) -> None:
    vae_run = edge_python.parent / ("vae-run.exe" if sys.platform == "win32" else "vae-run")
    assert "passed on cpu in fp32" in run(vae_run, "selftest", TINY, folder=tmp_path)
    run(vae_run, "sample", TINY, "-n", 4, "--output", "samples", folder=tmp_path)
    run(vae_run, "encode", TINY, "samples", "--output", "latents.npz", folder=tmp_path)
    run(vae_run, "decode", TINY, "latents.npz", "--output", "decoded.png", folder=tmp_path)
    assert (tmp_path / "decoded.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("command", "arguments", "extra"),
    [("vae-train", ["--data", "digits", "--output", "out"], "train"), ("vae-export", ["model.pt"], "export")],
)
def test_a_missing_extra_is_answered_with_its_install_command(edge_python, tmp_path, command, arguments, extra) -> None:
    program = edge_python.parent / (f"{command}.exe" if sys.platform == "win32" else command)
    shown = subprocess.run([program, "--help"], capture_output=True, text=True, check=False)
    assert shown.returncode == 0
    refused = subprocess.run([program, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert f'pip install "vae-edge[{extra}]"' in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
