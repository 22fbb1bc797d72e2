"""Undoing a broadcast: the gradient of an operand is summed over the axes that it was spread on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnxcompress.train.tape import Tape

Dims = Sequence[int | str | None]


def unbroadcast(tape: Tape, gradient: ir.Value, operand: ir.Value, result: ir.Value) -> ir.Value:
    """`gradient`, of the shape of `result`, summed to the shape of `operand`."""
    return sum_to(tape, gradient, operand, stated(result))


def sum_to(tape: Tape, gradient: ir.Value, operand: ir.Value, outer: Dims | None) -> ir.Value:
    """`gradient`, of sizes `outer`, summed to the shape of `operand`.

    Known sizes tell the axes; where an axis is known at run time only, and the other's is not
    the same one, the graph finds out. `outer` None: nothing is known of the gradient's shape.

    Source: multidirectional broadcasting of the ONNX operator specification.
    """
    inner = stated(operand)
    if inner is None or outer is None:
        return _at_run_time(tape, gradient, operand)
    lead = len(outer) - len(inner)
    spread = [_spread(i, o) for i, o in zip(inner, outer[lead:], strict=True)]
    if None in spread:
        return _at_run_time(tape, gradient, operand)
    axes = [lead + axis for axis, is_spread in enumerate(spread) if is_spread]
    if not axes and not lead:
        return gradient
    every = tape.ints(*range(lead), *axes)
    summed = tape.op("ReduceSum", [gradient, every], {"keepdims": 1 if axes else 0})
    return tape.op("Squeeze", [summed, tape.ints(*range(lead))]) if axes and lead else summed


def stated(value: ir.Value) -> Dims | None:
    """The sizes of a value's axes, as numbers or by name; None without a rank."""
    if value.const_value is not None:
        return value.const_value.shape.numpy()
    if value.shape is None:
        return None
    return [d if isinstance(d, int) else d.value for d in value.shape]


def _spread(inner: int | str | None, outer: int | str | None) -> bool | None:
    """Whether an axis was spread; None where only a run can tell."""
    if inner == 1:
        return outer != 1
    if isinstance(inner, int) or (inner is not None and inner == outer):
        return False
    return None if outer != 1 else False


def _at_run_time(tape: Tape, gradient: ir.Value, operand: ir.Value) -> ir.Value:
    shape, full = tape.shape(operand), tape.op("Shape", [gradient])
    lead = tape.op("Sub", [tape.op("Shape", [full]), tape.op("Shape", [shape])])
    padded = tape.op("Pad", [shape, tape.join(lead, 0), tape.constant(np.array(1, np.int64))])
    is_one = tape.op("Equal", [padded, tape.ints(1)])
    axes = tape.op("Reshape", [tape.op("NonZero", [is_one]), tape.ints(-1)])
    options = {"keepdims": 1, "noop_with_empty_axes": 1}
    return tape.reshape_like(tape.op("ReduceSum", [gradient, axes], options), operand)
