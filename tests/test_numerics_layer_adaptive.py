"""Layer-adaptive magnitudes: the counts of a plain implementation, without its memory."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxcompress.numerics.layer_adaptive import layer_adaptive_counts


class Held:
    """An array as it is read, and how often it was."""

    def __init__(self, array: Any) -> None:
        self.array, self.reads = array, 0

    def numpy(self) -> Any:
        self.reads += 1
        return self.array


def counts(arrays: list[Any], count: int) -> list[int]:
    wide = any(a.dtype == np.float64 for a in arrays)
    return layer_adaptive_counts([Held(a) for a in arrays], count, wide=wide)


def plain_counts(arrays: list[Any], count: int) -> list[int]:
    """All scores side by side, sorted."""
    scores: list[Any] = []
    for array in arrays:
        squares = np.sort(array.astype(np.float64).ravel() ** 2)
        rests = np.cumsum(squares[::-1])[::-1]
        whole = rests[np.searchsorted(squares, squares, "left")]
        scores.append(np.divide(squares, whole, out=np.zeros_like(squares), where=whole > 0))
    owners = np.repeat(np.arange(len(arrays)), [a.size for a in arrays])
    gone = np.argsort(np.concatenate(scores), kind="stable")[:count]
    return np.bincount(owners[gone], minlength=len(arrays)).tolist()


# Integers times a power of two: sums of their squares are exact in any order, so ties are ties.
DTYPES = st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
ARRAYS = st.lists(
    st.builds(
        lambda whole, power, dtype: (whole * 2.0**power).astype(dtype),
        hnp.arrays(np.int64, st.integers(0, 40), elements=st.integers(-20, 20)),
        st.integers(-9, 9),
        DTYPES,
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=200, deadline=None)
@given(ARRAYS, st.floats(0, 1))
def test_the_counts_of_a_plain_implementation(arrays: Any, share: float):
    count = round(sum(a.size for a in arrays) * share)
    found = counts(arrays, count)
    assert sum(found) == count
    assert found == plain_counts(arrays, count)


@settings(max_examples=100, deadline=None)
@given(ARRAYS, st.floats(0, 1), st.data())
def test_the_scale_of_a_tensor_does_not_matter(arrays: Any, share: float, data: Any):
    count = round(sum(a.size for a in arrays) * share)
    which = data.draw(st.integers(0, len(arrays) - 1))
    factor = data.draw(st.sampled_from([-1.0, 0.25, 8.0, 2.0**-60, 2.0**50]))
    before = [a.astype(np.float32) for a in arrays]
    after = [a * np.float32(factor) if i == which else a for i, a in enumerate(before)]
    assert counts(after, count) == counts(before, count)


@pytest.mark.parametrize("share", [0.001, 0.3, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_many_weights_and_few_looks(share: float, dtype: Any):
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(n) * scale for n, scale in ((1200, 30), (90_000, 0.01), (7, 1))]
    arrays.append(np.sign(rng.standard_normal(20_000)) / 8)  # one magnitude, one score
    arrays.append(np.zeros(500))
    held = [Held(a.astype(dtype)) for a in arrays]
    count = round(sum(a.size for a in arrays) * share)
    found = layer_adaptive_counts(held, count, wide=dtype == np.float64)
    assert found == plain_counts([h.array for h in held], count)
    assert max(h.reads for h in held) <= (10 if dtype == np.float64 else 5)


def test_numbers_that_have_no_score():
    odd = np.asarray([np.nan, np.inf, -np.inf, 3, -1, 0], np.float32)
    tiny = np.asarray([1e-45, -1e-40, 0, 3e38], np.float32)
    assert counts([odd, tiny], 4) == [1, 3]
    assert counts([odd, tiny], 10) == [3, 4]
    wide = np.asarray([1e-320, 1e-200, 1e-170, 1e300, 1e149, 1e-160])
    assert counts([wide], 4) == [4] and counts([wide], 6) == [5]
    assert counts([odd[:3]], 2) == [0] and counts([], 0) == []
