"""A transposed convolution is a convolution with more channels, spread out and cropped."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcompress.passes.split_transposed import SplitTransposed
from tests.passes.exactness import Net, check_exact, count


def transposed(kernel: tuple[int, int], bias: bool = True, **attrs: Any) -> Net:
    net = Net()
    group = attrs.get("group", 1)
    inputs = [net.input("x", 2, 4, 5, 6), net.normal("w", 4, 6 // group, *kernel)]
    if bias:
        inputs.append(net.normal("b", 6))
    net.op("ConvTranspose", *inputs, out="y", **attrs)
    net.output("y")
    return net


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_it_is_exact_over_strides_pads_and_kernels(data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, 4))
    kernel = tuple(data.draw(st.integers(stride, 2 * stride + 1)) for _ in range(2))
    pads = [data.draw(st.integers(0, (kernel[i % 2] - 1) // 2)) for i in range(4)]
    extra = [data.draw(st.integers(0, min(stride - 1, pads[2 + i]))) for i in range(2)]
    net = transposed(
        (kernel[0], kernel[1]),
        data.draw(st.booleans()),
        strides=[stride] * 2,
        pads=pads,
        output_padding=extra,
    )
    after, result = check_exact(SplitTransposed(), net.model())
    assert result.modified == (count(after, "ConvTranspose") == 0)
    assert result.modified or "zeros" in result.skips[0].reason


def test_kernels_of_the_stride_need_no_crop() -> None:
    after, _ = check_exact(SplitTransposed(), transposed((2, 2), strides=[2, 2]).model())
    assert [n.op_type for n in after.graph.node] == ["Conv", "DepthToSpace"]


def test_a_free_batch_and_size_stay_free() -> None:
    net = Net()
    net.op(
        "ConvTranspose",
        net.input("x", "N", 4, "H", "W"),
        net.normal("w", 4, 6, 4, 4),
        out="y",
        strides=[2, 2],
        pads=[1, 1, 1, 1],
    )
    net.output("y", ["N", 6, None, None])
    feed = {"x": np.random.default_rng(0).standard_normal((3, 4, 7, 5)).astype(np.float32)}
    after, _ = check_exact(SplitTransposed(), net.model(), feed=feed)
    assert count(after, "ConvTranspose") == 0


@pytest.mark.parametrize(
    ("attrs", "reason"),
    [
        ({"group": 2}, "groups"),
        ({"dilations": [2, 2]}, "dilations"),
        ({"strides": [2, 1]}, "strides differ"),
        ({"auto_pad": "SAME_UPPER", "strides": [2, 2]}, "worked out"),
        ({"output_shape": [10, 12], "strides": [2, 2]}, "given"),
        ({"strides": [3, 3], "output_padding": [2, 2]}, "output_padding"),
    ],
)
def test_what_it_declines_stays(attrs: dict[str, Any], reason: str) -> None:
    after, result = check_exact(SplitTransposed(), transposed((3, 3), **attrs).model())
    assert not result.modified and count(after, "ConvTranspose") == 1
    assert reason in result.skips[0].reason


def test_wasteful_splits_are_declined() -> None:
    net = transposed((1, 1), strides=[2, 2])
    _, result = check_exact(SplitTransposed(), net.model())
    assert not result.modified and "zeros" in result.skips[0].reason
