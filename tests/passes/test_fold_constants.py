"""What is folded, what is left, and how much it may cost."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import helper, numpy_helper, parser

from onnxcompress.passes.fold_constants import FoldConstants
from tests.passes.exactness import apply, assert_close, check_exact, count, run

PASS = FoldConstants()


def model(text: str, opset: int = 18, ir_version: int = 9) -> onnx.ModelProto:
    return parser.parse_model(f'<ir_version: {ir_version}, opset_import: ["": {opset}]>\n{text}')


def ops(proto: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in proto.graph.node]


def test_a_computed_shape_and_a_computed_weight() -> None:
    proto = model("""
        g (float[N, 6] x) => (float[A, B] y) <int32[1] rest = {3}, float[2, 3] w = {1,2,3,4,5,6}> {
            minus = Constant<value_ints = [-1]>()
            wide = Cast<to = 7>(rest)
            shape = Concat<axis = 0>(minus, wide)
            r = Reshape(x, shape)
            t = Transpose(w)
            s = Sqrt(t)
            y = MatMul(r, s)
        }""")
    after, result = check_exact(PASS, proto)
    assert ops(after) == ["Reshape", "MatMul"]
    assert {w.name for w in after.graph.initializer} == {"shape", "s"}
    assert result.skips == () and result.figures["folded"] == 5


def test_shape_of_a_static_input_but_not_of_a_dynamic_one() -> None:
    proto = model("""
        g (float[2, 3] x, float[N, 3] z) => (int64[2] y, int64[2] v) {
            a = Shape(x)
            y = Neg(a)
            b = Shape(z)
            v = Neg(b)
        }""")
    after, _ = check_exact(PASS, proto)
    assert ops(after) == ["Constant", "Shape", "Neg"]


def test_a_stale_inner_shape_is_not_believed() -> None:
    proto = model("""
        g (float[N, 3] x) => (int64[2] y) <float[1, 3] h> {
            h = Relu(x)
            y = Shape(h)
        }""")
    after, result = check_exact(PASS, proto)
    assert ops(after) == ["Relu", "Shape"] and not result.modified


def test_a_loop_may_carry_another_shape_every_time() -> None:
    proto = model("""
        g (float[1] x) => (float[N] last, int64[M, 1] sizes) <int64 trips = {3}> {
            last, sizes = Loop<
              body = b (int64 i, bool c, float[1] h) => (bool d, float[N] k, int64[1] s) {
                d = Identity(c)
                k = Concat<axis = 0>(h, h)
                s = Shape(h)
              }
            >(trips, , x)
        }""")
    after, _ = check_exact(PASS, proto)
    assert count(after, "Shape") == 1


def test_an_overridable_initializer_is_not_constant() -> None:
    proto = model(
        "g (float[2] x, float[2] w) => (float[2] y) <float[2] w = {1, 4}> {"
        " s = Sqrt(w)  y = Add(x, s) }"
    )
    after, result = check_exact(PASS, proto)
    assert ops(after) == ["Sqrt", "Add"] and not result.modified
    feed = {"x": np.zeros(2, np.float32), "w": np.array([9, 16], np.float32)}
    assert_close(run(after, feed)[0], np.array([3, 4], np.float32), 1e-6)


def test_graph_outputs_functions_and_old_models_get_constant_nodes() -> None:
    proto = model(
        "g (float[2] x) => (float[2] y, float[2] z) <float[2] w = {1, 4}> {"
        " y = Sqrt(w)  z = Add(x, w) }"
    )
    after, _ = check_exact(PASS, proto)
    assert ops(after) == ["Constant", "Add"] and after.graph.node[0].output == ["y"]

    proto = parser.parse_model("""<ir_version: 9, opset_import: ["": 18, "d": 1]>
        g (float[2] x) => (float[2] y) { y = d.f(x) }
        <domain: "d", opset_import: ["": 18]> f (a) => (b) {
            k = Constant<value_float = 4.0>()
            s = Sqrt(k)
            b = Mul(a, s)
        }""")
    after, _ = check_exact(PASS, proto)
    assert [n.op_type for n in after.functions[0].node] == ["Constant", "Constant", "Mul"]

    proto = model(
        "g (float[2] x) => (float[2] y) { k = Constant<value = float[2] {1, 4}>()"
        " s = Sqrt(k)  y = Add(x, s) }",
        opset=11,
        ir_version=3,
    )
    after, _ = check_exact(PASS, proto)
    assert not after.graph.initializer and count(after, "Sqrt") == 0


def test_into_the_branches_of_an_if_with_constants_from_outside() -> None:
    proto = model("""
        g (float[2] x, bool c) => (float[2] y) <float[2] w = {1, 4}> {
            y = If(c) <
                then_branch = t () => (float[2] p) { s = Sqrt(w)  p = Add(x, s) },
                else_branch = e () => (float[2] q) { s = Neg(w)  q = Add(x, s) }
            >
        }""")
    after, _ = check_exact(PASS, proto, feed={"x": np.ones(2, np.float32), "c": np.array(True)})
    assert count(after, "Sqrt", "Neg") == 0 and not after.graph.initializer


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("d = DequantizeLinear(q, s)  y = MatMul(x, d)", "quantizes"),
        ("r = RandomNormal<shape = [2, 2], seed = 1.0>()  y = MatMul(x, r)", "not evaluated"),
        ("d = Div(i, zero)  f = Cast<to = 1>(d)  y = Add(x, f)", "by zero"),
        ("c = Cast<to = 6>(inf)  f = Cast<to = 1>(c)  y = Add(x, f)", "cannot hold"),
        ("g = Gather(i, far)  f = Cast<to = 1>(g)  y = Add(x, f)", "cannot be evaluated"),
        ("h = Add(half, half)  f = Cast<to = 1>(h)  y = Add(x, f)", "round"),
        ("c = ConstantOfShape(many)  m = ReduceMax(c)  y = Add(x, m)", "expand"),
    ],
)
def test_declined_with_a_reason(body: str, reason: str) -> None:
    proto = model(f"""
        g (float[2, 2] x) => (float[2, 2] y) <
            int8[2, 2] q = {{1, 2, 3, 4}}, float s = {{0.5}}, int64[2] i = {{4, 6}},
            int64[2] zero = {{0, 1}}, float[1] inf = {{inf}}, int64 far = {{7}},
            float16[1] half = {{15360}}, int64[2] many = {{30000, 30000}}
        > {{ {body} }}""")
    after, result = apply(PASS, proto)
    assert ops(after)[0] == ops(proto)[0]
    assert reason in result.skips[0].reason and result.skips[0].node


def test_an_operator_that_the_model_defines_itself_is_not_evaluated() -> None:
    proto = parser.parse_model("""<ir_version: 10, opset_import: ["": 18, "d": 1]>
        g (float[2] x) => (float[2] y) <float[2] w = {1, 4}> { s = d.Sqrt(w)  y = Add(x, s) }
        <domain: "d", opset_import: ["": 18]> Sqrt (a) => (b) { b = Neg(a) }""")
    after, result = check_exact(PASS, proto)
    assert not result.modified and "function of the model" in result.skips[0].reason
    assert ops(after) == ["Sqrt", "Add"]


def test_growth_is_bounded_over_the_whole_model() -> None:
    names = [f"c{i}" for i in range(8)]
    made = "".join(f"{n} = ConstantOfShape(k)  " for n in names)
    proto = model(
        f"g (float[64] x) => (float[64] y) <int64[1] k = {{64}}> {{ {made}"
        f" y = Sum(x, {', '.join(names)}) }}"
    )
    after, result = apply(FoldConstants(max_bytes=3 * 256), proto)
    assert count(after, "ConstantOfShape") == 5
    assert sum(len(w.raw_data) for w in after.graph.initializer if w.name != "k") == 768
    assert len(result.skips) == 5 and "max_bytes" in result.skips[0].reason


def test_a_weight_that_is_cut_and_joined_again_costs_nothing() -> None:
    """As LSTM gates are reordered: each slice alone would add to the weight that it is cut from."""
    proto = model("""
        g (float[1, 64] x) => (float[1, 64] y)
        <int64[1] zero = {0}, int64[1] half = {32}, int64[1] end = {64}> {
            a = Slice(w, zero, half)
            b = Slice(w, half, end)
            v = Concat<axis = 0>(b, a)
            y = MatMul(x, v)
        }""")
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    proto.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    after, result = check_exact(FoldConstants(max_bytes=0), proto)
    assert ops(after) == ["MatMul"] and not result.skips
    assert [w.name for w in after.graph.initializer] == ["v"]


def large_weights(count: int, size: int) -> ir.Model:
    """Half-precision weights that are transposed and cast, each in a chain of its own."""
    body = "".join(
        f"t{i} = Transpose(w{i})  r{i} = Reshape(t{i}, flat)  y{i} = Mul(x, r{i})  "
        for i in range(count)
    )
    proto = model(
        f"g (float[N] x) => ({', '.join(f'float[N] y{i}' for i in range(count))}) "
        f"<int64[1] flat = {{-1}}> {{ {body} }}"
    )
    loaded = ir.from_proto(proto)
    for i in range(count):
        weights = np.full((2, size), i, np.float32)
        [node] = [n for n in loaded.graph if n.outputs[0].name == f"t{i}"]
        value = ir.Value(name=f"w{i}", const_value=ir.Tensor(weights))
        loaded.graph.register_initializer(value)
        node.replace_input_with(0, value)
    return loaded


def test_large_results_are_computed_when_read() -> None:
    source = large_weights(8, 1 << 19)
    tracemalloc.start()
    result = PASS(source)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 1 << 21, "8 weights of 4 MB each are not held"
    weights = result.model.graph.initializers
    tensors = [weights[f"r{i}"].const_value for i in range(8)]
    assert [t is not None and t.numpy()[-1] for t in tensors] == list(range(8))


@settings(deadline=None, max_examples=60)
@given(
    op=st.sampled_from(["Add", "Sub", "Mul", "Div", "Min", "Max", "Mod", "Equal", "Less"]),
    dtype=st.sampled_from([np.float32, np.float64, np.int32, np.int64]),
    data=st.data(),
)
def test_arithmetic_agrees_with_the_runtime(op: str, dtype: Any, data: st.DataObject) -> None:
    shapes = data.draw(hnp.mutually_broadcastable_shapes(num_shapes=2, max_dims=3, max_side=3))
    values = st.integers(-20, 20)
    a, b = (data.draw(hnp.arrays(dtype, s, elements=values)) for s in shapes.input_shapes)
    attributes: dict[str, Any] = {"fmod": 1} if op == "Mod" and np.dtype(dtype).kind == "f" else {}
    kind = (
        onnx.TensorProto.BOOL
        if op in {"Equal", "Less"}
        else helper.np_dtype_to_tensor_dtype(a.dtype)
    )
    graph = helper.make_graph(
        [helper.make_node(op, ["a", "b"], ["y"], **attributes)],
        "g",
        [],
        [helper.make_tensor_value_info("y", kind, shapes.result_shape)],
        [numpy_helper.from_array(a, "a"), numpy_helper.from_array(b, "b")],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    if np.dtype(dtype).kind == "i" and op in {"Div", "Mod"} and not b.all():
        assert not apply(PASS, proto)[1].modified
    else:
        after, _ = check_exact(PASS, proto)
        assert ops(after) == ["Constant"]
