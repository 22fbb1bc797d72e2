"""The main job: try what may help, measure each variant, keep the best, and never a worse one."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

from onnxcompress import schemes, targets
from onnxcompress.api import SAMPLES, as_data, observer
from onnxcompress.budget import Budget, largest_loss
from onnxcompress.comparison import to_compare_on
from onnxcompress.contract import Pass
from onnxcompress.data import Images
from onnxcompress.errors import DataError, GateError, InputError
from onnxcompress.gates import Gate
from onnxcompress.measure import Measurement
from onnxcompress.mixed import Mixed, mix
from onnxcompress.model_io import check_writable, load, save
from onnxcompress.pipeline import Outcome, run
from onnxcompress.recipe import Recipe
from onnxcompress.regions import memory_bound
from onnxcompress.report import Attempt, Measured, ModelFile, Report, check
from onnxcompress.targets import Target
from onnxcompress.variants import (
    Stage,
    Variant,
    judge,
    names_classes,
    record,
    set_beside,
    silent,
    story,
    versions,
)
from onnxcompress.worth import GAIN, affordable, choose, differs

Scheme = Literal["auto", "static", "dynamic", "weights", "float16", "bfloat16", "float8", "none"]
Passes = tuple[Pass, ...]

_HELD_OUT: Final = 0.2
_SCREEN: Final = 32
"""Runs of a few feeds that look for the layers that make nearly all of the noise."""
_EXACT: Final = "exact rewrites only"
_ELSEWHERE: Final = (
    "this machine does not run {}: nothing was timed, latency and memory decide nothing, and "
    "results were compared as they are written"
)
_UNPROVEN: Final = (
    "this machine has not the kernels of {}, so it was not compared, and what did not run is not "
    "believed; `quantize` writes it all the same ({})"
)
_AS_IT_CAME: Final = "no variant passed the gates: the output is the model as it came"


def compress(
    source: str | Path,
    output: str | Path,
    *,
    calibrate: Any = None,
    evaluate: Any = None,
    recipe: Recipe | None = None,
    target: str = "cpu",
    scheme: Scheme = "auto",
    bits: int | None = None,
    block_size: int | None = None,
    effort: schemes.Effort = "thorough",
    gates: Sequence[Gate] = (),
    max_drop: float | None = None,
    min_sqnr: float | None = None,
    images: Images | None = None,
    samples: int = SAMPLES,
    threads: int = 1,
    stage: Stage | None = None,
) -> Report:
    """Compress the model at `source` and write the best variant that passes the gates to `output`.

    Tries static and dynamic quantization and the exact rewrites alone; or the recipe or scheme
    that was asked for, and the exact rewrites where it fails. Where static quantization loses more
    than the gates allow, activations take 16 bits if the target has kernels for them, and then
    layers go back to float until it holds (`mixed.mix`). Each variant is saved, run beside the
    original on held-out data, and timed in turns with it. Of those that pass all gates the one
    with the least product of latency and size is kept; among equals, the most faithful; with no
    gate or budget given, one that is far more faithful for little more (`worth`), for which the
    few layers that make nearly all of the error are tried in float. Where none passes the default
    gates, the model is written as it came. For a target that this machine does
    not run nothing is timed, and latency decides nothing.

    Args:
        calibrate: data that static quantization observes; without it only dynamic is tried.
        evaluate: data to compare on; the last fifth of `calibrate` is held out when None, and
            made-up inputs are used where there is no data at all.
        recipe: passes to run in place of the schemes, with its own gates and target.
        effort: what static quantization does against its error; see `schemes.static`.
        scheme: try only this one; "weights" leaves the arithmetic in float, "float16" and
            "bfloat16" too where the target has no kernels for them, "float8" is for targets that
            have, "none" applies the exact rewrites alone.
        bits: of a weight, 4 or 8, with the scheme "weights".
        block_size: values that share a scale, with the scheme "weights".
        gates: bounds that the result must hold; `Budget.default_gates` when empty.
        max_drop: accuracy that may be lost or, without labels, share of decisions that may differ.
        min_sqnr: signal to noise that each output must keep, in dB. A budget takes the place of
            the default gates on quality, and joins gates that were given.
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
    blocks = {"bits": bits, "block_size": block_size}
    blocks = {name: value for name, value in blocks.items() if value is not None}
    if blocks and scheme != "weights":
        raise InputError(f"{next(iter(blocks))} belongs to the weights scheme: leave it out")
    job = _Job(
        source=Path(source),
        target=recipe.target if recipe else target,
        gates=(*(recipe.gates if recipe else ()), *gates),
        budget=Budget(max_drop=max_drop, min_sqnr=min_sqnr),
        samples=samples,
        threads=threads,
        stage=stage or silent,
    )
    with job.timed("load"):
        job.open(calibrate, evaluate, images)
    asked = recipe is not None or scheme != "auto"
    for name, passes in job.plans(recipe, scheme, effort, blocks):
        if asked and job.passing():
            break
        job.attempt(name, passes)
        job.check_budget()
        job.widen(effort)
        job.mix()
    if recipe is None:
        job.refine()
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
    measured = replace(report.measured, seconds=dict(job.seconds))
    return replace(report, result=ModelFile.of(Path(output)), measured=measured)


@dataclass(kw_only=True)
class _Job:
    """What the attempts share, and what came of them."""

    source: Path
    target: str
    gates: tuple[Gate, ...]
    budget: Budget
    samples: int
    threads: int
    stage: Stage
    by_default: bool = False
    """Whether the gates are the default ones: then there is always something to write."""
    alone: Measurement | None = None
    seconds: dict[str, float] = field(default_factory=dict[str, float])
    notes: list[str] = field(default_factory=list[str])
    attempts: list[Attempt] = field(default_factory=list[Attempt])
    variants: list[Variant] = field(default_factory=list[Variant])
    classes: bool = False
    """Whether the evaluation data has labels that name classes."""
    mixed: Mixed | None = None
    """The search for layers to return to float, if there was one."""

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
        self.evaluation, notes = to_compare_on(held_out, self.model, self.samples)
        self.notes += (*(self.calibration.notes if self.calibration else ()), *notes)
        if not self.runtime.measurable:
            self.notes.append(_ELSEWHERE.format(self.target))
        self.classes = names_classes(self.evaluation)
        self.by_default = not self.gates
        self.gates = self.budget.joined(
            self.gates, classes=self.classes, timed=self.runtime.measurable
        )
        self.original = ModelFile.of(self.source)

    def plans(
        self,
        recipe: Recipe | None,
        scheme: Scheme,
        effort: schemes.Effort,
        blocks: Mapping[str, int],
    ) -> Iterator[tuple[str, Passes]]:
        """The variants to try, by name, the exact rewrites last."""
        kernels = {"static": self.runtime.kernels, "dynamic": self.runtime.dynamic}
        if recipe is None and not kernels.get(scheme, True):
            raise InputError(f"target {self.target!r} has no kernels for the {scheme} scheme")
        if recipe is not None:
            yield "recipe", recipe.passes
        elif scheme in ("auto", "static") and kernels["static"]:
            if self.calibration is not None:
                yield "static", schemes.static(self.target, effort)
            elif scheme == "static":
                raise InputError("the static scheme needs calibration data: give some")
        if recipe is None and scheme in ("auto", "dynamic") and kernels["dynamic"]:
            yield "dynamic", schemes.dynamic(self.target)
        if recipe is None and scheme == "auto" and (found := self.by_region(effort)):
            yield found
        if recipe is None and scheme == "weights":
            yield "weights", schemes.weights(self.target, **blocks)
        if recipe is None and scheme in ("float16", "bfloat16"):
            yield scheme, schemes.half(scheme, self.target)
        if recipe is None and scheme == "float8":
            passes = schemes.float8(self.target)
            if self.calibration is None:
                raise InputError("the float8 scheme needs calibration data: give some")
            yield scheme, passes
        yield _EXACT, schemes.exact()

    def by_region(self, effort: schemes.Effort) -> tuple[str, Passes] | None:
        """The best scheme so far with 4-bit weights where products wait for memory, if any do."""
        kinds = {"static": partial(schemes.static, effort=effort), "dynamic": schemes.dynamic}
        best = self.best() if self.passing() else None
        if best is None or best.scheme not in kinds or not self.runtime.measurable:
            return None
        try:
            with self.timed("regions"):
                feed = next(iter(self.evaluation))
                packed = memory_bound(
                    self.model,
                    best.outcome.model,
                    feed,
                    target=self.target,
                    threads=self.threads,
                )
        except InputError:  # what cannot be profiled stays in one scheme
            return None
        name = f"{best.scheme}, large products in 4 bits"
        return (name, kinds[best.scheme](self.target, packed=packed)) if packed else None

    def attempt(self, name: str, passes: Passes) -> None:
        """Make a variant and measure it beside the original; a model it cannot make is noted."""
        data = self.calibration
        progress = self.stage(f"{name}: rewriting")
        watch = None if data is None else observer(data, self.samples, progress)
        try:
            with self.timed(f"{name}: passes"):
                outcome = run(self.model, passes, observer=watch)
            self._measure(name, outcome)
        except InputError as error:
            if name == _EXACT or isinstance(error, DataError):
                raise
            self.attempts.append(Attempt(scheme=name, kept=False, because=str(error)))

    @property
    def runtime(self) -> Target:
        return targets.load(self.target)

    def check_budget(self) -> None:
        """See that the budget bounds something that this model has.

        Raises:
            InputError: if it does not.
        """
        asked = self.budget.gates(classes=self.classes)
        for result in self.variants[-1].report.gates if self.variants else ():
            if result.gate in asked and result.figure is None:
                raise InputError(f"the budget cannot be held: {result.reason}")

    def widen(self, effort: schemes.Effort) -> None:
        """Where static int8 misses a gate on quality, try activations of 16 bits: all integers."""
        found = (d for d in self.runtime.activations.alternatives if d.endswith("16"))
        wide, variant = next(found, None), self.variants[-1] if self.variants else None
        if wide and variant and variant.scheme == "static" and variant.misses_quality:
            passes = schemes.static(self.target, effort, activations=wide)
            self.attempt(f"static, {wide} activations", passes)

    def mix(self) -> None:
        """Return layers of the last variant to float where it misses a gate on quality."""
        variant = self.variants[-1] if self.variants else None
        if not self.mixed and variant and variant.misses_quality:
            self._return_layers(variant, self.gates)

    def refine(self) -> None:
        """Return the few layers that make nearly all of the noise, where that may be worth it."""
        if self.mixed or not self.faithful or not self.passing():
            return
        best = self.best()
        if differs(best.report.validation):
            better = Gate("sqnr", ">=", best.sqnr + GAIN)
            most = affordable(best.latency)
            self._return_layers(best, (*self.gates, better), most=most, runs=_SCREEN)

    def _return_layers(self, variant: Variant, gates: Sequence[Gate], **limits: Any) -> None:
        """Try `variant` with as few layers in float as these gates on quality take."""
        if self.calibration is None:
            return
        name = f"{variant.scheme}, some layers in float"
        try:
            with self.timed(f"{name}: search"):
                expected = record(self.source, self.evaluation)
                outcome, self.mixed = mix(
                    variant.outcome,
                    self.target,
                    self.calibration,
                    lambda model: judge(
                        self.source, model, self.evaluation, gates, expected, self.runtime
                    ),
                    min_sqnr=max((g.bound for g in gates if g.metric == "sqnr"), default=None),
                    max_loss=largest_loss(gates),
                    stage=lambda part: self.stage(f"{name}: {part}"),
                    **limits,
                )
            if outcome is not None:
                self._measure(name, outcome)
        except InputError as error:
            if isinstance(error, DataError):
                raise
            self.attempts.append(Attempt(scheme=name, kept=False, because=str(error)))

    def _measure(self, name: str, outcome: Outcome) -> None:
        """Save the variant, run it beside the original and hold the gates."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / self.source.with_suffix(".onnx").name
            save(outcome.model, path)
            try:
                measured = set_beside(
                    self.source,
                    path,
                    self.evaluation,
                    threads=self.threads,
                    stage=lambda part: self.stage(f"{name}: {part}"),
                    source=self.alone,
                    target=self.runtime,
                )
            except InputError as error:
                if self.runtime.measurable or isinstance(error, DataError):
                    raise
                reason = str(error).replace(str(path), "it")
                raise InputError(_UNPROVEN.format(self.target, reason)) from error
        self.alone = measured.measured.source
        for part, seconds in measured.measured.seconds.items():
            self.seconds[f"{name}: {part}"] = seconds
        report = replace(
            measured,
            verb="compress",
            source=self.original,
            target=self.target,
            passes=outcome.records,
        )
        gated = replace(report, gates=check(self.gates, report))
        self.variants.append(Variant(scheme=name, outcome=outcome, report=gated))

    def passing(self) -> list[Variant]:
        """The variants that meet all gates."""
        return [v for v in self.variants if not v.refusal]

    @property
    def faithful(self) -> bool:
        """Whether fidelity counts beyond the gates: nobody said what is enough, and price shows."""
        return self.by_default and self.budget == Budget() and self.runtime.measurable

    def best(self) -> Variant:
        """Of the variants that pass, the one that is chosen; else the first."""
        passing = self.passing()
        return choose(passing, faithful=self.faithful) if passing else self.variants[0]

    def report(self, best: Variant | None) -> Report:
        """The report of the variant that is kept, or of none, with the story of the others."""
        if best is None:
            self.notes.append(_AS_IT_CAME)
        bare = Report(verb="compress", source=self.original, target=self.target)
        return replace(
            best.report if best else bare,
            attempts=(*self.attempts, *story(self.variants, best)),
            mixed=self.mixed and replace(self.mixed, kept=best is not None and best.is_mixed),
            notes=tuple(self.notes),
            versions=versions(),
            measured=replace(
                best.report.measured if best else Measured(), seconds=dict(self.seconds)
            ),
        )

    @contextmanager
    def timed(self, name: str) -> Generator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin
