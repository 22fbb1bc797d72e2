"""What a model decides: agreement of two models' decisions, and their score against labels.

An output is read as one of three things, by its dtype and by its shape without trailing axes of
one element (`squeeze_tail`):

- class scores: floats with several entries on the last axis; the decision is the largest;
- a lone score: one float for each sample; the decision is which side of a threshold it is on;
- anything of integers or booleans is a decision already, element by element.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Bools = npt.NDArray[np.bool_]


class Metric(StrEnum):
    """How an output is scored against labels."""

    ACCURACY = "accuracy"
    RMSE = "rmse"
    """Root of the mean squared error, in the label's unit: for labels that are no classes."""


@dataclass(frozen=True, slots=True)
class Score:
    """The original's and the candidate's score against the same labels."""

    metric: Metric
    original: float
    candidate: float


@dataclass(slots=True)
class Share:
    """How many of how many."""

    hits: int = 0
    total: int = 0

    def add(self, hits: Bools) -> None:
        self.hits += int(np.count_nonzero(hits))
        self.total += hits.size

    @property
    def value(self) -> float | None:
        return self.hits / self.total if self.total else None


@dataclass(slots=True)
class Agreement:
    """Share of equal decisions of two models on one output, over a stream of pairs."""

    k: int
    classes: bool | None
    """Whether floats with several entries on the last axis are class scores. Where unknown
    (None), two axes are taken for (sample, class), three are not; more than three never are."""
    best: Share = field(default_factory=Share)
    best_k: Share = field(default_factory=Share)
    ranked: bool = False
    """Whether the largest of class scores decides, so that their values matter by order alone."""
    _probability: bool = True

    def update(self, original: Array, candidate: Array) -> None:
        """Add one pair of equal shape."""
        a, b = squeeze_tail(original), squeeze_tail(candidate)
        if not is_float(a):
            self.best.add(np.equal(a, b))
        elif a.ndim <= 1:
            self._probability &= bool(((a >= 0) & (a <= 1)).all())
            self.best.add(np.equal(a > 0.5, b > 0.5))
        elif self.classes is not False and a.ndim <= (3 if self.classes else 2):
            self.ranked = True
            self.best.add(np.equal(a.argmax(axis=-1), b.argmax(axis=-1)))
            if self.k < a.shape[-1]:
                self.best_k.add(within_top(a, b, self.k))

    @property
    def equal(self) -> float | None:
        """Share of equal decisions; None for a lone score that is no probability (0 to 1)."""
        return self.best.value if self._probability else None

    @property
    def top_k(self) -> float | None:
        """How often the original's class is among the candidate's best k."""
        return self.best_k.value


@dataclass(slots=True)
class Scorer:
    """Both models' score on one output against labels, one row of labels for each sample.

    Class labels below zero are left out (the customary mark for "ignore"). Labels of 0 and 1 for
    a lone score are decided at 0.5 where the original's values are probabilities, else at 0.
    """

    labels: Array
    used: int = 0
    applies: bool = True
    _metric: Metric = Metric.ACCURACY
    _original: list[Share] = field(default_factory=lambda: [Share(), Share()])
    _candidate: list[Share] = field(default_factory=lambda: [Share(), Share()])
    _squares: list[float] = field(default_factory=lambda: [0.0, 0.0])
    _probability: bool = True
    _whole: bool = field(init=False)
    _binary: bool = field(init=False)

    def __post_init__(self) -> None:
        self._whole = self.labels.dtype.kind in "iub" or bool(
            (self.labels == np.rint(self.labels)).all()
        )
        self._binary = bool(((self.labels == 0) | (self.labels == 1)).all())

    def update(self, original: Array, candidate: Array) -> None:
        """Add one pair of equal shape: the next `len(original)` samples."""
        if not (self.applies and original.ndim):
            self.applies = False
            return
        a, b = squeeze_tail(original), squeeze_tail(candidate)
        labels = squeeze_tail(self.labels[self.used : self.used + len(a)])
        self.used += len(a)
        if len(labels) < len(a):
            return
        if is_float(a) and a.ndim > 1 and labels.shape == a.shape[:-1] and self._whole:
            self._add_classes(a, b, labels)
        elif labels.shape != a.shape:
            self.applies = False
        elif not is_float(a):
            _add(self._original[0], a == labels, self._candidate[0], b == labels)
        elif self._binary:
            self._add_binary(a, b, labels)
        else:
            self._add_values(a, b, labels)

    def _add_classes(self, a: Array, b: Array, labels: Array) -> None:
        kept = labels >= 0
        right_a, right_b = (x.argmax(axis=-1)[kept] == labels[kept] for x in (a, b))
        _add(self._original[0], right_a, self._candidate[0], right_b)

    def _add_binary(self, a: Array, b: Array, labels: Array) -> None:
        self._probability &= bool(((a >= 0) & (a <= 1)).all())
        for i, threshold in enumerate((0.5, 0.0)):
            right_a, right_b = ((x > threshold) == (labels > 0) for x in (a, b))
            _add(self._original[i], right_a, self._candidate[i], right_b)

    def _add_values(self, a: Array, b: Array, labels: Array) -> None:
        self._metric = Metric.RMSE
        self._original[0].total += a.size
        for i, x in enumerate((a, b)):
            error = x.astype(np.float64) - labels
            self._squares[i] += float(np.sum(error * error))

    @property
    def score(self) -> Score | None:
        """None where the labels do not fit this output or nothing was scored."""
        if not self.applies or not self._original[0].total:
            return None
        if self._metric is Metric.RMSE:
            a, b = (math.sqrt(s / self._original[0].total) for s in self._squares)
            return Score(Metric.RMSE, a, b)
        i = 0 if self._probability else 1
        a, b = self._original[i].value, self._candidate[i].value
        return Score(Metric.ACCURACY, a or 0.0, b or 0.0)


def squeeze_tail(array: Array) -> Array:
    """`array` without its trailing axes of one element; the first axis stays."""
    while array.ndim > 1 and array.shape[-1] == 1:
        array = array[..., 0]
    return array


def is_float(array: Array) -> bool:
    """Whether the elements are floating-point numbers."""
    return array.dtype.kind == "f"


def within_top(original: Array, candidate: Array, k: int) -> Bools:
    """Whether the original's winner on the last axis is among the candidate's best k.

    A tie in the candidate counts for the winner: it ranks behind only what is strictly greater.
    """
    winner = original.argmax(axis=-1)[..., None]
    ahead = candidate > np.take_along_axis(candidate, winner, axis=-1)
    return np.count_nonzero(ahead, axis=-1) < k


def _add(share_a: Share, right_a: Bools, share_b: Share, right_b: Bools) -> None:
    share_a.add(right_a)
    share_b.add(right_b)
