"""onnxscript's simplification of a graph, kept from changing what the graph computes."""

from __future__ import annotations

import onnx
import onnxscript.optimizer
from onnxscript import ir

_NEAR = 1e-4  # wider than onnxscript's tolerances, which are 1e-8 of 0 and 1e-5 of 1


def simplified(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same computation without what is constant, there twice, or used by nobody.

    onnxscript also leaves out terms that are nearly 0 and factors that are nearly 1: of `log(x + 1e-10)` it makes
    `log(x)` (its rules no_op, version 0.7). It does so with scalars alone; here those become arrays of one element, but
    where the result is a scalar too, or of unknown rank.
    """
    program = ir.from_proto(model)
    onnxscript.optimizer.fold_constants(program)
    ir.passes.common.ShapeInferencePass(check_type=False, strict_mode=False)(program)
    for node in program.graph:
        if node.domain == "" and node.op_type in ("Add", "Sub", "Mul", "Div"):
            _spread_small_changes(program.graph, node)
    return ir.to_proto(onnxscript.optimizer.optimize(program))


def _spread_small_changes(graph: ir.Graph, node: ir.Node) -> None:
    """Give the node [c] for a constant c that changes next to nothing, where the result is of the same rank."""
    for index, (value, other) in enumerate(zip(node.inputs, node.inputs[::-1], strict=True)):
        tensor = None if value is None else ir.convenience.get_const_tensor(value)
        if tensor is None or tensor.shape.rank() != 0 or other is None or not (other.shape and other.shape.rank()):
            continue
        constant = tensor.numpy()
        if constant.item() not in (0, 1) and min(abs(constant.item()), abs(constant.item() - 1)) < _NEAR:
            spread = ir.node("Constant", [], {"value": ir.tensor(constant.reshape(1))})
            graph.insert_before(node, spread)
            node.replace_input_with(index, spread.outputs[0])
