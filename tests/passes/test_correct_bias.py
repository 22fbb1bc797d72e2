"""Corrected biases give every output channel its mean back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from onnxcompress.errors import InputError
from onnxcompress.graph.quantized_kernels import quantized_kernels
from onnxcompress.passes.correct_bias import CorrectBias
from onnxcompress.passes.insert_qdq import InsertQdq
from onnxcompress.session import Session
from tests.passes.calibrated import apply
from tests.passes.exactness import Net

Feeds = list[dict[str, Any]]


def conv(bias: bool = True, **attrs: Any) -> Callable[[Net], None]:
    def build(net: Net) -> None:
        group = attrs.get("group", 1)
        weight = net.normal("w", 8, 8 // group, 3, 3)
        biases = [net.normal("b", 8)] if bias else []
        net.op("Conv", net.input("x", 2, 8, 12, 12), weight, *biases, out="y", **attrs)

    return build


def gemm(bias: bool, trans: int) -> Callable[[Net], None]:
    def build(net: Net) -> None:
        weight = net.normal("w", *((9, 40) if trans else (40, 9)))
        biases = [net.normal("b", 9)] if bias else []
        net.op("Gemm", net.input("x", 30, 40), weight, *biases, out="y", transB=trans)

    return build


CASES: dict[str, tuple[Callable[[Net], None], tuple[int, ...]]] = {
    "conv": (conv(pads=[0, 0, 0, 0]), (2, 8, 12, 12)),
    "conv without bias": (conv(bias=False), (2, 8, 12, 12)),
    "grouped": (conv(group=2), (2, 8, 12, 12)),
    "depthwise": (conv(group=8), (2, 8, 12, 12)),
    "gemm": (gemm(True, 0), (30, 40)),
    "gemm without bias": (gemm(False, 1), (30, 40)),
}


def skewed(shape: tuple[int, ...]) -> Feeds:
    random = np.random.default_rng(4)
    return [{"x": random.exponential(1.0, shape).astype(np.float32)} for _ in range(10)]


def built(build: Callable[[Net], None]) -> ir.Model:
    net = Net()
    build(net)
    net.output("y")
    return ir.from_proto(net.model())


def mean_errors(model: ir.Model, original: ir.Model, feeds: Feeds) -> np.ndarray:
    """Of each channel of what the kernel gives out, before that is rounded itself."""
    ((kernel,), _) = quantized_kernels(model.graph)
    name = kernel.node.outputs[0].name or ""
    found = Session(model, outputs=[name], optimization="none")
    expected = Session(original, outputs=["y"], optimization="none")
    stacked = np.stack(
        [found.run(f)[name].astype(np.float64) - expected.run(f)["y"] for f in feeds]
    )
    return stacked.mean(axis=tuple(i for i in range(stacked.ndim) if i != 2))


def options() -> dict[str, Any]:
    # Clips the tail, which takes from the mean of what every channel reads.
    return {"method": "percentile", "percentile": 99.0}


@pytest.mark.parametrize("name", CASES)
def test_means_match(name: str) -> None:
    build, shape = CASES[name]
    feeds, model, original = skewed(shape), built(build), built(build)
    apply(InsertQdq(**options()), model, feeds)
    before = np.abs(mean_errors(model, original, feeds)).mean()
    result = apply(CorrectBias(rows=10**6, rows_each=10**6), model, feeds)
    after = np.abs(mean_errors(model, original, feeds)).mean()
    assert result.modified and not result.skips
    # What clipping takes is known by channel, not by place in the kernel.
    assert after < (0.1 if name.startswith("gemm") else 0.25) * before
    told = [result.figures[f"mean error {when}"] for when in ("after", "before")]
    assert isinstance(told[0], float) and isinstance(told[1], float)
    assert told[0] < 1e-6 < told[1]


def test_without_clipping_only_the_weights_mistakes_are_corrected() -> None:
    build, shape = CASES["conv"]
    feeds, model, original = skewed(shape), built(build), built(build)
    apply(InsertQdq(**options()), model, feeds)
    pass_ = CorrectBias(rows=10**6, rows_each=10**6, clipping=False)
    assert all(want.patches is not None for want in pass_.wants(model))
    apply(pass_, model, feeds)
    partly = np.abs(mean_errors(model, original, feeds)).mean()
    apply(CorrectBias(rows=10**6, rows_each=10**6), model, feeds)
    assert np.abs(mean_errors(model, original, feeds)).mean() < 0.5 * partly


@pytest.mark.parametrize("name", ["conv", "conv without bias", "gemm without bias"])
def test_again_with_the_same_statistics_changes_nothing(name: str) -> None:
    build, shape = CASES[name]
    feeds, model = skewed(shape), built(build)
    apply(InsertQdq(), model, feeds)
    assert apply(CorrectBias(), model, feeds).modified
    first = ir.to_proto(model).SerializeToString()
    assert not apply(CorrectBias(), model, feeds).modified
    assert ir.to_proto(model).SerializeToString() == first


def test_new_biases_run_on_integers_too() -> None:
    build, shape = CASES["conv without bias"]
    feeds, model, original = skewed(shape), built(build), built(build)
    apply(InsertQdq(), model, feeds)
    apply(CorrectBias(), model, feeds)
    fused = Session(model, outputs=["y"]).run(feeds[0])["y"]
    plain = Session(model, outputs=["y"], optimization="none").run(feeds[0])["y"]
    exact = Session(original, outputs=["y"]).run(feeds[0])["y"]
    assert np.abs(fused - plain).max() < 0.02 * np.abs(exact).max()


def test_products_without_a_bias_are_left_with_a_reason() -> None:
    net = Net()
    net.op("MatMul", net.input("x", 30, 40), net.normal("w", 40, 9), out="y")
    net.output("y")
    model, feeds = ir.from_proto(net.model()), skewed((30, 40))
    apply(InsertQdq(), model, feeds)
    result = apply(CorrectBias(), model, feeds)
    assert not result.modified
    assert [skip.reason for skip in result.skips] == ["it has no bias"]


def test_needs_statistics_and_sensible_options() -> None:
    build, shape = CASES["gemm"]
    model = built(build)
    apply(InsertQdq(), model, skewed(shape))
    with pytest.raises(InputError, match="calibrate"):
        CorrectBias()(model)
    with pytest.raises(InputError, match="at least 1"):
        CorrectBias(rows=0)
