"""Students made of their teacher: fewer layers, fewer channels, its weights or fresh ones.

drop:2              without the 2 blocks that change the outputs least
narrow:0.5          half of the channels between layers
drop:1+narrow:0.5   both, in this order
narrow:0.5+fresh    with weights drawn anew
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final

import onnx_ir as ir

from onnxcompress.contract import Skip
from onnxcompress.data import Images, interface, open_data
from onnxcompress.errors import InputError, did_you_mean
from onnxcompress.passes.forget_shapes import ForgetShapes
from onnxcompress.passes.infer_shapes import InferShapes
from onnxcompress.pipeline import run
from onnxcompress.train.drop_layers import drop_layers
from onnxcompress.train.exact import to_train
from onnxcompress.train.fresh import set_fresh
from onnxcompress.train.narrow import narrow

_STEPS: Final = ("drop", "narrow", "fresh")
_BATCH: Final = 32
_FEEDS: Final = 4


@dataclass(frozen=True)
class Student:
    """A model made of another, and how."""

    model: ir.Model
    notes: tuple[str, ...]
    """What was done, a sentence each."""
    skips: tuple[Skip, ...] = ()
    """Layers that stayed as wide as they were, and why."""


def is_spec(text: str) -> bool:
    """Whether a text describes a student, not a file."""
    return re.fullmatch(r"(\w+(:[\w.]+)?)(\+\w+(:[\w.]+)?)*", text) is not None and (
        text.partition(":")[0].partition("+")[0] in _STEPS
    )


def derive(
    teacher: ir.Model,
    spec: str,
    data: Any = None,
    *,
    seed: int = 0,
    images: Images | None = None,
) -> Student:
    """A student of `teacher`, with its weights where they are not drawn anew.

    The exact rewrites come first, so that batchnorm is in the weights that are compared; a fresh
    student keeps it, to be trained with the statistics of batches.

    Args:
        teacher: not altered.
        spec: steps joined by `+`: `drop:COUNT`, `narrow:SHARE` (of channels to keep), `fresh`.
        data: some of it is run to choose the layers to drop; needed for that alone.
        seed: of fresh weights.

    Raises:
        InputError: if the spec cannot be read, or asks for what the teacher cannot do without.
    """
    steps = _read(spec)
    fresh = any(step == "fresh" for step, _ in steps)
    model = run(to_train(teacher, by_batch=fresh), (InferShapes(),), copy=False).model
    notes, skips = list[str](), tuple[Skip, ...]()
    for step, argument in steps:
        if step == "drop":
            dropped = drop_layers(model, int(argument), _feeds(teacher, data, images))
            model = run(dropped.model, (InferShapes(),), copy=False).model
            notes.append(f"without {', '.join(dropped.blocks)}, which changes the outputs by "
                         f"{dropped.changes[-1]:.1%} of their power")  # fmt: skip
        elif step == "narrow":
            result = narrow(model, argument)
            skips += result.skips
            channels = result.figures["channels"]
            assert isinstance(channels, dict)
            notes.append(f"{len(channels)} layers narrowed to {argument:g} of their channels")
        else:
            notes.append(f"{set_fresh(model, seed)} weights drawn anew from seed {seed}")
    model = run(model, (ForgetShapes(),), copy=False).model
    return Student(model, tuple(notes), skips)


def _read(spec: str) -> list[tuple[str, float]]:
    """The steps of a spec with their numbers.

    Raises:
        InputError: naming the first that cannot be read.
    """
    found: list[tuple[str, float]] = []
    for part in spec.split("+"):
        step, colon, text = part.strip().partition(":")
        if step not in _STEPS:
            raise InputError(f"student {spec!r}: no step {step!r}{did_you_mean(step, _STEPS)}")
        if (step == "fresh") is bool(colon):
            wanted = "no number" if step == "fresh" else "a number, as in 'narrow:0.5' or 'drop:2'"
            raise InputError(f"student {spec!r}: {step} takes {wanted}")
        found.append((step, _number(spec, step, text)))
    return found


def _number(spec: str, step: str, text: str) -> float:
    if step == "fresh":
        return 0.0
    try:
        value = float(int(text)) if step == "drop" else float(text)
    except ValueError as error:
        kind = "a whole number" if step == "drop" else "a number"
        raise InputError(f"student {spec!r}: {text!r} is not {kind}") from error
    if step == "drop" and value < 1:
        raise InputError(f"student {spec!r}: drop takes 1 or more")
    return value


def _feeds(teacher: ir.Model, data: Any, images: Images | None) -> list[Any]:
    if data is None:
        raise InputError("choosing layers to drop needs data to run: give some")
    return list(islice(open_data(data, interface(teacher), images=images).batches(_BATCH), _FEEDS))
