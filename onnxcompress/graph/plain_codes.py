"""Weights of weight-only kernels as DequantizeLinear reads codes, and as their files hold them.

MatMulNBits(x, bytes, s)          ⇒    MatMul(x, DQ(codes, s'))
GatherBlockQuantized(bytes, i, s) ⇒    Gather(DQ(codes, s), i)
Mul(Cast(codes), s)               ⇒    DQ(codes, s')
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import onnx_ir as ir

from onnxcompress.contract import Array, Skip
from onnxcompress.graph.linear import is_op
from onnxcompress.graph.names import FreshNames
from onnxcompress.graph.rewriting import become, initializer, insert
from onnxcompress.numerics.blocks import pack, unpack
from onnxcompress.operators import constant, constant_tensor, int_attribute

_MATRIX: Final = "MatMulNBits"
_TABLE: Final = "GatherBlockQuantized"
_GRID_INPUTS: Final = {_MATRIX: (1, 2, 3), _TABLE: (0, 2, 3)}
_ORDER, _BIAS = 4, 5
"""Inputs of MatMulNBits that say which column is in which block, and what is added."""


@dataclass(frozen=True, slots=True)
class Packing:
    """A weight that was taken out of a kernel, and how its file holds it.

    Codes are bytes of several, in rows that one output each sums over.
    """

    name: str
    """Of the initializer in the file."""
    transposed: bool
    """Whether a row is a column of what DequantizeLinear reads."""
    bits: int

    def stored_codes(self, codes: Array, before: Array) -> Array:
        """`codes` as the file holds them, in the place of `before`, whose filling stays."""
        rows = codes.T if self.transposed else codes
        whole = unpack(before.reshape(len(rows), -1), self.bits).copy()
        whole[:, : rows.shape[1]] = rows
        return pack(whole, self.bits).reshape(before.shape)


def expand(model: ir.Model) -> tuple[dict[str, Packing], list[Skip]]:
    """Rewrite the main graph in place.

    Returns:
        Packings by the names of the initializers that now hold codes, and the kernels that stay,
        with reasons.
    """
    rewrite = _Expansion(model.graph)
    for node in list(model.graph):
        if node.domain == "com.microsoft" and node.op_type in _GRID_INPUTS:
            rewrite.kernel(node)
        elif is_op(node, "Mul"):
            rewrite.product(node)
    return rewrite.codes, rewrite.skips


class _Expansion:
    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.codes: dict[str, Packing] = {}
        self.skips: list[Skip] = []
        self._fresh = FreshNames(graph)
        self._made: dict[tuple[object, ...], ir.Value] = {}

    def kernel(self, node: ir.Node) -> None:
        reason = _refusal(node)
        if reason is not None:
            self.skips.append(Skip(node.name or "", node.op_type, reason))
            return
        if node.op_type == _TABLE:
            floats = self._unpacked(node, int_attribute(node, "bits", 4), 1)
            become(node, "Gather", [floats, node.inputs[1]])
            return
        floats = self._unpacked(node, int_attribute(node, "bits", 4), 0)
        data, bias = node.inputs[0], _input(node, _BIAS)
        if bias is None:
            become(node, "MatMul", [data, floats])
            return
        name = self._fresh(f"{node.outputs[0].name}_MatMul")
        become(node, "Add", [insert(node, "MatMul", [data, floats], name), bias])

    def product(self, node: ir.Node) -> None:
        """Read the integers that `packed_weights.unpacked` left to a Cast and a Mul."""
        cast = None if node.inputs[0] is None else node.inputs[0].producer()
        step, codes = constant(node.inputs[1]), None if cast is None else cast.inputs[0]
        if not is_op(cast, "Cast") or codes is None or step is None or step.dtype != np.float32:
            return
        tensor = constant_tensor(codes)
        if tensor is None or tensor.dtype not in (ir.DataType.INT8, ir.DataType.UINT8):
            return
        wide = [axis for axis, size in enumerate(step.shape) if size > 1]
        if len(wide) > 1 or (wide and step.ndim != len(tensor.shape)):
            return
        scale = self._scale(node, 1, step.reshape(-1) if wide else step.reshape(()))
        axis = _integers({"axis": wide[0] if wide else 0})
        become(node, "DequantizeLinear", [codes, scale], axis)

    def _unpacked(self, node: ir.Node, bits: int, axis: int) -> ir.Value:
        """The floats of a kernel's codes, with blocks along `axis`; made once for each weight."""
        block, transposed = int_attribute(node, "block_size", 0), axis == 0
        inputs = [_input(node, index) for index in _GRID_INPUTS[node.op_type]]
        key = (*inputs, bits, block, transposed)
        if key not in self._made:
            self._made[key] = self._dequantized(node, inputs, bits, block, transposed)
        return self._made[key]

    def _dequantized(
        self,
        node: ir.Node,
        inputs: list[ir.Value | None],
        bits: int,
        block: int,
        transposed: bool,
    ) -> ir.Value:
        stored, scale, zero = (constant(value) for value in inputs)
        assert stored is not None and scale is not None and inputs[0] is not None
        dtype = ir.DataType[f"UINT{bits}"]
        terms = int_attribute(node, "K", 0) or stored.shape[-1] * 8 // bits
        rows = len(stored)
        blocks = -(-terms // block)
        scale = scale.reshape(rows, blocks)
        zeros = np.full(scale.shape, 1 << (bits - 1), np.uint8)
        if zero is not None:
            zeros = unpack(zero.reshape(rows, -1), bits)[:, :blocks]
        codes = unpack(stored.reshape(rows, -1), bits)[:, :terms]
        arrays = [a.T if transposed else a for a in (codes, zeros)]
        codes, zeros = (np.ascontiguousarray(a).astype(dtype.numpy()) for a in arrays)
        name = inputs[0].name or "weight"
        plain = initializer(self.graph, self._fresh(f"{name}_plain"), codes)
        step = self._scale(node, _GRID_INPUTS[node.op_type][1], scale.T if transposed else scale)
        middle = initializer(self.graph, self._fresh(f"{name}_middle"), zeros)
        self.codes[plain.name or ""] = Packing(name, transposed, bits)
        attributes = {"axis": 0 if transposed else 1, "block_size": block}
        return insert(node, "DequantizeLinear", [plain, step, middle],
                      self._fresh(f"{name}_floats"), attributes)  # fmt: skip

    def _scale(self, node: ir.Node, index: int, array: Array) -> ir.Value:
        """The scale at an input of `node`, laid out anew; the same one for the same layout."""
        value = node.inputs[index]
        assert value is not None
        key = (value, array.shape)
        if key not in self._made:
            name = self._fresh(f"{value.name}_plain")
            self._made[key] = initializer(self.graph, name, np.ascontiguousarray(array))
        return self._made[key]


def _refusal(node: ir.Node) -> str | None:
    codes, scale, zero = (_input(node, index) for index in _GRID_INPUTS[node.op_type])
    stored, steps, zeros = constant_tensor(codes), constant_tensor(scale), constant_tensor(zero)
    if stored is None or steps is None or (zero is not None and zeros is None):
        return "its codes or scales are computed or can be overridden"
    if steps.dtype is not ir.DataType.FLOAT:
        return f"its scales are {steps.dtype.name.lower()}, not float32"
    if stored.dtype is not ir.DataType.UINT8 or (zeros and zeros.dtype is not ir.DataType.UINT8):
        return "its codes or zero points are not packed in bytes"
    if int_attribute(node, "bits", 4) not in (4, 8):
        return "only codes of 4 and 8 bits have a type of their own"
    if node.op_type == _MATRIX and _input(node, _ORDER) is not None:
        return "its columns are in an order of their own (g_idx)"
    axes = int_attribute(node, "gather_axis", 0), int_attribute(node, "quantize_axis", 1)
    if node.op_type == _TABLE and (axes not in ((0, 1), (0, -1)) or len(stored.shape) != 2):
        return "it gathers along another axis than the first of a matrix"
    return None


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _integers(attributes: Mapping[str, int]) -> dict[str, ir.Attr]:
    return {name: ir.AttrInt64(name, value) for name, value in attributes.items()}
