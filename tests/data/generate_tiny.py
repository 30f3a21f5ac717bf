"""Make the tiny bundles that the runtime's tests use: seeded weights, golden values by numpy, no torch.

    python tests/data/generate_tiny.py [FOLDER]

tiny.vae          a VAE of 8x8 grey images, Bernoulli, 4 latent dimensions
tiny-rgb.vae      a VAE of 3x6x5 colour images, Gaussian, latent of shape (2, 3, 2)
tiny-vectors.vae  a plain autoencoder of 5-vectors with a code of 2
"""

from __future__ import annotations

import sys
from math import prod
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from vae_export.bundle import write_bundle
from vae_runtime.manifest import Golden, InputSpec, LatentSpec, Likelihood, Manifest, Precision

HIDDEN = 12
SPECS = {
    "tiny": ("vae", InputSpec("image", (1, 8, 8), "grey", "exact"), (4,), Likelihood("bernoulli", binarize="none")),
    "tiny-rgb": ("vae", InputSpec("image", (3, 6, 5), "rgb", "crop"), (2, 3, 2), Likelihood("gaussian", scale=0.1)),
    "tiny-vectors": ("autoencoder", InputSpec("vector", (5,)), (2,), Likelihood("gaussian", scale=0.5)),
}


def make_weights(kind: str, inputs: int, latents: int, seed: int) -> dict[str, np.ndarray]:
    """Weights (n, m) and biases (m,) of one hidden layer per half."""
    rng = np.random.default_rng(seed)
    sizes = {"hidden": (inputs, HIDDEN), "mean": (HIDDEN, latents), "back": (latents, HIDDEN), "out": (HIDDEN, inputs)}
    if kind == "vae":
        sizes["logvar"] = (HIDDEN, latents)
    weights = {}
    for name, (n, m) in sizes.items():
        weights[f"{name}.weight"] = rng.normal(0, 1 / np.sqrt(n), (n, m)).astype(np.float32)
        weights[f"{name}.bias"] = rng.normal(0, 0.3, m).astype(np.float32)
    return weights


def encode(weights: dict[str, np.ndarray], x: np.ndarray, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """The encoder in numpy, float64."""
    hidden = np.maximum(_affine(weights, "hidden", x), 0)
    outputs = {"mean": _affine(weights, "mean", hidden)}
    if "logvar.weight" in weights:
        outputs["logvar"] = np.clip(_affine(weights, "logvar", hidden), -30, 20)
    return {name: value.reshape(len(x), *shape) for name, value in outputs.items()}


def decode(weights: dict[str, np.ndarray], z: np.ndarray, spec: InputSpec) -> np.ndarray:
    """The decoder in numpy, float64."""
    out = _affine(weights, "out", np.maximum(_affine(weights, "back", z), 0))
    return (1 / (1 + np.exp(-out)) if spec.is_image else out).reshape(len(z), *spec.shape)


def encoder_graph(weights: dict[str, np.ndarray], spec: InputSpec, latent: tuple[int, ...]) -> bytes:
    nodes = [_node("Flatten", "x", "flat"), _gemm("hidden", "flat"), _node("Relu", "hidden.flat", "active")]
    nodes += [_gemm("mean", "active"), _node("Reshape", ["mean.flat", "latent_shape"], "mean")]
    constants = {"latent_shape": np.array([-1, *latent])}
    outputs = {"mean": latent}
    if "logvar.weight" in weights:
        nodes += [_gemm("logvar", "active"), _node("Clip", ["logvar.flat", "low", "high"], "clipped")]
        nodes += [_node("Reshape", ["clipped", "latent_shape"], "logvar")]
        constants |= {"low": np.float32(-30), "high": np.float32(20)}
        outputs["logvar"] = latent
    return _model(nodes, {"x": spec.shape}, outputs, {**weights, **constants})


def decoder_graph(weights: dict[str, np.ndarray], spec: InputSpec, latent: tuple[int, ...]) -> bytes:
    nodes = [_node("Flatten", "z", "flat"), _gemm("back", "flat"), _node("Relu", "back.flat", "active")]
    nodes += [_gemm("out", "active")]
    if spec.is_image:
        nodes += [_node("Sigmoid", "out.flat", "unit")]
    nodes += [_node("Reshape", [nodes[-1].output[0], "input_shape"], "reconstruction")]
    return _model(
        nodes, {"z": latent}, {"reconstruction": spec.shape}, {**weights, "input_shape": np.array([-1, *spec.shape])}
    )


def make_bundle(folder: Path, name: str, seed: int) -> None:
    kind, spec, latent, likelihood = SPECS[name]
    weights = make_weights(kind, prod(spec.shape), prod(latent), seed)
    rng = np.random.default_rng(seed + 100)
    x = (
        rng.random((4, *spec.shape), dtype=np.float32)
        if spec.is_image
        else rng.normal(3, 2, (4, *spec.shape)).astype(np.float32)
    )
    outputs = encode(weights, x, latent)
    golden = {"x": x, **outputs, "reconstruction": decode(weights, outputs["mean"].astype(np.float32), spec)}
    manifest = Manifest(
        kind=kind,
        name=name,
        input=spec,
        latent=LatentSpec(latent, {"type": "standard_normal"} if kind == "vae" else None),
        likelihood=likelihood,
        precisions={"fp32": Precision("encoder.onnx", "decoder.onnx", {"against": "numpy"})},
        files={},
        golden=Golden("golden.npz", "synthetic", {"fp32": 1e-4}),
        training={"dataset": "none"},
        producer={"onnx": "tests/data/generate_tiny.py"},
    )
    graphs = {
        "encoder.onnx": encoder_graph(weights, spec, latent),
        "decoder.onnx": decoder_graph(weights, spec, latent),
    }
    write_bundle(
        folder / f"{name}.vae", manifest, graphs, {k: v.astype(np.float32) for k, v in golden.items()}, force=True
    )


def _affine(weights: dict[str, np.ndarray], name: str, x: np.ndarray) -> np.ndarray:
    return x.reshape(len(x), -1).astype(np.float64) @ weights[f"{name}.weight"] + weights[f"{name}.bias"]


def _node(operator: str, inputs: str | list[str], output: str) -> onnx.NodeProto:
    return helper.make_node(operator, [inputs] if isinstance(inputs, str) else inputs, [output], name=output)


def _gemm(name: str, source: str) -> onnx.NodeProto:
    return _node("Gemm", [source, f"{name}.weight", f"{name}.bias"], f"{name}.flat")


def _model(nodes: list, inputs: dict, outputs: dict, arrays: dict[str, np.ndarray]) -> bytes:
    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *shape]) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *shape]) for name, shape in outputs.items()],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items() if name in used],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString(deterministic=True)


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    for number, bundle_name in enumerate(SPECS):
        make_bundle(target, bundle_name, seed=number)
