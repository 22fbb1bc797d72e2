"""Equal initializers become one, unless someone could tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper, parser

from onnxcompress import operators
from onnxcompress.passes.deduplicate_initializers import DeduplicateInitializers
from tests.passes.exactness import apply, check_exact

PASS = DeduplicateInitializers()


def model(text: str) -> onnx.ModelProto:
    return parser.parse_model(f'<ir_version: 9, opset_import: ["": 18]>\n{text}')


def names(graph: onnx.GraphProto) -> list[str]:
    return [w.name for w in graph.initializer]


def test_the_first_of_equal_ones_stays() -> None:
    proto = model("""
        g (float[2] x) => (float[2] y)
        <float[2] a = {1, 2}, float[2] b = {1, 2}, float[2] c = {1, 3}, float[2] d = {1, 2}> {
            p = Add(x, a)  q = Mul(p, b)  r = Sub(q, c)  y = Div(r, d)
        }""")
    after, result = check_exact(PASS, proto)
    assert names(after.graph) == ["a", "c"]
    assert result.figures == {"merged": 2, "bytes_saved": 16}


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (np.zeros((2, 3), np.float32), np.zeros((3, 2), np.float32)),
        (np.zeros(2, np.float32), np.zeros(2, np.int32)),
        (np.zeros(2, np.int8), np.zeros(2, np.uint8)),
        (np.array([0.0], np.float32), np.array([-0.0], np.float32)),
        (np.zeros(1000, np.float32), np.eye(1, 1000, 500, dtype=np.float32)[0]),
    ],
)
def test_equal_means_type_shape_and_every_byte(left: Any, right: Any) -> None:
    source = stored(left, right)
    assert not PASS(source).modified and len(source.graph.initializers) == 2


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((0, 3), np.float32),
        np.array(7, np.int64),
        np.array([np.nan, np.inf], np.float64),
        np.array([1, -2, 3], ml_dtypes.int4),
        np.array([1.5, 2.5], ml_dtypes.bfloat16),
        np.arange(12, dtype=np.float32).reshape(3, 4).T,
    ],
)
def test_any_type_and_layout(array: Any) -> None:
    source = stored(array, array.copy())
    assert PASS(source).modified and len(source.graph.initializers) == 1


def stored(*arrays: Any) -> ir.Model:
    """A model that reads each array by an operator of its own."""
    values = [ir.Value(name=f"w{i}", const_value=ir.Tensor(a)) for i, a in enumerate(arrays)]
    nodes = [ir.node("Identity", [v]) for v in values]
    outputs = [n.outputs[0] for n in nodes]
    graph = ir.Graph([], outputs, nodes=nodes, initializers=values, opset_imports={"": 18})
    return ir.Model(graph, ir_version=10)


@given(st.lists(st.integers(0, 3), max_size=12))
def test_one_stays_of_each_kind_and_every_reader_finds_its_value(kinds: list[int]) -> None:
    source = stored(*(np.full(300, k, np.int16) for k in kinds))
    PASS(source)
    assert len(source.graph.initializers) == len(set(kinds))
    tensors = [operators.constant(node.inputs[0]) for node in source.graph]
    assert [t is not None and t[0] for t in tensors] == kinds


def test_inputs_and_outputs_are_left_alone() -> None:
    proto = model("""
        g (float[2] x, float[2] b) => (float[2] y, float[2] c)
        <float[2] a = {1, 2}, float[2] b = {1, 2}, float[2] c = {1, 2}> {
            p = Add(x, a)  q = Mul(p, b)  y = Div(q, c)
        }""")
    after, result = check_exact(PASS, proto)
    assert names(after.graph) == ["a", "b", "c"] and not result.modified


def test_an_outer_one_serves_a_branch_but_not_the_other_way() -> None:
    proto = model("""
        g (float[2] x, bool c) => (float[2] y) <float[2] a = {1, 2}> {
            h = Add(x, a)
            y = If(c) <
                then_branch = t () => (float[2] p) <float[2] b = {1, 2}, float[2] d = {7, 8}> {
                    i = Add(h, b)  p = Mul(i, d)
                },
                else_branch = e () => (float[2] q) <float[2] f = {7, 8}> { q = Mul(h, f) }
            >
        }""")
    for flag in (True, False):
        feed = {"x": np.ones(2, np.float32), "c": np.array(flag)}
        after, result = check_exact(PASS, proto, feed=feed)
        branches = [a.g for a in after.graph.node[1].attribute]
        assert [names(after.graph), *map(names, branches)] == [["a"], ["d"], ["f"]]
        assert result.figures["merged"] == 1


@pytest.mark.parametrize(("ir_version", "places"), [(9, [1, 0, 0]), (3, [0, 1, 1])])
def test_equal_ones_of_two_branches_move_out_of_them(ir_version: int, places: list[int]) -> None:
    """Not in IR version 3, where an initializer of the main graph would have to be an input."""
    proto = model("""
        g (float[300] x, bool c) => (float[300] y) {
            y = If(c) <
                then_branch = t () => (float[300] p) { p = Add(x, a) },
                else_branch = e () => (float[300] q) { q = Mul(x, b) }
            >
        }""")
    array = np.arange(300, dtype=np.float32)
    for branch, name in zip(proto.graph.node[0].attribute, "ab", strict=True):
        branch.g.initializer.append(numpy_helper.from_array(array, name))
    proto.ir_version = ir_version
    for flag in (True, False) if ir_version > 3 else ():
        check_exact(PASS, proto, feed={"x": np.ones(300, np.float32), "c": np.array(flag)})
    after, _ = apply(PASS, proto)
    branches = [a.g for a in after.graph.node[0].attribute]
    assert [len(g.initializer) for g in (after.graph, *branches)] == places


def test_a_name_that_a_branch_uses_again() -> None:
    proto = model("""
        g (float[2] x, bool c) => (float[2] y) <float[2] a = {1, 2}> {
            h = Add(x, a)
            y = If(c) <
                then_branch = t () => (float[2] p) <float[2] b = {1, 2}> {
                    a = Neg(h)  p = Mul(a, b)
                },
                else_branch = e () => (float[2] q) { q = Abs(h) }
            >
        }""")
    after, result = apply(PASS, proto)
    assert names(after.graph.node[1].attribute[0].g) == ["b"] and len(result.skips) == 1


def test_files_are_read_only_where_the_ends_agree(tmp_path: Path) -> None:
    arrays = [np.full(1 << 16, k, np.float32) for k in (1, 2, 1)]
    (tmp_path / "w.bin").write_bytes(b"".join(a.tobytes() for a in arrays))
    source = stored(*arrays)
    read: list[str] = []

    class Counted(ir.ExternalTensor):
        def tofile(self, file: Any) -> None:
            read.append(self.name or "")
            super().tofile(file)

    for i, value in enumerate(source.graph.initializers.values()):
        value.const_value = Counted(
            "w.bin",
            i << 18,
            1 << 18,
            ir.DataType.FLOAT,
            shape=ir.Shape([1 << 16]),
            name=f"w{i}",
            base_dir=tmp_path,
        )
    result = PASS(source)
    assert list(source.graph.initializers) == ["w0", "w1"] and read == ["w0", "w2"]
    assert result.modified


def test_what_is_computed_on_demand_is_not_computed_for_this() -> None:
    def fail() -> ir.Tensor:
        raise AssertionError("computed")

    source = stored(np.zeros(2, np.float32), np.zeros(2, np.float32))
    for value in source.graph.initializers.values():
        value.const_value = ir.LazyTensor(fail, dtype=ir.DataType.FLOAT, shape=ir.Shape([2]))
    assert not PASS(source).modified
