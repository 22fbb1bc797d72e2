"""Equalization leaves the function as it is and brings ranges together."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcompress.contract import Result
from onnxcompress.errors import InputError
from onnxcompress.passes.equalize import Equalize
from onnxcompress.session import Session
from tests.passes.calibrated import apply, feeds_of
from tests.passes.exactness import Net, assert_close, run
from tests.passes.test_insert_qdq import conv

IMAGE = (2, 8, 10, 10)
SPREAD = np.exp(np.linspace(-3, 3, 8)).astype(np.float32)


def spread_conv(net: Net, x: str, **attrs: Any) -> str:
    """A convolution whose output channels have very different magnitudes."""
    weight = net.random.standard_normal((8, 8 // attrs.get("group", 1), 3, 3))
    w = net.weight(f"w{len(net.nodes)}", weight * SPREAD[:, None, None, None])
    b = net.weight(f"b{len(net.nodes)}", net.random.standard_normal(8) * SPREAD)
    return net.op("Conv", x, w, b, pads=[1] * 4, **attrs)


def equalized(net: Net, **options: Any) -> tuple[ir.Model, Result]:
    proto, feeds = net.model(), feeds_of(net)
    model = ir.from_proto(proto)
    result = apply(Equalize(**options), model, feeds)
    after = ir.to_proto(model)
    for feed in feeds:
        for expected, actual in zip(run(proto, feed), run(after, feed), strict=True):
            assert_close(actual, expected, 1e-4)
    return model, result


def ranges(model: ir.Model, name: str, feeds: list[dict[str, Any]]) -> np.ndarray[Any, Any]:
    session = Session(model, outputs=[name], optimization="none")
    return np.max([np.abs(session.run(feed)[name]).max(axis=(0, 2, 3)) for feed in feeds], axis=0)


@pytest.mark.parametrize("between", ["none", "Relu", "LeakyRelu", "PRelu", "MaxPool"])
@pytest.mark.parametrize("group", [1, 4, 8])
def test_ranges_come_together(between: str, group: int) -> None:
    net = Net()
    x = inner = spread_conv(net, net.input("x", *IMAGE))
    if between != "none":
        attrs: dict[str, Any] = {"kernel_shape": [2, 2]} if between == "MaxPool" else {}
        slopes = [net.weight("slopes", np.linspace(-1, 1, 8)[:, None, None])]
        x = net.op(between, x, *(slopes if between == "PRelu" else []), **attrs)
    net.op("Relu", conv(net, x, group=group), out="y")
    net.output("y")
    before = ranges(ir.from_proto(net.model()), inner, feeds_of(net))
    model, result = equalized(net, strength=1.0)
    after = ranges(model, f"{inner}_equalized", feeds_of(net))
    assert result.figures["pairs of layers"] == 1
    assert before.max() / before.min() > 100 and after.max() / after.min() < 1.01


@settings(max_examples=20, deadline=None)
@given(st.floats(0, 1), st.integers(0, 1), st.integers(0, 1))
def test_gemm(strength: float, first: int, second: int) -> None:
    net = Net()
    x = net.input("x", 4, 12)
    for i, (n, k, transposed) in enumerate(((20, 12, first), (6, 20, second))):
        w = net.random.standard_normal((n, k) if transposed else (k, n))
        x = net.op("Gemm", x, net.weight(f"w{i}", w), net.normal(f"b{i}", n), transB=transposed)
        x = net.op("Relu", x, out="y" if i else "")
    net.output("y")
    equalized(net, strength=strength)


def clipped(net: Net, x: str) -> str:
    return net.op("Clip", x, net.weight("lo", 0.0), net.weight("hi", 6.0))


def exported(net: Net, x: str) -> str:
    net.op("Identity", x, out="also")
    net.output("also")
    return x


def curved(net: Net, x: str) -> str:
    return net.op("Tanh", x)


@pytest.mark.parametrize(
    ("between", "reason"), [(clipped, "bound"), (exported, "exported"), (curved, "bound")]
)
def test_what_is_not_homogeneous_stays(between: Any, reason: str) -> None:
    net = Net()
    x = between(net, spread_conv(net, net.input("x", *IMAGE)))
    net.op("Relu", conv(net, x), out="y")
    net.output("y")
    _, result = equalized(net)
    assert not result.modified
    assert reason in result.skips[0].reason


def test_shared_weights_stay() -> None:
    net = Net()
    x, w = net.input("x", *IMAGE), net.normal("w", 8, 8, 3, 3)
    first = net.op("Relu", net.op("Conv", x, w, pads=[1] * 4))
    net.op("Conv", first, w, out="y", pads=[1] * 4)
    net.output("y")
    assert not equalized(net)[1].modified


def test_a_dead_channel_is_no_trouble() -> None:
    net = Net()
    weight = net.random.standard_normal((8, 8, 3, 3))
    weight[2] = 0
    w = net.weight("w", weight)
    net.op("Relu", conv(net, net.op("Conv", net.input("x", *IMAGE), w)), out="y")
    net.output("y")
    model, _ = equalized(net)
    tensors = [v.const_value for v in model.graph.initializers.values()]
    assert all(np.isfinite(t.numpy()).all() for t in tensors if t is not None)


def test_a_strength_that_is_none_is_refused() -> None:
    with pytest.raises(InputError, match="strength"):
        Equalize(strength=1.5)
