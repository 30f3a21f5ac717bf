"""What is measured of graphs on examples, against the same figures written out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from vae_export.judge import Judge
from vae_runtime import VAE
from vae_runtime.codec import dequantize, quantize

FREE = Path(__file__).parent.parent / "data" / "tiny-free.vae"
X = np.random.default_rng(0).random((70, 3, 12, 16), dtype=np.float32)


@pytest.fixture(scope="module")
def judge() -> Judge:
    graphs = (FREE / "encoder.onnx").read_bytes(), (FREE / "decoder.onnx").read_bytes()
    with VAE.load(FREE) as vae:
        return Judge(graphs, vae.manifest.input, vae.manifest.latent, None, X)


def psnr(found: np.ndarray, x: np.ndarray) -> float:
    """In dB of images in [0, 1], mean over the examples."""
    squared = ((found.astype(np.float64) - x) ** 2).mean(axis=(1, 2, 3))
    return float((10 * np.log10(1 / squared)).mean())


def test_the_cost_of_latents_in_8_bits_is_that_of_a_round_trip(judge: Judge) -> None:
    x = X[:64]
    with VAE.load(FREE, threads=1) as vae:
        mean = vae.encode(x).mean
        stored = quantize(mean)
        kept, exact = psnr(vae.decode(dequantize(stored)), x), psnr(vae.decode(mean), x)
    cost = judge.codec_cost()
    assert mean.size < sum(array.nbytes for array in stored) < 2 * mean.size  # a byte each, and the scales
    bits = 8 * sum(array.nbytes for array in stored) / (64 * 12 * 16)
    assert cost["examples"] == 64
    assert cost["bits_per_pixel"] == pytest.approx(bits, rel=1e-3)
    assert cost["psnr_db"] == pytest.approx(kept, rel=1e-3)
    assert cost["psnr_lost_db"] == pytest.approx(exact - kept, rel=0.05, abs=1e-7)
    assert cost["psnr_lost_db"] != 0


def test_fp32_measured_against_itself_loses_nothing(judge: Judge) -> None:
    found = judge.measure((None, None))
    with VAE.load(FREE, threads=1) as vae:
        assert found.found.psnr_db == pytest.approx(psnr(vae.reconstruct(X), X), rel=1e-5)
    assert (found.psnr_lost, found.nats_lost, found.examples) == (0, 0, 70)
    assert set(found.errors.values()) == {0.0}
    assert judge.fidelity(found, None) == {
        "against": "fp32", "examples": 70, "round_trip_max_error": 0, "mean_max_error": 0, "logvar_max_error": 0,
        "reconstruction_max_error": 0,
    }  # fmt: skip
