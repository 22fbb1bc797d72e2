"""Blocks of few bits: what a code stands for, how codes lie in bytes, and which range is chosen."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxcompress.numerics.blocks import decode, encode, fit, pack

ROWS = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=3, max_side=40),
    elements=st.floats(-100, 100, width=32),
)


def restored(rows: Any, **options: Any) -> Any:
    blocks = fit(rows, **options)
    return decode(encode(rows, blocks), blocks)[..., : rows.shape[-1]]


@settings(deadline=None)
@given(ROWS, st.integers(1, 8), st.sampled_from([0, 16, 32]), st.booleans())
def test_no_value_is_further_off_than_a_step_within_the_range_that_was_chosen(
    rows: Any, bits: int, block_size: int, symmetric: bool
):
    blocks = fit(rows, bits=bits, block_size=block_size, symmetric=symmetric)
    codes = encode(rows, blocks)
    assert codes.max(initial=0) < 2**bits
    if symmetric:
        assert (blocks.zero_points == 2 ** (bits - 1)).all()
    values = decode(codes, blocks)[..., : rows.shape[-1]]
    steps = np.repeat(np.abs(blocks.scales), blocks.block_size, axis=-1)[..., : rows.shape[-1]]
    inside = (codes[..., : rows.shape[-1]] > 0) & (codes[..., : rows.shape[-1]] < 2**bits - 1)
    assert (np.abs(values - rows) <= steps * 0.5001)[inside].all()
    assert (values == 0)[rows == 0].all()


@settings(deadline=None)
@given(ROWS, st.sampled_from([2, 4, 8]))
def test_the_range_is_never_worse_than_all_of_the_block(rows: Any, bits: int):
    low, high = rows.min(axis=-1, initial=0), rows.max(axis=-1, initial=0)
    scale = np.maximum((high - low) / (2**bits - 1), np.float32(1e-30))[..., None]
    zero = np.rint(-low[..., None] / scale)
    codes = np.clip(np.rint(rows / scale) + zero, 0, 2**bits - 1)
    plain = np.square((codes - zero) * scale - rows).sum(axis=-1)
    found = np.square(restored(rows, bits=bits, block_size=0, symmetric=False) - rows).sum(axis=-1)
    assert (found <= plain * 1.001 + 1e-9).all()


def test_an_outlier_is_cut_short_where_codes_are_few():
    row = np.concatenate([np.linspace(-1, 1, 255), [1.6]]).astype(np.float32)[None]
    blocks = fit(row, bits=4, block_size=0, symmetric=True)
    assert decode(encode(row, blocks), blocks).max() < 1.5


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_codes_are_packed_low_bits_first(bits: int):
    codes = np.random.default_rng(0).integers(0, 2**bits, (3, 13), dtype=np.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (3, -(-13 * bits // 8))
    unpacked = np.unpackbits(packed, axis=-1, bitorder="little")[:, : 13 * bits]
    weights = 1 << np.arange(bits)
    assert (unpacked.reshape(3, 13, bits) @ weights == codes).all()


@settings(deadline=None)
@given(ROWS)
def test_a_row_in_shorter_blocks_means_the_same(rows: Any):
    blocks = fit(rows, bits=4, block_size=0, symmetric=False)
    shorter = blocks.split(16, rows.shape[-1])
    width = rows.shape[-1]
    a, b = (decode(encode(rows, p), p)[..., :width] for p in (blocks, shorter))
    assert (a == b).all()
