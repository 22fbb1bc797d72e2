"""Affine arithmetic is ONNX Runtime's, and its parameters are never unusable."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxcompress.numerics.affine import (
    RANGES,
    affine,
    dequantize,
    quantize,
    symmetric_per_channel,
)
from onnxcompress.session import Session

BOUNDS = st.floats(-(2.0**100), 2.0**100, width=32)
DTYPES = st.sampled_from(["uint8", "int8", "uint16", "int16"])


@given(BOUNDS, BOUNDS, DTYPES, st.booleans())
def test_parameters_hold_zero_exactly_and_cover_the_range(
    a: float, b: float, dtype: str, symmetric: bool
) -> None:
    low, high = min(a, b), max(a, b)
    parameters = affine(low, high, dtype, symmetric=symmetric)
    assert np.isfinite(parameters.scale) and parameters.scale > np.finfo(np.float32).tiny
    assert dequantize(quantize(np.zeros(1, np.float32), parameters), parameters)[0] == 0
    ends = np.array([min(low, 0), max(high, 0)], np.float32)
    restored = dequantize(quantize(ends, parameters), parameters)
    assert np.all(np.abs(restored - ends) <= parameters.scale * 1.01)


@given(st.floats(2.0**-60, 2.0**60, width=32), DTYPES)
def test_the_largest_code_does_not_pass_the_upper_bound(high: float, dtype: str) -> None:
    parameters = affine(0.0, high, dtype)
    largest = np.array([RANGES[dtype][1]])
    if RANGES[dtype][0] == 0:
        assert dequantize(largest, parameters)[0] <= np.float32(high)


@given(
    hnp.arrays(np.float32, (3, 4), elements=st.floats(-1e6, 1e6, width=32)),
    st.sampled_from(["uint8", "int8"]),
    st.sampled_from([None, 0, 1]),
)
def test_it_rounds_and_saturates_as_onnx_runtime_does(
    x: np.ndarray[Any, Any], dtype: str, axis: int | None
) -> None:
    if axis is None:
        parameters = affine(float(x.min()) / 2, float(x.max()) / 2, dtype)
    else:
        bound = np.abs(x).max(axis=1 - axis).astype(np.float64) / 2
        parameters = symmetric_per_channel(bound, dtype, axis)
    attribute = "" if axis is None else f"<axis={axis}>"
    reader = "Squeeze" if axis is None else "Identity"
    size = parameters.scale.size
    model = ir.from_onnx_text(
        f"""<ir_version: 8, opset_import: ["": 17]>
        g (float[3,4] x, float[{size}] s, {dtype}[{size}] z) => ({dtype}[3,4] q, float[3,4] y)
        {{ s0 = {reader}(s)  z0 = {reader}(z)
           q = QuantizeLinear {attribute} (x, s0, z0)
           y = DequantizeLinear {attribute} (q, s0, z0) }}"""
    )
    feed = {"x": x, "s": parameters.scale.reshape(-1), "z": parameters.zero_point.reshape(-1)}
    found = Session(model, optimization="none").run(feed)
    np.testing.assert_array_equal(quantize(x, parameters), found["q"])
    np.testing.assert_array_equal(dequantize(found["q"], parameters), found["y"])


def test_symmetric_weights_leave_the_smallest_code_unused() -> None:
    parameters = affine(-3.0, 2.0, "int8", symmetric=True)
    assert parameters.zero_point == 0
    assert quantize(np.array([-3.0], np.float32), parameters)[0] == -127


@pytest.mark.parametrize(("low", "high"), [(1.0, 0.0), (np.nan, 1.0), (0.0, np.inf)])
def test_a_range_that_is_none_is_refused(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="no quantization covers"):
        affine(low, high, "uint8")
