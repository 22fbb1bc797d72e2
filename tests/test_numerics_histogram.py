"""The range-free histogram against counting by hand."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from onnxcompress.numerics.histogram import (
    HistogramBuilder,
    RangeFreeHistogram,
    Unobservable,
    sampling_stride,
)

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
data = arrays(np.float32, st.integers(0, 200), elements=finite)


def same(a: RangeFreeHistogram, b: RangeFreeHistogram) -> bool:
    return (
        np.array_equal(a.buckets, b.buckets)
        and np.array_equal(a.counts, b.counts)
        and math.copysign(1, a.minimum) == math.copysign(1, b.minimum)
        and (a.minimum, a.maximum) == (b.minimum, b.maximum)
    )


def test_a_tiny_negative_is_counted_once():
    points, counts = RangeFreeHistogram.of(np.array([-1e-45], np.float32)).points()
    assert len(points) == 1 and counts.tolist() == [1]


@given(data, data, data)
def test_merging_is_exact_associative_and_commutative(a, b, c):
    x, y, z = map(RangeFreeHistogram.of, (a, b, c))
    whole = RangeFreeHistogram.of(np.concatenate([a, b, c]))
    assert same(x.merge(y).merge(z), whole)
    assert same(x.merge(y.merge(z)), whole)
    assert same(z.merge(y).merge(x), whole)


@given(data)
def test_points_are_near_what_they_count(a):
    centres, counts = RangeFreeHistogram.of(a).points()
    assert counts.sum() == a.size
    assert np.all(np.diff(centres) > 0)
    if a.size:
        assert a.min() <= centres[0]
        assert centres[-1] <= a.max()
    repeated = np.repeat(centres, counts).astype(np.float64)
    error = np.abs(repeated - np.sort(a))
    assert np.all(error <= 0.0079 * np.abs(np.sort(a)) + 2.0**-133)


@given(st.lists(data, max_size=5))
def test_a_builder_counts_small_arrays_whole(parts):
    builder = HistogramBuilder()
    for part in parts:
        builder.add(part)
    whole = np.concatenate([np.empty(0, np.float32), *parts])
    assert same(builder.build(), RangeFreeHistogram.of(whole))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 300_000), st.sampled_from([1024, 3000, 8192]), st.integers(0, 2**32 - 1))
def test_a_sample_has_the_weight_and_the_extremes_of_the_whole(size, sample, seed):
    a = np.random.default_rng(seed).standard_normal(size, dtype=np.float32)
    builder = HistogramBuilder(sample)
    builder.add(a)
    found = builder.build()
    assert (found.minimum, found.maximum) == (a.min(), a.max())
    assert abs(found.total - size) < 16 * sampling_stride(size, sample) + 16


def test_what_reached_its_bounds_is_only_sampled():
    rng = np.random.default_rng(0)
    parts = [np.clip(rng.standard_normal(50_000), 0, 1).astype(np.float32) for _ in range(3)]
    bounded, free = HistogramBuilder(2048, (0.0, 1.0)), HistogramBuilder(1024)
    for part in parts:
        bounded.add(part)
        free.add(part)
    assert same(bounded.build(), free.build())
    assert (bounded.build().minimum, bounded.build().maximum) == (0, 1)
    bad = np.full(50_000, np.nan, np.float32)
    with pytest.raises(FloatingPointError):
        bounded.add(bad)


def test_large_arrays_are_sampled_alike_in_any_order():
    rng = np.random.default_rng(0)
    parts = [rng.standard_normal((n, 64), dtype=np.float32) for n in (100, 700, 3000, 700, 5)]
    forward, backward = HistogramBuilder(), HistogramBuilder()
    for part in parts:
        forward.add(part)
    for part in reversed(parts):
        backward.add(part)
    assert same(forward.build(), backward.build())


def test_a_sample_favours_no_channel():
    channels = np.arange(1, 385, dtype=np.float32)
    builder = HistogramBuilder()
    builder.add(np.tile(channels, (128, 1)))
    sampled, counts = builder.build().points()
    median = sampled[np.searchsorted(np.cumsum(counts), counts.sum() / 2)]
    assert median == pytest.approx(192, rel=0.02)
    assert len(sampled) == len(RangeFreeHistogram.of(channels).buckets)


@pytest.mark.parametrize(
    "dtype", [np.float16, np.float64, np.int8, np.uint8, np.int32, np.int64, np.bool_]
)
def test_other_types_are_converted(dtype):
    a = np.array([0, 1, 1, 0, 1], dtype)
    points, counts = RangeFreeHistogram.of(a).points()
    assert points.tolist() == [0, 1]
    assert counts.tolist() == [2, 3]


def test_zeros_of_either_sign_and_the_tiniest_numbers_are_one_point():
    a = np.array([0.0, -0.0, 1e-45, 2.0], np.float32)
    found = RangeFreeHistogram.of(a)
    assert math.copysign(1, found.minimum) == 1
    points, counts = found.points()
    assert points.tolist() == [0, 2]
    assert counts.tolist() == [3, 1]


def test_denormals_keep_their_magnitude():
    a = np.array([1e-39, -3e-40], np.float32)
    found = RangeFreeHistogram.of(a)
    assert (found.minimum, found.maximum) == (a[1], a[0])
    assert found.points()[0] == pytest.approx(a[::-1], rel=0.1)


@pytest.mark.parametrize(
    ("bad", "error"),
    [(np.nan, FloatingPointError), (np.inf, Unobservable), (-np.inf, Unobservable)],
)
@pytest.mark.parametrize("others", [[1.0], [-1.0], [-1.0, 2.0], []])
def test_what_is_not_finite_is_refused(bad, error, others):
    builder = HistogramBuilder()
    builder.add(np.array([0.5], np.float32))
    with pytest.raises(error):
        builder.add(np.array([*others, bad], np.float32))
    assert same(builder.build(), RangeFreeHistogram.of(np.array([0.5])))


def test_nan_with_the_sign_bit_is_found_beside_negative_numbers():
    bits = np.array([0xFFC00001, 0xBF800000], np.uint32)
    with pytest.raises(FloatingPointError):
        HistogramBuilder().add(bits.view(np.float32))


def test_nothing_counted_is_empty():
    builder = HistogramBuilder()
    builder.add(np.empty((0, 3), np.float32))
    assert builder.build().points()[0].size == 0
    assert builder.build().merge(RangeFreeHistogram.of(np.ones(2))).total == 2
