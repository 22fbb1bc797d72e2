"""One method more a rung, from min/max per tensor to mixed precision: what each is worth."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import onnx_ir as ir

from onnxcompress.measure.latency import paired_latency
from onnxcompress.mixed import Verdict, mix
from onnxcompress.model_io import save
from onnxcompress.pipeline import Outcome
from onnxcompress.validation.audit import audit
from onnxcompress.variants import silent
from tests.benchmarks.cases import Case, Setting, all_cases
from tests.benchmarks.methods import COMPENSATION, Fidelity, Passes, Pipelines, placing, without
from tests.benchmarks.table import number, table

_HARD = ("mobilenetv2", "minilm_stsb")
_OWN = ("photo_digits", "name_language")
"""The cases: the zoo's where there is one, else the repository's."""
_HEADER = (
    *("rung", "score", "agrees with float", "SQNR dB"),
    *("integer share of MACs %", "latency ÷ float", "kernels in float"),
)
_MINMAX = {"method": "minmax"}
_STEPS: Sequence[tuple[str, tuple[str, ...], Mapping[str, object]]] = (
    ("min/max per tensor", (), {**_MINMAX, "per_channel": False}),
    ("per channel", (), _MINMAX),
    ("+ equalization and smoothing", ("equalize", "smooth"), _MINMAX),
    ("+ thresholds", (), {}),
    ("+ bias correction", ("correct_bias",), {}),
    ("+ second-order rounding", ("round_second_order",), {}),
)
"""Title, passes beside those of the rungs before, and options of the one that places pairs."""
_BUDGET = 3.0
"""dB that mixed precision is asked for beyond what integers alone reach."""


def tables(setting: Setting) -> Iterator[str]:
    """A table for each case, a row a rung."""
    hard = setting.zoo is not None and not setting.quick
    only = setting.only or (_HARD if hard else _OWN)
    for case in all_cases(replace(setting, only=only)):
        yield f"### {case.name}"
        yield ""
        yield from table(_HEADER, _rows(case, setting))


def rungs() -> Iterator[tuple[str, Passes]]:
    """Title and passes of each rung on integers alone; the last are the default's."""
    off = set(COMPENSATION)
    for title, names, options in _STEPS:
        off -= set(names)
        yield title, placing(options, without(off))


def _rows(case: Case, setting: Setting) -> Iterator[list[str]]:
    pipelines, fidelity = Pipelines(case), Fidelity(case.model, case.held_out_feeds())
    score = case.score(case.model)
    yield ["float", *(_share(v) for v in (score.value, score.agreement)), "-", "0", "1", "all"]
    outcome = None
    for title, passes in rungs():
        outcome = pipelines.run(passes)
        yield [title, *_figures(case, outcome, fidelity, setting), "0"]
    assert outcome is not None
    yield _mixed(case, outcome, fidelity, setting)


def _mixed(case: Case, integers: Outcome, fidelity: Fidelity, setting: Setting) -> list[str]:
    """The rung that returns kernels to float, judged on calibration data, measured on other."""
    known = Fidelity(case.model, case.feeds())
    bound = known.sqnr(integers.model) + _BUDGET

    def judge(model: ir.Model) -> Verdict:
        sqnr = known.sqnr(model)
        return Verdict(passed=sqnr >= bound, sqnr=sqnr)

    feeds = list(case.feeds())
    outcome, story = mix(integers, "cpu", feeds, judge, min_sqnr=bound, stage=silent)
    title = f"+ mixed precision, {_BUDGET:.0f} dB more"
    if outcome is None:
        return [title, "out of reach", *[""] * (len(_HEADER) - 2)]
    floats = next((t.floats for t in story.trials if t.chosen), 0) if story else 0
    return [title, *_figures(case, outcome, fidelity, setting), str(floats)]


def _figures(case: Case, outcome: Outcome, fidelity: Fidelity, setting: Setting) -> list[str]:
    path = setting.folder / "rung.onnx"
    save(outcome.model, path)
    feed = next(case.feeds())
    score = case.score(path)
    latency = paired_latency(case.model, path, feed, seconds=0.5 if setting.quick else 3.0)
    return [
        *(_share(score.value), _share(score.agreement)),
        number(fidelity.sqnr(outcome.model)),
        number(100 * audit(outcome.model, feed).share),
        f"{latency.ratio:.2f} ({latency.low:.2f} to {latency.high:.2f})",
    ]


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
