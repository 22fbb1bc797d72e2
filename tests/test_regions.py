"""Regions: which value belongs to which, whose time is whose, and what waits for memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from onnxcompress import regions, schemes
from onnxcompress.pipeline import run
from onnxcompress.session import profile
from tests.passes.exactness import Net


def trunk_and_head(width: int = 64) -> ir.Model:
    net = Net(21)
    net.input("x", 1, 4, 8, 8)
    y = net.op("Relu", net.op("Conv", "x", net.normal("k", 4, 4, 3, 3), out="c"), out="r")
    y = net.op("MatMul", net.op("Flatten", y, out="f"), net.normal("w", 144, width), out="m")
    net.op("Softmax", y, out="y")
    net.output("y")
    return ir.from_proto(net.model())


FEED = {"x": np.random.default_rng(0).standard_normal((1, 4, 8, 8), np.float32)}


def test_a_region_is_a_contraction_and_what_follows_it():
    assert regions.region_of(trunk_and_head()) == {
        **dict.fromkeys(("c", "r", "f"), "c"),
        **dict.fromkeys(("m", "y"), "m"),
    }


@pytest.mark.parametrize("passes", [schemes.exact(), schemes.dynamic(min_elements=0)])
def test_all_time_is_somebodys(passes: Any):
    model = trunk_and_head()
    optimized, seconds = profile(run(model, passes).model, FEED)
    found = regions.region_seconds(optimized, seconds, regions.region_of(model))
    assert found.keys() == {"c", "m"} and min(found.values()) > 0
    assert sum(found.values()) == pytest.approx(sum(seconds.values()))


def test_integers_count_for_the_value_that_they_stand_for():
    model = ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["" : 21]>
        g (float[4] x) => (float[4] y) { r_quantized = Relu(x)  y = Relu(r_quantized) }"""
    )
    for name, node in zip("ab", model.graph, strict=True):
        node.name = name
    found = regions.region_seconds(model, {"a": 1.0, "b": 2.0}, {"r": "trunk", "y": "head"})
    assert found == {"trunk": 1.0, "head": 2.0}


def test_only_what_runs_faster_is_taken(monkeypatch: pytest.MonkeyPatch):
    model = trunk_and_head()
    candidate = run(model, schemes.dynamic(min_elements=0)).model
    monkeypatch.setattr(regions, "_LARGE", 1)
    times = iter(({"m": 2.0}, {"m": 1.0}, {"m": 1.0}, {"m": 1.0}))
    monkeypatch.setattr(regions, "region_seconds", lambda *_: next(times))  # pyright: ignore[reportUnknownLambdaType]
    assert regions.memory_bound(model, candidate, FEED) == ("n_m",)
    assert regions.memory_bound(model, candidate, FEED) == ()
    monkeypatch.setattr(regions, "_LARGE", 1 << 22)
    assert regions.memory_bound(model, candidate, FEED) == ()


def test_packed_products_stand_beside_integers():
    model = trunk_and_head()
    passes = schemes.dynamic(min_elements=0, packed=("n_m",))
    found = [n.op_type for n in run(model, passes).model.graph]
    assert "MatMulNBits" in found and "MatMulInteger" not in found
