"""Picture files in and out, for the command lines and for training. Pillow is imported when a file is touched."""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .atomic import atomic_file
from .errors import InputError, MissingExtraError
from .manifest import InputSpec
from .preprocess import Float32, UInt8

if TYPE_CHECKING:
    from PIL import Image

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
WRITTEN_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
PICTURE_FORMATS = ("png", "jpeg", "webp")
_LARGEST_SIDE = {"jpeg": 65_500, "webp": 16_383}
_READ_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
_JPEG = ("JPEG", "MPO")  # as Pillow calls one with previews behind it
_SAMPLE_FORMAT = 339  # TIFF's tag, 2 for signed numbers, which Pillow takes for unsigned ones
_ORIENTATION, _ON_ITS_SIDE = 0x0112, (5, 6, 7, 8)  # EXIF's tag, and the values that swap height and width


def list_pictures(folder: str | os.PathLike[str]) -> list[Path]:
    """Every picture file below `folder`, by its suffix, sorted by relative path; hidden files are left out."""
    folder = Path(folder)
    found = (path for path in folder.rglob("*") if path.suffix.lower() in PICTURE_SUFFIXES and path.is_file())
    visible = [path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    return sorted(visible, key=lambda path: path.relative_to(folder).as_posix())


def read_picture(path: str | os.PathLike[str], spec: InputSpec) -> UInt8:
    """One picture file -> uint8 (H, W) for "grey" or (H, W, 3) for "rgb", [0, 255], in the size of `spec`, or its own
    where `spec` leaves that free.

    EXIF orientation is applied; colour becomes grey by ITU-R 601 luma, grey becomes RGB by repetition; another size is
    refused, stretched, or scaled by its shorter side and cut to the centre, as `spec.resize` says (Lanczos filter).

    Raises:
        InputError: the file is no PNG, JPEG, WebP, BMP or TIFF of one image, has transparency or more than 8 bits, or
            its size is not the one expected.
        MissingExtraError: Pillow is not installed.
    """
    if spec.colour is None:
        raise InputError(
            f"{path} cannot become an input of shape {spec.shape}; picture files have 1 or 3 channels, pass arrays"
        )
    with _opened(path) as file:
        from PIL import ImageOps

        # Pillow would cut 16-bit colour to 8 unasked. BMP has 16 bits for all three.
        deep = any(";16" in str(tile[-1]).replace("BGR;16", "") for tile in file.tile)
        if 2 in getattr(file, "tag_v2", {}).get(_SAMPLE_FORMAT, ()):
            raise InputError(f"{path} has signed pixels, from -128 to 127; convert it to unsigned ones first")
        file.load()
        picture = _to_colour(ImageOps.exif_transpose(file), spec.colour, path)
    if deep:
        raise InputError(f"{path} has 16 bits per channel; convert it to 8 bits per channel first")
    return np.asarray(_resize(picture, spec, path), dtype=np.uint8)


def read_pictures(paths: Iterable[str | os.PathLike[str]], spec: InputSpec) -> UInt8:
    """Several picture files -> uint8 (N, H, W) or (N, H, W, 3); see `read_picture`."""
    return np.stack([read_picture(path, spec) for path in paths])


def picture_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """(height, width) of a picture file as it is seen, after EXIF orientation; its pixels are not read.

    Raises:
        InputError: the file is no picture, as in `read_picture`. MissingExtraError: Pillow is not installed.
    """
    with _opened(path) as file:
        turned = file.getexif().get(_ORIENTATION) in _ON_ITS_SIDE
        return (file.width, file.height) if turned else (file.height, file.width)


def write_picture(path: str | os.PathLike[str], image: UInt8, *, replace: bool = True) -> None:
    """Write uint8 (H, W) or (H, W, 3) as a PNG, JPEG or WebP, by the suffix, atomically; the last two at quality 95.

    Raises:
        InputError: another dtype or shape, another suffix.
        OutputError: the file cannot be written.
        MissingExtraError: Pillow is not installed.
    """
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3):
        raise InputError(
            f"image has shape {image.shape} and dtype {image.dtype}; pictures are made of uint8 (H, W) or (H, W, 3)"
        )
    suffix = Path(path).suffix.lower()
    if suffix not in WRITTEN_SUFFIXES:
        raise InputError(f"{path} has the suffix {suffix!r}; pictures are written to {', '.join(WRITTEN_SUFFIXES)}")
    check_side(path, image.shape)
    pillow = require_pillow(f"writing {path}")
    form = _form(path)
    options = {} if form == "png" else {"quality": 95}
    with atomic_file(path, replace=replace) as stream:
        pillow.Image.fromarray(image).save(stream, format=form, **options)


def _form(path: str | os.PathLike[str]) -> str:
    return Path(path).suffix.lower()[1:].replace("jpg", "jpeg")


def check_side(path: str | os.PathLike[str], size: Sequence[int]) -> None:
    """Raise `InputError` where a picture of this (height, width) has more pixels on a side than its format has."""
    height, width, *_ = size
    limit = _LARGEST_SIDE.get(_form(path), math.inf)
    if max(height, width) > limit:
        raise InputError(
            f"{path} would have {height}x{width} pixels (height x width); {_form(path)} has at most {limit} on a side,"
            " take png, or for many a folder"
        )


def grid_size(shape: Sequence[int], columns: int | None = None, scale: int | None = None, gap: int = 2) -> list[int]:
    """(height, width) of what `grid` makes of images of shape (N, H, W, ...)."""
    columns, scale = _layout(shape, columns, scale)
    return [
        n * (side * scale + gap) + gap for n, side in zip((-(-shape[0] // columns), columns), shape[1:], strict=False)
    ]


def _layout(shape: Sequence[int], columns: int | None, scale: int | None) -> tuple[int, int]:
    return columns or math.ceil(math.sqrt(shape[0])), scale or max(1, round(64 / max(shape[1:3])))


def grid(images: UInt8, columns: int | None = None, scale: int | None = None, gap: int = 2) -> UInt8:
    """Lay uint8 images (N, H, W[, 3]) out in rows -> one uint8 image (H', W'[, 3]) on white.

    columns: None makes the grid about square. scale: each pixel becomes scale × scale; None enlarges small images to
    about 64 pixels. gap: white pixels between images, after scaling.
    """
    height, width = images.shape[1:3]
    columns, scale = _layout(images.shape, columns, scale)
    cell_height, cell_width = height * scale + gap, width * scale + gap
    sheet = np.full((*grid_size(images.shape, columns, scale, gap), *images.shape[3:]), 255, np.uint8)
    for index, image in enumerate(images):
        top, left = (index // columns) * cell_height + gap, (index % columns) * cell_width + gap
        sheet[top : top + height * scale, left : left + width * scale] = image.repeat(scale, 0).repeat(scale, 1)
    return sheet


def overlay(images: Float32, heat: Float32) -> Float32:
    """Images in grey, and over them in red what is hot: float32 (N, 1 or 3, H, W) in [0, 1] and heat (N, H, W), 0 none
    to 1 and above full red -> float32 (N, 3, H, W) in [0, 1]."""
    weights = np.array([0.299, 0.587, 0.114] if images.shape[1] == 3 else [1], np.float32)  # ITU-R 601 luma
    grey = np.tensordot(images, weights, ([1], [0]))
    opacity = np.clip(heat, 0, 1)
    red, rest = grey + (1 - grey) * opacity, grey * (1 - opacity)
    return np.stack([red, rest, rest], axis=1)


def require_pillow(purpose: str) -> Any:
    """The package, or `MissingExtraError`."""
    try:
        import PIL
        import PIL.Image
    except ImportError:
        raise MissingExtraError("Pillow", "images", purpose) from None
    return PIL


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[Any]:
    """A file of one of the formats that `PICTURE_SUFFIXES` stand for, whatever its name; of one image, but for the
    previews that cameras put behind a JPEG. What goes wrong with it in the block is an `InputError`."""
    pillow = require_pillow(f"reading {path}")
    try:
        with warnings.catch_warnings():
            # It would warn, in several lines, of half the pixels that it refuses.
            warnings.simplefilter("ignore", pillow.Image.DecompressionBombWarning)
            # Others are not even tried: Pillow would start Ghostscript for an EPS that is called a.png.
            opened = pillow.Image.open(path, formats=_READ_FORMATS)
        with opened as file:
            if file.format not in _JPEG and (frames := getattr(file, "n_frames", 1)) > 1:
                raise ValueError(f"it has {frames} pages or frames; save the one that is meant by itself")
            yield file
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except InputError:
        raise
    except pillow.UnidentifiedImageError:
        formats = ", ".join(_READ_FORMATS)
        raise InputError(f"{path} cannot be read as a picture: it is none of {formats}; convert it first") from None
    except Exception as error:  # a damaged file raises nearly anything: OSError, SyntaxError, TypeError, ...
        raise InputError(f"{path} cannot be read as a picture: {error}") from None


def _to_colour(picture: Image.Image, colour: str, path: str | os.PathLike[str]) -> Image.Image:
    if picture.mode in ("I", "F") or picture.mode.startswith("I;"):
        raise InputError(
            f"{path} has pixels of mode {picture.mode!r}, more than 8 bits; convert it to 8 bits per channel first"
        )
    if picture.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in picture.info:
        if picture.convert("RGBA").getchannel("A").getextrema() != (255, 255):
            raise InputError(
                f"{path} has transparent pixels, which have no colour of their own; flatten it onto a background first"
            )
        picture = picture.convert("RGB")
    if picture.mode == "LAB":  # Pillow converts it to RGB alone
        picture = picture.convert("RGB")
    return picture.convert("L" if colour == "grey" else "RGB")


def _resize(picture: Image.Image, spec: InputSpec, path: str | os.PathLike[str]) -> Image.Image:
    from PIL import Image, ImageOps

    _, height, width = spec.shape
    if height is None or width is None or picture.size == (width, height):
        return picture
    if spec.resize == "stretch":
        return picture.resize((width, height), Image.Resampling.LANCZOS)
    if spec.resize == "crop":
        return ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)
    raise InputError(
        f"{path} has {picture.height}x{picture.width} pixels; this model takes pictures of exactly {height}x{width}"
        " (height x width)"
    )
