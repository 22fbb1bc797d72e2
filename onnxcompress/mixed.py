"""Mixed precision under a budget: which kernels go back to float so that the rest may stay int8.

Sources of noise are measured once (`sensitivity`) and bought silent in the order that takes most
noise away for its multiplications (`numerics.purchase`). The shortest beginning of that order
that meets the budget is found by bisection, each candidate validated as it would be written; then
kernels that turn out not to be needed are given back to integers, the costliest first. Where only
what a kernel reads is the trouble, its weight stays integers in the file (`graph.packed_weights`).

Source: ranking by sensitivity and lowering until a budget holds, as accuracy-aware quantization
of NNCF and automatic mixed precision of AIMET do; here noise is bought at a price in arithmetic.
"""

from __future__ import annotations

import glob
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, islice
from typing import Final

import onnx_ir as ir

from onnxcompress import targets
from onnxcompress.graph.pairs import Integers, is_restorable
from onnxcompress.numerics.purchase import Purchase, purchases
from onnxcompress.observe import Progress
from onnxcompress.operators import Role, operator
from onnxcompress.passes.remove_unused import RemoveUnused
from onnxcompress.passes.restore_float import RestoreFloat
from onnxcompress.passes.shield_floats import ShieldFloats
from onnxcompress.pipeline import Outcome, run
from onnxcompress.sensitivity import Source, kernel_name, measure_sources
from onnxcompress.session import Feed
from onnxcompress.targets import Target
from onnxcompress.validation.audit import multiplications

_SPREAD: Final = 0.01
"""Of the arithmetic, shared out evenly: what kernels cost that multiply nothing."""
_GIVE_BACKS: Final = 6
_FEEDS: Final = (2, 32)
_WORK: Final = 1e9
"""Multiplications that one run over the feeds may take, where the least number allows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What validation says of a candidate."""

    passed: bool
    sqnr: float
    """Of the worst output, in dB."""
    loss: float | None = None
    """Accuracy lost or, without labels, decisions that differ, as a share of the samples."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A candidate that was validated."""

    floats: int
    """Kernels that it has in float."""
    share: float
    """Of the multiplications, in kernels that stay on integers."""
    verdict: Verdict
    chosen: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelPart:
    """What one kernel has to do with the error, and what became of it."""

    node: str
    op: str
    noise: float
    """Of all noise at the outputs, the share that its weight and its data's rounding make."""
    macs: int
    floats: bool
    packed: bool = False
    """Whether it computes in float with a weight that is integers in the file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixed:
    """The story of one search."""

    kernels: tuple[KernelPart, ...]
    """Most sensitive first."""
    trials: tuple[Trial, ...]
    """In the order in which they were validated; the first has no kernel in float."""
    feeds: int
    """On which the sources were measured."""
    min_sqnr: float | None = None
    """What the budget asked for, if that."""
    max_loss: float | None = None
    kept: bool = False
    """Whether the candidate that was chosen became the result."""


Judge = Callable[[ir.Model], Verdict]


def mix(
    outcome: Outcome,
    target: str,
    feeds: Iterable[Feed],
    judge: Judge,
    *,
    min_sqnr: float | None = None,
    max_loss: float | None = None,
    most: float = 1.0,
    runs: int | None = None,
    stage: Callable[[str], Progress],
) -> tuple[Outcome | None, Mixed | None]:
    """Return kernels of `outcome` to float until `judge` passes it.

    Args:
        outcome: what static quantization made; its own verdict is the first trial.
        feeds: calibration data to measure sources on; the first few are used.
        judge: validates a candidate against the budget, on data held out of calibration.
        min_sqnr: what the budget asks of `Verdict.sqnr`, if anything. It only tells where to
            begin the search and what to show, as does `max_loss`.
        max_loss: what it asks of `Verdict.loss`.
        most: share of the multiplications that may go to float. Below 1 nothing is validated
            where the estimate says that they do not suffice.
        runs: over the feeds, at most, to measure sources.
        stage: told of the two stages.

    Returns:
        The outcome that passes and keeps most multiplications on integers of those tried, or None
        where even all kernels in float do not pass; and the story, None where there is nothing to
        return to float.

    Raises:
        InputError: if a candidate does not run.
    """
    search = _Search(outcome, targets.load(target), judge)
    if not any(map(is_restorable, search.kernels)):
        return None, None
    used = list(islice(feeds, search.enough(next(iter(feeds)))))
    sources = measure_sources(
        outcome.model, search.target, used, progress=stage("measuring each layer"), runs=runs
    )
    progress = stage("searching")
    search.rank(sources, most)
    first = search.measured(_Choice())
    guess = search.guess(_allowed(first, min_sqnr, max_loss))
    if guess is None and most < 1:
        return None, None
    chosen = search.shortest(guess, progress)
    if chosen is not None:
        chosen = search.pack(search.give_back(chosen, progress), sources, progress)
    story = Mixed(
        kernels=search.parts(sources, chosen or _Choice()),
        trials=search.trials(chosen),
        feeds=len(used),
        min_sqnr=min_sqnr,
        max_loss=max_loss,
    )
    return None if chosen is None else search.outcome(chosen), story


def _allowed(first: Verdict, min_sqnr: float | None, max_loss: float | None) -> float | None:
    """The share of the noise that the budget may leave, by what all of it does.

    Decisions that differ grow with the root of the noise's power.
    """
    found: list[float] = []
    if min_sqnr is not None and math.isfinite(first.sqnr):
        found.append(10 ** ((first.sqnr - min_sqnr) / 10))
    if max_loss is not None and first.loss is not None and first.loss > 0:
        found.append((max_loss / first.loss) ** 2)
    return min(found, default=None)


def returned(
    outcome: Outcome, target: str, nodes: tuple[str, ...], packed: tuple[str, ...]
) -> Outcome:
    """`outcome` with kernels in float: the passes before, and those that return to it.

    Args:
        nodes: patterns of their names.
        packed: of those whose weights stay integers in the file.
    """
    passes = (
        RestoreFloat(target=target, nodes=nodes, packed=packed),
        ShieldFloats(target=target),
        RemoveUnused(),
    )
    done = run(outcome.model, passes)
    return replace(done, records=(*outcome.records, *done.records))


@dataclass(frozen=True, slots=True)
class _Choice:
    """A candidate: kernels by their place in the graph."""

    floats: frozenset[int] = frozenset()
    packed: frozenset[int] = frozenset()
    """Of them, those whose weights stay integers in the file."""


class _Search:
    """Candidates of one outcome, each validated once."""

    def __init__(self, outcome: Outcome, target: Target, judge: Judge) -> None:
        self._outcome = outcome
        self._judge = judge
        self.target = target
        self.kernels = Integers.of(outcome.model.graph, target).kernels
        self._steps: list[Purchase] = []
        self._verdicts: dict[_Choice, Verdict] = {}
        self._macs: list[int] = []
        self._noise = 0.0

    def enough(self, feed: Feed) -> int:
        """How many feeds tell the noise well enough; counts the arithmetic on the way."""
        counted = [n for n in self.kernels if operator(n).role is Role.CONTRACT]
        found = multiplications(self._outcome.model, counted, feed)
        self._macs = [found.get(node, 0) for node in self.kernels]
        least, most = _FEEDS
        return max(least, min(most, int(_WORK // max(1, sum(self._macs)))))

    def rank(self, sources: Sequence[Source], most: float) -> None:
        """Find the order in which kernels go back to float, no further than `most` allows."""
        total = sum(self._macs) or 1
        prices = [macs + _SPREAD * total / len(self._macs) for macs in self._macs]
        steps = purchases([(s.holders, s.noise) for s in sources], prices)
        spent = accumulate(sum(self._macs[h] for h in step.holders) for step in steps)
        self._steps = [s for s, macs in zip(steps, spent, strict=True) if macs <= most * total]
        self._noise = math.fsum(source.noise for source in sources)

    def guess(self, allowed: float | None) -> int | None:
        """The step after which the estimate leaves no more than the `allowed` share of noise."""
        if allowed is None or not 0 < self._noise < math.inf:
            return None
        bound = allowed * self._noise
        return next((i for i, s in enumerate(self._steps, 1) if s.left <= bound), None)

    def shortest(self, guess: int | None, progress: Progress) -> _Choice | None:
        """The least beginning of the order that passes: strides from the guess, then bisection."""
        low, high, stride = 1, len(self._steps), 1
        bracketed = [guess is None] * 2
        at = guess or (low + high) // 2
        found = None
        while low <= high:
            candidate = _Choice(frozenset(h for step in self._steps[:at] for h in step.holders))
            passed = self._passes(candidate, progress)
            bracketed[passed] = True
            if passed:
                found, high = candidate, at - 1
            else:
                low = at + 1
            if all(bracketed):
                at = (low + high) // 2
            else:
                at = max(low, at - stride) if passed else min(high, at + stride)
            stride *= 2
        return found

    def give_back(self, chosen: _Choice, progress: Progress) -> _Choice:
        """Without the purchases that it passes without too, the dearest tried first."""
        bought = [s.holders for s in self._steps if chosen.floats.issuperset(s.holders)]
        dearest = sorted(bought[:-1], key=lambda holders: -sum(self._macs[h] for h in holders))
        for holders in dearest[:_GIVE_BACKS]:
            fewer = _Choice(chosen.floats - frozenset(holders))
            if self._passes(fewer, progress):
                chosen = fewer
        return chosen

    def pack(self, chosen: _Choice, sources: Sequence[Source], progress: Progress) -> _Choice:
        """With as many weights as integers as it passes with, the least noisy first."""
        noise = {s.holders[0]: s.noise for s in sources if s.kind == "weights"}
        quiet = sorted(noise.keys() & chosen.floats, key=lambda kernel: (noise[kernel], kernel))
        low, high = 1, len(quiet)
        at = high
        while low <= high:
            candidate = _Choice(chosen.floats, frozenset(quiet[:at]))
            if self._passes(candidate, progress):
                chosen, low = candidate, at + 1
            else:
                high = at - 1
            at = (low + high) // 2
        return chosen

    def outcome(self, choice: _Choice) -> Outcome:
        """What is written of a candidate."""
        if not choice.floats:
            return self._outcome
        nodes, packed = self._names(choice.floats), self._names(choice.packed)
        return returned(self._outcome, self.target.name, nodes, packed)

    def trials(self, chosen: _Choice | None) -> tuple[Trial, ...]:
        return tuple(
            Trial(
                floats=len(choice.floats),
                share=self._share(choice.floats),
                verdict=verdict,
                chosen=choice == chosen,
            )
            for choice, verdict in self._verdicts.items()
        )

    def parts(self, sources: Sequence[Source], chosen: _Choice) -> tuple[KernelPart, ...]:
        noise = [0.0] * len(self.kernels)
        for source in sources:
            for holder in source.holders:
                noise[holder] += source.noise / len(source.holders)
        total = math.fsum(noise)
        found = [
            KernelPart(
                node=kernel_name(node),
                op=node.op_type,
                noise=noise[i] / total if 0 < total < math.inf else noise[i],
                macs=self._macs[i],
                floats=i in chosen.floats,
                packed=i in chosen.packed,
            )
            for i, node in enumerate(self.kernels)
        ]
        return tuple(sorted(found, key=lambda part: -part.noise))

    def measured(self, choice: _Choice) -> Verdict:
        """The verdict on a candidate."""
        if choice not in self._verdicts:
            self._verdicts[choice] = self._judge(self.outcome(choice).model)
        return self._verdicts[choice]

    def _passes(self, choice: _Choice, progress: Progress) -> bool:
        """Whether a candidate passes, after telling how many were validated before it."""
        progress(len(self._verdicts), None)
        return self.measured(choice).passed

    def _share(self, floats: frozenset[int]) -> float:
        kept = sum(macs for i, macs in enumerate(self._macs) if i not in floats)
        return kept / sum(self._macs) if any(self._macs) else 0.0

    def _names(self, kernels: Iterable[int]) -> tuple[str, ...]:
        return tuple(sorted({glob.escape(kernel_name(self.kernels[i])) for i in kernels}))
