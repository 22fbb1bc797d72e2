"""Static quantization inside bodies of If, Loop and Scan, and what is reported of it."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcompress import schemes
from onnxcompress.contract import CalibratedPass, Result
from onnxcompress.observe import observe
from onnxcompress.passes.correct_bias import CorrectBias
from onnxcompress.passes.infer_shapes import InferShapes
from onnxcompress.passes.insert_qdq import InsertQdq
from onnxcompress.passes.remove_unused import RemoveUnused
from onnxcompress.passes.restore_float import RestoreFloat
from onnxcompress.passes.round_second_order import RoundSecondOrder
from onnxcompress.pipeline import run
from onnxcompress.validation import compare
from onnxcompress.validation.audit import audit
from tests.passes.calibrated import Feed, apply, sqnr

MACS = 36 * 8 * 72
"""Of one convolution here."""
WEIGHTS = {"b": (8,)} | dict.fromkeys("wvqr", (8, 8, 3, 3))
CONV = "Conv<pads=[1,1,1,1]>"

BRANCHES = f"""<ir_version: 8, opset_import: ["" : 17]>
g (float[1,8,6,6] x, bool c) => (float[1,8,6,6] y) {{
  h0 = {CONV}(x, w, b)
  h = Relu(h0)
  y = If(c) <
    then_branch = t () => (float[1,8,6,6] k) {{
      i = {CONV}(h, v, b)
      j = Relu(i)
      k = {CONV}(j, w) }},
    else_branch = e () => (float[1,8,6,6] l) {{ m = {CONV}(h, v, b)  l = Tanh(m) }}>
}}"""
"""What the branches read, weights too, is made outside of them."""
LOOP = f"""<ir_version: 8, opset_import: ["" : 17]>
g (float[1,8,6,6] x, int64 n) => (float[1,8,6,6] y, float[K,1,8,36] z)
  <bool on = {{1}}, int64[3] rows = {{1, 8, 36}}> {{
  y, z = Loop(n, on, x) <body = b (int64 i, bool go, float[1,8,6,6] s) =>
                                 (bool go_on, float[1,8,6,6] t, float[1,8,36] u) {{
    go_on = Identity(go)
    a = {CONV}(s, w, b)
    t = Tanh(a)
    u = Reshape(a, rows) }}>
}}"""
SCAN = f"""<ir_version: 8, opset_import: ["" : 17]>
g (float[3,1,8,6,6] x) => (float[3,1,8,6,6] y) {{
  y = Scan<num_scan_inputs = 1, body = b (float[1,8,6,6] s) => (float[1,8,6,6] t) {{
    a = {CONV}(s, w, b)
    r = Relu(a)
    t = {CONV}(r, w, b) }}>(x)
}}"""
NESTED = f"""<ir_version: 8, opset_import: ["" : 17]>
g (float[1,8,6,6] x, int64 n) => (float[1,8,6,6] y)
  <bool on = {{1}}, int64[4] last = {{-1, 8, 6, 6}}> {{
  y = Loop(n, on, x) <body = outer (int64 i, bool go, float[1,8,6,6] s) =>
                                    (bool go_on, float[1,8,6,6] t) {{
    go_on = Identity(go)
    odd = Cast<to=9>(i)
    a = {CONV}(s, w, b)
    t = If(odd) <
      then_branch = p () => (float[1,8,6,6] k) {{
        moved = Reshape(a, last)
        j = {CONV}(moved, w, b)
        k = Sigmoid(j) }},
      else_branch = q () => (float[1,8,6,6] l) {{ l = Tanh(a) }}> }}>
}}"""


def model_of(text: str) -> ir.Model:
    """Its weights are random, and small enough for a Loop not to explode."""
    proto, random = onnx.parser.parse_model(text), np.random.default_rng(0)
    for name, shape in WEIGHTS.items():
        if f", {name}" in text:
            array = 0.1 * random.standard_normal(shape).astype(np.float32)
            proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    onnx.checker.check_model(proto, full_check=True)
    return ir.from_proto(proto)


def feeds_of(model: ir.Model, count: int = 6) -> list[Feed]:
    random = np.random.default_rng(1)
    names = {v.name: v.shape for v in model.graph.inputs}
    scalars = {"c": lambda i: np.array(i % 2 == 0), "n": lambda i: np.array(i % 3 + 1)}
    return [
        {
            name: scalars[name](i)
            if name in scalars
            else random.standard_normal(shape.numpy()).astype(np.float32)
            for name, shape in names.items()
            if name and shape is not None
        }
        for i in range(count)
    ]


def quantized(model: ir.Model, feeds: list[Feed], *more: CalibratedPass) -> tuple[ir.Model, Result]:
    model = model.clone()
    InferShapes()(model)
    results: list[Result] = []
    for pass_ in (InsertQdq(), *more):
        results.append(apply(pass_, model, feeds))
    RemoveUnused()(model)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return model, results[-1]


@pytest.mark.parametrize(
    ("text", "kernels"), [(BRANCHES, 4), (LOOP, 1), (SCAN, 2), (NESTED, 2)], ids="ilsn"
)
def test_kernels_inside_bodies_are_integers(text: str, kernels: int) -> None:
    model = model_of(text)
    feeds = feeds_of(model)
    after, result = quantized(model, feeds)
    assert result.figures["integer kernels"] == kernels and not result.skips
    assert sqnr(model, after, feeds) > 25
    for feed in feeds[:2]:
        found = audit(after, feed)
        assert found.macs == audit(model, feed).macs > 0
        assert found.share == 1 and not found.unfused


def test_every_visit_counts() -> None:
    model = model_of(NESTED)
    feed = feeds_of(model)[0]
    for times, convolutions in ((0, 0), (1, 1), (2, 3), (3, 5)):
        assert audit(model, feed | {"n": np.array(times)}).macs == convolutions * MACS


def test_a_value_from_outside_is_quantized_once() -> None:
    model = model_of(BRANCHES)
    after, _ = quantized(model, feeds_of(model))
    nodes = list(after.graph.all_nodes())
    readers = Counter(node.inputs[0] for node in nodes if node.op_type == "QuantizeLinear")
    assert max(readers.values()) == 1
    assert not any(v.dtype == ir.DataType.FLOAT and v.shape is not None and len(v.shape) == 4
                   for v in after.graph.initializers.values())  # fmt: skip
    weights = [v for v in after.graph.initializers.values() if v.dtype == ir.DataType.INT8]
    assert sum(len(v.shape or ()) == 4 for v in weights) <= 4


def test_a_branch_that_calibration_never_takes_stays_in_float() -> None:
    model = model_of(BRANCHES)
    feeds = [feed | {"c": np.array(True)} for feed in feeds_of(model)]
    after, result = quantized(model, feeds)
    assert result.figures["integer kernels"] == 3
    (skip,) = result.skips
    assert skip.op == "Conv" and "never came" in skip.reason
    other = [feed | {"c": np.array(False)} for feed in feeds]
    assert sqnr(model, after, other) > 25


def test_rounding_and_bias_correction_go_inside() -> None:
    own = BRANCHES.replace("m = Conv<pads=[1,1,1,1]>(h, v", "m = Conv<pads=[1,1,1,1]>(h, q")
    model = model_of(own.replace("(j, w)", "(j, r)"))
    feeds = feeds_of(model, 12)
    after, result = quantized(model, feeds, RoundSecondOrder())
    assert result.figures["layers"] == 4 and not result.skips
    plain, _ = quantized(model, feeds)
    assert sqnr(model, after, feeds) > sqnr(model, plain, feeds) + 0.3
    after, result = quantized(model, feeds, RoundSecondOrder(), CorrectBias())
    assert result.figures["layers"] == 4 and result.modified  # a new bias inside the branch
    assert sqnr(model, after, feeds) > sqnr(model, plain, feeds) + 0.3


@pytest.mark.parametrize("text", [BRANCHES, LOOP, SCAN, NESTED], ids="ilsn")
def test_kernels_inside_bodies_return_to_float(text: str) -> None:
    model = model_of(text)
    feeds = feeds_of(model)
    after, _ = quantized(model, feeds)
    assert RestoreFloat(nodes=("*",))(after).modified
    RemoveUnused()(after)
    onnx.checker.check_model(ir.to_proto(after), full_check=True)
    assert audit(after, feeds[0]).integer_macs == 0
    assert sqnr(model, after, feeds) > 100


def test_layers_inside_bodies_are_compared() -> None:
    model = model_of(NESTED)
    feeds = feeds_of(model)
    after, _ = quantized(model, feeds)
    layers = {layer.tensor: layer for layer in compare(model, after, feeds).layers}
    assert {"a", "j", "k", "l", "t", "y"} <= set(layers)
    assert 20 < layers["a"].sqnr < 60 and layers["j"].upstream <= layers["a"].sqnr


VISITS = 3


@settings(deadline=None, max_examples=8)
@given(st.lists(st.booleans(), min_size=1, max_size=4), st.booleans())
def test_the_whole_scheme_keeps_every_branch(taken: list[bool], thorough: bool) -> None:
    """Whatever calibration took, every branch still computes what it did, near enough.

    A branch that it takes at all, it takes `VISITS` times, for a range is as good as the data that
    it was seen on: one visit shows 288 elements, of which other data goes beyond the largest.
    """
    model = model_of(BRANCHES)
    feeds = feeds_of(model, 4 * VISITS)
    chosen = np.repeat(taken, VISITS)
    data = [f | {"c": np.array(c)} for f, c in zip(feeds, chosen, strict=False)]
    passes = schemes.static("cpu", "thorough" if thorough else "fast")
    outcome = run(model, passes, observer=lambda m, wants: observe(m, data, wants))
    for branch in (False, True):
        through = [f | {"c": np.array(branch)} for f in feeds]
        assert sqnr(model, outcome.model, through) > 20
