"""What a student is to learn: data, with what a teacher says of it, and losses that hold it so.

The teacher is asked once about all samples; what it gives stands beside them as arrays named
`teacher.` and its value, which the losses read as they read labels. Labelled and unlabelled
samples are trained on together: those without a label have -1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import onnx_ir as ir

from onnxcompress.data import Images, interface, open_data
from onnxcompress.errors import InputError
from onnxcompress.graph.inference import infer
from onnxcompress.graph.linear import is_op
from onnxcompress.graph.scopes import values_of
from onnxcompress.observe import Progress as Asking
from onnxcompress.operators import int_attribute
from onnxcompress.pipeline import run
from onnxcompress.session import Session
from onnxcompress.train.augment import Augmentation
from onnxcompress.train.losses import (
    CrossEntropy,
    FeatureMatch,
    KullbackLeibler,
    Loss,
    MeanSquared,
    learns_classes,
)
from onnxcompress.train.objective import objective
from onnxcompress.train.samples import LABELS, TARGET, fixed_batch, from_npz, open_samples
from onnxcompress.train.teacher import Precision, Taught, teacher_outputs

TEACHER: Final = "teacher."
"""What names of arrays that hold a teacher's values begin with."""
_NONE: Final = -1


@dataclass(frozen=True)
class Lesson:
    """What a student is to learn: samples with a teacher's answers beside them, and losses."""

    losses: tuple[Loss, ...]
    pool: Mapping[str, Any]
    held: Mapping[str, Any] | None
    """Of the data to evaluate on."""
    monitor: str
    augment: tuple[Augmentation, ...]

    @property
    def samples(self) -> int:
        return np.shape(self.pool[LABELS])[0]

    @property
    def labelled(self) -> int:
        """How many of the samples have labels that are learned from."""
        return _known(self.pool) if learns_classes(self.losses) else 0


def prepare(
    teacher: ir.Model,
    model: ir.Model,
    data: Any,
    *,
    unlabelled: Any = None,
    losses: Sequence[Loss] | None = None,
    temperature: float = 2.0,
    label_weight: float = 1.0,
    features: Mapping[str, str] | Sequence[str] = (),
    evaluate: Any = None,
    monitor: str | None = None,
    augment: Sequence[Augmentation] = (),
    cache: str | Path | None = None,
    precision: Precision = "float16",
    executor: Executor | None = None,
    images: Images | None = None,
    asking: Asking | None = None,
) -> Lesson:
    """Ask the teacher about the data, for a student `model`; as `distill`, which trains then."""
    told = run(teacher, ()).model
    infer(told)
    pool = _pooled(data, unlabelled, told, model, images)
    chosen = tuple(losses) if losses is not None else _losses(
        told, model, pool, temperature, label_weight, features
    )  # fmt: skip
    read = objective(model, chosen, ()).targets
    targets = {name: name.removeprefix(TEACHER) for name in read if name.startswith(TEACHER)}
    options: dict[str, Any] = {"cache": cache, "precision": precision, "executor": executor}
    held = None
    if evaluate is not None:
        held = _beside(_pooled(evaluate, None, told, model, images), told, targets, options, None)
        monitor = monitor or ("accuracy" if _known(held) and learns_classes(chosen) else "loss")
    pool = _beside(pool, told, targets, options, asking)
    _check(pool, targets, read)
    return Lesson(chosen, pool, held, monitor or "loss", _taught(augment, told, targets))


def _pooled(
    data: Any, unlabelled: Any, teacher: ir.Model, student: ir.Model, images: Images | None
) -> dict[str, Any]:
    """All samples as arrays by name: those of `data`, then the unlabelled ones."""
    first = _columns(data, teacher, student, images)
    if unlabelled is None:
        return first
    more = _columns(unlabelled, teacher, student, images)
    names = [port.name for model in (teacher, student) for port in interface(model)]
    pool = {
        name: np.concatenate([first[name], more[name]]) if np.ndim(first[name]) else first[name]
        for name in dict.fromkeys(names)
    }
    if TARGET in first or np.asarray(first.get(LABELS, 0)).dtype.kind == "f":
        raise InputError("labels that are no classes go with samples that all have them: "
                         "leave unlabelled out, or the labels")  # fmt: skip
    if LABELS in first:
        labels = np.asarray(first[LABELS])
        count = open_samples(more, interface(teacher), ()).size
        rest = np.full((count, *labels.shape[1:]), _NONE, labels.dtype)
        pool[LABELS] = np.concatenate([labels, rest])
    return pool


def _columns(
    source: Any, teacher: ir.Model, student: ir.Model, images: Images | None
) -> dict[str, Any]:
    """The arrays of a source, those of a file where they lie.

    Raises:
        InputError: if an input of either model is not among them.
    """
    if isinstance(source, Mapping):
        found = dict(cast("Mapping[str, Any]", source))
    elif (stored := from_npz(source)) is not None:
        found = dict[str, Any](stored)
    else:
        opened = open_data(source, interface(teacher), images=images)
        extras = [] if opened.labels is None else [LABELS]
        samples = open_samples(opened, interface(teacher), extras)
        found = next(samples.stretches(samples.size))
    for title, model in (("teacher", teacher), ("student", student)):
        for port in interface(model):
            if port.name not in found:
                raise InputError(
                    f"the {title} takes {port.name!r}, which the data has not: teacher and student "
                    "must take the same inputs, or the data have those of both"
                )
    if LABELS in found and np.asarray(found[LABELS]).dtype.kind in "iub":
        found[LABELS] = np.asarray(found[LABELS]).astype(np.int64)
    return found


def _losses(
    teacher: ir.Model,
    student: ir.Model,
    pool: Mapping[str, Any],
    temperature: float,
    label_weight: float,
    features: Mapping[str, str] | Sequence[str],
) -> tuple[Loss, ...]:
    """What a student is held against where nothing else is said."""
    infer(student)
    found = list[Loss]()
    classes: str | None = None
    values = list[str]()
    for ours, theirs in _pairs(teacher, student):
        (output, scores), (wanted, _) = before_softmax(ours), before_softmax(theirs)
        _compare(output, wanted)
        name, target = output.name or "", f"{TEACHER}{wanted.name}"
        if scores and TARGET not in pool:
            found.append(KullbackLeibler(name, target, temperature))
            classes = classes or name
        else:
            found.append(MeanSquared(name, target))
        values.append(ours.name or "")
    labels = pool.get(LABELS)
    if labels is not None and label_weight and classes and np.asarray(labels).dtype.kind != "f":
        found.append(CrossEntropy(classes, weight=label_weight))
    elif TARGET in pool and label_weight:
        found.append(MeanSquared(values[0], TARGET, weight=label_weight))
    pairs = features.items() if isinstance(features, Mapping) else [(n, n) for n in features]
    if pairs:
        found.append(FeatureMatch(tuple((ours, f"{TEACHER}{theirs}") for ours, theirs in pairs)))
    return tuple(found)


def _pairs(teacher: ir.Model, student: ir.Model) -> list[tuple[ir.Value, ir.Value]]:
    """The student's outputs and those of the teacher that they should be like.

    Raises:
        InputError: if there are none.
    """
    ours, theirs = (
        {v.name: v for v in model.graph.outputs if v.dtype is None or v.dtype.is_floating_point()}
        for model in (student, teacher)
    )
    if len(ours) == len(theirs) == 1:
        return list(zip(ours.values(), theirs.values(), strict=True))
    common = [(ours[name], theirs[name]) for name in ours if name in theirs]
    if not common:
        shown = " and ".join(
            f"the {title} gives {', '.join(repr(name) for name in outputs) or 'no floats'}"
            for title, outputs in (("teacher", theirs), ("student", ours))
        )
        raise InputError(f"no output of the student has the name of one of the teacher's: {shown}; "
                         "rename one, or give losses")  # fmt: skip
    return common


def before_softmax(value: ir.Value) -> tuple[ir.Value, bool]:
    """The scores behind an output, and whether they are of classes that exclude each other."""
    dims = None if value.shape is None else list(value.shape)
    scores = dims is not None and len(dims) > 1 and dims[-1] != 1
    inner = value
    while (node := inner.producer()) is not None and (source := node.inputs[0]) is not None:
        if is_op(node, "Softmax", "LogSoftmax"):
            last = len(dims) - 1 if dims else -1
            return (
                (source, True) if int_attribute(node, "axis", -1) in (-1, last) else (value, False)
            )
        if is_op(node, "Sigmoid"):
            return source, False
        if not is_op(node, "Identity", "QuantizeLinear", "DequantizeLinear"):
            break
        if inner is value and is_op(node, "Identity"):
            value = source
        inner = source
    return value, scores


def _compare(ours: ir.Value, theirs: ir.Value) -> None:
    """See that two values can be of one shape, as far as is known.

    Raises:
        InputError: if they cannot.
    """
    if ours.shape is None or theirs.shape is None:
        return
    pairs = zip(ours.shape, theirs.shape, strict=False)
    fits = all(a == b for a, b in list(pairs)[1:] if isinstance(a, int) and isinstance(b, int))
    if len(ours.shape) != len(theirs.shape) or not fits:
        raise InputError(
            f"the student's {ours.name!r} is {ours.shape} but the teacher's {theirs.name!r} is "
            f"{theirs.shape}: they must be of one shape, replace a head or give losses"
        )


def _beside(
    pool: dict[str, Any],
    teacher: ir.Model,
    targets: Mapping[str, str],
    options: Mapping[str, Any],
    asking: Asking | None,
) -> dict[str, Any]:
    """The samples with what the teacher says of them."""
    if LABELS not in pool:
        size = open_samples(pool, interface(teacher), ()).size
        pool = {**pool, LABELS: np.full(size, _NONE, np.int64)}
    if not targets:
        return pool
    values = list(dict.fromkeys(targets.values()))
    known = {v.name for v in values_of(teacher.graph)}
    for name in values:
        if name not in known:
            raise InputError(f"a loss reads {name!r} of the teacher, which has no such value")
    said = teacher_outputs(teacher, pool, values, progress=asking, **options)
    return {**pool, **{target: said[value] for target, value in targets.items()}}


def _check(
    pool: Mapping[str, Any], targets: Mapping[str, str], wanted: Mapping[str, ir.Value]
) -> None:
    """See that what the teacher gave has the shapes that the losses expect.

    Raises:
        InputError: if not.
    """
    for target, value in targets.items():
        shape, given = list(wanted[target].shape or ()), pool[target].shape
        fixed = [(a, b) for a, b in zip(shape[1:], given[1:], strict=False) if isinstance(a, int)]
        if len(shape) != len(given) or any(a != b for a, b in fixed):
            raise InputError(
                f"the teacher's {value!r} has {list(given[1:])} a sample, but what the student "
                f"should make like it has {shape[1:]}: name values of equal shapes"
            )


def _taught(
    augment: Sequence[Augmentation], teacher: ir.Model, targets: Mapping[str, str]
) -> tuple[Augmentation, ...]:
    if not augment or not targets or fixed_batch(interface(teacher)) is not None:
        return tuple(augment)
    values = list(dict.fromkeys(targets.values()))
    return (*augment, Taught(Session(teacher, outputs=values), targets))


def _known(pool: Mapping[str, Any]) -> int:
    """How many samples have labels."""
    labels = np.asarray(pool[LABELS])
    return int((labels >= 0).any(axis=tuple(range(1, labels.ndim))).sum())
