from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vae_runtime.errors import InputError
from vae_runtime.labels import read_labels

EXPECTED = [False, True, True, False]


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int64, np.float32, "U1"])
def test_arrays_of_any_kind_hold_labels(tmp_path: Path, dtype: Any) -> None:
    labels = np.array([0, 1, 1, 0]).astype(dtype)
    np.save(tmp_path / "a.npy", labels)
    assert read_labels(str(tmp_path / "a.npy")).tolist() == EXPECTED
    np.savez(tmp_path / "a.npz", x=np.zeros((4, 2)), y=labels)
    assert read_labels(str(tmp_path / "a.npz")).tolist() == EXPECTED
    np.savez(tmp_path / "b.npz", anything=labels)
    assert read_labels(str(tmp_path / "b.npz")).tolist() == EXPECTED


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.txt", "0\n1\n1\n0\n\n"),
        ("a.txt", "\ufeff0\n1\n1\n0\n"),
        ("a.TXT", " 0\n1 \n \n1\n0"),
        ("a.csv", "label\n\n0\n1\n\n1\n0\n"),
        ("a.csv", "0\r\n1\r\n1\r\n0\r\n"),
        ("a.csv", "\ufefflabel\n0\n1\n1\n0\n"),
        ("a.csv", 'name,label\na.png,0\n"b, c.png",1\nd.png, 1\ne.png,0\n'),
    ],
)
def test_texts_hold_labels(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_labels(str(tmp_path / name)).tolist() == EXPECTED


def test_rows_in_another_order_than_the_examples_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("name,label\na.png,0\nb.png,1\nc.png,0\n")
    for names in (["x/a.png", "x/b.png", "x/c.png"], ["a.npy#0", "a.npy#1", "a.npy#2"], []):
        assert read_labels(str(path), names=names).tolist() == [False, True, False]
    expected = r"a\.csv has b\.png where the inputs have c\.png; its rows are expected in their order"
    with pytest.raises(InputError, match=expected):
        read_labels(str(path), names=["x/a.png", "x/c.png", "x/b.png"])


@pytest.mark.parametrize(
    ("rows", "inputs", "message"),
    [
        ("b a c", "a.png b.png c.png", "has b where the inputs have a.png;"),
        ("x.png a.png b.png", "a.png b.png c.png", "has x.png where the inputs have a.png;"),
        ("a v1.5 c", "a.png v1.6 c.png", r"has v1\.5 where the inputs have v1\.6;"),
        ("a.npy#1 a.npy#0 a.npy#2", "a.npy#0 a.npy#1 a.npy#2", "has a.npy#1 where the inputs have a.npy#0;"),
        ("q/a.npy#1 q/a.npy#0 q/a.npy#2", "a.npy#0 a.npy#1 a.npy#2", "has a.npy#1 where the inputs have a.npy#0;"),
        ("a.npy#0 a.npy#2 a.npy#1", "e/a.npy#0 e/a.npy#1 e/a.npy#2", "has a.npy#2 where the inputs have a.npy#1;"),
        ("q/a.npy#0 q/a.npy#1 q/a.npy#2", "e/a.npy#0 e/a.npy#1 e/a.npy#2", None),
        (
            "q/odd/0.png q/good/1.png q/good/0.png",
            "e/good/0.png e/good/1.png e/odd/0.png",
            "has odd/0.png where .* good/0.png;",
        ),
        ("q/good/0.png q/good/1.png q/odd/0.png", "e/good/0.png e/good/1.png e/odd/0.png", None),
        ("good\\0.png good\\1.png odd\\0.png", "e/good/0.png e/good/1.png e/odd/0.png", None),
        ("a.jpg a.png b.png", "a.png a.jpg b.png", "has a.jpg where the inputs have a.png;"),
        ("a a.png b", "a.png a.png b.png", None),
        ("b/good/0 a/good/0 c", "a/good/0.png b/good/0.png c.png", "has b/good/0 where the inputs have a/good/0.png;"),
        ("q/a/good/0 q/b/good/0 q/c", "a/good/0.png b/good/0.png c.png", None),
        ("q/a.png q/b.png q/c.png", "e/a.png e/b.png e/c.png", None),
        ("0 1 0", "e/good/0.png e/good/1.png e/odd/0.png", None),
        ("a b c", "x/a.jpg y/b.PNG c", None),
        ("a.jpg b.tif c.png", "a.png b.png c.png", None),
        ("caf\xe9/a.png caf\xe9/b.png \xfc", "cafe\u0301/a.png cafe\u0301/b.png u\u0308.png", None),
        ("cafe\u0301/a.png \xfc u", "caf\xe9/a.png u\u0308.png u", None),
    ],
)
def test_every_row_is_that_of_its_example(tmp_path: Path, rows: str, inputs: str, message: str | None) -> None:
    path = tmp_path / "a.csv"
    path.write_text(
        "\n".join(["label,name", *(f"{index % 2},{name}" for index, name in enumerate(rows.split()))]), "utf-8"
    )
    with pytest.raises(InputError, match=message) if message else contextlib.nullcontext():
        assert read_labels(str(path), names=inputs.split()).tolist() == [False, True, False]


def test_headings_may_be_capital(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("Name,Label\na,1\nb,0\n")
    assert read_labels(str(path), names=["a.png", "b.png"]).tolist() == [True, False]
    with pytest.raises(InputError, match="its rows are expected in their order"):
        read_labels(str(path), names=["b.png", "a.png"])


def test_names_may_be_any_bytes_and_may_not_be_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"label,name\n1,\xff.png\n0,b.png\n")
    assert read_labels(str(path), names=["x/\udcff.png", "x/b.png"]).tolist() == [True, False]
    path.write_text("label,name\n0\n")
    with pytest.raises(InputError, match=r"a\.csv has  where the inputs have a\.png; its rows are expected"):
        read_labels(str(path), names=["a.png"])


@pytest.mark.parametrize("name", ["a.csv", "a.txt"])
def test_an_empty_file_has_no_labels(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    labels = read_labels(str(tmp_path / name))
    assert (labels.dtype, labels.shape) == (bool, (0,))


def test_anomalies_may_have_labels_of_their_own(tmp_path: Path) -> None:
    np.save(tmp_path / "digits.npy", np.array([3, 8, 9, 3]))
    assert read_labels(str(tmp_path / "digits.npy"), ["8", "9"]).tolist() == EXPECTED
    np.save(tmp_path / "words.npy", np.array(["good", "scratch", "scratch", "good"]))
    assert read_labels(str(tmp_path / "words.npy"), ["scratch"]).tolist() == EXPECTED
    (tmp_path / "words.txt").write_text("good\nscratch\nscratch\ngood\n")
    assert read_labels(str(tmp_path / "words.txt"), ["scratch"]).tolist() == EXPECTED


@pytest.mark.parametrize(
    ("name", "content", "asked", "message"),
    [
        ("a.txt", "0\n2\n", (), "a.txt has the label '2'; expected 1 for an anomaly and 0 for none, or"),
        ("a.txt", "3\n10\n3\n", ("8",), "a.txt has no label '8'; it has 3, 10"),
        ("a.csv", "a,b\n0,1\n", (), "a.csv has the columns a, b; expected one with the heading 'label'"),
        ("a.csv", "name,label\nx,1\ny\n", (), "a.csv has the label ''"),
        ("a.csv", "label,x,Label\n0,x,1\n", (), "a.csv has 2 columns with the heading 'label'; expected one"),
        ("a.csv", "name,label,name\na,1,b\n", (), "a.csv has 2 columns with the heading 'name'; expected one"),
        ("a.json", "[]", (), "a.json has the suffix '.json'; labels are read from .npy, .npz, .csv, .txt"),
        ("a.npy", np.zeros((2, 2)), (), r"has labels of shape \(2, 2\) and dtype float64; expected whole"),
        ("a.npy", np.array([0.5, 1]), (), "dtype float64; expected whole numbers"),
        ("a.npy", np.array([np.nan, 1]), (), "dtype float64; expected whole numbers"),
        ("a.npy", np.array([1j]), (), "dtype complex128; expected whole numbers"),
        ("a.npy", "nonsense", (), "a.npy cannot be read as labels"),
        ("a.npz", {"a": np.ones(1), "b": np.ones(1)}, (), "the arrays a, b; expected one of labels,"),
        ("absent.csv", None, (), "absent.csv does not exist"),
        ("absent.npy", None, (), "absent.npy does not exist"),
    ],
)  # fmt: skip
def test_what_holds_no_labels_is_refused_in_one_sentence(
    tmp_path: Path, name: str, content: Any, asked: tuple[str, ...], message: str
) -> None:
    if isinstance(content, str):
        (tmp_path / name).write_text(content)
    elif isinstance(content, dict):
        np.savez(tmp_path / name, **content)
    elif content is not None:
        np.save(tmp_path / name, content)
    with pytest.raises(InputError, match=message) as caught:
        read_labels(str(tmp_path / name), asked)
    assert "\n" not in str(caught.value)


def test_pickled_labels_are_never_loaded(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([1, "x"], object), allow_pickle=True)
    with pytest.raises(InputError, match="cannot be read as labels"):
        read_labels(str(tmp_path / "a.npy"))
