"""Verification compares what was exported with PyTorch, and refuses what falls short."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from vae_export.export import halves_of
from vae_export.reference import Reference, one_thread
from vae_export.verify import BATCH_SIZES, Fidelity, run_both, verify
from vae_runtime.errors import ExportError
from vae_runtime.preprocess import to_model_input


@pytest.fixture
def conv(checkpoints, exported: dict[str, Path]):
    checkpoint = checkpoints["conv"]
    model = checkpoint.build_model()
    reference = halves_of(model, "vae")
    graphs = tuple((exported["conv"] / f"{half}.onnx").read_bytes() for half in ("encoder", "decoder"))
    return (
        graphs,
        reference,
        to_model_input(checkpoint.examples["held_out"].numpy(), checkpoint.input),
        checkpoint.input,
    )


def shifted(graph: bytes, amount: float) -> bytes:
    """The same graph with `amount` added to its last bias."""
    model = onnx.load_from_string(graph)
    biases = [tensor for tensor in model.graph.initializer if tensor.name.endswith("bias") and len(tensor.dims) == 1]
    biases[-1].CopyFrom(
        numpy_helper.from_array(numpy_helper.to_array(biases[-1]) + np.float32(amount), biases[-1].name)
    )
    return model.SerializeToString()


def test_faithful_graphs_pass_and_report_their_errors(conv) -> None:
    graphs, reference, x, spec = conv
    fidelity = verify(graphs, reference, x, spec, 1e-5)
    assert fidelity.examples == 40
    assert 0 < fidelity.mean_max_error < 1e-5
    assert 0 < fidelity.logvar_max_error < 1e-5
    assert 0 < fidelity.reconstruction_max_error < 1e-5


@pytest.mark.parametrize(
    ("half", "message"),
    [(0, r"(mean|logvar) differs from PyTorch by .* of max\|reference\|; the tolerance is 0.0001"),
     (1, "reconstruction differs from PyTorch by .* of the data's range; the tolerance is 1e-05")],
)  # fmt: skip
def test_a_graph_that_differs_is_refused(conv, half: int, message: str) -> None:
    graphs, reference, x, spec = conv
    altered = tuple(shifted(graph, 0.01) if index == half else graph for index, graph in enumerate(graphs))
    with pytest.raises(ExportError, match=message):
        verify(altered, reference, x, spec, 1e-5)


def test_an_engine_that_is_incomplete_is_told_in_words(conv, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rest = ModuleType("onnxruntime")  # what is left where one build was uninstalled beside another
    rest.__path__ = [str(tmp_path)]
    monkeypatch.setitem(sys.modules, "onnxruntime", rest)
    with pytest.raises(ExportError, match="the installed onnxruntime is incomplete"):
        verify(*conv, 1e-5)


def test_every_batch_size_is_run(conv, monkeypatch: pytest.MonkeyPatch) -> None:
    from vae_runtime.session import GraphSession

    sizes = []
    run = GraphSession.run
    monkeypatch.setattr(GraphSession, "run", lambda self, array: sizes.append(len(array)) or run(self, array))
    graphs, reference, x, spec = conv
    verify(graphs, reference, x, spec, 1e-5)
    assert set(BATCH_SIZES) <= set(sizes)
    assert BATCH_SIZES == (1, 2, 7, 32)


@pytest.mark.parametrize(("half", "name"), [("encoder", "mean"), ("decoder", "reconstruction")])
def test_nan_at_one_batch_size_alone_is_refused(conv, monkeypatch: pytest.MonkeyPatch, half: str, name: str) -> None:
    from vae_runtime.session import GraphSession

    run = GraphSession.run

    def broken(session: GraphSession, array: np.ndarray) -> list[np.ndarray]:
        outputs = run(session, array)
        bad = len(array) == 7 and (array.ndim == 4) == (half == "encoder")
        return [output * np.float32(np.nan) for output in outputs] if bad else outputs

    monkeypatch.setattr(GraphSession, "run", broken)
    with pytest.raises(ExportError, match=f"{name} differs from PyTorch by nan"):
        verify(*conv, 1e-5)


def test_few_examples_are_repeated_to_fill_the_largest_batch(conv, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs, reference, x, spec = conv
    rows, encode = [], reference.encode
    monkeypatch.setattr(reference, "encode", lambda x: rows.append(len(x)) or encode(x))
    assert verify(graphs, reference, x[:3], spec, 1e-5).examples == 3  # the copies are not counted
    assert rows == [max(BATCH_SIZES)]


def test_few_examples_do_not_hide_that_rows_are_mixed(conv) -> None:
    graphs, reference, x, spec = conv
    model = onnx.load_from_string(graphs[0])
    for node in model.graph.node:
        node.input[:] = ["mixed" if name == "x" else name for name in node.input]
    model.graph.initializer.append(numpy_helper.from_array(np.array([0]), "batch"))
    # Every row becomes the largest of its batch, which copies of one row already are.
    model.graph.node.insert(0, onnx.helper.make_node("Max", ["x", "largest"], ["mixed"]))
    model.graph.node.insert(0, onnx.helper.make_node("ReduceMax", ["x", "batch"], ["largest"]))
    with pytest.raises(ExportError, match="mean differs from PyTorch by "):
        verify((model.SerializeToString(), graphs[1]), reference, x[:1], spec, 1e-5)


def test_a_model_that_gives_nan_is_refused(conv) -> None:
    graphs, reference, x, spec = conv
    with torch.no_grad():
        next(reference._decoder.parameters()).fill_(float("nan"))
    with pytest.raises(ExportError, match="has NaN or infinite values in PyTorch itself"):
        verify(graphs, reference, x, spec, 1e-5)


@pytest.mark.parametrize(
    ("error", "told"),
    [(ValueError("\n"), "ValueError"), (RuntimeError("\ntoo wide\nfor it"), "RuntimeError: too wide")],
)
def test_what_a_models_own_code_raises_is_told_in_one_line(error: Exception, told: str) -> None:
    class Failing(Reference):
        def __init__(self) -> None:
            pass

        def encode(self, x: np.ndarray) -> dict[str, np.ndarray]:
            raise error

    with pytest.raises(ExportError, match=f"^the model does not run on inputs of shape \\(2, 3\\): {told}$"):
        run_both(Failing(), np.zeros((2, 3), np.float32))


def test_fidelity_is_rounded_to_two_digits() -> None:
    data = Fidelity("pytorch", (1, 3), (), 1e-5, 40, 1.2345e-6, None, 2.389e-7).to_dict()
    assert data["mean_max_error"] == 1.2e-6
    assert data["reconstruction_max_error"] == 2.4e-7
    assert "logvar_max_error" not in data


def test_the_thread_count_is_put_back() -> None:
    before = torch.get_num_threads()
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
