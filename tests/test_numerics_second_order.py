"""Rounding by the output's error is never worse than plain rounding, and often much better."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcompress.numerics.rows import code_bounds, row_codes, row_scales
from onnxcompress.numerics.saturation import PAIR_LIMIT, largest_pair_sum
from onnxcompress.numerics.second_order import mean_square, round_rows


def problem(
    seed: int, groups: int, width: int, size: int, *, pairs: bool, rows: int = 300
) -> tuple[Any, Any, Any, Any]:
    """Weights, their plain codes and scales, and rows of correlated input."""
    random = np.random.default_rng(seed)
    mixed = random.standard_normal((groups, rows, 3)) @ random.standard_normal((groups, 3, size))
    x = mixed + 0.3 * random.standard_normal((groups, rows, size))
    weights = random.standard_normal((groups, width, size)).astype(np.float32)
    flat = weights.reshape(-1, size)
    bounds = code_bounds(flat, bound_pairs=pairs)
    codes = row_codes(flat, bounds, bound_pairs=pairs).reshape(weights.shape)
    scales = row_scales(bounds).reshape(groups, width)
    return weights, codes, scales, x.astype(np.float32)


def error(weights: Any, codes: Any, scales: Any, rows: Any) -> Any:
    return mean_square(weights - codes * scales[..., None], rows)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 10**6),
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(1, 140),
    st.booleans(),
    st.sampled_from([2, 300]),
    st.sampled_from([2, 37, 1 << 30]),
)
def test_no_row_gets_worse_and_no_pair_saturates(
    seed: int, groups: int, width: int, size: int, pairs: bool, rows: int, widest: int
) -> None:
    weights, codes, scales, x = problem(seed, groups, width, size, pairs=pairs, rows=rows)
    found, *told = round_rows(
        weights, codes, scales, x, damping=0.02, bound_pairs=pairs, widest=widest
    )
    before, after = error(weights, codes, scales, x), error(weights, found, scales, x)
    np.testing.assert_allclose(told, [before, after], rtol=1e-2, atol=1e-6)
    assert found.dtype == np.int8
    assert np.all(after <= before * (1 + 1e-4))
    assert np.abs(found.astype(int)).max() <= 127
    if pairs:
        assert largest_pair_sum(found.reshape(-1, size)).max() <= PAIR_LIMIT


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize(
    ("groups", "width", "size", "widest", "left"),
    [
        (1, 32, 200, 1 << 30, 0.1),
        (1, 32, 200, 66, 0.2),
        (1, 1100, 30, 1 << 30, 0.6),
        (40, 1, 9, 1 << 30, 0.6),
        (4, 6, 36, 1 << 30, 0.4),
    ],
)
def test_correlated_input_leaves_far_less_error(
    groups: int, width: int, size: int, widest: int, left: float, pairs: bool
) -> None:
    weights, codes, scales, x = problem(5, groups, width, size, pairs=pairs)
    found, *_ = round_rows(
        weights, codes, scales, x, damping=0.02, bound_pairs=pairs, widest=widest
    )
    before, after = error(weights, codes, scales, x), error(weights, found, scales, x)
    assert after.sum() < left * before.sum()


def test_two_equal_inputs_share_their_error() -> None:
    """With x1 = x2 only the sum of the weights counts: 0.4 + 0.4 is best as 1 + 0."""
    rows = np.ones((1, 1, 2))
    weights, codes = np.full((1, 1, 2), 0.4), np.zeros((1, 1, 2), np.int8)
    found, *_ = round_rows(weights, codes, np.ones((1, 1)), rows, damping=1e-6, bound_pairs=False)
    assert sorted(found.reshape(-1).tolist()) == [0, 1]


def test_later_parts_make_good_what_earlier_ones_did() -> None:
    """Four equal inputs in two parts: 4 · 0.4 is 2, where plain rounding gives 0."""
    rows = np.ones((1, 1, 4))
    weights, codes = np.full((1, 1, 4), 0.4), np.zeros((1, 1, 4), np.int8)
    found, *_ = round_rows(
        weights, codes, np.ones((1, 1)), rows, damping=1e-6, bound_pairs=False, widest=2
    )
    assert found.sum() == 2
    assert found[0, 0, :2].sum() == found[0, 0, 2:].sum() == 1


def test_uncorrelated_input_keeps_plain_rounding() -> None:
    weights, codes, scales, _ = problem(1, 1, 8, 70, pairs=False)
    rows = np.diag(np.linspace(0, 5, 70)).astype(np.float32)[None]
    found, *_ = round_rows(weights, codes, scales, rows, damping=0.02, bound_pairs=False)
    assert np.array_equal(found, codes)


def test_factor_is_choleskys_whatever_the_blocks() -> None:
    """Of a matrix of several blocks: the rounding of the dense problem, column by column."""
    weights, codes, scales, x = problem(3, 1, 5, 150, pairs=False, rows=200)
    found, *_ = round_rows(weights, codes, scales, x, damping=0.05, bound_pairs=False)
    x = x[0].astype(np.float64)
    gram = x.T @ x / len(x)
    gram[np.diag_indices(150)] += 0.05 * np.trace(gram) / 150
    order = np.argsort(np.square(x).sum(0), kind="stable")
    factor = np.linalg.cholesky(gram[np.ix_(order, order)])
    factor /= np.diag(factor)
    target = (weights[0] / scales[0, :, None])[:, order]
    rounded, errors = np.zeros_like(target), np.zeros_like(target)
    for k in range(149, -1, -1):
        wanted = target[:, k] + errors[:, k + 1 :] @ factor[k + 1 :, k]
        rounded[:, k] = np.clip(np.rint(wanted), -127, 127)
        errors[:, k] = target[:, k] - rounded[:, k]
    # Sums in float32 may tip a number that lies halfway, and what follows from it.
    assert np.mean(found[0][:, order] == rounded) > 0.8
    plain, ours, dense = (
        np.square((weights[0] / scales[0, :, None] - c) @ x.T).sum()
        for c in (codes[0], found[0], rounded[:, np.argsort(order)])
    )
    assert ours < 1.05 * dense < 0.5 * plain
