"""Optimizers: their operators against the papers' formulas in double precision."""

import numpy as np
import pytest

from onnxcompress.errors import InputError
from onnxcompress.session import Session
from onnxcompress.train.objective import squares, update
from onnxcompress.train.optimizers import SGD, AdamW

RNG = np.random.default_rng(0)
STEPS, SIZE = 12, 1000
GRADIENTS = RNG.standard_normal((STEPS, SIZE)).astype(np.float32)
RATES = np.linspace(0.05, 0.01, STEPS)
WEIGHT = RNG.standard_normal(SIZE).astype(np.float32)


def run(optimizer, decay, clip=1.0):
    """The weight after each step, and the states at the end, as the operators compute them."""
    graph = update(optimizer, clipped=clip != 1.0)
    session = Session(graph.model)
    values = {"weight": WEIGHT, **{n: np.zeros(SIZE, np.float32) for n in optimizer.states}}
    path = []
    for step, (gradient, lr) in enumerate(zip(GRADIENTS, RATES, strict=True), 1):
        numbers = optimizer.coefficients(lr, step, decay) | {"clip": clip}
        scalars = {k: np.array(numbers[k], np.float32) for k in numbers if k in graph.inputs}
        found = session.run({"gradient": gradient, **values, **scalars})
        values = {name: found[output].copy() for name, output in graph.outputs.items()}
        path.append(values["weight"])
    return np.stack(path), values


def sgd(momentum, nesterov, decay):
    weight, velocity, path = WEIGHT.astype(float), np.zeros(SIZE), []
    for gradient, lr in zip(GRADIENTS.astype(float), RATES, strict=True):
        gradient = gradient + decay * weight
        velocity = momentum * velocity + gradient
        weight = weight - lr * (gradient + momentum * velocity if nesterov else velocity)
        path.append(weight)
    return np.stack(path)


def adamw(betas, eps, decay):
    b1, b2 = betas
    weight, path = WEIGHT.astype(float), []
    mean = variance = np.zeros(SIZE)
    for step, (gradient, lr) in enumerate(zip(GRADIENTS.astype(float), RATES, strict=True), 1):
        weight = weight * (1 - lr * decay)
        mean, variance = b1 * mean + (1 - b1) * gradient, b2 * variance + (1 - b2) * gradient**2
        corrected = np.sqrt(variance / (1 - b2**step)) + eps
        weight = weight - lr * (mean / (1 - b1**step)) / corrected
        path.append(weight)
    return np.stack(path)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_sgd_follows_its_formula(momentum, nesterov, decay):
    nesterov = nesterov and momentum > 0
    optimizer = SGD(momentum=momentum, nesterov=nesterov, weight_decay=decay)
    path, values = run(optimizer, decay=True)
    np.testing.assert_allclose(path, sgd(momentum, nesterov, decay), rtol=1e-6, atol=1e-6)
    assert set(values) - {"weight"} == ({"momentum"} if momentum else set())


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.9), (0.0, 0.0)])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_follows_its_formula_from_the_first_step_on(betas, decay):
    path, _ = run(AdamW(betas=betas, weight_decay=decay), decay=True)
    np.testing.assert_allclose(path, adamw(betas, 1e-8, decay), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("optimizer", [SGD(weight_decay=0.1), AdamW(weight_decay=0.1)])
def test_what_is_exempt_does_not_decay(optimizer):
    path, _ = run(optimizer, decay=False)
    expected = sgd(0.9, False, 0) if isinstance(optimizer, SGD) else adamw((0.9, 0.999), 1e-8, 0)
    np.testing.assert_allclose(path, expected, rtol=1e-6, atol=1e-6)


def test_clipping_multiplies_the_gradient_alone():
    path, _ = run(SGD(momentum=0.0), decay=False, clip=0.25)
    np.testing.assert_allclose(path, WEIGHT - 0.25 * np.cumsum(RATES[:, None] * GRADIENTS, 0),
                               rtol=1e-5, atol=1e-5)  # fmt: skip


def test_squares_add_up():
    found = Session(squares()).run({"gradient": WEIGHT})["squares"]
    assert found == pytest.approx(float(np.sum(WEIGHT.astype(float) ** 2)), rel=1e-6)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: SGD(lr=0), "SGD: lr is 0"),
        (lambda: SGD(momentum=1.0), "SGD: momentum is 1.0"),
        (lambda: SGD(weight_decay=-1), "SGD: weight_decay is -1"),
        (lambda: SGD(momentum=0.0, nesterov=True), "nesterov needs a momentum"),
        (lambda: AdamW(lr=float("nan")), "AdamW: lr is nan"),
        (lambda: AdamW(betas=(0.9, 1.0)), "AdamW: betas"),
        (lambda: AdamW(eps=0), "AdamW: eps is 0"),
        (lambda: AdamW(weight_decay=-1), "AdamW: weight_decay is -1"),
    ],
)
def test_settings_that_cannot_work_are_refused(make, sentence):
    with pytest.raises(InputError, match=sentence):
        make()
