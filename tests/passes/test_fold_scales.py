"""Every operator that a scale or a shift may stand beside, crossed with how it may be written."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from onnxcompress.passes.fold_scales import FoldScales
from tests.passes.exactness import LAYERS, Layer, Net, apply, check_exact, count

PASS = FoldScales()
EVERY = pytest.mark.parametrize("name", LAYERS)
SCALARS = ("Mul", "Div", "Add", "Sub")


def after(
    proto: onnx.ModelProto, left: int, skipped: int | None = None, **options: Any
) -> onnx.ModelProto:
    """Assert that `left` of the arithmetic is still there, and that `skipped` sites are named."""
    folded, result = check_exact(PASS, proto, **options)
    assert count(folded, *SCALARS) == left
    if skipped is not None:
        assert len(result.skips) == skipped and all(s.reason and s.node for s in result.skips)
    return folded


def constant(net: Net, which: Layer, channels: int, axis_after: int, kind: str) -> str:
    """A number, or one number a channel, shaped to broadcast against a value of the layer."""
    shape = {"number": (), "vector1": (1,), "channels": (channels,) + (1,) * axis_after}[kind]
    return net.weight(f"k{len(net.nodes)}", net.random.uniform(0.5, 2, shape))


def spatial(which: Layer) -> int:
    """How many axes follow the channels."""
    return len(which.data) - 2 if which.op in ("Conv", "ConvTranspose") else int(which.swap)


# --- after a linear operator -----------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("op", SCALARS)
@pytest.mark.parametrize("kind", ["number", "channels"])
@pytest.mark.parametrize("first", [True, False])
def test_after(name: str, op: str, kind: str, first: bool) -> None:
    net, which = Net(), LAYERS[name]
    y = which.add(net, which.feed(net), bias=op in ("Mul", "Sub"))
    k = constant(net, which, which.channels, spatial(which), kind)
    net.output(net.op("Relu", net.op(op, *((k, y) if first else (y, k)))))
    folded, result = check_exact(PASS, net.model())
    has_add = which.op == "MatMul" and op in ("Mul", "Sub")
    if op == "Div" and first:
        assert count(folded, "Div") == 1 and not result.modified
    elif op in ("Add", "Sub") and which.op == "MatMul" and not has_add:
        assert count(folded, op) == 1
    else:
        assert count(folded, *SCALARS) == has_add


@EVERY
def test_a_chain_after(name: str) -> None:
    net, which = Net(), LAYERS[name]
    y = which.add(net, which.feed(net))
    for op in ("Mul", "Add", "Div", "Sub"):
        y = net.op(op, y, constant(net, which, which.channels, spatial(which), "channels"))
    net.output(y)
    folded = after(net.model(), int(which.op == "MatMul"), 0)
    assert any(y in n.output for n in folded.graph.node)


@EVERY
@pytest.mark.parametrize("exported", [True, False])
def test_value_between_is_seen_elsewhere(name: str, exported: bool) -> None:
    net, which = Net(), LAYERS[name]
    y = which.add(net, which.feed(net), bias=False)
    net.output(net.op("Mul", y, net.weight("k", 2)))
    net.output(y if exported else net.op("Relu", y))
    after(net.model(), 1, 1)


@EVERY
def test_constant_or_weight_may_be_overridden(name: str) -> None:
    for overridden in ("k", "w"):
        net, which = Net(), LAYERS[name]
        w = net.normal("w", *which.weight)
        y = which.add(net, which.feed(net), w, bias=False)
        net.output(net.op("Mul", y, net.weight("k", 2)))
        shape = () if overridden == "k" else which.weight
        net.input(overridden, *shape)
        after(net.model(), 1)


@EVERY
def test_broadcasting_that_enlarges(name: str) -> None:
    net, which = Net(), LAYERS[name]
    y = which.add(net, which.feed(net), bias=False)
    net.output(net.op("Mul", y, net.weight("k", np.full((1,) * 6, 2))))
    after(net.model(), 1, 1)


@EVERY
def test_in_a_branch_with_weights_of_the_outer_scope(name: str) -> None:
    net, which = Net(), LAYERS[name]
    x, w, k = which.feed(net), net.normal("w", *which.weight), net.weight("k", 3)
    branches: list[onnx.GraphProto] = []
    for prefix in "te":
        body = Net(prefix=prefix)
        body.output(body.op("Mul", k, which.add(body, x, w, bias=False)))
        branches.append(body.graph(prefix))
    cond = net.op("Cast", net.op("ReduceMax", x, keepdims=0), to=TensorProto.BOOL)
    net.output(net.op("If", cond, then_branch=branches[0], else_branch=branches[1]))
    after(net.model(), 0, 0)


@EVERY
def test_half_precision(name: str) -> None:
    net, which = Net(dtype=np.float16), LAYERS[name]
    y = which.add(net, which.feed(net), bias=False)
    net.output(net.op("Mul", y, constant(net, which, which.channels, spatial(which), "channels")))
    after(net.model(), 0, 0, rtol=4e-3)


@pytest.mark.parametrize("factor", [60000.0, 1e-6])
def test_half_precision_out_of_range(factor: float) -> None:
    net = Net(dtype=np.float16)
    w = net.weight("w", np.full((4, 2), 4))
    y = net.op("Mul", net.op("MatMul", net.input("x", 3, 4), w), net.weight("k", factor))
    net.output(y)
    proto = net.model()
    _, result = apply(PASS, proto)
    assert len(result.skips) == (factor > 1 or factor * 4 < 2**-14)


# --- before a linear operator ----------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("op", SCALARS)
@pytest.mark.parametrize("kind", ["number", "channels"])
def test_before(name: str, op: str, kind: str) -> None:
    net, which = Net(), LAYERS[name]
    x = which.feed(net)
    along = 0 if which.op in ("Gemm",) else spatial(which)
    inside = which.data[1] if which.op != "MatMul" or which.swap else which.data[-1]
    y = net.op(op, x, constant(net, which, inside, along, kind))
    net.output(which.add(net, y))
    attrs = dict(which.attrs)
    padded = "pads" in attrs or attrs.get("auto_pad") == "SAME_UPPER"
    shift = op in ("Add", "Sub")
    exact = not (shift and (padded or which.op == "ConvTranspose"))
    if name == "gemm_a":
        exact = kind == "number"
    after(net.model(), int(not exact) + (which.op == "MatMul"), int(not exact))


@EVERY
def test_before_but_seen_elsewhere(name: str) -> None:
    net, which = Net(), LAYERS[name]
    y = net.op("Mul", which.feed(net), net.weight("k", 3))
    net.output(which.add(net, y))
    net.output(y)
    after(net.model(), 1 + (which.op == "MatMul"), 1)


@EVERY
def test_before_where_the_channels_are_not_known(name: str) -> None:
    """`x` of one channel would be broadcast, so nothing that may be so is folded."""
    net, which = Net(), LAYERS[name]
    inside = which.data[1] if which.op != "MatMul" or which.swap else which.data[-1]
    shape: list[Any] = list(which.data)
    shape[-1 if which.op == "MatMul" and not which.swap else 1] = "c"
    net.infer = False
    along = 0 if which.op in ("Gemm",) else spatial(which)
    y = net.op("Mul", net.input("x", *shape), constant(net, which, inside, along, "channels"))
    net.output(which.add(net, y))
    feed = {"x": np.ones(which.data, np.float32)}
    after(net.model(), 1 + (which.op == "MatMul"), 1, feed=feed)


# --- chains of constants -----------------------------------------------------------------------


@pytest.mark.parametrize("first", ["Mul", "Div", "Div'"])
@pytest.mark.parametrize("second", ["Mul", "Div"])
@pytest.mark.parametrize("shape", [(), (4,), (3, 1)])
def test_products_of_constants(first: str, second: str, shape: tuple[int, ...]) -> None:
    chain(first, second, shape)


@pytest.mark.parametrize("first", ["Add", "Sub", "Sub'"])
@pytest.mark.parametrize("second", ["Add", "Sub"])
@pytest.mark.parametrize("shape", [(), (4,), (3, 1)])
def test_sums_of_constants(first: str, second: str, shape: tuple[int, ...]) -> None:
    chain(first, second, shape)


def chain(first: str, second: str, shape: tuple[int, ...]) -> None:
    """Two steps on a value; a prime marks that the constant of the first comes first."""
    net = Net()
    a, b = net.weight("a", 8), net.weight("b", net.random.uniform(1, 2, shape))
    x = net.input("x", 3, 4)
    y = net.op(first.strip("'"), *((a, x) if first.endswith("'") else (x, a)))
    net.output(net.op(second, y, b))
    after(net.model(), 1, 0)


def test_constants_that_would_grow() -> None:
    net = Net()
    y = net.op("Mul", net.input("x", 3, 4), net.normal("a", 3, 1))
    net.output(net.op("Mul", y, net.normal("b", 1, 4)))
    after(net.model(), 2, 1)


def test_a_sum_that_rounds_is_left() -> None:
    net = Net()
    y = net.op("Add", net.input("x", 3, 4), net.weight("a", 2.0**23))
    net.output(net.op("Sub", y, net.weight("b", 2.0**23)))
    after(net.model(), 2, 1)


def test_a_product_that_overflows_is_left() -> None:
    net = Net()
    y = net.op("Mul", net.input("x", 3, 4), net.weight("a", 1e30))
    net.output(net.op("Mul", y, net.weight("b", 1e30)))
    after(net.model(), 2, 1)


def test_a_shared_constant_is_copied() -> None:
    net = Net()
    x, k = net.input("x", 3, 4), net.weight("k", 3)
    net.output(net.op("Mul", net.op("Mul", x, k), k))
    net.output(net.op("Add", x, k))
    after(net.model(), 2, 0)


# --- what must stay -----------------------------------------------------------------------------

Build = Callable[[Net], Any]
TRAPS: dict[str, tuple[int, Build]] = {}


def trap(left: int) -> Callable[[Build], Build]:
    """Register a case and how much arithmetic must be left."""

    def register(build: Build) -> Build:
        TRAPS[build.__name__] = (left, build)
        return build

    return register


def dense(net: Net, x: str, *shape: int) -> str:
    return net.op("MatMul", x, net.normal(f"w{len(net.nodes)}", *(shape or (4, 4))))


@trap(1)
def integers(net: Net) -> dict[str, Any]:
    net.inputs.append(helper.make_tensor_value_info("x", TensorProto.INT32, (3, 4)))
    net.outputs.append(helper.make_tensor_value_info("z", TensorProto.INT32, None))
    for name, shape in (("w", (4, 4)), ("k", ())):
        net.weights.append(numpy_helper.from_array(np.full(shape, 3, np.int32), name))
    net.op("Mul", net.op("MatMul", "x", "w"), "k", out="z")
    return {"feed": {"x": np.ones((3, 4), np.int32)}}


@trap(1)
def two_values(net: Net) -> None:
    net.output(net.op("Mul", dense(net, net.input("x", 3, 4)), net.input("k", 4)))


@trap(1)
def along_the_rows(net: Net) -> None:
    net.output(net.op("Mul", dense(net, net.input("x", 4, 4)), net.normal("k", 4, 1)))


@trap(1)
def along_two_axes(net: Net) -> None:
    net.output(net.op("Mul", dense(net, net.input("x", 4, 4)), net.normal("k", 4, 4)))


@trap(1)
def one_output_channel_made_many(net: Net) -> None:
    net.output(net.op("Mul", dense(net, net.input("x", 3, 4), 4, 1), net.normal("k", 5)))


@trap(1)
def one_input_channel_made_many(net: Net) -> None:
    net.output(dense(net, net.op("Mul", net.input("x", 3, 1), net.normal("k", 4))))


@trap(1)
def division_by_zero(net: Net) -> dict[str, Any]:
    net.output(net.op("Div", dense(net, net.input("x", 3, 4)), net.weight("k", [1, 0, 1, 1])))
    return {}


@trap(1)
def bias_by_position(net: Net) -> None:
    """The Add keeps its place; both it and the weight are scaled."""
    y = net.op("Add", dense(net, net.input("x", 2, 3, 4)), net.normal("p", 1, 3, 4))
    net.output(net.op("Mul", y, net.normal("k", 4)))


@trap(0)
def through_transposes(net: Net) -> None:
    y = net.op("Transpose", dense(net, net.input("x", 2, 3, 4)), perm=[2, 0, 1])
    net.output(net.op("Mul", net.op("Identity", y), net.normal("k", 4, 1, 1)))


@trap(0)
def before_through_transposes(net: Net) -> None:
    y = net.op(
        "Mul", net.op("Transpose", net.input("x", 2, 4, 3), perm=[0, 2, 1]), net.normal("k", 4)
    )
    y = net.op("Transpose", net.op("Identity", y), perm=[1, 0, 2])
    net.output(dense(net, y))


@trap(0)
def channels_known_through_an_activation(net: Net) -> dict[str, Any]:
    y = net.op("Relu", net.op("Gemm", net.input("x", "n", 4), net.normal("g", 4, 4)))
    net.output(dense(net, net.op("Mul", y, net.normal("k", 4))))
    net.infer = False
    return {"feed": {"x": np.ones((3, 4), np.float32)}}


@trap(2)
def an_addition_is_not_moved_behind_a_product(net: Net) -> None:
    y = net.op("Add", net.op("Relu", net.input("x", 3, 4)), net.normal("k", 4))
    net.output(net.op("Add", dense(net, y), "x"))


@trap(1)
def an_addition_joins_the_bias_behind_a_product(net: Net) -> None:
    y = net.op("Add", net.op("Relu", net.input("x", 3, 4)), net.normal("k", 4))
    net.output(net.op("Add", dense(net, y), net.normal("b", 4)))


@trap(0)
def into_a_batch_normalization(net: Net) -> None:
    y = net.norm(net.op("Relu", net.input("x", 2, 4, 5)), 4)
    net.output(net.op("Add", net.op("Mul", y, net.normal("k", 4, 1)), net.weight("s", 3)))


@trap(4)
def the_scale_of_a_gelu(net: Net) -> None:
    """ONNX Runtime fuses it whole; folded into the next product, it would not."""
    x = net.op("Relu", net.input("x", 3, 4))
    e = net.op("Add", net.op("Erf", net.op("Div", x, net.weight("r", 2**0.5))), net.weight("o", 1))
    net.output(dense(net, net.op("Mul", net.op("Mul", x, e), net.weight("h", 0.5))))


@trap(6)
def the_scale_of_a_layer_normalization(net: Net) -> None:
    x = net.op("Relu", net.input("x", 3, 4))
    d = net.op("Sub", x, net.op("ReduceMean", x, axes=[-1]))
    v = net.op("ReduceMean", net.op("Pow", d, net.weight("two", 2)), axes=[-1])
    n = net.op("Div", d, net.op("Sqrt", net.op("Add", v, net.weight("e", 1e-5))))
    y = net.op("Add", net.op("Mul", n, net.normal("g", 4)), net.normal("s", 4))
    net.output(net.op("Add", dense(net, y), net.normal("b", 4)))


@trap(1)
def another_graph(net: Net) -> None:
    y = dense(net, net.input("x", 3, 4))
    then, other = Net(prefix="t"), Net(prefix="e")
    then.output(then.op("Mul", y, net.weight("k", 3)))
    other.output(other.op("Neg", "x"))
    cond = net.op("Cast", net.op("ReduceMax", "x", keepdims=0), to=TensorProto.BOOL)
    net.output(net.op("If", cond, then_branch=then.graph("t"), else_branch=other.graph("e")))


@trap(1)
def another_domain(net: Net) -> None:
    net.domains["com.microsoft"] = 1
    x = net.input("x", 2, 3, 6, 6)
    y = net.op("FusedConv", x, net.normal("w", 4, 3, 3, 3), domain="com.microsoft")
    net.output(net.op("Mul", y, net.weight("k", 2)))


@pytest.mark.parametrize("name", TRAPS)
def test_trap(name: str) -> None:
    left, build = TRAPS[name]
    net = Net()
    options = build(net) or {}
    after(net.model(), left, **options)


def test_old_broadcasting_is_left() -> None:
    net = Net(opset=6)
    y = net.op("Conv", net.input("x", 2, 3, 6, 6), net.normal("w", 4, 3, 3, 3))
    net.output(net.op("Mul", y, net.normal("k", 4), broadcast=1, axis=1))
    _, result = apply(PASS, net.model())
    assert not result.modified


def test_cost_is_linear() -> None:
    def seconds(size: int) -> float:
        net = Net()
        net.infer = False
        x, k, w = net.op("Relu", net.input("x", 2, 3)), net.weight("k", 3), net.normal("w", 3, 3)
        net.output(net.op("Neg", x))
        for _ in range(size):
            net.op("Mul", x, k)
            net.op("Mul", net.op("MatMul", x, w), k)
        y = x
        for _ in range(size):
            y = net.op("Add", y, k)
        model = ir.from_proto(net.model())
        start = time.process_time()
        PASS(model)
        return time.process_time() - start

    assert seconds(800) < 8 * seconds(200) + 0.2


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_chain(data: st.DataObject) -> None:
    """Random arithmetic before and after a random layer, of random constants on either side."""
    net, which = Net(), LAYERS[data.draw(st.sampled_from(sorted(LAYERS)))]

    def steps(y: str, *shapes: tuple[int, ...]) -> str:
        for op in data.draw(st.lists(st.sampled_from(SCALARS), max_size=4)):
            shape = data.draw(st.sampled_from(shapes))
            k = net.weight(f"k{len(net.nodes)}", net.random.uniform(0.5, 2, shape))
            swapped = op != "Div" and data.draw(st.booleans())
            y = net.op(op, *((k, y) if swapped else (y, k)))
        return y

    x = steps(which.feed(net), (), (1,), (1, 1))
    y = which.add(net, x, bias=data.draw(st.booleans()))
    by_channel = (which.channels,) + (1,) * spatial(which)
    net.output(net.op("Relu", steps(y, (), (1, 1), by_channel)))
    check_exact(PASS, net.model(), rtol=2e-5)
