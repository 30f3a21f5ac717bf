"""Which code of a network torch can trace, and what is said of that which it cannot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vae_export import export_bundle
from vae_runtime import VAE, ExportError

X = np.random.default_rng(0).random((40, 1, 8, 8), dtype=np.float32)


class Model(nn.Module):
    def __init__(self, to_rows: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.to_rows = to_rows
        self.to_latent, self.to_image = nn.Linear(64, 6), nn.Linear(3, 64)

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.to_latent(self.to_rows(x)).chunk(2, dim=1)

    def decode(self, z: Tensor) -> Tensor:
        return self.to_image(z).sigmoid().view(-1, 1, 8, 8)


PLAIN: dict[str, Any] = {"torch": torch}  # pytest writes assertions of its own in place of those in this file
exec("def checked(x):\n    assert torch.isfinite(x).all()\n    return x.flatten(1)\n", PLAIN)


def branching(x: Tensor) -> Tensor:
    if x.max() > 1.5:
        x = x / 255
    return x.flatten(1)


@pytest.mark.parametrize(
    "to_rows",
    [lambda x: x.view(len(x), -1), lambda x: x.reshape(int(x.shape[0]), 64), PLAIN["checked"]],
    ids=["len", "int", "assert"],
)
def test_code_that_has_to_be_read_is_exported(to_rows: Any, tmp_path: Path) -> None:
    model = Model(to_rows)
    export_bundle(model.encode, model.decode, tmp_path / "a.vae", examples=X)
    with VAE.load(tmp_path / "a.vae") as vae, torch.no_grad():
        for rows in (1, 5, 40):
            expected = model.encode(torch.from_numpy(X[:rows]))[0].numpy()
            np.testing.assert_allclose(vae.encode(X[:rows]).mean, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("to_rows", "message"),
    [
        (
            branching,
            r"its code decides by the values of a tensor \(test_tracing\.py, line \d+\), in an if, a loop or a",
        ),
        (
            lambda x: torch.stack([row.flatten() for row in x]),
            "its code makes a plain number of the batch size, as a loop",
        ),
        (
            lambda x: (2 * x if len(x) > 100 else x).flatten(1),
            "its code makes a plain number of the batch size, as a loop",
        ),
        (
            lambda x: torch.cat([rows.flatten(1) for rows in x.split(4)]),
            "fails at batch size 7; if the model's code decides by",
        ),
    ],
    ids=["branch", "loop", "decision", "split"],
)
def test_code_that_no_graph_can_follow_is_named(
    to_rows: Any, message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = Model(to_rows)
    with pytest.raises(ExportError, match=message) as caught:
        export_bundle(model.encode, model.decode, tmp_path / "a.vae", examples=X)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


class Masked(nn.Module):
    """Rows of an image that attend to those before them."""

    def __init__(self, is_causal: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.attend, self.is_causal = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), is_causal

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        mask = nn.Transformer.generate_square_subsequent_mask(8)
        rows = self.attend(x.flatten(1, 2), mask=mask, is_causal=self.is_causal)
        return rows.flatten(1)[:, :6].chunk(2, dim=1)

    def decode(self, z: Tensor) -> Tensor:
        return z.repeat(1, 22)[:, :64].sigmoid().view(-1, 1, 8, 8)


def test_a_causal_mask_is_told_of(tmp_path: Path) -> None:
    model = Masked(is_causal=None).eval()
    with pytest.raises(ExportError, match=r"torch looks into a mask to see whether it is causal.*with is_causal=True"):
        export_bundle(model.encode, model.decode, tmp_path / "a.vae", examples=X)
    model.is_causal = True
    export_bundle(model.encode, model.decode, tmp_path / "a.vae", examples=X)
    with VAE.load(tmp_path / "a.vae") as vae, torch.no_grad():
        expected = model.encode(torch.from_numpy(X))[0].numpy()
        np.testing.assert_allclose(vae.encode(X).mean, expected, atol=1e-5)
