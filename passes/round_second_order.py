"""Second-order rounding: integers near the weight that disturb the layer's output least."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress import targets
from onnxcompress.contract import Array, CalibratedPass, Figure, Result, Skip, Statistics, Want
from onnxcompress.errors import InputError
from onnxcompress.graph.quantized_kernels import QuantizedKernel, quantized_kernels
from onnxcompress.numerics.second_order import mean_square, round_rows
from onnxcompress.numerics.side_by_side import side_by_side

_POWER_ROWS: Final = 64


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

    By that error, over some of the rows that calibration kept, no output channel is left worse
    than rounding to nearest. The figures give the error of all layers' outputs together before and
    after, each layer's as a share of its output's power.

    Declines, with a line in the report: weights whose float values are unknown, are shared by
    several nodes or are stacks of matrices. A second run with the same statistics changes
    nothing. Rounded integers are held in memory, a quarter of the float.

    Source: Frantar et al., GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
    Transformers, 2022; Hubara et al., Accurate Post Training Quantization with Small Calibration
    Sets, 2021 (for convolutions).
    """

    name: ClassVar[str] = "round_second_order"

    target: str = "cpu"
    """Runtime whose kernels are aimed at."""
    rows: int = 1024
    """Rows of a layer's input to keep in all; narrow layers keep fewer."""
    rows_each: int = 32
    """Rows to take of one feed at most."""
    damping: float = 0.02
    """Noise added to the input, as a share of its mean power, so as not to fit the sample."""
    widest: int = 6144
    """Values that an output sums over to treat together; wider layers are rounded in parts."""

    def __post_init__(self) -> None:
        if min(self.rows, self.rows_each, self.widest - 1) < 1 or not 0 < self.damping < math.inf:
            raise InputError(
                "round_second_order needs rows and rows_each of at least 1, widest of at least 2 "
                "and a damping above 0"
            )

    def wants(self, model: ir.Model) -> Sequence[Want]:
        kernels, _ = quantized_kernels(model.graph)
        return list(dict.fromkeys(self._want(kernel) for kernel in kernels))

    def call(self, model: ir.Model) -> Result:
        kernels, skips = quantized_kernels(model.graph)
        if not kernels:
            return Result(model, modified=False, skips=tuple(skips))
        statistics = self.observed(self.wants(model))
        errors: list[tuple[float, float]] = []
        modified = False
        solved = side_by_side(partial(self._solve, statistics), kernels)
        for kernel, rounded in zip(kernels, solved, strict=True):
            if rounded is None:
                reason = "its input varies too little to be solved for"
                skips.append(Skip(kernel.node.name or "", kernel.node.op_type, reason))
                continue
            modified |= kernel.write(rounded.codes)
            if rounded.bias is not None:
                modified |= kernel.write_bias(rounded.bias)
            errors.append((rounded.before, rounded.after))
        return Result(model, modified=modified, skips=tuple(skips), figures=_figures(errors))

    def _want(self, kernel: QuantizedKernel) -> Want:
        # Few unknowns need few rows; 512 also tell the mean.
        return kernel.want(min(self.rows, max(512, 8 * kernel.terms)), self.rows_each)

    def _solve(self, statistics: Statistics, kernel: QuantizedKernel) -> _Rounded | None:
        """None where the layer's input does not tell enough."""
        want = self._want(kernel)
        assert want.patches is not None
        try:
            return self._round(kernel, statistics.rows(want.value, want.patches))
        except np.linalg.LinAlgError:
            return None

    def _round(self, kernel: QuantizedKernel, sample: Array) -> _Rounded:
        weight, scales, codes = kernel.weight(), kernel.scales(), kernel.integers()
        rows = kernel.rows(sample)
        centered = kernel.bias is not None
        mean = rows.mean(axis=1) if centered else np.zeros_like(rows[:, 0])
        rows -= mean[:, None]
        pairs = targets.load(self.target).bounds_pair_sums and not kernel.depthwise
        found, *errors = round_rows(
            *(weight, codes, scales, rows),
            damping=self.damping,
            bound_pairs=pairs,
            widest=self.widest,
        )
        before, after = (float(error.sum()) for error in errors)
        bias = None
        if centered:
            lost = _shift(weight, found, scales, mean)
            bias = kernel.bias_with(lost * np.float64(kernel.data_scale))
            before += float(np.square(_shift(weight, codes, scales, mean)).sum())
        steady = np.square(weight @ mean[..., None]).sum()
        power = float(mean_square(weight, rows[:, :_POWER_ROWS]).sum() + steady) or 1.0
        return _Rounded(found, bias, before / power, after / power)


@dataclass(frozen=True, slots=True)
class _Rounded:
    """New integers of a layer, and the error before and after as shares of its output's power."""

    codes: npt.NDArray[np.int8]
    bias: Array | None
    before: float
    after: float


def _shift(weight: Array, codes: Array, scales: Array, mean: Array) -> Array:
    """(W - Ŵ) E[x] of each output channel, [G, N]."""
    return np.einsum("gnk,gk->gn", weight - codes * scales[..., None], mean)


def _figures(errors: Sequence[tuple[float, float]]) -> dict[str, Figure]:
    before, after = (sum(column) for column in zip(*errors, strict=True)) if errors else (0, 0)
    return {
        "layers": len(errors),
        "output error before": float(before),
        "output error after": float(after),
    }
