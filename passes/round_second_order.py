"""Second-order rounding: integers near the weight that disturb the layer's output least."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress import targets
from onnxcompress.contract import CalibratedPass, Figure, Result, Skip, Want
from onnxcompress.errors import InputError
from onnxcompress.graph.quantized_kernels import QuantizedKernel, quantized_kernels
from onnxcompress.numerics.second_order import gram_matrix, output_error, round_rows


@dataclass(frozen=True, kw_only=True)
class RoundSecondOrder(CalibratedPass):
    """Round weights anew so that what each layer gives out, not what it holds, changes least.

    Runs behind `insert_qdq` and leaves scales and graph as that made them. Of the integers near a
    weight W it chooses those, Ŵ, with small E‖(W - Ŵ)x‖², x being the layer's quantized input in
    calibration: columns are rounded one after another, each making good the mistakes of those
    before it (`numerics.second_order`), for Conv (dense, grouped, depthwise), Gemm and MatMul.
    Where the layer has a bias, x is taken about its mean and the bias gives back what is lost on
    average: b̂ = b + (W - Ŵ) E[x]. On targets that add products in 16 bits the integers keep clear
    of saturation.

    By that error, over the rows that calibration kept, no output channel is left worse than
    rounding to nearest. The figures give the error of all layers' outputs together before and
    after, each layer's as a share of its output's power.

    Declines, with a line in the report: weights whose float values are unknown, are shared by
    several nodes or are stacks of matrices, and layers wider than `widest`. A second run with the
    same statistics changes nothing. Rounded integers are held in memory, a quarter of the float.

    Source: Frantar et al., GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
    Transformers, 2022; Hubara et al., Accurate Post Training Quantization with Small Calibration
    Sets, 2021 (for convolutions).
    """

    name: ClassVar[str] = "round_second_order"

    target: str = "cpu"
    """Runtime whose kernels are aimed at."""
    rows: int = 2048
    """Rows of a layer's input to keep in all; narrow layers keep fewer."""
    rows_each: int = 32
    """Rows to take of one feed at most."""
    damping: float = 0.02
    """Noise added to the input, as a share of its mean power, so as not to fit the sample."""
    widest: int = 6144
    """Values that an output may sum over; time and memory grow with the square of it."""

    def __post_init__(self) -> None:
        if min(self.rows, self.rows_each, self.widest) < 1 or not 0 < self.damping < math.inf:
            raise InputError(
                "round_second_order needs rows, rows_each and widest of at least 1 and a "
                "damping above 0"
            )

    def wants(self, model: ir.Model) -> Sequence[Want]:
        kernels, _ = self._kernels(model.graph)
        return list(dict.fromkeys(self._want(kernel) for kernel in kernels))

    def call(self, model: ir.Model) -> Result:
        kernels, skips = self._kernels(model.graph)
        if not kernels:
            return Result(model, modified=False, skips=tuple(skips))
        statistics = self.observed(self.wants(model))
        errors: list[tuple[float, float]] = []
        modified = False
        for kernel in kernels:
            want = self._want(kernel)
            assert want.patches is not None
            rows = kernel.rows(statistics.rows(want.value, want.patches))
            try:
                changed, *error = self._round(kernel, rows)
            except np.linalg.LinAlgError:
                reason = "its input varies too little to be solved for"
                skips.append(Skip(kernel.node.name or "", kernel.node.op_type, reason))
                continue
            modified |= changed
            errors.append((error[0], error[1]))
        return Result(model, modified=modified, skips=tuple(skips), figures=_figures(errors))

    def _kernels(self, graph: ir.Graph) -> tuple[list[QuantizedKernel], list[Skip]]:
        kernels, skips = quantized_kernels(graph)
        for kernel in kernels:
            if kernel.terms > self.widest:
                reason = f"its outputs sum over {kernel.terms} values, more than {self.widest}"
                skips.append(Skip(kernel.node.name or "", kernel.node.op_type, reason))
        return [k for k in kernels if k.terms <= self.widest], skips

    def _want(self, kernel: QuantizedKernel) -> Want:
        # Few unknowns need few rows; 512 also tell the mean.
        return kernel.want(min(self.rows, max(512, 8 * kernel.terms)), self.rows_each)

    def _round(
        self, kernel: QuantizedKernel, rows: npt.NDArray[np.float32]
    ) -> tuple[bool, float, float]:
        """Whether anything changed, and the error before and after as shares of the power."""
        weight, scales, codes = kernel.weight(), kernel.scales(), kernel.integers()
        centered = kernel.bias is not None
        mean = rows.mean(axis=1) if centered else np.zeros_like(rows[:, 0])
        rows -= mean[:, None]
        gram = gram_matrix(rows)
        pairs = targets.load(self.target).bounds_pair_sums and not kernel.depthwise
        found, before, after = round_rows(
            weight, codes, scales, gram, damping=self.damping, bound_pairs=pairs
        )
        changed = kernel.write(found)
        if centered:
            lost = np.einsum("gnk,gk->gn", weight - found * scales[..., None], mean)
            bias = kernel.bias_with(lost * np.float64(kernel.data_scale))
            changed |= kernel.write_bias(bias)
            before = before + np.square(
                np.einsum("gnk,gk->gn", weight - codes * scales[..., None], mean)
            )
        power = float(output_error(weight, gram).sum() + np.square(weight @ mean[..., None]).sum())
        return changed, *(float(e.sum()) / power if power else 0.0 for e in (before, after))


def _figures(errors: Sequence[tuple[float, float]]) -> dict[str, Figure]:
    before, after = (sum(column) for column in zip(*errors, strict=True)) if errors else (0, 0)
    return {
        "layers": len(errors),
        "output error before": float(before),
        "output error after": float(after),
    }
