"""Smoothing leaves the function as it is, and what quantization loses gets less."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcompress import api, schemes
from onnxcompress.contract import Result
from onnxcompress.graph.channel_scaling import Channels, site_of
from onnxcompress.graph.folding import Folding
from onnxcompress.graph.linear import Declined
from onnxcompress.numerics.smoothing import smoothing_factors
from onnxcompress.passes.smooth import Smooth
from tests.passes.calibrated import apply, feeds_of, sqnr
from tests.passes.exactness import Net, assert_close, count, run

ROWS, WIDTH, HEADS = 12, 16, 4
OUTLIERS = np.where(np.arange(WIDTH) % 7 == 3, 40.0, 1.0)


def smoothed(net: Net, **options: Any) -> tuple[onnx.ModelProto, Result]:
    proto, data = net.model(), feeds_of(net, seed=3, count=16)
    model = ir.from_proto(proto)
    result = apply(Smooth(**options), model, data)
    after = ir.to_proto(model)
    assert list(after.graph.input) == list(proto.graph.input)
    assert list(after.graph.output) == list(proto.graph.output)
    for feed in data[:3]:
        for expected, actual in zip(run(proto, feed), run(after, feed), strict=True):
            assert_close(actual, expected, 1e-4)
    return after, result


def gains(net: Net) -> Any:
    return smoothed(net)[1].figures["expected gain in dB"]


def start(net: Net) -> str:
    """Something computed, so that what follows is not the caller's."""
    return net.op("MatMul", net.input("x", 2, ROWS, WIDTH), net.normal("w_in", WIDTH, WIDTH))


def dense(net: Net, x: str, outputs: int = WIDTH, out: str = "") -> str:
    n = len(net.nodes)
    return net.op("MatMul", x, net.normal(f"w{n}", WIDTH, outputs), out=out)


def layer_norm(net: Net, x: str) -> str:
    n = len(net.nodes)
    scale, bias = net.weight(f"g{n}", OUTLIERS), net.weight(f"b{n}", OUTLIERS / 3)
    return net.op("LayerNormalization", x, scale, bias, axis=-1)


def unfused_norm(net: Net, x: str) -> str:
    n = len(net.nodes)
    centered = net.op("Sub", x, net.op("ReduceMean", x, axes=[-1]))
    variance = net.op("ReduceMean", net.op("Mul", centered, centered), axes=[-1])
    unit = net.op("Div", centered, net.op("Sqrt", variance))
    scaled = net.op("Mul", unit, net.weight(f"g{n}", OUTLIERS))
    return net.op("Add", net.weight(f"b{n}", OUTLIERS / 3), scaled)


def dense_with_bias(net: Net, x: str) -> str:
    weight = net.weight("w_out", net.random.standard_normal((WIDTH, WIDTH)) * OUTLIERS)
    product = net.op("MatMul", x, weight)
    return net.op("Relu", net.op("Add", product, net.weight("b_out", OUTLIERS)))


def gated(net: Net, x: str) -> str:
    """SwiGLU: the gate's curve stays, the other factor is divided."""
    gate = dense(net, x)
    curved = net.op("Mul", gate, net.op("Sigmoid", gate))
    weight = net.weight("w_up", net.random.standard_normal((WIDTH, WIDTH)) * OUTLIERS)
    return net.op("Mul", net.op("MatMul", x, weight), curved)


def attended(net: Net, x: str, shapes: tuple[Any, Any] | None = None) -> str:
    """Attention in heads; what comes out leads back to the projection of the values."""
    split, merge = shapes or ((0, 0, HEADS, WIDTH // HEADS), (0, 0, WIDTH))
    net.weights.append(onnx.numpy_helper.from_array(np.array(split, np.int64), "split"))
    net.weights.append(onnx.numpy_helper.from_array(np.array(merge, np.int64), "merge"))
    projected: list[str] = []
    for part, perm in (("q", (0, 2, 1, 3)), ("k", (0, 2, 3, 1)), ("v", (0, 2, 1, 3))):
        wide = OUTLIERS if part == "v" else 1
        weight = net.weight(f"w_{part}", net.random.standard_normal((WIDTH, WIDTH)) * wide)
        value = net.op("Add", net.op("MatMul", x, weight), net.normal(f"b_{part}", WIDTH))
        projected.append(net.op("Transpose", net.op("Reshape", value, "split"), perm=perm))
    scores = net.op("Softmax", net.op("MatMul", *projected[:2]), axis=-1)
    mixed = net.op("Transpose", net.op("MatMul", scores, projected[2]), perm=(0, 2, 1, 3))
    return net.op("Reshape", mixed, "merge")


MAKERS = [layer_norm, unfused_norm, dense_with_bias, gated, attended]


@pytest.mark.parametrize("make", MAKERS)
def test_outliers_are_divided_where_they_are_made(make: Any) -> None:
    net = Net()
    x = make(net, start(net))
    dense(net, x, out="y")
    dense(net, net.op("Relu", x), 5, out="z")
    net.output("y")
    net.output("z")
    before = count(net.model(), "Mul", "Div")
    assert count(smoothed(net)[0], "Mul", "Div") == before
    assert x in gains(net)


@pytest.mark.parametrize("make", MAKERS)
def test_quantization_loses_less(make: Any) -> None:
    net = Net()
    dense(net, make(net, start(net)), out="y")
    net.output("y")
    model, data = ir.from_proto(net.model()), feeds_of(net, seed=3, count=64)
    passes = schemes.static()
    at = next(i for i, p in enumerate(passes) if p.name == "insert_qdq")
    left: list[float] = []
    for chosen in (passes, (*passes[:at], Smooth(), *passes[at:])):
        quantized = api.run(model, chosen, observer=api.observer(api.as_data(data, model))).model
        left.append(sqnr(model, quantized, data))
    assert left[1] > left[0]


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(MAKERS),
    st.lists(st.floats(1e-3, 1e3), min_size=WIDTH, max_size=WIDTH),
    st.integers(0, 2**16),
)
def test_any_factors_leave_the_function(make: Any, factors: list[float], seed: int) -> None:
    net = Net()
    net.random = np.random.default_rng(seed)
    x = make(net, start(net))
    dense(net, net.op("LeakyRelu", x), out="y")
    net.output("y")
    proto = net.model()
    model = ir.from_proto(proto)
    folding = Folding(model)
    next(folding.containers())
    value = next(v for node in model.graph for v in node.outputs if v.name == x)
    site_of(folding, value, Channels((-1,), (WIDTH,))).scale(folding, np.array(factors))
    feed = feeds_of(net, seed=3)[0]
    for expected, actual in zip(run(proto, feed), run(ir.to_proto(model), feed), strict=True):
        assert_close(actual, expected, 1e-4)


@pytest.mark.parametrize(
    "shapes",
    [
        ((2, ROWS, HEADS, WIDTH // HEADS), (2, ROWS, WIDTH)),
        ((0, -1, HEADS, WIDTH // HEADS), (0, 0, -1)),
    ],
)
def test_heads_are_followed_whatever_spells_them(shapes: Any) -> None:
    net = Net()
    x = attended(net, start(net), shapes)
    dense(net, x, out="y")
    net.output("y")
    assert x in gains(net)


def test_a_reshape_that_mixes_channels_stays() -> None:
    net = Net()
    x = layer_norm(net, start(net))
    net.weights.append(onnx.numpy_helper.from_array(np.array((2, -1, 8), np.int64), "shape"))
    net.op("MatMul", net.op("Reshape", x, "shape"), net.normal("w_half", 8, 4), out="y")
    net.output("y")
    _, result = smoothed(net)
    assert not result.modified and any("Reshape" in s.reason for s in result.skips)


def residual(net: Net) -> str:
    x = layer_norm(net, start(net))
    wide = net.op("MatMul", x, net.normal("w_wide", WIDTH, 300), out="z")
    net.op("Tanh", x, out="y")
    net.output("y")
    net.output("z")
    return wide


def test_what_another_operator_reads_stays() -> None:
    net = Net()
    residual(net)
    _, result = smoothed(net, insert=False)
    assert not result.modified and "Tanh" in result.skips[-1].reason


def test_a_multiplication_is_inserted_where_it_pays() -> None:
    net = Net()
    residual(net)
    after, result = smoothed(net)
    assert result.figures["values smoothed"] == 1 and count(after, "Mul") == 1


def exported(net: Net) -> None:
    x = layer_norm(net, start(net))
    net.op("Identity", x, out="also")
    net.output("also")
    dense(net, x, out="y")


def fed(net: Net) -> None:
    scaled = net.op("Div", net.input("x", 2, ROWS, WIDTH), net.weight("std", 1 / OUTLIERS))
    dense(net, scaled, out="y")


def alike(net: Net) -> None:
    ones = net.weight("g", np.ones(WIDTH))
    dense(net, net.op("LayerNormalization", start(net), ones, axis=-1), out="y")


def looped(net: Net) -> None:
    """The layer behind makes what is added to what it reads."""
    x = layer_norm(net, start(net))
    weight = net.normal("w_loop", WIDTH, WIDTH)
    net.op("MatMul", net.op("Add", x, net.op("MatMul", x, weight)), weight, out="y")


@pytest.mark.parametrize("build", [exported, fed, alike])
def test_left_alone(build: Any) -> None:
    net = Net()
    build(net)
    net.output("y")
    _, result = smoothed(net)
    assert not result.modified and result.skips


def test_a_layer_that_reads_what_it_adds_to_stays_exact() -> None:
    net = Net()
    looped(net)
    net.output("y")
    smoothed(net)


def test_one_weight_of_two_layers() -> None:
    net = Net()
    x = layer_norm(net, start(net))
    shared = net.normal("w_shared", WIDTH, WIDTH)
    net.op("MatMul", x, shared, out="y")
    net.op("MatMul", net.op("Tanh", start_again(net)), shared, out="z")
    net.output("y")
    net.output("z")
    assert x in gains(net)


def start_again(net: Net) -> str:
    return net.op("MatMul", "x", net.normal("w_again", WIDTH, WIDTH))


def test_two_orders_of_the_channels_are_no_site() -> None:
    net = Net()
    x = attended(net, start(net))
    swapped = net.op("Transpose", net.op("Reshape", x, "split"), perm=(0, 1, 3, 2))
    net.op("MatMul", net.op("Reshape", swapped, "merge"), net.normal("w1", WIDTH, 3), out="y")
    dense(net, x, out="z")
    net.output("y")
    net.output("z")
    model = ir.from_proto(net.model())
    folding = Folding(model)
    next(folding.containers())
    value = next(v for node in model.graph for v in node.outputs if v.name == x)
    with pytest.raises(Declined):
        site_of(folding, value, Channels((-1,), (WIDTH,)))


def test_factors() -> None:
    random = np.random.default_rng(0)
    rows, weight = random.standard_normal((256, WIDTH)), random.standard_normal((8, WIDTH))
    factors, left = smoothing_factors(
        rows * OUTLIERS, *_range(rows * OUTLIERS), [weight / np.sqrt(OUTLIERS)]
    )
    assert left < 0.5 and factors[OUTLIERS > 1].min() > 3 * factors[OUTLIERS == 1].max()
    rows[:, 5] = 0
    factors, _ = smoothing_factors(rows, *_range(rows), [weight])
    assert np.isfinite(factors).all() and (factors > 0).all()
    halves = smoothing_factors(rows, *_range(rows), [weight[:5], weight[5:]])[0]
    np.testing.assert_allclose(halves, factors, rtol=1e-9)
    few, left = smoothing_factors(rows[:8], *_range(rows[:8]), [weight])
    assert left == 1 and (few == 1).all()


def _range(rows: Any) -> tuple[Any, Any]:
    return rows.min(axis=0), rows.max(axis=0)
