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
    if rows.shape[1] % 2:
        rows = np.pad(rows, ((0, 0), (0, 1)))
    pairs = rows.reshape(len(rows), -1, 2)
    wide = np.float64 if np.issubdtype(rows.dtype, np.floating) else np.int32
    positive = np.maximum(pairs, 0).sum(axis=2, dtype=wide).max(axis=1, initial=0)
    negative = np.maximum(-pairs.astype(wide), 0).sum(axis=2).max(axis=1, initial=0)
    return np.maximum(positive, negative).astype(np.float64)


def trim_pairs(rows: npt.NDArray[np.int8]) -> npt.NDArray[np.int8]:
    """Integer weights (C, K) with each pair brought within `PAIR_LIMIT`.

    Rounding can lift a pair one or two steps over a bound that held before it; the larger
    weight of the pair gives way, by those steps.
    """
    padded = np.pad(rows.astype(np.int16, order="C"), ((0, 0), (0, rows.shape[1] % 2)))
    pairs = padded.reshape(-1, 2)
    for sign in (1, -1):
        left, right = np.maximum(sign * pairs[:, 0], 0), np.maximum(sign * pairs[:, 1], 0)
        over = np.flatnonzero(left + right > PAIR_LIMIT)
        larger = np.where(left[over] >= right[over], 0, 1)
        pairs[over, larger] -= sign * (left[over] + right[over] - PAIR_LIMIT)
    return padded[:, : rows.shape[1]].astype(np.int8)
