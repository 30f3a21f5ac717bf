"""Writing a bundle: the files, their hashes, the manifest last, the folder in place only when it is complete."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vae_runtime.arguments import check_path
from vae_runtime.atomic import atomic_folder, writing
from vae_runtime.bundle import is_bundle_folder
from vae_runtime.clutter import is_clutter
from vae_runtime.errors import BundleError, OutputError
from vae_runtime.manifest import GOLDEN_FILE, MANIFEST_FILE, FileEntry, Manifest


def check_output(path: str | os.PathLike[str], force: bool) -> None:
    """Raise `OutputError` if a bundle may not be written to `path`, or `InputError` if that is no path, before any work
    is done.

    Only a bundle is ever replaced, with nobody's own files in it, and only with `force`.
    """
    path = check_path(path, "path")
    with writing(path):
        if not path.parent.is_dir():
            raise OutputError(f"{path} cannot be written: there is no folder {path.parent}")
    if not os.path.lexists(path):
        return
    if not is_bundle_folder(path):
        raise OutputError(f"{path} exists and is no bundle; it is never replaced, choose another output")
    with writing(path):
        foreign = _foreign_entry(path)
    if foreign is not None:
        raise OutputError(
            f"{path / foreign} is no file of the bundle {path}, which is replaced as a whole; move it away"
        )
    if not force:
        raise OutputError(f"{path} exists; pass --force (force=True) to replace that bundle")


def _foreign_entry(folder: Path) -> str | None:
    """The first name in a bundle's folder that is neither its own nor a file manager's; None where there is none."""
    try:
        own = {MANIFEST_FILE, *Manifest.from_json((folder / MANIFEST_FILE).read_bytes()).files}
    except BundleError:  # damaged, or of another version: then by its files' kinds
        own = {entry.name for entry in folder.iterdir() if entry.suffix in (".onnx", ".npz")} | {MANIFEST_FILE}
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if not entry.is_file(follow_symlinks=False) or not (entry.name in own or is_clutter(entry.name)):
            return entry.name
    return None


def write_bundle(
    path: str | os.PathLike[str],
    manifest: Manifest,
    files: Mapping[str, bytes],
    golden: Mapping[str, NDArray[np.float32]],
    force: bool = False,
) -> Manifest:
    """Write a bundle's folder and return its manifest, whose `files` are filled in here.

    files: what the manifest names, by file name, but for the golden values: ONNX models, and a fitted prior's
        `GaussianMixture.to_npz`. golden: float32 arrays by tensor name, see `vae_runtime.bundle.Bundle.golden`.
    The same arguments give the same bytes.

    Raises:
        OutputError: `path` exists and may not be replaced, or cannot be written.
    """
    check_output(path, force)
    contents = {**files, GOLDEN_FILE: _npz(golden)}
    entries = {name: FileEntry(len(data), hashlib.sha256(data).hexdigest()) for name, data in contents.items()}
    manifest = manifest._replace(files=entries)
    text = manifest.to_json()
    Manifest.from_json(text)  # what is written can be read

    def may_replace(old: Path) -> bool:
        check_output(old, force)  # again: files may have come in the meantime
        return True

    with atomic_folder(path, may_replace) as folder:
        for name, data in contents.items():
            (folder / name).write_bytes(data)
        (folder / MANIFEST_FILE).write_bytes(text)
    return manifest


def _npz(arrays: Mapping[str, NDArray[np.float32]]) -> bytes:
    # numpy stamps every member with the same date of 1980, so that equal arrays are equal bytes.
    buffer = io.BytesIO()
    np.savez(buffer, **{name: arrays[name] for name in sorted(arrays)})  # type: ignore[arg-type]
    return buffer.getvalue()
