"""A variant of a model: how it was made, what was measured of it, and why it is kept or not."""

from __future__ import annotations

import dataclasses
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import onnx_ir as ir

from onnxcompress.budget import largest_loss
from onnxcompress.contract import Array
from onnxcompress.data import Data
from onnxcompress.errors import InputError
from onnxcompress.gates import Gate
from onnxcompress.measure import Measurement, measure
from onnxcompress.measure.latency import paired_latency
from onnxcompress.mixed import Mixed, Verdict, mix, returned
from onnxcompress.model_io import load
from onnxcompress.observe import Progress
from onnxcompress.pipeline import Outcome
from onnxcompress.report import Attempt, Measured, ModelFile, Report, check
from onnxcompress.report.gating import QUALITY, READERS
from onnxcompress.session import Feed, Session
from onnxcompress.targets import Target
from onnxcompress.validation import Validation, compare
from onnxcompress.validation.audit import Audit, audit

Stage = Callable[[str], Progress]
"""Told the name of each stage; gives back what is told of the stage's progress."""

ALIKE: Final = 1.03
"""Two runs of one model differ by as much."""

_LATENCY_SECONDS: Final = 4.0
_MOST_RECORDED: Final = 1 << 28


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """What one way of compressing made, and the report of it beside the original."""

    scheme: str
    outcome: Outcome
    report: Report

    @property
    def refusal(self) -> str:
        """The first gate that it misses, as a sentence; empty where it misses none."""
        return next((gate.reason for gate in self.report.gates if not gate.passed), "")

    @property
    def misses_quality(self) -> bool:
        """Whether a gate that it misses bounds what it computes, not what that costs."""
        return any(not g.passed and g.gate.metric in QUALITY for g in self.report.gates)

    @property
    def is_mixed(self) -> bool:
        """Whether some of its layers were returned to float, not none or all."""
        nodes = (r.options["nodes"] for r in self.outcome.records if r.name == "restore_float")
        return any(names != ("*",) for names in nodes)

    @property
    def latency(self) -> float:
        """Over the original's."""
        latency = self.report.measured.latency
        return latency.ratio if latency else 1.0

    @property
    def size(self) -> float:
        """Bytes over the original's."""
        assert self.report.result
        return self.report.result.size / self.report.source.size

    @property
    def cost(self) -> float:
        """Latency times size, over the original's."""
        return self.latency * self.size

    @property
    def sqnr(self) -> float:
        """Of the worst output, in dB."""
        return _sqnr(self.report)


Outputs = Sequence[Mapping[str, Array]]


def record(source: Path, evaluation: Iterable[Feed]) -> Outputs | None:
    """The original's outputs on every feed; None where they are too much to keep."""
    session = Session(source, spinning=False)
    outputs: list[Mapping[str, Array]] = []
    size = 0
    for feed in evaluation:
        outputs.append(session.run(feed))
        size += sum(getattr(array, "nbytes", 0) for array in outputs[-1].values())
        if size > _MOST_RECORDED:
            return None
    return outputs


def judge(original: ModelFile, validation: Validation, gates: Iterable[Gate]) -> Verdict:
    """Hold a candidate against the gates on quality alone, which ask for no timing."""
    report = Report(verb="compress", source=original, validation=validation)
    held = check((gate for gate in gates if gate.metric in QUALITY), report)
    return Verdict(
        passed=all(gate.passed for gate in held),
        sqnr=_sqnr(report),
        loss=_loss(report),
    )


def return_layers(
    variant: Variant,
    source: Path,
    target: Target,
    calibration: Data,
    evaluation: Data | Sequence[Feed],
    gates: Sequence[Gate],
    **options: Any,
) -> tuple[Outcome | None, Mixed | None]:
    """Return as few layers of `variant` to float as the gates on quality take.

    Args:
        options: those of `mix`.
    """

    @cache
    def expected() -> Outputs | None:
        return record(source, evaluation)

    def verdict(model: ir.Model) -> Verdict:
        validation = compare(
            source,
            model,
            evaluation,
            layers=False,
            expected=expected(),
            as_written=not target.measurable,
        )
        return judge(variant.report.source, validation, gates)

    return mix(
        variant.outcome,
        target.name,
        calibration,
        verdict,
        min_sqnr=max((g.bound for g in gates if g.metric == "sqnr"), default=None),
        max_loss=largest_loss(gates),
        **options,
    )


def all_in_float(variant: Variant, target: str) -> Outcome:
    """`variant` with its weights as integers in the file, and all arithmetic in float."""
    return returned(variant.outcome, target, ("*",), ("*",))


def set_beside(
    original: Path,
    candidate: Path,
    evaluation: Data | Sequence[Feed],
    *,
    threads: int,
    stage: Stage,
    source: Measurement | None = None,
    target: Target | None = None,
    timed: bool = True,
) -> Report:
    """Quality, size, latency and memory; `source` is the original by itself, if measured before.

    For a `target` that this machine is not, time and memory would say nothing, so they are left
    out, and the candidate runs as it is written. With `timed` off they are left out too.
    """
    here = target is None or target.measurable
    timed = timed and here
    begin = time.perf_counter()
    feeds = _watched(evaluation, len(evaluation), stage("comparing"))
    labels = evaluation.labels if isinstance(evaluation, Data) else None
    validation = compare(original, candidate, feeds, labels=labels, as_written=not here)
    middle = time.perf_counter()
    feed = next(iter(evaluation))
    latency = result = None
    if timed:
        stage("timing")(0, None)
        latency = paired_latency(
            original, candidate, feed, threads=threads, seconds=_LATENCY_SECONDS
        )
    end = time.perf_counter()
    seconds = {"validate": middle - begin, "latency": end - middle}
    audited, warnings = _audited(candidate, feed, target)
    seconds["audit"] = time.perf_counter() - end
    if timed:
        source = source or _alone(original, feed, threads)
        result = _alone(candidate, feed, threads)
    return Report(
        verb="validate",
        source=ModelFile.of(original),
        result=ModelFile.of(candidate),
        validation=validation,
        audit=audited,
        warnings=warnings,
        measured=Measured(latency=latency, source=source, result=result, seconds=seconds),
    )


def _audited(path: Path, feed: Feed, target: Target | None) -> tuple[Audit | None, tuple[str, ...]]:
    """What runs on integers, or the warning that it cannot be told."""
    try:
        return audit(load(path), feed, target), ()
    except InputError as error:
        return None, (f"how much of {path.name} runs on integers cannot be told: {error}",)


def because(variant: Variant, best: Variant | None) -> str:
    """The variant's figures, and why it was kept or not, in one line."""
    quality = "exact" if variant.sqnr == float("inf") else f"SQNR {variant.sqnr:.1f} dB"
    timed = variant.report.measured.latency
    latency = f"{variant.latency:.2f}x the latency, " if timed else ""
    figures = f"{variant.size:.2f}x the size, {latency}{quality}"
    if variant.refusal:
        return f"{figures}; {variant.refusal}"
    if best is None or variant is best:
        return f"{figures}; passes all gates"
    if best.cost > variant.cost * ALIKE:
        price = 100 * (best.cost / variant.cost - 1)
        return f"{figures}; {best.scheme} has {_more(best, variant)} for {price:.0f} % more"
    smaller, faster = best.size * ALIKE < variant.size, best.latency * ALIKE < variant.latency
    words = [w for w, true in (("smaller", smaller), ("faster", faster)) if true]
    return f"{figures}; {best.scheme} is {' and '.join(words) or 'as small and fast, and no worse'}"


def story(variants: Iterable[Variant], best: Variant | None) -> Iterator[Attempt]:
    """What is told of each variant beside the one that is chosen."""
    for v in variants:
        kept = v is best and not v.refusal
        yield Attempt(scheme=v.scheme, kept=kept, because=because(v, best))


def _more(best: Variant, variant: Variant) -> str:
    gain = best.sqnr - variant.sqnr
    return "no error" if gain == float("inf") else f"{gain:.1f} dB"


def _sqnr(report: Report) -> float:
    sqnr = READERS["sqnr"](report)
    return float("inf") if sqnr is None else sqnr


def _loss(report: Report) -> float | None:
    """Accuracy that is lost; without labels the share of decisions that differ."""
    drop, agreement = READERS["accuracy_drop"](report), READERS["top1_agreement"](report)
    return drop if drop is not None or agreement is None else 1 - agreement


def _alone(path: Path, feed: Feed, threads: int) -> Measurement:
    found = measure(path, feed, threads=threads, seconds=0.0)
    return dataclasses.replace(found, path=path.name)  # the folder is nobody's business


def silent(name: str) -> Progress:
    """A `Stage` that tells nobody."""
    return lambda done, total: None


def _watched(data: Iterable[Feed], total: int | None, progress: Progress) -> Iterator[Feed]:
    for done, feed in enumerate(data):
        progress(done, total)
        yield feed


def versions() -> dict[str, str]:
    """Of Python and the packages that a result depends on."""
    packages = ("onnxcompress", "onnxruntime", "onnx", "onnx-ir", "onnxscript", "numpy")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}
