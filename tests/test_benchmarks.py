"""The benchmarks run from end to end; what they measure is for `make bench` to say."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from onnxcompress import api, schemes
from onnxcompress.model_io import load
from onnxcompress.observe import Observations
from onnxcompress.pipeline import run
from tests.benchmarks import ablation, job, ladder, resnet50, tools
from tests.benchmarks.__main__ import main
from tests.benchmarks.cases import Setting, all_cases
from tests.benchmarks.methods import COMPENSATION, DEFAULT, Pipelines, placing, without
from tests.benchmarks.samples import feeds
from tests.benchmarks.table import Goal


def test_both_quantizers_are_compared_on_a_small_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = tmp_path / "tables.md"
    main(["--quick", "--only", "compare", "segment_tabular", "--markdown", str(written)])
    lines = capsys.readouterr().out.splitlines()
    assert written.read_text().splitlines() == lines
    rows = {line.split(" | ")[0]: line.split(" | ") for line in lines if line.startswith("| ")}
    for tool in ("| ours minmax", "| ORT MinMax"):
        seconds, _, peak, size, score = map(float, rows[tool][1:6])
        assert seconds > 0.1 and peak > 50 and size < 0.2 and score > 0.9


def test_the_thorough_job_is_held_against_plain_inference(
    capsys: pytest.CaptureFixture[str],
) -> None:
    main(["--quick", "--only", "thorough", "segment_tabular"])
    lines = capsys.readouterr().out.splitlines()
    row = next(line for line in lines if line.startswith("| segment_tabular")).split(" | ")
    plain, budget, seconds = map(float, row[2:5])
    assert budget == pytest.approx(3 * plain + 5, rel=0.02)
    assert float(row[5]) == pytest.approx(seconds / budget, abs=0.02)


def test_the_ladder_ends_with_what_is_done_by_default() -> None:
    found = list(ladder.rungs())
    names = [{pass_.name for pass_ in passes} for _, passes in found]
    assert found[-1][1] == DEFAULT == schemes.static(effort="thorough")
    assert all(names[i] <= names[i + 1] for i in range(len(names) - 1))
    assert names[0].isdisjoint(COMPENSATION) and len({passes for _, passes in found}) == 6


def test_every_rung_of_the_ladder_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--quick", "--only", "ladder", "segment_tabular"])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
    found = {row[0].removeprefix("| "): row[1:] for row in rows if len(row) == 7}
    assert [*found][3:-1] == [title for title, _ in ladder.rungs()]
    whole, mixed = (found[name] for name in [*found][-2:])
    assert float(mixed[2]) > float(whole[2]) + 1 and float(mixed[3]) < float(whole[3]) == 100


def test_what_a_method_is_worth_is_counted_by_model(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--quick", "--only", "ablation", "segment_tabular"])
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    found = {row[0]: row[1:] for row in rows if len(row) > 2}
    assert found["without"][0] == "segment_tabular" and {*COMPENSATION} < {*found}
    columns = [ablation.Column("a", (30.0, 29.0, 30.1, None, 31.0))]
    counted = [ablation.row(i, "", columns)[-2:] for i in range(5)]
    assert counted == [["", ""], ["1", "0"], ["0", "0"], ["0", "0"], ["0", "1"]]


def test_pipelines_observe_what_comes_before_pairs_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    observe = api.observe

    def counted(model: ir.Model, *given: Any, **options: Any) -> Observations:
        seen.append(1)
        return observe(model, *given, **options)

    monkeypatch.setattr(api, "observe", counted)
    setting = Setting(folder=tmp_path, only=("segment_tabular",), quick=True, samples=8)
    case = next(all_cases(setting))
    pipelines = Pipelines(case)
    methods: list[dict[str, Any]] = [{}, {"method": "percentile", "percentile": 90.0}]
    wanted = [placing(options, without(COMPENSATION)) for options in methods]
    made = [pipelines.run(passes).model for passes in wanted]
    assert len(seen) == 1
    for passes, model in zip(wanted, made, strict=True):
        alone = run(load(case.model), passes, observer=pipelines.watch).model
        assert ir.to_proto(alone) == ir.to_proto(model)
    assert ir.to_proto(made[0]) != ir.to_proto(made[1])


@pytest.mark.parametrize(
    ("name", "installed", "found"),
    [
        ("photo_digits", True, ["NNCF"]),
        ("name_language", True, ["NNCF", "NNCF transformer"]),
        ("name_language", False, []),
    ],
)
def test_nncf_is_compared_where_it_is_installed(
    name: str, installed: bool, found: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tools, "HAS_NNCF", installed)
    case = next(all_cases(Setting(folder=tmp_path, only=(name,), quick=True, samples=1)))
    names = [tool.name for tool in tools.tools_for(case)]
    assert [n for n in names if n.startswith("NNCF")] == found
    assert [n for n in names if not n.startswith("NNCF")] == [
        tool.name for tool in tools.TOOLS if tool.verb != "nncf"
    ]


def test_a_job_tells_its_own_peak_and_not_its_parents() -> None:
    held = np.ones(30_000_000)  # 240 MB, which a child must not be charged with
    small = job.run([sys.executable, "-c", "print('done')"])
    large = job.run([sys.executable, "-c", "bytearray(b'x') * 300_000_000"])
    assert held.nbytes > 1e6 * small.peak and small.output == "done\n" and not small.failure
    assert 300 < large.peak < 400


def test_a_job_that_fails_says_why_in_one_line() -> None:
    done = job.run([sys.executable, "-c", "raise SystemExit('first\\nlast word')"])
    assert done.failure == "last word"


def test_samples_are_cut_by_the_rank_of_the_input(tmp_path: Path) -> None:
    path = tmp_path / "samples.npz"
    arrays = {"x": np.arange(6).reshape(3, 2), "state": np.zeros((3, 1, 4)), "rate": np.array(16)}
    np.savez(path, **arrays)  # pyright: ignore[reportArgumentType]
    found = list(feeds(path, {"x": 2, "state": 2, "rate": 0}))
    assert [f["x"].tolist() for f in found] == [[[0, 1]], [[2, 3]], [[4, 5]]]
    assert all(f["state"].shape == (1, 4) and f["rate"] == 16 for f in found)


def test_goals_are_met_on_the_right_side_of_the_bound() -> None:
    assert Goal(what="", figure=1.0, bound=1.0).row()[-1] == "pass"
    assert Goal(what="", figure=1.1, bound=1.0).row()[-1] == "**fail**"
    assert Goal(what="", figure=0.9, bound=1.0, at_most=False).row()[-1] == "**fail**"
    assert Goal(what="", figure=None, bound=1.0).row()[-1] == "not measured"


def test_pictures_are_the_same_for_the_same_seed() -> None:
    first, second = resnet50.images(2, seed=1), resnet50.images(2, seed=1)
    assert first.shape == (2, 3, 224, 224) and first.dtype == np.float32
    assert np.array_equal(first, second)


def test_pruned_models_are_taught_what_they_lost(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--quick", "--only", "distillation", "segment_tabular"])
    lines = capsys.readouterr().out.splitlines()
    row = next(line for line in lines if line.startswith("| segment_tabular | 0.95")).split(" | ")
    whole, pruned, taught = (float(cell.split()[0]) for cell in row[3:6])
    assert pruned < taught < whole


@pytest.mark.parametrize("installed", [True, False])
def test_a_training_step_is_held_against_pytorch_where_that_is_installed(
    installed: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if installed:
        pytest.importorskip("torch")
    else:
        monkeypatch.setitem(sys.modules, "torch", None)
    main(["--quick", "--only", "train_step", "digits"])
    lines = capsys.readouterr().out.splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| digits |")]
    assert len(rows) == 2 * installed
    for _, threads, *figures in rows:
        assert threads in "12"
        for ours, theirs, ratio in (figures[:3], figures[3:]):
            assert float(ratio) == pytest.approx(float(ours) / float(theirs), rel=0.2)
    assert ("nothing to compare with" in "\n".join(lines)) == (not installed)
