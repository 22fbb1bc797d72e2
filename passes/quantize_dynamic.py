"""Dynamic quantization: int8 weights, activations quantized as they come, no data needed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np
import onnx_ir as ir

from onnxcompress import targets
from onnxcompress.contract import Pass, Result, Skip
from onnxcompress.graph.placement import matches
from onnxcompress.graph.quantized_weights import WeightStore
from onnxcompress.graph.rewriting import become
from onnxcompress.graph.scopes import nodes_within
from onnxcompress.numerics.rows import row_bounds, row_sqnr
from onnxcompress.operators import (
    DEFAULT_DOMAINS,
    constant,
    constant_tensor,
    data_inputs,
    float_attribute,
    in_axis,
    int_attribute,
    out_axis,
    weight_inputs,
)

_OPSET: Final = 11
_CONTRIB: Final = "com.microsoft"
_LEAST_TABLE_SQNR: Final = 30.0
_LEAST_ROW: Final = 8
_DEEPEST: Final = (2**31 - 1) // (255 * 127)
"""Terms that a 32-bit sum of uint8 times int8 can take."""


@dataclass(frozen=True, kw_only=True)
class QuantizeDynamic(Pass):
    """Quantize weights now and activations while the model runs, without any data.

    A matrix product before and after, in the form that ONNX Runtime fuses to one kernel::

        x ─ MatMul(W) ─ y     x ─ DynamicQuantizeLinear ─ MatMulInteger(W_q) ─ Cast ─ Mul ─ y
                                           └── scale_x ─── Mul(scale_w) ───────────┘

    Weights are symmetric int8 with one scale an output channel, activations uint8 with one scale
    a tensor, taken from each tensor as it comes. Products that read the same value share its
    quantization, which is as fast as (or faster than) a kernel that quantizes for each of them. A
    bias added behind a product is fused too. On processors that add pairs of products in 16 bits,
    scales are such that no pair saturates.

    - MatMul and Gemm with a constant weight, in bodies of If, Loop and Scan too.
    - LSTM becomes com.microsoft.DynamicQuantizeLSTM.
    - A table that only Gather reads, row by row, is stored as int8 with one scale a row.

    Declines, each with a Skip: functions (inline them first), weights that are computed, small,
    not float32 or that the caller may override, GRU and RNN, models below opset 11, whatever
    `include` and `exclude` say. Convolutions stay in float: ONNX Runtime's ConvInteger takes 0.8
    to 1.0 of a lone float convolution's time with uint8 weights and 2 to 10 times with int8 ones,
    and gives up the fused activation and the blocked layout; quantize them statically.

    Idempotent. Source: ONNX operators DynamicQuantizeLinear and MatMulInteger; the contrib
    operators DynamicQuantizeMatMul, MatMulIntegerToFloat and DynamicQuantizeLSTM.
    """

    name: ClassVar[str] = "quantize_dynamic"

    target: str = "cpu"
    """Runtime whose kernels are aimed at."""
    per_channel: bool = True
    """One scale for each output channel of a weight instead of one for the whole matrix."""
    embeddings: bool = True
    """Also store tables of embeddings as integers."""
    min_elements: int = 16384
    """Smaller weights stay in float, whose kernels are then faster."""
    include: tuple[str, ...] = ("*",)
    """Node names or operator types to quantize; * and ? match."""
    exclude: tuple[str, ...] = ()
    """Node names or operator types to leave in float; * and ? match."""

    def call(self, model: ir.Model) -> Result:
        skips: list[Skip] = []
        sites = [node for node in _nodes(model.graph) if self._is_site(node, model, skips)]
        for function in model.functions.values():
            skips += [_skip(n, "it is in a function: inline functions") for n in _nodes(function)]
        if not sites:
            return Result(model, modified=False, skips=tuple(skips))
        store = WeightStore(model.graph, targets.load(self.target), per_channel=self.per_channel)
        rewrite = _Rewrite(store)
        for node in sites:
            rewrite.apply(node)
        store.drop_unused()
        if rewrite.lstms:
            model.graph.opset_imports.setdefault(_CONTRIB, 1)
        return Result(model, modified=True, skips=tuple(skips), figures=rewrite.figures())

    def _is_site(self, node: ir.Node, model: ir.Model, skips: list[Skip]) -> bool:
        if node.op_type == "Gather" and not (self.embeddings and self._is_lookup(node)):
            return False
        if not matches(node, self.include):
            return False
        if matches(node, self.exclude):
            reason = "excluded by name or type"
        elif model.graph.opset_imports.get("", 0) < _OPSET:
            reason = f"dynamic quantization needs opset {_OPSET}: convert the model up first"
        else:
            reason = _REFUSALS[node.op_type](node) or self._refuse_size(node)
            if reason is None and node.op_type not in targets.load(self.target).dynamic:
                reason = f"{self.target} has no kernel that takes its weight as integers"
        if reason is not None:
            skips.append(_skip(node, reason))
        return reason is None

    def _is_lookup(self, node: ir.Node) -> bool:
        """Whether the node reads a table of numbers, not a shape or an index."""
        table = constant_tensor(node.inputs[0])
        return table is not None and table.dtype.is_floating_point() and self._large([table])

    def _refuse_size(self, node: ir.Node) -> str | None:
        tensors = [t for v in _constants(node) if (t := constant_tensor(v)) is not None]
        if not self._large(tensors):
            return f"fewer than {self.min_elements} weights: the float kernel is faster"
        return None

    def _large(self, tensors: Sequence[ir.TensorProtocol]) -> bool:
        return sum(t.size for t in tensors) >= max(1, self.min_elements)


class _Rewrite:
    """One application to a model. A node becomes the last node of what replaces it."""

    def __init__(self, store: WeightStore) -> None:
        self.store = store
        self.products = self.lstms = self.tables = 0
        self._dynamic: dict[tuple[ir.Value, ir.Graph, bool], Sequence[ir.Value]] = {}

    def apply(self, node: ir.Node) -> None:
        rewrites = {"MatMul": self._matmul, "Gemm": self._gemm, "LSTM": self._lstm}
        rewrites.get(node.op_type, self._gather)(node)

    def figures(self) -> Mapping[str, int]:
        return {
            "matrix products": self.products,
            "LSTMs": self.lstms,
            "embedding tables": self.tables,
        }

    def _matmul(self, node: ir.Node) -> None:
        data, weight = _operands(node)
        stack = len(_shape(weight)) > 2
        codes, scales = self.store.matrices(weight, by_row=False, keepdims=stack)
        become(node, "Mul", self._product(node, data, codes, scales))

    def _gemm(self, node: ir.Node) -> None:
        data, weight = _operands(node)
        by_row = bool(int_attribute(node, "transB", 0))
        codes, scales = self.store.matrices(
            weight, by_row=by_row, factor=float_attribute(node, "alpha", 1.0)
        )
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        operands = self._product(node, data, codes, scales)
        if bias is None:
            become(node, "Mul", operands)
            return
        bias = self.store.scaled_bias(node, bias)
        product = self.store.before(node, "Mul", operands)
        product.shape = node.outputs[0].shape
        become(node, "Add", [product, bias])

    def _product(
        self, node: ir.Node, data: ir.Value, weight: ir.Value, scales: ir.Value
    ) -> list[ir.Value]:
        """The operands of the Mul that gives data times weight."""
        self.products += 1
        codes, scale, zero_point = self._quantized(node, data)
        integers = self.store.before(
            node, "MatMulInteger", [codes, weight, zero_point], dtype=ir.DataType.INT32
        )
        floats = self.store.before(node, "Cast", [integers], {"to": ir.DataType.FLOAT.value})
        return [floats, self.store.before(node, "Mul", [scale, scales])]

    def _quantized(self, node: ir.Node, data: ir.Value) -> Sequence[ir.Value]:
        """Codes, scale and zero_point of the node's data, made before its first reader."""
        transposed = node.op_type == "Gemm" and bool(int_attribute(node, "transA", 0))
        assert node.graph is not None
        key = (data, node.graph, transposed)
        if key not in self._dynamic:
            if transposed:
                data = self.store.before(node, "Transpose", [data], {"perm": [1, 0]})
            quantizer = ir.node("DynamicQuantizeLinear", [data], num_outputs=3)
            kinds = (ir.DataType.UINT8, ir.DataType.FLOAT, ir.DataType.UINT8)
            parts = zip(quantizer.outputs, ("quantized", "scale", "zero_point"), kinds, strict=True)
            for output, part, kind in parts:
                output.name = self.store.fresh(f"{data.name}_{part}")
                output.type = ir.TensorType(kind)
            quantizer.name = quantizer.outputs[0].name
            node.graph.insert_before(node, quantizer)
            self._dynamic[key] = quantizer.outputs
        return self._dynamic[key]

    def _lstm(self, node: ir.Node) -> None:
        self.lstms += 1
        inputs = [*node.inputs, *[None] * (8 - len(node.inputs))]
        for index, weight in ((1, node.inputs[1]), (2, node.inputs[2])):
            assert weight is not None
            inputs[index], scales = self.store.matrices(weight, by_row=True)
            zeros = np.zeros(_shape(scales), np.int8)
            inputs += [scales, self.store.initializer(f"{weight.name}_zero_point", zeros)]
        attributes = {k: v for k, v in node.attributes.items() if k != "layout"}
        hidden = ir.AttrInt64("hidden_size", _shape(inputs[2])[1])
        attributes = {"hidden_size": hidden} | attributes
        become(node, "DynamicQuantizeLSTM", inputs, attributes, domain=_CONTRIB)

    def _gather(self, node: ir.Node) -> None:
        self.tables += 1
        table, indices = _operands(node)
        codes, scales = self.store.table(table)
        rows = self.store.before(node, "Gather", [codes, indices], dtype=ir.DataType.INT8)
        scale = self.store.before(node, "Gather", [scales, indices])
        floats = self.store.before(node, "Cast", [rows], {"to": ir.DataType.FLOAT.value})
        become(node, "Mul", [floats, scale])


def _skip(node: ir.Node, reason: str) -> Skip:
    return Skip(node.name or "", node.op_type, reason)


def _nodes(graph: ir.Graph | ir.Function) -> Iterator[ir.Node]:
    """The nodes of the graph and its subgraphs that could be quantized."""
    for node in nodes_within(graph):
        if node.op_type in _REFUSALS and node.domain in DEFAULT_DOMAINS:
            yield node


def _constants(node: ir.Node) -> list[ir.Value]:
    """The inputs that become integers."""
    return weight_inputs(node) or data_inputs(node)


def _operands(node: ir.Node) -> tuple[ir.Value, ir.Value]:
    first, second = node.inputs[:2]
    assert first is not None and second is not None
    return first, second


def _shape(value: ir.Value | None) -> tuple[int, ...]:
    tensor = constant_tensor(value)
    assert tensor is not None
    return tuple(tensor.shape.numpy())


def _refuse_weights(node: ir.Node) -> str | None:
    """Why no kernel can take the node's weights as integers; None where one can."""
    if constant_tensor(node.inputs[0]) is not None and node.op_type != "Gather":
        return "its data are constant"
    for value in _constants(node):
        tensor = constant_tensor(value)
        if tensor is None:
            return "its weight is computed or can be overridden"
        if tensor.dtype != ir.DataType.FLOAT:
            return f"its weight is {tensor.dtype.name.lower()}, not float32"
        if tensor.shape.rank() < 2:
            return "its weight is not a matrix"
        if not tensor.size or not np.isfinite(tensor.numpy()).all():
            return "its weight is empty or holds NaN or infinity"
    return None


def _refuse_product(node: ir.Node) -> str | None:
    reason = _refuse_weights(node)
    if reason is not None:
        return reason
    shape = _shape(node.inputs[1])
    if shape[in_axis(node, len(shape)) or 0] > _DEEPEST:
        return f"it sums more than {_DEEPEST} products, which 32 bits do not hold"
    if _widens(node, shape[out_axis(node, len(shape)) or 0]):
        return "the constant added to it would be taken for a bias, but broadcasts the product"
    return None


def _widens(node: ir.Node, width: int) -> bool:
    """Whether a constant is added behind the product that ONNX Runtime would wrongly fuse.

    It takes a constant for a bias where at most its last axis is longer than 1, also where that
    is not the product's width or the constant has more axes than the product.
    """
    product, users = node.outputs[0], list(node.outputs[0].uses())
    if len(users) != 1 or users[0].node.op_type != "Add":
        return False
    for other in users[0].node.inputs:
        if other is not product and (tensor := constant_tensor(other)) is not None:
            shape = tensor.shape.numpy()
            rank = 1 if product.shape is None else len(product.shape)
            row = math.prod(shape) == (shape[-1] if shape else 0) > 1
            return row and (len(shape) > rank or shape[-1] != width)
    return False


def _refuse_lstm(node: ir.Node) -> str | None:
    if int_attribute(node, "layout", 0):
        return "the integer kernel takes the time axis first"
    return _refuse_weights(node)


def _refuse_recurrent(node: ir.Node) -> str | None:
    # Measured with ONNX Runtime 1.32: behind a DequantizeLinear, which it runs every time, a GRU
    # of a quarter of the size takes 1.2 to 1.6 times as long.
    return f"there is no integer kernel for {node.op_type}; restoring its weights would slow it"


def _refuse_gather(node: ir.Node) -> str | None:
    reason = _refuse_weights(node)
    if reason is not None:
        return reason
    table = constant(node.inputs[0])
    assert table is not None and node.inputs[0] is not None
    if table.ndim != 2 or table.shape[1] < _LEAST_ROW:
        return "its table is not a matrix with rows of some length"
    lookups = all(_reads_rows(user, index) for user, index in node.inputs[0].uses())
    if not lookups or node.inputs[0].is_graph_output():
        return "its table is not only read row by row, so it would have to be stored twice"
    if row_sqnr(table, row_bounds(table, bound_pairs=False)) < _LEAST_TABLE_SQNR:
        return "its table does not fit 8 bits with one scale a row"
    return None


def _reads_rows(node: ir.Node, index: int) -> bool:
    return node.op_type == "Gather" and index == 0 and int_attribute(node, "axis", 0) in (0, -2)


_REFUSALS: Final[Mapping[str, Callable[[ir.Node], str | None]]] = {
    "MatMul": _refuse_product,
    "Gemm": _refuse_product,
    "LSTM": _refuse_lstm,
    "GRU": _refuse_recurrent,
    "RNN": _refuse_recurrent,
    "Gather": _refuse_gather,
}
