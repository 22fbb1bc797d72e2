"""Which layers go back to float: the fragile ones, no more of them than the budget asks for."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import onnx_ir as ir
import pytest

from onnxcompress import api, targets
from onnxcompress.gates import Gate
from onnxcompress.mixed import Mixed, Verdict, mix
from onnxcompress.pipeline import Outcome
from onnxcompress.sensitivity import Source, measure_sources
from onnxcompress.validation import compare
from onnxcompress.variants import silent
from tests.fragile import chain, feeds

HELD_OUT = feeds(4, seed=2)


@cache
def quantized(weights: int | None = None, values: int | None = None) -> Outcome:
    return api.quantize(chain(weights=weights, values=values), feeds())


def sources(outcome: Outcome, count: int = 4) -> list[Source]:
    return measure_sources(
        outcome.model, targets.load("cpu"), feeds(count), progress=lambda done, total: None
    )


def search(
    outcome: Outcome, original: ir.Model, min_sqnr: float
) -> tuple[Outcome | None, Mixed, list[Verdict]]:
    asked: list[Verdict] = []

    def judge(model: ir.Model) -> Verdict:
        sqnr = compare(original, model, HELD_OUT, layers=False).outputs[0].sqnr
        assert sqnr is not None
        asked.append(Verdict(passed=Gate("sqnr", ">=", min_sqnr).met(sqnr), sqnr=sqnr))
        return asked[-1]

    found, story = mix(outcome, "cpu", feeds(), judge, min_sqnr=min_sqnr, stage=silent)
    assert story is not None
    return found, story, asked


def floats(story: Mixed) -> set[str]:
    return {kernel.node for kernel in story.kernels if kernel.floats}


@pytest.mark.parametrize("layer", [1, 2, 3, 4])
def test_a_broken_weight_is_measured_loudest(layer: int) -> None:
    found = sources(quantized(weights=layer))
    loudest = max(found, key=lambda source: source.noise)
    assert (loudest.kind, loudest.name) == ("weights", f"conv{layer}")
    assert loudest.noise > 10 * sum(s.noise for s in found if s is not loudest)


@pytest.mark.parametrize("layer", [0, 1, 3])
def test_a_broken_value_is_measured_loudest(layer: int) -> None:
    found = sources(quantized(values=layer))
    loudest = max(found, key=lambda source: source.noise)
    assert (loudest.kind, loudest.name) == ("values", f"r{layer}")
    assert loudest.holders == (layer, layer + 1)


def test_powers_of_sources_add_up_to_what_all_of_them_do() -> None:
    outcome = quantized()
    total = sum(source.noise for source in sources(outcome))
    sqnr = compare(chain(), outcome.model, feeds(4), layers=False).outputs[0].sqnr
    assert sqnr is not None and 10 ** (-sqnr / 10) == pytest.approx(total, rel=0.3)


def test_measuring_alters_nothing_and_repeats_to_the_bit() -> None:
    outcome = quantized(weights=2)
    before = ir.to_proto(outcome.model).SerializeToString()
    assert sources(outcome) == sources(outcome)
    assert ir.to_proto(outcome.model).SerializeToString() == before


@pytest.mark.parametrize(
    ("broken", "expected"), [({"weights": 2}, {"conv2"}), ({"values": 1}, {"conv1", "conv2"})]
)
def test_only_what_is_fragile_goes_to_float(broken: dict[str, int], expected: set[str]) -> None:
    outcome, original = quantized(**broken), chain(**broken)
    found, story, _ = search(outcome, original, 25)
    assert found is not None and floats(story) == expected
    (chosen,) = (trial for trial in story.trials if trial.chosen)
    assert chosen.share == pytest.approx(1 - len(expected) / 5)
    sqnr = compare(original, found.model, HELD_OUT).outputs[0].sqnr
    assert sqnr is not None and sqnr >= 25 > story.trials[0].verdict.sqnr
    assert found.records[-3].name == "restore_float"


def test_a_tighter_budget_never_leaves_more_on_integers() -> None:
    shares: list[float] = []
    for budget in (20, 30, 40, 45, 80):
        found, story, _ = search(quantized(weights=2), chain(weights=2), budget)
        assert found is not None
        (chosen,) = (trial for trial in story.trials if trial.chosen)
        assert chosen.verdict.sqnr >= budget
        shares.append(chosen.share)
    assert shares == sorted(shares, reverse=True) and shares[-1] == 0


def test_a_search_takes_few_validations_and_repeats_itself() -> None:
    first = search(quantized(weights=2), chain(weights=2), 30)
    second = search(quantized(weights=2), chain(weights=2), 30)
    assert first[1] == second[1] and len(first[2]) <= 8


def test_a_budget_that_float_itself_misses_gives_nothing_back() -> None:
    found, story = mix(
        quantized(), "cpu", feeds(), lambda model: Verdict(passed=False, sqnr=9.0), stage=silent
    )
    assert found is None and story is not None and floats(story) == set()
    assert min(trial.share for trial in story.trials) == 0


def test_a_model_without_pairs_has_nothing_to_search() -> None:
    dynamic = api.quantize(chain(), scheme="dynamic")

    def refuse(model: ir.Model) -> Verdict:
        raise AssertionError("there is nothing to judge")

    assert mix(dynamic, "cpu", feeds(), refuse, stage=silent) == (None, None)


def test_more_sources_than_runs_are_measured_with_their_neighbours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from onnxcompress import sensitivity

    alone = sources(quantized(weights=2))
    monkeypatch.setattr(sensitivity, "_MOST", 5)
    together = sources(quantized(weights=2))
    assert _names(together) == _names(alone)
    loudest = max(together, key=lambda source: source.noise)
    assert "conv2" in {s.name for s in together if s.noise == loudest.noise}
    assert sum(s.noise for s in together) == pytest.approx(sum(s.noise for s in alone), rel=0.3)


def _names(found: Sequence[Source]) -> list[tuple[str, str]]:
    return [(source.kind, source.name) for source in found]
