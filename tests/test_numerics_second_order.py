"""Rounding by the output's error is never worse than plain rounding, and often much better."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcompress.numerics.rows import code_bounds, row_codes, row_scales
from onnxcompress.numerics.saturation import PAIR_LIMIT, largest_pair_sum
from onnxcompress.numerics.second_order import gram_matrix, output_error, round_rows


def problem(
    seed: int, groups: int, width: int, size: int, *, pairs: bool, rows: int = 300
) -> tuple[Any, Any, Any, Any]:
    """Weights, their plain codes and scales, and the Gram matrix of correlated input."""
    random = np.random.default_rng(seed)
    mixed = random.standard_normal((groups, rows, 3)) @ random.standard_normal((groups, 3, size))
    x = mixed + 0.3 * random.standard_normal((groups, rows, size))
    weights = random.standard_normal((groups, width, size)).astype(np.float32)
    flat = weights.reshape(-1, size)
    bounds = code_bounds(flat, bound_pairs=pairs)
    codes = row_codes(flat, bounds, bound_pairs=pairs).reshape(weights.shape)
    scales = row_scales(bounds).reshape(groups, width)
    return weights, codes, scales, gram_matrix(x.astype(np.float32))


def error(weights: Any, codes: Any, scales: Any, gram: Any) -> Any:
    return output_error(weights - codes * scales[..., None], gram)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 10**6),
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(1, 140),
    st.booleans(),
    st.sampled_from([2, 300]),
)
def test_no_row_gets_worse_and_no_pair_saturates(
    seed: int, groups: int, width: int, size: int, pairs: bool, rows: int
) -> None:
    weights, codes, scales, gram = problem(seed, groups, width, size, pairs=pairs, rows=rows)
    found, *told = round_rows(weights, codes, scales, gram, damping=0.02, bound_pairs=pairs)
    before, after = error(weights, codes, scales, gram), error(weights, found, scales, gram)
    np.testing.assert_allclose(told, [before, after], rtol=1e-2, atol=1e-6)
    assert found.dtype == np.int8
    assert np.all(after <= before * (1 + 1e-4))
    assert np.abs(found.astype(int)).max() <= 127
    if pairs:
        assert largest_pair_sum(found.reshape(-1, size)).max() <= PAIR_LIMIT


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize(("groups", "width", "size"), [(1, 32, 200), (40, 1, 9), (4, 6, 36)])
def test_correlated_input_leaves_far_less_error(
    groups: int, width: int, size: int, pairs: bool
) -> None:
    weights, codes, scales, gram = problem(5, groups, width, size, pairs=pairs)
    found, *_ = round_rows(weights, codes, scales, gram, damping=0.02, bound_pairs=pairs)
    before, after = error(weights, codes, scales, gram), error(weights, found, scales, gram)
    assert after.sum() < 0.6 * before.sum()


def test_two_equal_inputs_share_their_error() -> None:
    """With x1 = x2 only the sum of the weights counts: 0.4 + 0.4 is best as 1 + 0."""
    gram = np.ones((1, 2, 2))
    weights, codes = np.full((1, 1, 2), 0.4), np.zeros((1, 1, 2), np.int8)
    found, *_ = round_rows(weights, codes, np.ones((1, 1)), gram, damping=1e-6, bound_pairs=False)
    assert sorted(found.reshape(-1).tolist()) == [0, 1]


def test_uncorrelated_input_keeps_plain_rounding() -> None:
    weights, codes, scales, _ = problem(1, 1, 8, 70, pairs=False)
    diagonal = np.diag(np.linspace(0, 5, 70)).astype(np.float32)[None]
    found, *_ = round_rows(weights, codes, scales, diagonal, damping=0.02, bound_pairs=False)
    assert np.array_equal(found, codes)
