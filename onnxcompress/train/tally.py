"""What runs over samples tell of them: losses and hits, which add up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from onnxcompress.contract import Array
from onnxcompress.train.objective import LOSS, Objective


@dataclass(frozen=True)
class Tally:
    """Figures of some samples, which add up with those of others."""

    samples: int = 0
    sums: Mapping[str, float] = field(default_factory=dict[str, float])
    """Losses by name, summed over the samples."""
    hits: float = 0.0
    labels: float = 0.0

    @classmethod
    def of(cls, found: Objective, values: Mapping[str, Array], samples: int) -> Tally:
        """From the scalars that a run of the objective gave of some samples."""
        losses = {LOSS: found.loss, **found.terms}
        return cls(
            samples,
            {title: samples * float(values[name]) for title, name in losses.items()},
            sum(float(values[hits]) for hits, _ in found.hits),
            sum(float(values[labels]) for _, labels in found.hits),
        )

    def __add__(self, other: Tally) -> Tally:
        names = dict.fromkeys((*self.sums, *other.sums))
        sums = {name: self.sums.get(name, 0.0) + other.sums.get(name, 0.0) for name in names}
        return Tally(
            self.samples + other.samples, sums, self.hits + other.hits, self.labels + other.labels
        )

    @property
    def loss(self) -> float:
        """Mean of the loss."""
        return self.sums[LOSS] / self.samples

    @property
    def figures(self) -> dict[str, float]:
        """`loss`, each loss where there are several, and `accuracy` where there are labels."""
        found = {name: total / self.samples for name, total in self.sums.items()}
        return found | ({"accuracy": self.hits / self.labels} if self.labels else {})
