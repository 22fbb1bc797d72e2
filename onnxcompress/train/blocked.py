"""Convolutions on blocks of channels, the layout in which ONNX Runtime's CPU kernels are fast.

ONNX Runtime reorders the weights of a convolution when a session starts, and so leaves those be
whose weights are inputs, as they are in training. Here the reordering is emitted: a value with
channels in blocks of B lies in memory as [N, C/B, H, W, B], and keeps its shape [N, C, H, W] for
all that reads it. Operators that compute value by value need not know.

The operators are those of `com.microsoft.nchwc`. `block_size` asks ONNX Runtime whether it has
them; where it has not, the graph stays as it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Final

import numpy as np
import onnx_ir as ir

from onnxcompress.errors import InputError
from onnxcompress.graph.scopes import reads, values_of
from onnxcompress.operators import DEFAULT_DOMAINS, constant
from onnxcompress.session import Session
from onnxcompress.train.rules.broadcasting import Dims, stated
from onnxcompress.train.tape import Tape, dims_of, present, required, sizes_of

_DOMAIN: Final = "com.microsoft.nchwc"
_MOST: Final = 32
"""Channels of what is reordered to see how many a block has."""
_BY_VALUE: Final = frozenset(
    {"Add", "Sub", "Mul", "Div", "Sum", "Min", "Max", "Neg", "Abs", "Sqrt", "Exp", "Erf"}
    | {"Relu", "Clip", "LeakyRelu", "Sigmoid", "Tanh", "HardSigmoid", "HardSwish", "Softplus"}
)


@cache
def block_size() -> int | None:
    """How many channels are a block on this machine; None where there are no such operators."""
    model = ir.from_onnx_text(
        f"""<ir_version: 10, opset_import: ["" : 18, "{_DOMAIN}" : 1]>
        g (float[1,{_MOST},1,2] x) => (float[1,{_MOST},1,2] y) {{
          y = {_DOMAIN}.ReorderInput(x)
        }}"""
    )
    try:
        x = np.arange(2 * _MOST, dtype=np.float32).reshape(1, _MOST, 1, 2)
        found = Session(model, threads=1).run({"x": x})["y"].reshape(-1)
    except InputError:
        return None
    size = int(np.flatnonzero(found == 1)[0])  # the second position's first channel
    blocks = x.reshape(-1, size, 2).transpose(0, 2, 1)
    return size if (found == blocks.reshape(-1)).all() else None


def is_by_size(graph: ir.Graph) -> bool:
    """Whether the gradients of `graph` are much faster for a known number of samples.

    Those of depthwise kernels are: their convolution is one in as many groups as there are
    channels in all samples, which is an attribute.
    """
    grouped = any(node.op_type == "Conv" and _group(node) > 1 for node in graph)
    return grouped and block_size() is not None


def for_cpu(model: ir.Model, outputs: Sequence[str]) -> ir.Model:
    """`model` itself, which gives `outputs`, values of its main graph, in blocks where it can."""
    values = {v.name: v for v in values_of(model.graph)}
    model.graph.outputs[:] = [values[name] for name in outputs]
    size = block_size()
    if size is not None:
        block_channels(model.graph, size)
    return model


def block_channels(graph: ir.Graph, size: int) -> int:
    """Let convolutions of `graph`, and what computes value by value between, work in blocks.

    Those of two spatial axes and float32 are taken whose channels fill blocks of `size`, also
    within each of several groups. What else reads a value gets it as it was; its outputs keep
    their names.

    Returns:
        How many convolutions were taken.
    """
    rewrite = _Rewrite(graph, size)
    for node in list(graph):
        rewrite.visit(node)
    rewrite.finish()
    return rewrite.taken


class _Rewrite:
    """Goes through a graph in its order; knows the twin in blocks of each value that has one."""

    def __init__(self, graph: ir.Graph, size: int) -> None:
        self.taken = 0
        self._graph, self._size = graph, size
        self._tape = Tape(graph)
        self._twins: dict[ir.Value, ir.Value] = {}
        self._dims: dict[ir.Value, Dims] = {}
        self._only: set[ir.Value] = set()
        """Values that are there in blocks alone."""
        self._order: dict[ir.Value, int] = {}
        """When a twin was made."""
        self._replaced: list[ir.Node] = []
        self._handlers: dict[str, Callable[[ir.Node], bool]] = {
            "Conv": self._conv,
            "ReduceSum": self._sum,
            "Transpose": self._transpose,
            "Reshape": self._reshape,
            "Shape": self._shape,
        } | dict.fromkeys(_BY_VALUE, self._by_value)

    def visit(self, node: ir.Node) -> None:
        """Put the node's work into blocks, or give it what it reads as it was."""
        self._tape.before = node
        handler = self._handlers.get(node.op_type) if node.domain in DEFAULT_DOMAINS else None
        if handler is not None and handler(node):
            self._replaced.append(node)
            return
        for value in reads(node):
            if value in self._only:
                self._restore(value)

    def finish(self) -> None:
        """Give the graph's outputs, and take out what was replaced."""
        self._tape.before = None
        for value in list(self._graph.outputs):
            if value in self._only:
                self._restore(value)
        self._graph.remove(self._replaced, safe=True)
        if self.taken:
            self._graph.opset_imports[_DOMAIN] = 1

    def _conv(self, node: ir.Node) -> bool:
        x, w, *bias = node.inputs
        dims = stated(node.outputs[0])
        if x is None or w is None or dims is None or not self._suits(node):
            return False
        shape = sizes_of(w)
        if x not in self._twins and _group(node) == math.prod(shape[2:]) == 1:
            return False  # a matrix product, which reordering would only slow down
        direct = _group(node) == 1 and shape[1] < self._size  # it reads channels as they were
        if direct and x in self._only:
            self._restore(x)
        data = x if direct else self._blocked(x)
        filters = self._filters(w, shape, direct or shape[1] == 1)
        attributes = {**node.attributes, "kernel_shape": ir.AttrInt64s("kernel_shape", shape[2:])}
        self._pair(node.outputs[0], self._op("Conv", [data, filters, *bias], attributes), dims)
        self.taken += 1
        return True

    def _suits(self, node: ir.Node) -> bool:
        """Whether the channels fill blocks."""
        w = node.inputs[1]
        shape = None if w is None else dims_of(w)
        if w is None or w.dtype is not ir.DataType.FLOAT or shape is None or len(shape) != 4:
            return False
        (m, c), group, size = shape[:2], _group(node), self._size
        if m is None or c is None or None in shape:
            return False
        if group == 1:
            return m % size == 0 and (c < size or c % size == 0)
        if c == 1 and m == group:
            return m % size == 0
        return m // group % size == 0 and c % size == 0

    def _filters(self, w: ir.Value, shape: Sequence[int], outputs_only: bool) -> ir.Value:
        """Kernels [M, C, h, w] as [M/B, C/B, h, w, B of C, B of M], or as [M/B, C, h, w, B]."""
        if (source := _reshaped(w)) in self._twins and shape[1] == 1:
            return self._tape.op("Reshape", [self._twins[source], self._tape.ints(*shape)])
        m, c, *kernel = shape
        if not outputs_only:
            w = self._op("ReorderInput", [w])
        rows = self._tape.op("Reshape", [w, self._tape.ints(1, m, c * kernel[0], kernel[1])])
        return self._tape.op("Reshape", [self._op("ReorderInput", [rows]), self._tape.ints(*shape)])

    def _by_value(self, node: ir.Node) -> bool:
        """If one operand is in blocks, all can be that have its size; others are single values."""
        tensors = [v for v in node.inputs if v is not None and not _is_single(v)]
        known = [v for v in tensors if v in self._twins]
        if not known:
            return False
        dims = self._dims[known[0]]
        if len(set(tensors)) > 1 and not all(self._matches(v, dims) for v in tensors):
            return False
        if not self._fused(node, tensors):
            inputs = [self._blocked(v) if v in tensors else v for v in node.inputs]
            twin = self._tape.op(node.op_type, inputs, node.attributes)
            self._pair(node.outputs[0], twin, dims)
        return True

    def _matches(self, value: ir.Value, dims: Dims) -> bool:
        own = self._dims.get(value) or stated(value)
        is_float = value in self._twins or value.dtype is ir.DataType.FLOAT
        return is_float and None not in dims and own is not None and list(own) == list(dims)

    def _fused(self, node: ir.Node, tensors: Sequence[ir.Value]) -> bool:
        """Whether the last of the convolutions before the node does its work too."""
        free = [v for v in tensors if self._is_free(v)]
        last = max(free, key=lambda v: self._order[self._twins[v]], default=None)
        conv = None if last is None else self._twins[last].producer()
        if last is None or conv is None:
            return False
        if node.op_type in ("Add", "Sum") and len(set(tensors)) == 2 and len(conv.inputs) < 4:
            (other,) = (v for v in tensors if v is not last)
            if other not in self._twins or not self._precedes(other, last):
                return False
            conv.resize_inputs(4)
            conv.replace_input_with(3, self._twins[other])
        elif node.op_type == "Relu":
            conv.attributes["activation"] = ir.AttrString("activation", "Relu")
        elif node.op_type == "Clip":
            bounds = [constant(v) for v in node.inputs[1:]]
            if len(bounds) < 2 or any(b is None for b in bounds):
                return False
            limits = [float(b.reshape(())) for b in bounds if b is not None]
            conv.attributes["activation"] = ir.AttrString("activation", "Clip")
            conv.attributes["activation_params"] = ir.AttrFloat32s("activation_params", limits)
        else:
            return False
        self._pair(node.outputs[0], self._twins[last], self._dims[last])
        return True

    def _is_free(self, value: ir.Value) -> bool:
        """Whether it is a convolution's alone, for one reader."""
        conv = self._twins[value].producer() if value in self._only else None
        alone = len(value.uses()) == 1 and not value.is_graph_output()
        return (
            conv is not None
            and (conv.domain, conv.op_type) == (_DOMAIN, "Conv")
            and "activation" not in conv.attributes
            and alone
            and not self._twins[value].uses()
        )

    def _precedes(self, value: ir.Value, other: ir.Value) -> bool:
        return self._order[self._twins[value]] < self._order[self._twins[other]]

    def _sum(self, node: ir.Node) -> bool:
        """A bias's gradient: the sum over all but the channels is their mean times their number."""
        x, axes = required(node, 0), constant(present(node, 1))
        if x not in self._twins or axes is None or sorted(axes.reshape(-1).tolist()) != [0, 2, 3]:
            return False
        area = [d for d in self._dims[x][2:] if isinstance(d, int)]
        if len(area) < 2 or node.attributes.get_int("keepdims", 1):
            return False
        means = self._op("GlobalAveragePool", [self._twins[x]])
        total = self._tape.op("ReduceSum", [means, *node.inputs[1:]], node.attributes)
        count = self._tape.constant(np.array(math.prod(area), np.float32))
        self._replace(node.outputs[0], self._tape.op("Mul", [total, count]))
        return True

    def _transpose(self, node: ir.Node) -> bool:
        """Channels last come out of blocks at once."""
        x = required(node, 0)
        if x not in self._twins or list(node.attributes.get_ints("perm", ())) != [0, 2, 3, 1]:
            return False
        attributes = {"channels": self._dims[x][1], "channels_last": 1}
        self._replace(node.outputs[0], self._op("ReorderOutput", [self._twins[x]], attributes))
        return True

    def _reshape(self, node: ir.Node) -> bool:
        """Samples may become channels, [1, N·C, H, W], and so may they become kernels."""
        x, target = required(node, 0), constant(present(node, 1))
        if x not in self._twins or target is None:
            return False
        n, c, *area = self._dims[x]
        if not isinstance(n, int) or not isinstance(c, int):
            return False
        if target.tolist() == [1, n * c, *area]:
            twin = self._tape.op("Reshape", [self._twins[x], node.inputs[1]])
            self._pair(node.outputs[0], twin, [1, n * c, *area])
            return True
        uses = node.outputs[0].uses()
        return target.tolist() == [n * c, 1, *area] and all(
            u.node.op_type == "Conv" and u.idx == 1 and self._suits(u.node) for u in uses
        )

    def _shape(self, node: ir.Node) -> bool:
        """It is the same in blocks."""
        if node.inputs[0] in self._only:
            node.replace_input_with(0, self._twins[required(node, 0)])
        return False

    def _blocked(self, value: ir.Value) -> ir.Value:
        if value not in self._twins:
            self._pair(value, self._op("ReorderInput", [value]), stated(value) or ())
            self._only.discard(value)
        return self._twins[value]

    def _restore(self, value: ir.Value) -> None:
        """Let all later readers have the value as it was."""
        channels = self._dims[value][1]
        plain = self._op("ReorderOutput", [self._twins[value]], {"channels": channels})
        self._pair(plain, self._twins[value], self._dims[value])
        self._only -= {plain, value}
        self._replace(value, plain)

    def _pair(self, value: ir.Value, twin: ir.Value, dims: Dims) -> None:
        self._twins[value], self._dims[value] = twin, dims
        self._order.setdefault(twin, len(self._order))
        self._only.add(value)

    def _replace(self, value: ir.Value, other: ir.Value) -> None:
        other.name, value.name = value.name, self._tape.name("replaced")
        other.type, other.shape = value.type, value.shape
        ir.convenience.replace_all_uses_with(value, other, replace_graph_outputs=True)

    def _op(
        self, op_type: str, inputs: Sequence[ir.Value | None], attributes: Any = None
    ) -> ir.Value:
        return self._tape.op(op_type, inputs, attributes, domain=_DOMAIN)


def _group(node: ir.Node) -> int:
    return node.attributes.get_int("group", 1)


def _is_single(value: ir.Value) -> bool:
    """Whether it is one number, whatever it meets."""
    dims = dims_of(value)
    return dims is not None and len(dims) <= 4 and all(d == 1 for d in dims)


def _reshaped(value: ir.Value) -> ir.Value | None:
    """What a kernel is that Reshape made of [N, C, H, W]."""
    node = value.producer()
    return node.inputs[0] if node is not None and node.op_type == "Reshape" else None
