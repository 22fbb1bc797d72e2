"""Rules of pooling over spatial axes."""

from __future__ import annotations

from typing import Final

import numpy as np
import onnx_ir as ir

from onnxcompress.train.rules.convolution import Window, window
from onnxcompress.train.rules.reduction import count
from onnxcompress.train.tape import (
    Gradients,
    Rule,
    Tape,
    Unsupported,
    dtype_of,
    rank_of,
    required,
    sizes_of,
)


def max_pool(tape: Tape, node: ir.Node, given: Gradients) -> Gradients:
    """All to the value that was taken: the operator's own indices say which, of the whole tensor.

    Source: the second output of the ONNX MaxPool operator.
    """
    dy, x = given[0], required(node, 0)
    if node.attributes.get_int("storage_order", 0):
        raise Unsupported("its indices are in column-major order")
    indices = tape.op("Reshape", [tape.output(node, 1), tape.ints(-1)])
    flat = tape.op("Reshape", [dy, tape.ints(-1)])
    size = tape.op("Reshape", [tape.op("Size", [x]), tape.ints(1)])
    zeros = tape.op("Expand", [tape.scalar(0, x), size])
    options = {"axis": 0, "reduction": "add"}
    spread = tape.op("ScatterElements", [zeros, indices, flat], options)
    return [tape.reshape_like(spread, x)]


def average_pool(tape: Tape, node: ir.Node, given: Gradients) -> Gradients:
    """Each position of the result gives its share to all that its window saw."""
    dy, x = given[0], required(node, 0)
    sizes, results = sizes_of(x, first=2), sizes_of(node.outputs[0], first=2)
    stated = window(node, tuple(node.attributes.get_ints("kernel_shape", ())))
    includes = bool(node.attributes.get_int("count_include_pad", 0))
    counts = _counts(stated, sizes, results, includes)
    if not counts.all():
        raise Unsupported("its last window lies outside, of which runtimes differ")
    shares = (1 / counts).astype(dtype_of(x).numpy())
    win = _covering(stated, sizes, results)
    each = tape.op("Mul", [dy, tape.constant(shares)])
    planes = tape.op("Reshape", [each, tape.ints(-1, 1, *results)])
    ones = tape.constant(np.ones((1, 1, *win.kernel), dtype_of(x).numpy()))
    left = [
        size + begin + end - extent - (result - 1) * stride
        for size, begin, end, extent, result, stride in zip(
            sizes, win.begins, win.ends, win.extents, results, win.strides, strict=True
        )
    ]
    options = {**win.attributes, "output_padding": left}
    return [tape.reshape_like(tape.op("ConvTranspose", [planes, ones], options), x)]


def _covering(win: Window, sizes: tuple[int, ...], results: tuple[int, ...]) -> Window:
    """The window with as much padding at the end as its last positions reach (`ceil_mode`)."""
    ends = tuple(
        max(end, (result - 1) * stride + extent - size - begin)
        for end, size, result, stride, extent, begin in zip(
            win.ends, sizes, results, win.strides, win.extents, win.begins, strict=True
        )
    )
    return Window(win.kernel, win.strides, win.dilations, win.begins, ends)


def _counts(
    win: Window, sizes: tuple[int, ...], results: tuple[int, ...], includes: bool
) -> np.ndarray:
    """How many values each window averages: it may leave out its padding."""
    counts = np.ones((1,) * len(sizes))
    for axis, (size, result) in enumerate(zip(sizes, results, strict=True)):
        starts = np.arange(result)[:, None] * win.strides[axis] - win.begins[axis]
        positions = starts + np.arange(win.kernel[axis]) * win.dilations[axis]
        low, high = (-win.begins[axis], size + win.ends[axis]) if includes else (0, size)
        inside = ((positions >= low) & (positions < high)).sum(1)
        shape = [1] * len(sizes)
        shape[axis] = result
        counts = counts * inside.reshape(shape)
    return counts


def global_average_pool(tape: Tape, node: ir.Node, given: Gradients) -> Gradients:
    x = required(node, 0)
    share = tape.op("Div", [given[0], count(tape, x, tuple(range(2, rank_of(x))))])
    return [tape.op("Expand", [share, tape.shape(x)])]


def global_max_pool(tape: Tape, node: ir.Node, given: Gradients) -> Gradients:
    """Equal maxima share evenly."""
    x, y = required(node, 0), node.outputs[0]
    mask = tape.cast(tape.op("Equal", [x, y]), x)
    axes = tape.ints(*range(2, rank_of(x)))
    sharers = tape.op("ReduceSum", [mask, axes], {"keepdims": 1})
    return [tape.op("Mul", [mask, tape.op("Div", [given[0], sharers])])]


RULES: Final[dict[str, Rule]] = {
    "MaxPool": max_pool,
    "AveragePool": average_pool,
    "GlobalAveragePool": global_average_pool,
    "GlobalMaxPool": global_max_pool,
}
