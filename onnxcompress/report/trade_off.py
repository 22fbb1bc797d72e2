"""The geometry of the plot that holds what candidates lose against what they keep on integers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from onnxcompress.mixed import Mixed, Trial
from onnxcompress.report import summary as say

_TICKS: Final = 5
_HIGHEST: Final = 100.0
"""dB: what is better than that is drawn there."""


@dataclass(frozen=True, slots=True)
class Dot:
    """One candidate, in percent of the plot's width and height."""

    x: float
    y: float
    kind: str
    """`chosen`, `met` (the budget) or `missed`."""
    title: str


@dataclass(frozen=True, slots=True)
class TradeOff:
    """SQNR or loss over the share of multiplications that stays on integers."""

    label: str
    ticks: tuple[tuple[float, str], ...]
    """Height in percent, and what stands there."""
    budget: float | None
    """Height of the line that candidates must be above (SQNR) or below (loss)."""
    dots: tuple[Dot, ...]


def trade_off(mixed: Mixed) -> TradeOff:
    """The plot of a search; of what is lost where the budget bounds that, else of SQNR."""
    by_loss = mixed.max_loss is not None and all(t.verdict.loss is not None for t in mixed.trials)
    bound = mixed.max_loss if by_loss else mixed.min_sqnr
    figures = [_figure(trial, by_loss) for trial in mixed.trials]
    top, step = scale([*figures, *([] if bound is None else [bound])])
    height = 100 / top
    return TradeOff(
        label="lost, in points" if by_loss else "SQNR, in dB",
        ticks=tuple(
            (round(height * i * step, 3), _tick(i * step, by_loss))
            for i in range(round(top / step) + 1)
        ),
        budget=None if bound is None else round(height * min(bound, top), 3),
        dots=tuple(
            Dot(
                x=round(100 * trial.share, 3),
                y=round(height * max(0.0, figure), 3),
                kind="chosen" if trial.chosen else "met" if trial.verdict.passed else "missed",
                title=_title(trial),
            )
            for trial, figure in zip(mixed.trials, figures, strict=True)
        ),
    )


def _figure(trial: Trial, by_loss: bool) -> float:
    if by_loss and trial.verdict.loss is not None:
        return trial.verdict.loss
    return min(trial.verdict.sqnr, _HIGHEST)


def scale(figures: Sequence[float]) -> tuple[float, float]:
    """A round upper end and the step between ticks, for a plot that begins at zero."""
    most = max(figures, default=0.0)
    if most <= 0:
        return 1.0, 0.5
    raw = most / _TICKS
    unit = 10 ** math.floor(math.log10(raw))
    step = next(unit * k for k in (1, 2, 5, 10) if unit * k >= raw)
    return step * math.ceil(most / step), step


def _tick(value: float, by_loss: bool) -> str:
    return f"{100 * value:.3g}" if by_loss else f"{value:.3g}"


def _title(trial: Trial) -> str:
    loss = "" if trial.verdict.loss is None else f", {100 * trial.verdict.loss:.2f} points lost"
    kernels = f"{trial.floats} kernel{'' if trial.floats == 1 else 's'} in float"
    return (
        f"{kernels}: {say.percent(trial.share)} on integers, "
        f"{say.decibels(trial.verdict.sqnr)}{loss}"
    )
