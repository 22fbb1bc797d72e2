"""Learning rates by step: pure functions that a run can be resumed in the middle of.

A schedule is called with the steps done (from 0) and how many there will be, and gives the factor
of the optimizer's learning rate, from 0 to 1. Those with options are data, so that they can be
compared, sent to other processes and kept in files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import cos, floor, pi
from typing import Final

from onnxcompress.errors import InputError

Schedule = Callable[[int, int], float]


def constant(done: int, total: int) -> float:
    """1 throughout."""
    return 1.0


def linear(done: int, total: int) -> float:
    """From 1 down to 0, evenly."""
    return 1 - done / total


def cosine(done: int, total: int) -> float:
    """From 1 down to 0 along half a cosine.

    Source: Loshchilov and Hutter, SGDR (2017), without restarts.
    """
    return 0.5 + 0.5 * cos(pi * done / total)


@dataclass(frozen=True)
class warm_up:
    """Rise evenly to 1 in the first `part` (0 to 1) of the steps, then go on as `then` does.

    Source: Goyal et al., Accurate, Large Minibatch SGD (2017).
    """

    part: float = 0.05
    then: Schedule = cosine

    def __post_init__(self) -> None:
        if not 0 <= self.part < 1:
            raise InputError(f"warm_up: part is {self.part} but must be from 0 to below 1")

    def __call__(self, done: int, total: int) -> float:
        rising = floor(self.part * total)
        if done < rising:
            return (done + 1) / (rising + 1)
        return self.then(done - rising, total - rising)


@dataclass(frozen=True)
class stepped:
    """Multiply by `factor` at each of `times` even intervals: 1, factor, factor², ..."""

    times: int = 3
    factor: float = 0.1

    def __post_init__(self) -> None:
        if self.times < 1 or not 0 < self.factor <= 1:
            raise InputError(f"stepped: times ({self.times}) must be 1 or more, "
                             f"factor ({self.factor}) up to 1")  # fmt: skip

    def __call__(self, done: int, total: int) -> float:
        return self.factor ** min(self.times, done * (self.times + 1) // total)


@dataclass(frozen=True)
class one_cycle:
    """Rise from `start` to 1 in the first part `peak`, then fall to `end`, along half cosines.

    Source: Smith and Topin, Super-Convergence (2018).
    """

    peak: float = 0.3
    start: float = 0.04
    end: float = 1e-4

    def __post_init__(self) -> None:
        if not 0 < self.peak < 1 or not 0 <= self.start <= 1 or not 0 <= self.end <= 1:
            raise InputError("one_cycle: peak must be between 0 and 1, start and end from 0 to 1")

    def __call__(self, done: int, total: int) -> float:
        top = self.peak * total
        if done < top:
            return 1 - (1 - self.start) * (0.5 + 0.5 * cos(pi * done / top))
        return self.end + (1 - self.end) * (0.5 + 0.5 * cos(pi * (done - top) / (total - top)))


SCHEDULES: Final[dict[str, Schedule]] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "warm_up": warm_up(),
    "stepped": stepped(),
    "one_cycle": one_cycle(),
}
"""By the names that a recipe has for them."""
