"""Traversals, nearest neighbours, directions and axes, against plain float64 numpy."""

from __future__ import annotations

from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest

from vae_runtime import VAE, InputError, latent_space
from vae_runtime.latent_space import (
    map_rows,
    nearest_latents,
    principal_axes,
    traversal,
    unit_axes,
    unit_moments,
)

CLOSE = {"rtol": 1e-5, "atol": 1e-6}


# --- traverse ---------------------------------------------------------------------------------------------------------


def test_traverse_sets_one_element_of_the_mean_and_leaves_the_rest(tiny: VAE, images: np.ndarray) -> None:
    values = [-3.0, 0.5, 3.0]
    found = tiny.traverse(images[:1], 2, values)
    latents = np.repeat(tiny.encode(images[:1]).mean, 3, axis=0)
    latents[:, 2] = values
    assert found.shape == (3, 1, 8, 8)
    assert np.array_equal(found, tiny.decode(latents))


def test_traverse_sets_one_channel_of_a_spatial_latent_at_all_positions(rgb: VAE) -> None:
    x = rgb.golden()["x"][1:2]
    latents = np.repeat(rgb.encode(x).mean, 2, axis=0)
    latents[0, 1], latents[1, 1] = -1, 2
    assert np.array_equal(rgb.traverse(x, 1, np.array([-1, 2])), rgb.decode(latents))
    with pytest.raises(InputError, match=r"dimension is 2; the latent, of shape \(2, 3, 2\), has units 0 to 1"):
        rgb.traverse(x, 2, [0])


def test_traverse_goes_on_from_images_of_free_size_and_codes(free_path: Path, vectors: VAE) -> None:
    with VAE.load(free_path) as vae:
        assert vae.traverse(np.zeros((1, 3, 8, 12), np.float32), 1, (0, 1)).shape == (2, 3, 8, 12)
    assert vectors.traverse(vectors.golden()["x"][:1], 0, (0, 1)).shape == (2, 5)


def test_a_traversal_does_not_write_to_its_latent() -> None:
    latent = np.zeros((1, 2, 3), np.float32)
    assert traversal(latent, 4, [7.0]).ravel().tolist() == [0, 0, 0, 0, 7, 0]
    assert not latent.any()


@pytest.mark.parametrize("dimension", [-1, 4, 1.0, "1", True, None])
def test_units_that_there_are_not_are_refused(tiny: VAE, images: np.ndarray, dimension: Any) -> None:
    with pytest.raises(InputError, match=r"dimension is .*; (expected a whole number from 0|the latent, .* 0 to 3)"):
        tiny.traverse(images[:1], dimension, [0])


def test_masked_values_are_refused(tiny: VAE, images: np.ndarray) -> None:
    with pytest.raises(InputError, match="values is a masked array, whose mask would be lost"):
        tiny.traverse(images[:1], 0, np.ma.array([1.0, 2.0], mask=[0, 1]))


@pytest.mark.parametrize(
    "values",
    [
        [],
        3,
        "abc",
        [[1.0]],
        [1, None],
        [float("nan")],
        [np.inf],
        [1e39],
        None,
        [10**400],
        [1, [2]],
        ["1", "2"],
        [True],
        np.array([1 + 2j]),
    ],
)
def test_wrong_values_are_refused(tiny: VAE, images: np.ndarray, values: Any) -> None:
    with pytest.raises(InputError, match=r"(?s)values is .*; expected finite float32 numbers in a row"):
        tiny.traverse(images[:1], 0, values)


def test_traverse_takes_one_example(tiny: VAE, images: np.ndarray) -> None:
    with pytest.raises(InputError, match=r"inputs holds 3 examples; traverse takes one, for example inputs\[:1\]"):
        tiny.traverse(images[:3], 0, [0])


# --- nearest ----------------------------------------------------------------------------------------------------------


def by_hand(queries: np.ndarray, references: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    q, r = (array.reshape(len(array), -1).astype(np.float64) for array in (queries, references))
    distances = np.sqrt(((q[:, None] - r[None]) ** 2).sum(axis=2))
    order = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return order, np.take_along_axis(distances, order, axis=1)


def require_nearest(queries: np.ndarray, references: np.ndarray, k: int) -> None:
    indices, distances = nearest_latents(queries, references, k)
    expected = by_hand(queries, references, k)
    assert (indices.dtype, distances.dtype) == (np.int64, np.float64)
    np.testing.assert_array_equal(indices, expected[0])
    np.testing.assert_allclose(distances, expected[1], rtol=1e-12)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a million references, with hundreds."""
    monkeypatch.setattr(latent_space, "_BLOCK_ROWS", 70)
    monkeypatch.setattr(latent_space, "_QUERIES", 3)
    monkeypatch.setattr(latent_space, "_FEW", 4)


@pytest.mark.parametrize("k", [1, 5, 200])
@pytest.mark.parametrize("shape", [(1,), (20,), (2, 3, 2)])
@pytest.mark.parametrize("offset", [0, 1e3, 1e7])
def test_nearest_are_those_of_an_exhaustive_search(
    small_blocks: None, k: int, shape: tuple[int, ...], offset: float
) -> None:
    rng = np.random.default_rng(k)
    references = (offset + offset * 1e-6 * rng.normal(size=(200, *shape)) + rng.normal(size=(200, *shape))).astype("f4")
    queries = np.concatenate([references[:4], rng.normal(offset, 1, (4, *shape)).astype(np.float32)])
    require_nearest(queries, references, k)


def test_differences_that_float32_products_cannot_tell_are_told(small_blocks: None) -> None:
    rng = np.random.default_rng(0)
    references = np.full((300, 32), 1000, np.float32) + rng.integers(0, 3, (300, 32)).astype(np.float32) * 6.1e-5
    references[-1] = -1e6  # keeps the centre and the scale far from what matters
    require_nearest(references[:10], references, 4)


@pytest.mark.parametrize("order", ["nearer and nearer", "farther and farther"])
def test_references_in_any_order(small_blocks: None, order: str) -> None:
    line = np.arange(300, dtype=np.float32)[:, None] * np.ones((1, 3), np.float32)
    require_nearest(line[:2] - 5, line if order == "farther and farther" else line[::-1].copy(), 7)


def test_of_equal_references_the_lower_index_comes_first(small_blocks: None) -> None:
    references = np.zeros((400, 3), np.float32)
    references[250:] = 1
    assert nearest_latents(np.ones((2, 3), np.float32), references, 3)[0].tolist() == [[250, 251, 252]] * 2
    assert nearest_latents(np.zeros((1, 3), np.float32), references, 100)[0][0].tolist() == list(range(100))


@pytest.mark.parametrize("size", [0, 1e-38, 1e30, 3e38])
def test_tiny_and_huge_latents_are_told_apart(size: float) -> None:
    references = (size * np.random.default_rng(1).uniform(-1, 1, (100, 4))).astype(np.float32)
    require_nearest(references[:5], references, 3)
    require_nearest(np.ones((1, 4), np.float32), references, 3)


def test_a_vae_searches_by_the_means(tiny: VAE, images: np.ndarray) -> None:
    references = tiny.encode(images).mean
    indices, distances = tiny.nearest(images[3:6], references, k=2)
    expected = by_hand(references[3:6], references, 2)
    assert np.array_equal(indices, expected[0])
    assert indices[:, 0].tolist() == [3, 4, 5]
    np.testing.assert_allclose(distances, expected[1], atol=1e-5)
    assert tiny.nearest(images[:2], references)[0].tolist() == [[0], [1]]


@pytest.mark.parametrize(
    ("change", "k", "message"),
    [
        (lambda z: z, 0, "k is 0; expected a whole number from 1"),
        (lambda z: z, 21, "k is 21; expected at most the number of references, 20"),
        (lambda z: z, 1.0, "k is 1.0; expected a whole number"),
        (lambda z: z[:, :3], 1, r"references has shape \(20, 3\); expected \(N, 4\) float32"),
        (lambda z: z.astype(np.float64), 1, "references has dtype float64; expected"),
        (lambda z: z * np.nan, 1, r"references\[0\] has NaN; latents are finite"),
        (lambda z: z.tolist(), 1, "references is a list; expected a numpy array"),
    ],
    ids=range(7),
)
def test_nearest_refuses_wrong_arguments(tiny: VAE, images: np.ndarray, change: Any, k: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        tiny.nearest(images[:2], change(tiny.encode(images).mean), k)


def test_latents_of_images_of_other_sizes_are_no_references(free_path: Path) -> None:
    with VAE.load(free_path) as vae:
        references = vae.encode(np.zeros((2, 3, 8, 8), np.float32)).mean
        with pytest.raises(InputError, match=r"references has latents of shape \(2, 4, 4\); those of the inputs have"):
            vae.nearest(np.zeros((1, 3, 8, 12), np.float32), references)


SEARCH = """
import sys, tracemalloc
import numpy as np
from vae_runtime.latent_space import nearest_latents
references = np.random.default_rng(0).standard_normal((int(sys.argv[1]), int(sys.argv[2])), dtype=np.float32)
tracemalloc.start()
indices, _ = nearest_latents(references[:100], references, 3)
assert indices[:, 0].tolist() == list(range(100))
print(tracemalloc.get_traced_memory()[1])
"""


@pytest.mark.parametrize(("count", "elements"), [(400_000, 32), (6000, 4096)])
def test_memory_does_not_grow_with_the_references(python: Any, count: int, elements: int) -> None:
    found = python(SEARCH, count, elements)
    assert (found.returncode, found.stderr) == (0, "")
    assert int(found.stdout) < 80 * 2**20  # all distances are 305 MiB, the wide references 188 MiB


# --- directions and axes ----------------------------------------------------------------------------------------------


def test_attribute_vector_is_the_difference_of_mean_latents(tiny: VAE, images: np.ndarray) -> None:
    z = tiny.encode(images).mean.astype(np.float64)
    found = tiny.attribute_vector(images[:13], images[13:])
    assert (found.dtype, found.shape) == (np.float32, (4,))
    np.testing.assert_allclose(found, z[:13].mean(axis=0) - z[13:].mean(axis=0), **CLOSE)
    assert not tiny.attribute_vector(images, images).any()
    assert tiny.decode(tiny.encode(images).mean + found).shape == images.shape


def test_attribute_vector_names_the_side_that_is_wrong(tiny: VAE, images: np.ndarray) -> None:
    with pytest.raises(InputError, match=r"positives has shape \(20, 8, 8\)"):
        tiny.attribute_vector(images[:, 0], images)
    with pytest.raises(InputError, match="negatives has dtype float64"):
        tiny.attribute_vector(images, images.astype(np.float64))


def test_attribute_vector_of_images_of_two_sizes_is_refused(free_path: Path) -> None:
    with VAE.load(free_path) as vae, pytest.raises(InputError, match=r"latents of shapes \(2, 4, 4\) and \(2, 4, 6\)"):
        vae.attribute_vector(np.zeros((1, 3, 8, 8), np.float32), np.zeros((1, 3, 8, 12), np.float32))


def test_principal_axes_are_those_of_the_singular_value_decomposition() -> None:
    rng = np.random.default_rng(0)
    z = (50 + rng.normal(size=(500, 6)) * [1, 5, 0.2, 3, 0.1, 2] @ np.linalg.qr(rng.normal(size=(6, 6)))[0]).astype(
        "f4"
    )
    axes = principal_axes([z[:100].reshape(100, 1, 2, 3), z[100:].reshape(400, 1, 2, 3)], 3)
    centred = z.astype(np.float64) - z.mean(axis=0, dtype=np.float64)
    _, values, vectors = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(axes.centre, z.mean(axis=0, dtype=np.float64))
    np.testing.assert_allclose(axes.deviations, values[:3] / np.sqrt(500), rtol=1e-9)
    np.testing.assert_allclose(axes.parts, values[:3] ** 2 / (values**2).sum(), rtol=1e-9)
    np.testing.assert_allclose(np.abs((axes.directions * vectors[:3]).sum(axis=1)), 1, rtol=1e-9)
    assert (np.take_along_axis(axes.directions, np.abs(axes.directions).argmax(axis=1)[:, None], 1) > 0).all()


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([np.zeros((1, 4), np.float32)], "the inputs are 1 in number; axes need at least 2"),
        ([np.zeros((5, 1), np.float32)], "the latents have 1 elements; 2 axes need as many"),
        ([np.zeros((2, 5000), np.float32)], "the latents have 5000 elements; axes are found for up to 4096"),
        ([np.zeros((2, 4), np.float32), np.zeros((2, 6), np.float32)], "latents have 4 and 6 elements"),
    ],
)
def test_axes_that_there_are_not_are_refused(batches: list[np.ndarray], message: str) -> None:
    with pytest.raises(InputError, match=message):
        principal_axes(batches)


def test_equal_latents_have_axes_without_extent() -> None:
    axes = principal_axes([np.ones((5, 3), np.float32)])
    assert axes.deviations.tolist() == axes.parts.tolist() == [0, 0]


def test_moments_of_channels_are_over_all_positions() -> None:
    z = np.random.default_rng(0).normal(3, 2, (50, 2, 3, 4)).astype(np.float32)
    means, variances = unit_moments([z[:20], z[20:]])
    np.testing.assert_allclose(means, z.mean(axis=(0, 2, 3), dtype=np.float64))
    np.testing.assert_allclose(variances, z.astype(np.float64).var(axis=(0, 2, 3)))
    many = np.random.default_rng(1).normal(size=(3, 5000)).astype(np.float32)  # of which there is no covariance
    np.testing.assert_allclose(unit_moments([many])[1], many.astype(np.float64).var(axis=0))
    assert (unit_moments([np.full((7, 3), 0.1, np.float32)])[1] >= 0).all()


def test_a_map_runs_to_the_right_and_up_at_even_quantiles() -> None:
    axes = unit_axes((3,), [2, 0], np.array([10.0, 20.0, 30.0]), np.array([1.0, 9.0, 4.0]))
    assert axes.parts.tolist() == [4 / 14, 1 / 14]
    rows = np.stack(list(map_rows(axes, (3,), 5)))
    assert (rows.shape, rows.dtype) == ((5, 5, 3), np.float32)
    quantiles = [NormalDist().inv_cdf(p) for p in (0.1, 0.3, 0.5, 0.7, 0.9)]
    for row, up in zip(rows, quantiles[::-1], strict=True):
        np.testing.assert_allclose(row[:, 2], 30 + 2 * np.array(quantiles), rtol=1e-6)
        np.testing.assert_allclose(row[:, 0], 10 + up, rtol=1e-6)
        assert (row[:, 1] == 20).all()


def test_a_map_of_channels_sets_them_at_all_positions() -> None:
    axes = unit_axes((2, 1, 3), [1, 0], np.zeros(2), np.ones(2))
    row = next(map_rows(axes, (2, 1, 3), 3))
    assert row.shape == (3, 2, 1, 3)
    assert (row == row[..., :1]).all()
    assert (row[:, 0] > 0.9).all()  # the upper end
    assert row[:, 1, 0, 0].tolist() == sorted(row[:, 1, 0, 0].tolist())
