"""Reports: JSON that is the same twice, gates held against figures, text and HTML that are safe."""

from __future__ import annotations

import builtins
import io
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from rich.console import Console

from onnxcompress.contract import Figure, Skip
from onnxcompress.errors import InputError
from onnxcompress.gates import METRICS, Gate
from onnxcompress.measure import Measurement
from onnxcompress.measure.latency import Latency
from onnxcompress.numerics.decisions import Metric, Score
from onnxcompress.pipeline import Record
from onnxcompress.report import Attempt, Measured, ModelFile, Report, check, to_json
from onnxcompress.report.gating import READERS
from onnxcompress.report.html import layer_chart, render
from onnxcompress.report.summary import (
    Verdict,
    arithmetic_rows,
    clean,
    cost_rows,
    headline,
    percent,
    quality_rows,
    size,
    skip_groups,
)
from onnxcompress.report.terminal import show
from onnxcompress.report.training import curves
from onnxcompress.train.history import Epoch, History
from onnxcompress.validation import OutputFigures, Validation
from onnxcompress.validation.audit import Audit
from onnxcompress.validation.layers import Layer

EVIL = "<script>alert(1)</script>[red]\x1b[2J\"'&"


def layer(name: str, sqnr: float, upstream: float = math.inf, added: float = 0.0) -> Layer:
    return Layer(tensor=name, node=name, op="Conv", sqnr=sqnr, upstream=upstream, added=added)


def validation(**changes: Any) -> Validation:
    output = OutputFigures(
        name="logits",
        max_error=0.5,
        max_relative=0.05,
        sqnr=25.0,
        cosine=0.998,
        agreement=0.97,
        agreement_top_k=0.999,
        score=Score(Metric.ACCURACY, 0.79, 0.78),
    )
    skipped = OutputFigures(name="state", skipped="not a tensor: a sequence, a map or nothing")
    layers = (layer("a", math.inf), layer("b", 31.0, math.inf, 0.0008), layer("c", 20, 31, 0.0092))
    whole = Validation(feeds=10, top_k=5, outputs=(output, skipped), layers=layers)
    return replace(whole, **changes)


def measurement(peak: int) -> Measurement:
    return Measurement(path="m.onnx", size=1, p50_ms=1, p90_ms=2, runs=10, peak_memory=peak)


def report(name: str = "model.onnx") -> Report:
    skips = tuple(Skip(f"{name}{i}", "Conv", "its weight is shared") for i in range(4))
    record = Record("insert_qdq", {"activations": "uint8"}, True, skips, {"pairs": 42}, 0.5)
    latency = Latency(original_ms=9, candidate_ms=4.5, ratio=0.5, low=0.49, high=0.51, pairs=20)
    return Report(
        verb="compress",
        source=ModelFile(name=name, size=14_000_000, sha256="a" * 64),
        result=ModelFile(name="small.onnx", size=3_500_000, sha256="b" * 64),
        target="cpu",
        passes=(record, Record("equalize", {}, False, (), {}, 0.1)),
        attempts=(Attempt(scheme="int8", kept=True, because="2x faster"),),
        validation=validation(),
        audit=Audit(macs=1000, integer_macs=998, unfused=(Skip(name, "Gemm", "it did not fuse"),)),
        notes=("the last fifth of the data was held out",),
        warnings=(f"node {name!r} was left in float",),
        versions={"onnxruntime": "1.32"},
        measured=Measured(
            latency=latency, source=measurement(40), result=measurement(30), seconds={"save": 0.1}
        ),
    )


def text(report: Report) -> str:
    console = Console(file=io.StringIO(), width=100, color_system=None)
    show(report, console)
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def test_json_is_the_same_twice_apart_from_what_was_measured():
    first = report()
    slow = replace(first.passes[0], seconds=99.0)
    second = replace(first, passes=(slow, first.passes[1]), measured=Measured())
    a, b = json.loads(to_json(first)), json.loads(to_json(second))
    assert to_json(first) == to_json(report())
    assert a.pop("measured")["pass_seconds"] == [0.5, 0.1]
    assert b.pop("measured")["pass_seconds"] == [99.0, 0.1]
    assert a == b and "seconds" not in json.dumps(a)


def test_json_keeps_clocks_out_of_attempts_and_gates():
    asked = [Gate.parse(text) for text in ("latency_ratio <= 1", "memory_ratio <= 1", "sqnr >= 9")]
    first = report()
    latency = Latency(original_ms=9, candidate_ms=8, ratio=0.9, low=0.8, high=1.0, pairs=20)
    slower = replace(first.measured, latency=latency, result=measurement(39))
    told = (replace(first.attempts[0], because="1.1x faster"),)
    second = replace(first, measured=slower, attempts=told)
    a, b = (json.loads(to_json(replace(r, gates=check(asked, r)))) for r in (first, second))
    measured = a.pop("measured")
    assert measured["because"] == ["2x faster"]
    assert measured["gates"]["latency_ratio <= 1"] == {
        "figure": 0.5,
        "reason": "latency_ratio is 0.5, as asked: <= 1",
    }
    assert b.pop("measured") != measured and a == b
    assert [gate["passed"] for gate in a["gates"]] == [True, True, True]
    assert a["gates"][2]["figure"] == 25


def test_json_spells_infinities_and_keeps_everything():
    found = json.loads(to_json(report()))
    assert found["schema"] == 1
    assert (found["audit"]["integer_macs"], found["audit"]["macs"]) == (998, 1000)
    assert found["validation"]["layers"][0]["sqnr"] == "inf"
    assert found["validation"]["outputs"][0]["score"] == {
        "metric": "accuracy",
        "original": 0.79,
        "candidate": 0.78,
    }
    assert found["passes"][0]["skips"][3] == {
        "node": "model.onnx3",
        "op": "Conv",
        "reason": "its weight is shared",
    }


def test_json_takes_any_option_that_a_pass_may_have():
    options = {
        "nodes": frozenset({"b", "a"}),
        "where": Path("x"),
        "pair": (1, 2.5),
        "kind": Metric.RMSE,
    }
    odd = replace(report(), passes=(Record("p", options, True, (), {}, 0.0),))
    assert json.loads(to_json(odd))["passes"][0]["options"] == {
        "nodes": ["a", "b"],
        "where": "x",
        "pair": [1, 2.5],
        "kind": "rmse",
    }


def test_a_file_is_described_without_its_folder(tmp_path: Path):
    header = '<ir_version: 8, opset_import: ["" : 17]>'
    ir.save(
        ir.from_onnx_text(f"{header} g (float[1] x) => (float[1] y) {{ y = Neg(x) }}"),
        tmp_path / "m.onnx",
    )
    found = ModelFile.of(tmp_path / "m.onnx")
    assert found.name == "m.onnx" and found.size == (tmp_path / "m.onnx").stat().st_size
    assert len(found.sha256) == 64


def test_every_metric_can_be_read():
    assert set(READERS) == set(METRICS)
    assert all(reader(report()) is not None for reader in READERS.values())


def test_a_figure_of_each_tensor_is_data_and_one_line_to_people():
    shares = {EVIL: 0.25, **{f"w{i}": 0.5 + i / 1000 for i in range(100)}}
    figures: dict[str, Figure] = {"zeros": 7, "sparsity by tensor": shares}
    said = replace(report(), passes=(Record("prune", {}, True, (), figures, 0.0),))
    assert json.loads(to_json(said))["passes"][0]["figures"] == figures
    shown = " ".join(text(said).split())
    assert "zeros 7, sparsity by tensor 0.599 at most (w99)" in shown and "w98" not in shown
    page = render(said)
    assert all(f">{name}<" in page for name in shares if name != EVIL)
    assert EVIL not in page and "&lt;script&gt;" in page and "\x1b" not in page


@pytest.mark.parametrize(
    ("gate", "figure", "passed"),
    [
        ("sqnr >= 25", 25, True),
        ("sqnr > 25", 25, False),
        ("cosine >= 0.999", 0.998, False),
        ("max_error <= 1", 0.5, True),
        ("top1_agreement >= 0.97", 0.97, True),
        ("top5_agreement >= 0.9", 0.999, True),
        ("accuracy >= 0.79", 0.78, False),
        ("accuracy_drop <= 0.02", 0.01, True),
        ("integer_share >= 0.999", 0.998, False),
        ("size_ratio <= 0.25", 0.25, True),
        ("latency_ratio <= 0.4", 0.5, False),
        ("memory_ratio <= 1", 0.75, True),
    ],
)
def test_gates_hold_figures(gate: str, figure: float, passed: bool):
    (found,) = check([Gate.parse(gate)], report())
    assert found.figure == pytest.approx(figure) and found.passed is passed
    assert gate.split()[0] in found.reason and gate.split(maxsplit=1)[1] in found.reason


@pytest.mark.parametrize("metric", sorted(METRICS))
def test_what_was_not_measured_meets_no_gate(metric: str):
    bare = Report(verb="validate", source=report().source)
    for bound in (f"{metric} >= 0", f"{metric} <= 0"):
        (found,) = check([Gate.parse(bound)], bare)
        assert not found.passed and found.figure is None and "not measured" in found.reason


def test_the_worst_output_counts():
    good, _ = validation().outputs
    outputs = (replace(good, sqnr=40.0), replace(good, sqnr=12.0), replace(good, sqnr=math.inf))
    two = replace(report(), validation=validation(outputs=outputs))
    assert check([Gate.parse("sqnr >= 30")], two)[0].figure == 12


def test_a_broken_candidate_meets_no_gate_on_quality():
    broken = replace(report(), validation=validation(failures=("output 'y' has NaN",)))
    sqnr, ratio = check([Gate.parse("sqnr >= 1"), Gate.parse("size_ratio <= 1")], broken)
    assert not sqnr.passed and sqnr.reason == "output 'y' has NaN"
    assert ratio.passed


def test_rows_say_what_changed():
    rows = {row.label: row for row in (*cost_rows(report()), *quality_rows(report()))}
    assert rows["size"].change == "4.00x smaller" and rows["size"].verdict is Verdict.BETTER
    assert rows["latency"].change == "2.00x faster"
    assert rows["peak memory"].change == "1.33x less memory"
    assert rows["accuracy"].change == "-1.00 points"
    assert rows["same decisions"].after == "97.0 %" and rows["SQNR"].after == "25.0 dB"
    assert headline(report()).startswith("small.onnx: 4.00x smaller, 2.00x faster")


def test_a_ratio_that_may_be_one_is_called_the_same():
    latency = Latency(original_ms=9, candidate_ms=9.5, ratio=1.05, low=0.9, high=1.2, pairs=9)
    rows = cost_rows(replace(report(), measured=Measured(latency=latency)))
    assert rows[1].change == "same speed" and rows[1].verdict is Verdict.NEUTRAL


def test_what_multiplies_nothing_has_no_share_of_integers():
    (row,) = arithmetic_rows(report())
    assert row.after == "99.8 %"
    assert not arithmetic_rows(replace(report(), audit=Audit(macs=0, integer_macs=0)))


def test_skips_are_grouped_by_reason():
    (group,) = skip_groups(report())
    assert (group.count, group.ops) == (4, "4 Conv")
    assert group.examples == "model.onnx0, model.onnx1, model.onnx2, …"


@pytest.mark.parametrize(
    ("count", "said"),
    [(999, "999 B"), (1500, "1.50 kB"), (13_963_115, "14.0 MB"), (3 * 10**9, "3.00 GB")],
)
def test_sizes(count: int, said: str):
    assert size(count) == said


def test_a_share_is_never_rounded_up_to_the_whole():
    assert percent(0.99999) == "99.9 %" and percent(1.0) == "100 %" and percent(0.571) == "57.1 %"


def test_the_terminal_shows_everything():
    gates = check([Gate.parse("sqnr >= 30")], report())
    shown = text(replace(report(), gates=gates))
    for said in (
        "4.00x smaller",
        "gate NOT MET: sqnr is 25, asked: >= 30",
        "kept  int8: 2x faster",
        "its weight is shared",
        "pairs 42",
        "found nothing to do",
        "not a tensor",
        "note: the last fifth",
        "warning: node",
        "pairs that did not fuse: 1 Gemm (model.onnx)",
    ):
        assert said in shown
    assert "arithmetic in integers 99.8 %" in " ".join(shown.split())
    assert shown.index("where the error enters") < shown.index("0.92 %") < shown.index("0.08 %")


def test_a_name_cannot_drive_the_terminal():
    shown = text(report(EVIL))
    assert "\x1b" not in shown and "[red]" in shown
    assert clean("a\x1b\nb\u202e") == "a\ufffd\ufffdb\ufffd"


def epochs(number: int, **validation: float) -> tuple[Epoch, ...]:
    training = {"loss": 2.0, "accuracy": 0.5}
    return tuple(
        Epoch(number=i + 1, rate=0.1, training=training, validation=validation)
        for i in range(number)
    )


def test_training_is_drawn_by_epoch():
    history = History(epochs=epochs(4, loss=1.0, accuracy=0.75), best=3)
    loss, accuracy = curves(history)
    assert [kind for kind, _ in loss.lines] == ["training", "validation"]
    assert loss.lines[1][1] == "12.500,50.000 37.500,50.000 62.500,50.000 87.500,50.000"
    assert loss.ticks[0] == (0.0, "0") and loss.ticks[-1] == (100.0, "2")
    assert accuracy.lines[1][1].startswith("12.500,25.000 ")
    assert accuracy.ticks[-1] == (100.0, "100 %")
    assert loss.best == 62.5
    assert "epoch 2" in loss.stops[1].title and "validation: loss 1" in loss.stops[1].title


def test_one_epoch_without_validation_is_a_level_line():
    (loss, accuracy) = curves(History(epochs=epochs(1)))
    assert loss.lines == (("training", "0.000,0.000 100.000,0.000"),)
    assert loss.best is None and accuracy.best is None


def test_a_page_tells_of_training():
    history = History(epochs=epochs(4, loss=1.0), best=3, monitor=EVIL, stopped=True)
    page = render(replace(report(), training=history))
    assert "the weights are those of epoch 3" in page and "<script>" not in page
    assert page.count("<polyline") == 3
    assert "<h2>Training</h2>" not in render(report())
    plain = json.loads(to_json(replace(report(), training=history)))["training"]
    assert plain["best"] == 3 and len(plain["epochs"]) == 4


class Page(HTMLParser):
    """Collects the tags, attributes and text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_stands_alone_and_escapes_names():
    page = Page(render(report(EVIL)))
    assert not {"script", "img", "link", "iframe", "object"} & set(page.tags)
    assert not [a for a, _ in page.attributes if a.startswith("on") or a in ("src", "href")]
    assert "<script>alert(1)</script>" in page.text and "\x1b" not in page.text
    assert page.tags.count("html") == 1 and "4.00x smaller" in page.text
    assert "99.8 %" in page.text and "pairs that did not fuse: 1 Gemm" in page.text


def test_the_page_is_the_same_twice_and_bears_an_empty_report():
    assert render(report()) == render(report())
    assert "m.onnx" in render(
        Report(verb="validate", source=ModelFile(name="m.onnx", size=1, sha256=""))
    )


def test_the_chart_shows_every_layer_and_marks_the_worst():
    chart = layer_chart(validation().layers)
    assert [bar.kind for bar in chart.bars] == ["exact", "worst", "worst"]
    assert [bar.height for bar in chart.bars] == [100, 77.5, 50] and chart.top == 40
    assert "adds 0.92 % noise" in chart.bars[2].title
    assert render(report()).count('<rect class="bar') == len(chart.bars) + 3, "and the legend"


def test_the_chart_of_very_many_layers_shows_the_worst_of_neighbours():
    many = [layer(f"t{i}", 40.0) for i in range(1000)]
    many[501] = layer("bad", 3.0, 40.0, 0.5)
    chart = layer_chart(many)
    (bad,) = (bar for bar in chart.bars if bar.kind == "worst")
    assert len(chart.bars) <= 400 and bad.title.startswith("bad (Conv): 3.0 dB")
    assert all(bar.x >= 0 and bar.x + bar.width <= 100 for bar in chart.bars)


@pytest.mark.parametrize("sqnr", [math.inf, -math.inf, -20.0, 500.0])
def test_no_bar_leaves_the_chart(sqnr: float):
    (bar,) = layer_chart([layer("a", sqnr)]).bars
    assert 0 < bar.height <= 100


def test_without_jinja2_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch):
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "jinja2":
            raise ModuleNotFoundError("No module named 'jinja2'", name="jinja2")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"pip install 'onnxcompress\[report\]'"):
        render(report())
