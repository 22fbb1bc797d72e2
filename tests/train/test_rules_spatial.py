"""Convolutions, pooling and Resize over windows of every kind."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.train.gradcheck import check

random = np.random.default_rng(0)
# Linear in each operand: a step of 1 has no error but rounding's.
_LINEAR: dict[str, Any] = {"step": 1.0, "tolerance": 3e-5}


def normal(*shape: int) -> np.ndarray:
    return random.standard_normal(shape).astype(np.float32)


@st.composite
def windows(draw: st.DrawFn) -> dict[str, Any]:
    """Attributes and sizes of a convolution: of one to three axes, dense, in groups, depthwise."""
    rank = draw(st.integers(1, 3))
    per_axis = {
        "kernel": [draw(st.integers(1, 3)) for _ in range(rank)],
        "strides": [draw(st.integers(1, 3)) for _ in range(rank)],
        "dilations": [draw(st.integers(1, 2)) for _ in range(rank)],
    }
    reach = [(k - 1) * d for k, d in zip(per_axis["kernel"], per_axis["dilations"], strict=True)]
    pads = [draw(st.integers(0, r)) for r in reach * 2]
    sizes = [max(draw(st.integers(3, 7)), r + 1) for r in reach]
    group, out, into = draw(st.sampled_from([(1, 3, 2), (2, 2, 3), (3, 1, 1), (2, 2, 1)]))
    return {**per_axis, "pads": pads, "sizes": sizes, "group": group, "out": out, "into": into}


@settings(max_examples=25, deadline=None)
@given(windows(), st.booleans())
def test_conv(w: dict[str, Any], dynamic: bool) -> None:
    group, out, into = w["group"], w["out"], w["into"]
    weight = normal(group * out, into, *w["kernel"])
    inputs = {"x": normal(2, group * into, *w["sizes"]), "w": weight, "b": normal(group * out)}
    attributes = {k: w[k] for k in ("strides", "dilations", "pads", "group")}
    check("Conv", inputs, attributes, wrt=("x", "w", "b"), **_LINEAR)
    if dynamic:
        check("Conv", inputs, attributes, fixed=("w", "b"), dynamic=True, **_LINEAR)


@settings(max_examples=25, deadline=None)
@given(windows(), st.data())
def test_conv_transpose(w: dict[str, Any], data: st.DataObject) -> None:
    group, out, into = w["group"], w["out"], w["into"]
    beyond = [data.draw(st.integers(0, s - 1)) for s in w["strides"]]
    weight = normal(group * into, out, *w["kernel"])
    inputs = {"x": normal(2, group * into, *w["sizes"]), "w": weight, "b": normal(group * out)}
    attributes = {k: w[k] for k in ("strides", "dilations", "pads", "group")}
    attributes["output_padding"] = beyond
    check("ConvTranspose", inputs, attributes, wrt=("x", "w", "b"), **_LINEAR)


@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER", "VALID"])
def test_automatic_padding(auto_pad: str) -> None:
    attributes = {"auto_pad": auto_pad, "strides": [2, 1]}
    inputs = {"x": normal(2, 3, 7, 6), "w": normal(4, 3, 3, 2)}
    check("Conv", inputs, attributes, wrt=("x", "w"), **_LINEAR)


def test_few_positions_and_many_channels() -> None:
    inputs = {"x": normal(3, 4, 4, 4), "w": normal(16, 4, 3, 3)}
    check("Conv", inputs, {"pads": [1, 1, 1, 1]}, wrt=("x", "w"), **_LINEAR)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.booleans(), st.booleans(), st.integers(0, 1), st.integers(1, 2))
def test_average_pool(rank: int, ceil: bool, includes: bool, pad: int, stride: int) -> None:
    attributes = {
        "kernel_shape": [3, 2, 2][:rank],
        "strides": [stride] * rank,
        "pads": [pad] * rank + [0] * rank,
        "ceil_mode": int(ceil),
        "count_include_pad": int(includes),
    }
    check("AveragePool", {"x": normal(2, 3, *[7, 6, 5][:rank])}, attributes, **_LINEAR)


@pytest.mark.parametrize("dynamic", [False, True])
def test_other_pools(dynamic: bool) -> None:
    x = random.permutation(2 * 3 * 5 * 6).reshape(2, 3, 5, 6).astype(np.float64)
    overlapping = {"kernel_shape": [3, 2], "strides": [2, 1], "pads": [1, 0, 1, 1]}
    options: dict[str, Any] = {"dynamic": dynamic, "step": 0.25}
    check("MaxPool", {"x": x}, overlapping, **options)
    check("MaxPool", {"x": x}, {"kernel_shape": [2, 2], "strides": [2, 2]}, **options)
    x = x.astype(np.float32)
    options["tolerance"] = 1e-5
    check("GlobalMaxPool", {"x": x}, **options)
    check("GlobalAveragePool", {"x": x}, **options)


@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
@pytest.mark.parametrize("coordinates", ["asymmetric", "half_pixel", "align_corners"])
def test_resize(mode: str, coordinates: str) -> None:
    attributes = {"mode": mode, "coordinate_transformation_mode": coordinates}
    x, absent = normal(2, 3, 4, 5), {"roi": None}
    scales = {"s": np.array([1, 1, 2, 1.5], np.float32)}
    check("Resize", {"x": x, **absent, **scales}, attributes, fixed=("s",), **_LINEAR)
    sizes = {"scales": None, "s": np.array([2, 3, 6, 3])}
    check("Resize", {"x": x, **absent, **sizes}, attributes, fixed=("s",), **_LINEAR)


def test_a_point_with_few_positions_and_many_channels() -> None:
    inputs = {"x": normal(3, 8, 2, 2), "w": normal(16, 8, 1, 1)}
    check("Conv", inputs, wrt=("x", "w"), **_LINEAR)
