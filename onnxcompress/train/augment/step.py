"""What steps share: which arrays they change, and along which axes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxcompress.contract import Array
from onnxcompress.errors import InputError, did_you_mean
from onnxcompress.train.samples import names_of_floats

Batch = dict[str, Array]
Augmentation = Callable[[Mapping[str, Array], np.random.Generator], Batch]


@dataclass(frozen=True, kw_only=True)
class Step(ABC):
    """What the steps here share: which arrays they change."""

    name: ClassVar[str]
    """In a recipe."""
    floats: ClassVar[bool] = True
    """Whether it changes floating point only."""
    inputs: tuple[str, ...] = ()

    @abstractmethod
    def __call__(self, batch: Mapping[str, Array], rng: np.random.Generator) -> Batch: ...

    def chosen(self, batch: Mapping[str, Array]) -> Batch:
        """The arrays to change, by name.

        Raises:
            InputError: if one that was named is not there, or not of floating point as it must be.
        """
        for name in self.inputs:
            if name not in batch:
                raise InputError(
                    f"{title(self)}: a batch has no array {name!r}{did_you_mean(name, batch)}"
                )
            if self.floats and not is_float(batch[name]):
                raise InputError(f"{title(self)}: {name!r} is {batch[name].dtype}, not floats")
        return {name: batch[name] for name in self.inputs or names_of_floats(batch)}


def title(step: Step) -> str:
    """The step's name in a recipe; `augment` for a class of somebody's own."""
    return vars(type(step)).get("name", "augment")


def check(step: Step, option: str, holds: bool, wanted: str) -> None:
    """See that an option holds what it must; InputError if not."""
    if not holds:
        raise InputError(f"{option} must be {wanted}, not {getattr(step, option)}")


def check_axes(axes: Sequence[int]) -> None:
    """See that axes differ and leave the samples alone; InputError if not."""
    if 0 in axes or len(set(axes)) < len(axes):
        raise InputError(f"axes must differ and not be 0, which holds the samples, not {axes}")


def is_float(x: Array) -> bool:
    """Whether it holds floating point and has samples."""
    return x.ndim > 0 and x.dtype.kind == "f"


def count(arrays: Mapping[str, Array]) -> int:
    """How many samples all of them have; InputError if they differ."""
    sizes = {len(x) for x in arrays.values()}
    if len(sizes) > 1:
        raise InputError(f"arrays of a batch do not have equally many samples: {sorted(sizes)}")
    return sizes.pop() if sizes else 0


def axes_of(step: Step, axes: Sequence[int], x: Array) -> list[int]:
    """Axes from the left; where none are named, those of positions by the rank."""
    if not axes:
        if x.ndim < 3:
            raise InputError(f"{title(step)}: an array of {x.ndim} axes has no positions beside "
                             "its samples: name axes, or the inputs that have")  # fmt: skip
        return [1] if x.ndim == 3 else list(range(2, x.ndim))
    if any(not -x.ndim < axis < x.ndim for axis in axes):
        raise InputError(f"{title(step)}: an array of {x.ndim} axes has no axis {max(axes)}")
    return [axis % x.ndim for axis in axes]


def lined(values: Array, axis: int, rank: int) -> Array:
    """`values` (n, size) shaped to broadcast along the first axis and `axis`."""
    shape = [1] * rank
    shape[0], shape[axis] = values.shape
    return values.reshape(shape)
