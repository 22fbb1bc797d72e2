"""What training reports of itself, epoch by epoch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Epoch:
    """One time through the data."""

    number: int
    """From 1."""
    rate: float
    """Learning rate of its last step."""
    training: Mapping[str, float]
    """Means by name (`loss`, each loss where there are several, `accuracy` where there are
    labels), of each batch before its own update."""
    validation: Mapping[str, float] = field(default_factory=dict[str, float])
    """The same of the data to evaluate on, by the weights at the end of the epoch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """All epochs, and which of them the weights are of."""

    epochs: tuple[Epoch, ...] = ()
    monitor: str = "loss"
    """The figure of the validation that epochs were compared by."""
    best: int | None = None
    """The epoch with the best such figure, whose weights were kept; None without validation."""
    stopped: bool = False
    """Whether training ended early because the figure no longer improved."""

    @property
    def waited(self) -> int:
        """Epochs since the best one."""
        return len(self.epochs) - self.best if self.best else 0

    def with_epoch(self, epoch: Epoch) -> History:
        """With one more epoch, which is the best if its figure is better than all before."""
        best = self.best
        if epoch.validation and (
            not best or self._score(epoch) > self._score(self.epochs[best - 1])
        ):
            best = epoch.number
        return replace(self, epochs=(*self.epochs, epoch), best=best)

    def _score(self, epoch: Epoch) -> float:
        figure = epoch.validation[self.monitor]
        if math.isnan(figure):
            return -math.inf
        return figure if self.monitor == "accuracy" else -figure

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> History:
        """From what `dataclasses.asdict` made of one."""
        epochs = tuple(Epoch(**epoch) for epoch in plain["epochs"])
        return replace(cls(**plain), epochs=epochs)
