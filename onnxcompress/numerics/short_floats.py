"""Rounding float32 to the 16-bit floats, and what is lost by it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_BLOCK: Final = 1 << 20
"""Elements looked at in one go, so that a mapped weight is never wholly in memory."""


def largest(dtype: np.dtype[Any]) -> float:
    """The largest finite value: 65504 for float16, 3.39e38 for bfloat16."""
    return float(_of_bits(dtype, 0x7BFF if dtype == np.float16 else 0x7F7F))


def unit_roundoff(dtype: np.dtype[Any]) -> float:
    """The largest relative error of rounding a normal number: 2^-11 or, for bfloat16, 2^-8."""
    one = _of_bits(dtype, 0x3C00 if dtype == np.float16 else 0x3F80)
    after = _of_bits(dtype, 0x3C01 if dtype == np.float16 else 0x3F81)
    return (float(after) - float(one)) / 2


def rounded(x: Array, dtype: np.dtype[Any]) -> Array:
    """`x` (any shape, float32) to nearest even; finite values saturate, infinities stay."""
    bound = np.float32(largest(dtype))
    with np.errstate(over="ignore", invalid="ignore"):
        return np.where(np.isinf(x), x, np.clip(x, -bound, bound)).astype(dtype)


def overflows(x: Array, dtype: np.dtype[Any]) -> bool:
    """Whether a finite value of `x` is beyond the type's largest."""
    return any(bool((m > largest(dtype)).any()) for m in _magnitudes(x))


def relative_error(x: Array, dtype: np.dtype[Any], counts: Array | None = None) -> float:
    """Root mean square of x - rounded(x) over that of x, non-finite values left out; 0 if x is 0.

    Only numbers that are subnormal in the type bring it above `unit_roundoff`.

    Args:
        counts: how often each element of `x` counts; once when None.
    """
    error = power = 0.0
    for start, block in enumerate(blocks(x)):
        weight = 1.0 if counts is None else counts[start * _BLOCK : (start + 1) * _BLOCK]
        finite = np.where(np.isfinite(block), block, np.float32(0))
        exact = finite.astype(np.float64)
        error += float(np.sum(weight * np.square(exact - rounded(finite, dtype))))
        power += float(np.sum(weight * np.square(exact)))
    return float(np.sqrt(error / power)) if power else 0.0


def blocks(x: Array) -> Iterator[Array]:
    """The elements of `x` in order, flat, a million at a time."""
    flat = x.reshape(-1)
    for start in range(0, flat.size, _BLOCK):
        yield flat[start : start + _BLOCK]


def _magnitudes(x: Array) -> Iterator[Array]:
    for block in blocks(x):
        magnitude = np.abs(block)
        yield magnitude[np.isfinite(magnitude)]


def _of_bits(dtype: np.dtype[Any], bits: int) -> Any:
    return np.array(bits, np.uint16).view(dtype)[()]
