"""Rule of Resize: what it makes of the unit vectors of an axis is its matrix along that axis."""

from __future__ import annotations

from typing import Final

import numpy as np
import onnx_ir as ir

from onnxcompress.operators import constant
from onnxcompress.train.tape import (
    Gradients,
    Rule,
    Tape,
    Unsupported,
    dtype_of,
    present,
    required,
    sizes_of,
)


def resize(tape: Tape, node: ir.Node, given: Gradients) -> Gradients:
    """dX = Rᵀ·dY along each axis in turn, as every mode works on axes one by one.

    R is the operator itself, with its attributes, on the identity matrix.

    Source: ONNX Resize.
    """
    (dy,), x = given, required(node, 0)
    assert dy is not None
    before, after = sizes_of(x), sizes_of(node.outputs[0])
    _check(node)
    scales = _scales(node, before, after)
    rank = len(before)
    for axis in range(rank):
        if scales[axis] != 1 or before[axis] != after[axis]:
            matrix = _matrix(tape, node, axis, before[axis], after[axis], scales[axis])
            last = [a for a in range(rank) if a != axis] + [axis]
            turned = tape.op("Transpose", [dy], {"perm": last})
            product = tape.op("MatMul", [turned, matrix])
            dy = tape.op("Transpose", [product], {"perm": np.argsort(last).tolist()})
    return [dy]


def _check(node: ir.Node) -> None:
    attributes = node.attributes
    if attributes.get_string("coordinate_transformation_mode", "") == "tf_crop_and_resize":
        raise Unsupported("it crops")
    if attributes.get_string("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise Unsupported("it chooses its sizes")


def _scales(
    node: ir.Node, before: tuple[int, ...], after: tuple[int, ...]
) -> tuple[float | None, ...]:
    """The scale of each axis; None where its size was given instead."""
    value = present(node, 2)
    axes = [a % len(before) for a in node.attributes.get_ints("axes", range(len(before)))]
    found: list[float | None] = [1.0] * len(before)
    known = constant(value)
    if value is not None and known is None:
        raise Unsupported("its scales are known at run time only")
    for index, axis in enumerate(axes):
        if known is not None and known.size:
            found[axis] = float(known[index])
        elif before[axis] != after[axis]:
            found[axis] = None
    return tuple(found)


def _matrix(
    tape: Tape, node: ir.Node, axis: int, before: int, after: int, scale: float | None
) -> ir.Value:
    """(after, before): how much each result took of each value."""
    dtype = dtype_of(required(node, 0)).numpy()
    names = ("mode", "coordinate_transformation_mode", "nearest_mode", "cubic_coeff_a")
    names = (*names, "antialias", "exclude_outside", "extrapolation_value")
    options = {name: node.attributes[name] for name in names if name in node.attributes}
    unit = tape.constant(np.eye(before, dtype=dtype)[None, None])
    if scale is None:
        sizes = tape.ints(1, 1, before, after)
        image = tape.op("Resize", [unit, None, None, sizes], options)
    else:
        scales = tape.constant(np.array([1, 1, 1, scale], np.float32))
        image = tape.op("Resize", [unit, None, scales], options)
    image = tape.op("Squeeze", [image, tape.ints(0, 1)])
    return tape.op("Transpose", [image], {"perm": [1, 0]})


RULES: Final[dict[str, Rule]] = {"Resize": resize}
