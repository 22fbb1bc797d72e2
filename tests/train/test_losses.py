"""Losses: values and gradients against formulas in double precision."""

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxcompress.errors import InputError
from onnxcompress.session import Session
from onnxcompress.train.losses import (
    Cosine,
    CrossEntropy,
    FeatureMatch,
    KullbackLeibler,
    MeanSquared,
)
from onnxcompress.train.objective import objective, with_gradients

RNG = np.random.default_rng(0)
N, C = 7, 5
MODEL = f"""<ir_version: 10, opset_import: ["" : 20]>
g (float[N,{C}] x) => (float[N,{C}] y) <float[{C}] b = {{0.1, -0.2, 0.3, 0, 1}}> {{
  y = Add(x, b)
}}"""
X = RNG.standard_normal((N, C)).astype(np.float32)
TARGET = 3 * RNG.standard_normal((N, C)).astype(np.float32)
LABELS = RNG.integers(0, C, N)
BIAS = np.array([0.1, -0.2, 0.3, 0, 1], np.float32)


def model(text=MODEL):
    return ir.from_proto(onnx.parser.parse_model(text))


def emitted(*losses, bias: Any = BIAS, x: Any = X, text: str = MODEL, **targets: Any):
    """The loss, its terms and hits, and the gradient of the bias."""
    found = objective(model(text), losses, ["b"])
    graph, gradients = with_gradients(found, ["b"])
    session = Session(graph, outputs=[*found.scalars, gradients["b"]], training=True)
    values = session.run({"x": x, "b": bias, **targets})
    return {name: values[name] for name in found.scalars}, values[gradients["b"]], found


def log_softmax(x):
    x = x.astype(float)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def cross_entropy(y, labels=LABELS, smoothing=0.0):
    log = log_softmax(y)
    hot = np.eye(C)[labels] * (1 - smoothing) + smoothing / C
    return np.mean(-(hot * log).sum(-1) * (labels >= 0))


def divergence(y, target=TARGET, temperature=4.0):
    p, q = log_softmax(target / temperature), log_softmax(y / temperature)
    return temperature**2 * np.mean((np.exp(p) * (p - q)).sum(-1))


def features(y, target=TARGET):
    return np.mean(((y - target) ** 2).sum(1) / (target.astype(float) ** 2).sum(1))


def cosine(y, target=TARGET):
    norms = np.linalg.norm(y, axis=1) * np.linalg.norm(target, axis=1)
    return np.mean(1 - (y * target).sum(1) / norms)


CASES = [
    (CrossEntropy("y"), cross_entropy),
    (CrossEntropy("y", smoothing=0.2), lambda y: cross_entropy(y, smoothing=0.2)),
    (MeanSquared("y"), lambda y: np.mean((y - TARGET) ** 2)),
    (KullbackLeibler("y"), divergence),
    (KullbackLeibler("y", temperature=1.0), lambda y: divergence(y, temperature=1.0)),
    (FeatureMatch([("y", "target")]), features),
    (FeatureMatch([("y", "target"), ("y", "target")]), lambda y: 2 * features(y)),
    (Cosine("y"), cosine),
]


@pytest.mark.parametrize(("loss", "formula"), CASES, ids=lambda case: type(case).__name__)
def test_a_loss_and_its_gradient_follow_the_formula(loss, formula):
    own: Any = {"labels": LABELS} if isinstance(loss, CrossEntropy) else {"target": TARGET}
    values, gradient, found = emitted(loss, **own)
    assert values[found.loss] == pytest.approx(formula(X.astype(float) + BIAS), rel=1e-5)
    for index, slope in enumerate(gradient):
        step = np.eye(C)[index] * 1e-5
        above, below = (formula(X.astype(float) + BIAS + s) for s in (step, -step))
        assert slope == pytest.approx((above - below) / 2e-5, rel=1e-4, abs=1e-6)


def test_a_mixture_is_the_weighted_sum_and_each_is_told_by_name():
    losses = (CrossEntropy("y", weight=0.3), KullbackLeibler("y", weight=0.7), MeanSquared("y"))
    values, _, found = emitted(*losses, labels=LABELS, target=TARGET)
    y = X.astype(float) + BIAS
    terms = {name: float(values[value]) for name, value in found.terms.items()}
    assert terms == pytest.approx(
        {
            "CrossEntropy": cross_entropy(y),
            "KullbackLeibler": divergence(y),
            "MeanSquared": np.mean((y - TARGET) ** 2),
        },
        rel=1e-5,
    )
    expected = 0.3 * terms["CrossEntropy"] + 0.7 * terms["KullbackLeibler"] + terms["MeanSquared"]
    assert values[found.loss] == pytest.approx(expected, rel=1e-5)


def test_samples_without_a_label_add_nothing_and_are_not_counted():
    labels = np.where(np.arange(N) % 2, LABELS, -1)
    values, gradient, found = emitted(CrossEntropy("y"), labels=labels)
    y = X.astype(float) + BIAS
    assert values[found.loss] == pytest.approx(cross_entropy(y, labels), rel=1e-5)
    ((hits, count),) = found.hits
    assert values[count] == (labels >= 0).sum()
    assert values[hits] == (y.argmax(1) == labels).sum()
    _, alone, _ = emitted(CrossEntropy("y"), x=X[labels >= 0], labels=labels[labels >= 0])
    np.testing.assert_allclose(gradient, alone * (labels >= 0).sum() / N, rtol=1e-4, atol=1e-7)


def test_labels_may_be_probabilities():
    labels = np.where(np.arange(N) % 2, LABELS, -1)
    hot = np.eye(C, dtype=np.float32)[labels] * (labels >= 0)[:, None]
    loss = CrossEntropy("y", smoothing=0.1)
    expected, slope, numbers = emitted(loss, labels=labels)
    values, gradient, found = emitted(replace(loss, soft=True), labels=hot)
    for name, other in zip(found.scalars, numbers.scalars, strict=True):
        assert values[name] == pytest.approx(float(expected[other]), rel=1e-6)
    np.testing.assert_allclose(gradient, slope, rtol=1e-5, atol=1e-7)
    mixed = (0.7 * np.eye(C)[LABELS] + 0.3 / C).astype(np.float32)
    values, _, found = emitted(CrossEntropy("y", soft=True), labels=mixed)
    y = X.astype(float) + BIAS
    assert values[found.loss] == pytest.approx(cross_entropy(y, smoothing=0.3), rel=1e-5)


def test_labels_of_a_sequence_have_one_for_each_place():
    text = MODEL.replace(f"[N,{C}]", f"[N,T,{C}]")
    x = RNG.standard_normal((N, 3, C)).astype(np.float32)
    labels = RNG.integers(0, C, (N, 3))
    values, _, found = emitted(CrossEntropy("y"), text=text, x=x, labels=labels)
    assert values[found.loss] == pytest.approx(
        cross_entropy((x + BIAS).reshape(-1, C), labels.reshape(-1)), rel=1e-5
    )


def test_large_logits_do_not_overflow():
    values, gradient, found = emitted(
        CrossEntropy("y"), KullbackLeibler("y", temperature=1), x=1e4 * X, labels=LABELS,
        target=1e4 * TARGET,
    )  # fmt: skip
    assert np.isfinite(values[found.loss])
    assert np.isfinite(gradient).all()


def test_a_target_of_zeros_and_an_output_of_zeros_give_finite_gradients():
    zero = np.zeros_like(TARGET)
    _, gradient, _ = emitted(
        Cosine("y"), FeatureMatch([("y", "target")], weight=1e-20), x=zero, bias=0 * BIAS,
        target=zero,
    )  # fmt: skip
    assert np.isfinite(gradient).all()


def test_a_target_may_be_an_input_of_the_student():
    values, _, found = emitted(MeanSquared("y", target="x"))
    assert values[found.loss] == pytest.approx(float(np.mean(BIAS.astype(float) ** 2)), rel=1e-5)
    assert not found.targets


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: objective(model(), [], ["b"]), "at least one loss"),
        (lambda: objective(model(), [CrossEntropy("z")], ["b"]), "reads 'z', no value of the mod"),
        (lambda: objective(model(), [MeanSquared("y", "y")], ["b"]), "'y' names both"),
        (lambda: objective(model(), [MeanSquared("y", "t"), CrossEntropy("y", "t")], ["b"]),
         "takes 't' as INT64"),
        (lambda: CrossEntropy("y", smoothing=1.0), "smoothing is 1.0"),
        (lambda: KullbackLeibler("y", temperature=0), "temperature is 0"),
        (lambda: FeatureMatch([]), "at least one pair"),
    ],
)  # fmt: skip
def test_losses_that_do_not_suit_are_refused(make, sentence):
    with pytest.raises(InputError, match=sentence):
        make()
