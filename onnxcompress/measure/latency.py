"""Latency of two models, timed in turns in one process.

A machine's speed drifts by more than most models differ, so what is believed is the ratio within
a pair of neighbouring turns.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from onnxcompress.contract import Array
from onnxcompress.session import Feed, Session

_BLOCK = 0.005
"""Seconds that one timed block of runs lasts at least."""
_Z95 = 1.96

Run = Callable[[], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Two models timed in turns."""

    original_ms: float
    """Median of a run."""
    candidate_ms: float
    ratio: float
    """Candidate over original: median of the pairs' ratios. Below 1 is faster."""
    low: float
    """Lower end of the ratio's 95 % interval."""
    high: float
    pairs: int


def paired_latency(
    original: ir.Model | Path,
    candidate: ir.Model | Path,
    feed: Feed,
    *,
    threads: int = 1,
    seconds: float = 5.0,
    tolerance: float = 0.02,
) -> Latency:
    """Time two models of one interface in turns, until the ratio is known or time is up.

    Args:
        feed: what both run on; `measure.random_feed` makes one up.
        threads: threads of one operator; one gives the steadiest figures.
        seconds: the budget, which a handful of pairs may exceed.
        tolerance: half the width of the 95 % interval, as a share of the ratio, that will do.

    Raises:
        InputError: if a model or the feed does not run.
    """
    run_a, run_b = (runner(model, feed, threads) for model in (original, candidate))
    return in_turns(run_a, run_b, seconds=seconds, tolerance=tolerance)


def in_turns(
    original: Run,
    candidate: Run,
    *,
    seconds: float = 5.0,
    tolerance: float = 0.02,
    minimum: int = 10,
    clock: Callable[[], float] = time.perf_counter,
) -> Latency:
    """Time two callables in turns, the order changing from pair to pair so that drift cancels.

    A turn is a block of runs long enough for the clock. The interval is the distribution-free
    one of a median (order statistics), so outliers on a busy machine widen nothing.

    Args:
        minimum: pairs to take whatever the budget.
    """
    repeats = [_repeats(run, clock) for run in (original, candidate)]
    runs = (original, candidate)
    times: tuple[list[float], list[float]] = ([], [])
    end = clock() + seconds
    while True:
        order = (0, 1) if len(times[0]) % 2 == 0 else (1, 0)
        for i in order:
            times[i].append(_block(runs[i], repeats[i], clock))
        ratios = np.divide(times[1], times[0])
        ratio = float(np.median(ratios))
        low, high = median_interval(ratios)
        if len(ratios) >= minimum and (high - low <= 2 * tolerance * ratio or clock() >= end):
            break
    return Latency(
        original_ms=1e3 * float(np.median(times[0])),
        candidate_ms=1e3 * float(np.median(times[1])),
        ratio=ratio,
        low=low,
        high=high,
        pairs=len(ratios),
    )


def median_interval(values: Array) -> tuple[float, float]:
    """The 95 % interval of a median from order statistics (binomial, normal approximation)."""
    ordered = np.sort(values)
    n = len(ordered)
    rank = max(0, math.floor(n / 2 - _Z95 * math.sqrt(n) / 2))
    return float(ordered[rank]), float(ordered[n - 1 - rank])


def runner(model: ir.Model | Path, feed: Feed, threads: int) -> Run:
    """A run of a session whose idle threads leave the cores to the other one's."""
    session = Session(model, threads=threads, spinning=False)
    return lambda: session.run(feed)


def _repeats(run: Run, clock: Callable[[], float]) -> int:
    """Runs in a block; warms up on the way, for the first run allocates."""
    run()
    run()
    return max(1, math.ceil(_BLOCK / max(_block(run, 1, clock), 1e-6)))


def _block(run: Run, repeats: int, clock: Callable[[], float]) -> float:
    """Seconds a run; short ones get one more, untimed, as the other model has the caches."""
    if repeats > 1:
        run()
    start = clock()
    for _ in range(repeats):
        run()
    return (clock() - start) / repeats
