"""Smoothing of noise in samples: filters along one axis of an array, in NumPy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from onnxcompress.contract import Array
from onnxcompress.errors import InputError, did_you_mean
from onnxcompress.train.samples import names_of_floats


@dataclass(frozen=True, kw_only=True)
class _Filter(ABC):
    """A filter of an odd number of positions along an axis.

    Attributes:
        width: positions that one of the result is made of.
        axis: of the array with its samples' axis, which is 0 and cannot be meant.
        inputs: names of the arrays; all of floating point but `labels` where none are named.
    """

    width: int = 5
    axis: int = -1
    inputs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.width < 3 or self.width % 2 == 0:
            raise InputError(f"width must be an odd number of 3 or more, not {self.width}")
        if self.axis == 0:
            raise InputError("axis 0 holds the samples: name the axis of time or place")

    def __call__(self, batch: Mapping[str, Array]) -> dict[str, Array]:
        """The batch with its arrays filtered, dtypes kept; those given are not altered.

        Raises:
            InputError: if an array is not there or shorter than the filter is wide.
        """
        for name in self.inputs:
            if name not in batch:
                raise InputError(f"there is no array {name!r} to smooth{did_you_mean(name, batch)}")
        names = self.inputs or names_of_floats(batch)
        changed = {name: self._filtered(name, batch[name]) for name in names}
        return {**batch, **changed}

    def _filtered(self, name: str, x: Array) -> Array:
        if not -x.ndim < self.axis < x.ndim or x.shape[self.axis] < self.width:
            raise InputError(f"{name!r} of shape {list(x.shape)} has no {self.width} positions "
                             f"along axis {self.axis} to smooth over")  # fmt: skip
        lines = np.moveaxis(x, self.axis, -1)
        return np.moveaxis(self.along(lines).astype(x.dtype, copy=False), -1, self.axis)

    @abstractmethod
    def along(self, x: Array) -> Array:
        """`x` filtered along its last axis, with as many positions."""


@dataclass(frozen=True, kw_only=True)
class MedianFilter(_Filter):
    """The median of each position and its neighbours: takes single spikes away, keeps edges.

    Beyond the ends the array is mirrored (Tukey, Exploratory Data Analysis, 1977).
    """

    def along(self, x: Array) -> Array:
        half = self.width // 2
        padded = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(half, half)], mode="reflect")
        windows = np.lib.stride_tricks.sliding_window_view(padded, self.width, axis=-1)
        return np.median(windows, axis=-1)


@dataclass(frozen=True, kw_only=True)
class SavitzkyGolay(_Filter):
    """The value at each position of a polynomial fitted to it and its neighbours.

    Order 0 is the moving average, 2 keeps the height of peaks. The first and last positions are
    read off the polynomials of the first and last windows (Savitzky and Golay, Analytical
    Chemistry, 1964).
    """

    order: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.order < self.width:
            raise InputError(f"order must be from 0 to below the width, not {self.order}")

    def along(self, x: Array) -> Array:
        half, width = self.width // 2, self.width
        powers = np.vander(np.arange(-half, half + 1), self.order + 1, increasing=True)
        fit = powers @ np.linalg.pinv(powers.astype(np.float64))
        windows = np.lib.stride_tricks.sliding_window_view(x, width, axis=-1)
        ends = x[..., :width] @ fit[:half].T, x[..., -width:] @ fit[half + 1 :].T
        return np.concatenate([ends[0], windows @ fit[half], ends[1]], axis=-1)
