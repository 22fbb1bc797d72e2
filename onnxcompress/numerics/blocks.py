"""Weights as small unsigned integers, with a scale and a zero point for each block of a row.

A row is what one output sums over, cut into blocks of equal length; the last one may be shorter.
w = (code - zero_point) · scale. Codes are packed low bits first, a block to whole bytes, as ONNX
Runtime's contrib operators MatMulNBits and GatherBlockQuantized read them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from onnxcompress.numerics.affine import SMALLEST_SCALE
from onnxcompress.numerics.rows import row_blocks

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint8]

_SHARES: Final = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6)
_CHUNK: Final = 1 << 19  # elements worked on at a time: they stay in the cache


@dataclass(frozen=True, slots=True)
class Blocks:
    """Parameters of rows (..., N, K): `scales` float32 and `zero_points` uint8, (..., N, B)."""

    scales: Floats
    zero_points: Codes
    bits: int
    block_size: int
    symmetric: bool
    """Whether every zero_point is the middle code, 2^(bits - 1)."""

    def part(self, index: Any) -> Blocks:
        """Those of some rows."""
        scales, zeros = self.scales[index], self.zero_points[index]
        return Blocks(scales, zeros, self.bits, self.block_size, self.symmetric)

    def split(self, block_size: int, terms: int) -> Blocks:
        """The same parameters for shorter blocks of rows of `terms` values."""
        count = -(-terms // block_size)
        first = np.arange(count) * block_size // self.block_size
        scales, zeros = self.scales[..., first], self.zero_points[..., first]
        return Blocks(scales, zeros, self.bits, block_size, self.symmetric)


def fit(rows: Array, *, bits: int, block_size: int, symmetric: bool) -> Blocks:
    """Parameters that leave each block of `rows` (..., N, K) the least squared error.

    The range of each block is searched among shares of its extremes: with few codes, cutting an
    outlier short costs less than coarse steps for all others (Banner, Nahshan and Soudry, Post
    training 4-bit quantization of convolutional networks, 2019). A symmetric block's scale takes
    the sign that puts the extreme of largest magnitude at the lowest code, so that no code is
    left unused.

    Args:
        bits: 1 to 8.
        block_size: values that share a scale; 0 for whole rows.
    """
    size = block_size or max(1, rows.shape[-1])
    shape = (*rows.shape[:-1], -(-rows.shape[-1] // size))
    scales, zeros = np.empty(shape, np.float32), np.empty(shape, np.uint8)
    for index in row_blocks(rows, _CHUNK):
        scales[index], zeros[index] = _least_error(_cut(rows[index], size), bits, symmetric)
    return Blocks(scales, zeros, bits, size, symmetric)


def encode(rows: Array, blocks: Blocks) -> Codes:
    """The nearest codes of `rows` (..., N, K), as (..., N, B · block_size); zeros fill them up."""
    width = blocks.scales.shape[-1] * blocks.block_size
    codes = np.empty((*rows.shape[:-1], width), np.uint8)
    for index in row_blocks(rows, _CHUNK):
        part = blocks.part(index)
        scales, zeros = part.scales[..., None], part.zero_points[..., None].astype(np.float32)
        found = _rounded(_cut(rows[index], blocks.block_size), scales, zeros, blocks.bits)
        codes[index] = found.reshape(codes[index].shape)
    return codes


def decode(codes: Codes, blocks: Blocks) -> Floats:
    """The values (..., N, B · block_size) that `codes` stand for."""
    cut = codes.reshape(*blocks.scales.shape, blocks.block_size).astype(np.float32)
    cut -= blocks.zero_points[..., None]
    cut *= blocks.scales[..., None]
    return cut.reshape(codes.shape)


def pack(codes: Codes, bits: int) -> Codes:
    """Codes (..., n) as bytes (..., ceil(n · bits / 8)), the first in the lowest bits."""
    if bits == 8:
        return codes
    each = 8 // bits
    missing = -codes.shape[-1] % each
    if missing:
        codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, missing)])
    packed = codes[..., ::each].copy()
    for position in range(1, each):
        packed |= codes[..., position::each] << np.uint8(bits * position)
    return packed


def unpack(packed: Codes, bits: int) -> Codes:
    """What `pack` was given, filled up to whole bytes."""
    if bits == 8:
        return packed
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes = (packed[..., None] >> shifts) & np.uint8((1 << bits) - 1)
    return codes.reshape(*packed.shape[:-1], -1)


def _least_error(cut: Floats, bits: int, symmetric: bool) -> tuple[Floats, Floats]:
    """Scale and zero_point of each block of (n, B, block_size), each (n, B)."""
    low, high = np.minimum(cut.min(axis=-1), 0), np.maximum(cut.max(axis=-1), 0)
    best = np.full(low.shape, np.inf, np.float32)
    scales, zeros = np.empty_like(low), np.empty_like(low)
    for share in _SHARES:
        cut_low, cut_high = low * np.float32(share), high * np.float32(share)
        scale, zero = _parameters(cut_low, cut_high, bits, symmetric)
        error = _rounded(cut, scale[..., None], zero[..., None], bits)
        error -= zero[..., None]
        error *= scale[..., None]
        error -= cut
        total = np.einsum("...k,...k->...", error, error)
        better = total < best
        for kept, found in ((best, total), (scales, scale), (zeros, zero)):
            np.copyto(kept, found, where=better)
    return scales, zeros


def _parameters(low: Floats, high: Floats, bits: int, symmetric: bool) -> tuple[Floats, Floats]:
    if symmetric:
        middle = np.float32(1 << (bits - 1))
        scale = np.where(high > -low, -high, -low).astype(np.float32) / middle
        scale[np.abs(scale) < SMALLEST_SCALE] = SMALLEST_SCALE
        return scale, np.full_like(scale, middle)
    steps = np.float32((1 << bits) - 1)
    scale = np.maximum((high - low) / steps, SMALLEST_SCALE).astype(np.float32)
    return scale, np.clip(np.rint(-low / scale), 0, steps)


def _rounded(cut: Floats, scale: Floats, zero: Floats, bits: int) -> Floats:
    found = cut / scale
    np.rint(found, out=found)
    found += zero
    return np.clip(found, 0, (1 << bits) - 1, out=found)


def _cut(rows: Array, size: int) -> Floats:
    """Rows (n, K) as (n, B, size), filled up with zeros."""
    missing = -rows.shape[-1] % size
    rows = np.pad(rows, ((0, 0), (0, missing))) if missing else np.ascontiguousarray(rows)
    return rows.reshape(rows.shape[0], -1, size)
