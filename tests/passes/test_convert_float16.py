"""16-bit floats: the interface stays, nothing overflows, casts are few, the file is halved."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from onnxcompress import schemes
from onnxcompress.contract import Result
from onnxcompress.numerics.short_floats import (
    largest,
    overflows,
    relative_error,
    rounded,
    unit_roundoff,
)
from onnxcompress.passes.convert_float16 import ConvertFloat16
from tests.passes import calibrated
from tests.passes.exactness import Net, apply, random_feed, run

HALF, BFLOAT = ir.DataType.FLOAT16.numpy(), ir.DataType.BFLOAT16.numpy()
MODELS = Path(__file__).parents[2] / "models"
NAMES = ("photo_digits", "name_language", "segment_tabular", "vowel_lstm")


def convert(proto: onnx.ModelProto, **options: Any) -> tuple[onnx.ModelProto, Result]:
    """Convert, check the model and that its interface is as it was."""
    after, result = apply(ConvertFloat16(**options), proto)
    onnx.checker.check_model(after, full_check=True)
    assert list(after.graph.input) == list(proto.graph.input)
    assert list(after.graph.output) == list(proto.graph.output)
    return after, result


def sqnr(expected: Any, actual: Any) -> float:
    error = np.sum(np.square(expected.astype(np.float64) - actual))
    return float(10 * np.log10(np.sum(np.square(expected.astype(np.float64))) / error))


def ops(proto: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in proto.graph.node)


def weights(proto: onnx.ModelProto) -> dict[str, int]:
    return {w.name: w.data_type for w in proto.graph.initializer}


def reasons(result: Result) -> dict[str, str]:
    return {skip.op: skip.reason for skip in result.skips}


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=20))
def test_rounding_is_numpys_within_range_and_saturates_beyond(numbers: list[float]) -> None:
    x = np.array(numbers, np.float32)
    for dtype in (HALF, BFLOAT):
        y = rounded(x, dtype)
        within = np.abs(x) <= largest(dtype)
        np.testing.assert_array_equal(y[within], x[within].astype(dtype))
        assert np.array_equal(np.isfinite(y.astype(np.float32)), np.isfinite(x))
        assert overflows(x, dtype) == bool(np.any(~within & np.isfinite(x)))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(2**-13, 60000, width=32), min_size=1, max_size=20))
def test_normal_numbers_lose_no_more_than_the_unit_roundoff(numbers: list[float]) -> None:
    x = np.array(numbers, np.float32)
    for dtype in (HALF, BFLOAT):
        assert relative_error(x, dtype) <= unit_roundoff(dtype)
    assert relative_error(np.array([1e-12], np.float32), HALF) == 1


def test_convolutions_compute_in_float16_between_two_casts() -> None:
    net = Net()
    x = net.input("x", "N", 3, 8, 8)
    y = net.op("Relu", net.op("Conv", x, net.normal("w", 4, 3, 3, 3), net.normal("b", 4)))
    net.output(net.op("Conv", y, net.normal("w2", 2, 4, 3, 3), out="y"), ("N", 2, 4, 4))
    after, result = convert(net.model())
    assert ops(after) == {"Cast": 2, "Conv": 2, "Relu": 1}
    assert set(weights(after).values()) == {TensorProto.FLOAT16}
    assert result.figures == {
        "nodes in float16": 3,
        "constants in float16": 3,
        "casts added": 2,
    }
    feed = random_feed(net.model())
    assert sqnr(run(net.model(), feed)[0], run(after, feed)[0]) > 55


def test_only_stored_weights_are_cast_back_once_and_shared() -> None:
    net = Net()
    x, w = net.input("x", "N", 32), net.normal("w", 32, 32)
    y = net.op("MatMul", net.op("MatMul", x, w), w)
    net.output(net.op("Add", y, net.normal("b", 32), out="y"), ("N", 32))
    after, _ = convert(net.model(), compute=False)
    assert ops(after) == {"Cast": 1, "MatMul": 2, "Add": 1}
    assert weights(after) == {"w": TensorProto.FLOAT16, "b": TensorProto.FLOAT}
    feed = random_feed(net.model())
    assert sqnr(run(net.model(), feed)[0], run(after, feed)[0]) > 60


def test_unfused_layer_normalization_stays_whole_in_float32() -> None:
    net = Net()
    x = net.op("MatMul", net.input("x", 4, 16), net.normal("w", 16, 16))
    centered = net.op("Sub", x, net.op("ReduceMean", x, axes=[-1]))
    square = net.op("Pow", centered, net.weight("two", 2.0))
    mean = net.op("ReduceMean", square, axes=[-1])
    root = net.op("Sqrt", net.op("Add", mean, net.weight("epsilon", 1e-12)))
    scaled = net.op("Mul", net.op("Div", centered, root), net.normal("gamma", 16))
    net.output(net.op("MatMul", scaled, net.normal("w2", 16, 16), out="y"), (4, 16))
    after, result = convert(net.model())
    assert ops(after)["Cast"] == 4  # at both ends, and on both sides of the normalization
    assert {"Pow", "Add"} <= set(reasons(result))
    assert "too small" in reasons(result)["Add"]
    large = {"x": random_feed(net.model())["x"] * np.float32(300)}  # squares beyond 65504
    assert sqnr(run(net.model(), large)[0], run(after, large)[0]) > 55


def masked(fill: float) -> Net:
    net = Net()
    x, keep = net.input("x", 2, 8), net.input("keep", 2, 8)
    scores = net.op("MatMul", x, net.normal("w", 8, 8))
    mask = net.op("Mul", net.op("Sub", net.weight("one", 1.0), keep), net.weight("fill", fill))
    probabilities = net.op("Softmax", net.op("Add", scores, mask), axis=-1)
    net.output(net.op("MatMul", probabilities, net.normal("v", 8, 4), out="y"), (2, 4))
    return net


@pytest.mark.parametrize("fill", [-3.4e38, -1e9])
def test_a_mask_too_large_for_float16_leaves_no_nan(fill: float) -> None:
    proto = masked(fill).model()
    after, result = convert(proto)
    assert "would overflow" in reasons(result)["Mul"]
    assert "may overflow" in reasons(result)["Add"]
    keep = np.zeros((2, 8), np.float32)
    keep[0, :5] = 1
    feed = {"x": random_feed(proto)["x"], "keep": keep}  # the second row is masked all along
    expected, actual = run(proto, feed)[0], run(after, feed)[0]
    assert np.isfinite(actual).all()
    assert sqnr(expected, actual) > 55


def test_values_observed_beyond_the_range_keep_their_nodes_in_float32() -> None:
    net = Net()
    x = net.op("MatMul", net.input("x", 4, 16), net.normal("w", 16, 16), out="wide")
    y = net.op("Mul", x, net.weight("small", 0.001), out="narrow")
    net.output(net.op("MatMul", y, net.normal("w2", 16, 16), out="y"), (4, 16))
    feed = {"x": random_feed(net.model())["x"] * np.float32(30000)}
    blind, _ = convert(net.model())
    assert not np.isfinite(run_in_half(blind, feed)).all()
    model = ir.from_proto(net.model())
    result = calibrated.apply(ConvertFloat16(), model, [feed])
    assert [skip.op for skip in result.skips] == ["MatMul", "Mul"]
    seen = ir.to_proto(model)
    assert weights(seen)["w2"] == TensorProto.FLOAT16
    assert np.isfinite(run_in_half(seen, feed)).all()
    assert sqnr(run(net.model(), feed)[0], run(seen, feed)[0]) > 55


def run_in_half(proto: onnx.ModelProto, feed: dict[str, Any]) -> Any:
    """What comes out where every operator rounds to its type, which no CPU kernel need do."""
    with np.errstate(all="ignore"):
        return next(iter(ReferenceEvaluator(proto).run(None, feed)))


def test_positions_and_sizes_keep_their_digits() -> None:
    """Integers over 2048 are not exact in float16."""
    net = Net()
    net.inputs.append(helper.make_tensor_value_info("p", TensorProto.INT64, ["N", 1]))
    angle = net.op("Mul", net.op("Cast", "p", to=TensorProto.FLOAT), net.weight("f", [[0.9, 0.01]]))
    turned = net.op("Concat", net.op("Sin", angle), net.op("Cos", angle), axis=-1)
    net.output(net.op("MatMul", turned, net.normal("w", 4, 32), out="y"), ("N", 32))
    after, _ = convert(net.model())
    assert weights(after)["w"] == TensorProto.FLOAT16
    feed = {"p": np.arange(5000, 5050).reshape(-1, 1)}
    assert sqnr(run(net.model(), feed)[0], run(after, feed)[0]) > 55


def test_scales_of_resize_and_shapes_stay_as_they_are() -> None:
    net = Net()
    x = net.op("Conv", net.input("x", 1, 3, 8, 8), net.normal("w", 4, 3, 3, 3))
    y = net.op("Resize", x, "", net.weight("scales", [1, 1, 2, 2]), mode="linear")
    net.op("Shape", y, out="shape")
    net.outputs.append(helper.make_tensor_value_info("shape", TensorProto.INT64, [4]))
    net.output(net.op("Conv", y, net.normal("w2", 4, 4, 3, 3), out="y"), (1, 4, 10, 10))
    after, _ = convert(net.model())
    assert weights(after)["scales"] == TensorProto.FLOAT
    assert ops(after)["Cast"] == 2
    assert len(run(after, random_feed(net.model()))) == 2


def test_bodies_are_converted_behind_casts_of_their_own() -> None:
    body = onnx.parser.parse_graph("""
        step (int64 i, bool c, float[2, 4] s) => (bool c2, float[2, 4] s2) {
            c2 = Identity(c)
            m = MatMul(s, w)
            s2 = Tanh(m)
        }""")
    net = Net()
    x = net.input("x", 2, 4)
    net.normal("w", 4, 4)
    net.weights.append(numpy_helper.from_array(np.array(3), "count"))
    net.nodes.append(helper.make_node("Loop", ["count", "", x], ["y"], "loop", body=body))
    net.output("y", (2, 4))
    net.infer = False
    after, result = convert(net.model())
    assert result.figures["nodes in float16"] == 1  # Tanh gives the float32 that the body returns
    assert weights(after)["w"] == TensorProto.FLOAT16
    feed = random_feed(net.model())
    assert sqnr(run(net.model(), feed)[0], run(after, feed)[0]) > 50


def test_kernels_between_integers_are_left_to_fuse() -> None:
    net = Net()
    net.weights.append(numpy_helper.from_array(np.array(0, np.uint8), "zero"))
    scale = net.weight("scale", 0.1)
    q = net.op("QuantizeLinear", net.input("x", 2, 8), scale, "zero")
    y = net.op("MatMul", net.op("DequantizeLinear", q, scale, "zero"), net.normal("w", 8, 8))
    net.output(net.op("MatMul", y, net.normal("w2", 8, 8), out="y"), (2, 8))
    after, result = convert(net.model())
    assert weights(after)["w"] == weights(after)["scale"] == TensorProto.FLOAT
    assert weights(after)["w2"] == TensorProto.FLOAT16
    assert "fuse" in reasons(result)["MatMul"]


def test_constant_nodes_and_excluded_nodes() -> None:
    net = Net()
    table = numpy_helper.from_array(np.ones((8, 64), np.float32))
    w = net.op("Constant", value=table)
    y = net.op("MatMul", net.input("x", 2, 8), w, out="first")
    net.output(net.op("MatMul", y, net.normal("w2", 64, 8), out="y"), (2, 8))
    after, result = convert(net.model(), exclude=("n_y",))
    (given,) = (node for node in after.graph.node if node.op_type == "Constant")
    assert given.attribute[0].t.data_type == TensorProto.FLOAT16
    assert reasons(result) == {"MatMul": "excluded by name or type"}
    assert weights(after)["w2"] == TensorProto.FLOAT16  # stored so, and cast
    assert len(run(after, random_feed(net.model()))) == 1


def test_types_that_the_opset_has_not_are_named() -> None:
    net = Net(opset=12)
    net.output(net.op("MatMul", net.input("x", 2, 8), net.normal("w", 8, 8), out="y"), (2, 8))
    _, result = convert(net.model(), dtype="bfloat16")
    assert not result.modified
    assert result.skips[0].reason == "opset 12 has no bfloat16"
    net.opset, net.infer = 17, True
    after, result = convert(net.model(), dtype="bfloat16")
    assert result.modified and weights(after) == {"w": TensorProto.BFLOAT16}
    conv = Net(opset=17)
    x = conv.input("x", 1, 3, 4, 4)
    conv.output(conv.op("Conv", x, conv.normal("w", 2, 3, 3, 3), out="y"), (1, 2, 2, 2))
    _, result = convert(conv.model(), dtype="bfloat16")
    assert reasons(result) == {"Conv": "Conv does not take bfloat16 in this opset"}


def test_weights_that_the_caller_may_override_stay() -> None:
    net = Net()
    net.normal("w", 32, 32)
    x, w = net.input("x", 2, 32), net.input("w", 32, 32)
    net.output(net.op("MatMul", x, w, out="y"), (2, 32))
    after, result = convert(net.model(), compute=False)
    assert not result.modified and weights(after) == {"w": TensorProto.FLOAT}
    assert result.skips[0].node == "w"


def test_large_weights_are_rounded_when_read_and_written_in_pieces(tmp_path: Path) -> None:
    net = Net()
    w = net.normal("w", 1100, 1024)
    net.output(net.op("MatMul", net.input("x", 1, 1100), w, out="y"), (1, 1024))
    model = ir.from_proto(net.model())
    ConvertFloat16()(model)
    tensor = model.graph.initializers["w"].const_value
    assert isinstance(tensor, ir.LazyTensor)
    expected = numpy_helper.to_array(net.weights[0]).astype(np.float16)
    np.testing.assert_array_equal(tensor.numpy(), expected)
    with (tmp_path / "w").open("wb") as file:
        tensor.tofile(file)
    assert (tmp_path / "w").read_bytes() == expected.tobytes()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("compute", [True, False])
def test_reference_models_are_halved_and_keep_45_db(name: str, compute: bool) -> None:
    proto = onnx.load(MODELS / name / "model.onnx")
    after, _ = convert(onnx.shape_inference.infer_shapes(proto), compute=compute)
    data = np.load(MODELS / name / "calibration.npz")
    feed = {v.name: data[v.name][:8] for v in proto.graph.input}
    expected, actual = run(proto, feed)[0], run(after, feed)[0]
    assert sqnr(expected, actual) >= (45 if compute else 55)
    assert after.ByteSize() < 0.62 * proto.ByteSize()


def test_the_scheme_computes_in_a_type_only_where_the_target_does() -> None:
    def computes(target: str) -> bool:
        (convert,) = (p for p in schemes.half("float16", target) if isinstance(p, ConvertFloat16))
        return convert.compute

    assert computes("cuda") and not computes("cpu")
