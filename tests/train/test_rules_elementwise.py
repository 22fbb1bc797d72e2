"""Operators that work value by value: broadcasts, slopes, and the points without a derivative."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcompress.session import Session
from tests.train.gradcheck import check, one_node, with_gradients

random = np.random.default_rng(0)


@st.composite
def operands(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Two arrays that broadcast to each other, away from zero."""
    full = draw(st.lists(st.integers(1, 3), max_size=4))
    shapes = [[draw(st.sampled_from([n, 1])) for n in full] for _ in range(2)]
    cut = draw(st.integers(0, len(full)))
    shapes[draw(st.integers(0, 1))][:cut] = []
    seeded = np.random.default_rng(draw(st.integers(0, 100)))
    a, b = (seeded.uniform(0.5, 2, shape) for shape in shapes)
    return a, b


@settings(max_examples=25, deadline=None)
@given(
    operands(), st.sampled_from(["Add", "Sub", "Mul", "Div", "Pow", "Sum", "Max"]), st.booleans()
)
def test_operands_that_were_broadcast_are_summed_back(
    pair: tuple[np.ndarray, np.ndarray], op_type: str, dynamic: bool
) -> None:
    a, b = pair
    if op_type == "Max":
        b = b + 0.3 * np.sign(b - b.mean())
    check(op_type, {"a": a, "b": b}, wrt=("a", "b"), dynamic=dynamic, step=1e-6, tolerance=1e-5)


def test_an_operand_used_twice_gets_both_gradients() -> None:
    grads = check("Mul", {"a": random.standard_normal(3), "b": np.full(3, 2.0)}, wrt=("a", "b"))
    assert grads["a"].shape == (3,)


@pytest.mark.parametrize("exponent", [2, 3, 0.5, -1])
def test_known_exponents(exponent: float) -> None:
    base = random.uniform(0.5, 2, (2, 3))
    check("Pow", {"x": base, "e": np.array(exponent, np.float64)}, fixed=("e",))


def test_where_min_mean_clip_and_cast() -> None:
    a, b = random.standard_normal((2, 3)), random.standard_normal(3)
    truth = np.array([[True, False, True]])
    check("Where", {"c": truth, "a": a, "b": b}, wrt=("a", "b"))
    check("Min", {"a": a, "b": b}, wrt=("a", "b"))
    floats = {"a": a.astype(np.float32), "b": b.astype(np.float32)}
    check("Mean", floats, wrt=("a", "b"), step=1.0, tolerance=1e-5)
    bounds = {"low": np.array(-0.5), "high": np.array(0.4)}
    check("Clip", {"x": a, **bounds}, wrt=("x", "low", "high"))
    check("Cast", {"x": a}, {"to": 11})
    check("PRelu", {"x": a, "slope": b}, wrt=("x", "slope"))


_DOUBLE = "Relu LeakyRelu ThresholdedRelu Elu Sigmoid Tanh HardSigmoid Softplus Exp Abs Sin Cos Neg"
_AWAY_FROM_KINKS = np.linspace(-3.55, 3.45, 15).reshape(3, 5)
_FLOAT = "Selu Celu HardSwish Mish Softsign Erf Gelu"


@pytest.mark.parametrize("op_type", [*_DOUBLE.split(), "Softmax", "LogSoftmax"])
def test_slopes(op_type: str) -> None:
    check(op_type, {"x": _AWAY_FROM_KINKS}, step=1e-6)


@pytest.mark.parametrize("op_type", _FLOAT.split())
def test_slopes_in_single_precision(op_type: str) -> None:
    x = _AWAY_FROM_KINKS.astype(np.float32)
    check(op_type, {"x": x}, opset=20, step=1e-2, tolerance=1e-3)


@pytest.mark.parametrize("op_type", ["Log", "Sqrt", "Reciprocal"])
def test_slopes_above_zero(op_type: str) -> None:
    check(op_type, {"x": random.uniform(0.5, 2, (3, 4))})


@pytest.mark.parametrize(
    ("op_type", "attributes"),
    [
        ("LeakyRelu", {"alpha": 0.3}),
        ("Elu", {"alpha": 0.7}),
        ("HardSigmoid", {"alpha": 0.4, "beta": 0.3}),
        ("Softmax", {"axis": 0}),
        ("LogSoftmax", {"axis": 0}),
    ],
)
def test_attributes(op_type: str, attributes: dict[str, Any]) -> None:
    check(op_type, {"x": random.standard_normal((3, 4))}, attributes)


def test_both_forms_of_gelu_and_swish() -> None:
    x = random.standard_normal((3, 4)).astype(np.float32)
    check("Gelu", {"x": x}, {"approximate": "tanh"}, opset=20, step=1e-2, tolerance=1e-3)
    check("Swish", {"x": x}, {"alpha": 1.5}, opset=24, step=1e-2, tolerance=1e-3)


@pytest.mark.parametrize(
    ("op_type", "extra", "attributes", "points", "slopes"),
    [
        ("Relu", {}, {}, [-1, 0, 1], [0, 0, 1]),
        ("Abs", {}, {}, [-1, 0, 1], [-1, 0, 1]),
        ("LeakyRelu", {}, {"alpha": 0.5}, [-1, 0, 1], [0.5, 0.5, 1]),
        ("PRelu", {"slope": 0.5}, {}, [-1, 0, 1], [0.5, 0.5, 1]),
        ("Clip", {"low": 0, "high": 6}, {}, [-1, 0, 3, 6, 7], [0, 0, 1, 0, 0]),
        ("HardSigmoid", {}, {"alpha": 0.5, "beta": 0.5}, [-1, 0, 1], [0, 0.5, 0]),
        ("Max", {"other": 0}, {}, [-1, 0, 1], [0, 0.5, 1]),
        ("Min", {"other": 0}, {}, [-1, 0, 1], [1, 0.5, 0]),
        ("ReduceMax", {}, {}, [0, 2, 2, 1], [0, 0.5, 0.5, 0]),
        ("ReduceL2", {}, {}, [0, 0], [0, 0]),
    ],
)
def test_points_without_a_derivative(
    op_type: str,
    extra: dict[str, float],
    attributes: dict[str, Any],
    points: list[float],
    slopes: list[float],
) -> None:
    x = np.array(points, np.float64)
    inputs = {"x": x, **{k: np.array(v, np.float64) for k, v in extra.items()}}
    model = one_node(op_type, inputs, attributes, fixed=tuple(extra))
    ones = np.ones_like(Session(model).run({"x": x})["y"])
    whole = with_gradients(model, {"y": ones}, ["x"])
    assert Session(whole).run({"x": x})["x_gradient"].tolist() == slopes


@pytest.mark.parametrize(
    ("op_type", "bounds", "kinks"),
    [
        ("Relu", {}, [0.0]),
        ("Clip", {"low": 0, "high": 6}, [0.0, 6.0]),
        ("Clip", {"low": -3, "high": np.inf}, [-3.0]),
        ("Clip", {"low": -np.inf, "high": 0.1}, [0.1]),
        ("Clip", {"low": 2, "high": 1}, []),
        ("HardSigmoid", {}, []),
    ],
)
def test_masks_of_single_precision_change_at_the_very_bound(
    op_type: str, bounds: dict[str, float], kinks: list[float]
) -> None:
    """They are a steep ramp, which must not show between one number and the next."""
    at = np.array([*kinks, 0.0, 3.0, -3.0], np.float32)
    tiny = np.finfo(np.float32).tiny
    above, below = np.nextafter(at, np.float32(9)), np.nextafter(at, np.float32(-9))
    above, below = np.where(at == 0, tiny, above), np.where(at == 0, -tiny, below)
    x = np.concatenate([at, above, below, np.array([3e38, -3e38], np.float32)])
    slopes: list[list[float]] = []
    for dtype in (np.float32, np.float64):
        given = {k: np.array(np.float32(v), dtype) for k, v in bounds.items()}
        model = one_node(op_type, {"x": x.astype(dtype), **given}, fixed=tuple(given))
        whole = with_gradients(model, {"y": np.ones(x.shape, dtype)}, ["x"])
        found = Session(whole).run({"x": x.astype(dtype)})["x_gradient"]
        slopes.append(found.astype(np.float32).tolist())
    assert slopes[0] == slopes[1]
