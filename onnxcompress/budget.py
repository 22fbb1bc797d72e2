"""What a result may lose: the bounds that are held against every variant, asked for or not."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from onnxcompress.errors import InputError
from onnxcompress.gates import Gate
from onnxcompress.report.gating import MEASURED, QUALITY, GateResult

DEFAULT_GATES: Final = (
    Gate("size_ratio", "<=", 1.0),
    Gate("latency_ratio", "<=", 1.03),
    Gate("sqnr", ">=", 10.0),
)
"""Held against every variant when no gate is given; 3 % is what two runs of one model differ by."""
DEFAULT_DROP: Final = Gate("accuracy_drop", "<=", 0.02)
"""Added where there are labels that name classes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What may be lost.

    Raises:
        InputError: if a figure makes no sense.
    """

    max_drop: float | None = None
    """Accuracy that may be lost or, without labels, share of decisions that may differ: [0, 1)."""
    min_sqnr: float | None = None
    """Signal to noise that every output must keep, in dB: [0, 300]."""

    def __post_init__(self) -> None:
        if self.max_drop is not None and not 0 <= self.max_drop < 1:
            raise InputError(
                f"max_drop {self.max_drop} is not at least 0 and below 1: write a share, 0.01 is "
                "one point"
            )
        if self.min_sqnr is not None and not 0 <= self.min_sqnr <= 300:
            raise InputError(f"min_sqnr {self.min_sqnr} is not from 0 to 300: it is in dB")

    def gates(self, *, classes: bool) -> tuple[Gate, ...]:
        """The budget as gates; `classes` says whether there are labels to tell accuracy by."""
        found: list[Gate] = []
        if self.max_drop is not None:
            lost = Gate("accuracy_drop", "<=", self.max_drop)
            found.append(lost if classes else Gate("top1_agreement", ">=", 1 - self.max_drop))
        if self.min_sqnr is not None:
            found.append(Gate("sqnr", ">=", self.min_sqnr))
        return tuple(found)

    def default_gates(self, *, classes: bool) -> tuple[Gate, ...]:
        """What is held when no gate is given: the budget takes the place of what bounds quality."""
        if own := self.gates(classes=classes):
            return (*(gate for gate in DEFAULT_GATES if gate.metric not in QUALITY), *own)
        return (*DEFAULT_GATES, DEFAULT_DROP) if classes else DEFAULT_GATES

    def joined(self, given: tuple[Gate, ...], *, classes: bool, timed: bool) -> tuple[Gate, ...]:
        """All gates: those that were `given`, or the default ones, and the budget's.

        Args:
            timed: whether latency and memory are measured; no default gate holds them where not.
        """
        if given:
            return given + self.gates(classes=classes)
        found = self.default_gates(classes=classes)
        return tuple(gate for gate in found if timed or gate.metric not in MEASURED)

    def check(self, held: Iterable[GateResult], *, classes: bool) -> None:
        """See that the budget bounds something that the model has.

        Raises:
            InputError: if it does not.
        """
        asked = self.gates(classes=classes)
        for result in held:
            if result.gate in asked and result.figure is None:
                raise InputError(f"the budget cannot be held: {result.reason}")


def largest_loss(gates: Iterable[Gate]) -> float | None:
    """Accuracy that may be lost or share of decisions that may differ; None where unbounded."""
    bounds = [
        gate.bound if gate.metric == "accuracy_drop" else 1 - gate.bound
        for gate in gates
        if gate.metric in ("accuracy_drop", "top1_agreement")
    ]
    return min(bounds, default=None)
