"""Augmentation: steps that change a batch at random before it is trained on.

A step is called with a batch (arrays by name, samples on the first axis) and a generator of random
numbers, and gives back a batch: `step(batch, rng) -> dict`. Any such callable is one. Those here
leave the arrays that they are given as they are, keep dtypes, and give the same batch for the same
generator.

Each works on the arrays that its `inputs` name; where none are named, on all of floating point
that have axes but `labels`. `bound` narrows that to a model's inputs, which keeps teacher outputs
out, and widens it to those of other types for steps that change any. Axes are counted with the
samples' (1 is the first behind it); where none are named they are those behind samples and channels
(N, C, H, W), and time in a sequence (N, T, features).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from onnxcompress.contract import Array
from onnxcompress.train.augment.alone import Crop, Flip, Noise, RandomErase, Shift
from onnxcompress.train.augment.mixing import CutMix, Mixing, Mixup, one_hot
from onnxcompress.train.augment.step import Augmentation, Batch, Step
from onnxcompress.train.augment.swapping import Swap
from onnxcompress.train.augment.table import read_steps, write_steps

__all__ = [
    "Augmentation",
    "Batch",
    "Compose",
    "Crop",
    "CutMix",
    "Flip",
    "Mixup",
    "Noise",
    "RandomErase",
    "Shift",
    "Swap",
    "bound",
    "one_hot",
    "read_steps",
    "softens",
    "write_steps",
]


@dataclass(frozen=True)
class Compose:
    """Several steps, one after the other."""

    steps: tuple[Augmentation, ...]

    def __call__(self, batch: Mapping[str, Array], rng: np.random.Generator) -> Batch:
        found = dict(batch)
        for step in self.steps:
            found = step(found, rng)
        return found


def bound(
    steps: Iterable[Augmentation],
    inputs: Iterable[str],
    classes: int | None = None,
    others: Iterable[str] = (),
) -> Compose:
    """The steps, in order, with what a model says of itself filled in where they leave it open.

    Args:
        inputs: the model's inputs of floating point, which steps that name no inputs change.
        classes: how many classes labels name, for those that mix them.
        others: its inputs of other types, for steps that change any.
    """
    names = tuple(inputs)
    every = (*names, *others)

    def filled(step: Augmentation) -> Augmentation:
        if isinstance(step, Compose):
            return Compose(tuple(filled(s) for s in step.steps))
        if isinstance(step, Step) and not step.inputs:
            step = dataclasses.replace(step, inputs=names if step.floats else every)
        if isinstance(step, Mixing) and step.classes is None:
            step = dataclasses.replace(step, classes=classes)
        return step

    return Compose(tuple(filled(step) for step in steps))


def softens(steps: Iterable[Augmentation]) -> bool:
    """Whether labels come out mixed: float32 (n, ..., classes) instead of whole numbers."""
    return any(softens(s.steps) if isinstance(s, Compose) else isinstance(s, Mixing) for s in steps)
