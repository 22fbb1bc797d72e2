"""The verb tune: from files to a file, by flags or a recipe, and behind a distillation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner

import onnxcompress as oc
from onnxcompress.cli import main
from onnxcompress.session import Session
from onnxcompress.train.settings import Tuning
from tests.train.test_tune import FLOATS, X, network, rounded


@pytest.fixture
def files(tmp_path: Path) -> Path:
    oc.save(FLOATS, tmp_path / "floats.onnx")
    oc.save(rounded(), tmp_path / "rounded.onnx")
    np.savez(tmp_path / "inputs.npz", x=X)
    return tmp_path


def run(files: Path, *arguments: str) -> tuple[int, str, str]:
    names = [str(files / a) if a.endswith((".onnx", ".npz", ".toml")) else a for a in arguments]
    found = CliRunner().invoke(main, ["tune", *names])
    return found.exit_code, found.stdout, found.stderr


def codes(path: Path) -> np.ndarray:
    tensor = oc.load(path).graph.initializers["w1_quantized"].const_value
    assert tensor is not None
    return tensor.numpy()


def test_a_model_is_tuned_from_files_to_a_file(files: Path) -> None:
    code, out, err = run(
        files, "rounded.onnx", "--teacher", "floats.onnx", "-o", "tuned.onnx", "-d", "inputs.npz",
        "--epochs", "6", "--lr", "0.01", "--batch-size", "32", "--json",
    )  # fmt: skip
    assert code == 0, err
    report = json.loads(out)
    assert report["verb"] == "tune" and len(report["training"]["epochs"]) == 6
    assert any("the last 64 of 320 feeds were held out" in note for note in report["notes"])
    assert any(note.startswith("loss on held-out data") for note in report["notes"])
    assert not np.array_equal(codes(files / "rounded.onnx"), codes(files / "tuned.onnx"))


def test_a_recipe_says_how_and_what_is_no_better_is_written_as_it_came(files: Path) -> None:
    (files / "r.toml").write_text("[tune]\nepochs = 1\nlr = 3.0\n")
    code, out, err = run(
        files, "rounded.onnx", "--teacher", "floats.onnx", "-o", "tuned.onnx", "-d", "inputs.npz",
        "--evaluate", "inputs.npz", "--recipe", "r.toml", "--json",
    )  # fmt: skip
    assert code == 0, err
    assert any("it is as it came" in note for note in json.loads(out)["notes"])
    np.testing.assert_array_equal(codes(files / "rounded.onnx"), codes(files / "tuned.onnx"))


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (("floats.onnx", "--teacher", "floats.onnx"), "holds no codes that could be trained"),
        (("rounded.onnx",), "give the float model as teacher"),
        (("rounded.onnx", "--teacher", "floats.onnx", "--epochs", "0"), "1 or more"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(files: Path, given: object, sentence: str) -> None:
    assert isinstance(given, tuple)
    code, _, err = run(files, *given, "-o", "tuned.onnx", "-d", "inputs.npz")
    assert code == 2 and sentence in err and "Traceback" not in err
    assert not (files / "tuned.onnx").exists()


def test_tuning_is_a_table_that_reads_back() -> None:
    text = 'target = "cpu"\n\n[[passes]]\nname = "insert_qdq"\n\n[tune]\nepochs = 5\n'
    recipe = oc.Recipe.from_text(text)
    assert recipe.tuning == Tuning(epochs=5) and recipe.to_toml() == text
    with pytest.raises(oc.InputError, match="tune: no option 'epoch', did you mean 'epochs'"):
        oc.Recipe.from_text("[tune]\nepoch = 5\n")


def test_a_distilled_student_is_quantized_and_tuned_by_one_recipe(files: Path) -> None:
    recipe = oc.Recipe.from_text(
        "[train]\nepochs = 2\n[[passes]]\nname = 'quantize_weights'\nmin_elements = 0\n"
        "block_size = 16\n[tune]\nepochs = 4\nlr = 0.01\nbatch_size = 32\n"
    )
    found = oc.distill(FLOATS, "narrow:0.5", {"x": X}, recipe=recipe)
    assert any(note.startswith("tuned: loss on held-out data") for note in found.notes)
    assert "MatMulNBits" in {node.op_type for node in found.model.graph}


def test_a_model_trains_quantizes_and_tunes_in_one_call() -> None:
    labels = Session(FLOATS).run({"x": X})["y"].argmax(-1)
    model = oc.Model(network(), epochs=1, quantize="static", tune_epochs=2).train(X, labels)
    assert model.report is not None
    assert any(note.startswith("tuned: ") for note in model.report.notes)
    assert any(value.dtype is ir.DataType.INT8 for value in model.model.graph.initializers.values())
    with pytest.raises(oc.InputError, match="tune_epochs tune what was quantized"):
        oc.Model(network(), tune_epochs=2).train(X, labels)
