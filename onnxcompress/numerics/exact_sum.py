"""Channel sums that come out the same, to the bit, in whatever order arrays are added.

Each number is cut into integers on fixed grids 40 bits apart, which add without rounding: the
fixed-point superaccumulator of Kulisch, with few words because sums of float32 data need no more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcompress.numerics.histogram import Unobservable, extremes

Array = npt.NDArray[Any]

# The topmost grid leaves float32's largest number 2**28, so 2**34 of them fit into int64. What
# is below half of the finest grid, 2**-101, is dropped from each number.
GRIDS = (2.0**100, 2.0**60, 2.0**20, 2.0**-20, 2.0**-60, 2.0**-100)


@dataclass(frozen=True, slots=True, eq=False)
class ExactSum:
    """The sum of `count` terms in each of n channels; `words` is int64 [6, n].

    The terms of one array are summed in float64 as numpy does; sums of arrays are exact.
    """

    words: npt.NDArray[np.int64]
    count: int

    @classmethod
    def of(cls, channels: Array) -> ExactSum:
        """From [m, n, k] float32, n channels.

        Raises:
            FloatingPointError: if an element is NaN.
            Unobservable: if one is infinite.
        """
        rest = channels.sum(axis=(0, 2), dtype=np.float64)
        extremes(rest.astype(np.float32))
        words = np.empty((len(GRIDS), len(rest)), np.int64)
        for word, grid in zip(words, GRIDS, strict=True):
            whole = np.rint(rest / grid)
            word[:] = whole
            rest -= whole * grid
        return cls(words, channels.shape[0] * channels.shape[2])

    def merge(self, other: ExactSum) -> ExactSum:
        """Of both. Exact.

        Raises:
            Unobservable: if the numbers of channels differ.
        """
        if self.words.shape != other.words.shape:
            raise Unobservable("the number of channels changes from feed to feed")
        return ExactSum(self.words + other.words, self.count + other.count)

    def mean(self) -> npt.NDArray[np.float64]:
        """Mean of the terms of each channel [n]; NaN without any."""
        total = np.zeros(self.words.shape[1])
        for word, grid in zip(self.words[::-1], GRIDS[::-1], strict=True):
            total += word * grid
        return total / self.count if self.count else np.full_like(total, np.nan)
