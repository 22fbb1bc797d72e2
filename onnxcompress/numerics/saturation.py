"""Keeping weights clear of the 16-bit sums of x86 processors without VNNI.

Their vpmaddubsw instruction multiplies two neighbouring pairs of uint8 activations and int8
weights and adds the products with 16-bit saturation (Intel SDM, volume 2). Since an activation
is at most 255, a pair cannot saturate while its weights of one sign sum to at most 128. The
common remedy, 7-bit weights, halves every channel's resolution; bounding the pairs that really
occur costs a channel only what its own worst pair needs.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

PAIR_LIMIT: Final = 128
"""floor(32767 / 255): the largest sum of two weights of one sign that cannot saturate."""


def largest_pair_sum(rows: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Largest sum of one sign over neighbouring pairs (0, 1), (2, 3), ... of each row.

    Args:
        rows: (C, K), weights in the order in which the kernel sums them.

    Returns:
        (C,), never less than the largest magnitude in the row.
    """
    rows = rows.astype(np.float64 if rows.dtype.kind == "f" else np.int32)
    # A pair of one sign comes to its sum; one of two signs to its larger weight, beyond its sum.
    single = np.abs(rows).max(axis=1, initial=0)
    return np.maximum(single, np.abs(_pair_sums(rows)).max(axis=1, initial=0)).astype(np.float64)


def trim_pairs(rows: npt.NDArray[np.int8]) -> npt.NDArray[np.int8]:
    """Integer weights (C, K) with each pair brought within `PAIR_LIMIT`.

    Rounding can lift a pair one or two steps over a bound that held before it; the larger
    weight of the pair gives way, by those steps.
    """
    wide = rows.astype(np.int16)
    sums = _pair_sums(wide)
    row, pair = np.nonzero(np.abs(sums) > PAIR_LIMIT)
    if not len(row):
        return rows
    left = 2 * pair
    larger = left + (np.abs(wide[row, left]) < np.abs(wide[row, left + 1]))
    over = sums[row, pair]
    wide[row, larger] -= np.sign(over) * (np.abs(over) - PAIR_LIMIT)
    return wide.astype(np.int8)


def _pair_sums(rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """(C, K // 2); the last of an odd number has no partner."""
    even = rows.shape[1] // 2 * 2
    return rows[:, 0:even:2] + rows[:, 1:even:2]
