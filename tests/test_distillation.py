"""The verb distill: from files to a file, by flags or a recipe."""

import json

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from click.testing import CliRunner

from onnxcompress import Recipe, distill, load
from onnxcompress.cli import main
from onnxcompress.errors import InputError
from onnxcompress.session import Session
from onnxcompress.train.settings import Training, masks_of

X = np.random.default_rng(0).standard_normal((160, 8)).astype(np.float32)


def network(path, hidden, seed, name="y"):
    rng = np.random.default_rng(seed)
    text = f"""<ir_version: 10, opset_import: ["" : 18]>
    g (float[N,8] x) => (float[N,4] {name}) {{
      a = Gemm<transB=1>(x, w1, b1)
      h = Relu(a)
      {name} = Gemm<transB=1>(h, w2, b2)
    }}"""
    proto = onnx.parser.parse_model(text)
    for key, shape in {"w1": (hidden, 8), "b1": (hidden,), "w2": (4, hidden), "b2": (4,)}.items():
        array = rng.standard_normal(shape).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, key))
    onnx.save(proto, path)
    return path


@pytest.fixture
def files(tmp_path):
    network(tmp_path / "teacher.onnx", 32, 0)
    network(tmp_path / "student.onnx", 16, 1)
    np.savez(tmp_path / "inputs.npz", x=X)
    return tmp_path


def run(files, *arguments):
    names = [str(files / a) if a.endswith((".onnx", ".npz", ".toml")) else a for a in arguments]
    found = CliRunner().invoke(main, ["distill", *names])
    return found.exit_code, found.stdout, found.stderr


def decisions(path):
    return Session(load(path)).run({"x": X})["y"].argmax(1)


def test_a_student_is_taught_from_files_to_a_file(files):
    code, out, err = run(
        files, "teacher.onnx", "student.onnx", "-o", "taught.onnx", "--data", "inputs.npz",
        "--epochs", "60", "--lr", "0.02", "--quantize", "dynamic", "--json",
    )  # fmt: skip
    assert code == 0, err
    report = json.loads(out)
    assert report["verb"] == "distill" and len(report["training"]["epochs"]) == 60
    assert "the last 32 of 160 feeds were held out" in report["notes"]
    assert any(p["name"] == "quantize_dynamic" for p in report["passes"])
    wanted = decisions(files / "teacher.onnx")
    before = (decisions(files / "student.onnx") == wanted).mean()
    assert (decisions(files / "taught.onnx") == wanted).mean() > before + 0.2


def test_a_student_is_made_by_its_description_and_a_recipe(files):
    (files / "r.toml").write_text("[train]\nepochs = 2\n[[passes]]\nname = 'insert_qdq'\n")
    code, out, err = run(
        files, "teacher.onnx", "narrow:0.5", "-o", "taught.onnx", "--data", "inputs.npz",
        "--evaluate", "inputs.npz", "--recipe", "r.toml", "--json",
    )  # fmt: skip
    assert code == 0, err
    report = json.loads(out)
    assert len(report["training"]["epochs"]) == 2
    assert any("narrowed" in note for note in report["notes"])
    nodes = {node.op_type for node in load(files / "taught.onnx").graph}
    assert "DequantizeLinear" in nodes


def test_models_of_other_faces_are_taught_but_not_compared(files):
    network(files / "other.onnx", 16, 1, name="scores")
    code, out, err = run(
        files, "teacher.onnx", "other.onnx", "-o", "taught.onnx", "--data", "inputs.npz",
        "--epochs", "1", "--json",
    )  # fmt: skip
    assert code == 0, err
    assert any("not compared" in note for note in json.loads(out)["notes"])


@pytest.mark.parametrize(
    ("student", "extra", "sentence"),
    [
        ("shrink.onnx", (), "shrink.onnx"),
        ("drop:9", (), "9 layers could be dropped"),
        ("student.onnx", ("--epochs", "0"), "1 or more"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(files, student, extra, sentence):
    code, _, err = run(
        files, "teacher.onnx", student, "-o", "taught.onnx", "--data", "inputs.npz", *extra
    )
    assert code == 2 and sentence in err and "Traceback" not in err
    assert not (files / "taught.onnx").exists()


def stored(model):
    tensor = model.graph.initializers["w1"].const_value
    assert tensor is not None
    return tensor.numpy().copy()


def test_zeros_of_a_pruned_student_stay(files):
    pruned = load(files / "teacher.onnx")
    weight = stored(pruned)
    weight[np.abs(weight) < 0.8] = 0
    pruned.graph.initializers["w1"].const_value = ir.Tensor(weight)
    assert list(masks_of(pruned)) == ["w1"]
    found = distill(
        files / "teacher.onnx", pruned, {"x": X}, training=Training(epochs=2, keep_zeros=True)
    )
    after = stored(found.model)
    np.testing.assert_array_equal(after == 0, weight == 0)
    assert not np.array_equal(after, weight)


def test_a_recipes_passes_and_a_scheme_exclude_each_other(files):
    recipe = Recipe.from_text("[[passes]]\nname = 'insert_qdq'\n")
    with pytest.raises(InputError, match="exclude each other"):
        distill(files / "teacher.onnx", "narrow:0.5", {"x": X}, recipe=recipe, quantize="static")
