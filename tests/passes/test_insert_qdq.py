"""Pairs are placed where they become integer kernels, and the model still computes the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxcompress.contract import Result
from onnxcompress.errors import InputError
from onnxcompress.observe import observe
from onnxcompress.operators import averaged
from onnxcompress.passes.insert_qdq import InsertQdq
from onnxcompress.session import Session, optimized_model
from tests.passes.calibrated import feeds_of, least_sqnr, quantized
from tests.passes.exactness import Net

IMAGE = (2, 8, 10, 10)


def conv(net: Net, x: str, c_in: int = 8, c_out: int = 8, k: int = 3, **attrs: Any) -> str:
    n = len(net.nodes)
    group = attrs.get("group", 1)
    weight = net.normal(f"w{n}", c_out, c_in // group, *[k] * attrs.pop("dims", 2))
    bias = net.normal(f"b{n}", c_out)
    attrs.setdefault("pads", [k // 2] * 4)
    return net.op("Conv", x, weight, bias, **attrs)


def check(
    net: Net, kernels: Mapping[str, int], least: float = 30.0, **options: Any
) -> tuple[ir.Model, Result]:
    """Quantize, compare with float as written and as ONNX Runtime fuses it, count the kernels."""
    proto, feeds = net.model(), feeds_of(net)
    model, result = quantized(proto, feeds, **options)
    original = ir.from_proto(proto)
    assert least_sqnr(original, model, feeds, "none") > least
    assert least_sqnr(original, model, feeds, "all") > least
    found = Counter(node.op_type for node in optimized_model(model).graph)
    assert {op: found[op] for op in kernels} == dict(kernels), found
    for side in ("inputs", "outputs"):
        before, after = getattr(original.graph, side), getattr(model.graph, side)
        described = [[(v.name, v.type, str(v.shape)) for v in vs] for vs in (before, after)]
        assert described[0] == described[1]
    return model, result


FOLLOWERS: dict[str, tuple[Callable[[Net, str], str], dict[str, int]]] = {
    "relu": (lambda n, x: n.op("Relu", x), {"Relu": 0}),
    "relu6": (
        lambda n, x: n.op("Clip", x, n.weight("lo", 0.0), n.weight("hi", 6.0)),
        {"Clip": 0},
    ),
    "leaky relu": (lambda n, x: n.op("LeakyRelu", x, alpha=0.1), {"QLinearLeakyRelu": 1}),
    "sigmoid": (lambda n, x: n.op("Sigmoid", x), {"QLinearSigmoid": 1}),
    "swish": (lambda n, x: n.op("Mul", x, n.op("Sigmoid", x)), {"QLinearMul": 1}),
    "residual": (lambda n, x: n.op("Add", x, conv(n, x)), {"QLinearAdd": 1, "QLinearConv": 3}),
    "concat": (
        lambda n, x: conv(n, n.op("Concat", x, conv(n, x), axis=1), 16, 8),
        {"QLinearConcat": 1, "QLinearConv": 4},
    ),
    "average pool": (
        lambda n, x: n.op("AveragePool", x, kernel_shape=[2, 2]),
        {"QLinearAveragePool": 1},
    ),
    "softmax": (lambda n, x: n.op("Softmax", x, axis=1), {"QLinearSoftmax": 1}),
}


@pytest.mark.parametrize("name", FOLLOWERS)
def test_what_follows_a_convolution_runs_on_integers(name: str) -> None:
    follow, kernels = FOLLOWERS[name]
    net = Net()
    x = follow(net, conv(net, net.input("x", *IMAGE)))
    net.op("Relu", conv(net, x), out="y")
    net.output("y")
    model, _ = check(net, {"QLinearConv": 2, **kernels}, least=25)
    assert not any(node.op_type == "DynamicQuantizeLinear" for node in model.graph)


MOVES: dict[str, Callable[[Net, str], str]] = {
    "transpose": lambda n, x: n.op("Transpose", x, perm=[0, 1, 3, 2]),
    "reshape": lambda n, x: n.op("Reshape", x, ints(n, 2, 8, 5, 20)),
    "max pool": lambda n, x: n.op("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2]),
    "pad": lambda n, x: n.op("Pad", x, ints(n, 0, 0, 1, 1, 0, 0, 1, 1)),
    "slice": lambda n, x: n.op("Slice", x, ints(n, 1), ints(n, 9), ints(n, 2)),
    "nearest resize": lambda n, x: n.op("Resize", x, "", n.weight("scales", [1, 1, 2, 2])),
    "gather": lambda n, x: n.op("Gather", x, ints(n, 7, 6, 5, 4, 3, 2, 1, 0), axis=1),
    "depth to space and back": lambda n, x: n.op(
        "SpaceToDepth", n.op("DepthToSpace", x, blocksize=2), blocksize=2
    ),
    "unsqueeze and squeeze": lambda n, x: n.op(
        "Squeeze", n.op("Unsqueeze", x, ints(n, 0)), ints(n, 0)
    ),
    "expand": lambda n, x: n.op("Expand", x, ints(n, 2, 8, 10, 10)),
    "tile": lambda n, x: n.op("Tile", x, ints(n, 1, 1, 2, 1)),
}


def ints(net: Net, *values: int) -> str:
    name = f"i{len(net.weights)}"
    net.weights.append(helper.make_tensor(name, TensorProto.INT64, [len(values)], values))
    return name


@pytest.mark.parametrize("name", MOVES)
def test_moves_run_on_integers_and_keep_their_parameters(name: str) -> None:
    net = Net()
    x = MOVES[name](net, conv(net, net.input("x", *IMAGE)))
    net.op("Relu", conv(net, x), out="y")
    net.output("y")
    model, _ = check(net, {"QLinearConv": 2, "QuantizeLinear": 1, "DequantizeLinear": 1})
    pairs = Counter(n.op_type for n in model.graph)
    assert pairs["QuantizeLinear"] == 3  # the input, and each convolution's output


def test_split_hands_integers_to_every_output() -> None:
    net = Net(opset=18)
    x = conv(net, net.input("x", *IMAGE))
    net.nodes.append(helper.make_node("Split", [x], ["s0", "s1"], "split", axis=1, num_outputs=2))
    net.op("Add", conv(net, "s0", 4), conv(net, "s1", 4), out="y")
    net.output("y")
    check(net, {"QLinearConv": 3, "Split": 1, "QLinearAdd": 0})


@pytest.mark.parametrize(
    "attrs",
    [
        {"group": 4},
        {"group": 8},
        {"strides": [2, 2]},
        {"dilations": [2, 2], "pads": [2, 2, 2, 2]},
        {"pads": [0, 1, 2, 0]},
        {"auto_pad": "SAME_UPPER", "pads": None},
    ],
    ids=str,
)
def test_convolutions(attrs: dict[str, Any]) -> None:
    net = Net()
    given = {k: v for k, v in attrs.items() if v is not None}
    if "auto_pad" in given:
        n = net.normal("w", 8, 8, 3, 3)
        x = net.op("Conv", net.input("x", *IMAGE), n, **given)
    else:
        x = conv(net, net.input("x", *IMAGE), **given)
    net.op("Relu", x, out="y")
    net.output("y")
    check(net, {"QLinearConv": 1, "Conv": 0})


@pytest.mark.parametrize("dims", [1, 3])
def test_convolutions_of_other_ranks(dims: int) -> None:
    net = Net()
    x = net.input("x", 2, 8, *[9] * dims)
    net.op("Relu", conv(net, x, dims=dims, pads=[1] * (2 * dims)), out="y")
    net.output("y")
    check(net, {"QLinearConv": 1})


@pytest.mark.parametrize("transposed", [0, 1])
def test_gemm_gives_floats_where_nobody_wants_integers(transposed: int) -> None:
    net = Net()
    shape = (6, 32) if transposed else (32, 6)
    weight, bias = net.normal("w", *shape), net.normal("b", 6)
    net.op("Gemm", net.input("x", 4, 32), weight, bias, out="y", transB=transposed)
    net.output("y")
    model, _ = check(net, {"QGemm": 1, "QuantizeLinear": 1, "DequantizeLinear": 0})
    assert sum(n.op_type == "QuantizeLinear" for n in model.graph) == 1


def test_layers_of_a_perceptron_hand_on_integers() -> None:
    net = Net()
    x = net.input("x", 4, 32)
    for i in range(3):
        x = net.op("Relu", net.op("Gemm", x, net.normal(f"w{i}", 32, 32), net.normal(f"b{i}", 32)))
    net.op("Gemm", x, net.normal("w", 32, 5), out="y")
    net.output("y")
    check(net, {"QGemm": 4, "Relu": 0, "QuantizeLinear": 1}, least=25)


def test_products_of_activations() -> None:
    net = Net()
    x = net.input("x", 2, 6, 16)
    left = net.op("MatMul", x, net.normal("w", 16, 16))
    right = net.op("Transpose", net.op("MatMul", x, net.normal("v", 16, 16)), perm=[0, 2, 1])
    net.op("MatMul", left, right, out="y")
    net.output("y")
    model, _ = check(net, {"MatMul": 0, "MatMulIntegerToFloat": 1, "QLinearMatMul": 2})
    quantizers = [n for n in model.graph if n.op_type == "QuantizeLinear"]
    assert len(quantizers) == 3  # x once, though two products read it


def test_softmax_between_products_stays_in_float() -> None:
    net = Net()
    x = net.input("x", 2, 6, 16)
    scores = net.op("MatMul", x, net.op("Transpose", x, perm=[0, 2, 1]))
    masked = net.op(
        "Add", scores, net.weight("mask", np.array([0, 0, 0, 0, -1e30, -1e30], np.float32))
    )
    net.op("MatMul", net.op("Softmax", masked), x, out="y")
    net.output("y")
    check(net, {"MatMulIntegerToFloat": 2, "Softmax": 1, "QLinearSoftmax": 0, "Add": 1})


def test_batched_weights_take_one_scale() -> None:
    net = Net()
    net.op("MatMul", net.input("x", 3, 4, 16), net.normal("w", 3, 16, 8), out="y")
    net.output("y")
    check(net, {"MatMul": 0})


def test_a_shared_weight_is_stored_once() -> None:
    net = Net()
    x, w = net.input("x", *IMAGE), net.normal("w", 8, 8, 3, 3)
    first = net.op("Relu", net.op("Conv", x, w, pads=[1] * 4))
    net.op("Relu", net.op("Conv", first, w, pads=[1] * 4), out="y")
    net.output("y")
    model, _ = check(net, {"QLinearConv": 2})
    stored = [v for v in model.graph.initializers.values() if v.dtype == ir.DataType.INT8]
    assert sum(v.const_value.size for v in stored if v.const_value) == 8 * 8 * 9 + 8


def test_inner_values_that_are_exported_keep_their_names() -> None:
    net = Net()
    x = conv(net, net.input("x", *IMAGE))
    net.op("Relu", x, out="inner")
    net.op("Relu", conv(net, "inner"), out="y")
    net.output("inner")
    net.output("y")
    check(net, {"QLinearConv": 2})


def test_a_float_consumer_of_a_float_value_is_left_alone() -> None:
    net = Net()
    x = net.op("Tanh", net.input("x", *IMAGE))
    net.op("Add", conv(net, x), net.op("Sin", x), out="y")
    net.output("y")
    model, _ = check(net, {"QLinearConv": 1})
    (sin,) = (n for n in model.graph if n.op_type == "Sin")
    source = sin.inputs[0]
    assert source is not None and source.producer() is not None
    assert source.producer().op_type == "Tanh"  # pyright: ignore[reportOptionalMemberAccess]


def test_a_channel_without_weights_keeps_its_bias() -> None:
    net = Net()
    w = np.random.default_rng(0).standard_normal((8, 8, 3, 3))
    w[3] = 0
    bias = np.linspace(-2, 2, 8)
    weights = net.weight("w", w), net.weight("b", bias)
    net.op("Conv", net.input("x", *IMAGE), *weights, out="y", pads=[1] * 4)
    net.output("y")
    model, _ = check(net, {"QLinearConv": 1})
    found = Session(model, optimization="none").run(feeds_of(net)[0])["y"][:, 3]
    assert np.abs(found - bias[3]).max() < 0.5


def test_no_pair_of_weights_can_saturate_without_vnni(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxcompress.targets.machine_has_vnni", lambda: False)
    net = Net()
    net.op("Relu", conv(net, net.input("x", *IMAGE), c_out=64), out="y")
    net.output("y")
    model, _ = check(net, {"QLinearConv": 1})
    stored = next(
        v.const_value.numpy()
        for v in model.graph.initializers.values()
        if v.const_value is not None and v.dtype == ir.DataType.INT8 and len(v.shape or ()) == 4
    )
    pairs = stored.transpose(0, 2, 3, 1).reshape(64, -1, 2).astype(int)
    assert np.maximum(pairs, 0).sum(2).max() <= 128
    assert np.maximum(-pairs, 0).sum(2).max() <= 128


def excluded(net: Net) -> None:
    net.op("Relu", conv(net, net.input("x", *IMAGE)), out="y")


def computed(net: Net) -> None:
    w = net.op("Mul", net.normal("w", 8, 8, 3, 3), net.op("ReduceMax", "x", keepdims=0))
    net.input("x", *IMAGE)
    net.op("Conv", "x", w, out="y")


def scaled_gemm(net: Net) -> None:
    net.op("Gemm", net.input("x", 4, 8), net.normal("w", 8, 8), out="y", alpha=0.5)


def not_finite(net: Net) -> None:
    w = np.ones((8, 8, 3, 3))
    w[0, 0, 0, 0] = np.inf
    net.op("Conv", net.input("x", *IMAGE), net.weight("w", w), out="y")


@pytest.mark.parametrize(
    ("build", "options", "reason"),
    [
        (excluded, {"exclude": ("Conv",)}, "excluded"),
        (excluded, {"include": ("nothing*",)}, "excluded"),
        (computed, {}, "computed"),
        (scaled_gemm, {}, "alpha"),
        (not_finite, {}, "NaN or infinity"),
    ],
)
def test_what_is_declined_is_left_alone_and_said(
    build: Callable[[Net], None], options: dict[str, Any], reason: str
) -> None:
    net = Net()
    build(net)
    net.output("y")
    model = ir.from_proto(net.model())
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    result = InsertQdq(**options)(model)
    assert isinstance(result, Result)
    assert not result.modified
    assert any(reason in skip.reason for skip in result.skips), result.skips
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_half_precision_stays() -> None:
    net = Net(dtype=np.float16)
    net.op("Relu", conv(net, net.input("x", *IMAGE)), out="y")
    net.output("y")
    result = InsertQdq()(ir.from_proto(net.model()))
    assert isinstance(result, Result)
    assert not result.modified
    assert "float16" in result.skips[0].reason


def test_an_overridable_weight_stays() -> None:
    net = Net()
    w = net.normal("w", 8, 8, 3, 3)
    x = net.input("x", *IMAGE)
    net.input("w", 8, 8, 3, 3)
    net.op("Conv", x, w, out="y")
    net.output("y")
    result = InsertQdq()(ir.from_proto(net.model()))
    assert isinstance(result, Result)
    assert not result.modified
    assert "overridden" in result.skips[0].reason


def test_bodies_read_what_the_outer_graph_hands_them() -> None:
    net = Net()
    x = conv(net, net.input("x", *IMAGE))
    branches = {}
    for name, op in (("then_branch", "Relu"), ("else_branch", "Neg")):
        out = helper.make_tensor_value_info(f"{name}_y", TensorProto.FLOAT, None)
        body = helper.make_node(op, [x], [f"{name}_y"])
        branches[name] = helper.make_graph([body], name, [], [out])
    condition = helper.make_tensor("c", TensorProto.BOOL, [], [True])
    net.weights.append(condition)
    net.nodes.append(helper.make_node("If", ["c"], ["y"], "if", **branches))
    net.output("y")
    check(net, {"QLinearConv": 1})


def test_names_that_are_taken_are_not_taken_again() -> None:
    net = Net()
    net.op("Relu", conv(net, net.input("x", *IMAGE)), out="x_quantized")
    net.op("Relu", conv(net, "x_quantized"), out="y")
    net.output("y")
    check(net, {"QLinearConv": 2})


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse", "entropy"])
def test_methods(method: str) -> None:
    net = Net()
    net.op("Relu", conv(net, net.input("x", *IMAGE)), out="y")
    net.output("y")
    check(net, {"QLinearConv": 1}, least=20, method=method)


def test_per_tensor_weights_have_one_scale() -> None:
    net = Net()
    net.op("Relu", conv(net, net.input("x", *IMAGE)), out="y")
    net.output("y")
    model, _ = check(net, {"QLinearConv": 1}, per_channel=False)
    scales = [v for name, v in model.graph.initializers.items() if name.endswith("_scale")]
    assert all(len(v.shape or ()) == 0 for v in scales)


def test_a_second_run_changes_nothing() -> None:
    net = Net()
    net.op("Relu", conv(net, net.input("x", *IMAGE)), out="y")
    net.output("y")
    model, _ = quantized(net.model(), feeds_of(net))
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    again = replace(InsertQdq(), statistics=observe(model, feeds_of(net), []))(model)
    assert not again.modified
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_products_of_integers_are_not_quantized_again() -> None:
    net = Net()
    x = net.op("MatMul", net.input("x", 2, 6, 8), net.normal("w", 8, 8))
    y = net.op("Transpose", x, perm=[0, 2, 1])
    net.op("MatMul", x, y, out="y")
    net.output("y")
    model, _ = quantized(net.model(), feeds_of(net))
    again = InsertQdq()(model)
    assert not again.modified
    assert isinstance(again, Result) and "already" in again.skips[0].reason


def test_padding_may_lie_outside_of_what_it_pads() -> None:
    net = Net()
    pads = numpy_helper.from_array(np.array([0, 0, 1, 1, 0, 0, 1, 1]), "pads")
    net.weights.append(pads)
    x = net.op("Relu", conv(net, net.input("x", *IMAGE)))
    x = net.op("Pad", x, "pads", net.weight("filler", 400.0))
    net.op("Relu", conv(net, x, k=1), out="y")
    net.output("y")
    check(net, {"QLinearConv": 2}, least=20)


@pytest.mark.parametrize("between", ["Relu", "Identity", ""])
def test_no_pairs_stand_around_a_pool_that_counts_otherwise_on_integers(between: str) -> None:
    net = Net()
    x = net.op("Relu", conv(net, net.input("x", *IMAGE)))
    attrs: dict[str, Any] = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [0] * 4}
    x = net.op("AveragePool", conv(net, x), ceil_mode=1, count_include_pad=1, **attrs)
    if between:
        x = net.op(between, x)
    net.op("Relu", conv(net, x), out="y")
    net.output("y")
    check(net, {"QLinearAveragePool": 0, "QLinearConv": 2})


def test_a_second_run_takes_no_name_of_the_first() -> None:
    net = Net()
    x = net.op("Relu", conv(net, net.input("x", *IMAGE)), out="h")
    net.op("Relu", conv(net, x), out="z")
    net.op("Relu", conv(net, "z"), out="y")
    net.output("y")
    model, _ = quantized(net.model(), feeds_of(net), exclude=("n_4", "n_5", net.nodes[2].name))
    model, result = quantized(ir.to_proto(model), feeds_of(net))
    assert result.modified
    names = [node.name for node in model.graph]
    assert len(set(names)) == len(names)
    assert least_sqnr(ir.from_proto(net.model()), model, feeds_of(net), "none") > 25


def test_a_range_that_the_clip_before_it_leaves_no_room_for() -> None:
    net = Net()
    low, high = net.weight("low", 0.2), net.weight("high", 1.0)
    x = net.op("Clip", net.input("x", *IMAGE), low, high)
    net.op("Relu", conv(net, x), out="y")
    net.output("y")
    feeds = [{"x": -np.ones(IMAGE, np.float32)}] * 6
    model, result = quantized(net.model(), feeds)
    assert result.modified
    assert least_sqnr(ir.from_proto(net.model()), model, feeds, "none") > 25


def test_without_statistics_it_names_what_is_missing() -> None:
    net = Net()
    net.op("Relu", conv(net, net.input("x", *IMAGE)), out="y")
    net.output("y")
    with pytest.raises(InputError, match=r"insert_qdq needs statistics of 'x'"):
        InsertQdq()(ir.from_proto(net.model()))


def test_what_leaky_relu_gives_out_is_observed_only_for_those_who_may_exclude_it() -> None:
    net = Net()
    x = net.op("LeakyRelu", conv(net, net.input("x", *IMAGE)), alpha=0.1)
    net.op("Relu", conv(net, x), out="y")
    net.output("y")
    model = ir.from_proto(net.model())
    (leaky,) = (n for n in model.graph if n.op_type == "LeakyRelu")
    behind = leaky.outputs[0].name
    pass_ = InsertQdq()
    assert behind not in {want.value for want in pass_.wants(model)}
    everything = observe(model, feeds_of(net), pass_.could_want(model))
    result = replace(InsertQdq(exclude=("LeakyRelu",)), statistics=everything)(model)
    assert result.modified and behind in {want.value for want in everything.kept}


def test_leaky_relu_gives_out_the_scale_that_it_takes() -> None:
    net = Net()
    x = net.op("LeakyRelu", conv(net, net.input("x", *IMAGE)), alpha=0.1)
    net.op("Relu", conv(net, x), out="y")
    net.output("y")
    model, _ = check(net, {"QLinearLeakyRelu": 1}, least=25)
    (leaky,) = (n for n in model.graph if n.op_type == "LeakyRelu")
    (use,) = leaky.outputs[0].uses()
    before = leaky.inputs[0].producer() if leaky.inputs[0] else None
    assert before is not None and use.node.op_type == "QuantizeLinear"
    scales = [n.inputs[1].const_value for n in (before, use.node) if n.inputs[1] is not None]
    assert scales[0] is not None and scales[1] is not None
    assert scales[0].numpy() == scales[1].numpy()


@pytest.mark.parametrize(
    ("pool", "wider"),
    [("GlobalAveragePool", True), ("GlobalMaxPool", False)],
)
def test_what_is_averaged_next_is_hardly_clipped(pool: str, wider: bool) -> None:
    """Rounding errors cancel in a mean, those of clipping do not."""
    net, shape = Net(), (2, 8, 100, 100)  # of few elements the outermost are too far to be clipped
    made = net.op("Conv", net.input("x", *shape), net.weight("w", np.eye(8)[..., None, None]))
    net.output(net.op(pool, made, out="y"))
    random = np.random.default_rng(0)
    feeds = [{"x": random.laplace(size=shape).astype(np.float32)} for _ in range(20)]
    model, _ = quantized(net.model(), feeds)
    made_scale, x_scale = (
        float(v.const_value.numpy())
        for v in (model.graph.initializers[f"{name}_scale"] for name in (made, "x"))
        if v.const_value is not None
    )
    assert (made_scale > 1.02 * x_scale) == wider


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("(float[N,3,8,6] x) => (float[N,3,1,1] y) { y = GlobalAveragePool(x) }", 48),
        ("(float[2,3,8,6] x) => (float[2,3] y) { y = ReduceMean<axes=[2,3],keepdims=0>(x) }", 48),
        ("(float[2,3,H,6] x) => (float[2,3,1,1] y) { y = GlobalAveragePool(x) }", 1),
        ("(float[2,3,8,6] x) => (float[2,3,1,1] y) { y = GlobalMaxPool(x) }", 1),
    ],
)
def test_how_many_elements_a_mean_is_taken_of(text: str, count: int) -> None:
    model = ir.from_onnx_text(f'<ir_version: 8, opset_import: ["": 17]> g {text}')
    assert averaged(model.graph[0]) == count
