"""Programs of PyTorch: opened, and made into ONNX by the exporter that keeps what they compute.

TorchScript goes through torch.onnx's older exporter, which translates its graph operator by operator. The newer one
does not take it; the converter to torch.export (torch._export.converter) fails on loops, which a scripted GroupNorm
has, and made a graph of negative sizes of a scripted nearest upsampling.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn

from vae_runtime.errors import CheckpointError, ExportError, InputError
from vae_runtime.manifest import INPUT, LATENT, LOGVAR, MEAN, RECONSTRUCTION, Shape
from vae_runtime.preprocess import Float32

from ..graphs import OPSET, DecoderGraph, EncoderGraph, decoder_to_onnx, encoder_to_onnx, finish, quiet
from ..reason import reason
from ..reference import Reference
from ..simplify import simplified
from .options import FLAGS
from .script_code import check_archive, check_graphs
from .script_operators import find_cure, known_operators
from .torch_program import EXPORTED, SCRIPT


class Program:
    """One half. module: runs it. shape: of its inputs without the batch, where the program says it."""

    def __init__(self, sort: str, module: nn.Module, shape: Shape | None) -> None:
        self.sort, self.module, self.shape = sort, module, shape


class ProgramHalves(Reference):
    """Both programs, wrapped to the contract, and each one's way into ONNX."""

    def __init__(self, encoder: Program, decoder: Program, graphs: tuple[EncoderGraph, DecoderGraph]) -> None:
        super().__init__(*graphs)
        self._sorts = encoder.sort, decoder.sort

    def to_onnx(self, x: Float32, z: Float32, free: bool) -> tuple[bytes, bytes]:
        inputs, latents = torch.from_numpy(x), torch.from_numpy(z)
        outputs = [MEAN, LOGVAR] if self.kind == "vae" else [MEAN]
        return (
            script_to_onnx(self._encoder, inputs, INPUT, outputs, free)
            if self._sorts[0] == SCRIPT
            else encoder_to_onnx(self._encoder, inputs, free),
            script_to_onnx(self._decoder, latents, LATENT, [RECONSTRUCTION], free)
            if self._sorts[1] == SCRIPT
            else decoder_to_onnx(self._decoder, latents, free),
        )


def script_to_onnx(
    graph: EncoderGraph | DecoderGraph, example: torch.Tensor, input_name: str, outputs: list[str], free: bool
) -> bytes:
    """The ONNX file of a half with TorchScript in it.

    Raises:
        ExportError: it cannot be exported, or the result breaks the contract.
    """
    half = "encoder" if isinstance(graph, EncoderGraph) else "decoder"
    file = io.BytesIO()
    axes = {axis: f"axis{axis}" for axis in ((0, 2, 3) if free else (0,))}
    inner = {0: "axis0"} if not free else axes
    program = None
    try:
        with quiet(), known_operators(), torch.no_grad():
            program = torch.jit.trace(graph, (example,), check_trace=False)  # with the one inside as it is
            torch.onnx.export(
                program,
                (example,),
                file,  # type: ignore[arg-type]
                dynamo=False,
                opset_version=OPSET,
                input_names=[input_name],
                output_names=outputs,
                dynamic_axes={input_name: axes, **dict.fromkeys(outputs, inner)},
            )
            # Loops that only check sizes are left over from scripted functions; nothing uses what they compute.
            model = simplified(onnx.load_from_string(file.getvalue()))
    except Exception as error:
        text = reason(error).partition("[Caused by")[0].rstrip(". ")  # a value within, and its line of code
        raise ExportError(f"the {half} cannot be exported by torch.onnx: {text}; {find_cure(text, program)}") from error
    _set_sides(model, example, outputs, graph, free)
    return finish(model, half)


def open_program(path: Path, sort: str | None, trusted: bool) -> Program:
    """The program in a file.

    Raises:
        CheckpointError: it is damaged. ExportError: it is not of float32, or made for one batch size.
        InputError: it may run code while it is read, and is not trusted.
    """
    return _open_exported(path, trusted) if sort == EXPORTED else _open_script(path)


def _open_script(path: Path) -> Program:
    check_archive(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of TorchScript itself
            module = torch.jit.load(str(path), map_location="cpu").eval()
    except Exception as error:
        raise CheckpointError(f"{path} is not a TorchScript program that can be loaded: {reason(error)}") from error
    check_graphs(module, path)
    _check_types(module, path)
    return Program(SCRIPT, module, None)


def _open_exported(path: Path, trusted: bool) -> Program:
    if not trusted:
        raise InputError(
            f"{path} is a torch.export program, and reading one runs code that may be hidden in it; pass"
            f" {FLAGS['trust_pickle']} if you know where it comes from, or save TorchScript or ONNX instead"
        )
    try:
        with path.open("rb") as file:
            program = torch.export.load(file)
        module = program.module()
    except Exception as error:
        raise CheckpointError(f"{path} is not a torch.export program that can be loaded: {reason(error)}") from error
    for name in ("train", "eval"):  # they refuse to be called, by the wrappers around the program too
        module.__dict__.pop(name, None)
    _check_types(module, path)
    return Program(EXPORTED, module, _input_shape(program, path))


def _input_shape(program: Any, path: Path) -> Shape:
    names = set(program.graph_signature.user_inputs)
    inputs = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder" and node.name in names]
    if len(inputs) != 1 or not isinstance(inputs[0], torch.Tensor):
        raise ExportError(f"{path} takes {len(inputs)} inputs; a bundle's halves take one")
    if inputs[0].dtype != torch.float32:
        raise ExportError(
            f"{path} takes {inputs[0].dtype}; expected float32: convert it with .float() and export again"
        )
    batch, *sizes = inputs[0].shape
    if isinstance(batch, int):
        raise ExportError(
            f"{path} was exported for a batch of {batch}; a bundle takes any: export it again with"
            " dynamic_shapes=({0: torch.export.Dim('batch')},)"
        )
    for side, size in (("batch", batch), *zip(("height", "width"), sizes[1:], strict=False)):
        if not isinstance(size, int) and (most := _most(size, program.range_constraints)) is not None:
            raise ExportError(
                f"{path} was exported for a {side} of at most {most}; a bundle takes any: export it again without max"
                " in dynamic_shapes, unless its code decides by the size"
            )
    return tuple(size if isinstance(size, int) else None for size in sizes)


def _most(size: torch.SymInt, ranges: Mapping[Any, Any]) -> int | None:
    """The largest value of a size, None where it has none; either its maker or its code has set it."""
    bounds = {symbol: ranges[symbol].upper for symbol in size.node.expr.free_symbols if symbol in ranges}
    if not bounds or not all(bound.is_Integer for bound in bounds.values()):  # one that has none is int_oo
        return None
    return int(size.node.expr.subs(bounds))


def _check_types(module: nn.Module, path: Path) -> None:
    for name, value in (*module.named_parameters(), *module.named_buffers()):
        if value.is_floating_point() and value.dtype != torch.float32:
            raise ExportError(
                f"{path} has the weights {name!r} in {value.dtype}; expected float32: convert it with .float() and save"
                " it again"
            )


def _set_sides(model: onnx.ModelProto, example: torch.Tensor, outputs: list[str], graph: nn.Module, free: bool) -> None:
    """The numbers of the sides that are fixed, which the older exporter leaves open where it cannot infer them."""
    with torch.no_grad():
        results = graph(example)
    results = results if isinstance(results, tuple) else (results,)
    shapes = dict(zip(outputs, (result.shape for result in results), strict=True))
    for value in model.graph.output:
        shape: list[int | None] = list(shapes[value.name])
        shape[0] = None
        if free:
            shape[2:] = [None] * (len(shape) - 2)
        value.type.tensor_type.ClearField("shape")
        for size in shape:
            side = value.type.tensor_type.shape.dim.add()
            if size is not None:
                side.dim_value = size
