"""Clipping ranges: what must hold for any data, and known distributions."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from onnxcompress.numerics.histogram import RangeFreeHistogram
from onnxcompress.numerics.thresholds import (
    Method,
    clip_range,
    divergence,
    expected_error,
    whole_zero,
)

finite = st.floats(-1e6, 1e6, width=32)
data = arrays(np.float32, st.integers(1, 300), elements=finite)
integers = st.sampled_from([(-8, 7), (-128, 127), (0, 255), (0, 65535)])


def quantization_error(x, low, high, steps):
    scale = (high - low) / steps
    zero = np.rint(-low / scale)
    q = np.clip(np.rint(x / scale) + zero, 0, steps)
    return float(np.mean(((q - zero) * scale - x) ** 2))


@given(data, st.sampled_from(Method), integers, st.booleans())
@settings(max_examples=200, deadline=None)
def test_a_range_holds_zero_and_stays_within_what_was_seen(x, method, bounds, symmetric):
    low, high = clip_range(
        RangeFreeHistogram.of(x), method, qmin=bounds[0], qmax=bounds[1], symmetric=symmetric
    )
    assert low <= 0 <= high
    if symmetric:
        assert low == -high
        assert high <= np.abs(x).max()
    else:
        assert min(x.min(), 0) <= low
        assert high <= max(x.max(), 0)
    assert (low < high) == bool(np.any(x))


@given(data, integers, st.booleans())
@settings(deadline=None)
def test_mse_is_never_expected_to_be_worse_than_minmax(x, bounds, symmetric):
    histogram = RangeFreeHistogram.of(x)
    ranges = [
        clip_range(histogram, method, qmin=bounds[0], qmax=bounds[1], symmetric=symmetric)
        for method in (Method.MSE, Method.MINMAX)
    ]
    points, counts = histogram.points()
    mse, minmax = (
        float(expected_error(points.astype(np.float64), counts, *r, bounds[1] - bounds[0]))
        for r in ranges
    )
    assert mse <= minmax * (1 + 1e-9) + 1e-30


@given(data, st.booleans())
def test_percentile_100_is_minmax(x, symmetric):
    histogram = RangeFreeHistogram.of(x)
    options = {"qmin": 0, "qmax": 255, "symmetric": symmetric}
    whole = clip_range(histogram, Method.MINMAX, **options)
    assert clip_range(histogram, Method.PERCENTILE, percentile=100, **options) == whole


@given(st.lists(data, min_size=3, max_size=3), st.sampled_from(Method))
@settings(max_examples=40, deadline=None)
def test_the_order_of_merging_changes_no_bit(parts, method):
    shards = [RangeFreeHistogram.of(part) for part in parts]
    found = {
        clip_range(a.merge(b).merge(c), method, qmin=-128, qmax=127, symmetric=False)
        for a, b, c in itertools.permutations(shards)
    }
    assert len(found) == 1


@pytest.mark.parametrize("steps", [15, 255])
@pytest.mark.parametrize("below", [1 / 3, 3 / 5])
def test_the_expected_error_is_the_error(steps, below):
    low, high = -4.0 * below, 4.0 * (1 - below)
    x = np.random.default_rng(0).standard_normal(200_000)
    points, counts = RangeFreeHistogram.of(x).points()
    found = expected_error(points.astype(np.float64), counts, low, high, steps) / x.size
    assert found == pytest.approx(quantization_error(x, low, high, steps), rel=0.03)


@pytest.mark.parametrize("steps", [15, 255])
def test_mse_finds_nearly_the_best_range(steps):
    x = np.random.default_rng(0).standard_t(4, size=50_000)
    low, high = clip_range(RangeFreeHistogram.of(x), Method.MSE, qmin=0, qmax=steps, symmetric=True)
    best = min(quantization_error(x, -t, t, steps) for t in np.linspace(0.5, 12, 200))
    assert quantization_error(x, low, high, steps) <= 1.03 * best


def test_percentile_cuts_the_tails_that_numpy_would():
    x = np.random.default_rng(0).standard_normal(100_000).astype(np.float32)
    low, high = clip_range(
        RangeFreeHistogram.of(x), "percentile", qmin=0, qmax=255, symmetric=False, percentile=99.9
    )
    assert (low, high) == pytest.approx(np.percentile(x, [0.1, 99.9]), rel=0.01)


def test_entropy_ignores_a_lone_outlier():
    x = np.append(np.random.default_rng(0).standard_normal(100_000), 60.0)
    low, high = clip_range(
        RangeFreeHistogram.of(x), Method.ENTROPY, qmin=-128, qmax=127, symmetric=True
    )
    assert 3 < high < 20
    assert low == -high


def test_divergence_is_what_its_definition_gives():
    rng = np.random.default_rng(0)
    density = np.where(rng.random(64) < 0.8, rng.random(64), 0.0)
    density[39] = 0.5
    levels, end = 8, 40
    kept = density[:end]
    p = kept.copy()
    p[-1] += density[end:].sum()
    q = np.zeros(end)
    level = np.arange(end) * levels // end
    for i in range(levels):
        some = (level == i) & (kept > 0)
        q[some] = kept[level == i].sum() / some.sum()
    p, q = p / p.sum(), q / q.sum()
    expected = np.sum(p[p > 0] * np.log(p[p > 0] / q[p > 0]))
    assert divergence(density, np.array([end]), levels)[0] == pytest.approx(expected)


@pytest.mark.parametrize("method", Method)
def test_nothing_and_zeros_give_an_empty_range(method):
    for histogram in (RangeFreeHistogram.empty(), RangeFreeHistogram.of(np.zeros(9))):
        assert clip_range(histogram, method, qmin=0, qmax=255, symmetric=False) == (0, 0)


@pytest.mark.parametrize(
    "wrong", [{"method": "median"}, {"percentile": 50.0}, {"percentile": 101.0}, {"qmax": 0}]
)
def test_senseless_options_are_refused(wrong):
    options = {"method": "mse", "qmin": 0, "qmax": 255, "symmetric": False} | wrong
    with pytest.raises(ValueError, match=r"median|percentile|qmin"):
        clip_range(RangeFreeHistogram.of(np.ones(3)), **options)


@pytest.mark.parametrize("tail", [8, 30])
def test_a_range_that_is_averaged_next_leaves_means_less_error(tail):
    random = np.random.default_rng(0)
    x = random.standard_normal((4000, 1)) + 0.7 * random.laplace(size=(4000, 64))
    x[::200] += tail  # whole means of large values, as those of the likeliest class are
    histogram = RangeFreeHistogram.of(x)

    def error(averaged):
        low, high = clip_range(
            histogram, Method.MSE, qmin=0, qmax=63, symmetric=False, averaged=averaged
        )
        step = (high - low) / 63
        zero = np.rint(-low / step)
        rounded = (np.clip(np.rint(x / step) + zero, 0, 63) - zero) * step
        return float(np.square((rounded - x).mean(axis=1)).mean())

    assert error(64) < 0.8 * error(1)


@given(data)
@settings(deadline=None)
def test_mse_clips_only_for_a_decibel(x):
    histogram = RangeFreeHistogram.of(x)
    found, whole = (
        clip_range(histogram, method, qmin=0, qmax=255, symmetric=False)
        for method in (Method.MSE, Method.MINMAX)
    )
    points, counts = histogram.points()
    x = points.astype(np.float64)
    clipped, all_ = (float(expected_error(x, counts, *r, 255)) for r in (found, whole))
    assert found == whole or clipped * 10**0.1 <= all_


@given(st.floats(-1e6, -1e-6), st.floats(1e-6, 1e6), st.sampled_from([15, 255, 65535]))
def test_a_range_around_a_whole_zero_is_hardly_wider_than_what_it_covers(low, high, steps):
    found = whole_zero(low, high, steps)
    step = (found[1] - found[0]) / steps
    if found == (low, high):
        assert min(-low, high) <= step / 2 or -low / step == pytest.approx(round(-low / step))
        return
    assert found[0] <= low * (1 - 1e-12)
    assert found[1] >= high * (1 - 1e-12)
    assert step <= (high - low) / (steps - 1) * (1 + 1e-9)
    assert -found[0] / step == pytest.approx(round(-found[0] / step), abs=1e-6)


def test_pixels_between_minus_one_and_one_are_not_all_rounded_by_half_a_step():
    pixels = np.arange(256) / 127.5 - 1
    low, high = whole_zero(-1.0, 1.0, 255)
    assert quantization_error(pixels, low, high, 255) < 0.5 * quantization_error(pixels, -1, 1, 255)
