"""Boxes in samples: where to erase, or to paste another sample in."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from onnxcompress.contract import Array
from onnxcompress.train.augment.step import lined


def boxes(
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
        inside = inside & lined(within, axis, rank)
    return inside
