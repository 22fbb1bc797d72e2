"""Rules of convolutions of any number of spatial axes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Final

import onnx_ir as ir

from onnxcompress.train.tape import (
    Gradients,
    Rule,
    Tape,
    Unsupported,
    dims_of,
    present,
    rank_of,
    required,
    sizes_of,
)

_FEW: Final = 8
"""Channels below which copying them together is slower than copying planes."""


@dataclass(frozen=True, slots=True)
class Window:
    """What slides over the spatial axes: a number per axis each, padding before and after."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    begins: tuple[int, ...]
    ends: tuple[int, ...]

    @property
    def rank(self) -> int:
        return len(self.kernel)

    @property
    def extents(self) -> tuple[int, ...]:
        """How far the kernel reaches, from its first to behind its last tap."""
        return tuple((k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations, strict=True))

    @property
    def attributes(self) -> dict[str, list[int]]:
        return {
            "kernel_shape": list(self.kernel),
            "strides": list(self.strides),
            "dilations": list(self.dilations),
            "pads": [*self.begins, *self.ends],
        }

    @property
    def is_point(self) -> bool:
        """Whether it takes every position by itself, and no other."""
        padded = any((*self.begins, *self.ends))
        return math.prod(self.kernel) == 1 and math.prod(self.strides) == 1 and not padded


def window(node: ir.Node, kernel: tuple[int, ...]) -> Window:
    """The window of a convolution or pooling, its automatic padding worked out.

    Source: `auto_pad` of the ONNX Conv operator.
    """
    ones = (1,) * len(kernel)
    strides = tuple(node.attributes.get_ints("strides", ones))
    dilations = tuple(node.attributes.get_ints("dilations", ones))
    auto_pad = node.attributes.get_string("auto_pad", "NOTSET")
    pads = tuple(node.attributes.get_ints("pads", (0,) * 2 * len(kernel)))
    if auto_pad == "VALID":
        pads = (0,) * 2 * len(kernel)
    if auto_pad.startswith("SAME"):
        extents = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
        totals = _same(required(node, 0), extents, strides)
        halves = tuple(t // 2 for t in totals)
        rests = tuple(t - t // 2 for t in totals)
        pads = halves + rests if auto_pad == "SAME_UPPER" else rests + halves
    return Window(kernel, strides, dilations, pads[: len(kernel)], pads[len(kernel) :])


def _same(x: ir.Value, extents: list[int], strides: tuple[int, ...]) -> list[int]:
    if math.prod(strides) == 1:
        return [e - 1 for e in extents]
    sizes = sizes_of(x, first=2)
    return [
        max((-(-size // stride) - 1) * stride + extent - size, 0)
        for size, extent, stride in zip(sizes, extents, strides, strict=True)
    ]


def conv(tape: Tape, node: ir.Node, given: Gradients) -> Gradients:
    """dX: the kernel, transposed; dW: each tap of it times the input that it saw."""
    dy, x, w = given[0], required(node, 0), required(node, 1)
    assert dy is not None
    group = node.attributes.get_int("group", 1)
    win = window(node, sizes_of(w)[2:])
    dx = _spread(tape, x, w, dy, win, group) if tape.wanted(x) else None
    dw = None
    if tape.wanted(w):
        dw = of_kernel(tape, Site(x, dy, node.outputs[0], w, win, group))
    return [dx, dw, _bias(tape, node, dy)]


def conv_transpose(tape: Tape, node: ir.Node, given: Gradients) -> Gradients:
    """Conv and its kernel's gradient, with the roles of data and result exchanged."""
    dy, x, w = given[0], required(node, 0), required(node, 1)
    assert dy is not None
    group = node.attributes.get_int("group", 1)
    win = _transposed_window(node, x, sizes_of(w)[2:])
    dx = dw = None
    if tape.wanted(x):
        dx = tape.op("Conv", [dy, w], {**win.attributes, "group": group})
        dx = _cut(tape, dx, x, win)
    if tape.wanted(w):
        dw = of_kernel(tape, Site(dy, x, x, w, win, group))
    return [dx, dw, _bias(tape, node, dy)]


def _transposed_window(node: ir.Node, x: ir.Value, kernel: tuple[int, ...]) -> Window:
    """Source: `output_shape`, `auto_pad` and `pads` of the ONNX ConvTranspose operator."""
    auto_pad = node.attributes.get_string("auto_pad", "NOTSET")
    if "output_shape" not in node.attributes and auto_pad in ("NOTSET", "VALID"):
        return window(node, kernel)
    raise Unsupported(f"its padding is worked out by the operator (auto_pad {auto_pad})")


def _bias(tape: Tape, node: ir.Node, dy: ir.Value) -> ir.Value | None:
    bias = present(node, 2)
    if bias is None or not tape.wanted(bias):
        return None
    axes = tape.ints(0, *range(2, rank_of(required(node, 0))))
    return tape.op("ReduceSum", [dy, axes], {"keepdims": 0})


def _spread(
    tape: Tape, x: ir.Value, w: ir.Value, dy: ir.Value, win: Window, group: int
) -> ir.Value:
    """What each position of the result gives back to the input that its kernel saw.

    ConvTranspose runs on one thread in ONNX Runtime, so a convolution does it where one can.
    """
    options = {**win.attributes, "group": group}
    if math.prod(win.strides) == 1:
        pads = [e - 1 - p for e, p in zip(win.extents * 2, (*win.begins, *win.ends), strict=True)]
        kernel = _turned(tape, w, win, group)
        if kernel is not None and min(pads) >= 0:
            return tape.op("Conv", [dy, kernel], {**options, "pads": pads}, like=x)
        return tape.op("ConvTranspose", [dy, w], options, like=x)
    dims = (dims_of(x) or ())[2:]
    left = [
        None if size is None else (size + begin + end - extent) % stride
        for size, begin, end, extent, stride in zip(
            dims, win.begins, win.ends, win.extents, win.strides, strict=True
        )
    ]
    known = [n for n in left if n is not None]
    if len(known) == len(left):
        return tape.op("ConvTranspose", [dy, w], {**options, "output_padding": known})
    options["output_padding"] = [s - 1 for s in win.strides]
    return _cut(tape, tape.op("ConvTranspose", [dy, w], options), x, win)


def _turned(tape: Tape, w: ir.Value, win: Window, group: int) -> ir.Value | None:
    """The kernel that convolves back: last tap first, inputs for outputs; None for groups."""
    m, c = sizes_of(w)[:2]
    if group > 1 and not (c == 1 and m == group):
        return None
    if math.prod(win.kernel) > 1:
        count = win.rank
        ends = tape.ints(*[-(2**31)] * count), tape.ints(*range(2, 2 + count))
        starts = tape.ints(*[-1] * count)
        w = tape.op("Slice", [w, starts, *ends, starts], like=w)
    if group > 1:
        return w
    turned = tape.op("Transpose", [w], {"perm": [1, 0, *range(2, 2 + win.rank)]})
    turned.type, turned.shape = w.type, ir.Shape([c, m, *win.kernel])
    return turned


def _cut(tape: Tape, value: ir.Value, like: ir.Value, win: Window) -> ir.Value:
    """`value` without what lies beyond the spatial sizes of `like`."""
    axes = tape.ints(*range(2, 2 + win.rank))
    sizes = tape.op("Shape", [like], {"start": 2})
    return tape.op("Slice", [value, tape.ints(*[0] * win.rank), sizes, axes])


@dataclass(frozen=True, slots=True)
class Site:
    """A kernel, the data that it slides over, and the gradient of what came of it."""

    data: ir.Value
    gradient: ir.Value
    result: ir.Value
    """What has the shape of `gradient`."""
    weight: ir.Value
    window: Window
    group: int

    @property
    def is_static(self) -> bool:
        """Whether all sizes are known, that of the batch too."""
        sizes = [*(dims_of(self.data) or (None,)), *(dims_of(self.result) or (None,))]
        return None not in sizes

    @property
    def positions(self) -> float:
        """How many positions the result has; infinite where that is known at run time only."""
        sizes = (dims_of(self.result) or (None,))[2:]
        return math.prod(math.inf if n is None else n for n in sizes)


def of_kernel(tape: Tape, site: Site) -> ir.Value:
    """The gradient of the kernel (M, C/group, *kernel).

    For each tap the data that it saw is one strided slice, of the size of the result; its
    product with the gradient, summed over positions and samples, is that tap's gradient. On the
    CPU this takes half the time of an im2col and one product. Slices are cheap with channels
    last.
    """
    m, c, *kernel = sizes_of(site.weight)
    taps = math.prod(kernel)
    if site.group > 1 and c == 1 and m == site.group:
        if tape.block and m % tape.block == 0 and len(kernel) == 2 and site.is_static:
            return _by_blocks(tape, site, m)
        stacked, order, perm = _by_channel(tape, site), [taps, m], [1, 0]
    elif site.group == 1 and c < _FEW < m and taps > 1:
        stacked, order, perm = _by_plane(tape, site, m, c), [m, taps, c], [0, 2, 1]
    elif site.group == 1 and site.positions * (m + c) <= 2 * m * c:
        stacked, order, perm = _by_rows(tape, site, m, c), [taps, c, m], [2, 1, 0]
    elif site.group > 1 or site.window.is_point:
        stacked, order, perm = _by_group(tape, site, m, c), [m, taps, c], [0, 2, 1]
    else:
        stacked, order, perm = _by_sample(tape, site, m, c), [m, taps, c], [0, 2, 1]
    if taps > 1 or perm[0] > 0:
        stacked = tape.op("Reshape", [stacked, tape.ints(*order)])
        stacked = tape.op("Transpose", [stacked], {"perm": perm})
    return tape.op("Reshape", [stacked, tape.ints(m, c, *kernel)])


def _by_rows(tape: Tape, site: Site, m: int, c: int) -> ir.Value:
    """(taps·C, M): one product a tap over all samples, where each has few positions."""
    rows = tape.op("Reshape", [_channels_last(tape, site, site.gradient), tape.ints(-1, m)])
    seen = _seen(tape, site, _channels_last(tape, site, site.data), first=1)
    lines = [tape.op("Reshape", [s, tape.ints(-1, c)]) for s in seen]
    return _joined(tape, [tape.op("Gemm", [s, rows], {"transA": 1}) for s in lines], axis=0)


def _by_sample(tape: Tape, site: Site, m: int, c: int) -> ir.Value:
    """(M, taps·C): a product for each sample, which run side by side, and their sum."""
    lines = tape.op("Reshape", [site.gradient, tape.ints(0, m, -1)])
    seen = _seen(tape, site, _channels_last(tape, site, site.data), first=1)
    rows = [tape.op("Reshape", [s, tape.ints(0, -1, c)]) for s in seen]
    taps = [tape.op("MatMul", [lines, r]) for r in rows]
    return _over_samples(tape, _joined(tape, taps, axis=2))


def _by_channel(tape: Tape, site: Site) -> ir.Value:
    """(taps·M): a kernel for each channel (depthwise)."""
    axes = tape.ints(*range(1 + site.window.rank))
    gradient = _channels_last(tape, site, site.gradient)
    taps = [
        tape.op("ReduceSum", [tape.op("Mul", [s, gradient]), axes], {"keepdims": 0})
        for s in _seen(tape, site, _channels_last(tape, site, site.data), first=1)
    ]
    return _joined(tape, taps, axis=0)


def _by_blocks(tape: Tape, site: Site, m: int) -> ir.Value:
    """(M, 1, h, w): depthwise again, the data of each sample and channel by its gradient's kernel.

    A tap is a position of the result, and what strode dilates.
    """
    win = site.window
    n, _, *sizes = sizes_of(site.data)
    results = sizes_of(site.result, first=2)
    data = tape.op("Reshape", [site.data, tape.ints(1, n * m, *sizes)])
    kernel = tape.op("Reshape", [site.gradient, tape.ints(n * m, 1, *results)])
    for value, shape in ((data, [1, n * m, *sizes]), (kernel, [n * m, 1, *results])):
        value.type, value.shape = site.weight.type, ir.Shape(shape)
    ends = [
        (result - 1) * stride + extent - size - begin
        for result, stride, extent, size, begin in zip(
            results, win.strides, win.extents, sizes, win.begins, strict=True
        )
    ]
    turned = Window(results, win.dilations, win.strides, win.begins, tuple(max(e, 0) for e in ends))
    taps = tape.op("Conv", [data, kernel], {**turned.attributes, "group": n * m})
    counts = [
        (size + begin + end - extent) // stride + 1
        for size, begin, end, extent, stride in zip(
            sizes, turned.begins, turned.ends, turned.extents, turned.strides, strict=True
        )
    ]
    taps.type, taps.shape = site.weight.type, ir.Shape([1, n * m, *counts])
    taps = tape.op("Reshape", [taps, tape.ints(n, m, 1, *counts)])
    total = _over_samples(tape, taps)
    if counts == list(win.kernel):
        return total
    axes = tape.ints(*range(2, 2 + win.rank))
    return tape.op("Slice", [total, tape.ints(*[0] * win.rank), tape.ints(*win.kernel), axes])


def _by_plane(tape: Tape, site: Site, m: int, c: int) -> ir.Value:
    """(M, taps·C): as by sample, of so few channels that a plane is longer than all of them."""
    lines = tape.op("Reshape", [site.gradient, tape.ints(0, m, -1)])
    seen = _joined(tape, list(_seen(tape, site, site.data, first=2)), axis=1)
    rows = tape.op("Reshape", [seen, tape.ints(0, c * math.prod(site.window.kernel), -1)])
    flipped = tape.op("Transpose", [rows], {"perm": [0, 2, 1]})
    return _over_samples(tape, tape.op("MatMul", [lines, flipped]))


def _by_group(tape: Tape, site: Site, m: int, c: int) -> ir.Value:
    """(group, M/group, taps·C/group)."""
    gradient = tape.op("Reshape", [site.gradient, tape.ints(0, site.group, m // site.group, -1)])
    taps: list[ir.Value] = []
    for part in _seen(tape, site, site.data, first=2):
        lines = tape.op("Reshape", [part, tape.ints(0, site.group, c, -1)])
        flipped = tape.op("Transpose", [lines], {"perm": [0, 1, 3, 2]})
        taps.append(tape.op("MatMul", [gradient, flipped]))
    return _over_samples(tape, _joined(tape, taps, axis=3))


def _over_samples(tape: Tape, value: ir.Value) -> ir.Value:
    return tape.op("ReduceSum", [value, tape.ints(0)], {"keepdims": 0})


def _channels_last(tape: Tape, site: Site, value: ir.Value) -> ir.Value:
    return tape.op("Transpose", [value], {"perm": [0, *range(2, 2 + site.window.rank), 1]})


def _joined(tape: Tape, taps: list[ir.Value], axis: int) -> ir.Value:
    return taps[0] if len(taps) == 1 else tape.op("Concat", taps, {"axis": axis})


def _seen(tape: Tape, site: Site, data: ir.Value, *, first: int) -> Iterator[ir.Value]:
    """For each tap, what it saw of `data`, whose spatial axes begin at `first`."""
    win = site.window
    if win.is_point:
        yield data
        return
    axes = tape.ints(*range(first, first + win.rank))
    if any((*win.begins, *win.ends)):
        pads = tape.ints(*win.begins, *win.ends)
        data = tape.op("Pad", [data, pads, tape.scalar(0, site.weight), axes])
    strides = tape.ints(*win.strides)
    end = _ends(tape, site)
    for tap in product(*map(range, win.kernel)):
        starts = [t * d for t, d in zip(tap, win.dilations, strict=True)]
        yield tape.op("Slice", [data, tape.ints(*starts), end(starts), axes, strides])


def _ends(tape: Tape, site: Site) -> Callable[[list[int]], ir.Value]:
    """Where the slice of a tap ends, given where it starts."""
    strides = site.window.strides
    sizes = (dims_of(site.result) or (None,))[2:]
    known = [n for n in sizes if n is not None]
    if len(known) == len(strides):
        spans = [(n - 1) * s + 1 for n, s in zip(known, strides, strict=True)]
        return lambda starts: tape.ints(*(a + b for a, b in zip(starts, spans, strict=True)))
    steps = tape.op("Sub", [tape.op("Shape", [site.result], {"start": 2}), tape.ints(1)])
    span = tape.op("Add", [tape.op("Mul", [steps, tape.ints(*strides)]), tape.ints(1)])
    return lambda starts: tape.op("Add", [span, tape.ints(*starts)])


RULES: Final[dict[str, Rule]] = {"Conv": conv, "ConvTranspose": conv_transpose}
