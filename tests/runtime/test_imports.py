"""Who may import whom, read from the source; and what an import does, seen in a fresh interpreter."""

from __future__ import annotations

import ast
import io
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
PACKAGES = {
    "vae_runtime": ROOT / "runtime" / "vae_runtime",
    "vae_training": ROOT / "training" / "vae_training",
    "vae_export": ROOT / "export" / "vae_export",
    "vae_benchmarks": ROOT / "benchmarks" / "vae_benchmarks",
}
EVERYWHERE = {"numpy", "click"}
OF_THE_RUNTIME_FOR_TRAINING = (
    *("preprocess", "sources", "images", "errors", "manifest", "arguments", "atomic", "console", "prior", "fidelity"),
    *("latent_space", "version", "clutter"),
)

ALLOWED: dict[str, set[str]] = {
    "vae_runtime": {"vae_runtime"},
    "vae_training": {"vae_training", "torch", "accelerate", "sklearn", "PIL", "tensorboard", "tqdm"}
    | {f"vae_runtime.{module}" for module in OF_THE_RUNTIME_FOR_TRAINING},
    "vae_export": {"vae_export", "vae_runtime", "torch", "onnx", "onnxscript"}
    | {"vae_training.models", "vae_training.checkpoint", "vae_training.fit_prior"},
    "vae_benchmarks": {"vae_benchmarks", "vae_runtime", "psutil"},
}
# Modules that may import something more, and what.
IN_ONE_MODULE = {
    "vae_runtime/engine.py": {"onnxruntime"},
    "vae_runtime/cuda.py": {"tensorrt_libs"},
    "vae_runtime/plugins.py": {"onnxruntime_ep_openvino"},
    "vae_runtime/images.py": {"PIL"},
    "vae_runtime/latent_files.py": {"safetensors"},
    "vae_benchmarks/picture.py": {"matplotlib"},
    "vae_training/rate_distortion.py": {"matplotlib"},
    "vae_benchmarks/loadgen.py": {"mlperf_loadgen"},
    "vae_export/activation_ranges.py": {"onnxruntime.quantization"},
    "vae_export/quantize.py": {"onnxruntime.quantization"},
    "vae_export/factory.py": {"?"},  # the module that its user names
    "vae_export/diffusers_model.py": {"diffusers"},
    "vae_export/pythae_model.py": {"pythae"},
    "vae_export/weights.py": {"safetensors"},
    "vae_export/float16.py": {"onnxruntime.quantization.onnx_model", "onnxruntime.transformers.float16"},
}


def imports(path: Path, package: str) -> Iterator[tuple[int, str]]:
    """Every module that a file imports anywhere, absolute, with its line."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            inside = [package, *path.relative_to(PACKAGES[package]).parent.parts][: None if node.level else 0]
            base = [*inside[: len(inside) - node.level + 1], *([node.module] if node.module else [])]
            for alias in node.names:
                yield node.lineno, ".".join([*base, alias.name])
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("__import__", "importlib.import_module"):
            yield node.lineno, ast.literal_eval(node.args[0]) if isinstance(node.args[0], ast.Constant) else "?"


def breaches(path: Path, package: str) -> list[str]:
    allowed = ALLOWED[package] | EVERYWHERE | IN_ONE_MODULE.get(f"{package}/{path.name}", set())
    if package == "vae_benchmarks" and "peer" in path.relative_to(PACKAGES[package]).as_posix():
        allowed |= {"torch", "openvino", "onnxruntime"}
    found = []
    for line, module in imports(path, package):
        parts = module.split(".")
        names = {".".join(parts[: n + 1]) for n in range(len(parts))}
        if parts[0] not in sys.stdlib_module_names and not names & allowed:
            found.append(f"{path.name}:{line} imports {module}")
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_what_the_table_allows(package: str) -> None:
    found = [breach for path in sorted(PACKAGES[package].rglob("*.py")) for breach in breaches(path, package)]
    assert found == []


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("vae_runtime", "import torch"),
        ("vae_runtime", "def f():\n    from onnx import load"),
        ("vae_runtime", "import onnxruntime"),
        ("vae_runtime", "from PIL import Image"),
        ("vae_runtime", "import vae_export"),
        ("vae_training", "from vae_runtime.vae import VAE"),
        ("vae_training", "from vae_runtime import VAE"),
        ("vae_training", "import onnx"),
        ("vae_export", "from vae_training.loop import train"),
        ("vae_export", "import vae_training"),
        ("vae_benchmarks", "import torch"),
        ("vae_benchmarks", "import openvino"),
        ("vae_benchmarks", "from matplotlib.figure import Figure"),
        ("vae_benchmarks", "from vae_export import export_bundle"),
        ("vae_runtime", "__import__('torch')"),
    ],
)
def test_the_check_above_sees_forbidden_imports(
    package: str, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "module.py").write_text(source)
    monkeypatch.setitem(PACKAGES, package, tmp_path)
    assert len(breaches(tmp_path / "module.py", package)) == 1


def code_lines(path: Path) -> int:
    """Lines with code on them: no blank lines, comments or docstrings."""
    text = path.read_text("utf-8")
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            docstrings.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    skipped = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in skipped:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


def test_runtime_without_its_command_line_stays_small() -> None:
    shell = {"cli.py", "console.py", "sources.py", "sinks.py", "latent_files.py", "images.py", "tune.py"}
    shell |= {"command_inputs.py", "latent_commands.py", "score_commands.py", "detection.py", "labels.py"}
    counts = {path.name: code_lines(path) for path in PACKAGES["vae_runtime"].glob("*.py") if path.name not in shell}
    assert 500 < sum(counts.values()) < 5650, counts


def test_import_loads_neither_engine_nor_anything_heavy(python: Any) -> None:
    code = "import sys, vae_runtime; print(*({'torch', 'onnx', 'click', 'PIL', 'onnxruntime'} & set(sys.modules)), '.')"
    result = python(code)
    assert (result.returncode, result.stdout, result.stderr) == (0, ".\n", "")


def test_loading_a_bundle_adds_onnxruntime_and_nothing_else(python: Any, tiny_path: Path) -> None:
    code = """
import sys
from vae_runtime import VAE
VAE.load(sys.argv[1]).sample(1)
print(sorted({'torch', 'onnx', 'click', 'PIL', 'onnxruntime'} & set(sys.modules)))
"""
    assert python(code, tiny_path).stdout == "['onnxruntime']\n"


def test_encoding_and_decoding_load_nothing_of_what_few_applications_ask(python: Any, tiny_path: Path) -> None:
    code = """
import sys
from vae_runtime import VAE
with VAE.load(sys.argv[1]) as vae:
    vae.decode(vae.encode(vae.golden()["x"]).sample(seed=0))
late = "bound_score evidence latent_space likelihood prior scoring tiled tune".split()
print([name for name in late if "vae_runtime." + name in sys.modules])
"""
    assert python(code, tiny_path).stdout == "[]\n"


@pytest.mark.parametrize(
    ("package", "command"),
    [
        ("vae_training", "vae-train"),
        ("vae_export", "vae-export"),
        ("vae_runtime", "vae-run"),
        ("vae_benchmarks", "vae-bench"),
    ],
)
def test_a_package_run_as_a_program_is_its_command(package: str, command: str) -> None:
    arguments = [sys.executable, "-m", package, "--help"]
    shown = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=False)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.startswith(f"Usage: {command} [")


@pytest.mark.parametrize(
    "module",
    ["preprocess", "manifest", "errors", "bundle", "graph_rules", "atomic", "sampling", "prior", "latent_space"],
)
def test_modules_work_without_any_engine(python: Any, module: str) -> None:
    result = python(f"import sys; sys.modules['onnxruntime'] = None; import vae_runtime.{module}")
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize(("before", "after"), [(None, "1"), ("0", "0"), ("", "")])
def test_telemetry_is_switched_off_unless_the_user_decided(
    python: Any, before: str | None, after: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)
    environment = {} if before is None else {"ORT_DISABLE_TELEMETRY": before}
    code = """
import os
before = dict(os.environ)
import vae_runtime
changed = {k: v for k, v in os.environ.items() if before.get(k) != v}
print(repr(os.environ["ORT_DISABLE_TELEMETRY"]), set(changed) - {"ORT_DISABLE_TELEMETRY"} or "")
"""
    assert python(code, **environment).stdout == f"{after!r} \n"
