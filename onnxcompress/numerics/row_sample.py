"""A uniform sample of the rows that a kernel multiplies by its weight.

From it follow the Gram matrix and the mean of a layer's input. It is far smaller than the Gram
matrix of a wide layer (4096 rows of 4608 bytes against 4608² numbers), costs no arithmetic while
the model runs, and merges to the bit: every row has a priority, drawn from what the array holds
and the row's place in it, and the rows of least priority are kept ("bottom-k" sampling: Cohen and
Kaplan, Summarizing Data using Bottom-k Sketches, 2007).
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from itertools import product
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcompress.numerics.histogram import Unobservable

Array = npt.NDArray[Any]
Priorities = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Patches:
    """How a kernel cuts its data into rows, in the terms of the ONNX operator Conv.

    Without a `kernel` a row is the last axis of the data, as in MatMul and Gemm. With one it is a
    patch, position by position and, at each, all channels: (k1 · k2 · … · C) values.
    """

    kernel: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    """Begin of each spatial axis, then end of each."""
    auto_pad: str = "NOTSET"
    """NOTSET (take `pads`), VALID, SAME_UPPER or SAME_LOWER."""
    fill: int = 0
    """What stands in the padding: the zero point of integer data."""
    rows: int = 4096
    """Rows to keep in all."""
    rows_each: int = 64
    """Rows to take of one array at most."""


@dataclass(frozen=True, slots=True, eq=False)
class RowSample:
    """At most `limit` rows, [n, K] in the data's own type, ascending by priority, uint64 [n]."""

    priorities: Priorities
    rows: Array
    limit: int

    def merge(self, other: RowSample) -> RowSample:
        """Of the data of both. Exact.

        Raises:
            Unobservable: if the rows differ in length or type.
        """
        if self.rows.shape[1:] != other.rows.shape[1:] or self.rows.dtype != other.rows.dtype:
            raise Unobservable("the number of channels changes from feed to feed")
        priorities = np.concatenate([self.priorities, other.priorities])
        rows = np.concatenate([self.rows, other.rows])
        # Equal priorities come from equal arrays, so their rows are equal too.
        order = np.argsort(priorities, kind="stable")[: self.limit]
        return RowSample(priorities[order], rows[order], self.limit)


class RowSampleBuilder:
    """Takes arrays, from any threads, and sorts them only now and then."""

    def __init__(self, patches: Patches) -> None:
        self._patches = patches
        self._pieces: list[RowSample] = []
        self._held = 0
        self._lock = Lock()

    def add(self, array: Array) -> None:
        """Draw rows from [batch, C, ...spatial], or [..., K] without a kernel.

        Raises:
            Unobservable: if the array has another rank, or rows of another length than before.
        """
        cut = _cut_patches if self._patches.kernel else _cut_vectors
        piece = cut(array, self._patches)
        with self._lock:
            if self._pieces and piece.rows.shape[1] != self._pieces[0].rows.shape[1]:
                raise Unobservable("the number of channels changes from feed to feed")
            self._pieces.append(piece)
            self._held += len(piece.rows)
            if self._held > 2 * self._patches.rows:
                self.build()

    def build(self) -> RowSample:
        """Everything added so far."""
        priorities = np.concatenate([p.priorities for p in self._pieces])
        rows = np.concatenate([p.rows for p in self._pieces])
        order = np.argsort(priorities, kind="stable")[: self._patches.rows]
        kept = RowSample(priorities[order], rows[order], self._patches.rows)
        self._pieces, self._held = [kept], len(order)
        return kept


def _cut_vectors(array: Array, patches: Patches) -> RowSample:
    if array.ndim < 1:
        raise Unobservable("it has no axes")
    vectors = array.reshape(-1, array.shape[-1])
    chosen, priorities = _draw(array, len(vectors), patches.rows_each)
    return RowSample(priorities, vectors[chosen], patches.rows)


def _cut_patches(array: Array, patches: Patches) -> RowSample:
    rank = len(patches.kernel)
    if array.ndim != rank + 2:
        raise Unobservable(f"it does not have {rank} spatial axes")
    sizes = array.shape[2:]
    reach = [d * (k - 1) + 1 for k, d in zip(patches.kernel, patches.dilations, strict=True)]
    begins, counts = _positions(patches, sizes, reach)
    places = array.shape[0] * math.prod(counts)
    chosen, priorities = _draw(array, places, patches.rows_each)
    batch, *position = np.unravel_index(chosen, (array.shape[0], *counts))
    offsets = np.array(list(product(*map(range, patches.kernel)))).reshape(-1, rank)
    inside = np.ones((len(chosen), len(offsets)), bool)
    flat = np.zeros(inside.shape, np.intp)
    for axis, size in enumerate(sizes):
        at = position[axis][:, None] * patches.strides[axis] - begins[axis]
        at = at + offsets[:, axis] * patches.dilations[axis]
        inside &= (at >= 0) & (at < size)
        flat = flat * size + np.clip(at, 0, size - 1)
    # Advanced indices around a slice come first: [row, place in the kernel, channel].
    found = array.reshape(*array.shape[:2], -1)[batch[:, None], :, flat]
    found[~inside] = patches.fill
    return RowSample(priorities, found.reshape(len(chosen), -1), patches.rows)


def _positions(
    patches: Patches, sizes: tuple[int, ...], reach: list[int]
) -> tuple[list[int], list[int]]:
    """Padding before, and number of outputs, of each spatial axis."""
    rank = len(sizes)
    if patches.auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        counts = [-(-size // stride) for size, stride in zip(sizes, patches.strides, strict=True)]
        begins: list[int] = []
        for size, stride, need, count in zip(sizes, patches.strides, reach, counts, strict=True):
            total = max((count - 1) * stride + need - size, 0)
            begins.append(total // 2 if patches.auto_pad == "SAME_UPPER" else total - total // 2)
        return begins, counts
    pads = (0,) * (2 * rank) if patches.auto_pad == "VALID" else patches.pads
    counts = [
        (sizes[i] + pads[i] + pads[rank + i] - reach[i]) // patches.strides[i] + 1
        for i in range(rank)
    ]
    return list(pads[:rank]), counts


def _draw(array: Array, count: int, most: int) -> tuple[npt.NDArray[np.intp], Priorities]:
    """The places of least priority among `count`, ascending by it."""
    seed = np.uint64(zlib.crc32(np.ascontiguousarray(array).data))
    priorities = _mixed(np.arange(count, dtype=np.uint64) + (seed << np.uint64(32)))
    most = min(most, count)
    chosen = np.argpartition(priorities, most - 1)[:most] if most else np.empty(0, np.intp)
    chosen = chosen[np.argsort(priorities[chosen])]
    return chosen, priorities[chosen]


def _mixed(x: Priorities) -> Priorities:
    """The finalizer of SplitMix64 (Steele, Lea and Flood 2014): a bijection without pattern."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
