from __future__ import annotations

import io
import random
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("PIL")
from PIL import Image

from vae_runtime import InputError, OutputError
from vae_runtime.images import grid, grid_size, list_pictures, picture_size, read_picture, read_pictures, write_picture
from vae_runtime.manifest import InputSpec

GREY = InputSpec("image", (1, 4, 6), "grey", "exact")
RGB = InputSpec("image", (3, 4, 6), "rgb", "exact")
PIXELS = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)


def save(path: Path, array: np.ndarray, mode: str | None = None, **options: Any) -> Path:
    Image.fromarray(array).convert(mode).save(path, **options) if mode else Image.fromarray(array).save(path, **options)
    return path


def test_rgb_and_grey_files_arrive_pixel_by_pixel(tmp_path: Path) -> None:
    colour = save(tmp_path / "c.png", PIXELS)
    grey = save(tmp_path / "g.png", PIXELS[..., 0])
    assert np.array_equal(read_picture(colour, RGB), PIXELS)
    assert np.array_equal(read_picture(grey, GREY), PIXELS[..., 0])
    assert np.array_equal(read_picture(grey, RGB), PIXELS[..., :1].repeat(3, axis=2))
    luma = PIXELS @ np.array([0.299, 0.587, 0.114])
    assert np.abs(read_picture(colour, GREY) - luma).max() <= 1
    assert read_pictures([colour, colour], RGB).shape == (2, 4, 6, 3)


@pytest.mark.parametrize("suffix", ["bmp", "tiff", "webp"])
def test_lossless_formats_agree(tmp_path: Path, suffix: str) -> None:
    options = {"lossless": True} if suffix == "webp" else {}
    assert np.array_equal(read_picture(save(tmp_path / f"p.{suffix}", PIXELS, **options), RGB), PIXELS)


def test_size_that_differs_is_refused_exactly(tmp_path: Path) -> None:
    path = save(tmp_path / "p.png", PIXELS[:3])
    with pytest.raises(
        InputError, match=r"p.png has 3x6 pixels; this model takes pictures of exactly 4x6 \(height x width\)"
    ):
        read_picture(path, RGB)


def test_stretch_ignores_the_aspect_ratio_and_crop_keeps_the_centre(tmp_path: Path) -> None:
    """Left third black, middle grey, right white: stretching keeps all three, cropping to a square the middle alone."""
    wide = np.repeat(np.array([0, 128, 255], np.uint8), 40)[None].repeat(40, axis=0)
    path = save(tmp_path / "wide.png", wide)
    stretched = read_picture(path, InputSpec("image", (1, 6, 6), "grey", "stretch"))
    assert stretched.shape == (6, 6)
    assert stretched[:, 0].max() < 10
    assert stretched[:, -1].min() > 245
    cropped = read_picture(path, InputSpec("image", (1, 6, 6), "grey", "crop"))
    assert cropped.shape == (6, 6)
    assert np.abs(cropped[:, 1:-1].astype(int) - 128).max() < 10


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    path = save(tmp_path / "turned.png", PIXELS[..., 0], exif=exif)
    turned = read_picture(path, InputSpec("image", (1, 6, 4), "grey", "exact"))
    assert np.array_equal(turned, np.rot90(PIXELS[..., 0], -1))


def test_palette_and_black_and_white_and_cmyk_are_understood(tmp_path: Path) -> None:
    flat = np.zeros((4, 6, 3), np.uint8)
    flat[:, 3:] = (255, 0, 0)
    assert np.array_equal(read_picture(save(tmp_path / "p.png", flat, "P"), RGB), flat)
    bits = save(tmp_path / "b.png", (PIXELS[..., 0] > 127).astype(np.uint8) * 255, "1")
    assert np.array_equal(read_picture(bits, GREY), (PIXELS[..., 0] > 127) * 255)
    cmyk = save(tmp_path / "c.tiff", flat, "CMYK")
    assert np.array_equal(read_picture(cmyk, RGB), flat)


def test_cielab_is_understood(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("LAB", (6, 4), (128, 128, 128)).save(tmp_path / "lab.tiff")  # lightness 50 of 100 and no colour
    colour, grey = (read_picture(tmp_path / "lab.tiff", spec) for spec in (RGB, GREY))
    assert np.abs(colour.astype(int) - 119).max() <= 1
    assert np.abs(grey.astype(int) - 119).max() <= 1


def test_16_bits_for_all_three_channels_are_no_16_bits_each(tmp_path: Path) -> None:
    pixels = np.full((4, 6), 0x7BEF, "<u2").tobytes()  # 15, 31 and 15 of 31, 63 and 31
    header = struct.pack("<IiiHHIIiiII", 40, 6, 4, 1, 16, 3, len(pixels), 2835, 2835, 0, 0)
    header += struct.pack("<III", 0xF800, 0x07E0, 0x1F)
    sizes = struct.pack("<IHHI", 14 + len(header) + len(pixels), 0, 0, 14 + len(header))
    (tmp_path / "a.bmp").write_bytes(b"BM" + sizes + header + pixels)
    found = read_picture(tmp_path / "a.bmp", RGB)
    assert found.shape == (4, 6, 3)
    assert np.abs(found.astype(int) - 125).max() <= 2


def test_transparency_is_refused_and_an_opaque_alpha_channel_is_not(tmp_path: Path) -> None:
    alpha = np.dstack([PIXELS, np.full((4, 6), 255, np.uint8)])
    assert np.array_equal(read_picture(save(tmp_path / "o.png", alpha), RGB), PIXELS)
    alpha[2, 2, 3] = 254
    with pytest.raises(InputError, match=r"^\S*t.png has transparent pixels, .*; flatten it onto a background first"):
        read_picture(save(tmp_path / "t.png", alpha), RGB)
    keyed = save(tmp_path / "k.png", np.zeros((4, 6), np.uint8), transparency=0)
    with pytest.raises(InputError, match=r"k.png has transparent pixels"):
        read_picture(keyed, GREY)


def test_more_than_8_bits_are_refused(tmp_path: Path) -> None:
    deep = save(tmp_path / "deep.png", (PIXELS[..., 0].astype(np.uint16) * 257))
    with pytest.raises(InputError, match=r"deep.png has pixels of mode 'I.*', more than 8 bits; convert it to 8 bits"):
        read_picture(deep, GREY)
    real = save(tmp_path / "real.tiff", PIXELS[..., 0].astype(np.float32))
    with pytest.raises(InputError, match=r"real.tiff has pixels of mode 'F', more than 8 bits"):
        read_picture(real, GREY)


def test_colour_of_16_bits_is_refused_and_not_cut_to_8(tmp_path: Path) -> None:
    """Pillow reads such a file and never writes one."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in PIXELS)
    header = (6).to_bytes(4, "big") + (4).to_bytes(4, "big") + bytes([16, 2, 0, 0, 0])
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    (tmp_path / "deep.png").write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    with pytest.raises(InputError, match=r"deep.png has 16 bits per channel; convert it to 8 bits per channel first"):
        read_picture(tmp_path / "deep.png", RGB)


def test_signed_pixels_are_refused_and_not_taken_for_unsigned_ones(tmp_path: Path) -> None:
    for number in (1, 2):
        Image.fromarray(PIXELS[..., 0]).save(tmp_path / f"{number}.tif", tiffinfo={339: number})
    assert np.array_equal(read_picture(tmp_path / "1.tif", GREY), PIXELS[..., 0])
    with pytest.raises(InputError, match=r"2.tif has signed pixels, from -128 to 127; convert it to unsigned ones"):
        read_picture(tmp_path / "2.tif", GREY)


def test_files_that_are_no_pictures_are_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("a shopping list")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "folder.png").mkdir()
    for name in ("notes.png", "empty.jpg", "folder.png"):
        with pytest.raises(InputError, match=f"{name} cannot be read as a picture: "):
            read_picture(tmp_path / name, GREY)
    with pytest.raises(InputError, match=r"none.png does not exist"):
        read_picture(tmp_path / "none.png", GREY)


@pytest.mark.parametrize("form", ["eps", "gif", "ppm", "ico"])
def test_only_the_formats_of_the_suffixes_are_tried(tmp_path: Path, form: str) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(PIXELS).save(path, form)
    for read in (lambda: read_picture(path, RGB), lambda: picture_size(path)):
        with pytest.raises(InputError, match=r"a.png cannot be read as a picture: it is none of PNG, .*; convert"):
            read()


@pytest.mark.parametrize("suffix", ["tiff", "webp", "png"])
def test_files_of_several_images_are_refused(tmp_path: Path, suffix: str) -> None:
    path, more = tmp_path / f"many.{suffix}", [Image.fromarray(255 - PIXELS)]
    save(path, PIXELS, save_all=True, append_images=more)
    for read in (lambda: read_picture(path, RGB), lambda: picture_size(path)):
        with pytest.raises(
            InputError, match=rf"many.{suffix} cannot be read as a picture: it has 2 pages or frames; save"
        ):
            read()


def test_previews_behind_a_jpeg_do_not_matter(tmp_path: Path) -> None:
    """Many cameras put them there; the first image is the photograph."""
    flat, path = np.full((4, 6, 3), 90, np.uint8), tmp_path / "camera.jpg"
    Image.fromarray(flat).save(path, "MPO", save_all=True, append_images=[Image.new("RGB", (3, 2))])
    with Image.open(path) as file:
        assert (file.format, file.n_frames) == ("MPO", 2)
    assert picture_size(path) == (4, 6)
    assert np.abs(read_picture(path, RGB).astype(int) - flat).max() <= 2


def test_truncated_jpeg_is_refused_instead_of_half_grey(tmp_path: Path) -> None:
    spec = InputSpec("image", (3, 64, 64), "rgb", "exact")
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)
    path = save(tmp_path / "cut.jpg", noise)
    read_picture(path, spec)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(InputError, match=r"cut.jpg cannot be read as a picture: .*truncated"):
        read_picture(path, spec)


def test_pictures_within_the_limit_are_read_without_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "large.png", np.zeros((4, 6), np.uint8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)  # of which Pillow refuses twice as many
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_picture(path, GREY).shape == picture_size(path) == (4, 6)


def test_decompression_bomb_is_refused_before_it_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "bomb.png", np.zeros((400, 400), np.uint8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400 * 400 // 2 - 1)
    with pytest.raises(InputError, match=r"bomb.png cannot be read as a picture: .*decompression bomb"):
        read_picture(path, GREY)


def test_arrays_of_other_channel_counts_have_no_pictures(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"cannot become an input of shape \(5, 2, 2\); picture files have 1 or 3 channels"
    ):
        read_picture(tmp_path / "any.png", InputSpec("image", (5, 2, 2)))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")  # Pillow's own
@pytest.mark.parametrize("suffix", ["png", "jpeg", "webp", "bmp", "tiff"])
def test_damaged_pictures_are_an_array_or_an_input_error(tmp_path: Path, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    stream = io.BytesIO()
    Image.fromarray(PIXELS).save(stream, suffix, **({} if suffix == "bmp" else {"exif": exif}))
    rng, refused, unnamed, path = random.Random(suffix), 0, 0, tmp_path / f"p.{suffix}"
    for _ in range(150):
        data = bytearray(stream.getvalue())
        for _ in range(rng.choice((1, 3, 10))):
            data[rng.randrange(len(data))] = rng.choice((0, 1, 0x7F, 0xFF, rng.randrange(256)))
        path.write_bytes(data[: rng.randrange(len(data)) if rng.random() < 0.2 else None])
        try:
            assert read_picture(path, RGB).shape == (4, 6, 3)
        except InputError as error:
            refused += 1
            unnamed += str(path) not in str(error)
    assert refused > 10
    assert unnamed == 0


# --- folders and writing ----------------------------------------------------------------------------------------------


def test_folders_are_listed_by_relative_path_without_hidden_files(tmp_path: Path) -> None:
    for name in ("b.PNG", "a/z.jpg", "a/.hidden.png", ".cache/x.png", "notes.txt", "c.jpeg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "dir.png").mkdir()
    assert [path.relative_to(tmp_path).as_posix() for path in list_pictures(tmp_path)] == ["a/z.jpg", "b.PNG", "c.jpeg"]


def test_hidden_parents_of_the_folder_itself_do_not_matter(tmp_path: Path) -> None:
    inner = tmp_path / ".data"
    inner.mkdir()
    (inner / "a.png").touch()
    assert list_pictures(inner) == [inner / "a.png"]


@pytest.mark.parametrize("array", [PIXELS, PIXELS[..., 0]])
def test_written_png_reads_back_the_same(tmp_path: Path, array: np.ndarray) -> None:
    write_picture(tmp_path / "out.png", array)
    with Image.open(tmp_path / "out.png") as file:
        assert file.format == "PNG"
        assert np.array_equal(np.asarray(file), array)
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]


@pytest.mark.parametrize(
    "array", [PIXELS.astype(np.float32), PIXELS[..., :2], np.zeros((2, 4, 6, 3), np.uint8), PIXELS[0, 0]], ids=range(4)
)
def test_write_picture_refuses_other_arrays(tmp_path: Path, array: np.ndarray) -> None:
    with pytest.raises(InputError, match=r"image has shape .* and dtype .*; pictures are made of uint8 \(H, W\) or"):
        write_picture(tmp_path / "out.png", array)
    assert list(tmp_path.iterdir()) == []


def test_write_picture_names_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"none/out.png cannot be written: No such file or directory"):
        write_picture(tmp_path / "none" / "out.png", PIXELS)


@pytest.mark.parametrize(("suffix", "limit"), [("webp", 16383), ("jpg", 65500)])
def test_pictures_that_a_format_has_no_room_for_are_refused_in_words(
    tmp_path: Path, capfd: Any, suffix: str, limit: int
) -> None:
    path = tmp_path / f"a.{suffix}"
    for shape in ((1, limit + 1), (limit + 1, 1, 3)):
        with pytest.raises(InputError, match=rf"{suffix} would have .* pixels .* at most {limit} on a side, take png"):
            write_picture(path, np.zeros(shape, np.uint8))
    assert not path.exists()
    write_picture(path, np.zeros((1, limit), np.uint8))
    assert picture_size(path) == (1, limit)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("count", [1, 2, 5, 6])
@pytest.mark.parametrize("columns", [None, 1, 3])
def test_the_size_of_a_grid_is_known_before_it_is_laid_out(count: int, columns: int | None) -> None:
    images = np.zeros((count, 20, 9, 3), np.uint8)
    for options in ({}, {"scale": 2, "gap": 1}):
        assert grid(images, columns, **options).shape == (*grid_size(images.shape, columns, **options), 3)


@pytest.mark.parametrize("shape", [(5, 2, 3), (5, 2, 3, 3)])
def test_grid_puts_every_pixel_where_it_belongs(shape: tuple[int, ...]) -> None:
    images = np.random.default_rng(3).integers(0, 255, shape, np.uint8)
    sheet = grid(images, columns=3, scale=2, gap=1)
    height, width = 2 * (2 * 2 + 1) + 1, 3 * (3 * 2 + 1) + 1
    expected = np.full((height, width, *shape[3:]), 255, np.uint8)
    for index in range(5):
        row, column = divmod(index, 3)
        for y in range(4):
            for x in range(6):
                expected[1 + row * 5 + y, 1 + column * 7 + x] = images[index, y // 2, x // 2]
    assert np.array_equal(sheet, expected)


def test_grid_is_about_square_and_enlarges_small_images() -> None:
    assert grid(np.zeros((9, 8, 8), np.uint8)).shape == (3 * (64 + 2) + 2,) * 2
    assert grid(np.zeros((1, 200, 100), np.uint8), gap=0).shape == (200, 100)


def test_missing_pillow_is_answered_with_the_extra(python: Any, tmp_path: Path) -> None:
    code = """
import sys
sys.modules["PIL"] = None
import numpy as np
from vae_runtime import MissingExtraError
from vae_runtime.images import read_picture, write_picture
from vae_runtime.manifest import InputSpec
for call in (lambda: read_picture("a.png", InputSpec("image", (1, 2, 2), "grey")),
             lambda: write_picture(sys.argv[1] + "/b.png", np.zeros((2, 2), np.uint8))):
    try: call()
    except MissingExtraError as error: print(error)
"""
    result = python(code, tmp_path)
    assert result.stdout.splitlines() == [
        'reading a.png needs Pillow, which is not installed; run: pip install "vae-edge[images]"',
        f'writing {tmp_path}/b.png needs Pillow, which is not installed; run: pip install "vae-edge[images]"',
    ]
    assert list(tmp_path.iterdir()) == []
