"""Heads: which node it is, another in its place, the trunk before it, and one fitted at once."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxcompress.contract import Array
from onnxcompress.errors import InputError
from onnxcompress.model_io import load
from onnxcompress.session import Session
from onnxcompress.train.fit_head import Sums, fit_head
from onnxcompress.train.heads import (
    features,
    find_head,
    head_of,
    replace_head,
    set_head,
    trunk_of,
)
from onnxcompress.train.parameters import trainable_weights

MODELS = Path(__file__).parents[2] / "models"


def zeros(name: str, *shape: int) -> str:
    """An initializer in ONNX text, to be drawn by `model_of`."""
    dims, values = ", ".join(map(str, shape)), ", ".join(["0"] * math.prod(shape))
    return f"float[{dims}] {name} = {{{values}}}"


GEMM = f"""<ir_version: 8, opset_import: ["": 17]>
g (float[N, 4] x) => (float[N, 3] y)
<{zeros("w1", 6, 4)}, {zeros("b1", 6)}, {zeros("w2", 3, 6)}, {zeros("b2", 3)}>
{{
    [trunk] h = Gemm<transB = 1>(x, w1, b1)
    r = Relu(h)
    [head] l = Gemm<transB = 1, alpha = 2.0>(r, w2, b2)
    y = Softmax(l)
}}"""
MATMUL = f"""<ir_version: 8, opset_import: ["": 17]>
g (float[N, 4] x) => (float[N, 3] y)
<{zeros("w1", 4, 6)}, {zeros("w2", 6, 3)}, {zeros("b2", 3)}>
{{
    h = MatMul(x, w1)
    r = Relu(h)
    [head] l = MatMul(r, w2)
    y = Add(b2, l)
}}"""
BARE = f"""<ir_version: 8, opset_import: ["": 17]>
g (float[N, T, 4] x) => (float[N, T, 3] y)
<{zeros("w1", 4, 6)}, {zeros("w2", 6, 3)}>
{{
    h = MatMul(x, w1)
    r = Tanh(h)
    [head] y = MatMul(r, w2)
}}"""
CONV = f"""<ir_version: 8, opset_import: ["": 17]>
g (float[N, 2, 5, 5] x) => (float[N, 3] y)
<{zeros("w1", 6, 2, 3, 3)}, {zeros("w2", 3, 6, 1, 1)}, {zeros("b2", 3)}, int64[2] to = {{-1, 3}}>
{{
    h = Conv(x, w1)
    r = Relu(h)
    [head] l = Conv(r, w2, b2)
    p = GlobalAveragePool(l)
    y = Reshape(p, to)
}}"""
TEXTS = {"gemm": GEMM, "matmul": MATMUL, "bare": BARE, "conv": CONV}
SHAPES = {"gemm": (90, 4), "matmul": (90, 4), "bare": (30, 7, 4), "conv": (90, 2, 5, 5)}
KINDS = pytest.mark.parametrize("kind", list(TEXTS))


def model_of(text: str) -> ir.Model:
    """The model with weights drawn at random."""
    model = ir.from_proto(onnx.parser.parse_model(text))
    rng = np.random.default_rng(0)
    for value in model.graph.initializers.values():
        tensor = value.const_value
        assert tensor is not None
        if tensor.dtype is ir.DataType.FLOAT:
            array = rng.normal(size=tensor.shape.numpy()).astype(np.float32)
            value.const_value = ir.Tensor(array, name=value.name)
    return model


def run(model: ir.Model, x: Array) -> Array:
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    (found,) = Session(model, optimization="none").run({"x": x}).values()
    return found.copy()


def samples(kind: str) -> Array:
    return np.random.default_rng(3).normal(size=SHAPES[kind]).astype(np.float32)


def dims(model: ir.Model) -> list[object]:
    shape = model.graph.outputs[0].shape
    assert shape is not None
    return [size if isinstance(size, int) else size.value for size in shape]


@KINDS
def test_the_head_is_found_and_so_are_its_weights(kind: str) -> None:
    model = model_of(TEXTS[kind])
    assert find_head(model).node.name == find_head(model, at="head").node.name == "head"
    assert head_of(model) == (["w2"] if kind == "bare" else ["w2", "b2"])
    assert trunk_of(model) == (["w1", "b1"] if kind == "gemm" else ["w1"])


@KINDS
@pytest.mark.parametrize("outputs", [1, 5])
def test_another_head_gives_other_numbers_of_the_same_features(kind: str, outputs: int) -> None:
    model, x = model_of(TEXTS[kind]), samples(kind)
    before = run(model, x)
    changed = replace_head(model, outputs, seed=7, logits=True)
    assert dims(changed)[-1] == outputs
    assert dims(changed)[:-1] == dims(model)[:-1]
    read = run(features(model), x)
    node = find_head(changed).node
    weight = node.inputs[1]
    assert weight is not None
    assert weight.const_value is not None
    array = weight.const_value.numpy().astype(np.float64)
    if kind == "conv":
        expected = read.mean((2, 3)) @ array[:, :, 0, 0].T
    else:
        expected = read @ (array.T if kind == "gemm" else array)
    np.testing.assert_allclose(run(changed, x), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(run(model, x), before)  # what came in is as it was


def test_a_softmax_stays_unless_logits_are_asked_for() -> None:
    model, x = model_of(GEMM), samples("gemm")
    shares = run(replace_head(model, 5), x)
    np.testing.assert_allclose(shares.sum(1), 1, rtol=1e-5)
    logits = run(replace_head(model, 5, logits=True), x)
    exp = np.exp(logits - logits.max(1, keepdims=True))
    np.testing.assert_allclose(shares, exp / exp.sum(1, keepdims=True), rtol=1e-4)


def test_fresh_weights_are_of_he_s_variance_or_zero_and_repeat() -> None:
    wide = f"""<ir_version: 8, opset_import: ["": 17]>
    g (float[N, 256] x) => (float[N, 2] y) <{zeros("w", 256, 2)}> {{ y = MatMul(x, w) }}"""
    first, again = (
        replace_head(model_of(wide), 300, seed=s).graph.initializers["w"].const_value
        for s in (4, 4)
    )
    assert first is not None
    assert again is not None
    np.testing.assert_array_equal(first.numpy(), again.numpy())
    assert first.numpy().std() == pytest.approx(math.sqrt(2 / 256), rel=0.02)
    assert not run(replace_head(model_of(GEMM), 4, init="zero", logits=True), samples("gemm")).any()


@KINDS
def test_a_head_that_is_set_computes_what_it_was_set_to(kind: str) -> None:
    model, x = model_of(TEXTS[kind]), samples(kind)
    rng = np.random.default_rng(2)
    weight, bias = rng.normal(size=(6, 3)), rng.normal(size=3)
    changed = set_head(model, weight, bias)
    read = run(features(model), x)
    expected = (read.mean((2, 3)) if kind == "conv" else read) @ weight + bias
    if kind == "gemm":
        expected = np.exp(expected) / np.exp(expected).sum(-1, keepdims=True)
    np.testing.assert_allclose(run(changed, x), expected, rtol=1e-4, atol=1e-5)
    assert dims(changed) == dims(model)
    assert changed.graph.outputs[0].name == "y"


def test_a_weight_that_others_read_stays_theirs() -> None:
    tied = f"""<ir_version: 8, opset_import: ["": 17]>
    g (float[N, 4] x) => (float[N, 4] y) <{zeros("w", 4, 4)}> {{
        h = MatMul(x, w)
        [head] y = MatMul(h, w)
    }}"""
    model = model_of(tied)
    changed = replace_head(model, 3)
    x = np.eye(4, dtype=np.float32)
    np.testing.assert_array_equal(run(features(changed, at="head"), x), run(features(model), x))
    assert run(changed, x).shape == (4, 3)


def test_the_model_s_first_layer_may_be_its_head() -> None:
    text = f"""<ir_version: 8, opset_import: ["": 17]>
    g (float[N, 4] x) => (float[N, 2] y) <{zeros("w", 4, 2)}> {{ y = MatMul(x, w) }}"""
    model = model_of(text)
    x = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
    assert trunk_of(model) == []
    fitted = fit_head(model, {"x": x}, (x[:, 0] > 0.2).astype(np.int64))
    assert (run(fitted.model, x).argmax(1) == (x[:, 0] > 0.2)).mean() > 0.85


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ("h = MatMul(x, w)\n y = Exp(h)", "Exp '' stands between"),
        ("y = Relu(x)", "nothing before the output 'y' is linear"),
        ("y = Constant<value = float[1] {1.0}>()", "Constant '' stands between"),
        ("y = MatMul(x, x)", "two values computed at run time"),
        ("h = MatMul(x, w)\n y = GlobalAveragePool(h)", "averages its classes"),
        ("h = MatMul(w, x)\n y = Relu(h)", "no matrix on the right-hand side"),
        ("h = MatMul(x, w)\n s = Shape(x)\n y = Reshape(h, s)", "is computed"),
    ],
)
def test_what_is_no_head_is_told(body: str, sentence: str) -> None:
    text = f"""<ir_version: 8, opset_import: ["": 17]>
    g (float[4, 4] x) => (float[4, 4] y) <{zeros("w", 4, 4)}> {{ {body} }}"""
    with pytest.raises(InputError, match=sentence):
        replace_head(model_of(text), 3)


def test_names_that_are_not_there_are_told() -> None:
    model = model_of(GEMM)
    with pytest.raises(InputError, match="no node 'haed', did you mean 'head'"):
        replace_head(model, 3, at="haed")
    with pytest.raises(InputError, match="Gemm 'head' stands between"):
        replace_head(model, 3, at="trunk")
    with pytest.raises(InputError, match="no output 'z'"):
        replace_head(model, 3, output="z")
    with pytest.raises(InputError, match="at least one number"):
        replace_head(model, 0)


@pytest.mark.parametrize("ridge", [1e-6, 0.5])
def test_the_closed_form_is_ridge_regression(ridge: float) -> None:
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(50, 7)) * np.arange(1, 8) + 3, rng.normal(size=(50, 2))
    sums = Sums.of(x[:20], y[:20])
    sums += Sums.of(x[20:], y[20:])
    weight, bias, used, explained = sums.solve(ridge)
    xc, yc = x - x.mean(0), y - y.mean(0)
    gram = xc.T @ xc
    expected = np.linalg.solve(gram + ridge * np.trace(gram) / 7 * np.eye(7), xc.T @ yc)
    np.testing.assert_allclose(weight, expected, rtol=1e-8)
    np.testing.assert_allclose(bias, y.mean(0) - x.mean(0) @ expected, rtol=1e-8)
    left = ((y - x @ weight - bias) ** 2).sum()
    assert used == ridge
    assert explained == pytest.approx(1 - left / (yc**2).sum())


def test_the_ridge_is_chosen_near_what_new_samples_want() -> None:
    rng = np.random.default_rng(5)
    truth = rng.normal(size=(40, 3))
    x, new = rng.normal(size=(60, 40)), rng.normal(size=(4000, 40))
    y = x @ truth + rng.normal(size=(60, 3)) * 8
    sums = Sums.of(x, y)

    def error(ridge: float | None) -> float:
        weight, bias, _, _ = sums.solve(ridge)
        return float(((new @ (truth - weight) - bias) ** 2).mean())

    assert error(None) < 1.15 * min(error(10.0**k) for k in range(-8, 3))
    assert error(None) < 0.5 * error(1e-8)


@KINDS
def test_a_fit_recovers_what_the_features_tell(kind: str) -> None:
    model, x = model_of(TEXTS[kind]), samples(kind)
    rng = np.random.default_rng(9)
    read = run(features(model), x)
    flat = read.mean((2, 3)) if kind == "conv" else read.reshape(-1, 6)
    truth, bias = rng.normal(size=(6, 2)), rng.normal(size=2)
    fitted = fit_head(model, {"x": x}, flat @ truth + bias, ridge=1e-9)
    assert fitted.samples == len(flat)
    assert fitted.explained == pytest.approx(1, abs=1e-6)
    if kind != "gemm":  # which ends in a softmax
        found = run(fitted.model, x).reshape(-1, 2)
        np.testing.assert_allclose(found, flat @ truth + bias, rtol=1e-3, atol=1e-4)


def test_samples_without_a_label_do_not_count() -> None:
    model, x = model_of(MATMUL), samples("matmul")
    labels = np.arange(90) % 3
    hidden = labels.copy()
    hidden[60:] = -1
    part = fit_head(model, {"x": x[:60]}, labels[:60], outputs=3)
    whole = fit_head(model, {"x": x}, hidden, outputs=3)
    assert whole.samples == 60
    np.testing.assert_allclose(run(whole.model, x), run(part.model, x), rtol=1e-4, atol=1e-5)


def test_a_fit_that_cannot_be_is_refused() -> None:
    model, x = model_of(MATMUL), samples("matmul")
    with pytest.raises(InputError, match="no labels to fit"):
        fit_head(model, {"x": x})
    with pytest.raises(InputError, match="there are 80 labels but the trunk gives 90"):
        fit_head(model, {"x": x}, np.zeros(80, np.int64))
    with pytest.raises(InputError, match="labels name class 5 but a head of 3"):
        fit_head(model, {"x": x}, np.full(90, 5), outputs=3)
    with pytest.raises(InputError, match="ridge is 0"):
        fit_head(model, {"x": x}, np.zeros(90, np.int64), ridge=0)
    bent = CONV.replace("p = GlobalAveragePool(l)", "q = Relu(l)\n    p = GlobalAveragePool(q)")
    with pytest.raises(InputError, match="Relu '' stands between"):
        fit_head(model_of(bent), {"x": samples("conv")}, np.zeros(90, np.int64))
    assert replace_head(model_of(bent), 4).graph.outputs[0].shape == ("N", 4)


@pytest.mark.parametrize(("name", "least"), [("photo_digits", 0.88), ("segment_tabular", 0.96),
                                             ("name_language", 0.78)])  # fmt: skip
def test_a_fitted_head_of_five_classes_does_on_real_models_what_the_trained_one_did(
    name: str, least: float
) -> None:
    model = load(MODELS / name / "model.onnx")
    with np.load(MODELS / name / "evaluation.npz") as arrays:
        data = dict(arrays)
    five = data["labels"] < 5
    data = {key: array[five] for key, array in data.items()}
    half = len(data["labels"]) // 2
    fitted = fit_head(model, {key: array[:half] for key, array in data.items()})
    labels = data.pop("labels")[half:]
    feed = {key: array[half:] for key, array in data.items()}
    (found,) = Session(fitted.model).run(feed).values()
    assert found.shape == (len(labels), 5)
    assert (found.argmax(1) == labels).mean() >= least


def test_training_takes_a_trunk_as_patterns_to_leave_out() -> None:
    model = load(MODELS / "photo_digits" / "model.onnx")
    trunk = trunk_of(model)
    left = trainable_weights(model, ["*", *(f"!{name}" for name in trunk)])
    assert left == trainable_weights(model, head_of(model)) == ["fc.weight", "fc.bias"]
