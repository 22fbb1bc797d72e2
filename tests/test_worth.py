"""Fidelity beyond the gates: what it may cost, and who asks for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxcompress import attempts, budget, job, variants
from onnxcompress.gates import Gate
from onnxcompress.measure import Measurement
from onnxcompress.measure.latency import Latency
from onnxcompress.mixed import Mixed
from onnxcompress.model_io import load, save
from onnxcompress.pipeline import Outcome
from onnxcompress.report import Measured, ModelFile, Report
from onnxcompress.validation import OutputFigures, Validation, compare
from onnxcompress.variants import Variant
from onnxcompress.worth import affordable, choose, differs
from tests.fragile import chain, feeds

HELD_OUT = feeds(20)[16:]


def variant(
    name: str, cost: float, sqnr: float, *, agreement: float | None = None, ranked: bool = False
) -> Variant:
    output = OutputFigures(name="y", sqnr=sqnr, agreement=agreement, ranked=ranked)
    latency = Latency(original_ms=1, candidate_ms=cost, ratio=cost, low=cost, high=cost, pairs=9)
    return Variant(
        scheme=name,
        outcome=Outcome(chain(), (), None),
        report=Report(
            verb="compress",
            source=ModelFile(name="m.onnx", size=100, sha256=""),
            result=ModelFile(name="m.onnx", size=100, sha256=""),
            validation=Validation(feeds=1, top_k=5, outputs=(output,)),
            measured=Measured(latency=latency),
        ),
    )


@pytest.mark.parametrize(
    ("cost", "sqnr", "chosen"),
    [
        (1.2, 35.0, "better"),
        (1.2, 29.0, "int8"),  # too little is gained
        (1.35, 90.0, "int8"),  # it costs too much
    ],
)
def test_ten_decibels_are_worth_three_tenths(cost: float, sqnr: float, chosen: str) -> None:
    passing = [variant("int8", 1.0, 20.0), variant("better", cost, sqnr)]
    assert choose(passing, faithful=True).scheme == chosen
    assert choose(passing, faithful=False).scheme == "int8"


def test_what_timing_cannot_tell_counts_for_fidelity() -> None:
    slow = variant("better", 1.35, 60.0)
    timed = slow.report.measured.latency
    assert timed
    unsure = Measured(latency=replace(timed, low=1.2))
    slow = replace(slow, report=replace(slow.report, measured=unsure))
    assert choose([variant("int8", 1.0, 20.0), slow], faithful=True) is slow


def test_of_several_that_are_worth_it_the_cheapest_is_taken() -> None:
    passing = [variant("int8", 1.0, 20.0), variant("a", 1.2, 60.0), variant("b", 1.1, 31.0)]
    assert choose(passing, faithful=True).scheme == "b"


def test_what_nobody_can_tell_apart_pays_nothing() -> None:
    clear = [variant("int8", 1.0, 31.0), variant("better", 1.1, 60.0)]
    assert choose(clear, faithful=True).scheme == "int8"


@pytest.mark.parametrize(
    ("agreement", "ranked", "expected"), [(0.95, True, False), (0.8, True, True), (1, False, True)]
)
def test_ranked_classes_are_told_apart_by_decisions(
    agreement: float, ranked: bool, expected: bool
) -> None:
    found = variant("int8", 1.0, 20.0, agreement=agreement, ranked=ranked)
    assert differs(found.report.validation) is expected


def test_the_faster_integers_are_the_less_of_them_may_go() -> None:
    assert affordable(1.1) == affordable(0.8) == 1.0
    assert affordable(0.5) == pytest.approx(0.3)
    shares = [affordable(latency) for latency in (0.2, 0.4, 0.6, 0.7)]
    assert shares == sorted(shares)


@pytest.fixture
def timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with a model; integers take 0.6 of its time, whatever the clock says."""
    monkeypatch.chdir(tmp_path)
    _set_latency(monkeypatch, 0.6)
    alone = Measurement(path="m.onnx", size=1, p50_ms=1, p90_ms=1, runs=1, peak_memory=1)
    monkeypatch.setattr(variants, "measure", lambda *a, **k: alone)  # pyright: ignore[reportUnknownLambdaType]
    monkeypatch.setattr(budget, "DEFAULT_GATES", (Gate("sqnr", ">=", 3.0),))
    save(chain(values=1, layers=8), Path("m.onnx"))
    np.savez("x.npz", x=np.concatenate([feed["x"] for feed in feeds(20)]))


def _set_latency(monkeypatch: pytest.MonkeyPatch, ratio: float) -> None:
    found = Latency(original_ms=1, candidate_ms=ratio, ratio=ratio, low=ratio, high=ratio, pairs=9)
    monkeypatch.setattr(variants, "paired_latency", lambda *a, **k: found)  # pyright: ignore[reportUnknownLambdaType]


def compress(**options: Any) -> Report:
    given = {"calibrate": "x.npz", "scheme": "static", "effort": "fast", **options}
    return job.compress("m.onnx", "out.onnx", **given)


@pytest.mark.usefixtures("timed")
def test_by_default_the_few_layers_that_do_the_damage_go_to_float() -> None:
    report = compress()
    assert report.mixed and report.mixed.kept
    assert {k.node for k in report.mixed.kernels if k.floats} == {"conv1", "conv2"}
    first, *_ = (trial.verdict.sqnr for trial in report.mixed.trials)
    sqnr = compare("m.onnx", "out.onnx", HELD_OUT).outputs[0].sqnr
    assert sqnr is not None and sqnr >= first + 10


@pytest.mark.usefixtures("timed")
def test_what_comes_back_because_of_its_data_keeps_its_integers_in_the_file() -> None:
    report = compress()
    assert report.mixed and {k.node for k in report.mixed.kernels if k.packed} == {"conv1", "conv2"}
    weights = load(Path("out.onnx")).graph.initializers.values()
    large = {v.dtype for v in weights if v.const_value is not None and v.const_value.size > 64}
    assert large == {ir.DataType.INT8}, "a float weight is still in the file"
    onnx.checker.check_model(onnx.load("out.onnx"), full_check=True)


@pytest.mark.usefixtures("timed")
@pytest.mark.parametrize("latency", [0.95, 0.6])
def test_where_integers_gain_only_space_all_arithmetic_may_go(
    monkeypatch: pytest.MonkeyPatch, latency: float
) -> None:
    _set_latency(monkeypatch, latency)
    monkeypatch.setattr(attempts, "return_layers", _no_better)
    report = compress()
    kept = "static, all layers in float" if latency == 0.95 else "static"
    assert [a.scheme for a in report.attempts if a.kept] == [kept]
    assert report.mixed and not report.mixed.kept


def _no_better(*args: Any, **options: Any) -> tuple[None, Mixed]:
    return None, Mixed(kernels=(), trials=(), feeds=1)


@pytest.mark.usefixtures("timed")
@pytest.mark.parametrize("asked", [{"gates": (Gate("sqnr", ">=", 5.0),)}, {"min_sqnr": 5.0}])
def test_who_says_what_is_enough_gets_no_search(asked: dict[str, Any]) -> None:
    report = compress(**asked)
    assert report.mixed is None and report.audit and report.audit.share == 1
