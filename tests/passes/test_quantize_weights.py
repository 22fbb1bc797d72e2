"""Weight-only quantization: each form gives what its dequantized weights give."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from onnxcompress.contract import Result
from onnxcompress.errors import InputError
from onnxcompress.numerics.blocks import decode, encode, fit
from onnxcompress.passes.quantize_weights import QuantizeWeights
from onnxcompress.session import Session
from tests.passes.exactness import Net, apply, apply_twice, random_feed, run

PASS = QuantizeWeights(min_elements=0, accuracy_level=1)
OPSET = 21


def dequantized(proto: onnx.ModelProto, pass_: QuantizeWeights, **axes: int) -> onnx.ModelProto:
    """`proto` with each named weight as it is after quantization along an axis."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for weight in copy.graph.initializer:
        if weight.name in axes:
            array = numpy_helper.to_array(weight)
            axis = axes[weight.name]
            rows = array.reshape(len(array), -1) if axis == 0 else np.moveaxis(array, axis, -1)
            blocks = fit(
                rows, bits=pass_.bits, block_size=pass_.block_size, symmetric=pass_.symmetric
            )
            found = decode(encode(rows, blocks), blocks)[..., : rows.shape[-1]]
            found = found.reshape(array.shape) if axis == 0 else np.moveaxis(found, -1, axis)
            weight.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(found), weight.name))
    return copy


def check(
    proto: onnx.ModelProto, pass_: QuantizeWeights = PASS, *, feed: Any = None, **axes: int
) -> tuple[onnx.ModelProto, Counter[str]]:
    """Quantize; the same as dequantized, optimized or not; again is idle. The model, operators."""
    after, result = apply_twice(pass_, proto)
    onnx.checker.check_model(after, full_check=True)
    assert result.modified
    feed = random_feed(proto) if feed is None else feed
    reference = dequantized(proto, pass_, **axes)
    optimized = Session(ir.from_proto(after)).run(feed).values()
    for expected, plain, fast in zip(
        run(reference, feed), run(after, feed), optimized, strict=True
    ):
        tolerance = 1e-5 * max(1.0, float(np.abs(expected).max(initial=0)))
        assert plain.shape == expected.shape
        np.testing.assert_allclose(plain, expected, atol=tolerance, rtol=1e-5)
        np.testing.assert_allclose(fast, expected, atol=tolerance, rtol=1e-5)
    nodes = ir.traversal.RecursiveGraphIterator(ir.from_proto(after).graph)
    return after, Counter(node.op_type for node in nodes)


def reason(proto: onnx.ModelProto, pass_: QuantizeWeights = PASS) -> str:
    """Why the pass declines the only site."""
    after, result = apply(pass_, proto)
    assert isinstance(result, Result) and not result.modified
    assert [n.op_type for n in after.graph.node] == [n.op_type for n in proto.graph.node]
    (skip,) = result.skips
    return skip.reason


def product(*weight: int, data: tuple[Any, ...]) -> onnx.ModelProto:
    net = Net(OPSET)
    net.input("x", *data)
    net.op("MatMul", "x", net.normal("w", *weight), out="y")
    net.output("y")
    return net.model()


@settings(max_examples=30, deadline=None)
@given(
    terms=st.integers(1, 70),
    width=st.integers(1, 40),
    lead=st.lists(st.integers(1, 3), max_size=3),
    bits=st.sampled_from([4, 8]),
    block_size=st.sampled_from([0, 16, 32, 64]),
    symmetric=st.booleans(),
)
def test_a_product_becomes_the_kernel(
    terms: int, width: int, lead: list[int], bits: Any, block_size: int, symmetric: bool
):
    pass_ = dataclasses.replace(PASS, bits=bits, block_size=block_size, symmetric=symmetric)
    _, kinds = check(product(terms, width, data=(*lead, terms)), pass_, w=-2)
    assert kinds == {"MatMulNBits": 1}


@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_activations_too_stays_near(bits: Any):
    proto = product(96, 64, data=(3, 96))
    pass_ = dataclasses.replace(PASS, bits=bits, accuracy_level=4)
    after, _ = apply(pass_, proto)
    feed = random_feed(proto)
    (expected,), found = run(dequantized(proto, pass_, w=-2), feed), Session(ir.from_proto(after))
    assert np.abs(found.run(feed)["y"] - expected).max() < 0.02 * np.abs(expected).max()


@pytest.mark.parametrize("bias", [None, (6,), (1, 6), (5, 1)])
@pytest.mark.parametrize("transposed", [(0, 0), (0, 1), (1, 0), (1, 1)])
@pytest.mark.parametrize("factors", [(1.0, 1.0), (-0.5, 3.0)])
def test_every_form_of_gemm(bias: Any, transposed: tuple[int, int], factors: tuple[float, float]):
    net = Net(OPSET)
    net.input("x", *((24, 5) if transposed[0] else (5, 24)))
    inputs = ["x", net.normal("w", *((6, 24) if transposed[1] else (24, 6)))]
    if bias is not None:
        inputs.append(net.normal("c", *bias))
    attributes = dict(zip(("transA", "transB", "alpha", "beta"), transposed + factors, strict=True))
    net.op("Gemm", *inputs, out="y", **attributes)
    net.output("y")
    _, kinds = check(net.model(), w=1 if transposed[1] else -2)
    assert kinds["MatMulNBits"] == 1 and not kinds["Gemm"]
    assert kinds["Add"] == (bias is not None and (factors[1] != 1 or len(bias) != 1))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block_size", [0, 16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_table_is_looked_up_in_codes(bits: Any, block_size: int, symmetric: bool):
    net = Net(OPSET)
    net.inputs.append(helper.make_tensor_value_info("i", TensorProto.INT64, ("N", 2)))
    net.op("Gather", net.normal("t", 50, 24), "i", out="y")
    net.output("y")
    pass_ = dataclasses.replace(PASS, bits=bits, block_size=block_size, symmetric=symmetric)
    feed = {"i": np.array([[0, 3], [49, -1], [-50, 7]])}
    _, kinds = check(net.model(), pass_, feed=feed, t=1)
    assert kinds == {"GatherBlockQuantized": 1}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block_size", [0, 16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_other_weights_are_dequantized_before_their_operator(
    bits: Any, block_size: int, symmetric: bool
):
    net = Net(OPSET)
    net.input("x", 1, 4, 9, 9)
    net.input("s", 3, 5, 20)
    net.op("Conv", "x", net.normal("k", 6, 4, 3, 3), out="y")
    net.op("MatMul", "s", net.normal("stack", 3, 20, 7), out="m")
    net.op("MatMul", net.normal("left", 6, 5), "s", out="n")
    weights = [net.normal("w", 1, 16, 20), net.normal("r", 1, 16, 4)]
    net.op("LSTM", "s", *weights, out="h", hidden_size=4)
    for name in ("y", "m", "n", "h"):
        net.output(name)
    pass_ = dataclasses.replace(PASS, bits=bits, block_size=block_size, symmetric=symmetric)
    _, kinds = check(net.model(), pass_, k=0, stack=-2, left=1, w=2, r=2)
    assert kinds["DequantizeLinear"] == 5 and not kinds["MatMulNBits"]


def test_eight_bits_a_channel_need_no_blocks():
    net = Net(opset=13)
    net.input("x", 1, 4, 9, 9)
    net.op("Conv", "x", net.normal("k", 6, 4, 3, 3), out="y")
    net.output("y")
    assert check(net.model(), dataclasses.replace(PASS, bits=8, block_size=0), k=0)[1]["Conv"] == 1
    assert "opset 21" in reason(net.model())


def test_a_shared_weight_is_stored_once_and_the_float_one_is_dropped():
    net = Net(OPSET)
    net.input("x", 5, 24)
    w = net.normal("w", 24, 24)
    net.op("MatMul", net.op("Relu", net.op("MatMul", "x", w)), w, out="y")
    net.op("Gemm", "x", w, out="z", transB=1)
    net.output("y")
    net.output("z")
    after, result = apply(PASS, net.model())
    assert result.figures == {"MatMulNBits": 3}
    assert sorted(w.name for w in after.graph.initializer) == [
        *("w_quantized", "w_quantized_1", "w_scale", "w_scale_1")
    ]


def test_bodies_are_quantized_too():
    inner = Net(OPSET, prefix="b")
    inner.op("MatMul", "x", inner.normal("w", 24, 24), out="then_y")
    inner.output("then_y")
    other = Net(OPSET, prefix="e")
    other.op("Identity", "x", out="else_y")
    other.output("else_y")
    net = Net(OPSET)
    net.input("x", 5, 24)
    net.inputs.append(helper.make_tensor_value_info("c", TensorProto.BOOL, ()))
    net.op("If", "c", out="y", then_branch=inner.graph("t"), else_branch=other.graph("f"))
    net.output("y")
    proto = net.model()
    after, result = apply(PASS, proto)
    assert result.figures == {"MatMulNBits": 1}
    feed = {"x": random_feed(proto)["x"], "c": np.array(True)}
    (expected,), (found,) = run(proto, feed), run(after, feed)
    assert np.abs(found - expected).max() < 0.2 * np.abs(expected).max()


def test_a_large_weight_is_made_when_it_is_read():
    proto = product(1024, 2100, data=(1, 1024))
    result = PASS(ir.from_proto(proto))
    codes = result.model.graph.initializers["w_quantized"].const_value
    assert isinstance(codes, ir.LazyTensor) and codes.nbytes == 1024 * 2100 // 2


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"exclude": ("MatMul",)}, "excluded"),
        ({"min_elements": 10**6}, "fewer than"),
    ],
)
def test_what_is_declined_is_told(change: Any, sentence: str):
    assert sentence in reason(product(24, 6, data=(5, 24)), dataclasses.replace(PASS, **change))


def test_what_cannot_be_quantized_is_declined():
    net = Net(OPSET, dtype=np.float16)
    net.input("x", 5, 24)
    net.op("MatMul", "x", net.normal("w", 24, 6), out="y")
    net.output("y")
    assert "float16" in reason(net.model())
    net = Net(OPSET)
    net.input("x", 5, 24)
    net.op("MatMul", "x", net.weight("w", np.full((24, 6), np.nan)), out="y")
    net.output("y")
    assert "NaN" in reason(net.model())


@pytest.mark.parametrize("block_size", [-16, 8, 48])
def test_a_block_size_that_no_kernel_takes_is_refused(block_size: int):
    with pytest.raises(InputError, match="power of 2"):
        QuantizeWeights(block_size=block_size)
