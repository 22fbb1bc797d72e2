"""Rules of reductions along axes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import onnx_ir as ir

from onnxcompress.operators import constant
from onnxcompress.train.tape import (
    Gradients,
    Rule,
    Tape,
    Unsupported,
    dims_of,
    present,
    rank_of,
    required,
)

Spread = Callable[[Tape, ir.Node, ir.Value, ir.Value], ir.Value]
"""From the gradient and the result, both with the reduced axes kept, to the gradient of x."""


def _reduction(spread: Spread) -> Rule:
    def rule(tape: Tape, node: ir.Node, given: Gradients) -> Gradients:
        dy, y = (_kept(tape, node, v) for v in (given[0], node.outputs[0]))
        return [spread(tape, node, dy, y)]

    return rule


def _takes_all(node: ir.Node) -> bool:
    return present(node, 1) is None and not node.attributes.get_int("noop_with_empty_axes", 0)


def axes_of(node: ir.Node) -> tuple[int, ...]:
    """The axes that a reduction sums over, counted from the left."""
    rank, given = rank_of(required(node, 0)), present(node, 1)
    if given is None:
        found = ()
    else:
        known = constant(given)
        if known is None:
            raise Unsupported("its axes are known at run time only")
        found = tuple(int(a) % rank for a in known.reshape(-1))
    if not found and not node.attributes.get_int("noop_with_empty_axes", 0):
        return tuple(range(rank))
    return found


def _kept(tape: Tape, node: ir.Node, value: ir.Value | None) -> ir.Value:
    """`value`, of the result's shape, with the reduced axes as axes of size 1."""
    assert value is not None
    if node.attributes.get_int("keepdims", 1) or _takes_all(node):
        return value  # a scalar broadcasts as it is
    axes = axes_of(node)
    if not axes:
        return value
    return tape.op("Unsqueeze", [value, tape.ints(*axes)])


def _expanded(tape: Tape, node: ir.Node, dy: ir.Value) -> ir.Value:
    return tape.op("Expand", [dy, tape.shape(required(node, 0))])


def _sum(tape: Tape, node: ir.Node, dy: ir.Value, y: ir.Value) -> ir.Value:
    return _expanded(tape, node, dy)


def _mean(tape: Tape, node: ir.Node, dy: ir.Value, y: ir.Value) -> ir.Value:
    x = required(node, 0)
    if _takes_all(node) and dims_of(x) is None:
        number = tape.cast(tape.op("Size", [x]), x)
    else:
        number = count(tape, x, axes_of(node))
    return _expanded(tape, node, tape.op("Div", [dy, number]))


def count(tape: Tape, x: ir.Value, axes: tuple[int, ...]) -> ir.Value:
    """How many elements of `x` lie along `axes`, as a scalar of its type."""
    dims = dims_of(x)
    number = 1
    for axis in axes:
        size = None if dims is None else dims[axis]
        if size is None:
            sizes = tape.op("Gather", [tape.shape(x), tape.ints(*axes)])
            product = tape.op("ReduceProd", [sizes], {"keepdims": 0})
            return tape.cast(product, x)
        number *= size
    return tape.scalar(number, x)


def _extremum(tape: Tape, node: ir.Node, dy: ir.Value, y: ir.Value) -> ir.Value:
    """Equal extremes share evenly."""
    x = required(node, 0)
    mask = tape.cast(tape.op("Equal", [x, y]), x)
    sharers = tape.op("ReduceSum", [mask, *node.inputs[1:]], {**node.attributes, "keepdims": 1})
    return tape.op("Mul", [mask, tape.op("Div", [dy, sharers])])


def _l1(tape: Tape, node: ir.Node, dy: ir.Value, y: ir.Value) -> ir.Value:
    return tape.op("Mul", [dy, tape.op("Sign", [required(node, 0)])])


def _l2(tape: Tape, node: ir.Node, dy: ir.Value, y: ir.Value) -> ir.Value:
    """x/y; nothing where the norm is zero."""
    x = required(node, 0)
    zero = tape.scalar(0, x)
    share = tape.op("Where", [tape.op("Equal", [y, zero]), zero, tape.op("Div", [dy, y])])
    return tape.op("Mul", [x, share])


def _square(tape: Tape, node: ir.Node, dy: ir.Value, y: ir.Value) -> ir.Value:
    x = required(node, 0)
    return tape.op("Mul", [x, tape.op("Mul", [dy, tape.scalar(2, x)])])


def _log_sum(tape: Tape, node: ir.Node, dy: ir.Value, y: ir.Value) -> ir.Value:
    return _expanded(tape, node, tape.op("Div", [dy, tape.op("Exp", [y])]))


def _log_sum_exp(tape: Tape, node: ir.Node, dy: ir.Value, y: ir.Value) -> ir.Value:
    share = tape.op("Exp", [tape.op("Sub", [required(node, 0), y])])
    return tape.op("Mul", [dy, share])


_SPREADS: Final[dict[str, Spread]] = {
    "ReduceSum": _sum,
    "ReduceMean": _mean,
    "ReduceMax": _extremum,
    "ReduceMin": _extremum,
    "ReduceL1": _l1,
    "ReduceL2": _l2,
    "ReduceSumSquare": _square,
    "ReduceLogSum": _log_sum,
    "ReduceLogSumExp": _log_sum_exp,
}

RULES: Final[dict[str, Rule]] = {name: _reduction(spread) for name, spread in _SPREADS.items()}
