"""How close one array of numbers is to another, accumulated over a stream of pairs.

Each class here is a sum: `update` adds one pair of arrays, the properties read the figure so far.
Sums are float64 whatever the arrays are, and arrays are walked in pieces, so memory stays flat.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
_PIECE = 1 << 16
"""Elements widened to float64 at a time: half a MiB, which stays in the cache."""


@dataclass(slots=True)
class Fidelity:
    """Error of a candidate tensor against the original, over all its elements.

    Elements where the original itself is infinite or NaN have no error to speak of: they enter no
    sum. Where only the candidate is, they are counted in `broken` and enter no sum either.
    """

    count: int = 0
    broken: int = 0
    peak: float = 0.0
    max_error: float = 0.0
    signal: float = 0.0
    noise: float = 0.0
    energy: float = 0.0
    dot: float = 0.0

    def update(self, original: Array, candidate: Array) -> None:
        """Add one pair of equal shape, of any real dtype."""
        for a, b in _pieces(original, candidate):
            finite_a, finite_b = np.isfinite(a), np.isfinite(b)
            if not (finite_a.all() and finite_b.all()):
                self.broken += int(np.count_nonzero(finite_a & ~finite_b))
                both = finite_a & finite_b
                a, b = a[both], b[both]
            if a.size:
                self._add(a, b)

    def _add(self, a: Array, b: Array) -> None:
        error = b - a
        self.count += a.size
        self.peak = max(self.peak, float(np.abs(a).max()))
        self.max_error = max(self.max_error, float(np.abs(error).max()))
        self.signal += _dot(a, a)
        self.energy += _dot(b, b)
        self.dot += _dot(a, b)
        self.noise += _dot(error, error)

    @property
    def max_relative(self) -> float:
        """Largest absolute error as a share of the original's largest magnitude."""
        return _ratio(self.max_error, self.peak)

    @property
    def noise_to_signal(self) -> float:
        """Σ(candidate - original)² / Σ original²; 0 where exact."""
        return _ratio(self.noise, self.signal)

    @property
    def sqnr(self) -> float:
        """Signal to quantization noise ratio in dB; infinite where exact."""
        return decibel(self.noise_to_signal)

    @property
    def cosine(self) -> float:
        """Cosine between the two, taken as one long vector each."""
        if not (self.signal and self.energy):
            return 1.0 if self.signal == self.energy else 0.0
        return min(1.0, self.dot / (math.sqrt(self.signal) * math.sqrt(self.energy)))


def decibel(noise_to_signal: float) -> float:
    """A noise-to-signal power ratio as SQNR in dB."""
    if noise_to_signal <= 0:
        return math.inf
    return -10 * math.log10(noise_to_signal)


def _pieces(a: Array, b: Array) -> Iterator[tuple[Array, Array]]:
    a, b = a.reshape(-1), b.reshape(-1)
    for start in range(0, a.size, _PIECE):
        stop = start + _PIECE
        yield a[start:stop].astype(np.float64), b[start:stop].astype(np.float64)


def _dot(a: Array, b: Array) -> float:
    """Σ a·b, not by BLAS: its sum depends on the number of threads, and its threads wait."""
    return float(np.einsum("i,i->", a, b))


def _ratio(part: float, whole: float) -> float:
    if not part:
        return 0.0
    return part / whole if whole else math.inf
