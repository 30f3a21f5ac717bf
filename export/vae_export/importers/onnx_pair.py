"""An existing pair of ONNX files, encoder and decoder, such as other exporters write.

A folder that holds both, or 'ENCODER,DECODER'. The encoder gives mean and logvar by name or in this order, one tensor
that is both, or a code. The bundle's graphs are these graphs with the contract around them; the reference is
onnxruntime on the files as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from vae_runtime.bundle import is_bundle_folder
from vae_runtime.errors import InputError
from vae_runtime.manifest import HALF_NAMES

from ..imported import Imported, ImportOptions
from .options import check_options, require_shape
from .pair import default_name, find_pair, has_pair
from .trial import try_out

KIND = "onnx"
MAX_VARINT_BYTES = 10
_MODEL_FIELDS = range(1, 27)  # of onnx.ModelProto
_IR_VERSION, _GRAPH, _OPSET = 1, 7, 8


def recognises(source: str) -> bool:
    """Whether `source` names an encoder and a decoder in ONNX, and is no bundle of ours, which is complete already."""
    return not _is_bundle(source) and has_pair(source, is_onnx)


def _is_bundle(source: str) -> bool:
    try:
        return is_bundle_folder(Path(source).resolve())  # through links too
    except (OSError, ValueError, RuntimeError):  # no path at all, or a link to itself
        return False


def is_onnx(path: Path) -> bool:
    """Whether the outermost fields of a file are those of an ONNX model; its weights are not read.

    The wire format: https://protobuf.dev/programming-guides/encoding/.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            found = set()
            while file.tell() < size:
                key = _varint(file.read)
                field, wire = key >> 3, key & 7
                if field not in _MODEL_FIELDS or wire not in (0, 2):
                    return False
                value = _varint(file.read)
                if wire == 2:
                    file.seek(value, 1)
                found.add(field)
            return file.tell() == size and {_IR_VERSION, _GRAPH, _OPSET} <= found
    except (OSError, ValueError):
        return False


def load(source: str, options: ImportOptions) -> Imported:
    """Both graphs, tried on noise by onnxruntime.

    Raises:
        CheckpointError: a file is damaged.
        ExportError: a graph cannot be a bundle's: random, of foreign operators, other types or one batch size.
        InputError: the files are not found, or an option is missing or wrong.
    """
    import onnx

    from .onnx_halves import OnnxHalves
    from .onnx_source import agree, open_graph, require_channels_first

    check_options(options)
    if _is_bundle(source):
        raise InputError(f"{source} is a bundle already; vae-run and vae-bench take it as it is")
    encoder, decoder = (
        open_graph(path, half)
        for path, half in zip(find_pair(source, is_onnx, "an ONNX file"), HALF_NAMES, strict=True)
    )
    require_channels_first(encoder, options.input_shape)
    shape = require_shape(agree(encoder, options.input_shape), options)
    halves = OnnxHalves(encoder, decoder, shape, options)
    sizes = try_out(halves, shape, options)
    return Imported(
        halves,
        default_name(source),
        *sizes,
        options.input_range,
        origin={
            "library": "onnx",
            "version": onnx.__version__,
            "opset": encoder.opset,
            **({"producer": encoder.producer} if encoder.producer else {}),
        },
    )


def _varint(read: Callable[[int], bytes]) -> int:
    value = 0
    for position in range(MAX_VARINT_BYTES):
        byte = read(1)
        if not byte:
            raise ValueError("it ends in the middle of a number")
        value |= (byte[0] & 0x7F) << 7 * position
        if byte[0] < 0x80:
            return value
    raise ValueError("a number of over 10 bytes")
