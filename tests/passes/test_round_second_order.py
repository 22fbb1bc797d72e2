"""Second-order rounding leaves less error at the output of every kind of kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from onnxcompress.errors import InputError
from onnxcompress.graph.quantized_kernels import quantized_kernels
from onnxcompress.numerics.saturation import PAIR_LIMIT, largest_pair_sum
from onnxcompress.passes.insert_qdq import InsertQdq
from onnxcompress.passes.round_second_order import RoundSecondOrder
from onnxcompress.session import Session
from tests.passes.calibrated import apply
from tests.passes.exactness import Net

Feeds = list[dict[str, Any]]


def correlated(*shape: int, axis: int = 1) -> Feeds:
    """Feeds whose channels and neighbours move together, around a mean that is not zero."""
    random = np.random.default_rng(2)
    mix = random.standard_normal((3, shape[axis]))
    feeds: Feeds = []
    for _ in range(8):
        few = random.standard_normal((*np.delete(shape, axis), 3)) @ mix
        x = np.moveaxis(few, -1, axis) + 0.2 * random.standard_normal(shape) + 0.7
        feeds.append({"x": x.astype(np.float32)})
    return feeds


def convolution(net: Net, channels: int, *weight: int, bias: bool = True, **attrs: Any) -> None:
    x = net.input("x", 2, channels, 9, 10)
    inputs = [x, net.normal("w", *weight)] + ([net.normal("b", weight[0])] if bias else [])
    net.op("Conv", *inputs, out="y", **attrs)


def gemm(net: Net, trans: int) -> None:
    shape = (12, 40) if trans else (40, 12)
    inputs = [net.input("x", 30, 40), net.normal("w", *shape), net.normal("b", 12)]
    net.op("Gemm", *inputs, out="y", transB=trans)


def matmul(net: Net) -> None:
    net.op("MatMul", net.input("x", 2, 15, 40), net.normal("w", 40, 12), out="y")


CASES: dict[str, tuple[Callable[[Net], None], Feeds]] = {
    "dense": (
        lambda net: convolution(net, 6, 8, 6, 3, 3, pads=[1, 1, 1, 1]),
        correlated(2, 6, 9, 10),
    ),
    "strided": (
        lambda net: convolution(
            net, 6, 8, 6, 3, 2, strides=[2, 1], dilations=[1, 2], pads=[0, 1, 2, 0]
        ),
        correlated(2, 6, 9, 10),
    ),
    "same": (
        lambda net: convolution(net, 6, 8, 6, 3, 3, strides=[2, 2], auto_pad="SAME_UPPER"),
        correlated(2, 6, 9, 10),
    ),
    "no bias": (lambda net: convolution(net, 6, 8, 6, 3, 3, bias=False), correlated(2, 6, 9, 10)),
    "grouped": (
        lambda net: convolution(net, 8, 12, 4, 3, 3, group=2, pads=[1, 1, 1, 1]),
        correlated(2, 8, 9, 10),
    ),
    "depthwise": (
        lambda net: convolution(net, 8, 8, 1, 3, 3, group=8, pads=[1, 1, 1, 1]),
        [{"x": np.repeat(f["x"][:, :, :, :2], 5, axis=3)} for f in correlated(2, 8, 9, 10)],
    ),
    "gemm": (lambda net: gemm(net, 0), correlated(30, 40)),
    "gemm transposed": (lambda net: gemm(net, 1), correlated(30, 40)),
    "matmul": (matmul, correlated(2, 15, 40, axis=2)),
}


def quantized(build: Callable[[Net], None], feeds: Feeds, **options: Any) -> ir.Model:
    net = Net()
    build(net)
    net.output("y")
    model = ir.from_proto(net.model())
    apply(InsertQdq(**options), model, feeds)
    return model


def noise(model: ir.Model, feeds: Feeds) -> float:
    """Mean square of what the rounded weights alone add to the output."""
    exact = model.clone()
    (kernel,), _ = quantized_kernels(exact.graph)
    for index, value in ((1, kernel.codes), (2, kernel.bias)):
        if value is not None:
            name = f"float{index}"
            floats = ir.tensor(value.meta["onnxcompress.float"].numpy(), name=name)
            exact.graph.register_initializer(plain := ir.val(name, const_value=floats))
            kernel.node.replace_input_with(index, plain)
    outputs = [kernel.node.outputs[0].name or ""]
    sessions = [Session(m, outputs=outputs, optimization="none") for m in (exact, model)]
    pairs = ([s.run(feed)[outputs[0]] for s in sessions] for feed in feeds)
    return float(np.mean([np.square(a - b).mean() for a, b in pairs]))


@pytest.mark.parametrize("name", CASES)
def test_weights_disturb_the_output_less(name: str) -> None:
    build, feeds = CASES[name]
    model = quantized(build, feeds)
    before = noise(model, feeds)
    result = apply(RoundSecondOrder(), model, feeds)
    after = noise(model, feeds)
    assert result.modified and not result.skips
    assert after < 0.7 * before
    # The figures are what was measured: same ratio, from the rows that were kept.
    told = [result.figures[f"output error {when}"] for when in ("after", "before")]
    assert isinstance(told[0], float) and isinstance(told[1], float)
    assert told[0] / told[1] == pytest.approx(after / before, rel=0.4)


def test_pairs_stay_clear_of_saturation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxcompress.targets.machine_has_vnni", lambda: False)
    build, feeds = CASES["dense"]
    model = quantized(build, feeds)
    apply(RoundSecondOrder(), model, feeds)
    (kernel,), _ = quantized_kernels(model.graph)
    assert largest_pair_sum(kernel.integers()[0]).max() <= PAIR_LIMIT


def test_again_with_the_same_statistics_changes_nothing() -> None:
    build, feeds = CASES["gemm"]
    model = quantized(build, feeds)
    apply(RoundSecondOrder(), model, feeds)
    first = ir.to_proto(model).SerializeToString()
    assert not apply(RoundSecondOrder(), model, feeds).modified
    assert ir.to_proto(model).SerializeToString() == first


def test_the_order_of_the_feeds_does_not_matter() -> None:
    build, feeds = CASES["dense"]
    found: list[bytes] = []
    for order in (feeds, feeds[::-1]):
        model = quantized(build, feeds)
        apply(RoundSecondOrder(rows=700), model, order)
        found.append(ir.to_proto(model).SerializeToString())
    assert found[0] == found[1]


def test_a_copy_is_rounded_and_the_original_is_not() -> None:
    build, feeds = CASES["gemm"]
    model = quantized(build, feeds)
    before = ir.to_proto(model).SerializeToString()
    assert apply(RoundSecondOrder(), model.clone(), feeds).modified
    assert ir.to_proto(model).SerializeToString() == before


def test_shared_and_unknown_weights_are_left_with_a_reason() -> None:
    net = Net()
    x, w = net.input("x", 30, 40), net.normal("w", 40, 40)
    net.op("MatMul", net.op("MatMul", x, w), w, out="y")
    net.output("y")
    model, feeds = ir.from_proto(net.model()), correlated(30, 40)
    apply(InsertQdq(), model, feeds)
    result = apply(RoundSecondOrder(), model, feeds)
    assert not result.modified
    assert {s.reason for s in result.skips} == {"its weight is shared with another node"}

    build, feeds = CASES["gemm"]
    reloaded = ir.from_proto(ir.to_proto(quantized(build, feeds)))
    (skip,) = apply(RoundSecondOrder(), reloaded, feeds).skips
    assert "float weight is unknown" in skip.reason


def test_wide_layers_are_rounded_in_parts() -> None:
    build, feeds = CASES["gemm"]
    model = quantized(build, feeds)
    before = noise(model, feeds)
    result = apply(RoundSecondOrder(widest=16), model, feeds)
    assert result.modified and not result.skips
    assert noise(model, feeds) < 0.8 * before


def test_the_number_of_cores_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    build, feeds = CASES["dense"]
    found: list[bytes] = []
    for cores in (1, 2, 5):
        monkeypatch.setattr("os.cpu_count", lambda cores=cores: cores)
        model = quantized(build, feeds)
        apply(RoundSecondOrder(), model, feeds)
        found.append(ir.to_proto(model).SerializeToString())
    assert found[0] == found[1] == found[2]


def test_constant_input_is_no_trouble() -> None:
    build, _ = CASES["gemm"]
    feeds: Feeds = [{"x": np.full((30, 40), value, np.float32)} for value in (0, 0)]
    model = quantized(build, feeds)
    result = apply(RoundSecondOrder(), model, feeds)
    assert result.figures["output error after"] == 0
    assert np.isfinite(noise(model, feeds))


def test_needs_statistics_and_sensible_options() -> None:
    build, feeds = CASES["gemm"]
    with pytest.raises(InputError, match="calibrate"):
        RoundSecondOrder()(quantized(build, feeds))
    with pytest.raises(InputError, match="damping"):
        RoundSecondOrder(damping=0)
