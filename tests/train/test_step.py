"""The training step: its arithmetic, its memory, and what it leaves of the model."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxcompress.errors import InputError
from onnxcompress.session import Session
from onnxcompress.train import parameters
from onnxcompress.train.losses import Cosine, CrossEntropy, MeanSquared
from onnxcompress.train.optimizers import SGD, AdamW
from onnxcompress.train.parameters import Layout, aligned, as_aligned, trainable_weights
from onnxcompress.train.step import Step

D, H, C = 6, 9, 4
TEXT = f"""<ir_version: 10, opset_import: ["" : 17], producer_name: "somebody">
g (float[N,{D}] x) => (float[N,{C}] y, float[N,{H}] hidden) {{
  a = Gemm<transB=1>(x, w1, b1)
  hidden = Clip(a, low, high)
  y = Gemm<transB=1>(hidden, w2, b2)
}}"""
RNG = np.random.default_rng(0)
WEIGHTS = {
    "w1": RNG.standard_normal((H, D)).astype(np.float32),
    "b1": np.full(H, 0.1, np.float32),
    "w2": RNG.standard_normal((C, H)).astype(np.float32),
    "b2": np.zeros(C, np.float32),
    "low": np.array(0, np.float32),
    "high": np.array(1e3, np.float32),
}
X = RNG.standard_normal((32, D)).astype(np.float32)
FEED = {"x": X, "labels": X[:, :C].argmax(1).astype(np.int64)}


@pytest.fixture
def model():
    proto = onnx.parser.parse_model(TEXT)
    for name, array in WEIGHTS.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return ir.from_proto(proto)


def step(model, optimizer=None, losses=None, trainable=("w1", "b1", "w2", "b2"), **options):
    losses = losses or [CrossEntropy("y")]
    return Step(model, losses, optimizer or SGD(0.1), trainable=trainable, **options)


def stored(model, name):
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy()


def gradients(weights, feed):
    """Of the cross-entropy, in double precision."""
    w1, b1, w2, b2 = (weights[n].astype(float) for n in ("w1", "b1", "w2", "b2"))
    x, labels = feed["x"].astype(float), feed["labels"]
    a = x @ w1.T + b1
    h = np.maximum(a, 0)
    y = h @ w2.T + b2
    p = np.exp(y - y.max(1, keepdims=True))
    dy = (p / p.sum(1, keepdims=True) - np.eye(C)[labels]) / len(x)
    da = (dy @ w2) * (a > 0)
    return {"w1": da.T @ x, "b1": da.sum(0), "w2": dy.T @ h, "b2": dy.sum(0)}


def close(found, expected, tolerance=2e-6):
    assert found.keys() == expected.keys()
    for name, array in found.items():
        np.testing.assert_allclose(array, expected[name], rtol=tolerance, atol=tolerance)


def test_a_step_descends_along_the_gradient(model):
    trained = step(model, SGD(0.1, momentum=0.0))
    slopes = gradients(WEIGHTS, FEED)
    tally = trained.run(FEED)
    close(trained.weights(), {n: WEIGHTS[n] - 0.1 * g for n, g in slopes.items()})
    assert tally.samples == 32
    assert 0 <= tally.figures["accuracy"] <= 1
    trained.run(FEED, lr=0.0)
    close(trained.weights(), {n: WEIGHTS[n] - 0.1 * g for n, g in slopes.items()})


def test_decay_leaves_biases_alone(model):
    trained = step(model, AdamW(0.1, weight_decay=0.5), losses=[CrossEntropy("y", weight=0.0)])
    trained.run(FEED)
    expected = {n: WEIGHTS[n] * (0.95 if WEIGHTS[n].ndim > 1 else 1) for n in trained.weights()}
    close(trained.weights(), expected)


def test_clipping_is_by_the_norm_of_all_gradients(model):
    trained = step(model, SGD(1.0, momentum=0.0), clip_norm=0.01)
    slopes = gradients(WEIGHTS, FEED)
    norm = np.sqrt(sum((g**2).sum() for g in slopes.values()))
    assert norm > 0.01
    trained.run(FEED)
    close(trained.weights(), {n: WEIGHTS[n] - 0.01 / norm * g for n, g in slopes.items()})
    free, loose = (step(model, SGD(1.0), clip_norm=bound) for bound in (None, 1e6))
    for each in (free, loose):
        each.run(FEED)
    close(free.weights(), loose.weights(), 0)


@pytest.mark.parametrize("pieces", [2, 3, 32, 40])
def test_pieces_of_a_batch_give_the_update_of_the_whole(model, pieces):
    whole, cut = (step(model, AdamW(0.01), accumulate=n, clip_norm=0.1) for n in (1, pieces))
    for _ in range(5):
        tallies = whole.run(FEED), cut.run(FEED)
        assert tallies[0].figures == pytest.approx(tallies[1].figures, rel=1e-5)
    close(whole.weights(), cut.weights(), 1e-5)


def test_masked_weights_are_exactly_zero_and_stay_so(model):
    mask = RNG.integers(0, 2, (H, D))
    trained = step(model, AdamW(0.05), masks={"w1": mask}, accumulate=2, clip_norm=1.0)
    for _ in range(20):
        trained.run(FEED)
    found = trained.weights()["w1"]
    np.testing.assert_array_equal(found[mask == 0], 0.0)
    assert (found[mask == 1] != WEIGHTS["w1"][mask == 1]).all()


def test_masked_gradients_do_not_count_in_the_norm(model):
    nothing = {name: np.zeros_like(WEIGHTS[name]) for name in ("w1", "b1", "w2")}
    masked = step(model, SGD(1.0, momentum=0.0), masks=nothing, clip_norm=1e-3)
    masked.run(FEED)
    assert np.linalg.norm(masked.weights()["b2"]) == pytest.approx(1e-3, rel=1e-5)


def test_frozen_weights_stay(model):
    trained = step(model, trainable=["w2"])
    trained.run(FEED)
    found = {name: stored(trained.result(), name) for name in WEIGHTS}
    assert (found["w2"] != WEIGHTS["w2"]).any()
    for name in WEIGHTS.keys() - {"w2"}:
        np.testing.assert_array_equal(found[name], WEIGHTS[name])


def test_the_result_is_the_model_with_other_weights(model):
    before = ir.to_proto(model)
    trained = step(model)
    trained.run(FEED)
    assert ir.to_proto(model).SerializeToString() == before.SerializeToString()
    after = ir.to_proto(trained.result())
    for proto in (before, after):
        del proto.graph.initializer[:]
    assert after.SerializeToString() == before.SerializeToString()
    result = Session(trained.result()).run({"x": X})["y"]
    hits = (result.argmax(1) == FEED["labels"]).mean()
    assert trained.evaluate(FEED).figures["accuracy"] == pytest.approx(hits)


def test_a_result_does_not_change_with_later_steps(model):
    trained = step(model)
    kept = stored(trained.result(), "w1")
    before = kept.copy()
    trained.run(FEED)
    np.testing.assert_array_equal(kept, before)


@pytest.mark.parametrize("optimizer", [SGD(0.1, nesterov=True), AdamW(0.01)])
def test_going_back_to_a_state_gives_the_same_bits_again(model, optimizer):
    trained = step(model, optimizer, clip_norm=1.0)
    for _ in range(3):
        trained.run(FEED)
    state = trained.state()
    runs = []
    for again in (trained, step(model, optimizer, clip_norm=1.0)):
        again.restore(state)
        assert again.steps == 3
        for _ in range(5):
            again.run({name: array[:17] for name, array in FEED.items()})
        runs.append(again.state())
    for name, array in runs[0].items():
        np.testing.assert_array_equal(array, runs[1][name])


def test_bits_do_not_depend_on_where_a_batch_begins(model):
    found = []
    for shift in range(4):
        buffer = np.zeros(X.size + shift, np.float32)
        x = buffer[shift:].reshape(X.shape)
        x[...] = X
        trained = step(model)
        trained.run({**FEED, "x": x})
        found.append(trained.state()["weight"])
    assert all((other == found[0]).all() for other in found)


def test_evaluating_changes_nothing(model):
    trained = step(model)
    before = trained.state()
    trained.evaluate(FEED)
    close(trained.state(), before, 0)


def test_a_loss_that_is_not_finite_stops_before_the_update(model):
    trained = step(model)
    before = trained.state()
    with pytest.raises(InputError, match=r"step 1: the loss is nan; lower the learning rate"):
        trained.run({**FEED, "x": np.full_like(X, np.nan)})
    close(trained.state(), before, 0)


def test_a_gradient_that_is_not_finite_stops_too(model):
    model.graph.initializers["b2"].const_value = ir.tensor(np.full(C, 3e38, np.float32), name="b2")
    clipped, free = (step(model, losses=[Cosine("y", "t")], clip_norm=c) for c in (1.0, None))
    feed = {"x": X, "t": np.ones((32, C), np.float32)}
    before = clipped.state()
    with pytest.raises(InputError, match=r"step 1: the (loss|gradient's norm) is (nan|inf)"):
        clipped.run(feed)
    close(clipped.state(), before, 0)
    free.weights()["w1"][0, 0] = np.inf
    with pytest.raises(InputError, match="training made 'w1' NaN or infinite; lower"):
        free.result()


def test_a_state_of_something_else_is_refused(model):
    state = step(model, SGD(0.1)).state()
    with pytest.raises(InputError, match="not a state of"):
        step(model, AdamW(0.1)).restore(state)
    with pytest.raises(InputError, match="not a state of"):
        step(model, SGD(0.1), trainable=["w1"]).restore(state)


def test_data_of_another_type_is_converted(model):
    one, other = step(model), step(model)
    one.run(FEED)
    other.run({"x": X.astype(np.float64), "labels": FEED["labels"].astype(np.int32)})
    close(one.weights(), other.weights(), 0)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"trainable": []}, "nothing to train"),
        ({"trainable": ["w3"]}, "'w3' is no float32 initializer"),
        ({"trainable": ["w1"], "losses": [MeanSquared("x")]}, "'w1' has no effect on the loss"),
        ({"clip_norm": 0}, "clip_norm is 0"),
        ({"accumulate": 0}, "accumulate is 0"),
        ({"masks": {"low": np.ones(())}}, "mask of 'low', which is not trained"),
        ({"masks": {"w1": np.ones(3)}}, r"'w1' has shape \[3\]"),
    ],
)
def test_settings_that_do_not_suit_the_model_are_refused(model, options, sentence):
    with pytest.raises(InputError, match=sentence):
        step(model, **options)


@pytest.mark.parametrize(
    ("feed", "sentence"),
    [
        ({"x": X}, "no array 'labels'"),
        ({"x": X, "labels": FEED["labels"][1:]}, "equally many samples"),
        ({"x": X[:, 1:], "labels": FEED["labels"]}, "cannot run"),
    ],
)
def test_batches_that_do_not_suit_the_model_are_refused(model, feed, sentence):
    with pytest.raises(InputError, match=sentence):
        step(model).run(feed)


def test_patterns_find_weights_and_names_find_anything(model):
    assert trainable_weights(model, ["*"]) == ["w1", "b1", "w2", "b2"]
    assert trainable_weights(model, ["w*", "high"]) == ["w1", "w2", "high"]
    assert trainable_weights(model, ["*", "!?1"]) == ["w2", "b2"]
    with pytest.raises(InputError, match="'v1' names no float32 weight"):
        trainable_weights(model, ["v1"])


def test_weights_lie_on_boundaries_in_chunks_of_one_kind():
    layout = Layout({"b": [3], "w": [1000, 100], "s": [1, 5, 1], "v": [2, 2], "n": []})
    flat = aligned([layout.size])
    views = layout.views(flat)
    assert all(view.ctypes.data % 64 == 0 and view.base is not None for view in views.values())
    for number, view in enumerate(views.values(), 1):
        assert (view == 0).all()  # they do not overlap
        view[...] = number
    assert [c.start for c in layout.chunks[1:]] == [c.stop for c in layout.chunks[:-1]]
    decaying = sum(c.stop - c.start for c in layout.chunks if c.decay)
    assert decaying == 1000 * 100 + 16
    assert layout.chunks[-1].stop == layout.size


def test_stretches_on_several_cores_give_the_bits_of_one(model, monkeypatch):
    found = []
    for size in (1 << 16, 16):
        monkeypatch.setattr(parameters, "_CHUNK", size)
        trained = step(model, AdamW(0.01), clip_norm=1e6)
        for _ in range(3):
            trained.run(FEED)
        found.append(trained.weights())
    close(found[0], found[1], 0)


def test_an_array_that_fits_is_not_copied():
    array = aligned([4, 5])
    assert as_aligned(array, np.float32) is array
    for other in (array.T, array[:, 1:], array.astype(np.float64)):
        copy = as_aligned(other, np.float32)
        assert copy.ctypes.data % 64 == 0 and copy.flags.c_contiguous
        np.testing.assert_array_equal(copy, other)
