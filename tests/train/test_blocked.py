"""Convolutions on blocks of channels give what they gave before, whatever reads them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcompress.graph.inference import infer
from onnxcompress.session import Session
from onnxcompress.train import blocked
from onnxcompress.train.blocked import block_channels, block_size, for_cpu
from onnxcompress.train.gradients import add_gradients
from onnxcompress.train.losses import CrossEntropy
from onnxcompress.train.optimizers import SGD
from onnxcompress.train.step import Step

SIZE = block_size() or 0
pytestmark = pytest.mark.skipif(not SIZE, reason="no such operators on this machine")
B = SIZE
random = np.random.default_rng(0)


def model_of(text: str, **weights: Any) -> ir.Model:
    """A model of ONNX text whose weights are inputs, as they are in training."""
    shapes = ", ".join(f"float[{','.join(map(str, w.shape))}] {n}" for n, w in weights.items())
    proto = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : 18]> g ({text.replace("WEIGHTS", shapes)}'
    )
    model = ir.from_proto(proto)
    infer(model)
    return model


def normal(*shape: int) -> np.ndarray:
    return random.standard_normal(shape).astype(np.float32)


def check(model: ir.Model, feed: dict[str, Any], taken: int) -> Counter[str]:
    """What operators there are after `taken` convolutions were put into blocks."""
    copy = model.clone()
    assert block_channels(copy.graph, SIZE) == taken
    assert [v.name for v in copy.graph.outputs] == [v.name for v in model.graph.outputs]
    plain, other = (Session(m, optimization="none").run(feed) for m in (model, copy))
    for name, array in plain.items():
        scale = np.abs(array).max() + 1e-6
        np.testing.assert_allclose(other[name] / scale, array / scale, atol=2e-5, rtol=0)
    return Counter(node.op_type for node in copy.graph)


@st.composite
def layers(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Convolutions one behind the other, dense, of points, in groups and depthwise."""
    found: list[dict[str, Any]] = []
    channels = draw(st.sampled_from([3, B, 2 * B]))
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["dense", "depthwise", "grouped"] if channels % B == 0 else
                                    ["dense"]))  # fmt: skip
        out = channels if kind == "depthwise" else draw(st.sampled_from([B, 2 * B, 4 * B]))
        group = {"dense": 1, "depthwise": channels, "grouped": 2}[kind]
        if kind == "grouped" and (channels < 2 * B or out < 2 * B):
            group = 1
        kernel = draw(st.sampled_from([1, 2, 3]))
        options = {
            "group": group,
            "strides": [draw(st.integers(1, 2)), 1],
            "pads": [draw(st.integers(0, kernel - 1)) for _ in range(4)],
            "dilations": [1, draw(st.integers(1, 2))],
        }
        after = draw(st.sampled_from(["", "Relu", "Clip", "LeakyRelu", "Add", "own"]))
        found.append({"options": options, "after": after, "w": (out, channels // group, kernel)})
        channels = out
    return found


@settings(max_examples=40, deadline=None)
@given(layers(), st.booleans())
def test_any_chain(given_layers: list[dict[str, Any]], symbolic: bool) -> None:
    lines: list[str] = []
    channels = given_layers[0]["w"][1] * given_layers[0]["options"]["group"]
    feed: dict[str, Any] = {"x": normal(2, channels, 40, 20)}
    value, weights = "x", dict[str, np.ndarray]()
    for i, layer in enumerate(given_layers):
        m, c, k = layer["w"]
        weights[f"w{i}"], weights[f"b{i}"] = normal(m, c, k, k) / np.float32(k * c**0.5), normal(m)
        options = ", ".join(f"{k} = {v}" for k, v in layer["options"].items())
        lines.append(f"c{i} = Conv<{options}>({value}, w{i}, b{i})")
        after = {"Clip": f"Clip(c{i}, low, high)", "Add": f"Add(c{i}, c{i})",
                 "own": f"Mul(c{i}, half)", "": f"Identity(c{i})"}  # fmt: skip
        lines.append(f"y{i} = " + after.get(layer["after"], f"{layer['after']}(c{i})"))
        value = f"y{i}"
    batch = "N" if symbolic else "2"
    outputs = ", ".join(f"float[a{i},b{i},e{i},f{i}] y{i}" for i in range(len(given_layers)))
    body = "\n".join(lines)
    text = f"""float[{batch},{channels},40,20] x, WEIGHTS) => ({outputs})
    <float low = {{-0.5}}, float high = {{0.75}}, float half = {{0.5}}> {{ {body} }}"""
    check(model_of(text, **weights), {**feed, **weights}, _taken(given_layers))


def _taken(given_layers: list[dict[str, Any]]) -> int:
    """All but points behind what is not in blocks."""
    count, in_blocks = 0, False
    for layer in given_layers:
        is_taken = in_blocks or layer["w"][2] > 1 or layer["options"]["group"] > 1
        count += is_taken
        in_blocks = is_taken and layer["after"] != ""
    return count


W = {"a": normal(2 * B, B, 3, 3), "b": normal(2 * B, 2 * B, 3, 3), "d": normal(2 * B)}


def test_a_residual_block_needs_no_reordering_within() -> None:
    model = model_of(
        f"""float[N,{B},6,6] x, WEIGHTS) => (float[N,{2 * B},6,6] y) {{
            s = Conv<pads = [1, 1, 1, 1]>(x, a, d)
            t = Relu(s)
            u = Conv<pads = [1, 1, 1, 1]>(t, b)
            v = Add(u, t)
            y = Relu(v) }}""",
        **W,
    )
    found = check(model, {"x": normal(3, B, 6, 6), **W}, taken=2)
    assert found["Add"] == found["Relu"] == 0
    assert found["ReorderOutput"] == 1


def test_what_else_reads_a_value_gets_it_as_it_was() -> None:
    model = model_of(
        f"""float[N,{B},6,7] x, WEIGHTS)
            => (float[N,{2 * B},6,7] s, float[N,{2 * B}] m, int64[4] n, float[N,6,7,{2 * B}] l,
                float[{2 * B}] r, float[N,{2 * B},6,1] q, float[N,{2 * B},6,7] k)
            <int64[3] axes = {{0, 2, 3}}, int64[1] two = {{-1}}, int64[2] pair = {{2, 3}}> {{
            s = Conv<pads = [1, 1, 1, 1]>(x, a, d)
            t = Tanh(s)
            n = Shape(t)
            l = Transpose<perm = [0, 2, 3, 1]>(t)
            r = ReduceSum<keepdims = 0>(t, axes)
            q = ReduceMax(t, two)
            m = ReduceSum<keepdims = 0>(t, pair)
            k = Mul(t, q) }}""",
        **W,
    )
    found = check(model, {"x": normal(3, B, 6, 7), **W}, taken=1)
    assert found["GlobalAveragePool"] == 1


@pytest.mark.parametrize("channels", [(B, B + 1), (B + 1, B), (B - 1, B - 1)])
def test_channels_that_do_not_fill_blocks_are_left(channels: tuple[int, int]) -> None:
    c, m = channels
    weights = {"a": normal(m, c, 3, 3)}
    text = f"float[N,{c},6,6] x, WEIGHTS) => (float[N,{m},4,4] y) {{ y = Conv(x, a) }}"
    found = check(model_of(text, **weights), {"x": normal(2, c, 6, 6), **weights}, taken=0)
    assert found == {"Conv": 1}


def test_outputs_are_what_is_asked_for() -> None:
    text = f"""float[N,{B},6,6] x, WEIGHTS) => (float[N,{2 * B},4,4] y) {{
        y = Conv(x, a) z = Relu(y) o = Neg(z) }}"""
    model = model_of(text, a=W["a"])
    found = Session(for_cpu(model, ["o", "y"])).run({"x": normal(2, B, 6, 6), "a": W["a"]})
    assert list(found) == ["o", "y"]
    np.testing.assert_array_equal(found["o"], -np.maximum(found["y"], 0))


def test_without_blocks_training_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    text = f"""<ir_version: 10, opset_import: ["" : 18]>
    g (float[N,3,8,8] x) => (float[N,{B}] y) {{
        c0 = Conv<pads = [1, 1, 1, 1], strides = [2, 2]>(x, w0, b0)
        r0 = Clip(c0, low, high)
        c1 = Conv<pads = [1, 1, 1, 1], group = {B}>(r0, w1, b1)
        r1 = Relu(c1)
        c2 = Conv(r1, w2, b2)
        s = Add(c2, r0)
        p = GlobalAveragePool(s)
        y = Flatten(p) }}"""
    proto = onnx.parser.parse_model(text)
    weights = {"w0": normal(B, 3, 3, 3), "w1": normal(B, 1, 3, 3), "w2": normal(B, B, 1, 1)}
    weights |= {f"b{i}": normal(B) for i in range(3)}
    weights |= {"low": np.float32(0).reshape(()), "high": np.float32(6).reshape(())}
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), name))
    feed = {"x": normal(5, 3, 8, 8), "labels": np.arange(5)}
    found: list[dict[str, np.ndarray]] = []
    for size in (SIZE, None):
        monkeypatch.setattr(blocked, "block_size", lambda size=size: size)
        names = [name for name in weights if name[0] in "wb"]
        step = Step(ir.from_proto(proto), [CrossEntropy("y")], SGD(0.1), trainable=names)
        for _ in range(3):
            step.run(feed)
        found.append(step.weights())
    for name, array in found[0].items():
        np.testing.assert_allclose(array, found[1][name], atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_depthwise_kernels_of_known_sizes(data: st.DataObject) -> None:
    """A window of any kind: its gradient is a convolution of samples by gradients, in blocks."""
    kernel, strides, dilations = ([data.draw(st.integers(1, 3)) for _ in "hw"] for _ in range(3))
    reach = [(k - 1) * d for k, d in zip(kernel, dilations, strict=True)]
    pads = [data.draw(st.integers(0, r)) for r in reach * 2]
    sizes = [data.draw(st.integers(r + 1, r + 7)) for r in reach]
    options = f"pads = {pads}, strides = {strides}, dilations = {dilations}, group = {B}"
    weights = {"w": normal(B, 1, *kernel)}
    model = model_of(
        f"""float[3,{B},{sizes[0]},{sizes[1]}] x, WEIGHTS) => (float y)
        {{ c = Conv<{options}>(x, w) s = Mul(c, c) y = ReduceSum<keepdims = 0>(s) }}""",
        **weights,
    )
    feed = {"x": normal(3, B, *sizes), **weights}
    found: list[dict[str, np.ndarray]] = []
    for block in (None, SIZE):
        copy = model.clone()
        values = {v.name: v for v in (*copy.graph.inputs, *copy.graph.outputs)}
        loss = values["y"]
        gradients = add_gradients(copy.graph, loss, [values["x"], values["w"]], block)
        names = [gradients[values[n]].name or "" for n in "xw"]
        if block:
            copy.graph.outputs[:] = list(gradients.values())
            assert block_channels(copy.graph, block) >= 2
        found.append(Session(copy, outputs=names, optimization="none").run(feed))
        found[-1] = dict(zip("xw", found[-1].values(), strict=True))
    for name in "xw":
        scale = np.abs(found[0][name]).max() + 1e-6
        np.testing.assert_allclose(found[1][name] / scale, found[0][name] / scale, atol=2e-5)
