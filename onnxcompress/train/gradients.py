"""Reverse-mode differentiation as a graph rewrite: the backward pass emitted as ONNX operators."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import Final

import numpy as np
import onnx_ir as ir

from onnxcompress.contract import Skip
from onnxcompress.errors import InputError
from onnxcompress.graph.scopes import reads
from onnxcompress.operators import DEFAULT_DOMAINS, Role, operator
from onnxcompress.train.rules import RULES
from onnxcompress.train.tape import Tape, Unsupported, dims_of

__all__ = ["LEAST_OPSET", "RULES", "Tape", "add_gradients", "unsupported"]

LEAST_OPSET: Final = 18
"""The version of the operators that are emitted; `passes.raise_opset` converts older graphs."""

_ELSEWHERE: Final = {("com.microsoft", "Gelu")}
"""Operators of other domains that are those of the default one."""


def add_gradients(
    graph: ir.Graph, loss: ir.Value, wrt: Sequence[ir.Value], block: int | None = None
) -> dict[ir.Value, ir.Value]:
    """Emit the backward pass of `loss` behind the nodes of `graph`.

    Only what lies between `wrt` and `loss` is differentiated: what is left out of `wrt` is frozen.
    Gradients of several uses add up. Values of integers and truths carry no gradient, but for
    those that QuantizeLinear gives (straight-through). What the rules emit are operators of the
    default domain; nodes of the graph are left as they are, except that some give another of
    their outputs (LayerNormalization, MaxPool).

    At points where there is no derivative: Relu, Clip, HardSigmoid and Abs pass nothing where
    the input equals the bound, LeakyRelu and PRelu take the slope of the negative side at zero,
    Max, Min and their reductions share evenly among equals, MaxPool gives all to the value that it
    took.

    Args:
        graph: nodes in topological order, of types known and shapes inferred
            (`graph.inference.infer`); symbolic sizes are found at run time.
        loss: a float scalar of the graph, or a tensor whose sum is meant.
        wrt: graph inputs, initializers or inner values.
        block: channels in a block, if `train.blocked` is to lay the graph out: what is fast then
            is emitted, where all sizes are known.

    Returns:
        The gradient, of the same type and shape, of each value of `wrt` that `loss` depends on.

    Raises:
        InputError: if a node in between has no rule, naming each; the graph is then as it was.

    Source: Griewank and Walther, Evaluating Derivatives (2008), the reverse mode.
    """
    tape, found, skips = _backward(graph, loss, wrt, block)
    if skips:
        tape.undo()
        named = "; ".join(f"{s.op} {s.node!r}: {s.reason}" for s in skips[:8])
        more = f"; and {len(skips) - 8} more" if len(skips) > 8 else ""
        raise InputError(f"gradients cannot pass through {named}{more}: freeze what lies before")
    return found


def unsupported(graph: ir.Graph, loss: ir.Value, wrt: Sequence[ir.Value]) -> list[Skip]:
    """The nodes between `wrt` and `loss` that have no gradient here, and why; `graph` stays."""
    tape, _, skips = _backward(graph, loss, wrt)
    tape.undo()
    return skips


def _backward(
    graph: ir.Graph, loss: ir.Value, wrt: Sequence[ir.Value], block: int | None = None
) -> tuple[Tape, dict[ir.Value, ir.Value], list[Skip]]:
    if graph.opset_imports.get("", LEAST_OPSET) < LEAST_OPSET:
        raise InputError(
            f"gradients need operators of version {LEAST_OPSET} or newer: raise the opset first"
        )
    carrying = _carrying(graph, wrt)
    path = _between(graph, loss, carrying)
    tape = Tape(graph, carrying, block)
    pending: dict[ir.Value, list[ir.Value]] = {loss: [_seed(tape, loss)]}
    found: dict[ir.Value, ir.Value] = {}
    skips: list[Skip] = []
    asked = set(wrt)
    for node in reversed(path):
        given = [_total(tape, v, pending.pop(v, [])) for v in node.outputs]
        found |= {
            v: g for v, g in zip(node.outputs, given, strict=True) if g is not None and v in asked
        }
        if any(g is not None for g in given):
            gradients = _apply(tape, node, given, skips)
            for value, gradient in zip(node.inputs, gradients, strict=False):
                if value is not None and value in carrying and gradient is not None:
                    pending.setdefault(value, []).append(gradient)
    for value in wrt:
        total = None if value in found else _total(tape, value, pending.get(value, []))
        if total is not None:
            found[value] = total
    return tape, found, skips


def _carrying(graph: ir.Graph, wrt: Sequence[ir.Value]) -> AbstractSet[ir.Value]:
    """The values that depend on `wrt` in a way that a gradient can follow."""
    carrying = set(wrt)
    for node in graph:
        if any(v in carrying for v in reads(node)):
            carrying.update(v for v in node.outputs if _carries(v, node, carrying))
    return carrying


def _carries(value: ir.Value, node: ir.Node, carrying: AbstractSet[ir.Value]) -> bool:
    if value.dtype is None or value.dtype.is_floating_point():
        return True
    if node.op_type == "QuantizeLinear":
        return True
    moves = operator(node).role is Role.MOVE and node.inputs[0] in carrying
    return moves and value is node.outputs[0]


def _between(graph: ir.Graph, loss: ir.Value, carrying: AbstractSet[ir.Value]) -> Sequence[ir.Node]:
    """The nodes that carry a gradient on to `loss`, in the order of the graph."""
    leads, path = {loss}, list[ir.Node]()
    for node in reversed(graph):
        if any(v in leads and v in carrying for v in node.outputs):
            path.append(node)
            leads.update(v for v in reads(node) if v in carrying)
    return path[::-1]


def _apply(
    tape: Tape, node: ir.Node, given: Sequence[ir.Value | None], skips: list[Skip]
) -> Sequence[ir.Value | None]:
    """What the node's rule gives; where there is none, anything, so that all can be named."""
    known = node.domain in DEFAULT_DOMAINS or (node.domain, node.op_type) in _ELSEWHERE
    rule = RULES.get(node.op_type) if known else None
    try:
        if rule is None:
            raise Unsupported("there is no rule for it")
        return rule(tape, node, given)
    except Unsupported as reason:
        skips.append(Skip(node.name or "", node.op_type, str(reason)))
        return node.inputs


def _total(tape: Tape, value: ir.Value, parts: Sequence[ir.Value]) -> ir.Value | None:
    if not parts:
        return None
    total = parts[0] if len(parts) == 1 else tape.op("Sum", parts)
    if total.type is None and value.dtype is not None and value.dtype.is_floating_point():
        total.type, total.shape = value.type, value.shape
    return total


def _seed(tape: Tape, loss: ir.Value) -> ir.Value:
    if loss.dtype is None or not loss.dtype.is_floating_point():
        raise InputError(f"the loss {loss.name!r} must be a float value of known type")
    dims = dims_of(loss)
    if dims is not None and all(isinstance(d, int) for d in dims):
        return tape.constant(np.ones(tuple(d or 0 for d in dims), loss.dtype.numpy()))
    return tape.op("Expand", [tape.scalar(1.0, loss), tape.shape(loss)])
