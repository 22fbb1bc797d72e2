"""How much a node multiplies: the multiply-accumulates of operators that contract an axis."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

import onnx_ir as ir

from onnxcompress.operators import DEFAULT_DOMAINS, Role, int_attribute, operator

Shape = tuple[int, ...]

INTEGERS: Final = frozenset({"MatMulInteger", "ConvInteger", "DynamicQuantizeLSTM"})
"""Contractions on integers by what the model itself says, whatever they are fused with."""
_RECURRENT: Final = frozenset({"LSTM", "GRU", "RNN", "DynamicQuantizeLSTM"})


def contracts(node: ir.Node) -> bool:
    """Whether the node multiplies and sums over an axis."""
    if node.op_type in INTEGERS:
        return True
    return node.domain in DEFAULT_DOMAINS and operator(node).role is Role.CONTRACT


def multiply_accumulates(node: ir.Node, found: Mapping[str, Shape]) -> int:
    """Multiply-accumulates of a node that `contracts`.

    Args:
        found: shapes by name, of its first three inputs and its first output.
    """
    shapes: list[Shape] = [
        found[v.name] if v is not None and v.name else () for v in node.inputs[:3]
    ]
    output = found.get(node.outputs[0].name or "", ())  # a cell may give its last state only
    if node.op_type in _RECURRENT:
        steps, batch = shapes[0][:2]
        return steps * batch * (math.prod(shapes[1]) + math.prod(shapes[2]))
    if node.op_type in ("Conv", "ConvInteger"):
        return math.prod(output) * math.prod(shapes[1][1:])
    if node.op_type == "ConvTranspose":
        return math.prod(shapes[0]) * math.prod(shapes[1][1:])
    if node.op_type == "Gemm":
        return math.prod(output) * shapes[0][0 if int_attribute(node, "transA", 0) else 1]
    return math.prod(output) * math.prod(shapes[0][-1:])


def stated_shapes(node: ir.Node) -> dict[str, Shape] | None:
    """The shapes that `multiply_accumulates` needs, as the graph states them; None if it does not.

    A dimension with a name, such as a batch, counts as 1.
    """
    shapes: dict[str, Shape] = {}
    for value in (*node.inputs[:3], node.outputs[0]):
        if value is None or not value.name:
            continue
        if value.shape is None or value.shape.has_unknown_dim():
            return None
        shapes[value.name] = tuple(d if isinstance(d, int) else 1 for d in value.shape)
    return shapes
