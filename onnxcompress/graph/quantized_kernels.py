"""Reads what `insert_qdq` wrote: kernels on integers, and the floats that they stand for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.contract import Array, Kind, Skip, Want
from onnxcompress.graph.quantized_weights import FLOAT, dequantizer_of, kernel_axes
from onnxcompress.graph.scopes import nodes_within
from onnxcompress.numerics.affine import RANGES, SMALLEST_SCALE
from onnxcompress.numerics.row_sample import Patches
from onnxcompress.operators import (
    DEFAULT_DOMAINS,
    constant,
    constant_tensor,
    int_attribute,
    operator,
)

_OPERATORS = ("Conv", "Gemm", "MatMul")


@dataclass(frozen=True, slots=True)
class QuantizedKernel:
    """A Conv, Gemm or MatMul that reads dequantized data, int8 weights and perhaps a bias.

    Its weight as a matrix is [G, N, K]: G groups of N output channels that sum over K values, in
    the order in which `Patches` lays out a row.
    """

    node: ir.Node
    data: ir.Value
    """The integers that it reads."""
    data_scale: np.float32
    data_zero: int
    codes: ir.Value
    scale: ir.Value
    bias: ir.Value | None
    """Its int32 codes, or itself where it stayed float."""

    @property
    def depthwise(self) -> bool:
        """Whether each output channel reads one input channel: such kernels add in 32 bits."""
        return self._groups > 1 and self._shape[:2] == (self._groups, 1)

    @property
    def terms(self) -> int:
        """How many products an output sums, K."""
        order = self._order()
        return math.prod(self._shape[axis] for axis in order[1:])

    def weight(self) -> npt.NDArray[np.float32]:
        """[G, N, K], as it was before quantization."""
        return self._matrix(_original(self.codes))

    def integers(self) -> npt.NDArray[np.int8]:
        """[G, N, K], as they stand."""
        assert self.codes.const_value is not None
        return self._matrix(self.codes.const_value.numpy())

    def scales(self) -> npt.NDArray[np.float32]:
        """Of each output channel, [G, N]."""
        scale = constant(self.scale)
        assert scale is not None
        channels = self._shape[self._order()[0]]
        return np.broadcast_to(scale, channels).reshape(self._groups, -1)

    def write(self, matrix: npt.NDArray[np.int8]) -> bool:
        """Put integers [G, N, K] in the weight's place; whether they are others than before."""
        if np.array_equal(matrix, self.integers()):
            return False
        order = self._order()
        ordered = matrix.reshape([self._shape[axis] for axis in order])
        laid_out = np.ascontiguousarray(ordered.transpose(np.argsort(order)))
        self.codes.const_value = ir.tensor(laid_out, name=self.codes.name)
        return True

    def bias_scales(self) -> npt.NDArray[np.float32]:
        """Of an int32 bias, [G · N]."""
        return np.maximum(self.data_scale * self.scales().reshape(-1), SMALLEST_SCALE)

    def float_bias(self) -> npt.NDArray[np.float64]:
        """[G · N], as it was before quantization; zeros without one."""
        floats = np.zeros(self.scales().size) if self.bias is None else _original(self.bias)
        return floats.astype(np.float64)

    def held_bias(self) -> Array:
        """[G · N], int32 or float32, as it stands; zeros without a bias."""
        found = constant(self.bias)
        return np.zeros(self.scales().size, np.int32) if found is None else found

    def bias_value(self, bias: Array) -> npt.NDArray[np.float64]:
        """What `bias` [G · N] stands for, floats or codes in `bias_scales`."""
        floats = bias.astype(np.float64)
        return floats if bias.dtype == np.float32 else floats * self.bias_scales()

    def bias_with(self, correction: Array, kind: npt.DTypeLike | None = None) -> Array:
        """`float_bias` plus `correction` [G, N], of `kind` or the type of the bias there is."""
        wanted = self.float_bias() + correction.reshape(-1)
        if np.dtype(kind or self.held_bias().dtype) == np.float32:
            return wanted.astype(np.float32)
        codes = np.rint(wanted / self.bias_scales().astype(np.float64))
        return np.clip(codes, *RANGES["int32"]).astype(np.int32)

    def write_bias(self, bias: Array) -> bool:
        """Put [G · N] in the place of the bias there is; whether it is another."""
        assert self.bias is not None and self.bias.const_value is not None
        if np.array_equal(bias, self.bias.const_value.numpy()):
            return False
        if FLOAT not in self.bias.meta:
            self.bias.meta[FLOAT] = self.bias.const_value
        self.bias.const_value = ir.tensor(bias, name=self.bias.name)
        return True

    def want(self, rows: int, rows_each: int) -> Want:
        """A sample of the rows that it multiplies by its weight, of the feeds that fill it."""
        patches = Patches(fill=self.data_zero, rows=rows, rows_each=rows_each)
        if self.node.op_type == "Conv":
            patches = dataclasses.replace(patches, **self._window())
        feeds = -(-rows // rows_each)
        return Want(self.data.name or "", Kind.ROWS, patches=patches, feeds=feeds)

    def rows(self, sample: Array) -> npt.NDArray[np.float32]:
        """The sample that `want` describes, per group and in units of `data_scale`, [G, n, K]."""
        places = math.prod(self._shape[2:]) if self.node.op_type == "Conv" else 1
        split = sample.reshape(len(sample), places, self._groups, -1).transpose(2, 0, 1, 3)
        rows = split.astype(np.float32, order="C").reshape(self._groups, len(sample), -1)
        rows -= self.data_zero
        return rows

    @property
    def _groups(self) -> int:
        return int_attribute(self.node, "group", 1) if self.node.op_type == "Conv" else 1

    @property
    def _shape(self) -> tuple[int, ...]:
        assert self.codes.shape is not None
        return self.codes.shape.numpy()

    def _order(self) -> list[int]:
        """Axes of the weight: output channel, places in the kernel, input channel."""
        return kernel_axes(self.node, len(self._shape))

    def _matrix(self, weight: Array) -> Array:
        ordered = weight.transpose(self._order())
        return ordered.reshape(self._groups, len(ordered) // self._groups, -1)

    def _window(self) -> dict[str, object]:
        kernel = self._shape[2:]
        attributes = self.node.attributes
        absent = {
            "strides": (1,) * len(kernel),
            "dilations": (1,) * len(kernel),
            "pads": (0,) * (2 * len(kernel)),
        }
        given = {n: tuple(attributes[n].as_ints()) for n in absent if n in attributes}
        auto_pad = attributes["auto_pad"].as_string() if "auto_pad" in attributes else "NOTSET"
        return {"kernel": kernel, "auto_pad": auto_pad, **absent, **given}


def quantized_kernels(graph: ir.Graph) -> tuple[list[QuantizedKernel], list[Skip]]:
    """The integer kernels of the graph and its bodies, and those that cannot be worked on."""
    kernels: list[QuantizedKernel] = []
    skips: list[Skip] = []
    for node in nodes_within(graph):
        if node.op_type not in _OPERATORS or node.domain not in DEFAULT_DOMAINS:
            continue
        data, weight = dequantizer_of(node.inputs[0]), dequantizer_of(node.inputs[1])
        if data is None or weight is None or constant_tensor(weight.inputs[0]) is None:
            continue
        reason = _refusal(node, data, weight)
        if reason is not None:
            skips.append(Skip(node.name or "", node.op_type, reason))
        else:
            kernels.append(_kernel(node, data, weight))
    return kernels, skips


def _refusal(node: ir.Node, data: ir.Node, weight: ir.Node) -> str | None:
    codes = weight.inputs[0]
    assert codes is not None
    if FLOAT not in codes.meta:
        return "its float weight is unknown: run this behind insert_qdq, on the same model"
    if codes.dtype != ir.DataType.INT8 or np.any(_zero_point(weight)):
        return "its weight is not symmetric int8"
    if node.op_type != "Conv" and len(codes.shape or ()) != 2:
        return "its weight is a stack of matrices"
    if not _private(weight):
        return "its weight is shared with another node"
    scale = constant(data.inputs[1])
    if scale is None or scale.size != 1:
        return "the scale of its data is computed"
    return _bias_refusal(node)


def _bias_refusal(node: ir.Node) -> str | None:
    index = operator(node).bias
    if index is None or index >= len(node.inputs) or node.inputs[index] is None:
        return None
    restore = dequantizer_of(node.inputs[index])
    if restore is None and _is_own_float(node.inputs[index]):
        return None
    codes = None if restore is None else restore.inputs[0]
    if restore is None or codes is None or FLOAT not in codes.meta:
        return "its bias is neither a constant of its own nor one that was quantized"
    return None if _private(restore) else "its bias is shared with another node"


def _kernel(node: ir.Node, data: ir.Node, weight: ir.Node) -> QuantizedKernel:
    integers, codes, scale = data.inputs[0], weight.inputs[0], weight.inputs[1]
    data_scale = constant(data.inputs[1])
    assert integers is not None and codes is not None and scale is not None
    assert data_scale is not None
    index = operator(node).bias
    bias = None if index is None or index >= len(node.inputs) else node.inputs[index]
    if (restore := dequantizer_of(bias)) is not None:
        bias = restore.inputs[0]
    zero = int(_zero_point(data).reshape(-1)[0])
    step = np.float32(data_scale.reshape(-1)[0])
    return QuantizedKernel(node, integers, step, zero, codes, scale, bias)


def _original(stored: ir.Value) -> Array:
    """The floats that integers stand for, or that a bias held first."""
    if FLOAT in stored.meta:
        return cast(ir.TensorProtocol, stored.meta[FLOAT]).numpy()
    assert stored.const_value is not None
    return stored.const_value.numpy()


def _is_own_float(bias: ir.Value | None) -> bool:
    """Whether a bias is an initializer in float that one node reads, as some targets want it."""
    if bias is None or not bias.is_initializer() or bias.is_graph_input():
        return False
    own = len(bias.uses()) == 1 and not bias.is_graph_output()
    return own and bias.const_value is not None and bias.const_value.dtype == ir.DataType.FLOAT


def _zero_point(dequantizer: ir.Node) -> Array:
    array = constant(dequantizer.inputs[2]) if len(dequantizer.inputs) > 2 else None
    return np.zeros(1, np.int64) if array is None else array.astype(np.int64)


def _private(dequantizer: ir.Node) -> bool:
    """Whether one node reads the constant behind it, and nothing else does."""
    values: Sequence[ir.Value | None] = (dequantizer.inputs[0], dequantizer.outputs[0])
    return all(v is not None and len(v.uses()) == 1 and not v.is_graph_output() for v in values)
