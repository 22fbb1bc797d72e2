"""Pairs of weights within the bound cannot saturate a 16-bit sum; others can."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxcompress.numerics.saturation import PAIR_LIMIT, largest_pair_sum, trim_pairs

ROWS = hnp.arrays(
    np.int8,
    hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9),
    elements=st.integers(-127, 127),
)


@given(ROWS)
def test_trimmed_pairs_cannot_saturate(rows: np.ndarray[Any, Any]) -> None:
    trimmed = trim_pairs(rows)
    np.testing.assert_array_equal(trim_pairs(np.asfortranarray(rows)), trimmed)
    assert trimmed.shape == rows.shape and trimmed.dtype == np.int8
    assert np.all(largest_pair_sum(trimmed) <= PAIR_LIMIT)
    wide = np.pad(trimmed.astype(int), ((0, 0), (0, rows.shape[1] % 2))).reshape(len(rows), -1, 2)
    assert 255 * np.maximum(wide, 0).sum(2).max() <= 2**15 - 1
    assert 255 * np.minimum(wide, 0).sum(2).min() >= -(2**15)


@given(ROWS)
def test_what_is_within_the_bound_is_not_touched(rows: np.ndarray[Any, Any]) -> None:
    halved = (rows // 2).astype(np.int8)
    np.testing.assert_array_equal(trim_pairs(halved), halved)


@given(ROWS)
def test_trimming_takes_the_excess_and_no_more(rows: np.ndarray[Any, Any]) -> None:
    excess = 0
    for row in rows.astype(int):
        padded = np.append(row, 0) if len(row) % 2 else row
        for a, b in padded.reshape(-1, 2):
            same_sign = abs(a + b) if a * b > 0 else max(abs(a), abs(b))
            excess += max(0, same_sign - PAIR_LIMIT)
    assert np.abs(trim_pairs(rows).astype(int) - rows).sum() == excess


def test_one_more_than_the_limit_saturates() -> None:
    assert 255 * PAIR_LIMIT <= 2**15 - 1 < 255 * (PAIR_LIMIT + 1)
