"""Writing a bundle: replaced as a whole, only on request, only if it is one."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from vae_export.bundle import check_output, write_bundle
from vae_runtime.bundle import Bundle
from vae_runtime.errors import BundleError, OutputError
from vae_runtime.manifest import PRIOR_FILE, FittedPrior
from vae_runtime.prior import GaussianMixture

TINY = Path(__file__).parent.parent / "data" / "tiny.vae"


def contents() -> tuple:
    bundle = Bundle.open(TINY)
    graphs = {name: bundle.read(name) for name in ("encoder.onnx", "decoder.onnx")}
    return bundle.manifest, graphs, bundle.golden()


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.skipif(sys.version_info < (3, 11, 4), reason="zipfile of older Pythons writes other headers, gh-103861")
def test_what_is_written_is_what_was_read(tmp_path: Path) -> None:
    write_bundle(tmp_path / "copy.vae", *contents())
    assert snapshot(tmp_path / "copy.vae") == snapshot(TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["copy.vae"]


def test_an_existing_bundle_is_replaced_only_with_force(tmp_path: Path) -> None:
    target = tmp_path / "a.vae"
    manifest, graphs, golden = contents()
    write_bundle(target, manifest, graphs, golden)
    before = snapshot(target)
    renamed = manifest._replace(name="other")
    with pytest.raises(OutputError, match=r"a\.vae exists; pass --force \(force=True\) to replace that bundle"):
        write_bundle(target, renamed, graphs, golden)
    assert snapshot(target) == before
    (target / ".DS_Store").touch()
    write_bundle(target, renamed, graphs, golden, force=True)
    assert Bundle.open(target).manifest.name == "other"
    assert set(snapshot(target)) == set(before)
    assert [path.name for path in tmp_path.iterdir()] == ["a.vae"]


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), lambda path: path.write_text("precious")])
def test_what_is_no_bundle_is_never_replaced(tmp_path: Path, make) -> None:
    target = tmp_path / "a.vae"
    make(target)
    with pytest.raises(OutputError, match="exists and is no bundle; it is never replaced"):
        write_bundle(target, *contents(), force=True)
    assert target.is_dir() or target.read_text() == "precious"


def test_a_folder_with_a_foreign_manifest_is_never_replaced(tmp_path: Path) -> None:
    target = tmp_path / "extension"
    target.mkdir()
    (target / "manifest.json").write_text('{"manifest_version": 3}')
    with pytest.raises(OutputError, match="exists and is no bundle"):
        check_output(target, force=True)


@pytest.mark.parametrize("is_damaged", [False, True])
@pytest.mark.parametrize("name", ["NOTES.txt", "training", ".hidden", "link.onnx"])
def test_a_bundle_with_somebody_s_own_files_in_it_is_not_replaced(tmp_path: Path, name: str, is_damaged: bool) -> None:
    target = tmp_path / "a.vae"
    write_bundle(target, *contents())
    if is_damaged:
        (target / "manifest.json").write_text('{"format": "vae-bundle"')
    if name == "training":
        (target / name).mkdir()
        (target / name / "model.pt").write_text("precious")
    elif name == "link.onnx":
        (target / name).symlink_to("/precious")
    else:
        (target / name).write_text("precious")
    (target / ".DS_Store").touch()
    found = {path.name for path in target.iterdir()}
    for force in (True, False):
        with pytest.raises(OutputError, match=rf"a\.vae/{name} is no file of the bundle .*a\.vae.*; move it away"):
            write_bundle(target, *contents(), force=force)
    assert {path.name for path in target.iterdir()} == found


def test_a_file_that_is_put_into_the_old_bundle_meanwhile_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, original = tmp_path / "a.vae", Path.write_bytes
    write_bundle(target, *contents())

    def write(self: Path, data: bytes) -> int:
        (target / "NOTES.txt").write_text("precious")
        return original(self, data)

    monkeypatch.setattr(Path, "write_bytes", write)
    with pytest.raises(OutputError, match=r"NOTES\.txt is no file of the bundle"):
        write_bundle(target, *contents(), force=True)
    assert (target / "NOTES.txt").read_text() == "precious"


@pytest.mark.parametrize("is_damaged", [False, True])
def test_what_file_managers_leave_in_a_bundle_goes_with_it(tmp_path: Path, is_damaged: bool) -> None:
    target = tmp_path / "a.vae"
    write_bundle(target, *contents())
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "._encoder.onnx"):
        (target / name).touch()
    (target / "encoder.onnx").unlink()
    if is_damaged:
        (target / "manifest.json").write_text('{"format": "vae-bundle"')
    write_bundle(target, *contents(), force=True)
    assert snapshot(target).keys() == snapshot(TINY).keys()


def test_a_missing_parent_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"there is no folder .*absent"):
        write_bundle(tmp_path / "absent" / "a.vae", *contents())


def test_a_manifest_that_could_not_be_read_back_is_not_written(tmp_path: Path) -> None:
    manifest, graphs, golden = contents()
    with pytest.raises(BundleError, match="kind is 'gan'"):
        write_bundle(tmp_path / "a.vae", manifest._replace(kind="gan"), graphs, golden)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_in_the_middle_keeps_the_old_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "a.vae"
    write_bundle(target, *contents())
    before = snapshot(target)
    original = Path.write_bytes

    def fail_on_the_manifest(self: Path, data: bytes) -> int:
        if self.name == "manifest.json":
            raise OSError(28, "No space left on device")
        return original(self, data)

    monkeypatch.setattr(Path, "write_bytes", fail_on_the_manifest)
    with pytest.raises(OutputError, match=r"a\.vae cannot be written: No space left on device"):
        write_bundle(target, *contents(), force=True)
    assert snapshot(target) == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.vae"]


def test_golden_values_are_stored_without_loss(tmp_path: Path) -> None:
    manifest, graphs, golden = contents()
    write_bundle(tmp_path / "a.vae", manifest, graphs, golden)
    for name, array in Bundle.open(tmp_path / "a.vae").golden().items():
        np.testing.assert_array_equal(array, golden[name])


def test_a_fitted_priors_file_is_written_and_listed_with_the_rest(tmp_path: Path) -> None:
    manifest, graphs, golden = contents()
    prior = GaussianMixture(np.ones(1), np.zeros((1, 4)), np.eye(4)[None])
    latent = manifest.latent._replace(fitted_prior=FittedPrior("gaussian", 1, PRIOR_FILE, 100))
    with pytest.raises(BundleError, match=r"latent.fitted_prior.file is 'prior.npz', which files does not list"):
        write_bundle(tmp_path / "a.vae", manifest._replace(latent=latent), graphs, golden)
    files = {**graphs, PRIOR_FILE: prior.to_npz()}
    written = write_bundle(tmp_path / "a.vae", manifest._replace(latent=latent), files, golden)
    assert Bundle.open(tmp_path / "a.vae").manifest == written
    assert Bundle.open(tmp_path / "a.vae").read(PRIOR_FILE) == prior.to_npz()
