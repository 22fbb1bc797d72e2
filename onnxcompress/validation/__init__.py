"""Runs two models side by side on the same feeds and says how far they are apart.

Any two models of one interface: what this toolkit wrote, or what another did.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.contract import Array
from onnxcompress.errors import InputError
from onnxcompress.model_io import load
from onnxcompress.numerics.decisions import Agreement, Score, Scorer
from onnxcompress.numerics.fidelity import Fidelity, decibel
from onnxcompress.session import Feed, Session
from onnxcompress.validation.class_scores import gives_class_scores
from onnxcompress.validation.layers import Layer, LayerTaps

_KERNEL_LOSS = 3.0
"""dB from which on what ONNX Runtime made of the candidate is told apart from the candidate."""
_NEGLIGIBLE = 60.0
"""dB above which such a loss changes nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputFigures:
    """How one output of the candidate compares with the original's, over all feeds.

    Figures are None where the output has none: all of them where it was `skipped`.
    """

    name: str
    skipped: str = ""
    """Why nothing was compared; empty where it was."""
    max_error: float | None = None
    """Largest absolute error of an element."""
    max_relative: float | None = None
    """The same as a share of the original's largest magnitude."""
    sqnr: float | None = None
    """10·log10(Σ original² / Σ error²), in dB; infinite where exact."""
    cosine: float | None = None
    agreement: float | None = None
    """Share of equal decisions (`numerics.decisions`): top-1 for class scores."""
    ranked: bool = False
    """Whether the output was read as class scores, of which the largest decides."""
    agreement_top_k: float | None = None
    """Share of samples whose original class is among the candidate's best k."""
    score: Score | None = None
    """Against the labels, where there are some that fit."""
    broken: int = 0
    """Elements that are NaN or infinite in the candidate only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """The comparison of a candidate with its original."""

    feeds: int
    top_k: int
    outputs: tuple[OutputFigures, ...]
    layers: tuple[Layer, ...] = ()
    """Tensors in common, in graph order; empty where they were not asked for."""
    failures: tuple[str, ...] = ()
    """What makes the candidate unusable, a sentence each: NaN, infinities, other shapes."""
    warnings: tuple[str, ...] = ()

    def worst_layers(self, count: int = 10) -> list[Layer]:
        """The layers that added most noise, worst first."""
        ranked = sorted(self.layers, key=lambda layer: -layer.added)
        return [layer for layer in ranked[:count] if layer.added > 0]


def compare(
    original: ir.Model | Path | str,
    candidate: ir.Model | Path | str,
    data: Iterable[Feed],
    *,
    labels: npt.ArrayLike | None = None,
    top_k: int = 5,
    layers: bool = True,
    layer_feeds: int = 8,
    names: Mapping[str, str] | None = None,
    threads: int = 0,
    as_written: bool = False,
    expected: Iterable[Mapping[str, Array]] | None = None,
) -> Validation:
    """Compare `candidate` with `original` on every feed of `data`, which is read once.

    Memory holds one feed and its outputs at a time. An output's floats are read as class scores
    where they have two axes and the graph does not say otherwise, or three and it says so
    (`class_scores`).

    Args:
        data: arrays by input name, a dict for each run.
        labels: the target of each sample, in the order of the feeds: classes, binary decisions
            or values; `data.labels` when None and the data has it.
        top_k: the k of `OutputFigures.agreement_top_k`.
        layers: also compare the tensors that both models have in common.
        layer_feeds: feeds that are run for that, the first ones.
        names: the candidate's name of a tensor by the original's, where they differ.
        threads: threads of one operator; 0 leaves the choice to ONNX Runtime.
        as_written: run the candidate's graph operator by operator, as a runtime without this
            machine's integer kernels (whose sums may saturate) would.
        expected: the original's outputs for each feed, where it was run before.

    Raises:
        InputError: if the interfaces differ, a model or feed does not run, there is no feed, or
            the labels are not as many as the samples.
    """
    a, b = _load(original), _load(candidate)
    check_interface(a, b)
    targets = _labels(getattr(data, "labels", None) if labels is None else labels)
    outputs = {v.name or "": _Output(v, targets, top_k) for v in a.graph.outputs}
    warnings: list[str] = []
    taps = _taps(a, b, names or {}, threads, warnings) if layers else None
    run_a = None if expected is not None else _session(original, threads)
    run_b = _session(candidate, threads, as_written=as_written)
    recorded = iter(expected or ())
    feeds = 0
    for feed in data:
        exact = next(recorded) if run_a is None else run_a.run(feed)
        found = run_b.run(feed)
        for name, output in outputs.items():
            output.update(exact[name], found[name])
        if taps and feeds < layer_feeds:
            taps.update(feed)
            for output in outputs.values():
                output.mark()
        feeds += 1
    if not feeds:
        raise InputError("there are no feeds to validate on: give data with at least one sample")
    compared = tuple(output.figures() for output in outputs.values())
    return Validation(
        feeds=feeds,
        top_k=top_k,
        outputs=compared,
        layers=taps.layers() if taps else (),
        failures=tuple(f for output in outputs.values() for f in output.failures()),
        warnings=(
            *warnings,
            *_kernel_losses(outputs, taps),
            *_unused_labels(compared, targets),
        ),
    )


def check_interface(original: ir.Model, candidate: ir.Model) -> None:
    """Check that both models take the same feeds and give the same outputs.

    Shapes agree where a dimension is symbolic or unknown on either side.

    Raises:
        InputError: naming the first input or output that differs, and how.
    """
    sides = (original.graph, candidate.graph)
    inputs = [[v for v in g.inputs if v.name not in g.initializers] for g in sides]
    for what, a, b in (("input", *inputs), ("output", *(g.outputs for g in sides))):
        ours, theirs = ({v.name: v for v in values} for values in (a, b))
        for name in dict.fromkeys((*ours, *theirs)):
            x, y = _describe(ours.get(name)), _describe(theirs.get(name))
            if name not in ours or name not in theirs or not _fits(ours[name], theirs[name]):
                raise InputError(
                    f"the models cannot be compared: {what} {name!r} is {x} in the original "
                    f"and {y} in the candidate"
                )


class _Output:
    """Accumulates everything about one output."""

    def __init__(self, value: ir.Value, labels: Array | None, top_k: int) -> None:
        self.name = value.name or ""
        self.fidelity = Fidelity()
        self.marked = 0.0
        """Noise to signal when `mark` was called last."""
        self._agreement = Agreement(top_k, gives_class_scores(value))
        self._scorer = None if labels is None else Scorer(labels)
        self._skipped = ""
        self._shapes = ""

    def update(self, original: Array, candidate: Array) -> None:
        """Add the output of one feed; either may be anything that ONNX Runtime returns."""
        if self._skipped or self._shapes:
            return
        self._skipped = _incomparable(original) or _incomparable(candidate)
        if self._skipped:
            return
        if original.shape != candidate.shape:
            self._shapes = f"{list(original.shape)} in the original, {list(candidate.shape)} in"
            return
        self.fidelity.update(original, candidate)
        self._agreement.update(original, candidate)
        if self._scorer:
            self._scorer.update(original, candidate)

    def mark(self) -> None:
        """Remember the error so far, to hold it against the tapped run of the same feeds."""
        self.marked = self.fidelity.noise_to_signal

    def failures(self) -> list[str]:
        """What makes the candidate unusable, a sentence each."""
        found: list[str] = []
        if self.fidelity.broken:
            found.append(
                f"output {self.name!r} of the candidate has {self.fidelity.broken} NaN or "
                "infinite elements where the original's are finite"
            )
        if self._shapes:
            found.append(f"output {self.name!r} has another shape: {self._shapes} the candidate")
        return found

    def figures(self) -> OutputFigures:
        """What was found.

        Raises:
            InputError: if the labels fit this output but are not as many as its samples.
        """
        if self._skipped or self._shapes:
            return OutputFigures(name=self.name, skipped=self._skipped or "shapes differ")
        return OutputFigures(
            name=self.name,
            max_error=self.fidelity.max_error,
            max_relative=self.fidelity.max_relative,
            sqnr=self.fidelity.sqnr,
            cosine=self.fidelity.cosine,
            agreement=self._agreement.equal,
            ranked=self._agreement.ranked,
            agreement_top_k=self._agreement.top_k,
            score=self._score(),
            broken=self.fidelity.broken,
        )

    def _score(self) -> Score | None:
        score = self._scorer.score if self._scorer else None
        if self._scorer and score and self._scorer.used != len(self._scorer.labels):
            raise InputError(
                f"there are {len(self._scorer.labels)} labels but output {self.name!r} gave "
                f"{self._scorer.used} samples: give one label for each sample, in their order"
            )
        return score


def _taps(
    original: ir.Model,
    candidate: ir.Model,
    names: Mapping[str, str],
    threads: int,
    warnings: list[str],
) -> LayerTaps | None:
    """The taps, or a warning: a model that runs need not run with its insides given out."""
    try:
        return LayerTaps(original, candidate, names, threads=threads)
    except InputError as error:
        warnings.append(f"layers were not compared: {error}")
        return None


def _kernel_losses(outputs: Mapping[str, _Output], taps: LayerTaps | None) -> list[str]:
    """Outputs that ONNX Runtime's optimized candidate computes worse than the graph says.

    The taps run the graph as written. Integer kernels that saturate, and fusions that quantize
    what was left in float, show as a difference.
    """
    found: list[str] = []
    for name, output in outputs.items():
        written = taps.sqnr(name) if taps else None
        ran = decibel(output.marked)
        if written is not None and written - ran > _KERNEL_LOSS and ran < _NEGLIGIBLE:
            found.append(
                f"output {name!r} has {ran:.1f} dB as ONNX Runtime runs it here but "
                f"{written:.1f} dB as the graph is written: its integer kernels or its own "
                "rewrites lose the rest"
            )
    return found


def _unused_labels(outputs: Sequence[OutputFigures], labels: Array | None) -> list[str]:
    if labels is None or any(output.score for output in outputs):
        return []
    return [f"labels of shape {list(labels.shape)} fit no output, so there is no accuracy"]


def _labels(labels: npt.ArrayLike | None) -> Array | None:
    if labels is None:
        return None
    array = np.asarray(labels)
    if array.ndim < 1 or array.dtype.kind not in "biuf":
        raise InputError(
            f"labels must be an array of numbers with one row for each sample, not "
            f"{array.dtype} of shape {list(array.shape)}"
        )
    return array


def _incomparable(array: object) -> str:
    if not isinstance(array, np.ndarray):
        return "not a tensor: a sequence, a map or nothing"
    kind = cast(Array, array).dtype
    return "" if kind.kind in "biuf" else f"not numeric: {kind}"


def _load(model: ir.Model | Path | str) -> ir.Model:
    return model if isinstance(model, ir.Model) else load(Path(model))


def _session(model: ir.Model | Path | str, threads: int, *, as_written: bool = False) -> Session:
    return Session(
        Path(model) if isinstance(model, str) else model,
        optimization="none" if as_written else "all",
        threads=threads,
        spinning=False,
    )


def _describe(value: ir.Value | None) -> str:
    if value is None:
        return "absent"
    shape = "[?]" if value.shape is None else str(value.shape).replace("Shape", "")
    return f"{value.type} {shape}"


def _fits(a: ir.Value, b: ir.Value) -> bool:
    if a.type is not None and b.type is not None and a.type != b.type:
        return False
    if a.shape is None or b.shape is None:
        return True
    known = ((x, y) for x, y in zip(a.shape, b.shape, strict=False) if _static(x) and _static(y))
    return len(a.shape) == len(b.shape) and all(x == y for x, y in known)


def _static(dimension: object) -> bool:
    return isinstance(dimension, int)
