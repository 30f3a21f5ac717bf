"""Which kind a source is of is told by its content, whatever it is called."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vae_export.imported import ImportOptions
from vae_export.importers import IMPORTERS, load, recognise
from vae_runtime.errors import InputError, MissingExtraError

DIFFUSERS = {"_class_name": "AutoencoderKL", "_diffusers_version": "0.42.1"}
PYTHAE = {"name": "VAEConfig", "input_dim": [1, 8, 8], "latent_dim": 2}


def write(folder: Path, name: str, content: object) -> str:
    folder.mkdir(exist_ok=True, parents=True)
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return str(folder)


@pytest.mark.parametrize(
    ("path", "name", "content", "kind"),
    [
        ("pythae", "config.json", DIFFUSERS, "diffusers"),
        ("a.safetensors", "config.json", {"_class_name": "UNet2DModel"}, "diffusers"),
        ("vae", "model_index.json", {"_class_name": "FluxPipeline"}, "diffusers"),
        ("diffusers", "model_config.json", PYTHAE, "pythae"),
        ("training/final_model", "model_config.json", PYTHAE, "pythae"),
        ("model.pt", "model_config.json", {"name": "VAMPConfig", "input_dim": None}, "pythae"),
    ],
)
def test_a_folder_is_recognised_by_its_content(
    tmp_path: Path, path: str, name: str, content: object, kind: str
) -> None:
    folder = write(tmp_path / path, name, content)
    assert kind == recognise(folder).KIND
    assert kind == recognise(folder.removesuffix("/final_model")).KIND


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", {"architectures": ["BertModel"], "model_type": "bert", "transformers_version": "4.50.0"}),
        ("config.json", "{"),
        ("config.json", ["_class_name"]),
        ("config.json", "[" * 100_000),
        ("config.json", json.dumps(DIFFUSERS) + " " * 2**20),
        ("model_config.json", {"name": "my-model", "input_dim": [4]}),
        ("model_config.json", {"name": "VAEConfig"}),
        ("model_config.json", {"name": ["VAEConfig"], "input_dim": [4]}),
        ("other.json", DIFFUSERS),
    ],
)
def test_what_is_of_no_kind_is_told_with_what_was_found(tmp_path: Path, name: str, content: object) -> None:
    folder = write(tmp_path / "diffusers", name, content)
    with pytest.raises(InputError) as caught:
        recognise(folder)
    assert str(caught.value) == (
        f"{folder} is a folder with {name}; understood are a model.pt of vae-train and, by --from, "
        f"{', '.join(importer.KIND for importer in IMPORTERS)}"
    )


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("nothing", "neither a file nor a folder"),
        ("picture.png", r"a file that begins with b'\x89PNG'"),
        ("empty", "an empty folder"),
        ("many", "a folder with 0, 1, 2, 3, 4, 5, ...;"),
        ("zero\0byte", "neither a file nor a folder"),
    ],
)
def test_odd_sources_are_described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, found: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("picture.png").write_bytes(b"\x89PNG")
    Path("empty").mkdir()
    for n in range(8):
        write(Path("many"), str(n), "")
    with pytest.raises(InputError) as caught:
        load(source, None, ImportOptions())
    assert f"{source} is {found}" in str(caught.value)


def test_a_folder_of_two_kinds_must_be_told_apart(tmp_path: Path) -> None:
    write(tmp_path, "config.json", DIFFUSERS)
    folder = write(tmp_path, "model_config.json", PYTHAE)
    with pytest.raises(InputError, match=r"can be read as diffusers, pythae; say which with --from$"):
        load(folder, None, ImportOptions())


def test_a_kind_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--from is 'keras'; expected one of model, diffusers, ldm, pythae"):
        load(str(tmp_path), "keras", ImportOptions())


def test_recognising_imports_nothing_heavy(tmp_path: Path) -> None:
    folder = write(tmp_path, "config.json", DIFFUSERS)
    code = """
import sys
from vae_export.importers import recognise
print(recognise(sys.argv[1]).KIND, sorted({'torch', 'onnx', 'diffusers', 'pythae', 'safetensors'} & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=False)
    assert (result.stdout, result.stderr) == ("diffusers []\n", "")


@pytest.mark.parametrize(
    ("library", "name", "content"),
    [("diffusers", "config.json", DIFFUSERS), ("pythae", "model_config.json", PYTHAE)],
)
def test_a_missing_library_is_named_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str, name: str, content: object
) -> None:
    for module in [module for module in sys.modules if module.split(".")[0] == library]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingExtraError, match=rf'needs {library}, .* pip install "vae-edge\[{library}\]"'):
        load(write(tmp_path, name, content), None, ImportOptions())


def test_torch_is_needed_only_to_load(tmp_path: Path) -> None:
    code = """
import sys
sys.modules["torch"] = None
from vae_export.imported import ImportOptions
from vae_export.importers import load
from vae_runtime.errors import MissingExtraError
try:
    load(sys.argv[1], None, ImportOptions())
except MissingExtraError as error:
    print(error)
"""
    folder = write(tmp_path, "config.json", DIFFUSERS)
    result = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=False)
    assert 'needs torch, which is not installed; run: pip install "vae-edge[export]"' in result.stdout
