"""Teaches a student what a teacher knows, and quantizes it: the verb `distill`."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import cache as cache_of
from pathlib import Path
from typing import Any, cast

import onnx_ir as ir

from onnxcompress import api
from onnxcompress.api import SAMPLES, ModelLike, Quantization, as_data, as_model
from onnxcompress.comparison import beside_source
from onnxcompress.data import Images, interface
from onnxcompress.errors import InputError
from onnxcompress.model_io import check_writable, load, save
from onnxcompress.pipeline import Record, run
from onnxcompress.recipe import Recipe
from onnxcompress.report import Report
from onnxcompress.train import distill as taught
from onnxcompress.train.distill import Distilled
from onnxcompress.train.settings import Training
from onnxcompress.train.students import derive, is_spec
from onnxcompress.train.tune import tune
from onnxcompress.variants import Stage, silent


@dataclass(frozen=True)
class Distillation:
    """A student that was taught, and what was made of it."""

    model: ir.Model
    """Quantized where that was asked for."""
    student: Distilled
    """In float, and how training went."""
    records: tuple[Record, ...]
    """The passes after training."""
    notes: tuple[str, ...]


def distill(
    teacher: ModelLike,
    student: ModelLike,
    data: Any,
    *,
    unlabelled: Any = None,
    training: Training | None = None,
    quantize: Quantization | None = None,
    recipe: Recipe | None = None,
    target: str = "cpu",
    samples: int = SAMPLES,
    cache: str | Path | None = None,
    executor: Executor | None = None,
    images: Images | None = None,
    stage: Stage | None = None,
) -> Distillation:
    """Train a student on what a teacher says of data, then quantize it.

    Labels are not needed: inputs alone teach it to answer as the teacher does.

    Args:
        student: a model, or how to make it of the teacher: `drop:2`, `narrow:0.5`, `fresh`, or
            several joined by `+`; see `train.students.derive`.
        data: arrays by input name with the samples on the first axis, perhaps with `labels`, in a
            mapping or an `.npz`, or what else `open_data` opens.
        unlabelled: more inputs, whose labels, if there are any, are not looked at.
        training: how to train; the recipe's table, or the defaults, when None.
        quantize: a scheme to quantize the student by, with compensation (thorough) and calibrated
            on the same inputs; float stays float when None.
        recipe: passes to run on the student instead; with a table `[tune]`, what they made of it
            is tuned by the teacher.
        samples: feeds that calibration reads at most.
        cache, executor: of the teacher's answers; see `train.teacher.teacher_outputs`.
        stage: told of each stage; called with what is done of it.

    Raises:
        InputError: if models and data do not suit each other, or training fails.
    """
    if recipe is not None and recipe.passes and quantize is not None:
        raise InputError("a recipe's passes and quantize exclude each other: leave one out")
    begin = cache_of(stage or silent)  # a stage begins when there is something to tell of it
    training = training or (recipe.training if recipe else None) or Training()
    master, notes = as_model(teacher), tuple[str, ...]()
    if isinstance(student, str) and is_spec(student) and not Path(student).exists():
        made = derive(master, student, data, seed=training.seed, images=images)
        pupil, notes = made.model, tuple(f"student: {note}" for note in made.notes)
    else:
        pupil = as_model(student)
    found = taught.distill(
        master,
        pupil,
        data,
        unlabelled=unlabelled,
        cache=cache,
        executor=executor,
        images=images,
        asking=lambda done, total: begin("asking the teacher")(done, total),
        progress=lambda done, total, _: begin("training")(done, total),
        **training.arguments(pupil),
    )
    calibration = _inputs(data if unlabelled is None else unlabelled, found.model)
    if quantize is not None:
        outcome = api.quantize(found.model, calibration, scheme=quantize, effort="thorough",
                               target=target, samples=samples, images=images,
                               progress=begin("quantizing"))  # fmt: skip
    else:
        passes = recipe.passes if recipe else ()
        watch = api.observer(as_data(calibration, found.model, images), samples) if passes else None
        outcome = run(found.model, passes, observer=watch)
    told = f"{found.samples} samples, {found.labelled} of them with labels"
    model, notes = outcome.model, (*notes, f"trained on {told}")
    if recipe is not None and recipe.tuning is not None:
        tuned = tune(
            model,
            data,
            teacher=master,
            unlabelled=unlabelled,
            cache=cache,
            executor=executor,
            images=images,
            asking=lambda done, total: begin("asking the teacher again")(done, total),
            progress=lambda done, total, _: begin("tuning")(done, total),
            **recipe.tuning.arguments(model),
        )
        model, notes = tuned.model, (*notes, *(f"tuned: {note}" for note in tuned.notes))
    return Distillation(model, found, outcome.records, notes)


def distill_files(
    teacher: Path,
    student: str,
    output: Path,
    data: str,
    *,
    evaluate: str | None = None,
    images: Images | None = None,
    samples: int = SAMPLES,
    threads: int = 1,
    stage: Stage | None = None,
    **options: Any,
) -> Report:
    """`distill` from files to a file, and the student beside its teacher on held-out data.

    Args:
        evaluate: data to compare on; the last fifth of `data` is not trained on when None.
        options: those of `distill`.

    Raises:
        InputError: as `distill`, or if the output cannot be written.
    """
    check_writable(output)
    master = load(teacher)
    learned: Any = data
    held: Any = evaluate
    notes = tuple[str, ...]()
    if evaluate is None:
        learned, held = as_data(data, master, images).split()
        notes = (f"the last {len(held)} of {len(learned) + len(held)} feeds were held out",)
    made = distill(master, student, learned, images=images, samples=samples, stage=stage, **options)
    save(made.model, output)
    return beside_source(
        *("distill", teacher, output, (master, made.model)),
        called="student",
        training=made.student.history,
        records=made.records,
        notes=(*made.notes, *notes),
        data=held,
        samples=samples,
        images=images,
        threads=threads,
    )


def _inputs(data: Any, model: ir.Model) -> Any:
    """Data without what the model does not take."""
    if not isinstance(data, Mapping):
        return data
    arrays = cast("Mapping[str, Any]", data)
    return {port.name: arrays[port.name] for port in interface(model)}
