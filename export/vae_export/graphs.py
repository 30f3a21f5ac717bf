"""The two halves under the contract of a bundle, and their way into plain ONNX.

The contract: deterministic; physical units at the boundary; the field's tensor names; batch dynamic; opset 20, IR 10,
standard operators only, weights inside the file, nothing of the machine that made it.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from vae_runtime.errors import BundleError, ExportError
from vae_runtime.graph_rules import check_graph
from vae_runtime.manifest import BATCH, IMAGE_SIDES, INPUT, LATENT, LATENT_SIDES, LOGVAR, MEAN, RECONSTRUCTION
from vae_training.models import LOGVAR_MAX, LOGVAR_MIN

from .protos import to_bytes
from .reason import innermost_reason, tracing_reason
from .rewrite import rewrite
from .simplify import simplified
from .traced import prepared

Call = Callable[[nn.Module, Tensor], Any]
OPSET, IR_VERSION = 20, 10  # read by onnxruntime 1.18 and newer
_LOGGERS = ("torch.onnx", "torch.fx.experimental.symbolic_shapes", "torch._guards", "torch._dynamo", "torch.export")
MAX_ELEMENTS = 2**31  # of a tensor; from there on torch's kernels that count in 32 bits fail
MAX_BYTES = 2**31 - 2**20  # of one protocol buffer message, with some room for its frame


def _plainly(network: nn.Module, x: Tensor) -> Any:
    return network(x)


class EncoderGraph(nn.Module):
    """x (N, *input_shape) -> mean, logvar (N, *latent_shape); of an autoencoder the code alone.

    encoder: x -> (mean, logvar), or -> code. Its latents z become (z - shift) · scale, so that logvar, clamped to
        [-30, 20] first, grows by 2 · log(scale).
    threshold: the model was trained on binary images, so x becomes x >= 0.5.
    clamp: False where the encoder clamps logvar itself.
    call: (encoder, x) -> (mean, logvar) or the code, where the encoder itself takes or gives something else.
    """

    def __init__(
        self,
        encoder: nn.Module,
        kind: str,
        scale: float = 1.0,
        shift: float = 0.0,
        threshold: bool = False,
        clamp: bool = True,
        call: Call = _plainly,
    ) -> None:
        super().__init__()
        self.encoder, self.kind, self.scale, self.shift = encoder, kind, scale, shift
        self.threshold, self.clamp, self.call = threshold, clamp, call

    def forward(self, x: Tensor) -> Any:
        if self.threshold:
            x = (x >= 0.5).to(x.dtype)
        output = self.call(self.encoder, x)
        if self.kind == "autoencoder":
            return self._to_unit(output)
        mean, logvar = output
        logvar = logvar.clamp(LOGVAR_MIN, LOGVAR_MAX) if self.clamp else logvar
        return self._to_unit(mean), logvar if self.scale == 1 else logvar + 2 * math.log(self.scale)

    def _to_unit(self, z: Tensor) -> Tensor:
        z = z if self.shift == 0 else z - self.shift
        return z if self.scale == 1 else z * self.scale


class DecoderGraph(nn.Module):
    """z (N, *latent_shape) -> reconstruction (N, *input_shape), the mean of p(x|z).

    clamp: cut the result to [0, 1]; for images, unless the decoder ends in that range itself.
    logits: the decoder gives logits, of which the sigmoid makes the mean.
    call: (decoder, z) -> the reconstruction, or its logits, where the decoder gives something else.
    """

    def __init__(
        self,
        decoder: nn.Module,
        clamp: bool,
        scale: float = 1.0,
        shift: float = 0.0,
        logits: bool = False,
        call: Call = _plainly,
    ) -> None:
        super().__init__()
        self.decoder, self.clamp, self.scale, self.shift = decoder, clamp and not logits, scale, shift
        self.logits, self.call = logits, call

    def forward(self, z: Tensor) -> Tensor:
        reconstruction = self.uncut(z)
        return reconstruction.clamp(0, 1) if self.clamp else reconstruction

    def uncut(self, z: Tensor) -> Tensor:
        z = z if self.scale == 1 else z / self.scale
        z = z if self.shift == 0 else z + self.shift
        reconstruction: Tensor = self.call(self.decoder, z)
        return reconstruction.sigmoid() if self.logits else reconstruction


def encoder_to_onnx(graph: EncoderGraph, example: Tensor, free: bool = False) -> bytes:
    """The ONNX file of an encoder.

    example: one valid input batch of 2 or more rows. free: height and width are dynamic.

    Raises:
        ExportError: torch cannot export it, or the result breaks the contract.
    """
    return _to_onnx(graph, example, INPUT, [MEAN, LOGVAR] if graph.kind == "vae" else [MEAN], "encoder", free)


def decoder_to_onnx(graph: DecoderGraph, example: Tensor, free: bool = False) -> bytes:
    """The ONNX file of a decoder; see `encoder_to_onnx`."""
    return _to_onnx(graph, example, LATENT, [RECONSTRUCTION], "decoder", free)


def _to_onnx(module: nn.Module, example: Tensor, input_name: str, outputs: list[str], half: str, free: bool) -> bytes:
    tensors = (*module.parameters(), *module.buffers())
    require_fitting_size(sum(tensor.numel() * tensor.element_size() for tensor in tensors), half)
    try:
        with quiet(), torch.no_grad(), without_validation():
            traced = prepared(_trace(module.eval(), example, free))
            program = torch.onnx.export(
                traced,
                (),
                dynamo=True,
                external_data=False,
                opset_version=OPSET,
                optimize=False,
                verbose=False,
            )
            if free:
                _require_every_size(traced, example, half)
            assert program is not None  # with dynamo=True
            model = simplified(program.model_proto)
            _name_ends(model.graph, [input_name, *outputs])
    except ExportError:
        raise
    except Exception as error:
        if scripted := [part for part in module.modules() if isinstance(part, torch.jit.ScriptModule)]:
            raise ExportError(
                f"the {half} has a part in TorchScript, {scripted[0].original_name}, which torch.onnx does not export;"
                " build it without torch.jit, or write both halves with torch.jit.save, and pass these files to"
                " vae-export as ENCODER,DECODER"
            ) from error
        raise ExportError(f"the {half} cannot be exported by torch.onnx: {tracing_reason(error)}") from error
    return finish(model, half)


def require_fitting_size(size: int, half: str) -> None:
    """Raise `ExportError` where the weights, or all of a model, have more bytes than one file may."""
    if size > MAX_BYTES:
        raise ExportError(f"the {half} has over 2 GB of weights; an ONNX file with its weights inside holds less")


def _name_ends(graph: onnx.GraphProto, wanted: Sequence[str]) -> None:
    """Give the input and the outputs their names, which torch may have given to values within: to that of `x.mean()`.

    Not left to torch.onnx.export, which names them while an output may still be the input itself, before `simplified`.
    """
    ends = [value.name for value in (*graph.input, *graph.output)]
    names = {name: f"inside.{name}" for name in wanted} | dict(zip(ends, wanted, strict=True))
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        value.name = names.get(value.name, value.name)


def _trace(module: nn.Module, example: Tensor, free: bool) -> torch.export.ExportedProgram:
    """What torch.onnx.export does first; here the program keeps the assumptions that it made about sizes."""
    dynamic = dict.fromkeys((0, 2, 3) if free else (0,), torch.export.Dim.DYNAMIC)

    def trace(strict: bool) -> torch.export.ExportedProgram:
        return torch.export.export(module, (example,), dynamic_shapes=(dynamic,), strict=strict)

    # As torch.onnx.export has it: a size is not taken to be other than 1.
    with torch.fx.experimental._config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        try:
            return trace(strict=False)
        except Exception:
            # Reading the code instead of running it, torch understands len(x), int(x.shape[0]) and assertions too, and
            # knows up to which size it takes what it took.
            with contextlib.suppress(Exception):
                read = trace(strict=True)
                if not any(sizes.upper.is_Integer for sizes in read.range_constraints.values()):  # all are int_oo
                    return read
            raise


def _require_every_size(traced: torch.export.ExportedProgram, example: Tensor, half: str) -> None:
    """Raise `ExportError` where the network's code decides by height or width: a graph keeps the example's decision.

    The traced program checks its assumptions, also without computing anything. For small sizes and for the batch it has
    many that change nothing, such as the layout in memory; there the values are verified instead. Sizes at which a
    tensor within is too large for most kernels are not asked for: there networks do decide, as diffusers' upsampling.
    """
    unfilled = traced.module().to("meta")
    rows, channels, height, width = example.shape
    for more in (2, 64):
        while reason := _failed_guard(unfilled, x := _unfilled(rows, channels, height * more, width * more)):
            too_large = _largest_within(traced, x) / MAX_ELEMENTS
            if too_large <= 1:
                raise ExportError(
                    f"the {half}'s code decides by the size of its input ({reason}), and was traced with"
                    f" {tuple(example.shape)}; a bundle's graph does the same at every size"
                )
            more = min(more - 1, int(more / too_large**0.5))


def _unfilled(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


def _failed_guard(program: nn.Module, x: Tensor) -> str | None:
    """The assumption of the program, on the meta device, that `x` does not meet; None where it meets all."""
    try:
        program(x)
    except AssertionError as error:
        reason = str(error)
        return reason.removeprefix("Guard failed: ") if "Guard failed" in reason else None
    except Exception:  # what needs values to run without any cannot be asked so
        return None
    return None


def _largest_within(traced: torch.export.ExportedProgram, x: Tensor) -> int:
    """How many elements the largest tensor has that the program makes of `x`, which is on the meta device."""
    largest = 0

    class Watched(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            nonlocal largest
            result = super().run_node(n)
            if isinstance(result, Tensor):
                largest = max(largest, result.numel())
            return result

    with contextlib.suppress(Exception):  # as above
        Watched(traced.module(check_guards=False).to("meta")).run(x)
    return largest


def finish(model: onnx.ModelProto, half: str) -> bytes:
    """The file of a graph that has the contract's tensors already: plain, rewritten where that is faster, checked.

    Raises:
        ExportError: it breaks the contract.
    """
    name_free_sides(plain(model))
    rewrite(model)
    data = to_bytes(model)
    _check_contract(model, data, half)
    return data


def with_threshold(encoder: bytes) -> bytes:
    """The file of an encoder, finished, that takes x >= 0.5 in place of x."""
    model = onnx.load_from_string(encoder)
    for node in model.graph.node:
        node.input[:] = ["x.binary" if name == INPUT else name for name in node.input]
    half = onnx.numpy_helper.from_array(np.array(0.5, np.float32), "x.threshold")
    first = [
        onnx.helper.make_node("GreaterOrEqual", [INPUT, half.name], ["x.above"], "x.above"),
        onnx.helper.make_node("Cast", ["x.above"], ["x.binary"], "x.binary", to=onnx.TensorProto.FLOAT),
    ]
    model.graph.initializer.append(half)
    for position, node in enumerate(first):
        model.graph.node.insert(position, node)
    data = to_bytes(model)
    _check_contract(model, data, "encoder")
    return data


def name_free_sides(model: onnx.ModelProto) -> None:
    """Give the sides without a number the names that they have in every bundle; in place."""
    for value in (*model.graph.input, *model.graph.output):
        sides = IMAGE_SIDES if value.name in (INPUT, RECONSTRUCTION) else LATENT_SIDES
        names = (BATCH, "channels", *sides)
        for name, side in zip(names, value.type.tensor_type.shape.dim, strict=False):
            if not side.HasField("dim_value"):
                side.dim_param = name


def plain(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph without what the exporter leaves in it: stack traces with local paths, notes, inferred shapes."""
    model.ir_version = IR_VERSION
    model.doc_string = ""
    graph = model.graph
    graph.name, graph.doc_string = "graph", ""
    del model.metadata_props[:], graph.metadata_props[:], graph.value_info[:]
    for part in (*graph.node, *graph.initializer, *graph.input, *graph.output):
        part.doc_string = ""
        del part.metadata_props[:]
    return model


def with_node_names(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph, in which every node has a name of its own; it is changed in place."""
    names = {node.name for node in model.graph.node}
    if len(names) < len(model.graph.node) or "" in names:
        for position, node in enumerate(model.graph.node):
            node.name = f"{node.op_type}_{position}"
    return model


def _check_contract(model: onnx.ModelProto, data: bytes, half: str) -> None:
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    if opsets != {"": OPSET}:
        raise ExportError(
            f"the {half} needs the operator sets {opsets}; a bundle's fp32 graph has {{'': {OPSET}}} alone"
        )
    try:
        check_graph(data, f"the {half}")
        onnx.checker.check_model(model, full_check=True)
    except (BundleError, onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        hint = bfloat16_hint(model.graph)
        raise ExportError(f"the {half} cannot go into a bundle: {innermost_reason(error)}{hint}") from error


def bfloat16_hint(graph: onnx.GraphProto) -> str:
    """How to end the error of a graph that is refused, where anything in it is in bfloat16."""
    kind = onnx.TensorProto.BFLOAT16
    casts = (a.i for node in graph.node if node.op_type == "Cast" for a in node.attribute if a.name == "to")
    if kind in casts or any(tensor.data_type == kind for tensor in graph.initializer):
        return "; bfloat16 has little support: export it in float32, without autocast"
    return ""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The exporter logs what is missing that nobody asked for, warns of its own deprecated calls, and prints; where it
    fails, it prints the graph that it has so far."""
    levels = {logger: logger.level for logger in map(logging.getLogger, _LOGGERS)}
    for logger in levels:
        logger.setLevel(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


@contextlib.contextmanager
def without_validation() -> Iterator[None]:
    """torch's distributions check their arguments' values, which no exporter can trace."""
    validate = Distribution._validate_args
    if not validate:  # also within another such block, of which torch may trace what is inside, and that sets nothing
        yield
        return
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(validate)
