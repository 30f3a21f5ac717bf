"""Models whose reconstructions of real inputs are worse than a constant are warned of."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from vae_export import export_bundle
from vae_export.graphs import DecoderGraph, EncoderGraph
from vae_export.on_data import InactiveUnitsWarning
from vae_export.plausibility import AnotherPriorWarning, PoorReconstructionWarning, check_plausible
from vae_export.reference import Reference

MEANS = np.array([0.2, 0.5, 0.8], np.float32)[:, None, None]
IMAGES = MEANS + np.random.default_rng(0).uniform(-0.2, 0.2, (6, 3, 4, 4)).astype(np.float32)
VECTORS = np.random.default_rng(0).normal([-50, 0, 70], [1, 20, 3], (40, 3)).astype(np.float32)
DARK_FIRST = np.random.default_rng(0).uniform(0, 0.4, (48, 1, 4, 4)).astype(np.float32)
DARK_FIRST[16:] += 0.6
PLACES = np.linspace(0, 1, 16, dtype=np.float32).reshape(1, 4, 4)
BY_PLACE = PLACES + np.random.default_rng(0).uniform(-0.02, 0.02, (8, 1, 4, 4)).astype(np.float32)


class Function(nn.Module):
    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.function(z)


def check(x: np.ndarray, decode: Callable[[torch.Tensor], torch.Tensor], real: bool = True) -> None:
    halves = Reference(
        EncoderGraph(nn.Flatten(), "autoencoder"),
        DecoderGraph(Function(lambda z: decode(z.reshape(-1, *x.shape[1:]))), x.ndim == 4),
    )
    check_plausible(halves, x, "unit" if x.ndim == 4 else None, real)


@pytest.mark.parametrize(
    ("x", "decode", "said"),
    [
        (IMAGES, lambda z: 1.05 - 0.05 * z, r"than one colour for all of them is: their mean squared error is 0\.3\d"),
        (DARK_FIRST, lambda z: torch.where(z < 0.5, z, 0.0), "than one colour for all of them is"),
        (BY_PLACE, lambda z: 0 * z + z.mean((1, 2, 3), keepdim=True), r"than their mean is: .*, \d\d\d\.\d times"),
        (VECTORS, lambda z: -z, r"than their mean is: their mean squared error is .*, 1\d\d\.\d times as large; the m"),
    ],
)
def test_they_are_warned_of(x: np.ndarray, decode: Callable[[torch.Tensor], torch.Tensor], said: str) -> None:
    with pytest.warns(PoorReconstructionWarning, match=said):
        check(x, decode)


@pytest.mark.parametrize(
    ("x", "decode"),
    [
        (IMAGES, lambda z: z),
        (IMAGES, lambda z: 0 * z + torch.from_numpy(MEANS)),
        (BY_PLACE, lambda z: 0 * z + torch.from_numpy(PLACES)),
        (BY_PLACE[:7], lambda z: 0 * z + z.mean((1, 2, 3), keepdim=True)),
        (IMAGES, lambda z: torch.where(z < 0.05, -3.0, z)),
        (VECTORS, lambda z: 0 * z + torch.from_numpy(VECTORS.mean(0))),
        (VECTORS[:8], lambda z: 0 * z + torch.from_numpy(np.float32([-50, 0, 70]))),
        (VECTORS[:7], lambda z: -z),
        (0.9 + 0.001 * IMAGES, lambda z: z + 0.003),
        (0 * IMAGES, lambda z: z + 0.5),
    ],
    ids=[
        "exact",
        "one colour",
        "mean image",
        "few images",
        "cut",
        "mean vector",
        "by 8 vectors",
        "few vectors",
        "faint",
        "black",
    ],
)
def test_others_are_not(x: np.ndarray, decode: Callable[[torch.Tensor], torch.Tensor]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", PoorReconstructionWarning)
        check(x, decode)


def test_of_noise_nothing_is_said() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", PoorReconstructionWarning)
        check(IMAGES, lambda z: 1 - z, real=False)


def test_the_warning_is_the_callers_and_states_the_ratio(tmp_path: Path) -> None:
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(48, 4))
    decoder = nn.Sequential(nn.Linear(4, 48), nn.Hardtanh(1, 1.05), nn.Unflatten(1, (3, 4, 4)))
    with pytest.warns(PoorReconstructionWarning) as caught:
        export_bundle(encoder, decoder, tmp_path / "a.vae", examples=IMAGES, kind="autoencoder")
    assert {warning.filename for warning in caught} == {__file__}
    error = np.mean((1 - IMAGES) ** 2)
    constant = np.mean((IMAGES - IMAGES.mean((0, 2, 3), keepdims=True)) ** 2)
    found = re.search(r"error is ([\d.]+), ([\d.]+) times", str(caught[0].message))
    assert found is not None
    assert float(found[1]) == pytest.approx(error, rel=0.05)
    assert float(found[2]) == pytest.approx(error / constant, rel=0.02)


class Moments(nn.Module):
    """A mean of x times `scale`, and one log-variance."""

    def __init__(self, scale: float, logvar: float) -> None:
        super().__init__()
        self.scale, self.logvar = scale, logvar

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        mean = self.scale * x.flatten(1)
        return {"mean": mean, "logvar": torch.full_like(mean, self.logvar)}


STANDARD = np.random.default_rng(0).standard_normal((40, 3), dtype=np.float32)


@pytest.mark.parametrize(
    ("scale", "logvar", "moment"), [(2.0, -4.0, r"3\.\d"), (0.1, -5.0, r"0\.0\d+"), (0.5, 2.0, r"7\.\d")]
)
def test_latents_that_are_spread_otherwise_than_the_prior_are_warned_of(
    scale: float, logvar: float, moment: str, tmp_path: Path
) -> None:
    with pytest.warns(
        AnotherPriorWarning, match=rf"have a mean square of {moment}, where N\(0, 1\), .* has 1: "
    ) as caught:
        export_bundle(Moments(scale, logvar), nn.Linear(3, 3), tmp_path / "a.vae", examples=STANDARD)
    assert {one.filename for one in caught if one.category is AnotherPriorWarning} == {__file__}


@pytest.mark.parametrize(
    ("scale", "logvar", "rows", "prior"),
    [
        (0.9, -1.5, 40, None),
        (0.0, 0.0, 40, None),
        (2.0, -4.0, 7, None),
        (2.0, -4.0, 21, None),
        (2.0, -4.0, 40, "gaussian"),
    ],
)
def test_latents_that_are_spread_as_the_prior_or_too_few_are_not(
    scale: float, logvar: float, rows: int, prior: str | None, tmp_path: Path
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", AnotherPriorWarning)
        warnings.simplefilter("ignore", InactiveUnitsWarning)
        export_bundle(
            Moments(scale, logvar), nn.Linear(3, 3), tmp_path / "a.vae", examples=STANDARD[:rows], prior=prior
        )


@pytest.mark.parametrize(("scale", "warned"), [(0.05, True), (0.2, False)])
def test_latents_that_are_all_the_same_are_warned_of(scale: float, warned: bool, tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        export_bundle(Moments(scale, 0.0), nn.Linear(3, 3), tmp_path / "a.vae", examples=STANDARD)
    said = [one for one in caught if one.category is InactiveUnitsWarning]
    assert len(said) == warned
    for one in said:
        assert "varies by less than 0.01 over 40 real inputs" in str(one.message)
        assert one.filename == __file__
