"""Teacher outputs: what is kept, when it is computed anew, and that nobody's hand shows in it."""

from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxcompress.errors import InputError
from onnxcompress.session import Session
from onnxcompress.train.teacher import Taught, teacher_outputs

D, H, C = 6, 9, 4
RNG = np.random.default_rng(0)
W1 = RNG.standard_normal((D, H)).astype(np.float32)
W2 = RNG.standard_normal((H, C)).astype(np.float32)
X = RNG.standard_normal((101, D)).astype(np.float32)


def teacher(batch="N", scale=1.0, w1=W1):
    text = f"""<ir_version: 10, opset_import: ["" : 18]>
    g (float[{batch},{D}] x) => (float[{batch},{C}] y) {{
      a = MatMul(x, w1)
      hidden = Relu(a)
      y = MatMul(hidden, w2)
      rows = ReduceSum <keepdims=0> (y)
      ids = ArgMax <axis=1> (y)
    }}"""
    proto = onnx.parser.parse_model(text)
    for name, array in (("w1", w1), ("w2", W2 * np.float32(scale))):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return ir.from_proto(proto)


def expected(x):
    hidden = np.maximum(x @ W1, 0)
    return {"hidden": hidden, "y": hidden @ W2}


@pytest.mark.parametrize("batch", ["N", 1, 7])
def test_outputs_and_inner_values_are_those_of_the_teacher(batch):
    found = teacher_outputs(teacher(batch), {"x": X}, ["y", "hidden"])
    assert list(found) == ["y", "hidden"]
    for name, array in expected(X).items():
        assert found[name].dtype == np.float16
        assert found[name].shape == array.shape
        np.testing.assert_allclose(found[name], array, rtol=1e-3, atol=1e-3)
    exact = teacher_outputs(teacher(batch), {"x": X}, precision="float32")
    np.testing.assert_allclose(exact["y"], expected(X)["y"], rtol=1e-5, atol=1e-5)


def test_whoever_runs_it_the_bits_are_the_same(tmp_path):
    here = teacher_outputs(teacher(), {"x": X}, ["y", "hidden"])
    with ThreadPoolExecutor(3) as threads, ProcessPoolExecutor(2, get_context("spawn")) as others:
        for executor in (threads, others):
            found = teacher_outputs(teacher(), {"x": X}, ["y", "hidden"], executor=executor)
            kept = teacher_outputs(
                teacher(), {"x": X}, ["y", "hidden"], executor=executor, cache=tmp_path / "kept"
            )
            for name, array in here.items():
                np.testing.assert_array_equal(found[name], array)
                np.testing.assert_array_equal(np.asarray(kept[name]), array)


def test_what_is_kept_is_read_and_what_changed_is_computed(tmp_path):
    computed: list[int] = []

    def ask(model, x, values=("y",), **options):
        computed.clear()
        found = teacher_outputs(
            model,
            {"x": x},
            values,
            cache=tmp_path,
            progress=lambda done, total: computed.append(done),
            **options,
        )
        return {name: np.asarray(array) for name, array in found.items()}

    first = ask(teacher(), X)
    assert computed[-1] == len(X)
    assert (tmp_path.stat().st_mode & 0o111) and len(list(tmp_path.iterdir())) == 1
    np.testing.assert_array_equal(ask(teacher(), X.copy())["y"], first["y"])
    assert not computed

    ask(teacher(), X, ("y", "hidden"))
    assert computed and len(list(tmp_path.iterdir())) == 2
    other = X.copy()
    other[50, 3] += 1e-3
    for model, x, options in (
        (teacher(), other, {}),
        (teacher(scale=2.0), X, {}),
        (teacher(), X, {"precision": "float32"}),
    ):
        ask(model, x, **options)
        assert computed
    doubled = ask(teacher(scale=2.0), X)["y"]
    np.testing.assert_array_equal(doubled, 2 * first["y"])


def test_a_damaged_file_is_written_again(tmp_path):
    first = teacher_outputs(teacher(), {"x": X}, cache=tmp_path)
    kept = np.asarray(first["y"]).copy()
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:200])
    np.testing.assert_array_equal(teacher_outputs(teacher(), {"x": X}, cache=tmp_path)["y"], kept)


def test_a_run_that_fails_keeps_nothing(tmp_path):
    x = X.copy()
    x[90] = 1e38
    with pytest.raises(InputError, match=r"'y' is (not finite|beyond)"):
        teacher_outputs(teacher(), {"x": x}, cache=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("values", "x", "precision", "sentence"),
    [
        (["rows"], X, "float16", "samples on their first axis"),
        (["ids"], X, "float16", "floats"),
        (["nothing"], X, "float16", "no value 'nothing'"),
        (["y"], X * 1e5, "float16", "beyond float16: keep it in float32"),
    ],
)
def test_what_cannot_be_kept_is_said(values, x, precision, sentence):
    with pytest.raises(InputError, match=sentence):
        teacher_outputs(teacher(), {"x": x}, values, precision=precision)


def test_a_changed_batch_is_asked_about_again():
    taught = Taught(Session(teacher(), outputs=["y", "hidden"]), {"t.y": "y", "t.h": "hidden"})
    batch = {"x": X[:5] + 1, "t.y": np.zeros((5, C)), "t.h": None, "labels": np.arange(5)}
    found = taught(batch, np.random.default_rng(0))
    np.testing.assert_allclose(found["t.y"], expected(X[:5] + 1)["y"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found["t.h"], expected(X[:5] + 1)["hidden"], rtol=1e-5, atol=1e-5)
    assert found["labels"] is batch["labels"] and "0x" not in repr(taught)
