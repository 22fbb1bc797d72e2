"""Learning rates by step: pure functions that a run can be resumed in the middle of.

A schedule is called with the steps done (from 0) and how many there will be, and gives the factor
of the optimizer's learning rate, from 0 to 1.
"""

from __future__ import annotations

from collections.abc import Callable
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


def warm_up(part: float = 0.05, then: Schedule = cosine) -> Schedule:
    """Rise evenly to 1 in the first `part` (0 to 1) of the steps, then go on as `then` does.

    Source: Goyal et al., Accurate, Large Minibatch SGD (2017).
    """
    if not 0 <= part < 1:
        raise InputError(f"warm_up: part is {part} but must be from 0 to below 1")

    def factor(done: int, total: int) -> float:
        rising = floor(part * total)
        if done < rising:
            return (done + 1) / (rising + 1)
        return then(done - rising, total - rising)

    return factor


def stepped(times: int = 3, factor: float = 0.1) -> Schedule:
    """Multiply by `factor` at each of `times` even intervals: 1, factor, factor², ..."""
    if times < 1 or not 0 < factor <= 1:
        raise InputError(f"stepped: times ({times}) must be 1 or more, factor ({factor}) up to 1")
    return lambda done, total: factor ** min(times, done * (times + 1) // total)


def one_cycle(peak: float = 0.3, start: float = 0.04, end: float = 1e-4) -> Schedule:
    """Rise from `start` to 1 in the first part `peak`, then fall to `end`, along half cosines.

    Source: Smith and Topin, Super-Convergence (2018).
    """
    if not 0 < peak < 1 or not 0 <= start <= 1 or not 0 <= end <= 1:
        raise InputError("one_cycle: peak must be between 0 and 1, start and end from 0 to 1")

    def factor(done: int, total: int) -> float:
        top = peak * total
        if done < top:
            return 1 - (1 - start) * (0.5 + 0.5 * cos(pi * done / top))
        return end + (1 - end) * (0.5 + 0.5 * cos(pi * (done - top) / (total - top)))

    return factor


SCHEDULES: Final[dict[str, Schedule]] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "warm_up": warm_up(),
    "stepped": stepped(),
    "one_cycle": one_cycle(),
}
"""By the names that a recipe has for them."""
