"""What a bundle's graph may hold, checked on its bytes before onnxruntime sees them.

onnxruntime is no sandbox. These rules keep out what no encoder or decoder needs and what could reach beyond the graph:
files outside the bundle, foreign operators, control flow, session settings hidden in the model, randomness. The reader
knows only the wire format of protocol buffers (https://protobuf.dev/programming-guides/encoding/) and the field numbers
of https://github.com/onnx/onnx/blob/main/onnx/onnx.proto that it needs.
"""

from __future__ import annotations

from collections.abc import Iterator

from .errors import BundleError

ALLOWED_DOMAINS = ("", "ai.onnx", "com.microsoft")
RANDOM_OPERATORS = (
    "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli",
)  # fmt: skip

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MODEL_GRAPH, _MODEL_OPSETS, _MODEL_METADATA, _MODEL_TRAINING, _MODEL_FUNCTIONS = 7, 8, 14, 20, 25
_GRAPH_NODES, _GRAPH_INITIALIZERS, _GRAPH_SPARSE = 1, 5, 15
_NODE_INPUTS, _NODE_OPERATOR, _NODE_ATTRIBUTES, _NODE_DOMAIN = 1, 4, 5, 7
_ATTRIBUTE_INT = 3
_ATTRIBUTE_TENSOR, _ATTRIBUTE_GRAPH, _ATTRIBUTE_TENSORS, _ATTRIBUTE_GRAPHS, _ATTRIBUTE_SPARSE = 5, 6, 10, 11, (22, 23)
_TENSOR_TYPE, _TENSOR_EXTERNAL, _TENSOR_LOCATION = 2, 13, 14
_FLOAT16 = 10


def check_graph(model: bytes, file: str) -> None:
    """Raise `BundleError`, which names `file`, if the ONNX model in `model` is malformed or breaks a rule."""
    try:
        for field, value in _fields(memoryview(model)):
            _check_model_field(field, value, file)
    except _MalformedError as error:
        raise BundleError(f"{file} is not a valid ONNX file: {error}") from None


def has_float16(model: bytes) -> bool:
    """Whether an ONNX model that passed `check_graph` keeps weights in float16, or casts to it."""
    graphs = [_message(value) for field, value in _fields(memoryview(model)) if field == _MODEL_GRAPH]
    parts = [part for graph in graphs for part in _fields(graph)]
    return any(
        (_TENSOR_TYPE, _FLOAT16) in _fields(_message(part)) if field == _GRAPH_INITIALIZERS else _casts(_message(part))
        for field, part in parts
        if field in (_GRAPH_INITIALIZERS, _GRAPH_NODES)
    )


def _casts(node: memoryview) -> bool:
    """Whether a node is a Cast to float16."""
    attributes = [_message(value) for field, value in _fields(node) if field == _NODE_ATTRIBUTES]
    return _text(node, _NODE_OPERATOR) == "Cast" and any(
        (_ATTRIBUTE_INT, _FLOAT16) in _fields(attribute) for attribute in attributes
    )


class _MalformedError(Exception):
    """The bytes are no protocol buffer message."""


def _check_model_field(field: int, value: memoryview | int, file: str) -> None:
    if field in (_MODEL_TRAINING, _MODEL_FUNCTIONS):
        raise BundleError(
            f"{file} holds {'training steps' if field == _MODEL_TRAINING else 'functions'}; a bundle's graphs are plain"
        )
    if field == _MODEL_OPSETS:
        _check_domain(_text(value, 1), file)
    elif field == _MODEL_METADATA and _text(value, 1) == "ort_config":
        raise BundleError(f"{file} carries session settings ('ort_config'); a bundle's graphs carry none")
    elif field == _MODEL_GRAPH:
        for inner, part in _fields(_message(value)):
            if inner == _GRAPH_NODES:
                _check_node(_message(part), file)
            elif inner == _GRAPH_INITIALIZERS:
                _check_tensor(_message(part), file)
            elif inner == _GRAPH_SPARSE:
                raise BundleError(f"{file} holds a sparse initializer; a bundle's weights are dense")


def _check_node(node: memoryview, file: str) -> None:
    operator = _text(node, _NODE_OPERATOR)
    _check_domain(_text(node, _NODE_DOMAIN), file)
    if operator == "EPContext":
        raise BundleError(f"{file} has the operator 'EPContext', a compiled program; a bundle's graphs are plain")
    if operator in RANDOM_OPERATORS or (operator == "Dropout" and _in_training(node)):
        raise BundleError(
            f"{file} has the operator {operator!r}; a bundle's graphs are deterministic, sampling is the runtime's"
        )
    for field, attribute in _fields(node):
        if field != _NODE_ATTRIBUTES:
            continue
        for inner, part in _fields(_message(attribute)):
            if inner in (_ATTRIBUTE_GRAPH, _ATTRIBUTE_GRAPHS):
                raise BundleError(
                    f"{file} has the operator {operator!r} with a subgraph; a bundle's graphs have no control flow"
                )
            if inner in (_ATTRIBUTE_TENSOR, _ATTRIBUTE_TENSORS):
                _check_tensor(_message(part), file)
            elif inner in _ATTRIBUTE_SPARSE:
                raise BundleError(f"{file} holds a sparse tensor; a bundle's weights are dense")


def _in_training(dropout: memoryview) -> bool:
    """Whether a Dropout has its third input, `training_mode`, which makes it drop at random."""
    inputs = [value for field, value in _fields(dropout) if field == _NODE_INPUTS]
    return len(inputs) > 2 and len(_message(inputs[2])) > 0


def _check_tensor(tensor: memoryview, file: str) -> None:
    for field, value in _fields(tensor):
        if field == _TENSOR_EXTERNAL or (field == _TENSOR_LOCATION and value != 0):
            raise BundleError(f"{file} keeps weights in another file; a bundle's graphs hold their own")


def _check_domain(domain: str, file: str) -> None:
    if domain not in ALLOWED_DOMAINS:
        raise BundleError(
            f"{file} uses the operator domain {domain!r}; allowed are {', '.join(map(repr, ALLOWED_DOMAINS))}"
        )


def _text(message: memoryview | int, field: int) -> str:
    """The last string of that field, as protocol buffers have it; empty where there is none."""
    found = ""
    for number, value in _fields(_message(message)):
        if number == field:
            found = bytes(_message(value)).decode("utf-8", "replace")
    return found


def _message(value: memoryview | int) -> memoryview:
    if isinstance(value, int):
        raise _MalformedError("a number stands where a message is expected")
    return value


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview | int]]:
    """Every field of one message: its number and its bytes, or its value where it is a number."""
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        field, wire = key >> 3, key & 7
        if not 0 < field < 2**29:  # other readers drop the high bits and would see another field here
            raise _MalformedError(f"field number {field} at byte {position}")
        if wire == _VARINT:
            value, position = _varint(message, position)
            yield field, value
            continue
        if wire == _BYTES:
            size, position = _varint(message, position)
        elif wire in (_FIXED32, _FIXED64):
            size = 4 if wire == _FIXED32 else 8
        else:
            raise _MalformedError(f"wire type {wire} at byte {position}")
        if position + size > len(message):
            raise _MalformedError(f"a field of {size} bytes at byte {position} runs past the end")
        content = message[position : position + size]
        yield field, content if wire == _BYTES else int.from_bytes(content, "little")
        position += size


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(message):
            raise _MalformedError("it ends in the middle of a number")
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise _MalformedError(f"a number of over 10 bytes at byte {position}")
