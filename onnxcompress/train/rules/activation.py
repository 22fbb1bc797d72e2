"""Rules of functions of one operand, value by value, and of Softmax along an axis."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import onnx_ir as ir

from onnxcompress.train.rules.masks import inside, positive
from onnxcompress.train.tape import Gradients, Rule, Tape, dtype_of, required

Slope = Callable[[Tape, ir.Node, ir.Value, ir.Value], ir.Value]
"""The derivative of a node at its input x, given its output y too."""


def _pointwise(slope: Slope) -> Rule:
    def rule(tape: Tape, node: ir.Node, given: Gradients) -> Gradients:
        dy = given[0]
        assert dy is not None
        return [tape.op("Mul", [dy, slope(tape, node, required(node, 0), node.outputs[0])])]

    return rule


def _relu(tape: Tape, node: ir.Node, x: ir.Value, y: ir.Value) -> ir.Value:
    """The output is above zero where the input is, so the input need not be kept."""
    return positive(tape, y, x)


def _leaky_relu(tape: Tape, node: ir.Node, x: ir.Value, y: ir.Value) -> ir.Value:
    alpha = tape.scalar(_alpha(node, 0.01), x)
    return tape.op("Where", [_is_positive(tape, x), tape.scalar(1, x), alpha])


def _thresholded_relu(tape: Tape, node: ir.Node, x: ir.Value, y: ir.Value) -> ir.Value:
    return tape.cast(tape.op("Greater", [x, tape.scalar(_alpha(node, 1.0), x)]), x)


def _elu(tape: Tape, node: ir.Node, x: ir.Value, y: ir.Value) -> ir.Value:
    """y + alpha where x <= 0, as y = alpha (e^x - 1) there."""
    below = tape.op("Add", [y, tape.scalar(_alpha(node, 1.0), x)])
    return tape.op("Where", [_is_positive(tape, x), tape.scalar(1, x), below])


def _selu(tape: Tape, node: ir.Node, x: ir.Value, y: ir.Value) -> ir.Value:
    alpha = _alpha(node, 1.67326319217681884765625)
    gamma = node.attributes.get_float("gamma", 1.05070102214813232421875)
    below = tape.op("Add", [y, tape.scalar(alpha * gamma, x)])
    return tape.op("Where", [_is_positive(tape, x), tape.scalar(gamma, x), below])


def _celu(tape: Tape, node: ir.Node, x: ir.Value, y: ir.Value) -> ir.Value:
    below = tape.op("Exp", [tape.op("Div", [x, tape.scalar(_alpha(node, 1.0), x)])])
    return tape.op("Where", [_is_positive(tape, x), tape.scalar(1, x), below])


def _sigmoid(tape: Tape, node: ir.Node, x: ir.Value, y: ir.Value) -> ir.Value:
    return tape.op("Mul", [y, tape.op("Sub", [tape.scalar(1, x), y])])


def _tanh(tape: Tape, node: ir.Node, x: ir.Value, y: ir.Value) -> ir.Value:
    return tape.op("Sub", [tape.scalar(1, x), tape.op("Mul", [y, y])])


def _hard_sigmoid(tape: Tape, node: ir.Node, x: ir.Value, y: ir.Value) -> ir.Value:
    alpha = _alpha(node, 0.2)
    return tape.op("Mul", [_within(tape, y, 0, 1), tape.scalar(alpha, x)])


def _hard_swish(tape: Tape, node: ir.Node, x: ir.Value, y: ir.Value) -> ir.Value:
    """x·h(x) with h = HardSigmoid(x/6 + 1/2): h + x·h'."""
    h = tape.op("HardSigmoid", [x], {"alpha": 1 / 6, "beta": 0.5}, like=x)
    ramp = tape.op("Mul", [x, tape.scalar(1 / 6, x)])
    return tape.op("Add", [h, tape.op("Mul", [_within(tape, h, 0, 1), ramp])])


def _swish(tape: Tape, node: ir.Node, x: ir.Value, y: ir.Value) -> ir.Value:
    """s + alpha·x·s·(1 - s) with s = Sigmoid(alpha·x)."""
    scaled = tape.op("Mul", [x, tape.scalar(_alpha(node, 1.0), x)])
    s = tape.op("Sigmoid", [scaled])
    rest = tape.op("Sub", [tape.scalar(1, x), s])
    return tape.op("Mul", [s, tape.op("Add", [tape.scalar(1, x), tape.op("Mul", [scaled, rest])])])


def _mish(tape: Tape, node: ir.Node, x: ir.Value, y: ir.Value) -> ir.Value:
    """t + x·(1 - t²)·Sigmoid(x) with t = tanh(Softplus(x))."""
    t = tape.op("Tanh", [tape.op("Softplus", [x])])
    falling = tape.op("Sub", [tape.scalar(1, x), tape.op("Mul", [t, t])])
    bend = tape.op("Mul", [falling, tape.op("Mul", [x, tape.op("Sigmoid", [x])])])
    return tape.op("Add", [t, bend])


def _softplus(tape: Tape, node: ir.Node, x: ir.Value, y: ir.Value) -> ir.Value:
    return tape.op("Sigmoid", [x])


def _softsign(tape: Tape, node: ir.Node, x: ir.Value, y: ir.Value) -> ir.Value:
    root = tape.op("Reciprocal", [tape.op("Add", [tape.op("Abs", [x]), tape.scalar(1, x)])])
    return tape.op("Mul", [root, root])


def _erf(tape: Tape, node: ir.Node, x: ir.Value, y: ir.Value) -> ir.Value:
    bell = tape.op("Exp", [tape.op("Neg", [tape.op("Mul", [x, x])])])
    return tape.op("Mul", [bell, tape.scalar(2 / math.sqrt(math.pi), x)])


def _gelu(tape: Tape, node: ir.Node, x: ir.Value, y: ir.Value) -> ir.Value:
    """x·F(x): F + x·F', with the normal distribution F or its approximation by tanh.

    Source: Hendrycks and Gimpel, Gaussian Error Linear Units (2016); ONNX Gelu.
    """
    if node.attributes.get_string("approximate", "none") == "tanh":
        return _gelu_tanh(tape, x)
    part = tape.op("Mul", [x, tape.scalar(math.sqrt(0.5), x)])
    share = _halfway(tape, tape.op("Erf", [part]), x)
    # With t = x/√2, x·F' is t·e^(ln(1/√π) - t²): the factor costs nothing in the exponent.
    factor = tape.scalar(-0.5 * math.log(math.pi), x)
    exponent = tape.op("Sub", [factor, tape.op("Mul", [part, part])])
    return tape.op("Add", [share, tape.op("Mul", [part, tape.op("Exp", [exponent])])])


def _halfway(tape: Tape, value: ir.Value, like: ir.Value) -> ir.Value:
    """(1 + value)/2, of what lies between -1 and 1."""
    if dtype_of(like) == ir.DataType.FLOAT:
        return tape.op("HardSigmoid", [value], {"alpha": 0.5, "beta": 0.5})
    half = tape.scalar(0.5, like)
    return tape.op("Add", [tape.op("Mul", [value, half]), half])


def _gelu_tanh(tape: Tape, x: ir.Value) -> ir.Value:
    root, cubic = math.sqrt(2 / math.pi), 0.044715
    one, square = tape.scalar(1, x), tape.op("Mul", [x, x])
    inner = tape.op("Add", [tape.op("Mul", [square, tape.scalar(root * cubic, x)]), _root(tape, x)])
    t = tape.op("Tanh", [tape.op("Mul", [x, inner])])
    slope = tape.op("Mul", [square, tape.scalar(3 * root * cubic, x)])
    rise = tape.op("Mul", [x, tape.op("Add", [slope, _root(tape, x)])])
    falling = tape.op("Sub", [one, tape.op("Mul", [t, t])])
    doubled = tape.op("Add", [tape.op("Add", [one, t]), tape.op("Mul", [falling, rise])])
    return tape.op("Mul", [doubled, tape.scalar(0.5, x)])


def _root(tape: Tape, x: ir.Value) -> ir.Value:
    return tape.scalar(math.sqrt(2 / math.pi), x)


def _exp(tape: Tape, node: ir.Node, x: ir.Value, y: ir.Value) -> ir.Value:
    return y


def _log(tape: Tape, node: ir.Node, x: ir.Value, y: ir.Value) -> ir.Value:
    return tape.op("Reciprocal", [x])


def _sqrt(tape: Tape, node: ir.Node, x: ir.Value, y: ir.Value) -> ir.Value:
    return tape.op("Div", [tape.scalar(0.5, x), y])


def _reciprocal(tape: Tape, node: ir.Node, x: ir.Value, y: ir.Value) -> ir.Value:
    return tape.op("Neg", [tape.op("Mul", [y, y])])


def _abs(tape: Tape, node: ir.Node, x: ir.Value, y: ir.Value) -> ir.Value:
    return tape.op("Sign", [x])


def _sin(tape: Tape, node: ir.Node, x: ir.Value, y: ir.Value) -> ir.Value:
    return tape.op("Cos", [x])


def _cos(tape: Tape, node: ir.Node, x: ir.Value, y: ir.Value) -> ir.Value:
    return tape.op("Neg", [tape.op("Sin", [x])])


def negate(tape: Tape, node: ir.Node, given: Gradients) -> Gradients:
    return [tape.op("Neg", [given[0]])]


def softmax(tape: Tape, node: ir.Node, given: Gradients) -> Gradients:
    """y·(dy - Σ dy·y)."""
    dy, y = given[0], node.outputs[0]
    weighted = tape.op("Mul", [dy, y])
    total = _along_axis(tape, node, weighted)
    return [tape.op("Sub", [weighted, tape.op("Mul", [y, total])])]


def log_softmax(tape: Tape, node: ir.Node, given: Gradients) -> Gradients:
    """dy - e^y·Σ dy."""
    dy, y = given[0], node.outputs[0]
    assert dy is not None
    share = tape.op("Mul", [tape.op("Exp", [y]), _along_axis(tape, node, dy)])
    return [tape.op("Sub", [dy, share])]


def _along_axis(tape: Tape, node: ir.Node, value: ir.Value) -> ir.Value:
    axis = node.attributes.get_int("axis", -1)
    return tape.op("ReduceSum", [value, tape.ints(axis)], {"keepdims": 1})


def _alpha(node: ir.Node, default: float) -> float:
    return node.attributes.get_float("alpha", default)


def _is_positive(tape: Tape, x: ir.Value) -> ir.Value:
    return tape.op("Greater", [x, tape.scalar(0, x)])


def _within(tape: Tape, y: ir.Value, low: float, high: float) -> ir.Value:
    """1 where y lies strictly between the bounds, 0 elsewhere."""
    mask = inside(tape, y, tape.scalar(low, y), tape.scalar(high, y))
    assert mask is not None
    return mask


_SLOPES: Final[dict[str, Slope]] = {
    "Relu": _relu,
    "LeakyRelu": _leaky_relu,
    "ThresholdedRelu": _thresholded_relu,
    "Elu": _elu,
    "Selu": _selu,
    "Celu": _celu,
    "Sigmoid": _sigmoid,
    "Tanh": _tanh,
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _hard_swish,
    "Swish": _swish,
    "Mish": _mish,
    "Softplus": _softplus,
    "Softsign": _softsign,
    "Erf": _erf,
    "Gelu": _gelu,
    "Exp": _exp,
    "Log": _log,
    "Sqrt": _sqrt,
    "Reciprocal": _reciprocal,
    "Abs": _abs,
    "Sin": _sin,
    "Cos": _cos,
}

RULES: Final[dict[str, Rule]] = {name: _pointwise(slope) for name, slope in _SLOPES.items()} | {
    "Neg": negate,
    "Softmax": softmax,
    "LogSoftmax": log_softmax,
}
