"""What goes because nothing reads it, and what stays although nothing does."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
from onnx import parser

from onnxcompress.passes.remove_unused import RemoveUnused
from tests.passes.exactness import apply, check_exact, count

PASS = RemoveUnused()


def model(text: str, opset: int = 18) -> onnx.ModelProto:
    return parser.parse_model(f'<ir_version: 9, opset_import: ["": {opset}, "old": 1]>\n{text}')


def weights(proto: onnx.ModelProto) -> set[str]:
    return {w.name for w in proto.graph.initializer}


def test_dead_chains_and_their_weights() -> None:
    proto = model("""
        g (float[2] x, float[2] idle, float[2] given) => (float[2] y)
        <float[2] w = {1, 2}, float[2] lost = {3, 4}, float[2] given = {5, 6}> {
            y = Relu(x)
            a = Mul(x, w)
            b = Add(a, idle)
            c = Sqrt(b)
        }""")
    after, result = check_exact(PASS, proto)
    assert [n.op_type for n in after.graph.node] == ["Relu"]
    assert weights(after) == {"given"}
    assert (result.figures["nodes"], result.figures["initializers"]) == (3, 2)


def test_what_only_a_dead_subgraph_read_goes_too() -> None:
    proto = model("""
        g (float[2] x, bool c) => (float[2] y) <float[2] w = {1, 2}> {
            a = Mul(x, w)
            z = If(c) <
                then_branch = t () => (float[2] p) { p = Neg(a) },
                else_branch = e () => (float[2] q) { q = Abs(a) }
            >
            y = Relu(x)
        }""")
    after, _ = check_exact(PASS, proto, feed={"x": np.ones(2, np.float32), "c": np.array(True)})
    assert [n.op_type for n in after.graph.node] == ["Relu"] and not weights(after)


def test_inside_a_branch_and_what_it_captures_stays() -> None:
    proto = model("""
        g (float[2] x, bool c) => (float[2] y) <float[2] w = {1, 2}> {
            a = Mul(x, w)
            y = If(c) <
                then_branch = t () => (float[2] p) <float[2] v = {1, 1}> {
                    d = Add(a, v)  p = Neg(a)
                },
                else_branch = e () => (float[2] q) { q = Abs(x) }
            >
        }""")
    after, _ = check_exact(PASS, proto, feed={"x": np.ones(2, np.float32), "c": np.array(True)})
    assert count(after, "Mul") == 1 and count(after, "Add") == 0
    assert not after.graph.node[1].attribute[0].g.initializer


def test_unused_functions_go_and_called_ones_are_swept() -> None:
    proto = parser.parse_model("""<ir_version: 9, opset_import: ["": 18, "d": 1]>
        g (float[2] x) => (float[2] y) { y = d.f(x) }
        <domain: "d", opset_import: ["": 18, "d": 1]> f (a) => (b) { c = Neg(a)  b = d.h(a) }
        <domain: "d", opset_import: ["": 18]> h (a) => (b) { b = Abs(a) }
        <domain: "d", opset_import: ["": 18]> k (a) => (b) { b = Exp(a) }""")
    after, result = check_exact(PASS, proto)
    assert [f.name for f in after.functions] == ["f", "h"] and result.figures["functions"] == 1
    assert count(after, "Neg") == 0


def test_optional_outputs_that_nothing_reads() -> None:
    proto = model("""
        g (float[1, 1, 4, 4] x) => (float[1, 1, 2, 2] y) {
            y, where = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(x)
        }""")
    after, result = check_exact(PASS, proto)
    assert list(after.graph.node[0].output) == ["y"] and result.figures["outputs"] == 1

    proto = model("""
        g (float[3, 1, 2] x) => (float[1, 1, 2] last)
        <float[1, 8, 2] w, float[1, 8, 2] r> {
            all, last, cell = LSTM<hidden_size = 2>(x, w, r)
        }""")
    random = np.random.default_rng(0)
    for name in ("w", "r"):
        array = random.standard_normal((1, 8, 2)).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    after, _ = check_exact(PASS, proto)
    assert list(after.graph.node[0].output) == ["", "last"]


def test_outputs_that_choose_training_stay() -> None:
    proto = model("""
        g (float[2, 3] x, float[3] s) => (float[2, 3] y) {
            y, mean, var = BatchNormalization<training_mode = 1>(x, s, s, s, s)
        }""")
    after, result = apply(PASS, proto)
    assert len(after.graph.node[0].output) == 3 and not result.modified


def test_opsets_metadata_and_nodes_without_outputs_stay() -> None:
    source = ir.from_proto(model("g (float[2] x) => (float[2] y) { y = Relu(x) }"))
    source.metadata_props["author"] = "someone"
    source.graph.append(ir.Node("old", "Log", [source.graph.inputs[0]], num_outputs=0))
    result = PASS(source)
    after = result.model
    assert not result.modified and [n.op_type for n in after.graph] == ["Relu", "Log"]
    assert after.opset_imports == {"": 18, "old": 1}
    assert after.metadata_props == {"author": "someone"}
