"""Every operator that a batch normalization may stand beside, crossed with every trap."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from onnxcompress.model_io import load
from onnxcompress.passes.fold_batchnorm import FoldBatchnorm
from tests.passes.exactness import (
    LAYERS,
    Layer,
    Net,
    apply,
    assert_close,
    check_exact,
    count,
    random_feed,
    run,
)

PASS = FoldBatchnorm()


EVERY = pytest.mark.parametrize("name", LAYERS)


def after(proto: onnx.ModelProto, left: int, **options: Any) -> onnx.ModelProto:
    folded, result = check_exact(PASS, proto, **options)
    assert count(folded, "BatchNormalization") == left
    assert len(result.skips) == left and all(s.reason and s.node for s in result.skips)
    return folded


def plain(name: str, net: Net | None = None) -> tuple[Net, Layer, str]:
    net, which = net or Net(), LAYERS[name]
    return net, which, which.feed(net)


# --- after a linear operator -----------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("bias", [True, False])
def test_after(name: str, bias: bool) -> None:
    net, which, x = plain(name)
    net.output(net.op("Relu", net.norm(which.add(net, x, bias=bias), which.channels)))
    folded = after(net.model(), 0)
    expected = which.op == "MatMul"
    assert count(folded, "Add") == expected, "only a MatMul keeps its shift as an Add"
    assert count(folded, "Mul") == 0


@EVERY
def test_after_and_exported(name: str) -> None:
    net, which, x = plain(name)
    z = net.output(net.norm(which.add(net, x), which.channels, out="normed"))
    net.output(net.op("Relu", z))
    folded = after(net.model(), 0)
    assert any("normed" in node.output for node in folded.graph.node)


@EVERY
def test_chain_of_two(name: str) -> None:
    net, which, x = plain(name)
    net.output(net.norm(net.norm(which.add(net, x), which.channels), which.channels))
    after(net.model(), 0)


@EVERY
def test_through_identity_and_constant_nodes(name: str) -> None:
    net, which, x = plain(name)
    array = net.random.standard_normal(which.weight).astype(np.float32)
    w = net.op("Constant", value=numpy_helper.from_array(array, "w"))
    y = net.op("Identity", which.add(net, x, net.op("Identity", w)))
    net.output(net.norm(y, which.channels))
    folded = after(net.model(), 0)
    assert count(folded, "Constant") == 0


@EVERY
def test_weight_shared(name: str) -> None:
    net, which, x = plain(name)
    w = net.normal("w", *which.weight)
    net.output(net.norm(which.add(net, x, w), which.channels))
    net.output(which.add(net, x, w))
    net.output(net.norm(which.add(net, x, w), which.channels))
    after(net.model(), 0)


@EVERY
def test_weight_exported_or_named_like_ours(name: str) -> None:
    net, which, x = plain(name)
    w = net.output(net.normal("w", *which.weight))
    net.output(net.norm(which.add(net, x, w), which.channels, out="z"))
    net.output(net.op("Relu", x, out="w_folded"))
    net.output(net.op("Neg", x, out="z_add"))
    after(net.model(), 0)


@EVERY
@pytest.mark.parametrize("exported", [True, False])
def test_value_between_is_seen_elsewhere(name: str, exported: bool) -> None:
    net, which, x = plain(name)
    y = which.add(net, x)
    net.output(net.norm(y, which.channels))
    net.output(y if exported else net.op("Relu", y))
    after(net.model(), 1)


@EVERY
def test_weight_may_be_overridden(name: str) -> None:
    net, which, x = plain(name)
    w = net.normal("w", *which.weight)
    net.input(w, *which.weight)
    net.output(net.norm(which.add(net, x, w), which.channels))
    proto = net.model()
    folded = after(proto, 1)
    feed = {"x": np.ones(which.data, np.float32), "w": np.ones(which.weight, np.float32)}
    np.testing.assert_allclose(run(folded, feed)[0], run(proto, feed)[0], rtol=1e-5)


@EVERY
def test_weight_is_an_input_or_computed(name: str) -> None:
    for computed in (True, False):
        net, which, x = plain(name)
        w = net.input("w", *which.weight)
        net.output(net.norm(which.add(net, x, net.op("Neg", w) if computed else w), which.channels))
        after(net.model(), 1)


@EVERY
def test_parameter_may_be_overridden(name: str) -> None:
    net, which, x = plain(name)
    net.output(net.norm(which.add(net, x), which.channels, out="z"))
    net.input("z_mean", which.channels)
    after(net.model(), 1)


@EVERY
def test_ranks_unknown(name: str) -> None:
    net, which, x = plain(name)
    net.infer = False
    net.output(net.norm(which.add(net, x), which.channels))
    after(net.model(), 0)


@EVERY
def test_symbolic_dimensions(name: str) -> None:
    which, net = LAYERS[name], Net()
    shape: list[Any] = list(which.data)
    shape[1 if name == "gemm_a" else 0] = "n"
    net.input("x", *shape)
    net.output(net.norm(which.add(net, "x"), which.channels))
    after(net.model(), 0, feed={"x": np.ones(which.data, np.float32)})


@EVERY
@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_floats(name: str, dtype: Any) -> None:
    if name == "transposed_grouped" and dtype is np.float64:
        pytest.skip("neither ONNX Runtime nor the reference evaluator runs it")
    net, which, x = plain(name, Net(dtype=dtype))
    net.output(net.norm(which.add(net, x), which.channels))
    after(net.model(), 0, rtol=4e-3 if dtype is np.float16 else 1e-6)


@EVERY
@pytest.mark.parametrize("opset", [7, 8, 9, 11, 13, 14, 15, 21])
def test_opsets(name: str, opset: int) -> None:
    net, which, x = plain(name, Net(opset))
    net.output(net.norm(which.add(net, x), which.channels))
    after(net.model(), 0)


@EVERY
def test_training_mode(name: str) -> None:
    net, which, x = plain(name)
    y = net.norm(which.add(net, x), which.channels, training_mode=1)
    net.nodes[-1].output.extend(["running_mean", "running_var"])
    net.output(y)
    _, result = apply(PASS, net.model())
    assert not result.modified
    assert "training" in result.skips[0].reason


@EVERY
def test_weights_of_the_outer_scope(name: str) -> None:
    net, which, x = plain(name)
    w = net.normal("w", *which.weight)
    then, other = Net(prefix="t"), Net(prefix="e")
    then.output(then.norm(which.add(then, x, w), which.channels, out="then"))
    outer = {"then_scale", "then_var"}
    net.weights += [t for t in then.weights if t.name in outer]
    then.weights = [t for t in then.weights if t.name not in outer]
    other.output(other.norm(which.add(other, x, w, bias=False), which.channels, out="else"))
    cond = net.op("Cast", net.op("ReduceMax", x, keepdims=0), to=TensorProto.BOOL)
    net.output(net.op("If", cond, then_branch=then.graph("t"), else_branch=other.graph("e")))
    after(net.model(), 0)


@EVERY
def test_in_a_function(name: str) -> None:
    net, which, _ = plain(name)
    body = Net()
    array = body.random.standard_normal(which.weight).astype(np.float32)
    w = body.op("Constant", value=numpy_helper.from_array(array, "w"))
    z = body.norm(which.add(body, "x", w, bias=False), which.channels)
    constants = [helper.make_node("Constant", [], [t.name], value=t) for t in body.weights]
    net.domains["local"] = 1
    opsets = [helper.make_opsetid("", 17)]
    function = helper.make_function("local", "Block", ["x"], [z], constants + body.nodes, opsets)
    net.functions.append(function)
    net.output(net.op("Block", "x", domain="local"))
    after(net.model(), 1 if which.op == "MatMul" else 0)  # whose rank is known at the call only


# --- before a linear operator ----------------------------------------------------------------


def in_channels(which: Layer) -> int:
    return which.data[1]


def unpadded(which: Layer) -> bool:
    names = [name for name, _ in which.attrs]
    return "pads" not in names and dict(which.attrs).get("auto_pad") != "SAME_UPPER"


@EVERY
@pytest.mark.parametrize("bias", [True, False])
def test_before(name: str, bias: bool) -> None:
    net, which, x = plain(name)
    y = net.norm(net.op("Relu", x), in_channels(which))
    net.output(which.add(net, y, bias=bias))
    exact = unpadded(which) and which.op != "ConvTranspose" and name != "gemm_a"
    after(net.model(), 0 if exact else 1)


@EVERY
def test_before_without_a_shift(name: str) -> None:
    net, which, x = plain(name)
    channels = in_channels(which)
    y = net.norm(net.op("Relu", x), channels, out="z")
    net.weights = [t for t in net.weights if t.name not in ("z_bias", "z_mean")]
    net.weight("z_bias", np.zeros(channels))
    net.weight("z_mean", np.zeros(channels))
    net.output(which.add(net, y))
    folded = after(net.model(), 0)
    assert count(folded, "Mul") == (name == "gemm_a"), "its channels are on another axis: alone"


@EVERY
def test_before_several_and_through_identity(name: str) -> None:
    net, which, x = plain(name)
    y = net.norm(net.op("Relu", x), in_channels(which))
    w = net.normal("w", *which.weight)
    net.output(which.add(net, net.op("Identity", y), w))
    net.output(which.add(net, y, w))
    exact = unpadded(which) and which.op != "ConvTranspose" and name != "gemm_a"
    after(net.model(), 0 if exact else 1)


@EVERY
@pytest.mark.parametrize("exported", [True, False])
def test_before_but_also_seen_elsewhere(name: str, exported: bool) -> None:
    net, which, x = plain(name)
    y = net.norm(net.op("Relu", x), in_channels(which))
    net.output(which.add(net, y))
    net.output(y if exported else net.op("Neg", y))
    after(net.model(), 1)


@EVERY
def test_between_two(name: str) -> None:
    """Into the operator before where both could take it; the activation stays where it is."""
    net, which, x = plain(name)
    y = net.norm(which.add(net, x), which.channels)
    rank = 2 if which.op == "Gemm" else len(which.data)
    if which.op in ("Conv", "ConvTranspose"):
        w = net.normal("next", 2, which.channels, *[1] * (rank - 2))
        net.output(net.op("Conv", y, w))
    else:
        net.output(net.op("Relu", y))
    after(net.model(), 0)


# --- one trap each -----------------------------------------------------------------------------

Build = Callable[[Net], Any]
TRAPS: dict[str, tuple[int, Build]] = {}


def trap(left: int) -> Callable[[Build], Build]:
    """Register a case and how many batch normalizations must be left."""

    def register(build: Build) -> Build:
        TRAPS[build.__name__] = (left, build)
        return build

    return register


def conv(net: Net, x: str, channels: int = 4, **attrs: Any) -> str:
    return net.op("Conv", x, net.normal(f"w{len(net.nodes)}", channels, 3, 3, 3), **attrs)


def image(net: Net) -> str:
    return net.input("x", 2, 3, 6, 6)


def put(net: Net, name: str, value: Any) -> None:
    """Replace a weight."""
    net.weights = [t for t in net.weights if t.name != name]
    net.weight(name, value)


@trap(1)
def alone(net: Net) -> None:
    net.output(net.op("Relu", net.norm(image(net), 3)))


@trap(0)
def alone_scale_only(net: Net) -> None:
    net.output(net.op("Relu", net.norm(image(net), 3, out="z")))
    put(net, "z_mean", [0] * 3)
    put(net, "z_bias", [0] * 3)


@trap(0)
def alone_shift_only(net: Net) -> None:
    net.output(net.op("Relu", net.norm(image(net), 3, out="z", epsilon=0.0)))
    put(net, "z_scale", [1] * 3)
    put(net, "z_var", [1] * 3)


@trap(0)
def alone_identity_exported(net: Net) -> None:
    net.output(net.norm(image(net), 3, out="z", epsilon=0.0))
    for name, number in (("scale", 1), ("var", 1), ("mean", 0), ("bias", 0)):
        put(net, f"z_{name}", [number] * 3)


@trap(1)
def alone_chain_of_three(net: Net) -> None:
    net.output(net.norm(net.norm(net.norm(image(net), 3), 3), 3))


@trap(1)
def vector_of_one_channel(net: Net) -> None:
    net.output(net.norm(net.input("x", 7), 1))


@trap(1)
def another_domain(net: Net) -> None:
    net.domains["com.microsoft"] = 1
    w = net.normal("w", 4, 3, 3, 3)
    y = net.op("FusedConv", image(net), w, domain="com.microsoft", activation="Relu")
    net.output(net.norm(y, 4))


@trap(1)
def padding_between(net: Net) -> None:
    net.weights.append(numpy_helper.from_array(np.array([0, 0, 1, 1, 0, 0, 1, 1]), "pads"))
    net.output(net.norm(net.op("Pad", conv(net, image(net)), "pads"), 4))


@trap(1)
def activation_between(net: Net) -> None:
    net.output(net.norm(net.op("Relu", conv(net, image(net))), 4))


@trap(1)
def reshape_between(net: Net) -> None:
    net.weights.append(numpy_helper.from_array(np.array([2, 8, 4, 2]), "shape"))
    net.output(net.norm(net.op("Reshape", conv(net, image(net)), "shape"), 8))


@trap(0)
def transpose_between_same_axis(net: Net) -> None:
    net.output(net.norm(net.op("Transpose", conv(net, image(net)), perm=[0, 1, 3, 2]), 4))


@trap(1)
def transpose_between_other_axis(net: Net) -> None:
    net.output(net.norm(net.op("Transpose", conv(net, image(net)), perm=[0, 2, 1, 3]), 4))


@trap(0)
def transpose_brings_last_axis_to_channels(net: Net) -> None:
    y = net.op("MatMul", net.input("x", 2, 5, 3), net.normal("w", 3, 4))
    y = net.op("Transpose", net.op("Add", y, net.normal("b", 4)), perm=[0, 2, 1])
    net.output(net.op("Transpose", net.norm(y, 4), perm=[0, 2, 1]))


@trap(0)
def transpose_and_no_bias(net: Net) -> None:
    y = net.op("MatMul", net.input("x", 2, 5, 3), net.normal("w", 3, 4))
    net.output(net.norm(net.op("Transpose", y, perm=[0, 2, 1]), 4))


@trap(1)
def product_of_rank_three(net: Net) -> None:
    y = net.op("MatMul", net.input("x", 2, 4, 3), net.normal("w", 3, 4))
    net.output(net.norm(y, 4))


@trap(0)
def batch_of_weights(net: Net) -> None:
    y = net.op("MatMul", net.input("x", 2, 5, 3), net.normal("w", 2, 3, 4))
    net.output(net.norm(net.op("Transpose", y, perm=[0, 2, 1]), 4))


@trap(1)
def product_of_two_values(net: Net) -> None:
    y = net.op("MatMul", net.input("x", 3, 5), net.input("y", 5, 4))
    net.output(net.norm(y, 4))


@trap(1)
def bias_of_the_moment(net: Net) -> None:
    x, w = image(net), net.normal("w", 4, 3, 3, 3)
    net.output(net.norm(net.op("Conv", x, w, net.input("b", 4)), 4))


@trap(1)
def bias_may_be_overridden(net: Net) -> None:
    x, w, b = image(net), net.normal("w", 4, 3, 3, 3), net.normal("b", 4)
    net.input(b, 4)
    net.output(net.norm(net.op("Conv", x, w, b), 4))


@trap(0)
def bias_with_an_empty_name(net: Net) -> None:
    x, w = image(net), net.normal("w", 4, 3, 3, 3)
    net.output(net.norm(net.op("Conv", x, w, ""), 4))


@trap(0)
def bias_shared(net: Net) -> None:
    x, w, b = image(net), net.normal("w", 4, 3, 3, 3), net.normal("b", 4)
    net.output(net.norm(net.op("Conv", x, w, b), 4))
    net.output(net.op("Conv", x, w, b))


@trap(0)
def bias_is_also_the_mean(net: Net) -> None:
    x, w, b = image(net), net.normal("w", 4, 3, 3, 3), net.weight("b", [1, 2, 3, 4])
    net.output(net.op("BatchNormalization", net.op("Conv", x, w, b), b, b, b, b))


def gemm(net: Net, *bias: int, dynamic: bool = False, **attrs: Any) -> None:
    x, w = net.input("x", 3, 5), net.normal("w", 5, 4)
    c = net.input("c", *bias) if dynamic else net.normal("c", *bias)
    net.output(net.norm(net.op("Gemm", x, w, c, **attrs), 4))


@trap(0)
def gemm_full_bias(net: Net) -> None:
    gemm(net, 3, 4, beta=0.25)


@trap(0)
def gemm_scalar_bias(net: Net) -> None:
    gemm(net, beta=3.0)


@trap(1)
def gemm_column_bias(net: Net) -> None:
    gemm(net, 3, 1)


@trap(1)
def gemm_beta_zero(net: Net) -> None:
    gemm(net, 4, beta=0.0)


@trap(1)
def gemm_bias_of_the_moment(net: Net) -> None:
    gemm(net, 4, dynamic=True)


@trap(1)
def gemm_weight_on_the_left(net: Net) -> None:
    y = net.op("Gemm", net.normal("w", 3, 5), net.input("x", 5, 4))
    net.output(net.norm(y, 4))


@trap(0)
def product_with_bias_by_position(net: Net) -> None:
    y = net.op("MatMul", net.input("x", 3, 5), net.normal("w", 5, 4))
    net.output(net.norm(net.op("Add", net.normal("b", 3, 4), y), 4))


@trap(1)
def product_with_bias_that_would_grow(net: Net) -> None:
    y = net.op("MatMul", net.input("x", 3, 5), net.normal("w", 5, 4))
    net.output(net.norm(net.op("Add", y, net.normal("b", 3, 1)), 4))


@trap(0)
def one_channel(net: Net) -> None:
    net.output(net.norm(conv(net, image(net), 1), 1))


@trap(0)
def large_epsilon(net: Net) -> None:
    net.output(net.norm(conv(net, image(net)), 4, epsilon=0.5, momentum=0.1))


@trap(0)
def negative_variance_within_epsilon(net: Net) -> None:
    net.output(net.norm(conv(net, image(net)), 4, out="z", epsilon=0.5))
    put(net, "z_var", [-0.25, 0, 1, 2])


def with_parameter(net: Net, name: str, value: Any) -> None:
    net.output(net.norm(conv(net, image(net)), 4, out="z"))
    put(net, f"z_{name}", value)


@trap(1)
def negative_variance(net: Net) -> None:
    with_parameter(net, "var", [1, -1, 1, 1])


@trap(1)
def variance_cancels_epsilon(net: Net) -> None:
    with_parameter(net, "var", [1, -np.float32(1e-5), 1, 1])


@trap(0)
def zero_variance_and_zero_scale(net: Net) -> None:
    with_parameter(net, "var", [0, 0, 1, 1])
    put(net, "z_scale", [0, 1, 0, -1])


@trap(1)
def mean_not_a_number(net: Net) -> None:
    with_parameter(net, "mean", [0, np.nan, 0, 0])


@trap(1)
def infinite_scale(net: Net) -> None:
    with_parameter(net, "scale", [1, np.inf, 1, 1])


@trap(1)
def weight_not_finite(net: Net) -> None:
    y = net.op("Conv", image(net), net.weight("w", np.full((4, 3, 3, 3), np.inf)))
    net.output(net.norm(y, 4))


@trap(1)
def weight_would_overflow(net: Net) -> None:
    y = net.op("Conv", image(net), net.weight("w", np.full((4, 3, 3, 3), 1e38)))
    net.output(net.norm(y, 4, out="z"))
    put(net, "z_scale", [1e4] * 4)


@trap(1)
def weight_would_turn_denormal(net: Net) -> None:
    net.output(net.norm(conv(net, image(net)), 4, out="z"))
    put(net, "z_scale", [1e-39] * 4)


@trap(1)
def half_precision_overflow(net: Net) -> dict[str, Any]:
    net.dtype = np.dtype(np.float16)
    net.output(net.norm(conv(net, image(net)), 4, out="z"))
    put(net, "z_var", [1e-7] * 4)
    put(net, "z_scale", [60000, 1, 1, 1])
    put(net, "w0", np.full((4, 3, 3, 3), 1e-2))
    return {"rtol": 1e-2}


@trap(1)
def half_precision_underflow(net: Net) -> dict[str, Any]:
    net.dtype = np.dtype(np.float16)
    net.output(net.norm(conv(net, image(net)), 4, out="z"))
    put(net, "z_scale", [1e-6] * 4)
    return {"rtol": 1e-2}


@trap(0)
def parameters_of_another_type(net: Net) -> dict[str, Any]:
    net.dtype = np.dtype(np.float16)
    y = conv(net, image(net))
    net.output(y := net.op("BatchNormalization", y, "s", "b", "m", "v", out="z"))
    for name in "sbmv":
        array = net.random.uniform(0.5, 2, 4).astype(np.float32)
        net.weights.append(numpy_helper.from_array(array, name))
    return {"rtol": 4e-3}


@trap(1)
def weight_from_integers(net: Net) -> None:
    net.weights.append(numpy_helper.from_array(np.ones((4, 3, 3, 3), np.int8), "q"))
    w = net.op("DequantizeLinear", "q", net.weight("s", 0.25))
    net.output(net.norm(net.op("Conv", image(net), w), 4))


@trap(1)
def weight_from_a_cast(net: Net) -> None:
    net.weights.append(numpy_helper.from_array(np.ones((4, 3, 3, 3), np.float16), "h"))
    net.output(net.norm(net.op("Conv", image(net), net.op("Cast", "h", to=1)), 4))


@trap(1)
def weight_from_a_function(net: Net) -> None:
    net.domains["local"] = 1
    nodes = [helper.make_node("Neg", ["w"], ["y"])]
    opsets = [helper.make_opsetid("", 17)]
    net.functions.append(helper.make_function("local", "F", ["w"], ["y"], nodes, opsets))
    w = net.op("F", net.normal("w", 4, 3, 3, 3), domain="local")
    net.output(net.norm(net.op("Conv", image(net), w), 4))


@trap(0)
def constants_given_as_floats(net: Net) -> None:
    y = net.op("MatMul", net.input("x", 3, 5), net.normal("w", 5, 2))
    names = [net.op("Constant", value_floats=[1.0, 2.0]) for _ in range(4)]
    net.output(net.op("BatchNormalization", y, *names))


@trap(1)
def operator_outside_the_branch(net: Net) -> None:
    y = conv(net, image(net))
    then, other = Net(prefix="t"), Net(prefix="e")
    then.output(then.norm(y, 4))
    other.output(other.op("ConstantOfShape", other.op("Shape", "x")))
    condition = net.op("Cast", net.op("ReduceMax", "x", keepdims=0), to=TensorProto.BOOL)
    net.output(net.op("If", condition, then_branch=then.graph("t"), else_branch=other.graph("e")))
    net.infer = False


def loop(net: Net, kind: str) -> None:
    """A Conv and a batch normalization in the body of a Scan over the batch, or of a Loop."""
    body = Net(prefix="i")
    y = body.norm(body.op("Conv", "item", "w"), 4, out="made")
    net.normal("w", 4, 3, 3, 3)
    net.weights += body.weights[:2]
    body.weights = body.weights[2:]
    if kind == "Scan":
        body.input("item", 1, 3, 6, 6)
        body.output(y)
        x = net.input("x", 2, 1, 3, 6, 6)
        net.output(net.op("Scan", x, body=body.graph("b"), num_scan_inputs=1))
        return
    body.inputs += [
        helper.make_tensor_value_info("i", TensorProto.INT64, ()),
        helper.make_tensor_value_info("going", TensorProto.BOOL, ()),
    ]
    body.outputs.append(helper.make_tensor_value_info("on", TensorProto.BOOL, ()))
    body.op("Identity", "going", out="on")
    body.op("Identity", image(net), out="item")
    body.nodes = body.nodes[-1:] + body.nodes[:-1]
    body.output(y)
    net.weights.append(numpy_helper.from_array(np.array(2), "times"))
    net.output(net.op("Loop", "times", "", body=body.graph("b")))


@trap(0)
def body_of_a_scan(net: Net) -> None:
    loop(net, "Scan")


@trap(0)
def body_of_a_loop(net: Net) -> None:
    loop(net, "Loop")


@trap(0)
def initializers_as_inputs_of_another_norm(net: Net) -> None:
    """Two normalizations with the same parameters, each behind its own operator."""
    x = image(net)
    y, z = conv(net, x), conv(net, x)
    net.output(net.norm(y, 4, out="z"))
    names = [f"z_{n}" for n in ("scale", "bias", "mean", "var")]
    net.output(net.op("BatchNormalization", z, *names))


@trap(0)
def old_ir_version_with_constant_nodes(net: Net) -> None:
    net.ir_version, net.opset = 3, 8
    y = conv(net, image(net))
    net.output(net.norm(y, 4))
    constants = [helper.make_node("Constant", [], [t.name], value=t) for t in net.weights]
    net.nodes, net.weights = constants + net.nodes, []


@trap(1)
def five_outputs(net: Net) -> None:
    """By opset 9 that is training; ONNX Runtime ignores them."""
    net.opset = 9
    net.output(net.norm(conv(net, image(net)), 4))
    net.nodes[-1].output.extend(["mean", "var", "saved_mean", "saved_var"])


@trap(0)
def conv_read_by_a_dead_identity_chain(net: Net) -> None:
    y = net.op("Identity", net.op("Identity", conv(net, image(net))))
    net.output(net.op("Relu", net.op("Identity", net.norm(y, 4))))


@pytest.mark.parametrize("name", TRAPS)
def test_trap(name: str) -> None:
    left, build = TRAPS[name]
    net = Net()
    options = build(net) or {}
    after(net.model(), left, **options)


# --- what does not fit the table ---------------------------------------------------------------


@pytest.mark.parametrize(("is_test", "left"), [(1, 0), (0, 1)])
def test_opset_6_says_test_mode_by_an_attribute(is_test: int, left: int) -> None:
    net = Net(opset=6)
    net.output(net.norm(conv(net, image(net)), 4, is_test=is_test))
    folded, result = apply(PASS, net.model())
    assert count(folded, "BatchNormalization") == left == len(result.skips)


@pytest.mark.parametrize(("spatial", "left"), [(1, 0), (0, 1)])
def test_statistics_by_position(spatial: int, left: int) -> None:
    net = Net(opset=7)
    net.output(net.norm(conv(net, image(net)), 4, spatial=spatial))
    folded, _ = apply(PASS, net.model())
    assert count(folded, "BatchNormalization") == left


def test_an_attribute_of_the_function_is_not_known() -> None:
    node = helper.make_node("BatchNormalization", ["y", *"sbmv"], ["z"])
    node.attribute.add(name="epsilon", type=onnx.AttributeProto.FLOAT, ref_attr_name="e")
    weights = [numpy_helper.from_array(np.ones(4, np.float32), n) for n in "sbmv"]
    weights.append(numpy_helper.from_array(np.ones((3, 4), np.float32), "w"))
    nodes = [helper.make_node("Constant", [], [w.name], value=w) for w in weights]
    nodes += [helper.make_node("Gemm", ["x", "w"], ["y"]), node]
    opsets = [helper.make_opsetid("", 17)]
    net = Net()
    net.domains["local"] = 1
    net.functions.append(helper.make_function("local", "F", ["x"], ["z"], nodes, opsets, ["e"]))
    net.output(net.op("F", net.input("x", 2, 3), domain="local", e=0.5))
    after(net.model(), 1)


def test_sparse_weight(tmp_path: Path) -> None:
    net = Net()
    net.output(net.norm(net.op("MatMul", net.input("x", 3, 5), "w"), 2))
    proto = net.model()
    values = helper.make_tensor("w", TensorProto.FLOAT, [2], [1.0, 2.0])
    indices = helper.make_tensor("i", TensorProto.INT64, [2], [3, 8])
    proto.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [5, 2]))
    onnx.save(proto, tmp_path / "m.onnx")
    result = PASS(load(tmp_path / "m.onnx"))
    folded = ir.to_proto(result.model)
    assert count(folded, "BatchNormalization") == 0
    feed = random_feed(proto)
    assert_close(run(folded, feed)[0], run(proto, feed)[0], 1e-5)


def test_a_large_weight_is_computed_on_demand() -> None:
    net = Net()
    y = net.op("Gemm", net.input("x", 2, 512), net.normal("w", 1024, 512), transB=1)
    net.output(net.norm(y, 1024))
    result = PASS(ir.from_proto(net.model()))
    weight = result.model.graph.initializers["w"].const_value
    assert isinstance(weight, ir.LazyTensor) and not weight.cache
    after(net.model(), 0)


def test_a_large_shared_weight_is_not_copied() -> None:
    net = Net()
    x, w = net.input("x", 2, 512), net.normal("w", 1024, 512)
    for _ in range(2):
        net.output(net.norm(net.op("Gemm", x, w, transB=1), 1024))
    folded = after(net.model(), 2)
    assert len(folded.graph.initializer) == 9


def test_alone_as_mul_and_add() -> None:
    net = Net()
    net.output(net.norm(net.op("Relu", image(net)), 3, out="z"))
    folded, result = check_exact(FoldBatchnorm(split=True), net.model())
    assert count(folded, "BatchNormalization") == 0 == len(result.skips)
    assert count(folded, "Mul") == count(folded, "Add") == 1


def test_constants_that_nothing_reads_any_more_are_gone() -> None:
    net = Net()
    net.output(net.norm(conv(net, image(net)), 4))
    assert len(after(net.model(), 0).graph.initializer) == 2


def test_shapes_and_metadata_of_the_output_survive() -> None:
    net = Net()
    net.infer = False
    net.output(net.norm(conv(net, net.input("x", "n", 3, 6, 6)), 4), ["n", 4, None, "w"])
    folded, _ = apply(PASS, net.model())
    assert folded.graph.output == net.model().graph.output


def test_cost_is_linear() -> None:
    """A hub that every branch reads, and constants that all share, do not make it quadratic."""

    def seconds(size: int) -> float:
        net = Net()
        net.infer = False
        x = net.op("Relu", net.input("x", 2, 3))
        w, p = net.normal("w", 3, 3), net.weight("p", [1, 1, 1])
        net.output(net.op("Neg", x))
        for _ in range(size):
            net.op("BatchNormalization", net.op("MatMul", x, w), p, p, p, p)
            net.op("BatchNormalization", x, p, p, p, p)
        model = ir.from_proto(net.model())
        start = time.process_time()
        PASS(model)
        return time.process_time() - start

    assert seconds(800) < 8 * seconds(200) + 0.2


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_convolution(data: st.DataObject) -> None:
    """Random ranks, groups, strides, dilations and pads, normalized before and after."""

    def draw(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    group, dims = draw(1, 3), draw(1, 3)
    inside, outside = group * draw(1, 2), group * draw(1, 2)
    kernel = [draw(1, 3) for _ in range(dims)]
    transposed, padded = data.draw(st.booleans()), data.draw(st.booleans())
    attrs: dict[str, Any] = {
        "group": group,
        "strides": [draw(1, 2) for _ in range(dims)],
        "dilations": [draw(1, 2) for _ in range(dims)],
        "pads": [draw(0, 1) if padded else 0 for _ in range(2 * dims)],
    }
    shape = (inside, outside // group) if transposed else (outside, inside // group)
    net = Net()
    x = net.norm(net.op("Relu", net.input("x", 2, inside, *[6] * dims)), inside)
    op = "ConvTranspose" if transposed else "Conv"
    y = net.op(op, x, net.normal("w", *shape, *kernel), net.normal("b", outside), **attrs)
    net.output(net.norm(y, outside))
    after(net.model(), int(transposed or any(attrs["pads"])))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_product(data: st.DataObject) -> None:
    """Random transpositions, factors and shapes of C, normalized before and after."""
    rows, inner, channels = (data.draw(st.integers(2, 5)) for _ in range(3))
    a, b = data.draw(st.integers(0, 1)), data.draw(st.integers(0, 1))
    alpha, beta = (data.draw(st.sampled_from([1.0, 0.5, -2.0])) for _ in range(2))
    shapes = [(), (1,), (channels,), (1, channels), (rows, channels), (1, 1)]
    c = data.draw(st.sampled_from(shapes))
    net = Net()
    shape = (inner, rows) if a else (rows, inner)
    x = net.norm(net.op("Relu", net.input("x", *shape)), shape[1])
    w = net.normal("w", *((channels, inner) if b else (inner, channels)))
    attrs: dict[str, Any] = {"transA": a, "transB": b, "alpha": alpha, "beta": beta}
    net.output(net.norm(net.op("Gemm", x, w, net.normal("c", *c), **attrs), channels))
    after(net.model(), a)


def test_bfloat16() -> None:
    net = Net(dtype=ml_dtypes.bfloat16)
    y = net.op("MatMul", net.input("x", 3, 5), net.normal("w", 5, 4))
    net.output(net.norm(net.op("Add", y, net.normal("b", 4)), 4))
    folded, result = apply(PASS, net.model())
    assert result.modified and count(folded, "BatchNormalization") == 0
    arrays = {t.name: numpy_helper.to_array(t) for t in net.model().graph.initializer}
    scale, shift, mean, var = (
        arrays[f"v2_{n}"].astype(float) for n in ("scale", "bias", "mean", "var")
    )
    a = scale / np.sqrt(var + 1e-5)
    after = {t.name: numpy_helper.to_array(t) for t in folded.graph.initializer}
    for name, expected in (("w", arrays["w"] * a), ("b", (arrays["b"] - mean) * a + shift)):
        np.testing.assert_allclose(after[name].astype(float), expected.astype(float), rtol=2**-7)
