"""Weights between two codes, for a gradient to choose from.

    w = (floor + h(v)) · scale,      h(v) = clip(1.2 · sigmoid(v) - 0.1, 0, 1)

and a term that drives each h to 0 or 1: the mean of 1 - |2h - 1|^beta, with a beta that falls, so
that at first only what is nearly decided is decided.

Source: Nagel et al., Up or Down? Adaptive Rounding for Post-Training Quantization, 2020.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import onnx_ir as ir

from onnxcompress.contract import Array
from onnxcompress.graph.rewriting import initializer
from onnxcompress.numerics.affine import Affine, quantize, spread
from onnxcompress.train.losses import Terms
from onnxcompress.train.tape import Tape

BETA: Final = "onnxcompress.beta"
"""An input of the training graph: the exponent."""
STRENGTH: Final = "onnxcompress.strength"
"""An input of the training graph: what the term is multiplied by."""

_STRETCH, _SHIFT = np.float32(1.2), np.float32(0.1)
_DECIDED: Final = np.float32(-20)
"""v whose h is 0 and has no gradient."""
_REACH: Final = np.float32(0.45)
"""How far from its code a weight starts, in steps: short of the middle to the next."""


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """Two neighbouring codes for each element of a weight, and the names of what decides."""

    floor: Array
    """The lower code, int32."""
    grid: Affine
    v: str
    """Name of the initializer that is trained."""
    h: str
    """Name of the value that is driven to 0 or 1."""

    def codes(self, v: Array) -> Array:
        """The nearer of the two, of the grid's type."""
        return (self.floor + (v > 0)).astype(self.grid.zero_point.dtype)


def soften(
    tape: Tape, name: str, floats: Array, now: Array, grid: Affine
) -> tuple[ir.Value, Choice]:
    """A weight of two codes each, and the choice of them.

    Each starts at the float, where its code is next to that. Where it is not, the code having been
    chosen for the sake of others, each starts near the middle, on that code's side.

    Args:
        floats: the weight before it was quantized.
        now: as it is quantized, of the same shape.
    """
    scale, zero = spread(grid, now.shape)
    codes, middle = quantize(now, grid).astype(np.int32), zero.astype(np.int32)
    low, high = grid.range
    aim = np.clip(floats / scale + middle, codes - _REACH, codes + _REACH)
    floor = np.clip(np.floor(aim), low, high - 1).astype(np.int32)
    share = np.clip(aim - floor, 0, 1).astype(np.float32)
    start = -np.log(_STRETCH / (share + _SHIFT) - 1)
    zeros = floats == 0  # they may have been pruned
    floor, start = np.where(zeros, codes, floor), np.where(zeros, _DECIDED, start)
    v = initializer(tape.graph, tape.name(f"{name}_rounding"), start.astype(np.float32))
    h = _between(tape, v)
    lower = tape.constant((floor - middle).astype(np.float32))
    soft = tape.op("Mul", [tape.op("Add", [lower, h]), tape.constant(scale)])
    return soft, Choice(floor, grid, v.name or "", h.name or "")


def _between(tape: Tape, v: ir.Value) -> ir.Value:
    stretch, shift, low, high = (
        tape.constant(np.asarray(x, np.float32)) for x in (_STRETCH, _SHIFT, 0, 1)
    )
    stretched = tape.op("Mul", [tape.op("Sigmoid", [v]), stretch])
    return tape.op("Clip", [tape.op("Sub", [stretched, shift]), low, high])


@dataclass(frozen=True)
class Decided:
    """The mean over all weights of 1 - |2h - 1|^beta, times a strength.

    Both numbers come with each batch, as `BETA` and `STRENGTH`.
    """

    choices: Sequence[Choice]
    weight: float = 1.0

    def emit(self, terms: Terms) -> ir.Value:
        tape = terms.tape
        beta, strength = (terms.target(n, [], ir.DataType.FLOAT) for n in (BETA, STRENGTH))
        sums = [self._sum(terms, terms.value(choice.h), beta) for choice in self.choices]
        total = tape.op("Sum", sums) if len(sums) > 1 else sums[0]
        count = sum(choice.floor.size for choice in self.choices)
        open_ = tape.op("Sub", [terms.number(1.0), terms.times(total, 1 / count)])
        return tape.op("Mul", [open_, strength])

    def _sum(self, terms: Terms, h: ir.Value, beta: ir.Value) -> ir.Value:
        tape = terms.tape
        twice = tape.op("Sub", [terms.times(h, 2.0), terms.number(1.0)], like=h)
        power = tape.op("Pow", [tape.op("Abs", [twice], like=h), beta], like=h)
        return tape.op("ReduceSum", [power], {"keepdims": 0})
