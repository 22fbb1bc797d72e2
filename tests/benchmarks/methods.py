"""Static quantization with its methods switched on and off, and how far each stays from float."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path

import onnx_ir as ir

from onnxcompress import schemes
from onnxcompress.api import as_data, observer
from onnxcompress.contract import Pass, Statistics
from onnxcompress.model_io import load
from onnxcompress.passes.insert_qdq import InsertQdq
from onnxcompress.pipeline import Outcome, run
from onnxcompress.validation import compare
from onnxcompress.variants import record
from tests.benchmarks.cases import Case
from tests.benchmarks.samples import Feed

Passes = tuple[Pass, ...]
_FEEDS = 64
"""Feeds to compare on at most."""

DEFAULT: Passes = schemes.static(effort="thorough")
"""What `compress` runs by default."""
COMPENSATION = tuple(
    pass_.name
    for pass_ in DEFAULT
    if pass_.name not in {other.name for other in schemes.static(effort="fast")}
)
"""Names of the passes that stand against the error, in order."""


def without(names: Collection[str], passes: Passes = DEFAULT) -> Passes:
    """The passes but those with these names."""
    return tuple(pass_ for pass_ in passes if pass_.name not in names)


def placing(options: Mapping[str, object], passes: Passes = DEFAULT) -> Passes:
    """The passes with these options of the one that places pairs."""
    return tuple(
        replace(pass_, **options) if isinstance(pass_, InsertQdq) else pass_ for pass_ in passes
    )


class Pipelines:
    """Runs lists of passes over a case's model; what comes before pairs is observed only once."""

    def __init__(self, case: Case) -> None:
        self._model = load(case.model)
        self.watch = observer(as_data(case.calibration, self._model))
        self._observed: dict[Passes, tuple[ir.Model, Statistics]] = {}

    def run(self, passes: Passes) -> Outcome:
        """What these passes, InsertQdq among them, make of the model.

        Raises:
            InputError: if a pass refuses the model.
        """
        at = next(i for i, pass_ in enumerate(passes) if isinstance(pass_, InsertQdq))
        before = passes[:at]
        if before not in self._observed:
            model = run(self._model, before, observer=self.watch).model
            self._observed[before] = model, self.watch(model, InsertQdq().wants(model))
        model, statistics = self._observed[before]
        return run(model, passes[at:], statistics=statistics, observer=self.watch)


class Fidelity:
    """How far models stay from a float model on some of the feeds."""

    def __init__(self, original: Path, feeds: Iterable[Feed]) -> None:
        self._float = original
        self._feeds = list(islice(feeds, _FEEDS))
        self._expected = record(original, self._feeds)

    def sqnr(self, model: ir.Model) -> float:
        """Of the worst output, in dB."""
        found = compare(
            self._float, model, self._feeds, layers=False, expected=self._expected
        ).outputs
        return min((o.sqnr for o in found if o.sqnr is not None), default=float("nan"))
