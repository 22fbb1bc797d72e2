"""Rules of quantization: rounding is passed straight through, saturation is not.

The gradient of a rounded value stands for that of what was rounded (Bengio, Léonard and Courville,
Estimating or Propagating Gradients Through Stochastic Neurons, 2013). Together the two rules give
a scale that both operators share the gradient of Esser et al., Learned Step Size Quantization
(2020): round(x/s) - x/s where x is represented and the bound where it saturates; a gradient scaled
by the number of values is for the optimizer to choose.
"""

from __future__ import annotations

from typing import Final

import onnx_ir as ir

from onnxcompress.train.rules.broadcasting import stated, sum_to
from onnxcompress.train.tape import (
    Gradients,
    Rule,
    Tape,
    Unsupported,
    dims_of,
    dtype_of,
    present,
    rank_of,
    required,
    sizes_of,
)

_RANGES: Final = {
    ir.DataType.UINT8: (0, 255),
    ir.DataType.INT8: (-128, 127),
    ir.DataType.UINT16: (0, 65535),
    ir.DataType.INT16: (-32768, 32767),
    ir.DataType.UINT4: (0, 15),
    ir.DataType.INT4: (-8, 7),
    ir.DataType.UINT2: (0, 3),
    ir.DataType.INT2: (-2, 1),
}


def quantize(tape: Tape, node: ir.Node, given: Gradients) -> Gradients:
    """y = saturate(round(x/s) + z): dy/s where the rounded value is in range, ends included.

    A value that is rounded to an end of the range is represented, so it gets its gradient: a
    weight at its row's maximum would otherwise never move.
    """
    dy, x, scale = given[0], required(node, 0), required(node, 1)
    share = tape.op("Div", [dy, _spread(tape, node, scale)])
    kept = tape.op("Mul", [share, tape.cast(_in_range(tape, node), x)])
    dscale = None
    if tape.wanted(scale):
        slope = tape.op("Div", [tape.op("Mul", [kept, x]), _spread(tape, node, scale)])
        dscale = _gathered(tape, node, tape.op("Neg", [slope]), scale)
    return [kept, dscale, None]


def dequantize(tape: Tape, node: ir.Node, given: Gradients) -> Gradients:
    """y = (x - z)·s."""
    dy, x, scale = given[0], required(node, 0), required(node, 1)
    dx = tape.op("Mul", [dy, _spread(tape, node, scale)]) if tape.wanted(x) else None
    dscale = None
    if tape.wanted(scale):
        steps = tape.cast(x, scale)
        zero = present(node, 2)
        if zero is not None:
            steps = tape.op("Sub", [steps, _spread(tape, node, tape.cast(zero, scale), scale)])
        dscale = _gathered(tape, node, tape.op("Mul", [dy, steps]), scale)
    return [dx, dscale, None]


def _in_range(tape: Tape, node: ir.Node) -> ir.Value:
    x, scale, zero = required(node, 0), required(node, 1), present(node, 2)
    low, high = _range(node)
    steps = tape.op("Round", [tape.op("Div", [x, _spread(tape, node, scale)])])
    if zero is not None:
        steps = tape.op("Add", [steps, _spread(tape, node, tape.cast(zero, x), scale)])
    above = tape.op("GreaterOrEqual", [steps, tape.scalar(low, x)])
    below = tape.op("LessOrEqual", [steps, tape.scalar(high, x)])
    return tape.op("And", [above, below])


def _range(node: ir.Node) -> tuple[int, int]:
    dtype = dtype_of(node.outputs[0])
    if dtype not in _RANGES:
        raise Unsupported(f"it quantizes to {dtype.name.lower()}")
    return _RANGES[dtype]


def _spread(tape: Tape, node: ir.Node, value: ir.Value, like: ir.Value | None = None) -> ir.Value:
    """A scale or zero point, of the shape of `like`, so that it broadcasts to the data."""
    like, rank = like or value, rank_of(required(node, 0))
    if node.attributes.get_int("block_size", 0):
        axis, sizes, size = _blocks(node, like)
        apart = tape.op("Unsqueeze", [value, tape.ints(axis + 1)])
        each = tape.op("Expand", [apart, tape.ints(*sizes)])
        whole = tape.op("Reshape", [each, tape.ints(*sizes[:axis], -1, *sizes[axis + 2 :])])
        if size == sizes[axis] * sizes[axis + 1]:
            return whole
        return tape.op("Slice", [whole, tape.ints(0), tape.ints(size), tape.ints(axis)])
    if rank_of(like) == 0 or sizes_of(like) == (1,):
        return value
    shape = [1] * rank
    shape[node.attributes.get_int("axis", 1) % rank] = -1
    return tape.op("Reshape", [value, tape.ints(*shape)])


def _blocks(node: ir.Node, scale: ir.Value) -> tuple[int, list[int], int]:
    """The axis of blocks, sizes with that axis split in blocks and within them, and its own."""
    dims, block = sizes_of(scale), node.attributes.get_int("block_size", 0)
    axis = node.attributes.get_int("axis", 1) % len(dims)
    size = (dims_of(required(node, 0)) or ())[axis]
    if size is None:
        raise Unsupported("its blocks lie along an axis whose size is known at run time only")
    return axis, [*dims[: axis + 1], block, *dims[axis + 1 :]], size


def _gathered(tape: Tape, node: ir.Node, gradient: ir.Value, scale: ir.Value) -> ir.Value:
    """The gradient of each value's scale, summed over the values that share it."""
    if node.attributes.get_int("block_size", 0):
        axis, sizes, size = _blocks(node, scale)
        if missing := sizes[axis] * sizes[axis + 1] - size:
            ends = [0] * (2 * len(sizes) - 2)
            ends[len(sizes) - 1 + axis] = missing
            gradient = tape.op("Pad", [gradient, tape.ints(*ends)])
        apart = tape.op("Reshape", [gradient, tape.ints(*sizes)])
        return tape.op("ReduceSum", [apart, tape.ints(axis + 1)], {"keepdims": 0})
    x = required(node, 0)
    if rank_of(scale) == 0 or sizes_of(scale) == (1,):
        return sum_to(tape, gradient, scale, stated(x))
    axis = node.attributes.get_int("axis", 1) % rank_of(x)
    others = [a for a in range(rank_of(x)) if a != axis]
    return tape.op("ReduceSum", [gradient, tape.ints(*others)], {"keepdims": 0})


RULES: Final[dict[str, Rule]] = {"QuantizeLinear": quantize, "DequantizeLinear": dequantize}
