"""Trains a quantized model by what its floats say: the verb `tune`."""

from __future__ import annotations

from concurrent.futures import Executor
from functools import cache as cache_of
from pathlib import Path
from typing import Any

from onnxcompress.api import SAMPLES, ModelLike, as_data, as_model
from onnxcompress.comparison import beside_source
from onnxcompress.data import Images
from onnxcompress.model_io import check_writable, load, save
from onnxcompress.report import Report
from onnxcompress.train import tune as tuned
from onnxcompress.train.settings import Tuning
from onnxcompress.train.tune import Tuned
from onnxcompress.variants import Stage, silent


def tune(
    quantized: ModelLike,
    data: Any,
    *,
    teacher: ModelLike | None = None,
    unlabelled: Any = None,
    evaluate: Any = None,
    tuning: Tuning | None = None,
    cache: str | Path | None = None,
    executor: Executor | None = None,
    images: Images | None = None,
    threads: int = 0,
    stage: Stage | None = None,
) -> Tuned:
    """Train the codes of a quantized model; no labels are needed where there is a teacher.

    Args:
        quantized: static or weights alone.
        data: arrays by input name with the samples on the first axis, perhaps with `labels`, in a
            mapping or an `.npz`, or what else `open_data` opens.
        teacher: the float model, or a better one.
        evaluate: data to choose epochs by; the last fifth of `data` when None.
        tuning: how to train.
        cache, executor: of the teacher's answers; see `train.teacher.teacher_outputs`.
        stage: told of each stage; called with what is done of it.

    Raises:
        InputError: if models and data do not suit each other, or nothing can be trained.
    """
    begin = cache_of(stage or silent)  # a stage begins when there is something to tell of it
    model = as_model(quantized)
    return tuned.tune(
        model,
        data,
        teacher=None if teacher is None else as_model(teacher),
        unlabelled=unlabelled,
        evaluate=evaluate,
        cache=cache,
        executor=executor,
        images=images,
        threads=threads,
        asking=lambda done, total: begin("asking the teacher")(done, total),
        progress=lambda done, total, _: begin("tuning")(done, total),
        **(tuning or Tuning()).arguments(model),
    )


def tune_files(
    quantized: Path,
    output: Path,
    data: str,
    *,
    teacher: Path | None = None,
    evaluate: str | None = None,
    images: Images | None = None,
    samples: int = SAMPLES,
    threads: int = 1,
    stage: Stage | None = None,
    **options: Any,
) -> Report:
    """`tune` from files to a file, and the result beside its teacher (or beside what came in).

    Args:
        evaluate: data to compare on, which is not trained on and chooses no epoch; when None, the
            last fifth of `data`, which does choose.
        options: those of `tune`.

    Raises:
        InputError: as `tune`, or if the output cannot be written.
    """
    check_writable(output)
    model = load(quantized)
    learned: Any = data
    held: Any = evaluate
    notes = tuple[str, ...]()
    if evaluate is None:
        learned, held = as_data(data, model, images).split()
        notes = (f"the last {len(held)} of {len(learned) + len(held)} feeds were held out, to "
                 "choose the best epoch by and to compare on",)  # fmt: skip
    made = tune(
        model,
        learned,
        teacher=teacher,
        evaluate=held if evaluate is None else None,
        images=images,
        stage=stage,
        **options,
    )
    save(made.model, output)
    return beside_source(
        *("tune", teacher or quantized, output),
        (model if teacher is None else load(teacher), made.model),
        called="model",
        training=made.history,
        notes=(*made.notes, *notes),
        data=held,
        samples=samples,
        images=images,
        threads=threads,
    )
