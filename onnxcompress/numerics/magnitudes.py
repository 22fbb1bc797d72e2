"""The smallest magnitudes of many arrays, found exactly by streaming over them.

The bits of a magnitude, read as an unsigned integer, order as the magnitude does. So the k-th
smallest of all is found 16 bits at a time: count how often each value of the upper bits occurs,
keep the one that holds rank k, go on below it. No array is ever sorted, or held beside another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_DIGIT: Final = 16  # bits decided in one pass
_BLOCK: Final = 1 << 18  # elements, which stay in the cache from one operation to the next


class Readable(Protocol):
    """An array that is read when asked for, such as an onnx_ir tensor."""

    def numpy(self) -> Array: ...


@dataclass(frozen=True, slots=True)
class Cut:
    """What becomes zero in one array: keys below `key`, and the first `ties` that equal it.

    A key is the bits of a magnitude as float32, or as float64 if `wide`. `zeros` and `changed`
    count the zeros afterwards and those that were none before.
    """

    key: int
    ties: int
    wide: bool
    zeros: int
    changed: int


def cut_smallest(arrays: Sequence[Readable], count: int, *, wide: bool) -> list[Cut]:
    """Cuts of the `count` smallest magnitudes of all arrays together.

    Of equal magnitudes the first go, in the order of the arrays and of their elements. NaN counts
    as larger than everything.

    Args:
        arrays: of floating dtypes; float64 only with `wide`.
        count: from 0 to the number of all elements.
        wide: compare as float64; twice the work.
    """
    key, ties = _select(arrays, count, wide)
    cuts: list[Cut] = []
    for array in arrays:
        below, equal, zeros = _tally(array.numpy(), key, wide)
        taken = min(equal, ties)
        ties -= taken
        cuts.append(_cut(key, taken, wide, below + taken, zeros))
    return cuts


def cut_below(array: Readable, threshold: float, *, wide: bool) -> Cut:
    """The cut of all magnitudes below `threshold`, rounded to the array's dtype."""
    content = array.numpy()
    rounded = np.asarray(threshold, np.float64).astype(content.dtype)
    key = int(next(magnitude_keys(rounded, wide))[0])
    below, _, zeros = _tally(content, key, wide)
    return _cut(key, 0, wide, below, zeros)


def prune(array: Array, cut: Cut) -> Array:
    """A copy of `array` with the elements of the cut set to zero."""
    pruned = np.empty(array.size, array.dtype)
    start = 0
    for block in pruned_blocks(array, cut):
        pruned[start : start + len(block)] = block
        start += len(block)
    return pruned.reshape(array.shape)


def pruned_blocks(array: Array, cut: Cut) -> Iterator[Array]:
    """The elements of `prune(array, cut)` in order, a piece at a time."""
    flat, start, ties = array.reshape(-1), 0, cut.ties
    for keys in magnitude_keys(array, cut.wide):
        block = flat[start : start + len(keys)].copy()
        chosen = keys < cut.key
        if ties:
            equal = np.flatnonzero(keys == cut.key)[:ties]
            chosen[equal] = True
            ties -= len(equal)
        block[chosen] = 0
        start += len(keys)
        yield block


def _cut(key: int, ties: int, wide: bool, chosen: int, zeros: int) -> Cut:
    return Cut(key, ties, wide, max(chosen, zeros), max(chosen - zeros, 0))


def _select(arrays: Sequence[Readable], rank: int, wide: bool) -> tuple[int, int]:
    """The key of the `rank`-th smallest magnitude (from 1), and its rank among its equals."""
    if rank == 0:
        return 0, 0
    bits, key = (64 if wide else 32), 0
    for shift in range(bits - _DIGIT, -1, -_DIGIT):
        ends = np.cumsum(_digits(arrays, shift, key, wide))
        digit = int(np.searchsorted(ends, rank))
        rank -= int(ends[digit - 1]) if digit else 0
        key = key << _DIGIT | digit
    return key, rank


def _digits(arrays: Sequence[Readable], shift: int, prefix: int, wide: bool) -> Array:
    """How often each digit occurs at `shift` in the keys that begin with `prefix`, (65536,)."""
    counts = np.zeros(1 << _DIGIT, np.int64)
    for array in arrays:
        for keys in magnitude_keys(array.numpy(), wide):
            heads = keys >> shift
            if shift + _DIGIT < 8 * keys.itemsize:
                heads = heads[heads >> _DIGIT == prefix]
            digits = (heads & ((1 << _DIGIT) - 1)).astype(np.int64)
            counts += np.bincount(digits, minlength=1 << _DIGIT)
    return counts


def _tally(array: Array, key: int, wide: bool) -> tuple[int, int, int]:
    """How many keys are below `key`, equal to it, and zero."""
    below = equal = zeros = 0
    for keys in magnitude_keys(array, wide):
        below += int(np.count_nonzero(keys < key))
        equal += int(np.count_nonzero(keys == key))
        zeros += len(keys) - int(np.count_nonzero(keys))
    return below, equal, zeros


def magnitude_keys(array: Array, wide: bool) -> Iterator[Array]:
    """The keys of an array's elements in order, in blocks of uint32, or of uint64 if `wide`."""
    flat = array.reshape(-1)
    number, key = (np.float64, np.uint64) if wide else (np.float32, np.uint32)
    for start in range(0, flat.size, _BLOCK):
        yield np.abs(flat[start : start + _BLOCK]).astype(number, copy=False).view(key)
