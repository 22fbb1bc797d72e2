"""Keep ONNX Runtime from quantizing float weights by itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final, cast

import numpy as np
import onnx_ir as ir

from onnxcompress.contract import Pass, Result, Skip
from onnxcompress.graph.names import FreshNames
from onnxcompress.operators import (
    DEFAULT_DOMAINS,
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
    scale, ONNX Runtime's WeightBiasQuantization rounds it to int8 with one scale a tensor. It
    leaves alone what has a scale for each channel, so each such kernel gets a DequantizeLinear of
    its own with the same scale written once a channel::

        x_q ─ DQ(scale) ─ Conv(W)    ⇒    x_q ─ DQ([scale, …], axis) ─ Conv(W)

    Exact: the values are the same to the bit. Idempotent. Declines, with a line in the report,
    kernels that read a single channel: a list of one is one scale to ONNX Runtime.

    Source: ONNX DequantizeLinear 13.
    """

    name: ClassVar[str] = "shield_floats"
    exact: ClassVar[bool] = True

    def call(self, model: ir.Model) -> Result:
        graph = model.graph
        if graph.opset_imports.get("", 0) < _AXES:
            return Result(model, modified=False)
        fresh = FreshNames(graph)
        shielded, skips = 0, list[Skip]()
        for node in graph:
            dequantizer = _exposed(node)
            if dequantizer is None:
                continue
            axis, channels = _channels(node)
            if channels > 1:
                _shield(node, dequantizer, axis, channels, fresh)
                shielded += 1
            else:
                reason = "it reads one channel: ONNX Runtime will quantize its weight by itself"
                skips.append(Skip(node.name or "", node.op_type, reason))
        figures = {"float kernels behind integers": shielded}
        return Result(model, modified=bool(shielded), skips=tuple(skips), figures=figures)


def _exposed(node: ir.Node) -> ir.Node | None:
    """The DequantizeLinear of one scale before a kernel whose weight is a float constant."""
    if node.op_type not in _QUANTIZED or node.domain not in DEFAULT_DOMAINS:
        return None
    data, weight = node.inputs[0], constant_tensor(node.inputs[1])
    producer = None if data is None else data.producer()
    if producer is None or producer.op_type != "DequantizeLinear":
        return None
    if weight is None or weight.dtype != ir.DataType.FLOAT:
        return None
    scale = constant(producer.inputs[1])
    return producer if scale is not None and scale.size == 1 else None


def _channels(node: ir.Node) -> tuple[int, int]:
    """The axis of the data that is summed over, and how long it is."""
    tensor = constant_tensor(node.inputs[1])
    assert tensor is not None
    shape = tensor.shape.numpy()
    axis = in_axis(node, len(shape))
    assert axis is not None
    if node.op_type == "Conv":
        return 1, shape[axis] * int_attribute(node, "group", 1)
    if node.op_type == "Gemm":
        return 1 - int_attribute(node, "transA", 0), shape[axis]
    channel_axis = operator(node).channel_axis
    assert channel_axis is not None
    return channel_axis, shape[axis]


def _shield(
    node: ir.Node, dequantizer: ir.Node, axis: int, channels: int, fresh: FreshNames
) -> None:
    graph, floats = node.graph, dequantizer.outputs[0]
    assert isinstance(graph, ir.Graph)
    inputs: list[ir.Value] = [cast(ir.Value, dequantizer.inputs[0])]
    for value in dequantizer.inputs[1:]:
        array = constant(value)
        assert array is not None and value is not None
        name = fresh(f"{value.name}_by_channel")
        tensor = ir.tensor(np.full(channels, array.reshape(-1)[0]), name=name)
        copy = ir.Value(name=name, type=value.type, shape=ir.Shape((channels,)), const_value=tensor)
        graph.register_initializer(copy)
        inputs.append(copy)
    shield = ir.node("DequantizeLinear", inputs, {"axis": axis})
    output = shield.outputs[0]
    output.name = shield.name = fresh(f"{floats.name}_by_channel")
    output.type, output.shape = floats.type, floats.shape
    graph.insert_before(node, shield)
    node.replace_input_with(0, output)
