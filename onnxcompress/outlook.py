"""What a target would make of each node of a model, and why the rest would stay in float."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum

import onnx_ir as ir

from onnxcompress import schemes
from onnxcompress.contract import Result
from onnxcompress.graph.arithmetic import contracts, multiply_accumulates, stated_shapes
from onnxcompress.graph.placement import Placement, absorbed_output, can_move, place
from onnxcompress.graph.scopes import nodes_within
from onnxcompress.operators import DEFAULT_DOMAINS
from onnxcompress.targets import Target

_IN_FUNCTION = "it is inside a function: inline functions"
_FLOATS = (None, ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE)


class Runs(StrEnum):
    """How a node would run."""

    INTEGERS = "integers"
    """A kernel that computes on integers."""
    MOVED = "moved"
    """On integers, which it only moves."""
    ABSORBED = "absorbed"
    """Within the kernel before it."""
    WEIGHTS = "weights"
    """On integer weights, its data quantized as they come or only looked up."""
    FLOAT = "float"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """One node's part in the quantized model."""

    node: str
    op: str
    runs: Runs
    reason: str = ""
    """Why it stays in float; empty where it does not."""
    macs: int | None = 0
    """Multiply-accumulates of one pass through it, named dimensions as 1; None where the graph
    states no shapes."""


def outlook(model: ir.Model, target: Target) -> list[Outlook]:
    """What static quantization for `target` would make of each node, in graph order.

    Args:
        model: as `schemes.before_static` leaves it. It is altered.
    """
    plan = place(model.graph, target, lambda node: True)
    before = [(node, node.op_type, _outlook(node)) for node in _nodes(model.graph)]
    runs = dict.fromkeys(plan.kernels, Runs.INTEGERS) | dict.fromkeys(plan.moves, Runs.MOVED)
    runs |= dict.fromkeys(_absorbed(plan, target), Runs.ABSORBED)
    reasons = {n: _reason(n, plan, target, model) for n, _, _ in before if n not in runs}
    result = schemes.without_pairs(target.name)(model)
    assert isinstance(result, Result)
    declined = {(skip.node, skip.op): skip.reason for skip in result.skips}
    # What that pass quantizes becomes a node of another type.
    runs |= {n: Runs.WEIGHTS for n, op, _ in before if n.op_type != op}
    found = [
        replace(plain, runs=runs[n])
        if n in runs
        else replace(plain, reason=declined.get((n.name or "", op), reasons[n]))
        for n, op, plain in before
    ]
    inside = (node for function in model.functions.values() for node in function)
    return found + [replace(_outlook(node), reason=_IN_FUNCTION) for node in inside]


def integer_share(nodes: Iterable[Outlook]) -> float | None:
    """The part of the multiplications that would run on integers, each node counted once.

    None where nothing is multiplied, or some shape is not known.
    """
    nodes = list(nodes)
    macs = [node.macs for node in nodes]
    if None in macs or not (total := sum(m or 0 for m in macs)):
        return None
    return sum(node.macs or 0 for node in nodes if node.runs is not Runs.FLOAT) / total


def qualified_type(node: ir.Node) -> str:
    """The operator, behind its domain where that is not ONNX's own."""
    return f"{node.domain}.{node.op_type}" if node.domain else node.op_type


def _outlook(node: ir.Node) -> Outlook:
    return Outlook(node=node.name or "", op=qualified_type(node), runs=Runs.FLOAT, macs=_macs(node))


def _nodes(graph: ir.Graph) -> Iterator[ir.Node]:
    """All nodes of the graph and its bodies but the constants."""
    nodes = nodes_within(graph)
    return (node for node in nodes if node.op_type != "Constant")


def _absorbed(plan: Placement, target: Target) -> Iterator[ir.Node]:
    for kernel in plan.kernels:
        value, last = kernel.outputs[0], absorbed_output(kernel, target)
        while value is not last:
            (usage,) = value.uses()
            yield usage.node
            value = usage.node.outputs[0]


def _reason(node: ir.Node, plan: Placement, target: Target, model: ir.Model) -> str:
    """Why a node stays in float, as far as placement knows."""
    if any(v.type is ir.AttributeType.GRAPH for v in node.attributes.values()):
        return "it runs its bodies"
    if all(value.dtype not in _FLOATS for value in node.outputs):
        return "it computes no floats"
    if node in plan.left:
        return plan.left[node]
    if node.domain not in DEFAULT_DOMAINS:
        return f"it is an operator of {node.domain}"
    if node.op_type in target.absorbs:
        return "no kernel before it takes it in"
    if node.op_type in target.moves:
        opset = model.graph.opset_imports.get("", 0)
        moves = can_move(node, target, opset)
        return "what it moves are no integers" if moves else "it makes new values in this form"
    return f"no integer kernel on {target.name}"


def _macs(node: ir.Node) -> int | None:
    if not contracts(node):
        return 0
    shapes = stated_shapes(node)
    return None if shapes is None else multiply_accumulates(node, shapes)
