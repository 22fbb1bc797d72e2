"""Keep ONNX Runtime from quantizing float weights by itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final, cast

import numpy as np
import onnx_ir as ir

from onnxcompress import targets
from onnxcompress.contract import Pass, Result, Skip
from onnxcompress.graph.names import FreshNames
from onnxcompress.graph.packed_weights import packed
from onnxcompress.graph.rewriting import initializer
from onnxcompress.graph.scopes import nodes_within
from onnxcompress.operators import (
    DEFAULT_DOMAINS,
    Role,
    constant,
    constant_tensor,
    in_axis,
    int_attribute,
    operator,
)

_QUANTIZED: Final = ("Conv", "ConvTranspose", "Gemm")
_AXES: Final = 13


@dataclass(frozen=True, kw_only=True)
class ShieldFloats(Pass):
    """Keep ONNX Runtime from quantizing the weights of kernels that are to stay in float.

    Whatever float weight a Conv, ConvTranspose or Gemm has behind a DequantizeLinear of one
    scale, and through operators that only move values, ONNX Runtime's WeightBiasQuantization
    rounds it to int8 with one scale for the tensor. It leaves alone what has a scale for each
    channel, so the way to each such kernel begins with a DequantizeLinear of its own, with the
    same scale written once a channel::

        x_q ─ DQ(scale) ─ Conv(W)    ⇒    x_q ─ DQ([scale, …], axis) ─ Conv(W)

    Exact: the values are the same to the bit. Idempotent. Declines, with a line in the report,
    where no axis is known to be longer than one: a list of one is one scale to ONNX Runtime.

    Source: ONNX DequantizeLinear 13.
    """

    name: ClassVar[str] = "shield_floats"
    exact: ClassVar[bool] = True

    target: str = "cpu"
    """Runtime that the model is for; not all take data with a scale for each channel."""

    def call(self, model: ir.Model) -> Result:
        graph, scheme = model.graph, targets.load(self.target).activations
        if graph.opset_imports.get("", 0) < _AXES or not scheme.per_channel:
            return Result(model, modified=False)
        fresh = FreshNames(graph)
        shielded, skips = 0, list[Skip]()
        for node in list(nodes_within(graph)):
            way = _way_from_integers(node)
            if way is None:
                continue
            axis = _longer_axis(node, way)
            if axis is not None:
                _shield(way, *axis, fresh)
                shielded += 1
            else:
                reason = "it reads one channel: ONNX Runtime will quantize its weight by itself"
                skips.append(Skip(node.name or "", node.op_type, reason))
        figures = {"float kernels behind integers": shielded}
        return Result(model, modified=bool(shielded), skips=tuple(skips), figures=figures)


def _way_from_integers(node: ir.Node) -> ir.Node | None:
    """The first node behind a DequantizeLinear of one scale, on the way to a float kernel."""
    if node.op_type not in _QUANTIZED or node.domain not in DEFAULT_DOMAINS:
        return None
    if _weight_shape(node) is None:
        return None
    while (producer := _producer(node)) is not None and operator(producer).role is Role.MOVE:
        node = producer
    if producer is None or producer.op_type != "DequantizeLinear":
        return None
    scale = constant(producer.inputs[1])
    return node if scale is not None and scale.size == 1 else None


def _weight_shape(node: ir.Node) -> tuple[int, ...] | None:
    """Of a constant weight in float, or one that the runtime makes float as it loads."""
    weight = constant_tensor(node.inputs[1])
    if weight is not None:
        return weight.shape.numpy() if weight.dtype == ir.DataType.FLOAT else None
    codes = packed(node.inputs[1])
    return None if codes is None or codes.shape is None else codes.shape.numpy()


def _producer(node: ir.Node) -> ir.Node | None:
    """Of the first input."""
    value = node.inputs[0] if node.inputs else None
    return None if value is None else value.producer()


def _longer_axis(kernel: ir.Node, way: ir.Node) -> tuple[int, int] | None:
    """An axis of what `way` reads that has more than one channel, and how many."""
    if way is kernel:
        found = _channels(kernel)
        return found if found[1] > 1 else None
    value = way.inputs[0]
    assert value is not None
    sizes = value.shape or ()
    known = ((axis, size) for axis, size in enumerate(sizes) if isinstance(size, int))
    return next(((axis, size) for axis, size in known if size > 1), None)


def _channels(node: ir.Node) -> tuple[int, int]:
    """The axis of the data that is summed over, and how long it is."""
    shape = _weight_shape(node)
    assert shape is not None
    axis = in_axis(node, len(shape))
    assert axis is not None
    if node.op_type == "Conv":
        return 1, shape[axis] * int_attribute(node, "group", 1)
    if node.op_type == "Gemm":
        return 1 - int_attribute(node, "transA", 0), shape[axis]
    return 1, shape[axis]


def _shield(way: ir.Node, axis: int, channels: int, fresh: FreshNames) -> None:
    graph, dequantizer = way.graph, _producer(way)
    assert isinstance(graph, ir.Graph) and dequantizer is not None
    floats = dequantizer.outputs[0]
    inputs: list[ir.Value] = [cast(ir.Value, dequantizer.inputs[0])]
    for value in dequantizer.inputs[1:]:
        array = constant(value)
        assert array is not None and value is not None
        name = fresh(f"{value.name}_by_channel")
        inputs.append(initializer(graph, name, np.full(channels, array.reshape(-1)[0])))
    shield = ir.node("DequantizeLinear", inputs, {"axis": axis})
    output = shield.outputs[0]
    output.name = shield.name = fresh(f"{floats.name}_by_channel")
    output.type, output.shape = floats.type, floats.shape
    graph.insert_before(way, shield)
    way.replace_input_with(0, output)
