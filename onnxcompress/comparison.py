"""Compares two model files, whoever wrote them: the verb `validate`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx_ir as ir

from onnxcompress.api import SAMPLES, as_data
from onnxcompress.data import Data, Images
from onnxcompress.gates import Gate
from onnxcompress.measure import random_feed
from onnxcompress.model_io import load
from onnxcompress.pipeline import Record
from onnxcompress.report import ModelFile, Report, check
from onnxcompress.session import Feed
from onnxcompress.train.history import History
from onnxcompress.variants import Stage, set_beside, silent, versions

_RUNS: Final = 8
_MADE_UP: Final = "no data was given: models were compared on made-up inputs"


def to_compare_on(
    data: Data | None, model: ir.Model, samples: int
) -> tuple[Data | list[Feed], tuple[str, ...]]:
    """As many feeds of `data` as `samples` says, or made-up ones, and what is to be said of it."""
    if data is None:
        return [random_feed(model, seed=seed) for seed in range(_RUNS)], (_MADE_UP,)
    return data.first(samples), (*data.notes, *_left_out(data, samples))


def _left_out(data: Data, samples: int) -> tuple[str, ...]:
    """A note where there are more feeds than `samples`."""
    if data.size is None or data.size <= samples:
        return ()
    return (f"compared on the first {samples} of {data.size} feeds, as many as samples says",)


def names_classes(evaluation: Data | Sequence[Feed]) -> bool:
    """Whether there are labels and they are whole numbers, so that accuracy can be told."""
    labels = evaluation.labels if isinstance(evaluation, Data) else None
    return labels is not None and bool((labels == np.rint(labels)).all())


def beside_source(
    verb: str,
    source: Path,
    output: Path,
    models: tuple[ir.Model, ir.Model],
    *,
    called: str,
    training: History,
    records: tuple[Record, ...] = (),
    notes: tuple[str, ...] = (),
    **options: Any,
) -> Report:
    """The report of a verb that trained: what it wrote beside what it learned from.

    Args:
        source, output: the files, `models` what is in them.
        called: what the note calls the second where the two cannot be compared.
        notes: come before those of the comparison.
        options: those of `validate`.

    Raises:
        InputError: as `validate`.
    """
    if _interface(models[0]) == _interface(models[1]):
        report = validate(source, output, **options)
    else:
        report = Report(
            verb=verb,
            source=ModelFile.of(source),
            result=ModelFile.of(output),
            notes=(f"teacher and {called} differ in their interfaces: they were not compared",),
        )
    return dataclasses.replace(
        report,
        verb=verb,
        passes=records,
        training=training,
        notes=(*notes, *report.notes),
        versions=versions(),
    )


def _interface(model: ir.Model) -> list[list[str | None]]:
    """Names of what a model takes and gives."""
    return [[v.name for v in values] for values in (model.graph.inputs, model.graph.outputs)]


def validate(
    original: str | Path,
    candidate: str | Path,
    *,
    data: Any = None,
    gates: Sequence[Gate] = (),
    samples: int = SAMPLES,
    images: Images | None = None,
    threads: int = 1,
    stage: Stage | None = None,
) -> Report:
    """Compare two model files on the same inputs: quality, size and latency, and hold the gates.

    Args:
        data: anything that `open_data` opens; made-up inputs when None.
        samples: feeds to compare on at most.

    Raises:
        InputError: if a model or the data cannot be used or the interfaces differ.
    """
    model = load(original)
    opened = None if data is None else as_data(data, model, images)
    evaluation, notes = to_compare_on(opened, model, samples)
    report = set_beside(
        Path(original), Path(candidate), evaluation, threads=threads, stage=stage or silent
    )
    return dataclasses.replace(report, gates=check(gates, report), notes=notes, versions=versions())
