"""Rules of operators that combine operands value by value, broadcasting them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import onnx_ir as ir

from onnxcompress.operators import constant
from onnxcompress.train.rules.broadcasting import unbroadcast
from onnxcompress.train.rules.masks import inside
from onnxcompress.train.tape import (
    Gradients,
    Rule,
    Tape,
    dims_of,
    dtype_of,
    present,
    required,
)

Part = Callable[[], ir.Value]


def _operands(tape: Tape, node: ir.Node, *parts: Part) -> Gradients:
    """The gradient of each wanted operand, from its part of the result's shape."""
    return [
        unbroadcast(tape, part(), value, node.outputs[0])
        if value is not None and tape.wanted(value)
        else None
        for value, part in zip(node.inputs, parts, strict=False)
    ]


def add(tape: Tape, node: ir.Node, given: Gradients) -> Gradients:
    dy = _only(given)
    return _operands(tape, node, lambda: dy, lambda: dy)


def subtract(tape: Tape, node: ir.Node, given: Gradients) -> Gradients:
    dy = _only(given)
    return _operands(tape, node, lambda: dy, lambda: tape.op("Neg", [dy]))


def multiply(tape: Tape, node: ir.Node, given: Gradients) -> Gradients:
    dy, (a, b) = _only(given), node.inputs
    return _operands(tape, node, lambda: tape.op("Mul", [dy, b]), lambda: tape.op("Mul", [dy, a]))


def divide(tape: Tape, node: ir.Node, given: Gradients) -> Gradients:
    """d(a/b) = da/b - (a/b) db/b."""
    dy, b, y = _only(given), node.inputs[1], node.outputs[0]
    share = tape.op("Div", [dy, b])
    return _operands(
        tape, node, lambda: share, lambda: tape.op("Neg", [tape.op("Mul", [share, y])])
    )


def power(tape: Tape, node: ir.Node, given: Gradients) -> Gradients:
    """Of the base e·x^(e-1), of the exponent x^e·log x where x > 0 and nothing elsewhere."""
    dy, x, y = _only(given), required(node, 0), node.outputs[0]
    exponent = required(node, 1)

    def of_base() -> ir.Value:
        known = constant(exponent)
        if known is not None and known.size == 1 and dims_of(exponent) is not None:
            number = float(known.reshape(()))
            slope = x if number == 2 else tape.op("Pow", [x, tape.scalar(number - 1, x)])
            return tape.op("Mul", [dy, tape.op("Mul", [slope, tape.scalar(number, x)])])
        e = tape.cast(exponent, x)
        slope = tape.op("Pow", [x, tape.op("Sub", [e, tape.scalar(1, x)])])
        return tape.op("Mul", [dy, tape.op("Mul", [slope, e])])

    def of_exponent() -> ir.Value:
        positive = tape.op("Greater", [x, tape.scalar(0, x)])
        log = tape.op("Log", [tape.op("Where", [positive, x, tape.scalar(1, x)])])
        slope = tape.op("Mul", [y, log])
        return tape.cast(tape.op("Mul", [dy, slope]), exponent)

    return _operands(tape, node, of_base, of_exponent)


def where(tape: Tape, node: ir.Node, given: Gradients) -> Gradients:
    dy, condition = _only(given), node.inputs[0]
    zero = tape.scalar(0, node.outputs[0])
    return _operands(
        tape,
        node,
        lambda: dy,
        lambda: tape.op("Where", [condition, dy, zero]),
        lambda: tape.op("Where", [condition, zero, dy]),
    )


def total(tape: Tape, node: ir.Node, given: Gradients) -> Gradients:
    dy = _only(given)
    return _operands(tape, node, *[lambda: dy] * len(node.inputs))


def mean(tape: Tape, node: ir.Node, given: Gradients) -> Gradients:
    share = tape.scalar(1 / len(node.inputs), node.outputs[0])
    return total(tape, node, [tape.op("Mul", [_only(given), share])])


def extremum(tape: Tape, node: ir.Node, given: Gradients) -> Gradients:
    """Max and Min: operands that are equal to the result share its gradient evenly."""
    dy, y = _only(given), node.outputs[0]
    masks = [tape.cast(tape.op("Equal", [v, y]), y) for v in node.inputs]
    share = dy if len(masks) == 1 else tape.op("Div", [dy, tape.op("Sum", masks)])
    return _operands(tape, node, *[_times(tape, share, mask) for mask in masks])


def cast(tape: Tape, node: ir.Node, given: Gradients) -> Gradients:
    x = required(node, 0)
    if dtype_of(x) == dtype_of(node.outputs[0]):
        return given
    return [tape.cast(_only(given), x)]


def prelu(tape: Tape, node: ir.Node, given: Gradients) -> Gradients:
    """At zero the slope is that of the negative side."""
    dy, x, slope = _only(given), required(node, 0), required(node, 1)
    positive = tape.op("Greater", [x, tape.scalar(0, x)])
    zero = tape.scalar(0, x)
    return _operands(
        tape,
        node,
        lambda: tape.op("Where", [positive, dy, tape.op("Mul", [dy, slope])]),
        lambda: tape.op("Where", [positive, zero, tape.op("Mul", [dy, x])]),
    )


def clip(tape: Tape, node: ir.Node, given: Gradients) -> Gradients:
    """The input gets what passes strictly inside the bounds, each bound what it cut off.

    The result lies strictly inside where the input does, so the input need not be kept.
    """
    dy, y = _only(given), node.outputs[0]
    lower, upper = present(node, 1), present(node, 2)

    def kept() -> ir.Value:
        mask = inside(tape, y, lower, upper)
        return dy if mask is None else tape.op("Mul", [dy, mask])

    def cut(op_type: str, bound: ir.Value | None) -> Part:
        def part() -> ir.Value:
            beyond = tape.op(op_type, [required(node, 0), bound])
            return tape.op("Mul", [dy, tape.cast(beyond, y)])

        return part

    parts = (kept, cut("LessOrEqual", lower), cut("GreaterOrEqual", upper))
    return _operands(tape, node, *parts)


def _times(tape: Tape, a: ir.Value, b: ir.Value) -> Part:
    return lambda: tape.op("Mul", [a, b])


def _only(given: Gradients) -> ir.Value:
    """The gradient of the first output, which is there when a rule of one output is called."""
    (dy, *_) = given
    assert dy is not None
    return dy


RULES: Final[dict[str, Rule]] = {
    "Add": add,
    "Sub": subtract,
    "Mul": multiply,
    "Div": divide,
    "Pow": power,
    "Where": where,
    "Sum": total,
    "Mean": mean,
    "Max": extremum,
    "Min": extremum,
    "Cast": cast,
    "CastLike": cast,
    "PRelu": prelu,
    "Clip": clip,
}
