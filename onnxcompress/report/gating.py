"""Holds gates against a report: how each metric of `gates.METRICS` is read from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from onnxcompress.gates import Gate
from onnxcompress.numerics.decisions import Metric
from onnxcompress.validation import OutputFigures

if TYPE_CHECKING:
    from onnxcompress.report import Report

Reader = Callable[["Report"], float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class GateResult:
    """A gate and the figure that met it or did not."""

    gate: Gate
    figure: float | None
    """None where the report has none: then the gate is not met."""
    passed: bool
    reason: str
    """A sentence: what was asked, what was found."""


def check(gates: Iterable[Gate], report: Report) -> tuple[GateResult, ...]:
    """Hold each gate against the report.

    A figure that was not measured meets no gate, and neither does the quality of a candidate
    that validation found broken (NaN, infinities, another shape).
    """
    return tuple(_check(gate, report) for gate in gates)


def _check(gate: Gate, report: Report) -> GateResult:
    figure = READERS[gate.metric](report)
    failures = report.validation.failures if report.validation else ()
    if gate.metric in QUALITY and failures:
        return GateResult(gate=gate, figure=figure, passed=False, reason=failures[0])
    if figure is None:
        reason = f"{gate.metric} was not measured: {_LACKING.get(gate.metric, _NO_DATA)}"
        return GateResult(gate=gate, figure=None, passed=False, reason=reason)
    passed = gate.met(figure)
    reason = f"{gate.metric} is {figure:.4g}, {'as asked' if passed else 'asked'}: {gate.condition}"
    return GateResult(gate=gate, figure=figure, passed=passed, reason=reason)


def _worst(
    choose: Callable[[list[float]], float], read: Callable[[OutputFigures], float | None]
) -> Reader:
    """The worst figure of any output; None where no output has it."""

    def reader(report: Report) -> float | None:
        outputs = report.validation.outputs if report.validation else ()
        figures = [figure for output in outputs if (figure := read(output)) is not None]
        return choose(figures) if figures else None

    return reader


def _accuracy(output: OutputFigures) -> float | None:
    score = output.score
    return score.candidate if score and score.metric is Metric.ACCURACY else None


def _accuracy_drop(output: OutputFigures) -> float | None:
    score = output.score
    accuracy = score and score.metric is Metric.ACCURACY
    return score.original - score.candidate if score and accuracy else None


def _top5(report: Report) -> float | None:
    if report.validation is None or report.validation.top_k != 5:
        return None
    return _worst(min, lambda output: output.agreement_top_k)(report)


def _integer_share(report: Report) -> float | None:
    return report.audit.share if report.audit else None


def _size_ratio(report: Report) -> float | None:
    return report.result.size / report.source.size if report.result else None


def _latency_ratio(report: Report) -> float | None:
    return report.measured.latency.ratio if report.measured.latency else None


def _memory_ratio(report: Report) -> float | None:
    source, result = report.measured.source, report.measured.result
    if source is None or result is None or not source.peak_memory:
        return None
    return result.peak_memory / source.peak_memory


READERS: Mapping[str, Reader] = {
    "sqnr": _worst(min, lambda output: output.sqnr),
    "cosine": _worst(min, lambda output: output.cosine),
    "max_error": _worst(max, lambda output: output.max_error),
    "top1_agreement": _worst(min, lambda output: output.agreement),
    "top5_agreement": _top5,
    "accuracy": _worst(min, _accuracy),
    "accuracy_drop": _worst(max, _accuracy_drop),
    "integer_share": _integer_share,
    "size_ratio": _size_ratio,
    "latency_ratio": _latency_ratio,
    "memory_ratio": _memory_ratio,
}
"""How to read each metric of `gates.METRICS` from a report; None where it was not measured."""

MEASURED = frozenset({"latency_ratio", "memory_ratio"})
"""Metrics of a clock or a process: other figures are the same for the same inputs."""

QUALITY = set(READERS) - MEASURED - {"integer_share", "size_ratio"}
_NO_DATA = "the model was not validated on data, or no output has this figure"
_LACKING = {
    "top1_agreement": "no output looks like class scores, or there was no data",
    "top5_agreement": "no output looks like scores of more than five classes, or there was no data",
    "accuracy": "there are no labels that fit an output as classes",
    "accuracy_drop": "there are no labels that fit an output as classes",
    "integer_share": "what ONNX Runtime makes of the model was not read back",
    "size_ratio": "nothing was written",
    "latency_ratio": "the models were not timed",
    "memory_ratio": "memory was not measured",
}
