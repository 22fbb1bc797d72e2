"""Weights as rows of int8 codes with a scale each, for kernels that take them without QDQ pairs.

Rows are (..., N, K): N output channels that sum over K. They are read in blocks, so a view of a
memory-mapped weight is never copied whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from onnxcompress.numerics.affine import quantize, symmetric_per_channel
from onnxcompress.numerics.saturation import PAIR_LIMIT, largest_pair_sum, trim_pairs

Array = npt.NDArray[Any]

_BLOCK: Final = 1 << 21  # elements
_INT8_MAX: Final = 127


def code_bounds(rows: Array, *, bound_pairs: bool) -> npt.NDArray[np.float64]:
    """The magnitude (N,) that the code 127 must stand for in each of `rows` (N, K).

    With `bound_pairs` it is large enough that no two neighbours saturate a 16-bit sum.
    """
    bound = np.abs(rows).max(axis=1, initial=0.0).astype(np.float64)
    if bound_pairs:
        bound = np.maximum(bound, largest_pair_sum(rows) * (_INT8_MAX / PAIR_LIMIT))
    return bound


def row_bounds(rows: Array, *, bound_pairs: bool) -> npt.NDArray[np.float64]:
    """`code_bounds` of each of the rows (..., N, K), as (..., N)."""
    bounds = np.empty(rows.shape[:-1], np.float64)
    for index in row_blocks(rows):
        bounds[index] = code_bounds(rows[index], bound_pairs=bound_pairs)
    return bounds


def row_codes(
    rows: Array, bounds: npt.NDArray[np.float64], *, bound_pairs: bool
) -> npt.NDArray[np.int8]:
    """The int8 codes (..., N, K) of `rows`, with zero as code 0, laid out in memory as they are."""
    codes = np.empty_like(rows, np.int8)
    for index in row_blocks(rows):
        block = quantize(rows[index], symmetric_per_channel(bounds[index], "int8", 0))
        codes[index] = trim_pairs(block) if bound_pairs else block
    return codes


def row_scales(bounds: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    """The scales (...) with which the code 127 stands for `bounds` (...)."""
    return symmetric_per_channel(bounds.reshape(-1), "int8", 0).scale.reshape(bounds.shape)


def row_sqnr(rows: Array, bounds: npt.NDArray[np.float64]) -> float:
    """Signal to quantization noise of all `row_codes` together, in dB."""
    power = noise = 0.0
    for index in row_blocks(rows):
        block, parameters = rows[index], symmetric_per_channel(bounds[index], "int8", 0)
        error = quantize(block, parameters) * parameters.scale[:, None] - block
        power += float(np.square(block, dtype=np.float64).sum())
        noise += float(np.square(error, dtype=np.float64).sum())
    return 10 * math.log10(power / noise) if noise and power else math.inf


def row_blocks(rows: Array, most: int = _BLOCK) -> Iterator[tuple[int | slice, ...]]:
    """Indices that go through rows (..., N, K) in order, some of a matrix at a time.

    Args:
        most: elements to take in one go, if that is a row at all.
    """
    step = max(1, most // max(1, rows.shape[-1]))
    for lead in np.ndindex(rows.shape[:-2]):
        for start in range(0, rows.shape[-2], step):
            yield (*lead, slice(start, start + step))
