"""The range to quantize a tensor over, from its histogram alone.

All methods read the same histogram, so one run over the data serves them all, and each takes
about a millisecond a tensor. Every range includes zero: padding and ReLU must stay exact.
"""

from __future__ import annotations

import math
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from onnxcompress.contract import Histogram

Array = npt.NDArray[Any]
Range = tuple[float, float]

_COARSE, _FINE = np.linspace(1 / 24, 1, 24), np.linspace(0, 1, 12)
_ROUNDS = 2
_BINS = 1024
_CANDIDATES = 64
_LEAST_GAIN = 10 ** (1 / 10)
"""By how much clipping must lessen the expected error to be believed in, 1 dB."""


class Method(StrEnum):
    """How a clipping range is chosen."""

    MINMAX = "minmax"
    """All that was seen."""
    PERCENTILE = "percentile"
    """All but the outermost share of the elements on either side."""
    MSE = "mse"
    """The least expected squared error, of rounding and clipping together (Banner, Nahshan and
    Soudry, "Post training 4-bit quantization of convolutional networks", NeurIPS 2019), and all
    that was seen where that is no more than 1 dB worse: what is clipped errs to one side in many
    elements at a time, which adds up behind, and the expectation takes for independent."""
    ENTROPY = "entropy"
    """The least Kullback-Leibler divergence between the distribution and its quantized form
    (Migacz, "8-bit inference with TensorRT", GTC 2017)."""


def clip_range(
    histogram: Histogram,
    method: Method | str,
    *,
    qmin: int,
    qmax: int,
    symmetric: bool,
    percentile: float = 99.99,
    averaged: float = 1,
) -> Range:
    """The range (low, high) of real values that the integers `qmin`..`qmax` should cover.

    low <= 0 <= high, within the observed extremes (and zero), or low == -high where `symmetric`.
    (0, 0) if only zeros, or nothing, was seen.

    Args:
        percentile: in (50, 100]; the share of elements, in percent, below the upper bound and
            above the lower (of magnitudes below the bound where symmetric). 100 is min/max.
        averaged: how many elements make one of what is computed next, which method mse heeds.

    Raises:
        ValueError: on an unknown method, or a percentile or integer range that makes no sense.
    """
    method = Method(method)
    if not 50 < percentile <= 100:
        raise ValueError(f"percentile must be in (50, 100], not {percentile}")
    if qmax <= qmin:
        raise ValueError(f"an integer range needs qmin < qmax, not {qmin} and {qmax}")
    points, counts = histogram.points()
    if not len(points):
        return 0.0, 0.0
    low, high = min(float(histogram.minimum), 0.0), max(float(histogram.maximum), 0.0)
    if symmetric:
        high = max(-low, high)
        low = -high
    whole = method is Method.MINMAX or (method is Method.PERCENTILE and percentile == 100)
    if whole or low == high:
        return low, high
    x = points.astype(np.float64)
    if method is Method.PERCENTILE:
        chosen = _percentile(x, counts, percentile, symmetric)
    elif method is Method.MSE:
        chosen = _least_error(x, counts, (low, high), qmax - qmin, symmetric, averaged)
    else:
        chosen = _least_divergence(x, counts, (low, high), qmax - qmin + 1, symmetric)
    found = max(low, chosen[0]), min(high, chosen[1])
    return found if any(found) else (low, high)  # nearly all were zero


def whole_zero(low: float, high: float, steps: int) -> Range:
    """The narrowest range over [low, high] with zero a whole number of its `steps` above its low.

    To round zero to a step moves the range by up to half a step instead. The pixels of an image
    scaled to [-1, 1] then all come to lie between two codes, half a step from either. A side
    shorter than half a step is left as it is, for it rounds to zero.
    """
    exact = -low / (high - low) * steps if low < high else 0.0
    if not 0.5 < exact < steps - 0.5:
        return low, high
    near = (b for b in (math.floor(exact), math.ceil(exact)) if 0 < b < steps)
    step, below = min((max(-low / b, high / (steps - b)), b) for b in near)
    return -below * step, (steps - below) * step


def expected_error(
    x: Array,
    counts: Array,
    low: npt.ArrayLike,
    high: npt.ArrayLike,
    steps: int,
    averaged: float = 1,
) -> Array:
    """Expected squared error, summed over the elements, of quantizing over each range.

    Rounding costs step**2 / 12 an element, except that what rounds to zero costs its own square
    (and zero, nothing); clipping costs the squared distance to the bound. In a mean of several
    elements errors of rounding, which are independent of each other, cancel out; what is clipped
    or rounded to zero errs to one side and stays. Prefix sums of the moments make it one lookup a
    range whatever the number of points.

    Args:
        x: points, ascending [n] float64.
        counts: elements at each point [n].
        low, high: bounds of the ranges, broadcast against each other; low <= 0 <= high.
        steps: intervals between the lowest and the highest integer.
        averaged: elements that a mean is taken of next, 1 where there is none.
    """
    return _error_by_moments(x, _moments(x, counts), low, high, steps, averaged)


def _moments(x: Array, counts: Array) -> Array:
    """Prefix sums of counts · x**k for k = 0, 1, 2: [3, n + 1]."""
    weighed = counts * x
    moments = np.zeros((3, len(x) + 1))
    np.cumsum([counts, weighed, counts * np.square(x)], axis=1, out=moments[:, 1:])
    return moments


def _error_by_moments(
    x: Array,
    moments: Array,
    low: npt.ArrayLike,
    high: npt.ArrayLike,
    steps: int,
    averaged: float,
) -> Array:
    low, high = np.asarray(low, np.float64), np.asarray(high, np.float64)

    def between(first: Array, last: Array) -> list[Array]:
        return [moment[last] - moment[first] for moment in moments]

    none, all_ = np.array(0), np.array(len(x))
    step = (high - low) / steps
    inside = np.searchsorted(x, low, "left"), np.searchsorted(x, high, "right")
    centre = np.searchsorted(x, -step / 2, "left"), np.searchsorted(x, step / 2, "right")
    below, above = between(none, inside[0]), between(inside[1], all_)
    near = between(np.maximum(centre[0], inside[0]), np.minimum(centre[1], inside[1]))
    clipped = (below[2] - 2 * low * below[1] + low**2 * below[0]) + (
        above[2] - 2 * high * above[1] + high**2 * above[0]
    )
    rounded = (moments[0][inside[1]] - moments[0][inside[0]] - near[0]) * step**2 / 12
    return clipped + rounded / averaged + near[2]


def _least_error(
    x: Array, counts: Array, full: Range, steps: int, symmetric: bool, averaged: float
) -> Range:
    """A grid over both bounds (one where symmetric or one-sided), refined around its best.

    The full range where that is hardly worse.
    """
    best, least, moments = full, 0.0, _moments(x, counts)
    lows, highs = (bound * _COARSE if bound else np.zeros(1) for bound in full)
    for _ in range(_ROUNDS):
        if symmetric:
            errors = _error_by_moments(x, moments, -highs, highs, steps, averaged)
            i = j = int(np.argmin(errors))
            best, least = (-float(highs[i]), float(highs[i])), float(errors[i])
        else:
            errors = _error_by_moments(x, moments, lows[:, None], highs, steps, averaged)
            i, j = (int(k) for k in np.unravel_index(int(np.argmin(errors)), errors.shape))
            best, least = (float(lows[i]), float(highs[j])), float(errors[i, j])
        lows, highs = _around(lows, i), _around(highs, j)
    whole = float(_error_by_moments(x, moments, *full, steps, averaged))
    return best if least * _LEAST_GAIN < whole else full


def _around(grid: Array, best: int) -> Array:
    """A finer grid between the neighbours of the best, which stays in it."""
    first, last = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    finer: Array = first + (last - first) * _FINE
    return np.sort(np.append(finer, grid[best])) if len(grid) > 1 else grid


def _percentile(x: Array, counts: Array, percentile: float, symmetric: bool) -> Range:
    share = percentile / 100
    if symmetric:
        magnitudes = np.abs(x)
        order = np.argsort(magnitudes)
        high = _quantile(magnitudes[order], counts[order], share)
        return -high, high
    # The lower tail is the upper tail of the mirrored data: the same rounding on both sides.
    low = -_quantile(-x[::-1], counts[::-1], share)
    return min(low, 0.0), max(_quantile(x, counts, share), 0.0)


def _quantile(x: Array, counts: Array, share: float) -> float:
    """The least point that `share` of the elements do not exceed."""
    cumulative = np.cumsum(counts)
    rank = int(np.searchsorted(cumulative, share * float(cumulative[-1]), "left"))
    return float(x[min(rank, len(x) - 1)])


def _least_divergence(x: Array, counts: Array, full: Range, levels: int, symmetric: bool) -> Range:
    """One bound on the magnitude, as TensorRT has it; a side without data takes no levels.

    Zeros do not count: they stay exact whatever the range.
    """
    limit = max(-full[0], full[1])
    two_sided = symmetric or (x[0] < 0 and x[-1] > 0)
    levels = min(max(2, levels // 2 if two_sided else levels), _BINS)
    ends = np.unique(np.linspace(levels, _BINS, _CANDIDATES).astype(np.intp))
    losses = divergence(_uniform_bins(x, counts, limit), ends, levels)
    bound = limit * int(ends[int(np.argmin(losses))]) / _BINS
    return -bound, bound


def _uniform_bins(x: Array, counts: Array, limit: float) -> Array:
    """Elements other than zero in equal bins of magnitude up to `limit`, each bucket of the
    floating histogram spread evenly over its width."""
    magnitudes = np.abs(x[x != 0]).astype(np.float32)
    bits = magnitudes.view(np.uint32)
    lower = (bits & np.uint32(0xFFFF0000)).view(np.float32).astype(np.float64)
    width = 2.0 * ((bits & np.uint32(0xFFFF0000) | np.uint32(0x8000)).view(np.float32) - lower)
    # The bucket of the largest value ends at it, but keeps some width.
    narrowest = 1e-6 * limit
    lower = np.minimum(lower, limit - narrowest)
    upper = np.minimum(lower + np.maximum(width, narrowest), limit)
    slopes = counts[x != 0] / (upper - lower)
    edges: Array = np.linspace(0, limit, _BINS + 1)
    # A sum of ramps, one a bucket, is the integral of steps: each edge needs two prefix sums.
    below = _ramps(edges, lower, slopes) - _ramps(edges, upper, slopes)
    return np.maximum(np.diff(below), 0.0)


def _ramps(edges: Array, starts: Array, slopes: Array) -> Array:
    """At each edge, the sum of slope * max(edge - start, 0)."""
    order = np.argsort(starts)
    starts, slopes = starts[order], slopes[order]
    passed = np.searchsorted(starts, edges, "right")
    total = np.concatenate([[0.0], np.cumsum(slopes)])[passed]
    moment = np.concatenate([[0.0], np.cumsum(slopes * starts)])[passed]
    return total * edges - moment


def divergence(density: Array, ends: Array, levels: int) -> Array:
    """KL divergence, for each end, of the first `end` bins with the rest clipped into the last
    of them, from the same bins quantized to `levels` (spread evenly over a level's occupied bins).

    Args:
        density: elements in each bin [n].
        ends: candidates [c], each in levels..n.

    Within a level the quantized density is constant, so prefix sums at the levels' borders,
    [c, levels + 1], are all that is needed.
    """
    mass, occupied, entropy = (
        np.concatenate([[0.0], np.cumsum(terms)])
        for terms in (density, density > 0, _xlogx(density))
    )
    borders = -(-np.arange(levels + 1) * ends[:, None] // levels)
    kept, bins = np.diff(mass[borders]), np.diff(occupied[borders])
    quantized = kept / np.maximum(bins, 1)
    total, inside, last = mass[-1], mass[ends], density[ends - 1]
    tail = total - inside
    tiny = 1e-12 * total
    own = entropy[ends] - _xlogx(last) + _xlogx(last + tail)
    at_last = np.where(last > 0, quantized[:, -1], 0.0)
    cross = np.sum(kept * np.log(np.maximum(quantized, tiny)), axis=1)
    cross += tail * np.log(np.maximum(at_last, tiny))
    return (own - cross) / total + np.log(np.maximum(inside, tiny) / total)


def _xlogx(x: Array) -> Array:
    return x * np.log(np.where(x > 0, x, 1.0))
