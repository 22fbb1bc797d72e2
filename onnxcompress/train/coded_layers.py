"""Layers of a trainable quantized model whose codes can be chosen, and the floats behind them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import onnx_ir as ir

from onnxcompress.contract import Array, Skip
from onnxcompress.graph.linear import is_op
from onnxcompress.operators import constant, float_attribute, int_attribute, operator
from onnxcompress.train.fake_quantize import Weight

_LAYERS: Final = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_BETWEEN: Final = ("QuantizeLinear", "DequantizeLinear", "Reshape", "Identity")
_ALIKE: Final = 0.5
"""Error of a quantized weight, in parts of its power, beyond which it is another's."""


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """A layer, its weight in the trainable form, and its counterpart in the float model."""

    node: ir.Node
    weight: Weight
    floats: ir.Value
    """The initializer that a QuantizeLinear reads."""
    restored: ir.Value
    """What the DequantizeLinear gives."""
    source: ir.Node
    """In the float model."""

    def now(self) -> Array:
        """The weight as it is quantized."""
        found = constant(self.floats)
        assert found is not None
        return found

    def original(self) -> Array:
        """The weight before it was quantized, in the same shape."""
        found = _original(self.source, self.node, self.now().shape)
        assert found is not None
        return found


def coded_layers(
    graph: ir.Graph, weights: Sequence[Weight], floats: Mapping[str, ir.Value]
) -> tuple[dict[ir.Node, Layer], list[Skip]]:
    """The layers of the main graph that read one of `weights` alone, and those declined.

    Args:
        graph: of the trainable form.
        floats: the values of the float model by name.
    """
    layers: dict[ir.Node, Layer] = {}
    skips: list[Skip] = []
    for weight in weights:
        value = graph.initializers[weight.floats]
        path = _path(value)
        if path is None:
            if weight.grid.dtype != "int32":
                skips.append(Skip(weight.codes, "", "it is not the weight of one layer alone"))
            continue
        node, restored = path
        source = _source(node, floats)
        if source is None or not _fits(source, node, value):
            reason = "its weight in the float model was not found"
            skips.append(Skip(node.name or "", node.op_type, reason))
        else:
            layers[node] = Layer(node, weight, value, restored, source)
    return layers, skips


def counterpart(value: ir.Value, floats: Mapping[str, ir.Value]) -> str | None:
    """The name in the float model of what `value` stands for, a DequantizeLinear taking it over."""
    if value.name in floats:
        return value.name
    rounded = (u.node.outputs[0] for u in value.uses() if is_op(u.node, "QuantizeLinear"))
    restored = (u.node for integers in rounded for u in integers.uses())
    names = (n.outputs[0].name for n in restored if is_op(n, "DequantizeLinear"))
    return next((name for name in names if name in floats), None)


def _path(value: ir.Value) -> tuple[ir.Node, ir.Value] | None:
    """The layer that alone reads the initializer, and its floats as rounded on the way."""
    restored: ir.Value | None = None
    while len(value.uses()) == 1 and not value.is_graph_output():
        (usage,) = value.uses()
        node = usage.node
        if is_op(node, *_LAYERS):
            found = restored is not None and usage.idx == operator(node).weight
            return (node, restored) if found and restored is not None else None
        if not is_op(node, *_BETWEEN) or usage.idx:
            return None
        value = node.outputs[0]
        restored = value if node.op_type == "DequantizeLinear" else restored
    return None


def _source(node: ir.Node, floats: Mapping[str, ir.Value]) -> ir.Node | None:
    """The node of the float model that gives what `node`, or the bias behind it, does."""
    name, output = counterpart(node.outputs[0], floats), node.outputs[0]
    if name is None and node.op_type == "MatMul" and len(output.uses()) == 1:
        (usage,) = output.uses()
        name = counterpart(usage.node.outputs[0], floats) if is_op(usage.node, "Add") else None
    source = None if name is None else floats[name].producer()
    return source if source is not None and is_op(source, *_LAYERS) else None


def _original(source: ir.Node, node: ir.Node, shape: tuple[int, ...]) -> Array | None:
    array = constant(source.inputs[1])
    if array is None or array.dtype != np.float32:
        return None
    if source.op_type == "Gemm" and node.op_type == "MatMul":
        array = array.T if int_attribute(source, "transB", 0) else array
        array = array * np.float32(float_attribute(source, "alpha", 1.0))
    elif source.op_type != node.op_type:
        return None
    if node.op_type == "Conv" and array.size == np.prod(shape):
        array = array.reshape(shape)  # blocks lie along all axes but the first
    return array if array.shape == shape else None


def _fits(source: ir.Node, node: ir.Node, value: ir.Value) -> bool:
    """Whether the weight of `source` is what was rounded to `value`."""
    now = constant(value)
    assert now is not None
    array = _original(source, node, now.shape)
    if array is None:
        return False
    power = float(np.square(array, dtype=np.float64).sum())
    return float(np.square(array - now, dtype=np.float64).sum()) <= _ALIKE * power
