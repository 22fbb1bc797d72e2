"""Factors that move the differences between channels from activations into weights.

With activations in one scale a tensor and weights in one scale an output channel, the error of
W x after rounding both, for channels divided by s, is expected to be

    Σ_j (Δ² / 12 + clipped_j) (s_j ‖W_j‖)²  +  Σ_n δ_n² / 12 · Σ_j E[x_j²] / s_j²

with the steps Δ = range(x / s) / 255 and δ_n = max_j |s_j W_nj| / 127. On layers of transformers
the first sum is within half a decibel of what is measured.

Source: Xiao et al., SmoothQuant, 2023, for factors of the form max|x_j|^a / max|W_j|^(1-a).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from onnxcompress.numerics.rows import row_blocks

Floats = npt.NDArray[np.floating[Any]]

_STEPS: Final = 255
_INT8_MAX: Final = 127
_FAINT: Final = 1e-2
_STRENGTHS: Final = np.linspace(0, 1, 9)
_FEWEST_ROWS: Final = 32
_BLOCK: Final = 1 << 22
"""Elements of a weight worked on in one go, so that none is copied whole."""


def smoothing_factors(
    rows: Floats, low: Floats, high: Floats, weights: Sequence[Floats]
) -> tuple[Floats, float]:
    """What to divide channels by, float64 (K,), and the error left as a share of that with ones.

    How strongly the channels are brought together is tried out on one half of the rows, with
    ranges from the other half: where unseen data often leave the range of a channel, they need
    the room that an outlier beside them gives. Then ranges are taken of all data.

    Args:
        rows: (n, K), a sample of x.
        low, high: (K,), extremes of all of x.
        weights: (N, K) each, N as it may be: of all that read x.
    """
    none = np.ones(len(low))
    largest = np.max([np.abs(block).max(axis=0) for block in _blocks(weights)], axis=0)
    if len(rows) < _FEWEST_ROWS or not np.any(rows) or not np.any(largest):
        return none, 1.0
    known, unseen = rows[::2].astype(np.float64), rows[1::2].astype(np.float64)
    known_range = known.min(axis=0), known.max(axis=0)
    least, best = _error(none, known_range, unseen, weights), None
    before = least
    for strength in _STRENGTHS:
        for against in {0.0, 1 - float(strength)}:
            factors = _factors(known_range, largest, strength, against)
            error = _error(factors, known_range, unseen, weights)
            if error < least:
                least, best = error, (strength, against)
    if best is None:
        return none, 1.0
    return _factors((low, high), largest, *best), least / before


def _factors(
    ranges: tuple[Floats, Floats], weights: Floats, strength: float, against: float
) -> Floats:
    magnitudes = np.maximum(*(np.abs(bound).astype(np.float64) for bound in ranges))
    logs = strength * _log(magnitudes) - against * _log(weights.astype(np.float64))
    return np.exp(logs - logs.mean())


def _log(magnitudes: Floats) -> Floats:
    """Of each channel's magnitude; what is faint, or was never seen, is not blown up."""
    return np.log(np.maximum(magnitudes, _FAINT * magnitudes.max()))


def _error(
    factors: Floats, ranges: tuple[Floats, Floats], rows: Floats, weights: Sequence[Floats]
) -> float:
    low, high = min((ranges[0] / factors).min(), 0.0), max((ranges[1] / factors).max(), 0.0)
    scaled = rows / factors
    clipped = np.square(scaled - np.clip(scaled, low, high)).mean(axis=0)
    rounded = np.square((high - low) / _STEPS) / 12
    energies, steps = np.zeros(len(factors)), 0.0
    for block in _blocks(weights):
        columns = block * factors.astype(block.dtype)
        energies += np.einsum("nk,nk->k", columns, columns)
        steps += float(np.square(np.abs(columns).max(axis=1) / _INT8_MAX).sum())
    lost_data = np.dot(rounded + clipped, energies)
    lost_weight = steps / 12 * np.square(scaled).mean(axis=0).sum()
    return float(lost_data + lost_weight)


def _blocks(weights: Sequence[Floats]) -> Iterator[Floats]:
    for weight in weights:
        for index in row_blocks(weight, _BLOCK):
            yield weight[index]
