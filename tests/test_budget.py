"""A budget on the main job: kept by what is written, with no more in float than it needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from onnxcompress import budget, job, variants
from onnxcompress.budget import Budget, largest_loss
from onnxcompress.cli import main
from onnxcompress.errors import InputError
from onnxcompress.gates import Gate
from onnxcompress.measure import Measurement
from onnxcompress.model_io import load, save
from onnxcompress.recipe import Recipe
from onnxcompress.report import Report, to_json
from onnxcompress.report.html import render
from onnxcompress.report.trade_off import trade_off
from onnxcompress.validation import compare
from tests.fragile import CHANNELS, chain, feeds

MODELS = Path(__file__).parents[1] / "models"
SIZE = Gate("size_ratio", "<=", 1.0)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with a net whose third layer int8 breaks; the clock decides nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(variants, "_LATENCY_SECONDS", 0.05)
    monkeypatch.setattr(budget, "DEFAULT_GATES", (SIZE, Gate("sqnr", ">=", 10.0)))
    alone = Measurement(path="m.onnx", size=1, p50_ms=1, p90_ms=1, runs=1, peak_memory=1)
    monkeypatch.setattr(variants, "measure", lambda *args, **kwargs: alone)  # pyright: ignore[reportUnknownLambdaType]
    save(chain(weights=2), Path("m.onnx"))
    np.savez("x.npz", x=np.concatenate([feed["x"] for feed in feeds(20)]))


def compress(**options: Any) -> Report:
    given = {"calibrate": "x.npz", "scheme": "static", "effort": "fast", **options}
    return job.compress("m.onnx", "out.onnx", **given)


def floats(report: Report) -> set[str]:
    kernels = report.mixed.kernels if report.mixed else ()
    return {kernel.node for kernel in kernels if kernel.floats}


def test_the_fragile_layer_alone_goes_to_float() -> None:
    report = compress(min_sqnr=25)
    assert floats(report) == {"conv2"} and report.mixed and report.mixed.kept
    assert report.audit and report.audit.share == pytest.approx(0.8)
    assert [(a.scheme, a.kept) for a in report.attempts] == [
        ("static", False),
        ("static, some layers in float", True),
    ]
    held_out = feeds(20)[16:]
    sqnr = compare("m.onnx", "out.onnx", held_out).outputs[0].sqnr
    assert sqnr is not None and sqnr >= 25
    assert report.passes[-3].options["nodes"] == ("conv2",)


def test_the_default_gate_on_quality_is_reason_enough() -> None:
    report = compress()
    assert floats(report) == {"conv2"} and all(gate.passed for gate in report.gates)


def test_a_budget_that_int8_keeps_costs_no_search() -> None:
    save(chain(), Path("m.onnx"))
    report = compress(min_sqnr=20)
    assert report.mixed is None and report.audit and report.audit.share == 1


def test_what_is_written_twice_is_the_same_bytes() -> None:
    compress(min_sqnr=25)
    first = Path("out.onnx").read_bytes()
    compress(min_sqnr=25)
    assert Path("out.onnx").read_bytes() == first


def test_sixteen_bits_come_before_float_where_the_target_has_them() -> None:
    save(chain(values=1), Path("m.onnx"))
    report = compress(target="qnn", min_sqnr=25)
    assert [(a.scheme, a.kept) for a in report.attempts] == [
        ("static", False),
        ("static, uint16 activations", True),
    ]
    assert report.mixed is None


def test_a_gate_in_a_recipe_is_a_budget_too() -> None:
    recipe = Recipe.from_text(
        """
        [gates]
        sqnr = ">= 25"
        [[passes]]
        name = "raise_opset"
        [[passes]]
        name = "infer_shapes"
        [[passes]]
        name = "insert_qdq"
        """
    )
    report = compress(recipe=recipe)
    assert floats(report) == {"conv2"}
    assert report.attempts[-1].scheme == "recipe, some layers in float" and report.attempts[-1].kept


def test_the_choice_is_a_recipe_of_its_own() -> None:
    report = compress(min_sqnr=25)
    options = next(record.options for record in report.passes if record.name == "restore_float")
    lines = json.dumps(options["nodes"])
    recipe = Recipe.from_text(
        f"""
        [[passes]]
        name = "insert_qdq"
        [[passes]]
        name = "restore_float"
        nodes = {lines}
        [[passes]]
        name = "shield_floats"
        """
    )
    again = compress(recipe=recipe)
    assert again.audit and report.audit and again.audit.share == report.audit.share


@pytest.fixture
def classifier() -> None:
    """The same net with class scores at the end and labels that it gives."""
    model = chain(weights=2)
    proto = onnx.ModelProto()
    proto.CopyFrom(_proto(model))
    graph = proto.graph
    graph.node.append(onnx.helper.make_node("GlobalAveragePool", ["y"], ["p"], name="pool"))
    graph.node.append(onnx.helper.make_node("Flatten", ["p"], ["scores"], name="flat"))
    graph.output.pop()
    graph.output.append(onnx.helper.make_tensor_value_info("scores", 1, ["N", CHANNELS]))
    onnx.save(proto, "m.onnx")


def _proto(model: Any) -> onnx.ModelProto:
    import onnx_ir as ir

    return ir.to_proto(model)


@pytest.mark.usefixtures("classifier")
def test_decisions_count_without_labels() -> None:
    report = compress(max_drop=0.0)
    (gate,) = (g for g in report.gates if g.gate.metric == "top1_agreement")
    assert gate.passed and gate.gate.bound == 1.0
    if report.mixed:
        assert report.mixed.max_loss == 0.0


@pytest.mark.usefixtures("classifier")
def test_accuracy_counts_with_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.load("x.npz")["x"]
    np.savez("x.npz", x=x, labels=np.zeros(len(x), np.int64))
    report = compress(max_drop=0.5)
    assert [g.gate.metric for g in report.gates] == ["size_ratio", "accuracy_drop"]


def test_a_budget_of_decisions_needs_some() -> None:
    with pytest.raises(InputError, match="budget cannot be held: top1_agreement was not measured"):
        compress(max_drop=0.01)
    assert not Path("out.onnx").exists()


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--max-drop", "-0.1", "at least 0 and below 1"),
        ("--max-drop", "1", "at least 0 and below 1"),
        ("--max-drop", "nan", "at least 0 and below 1"),
        ("--min-sqnr", "-3", "from 0 to 300"),
        ("--min-sqnr", "inf", "from 0 to 300"),
    ],
)
def test_figures_that_make_no_sense_are_refused(option: str, value: str, words: str) -> None:
    arguments = ["compress", "m.onnx", "-o", "out.onnx", "--calibrate", "x.npz", option, value]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2 and words in result.stderr and "Traceback" not in result.stderr
    assert not Path("out.onnx").exists()


def test_the_command_line_tells_the_story_as_data() -> None:
    arguments = ["compress", "m.onnx", "-o", "out.onnx", "--calibrate", "x.npz", "--json"]
    options = ["--scheme", "static", "--effort", "fast", "--min-sqnr", "25", "--report", "r.html"]
    result = CliRunner().invoke(main, [*arguments, *options])
    assert result.exit_code == 0, result.stderr
    mixed = json.loads(result.stdout)["mixed"]
    assert mixed["kept"] and mixed["min_sqnr"] == 25
    assert mixed["kernels"][0]["node"] == "conv2" and mixed["kernels"][0]["floats"]
    assert [trial["chosen"] for trial in mixed["trials"]].count(True) == 1
    assert "What int8 costs, layer by layer" in Path("r.html").read_text()
    assert load(Path("out.onnx")).graph.outputs[0].name == "y"


def test_the_plot_holds_every_candidate() -> None:
    report = compress(min_sqnr=25)
    assert report.mixed
    plot = trade_off(report.mixed)
    assert len(plot.dots) == len(report.mixed.trials)
    assert all(0 <= dot.x <= 100 and 0 <= dot.y <= 100 for dot in plot.dots)
    (chosen,) = (dot for dot in plot.dots if dot.kind == "chosen")
    assert chosen.x == pytest.approx(80) and plot.budget is not None and chosen.y >= plot.budget
    assert render(report).count('class="dot chosen"') == 2  # in the plot and in its legend
    assert to_json(report)


def test_every_output_of_a_real_model_keeps_the_budget() -> None:
    home = MODELS / "photo_digits"
    with np.load(home / "evaluation.npz") as arrays:
        images = arrays["image"][:60]
    report = job.compress(
        home / "model.onnx",
        "out.onnx",
        calibrate=home / "calibration.npz",
        evaluate={"image": images},
        scheme="static",
        effort="fast",
        min_sqnr=42.0,
        samples=60,
    )
    assert report.mixed and report.mixed.kept and report.audit and report.audit.share > 0.3
    found = compare(home / "model.onnx", "out.onnx", [{"image": images}])
    assert all(o.sqnr is not None and o.sqnr >= 42 for o in found.outputs)


def test_budgets_are_gates() -> None:
    both = Budget(max_drop=0.01, min_sqnr=30)
    assert list(map(str, both.gates(classes=True))) == ["accuracy_drop <= 0.01", "sqnr >= 30"]
    assert list(map(str, both.gates(classes=False))) == ["top1_agreement >= 0.99", "sqnr >= 30"]
    assert (
        both.default_gates(classes=True)[0] == SIZE and len(both.default_gates(classes=True)) == 3
    )
    assert Budget().default_gates(classes=False) == budget.DEFAULT_GATES
    assert largest_loss(both.gates(classes=True)) == 0.01
    assert largest_loss([Gate("sqnr", ">=", 3)]) is None
