"""Rules of operators that move values: their gradients move back, and add up where they met."""

from __future__ import annotations

from typing import Final

import numpy as np
import onnx_ir as ir

from onnxcompress.operators import constant
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
)


def moved(tape: Tape, node: ir.Node, given: Gradients) -> Gradients:
    """Any operator that moves: it is applied to the positions of the input too.

    What comes out says from where each value was taken; the gradients are added up there. It
    serves where nothing cheaper is known beforehand.
    """
    x = required(node, 0)
    count = tape.op("Size", [x])
    start, step = (tape.constant(np.array(n, np.int64)) for n in (0, 1))
    positions = tape.reshape_like(tape.op("Range", [start, count, step]), x)
    inputs = [positions, *node.inputs[1:]]
    taken = tape.ops(node.op_type, inputs, node.attributes, outputs=len(node.outputs))
    size = tape.op("Reshape", [count, tape.ints(1)])
    total = tape.op("Expand", [tape.scalar(0, node.outputs[0]), size])
    options = {"axis": 0, "reduction": "add"}
    for origin, dy in zip(taken, given, strict=True):
        if dy is not None:
            flat = [tape.op("Reshape", [v, tape.ints(-1)]) for v in (origin, dy)]
            total = tape.op("ScatterElements", [total, *flat], options)
    return [tape.reshape_like(total, x)]


def reshape(tape: Tape, node: ir.Node, given: Gradients) -> Gradients:
    (dy,) = given
    assert dy is not None
    return [tape.reshape_like(dy, required(node, 0))]


def identity(tape: Tape, node: ir.Node, given: Gradients) -> Gradients:
    return [given[0]]


def dropout(tape: Tape, node: ir.Node, given: Gradients) -> Gradients:
    """Outside training it passes everything on."""
    training = present(node, 2)
    known = constant(training)
    if training is not None and (known is None or known.any()):
        raise Unsupported("it drops values: set its training mode to false")
    return [given[0]]


def transpose(tape: Tape, node: ir.Node, given: Gradients) -> Gradients:
    rank = rank_of(required(node, 0))
    perm = node.attributes.get_ints("perm", list(range(rank))[::-1])
    return [tape.op("Transpose", [given[0]], {"perm": np.argsort(perm).tolist()})]


def expand(tape: Tape, node: ir.Node, given: Gradients) -> Gradients:
    (dy,) = given
    assert dy is not None
    return [unbroadcast(tape, dy, required(node, 0), node.outputs[0])]


def concat(tape: Tape, node: ir.Node, given: Gradients) -> Gradients:
    axis = node.attributes.get_int("axis", 0)
    parts = [v for v in node.inputs if v is not None]
    if len(parts) == 1:
        return [given[0]]
    axis %= rank_of(parts[0])
    sizes = tape.join(*(tape.dim(v, axis) for v in parts))
    return tape.ops("Split", [given[0], sizes], {"axis": axis}, outputs=len(parts))


def split(tape: Tape, node: ir.Node, given: Gradients) -> Gradients:
    pairs = zip(given, node.outputs, strict=True)
    parts = [dy if dy is not None else tape.zeros(y) for dy, y in pairs]
    return [tape.op("Concat", parts, {"axis": node.attributes.get_int("axis", 0)})]


def pad(tape: Tape, node: ir.Node, given: Gradients) -> Gradients:
    """Constant padding is taken off again; a reflected or repeated value gets all its copies'."""
    if node.attributes.get_string("mode", "constant") != "constant":
        return moved(tape, node, given)
    fill = present(node, 2)
    if tape.wanted(fill):
        raise Unsupported("the value that it fills in cannot be trained")
    x, pads = required(node, 0), tape.op("Neg", [required(node, 1)])
    axes = [present(node, 3)] if present(node, 3) is not None else []
    return [tape.op("Pad", [given[0], pads, tape.scalar(0, node.outputs[0]), *axes], like=x)]


def slice_(tape: Tape, node: ir.Node, given: Gradients) -> Gradients:
    """A piece in one go is padded with zeros where its place is known; else positions are moved."""
    x = required(node, 0)
    places = _places(node, x)
    if places is None:
        return moved(tape, node, given)
    axes, before, after = zip(*places, strict=True)
    pads, zero = tape.ints(*before, *after), tape.scalar(0, node.outputs[0])
    return [tape.op("Pad", [given[0], pads, zero, tape.ints(*axes)])]


def _places(node: ir.Node, x: ir.Value) -> list[tuple[int, int, int]] | None:
    """Each sliced axis, with how much lies before and behind; None where it is not known."""
    starts, ends, axes, steps = (_integers(present(node, i)) for i in range(1, 5))
    if starts is None or ends is None:
        return None
    if any(v is None and present(node, i) is not None for i, v in ((3, axes), (4, steps))):
        return None
    axes, steps = axes or list(range(len(starts))), steps or [1] * len(starts)
    places: list[tuple[int, int, int]] = []
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        size = x.shape[axis] if x.shape is not None else None
        if not isinstance(size, int) or step != 1:
            return None
        first, stop, _ = slice(start, end).indices(size)
        if stop < first:
            return None
        places.append((axis, first, size - stop))
    return places


def _integers(value: ir.Value | None) -> list[int] | None:
    known = constant(value)
    return None if known is None else known.tolist()


def gather(tape: Tape, node: ir.Node, given: Gradients) -> Gradients:
    """Rows of a table: each gets the gradients of all places that took it."""
    x, indices = required(node, 0), required(node, 1)
    axis = node.attributes.get_int("axis", 0) % rank_of(x)
    if axis != 0:
        return moved(tape, node, given)
    rows = tape.op("Unsqueeze", [indices, tape.ints(-1)])
    if dtype_of(indices) != ir.DataType.INT64:
        rows = tape.op("Cast", [rows], {"to": ir.DataType.INT64.value})
    return [tape.op("ScatterND", [tape.zeros(x), rows, given[0]], {"reduction": "add"})]


def tile(tape: Tape, node: ir.Node, given: Gradients) -> Gradients:
    """Copies and axes apart (c0, d0, c1, d1, ...), then summed over the copies."""
    x, repeats = required(node, 0), required(node, 1)
    columns = [tape.op("Unsqueeze", [v, tape.ints(1)]) for v in (repeats, tape.shape(x))]
    apart = tape.op("Reshape", [tape.op("Concat", columns, {"axis": 1}), tape.ints(-1)])
    pieces = tape.op("Reshape", [given[0], apart])
    axes = tape.ints(*range(0, 2 * rank_of(x), 2))
    return [tape.op("ReduceSum", [pieces, axes], {"keepdims": 0})]


def cumulative_sum(tape: Tape, node: ir.Node, given: Gradients) -> Gradients:
    """The sum from the other end."""
    options = {
        "exclusive": node.attributes.get_int("exclusive", 0),
        "reverse": 1 - node.attributes.get_int("reverse", 0),
    }
    return [tape.op("CumSum", [given[0], required(node, 1)], options)]


def depth_to_space(tape: Tape, node: ir.Node, given: Gradients) -> Gradients:
    """SpaceToDepth puts a block's positions before the channels, as mode DCR has them."""
    block, y = node.attributes.get_int("blocksize", 1), node.outputs[0]
    deep = tape.op("SpaceToDepth", [given[0]], {"blocksize": block})
    if node.attributes.get_string("mode", "DCR") == "DCR":
        return [deep]
    apart = tape.op("Reshape", [deep, tape.join(0, block * block, tape.dim(y, 1), -1)])
    swapped = tape.op("Transpose", [apart], {"perm": [0, 2, 1, 3]})
    return [tape.reshape_like(swapped, required(node, 0))]


def space_to_depth(tape: Tape, node: ir.Node, given: Gradients) -> Gradients:
    return [
        tape.op("DepthToSpace", [given[0]], {"blocksize": node.attributes.get_int("blocksize", 1)})
    ]


RULES: Final[dict[str, Rule]] = {
    "Reshape": reshape,
    "Flatten": reshape,
    "Squeeze": reshape,
    "Unsqueeze": reshape,
    "Identity": identity,
    "Dropout": dropout,
    "Transpose": transpose,
    "Expand": expand,
    "Concat": concat,
    "Split": split,
    "Pad": pad,
    "Slice": slice_,
    "Gather": gather,
    "GatherElements": moved,
    "GatherND": moved,
    "Compress": moved,
    "ReverseSequence": moved,
    "Tile": tile,
    "CumSum": cumulative_sum,
    "DepthToSpace": depth_to_space,
    "SpaceToDepth": space_to_depth,
}
