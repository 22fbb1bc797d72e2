"""Constants in blocks of few bits: the initializers and DequantizeLinear nodes that hold them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxcompress.contract import Array
from onnxcompress.graph.quantized_weights import WeightStore, computed
from onnxcompress.numerics.blocks import Blocks, encode, fit, pack
from onnxcompress.operators import constant_tensor, int_attribute


@dataclass(frozen=True, slots=True)
class BlockWeight:
    """A constant input of a node, seen as rows (..., N, K) that each sum (or are read) alone."""

    value: ir.Value
    tensor: ir.TensorProtocol
    transposed: bool
    """Whether it is stored as (..., K, N)."""
    flat: bool
    """Whether K are all axes but the first, as in a convolution."""

    @classmethod
    def of(cls, node: ir.Node, index: int) -> BlockWeight:
        value = node.inputs[index]
        tensor = constant_tensor(value)
        assert value is not None and tensor is not None
        product = node.op_type in ("MatMul", "Gemm") and index == 1
        transposed = product and not int_attribute(node, "transB", 0)
        return cls(value, tensor, transposed, node.op_type == "Conv")

    @property
    def shape(self) -> tuple[int, ...]:
        """(..., N, K)."""
        stored = tuple(int(d) for d in self.tensor.shape.numpy())
        if self.flat:
            return stored[0], math.prod(stored[1:])
        return (*stored[:-2], stored[-1], stored[-2]) if self.transposed else stored

    def rows(self) -> Array:
        """The values, as a view of what is mapped."""
        array = self.tensor.numpy()
        return np.swapaxes(array, -1, -2) if self.transposed else array.reshape(self.shape)

    def stored(self, rows: Array) -> Array:
        """`rows` (..., N, anything) in the order of axes in which the weight is stored."""
        return np.ascontiguousarray(np.swapaxes(rows, -1, -2)) if self.transposed else rows


@dataclass(frozen=True, slots=True)
class BlockStore:
    """Stores weights in blocks, each once for each form, in place of the float constants."""

    store: WeightStore
    bits: int
    block_size: int
    """0 where a whole row shares its parameters."""
    symmetric: bool

    def packed(
        self, weight: BlockWeight, block_size: int, *, padded: bool, factor: float = 1.0
    ) -> tuple[ir.Value, ...]:
        """Packed codes, scales and, where not symmetric, packed zero points of a matrix (N, K).

        Args:
            block_size: of the kernel that reads them; it divides that of the parameters.
            padded: codes are (N, B, bytes of a block), as MatMulNBits wants them, the last block
                filled up; else (N, bytes of K codes), as GatherBlockQuantized does.
            factor: what the weight is multiplied by.
        """

        def make() -> tuple[ir.Value, ...]:
            rows, terms = weight.shape
            blocks = self._fit(weight).split(block_size, terms)
            count = blocks.scales.shape[-1]
            shape = (rows, terms * self.bits // 8)
            if padded:
                shape = (rows, count, block_size * self.bits // 8)

            def codes() -> Array:
                found = encode(weight.rows(), blocks)
                return pack(found if padded else found[:, :terms], self.bits).reshape(shape)

            values = [
                self._initializer(weight, "quantized", computed(codes, "uint8", shape)),
                self._initializer(weight, "scale", blocks.scales * np.float32(factor)),
            ]
            if not self.symmetric:
                zeros = pack(blocks.zero_points, self.bits)
                values.append(self._initializer(weight, "zero_point", zeros))
            return tuple(values)

        return self.store.once(weight.value, (padded, weight.transposed, factor), make)

    def restored(self, weight: BlockWeight, *, by_channel: bool) -> ir.Value:
        """The float value that a DequantizeLinear makes of the codes, in the weight's own shape.

        Args:
            by_channel: a matrix has one scale a row, which needs no blocks.
        """

        def make() -> tuple[ir.Value, ...]:
            blocks = self._fit(weight)
            kind = f"{'int' if self.symmetric else 'uint'}{self.bits}"
            dtype, terms = ir.DataType[kind.upper()].numpy(), weight.shape[-1]
            middle = 1 << (self.bits - 1) if self.symmetric else 0

            def codes() -> Array:
                found = encode(weight.rows(), blocks)[..., :terms].astype(np.int16) - middle
                return weight.stored(found).astype(dtype)

            def parameter(array: Array) -> Array:
                return array[..., 0] if by_channel else weight.stored(array)

            shape = weight.shape if weight.flat else weight.tensor.shape.numpy()
            inputs = [
                self._initializer(weight, "quantized", computed(codes, kind, shape)),
                self._initializer(weight, "scale", parameter(blocks.scales)),
            ]
            if not self.symmetric:
                zeros = parameter(blocks.zero_points).astype(dtype)
                inputs.append(self._initializer(weight, "zero_point", zeros))
            rank = len(shape)
            axis = rank - 1 - (weight.transposed != by_channel)
            attributes = {"axis": axis} | ({} if by_channel else {"block_size": blocks.block_size})
            floats = self._node(weight, "DequantizeLinear", inputs, attributes)
            if weight.flat:
                target = np.asarray(weight.tensor.shape.numpy(), np.int64)
                inputs = [floats, self._initializer(weight, "shape", target)]
                floats = self._node(weight, "Reshape", inputs, {})
            return (floats,)

        return self.store.once(weight.value, (weight.transposed, weight.flat), make)[0]

    def _fit(self, weight: BlockWeight) -> Blocks:
        return fit(
            weight.rows(),
            bits=self.bits,
            block_size=self.block_size,
            symmetric=self.symmetric,
        )

    def _initializer(
        self, weight: BlockWeight, part: str, content: Array | ir.TensorProtocol
    ) -> ir.Value:
        return self.store.initializer(f"{weight.value.name or 'constant'}_{part}", content)

    def _node(
        self, weight: BlockWeight, op_type: str, inputs: list[ir.Value], attributes: dict[str, int]
    ) -> ir.Value:
        name = self.store.fresh(f"{weight.value.name or 'constant'}_{op_type}")
        return self.store.before_all(op_type, inputs, name, attributes)
