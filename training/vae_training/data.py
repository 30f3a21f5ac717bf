"""From a name or a path to examples: digits, IDX files, arrays, or a folder of pictures.

Examples stay in the form that `vae_runtime.preprocess.to_model_input` takes, the one place where inputs are prepared,
so that a model sees at run time exactly what it saw in training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vae_runtime.arguments import check_choice
from vae_runtime.errors import InputError, MissingExtraError
from vae_runtime.images import list_pictures, picture_size, read_picture
from vae_runtime.manifest import COLOUR_OF, COLOURS, RESIZE_MODES, InputSpec
from vae_runtime.preprocess import Float32, to_model_input
from vae_runtime.sources import ARRAY_SUFFIXES, EXAMPLE_KEYS, LABEL_KEYS, choose_array

from . import idx

DIGITS = "digits"
_LARGEST = math.sqrt(np.finfo(np.float32).max)  # of vectors: errors are squared in training


@dataclass(frozen=True)
class Dataset:
    """All examples of one source, not yet split.

    examples: uint8 images (N, H, W) or (N, H, W, 3), float32 images (N, C, H, W) in [0, 1], or float32 vectors (N, D).
    facts: how they were made, where that matters, for the records of a run.
    labels: whole numbers, int64 (N,), where the source has them; nothing is trained on them.
    test_begins: the index of the first example of the source's own test part, which comes last, where it has one.
    """

    name: str
    examples: NDArray[Any]
    spec: InputSpec
    facts: Mapping[str, Any] = field(default_factory=dict)
    labels: NDArray[np.int64] | None = None
    test_begins: int | None = None

    def __len__(self) -> int:
        return len(self.examples)

    def model_input(self, indices: NDArray[np.int64]) -> Float32:
        """The examples at `indices` as the encoder takes them: float32 (n, *spec.shape)."""
        return to_model_input(self.examples[indices], self.spec, self.name)


def load_dataset(
    source: str, size: tuple[int, int] | None = None, resize: str | None = None, colour: str | None = None
) -> Dataset:
    """Read all examples of `source`.

    source: "digits"; or a folder of IDX files (`train-images-idx3-ubyte`, `t10k-…`, gzipped or not); or a `.npy` or
        `.npz` file; or a folder of pictures, searched with its subfolders. Labels: of digits, of IDX files that have
        such files beside them (`train-labels-idx1-ubyte`), of an `.npz` the array `labels`, `label` or `y`, if that is
        a whole number per example.
    size: (H, W) of a folder of pictures; None takes the first picture's.
    colour: "grey" or "rgb" (the default), of a folder of pictures.
    resize: how a picture file of another size becomes an input, "exact" (refused; the default), "stretch" or "crop":
        here for a folder of pictures, and at run time for every model of images.

    Raises:
        InputError: nothing at `source`, or it is damaged or of the wrong form.
        MissingExtraError: scikit-learn (for "digits") or Pillow (for pictures) is not installed.
    """
    if not source:
        raise InputError(f"data is empty; expected {DIGITS!r}, a folder, or an .npy or .npz file")
    check_choice(resize or "exact", "resize", RESIZE_MODES)
    check_choice(colour or "rgb", "colour", tuple(COLOURS))
    path = Path(source)
    if is_folder_of_pictures(source):
        return _load_pictures(path, size, resize or "exact", colour or "rgb")
    if size is not None or colour is not None:
        raise InputError(f"size and colour are for folders of pictures; {source} has its own")
    labels: NDArray[Any] | None
    if source == DIGITS:
        images, labels = _digits()
        return _with_labels(_from_images(DIGITS, images, resize), labels, source)
    if path.is_dir():
        images, labels, test_begins = idx.read_folder(path)
        data = _with_labels(_from_images(path.resolve().name, images, resize), labels, source)
        return replace(data, test_begins=test_begins)
    array, labels = _read_array(path)
    return _with_labels(_from_array(path, array, resize), labels, source)


def is_folder_of_pictures(source: str) -> bool:
    """Whether `source` is a folder that is read as pictures: one without IDX files."""
    return source not in ("", DIGITS) and Path(source).is_dir() and not idx.find_images(Path(source))


def find_pictures(folder: Path) -> list[Path]:
    """Every picture file below `folder`, sorted; raises `InputError` where there is none."""
    paths = list_pictures(folder)
    if not paths:
        raise InputError(f"{folder} has neither IDX files (train-images-idx3-ubyte) nor pictures in it")
    return paths


def _with_labels(data: Dataset, labels: NDArray[Any] | None, source: str) -> Dataset:
    """Labels of another kind are somebody else's business; whole numbers that are more or fewer are a mistake."""
    if labels is None or labels.dtype.kind not in "iu" or labels.ndim != 1:
        return data
    if len(labels) != len(data):
        raise InputError(f"{source} has {len(labels)} labels, but {len(data)} examples; expected one for each")
    return replace(data, labels=labels.astype(np.int64))


def _digits() -> tuple[NDArray[np.uint8], NDArray[Any]]:
    """1,797 handwritten digits, 8×8, in 17 grey levels (Alpaydin and Kaynak, 1998; embedded in scikit-learn)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise MissingExtraError("scikit-learn", "train", "the data set 'digits'") from None
    digits = load_digits()
    return np.rint(digits.images * (255 / 16)).astype(np.uint8), digits.target


def _read_array(path: Path) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """The examples and, where the file has them, what may be their labels."""
    if not path.is_file():
        raise InputError(f"{path} does not exist; expected {DIGITS!r}, a folder, or an .npy or .npz file")
    if path.suffix.lower() not in ARRAY_SUFFIXES:
        raise InputError(
            f"{path} is a file of type {path.suffix!r}; expected {DIGITS!r}, a folder, or an .npy or .npz file"
        )
    try:
        with path.open("rb") as stream:
            if not stream.peek(6).startswith((b"\x93NUMPY", b"PK")):  # numpy would take it for a pickle
                raise InputError(f"{path} cannot be read as an array: it is neither .npy nor .npz inside")
            loaded = np.load(stream, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                return loaded, None
            name = choose_array(path, loaded.files, EXAMPLE_KEYS)
            return loaded[name], _read_labels(loaded, name)
    except InputError:
        raise
    except Exception as error:  # a damaged file raises nearly anything
        raise InputError(f"{path} cannot be read as an array: {error}") from None


def _read_labels(archive: Any, examples: str) -> NDArray[Any] | None:
    """The array beside `examples` that may be their labels; None where it holds Python objects, which are not read."""
    name = next((name for name in LABEL_KEYS if name in archive.files and name != examples), None)
    if name is None:
        return None
    try:
        return np.asarray(archive[name])
    except ValueError:
        return None


def _from_array(path: Path, array: NDArray[Any], resize: str | None) -> Dataset:
    """uint8 -> images; float32 with 4 dimensions -> images (N, C, H, W); float32 with 2 -> vectors."""
    if array.dtype == np.uint8 and array.ndim in (3, 4):
        return _from_images(path.stem, array, resize, str(path))
    if array.dtype == np.float32 and array.ndim == 4:
        spec = _image_spec(array.shape[1:], resize, str(path))
    elif array.dtype == np.float32 and array.ndim == 2:
        spec = InputSpec("vector", array.shape[1:])
        if resize is not None:
            raise InputError(f"resize is {resize!r}, but {path} holds vectors")
    else:
        raise InputError(
            f"{path} has shape {array.shape} and dtype {array.dtype}; expected uint8 images (N, H, W) or (N, H, W, 3), "
            f"float32 images (N, C, H, W) in [0, 1], or float32 vectors (N, D){_array_hint(array)}"
        )
    if array.size == 0:
        raise InputError(f"{path} has shape {array.shape}; there is nothing in it")
    examples = to_model_input(array, spec, str(path))
    if not spec.is_image and (largest := float(np.abs(examples).max())) > _LARGEST:
        raise InputError(f"{path} has values up to {largest:.3g}, whose squares overflow float32; scale the data")
    return Dataset(path.stem, examples, spec)


def _array_hint(array: NDArray[Any]) -> str:
    """The cure for floats of another form; none where it cannot be told what they are."""
    if array.dtype.kind != "f" or array.ndim not in (2, 3, 4):
        return ""
    cures = [] if array.dtype == np.float32 else ["convert with .astype(numpy.float32)"]
    cures += ["float32 images have an axis for the channel: array[:, None]"] if array.ndim == 3 else []
    return "".join(f"; {cure}" for cure in cures)


def _from_images(name: str, images: NDArray[np.uint8], resize: str | None, label: str = "") -> Dataset:
    if images.ndim == 4 and images.shape[3] == 1:
        images = images[..., 0]
    channels = 1 if images.ndim == 3 else images.shape[3]
    if images.size == 0:
        raise InputError(f"{label or name} has shape {images.shape}; there is nothing in it")
    return Dataset(name, images, _image_spec((channels, *images.shape[1:3]), resize, label or name))


def _image_spec(shape: tuple[int, ...], resize: str | None, name: str) -> InputSpec:
    colour = COLOUR_OF.get(shape[0])
    if colour is None:
        raise InputError(f"{name} has images of {shape[0]} channels; expected 1 (grey) or 3 (rgb)")
    return InputSpec("image", shape, colour, resize or "exact")


def _load_pictures(folder: Path, size: tuple[int, int] | None, resize: str, colour: str) -> Dataset:
    paths = find_pictures(folder)
    height, width = size or picture_size(paths[0])
    spec = InputSpec("image", (COLOURS[colour], height, width), colour, resize)
    trailing = () if colour == "grey" else (3,)
    examples = np.empty((len(paths), height, width, *trailing), np.uint8)
    for index, path in enumerate(paths):
        examples[index] = read_picture(path, spec)
    return Dataset(folder.resolve().name, examples, spec)
