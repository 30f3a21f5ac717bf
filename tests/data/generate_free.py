"""Make tiny-free.vae, a VAE of colour images of any even height and width: seeded weights, golden values by numpy.

    python tests/data/generate_free.py [FOLDER]

Latents are (2, H/2, W/2). Two convolutions in each half, so that the receptive field is small and known: a latent looks
at 7x7 pixels, a pixel at 5x5 latents.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from vae_export.bundle import write_bundle
from vae_runtime.manifest import Golden, InputSpec, LatentSpec, Likelihood, Manifest, Precision

CHANNELS, LATENT, HIDDEN, SIZE = 3, 2, 6, (12, 16)
SHAPES = {
    "down": (HIDDEN, CHANNELS, 3, 3),
    "moments": (2 * LATENT, HIDDEN, 3, 3),
    "up": (HIDDEN, LATENT, 3, 3),
    "pixels": (4 * CHANNELS, HIDDEN, 3, 3),
}


def make_weights(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in SHAPES.items():
        weights[f"{name}.weight"] = rng.normal(0, 1.5 / np.sqrt(np.prod(shape[1:])), shape).astype(np.float32)
        weights[f"{name}.bias"] = rng.normal(0, 0.3, shape[0]).astype(np.float32)
    return weights


def encode(weights: dict[str, np.ndarray], x: np.ndarray) -> dict[str, np.ndarray]:
    """The encoder in numpy, float64: images (N, 3, H, W) -> mean and logvar (N, 2, H/2, W/2)."""
    moments = conv(weights, "moments", np.maximum(conv(weights, "down", x, stride=2), 0))
    return {"mean": moments[:, :LATENT], "logvar": np.clip(moments[:, LATENT:], -30, 20)}


def decode(weights: dict[str, np.ndarray], z: np.ndarray) -> np.ndarray:
    """The decoder in numpy, float64."""
    pixels = conv(weights, "pixels", np.maximum(conv(weights, "up", z), 0))
    count, _, height, width = pixels.shape
    parts = pixels.reshape(count, CHANNELS, 2, 2, height, width).transpose(0, 1, 4, 2, 5, 3)
    return 1 / (1 + np.exp(-parts.reshape(count, CHANNELS, 2 * height, 2 * width)))


def conv(weights: dict[str, np.ndarray], name: str, x: np.ndarray, stride: int = 1) -> np.ndarray:
    padded = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))[:, :, ::stride, ::stride]
    return np.einsum("nchwij,ocij->nohw", windows, weights[f"{name}.weight"]) + weights[f"{name}.bias"][:, None, None]


def encoder_graph(weights: dict[str, np.ndarray]) -> bytes:
    nodes = [
        _conv("down", "x", strides=[2, 2]),
        helper.make_node("Relu", ["down"], ["active"]),
        _conv("moments", "active"),
        helper.make_node("Split", ["moments"], ["mean", "wide"], axis=1, num_outputs=2),
        helper.make_node("Clip", ["wide", "low", "high"], ["logvar"]),
    ]
    arrays = {**weights, "low": np.float32(-30), "high": np.float32(20)}
    latent = [LATENT, "latent_height", "latent_width"]
    return _model(nodes, {"x": [CHANNELS, "height", "width"]}, {"mean": latent, "logvar": latent}, arrays)


def decoder_graph(weights: dict[str, np.ndarray]) -> bytes:
    nodes = [
        _conv("up", "z"),
        helper.make_node("Relu", ["up"], ["active"]),
        _conv("pixels", "active"),
        helper.make_node("DepthToSpace", ["pixels"], ["logits"], blocksize=2, mode="CRD"),
        helper.make_node("Sigmoid", ["logits"], ["reconstruction"]),
    ]
    sides = [CHANNELS, "height", "width"]
    return _model(nodes, {"z": [LATENT, "latent_height", "latent_width"]}, {"reconstruction": sides}, weights)


def make_bundle(folder: Path) -> None:
    weights = make_weights()
    x = np.random.default_rng(100).random((4, CHANNELS, *SIZE), dtype=np.float32)
    encoded = encode(weights, x)
    golden = {"x": x, **encoded, "reconstruction": decode(weights, encoded["mean"].astype(np.float32))}
    manifest = Manifest(
        kind="vae",
        name="tiny-free",
        input=InputSpec("image", (CHANNELS, None, None), "rgb", "exact", 2, SIZE),
        latent=LatentSpec((LATENT, None, None), {"type": "standard_normal"}),
        likelihood=Likelihood("gaussian", scale=0.1),
        precisions={"fp32": Precision("encoder.onnx", "decoder.onnx", {"against": "numpy"})},
        files={},
        golden=Golden("golden.npz", "synthetic", {"fp32": 1e-4}),
        training={"dataset": "none"},
        producer={"onnx": "tests/data/generate_free.py"},
    )
    graphs = {"encoder.onnx": encoder_graph(weights), "decoder.onnx": decoder_graph(weights)}
    arrays = {name: value.astype(np.float32) for name, value in golden.items()}
    write_bundle(folder / "tiny-free.vae", manifest, graphs, arrays, force=True)


def _conv(name: str, source: str, strides: list[int] | None = None) -> onnx.NodeProto:
    inputs = [source, f"{name}.weight", f"{name}.bias"]
    return helper.make_node("Conv", inputs, [name], pads=[1] * 4, strides=strides or [1, 1])


def _model(nodes: list, inputs: dict, outputs: dict, arrays: dict[str, np.ndarray]) -> bytes:
    used = {name for node in nodes for name in node.input}
    values = [
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *shape]) for name, shape in side.items()]
        for side in (inputs, outputs)
    ]
    constants = [numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items() if name in used]
    graph = helper.make_graph(nodes, "free", *values, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString(deterministic=True)


if __name__ == "__main__":
    make_bundle(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
