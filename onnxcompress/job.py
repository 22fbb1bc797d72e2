"""The main job: try what may help, measure each variant, keep the best, and never a worse one."""

from __future__ import annotations

import dataclasses
import platform
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, Literal

import onnx_ir as ir

from onnxcompress import schemes
from onnxcompress.api import SAMPLES, as_data, observer
from onnxcompress.contract import Pass
from onnxcompress.data import Data, Images
from onnxcompress.errors import DataError, GateError, InputError
from onnxcompress.gates import Gate
from onnxcompress.measure import Measurement, measure, random_feed
from onnxcompress.measure.latency import paired_latency
from onnxcompress.model_io import check_writable, load, save
from onnxcompress.observe import Progress
from onnxcompress.pipeline import Outcome, run
from onnxcompress.recipe import Recipe
from onnxcompress.report import Attempt, Measured, ModelFile, Report, check
from onnxcompress.session import Feed
from onnxcompress.validation import compare
from onnxcompress.validation.audit import Audit, audit

Scheme = Literal["auto", "static", "dynamic", "none"]
Passes = tuple[Pass, ...]
Stage = Callable[[str], Progress]
"""Told the name of each stage; gives back what is told of the stage's progress."""

DEFAULT_GATES: Final = (
    Gate("size_ratio", "<=", 1.0),
    Gate("latency_ratio", "<=", 1.03),
    Gate("sqnr", ">=", 10.0),
)
"""Held against every variant when no gate is given; 3 % is what two runs of one model differ by."""
DEFAULT_DROP: Final = Gate("accuracy_drop", "<=", 0.02)
"""Added where there are labels."""

_HELD_OUT: Final = 0.2
_MADE_UP: Final = 8
_MADE_UP_NOTE: Final = "no data was given: models were compared on made-up inputs"
_EXACT: Final = "exact rewrites only"
_AS_IT_CAME: Final = "no variant passed the default gates: the output is the model as it came"
_ALIKE: Final = 1.03
_LATENCY_SECONDS: Final = 4.0


def compress(
    source: str | Path,
    output: str | Path,
    *,
    calibrate: Any = None,
    evaluate: Any = None,
    recipe: Recipe | None = None,
    target: str = "cpu",
    scheme: Scheme = "auto",
    effort: schemes.Effort = "thorough",
    gates: Sequence[Gate] = (),
    images: Images | None = None,
    samples: int = SAMPLES,
    threads: int = 1,
    stage: Stage | None = None,
) -> Report:
    """Compress the model at `source` and write the best variant that passes the gates to `output`.

    Tries static and dynamic quantization and the exact rewrites alone; or the recipe or scheme
    that was asked for, and the exact rewrites where it fails. Each variant is saved, run beside
    the original on held-out data, and timed in turns with it. Of those that pass all gates the one
    with the least product of latency and size is kept; among equals, the most faithful. Where none
    passes the default gates, the model is written as it came.

    Args:
        calibrate: data that static quantization observes; without it only dynamic is tried.
        evaluate: data to compare on; the last fifth of `calibrate` is held out when None, and
            made-up inputs are used where there is no data at all.
        recipe: passes to run in place of the schemes, with its own gates and target.
        effort: what static quantization does against its error; see `schemes.static`.
        scheme: try only this one; "none" applies the exact rewrites alone.
        gates: bounds that the result must hold; `DEFAULT_GATES` when empty.
        images: how an image becomes the input; needed for a folder of images.
        samples: feeds that calibration reads at most.
        threads: threads of one operator while latency is measured.
        stage: told of each stage.

    Raises:
        InputError: if the model, the data or the output cannot be used.
        GateError: if no variant passes the gates that were asked for; nothing was written.
            `GateError.report` has the figures of the first variant.
    """
    check_writable(output)
    job = _Job(
        source=Path(source),
        target=recipe.target if recipe else target,
        gates=(*(recipe.gates if recipe else ()), *gates),
        samples=samples,
        threads=threads,
        stage=stage or _silent,
    )
    with job.timed("load"):
        job.open(calibrate, evaluate, images)
    asked = recipe is not None or scheme != "auto"
    for name, passes in job.plans(recipe, scheme, effort):
        if asked and job.passing():
            break
        job.attempt(name, passes)
    best = job.best()
    report = job.report(best)
    if best.refusal and not job.by_default:
        raise GateError(
            f"{source}: no variant passes the gates, nothing was written: {best.refusal}; "
            "loosen the gate or try another recipe",
            report,
        )
    if best.refusal:
        report = job.report(None)
    with job.timed("save"):
        save(job.model if best.refusal else best.outcome.model, output)
    measured = dataclasses.replace(report.measured, seconds=dict(job.seconds))
    return dataclasses.replace(report, result=ModelFile.of(Path(output)), measured=measured)


def validate(
    original: str | Path,
    candidate: str | Path,
    *,
    data: Any = None,
    gates: Sequence[Gate] = (),
    samples: int = SAMPLES,
    images: Images | None = None,
    threads: int = 1,
    stage: Stage | None = None,
) -> Report:
    """Compare two model files on the same inputs: quality, size and latency, and hold the gates.

    Args:
        data: anything that `open_data` opens; made-up inputs when None.
        samples: feeds to compare on at most.

    Raises:
        InputError: if a model or the data cannot be used or the interfaces differ.
    """
    model = load(original)
    notes: tuple[str, ...] = (_MADE_UP_NOTE,)
    evaluation: Data | list[Feed]
    if data is None:
        evaluation = _made_up(model)
    else:
        opened = as_data(data, model, images)
        evaluation = opened.first(samples)
        notes = (*opened.notes, *_left_out(opened, samples))
    report = _measured(
        Path(original), Path(candidate), evaluation, threads=threads, stage=stage or _silent
    )
    return dataclasses.replace(
        report, gates=check(gates, report), notes=notes, versions=_versions()
    )


def _measured(
    original: Path,
    candidate: Path,
    evaluation: Data | Sequence[Feed],
    *,
    threads: int,
    stage: Stage,
    source: Measurement | None = None,
) -> Report:
    """Quality, size, latency and memory; `source` is the original by itself, if measured before."""
    begin = time.perf_counter()
    feeds = _watched(evaluation, len(evaluation), stage("comparing"))
    labels = evaluation.labels if isinstance(evaluation, Data) else None
    validation = compare(original, candidate, feeds, labels=labels)
    middle = time.perf_counter()
    stage("timing")(0, None)
    feed = next(iter(evaluation))
    latency = paired_latency(original, candidate, feed, threads=threads, seconds=_LATENCY_SECONDS)
    end = time.perf_counter()
    seconds = {"validate": middle - begin, "latency": end - middle}
    audited, warnings = _audited(candidate, feed)
    seconds["audit"] = time.perf_counter() - end
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


def _audited(path: Path, feed: Feed) -> tuple[Audit | None, tuple[str, ...]]:
    """What runs on integers, or the warning that it cannot be told."""
    try:
        return audit(load(path), feed), ()
    except InputError as error:
        return None, (f"how much of {path.name} runs on integers cannot be told: {error}",)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Variant:
    scheme: str
    outcome: Outcome
    report: Report

    @property
    def refusal(self) -> str:
        """The first gate that it misses, as a sentence; empty where it misses none."""
        return next((gate.reason for gate in self.report.gates if not gate.passed), "")

    @property
    def latency(self) -> float:
        latency = self.report.measured.latency
        return latency.ratio if latency else 1.0

    @property
    def size(self) -> float:
        """Bytes over the original's."""
        assert self.report.result
        return self.report.result.size / self.report.source.size

    @property
    def sqnr(self) -> float:
        outputs = self.report.validation.outputs if self.report.validation else ()
        return min((o.sqnr for o in outputs if o.sqnr is not None), default=float("inf"))


@dataclass(kw_only=True)
class _Job:
    """What the attempts share, and what came of them."""

    source: Path
    target: str
    gates: tuple[Gate, ...]
    samples: int
    threads: int
    stage: Stage
    by_default: bool = False
    """Whether the gates are the default ones: then there is always something to write."""
    alone: Measurement | None = None
    seconds: dict[str, float] = field(default_factory=dict[str, float])
    notes: list[str] = field(default_factory=list[str])
    attempts: list[Attempt] = field(default_factory=list[Attempt])
    variants: list[_Variant] = field(default_factory=list[_Variant])

    def open(self, calibrate: Any, evaluate: Any, images: Images | None) -> None:
        """Load the model and open the data, holding some of it out where it serves for both."""
        self.model = load(self.source)
        self.calibration = None if calibrate is None else as_data(calibrate, self.model, images)
        held_out = None if evaluate is None else as_data(evaluate, self.model, images)
        if held_out is None and self.calibration is not None:
            self.calibration, held_out = self.calibration.split(_HELD_OUT)
            self.notes.append(
                f"the last {held_out.size} of {len(self.calibration) + len(held_out)} feeds were "
                "held out of calibration and used to compare"
            )
        for data in (self.calibration, held_out):
            self.notes.extend(data.notes if data else ())
        if held_out is None:
            self.notes.append(_MADE_UP_NOTE)
            self.evaluation: Data | list[Feed] = _made_up(self.model)
        else:
            self.evaluation = held_out.first(self.samples)
            self.notes.extend(_left_out(held_out, self.samples))
        if not self.gates:
            labelled = isinstance(self.evaluation, Data) and self.evaluation.labels is not None
            self.gates = (*DEFAULT_GATES, DEFAULT_DROP) if labelled else DEFAULT_GATES
            self.by_default = True
        self.original = ModelFile.of(self.source)

    def plans(
        self, recipe: Recipe | None, scheme: Scheme, effort: schemes.Effort
    ) -> Iterator[tuple[str, Passes]]:
        """The variants to try, by name, the exact rewrites last."""
        if recipe is not None:
            yield "recipe", recipe.passes
        elif scheme in ("auto", "static"):
            if self.calibration is not None:
                yield "static", schemes.static(self.target, effort)
            elif scheme == "static":
                raise InputError("the static scheme needs calibration data: give some")
        if recipe is None and scheme in ("auto", "dynamic"):
            yield "dynamic", schemes.dynamic(self.target)
        yield _EXACT, schemes.exact()

    def attempt(self, name: str, passes: Passes) -> None:
        """Make a variant and measure it beside the original; a model it cannot make is noted."""
        data = self.calibration
        progress = self.stage(f"{name}: rewriting")
        watch = None if data is None else observer(data, self.samples, progress)
        try:
            with self.timed(f"{name}: passes"):
                outcome = run(self.model, passes, observer=watch)
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / self.source.with_suffix(".onnx").name
                save(outcome.model, path)
                variant = self._measure(name, outcome, path)
        except InputError as error:
            if name == _EXACT or isinstance(error, DataError):
                raise
            self.attempts.append(Attempt(scheme=name, kept=False, because=str(error)))
            return
        self.variants.append(variant)

    def _measure(self, name: str, outcome: Outcome, path: Path) -> _Variant:
        measured = _measured(
            self.source,
            path,
            self.evaluation,
            threads=self.threads,
            stage=lambda part: self.stage(f"{name}: {part}"),
            source=self.alone,
        )
        self.alone = measured.measured.source
        for part, seconds in measured.measured.seconds.items():
            self.seconds[f"{name}: {part}"] = seconds
        report = dataclasses.replace(
            measured,
            verb="compress",
            source=self.original,
            target=self.target,
            passes=outcome.records,
        )
        gated = dataclasses.replace(report, gates=check(self.gates, report))
        return _Variant(scheme=name, outcome=outcome, report=gated)

    def passing(self) -> list[_Variant]:
        """The variants that meet all gates."""
        return [v for v in self.variants if not v.refusal]

    def best(self) -> _Variant:
        """Of the variants that pass, the one of least latency times size; else the first.

        Of several that are alike in that, the most faithful.
        """
        passing = self.passing()
        if not passing:
            return self.variants[0]
        least = min(v.latency * v.size for v in passing)
        alike = (v for v in passing if v.latency * v.size <= least * _ALIKE)
        return max(alike, key=lambda v: v.sqnr)

    def report(self, best: _Variant | None) -> Report:
        """The report of the variant that is kept, or of none, with the story of the others."""
        story = [
            Attempt(scheme=v.scheme, kept=v is best and not v.refusal, because=_because(v, best))
            for v in self.variants
        ]
        if best is None:
            self.notes.append(_AS_IT_CAME)
        bare = Report(verb="compress", source=self.original, target=self.target)
        return dataclasses.replace(
            best.report if best else bare,
            attempts=(*self.attempts, *story),
            notes=tuple(self.notes),
            versions=_versions(),
            measured=dataclasses.replace(
                best.report.measured if best else Measured(), seconds=dict(self.seconds)
            ),
        )

    @contextmanager
    def timed(self, name: str) -> Generator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin


def _because(variant: _Variant, best: _Variant | None) -> str:
    quality = "exact" if variant.sqnr == float("inf") else f"SQNR {variant.sqnr:.1f} dB"
    figures = f"{variant.size:.2f}x the size, {variant.latency:.2f}x the latency, {quality}"
    if variant.refusal:
        return f"{figures}; {variant.refusal}"
    if best is None or variant is best:
        return f"{figures}; passes all gates"
    smaller, faster = best.size * _ALIKE < variant.size, best.latency * _ALIKE < variant.latency
    words = [w for w, true in (("smaller", smaller), ("faster", faster)) if true]
    return f"{figures}; {best.scheme} is {' and '.join(words) or 'as small and fast, and no worse'}"


def _left_out(data: Data, samples: int) -> tuple[str, ...]:
    if data.size is None or data.size <= samples:
        return ()
    return (f"compared on the first {samples} of {data.size} feeds, as many as samples says",)


def _alone(path: Path, feed: Feed, threads: int) -> Measurement:
    found = measure(path, feed, threads=threads, seconds=0.0)
    return dataclasses.replace(found, path=path.name)  # the folder is nobody's business


def _made_up(model: ir.Model) -> list[Feed]:
    return [random_feed(model, seed=seed) for seed in range(_MADE_UP)]


def _silent(name: str) -> Progress:
    return lambda done, total: None


def _watched(data: Iterable[Feed], total: int | None, progress: Progress) -> Iterator[Feed]:
    for done, feed in enumerate(data):
        progress(done, total)
        yield feed


def _versions() -> dict[str, str]:
    packages = ("onnxcompress", "onnxruntime", "onnx", "onnx-ir", "onnxscript", "numpy")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}
