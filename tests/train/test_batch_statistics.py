"""Batch normalization by the batch's own statistics, and those that follow them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxcompress.errors import InputError
from onnxcompress.session import Session
from onnxcompress.train.batch_statistics import are_fresh, follow, kept_statistics
from onnxcompress.train.distill import distill
from onnxcompress.train.exact import to_train
from onnxcompress.train.loop import Trained, train
from onnxcompress.train.losses import CrossEntropy
from onnxcompress.train.optimizers import SGD
from onnxcompress.train.step import Step
from onnxcompress.train.students import derive
from tests.train.gradcheck import check_model

RANDOM = np.random.default_rng(0)
_KINDS: dict[Any, dict[str, Any]] = {
    np.float64: {"step": 1e-5, "tolerance": 1e-6},
    np.float32: {"step": 1e-2, "tolerance": 2e-3},
}


def normalization(rank: int, dtype: Any, momentum: float) -> ir.Model:
    kind = "double" if dtype is np.float64 else "float"
    dims = ",".join(["N", "3", "H", "W", "D"][:rank])
    channels = " ".join(f"{kind}[3] {name}," for name in ("s", "b", "m"))
    return ir.from_proto(
        onnx.parser.parse_model(f"""<ir_version: 10, opset_import: ["" : 18]>
    g ({kind}[{dims}] x, {channels} {kind}[3] v) => ({kind}[{dims}] y) {{
      y, batch_mean, batch_variance =
        BatchNormalization<training_mode=1, momentum={momentum}, epsilon=1e-4>(x, s, b, m, v)
    }}""")
    )


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("dtype", _KINDS)
@pytest.mark.parametrize(("samples", "sizes"), [(4, ()), (2, (5,)), (2, (3, 4)), (3, (2, 2, 3))])
def test_the_gradient_passes_through_the_statistics(samples, sizes, dtype, momentum):
    model = normalization(2 + len(sizes), dtype, momentum)
    feed = {"x": RANDOM.standard_normal((samples, 3, *sizes)).astype(dtype)}
    feed |= {name: RANDOM.standard_normal(3).astype(dtype) for name in "sbm"}
    feed["v"] = np.ones(3, dtype)
    check_model(model, feed, ("x", "s", "b"), **_KINDS[dtype])


def network(batch: object = "N", *, fresh: bool = True) -> ir.Model:
    """Two layers with a normalization between, whose input is far from 0 and 1."""
    proto = onnx.parser.parse_model(f"""<ir_version: 10, opset_import: ["" : 17]>
    g (float[{batch},6] x) => (float[{batch},4] y) {{
      a = Gemm<transB=1>(x, w1, b1)
      n = BatchNormalization<momentum=0.8>(a, scale, shift, mean, variance)
      h = Relu(n)
      y = Gemm<transB=1>(h, w2, b2)
    }}""")
    draw = np.random.default_rng(0).standard_normal
    arrays = {"w1": draw((8, 6)), "b1": 5 + draw(8), "w2": draw((4, 8)), "b2": draw(4)}
    arrays |= {"scale": np.ones(8), "shift": np.zeros(8)}
    arrays |= {"mean": np.zeros(8), "variance": np.ones(8) if fresh else np.full(8, 2.0)}
    for name, array in arrays.items():
        tensor = onnx.numpy_helper.from_array(array.astype(np.float32), name)
        proto.graph.initializer.append(tensor)
    return ir.from_proto(proto)


def draw(count: int, seed: int = 1) -> dict[str, np.ndarray]:
    x = 3 * np.random.default_rng(seed).standard_normal((count, 6)).astype(np.float32) + 1
    return {"x": x, "labels": x[:, :4].argmax(1)}


TRAINED = ["w1", "b1", "scale", "shift", "w2", "b2"]


def step(model: ir.Model | None = None, *, by_batch: bool = True, **options: Any) -> Step:
    options = {"trainable": TRAINED, "batch_statistics": by_batch, **options}
    return Step(model or network(), [CrossEntropy("y")], SGD(0.01), **options)


def before(x: np.ndarray) -> np.ndarray:
    """What is normalized, by the weights that the network begins with."""
    return Session(network(), outputs=["a"]).run({"x": x})["a"]


def test_what_is_kept_is_found():
    assert kept_statistics(network()) == pytest.approx({"mean": 0.8, "variance": 0.8})
    assert are_fresh(network()) and not are_fresh(network(fresh=False))
    shared = network()
    shared.graph.node(1).replace_input_with(4, shared.graph.node(1).inputs[3])
    assert not kept_statistics(shared)


def test_statistics_follow_the_batches_and_are_evaluated_with():
    trained, batch = step(), draw(10)
    assert trained.evaluate(batch).loss == pytest.approx(step(by_batch=False).evaluate(batch).loss)
    trained.run(batch, lr=0.0)
    found, a = trained.weights(), before(batch["x"])
    np.testing.assert_allclose(found["mean"], a.mean(0), rtol=1e-5)
    np.testing.assert_allclose(found["variance"], a.var(0, ddof=1), rtol=1e-5)
    other = before((second := draw(10, 2))["x"])
    trained.run(second, lr=0.0)
    np.testing.assert_allclose(found["mean"], (a.mean(0) + other.mean(0)) / 2, rtol=1e-5)
    result = trained.result()
    assert (
        trained.evaluate(batch).figures["accuracy"]
        == (Session(result).run({"x": batch["x"]})["y"].argmax(1) == batch["labels"]).mean()
    )


def test_a_loss_is_that_of_a_normalized_batch():
    batch = draw(10)
    a = before(batch["x"]).astype(np.float64)
    weights = {n: v.const_value.numpy() for n, v in network().graph.initializers.items()
               if v.const_value is not None}  # fmt: skip
    h = np.maximum((a - a.mean(0)) / np.sqrt(a.var(0) + 1e-5), 0)
    y = h @ weights["w2"].T + weights["b2"]
    expected = np.log(np.exp(y).sum(1)) - y[np.arange(10), batch["labels"]]
    assert step().run(batch).loss == pytest.approx(expected.mean(), rel=1e-5)


def test_each_piece_has_its_own():
    batch = draw(8)
    trained = step(accumulate=2)
    trained.run(batch, lr=0.0)
    a = before(batch["x"]).reshape(2, 4, 8)
    np.testing.assert_allclose(trained.weights()["mean"], a.mean((0, 1)), rtol=1e-5)
    np.testing.assert_allclose(trained.weights()["variance"], a.var(1, ddof=1).mean(0), rtol=1e-5)
    with pytest.raises(InputError, match="two samples or more"):
        step(accumulate=4).run(draw(6))


def test_following_slows_down_to_the_momentum():
    kept = np.zeros(1, np.float32)
    for number in range(1, 6):
        follow(kept, np.array([number], np.float32), 0.75, number)
    assert kept[0] == pytest.approx(0.75 * 2.5 + 0.25 * 5)
    assert kept.dtype == np.float32


def test_clipping_and_decay_leave_statistics_alone():
    batch = draw(10)
    trained = step(clip_norm=1e-3)
    trained.run(batch)
    np.testing.assert_allclose(trained.weights()["mean"], before(batch["x"]).mean(0), rtol=1e-5)
    before_ = {n: v.const_value.numpy() for n, v in network().graph.initializers.items()
               if v.const_value is not None}  # fmt: skip
    moved = [np.square(trained.weights()[n] - before_[n]).sum() for n in TRAINED]
    assert 0 < np.sqrt(sum(moved)) < 1.001e-5


def test_going_back_to_a_state_gives_the_same_bits():
    one, two = step(), step()
    for seed in range(3):
        one.run(draw(10, seed))
    two.restore(one.state())
    for trained in (one, two):
        trained.run(draw(10, 5))
    for name, array in one.weights().items():
        np.testing.assert_array_equal(array, two.weights()[name])


def fit(model: ir.Model | None = None, count: int = 42, **options: Any) -> Trained:
    settings = {"losses": [CrossEntropy("y")], "epochs": 3, "batch_size": 10, **options}
    return train(model or network(), draw(count), **settings)


def kept(trained: Trained) -> np.ndarray:
    value = trained.model.graph.initializers["mean"].const_value
    assert value is not None
    return value.numpy()


def test_only_what_was_never_trained_is_trained_so_by_itself():
    assert kept(fit()).any()
    assert not kept(fit(network(fresh=False))).any()
    assert not kept(fit(batch_statistics=False)).any()
    assert kept(fit(network(fresh=False), batch_statistics=True)).any()


def test_it_learns_at_a_rate_at_which_it_otherwise_does_not():
    held = draw(400, 9)

    def score(**options: Any) -> float:
        trained = fit(count=400, epochs=2, optimizer=SGD(0.05), **options)
        found = Session(trained.model).run({"x": held["x"]})["y"]
        return float((found.argmax(1) == held["labels"]).mean())

    assert score() > score(batch_statistics=False) + 0.2


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path):
    class Killed(Exception):
        pass

    def kill(done: int, total: int, figures: Any) -> None:
        if done == 7:
            raise Killed

    options = {"evaluate": draw(20, 3), "checkpoint_seconds": 0.0}
    whole = fit(**options)
    options["checkpoint"] = tmp_path / "run.npz"
    with pytest.raises(Killed):
        fit(**options, progress=kill)
    again = fit(**options)
    for name, value in whole.model.graph.initializers.items():
        other = again.model.graph.initializers[name].const_value
        assert value.const_value is not None and other is not None
        np.testing.assert_array_equal(value.const_value.numpy(), other.numpy())
    assert whole.history == again.history


def test_a_sample_that_is_left_over_is_left_out():
    calls: list[int] = []
    fit(count=41, epochs=1, progress=lambda done, total, _: calls.append(total))
    fit(count=42, epochs=1, progress=lambda done, total, _: calls.append(total))
    fit(count=43, epochs=1, accumulate=2, progress=lambda done, total, _: calls.append(total))
    assert calls == [4] * 4 + [5] * 5 + [4] * 4


def test_one_sample_has_no_statistics():
    assert not kept(fit(network(batch=1))).any()
    with pytest.raises(InputError, match="two samples or more"):
        fit(network(batch=1), batch_statistics=True)
    with pytest.raises(InputError, match="a batch takes 2 samples, there are 1"):
        fit(count=1)
    with pytest.raises(InputError, match="no batch normalization"):
        fit(to_train(network(fresh=False)), batch_statistics=True)


def test_a_student_is_folded_when_it_has_learned():
    teacher = network(fresh=False)
    fresh = derive(teacher, "fresh").model
    assert are_fresh(fresh) and "BatchNormalization" in {node.op_type for node in fresh.graph}
    found = distill(teacher, fresh, {"x": draw(60)["x"]}, epochs=40, batch_size=20,
                    optimizer=SGD(0.1)).model  # fmt: skip
    assert [node.op_type for node in found.graph] == ["Gemm", "Relu", "Gemm"]
    x = draw(200, 5)["x"]
    wanted, said = (Session(m).run({"x": x})["y"].argmax(1) for m in (teacher, found))
    assert (wanted == said).mean() > 0.8
