"""SmoothQuant: move outlier channels of what matrix products read into their weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np
import onnx_ir as ir

from onnxcompress.contract import Array, CalibratedPass, Kind, Result, Skip, Want
from onnxcompress.graph.channel_scaling import Channels, Site, copy_of, site_of
from onnxcompress.graph.folding import Folding
from onnxcompress.graph.linear import Declined, Linear, NoSite, is_op, linear, tensor_of
from onnxcompress.numerics.row_sample import Patches
from onnxcompress.numerics.smoothing import smoothing_factors
from onnxcompress.operators import Role, constant_tensor, operator

_ROWS: Final = Patches(rows=1024, rows_each=32)
_FEEDS: Final = 32
"""As many as fill the sample."""
_LEAST_GAIN: Final = 0.2
_LEAST_GAIN_OF_NODE: Final = 1.0
_FEWEST_OUTPUTS: Final = 256
"""Products for each element: with fewer, a multiplication costs over 1% of the integer kernel."""


@dataclass(frozen=True, kw_only=True)
class Smooth(CalibratedPass):
    """Divide channels that matrix products read, and multiply their weights, to lose less.

    One scale serves all channels of an activation, so one outlier channel costs all others their
    resolution; a weight has a scale for each output channel::

        LayerNorm(g, b) ─ x ─ MatMul(W)   becomes   LayerNorm(g/s, b/s) ─ x/s ─ MatMul(s W)

    Nothing is added to the graph: x is divided where it is made, which is in the scale of a
    normalization (also an unfused one), in weight and bias of the layer before, or in a
    multiplication by constants; through functions that keep a positive factor, moves, sums,
    gates, and attention, from the output projection back into the values' projection. All that
    reads x takes it divided. Exact up to rounding in the last bits of float32. Values that are
    scaled now are named anew.

    Where x cannot be divided where it is made (a residual connection reads it too, or Gelu makes
    it), `insert` puts one multiplication before the products, if that promises 1 dB at least and
    they compute enough outputs of each element for it to stay under 1% of their work.

    The factors are max|x_j|^a / max|W_j|^b; a and b are chosen for each value by the error that
    quantization is expected to leave, on rows of calibration data that the ranges have not seen.

    Declines, with a line in the report: all else, values without outliers, and what the caller
    feeds, whose rare values would leave ranges in which no outlier gives them room any more. Goes
    into the main graph only.

    Source: Xiao et al., SmoothQuant: Accurate and Efficient Post-Training Quantization for Large
    Language Models, 2023.
    """

    name: ClassVar[str] = "smooth"
    exact: ClassVar[bool] = True

    insert: bool = True
    """Multiply before matrix products where nothing earlier can take the factors."""

    def wants(self, model: ir.Model) -> Sequence[Want]:
        sites, _ = self._sites(Folding(model), model.graph)
        return [want for value in sites for want in _wants(value)]

    def call(self, model: ir.Model) -> Result:
        folding = Folding(model)
        sites, skips = self._sites(folding, model.graph)
        if not sites:
            return Result(model, modified=False, skips=tuple(skips), figures={"values smoothed": 0})
        wants = {value: _wants(value) for value in sites}
        statistics = self.observed([want for each in wants.values() for want in each])
        gains: dict[str, float] = {}
        for value, site in sites.items():
            name = value.name or ""
            low, high = statistics.channel_range(name, -1)
            weights = [_matrix(layer) for layer in _layers(site, folding)]
            factors, left = smoothing_factors(statistics.rows(name, _ROWS), low, high, weights)
            gain = -10 * float(np.log10(left))
            try:
                _apply(folding, value, site, factors, gain)
            except Declined as reason:
                skips.append(Skip(name, "", str(reason)))
            else:
                gains[name] = gain
        folding.finish()
        figures = {"values smoothed": len(gains), "expected gain in dB": gains}
        return Result(model, folding.modified, skips=tuple(skips), figures=figures)

    def _sites(self, folding: Folding, graph: ir.Graph) -> tuple[dict[ir.Value, Site], list[Skip]]:
        """By the value that is observed; no value is in two of them."""
        next(folding.containers())
        found: dict[ir.Value, Site] = {}
        skips: list[Skip] = []
        seen: set[ir.Value] = set()
        for node in graph:
            value = _data(node, folding)
            if value is None or value in seen:
                continue
            layer = linear(node, folding.opset)
            channels = Channels((-1,), (layer.view[layer.in_axes[0]],))
            try:
                site = _site(folding, value, channels, seen)
            except (NoSite, Declined) as reason:
                site = copy_of(folding, value, channels)
                outputs = sum(layer.out_channels for layer in _layers(site, folding))
                if not self.insert or outputs < _FEWEST_OUTPUTS or _is_fed(value):
                    skips.append(Skip(node.name or "", node.op_type, str(reason)))
                    site = None
            seen.add(value)
            if site is not None:
                seen.update(site.values)
                found[value] = site
        return found, skips


def _site(folding: Folding, value: ir.Value, channels: Channels, seen: set[ir.Value]) -> Site:
    if _is_fed(value):
        raise Declined("it is what the caller feeds, whose range calibration cannot know")
    site = site_of(folding, value, channels)
    if not seen.isdisjoint(site.values):
        raise Declined("it hangs together with a value smoothed before")
    if any(is_op(other, "Conv", "ConvTranspose") for other in site.layers):
        raise Declined("a convolution reads it too")
    return site


def _is_fed(value: ir.Value) -> bool:
    """Whether it is an input of the graph, but for moves and arithmetic with constants."""
    while (node := value.producer()) is not None:
        computed = [v for v in node.inputs if v is not None and constant_tensor(v) is None]
        if operator(node).role not in (Role.MOVE, Role.ELEMENTWISE) or len(computed) != 1:
            return False
        (value,) = computed
    return True


def _apply(folding: Folding, value: ir.Value, site: Site, factors: Array, gain: float) -> None:
    if gain < (_LEAST_GAIN if site.values else _LEAST_GAIN_OF_NODE):
        raise Declined("its channels are alike enough: smoothing would gain nothing")
    site.scale(folding, factors)
    if site.values:
        return
    producer, graph = value.producer(), value.graph
    assert producer is not None and graph is not None
    scale = tensor_of(1 / factors, ir.DataType.FLOAT)
    node = ir.node("Mul", [value, folding.constant(scale, f"{value.name}_smoothing", producer)])
    divided = node.outputs[0]
    divided.name = node.name = folding.fresh(f"{value.name}_smoothed")
    divided.type, divided.shape = value.type, value.shape
    graph.insert_after(producer, node)
    for layer in site.layers:
        layer.replace_input_with(0, divided)


def _wants(value: ir.Value) -> list[Want]:
    name = value.name or ""
    ranges = Want(name, Kind.CHANNEL_RANGE, axis=-1, feeds=_FEEDS)
    return [ranges, Want(name, Kind.ROWS, patches=_ROWS, feeds=_FEEDS)]


def _data(node: ir.Node, folding: Folding) -> ir.Value | None:
    """What a product with a constant float32 matrix on the right multiplies by it."""
    if not is_op(node, "MatMul", "Gemm"):
        return None
    try:
        layer = linear(node, folding.opset)
    except (NoSite, Declined):
        return None
    right = layer.index == 1 and layer.data_axis in (-1, 1) and len(layer.view) == 2
    return node.inputs[0] if right and layer.weight.dtype == ir.DataType.FLOAT else None


def _layers(site: Site, folding: Folding) -> Iterator[Linear]:
    return (linear(node, folding.opset) for node in site.layers)


def _matrix(layer: Linear) -> Array:
    """The weight as (N, K)."""
    array = layer.weight.numpy()
    return np.moveaxis(array, layer.in_axes[0], -1).reshape(-1, array.shape[layer.in_axes[0]])
