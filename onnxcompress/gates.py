"""Gates: bounds on a report's figures, written `metric op bound`, for example `sqnr >= 30`."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, cast

from onnxcompress.errors import InputError, did_you_mean

METRICS: Mapping[str, str] = {
    "sqnr": "signal to quantization noise of the worst output, dB",
    "cosine": "cosine similarity of the worst output",
    "max_error": "largest absolute difference of any output",
    "top1_agreement": "share of samples whose top class is the original's",
    "top5_agreement": "share of samples whose top class is among the original's five",
    "accuracy": "accuracy against the labels",
    "accuracy_drop": "the original's accuracy minus this one's",
    "integer_share": "share of the multiplications that run on integers",
    "size_ratio": "file size over the original's",
    "latency_ratio": "latency over the original's, measured in turns",
    "memory_ratio": "peak memory over the original's",
}
"""What a gate may bound, and what it means."""

Op = Literal[">=", "<=", ">", "<"]
_COMPARE: Mapping[Op, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_GATE = re.compile(r"\s*([A-Za-z_]\w*)\s*(>=|<=|>|<)\s*(\S+)\s*")


@dataclass(frozen=True, slots=True)
class Gate:
    """A bound on one figure of the report; see `METRICS`."""

    metric: str
    op: Op
    bound: float

    @classmethod
    def parse(cls, text: str) -> Gate:
        """Read `metric op bound`.

        Raises:
            InputError: if it is not of that form, the metric is unknown or the bound not finite.
        """
        match = _GATE.fullmatch(text)
        if match is None:
            raise InputError(f"gate {text!r}: write a metric, >= or <=, and a number: 'sqnr >= 30'")
        metric, op, bound = match.groups()
        if metric not in METRICS:
            raise InputError(f"gate {text!r}: no metric {metric!r}{did_you_mean(metric, METRICS)}")
        try:
            value = float(bound)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise InputError(f"gate {text!r}: {bound!r} is not a number, write one such as 0.98")
        return cls(metric, cast(Op, op), value)

    def met(self, figure: float) -> bool:
        """Whether `figure` is within the bound; NaN never is."""
        return _COMPARE[self.op](figure, self.bound)

    def __str__(self) -> str:
        return f"{self.metric} {self.condition}"

    @property
    def condition(self) -> str:
        """The part after the metric: `>= 30`."""
        return f"{self.op} {self.bound:.15g}"
