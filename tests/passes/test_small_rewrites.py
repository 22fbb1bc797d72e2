"""Exact rewrites that prepare a graph for integer kernels."""

from __future__ import annotations

from typing import Any

import onnx
import onnx_ir as ir
import pytest

from onnxcompress.contract import Result
from onnxcompress.passes.forget_shapes import ForgetShapes
from onnxcompress.passes.fuse_gemm import FuseGemm
from onnxcompress.passes.infer_shapes import InferShapes
from onnxcompress.passes.settle_initializers import SettleInitializers
from onnxcompress.passes.write_as_add import WriteAsAdd
from onnxcompress.passes.write_as_div import WriteAsDiv
from onnxcompress.session import optimized_model
from tests.passes.exactness import Net, apply, assert_close, check_exact, count, random_feed, run


def product(swap: bool = False, shape: tuple[int, ...] = (3, 5), bias: Any = (4,)) -> Net:
    net = Net()
    x = net.op("MatMul", net.input("x", *shape), net.normal("w", 5, 4), out="p")
    operands = (net.normal("b", *bias), x) if swap else (x, net.normal("b", *bias))
    net.op("Add", *operands, out="y")
    net.output("y")
    return net


@pytest.mark.parametrize("swap", [False, True])
def test_a_product_and_its_bias_become_gemm(swap: bool) -> None:
    after, _ = check_exact(FuseGemm(), product(swap).model())
    assert count(after, "Gemm") == 1 and count(after, "MatMul", "Add") == 0


def exported(net: Net) -> None:
    net.output("p")


def read_twice(net: Net) -> None:
    net.op("Neg", "p", out="z")
    net.output("z")


@pytest.mark.parametrize("extra", [exported, read_twice])
def test_a_product_that_is_needed_stays(extra: Any) -> None:
    net = product()
    extra(net)
    after, result = check_exact(FuseGemm(), net.model())
    assert not result.modified and count(after, "MatMul") == 1


@pytest.mark.parametrize(
    "net", [product(shape=(2, 3, 5)), product(bias=(3, 4)), product(bias=(1,))]
)
def test_other_ranks_and_biases_stay(net: Net) -> None:
    assert not check_exact(FuseGemm(), net.model())[1].modified


def gelu(factor: Any = 0.5**0.5, swap: bool = False, shape: tuple[int, ...] = (3, 5)) -> Net:
    """Written out, behind a bias."""
    net = Net()
    x = net.op("Add", net.input("x", *shape), net.normal("b", 5), out="h")
    operands = (net.weight("f", factor), x) if swap else (x, net.weight("f", factor))
    erf = net.op("Erf", net.op("Mul", *operands, out="scaled"))
    more = net.op("Add", erf, net.weight("one", 1))
    net.op("Mul", net.op("Mul", x, more), net.weight("half", 0.5), out="y")
    net.output("y")
    return net


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("factor", [0.5**0.5, [0.5**0.5]])
def test_runtime_joins_gelu_whose_factor_became_a_divisor(factor: Any, swap: bool) -> None:
    before = gelu(factor, swap).model()
    after, _ = check_exact(WriteAsDiv(), before, rtol=1e-6)
    assert "BiasGelu" not in {n.op_type for n in optimized_model(ir.from_proto(before)).graph}
    assert "BiasGelu" in {n.op_type for n in optimized_model(ir.from_proto(after)).graph}


def scaled_is_read(net: Net) -> None:
    net.output("scaled")


@pytest.mark.parametrize(
    ("net", "extra"),
    [(gelu(0.7), None), (gelu([[[0.5**0.5]]]), None), (gelu(), scaled_is_read)],
)
def test_other_factors_of_erf_stay(net: Net, extra: Any) -> None:
    if extra:
        extra(net)
    assert not check_exact(WriteAsDiv(), net.model())[1].modified


@pytest.mark.parametrize(("terms", "written"), [(1, 0), (2, 1), (3, 0)])
def test_a_sum_of_two_becomes_add(terms: int, written: int) -> None:
    net = Net()
    x = net.input("x", 2, 3)
    others = [net.normal(f"c{i}", 3) for i in range(terms - 1)]
    net.op("Sum", x, *others, out="y")
    net.output("y")
    after, result = check_exact(WriteAsAdd(), net.model())
    assert count(after, "Add") == written and result.modified == bool(written)


def test_initializers_of_version_3_are_constants() -> None:
    net = Net(opset=9, ir_version=3)
    x = net.input("x", 2, 3)
    net.op("Add", x, net.normal("c", 3), out="y")
    net.input("c", 3)
    net.output("y")
    proto = net.model()
    after, result = apply(SettleInitializers(), proto)
    assert result.modified and after.ir_version == 4
    assert [i.name for i in after.graph.input] == ["x"]
    onnx.checker.check_model(after)
    feed = random_feed(proto)
    assert_close(run(after, feed)[0], run(proto, feed)[0], 0)


def test_defaults_of_later_versions_can_be_overridden_and_stay() -> None:
    net = Net(ir_version=4)
    net.op("Add", net.input("x", 3), net.normal("c", 3), out="y")
    net.input("c", 3)
    net.output("y")
    after, result = apply(SettleInitializers(), net.model())
    assert not result.modified
    assert [i.name for i in after.graph.input] == ["x", "c"]


def test_inner_shapes_are_inferred_and_outputs_left_as_declared() -> None:
    net = Net()
    net.infer = False
    net.op(
        "Relu", net.op("MatMul", net.input("x", "N", 5), net.normal("w", 5, 4), out="h"), out="y"
    )
    net.output("y", ["batch", None])
    model = ir.from_proto(net.model())
    result = InferShapes()(model)
    inner = next(v for node in model.graph for v in node.outputs if v.name == "h")
    assert inner.dtype == ir.DataType.FLOAT and str(inner.shape) == "[N,4]"
    assert str(model.graph.outputs[0].shape) == "[batch,None]" and result.modified


def test_only_what_was_inferred_is_forgotten() -> None:
    net = Net()
    h = net.op("MatMul", net.input("x", "N", 5), net.normal("w", 5, 4))
    kept = net.op("Relu", h)
    net.op("Neg", kept, out="y")
    net.output("y", ["N", 4])
    model = ir.from_proto(net.model())
    exported = set(model.graph.outputs)
    inner = {v.name: v for node in model.graph for v in node.outputs if v not in exported}
    for value in inner.values():
        value.type = value.shape = None
    inner[kept].type = ir.TensorType(ir.DataType.FLOAT)
    assert InferShapes()(model).modified and inner[h].shape is not None
    assert ForgetShapes()(model).modified and not ForgetShapes()(model).modified
    assert inner[h].type is None and inner[kept].dtype == ir.DataType.FLOAT
    (output,) = model.graph.outputs
    assert output.dtype == ir.DataType.FLOAT


def test_a_model_that_cannot_be_inferred_stays() -> None:
    net = Net()
    net.infer = False
    net.op("MatMul", net.input("x", 2, 5), net.normal("w", 4, 4), out="y")
    net.output("y")
    before = ir.from_proto(net.model())
    result = InferShapes()(before)
    assert isinstance(result, Result) and not result.modified
    assert "shape inference failed" in result.skips[0].reason


def test_sequences_keep_their_types() -> None:
    net = Net()
    net.infer = False
    s = net.op("SequenceConstruct", net.input("x", 2, 5), "x")
    net.op("ConcatFromSequence", s, out="y", axis=0)
    net.output("y")
    after, _ = check_exact(InferShapes(), net.model(), rtol=0)
    (sequence,) = (info.type for info in after.graph.value_info if info.name == s)
    assert sequence.WhichOneof("value") == "sequence_type"


def test_subtracting_a_constant_is_adding_its_opposite() -> None:
    net = Net()
    x = net.op("Sub", net.input("x", 2, 3), net.normal("c", 3))
    net.op("Sub", net.normal("d", 3), x, out="y")
    net.output("y")
    after, _ = check_exact(WriteAsAdd(), net.model(), rtol=0)
    assert count(after, "Add") == 1 and count(after, "Sub") == 1
