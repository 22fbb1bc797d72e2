"""Gelu written out becomes one node, whatever the order of its factors; what is not Gelu stays."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxcompress.graph.inference import infer
from onnxcompress.session import Session
from onnxcompress.train.gelu import join_gelu
from onnxcompress.train.gradients import add_gradients

X = np.linspace(-6, 6, 97, dtype=np.float32).reshape(1, 97)
CONSTANTS = (
    "float root = {1.4142135}, float inverse = {0.70710677}, float one = {1}, float half = {0.5}, "
    "float third = {0.3333}"
)
FORMS = (
    "a = Div(x, root) e = Erf(a) s = Add(e, one) m = Mul(x, s) y = Mul(m, half)",
    "a = Mul(inverse, x) e = Erf(a) s = Add(one, e) h = Mul(x, half) y = Mul(h, s)",
    "a = Mul(x, inverse) e = Erf(a) s = Add(e, one) h = Mul(half, s) y = Mul(h, x)",
)
OTHERS = (
    "a = Div(x, root) e = Erf(a) s = Add(e, one) m = Mul(x, s) y = Mul(m, third)",
    "a = Div(x, one) e = Erf(a) s = Add(e, one) m = Mul(x, s) y = Mul(m, half)",
    "a = Div(x, root) e = Erf(a) s = Add(e, half) m = Mul(x, s) y = Mul(m, half)",
    "a = Div(x, root) e = Erf(a) s = Add(e, one) m = Mul(x, s) n = Mul(m, half) y = Add(n, s)",
    "a = Div(x, root) e = Erf(a) s = Add(e, one) m = Mul(a, s) y = Mul(m, half)",
    "a = Div(x, root) e = Erf(a) s = Add(e, one) m = Mul(s, s) y = Mul(m, half)",
)


def model_of(form: str) -> ir.Model:
    text = f"""<ir_version: 10, opset_import: ["" : 18]>
    g (float[N,97] x) => (float[N,97] y) <{CONSTANTS}> {{ {form} }}"""
    model = ir.from_proto(onnx.parser.parse_model(text))
    infer(model)
    return model


def slopes(model: ir.Model) -> np.ndarray:
    copy = model.clone()
    x, y = copy.graph.inputs[0], copy.graph.outputs[0]
    gradient = add_gradients(copy.graph, y, [x])[x]
    return Session(copy, outputs=[gradient.name or ""], optimization="none").run({"x": X})[
        gradient.name or ""
    ]


@pytest.mark.parametrize("form", FORMS)
def test_every_order_becomes_one_node(form: str) -> None:
    model = model_of(form)
    joined = model.clone()
    assert join_gelu(joined.graph) == 1
    assert [node.op_type for node in joined.graph] == ["Gelu"]
    assert joined.graph.outputs[0].name == "y"
    assert join_gelu(joined.graph) == 0
    plain, other = (Session(m, optimization="none").run({"x": X})["y"] for m in (model, joined))
    np.testing.assert_allclose(other, plain, atol=2e-6)
    np.testing.assert_allclose(slopes(joined), slopes(model), atol=2e-6)


@pytest.mark.parametrize("form", OTHERS)
def test_what_is_not_gelu_stays(form: str) -> None:
    model = model_of(form)
    before = Counter(node.op_type for node in model.graph)
    assert join_gelu(model.graph) == 0
    assert Counter(node.op_type for node in model.graph) == before


def test_what_others_read_is_kept() -> None:
    form = f"{FORMS[0]} z = Exp(a)"
    model = model_of(form)
    z = next(v for node in model.graph for v in node.outputs if v.name == "z")
    model.graph.outputs.append(z)
    assert join_gelu(model.graph) == 1
    assert {node.op_type for node in model.graph} == {"Gelu", "Div", "Exp"}
