"""Make a virtual environment and install vae-edge into it, with the build of torch that fits this machine.

    python install.py .venv --extras cpu,images,train,export,bench

Linux without an NVIDIA GPU gets PyTorch's CPU build, by PyTorch's own documented way (https://pytorch.org/get-started):
the build on PyPI would bring gigabytes of CUDA. A torch wheel that pip has at hand (PIP_FIND_LINKS) is taken first.
Running it again is safe: what is there is kept.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import venv
from pathlib import Path

TORCH = "torch>=2.13"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
NEEDS_TORCH = {"train", "export"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the virtual environment; made if it is not there")
    parser.add_argument("--extras", default="cpu,images,train,export,bench", help="as in pyproject.toml, by commas")
    arguments = parser.parse_args()
    if sys.version_info < (3, 11):
        print(f"Error: this is Python {sys.version.split()[0]}; vae-edge needs 3.11 or newer", file=sys.stderr)
        return 1
    extras = set(arguments.extras.split(","))
    print(f"installing into {arguments.folder}; the first time takes some minutes", file=sys.stderr)
    python = make_environment(arguments.folder)
    if extras & NEEDS_TORCH and not has_torch(python) and not install_torch(python):
        print(
            f"Error: no CPU build of {TORCH} could be installed; install one into {arguments.folder} yourself"
            " (https://pytorch.org/get-started) and run this again",
            file=sys.stderr,
        )
        return 1
    here = Path(__file__).parent
    return pip(python, "--editable", f"{here}[{','.join(sorted(extras))}]")


def make_environment(folder: Path) -> Path:
    """The environment's interpreter."""
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    if not python.exists():
        venv.create(folder, with_pip=True)
    return python


def has_torch(python: Path) -> bool:
    return subprocess.run([python, "-c", "import torch"], capture_output=True, check=False).returncode == 0


def install_torch(python: Path) -> bool:
    if not sys.platform.startswith("linux") or has_nvidia_gpu():
        return pip(python, TORCH) == 0  # PyPI's build is the right one
    # Its dependencies come with vae-edge's own.
    if pip(python, "--no-index", "--no-deps", TORCH, quiet=True) == 0:
        return True
    return pip(python, TORCH, "--index-url", TORCH_CPU_INDEX) == 0


def has_nvidia_gpu() -> bool:
    if shutil.which("nvidia-smi") is None:
        return False
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return listed.returncode == 0 and "GPU" in listed.stdout


def pip(python: Path, *arguments: str, quiet: bool = False) -> int:
    command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, stderr=subprocess.DEVNULL if quiet else None, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
