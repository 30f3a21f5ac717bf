from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vae_runtime import InputError, to_uint8
from vae_runtime.manifest import InputSpec
from vae_runtime.preprocess import binarize, describe, to_model_input

GREY = InputSpec("image", (1, 4, 3), "grey", "exact")
RGB = InputSpec("image", (3, 4, 2), "rgb", "exact")
MANY = InputSpec("image", (5, 2, 2))
VECTOR = InputSpec("vector", (6,))
SPECS = (GREY, RGB, MANY, VECTOR)

quiet = settings(derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))


def image_shapes(spec: InputSpec, n: int) -> tuple[int, ...]:
    """The uint8 shape of n examples."""
    channels, height, width = spec.shape
    return (n, height, width) if channels == 1 else (n, height, width, channels)


DTYPES = [
    "float32",
    "float32",
    "float32",
    "uint8",
    "uint8",
    ">f4",
    "float64",
    "float16",
    "int32",
    "uint16",
    "bool",
    "c8",
    "U3",
    "O",
]
LAYOUTS = ["plain", "reversed", "strided", "fortran", "broadcast", "readonly", "masked", "unaligned", "subclass"]

# --- properties -------------------------------------------------------------------------------------------------------


@st.composite
def any_array(draw: st.DrawFn) -> tuple[InputSpec, np.ndarray]:
    """An array that may be right or wrong in every respect at once: shape, dtype, order, strides, values, class."""
    spec, tame = draw(st.sampled_from(SPECS)), draw(st.booleans())
    n = draw(st.sampled_from((1, 2, 3) if tame else (0, 1, 2, 3)))
    shapes = [(n, *spec.shape), (n, *spec.shape), spec.shape, (n,), (), (n, *spec.shape, 1), (n, *spec.shape[::-1])]
    if spec.is_image:
        shapes += [image_shapes(spec, n)] * 2 + [image_shapes(spec, n)[1:], (n, *spec.shape[1:], spec.shape[0])]
    shape, dtype = draw(st.sampled_from(shapes)), draw(st.sampled_from(DTYPES))
    seed, scale = draw(st.integers(0, 2**32 - 1)), draw(st.sampled_from((1, 1, 1, 1.001, 2, 255, 1e30)))
    shift = draw(st.sampled_from((0, 0, 0, 0.001, 1)))
    if tame:
        dtype = draw(st.sampled_from(("float32", "uint8"))) if spec.is_image else "float32"
        shape, scale, shift = (image_shapes(spec, n) if dtype == "uint8" else (n, *spec.shape)), 1, 0
    values = np.random.default_rng(seed).random(shape) * scale - shift
    with np.errstate(all="ignore"):
        array = np.asarray(np.asarray(np.abs(values) * 255 if dtype == "uint8" else values) % 2**40).astype("float64")
        array = np.asarray((array % 256).astype("uint8") if dtype == "uint8" else np.asarray(values).astype(dtype))
    if array.size and array.dtype.kind == "f" and draw(st.integers(0, 9)) == 0:
        array.flat[draw(st.integers(0, array.size - 1))] = draw(st.sampled_from((np.nan, np.inf, -np.inf)))
    layout = draw(st.sampled_from(LAYOUTS))
    if array.ndim and layout == "reversed":
        array = array[::-1]
    elif array.ndim and layout == "strided":
        array = np.repeat(array, 2, axis=-1)[..., ::2]
    elif layout == "fortran":
        array = np.asfortranarray(array)
    elif layout == "broadcast" and array.ndim and len(array):
        array = np.broadcast_to(array[:1], array.shape)
    elif layout == "readonly" and isinstance(array, np.ndarray):
        array.flags.writeable = False
    elif layout == "masked":
        array = np.ma.masked_array(array, mask=False)
    elif layout == "unaligned" and array.dtype.kind in "fu":
        raw = np.frombuffer(b"\0" + array.tobytes(), np.uint8)
        array = raw[1:].view(array.dtype).reshape(array.shape) if array.size else array
    elif layout == "subclass":
        array = array.view(type("Subclass", (np.ndarray,), {}))
    return spec, array


def expected_input(spec: InputSpec, array: np.ndarray) -> np.ndarray | None:
    """The rule of the format, written down once more: the float32 array, or None where there is none."""
    if isinstance(array, np.ma.MaskedArray) or array.ndim == 0 or len(array) == 0:
        return None
    plain = np.array(array, copy=True)
    if plain.dtype == np.uint8 and spec.is_image:
        if plain.shape != image_shapes(spec, len(plain)):
            return None
        grown = plain[..., None] if spec.shape[0] == 1 else plain
        return (np.moveaxis(grown, -1, 1).astype(np.float64) / 255).astype(np.float32)
    if plain.dtype.str != np.dtype(np.float32).str or plain.shape != (len(plain), *spec.shape):
        return None
    if not np.isfinite(plain).all() or (spec.is_image and ((plain < 0) | (plain > 1)).any()):
        return None
    return plain


outcomes: dict[str, int] = {"array": 0, "refused": 0}


@settings(quiet, max_examples=800)
@given(any_array())
def test_any_array_becomes_exactly_the_right_input_or_an_input_error(case: tuple[InputSpec, np.ndarray]) -> None:
    spec, array = case
    before, base = array.tobytes(), array.dtype
    expected = expected_input(spec, array)
    try:
        found = to_model_input(array, spec, "things")
    except InputError as error:
        found, message = None, str(error)
    if found is None:
        assert expected is None, f"refused what is right: {message}"
        assert message.startswith(("things ", "things["))
        outcomes["refused"] += 1
    else:
        assert expected is not None, "accepted what is wrong"
        assert type(found) is np.ndarray
        assert found.dtype == np.float32
        assert found.flags.c_contiguous
        assert found.flags.aligned
        assert np.array_equal(found, expected)
        outcomes["array"] += 1
    assert array.tobytes() == before
    assert array.dtype == base


def test_the_property_above_saw_enough_of_both_outcomes() -> None:
    assert sum(outcomes.values()) == 0 or min(outcomes.values()) > 100, outcomes


@settings(quiet, max_examples=300)
@given(st.sampled_from((GREY, RGB, MANY)), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_uint8_survives_the_way_in_and_out(spec: InputSpec, n: int, seed: int) -> None:
    array = np.random.default_rng(seed).integers(0, 256, image_shapes(spec, n), np.uint8)
    assert np.array_equal(to_uint8(to_model_input(array, spec)), array)


@settings(quiet, max_examples=300)
@given(st.integers(0, 2**32 - 1), st.sampled_from((GREY, RGB, MANY)))
def test_to_uint8_rounds_to_nearest(seed: int, spec: InputSpec) -> None:
    images = np.random.default_rng(seed).random((2, *spec.shape), dtype=np.float32)
    found = to_uint8(images)
    planar = found[:, None] if spec.shape[0] == 1 else np.moveaxis(found, -1, 1)
    assert (np.abs(planar - images.astype(np.float64) * 255) <= 0.5 + 1e-4).all()


# --- exact values -----------------------------------------------------------------------------------------------------


def test_every_uint8_becomes_k_over_255_correctly_rounded() -> None:
    spec = InputSpec("image", (1, 16, 16), "grey")
    found = to_model_input(np.arange(256, dtype=np.uint8).reshape(1, 16, 16), spec).ravel()
    assert [float(value) for value in found] == [float(np.float32(k / 255)) for k in range(256)]


def test_valid_float32_is_returned_without_a_copy() -> None:
    array = np.zeros((2, *RGB.shape), np.float32)
    assert to_model_input(array, RGB) is array


def test_big_input_of_channels_last_lands_in_the_right_channel() -> None:
    array = np.zeros((1, 4, 2, 3), np.uint8)
    array[0, 3, 1, 2] = 255
    found = to_model_input(array, RGB)
    assert found[0, 2, 3, 1] == 1
    assert found.sum() == 1


def test_ends_of_the_range_are_inside() -> None:
    array = np.array([[[[0.0, -0.0, 1.0]] * 4]], np.float32)
    assert np.array_equal(to_model_input(array, GREY), array)
    array[0, 0, 0, 0] = np.nextafter(np.float32(1), np.float32(2))
    with pytest.raises(InputError, match=r"values from -0 to 1.00000012; float32 images lie in \[0, 1\]$"):
        to_model_input(array, GREY)
    array[0, 0, 0, 0] = np.nextafter(np.float32(0), np.float32(-1))
    with pytest.raises(InputError, match=r"values from -1.4013e-45 to 1; float32 images lie in"):
        to_model_input(array, GREY)


# --- messages ---------------------------------------------------------------------------------------------------------

WRONG: list[tuple[InputSpec, Any, str]] = [
    (GREY, [[1, 2]], "images is a list; expected a numpy array"),
    (GREY, None, "images is a NoneType; expected a numpy array"),
    (GREY, np.float32(1), "images is a float32; expected a numpy array"),
    (GREY, np.array(1.0), r"images has shape \(\); expected a batch of at least one example"),
    (GREY, np.zeros((0, 4, 3), np.uint8), r"images has shape \(0, 4, 3\); expected a batch of at least one example"),
    (GREY, np.ma.zeros((1, 4, 3), np.uint8), r"masked array, whose mask would be lost; fill it first: images.filled\("),
    (GREY, np.zeros((2, 5, 3), np.uint8),
     r"^images has shape \(2, 5, 3\); expected \(N, 4, 3\) uint8 or \(N, 1, 4, 3\) float32 in \[0, 1\]$"),
    (RGB, np.zeros((2, 3, 4, 2), np.uint8), r"\(2, 3, 4, 2\); expected \(N, 4, 2, 3\) uint8 or \(N, 3, 4, 2\) float32"),
    (GREY, np.zeros((4, 3), np.uint8), r"a single example without a batch: add one with array\[None\]"),
    (GREY, np.zeros((1, 4, 3), np.float32), r"a single example without a batch: add one with array\[None\]"),
    (RGB, np.zeros((4, 2, 3), np.uint8), r"a single example without a batch: add one with array\[None\]"),
    (RGB, np.zeros((7, 4, 2, 3), np.float32), r"shape \(7, 4, 2, 3\); .*; float32 images are channels first"),
    (RGB, np.zeros((7, 3, 4, 2), np.uint8), r"shape \(7, 3, 4, 2\); .*; uint8 images are channels last"),
    (GREY, np.zeros((7, 4, 3, 1), np.float32), r"shape \(7, 4, 3, 1\); .*; float32 images are channels first"),
    (GREY, np.zeros((7, 4, 3, 1), np.uint8), r"\(7, 4, 3, 1\); .*; grey ones have no axis for it: array\[\.\.\., 0\]$"),
    (GREY, np.zeros((7, 4, 3), np.float32), r"\(7, 4, 3\); .* float32 images have an axis for the channel"),
    (GREY, np.zeros((1, 1, 4, 3)), r"dtype float64; expected .*; convert with .astype\(numpy.float32\)"),
    (GREY, np.zeros((1, 1, 4, 3), np.float16), r"dtype float16; expected .*; convert with .astype\(numpy.float32\)"),
    (GREY, np.zeros((1, 4, 3), np.int64), r"dtype int64; expected .*; integers are images only as uint8"),
    (GREY, np.zeros((1, 4, 3), bool), "dtype bool; expected"),
    (GREY, np.zeros((1, 4, 3), object), "dtype object; expected"),
    (GREY, np.zeros((1, 1, 4, 3), ">f4"), "dtype >f4 in foreign byte order; expected .*; convert with"),
    (GREY, np.full((1, 1, 4, 3), np.nan, np.float32), r"images\[0\] has NaN; float32 images lie in \[0, 1\]$"),
    (GREY, np.float32([[[[0.5, 1, 0]] * 4], [[[-1, 2, 0.5]] * 4], [[[np.nan] * 3] * 4]]),
     r"^images\[1\] has values from -1 to 2; float32 images"),
    (VECTOR, np.float32([[0] * 6, [0] * 5 + [np.inf]]), r"^images\[1\] has values from 0 to inf; vectors are finite"),
    (GREY, np.full((1, 1, 4, 3), np.inf, np.float32), r"values from inf to inf; float32 images lie in \[0, 1\]$"),
    (GREY, np.full((1, 1, 4, 3), 255, np.float32), r"values from 255 to 255; .*; divide by 255, or pass the uint8"),
    (GREY, np.full((1, 1, 4, 3), 2, np.float32), r"values from 2 to 2; .*; divide by 255, or pass the uint8"),
    (GREY, np.full((1, 1, 4, 3), 1.5, np.float32), r"values from 1.5 to 1.5; float32 images lie in \[0, 1\]$"),
    (GREY, np.full((1, 1, 4, 3), 256, np.float32), r"values from 256 to 256; float32 images lie in \[0, 1\]$"),
    (GREY, np.full((1, 1, 4, 3), -0.5, np.float32), r"values from -0.5 to -0.5; float32 images lie in \[0, 1\]$"),
    (VECTOR, np.zeros((1, 6), np.uint8), r"dtype uint8; expected \(N, 6\) float32$"),
    (VECTOR, np.zeros((1, 6)), r"dtype float64; expected \(N, 6\) float32; convert with"),
    (VECTOR, np.zeros(6, np.float32), r"shape \(6,\); expected \(N, 6\) float32; this looks like a single example"),
    (InputSpec("vector", (1,)), np.zeros(6, np.float32), r"shape \(6,\); expected \(N, 1\) float32$"),
    (VECTOR, np.zeros((1, 7), np.float32), r"shape \(1, 7\); expected \(N, 6\) float32$"),
    (VECTOR, np.full((1, 6), np.nan, np.float32), r"images\[0\] has NaN; vectors are finite"),
    (VECTOR, np.full((1, 6), -np.inf, np.float32), "values from -inf to -inf; vectors are finite"),
]  # fmt: skip


@pytest.mark.parametrize(("spec", "array", "message"), WRONG, ids=range(len(WRONG)))
def test_wrong_input_is_told_name_value_and_rule(spec: InputSpec, array: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        to_model_input(array, spec)


@pytest.mark.parametrize("spec", SPECS)
def test_description_of_the_rule_fits_what_is_accepted(spec: InputSpec) -> None:
    assert str(spec.shape)[1:].removesuffix(",)").removesuffix(")") in describe(spec)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([1], "images is a list"),
        (np.zeros((2, 4, 3), np.float32), r"shape \(2, 4, 3\) and dtype float32; expected \(N, C, H, W\) float32"),
        (np.zeros((1, 1, 4, 3)), "dtype float64; expected"),
        (np.zeros((1, 1, 4, 3), ">f4"), "dtype >f4; expected"),
        (np.zeros((0, 1, 4, 3), np.float32), "expected a batch of at least one example"),
        (np.full((1, 1, 4, 3), np.nan, np.float32), r"images\[0\] has NaN"),
        (np.full((1, 1, 4, 3), 1.01, np.float32), r"values from 1.01 to 1.01; float32 images lie in \[0, 1\]"),
        (np.ma.zeros((1, 1, 4, 3), np.float32), "masked array"),
    ],
    ids=range(8),
)
def test_to_uint8_refuses_what_is_no_batch_of_images(images: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        to_uint8(images)


def test_to_uint8_leaves_its_argument_alone_and_returns_memory_of_its_own() -> None:
    images = np.full((1, 1, 2, 2), 0.5, np.float32)
    found = to_uint8(images)
    found[:] = 0
    assert (images == 0.5).all()


# --- binarize ---------------------------------------------------------------------------------------------------------


def test_binarize_none_threshold_and_dynamic() -> None:
    images = np.array([0.0, 0.25, np.nextafter(np.float32(0.5), np.float32(0)), 0.5, 1.0], np.float32).repeat(20_000)
    assert binarize(images, "none") is images
    threshold = binarize(images, "threshold")
    assert threshold.dtype == np.float32
    assert threshold[::20_000].tolist() == [0, 0, 0, 1, 1]
    drawn = binarize(images, "dynamic", np.random.default_rng(0))
    assert drawn.dtype == np.float32
    assert set(np.unique(drawn)) == {0.0, 1.0}
    rates = drawn.reshape(5, -1).mean(axis=1)
    assert rates[0] == 0
    assert rates[4] == 1
    assert np.abs(rates[1:4] - (0.25, 0.5, 0.5)).max() < 0.015
    again = binarize(images, "dynamic", np.random.default_rng(0))
    assert np.array_equal(drawn, again)


def test_binarize_refuses_unknown_modes_and_missing_generators() -> None:
    with pytest.raises(InputError, match="mode 'fuzzy'; expected one of none, dynamic, threshold"):
        binarize(np.zeros(1, np.float32), "fuzzy")
    with pytest.raises(InputError, match=r"mode 'dynamic' and no rng; pass numpy.random.default_rng"):
        binarize(np.zeros(1, np.float32), "dynamic")
