"""Fresh weights: a model as if it had never been trained."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from onnxcompress.contract import Array
from onnxcompress.graph.linear import is_op
from onnxcompress.operators import (
    Role,
    constant_tensor,
    in_axis,
    operator,
    out_axis,
    weight_inputs,
)

_RECTIFIERS = ("Relu", "LeakyRelu", "PRelu", "Clip", "Gelu", "HardSwish", "Swish", "Mish", "Elu")


def set_fresh(model: ir.Model, seed: int = 0) -> int:
    """Draw weights of the main graph anew, in place; how many tensors there were.

    Weights of linear and recurrent operators become normal with variance 2 / inputs of an output
    where a rectifier follows, else 2 / (inputs + outputs), biases zero; normalizations neither
    scale nor shift, those of batches with means of 0 and variances of 1. Tables of embeddings keep
    the size that their elements had. Only float32 initializers, each once, in the order of the
    nodes: the same seed gives the same bits.

    Sources: He et al., Delving deep into rectifiers (2015); Glorot and Bengio, Understanding the
    difficulty of training deep feedforward neural networks (2010).
    """
    rng = np.random.default_rng(seed)
    drawn: set[ir.Value] = set()
    for node in model.graph:
        for value, array in _drawn(node, rng):
            if value not in drawn:
                value.const_value = ir.Tensor(array.astype(np.float32), name=value.name)
                drawn.add(value)
    return len(drawn)


def _drawn(node: ir.Node, rng: np.random.Generator) -> list[tuple[ir.Value, Array]]:
    """New contents of what the node multiplies by and adds."""
    row, found = operator(node), list[tuple[ir.Value, Array]]()
    if row.role is Role.CONTRACT:
        for value in weight_inputs(node):
            if (shape := _shape(value)) is not None:
                found.append((value, rng.standard_normal(shape) * _deviation(node, shape)))
    elif row.role is Role.NORMALIZE and row.weight is not None and row.weight < len(node.inputs):
        value = node.inputs[row.weight]
        if value is not None and (shape := _shape(value)) is not None:
            found.append((value, np.ones(shape)))
        if is_op(node, "BatchNormalization"):
            kept = zip(node.inputs[3:5], (0.0, 1.0), strict=True)
            found += [(v, np.full(s, x)) for v, x in kept if v and (s := _shape(v)) is not None]
    elif is_op(node, "Gather"):
        table = node.inputs[0]
        if table is not None and (shape := _shape(table)) is not None and len(shape) == 2:
            size = float(np.std(_contents(table)))
            found.append((table, rng.standard_normal(shape) * size))
    for value in _biases(node):
        if (shape := _shape(value)) is not None:
            found.append((value, np.zeros(shape)))
    return found


def _biases(node: ir.Node) -> list[ir.Value]:
    """What a linear operator or a normalization adds, inside or by an Add behind a product."""
    row = operator(node)
    if row.bias is not None and row.bias < len(node.inputs) and node.inputs[row.bias] is not None:
        return [v for v in (node.inputs[row.bias],) if v is not None]
    if not is_op(node, "MatMul"):
        return []
    adds = [user for user, _ in node.outputs[0].uses() if is_op(user, "Add")]
    operands = [v for add in adds for v in add.inputs if v is not None]
    return [v for v in operands if constant_tensor(v) is not None]


def _deviation(node: ir.Node, shape: tuple[int, ...]) -> float:
    if is_op(node, "LSTM", "GRU", "RNN"):
        return math.sqrt(2 / sum(shape[-2:]))
    rank, size = len(shape), math.prod(shape)
    into, out = in_axis(node, rank), out_axis(node, rank)
    if into is None or out is None:
        return math.sqrt(1 / max(size // shape[0], 1))
    inputs, outputs = size // shape[out], size // shape[into]
    if _is_rectified(node):
        return math.sqrt(2 / inputs)
    return math.sqrt(2 / (inputs + outputs))


def _is_rectified(node: ir.Node) -> bool:
    users = [user for user, _ in node.outputs[0].uses()]
    users += [user for add in users if is_op(add, "Add") for user, _ in add.outputs[0].uses()]
    return any(is_op(user, *_RECTIFIERS) for user in users)


def _shape(value: ir.Value) -> tuple[int, ...] | None:
    tensor = constant_tensor(value)
    if tensor is None or not value.is_initializer() or tensor.dtype is not ir.DataType.FLOAT:
        return None
    return tuple(int(d) for d in tensor.shape.numpy())


def _contents(value: ir.Value) -> Array:
    tensor = value.const_value
    assert tensor is not None
    return tensor.numpy()
