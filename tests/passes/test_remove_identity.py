"""Every operator that can do nothing, when it does and when it does not."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import parser

from onnxcompress.passes.remove_identity import RemoveIdentity
from tests.passes.exactness import apply, check_exact, count

PASS = RemoveIdentity()

CONSTANTS = """<
    float one = {1}, float[1] ones1 = {1}, float[1,1,1] ones3 = {1}, float zero = {0},
    float[4] row = {1,1,1,1}, float[4] mixed = {1,1,2,1}, int64[2] same = {2,4},
    int64[2] infer = {-1,4}, int64[2] copied = {0,-1}, int64[2] turned = {4,2},
    int64[1] flat = {-1}, int64[1] first = {0}, int64[1] one_dim = {1},
    int64[2] repeat = {1,1}, int64[2] twice = {2,1},
    int64[2] starts = {0,0}, int64[2] ends = {9223372036854775807, 2147483647},
    int64[2] short = {1,4}, int64[2] axes = {0,1}, int64[2] steps = {1,1}, int64[2] back = {-1,1},
    int64[4] nothing = {0,0,0,0}, int64[4] something = {0,1,0,0}, bool no = {0}, bool yes = {1},
    float half = {0.5}
>"""


def model(text: str, opset: int = 18, ir_version: int = 9) -> onnx.ModelProto:
    return parser.parse_model(f'<ir_version: {ir_version}, opset_import: ["": {opset}]>\n{text}')


def between(body: str, opset: int = 18, shape: str = "2, 4") -> onnx.ModelProto:
    """`body` computes `b` from `a`, neither of them an input or output."""
    return model(
        f"g (float[{shape}] x) => (float[A, B] y) {CONSTANTS} {{ a = Abs(x)  {body}  y = Neg(b) }}",
        opset,
    )


@pytest.mark.parametrize(
    "body",
    [
        "b = Identity(a)",
        "b = Transpose<perm = [0, 1]>(a)",
        "b = Reshape(a, infer)",
        "b = Reshape(a, copied)",
        "b = Reshape(a, same)",
        "b = Expand(a, repeat)",
        "b = Expand(a, one_dim)",
        "b = Expand(a, same)",
        "b = Tile(a, repeat)",
        "b = Flatten(a)",
        "b = Slice(a, starts, ends)",
        "b = Slice(a, starts, ends, axes, steps)",
        "b = Pad(a, nothing)",
        "b = Concat<axis = 0>(a)",
        "b = Sum(a)",
        "b = Max(a)",
        "b = Dropout(a)",
        "b, mask = Dropout(a)",
        "b = Dropout(a, half, no)",
        "b = Mul(a, one)",
        "b = Mul(one, a)",
        "b = Mul(a, ones1)",
        "b = Mul(a, row)",
        "b = Div(a, one)",
        "b = Pow(a, one)",
        "b = Add(zero, a)",
        "b = Sub(a, zero)",
    ],
)
def test_it_does_nothing(body: str) -> None:
    proto = between(body)
    inferred = proto.graph.value_info.add()
    inferred.CopyFrom(onnx.helper.make_tensor_value_info("a", onnx.TensorProto.FLOAT, [2, 4]))
    after, result = check_exact(PASS, proto)
    assert [n.op_type for n in after.graph.node] == ["Abs", "Neg"]
    assert result.figures["removed"] == 1 and not result.skips


@pytest.mark.parametrize(
    "body",
    [
        "b = Transpose(a)",
        "b = Transpose<perm = [1, 0]>(a)",
        "b = Reshape(a, turned)",
        "b = Tile(a, twice)",
        "b = Flatten<axis = 0>(a)",
        "b = Slice(a, starts, short)",
        "b = Slice(a, back, ends)",
        "b = Slice(a, starts, ends, axes, back)",
        "b = Pad(a, something)",
        "b = Concat<axis = 0>(a, a)",
        "b = Mul(a, mixed)",
        "b = Mul(a, zero)",
        "b = Div(one, a)",
        "b = Pow(one, a)",
        "b = Sub(zero, a)",
        "c = Mul(a, ones3)  b = Squeeze(c, first)",  # the factor adds a dimension
    ],
)
def test_it_does_something(body: str) -> None:
    proto = between(body)
    inferred = proto.graph.value_info.add()
    inferred.CopyFrom(onnx.helper.make_tensor_value_info("a", onnx.TensorProto.FLOAT, [2, 4]))
    _, result = check_exact(PASS, proto)
    assert not result.modified


def test_training_dropout_and_a_mask_that_is_read_stay() -> None:
    training = between("b = Dropout<seed = 1>(a, zero, yes)")
    assert not check_exact(PASS, training)[1].modified
    masked = between(
        "b, mask = Dropout(a)  m = Cast<to = 1>(mask)  b2 = Add(b, m)".replace(
            "b2 = Add(b, m)", "k = Identity(m)"
        )
    )
    masked.graph.output.append(onnx.helper.make_tensor_value_info("k", 1, ["A", "B"]))
    after, _ = check_exact(PASS, masked)
    assert count(after, "Dropout") == 1


@pytest.mark.parametrize(
    ("opset", "attribute", "left"), [(6, "is_test = 1", 0), (6, "", 1), (7, "", 0)]
)
def test_dropout_before_it_had_a_training_input(opset: int, attribute: str, left: int) -> None:
    head = f"<{attribute}>" if attribute else ""
    proto = between(f"b = Dropout{head}(a)", opset)
    assert count(apply(PASS, proto)[0], "Dropout") == left


def test_a_cast_to_the_same_type_and_only_that() -> None:
    proto = model(
        "g (float[2] x) => (float[2] y) {"
        " a = Cast<to = 1>(x)  b = Cast<to = 11>(a)  c = Cast<to = 1>(b)  y = Neg(c) }"
    )
    after, _ = check_exact(PASS, proto)
    assert [n.op_type for n in after.graph.node] == ["Cast", "Cast", "Neg"]


def test_a_dynamic_input_hides_inner_shapes() -> None:
    """The recorded [1, 4] of `a` is stale: Expand does something for other batches."""
    proto = between("b = Expand(a, same)", shape="N, 4")
    inferred = proto.graph.value_info.add()
    inferred.CopyFrom(onnx.helper.make_tensor_value_info("a", onnx.TensorProto.FLOAT, [2, 4]))
    after, _ = check_exact(PASS, proto, feed={"x": np.ones((1, 4), np.float32)})
    assert count(after, "Expand") == 1


def test_a_graph_output_keeps_its_name_and_declared_shape() -> None:
    proto = model(
        "g (float[2, 3] x) => (float[N, M] y, float[2, 3] z) {"
        " a = Neg(x)  y = Identity(a)  z = Abs(a) }"
    )
    after, _ = check_exact(PASS, proto)
    assert [n.op_type for n in after.graph.node] == ["Neg", "Abs"]
    assert after.graph.node[0].output == ["y"] and after.graph.node[1].input == ["y"]


@pytest.mark.parametrize(
    ("outputs", "body"),
    [
        ("float[2] y", "y = Identity(x)"),
        ("float[2] y", "y = Identity(w)"),
        ("float[2] y, float[2] z", "z = Neg(x)  y = Identity(z)"),
        ("float[2] y, float[2] z", "a = Neg(x)  y = Identity(a)  z = Identity(a)"),
    ],
)
def test_it_stays_where_two_names_must(outputs: str, body: str) -> None:
    proto = model(f"g (float[2] x) => ({outputs}) <float[2] w = {{1, 2}}> {{ {body} }}")
    after, result = check_exact(PASS, proto)
    assert count(after, "Identity") == 1
    assert [s.op for s in result.skips] == ["Identity"]


def test_branches_loops_and_functions() -> None:
    proto = model("""
        g (float[2] x, bool c) => (float[2] y) <int64 trips = {3}> {
            k = Identity(x)
            y = If(c) <
                then_branch = t () => (float[2] p) { a = Identity(k)  n = Neg(a)  p = Identity(n) },
                else_branch = e () => (float[2] q) { q = Identity(k) }
            >
        }""")
    for flag in (True, False):
        feed = {"x": np.ones(2, np.float32), "c": np.array(flag)}
        after, result = check_exact(PASS, proto, feed=feed)
        assert count(after, "Identity") == 1 and result.figures["removed"] == 3

    proto = parser.parse_model("""<ir_version: 9, opset_import: ["": 18, "d": 1]>
        g (float[2] x) => (float[2] y) { y = d.f<k = 1>(x) }
        <domain: "d", opset_import: ["": 18]> f <k> (a) => (b) {
            c = Identity(a)  d = Cast<to: int = @k>(c)  b = Neg(d)
        }""")
    after, _ = check_exact(PASS, proto)
    assert [n.op_type for n in after.functions[0].node] == ["Cast", "Neg"]


def test_a_name_that_a_subgraph_uses_again() -> None:
    """Within the branch, `x` is another value: it must not stand for the captured `k`."""
    proto = model("""
        g (float[2] x, bool c) => (float[2] y) {
            k = Identity(x)
            y = If(c) <
                then_branch = t () => (float[2] p) { x = Neg(k)  p = Add(x, k) },
                else_branch = e () => (float[2] q) { q = Abs(k) }
            >
        }""")
    after, result = apply(PASS, proto)
    assert count(after, "Identity") == 1 and "subgraph" in result.skips[0].reason


def test_an_operator_that_the_model_defines_itself_stays() -> None:
    proto = parser.parse_model("""<ir_version: 9, opset_import: ["": 18, "d": 1]>
        g (float[2] x) => (float[2] y) { a = d.Identity(x)  y = Abs(a) }
        <domain: "d", opset_import: ["": 18]> Identity (a) => (b) { b = Exp(a) }""")
    assert not check_exact(PASS, proto)[1].modified
