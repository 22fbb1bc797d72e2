"""What comes after training: the recipe or scheme that was asked for, held against the floats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx_ir as ir

from onnxcompress import model_io, targets
from onnxcompress.api import SAMPLES, Quantization, as_data, observer, quantize
from onnxcompress.contract import Array
from onnxcompress.data import interface
from onnxcompress.pipeline import Outcome, run
from onnxcompress.recipe import Recipe
from onnxcompress.report import ModelFile, Report, check
from onnxcompress.train.samples import LABELS, TARGET
from onnxcompress.train.settings import Tuning
from onnxcompress.train.tune import tune
from onnxcompress.variants import set_beside, silent, versions


@dataclass(frozen=True)
class Compressed:
    """What was made of a trained model, or the model itself where nothing was asked for."""

    model: ir.Model
    report: Report
    refusal: str = ""
    """Why it cannot stand for the trained model, if so."""


def compress_trained(
    model: ir.Model,
    recipe: Recipe | None,
    scheme: Quantization | None,
    inputs: Mapping[str, Array],
    held: Mapping[str, Array],
    *,
    tuning: Tuning | None = None,
    teacher: ir.Model | None = None,
) -> Compressed:
    """Quantize with compensation, or run a recipe, tune it, and compare with the trained model.

    Args:
        inputs: samples to calibrate on, by input name.
        held: samples to compare on, with `labels` or `target` where there are any.
        tuning: how to tune what was quantized, by what the teacher or the trained model says.

    Raises:
        InputError: if passes, model and samples do not suit each other.
    """
    names = {port.name for port in interface(model)}
    own = {name: array for name, array in inputs.items() if name in names}
    if recipe is not None:
        outcome = run(model, recipe.passes, observer=observer(as_data(own, model)))
    elif scheme is not None:
        outcome = quantize(model, own, scheme=scheme, effort="thorough")
    else:
        outcome = None
    notes = tuple[str, ...]()
    if outcome is not None and tuning is not None:
        tuned = tune(outcome.model, inputs, teacher=teacher or model,
                     **tuning.arguments(outcome.model))  # fmt: skip
        outcome, notes = replace(outcome, model=tuned.model), tuned.notes
    report = _report(model, outcome, recipe, _compared(held, names))
    report = replace(report, notes=(*report.notes, *(f"tuned: {note}" for note in notes)))
    reasons = [gate.reason for gate in report.gates if not gate.passed]
    if report.validation:
        reasons = [*report.validation.failures, *reasons]
    return Compressed(outcome.model if outcome else model, report, reasons[0] if reasons else "")


def _compared(held: Mapping[str, Array], names: set[str]) -> dict[str, Array]:
    """What to compare on: inputs, and answers where every sample has one."""
    found = {name: array for name, array in held.items() if name in names}
    answers = held.get(LABELS, held.get(TARGET))
    if LABELS in names or answers is None or (LABELS in held and answers.min() < 0):
        return found
    return {**found, LABELS: answers}


def _report(
    trained: ir.Model, outcome: Outcome | None, recipe: Recipe | None, data: Mapping[str, Array]
) -> Report:
    with TemporaryDirectory() as folder:
        before, after = Path(folder) / "trained.onnx", Path(folder) / "compressed.onnx"
        model_io.save(trained, before)
        if outcome is None:
            return Report(verb="train", source=ModelFile.of(before), versions=versions())
        model_io.save(outcome.model, after)
        feeds = as_data(data, trained).first(SAMPLES)
        target = targets.load(recipe.target if recipe else "cpu")
        report = set_beside(
            before, after, feeds, threads=1, stage=silent, target=target, timed=False
        )
    return replace(
        report,
        verb="train",
        target=target.name,
        passes=outcome.records,
        gates=check(recipe.gates, report) if recipe else (),
        versions=versions(),
    )
