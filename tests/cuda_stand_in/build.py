"""Build a stand-in for CUDA's libraries, so that onnxruntime's real CUDA provider runs on a machine without a GPU.

    make test-cuda     builds it in .cuda-stand-in, and runs the tests for GPUs with it

It shows whether sessions open, what lands on the CPU, which options are taken, how a CUDA graph is captured and
replayed, what is copied when, what happens without memory, from many threads, and that results are right; nothing of
speed. It works late and is strict where a GPU is (see runtime.cpp), and knows the kernels of fully connected and
convolutional bundles, with normalisation in groups and attention too; of others the outputs are NaN, and it says which.
It needs g++ 12 or later on x86-64 Linux.

    python tests/cuda_stand_in/build.py FOLDER

fills FOLDER/engine with onnxruntime-gpu (240 MB to fetch, for this Python) and FOLDER/lib with the libraries, unless
they are there, and prints the environment for a process that is to use them: LD_LIBRARY_PATH and PYTHONPATH.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCES = Path(__file__).resolve().parent
ENGINE = "onnxruntime-gpu==1.31.1"  # kernels are told by name, and their arguments by place; 1.28.0 runs too
HEADERS = ("nvidia-cuda-runtime>=13,<14", "nvidia-cuda-crt>=13,<14")
LIBRARIES = (
    *("libcuda.so.1", "libcudart.so.13", "libcublas.so.13", "libcublasLt.so.13"),
    *("libcudnn.so.9", "libcurand.so.10", "libnvrtc.so.13", "libcufft.so.12"),
)


def main() -> int:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.stderr.write(f"{__doc__}\n")
        return 2
    folder = Path(sys.argv[1]).resolve()
    if not (folder / "engine" / "onnxruntime").is_dir():
        install(folder / "engine", ENGINE)
    if not (folder / "include").is_dir():
        install(folder / "include", *HEADERS)
    build(folder / "lib", folder / "include" / "nvidia" / "cu13" / "include")
    sys.stdout.write(f"LD_LIBRARY_PATH={folder / 'lib'}\nPYTHONPATH={folder / 'engine'}\n")
    return 0


def install(target: Path, *packages: str) -> None:
    command = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:", "--target")
    subprocess.run([*command, str(target), *packages], check=True)


def build(folder: Path, include: Path) -> None:
    """One library under all names, made anew where a source is newer."""
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "libstandin.so"
    sources = sorted(SOURCES.glob("*.cpp"))
    newest = max(path.stat().st_mtime for path in (*sources, *SOURCES.glob("*.h")))
    if not library.exists() or library.stat().st_mtime < newest:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / library.name
            flags = ("-std=c++17", "-O3", "-fPIC", "-shared", "-Wall", "-Wextra", "-Wno-unused-parameter")
            compiler = os.environ.get("CXX", "g++")
            subprocess.run([compiler, *flags, f"-isystem{include}", *map(str, sources), "-o", str(made)], check=True)
            made.rename(library)
    for name in LIBRARIES:
        if not (folder / name).exists():
            (folder / name).symlink_to(library.name)


if __name__ == "__main__":
    sys.exit(main())
