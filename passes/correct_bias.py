"""Bias correction: give each output channel back the mean that quantization took from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress import targets
from onnxcompress.contract import Array, CalibratedPass, Kind, Result, Skip, Statistics, Want
from onnxcompress.errors import InputError
from onnxcompress.graph.names import FreshNames
from onnxcompress.graph.quantized_kernels import QuantizedKernel, quantized_kernels
from onnxcompress.graph.quantized_weights import FLOAT
from onnxcompress.graph.rewriting import initializer
from onnxcompress.numerics.second_order import mean_square
from onnxcompress.operators import operator

Floats = npt.NDArray[np.float64]
_POWER_ROWS: Final = 64


@dataclass(frozen=True, kw_only=True)
class CorrectBias(CalibratedPass):
    """Correct biases for what quantization adds to each output channel on average.

    Runs behind `insert_qdq`. With x what enters a layer in the quantized model before it is
    rounded to x̂, and W rounded to Ŵ, each output channel is off by the mean of

        Ŵ x̂ - W x  =  (Ŵ - W) x̂ + W (x̂ - x),

    which goes into the bias, or a new one for Conv and Gemm without. E[x̂] is taken over
    patches, so padding counts as zero as it does in the layer; E[x̂ - x], what clipping takes, is
    taken by channel.

    Every layer is corrected for what it does wrong itself. The alternative of bringing its output
    to the mean of the float model (Nagel et al.) also corrects what earlier layers did wrong, so
    it must go layer by layer with a run of the model for each: done for all layers at once, each
    corrects the same shift again, and on MobileNetV2 that left nothing of its accuracy.

    Declines, with a line in the report: MatMul, which has no bias, and weights whose float values
    are unknown, shared or stacks of matrices. Idempotent on the same statistics. It computes what
    `round_second_order` gives to biases too, so behind that only `clipping` adds anything.

    Source: Nagel et al., Data-Free Quantization through Weight Equalization and Bias Correction,
    2019, section 4.2; Banner et al., Post-training 4-bit Quantization of Convolution Networks for
    Rapid-Deployment, 2019.
    """

    name: ClassVar[str] = "correct_bias"

    target: str = "cpu"
    """Runtime that says whether a new bias is int32 or float32."""
    rows: int = 1024
    """Rows of a layer's input to keep in all."""
    rows_each: int = 32
    """Rows to take of one feed at most."""
    feeds: int = 16
    """Feeds to run at most, spread over the data; means need fewer than ranges."""
    clipping: bool = True
    """Also correct for what rounding the data takes: observing it costs a run in float."""

    def __post_init__(self) -> None:
        if min(self.rows, self.rows_each, self.feeds) < 1:
            raise InputError("correct_bias needs rows, rows_each and feeds of at least 1")

    def wants(self, model: ir.Model) -> Sequence[Want]:
        kernels, _ = _with_bias(model.graph)
        wants = [kernel.want(self.rows, self.rows_each) for kernel in kernels]
        if self.clipping:
            wants += [want for kernel in kernels for want in _means(kernel)]
        return [replace(want, feeds=self.feeds) for want in dict.fromkeys(wants)]

    def call(self, model: ir.Model) -> Result:
        kernels, skips = _with_bias(model.graph)
        if not kernels:
            return Result(model, modified=False, skips=tuple(skips))
        statistics = self.observed(self.wants(model))
        fresh = FreshNames(model.graph)
        kind = targets.load(self.target).weights.bias
        modified, before, after = False, 0.0, 0.0
        for kernel in kernels:
            correction, power = self._correction(kernel, statistics)
            held = kernel.held_bias()
            bias = kernel.bias_with(correction, kind if kernel.bias is None else None)
            wanted = correction.reshape(-1) + kernel.float_bias()
            left = [wanted - kernel.bias_value(b) for b in (held, bias)]
            before, after = (
                total + float(np.square(error).sum()) / power
                for total, error in zip((before, after), left, strict=True)
            )
            if kernel.bias is not None:
                modified |= kernel.write_bias(bias)
            elif bias.any():
                _add_bias(model.graph, kernel, bias, fresh)
                modified = True
        figures = {
            "layers": len(kernels),
            "mean error before": before,
            "mean error after": after,
        }
        return Result(model, modified=modified, skips=tuple(skips), figures=figures)

    def _correction(self, kernel: QuantizedKernel, statistics: Statistics) -> tuple[Floats, float]:
        """What the bias lacks, [G, N], and the mean power of the layer's output."""
        want = kernel.want(self.rows, self.rows_each)
        assert want.patches is not None
        rows = kernel.rows(statistics.rows(want.value, want.patches))
        weight = kernel.weight()
        lost = (weight - kernel.integers() * kernel.scales()[..., None]).astype(np.float64)
        step = float(kernel.data_scale)
        correction = np.einsum("gnk,gk->gn", lost, rows.mean(axis=1, dtype=np.float64)) * step
        for exact, rounded in _pairs(kernel) if self.clipping else ():
            axis = exact.axis or 0
            taken = statistics.mean(exact.value, axis) - statistics.mean(rounded.value, axis)
            by_group = taken.reshape(len(weight), -1)
            places = weight.shape[2] // by_group.shape[1]
            correction += np.einsum("gnk,gk->gn", weight, np.tile(by_group, (1, places)))
        power = float(mean_square(weight, rows[:, :_POWER_ROWS]).sum()) * step**2
        return correction, power or 1.0


def _with_bias(graph: ir.Graph) -> tuple[list[QuantizedKernel], list[Skip]]:
    kernels, skips = quantized_kernels(graph)
    for kernel in kernels:
        if operator(kernel.node).bias is None:
            skips.append(Skip(kernel.node.name or "", kernel.node.op_type, "it has no bias"))
    return [k for k in kernels if operator(k.node).bias is not None], skips


def _pairs(kernel: QuantizedKernel) -> list[tuple[Want, Want]]:
    """Means of the data before and after rounding.

    None where moves lie between, or the border of a body, which not every run crosses.
    """
    quantizer, floats = kernel.data.producer(), kernel.node.inputs[0]
    assert floats is not None
    if quantizer is None or quantizer.op_type != "QuantizeLinear" or quantizer.inputs[0] is None:
        return []
    if quantizer.graph is not floats.graph:
        return []
    axis = operator(kernel.node).channel_axis
    names = quantizer.inputs[0].name or "", floats.name or ""
    return [(Want(names[0], Kind.MEAN, axis), Want(names[1], Kind.MEAN, axis))]


def _means(kernel: QuantizedKernel) -> list[Want]:
    return [want for pair in _pairs(kernel) for want in pair]


def _add_bias(graph: ir.Graph, kernel: QuantizedKernel, bias: Array, fresh: FreshNames) -> None:
    """Give the kernel this bias: int32 behind a DequantizeLinear, or float32 as it is."""
    base = f"{kernel.node.name or kernel.codes.name}_bias"
    quantized = bias.dtype == np.int32
    stored = initializer(graph, fresh(f"{base}_quantized" if quantized else base), bias)
    stored.meta[FLOAT] = ir.tensor(np.zeros(bias.shape, np.float32))
    kernel.node.resize_inputs(3)
    kernel.node.replace_input_with(2, stored)
    if not quantized:
        return
    parts = {"scale": kernel.bias_scales(), "zero_point": np.zeros_like(bias)}
    constants = [initializer(graph, fresh(f"{base}_{k}"), array) for k, array in parts.items()]
    restore = ir.node("DequantizeLinear", [stored, *constants], {"axis": 0})
    output = restore.outputs[0]
    output.name = restore.name = fresh(f"{base}_dequantized")
    output.type, output.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(bias.shape)
    assert kernel.node.graph is not None
    kernel.node.graph.insert_before(kernel.node, restore)
    kernel.node.replace_input_with(2, output)
