"""Cross-layer equalization: bring the channels between two layers to alike ranges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.contract import Array, CalibratedPass, Kind, Result, Skip, Want
from onnxcompress.errors import InputError
from onnxcompress.graph.names import FreshNames
from onnxcompress.operators import (
    DEFAULT_DOMAINS,
    HOMOGENEOUS,
    constant,
    constant_tensor,
    int_attribute,
    output_range,
)

_FAINT: Final = 1e-3
_FEEDS: Final = 64
"""Feeds that tell how far each channel reaches, well enough for half of the way."""
_LAYERS: Final = ("Conv", "Gemm")


@dataclass(frozen=True, slots=True)
class _Pair:
    """A layer, the value behind it, and the only layer that reads it."""

    first: ir.Node
    second: ir.Node

    @property
    def value(self) -> ir.Value:
        return self.first.outputs[0]

    @property
    def want(self) -> Want:
        return Want(self.value.name or "", Kind.CHANNEL_RANGE, axis=1, feeds=_FEEDS)


@dataclass(frozen=True, kw_only=True)
class Equalize(CalibratedPass):
    """Scale each channel between two layers so that one scale a tensor serves all of them.

    For s > 0 and a homogeneous f, as ReLU, LeakyReLU, PReLU and pooling are::

        W₂ f(W₁ x + b₁)  =  (W₂ S) f(S⁻¹ W₁ x + S⁻¹ b₁)

    so channel i may be divided by s_i = (r_i / r̄)^strength, r_i being its largest magnitude in
    calibration and r̄ their geometric mean. Weights keep a scale for each output channel, so what
    the activations gain costs only the spread within the second layer's rows, and half of the
    way (strength 0.5) is the balance. Exact up to rounding in the last bit of float32. The values
    in between are named anew, since they no longer are what they were in the original.

    Declines, with a line in the report, behind a layer whose output has a bound (ReLU6, Clip): it
    would be another one for each channel, which only a Min of its own could hold, in float between
    integer kernels. On MobileNetV2 that cost more than it could gain. Declines too where the
    layer's output is exported or has several readers; silently where other operators stand
    between two layers, or weights are computed, shared or not float32. Goes into the main graph
    only. A second run on the same statistics would scale again.

    Source: Nagel et al., Data-Free Quantization through Weight Equalization and Bias Correction,
    2019, section 4.1; Xiao et al., SmoothQuant, 2023, for the balance of activations and weights.
    """

    name: ClassVar[str] = "equalize"
    exact: ClassVar[bool] = True

    strength: float = 0.5
    """How far ranges are brought together: 0 not at all, 1 until all are the same."""

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 1:
            raise InputError(f"equalize: strength {self.strength} is not from 0 to 1")

    def wants(self, model: ir.Model) -> Sequence[Want]:
        return [pair.want for pair in _pairs(model.graph)[0]]

    def call(self, model: ir.Model) -> Result:
        pairs, skips = _pairs(model.graph)
        if not pairs or not self.strength:
            figures = {"pairs of layers": 0}
            return Result(model, modified=False, skips=tuple(skips), figures=figures)
        statistics = self.observed([pair.want for pair in pairs])
        fresh = FreshNames(model.graph)
        for pair in pairs:
            low, high = statistics.channel_range(pair.value.name or "", 1)
            ranges = np.maximum(np.abs(low), np.abs(high)).astype(np.float64)
            _scale(pair, _factors(ranges, self.strength))
            for value in _between(pair):
                value.name = fresh(f"{value.name}_equalized")
        figures = {"pairs of layers": len(pairs)}
        return Result(model, modified=True, skips=tuple(skips), figures=figures)


def _factors(ranges: npt.NDArray[np.float64], strength: float) -> npt.NDArray[np.float64]:
    """What channels of these ranges are divided by, (C,); faint channels are not blown up."""
    largest = ranges.max(initial=0.0)
    if largest == 0:
        return np.ones_like(ranges)
    ranges = np.maximum(ranges, _FAINT * largest)
    return np.exp(strength * (np.log(ranges) - np.log(ranges).mean()))


def _pairs(graph: ir.Graph) -> tuple[list[_Pair], list[Skip]]:
    found: list[_Pair] = []
    skips: list[Skip] = []
    for node in graph:
        second = _reader(node) if _is_layer(node) else None
        if isinstance(second, ir.Node):
            found.append(_Pair(node, second))
        elif second is not None:
            skips.append(Skip(node.name or "", node.op_type, second))
    return found, skips


def _is_layer(node: ir.Node) -> bool:
    """Whether the node's weight and bias are float32 constants that only it reads."""
    if node.op_type not in _LAYERS or node.domain not in DEFAULT_DOMAINS:
        return False
    if node.op_type == "Gemm" and (
        int_attribute(node, "transA", 0) or not {"alpha", "beta"}.isdisjoint(node.attributes)
    ):
        return False
    for value in node.inputs[1:3]:
        tensor = constant_tensor(value)
        if value is None:
            continue
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or len(value.uses()) != 1:
            return False
        if value.is_graph_output():
            return False
    bias = constant_tensor(node.inputs[2]) if len(node.inputs) > 2 else None
    return bias is None or bias.shape.rank() == 1


def _reader(node: ir.Node) -> ir.Node | str | None:
    """The one layer that reads the node's output, through homogeneous functions alone.

    Or why there is none, where it looks as if there were.
    """
    value = node.outputs[0]
    while not value.is_graph_output() and len(value.uses()) == 1:
        (usage,) = value.uses()
        reader = usage.node
        if reader.graph is not node.graph or usage.idx != 0:
            return None
        if _is_layer(reader) and reader.op_type == node.op_type:
            return reader
        if np.isfinite(output_range(reader) or np.inf).all():
            return f"the {reader.op_type} behind it has a bound, which each channel would scale"
        if reader.op_type not in HOMOGENEOUS or reader.domain not in DEFAULT_DOMAINS:
            return None
        if len(reader.outputs) != 1:
            return None
        value = reader.outputs[0]
    return "what it computes is exported or read more than once"


def _between(pair: _Pair) -> list[ir.Value]:
    """The values that are scaled now: they are not what their names stood for."""
    values = [pair.value]
    while (reader := next(iter(values[-1].uses())).node) is not pair.second:
        values.append(reader.outputs[0])
    return values


def _scale(pair: _Pair, factors: npt.NDArray[np.float64]) -> None:
    _multiply(pair.first, 1, _spread(pair.first, 1 / factors, outputs=True))
    if len(pair.first.inputs) > 2 and pair.first.inputs[2] is not None:
        _multiply(pair.first, 2, 1 / factors)
    _multiply(pair.second, 1, _spread(pair.second, factors, outputs=False))


def _spread(node: ir.Node, factors: npt.NDArray[np.float64], *, outputs: bool) -> Array:
    """`factors`, one a channel, in a shape that multiplies the node's weight."""
    weight = constant_tensor(node.inputs[1])
    assert weight is not None
    shape = weight.shape.numpy()
    if node.op_type == "Gemm":
        rows = bool(int_attribute(node, "transB", 0)) == outputs
        return factors[:, None] if rows else factors[None, :]
    rest = [1] * (len(shape) - 2)
    if outputs:
        return factors.reshape(-1, 1, *rest)
    # Each group of output channels reads its own part of the input channels.
    group = int_attribute(node, "group", 1)
    parts = np.repeat(factors.reshape(group, -1), shape[0] // group, axis=0)
    return parts.reshape(shape[0], shape[1], *rest)


def _multiply(node: ir.Node, index: int, factors: Array) -> None:
    """Scale a constant of the node in place; a Constant node's value becomes an initializer."""
    value = node.inputs[index]
    array = constant(value)
    assert value is not None and array is not None and node.graph is not None
    scaled = (array.astype(np.float64) * factors).astype(np.float32)
    if value.producer() is None:
        value.const_value = ir.tensor(scaled, name=value.name)
        return
    name = f"{value.name}_equalized"
    new = ir.val(name, ir.DataType.FLOAT, scaled.shape, const_value=ir.tensor(scaled, name=name))
    assert isinstance(node.graph, ir.Graph)
    node.graph.register_initializer(new)
    node.replace_input_with(index, new)
