"""Augmentation: steps that change a batch at random before it is trained on.

A step is called with a batch (arrays by name, samples on the first axis) and a generator of random
numbers, and gives back a batch: `step(batch, rng) -> dict`. Any such callable is one. Those here
leave the arrays that they are given as they are, keep dtypes, and give the same batch for the same
generator.

Each works on the arrays that its `inputs` name; where none are named, on all of floating point
that have axes but `labels`. `bound` narrows that to a model's inputs, which keeps teacher outputs
out. Axes are counted with the samples' (1 is the first behind it); where none are named they are
those behind samples and channels (N, C, H, W), and time in a sequence (N, T, features).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, cast

import numpy as np

from onnxcompress import options
from onnxcompress.contract import Array
from onnxcompress.errors import InputError, did_you_mean

Batch = dict[str, Array]
Augmentation = Callable[[Mapping[str, Array], np.random.Generator], Batch]

_LABELS: Final = "labels"


@dataclass(frozen=True, kw_only=True)
class _Step:
    """What the steps here share: which arrays they change."""

    inputs: tuple[str, ...] = ()

    def __call__(self, batch: Mapping[str, Array], rng: np.random.Generator) -> Batch:
        raise NotImplementedError

    def chosen(self, batch: Mapping[str, Array]) -> Batch:
        """The arrays to change, by name.

        Raises:
            InputError: if one that was named is not there or is not of floating point.
        """
        for name in self.inputs:
            if name not in batch:
                raise InputError(
                    f"{_name(self)}: a batch has no array {name!r}{did_you_mean(name, batch)}"
                )
            if not _is_float(batch[name]):
                raise InputError(f"{_name(self)}: {name!r} is {batch[name].dtype}, not floats")
        names = self.inputs or [n for n in batch if n != _LABELS and _is_float(batch[n])]
        return {name: batch[name] for name in names}


@dataclass(frozen=True)
class Noise(_Step):
    """Adds normal noise of standard deviation `std`, in the unit of the input."""

    std: float = 0.1

    def __post_init__(self) -> None:
        _check(self, "std", self.std > 0, "above 0")

    def __call__(self, batch: Mapping[str, Array], rng: np.random.Generator) -> Batch:
        changed = {n: _plus(x, self.std * _normal(rng, x)) for n, x in self.chosen(batch).items()}
        return {**batch, **changed}


@dataclass(frozen=True)
class Shift(_Step):
    """Moves each sample by up to `by` positions (pixels, steps of time) along each axis.

    What comes in at the border is zero, the border's own value (edge), mirrored (reflect), or what
    went out at the other side (wrap). With zeros this is the padded random crop that residual
    networks are trained with on CIFAR (He et al., Deep Residual Learning, 2016). All inputs of a
    sample move alike.
    """

    by: int = 2
    mode: Literal["zero", "edge", "reflect", "wrap"] = "zero"
    axes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _check(self, "by", self.by >= 1, "1 or more")
        _check_axes(self.axes)

    def __call__(self, batch: Mapping[str, Array], rng: np.random.Generator) -> Batch:
        chosen = self.chosen(batch)
        axes = {name: _axes(self, self.axes, x) for name, x in chosen.items()}
        most = max((len(found) for found in axes.values()), default=0)
        moves = rng.integers(-self.by, self.by, (most, _samples(chosen)), endpoint=True)
        changed = {name: self._moved(x, axes[name], moves) for name, x in chosen.items()}
        return {**batch, **changed}

    def _moved(self, x: Array, axes: Sequence[int], moves: Array) -> Array:
        for axis, move in zip(axes, moves, strict=False):
            size: int = x.shape[axis]
            places: Array = np.arange(size) - move[:, None]
            outside: Array = (places < 0) | (places >= size)
            x = _taken(x, _within(places, size, self.mode), axis)
            if self.mode == "zero":
                x = np.where(_lined(outside, axis, x.ndim), x.dtype.type(0), x)
        return x


@dataclass(frozen=True)
class Flip(_Step):
    """Reverses each sample along `axis` with a probability; all its inputs alike."""

    axis: int = -1
    probability: float = 0.5

    def __post_init__(self) -> None:
        _check_axes((self.axis,))
        _check(self, "probability", 0 <= self.probability <= 1, "from 0 to 1")

    def __call__(self, batch: Mapping[str, Array], rng: np.random.Generator) -> Batch:
        chosen = self.chosen(batch)
        turned = rng.random(_samples(chosen)) < self.probability
        changed: Batch = {}
        for name, x in chosen.items():
            (axis,) = _axes(self, (self.axis,), x)
            changed[name] = x.copy()
            changed[name][turned] = np.flip(x[turned], axis)
        return {**batch, **changed}


@dataclass(frozen=True)
class Crop(_Step):
    """Cuts a window out of each sample and stretches it to the full size, linearly.

    The window holds a share from `least` to 1 of each axis, the same of all, at a random place
    (Szegedy et al., Going Deeper with Convolutions, 2015, with the proportions kept). A crop of the
    padded input, which stretches nothing, is `Shift`.
    """

    least: float = 0.7
    axes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _check(self, "least", 0 < self.least <= 1, "above 0 and at most 1")
        _check_axes(self.axes)

    def __call__(self, batch: Mapping[str, Array], rng: np.random.Generator) -> Batch:
        chosen = self.chosen(batch)
        share = rng.uniform(self.least, 1, _samples(chosen))
        axes = {name: _axes(self, self.axes, x) for name, x in chosen.items()}
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
            part = _lined(places - low, axis, x.ndim).astype(np.float32)
            high = np.minimum(low + 1, size - 1)
            x = _taken(x, low, axis) * (1 - part) + _taken(x, high, axis) * part
        return x.astype(dtype, copy=False)


@dataclass(frozen=True)
class RandomErase(_Step):
    """Fills a box of each sample with `fill`, with a probability.

    The box covers a share of the positions drawn from `share`, the sides' ratio is from 0.3 to
    1 / 0.3 (Zhong et al., Random Erasing Data Augmentation, 2020); along a single axis it is a
    stretch of that share.
    """

    share: tuple[float, float] = (0.02, 0.3)
    probability: float = 0.5
    fill: float = 0.0
    axes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        low, high = self.share
        _check(self, "share", 0 < low <= high <= 1, "two rising numbers above 0 and up to 1")
        _check(self, "probability", 0 <= self.probability <= 1, "from 0 to 1")
        _check_axes(self.axes)

    def __call__(self, batch: Mapping[str, Array], rng: np.random.Generator) -> Batch:
        changed: Batch = {}
        for name, x in self.chosen(batch).items():
            axes, n = _axes(self, self.axes, x), len(x)
            hit = rng.random(n) < self.probability
            share = np.where(hit, rng.uniform(*self.share, n), 0)
            inside = _boxes(rng, x, axes, share, ratio=0.3)
            changed[name] = np.where(inside, x.dtype.type(self.fill), x)
        return {**batch, **changed}


@dataclass(frozen=True)
class _Mixing(_Step):
    """What Mixup and CutMix share: partners, and targets that are mixed like the inputs.

    Labels (n, ...), whole numbers, become float32 (n, ..., classes), a row of zeros for a negative
    one (which has no label); all other arrays of floats are mixed in the same shares, whether
    they are targets or teacher outputs. `classes` is needed where there are labels as numbers.
    """

    alpha: float = 0.2
    classes: int | None = None
    labels: str = _LABELS

    def __post_init__(self) -> None:
        _check(self, "alpha", self.alpha > 0, "above 0")

    def targets(self, batch: Mapping[str, Array], others: Array, own: Array) -> Batch:
        """All but the inputs, with `own` (n,) of the sample itself and the rest of its partner."""
        inputs = self.chosen(batch)
        mixed: Batch = {}
        for name, x in batch.items():
            if x.ndim == 0 or name in inputs:
                continue
            if not _is_float(x):
                x = self._soft(name, x)
            mixed[name] = _blend(x, x[others], own)
        return mixed

    def _soft(self, name: str, x: Array) -> Array:
        if name != self.labels:
            raise InputError(f"{_name(self)}: {name!r} holds whole numbers, which cannot be mixed; "
                             "leave the step out")  # fmt: skip
        if self.classes is None:
            raise InputError(f"{_name(self)}: say how many classes there are (classes = …)")
        return one_hot(x, self.classes)


@dataclass(frozen=True)
class Mixup(_Mixing):
    """Mixes each sample with another of the batch, and their targets in the same shares.

    λ of the sample and 1 - λ of the other, λ from Beta(alpha, alpha) for each sample (Zhang et
    al., mixup: Beyond Empirical Risk Minimization, 2018).
    """

    def __call__(self, batch: Mapping[str, Array], rng: np.random.Generator) -> Batch:
        chosen = self.chosen(batch)
        n = _samples(chosen)
        others, own = rng.permutation(n), rng.beta(self.alpha, self.alpha, n)
        inputs = {name: _blend(x, x[others], own) for name, x in chosen.items()}
        return {**batch, **inputs, **self.targets(batch, others, own)}


@dataclass(frozen=True)
class CutMix(_Mixing):
    """Pastes a box of another sample of the batch in, and mixes targets by its share.

    The box covers 1 - λ of the positions, λ from Beta(alpha, alpha) for each sample; what falls
    outside at the border is not counted (Yun et al., CutMix, 2019). One input only.
    """

    alpha: float = 1.0
    axes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_axes(self.axes)

    def __call__(self, batch: Mapping[str, Array], rng: np.random.Generator) -> Batch:
        chosen = self.chosen(batch)
        if len(chosen) != 1:
            raise InputError(f"cut_mix pastes into one input: name it, of {sorted(chosen)}")
        ((name, x),) = chosen.items()
        axes, n = _axes(self, self.axes, x), len(x)
        others = rng.permutation(n)
        share = 1 - rng.beta(self.alpha, self.alpha, n)
        inside = _boxes(rng, x, axes, share, ratio=1.0)
        own = 1 - inside.reshape(n, -1).mean(1)
        mixed = np.where(inside, x[others], x)
        return {**batch, name: mixed, **self.targets(batch, others, own)}


@dataclass(frozen=True)
class Compose:
    """Several steps, one after the other."""

    steps: tuple[Augmentation, ...]

    def __call__(self, batch: Mapping[str, Array], rng: np.random.Generator) -> Batch:
        found = dict(batch)
        for step in self.steps:
            found = step(found, rng)
        return found


_STEPS: Final[dict[str, type[_Step]]] = {
    "noise": Noise,
    "shift": Shift,
    "flip": Flip,
    "crop": Crop,
    "random_erase": RandomErase,
    "mixup": Mixup,
    "cut_mix": CutMix,
}


def bound(
    steps: Iterable[Augmentation], inputs: Iterable[str], classes: int | None = None
) -> Compose:
    """The steps, in order, with what a model says of itself filled in where they leave it open.

    Args:
        inputs: the model's inputs of floating point, which steps that name no inputs change.
        classes: how many classes labels name, for those that mix them.
    """
    names = tuple(inputs)

    def filled(step: Augmentation) -> Augmentation:
        if isinstance(step, Compose):
            return Compose(tuple(filled(s) for s in step.steps))
        if isinstance(step, _Step) and not step.inputs:
            step = dataclasses.replace(step, inputs=names)
        if isinstance(step, _Mixing) and step.classes is None:
            step = dataclasses.replace(step, classes=classes)
        return step

    return Compose(tuple(filled(step) for step in steps))


def softens(steps: Iterable[Augmentation]) -> bool:
    """Whether labels come out mixed: float32 (n, ..., classes) instead of whole numbers."""
    return any(
        softens(s.steps) if isinstance(s, Compose) else isinstance(s, _Mixing) for s in steps
    )


def one_hot(labels: Array, classes: int) -> Array:
    """Whole numbers (n, ...) as float32 (n, ..., classes); all zeros for a negative one.

    Raises:
        InputError: if there are not so many classes.
    """
    if labels.size and labels.max() >= classes:
        raise InputError(f"labels name class {labels.max()} but there are {classes} classes")
    return (labels[..., None] == np.arange(classes)).astype(np.float32)


def read_steps(items: Any, where: str = "augment") -> tuple[Augmentation, ...]:
    """Steps from a list as TOML has it: `[{noise = {std = 0.1}}, "flip"]`.

    Raises:
        InputError: for an unknown step, option or value; `where` opens the sentence.
    """
    if not isinstance(items, list):
        raise InputError(f'{where} must be a list such as [{{noise = {{std = 0.1}}}}, "flip"]')
    return tuple(_read(item, where) for item in cast("list[Any]", items))


def _read(item: Any, where: str) -> Augmentation:
    named: Any = {item: {}} if isinstance(item, str) else item
    if not isinstance(named, dict) or len(cast("dict[str, Any]", named)) != 1:
        raise InputError(f"{where}: a step is a name or {{name = {{options}}}}, not {item!r}")
    ((name, table),) = cast("dict[str, Any]", named).items()
    if name not in _STEPS:
        raise InputError(f"{where}: no step {name!r}{did_you_mean(name, _STEPS)}")
    if not isinstance(table, dict):
        raise InputError(f"{where}: {name} must be a table of options, not {table!r}")
    return options.build(_STEPS[name], cast("dict[str, Any]", table), f"{where}: {name}")


def write_steps(steps: Iterable[Augmentation]) -> list[dict[str, dict[str, Any]]]:
    """The list that `read_steps` reads.

    Raises:
        InputError: if a step is a callable of your own, which has no name in a recipe.
    """
    found: list[dict[str, dict[str, Any]]] = []
    for step in steps:
        if not isinstance(step, _Step) or type(step) not in _STEPS.values():
            raise InputError(f"{step!r} is no step that a recipe has a name for")
        found.append({_name(step): options.changed(step)})
    return found


def _name(step: _Step) -> str:
    return next((name for name, kind in _STEPS.items() if kind is type(step)), "augment")


def _check(step: _Step, option: str, holds: bool, wanted: str) -> None:
    if not holds:
        raise InputError(f"{option} must be {wanted}, not {getattr(step, option)}")


def _check_axes(axes: Sequence[int]) -> None:
    if 0 in axes or len(set(axes)) < len(axes):
        raise InputError(f"axes must differ and not be 0, which holds the samples, not {axes}")


def _is_float(x: Array) -> bool:
    return x.ndim > 0 and x.dtype.kind == "f"


def _samples(arrays: Mapping[str, Array]) -> int:
    sizes = {len(x) for x in arrays.values()}
    if len(sizes) > 1:
        raise InputError(f"arrays of a batch do not have equally many samples: {sorted(sizes)}")
    return sizes.pop() if sizes else 0


def _axes(step: _Step, axes: Sequence[int], x: Array) -> list[int]:
    """Axes from the left; where none are named, those of positions by the rank."""
    if not axes:
        if x.ndim < 3:
            raise InputError(f"{_name(step)}: an array of {x.ndim} axes has no positions beside "
                             "its samples: name axes, or the inputs that have")  # fmt: skip
        return [1] if x.ndim == 3 else list(range(2, x.ndim))
    if any(not -x.ndim < axis < x.ndim for axis in axes):
        raise InputError(f"{_name(step)}: an array of {x.ndim} axes has no axis {max(axes)}")
    return [axis % x.ndim for axis in axes]


def _normal(rng: np.random.Generator, x: Array) -> Array:
    return rng.standard_normal(x.shape, np.float64 if x.dtype == np.float64 else np.float32)


def _plus(x: Array, y: Array) -> Array:
    return np.add(x, y, dtype=x.dtype, casting="same_kind")


def _blend(x: Array, y: Array, own: Array) -> Array:
    own = own.reshape(len(x), *[1] * (x.ndim - 1)).astype(np.result_type(x.dtype, np.float32))
    return (x * own + y * (1 - own)).astype(x.dtype, copy=False)


def _within(places: Array, size: int, mode: str) -> Array:
    """Places beyond the ends as those within that stand for them."""
    if mode == "wrap":
        return places % size
    if mode == "reflect" and size > 1:
        period = 2 * (size - 1)
        folded = places % period
        return np.minimum(folded, period - folded)
    return np.clip(places, 0, size - 1)


def _lined(values: Array, axis: int, rank: int) -> Array:
    """`values` (n, size) shaped to broadcast along the first axis and `axis`."""
    shape = [1] * rank
    shape[0], shape[axis] = values.shape
    return values.reshape(shape)


def _taken(x: Array, places: Array, axis: int) -> Array:
    """Of each sample, the elements at its own places (n, size) along `axis`."""
    moved = np.moveaxis(x, axis, 1)
    return np.moveaxis(moved[np.arange(len(x))[:, None], places], 1, axis)


def _boxes(
    rng: np.random.Generator, x: Array, axes: Sequence[int], share: Array, ratio: float
) -> Array:
    """A box in each sample that covers `share` (n,) of the positions: bool, shaped to broadcast.

    Of two axes the first side is longer by a ratio drawn evenly in logarithm from `ratio` to its
    inverse; the centre is drawn evenly over the sample, and what lies outside falls away.
    """
    n, rank = len(x), x.ndim
    side = share ** (1 / len(axes))
    turn = np.exp(rng.uniform(-0.5, 0.5, n) * -math.log(ratio))
    inside = np.ones([n] + [1] * (rank - 1), bool)
    for number, axis in enumerate(axes):
        size: int = x.shape[axis]
        stretch = (turn, 1 / turn)[number] if len(axes) == 2 else 1.0
        length = np.rint(np.minimum(side * stretch, 1) * size)
        start = np.rint(rng.random(n) * size - length / 2)[:, None]
        places: Array = np.arange(size)
        within: Array = (places >= start) & (places < start + length[:, None])
        inside = inside & _lined(within, axis, rank)
    return inside
