from __future__ import annotations

import io
import os
import random
import shutil
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vae_runtime import VAE, BundleError
from vae_runtime.bundle import Bundle, is_bundle_folder
from vae_runtime.prior import GaussianMixture

FILES = ("manifest.json", "encoder.onnx", "decoder.onnx", "golden.npz")


def read_all(folder: Path) -> dict[str, bytes]:
    """What `VAE.load` does before it opens a session."""
    bundle = Bundle.open(folder)
    return {file: bundle.read(file) for file in bundle.manifest.files}


def test_a_bundle_stays_where_it_is_whatever_folder_is_entered(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_path.parent)
    opened = Bundle.open(tiny_path.name)
    monkeypatch.chdir(tmp_path)
    assert set(opened.golden()) == {"x", "mean", "logvar", "reconstruction"}


def test_intact_bundle_gives_exactly_its_bytes(tiny_path: Path) -> None:
    assert read_all(tiny_path) == {name: (tiny_path / name).read_bytes() for name in FILES[1:]}


# --- damage -----------------------------------------------------------------------------------------------------------


def damages(content: bytes, rng: random.Random, count: int) -> list[bytes]:
    """`count` altered versions: bit flips mostly, then truncations, appends, swapped and zeroed stretches."""
    found = []
    while len(found) < count:
        data, kind = bytearray(content), rng.random()
        at, other = rng.randrange(len(data)), rng.randrange(len(data))
        if kind < 0.6:
            data[at] ^= 1 << rng.randrange(8)
        elif kind < 0.75:
            del data[at:]
        elif kind < 0.85:
            data += rng.randbytes(rng.choice((1, 2, 100)))
        elif kind < 0.95:
            data[at], data[other] = data[other], data[at]
        else:
            data[min(at, other) : max(at, other)] = bytes(abs(at - other))
        if data != content:
            found.append(bytes(data))
    return found


@pytest.mark.parametrize("name", FILES)
def test_no_damage_to_any_file_is_accepted(bundle: Path, name: str) -> None:
    file = bundle / name
    content = file.read_bytes()
    accepted = unnamed = 0
    for damaged in damages(content, random.Random(name), 600):
        file.write_bytes(damaged)
        try:
            read_all(bundle)
            accepted += 1
        except BundleError as error:
            unnamed += name not in str(error)
    assert (accepted, unnamed) == (0, 0)
    file.write_bytes(content)
    read_all(bundle)


def test_swapped_files_are_noticed_even_if_sizes_agree(bundle: Path, resign: Any) -> None:
    first, second = (bundle / f"{half}.onnx" for half in ("encoder", "decoder"))
    padded = second.read_bytes().ljust(len(first.read_bytes()), b"\0")
    resign(bundle, decoder=padded)
    content = first.read_bytes()
    first.write_bytes(padded)
    second.write_bytes(content)
    with pytest.raises(BundleError, match=r"coder.onnx was altered: its SHA-256 is [0-9a-f]{12}…, the manifest says"):
        VAE.load(bundle)


def test_file_of_another_bundle_is_refused(bundle: Path, rgb_path: Path) -> None:
    shutil.copy(rgb_path / "encoder.onnx", bundle)
    with pytest.raises(BundleError, match=r"encoder.onnx has 6379 bytes; the manifest says 4267"):
        VAE.load(bundle)


def test_altered_file_of_a_precision_that_is_not_used_is_refused_as_well(bundle: Path, resign: Any) -> None:
    content = (bundle / "encoder.onnx").read_bytes()
    (bundle / "encoder.int8.onnx").write_bytes(content)

    def add(data: dict[str, Any]) -> None:
        data["files"]["encoder.int8.onnx"] = dict(data["files"]["encoder.onnx"])
        data["precisions"]["int8"] = {"encoder": "encoder.int8.onnx", "decoder": "decoder.onnx"}

    resign(bundle, add)
    VAE.load(bundle).close()
    (bundle / "encoder.int8.onnx").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(BundleError, match=r"encoder.int8.onnx was altered"):
        VAE.load(bundle, precision="fp32")


# --- layouts ----------------------------------------------------------------------------------------------------------


def link_outside(folder: Path) -> None:
    outside = folder.parent / "outside.onnx"
    (folder / "encoder.onnx").rename(outside)
    (folder / "encoder.onnx").symlink_to(outside)


def link_inside(folder: Path) -> None:
    (folder / "encoder.onnx").unlink()
    (folder / "encoder.onnx").symlink_to("decoder.onnx")


def hard_link(folder: Path) -> None:
    os.link(folder / "encoder.onnx", folder.parent / "second-name.onnx")


def fifo(folder: Path) -> None:
    (folder / "golden.npz").unlink()
    os.mkfifo(folder / "golden.npz")


def folder_for_file(folder: Path) -> None:
    (folder / "decoder.onnx").unlink()
    (folder / "decoder.onnx").mkdir()


def manifest_link(folder: Path) -> None:
    (folder / "manifest.json").rename(folder.parent / "manifest.json")
    (folder / "manifest.json").symlink_to("../manifest.json")


def manifest_fifo(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    os.mkfifo(folder / "manifest.json")


LAYOUTS: list[tuple[str, Callable[[Path], Any], str]] = [
    ("missing", lambda f: (f / "decoder.onnx").unlink(), r"decoder.onnx cannot be read: No such file"),
    ("extra", lambda f: (f / "weights.bin").touch(), r"weights.bin is not listed in the manifest; a bundle holds"),
    ("hidden extra", lambda f: (f / ".notes").touch(), r"\.notes is not listed in the manifest"),
    ("extra folder", lambda f: (f / "sub").mkdir(), r"sub is not listed in the manifest"),
    ("link outside", link_outside, r"encoder.onnx is a symbolic link; a bundle's files lie in its own folder"),
    ("link inside", link_inside, r"encoder.onnx is a symbolic link"),
    ("hard link", hard_link, r"encoder.onnx is a hard link with 2 names; a bundle's files are its own"),
    ("fifo", fifo, r"golden.npz is not a regular file"),
    ("folder for file", folder_for_file, r"decoder.onnx is not a regular file"),
    ("manifest missing", lambda f: (f / "manifest.json").unlink(), r"has no manifest.json: it is no bundle"),
    ("manifest link", manifest_link, r"manifest.json is a symbolic link"),
    ("manifest fifo", manifest_fifo, r"manifest.json is not a regular file"),
    ("empty folder", lambda f: [p.unlink() for p in f.iterdir()], r"has no manifest.json"),
    ("no folder", shutil.rmtree, r"copy.vae cannot be opened as a bundle: No such file or directory"),
]


@pytest.mark.parametrize(("change", "message"), [case[1:] for case in LAYOUTS], ids=[case[0] for case in LAYOUTS])
def test_every_wrong_layout_is_refused_in_words(
    bundle: Path, change: Callable[[Path], Any], message: str, capfd: Any
) -> None:
    change(bundle)
    with pytest.raises(BundleError, match=message):
        VAE.load(bundle)
    assert capfd.readouterr() == ("", "")


CLUTTER = (".DS_Store", "Thumbs.db", "desktop.ini", "._encoder.onnx")


@pytest.mark.parametrize("name", CLUTTER)
def test_what_file_managers_leave_is_neither_read_nor_refused(bundle: Path, name: str) -> None:
    (bundle / name).symlink_to("nowhere")  # which no reader could open
    assert set(read_all(bundle)) == set(FILES[1:])


@pytest.mark.parametrize("name", [".DS_Store.txt", "thumbs", "a._b", ".Trashes"])
def test_names_like_those_are_refused(bundle: Path, name: str) -> None:
    (bundle / name).touch()
    with pytest.raises(BundleError, match="is not listed in the manifest"):
        Bundle.open(bundle)


def test_a_listed_file_of_such_a_name_is_read_as_any_other(bundle: Path, resign: Any) -> None:
    def rename(data: dict[str, Any]) -> None:
        data["files"]["._encoder.onnx"] = data["files"].pop("encoder.onnx")
        data["precisions"]["fp32"]["encoder"] = "._encoder.onnx"

    content = (bundle / "encoder.onnx").read_bytes()
    (bundle / "encoder.onnx").rename(bundle / "._encoder.onnx")
    resign(bundle, rename)
    assert read_all(bundle)["._encoder.onnx"] == content
    (bundle / "._encoder.onnx").write_bytes(content[:-1])
    with pytest.raises(BundleError, match=r"\._encoder\.onnx has \d+ bytes; the manifest says"):
        Bundle.open(bundle)


def test_bundle_reached_through_a_linked_folder_is_fine(bundle: Path) -> None:
    (bundle.parent / "current.vae").symlink_to(bundle)
    assert set(read_all(bundle.parent / "current.vae")) == set(FILES[1:])


def test_a_link_that_is_switched_to_another_version_leaves_the_one_that_was_loaded(
    bundle: Path, rgb_path: Path, give_prior: Any
) -> None:
    give_prior(bundle, GaussianMixture(np.ones(1), np.zeros((1, 4)), np.eye(4)[None]))
    link = bundle.parent / "current.vae"
    link.symlink_to(bundle)
    with VAE.load(link, threads=1) as vae:
        link.unlink()
        link.symlink_to(rgb_path)
        assert vae.selftest().passed
        assert vae.golden()["x"].shape[1:] == vae.sample(1, 0, prior="fitted").shape[1:] == (1, 8, 8)


def test_path_of_a_file_is_answered_with_what_a_bundle_is(tmp_path: Path) -> None:
    (tmp_path / "model.pt").touch()
    with pytest.raises(BundleError, match=r"model.pt is a file; a bundle is a folder .*: vae-export .*pt"):
        VAE.load(tmp_path / "model.pt")


def test_sparse_file_larger_than_memory_is_a_bundle_error(python: Any, bundle: Path, resign: Any) -> None:
    def grow(data: dict[str, Any]) -> None:
        data["files"]["encoder.onnx"]["bytes"] = 2**40

    resign(bundle, grow)
    os.truncate(bundle / "encoder.onnx", 2**40)
    code = """
import resource, sys
from vae_runtime.bundle import Bundle
resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))
try: Bundle.open(sys.argv[1]).read("encoder.onnx")
except Exception as error: print(type(error).__name__, error)
"""
    result = python(code, bundle)
    assert result.stdout.startswith("BundleError"), result
    assert "do not fit into memory" in result.stdout


def test_file_swapped_between_check_and_use_gives_old_or_new_and_never_a_mixture(
    bundle: Path, tmp_path: Path, resign: Any
) -> None:
    """A thread exchanges one graph and the manifest all the time; what is accepted is one whole version."""
    old = {name: (bundle / name).read_bytes() for name in FILES}
    other = Path(shutil.copytree(bundle, tmp_path / "other"))
    swapped = bytearray(old["encoder.onnx"])
    swapped[2000] ^= 1
    resign(other, encoder=bytes(swapped))
    new = {name: (other / name).read_bytes() for name in FILES}
    versions = [{k: v for k, v in version.items() if k != "manifest.json"} for version in (old, new)]
    stop, swaps = threading.Event(), 0

    def swap() -> None:
        nonlocal swaps
        while not stop.is_set():
            for version in (new, old):
                for name in ("encoder.onnx", "manifest.json"):
                    temporary = tmp_path / f"swap-{name}"
                    temporary.write_bytes(version[name])
                    temporary.replace(bundle / name)
                swaps += 1

    thread = threading.Thread(target=swap)
    thread.start()
    outcomes = {0: 0, 1: 0, "refused": 0}
    try:
        for _ in range(1500):
            try:
                outcomes[versions.index(read_all(bundle))] += 1  # type: ignore[index]
            except BundleError:
                outcomes["refused"] += 1
    finally:
        stop.set()
        thread.join()
    assert swaps > 100
    assert min(outcomes.values()) > 0, outcomes  # the race was real: both versions and refusals were seen


def test_session_is_made_from_the_bytes_that_were_checked(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, images: np.ndarray
) -> None:
    with VAE.load(bundle) as vae:
        expected = vae.encode(images).mean
    original = Bundle.read

    def read_then_replace(self: Bundle, file: str) -> bytes:
        data = original(self, file)
        (self.path / file).write_bytes(b"replaced after the check")
        return data

    monkeypatch.setattr(Bundle, "read", read_then_replace)
    with VAE.load(bundle) as vae:
        assert np.array_equal(vae.encode(images).mean, expected)


# --- golden values ----------------------------------------------------------------------------------------------------


def npz(**arrays: Any) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


def good_arrays(rows: int = 2) -> dict[str, Any]:
    shapes = {"x": (1, 8, 8), "mean": (4,), "logvar": (4,), "reconstruction": (1, 8, 8)}
    return {name: np.zeros((rows, *shape), np.float32) for name, shape in shapes.items()}


def zipped(content: bytes, compression: int = zipfile.ZIP_STORED, name: str = "x.npy") -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        archive.writestr(name, content)
    return stream.getvalue()


def npy_header(text: str) -> bytes:
    body = text.encode()
    return b"\x93NUMPY\x01\x00" + len(body).to_bytes(2, "little") + body


def plain_npy() -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.zeros(3, np.float32))
    return stream.getvalue()


def deflated_then_damaged() -> bytes:
    data = bytearray(zipped(npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (500,), }") + bytes(2000), 8))
    data[45:60] = b"\xff" * 15
    return bytes(data)


def encrypted_flag() -> bytes:
    return zipped(b"x").replace(b"PK\x01\x02\x14\x03\x14\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x01")


NO_ARCHIVE = "golden.npz is not an .npz archive of plain arrays: "
MALFORMED_GOLDEN: list[tuple[str, bytes, str]] = [
    ("empty", b"", NO_ARCHIVE),
    ("text", b"not an archive", NO_ARCHIVE),
    ("plain npy", plain_npy(), NO_ARCHIVE),
    ("pickle", b"\x80\x04N.", NO_ARCHIVE),
    ("python objects", npz(x=np.array([{}], object)), NO_ARCHIVE + "Object arrays"),
    ("damaged deflate stream", deflated_then_damaged(), NO_ARCHIVE),
    ("encrypted", encrypted_flag(), NO_ARCHIVE),
    ("open bracket in header", zipped(npy_header("{'descr': '<f4', (")), NO_ARCHIVE),
    ("deep header", zipped(npy_header("(" * 9000)), NO_ARCHIVE),
    ("huge shape", zipped(npy_header("{'descr':'<f4','fortran_order':False,'shape':(" + "1" * 15 + ",)}")),
     NO_ARCHIVE),
    ("more than 64 bits", zipped(npy_header("{'descr':'<f4','fortran_order':False,'shape':(" + "1" * 30 + ",)}")),
     NO_ARCHIVE),
    ("negative shape", zipped(npy_header("{'descr':'<f4','fortran_order':False,'shape':(-3,)}")), "golden.npz "),
    ("truncated", npz(**good_arrays())[:-30], NO_ARCHIVE),
    ("no array", npz(), r"golden.npz holds \[\]; expected \['logvar', 'mean', 'reconstruction', 'x'\]"),
    ("one missing", npz(x=np.zeros((1, 1, 8, 8), np.float32)), r"golden.npz holds \['x'\]; expected"),
    ("one more", npz(**good_arrays(), y=np.zeros(1)), r"holds \['logvar', 'mean', 'reconstruction', 'x', 'y'\]"),
    ("not .npy", zipped(b"text", name="x.txt"), r"golden.npz "),
    ("float64", npz(**{**good_arrays(), "mean": np.zeros((2, 4))}), r"mean of dtype float64 and shape \(2, 4\); exp"),
    ("big-endian", npz(**{**good_arrays(), "mean": np.zeros((2, 4), ">f4")}), r"mean of dtype >f4 and shape"),
    ("other shape", npz(**{**good_arrays(), "x": np.zeros((2, 8, 8), np.float32)}),
     r"x of dtype float32 and shape \(2, 8, 8\); expected float32 \(N, 1, 8, 8\)"),
    ("scalar", npz(**{**good_arrays(), "x": np.float32(0)}), r"golden.npz has \w+ of dtype float32 and shape"),
    ("rows differ", npz(**{**good_arrays(), "logvar": np.zeros((3, 4), np.float32)}), r"logvar of .* shape \(3, 4\)"),
    ("no number", npz(**{**good_arrays(), "x": np.full((2, 1, 8, 8), np.nan, np.float32)}),
     r"golden.npz has NaN or infinite values in x"),
    ("much of nothing", zipped(bytes(2**24), zipfile.ZIP_DEFLATED), r"has 16777216 bytes of x; expected 1024 at most"),
    ("much of another", zipped(bytes(2**24), zipfile.ZIP_DEFLATED, "y.npy"), r"holds \['y'\]; expected \['log"),
    ("no rows", npz(**good_arrays(0)), r"x of dtype float32 and shape \(0, 1, 8, 8\); expected"),
    ("many rows", npz(**good_arrays(5)), r"shape \(5, .*\); expected float32 .*, with 1 to 4 inputs"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "message"), [case[1:] for case in MALFORMED_GOLDEN], ids=[case[0] for case in MALFORMED_GOLDEN]
)
def test_signed_but_malformed_golden_values_are_a_bundle_error(
    bundle: Path, resign: Any, content: bytes, message: str
) -> None:
    resign(bundle, golden=content)
    with pytest.raises(BundleError, match=message):
        Bundle.open(bundle).golden()


def test_mutants_of_the_golden_archive_are_arrays_or_a_bundle_error(bundle: Path, resign: Any) -> None:
    content = (bundle / "golden.npz").read_bytes()
    outcomes = {"arrays": 0, "refused": 0}
    for damaged in damages(content, random.Random(5), 300):
        resign(bundle, golden=damaged)
        try:
            arrays = Bundle.open(bundle).golden()
        except BundleError:
            outcomes["refused"] += 1
        else:
            assert {array.dtype for array in arrays.values()} == {np.dtype(np.float32)}
            outcomes["arrays"] += 1
    assert outcomes["refused"] > 150


def test_golden_values_of_an_autoencoder_have_no_logvar(vectors_path: Path) -> None:
    assert sorted(Bundle.open(vectors_path).golden()) == ["mean", "reconstruction", "x"]


# --- what --force may replace -----------------------------------------------------------------------------------------


def test_bundle_folders_are_told_from_others(bundle: Path, tmp_path: Path) -> None:
    assert is_bundle_folder(bundle)
    (bundle / "encoder.onnx").unlink()
    assert is_bundle_folder(bundle), "a damaged bundle is still ours"
    (tmp_path / "link").symlink_to(bundle)
    assert not is_bundle_folder(tmp_path / "link")
    assert not is_bundle_folder(tmp_path)
    (tmp_path / "manifest.json").write_text('{"name": "a web app"}')
    assert not is_bundle_folder(tmp_path)
    assert not is_bundle_folder(tmp_path / "none")
