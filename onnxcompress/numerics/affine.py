"""Affine quantization: q = saturate(round(x / scale) + zero_point), as QuantizeLinear defines it.

Rounding is to nearest even and scales are float32, so what is computed here is what ONNX
Runtime computes at run time. The 8-bit floats are codes too, with a zero_point of zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
FloatArray = npt.NDArray[np.floating[Any]]

RANGES: Final[dict[str, tuple[int, int]]] = {
    "int2": (-2, 1),
    "uint2": (0, 3),
    "int4": (-8, 7),
    "uint4": (0, 15),
    "int8": (-128, 127),
    "uint8": (0, 255),
    "int16": (-32768, 32767),
    "uint16": (0, 65535),
    "int32": (-(2**31), 2**31 - 1),
    "float8e4m3fn": (-448, 448),
    "float8e5m2": (-57344, 57344),
}
"""Smallest and largest finite value of each type of codes."""

FLOAT8: Final[dict[str, np.dtype[Any]]] = {
    "float8e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8e5m2": np.dtype(ml_dtypes.float8_e5m2),
}
"""Types of codes that are floats themselves: their steps grow with the magnitude."""

SMALLEST_SCALE: Final = np.float32(1e-30)
"""Keeps scales, and the products of two that scale a bias, clear of denormals."""


@dataclass(frozen=True, slots=True)
class Affine:
    """Parameters of one tensor: `scale` float32 and `zero_point` of `dtype`.

    Scalar; 1-D along `axis`; or, with a `block_size`, of the tensor's rank, with one for each
    block of so many values along `axis`, the last of which may be shorter.
    """

    scale: npt.NDArray[np.float32]
    zero_point: Array
    dtype: str
    axis: int | None = None
    block_size: int = 0

    @property
    def range(self) -> tuple[int, int]:
        return RANGES[self.dtype]


def affine(low: float, high: float, dtype: str, *, symmetric: bool = False) -> Affine:
    """Per-tensor parameters that cover [low, high], widened to hold zero exactly.

    Symmetric ranges use zero_point 0 for signed types (and the middle for unsigned ones) and
    leave the type's smallest value unused, so that negation stays exact.

    Raises:
        ValueError: if a bound is not finite or low > high.
    """
    if not (np.isfinite(low) and np.isfinite(high) and low <= high):
        raise ValueError(f"no quantization covers [{low}, {high}]")
    qmin, qmax = RANGES[dtype]
    low, high = min(low, 0.0), max(high, 0.0)
    if symmetric:
        middle = (qmin + qmax + 1) // 2
        scale = _float32_scale(max(-low, high) / (qmax - middle))
        return Affine(scale, np.asarray(middle, numpy_type(dtype)), dtype)
    scale = _float32_scale((high - low) / (qmax - qmin))
    # A scale rounded up would let the largest code pass `high`, and ONNX Runtime then no longer
    # sees that QuantizeLinear already does the clipping of a Clip before it.
    if high > 0 and scale > SMALLEST_SCALE and scale * np.float32(qmax - qmin) > high - low:
        scale = np.asarray(np.nextafter(scale, np.float32(0)))
    zero_point = int(np.clip(np.round(qmin - low / float(scale)), qmin, qmax))
    return Affine(scale, np.asarray(zero_point, dtype), dtype)


def even(low: float, high: float, dtype: str) -> Affine:
    """Per-tensor parameters whose step divides [low, high] by the number of codes of the type.

    So the step of [0, 1] is a power of two, and the code above the largest would stand for `high`.
    """
    qmin, qmax = RANGES[dtype]
    step = (high - low) / (qmax - qmin + 1)
    zero_point = np.asarray(np.clip(round(qmin - low / step), qmin, qmax), dtype)
    return Affine(_float32_scale(step), zero_point, dtype)


def symmetric_per_channel(bound: FloatArray, dtype: str, axis: int) -> Affine:
    """Symmetric parameters of each channel from the largest magnitude to represent in it, (C,)."""
    _, qmax = RANGES[dtype]
    scale = np.maximum((bound.astype(np.float64) / qmax).astype(np.float32), SMALLEST_SCALE)
    return Affine(scale, np.zeros(scale.shape, numpy_type(dtype)), dtype, axis)


def quantize(x: FloatArray, parameters: Affine) -> Array:
    """The codes that QuantizeLinear gives for `x` (any shape), saturated to the type."""
    scale, zero_point = spread(parameters, x.shape)
    qmin, qmax = parameters.range
    if parameters.dtype in FLOAT8:
        return np.clip(x / scale, qmin, qmax).astype(FLOAT8[parameters.dtype])
    q = np.asarray(np.rint(x / scale))
    q += zero_point
    np.clip(q, qmin, qmax, out=q)
    return q.astype(parameters.dtype)


def dequantize(q: Array, parameters: Affine) -> npt.NDArray[np.float32]:
    """The values that DequantizeLinear gives for the codes `q` (any shape)."""
    scale, zero_point = spread(parameters, q.shape)
    return (q.astype(np.float32) - zero_point.astype(np.float32)) * scale


def numpy_type(dtype: str) -> np.dtype[Any]:
    """What an array of such codes is made of."""
    return FLOAT8[dtype] if dtype in FLOAT8 else np.dtype(dtype)


def spread(parameters: Affine, sizes: tuple[int, ...]) -> tuple[npt.NDArray[np.float32], Array]:
    """Scale and zero_point as they broadcast against a tensor of these sizes."""
    scale, zero_point, axis = parameters.scale, parameters.zero_point, parameters.axis
    if axis is None:
        return scale, zero_point
    if parameters.block_size:
        block = np.arange(sizes[axis]) // parameters.block_size
        return scale.take(block, axis), zero_point.take(block, axis)
    shape = [1] * len(sizes)
    shape[axis] = -1
    return scale.reshape(shape), zero_point.reshape(shape)


def _float32_scale(scale: float) -> npt.NDArray[np.float32]:
    return np.asarray(max(np.float32(scale), SMALLEST_SCALE), np.float32)
