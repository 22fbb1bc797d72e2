"""How many weights of each tensor to prune: layer-adaptive magnitudes (LAMP), found by streaming.

The score of a weight w is w² / Σ v² over the weights v of its tensor with |v| ≥ |w|: its share of
what is left when all smaller ones are gone. Scaling a tensor changes none of its scores, so those
of different tensors compare. Within a tensor the score grows with the magnitude, so only how many
go is to be found: bins of the magnitude with their counts and sums of squares bound the scores in
each bin, and the few bins that the bounds leave open are looked at closer, down to single
magnitudes. No tensor is sorted, or held beside another.

Source: Lee et al., Layer-adaptive sparsity for the magnitude-based pruning, ICLR 2021.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from onnxcompress.numerics.magnitudes import Readable, magnitude_keys

Array = npt.NDArray[Any]

_BITS: Final = 12  # of the width of a span that one look tells apart
_LARGEST: Final = (float(np.finfo(np.float32).max), 1e150)  # beyond, squares cannot be summed


def layer_adaptive_counts(arrays: Sequence[Readable], count: int, *, wide: bool) -> list[int]:
    """How many of each array are among the `count` elements of least score.

    Of equal scores the first go, in the order of the arrays. What is not finite has no score and
    counts for nothing; so do float64 above 1e150.

    Args:
        arrays: of floating dtypes; float64 only with `wide`.
        count: from 0 to the number of all elements.
        wide: compare as float64; twice the work.
    """
    if not count:
        return [0] * len(arrays)
    largest = np.asarray(_LARGEST[wide], np.float64 if wide else np.float32)
    spans = [_Span(0, int(next(magnitude_keys(largest, wide))[0]))] * len(arrays)
    while True:
        looks = [_look(array, span, wide) for array, span in zip(arrays, spans, strict=True)]
        narrowed = _narrowed(looks, count)
        looked_closely = not any(span.shift for span in spans)
        if looked_closely or narrowed == spans or _settled(narrowed, count):
            return _share_out(narrowed, count)
        spans = narrowed


@dataclass(frozen=True, slots=True)
class _Span:
    """The keys of one array, from `low` to `high`, of which it is open whether they go."""

    low: int
    high: int
    inside: int = -1
    """Elements with such keys; -1 while nobody looked."""
    below: int = 0
    """Elements with smaller keys, which go."""
    above: float = 0.0
    """Sum of the squares of those with larger keys, which stay."""

    @property
    def shift(self) -> int:
        """Bits of a key that a look at this span does not tell apart."""
        return max(0, (self.high - self.low).bit_length() - _BITS) if self.inside else 0


@dataclass(frozen=True, slots=True)
class _Look:
    """A span in bins, those with elements only, in order: each array has an entry a bin."""

    span: _Span
    lows: Array
    counts: Array
    squares: Array
    least: Array
    """What no score in the bin is below."""
    most: Array
    """What no score in the bin is above."""

    def between(self, least: float, most: float) -> _Span:
        """The part of the span where scores from `least` to `most` can be."""
        first = int(np.searchsorted(self.most, least, "left"))
        last = int(np.searchsorted(self.least, most, "right"))
        inside = int(self.counts[first:last].sum())
        below = self.span.below + int(self.counts[:first].sum())
        above = self.span.above + float(self.squares[last:].sum())
        low, high = self.span.low, self.span.high
        if inside:
            width = 1 << self.span.shift
            low, high = int(self.lows[first]), min(int(self.lows[last - 1]) + width - 1, high)
        return _Span(low, high, inside, below, above)


def _look(array: Readable, span: _Span, wide: bool) -> _Look:
    number, shift = (np.float64 if wide else np.float32), span.shift
    size = ((span.high - span.low) >> shift) + 1 if span.inside else 0
    counts, squares = np.zeros(size, np.int64), np.zeros(size)
    for keys in magnitude_keys(array.numpy(), wide) if size else ():
        keys = keys[(keys >= span.low) & (keys <= span.high)]
        bins = ((keys - span.low) >> shift).astype(np.int64)
        counts += np.bincount(bins, minlength=size)
        values = keys.view(number).astype(np.float64)
        squares += np.bincount(bins, values * values, minlength=size)
    held = np.flatnonzero(counts)
    counts, squares = counts[held], squares[held]
    lows = (span.low + (held << shift)).astype(np.uint64 if wide else np.uint32)
    highs = np.minimum(lows + ((1 << shift) - 1), span.high).astype(lows.dtype)
    rests = span.above + np.cumsum(squares[::-1])[::-1]  # from each bin on
    least = _ratio(_squared(lows.view(number)), rests)
    most = least
    if shift:
        most = _squared(highs.view(number))
        most = np.maximum(_ratio(most, most + np.append(rests[1:], span.above)[: len(held)]), least)
    ordered = np.maximum.accumulate
    return _Look(span, lows, counts, squares, ordered(least), ordered(most))


def _squared(values: Array) -> Array:
    return values.astype(np.float64) ** 2


def _ratio(part: Array, whole: Array) -> Array:
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)


def _narrowed(looks: Sequence[_Look], count: int) -> list[_Span]:
    """The spans that hold the score of the last element to go, as far as the bins tell."""
    counts = np.concatenate([look.counts for look in looks])
    rank = min(count - sum(look.span.below for look in looks), int(counts.sum()))
    least = _ranked(np.concatenate([look.least for look in looks]), counts, rank)
    most = _ranked(np.concatenate([look.most for look in looks]), counts, rank)
    return [look.between(least, most) for look in looks]


def _ranked(scores: Array, counts: Array, rank: int) -> float:
    """The `rank`-th smallest score (from 1), each of which occurs `counts` times."""
    order = np.argsort(scores, kind="stable")
    at = np.searchsorted(np.cumsum(counts[order]), rank)
    return float(scores[order[at]]) if len(order) else 0.0


def _settled(spans: Sequence[_Span], count: int) -> bool:
    """Whether all that is open goes."""
    return sum(span.below + span.inside for span in spans) <= count


def _share_out(spans: Sequence[_Span], count: int) -> list[int]:
    """What goes of each array when all open elements have one score, or all go."""
    rank, taken = count - sum(span.below for span in spans), list[int]()
    for span in spans:
        ties = min(span.inside, rank)
        rank -= ties
        taken.append(span.below + ties)
    return taken
