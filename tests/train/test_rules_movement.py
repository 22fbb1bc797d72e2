"""Operators that move values, and reductions along axes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.train.gradcheck import check

random = np.random.default_rng(0)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def normal(*shape: int) -> np.ndarray:
    return random.standard_normal(shape)


_TABLE: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("Reshape", {"x": normal(2, 3, 4), "s": ints(6, 4)}, {}),
    ("Flatten", {"x": normal(2, 3, 4)}, {"axis": 2}),
    ("Transpose", {"x": normal(2, 3, 4)}, {"perm": [2, 0, 1]}),
    ("Transpose", {"x": normal(2, 3, 4)}, {}),
    ("Squeeze", {"x": normal(2, 1, 4), "a": ints(1)}, {}),
    ("Unsqueeze", {"x": normal(2, 4), "a": ints(0, 2)}, {}),
    ("Expand", {"x": normal(3, 1), "s": ints(2, 3, 4)}, {}),
    ("Pad", {"x": normal(3, 4), "p": ints(1, 0, -1, 2)}, {}),
    ("Pad", {"x": normal(3, 4), "p": ints(1, 0, 2, 1)}, {"mode": "reflect"}),
    ("Pad", {"x": normal(3, 4), "p": ints(1, 0, 2, 1)}, {"mode": "edge"}),
    ("Gather", {"x": normal(5, 3), "i": np.array([[0, 2], [2, -1]])}, {}),
    ("Gather", {"x": normal(5, 3), "i": np.array([1, 1], np.int32)}, {}),
    ("Gather", {"x": normal(5, 3), "i": np.array(1)}, {"axis": 1}),
    ("GatherElements", {"x": normal(3, 4), "i": np.array([[0, 2], [2, -1]])}, {"axis": 1}),
    ("GatherND", {"x": normal(3, 4), "i": np.array([[0, 2], [2, -1], [0, 2]])}, {}),
    ("Tile", {"x": normal(3, 4), "r": ints(2, 3)}, {}),
    ("Identity", {"x": normal(3)}, {}),
    ("Dropout", {"x": normal(3)}, {}),
    ("CumSum", {"x": normal(3, 4), "a": np.array(1)}, {"exclusive": 1}),
    ("CumSum", {"x": normal(3, 4), "a": np.array(0)}, {"reverse": 1}),
    ("DepthToSpace", {"x": normal(2, 8, 3, 2)}, {"blocksize": 2}),
    ("DepthToSpace", {"x": normal(2, 8, 3, 2)}, {"blocksize": 2, "mode": "CRD"}),
    ("SpaceToDepth", {"x": normal(2, 2, 4, 6)}, {"blocksize": 2}),
]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("op_type", "inputs", "attributes"), _TABLE)
def test_gradients_move_back(
    op_type: str, inputs: dict[str, Any], attributes: dict[str, Any], dynamic: bool
) -> None:
    fixed = tuple(name for name in inputs if name != "x")
    check(op_type, inputs, attributes, fixed=fixed, dynamic=dynamic, step=1.0)


def test_what_tells_the_place_may_come_at_run_time() -> None:
    x = normal(3, 4)
    for op_type, extra in (
        ("Pad", {"p": ints(1, 0, 2, 1)}),
        ("Expand", {"s": ints(2, 3, 4)}),
        ("Tile", {"r": ints(2, 1)}),
        ("Slice", {"s": ints(0, 1), "e": ints(2, 9)}),
    ):
        check(op_type, {"x": x, **extra}, dynamic=True, step=1.0)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(-6, 6), min_size=4, max_size=4), st.integers(-2, 2), st.booleans())
def test_slice(bounds: list[int], step: int, dynamic: bool) -> None:
    starts, ends = ints(*bounds[:2]), ints(*bounds[2:])
    inputs = {"x": normal(4, 5), "s": starts, "e": ends, "a": ints(1, 0), "t": ints(step or 1, 1)}
    check("Slice", inputs, fixed=("s", "e", "a", "t"), dynamic=dynamic, step=1.0)


@pytest.mark.parametrize("dynamic", [False, True])
def test_concat_and_split(dynamic: bool) -> None:
    parts = {name: normal(2, size) for name, size in zip("abc", (3, 1, 4), strict=True)}
    check("Concat", parts, {"axis": -1}, wrt=tuple(parts), dynamic=dynamic, step=1.0)
    inputs = {"x": normal(2, 6), "s": ints(1, 2, 3)}
    options: dict[str, Any] = {"fixed": ("s",), "outputs": 3, "dynamic": dynamic}
    check("Split", inputs, {"axis": 1}, step=1.0, **options)


_SUMS = "ReduceSum ReduceMean ReduceMax ReduceMin ReduceL1 ReduceL2 ReduceSumSquare ReduceLogSumExp"


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([*_SUMS.split(), "ReduceLogSum"]),
    st.sampled_from([None, (1,), (0, 2), (-1,), (0, 1, 2)]),
    st.integers(0, 1),
    st.booleans(),
)
def test_reductions(
    op_type: str, axes: tuple[int, ...] | None, keepdims: int, dynamic: bool
) -> None:
    x = normal(2, 3, 4)
    if op_type == "ReduceLogSum":
        x = np.abs(x) + 0.5
    inputs = {"x": x} | ({} if axes is None else {"a": ints(*axes)})
    options: dict[str, Any] = {"fixed": tuple(k for k in inputs if k != "x"), "dynamic": dynamic}
    check(op_type, inputs, {"keepdims": keepdims}, step=1e-6, tolerance=1e-5, **options)


def test_no_axes_reduce_nothing() -> None:
    check("ReduceSum", {"x": normal(2, 3)}, {"noop_with_empty_axes": 1}, step=1.0)
