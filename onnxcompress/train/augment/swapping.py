"""A step that takes elements of other samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxcompress.contract import Array
from onnxcompress.train.augment.step import Batch, Step, check, count


@dataclass(frozen=True)
class Swap(Step):
    """Takes what other samples of the batch have at the same places, with a probability.

    Places lie along the first axis behind the samples: columns of a table, tokens, steps of time.
    All inputs of a sample that have as many of them change alike, so that tokens keep their masks.
    Elements may be of any type, and keep the distribution that they have at their place. Labels
    stay what they were, so a few places are as much as they bear; a teacher tells anew
    (`distill`), and then it may be many.

    Sources: Vincent et al., Extracting and composing robust features with denoising autoencoders
    (2008); Xie et al., Data noising as smoothing in neural network language models (2017).
    """

    name = "swap"
    floats: ClassVar[bool] = False
    probability: float = 0.2

    def __post_init__(self) -> None:
        check(self, "probability", 0 <= self.probability <= 1, "from 0 to 1")

    def __call__(self, batch: Mapping[str, Array], rng: np.random.Generator) -> Batch:
        chosen = {name: x for name, x in self.chosen(batch).items() if x.ndim > 1}
        n, sources = count(chosen), dict[int, Array]()
        changed: Batch = {}
        for name, x in chosen.items():
            places = x.shape[1]
            if places not in sources:
                sources[places] = self._sources(n, places, rng)
            changed[name] = x[sources[places], np.arange(places)]
        return {**batch, **changed}

    def _sources(self, n: int, places: int, rng: np.random.Generator) -> Array:
        """By sample and place, the sample to take from: mostly itself."""
        others = rng.integers(0, n, (n, places))
        taken = rng.random((n, places)) < self.probability
        return np.where(taken, others, np.arange(n)[:, None])
