import gzip
import io
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vae_runtime.errors import InputError
from vae_runtime.sources import open_inputs
from vae_training.data import load_dataset


def idx(array: np.ndarray) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (6, 9, 11), dtype=np.uint8)


def test_digits_are_scaled_to_the_full_range() -> None:
    from sklearn.datasets import load_digits

    data = load_dataset("digits")
    original = load_digits().images
    assert (data.name, len(data), data.examples.dtype, data.examples.shape) == ("digits", 1797, np.uint8, (1797, 8, 8))
    assert data.examples[original == 16].min() == 255
    assert data.examples[original == 1].tolist()[:1] == [round(255 / 16)]
    assert data.spec.to_dict() == {"type": "image", "shape": [1, 8, 8], "colour": "grey", "resize": "exact"}
    x = data.model_input(np.array([3, 5]))
    np.testing.assert_allclose(x[:, 0], original[[3, 5]] / 16, atol=0.5 / 255)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_folders_join_train_and_t10k(tmp_path: Path, images: np.ndarray, suffix: str) -> None:
    write = gzip.compress if suffix else bytes
    (tmp_path / f"t10k-images-idx3-ubyte{suffix}").write_bytes(write(idx(images[4:])))
    (tmp_path / f"train-images.idx3-ubyte{suffix}").write_bytes(write(idx(images[:4])))
    (tmp_path / f"train-labels-idx1-ubyte{suffix}").write_bytes(write(idx(np.zeros(4, np.uint8))))
    data = load_dataset(str(tmp_path))
    np.testing.assert_array_equal(data.examples, images)
    assert data.spec.shape == (1, 9, 11)
    assert data.name == tmp_path.name
    assert data.test_begins == 4
    (tmp_path / f"train-images.idx3-ubyte{suffix}").unlink()
    assert load_dataset(str(tmp_path)).test_begins is None


def test_broken_idx_files_are_named(tmp_path: Path, images: np.ndarray) -> None:
    file, good = tmp_path / "t10k-images-idx3-ubyte", idx(images)
    cases = {
        good[:-1]: f"has {images.size - 1} bytes of data; its header says {images.size}",
        good + b"x": "has more bytes of data",
        good[:10]: "begins with 00000803",
        b"": "begins with ; IDX files of 3 dimensions begin with 00000803",
        idx(images[0]): "begins with 00000802",
        b"\x00\x00\x0d\x03" + good[4:]: "begins with 00000d03",
        good[:4] + b"\xff" * 12: "says that it has shape",
        good[:4] + b"\x00" * 12: "expected at least one element",
    }
    for content, message in cases.items():
        file.write_bytes(content)
        with pytest.raises(InputError, match=message):
            load_dataset(str(tmp_path))
    file.write_bytes(good)
    assert len(load_dataset(str(tmp_path))) == 6


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-20], lambda data: b"no gzip", lambda data: data[:30] + b"xxxx" + data[34:]]
)
def test_broken_gzip_is_named(tmp_path: Path, images: np.ndarray, damage) -> None:
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(damage(gzip.compress(idx(images))))
    with pytest.raises(InputError, match=r"t10k-images-idx3-ubyte\.gz (cannot be read|has|begins)"):
        load_dataset(str(tmp_path))


def test_idx_files_that_do_not_belong_together(tmp_path: Path, images: np.ndarray) -> None:
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(images))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(np.zeros(5, np.uint8)))
    with pytest.raises(InputError, match="has 5 labels, but train-images-idx3-ubyte has 6 images"):
        load_dataset(str(tmp_path))
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx(images[:, :8]))
    with pytest.raises(InputError, match="has images of 11×8 pixels, but those before it have 11×9"):
        load_dataset(str(tmp_path))


def test_arrays_of_every_good_form(tmp_path: Path, images: np.ndarray) -> None:
    rng = np.random.default_rng(0)
    colour = rng.integers(0, 256, (3, 8, 9, 3), dtype=np.uint8)
    planar = rng.random((3, 3, 8, 9), dtype=np.float32)
    vectors = rng.standard_normal((4, 5), dtype=np.float32)
    for array, shape, kind in (
        (images, (1, 9, 11), "image"),
        (images[..., None], (1, 9, 11), "image"),
        (colour, (3, 8, 9), "image"),
        (planar, (3, 8, 9), "image"),
        (vectors, (5,), "vector"),
    ):
        np.save(tmp_path / "a.npy", array)
        data = load_dataset(str(tmp_path / "a.npy"))
        assert (data.spec.type, data.spec.shape) == (kind, shape)
        assert data.model_input(np.arange(2)).shape == (2, *shape)
    np.savez(tmp_path / "b.npz", x=vectors, y=images)
    assert load_dataset(str(tmp_path / "b.npz")).spec.shape == (5,)
    np.savez_compressed(tmp_path / "c.npz", anything=planar)
    assert load_dataset(str(tmp_path / "c.npz"), resize="crop").spec.resize == "crop"


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 4)), r"shape \(3, 4\) and dtype float64; .*convert with \.astype\(numpy\.float32\)"),
        (np.zeros((3, 4), np.int64), "dtype int64; expected uint8 images"),
        (
            np.zeros((3, 8, 8), np.float32),
            r"shape \(3, 8, 8\) and dtype float32; .* \(N, D\); float32 images have an .*channel: array\[:, None\]$",
        ),
        (np.zeros((3, 8, 8)), r"\(N, D\); convert with \.astype\(numpy.float32\); .*: array\[:, None\]$"),
        (np.zeros(8, np.float32), r"shape \(8,\) and dtype float32; expected .* or float32 vectors \(N, D\)$"),
        (np.zeros(8), r"or float32 vectors \(N, D\)$"),
        (np.array([[0, -2e19]], np.float32), r"has values up to 2e\+19, whose squares overflow float32; scale"),
        (np.zeros((3, 8), np.uint8), r"shape \(3, 8\) and dtype uint8"),
        (np.zeros((3, 8, 8, 2), np.uint8), r"images of 2 channels; expected 1 \(grey\) or 3 \(rgb\)"),
        (np.zeros((3, 8, 8, 3), np.float32), "images of 8 channels"),
        (np.zeros((3, 5), ">f4"), "foreign byte order|dtype >f4"),
        (np.zeros((0, 8, 8), np.uint8), "there is nothing in it"),
        (np.zeros((3, 0), np.float32), "there is nothing in it"),
        (np.full((3, 4), np.nan, np.float32), "has NaN; vectors are finite"),
        (np.full((3, 4), np.inf, np.float32), "vectors are finite"),
        (np.full((3, 1, 8, 8), 200, np.float32), r"float32 images lie in \[0, 1\]; divide by 255"),
        (np.full((3, 1, 8, 8), np.nan, np.float32), "has NaN"),
        (np.array([{"a": 1}], dtype=object), "cannot be read as an array: .*allow_pickle"),
    ],
)
def test_bad_arrays_are_named(tmp_path: Path, array: np.ndarray, message: str) -> None:
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    with pytest.raises(InputError, match=message):
        load_dataset(str(tmp_path / "a.npy"))


def test_files_that_are_no_arrays(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    for content in (b"", b"garbage", b"\x93NUMPY\x01\x00"):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"a\.npy cannot be read as an array"):
            load_dataset(str(path))
    buffer = io.BytesIO()
    np.savez(buffer, x=np.zeros((2, 3), np.float32))
    (tmp_path / "b.npz").write_bytes(buffer.getvalue()[:-30])
    with pytest.raises(InputError, match=r"b\.npz cannot be read as an array"):
        load_dataset(str(tmp_path / "b.npz"))
    np.savez(tmp_path / "c.npz", a=np.zeros(3), b=np.zeros(3))
    with pytest.raises(InputError, match="holds the arrays a, b; expected one of x, images, vectors, or a"):
        load_dataset(str(tmp_path / "c.npz"))
    with zipfile.ZipFile(tmp_path / "d.npz", "w"):
        pass
    with pytest.raises(InputError, match="holds no arrays; expected"):
        load_dataset(str(tmp_path / "d.npz"))


def test_damaged_arrays_are_read_or_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (20, 8, 8), dtype=np.uint8)
    np.save(tmp_path / "a.npy", pixels)
    np.savez_compressed(tmp_path / "a.npz", x=pixels)
    refused = 0
    for name in ("a.npy", "a.npz"):
        intact, path = (tmp_path / name).read_bytes(), tmp_path / f"damaged-{name}"
        for _ in range(150):
            damaged = bytearray(intact)
            for place in rng.integers(6, 300 if name == "a.npz" else 100, 4):
                damaged[place] = rng.integers(256)
            path.write_bytes(damaged)
            try:
                load_dataset(str(path))
            except InputError as error:
                refused += 1
                assert str(error).startswith(str(path))  # noqa: PT017
    assert refused > 100


def test_a_folder_of_pictures(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "sub").mkdir()
    for name in ("b.png", "a.png", "sub/c.png"):
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(tmp_path / name)
    data = load_dataset(str(tmp_path))
    assert data.spec.to_dict() == {"type": "image", "shape": [3, 20, 30], "colour": "rgb", "resize": "exact"}
    np.testing.assert_array_equal(data.examples[0], np.asarray(Image.open(tmp_path / "a.png")))
    grey = load_dataset(str(tmp_path), size=(8, 12), resize="crop", colour="grey")
    assert grey.examples.shape == (3, 8, 12)
    assert grey.spec.to_dict() == {"type": "image", "shape": [1, 8, 12], "colour": "grey", "resize": "crop"}
    Image.new("RGB", (31, 20)).save(tmp_path / "z.png")
    with pytest.raises(InputError, match=r"z\.png has 20x31 pixels; .* pictures of exactly 20x30 \(height x width\)"):
        load_dataset(str(tmp_path))
    (tmp_path / "0.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"0\.png cannot be read as a picture"):
        load_dataset(str(tmp_path))


def test_sources_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="missing does not exist; expected 'digits', a folder"):
        load_dataset(str(tmp_path / "missing"))
    with pytest.raises(InputError, match=r"has neither IDX files .* nor pictures in it"):
        load_dataset(str(tmp_path))
    (tmp_path / "data.csv").write_text("1,2")
    with pytest.raises(InputError, match=r"data\.csv is a file of type '\.csv'"):
        load_dataset(str(tmp_path / "data.csv"))


def test_options_that_do_not_apply(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="size and colour are for folders of pictures"):
        load_dataset("digits", size=(8, 8))
    with pytest.raises(InputError, match="resize is 'zoom'; expected one of exact, stretch, crop"):
        load_dataset("digits", resize="zoom")
    with pytest.raises(InputError, match="colour is 'sepia'; expected one of grey, rgb"):
        load_dataset("digits", colour="sepia")
    np.save(tmp_path / "v.npy", np.zeros((4, 3), np.float32))
    with pytest.raises(InputError, match=r"resize is 'crop', but .*v\.npy holds vectors"):
        load_dataset(str(tmp_path / "v.npy"), resize="crop")


def test_labels_come_from_where_they_are(tmp_path: Path, images: np.ndarray) -> None:
    from sklearn.datasets import load_digits

    np.testing.assert_array_equal(load_dataset("digits").labels, load_digits().target)
    labels = np.array([3, 1, 4, 1, 5, 9], np.uint8)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(images[:4]))
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx(images[4:]))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(labels[:4]))
    assert load_dataset(str(tmp_path)).labels is None  # not for all
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(labels[4:]))
    assert load_dataset(str(tmp_path)).labels.tolist() == labels.tolist()
    for name, array in (("y", labels), ("labels", labels.astype(np.int64)), ("y", labels.astype(np.float32))):
        np.savez(tmp_path / "a.npz", **{"images": images, name: array})
        found = load_dataset(str(tmp_path / "a.npz")).labels
        assert (found is None) == (array.dtype.kind == "f")
        assert found is None or (found.dtype, found.tolist()) == (np.int64, labels.tolist())
    np.savez(tmp_path / "b.NPZ", anything=images, y=labels)
    (tmp_path / "b.NPZ.npz").rename(tmp_path / "b.NPZ")
    data = load_dataset(str(tmp_path / "b.NPZ"))
    assert data.labels.tolist() == labels.tolist()
    (batch,) = open_inputs([str(tmp_path / "b.NPZ")], data.spec).batches(6)  # so it is where the model is run
    np.testing.assert_array_equal(batch, data.examples)
    np.savez(tmp_path / "c.npz", images=images, y=labels[:5])
    with pytest.raises(InputError, match=r"c\.npz has 5 labels, but 6 examples; expected one for each"):
        load_dataset(str(tmp_path / "c.npz"))
    np.savez(tmp_path / "e.npz", images=images, labels=np.array([*"abcde", None], object))  # never unpickled
    assert load_dataset(str(tmp_path / "e.npz")).labels is None
    np.save(tmp_path / "d.npy", images)
    assert load_dataset(str(tmp_path / "d.npy")).labels is None
