"""Latents in files: .npz or .safetensors, with what is needed to decode them.

A file holds `mean` and, of a VAE, `logvar`, or with the uint8 codec `codes`, `scale` and `offset` (see codec.py);
`names` of the inputs; `size`, their (height, width) before padding; and `decoder`, the SHA-256 of the fp32 graph that
decodes them, by which latents of another model are refused.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .atomic import atomic_file, atomic_folder, refuse_other_file
from .codec import UINT8, Quantized, check_quantized, dequantize, quantize, quantized_shapes
from .errors import InputError, MissingExtraError
from .manifest import LOGVAR, MEAN, Manifest
from .posterior import Posterior
from .preprocess import Float32
from .sinks import ArrayWriter, unused_name
from .sources import ArraySource, MemorySource

FORMATS = ("npz", "safetensors")
_NAME, _NOTE = 2**14, 2**12  # bytes of one name, and of what else is noted, at most
LATENT_SUFFIXES = (".npy", ".npz", ".safetensors")


def decoder_digest(manifest: Manifest) -> str:
    """What tells whose latents they are: the SHA-256 of the fp32 decoder."""
    return manifest.files[manifest.precisions["fp32"].decoder].sha256


class LatentSink(Protocol):
    """Takes the latents of one batch after the other. size: the inputs' (height, width) before padding, if images."""

    bytes_written: int

    def add(self, posterior: Posterior, names: list[str], size: tuple[int, int] | None) -> None: ...


@contextlib.contextmanager
def open_latent_sink(
    output: str, manifest: Manifest, count: int, input_shape: tuple[int, ...], codec: str, form: str | None, force: bool
) -> Iterator[LatentSink]:
    """A file for all latents, where `output` ends in .npz or .safetensors, or a folder with one per input.

    input_shape: of every input, where one file takes all. form: of files in a folder, "npz" (None) or "safetensors".
    What is written appears when the block ends well, or not at all.

    Raises:
        InputError: another suffix. OutputError: `output` exists and `force` is off, or it is a folder.
        MissingExtraError: safetensors is not installed.
    """
    path = Path(output)
    suffix = path.suffix.lower()
    if suffix not in ("", ".npz", ".safetensors") or output in ("", "-"):
        raise InputError(f"output is {output!r}; encode writes .npz, .safetensors, or without a suffix a folder")
    if suffix and form is not None:
        raise InputError(f"--format is {form!r} with the file {output}; it is for the files in a folder")
    refuse_other_file(path, force)
    if suffix == ".npz":
        latent_shape = manifest.latent_shape(input_shape)
        shapes = (
            quantized_shapes(count, latent_shape) if codec == UINT8 else _mean_and_logvar(manifest, count, latent_shape)
        )
        with ArrayWriter(path, shapes, dtypes={"codes": np.uint8}, replace=force) as writer:
            sink = _OneFile(manifest, codec, lambda arrays: writer.append(**arrays))
            yield sink
            writer.extra = sink.notes()
        sink.bytes_written = path.stat().st_size
        return
    if suffix == ".safetensors" or form == "safetensors":
        _safetensors(f"writing {output}")
    if suffix:  # its header comes first: all is kept until the end
        parts: list[dict[str, NDArray[Any]]] = []
        sink = _OneFile(manifest, codec, parts.append)
        yield sink
        whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        sink.bytes_written = _write(path, whole, sink.notes(), force)
        return
    with atomic_folder(path) as folder:
        yield _Folder(folder, manifest, codec, f".{form or 'npz'}")


def _mean_and_logvar(manifest: Manifest, count: int, latent_shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    names = (MEAN, LOGVAR) if manifest.kind == "vae" else (MEAN,)
    return dict.fromkeys(names, (count, *latent_shape))


def _arrays(posterior: Posterior, codec: str) -> dict[str, NDArray[Any]]:
    if codec == UINT8:
        return dict(quantize(posterior.mean)._asdict())
    return {MEAN: posterior.mean} | ({} if posterior.logvar is None else {LOGVAR: posterior.logvar})


class _OneFile:
    """All latents in one file. keep: takes the arrays of one batch."""

    def __init__(self, manifest: Manifest, codec: str, keep: Callable[[dict[str, NDArray[Any]]], None]) -> None:
        self._manifest, self._codec, self._keep = manifest, codec, keep
        self._names: list[str] = []
        self._size: tuple[int, int] | None = None
        self.bytes_written = 0

    def add(self, posterior: Posterior, names: list[str], size: tuple[int, int] | None) -> None:
        _require_one_size(self._names, self._size, names, size)
        self._size = size
        self._names += names
        self._keep(_arrays(posterior, self._codec))

    def notes(self) -> dict[str, NDArray[Any]]:
        return _notes(self._names, self._size, self._manifest)


class _Folder:
    """One file per input, named after it."""

    def __init__(self, folder: Path, manifest: Manifest, codec: str, suffix: str) -> None:
        self._folder, self._manifest, self._codec, self._suffix = folder, manifest, codec, suffix
        self._taken: set[str] = set()
        self.bytes_written = 0

    def add(self, posterior: Posterior, names: list[str], size: tuple[int, int] | None) -> None:
        arrays = _arrays(posterior, self._codec)
        for index, name in enumerate(names):
            path = self._folder / f"{unused_name(name, self._taken)}{self._suffix}"
            one = {key: array[index : index + 1] for key, array in arrays.items()}
            self.bytes_written += _write(path, one, _notes([name], size, self._manifest), replace=False)


def _require_one_size(
    names: list[str], size: tuple[int, int] | None, new_names: list[str], new_size: tuple[int, int] | None
) -> None:
    if names and size != new_size:
        raise InputError(
            f"{new_names[0]} has (height, width) {new_size}, and {names[0]} {size}; inputs of different sizes do not"
            " share one file, name a folder (without a suffix) as output"
        )


def _notes(names: list[str], size: tuple[int, int] | None, manifest: Manifest) -> dict[str, NDArray[Any]]:
    notes: dict[str, NDArray[Any]] = {"names": np.array(names), "decoder": np.array(decoder_digest(manifest))}
    return notes if size is None else {**notes, "size": np.array(size, np.int64)}


def _write(path: Path, arrays: dict[str, NDArray[Any]], notes: dict[str, NDArray[Any]], replace: bool) -> int:
    with atomic_file(path, replace=replace) as stream:
        if path.suffix.lower() == ".npz":
            np.savez(stream, **arrays, **notes)  # type: ignore[arg-type]  # names are never `allow_pickle`
        else:
            save = _safetensors(f"writing {path}").numpy.save
            text = {name: json.dumps(value.tolist()) for name, value in notes.items()}
            contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
            stream.write(save(contiguous, text))
    return path.stat().st_size


class LatentFile:
    """Latents of one file, read batch by batch; `names`, `size` and `decoder` where the file has them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        suffix = path.suffix.lower()
        if suffix not in LATENT_SUFFIXES:
            raise InputError(f"{path} is no file of latents; they are read from {', '.join(LATENT_SUFFIXES)}")
        self._scales: tuple[Float32, Float32] | None = None
        notes: dict[str, Any] = {}
        if suffix == ".safetensors":
            arrays, notes = _read_safetensors(path)
            name = next((name for name in ("z", MEAN, "codes") if name in arrays), None)
            if name is None:
                raise InputError(f"{path} holds the arrays {sorted(arrays)}; expected z, mean or codes")
            self._source: MemorySource | ArraySource = MemorySource(arrays[name], f"{path.name}#")
        else:
            self._source = ArraySource(path, ("z", MEAN, "codes"))
            name = self._source.member
            arrays = {}
            if suffix == ".npz":
                rows, *latent_shape = self._source.shape
                scale = 4 * math.prod(quantized_shapes(rows, tuple(latent_shape))["scale"])
                arrays = self._source.others({"scale": scale, "offset": scale})
                notes = self._source.others({"names": rows * _NAME, "size": _NOTE, "decoder": _NOTE})
        if name == "codes":
            if not {"scale", "offset"} <= arrays.keys():
                raise InputError(f"{path} holds codes without their scale and offset")
            self._scales = arrays["scale"], arrays["offset"]
            try:
                check_quantized(Quantized(self._source.outline(), *self._scales))
            except InputError as error:
                raise InputError(f"{path}: {error}") from None
        self.names = _names(notes.get("names"), self._source.names)
        self.size = _size(notes.get("size"), path)
        self.decoder = str(notes["decoder"]) if "decoder" in notes else None

    def __len__(self) -> int:
        return len(self._source)

    def outline(self) -> NDArray[Any]:
        """An array of the latents' dtype and shape that takes no memory."""
        found = self._source.outline()
        if self._scales is None:
            return found
        return np.broadcast_to(np.zeros((), np.float32), found.shape)

    def batches(self, size: int) -> Iterator[NDArray[Any]]:
        start = 0
        for batch in self._source.batches(size):
            if self._scales is not None:
                scale, offset = (array[start : start + len(batch)] for array in self._scales)
                batch = dequantize(Quantized(batch, scale, offset))
            start += len(batch)
            yield batch


def open_latents(path: str) -> list[LatentFile]:
    """One file of latents, or every one in a folder, sorted by name; hidden files are left out.

    Raises:
        InputError: there is none, or one that cannot be read.
    """
    folder = Path(path)
    if not folder.is_dir():
        return [LatentFile(folder)]
    visible = (file for file in folder.iterdir() if not file.name.startswith("."))
    files = sorted(file for file in visible if file.suffix.lower() in LATENT_SUFFIXES)
    if not files:
        raise InputError(f"{path} holds no files of latents; looked for {', '.join(LATENT_SUFFIXES)}")
    return [LatentFile(file) for file in files]


def _read_safetensors(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    library = _safetensors(f"reading {path}")
    try:
        with library.safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
            notes = {name: json.loads(text) for name, text in (file.metadata() or {}).items() if name in _NOTES}
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except Exception as error:  # the library's own error, or that of a number type that numpy lacks
        raise InputError(f"{path} cannot be read as .safetensors: {error}") from None
    for name, array in arrays.items():
        if not array.ndim or not len(array):
            raise InputError(f"{path} has {name} of shape {array.shape}; expected a batch")
    return arrays, notes


_NOTES = ("names", "size", "decoder")


def _names(found: Any, default: list[str]) -> list[str]:
    """The names that a file gives its latents, where they are as many words; each that cannot be shown by default."""
    names = _flat(found)
    if names is None or names.dtype.kind != "U" or len(names) != len(default):
        return default
    return [str(name) if str(name).isprintable() else other for name, other in zip(names, default, strict=True)]


def _size(found: Any, path: Path) -> tuple[int, int] | None:
    if found is None:
        return None
    sides = _flat(found)
    if sides is None or sides.shape != (2,) or sides.dtype.kind not in "iu" or not (sides > 0).all():
        shown = found.tolist() if isinstance(found, np.ndarray) else found
        raise InputError(f"{path} has the size {shown!r:.60}; expected height and width")
    return int(sides[0]), int(sides[1])


def _flat(found: Any) -> NDArray[Any] | None:
    """What a file notes, as an array of one dimension; None where it is none."""
    try:
        array = np.atleast_1d(np.asarray(found))
    except (ValueError, OverflowError, RecursionError):  # lists of lists of different lengths, and the like
        return None
    return array if array.ndim == 1 else None


def _safetensors(purpose: str) -> Any:
    try:
        import safetensors
        import safetensors.numpy
    except ImportError:
        raise MissingExtraError("safetensors", "safetensors", purpose) from None
    return safetensors
