"""The geometry of the plots that show a training run epoch by epoch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from onnxcompress.report import summary as say
from onnxcompress.report.trade_off import scale
from onnxcompress.train.history import Epoch, History


@dataclass(frozen=True, slots=True)
class Stop:
    """One epoch, in percent of the plot's width."""

    x: float
    width: float
    title: str


@dataclass(frozen=True, slots=True)
class Curves:
    """One figure over the epochs, of what was trained on and of what was held out."""

    label: str
    ticks: tuple[tuple[float, str], ...]
    """Height in percent, and what stands there."""
    lines: tuple[tuple[str, str], ...]
    """Kind (`training`, `validation`) and points in percent, as SVG has them."""
    best: float | None
    """Where the epoch lies whose weights were kept, in percent of the width."""
    stops: tuple[Stop, ...]


def curves(history: History) -> list[Curves]:
    """A plot of the loss and, where there is one, of the accuracy."""
    names = ("loss", "accuracy")
    return [_curves(history, n) for n in names if any(n in _all(e) for e in history.epochs)]


def _curves(history: History, name: str) -> Curves:
    courses = {
        "training": [epoch.training.get(name, math.nan) for epoch in history.epochs],
        "validation": [epoch.validation.get(name, math.nan) for epoch in history.epochs],
    }
    drawn = {kind: course for kind, course in courses.items() if not all(map(math.isnan, course))}
    figures = [figure for course in drawn.values() for figure in course if not math.isnan(figure)]
    top, step = (1.0, 0.2) if name == "accuracy" else scale(figures)
    ticks = [i * step for i in range(round(top / step) + 1)]
    write = say.percent if name == "accuracy" else "{:.3g}".format
    width = 100 / len(history.epochs)
    return Curves(
        label=name,
        ticks=tuple((round(100 * tick / top, 3), write(tick)) for tick in ticks),
        lines=tuple((kind, _points(course, width, top)) for kind, course in drawn.items()),
        best=None if history.best is None else round(width * (history.best - 0.5), 3),
        stops=tuple(
            Stop(x=round(width * i, 3), width=round(width, 3), title=_title(epoch))
            for i, epoch in enumerate(history.epochs)
        ),
    )


def _points(course: Sequence[float], width: float, top: float) -> str:
    """Through the middle of each epoch; a single one is a level line."""
    places = [width * (i + 0.5) for i in range(len(course))]
    if len(course) == 1:
        course, places = [*course, *course], [0.0, 100.0]
    found = zip(places, course, strict=True)
    return " ".join(f"{x:.3f},{100 - 100 * max(0.0, y) / top:.3f}" for x, y in found if y == y)


def _title(epoch: Epoch) -> str:
    told = [f"epoch {epoch.number}, learning rate {epoch.rate:.3g}"]
    for kind, figures in (("training", epoch.training), ("validation", epoch.validation)):
        if figures:
            shown = ", ".join(f"{say.clean(n)} {value:.4g}" for n, value in figures.items())
            told.append(f"{kind}: {shown}")
    return "; ".join(told)


def _all(epoch: Epoch) -> Mapping[str, float]:
    return {**epoch.training, **epoch.validation}
