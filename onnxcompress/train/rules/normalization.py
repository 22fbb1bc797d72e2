"""Rules of normalization by statistics of the values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import onnx_ir as ir

from onnxcompress.train.rules.broadcasting import unbroadcast
from onnxcompress.train.tape import (
    Gradients,
    Rule,
    Tape,
    Unsupported,
    dtype_of,
    present,
    rank_of,
    required,
    sizes_of,
)


@dataclass(frozen=True, slots=True)
class Normalized:
    """Values brought to mean 0 (where `centred`) and variance 1 along `axes`."""

    values: ir.Value
    inverse: ir.Value
    """One over the standard deviation."""
    axes: tuple[int, ...]
    centred: bool = True

    def gradient(self, tape: Tape, dy: ir.Value) -> ir.Value:
        """Of what was normalized, given that of the normalized values.

        inverse·(dy - mean(dy) - v·mean(dy·v)); source: Ioffe and Szegedy, Batch Normalization
        (2015); Ba, Kiros and Hinton, Layer Normalization (2016).
        """
        axes, keep = tape.ints(*self.axes), {"keepdims": 1}
        along = tape.op("ReduceMean", [tape.op("Mul", [dy, self.values]), axes], keep)
        rest = tape.op("Sub", [dy, tape.op("Mul", [self.values, along])])
        if self.centred:
            rest = tape.op("Sub", [rest, tape.op("ReduceMean", [dy, axes], keep)])
        return tape.op("Mul", [rest, self.inverse])


def normalized(
    tape: Tape, x: ir.Value, axes: Sequence[int], epsilon: float, *, centred: bool = True
) -> Normalized:
    """`x` normalized anew: the operator does not give what its gradient needs."""
    where, keep = tape.ints(*axes), {"keepdims": 1}
    rest = tape.op("Sub", [x, tape.op("ReduceMean", [x, where], keep)]) if centred else x
    variance = tape.op("ReduceMean", [tape.op("Mul", [rest, rest]), where], keep)
    deviation = tape.op("Sqrt", [tape.op("Add", [variance, tape.scalar(epsilon, x)])])
    inverse = tape.op("Reciprocal", [deviation])
    return Normalized(tape.op("Mul", [rest, inverse]), inverse, tuple(axes), centred)


def layer_normalization(tape: Tape, node: ir.Node, given: Gradients) -> Gradients:
    """The operator's own mean and inverse deviation serve again."""
    dy, x, scale = given[0], required(node, 0), required(node, 1)
    assert dy is not None
    rank = rank_of(x)
    axes = tuple(range(node.attributes.get_int("axis", -1) % rank, rank))
    if dtype_of(x) == ir.DataType.FLOAT:
        mean, inverse = tape.output(node, 1), tape.output(node, 2)
        values = tape.op("Mul", [tape.op("Sub", [x, mean]), inverse])
        norm = Normalized(values, inverse, axes)
    else:
        norm = normalized(tape, x, axes, node.attributes.get_float("epsilon", 1e-5))
    return _scaled(tape, node, norm, dy, scale)


def rms_normalization(tape: Tape, node: ir.Node, given: Gradients) -> Gradients:
    """Source: Zhang and Sennrich, Root Mean Square Layer Normalization (2019)."""
    dy, x, scale = given[0], required(node, 0), required(node, 1)
    assert dy is not None
    rank = rank_of(x)
    axes = range(node.attributes.get_int("axis", -1) % rank, rank)
    epsilon = node.attributes.get_float("epsilon", 1e-5)
    norm = normalized(tape, x, axes, epsilon, centred=False)
    return _scaled(tape, node, norm, dy, scale)


def _scaled(
    tape: Tape, node: ir.Node, norm: Normalized, dy: ir.Value, scale: ir.Value
) -> Gradients:
    """Gradients of x, scale and bias, where these broadcast to the result."""
    x, y, bias = required(node, 0), node.outputs[0], present(node, 2)
    dx = dscale = dbias = None
    if tape.wanted(x):
        dx = norm.gradient(tape, tape.op("Mul", [dy, scale]))
    if tape.wanted(scale):
        dscale = unbroadcast(tape, tape.op("Mul", [dy, norm.values]), scale, y)
    if bias is not None and tape.wanted(bias):
        dbias = unbroadcast(tape, dy, bias, y)
    return [dx, dscale, dbias]


def batch_normalization(tape: Tape, node: ir.Node, given: Gradients) -> Gradients:
    """With the statistics that it is given, or in training mode those of the batch."""
    if any(g is not None for g in given[1:]):
        raise Unsupported("its running statistics have no gradient")
    dy, x = given[0], required(node, 0)
    assert dy is not None
    rank, epsilon = rank_of(x), node.attributes.get_float("epsilon", 1e-5)
    if node.attributes.get_int("training_mode", 0):
        if node.attributes.get_float("momentum", 0.9) == 0:
            return [*_with_statistics_of_batch(tape, node, dy, epsilon), None, None]
        norm = normalized(tape, x, (0, *range(2, rank)), epsilon)
        return [*_per_channel(tape, node, norm, dy), None, None]
    return _with_given_statistics(tape, node, dy, epsilon)


def _with_statistics_of_batch(tape: Tape, node: ir.Node, dy: ir.Value, epsilon: float) -> Gradients:
    """Without momentum the running statistics that the operator gives are the batch's own.

    With v = (x - mean) / d and sums over the m values of a channel,
    dx = scale / d · (dy - (Σ dy + v · Σ dy·v) / m). What is affine in each channel is written as a
    normalization by given statistics, which is one pass over the values.
    """
    x, scale = required(node, 0), required(node, 1)
    mean, variance = tape.output(node, 1), tape.output(node, 2)
    one, zero, others = tape.scalar(1.0, scale), tape.zeros(scale), (0, *range(2, rank_of(x)))
    ones = tape.op("Expand", [one, tape.shape(scale)])
    values = tape.op(
        "BatchNormalization", [x, ones, zero, mean, variance], {"epsilon": epsilon}, like=x
    )
    dscale = _over(tape, tape.op("Mul", [dy, values]), others)
    dbias = _over(tape, dy, others)
    dx = None
    if tape.wanted(x):
        count = tape.op("Div", [tape.op("Size", [x]), tape.op("Size", [scale])])
        each = tape.cast(count, scale)
        along, level = (tape.op("Div", [total, each]) for total in (dscale, dbias))
        rest = tape.op("Sub", [dy, tape.op("Mul", [values, _column(tape, along, rank_of(x))])])
        dx = tape.op(
            "BatchNormalization", [rest, scale, zero, level, variance], {"epsilon": epsilon}
        )
    return [dx, dscale, dbias]


def _with_given_statistics(tape: Tape, node: ir.Node, dy: ir.Value, epsilon: float) -> Gradients:
    """y = scale·v + bias with v = (x - mean) / d and d = √(variance + epsilon)."""
    x, *vectors = (required(node, i) for i in range(5))
    rank = rank_of(x)
    scale, _, mean, variance = (_column(tape, v, rank) for v in vectors)
    deviation = tape.op("Sqrt", [tape.op("Add", [variance, tape.scalar(epsilon, x)])])
    values = tape.op("Div", [tape.op("Sub", [x, mean]), deviation])
    dx = tape.op("Mul", [dy, tape.op("Div", [scale, deviation])])
    parts: list[Callable[[], ir.Value]] = [
        lambda: tape.op("Mul", [dy, values]),
        lambda: dy,
        lambda: tape.op("Neg", [dx]),
        lambda: tape.op("Div", [tape.op("Mul", [dx, values]), tape.op("Mul", [deviation, twice])]),
    ]
    twice = tape.scalar(-2, x)
    others = (0, *range(2, rank))
    pairs = zip(vectors, parts, strict=True)
    return [dx, *(_over(tape, part(), others) if tape.wanted(v) else None for v, part in pairs)]


def instance_normalization(tape: Tape, node: ir.Node, given: Gradients) -> Gradients:
    """Source: Ulyanov, Vedaldi and Lempitsky, Instance Normalization (2016)."""
    dy, x = given[0], required(node, 0)
    assert dy is not None
    axes = range(2, rank_of(x))
    norm = normalized(tape, x, axes, node.attributes.get_float("epsilon", 1e-5))
    return _per_channel(tape, node, norm, dy)


def _per_channel(tape: Tape, node: ir.Node, norm: Normalized, dy: ir.Value) -> Gradients:
    """Gradients of x, scale and bias, with one scale and bias for each channel."""
    x, scale = required(node, 0), required(node, 1)
    rank = rank_of(x)
    others = (0, *range(2, rank))
    dx = dscale = dbias = None
    if tape.wanted(x):
        dx = norm.gradient(tape, tape.op("Mul", [dy, _column(tape, scale, rank)]))
    if tape.wanted(scale):
        dscale = _over(tape, tape.op("Mul", [dy, norm.values]), others)
    if tape.wanted(required(node, 2)):
        dbias = _over(tape, dy, others)
    return [dx, dscale, dbias]


def group_normalization(tape: Tape, node: ir.Node, given: Gradients) -> Gradients:
    """Channels in groups are normalized together; until opset 20 a group has one scale and bias.

    Source: Wu and He, Group Normalization (2018); ONNX GroupNormalization 18 and 21.
    """
    dy, x, scale = given[0], required(node, 0), required(node, 1)
    assert dy is not None
    groups, (entries,) = node.attributes.get_int("num_groups", 1), sizes_of(scale)
    each = entries // groups
    inner = tape.ints(0, groups, -1) if each == 1 else tape.ints(0, groups, each, -1)
    split = tape.op("Reshape", [x, inner])
    split.type = x.type
    given_split = tape.op("Reshape", [dy, inner])
    axes = (2,) if each == 1 else (2, 3)
    norm = normalized(tape, split, axes, node.attributes.get_float("epsilon", 1e-5))
    column = tape.ints(1, groups, 1) if each == 1 else tape.ints(1, groups, each, 1)
    outer = (0, len(axes) + 1)
    dx = dscale = dbias = None
    if tape.wanted(x):
        scaled = tape.op("Mul", [given_split, tape.op("Reshape", [scale, column])])
        dx = tape.reshape_like(norm.gradient(tape, scaled), x)
    if tape.wanted(scale):
        dscale = _over(tape, tape.op("Mul", [given_split, norm.values]), outer)
        dscale = tape.op("Reshape", [dscale, tape.ints(-1)])
    if tape.wanted(required(node, 2)):
        dbias = tape.op("Reshape", [_over(tape, given_split, outer), tape.ints(-1)])
    return [dx, dscale, dbias]


def _column(tape: Tape, vector: ir.Value, rank: int) -> ir.Value:
    """One value a channel, where channels lie on the second axis."""
    return tape.op("Reshape", [vector, tape.ints(1, -1, *[1] * (rank - 2))])


def _over(tape: Tape, value: ir.Value, axes: Sequence[int]) -> ir.Value:
    return tape.op("ReduceSum", [value, tape.ints(*axes)], {"keepdims": 0})


RULES: Final[dict[str, Rule]] = {
    "LayerNormalization": layer_normalization,
    "RMSNormalization": rms_normalization,
    "BatchNormalization": batch_normalization,
    "InstanceNormalization": instance_normalization,
    "GroupNormalization": group_normalization,
}
