"""Dynamic quantization: what the runtime fuses it to, and each form of a product, table, LSTM."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper, numpy_helper

from onnxcompress import targets
from onnxcompress.contract import Result
from onnxcompress.graph.quantized_weights import WeightStore
from onnxcompress.numerics.saturation import largest_pair_sum
from onnxcompress.passes.quantize_dynamic import QuantizeDynamic
from onnxcompress.session import Session, optimized_model
from tests.passes.exactness import Net, apply, apply_twice, count, random_feed, run

PASS = QuantizeDynamic(min_elements=0)
ZOO = Path(__file__).parents[3] / "shared" / "zoo"


def check(
    proto: onnx.ModelProto,
    pass_: QuantizeDynamic = PASS,
    *,
    tolerance: float = 0.03,
    feed: Any = None,
) -> tuple[onnx.ModelProto, Result, Counter[str]]:
    """Quantize; assert that it runs near float, optimized or not, and that again is idle.

    Returns the model, the pass's result, and the operators that ONNX Runtime makes of it.
    """
    after, result = apply_twice(pass_, proto)
    onnx.checker.check_model(after, full_check=True)
    assert result.modified
    feed = random_feed(proto) if feed is None else feed
    fused = Session(ir.from_proto(after)).run(feed)
    outputs = zip(run(proto, feed), run(after, feed), fused.values(), strict=True)
    for expected, plain, optimized in outputs:
        assert plain.shape == optimized.shape == expected.shape
        scale = np.abs(expected).max()
        assert np.abs(plain - expected).max() <= tolerance * scale
        assert np.abs(optimized - expected).max() <= tolerance * scale
    nodes = ir.traversal.RecursiveGraphIterator(optimized_model(ir.from_proto(after)).graph)
    return after, result, Counter(node.op_type for node in nodes)


def product(
    *weight: int, data: tuple[Any, ...] = ("N", 5, 24), bias: tuple[int, ...] | None = None
) -> onnx.ModelProto:
    net = Net()
    net.input("x", *data)
    y = net.op("MatMul", "x", net.normal("w", *weight), out="y" if bias is None else "m")
    if bias is not None:
        net.op("Add", y, net.normal("b", *bias), out="y")
    net.output("y")
    return net.model()


def test_a_product_and_its_bias_become_one_fused_kernel():
    after, result, fused = check(product(24, 12, bias=(12,)))
    assert fused == {"DynamicQuantizeMatMul": 1}
    assert result.figures == {"matrix products": 1, "LSTMs": 0, "embedding tables": 0}
    assert {w.name: w.data_type for w in after.graph.initializer} == {
        "b": TensorProto.FLOAT,
        "w_quantized": TensorProto.INT8,
        "w_scale": TensorProto.FLOAT,
    }


def test_a_bias_on_the_left_is_fused_too():
    net = Net()
    net.input("x", "N", 24)
    net.op("Add", net.normal("b", 12), net.op("MatMul", "x", net.normal("w", 24, 12)), out="y")
    net.output("y")
    assert check(net.model())[2] == {"DynamicQuantizeMatMul": 1}


@pytest.mark.parametrize(
    ("weight", "bias"), [((24, 12), (1, 1, 12)), ((24, 1), (6,)), ((24, 1), (1, 1, 6))]
)
def test_what_the_runtime_would_wrongly_take_for_a_bias_is_declined(weight: Any, bias: Any):
    """ONNX Runtime loses an axis of the result, or fails on it."""
    proto = product(*weight, bias=bias, data=(5, 24))
    assert "taken for a bias" in reason(proto)


@pytest.mark.parametrize("bias", [(), (1,), (5, 12), (5, 1), (2, 5, 12)])
def test_other_addends_stay_behind_the_kernel(bias: Any):
    fused = check(product(24, 12, bias=bias, data=(5, 24)))[2]
    assert fused == {"DynamicQuantizeMatMul": 1, "Add": 1}


def test_products_of_one_value_share_its_quantization_and_keep_their_biases():
    net = Net()
    net.input("x", "N", 5, 24)
    for name in ("q", "k", "v"):
        product = net.op("MatMul", "x", net.normal(f"w_{name}", 24, 24))
        net.op("Add", product, net.normal(f"b_{name}", 24), out=name)
        net.output(name)
    fused = check(net.model())[2]
    assert fused == {"DynamicQuantizeLinear": 1, "MatMulIntegerToFloat": 3}


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize(
    ("data", "weight"), [((24,), (24, 6)), ((3, 5, 24), (3, 24, 6)), ((5, 24), (2, 3, 24, 6))]
)
def test_products_of_any_rank(data: Any, weight: Any, per_channel: bool):
    pass_ = dataclasses.replace(PASS, per_channel=per_channel)
    assert check(product(*weight, data=data), pass_)[2] == {"DynamicQuantizeMatMul": 1}


@pytest.mark.parametrize("bias", [None, (), (6,), (1, 6), (5, 1), (5, 6)])
@pytest.mark.parametrize("transposed", [(0, 0), (0, 1), (1, 0), (1, 1)])
@pytest.mark.parametrize("factors", [(1.0, 1.0), (-0.5, 3.0)])
def test_every_form_of_gemm(bias: Any, transposed: tuple[int, int], factors: tuple[float, float]):
    net = Net()
    net.input("x", *((24, 5) if transposed[0] else (5, 24)))
    inputs = ["x", net.normal("w", *((6, 24) if transposed[1] else (24, 6)))]
    if bias is not None:
        inputs.append(net.normal("c", *bias))
    attributes = dict(zip(("transA", "transB", "alpha", "beta"), transposed + factors, strict=True))
    net.op("Gemm", *inputs, out="y", **attributes)
    net.output("y")
    fused = check(net.model())[2]
    assert fused["DynamicQuantizeMatMul"] == 1
    if bias in (None, (6,), (1, 6)):
        assert not fused["Add"] and fused["Transpose"] == transposed[0]


def test_gemm_with_a_computed_addend():
    net = Net()
    net.input("x", "N", 24)
    net.op("Gemm", "x", net.normal("w", 24, 24), net.op("Relu", "x"), out="y", beta=0.5)
    net.output("y")
    assert check(net.model())[2]["DynamicQuantizeMatMul"] == 1


def test_outputs_that_are_products_keep_their_names_when_read_elsewhere():
    net = Net()
    net.input("x", "N", 24)
    net.op("MatMul", "x", net.normal("w", 24, 24), out="y")
    net.op("Add", "y", net.normal("b", 24), out="z")
    net.output("y")
    net.output("z")
    check(net.model())


def test_a_weight_of_several_products_is_stored_once():
    net = Net()
    net.input("x", "N", 24)
    net.op("MatMul", net.op("MatMul", "x", net.normal("w", 24, 24)), "w", out="y")
    net.output("y")
    after = check(net.model())[0]
    assert sorted(w.name for w in after.graph.initializer) == ["w_quantized", "w_scale"]


def branches(inner: bool) -> onnx.ModelProto:
    """`y = x @ w if flag else x`, the weight a Constant inside the branch or one outside."""
    net, then, other = Net(), Net(prefix="t"), Net(prefix="e")
    net.input("x", 3, 24)
    net.inputs.append(helper.make_tensor_value_info("flag", TensorProto.BOOL, ()))
    weight = net.random.standard_normal((24, 24)).astype(np.float32)
    if inner:
        then.op("Constant", out="w", value=numpy_helper.from_array(weight))
    else:
        net.weight("w", weight)
    then.op("MatMul", "x", "w", out="a")
    other.op("Identity", "x", out="b")
    then.output("a", (3, 24))
    other.output("b", (3, 24))
    net.op("If", "flag", out="y", then_branch=then.graph(), else_branch=other.graph())
    net.output("y", (3, 24))
    return net.model()


@pytest.mark.parametrize("inner", [True, False])
def test_products_inside_branches(inner: bool):
    proto = branches(inner)
    feed = {"x": random_feed(product(24, 1, data=(3, 24)))["x"], "flag": np.asarray(True)}
    after, _, fused = check(proto, feed=feed)
    assert fused["DynamicQuantizeMatMul"] == 1
    assert not count(after, "MatMul", "Constant")
    assert "w" not in {w.name for w in after.graph.initializer}


def lookup(width: int = 16, *, axis: int = 0, tied: bool = False) -> onnx.ModelProto:
    net = Net()
    net.inputs.append(helper.make_tensor_value_info("ids", TensorProto.INT64, ("N", 3)))
    net.normal("table", 40, width)
    net.op("Gather", "table", "ids", out="y", axis=axis)
    net.output("y")
    if tied:
        net.op("Gather", "table", "ids", out="z", axis=1)
        net.output("z")
    return net.model()


IDS = {"ids": np.asarray([[0, 39, -1], [7, 7, 12]], np.int64)}


def test_a_table_of_embeddings_is_stored_as_integers():
    after, result, _ = check(lookup(), feed=IDS, tolerance=0.005)
    sizes = {w.name: (w.data_type, tuple(w.dims)) for w in after.graph.initializer}
    assert sizes == {
        "table_quantized": (TensorProto.INT8, (40, 16)),
        "table_scale": (TensorProto.FLOAT, (40, 1)),
    }
    assert result.figures["embedding tables"] == 1


@pytest.mark.parametrize(("quiet", "fits"), [(0.001, True), (0.0039, False)])
def test_a_table_that_does_not_fit_eight_bits_stays(quiet: float, fits: bool):
    """One loud column in 256 sets the step; what it rounds away is lost."""
    proto = lookup(width=256)
    table = np.full((40, 256), quiet, np.float32)
    table[:, 0] = 1
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(table, "table"))
    _, result = apply(PASS, proto)
    assert result.modified == fits
    assert fits or "8 bits" in result.skips[0].reason


def lstm(
    directions: int = 1, *, layout: int = 0, peephole: bool = False, op: str = "LSTM", **attrs: Any
) -> onnx.ModelProto:
    net, hidden, size = Net(), 8, 12
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[op]
    net.input("x", 5, 2, size)
    inputs = ["x"]
    inputs += [net.normal(n, directions, gates * hidden, k) for n, k in (("w", size), ("r", 8))]
    if peephole:
        net.weights.append(numpy_helper.from_array(np.asarray([5, 3], np.int32), "lens"))
        inputs += [net.normal("b", directions, 2 * gates * hidden), "lens"]
        inputs += [net.normal(n, directions, 2, hidden) for n in ("h0", "c0")]
        inputs += [net.normal("p", directions, 3 * hidden)]
    direction = "bidirectional" if directions == 2 else "forward"
    net.op(op, *inputs, out="y", direction=direction, **attrs)
    net.output("y")
    if layout:
        net.nodes[-1].attribute.append(helper.make_attribute("layout", layout))
        net.infer = False
    return net.model()


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("full", [True, False])
def test_lstm(directions: int, full: bool, per_channel: bool):
    attributes: dict[str, Any] = {"hidden_size": 8}
    if full:
        activations = ["HardSigmoid", "Tanh", "Tanh"] * directions
        attributes |= {"clip": 2.0, "activations": activations}
        attributes |= {"activation_alpha": [0.25] * directions}
    proto = lstm(directions, peephole=full, **attributes)
    pass_ = dataclasses.replace(PASS, per_channel=per_channel)
    after, result = apply(pass_, proto)
    feed = random_feed(proto)
    (expected,), (actual,) = run(proto, feed), run(after, feed)
    assert result.figures["LSTMs"] == 1 and count(after, "DynamicQuantizeLSTM") == 1
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() < 0.06, "eight bits, through five steps"
    assert {o.domain for o in after.opset_import} == {"", "com.microsoft"}
    onnx.checker.check_model(after)


def reason(proto: onnx.ModelProto, pass_: QuantizeDynamic = PASS) -> str:
    """Why the only site was declined."""
    plain = ir.to_proto(ir.from_proto(proto)).SerializeToString()
    after, result = apply(pass_, proto)
    assert not result.modified and after.SerializeToString() == plain
    (skip,) = result.skips
    return skip.reason


def overridable() -> onnx.ModelProto:
    proto = product(24, 12)
    proto.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, (24, 12)))
    return proto


def typed(dtype: Any) -> onnx.ModelProto:
    net = Net(dtype=dtype)
    net.input("x", "N", 24)
    net.op("MatMul", "x", net.normal("w", 24, 12), out="y")
    net.output("y")
    return net.model()


def infinite() -> onnx.ModelProto:
    proto = product(24, 12)
    weight = np.full((24, 12), np.inf, np.float32)
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "w"))
    return proto


def old() -> onnx.ModelProto:
    proto = product(24, 12)
    proto.opset_import[0].version = 10
    return proto


def in_function() -> onnx.ModelProto:
    net = Net()
    net.domains["own"] = 1
    body = [helper.make_node("MatMul", ["a", "b"], ["c"], "inner")]
    opsets = [helper.make_opsetid("", 17)]
    net.functions.append(helper.make_function("own", "F", ["a", "b"], ["c"], body, opsets))
    net.input("x", "N", 24)
    net.op("F", "x", net.normal("w", 24, 12), out="y", domain="own")
    net.output("y", ("N", 12))
    net.infer = False
    return net.model()


@pytest.mark.parametrize(
    ("proto", "why"),
    [
        (overridable(), "computed or can be overridden"),
        (typed(np.float16), "float16"),
        (typed(np.float64), "double"),
        (infinite(), "NaN or infinity"),
        (old(), "opset 11"),
        (in_function(), "inline"),
        (product(24, data=(5, 24)), "not a matrix"),
        (product(70_000, 1, data=(1, 70_000)), "32 bits"),
        (lookup(width=4), "rows of some length"),
        (lookup(axis=1), "row by row"),
        (lstm(op="GRU", hidden_size=8), "GRU"),
        (lstm(layout=1, hidden_size=8), "time axis"),
    ],
)
def test_what_is_declined_and_why(proto: onnx.ModelProto, why: str):
    assert why in reason(proto)


def test_options_narrow_what_is_quantized():
    proto = product(24, 12)
    assert "excluded" in reason(proto, dataclasses.replace(PASS, exclude=("n_*",)))
    _, elsewhere = apply(dataclasses.replace(PASS, include=("Gemm",)), proto)
    assert not elsewhere.modified and not elsewhere.skips
    assert "float kernel is faster" in reason(proto, QuantizeDynamic())
    assert not apply(dataclasses.replace(PASS, embeddings=False), lookup())[1].modified


def test_a_table_with_other_readers_is_not_stored_twice():
    _, result = apply(PASS, lookup(tied=True))
    assert not result.modified
    assert all("stored twice" in skip.reason for skip in result.skips)


def test_a_custom_matmul_is_left_alone():
    proto = product(24, 12)
    proto.graph.node[0].domain = "own"
    proto.opset_import.append(helper.make_opsetid("own", 1))
    _, result = apply(PASS, proto)
    assert not result.modified and not result.skips


def test_sums_do_not_saturate_on_this_processor():
    """Equal weights and equal activations: every pair of products is as large as it can be."""
    proto = product(24, 8, data=(2, 24))
    weight = np.full((24, 8), 0.5, np.float32)
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "w"))
    check(proto, feed={"x": np.full((2, 24), 3.0, np.float32)}, tolerance=0.01)


FLOATS = st.floats(-10, 10, width=32) | st.just(0.0)


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=3, max_side=9), elements=FLOATS)
)
def test_codes_are_near_keep_zeros_and_bound_pairs(weight: Any):
    target = targets.load("cpu")
    bounded = dataclasses.replace(
        target, weights=dataclasses.replace(target.weights, pair_sums="bounded")
    )
    model = ir.from_proto(product(*weight.shape, data=(2, weight.shape[-2])))
    value = model.graph.initializers["w"]
    value.const_value = ir.tensor(weight)
    integers, scales = WeightStore(model.graph, bounded).matrices(value, by_row=False)
    assert integers.const_value is not None and scales.const_value is not None
    codes, scale = integers.const_value.numpy(), scales.const_value.numpy()
    assert codes.shape == weight.shape and scale.shape == (*weight.shape[:-2], weight.shape[-1])
    assert not codes[weight == 0].any()
    rows = codes.swapaxes(-1, -2).reshape(-1, weight.shape[-2])
    assert largest_pair_sum(rows).max() <= 128
    step = scale[..., None, :]
    assert np.all(np.abs(codes * step - weight) <= 2.01 * step), "rounding, and trimming of a pair"


def test_large_weights_are_computed_on_demand():
    proto = product(1100, 1000, data=(1, 1100))
    after = PASS(ir.from_proto(proto)).model
    tensor = after.graph.initializers["w_quantized"].const_value
    assert isinstance(tensor, ir.LazyTensor)
    assert tensor.numpy().shape == (1100, 1000)


@pytest.mark.zoo
@pytest.mark.skipif(not ZOO.is_dir(), reason="no zoo beside the checkout")
def test_sentence_similarity_survives():
    spec = importlib.util.spec_from_file_location("zoo_eval", ZOO / "zoo_eval.py")
    assert spec is not None and spec.loader is not None
    zoo_eval = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(zoo_eval)
    path, _, score = zoo_eval.load("minilm_stsb", str(ZOO), limit=60)
    proto, result = apply(QuantizeDynamic(), onnx.load(path))
    assert result.figures["matrix products"] == 36
    import onnxruntime

    session: Any = onnxruntime.InferenceSession(proto.SerializeToString())
    score(session)
    assert score.last["fp32_spearman"] > 0.99
