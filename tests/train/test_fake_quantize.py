"""The trainable form computes what the quantized model computes, and settles to its bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from onnxcompress import api
from onnxcompress.errors import InputError
from onnxcompress.graph.names import FreshNames
from onnxcompress.graph.packed_weights import unpacked
from onnxcompress.numerics.saturation import largest_pair_sum
from onnxcompress.session import Session
from onnxcompress.train.fake_quantize import FakeQuantized, fake_quantize, settle

Array = np.ndarray[Any, Any]
X = {"x": np.random.default_rng(0).standard_normal((6, 3, 8, 8)).astype(np.float32)}


def network() -> ir.Model:
    """A convolution, a depthwise one, and matrices whose rows do not fill blocks."""
    text = """<ir_version: 10, opset_import: ["": 21]>
    net (float[N,3,8,8] x) => (float[N,5] y) {
        a = Conv<kernel_shape=[3, 3], pads=[1, 1, 1, 1]>(x, w1, b1)
        b = Relu(a)
        c = Conv<kernel_shape=[3, 3], group=12>(b, w2, b2)
        d = MaxPool<kernel_shape=[2, 2], strides=[2, 2]>(c)
        e = Flatten(d)
        f = Gemm<transB=1>(e, w3, b3)
        g = Relu(f)
        y = MatMul(g, w4)
    }"""
    rng = np.random.default_rng(1)
    proto = onnx.parser.parse_model(text)
    shapes = {"w1": (12, 3, 3, 3), "b1": (12,), "w2": (12, 1, 3, 3), "b2": (12,), "w3": (40, 108),
              "b3": (40,), "w4": (40, 5)}  # fmt: skip
    for name, shape in shapes.items():
        array = (rng.standard_normal(shape) / 4).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return ir.from_proto(proto)


FORMS: dict[str, dict[str, Any]] = {
    "static": {"scheme": "static"},
    "static, one scale": {"scheme": "static", "per_channel": False, "target": "qnn"},
    "4 bits packed": {"scheme": "weights", "accuracy_level": 1},
    "8 bits packed": {"scheme": "weights", "bits": 8, "symmetric": False, "accuracy_level": 1},
    "4 bits": {"scheme": "weights", "target": "qnn"},
    "4 bits a channel": {"scheme": "weights", "target": "qnn", "block_size": 0},
    "8 bits a channel": {"scheme": "weights", "target": "qnn", "bits": 8, "block_size": 0},
    "4 bits and zero points": {"scheme": "weights", "target": "qnn", "symmetric": False},
}
TOLERANCES = {
    form: {"none": 2e-5}
    | ({} if "one scale" in form else {"all": 0.02 if "bits" in form else 2e-5})
    for form in FORMS
}
"""Of the largest output. ONNX Runtime makes MatMulNBits of weights alone, which multiplies in 8
bits; a model for `qnn` may saturate kernels of this processor."""


def quantized(form: str, model: ir.Model | None = None) -> ir.Model:
    options = dict(FORMS[form])
    if options["scheme"] == "weights":
        options |= {"min_elements": 0}
    return api.quantize(model or network(), X, **options).model


def outputs(model: ir.Model, optimization: Any) -> Array:
    return Session(model, optimization=optimization).run(X)["y"]


def moved(fake: FakeQuantized, share: float, *, biases: bool = True) -> ir.Model:
    """The trainable form with its floats moved at random by a share of their spread."""
    rng, model = np.random.default_rng(2), fake.model.clone()
    for weight in fake.weights:
        value = model.graph.initializers[weight.floats]
        assert value.const_value is not None
        array = value.const_value.numpy()
        step = share * array.std() * rng.standard_normal(array.shape)
        if biases or weight.grid.dtype != "int32":
            value.const_value = ir.tensor((array + step).astype(np.float32))
    return model


@pytest.mark.parametrize("form", FORMS)
def test_the_trainable_form_computes_what_the_quantized_model_does(form: str) -> None:
    model = quantized(form)
    before = ir.to_proto(model).SerializeToString()
    fake = fake_quantize(model)
    assert not fake.skips
    floats = [w.floats for w in fake.weights]
    assert len(set(floats)) == len(floats) and {"w1", "w2", "w3", "w4"} <= {*floats}
    wanted = outputs(fake.model, "none")
    for optimization, tolerance in TOLERANCES[form].items():
        found = outputs(model, optimization)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())
    assert ir.to_proto(settle(fake)).SerializeToString() == before
    assert ir.to_proto(model).SerializeToString() == before


@pytest.mark.parametrize("form", FORMS)
def test_settled_it_computes_what_was_trained(form: str) -> None:
    fake = fake_quantize(quantized(form))
    trained = moved(fake, 0.5 if fake.weights[0].order is None else 0.005, biases=False)
    result = settle(fake, trained)
    wanted = outputs(trained, "none")
    for optimization, tolerance in TOLERANCES[form].items():
        found = outputs(result, optimization)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())
    assert np.abs(wanted - outputs(fake.model, "none")).max() > 0.01 * np.abs(wanted).max()
    for name, value in fake.quantized.graph.initializers.items():
        kept = result.graph.initializers[name]
        assert (kept.dtype, kept.shape) == (value.dtype, value.shape)


def test_floats_that_stay_in_their_step_settle_to_the_same_codes() -> None:
    for form in FORMS:
        fake = fake_quantize(quantized(form))
        before, after = fake.quantized, settle(fake, moved(fake, 1e-4, biases=False))
        names = [w.codes for w in fake.weights if w.codes not in fake.packings]
        names += [packing.name for packing in fake.packings.values()]
        for name in names:
            np.testing.assert_array_equal(codes(before, name), codes(after, name))


def codes(model: ir.Model, name: str) -> Array:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy()


def test_a_bias_settles_to_its_own_scale_in_32_bits() -> None:
    fake = fake_quantize(quantized("static"))
    bias = next(w for w in fake.weights if w.grid.dtype == "int32")
    trained = fake.model.clone()
    wanted = np.linspace(-1, 1, bias.grid.scale.size, dtype=np.float32)
    trained.graph.initializers[bias.floats].const_value = ir.tensor(wanted)
    found = codes(settle(fake, trained), bias.codes)
    assert found.dtype == np.int32
    np.testing.assert_allclose(found * bias.grid.scale, wanted, atol=bias.grid.scale.max())


def test_pairs_that_did_not_saturate_do_not_do_so_afterwards() -> None:
    fake = fake_quantize(quantized("static"))
    held = [w for w in fake.weights if w.order is not None]
    assert len(held) == 3  # a depthwise one adds in 32 bits
    result = settle(fake, moved(fake, 1.0))
    for weight in held:
        assert weight.order is not None
        rows = codes(result, weight.codes).transpose(weight.order)
        assert largest_pair_sum(rows.reshape(len(rows), -1)).max() <= 128


@pytest.mark.parametrize("form", ["static", "4 bits packed", "4 bits and zero points"])
def test_zeros_settle_to_zeros(form: str) -> None:
    model = network()
    for name in ("w1", "w3"):
        array = codes(model, name).copy()
        array[np.abs(array) < 0.2] = 0
        model.graph.initializers[name].const_value = ir.tensor(array)
    fake = fake_quantize(quantized(form, model))
    start, trained = codes(fake.model, "w3"), moved(fake, 0.1)
    pruned = np.where(start == 0, 0, codes(trained, "w3"))
    assert 0.3 < np.mean(start == 0) < 0.9
    trained.graph.initializers["w3"].const_value = ir.tensor(pruned)
    again = fake_quantize(settle(fake, trained))
    assert (codes(again.model, "w3")[start == 0] == 0).all()
    assert not np.array_equal(codes(again.model, "w3"), start)


@st.composite
def grids(draw: st.DrawFn) -> tuple[Any, ...]:
    """Codes of any type on any grid: dtype, codes, scale, zero point and attributes."""
    kind = draw(st.sampled_from(["INT2", "UINT2", "INT4", "UINT4", "INT8", "UINT8", "INT16"]))
    dtype, rank = ir.DataType[kind], draw(st.integers(1, 3))
    shape = [draw(st.integers(1, 5)) for _ in range(rank)]
    axis, attributes, sizes = draw(st.integers(-rank, rank - 1)), {}, []
    way = draw(st.sampled_from(["tensor", "channel", *(["block"] if max(shape) > 1 else [])]))
    if way == "channel":
        attributes, sizes = {"axis": axis}, [shape[axis]]
    elif way == "block":
        axis = axis if shape[axis] > 1 else int(np.argmax(shape)) - rank
        block = draw(st.integers(1, shape[axis] - 1))
        attributes, sizes = {"axis": axis, "block_size": block}, list(shape)
        sizes[axis] = -(-shape[axis] // block)
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    low = -(1 << dtype.bitwidth - 1) if kind.startswith("I") else 0
    each = rng.integers(low, low + (1 << dtype.bitwidth), shape)
    zero = rng.integers(low, low + (1 << dtype.bitwidth), sizes) if draw(st.booleans()) else None
    scale = rng.uniform(0.01, 1, sizes) * rng.choice([-1, 1], sizes)
    return dtype, each, scale.astype(np.float32), zero, attributes


def behind_dequantizer(
    dtype: ir.DataType, each: Array, scale: Array, zero: Array | None, attributes: dict[str, Any]
) -> ir.Model:
    """y = x + DQ(codes)."""
    names = ["codes", "scale", *([] if zero is None else ["zero"])]
    nodes = [
        helper.make_node("DequantizeLinear", names, ["w"], **attributes),
        helper.make_node("Add", ["x", "w"], ["y"]),
    ]
    ports = [
        helper.make_tensor_value_info(n, 1, [f"{n}{i}" for i in range(each.ndim)]) for n in "xy"
    ]
    made = [onnx.numpy_helper.from_array(scale, "scale")]
    for name, array in (("codes", each), ("zero", zero)):
        if array is not None:
            flat = np.asarray(array).reshape(-1).tolist()
            made.append(helper.make_tensor(name, dtype.value, np.shape(array), flat))
    graph = helper.make_graph(nodes, "g", [ports[0]], [ports[1]], made)
    opsets = [helper.make_opsetid("", 25)]
    return ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=11))


@given(grids(), st.integers(0, 99))
@settings(deadline=None, max_examples=20)
def test_any_grid_is_undone_and_settles_as_onnx_runtime_rounds(grid: Any, seed: int) -> None:
    model = behind_dequantizer(*grid)
    fake = fake_quantize(model)
    assert ir.to_proto(settle(fake)) == ir.to_proto(model)
    (weight,) = fake.weights
    start = codes(fake.model, weight.floats)
    trained = fake.model.clone()
    spread = np.random.default_rng(seed).standard_normal(start.shape).astype(np.float32)
    trained.graph.initializers[weight.floats].const_value = ir.tensor(start + spread)
    feed = {"x": np.zeros(start.shape, np.float32)}
    for changed in (fake.model, trained):
        wanted, found = (Session(m).run(feed)["y"] for m in (changed, settle(fake, changed)))
        np.testing.assert_array_equal(found, wanted)


def small(body: str, **arrays: Array) -> ir.Model:
    """A model of opset 21 that takes x [N,4], with these initializers."""
    proto = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["": 21]>
        g (float[N,4] x) => (float[N,4] y) {{ {body} }}"""
    )
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in arrays.items())
    return ir.from_proto(proto)


W = np.random.default_rng(3).integers(-127, 128, (4, 4)).astype(np.int8)
S, HALVES = np.float32(0.01), np.array([0.01, 0.02, 0.005, 0.03], np.float32)
FEED = {"x": np.random.default_rng(4).standard_normal((5, 4)).astype(np.float32)}


def test_a_weight_that_two_nodes_read_is_one() -> None:
    model = small(
        """a = DequantizeLinear(w, s)  b = MatMul(x, a)
           c = DequantizeLinear(w, s)  y = MatMul(b, c)""",
        w=W, s=np.array(S),
    )  # fmt: skip
    fake = fake_quantize(model)
    assert len(fake.weights) == 1
    assert sum(node.op_type == "QuantizeLinear" for node in fake.model.graph) == 1


def test_codes_that_are_moved_first_settle_where_they_lie() -> None:
    model = small(
        """m = Transpose(w)  r = Reshape(m, shape)
           a = DequantizeLinear<axis=-1>(r, s)  y = MatMul(x, a)""",
        w=W.reshape(2, 8), s=HALVES, shape=np.array([4, 4]),
    )  # fmt: skip
    fake = fake_quantize(model)
    wanted, found = (Session(m, optimization="none").run(FEED)["y"] for m in (model, fake.model))
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    trained = moved(fake, 0.5)
    result = settle(fake, trained)
    wanted, found = (Session(m, optimization="none").run(FEED)["y"] for m in (trained, result))
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    assert not np.array_equal(codes(result, "w"), codes(model, "w"))


def test_a_dead_channel_keeps_its_codes() -> None:
    scale = HALVES.copy()
    scale[1] = 0
    model = small("a = DequantizeLinear(w, s)  y = MatMul(x, a)", w=W, s=scale)
    fake = fake_quantize(model)
    assert np.isfinite(Session(fake.model).run(FEED)["y"]).all()
    after = codes(settle(fake, moved(fake, 0.5)), "w")
    assert np.array_equal(codes(settle(fake), "w"), W) and not np.array_equal(after, W)


def test_a_cast_and_a_product_are_a_grid_too() -> None:
    model = small("a = DequantizeLinear(w, s)  y = MatMul(x, a)", w=W, s=HALVES)
    node = model.graph[0]
    floats = unpacked(node, model.graph, FreshNames(model.graph))
    assert floats is not None
    node.outputs[0].replace_all_uses_with(floats)
    model.graph.remove(node)
    fake = fake_quantize(model)
    trained = moved(fake, 0.5)
    result = settle(fake, trained)
    assert [n.op_type for n in result.graph] == ["Cast", "Mul", "MatMul"]
    wanted, found = (Session(m, optimization="none").run(FEED)["y"] for m in (trained, result))
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


@pytest.mark.parametrize(
    ("body", "arrays", "reason"),
    [
        ("a = DequantizeLinear(v, s)  b = DequantizeLinear(v, t)  q = Mul(a, b)",
         {"v": W[0], "t": np.array(2 * S)}, "several grids"),
        ("a = DequantizeLinear(v, s)  b = Cast<to=1>(v)  q = Mul(a, b)", {"v": W[0]},
         "as integers too"),
        ("a = DequantizeLinear(v, h)  q = Cast<to=1>(a)",
         {"v": W[0], "h": np.array(0.5, np.float16)}, "float16, not float32"),
        ("c = Cast<to=9>(u) q = If(c) <then_branch = t () => (float[4] p) "
         "{ p = DequantizeLinear(v, s) }, else_branch = e () => (float[4] r) "
         "{ r = DequantizeLinear(v, s) }>",
         {"v": W[0], "u": np.array(1)}, "a body of If"),
    ],
)  # fmt: skip
def test_what_stays_is_said(body: str, arrays: dict[str, Array], reason: str) -> None:
    body = f"o = DequantizeLinear(w, s)  z = MatMul(x, o)  {body}  y = Add(z, q)"
    fake = fake_quantize(small(body, w=W, s=np.array(S), **arrays))
    assert [w.codes for w in fake.weights] == ["w"]
    assert [reason in skip.reason for skip in fake.skips] == [True]


@pytest.mark.parametrize(
    ("scheme", "sentence"),
    [("dynamic", "quantizes what it reads as the model runs"), ("float16", "holds no codes")],
)
def test_what_cannot_be_trained_is_refused(scheme: Any, sentence: str) -> None:
    options: dict[str, Any] = {"min_elements": 0} if scheme == "dynamic" else {}
    model = api.quantize(network(), X, scheme=scheme, **options).model
    with pytest.raises(InputError, match=sentence):
        fake_quantize(model)
