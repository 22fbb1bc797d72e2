"""Products of matrices, with every broadcast and transposition, and sums by Einstein's rule."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.train.gradcheck import check

random = np.random.default_rng(0)


@st.composite
def factors(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of two operands of MatMul."""
    m, k, n = (draw(st.integers(1, 4)) for _ in range(3))
    batch = draw(st.lists(st.integers(1, 3), max_size=2))
    shapes = [[draw(st.sampled_from([b, 1])) for b in batch] for _ in range(2)]
    left = [*shapes[0], m, k] if draw(st.booleans()) else draw(st.sampled_from([[m, k], [k]]))
    right = [*shapes[1], k, n] if draw(st.booleans()) else draw(st.sampled_from([[k, n], [k]]))
    return tuple(left), tuple(right)


@settings(max_examples=25, deadline=None)
@given(factors(), st.booleans())
def test_matmul(shapes: tuple[tuple[int, ...], tuple[int, ...]], dynamic: bool) -> None:
    a, b = (random.standard_normal(shape) for shape in shapes)
    check("MatMul", {"a": a, "b": b}, wrt=("a", "b"), dynamic=dynamic, step=1.0)


@settings(max_examples=25, deadline=None)
@given(
    st.tuples(st.integers(0, 1), st.integers(0, 1)),
    st.sampled_from([None, (3, 5), (5,), (1, 5), (3, 1), ()]),
    st.booleans(),
)
def test_gemm(flips: tuple[int, int], bias: tuple[int, ...] | None, dynamic: bool) -> None:
    shapes = ((4, 3) if flips[0] else (3, 4)), ((5, 4) if flips[1] else (4, 5))
    inputs = {k: random.standard_normal(s) for k, s in zip("ab", shapes, strict=True)}
    if bias is not None:
        inputs["c"] = random.standard_normal(bias)
    attributes = {"transA": flips[0], "transB": flips[1], "alpha": 0.5, "beta": 1.5}
    check("Gemm", inputs, attributes, wrt=tuple(inputs), dynamic=dynamic, step=1.0)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("ij,jk->ik", [(3, 4), (4, 5)]),
        ("bhid,bhjd->bhij", [(2, 3, 4, 5), (2, 3, 6, 5)]),
        ("...ij,jk->...ik", [(2, 3, 4), (4, 5)]),
        ("...ij,...jk->...ik", [(2, 3, 4), (2, 4, 5)]),
        ("ij,k", [(3, 4), (5,)]),
        ("ij->j", [(3, 4)]),
        ("ij,jk,kl->il", [(2, 3), (3, 4), (4, 5)]),
    ],
)
def test_einsum(equation: str, shapes: list[tuple[int, ...]], dynamic: bool) -> None:
    inputs = {k: random.standard_normal(s) for k, s in zip("abc", shapes, strict=False)}
    options = {"wrt": tuple(inputs), "dynamic": dynamic, "step": 1.0}
    check("Einsum", inputs, {"equation": equation}, **options)
