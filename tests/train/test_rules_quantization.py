"""Straight-through gradients of quantizers, against the formula of learned step sizes."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxcompress.session import Session
from tests.train.gradcheck import with_gradients

random = np.random.default_rng(0)
_RANGES = {"int8": (-128, 127), "uint4": (0, 15), "int4": (-8, 7)}


def gradients(
    x: np.ndarray, scale: np.ndarray, zero: int, dtype: str, dy: np.ndarray, options: str
) -> tuple[np.ndarray, np.ndarray]:
    """Of x and of the scale, through a pair of quantizers that share it."""
    kinds = [f"float{list(a.shape)}".replace("[]", "") for a in (x, scale)]
    proto = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["": 21]>
        pair ({kinds[0]} x, {kinds[1]} s) => ({kinds[0]} y) {{
            q = QuantizeLinear{options}(x, s, z)
            y = DequantizeLinear{options}(q, s, z)
        }}"""
    )
    kind = getattr(onnx.TensorProto, dtype.upper())
    zeros = onnx.helper.make_tensor("z", kind, scale.shape, [zero] * scale.size)
    proto.graph.initializer.append(zeros)
    whole = with_gradients(ir.from_proto(proto), {"y": dy}, ["x", "s"])
    found = Session(whole).run({"x": x, "s": scale})
    return found["x_gradient"], found["s_gradient"]


@pytest.mark.parametrize(("dtype", "zero"), [("int8", 3), ("uint4", 7), ("int4", 0)])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "block", "short block"])
def test_learned_step_size(dtype: str, zero: int, granularity: str) -> None:
    x, dy = (3 * random.standard_normal((4, 6)).astype(np.float32) for _ in range(2))
    step = np.float32(0.01 if dtype == "int8" else 0.2)
    shape, options, repeats = {
        "tensor": ((), "", 1),
        "channel": ((4,), "<axis=0>", 6),
        "block": ((4, 2), "<axis=1, block_size=3>", 3),
        "short block": ((4, 2), "<axis=1, block_size=4>", 4),
    }[granularity]
    scale = (step * random.uniform(0.5, 2, shape)).astype(np.float32)
    each = scale if scale.ndim == 0 else np.repeat(scale.reshape(4, -1), repeats, 1)[:, :6]
    dx, ds = gradients(x, scale, zero, dtype, dy, options)
    low, high = _RANGES[dtype]
    whole = np.round(x / each) + zero
    inside = (whole >= low) & (whole <= high)
    assert 0 < inside.sum() < inside.size
    np.testing.assert_allclose(dx, dy * inside, rtol=1e-5)
    slope = dy * (np.clip(whole, low, high) - zero - inside * x / each)
    starts = np.arange(0, 6, repeats)
    wanted = slope.sum() if scale.ndim == 0 else np.add.reduceat(slope, starts, 1).reshape(shape)
    np.testing.assert_allclose(ds, wanted, rtol=1e-3, atol=1e-3)


def test_a_value_rounded_to_an_end_of_the_range_gets_its_gradient() -> None:
    x, scale = np.array([-9, -8, 7, 7.4, 7.6], np.float32), np.ones((), np.float32)
    dx, _ = gradients(x, scale, 0, "int4", np.ones(5, np.float32), "")
    assert dx.tolist() == [0, 1, 1, 1, 0]
