"""What one job tries: the plans, each attempt measured and gated, and what came of them."""

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
from onnxcompress.api import Quantization, as_data, observer, rewrite
from onnxcompress.budget import Budget
from onnxcompress.comparison import names_classes, to_compare_on
from onnxcompress.contract import Pass
from onnxcompress.data import Images
from onnxcompress.errors import DataError, InputError
from onnxcompress.gates import Gate
from onnxcompress.measure import Measurement
from onnxcompress.mixed import Mixed
from onnxcompress.model_io import load, save
from onnxcompress.observe import Progress
from onnxcompress.pipeline import Outcome
from onnxcompress.recipe import Recipe
from onnxcompress.regions import memory_bound
from onnxcompress.report import Attempt, Measured, ModelFile, Report, check
from onnxcompress.targets import Target
from onnxcompress.train.clean import Cleaner
from onnxcompress.variants import (
    Stage,
    Variant,
    all_in_float,
    return_layers,
    set_beside,
    story,
    versions,
)
from onnxcompress.worth import GAIN, affordable, choose, differs

Scheme = Literal["auto", Quantization, "none"]
Passes = tuple[Pass, ...]

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


@dataclass(kw_only=True)
class Job:
    """What the attempts share, and what came of them."""

    source: Path
    target: str
    gates: tuple[Gate, ...]
    budget: Budget
    samples: int
    threads: int
    stage: Stage
    best_effort: bool = False
    """Whether what is quantized is reconstructed too."""
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

    def open(self, calibrate: Any, evaluate: Any, images: Images | None, clean: bool) -> None:
        """Load the model and open the data, holding some of it out where it serves for both."""
        self.model = load(self.source)
        self.calibration, held_out = (
            None if source is None else as_data(source, self.model, images, finite=not clean)
            for source in (calibrate, evaluate)
        )
        if held_out is None and self.calibration is not None:
            self.calibration, held_out = self.calibration.split()
            self.notes.append(
                f"the last {held_out.size} of {len(self.calibration) + len(held_out)} feeds were "
                "held out of calibration and used to compare"
            )
        if clean:  # what is compared on keeps its outliers, or the figures would flatter
            self.calibration = self.calibration and Cleaner().data(self.calibration)[0]
            held_out = held_out and Cleaner(outliers=None).data(held_out)[0]
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
        if recipe is not None:
            yield "recipe", recipe.passes
        else:
            yield from self._quantized(scheme, effort, blocks)
        yield _EXACT, schemes.exact()

    def _quantized(
        self, scheme: Scheme, effort: schemes.Effort, blocks: Mapping[str, int]
    ) -> Iterator[tuple[str, Passes]]:
        """The variants of one scheme, or of all that this target and the data allow.

        Raises:
            InputError: if the target or the data do not allow the one that was asked for.
        """
        kernels = {"static": self.runtime.kernels, "dynamic": self.runtime.dynamic}
        if not kernels.get(scheme, True):
            raise InputError(f"target {self.target!r} has no kernels for the {scheme} scheme")
        if scheme in ("auto", "static") and kernels["static"]:
            if self.calibration is not None:
                yield "static", schemes.static(self.target, effort)
            elif scheme == "static":
                raise InputError("the static scheme needs calibration data: give some")
        if scheme in ("auto", "dynamic") and kernels["dynamic"]:
            yield "dynamic", schemes.dynamic(self.target)
        if scheme == "auto" and (found := self.by_region(effort)):
            yield found
        if scheme == "weights":
            yield "weights", schemes.weights(self.target, **blocks)
        if scheme in ("float16", "bfloat16"):
            yield scheme, schemes.half(scheme, self.target)
        if scheme == "float8":
            passes = schemes.float8(self.target)
            if self.calibration is None:
                raise InputError("the float8 scheme needs calibration data: give some")
            yield scheme, passes

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

    def attempt(self, name: str, passes: Passes) -> Variant | None:
        """Make a variant and measure it beside the original; a model it cannot make is noted."""
        data = self.calibration
        progress = self.stage(f"{name}: rewriting")
        watch = None if data is None else observer(data, self.samples, progress)
        with self._noted(name):
            with self.timed(f"{name}: passes"):
                outcome = rewrite(
                    *(self.model, passes, watch),
                    learn_from=data.first(self.samples) if data and self.best_effort else None,
                    progress=progress,
                )
            return self._measure(name, outcome)
        return None

    @contextmanager
    def _noted(self, name: str) -> Generator[None]:
        """What cannot be made is noted as not kept; without the exact rewrites or data nothing can.

        Raises:
            InputError: for the exact rewrites, or where the data are at fault.
        """
        try:
            yield
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
        held = self.variants[-1].report.gates if self.variants else ()
        self.budget.check(held, classes=self.classes)

    def mend(self, variant: Variant, effort: schemes.Effort) -> None:
        """Where `variant` misses a gate on quality, try wider activations, then layers in float."""
        if variant.scheme == "static" and variant.misses_quality:
            variant = self._widen(effort) or variant
        if not self.mixed and variant.misses_quality:
            self._return_layers(variant, self.gates)

    def _widen(self, effort: schemes.Effort) -> Variant | None:
        """Static with activations of 16 bits, if the target has kernels: all integers still."""
        found = (d for d in self.runtime.activations.alternatives if d.endswith("16"))
        if (wide := next(found, None)) is None:
            return None
        passes = schemes.static(self.target, effort, activations=wide)
        return self.attempt(f"static, {wide} activations", passes)

    def refine(self) -> None:
        """Return the few layers that make nearly all of the noise, where that may be worth it."""
        if self.mixed or not self.faithful or not self.passing():
            return
        best = choose(self.passing(), faithful=False)
        if differs(best.report.validation):
            better = Gate("sqnr", ">=", best.sqnr + GAIN)
            timed = best.report.measured.latency
            most = affordable(timed.high if timed else 1.0)
            self._return_layers(best, (*self.gates, better), most=most, runs=_SCREEN)
            if most == 1 and self.mixed and self.best() is best:
                # Integers gain nearly nothing but space, and some of them were no better.
                self._measure(
                    f"{best.scheme}, all layers in float", all_in_float(best, self.target)
                )

    def _return_layers(self, variant: Variant, gates: Sequence[Gate], **limits: Any) -> None:
        """Try `variant` with as few layers in float as these gates on quality take."""
        if self.calibration is None:
            return
        name = f"{variant.scheme}, some layers in float"
        with self._noted(name):
            with self.timed(f"{name}: search"):
                outcome, self.mixed = return_layers(
                    variant,
                    self.source,
                    self.runtime,
                    self.calibration,
                    self.evaluation,
                    gates,
                    stage=partial(self._part, name),
                    **limits,
                )
            if outcome is not None:
                self._measure(name, outcome)

    def _measure(self, name: str, outcome: Outcome) -> Variant:
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
                    stage=partial(self._part, name),
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
        return self.variants[-1]

    def _part(self, name: str, part: str) -> Progress:
        return self.stage(f"{name}: {part}")

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
        bare = Report(verb="compress", source=self.original, target=self.target)
        return replace(
            best.report if best else bare,
            attempts=(*self.attempts, *story(self.variants, best)),
            mixed=self.mixed and replace(self.mixed, kept=best is not None and best.is_mixed),
            notes=tuple(self.notes if best else [*self.notes, _AS_IT_CAME]),
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
