"""Running models: shared weights, taps, failures in one sentence."""

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxcompress.errors import InputError
from onnxcompress.session import Session, optimized_model

MODEL = """<ir_version: 10, opset_import: ["" : 20]>
g (float[N,4] x) => (float[N,512] y) <float[4] b = {1, 2, 3, 4}> {
  h = Add(x, b)
  r = Relu(h)
  y = MatMul(r, w)
}"""
WEIGHT = np.random.default_rng(0).standard_normal((4, 512), dtype=np.float32)
BIAS = np.array([1, 2, 3, 4], np.float32)
X = np.random.default_rng(1).standard_normal((3, 4), dtype=np.float32)


@pytest.fixture
def proto():
    proto = onnx.parser.parse_model(MODEL)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(WEIGHT, "w"))
    return proto


@pytest.fixture
def model(proto):
    return ir.from_proto(proto)


def expected(x):
    return np.maximum(x + BIAS, 0) @ WEIGHT


@pytest.mark.parametrize("optimization", ["all", "basic", "none"])
@pytest.mark.parametrize("prepack", [True, False])
def test_a_model_runs(model, optimization, prepack):
    session = Session(model, optimization=optimization, prepack=prepack, threads=1)
    assert session.inputs == ("x",)
    assert session.outputs == ("y",)
    np.testing.assert_allclose(session.run({"x": X})["y"], expected(X), rtol=1e-5, atol=1e-5)


def test_a_file_runs_with_and_without_taps(proto, tmp_path):
    path = tmp_path / "m.onnx"
    onnx.save(proto, path)
    for session in (Session(path), Session(path, outputs=["r", "y"])):
        np.testing.assert_allclose(session.run({"x": X})["y"], expected(X), rtol=1e-5, atol=1e-5)


def test_any_value_of_the_main_graph_can_be_an_output_and_the_model_stays(model):
    before = ir.to_proto(model).SerializeToString()
    found = Session(model, outputs=["r", "x", "w", "b", "y", "r"]).run({"x": X})
    assert list(found) == ["r", "x", "w", "b", "y"]
    np.testing.assert_array_equal(found["w"], WEIGHT)
    np.testing.assert_array_equal(found["x"], X)
    np.testing.assert_allclose(found["r"], np.maximum(X + BIAS, 0), rtol=1e-6)
    assert ir.to_proto(model).SerializeToString() == before


def test_weights_are_the_model_s_own_memory(model):
    shared = WEIGHT.copy()
    model.graph.initializers["w"].const_value = ir.Tensor(shared, name="w")
    session = Session(model, optimization="none", prepack=False)
    shared *= 2
    np.testing.assert_allclose(session.run({"x": X})["y"], 2 * expected(X), rtol=1e-5, atol=1e-5)


def test_weights_outlive_the_model(model):
    session = Session(model, optimization="none", prepack=False)
    del model
    junk = [np.full((4, 512), np.nan, np.float32) for _ in range(50)]
    np.testing.assert_allclose(session.run({"x": X})["y"], expected(X), rtol=1e-5, atol=1e-5)
    assert len(junk) == 50


@pytest.mark.parametrize("optimization", ["all", "none"])
def test_a_weight_that_nothing_reads_does_no_harm(proto, optimization):
    proto.graph.initializer.append(onnx.numpy_helper.from_array(WEIGHT, "unused"))
    found = Session(ir.from_proto(proto), optimization=optimization).run({"x": X})["y"]
    np.testing.assert_allclose(found, expected(X), rtol=1e-5, atol=1e-5)


def test_a_lazy_weight_is_computed_for_the_session(model):
    model.graph.initializers["w"].const_value = ir.LazyTensor(
        lambda: ir.tensor(-WEIGHT), dtype=ir.DataType.FLOAT, shape=ir.Shape([4, 512]), name="w"
    )
    np.testing.assert_allclose(
        Session(model).run({"x": X})["y"], -expected(X), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("kind", [ml_dtypes.bfloat16, np.float16, np.int8, ml_dtypes.int4])
def test_weights_of_every_width_run(kind):
    weight = np.arange(-8, 8).repeat(512).reshape(16, 512).astype(kind)
    tensor = ir.tensor(weight, name="w")
    w = ir.Value(name="w", const_value=tensor, type=ir.TensorType(tensor.dtype))
    x = ir.val("x", ir.DataType.FLOAT, [16, 512])
    cast = ir.node("Cast", [w], {"to": int(ir.DataType.FLOAT)})
    add = ir.node("Add", [x, cast.outputs[0]])
    add.outputs[0].name = "y"
    graph = ir.Graph(
        [x], add.outputs, nodes=[cast, add], initializers=[w], opset_imports={"": 21}, name="g"
    )
    found = Session(ir.Model(graph, ir_version=10)).run({"x": np.zeros((16, 512), np.float32)})
    np.testing.assert_array_equal(found["y"], weight.astype(np.float32))


def test_bfloat16_goes_in_and_comes_out():
    model = ir.from_onnx_text("""<ir_version: 10, opset_import: ["" : 20]>
    g (bfloat16[N] x) => (bfloat16[N] y) { f = Cast<to=1>(x)
      n = Neg(f)
      y = Cast<to=16>(n) }""")
    x = np.array([1.5, -2.0, 3.0], ml_dtypes.bfloat16)
    found = Session(model).run({"x": x})["y"]
    assert found.dtype == ml_dtypes.bfloat16
    assert found.tolist() == [-1.5, 2.0, -3.0]


@pytest.mark.parametrize(
    ("feed", "words"),
    [
        ({}, "x"),
        ({"x": X.astype(np.float64)}, "double"),
        ({"x": X[:, :2]}, "Expected: 4"),
        ({"x": X, "z": X}, "z"),
    ],
)
def test_a_feed_that_does_not_fit_is_one_sentence(model, feed, words, capfd):
    with pytest.raises(InputError, match=words) as error:
        Session(model).run(feed)
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")


def test_an_operator_that_fails_is_named_and_nothing_is_logged(capfd):
    model = ir.from_onnx_text("""<ir_version: 10, opset_import: ["" : 20]>
    g (float[N] x, int64[M] s) => (float[P,Q] y) { [squash] y = Reshape(x, s) }""")
    with pytest.raises(InputError, match="squash"):
        Session(model).run({"x": np.ones(5, np.float32), "s": np.array([2, 2])})
    assert capfd.readouterr() == ("", "")


def test_what_cannot_be_loaded_is_one_sentence(tmp_path, capfd):
    with pytest.raises(InputError, match=r"none\.onnx"):
        Session(tmp_path / "none.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"not a model")
    with pytest.raises(InputError, match=r"bad\.onnx"):
        Session(tmp_path / "bad.onnx")
    model = ir.from_onnx_text("""<ir_version: 10, opset_import: ["" : 20, "mine" : 1]>
    g (float[N] x) => (float[N] y) { y = mine.Thing(x) }""")
    with pytest.raises(InputError, match="Thing"):
        Session(model)
    assert capfd.readouterr() == ("", "")


def test_an_unknown_output_is_refused(model):
    with pytest.raises(InputError, match="'nope'"):
        Session(model, outputs=["nope"])


def test_the_optimized_graph_shows_what_was_fused():
    model = ir.from_onnx_text("""<ir_version: 10, opset_import: ["" : 20]>
    g (float[N,4] x) => (float[N,2] z) <float[4,2] w = {1,2,3,4,5,6,7,8}, float[2] b = {1,2}> {
      y = MatMul(x, w)
      z = Add(y, b)
    }""")
    assert [node.op_type for node in optimized_model(model).graph] == ["Gemm"]
    assert [node.op_type for node in optimized_model(model, optimization="none").graph] == [
        "MatMul",
        "Add",
    ]


def test_unordered_outputs_hold_the_same_elements():
    """Channels that fill the blocks, that do not, and a value that is read in the plain order."""
    proto = onnx.parser.parse_model("""<ir_version: 10, opset_import: ["" : 20]>
    g (float[1,3,9,9] x, bool c) => (float[N] z) {
      a = Conv(x, v)
      b = Relu(a)
      d = Conv(b, w)
      e = Transpose <perm = [0,2,3,1]> (b)
      f = If (c) <
        then_branch = t () => (float[N] s) { one = Constant <value_ints = [-1]> ()
          s = Reshape(b, one) },
        else_branch = u () => (float[N] s) { all = Constant <value_ints = [-1]> ()
          s = Reshape(d, all) }>
      z = Neg(f)
    }""")
    rng = np.random.default_rng(0)
    for name, shape in (("v", (32, 3, 3, 3)), ("w", (20, 32, 1, 1))):
        weight = rng.standard_normal(shape, dtype=np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, name))
    model = ir.from_proto(proto)
    feed = {"x": rng.standard_normal((1, 3, 9, 9), dtype=np.float32), "c": np.array(True)}
    taps = ("b", "d", "e", "z")
    plain = Session(model, outputs=taps).run(feed)
    found = Session(model, outputs=taps, unordered={"b", "d"}).run(feed)
    assert not np.array_equal(plain["b"], found["b"])
    for name in taps:
        if name == "b":
            plain[name], found[name] = np.sort(plain[name], None), np.sort(found[name], None)
        np.testing.assert_allclose(found[name], plain[name], atol=1e-5)
