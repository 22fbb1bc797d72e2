"""Runs passes in order: clone, observe what each wants, bind, apply, record."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeGuard

import onnx_ir as ir

from onnxcompress.contract import CalibratedPass, Figure, Pass, Result, Skip, Statistics, Want
from onnxcompress.garbage import rarely_collected

Observer = Callable[[ir.Model, Sequence[Want]], Statistics]
"""Runs a model over the calibration data and keeps what was wanted."""


@dataclass(frozen=True, slots=True)
class Record:
    """What one pass did: its options, what it declined, its figures and its time in seconds."""

    name: str
    options: Mapping[str, object]
    modified: bool
    skips: tuple[Skip, ...]
    figures: Mapping[str, Figure]
    seconds: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """A rewritten model, how it came about, and the statistics that the last observer kept."""

    model: ir.Model
    records: tuple[Record, ...]
    statistics: Statistics | None


def run(
    model: ir.Model,
    passes: Iterable[Pass],
    *,
    statistics: Statistics | None = None,
    observer: Observer | None = None,
    started: Callable[[str], None] | None = None,
    copy: bool = True,
) -> Outcome:
    """Apply `passes` to a copy of `model`, which shares its weights and not its graph.

    A calibrated pass gets `statistics` where they hold all that it wants; otherwise `observer`
    runs the model as it stands. Neighbours share one observation while nothing changes, and
    exact ones while what they want is still there.

    Args:
        model: left as it is, unless `copy` is False.
        passes: applied in this order.
        statistics: observed earlier, on a model with the same value names.
        observer: called when statistics are missing; without it the pass refuses, naming them.
        started: told the name of each pass before it runs.
        copy: rewrite the model itself if False, which is for one that nobody else holds.

    Raises:
        InputError: if a pass lacks statistics or refuses its options.
    """
    with rarely_collected():
        return _run(model.clone() if copy else model, passes, statistics, observer, started)


def _run(
    model: ir.Model,
    passes: Iterable[Pass],
    statistics: Statistics | None,
    observer: Observer | None,
    started: Callable[[str], None] | None,
) -> Outcome:
    records: list[Record] = []
    passes = tuple(passes)
    for index, pass_ in enumerate(passes):
        if started is not None:
            started(pass_.name)
        begin = time.perf_counter()
        if isinstance(pass_, CalibratedPass):
            if observer is not None:
                wants = pass_.wants(model)
                if wants and (statistics is None or statistics.missing(wants)):
                    soon = _wanted_soon(model, passes[index:])
                    statistics = observer(model, [*wants, *soon])
            pass_ = dataclasses.replace(pass_, statistics=statistics)
        result = pass_(model)
        assert isinstance(result, Result)
        seconds = time.perf_counter() - begin
        records.append(
            Record(
                pass_.name,
                options(pass_),
                result.modified,
                result.skips,
                result.figures,
                seconds,
            )
        )
        if result.modified and observer is not None and not _keeps_statistics(pass_):
            statistics = None
    return Outcome(model, tuple(records), statistics)


def _keeps_statistics(pass_: Pass) -> TypeGuard[CalibratedPass]:
    """Whether what was observed before the pass is right behind it: see `CalibratedPass`."""
    return isinstance(pass_, CalibratedPass) and pass_.exact


def _wanted_soon(model: ir.Model, passes: Sequence[Pass]) -> list[Want]:
    """What exact passes right behind the first, if that is exact, want of the model as it is."""
    wants: list[Want] = []
    for index, pass_ in enumerate(passes):
        if not _keeps_statistics(pass_):
            break
        wants += pass_.wants(model) if index else ()
    return wants


def options(pass_: Pass) -> dict[str, object]:
    """The options of a pass by name, as a recipe spells them."""
    fields = (f.name for f in dataclasses.fields(pass_) if f.name != "statistics")
    return {name: getattr(pass_, name) for name in fields}
