"""Steps that change each sample by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from onnxcompress.contract import Array
from onnxcompress.train.augment.boxes import boxes
from onnxcompress.train.augment.step import Batch, Step, axes_of, check, check_axes, count, lined


@dataclass(frozen=True)
class Noise(Step):
    """Adds normal noise of standard deviation `std`, in the unit of the input."""

    name = "noise"
    std: float = 0.1

    def __post_init__(self) -> None:
        check(self, "std", self.std > 0, "above 0")

    def __call__(self, batch: Mapping[str, Array], rng: np.random.Generator) -> Batch:
        changed = {n: _plus(x, self.std * _normal(rng, x)) for n, x in self.chosen(batch).items()}
        return {**batch, **changed}


@dataclass(frozen=True)
class Shift(Step):
    """Moves each sample by up to `by` positions (pixels, steps of time) along each axis.

    What comes in at the border is zero, the border's own value (edge), mirrored (reflect), or what
    went out at the other side (wrap). With zeros this is the padded random crop that residual
    networks are trained with on CIFAR (He et al., Deep Residual Learning, 2016). All inputs of a
    sample move alike.
    """

    name = "shift"
    by: int = 2
    mode: Literal["zero", "edge", "reflect", "wrap"] = "zero"
    axes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check(self, "by", self.by >= 1, "1 or more")
        check_axes(self.axes)

    def __call__(self, batch: Mapping[str, Array], rng: np.random.Generator) -> Batch:
        chosen = self.chosen(batch)
        axes = {name: axes_of(self, self.axes, x) for name, x in chosen.items()}
        most = max((len(found) for found in axes.values()), default=0)
        moves = rng.integers(-self.by, self.by, (most, count(chosen)), endpoint=True)
        changed = {name: self._moved(x, axes[name], moves) for name, x in chosen.items()}
        return {**batch, **changed}

    def _moved(self, x: Array, axes: Sequence[int], moves: Array) -> Array:
        for axis, move in zip(axes, moves, strict=False):
            size: int = x.shape[axis]
            places: Array = np.arange(size) - move[:, None]
            outside: Array = (places < 0) | (places >= size)
            x = _taken(x, _within(places, size, self.mode), axis)
            if self.mode == "zero":
                x = np.where(lined(outside, axis, x.ndim), x.dtype.type(0), x)
        return x


@dataclass(frozen=True)
class Flip(Step):
    """Reverses each sample along `axis` with a probability; all its inputs alike."""

    name = "flip"
    axis: int = -1
    probability: float = 0.5

    def __post_init__(self) -> None:
        check_axes((self.axis,))
        check(self, "probability", 0 <= self.probability <= 1, "from 0 to 1")

    def __call__(self, batch: Mapping[str, Array], rng: np.random.Generator) -> Batch:
        chosen = self.chosen(batch)
        turned = rng.random(count(chosen)) < self.probability
        changed: Batch = {}
        for name, x in chosen.items():
            (axis,) = axes_of(self, (self.axis,), x)
            changed[name] = x.copy()
            changed[name][turned] = np.flip(x[turned], axis)
        return {**batch, **changed}


@dataclass(frozen=True)
class Crop(Step):
    """Cuts a window out of each sample and stretches it to the full size, linearly.

    The window holds a share from `least` to 1 of each axis, the same of all, at a random place
    (Szegedy et al., Going Deeper with Convolutions, 2015, with the proportions kept). A crop of the
    padded input, which stretches nothing, is `Shift`.
    """

    name = "crop"
    least: float = 0.7
    axes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check(self, "least", 0 < self.least <= 1, "above 0 and at most 1")
        check_axes(self.axes)

    def __call__(self, batch: Mapping[str, Array], rng: np.random.Generator) -> Batch:
        chosen = self.chosen(batch)
        share = rng.uniform(self.least, 1, count(chosen))
        axes = {name: axes_of(self, self.axes, x) for name, x in chosen.items()}
        most = max((len(found) for found in axes.values()), default=0)
        starts = rng.random((most, len(share))) * (1 - share)
        changed = {n: self._cut(x, axes[n], share, starts) for n, x in chosen.items()}
        return {**batch, **changed}

    def _cut(self, x: Array, axes: Sequence[int], share: Array, starts: Array) -> Array:
        dtype = x.dtype
        for axis, start in zip(axes, starts, strict=False):
            size: int = x.shape[axis]
            grid = np.linspace(0, 1, size)
            places = (start[:, None] + share[:, None] * grid) * (size - 1)
            low = np.minimum(places.astype(np.intp), max(size - 2, 0))
            part = lined(places - low, axis, x.ndim).astype(np.float32)
            high = np.minimum(low + 1, size - 1)
            x = _taken(x, low, axis) * (1 - part) + _taken(x, high, axis) * part
        return x.astype(dtype, copy=False)


@dataclass(frozen=True)
class RandomErase(Step):
    """Fills a box of each sample with `fill`, with a probability.

    The box covers a share of the positions drawn from `share`, the sides' ratio is from 0.3 to
    1 / 0.3 (Zhong et al., Random Erasing Data Augmentation, 2020); along a single axis it is a
    stretch of that share.
    """

    name = "random_erase"
    share: tuple[float, float] = (0.02, 0.3)
    probability: float = 0.5
    fill: float = 0.0
    axes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        low, high = self.share
        check(self, "share", 0 < low <= high <= 1, "two rising numbers above 0 and up to 1")
        check(self, "probability", 0 <= self.probability <= 1, "from 0 to 1")
        check_axes(self.axes)

    def __call__(self, batch: Mapping[str, Array], rng: np.random.Generator) -> Batch:
        changed: Batch = {}
        for name, x in self.chosen(batch).items():
            axes, n = axes_of(self, self.axes, x), len(x)
            hit = rng.random(n) < self.probability
            share = np.where(hit, rng.uniform(*self.share, n), 0)
            inside = boxes(rng, x, axes, share, ratio=0.3)
            changed[name] = np.where(inside, x.dtype.type(self.fill), x)
        return {**batch, **changed}


def _normal(rng: np.random.Generator, x: Array) -> Array:
    return rng.standard_normal(x.shape, np.float64 if x.dtype == np.float64 else np.float32)


def _plus(x: Array, y: Array) -> Array:
    return np.add(x, y, dtype=x.dtype, casting="same_kind")


def _within(places: Array, size: int, mode: str) -> Array:
    """Places beyond the ends as those within that stand for them."""
    if mode == "wrap":
        return places % size
    if mode == "reflect" and size > 1:
        period = 2 * (size - 1)
        folded = places % period
        return np.minimum(folded, period - folded)
    return np.clip(places, 0, size - 1)


def _taken(x: Array, places: Array, axis: int) -> Array:
    """Of each sample, the elements at its own places (n, size) along `axis`."""
    moved = np.moveaxis(x, axis, 1)
    return np.moveaxis(moved[np.arange(len(x))[:, None], places], 1, axis)
