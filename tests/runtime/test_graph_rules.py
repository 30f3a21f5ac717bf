from __future__ import annotations

import random
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vae_runtime import VAE, BundleError
from vae_runtime.graph_rules import RANDOM_OPERATORS, check_graph, has_float16

# Field numbers of onnx.proto and wire types of protocol buffers, for messages that no library would write.
GRAPH, VARINT, FIXED64, BYTES, FIXED32 = 7, 0, 1, 2, 5


def varint(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])


def field(number: int, content: bytes, wire: int = BYTES) -> bytes:
    return varint(number << 3 | wire) + (varint(len(content)) if wire == BYTES else b"") + content


@pytest.fixture(scope="module")
def encoder(tiny_path: Path) -> bytes:
    return (tiny_path / "encoder.onnx").read_bytes()


@pytest.fixture
def model(encoder: bytes) -> Any:
    """The tiny encoder as an onnx.ModelProto to make worse."""
    return pytest.importorskip("onnx").load_from_string(encoder)


@pytest.mark.parametrize("name", ["tiny.vae", "tiny-rgb.vae", "tiny-vectors.vae"])
def test_plain_graphs_pass(tiny_path: Path, name: str) -> None:
    for half in ("encoder.onnx", "decoder.onnx"):
        check_graph((tiny_path.parent / name / half).read_bytes(), half)


def test_float16_is_seen_in_weights_and_in_casts(model: Any) -> None:
    import onnx

    assert not has_float16(model.SerializeToString())
    cast = model.graph.node.add(op_type="Cast", input=["x"], output=["narrow"])
    cast.attribute.add(name="to", type=onnx.AttributeProto.INT, i=onnx.TensorProto.DOUBLE)
    assert not has_float16(model.SerializeToString())
    cast.attribute[0].i = onnx.TensorProto.FLOAT16
    assert has_float16(model.SerializeToString())
    del model.graph.node[-1]
    model.graph.initializer[-1].CopyFrom(onnx.numpy_helper.from_array(np.ones(1, np.float16), "narrow"))
    assert has_float16(model.SerializeToString())


# --- forbidden things -------------------------------------------------------------------------------------------------


def foreign_domain(model: Any) -> None:
    model.graph.node[2].domain = "evil.ops"


def foreign_opset(model: Any) -> None:
    model.opset_import.add(domain="ai.onnx.ml", version=3)


def branch(model: Any) -> None:
    import onnx.helper as h

    body = h.make_graph([h.make_node("Identity", ["x"], ["y"])], "b", [], [h.make_tensor_value_info("y", 1, None)])
    model.graph.node.append(h.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body))


def loop(model: Any) -> None:
    import onnx.helper as h

    body = h.make_graph([h.make_node("Identity", ["x"], ["y"])], "b", [], [])
    model.graph.node.append(h.make_node("Loop", ["n", "c"], ["y"], body=body))


def several_subgraphs(model: Any) -> None:
    import onnx

    attribute = model.graph.node[0].attribute.add(name="bodies", type=onnx.AttributeProto.GRAPHS)
    attribute.graphs.add(name="b")


def function(model: Any) -> None:
    model.functions.add(name="f", domain="")


def training(model: Any) -> None:
    model.training_info.add()


def external_initializer(model: Any) -> None:
    model.graph.initializer[0].data_location = 1
    model.graph.initializer[0].external_data.add(key="location", value="/etc/passwd")


def external_without_location(model: Any) -> None:
    model.graph.initializer[0].external_data.add(key="location", value="weights.bin")


def external_flag_alone(model: Any) -> None:
    model.graph.initializer[0].data_location = 1


def external_attribute(model: Any) -> None:
    attribute = model.graph.node.add(op_type="Constant", output=["c"]).attribute.add(name="value", type=4)
    attribute.t.data_location = 1


def external_attribute_in_a_list(model: Any) -> None:
    attribute = model.graph.node.add(op_type="Constant", output=["c"]).attribute.add(name="values", type=9)
    attribute.tensors.add().external_data.add(key="location", value="weights.bin")


def sparse_initializer(model: Any) -> None:
    model.graph.sparse_initializer.add()


def sparse_attribute(model: Any) -> None:
    model.graph.node.add(op_type="Constant", output=["c"]).attribute.add(
        name="sparse_value", type=11
    ).sparse_tensor.dims.append(4)


def sparse_attribute_in_a_list(model: Any) -> None:
    model.graph.node[0].attribute.add(name="sparse", type=12).sparse_tensors.add()


def session_settings(model: Any) -> None:
    model.metadata_props.add(key="ort_config", value='{"session_options": {"log_severity_level": 0}}')


def compiled_program(model: Any) -> None:
    node = model.graph.node.add(op_type="EPContext", domain="com.microsoft", input=["x"], output=["y"])
    node.attribute.add(name="ep_cache_context", type=3, s=b"../../outside.bin")


def dropout_in_training(model: Any) -> None:
    model.graph.node.add(op_type="Dropout", input=["x", "ratio", "training"], output=["y"])


FORBIDDEN: list[tuple[Callable[[Any], None], str]] = [
    (foreign_domain, "uses the operator domain 'evil.ops'; allowed are '', 'ai.onnx', 'com.microsoft'"),
    (foreign_opset, "uses the operator domain 'ai.onnx.ml'; allowed are"),
    (branch, "has the operator 'If' with a subgraph; a bundle's graphs have no control flow"),
    (loop, "has the operator 'Loop' with a subgraph"),
    (several_subgraphs, "has the operator 'Flatten' with a subgraph"),
    (function, "holds functions; a bundle's graphs are plain"),
    (training, "holds training steps; a bundle's graphs are plain"),
    (external_initializer, "keeps weights in another file; a bundle's graphs hold their own"),
    (external_without_location, "keeps weights in another file"),
    (external_flag_alone, "keeps weights in another file"),
    (external_attribute, "keeps weights in another file"),
    (external_attribute_in_a_list, "keeps weights in another file"),
    (sparse_initializer, "holds a sparse initializer; a bundle's weights are dense"),
    (sparse_attribute, "holds a sparse tensor; a bundle's weights are dense"),
    (sparse_attribute_in_a_list, "holds a sparse tensor"),
    (session_settings, r"carries session settings \('ort_config'\); a bundle's graphs carry none"),
    (compiled_program, "has the operator 'EPContext', a compiled program; a bundle's graphs are plain"),
    (dropout_in_training, "has the operator 'Dropout'; a bundle's graphs are deterministic"),
]


@pytest.mark.parametrize(("change", "message"), FORBIDDEN, ids=[change.__name__ for change, _ in FORBIDDEN])
def test_forbidden_part_is_refused_by_name_before_onnxruntime_is_asked(
    model: Any, bundle: Path, resign: Any, monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], None], message: str
) -> None:
    monkeypatch.setattr("vae_runtime.session._open", lambda *_: pytest.fail("onnxruntime was given the graph"))
    change(model)
    resign(bundle, encoder=model.SerializeToString())
    with pytest.raises(BundleError, match=rf"^{re.escape(str(bundle))}: encoder\.onnx {message}"):
        VAE.load(bundle)


@pytest.mark.parametrize("operator", RANDOM_OPERATORS)
def test_random_operators_are_refused(model: Any, operator: str) -> None:
    model.graph.node.add(op_type=operator, output=["noise"])
    with pytest.raises(BundleError, match=f"has the operator '{operator}'; a bundle's graphs are deterministic"):
        check_graph(model.SerializeToString(), "e.onnx")


def test_dropout_outside_training_is_fine(model: Any) -> None:
    model.graph.node.add(op_type="Dropout", input=["x", "ratio", ""], output=["y"])
    check_graph(model.SerializeToString(), "e.onnx")


def test_harmless_metadata_is_fine(model: Any) -> None:
    model.metadata_props.add(key="author", value="ort_config")
    check_graph(model.SerializeToString(), "e.onnx")


# --- messages that two readers could understand differently -----------------------------------------------------------


def test_field_number_whose_high_bits_other_readers_drop_hides_nothing(model: Any) -> None:
    """C++ protocol buffers read the key 2**32 + (7 << 3 | 2) as field 7; the graph would pass unseen."""
    graph = model.graph.SerializeToString()
    model.ClearField("graph")
    hidden = varint((1 << 32) + (GRAPH << 3 | BYTES)) + varint(len(graph)) + graph
    with pytest.raises(BundleError, match="is not a valid ONNX file: field number 536870919"):
        check_graph(model.SerializeToString() + hidden, "e.onnx")


def test_second_graph_is_merged_and_therefore_checked(encoder: bytes) -> None:
    more = field(GRAPH, field(1, field(4, b"RandomNormal")))
    with pytest.raises(BundleError, match="has the operator 'RandomNormal'"):
        check_graph(encoder + more, "e.onnx")


@pytest.mark.parametrize("harmless", [field(4, b"Relu", FIXED32), field(4, b"Identity", FIXED64), b"\x20\x01"])
def test_operator_name_cannot_be_covered_up_by_a_field_of_another_wire_type(harmless: bytes) -> None:
    for node in (field(4, b"RandomNormal") + harmless, harmless + field(4, b"RandomNormal")):
        with pytest.raises(BundleError, match=r"a number stands where a message is expected"):
            check_graph(field(GRAPH, field(1, node)), "e.onnx")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x3a", "it ends in the middle of a number"),
        (b"\x3a\xff\xff\xff\xff\x07", "a field of 2147483647 bytes at byte 6 runs past the end"),
        (b"\xff" * 11, "a number of over 10 bytes"),
        (b"\x00\x00", "field number 0"),
        (b"\x0b", "wire type 3"),
        (b"\x38\x01", "a number stands where a message is expected"),
        (b"\x89PNG\r\n\x1a\n", "is not a valid ONNX file"),
    ],
)
def test_bytes_that_are_no_model_are_refused_in_words(data: bytes, message: str) -> None:
    with pytest.raises(
        BundleError, match=r"e\.onnx is not a valid ONNX file: .*" if message.startswith("is") else message
    ):
        check_graph(data, "e.onnx")


# --- mutants ----------------------------------------------------------------------------------------------------------


def mutate(content: bytes, rng: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at, kind = rng.randrange(len(data)), rng.random()
        if kind < 0.5:
            data[at] ^= 1 << rng.randrange(8)
        elif kind < 0.6:
            data[at] = rng.choice((0, 0x7F, 0x80, 0xFF))
        elif kind < 0.7:
            del data[at : at + rng.randrange(1, 30)]
        elif kind < 0.8:
            data[at:at] = rng.randbytes(rng.randrange(1, 20))
        elif kind < 0.9:
            data[at:at] = data[at : at + rng.randrange(1, 200)]
        else:
            del data[max(1, at) :]
    return bytes(data)


def structural(content: bytes) -> bytes:
    """The graph with its weights cut short, so that mutations hit its structure and not the numbers."""
    onnx = pytest.importorskip("onnx")
    model = onnx.load_from_string(content)
    for tensor in model.graph.initializer:
        tensor.raw_data = tensor.raw_data[:8]
    return bytes(model.SerializeToString())


def test_thousands_of_mutants_are_accepted_or_a_bundle_error_and_never_slow(encoder: bytes) -> None:
    rng, slowest = random.Random(11), 0.0
    outcomes = {"accepted": 0, "refused": 0}
    for content in (encoder, structural(encoder)):
        for _ in range(1500):
            mutant = mutate(content, rng)
            start = time.process_time()
            try:
                check_graph(mutant, "e.onnx")
                outcomes["accepted"] += 1
            except BundleError:
                outcomes["refused"] += 1
            slowest = max(slowest, time.process_time() - start)
    assert min(outcomes.values()) > 200, outcomes
    assert slowest < 1


MUTANTS_CODE = """
import sys, hashlib, json
from pathlib import Path
import numpy as np
from vae_runtime import VAE, VAEError
x = np.full((2, 1, 8, 8), 0.5, np.float32)
outcomes = {"works": 0, "refused": 0}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    try:
        with VAE.load(folder, threads=1) as vae:
            vae.encode(x)
        outcomes["works"] += 1
    except VAEError as error:
        assert "\\n" not in str(error), str(error)
        outcomes["refused"] += 1
print(json.dumps(outcomes))
"""


def test_signed_mutants_load_or_fail_with_a_typed_error_and_end_no_process(
    python: Any, tiny_path: Path, tmp_path: Path, encoder: bytes, resign: Any
) -> None:
    rng, small = random.Random(23), structural(encoder)
    for number in range(60):
        mutant = small
        while mutant in (small, encoder):
            mutant = mutate(small if number % 2 else encoder, rng)
        resign(Path(shutil.copytree(tiny_path, tmp_path / "mutants" / f"{number:03}")), encoder=mutant)
    result = python(MUTANTS_CODE, tmp_path / "mutants")
    assert result.returncode == 0, result
    works, refused = map(int, re.findall(r"\d+", result.stdout))
    assert works + refused == 60
    assert works > 3
    assert refused > 20
    assert result.stderr == ""


# --- graphs that ask for too much or lie ------------------------------------------------------------------------------


def graph_model(nodes: list[Any], constants: dict[str, np.ndarray], outputs: tuple[str, ...]) -> bytes:
    """An encoder for the tiny bundle whose declared boundary is right, whatever its nodes do."""
    onnx = pytest.importorskip("onnx")
    h = onnx.helper
    boundary = [h.make_tensor_value_info("x", 1, ["batch", 1, 8, 8])]
    results = [h.make_tensor_value_info(name, 1, ["batch", 4]) for name in outputs]
    weights = [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = h.make_graph(nodes, "g", boundary, results, weights)
    return bytes(h.make_model(graph, opset_imports=[h.make_opsetid("", 20)], ir_version=10).SerializeToString())


def bomb_of_a_huge_constant() -> bytes:
    h = pytest.importorskip("onnx").helper
    nodes = [
        h.make_node("ConstantOfShape", ["huge"], ["zeros"]),
        h.make_node("ReduceSum", ["zeros"], ["sum"], keepdims=0),
        h.make_node("ReduceMean", ["x", "axes"], ["flat"], keepdims=0),
        h.make_node("Add", ["flat", "sum"], ["one"]),
        h.make_node("Tile", ["one", "four"], ["mean"]),
        h.make_node("Identity", ["mean"], ["logvar"]),
    ]
    constants = {"huge": np.array([2**36]), "axes": np.array([2, 3]), "four": np.array([1, 4])}
    return graph_model(nodes, constants, ("mean", "logvar"))


def bomb_of_declared_dimensions() -> bytes:
    onnx = pytest.importorskip("onnx")
    model = onnx.load_from_string(bomb_of_a_huge_constant())
    model.graph.initializer[0].dims[:] = [2**40, 2**20]
    return bytes(model.SerializeToString())


BOMB_CODE = """
import resource, sys
import numpy as np
import onnxruntime
from vae_runtime import VAE, VAEError
resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))
resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
try:
    with VAE.load(sys.argv[1], threads=1) as vae:
        vae.encode(np.zeros((1, 1, 8, 8), np.float32))
    print("works")
except VAEError as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize("bomb", [bomb_of_a_huge_constant, bomb_of_declared_dimensions])
def test_allocation_bomb_under_a_memory_limit_is_a_typed_error(
    python: Any, bundle: Path, resign: Any, bomb: Callable[[], bytes]
) -> None:
    resign(bundle, encoder=bomb())
    result = python(BOMB_CODE, bundle)
    assert result.returncode == 0, result
    outcomes = (
        f"BundleError {bundle}: encoder.onnx",
        "OutOfMemoryError cpu has not enough memory for encoder.onnx at batch size 1,",
    )
    assert result.stdout.startswith(outcomes), result


def lying_graph() -> bytes:
    """Declares mean as (batch, 4) and gives (16 · batch, 4) or, for white images, (batch, 64)."""
    h = pytest.importorskip("onnx").helper
    nodes = [
        h.make_node("ReduceMax", ["x"], ["top"], keepdims=0),
        h.make_node("Mul", ["top", "sixty"], ["wide"]),
        h.make_node("Add", ["wide", "four"], ["width"]),
        h.make_node("Cast", ["width"], ["whole"], to=7),
        h.make_node("Unsqueeze", ["whole", "axis"], ["columns"]),
        h.make_node("Concat", ["rest", "columns"], ["shape"], axis=0),
        h.make_node("Reshape", ["x", "shape"], ["mean"]),
        h.make_node("Identity", ["mean"], ["logvar"]),
    ]
    constants = {"sixty": np.float32(60), "four": np.float32(4), "axis": np.array([0]), "rest": np.array([-1])}
    return graph_model(nodes, {name: np.asarray(value) for name, value in constants.items()}, ("mean", "logvar"))


@pytest.mark.parametrize(("value", "shape"), [(0, r"\(32, 4\)"), (1, r"\(2, 64\)")])
def test_graph_that_gives_other_shapes_than_it_declares_is_refused_when_it_runs(
    bundle: Path, resign: Any, value: int, shape: str, capfd: Any
) -> None:
    with VAE.load(resign(bundle, encoder=lying_graph()), threads=1) as vae:
        rule = rf"encoder.onnx returned mean of shape {shape} for 2 rows; the manifest promises \(2, 4\)"
        with pytest.raises(BundleError, match=rule):
            vae.encode(np.full((2, 1, 8, 8), value, np.float32))
        with pytest.raises(BundleError, match=rule):
            vae.encode_to_device(np.full((2, 1, 8, 8), value, np.float32))
    assert capfd.readouterr() == ("", "")


BOUNDARIES = [
    (lambda m: setattr(m.graph.input[0], "name", "X"), r"cannot be loaded by onnxruntime|has the inputs"),
    (lambda m: m.graph.output.pop(), r"encoder.onnx has the outputs .*; the manifest promises float32 .*logvar"),
    (lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", 11), r"cannot be loaded|has the inputs"),
    (lambda m: setattr(m.graph.input[0].type.tensor_type.shape.dim[0], "dim_value", 1), r"has a fixed batch size"),
    (lambda m: m.graph.input[0].type.tensor_type.shape.dim.pop(), r"has the inputs|cannot be loaded"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BOUNDARIES, ids=range(len(BOUNDARIES)))
def test_graph_with_another_boundary_than_the_manifest_promises_is_refused(
    model: Any, bundle: Path, resign: Any, change: Callable[[Any], Any], message: str, capfd: Any
) -> None:
    change(model)
    resign(bundle, encoder=model.SerializeToString())
    with pytest.raises(BundleError, match=message):
        VAE.load(bundle)
    assert capfd.readouterr() == ("", "")


def test_graphs_in_each_others_place_are_refused(bundle: Path, resign: Any) -> None:
    halves = {half: (bundle / f"{half}.onnx").read_bytes() for half in ("encoder", "decoder")}
    resign(bundle, encoder=halves["decoder"], decoder=halves["encoder"])
    with pytest.raises(BundleError, match=r"encoder.onnx has the inputs {'z'.*the manifest promises float32 {'x'"):
        VAE.load(bundle)
