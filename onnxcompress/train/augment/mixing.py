"""Steps that mix samples, and their labels in the same shares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from onnxcompress.contract import Array
from onnxcompress.errors import InputError
from onnxcompress.train.augment.boxes import boxes
from onnxcompress.train.augment.step import (
    Batch,
    Step,
    axes_of,
    check,
    check_axes,
    count,
    is_float,
    title,
)
from onnxcompress.train.samples import LABELS


@dataclass(frozen=True)
class Mixing(Step):
    """What Mixup and CutMix share: partners, and targets that are mixed like the inputs.

    Labels (n, ...), whole numbers, become float32 (n, ..., classes), a row of zeros for a negative
    one (which has no label); all other arrays of floats are mixed in the same shares, whether
    they are targets or teacher outputs. `classes` is needed where there are labels as numbers.
    """

    alpha: float = 0.2
    classes: int | None = None
    labels: str = LABELS

    def __post_init__(self) -> None:
        check(self, "alpha", self.alpha > 0, "above 0")

    def targets(self, batch: Mapping[str, Array], others: Array, own: Array) -> Batch:
        """All but the inputs, with `own` (n,) of the sample itself and the rest of its partner."""
        inputs = self.chosen(batch)
        mixed: Batch = {}
        for name, x in batch.items():
            if x.ndim == 0 or name in inputs:
                continue
            if not is_float(x):
                x = self._soft(name, x)
            mixed[name] = _blend(x, x[others], own)
        return mixed

    def _soft(self, name: str, x: Array) -> Array:
        if name != self.labels:
            raise InputError(f"{title(self)}: {name!r} holds whole numbers, which cannot be mixed; "
                             "leave the step out")  # fmt: skip
        if self.classes is None:
            raise InputError(f"{title(self)}: say how many classes there are (classes = …)")
        return one_hot(x, self.classes)


@dataclass(frozen=True)
class Mixup(Mixing):
    """Mixes each sample with another of the batch, and their targets in the same shares.

    λ of the sample and 1 - λ of the other, λ from Beta(alpha, alpha) for each sample (Zhang et
    al., mixup: Beyond Empirical Risk Minimization, 2018).
    """

    name = "mixup"

    def __call__(self, batch: Mapping[str, Array], rng: np.random.Generator) -> Batch:
        chosen = self.chosen(batch)
        n = count(chosen)
        others, own = rng.permutation(n), rng.beta(self.alpha, self.alpha, n)
        inputs = {name: _blend(x, x[others], own) for name, x in chosen.items()}
        return {**batch, **inputs, **self.targets(batch, others, own)}


@dataclass(frozen=True)
class CutMix(Mixing):
    """Pastes a box of another sample of the batch in, and mixes targets by its share.

    The box covers 1 - λ of the positions, λ from Beta(alpha, alpha) for each sample; what falls
    outside at the border is not counted (Yun et al., CutMix, 2019). One input only.
    """

    name = "cut_mix"
    alpha: float = 1.0
    axes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_axes(self.axes)

    def __call__(self, batch: Mapping[str, Array], rng: np.random.Generator) -> Batch:
        chosen = self.chosen(batch)
        if len(chosen) != 1:
            raise InputError(f"cut_mix pastes into one input: name it, of {sorted(chosen)}")
        ((name, x),) = chosen.items()
        axes, n = axes_of(self, self.axes, x), len(x)
        others = rng.permutation(n)
        share = 1 - rng.beta(self.alpha, self.alpha, n)
        inside = boxes(rng, x, axes, share, ratio=1.0)
        own = 1 - inside.reshape(n, -1).mean(1)
        mixed = np.where(inside, x[others], x)
        return {**batch, name: mixed, **self.targets(batch, others, own)}


def one_hot(labels: Array, classes: int) -> Array:
    """Whole numbers (n, ...) as float32 (n, ..., classes); all zeros for a negative one.

    Raises:
        InputError: if there are not so many classes.
    """
    if labels.size and labels.max() >= classes:
        raise InputError(f"labels name class {labels.max()} but there are {classes} classes")
    return (labels[..., None] == np.arange(classes)).astype(np.float32)


def _blend(x: Array, y: Array, own: Array) -> Array:
    own = own.reshape(len(x), *[1] * (x.ndim - 1)).astype(np.result_type(x.dtype, np.float32))
    return (x * own + y * (1 - own)).astype(x.dtype, copy=False)
