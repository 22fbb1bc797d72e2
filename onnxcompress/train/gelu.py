"""Gelu written out, as exporters do, put into one node before gradients are taken.

Of the five passes over the values that it is written out in, four would be kept for the gradient,
which needs the input alone.
"""

from __future__ import annotations

import math
from typing import Final

import onnx_ir as ir

from onnxcompress.graph.linear import is_op
from onnxcompress.operators import is_number

DOMAIN: Final = "com.microsoft"
"""Every build of ONNX Runtime has Gelu there; the standard one is of version 20 only."""


def join_gelu(graph: ir.Graph) -> int:
    """Replace x/2·(1 + erf(x/√2)), in any order of its factors; how many there were.

    Source: Hendrycks and Gimpel, Gaussian Error Linear Units (2016).
    """
    count = 0
    for node in list(graph):
        found = _written_out(node)
        if found is not None:
            x, y = found
            output = ir.Value(name=y.name, type=y.type, shape=y.shape)
            gelu = ir.node("Gelu", [x], domain=DOMAIN, outputs=[output], name=y.name)
            last = y.producer()
            assert last is not None
            graph.insert_before(last, gelu)
            y.name = f"{y.name}_written_out"
            ir.convenience.replace_all_uses_with(y, output, replace_graph_outputs=True)
            _remove_unread(graph, last)
            count += 1
            graph.opset_imports[DOMAIN] = 1
    return count


def _written_out(erf: ir.Node) -> tuple[ir.Value, ir.Value] | None:
    """The input and the result of the Gelu that an Erf is in."""
    is_float = is_op(erf, "Erf") and erf.outputs[0].dtype is ir.DataType.FLOAT
    x = _scaled(erf.inputs[0], math.sqrt(0.5)) if is_float else None
    one_more = _only_reader(erf.outputs[0])
    if x is None or one_more is None or not is_op(one_more, "Add") or not _holds(one_more, 1):
        return None
    value, halved, by_x = one_more.outputs[0], False, False
    while not (halved and by_x):
        node = _only_reader(value)
        if node is None or not is_op(node, "Mul"):
            return None
        (other,) = [v for v in node.inputs if v is not value] or [None]
        if not halved and is_number(other, 0.5):
            halved = True
        elif not by_x and other is x:
            by_x = True
        elif not (halved or by_x) and other is not None and _scaled(other, 0.5) is x:
            halved = by_x = True
        else:
            return None
        value = node.outputs[0]
    return x, value


def _only_reader(value: ir.Value) -> ir.Node | None:
    readers = [use.node for use in value.uses()]
    return readers[0] if len(readers) == 1 and not value.is_graph_output() else None


def _scaled(value: ir.Value | None, factor: float) -> ir.Value | None:
    """What `value` is `factor` times of."""
    node = None if value is None else value.producer()
    if node is None or len(node.inputs) != 2:
        return None
    left, right = node.inputs
    if is_op(node, "Div") and is_number(right, 1 / factor):
        return left
    if is_op(node, "Mul") and is_number(right, factor):
        return left
    return right if is_op(node, "Mul") and is_number(left, factor) else None


def _holds(node: ir.Node, number: float) -> bool:
    return any(is_number(v, number) for v in node.inputs)


def _remove_unread(graph: ir.Graph, node: ir.Node | None) -> None:
    """Take out a node that nobody reads, and what only it read."""
    if node is None or any(v.uses() or v.is_graph_output() for v in node.outputs):
        return
    sources = [v.producer() for v in node.inputs if v is not None]
    graph.remove(node, safe=True)
    for source in dict.fromkeys(sources):
        _remove_unread(graph, source)
