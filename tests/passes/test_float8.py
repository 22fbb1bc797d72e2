"""8-bit floats: only operands are rounded, as ONNX Runtime rounds, and only where a target can."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from onnxcompress import api, job, schemes, targets
from onnxcompress.errors import InputError
from onnxcompress.model_io import load
from onnxcompress.numerics.affine import FLOAT8, RANGES, affine, dequantize, quantize
from onnxcompress.numerics.fidelity import Fidelity
from onnxcompress.operators import Role, operator
from onnxcompress.passes.insert_qdq import InsertQdq
from onnxcompress.session import Session
from tests.passes.calibrated import apply
from tests.passes.exactness import Net, random_feed, run

MODELS = Path(__file__).parents[2] / "models"
CODES = {"float8e4m3fn": TensorProto.FLOAT8E4M3FN, "float8e5m2": TensorProto.FLOAT8E5M2}


def restored(x: Any, scale: Any, dtype: str) -> Any:
    """`x` through QuantizeLinear and DequantizeLinear of ONNX Runtime."""
    net = Net(opset=21, ir_version=10)
    net.input("x", len(x))
    net.weight("s", scale)
    q = net.op("QuantizeLinear", "x", "s", output_dtype=CODES[dtype])
    net.op("DequantizeLinear", q, "s", out="y")
    net.output("y", [len(x)])
    return run(net.model(), {"x": x})[0]


@pytest.mark.parametrize("dtype", FLOAT8)
@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(-(2**20), 2**20, width=32), min_size=1, max_size=20),
    st.floats(2**-20, 2**20, width=32),
)
def test_codes_are_those_of_the_runtime(dtype: str, numbers: list[float], bound: float) -> None:
    x, parameters = np.array(numbers, np.float32), affine(-bound, bound, dtype, symmetric=True)
    y = dequantize(quantize(x, parameters), parameters)
    np.testing.assert_array_equal(y, restored(x, parameters.scale, dtype))
    assert np.abs(y).max() <= np.float32(RANGES[dtype][1]) * parameters.scale


@pytest.mark.parametrize(
    ("dtype", "steps", "smallest"), [("float8e4m3fn", 3, -6), ("float8e5m2", 2, -14)]
)
def test_normal_numbers_keep_the_bits_of_their_mantissa(
    dtype: str, steps: int, smallest: int
) -> None:
    parameters = affine(-RANGES[dtype][1], RANGES[dtype][1], dtype, symmetric=True)
    x = np.geomspace(2.0**smallest, RANGES[dtype][1], 5000).astype(np.float32)
    error = np.abs(dequantize(quantize(x, parameters), parameters) / x - 1)
    assert 0.85 * 2.0 ** -(steps + 1) < error.max() <= 2.0 ** -(steps + 1)


def residual() -> Net:
    net = Net()
    x = net.op("Relu", conv(net, net.input("x", 2, 4, 8, 8)))
    y = net.op("Clip", conv(net, x), net.weight("lo", 0.0), net.weight("hi", 1.5))
    z = net.op("Add", x, conv(net, y), out="sum")
    flat = net.op("Flatten", net.op("GlobalAveragePool", z))
    net.op("Gemm", flat, net.normal("w", 4, 5), net.normal("b", 5), out="y")
    net.output("sum")
    net.output("y")
    return net


def conv(net: Net, x: str) -> str:
    n = len(net.nodes)
    weight = net.normal(f"w{n}", 4, 4, 3, 3)
    return net.op("Conv", x, weight, net.normal(f"b{n}", 4), pads=[1] * 4)


def converted(net: Net, **options: Any) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    proto = net.model()
    feeds = [random_feed(proto)]
    model = ir.from_proto(proto)
    found = api.run(
        model,
        schemes.float8("tensorrt", **options),
        observer=api.observer(api.as_data(feeds, model)),
    )
    return proto, ir.to_proto(found.model)


def test_only_operands_of_products_are_rounded() -> None:
    proto, after = converted(residual())
    onnx.checker.check_model(after, full_check=True)
    assert after.opset_import[0].version == 21
    assert list(after.graph.input) == list(proto.graph.input)
    assert list(after.graph.output) == list(proto.graph.output)
    makers = {name: node for node in after.graph.node for name in node.output}
    readers = {n.op_type for n in after.graph.node for i in n.input if is_restored(makers.get(i))}
    assert readers == {"Conv", "Gemm"}
    assert makers["sum"].op_type == "Add" and makers["y"].op_type == "Gemm"
    for node in after.graph.node:
        if operator(ir.from_proto(node)).role is Role.CONTRACT:
            assert all(is_restored(makers[name]) for name in node.input[:2])
            assert node.input[2] in {w.name for w in after.graph.initializer}


def is_restored(node: onnx.NodeProto | None) -> bool:
    return node is not None and node.op_type == "DequantizeLinear"


def test_weights_have_a_scale_for_each_channel() -> None:
    for per_channel, shape in ((True, [4]), (False, [])):
        _, after = converted(residual(), per_channel=per_channel)
        kept = {w.name: w for w in after.graph.initializer}
        stored = [w for w in kept.values() if w.data_type == TensorProto.FLOAT8E4M3FN]
        restoring = [n for n in after.graph.node if is_restored(n) and n.input[0] in kept]
        assert len(stored) == len(restoring) == 4
        assert list(kept[restoring[0].input[1]].dims) == shape


def test_a_relu_or_clip_before_a_pair_stays_in_the_runtimes_own_graph() -> None:
    proto, after = converted(residual())
    feed = random_feed(proto)
    plain = run(after, feed)
    optimized = Session(ir.from_proto(after)).run(feed)
    for name, expected in zip(("sum", "y"), plain, strict=True):
        np.testing.assert_allclose(optimized[name], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["photo_digits", "name_language", "segment_tabular"])
def test_models_keep_most_of_their_signal(name: str) -> None:
    folder = MODELS / name
    found = api.quantize(
        folder / "model.onnx",
        folder / "calibration.npz",
        scheme="float8",
        target="tensorrt",
        samples=64,
    )
    original, candidate = Session(folder / "model.onnx"), Session(found.model)
    error = Fidelity()
    for feed in api.as_data(folder / "evaluation.npz", load(folder / "model.onnx")).first(64):
        (expected,), (actual,) = (
            [*session.run(feed).values()] for session in (original, candidate)
        )
        error.update(expected, actual)
    assert error.sqnr > 22


def test_bodies_and_what_they_read_from_outside() -> None:
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, 3]) for n in "xy")
    cond = helper.make_tensor_value_info("c", TensorProto.BOOL, [])
    weight = onnx.numpy_helper.from_array(np.eye(3, dtype=np.float32), "w")

    def body(name: str) -> onnx.GraphProto:
        out = helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 3])
        return helper.make_graph(
            [helper.make_node("MatMul", ["r", "w"], [name], name)], name, [], [out]
        )

    nodes = [
        helper.make_node("Relu", ["x"], ["r"]),
        helper.make_node("If", ["c"], ["y"], then_branch=body("a"), else_branch=body("b")),
    ]
    graph = helper.make_graph(nodes, "g", [x, cond], [y], [weight])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    feeds = [{"x": np.full((2, 3), v, np.float32), "c": np.array(v > 1)} for v in (1.0, 2.0)]
    model = ir.from_proto(proto)
    apply(InsertQdq(target="tensorrt", activations="float8e4m3fn"), model, feeds)
    for feed in feeds:
        np.testing.assert_allclose(run(ir.to_proto(model), feed)[0], feed["x"], rtol=2**-4)


def test_refused_where_the_target_cannot() -> None:
    with pytest.raises(InputError, match="'cpu' computes nothing in float8: aim at one that does"):
        api.quantize(MODELS / "photo_digits" / "model.onnx", scheme="float8")
    with pytest.raises(InputError, match="computes nothing in float8e5m2"):
        InsertQdq(target="tensorrt", activations="float8e5m2")
    with pytest.raises(InputError, match="entropy is for integers"):
        InsertQdq(target="tensorrt", activations="float8e4m3fn", method="entropy")
    with pytest.raises(InputError, match="float8 quantization needs calibration data"):
        api.quantize(MODELS / "photo_digits" / "model.onnx", scheme="float8", target="tensorrt")


def test_all_of_the_table_or_nothing() -> None:
    plain = targets.load("tensorrt")
    eight = plain.with_activations("float8e4m3fn")
    assert set(eight.kernels) == {"Conv", "Gemm", "MatMul"} and eight.opset == 21
    with pytest.raises(InputError, match="both 8-bit floats"):
        targets.replace(plain, activations=eight.activations)


def test_compress_tells_what_is_promised(tmp_path: Path) -> None:
    folder, out = MODELS / "segment_tabular", tmp_path / "out.onnx"
    calibrate = folder / "calibration.npz"
    report = job.compress(
        *(folder / "model.onnx", out),
        calibrate=calibrate,
        scheme="float8",
        target="tensorrt",
        samples=32,
    )
    assert report.audit is not None and report.attempts[0].kept
    assert report.audit.float8_macs == report.audit.macs > report.audit.integer_macs == 0
    assert report.audit.unfused == () and report.audit.promised == "tensorrt"
    assert out.stat().st_size < 0.3 * (folder / "model.onnx").stat().st_size
    with pytest.raises(InputError, match="float8 scheme needs calibration data"):
        job.compress(folder / "model.onnx", out, scheme="float8", target="tensorrt")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_quantize_stores_half_without_data(dtype: Any) -> None:
    found = api.quantize(MODELS / "name_language" / "model.onnx", scheme=dtype).model
    stored = {v.dtype for v in found.graph.initializers.values()}
    assert ir.DataType[dtype.upper()] in stored


def test_statistics_of_calibrate_serve_float8_too() -> None:
    folder = MODELS / "photo_digits"
    model, data = folder / "model.onnx", folder / "calibration.npz"
    options: dict[str, Any] = {"scheme": "float8", "target": "tensorrt"}
    known = api.calibrate(model, data, target="tensorrt", samples=32)
    first = api.quantize(model, statistics=known, **options).model
    second = api.quantize(model, data, samples=32, **options).model
    assert ir.to_proto(first).SerializeToString() == ir.to_proto(second).SerializeToString()
