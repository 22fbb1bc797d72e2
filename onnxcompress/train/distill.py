"""Distillation: a student learns what a teacher says of data, which may have no labels at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from onnxcompress.contract import Array
from onnxcompress.data import Images
from onnxcompress.observe import Progress as Asking
from onnxcompress.train.augment import Augmentation
from onnxcompress.train.batch_statistics import by_batch
from onnxcompress.train.exact import to_train, when_trained
from onnxcompress.train.history import History
from onnxcompress.train.lesson import prepare
from onnxcompress.train.loop import Progress, train
from onnxcompress.train.losses import Loss
from onnxcompress.train.optimizers import Optimizer
from onnxcompress.train.schedules import Schedule, warm_up
from onnxcompress.train.teacher import Precision


@dataclass(frozen=True)
class Distilled:
    """A student that was taught, and how it went."""

    model: ir.Model
    history: History
    losses: tuple[Loss, ...]
    samples: int
    labelled: int
    """How many of the samples have labels that were learned from."""
    held: Mapping[str, Any] | None
    """Data that epochs were chosen by, with the teacher's answers."""


def distill(
    teacher: ir.Model,
    student: ir.Model,
    data: Any,
    *,
    unlabelled: Any = None,
    losses: Sequence[Loss] | None = None,
    temperature: float = 2.0,
    label_weight: float = 1.0,
    features: Mapping[str, str] | Sequence[str] = (),
    optimizer: Optimizer | None = None,
    schedule: Schedule | None = None,
    epochs: int,
    batch_size: int = 64,
    seed: int = 0,
    evaluate: Any = None,
    monitor: str | None = None,
    patience: int | None = None,
    checkpoint: Path | None = None,
    augment: Sequence[Augmentation] = (),
    trainable: Sequence[str] = ("*",),
    masks: Mapping[str, Array] | None = None,
    clip_norm: float | None = None,
    batch_statistics: bool | None = None,
    rewrite: bool = True,
    threads: int = 0,
    cache: str | Path | None = None,
    precision: Precision = "float16",
    executor: Executor | None = None,
    images: Images | None = None,
    asking: Asking | None = None,
    progress: Progress | None = None,
) -> Distilled:
    """Train a student on what a teacher says of data.

    By default each output of the student is held against the teacher's of that name (or the only
    one against the only one): scores of classes by `KullbackLeibler` with a temperature, before
    the Softmax if the models end in one, other figures by `MeanSquared` (before a Sigmoid); the
    first scores also against `labels`, or the first output against `target`, where there are any,
    and inner values against `features`.
    The exact rewrites are applied to the student first, so that batchnorm is part of its weights;
    afterwards, if it is trained with the statistics of batches (`batch_statistics`, as `train` has
    it; fresh ones by themselves).

    Args:
        teacher, student: not altered. All of the teacher's inputs must be in the data.
        data: what `train` takes, with or without `labels`.
        unlabelled: more data, whose labels, if it has any, are not looked at.
        losses: in place of the default ones; what they call `teacher.NAME` is the value NAME of
            the teacher's main graph.
        temperature: of the default `KullbackLeibler`.
        label_weight: of what holds it against labels or targets; 0 learns from the teacher alone.
        features: inner values of the student by those of the teacher that they should be like, or
            names that both have; of equal shapes.
        schedule: a short warm-up and half a cosine by default.
        evaluate: data like `data` to choose the best epoch by; all else as for `train`.
        monitor: `accuracy` where `evaluate` has labels, else `loss`.
        rewrite: False leaves the exact rewrites out, for a student that is to stay as it is made.
        augment: changes batches at random; the teacher is then asked about the changed inputs
            (`Taught`), unless it takes a fixed number of samples, which only the data comes in.
        cache, precision, executor, asking: of the teacher's run; see `teacher_outputs`.

    Raises:
        InputError: if models and data do not suit each other, or as `train` does.

    Sources: Hinton, Vinyals, Dean, Distilling the knowledge in a neural network (2015); Ba and
    Caruana, Do deep nets really need to be deep? (2014), for scores that are no classes; Romero et
    al., FitNets (2015), for inner values.
    """
    model = student
    if rewrite:
        model = to_train(student, by_batch=by_batch(student, batch_statistics))
    lesson = prepare(
        teacher,
        model,
        data,
        unlabelled=unlabelled,
        losses=losses,
        temperature=temperature,
        label_weight=label_weight,
        features=features,
        evaluate=evaluate,
        monitor=monitor,
        augment=augment,
        cache=cache,
        precision=precision,
        executor=executor,
        images=images,
        asking=asking,
    )
    trained = train(
        model,
        lesson.pool,
        losses=lesson.losses,
        optimizer=optimizer,
        schedule=schedule or warm_up(),
        epochs=epochs,
        batch_size=batch_size,
        seed=seed,
        evaluate=lesson.held,
        monitor=lesson.monitor,
        patience=patience,
        checkpoint=checkpoint,
        augment=lesson.augment,
        trainable=trainable,
        masks=masks,
        clip_norm=clip_norm,
        batch_statistics=batch_statistics,
        threads=threads,
        progress=progress,
    )
    return Distilled(
        when_trained(trained.model) if rewrite else trained.model,
        trained.history,
        lesson.losses,
        lesson.samples,
        lesson.labelled,
        lesson.held,
    )
