"""Models of any number of nodes, for measuring how cost grows with it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

CHANNELS, SIZE = 4, 8


class _Builder:
    """A graph under construction on values of shape (N, CHANNELS, SIZE, SIZE), float32."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.nodes: list[ir.Node] = []
        self.initializers: list[ir.Value] = []

    def weight(self, *shape: int, low: float = -0.5, high: float = 0.5) -> ir.Value:
        return self.constant(self.random.uniform(low, high, shape).astype(np.float32))

    def constant(self, array: Any) -> ir.Value:
        tensor = ir.tensor(array)
        value = ir.Value(
            name=f"w{len(self.initializers)}",
            shape=ir.Shape(tensor.shape.numpy()),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        self.initializers.append(value)
        return value

    def op(self, op_type: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        name = f"n{len(self.nodes)}"
        out = ir.Value(name=f"{name}_out")
        self.nodes.append(ir.node(op_type, inputs, attributes, outputs=[out], name=name))
        return out


def _convolution(b: _Builder, x: ir.Value) -> ir.Value:
    """Conv, batch normalization, activation and residual sum, as exported: 6 nodes."""
    y = b.op("Conv", x, b.weight(CHANNELS, CHANNELS, 1, 1))
    statistics = [b.weight(CHANNELS, low=0.5, high=1.5), *(b.weight(CHANNELS) for _ in range(2))]
    y = b.op("BatchNormalization", y, *statistics, b.weight(CHANNELS, low=0.5, high=1.5))
    y = b.op("Relu", y)
    y = b.op("Identity", b.op("Add", x, y))
    return b.op("Mul", y, b.constant(np.float32(1)))


def _attention(b: _Builder, x: ir.Value) -> ir.Value:
    """A linear layer and a layer normalization in its parts: 12 nodes."""
    y = b.op("Add", b.op("MatMul", x, b.weight(SIZE, SIZE)), b.weight(SIZE))
    y = b.op("Add", x, y)
    axes = b.constant(np.array([-1]))
    y = b.op("Sub", y, b.op("ReduceMean", y, axes, keepdims=1))
    variance = b.op("ReduceMean", b.op("Pow", y, b.constant(np.float32(2))), axes, keepdims=1)
    deviation = b.op("Sqrt", b.op("Add", variance, b.constant(np.float32(1e-5))))
    y = b.op("Mul", b.op("Div", y, deviation), b.weight(SIZE, low=0.5, high=1.5))
    return b.op("Add", y, b.weight(SIZE))


def _shape_arithmetic(b: _Builder, x: ir.Value) -> ir.Value:
    """A reshape whose target is computed from constants, and a computed weight: 8 nodes."""
    batch = b.op("Constant", value=ir.tensor(np.array([-1])))
    rest = b.op("Cast", b.constant(np.array([CHANNELS, SIZE, SIZE], np.int32)), to=7)
    y = b.op("Reshape", x, b.op("Concat", batch, rest, axis=0))
    weight = b.op("Mul", b.op("Transpose", b.weight(SIZE, SIZE), perm=[1, 0]), b.weight(1))
    return b.op("MatMul", y, weight)


_BLOCKS = (_convolution, _attention, _shape_arithmetic)


def generate(nodes: int, seed: int = 0) -> ir.Model:
    """A model of exactly `nodes` nodes that runs, the same for the same seed.

    It alternates convolutional, transformer-like and shape-computing blocks, each with small
    weights of its own; input `x` and output `y` are float32 (N, 4, 8, 8).
    """
    b = _Builder(seed)
    shape, type_ = ir.Shape(["N", CHANNELS, SIZE, SIZE]), ir.TensorType(ir.DataType.FLOAT)
    x = y = ir.Value(name="x", shape=shape, type=type_)
    block = 0
    while len(b.nodes) + 12 < nodes:
        y = _BLOCKS[block % len(_BLOCKS)](b, y)
        block += 1
    while len(b.nodes) < nodes:
        y = b.op("Relu", y)
    y.name, y.shape, y.type = "y", shape, type_
    graph = ir.Graph(
        [x], [y], nodes=b.nodes, initializers=b.initializers, opset_imports={"": 18}, name="g"
    )
    return ir.Model(graph, ir_version=9)
