"""One ONNX file of others: opened, checked, and brought to the operator set of bundles."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx.inliner
from onnx import TensorProto, helper, numpy_helper, version_converter

from vae_runtime.devices import CPU
from vae_runtime.engine import CRASHING_ON_FLOAT16, import_engine
from vae_runtime.errors import CheckpointError, ExportError
from vae_runtime.graph_rules import RANDOM_OPERATORS, has_float16
from vae_runtime.manifest import Shape

from ..graphs import OPSET, require_fitting_size
from ..protos import attributes
from ..reason import reason
from .options import FLAGS, agreed_shape

TYPES: dict[int, np.dtype[Any]] = {TensorProto.FLOAT: np.dtype(np.float32), TensorProto.FLOAT16: np.dtype(np.float16)}
CHANNELS = (1, 3, 4)  # of images
CONTROL_FLOW = ("If", "Loop", "Scan", "SequenceMap")


class Port(NamedTuple):
    """One input or output: its name, type in numpy, and shape with the batch, None where a side is free."""

    name: str
    dtype: np.dtype[Any]
    shape: Shape


class OnnxSource:
    """One half: its graph under operator set 20, and a session on the file as it is.

    opset: of the file. producer: what wrote it, as it says.
    """

    def __init__(self, half: str, model: onnx.ModelProto, session: Any, opset: int) -> None:
        self.half, self.model, self.session, self.opset = half, model, session, opset
        self.producer = model.producer_name
        constants = {entry.name for entry in model.graph.initializer}
        self.inputs = [_port(value, half) for value in model.graph.input if value.name not in constants]
        self.outputs = [_port(value, half) for value in model.graph.output]
        if len(self.inputs) != 1:
            names = ", ".join(port.name for port in self.inputs)
            raise ExportError(f"the {half} takes {len(self.inputs)} inputs ({names}); a bundle's halves take one")
        self.input = self.inputs[0]
        if self.input.shape and self.input.shape[0] is not None:
            raise ExportError(
                f"the {half} was exported for a batch of {self.input.shape[0]}; a bundle takes any: export it"
                " again with a dynamic batch (dynamic_axes or dynamic_shapes of torch.onnx.export)"
            )


def open_graph(path: Path, half: str) -> OnnxSource:
    """The graph in a file, with its weights from files beside it, and a session of onnxruntime.

    Raises:
        CheckpointError: it is damaged. ExportError: it cannot be a bundle's.
    """
    engine = import_engine()
    try:
        model = onnx.load(str(path))
        size = model.ByteSize()
    except Exception as error:
        raise CheckpointError(f"{path} is not an ONNX model that can be read: {reason(error)}") from error
    require_fitting_size(size, half)
    opset = _check(model, half)
    options = engine.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    try:
        without = CRASHING_ON_FLOAT16 if has_float16(path.read_bytes()) else []
        session = engine.InferenceSession(str(path), options, providers=[CPU], disabled_optimizers=without)
    except Exception as error:
        raise ExportError(f"onnxruntime does not load the {half}: {reason(error)}") from error
    return OnnxSource(half, to_opset(model, opset, half), session, opset)


def agree(encoder: OnnxSource, asked: Shape | None) -> Shape | None:
    """The shape of inputs that the encoder and the user agree on; None: neither says it.

    Raises:
        InputError: they do not agree.
    """
    own = encoder.input.shape[1:]
    if asked is None:
        known = own and (None not in own or (len(own) == 3 and own[0] is not None and own[1:] == (None, None)))
        return own if known else None
    return agreed_shape(own or None, asked)


def require_channels_first(encoder: OnnxSource, asked: Shape | None) -> None:
    """Raise `ExportError` if the encoder's images look like (H, W, C), as TensorFlow has them: where it turns them to
    (C, H, W) itself, or where the sides say so and the user has not asked for just these."""
    own = encoder.input.shape[1:]
    if len(own) != 3 or own[2] not in CHANNELS or any(side is not None and side <= max(CHANNELS) for side in own[:2]):
        return
    turned = any(
        node.op_type == "Transpose"
        and node.input[0] == encoder.input.name
        and [list(attribute.ints) for attribute in node.attribute] == [[0, 3, 1, 2]]
        for node in encoder.model.graph.node
    )
    if turned or asked is None:
        sides = "x".join(str(side or "?") for side in own)
        otherwise = "" if turned else f"; if they are so nevertheless, pass {FLAGS['input_shape']}"
        raise ExportError(
            f"the encoder takes images of {sides}, which look like height, width and channels, as TensorFlow has them;"
            " a bundle's have the channels first: export it again so (tf2onnx: --inputs-as-nchw, and --outputs-as-nchw"
            f" for the decoder){otherwise}"
        )


def to_opset(model: onnx.ModelProto, opset: int, half: str) -> onnx.ModelProto:
    """The same graph without functions, in the operator set of bundles.

    Raises:
        ExportError: an operator has no counterpart there.
    """
    try:
        if model.functions:
            model = onnx.inliner.inline_local_functions(model, convert_version=True)
        if opset > OPSET:
            _split_group_norm(model)
        if opset != OPSET:
            del model.graph.value_info[:]
            model = version_converter.convert_version(model, OPSET)
        return model
    except Exception as error:
        raise ExportError(
            f"the {half} cannot be brought from operator set {opset} to {OPSET}: {reason(error)}"
        ) from error


def _check(model: onnx.ModelProto, half: str) -> int:
    """The operator set; raises `ExportError` for what no bundle holds."""
    opsets = {entry.domain or "": entry.version for entry in model.opset_import}
    opset = opsets.get("", opsets.get("ai.onnx", 0))
    local = {(function.domain, function.name) for function in model.functions}
    for node in [*model.graph.node, *(node for function in model.functions for node in function.node)]:
        name = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
        if node.op_type in RANDOM_OPERATORS:
            raise ExportError(
                f"the {half} draws random numbers ({name}); export it so that it returns mean and logvar (with optimum:"
                " latent_parameters, not latent_sample), and leave sampling to the runtime"
            )
        if node.domain not in ("", "ai.onnx") and (node.domain, node.op_type) not in local:
            raise ExportError(f"the {half} has the operator {name!r}; a bundle's fp32 graphs have standard ones alone")
        if node.op_type in CONTROL_FLOW:
            raise ExportError(f"the {half} has the operator {name!r}; a bundle's graphs have no control flow")
    return int(opset)


def _port(value: onnx.ValueInfoProto, half: str) -> Port:
    tensor = value.type.tensor_type
    if tensor.elem_type not in TYPES:
        name = TensorProto.DataType.Name(tensor.elem_type).lower()
        raise ExportError(f"{value.name!r} of the {half} is {name}; expected float32 or float16")
    sides = tensor.shape.dim if tensor.HasField("shape") else ()
    shape = tuple(side.dim_value if side.HasField("dim_value") and side.dim_value > 0 else None for side in sides)
    return Port(value.name, TYPES[tensor.elem_type], shape)


def _split_group_norm(model: onnx.ModelProto) -> None:
    """GroupNormalization as older operators; that of operator set 21 on, which scales by channel, has no older form."""
    nodes: list[onnx.NodeProto] = []
    for position, node in enumerate(model.graph.node):
        nodes += _older_group_norm(model, node, position) if node.op_type == "GroupNormalization" else [node]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(copies)


def _older_group_norm(model: onnx.ModelProto, node: onnx.NodeProto, position: int) -> list[onnx.NodeProto]:
    """Reshape to groups, InstanceNormalization, Reshape back, scale and bias by channel."""
    given = attributes(node)
    groups, (x, scale, bias), name = given["num_groups"], node.input, f"group_norm_{position}"
    dtype = next(
        (entry.data_type for entry in model.graph.initializer if entry.name in (scale, bias)), TensorProto.FLOAT
    )
    for suffix, values in (
        ("groups", np.array([0, groups, -1], np.int64)),
        ("ones", np.ones(groups, helper.tensor_dtype_to_np_dtype(dtype))),
        ("zeros", np.zeros(groups, helper.tensor_dtype_to_np_dtype(dtype))),
        ("column", np.array([1, -1, 1, 1], np.int64)),
    ):
        model.graph.initializer.append(numpy_helper.from_array(values, f"{name}.{suffix}"))
    make = helper.make_node
    return [
        make("Shape", [x], [f"{name}.shape"]),
        make("Reshape", [x, f"{name}.groups"], [f"{name}.grouped"]),
        make(
            "InstanceNormalization",
            [f"{name}.grouped", f"{name}.ones", f"{name}.zeros"],
            [f"{name}.normal"],
            epsilon=given.get("epsilon", 1e-5),
        ),
        make("Reshape", [f"{name}.normal", f"{name}.shape"], [f"{name}.back"]),
        make("Reshape", [scale, f"{name}.column"], [f"{name}.scale"]),
        make("Reshape", [bias, f"{name}.column"], [f"{name}.bias"]),
        make("Mul", [f"{name}.back", f"{name}.scale"], [f"{name}.scaled"]),
        make("Add", [f"{name}.scaled", f"{name}.bias"], [node.output[0]]),
    ]
