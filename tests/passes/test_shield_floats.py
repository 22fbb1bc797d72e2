"""ONNX Runtime leaves the weights alone that are to stay in float."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from onnxcompress import api
from onnxcompress.contract import Result
from onnxcompress.passes.infer_shapes import InferShapes
from onnxcompress.passes.shield_floats import ShieldFloats
from onnxcompress.session import Session, optimized_model
from tests.fragile import chain, feeds

NET = """
<ir_version: 8, opset_import: ["": 17]>
g (float[2, 6, 1] x) => (float[{shape}] y)
<float s = {{0.05}}, uint8 z = {{128}}, float t = {{1.0}}, int64[2] rows = {{2, 6}}>
{{
    q = QuantizeLinear(x, s, z)
    d = DequantizeLinear(q, s, z)
    d2 = Reshape(d, rows)
    w = Constant<value = float {{0.0}}>()
    k = {line}
    h = QuantizeLinear(k, t, z)
    y = DequantizeLinear(h, t, z)
}}
"""


def net(line: str, shape: tuple[int, ...]) -> ir.Model:
    """A kernel between pairs; one element of its weight drowns the others in a common scale."""
    model = ir.from_onnx_text(NET.format(line=line, shape="2, 4" if "Gemm" in line else "2, 4, 1"))
    array = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    array.reshape(-1)[0] = 300
    constant = next(node for node in model.graph if node.op_type == "Constant")
    weight = ir.val("weight", ir.DataType.FLOAT, shape, const_value=ir.tensor(array, name="weight"))
    model.graph.register_initializer(weight)
    for node, index in list(constant.outputs[0].uses()):
        node.replace_input_with(index, weight)
    model.graph.remove(constant, safe=True)
    InferShapes()(model)
    return model


def error(model: ir.Model) -> float:
    """Of what ONNX Runtime makes of it, against the graph as it is written: largest difference."""
    feed = {"x": np.random.default_rng(1).standard_normal((2, 6, 1)).astype(np.float32)}
    written, ran = (Session(model, optimization=how).run(feed)["y"] for how in ("none", "all"))
    return float(np.abs(written - ran).max())


@pytest.mark.parametrize(
    ("line", "shape"),
    [
        ("Gemm(d2, w)", (6, 4)),
        ("Gemm<transB=1>(d2, w)", (4, 6)),
        ("Conv(d, w)", (4, 6, 1)),
        ("Conv<group=2>(d, w)", (4, 3, 1)),
        ("ConvTranspose(d, w)", (6, 4, 1)),
    ],
)
def test_the_runtime_would_quantize_it_and_then_does_not(line: str, shape: tuple[int, ...]) -> None:
    model = net(line, shape)
    assert error(model) >= 1
    result = ShieldFloats()(model)
    assert isinstance(result, Result) and result.modified
    assert error(model) == 0
    assert not ShieldFloats()(model).modified


def test_a_convolution_that_is_excluded_stays_in_float() -> None:
    found = api.quantize(chain(weights=2), feeds(), exclude=("conv2",)).model
    names = {n.name for n in optimized_model(found).graph if n.op_type == "QLinearConv"}
    assert not any((name or "").startswith("conv2") for name in names)
    session, exact = Session(found), Session(chain(weights=2))
    for feed in feeds():
        y, expected = session.run(feed)["y"], exact.run(feed)["y"]
        assert np.abs(y - expected).max() < 0.1 * np.abs(expected).max()


def test_one_channel_is_declined() -> None:
    model = ir.from_onnx_text(
        """
        <ir_version: 8, opset_import: ["": 17]>
        g (float[5, 1] x) => (float[5, 2] y)
        <float s = {0.5}, uint8 z = {3}, float[1, 2] w = {1.0, 2.0}>
        { q = QuantizeLinear(x, s, z)  d = DequantizeLinear(q, s, z)  y = Gemm(d, w) }
        """
    )
    result = ShieldFloats()(model)
    assert isinstance(result, Result) and not result.modified and len(result.skips) == 1
